"""scripts/compile_pod.py: what its rows say of steps that fit, that do not, and that failed."""

import math

import pytest
from evaluation_cases import SCRIPTS, load_script


@pytest.fixture(scope="module")
def pods():
    return load_script("compile_pod")


def row(model, mechanism, topology="v5p-64", length=1048576, **more):
    return {
        **{"model": model, "mechanism": mechanism, "topology": topology, "length": length},
        **{"bytes_per_chip": 29.2e9, "fits": True, "flops": 1736e12, "collective_bytes": 36.7e9},
        **{"seconds_estimated": 7.56, "error": ""},
        **more,
    }


def test_runs_spread_a_million_tokens_over_all_chips(pods):
    for length, chips, mesh in ((2**20, 64, (1, 64)), (2**17, 64, (8, 8)), (2**17, 256, (8, 32))):
        config = pods.run_config("1B", "nsa", length, chips)
        assert config.batch_size * length == 2**20
        assert (config.mesh.fsdp, config.mesh.sequence) == mesh
        assert math.prod(mesh) == chips
        assert config.model.attention.implementation == "mosaic_tpu"


@pytest.mark.parametrize(
    ("why", "size", "fits"),
    [
        ("RESOURCE_EXHAUSTED: Ran out of memory: Used 120.50G of 95.00G hbm", 120.5 * 2**30, False),
        (
            "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO "
            "temporaries (20.00G) exceeds available HBM (15.75G). See https"
            "://a.host/errors",
            *(20 * 2**30, False),
        ),
        ("RESOURCE_EXHAUSTED: something else", None, False),
        ("INTERNAL: a bug", None, None),
    ],
)
def test_lack_of_memory_is_told_from_other_failures(pods, why, size, fits):
    found = pods.failed("8B", "dense", "v5p-64", 2**20, why)
    assert (found["bytes_per_chip"], found["fits"]) == (size, fits)
    assert found["error"] == why.partition(" See ")[0], "addresses are left out"
    for name in ("flops", "collective_bytes", "seconds_estimated"):
        assert found[name] is None


def test_the_page_has_a_line_for_each_row_and_keeps_its_text(pods):
    begin, end = pods.TABLE
    failed = pods.failed("8B", "dense", "v5e-256", 2**20, "RESOURCE_EXHAUSTED: Used 40G of 16G")
    rows = [row("8B", "nsa"), row("1B", "dense", length=2**17), failed]
    text = pods.page(f"Before.\n{begin}\nold\n{end}\nAfter.", rows)
    assert text.startswith("Before.\n")
    assert text.endswith("\nAfter.")
    assert "old" not in text
    lines = [line for line in text.splitlines() if line.startswith("| v5")]
    assert lines == [
        "| v5e-256 | 1024k | 8B | dense | 42.9 | no, of 16 |  |  |  |",
        "| v5p-64 | 128k | 1B | dense | 29.2 | yes | 1,736 | 36.7 | 7.6 |",
        "| v5p-64 | 1024k | 8B | nsa | 29.2 | yes | 1,736 | 36.7 | 7.6 |",
    ]
    assert pods.page(text, rows) == text
    with pytest.raises(ValueError, match="end of table"):
        pods.page("no marks", rows)


@pytest.mark.full
def test_a_step_for_a_small_slice_compiles(pods, monkeypatch):
    monkeypatch.syspath_prepend(SCRIPTS)
    small = {"layers": 2, "model_width": 256, "query_heads": 4, "kv_heads": 2, "head_width": 64}
    small |= {"mlp_width": 512, "tie_embeddings": True}
    monkeypatch.setitem(pods.MODELS, "small", small)
    monkeypatch.setattr(pods, "VOCABULARY", 1024)
    monkeypatch.setitem(pods.TOPOLOGIES, "v5p-8", "v5p:2x2x2")
    monkeypatch.setattr(pods, "LENGTHS", (4096, 16384))
    found = pods.compile_step("small", "nsa", "v5p-8", 16384)
    assert found["fits"]
    assert found["mesh"] == {"sequence": 8}
    assert found["temporary_bytes"] > 0
    assert found["collective_bytes"] > 0
    assert found["seconds_estimated"] > 0
