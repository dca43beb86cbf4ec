"""Form of answers: length, repetition, ends and the form of a task."""

from __future__ import annotations

import pytest

from llm.evaluation.instruct.answer_form import FORMS, Answer, form_report, repetition, task_forms

FITTING = {
    "JSON": (['{"a": 1}', "[]"], ["{a}", "1", "[" * 100_000]),
    "number": (["1,200.50", "-3", "45 %"], ["one", "3 apples", ""]),
    "yes or no": (["Yes", "no."], ["maybe", "yes and no"]),
    "one word": (["cold", "日本"], ["very cold", ""]),
    "list with commas": (["a, b", "old flute, jug, wolf"], ["a", "a,, b", "First, go. Then, stop.", "a, b\nc, d"]),
    "one sentence": (["Dora has the map.", 'He said "go."'], ["Dora has", "One. Two.", "One\nTwo."]),
}


@pytest.mark.parametrize("name", FORMS)
def test_forms_tell_what_has_them(name: str) -> None:
    good, bad = FITTING[name]
    assert all(map(FORMS[name], good)) and not any(map(FORMS[name], bad))


def test_a_task_has_the_strictest_form_that_all_its_answers_share() -> None:
    expected = ["1", "2", "3", "4", "5", *["a, b"] * 5, *["x y"] * 5, *["7"] * 4]
    tasks = [*["sum"] * 5, *["sort"] * 5, *["free"] * 5, *["few"] * 4]
    assert task_forms(expected, tasks) == {"sort": "list with commas", "sum": "number"}


def test_report_counts_ends_repetition_and_form() -> None:
    expected, tasks = ["a, b"] * 5 + ["free text"], ["sort"] * 5 + ["free"]
    loop = Answer("go on and on go on and on", stopped=False)
    report = form_report([*[Answer("b, a", stopped=True)] * 3, Answer("b a", stopped=True), loop, "x"], expected, tasks)
    assert report.valid is not None and report.valid.value == 3 / 5, "of the task with a form alone"
    assert report.stopped is not None and report.stopped.value == 4 / 5, "of the generated answers alone"
    assert report.words == pytest.approx((2 * 4 + 8 + 1) / 6) and report.expected_words == 2
    assert report.repetition == pytest.approx(repetition(loop) / 6) and repetition(loop) == pytest.approx(1 / 5)
    free = form_report(["x"], ["free text"], [""])
    assert (free.valid, free.stopped) == (None, None)


def test_repetition_of_short_and_endless_texts() -> None:
    assert repetition("") == repetition("one two three") == repetition("all of these words are different") == 0
    assert repetition("la " * 100) > 0.98
