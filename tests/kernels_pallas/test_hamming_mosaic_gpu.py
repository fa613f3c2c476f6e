"""The Mosaic GPU kernels of selection by codes: interpreter, lowering, and on the device itself."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kernel_proof import strictly_interpreted

from kernels_pallas.ahead_of_time import lower_for_gpu
from kernels_pallas.hamming import (
    hamming_scores,
    hamming_select,
    hamming_threshold,
    mosaic_gpu,
    pack_codes,
)
from kernels_pallas.hamming.mosaic_gpu_ranks import Tiles

on_device = pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a Hopper GPU")

SMALL = Tiles(unroll=2, steps=2)
"""Programs of 512 keys, so that short rows have several."""


def example(seed, *, B=1, T=1, J=2, G=2, S=600, bits=32, noise=0.5):
    """Codes, ranges and budgets; little ``noise`` makes many equal scores."""
    rng = np.random.default_rng(seed)
    pattern = rng.random((1, 1, 1, bits)) < 0.5
    q = (rng.random((B, T, J, G, bits)) < noise) ^ pattern[:, :, None]
    k = (rng.random((B, S, J, bits)) < noise) ^ pattern
    edges = np.sort(rng.integers(0, S + 1, (4, B, T)), axis=0)
    edges[:, :, ::3] = np.array([0, min(3, S), S - min(3, S), S])[:, None, None]  # Long rows too.
    budget = rng.integers(-1, S + 2, (B, T, J))
    edges, budget = jnp.asarray(edges, jnp.int32), jnp.asarray(budget, jnp.int32)
    k_codes = jnp.transpose(pack_codes(jnp.asarray(k)), (0, 2, 3, 1))
    return pack_codes(jnp.asarray(q)), k_codes, edges, budget


def run(q, k, edges, budget, bits, slots, implementation, best_of=1):
    """All three calls of the api."""
    options = {"bits": bits, "best_of": best_of, "implementation": implementation}
    first, start, stop, last = edges

    def calls(q, k, first, start, stop, last, budget):
        return (
            hamming_scores(q, k, **options),
            tuple(hamming_threshold(q, k, start, stop, budget, **options)),
            hamming_select(
                q, k, start, stop, budget, slots=slots, first=first, last=last, **options
            ),
        )

    return jax.block_until_ready(jax.jit(calls)(q, k, first, start, stop, last, budget))


def same(results, expected):
    for a, b in zip(jax.tree.leaves(results), jax.tree.leaves(expected), strict=True):
        assert a.shape == b.shape
        assert a.dtype == b.dtype == jnp.int32
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def prove(seed, monkeypatch, *, slots=None, tiles=SMALL, best_of=1, **sizes):
    """The kernels, interpreted, equal the reference."""
    bits = sizes.get("bits", 32)
    q, k, edges, budget = example(seed, **sizes)
    slots = k.shape[3] + 3 if slots is None else slots
    expected = run(q, k, edges, budget, bits, slots, "reference", best_of)
    plan = mosaic_gpu.plan_for
    with monkeypatch.context() as patch:
        patch.setattr(mosaic_gpu, "plan_for", lambda *given: plan(*given[:-1], tiles))
        with strictly_interpreted("gpu"):
            results = run(q, k, edges, budget, bits, slots, "mosaic_gpu", best_of)
    same(results, expected)


def test_odd_sizes_equal_the_reference(monkeypatch):
    """Two sequences, two parts of 3 codes of 40 bits, 1100 keys in three programs, many ties."""
    prove(0, monkeypatch, B=2, T=2, J=1, G=6, bits=40, S=1100, noise=0.05, best_of=2)


@pytest.mark.full
def test_groups_of_sixteen_and_lists_that_overflow(monkeypatch):
    prove(1, monkeypatch, G=16, S=530, slots=40)


def test_all_scores_equal(monkeypatch):
    """The level holds every key: the cutoff alone selects."""
    prove(2, monkeypatch, T=2, J=1, G=1, bits=8, noise=0.0)


def test_rows_in_chunks_equal_the_reference(monkeypatch):
    """Distances of one query at a time."""
    tiles = Tiles(unroll=1, steps=2, rank_elements=300)
    prove(3, monkeypatch, T=3, J=1, G=1, S=140, tiles=tiles)


def test_keys_without_a_place_do_not_matter():
    q, k, edges, budget = example(4, J=1, S=300)
    edges = jnp.broadcast_to(jnp.asarray([3, 9, 200, 210])[:, None, None], edges.shape)
    other = k.at[..., :9].set(jnp.uint32(7)).at[..., 200:].set(jnp.uint32(2**32 - 1))
    with strictly_interpreted("gpu"):
        got = run(q, other, edges, budget, 32, 300, "mosaic_gpu")
    same(got[1:], run(q, k, edges, budget, 32, 300, "reference")[1:])


def lower(B, T, J, G, bits, S, slots):
    words = -(-bits // 32)
    q = jax.ShapeDtypeStruct((B, T, J, G, words), jnp.uint32)
    k = jax.ShapeDtypeStruct((B, J, words, S), jnp.uint32)
    row = jax.ShapeDtypeStruct((B, T), jnp.int32)
    budget = jax.ShapeDtypeStruct((B, T, J), jnp.int32)
    options = {"bits": bits, "implementation": "mosaic_gpu"}

    def select(q, k, start, stop, budget):
        return hamming_select(q, k, start, stop, budget, slots=slots, **options)

    def threshold(q, k, start, stop, budget):
        return hamming_threshold(q, k, start, stop, budget, **options)

    for call in (select, threshold):
        assert "mosaic_gpu" in lower_for_gpu(call, q, k, row, row, budget)
    if T == 1:
        assert "mosaic_gpu" in lower_for_gpu(lambda q, k: hamming_scores(q, k, **options), q, k)


@pytest.mark.parametrize("bits", [32, 128])
def test_decode_shapes_lower_for_hopper(bits):
    """B=8, 128k keys, 4 lists of 16 query heads, 1/32 of the keys and forced ones."""
    lower(8, 1, 4, 16, bits, 131072, 4176)


@pytest.mark.full
@pytest.mark.parametrize("G", [1, 2, 3, 4, 8, 16, 31])
@pytest.mark.parametrize("bits", [1, 8, 31, 64, 100, 130])
def test_every_size_lowers(G, bits):
    lower(2, 1, 4, G, bits, 5000, 300)
    lower(1, 4096, 2, G, bits, 4096, 300)


def test_memory_between_kernels_is_bounded():
    """Sixteen times the rows of a full pass hold no more distances than one pass does."""

    def largest(queries):
        q = jax.ShapeDtypeStruct((1, queries, 4, 1, 1), jnp.uint32)
        k = jax.ShapeDtypeStruct((1, 4, 1, 65536), jnp.uint32)
        row = jax.ShapeDtypeStruct((1, queries), jnp.int32)
        budget = jax.ShapeDtypeStruct((1, queries, 4), jnp.int32)

        def threshold(q, k, start, stop, budget):
            return hamming_threshold(
                q, k, start, stop, budget, bits=32, implementation="mosaic_gpu"
            )

        jaxpr = jax.make_jaxpr(threshold)(q, k, row, row, budget)
        return max(largest_array(jaxpr.jaxpr), default=0)

    assert largest(1024) == largest(64) == Tiles().rank_elements


def largest_array(jaxpr):
    """Elements of every 16-bit array a program makes, those inside loops included."""
    for equation in jaxpr.eqns:
        for variable in equation.outvars:
            if getattr(variable.aval, "dtype", None) == jnp.uint16:
                yield variable.aval.size
        for parameter in jax.tree.leaves(equation.params, is_leaf=lambda x: hasattr(x, "eqns")):
            inner = getattr(parameter, "jaxpr", parameter)
            if equation.primitive.name != "core_map" and hasattr(inner, "eqns"):
                yield from largest_array(inner)


def test_what_it_cannot_serve_it_refuses():
    for G, bits in ((64, 8), (32, 128)):
        q, k, edges, budget = example(5, G=G, bits=bits, S=20)
        with pytest.raises(NotImplementedError, match=f"sum of {G} codes of {bits} bits"):
            hamming_threshold(
                *(q, k, edges[1], edges[2], budget), bits=bits, implementation="mosaic_gpu"
            )
    with pytest.raises(ValueError, match="lanes must be a multiple of 128"):
        Tiles(lanes=64)
    with pytest.raises(ValueError, match="at most 255"):
        Tiles(unroll=16, steps=16)


@pytest.mark.full
def test_a_hundred_random_selections(monkeypatch):
    for seed in range(100):
        rng = np.random.default_rng(seed)
        sizes = {
            "B": int(rng.integers(1, 3)),
            "T": int(rng.integers(1, 4)),
            "J": int(rng.integers(1, 3)),
            "G": int(rng.choice([1, 2, 3, 4, 8, 16, 24])),
            "bits": int(rng.choice([1, 8, 16, 31, 32, 40, 64, 128])),
            "S": int(rng.integers(1, 900)),
            "noise": float(rng.choice([0.0, 0.05, 0.5])),
        }
        tiles = Tiles(unroll=int(rng.integers(1, 3)), steps=int(rng.integers(1, 4)))
        prove(seed, monkeypatch, slots=int(rng.integers(1, sizes["S"] + 9)), tiles=tiles, **sizes)


@pytest.mark.device
@on_device
@pytest.mark.parametrize(
    "sizes",
    [
        {"B": 2, "T": 1, "J": 4, "G": 16, "S": 20000, "bits": 32},
        {"B": 2, "T": 2, "J": 4, "G": 4, "S": 16384, "bits": 128, "noise": 0.1},
        {"B": 1, "T": 40, "J": 2, "G": 3, "S": 5003, "bits": 40, "noise": 0.05},
        {"B": 3, "T": 1, "J": 8, "G": 1, "S": 777, "bits": 16, "noise": 0.0},
    ],
)
def test_device_equals_the_reference(sizes):
    q, k, edges, budget = example(6, **sizes)
    arguments = (q, k, edges, budget, sizes["bits"], sizes["S"])
    same(run(*arguments, "mosaic_gpu"), run(*arguments, "reference"))


@pytest.mark.device
@on_device
@pytest.mark.parametrize("bits", [32, 128])
def test_device_decode_at_128k_equals_xla(bits):
    q, k, _, _ = example(7, B=8, J=4, G=16, S=131072, bits=bits)
    ends = [0, 16, 130000, 130064]
    edges = jnp.broadcast_to(jnp.asarray(ends, jnp.int32)[:, None, None], (4, 8, 1))
    budget = jnp.full((8, 1, 4), 4096, jnp.int32)
    arguments = (q, k, edges, budget, bits, 4176)
    same(run(*arguments, "mosaic_gpu"), run(*arguments, "xla"))
