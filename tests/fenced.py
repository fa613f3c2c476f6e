"""Fenced code of the documents: where it is, and the commands in it."""

from __future__ import annotations

import dataclasses
import re
import shlex
import textwrap
from pathlib import Path

ROOT = Path(__file__).parents[1]
SHELLS = ("bash", "sh", "shell", "console", "zsh")
FENCE = re.compile(r"^(?P<indent> *)```(?P<language>\w*)[^\n]*\n(?P<code>.*?)^ *```$", re.M | re.S)


@dataclasses.dataclass(frozen=True)
class Block:
    """A fenced block: its page and line, its language and its text without indentation."""

    page: str
    line: int
    language: str
    code: str

    @property
    def commands(self) -> list[tuple[str, ...]]:
        """The words of every command, comments left out, lines joined that end in a backslash."""
        lines = self.code.replace("\\\n", " ").splitlines()
        split = [tuple(shlex.split(line.removeprefix("$ "), comments=True)) for line in lines]
        return [words for words in split if words]


def pages() -> list[Path]:
    """The documents whose fenced code is run."""
    named = [ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
    return [*named, *sorted((ROOT / "docs").rglob("*.md"))]


def blocks(page: Path) -> list[Block]:
    """The fenced blocks of a page, in order."""
    text = page.read_text(encoding="utf-8")
    return [
        Block(
            page.relative_to(ROOT).as_posix() if page.is_relative_to(ROOT) else page.name,
            text.count("\n", 0, match.start()) + 1,
            match["language"],
            textwrap.dedent(match["code"]),
        )
        for match in FENCE.finditer(text)
    ]
