"""Every policy against its definition, written row by row in NumPy float64."""

import dataclasses
import functools
import math
from fractions import Fraction

import attention_cases as cases
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import example, given, settings

from sparse_attn import (
    H2O,
    POLICIES,
    DoubleSparsity,
    Duo,
    HeadShape,
    OracleTopK,
    OracleTopP,
    Quest,
    RandomKeys,
    SnapKV,
    StreamingLLM,
    TokenSelect,
    build_mechanism,
    calibrate_channels,
    calibrate_ranges,
    dense_attention,
    policy_attention,
)
from sparse_attn.policies.double_sparsity import rounded
from sparse_attn.selecting import allowed_keys
from sparse_attn.top_keys import heaviest, listed, members

SHAPE = cases.SHAPES["G2"]
N, K, G, H = 4, 2, 2, 8
BATCH, TOKENS = 2, 32
ENDS = {"sinks": 2, "recent": 3}


def softmax(x):
    e = np.exp(x - x.max())
    return e / e.sum()


def budget_of(budget, j, seen):
    budget = budget[j] if isinstance(budget, tuple) else budget
    return budget if isinstance(budget, int) else math.ceil(Fraction(str(budget)) * seen)


def forced(config, t):
    return {s for s in range(t + 1) if s < config.sinks or s > t - config.recent}


def best(scores, candidates, count):
    """The ``count`` candidates with the highest scores, the later of equal ones first."""
    return set(sorted(candidates, key=lambda s: (scores[s], s))[::-1][:count])


