"""Labels for texts: the answer depends on the text and on nothing else."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llm.checkpoint.folder import Checkpoint, CheckpointConfig, Decision, load_checkpoint, save_checkpoint
from llm.common.errors import InputError
from llm.inference.classify import NO_TEXT, UNSURE, classify_texts, decide, doubt, label_logits
from llm.model.classifier import GPTClassifier
from llm.model.gpt import GPT
from llm.tokenizer.bpe import Tokenizer
from tests.helpers import LLAMA_FORM, gpt_config, randomize, tiny_tokenizer

LABELS = ["ham", "spam", "neither"]


def classifier(max_length: int = 12) -> Checkpoint:
    tokenizer = tiny_tokenizer()
    gpt = GPT(gpt_config(**LLAMA_FORM, vocab_size=tokenizer.vocab_size))
    config = CheckpointConfig(kind="classifier", gpt=gpt.config, labels=LABELS, max_length=max_length)
    model = GPTClassifier(gpt, len(LABELS))
    randomize(model)
    return Checkpoint(model, tokenizer, config)


TEXTS = ["the cat sat on the mat", "ham", "", "spam and ham, spam and ham, spam and ham", "ß 1234 zzz", "the dog"]


def test_probabilities_are_the_softmax_of_the_models_logits() -> None:
    folder = classifier()
    found = classify_texts(folder, TEXTS)
    assert found.shape == (len(TEXTS), 3)
    torch.testing.assert_close(found.sum(dim=1), torch.ones(len(TEXTS)))
    for text, probabilities in zip(TEXTS, found, strict=True):
        ids = folder.tokenizer.encode(text)[:12] or [folder.tokenizer.eot]
        with torch.no_grad():
            logits = folder.model(torch.tensor([ids]), torch.tensor([len(ids)]))[0]
        torch.testing.assert_close(probabilities, logits.softmax(dim=0), atol=1e-6, rtol=0)
    assert found.std(dim=0).min() > 0.01  # the texts do get different answers


@settings(max_examples=25, deadline=None)
@given(rows=st.lists(st.sampled_from(range(len(TEXTS))), max_size=9), batch_size=st.integers(1, 5))
def test_an_answer_does_not_depend_on_batch_padding_or_order(rows: list[int], batch_size: int) -> None:
    folder = classifier()
    alone = torch.cat([classify_texts(folder, [text]) for text in TEXTS])
    found = classify_texts(folder, [TEXTS[row] for row in rows], batch_size)
    torch.testing.assert_close(found, alone[rows], atol=1e-6, rtol=0)


def test_only_max_length_tokens_are_read() -> None:
    folder = classifier(max_length=4)
    start = folder.tokenizer.decode(folder.tokenizer.encode(TEXTS[3])[:4])
    assert torch.equal(classify_texts(folder, [TEXTS[3]]), classify_texts(folder, [start]))
    assert not torch.equal(classify_texts(classifier(), [TEXTS[3]]), classify_texts(classifier(), [start]))


def test_a_saved_classifier_answers_the_same(tmp_path: Path) -> None:
    folder = classifier()
    save_checkpoint(tmp_path / "it", folder)
    assert torch.equal(classify_texts(load_checkpoint(tmp_path / "it"), TEXTS), classify_texts(folder, TEXTS))


def test_another_kind_of_model_is_named() -> None:
    folder = classifier()
    assert isinstance(folder.model, GPTClassifier)
    gpt = folder.model.gpt
    base = Checkpoint(gpt, folder.tokenizer, CheckpointConfig(kind="base", gpt=gpt.config))
    with pytest.raises(InputError, match="a model of kind base, not a classifier; name one such as models/classifier"):
        classify_texts(base, ["ham"])


@pytest.mark.parametrize("text", ["", " \n", "\u200b\u2060", "\ufe0f", "\ufffd", "\x00\x1b", "\ue000"])
def test_nothing_to_label_is_said(text: str) -> None:
    assert doubt(tiny_tokenizer(), text) == NO_TEXT


def test_nonsense_is_marked_where_the_tokenizer_has_learned_enough() -> None:
    rng = random.Random(0)
    words = ["".join(rng.choices("aeioubdfgklmnprst", k=rng.randint(3, 8))) for _ in range(400)]
    texts = [" ".join(rng.choices(words, k=30)) for _ in range(300)]
    tokenizer = Tokenizer.train(texts, vocab_size=1000)
    assert not [text for text in texts if doubt(tokenizer, text)]
    for nonsense in ("xqzj wvxq jzzq", "жщ ъыэ юя", "7301948562", "\u65e5\u672c\u8a9e"):
        assert "unlike the text that the tokenizer knows: 1." in str(doubt(tokenizer, nonsense)), nonsense
    for short in ("?", "ok", "7 pm", "!!!"):
        assert doubt(tokenizer, short) is None, "too short to judge"
    assert doubt(tiny_tokenizer(), "xqzj wvxq jzzq") is None, "too few pieces to judge by"


def test_temperature_softens_probabilities_and_keeps_labels(tmp_path: Path) -> None:
    folder = classifier()
    plain = classify_texts(folder, TEXTS)
    assert folder.config.temperature is None, "an old folder: as if it were 1"
    soft = folder._replace(config=folder.config.model_copy(update={"temperature": 4.0}))
    save_checkpoint(tmp_path / "it", soft)
    found = classify_texts(load_checkpoint(tmp_path / "it"), TEXTS)
    torch.testing.assert_close(found, (label_logits(folder, TEXTS) / 4).softmax(dim=1))
    assert torch.equal(found.argmax(dim=1), plain.argmax(dim=1))
    assert (found.max(dim=1).values < plain.max(dim=1).values).all()


def test_labels_follow_the_stored_decision() -> None:
    config = classifier().config

    def given(found: dict[str, float], **changes: object) -> str:
        return decide(CheckpointConfig.model_validate(dict(config) | changes), found)

    found = {"ham": 0.2, "spam": 0.3, "neither": 0.5}
    assert given(found) == "neither"
    assert given(found, decision=Decision(label="spam", threshold=0.25)) == "spam"
    assert given(found, decision=Decision(label="neither", threshold=0.6)) == "spam"
    assert given(found, unsure_below=0.6) == UNSURE
    assert given(found, unsure_below=0.4) == "neither"
    assert given(found, unsure_below=0.4, decision=Decision(label="spam", threshold=0.3)) == UNSURE


def test_decision_of_a_foreign_label_is_refused() -> None:
    with pytest.raises(ValueError, match="decision: expected one of the labels"):
        CheckpointConfig.model_validate(dict(classifier().config) | {"decision": Decision(label="x", threshold=0.5)})
    base = classifier().config.gpt
    with pytest.raises(ValueError, match="go with kind classifier"):
        CheckpointConfig(kind="base", gpt=base, temperature=2.0)
