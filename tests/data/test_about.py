"""The data that a finetuned model learned from, in its folder and on the screen."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import pytest

import llm
from llm.checkpoint.adapter import save_trained
from llm.checkpoint.card import new_card
from llm.checkpoint.folder import Checkpoint, CheckpointConfig, load_checkpoint
from llm.cli.main import main
from llm.cli.terminal import describe_training
from llm.common.errors import InputError
from llm.data.about import About, about_messages, about_pairs, may_quote, read_about
from llm.data.examples import Message, Pair
from llm.model.classifier import GPTClassifier
from llm.model.gpt import GPT
from tests.helpers import SHIPPED_FORM, gpt_config, randomize, tiny_tokenizer, train_params

PAIRS = [
    Pair("Name the cat.", "", "Ada", "question"),
    Pair("Name the dog.", "It sat.", "Bo", "question"),
    Pair("Sort.", "b, a", "a, b", "sorting"),
    Pair("x" * 300, "", "y", "long"),
    Pair("What?", "", "y", ""),
]


def test_tasks_are_counted_and_different_ones_quoted() -> None:
    assert about_pairs(PAIRS, quotable=True) == About(
        tasks={"question": 2, "sorting": 1, "long": 1}, examples=["Name the cat.", "Sort.\nb, a", "What?"]
    )
    messages = [Message(text, label) for text, label in (("a", "ham"), ("b", "ham"), ("a", "spam"), ("c", "spam"))]
    assert about_messages(messages, quotable=True).examples == ["a", "b", "c"]


def test_private_texts_are_not_quoted(tmp_path: Path) -> None:
    assert not may_quote(tmp_path, "messages")
    (tmp_path / "quotable.json").write_text('["instructions"]')
    assert may_quote(tmp_path, "instructions") and not may_quote(tmp_path, "messages")
    assert about_pairs(PAIRS, quotable=False).examples == []
    assert about_messages([Message("secret", "ham")], quotable=False).examples == []


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    form = gpt_config(**SHIPPED_FORM, vocab_size=280, context_length=32, emb_dim=32, head_dim=8)
    model = randomize(GPTClassifier(GPT(form), 2))
    assert isinstance(model, GPTClassifier)
    config = CheckpointConfig(kind="classifier", gpt=form, labels=["ham", "spam"], max_length=16)
    path = tmp_path_factory.mktemp("models") / "classifier"
    about = About(tasks={}, examples=["See you\nat six\x1b[2J"])
    save_trained(path, Checkpoint(model, tiny_tokenizer(), config), train_params(), new_card("classifier", about=about))
    return path


def test_classify_without_texts_says_what_it_was_trained_on(
    classifier: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ends = "python -m llm classify: no text to label; name texts or files, or - for the lines of stdin\n"
    assert main(["classify", str(classifier)]) == 1
    said = "labels: ham, spam\ntrained on texts such as:\n  See you at six\\x1b[2J\n"
    assert capsys.readouterr() == ("", said + ends)
    (classifier / "card.json").rename(classifier / "other.json")
    assert main(["classify", str(classifier)]) == 1
    assert capsys.readouterr() == ("", f"labels: ham, spam\n{ends}")
    (classifier / "other.json").rename(classifier / "card.json")


def test_a_folder_keeps_what_it_was_trained_on(classifier: Path) -> None:
    assert llm.load(classifier, device="cpu").about == About(tasks={}, examples=["See you\nat six\x1b[2J"])
    assert load_checkpoint(classifier).config.labels == ["ham", "spam"]
    assert describe_training([], About(tasks={"sorting": 1200}, examples=[])) == ["tasks: sorting (1,200)"]


def test_an_earlier_folder_has_it_in_a_file_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "about.json").write_text('{"tasks": {"sorting": 2}, "examples": []}')
    assert read_about(tmp_path) == About(tasks={"sorting": 2}, examples=[])


def test_a_damaged_about_is_one_line(tmp_path: Path) -> None:
    for content in ("[]", '{"tasks": 5, "examples": []}', "{"):
        (tmp_path / "about.json").write_text(content)
        with pytest.raises(InputError, match=r"about\.json"):
            read_about(tmp_path)


class Screen(io.TextIOWrapper):
    def isatty(self) -> bool:
        return True


def test_chat_in_a_terminal_begins_with_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    form = gpt_config(**SHIPPED_FORM, vocab_size=280, context_length=64, emb_dim=32, head_dim=8)
    model = randomize(GPT(form))
    assert isinstance(model, GPT)
    config = CheckpointConfig(kind="base", gpt=form).instructed("chatml", tiny_tokenizer())
    card = new_card("instruct", about=about_pairs(PAIRS, True))
    save_trained(tmp_path / "it", Checkpoint(model, tiny_tokenizer(), config), train_params(), card)
    monkeypatch.setattr(sys, "stdin", Screen(io.BytesIO(b"")))
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setattr("builtins.input", lambda prompt: (_ for _ in ()).throw(EOFError))
    assert main(["chat", str(tmp_path / "it")]) == 0
    shown = capsys.readouterr()
    assert "tasks: question (2), sorting (1), long (1)" in shown.err and "  Sort. b, a" in shown.err
    assert shown.out == "\n"
