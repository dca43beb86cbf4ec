"""The audit of `data/tokens`, and the headlines on what is left."""

from __future__ import annotations

from pathlib import Path

import pytest

from llm.common.files import write_atomic
from llm.data.examples import Pair
from llm.data.shards import bits_per_byte
from llm.evaluation.base.base_model import BaseResult, evaluate_base
from llm.evaluation.classifier.classification import ClassifierResult, evaluate_classifiers
from llm.evaluation.instruct.instruction_following import InstructResult, evaluate_instruct
from llm.evaluation.leakage import asked, audit_tokens, clean_headlines
from llm.evaluation.metrics import Interval
from llm.reporting import leakage
from llm.tokenizer.bpe import Tokenizer
from tests.evaluation.models import make_folder, params, write_corpus, write_rows

LONG = "the cat sat on the red mat and the dog ran to the mat and the cat ran to the red dog"
NEAR = LONG.replace("sat", "slept")
CORPUS = {"train": [LONG, "a dog"], "val": ["the cat"], "test": ["the mat is red", NEAR, "a dog", "a cat"]}
ANSWERED = [("say", "cat"), (LONG, "dog"), ("red?", "red")]
Results = tuple[Path, BaseResult, ClassifierResult, InstructResult]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> Results:
    tokens = tmp_path_factory.mktemp("tokens")
    write_corpus(tokens / "corpus", tokenizer, CORPUS)
    rows = [{"text": text, "label": label} for text, label in (("a cat", "cat"), (LONG, "cat"), ("a dog", "dog"))]
    held_out = [{"text": text, "label": label} for text, label in (("A CAT!", "cat"), ("the cat", "dog"))]
    for split, part in (("train", rows * 4), ("val", rows[:1]), ("test", held_out)):
        write_rows(tokens / "messages" / f"{split}.jsonl", part)
    write_atomic(tokens / "messages" / "labels.json", '["cat", "dog"]')
    pairs = [{"instruction": question, "input": "", "output": answer, "task": ""} for question, answer in ANSWERED]
    for split, part in (("train", pairs[:1]), ("val", []), ("test", pairs)):
        write_rows(tokens / "instructions" / f"{split}.jsonl", part)
    classifier = make_folder(tokenizer, "classifier", ["cat", "dog"])
    return (
        tokens,
        evaluate_base(make_folder(tokenizer), tokens / "corpus", params(prompts=[]), 1),
        evaluate_classifiers({"gpt": classifier}, tokens / "messages", 4),
        evaluate_instruct({"gpt": make_folder(tokenizer)}, "alpaca", tokens / "instructions", params()),
    )


def test_each_held_out_split_is_audited(results: Results, tokenizer: Tokenizer) -> None:
    audit = audit_tokens(results[0], tokenizer, params())
    counts = {(part.name, part.split): part.counts() for part in audit.parts}
    assert len(counts) == 6
    assert (counts["corpus", "test"]["near"], counts["corpus", "test"]["exact"]) == (1, 1)
    assert (counts["messages", "test"]["normalised"], counts["messages", "val"]["exact"]) == (1, 1)
    assert (counts["instructions", "test"]["exact"], counts["instructions", "test"]["corpus"]) == (1, 1)
    assert audit.corpus_bytes == audit.corpus_total == sum(map(len, CORPUS["train"]))
    part = audit_tokens(results[0], tokenizer, params(audit_bytes=40, audit_texts=0))
    assert part.corpus_bytes < audit.corpus_total == part.corpus_total
    assert part.parts[1].counts()["near"] == 0


def test_a_conversation_leaks_with_its_history_alone() -> None:
    """Equal last questions behind other words are different examples."""

    def pair(told: str) -> Pair:
        turns = (("user", told), ("assistant", "Yes."), ("user", "Who is it?"), ("assistant", "Anna."))
        return Pair("Who is it?", "", "Anna.", "", tuple({"role": role, "content": text} for role, text in turns))

    assert asked(pair("Anna bakes.")) != asked(pair("Hugo bakes.")) == "Hugo bakes.\nYes.\nWho is it?"
    assert asked(Pair("Who is it?", "a baker", "Anna.", "")) == "Who is it?\na baker"


def test_headlines_without_leaks_are_those_of_the_texts_left(results: Results, tokenizer: Tokenizer) -> None:
    tokens, base, classifiers, instruct = results
    audit = audit_tokens(tokens, tokenizer, params())
    text, messages, pairs = clean_headlines(audit, base, classifiers, instruct)
    assert (text.left, messages.left, pairs.left) == (2, 1, 1)
    kept = [base.documents[0], base.documents[3]]
    assert [document.n_bytes for document in base.documents] == [len(text) for text in CORPUS["test"]]
    assert sum(document.nats["gpt"] for document in base.documents) == pytest.approx(base.gpt.nats)
    assert text.clean["ngram"] == pytest.approx(bits_per_byte(sum(d.nats["ngram"] for d in kept), 14 + 5))
    for name, figure in messages.clean.items():
        assert isinstance(figure, Interval)
        assert figure.value == float(classifiers.predicted(name)[1] == "dog")
    assert set(pairs.clean) == set(instruct.reports)
    lines = "\n".join(leakage.section(audit, [text, messages, pairs], {"messages"}))
    assert r"| normalised | A CAT\! | a cat |" in lines and "withheld" in lines
    assert "| accuracy, GPT | 1 |" in lines
    found = leakage.metrics(audit, [text, messages, pairs])
    assert found["leaks_messages_test"]["leaked"] == 1
    assert found["clean"]["bpb_ngram"] == text.clean["ngram"] and "accuracy_tfidf" in found["clean"]
