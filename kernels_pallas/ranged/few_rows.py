"""Forward of ranged attention for a handful of query rows over a long key buffer (decode).

Bound by reading keys and values once, so they are read in the layout of the buffer. Two kv heads
(three, where their number is a multiple of three and odd) share one product through block-diagonal
queries: contiguous rows and fewer passes beat the additional arithmetic.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kernels_pallas.common import accumulation_dtype
from kernels_pallas.ranged.tiling import MASKED, Softmax, precision_of, visible

FEW_ROWS = 16
_KEYS = 512


def few_rows_forward(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K Hv"],
    start: Int[Array, "B T"],
    stop: Int[Array, "B T"],
    scale: float,
) -> tuple[Float[Array, "B T N Hv"], Float[Array, "B T N"]]:
    """``out`` and ``lse``; visits only the keys between the first start and the last stop."""
    problem = FewRows(q, k, v, start, stop, scale)
    out, lse = jax.lax.map(problem.attend, jnp.arange(problem.count, dtype=jnp.int32))
    return problem.unpack(out, q.dtype), problem.unpack(lse[..., None], lse.dtype)[..., 0]


class FewRows:
    """Block-diagonal queries, ranges and key steps of one call; F = heads that share a product.

    Problem i of ``count`` is F kv heads of one sequence: M = T * F * G matrix rows.
    """

    def __init__(self, q, k, v, start, stop, scale):
        batch, rows, heads, _ = q.shape
        keys, kv_heads = k.shape[1:3]
        self.batch, self.rows = batch, rows
        self.shared = next(count for count in (2, 3, 1) if kv_heads % count == 0)
        self.bundles = kv_heads // self.shared
        self.group = heads // kv_heads
        self.count = batch * self.bundles
        self.keys = min(_KEYS, keys)
        self.precision = precision_of(q.dtype)
        self.dtype = accumulation_dtype(q.dtype)
        self.value_width = v.shape[3]
        self.k, self.v = (a.reshape(batch, keys, -1) for a in (k, v))
        counts = jnp.maximum(stop - start, 0)
        self.low = jnp.min(jnp.where(counts > 0, start, keys), axis=1)
        self.high = jnp.max(jnp.where(counts > 0, stop, 0), axis=1)
        self.row_start, self.row_count = start, counts
        self.start, self.counts = (
            jnp.repeat(a, self.shared * self.group, axis=1) for a in (start, counts)
        )
        q = jnp.where((counts > 0)[:, :, None, None], q.astype(self.dtype) * scale, 0)
        q = q.reshape(batch, rows, self.bundles, self.shared, self.group, 1, -1)
        q = jnp.moveaxis(q * self._diagonal(), 2, 1)
        self.queries = q.reshape(self.count, rows * self.shared * self.group, -1)

    def _diagonal(self):
        eye = jnp.eye(self.shared, dtype=self.dtype)
        return eye[None, None, None, :, None, :, None]

    def steps(self, i):
        """Number of key steps of problem i."""
        b = i // self.bundles
        span = jnp.maximum(self.high[b] - self.low[b], 0)
        return (span + self.keys - 1) // self.keys

    def position(self, i, j):
        """First key of step j; the last step is moved left to stay inside the buffer."""
        return jnp.minimum(self.low[i // self.bundles] + j * self.keys, self.k.shape[1] - self.keys)

    def step(self, i, j):
        """Logits [M, keys] (masked) and values [keys, F * Hv] of key step j."""
        b = i // self.bundles
        floor = self.low[b] + j * self.keys
        position = self.position(i, j)
        key, value = (self._slab(a, i, position) for a in (self.k, self.v))
        s = position + jnp.arange(self.keys, dtype=jnp.int32)
        offset = s[None, :] - self.row_start[b][:, None]
        read = jnp.any((offset >= 0) & (offset < self.row_count[b][:, None]), axis=0)
        value = jnp.where(read[:, None], value.astype(self.dtype), 0)
        logits = jnp.matmul(self.queries[i], key.astype(self.dtype).T, precision=self.precision)
        mask = visible(position, floor, self.keys, self.start[b], self.counts[b])
        return jnp.where(mask, logits, MASKED), value

    def _slab(self, x, i, position):
        width = x.shape[2] // self.bundles
        at = (i // self.bundles, position, i % self.bundles * width)
        return jax.lax.dynamic_slice(x, at, (1, self.keys, width))[0]

    def empty(self):
        """The softmax of a problem before its first step."""
        rows = self.rows * self.shared * self.group
        return Softmax.empty(rows, self.shared * self.value_width, self.dtype)

    def attend(self, i):
        """Normalised values [M, F * Hv] and lse [M] of problem i."""

        def step(j, softmax):
            logits, value = self.step(i, j)
            return softmax.absorb(logits, value, self.precision)[0]

        return self.finish(jax.lax.fori_loop(0, self.steps(i), step, self.empty()))

    def finish(self, softmax):
        """Keep the diagonal blocks: values [M, Hv] and lse [M]."""
        out, lse = softmax.finish()
        out = out.reshape(1, 1, self.rows, self.shared, self.group, self.shared, -1)
        out = jnp.sum(out * self._diagonal(), axis=5)
        return out.reshape(lse.shape[0], -1), lse

    def unpack(self, x, dtype):
        """[count, M, X] -> [B, T, N, X]."""
        x = x.reshape(self.batch, self.bundles, self.rows, self.shared * self.group, -1)
        x = jnp.moveaxis(x, 1, 2)
        return x.reshape(self.batch, self.rows, -1, x.shape[-1]).astype(dtype)
