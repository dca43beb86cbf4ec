"""Draw the pictures of the report: the same results give the same bytes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from llm.common.plotting import BLUE, GREY, INK, LIGHT_BLUE, ORANGE, new_figure, save, shorten, style
from llm.evaluation.base.base_model import BaseResult
from llm.evaluation.classifier.classification import OURS, ClassifierResult
from llm.evaluation.instruct.instruction_following import InstructResult
from llm.reporting.tables import ANSWERERS, CLASSIFIERS, TEXT_MODELS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLBLUE = {"gpt": BLUE, "base": LIGHT_BLUE, "scratch": ORANGE, "nearest": GREY}
DASHES = ("-", "--", "-.", ":")  # of the classical ROC curves that are drawn: those with the largest areas


def draw_bpb(result: BaseResult, path: Path) -> None:
    bits = result.bpb()
    with style():
        figure = new_figure(7, 2.2)
        axes = figure.subplots()
        bars = axes.barh(
            [TEXT_MODELS[n] for n in bits], list(bits.values()), color=[COLBLUE.get(n, GREY) for n in bits]
        )
        axes.bar_label(bars, fmt="%.3f", padding=4)
        axes.set(title="Held-out text: bits per byte, less is better", xlim=(0, 1.12 * max(bits.values())))
        axes.invert_yaxis()
        axes.grid(axis="y", visible=False)
        save(figure, path)


def draw_classifiers(result: ClassifierResult, path: Path) -> None:
    reports = dict(sorted(result.reports.items(), key=lambda item: -item[1].accuracy.value))
    with style():
        figure = new_figure(8, 0.6 + 0.42 * len(reports))
        axes = figure.subplots()
        for y, (name, report) in enumerate(reports.items()):
            value, low, high = (100 * x for x in report.accuracy)
            colour = COLBLUE.get(name, "#6d7783")
            axes.plot([low, high], [y, y], color=colour, linewidth=3, alpha=0.45, solid_capstyle="round")
            axes.plot(value, y, "o", color=colour, markersize=8)
            axes.annotate(f"{value:.1f}", (high, y), xytext=(8, 0), textcoords="offset points", va="center")
        axes.set_yticks(range(len(reports)), [CLASSIFIERS[name] for name in reports])
        axes.set(title="Accuracy on held-out messages in %, with 95 % intervals")
        axes.margins(x=0.1)
        axes.invert_yaxis()
        save(figure, path)


def draw_confusion_roc(result: ClassifierResult, path: Path) -> None:
    labels = [shorten(label) for label in result.labels]
    counts = result.reports["gpt"].confusion
    shares = counts / counts.sum(axis=1, keepdims=True).clip(min=1)
    with style():
        figure = new_figure(10, 4.2)
        left, right = figure.subplots(1, 2)
        left.imshow(shares, cmap="Blues", vmin=0, vmax=1)
        left.set_xticks(range(len(labels)), labels, rotation=0 if len(labels) < 5 else 90)
        left.set_yticks(range(len(labels)), labels)
        left.set(title="GPT: which label became which", xlabel="predicted", ylabel="actual")
        left.grid(visible=False)
        if len(labels) <= 12:
            for (i, k), count in _cells(counts):
                left.text(k, i, f"{count}", ha="center", va="center", color="white" if shares[i, k] > 0.5 else INK)

        _draw_roc(right, result)
        save(figure, path)


def _draw_roc(axes: Axes, result: ClassifierResult) -> None:
    """Draw our classifiers' curves and the best classical ones; of several labels the mean, and GPT's of each."""
    areas = {name: area for name in result.roc if (area := result.reports[name].roc_auc) is not None}
    classical = sorted((name for name in areas if name not in OURS), key=lambda name: -areas[name])[: len(DASHES)]
    several = len(result.labels) > 2
    if several and len(result.labels) <= 12:
        for label, points in result.label_roc().items():
            area = result.reports["gpt"].label_auc[label]
            name = f"GPT, {shorten(label)}, area {area:.4f}"
            axes.plot(*points, color=LIGHT_BLUE, linewidth=1, label=name)
    for name, dashes in reversed([*((name, "-") for name in OURS), *zip(classical, DASHES, strict=False)]):
        if name in areas:
            look: dict[str, Any] = {"color": COLBLUE.get(name, "#7d8793"), "linewidth": 2.2 if name in OURS else 1.2}
            axes.plot(*result.roc[name], label=f"{CLASSIFIERS[name]}, area {areas[name]:.4f}", linestyle=dashes, **look)
    of = "averaged over the labels" if several else f"of {shorten(result.labels[-1])}"
    axes.set(title=f"ROC curve {of}", xlabel="false positive rate", ylabel="true positive rate")
    handles, names = axes.get_legend_handles_labels()
    if handles:
        axes.legend(handles[::-1], names[::-1], loc="lower right", fontsize=8)


def _cells(counts: Any) -> list[tuple[tuple[int, int], int]]:
    return [((i, k), int(counts[i, k])) for i in range(counts.shape[0]) for k in range(counts.shape[1])]


def draw_instructions(result: InstructResult, path: Path) -> None:
    """Draw the exact match of all pairs and of each task, a bar for each model."""
    groups = ["all", *result.tasks["gpt"]]
    height = 0.8 / len(result.reports)
    with style():
        figure = new_figure(8, 1.2 + 0.2 * len(result.reports) * len(groups))
        axes: Axes = figure.subplots()
        for k, (name, overall) in enumerate(result.reports.items()):
            shares = [overall.exact_match, *(report.exact_match for report in result.tasks[name].values())]
            places = [i + k * height for i in range(len(groups))]
            bars = axes.barh(
                places, [100 * s.value for s in shares], height, color=COLBLUE[name], label=ANSWERERS[name]
            )
            axes.bar_label(bars, fmt="%.0f", padding=3, fontsize=8)
        axes.set_yticks([i + 0.4 - height / 2 for i in range(len(groups))], [shorten(group) for group in groups])
        axes.set(title="Held-out instructions answered exactly, in %", xlim=(0, 106))
        axes.margins(y=0.02)
        axes.invert_yaxis()
        axes.grid(axis="y", visible=False)
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -24 / (72 * figure.get_figheight())), ncols=3, fontsize=9)
        save(figure, path)
