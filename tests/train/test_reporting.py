"""train.reporting: metrics.jsonl across restarts, the terminal, the loss curve."""

import io
import json
import logging

import numpy as np
import pytest
from rich.console import Console

from train.config import UserError
from train.reporting import (
    TIMING_FIELDS,
    Display,
    MetricsFile,
    draw_loss_curve,
    read_metrics,
    show_library_messages,
    smoothed,
    without_timing,
)


def test_lines_up_to_the_checkpoint_are_kept(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"step": step, "loss": 0.1 * step}) for step in range(1, 5)]
    path.write_text("\n".join([*lines, '{"step": 5, "lo']))
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2, 3, 4]
    file = MetricsFile(tmp_path, 2)
    file.write({"step": 3, "loss": 7.0})
    file.sync()
    file.close()
    assert path.read_text() == "\n".join([*lines[:2], '{"step": 3, "loss": 7.0}', ""])


def test_what_is_not_finite_is_null(tmp_path):
    file = MetricsFile(tmp_path, 0)
    file.write({"step": 1, "loss": 2.0, "recall": float("nan")})
    file.close()
    assert read_metrics(tmp_path) == [{"step": 1, "loss": 2.0, "recall": None}]


def test_a_full_disk_is_told(tmp_path):
    file = MetricsFile(tmp_path, 0)
    file.close()
    with open("/dev/full", "w") as full:
        file._file = full
        with pytest.raises(UserError, match=r"metrics.jsonl cannot be written \(No space left"):
            file.write({"step": 1, "loss": 1.0})
        file.close()


def test_the_recall_of_single_layers_is_shown():
    out = io.StringIO()
    console = Console(file=out, width=20)
    with Display(console, first=0, steps=9, enabled=True) as display:
        display.layers(3, {"loss": 1.0})
        display.layers(4, {"recall_beyond.10": 0.5, "recall_beyond.2": 0.25, "recall_beyond": 0.4})
    assert out.getvalue() == (
        "step 4  recall of dense attention's keys by layer:  L2 0.25  L10 0.50\n"
    )


def test_timing_is_left_out_of_comparisons():
    rows = [{"step": 1, "loss": 2.0, **dict.fromkeys(TIMING_FIELDS, 0.5)}]
    assert without_timing(rows) == [{"step": 1, "loss": 2.0}]


def test_a_loss_curve_needs_losses(tmp_path):
    assert draw_loss_curve(tmp_path) is None
    (tmp_path / "metrics.jsonl").write_text(
        "".join(json.dumps({"step": step, "loss": 1 / step}) + "\n" for step in range(1, 9))
    )
    assert draw_loss_curve(tmp_path).read_bytes().startswith(b"\x89PNG")


def test_smoothing_keeps_constants_and_starts_at_the_first_value():
    np.testing.assert_allclose(smoothed([3.0] * 200), 3.0)
    values = smoothed([4.0, 0.0] + [0.0] * 98)
    assert values[0] == 4.0
    assert values[1] == pytest.approx(4.0 / 3)  # decay 1/2: (1/4) / (3/4)
    assert values[-1] < 1e-6


def test_plain_progress_prints_the_last_step():
    console = Console(file=io.StringIO(), width=120, force_terminal=False)
    with Display(console, first=0, steps=3, enabled=True) as display:
        for step in (1, 2, 3):
            display.update(step, 1.5, 2000.0)
    said = console.file.getvalue()
    assert "step 3/3  loss 1.5000  2,000 tokens/s  eta 0 s" in said
    assert "step 2/3" not in said


def test_a_terminal_gets_a_progress_line():
    console = Console(file=io.StringIO(), width=120, force_terminal=True)
    with Display(console, first=0, steps=3, enabled=True) as display:
        display.update(3, 1.5, 2000.0)
    assert "3/3" in console.file.getvalue()
    assert "loss 1.5000" in console.file.getvalue()


def test_silence_can_be_asked_for():
    console = Console(file=io.StringIO(), force_terminal=False)
    with Display(console, first=0, steps=1, enabled=False) as display:
        display.update(1, 1.5, 2000.0)
    assert console.file.getvalue() == ""


def test_the_choice_of_an_implementation_is_shown():
    console = Console(file=io.StringIO(), width=120)
    loggers = {name: logging.getLogger(name) for name in ("sparse_attn", "train", "absl")}
    before = {
        name: (logger.level, logger.handlers[:], logger.propagate)
        for name, logger in loggers.items()
    }
    try:
        show_library_messages(console)
        loggers["sparse_attn"].info("ranged on cpu runs as xla")
        assert "ranged on cpu runs as xla" in console.file.getvalue()
    finally:
        for name, (level, handlers, propagate) in before.items():
            loggers[name].setLevel(level)
            loggers[name].handlers[:] = handlers
            loggers[name].propagate = propagate
