"""What the documentation site needs beyond its settings in mkdocs.yml.

As a hook of mkdocs: pages of the repository's top level join the site, and links follow them. Links
to other files outside docs/ lead somewhere in the repository but nowhere in the site, where they
become plain text.

As an extension of griffe: roles and literal blocks of reStructuredText in docstrings become
Markdown.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

import griffe
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

TOP = ("CONTRIBUTING.md", "CHANGELOG.md")
LINK = re.compile(r"(?<!!)\[([^\]\n]+)\]\(([^)#:\s]+)(#[^)\s]*)?\)")
ROLE = re.compile(r":(?:class|func|meth|mod|attr|data):`~?([^`]+)`")


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Add the pages of the top level."""
    root = Path(config.docs_dir).parent
    for name in TOP:
        files.append(File.generated(config, name, abs_src_path=str(root / name)))
    return files


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, **_: Any) -> str:
    """Turn links, which are right in the repository, into links that are right in the site."""
    docs = Path(config.docs_dir)
    here = page.file.src_uri if page.file.src_uri in TOP else f"docs/{page.file.src_uri}"

    def moved(found: re.Match[str]) -> str:
        text, target, anchor = found[1], found[2], found[3] or ""
        path = posixpath.normpath(posixpath.join(posixpath.dirname(here), target))
        if not path.startswith("docs/") and path not in TOP:
            # A path that does not exist stays a link, over which a strict build stumbles.
            return text if (docs.parent / path).exists() else found[0]
        path = path.removeprefix("docs/")
        relative = posixpath.relpath(path, posixpath.dirname(page.file.src_uri) or ".")
        return f"[{text}]({relative}{anchor})"

    return LINK.sub(moved, markdown)


class Markdown(griffe.Extension):
    """Docstrings as Markdown."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rewrite one docstring in place."""
        if obj.docstring is not None:
            obj.docstring.value = as_markdown(obj.docstring.value)


def as_markdown(text: str) -> str:
    """Roles become code, ``::`` at the end of a paragraph a colon; indented text is code anyway."""
    text = ROLE.sub(r"`\1`", text)
    return re.sub(r"::(?=\n\n)", ":", text)
