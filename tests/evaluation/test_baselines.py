"""The n-gram model against a second one written with dictionaries; compressor and classifiers on known texts."""

from __future__ import annotations

import lzma
import math
import random
from collections import Counter

import numpy as np
import pytest

from llm.data.examples import Message, Pair
from llm.evaluation import baselines
from llm.evaluation.baselines import (
    NGram,
    classical_classifiers,
    hand_made_features,
    nearest_answers,
    ppm_bytes,
    xz_bytes,
)

METHODS = ["majority", "filter", "naive_bayes", "tfidf", "boosting", "complement_nb"]
METHODS += [f"{method}_{features}" for method in ("logistic", "svm") for features in ("words", "characters")]


def markov_text(length: int, seed: int, vocab_size: int = 12) -> np.ndarray:
    """Tokens that mostly follow from the two before them."""
    rng = random.Random(seed)
    tokens = [0, 1]
    while len(tokens) < length:
        a, b = tokens[-2:]
        tokens.append(
            (3 * a + b + 1) % vocab_size if rng.random() < 0.7 else min(int(rng.expovariate(0.4)), vocab_size - 1)
        )
    return np.array(tokens)


def kneser_ney(train: list[int], context: list[int], word: int, order: int, vocab_size: int) -> float:
    """Interpolated modified Kneser-Ney, straight from Chen and Goodman (1999), one probability at a time."""

    def ngrams(n: int) -> Counter[tuple[int, ...]]:
        return Counter(tuple(train[i : i + n]) for i in range(len(train) - n + 1))

    def counts(n: int) -> Counter[tuple[int, ...]]:
        return ngrams(n) if n == order else Counter(gram[1:] for gram in ngrams(n + 1))

    p = 1 / vocab_size
    for n in range(1, order + 1):
        history = tuple(context[len(context) - n + 1 :])
        if len(history) < n - 1:
            break
        c = counts(n)
        having = Counter(c.values())
        y = having[1] / (having[1] + 2 * having[2])
        d = [0.0, *(k - (k + 1) * y * having[k + 1] / having[k] for k in (1, 2, 3))]
        assert all(0 < x <= k for k, x in enumerate(d[1:], start=1)), "choose a text without a special case"
        followers = {gram[-1]: count for gram, count in c.items() if gram[:-1] == history}
        total = sum(followers.values())
        if total:
            freed = sum(d[min(count, 3)] for count in followers.values())
            count = followers.get(word, 0)
            p = (count - d[min(count, 3)]) / total + freed / total * p
    return p


def test_ngram_agrees_with_the_definition() -> None:
    tokens = np.random.default_rng(0).zipf(1.5, 1500) % 200
    train, test = np.append(tokens[:1400], tokens[:50]), tokens[1400:1450]
    nats = NGram(train, 3, 200).nats(test)
    expected = [
        -math.log(kneser_ney(train.tolist(), test[:i].tolist(), int(test[i]), 3, 200)) for i in range(1, len(test))
    ]
    assert nats == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("order", [1, 2, 5])
@pytest.mark.parametrize("train", [markov_text(400, 3), np.array([1, 2]), np.zeros(50, dtype=np.int64)])
def test_ngram_probabilities_sum_to_one(order: int, train: np.ndarray) -> None:
    model = NGram(train, order, 13)  # token 12 never occurs in training
    text = markov_text(20, 4)
    for context in (text[:1], text[:3], text, np.array([12, 12]), train[-4:]):
        p = [math.exp(-model.nats(np.append(context, word))[-1]) for word in range(13)]
        assert min(p) > 0
        assert sum(p) == pytest.approx(1.0, abs=1e-12)


def test_higher_orders_predict_better_and_beat_the_entropy_of_single_tokens() -> None:
    train, test = markov_text(5000, 5), markov_text(1000, 6)
    loss = {order: NGram(train, order, 12).nats(test).mean() for order in (1, 2, 3, 5)}
    assert loss[3] < 0.8 * loss[1]
    assert loss[3] < loss[2]
    assert loss[5] < 1.1 * loss[3]  # smoothing holds where there is nothing more to learn


def test_ngram_leaves_the_first_token_unscored() -> None:
    model = NGram(markov_text(100, 7), 3, 12)
    assert len(model.nats(np.array([5]))) == 0
    assert len(model.nats(np.array([5, 6, 7, 8]))) == 3


def test_xz_uses_the_training_text() -> None:
    words = [str(n) for n in np.random.default_rng(0).integers(0, 10**9, 20000)]
    text = " ".join(words).encode()
    assert xz_bytes(text, text[:30000]) < 200  # even the farthest part of it
    other = np.random.default_rng(1).bytes(30000)
    assert xz_bytes(text, other) == pytest.approx(30000, rel=0.03)
    assert xz_bytes(b"", text) == pytest.approx(len(lzma.compress(text, preset=9)), rel=0.01)


