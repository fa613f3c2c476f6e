"""Tasks of known answer: samples that fill a length, say where their evidence is, and are scored.

    sample = make_sample("niah_single_2", seed=3, length=4096, tokenizer=tokenizer)
    prompt = prompt_tokens(sample, tokenizer)          # .context, .question, .tokens
    positions = evidence_tokens(sample, tokenizer)     # in prompt.tokens
    score("niah_single_2", generated_text, sample)     # 0 to 1

A sample is a function of its arguments alone: two policies, budgets or protocols that are compared
at equal seeds answer the same questions. A chat template is the caller's affair.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sparse_attn.registry import listed
from train.evaluation.tasks import counting, needles, questions, recall, stories, tracing
from train.evaluation.tasks.haystack import Haystack, Noise, Text, find_haystack, held_out_text
from train.evaluation.tasks.sample import Prompt, Sample, evidence_tokens, prompt_tokens
from train.evaluation.tasks.task import Draft, ExhaustedError, Request, Task, fill

if TYPE_CHECKING:
    from train.tokenizer import Tokenizer

TASKS: dict[str, Task] = {
    **needles.TASKS,
    **tracing.TASKS,
    **counting.TASKS,
    **questions.TASKS,
    **recall.TASKS,
    **stories.TASKS,
}


def make_sample(
    task: str,
    seed: int,
    length: int,
    tokenizer: Tokenizer,
    *,
    haystack: str | Haystack | None = None,
    answer_tokens: int | None = None,
    depth: float | None = None,
) -> Sample:
    """The largest sample of a task that fits.

    Args:
      task: a name in :data:`TASKS`.
      seed: of this sample; equal seeds of different tasks have nothing in common.
      length: tokens of start token, context, question and answer together, at most.
      tokenizer: the model's own.
      haystack: ``"noise"``, ``"text"`` or a haystack; None is the task's usual one.
      answer_tokens: tokens that may be generated; None is the task's usual number.
      depth: where the evidence goes, from 0 (beginning) to 1; None is a random place.

    Raises:
      ValueError: if a name is not known, the smallest sample is longer than ``length``, or the task
        has no place for a haystack or a depth.
      FileNotFoundError: if the task's material is not installed.
    """
    found = _find(task)
    if haystack is not None and found.haystack is None:
        raise ValueError(f"task {task!r} makes its whole context itself; leave haystack out")
    if depth is not None and not (found.places and 0 <= depth <= 1):
        able = sorted(name for name, other in TASKS.items() if other.places)
        raise ValueError(
            f"depth={depth} of task {task!r}: it must lie in [0, 1], and only {able} heed it"
        )
    request = Request(
        task, seed, length, 0, find_haystack(haystack or found.haystack or "noise"), depth
    )
    tokens = found.answer_tokens if answer_tokens is None else answer_tokens
    return fill(found, request, tokenizer, tokens)


def score(task: str, prediction: str, sample: Sample) -> float:
    """How right a generated text is, 0 to 1; docs/evaluation.md has each task's rule.

    Raises:
      ValueError: if the task is not known.
    """
    return _find(task).score(prediction, sample)


def _find(task: str) -> Task:
    if task not in TASKS:
        raise ValueError(f"task={task!r} is not known; choose of {listed(sorted(TASKS), task)}")
    return TASKS[task]


__all__ = [
    "TASKS",
    "Draft",
    "ExhaustedError",
    "Haystack",
    "Noise",
    "Prompt",
    "Request",
    "Sample",
    "Task",
    "Text",
    "evidence_tokens",
    "fill",
    "find_haystack",
    "held_out_text",
    "make_sample",
    "prompt_tokens",
    "score",
]
