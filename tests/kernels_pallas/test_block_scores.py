"""Block scores: indices against a brute force, and the XLA path against the reference."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiled import jitted

from kernels_pallas.block_scores import Pooling, block_scores
from kernels_pallas.block_scores.reference import block_importance, block_scores_reference
from kernels_pallas.block_scores.xla import block_scores_xla
from kernels_pallas.ranged.tiling import Tiles

SMALL = Tiles(rows=8, keys=16)
NSA = Pooling.geometric(8, 4, 16)
# batch, rows, entries, query heads, kv heads, width, value width: tiles, and few rows (decode).
MANY, FEW = (2, 43, 37, 4, 2, 8, 4), (2, 5, 37, 4, 2, 8, 4)
NAMES = ("out", "lse", "indices", "dq", "dk", "dv")
# What holds for the reference holds for xla, which is compared with it everywhere else.
either = pytest.mark.parametrize(
    "implementation", ["reference", pytest.param("xla", marks=pytest.mark.full)]
)


def heads(shape, dtype, seed=0):
    batch, rows, entries, query_heads, kv_heads, width, value_width = shape
    draw = np.random.default_rng(seed)
    tails = (rows, query_heads, width), (entries, kv_heads, width), (entries, kv_heads, value_width)
    return tuple(jnp.asarray(draw.normal(size=(batch, *tail)), dtype) for tail in tails)


def rows_of(kind, shape, pooling):
    """Named (start, stop, first_block, last_block), int32 [B, T]."""
    batch, rows, entries = shape[:3]
    blocks = pooling.blocks(entries)
    t = np.broadcast_to(np.arange(rows), (batch, rows)) * 4 + max(0, 4 * (entries - rows))
    start, stop = np.zeros_like(t), np.maximum(t - 7 + 4, 0) // 4
    first, last = np.zeros_like(t), t // 16
    if kind == "packed":  # documents of three blocks of 16 tokens, 4 tokens an entry
        first = t // 48 * 3
        start, stop = first * 4, np.maximum(stop, first * 4)
    elif kind == "random":  # empty ranges, nothing eligible, blocks past the last entry
        draw = np.random.default_rng(5)
        start, stop = draw.integers(-4, entries + 4, (2, batch, rows))
        first = draw.integers(-2, blocks + 1, (batch, rows))
        last = first + draw.integers(-2, blocks + 9, (batch, rows))
    else:
        assert kind == "causal"
    start, stop = np.clip(start, 0, entries), np.clip(stop, 0, entries)
    return tuple(jnp.asarray(a, jnp.int32) for a in (start, stop, first, last))


@functools.cache
def functional(implementation, pooling, selected, tiles=SMALL):
    """A jitted (out, lse, indices), (dq, dk, dv) of a linear functional of out and finite lse."""
    rules = {"pooling": pooling, "selected": selected, "initial": 1, "recent": 2, "scale": 0.3}

    def value(q, k, v, rows, on_out, on_lse):
        if implementation == "reference":
            result = block_scores_reference(q, k, v, *rows, **rules)
        else:
            result = block_scores_xla(q, k, v, *rows, **rules, tiles=tiles)
        finite = jnp.where(jnp.isneginf(result.lse), 0, result.lse)
        out = result.out.astype(finite.dtype)
        return jnp.sum(on_out * out) + jnp.sum(on_lse * finite), result

    gradient = jax.jit(jax.value_and_grad(value, argnums=(0, 1, 2), has_aux=True))

    def run(q, k, v, rows):
        draw = np.random.default_rng(9)
        dtype = np.float64 if q.dtype == jnp.float64 else np.float32
        on_out = draw.normal(size=(*q.shape[:3], v.shape[3])).astype(dtype)
        on_lse = draw.normal(size=q.shape[:3]).astype(dtype)
        (_, result), gradients = gradient(q, k, v, rows, on_out, on_lse)
        return result, gradients

    return run


def pairs(ours, reference):
    return zip(NAMES, jax.tree.leaves(ours), jax.tree.leaves(reference), strict=True)


def compare(kind, shape, dtype, tolerance, pooling, selected, tiles=SMALL):
    arguments = (*heads(shape, dtype), rows_of(kind, shape, pooling))
    ours = functional("xla", pooling, selected, tiles)(*arguments)
    reference = functional("reference", pooling, selected)(*arguments)
    for name, got, want in pairs(ours, reference):
        assert got.dtype == want.dtype, name
        got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
        np.testing.assert_allclose(got, want, rtol=tolerance, atol=tolerance, err_msg=name)


@pytest.mark.parametrize("kind", ["causal", "packed", "random"])
@pytest.mark.parametrize("shape", [MANY, FEW])
def test_xla_equals_reference_float64(x64, kind, shape):
    compare(kind, shape, jnp.float64, 1e-11, NSA, 4)


@pytest.mark.parametrize(
    ("shape", "pooling", "selected"),
    [
        ((1, 20, 37, 3, 3, 8, 4), Pooling((1, 2, 0.5), -1, 2, "max"), 3),  # groups of one
        ((1, 20, 9, 8, 2, 8, 4), Pooling((1,), 0, 1), 16),  # more slots than blocks
        ((1, 3, 9, 6, 3, 8, 4), Pooling((1, 1, 1), 1, 2), 1),  # kv heads by threes, positive offset
        ((1, 3, 9, 5, 5, 8, 4), Pooling((1, 1, 1), 1, 2), 1),  # kv heads one by one
        ((1, 1, 1100, 4, 2, 8, 4), NSA, 5),  # decode in several steps
    ],
)
def test_xla_equals_reference_other_shapes_float64(x64, shape, pooling, selected):
    compare("random" if shape[1] > 1 else "causal", shape, jnp.float64, 1e-11, pooling, selected)


def test_xla_equals_reference_float32():
    """Indices included: the seed has no near-ties."""
    for shape in (MANY, FEW):
        compare("causal", shape, jnp.float32, 2e-5, NSA, 4)


@pytest.mark.parametrize("shape", [MANY, FEW])
def test_bfloat16_out_and_lse(shape):
    arguments = (*heads(shape, jnp.bfloat16), rows_of("causal", shape, NSA))
    ours, _ = functional("xla", NSA, 4)(*arguments)
    reference, _ = functional("reference", NSA, 4)(*arguments)
    assert ours.out.dtype == jnp.bfloat16
    assert ours.lse.dtype == jnp.float32
    for got, want in ((ours.out, reference.out), (ours.lse, reference.lse)):
        got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
        np.testing.assert_allclose(got, want, rtol=2e-2, atol=2e-2)


@pytest.mark.full
@pytest.mark.parametrize("group", [1, 2, 4, 8])
@pytest.mark.parametrize("rows", [1, 127, 128, 129, 700])
def test_xla_equals_reference_real_sizes(x64, group, rows):
    for kind in ("causal", "packed", "random"):
        shape = (2, rows, max(1, rows // 4), 2 * group, 2, 64, 64)
        compare(kind, shape, jnp.float64, 1e-10, Pooling.geometric(32, 16, 64), 16, tiles=None)


def brute_force(p, first, last, pooling, selected, initial, recent):
    """Chosen blocks of one row from group-summed probabilities p [C]; plain Python."""
    reduce = {"sum": sum, "max": max}[pooling.reducer]

    def importance(j):
        entries = [pooling.stride * j + pooling.offset + m for m in range(len(pooling.weights))]
        return reduce(
            w * (p[i] if 0 <= i < len(p) else 0.0)
            for w, i in zip(pooling.weights, entries, strict=True)
        )

    eligible = range(max(first, 0), last + 1)

    def rank(j):
        forced = 2 if j > last - recent else 1 if j < max(first, 0) + initial else 0
        return (forced, 0.0 if forced else importance(j), j)

    return sorted(sorted(eligible, key=rank, reverse=True)[:selected])


@either
@pytest.mark.parametrize("shape", [MANY, FEW])
@pytest.mark.parametrize(
    ("pooling", "selected", "initial", "recent"),
    [
        (NSA, 4, 1, 2),
        (NSA, 2, 2, 1),  # more forced than slots
        (Pooling((1, 1, 1, 1, 1), -1, 4, "max"), 3, 0, 0),  # none forced
    ],
)
def test_indices_equal_brute_force(x64, implementation, shape, pooling, selected, initial, recent):
    q, k, v = heads(shape, jnp.float64)
    batch, rows, entries = shape[:3]
    start, stop, first, last = rows_of("random", shape, pooling)
    scores = jitted(
        block_scores, pooling=pooling, selected=selected,
        initial=initial, recent=recent, implementation=implementation,
    )  # fmt: skip
    result = scores(q, k, v, start, stop, first, last)
    indices = np.asarray(result.indices)
    assert indices.shape == (batch, rows, 2, selected)
    assert indices.dtype == np.int32
    q, k, start, stop, first, last = (np.asarray(a) for a in (q, k, start, stop, first, last))
    for b in range(batch):
        for t in range(rows):
            seen = (np.arange(entries) >= start[b, t]) & (np.arange(entries) < stop[b, t])
            for head in range(2):
                logits = q[b, t, 2 * head : 2 * head + 2] @ k[b, :, head].T * 8**-0.5
                weights = np.where(seen, np.exp(logits), 0.0)
                total = weights.sum(axis=1, keepdims=True)
                p = (weights / np.where(total > 0, total, 1)).sum(axis=0)
                want = brute_force(p, first[b, t], last[b, t], pooling, selected, initial, recent)
                want = want + [-1] * (selected - len(want))
                assert indices[b, t, head].tolist() == want, (b, t, head)


@either
@pytest.mark.parametrize("shape", [MANY, FEW])
def test_ties_go_to_the_nearest_block(implementation, shape):
    """Equal keys make all whole blocks equal: after the forced ones the nearest are chosen."""
    q, k, v = heads(shape, jnp.float32)
    k = jnp.broadcast_to(k[:, :1], k.shape)
    batch, rows, entries = shape[:3]
    pooling = Pooling((1, 1, 1), 0, 3)
    everything = jnp.full((batch, rows), entries, jnp.int32)
    zero = jnp.zeros((batch, rows), jnp.int32)
    scores = jitted(
        block_scores, pooling=pooling, selected=5, initial=1, recent=1,
        implementation=implementation,
    )  # fmt: skip
    result = scores(q, k, v, zero, everything, zero, zero + 11)
    want = np.broadcast_to(np.array([0, 8, 9, 10, 11]), result.indices.shape)
    np.testing.assert_array_equal(result.indices, want)
    unseen = scores(q, k, v, zero, zero, zero, zero + 11)
    np.testing.assert_array_equal(unseen.indices, want)
    np.testing.assert_array_equal(unseen.out, 0)


@either
@pytest.mark.parametrize("rows", [40, 3])
def test_few_or_no_eligible_blocks(implementation, rows):
    q, k, v = heads((1, rows, 9, 2, 1, 8, 4), jnp.float32)
    zero = jnp.zeros((1, rows), jnp.int32)
    last = (zero + 1).at[:, 0].set(-1).at[:, 1].set(0)

    scores = jitted(
        block_scores, pooling=Pooling((1,), 0, 1), selected=4, implementation=implementation
    )

    def indices(k, v):
        return scores(q, k, v, zero, zero + 9, zero, last).indices[0, :, 0]

    want = np.array([[-1] * 4, [0, -1, -1, -1]] + [[0, 1, -1, -1]] * (rows - 2))
    np.testing.assert_array_equal(indices(k, v), want)
    np.testing.assert_array_equal(indices(k[:, :0], v[:, :0]), want)


@pytest.mark.parametrize("shape", [MANY, FEW])
def test_poison_outside_all_ranges_does_not_leak(shape):
    q, k, v = heads(shape, jnp.float32)
    t = np.broadcast_to(np.arange(shape[1]), shape[:2])
    start = jnp.asarray(np.where(t % 2, 20, 3), jnp.int32)
    stop = jnp.asarray(np.where(t % 2, 33, 12), jnp.int32).at[:, 4].set(0)
    hole = np.ones(37, bool)
    hole[3:12] = hole[20:33] = False
    hole = jnp.asarray(hole)[None, :, None, None]
    rows = (start, stop, jnp.zeros_like(start), jnp.full_like(start, 9))
    run = functional("xla", NSA, 4)
    clean = run(q, k, v, rows)
    poisoned = run(
        q.at[:, 4].set(jnp.nan), jnp.where(hole, jnp.nan, k), jnp.where(hole, jnp.inf, v), rows
    )
    for name, got, want in pairs(poisoned, clean):
        assert np.all(np.isfinite(got)) or name == "lse"
        np.testing.assert_array_equal(got, want, err_msg=name)
    np.testing.assert_array_equal(clean[1][0][:, 4], 0)


@pytest.mark.parametrize("shape", [MANY, FEW])
def test_large_logits(shape):
    """Logits up to +-200 stay finite, and the choice stays as good."""
    q, k, v = heads(shape, jnp.float32)
    q = q / jnp.linalg.norm(q, axis=-1, keepdims=True) * 67
    k = k / jnp.linalg.norm(k, axis=-1, keepdims=True) * 10
    rows = rows_of("causal", shape, NSA)
    (out, lse, indices), gradients = functional("xla", NSA, 4)(q, k, v, rows)
    assert np.abs(np.where(np.isneginf(lse), 0, lse)).max() > 120
    assert all(np.all(np.isfinite(g)) for g in gradients)
    want, _ = functional("reference", NSA, 4)(q, k, v, rows)
    np.testing.assert_allclose(out, want.out, rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(lse, want.lse, rtol=1e-4)
    # One entry holds all the probability of many rows and ties the two blocks it overlaps up to
    # rounding, so the choices are compared by their importance.
    importance = block_importance(q, k, want.lse, *rows[:2], pooling=NSA, scale=0.3)
    importance = np.pad(importance, [(0, 0)] * 3 + [(0, 1)])  # what -1 selects
    for got in (indices, want.indices):
        assert np.all(np.diff(np.where(got < 0, 99 + np.arange(4), got), axis=-1) > 0)
    got, want = (
        np.take_along_axis(importance, np.asarray(chosen), -1).sum(-1)
        for chosen in (indices, want.indices)
    )
    np.testing.assert_allclose(got, want, rtol=1e-3)


def test_bitwise_repeatable():
    arguments = (*heads(MANY, jnp.float32), rows_of("random", MANY, NSA))
    run = functional("xla", NSA, 4)
    for name, first, second in pairs(run(*arguments), run(*arguments)):
        np.testing.assert_array_equal(first, second, err_msg=name)


def test_temporary_memory_grows_sub_quadratically():
    """Entries grow with the sequence, as in NSA: a [T, C] array would grow sixteenfold."""

    def temporary(length):
        def array(*shape, dtype=jnp.float32):
            return jax.ShapeDtypeStruct((1, *shape), dtype)

        q, k = array(length, 2, 8), array(length // 4, 1, 8)
        rows = [array(length, dtype=jnp.int32)] * 4

        def loss(q, k, v, rows):
            out, lse, _ = block_scores(q, k, v, *rows, pooling=NSA, selected=4)
            return jnp.sum(out) + jnp.sum(lse)

        compiled = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(q, k, k, rows).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporary(8192) < 4.4 * temporary(2048)
    assert temporary(8192) < 8192 * 2048


def test_geometric_pooling_is_equation_9():
    pooling = Pooling.geometric(32, 16, 64)
    assert pooling == Pooling((1, 2, 2, 2, 1), -1, 4, "sum")
    assert Pooling.geometric(64, 64, 64) == Pooling((1,), 0, 1)


@pytest.mark.parametrize(("block", "stride", "selection"), [(32, 16, 64), (8, 2, 8), (12, 4, 4)])
def test_geometric_weights_count_overlapping_pieces(block, stride, selection):
    """Weight of entry i for block j = stride-sized pieces of the entry inside the block."""
    pooling = Pooling.geometric(block, stride, selection)
    entries = 6 * selection // stride
    p = np.eye(entries, dtype=np.float32)
    importance = np.asarray(pooling.pool(jnp.asarray(p)))
    assert importance.shape == (entries, pooling.blocks(entries))
    for i in range(entries):
        for j in range(pooling.blocks(entries)):
            pieces = i * stride + np.arange(0, block, stride)
            want = np.sum((pieces >= j * selection) & (pieces < (j + 1) * selection))
            assert importance[i, j] == want, (i, j)


@pytest.mark.parametrize("reducer", ["sum", "max"])
@pytest.mark.parametrize(("offset", "stride"), [(-1, 2), (0, 1), (2, 3), (-3, 2)])
def test_pool_equals_its_formula(reducer, offset, stride):
    pooling = Pooling((1.0, 0.5, 3.0), offset, stride, reducer)
    p = np.random.default_rng(0).uniform(size=11)
    got = np.asarray(pooling.pool(jnp.asarray(p, jnp.float32)))
    reduce = {"sum": sum, "max": max}[reducer]
    for j in range(pooling.blocks(11)):
        entries = [stride * j + offset + m for m in range(3)]
        values = [
            w * (p[i] if 0 <= i < 11 else 0) for w, i in zip(pooling.weights, entries, strict=True)
        ]
        np.testing.assert_allclose(got[j], reduce(values), rtol=1e-6)
    assert stride * pooling.blocks(11) + offset >= 11


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Pooling((), 0, 1), "must be one or more finite numbers"),
        (lambda: Pooling((1, -1), 0, 1), "must be one or more finite numbers"),
        (lambda: Pooling((1,), 0, 0), "stride=0 must be at least 1"),
        (lambda: Pooling((1,), 0, 1, "mean"), "reducer='mean' is unknown"),
        (lambda: Pooling.geometric(32, 12, 64), "compression_stride=12 must divide"),
    ],
)
def test_pooling_errors(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"selected": 0}, "selected=0 must be at least 1"),
        ({"recent": -1}, "recent=-1 must not be negative"),
        ({"last_block": jnp.zeros((1, 3), jnp.int32)}, r"last_block \(1, 3\) must be \[B, T\]"),
    ],
)
def test_errors_name_the_values(change, message):
    q, k, v = heads((1, 4, 4, 2, 2, 8, 8), jnp.float32)
    row = jnp.zeros((1, 4), jnp.int32)
    arguments = {"start": row, "stop": row, "first_block": row, "last_block": row, "selected": 2}
    with pytest.raises(ValueError, match=message):
        block_scores(q, k, v, pooling=NSA, **(arguments | change))
