"""Block scores on Hopper: the kernels interpreted against the reference, and their lowering."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiled import jitted
from jax.experimental.mosaic import gpu as mosaic
from kernel_proof import hold, strictly_interpreted
from mosaic_gpu_cases import draw_heads

from kernels_pallas.ahead_of_time import lower_for_gpu
from kernels_pallas.block_scores import Pooling, block_scores, entry_lse, select_blocks
from kernels_pallas.block_scores.mosaic_gpu import (
    Tiles,
    tiles_for,
)
from kernels_pallas.block_scores.mosaic_gpu import (
    block_scores as block_scores_mosaic_gpu,
)
from kernels_pallas.block_scores.mosaic_gpu import (
    select_blocks as select_blocks_mosaic_gpu,
)
from kernels_pallas.block_scores.pooling import UNSEEN_SCORE
from kernels_pallas.block_scores.reference import (
    block_importance,
    block_log_scores,
    block_scores_reference,
    entry_lse_reference,
    select_blocks_reference,
)

ON_GPU = jax.default_backend() == "gpu"
NSA = Pooling.geometric(32, 16, 64)
FIVE = Pooling((1.0,) * 5, -1, 4, "max")  # InfLLM-V2
MIXED = Pooling((1.0, 0.5, 1.0, 0.0, 2.0), -1, 3, "max")
ONE = Pooling((1.0,), 0, 1, "max")
POOLINGS = (NSA, FIVE, MIXED, ONE, Pooling((1, 1, 1), 1, 2), Pooling((0.0, 0.0), 0, 1))
RULES = {"initial": 1, "recent": 2, "scale": 0.2}
KINDS = ("causal", "packed", "ragged")
NAMES = ("out", "lse", "indices", "dq", "dk", "dv")


def rows_of(kind, shape, pooling, seed=5):
    """Named (start, stop, first_block, last_block), int32 [B, T]."""
    batch, rows, entries = shape[:3]
    blocks = max(1, pooling.blocks(entries))
    t = np.broadcast_to(np.arange(rows), (batch, rows))
    if kind == "causal":
        start, stop = np.zeros_like(t), (t + 1) * entries // rows
        first, last = np.zeros_like(t), t * blocks // rows
    elif kind == "packed":  # three documents
        document = t * 3 // rows
        start, first = document * entries // 3, document * blocks // 3
        stop = np.maximum(start, (t + 1) * entries // rows)
        last = t * blocks // rows
    else:  # empty ranges, holes, nothing eligible, blocks far past the last entry
        assert kind == "ragged"
        draw = np.random.default_rng(seed)
        start = draw.integers(-4, entries, (batch, rows))
        stop = start + draw.integers(-3, entries // 2 + 4, (batch, rows))
        last = draw.integers(-2, blocks + 9, (batch, rows)) + 300 * (t % 17 == 3)
        first = last - draw.integers(-2, blocks + 2, (batch, rows))
    start, stop = np.clip(start, 0, entries), np.clip(stop, 0, entries)
    return tuple(jnp.asarray(a, jnp.int32) for a in (start, stop, first, last))


def poisoned(heads, rows):
    """NaN in every query, key and value that no range touches."""
    start, stop = rows[:2]
    entry = jnp.arange(heads[1].shape[1])[None, None, :]
    read = (entry >= start[..., None]) & (entry < stop[..., None])
    query, key = jnp.any(read, axis=2), jnp.any(read, axis=1)
    return tuple(
        jnp.where(used[:, :, None, None], x, jnp.nan)
        for x, used in zip(heads, (query, key, key), strict=False)
    )


def functional(attend, **rules):
    """``run(heads, rows)`` -> outputs and gradients of a random function of out and lse."""

    def loss(heads, rows):
        result = attend(*heads, *rows, **rules)
        draw = np.random.default_rng(9)
        on_out = jnp.asarray(draw.normal(size=result.out.shape), jnp.float32)
        on_lse = jnp.asarray(draw.normal(size=result.lse.shape), jnp.float32)
        finite = jnp.where(jnp.isneginf(result.lse), 0.0, result.lse)
        value = jnp.sum(result.out.astype(jnp.float32) * on_out) + jnp.sum(finite * on_lse)
        return value, result

    gradient = jax.jit(jax.grad(loss, has_aux=True))

    def run(heads, rows):
        gradients, result = gradient(heads, rows)
        return dict(zip(NAMES, map(np.asarray, (*result, *gradients)), strict=True))

    return run


def assert_same_choice(got, want, scores):
    """Equal lists; where rounding may tell near-ties apart, lists of nearly equal scores."""
    for at in np.argwhere(np.any(got != want, axis=-1)):
        row = tuple(at)
        assert np.sum(got[row] >= 0) == np.sum(want[row] >= 0), row
        only = [np.setdiff1d(a, b) for a, b in ((got[row], want[row]), (want[row], got[row]))]
        known = np.append(scores[row], np.full(999, scores[row].min()))
        first, second = (np.sort(known[x]) for x in only)
        np.testing.assert_allclose(first, second, rtol=1e-4, atol=1e-5, err_msg=str(row))


def check_scores(
    shape, kind, pooling, selected, tiles=None, seed=0, dtype=jnp.bfloat16, interpret=True
):
    """The kernels, with everything unread poisoned and run twice, against the reference."""
    heads = draw_heads(np.random.default_rng(seed), shape, dtype)
    rows = rows_of(kind, shape, pooling, seed + 5)
    rules = {"pooling": pooling, "selected": selected, **RULES}
    run = functional(block_scores_mosaic_gpu, **rules, tiles=tiles)
    if interpret:
        with strictly_interpreted("gpu"):
            result, again = (run(poisoned(heads, rows), rows) for _ in range(2))
    else:
        result, again = (run(poisoned(heads, rows), rows) for _ in range(2))
    for name in NAMES:
        np.testing.assert_array_equal(result[name], again[name], err_msg=name)
    wide = tuple(x.astype(jnp.float32) for x in heads)
    with jax.default_matmul_precision("highest"):
        want = functional(block_scores_reference, **rules)(wide, rows)
        importance = block_importance(
            *wide[:2], want["lse"], *rows[:2], pooling=pooling, scale=RULES["scale"]
        )
    nothing = np.isneginf(want["lse"])
    np.testing.assert_array_equal(np.isneginf(result["lse"]), nothing)
    for name in ("out", "dq"):
        assert not np.any(result[name].astype(np.float32)[nothing]), name
    for name in NAMES:
        if name == "indices":
            continue
        got, exact = (np.asarray(x[name], np.float64) for x in (result, want))
        if name == "lse":
            got, exact = got[~nothing], exact[~nothing]
        hold(got, exact, 1e-5 if name == "lse" else 1e-2, name)
    assert result["indices"].dtype == np.int32
    assert_same_choice(result["indices"], want["indices"], np.asarray(importance))


def check_selection(shape, kind, pooling, selected, tiles=None, seed=0, interpret=True, **how):
    """``select_blocks`` by options: ``lse`` and ``budget`` (bool), ``share``, ``floor``."""
    draw = np.random.default_rng(seed)
    q, k, _ = draw_heads(draw, shape)
    rows = rows_of(kind, shape, pooling, seed + 5)
    share = how.get("share", True)
    lse = budget = None
    if how.get("lse"):
        lse = np.where(draw.random(q.shape[:3]) < 0.2, -np.inf, 2 + draw.normal(size=q.shape[:3]))
        lse = jnp.asarray(lse, jnp.float32)
    if how.get("budget"):
        lists = (*q.shape[:2], k.shape[2] if share else q.shape[2])
        budget = jnp.asarray(draw.integers(-1, selected + 3, lists), jnp.int32)
    rules = {"pooling": pooling, "selected": selected, **RULES, "recent": 1}
    rules |= {"lse": lse, "budget": budget, "share": share, "floor": how.get("floor")}
    choose = jax.jit(functools.partial(select_blocks_mosaic_gpu, **rules, tiles=tiles))
    if interpret:
        with strictly_interpreted("gpu"):
            got = np.asarray(choose(*poisoned((q, k), rows), *rows))
    else:
        got = np.asarray(choose(*poisoned((q, k), rows), *rows))
    wide = q.astype(jnp.float32), k.astype(jnp.float32)
    with jax.default_matmul_precision("highest"):
        reference = jax.jit(functools.partial(select_blocks_reference, **rules))
        want = np.asarray(reference(*wide, *rows))
        options = {"pooling": pooling, "share": share, "scale": RULES["scale"]}
        scores = jitted(block_log_scores, **options)(*wide, lse, *rows[:2])
    assert got.dtype == np.int32
    assert_same_choice(got, want, np.maximum(scores, UNSEEN_SCORE))


def test_interpreted_equals_reference_odd_sizes_poisoned_repeatable():
    """Two warpgroups, and a group of three heads in three products."""
    check_scores((1, 17, 75, 3, 1, 64, 64), "ragged", NSA, 3, Tiles(2, 8, 1, 2, 64))


def test_interpreted_selection_equals_reference():
    """Log scores of three stages, by a given normaliser with holes, a budget and a floor."""
    how = {"lse": True, "budget": True, "floor": -3.0}
    check_selection((2, 11, 500, 2, 1, 64, 64), "ragged", MIXED, 4, Tiles(1, 8, 1, 2, 64), **how)


@pytest.mark.full
def test_interpreted_selection_of_single_heads():
    how = {"share": False, "tiles": Tiles(1, 8, 1, 2, 64)}
    check_selection((1, 11, 90, 2, 1, 64, 64), "causal", ONE, 3, **how)


def check_entry_lse(shape, seed=0):
    q, k, _ = draw_heads(np.random.default_rng(seed), shape)
    rows = rows_of("ragged", shape, ONE)[:2]
    with strictly_interpreted("gpu"):
        lse = jax.jit(functools.partial(entry_lse, scale=0.3, implementation="mosaic_gpu"))
        got = np.asarray(lse(*poisoned((q, k), rows), *rows))
    wide = q.astype(jnp.float32), k.astype(jnp.float32)
    want = np.asarray(jitted(entry_lse_reference, scale=0.3)(*wide, *rows))
    seen = ~np.isneginf(want)
    np.testing.assert_array_equal(np.isneginf(got), ~seen)
    hold(got[seen], want[seen], 1e-5)


def test_interpreted_entry_lse_equals_reference():
    check_entry_lse((1, 17, 45, 6, 2, 96, 64))


def tied_heads(shape, seed=0):
    """Few different integer logits, the same for all heads of a group: exact ties everywhere."""
    batch, rows, entries, query_heads, kv_heads = shape
    draw = np.random.default_rng(seed)
    q = draw.integers(-1, 2, (batch, rows, kv_heads, 64))
    q = np.repeat(q * (np.arange(64) < 8), query_heads // kv_heads, axis=2)
    k = draw.integers(-1, 2, (batch, entries, kv_heads, 64))
    k = k * (draw.random((batch, entries, kv_heads, 1)) < 0.5)
    return jnp.asarray(q, jnp.bfloat16), jnp.asarray(k, jnp.bfloat16)


def check_ties(shape, pooling, kind, selected, tiles, *, interpret=True, seed=0, scores=True):
    """Lists equal the reference's where most blocks tie, across products and stages.

    By probabilities, or by log scores of single heads.
    """
    q, k = tied_heads(shape, seed)
    if pooling.reducer == "sum":  # whole blocks of equal keys tie under a sum
        k = jnp.repeat(k[:, ::4], 4, axis=1)[:, : shape[2]]
    rows = rows_of(kind, shape, pooling)
    rules = {"pooling": pooling, "selected": selected, "initial": 1, "recent": 1, "scale": 0.25}
    if not scores:
        rules |= {"lse": None, "budget": None, "floor": None, "share": False}
    kernel = block_scores_mosaic_gpu if scores else select_blocks_mosaic_gpu
    reference = block_scores_reference if scores else select_blocks_reference

    def indices(function, q, k, **sizes):
        result = function(*((q, k, k) if scores else (q, k)), *rows, **rules, **sizes)
        return result.indices if scores else result

    run = jax.jit(functools.partial(indices, kernel, tiles=tiles))
    if interpret:
        with strictly_interpreted("gpu"):
            got = np.asarray(run(q, k))
    else:
        got = np.asarray(run(q, k))
    expected = jax.jit(functools.partial(indices, reference))
    want = expected(q.astype(jnp.float32), k.astype(jnp.float32))
    np.testing.assert_array_equal(got, want)


FOUR = Pooling((1, 1, 1, 1), 0, 4)


@pytest.mark.parametrize("pooling", [FIVE, FOUR], ids=["max", "sum"])
def test_exact_ties_go_to_the_nearest_block(pooling):
    check_ties((1, 11, 500, 2, 1), pooling, "ragged", 4, Tiles(1, 8, 2, 3, 64))


def test_no_entry_is_read_where_there_is_none():
    """No entry at all, or an offset past the last one: the forced blocks and the nearest."""
    q, k, _ = draw_heads(np.random.default_rng(0), (1, 17, 3, 2, 1, 64, 64))
    zero = jnp.zeros((1, 17), jnp.int32)
    rules = {"selected": 4, "initial": 1, "recent": 1, "implementation": "mosaic_gpu"}
    late = Pooling((1,), 5, 2, "max")
    for keys, stop, last in ((k[:, :0], 0, 2**30), (k, 3, 9)):
        choose = jax.jit(functools.partial(select_blocks, pooling=late, share=False, **rules))
        with strictly_interpreted("gpu"):
            got = np.asarray(choose(q, keys, zero, zero + stop, zero, zero + last))
        want = np.broadcast_to([0, last - 2, last - 1, last], (1, 17, 2, 4))
        np.testing.assert_array_equal(got, want)


def structures(length, heads=32, kv_heads=4, width=128, value_width=128, dtype=jnp.bfloat16):
    """Shapes of q, k, v and the four row arrays of a sequence with 16 tokens an entry."""

    def of(*shape, dtype=dtype):
        return jax.ShapeDtypeStruct((1, *shape), dtype)

    entries = -(-length // 16)
    q, k = of(length, heads, width), of(entries, kv_heads, width)
    return q, k, of(entries, kv_heads, value_width), *[of(length, dtype=jnp.int32)] * 4


def forward_and_backward(q, k, v, *rows):
    def loss(q, k, v):
        result = block_scores_mosaic_gpu(q, k, v, *rows, pooling=NSA, selected=16, **RULES)
        return jnp.sum(result.out.astype(jnp.float32)) + jnp.sum(result.lse), result

    return jax.grad(loss, argnums=(0, 1, 2), has_aux=True)(q, k, v)


def choose(q, k, v, *rows, **options):
    """InfLLM-V2's choice: 96 blocks by its own normaliser; ``v`` is not read."""
    options = {"lse": None, "budget": None, "floor": None, "share": True, **options}
    return select_blocks_mosaic_gpu(q, k, *rows, pooling=FIVE, selected=96, **RULES, **options)


