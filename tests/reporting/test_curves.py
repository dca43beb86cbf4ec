"""Curves of the trainings: every step, smoothed, with the evaluations as points."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from llm.reporting import curves

STEPS = "step,train/loss,lr\n1,4,0.1\n2,2,0.2\n3,3,0.1\n"
EVALUATIONS = "step,train/loss,val/loss,lr\n0,,5,0.1\n3,3,2.5,0.1\n"


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str | None, list[float], list[float]]]:
    """Collect the label, the steps and the values of every line that is drawn."""
    found: list[tuple[str | None, list[float], list[float]]] = []
    plot = __import__("matplotlib.axes").axes.Axes.plot

    def spy(self: Any, x: Any, y: Any, **values: Any) -> Any:
        found.append((values.get("label"), list(x), list(y)))
        return plot(self, x, y, **values)

    monkeypatch.setattr("matplotlib.axes.Axes.plot", spy)
    return found


def test_picture_has_every_step_the_evaluations_and_the_learning_rate(tmp_path: Path, drawn: Any) -> None:
    (tmp_path / "pretrain.csv").write_text(EVALUATIONS)
    (tmp_path / "pretrain_steps.csv").write_text(STEPS)
    curves.draw_trainings(tmp_path, tmp_path / "training.png")
    assert drawn == [
        ("train", [1, 2, 3], [4, 2, 3]),
        ("train, smoothed", [1, 2, 3], [4, 2, 3]),
        ("val", [0, 3], [5, 2.5]),
        (None, [1, 2, 3], [0.1, 0.2, 0.1]),
    ]
    first = (tmp_path / "training.png").read_bytes()
    curves.draw_trainings(tmp_path, tmp_path / "training.png")
    assert (tmp_path / "training.png").read_bytes() == first, "the same results give the same bytes"
    assert len(first) < 100_000


def test_picture_without_a_step_or_with_the_speed(tmp_path: Path, drawn: Any) -> None:
    (tmp_path / "pretrain.csv").write_text("step,val/loss,lr\n0,5,0.1\n")
    (tmp_path / "pretrain_steps.csv").write_text("step,train/loss,lr\n")
    curves.draw_trainings(tmp_path, tmp_path / "training.png")
    training = curves.Training("t", [(1, 2.0)], [(1, 2.0)], [(1, 0.1)], [(1, 900.0), (2, 950.0)])
    curves.draw([training], tmp_path / "speed.png")
    assert drawn[-1] == (None, [1, 2], [900, 950])


def test_smoothing_is_a_mean_over_a_part_of_the_curve() -> None:
    assert curves.smooth([]) == []
    noise = [1.0, 3.0] * 100
    smoothed = curves.smooth(noise)
    assert len(smoothed) == 200 and all(1.7 < value < 2.3 for value in smoothed[4:-4])
    line = [float(step) for step in range(100)]
    assert curves.smooth(line)[10:-10] == pytest.approx(line[10:-10]), "it does not lag behind"
