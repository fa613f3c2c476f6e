"""Ranged attention: query row t attends the keys ``start[t] <= s < stop[t]``.

Causal dense attention, packed documents, sliding windows and cluster-sorted routing are all
ranges. Axis alphabet: see :mod:`sparse_attn.types`.
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kernels_pallas.common import AttentionOutput, Implementation, dispatch, kernels
from kernels_pallas.ranged.reference import ranged_attention_reference
from kernels_pallas.ranged.xla import ranged_attention_xla

_BACKENDS = {
    "reference": ranged_attention_reference,
    "xla": ranged_attention_xla,
    **kernels("ranged", "ranged_attention"),
}


def ranged_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K Hv"],
    start: Int[Array, "B T"],
    stop: Int[Array, "B T"],
    *,
    scale: float | None = None,
    implementation: Implementation = "auto",
) -> AttentionOutput:
    """Softmax attention of each query row over a contiguous range of keys.

        out[t, n] = sum_s p[s] v[s, n // G],  p = softmax over s in [start[t], stop[t]) of
        scale * q[t, n] . k[s, n // G],       lse[t, n] = log sum_s exp(scale * q . k)

    T and S are independent, so one query row over a long buffer (decode) and a whole sequence are
    the same call. Ranges are row indices in the key buffer and are clipped to [0, S]; they need
    not be monotone in t, but work and time follow the span that neighbouring rows share.

    Args:
      q: queries, float32, float64 or bfloat16.
      k: keys; N must be a multiple of K, query head n reads kv head ``n // (N // K)``.
      v: values, of any width Hv.
      start: first visible key of each row.
      stop: one past the last visible key; ``stop <= start`` makes the row see nothing.
      scale: logit scale, default ``H ** -0.5``.
      implementation: backend name, see :func:`kernels_pallas.common.dispatch`.

    Returns:
      ``AttentionOutput``: ``out`` [B, T, N, Hv] in the dtype of q, ``lse`` [B, T, N] at least
      float32. A row that sees nothing has out 0, lse -inf and contributes zero gradient.
      Differentiable in q, k and v, through ``out`` and through ``lse``. Memory is linear in
      T + S. Keys, values and queries that no range touches may hold anything, NaN included.

    Raises:
      ValueError: on shapes or dtypes that do not fit together.
    """
    check_heads(q, k, v)
    check_rows(q, start=start, stop=stop)
    keys = k.shape[1]
    if keys == 0:
        padding = ((0, 0), (0, 1), (0, 0), (0, 0))
        k, v = jnp.pad(k, padding), jnp.pad(v, padding)
    start = jnp.clip(start, 0, keys).astype(jnp.int32)
    stop = jnp.clip(stop, 0, keys).astype(jnp.int32)
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    return dispatch(
        "ranged_attention", implementation, _BACKENDS, q, k, v, start, stop, scale=scale
    )


def check_heads(q: Array, k: Array, v: Array) -> None:
    """Raise ``ValueError`` unless q [B, T, N, H], k [B, S, K, H] and v [B, S, K, Hv] agree."""
    if q.ndim != 4 or k.ndim != 4 or v.ndim != 4:
        raise ValueError(
            f"q {q.shape}, k {k.shape} and v {v.shape} must have four axes: "
            "[B, T, N, H], [B, S, K, H] and [B, S, K, Hv]"
        )
    if k.shape[:3] != v.shape[:3]:
        raise ValueError(f"k {k.shape} and v {v.shape} must agree in batch, length and kv heads")
    if q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise ValueError(f"q {q.shape} and k {k.shape} must agree in batch and head width")
    if q.shape[1] == 0:
        raise ValueError(f"q {q.shape} holds no query row")
    if q.shape[2] % k.shape[2]:
        raise ValueError(
            f"query heads {q.shape[2]} are not a multiple of kv heads {k.shape[2]}; "
            "every kv head serves the same number of query heads"
        )
    if not (q.dtype == k.dtype == v.dtype and jnp.issubdtype(q.dtype, jnp.floating)):
        raise ValueError(
            f"q {q.dtype}, k {k.dtype} and v {v.dtype} must share one floating dtype; cast first"
        )


def check_rows(q: Array, **rows: Array) -> None:
    """Raise ``ValueError`` unless every named array is an integer [B, T]."""
    for name, value in rows.items():
        if value.shape != q.shape[:2]:
            raise ValueError(f"{name} {value.shape} must be [B, T] = {q.shape[:2]}")
        if not jnp.issubdtype(value.dtype, jnp.integer):
            raise ValueError(f"{name} has dtype {value.dtype}; it must be an integer dtype")
