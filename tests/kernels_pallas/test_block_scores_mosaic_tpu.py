"""Block scores on TPUs: the kernels interpreted, against the reference."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiled import jitted
from kernel_proof import hold, strictly_interpreted

from kernels_pallas.block_scores import Pooling, block_scores, select_blocks
from kernels_pallas.block_scores.mosaic_tpu import (
    Tiles,
)
from kernels_pallas.block_scores.mosaic_tpu import (
    block_scores as block_scores_tpu,
)
from kernels_pallas.block_scores.mosaic_tpu import (
    entry_lse as entry_lse_tpu,
)
from kernels_pallas.block_scores.mosaic_tpu import (
    select_blocks as select_blocks_tpu,
)
from kernels_pallas.block_scores.mosaic_tpu_select import plan_selection, select_on_tpu
from kernels_pallas.block_scores.pooling import UNSEEN_SCORE
from kernels_pallas.block_scores.ranking import Ranking
from kernels_pallas.block_scores.reference import (
    block_importance,
    block_log_scores,
    block_scores_reference,
    entry_lse_reference,
    select_blocks_reference,
)

NSA = Pooling.geometric(32, 16, 64)
FIVE = Pooling((1.0,) * 5, -1, 4, "max")  # InfLLM-V2
MIXED = Pooling((1.0, 0.5, 1.0, 0.0, 2.0), -1, 3, "max")
ONE = Pooling((1.0,), 0, 1, "max")
# Several steps, and several segments of candidates, at sizes an interpreter can do.
SMALL = Tiles(tokens=128, blocks=16, segment=32, entries=16)
RULES = {"initial": 1, "recent": 2, "scale": 0.2}
TOLERANCE = {jnp.float32: 1e-5, jnp.bfloat16: 1e-2}


def arrays(shape, dtype, seed=0):
    """Heads of (B, T, C, N, K, H, Hv)."""
    batch, rows, entries, query_heads, kv_heads, width, value_width = shape
    draw = np.random.default_rng(seed)
    tails = (rows, query_heads, width), (entries, kv_heads, width), (entries, kv_heads, value_width)
    return tuple(jnp.asarray(draw.normal(size=(batch, *tail)), dtype) for tail in tails)


def rows_of(kind, shape, pooling, seed=5):
    """Named (start, stop, first_block, last_block), int32 [B, T]."""
    batch, rows, entries = shape[:3]
    blocks = max(1, pooling.blocks(entries))
    t = np.broadcast_to(np.arange(rows), (batch, rows))
    if kind == "causal":
        stop = (t + 1) * entries // rows
        start, first = np.zeros_like(t), np.zeros_like(t)
        last = t * blocks // rows
    elif kind == "packed":  # three documents
        document = t * 3 // rows
        start, first = document * entries // 3, document * blocks // 3
        stop = np.maximum(start, (t + 1) * entries // rows)
        last = t * blocks // rows
    else:  # empty ranges, holes, nothing eligible, blocks past the last entry
        assert kind == "ragged"
        draw = np.random.default_rng(seed)
        start = draw.integers(-4, entries, (batch, rows))
        stop = start + draw.integers(-3, entries // 2 + 4, (batch, rows))
        last = draw.integers(-2, blocks + 9, (batch, rows))
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
        for x, used in zip(heads, (query, key, key), strict=True)
    )


def with_gradients(function, heads, rows):
    """(out, lse, indices) and (dq, dk, dv) of a random functional of out and finite lse."""
    draw = np.random.default_rng(9)
    on_out = jnp.asarray(draw.normal(size=(*heads[0].shape[:3], heads[2].shape[3])), jnp.float32)
    on_lse = jnp.asarray(draw.normal(size=heads[0].shape[:3]), jnp.float32)

    def value(q, k, v):
        result = function(q, k, v, *rows)
        finite = jnp.where(jnp.isneginf(result.lse), 0, result.lse)
        return jnp.sum(on_out * result.out) + jnp.sum(on_lse * finite), result

    gradient = jax.jit(jax.value_and_grad(value, argnums=(0, 1, 2), has_aux=True))

    def run():
        (_, result), gradients = gradient(*heads)
        return jax.tree.map(np.asarray, (result, gradients))

    return run


def assert_same_choice(got, want, scores, tolerance):
    """Equal lists; where rounding may tell near-ties apart, lists of equal scores."""
    for at in np.argwhere(np.any(got != want, axis=-1)):
        row = tuple(at)
        assert np.sum(got[row] >= 0) == np.sum(want[row] >= 0), row
        only = [np.setdiff1d(a, b) for a, b in ((got[row], want[row]), (want[row], got[row]))]
        known = np.append(scores[row], np.full(99, scores[row].min()))
        np.testing.assert_allclose(
            np.sort(known[only[0]]), np.sort(known[only[1]]), rtol=tolerance, err_msg=str(row)
        )


def check_scores(
    shape, dtype, kind, pooling, selected, tiles=None, seed=0, exact=True, equal_keys=0
):
    """The kernel, with everything unread poisoned, against the float32 reference. The first
    ``equal_keys`` keys are one key, so that their blocks tie exactly.
    """
    heads, rows = arrays(shape, dtype, seed), rows_of(kind, shape, pooling, seed + 5)
    heads = (heads[0], heads[1].at[:, :equal_keys].set(heads[1][:, :1]), heads[2])
    rules = {"pooling": pooling, "selected": selected, **RULES}
    ours = functools.partial(block_scores_tpu, **rules, tiles=tiles)
    with strictly_interpreted("tpu"):
        run = with_gradients(ours, poisoned(heads, rows), rows)
        (result, gradients), again = run(), run()
    for first, second in zip(*map(jax.tree.leaves, ((result, gradients), again)), strict=True):
        np.testing.assert_array_equal(first, second)
    wide = tuple(x.astype(jnp.float32) for x in heads)
    reference = functools.partial(block_scores_reference, **rules)
    want, want_gradients = with_gradients(reference, wide, rows)()
    assert result.out.dtype == dtype
    assert result.lse.dtype == jnp.float32
    np.testing.assert_array_equal(np.isneginf(result.lse), np.isneginf(want.lse))
    seen = ~np.isneginf(want.lse)
    np.testing.assert_array_equal(result.out[~seen], 0)
    np.testing.assert_array_equal(gradients[0][~seen], 0)
    hold(result.lse[seen], want.lse[seen], 1e-5)
    pairs = zip((result.out, *gradients), (want.out, *want_gradients), strict=True)
    for name, (got, expected) in zip(("out", "dq", "dk", "dv"), pairs, strict=True):
        # Over one entry a gradient is the difference of two equal sums, plus the lse's cotangent.
        cancels = shape[2] == 1 and dtype == jnp.float32
        hold(got, expected, 1e-4 if cancels else TOLERANCE[dtype], name)
    if exact:
        np.testing.assert_array_equal(result.indices, want.indices)
    else:
        importance = block_importance(
            *wide[:2], want.lse, *rows[:2], pooling=pooling, scale=RULES["scale"]
        )
        assert_same_choice(result.indices, want.indices, np.asarray(importance), 1e-4)


def check_selection(shape, dtype, kind, pooling, selected, tiles=None, seed=0, exact=True, **how):
    """``select_blocks`` by options: ``lse``, ``budget`` (bool), ``share``, ``floor``."""
    (q, k, _), rows = arrays(shape, dtype, seed), rows_of(kind, shape, pooling, seed + 5)
    share, draw = how.get("share", True), np.random.default_rng(seed + 7)
    lse = budget = None
    if how.get("lse"):
        lse = np.where(draw.random(q.shape[:3]) < 0.2, -np.inf, 2 + draw.normal(size=q.shape[:3]))
        lse = jnp.asarray(lse, jnp.float32)
    if how.get("budget"):
        lists = (*q.shape[:2], k.shape[2] if share else q.shape[2])
        budget = jnp.asarray(draw.integers(-1, selected + 3, lists), jnp.int32)
    rules = {"pooling": pooling, "selected": selected, **RULES, "recent": 1}
    rules |= {"lse": lse, "budget": budget, "share": share, "floor": how.get("floor")}
    with strictly_interpreted("tpu"):
        ours = jax.jit(functools.partial(select_blocks_tpu, **rules, tiles=tiles))
        got = np.asarray(ours(*poisoned((q, k, k), rows)[:2], *rows))
    wide = q.astype(jnp.float32), k.astype(jnp.float32)
    reference = jax.jit(functools.partial(select_blocks_reference, **rules))
    want = np.asarray(reference(*wide, *rows))
    assert got.dtype == np.int32
    if exact:
        np.testing.assert_array_equal(got, want)
    else:
        options = {"pooling": pooling, "share": share, "scale": RULES["scale"]}
        scores = jitted(block_log_scores, **options)(*wide, lse, *rows[:2])
        assert_same_choice(got, want, np.maximum(scores, UNSEEN_SCORE), 1e-4)


def test_interpreted_equals_reference_float32():
    """Odd sizes, ragged and empty rows, steps, segments, exact ties, NaN in all that is unread."""
    check_scores((1, 139, 141, 4, 2, 20, 12), jnp.float32, "ragged", NSA, 5, SMALL, equal_keys=99)


def test_interpreted_equals_reference_bfloat16():
    """Forward with the tiles of the chip; gradients in bfloat16 are in the full run."""
    shape = (1, 70, 37, 4, 1, 64, 64)
    heads, rows = arrays(shape, jnp.bfloat16), rows_of("causal", shape, NSA)
    rules = {"pooling": NSA, "selected": 4, "initial": 1, "recent": 2}
    with strictly_interpreted("tpu"):
        ours = functools.partial(block_scores, implementation="mosaic_tpu", **rules)
        got = jax.tree.map(np.asarray, jax.jit(ours)(*poisoned(heads, rows), *rows))
    wide = tuple(x.astype(jnp.float32) for x in heads)
    want = jitted(block_scores, implementation="reference", **rules)(*wide, *rows)
    assert got.out.dtype == jnp.bfloat16
    hold(got.out, want.out, 1e-2)
    np.testing.assert_allclose(got.lse, want.lse, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(got.indices, want.indices)


def test_interpreted_selection_equals_reference():
    how = {"lse": True, "budget": True, "floor": -3.0}
    check_selection((1, 77, 90, 4, 2, 16, 1), jnp.float32, "ragged", MIXED, 6, SMALL, **how)


@pytest.mark.full
def test_interpreted_entry_lse_equals_reference():
    shape = (1, 37, 45, 6, 2, 16, 1)
    q, k, _ = arrays(shape, jnp.float32)
    start, stop, *_ = rows_of("ragged", shape, ONE)
    with strictly_interpreted("tpu"):
        heads = poisoned((q, k, k), (start, stop))[:2]
        ours = jax.jit(functools.partial(entry_lse_tpu, scale=0.3, tiles=SMALL))
        got = np.asarray(ours(*heads, start, stop))
    want = np.asarray(entry_lse_reference(q, k, start, stop, scale=0.3))
    np.testing.assert_array_equal(np.isneginf(got), np.isneginf(want))
    seen = ~np.isneginf(want)
    hold(got[seen], want[seen], 1e-5)


def tied_heads(shape, seed=0):
    """Few different integer logits, the same for all heads of a group: exact ties everywhere."""
    batch, rows, entries, query_heads, kv_heads = shape
    draw = np.random.default_rng(seed)
    q = np.repeat(
        draw.integers(-1, 2, (batch, rows, kv_heads, 16)), query_heads // kv_heads, axis=2
    )
    k = draw.integers(-1, 2, (batch, entries, kv_heads, 16))
    k = k * (draw.random((batch, entries, kv_heads, 1)) < 0.5)
    return jnp.asarray(q, jnp.float32), jnp.asarray(k, jnp.float32)


@pytest.mark.full
def test_exact_ties_in_log_space_go_to_the_nearest_block():
    """Lists equal the reference's where most blocks tie, across steps and segments."""
    q, k = tied_heads((1, 24, 180, 2, 1))
    rows = rows_of("ragged", (1, 24, 180), FIVE)
    rules = {"pooling": FIVE, "selected": 9, **RULES, "scale": 0.25, "share": False}
    rules |= {"lse": None, "budget": None, "floor": None}
    with strictly_interpreted("tpu"):
        ours = functools.partial(select_blocks_tpu, **rules, tiles=SMALL)
        got = np.asarray(jax.jit(ours)(q, k, *rows))
    np.testing.assert_array_equal(got, select_blocks_reference(q, k, *rows, **rules))


