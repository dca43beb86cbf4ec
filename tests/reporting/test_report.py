"""The report, its tables and pictures: the same twice, and text stays text."""

from __future__ import annotations

import csv
import io
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest

from llm.config import KINDS
from llm.data.examples import Pair
from llm.evaluation.base.base_model import BaseResult, Completion
from llm.evaluation.base.slices import Slice, Slices
from llm.evaluation.classifier.classification import ClassifierResult
from llm.evaluation.instruct.answer_form import Answer
from llm.evaluation.instruct.instruction_following import Example, InstructResult, ResponseLoss, TurnsReport
from llm.evaluation.metrics import Interval, answer_report, by_task, classification_report, roc_points
from llm.evaluation.seeds import spread
from llm.inference.classify import NO_TEXT
from llm.inference.score import Score
from llm.reporting import pictures, report, tables
from stages import evaluate as stage

EVIL = "</details><script>alert(1)</script> ![x](http://e.com/x.png) | `a` ```` $x$ \x1b[31m\u202e"


def results(labels: list[str]) -> tuple[BaseResult, ClassifierResult, InstructResult]:
    """Results with hostile texts in every place that data or a model fills."""
    rng = np.random.default_rng(0)
    actual = rng.integers(0, len(labels), 60)
    good, bad = np.eye(len(labels))[actual] * 2 + 1, np.ones((60, len(labels)))
    probabilities = {
        "gpt": good / good.sum(1, keepdims=True),
        "scratch": bad / len(labels),
        "majority": bad / len(labels),
    }
    classifiers = ClassifierResult(
        split="test",
        train_rows=100,
        labels=labels,
        reports={name: classification_report(actual, p, labels) for name, p in probabilities.items()},
        roc={name: roc_points(actual, p) for name, p in probabilities.items()},
        texts=[f"{EVIL} {i}" for i in range(60)],
        actual=[labels[k] for k in actual],
        probabilities=probabilities,
    )
    pairs = [Pair(EVIL, EVIL, "yes", task) for task in ("sum", EVIL)]
    answers = {"gpt": ["yes", "yes"], "base": [EVIL, EVIL], "scratch": ["no", "yes"]}
    instruct = InstructResult(
        split="test",
        template="alpaca",
        reports={name: answer_report(texts, ["yes", "yes"]) for name, texts in answers.items()},
        losses={name: ResponseLoss(6.0 + i, 4, 12) for i, name in enumerate(answers)},
        tasks={name: by_task(texts, ["yes", "yes"], [p.task for p in pairs]) for name, texts in answers.items()},
        examples=[Example(p, {name: texts[i] for name, texts in answers.items()}) for i, p in enumerate(pairs)],
        shown=[0, 1],
    )
    base = BaseResult(
        split="val",
        n_bytes=1000,
        train_bytes=5000,
        baseline_bytes=2500,
        parameters=1234,
        gpt=Score(500.0, 300),
        ngram=Score(1000.0, 300),
        xz_bytes=250,
        completions=[Completion(EVIL, "\n\n# no heading\n```\n<b>", EVIL)],
    )
    return base, classifiers, instruct


def test_metrics_are_nested_one_level() -> None:
    sections = tables.metrics(*results(["ham", "spam"]))
    assert sections["base"]["bpb"] == pytest.approx(500 / math.log(2) / 1000)
    assert sections["base_xz"]["bpb"] == 2.0
    assert sections["classifier"]["accuracy"] == 1.0
    assert sections["instruct"]["exact_match"] == 1.0
    assert sections["instruct_scratch"]["exact_match"] == 0.5
    assert all(isinstance(v, int | float) for section in sections.values() for v in section.values())