CASES = [
    (131072, 64, 4, 128, 128),
    pytest.param((32768, 32, 4, 128, 128), marks=pytest.mark.full),
    pytest.param((32768, 8, 8, 64, 64), marks=pytest.mark.full),
    pytest.param((32768, 16, 4, 96, 96), marks=pytest.mark.full),
    pytest.param((32768, 16, 1, 192, 128), marks=pytest.mark.full),
    pytest.param((32768, 16, 2, 256, 256), marks=pytest.mark.full),
    pytest.param((1000, 12, 4, 256, 128), marks=pytest.mark.full),
    pytest.param((1000, 10, 2, 128, 128), marks=pytest.mark.full),
]


@pytest.fixture
def signed(monkeypatch):
    """Fails where 32-bit integers would be compared or reduced as unsigned: a constant as the first
    choice of ``where`` makes them so in Mosaic GPU, and the interpreter cannot tell.
    """

    def checked(method):
        def run(self, *arguments, **options):
            unsigned = self.is_signed is False and "i32" in str(self.mlir_dtype)
            assert not unsigned, f"{method.__name__} of unsigned integers"
            return method(self, *arguments, **options)

        return run

    array = mosaic.FragmentedArray
    for name in ("reduce", "max", "min", "__lt__", "__le__", "__gt__", "__ge__"):
        monkeypatch.setattr(array, name, checked(getattr(array, name)))


