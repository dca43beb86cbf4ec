"""Pictures of the finetuned classifier: reliability, accuracy over coverage, precision over recall."""

from __future__ import annotations

from pathlib import Path

from llm.common.plotting import BLUE, GREY, LIGHT_BLUE, new_figure, save, shorten, style
from llm.evaluation.classifier.classifier_details import ClassifierDetails

MOST_CURVES = 12  # labels whose curves are drawn


def draw_calibration(details: ClassifierDetails, path: Path) -> None:
    """Draw the reliability diagram, the accuracy over coverage and the precision-recall curves."""
    result = details.calibration
    with style():
        figure = new_figure(11, 3.8)
        left, middle, right = figure.subplots(1, 3)
        lowest = min(0.5, *(each.confidence for each in result.bins), *(each.accuracy.low for each in result.bins))
        left.plot([lowest, 1], [lowest, 1], color=GREY, linewidth=1)
        for each in result.bins:
            left.plot([each.confidence] * 2, each.accuracy[1:], color=LIGHT_BLUE, linewidth=2)
        x = [each.confidence for each in result.bins]
        left.plot(x, [each.accuracy.value for each in result.bins], "o-", color=BLUE, markersize=4)
        left.set(title=f"Reliability, error {result.ece.value:.3f}", xlabel="probability", ylabel="share right")

        middle.plot(*result.curve, color=BLUE)
        middle.set(title="Accuracy of the most certain", xlabel="share labelled", ylabel="accuracy")

        curves = details.precision_recall
        shown = list(curves)[-1:] if len(curves) == 2 else list(curves)[:MOST_CURVES]
        for label in shown:
            right.plot(*curves[label], label=shorten(label), linewidth=1.5, drawstyle="steps-pre")
        right.set(title="Precision over recall", xlabel="recall", ylabel="precision", ylim=(0, 1.02))
        if shown:
            right.legend(loc="lower left", fontsize=8)
        save(figure, path)
