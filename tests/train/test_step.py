"""train.step: the loss by its formula, the update, microbatches, no surprises in the step."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from configs.tiny import config as tiny
from models.transformer import HiddenOutput, abstract, merge
from sparse_attn import Aux, Dense
from train import step as step_module
from train.config import UserError
from train.loop import plan
from train.optimizer import parameter_name
from train.step import make_inspection, make_state, make_train_step, next_token_loss

B, T, V = 4, 16, 259


pytestmark = pytest.mark.usefixtures("compilations")


@pytest.fixture(scope="module")
def config():
    model = dataclasses.replace(tiny.model, attention=Dense(), layers=1)
    return dataclasses.replace(tiny, model=model, batch_size=B, sequence_length=T)


@pytest.fixture
def batch():
    draw = np.random.default_rng(0)
    tokens = draw.integers(3, V, (B, T + 1)).astype(np.int32)
    weights = np.ones((B, T), np.float32)
    weights[1, 10:] = 0
    segment_ids = np.ones((B, T), np.int32)
    segment_ids[1, 10:] = 0
    segment_ids[2, 8:] = 2
    positions = np.tile(np.arange(T, dtype=np.int32), (B, 1))
    positions[2, 8:] -= 8
    return {
        "tokens": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "weights": weights,
        "segment_ids": segment_ids,
        "positions": positions,
    }


def one_step(config, batch, steps=1):
    _, placement = plan(config)
    state, step = make_state(config, placement), make_train_step(config, placement)
    for _ in range(steps):
        state, metrics = step(state, placement.put_batch(batch))
    return jax.device_get((state.params, metrics)), state, step


def close(a, b, tolerance):
    def check(x, y):
        np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance)

    jax.tree.map(check, a, b)


@pytest.mark.parametrize("chunk", [1, 8, 12, 20, 64])
def test_chunked_loss_is_the_whole_one(chunk, x64):
    draw = np.random.default_rng(1)
    hidden = jnp.asarray(draw.normal(size=(2, 7, 5)))
    table = jnp.asarray(draw.normal(size=(5, 11)))
    targets = jnp.asarray(draw.integers(0, 11, (2, 7)))
    weights = jnp.asarray(draw.integers(0, 2, (2, 7)).astype(np.float64))

    def loss(hidden, table, chunk):
        return next_token_loss(lambda h: h @ table, hidden, targets, weights, chunk=chunk)[0]

    scores = np.asarray(hidden @ table)
    p = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
    picked = np.take_along_axis(p, np.asarray(targets)[..., None], -1)[..., 0]
    value, grads = jax.value_and_grad(loss, argnums=(0, 1))(hidden, table, chunk)
    np.testing.assert_allclose(value, -(weights * np.log(picked)).sum(), rtol=1e-12)
    close(grads, jax.grad(loss, argnums=(0, 1))(hidden, table, 10_000), 1e-12)


def test_z_loss_is_the_squared_log_of_the_denominator(x64):
    draw = np.random.default_rng(2)
    scores = jnp.asarray(draw.normal(size=(2, 6, 11)))
    targets = jnp.asarray(draw.integers(0, 11, (2, 6)))
    weights = jnp.asarray(draw.integers(0, 2, (2, 6)).astype(np.float64))
    nll, drift = next_token_loss(lambda s: s, scores, targets, weights, chunk=4, z_loss=0.1)
    expected = 0.1 * (np.asarray(weights) * np.log(np.exp(scores).sum(-1)) ** 2).sum()
    np.testing.assert_allclose(drift, expected, rtol=1e-12)
    alone = next_token_loss(lambda s: s, scores, targets, weights, chunk=64)
    np.testing.assert_allclose(nll, alone[0], rtol=1e-12)
    assert alone[1] == 0


def test_z_loss_is_part_of_the_auxiliary_loss_and_of_the_gradient(config, batch):
    def metrics(z_loss):
        optimizer = dataclasses.replace(config.optimizer, z_loss=z_loss)
        changed = dataclasses.replace(config, optimizer=optimizer)
        return one_step(changed, batch)[0][1]

    without, with_it = metrics(0.0), metrics(1.0)
    assert without["aux_loss"] == 0
    # At the start logits are small, so that the denominator is about the vocabulary.
    np.testing.assert_allclose(with_it["aux_loss"], np.log(V) ** 2, rtol=0.3)
    assert with_it["loss"] == without["loss"]
    assert with_it["grad_norm"] > 1.01 * without["grad_norm"]


def test_chunks_bound_the_memory_of_logits():
    tokens, width, vocabulary = 512, 8, 8192

    def loss(hidden, table, chunk):
        ones = jnp.ones((1, tokens))
        targets = jnp.zeros((1, tokens), jnp.int32)
        return next_token_loss(lambda h: h @ table, hidden, targets, ones, chunk=chunk)[0]

    shapes = [
        jax.ShapeDtypeStruct(s, jnp.float32) for s in ((1, tokens, width), (width, vocabulary))
    ]

    def temporary(chunk):
        compiled = jax.jit(jax.grad(loss, argnums=(0, 1)), static_argnums=2)
        return compiled.lower(*shapes, chunk).compile().memory_analysis().temp_size_in_bytes

    whole = tokens * vocabulary * 4
    assert temporary(tokens) >= whole
    assert temporary(32) < whole / 4


def test_the_step_reports_the_loss_of_its_formula(config, batch):
    (_, metrics), _, _ = one_step(config, batch)
    _, placement = plan(config)
    state = make_state(config, placement)

    @jax.jit
    def log_probabilities(state, tokens, positions, segment_ids):
        decoder = merge(abstract(config.model)[0], state.params, state.state)
        output = decoder(tokens, positions=positions, segment_ids=segment_ids)
        return jax.nn.log_softmax(output.logits)

    logp = log_probabilities(state, batch["tokens"], batch["positions"], batch["segment_ids"])
    picked = np.take_along_axis(logp, batch["targets"][..., None], -1)[..., 0]
    expected = -(batch["weights"] * picked).sum() / batch["weights"].sum()
    np.testing.assert_allclose(metrics["loss"], expected, rtol=1e-5)
    assert metrics["tokens"] == batch["weights"].sum()
    assert metrics["grad_norm"] > 0
    assert metrics["learning_rate"] == pytest.approx(config.optimizer.learning_rate / 3)


def test_padding_does_not_count(config, batch):
    padded = {**batch, "targets": np.where(batch["weights"] > 0, batch["targets"], 7)}
    first, _, _ = one_step(config, batch)
    second, _, _ = one_step(config, padded)
    close(first, second, 0)


def test_microbatches_add_up_to_the_batch(config, batch):
    (params, metrics), _, _ = one_step(config, batch)
    parts = dataclasses.replace(config, microbatches=2)
    (params_parts, metrics_parts), _, _ = one_step(parts, batch)
    close(metrics, metrics_parts, 1e-5)
    # Adam's first update divides by the gradient's size, which magnifies rounding.
    close(params, params_parts, 1e-4)


def test_chunks_of_the_loss_do_not_change_the_step(config, batch):
    whole, _, _ = one_step(config, batch)
    chunked, _, _ = one_step(dataclasses.replace(config, loss_chunk=20), batch)
    close(whole[1], chunked[1], 1e-5)


def test_frozen_parameters_stay_and_the_others_move(config, batch):
    names = ("embedding", "layers/0/attention")
    frozen = dataclasses.replace(config, frozen=names)
    (after, _), state, _ = one_step(frozen, batch)
    before = jax.device_get(make_state(config, plan(config)[1]).params)
    moved = {
        parameter_name(path): bool((old != new).any())
        for (path, old), new in zip(
            jax.tree_util.tree_leaves_with_path(before), jax.tree.leaves(after), strict=True
        )
    }
    for name, changed in moved.items():
        assert changed != any(f"{name}/".startswith(f"{start}/") for start in names), name
    assert sum(moved.values()) not in (0, len(moved))
    # No moments are kept for them either.
    paths = jax.tree_util.tree_leaves_with_path(state.opt_state)
    assert not any("embedding" in parameter_name(path) for path, _ in paths)
    with pytest.raises(UserError, match=r"frozen='layers/7' names no parameter.*final_norm"):
        one_step(dataclasses.replace(config, frozen=("layers/7",)), batch)
    with pytest.raises(UserError, match="leaves nothing to train"):
        one_step(dataclasses.replace(config, frozen=tuple(before)), batch)
    with pytest.raises(ValueError, match="leave one of the two out"):
        dataclasses.replace(frozen, objective="selector", init_from="runs/any")


def test_the_step_compiles_once_gives_up_its_input_and_copies_nothing(config, batch):
    _, placement = plan(config)
    state, step = make_state(config, placement), make_train_step(config, placement)
    old = state
    on_device = placement.put_batch(batch)
    with jax.transfer_guard("disallow"):
        for _ in range(3):
            state, _ = step(state, on_device)
    assert step._cache_size() == 1
    assert int(state.step) == 3
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(old.params))


def test_two_runs_are_bitwise_equal(config, batch):
    first, _, _ = one_step(config, batch, steps=3)
    second, _, _ = one_step(config, batch, steps=3)
    close(first, second, 0)


def test_the_seed_draws_the_parameters(config):
    def table(seed):
        seeded = dataclasses.replace(config, seed=seed)
        return np.asarray(make_state(seeded, plan(seeded)[1]).params["embedding"])

    assert np.array_equal(table(1), table(1))
    assert not np.array_equal(table(1), table(2))


class Counting(nnx.Module):
    """A model whose mechanism counts rows, to see that statistics are applied once a step."""

    def __init__(self, config, *, rngs):
        self.table = nnx.Param(0.1 * jax.random.normal(rngs.params(), (V, 4)))
        self.rows = nnx.Variable(jnp.zeros(()))

    def hidden(self, tokens, *, positions, segment_ids, inspect=False, parallel=None):
        rows = jnp.float32(tokens.shape[0])
        aux = Aux(jnp.float32(0.5), {"seen": rows}, {"rows": rows})
        layers = {"recall_beyond.3": rows, "density.3": rows} if inspect else {}
        return HiddenOutput(self.table[...][tokens], None, aux, layer_metrics=layers)

    def logits(self, hidden):
        return hidden @ self.table[...].T

    def update_state(self, statistics):
        self.rows[...] = 10 * self.rows[...] + statistics["rows"]


@pytest.mark.parametrize("microbatches", [1, 2])
def test_statistics_are_added_up_and_applied_once(config, batch, microbatches, monkeypatch):
    def shapes(model):
        return step_module.split(nnx.eval_shape(lambda: Counting(model, rngs=nnx.Rngs(0))))

    monkeypatch.setattr(step_module, "Decoder", Counting)
    monkeypatch.setattr(step_module, "abstract", shapes)
    parts = dataclasses.replace(config, microbatches=microbatches)
    (_, metrics), state, _ = one_step(parts, batch, steps=2)
    assert float(state.state["rows"]) == 10 * B + B
    assert metrics["aux_loss"] == pytest.approx(0.5)
    assert metrics["seen"] == pytest.approx(B / microbatches)


def test_inspection_draws_a_row_and_changes_nothing(config, batch, monkeypatch):
    def shapes(model):
        return step_module.split(nnx.eval_shape(lambda: Counting(model, rngs=nnx.Rngs(0))))

    monkeypatch.setattr(step_module, "Decoder", Counting)
    monkeypatch.setattr(step_module, "abstract", shapes)
    _, placement = plan(config)
    state = make_state(config, placement)
    metrics = make_inspection(config, placement)(state, placement.put_batch(batch))
    assert {name: float(value) for name, value in metrics.items()} == {
        "seen": 1.0,
        "recall_beyond.3": 1.0,
    }
    assert float(state.state["rows"]) == 0