@pytest.mark.parametrize("case", CASES)
def test_lowers_for_hopper(case, signed):
    module = lower_for_gpu(forward_and_backward, *structures(*case))
    assert module.count("mosaic_gpu") >= 4


def test_selection_lowers_for_hopper(signed):
    assert lower_for_gpu(choose, *structures(131072)).count("mosaic_gpu") >= 2


@pytest.mark.full
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize(
    "options", [{"share": False}, {"floor": 0.1}, {"share": False, "floor": 0}]
)
def test_selection_variants_lower_for_hopper(dtype, options, signed):
    module = lower_for_gpu(functools.partial(choose, **options), *structures(4096, dtype=dtype))
    assert "mosaic_gpu" in module


@pytest.mark.parametrize("width", [64, 128, 192, 256])
@pytest.mark.parametrize("selected", [16, 96])
def test_default_tiles_fit_in_shared_memory(width, selected):
    for group in (1, 2, 3, 4, 7, 8, 12, 16, 17, 32):
        for rows in (20, 100000):
            tiles_for(width, group, selected, rows).check(width, group)


def test_tiles_that_do_not_fit_are_refused():
    heads = draw_heads(np.random.default_rng(0), (1, 8, 8, 2, 1, 128, 128))
    rows = [jnp.zeros((1, 8), jnp.int32)] * 4
    rules = {"pooling": NSA, "selected": 2, **RULES}
    for tiles, message in (
        (Tiles(2, 8, 2, 4, 4096), "bytes of shared memory"),
        (Tiles(1, 12, 1, 1, 64), "multiple of 8"),
        (Tiles(1, 8, 3, 1, 64), "heads must divide 2"),
        (Tiles(1, 8, 1, 1, 32), "stage must be a multiple of 64"),
    ):
        with pytest.raises(ValueError, match=message):
            block_scores_mosaic_gpu(*heads, *rows, **rules, tiles=tiles)


