"""How scores of compressed entries become scores of key blocks, and how blocks are ranked."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

# Importance never exceeds G * sum(weights) and scores stay far below 2^98 in size, so these rank
# every forced block above all others, a recent block above an initial one, and a block without any
# visible entry below all that have one; they are exact in float32.
RECENT_RANK = 2.0**100
INITIAL_RANK = 2.0**99
UNSEEN_SCORE = -(2.0**98)


class BlockScores(NamedTuple):
    """Compressed attention (``out``, ``lse`` as in ``AttentionOutput``) and the chosen blocks.

    ``indices`` are block numbers, ascending, without duplicates, -1 in unused trailing slots.
    """

    out: Float[Array, "B T N Hv"]
    lse: Float[Array, "B T N"]
    indices: Int[Array, "B T K P"]


@dataclasses.dataclass(frozen=True)
class Pooling:
    """Pools probabilities of entries into importance of blocks.

        importance[j] = reduce_m weights[m] * p[stride * j + offset + m]

    with entries outside the visible range counting as 0. NSA with compression block 32, stride 16
    and selection block 64 is ``Pooling((1, 2, 2, 2, 1), offset=-1, stride=4)``.

    Attributes:
      weights: one non-negative weight per entry that touches a block.
      offset: first entry of block j relative to ``stride * j``.
      stride: entries per block.
      reducer: ``"sum"`` or ``"max"``.

    Raises:
      ValueError: if there is no weight, a weight is negative or not finite, stride < 1, the
        reducer is unknown, or blocks skip entries so far that block 0 lies past entry 0.
    """

    weights: tuple[float, ...]
    offset: int
    stride: int
    reducer: Literal["sum", "max"] = "sum"

    def __post_init__(self) -> None:
        object.__setattr__(self, "weights", tuple(float(w) for w in self.weights))
        if not self.weights or any(w < 0 or not math.isfinite(w) for w in self.weights):
            raise ValueError(f"weights={self.weights} must be one or more finite numbers >= 0")
        if self.stride < 1:
            raise ValueError(f"stride={self.stride} must be at least 1")
        if self.reducer not in ("sum", "max"):
            raise ValueError(f"reducer={self.reducer!r} is unknown; use 'sum' or 'max'")

    @staticmethod
    def geometric(compression_block: int, compression_stride: int, selection_block: int) -> Pooling:
        """Eq. 9 of NSA (arXiv 2502.11089), 0-based: the sum over the block's L/d strides m and
        an entry's l/d strides n of p[(L/d) j + m - n].

        Weight of an entry = how many of its l/d stride-sized pieces lie in the block.

        Raises:
          ValueError: unless the stride divides both block sizes.
        """
        pair = (compression_block, selection_block)
        if compression_stride < 1 or any(b < 1 or b % compression_stride for b in pair):
            raise ValueError(
                f"{compression_stride=} must divide {compression_block=} and {selection_block=}"
            )
        pieces = compression_block // compression_stride
        stride = selection_block // compression_stride
        weights = [0.0] * (pieces + stride - 1)
        for m in range(stride):
            for n in range(pieces):
                weights[m - n + pieces - 1] += 1.0
        return Pooling(tuple(weights), offset=1 - pieces, stride=stride)

    def blocks(self, entries: int) -> int:
        """Number of leading blocks that contain every block touched by ``entries`` entries."""
        return max(0, -(-(entries - self.offset) // self.stride))

    def pool(self, probabilities: Float[Array, "... C"]) -> Float[Array, "... M"]:
        """Importance of the ``blocks(C)`` leading blocks, from probabilities over entries."""
        parts = self._parts(probabilities, 0.0)
        combine = jnp.add if self.reducer == "sum" else jnp.maximum
        return functools.reduce(
            combine, [weight * part for weight, part in zip(self.weights, parts, strict=True)]
        )

    def pool_log(self, scores: Float[Array, "... C"]) -> Float[Array, "... M"]:
        """The same in log space, for ``reducer="max"``: max_m log weights[m] + score, -inf if the
        block has no entry.
        """
        parts = self._parts(scores, -jnp.inf)
        weighted = [
            part if weight == 1.0 else part + math.log(weight)
            for weight, part in zip(self.weights, parts, strict=True)
            if weight > 0
        ]
        if not weighted:
            return jnp.full_like(parts[0], -jnp.inf)
        return functools.reduce(jnp.maximum, weighted)

    def _parts(self, values: Float[Array, "... C"], fill: float) -> list[Float[Array, "... M"]]:
        """For every weight, the value of its entry in each block."""
        entries = values.shape[-1]
        blocks = self.blocks(entries)
        left = max(0, -self.offset)
        shift = self.offset + left
        span = shift + self.stride * blocks + len(self.weights)
        lead = [(0, 0)] * (values.ndim - 1)
        padded = jnp.pad(
            values, [*lead, (left, max(0, span - left - entries))], constant_values=fill
        )
        return [
            jax.lax.slice_in_dim(
                padded, shift + m, shift + m + self.stride * blocks, self.stride, axis=-1
            )
            for m in range(len(self.weights))
        ]
