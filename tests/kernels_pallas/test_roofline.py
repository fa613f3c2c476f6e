"""docs/roofline.md: its numbers are those of scripts/roofline.py, and these are right."""

import dataclasses
import importlib
import json
from pathlib import Path

import jax
import numpy as np
import pytest

from kernels_pallas import tuned

ROOT = Path(__file__).parents[2]
ROWS = json.loads((ROOT / "benchmarks/results/roofline.json").read_text())


@pytest.fixture
def roofline(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "scripts")
    return importlib.import_module("roofline")


def small(roofline, **changes):
    return dataclasses.replace(roofline.Sizes(), query_heads=4, kv_heads=2, width=8, **changes)


def test_the_page_shows_the_rows(roofline):
    page = (ROOT / "docs/roofline.md").read_text()
    assert page == roofline.put_between(page, roofline.render(ROWS), roofline.MARKS)


def test_the_rows_are_what_is_counted_now(roofline):
    fresh = list(roofline.counted(roofline.kernel_calls.OPS, roofline.Sizes()))
    assert len(fresh) == len(ROWS)
    for row, counted in zip(ROWS, fresh, strict=True):
        assert counted.items() <= row.items()
        assert row == roofline.with_estimate(row)
        assert row["device_seconds"] is None, "a measured row: say so on the page, and change this"
        assert row["compiled"] is None or row["chip"] in roofline.TPU_CHIPS
        assert row["ratio"] >= 1 - 1e-9


def test_pages_without_marks_are_refused(roofline):
    with pytest.raises(ValueError, match="lacks"):
        roofline.put_between("# Roofline\n", "tables", roofline.MARKS)


def test_products_of_causal_attention_are_those_of_its_mask(roofline):
    sizes, shape = small(roofline), roofline.SHAPES["tpu"]
    pairs = int(np.tril(np.ones((256, 256))).sum())
    forward = roofline.count("ranged_attention", "forward", 256, sizes, shape)
    assert forward.flops == pairs * 4 * 2 * (8 + 8)
    both = roofline.count("ranged_attention", "backward", 256, sizes, shape)
    assert both.flops == forward.flops + pairs * 4 * 2 * (4 * 8 + 3 * 8)
    # q, out and lse of 256 tokens; k and v of 256 keys.
    assert forward.once == 256 * 4 * (16 * 2 + 4) + 256 * 2 * 16 * 2
    assert forward.moved > forward.once
    assert forward.computed >= forward.flops


def test_products_of_selected_blocks_are_those_of_the_picks(roofline):
    sizes, shape = small(roofline, block=8, selected=4), roofline.SHAPES["tpu"]
    picks = importlib.import_module("bench_picks").replaced_picks(256, 1, 4, 8)
    positions = np.arange(256)[None, :, None, None]
    seen = np.clip(positions + 1 - picks * 8, 0, 8)
    pairs = int(np.where(picks >= 0, seen, 0).sum())
    forward = roofline.count("block_sparse_attention", "forward", 256, sizes, shape)
    assert forward.flops == pairs * 4 * 2 * (8 + 8)


def test_entries_are_seen_once_they_have_ended(roofline):
    sizes = roofline.Sizes()
    seen = roofline.kernel_calls.seen_entries(100, sizes)
    ends = np.arange(sizes.entries(100)) * sizes.stride + sizes.compressed
    np.testing.assert_array_equal(seen, [(ends <= t + 1).sum() for t in range(100)])


@pytest.mark.parametrize("platform", ["tpu", "gpu"])
def test_work_is_cut_as_the_kernels_cut_it(roofline, platform):
    shape, sizes = roofline.SHAPES[platform], roofline.Sizes()
    chosen = {}
    ops = ("ranged_attention", "block_sparse_attention", "select_blocks")
    for call in roofline.kernel_calls.calls(32768, f"mosaic_{platform}", sizes, ops):
        if call.direction == "forward":
            with tuned.using(()), tuned.asked() as questions:
                jax.eval_shape(lambda *arrays, call=call: call.function(*arrays), *call.shapes)
            chosen |= {q.op: q.by_rule for q in questions if q.op == call.op}
    ranged, sparse, ranked = (chosen[op] for op in chosen)
    if platform == "tpu":
        assert (ranged.tokens, ranged.keys) == (shape.ranged_tokens, shape.ranged_keys)
        assert (sparse.tokens, ranked.tokens) == (shape.sparse_tokens, shape.ranked_tokens)
    else:
        assert ranged.warpgroups * 64 // sizes.group == shape.ranged_tokens
        assert sparse.warpgroups * 64 // sizes.group == shape.sparse_tokens
        assert ranked.warpgroups * ranked.tokens == shape.ranked_tokens


def test_what_the_compiler_adds_is_told_from_what_it_was_told(roofline):
    call = roofline.call_of(
        {"op": "ranged_attention", "direction": "forward", "length": 32768}, "mosaic_tpu"
    )
    figures = roofline.compiled_figures(call, "v5e")
    assert figures["kernels"] == 1
    # Queries are packed and outputs unpacked (256 MiB each), keys and values packed.
    assert 2**29 < figures["around_bytes"] < 2**32
    assert figures["temporary_bytes"] >= 2**28
