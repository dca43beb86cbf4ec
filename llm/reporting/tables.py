"""Metrics, the CSV files that DVC plots, and predictions, as functions of the results alone."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from typing import Any

from llm.evaluation.base.base_model import BaseResult
from llm.evaluation.base.slices import Slice
from llm.evaluation.classifier.calibration import metrics as calibration_metrics
from llm.evaluation.classifier.classification import ClassifierResult
from llm.evaluation.instruct.answer_form import FormReport
from llm.evaluation.instruct.instruction_following import InstructResult
from llm.evaluation.metrics import Interval, numbers
from llm.evaluation.seeds import Spread

TEXT_MODELS = {"gpt": "GPT", "ngram": "n-gram model", "xz": "xz", "ppm": "PPM"}
CLASSIFIERS = {
    "gpt": "GPT",
    "scratch": "GPT without pretraining",
    "majority": "majority class",
    "filter": "hand-made filter",
    "naive_bayes": "naive Bayes",
    "tfidf": "TF-IDF + logistic regression",
    "boosting": "hand-made features, boosted trees",
    "complement_nb": "word n-grams, complement naive Bayes",
    "logistic_words": "word n-grams, logistic regression",
    "logistic_characters": "character n-grams, logistic regression",
    "svm_words": "word n-grams, linear SVM",
    "svm_characters": "character n-grams, linear SVM",
}
KINDS_OF_TEXT = {
    "prose": "prose",
    "title": "titles, lines alone",
    "speech": "speech in quotation marks",
    "question": "questions",
    "list": "lists",
    "numbers_and_signs": "numbers and signs",
}
ANSWERERS = {
    "gpt": "GPT",
    "base": "GPT before finetuning",
    "scratch": "GPT without pretraining",
    "nearest": "nearest training pair",
}


def metrics(base: BaseResult, classifiers: ClassifierResult, instruct: InstructResult) -> dict[str, Any]:
    """Return all figures, nested one level, for the metrics file."""
    bits = base.bpb()
    sections: dict[str, Any] = {
        "base": {
            "loss": base.gpt.loss,
            "perplexity": base.gpt.perplexity,
            "bpb": bits["gpt"],
            "tokens": base.gpt.tokens,
            "bytes": base.n_bytes,
        },
        "base_ngram": {"loss": base.ngram.loss, "perplexity": base.ngram.perplexity, "bpb": bits["ngram"]},
        "base_xz": {"bpb": bits["xz"]},
    }
    if "ppm" in bits:
        sections["base_ppm"] = {"bpb": bits["ppm"]}
    if base.slices is not None:
        sections["base"] |= interval_ends("bpb", base.slices.whole.bpb["gpt"])
        sections["base_ngram"] |= interval_ends("bpb", base.slices.whole.bpb["ngram"])
        sections["base_by_kind"] = slice_numbers(base.slices.kinds)
        sections["base_by_position"] = slice_numbers(base.slices.positions)
    for name, report in classifiers.reports.items():
        section = "classifier" if name == "gpt" else f"classifier_{name}"
        sections[section] = {"messages": report.rows, **numbers(report)}
    forms = instruct.forms()
    if (details := classifiers.details) is not None:
        sections["classifier"] |= {
            "macro_f1": details.macro_f1.value,
            "macro_f1_low": details.macro_f1.low,
            "macro_f1_high": details.macro_f1.high,
            **({} if details.average_precision is None else {"average_precision": details.average_precision}),
            **calibration_metrics(details.calibration),
        }
        if details.robustness:
            sections["classifier_changed"] = {each.name: each.gpt.value for each in details.robustness}
        if curve := {
            f"{each.messages}": each.accuracy.value for each in details.learning_curve if each.classifier == "gpt"
        }:
            sections["classifier_on_fewer_messages"] = curve
    for name, answers in instruct.reports.items():
        section = "instruct" if name == "gpt" else f"instruct_{name}"
        sections[section] = {"pairs": answers.rows, **numbers(answers)}
        if name in forms:
            sections[section] |= {key: value for key, value in form_numbers(forms[name]).items() if value is not None}
        if (loss := instruct.losses.get(name)) is not None:
            sections[section] |= {"loss": loss.loss, "loss_per_char": loss.loss_per_char}
    if instruct.turns is not None:
        sections["instruct_conversations"] = {
            "conversations": instruct.turns.with_history.rows,
            "exact_match": instruct.turns.with_history.exact_match.value,
            "exact_match_without_history": instruct.turns.without_history.exact_match.value,
        }
        if instruct.turns.single is not None:
            sections["instruct_conversations"]["exact_match_of_single_turns"] = instruct.turns.single.exact_match.value
    if instruct.tasks["gpt"]:
        sections["instruct_tasks"] = {task: report.exact_match.value for task, report in instruct.tasks["gpt"].items()}
    return sections


def slice_numbers(slices: Sequence[Slice]) -> dict[str, float]:
    """Return the model's bits per byte of each slice of the text, with the ends of its interval."""
    found: dict[str, float] = {}
    for each in slices:
        figure = each.bpb["gpt"]
        found[each.name] = figure.value if isinstance(figure, Interval) else figure
        found |= interval_ends(each.name, figure)
    return found


