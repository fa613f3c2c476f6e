"""Calls of every kernel at real sizes: what tune_tiles.py times and roofline.py counts.

Attention has batch 1, decoding one token of 8 sequences on caches of ``length`` tokens; lists are
16 blocks of 64 keys, those of single tokens 1/32 of the cache. See :class:`Sizes` for the rest.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Collection, Iterator
from typing import Any, Literal

import bench_picks
import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas.block_scores import block_scores, select_blocks
from kernels_pallas.block_scores.pooling import Pooling
from kernels_pallas.block_sparse import block_sparse_attention
from kernels_pallas.gather_decode import gather_blocks, gather_decode, gather_tokens
from kernels_pallas.hamming import hamming_select
from kernels_pallas.ranged import ranged_attention

Direction = Literal["forward", "backward"]
Implementation = Literal["mosaic_tpu", "mosaic_gpu"]


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What the calls of a run share.

    Attributes:
      query_heads, kv_heads, width: N, K and H = Hv.
      block, selected: keys of a selected block and how many of them a token has.
      ranked: blocks that ``select_blocks`` chooses.
      compressed, stride: tokens of a compressed entry and between the starts of two.
      share: one key in ``share`` is listed where single tokens are.
      bits: of a code.
      batch: sequences that decode.
    """

    query_heads: int = 32
    kv_heads: int = 4
    width: int = 128
    dtype: str = "bfloat16"
    block: int = 64
    selected: int = 16
    ranked: int = 64
    compressed: int = 32
    stride: int = 16
    share: int = 32
    bits: int = 32
    batch: int = 8

    @property
    def group(self) -> int:
        """G."""
        return self.query_heads // self.kv_heads

    def pooling(self, reducer: Literal["sum", "max"]) -> Pooling:
        """Of compressed entries into selected blocks: NSA's sum, or InfLLM-V2's maximum."""
        pooled = Pooling.geometric(self.compressed, self.stride, self.block)
        if reducer == "sum":
            return pooled
        return dataclasses.replace(pooled, weights=(1.0,) * len(pooled.weights), reducer="max")

    def entries(self, length: int) -> int:
        """C."""
        return length // self.stride


@dataclasses.dataclass(frozen=True)
class Call:
    """One op at one length.

    Attributes:
      op: the function of the api that is called.
      direction: "backward" for a forward and a backward pass together.
      function, shapes: to be traced; ``draw`` makes such arrays for it.
      tunes: the kernels whose tiles are this call's to tune, by their name in tables.
    """

    op: str
    direction: Direction
    length: int
    function: Callable[..., Any]
    shapes: tuple[Any, ...]
    draw: Callable[[], tuple[Any, ...]]
    tunes: tuple[str, ...]


def calls(
    length: int, implementation: Implementation, sizes: Sizes, ops: Collection[str] | None = None
) -> Iterator[Call]:
    """Every op (of ``ops``) in every direction that a kernel serves."""
    for op in _MAKERS if ops is None else [op for op in _MAKERS if op in ops]:
        function, draw, differentiable = _MAKERS[op](length, implementation, sizes)
        shapes = _shapes_of(draw)
        tunes = _TUNES.get(op, (op,))
        yield Call(op, "forward", length, function, shapes, draw, tunes)
        if differentiable:
            backward = functools.partial(_forward_and_backward, function)
            drawn = _with_cotangents(function, shapes, draw)
            whole = (*shapes, *_cotangents_of(function, shapes))
            yield Call(op, "backward", length, backward, whole, drawn, tunes)


# Attention inside block_scores asks for the tiles of ranged attention, which has calls of its own.
_TUNES = {"block_scores": ("select_blocks",), "select_blocks": ("select_blocks", "entry_lse")}


def _shapes_of(draw: Callable[[], Any]) -> tuple[Any, ...]:
    return draw(shapes_only=True)  # type: ignore[call-arg]


def _cotangents_of(function: Callable[..., Any], shapes: tuple[Any, ...]) -> tuple[Any, ...]:
    out, lse = jax.eval_shape(function, *shapes)[:2]
    return jax.ShapeDtypeStruct(out.shape, out.dtype), jax.ShapeDtypeStruct(lse.shape, lse.dtype)


def _with_cotangents(function: Any, shapes: Any, draw: Any) -> Callable[[], tuple[Any, ...]]:
    return lambda: (*draw(), *(_normal(9, x) for x in _cotangents_of(function, shapes)))


