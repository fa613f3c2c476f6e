"""Selection by codes on TPUs: kernels in the strict interpreter, lowered, and compiled."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kernel_proof import strictly_interpreted

from kernels_pallas.ahead_of_time import TPU_CHIPS, compile_for_tpu, lower_for_tpu
from kernels_pallas.hamming import (
    hamming_scores,
    hamming_select,
    hamming_threshold,
    mosaic_tpu,
    pack_codes,
)


@dataclasses.dataclass(frozen=True)
class Case:
    B: int = 2
    T: int = 2
    J: int = 2
    G: int = 2
    S: int = 45
    bits: int = 16
    noise: float = 0.1
    slots: int = 45
    best_of: int = 1


def example(case, seed):
    """Codes with many equal scores, four ascending edges [B, T] and budgets [B, T, J]."""
    rng = np.random.default_rng(seed)
    B, T, J, S, bits = case.B, case.T, case.J, case.S, case.bits
    pattern = rng.random((1, 1, 1, bits)) < 0.5
    q = (rng.random((B, T, J, case.G, bits)) < case.noise) ^ pattern[:, :, None]
    k = (rng.random((B, S, J, bits)) < case.noise) ^ pattern
    edges = np.sort(rng.integers(0, S + 1, (4, B, T)), axis=0).astype(np.int32)
    edges[:, -1, -1] = S // 2  # nothing anywhere
    budget = rng.integers(-1, S + 2, (B, T, J)).astype(np.int32)
    k_codes = jnp.transpose(pack_codes(jnp.asarray(k)), (0, 2, 3, 1))
    return pack_codes(jnp.asarray(q)), k_codes, *map(jnp.asarray, edges), jnp.asarray(budget)


def run(case, implementation, seed, ops):
    q, k, first, start, stop, last, budget = example(case, seed)
    options = {"bits": case.bits, "best_of": case.best_of, "implementation": implementation}

    def scores():
        return hamming_scores(q, k, **options)

    def threshold():
        return hamming_threshold(q, k, start, stop, budget, **options)

    def select():
        # Traced, so that lists may be longer than their slots and keep the earliest keys.
        return jax.jit(
            lambda first, start, stop, last, budget: hamming_select(
                q, k, start, stop, budget, slots=case.slots, first=first, last=last, **options
            )
        )(first, start, stop, last, budget)

    calls = {"scores": jax.jit(scores), "threshold": jax.jit(threshold), "select": select}
    return [calls[op]() for op in ops]


def check(case, seed=0, ops=("scores", "threshold", "select")):
    with strictly_interpreted("tpu"):
        got = jax.block_until_ready(run(case, "mosaic_tpu", seed, ops))
    wanted = run(case, "reference", seed, ops)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        assert a.shape == b.shape
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


# T=1 puts lists along the sublanes, T=9 the rows of one list; 40 bits take two words.
@pytest.mark.parametrize(
    ("case", "ops"),
    [
        (Case(T=1, G=8, S=1100, slots=140, noise=0.3), ("threshold", "select")),
        (Case(T=9, J=1, G=6, S=200, bits=40, slots=150, best_of=2), ("scores", "select")),
    ],
    ids=["decode", "rows"],
)
def test_kernels_equal_the_reference_in_the_strict_interpreter(case, ops):
    check(case, ops=ops)


@pytest.mark.full
@pytest.mark.parametrize(
    "case",
    [
        Case(B=1, T=1, J=1, G=1, S=1, slots=1),
        Case(T=3, J=3, G=4, S=1500, bits=128, slots=300, noise=0.0),
        Case(B=1, T=20, J=1, G=1, S=2100, bits=32, slots=700, noise=0.5),
        Case(B=1, T=130, J=1, G=1, S=100, bits=8, slots=60),
        Case(B=5, T=1, J=28, G=1, S=60, bits=32, slots=20),
        Case(B=1, T=8, J=2, G=16, S=300, bits=100, slots=7),
        Case(B=1, T=2, J=1, G=1, S=20000, bits=32, slots=17000, noise=0.5),
    ],
    ids=str,
)
def test_shapes_at_the_edges(case):
    check(case)


@pytest.mark.full
def test_random_shapes():
    """A hundred shapes."""
    rng = np.random.default_rng(0)
    for seed in range(100):
        case = Case(
            B=int(rng.integers(1, 4)),
            T=int(rng.choice([1, 2, 3, 7, 8, 9, 17])),
            J=int(rng.integers(1, 5)),
            G=int(rng.choice([1, 2, 3, 4, 8, 16])),
            S=int(rng.choice([1, 2, 31, 127, 128, 129, 500, 1023, 1024, 1025, 2500])),
            bits=int(rng.choice([1, 8, 32, 33, 64, 100, 128])),
            noise=float(rng.choice([0.0, 0.05, 0.5])),
            slots=int(rng.choice([1, 16, 127, 128, 129, 600])),
        )
        if seed % 3 == 0:
            case = dataclasses.replace(case, best_of=case.G)
        ops = [("threshold", "select"), ("scores", "select")][seed % 2]
        try:
            check(case, seed, ops)
        except Exception as error:
            raise AssertionError(f"{case} seed {seed}") from error


@pytest.mark.full
def test_keys_outside_the_ranges_do_not_matter():
    case = Case(T=1, S=1500, slots=60)
    q, k, *_ = example(case, 3)
    start, stop = jnp.full((2, 1), 400), jnp.full((2, 1), 1300)
    budget = jnp.full((2, 1, 2), 50)
    other = k.at[..., :400].set(jnp.uint32(7)).at[..., 1300:].set(jnp.uint32(9))
    with strictly_interpreted("tpu"):
        got, wanted = (
            hamming_select(
                q, x, start, stop, budget, bits=16, slots=60, implementation="mosaic_tpu"
            )
            for x in (other, k)
        )
        np.testing.assert_array_equal(got, wanted)


def call(op, *, B=8, T=1, J=4, G=8, S=131072, bits=32, slots=4176):
    """A call at a size that is used, and its arguments."""
    W = -(-bits // 32)
    q = jax.ShapeDtypeStruct((B, T, J, G, W), jnp.uint32)
    k = jax.ShapeDtypeStruct((B, J, W, S), jnp.uint32)
    edge = jax.ShapeDtypeStruct((B, T), jnp.int32)
    budget = jax.ShapeDtypeStruct((B, T, J), jnp.int32)
    options = {"bits": bits, "implementation": "mosaic_tpu"}
    if op == "scores":
        return lambda q, k: hamming_scores(q, k, **options), (q, k)
    if op == "threshold":

        def threshold(q, k, start, stop, budget):
            return hamming_threshold(q, k, start, stop, budget, **options)

        return threshold, (q, k, edge, edge, budget)

    def select(q, k, first, start, stop, last, budget):
        return hamming_select(
            q, k, start, stop, budget, slots=slots, first=first, last=last, **options
        )

    return select, (q, k, edge, edge, edge, edge, budget)


def assert_memory(op, chip, **sizes):
    """Temporaries: numbers of the rows (G W + 5 and at most 7 more, rows in whole lanes) up to
    three times on their way into the kernel's order, and the result in whole registers, twice (8
    numbers of a threshold, P and less than 1024 more of a list, rows in whole sublanes). Nothing
    like T * S and no copy of the key codes."""
    function, arguments = call(op, **sizes)
    compiled = compile_for_tpu(function, *arguments, chip=chip)
    B, T, J, G, W = arguments[0].shape
    groups, rows = (T, B * J) if T < 8 else (B * J, T)
    inputs = 4 * groups * (G * W + 12) * -(-rows // 128) * 128
    numbers = 8 if op == "threshold" else sizes.get("slots", 4176) + 1023
    results = 4 * groups * numbers * -(-rows // 8) * 8
    used = compiled.memory_analysis().temp_size_in_bytes
    assert used <= 3 * inputs + 2 * results + 2**20
    codes, scores = 4 * arguments[1].size, 4 * B * T * J * arguments[1].shape[3]
    assert used < (codes if T < 8 else scores / 4)


@pytest.mark.parametrize("chip", TPU_CHIPS)
def test_compiles_for_decoding_at_128k_and_training_at_32k_in_linear_memory(chip):
    assert_memory("select", chip)
    assert_memory("threshold", chip, B=1, T=32768, S=32768)


@pytest.mark.full
@pytest.mark.parametrize("chip", TPU_CHIPS)
@pytest.mark.parametrize(
    ("op", "sizes"),
    [
        ("select", {"bits": 128}),
        ("select", {"J": 32, "G": 1}),
        ("select", {"J": 32, "G": 1, "bits": 128}),
        ("select", {"B": 1, "T": 4}),
        ("select", {"B": 1, "S": 2**20, "slots": 32848}),
        ("select", {"B": 1, "T": 256, "S": 32768, "slots": 1104}),
        ("threshold", {"B": 1, "T": 131072, "bits": 128}),
        ("threshold", {"B": 1, "T": 32768, "S": 32768, "J": 32, "G": 1}),
        ("threshold", {"B": 2, "T": 8192, "S": 8192, "bits": 128}),
    ],
    ids=str,
)
def test_compiles_at_every_size_in_linear_memory(chip, op, sizes):
    assert_memory(op, chip, **sizes)


@pytest.mark.parametrize("op", ["scores", "threshold", "select"])
def test_lowers(op):
    function, arguments = call(op, B=1, T=9, S=1000, bits=40, slots=100)
    assert "tpu_custom_call" in lower_for_tpu(function, *arguments)


@pytest.mark.full
@pytest.mark.parametrize("chip", TPU_CHIPS)
@pytest.mark.parametrize("bits", [8, 32, 64, 128, 256])
@pytest.mark.parametrize("G", [1, 2, 4, 8, 16])
def test_every_group_and_code_lowers(chip, G, bits):
    for op in ("scores", "threshold", "select"):
        for T in (1, 40):
            function, arguments = call(op, B=2, T=T, G=G, S=3000, bits=bits, slots=200)
            assert "tpu_custom_call" in lower_for_tpu(function, *arguments, chip=chip)


def test_what_is_not_served_names_the_way_out():
    function, arguments = call("select", B=1, S=2**21)
    with pytest.raises(NotImplementedError, match=r"S=2097152 keys.*implementation='xla'"):
        jax.eval_shape(function, *arguments)
    with pytest.raises(ValueError, match="copied=100"):
        mosaic_tpu.Tiles(copied=100)
