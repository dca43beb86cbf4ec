"""Draw `docs/pipeline.svg` from `dvc.yaml`: `python docs/draw_pipeline.py`."""

from __future__ import annotations

from html import escape
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parent.parent
WIDTH, HEIGHT, GAP, ROW = 152, 46, 28, 96  # of a box, of the space between two, of a row of boxes: pixels
FONT = "font-family='sans-serif' text-anchor='middle'"


def outputs(entry: dict[str, Any]) -> list[str]:
    """Return the paths of a stage's outputs."""
    return [next(iter(out)) if isinstance(out, dict) else out for out in entry.get("outs", [])]


def depends_on(stages: dict[str, Any]) -> dict[str, list[str]]:
    """Return for every stage the stages whose outputs it reads."""
    maker = {out: stage for stage, entry in stages.items() for out in outputs(entry)}
    return {
        stage: list(dict.fromkeys(maker[o] for dep in entry["deps"] for o in maker if f"{dep}/".startswith(f"{o}/")))
        for stage, entry in stages.items()
    }


def place(stages: dict[str, Any]) -> dict[str, tuple[float, float]]:
    """Return the column of every stage, one behind its last dependency, and its row among those of the column."""
    column: dict[str, int] = {}
    for stage, before in depends_on(stages).items():  # dvc.yaml lists them in the order of the run
        column[stage] = 1 + max((column[b] for b in before), default=-1)
    columns = [[s for s in column if column[s] == c] for c in range(max(column.values()) + 1)]
    tallest = max(map(len, columns))
    return {s: (c, i + (tallest - len(same)) / 2) for c, same in enumerate(columns) for i, s in enumerate(same)}


def draw(stages: dict[str, Any]) -> str:
    """Return the picture as SVG: a box for each stage with its outputs, an arrow from each to those that read them."""
    places = place(stages)
    corner = {s: (10 + c * (WIDTH + GAP), 10 + r * ROW) for s, (c, r) in places.items()}
    width = max(x for x, _ in corner.values()) + WIDTH + 10
    height = max(y for _, y in corner.values()) + ROW - 8
    lines = [
        f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {width:g} {height:g}' role='img'>",
        "<title>The stages of dvc.yaml and what each one makes</title>",
        "<defs><marker id='tip' viewBox='0 0 8 8' refX='8' refY='4' markerWidth='7' markerHeight='7' orient='auto'>"
        "<path d='M0 0L8 4L0 8z' fill='#5b6470'/></marker></defs>",
        f"<rect width='{width:g}' height='{height:g}' rx='8' fill='#ffffff'/>",
    ]
    for stage, before in depends_on(stages).items():
        x, y = corner[stage]
        for other in before:
            if places[stage][0] - places[other][0] == 1:  # a longer way would cross a box
                x0, y0 = corner[other][0] + WIDTH, corner[other][1] + HEIGHT / 2
                line = f"M{x0:g} {y0:g}L{x - 2:g} {y + HEIGHT / 2:g}"
                lines.append(f"<path d='{line}' stroke='#5b6470' stroke-width='1.5' marker-end='url(#tip)'/>")
    for stage, entry in stages.items():
        x, y = corner[stage]
        made = ["reports"] if stage == list(stages)[-1] else outputs(entry)
        lines += [
            f"<rect x='{x:g}' y='{y:g}' width='{WIDTH}' height='{HEIGHT}' rx='6' fill='#e8f0fb' stroke='#2f6db5'/>",
            f"<text x='{x + WIDTH / 2:g}' y='{y + 28:g}' {FONT} font-size='15' fill='#14243a'>{escape(stage)}</text>",
            f"<text x='{x + WIDTH / 2:g}' y='{y + HEIGHT + 16:g}' {FONT} font-size='12' fill='#444b55'>"
            f"{escape(made[0])}</text>",
        ]
    return "\n".join([*lines, "</svg>"]) + "\n"


def read_stages() -> dict[str, Any]:
    """Return the stages of the project's dvc.yaml."""
    return yaml.safe_load((ROOT / "dvc.yaml").read_text(encoding="utf-8"))["stages"]


if __name__ == "__main__":
    (ROOT / "docs/pipeline.svg").write_text(draw(read_stages()), encoding="utf-8")
