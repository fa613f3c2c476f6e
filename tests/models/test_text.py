"""Text generation: stop strings, what is handed out while it grows, and the command line."""

import dataclasses
import re

import numpy as np
import pytest

from configs.tiny import config as tiny
from models import command_line, export_mapping
from models.text import Continuation, generate_text
from sparse_attn import Dense, HashAttention
from train.checkpoint import Checkpoints
from train.config import TOKENIZER_FOLDER, load_run_config, save_run_config
from train.loop import plan
from train.step import make_state
from train.tokenizer import ByteTokenizer

TOKENIZER = ByteTokenizer()


def tokens(text):
    return TOKENIZER.encode(text).tolist()


def grow(text, stop=()):
    """What is handed out after every byte of ``text``, and at the end."""
    growing, pieces = Continuation(TOKENIZER, stop), []
    whole = tokens(text)
    for length in range(1, len(whole) + 1):
        pieces.append(growing.read(whole[:length]))
        if growing.stopped:
            break
    return growing, [*pieces, growing.close()]


def test_no_character_is_cut_in_two():
    growing, pieces = grow("naïve ☾")
    assert "".join(pieces) == growing.text == "naïve ☾"
    assert not any("�" in piece for piece in pieces)
    assert pieces[:4] == ["n", "a", "", "ï"]


def test_bytes_that_never_become_a_character_are_shown_at_the_end():
    growing = Continuation(TOKENIZER)
    assert growing.read(tokens("a☾")[:2]) == "a"
    assert growing.close() == "�"


@pytest.mark.parametrize(
    ("text", "stop", "expected"),
    [
        ("one\n\ntwo", ("\n\n",), "one"),
        ("one\ntwo", ("\n\n",), "one\ntwo"),
        ("a stop. b", ("top", "stop"), "a "),
        ("end", ("end",), ""),
        ("almost sto", ("stop",), "almost sto"),
    ],
)
def test_a_stop_string_ends_the_text_and_is_never_handed_out(text, stop, expected):
    growing, pieces = grow(text, stop)
    assert growing.text == "".join(pieces) == expected
    assert growing.stopped == any(string in text for string in stop)


class Echo:
    """In place of ``stream``: continues prompt b by the bytes of its script."""

    def __init__(self, *scripts):
        self.scripts = [tokens(script) for script in scripts]

    def __call__(self, decoder, prompts, count, sampling, seed, stop_tokens, *, ended, **options):
        self.prompts, self.options = prompts, options
        running = set(range(len(prompts)))
        for step in range(count):
            running = {row for row in running if step < len(self.scripts[row])}
            if not running:
                return
            yield None
            for row in sorted(running):
                if ended(row, self.scripts[row][: step + 1]):
                    running.discard(row)


def test_prompts_end_by_themselves_and_are_reported_apart(monkeypatch):
    echo = Echo("yes. no.", "never mind")
    monkeypatch.setattr("models.text.stream", echo)
    told = {0: "", 1: ""}

    def on_text(row, text):
        told[row] += text

    prompts = ["Q", [7, 8]]
    texts = generate_text(None, TOKENIZER, prompts, 50, stop=(".",), on_text=on_text)
    assert texts == ["yes", "never mind"] == list(told.values())
    assert echo.prompts == [[TOKENIZER.bos_id, *tokens("Q")], [7, 8]]
    with pytest.raises(ValueError, match="empty string"):
        generate_text(None, TOKENIZER, prompts, 5, stop=("",))


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    model = dataclasses.replace(tiny.model, attention=Dense(), layers=1)
    config = dataclasses.replace(tiny, model=model, run_dir=str(folder))
    save_run_config(config, folder)
    TOKENIZER.save(folder / TOKENIZER_FOLDER)
    with Checkpoints(folder, keep=1) as checkpoints:
        checkpoints.save(1, make_state(config, plan(config)[1]), None, config)
    return folder


def test_the_command_line_continues_a_run_with_any_mechanism(run_folder, capsys):
    def call(*extra):
        arguments = ("--model", str(run_folder), "--max-new-tokens", "4", *extra)
        assert command_line.main(arguments) == 0
        return capsys.readouterr()

    plain = call("--prompt", "My fellow")
    assert f"{run_folder}: 4 tokens in" in plain.err
    assert call("--prompt", "My fellow", "--attention", "oracle_topk:budget=64").out == plain.out
    several = call("--prompt", "My fellow", "We")
    assert several.out.startswith("[0] " + plain.out.rstrip("\n"))
    assert "[1] " in several.out


@pytest.mark.full
def test_a_mapping_file_goes_from_a_run_to_the_command_line(run_folder, tmp_path, capsys):
    target, file = tmp_path / "hash", tmp_path / "mapping.safetensors"
    config = load_run_config(run_folder)
    attention = HashAttention(bits=8, hidden=8, budget=64)
    model = dataclasses.replace(config.model, attention=attention)
    config = dataclasses.replace(config, model=model, run_dir=str(target), init_from="base")
    with Checkpoints(target, keep=1) as checkpoints:
        checkpoints.save(1, make_state(config, plan(config)[1]), None, config)
    assert export_mapping.main([str(target), "--to", str(file)]) == 0
    assert "step 1" in capsys.readouterr().out

    def call(*extra):
        flags = ("--model", str(run_folder), "--max-new-tokens", "4", "--prompt", "My fellow")
        assert command_line.main((*flags, *extra)) == 0
        return capsys.readouterr().out

    # A budget of 64 keys covers the prompt.
    assert call("--mapping", str(file)) == call()
    call("--mapping", str(file), "--attention", "hash:bits=8,hidden=8,budget=1,sinks=0,recent=1")
    flags = ("--model", str(run_folder), "--prompt", "a", "--mapping", str(file))
    assert command_line.main((*flags, "--attention", "quest")) == 2
    assert "holds mappings of HashAttention" in capsys.readouterr().err
    assert export_mapping.main([str(target)]) == 0
    assert (target / file.name).read_bytes() == file.read_bytes()
    assert export_mapping.main([str(run_folder), "--to", str(file)]) == 2
    assert "Dense has learnt nothing" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (("--attention", "questt"), "'questt' is none of the known: .*; did you mean quest\\?"),
        (("--attention", "quest:budgett=3"), "with FIELD of"),
        (("--attention", "quest:budget=many"), "another type than in quest:budget="),
        (("--attention", "streaming_llm:recent=1.5"), "another type than in streaming_llm:recent="),
        (("--chat",), "leave --chat out"),
        (("--top-p", "0"), "top_p=0"),
        (("--dense-layers", "9"), "layers 0 to 0"),
    ],
)
def test_mistakes_are_explained(run_folder, capsys, extra, message):
    arguments = ("--model", str(run_folder), "--prompt", "a", *extra)
    assert command_line.main(arguments) == 2
    assert re.search(message, capsys.readouterr().err)


def test_a_missing_model_is_a_mistake_too(capsys, tmp_path):
    assert command_line.main(("--model", str(tmp_path / "none"), "--prompt", "a")) == 2
    assert "error:" in capsys.readouterr().err


def test_a_turn_of_a_chat():
    class Tokenizer(ByteTokenizer):
        def token_id(self, token):
            return {"<|im_start|>": 300, "<|im_end|>": 301}.get(token)

    turn = command_line.chat_tokens(Tokenizer(), "Hi")
    expected = [300, *tokens("user\nHi"), 301, *tokens("\n"), 300, *tokens("assistant\n")]
    np.testing.assert_array_equal(turn, expected)
