"""The grid of sparse SmolLM2: what its rows say, and that equal settings mean equal budgets."""

import argparse
import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest
from evaluation_cases import load_script

from models.config import ModelConfig
from sparse_attn import HashAttention
from sparse_attn.types import HeadShape, Selection
from train.evaluation.protocols import Inspection, Score

SHAPE = HeadShape(query_heads=9, kv_heads=3, head_width=64, value_width=64, model_width=576)


@pytest.fixture(scope="module")
def grid():
    return load_script("smollm2_grid")


@pytest.mark.parametrize("length", [1024, 4096, 8192])
def test_policies_of_a_budget_attend_alike(grid, length):
    for share in (1 / 8, 1 / 16, 1 / 32):
        least = grid.SINKS + grid.RECENT + share * length
        for policy in ("oracle", "quest", "random", "streaming"):
            config = grid.policy_config(policy, share, length)
            assert config.lists(SHAPE) in (1, 3)
            assert least <= config.attended(length) <= least + 16
        blocks = grid.policy_config("infllm_v2", share, length)
        # One block of sinks, two that cover the window, and the budget in whole blocks.
        assert 3 * 64 + share * length <= blocks.selected_blocks * 64 < 4 * 64 + share * length


def test_labels_have_as_many_bits_as_codes(grid):
    q, k = np.random.default_rng(0).standard_normal((2, 1, 50, 9, 64)).astype(np.float32)
    labels = grid.double_sparsity(q, k[:, :, :3])
    assert labels.auxiliary_bits(SHAPE) == HashAttention(bits=32).auxiliary_bits(SHAPE) == 96
    assert dataclasses.replace(labels, ranges=()).auxiliary_bits(SHAPE) == 2 * 96


def test_random_projections_hash_queries_and_keys_alike(grid):
    config = ModelConfig(
        vocab_size=8,
        layers=2,
        model_width=16,
        query_heads=4,
        kv_heads=2,
        head_width=8,
        mlp_width=16,
        dense_layers=(0,),
        scan_layers=False,
    )
    mapping = grid.random_projections(config)
    wanted = mapping.configured(config)
    from models.transformer import abstract

    params = mapping.put_into(abstract(wanted)[1], wanted)
    maps = params["layers"]["1"]["attention"]["mechanism"]
    np.testing.assert_array_equal(maps["phi_q"]["w_out"], maps["phi_k"]["w_out"])
    assert jnp.std(maps["phi_q"]["w_out"]) == pytest.approx(1, abs=0.1)


def record(policy, sample, value, **more):
    budget = "1" if policy == "dense" else "1/32"
    cell = {"policy": policy, "budget": budget, "protocol": "B", "task": "nll", "length": 1024}
    return {**cell, "sample": sample, "value": value, "answer_nats": value, **more}


def test_rows_compare_the_same_samples(grid):
    records = [record("dense", i, 2.0 + i) for i in range(8)]
    records += [record("hash", i, 2.5 + i, recall=0.25 * i) for i in range(4)]
    dense, hashed = grid.rows_of(records)
    assert (dense["policy"], dense["samples"], dense["value"]) == ("dense", 8, 5.5)
    assert dense["low"] < 5.5 < dense["high"]
    assert dense["over_dense"] == 0
    assert dense["recall"] == 1
    assert hashed["samples"] == 4
    assert [hashed[f"over_dense{end}"] for end in ("", "_low", "_high")] == [0.5] * 3
    assert hashed["recall"] == 0.375
    assert hashed["captured_mass"] is None
    promised = "policy budget protocol task length value low high samples density_bytes recall"
    assert set(promised.split()) <= set(hashed)


def test_quality_is_drawn_against_bytes(grid, tmp_path):
    records = [record("dense", i, 2.0 + i) for i in range(3)]
    for policy, bytes_read in (("hash", 0.2), ("oracle", 0.6)):
        records += [record(policy, i, 2.1 + i, density_bytes=bytes_read) for i in range(3)]
    records += [{**r, "task": "niah_single_2", "value": 1.0} for r in records]
    rows = grid.rows_of(records)
    grid.plot(rows, tmp_path / "pictures" / "grid.png", (1024, 4096))
    from matplotlib import pyplot

    image = pyplot.imread(tmp_path / "pictures" / "grid.png")
    assert image.shape[:2] == (720, 920)
    hashed = next(row for row in rows if row["policy"] == "hash" and row["task"] == "nll")
    figure, axis = pyplot.subplots()
    grid.curve(axis, [hashed], 2)
    line = axis.containers[0].lines[0]
    assert (line.get_xdata()[0], line.get_ydata()[0]) == pytest.approx((0.2, 0.1))
    pyplot.close(figure)