def voted(config, scores):
    """[N, S] scores of one row to [J, S]."""
    lists = {"query": N, "group": K, "layer": 1}[config.share]
    if lists == N:
        return scores
    p = np.array([softmax(row) for row in scores])
    return p.reshape(lists, N // lists, -1).sum(axis=1)


def exact(q, k, t):
    return np.array([k[: t + 1, n // G] @ q[t, n] / np.sqrt(H) for n in range(N)])


def top_scored(config, q, k, score):
    """Lists of a policy that ranks keys by ``score(t)`` [N, t + 1]."""
    rows = []
    for t in range(len(q)):
        kept = forced(config, t)
        rest = set(range(t + 1)) - kept
        ranks = voted(config, score(t))
        counts = [budget_of(config.budget, j, t + 1) for j in range(len(ranks))]
        rows.append([kept | best(r, rest, c) for r, c in zip(ranks, counts, strict=True)])
    return rows


def oracle_topk(config, q, k):
    return top_scored(config, q, k, lambda t: exact(q, k, t))


def oracle_topp(config, q, k):
    rows = []
    for t in range(len(q)):
        p = np.array([softmax(row) for row in exact(q, k, t)])
        lists = {"query": N, "group": K, "layer": 1}[config.share]
        p = p.reshape(lists, N // lists, -1).mean(axis=1)
        row = []
        for j in range(lists):
            wanted = config.mass[j] if isinstance(config.mass, tuple) else config.mass
            kept = forced(config, t)
            for s in np.argsort(-p[j]):
                if p[j][sorted(kept)].sum() >= wanted and wanted < 1:
                    break
                kept.add(int(s))
            row.append(kept)
        rows.append(row)
    return rows


def random_keys(config, q, k):
    def mix(x):
        x = (x + 0x9E3779B9) % 2**32
        x = (x ^ (x >> 16)) * 0x85EBCA6B % 2**32
        x = (x ^ (x >> 13)) * 0xC2B2AE35 % 2**32
        return x ^ (x >> 16)

    lists = {"query": N, "group": K, "layer": 1}[config.share]
    rows = []
    for t in range(len(q)):
        kept = forced(config, t)
        row = []
        for j in range(lists):
            hashes = [mix(mix(mix(mix(config.seed) ^ j) ^ mix(t)) ^ s) for s in range(t + 1)]
            count = budget_of(config.budget, j, t + 1)
            row.append(kept | best(hashes, set(range(t + 1)) - kept, count))
        rows.append(row)
    return rows


def streaming_llm(config, q, k):
    return [[forced(config, t)] for t in range(len(q))]


def duo(config, q, k):
    return [
        [forced(config, t) if j in config.streaming_heads else set(range(t + 1)) for j in range(K)]
        for t in range(len(q))
    ]


def quest(config, q, k):
    size = config.page
    rows = []
    for t in range(len(q)):
        kept, own = forced(config, t), t // size
        pages = {j: set(range(j * size, min((j + 1) * size, t + 1))) for j in range(own + 1)}
        complete = [j for j, held in pages.items() if len(held) == size]
        bounds = np.full((N, own + 1), -np.inf)
        for n in range(N):
            for j in complete:
                held = k[sorted(pages[j]), n // G]
                top = np.maximum(q[t, n] * held.min(axis=0), q[t, n] * held.max(axis=0))
                bounds[n, j] = top.sum() / np.sqrt(H)
        if config.share != "query" and complete:
            bounds = np.concatenate(
                [voted(config, bounds[:, : len(complete)]),
                 np.zeros((1 if config.share == "layer" else K, own + 1 - len(complete)))],
                axis=1,
            )  # fmt: skip
        lists = {"query": N, "group": K, "layer": 1}[config.share]
        row = []
        for j in range(lists):
            ranks = bounds[j].copy()
            ranks[own] = np.inf
            candidates = {page for page, held in pages.items() if held - kept}
            count = -(-budget_of(config.budget, j, t + 1) // size)
            taken = best(ranks, candidates, count)
            row.append(kept.union(*(pages[page] for page in taken)))
        rows.append(row)
    return rows


def double_sparsity(config, q, k):
    channels = config.channels or [tuple(i * H // config.width for i in range(config.width))] * K

    def score(t):
        rows = []
        for n in range(N):
            picked = list(channels[n // G])
            labels = k[: t + 1, n // G][:, picked]
            if config.label_bits is not None:
                low, high = labels.min(axis=1, keepdims=True), labels.max(axis=1, keepdims=True)
                if config.ranges:
                    low, high = np.array(config.ranges[n // G]).T
                    labels = np.clip(labels, low, high)
                step = (high - low) / (2**config.label_bits - 1)
                labels = low + step * np.round((labels - low) / step)
            rows.append(labels @ q[t, n][picked] / np.sqrt(H))
        return np.array(rows)

    return top_scored(config, q, k, score)


def h2o(config, q, k):
    alive = [set() for _ in range(K)]
    scores = np.zeros((K, len(q)))
    rows = []
    for t in range(len(q)):
        kept = forced(config, t)
        for j in range(K):
            alive[j].add(t)
            free = alive[j] - kept
            if len(free) > budget_of(config.budget, j, t + 1):
                alive[j].discard(min(free, key=lambda s: (scores[j, s], s)))
            held = sorted(alive[j])
            for n in range(j * G, (j + 1) * G):
                scores[j, held] += softmax(k[held, j] @ q[t, n] / np.sqrt(H))
        rows.append([set(held) for held in alive])
    return rows


def snapkv(config, q, k):
    W, reach = config.observation, config.pool_width // 2
    rows, kept = [], [set() for _ in range(K)]
    for t in range(len(q)):
        end = t // config.every * config.every
        if end and t == end:
            for j in range(K):
                mass = np.zeros(end)
                for u in range(end - W, end):
                    for n in range(j * G, (j + 1) * G):
                        mass[: u + 1] += softmax(k[: u + 1, j] @ q[u, n] / np.sqrt(H))
                mass = mass[: end - W]
                near = [mass[max(0, s - reach) : s + reach + 1] for s in range(len(mass))]
                pooled = [x.max() if config.pool == "max" else x.sum() for x in near]
                old = set(range(config.sinks, end - W))
                level = np.round(np.log(pooled) * 1024)
                kept[j] = best(level, old, config.budget)
        since = set(range(max(0, end - W), t + 1)) if end else set(range(t + 1))
        sinks = {s for s in range(t + 1) if s < config.sinks}
        rows.append([since | sinks | old for old in kept])
    return rows


CASES = {
    "topk-per-head": (OracleTopK(budget=(0, 3, 0.25, 1.0), **ENDS), oracle_topk),
    "topk-group": (OracleTopK(budget=(2, 0.3), share="group", sinks=0, recent=0), oracle_topk),
    "topp": (OracleTopP(mass=(0.5, 0.7, 0.9, 1.0), **ENDS), oracle_topp),
    "topp-group": (OracleTopP(mass=0.8, share="group", sinks=0, recent=0), oracle_topp),
    "token-select": (TokenSelect(budget=4, **ENDS), oracle_topk),
    "random": (RandomKeys(budget=(0.2, 3, 5, 0), seed=7, **ENDS), random_keys),
    "streaming": (StreamingLLM(sinks=3, recent=5), streaming_llm),
    "duo": (Duo(streaming_heads=(1,), sinks=0, recent=3), duo),
    "quest": (Quest(page=4, budget=7, **ENDS), quest),
    "quest-group": (Quest(page=4, budget=0.25, share="group", sinks=0, recent=0), quest),
    "labels": (DoubleSparsity(width=3, budget=4, **ENDS), double_sparsity),
    "labels-4-bit": (
        DoubleSparsity(channels=((0, 3, 5), (7, 1, 2)), label_bits=4, budget=0.2, **ENDS),
        double_sparsity,
    ),
    "ranged_labels": (
        DoubleSparsity(
            channels=((0, 3), (7, 1)),
            label_bits=4,
            ranges=(((-1.0, 1.5), (-2.0, 2.0)), ((-1.5, 1.0), (-0.5, 2.5))),
            budget=0.2,
            **ENDS,
        ),
        double_sparsity,
    ),
    "h2o": (H2O(budget=(0, 0.25), sinks=1, recent=2), h2o),
    "snapkv": (SnapKV(sinks=1, budget=3, observation=2, every=4, pool_width=3), snapkv),
    "snapkv-prompt": (
        SnapKV(sinks=0, budget=5, observation=3, every=16, pool="max", pool_width=1),
        snapkv,
    ),
}


@functools.lru_cache(maxsize=2)
def compiled(config):
    module = build_mechanism(config, SHAPE, rngs=nnx.Rngs(0))

    @jax.jit
    def run(parts, ids):
        out, _, aux = module(cases.as_heads(*parts), segment_ids=ids, inspect=True)
        return out, aux.selection.indices

    return run


@st.composite
def layouts(draw):
    """Segment ids [B, T]: documents of any length from multiples of 16 on, padding between them."""
    ids = np.zeros((BATCH, TOKENS), np.int32)
    for row in ids:
        if draw(st.booleans()):
            row[: draw(st.integers(1, TOKENS))] = 1
        else:
            row[: draw(st.integers(1, 16))] = 1
            row[16 : 16 + draw(st.integers(0, 16))] = 2
    return ids


WHOLE = np.ones((BATCH, TOKENS), np.int32)


@pytest.mark.parametrize("case", CASES)
@settings(derandomize=True, deadline=None, max_examples=3, database=None)
@example(ids=WHOLE)
@given(ids=layouts())
def test_lists_and_outputs_follow_the_definition(case, ids):
    config, definition = CASES[case]
    with jax.enable_x64(True):
        parts = cases.arrays(SHAPE, 1, BATCH, TOKENS, seed=int(ids.sum()))
        out, indices = (np.asarray(x) for x in compiled(config)(parts, jnp.asarray(ids)))
        assert (out[ids == 0] == 0).all()
        assert (indices[ids == 0] == -1).all()
        # Every document counts its positions from zero.
        place = np.array([[np.sum(row[:t] == row[t]) for t in range(TOKENS)] for row in ids])
        rotated = [np.asarray(cases.rope(x, place)) for x in (parts[0], parts[1][0])]
        values = np.asarray(parts[2])[0]
        for b in range(BATCH):
            for document in set(ids[b]) - {0}:
                at = np.flatnonzero(ids[b] == document)
                q, k = (x[b, at] for x in rotated)
                rows = definition(config, q, k)
                for t, lists in enumerate(rows):
                    got = indices[b, at[t]]
                    assert len(got) == len(lists)
                    for n in range(N):
                        chosen = sorted(lists[n * len(lists) // N])
                        kept = got[n * len(lists) // N]
                        # Ascending, filled from the left, in the buffer's numbering.
                        assert kept[: len(chosen)].tolist() == [s + at[0] for s in chosen], t
                        assert (kept[len(chosen) :] == -1).all()
                        p = softmax(k[chosen, n // G] @ q[t, n] / np.sqrt(H))
                        want = p @ values[b, at[0] + np.asarray(chosen), n // G]
                        np.testing.assert_allclose(out[b, at[t], n], want, atol=1e-12)


def test_policies_are_registered_and_have_no_parameters():
    assert set(POLICIES) >= {
        "oracle_topk",
        "oracle_topp",
        "random",
        "streaming_llm",
        "quest",
        "double_sparsity",
        "h2o",
        "snapkv",
        "token_select",
        "duo",
    }
    for config in POLICIES.values():
        (small,) = config.tiny()
        assert small.causal
        assert small.kv_branches == 1
        module = build_mechanism(small, SHAPE, rngs=nnx.Rngs(0))
        assert jax.tree.leaves(nnx.state(module)) == []
        module.update_state({})
        # The defaults are legal too, and say how much they attend.
        assert 0 < config().density(3000) <= 1
        assert config().covering(3000).density(3000) == 1


@pytest.mark.parametrize("case", ["h2o", "snapkv"])
def test_state_follows_a_dense_prompt(case, x64):
    config, _ = CASES[case]
    parts = cases.arrays(SHAPE, 1, 2, TOKENS)
    module = cases.mechanism(config, SHAPE)
    cache = module.init_cache(2, 96, jnp.float64)
    prompt = TOKENS - 5
    fill = jax.jit(lambda parts, cache: module(cases.as_heads(*parts), cache, attend="dense"))
    dense, cache, aux = fill(cases.cut(parts, 0, prompt), cache)
    whole = cases.forward(module, parts)
    rotated = [
        cases.rope(x, jnp.broadcast_to(jnp.arange(TOKENS)[None], (2, TOKENS)))
        for x in (parts[0], parts[1][0])
    ]
    np.testing.assert_allclose(
        dense, dense_attention(*rotated, parts[2][0])[:, :prompt], atol=1e-12
    )
    assert aux.loss == 0
    assert np.abs(dense - whole[:, :prompt]).max() > 1e-3
    step = jax.jit(lambda parts, cache: module(cases.as_heads(*parts), cache)[:2])
    out, cache = step(cases.cut(parts, prompt, TOKENS), cache)
    np.testing.assert_allclose(out, whole[:, prompt:], atol=1e-12)
    with pytest.raises(ValueError, match="without a cache"):
        module(cases.as_heads(*cases.cut(parts, 0, 1)), cache, attend="fit")


def test_fit_is_dense_with_no_loss(x64):
    parts = cases.arrays(SHAPE, 1, 1, 8)
    module = cases.mechanism(OracleTopK.tiny()[0], SHAPE)
    fit, aux = cases.call(module, parts, attend="fit")
    dense = cases.forward(module, parts, attend="dense")
    np.testing.assert_array_equal(fit, dense)
    assert aux.loss == 0


def test_plain_function_equals_the_module(x64):
    config = CASES["quest"][0]
    q, k, v, x = cases.arrays(SHAPE, 1, 2, TOKENS)
    ids = jnp.asarray(WHOLE.copy()).at[1, 20:].set(0)
    plain = jax.jit(functools.partial(policy_attention, policy=config))
    got = plain(q, k[0], v[0], segment_ids=ids)
    positions = jnp.broadcast_to(jnp.arange(TOKENS)[None], (2, TOKENS))
    # The rotation undone by its inverse leaves what the function takes as it is.
    turned = cases.rope(q, -positions), cases.rope(k[0], -positions)[None]
    module = cases.mechanism(config, SHAPE)
    want = cases.forward(module, (turned[0], turned[1], v, x), segment_ids=ids)
    np.testing.assert_allclose(got, want, atol=1e-11)


def test_policies_that_forget_undo_only_what_they_were_made_for():
    for config, undone in ((CASES["h2o"][0], 2), (CASES["quest"][0], 9)):
        module = cases.mechanism(config, SHAPE, dtype=jnp.float32)
        cache = module.init_cache(1, 16, jnp.float32, rollback=2)
        cache = dataclasses.replace(cache, length=jnp.asarray([12]))
        assert cache.truncate(jnp.asarray([12 - undone])).length == 12 - undone
        if undone == 2:
            with pytest.raises(ValueError, match="rollback=2"):
                cache.truncate(jnp.asarray([9]))


def test_random_keys_are_uniform_and_differ_by_head_row_and_seed(x64):
    parts = cases.arrays(SHAPE, 1, 1, 128)
    drawn = []
    for seed in (0, 1):
        module = cases.mechanism(RandomKeys(budget=16, sinks=0, recent=0, seed=seed), SHAPE)
        run = jax.jit(lambda parts, m=module: m(cases.as_heads(*parts), inspect=True)[2].selection)
        drawn.append(np.asarray(run(parts).indices)[0])
    rows = drawn[0][64:]  # [64, N, 16], each from 65..128 keys
    assert (rows >= 0).all()
    early = (rows < 64).sum(axis=(0, 2)) / sum(16 * 64 / (t + 1) for t in range(64, 128))
    np.testing.assert_allclose(early, 1.0, atol=0.15)
    assert len({tuple(line) for line in rows.reshape(-1, 16)}) == rows.shape[0] * N
    assert (drawn[0][64:] != drawn[1][64:]).any(axis=(1, 2)).all()


def test_calibration_finds_the_strong_channels():
    rng = np.random.default_rng(0)
    q, k = rng.standard_normal((2, 50, N, H)), rng.standard_normal((2, 50, K, H))
    q[:, :, :G, [1, 6]] *= 5
    k[:, :, 1, [2, 4]] *= 5
    valid = np.ones((2, 50), bool)
    q[0, 0, :, 0], valid[0, 0] = 1e6, False
    channels = calibrate_channels(
        jnp.asarray(q, jnp.float32), jnp.asarray(k, jnp.float32), 2, valid=jnp.asarray(valid)
    )
    assert channels == ((1, 6), (2, 4))
    everything = calibrate_channels(jnp.asarray(q), jnp.asarray(k), H)
    assert everything == (tuple(range(H)),) * K
    DoubleSparsity(channels=channels).check(SHAPE)
    with pytest.raises(ValueError, match="width=9"):
        calibrate_channels(jnp.asarray(q), jnp.asarray(k), 9)


def test_calibrated_ranges_lose_the_least_of_normal_labels():
    k = np.random.default_rng(2).standard_normal((1, 4000, K, H)).astype(np.float32) * 3 + 1
    channels = ((0, 1),) * K

    def lost(ranges, bits):
        ends = jnp.asarray(ranges, jnp.float32)
        labels = jnp.asarray(k[..., :2])
        return float(jnp.mean((rounded(labels, bits, ends) - labels) ** 2)) / 9

    # Distortions of the best uniform quantisers of a unit normal (Max 1960, table II).
    for bits, least in ((1, 0.3634), (2, 0.1188), (4, 0.01154)):
        ranges = calibrate_ranges(jnp.asarray(k), channels, bits)
        found = lost(ranges, bits)
        assert found == pytest.approx(least, rel=0.1)
        for factor in (0.8, 1.25):
            scaled = (np.array(ranges) - 1) * factor + 1
            assert lost(scaled, bits) > found
    with pytest.raises(ValueError, match="bits=9"):
        calibrate_ranges(jnp.asarray(k), channels, 9)


def test_rounded_labels_are_within_half_a_step():
    labels = np.random.default_rng(1).standard_normal((5, 7)).astype(np.float32)
    step = (labels.max(1) - labels.min(1)) / 15
    got = np.asarray(rounded(jnp.asarray(labels), 4))
    assert (np.abs(got - labels) <= step[:, None] * 0.5001).all()
    assert len(np.unique(np.round((got - labels.min(1)[:, None]) / step[:, None], 3))) <= 16
    np.testing.assert_array_equal(rounded(jnp.ones((2, 3)), 2), np.ones((2, 3)))


@settings(derandomize=True, deadline=None, max_examples=25, database=None)
@given(
    seed=st.integers(0, 10**6),
    kind=st.sampled_from(["ties", "floats", "integers"]),
    needed=st.integers(0, 14),
)
def test_heaviest_is_an_exact_top_k_with_recent_ties(seed, kind, needed):
    rng = np.random.default_rng(seed)
    scores = {
        "ties": rng.choice([-np.inf, -1.0, -0.0, 0.0, 2.5, np.inf], (3, 13)).astype(np.float32),
        "floats": rng.standard_normal((3, 13)).astype(np.float32),
        "integers": rng.choice([0, 1, 2**31, 2**32 - 1], (3, 13)).astype(np.uint32),
    }[kind]
    eligible = rng.random((3, 13)) < 0.7
    counts = np.asarray([needed, 0, 13], np.int32)
    got = run_heaviest(scores, eligible.astype(np.int32), counts)
    for row in range(3):
        want = best(scores[row], np.flatnonzero(eligible[row]).tolist(), counts[row])
        assert set(np.flatnonzero(got[row])) == want


def run_heaviest(*arguments):
    return np.asarray(jax.jit(heaviest)(*(jnp.asarray(x) for x in arguments)))


def test_heaviest_of_many_rows_goes_tile_by_tile():
    scores = np.random.default_rng(0).integers(0, 5000, (24, 8192)).astype(np.float32)
    counts = np.arange(24, dtype=np.int32) * 40
    got = run_heaviest(scores, np.ones((24, 8192), np.int32), counts)
    for row, count in enumerate(counts):
        order = np.lexsort((np.arange(8192), scores[row]))[::-1]
        assert set(np.flatnonzero(got[row])) == set(order[:count])


def test_heaviest_reaches_a_mass_with_the_fewest_keys():
    p = np.array([[0.1, 0.4, 0.1, 0.1, 0.3, 0.0]], np.float32)
    for wanted, keys in ((0.0, []), (0.35, [1]), (0.65, [1, 4]), (0.75, [1, 3, 4])):
        got = run_heaviest(p, p, np.asarray([wanted], np.float32))
        assert np.flatnonzero(got[0]).tolist() == keys
    assert run_heaviest(p, p, np.asarray([2.0], np.float32)).tolist() == [[True] * 5 + [False]]


def test_lists_and_members_are_inverse():
    member = np.random.default_rng(0).random((4, 2, 11)) < 0.4
    lists = np.asarray(listed(jnp.asarray(member), 11))
    for row, line in zip(member.reshape(-1, 11), lists.reshape(-1, 11), strict=True):
        chosen = np.flatnonzero(row).tolist()
        assert line.tolist() == chosen + [-1] * (11 - len(chosen))
    np.testing.assert_array_equal(members(jnp.asarray(lists), 11), member)
    np.testing.assert_array_equal(listed(jnp.asarray(member), 2), lists[..., :2])


def test_budgets_are_exact_at_every_length():
    seen = np.concatenate([np.arange(2000), [10**6, 10**7 + 3, 2**30]]).astype(np.int32)
    for share in (1 / 32, 0.1, 0.3, 1 / 3, 0.9999, 1.0, 1e-9):
        fraction = max(Fraction(share).limit_denominator(10_000), Fraction(1, 10_000))
        if share == 1e-9:
            fraction = Fraction(1, 1)
        want = [math.ceil(fraction * int(t)) for t in seen]
        assert np.asarray(allowed_keys(share, jnp.asarray(seen))).tolist() == want
    assert allowed_keys(5, 3) == 5
    assert allowed_keys(0.1, 10) == 1


def test_density_counts_what_rows_attend():
    config = OracleTopK(budget=4, sinks=1, recent=2)
    assert config.density(10) == (sum(min(t, 7) for t in range(1, 11))) / 55
    snap = CASES["snapkv"][0]
    lists = snapkv(snap, *np.random.default_rng(0).standard_normal((2, TOKENS, N, H)))
    attended = sum(len(row[0]) for row in lists)
    assert snap.density(TOKENS) == attended / (TOKENS * (TOKENS + 1) / 2)
    assert Quest(page=4, budget=7, sinks=0, recent=0).capacity(100) == 8


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: OracleTopK(sinks=-1), "sinks=-1"),
        (lambda: OracleTopK(recent=-1), "recent=-1"),
        (lambda: OracleTopK(budget=-1), "budget=-1"),
        (lambda: OracleTopK(budget=1.5), "budget=1.5"),
        (lambda: OracleTopK(budget=0.0), "budget=0.0"),
        (lambda: OracleTopK(budget=()), "names no list"),
        (lambda: OracleTopK(share="head"), "share='head'"),
        (lambda: OracleTopP(mass=0.0), "mass=0.0"),
        (lambda: OracleTopP(mass=(0.5, 1.5)), "mass="),
        (lambda: OracleTopP(share="heads"), "share='heads'"),
        (lambda: RandomKeys(seed=-1), "seed=-1"),
        (lambda: StreamingLLM(recent=0), "recent=0"),
        (lambda: Duo(recent=0), "recent=0"),
        (lambda: Duo(streaming_heads=(1, 1)), "streaming_heads"),
        (lambda: Quest(page=0), "page=0"),
        (lambda: DoubleSparsity(width=0), "width=0"),
        (lambda: DoubleSparsity(label_bits=9), "label_bits=9"),
        (lambda: DoubleSparsity(channels=((1, 2), (1,))), "as many channels"),
        (lambda: DoubleSparsity(channels=((1, 1),)), "different"),
        (lambda: DoubleSparsity(channels=((1,),), ranges=(((0, 1),),)), "label_bits"),
        (lambda: DoubleSparsity(channels=((1,),), label_bits=2, ranges=(((1, 0),),)), "low < high"),
        (lambda: DoubleSparsity(label_bits=2, ranges=(((0, 1),),)), "for every channel"),
        (lambda: H2O(recent=0), "recent=0"),
        (lambda: SnapKV(recent=4), "recent=4"),
        (lambda: SnapKV(budget=0), "budget=0"),
        (lambda: SnapKV(observation=33), "observation=33"),
        (lambda: SnapKV(pool_width=4), "pool_width=4"),
        (lambda: SnapKV(pool="median"), "pool='median'"),
    ],
)
def test_impossible_settings_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (OracleTopK(budget=(1, 2)), "2 entries"),
        (OracleTopP(mass=(0.5, 0.5)), "4 lists"),
        (H2O(budget=(1, 2, 3)), "3 entries"),
        (Duo(streaming_heads=(2,)), "outside 0..1"),
        (DoubleSparsity(), "width=16"),
        (DoubleSparsity(channels=((1,),)), "for 1 heads"),
        (DoubleSparsity(channels=((1,), (8,))), "outside 0..7"),
    ],
)
def test_settings_that_do_not_fit_the_heads_are_refused(config, message):
    with pytest.raises(ValueError, match=message):
        build_mechanism(config, SHAPE, rngs=nnx.Rngs(0))


def test_other_kv_branches_are_refused():
    module = cases.mechanism(OracleTopK(), SHAPE, dtype=jnp.float32)
    parts = cases.arrays(SHAPE, 3, 1, 4, dtype=jnp.float32)
    with pytest.raises(ValueError, match="3 K and 3 V"):
        module(cases.as_heads(*parts))


def test_what_selectors_keep_and_read():
    shape = HeadShape(query_heads=8, kv_heads=2, head_width=64, value_width=64, model_width=512)
    assert Quest().auxiliary_bits(shape) == 2 * 2 * 64 * 16 / 16
    assert Quest().selector_bytes(shape, 1600) == 2 * 64 * 2 * 2 * 100
    assert Quest().selector_flops(shape, 1600) == 4 * 8 * 64 * 100
    assert DoubleSparsity().auxiliary_bits(shape) == 2 * 16 * 16
    assert DoubleSparsity(label_bits=4).auxiliary_bits(shape) == 2 * (16 * 4 + 32)
    fixed = DoubleSparsity(channels=((1,), (2,)), label_bits=4, ranges=(((0.0, 1.0),),) * 2)
    assert fixed.auxiliary_bits(shape) == 2 * 4
    assert DoubleSparsity().selector_flops(shape, 100) == 2 * 8 * 16 * 100
    assert OracleTopK().auxiliary_bits(shape) == 0
    assert OracleTopK().selector_bytes(shape, 100) == 2 * 64 * 2 * 100
    assert OracleTopK().selector_flops(shape, 100) == 2 * 8 * 64 * 100
    assert TokenSelect().selector_bytes(shape, 100) == 2 * 64 * 2 * 100
    assert RandomKeys().selector_bytes(shape, 100) == RandomKeys().selector_flops(shape, 100) == 0
    assert StreamingLLM().selector_bytes(shape, 100) == 0
    assert H2O().auxiliary_bits(shape) == 64
    assert H2O(budget=20).selector_bytes(shape, 10**6) == 2 * 4 * 2 * 100
    assert H2O(budget=20).selector_flops(shape, 10**6) == 8 * 100
    assert SnapKV().auxiliary_bits(shape) == 0
    assert SnapKV().selector_bytes(shape, 3200) == 2 * 64 * 2 * 100
    assert SnapKV(every=64).selector_flops(shape, 3200) == 2 * 8 * 64 * 3200 * 32 / 64