def test_headlines_are_few_and_equal_the_metrics() -> None:
    found = results(["ham", "spam"])
    sections, headlines = tables.metrics(*found), tables.headlines(*found)
    assert len(headlines) == 8
    assert headlines["bpb"] == sections["base"]["bpb"] and headlines["bpb_ngram"] == sections["base_ngram"]["bpb"]
    for name in ("accuracy", "exact_match"):
        section = {"accuracy": "classifier", "exact_match": "instruct"}[name]
        assert headlines[name] == sections[section][name]
        assert headlines[f"{name}_scratch"] == sections[f"{section}_scratch"][name]
    assert headlines["accuracy_classical"] == sections["classifier_majority"]["accuracy"]
    assert headlines["exact_match_alternative"] == sections["instruct_base"]["exact_match"]
    base, classifiers, instruct = found
    del classifiers.reports["scratch"], instruct.reports["scratch"]
    assert set(headlines) - set(tables.headlines(base, classifiers, instruct)) == {
        "accuracy_scratch",
        "exact_match_scratch",
    }


def test_conversations_are_reported_with_and_without_their_history() -> None:
    base, classifiers, instruct = results(["ham", "spam"])
    assert "### Conversations" not in report.markdown(base, classifiers, instruct, dict.fromkeys(KINDS, "s"), [], KINDS)
    said = [{"role": role, "content": text} for role, text in (("user", "cat?"), ("assistant", "no"))] * 2
    talk = instruct.examples[0]._replace(pair=Pair("cat?", "", "no", "sum", said))
    yes, no = answer_report(["yes"], ["yes"]), answer_report(["no"], ["yes"])
    instruct = instruct._replace(turns=TurnsReport(yes, no, no), examples=[talk, *instruct.examples[1:]])
    text = report.markdown(base, classifiers, instruct, dict.fromkeys(KINDS, "s"), [], KINDS)
    assert "| the same question without what was said before | 0.0 %" in text
    assert re.search(r"said before +user: cat\?", text)
    sections, headlines = (make(base, classifiers, instruct) for make in (tables.metrics, tables.headlines))
    assert sections["instruct_conversations"] == {
        "conversations": 1,
        "exact_match": 1.0,
        "exact_match_without_history": 0.0,
        "exact_match_of_single_turns": 0.0,
    }
    assert (headlines["exact_match_turns"], headlines["exact_match_turns_alone"]) == (1.0, 0.0)
    first, second = map(json.loads, tables.predictions(base, classifiers, instruct)["instructions.jsonl"].splitlines())
    assert first["messages"] == said and "messages" not in second and "tools" not in first


def test_slices_of_the_text_stand_in_report_and_metrics() -> None:
    base, classifiers, instruct = results(["ham", "spam"])
    assert "By kind of text" not in report.markdown(base, classifiers, instruct, SOURCES, [], KINDS)
    whole = Slice("all", 1000, {"gpt": Interval(0.72, 0.7, 0.75), "ngram": 1.44})
    speech = Slice("speech", 400, {"gpt": Interval(0.5, 0.4, 0.6), "ngram": 0.9})
    near = Slice("1-15", 250, {"gpt": 0.8, "ngram": 0.7})
    base = base._replace(slices=Slices(whole, [speech], [near]))
    text = report.markdown(base, classifiers, instruct, SOURCES, [], KINDS)
    assert "| predict text | 0.720 (0.700-0.750) bits per byte |" in text
    assert "| GPT | 0.7200 (0.7000-0.7500) |" in text
    assert "| speech in quotation marks | 40.0 % | 0.5000 (0.4000-0.6000) | 0.9000 |" in text
    assert "| 1-15 | 25.0 % | 0.8000 | 0.7000 |" in text
    sections = tables.metrics(base, classifiers, instruct)
    assert (sections["base"]["bpb_low"], sections["base"]["bpb_high"]) == (0.7, 0.75)
    assert "bpb_low" not in sections["base_ngram"], "it has no interval here"
    assert sections["base_by_kind"] == {"speech": 0.5, "speech_low": 0.4, "speech_high": 0.6}
    assert sections["base_by_position"] == {"1-15": 0.8}


def test_headlines_stand_beside_those_over_seeds() -> None:
    found = results(["ham", "spam"])
    spreads = {"accuracy": spread([0.9, 0.92, 0.94])}
    first, _, *rows = report.headlines(*found, spreads)
    assert "standard deviation" in first
    assert [row.split(" | ")[2] for row in rows[:3]] == ["-", "92.0 % ± 2.00 (87.0-97.0), 3 seeds", "-"]
    assert "seeds" not in "".join(report.headlines(*found))
    assert "92.0 % ± 2.00" in report.markdown(*found, SOURCES, [], KINDS, spreads).split("##")[0]


