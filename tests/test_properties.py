"""What every attention mechanism must satisfy, whatever it is: a registered config is covered.

Items are numbered as in the documentation of the property suite. Index sets flip at near-ties in
float32, so equalities are checked in float64, and float32 only on rows that select the same.

The quick run takes the five core mechanisms through every item, their relatives through those about
values and causality and through drawn appends, policies through drawn appends. All else is marked
``full``, and so is the reference backend by itself (item 9 holds xla to it).
"""

import dataclasses

import attention_cases as cases
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import parallel_cases
import pytest

from sparse_attn import NSA, POLICIES, Dense, HashAttention, InfLLMV2, Routing

CONFIGS = cases.configs()
T = 40


CORE = (Dense, NSA, InfLLMV2, HashAttention, Routing)


def parametrized(quick):
    """All configs; those that ``quick(config, first variant)`` leaves out are marked full."""
    params = [
        pytest.param(
            config, id=name, marks=() if quick(config, name.endswith("-0")) else pytest.mark.full
        )
        for name, config in CONFIGS
    ]
    return pytest.mark.parametrize("config", params)


def is_policy(config):
    return type(config) in POLICIES.values()


appending = parametrized(lambda config, first: first and not isinstance(config, CORE))
first_mechanisms = parametrized(lambda config, first: first and not is_policy(config))
core_mechanisms = parametrized(lambda config, first: first and isinstance(config, CORE))
every_backend = pytest.mark.parametrize(
    "implementation", [pytest.param("reference", marks=pytest.mark.full), "xla"]
)


def require_causal(config):
    if not config.causal:
        pytest.skip("not a causal mechanism")


@first_mechanisms
@every_backend
@pytest.mark.parametrize(
    "shape", [*(pytest.param(g, marks=pytest.mark.full) for g in ("G1", "G2")), "G4"]
)
def test_1_covering_budget_equals_dense(config, implementation, shape, x64):
    shape = cases.SHAPES[shape]
    covering = config.covering(T)
    parts = cases.arrays(shape, covering.kv_branches, 2, T)
    module = cases.mechanism(covering, shape, implementation=implementation)
    selected = 1 if covering.kv_branches == 3 else 0
    dense_parts = (parts[0], parts[1][selected][None], parts[2][selected][None], parts[3])
    dense = cases.mechanism(Dense(implementation="reference"), shape)
    np.testing.assert_allclose(
        cases.forward(module, parts), cases.forward(dense, dense_parts), atol=1e-12
    )


def decode(module, parts, chunks, dtype=jnp.float64, capacity=48, rollback=0, valid=None):
    """Feed ``parts`` through a cache in chunks; ``valid`` [B, T] marks right padding."""
    cache = module.init_cache(parts[0].shape[0], capacity, dtype, rollback=rollback)

    @jax.jit
    def step(parts, cache, segment_ids):
        out, cache, _ = module(cases.as_heads(*parts), cache, segment_ids=segment_ids)
        return out, cache

    outs, at = [], 0
    for size in chunks:
        ids = jnp.ones((parts[0].shape[0], size), jnp.int32)
        if valid is not None:
            ids = valid[:, at : at + size].astype(jnp.int32)
        out, cache = step(cases.cut(parts, at, at + size), cache, ids)
        outs.append(out)
        at += size
    return jnp.concatenate(outs, axis=1), cache


@core_mechanisms
@every_backend
def test_2_prefill_equals_single_steps_equals_chunks(config, implementation, x64):
    require_causal(config)
    shape = cases.SHAPES["G2"]
    parts = cases.arrays(shape, config.kv_branches, 2, T)
    module = cases.mechanism(config, shape, implementation=implementation)
    whole = cases.forward(module, parts)
    for chunks, rollback in (([T], 0), ([1] * T, 0), ([13, 13, 13, 1], 4)):
        got, cache = decode(module, parts, chunks, rollback=rollback)
        np.testing.assert_allclose(got, whole, atol=1e-12, err_msg=f"{chunks=}")
        assert cache.length.tolist() == [T, T]


