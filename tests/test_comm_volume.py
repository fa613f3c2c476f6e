"""scripts/comm_volume.py: the counting rule on small programs, and rows of a small run."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture
def collective_bytes(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "scripts")
    from collective_bytes import collective_bytes

    return collective_bytes


MODULE = """HloModule jit_f, num_partitions=8

%add (a: f32[], b: f32[]) -> f32[] {
  ROOT %sum = f32[] add(%a, %b)
}

%body (state: (s32[], f32[4,8])) -> (s32[], f32[4,8]) {
  %moved = f32[4,8]{1,0} collective-permute(%x), source_target_pairs={{0,1},{1,2},{2,3},{3,0}}
  ROOT %next = (s32[], f32[4,8]) tuple(%i, %moved)
}

%condition (state: (s32[], f32[4,8])) -> pred[] {
  ROOT %less = pred[] compare(%i, %n), direction=LT
}

ENTRY %main (p: f32[4,8]) -> f32[] {
  %whole = f32[32,8]{1,0} all-gather(%p), replica_groups=[1,8]<=[8], dimensions={0}
  %pair = bf16[2,8]{1,0} reduce-scatter(%q), replica_groups={{0,1},{2,3},{4,5},{6,7}}, to_apply=%add
  %alone = f32[100] all-reduce(%r), replica_groups=mesh['a'=8,'b'=1] {'b'}, to_apply=%add
  %both = (f32[10], f32[6]) all-reduce(%r), replica_groups=mesh['a'=2,'b'=4] {'b'}, to_apply=%add
  %swap = f32[16] all-to-all(%t), replica_groups={}, dimensions={0}
  %loop = (s32[], f32[4,8]) while(%w), condition=%condition, body=%body, LOOP
  ROOT %out = f32[] constant(0)
}
"""
LOOP = 'backend_config={"known_trip_count":{"n":"7"}}'


def test_every_kind_is_counted_as_stated(collective_bytes):
    assert collective_bytes(MODULE.replace("LOOP", LOOP)) == {
        "all-gather": 32 * 8 * 4 * 7 // 8,
        "reduce-scatter": 2 * 8 * 2,
        "all-reduce": 2 * 16 * 4 * 3 // 4,
        "all-to-all": 16 * 4 * 7 // 8,
        "collective-permute": 7 * (4 * 8 * 4 * 4 // 8),
    }


def test_asynchronous_collectives_count_their_results_alone(collective_bytes):
    started = {
        "%whole = f32[32,8]{1,0} all-gather(": "%whole = (f32[4,8]{1,0:T(8,128)}, "
        "f32[32,8]{1,0:T(8,128)}) all-gather-start(",
        "%moved = f32[4,8]{1,0} collective-permute(": "%moved = (f32[4,8]{1,0}, f32[4,8]{1,0}, "
        "u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(",
        "%both = (f32[10], f32[6]) all-reduce(": "%both = (f32[10], f32[6]) all-reduce-start(",
    }
    text = MODULE.replace("LOOP", LOOP)
    for at_once, later in started.items():
        assert at_once in text
        text = text.replace(at_once, later)
    assert collective_bytes(text) == collective_bytes(MODULE.replace("LOOP", LOOP))


def test_what_cannot_be_counted_is_refused(collective_bytes):
    unknown = MODULE.replace(", LOOP", "")
    with pytest.raises(ValueError, match="loop of unknown length"):
        collective_bytes(unknown)
    assert collective_bytes(unknown, at_least=True)["collective-permute"] == 4 * 8 * 4 * 4 // 8
    with pytest.raises(ValueError, match="unknown notation"):
        collective_bytes(MODULE.replace("[1,8]<=[8]", "everyone"))
    with pytest.raises(ValueError, match="as_text"):
        collective_bytes("")


@pytest.mark.full
def test_a_small_run_writes_the_promised_rows(tmp_path):
    path = tmp_path / "rows.json"
    options = ("--length", "8192", "--union", "2048")
    subprocess.run(
        [sys.executable, "scripts/comm_volume.py", *options, "--json", str(path)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "XLA_FLAGS": ""},
        check=True,
        capture_output=True,
    )
    rows = json.loads(path.read_text())
    assert {"mechanism", "strategy", "direction", "tokens", "bytes", "jax"} <= set(rows[0])
    both = {row["strategy"]: row["bytes"] for row in rows if row["direction"] == "both"}
    assert both["halo"] > 0
    (ring,) = [r for r in rows if (r["strategy"], r["direction"]) == ("ring", "forward")]
    (gather,) = [
        r
        for r in rows
        if (r["mechanism"], r["strategy"], r["direction"]) == ("Dense", "gather", "forward")
    ]
    assert ring["bytes"] == gather["bytes"], "the same keys travel, one neighbour at a time"
    (union,) = [row for row in rows if row["direction"] == "union"]
    assert 0 < union["wanted_blocks"] <= union["wanted_blocks_any_head"] <= 1
