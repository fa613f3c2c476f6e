"""Ranged attention on TPUs: interpreted against the reference, lowered, and compiled."""

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

from kernels_pallas import tpu
from kernels_pallas.ahead_of_time import TPU_CHIPS, compile_for_tpu, lower_for_tpu
from kernels_pallas.ranged import mosaic_tpu, mosaic_tpu_backward, ranged_attention
from kernels_pallas.ranged.mosaic_tpu import Tiles
from kernels_pallas.ranged.mosaic_tpu import ranged_attention as ranged_attention_tpu
from kernels_pallas.ranged.mosaic_tpu_plan import key_visits, plan_for, tile_spans, tiles_for
from kernels_pallas.ranged.reference import ranged_attention_reference

SMALL = Tiles(tokens=16, keys=128)


def ranges(kind, rng, batch, rows, keys):
    """Named [start, stop) patterns as int32 [B, T], inside [0, S]."""
    t = np.broadcast_to(np.arange(rows), (batch, rows)) + max(0, keys - rows)
    start, stop = np.zeros_like(t), t + 1
    if kind == "window":
        start = t - 20
    elif kind == "packed":
        start = t // 37 * 37
    elif kind == "clusters":  # sorted rows see their whole cluster, every third sees nothing
        start, stop = t // 50 * 50, np.where(t % 3 == 0, 0, t // 50 * 50 + 50)
    elif kind == "random":
        start, stop = rng.integers(-10, keys + 10, (2, batch, rows))
    else:
        assert kind == "causal"
    return [jnp.asarray(np.clip(x, 0, keys), jnp.int32) for x in (start, stop)]


def compare(shape, kind, dtype=jnp.float32, tiles=SMALL, seed=0, scale=None):
    rng = np.random.default_rng(seed)
    arrays = draw_heads(rng, *shape, dtype)
    start, stop = ranges(kind, rng, *shape[:3])
    key = jnp.arange(shape[2])[None, None, :]
    read = jnp.any((key >= start[..., None]) & (key < stop[..., None]), axis=1)
    scale = shape[5] ** -0.5 if scale is None else scale
    attend = functools.partial(ranged_attention_tpu, scale=scale, tiles=tiles)
    reference = functools.partial(ranged_attention_reference, scale=scale)
    check(attend, reference, arrays, (start, stop), (stop <= start, ~read))


def test_matches_reference():
    # Three tiles by two key blocks, heads of odd widths, dead rows, unread keys.
    compare((2, 41, 150, 3, 1, 24, 40), "random")


def test_matches_reference_bfloat16():
    compare((1, 150, 150, 4, 2, 64, 64), "clusters", jnp.bfloat16)


@pytest.mark.full
@pytest.mark.parametrize(
    ("shape", "kind"),
    [
        ((2, 75, 93, 1, 1, 64, 64), "causal"),
        ((1, 300, 300, 4, 2, 96, 96), "window"),
        ((2, 131, 131, 4, 1, 128, 128), "packed"),
        ((1, 60, 401, 16, 2, 192, 128), "random"),
        ((1, 90, 50, 16, 1, 256, 256), "causal"),
        ((1, 260, 260, 10, 2, 64, 96), "clusters"),
        ((2, 1, 300, 8, 1, 128, 128), "causal"),
        ((1, 1, 1, 1, 1, 8, 8), "causal"),
    ],
)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("tiles", [SMALL, None])
def test_matches_reference_everywhere(shape, kind, dtype, tiles):
    compare(shape, kind, dtype, tiles)


@pytest.mark.full
def test_whole_blocks_without_a_mask():
    # Tiles whose first blocks all rows see, and the same with NaN in dead rows of other tiles.
    compare((1, 64, 600, 2, 1, 64, 64), "causal")
    compare((1, 400, 400, 2, 1, 64, 64), "clusters")


@pytest.mark.full
@pytest.mark.parametrize("seed", range(100))
def test_random_shapes(seed):
    rng = np.random.default_rng(1000 + seed)
    shape, dtype = random_shape(rng)
    kind = rng.choice(["causal", "window", "packed", "clusters", "random"])
    tiles = Tiles(int(rng.choice([16, 32, 48])), int(rng.choice([128, 256])))
    compare(shape, str(kind), dtype, tiles, seed, scale=float(rng.uniform(0.05, 0.4)))


