"""Causal routing on CPUs, one kv head at a time.

The rows of one head fit into a CPU's second-level cache, where they are sorted, and nothing sorted
outlives its head. Temporary memory is time here: the allocator returns large blocks, so that every
call pays a page fault for each 4 KiB of it.
"""

from __future__ import annotations

from functools import partial, reduce
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kernels_pallas.common import accumulation_dtype
from kernels_pallas.ranged.tiling import Tiles
from kernels_pallas.ranged.xla import ranged_forward, ranged_gradients

if TYPE_CHECKING:
    from sparse_attn.routing_sorted import Sorting


FEW_KEYS = 16
"""Up to so many keys, a tile's products cost less than its fixed overhead."""

FEW_KEYS_ROWS = 1024
"""Matrix rows of such a tile."""


class Ranges(NamedTuple):
    """Tokens that every row attends whatever its cluster: the local window and the sinks."""

    local_begin: Int[Array, "B T"]
    local_end: Int[Array, "B T"]
    sink_begin: Int[Array, "B T"]
    sink_end: Int[Array, "B T"]


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def attend_by_head(
    sinks: int,
    alone: bool,
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K Hv"],
    sorting: Sorting,
    ranges: Ranges,
) -> Float[Array, "B T N Hv"]:
    """One softmax over the local window, the sinks and the members of the cluster.

    ``sinks``: the first that many keys hold all sinks. ``alone``: keys are the tokens of the rows,
    and the local window is the row's own, for which no tile is needed. ``sorting`` covers the heads
    that route, which are the first. Differentiable in q, k and v; the gradient needs no merging:
    with the lse of all sets, the weight of a key is exp(logit - lse) in whichever set it is.
    """
    return _forward(sinks, alone, q, k, v, sorting, ranges)[0]


_Range = tuple[Array, Array]


class _Line(NamedTuple):
    """One kv head of a sequence: where it lies in arrays [B, T, heads, X], and its number."""

    batch: Int[Array, ""]
    head: Int[Array, ""]
    kv_heads: int
    routing: int

    def take(self, x: Float[Array, "B T N X"]) -> Float[Array, "1 T G X"]:
        """Its part of a query-shaped array, read once."""
        group = x.shape[2] // self.kv_heads
        zero = jnp.zeros((), jnp.int32)
        at = (self.batch, zero, self.head * group, zero)
        part = jax.lax.dynamic_slice(x, at, (1, x.shape[1], group, x.shape[3]))
        return jax.lax.optimization_barrier(part)

    def put(self, x: Float[Array, "B T N X"], part: Float[Array, "1 T G X"]) -> Array:
        """x with this part replaced."""
        zero = jnp.zeros((), jnp.int32)
        at = (self.batch, zero, self.head * part.shape[2], zero)
        return jax.lax.dynamic_update_slice(x, part.astype(x.dtype), at)

    @property
    def number(self) -> Int[Array, ""]:
        """Of the line among all B * K."""
        return self.batch * self.kv_heads + self.head

    @property
    def sorting(self) -> Int[Array, ""]:
        """Of the line among those that route."""
        return self.batch * self.routing + self.head

    def ranges(self, begin: Int[Array, "B T"], end: Int[Array, "B T"], keys: int) -> _Range:
        """Ranges of its sequence, clipped to the keys."""
        begin, end = (jnp.clip(a[self.batch][None], 0, keys) for a in (begin, end))
        return begin, end