@pytest.mark.full
@pytest.mark.parametrize("reducer", ["sum", "max"])
def test_exact_ties_of_probabilities_go_to_the_nearest_block(reducer):
    q, k = tied_heads((1, 24, 180, 4, 1))
    k = jnp.repeat(k[:, ::4], 4, axis=1)  # whole blocks of equal keys tie under a sum
    pooling = Pooling((1, 2, 2, 1), 0, 4, reducer)
    rows = rows_of("ragged", (1, 24, 180), pooling)
    rules = {"pooling": pooling, "selected": 9, **RULES, "scale": 0.25}
    want = block_scores_reference(q, k, k, *rows, **rules)
    ranking = Ranking(pooling, 9, RULES["initial"], RULES["recent"])
    plan = plan_selection(q, k, ranking=ranking, lists=1, scale=0.25, tiles=SMALL)
    with strictly_interpreted("tpu"):
        got = np.asarray(jax.jit(functools.partial(select_on_tpu, plan))(q, k, rows, want.lse))
    np.testing.assert_array_equal(got, want.indices)


@pytest.mark.full
def test_no_entry_is_read_where_there_is_none():
    """No entry at all, or an offset past the last one: the forced blocks and the nearest."""
    q, k, v = arrays((1, 20, 3, 2, 1, 8, 4), jnp.float32)
    zero = jnp.zeros((1, 20), jnp.int32)
    rules = {"selected": 4, "initial": 1, "recent": 1, "implementation": "mosaic_tpu"}
    with strictly_interpreted("tpu"):
        scores = jax.jit(functools.partial(block_scores, pooling=NSA, **rules))
        empty = scores(q, k[:, :0], v[:, :0], zero, zero, zero, zero + 9)
        late = Pooling((1,), 5, 2, "max")
        choice = jax.jit(functools.partial(select_blocks, pooling=late, **rules))
        far = choice(q, k, zero, zero + 3, zero, zero + 9)
    np.testing.assert_array_equal(empty.out, 0)
    np.testing.assert_array_equal(empty.indices, np.broadcast_to([0, 7, 8, 9], (1, 20, 1, 4)))
    np.testing.assert_array_equal(far, np.broadcast_to([0, 7, 8, 9], (1, 20, 1, 4)))


