"""Baselines: n-grams and a compressor on text, classical classifiers on messages, the nearest pair on instructions.

All of them learn from train alone. Settings are chosen on val, nothing on test.
"""

from __future__ import annotations

import lzma
import re
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from llm.data.examples import Message, Pair

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


# ---- text ------------------------------------------------------------------------------------------------------------


class _Order(NamedTuple):
    """The n-grams of one length n, numbered by their place in `keys`."""

    keys: Ints  # sorted; (number of the (n-1)-gram in front) * vocab_size + token
    share: Floats  # of each n-gram: its discounted count, as a fraction of all counts behind the same (n-1)-gram
    backoff: Floats  # of each (n-1)-gram: the fraction that discounting freed, which the next lower order shares out


class NGram:
    """An n-gram model of tokens with interpolated, modified Kneser-Ney smoothing (Chen and Goodman 1999, section 3).

        P_n(w | h) = share(h w) + backoff(h) * P_{n-1}(w | h without its first token),   P_0 = 1 / vocab_size

    The highest order counts occurrences, the lower ones in how many different contexts an n-gram occurs.
    """

    def __init__(self, tokens: Ints, order: int, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        self.orders: list[_Order] = []
        order = min(order, len(tokens))
        history = np.zeros(len(tokens), dtype=np.int64)  # number of the (n-1)-gram in front of tokens[n-1:]
        n_histories = 1
        keys, grams = _numbered(history * vocab_size + tokens)
        for n in range(1, order + 1):
            if n == order:
                counts = np.bincount(grams)
                self.orders.append(_discounted(keys, counts, n_histories, vocab_size))
                return
            longer_keys, longer = _numbered(grams[:-1] * vocab_size + tokens[n:])
            last_n = np.empty(len(longer_keys), dtype=np.int64)  # of each (n+1)-gram: the n-gram that it ends with
            last_n[longer] = grams[1:]
            counts = np.bincount(last_n, minlength=len(keys))
            self.orders.append(_discounted(keys, counts, n_histories, vocab_size))
            n_histories, keys, grams = len(keys), longer_keys, longer

    def nats(self, tokens: Ints) -> Floats:
        """Return the loss of each token but the first in nats, [N-1], given the tokens in front of it."""
        p = np.full(len(tokens), 1 / self.vocab_size)
        history = np.zeros(len(tokens), dtype=np.int64)  # -1: never seen in training
        for n, (keys, share, backoff) in enumerate(self.orders, start=1):
            key = history * self.vocab_size + tokens[n - 1 :]
            gram = np.minimum(np.searchsorted(keys, key), len(keys) - 1)
            seen = keys[gram] == key  # never with a history of -1: its key is negative
            p[n - 1 :] *= np.where(history >= 0, backoff[history], 1.0)
            p[n - 1 :] += np.where(seen, share[gram], 0.0)
            history = np.where(seen, gram, -1)[:-1]
            if not len(history):
                break
        return -np.log(p[1:])


def _numbered(keys: Ints) -> tuple[Ints, Ints]:
    """Return the different keys in order, and for each key its place among them."""
    unique, places = np.unique(keys, return_inverse=True)
    return unique, places


def _discounted(keys: Ints, counts: Ints, n_histories: int, vocab_size: int) -> _Order:
    discount = _discounts(counts)[np.minimum(counts, 3)]
    history = keys // vocab_size
    total = np.bincount(history, counts, n_histories)
    freed = np.bincount(history, discount, n_histories)
    backoff = np.where(total > 0, freed / np.maximum(total, 1), 1.0)
    return _Order(keys, (counts - discount) / np.maximum(total[history], 1), backoff)


def _discounts(counts: Ints) -> Floats:
    """Return the discounts of counts of 0, 1, 2, and 3 or more: Chen and Goodman's estimate.

    Where a tiny or an artificial corpus leaves the estimate undefined or outside [0, count], 0.75 replaces it.
    """
    n1, n2, n3, n4 = (float((counts == k).sum()) for k in (1, 2, 3, 4))
    y = n1 / (n1 + 2 * n2) if n1 else 0.0
    ratios = ((1, n1, n2), (2, n2, n3), (3, n3, n4))
    estimates = [k - (k + 1) * y * more / here if here else -1.0 for k, here, more in ratios]
    return np.array([0.0, *(d if 0 < d <= k else 0.75 for k, d in enumerate(estimates, start=1))])


def xz_bytes(train: bytes, test: bytes) -> int:
    """Return the bytes that `test` adds behind `train` under xz's LZMA2 at its strongest.

    The dictionary is large enough to reach back over all of `train`.
    """
    size = 1 << max(12, (len(train) + len(test)).bit_length())
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "dict_size": min(size, 3 << 29)}]

    def compressed(data: bytes) -> int:
        return len(lzma.compress(data, format=lzma.FORMAT_RAW, filters=filters))

    with ThreadPoolExecutor(2) as threads:  # lzma frees the interpreter lock
        alone, together = threads.map(compressed, (train, train + test))
    return together - alone


