"""Work of the calls of kernel_calls.py, counted by hand with the ``cost.py`` of each op."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import bench_picks
from kernel_calls import Sizes, seen_entries

from kernels_pallas.block_scores import cost as scores_cost
from kernels_pallas.block_sparse import cost as sparse_cost
from kernels_pallas.gather_decode import cost as gather_cost
from kernels_pallas.hamming import cost as hamming_cost
from kernels_pallas.ranged import cost as ranged_cost

ITEM = 2  # bytes of bfloat16
PICKED = 8192  # tokens of the picks whose unions are counted


@dataclasses.dataclass(frozen=True)
class Shape:
    """How a platform's kernels cut the work, by rule, at the sizes of :class:`Sizes`.

    Attributes:
      ranged_tokens, ranged_keys: query tokens of a tile; keys that meet tiles together (dk, dv).
      sparse_tokens: tokens that share a union.
      ranked_tokens: tokens that share a pass over compressed keys.
      paired: whether fetching a row of a token-major cache brings two kv heads.
    """

    ranged_tokens: int
    ranged_keys: int
    sparse_tokens: int
    ranked_tokens: int
    paired: bool


SHAPES = {"tpu": Shape(64, 512, 16, 128, True), "gpu": Shape(16, 64, 16, 32, False)}


@dataclasses.dataclass(frozen=True)
class Count:
    """Work of a call.

    Attributes:
      flops: operations of the matrix products of what queries see.
      computed: the same of all that tiles multiply, masked or not.
      integers: integer operations, and those of the search among blocks.
      once: bytes if every array crossed the memory bus once.
      moved: bytes that the kernels move: what tiles share they read once each.
    """

    flops: int = 0
    computed: int = 0
    integers: int = 0
    once: int = 0
    moved: int = 0

    def __add__(self, other: Count) -> Count:
        mine, theirs = dataclasses.astuple(self), dataclasses.astuple(other)
        return Count(*(a + b for a, b in zip(mine, theirs, strict=True)))


def count(op: str, direction: str, length: int, sizes: Sizes, shape: Shape) -> Count:
    """Hand counts of a call of :mod:`kernel_calls`; "backward" is both passes."""
    backward = direction == "backward"
    if op == "ranged_attention":
        return _ranged(length, length, 1, sizes, shape, backward)
    if op == "block_sparse_attention":
        return _block_sparse(length, sizes, shape, backward)
    if op == "block_scores":
        attention = _ranged(length, sizes.entries(length), sizes.stride, sizes, shape, backward)
        return attention + _selection(length, sizes.selected, sizes, shape)
    if op == "select_blocks":
        return _normalizer(length, sizes, shape) + _selection(length, sizes.ranked, sizes, shape)
    if op == "hamming_select":
        return _hamming(length, sizes)
    return _gathered(op, length, sizes, shape)


def _widths(sizes: Sizes) -> tuple[int, int, int, int]:
    return sizes.query_heads, sizes.kv_heads, sizes.width, sizes.width


def _spread(length: int, keys: int, stride: int, sizes: Sizes) -> int:
    """(token, key) pairs: keys are the tokens themselves, or entries."""
    if stride == 1:
        return keys * (keys + 1) // 2
    return int(seen_entries(length, sizes).sum())


def _ranged(
    length: int, keys: int, stride: int, sizes: Sizes, shape: Shape, backward: bool
) -> Count:
    """Causal: a tile reads the keys up to its last token, a run of keys all tokens from then on."""
    heads, widths = _widths(sizes)[:2], _widths(sizes)[2:]
    pairs = _spread(length, keys, stride, sizes)
    tiles = -(-length // shape.ranged_tokens)
    keys_read = sum(
        min(keys, -(-(tile + 1) * shape.ranged_tokens // stride)) for tile in range(tiles)
    )
    # Whole runs of keys; the last of a tile is half empty on average.
    met = (keys_read + tiles * shape.ranged_keys // 2) * shape.ranged_tokens
    work = Count(
        flops=ranged_cost.forward_flops(pairs, heads[0], *widths),
        computed=ranged_cost.forward_flops(met, heads[0], *widths),
        once=ranged_cost.forward_bytes(length, keys, *heads, *widths, ITEM),
        moved=ranged_cost.forward_bytes(length, keys_read, *heads, *widths, ITEM),
    )
    if not backward:
        return work
    tokens_read = sum(
        max(0, length - first * stride) for first in range(0, keys, shape.ranged_keys)
    )
    rest = (*heads, *widths, ITEM)
    return work + Count(
        flops=ranged_cost.backward_flops(pairs, heads[0], *widths),
        computed=ranged_cost.backward_flops(met, heads[0], *widths),
        once=ranged_cost.backward_bytes(length, keys, keys, length, *rest),
        moved=ranged_cost.backward_bytes(length, keys, keys_read, tokens_read, *rest),
    )


@functools.cache
def union_of(sizes: Sizes, tokens: int) -> float:
    """Mean blocks that ``tokens`` neighbours list together, where 5 % of a list is replaced from
    a token to the next.
    """
    picks = bench_picks.replaced_picks(PICKED, 1, sizes.selected, sizes.block)
    return bench_picks.union_ratio(picks, tokens) * sizes.selected


def _block_sparse(length: int, sizes: Sizes, shape: Shape, backward: bool) -> Count:
    heads, widths = _widths(sizes)[:2], _widths(sizes)[2:]
    whole = sizes.selected * sizes.block
    # While a token sees fewer blocks than it selects, all it sees; then its own block in part.
    own = sizes.block * (sizes.block + 1) // 2
    pairs = whole * (whole + 1) // 2
    pairs += (length - whole) // sizes.block * ((whole - sizes.block) * sizes.block + own)
    tokens = shape.sparse_tokens
    tiles = -(-length // tokens)
    visited = round(tiles * union_of(sizes, tokens))
    met = visited * tokens * sizes.block
    once = max(tiles, length // sizes.block)  # visits that read every row and every key once
    rest = (sizes.block, *heads, *widths, ITEM)
    work = Count(
        flops=sparse_cost.forward_flops(pairs, heads[0], *widths),
        computed=sparse_cost.forward_flops(met, heads[0], *widths),
        once=sparse_cost.forward_bytes(length, length // sizes.block, *rest),
        moved=sparse_cost.forward_bytes(length, visited, *rest),
    )
    if not backward:
        return work
    return work + Count(
        flops=sparse_cost.backward_flops(pairs, heads[0], *widths),
        computed=sparse_cost.backward_flops(met, heads[0], *widths),
        once=sparse_cost.backward_bytes(length, length, once, tokens, *rest),
        moved=sparse_cost.backward_bytes(length, length, visited, tokens, *rest),
    )


def _selection(length: int, selected: int, sizes: Sizes, shape: Shape) -> Count:
    """Of a causal sequence: a row sees half of the entries and blocks."""

    def work(tile: int) -> scores_cost.Cost:
        return scores_cost.selection(
            rows=length,
            heads=sizes.query_heads,
            lists=sizes.kv_heads,
            width=sizes.width,
            entries=sizes.entries(length) // 2,
            blocks=length // sizes.block // 2,
            weights=len(sizes.pooling("sum").weights),
            selected=selected,
            tile=tile,
            itemsize=ITEM,
        )

    once, tiled = work(length), work(shape.ranked_tokens)
    products = 2 * length * sizes.query_heads * (sizes.entries(length) // 2) * sizes.width
    searched = tiled.flops - products
    return Count(products, products, searched, once.bytes_accessed, tiled.bytes_accessed)


def _normalizer(length: int, sizes: Sizes, shape: Shape) -> Count:
    def work(tile: int) -> scores_cost.Cost:
        return scores_cost.normalizer(
            rows=length,
            heads=sizes.query_heads,
            kv_heads=sizes.kv_heads,
            width=sizes.width,
            entries=sizes.entries(length) // 2,
            tile=tile,
            itemsize=ITEM,
        )

    once, tiled = work(length), work(shape.ranked_tokens)
    return Count(tiled.flops, tiled.flops, 0, once.bytes_accessed, tiled.bytes_accessed)


def _hamming(length: int, sizes: Sizes) -> Count:
    rows, words = sizes.batch * sizes.kv_heads, -(-sizes.bits // 32)
    group = {"rows": rows, "keys": length, "group": sizes.group, "words": words}
    moved = hamming_cost.selection_bytes(scans=rows, slots=length // sizes.share, **group)
    integers = hamming_cost.selection_operations(highest=sizes.group * sizes.bits, **group)
    return Count(0, 0, integers, moved, moved)


def _gathered(op: str, length: int, sizes: Sizes, shape: Shape) -> Count:
    keys = length // sizes.share if op == "gather_tokens" else sizes.selected * sizes.block
    work: dict[str, Any] = {"items": sizes.batch * sizes.kv_heads, "rows": sizes.group}
    work |= {"keys": keys, "widths": (sizes.width, sizes.width)}
    fetched = 2 * ITEM if shape.paired and op != "gather_blocks" else ITEM
    return Count(
        flops=gather_cost.gathered_flops(**work),
        computed=gather_cost.gathered_flops(**work),
        once=gather_cost.gathered_bytes(**work, key_bytes=ITEM),
        moved=gather_cost.gathered_bytes(**work, key_bytes=fetched),
    )
