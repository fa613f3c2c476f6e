"""What an evaluation found: as a table for people and as evaluation.json for programs."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from rich.console import Console, Group
from rich.markup import escape
from rich.panel import Panel
from rich.table import Table


@dataclasses.dataclass(frozen=True)
class Report:
    """The result of ``python -m train.evaluate``; every field is a key of evaluation.json.

    ``bits_per_byte_teacher_forced`` and ``bits_per_byte_decode`` score the same tokens through one
    forward and through the cache, ``bits_per_byte_order2`` the same bytes with a byte model that
    counted the training split. ``density`` is attended over causal token pairs, averaged over all
    layers; ``selection`` holds the other measurements of the selections. ``seconds`` are wall
    times of each part, compilation included; some run at the same time.
    """

    bits_per_byte_teacher_forced: float
    bits_per_byte_decode: float
    bits_per_byte_order2: float
    density: float
    selection: dict[str, float]
    documents: int
    tokens: int
    bytes: int
    window: int
    mechanism: str
    step: int
    protocol: str
    prompt: str
    sample: str
    seconds: dict[str, float]
    device: str
    jax: str

    def save(self, run_dir: Path, suffix: str = "") -> Path:
        """Write evaluation.json, or evaluation<suffix>.json, into the run folder."""
        path = run_dir / f"evaluation{suffix}.json"
        text = json.dumps(dataclasses.asdict(self), indent=2, ensure_ascii=False) + "\n"
        path.write_text(text, encoding="utf-8")
        return path

    def print(self, console: Console) -> None:
        """The table and the sample."""
        order2 = self.bits_per_byte_order2
        table = Table(
            title=f"held-out text: {self.documents} documents, {self.tokens:,} tokens, "
            f"{self.bytes:,} bytes",
            title_justify="left",
        )
        table.add_column("")
        table.add_column("bits per byte", justify="right")
        table.add_column("against order 2", justify="right")
        table.add_column("seconds", justify="right")
        for name, value, part in (
            ("order-2 byte model", order2, "order2"),
            (f"{self.mechanism}, one forward", self.bits_per_byte_teacher_forced, "forward"),
            (f"{self.mechanism}, from the cache", self.bits_per_byte_decode, "decode"),
        ):
            table.add_row(
                name, f"{value:.4f}", f"{value - order2:+.4f}", f"{self.seconds[part]:.1f}"
            )
        facts = Table(show_header=False, box=None)
        facts.add_row(
            "forward - decode",
            f"{self.bits_per_byte_teacher_forced - self.bits_per_byte_decode:+.1e} bits per byte",
        )
        facts.add_row("density", f"{self.density:.1%} of the causal token pairs are attended")
        for name, value in self.selection.items():
            facts.add_row(name, f"{value:.3f}")
        parts: list[Table | Panel] = [table, facts]
        if self.sample:
            text = f"[bold]{escape(self.prompt)}[/]{escape(self.sample)}"
            parts.append(Panel(text, title=f"sample after step {self.step}", title_align="left"))
        console.print(Group(*parts), highlight=False)