def test_ppm_uses_the_training_text_and_long_contexts() -> None:
    words = [str(n) for n in np.random.default_rng(0).integers(0, 10**9, 5000)]
    text = " ".join(words).encode()
    assert ppm_bytes(text, text[:20000]) < 0.05 * ppm_bytes(b"", text[:20000])
    other = np.random.default_rng(1).bytes(20000)
    assert ppm_bytes(text, other) > 20000
    assert ppm_bytes(b"", text[:20000]) < 20000 * 10**0.5 / 2**1.5  # digits alone need 3.3 bits


HAM = ["see you at the mill", "the cow is in the barn", "bring bread please", "are you free on monday?", "i am at home"]
SPAM = ["WIN a cash prize now!!!", "claim your FREE gift at www.x.com", "call 0900123456 to win 500!"]


def test_classical_classifiers_learn_and_give_distributions() -> None:
    train = [Message(t, "ham") for t in HAM * 4] + [Message(t, "spam") for t in SPAM * 4]
    texts = ["the cow is at home", "WIN a FREE cash prize now!!!", "42"]
    results = classical_classifiers(train, train[::3], texts, ["ham", "spam"])
    assert list(results) == METHODS
    for p in results.values():
        assert p.shape == (3, 2)
        assert p.sum(axis=1) == pytest.approx(1.0)
    assert results["majority"][:, 1] == pytest.approx(3 / 8)
    for name in set(METHODS) - {"majority", "boosting"}:  # boosting splits no fewer than 20 rows
        assert results[name][:2].argmax(axis=1).tolist() == [0, 1], name


def test_classical_classifiers_take_any_number_of_labels_in_the_given_order() -> None:
    words = {"west": "sea sand boat", "south": "sun wine heat", "north": "snow ice cold"}
    train = [Message(text, label) for label, text in words.items() for _ in range(5)]
    labels = ["north", "unseen", "west", "south"]
    results = classical_classifiers(train, [], ["snow and ice", "sand on the boat", "wine and sun"], labels)
    for name in ("naive_bayes", "tfidf", "complement_nb", "logistic_characters", "svm_words", "svm_characters"):
        assert results[name].argmax(axis=1).tolist() == [0, 2, 3]
        assert results[name][:, 1].tolist() == [0, 0, 0]


def test_settings_are_chosen_on_val(monkeypatch: pytest.MonkeyPatch) -> None:
    """A val labelled by the model of one setting has that setting win, whichever it is."""
    rng = np.random.default_rng(0)
    noisy = [(i % 40 < 20) ^ (rng.random() < 0.3) for i in range(120)]
    train = [Message(f"w{i % 40} w{rng.integers(40)}", "ab"[first]) for i, first in enumerate(noisy)]
    texts = [f"w{i} w{j}" for i in range(40) for j in (1, 30)]
    methods = baselines._methods()

    def alone(setting: int) -> dict[str, np.ndarray]:
        one = {
            name: m._replace(settings=(m.settings[min(setting, len(m.settings) - 1)],)) for name, m in methods.items()
        }
        with monkeypatch.context() as patch:
            patch.setattr(baselines, "_methods", lambda: one)
            return classical_classifiers(train, [], texts, ["a", "b"])

    expected = [alone(0), alone(2)]
    differ = 0
    for name in ("tfidf", "complement_nb", "logistic_words", "svm_words", "svm_characters"):
        with monkeypatch.context() as patch:
            patch.setattr(baselines, "_methods", lambda name=name: {name: methods[name]})
            for one in expected:
                label = one[name].argmax(axis=1)
                val = [Message(text, "ab"[k]) for text, k in zip(texts, label, strict=True)]
                found = classical_classifiers(train, val, texts, ["a", "b"])[name].argmax(axis=1)
                assert (found == label).all(), name
        differ += (expected[0][name].argmax(axis=1) != expected[1][name].argmax(axis=1)).any()
    assert differ >= 3, "the settings differ, or the test shows nothing"


def test_nearest_pair_lends_its_answer() -> None:
    train = [Pair("Name the plural.", word, f"{word}s", "") for word in ("cow", "dog", "bee")]
    asked = [Pair("Name the plural.", "bee", "?", ""), Pair("plural of a dog", "", "?", "")]
    assert nearest_answers(train, asked) == ["bees", "dogs"]
    assert nearest_answers(train, asked * 200) == ["bees", "dogs"] * 200  # more than one block
    assert nearest_answers(train, [Pair("xyz", "", "?", "")]) == ["cows"]  # nothing in common: the first


def test_one_label_in_training_leaves_the_majority() -> None:
    assert list(classical_classifiers([Message("a b", "ham")], [], ["x"], ["ham", "spam"])) == ["majority"]


def test_hand_made_features_see_what_filters_look_for() -> None:
    plain, loud = hand_made_features(["come home", "COME home!!! www.prize.com 080012345 free"])
    assert (loud > plain).sum() >= 8
    assert np.isfinite(hand_made_features([""])).all()
