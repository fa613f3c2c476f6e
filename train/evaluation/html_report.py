"""The report: one HTML page without anything outside of it, and the same tables as Markdown.

write_reports(results, folder)      # report.html, report.md, results.json
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from train.evaluation import figures, tables
from train.evaluation.figures import Line, Point
from train.evaluation.results import Picture, Results, Scores
from train.evaluation.rows import DENSE, Row
from train.evaluation.store import Cell
from train.evaluation.tables import Table

HTML_FILE, MARKDOWN_FILE = "report.html", "report.md"
DEPTHS = 5
"""Bands of depth in a heat map."""

_STYLE = """
:root{color-scheme:light}
*{box-sizing:border-box}
body{margin:0 auto;max-width:76rem;padding:1.25rem;color:#1f2328;background:#fff;
font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"DejaVu Sans",sans-serif}
h1{font-size:1.6rem;line-height:1.25;margin:.25rem 0 1rem;overflow-wrap:anywhere}
h2{font-size:1.2rem;margin:2.2rem 0 .4rem;border-bottom:1px solid #d8dee4;padding-bottom:.2rem}
h3{font-size:1rem;margin:1.2rem 0 .3rem}
p{margin:.4rem 0 .8rem;max-width:46rem;color:#424a53}
svg{width:100%;height:auto;display:block;font-family:inherit}
svg.sign{display:inline-block;width:.8em;height:.8em;margin-right:.35em}
.grid{display:grid;gap:1rem 1.5rem;
grid-template-columns:repeat(auto-fill,minmax(min(100%,21rem),1fr))}
.grid.small{grid-template-columns:repeat(auto-fill,minmax(min(100%,10.5rem),1fr))}
figure{margin:0 0 .8rem;min-width:0}
figcaption{font-size:.9rem;font-weight:600;margin-bottom:.2rem;overflow-wrap:anywhere}
.legend{display:flex;flex-wrap:wrap;gap:.2rem 1.1rem;margin:.3rem 0 .8rem;font-size:.9rem}
.wide{overflow-x:auto}
.wide>svg{min-width:var(--own)}
table{border-collapse:collapse;font-size:.85rem;font-variant-numeric:tabular-nums}
th,td{padding:.25rem .7rem .25rem 0;text-align:right;border-bottom:1px solid #eaeef2;
white-space:nowrap}
th{color:#656d76;font-weight:600;vertical-align:bottom}
th.name,td.name{text-align:left}
tr.flag td{background:#fff1e5}
.notice{border-left:4px solid #d55e00;background:#fff7f0;padding:.6rem .9rem;margin:1rem 0}
.fine{border-left-color:#009e73;background:#f2faf7}
.notice p{margin:0}
dl{display:grid;grid-template-columns:minmax(6rem,max-content) 1fr;gap:.15rem 1rem;margin:.4rem 0;
font-size:.9rem}
dt{color:#656d76}
dd{margin:0;overflow-wrap:anywhere}
details{margin:.6rem 0}
summary{cursor:pointer;color:#0550ae}
@media(max-width:40rem){body{padding:.8rem}dl{grid-template-columns:1fr;gap:0}
dd{margin-bottom:.4rem}h1{font-size:1.3rem}}
"""


def write_reports(results: Results, folder: str | os.PathLike) -> list[Path]:
    """Write results.json, report.md and report.html; returns their paths."""
    path = Path(folder)
    paths = [results.save(path)]
    for name, content in ((MARKDOWN_FILE, markdown(results)), (HTML_FILE, page(results))):
        (path / name).write_text(content, encoding="utf-8")
        paths.append(path / name)
    return paths


def markdown(results: Results) -> str:
    """The tables of the report."""
    flagged = tables.flagged(results.rows)
    parts = [f"# {results.title}", _verdict(results.rows, len(flagged.rows))]
    if flagged.rows:
        parts.append(flagged.markdown())
    for heading, table in (
        ("Scores", tables.scores(results.rows)),
        ("Cost and recall", tables.costs(results.rows)),
    ):
        parts += [f"## {heading}", table.markdown()]
    for heading, found in (("Protocol", results.settings), ("Environment", results.environment)):
        parts += [f"## {heading}", "\n".join(f"* {k}: {_plain(v)}" for k, v in found.items())]
    parts.append(f"Figures are in {HTML_FILE}, all numbers in results.json.")
    return "\n\n".join(parts) + "\n"


def page(results: Results) -> str:
    """The whole page."""
    numbers = _numbers(results.rows)
    sections = [
        _flags(results.rows),
        _section(
            "Quality against bytes read",
            "Bytes of keys, values and what the selector reads, over those of dense attention. "
            "The dashed line and its band are dense attention; bars are 95 % intervals. "
            "A ring marks a cell that is better than dense.",
            _legend(numbers) + _grid(_curves(results.rows, numbers)),
        ),
        _section(
            "Where the evidence was",
            "Mean score by depth of the evidence (0 % is the beginning of the context) and length, "
            "in percent.",
            _grid(_needles(results.scores, results.rows), "grid small"),
        ),
        _section(
            "Recall by layer",
            "Share, in percent, of the 32 most attended keys, or of the evidence, that the "
            "selector finds in each layer. Grey layers stay dense.",
            _recall(results),
        ),
        _section(
            "What one query selected",
            "Keys from left to right; each layer has one thin line for each list that its heads "
            "share, and one pale line where it stays dense. Orange bands mark the evidence.",
            "".join(_picture(picture) for picture in results.pictures),
        ),
        _section(
            "Scores",
            "Means with 95 % intervals, Wilson's where every sample scores 0 or 1 and bootstrap "
            "elsewhere. Differences from dense are paired over the same samples.",
            _table(tables.scores(results.rows)),
        ),
        _section(
            "Cost and recall",
            "Four densities: attended over causal pairs, keys fetched per kv head, bytes and "
            "operations with the selector's, each over dense attention.",
            _table(tables.costs(results.rows)),
        ),
        _section(
            "Protocol", "", _definitions(results.settings) + _table(tables.conditions(results.rows))
        ),
        _section("Environment", "", _definitions(results.environment)),
    ]
    title = escape(results.title)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{title}</title><style>{_STYLE}</style></head>\n<body><h1>{title}</h1>\n"
        + "\n".join(filter(None, sections))
        + "\n</body></html>\n"
    )


def _section(heading: str, lead: str, content: str) -> str:
    """Nothing if there is no content."""
    if not content:
        return ""
    said = f"<p>{escape(lead)}</p>" if lead else ""
    return f"<section><h2>{escape(heading)}</h2>{said}{content}</section>"


def _verdict(rows: Sequence[Row], flagged: int) -> str:
    if all(row.cell.policy != DENSE for row in rows):
        return "Dense attention was not evaluated (--policies dense ...), so nothing is compared."
    if not flagged:
        return "No cell is better than dense attention beyond its interval."
    cells = "cell is" if flagged == 1 else "cells are"
    return (
        f"{flagged} {cells} better than dense attention beyond the interval of the paired "
        "difference. Attending less should not help: suspect a bug until this is explained."
    )


def _flags(rows: Sequence[Row]) -> str:
    table = tables.flagged(rows)
    kind = "notice" if table.rows else "notice fine"
    shown = _table(table) if table.rows else ""
    return f'<div class="{kind}"><p>{_verdict(rows, len(table.rows))}</p>{shown}</div>'


def _numbers(rows: Sequence[Row]) -> dict[str, int]:
    """Every sparse policy's number, which decides its colour."""
    policies = sorted({row.cell.policy for row in rows} - {DENSE})
    return {policy: number for number, policy in enumerate(policies)}


def _legend(numbers: Mapping[str, int]) -> str:
    names = "".join(f"<span>{figures.sign(n)}{escape(p)}</span>" for p, n in numbers.items())
    return f'<div class="legend">{names}</div>'


def _grid(shown: Iterable[tuple[str, str]], kind: str = "grid") -> str:
    found = "".join(
        f"<figure><figcaption>{escape(name)}</figcaption>{drawn}</figure>" for name, drawn in shown
    )
    return f'<div class="{kind}">{found}</div>' if found else ""


def _groups(rows: Sequence[Row]) -> dict[tuple[str, int, str], list[Row]]:
    """Sparse rows by what a panel shows: task, length, protocol."""
    groups: dict[tuple[str, int, str], list[Row]] = {}
    for row in rows:
        if row.cell.policy != DENSE:
            key = (row.cell.task, row.cell.length, row.cell.protocol)
            groups.setdefault(key, []).append(row)
    return groups


def _dense(rows: Sequence[Row], task: str, length: int, protocol: str) -> Row | None:
    """Dense attention's row, of this protocol if it was run under it."""
    found = [r for r in rows if r.cell.policy == DENSE and r.cell[:2] == (task, length)]
    return min(found, key=lambda row: row.cell.protocol != protocol, default=None)


def _curves(rows: Sequence[Row], numbers: Mapping[str, int]) -> Iterable[tuple[str, str]]:
    for (task, length, protocol), found in _groups(rows).items():
        lines = []
        for policy in dict.fromkeys(row.cell.policy for row in found):
            points = tuple(
                Point(row.metrics["density_bytes"], row.value, row.low, row.high, tables.said(row))
                for row in found
                if row.cell.policy == policy and "density_bytes" in row.metrics
            )
            lines.append(Line(policy, numbers[policy], points))
        if not any(line.points for line in lines):
            continue
        dense = _dense(rows, task, length, protocol)
        level = None
        if dense is not None:
            level = Point(1.0, dense.value, dense.low, dense.high, f"dense {tables.said(dense)}")
        title = tables.panel_name(task, length, protocol)
        name = found[0].conditions.metric
        yield title, figures.curves(title, lines, level, "bytes read over dense", name)


def _needles(scores: Sequence[Scores], rows: Sequence[Row]) -> Iterable[tuple[str, str]]:
    """One heat map for every task, policy, budget and protocol whose samples know their depth."""
    shares = {row.cell for row in rows if row.conditions.better == "higher"}
    groups: dict[tuple[Any, ...], list[Scores]] = {}
    for one in scores:
        if one.cell in shares and any(depth is not None for depth in one.depths):
            key = (one.cell.task, one.cell.protocol, one.cell.policy, one.cell.budget)
            groups.setdefault(key, []).append(one)
    for (task, protocol, policy, budget), found in groups.items():
        title = f"{task}, {tables.method(policy, budget)}, {protocol}"
        bands = [f"{100 * n // DEPTHS}-{100 * (n + 1) // DEPTHS} %" for n in range(DEPTHS)]
        values = [[_at_depth(one, band) for one in found] for band in range(DEPTHS)]
        lengths = [f"{one.cell.length:,}" for one in found]
        yield (
            title,
            figures.heat_map(
                title, bands, lengths, values, row_name="depth", column_name="length in tokens"
            ),
        )


def _at_depth(one: Scores, band: int) -> float | None:
    found = [
        value
        for value, depth in zip(one.values, one.depths, strict=True)
        if depth is not None and min(int(depth * DEPTHS), DEPTHS - 1) == band
    ]
    return sum(found) / len(found) if found else None


def _recall(results: Results) -> str:
    groups: dict[tuple[str, str, int, str], list[tuple[Cell, tuple[float | None, ...]]]] = {}
    for one in results.layers:
        key = (one.metric, one.cell.task, one.cell.length, one.cell.protocol)
        groups.setdefault(key, []).append((one.cell, one.values))
    parts = []
    for (metric, task, length, protocol), found in groups.items():
        title = f"{metric.replace('_', ' ')}: {tables.panel_name(task, length, protocol)}"
        drawn = figures.heat_map(
            title,
            [tables.method(cell.policy, cell.budget) for cell, _ in found],
            [str(layer) for layer in range(max(len(values) for _, values in found))],
            [values for _, values in found],
            column_name="layer",
            cell=(26, 22),
        )
        caption = f"<figcaption>{escape(title)}</figcaption>"
        parts.append(f'<figure>{caption}<div class="wide">{drawn}</div></figure>')
    return "".join(parts)


def _picture(picture: Picture) -> str:
    cell = picture.cell
    title = (
        f"{tables.panel_name(cell.task, cell.length, cell.protocol)}, "
        f"{tables.method(cell.policy, cell.budget)}, sample {picture.sample}, "
        f"query {picture.query:,}"
    )
    drawn = figures.selection(title, picture.chosen, picture.query, picture.evidence)
    caption = f"<figcaption>{escape(title)}</figcaption>"
    return f'<figure>{caption}<div class="wide">{drawn}</div></figure>'


def _table(table: Table) -> str:
    def line(tag: str, values: Sequence[str]) -> str:
        return "".join(
            f"<{tag}{' class=name' if number < table.names else ''}>{escape(value)}</{tag}>"
            for number, value in enumerate(values)
        )

    body = "".join(
        f"<tr{' class=flag' if number in table.marked else ''}>{line('td', row)}</tr>"
        for number, row in enumerate(table.rows)
    )
    head = line("th", table.columns)
    rows = f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody>"
    return f'<div class="wide"><table>{rows}</table></div>'


def _definitions(found: Mapping[str, Any]) -> str:
    pairs = "".join(f"<dt>{escape(k)}</dt><dd>{escape(_plain(v))}</dd>" for k, v in found.items())
    return f"<dl>{pairs}</dl>" if pairs else ""


def _plain(value: Any) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value)) or "none given"
    return str(value)