def test_plot_files_hold_what_dvc_plots() -> None:
    files = {
        name: list(csv.DictReader(io.StringIO(text))) for name, text in tables.plot_files(*results(["a", "b"])).items()
    }
    assert len(files["confusion.csv"]) == 60 and set(files["confusion.csv"][0]) == {"actual", "predicted"}
    assert [row["model"] for row in files["bpb.csv"]] == ["GPT", "n-gram model", "xz"]
    assert {row["classifier"] for row in files["classifiers.csv"]} >= {"GPT", "majority class"}
    assert set(files["roc.csv"][0]) == {"false_positive_rate", "true_positive_rate"}
    assert len(files["per_task.csv"]) == 6 and len(files["instructions.csv"]) == 3


def test_predictions_are_complete_and_a_line_each() -> None:
    base, classifiers, instruct = results(["ham", "spam"])
    files = {
        name: [json.loads(line) for line in text.rstrip("\n").split("\n")]
        for name, text in tables.predictions(base, classifiers, instruct).items()
    }
    first = files["messages.jsonl"][0]
    assert len(files["messages.jsonl"]) == 60 and first["text"] == f"{EVIL} 0"
    assert all(row["predicted"]["gpt"] == row["label"] for row in files["messages.jsonl"])
    assert set(first["predicted"]) == {"gpt", "scratch", "majority"}
    assert first["probabilities"][first["label"]] == 0.75 and set(first["probabilities"]) == {"ham", "spam"}
    assert [row["answers"] for row in files["instructions.jsonl"]] == [
        {"gpt": "yes", "base": EVIL, "scratch": "no"},
        {"gpt": "yes", "base": EVIL, "scratch": "yes"},
    ]
    assert files["instructions.jsonl"][1]["task"] == EVIL


@pytest.mark.parametrize("labels", [["ham", "spam"], [f"{EVIL}{k}" for k in range(3)]])
def test_text_from_models_and_data_cannot_become_markup(labels: list[str]) -> None:
    text = report.markdown(*results(labels), {"corpus": EVIL, "messages": "m", "instructions": "i"}, [], KINDS)
    assert "\x1b" not in text and "\u202e" not in text
    outside, fence = [], None
    for line in text.splitlines():
        ticks = line[: len(line) - len(line.lstrip("`"))]
        if fence is None and len(ticks) >= 3:
            fence = ticks
        elif fence is not None and line == fence:
            fence = None
        elif fence is None:
            outside.append(line)
    assert fence is None
    prose = "\n".join(outside)
    for markup in ("<script", "</details", "![x]", "| `a`", "# no heading"):
        assert f"\n{markup}" not in prose
        assert markup not in prose.replace(f"\\{markup}", "")
    headings = [line for line in outside if line.startswith("## ")]
    assert headings == ["## Predicting text", "## Labelling messages", "## Following instructions"]
    columns = [line.replace("\\|", "").count("|") for line in outside if line.startswith("| ")]
    assert set(columns) <= {5, 6, 7, 8}  # no cell was cut in two


def test_no_text_ends_the_script_of_dvcs_page() -> None:
    """DVC writes a plot's rows as JSON into a script, where nothing but `<` can end it."""
    from dvc_render.vega import VegaRenderer

    for name, axes in {"per_task": ("exact_match", "task"), "confusion": ("actual", "predicted")}.items():
        text = tables.plot_files(*results([f"{EVIL}{k}" for k in range(3)]))[f"{name}.csv"]
        rows = [row | {"rev": "workspace"} for row in csv.DictReader(io.StringIO(text))]
        x, y = axes
        page = VegaRenderer(rows, name, template="scatter", x=x, y=y).generate_html()
        assert "alert(1)" in page
        assert page.count("</script>") == 1 and page.count("<script") == 1


