"""train.checkpoint: what comes back is what was saved, or a clear error says why not."""

import dataclasses
import json
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from configs.tiny import config as tiny
from models.transformer import split
from sparse_attn import Dense
from train.checkpoint import CheckpointError, Checkpoints, load_decoder
from train.loop import plan
from train.step import make_state

SMALL = {
    "weights": {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones(4, np.int32)},
    "empty": {},
    "key": None,
}


def small_state():
    state = {**SMALL, "key": jax.random.key(7), "half": jnp.arange(3, dtype=jnp.bfloat16)}
    return jax.tree.map(jnp.asarray, state)


def shapes_of(state):
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), state
    )


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A run folder with the steps 3 and 5 of a small state."""
    folder = tmp_path_factory.mktemp("saved")
    with Checkpoints(folder, keep=2) as checkpoints:
        for step in (1, 3, 5):
            checkpoints.save(step, small_state(), {"next_index": step}, tiny)
    return folder


@pytest.fixture
def copied(saved, tmp_path):
    """A copy that a test may damage."""
    return shutil.copytree(saved, tmp_path / "run")


def restore(folder, step=None, shapes=None):
    with Checkpoints(folder, read_only=True) as checkpoints:
        return checkpoints.restore(shapes or shapes_of(small_state()), step)


def test_everything_comes_back(saved):
    restored = restore(saved)
    assert restored.step == 5
    assert restored.input_state == {"next_index": 5}
    assert restored.config == tiny
    state = small_state()
    np.testing.assert_array_equal(restored.state["weights"]["a"], state["weights"]["a"])
    np.testing.assert_array_equal(restored.state["weights"]["b"], state["weights"]["b"])
    assert restored.state["half"].dtype == jnp.bfloat16
    assert restored.state["empty"] == {}
    draws = [jax.random.normal(s["key"], (3,)) for s in (restored.state, state)]
    np.testing.assert_array_equal(*draws)


def test_the_newest_are_kept(saved):
    with Checkpoints(saved, read_only=True) as checkpoints:
        assert checkpoints.steps == [3, 5]
    assert restore(saved, 3).input_state == {"next_index": 3}


def test_parts_can_be_read(saved):
    shapes = {"weights": shapes_of(small_state())["weights"]}
    with Checkpoints(saved, read_only=True) as checkpoints:
        part = checkpoints.restore_part(shapes)
    np.testing.assert_array_equal(part["weights"]["a"], SMALL["weights"]["a"])
    assert "key" not in part


def test_missing_steps(saved, tmp_path):
    with pytest.raises(CheckpointError, match=r"holds no step 4; it has \[3, 5\]"):
        restore(saved, 4)
    with pytest.raises(CheckpointError, match="holds no checkpoint; train first"):
        restore(tmp_path)


def test_a_step_that_was_not_finished_is_not_seen(copied):
    folder = copied / "checkpoints"
    shutil.copytree(folder / "5", folder / "6.orbax-checkpoint-tmp-0")
    assert restore(copied).step == 5
    with Checkpoints(copied, keep=2) as checkpoints:
        assert checkpoints.latest == 5


def damages():
    """What a crash or a bad disk does to a file."""
    return {
        "cut": lambda data: data[: len(data) // 2],
        "emptied": lambda data: b"",
        "flipped": lambda data: (
            data[: len(data) // 2]
            + bytes(255 - byte for byte in data[len(data) // 2 : len(data) // 2 + 1])
            + data[len(data) // 2 + 1 :]
        ),
    }


@pytest.mark.parametrize("damage", damages())
def test_a_damaged_file_is_never_taken_for_a_state(saved, tmp_path, damage):
    expected = jax.random.key_data(restore(saved).state["key"])
    refused = []
    for file in sorted(path for path in (saved / "checkpoints" / "5").rglob("*") if path.is_file()):
        run = shutil.copytree(saved, tmp_path / "run")
        target = run / file.relative_to(saved)
        target.write_bytes(damages()[damage](target.read_bytes()))
        try:
            state = restore(run).state
        except CheckpointError as error:
            message = str(error)
            assert str(run / "checkpoints" / "5") in message
            assert re.search(r"damaged .*delete that folder to go on from step 3", message)
            assert "--run-dir" in message
            refused.append(file.relative_to(saved / "checkpoints" / "5").as_posix())
            assert restore(run, 3).step == 3
        else:
            # Orbax keeps several files that it does not need to read the arrays.
            np.testing.assert_array_equal(state["weights"]["a"], SMALL["weights"]["a"])
            np.testing.assert_array_equal(state["weights"]["b"], SMALL["weights"]["b"])
            np.testing.assert_array_equal(jax.random.key_data(state["key"]), expected)
        shutil.rmtree(run)
    assert any("ocdbt" in name for name in refused)
    if damage != "flipped":
        assert {"input/metadata", "metadata/metadata"} <= set(refused)


def test_a_missing_folder_of_arrays(copied):
    shutil.rmtree(copied / "checkpoints" / "3")
    shutil.rmtree(copied / "checkpoints" / "5" / "state")
    with pytest.raises(CheckpointError, match="delete that folder to train from the beginning"):
        restore(copied)


def test_other_shapes_are_named(saved):
    shapes = shapes_of(small_state())
    shapes["weights"]["a"] = jax.ShapeDtypeStruct((3, 3), jnp.float32)
    shapes["weights"]["c"] = jax.ShapeDtypeStruct((2,), jnp.float32)
    with pytest.raises(CheckpointError) as error:
        restore(saved, shapes=shapes)
    message = str(error.value)
    assert "weights/a: saved float32[2, 3], expected float32[3, 3]" in message
    assert "weights/c: saved nothing, expected float32[2]" in message


def test_another_format_is_not_guessed(copied):
    path = copied / "checkpoints" / "5" / "metadata" / "metadata"
    path.write_text(json.dumps({**json.loads(path.read_text()), "format": 99}))
    with pytest.raises(CheckpointError, match="has format 99, this version reads 1"):
        restore(copied)
    path.write_text(json.dumps({"step": 5}))
    with pytest.raises(CheckpointError, match="its metadata lacks"):
        restore(copied)


def test_a_full_disk_while_saving(tmp_path, monkeypatch):
    def full(self, *args, **kwargs):
        raise OSError(28, "No space left on device")

    with Checkpoints(tmp_path, keep=1) as checkpoints:
        monkeypatch.setattr(ocp.CheckpointManager, "save", full)
        with pytest.raises(CheckpointError, match=r"No space left.*--run-dir"):
            checkpoints.save(1, small_state(), {}, tiny)


def test_the_saved_arrays_are_copies(tmp_path):
    """Saving goes on in the background while the next step reuses the state's memory."""
    step = jax.jit(lambda tree: jax.tree.map(lambda leaf: leaf + 1, tree), donate_argnums=0)
    state = {"big": jnp.zeros((512, 512))}
    shapes = shapes_of(state)
    with Checkpoints(tmp_path, keep=5) as checkpoints:
        for number in range(1, 4):
            state = step(state)
            checkpoints.save(number, state, {}, tiny)
        state = step(step(state))
    for number in range(1, 4):
        np.testing.assert_array_equal(restore(tmp_path, number, shapes).state["big"], number)


def test_the_decoder_of_a_run(tmp_path):
    model = dataclasses.replace(tiny.model, attention=Dense(), layers=1)
    config = dataclasses.replace(tiny, model=model)
    state = make_state(config, plan(config)[1])
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(4, state, {}, config)
    decoder, found, step = load_decoder(tmp_path)
    assert (found, step) == (config, 4)
    jax.tree.map(np.testing.assert_array_equal, split(decoder)[1], state.params)
    with pytest.raises(CheckpointError, match="holds no step 9"):
        load_decoder(tmp_path, 9)
