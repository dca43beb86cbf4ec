"""Form of answers beside their content: length, repetition, and whether they keep to the form that a task asks for."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from llm.common.errors import InputError
from llm.common.files import parse_json
from llm.evaluation.metrics import Interval, wilson

GRAM = 4  # words in a repeated passage
FEWEST = 5  # expected answers from which the form of a task is read


class Answer(str):
    """A generated text that knows whether a stop token ended it, or the limit of its length."""

    stopped: bool

    def __new__(cls, text: str, stopped: bool) -> Answer:
        answer = super().__new__(cls, text)
        answer.stopped = stopped
        return answer


class FormReport(NamedTuple):
    """Form of a model's answers; `valid` is None where no task has a form, `stopped` where none was generated."""

    words: float  # mean of an answer
    expected_words: float
    repetition: float  # mean share of an answer's passages of GRAM words that stood in it before
    valid: Interval | None  # of the answers to tasks with a form, those that have it
    stopped: Interval | None  # of the answers, those that ended before the limit of their length


def is_json(text: str) -> bool:
    try:
        return isinstance(parse_json(text), dict | list)
    except (ValueError, InputError):
        return False


def is_list(text: str) -> bool:
    items = text.split(",")
    return len(items) > 1 and all(item.strip() for item in items) and not re.search(r"[.!?:\n]", text)


def is_sentence(text: str) -> bool:
    return re.fullmatch(r"[^\n]*[.!?]['\")]?", text) is not None and re.search(r"[.!?]['\")]?\s", text) is None


FORMS: Mapping[str, Callable[[str], bool]] = {  # the strictest first
    "JSON": is_json,
    "number": lambda text: re.fullmatch(r"[-+]?\d[\d,]*(\.\d+)?\s?%?", text) is not None,
    "yes or no": lambda text: text.lower().rstrip(".") in ("yes", "no"),
    "one word": lambda text: bool(text) and not re.search(r"\s", text),
    "list with commas": is_list,
    "one sentence": is_sentence,
}


def task_forms(expected: Sequence[str], tasks: Sequence[str]) -> dict[str, str]:
    """Return the form of each task that has one: the first that all its expected answers have."""
    answers: dict[str, list[str]] = {}
    for text, task in zip(expected, tasks, strict=True):
        answers.setdefault(task, []).append(text.strip())
    found = {
        task: next((name for name, fits in FORMS.items() if all(map(fits, texts))), None)
        for task, texts in answers.items()
        if len(texts) >= FEWEST
    }
    return {task: name for task, name in sorted(found.items()) if name is not None}


def form_report(answers: Sequence[str], expected: Sequence[str], tasks: Sequence[str]) -> FormReport:
    """Report on the form of a model's answers."""
    forms = task_forms(expected, tasks)
    generated = [text for text in answers if isinstance(text, Answer)]
    fitting = [FORMS[forms[task]](text.strip()) for text, task in zip(answers, tasks, strict=True) if task in forms]
    return FormReport(
        words=mean([len(text.split()) for text in answers]),
        expected_words=mean([len(text.split()) for text in expected]),
        repetition=mean([repetition(text) for text in answers]),
        valid=wilson(sum(fitting), len(fitting)) if fitting else None,
        stopped=wilson(sum(text.stopped for text in generated), len(generated)) if generated else None,
    )


def repetition(text: str) -> float:
    """Return the share of a text's passages of GRAM words that stood in it before (seq-rep, Welleck et al. 2020)."""
    words = text.lower().split()
    grams = [tuple(words[i : i + GRAM]) for i in range(len(words) - GRAM + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def mean(values: Sequence[float]) -> float:
    return sum(values) / max(1, len(values))