def test_refuses_what_it_cannot_serve(x64):
    q, k, v = arrays((1, 20, 9, 2, 1, 8, 4), jnp.float64)
    row = jnp.zeros((1, 20), jnp.int32)
    rules = {"pooling": NSA, "selected": 2, **RULES}
    with pytest.raises(NotImplementedError, match="float64"):
        block_scores_tpu(q, k, v, row, row, row, row, **rules)
    q, k, v = (x.astype(jnp.float32) for x in (q, k, v))
    few = [a[:, :16] for a in (row, row, row, row)]
    with pytest.raises(NotImplementedError, match="16 query rows"):
        block_scores_tpu(q[:, :16], k, v, *few, **rules)
    with pytest.raises(NotImplementedError, match="selected=99999"):
        block_scores_tpu(q, k, v, row, row, row, row, **rules | {"selected": 99999})
    with pytest.raises(ValueError, match="tokens must be a positive multiple of 128"):
        Tiles(tokens=64)


@pytest.mark.full
@pytest.mark.parametrize("group", [1, 2, 4, 8, 16, 17])
@pytest.mark.parametrize("widths", [(64, 64), (96, 96), (128, 128), (192, 128), (256, 256)])
def test_interpreted_equals_reference_every_group_and_width(group, widths):
    dtype = jnp.bfloat16 if group in (2, 8) else jnp.float32
    kv_heads = 2 if group < 8 else 1
    shape = (1, 45, 41, group * kv_heads, kv_heads, *widths)
    check_scores(shape, dtype, "packed", NSA, 4, exact=False)


