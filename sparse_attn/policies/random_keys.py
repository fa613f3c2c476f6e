"""The control of every selector: keys chosen by a hash of positions, whatever they hold."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Bool, UInt32

from sparse_attn.policies.module import register_policy
from sparse_attn.policies.rules import Queries
from sparse_attn.policies.scored import ScoredPolicy
from sparse_attn.types import HeadShape


@register_policy("random")
@dataclasses.dataclass(frozen=True)
class RandomKeys(ScoredPolicy):
    """``budget`` keys without replacement, uniformly, beside sinks and recent keys.

    The score of key s for query t in list j is a 32-bit hash of (seed, j, t, s), positions counted
    inside the document: nothing else decides, so prefill equals decode. Layers draw different keys
    only with different seeds (``ModelConfig.attention_overrides``).

    Attributes:
      seed: of the hash.

    Raises:
      ValueError: on a seed that is no unsigned 32-bit number.
    """

    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed={self.seed} must fit into 32 bits: 0 <= seed < 2**32")

    def observe(
        self, state: Any, q: Any, k: Any, rows: Any, length: Any, shape: HeadShape
    ) -> tuple[Any, Any]:
        """Only the number of lists matters."""
        del q, k, rows, length
        return state, {"list": jnp.arange(self.lists(shape), dtype=jnp.uint32)}

    def ranking(
        self, queries: Queries, view: Any, visible: Bool[Array, "B c 1 S"]
    ) -> UInt32[Array, "B c J S"]:
        """The hashes."""
        start = queries.start[..., None, None]
        t = (queries.index[..., None, None] - start).astype(jnp.uint32)
        s = jnp.arange(visible.shape[-1], dtype=jnp.int32)[None, None, None, :]
        s = (s - start).astype(jnp.uint32)
        head = mix(mix(jnp.asarray(self.seed, jnp.uint32)) ^ view["list"])[None, None, :, None]
        return mix(mix(head ^ mix(t)) ^ s)

    def selector_bytes(self, shape: HeadShape, length: Any, element_bits: int = 16) -> Any:
        """It reads nothing."""
        del shape, element_bits
        return 0.0 * length

    @staticmethod
    def tiny() -> tuple[RandomKeys, ...]:
        """A variant for the property suite."""
        return (RandomKeys(budget=5, sinks=2, recent=4),)


def mix(x: UInt32[Array, "*shape"]) -> UInt32[Array, "*shape"]:
    """A permutation of 32-bit integers in which every input bit reaches every output bit."""
    x = x + jnp.uint32(0x9E3779B9)
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)