def _over_lines(body: Any, carry: Any, *, batch: int, kv_heads: int, routing: int) -> Any:
    """``body(line, routed, carry)`` for every kv head, those that route first."""

    def step(first: int, count: int, i: Array, carry: Any) -> Any:
        i = jnp.asarray(i, jnp.int32)  # loop counters are int64 under x64
        line = _Line(i // count, first + i % count, kv_heads, routing)
        return body(line, first < routing, carry)

    for first, count in ((0, routing), (routing, kv_heads - routing)):
        if count:
            carry = jax.lax.fori_loop(0, batch * count, partial(step, first, count), carry)
    return carry


def _lines(x: Float[Array, "B T A X"], kv_heads: int) -> Float[Array, "E T G X"]:
    """The kv heads of all sequences, each contiguous."""
    B, T, A, X = x.shape
    x = jnp.transpose(x.reshape(B, T, kv_heads, A // kv_heads, X), (0, 2, 1, 3, 4))
    return x.reshape(B * kv_heads, T, A // kv_heads, X)


def _unlines(x: Float[Array, "E T G X"], batch: int) -> Float[Array, "B T A X"]:
    """The inverse of :func:`_lines`."""
    E, T, G, X = x.shape
    x = jnp.transpose(x.reshape(batch, E // batch, T, G, X), (0, 2, 1, 3, 4))
    return x.reshape(batch, T, E // batch * G, X)


def _at(x: Float[Array, "E T G X"], line: _Line) -> Float[Array, "1 T G X"]:
    """The line's part of :func:`_lines`."""
    return jax.lax.dynamic_slice_in_dim(x, line.number, 1, axis=0)


def _replaced(x: Float[Array, "E *rest"], part: Float[Array, "1 *rest"], line: _Line) -> Array:
    """x with the line's part replaced."""
    return jax.lax.dynamic_update_slice_in_dim(x, part.astype(x.dtype), line.number, axis=0)


def _rows(x: Float[Array, "1 T G X"], order: Int[Array, " L"]) -> Float[Array, "1 L 1 X"]:
    """The rows of one line in this order."""
    flat = x.reshape(-1, x.shape[3])
    rows = flat.at[order].get(
        mode="promise_in_bounds", unique_indices=True, wrap_negative_indices=False
    )
    return rows[None, :, None, :]


def _tiles(q: Float[Array, "1 L G H"], k: Float[Array, "1 S 1 H"]) -> Tiles:
    """The usual tiles, with more rows where the keys are only a few sinks."""
    tiles = Tiles.choose(q.shape[1], k.shape[1], q.shape[2])
    if k.shape[1] > FEW_KEYS:
        return tiles
    return Tiles(max(tiles.rows, min(FEW_KEYS_ROWS // q.shape[2], q.shape[1])), k.shape[1])


class _Own(NamedTuple):
    """Each row's own token, where it has one: attention over a single key."""

    logit: Float[Array, "1 T G"]
    key: Float[Array, "1 T 1 H"]
    value: Float[Array, "1 T 1 Hv"]

    @staticmethod
    def of(
        q: Float[Array, "1 T G H"],
        k: Float[Array, "1 T 1 H"],
        v: Float[Array, "1 T 1 Hv"],
        attended: _Range,
    ) -> _Own:
        """``attended`` is one token or none."""
        begin, end = attended
        here = (end > begin)[:, :, None, None]
        key, value = (jnp.where(here, x, 0) for x in (k, v))
        dtype = accumulation_dtype(q.dtype)
        logit = jnp.sum(q.astype(dtype) * key.astype(dtype), axis=-1) * q.shape[3] ** -0.5
        return _Own(jnp.where(here[..., 0], logit, -jnp.inf), key, value)

    def gradients(
        self, q: Float[Array, "1 T G H"], d_out: Float[Array, "1 T G Hv"], statistic: Array
    ) -> tuple[Array, Array, Array]:
        """By query, key and value; ``statistic`` [1, T, G, 2] as in the other sets."""
        lse, delta = statistic[..., 0], statistic[..., 1]
        weight = jnp.where(jnp.isneginf(self.logit), 0, jnp.exp(self.logit - lse))[..., None]
        d_out = d_out.astype(weight.dtype)
        along = jnp.sum(d_out * self.value, axis=-1, keepdims=True) - delta[..., None]
        d_logit = weight * along * q.shape[3] ** -0.5
        of_key, of_value = (
            jnp.sum(x, axis=2, keepdims=True) for x in (d_logit * q, weight * d_out)
        )
        return d_logit * self.key, of_key, of_value


def _forward(
    sinks: int, alone: bool, q: Array, k: Array, v: Array, sorting: Sorting, ranges: Ranges
) -> tuple[Array, tuple[Any, ...]]:
    (B, T, N, H), (S, K) = q.shape, k.shape[1:3]
    G, dtype = N // K, accumulation_dtype(q.dtype)
    lines = tuple(_lines(x, K) for x in (q, k, v))

    def attend(q: Array, k: Array, v: Array, attended: _Range) -> tuple[Array, Array]:
        return ranged_forward(q, k, v, *attended, scale=H**-0.5, tiles=_tiles(q, k))

    def head(line: _Line, routed: bool, results: tuple[Array, Array]) -> tuple[Array, Array]:
        query, key, value = (_at(x, line) for x in lines)
        local = line.ranges(ranges.local_begin, ranges.local_end, S)
        if alone:
            own = _Own.of(query, key, value, local)
            parts = [(own.value, own.logit)]
        else:
            parts = [attend(query, key, value, local)]
        if sinks:
            few = key[:, :sinks], value[:, :sinks]
            parts.append(
                attend(query, *few, line.ranges(ranges.sink_begin, ranges.sink_end, sinks))
            )
        if routed:
            e = line.sorting
            order, back = sorting.k_order[e], sorting.q_back[e]
            out, lse = attend(
                _rows(query, sorting.q_order[e]),
                _rows(key, order),
                _rows(value, order),
                (sorting.begin[e][None], sorting.end[e][None]),
            )
            out = _rows(out, back).reshape(1, T, G, -1)
            parts.append((out, _rows(lse[..., None], back).reshape(1, T, G)))
        out, lse = _merged(parts, dtype)
        outs, lses = results
        return line.put(outs, out), _replaced(lses, lse, line)

    results = jnp.zeros((B, T, N, v.shape[3]), q.dtype), jnp.zeros((B * K, T, G), dtype)
    routing = sorting.begin.shape[0] // B
    out, lse = _over_lines(head, results, batch=B, kv_heads=K, routing=routing)
    return out, (lines, sorting, ranges, out, lse)


def _merged(parts: list[tuple[Array, Array]], dtype: Any) -> tuple[Array, Array]:
    """``out`` and ``lse`` of one softmax over all sets."""
    top = reduce(jnp.maximum, [lse for _, lse in parts])
    top = jnp.where(jnp.isneginf(top), 0, top)
    weights = [jnp.exp(lse - top) for _, lse in parts]
    total = reduce(jnp.add, weights)
    safe = jnp.where(total > 0, total, 1)
    terms = [
        (weight / safe)[..., None] * out.astype(dtype)
        for weight, (out, _) in zip(weights, parts, strict=True)
    ]
    return reduce(jnp.add, terms), jnp.where(total > 0, jnp.log(safe) + top, -jnp.inf)


def _backward(
    sinks: int, alone: bool, residuals: tuple[Any, ...], d_out: Array
) -> tuple[Array, Array, Array, None, None]:
    lines, sorting, ranges, out, lse = residuals
    B, (E, S, _, H) = d_out.shape[0], lines[1].shape
    K = E // B
    delta = jnp.sum(d_out.astype(lse.dtype) * out.astype(lse.dtype), axis=-1, keepdims=True)
    statistics = jnp.stack([lse, _lines(delta, K)[..., 0]], axis=-1)

    def back(
        q: Array, k: Array, v: Array, attended: _Range, d_out: Array, statistic: Array
    ) -> tuple[Array, Array, Array]:
        return ranged_gradients(
            *(q, k, v, *attended, statistic[..., 0], statistic[..., 1]),
            d_out=d_out,
            scale=H**-0.5,
            tiles=_tiles(q, k),
        )

    def head(line: _Line, routed: bool, results: tuple[Array, ...]) -> tuple[Array, ...]:
        query, key, value = (_at(x, line) for x in results)
        rows = line.take(d_out), _at(statistics, line)
        local = line.ranges(ranges.local_begin, ranges.local_end, S)
        if alone:
            dq, dk, dv = _Own.of(query, key, value, local).gradients(query, *rows)
        else:
            dq, dk, dv = back(query, key, value, local, *rows)
        if sinks:
            few = key[:, :sinks], value[:, :sinks]
            of_q, *of_few = back(
                query, *few, line.ranges(ranges.sink_begin, ranges.sink_end, sinks), *rows
            )
            dq = dq + of_q
            dk, dv = (a.at[:, :sinks].add(b) for a, b in zip((dk, dv), of_few, strict=True))
        if routed:
            e = line.sorting
            order = sorting.k_order[e]
            of_q, *of_kv = back(
                _rows(query, sorting.q_order[e]),
                _rows(key, order),
                _rows(value, order),
                (sorting.begin[e][None], sorting.end[e][None]),
                *(_rows(a, sorting.q_order[e]) for a in rows),
            )
            dq = dq + _rows(of_q, sorting.q_back[e]).reshape(dq.shape)
            dk, dv = (a + _rows(b, sorting.k_back[e]) for a, b in zip((dk, dv), of_kv, strict=True))
        return tuple(_replaced(x, a, line) for x, a in zip(results, (dq, dk, dv), strict=True))

    # Each head's gradients take the place of its queries, keys and values: no further memory.
    routing = sorting.begin.shape[0] // B
    found = _over_lines(head, lines, batch=B, kv_heads=K, routing=routing)
    dq, dk, dv = (_unlines(x, B) for x in found)
    return dq, dk, dv, None, None


attend_by_head.defvjp(_forward, _backward)