def _forward_and_backward(function: Callable[..., Any], q: Any, k: Any, v: Any, *rest: Any) -> Any:
    *numbers, d_out, d_lse = rest

    def outputs(q: Any, k: Any, v: Any) -> Any:
        out, lse, *others = function(q, k, v, *numbers)
        return (out, lse), others

    _, pull, _ = jax.vjp(outputs, q, k, v, has_aux=True)
    return pull((d_out, d_lse))


def _normal(seed: int, like: Any) -> Any:
    return jax.random.normal(jax.random.key(seed), like.shape, jnp.float32).astype(like.dtype)


class _Draw:
    """Shapes of random numbers, and integers that are worked out only when arrays are wanted."""

    def __init__(
        self, normal: list[tuple[int, ...]], dtype: str, integers: list[tuple[Any, Callable]]
    ) -> None:
        self.normal = [jax.ShapeDtypeStruct(shape, jnp.dtype(dtype)) for shape in normal]
        self.integers = integers

    def __call__(self, shapes_only: bool = False) -> tuple[Any, ...]:
        if shapes_only:
            return (*self.normal, *(shape for shape, _ in self.integers))
        numbers = [_normal(seed, like) for seed, like in enumerate(self.normal)]
        return (*numbers, *(jnp.asarray(make(), shape.dtype) for shape, make in self.integers))


def _integers(shape: tuple[int, ...], make: Callable[[], Any], dtype: Any = jnp.int32) -> Any:
    return jax.ShapeDtypeStruct(shape, dtype), make


def _attention_shapes(length: int, sizes: Sizes, keys: int) -> list[tuple[int, ...]]:
    kv = (1, keys, sizes.kv_heads, sizes.width)
    return [(1, length, sizes.query_heads, sizes.width), kv, kv]


def _ranged(length: int, implementation: Implementation, sizes: Sizes) -> Any:
    def function(q: Any, k: Any, v: Any, start: Any, stop: Any) -> Any:
        return ranged_attention(q, k, v, start, stop, implementation=implementation)

    rows = [
        _integers((1, length), lambda: np.zeros((1, length))),
        _integers((1, length), lambda: np.arange(1, length + 1)[None]),
    ]
    return function, _Draw(_attention_shapes(length, sizes, length), sizes.dtype, rows), True


def _block_sparse(length: int, implementation: Implementation, sizes: Sizes) -> Any:
    def function(q: Any, k: Any, v: Any, indices: Any, positions: Any) -> Any:
        return block_sparse_attention(
            *(q, k, v, indices),
            block_size=sizes.block,
            positions=positions,
            implementation=implementation,
        )

    def picks() -> Any:
        return bench_picks.replaced_picks(length, sizes.kv_heads, sizes.selected, sizes.block)

    rows = [
        _integers((1, length, sizes.kv_heads, sizes.selected), picks),
        _integers((1, length), lambda: np.arange(length)[None]),
    ]
    return function, _Draw(_attention_shapes(length, sizes, length), sizes.dtype, rows), True


def seen_entries(length: int, sizes: Sizes) -> np.ndarray:
    """Compressed entries that end at or before each token, [T]."""
    seen = (np.arange(length) + 1 - sizes.compressed) // sizes.stride + 1
    return np.clip(seen, 0, sizes.entries(length))


