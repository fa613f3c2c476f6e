"""Gathered attention for decoding: the public call, its checks and its choice of a backend."""

from __future__ import annotations

import jax
from jaxtyping import Array, Float, Int

from kernels_pallas.block_sparse.api import check_arguments
from kernels_pallas.common import AttentionOutput, Implementation, dispatch, kernels
from kernels_pallas.gather_decode import reference, xla
from kernels_pallas.gather_decode.blocked import (
    as_tokens,
    gather_blocks_reference,
    gather_blocks_xla,
)
from kernels_pallas.gather_decode.tokens import gather_tokens_reference, gather_tokens_xla

__all__ = ["gather_blocks", "gather_decode", "gather_tokens"]


_BACKENDS = {
    "reference": reference.gather_decode,
    "xla": xla.gather_decode,
    **kernels("gather_decode", "gather_decode"),
}
_BLOCKED_BACKENDS = {
    "reference": gather_blocks_reference,
    "xla": gather_blocks_xla,
    **kernels("gather_decode", "gather_blocks"),
}
_TOKEN_BACKENDS = {
    "reference": gather_tokens_reference,
    "xla": gather_tokens_xla,
    **kernels("gather_decode", "gather_tokens"),
}


def gather_decode(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K Hv"],
    indices: Int[Array, "B T J P"],
    *,
    block_size: int,
    positions: Int[Array, "B T"],
    causal: bool = True,
    scale: float | None = None,
    implementation: Implementation = "auto",
) -> AttentionOutput:
    """Block-sparse attention for few queries: every list's blocks are gathered and attended.

    The formula, arguments, results and errors are those of
    :func:`kernels_pallas.block_sparse.block_sparse_attention`; ``positions`` [B, T] is required.
    Work and memory are O(B T J P block_size) and independent of S: the cache is neither copied nor
    transposed. Meant for decode steps (T of one to a few); for many queries the block-sparse op,
    which shares loads between neighbouring queries, is faster.

    Returns:
      ``out`` [B, T, N, Hv] in q's dtype and ``lse`` [B, T, N]. Differentiable in q, k and v by
      plain automatic differentiation.

    Raises:
      ValueError: for shapes, dtypes or sizes that contradict each other.
      NotImplementedError: if the named backend cannot serve the call.
    """
    check_arguments("gather_decode", q, k, v, indices, positions, block_size)
    return dispatch(
        "gather_decode",
        implementation,
        _BACKENDS,
        q,
        k,
        v,
        indices,
        block_size=block_size,
        positions=positions,
        causal=causal,
        scale=q.shape[3] ** -0.5 if scale is None else scale,
    )


def gather_blocks(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B K M H L"],
    v: Float[Array, "B K M L Hv"],
    indices: Int[Array, "B T J P"],
    *,
    positions: Int[Array, "B T"],
    causal: bool = True,
    scale: float | None = None,
    implementation: Implementation = "auto",
) -> AttentionOutput:
    """:func:`gather_decode` from a blocked cache: M blocks of L tokens, keys transposed in each.

    Key s of head h is ``k[:, h, s // L, :, s % L]``, its value ``v[:, h, s // L, s % L]``. Blocks
    are contiguous in memory, which makes reading them several times as fast on CPUs as from
    [B, S, K, H]. Unlike there, slots that nobody sees must hold finite numbers: a cache of zeros
    into which valid tokens are written does.

    Args and results as in :func:`gather_decode`; the block size is L.

    Raises:
      ValueError: for shapes, dtypes or sizes that contradict each other.
      NotImplementedError: if the named backend cannot serve the call.
    """
    if k.ndim != 5 or v.ndim != 5 or k.shape[:3] != v.shape[:3] or k.shape[4] != v.shape[3]:
        raise ValueError(
            f"gather_blocks: k {k.shape} and v {v.shape} must be [B, K, M, H, L] and "
            "[B, K, M, L, Hv]"
        )
    keys, values = jax.eval_shape(as_tokens, k, v)
    check_arguments("gather_blocks", q, keys, values, indices, positions, k.shape[4])
    return dispatch(
        "gather_blocks",
        implementation,
        _BLOCKED_BACKENDS,
        q,
        k,
        v,
        indices,
        positions=positions,
        causal=causal,
        scale=q.shape[3] ** -0.5 if scale is None else scale,
    )


def gather_tokens(
    q: Float[Array, "B T N H"],
    kv: Float[Array, "B S K HHv"],
    indices: Int[Array, "B T J P"],
    *,
    positions: Int[Array, "B T"],
    scale: float | None = None,
    implementation: Implementation = "auto",
) -> AttentionOutput:
    """:func:`gather_decode` of single tokens from a cache of keys with their values behind them.

    ``kv[..., :H]`` are keys and ``kv[..., H:]`` values; a listed token is fetched at once. The rows
    are causal. As with :func:`gather_blocks`, rows that nobody sees must hold finite numbers.

    Args and results as in :func:`gather_decode`; ``indices`` are tokens.

    Raises:
      ValueError: for shapes, dtypes or sizes that contradict each other.
      NotImplementedError: if the named backend cannot serve the call.
    """
    width = q.shape[-1]
    if kv.ndim != 4 or kv.shape[3] <= width:
        raise ValueError(
            f"gather_tokens: kv {kv.shape} must be [B, S, K, H + Hv] with H={width}, the width of q"
        )
    k, v = jax.eval_shape(lambda kv: (kv[..., :width], kv[..., width:]), kv)
    check_arguments("gather_tokens", q, k, v, indices, positions, 1)
    return dispatch(
        "gather_tokens",
        implementation,
        _TOKEN_BACKENDS,
        q,
        kv,
        indices,
        positions=positions,
        scale=width**-0.5 if scale is None else scale,
    )