def plan_of(shape, dtype=jnp.bfloat16, tiles=None):
    q, k, v = shape_structs(*shape, dtype)[:3]
    return plan_for(q, k, v, 0.1, tiles)


@pytest.mark.parametrize("kind", ["causal", "window", "packed", "clusters"])
def test_work_follows_what_is_visible(kind):
    # 32 tiles of 32 tokens by 8 blocks of 128 keys: both walks visit exactly the pairs that hold
    # something visible.
    plan = plan_of((1, 1024, 1024, 4, 2, 64, 64), tiles=Tiles(32, 128))
    start, stop = ranges(kind, None, 1, 1024, 1024)
    spans = tile_spans(plan, start, stop)
    key = np.arange(1024)[None, :]
    visible = (key >= np.asarray(start)[0, :, None]) & (key < np.asarray(stop)[0, :, None])
    expected = int(visible.reshape(32, 32, 8, 128).any(axis=(1, 3)).sum())
    for scalars in (spans, key_visits(plan, spans)):
        assert int(jnp.sum(scalars[..., 1] - scalars[..., 0])) == expected


def test_key_visits_cover_arbitrary_ranges():
    rng = np.random.default_rng(4)
    plan = plan_of((2, 200, 900, 4, 2, 64, 64), tiles=Tiles(16, 128))
    spans = tile_spans(plan, *ranges("random", rng, 2, 200, 900))
    visits = key_visits(plan, spans)
    for batch, tile, block in np.ndindex(2, plan.layout.tiles, plan.blocks):
        if spans[batch, tile, 0, 0] <= block < spans[batch, tile, 0, 1]:
            assert visits[batch, block, 0, 0] <= tile < visits[batch, block, 0, 1]


def test_refuses_what_it_cannot_serve():
    rng = np.random.default_rng(0)
    start, stop = ranges("causal", rng, 1, 8, 8)
    for dtype in (jnp.float16, jnp.int8):
        q, k, v = (x.astype(dtype) for x in draw_heads(rng, 1, 8, 8, 2, 1, 8, 8, jnp.float32))
        with pytest.raises(NotImplementedError, match=str(jnp.dtype(dtype))):
            ranged_attention_tpu(q, k, v, start, stop, scale=1.0)
    q, k, v = draw_heads(rng, 1, 8, 8, 2048, 1, 8, 8, jnp.float32)
    with pytest.raises(NotImplementedError, match="vector memory"):
        ranged_attention(q, k, v, start, stop, implementation="mosaic_tpu")


def test_refuses_float64(x64):
    q, k, v = draw_heads(np.random.default_rng(0), 1, 8, 8, 2, 1, 8, 8, jnp.float64)
    start, stop = ranges("causal", None, 1, 8, 8)
    with pytest.raises(NotImplementedError, match="float64"):
        ranged_attention(q, k, v, start, stop, implementation="mosaic_tpu")


@pytest.mark.parametrize("sizes", [(8, 128), (0, 128), (16, 64), (16, 0)])
def test_refuses_tiles_that_are_not_aligned(sizes):
    with pytest.raises(ValueError, match="multiple of"):
        Tiles(*sizes)


def test_tiles_follow_the_chip_and_fit():
    assert tiles_for("TPU v5 lite", 2**15, 2**15, 8, 128, 128, 2) == Tiles(64, 512)
    assert tiles_for("TPU v6 lite", 2**15, 2**15, 8, 128, 128, 2) == Tiles(64, 1024)
    assert tiles_for("TPU v5 lite", 1, 100, 8, 128, 128, 2) == Tiles(16, 128)
    assert tiles_for("TPU v5 lite", 2**15, 2**15, 64, 256, 256, 4) == Tiles(16, 256)


def range_structs(batch, rows):
    return (jax.ShapeDtypeStruct((batch, rows), jnp.int32),) * 2


@pytest.mark.parametrize("dtype", [jnp.bfloat16])
def test_lowers(dtype):
    lower_everywhere((1, 300, 301, 6, 2, 96, 64), dtype, ["v5e"])


