"""The vocabulary of the project: axes, selections, and what a mechanism takes and returns.

Axis alphabet (used in jaxtyping annotations, einsum strings and local names everywhere)::

    B batch            T query positions     S key positions
    N query heads      K kv heads            G = N/K heads a group
    H head width       Hv value width        D model width
    C compressed keys  P selected slots      J lists a token (1, K or N)
    R kv branches      V vocabulary          W words of a packed code
"""

from __future__ import annotations

import dataclasses
from typing import Literal, Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kernels_pallas.common import AttentionOutput, Implementation, merge
from sparse_attn.shards import WHOLE, Shards

__all__ = [
    "Attend",
    "AttentionOutput",
    "Aux",
    "HeadShape",
    "Heads",
    "Implementation",
    "Rope",
    "Selection",
    "merge",
]

Attend = Literal["sparse", "dense", "fit"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Selection:
    """Which key blocks each query may look at, as indices (never as a mask).

    ``indices`` [B, T, J, P] int32: block numbers in the key buffer, ascending, without duplicates,
    -1 in unused trailing slots. J is 1 (one list for all heads), K (one per kv head) or N (one per
    query head). ``block_size`` (static) is the number of keys a block holds; 1 means tokens.
    """

    indices: Int[Array, "B T J P"]
    block_size: int = dataclasses.field(metadata={"static": True})


class Rope(Protocol):
    """Rotates ``array`` [B, T, heads, H] by ``positions`` [B, T]; ``dims`` leading dims only."""

    def __call__(
        self, array: Float[Array, "B T A H"], positions: Int[Array, "B T"], dims: int | None = None
    ) -> Float[Array, "B T A H"]: ...


@dataclasses.dataclass(frozen=True)
class HeadShape:
    """Sizes a mechanism is built for.

    Raises:
      ValueError: if the query heads do not divide into the kv heads.
    """

    query_heads: int
    kv_heads: int
    head_width: int
    value_width: int
    model_width: int

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if getattr(self, field.name) < 1:
                raise ValueError(f"{field.name}={getattr(self, field.name)} must be at least 1")
        if self.query_heads % self.kv_heads:
            raise ValueError(
                f"query_heads={self.query_heads} is not a multiple of kv_heads={self.kv_heads}; "
                "every kv head serves the same number of query heads"
            )

    @property
    def group(self) -> int:
        """G, the query heads that share one kv head."""
        return self.query_heads // self.kv_heads


@dataclasses.dataclass(frozen=True)
class Heads:
    """What the model hands to a mechanism: un-rotated projections and the way to rotate them.

    ``k`` and ``v`` carry a leading axis R of independent kv branches (``config.kv_branches``).
    ``shards`` says which tokens of the sequence, or of the cache, are here; all of them unless
    :mod:`sparse_attn.parallel` makes the call.
    """

    q: Float[Array, "B T N H"]
    k: Float[Array, "R B T K H"]
    v: Float[Array, "R B T K Hv"]
    x: Float[Array, "B T D"]
    rope: Rope
    shards: Shards = WHOLE


def no_rope(
    array: Float[Array, "B T A H"], positions: Int[Array, "B T"], dims: int | None = None
) -> Float[Array, "B T A H"]:
    """The identity, for models without rotary positions."""
    del positions, dims
    return array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Aux:
    """What a mechanism reports besides its output.

    ``loss`` is an auxiliary loss (float scalar, 0 if none); ``metrics`` named scalars;
    ``statistics`` sums that the train step accumulates over microbatches, psums over data and
    sequence axes and applies once through ``mechanism.update_state``; ``selection`` is filled on
    request (``inspect=True``).
    """

    loss: Float[Array, ""]
    metrics: dict[str, Float[Array, ""]] = dataclasses.field(default_factory=dict)
    statistics: dict[str, Array] = dataclasses.field(default_factory=dict)
    selection: Selection | None = None

    @staticmethod
    def empty() -> Aux:
        """No loss, no metrics, no statistics."""
        return Aux(loss=jnp.zeros((), jnp.float32))
