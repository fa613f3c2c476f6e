"""Dense causal attention (optionally a sliding window): the yardstick, under the same contract."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from sparse_attn.cache import check_capacity, checked_truncation, write_rows
from sparse_attn.documents import place_shard
from sparse_attn.parallel.ranges import cached_range_attention, range_attention
from sparse_attn.registry import MechanismConfig, register
from sparse_attn.shards import Strategy
from sparse_attn.types import Attend, Aux, Heads, HeadShape, Implementation


@dataclasses.dataclass(frozen=True)
class Dense(MechanismConfig):
    """Softmax attention over all earlier tokens of the document, or over the last ``window``.

    Attributes:
      window: latest tokens a row sees, its own included; None for all.
      implementation: which backend runs it; "auto" takes the first that can.

    Raises:
      ValueError: if ``window`` is below 1.
    """

    window: int | None = None
    implementation: Implementation = "auto"

    def __post_init__(self) -> None:
        if self.window is not None and self.window < 1:
            raise ValueError(f"window={self.window} must be at least 1, or None for all tokens")

    @property
    def sequence_strategies(self) -> tuple[Strategy, ...]:
        """A window needs its neighbours' keys only."""
        every: tuple[Strategy, ...] = ("gather", "ring", "ulysses")
        return every if self.window is None else ("halo", *every)

    def covering(self, length: int) -> Dense:
        """The variant that equals dense attention for documents up to ``length`` tokens."""
        return dataclasses.replace(self, window=None if self.window is None else length)

    def density(self, length: int) -> float:
        """Attended over causal token pairs of one document of ``length`` tokens."""
        window = length if self.window is None else min(self.window, length)
        return (window * (window + 1) / 2 + (length - window) * window) / (
            length * (length + 1) / 2
        )

    @staticmethod
    def tiny() -> tuple[Dense, ...]:
        """Variants for the property suite."""
        return (Dense(), Dense(window=7))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DenseCache:
    """Rotated keys and values of every token: ``k`` [B, S, K, H], ``v`` [B, S, K, Hv]."""

    length: Int[Array, " B"]
    k: Float[Array, "B S K H"]
    v: Float[Array, "B S K Hv"]
    token_axes: ClassVar = {"k": 1, "v": 1}

    @property
    def capacity(self) -> int:
        """S, the tokens a sequence can hold."""
        return self.k.shape[1]

    def truncate(self, lengths: Int[Array, " B"]) -> DenseCache:
        """Forget the tokens after ``lengths``; any number can be undone."""
        cut = checked_truncation(self.length, lengths, rollback=self.k.shape[1])
        return dataclasses.replace(self, length=cut)


@register(Dense, "dense")
class DenseAttention(nnx.Module):
    """No parameters; see :class:`Dense`."""

    def __init__(
        self, config: Dense, shape: HeadShape, *, rngs: nnx.Rngs, param_dtype: Any = jnp.float32
    ):
        del rngs, param_dtype
        self.config = config
        self.shape = shape

    def init_cache(self, batch: int, capacity: int, dtype: Any, rollback: int = 0) -> DenseCache:
        """An empty cache for ``capacity`` tokens a sequence; ``rollback`` costs nothing here."""
        del rollback
        keys = (batch, capacity, self.shape.kv_heads)
        return DenseCache(
            length=jnp.zeros((batch,), jnp.int32),
            k=jnp.zeros((*keys, self.shape.head_width), dtype),
            v=jnp.zeros((*keys, self.shape.value_width), dtype),
        )

    def __call__(
        self,
        heads: Heads,
        cache: DenseCache | None = None,
        *,
        positions: Int[Array, "B T"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
        attend: Attend = "sparse",
        inspect: bool = False,
    ) -> tuple[Float[Array, "B T N Hv"], DenseCache | None, Aux]:
        """The mechanism contract; ``attend`` and ``inspect`` change nothing here."""
        del attend, inspect
        shards = heads.shards
        rows, _ = place_shard(
            shards,
            *heads.q.shape[:2],
            length=None if cache is None else cache.length,
            positions=positions,
            segment_ids=segment_ids,
        )
        q = heads.rope(heads.q, rows.positions)
        k = heads.rope(heads.k[0], rows.positions)
        v = heads.v[0]
        window, implementation = self.config.window, self.config.implementation
        start, stop = rows.start, rows.index + 1
        if window is not None:
            start = jnp.maximum(start, stop - window)
        if cache is None:
            out, _ = range_attention(
                q, k, v, start, stop, shards=shards, window=window, implementation=implementation
            )
            return out, None, Aux.empty()
        if not shards.cache_split:
            check_capacity(cache.length, rows.appended, cache.capacity)
        cache = DenseCache(
            length=cache.length + rows.appended,
            k=write_rows(cache.k, k, rows.index, rows.valid, shards),
            v=write_rows(cache.v, v, rows.index, rows.valid, shards),
        )
        k, v = cache.k.astype(q.dtype), cache.v.astype(q.dtype)
        out, _ = cached_range_attention(
            q, k, v, start, stop, shards=shards, implementation=implementation
        )
        return out, cache, Aux.empty()

    def update_state(self, statistics: dict[str, Array]) -> None:
        """Nothing to update."""
        del statistics
