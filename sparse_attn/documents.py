"""Where each query row stands: its index among the keys, its document, its rotary position.

Everything structural (causality, block grids, windows, sinks) is decided by the *index* of a row in
the key buffer and by the index at which its document starts; rotary positions only rotate.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from sparse_attn.shards import Shards


@dataclasses.dataclass(frozen=True)
class Rows:
    """The query rows of one call.

    ``index`` [B, T]: row index in the key buffer, -1 for padding. ``start`` [B, T]: index of the
    first token of the row's document. ``positions`` [B, T]: rotary positions. ``valid`` [B, T].
    ``appended`` [B]: how many valid tokens the call brings per sequence.
    """

    index: Int[Array, "B T"]
    start: Int[Array, "B T"]
    positions: Int[Array, "B T"]
    valid: Bool[Array, "B T"]
    appended: Int[Array, " B"]


def place_rows(
    batch: int,
    tokens: int,
    *,
    length: Int[Array, " B"] | None,
    positions: Int[Array, "B T"] | None,
    segment_ids: Int[Array, "B T"] | None,
    alignment: int = 1,
) -> Rows:
    """Place ``tokens`` new rows after ``length`` cached tokens (``None``: no cache).

    Without a cache ``segment_ids`` may pack several documents into a row (0 is padding, documents
    are contiguous and numbered upwards). With a cache they may only mark right padding.

    Raises:
      ValueError: on shapes that disagree, on documents that do not start at a multiple of
        ``alignment``, on several documents together with a cache. The last two look at values and
        are raised only where ``segment_ids`` is concrete (outside ``jit``).
    """
    for name, array in (("positions", positions), ("segment_ids", segment_ids)):
        if array is not None and array.shape != (batch, tokens):
            raise ValueError(f"{name}.shape={array.shape} must be [B, T]=({batch}, {tokens})")
    offsets = jnp.broadcast_to(jnp.arange(tokens, dtype=jnp.int32)[None, :], (batch, tokens))
    if segment_ids is None:
        valid = jnp.ones((batch, tokens), bool)
    else:
        check_segments(segment_ids, alignment, cached=length is not None)
        valid = segment_ids > 0
    if length is None:
        start = jnp.zeros_like(offsets) if segment_ids is None else _document_starts(segment_ids)
        index = offsets
    else:
        start = jnp.zeros_like(offsets)
        index = length[:, None].astype(jnp.int32) + offsets
    if positions is None:
        positions = index - start
    return Rows(
        index=jnp.where(valid, index, -1),
        start=jnp.where(valid, start, 0),
        positions=positions.astype(jnp.int32),
        valid=valid,
        appended=jnp.sum(valid, axis=1, dtype=jnp.int32),
    )


def place_shard(
    shards: Shards,
    batch: int,
    tokens: int,
    *,
    length: Int[Array, " B"] | None,
    positions: Int[Array, "B T"] | None,
    segment_ids: Int[Array, "B T"] | None,
    alignment: int = 1,
) -> tuple[Rows, Rows]:
    """The rows that are here, as :func:`place_rows` has them, and those of the whole sequence.

    The two are the same unless ``shards`` split the call's tokens; then ``tokens``, ``positions``
    and ``segment_ids`` are of those here, and ids and positions are gathered.
    """
    positions, segment_ids = (
        None if x is None else shards.gather(x) for x in (positions, segment_ids)
    )
    whole = place_rows(
        batch,
        shards.tokens(tokens),
        length=length,
        positions=positions,
        segment_ids=segment_ids,
        alignment=alignment,
    )
    if not shards.split:
        return whole, whole
    fields = ("index", "start", "positions", "valid")
    here = {name: shards.mine(getattr(whole, name)) for name in fields}
    return dataclasses.replace(whole, **here), whole


def _document_starts(segment_ids: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """Index of the first token of every token's document."""
    batch, tokens = segment_ids.shape
    before = jnp.concatenate(
        [jnp.full((batch, 1), -1, segment_ids.dtype), segment_ids[:, :-1]], axis=1
    )
    offsets = jnp.broadcast_to(jnp.arange(tokens, dtype=jnp.int32)[None, :], (batch, tokens))
    return jax.lax.cummax(jnp.where(segment_ids != before, offsets, 0), axis=1)


def check_segments(segment_ids: Int[Array, "B T"], alignment: int, cached: bool) -> None:
    """Raise ``ValueError`` for documents that cannot be placed (where ids are concrete)."""
    if isinstance(segment_ids, jax.core.Tracer):
        return
    ids = np.asarray(segment_ids)
    if cached:
        valid = ids > 0
        if (np.diff(valid.astype(np.int8), axis=1) > 0).any() or len(np.unique(ids[valid])) > 1:
            raise ValueError(
                "with a cache each row holds one document, padded on the right: segment_ids must "
                f"be one positive id followed by zeros, got {ids.tolist()}; "
                "pack documents only without a cache"
            )
        return
    for row, line in enumerate(ids):
        changes = np.flatnonzero(np.diff(line)) + 1
        starts = [0, *changes.tolist()]
        documents = [int(line[s]) for s in starts if line[s] > 0]
        if len(set(documents)) != len(documents):
            raise ValueError(f"row {row}: a document is split into several runs: ids {documents}")
        for s in starts:
            if line[s] > 0 and s % alignment:
                raise ValueError(
                    f"row {row}: document {int(line[s])} starts at {s}, not a multiple of "
                    f"alignment={alignment}; pad the packing so that documents start on a block"
                )
