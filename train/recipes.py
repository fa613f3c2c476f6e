"""Finding recipes: Python files that define ``config = RunConfig(...)``.

The packaged ones, the folder ``configs`` beside this package, go by their name from anywhere; any
other goes by its path. Nothing here runs a recipe or imports JAX, so that listing them is quick.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
from collections.abc import Sequence
from pathlib import Path

PACKAGED = Path(__file__).resolve().parents[1] / "configs"


class UserError(Exception):
    """A mistake of the caller; the command line prints the message without a traceback."""


class ConfigError(UserError):
    """A recipe or a saved configuration cannot be used."""


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A recipe as it describes itself.

    Attributes:
      name: what ``--config`` takes: the name of a packaged recipe, the path of another.
      path: its file.
      summary: the first line of its docstring.
      expected: the docstring's paragraph that begins with "Expected": on which hardware, how long,
        with which result; empty without one.
    """

    name: str
    path: Path
    summary: str
    expected: str


def list_recipes(folder: str | Path | None = None) -> list[Recipe]:
    """The Python files of ``folder`` that define ``config``, by name.

    Without a folder: the packaged recipes, then those of a folder ``configs`` here, if it is
    another.
    """
    if folder is None:
        here = Path("configs")
        own = [] if here.resolve() == PACKAGED else list_recipes(here)
        return [*list_recipes(PACKAGED), *own]
    packaged = Path(folder).resolve() == PACKAGED
    recipes = []
    for path in sorted(Path(folder).glob("*.py")):
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (OSError, SyntaxError, UnicodeDecodeError):
            continue
        assigned = {
            target.id
            for node in tree.body
            if isinstance(node, ast.Assign | ast.AnnAssign)
            for target in (node.targets if isinstance(node, ast.Assign) else [node.target])
            if isinstance(target, ast.Name)
        }
        if "config" in assigned:
            paragraphs = (ast.get_docstring(tree) or "").split("\n\n")
            expected = [" ".join(p.split()) for p in paragraphs if p.startswith("Expected")]
            name = path.stem if packaged else str(path)
            summary = paragraphs[0].split("\n", 1)[0]
            recipes.append(Recipe(name, path, summary, expected[0] if expected else ""))
    return recipes


def find_recipe(name: str | Path) -> Path:
    """The file of a recipe: the path itself, or a packaged recipe of that name.

    Raises:
      ConfigError: if there is neither; it says which names there are, the likeliest first.
    """
    path = Path(name)
    if path.is_file():
        return path
    known = {recipe.name: recipe.path for recipe in list_recipes()}
    if str(name) in known:
        return known[str(name)]
    close = difflib.get_close_matches(path.stem, known, n=1)
    meant = f"; did you mean --config {close[0]}?" if close else "."
    raise ConfigError(
        f"--config {name}: there is no such file and no packaged recipe of that name{meant} "
        f"The packaged ones are {', '.join(known)}"
    )


def flag_value(arguments: Sequence[str], flag: str, wanted: str) -> str | None:
    """The value of ``flag`` among ``arguments``, which decides what the other flags are.

    Raises:
      ConfigError: if the flag comes last, saying that it needs ``wanted``.
    """
    for index, argument in enumerate(arguments):
        if argument.startswith(f"{flag}="):
            return argument.removeprefix(f"{flag}=")
        if argument == flag:
            if index + 1 == len(arguments):
                raise ConfigError(f"{flag} needs {wanted}")
            return arguments[index + 1]
    return None
