"""Block-sparse attention: the public call, its checks and its choice of a backend."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kernels_pallas.block_sparse import reference, xla
from kernels_pallas.common import AttentionOutput, Implementation, dispatch, kernels

__all__ = ["block_sparse_attention", "check_arguments"]


_BACKENDS = {
    "reference": reference.block_sparse_attention,
    "xla": xla.block_sparse_attention,
    **kernels("block_sparse", "block_sparse_attention"),
}


def block_sparse_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K Hv"],
    indices: Int[Array, "B T J P"],
    *,
    block_size: int,
    positions: Int[Array, "B T"] | None = None,
    causal: bool = True,
    scale: float | None = None,
    implementation: Implementation = "auto",
) -> AttentionOutput:
    """Attention of every query over the keys of the blocks in its list.

    out[b,t,n] = sum_s softmax_s(scale * q[b,t,n] . k[b,s,n//G]) v[b,s,n//G] over the keys s < S
    whose block ``s // block_size`` is listed in ``indices[b,t,j]`` and, if ``causal``, with
    ``s <= positions[b,t]``.

    Args:
      q: queries [B, T, N, H], float.
      k: keys [B, S, K, H]; K divides N and query head n reads kv head n // G, G = N/K.
      v: values [B, S, K, Hv]; Hv may differ from H.
      indices: block numbers [B, T, J, P], int32, ascending and without duplicates in a list, -1 in
        unused trailing slots. J is 1 (a list for all heads), K (per kv head) or N (per query head).
      block_size: number of keys in a block (1 = tokens). S need not be a multiple of it.
      positions: row of the key buffer each query sits at [B, T], int32; -1 sees nothing. Default:
        ``arange(T)``, for which T must equal S under ``causal``. Unused without ``causal``.
      causal: hide the keys after a query's position.
      scale: factor on the logits; default H**-0.5.
      implementation: backend, see :func:`kernels_pallas.common.dispatch`.

    Returns:
      ``out`` [B, T, N, Hv] in q's dtype and ``lse`` [B, T, N] (natural logarithm, at least
      float32). Differentiable in q, k and v, through both outputs. A row that sees nothing has
      out 0, lse -inf and gradient 0.

    Raises:
      ValueError: for shapes, dtypes or sizes that contradict each other.
      NotImplementedError: if the named backend cannot serve the call.
    """
    check_arguments("block_sparse_attention", q, k, v, indices, positions, block_size)
    queries, width = q.shape[1], q.shape[3]
    if positions is None:
        if causal and queries != k.shape[1]:
            raise ValueError(
                f"block_sparse_attention: {queries} queries over {k.shape[1]} keys need "
                "positions [B, T] under causal=True (the default arange(T) wants T == S)"
            )
        positions = jnp.broadcast_to(jnp.arange(queries, dtype=jnp.int32)[None, :], q.shape[:2])
    return dispatch(
        "block_sparse_attention",
        implementation,
        _BACKENDS,
        q,
        k,
        v,
        indices,
        block_size=block_size,
        positions=positions,
        causal=causal,
        scale=width**-0.5 if scale is None else scale,
    )


def check_arguments(
    op: str,
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K Hv"],
    indices: Int[Array, "B T J P"],
    positions: Int[Array, "B T"] | None,
    block_size: int,
) -> None:
    """Raise ``ValueError`` where the arguments of an attention over listed blocks disagree."""
    for name, array in (("q", q), ("k", k), ("v", v), ("indices", indices)):
        if array.ndim != 4:
            raise ValueError(f"{op}: {name} has shape {array.shape}; it needs 4 axes")
    batch, queries, query_heads, width = q.shape
    kv_heads = k.shape[2]
    if k.shape != (batch, k.shape[1], kv_heads, width) or v.shape[:3] != k.shape[:3]:
        raise ValueError(
            f"{op}: q {q.shape}, k {k.shape}, v {v.shape} disagree; expected [B,T,N,H], [B,S,K,H], "
            "[B,S,K,Hv]"
        )
    if 0 in (k.shape[1], kv_heads, width):
        raise ValueError(f"{op}: k {k.shape} has no keys; S, K and H must be at least 1")
    if query_heads == 0 or query_heads % kv_heads:
        raise ValueError(f"{op}: query heads N={query_heads} is not a multiple of K={kv_heads}")
    if indices.shape[:2] != (batch, queries) or indices.shape[2] not in (1, kv_heads, query_heads):
        raise ValueError(
            f"{op}: indices {indices.shape} must be [B={batch}, T={queries}, J, P] with J in "
            f"{sorted({1, kv_heads, query_heads})} (one list, per kv head, per query head)"
        )
    if indices.shape[3] == 0:
        raise ValueError(f"{op}: indices {indices.shape} has no slots; P must be at least 1")
    if not jnp.issubdtype(indices.dtype, jnp.signedinteger):
        raise ValueError(f"{op}: indices are {indices.dtype}; use int32 (-1 marks unused slots)")
    for name, array in (("q", q), ("k", k), ("v", v)):
        if not jnp.issubdtype(array.dtype, jnp.floating):
            raise ValueError(f"{op}: {name} is {array.dtype}; it must be floating point")
    if block_size < 1:
        raise ValueError(f"{op}: block_size={block_size} must be at least 1")
    if positions is not None:
        if positions.shape != (batch, queries):
            raise ValueError(f"{op}: positions {positions.shape} must be [B={batch}, T={queries}]")
        if not jnp.issubdtype(positions.dtype, jnp.signedinteger):
            raise ValueError(f"{op}: positions are {positions.dtype}; use int32")