@core_mechanisms
def test_2_padded_batch_of_mixed_lengths_equals_single_sequences(config, x64):
    require_causal(config)
    shape = cases.SHAPES["G2"]
    parts = cases.arrays(shape, config.kv_branches, 3, T)
    module = cases.mechanism(config, shape)
    lengths = np.array([T, 13, 29])
    # Prefill pads each sequence on the right; decoding then continues where each one stands.
    valid = jnp.asarray(np.arange(T)[None] < lengths[:, None])
    cache = module.init_cache(3, T + 8, jnp.float64)
    ids = valid.astype(jnp.int32)
    prefill = jax.jit(lambda parts, cache: module(cases.as_heads(*parts), cache, segment_ids=ids))
    out, cache, _ = prefill(parts, cache)
    assert cache.length.tolist() == lengths.tolist()
    more = cases.arrays(shape, config.kv_branches, 3, 4, seed=1)
    step = jax.jit(lambda parts, cache: module(cases.as_heads(*parts), cache)[:2])
    steps = []
    for t in range(4):
        got, cache = step(cases.cut(more, t, t + 1), cache)
        steps.append(got)
    continued = jnp.concatenate(steps, axis=1)
    for row, length in enumerate(lengths):
        joined = tuple(
            jnp.concatenate([a[:, row : row + 1, :length], b[:, row : row + 1]], axis=2)
            if a.ndim == 5
            else jnp.concatenate([a[row : row + 1, :length], b[row : row + 1]], axis=1)
            for a, b in zip(parts, more, strict=True)
        )
        alone = cases.forward(module, joined)[0]
        np.testing.assert_allclose(out[row, :length], alone[:length], atol=1e-12)
        np.testing.assert_allclose(continued[row], alone[length:], atol=1e-12)


@core_mechanisms
def test_2_truncation_undoes_tokens(config, x64):
    require_causal(config)
    shape = cases.SHAPES["G2"]
    parts = cases.arrays(shape, config.kv_branches, 2, T)
    wrong = cases.arrays(shape, config.kv_branches, 2, 4, seed=7)
    module = cases.mechanism(config, shape)
    whole = cases.forward(module, parts)
    cache = module.init_cache(2, T + 4, jnp.float64, rollback=4)
    step = jax.jit(lambda parts, cache: module(cases.as_heads(*parts), cache)[:2])
    _, cache = step(cases.cut(parts, 0, 21), cache)
    _, cache = step(wrong, cache)
    cache = cache.truncate(jnp.asarray([21, 21]))
    for t in range(21, T):
        out, cache = step(cases.cut(parts, t, t + 1), cache)
        np.testing.assert_allclose(out[:, 0], whole[:, t], atol=1e-12)
    with pytest.raises(ValueError, match="cut lengths"):
        cache.truncate(cache.length + 1)


@first_mechanisms
@every_backend
def test_3_later_tokens_change_nothing_earlier(config, implementation, x64):
    require_causal(config)
    shape = cases.SHAPES["G2"]
    parts = cases.arrays(shape, config.kv_branches, 1, T)
    other = cases.arrays(shape, config.kv_branches, 1, T, seed=3)
    module = cases.mechanism(config, shape, implementation=implementation)
    run = jax.jit(lambda parts: module(cases.as_heads(*parts))[0])
    whole = run(parts)
    for t in (1, 8, 23):
        mixed = tuple(
            jnp.concatenate([a[:, :, :t], b[:, :, t:]], axis=2)
            if a.ndim == 5
            else jnp.concatenate([a[:, :t], b[:, t:]], axis=1)
            for a, b in zip(parts, other, strict=True)
        )
        np.testing.assert_array_equal(run(mixed)[:, :t], whole[:, :t])

    t = 19
    gradients = jax.jit(jax.grad(lambda parts: jnp.sum(run(parts)[:, t] ** 2)))(parts)
    for gradient in gradients:
        late = gradient[:, :, t + 1 :] if gradient.ndim == 5 else gradient[:, t + 1 :]
        assert (late == 0).all()
    assert all((gradient != 0).any() for gradient in gradients[1:3])