@pytest.mark.parametrize(
    ("shape", "dtype", "selected", "message"),
    [
        ((1, 20, 9, 2, 1, 64, 64), jnp.float32, 2, "bfloat16 or float16"),
        ((1, 20, 9, 2, 1, 320, 64), jnp.bfloat16, 2, "width 320 is above 256"),
        ((1, 20, 9, 2, 1, 64, 320), jnp.bfloat16, 2, "width 320 is above 256"),
        ((1, 16, 9, 2, 1, 64, 64), jnp.bfloat16, 2, "16 query rows"),
        ((1, 20, 9, 2, 1, 64, 64), jnp.bfloat16, 999, "selected=999"),
        ((1, 20, 9, 128, 1, 256, 64), jnp.bfloat16, 2, "groups of 128 query heads"),
    ],
)
def test_refusals_name_the_values(shape, dtype, selected, message):
    heads = draw_heads(np.random.default_rng(0), shape, dtype)
    rows = [jnp.zeros(shape[:2], jnp.int32)] * 4
    with pytest.raises(NotImplementedError, match=message):
        block_scores(*heads, *rows, pooling=NSA, selected=selected, implementation="mosaic_gpu")


def test_auto_runs_xla_where_the_kernel_refuses(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr("kernels_pallas.gpu.check_device", lambda: None)
    q, k, v = draw_heads(np.random.default_rng(0), (1, 20, 9, 2, 1, 64, 64), jnp.float32)
    rows = [jnp.zeros((1, 20), jnp.int32)] * 4
    result = block_scores(q, k, v, *rows, pooling=NSA, selected=2)
    assert result.indices.shape == (1, 20, 1, 2)


@pytest.mark.full
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("group", [1, 2, 4, 8, 16])
def test_interpreted_equals_reference_groups(kind, group):
    check_scores((2, 43, 131, 2 * group, 2, 64, 64), kind, NSA, 6)


@pytest.mark.full
@pytest.mark.parametrize("widths", [(64, 64), (96, 96), (128, 128), (192, 128), (256, 256)])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_interpreted_equals_reference_widths(widths, dtype):
    check_scores((1, 40, 150, 4, 2, *widths), "ragged", NSA, 4, dtype=dtype)


@pytest.mark.full
@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("kind", KINDS)
def test_interpreted_equals_reference_poolings(pooling, kind):
    check_scores((1, 50, 140, 2, 1, 64, 64), kind, pooling, 7, Tiles(1, 8, 2, 2, 64))


@pytest.mark.full
@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("lse", [True, False])
@pytest.mark.parametrize("floor", [None, -4.0])
@pytest.mark.parametrize("budget", [True, False])
def test_interpreted_selection_options(share, lse, floor, budget):
    how = {"share": share, "lse": lse, "floor": floor, "budget": budget}
    check_selection((1, 35, 170, 6, 2, 64, 64), "packed", FIVE, 8, **how)


@pytest.mark.full
@pytest.mark.parametrize("warpgroups", [1, 2])
@pytest.mark.parametrize("tokens", [8, 16, 32])
@pytest.mark.parametrize("stage", [64, 192])
def test_interpreted_equals_reference_tiles(warpgroups, tokens, stage):
    tiles = Tiles(warpgroups, tokens, 2, 3, stage)
    check_ties((1, 40, 800, 4, 1), FIVE, "ragged", 33, tiles)
    check_ties((1, 40, 800, 4, 1), FOUR, "causal", 3, tiles)


@pytest.mark.full
def test_interpreted_long_lists():
    check_ties((1, 20, 700, 2, 1), FIVE, "causal", 96, None)
    check_ties((1, 20, 700, 2, 1), FIVE, "ragged", 96, None, scores=False)
    check_selection((1, 20, 700, 4, 1, 64, 64), "ragged", FIVE, 96)


@pytest.mark.full
@pytest.mark.parametrize("scale", [0.3, -0.2, 0.0])
def test_interpreted_equals_reference_scales(scale):
    shape = (1, 40, 100, 2, 1, 64, 64)
    heads, rows = draw_heads(np.random.default_rng(4), shape), rows_of("packed", shape, FOUR)
    rules = {"pooling": FOUR, "selected": 5, **RULES, "scale": scale}
    with strictly_interpreted("gpu"):
        result = functional(block_scores_mosaic_gpu, **rules)(heads, rows)
    wide = tuple(x.astype(jnp.float32) for x in heads)
    want = functional(block_scores_reference, **rules)(wide, rows)
    seen = ~np.isneginf(want["lse"])
    hold(result["lse"][seen], want["lse"][seen], 1e-5)
    for name in ("out", "dq", "dk", "dv"):
        hold(result[name], want[name], 1e-2, name)
    importance = block_importance(*wide[:2], want["lse"], *rows[:2], pooling=FOUR, scale=scale)
    assert_same_choice(result["indices"], want["indices"], np.asarray(importance))


@pytest.mark.full
@pytest.mark.parametrize("seed", range(100))
def test_interpreted_equals_reference_random_shapes(seed):
    """Outputs and gradients of 50 shapes, the choice by log scores of 50."""
    rng = np.random.default_rng(1000 + seed)
    kv_heads, group = int(rng.integers(1, 3)), int(rng.integers(1, 7))
    width = int(rng.choice([32, 64, 80, 128]))
    shape = (int(rng.integers(1, 3)), int(rng.integers(17, 60)), int(rng.integers(1, 300)))
    shape = (*shape, kv_heads * group, kv_heads, width, int(rng.choice([width, 64])))
    pooling, kind = POOLINGS[rng.integers(len(POOLINGS))], str(rng.choice(KINDS))
    selected = int(rng.integers(1, 40))
    if seed % 2:
        check_scores(shape, kind, pooling, selected, seed=seed)
    else:
        how = {name: bool(rng.integers(2)) for name in ("share", "lse", "budget")}
        how["floor"] = -4.0 if rng.integers(2) else None
        pooling = pooling if pooling.reducer == "max" else FIVE
        check_selection(shape, kind, pooling, selected, seed=seed, **how)
    jax.clear_caches()


@pytest.mark.device
@pytest.mark.skipif(not ON_GPU, reason="needs a Hopper GPU")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "shape",
    [
        (2, 45, 150, 3, 1, 96, 64),
        (2, 700, 1100, 16, 2, 64, 64),
        (1, 2048, 2048, 64, 4, 128, 128),
        (1, 1000, 1500, 8, 8, 192, 128),
        (1, 1024, 2048, 8, 2, 256, 256),
    ],
)
def test_device_equals_reference(shape, kind):
    check_scores(shape, kind, NSA, 16, interpret=False)
    check_scores(shape, kind, FIVE, 40, interpret=False)
    for share in (True, False):
        how = {"share": share, "lse": True, "budget": True, "floor": -4.0}
        check_selection(shape, kind, FIVE, 96, interpret=False, **how)
        check_selection(shape, kind, ONE, 16, interpret=False, share=share)