PPM_ORDER = 24  # bytes of context, at most
PPM_MEMORY = 1 << 28  # bytes of the model: full, it starts anew


def ppm_bytes(train: bytes, test: bytes) -> int:
    """Return the bytes that `test` adds behind `train` under PPM, variant H (Shkarin 2002: PPMd as in 7z)."""
    from pyppmd import compress

    alone, together = (
        len(compress(data, max_order=PPM_ORDER, mem_size=PPM_MEMORY)) if data else 0 for data in (train, train + test)
    )
    return together - alone


# ---- messages --------------------------------------------------------------------------------------------------------

TRIGGER_WORDS = (
    r"award|bonus|call|cash|chance|claim|click|cost|credit|customer|deal|discount|double|exclusive|expire|free|gift|"
    r"guarantee|hurry|limited|loan|lottery|lucky|million|mobile|money|offer|order|pay|phone|play|pounds?|price|prize|"
    r"profit|promo|reply|reward|rich|risk|sale|save|secret|select|sms|special|stop|subscribe|text|tone|txt|unlimited|"
    r"urgent|visit|voucher|win|winner|won"
)
FEATURES = {
    "trigger words": re.compile(rf"\b(?:{TRIGGER_WORDS})(?:s|ed|d|ing)?\b", re.IGNORECASE),
    "exclamation marks": re.compile("!"),
    "question marks": re.compile(r"\?"),
    "capitals": re.compile("[A-Z]"),
    "words in capitals": re.compile(r"\b[A-Z]{2,}\b"),
    "links": re.compile(r"https?://|www\.|\w\.(?:com|net|org|co|uk|info|biz)\b", re.IGNORECASE),
    "digits": re.compile(r"\d"),
    "long numbers": re.compile(r"\d{5,}"),
    "money": re.compile(r"[$£€%]"),
    "words": re.compile(r"\w+"),
    "characters": re.compile(r".", re.DOTALL),
}


def hand_made_features(texts: Sequence[str]) -> Floats:
    """Return the features of early spam filters: log counts, and the shares of capitals and digits, [N, features]."""
    counts = np.array([[len(p.findall(text)) for p in FEATURES.values()] for text in texts], dtype=np.float64)
    names = list(FEATURES)
    length = np.maximum(counts[:, names.index("characters")], 1)
    shares = [counts[:, names.index(name)] / length for name in ("capitals", "digits")]
    return np.column_stack([np.log1p(counts), *shares])


class _Method(NamedTuple):
    """A classical classifier: its features, its model for a setting, and the settings that val chooses among."""

    features: str
    model: Callable[[float], Any]
    settings: tuple[float, ...]


def _feature_makers() -> dict[str, Callable[[], Any]]:
    """Return what turns texts into numbers, by the name in `_Method.features`."""
    from sklearn.feature_extraction.text import CountVectorizer, TfidfVectorizer
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import FunctionTransformer, StandardScaler

    def words(longest: int) -> Any:
        return TfidfVectorizer(token_pattern=r"\w+|[^\w\s]", ngram_range=(1, longest), sublinear_tf=True)

    return {
        "hand-made": lambda: make_pipeline(FunctionTransformer(hand_made_features), StandardScaler()),
        "counts": lambda: CountVectorizer(token_pattern=r"\w+"),
        "word pairs": lambda: words(2),
        "words": lambda: words(4),
        "characters": lambda: TfidfVectorizer(analyzer="char", ngram_range=(2, 6), sublinear_tf=True),
    }