def test_the_report_says_what_was_found() -> None:
    text = report.markdown(
        *results(["ham", "spam"]), {"corpus": "sample", "messages": "m", "instructions": "i"}, ["training.png"], KINDS
    )
    assert "GPT of 1,234 parameters" in text
    assert "needs 50.0 % fewer bits than an n-gram model" in text
    assert "the first 2,500 bytes of 5,000 bytes of training text" in text
    assert "no test part" in text
    assert "](figures/training.png)" in text
    assert "](figures/classifiers.png)" not in text  # a picture that could not be drawn is left out
    assert "2 answers to read" in text


def test_the_report_stands_without_controls_and_tasks() -> None:
    base, classifiers, instruct = results(["ham", "spam"])
    del classifiers.reports["scratch"]
    instruct = instruct._replace(
        reports={k: v for k, v in instruct.reports.items() if k != "scratch"},
        tasks={"gpt": {}, "base": {}},
        examples=[],
        shown=[],
    )
    text = report.markdown(
        base, classifiers, instruct, {"corpus": "c", "messages": "m", "instructions": "i"}, [], KINDS
    )
    assert "without pretraining |\n" in text and "answers to read" not in text
    assert tables.plot_files(base, classifiers, instruct)["per_task.csv"].count("\n") == 3


@pytest.mark.parametrize("labels", [["ham", "spam"], ["a", "$b$", "c" * 40]])
def test_pictures_have_the_same_bytes_twice(tmp_path: Path, labels: list[str]) -> None:
    base, classifiers, instruct = results(labels)
    for run in ("one", "two"):
        folder = tmp_path / run
        folder.mkdir()
        pictures.draw_bpb(base, folder / "bpb.png")
        pictures.draw_classifiers(classifiers, folder / "classifiers.png")
        pictures.draw_confusion_roc(classifiers, folder / "confusion_roc.png")
        pictures.draw_instructions(instruct, folder / "instructions.png")
    for path in sorted((tmp_path / "one").iterdir()):
        content = path.read_bytes()
        assert content.startswith(b"\x89PNG") and b"Software" not in content
        assert content == (tmp_path / "two" / path.name).read_bytes()


@pytest.mark.parametrize(
    ("quotable", "shown"),
    [
        (set(), []),
        ({"messages"}, ["messages"]),
        ({"instructions", "messages"}, ["messages"]),  # an answer can recite the corpus
        ({"corpus", "instructions"}, ["instructions"]),
        (set(KINDS), ["messages", "instructions"]),
    ],
)
def test_predictions_leave_the_folder_only_where_their_texts_may_be_quoted(
    quotable: set[str], shown: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stage, "read_quotable", lambda tokens: quotable)
    assert [path.stem for path in stage.quotable_predictions()] == shown


def test_failure_of_an_optional_step_is_a_warning(capsys: pytest.CaptureFixture[str]) -> None:
    def fails() -> None:
        raise OSError("no\nspace")

    stage.optional("picture roc", fails)
    assert capsys.readouterr().err == "evaluate: picture roc left out: OSError: no\n"


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), MemoryError()])
def test_lack_of_disk_or_memory_in_an_optional_step_is_an_error(error: Exception) -> None:
    """The stage's outputs would be kept without it for good."""

    def fails() -> None:
        raise error

    with pytest.raises(type(error)):
        stage.optional("picture roc", fails)


SOURCES = {"corpus": "c", "messages": "m", "instructions": "i"}


@pytest.mark.parametrize(
    ("wrong", "says", "easy"),
    [
        (40, "GPT is better: GPT alone has 40 messages right, it alone 0", False),
        (2, "GPT and it are not to be told apart: GPT alone has 2 messages right, it alone 0", True),
        (-10, "GPT is worse: GPT alone has 0 messages right, it alone 10", True),
    ],
)
def test_the_report_says_how_gpt_stands_beside_the_best_classical_method(wrong: int, says: str, easy: bool) -> None:
    base, classifiers, instruct = results(["ham", "spam"])
    actual = np.array([classifiers.labels.index(label) for label in classifiers.actual])
    right, some_wrong = np.eye(2)[actual], np.eye(2)[actual]
    some_wrong[: abs(wrong)] = 1 - some_wrong[: abs(wrong)]
    probabilities = {"gpt": right, "filter": 1 - right, "svm_words": some_wrong}
    if wrong < 0:
        probabilities |= {"gpt": some_wrong, "svm_words": right}
    reports = {name: classification_report(actual, p, classifiers.labels) for name, p in probabilities.items()}
    classifiers = classifiers._replace(reports=reports, probabilities=probabilities)
    text = report.markdown(base, classifiers, instruct, SOURCES, [], KINDS)
    assert f"The best classical method is word n-grams, linear SVM. {says}" in text
    assert ("these messages are easy for it" in text) == easy
    assert "| word n-grams, linear SVM " in text.split("##")[0], "the headline's best alternative"