@core_mechanisms
@every_backend
def test_4_packed_documents_equal_separate_documents(config, implementation, x64):
    shape = cases.SHAPES["G2"]
    module = cases.mechanism(config, shape, implementation=implementation)
    alignment = config.alignment
    lengths = [13, 16, 5]
    starts, at = [], 0
    for length in lengths:
        starts.append(at)
        at += -(-length // alignment) * alignment
    total = 48
    ids = np.zeros((1, total), np.int32)
    for number, (start, length) in enumerate(zip(starts, lengths, strict=True)):
        ids[0, start : start + length] = number + 1
    parts = cases.arrays(shape, config.kv_branches, 1, total)
    packed = cases.forward(module, parts, segment_ids=jnp.asarray(ids))
    for start, length in zip(starts, lengths, strict=True):
        alone = cases.forward(module, cases.cut(parts, start, start + length))
        np.testing.assert_allclose(packed[:, start : start + length], alone, atol=1e-12)
    if alignment > 1:
        shifted = np.roll(ids, 1, axis=1)
        with pytest.raises(ValueError, match="alignment"):
            module(cases.as_heads(*parts), segment_ids=jnp.asarray(shifted))


def documents(alignment, total):
    """Layouts of a row of ``total`` tokens: lengths of documents that start on ``alignment``."""

    def place(lengths):
        placed, at = [], 0
        for length in lengths:
            length = min(length, total - at)
            if length < 1:
                break
            placed.append((at, length))
            at += -(-length // alignment) * alignment
        return placed

    return st.lists(st.integers(1, total), min_size=1, max_size=5).map(place)


@first_mechanisms
@hypothesis.settings(parent=hypothesis.settings.get_profile("shared"), max_examples=cases.EXAMPLES)
@hypothesis.given(data=st.data())
def test_4_any_layout_of_documents_equals_each_alone(config, data):
    shape = cases.SHAPES[data.draw(st.sampled_from(cases.DRAWN_SHAPES), label="shape")]
    layouts = [data.draw(documents(config.alignment, T), label="layout") for _ in range(2)]
    with jax.enable_x64(True):
        run = cases.compiled_forward(config, shape, 2, T)
        parts = cases.arrays(shape, config.kv_branches, 2, T)
        ids = np.zeros((2, T), np.int32)
        for row, layout in enumerate(layouts):
            for number, (start, length) in enumerate(layout):
                ids[row, start : start + length] = number + 1
        packed = run(parts, ids)
        assert (np.asarray(packed)[ids == 0] == 0).all()
        for row, layout in enumerate(layouts):
            start, length = data.draw(st.sampled_from(layout), label="document")
            alone = np.zeros((2, T), np.int32)
            alone[row, :length] = 1
            moved = jax.tree.map(
                lambda a, s=start: jnp.roll(a, -s, axis=2 if a.ndim == 5 else 1), parts
            )
            np.testing.assert_allclose(
                packed[row, start : start + length], run(moved, alone)[row, :length], atol=1e-12
            )


@appending
@hypothesis.settings(parent=hypothesis.settings.get_profile("shared"), max_examples=cases.EXAMPLES)
@hypothesis.given(data=st.data())
def test_2_ragged_appends_equal_the_whole(config, data):
    require_causal(config)
    shape = cases.SHAPES[data.draw(st.sampled_from(cases.DRAWN_SHAPES), label="shape")]
    chunk = 5
    with jax.enable_x64(True):
        parts = cases.arrays(shape, config.kv_branches, 2, T)
        whole = cases.compiled_forward(config, shape, 2, T)(parts, np.ones((2, T), np.int32))
        step, cache = cases.compiled_step(config, shape, 2, T, chunk)
        done = np.zeros(2, int)
        for _ in range(40):
            counts = np.array([data.draw(st.integers(0, chunk), label="tokens") for _ in range(2)])
            counts = np.minimum(counts, T - done)
            index = np.minimum(done[:, None] + np.arange(chunk)[None], T - 1)
            piece = tuple(
                np.stack([np.asarray(a)[..., b, index[b], :, :] for b in range(2)], axis=1)
                if a.ndim == 5
                else np.stack([np.asarray(a)[b, index[b]] for b in range(2)])
                for a in parts
            )
            ids = (np.arange(chunk)[None] < counts[:, None]).astype(np.int32)
            out, cache = step(piece, cache, ids)
            for b in range(2):
                np.testing.assert_allclose(
                    out[b, : counts[b]], whole[b, done[b] : done[b] + counts[b]], atol=1e-12
                )
            done = done + counts
            assert cache.length.tolist() == done.tolist()
            if (done == T).all():
                break


@core_mechanisms
@pytest.mark.parametrize(
    "tokens", [1, *(pytest.param(n, marks=pytest.mark.full) for n in (3, 4, 5, 7, 8, 9))]
)
def test_5_edge_lengths_are_finite_and_right(config, tokens, x64):
    shape = cases.SHAPES["G1"]
    parts = cases.arrays(shape, config.kv_branches, 2, tokens)
    reference = cases.mechanism(config, shape, implementation="reference")
    module = cases.mechanism(config, shape, implementation="xla")
    out = cases.forward(module, parts)
    assert jnp.isfinite(out).all()
    np.testing.assert_allclose(out, cases.forward(reference, parts), atol=1e-12)


@core_mechanisms
@every_backend
def test_5_padded_rows_are_zero_with_zero_gradient(config, implementation, x64):
    shape = cases.SHAPES["G2"]
    parts = cases.arrays(shape, config.kv_branches, 2, 16)
    module = cases.mechanism(config, shape, implementation=implementation)
    ids = jnp.asarray([[1] * 9 + [0] * 7, [0] * 16], jnp.int32)

    def total(parts):
        out = module(cases.as_heads(*parts), segment_ids=ids)[0]
        return jnp.sum(out**2), out

    gradients, out = jax.jit(jax.grad(total, has_aux=True))(parts)
    assert (out[1] == 0).all()
    assert (out[0, 9:] == 0).all()
    assert (out[0, :9] != 0).any()
    for gradient in gradients:
        assert jnp.isfinite(gradient).all()
        line = gradient[:, 1] if gradient.ndim == 5 else gradient[1]
        assert (line == 0).all()


def agreeing_rows(config, *runs):
    """Rows [B, T] on which all selections are the same (all rows if nothing is selected)."""
    selections = [aux.selection for _, aux in runs]
    if any(selection is None for selection in selections):
        return np.ones(runs[0][0].shape[:2], bool)
    first = np.asarray(selections[0].indices)
    same = [(np.asarray(s.indices) == first).all(axis=(2, 3)) for s in selections]
    return np.all(same, axis=0)


@core_mechanisms
def test_6_large_logits_do_not_overflow(config):
    shape = cases.SHAPES["G2"]
    outs = {}
    for dtype in (jnp.float32, jnp.float64):
        with jax.enable_x64(dtype == jnp.float64):
            parts = cases.arrays(shape, config.kv_branches, 1, T, dtype=dtype, scale=100.0)
            module = cases.mechanism(config, shape, dtype=dtype)
            assert float(jnp.max(jnp.abs(parts[0]))) > 200
            outs[dtype] = cases.call(module, parts, inspect=True)
    single, double = outs[jnp.float32], outs[jnp.float64]
    assert np.isfinite(single[0]).all()
    rows = agreeing_rows(config, single, double)
    assert rows.mean() > 0.9
    # A softmax this sharp turns the rounding of a logit (200 * 2^-24) into about 1e-4.
    np.testing.assert_allclose(np.asarray(single[0])[rows], np.asarray(double[0])[rows], atol=2e-3)


@core_mechanisms
def test_7_float32_gradients_agree_with_a_float64_reference(config):
    shape = cases.SHAPES["G2"]
    results = {}
    for dtype, implementation in ((jnp.float32, "xla"), (jnp.float64, "reference")):
        with jax.enable_x64(dtype == jnp.float64):
            parts = cases.arrays(shape, config.kv_branches, 1, T, dtype=dtype)
            module = cases.mechanism(config, shape, dtype=dtype, implementation=implementation)
            results[dtype] = (module, parts, cases.call(module, parts, inspect=True))
    rows = agreeing_rows(config, results[jnp.float32][2], results[jnp.float64][2])
    assert rows.mean() > 0.9
    weights = np.random.default_rng(5).standard_normal(results[jnp.float64][2][0].shape)
    weights *= rows[..., None, None]
    gradients = {}
    for dtype, (module, parts, _) in results.items():
        with jax.enable_x64(dtype == jnp.float64):
            seed = jnp.asarray(weights, dtype)
            run = jax.grad(lambda p, m=module, s=seed: jnp.sum(m(cases.as_heads(*p))[0] * s))
            gradients[dtype] = jax.jit(run)(parts)
    for single, double in zip(gradients[jnp.float32], gradients[jnp.float64], strict=True):
        np.testing.assert_allclose(single, double, atol=2e-5)


@core_mechanisms
def test_8_second_run_is_bitwise_equal(config):
    shape = cases.SHAPES["G2"]
    parts = cases.arrays(shape, config.kv_branches, 2, T, dtype=jnp.float32)
    module = cases.mechanism(config, shape, dtype=jnp.float32)

    @jax.jit
    def both(parts):
        def total(parts):
            out = module(cases.as_heads(*parts))[0]
            return jnp.sum(out**2), out

        return jax.grad(total, has_aux=True)(parts)

    for a, b in zip(jax.tree.leaves(both(parts)), jax.tree.leaves(both(parts)), strict=True):
        np.testing.assert_array_equal(a, b)


@first_mechanisms
def test_9_xla_equals_reference_with_poisoned_padding(config, x64):
    shape = cases.SHAPES["G2"]
    clean = cases.arrays(shape, config.kv_branches, 2, T)
    lengths = np.array([29, 8])
    ids = jnp.asarray(np.arange(T)[None] < lengths[:, None], jnp.int32)
    padding = np.asarray(ids == 0)
    poisoned = tuple(
        jnp.asarray(np.where(padding[None, :, :, None, None], np.nan, part))
        if part.ndim == 5
        else part
        for part in clean
    )

    def run(implementation, parts):
        module = cases.mechanism(config, shape, implementation=implementation)
        seed = jnp.asarray(np.random.default_rng(2).standard_normal((2, T, 4, 8)))
        seed = seed * ids[..., None, None]

        def total(parts):
            out = module(cases.as_heads(*parts), segment_ids=ids)[0]
            return jnp.sum(jnp.where(ids[..., None, None] > 0, out * seed, 0.0)), out

        gradients, out = jax.jit(jax.grad(total, has_aux=True))(parts)
        return out, gradients

    want, want_gradients = run("reference", clean)
    got, got_gradients = run("xla", poisoned)
    for row, length in enumerate(lengths):
        np.testing.assert_allclose(got[row, :length], want[row, :length], atol=1e-12)
    for a, b in zip(got_gradients, want_gradients, strict=True):
        kept = np.broadcast_to(~padding[None, :, :, None, None], a.shape) if a.ndim == 5 else None
        a, b = (np.asarray(a), np.asarray(b)) if kept is None else (a[kept], b[kept])
        np.testing.assert_allclose(a, b, atol=1e-11)


def split_cases(full):
    """Configs on simulated devices: the core mechanisms' first variants quickly, the rest in full.

    Registered ones only, whatever they are; a mechanism that is added is covered.
    """
    for name, config in CONFIGS:
        core = isinstance(config, CORE) and name.endswith("-0")
        few = isinstance(config, Dense | NSA)
        quick = (8, 2) if core and few else (8,) if core else ()
        for sequence in (1, 2, 4, 8):
            if (sequence in quick) != full:
                yield parallel_cases.Case(name, sequence=sequence)


@pytest.mark.parametrize("full", [False, pytest.param(True, marks=pytest.mark.full)])
def test_10_sequences_split_over_devices_equal_one_device(full):
    cases = list(split_cases(full))
    for case, found in zip(cases, parallel_cases.compare(cases), strict=True):
        for what in ("output", "gradients", "parameters", "statistics"):
            assert found[what] < 1e-12, (case, what, found)
        assert found["loss"] < 1e-7, "a loss is float32"
        assert found["selects_the_same"] in (True, None), case
        assert found["selects_the_same"] or not is_selecting(case.config), case


def is_selecting(name):
    return not isinstance(dict(CONFIGS)[name], Dense)


@core_mechanisms
def test_11_compiled_memory_grows_linearly(config):
    shape = cases.SHAPES["G2"]
    module = cases.mechanism(config, shape, dtype=jnp.float32)

    def temporary_bytes(tokens):
        parts = [
            jax.ShapeDtypeStruct(a.shape, jnp.float32)
            for a in jax.eval_shape(
                lambda: cases.arrays(shape, config.kv_branches, 1, tokens, dtype=jnp.float32)
            )
        ]
        gradient = jax.grad(lambda p: jnp.sum(module(cases.as_heads(*p))[0] ** 2))
        compiled = jax.jit(gradient).lower(tuple(parts)).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporary_bytes(4096) < 4.6 * temporary_bytes(1024)


@first_mechanisms
def test_inspection_measures_quality_and_cost(config):
    if isinstance(config, Dense):
        pytest.skip("selects nothing")
    shape = cases.SHAPES["G2"]
    parts = cases.arrays(shape, config.kv_branches, 1, T, dtype=jnp.float32)
    module = cases.mechanism(config, shape, dtype=jnp.float32)
    _, aux = cases.call(module, parts, inspect=True)
    measured = {name: float(value) for name, value in aux.metrics.items()}
    assert 0 < measured["recall_top32"] <= 1
    assert 0 < measured["captured_mass"] <= 1 + 1e-6
    assert measured["output_error"] <= measured["output_error_p95"]
    assert 0 < measured["density"] <= 1
    assert 0 < measured["fetched_density"] <= config.kv_branches
    assert measured["bytes_density"] >= measured["fetched_density"] - 1e-6
    assert measured["flops_density"] >= measured["density"] - 0.2
    assert measured["auxiliary_bits"] == pytest.approx(config.auxiliary_bits(shape))
    assert measured["density"] <= config.density(T) + 1e-6, "denser than config.density says"
    assert config.density(T) <= 1 + 1e-6, "more than all causal pairs"
    indices = np.asarray(aux.selection.indices)
    listed = indices >= 0
    assert not (listed[..., 1:] & ~listed[..., :-1]).any(), "unused slots (-1) must come last"
    assert (np.diff(indices)[listed[..., 1:]] > 0).all(), "lists must ascend, without duplicates"


@core_mechanisms
def test_dense_attend_equals_dense_and_inspection_still_shows_the_sparse_choice(config, x64):
    if isinstance(config, Dense | NSA):
        pytest.skip("dense anyway, or (NSA) dense in its selected branch only")
    shape = cases.SHAPES["G2"]
    parts = cases.arrays(shape, config.kv_branches, 1, T)
    module = cases.mechanism(config, shape)
    out, aux = cases.call(module, parts, attend="dense", inspect=True)
    dense = cases.mechanism(Dense(implementation="reference"), shape)
    np.testing.assert_allclose(out, cases.forward(dense, parts), atol=1e-12)
    _, sparse = cases.call(module, parts, inspect=True)
    np.testing.assert_array_equal(aux.selection.indices, sparse.selection.indices)


@core_mechanisms
def test_9_long_sequences_run_sparse_and_equal_the_reference(config, x64):
    """Beyond the lengths at which executions fall back to dense work."""
    shape, length = cases.SHAPES["G2"], 320
    parts = cases.arrays(shape, config.kv_branches, 1, length)
    found = [
        cases.forward(cases.mechanism(config, shape, implementation=name), parts)
        for name in ("xla", "reference")
    ]
    np.testing.assert_allclose(*found, atol=1e-12)


def test_every_registered_config_is_frozen_and_states_its_contract():
    for _, config in CONFIGS:
        assert dataclasses.is_dataclass(config)
        assert config.__dataclass_params__.frozen
        hash(config)
        assert config.alignment >= 1
        assert config.kv_branches >= 1
        assert config.covering(64).density(64) > 0