def interval_ends(name: str, figure: Interval | float) -> dict[str, float]:
    return {f"{name}_low": figure.low, f"{name}_high": figure.high} if isinstance(figure, Interval) else {}


def form_numbers(form: FormReport) -> dict[str, float | None]:
    """Flatten the form of a model's answers for a metrics file."""
    valid, stopped = (None if share is None else share.value for share in (form.valid, form.stopped))
    return {"words": form.words, "repetition": form.repetition, "form_valid": valid, "stopped": stopped}


def seed_metrics(spreads: Mapping[str, Spread]) -> dict[str, dict[str, float]]:
    """Return the figures over seeds, for the metrics file."""
    return {
        f"{name}_over_seeds": {"seeds": len(s.values), "mean": s.mean, "sd": s.sd, "low": s.low, "high": s.high}
        for name, s in spreads.items()
    }


def headlines(base: BaseResult, classifiers: ClassifierResult, instruct: InstructResult) -> dict[str, float]:
    """Return the few figures that experiments are compared by: ours, without pretraining, and the best alternative."""
    bits, alternative = base.bpb(), classifiers.best_classical()
    values = {"bpb": bits["gpt"], "bpb_ngram": bits["ngram"], "accuracy": classifiers.reports["gpt"].accuracy.value}
    if "scratch" in classifiers.reports:
        values["accuracy_scratch"] = classifiers.reports["scratch"].accuracy.value
    values["accuracy_classical"] = classifiers.reports[alternative].accuracy.value
    values["exact_match"] = instruct.reports["gpt"].exact_match.value
    if "scratch" in instruct.reports:
        values["exact_match_scratch"] = instruct.reports["scratch"].exact_match.value
    if instruct.turns is not None:
        values["exact_match_turns"] = instruct.turns.with_history.exact_match.value
        values["exact_match_turns_alone"] = instruct.turns.without_history.exact_match.value
    values["exact_match_alternative"] = instruct.reports[instruct.best_alternative()].exact_match.value
    return values


def plot_files(base: BaseResult, classifiers: ClassifierResult, instruct: InstructResult) -> dict[str, str]:
    """Return the CSV files that DVC plots, by name."""
    text = [{"model": TEXT_MODELS[name], "bpb": bits} for name, bits in base.bpb().items()]
    labels = [{"classifier": CLASSIFIERS[name], **numbers(report)} for name, report in classifiers.reports.items()]
    answers = [{"model": ANSWERERS[name], **numbers(report)} for name, report in instruct.reports.items()]
    tasks = [
        {"model": ANSWERERS[name], "task": task, "pairs": report.rows, **numbers(report)}
        for name, reports in instruct.tasks.items()
        for task, report in (reports or {"all": instruct.reports[name]}).items()
    ]
    confusion = [
        {"actual": actual, "predicted": predicted}
        for actual, predicted in zip(classifiers.actual, classifiers.predicted(), strict=True)
    ]
    roc = [
        {"false_positive_rate": float(x), "true_positive_rate": float(y)}
        for x, y in zip(*classifiers.roc.get("gpt", ([0.0, 1.0], [0.0, 1.0])), strict=True)
    ]
    files = {"bpb": text, "classifiers": labels, "confusion": confusion, "roc": roc}
    files |= {"instructions": answers, "per_task": tasks}
    return {f"{name}.csv": to_csv(rows) for name, rows in files.items()}


def predictions(base: BaseResult, classifiers: ClassifierResult, instruct: InstructResult) -> dict[str, str]:
    """Return the JSON lines files with each prompt's completions and each held-out item's predictions, by name."""
    predicted = {name: classifiers.predicted(name) for name in classifiers.probabilities}
    doubts = classifiers.doubts or [None] * len(classifiers.texts)
    messages = [
        {
            "text": text,
            "label": label,
            "predicted": {name: labels[i] for name, labels in predicted.items()},
            "probabilities": {
                label: round(float(p), 6)
                for label, p in zip(classifiers.labels, classifiers.probabilities["gpt"][i], strict=True)
            },
            **({"doubt": doubts[i]} if doubts[i] else {}),
        }
        for i, (text, label) in enumerate(zip(classifiers.texts, classifiers.actual, strict=True))
    ]
    completions = [completion._asdict() for completion in base.completions]
    pairs = [
        {
            **{
                key: value for key, value in example.pair._asdict().items() if key not in ("messages", "tools") or value
            },
            "answers": example.answers,
        }
        for example in instruct.examples
    ]
    files = {"completions": completions, "messages": messages, "instructions": pairs}
    if classifiers.details is not None:
        files["label_errors"] = [suspect._asdict() for suspect in classifiers.details.label_errors.suspects]
    return {
        f"{name}.jsonl": "".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows)
        for name, rows in files.items()
    }


def to_csv(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return rows as CSV, numbers with 6 significant digits.

    DVC copies texts into the scripts of its page, where a `<` could end one: another sign replaces it.
    """
    columns = list(dict.fromkeys(column for row in rows for column in row))
    file = io.StringIO()
    writer = csv.DictWriter(file, columns, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({column: _csv_cell(value) for column, value in row.items()})
    return file.getvalue()


def _csv_cell(value: Any) -> Any:
    if isinstance(value, float):
        return f"{value:.6g}"
    return value.replace("<", "‹") if isinstance(value, str) else value