def lower_everywhere(shape, dtype, chips):
    attend, backward = both_ways(functools.partial(ranged_attention_tpu, scale=0.1))
    arguments = shape_structs(*shape, dtype, *range_structs(*shape[:2]))
    for chip in chips:
        assert "tpu_custom_call" in lower_for_tpu(attend, *arguments[:5], chip=chip)
        assert lower_for_tpu(backward, *arguments, chip=chip).count("@tpu_custom_call") >= 3


@pytest.mark.full
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("widths", [(64, 64), (96, 96), (128, 128), (192, 128), (256, 256)])
def test_lowers_everywhere(dtype, widths):
    for group in (1, 3, 8, 16):
        lower_everywhere((2, 1000, 1500, 2 * group, 2, *widths), dtype, TPU_CHIPS)


def kernel_calls(rows):
    """The three kernels with arguments: T = S = rows, N = 32, K = 4, H = 128, bfloat16."""
    struct = jax.ShapeDtypeStruct
    plan = plan_of((1, rows, rows, 32, 4, 128, 128))
    layout = plan.layout
    spans = struct((1, layout.tiles, 1, tpu.LANES), jnp.int32)
    limits = struct((1, layout.tiles, 8, layout.matrix_rows), jnp.int32)
    statistics = struct((4, *limits.shape[1:]), jnp.int32)
    row = struct((4, layout.tiles, 1, layout.matrix_rows), jnp.float32)
    q, k = (struct((1, rows, heads * 128), jnp.bfloat16) for heads in (32, 4))
    return plan, [
        (mosaic_tpu._walk_tiles, (spans, limits, q, k, k)),
        (mosaic_tpu_backward._query_gradient, (spans, limits, row, row, q, q, q, k, k)),
        (mosaic_tpu_backward._key_gradients, (spans, statistics, q, q, k, k)),
    ]


def compile_kernels(chip, which):
    plan, calls = kernel_calls(131072)
    for kernel, arguments in calls[which]:
        compiled = compile_for_tpu(functools.partial(kernel, plan), *arguments, chip=chip)
        # Nothing but the scalars of key blocks, 512 B each, and their cut into tiles.
        assert compiled.memory_analysis().temp_size_in_bytes < 2**20, kernel.__name__


@pytest.mark.parametrize("chip", TPU_CHIPS)
def test_forward_kernel_compiles_without_temporary_memory(chip):
    compile_kernels(chip, slice(0, 1))


@pytest.mark.full
@pytest.mark.parametrize("chip", TPU_CHIPS)
def test_backward_kernels_compile_without_temporary_memory(chip):
    compile_kernels(chip, slice(1, 3))


@pytest.mark.full
@pytest.mark.parametrize("chip", TPU_CHIPS)
@pytest.mark.parametrize("rows", [32768, 131072])
def test_calls_compile_in_linear_memory(chip, rows):
    """The whole call at N = 32, K = 4, H = 128, bfloat16, forward and backward."""
    shape = (1, rows, rows, 32, 4, 128, 128)
    functions = both_ways(functools.partial(ranged_attention_tpu, scale=0.1))
    arguments = shape_structs(*shape, jnp.bfloat16, *range_structs(1, rows))
    for function, count, backward in zip(functions, (5, 7), (False, True), strict=True):
        compiled = compile_for_tpu(function, *arguments[:count], chip=chip)
        temporary = compiled.memory_analysis().temp_size_in_bytes
        bound = temporary_bound(*shape, 2, backward)
        print(
            f"ranged {chip} {rows=} {backward=}: {temporary / 2**20:.0f} of {bound / 2**20:.0f} MiB"
        )
        assert temporary < bound


@pytest.mark.full
@pytest.mark.parametrize("chip", TPU_CHIPS)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize(
    "shape",
    [
        (2, 1000, 1500, 6, 2, 64, 96),
        (1, 4096, 4096, 14, 2, 64, 64),
        (1, 4096, 4096, 16, 16, 256, 256),
        (1, 1, 65536, 32, 4, 128, 128),
        (1, 2048, 2048, 128, 1, 192, 128),
    ],
)
def test_calls_compile_at_other_shapes(chip, dtype, shape):
    functions = both_ways(functools.partial(ranged_attention_tpu, scale=0.1))
    arguments = shape_structs(*shape, dtype, *range_structs(*shape[:2]))
    compile_for_tpu(functions[0], *arguments[:5], chip=chip)
    compile_for_tpu(functions[1], *arguments, chip=chip)
