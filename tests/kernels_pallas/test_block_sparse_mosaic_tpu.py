"""Block-sparse attention on TPUs: interpreted against the reference, lowered, and compiled."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tpu_attention_cases import (
    both_ways,
    check,
    draw_heads,
    random_shape,
    shape_structs,
    temporary_bound,
)

from kernels_pallas.ahead_of_time import TPU_CHIPS, compile_for_tpu, lower_for_tpu
from kernels_pallas.block_sparse import block_sparse_attention as api
from kernels_pallas.block_sparse import (
    mosaic_tpu,
    mosaic_tpu_backward,
    mosaic_tpu_keys,
    mosaic_tpu_plan,
    reference,
)
from kernels_pallas.block_sparse.mosaic_tpu import Tiles, block_sparse_attention

SMALL = Tiles(tokens=16, blocks=2, tiles=2, entries=128)


def random_lists(rng, shape, blocks):
    """Ascending lists of 0..P distinct blocks, -1 trailing; every fifth query's are empty."""
    indices = np.full(shape, -1, np.int32)
    for place in np.ndindex(*shape[:3]):
        count = 0 if place[1] % 5 == 0 else int(rng.integers(0, min(shape[3], blocks) + 1))
        indices[place][:count] = np.sort(rng.choice(blocks, count, replace=False))
    return indices


def unread_rows(indices, positions, shape, block_size, causal):
    """Flags [B, T] of queries and [B, S] of keys that nobody's attention touches."""
    visible = reference.visible_keys(
        jnp.asarray(indices), positions, keys=shape[2], block_size=block_size, causal=causal
    )
    return ~jnp.any(visible, axis=(2, 3)), ~jnp.any(visible, axis=(1, 2))


