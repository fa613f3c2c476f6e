"""Policies whose lists are fixed by position: StreamingLLM, and DuoAttention's split of heads."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from kernels_pallas.ranged import ranged_attention
from sparse_attn.documents import Rows
from sparse_attn.policies.module import Policy, register_policy
from sparse_attn.policies.rules import Queries, forced_keys, visible_keys
from sparse_attn.types import AttentionOutput, HeadShape, Implementation, merge


def attend_ends(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K Hv"],
    rows: Rows,
    sinks: int,
    recent: int,
    implementation: Implementation,
) -> AttentionOutput:
    """Attention to the document's first ``sinks`` keys and the last ``recent``: two key ranges."""
    window = jnp.maximum(rows.start, rows.index - recent + 1)
    near = ranged_attention(q, k, v, window, rows.index + 1, implementation=implementation)
    if sinks == 0:
        return near
    stop = jnp.minimum(rows.start + sinks, window)
    far = ranged_attention(q, k, v, rows.start, stop, implementation=implementation)
    return merge(far, near)


@register_policy("streaming_llm")
@dataclasses.dataclass(frozen=True)
class StreamingLLM(Policy):
    """Attention sinks and a sliding window (arXiv 2309.17453).

    Keys keep the rotation of their true position; the paper rotates by the place in the cache. The
    cache here keeps every token, so that the same cache serves every policy.
    """

    sinks: int = 4
    recent: int = 512

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.recent < 1:
            raise ValueError(f"recent={self.recent} must be at least 1: the row's own token")

    def lists(self, shape: HeadShape) -> int:
        """One list for all heads."""
        del shape
        return 1

    def capacity(self, keys: int) -> int:
        """P: sinks and window."""
        return min(keys, self.sinks + self.recent)

    def attended(self, seen: int) -> float:
        """Sinks and window."""
        return min(seen, self.sinks + self.recent)

    def member(self, queries: Queries, view: Any, keys: int) -> Bool[Array, "B c 1 S"]:
        """Sinks and window."""
        del view
        return forced_keys(queries, keys, self.sinks, self.recent)

    def attend(
        self,
        q: Float[Array, "B T N H"],
        k: Float[Array, "B S K H"],
        v: Float[Array, "B S K Hv"],
        rows: Rows,
        view: Any,
        *,
        decoding: bool,
    ) -> AttentionOutput:
        """Two ranges of keys."""
        del view, decoding
        return attend_ends(q, k, v, rows, self.sinks, self.recent, self.implementation)

    @staticmethod
    def tiny() -> tuple[StreamingLLM, ...]:
        """A variant for the property suite."""
        return (StreamingLLM(sinks=2, recent=4),)


@register_policy("duo")
@dataclasses.dataclass(frozen=True)
class Duo(Policy):
    """Streaming heads beside full ones, as DuoAttention (arXiv 2410.10819) serves a model.

    Streaming heads see sinks and window, the others every token. The paper finds them by training a
    gate per kv head; here they are given.

    Attributes:
      streaming_heads: numbers of the kv heads that stream.

    Raises:
      ValueError: on repeated or negative kv heads, or an empty window.
    """

    sinks: int = 64
    recent: int = 256
    streaming_heads: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.recent < 1:
            raise ValueError(f"recent={self.recent} must be at least 1: the row's own token")
        heads = self.streaming_heads
        if len(set(heads)) != len(heads) or any(head < 0 for head in heads):
            raise ValueError(f"streaming_heads={heads} must be different kv heads, from 0 on")

    def check(self, shape: HeadShape) -> None:
        """Raise ``ValueError`` if a streaming head does not exist."""
        if any(head >= shape.kv_heads for head in self.streaming_heads):
            raise ValueError(
                f"streaming_heads={self.streaming_heads} name kv heads outside "
                f"0..{shape.kv_heads - 1}; they count kv heads, not query heads"
            )

    def lists(self, shape: HeadShape) -> int:
        """One list per kv head."""
        return shape.kv_heads

    def capacity(self, keys: int) -> int:
        """Full heads list every key."""
        return keys

    def attended(self, seen: int) -> float:
        """All of them, as far as one knows without the number of heads."""
        return seen

    def observe(
        self, state: Any, q: Any, k: Any, rows: Any, length: Any, shape: HeadShape
    ) -> tuple[Any, Any]:
        """Only the number of kv heads matters."""
        del q, k, rows, length
        return state, {"head": jnp.arange(shape.kv_heads, dtype=jnp.int32)}

    def member(self, queries: Queries, view: Any, keys: int) -> Bool[Array, "B c K S"]:
        """Sinks and window, or every causal key."""
        streaming = jnp.asarray(self.streaming_heads, jnp.int32)[None, :]
        full = jnp.all(view["head"][:, None] != streaming, axis=1)[None, None, :, None]
        ends = forced_keys(queries, keys, self.sinks, self.recent)
        return ends | (full & visible_keys(queries, keys))

    def attend(
        self,
        q: Float[Array, "B T N H"],
        k: Float[Array, "B S K H"],
        v: Float[Array, "B S K Hv"],
        rows: Rows,
        view: Any,
        *,
        decoding: bool,
    ) -> AttentionOutput:
        """The heads apart: one or two ranges of keys each."""
        del view, decoding
        kv_heads, group = k.shape[2], q.shape[2] // k.shape[2]
        streaming = [head for head in range(kv_heads) if head in self.streaming_heads]
        full = [head for head in range(kv_heads) if head not in self.streaming_heads]
        parts = []
        for heads in (streaming, full):
            if not heads:
                continue
            ours = jnp.asarray([head * group + g for head in heads for g in range(group)])
            at = jnp.asarray(heads)
            some = (jnp.take(q, ours, axis=2), jnp.take(k, at, axis=2), jnp.take(v, at, axis=2))
            if heads is streaming:
                part = attend_ends(*some, rows, self.sinks, self.recent, self.implementation)
            else:
                part = ranged_attention(
                    *some, rows.start, rows.index + 1, implementation=self.implementation
                )
            parts.append(part)
        order = [head * group + g for head in [*streaming, *full] for g in range(group)]
        back = jnp.argsort(jnp.asarray(order))
        return AttentionOutput(
            jnp.take(jnp.concatenate([part.out for part in parts], axis=2), back, axis=2),
            jnp.take(jnp.concatenate([part.lse for part in parts], axis=2), back, axis=2),
        )

    @staticmethod
    def tiny() -> tuple[Duo, ...]:
        """A variant for the property suite."""
        return (Duo(streaming_heads=(0,), sinks=2, recent=4),)
