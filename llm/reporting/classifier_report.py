"""Section of the report on the finetuned classifier: calibration, decisions, mistakes, slices, label errors."""

from __future__ import annotations

from llm.common.markdown import escape, fenced, table
from llm.common.plotting import shorten
from llm.evaluation.classifier.calibration import CalibrationResult, Decided
from llm.evaluation.classifier.classifier_details import ClassifierDetails
from llm.evaluation.metrics import Interval
from llm.reporting.tables import CLASSIFIERS

SHOWN_SUSPECTS = 10
OWN_KINDS = ("length", "script")  # of slices; others are columns of the source
SHOWN_CHARS = 300  # of a message


def details_section(details: ClassifierDetails, best: str, picture: list[str], quotable: bool) -> list[str]:
    """Return the lines on a classifier; its messages are shown where their source is `quotable`."""
    return [
        *_labels(details),
        *_calibration(details.calibration),
        *picture,
        *_slices(details, best),
        *_robustness(details, best),
        *_learning_curve(details),
        *_mistakes(details, quotable),
        *_label_errors(details, quotable),
    ]


def percent(share: Interval) -> str:
    return f"{100 * share.value:.1f} % ({100 * share.low:.1f}-{100 * share.high:.1f})"


def points(share: Interval) -> str:
    return f"{share.value:.3f} ({share.low:.3f}-{share.high:.3f})"


def _labels(details: ClassifierDetails) -> list[str]:
    rows = [
        [
            escape(label),
            points(each.precision),
            points(each.recall),
            points(each.f1),
            "-" if each.average_precision is None else f"{each.average_precision:.4f}",
        ]
        for label, each in details.labels.items()
    ]
    return [
        f"Macro F1, which counts rare labels like frequent ones: {points(details.macro_f1)}. The test messages form "
        f"{details.clusters:,} groups of almost equal texts; with a group's messages as one the accuracy is "
        f"{percent(details.accuracy)}.",
        "",
        *table(["label", "precision", "recall", "F1", "average precision"], rows),
    ]


def _calibration(result: CalibrationResult) -> list[str]:
    rows = [
        [f"{100 * each.coverage:.0f} %", percent(each.accuracy), f"{each.confidence:.4f}"] for each in result.coverages
    ]
    lines = [
        "### Can its probabilities be believed?",
        "",
        f"The expected calibration error, the mean gap between probability and share of right labels, is "
        f"{points(result.ece)} with the temperature {result.temperature:.3g} from the val part; without it "
        f"{points(result.before)}.",
        "",
        *(_decided(result.decided) if result.decided is not None else []),
        "The model may leave out what it is least sure of:",
        "",
        *table(["labelled", "accuracy", "lowest probability"], rows),
    ]
    return lines


def _decided(decided: Decided) -> list[str]:
    parts = []
    if decided.rule is not None and decided.precision is not None and decided.recall is not None:
        parts.append(
            f"The stored decision gives {escape(decided.rule.label)} from a probability of "
            f"{decided.rule.threshold:.4g} on: precision {percent(decided.precision)}, recall "
            f"{percent(decided.recall)}."
        )
    parts.append(
        f"With `unsure` below {decided.unsure_below:.4g}, {percent(decided.answered)} of the messages get a label, "
        f"{percent(decided.accuracy)} of these the right one."
    )
    return [" ".join(parts), ""]


def _slices(details: ClassifierDetails, best: str) -> list[str]:
    rows = [
        [
            f"{each.kind}: {each.name}" if each.kind in OWN_KINDS else escape(_cut(f"{each.kind}: {each.name}")),
            f"{each.rows:,}",
            percent(each.gpt),
            percent(each.classical),
        ]
        for each in details.slices
    ]
    if not rows:
        return []
    return ["### Parts of the messages", "", *table(["part", "messages", "GPT", CLASSIFIERS[best]], rows)]


def _robustness(details: ClassifierDetails, best: str) -> list[str]:
    rows = [
        [
            escape(each.name),
            percent(each.gpt),
            percent(each.classical),
            f"{each.only_gpt}:{each.only_classical}",
            f"{each.p:.2g}",
        ]
        for each in details.robustness
    ]
    if not rows:
        return []
    header = ["change", "GPT", CLASSIFIERS[best], "right alone", "p (McNemar)"]
    return ["### Changed messages", "", *table(header, rows)]


def _learning_curve(details: ClassifierDetails) -> list[str]:
    if not details.learning_curve:
        return []
    lines = []
    for name in dict.fromkeys(each.classifier for each in details.learning_curve):
        points = [each for each in details.learning_curve if each.classifier == name]
        shown = ", ".join(f"{each.messages:,}: {percent(each.accuracy)}" for each in points)
        lines.append(f"With fewer training messages {CLASSIFIERS[name]} reaches {shown}.")
    return [" ".join(lines), ""]


def _mistakes(details: ClassifierDetails, quotable: bool) -> list[str]:
    if not details.mistakes:
        return []
    lines = [f"### The {len(details.mistakes)} most confident mistakes", ""]
    if not quotable:
        return [*lines, _withheld(), ""]
    return lines + fenced(
        "\n".join(
            f"{shorten(each.actual)} taken for {shorten(each.predicted)} ({each.probability:.4f}): {_cut(each.text)}"
            for each in details.mistakes
        )
    )


def _label_errors(details: ClassifierDetails, quotable: bool) -> list[str]:
    found = details.label_errors
    if not found.searched:
        return []
    share = len(found.suspects) / found.searched
    lines = [
        "### Labels to look at",
        "",
        f"Of {found.searched:,} messages of all parts {len(found.suspects):,} ({100 * share:.1f} %) have a label that "
        "a logistic regression, which had not seen them, confidently calls another one. Some are wrong labels, some "
        "are hard messages.",
        "",
    ]
    if not found.suspects:
        return lines
    if not quotable:
        return [*lines, _withheld(), ""]
    return lines + fenced(
        "\n".join(
            f"{each.split}: {shorten(each.given)}, perhaps {shorten(each.suggested)} ({each.probability:.3f}): "
            f"{_cut(each.text)}"
            for each in found.suspects[:SHOWN_SUSPECTS]
        )
    )


def _withheld() -> str:
    return "Withheld: the source of messages is not `quotable`. `reports/predictions/messages.jsonl` has the texts."


def _cut(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= SHOWN_CHARS else f"{line[: SHOWN_CHARS - 1]}…"
