"""Selection by binary codes: scores, thresholds and lists against NumPy and the reference."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiled import jitted
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels_pallas.hamming import (
    code_signs,
    hamming_scores,
    hamming_select,
    hamming_threshold,
    pack_codes,
)

IMPLEMENTATIONS = ("reference", "xla")
every_backend = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)


def example(seed, *, B=2, T=3, J=2, G=2, S=45, bits=16, noise=0.5):
    """Bits [B, T, J, G, b] and [B, S, J, b]; little ``noise`` makes many equal scores."""
    rng = np.random.default_rng(seed)
    pattern = rng.random((1, 1, 1, bits)) < 0.5
    q = (rng.random((B, T, J, G, bits)) < noise) ^ pattern[:, :, None]
    k = (rng.random((B, S, J, bits)) < noise) ^ pattern
    return q, k


def codes(q, k):
    pack = jitted(pack_codes)
    return pack(jnp.asarray(q)), jnp.transpose(pack(jnp.asarray(k)), (0, 2, 3, 1))


def dot_of_signs(q, k, best_of=1):
    q, k = (2 * x.astype(np.int64) - 1 for x in (q, k))
    parts = np.split(q, best_of, axis=3)
    return np.max([np.einsum("btjgi,bsji->btjs", part, k) for part in parts], axis=0)


def best(scores, start, stop, budget):
    """Positions of the best candidates by a stable sort, the most recent of equals first."""
    order = sorted(range(start, stop), key=lambda s: (-scores[s], -s))
    return order[: max(budget, 0)]


@pytest.mark.parametrize("width", [8, 32, 40, 96])
def test_packing_puts_bit_i_into_bit_i_mod_32_of_word_i_div_32(width):
    bits = np.random.default_rng(0).random((3, 5, width)) < 0.5
    packed = np.asarray(pack_codes(jnp.asarray(bits)))
    want = np.zeros((3, 5, -(-width // 32)), np.uint64)
    for i in range(width):
        want[..., i // 32] |= bits[..., i].astype(np.uint64) << np.uint64(i % 32)
    assert packed.dtype == np.uint32
    np.testing.assert_array_equal(packed, want)
    np.testing.assert_array_equal(code_signs(jnp.asarray(packed), width), 2.0 * bits - 1)


# T=3 scores by popcount, T=9 by a product of signs.
@every_backend
@pytest.mark.parametrize(("T", "G", "bits"), [(3, 2, 16), (9, 1, 40), (9, 3, 8), (1, 4, 64)])
def test_score_is_bits_minus_twice_hamming_is_the_dot_product_of_signs(implementation, T, G, bits):
    q, k = example(1, T=T, G=G, bits=bits)
    differing = q[:, :, :, :, None] ^ np.moveaxis(k, 1, 2)[:, None, :, None]
    hamming = differing.sum(axis=(3, 5))
    scores = jitted(hamming_scores, bits=bits, implementation=implementation)
    got = scores(*codes(q, k))
    assert got.dtype == jnp.int32
    np.testing.assert_array_equal(got, G * bits - 2 * hamming)
    np.testing.assert_array_equal(got, dot_of_signs(q, k))


@every_backend
@pytest.mark.parametrize("T", [3, 9])
def test_best_of_parts(implementation, T):
    q, k = example(2, T=T, G=6)
    scores = jitted(hamming_scores, bits=16, best_of=3, implementation=implementation)
    got = scores(*codes(q, k))
    np.testing.assert_array_equal(got, dot_of_signs(q, k, 3))


def check(q, k, start, stop, budget, first, last, slots, bits, implementation, best_of=1):
    """Threshold and lists of one call against the stable sort."""
    q_codes, k_codes = codes(q, k)
    scores = dot_of_signs(q, k, best_of)
    B, T, J, S = scores.shape
    arrays = [jnp.asarray(x, jnp.int32) for x in (start, stop, budget)]
    edges = {"first": jnp.asarray(first, jnp.int32), "last": jnp.asarray(last, jnp.int32)}
    options = {"bits": bits, "best_of": best_of, "implementation": implementation}
    threshold = jitted(hamming_threshold, **options)(q_codes, k_codes, *arrays)
    select = jitted(hamming_select, slots=slots, **options)
    indices = select(q_codes, k_codes, *arrays, **edges)
    assert indices.shape == (B, T, J, slots)
    assert indices.dtype == jnp.int32
    passes = np.asarray(threshold.selects(jnp.asarray(scores), jnp.arange(S)))
    for b, t, j in np.ndindex(B, T, J):
        low, high = int(start[b, t]), int(stop[b, t])
        chosen = best(scores[b, t, j], low, high, int(budget[b, t, j]))
        worst = (int(threshold.level[b, t, j]), int(threshold.cutoff[b, t, j]))
        empty = (q.shape[3] // best_of * bits, S)
        assert worst == ((scores[b, t, j, chosen[-1]], chosen[-1]) if chosen else empty)
        assert sorted(chosen) == [s for s in range(low, high) if passes[b, t, j, s]]
        forced = [*range(first[b, t], low), *range(max(low, high), last[b, t])]
        want = sorted(set(chosen) | set(forced))
        np.testing.assert_array_equal(indices[b, t, j], want + [-1] * (slots - len(want)))


# Fixed shapes, so that a few compilations serve all draws.
SHAPES = {
    "few": {"T": 3, "J": 2, "G": 2, "S": 45, "bits": 16},
    "many": {"T": 9, "J": 1, "G": 3, "S": 64, "bits": 40},
}
BEST_OF = {"few": 2, "many": 1}


@pytest.mark.parametrize("shape", SHAPES)
@settings(derandomize=True, deadline=None, max_examples=12)
@given(seed=st.integers(0, 2**16), noise=st.sampled_from([0.0, 0.05, 0.5]))
def test_histogram_selection_is_the_stable_sort(shape, seed, noise):
    best_of, shape = BEST_OF[shape], SHAPES[shape]
    q, k = example(seed, noise=noise, **shape)
    rng = np.random.default_rng(seed)
    B, T, J, S = 2, shape["T"], shape["J"], shape["S"]
    edges = np.sort(rng.integers(0, S + 1, (4, B, T)), axis=0)
    budget = rng.integers(-1, S + 2, (B, T, J))
    ranges = edges[1], edges[2], budget, edges[0], edges[3]
    check(q, k, *ranges, S, shape["bits"], "xla", best_of)


@every_backend
@pytest.mark.parametrize("T", [2, 9])
def test_edges(implementation, T):
    """Nothing to choose from, budgets of 0 and of everything, all scores equal."""
    q, k = example(3, T=T, noise=0.0)
    q, k = np.broadcast_to(q[:1, :1], q.shape), np.broadcast_to(k[:1, :1], k.shape)
    start = np.resize([5, 45], (2, T))
    stop = np.resize([30, 45], (2, T))
    first, last = np.minimum(start, 3), np.full((2, T), 45)
    for budget in (0, 7, 25, 99):
        check(
            *(q, k, start, stop, np.full((2, T, 2), budget), first, last),
            *(60, 16, implementation),
        )


def test_codes_wider_than_a_byte_of_distance():
    """G * bits = 512: ranks take two bytes."""
    q, k = example(4, G=4, bits=128, T=2, noise=0.1)
    start, stop = np.full((2, 2), 2), np.full((2, 2), 40)
    check(q, k, start, stop, np.full((2, 2, 2), 11), start, stop, 11, 128, "xla")


@pytest.mark.parametrize("budget", [1, 700, 1400])
def test_ties_across_runs_of_words(budget):
    """Codes of 8 bits over 2500 keys: hundreds tie, their cut lies beyond the first 1024 keys."""
    q, k = example(8, B=1, T=1, J=2, G=1, S=2500, bits=8)
    start, stop = np.full((1, 1), 3), np.full((1, 1), 2400)
    edges = np.zeros((1, 1), int), np.full((1, 1), 2500)
    check(q, k, start, stop, np.full((1, 1, 2), budget), *edges, budget + 103, 8, "xla")


def test_many_rows_in_chunks_equal_few(monkeypatch):
    from kernels_pallas.hamming import xla

    q, k = example(5, T=21)
    q_codes, k_codes = codes(q, k)
    rows = jnp.broadcast_to(jnp.arange(21, dtype=jnp.int32)[None], (2, 21))
    arguments = (q_codes, k_codes, rows // 3, rows + 20, jnp.full((2, 21, 2), 6, jnp.int32))

    @jax.jit
    def both(*arguments):
        lists = hamming_select(*arguments, bits=16, slots=6)
        return hamming_threshold(*arguments, bits=16), lists

    whole = both(*arguments)
    monkeypatch.setattr(xla, "CHUNK_ELEMENTS", 2 * 2 * 45 * 4)
    both.clear_cache()
    for a, b in zip(jax.tree.leaves(both(*arguments)), jax.tree.leaves(whole), strict=True):
        np.testing.assert_array_equal(a, b)


def test_keys_outside_the_ranges_do_not_matter():
    q, k = example(6)
    q_codes, k_codes = codes(q, k)
    start, stop = jnp.full((2, 3), 4), jnp.full((2, 3), 33)
    budget = jnp.full((2, 3, 2), 5)
    other = k_codes.at[..., :4].set(jnp.uint32(7)).at[..., 33:].set(jnp.uint32(9))
    select = jitted(hamming_select, bits=16, slots=5)
    want = select(q_codes, k_codes, start, stop, budget)
    got = select(q_codes, other, start, stop, budget)
    np.testing.assert_array_equal(got, want)


def test_threshold_memory_is_linear():
    def temporary_bytes(tokens):
        q = jax.ShapeDtypeStruct((1, tokens, 2, 2, 1), jnp.uint32)
        k = jax.ShapeDtypeStruct((1, 2, 1, tokens), jnp.uint32)
        row = jax.ShapeDtypeStruct((1, tokens), jnp.int32)
        budget = jax.ShapeDtypeStruct((1, tokens, 2), jnp.int32)

        def threshold(q, k, start, stop, budget):
            return hamming_threshold(q, k, start, stop, budget, bits=32)

        compiled = jax.jit(threshold).lower(q, k, row, row, budget).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporary_bytes(8192) < 4.6 * temporary_bytes(2048)


def test_errors_name_the_values():
    q_codes, k_codes = codes(*example(7))
    row, budget = jnp.zeros((2, 3), jnp.int32), jnp.zeros((2, 3, 2), jnp.int32)

    def select(q=q_codes, k=k_codes, start=row, budget=budget, **options):
        return hamming_select(q, k, start, row + 9, budget, **({"bits": 16, "slots": 4} | options))

    with pytest.raises(ValueError, match=r"q_codes \(2, 3, 2, 2\)"):
        select(q=q_codes[..., 0])
    with pytest.raises(ValueError, match="must be uint32"):
        select(k=k_codes.astype(jnp.int32))
    with pytest.raises(ValueError, match="agree in B, J and W"):
        select(k=k_codes[:, :1])
    with pytest.raises(ValueError, match="bits=40 take 2 words, the codes have 1"):
        select(bits=40)
    with pytest.raises(ValueError, match="best_of=3 must divide the G=2"):
        select(best_of=3)
    with pytest.raises(ValueError, match="must not be empty"):
        select(k=k_codes[..., :0])
    with pytest.raises(ValueError, match=r"start \(2, 2\) must be"):
        select(start=row[:, :2])
    with pytest.raises(ValueError, match="start has dtype float32"):
        select(start=row.astype(jnp.float32))
    with pytest.raises(ValueError, match=r"budget \(2, 3\) must be"):
        select(budget=row)
    with pytest.raises(ValueError, match="budget has dtype float32"):
        select(budget=budget.astype(jnp.float32))
    with pytest.raises(ValueError, match="slots=0"):
        select(slots=0)
    with pytest.raises(ValueError, match="needs 7 slots, slots=4"):
        select(budget=budget + 7)
    with pytest.raises(ValueError, match="implementation='cuda' is unknown"):
        select(implementation="cuda")
