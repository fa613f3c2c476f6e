import dataclasses
import re
from html.parser import HTMLParser

from train.evaluation.html_report import markdown, page, write_reports
from train.evaluation.results import Results

VOID = {"meta", "circle", "rect", "path", "polygon"}


class Reader(HTMLParser):
    """Checks that tags close in order; collects text by heading."""

    def __init__(self):
        super().__init__()
        self.open, self.sections, self.attributes = [], {}, []
        self.heading = None

    def handle_starttag(self, tag, attrs):
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] == "h2":
            self.heading = data
        self.sections.setdefault(self.heading, []).append(data)


def read(results):
    reader = Reader()
    reader.feed(page(results))
    reader.close()
    assert reader.open == []
    return reader


def test_three_files_are_written(results, tmp_path):
    paths = write_reports(results, tmp_path / "run")
    assert [path.name for path in paths] == ["results.json", "report.md", "report.html"]
    again = write_reports(Results.load(tmp_path / "run"), tmp_path / "again")
    assert [path.read_bytes() for path in again] == [path.read_bytes() for path in paths]


def test_page_needs_nothing_from_outside(results):
    content = page(results)
    assert re.findall(r"https?:|url\(|@import|<script|<link|<img|src=", content) == []
    assert 'name="viewport"' in content


def test_every_part_is_there(results):
    sections = read(results).sections
    assert list(sections)[1:] == [
        "Quality against bytes read",
        "Where the evidence was",
        "Recall by layer",
        "What one query selected",
        "Scores",
        "Cost and recall",
        "Protocol",
        "Environment",
    ]
    assert "niah_single_1 at 1,024, protocol B" in sections["Quality against bytes read"]
    assert "vt, quest 1/2, B" in sections["Where the evidence was"]
    assert "recall: vt at 2,048, protocol B" in sections["Recall by layer"]
    assert "cpu" in sections["Environment"]


def test_parts_without_material_are_left_out(results):
    bare = dataclasses.replace(results, layers=(), pictures=())
    sections = read(bare).sections
    assert "Recall by layer" not in sections
    assert "What one query selected" not in sections


def test_names_are_escaped(results):
    content = page(results)
    assert "small &lt;&amp;&gt; model" in content
    assert "small <&> model" in read(results).sections["Protocol"]


def test_better_than_dense_is_said_first(results):
    content = page(results)
    assert content.index("1 cell is better than dense") < content.index("<h2>")
    assert content.count("<tr class=flag>") == 1
    fine = dataclasses.replace(
        results, rows=tuple(dataclasses.replace(r, suspicious=False) for r in results.rows)
    )
    assert "No cell is better than dense attention beyond its interval." in page(fine)
    assert "class=flag" not in page(fine)


def test_nothing_is_claimed_about_dense_attention_that_was_left_out(results):
    sparse = tuple(row for row in results.rows if row.cell.policy != "dense")
    alone = dataclasses.replace(results, rows=sparse)
    for content in (page(alone), markdown(alone)):
        assert "Dense attention was not evaluated" in content
        assert "better than dense attention" not in content


def test_depths_are_averaged_by_band(results):
    heat = read(results).sections["Where the evidence was"]
    assert {"0-20 %", "80-100 %", "1,024", "2,048"} <= set(heat)
    shown = [text for text in heat if re.match(r"depth \d", text)]
    # Depths 1/16, 3/16, ... of eight samples: two in the first band, one in the second.
    scores = next(s for s in results.scores if s.cell[:4] == ("vt", 1024, "quest", 64))
    first = sum(scores.values[:2]) / 2
    assert f"depth 0-20 %, length in tokens 1,024: {first:.1%}" in shown


def test_markdown_has_the_same_rows(results):
    text = markdown(results)
    for row in results.rows:
        assert f"{row.value:.3f}" in text
    tables = [line for line in text.splitlines() if line.startswith("| vt | B | quest 256")]
    assert len(tables) == 5
    assert "* model: small <&> model" in text