def test_densities_count_the_dense_layers(grid):
    layer = {"recall_beyond": 0.5, "captured_mass": 0.9, "density": 0.1, "bytes_density": 0.2}
    layers = ({}, *([layer] * 29))
    seen = Inspection(layers, np.arange(0), (None,) * 30)
    found = Score(np.array([1.0, 3.0]), np.array([True, False]), seen)
    got = grid.record_of(grid.Cell("hash", "1/32", "B", "niah_single_2", 1024), 5, found)
    assert got["value"] == 0
    assert got["answer_nats"] == 2
    assert got["density_bytes"] == pytest.approx((1 + 29 * 0.2) / 30)
    assert got["recall"] == pytest.approx(0.5)
    assert "recall_retrieval" not in got
    text = grid.record_of(grid.Cell("hash", "1/32", "B", "nll", 1024), 5, found)
    assert text["value"] == 2


def test_recall_of_heads_counts_their_own_most_attended_keys(grid):
    keys, heads = 200, ((1, 0), (1, 5), (0, 3))
    weights = np.zeros((3, 2, keys))
    # Sinks (0 to 15) and recent keys (from 135 and 136 on) do not count.
    weights[:, :, :16] = weights[:, :, 136:] = 9
    weights[:, :, 40:72] = 1
    lists = -np.ones((2, 3, 40), np.int32)
    lists[:, 0, :24] = 40 + np.arange(24)  # of the query heads 0 to 2
    lists[1, 1, :32] = 40 + np.arange(32)  # of 3 to 5, in the last row only
    by_token = Inspection(({},) * 2, np.arange(2), (None, Selection(jnp.asarray(lists), 1)))
    assert grid.recall_of(grid.most_attended(weights[:1]), by_token, heads[:1], 9) == 24 / 32
    assert grid.recall_of(grid.most_attended(weights), by_token, heads, 9) == (24 / 32 + 0.5) / 2
    assert grid.recall_of(grid.most_attended(weights[2:]), by_token, heads[2:], 9) is None
    blocks = Selection(jnp.asarray([[[3]]] * 2, jnp.int32), 16)  # keys 48 to 63
    by_block = Inspection(({},) * 2, np.arange(2), (None, blocks))
    assert grid.recall_of(grid.most_attended(weights[:2]), by_block, heads[:2], 9) == 0.5


def test_what_is_done_is_not_run_again(grid, tmp_path, monkeypatch):
    class Pretend:
        asked: list = []  # noqa: RUF012

        def __init__(self, options):
            self.asked.clear()

        def run(self, cells, sample, inspect):
            for cell in cells:
                self.asked.append((cell.policy, sample, inspect))
                yield record(cell.policy, sample, 1.0)

    monkeypatch.setattr(grid, "Grid", Pretend)
    monkeypatch.setattr(grid.jax.config, "update", lambda *_: None)
    path = tmp_path / "grid.json"
    flags = [
        "--json",
        str(path),
        "--compiled",
        str(tmp_path),
        "--tasks",
        "nll",
        "--lengths",
        "1024",
    ]
    flags += ["--budgets", "1/32", "--inspected", "1"]
    assert grid.main([*flags, "--policies", "dense,hash", "--samples", "2"]) == 0
    assert Pretend.asked == [
        ("dense", 0, True),
        ("hash", 0, True),
        ("dense", 1, False),
        ("hash", 1, False),
    ]
    assert grid.main([*flags, "--policies", "dense,hash,random", "--samples", "3"]) == 0
    assert [policy for policy, sample, _ in Pretend.asked if sample < 2] == ["random", "random"]
    assert {row["policy"]: row["samples"] for row in json.loads(path.read_text())} == {
        "dense": 3,
        "hash": 3,
        "random": 3,
    }
    grid.main([*flags, "--policies", "dense", "--samples", "9", "--minutes", "-1"])
    assert Pretend.asked == []


def test_samples_come_round_robin_and_wrong_names_are_refused(grid, capsys):
    options = argparse.Namespace(
        **{
            "first": 1,
            "samples": 2,
            "lengths": (8, 16),
            "tasks": ("nll",),
            "protocols": ("A", "B"),
        },
        **{"policies": ("dense", "hash"), "budgets": ("1/8", "1/32")},
    )
    found = list(grid.groups(options))
    assert [group.sample for group in found] == [1] * 4 + [2] * 4
    assert [cell.budget for cell in found[0].cells] == ["1", "1/8", "1/32"]
    with pytest.raises(SystemExit):
        grid.parse(["--policies", "hsah"])
    assert "--policies hsah: choose of dense,oracle" in capsys.readouterr().err
