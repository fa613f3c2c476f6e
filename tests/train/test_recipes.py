"""Recipes are found by name from anywhere, by path, and say what they promise."""

import pytest

from train.config import load_recipe
from train.recipes import PACKAGED, ConfigError, find_recipe, flag_value, list_recipes

OWN = '"""Mine.\n\nExpected on one core: a second;\nnothing."""\nconfig = 1\n'


def test_packaged_recipes_go_by_their_name_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find_recipe("tiny") == PACKAGED / "tiny.py"
    assert load_recipe("tiny").run_dir == "runs/tiny"
    # A run's folder of that name is in nobody's way.
    (tmp_path / "tiny").mkdir()
    assert find_recipe("tiny") == PACKAGED / "tiny.py"


def test_a_path_is_taken_before_a_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny").write_text(OWN)
    assert find_recipe("tiny").read_text() == OWN
    assert find_recipe(PACKAGED / "tiny.py") == PACKAGED / "tiny.py"


def test_recipes_are_listed_with_first_line_and_expectation(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    packaged = {recipe.name: recipe for recipe in list_recipes()}
    assert packaged["tiny"].summary.startswith("A model of a few thousand parameters")
    assert "2.04 bits per byte" in packaged["quickstart"].expected
    assert "__init__" not in packaged
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "mine.py").write_text(OWN)
    (tmp_path / "configs" / "helper.py").write_text("x = 1")
    (tmp_path / "configs" / "broken.py").write_text("config = (")
    mine = list_recipes()[len(packaged) :]
    assert [(r.name, r.summary) for r in mine] == [("configs/mine.py", "Mine.")]
    assert mine[0].expected == "Expected on one core: a second; nothing."
    monkeypatch.chdir(PACKAGED.parent)
    assert [recipe.name for recipe in list_recipes()] == list(packaged)


def test_what_there_is_not_is_told_with_the_way_out(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"did you mean --config quickstart\? .* tiny$"):
        find_recipe("configs/quickstart.py")
    with pytest.raises(
        ConfigError, match=r"--config xyz: .* name\. The packaged ones are .* tiny$"
    ):
        find_recipe("xyz")


def test_the_value_of_a_flag():
    assert flag_value(["--a", "1", "--config", "x"], "--config", "a path") == "x"
    assert flag_value(["--config=x=y"], "--config", "a path") == "x=y"
    assert flag_value(["--configs", "x"], "--config", "a path") is None
    with pytest.raises(ConfigError, match="--config needs a path"):
        flag_value(["--config"], "--config", "a path")