def _entry_rows(length: int, sizes: Sizes) -> list[Any]:
    """start, stop, first_block and last_block."""
    zeros = _integers((1, length), lambda: np.zeros((1, length)))
    return [
        zeros,
        _integers((1, length), lambda: seen_entries(length, sizes)[None]),
        zeros,
        _integers((1, length), lambda: (np.arange(length) // sizes.block)[None]),
    ]


def _block_scores(length: int, implementation: Implementation, sizes: Sizes) -> Any:
    def function(q: Any, k: Any, v: Any, *rows: Any) -> Any:
        return block_scores(
            *(q, k, v, *rows),
            pooling=sizes.pooling("sum"),
            selected=sizes.selected,
            implementation=implementation,
        )

    shapes = _attention_shapes(length, sizes, sizes.entries(length))
    return function, _Draw(shapes, sizes.dtype, _entry_rows(length, sizes)), True


def _select_blocks(length: int, implementation: Implementation, sizes: Sizes) -> Any:
    def function(q: Any, k: Any, *rows: Any) -> Any:
        return select_blocks(
            *(q, k, *rows),
            pooling=sizes.pooling("max"),
            selected=sizes.ranked,
            initial=1,
            implementation=implementation,
        )

    shapes = _attention_shapes(length, sizes, sizes.entries(length))[:2]
    return function, _Draw(shapes, sizes.dtype, _entry_rows(length, sizes)), False


def _hamming(length: int, implementation: Implementation, sizes: Sizes) -> Any:
    batch, lists, words = sizes.batch, sizes.kv_heads, -(-sizes.bits // 32)
    slots = length // sizes.share

    def function(q_codes: Any, k_codes: Any, start: Any, stop: Any, budget: Any) -> Any:
        return hamming_select(
            *(q_codes, k_codes, start, stop, budget),
            bits=sizes.bits,
            slots=slots,
            implementation=implementation,
        )

    def codes(*shape: int) -> Any:
        rng = np.random.default_rng(len(shape))
        return _integers(
            shape, lambda: rng.integers(0, 2**sizes.bits, shape, np.uint64), jnp.uint32
        )

    integers = [
        codes(batch, 1, lists, sizes.group, words),
        codes(batch, lists, words, length),
        _integers((batch, 1), lambda: np.zeros((batch, 1))),
        _integers((batch, 1), lambda: np.full((batch, 1), length)),
        _integers((batch, 1, lists), lambda: np.full((batch, 1, lists), slots)),
    ]
    return function, _Draw([], sizes.dtype, integers), False


def _listed(batch: int, lists: int, slots: int, most: int) -> Any:
    """Ascending distinct numbers below ``most``, spread over all of them."""

    def make() -> Any:
        rng = np.random.default_rng(0)
        shape = (batch, 1, lists, slots)
        stride = most // slots
        return np.arange(slots) * stride + rng.integers(0, stride, shape)

    return _integers((batch, 1, lists, slots), make)


def _decoding(sizes: Sizes) -> tuple[int, ...]:
    return (sizes.batch, 1, sizes.query_heads, sizes.width)


def _last(length: int, sizes: Sizes) -> Any:
    return _integers((sizes.batch, 1), lambda: np.full((sizes.batch, 1), length - 1))


def _gather_decode(length: int, implementation: Implementation, sizes: Sizes) -> Any:
    def function(q: Any, k: Any, v: Any, indices: Any, positions: Any) -> Any:
        return gather_decode(
            *(q, k, v, indices),
            block_size=sizes.block,
            positions=positions,
            implementation=implementation,
        )

    kv = (sizes.batch, length, sizes.kv_heads, sizes.width)
    listed = _listed(sizes.batch, sizes.kv_heads, sizes.selected, length // sizes.block)
    integers = [listed, _last(length, sizes)]
    return function, _Draw([_decoding(sizes), kv, kv], sizes.dtype, integers), False


def _gather_blocks(length: int, implementation: Implementation, sizes: Sizes) -> Any:
    def function(q: Any, k: Any, v: Any, indices: Any, positions: Any) -> Any:
        return gather_blocks(q, k, v, indices, positions=positions, implementation=implementation)

    blocks = length // sizes.block
    keys = (sizes.batch, sizes.kv_heads, blocks, sizes.width, sizes.block)
    values = (*keys[:3], sizes.block, sizes.width)
    listed = _listed(sizes.batch, sizes.kv_heads, sizes.selected, blocks)
    integers = [listed, _last(length, sizes)]
    return function, _Draw([_decoding(sizes), keys, values], sizes.dtype, integers), False


def _gather_tokens(length: int, implementation: Implementation, sizes: Sizes) -> Any:
    def function(q: Any, kv: Any, indices: Any, positions: Any) -> Any:
        return gather_tokens(q, kv, indices, positions=positions, implementation=implementation)

    kv = (sizes.batch, length, sizes.kv_heads, 2 * sizes.width)
    listed = _listed(sizes.batch, sizes.kv_heads, length // sizes.share, length)
    return (
        function,
        _Draw([_decoding(sizes), kv], sizes.dtype, [listed, _last(length, sizes)]),
        False,
    )


_MAKERS: dict[str, Callable[[int, Implementation, Sizes], Any]] = {
    "ranged_attention": _ranged,
    "block_sparse_attention": _block_sparse,
    "block_scores": _block_scores,
    "select_blocks": _select_blocks,
    "hamming_select": _hamming,
    "gather_decode": _gather_decode,
    "gather_blocks": _gather_blocks,
    "gather_tokens": _gather_tokens,
}
OPS = tuple(_MAKERS)
