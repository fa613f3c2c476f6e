"""Pages written by hand but for their tables, which a script replaces between two marks."""

from __future__ import annotations


def put_between(page: str, tables: str, marks: tuple[str, str]) -> str:
    """``page`` with ``tables`` between the marks.

    Raises:
      ValueError: if the page does not hold each mark once, in order.
    """
    begin, end = marks
    before, mark, rest = page.partition(begin)
    _, last, after = rest.partition(end)
    if not mark or not last or page.count(begin) != 1 or page.count(end) != 1:
        raise ValueError(f"the page lacks one line {begin} or one {end} after it")
    return f"{before}{begin}\n\n{tables}\n\n{end}{after}"
