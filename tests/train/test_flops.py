"""train.flops: the rule, by hand, and the speed fields that follow from it."""

import dataclasses
import types

import pytest

from configs.tiny import config as tiny
from models.transformer import abstract
from sparse_attn import Dense
from train.flops import TokenFlops, peak_flops, token_flops
from train.reporting import Clock

MODEL = dataclasses.replace(
    tiny.model,
    vocab_size=300,
    layers=2,
    model_width=16,
    query_heads=4,
    kv_heads=2,
    head_width=8,
    mlp_width=24,
    attention=Dense(),
)
# q, k, v and o; gate, up and down.
LAYER = 16 * (4 + 2 + 2 + 4) * 8 + 3 * 16 * 24


def flops_of(config):
    return token_flops(config, abstract(config.model)[1])


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("scan", [True, False])
def test_dense_tokens_by_hand(tied, scan):
    model = dataclasses.replace(MODEL, tie_embeddings=tied, scan_layers=scan)
    config = dataclasses.replace(tiny, model=model, sequence_length=128)
    attention = 2 * 4 * (2 * 8 + 2 * 8) * (128 + 1) / 2  # two layers, causal mean
    expected = 3 * (2 * (2 * LAYER + 300 * 16) + attention)
    assert flops_of(config) == TokenFlops(expected, expected)


def test_a_selector_that_fits_runs_forward_only():
    model = dataclasses.replace(MODEL, attention=tiny.model.attention)
    config = dataclasses.replace(tiny, model=model, sequence_length=128)
    trained = flops_of(config)
    fitted = flops_of(dataclasses.replace(config, objective="selector", init_from="runs/other"))
    assert fitted.executed == pytest.approx(trained.executed / 3)


def test_sparse_tokens_execute_what_they_attend():
    model = dataclasses.replace(MODEL, attention=tiny.model.attention)
    config = dataclasses.replace(tiny, model=model, sequence_length=4096)
    flops = flops_of(config)
    saved = (1 - model.attention.density(4096)) * 3 * 2 * 4 * (2 * 8 + 2 * 8) * (4096 + 1) / 2
    assert flops.dense_equivalent - flops.executed == pytest.approx(saved)
    assert flops.executed < flops.dense_equivalent


def test_utilisation_where_the_peak_is_known(monkeypatch):
    chips = [types.SimpleNamespace(device_kind="TPU v5 lite")] * 4
    assert peak_flops(chips) == 4 * 197e12
    assert peak_flops([types.SimpleNamespace(device_kind="TPU v5")]) == 459e12
    assert peak_flops([*chips, types.SimpleNamespace(device_kind="cpu")]) is None

    moments = iter([0.0, 2.0])
    monkeypatch.setattr("time.monotonic", lambda: next(moments))
    row = Clock(TokenFlops(4e9, 1e9), peak=1e13).tick(tokens=1000)
    assert row == {
        "seconds": 2.0,
        "tokens_per_second": 500.0,
        "teraflops_per_second": 0.5,
        "mfu": 0.05,
        "dense_equivalent_teraflops_per_second": 2.0,
        "dense_equivalent_mfu": 0.2,
    }
