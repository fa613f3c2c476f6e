"""MoBA (arXiv 2502.13189): each query head attends its own few key blocks, without parameters.

With rotated keys k, blocks of B tokens and k selected blocks (B = 512, k = 3):

1. K~_i = mean k[B i : B (i + 1)], of whole blocks.
2. s[h, t, i] = q . K~_i, unscaled, for every query head by itself.
3. Selected are the row's own block, which counts inside k, and the k - 1 best earlier ones.
4. Token-causal attention over those blocks; the gate is 0 or 1, so gradients reach the chosen keys
   and values (and q through them) and nothing else.

The paper's configurations: B=512, k=3 in its scaling laws, 2048 and 3 at 32k, 4096 and 12 at 1M.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from kernels_pallas.block_scores import Pooling, select_blocks
from sparse_attn.block_lists import (
    attend_blocks,
    attend_sequences,
    earlier_blocks,
    inspect_blocks,
)
from sparse_attn.cache import check_capacity, checked_truncation, empty_blocks, write_blocks
from sparse_attn.documents import Rows, place_rows, place_shard
from sparse_attn.pooled_keys import append_means, as_keys, empty_entries, mean_entries
from sparse_attn.registry import MechanismConfig, register
from sparse_attn.selecting import eligible_blocks
from sparse_attn.shards import Shards, Strategy
from sparse_attn.types import Attend, Aux, Heads, HeadShape, Implementation


@dataclasses.dataclass(frozen=True)
class MoBA(MechanismConfig):
    """Configuration of MoBA: blocks of ``selection_block`` tokens, each query head selects its own.

    Attributes:
      selection_block: tokens of a block.
      selected_blocks: blocks of a row, its own included; 1 is attention within the own block alone.
      implementation: which backend runs it; "auto" takes the first that can.

    Raises:
      ValueError: if either is below 1.
    """

    selection_block: int = 512
    selected_blocks: int = 3
    implementation: Implementation = "auto"

    def __post_init__(self) -> None:
        for name in ("selection_block", "selected_blocks"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")

    @property
    def alignment(self) -> int:
        """Documents start at multiples of the selection block."""
        return self.selection_block

    @property
    def sequence_strategies(self) -> tuple[Strategy, ...]:
        """Keys and values are gathered."""
        return ("gather",)

    def covering(self, length: int) -> MoBA:
        """The variant that equals dense attention up to ``length``: all blocks."""
        return dataclasses.replace(self, selected_blocks=max(1, -(-length // self.selection_block)))

    def density(self, length: int) -> float:
        """Attended over causal pairs for one document."""
        t = np.arange(length)
        earlier = np.minimum(t // self.selection_block, self.selected_blocks - 1)
        attended = earlier * self.selection_block + t % self.selection_block + 1
        return float(attended.sum() / (t + 1.0).sum())

    def auxiliary_bits(self, shape: HeadShape, element_bits: int = 16) -> float:
        """One mean key a block."""
        return shape.kv_heads * shape.head_width * element_bits / self.selection_block

    @staticmethod
    def tiny() -> tuple[MoBA, ...]:
        """Variants for the property suite."""
        return (MoBA(selection_block=8, selected_blocks=2),)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MoBACache:
    """Rotated keys and values of every token, and the means of whole blocks of keys.

    ``k`` [B, K, M, H, L], ``v`` [B, K, M, L, Hv], block by block; ``means`` [B, K, H, C].
    """

    length: Int[Array, " B"]
    k: Float[Array, "B K M H L"]
    v: Float[Array, "B K M L Hv"]
    means: Float[Array, "B K H C"]
    capacity: int = dataclasses.field(metadata={"static": True})
    token_axes: ClassVar = {"k": 2, "v": 2}

    def truncate(self, lengths: Int[Array, " B"]) -> MoBACache:
        """Forget the tokens after ``lengths``; any number can be undone.

        The mean of a block that lost tokens is in nobody's range, and is written again when the
        block is whole again.
        """
        cut = checked_truncation(self.length, lengths, rollback=self.capacity)
        return dataclasses.replace(self, length=cut)


@register(MoBA, "moba")
class MoBAAttention(nnx.Module):
    """No parameters; see :class:`MoBA`."""

    def __init__(
        self, config: MoBA, shape: HeadShape, *, rngs: nnx.Rngs, param_dtype: Any = jnp.float32
    ):
        del rngs, param_dtype
        self.config = config
        self.shape = shape

    def init_cache(self, batch: int, capacity: int, dtype: Any, rollback: int = 0) -> MoBACache:
        """An empty cache for ``capacity`` tokens a sequence; ``rollback`` costs nothing here.

        Raises:
          ValueError: if ``capacity`` is below 1 or ``rollback`` negative.
        """
        if capacity < 1 or rollback < 0:
            raise ValueError(f"{capacity=} must be at least 1 and {rollback=} must not be negative")
        shape, size = self.shape, self.config.selection_block
        widths = (shape.head_width, shape.value_width)
        k, v = empty_blocks(batch, capacity, shape.kv_heads, size, widths, dtype)
        means = empty_entries(
            batch,
            shape.kv_heads,
            shape.head_width,
            capacity=capacity,
            block=size,
            stride=size,
            dtype=dtype,
        )
        length = jnp.zeros((batch,), jnp.int32)
        return MoBACache(length=length, k=k, v=v, means=means, capacity=capacity)

    def __call__(
        self,
        heads: Heads,
        cache: MoBACache | None = None,
        *,
        positions: Int[Array, "B T"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
        attend: Attend = "sparse",
        inspect: bool = False,
    ) -> tuple[Float[Array, "B T N Hv"], MoBACache | None, Aux]:
        """The mechanism contract. ``attend="fit"`` is ``"dense"``: nothing here can be fitted.

        Raises:
          ValueError: for ``attend="fit"`` together with a cache.
        """
        config = self.config
        if cache is not None and attend == "fit":
            raise ValueError('attend="fit" trains a selector and works without a cache only')
        shards = heads.shards
        batch, tokens = heads.q.shape[:2]
        rows, keys = place_shard(
            shards,
            batch,
            tokens,
            length=None if cache is None else cache.length,
            positions=positions,
            segment_ids=segment_ids,
            alignment=config.alignment,
        )
        q = heads.rope(heads.q, rows.positions)
        k, v = heads.rope(heads.k[0], rows.positions), heads.v[0]
        if cache is None:
            k, v = shards.gather(k), shards.gather(v)
            means = _means(config, k, keys)
        else:
            if not shards.cache_split:
                check_capacity(cache.length, rows.appended, cache.capacity)
            cache = _append(config, cache, k, v, rows, shards)
            means = as_keys(cache.means).astype(q.dtype)
        indices = None
        if inspect or attend == "sparse":
            indices = checkpoint_name(choose_blocks(config, q, means, rows), "selection")
        lists = indices if attend == "sparse" else None
        out = attend_blocks(config, q, k, v, lists, rows, cache, shards)
        if indices is None or not inspect:
            return out, cache, Aux.empty()
        measured, selection = inspect_blocks(
            config, self.shape, q, k, v, indices, keys, cache, shards
        )
        return out, cache, dataclasses.replace(Aux.empty(), metrics=measured, selection=selection)

    def update_state(self, statistics: dict[str, Array]) -> None:
        """Nothing to update."""
        del statistics


def moba_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K Hv"],
    *,
    config: MoBA | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
) -> Float[Array, "B T N Hv"]:
    """MoBA (arXiv 2502.13189) on ready-made heads; see :mod:`sparse_attn.moba`.

    Args:
      q: queries, rotated.
      k: keys, rotated.
      v: values.
      config: block size, selected blocks, implementation.
      segment_ids: 0 is padding (output 0); documents are contiguous and start at multiples of
        ``config.selection_block``.

    Differentiable in everything but the block lists. Memory is linear in T.

    Raises:
      ValueError: on shapes that do not fit.
    """
    config = MoBA() if config is None else config
    rows = place_rows(
        *q.shape[:2],
        length=None,
        positions=None,
        segment_ids=segment_ids,
        alignment=config.alignment,
    )
    indices = checkpoint_name(choose_blocks(config, q, _means(config, k, rows), rows), "selection")
    return attend_sequences(
        q,
        k,
        v,
        indices,
        rows,
        block=config.selection_block,
        implementation=config.implementation,
    )


def choose_blocks(
    config: MoBA, q: Float[Array, "B T N H"], means: Float[Array, "B C K H"], rows: Rows
) -> Int[Array, "B T N P"]:
    """The block list of every query head (stages 2 and 3); nothing is differentiable."""
    return select_blocks(
        q,
        means,
        *earlier_blocks(rows, config.selection_block),
        *eligible_blocks(rows, config.selection_block),
        pooling=Pooling((1.0,), offset=0, stride=1, reducer="max"),
        selected=config.selected_blocks,
        scale=1.0,
        share=False,
        implementation=config.implementation,
    )


def _means(config: MoBA, k: Float[Array, "B T K H"], rows: Rows) -> Float[Array, "B C K H"]:
    """Means of whole sequences' blocks, not differentiable."""
    # A block may reach into padding; nobody sees its mean, but padding may hold NaN.
    k = jnp.where(rows.valid[:, :, None, None], jax.lax.stop_gradient(k), 0)
    return mean_entries(k, config.selection_block, config.selection_block)


def _append(
    config: MoBA,
    cache: MoBACache,
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K Hv"],
    rows: Rows,
    shards: Shards,
) -> MoBACache:
    """The cache with the new tokens, and with the mean of every block they fill."""
    size, tokens = config.selection_block, k.shape[1]
    keys, values = write_blocks(cache.k, cache.v, k, v, rows, shards)
    means = append_means(
        cache.means,
        keys,
        cache.length,
        rows.appended,
        tokens,
        block=size,
        stride=size,
        shards=shards,
    )
    length = cache.length + rows.appended
    return dataclasses.replace(cache, length=length, k=keys, v=values, means=means)