@pytest.mark.full
@pytest.mark.parametrize("tokens", [128, 256])
@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("pooling", [FIVE, MIXED, ONE, Pooling((1.0, 2.0), 3, 20, "max")])
def test_interpreted_selection_equals_reference_every_option(pooling, share, tokens):
    tiles = Tiles(tokens=tokens, blocks=16, segment=16)
    for floor, lse, budget in ((None, False, False), (-4.0, True, False), (None, True, True)):
        how = {"floor": floor, "lse": lse, "budget": budget, "share": share}
        shape = (1, 50, 80, 4, 2, 16, 1)
        check_selection(shape, jnp.float32, "ragged", pooling, 6, tiles, exact=False, **how)


@pytest.mark.full
def test_interpreted_selection_of_96_blocks():
    for kind in ("causal", "packed"):
        check_selection((1, 130, 900, 2, 1, 32, 1), jnp.float32, kind, FIVE, 96, exact=False)


def random_shape(draw):
    group, kv_heads = int(draw.choice([1, 1, 2, 3, 4, 7, 8, 16])), int(draw.integers(1, 3))
    widths = [int(draw.choice([8, 64, 96, 128, 130])) for _ in range(2)]
    batch, rows, entries = (int(draw.integers(*span)) for span in ((1, 3), (1, 150), (1, 90)))
    return (batch, rows, entries, group * kv_heads, kv_heads, *widths)