def _methods() -> dict[str, _Method]:
    from sklearn.ensemble import HistGradientBoostingClassifier
    from sklearn.linear_model import LogisticRegression
    from sklearn.naive_bayes import ComplementNB, MultinomialNB
    from sklearn.svm import LinearSVC

    def regression(c: float) -> Any:
        return LogisticRegression(C=c, max_iter=5000)

    def svm(c: float) -> Any:
        return LinearSVC(C=c, max_iter=10_000, random_state=0)

    def boosting(rate: float) -> Any:
        return HistGradientBoostingClassifier(learning_rate=rate, random_state=0)

    return {
        "filter": _Method("hand-made", regression, (1.0, 10.0, 100.0)),
        "naive_bayes": _Method("counts", lambda alpha: MultinomialNB(alpha=alpha), (1.0,)),
        "tfidf": _Method("word pairs", regression, (1.0, 10.0, 100.0)),
        "boosting": _Method("hand-made", boosting, (0.03, 0.1, 0.3)),
        "complement_nb": _Method("words", lambda alpha: ComplementNB(alpha=alpha), (1.0, 0.3, 0.1, 0.03)),
        "logistic_words": _Method("words", regression, (1.0, 10.0, 100.0)),
        "logistic_characters": _Method("characters", regression, (1.0, 10.0, 100.0)),
        "svm_words": _Method("words", svm, (0.1, 1.0, 10.0)),
        "svm_characters": _Method("characters", svm, (0.1, 1.0, 10.0)),
    }


def classical_classifiers(
    train: Sequence[Message],
    val: Sequence[Message],
    texts: Sequence[str],
    labels: Sequence[str],
    only: Collection[str] | None = None,
) -> dict[str, Floats]:
    """Return probabilities [N, K] for `texts` by each classical method, or `only` by some, trained on `train`.

    majority             the shares of the labels in train: always the most frequent one
    filter, boosting     logistic regression, boosted trees: on hand-made features
    naive_bayes          multinomial naive Bayes on single words
    tfidf                logistic regression on TF-IDF of words and word pairs
    complement_nb        complement naive Bayes on TF-IDF of 1 to 4 words
    logistic_*, svm_*    logistic regression, linear SVM: on TF-IDF of 1 to 4 words, of 2 to 6 characters
    """
    number = {label: k for k, label in enumerate(labels)}
    shares = np.bincount([number[m.label] for m in train], minlength=len(labels)) / len(train)
    results = {"majority": np.tile(shares, (len(texts), 1))}
    if np.count_nonzero(shares) < 2:  # nothing to learn from
        return results
    known = [m for m in val if shares[number[m.label]] > 0]
    actual, actual_val = ([number[m.label] for m in part] for part in (train, known))
    parts = [[m.text for m in train], [m.text for m in known], list(texts)]
    methods = {name: method for name, method in _methods().items() if only is None or name in only}
    used = {method.features for method in methods.values()}
    for features, make in _feature_makers().items():
        if features not in used:
            continue
        maker = make()
        try:
            x = maker.fit_transform(parts[0])
        except ValueError:  # no text holds such a feature
            continue
        x_val, x_test = (maker.transform(part) if part else None for part in parts[1:])
        for name, method in methods.items():
            if method.features == features:
                fitted = [method.model(setting).fit(x, actual) for setting in method.settings]
                if len(fitted) > 1 and known:
                    fitted.sort(key=lambda model: -model.score(x_val, actual_val))
                results[name] = np.zeros((len(texts), len(labels)))
                results[name][:, fitted[0].classes_] = _probabilities(fitted[0], x_test)
    return {name: results[name] for name in ("majority", *methods) if name in results}


def _probabilities(model: Any, x: Any) -> Floats:
    """Return probabilities [N, K]; an SVM's margins become some that rank and decide as they do."""
    if hasattr(model, "predict_proba"):
        return np.asarray(model.predict_proba(x))
    margins = model.decision_function(x)
    logits = np.column_stack((-margins, margins)) / 2 if margins.ndim == 1 else margins
    exponents = np.exp(logits - logits.max(axis=1, keepdims=True))
    return exponents / exponents.sum(axis=1, keepdims=True)


# ---- instructions ----------------------------------------------------------------------------------------------------

ROWS_AT_ONCE = 256  # of the questions that are compared with all training pairs together


def nearest_answers(train: Sequence[Pair], pairs: Sequence[Pair]) -> list[str]:
    """Return for each pair the answer of the training pair whose instruction and input are most alike, by TF-IDF."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    words = TfidfVectorizer(token_pattern=r"\w+|[^\w\s]", ngram_range=(1, 2), sublinear_tf=True)
    known = words.fit_transform([_question(pair) for pair in train])
    asked = words.transform([_question(pair) for pair in pairs])
    answers: list[str] = []
    for start in range(0, len(pairs), ROWS_AT_ONCE):
        alike = (asked[start : start + ROWS_AT_ONCE] @ known.T).toarray()
        answers += [train[i].output for i in alike.argmax(axis=1)]
    return answers


def _question(pair: Pair) -> str:
    return f"{pair.instruction}\n{pair.input}"
