"""Whether a selector finds the evidence, and what it chose instead."""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool, Int


def listed_keys(
    indices: Int[np.ndarray, "*rest P"], block_size: int, query: Int[np.ndarray, "*rest"]
) -> Bool[np.ndarray, "*rest S"]:
    """Which of the keys 0..S-1 each list holds, S being one more than the last query.

    ``indices``: block numbers, -1 where unused, as in :class:`sparse_attn.types.Selection`.
    ``query``: position of the list's query; later keys of its blocks are left out.
    """
    count = int(query.max()) + 1
    blocks = -(-count // block_size)
    listed = np.zeros((*indices.shape[:-1], blocks + 1), bool)
    # Unused slots, and blocks behind the last query, mark the extra block at the end.
    used = (indices >= 0) & (indices < blocks)
    np.put_along_axis(listed, np.where(used, indices, blocks), True, axis=-1)
    keys = np.repeat(listed[..., :blocks], block_size, axis=-1)[..., :count]
    return keys & (np.arange(count) <= query[..., None])


def evidence_recall(
    indices: Int[np.ndarray, "T J P"],
    block_size: int,
    query: Int[np.ndarray, "T"],
    evidence: Int[np.ndarray, "E"],
) -> float:
    """Share of the evidence tokens that a row's list holds, mean over rows and lists.

    Keys that are attended without being listed (a window branch, say) do not count.

    Raises:
      ValueError: if there is no evidence, or it stands behind a query.
    """
    if not len(evidence) or evidence.max() > query.min():
        raise ValueError(
            f"{len(evidence)} evidence tokens up to {evidence.max(initial=-1)} for queries from "
            f"{query.min()}: there must be evidence, and before every query"
        )
    rows = np.broadcast_to(query[:, None], indices.shape[:-1])
    return float(listed_keys(indices, block_size, rows)[..., evidence].mean())


def chosen_keys(
    indices: Int[np.ndarray, "J P"], block_size: int, query: int
) -> tuple[tuple[int, ...], ...]:
    """Positions that each of one query's lists holds, ascending: a layer of a picture."""
    rows = np.full(indices.shape[:-1], query)
    return tuple(
        tuple(np.flatnonzero(keys).tolist()) for keys in listed_keys(indices, block_size, rows)
    )
