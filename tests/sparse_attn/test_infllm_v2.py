"""What is particular to InfLLM-V2: its stages by the paper's formulas, the switch, the cache."""

import dataclasses
import functools

import attention_cases as cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from block_cases import attend_listed, best_blocks, layout, listed, logsumexp
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_attn import InfLLMV2, build_mechanism, dense_attention, infllm_v2_attention

SMALL, EXACT = InfLLMV2.tiny()
PER_HEAD = dataclasses.replace(EXACT, selected_blocks=(4, 3))
SHAPE = cases.SHAPES["G2"]
T = 40


def rotated(parts):
    """q and k of all tokens, rotated as in the module, as NumPy; and v."""
    q, k, v, _ = parts
    positions = jnp.broadcast_to(jnp.arange(q.shape[1])[None], q.shape[:2])
    q, k = cases.rope(q, positions), cases.rope(k[0], positions)
    return np.asarray(q), np.asarray(k), np.asarray(v[0])


def brute_lists(config, q, k, dense):
    """Blocks of every row and kv head of one document, from rotated q [T, N, H] and k [T, K, H]."""
    T, N, H = q.shape
    K = k.shape[1]
    L = config.selection_block

    def means(block, stride):
        return [(i, k[i : i + block].mean(axis=0)) for i in range(0, T - block + 1, stride)]

    fine = means(config.compression_block, config.compression_stride)
    coarse = means(config.coarse_block, config.coarse_stride)

    def scores(t, h):
        """Score of every block up to row t's own, by the sum of the paper, not its logarithm."""
        total = {}
        for n in range(N // K * h, N // K * (h + 1)):
            seen, wide = (
                {i: q[t, n] @ c[h] / np.sqrt(H) for i, c in entries if i + block <= t + 1}
                for entries, block in (
                    (fine, config.compression_block),
                    (coarse, config.coarse_block),
                )
            )
            normalizing = wide if config.lse == "coarse" and wide else seen
            lse = logsumexp(list(normalizing.values()))
            for i, s in seen.items():
                total[i] = total.get(i, 0.0) + np.exp(s - lse)
        return [
            max(
                (
                    p
                    for i, p in total.items()
                    if i < (j + 1) * L and i + config.compression_block > j * L
                ),
                default=0.0,
            )
            for j in range(t // L + 1)
        ]

    budgets = np.broadcast_to(config.selected_blocks, (K,))
    lists = []
    for t in range(T):
        own = t // L
        forced = set(range(min(config.initial_blocks, own + 1)))
        forced |= set(range(max(0, own - config.local_blocks + 1), own + 1))
        counts = [own + 1 if dense[t] else budget for budget in budgets]
        lists.append([best_blocks(scores(t, h), count, forced) for h, count in enumerate(counts)])
    return lists


def by_head(lists, group):
    """Lists of kv heads as lists of query heads."""
    return [[blocks for blocks in row for _ in range(group)] for row in lists]


@pytest.mark.parametrize(
    "implementation", [pytest.param("reference", marks=pytest.mark.full), "xla"]
)
@pytest.mark.parametrize(
    "config",
    [SMALL, EXACT, dataclasses.replace(SMALL, dense_len=0, selected_blocks=4, initial_blocks=2)],
    ids=["coarse", "exact", "always"],
)
def test_selection_and_output_equal_brute_force(config, implementation, x64):
    parts = cases.arrays(SHAPE, 1, 1, T)
    module = cases.mechanism(config, SHAPE, implementation=implementation)
    out, aux = cases.call(module, parts, inspect=True)
    q, k, v = (a[0] for a in rotated(parts))
    want = brute_lists(config, q, k, [t + 1 < config.dense_len for t in range(T)])
    assert aux.selection.block_size == 8
    assert aux.selection.indices.shape == (1, T, 2, config.slots)
    for t in range(T):
        for h in range(2):
            assert listed(aux.selection.indices[0], t, h) == want[t][h], (t, h)
    np.testing.assert_allclose(out[0], attend_listed(q, k, v, by_head(want, 2), 8), atol=1e-12)


@functools.cache
def function(config):
    return jax.jit(
        lambda q, k, v, ids: infllm_v2_attention(q, k, v, config=config, segment_ids=ids)
    )


@settings(derandomize=True, deadline=None, max_examples=10)
@given(
    config=st.sampled_from([SMALL, PER_HEAD, dataclasses.replace(SMALL, switch="sequence")]),
    lengths=st.sampled_from([(48,), (33, 7), (9, 30), (1, 8, 25), (16, 16, 16), (5,)]),
    seed=st.integers(0, 2**31),
)
def test_function_on_packed_documents_equals_brute_force(config, lengths, seed):
    """Every document by itself: its grid, its sink, its dense rows."""
    total = 48
    ids, starts = layout(lengths, 8, total)
    with jax.enable_x64(True):
        parts = cases.arrays(SHAPE, 1, 1, total, seed=seed)
        q, k, v = parts[0], parts[1][0], parts[2][0]
        out = np.asarray(function(config)(q, k, v, jnp.asarray(ids)[None]))[0]
    q, k, v = (np.asarray(a)[0] for a in (q, k, v))
    for start, length in zip(starts, lengths, strict=True):
        document = slice(start, start + length)
        dense = [
            (t + 1 if config.switch == "row" else length) < config.dense_len for t in range(length)
        ]
        lists = brute_lists(config, q[document], k[document], dense)
        want = attend_listed(q[document], k[document], v[document], by_head(lists, 2), 8)
        np.testing.assert_allclose(out[document], want, atol=1e-12)
    assert (out[ids == 0] == 0).all()


def test_defaults_are_the_published_ones():
    config = InfLLMV2()
    assert config.local_blocks == 32
    assert config.slots == 128  # the dense rows' 8192 / 64
    assert config.pooling.weights == (1.0,) * 5
    assert (config.pooling.offset, config.pooling.stride) == (-1, 4)
    assert dataclasses.replace(config, cover_window=True).local_blocks == 33
    assert config.alignment == 64
    assert config.auxiliary_bits(SHAPE, 16) == 2 * 8 * 16 * (1 / 16 + 1 / 64)
    exact = dataclasses.replace(config, lse="exact")
    assert exact.auxiliary_bits(SHAPE, 16) == 2 * 8 * 16 / 16
    np.testing.assert_allclose(
        config.density(65536),
        (8191 * 4096 + (65536 - 8191) * 6144) / (65536 * 65537 / 2),
        rtol=1e-3,
    )


def test_budgets_of_kv_heads_and_forced_blocks(x64):
    parts = cases.arrays(SHAPE, 1, 2, T)
    indices = cases.call(cases.mechanism(PER_HEAD, SHAPE), parts, inspect=True)[1].selection.indices
    for t in range(T):
        own = t // 8
        for head, budget in enumerate((4, 3)):
            for b in range(2):
                blocks = listed(indices[b], t, head)
                assert len(blocks) == min(budget, own + 1)
                # The sink, and two local blocks, which cover the last 8 tokens.
                assert {0, own, max(0, own - 1)} <= set(blocks)


@pytest.mark.full
@pytest.mark.parametrize("config", [SMALL, EXACT])
def test_gradient_is_that_of_attention_over_fixed_lists(config, x64):
    parts = cases.arrays(SHAPE, 1, 1, T)
    module = cases.mechanism(config, SHAPE)
    indices = cases.call(module, parts, inspect=True)[1].selection.indices
    seed = jnp.asarray(np.random.default_rng(4).standard_normal((1, T, 4, 8)))
    blocks = jnp.arange(T)[None, None, None, :, None] // 8
    member = jnp.any(indices[:, :, :, None, :] == blocks, axis=-1)
    member &= jnp.arange(T)[None, :, None, None] >= jnp.arange(T)[None, None, None, :]
    member = jnp.repeat(member, 2, axis=2)

    def fixed(parts):
        q, k, v, _ = parts
        positions = jnp.arange(T)[None]
        q, k = cases.rope(q, positions), jnp.repeat(cases.rope(k[0], positions), 2, axis=2)
        logits = jnp.einsum("BTNH,BSNH->BTNS", q, k) / np.sqrt(8)
        p = jax.nn.softmax(jnp.where(member, logits, -jnp.inf), axis=-1)
        return jnp.sum(jnp.einsum("BTNS,BSNH->BTNH", p, jnp.repeat(v[0], 2, axis=2)) * seed)

    got = jax.jit(jax.grad(lambda parts: jnp.sum(module(cases.as_heads(*parts))[0] * seed)))(parts)
    for a, b in zip(got, jax.grad(fixed)(parts), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-12)


def decode(module, parts, sizes, capacity=48, **options):
    """(outputs, cache) of feeding ``parts`` in chunks."""
    cache = module.init_cache(parts[0].shape[0], capacity, jnp.float64)
    step = jax.jit(lambda parts, cache: module(cases.as_heads(*parts), cache, **options)[:2])
    outs, at = [], 0
    for size in sizes:
        out, cache = step(cases.cut(parts, at, at + size), cache)
        outs.append(out)
        at += size
    return jnp.concatenate(outs, axis=1), cache


def test_decoding_turns_sparse_at_dense_len(x64):
    """Row by row: dense up to dense_len - 2, sparse from dense_len - 1 on, where they differ."""
    parts = cases.arrays(SHAPE, 1, 1, T)
    module = cases.mechanism(SMALL, SHAPE)
    out, _ = decode(module, parts, [1] * T)
    dense = cases.forward(cases.mechanism(SMALL.covering(T), SHAPE), parts)
    always = cases.forward(cases.mechanism(SMALL, SHAPE, dense_len=0), parts)
    np.testing.assert_allclose(out[:, :25], dense[:, :25], atol=1e-12)
    np.testing.assert_allclose(out[:, 25:], always[:, 25:], atol=1e-12)
    assert (np.abs(out - dense)[:, 25:].max(axis=(2, 3)) > 1e-3).mean() > 0.8
    assert (np.abs(out - always)[:, 24].max() > 1e-3).all()


@pytest.mark.full
def test_sequence_switch_follows_the_length_so_far(x64):
    config = dataclasses.replace(SMALL, switch="sequence")
    parts = cases.arrays(SHAPE, 1, 2, T)
    module = cases.mechanism(config, SHAPE)
    dense = cases.forward(cases.mechanism(SMALL.covering(T), SHAPE), parts)
    always = cases.forward(cases.mechanism(SMALL, SHAPE, dense_len=0), parts)
    # A prefill of 40 is sparse from its first row, one of 25 is dense, steps cross at token 26.
    np.testing.assert_allclose(cases.forward(module, parts), always, atol=1e-12)
    short = cases.forward(module, cases.cut(parts, 0, 25))
    np.testing.assert_allclose(short, dense[:, :25], atol=1e-12)
    steps, _ = decode(module, parts, [1] * T)
    np.testing.assert_allclose(steps[:, :25], dense[:, :25], atol=1e-12)
    np.testing.assert_allclose(steps[:, 25:], always[:, 25:], atol=1e-12)
    # Sequences of a batch switch by themselves.
    ids = jnp.asarray(np.arange(T)[None] < np.array([[T], [20]]), jnp.int32)
    cache = module.init_cache(2, 48, jnp.float64)
    out = jax.jit(lambda p, c: module(cases.as_heads(*p), c, segment_ids=ids)[0])(parts, cache)
    np.testing.assert_allclose(out[0], always[0], atol=1e-12)
    np.testing.assert_allclose(out[1, :20], dense[1, :20], atol=1e-12)


@pytest.mark.parametrize("config", [SMALL, pytest.param(EXACT, marks=pytest.mark.full)])
def test_cache_holds_the_means_of_its_keys(config, x64):
    parts = cases.arrays(SHAPE, 1, 2, T)
    module = cases.mechanism(config, SHAPE)
    _, cache = decode(module, parts, [13, 13, 1, 13])
    cut = cache.truncate(jnp.asarray([38, 33]))
    assert cut.length.tolist() == [38, 33]
    _, k, _ = rotated(parts)

    def compare(entries, block, stride):
        for i in range(0, T - block + 1, stride):
            np.testing.assert_allclose(
                entries[:, :, :, i // stride], k[:, i : i + block].mean(axis=1), atol=1e-14
            )

    compare(cache.fine, 4, 2)
    if config.lse == "coarse":
        compare(cache.coarse, 16, 8)
    else:
        assert (np.asarray(cache.coarse) == 0).all()


@pytest.mark.full
def test_short_sequences_run_dense(x64):
    """Below dense_len no list is ever made: the compiled program has no sort in it."""
    parts = cases.arrays(SHAPE, 1, 1, 25)
    module = cases.mechanism(SMALL, SHAPE)
    run = jax.jit(lambda parts: module(cases.as_heads(*parts))[0])
    assert "stablehlo.sort" not in run.lower(parts).as_text()
    longer = cases.arrays(SHAPE, 1, 1, 26)
    assert "stablehlo.sort" in run.lower(longer).as_text()
    q, k, v = (jnp.asarray(a) for a in rotated(parts))
    np.testing.assert_allclose(run(parts), dense_attention(q, k, v), atol=1e-12)
    np.testing.assert_allclose(
        infllm_v2_attention(q, k, v, config=SMALL), dense_attention(q, k, v), atol=1e-12
    )


@pytest.mark.parametrize("attend", ["dense", pytest.param("fit", marks=pytest.mark.full)])
def test_dense_attend_is_dense(attend, x64):
    parts = cases.arrays(SHAPE, 1, 1, T)
    module = cases.mechanism(SMALL, SHAPE)
    out, aux = cases.call(module, parts, attend=attend, inspect=True)
    want = cases.forward(cases.mechanism(SMALL.covering(T), SHAPE), parts)
    np.testing.assert_allclose(out, want, atol=1e-12)
    assert float(aux.loss) == 0
    assert float(aux.metrics["density"]) < 1


def test_dense_attend_keeps_the_cache_going(x64):
    parts = cases.arrays(SHAPE, 1, 1, T)
    module = cases.mechanism(SMALL, SHAPE)
    caches = [decode(module, parts, [20, 20], attend=attend)[1] for attend in ("dense", "sparse")]
    for a, b in zip(*(jax.tree.leaves(cache) for cache in caches), strict=True):
        np.testing.assert_array_equal(a, b)
    with pytest.raises(ValueError, match="without a cache"):
        module(cases.as_heads(*parts), caches[0], attend="fit")


def test_inspection_reports_quality_and_density(x64):
    parts = cases.arrays(SHAPE, 1, 1, T)
    measured = cases.call(cases.mechanism(SMALL, SHAPE), parts, inspect=True)[1].metrics
    assert 0 < float(measured["captured_mass"]) < 1
    np.testing.assert_allclose(measured["density"], density_of_lists(parts), rtol=1e-6)
    assert float(measured["density"]) <= SMALL.density(T)
    sequence = dataclasses.replace(SMALL, switch="sequence")
    assert sequence.density(T) < SMALL.density(T)
    assert sequence.density(20) == 1.0


def density_of_lists(parts):
    q, k, _ = (a[0] for a in rotated(parts))
    lists = brute_lists(SMALL, q, k, [t + 1 < SMALL.dense_len for t in range(T)])
    attended = [
        sum(min(8, t + 1 - 8 * j) for j in blocks) for t, row in enumerate(lists) for blocks in row
    ]
    return sum(attended) / (2 * T * (T + 1) / 2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"compression_stride": 5}, "must divide"),
        ({"compression_stride": 0}, "compression_stride=0"),
        ({"compression_block": 128}, "longer than selection_block=64"),
        ({"coarse_stride": 24}, "compression_stride=16 must divide coarse_stride=24"),
        ({"coarse_block": 96}, "coarse_stride=64 must divide coarse_block=96"),
        ({"coarse_block": 0}, "must divide coarse_block=0"),
        ({"window": 0}, "window=0"),
        ({"dense_len": -1}, "dense_len=-1 must not be negative"),
        ({"initial_blocks": -1}, "initial_blocks=-1"),
        ({"lse": "fine"}, "lse='fine' is unknown"),
        ({"switch": "batch"}, "switch='batch' is unknown"),
        ({"selected_blocks": ()}, "is empty"),
        ({"selected_blocks": 32}, r"cannot hold the forced initial_blocks=1 \+ 32 local"),
        ({"selected_blocks": (96, 33), "cover_window": True}, "33 local blocks"),
    ],
)
def test_bad_configurations_name_the_values(changes, message):
    with pytest.raises(ValueError, match=message):
        InfLLMV2(**changes)


def test_budgets_must_match_the_heads():
    config = InfLLMV2(selected_blocks=(96, 64, 64))
    with pytest.raises(ValueError, match="3 budgets for kv_heads=2"):
        build_mechanism(config, SHAPE, rngs=None)
    with pytest.raises(ValueError, match="3 budgets for kv_heads=2"):
        infllm_v2_attention(*(jnp.zeros((1, 4, 2, 8)),) * 3, config=config)


def test_cache_sizes_are_checked():
    module = cases.mechanism(SMALL, SHAPE, dtype=jnp.float32)
    with pytest.raises(ValueError, match="capacity=0"):
        module.init_cache(1, 0, jnp.float32)
    with pytest.raises(ValueError, match="rollback=-1"):
        module.init_cache(1, 8, jnp.float32, rollback=-1)
    cache = module.init_cache(1, 8, jnp.float32)
    parts = cases.arrays(SHAPE, 1, 1, 9, dtype=jnp.float32)
    with pytest.raises(ValueError, match="cache capacity 8 is too small"):
        module(cases.as_heads(*parts), cache)
