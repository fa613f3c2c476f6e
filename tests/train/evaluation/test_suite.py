"""train.evaluation.suite: what is asked, by the path that generates, resumable to the byte."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiled import decoder_logits
from evaluation_cases import MODEL
from flax import nnx

import models.generate
from models.generate import generate
from models.loading.mapping import save_mapping
from models.transformer import Decoder
from models.upcycle import attending
from sparse_attn import NSA, Dense, HashAttention
from sparse_attn.policies import OracleTopK, Quest
from train.evaluation import suite
from train.evaluation.protocols import answer, fill_caches, prefill
from train.evaluation.store import SAMPLES_FILE
from train.evaluation.suite import Plan, Subject, run
from train.tokenizer import ByteTokenizer

PLAN = Plan(
    tasks=("passkey", "perplexity"),
    lengths=(320,),
    samples=2,
    policies=("dense", "oracle_topk:recent=8"),
    budgets=(16, 1 / 4),
    scored=32,
)


def documents(length):
    """Texts of noise, the first of them with an end token."""
    whole = [np.random.default_rng(n).integers(3, 259, 400 + 50 * n) for n in range(4)]
    whole[0][-1] = ByteTokenizer.eos_id
    return [text[:length] for text in whole if length is None or len(text) >= length]


@pytest.fixture(scope="module")
def subject():
    decoder = Decoder(MODEL, rngs=nnx.Rngs(0))
    return Subject(decoder, ByteTokenizer(), documents, "small", dense_layers=(0,))


@pytest.fixture(scope="module")
def finished(subject, tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluation")
    return folder, run(subject, PLAN, folder)


def test_every_cell_has_its_samples_and_its_cost(finished):
    folder, results = finished
    rows = {(row.cell.task, row.cell.policy, row.cell.budget): row for row in results.rows}
    assert len(rows) == 2 * (1 + 2)
    assert all(row.samples == 2 for row in rows.values())
    for task in PLAN.tasks:
        full = rows[task, PLAN.policies[1], 1 / 4].metrics
        small = rows[task, PLAN.policies[1], 16].metrics
        assert small["density_pairs"] < full["density_pairs"] < 1
        assert small["captured_mass"] < full["captured_mass"]
    text = rows["perplexity", "dense", None]
    assert text.conditions.better == "lower"
    assert 4 < text.value < 7, "an untrained model over 259 tokens"
    assert rows["passkey", "dense", None].value == 0
    found = {(p.cell.task, p.cell.budget): p for p in results.pictures}
    assert set(found) == {(task, budget) for task in PLAN.tasks for budget in PLAN.budgets}
    looked = found["passkey", 16]
    assert looked.sample == 0
    assert [len(lists) for lists in looked.chosen] == [0, 2], "the first layer is dense"
    ends = OracleTopK().sinks + 8
    assert {len(keys) for keys in looked.chosen[1]} == {16 + ends}, "budget, sinks, recent keys"
    assert max(looked.evidence) < looked.query == looked.chosen[1][0][-1]
    assert {path.name for path in folder.iterdir()} == {
        *("samples.jsonl", "results.json", "report.md", "report.html")
    }


def test_an_evaluation_goes_on_where_it_was_killed_and_ends_the_same(
    subject, finished, tmp_path, monkeypatch
):
    folder, results = finished
    whole = (folder / SAMPLES_FILE).read_bytes().splitlines(keepends=True)
    # Killed while the fifth sample was being written; the first line holds the settings.
    (tmp_path / SAMPLES_FILE).write_bytes(b"".join(whole[:5]) + whole[5][:20])
    asked = []
    told = suite.run(subject, PLAN, tmp_path, progress=lambda *where: asked.append(where[0]))
    assert asked == list(range(5, 13))
    assert told == results
    for name in ("results.json", "report.md", "report.html"):
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes()
    run(subject, PLAN, tmp_path, progress=lambda *where: pytest.fail("nothing is left to run"))


def test_protocols_of_one_report_and_whether_the_evidence_was_found(subject, tmp_path):
    covering, blind = "oracle_topk:budget=100000", "streaming_llm:sinks=0,recent=8"
    plan = Plan(("passkey",), (320,), 1, ("dense", covering, blind), protocols=("A", "C"))
    results = run(subject, plan, tmp_path)
    rows = {(row.cell.protocol, row.cell.policy): row for row in results.rows}
    assert len(rows) == 1 + 2 * 2, "dense attention is the same under every protocol"
    for protocol in plan.protocols:
        assert rows[protocol, covering].metrics["evidence_recall"] == 1
        assert rows[protocol, covering].difference == 0
        assert rows[protocol, blind].metrics["evidence_recall"] < 0.05
    queries = {p.cell.protocol: p.query for p in results.pictures if p.cell.policy == covering}
    assert queries["A"] > queries["C"], "a row of the answer, the last one of the question"


def test_rolling_perplexity_reads_texts_window_by_window(subject, tmp_path):
    plan = Plan(("rolling_perplexity",), (120,), 5, scored=16)
    (row,) = run(subject, plan, tmp_path).rows
    windows = [text[at : at + 120] for text in documents(None) for at in (0, 119, 238)][:5]
    log_p = jax.nn.log_softmax(decoder_logits(subject.decoder, np.stack(windows))[:, :-1])
    nats = -jnp.take_along_axis(log_p, np.stack(windows)[:, 1:, None], axis=-1)
    assert row.value == pytest.approx(float(nats.mean()), rel=1e-5)
    with pytest.raises(ValueError, match="14 held-out windows have 120 tokens"):
        run(subject, dataclasses.replace(plan, samples=99), tmp_path / "more")


def test_a_mapping_file_is_a_column(tmp_path):
    hashing = HashAttention(bits=8, budget=8, sinks=2, recent=4, hidden=8)
    model = dataclasses.replace(MODEL, attention=hashing)
    decoder = Decoder(model, rngs=nnx.Rngs(0))
    file = save_mapping(decoder, tmp_path / "mapping.safetensors", base="small")
    subject = Subject(decoder, ByteTokenizer(), documents)
    plan = Plan(("perplexity",), (64,), 1, ("own", f"mapping:{file}"), (8, 16), scored=16)
    small, large, own = run(subject, plan, tmp_path).rows
    assert (own.cell.policy, small.cell.budget, large.cell.budget) == ("own", 8, 16)
    assert small.cell.policy.startswith("mapping:mapping.safetensors@")
    assert own.value == small.value != large.value


@pytest.fixture
def drawn_from(monkeypatch):
    """Logits of every draw of the generator's compiled programs, as they come."""
    seen = []

    def told(logits, *rest):
        jax.debug.callback(lambda found: seen.append(np.asarray(found)), logits, ordered=True)
        return sample(logits, *rest)

    sample, programs = models.generate.sample, (models.generate._decode, models.generate._first)
    for program in programs:
        program.cache_clear()
    monkeypatch.setattr(models.generate, "sample", told)
    yield seen
    for program in programs:
        program.cache_clear()