@pytest.mark.parametrize("labels", [["ham", "spam"], ["ham", "spam", "news"]])
def test_areas_of_several_labels_stand_beside_the_label(labels: list[str]) -> None:
    found = results(labels)
    text = report.markdown(*found, SOURCES, [], KINDS)
    assert ("ROC-AUC against the rest" in text) == (len(labels) > 2)
    assert set(found[1].label_roc()) == set(labels)


def test_nearest_pair_stands_beside_the_models_without_a_loss() -> None:
    base, classifiers, instruct = results(["ham", "spam"])
    instruct = instruct._replace(reports=instruct.reports | {"nearest": answer_report(["yes", "no"], ["yes", "yes"])})
    text = report.markdown(base, classifiers, instruct, SOURCES, [], KINDS)
    [headline, *_, row] = [
        line for line in text.splitlines() if line.startswith("|") and "nearest training pair" in line
    ]
    assert "nearest training pair 50.0 %" in headline
    assert row.startswith("| nearest training pair | 50.0 % (") and row.endswith("| - |")
    assert set(tables.metrics(base, classifiers, instruct)["instruct_nearest"]) >= {"pairs", "exact_match", "chrf"}


def test_the_form_of_the_answers_stands_in_report_and_metrics() -> None:
    base, classifiers, instruct = results(["ham", "spam"])
    pairs = [Pair("sort", str(i), "a, b", "sort") for i in range(5)]
    texts = {"gpt": [Answer("b, a", True)] * 4 + [Answer("b", False)], "nearest": ["a, b"] * 5}
    instruct = instruct._replace(
        reports={name: answer_report(given, ["a, b"] * 5) for name, given in texts.items()},
        tasks={name: by_task(given, ["a, b"] * 5, ["sort"] * 5) for name, given in texts.items()},
        examples=[Example(pair, {name: given[i] for name, given in texts.items()}) for i, pair in enumerate(pairs)],
    )
    text = report.markdown(base, classifiers, instruct, SOURCES, [], KINDS)
    assert "(sort: list with commas)" in text
    rows = [line for line in text.splitlines() if line.startswith(("| GPT | 1.8", "| nearest training pair | 2.0"))]
    assert rows[0].startswith("| GPT | 1.8 | 0.0 % | 80.0 % (") and rows[1].startswith(
        "| nearest training pair | 2.0 | 0.0 % | - |"
    )
    found = tables.metrics(base, classifiers, instruct)
    assert found["instruct"] | {"words": 1.8, "form_valid": 0.8, "stopped": 0.8, "repetition": 0.0} == found["instruct"]
    assert "stopped" not in found["instruct_nearest"]


def test_messages_without_text_are_counted_and_marked() -> None:
    base, classifiers, instruct = results(["ham", "spam"])
    assert "In doubt" not in report.markdown(base, classifiers, instruct, SOURCES, [], KINDS)
    doubts = [NO_TEXT, "unlike: 1.0 bytes a token", NO_TEXT, *[None] * 57]
    classifiers = classifiers._replace(doubts=doubts)
    text = report.markdown(base, classifiers, instruct, SOURCES, [], KINDS)
    assert "In doubt: 2 of the messages hold no letter, digit or sign, and 1 are unlike the text" in text
    rows = [json.loads(row) for row in tables.predictions(base, classifiers, instruct)["messages.jsonl"].splitlines()]
    assert [row.get("doubt") for row in rows] == doubts
