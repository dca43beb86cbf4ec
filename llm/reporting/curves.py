"""Draw the curves of trainings: the loss of every logged step, the evaluations, the learning rate and the speed."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from llm.common.plotting import BLUE, INK, LIGHT_BLUE, ORANGE, new_figure, save, style

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TRAININGS = {
    "pretrain": "Pretraining",
    "finetune_classify": "Finetuning: labels",
    "finetune_instruct": "Finetuning: instructions",
}
SMOOTHED = 0.04  # part of a curve that a smoothed point is the mean of
Series = Sequence[tuple[float, float]]  # a step and a value each


class Training(NamedTuple):
    """Logged values of a training."""

    title: str
    train: Series  # loss
    val: Series  # loss
    lr: Series
    speed: Series = ()  # tokens/s; it differs from run to run


def draw_trainings(plots: Path, path: Path) -> None:
    """Draw the trainings from their files in `plots`."""
    draw([read(plots, stage) for stage in TRAININGS if (plots / f"{stage}.csv").is_file()], path)


def read(plots: Path, stage: str) -> Training:
    """Return a training from the files of its evaluations and its steps."""

    def series(name: str, column: str) -> Series:
        with (plots / f"{name}.csv").open(encoding="utf-8") as lines:
            return [(float(row["step"]), float(row[column])) for row in csv.DictReader(lines) if row.get(column)]

    steps = f"{stage}_steps"
    return Training(TRAININGS[stage], series(steps, "train/loss"), series(stage, "val/loss"), series(steps, "lr"))


def draw(trainings: Sequence[Training], path: Path) -> None:
    """Draw a column for each training: losses above, learning rate and, where known, speed below."""
    with_speed = any(training.speed for training in trainings)
    heights = [3.0, 1.0, 1.0][: 2 + with_speed]
    with style():
        figure = new_figure(10, 0.9 + 0.9 * sum(heights))
        grid = figure.subplots(len(heights), len(trainings), squeeze=False, sharex="col", height_ratios=heights)
        for column, training in zip(grid.T, trainings, strict=True):
            _draw_losses(column[0], training)
            column[1].plot(*_columns(training.lr), color=INK, linewidth=1.2)
            if with_speed:
                column[2].plot(*_columns(training.speed), color=INK, linewidth=1.2)
            for axes in column[1:]:
                axes.set_ylim(0, None)
            column[-1].set_xlabel("step")
        names = ["loss (nats)", "learning rate", "tokens/s"]
        for axes, name in zip(grid[:, 0], names, strict=False):
            axes.set_ylabel(name)
        figure.align_ylabels(list(grid[:, 0]))
        grid[0, 0].legend(loc="upper right", fontsize=9)
        save(figure, path)


def _draw_losses(axes: Axes, training: Training) -> None:
    """Draw the losses on a logarithmic scale, so that the last steps can be told apart too."""
    steps, losses = _columns(training.train)
    axes.plot(steps, losses, color=LIGHT_BLUE, linewidth=0.7, alpha=0.7, label="train")
    axes.plot(steps, smooth(losses), color=BLUE, linewidth=1.8, label="train, smoothed")
    axes.plot(
        *_columns(training.val), color=ORANGE, linewidth=0.8, linestyle=":", marker="o", markersize=5, label="val"
    )
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    axes.set_title(training.title)
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _columns(series: Series) -> tuple[list[float], list[float]]:
    return [step for step, _ in series], [value for _, value in series]


def smooth(values: Sequence[float]) -> Sequence[float]:
    """Return centred moving means; towards the ends they are of fewer values."""
    half = round(SMOOTHED * len(values) / 2)
    sums = np.cumsum([0.0, *values])
    places = np.arange(len(values))
    low, high = np.maximum(places - half, 0), np.minimum(places + half + 1, len(values))
    means: list[float] = ((sums[high] - sums[low]) / (high - low)).tolist()
    return means