@pytest.mark.parametrize("attention", [Dense(), Quest(budget=16, page=8, recent=8)])
def test_logits_of_answers_are_bitwise_the_generator_s(subject, attention, drawn_from):
    """Protocol C is sparse throughout, as generation is."""
    own = attending(subject.decoder, dataclasses.replace(MODEL, attention=attention))
    question = suite._question(subject, suite._Texts(subject, PLAN), "passkey", 320, 0)
    parts = dataclasses.replace(question.parts, answer=np.zeros(12, np.int32))
    prefix = prefill(own, parts, "C")
    caches = fill_caches(own, parts, prefix)
    prompt = np.concatenate([parts.context, parts.question]).tolist()
    answers, logits = [], []
    for ask in (
        lambda: answer(own, parts, prefix, caches)[0],
        lambda: answer(own, parts, prefix, caches)[0],
        lambda: generate(own, [prompt], 12)[0],
    ):
        drawn_from.clear()
        answers.append(ask())
        jax.effects_barrier()
        # The first token comes from the prompt's last row, which evaluation has already.
        logits.append(np.stack(drawn_from[-11:]))
    assert answers[0] == answers[1] == answers[2]
    np.testing.assert_array_equal(logits[0], logits[1])
    np.testing.assert_array_equal(logits[0], logits[2])


def test_protocol_a_leaves_the_caches_for_the_next_budget(subject):
    sparse = attending(
        subject.decoder, dataclasses.replace(MODEL, attention=OracleTopK(budget=16, recent=8))
    )
    question = suite._question(subject, suite._Texts(subject, PLAN), "passkey", 320, 1)
    parts = dataclasses.replace(question.parts, answer=np.zeros(6, np.int32))
    prefix = prefill(subject.decoder, parts, "A")
    caches = fill_caches(sparse, parts, prefix)
    first, _ = answer(sparse, parts, prefix, caches)
    assert answer(sparse, parts, prefix, caches)[0] == first
    assert int(caches[0].length[0]) == len(parts.context) + len(parts.question)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tasks": ("niah",)}, r"tasks=\('niah',\): choose some of perplexity, "),
        ({"tasks": ()}, "choose some of"),
        ({"policies": ("quest:pages=8",)}, "must read NAME:FIELD=VALUE"),
        ({"protocols": ("D",)}, "use some of A, B and C"),
        ({"lengths": (33,)}, "lengths of at least 34"),
        ({"samples": 0}, "samples=0"),
    ],
)
def test_a_plan_that_cannot_be_run(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(PLAN, **changes)


def test_a_model_with_branches_of_its_own_is_asked_as_it_is(tmp_path):
    nsa = NSA(
        compression_block=4, compression_stride=2, selection_block=8, selected_blocks=4, window=8
    )
    decoder = Decoder(dataclasses.replace(MODEL, attention=nsa), rngs=nnx.Rngs(0))
    subject = Subject(decoder, ByteTokenizer(), documents)
    plan = Plan(("perplexity",), (64,), 1, ("own",), protocols=("C",), scored=16)
    (row,) = run(subject, plan, tmp_path / "own").rows
    assert row.samples == 1
    with pytest.raises(ValueError, match=r"NSA has others of its own; use --policies own"):
        run(subject, dataclasses.replace(plan, policies=("dense",)), tmp_path / "dense")


@pytest.mark.full
def test_a_selector_of_its_own_meets_policies_on_the_same_weights(tmp_path):
    hashing = HashAttention(bits=8, budget=8, sinks=2, recent=4, hidden=8)
    decoder = Decoder(dataclasses.replace(MODEL, attention=hashing), rngs=nnx.Rngs(0))
    subject = Subject(decoder, ByteTokenizer(), documents)
    plan = Plan(("perplexity",), (64,), 1, ("dense", "own", "random:budget=8"), scored=16)
    rows = {row.cell.policy: row for row in run(subject, plan, tmp_path).rows}
    assert rows["own"].metrics["density_pairs"] < 1
    assert jnp.isfinite(rows["random:budget=8"].difference)