def compare(
    shape, lists, block_size, slots, dtype=jnp.float32, tiles=SMALL, causal=True, seed=0, sort=True
):
    rng = np.random.default_rng(seed)
    arrays = draw_heads(rng, *shape, dtype)
    batch, rows, keys = shape[:3]
    indices = random_lists(rng, (batch, rows, lists, slots), -(-keys // block_size))
    # Positions that end before the buffer does: its tail is unread, as a cache's is.
    positions = rng.integers(-1, max(1, keys * 3 // 4), (batch, rows))
    positions = jnp.asarray(np.sort(positions, axis=1) if sort else positions, jnp.int32)
    options = {"block_size": block_size, "causal": causal, "scale": shape[5] ** -0.5}
    unread = unread_rows(indices, positions, shape, block_size, causal)

    def attend(q, k, v, indices, positions):
        return block_sparse_attention(q, k, v, indices, positions=positions, tiles=tiles, **options)

    def specified(q, k, v, indices, positions):
        return reference.block_sparse_attention(q, k, v, indices, positions=positions, **options)

    check(attend, specified, arrays, (jnp.asarray(indices), positions), unread)


def test_matches_reference():
    # Three tiles, G = 3, odd sizes and widths, dead rows, unread keys inside and after blocks.
    compare((2, 41, 93, 3, 1, 24, 40), 1, 16, 3)


def test_matches_reference_bfloat16():
    # A list per query head over shared kv heads: dk and dv sum over lists.
    compare((1, 25, 70, 2, 1, 64, 64), 2, 16, 4, jnp.bfloat16)


@pytest.mark.full
@pytest.mark.parametrize(
    ("shape", "lists", "block_size", "slots"),
    [
        ((2, 75, 203, 1, 1, 64, 64), 1, 16, 5),
        ((1, 70, 300, 4, 2, 96, 96), 2, 32, 3),
        ((2, 50, 131, 4, 1, 128, 128), 1, 48, 2),
        ((1, 60, 401, 16, 2, 192, 128), 2, 64, 3),
        ((1, 40, 500, 16, 1, 256, 256), 1, 128, 2),
        ((1, 60, 260, 10, 2, 64, 96), 1, 16, 6),
        ((2, 1, 300, 8, 1, 128, 128), 8, 64, 3),
        ((1, 1, 1, 1, 1, 8, 8), 1, 16, 1),
    ],
)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("tiles", [SMALL, None])
def test_matches_reference_everywhere(shape, lists, block_size, slots, dtype, tiles):
    compare(shape, lists, block_size, slots, dtype, tiles)


@pytest.mark.full
def test_not_causal():
    compare((2, 40, 93, 4, 2, 64, 64), 2, 16, 3, causal=False)


@pytest.mark.full
def test_positions_in_any_order():
    compare((2, 40, 93, 4, 2, 64, 64), 1, 16, 3, sort=False)


@pytest.mark.full
def test_four_words_an_entry():
    compare((1, 200, 150, 2, 2, 64, 64), 2, 16, 3, tiles=Tiles(128, 2, 1, 128))


@pytest.mark.full
def test_lists_longer_than_scalar_memory():
    # 160 blocks a tile: two grid cells a tile, and several rows of inverse lists.
    shape = (1, 40, 160 * 16, 2, 1, 64, 64)
    assert plan_of(shape, 1, 16, 12, SMALL).parts == 2
    compare(shape, 1, 16, 12)


@pytest.mark.full
def test_query_chunks():
    tiles = Tiles(16, 2, 2, 128, selected=150)
    shape = (2, 75, 93, 4, 2, 64, 64)
    assert plan_of(shape, 2, 16, 3, tiles).chunks == 5
    compare(shape, 2, 16, 3, tiles=tiles)


@pytest.mark.full
@pytest.mark.parametrize("seed", range(100))
def test_random_shapes(seed):
    rng = np.random.default_rng(2000 + seed)
    shape, dtype = random_shape(rng)
    block_size, slots = int(rng.choice([16, 32, 48, 64, 128])), int(rng.integers(1, 6))
    lists = int(rng.choice([1, shape[4], shape[3]]))
    chunked = int(rng.choice([40, 2**23]))
    steps = (int(x) for x in rng.integers(1, 3, 2))
    tiles = Tiles(int(rng.choice([16, 32, 48])), *steps, 128, chunked)
    causal = bool(rng.random() < 0.8)
    compare(shape, lists, block_size, slots, dtype, tiles, causal, seed, sort=False)


def index_structs(shape, lists, slots):
    struct = jax.ShapeDtypeStruct
    indices = struct((*shape[:2], lists, slots), jnp.int32)
    return indices, struct(shape[:2], jnp.int32)


def plan_of(shape, lists, block_size, slots, tiles=None, dtype=jnp.bfloat16):
    q, k, v = shape_structs(*shape, dtype)[:3]
    indices, _ = index_structs(shape, lists, slots)
    return mosaic_tpu_plan.plan_for(q, k, v, indices, block_size, 0.1, tiles)


def test_careful_only_where_a_row_sees_part_of_a_block():
    plan = plan_of((1, 64, 64, 2, 1, 64, 64), 1, 16, 4, SMALL)
    indices = jnp.broadcast_to(jnp.asarray([0, 1, 2, -1], jnp.int32), (1, 64, 1, 4))
    indices = indices.at[0, 40].set(-1)
    lists = mosaic_tpu_plan.tile_lists(plan, indices)
    last = jnp.broadcast_to(jnp.arange(64, dtype=jnp.int32) + 5, (1, 64))
    whole = mosaic_tpu_plan.whole_to(plan, lists, last)
    assert whole.tolist() == [[[5, 21, -1, 53]]]  # the least last of a tile; row 40 sees nothing


def test_refuses_what_it_cannot_serve():
    rng = np.random.default_rng(0)
    arrays = draw_heads(rng, 1, 8, 8, 2, 1, 8, 8, jnp.float32)
    indices = jnp.zeros((1, 8, 1, 1), jnp.int32)
    call = functools.partial(api, block_size=16, implementation="mosaic_tpu")
    with pytest.raises(NotImplementedError, match="float16"):
        call(*(x.astype(jnp.float16) for x in arrays), indices)
    with pytest.raises(NotImplementedError, match="one for all"):
        call(arrays[0].astype(jnp.bfloat16), *arrays[1:], indices)
    with pytest.raises(NotImplementedError, match="block_size=8"):
        api(*arrays, indices, block_size=8, implementation="mosaic_tpu")
    wide = draw_heads(rng, 1, 8, 8, 2048, 1, 8, 8, jnp.float32)
    with pytest.raises(NotImplementedError, match="vector memory"):
        call(*wide, indices)


@pytest.mark.parametrize("sizes", [(8, 1, 1), (16, 0, 1), (16, 1, 0), (16, 1, 1, 100)])
def test_refuses_tiles_that_are_not_aligned(sizes):
    with pytest.raises(ValueError, match="must"):
        Tiles(*sizes)


def test_tiles_fill_the_lanes_and_fit():
    choose = mosaic_tpu_plan.tiles_for
    assert choose("TPU v5 lite", 2**15, 8, 64, 128, 128, 2) == Tiles(16, 4, 4)
    assert choose("TPU v6 lite", 2**15, 1, 64, 128, 128, 2) == Tiles(128, 4, 4)
    assert choose("TPU v5", 1, 3, 16, 128, 128, 4) == Tiles(16, 16, 4)


def lower_everywhere(shape, lists, block_size, dtype, chips):
    def attend(q, k, v, indices, positions):
        return block_sparse_attention(
            q, k, v, indices, block_size=block_size, positions=positions, causal=True, scale=0.1
        )

    functions = both_ways(attend)
    arguments = shape_structs(*shape, dtype, *index_structs(shape, lists, 5))
    for chip in chips:
        assert "tpu_custom_call" in lower_for_tpu(functions[0], *arguments[:5], chip=chip)
        assert lower_for_tpu(functions[1], *arguments, chip=chip).count("@tpu_custom_call") >= 3


def test_lowers():
    lower_everywhere((1, 300, 301, 6, 2, 96, 64), 1, 32, jnp.bfloat16, ["v5e"])


@pytest.mark.full
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("widths", [(64, 64), (96, 96), (128, 128), (192, 128), (256, 256)])
def test_lowers_everywhere(dtype, widths):
    for group, lists, block_size in ((1, 2, 64), (3, 6, 16), (8, 1, 128), (16, 2, 48)):
        shape = (2, 1000, 1500, 2 * group, 2, *widths)
        lower_everywhere(shape, lists, block_size, dtype, TPU_CHIPS)


def kernel_calls(rows, dtype=jnp.bfloat16):
    """The three kernels with arguments: T = S = rows, N = 32, K = 4, H = 128, 16 blocks of 64."""
    shape, struct = (1, rows, rows, 32, 4, 128, 128), jax.ShapeDtypeStruct
    plan = plan_of(shape, 4, 64, 16)
    layout = plan.layout

    def lists_of(make):
        def build(indices, last):
            lists = mosaic_tpu_plan.tile_lists(plan, indices)
            return make(plan, lists, mosaic_tpu_plan.whole_to(plan, lists, last))

        return jax.eval_shape(build, *index_structs(shape, 4, 16))

    row = lists_of(mosaic_tpu_plan.query_rows)
    bounds, entries = lists_of(mosaic_tpu_plan.inverse_rows)
    limits = struct((1, layout.tiles, 8, layout.matrix_rows), jnp.int32)
    statistics = struct((4, *limits.shape[1:]), jnp.int32)
    number = struct((4, layout.tiles, 1, layout.matrix_rows), jnp.float32)
    q, k = (struct((1, rows, heads * 128), dtype) for heads in (32, 4))
    key_gradients = functools.partial(mosaic_tpu_keys.key_gradients, dtype=dtype)
    return plan, [
        (mosaic_tpu._walk_tiles, (row, limits, q, k, k)),
        (mosaic_tpu_backward._query_gradient, (row, limits, number, number, q, q, q, k, k)),
        (key_gradients, (bounds, entries, statistics, q, q, k, k)),
    ]


@pytest.mark.parametrize("chip", TPU_CHIPS)
def test_kernels_compile_without_temporary_memory(chip):
    plan, calls = kernel_calls(131072)
    for kernel, arguments in calls:
        compiled = compile_for_tpu(functools.partial(kernel, plan), *arguments, chip=chip)
        assert compiled.memory_analysis().temp_size_in_bytes < 2**20


@pytest.mark.full
@pytest.mark.parametrize("chip", TPU_CHIPS)
@pytest.mark.parametrize("rows", [32768, 131072])
def test_calls_compile_in_linear_memory(chip, rows):
    """The whole call, lists included: at most 16 integers a selected slot of one query chunk."""
    shape = (1, rows, rows, 32, 4, 128, 128)

    def attend(q, k, v, indices, positions):
        return block_sparse_attention(
            q, k, v, indices, block_size=64, positions=positions, causal=True, scale=0.1
        )

    functions = both_ways(attend)
    arguments = shape_structs(*shape, jnp.bfloat16, *index_structs(shape, 4, 16))
    for function, count, backward in zip(functions, (5, 7), (False, True), strict=True):
        compiled = compile_for_tpu(function, *arguments[:count], chip=chip)
        temporary = compiled.memory_analysis().temp_size_in_bytes
        lists = 16 * 4 * min(rows * 4 * 16, mosaic_tpu_plan.SELECTED)
        bound = temporary_bound(*shape, 2, backward) + lists
        print(f"block_sparse {chip} {rows=} {backward=}: {temporary >> 20} of {bound >> 20} MiB")
        assert temporary < bound


@pytest.mark.full
@pytest.mark.parametrize("chip", TPU_CHIPS)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize(
    ("shape", "lists", "block_size"),
    [
        ((2, 1000, 1500, 6, 2, 64, 96), 1, 16),
        ((1, 2048, 2048, 14, 2, 64, 64), 14, 64),
        ((1, 1024, 2048, 8, 8, 256, 256), 8, 128),
        ((1, 1024, 2048, 128, 1, 192, 128), 1, 48),
    ],
)
def test_calls_compile_at_other_shapes(chip, dtype, shape, lists, block_size):
    def attend(q, k, v, indices, positions):
        return block_sparse_attention(
            q, k, v, indices, block_size=block_size, positions=positions, causal=True, scale=0.1
        )

    functions = both_ways(attend)
    arguments = shape_structs(*shape, dtype, *index_structs(shape, lists, 5))
    compile_for_tpu(functions[0], *arguments[:5], chip=chip)
    compile_for_tpu(functions[1], *arguments, chip=chip)
