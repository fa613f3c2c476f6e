"""Tables of measured tiles: which entry serves a call, and that kernels take it."""

import json
import logging

import jax
import jax.numpy as jnp
import pytest

from kernels_pallas import gpu_key_major, gpu_query_major, tpu, tuned
from kernels_pallas.block_sparse import block_sparse_attention
from kernels_pallas.gpu_tiles import Layout
from kernels_pallas.ranged import ranged_attention
from kernels_pallas.ranged.mosaic_tpu_plan import Tiles, plan_for
from kernels_pallas.tuned import Entry

CHIP = "TPU v5 lite"
SIZES = {"group": 8, "width": 128, "value_width": 128, "dtype": "bfloat16"}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(tuned, "FOLDER", tmp_path / "tiles")
    monkeypatch.setattr(tpu, "chip_kind", lambda: CHIP)
    tuned._warn_once.cache_clear()
    return tmp_path / "tiles"


def entry(length=1024, direction="forward", seconds=0.5, sizes=SIZES, **tiles):
    tiles = tiles or {"tokens": 32, "keys": 256}
    return Entry("ranged_attention", direction, length, sizes, tiles, seconds, 0.6, "0", "today")


def plan(length=1024, direction="forward", tiles=None):
    q = jax.ShapeDtypeStruct((1, length, 8, 128), jnp.bfloat16)
    kv = jax.ShapeDtypeStruct((1, length, 1, 128), jnp.bfloat16)
    chosen = plan_for(q, kv, kv, 0.1, tiles, direction)
    return Tiles(chosen.layout.tokens, chosen.block)


RULE = Tiles(64, 512)


def test_a_table_is_written_read_and_taken(folder):
    assert plan() == RULE
    path = tuned.table_path(CHIP)
    assert path == folder / "tpu_v5_lite.json"
    tuned.write_table(path, CHIP, [entry(), entry(direction="backward", tokens=16, keys=128)])
    assert plan() == Tiles(32, 256)
    assert plan(direction="backward") == Tiles(16, 128)
    assert plan(tiles=Tiles(48, 384)) == Tiles(48, 384)
    table = json.loads(path.read_text())
    assert table["device"] == CHIP
    assert [row["seconds"] for row in table["entries"]] == [0.5, 0.5]


def test_the_longest_measurement_that_is_no_longer_than_the_call_serves(folder):
    path = tuned.table_path(CHIP)
    tuned.write_table(path, CHIP, [entry(1024), entry(4096, tokens=16)])
    assert plan(1000) == RULE
    assert plan(1024) == plan(4095) == Tiles(32, 256)
    assert plan(4096) == plan(9999) == Tiles(16, 512)  # keys as by rule


def test_other_sizes_other_chips_and_no_chip_are_served_by_rule(folder, monkeypatch):
    other = entry(sizes=SIZES | {"group": 4})
    tuned.write_table(tuned.table_path(CHIP), CHIP, [other])
    assert plan() == RULE
    tuned.write_table(tuned.table_path(CHIP), CHIP, [entry()])
    assert len(tuned.read_table(tuned.table_path(CHIP))) == 2
    for chip in ("TPU v5", ""):
        monkeypatch.setattr(tpu, "chip_kind", lambda chip=chip: chip)
        assert plan() == RULE


@pytest.mark.parametrize(
    "tiles",
    [{"tokens": 33}, {"tokens": 2**20}, {"rows": 32}, {"keys": 256.0}, {"keys": True}],
    ids=str,
)
def test_entries_that_do_not_serve_are_ignored_and_said_so_once(folder, tiles, caplog):
    tuned.write_table(tuned.table_path(CHIP), CHIP, [entry(**tiles)])
    with caplog.at_level(logging.WARNING, "sparse_attn"):
        assert plan() == plan() == RULE
    (record,) = caplog.records
    assert str(tiles) in record.getMessage()
    with tuned.using([entry(**tiles)]), pytest.raises((TypeError, ValueError, NotImplementedError)):
        plan()


def test_what_was_not_measured_is_not_written(folder):
    with pytest.raises(ValueError, match="not measured"):
        tuned.write_table(tuned.table_path(CHIP), CHIP, [entry(seconds=None)])
    assert not folder.exists()


@pytest.mark.parametrize("text", ["{}", "[", '{"entries": [{"op": "x"}]}'])
def test_files_that_are_no_tables_are_named(folder, text):
    folder.mkdir()
    tuned.table_path(CHIP).write_text(text)
    with pytest.raises(ValueError, match="tpu_v5_lite"):
        plan()


def test_a_measurement_replaces_an_older_one_of_the_same_call(folder):
    path = tuned.table_path(CHIP)
    tuned.write_table(path, CHIP, [entry()])
    tuned.write_table(path, CHIP, [entry(tokens=16), entry(4096)])
    assert next(row.tiles for row in tuned.read_table(path)) == {"tokens": 16}
    assert len(tuned.read_table(path)) == 2


@pytest.mark.parametrize("op", ["ranged_attention", "block_sparse_attention"])
def test_each_pass_takes_the_tiles_of_its_own_direction(op, monkeypatch):
    """On Hopper, with different rows a tile forward and backward."""
    seen = {}
    for name, module in (
        ("forward", gpu_query_major),
        ("query_gradient", gpu_query_major),
        ("key_gradients", gpu_key_major),
    ):
        called = getattr(module, name)

        def spy(*args, called=called, name=name, **kwargs):
            layout = next(x for x in args if isinstance(x, Layout))
            seen[name] = layout.warpgroups, kwargs["steps"]
            return called(*args, **kwargs)

        monkeypatch.setattr(module, name, spy)

    def loss(q, k, v, *rows):
        if op == "ranged_attention":
            return jnp.sum(ranged_attention(q, k, v, *rows, implementation="mosaic_gpu").lse)
        indices = jnp.zeros((1, 1024, 1, 2), jnp.int32)
        options = {"block_size": 64, "positions": rows[0], "implementation": "mosaic_gpu"}
        return jnp.sum(block_sparse_attention(q, k, v, indices, **options).lse)

    q = jax.ShapeDtypeStruct((1, 1024, 8, 128), jnp.bfloat16)
    kv = jax.ShapeDtypeStruct((1, 1024, 1, 128), jnp.bfloat16)
    rows = [jax.ShapeDtypeStruct((1, 1024), jnp.int32)] * 2
    sizes = SIZES | ({} if op == "ranged_attention" else {"block_size": 64})
    tiles = {"forward": {"warpgroups": 1, "steps": 3}}
    tiles["backward"] = {"query_steps": 1, "key_steps": 2}
    entries = [Entry(op, direction, 1, sizes, tiles[direction]) for direction in tiles]
    with tuned.using(entries):
        jax.eval_shape(jax.grad(loss), q, kv, kv, *rows)
    assert seen == {"forward": (1, 3), "query_gradient": (2, 1), "key_gradients": (2, 2)}