def random_pooling(draw, reducer):
    weights = tuple(draw.choice([0.0, 0.5, 1.0, 2.0], int(draw.integers(1, 7))))
    return Pooling(weights, int(draw.integers(-4, 4)), int(draw.integers(1, 7)), reducer)


@pytest.mark.full
@pytest.mark.parametrize("first", range(0, 50, 10))
def test_interpreted_equals_reference_random_shapes(first):
    for seed in range(first, first + 10):
        draw = np.random.default_rng(seed)
        shape, kind = random_shape(draw), str(draw.choice(["causal", "packed", "ragged"]))
        pooling = random_pooling(draw, str(draw.choice(["sum", "max"])))
        dtype = jnp.bfloat16 if draw.random() < 0.3 else jnp.float32
        selected = int(draw.integers(1, 12))
        check_scores(shape, dtype, kind, pooling, selected, SMALL, seed, exact=False)


@pytest.mark.full
@pytest.mark.parametrize("first", range(50, 100, 10))
def test_interpreted_selection_equals_reference_random_shapes(first):
    for seed in range(first, first + 10):
        draw = np.random.default_rng(seed)
        shape, kind = random_shape(draw), str(draw.choice(["causal", "packed", "ragged"]))
        how = {name: bool(draw.random() < 0.5) for name in ("lse", "budget", "share")}
        how["floor"] = float(draw.normal()) - 2 if draw.random() < 0.5 else None
        pooling, selected = random_pooling(draw, "max"), int(draw.integers(1, 12))
        dtype = jnp.bfloat16 if draw.random() < 0.3 else jnp.float32
        check_selection(shape, dtype, kind, pooling, selected, SMALL, seed, exact=False, **how)
