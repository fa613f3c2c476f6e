"""A training step on eight simulated devices is the step on one: loss and every gradient."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MECHANISMS = ("dense", "nsa", "infllm_v2", "routing", "moba", "hash", "seer", "dsa")
MESHES = {
    "data": {"data": 4},
    "fsdp": {"data": 1, "fsdp": 4},
    "sequence": {"data": 1, "sequence": 4},
    "tensor": {"data": 1, "tensor": 2},
    "mixed": {"data": 2, "fsdp": 1, "sequence": 2, "tensor": 2},
    "zigzag": {"data": 1, "sequence": 4, "order": "zigzag"},
}
SCRIPT = """
import dataclasses, json, sys
import jax, numpy as np
jax.config.update("jax_enable_x64", True)
from configs.tiny import config as tiny
from sparse_attn.registry import MECHANISMS
from train.config import MeshConfig
from train.sharding import make_mesh
from train.step import make_state, make_train_step, place_state

B, T = 4, 64
draw = np.random.default_rng(0)
tokens = draw.integers(3, 259, (B, T + 1)).astype(np.int32)
segment_ids = np.ones((B, T), np.int32)
segment_ids[1, 40:] = 2          # documents that end inside of shards, and padding
segment_ids[2, 24:] = 2
segment_ids[2, 56:] = 0
positions = np.tile(np.arange(T, dtype=np.int32), (B, 1))
positions[1, 40:] -= 40
positions[2, 24:] -= 24
batch = {
    "tokens": tokens[:, :-1],
    "targets": tokens[:, 1:],
    "weights": (segment_ids > 0).astype(np.float32),
    "segment_ids": segment_ids,
    "positions": positions,
}


def step_of(name, mesh):
    model = dataclasses.replace(
        tiny.model,
        attention=MECHANISMS[name].tiny()[0],
        vocab_size=260,
        query_heads=4,
        kv_heads=2,
        param_dtype="float64",
        compute_dtype="float64",
    )
    fitted = {"objective": "selector", "init_from": "x"} if name in ("hash", "seer", "dsa") else {}
    config = dataclasses.replace(
        tiny, model=model, mesh=mesh, batch_size=B, sequence_length=T, **fitted
    )
    count = mesh.data * mesh.fsdp * mesh.sequence * mesh.tensor
    _, placement = place_state(config, make_mesh(mesh, jax.devices()[:count]))
    state = make_state(config, placement)
    # What is drawn depends on how it is split: all start from what one device drew.
    params = initial.setdefault(name, jax.device_get((state.params, state.state)))
    params, rest = jax.device_put(params, (placement.state.params, placement.state.state))
    state = dataclasses.replace(state, params=params, state=rest)
    state, metrics = make_train_step(config, placement)(state, placement.put_batch(batch))
    moments = state.opt_state[1].mu  # a tenth of the gradient, after clipping
    return jax.device_get((metrics, moments, state.state))


initial, worst = {}, {}
for name, meshes in json.loads(sys.argv[1]):
    one = step_of(name, MeshConfig(data=1))
    for mesh in meshes:
        many = step_of(name, MeshConfig(**mesh))
        errors = []
        for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(many), strict=True):
            a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
            assert np.isfinite(b).all()
            errors.append(np.abs(a - b).max() / max(np.abs(a).max(), 1e-9))
        worst[f"{name} {json.dumps(mesh)}"] = max(errors)
print(json.dumps(worst))
"""


def worst_errors(cases):
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps(cases)],
        cwd=ROOT,
        env={
            **os.environ,
            "XLA_FLAGS": "--xla_backend_optimization_level=0 "
            "--xla_force_host_platform_device_count=8",
        },
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def check(cases):
    errors = worst_errors(cases)
    assert len(errors) == sum(len(meshes) for _, meshes in cases)
    # Metrics are float32; gradients and losses float64.
    assert max(errors.values()) < 1e-6, errors


def test_a_mixed_mesh_and_one_that_splits_heads_alone_take_the_same_step():
    check([("nsa", [MESHES["mixed"], MESHES["tensor"]])])


@pytest.mark.full
@pytest.mark.parametrize("name", MECHANISMS)
def test_every_mesh_takes_the_same_step(name):
    check([(name, list(MESHES.values()))])