@pytest.mark.device
@pytest.mark.skipif(not ON_GPU, reason="needs a Hopper GPU")
@pytest.mark.parametrize("group", [1, 4, 16])
@pytest.mark.parametrize("kind", KINDS)
def test_device_exact_ties(group, kind):
    """Most blocks tie: any wrong bit of the selection shows in the lists."""
    check_ties((1, 700, 6000, group, 1), FIVE, kind, 40, None, interpret=False)
    check_ties((1, 700, 6000, group, 1), FIVE, kind, 96, None, interpret=False, scores=False)
    check_ties((1, 700, 6000, group, 1), FOUR, kind, 16, None, interpret=False)


@pytest.mark.device
@pytest.mark.skipif(not ON_GPU, reason="needs a Hopper GPU")
@pytest.mark.parametrize("group", [4, 16])
def test_device_equals_xla_at_length(group):
    """128k tokens, where the reference would need T * C memory."""
    shape = (1, 131072, 8192, group, 1, 128, 128)
    heads, rows = draw_heads(np.random.default_rng(12), shape), rows_of("causal", shape, NSA)
    rules = {"pooling": NSA, "selected": 16, **RULES}
    run = functional(block_scores, **rules, implementation="mosaic_gpu")
    result, again = run(heads, rows), run(heads, rows)
    wide = tuple(x.astype(jnp.float32) for x in heads)
    with jax.default_matmul_precision("highest"):
        want = functional(block_scores, **rules, implementation="xla")(wide, rows)
    for name in NAMES:
        np.testing.assert_array_equal(result[name], again[name], err_msg=name)
    for name in ("out", "dq", "dk", "dv"):
        hold(result[name], want[name], 1e-2, name)
    # Near-ties aside, of which there are few among 2048 random blocks.
    assert np.mean(np.all(result["indices"] == want["indices"], axis=-1)) > 0.99
