"""train.optimizer: schedules by their values, and what is decayed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.tiny import config as tiny
from models.transformer import ModelConfig, abstract
from train.config import OptimizerConfig
from train.optimizer import decay_mask, learning_rate_schedule, make_optimizer, parameter_name


def rates(steps, **fields):
    schedule = learning_rate_schedule(OptimizerConfig(learning_rate=1.0, **fields), steps)
    return np.array([float(schedule(step)) for step in range(steps + 1)])


@pytest.mark.parametrize("schedule", ["cosine", "wsd", "constant"])
def test_warmup_rises_linearly_to_the_top(schedule):
    values = rates(20, schedule=schedule, warmup_steps=4)
    np.testing.assert_allclose(values[:5], [0.2, 0.4, 0.6, 0.8, 1.0], rtol=1e-6)


def test_cosine_ends_at_the_final_fraction():
    values = rates(20, schedule="cosine", warmup_steps=4, final_fraction=0.1)
    progress = np.arange(17) / 16
    expected = 0.1 + 0.9 * 0.5 * (1 + np.cos(np.pi * progress))
    np.testing.assert_allclose(values[4:], expected, rtol=1e-5)


def test_wsd_is_flat_and_then_falls_linearly():
    values = rates(20, schedule="wsd", warmup_steps=4, decay_fraction=0.25, final_fraction=0.2)
    np.testing.assert_allclose(values[4:16], 1.0)
    np.testing.assert_allclose(values[15:], np.linspace(1.0, 0.2, 6), rtol=1e-5)


def test_constant_stays():
    np.testing.assert_allclose(rates(9, schedule="constant", warmup_steps=0), 1.0)


def test_warmup_longer_than_the_run_only_rises():
    values = rates(3, schedule="cosine", warmup_steps=100)
    assert np.all(np.diff(values[:3]) > 0)


def names_decayed(model):
    mask = decay_mask(abstract(model)[1])
    return {parameter_name(path) for path, on in jax.tree.leaves_with_path(mask) if on}


def test_only_matrices_are_decayed():
    model = ModelConfig(
        **{
            **{f: getattr(tiny.model, f) for f in tiny.model.__dataclass_fields__},
            "tie_embeddings": False,
            "qkv_bias": True,
            "query_key_norm": True,
        }
    )
    compress = [f"mechanism/compress_{kv}/w_{io}" for kv in "kv" for io in ("in", "out")]
    gates = ["mechanism/gates/w_in", "mechanism/gates/w_out"]
    attention = [f"layers/0-1/attention/{name}" for name in ["q", "k", "v", "o", *compress, *gates]]
    mlp = [f"layers/0-1/mlp/{name}" for name in ("gate", "up", "down")]
    assert names_decayed(model) == {"unembedding", *attention, *mlp}


def test_one_update_is_adamw_after_clipping():
    config = OptimizerConfig(
        learning_rate=0.1,
        schedule="constant",
        warmup_steps=0,
        weight_decay=0.5,
        clip_norm=1.0,
        epsilon=1e-8,
    )
    optimizer = make_optimizer(config, 10)
    params = {"matrix": jnp.full((2, 2), 2.0), "final_norm": {"scale": jnp.full(2, 3.0)}}
    grads = jax.tree.map(lambda p: jnp.full_like(p, 100.0), params)
    updates, state = optimizer.update(grads, optimizer.init(params), params)
    # Adam's first step is sign(gradient), whatever its size.
    np.testing.assert_allclose(updates["matrix"], -0.1 * (1 + 0.5 * 2.0), rtol=1e-5)
    np.testing.assert_allclose(updates["final_norm"]["scale"], -0.1, rtol=1e-5)
    clipped = jax.tree.leaves(state[1].mu)
    norm = np.sqrt(sum(np.sum(np.square(leaf)) for leaf in clipped)) / (1 - config.beta1)
    np.testing.assert_allclose(norm, 1.0, rtol=1e-5)
