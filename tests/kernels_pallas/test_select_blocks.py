"""The choice of blocks in log space: brute force, XLA against the reference, every option."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from block_cases import logsumexp
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels_pallas.block_scores import Pooling, entry_lse, select_blocks
from kernels_pallas.block_scores.xla_select import select_blocks_xla
from kernels_pallas.ranged import ranged_attention
from kernels_pallas.ranged.tiling import Tiles

FIVE = Pooling((1.0,) * 5, -1, 4, "max")
ONE = Pooling((1.0,), 0, 1, "max")
# batch, rows, entries, query heads, kv heads, width: tiles, and few rows (decode).
MANY, FEW = (2, 43, 37, 4, 2, 8), (2, 5, 37, 4, 2, 8)
IMPLEMENTATIONS = ("reference", "xla")


def heads(shape, dtype=jnp.float64, seed=0):
    batch, rows, entries, query_heads, kv_heads, width = shape
    draw = np.random.default_rng(seed)
    q = draw.normal(size=(batch, rows, query_heads, width))
    return jnp.asarray(q, dtype), jnp.asarray(
        draw.normal(size=(batch, entries, kv_heads, width)), dtype
    )


def rows_of(shape, pooling, seed=5):
    """Random (start, stop, first_block, last_block): empty ranges, blocks past the last entry."""
    batch, rows, entries = shape[:3]
    draw = np.random.default_rng(seed)
    blocks = pooling.blocks(entries)
    start, stop = np.clip(draw.integers(-4, entries + 4, (2, batch, rows)), 0, entries)
    first = draw.integers(-2, blocks + 1, (batch, rows))
    last = first + draw.integers(-2, blocks + 9, (batch, rows))
    return tuple(jnp.asarray(a, jnp.int32) for a in (start, stop, first, last))


def options_of(shape, share, lse=True, budget=True, seed=7):
    """A normaliser with some -inf in it, and a budget a list."""
    batch, rows, _, query_heads, kv_heads, _ = shape
    draw = np.random.default_rng(seed)
    given_lse = np.where(
        draw.uniform(size=(batch, rows, query_heads)) < 0.3,
        -np.inf,
        draw.normal(size=(batch, rows, query_heads)) * 3,
    )
    lists = (batch, rows, kv_heads if share else query_heads)
    return {
        "lse": jnp.asarray(given_lse) if lse else None,
        "budget": jnp.asarray(draw.integers(0, 6, lists), jnp.int32) if budget else None,
    }


@functools.cache
def compiled(implementation, tiles=None, **rules):
    """``select_blocks`` (or the XLA path with small tiles), jitted."""
    if tiles is not None:
        return jax.jit(functools.partial(select_blocks_xla, tiles=tiles, **rules))
    return jax.jit(functools.partial(select_blocks, implementation=implementation, **rules))


def brute_force(q, k, row, pooling, selected, initial, recent, lse, budget, floor, scale):
    """Chosen blocks of one row and list, from queries [G, H] and keys [C, H]; plain Python."""
    start, stop, first, last = row
    first = max(first, 0)
    visible = range(start, stop)
    s = {}
    for g, query in enumerate(q):
        logits = {i: scale * float(query @ k[i]) for i in visible}
        shift = lse[g]
        if np.isneginf(shift):
            shift = logsumexp(list(logits.values()))
        for i in visible:
            s.setdefault(i, []).append(logits[i] - shift)

    def score(j):
        entries = [pooling.stride * j + pooling.offset + m for m in range(len(pooling.weights))]
        seen = [
            np.log(w) + logsumexp(s[i])
            for w, i in zip(pooling.weights, entries, strict=True)
            if i in s and w > 0
        ]
        return max(seen, default=-np.inf)

    ranked = []
    for j in range(first, last + 1):
        forced = 2 if j > last - recent else 1 if j < first + initial else 0
        if forced or floor is None or score(j) >= floor:
            ranked.append((forced, 0.0 if forced else score(j), j))
    ranked.sort(reverse=True)
    return sorted(j for *_, j in ranked[: min(selected, budget)])


def check(indices, q, k, rows, share, lse, budget, **rules):
    """``indices`` against the brute force, list by list."""
    q, k = np.asarray(q), np.asarray(k)
    batch, length, query_heads, _ = q.shape
    kv_heads, selected = k.shape[2], rules["selected"]
    lists = kv_heads if share else query_heads
    group = query_heads // lists
    assert indices.shape == (batch, length, lists, selected)
    assert indices.dtype == jnp.int32
    for b in range(batch):
        for t in range(length):
            row = [int(a[b, t]) for a in rows]
            for j in range(lists):
                part = slice(j * group, (j + 1) * group)
                want = brute_force(
                    q[b, t, part],
                    k[b, :, j * group // (query_heads // kv_heads)],
                    row,
                    lse=np.full(group, -np.inf) if lse is None else np.asarray(lse[b, t, part]),
                    budget=selected if budget is None else int(budget[b, t, j]),
                    **rules,
                )
                want = want + [-1] * (selected - len(want))
                assert indices[b, t, j].tolist() == want, (b, t, j)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("shape", [MANY, FEW])
@pytest.mark.parametrize(
    ("pooling", "selected", "initial", "recent", "floor", "share"),
    [
        (FIVE, 5, 1, 2, None, True),
        (FIVE, 2, 2, 1, None, True),  # more forced than slots
        (Pooling((1.0, 0.0, 0.5), 1, 2, "max"), 4, 0, 0, -1.0, True),
        (ONE, 4, 0, 1, None, False),
        (ONE, 6, 1, 1, -2.5, False),
    ],
)
def test_indices_equal_brute_force(
    x64, implementation, shape, pooling, selected, initial, recent, floor, share
):
    q, k = heads(shape)
    rows = rows_of(shape, pooling)
    options = options_of(shape, share)
    rules = {
        "pooling": pooling,
        "selected": selected,
        "initial": initial,
        "recent": recent,
        "floor": floor,
        "scale": 0.4,
    }
    select = compiled(implementation, share=share, **rules)
    check(select(q, k, *rows, **options), q, k, rows, share, **options, **rules)


RULES = {"pooling": FIVE, "selected": 4, "initial": 1, "recent": 1, "floor": None, "scale": 0.4}
BUCKETS = ((1, 24, 21, 4, 1, 4), (2, 24, 21, 4, 2, 4), (2, 24, 21, 2, 2, 4), (1, 3, 21, 4, 1, 4))


@settings(derandomize=True, deadline=None, max_examples=12)
@given(
    shape=st.sampled_from(BUCKETS),
    seed=st.integers(0, 2**31),
    normalised=st.booleans(),
)
def test_small_tiles_equal_brute_force(shape, seed, normalised):
    """Entries in several steps, the last of which overlaps the one before."""
    with jax.enable_x64(True):
        q, k = heads(shape, seed=seed)
        rows = rows_of(shape, FIVE, seed=seed)
        options = options_of(shape, True, lse=normalised, seed=seed)
        tiled = compiled("xla", tiles=Tiles(rows=8, keys=8), share=True, **RULES)
        check(tiled(q, k, *rows, **options), q, k, rows, True, **options, **RULES)


def test_xla_equals_reference_float32():
    """The seed has no near-ties."""
    for shape in (MANY, FEW):
        q, k = heads(shape, jnp.float32)
        rows = rows_of(shape, FIVE)
        got, want = (compiled(i, share=True, **RULES)(q, k, *rows) for i in ("xla", "reference"))
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("shape", [MANY, FEW])
def test_ties_go_to_the_nearest_block(implementation, shape):
    """Equal keys make all blocks equal; entries that two blocks share make neighbours equal."""
    q, k = heads(shape, jnp.float32)
    k = jnp.broadcast_to(k[:, :1], k.shape)
    zero = jnp.zeros(shape[:2], jnp.int32)
    select = compiled(implementation, share=True, **(RULES | {"selected": 5}))
    got = select(q, k, zero, zero + 37, zero, zero + 8)
    np.testing.assert_array_equal(got, np.broadcast_to([0, 5, 6, 7, 8], got.shape))
    # Nothing in sight: the nearest again.
    unseen = select(q, k, zero, zero, zero, zero + 8)
    np.testing.assert_array_equal(unseen, got)


@pytest.mark.parametrize("shape", [MANY, FEW])
def test_far_scores_keep_their_order(shape):
    """Logits of several thousands, where probabilities would all be 0 but one."""
    q, k = heads(shape, jnp.float32)
    q = jnp.broadcast_to(jnp.ones_like(q[..., :1]) * 1000, q.shape)
    k = jnp.broadcast_to(jnp.arange(37, dtype=jnp.float32)[None, :, None, None], k.shape)
    zero = jnp.zeros(shape[:2], jnp.int32)
    rules = RULES | {"pooling": ONE, "initial": 0, "selected": 3}
    got = compiled("xla", share=True, **rules)(q, -k, zero, zero + 37, zero, zero + 37)
    np.testing.assert_array_equal(got, np.broadcast_to([0, 1, 37], got.shape))


@pytest.mark.parametrize("shape", [MANY, FEW])
def test_poison_outside_all_ranges_does_not_leak(shape):
    q, k = heads(shape, jnp.float32)
    zero = jnp.zeros(shape[:2], jnp.int32)
    stop = (zero + 30).at[:, 4].set(0)
    rows = (zero + 3, stop, zero, zero + 9)
    hole = jnp.asarray((np.arange(37) < 3) | (np.arange(37) >= 30))[None, :, None, None]
    select = compiled("xla", share=True, **RULES)
    poisoned = select(q.at[:, 4].set(jnp.nan), jnp.where(hole, jnp.nan, k), *rows)
    np.testing.assert_array_equal(poisoned, select(q, k, *rows))


@pytest.mark.parametrize("shape", [MANY, FEW])
def test_gradient_is_none(shape):
    """Differentiating through the choice is legal and gives zero."""
    q, k = heads(shape, jnp.float32)
    rows = rows_of(shape, FIVE)

    def value(q, k, lse):
        indices = select_blocks(q, k, *rows, lse=lse, **RULES)
        return jnp.sum(indices.astype(jnp.float32)) + jnp.sum(q) * 2

    gradients = jax.jit(jax.grad(value, argnums=(0, 1, 2)))(q, k, jnp.zeros(q.shape[:3]))
    for gradient, want in zip(gradients, (2, 0, 0), strict=True):
        np.testing.assert_array_equal(gradient, want)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("shape", [MANY, FEW])
def test_entry_lse_is_that_of_attention(x64, implementation, shape):
    q, k = heads(shape)
    start, stop = rows_of(shape, FIVE)[:2]
    got = entry_lse(q, k, start, stop, scale=0.7, implementation=implementation)
    want = ranged_attention(q, k, k, start, stop, scale=0.7, implementation="reference").lse
    np.testing.assert_allclose(got, want, atol=1e-12)
    assert np.isneginf(np.asarray(got)).any()
    none = entry_lse(q, k[:, :0], start, stop, implementation=implementation)
    assert none.shape == q.shape[:3]
    assert np.isneginf(np.asarray(none)).all()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_without_entries_the_nearest_are_selected(implementation):
    q, k = heads((1, 20, 9, 2, 1, 8), jnp.float32)
    zero = jnp.zeros((1, 20), jnp.int32)
    select = compiled(implementation, share=True, **RULES)
    got = select(q, k[:, :0], zero, zero + 9, zero, zero + 7)
    np.testing.assert_array_equal(got[0, :, 0], np.broadcast_to([0, 5, 6, 7], (20, 4)))


def test_temporary_memory_grows_sub_quadratically():
    def temporary(length):
        def array(*shape, dtype=jnp.float32):
            return jax.ShapeDtypeStruct((1, *shape), dtype)

        arguments = (array(length, 2, 8), array(length // 4, 1, 8))
        rows = [array(length, dtype=jnp.int32)] * 4
        select = jax.jit(lambda q, k, rows: select_blocks(q, k, *rows, **RULES))
        return select.lower(*arguments, rows).compile().memory_analysis().temp_size_in_bytes

    assert temporary(8192) < 4.4 * temporary(2048)
    assert temporary(8192) < 8192 * 2048


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"selected": 0}, "selected=0 must be at least 1"),
        ({"initial": -1}, "initial=-1 and recent=1 must not be negative"),
        ({"pooling": Pooling((1,), 0, 1)}, "reducer='sum'; scores in log space pool with 'max'"),
        ({"lse": jnp.zeros((1, 4, 3))}, r"lse \(1, 4, 3\) must be \[B, T, N\] = \(1, 4, 2\)"),
        ({"budget": jnp.zeros((1, 4, 1), jnp.int32)}, r"budget \(1, 4, 1\) must be \[B, T, J\]"),
        ({"last_block": jnp.zeros((1, 3), jnp.int32)}, r"last_block \(1, 3\) must be \[B, T\]"),
    ],
)
def test_errors_name_the_values(change, message):
    q, k = heads((1, 4, 4, 2, 2, 8), jnp.float32)
    row = jnp.zeros((1, 4), jnp.int32)
    arguments = {"start": row, "stop": row, "first_block": row, "last_block": row}
    with pytest.raises(ValueError, match=message):
        select_blocks(q, k, **(arguments | RULES | change))


def test_pool_log_is_the_maximum_of_what_is_there():
    pooling = Pooling((1.0, 0.5, 0.0), -1, 2, "max")
    scores = np.random.default_rng(0).normal(size=11) * 50
    got = np.asarray(pooling.pool_log(jnp.asarray(scores, jnp.float32)))
    for j in range(pooling.blocks(11)):
        parts = [scores[i] + np.log(w) for i, w in ((2 * j - 1, 1.0), (2 * j, 0.5)) if 0 <= i < 11]
        np.testing.assert_allclose(got[j], max(parts, default=-np.inf), rtol=1e-6)
    silent = Pooling((0.0,), 0, 1, "max").pool_log(jnp.zeros((3,)))
    assert np.isneginf(np.asarray(silent)).all()
