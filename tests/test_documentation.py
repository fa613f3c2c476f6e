"""The documentation: the site builds without a warning, and pages say what the code says."""

import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from sparse_attn import MECHANISMS, POLICIES, Heads, HeadShape

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = {"hash": "hash_attention"}
PICTURE_BYTES = 120_000


def page_of(name):
    return DOCS / "mechanisms" / f"{PAGES.get(name, name)}.md"


def table_rows(markdown):
    """Cells of all table rows; an escaped bar stays inside its cell."""
    lines = [line for line in markdown.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]


def value_of(text):
    """A default as pages write it: a Python literal, or a quotient of two."""
    top, _, bottom = text.strip("`").partition(" / ")
    literals = {"None": None, "True": True, "False": False}
    if bottom:
        return int(top) / int(bottom)
    return literals[top] if top in literals else json.loads(top)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    run = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)],
        cwd=ROOT,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert "WARNING" not in run.stderr
    return folder


def test_the_site_builds_strictly_with_its_api_pages(site):
    made = {file.relative_to(site).as_posix() for file in site.rglob("*.html")}
    wanted = {file.relative_to(DOCS).with_suffix(".html").as_posix() for file in DOCS.rglob("*.md")}
    assert wanted | {"CONTRIBUTING.html", "CHANGELOG.html"} <= made
    api = (site / "api" / "mechanisms.html").read_text(encoding="utf-8")
    for kind in MECHANISMS.values():
        for field in dataclasses.fields(kind):
            assert re.search(rf"\b{field.name}\b", api), f"{kind.__name__}.{field.name}"
    # Roles of reStructuredText in docstrings are rewritten.
    assert ":class:" not in api


def test_the_site_needs_no_network(site):
    loads = re.compile(r"<(?:script|link|img|iframe)\b[^>]*(?:src|href)=[\"']?(?:https?:)?//")
    for file in site.rglob("*.html"):
        assert not loads.search(file.read_text(encoding="utf-8")), file


def test_links_out_of_the_documents_lead_into_the_site_or_are_text(site):
    contract = (site / "contract.html").read_text(encoding="utf-8")
    assert 'href="CONTRIBUTING.html#a-new-mechanism-one-file-and-one-import"' in contract
    contributing = (site / "CONTRIBUTING.html").read_text(encoding="utf-8")
    assert 'href="kernels.html"' in contributing
    assert 'href="docs/' not in contributing


def test_the_menu_has_every_page():
    menu = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").split("\nnav:\n")[1]
    menu = menu.split("\nhooks:")[0]
    named = re.findall(r": (\S+\.md)$", menu, re.MULTILINE)
    pages = [file.relative_to(DOCS).as_posix() for file in DOCS.rglob("*.md")]
    assert sorted(named) == sorted([*pages, "CHANGELOG.md", "CONTRIBUTING.md"])


@pytest.mark.parametrize("name", sorted(MECHANISMS))
def test_a_mechanism_has_a_page_with_every_option_and_its_default(name):
    rows = table_rows(page_of(name).read_text(encoding="utf-8"))
    stated = {row[0]: row[2] for row in rows if len(row) == 4}
    for field in dataclasses.fields(MECHANISMS[name]):
        assert f"`{field.name}`" in stated, f"{field.name} is missing in {page_of(name)}"
        assert value_of(stated[f"`{field.name}`"]) == field.default, field.name
    extra = {cell.strip("`") for cell in stated if re.fullmatch(r"`\w+`", cell)}
    assert extra == {field.name for field in dataclasses.fields(MECHANISMS[name])}


@pytest.mark.parametrize("name", sorted(MECHANISMS))
def test_a_mechanism_is_in_the_overview(name):
    overview = (DOCS / "mechanisms.md").read_text(encoding="utf-8")
    assert f"(mechanisms/{page_of(name).name})" in overview
    assert f"`{MECHANISMS[name].__name__}()`" in overview


@pytest.mark.parametrize("name", sorted(POLICIES))
def test_a_policy_is_described(name):
    assert f"`{name}` `{POLICIES[name].__name__}`" in (DOCS / "policies.md").read_text("utf-8")


def test_the_table_of_costs_is_what_configs_say():
    overview = (DOCS / "mechanisms.md").read_text(encoding="utf-8")
    stated = {row[0].strip("`"): row[1:] for row in table_rows(overview) if len(row) == 6}
    assert set(MECHANISMS) <= set(stated)
    shape = HeadShape(query_heads=32, kv_heads=8, head_width=128, value_width=128, model_width=4096)
    pair = 8 * (128 + 128) * 16
    for name, kind in MECHANISMS.items():
        config = kind()
        shares = [config.density(length) for length in (8192, 32768, 131072)]
        shares.append(config.auxiliary_bits(shape) / pair)
        told = [float(cell.removesuffix(" %")) / 100 for cell in stated[name][:4]]
        np.testing.assert_allclose(told, shares, atol=5.01e-4, err_msg=name)
        assert int(stated[name][4]) == config.kv_branches


def test_pictures_are_there_and_light():
    shown = set()
    for file in DOCS.rglob("*.md"):
        for target in re.findall(r"!\[[^\]]+\]\(([^)]+)\)", file.read_text(encoding="utf-8")):
            shown.add((file.parent / target).resolve())
    assert {DOCS / "pictures" / f"{page_of(name).stem}.png" for name in MECHANISMS} <= shown
    assert shown == set((DOCS / "pictures").iterdir())
    for file in shown:
        data = file.read_bytes()
        assert data.startswith(b"\x89PNG"), file
        assert len(data) < PICTURE_BYTES, file


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("nsa", {}),
        pytest.param("hash_attention", {"budget": 5, "recent": 7}, marks=pytest.mark.full),
        pytest.param("infllm_v2", {"dense_len": 40, "selected_blocks": 4}, marks=pytest.mark.full),
        pytest.param(
            "routing",
            {"clusters": 2, "cluster_window": 6, "local_window": 8},
            marks=pytest.mark.full,
        ),
    ],
)
def test_pictures_show_every_key_that_has_weight_and_no_other(name, changes, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "scripts")
    import draw_mechanisms as drawing

    rng = np.random.default_rng(0)
    tokens = 160
    q, k, x = (
        jnp.asarray(rng.standard_normal(size), jnp.float32)
        for size in ((1, tokens, 9, 8), (1, 1, tokens, 3, 8), (1, tokens, 16))
    )
    heads = Heads(q=q, k=k, v=drawing.unit_values(k), x=x, rope=lambda array, *_, **__: array)
    config = dataclasses.replace(drawing.CONFIGS[name], **changes)
    ids = jnp.asarray([[1] * 32 + [2] * 112 + [0] * 16])
    look, figures = drawing.attended(name, drawing.build(config, heads), heads, ids)
    np.testing.assert_array_equal(look.weights > 0, look.reasons > drawing.SKIPPED)
    assert 0 < figures["attended"] < 1
