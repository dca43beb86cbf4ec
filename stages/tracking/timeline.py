"""Time line of a pipeline: when each of its stages ran, and for how long in each phase.

It differs from run to run, so it is no output of the pipeline. It is delivered to MLflow with the journals.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from llm.common.errors import InputError
from llm.common.files import atomic_file, write_atomic
from llm.common.markdown import escape, table
from llm.common.plotting import BLUE, LIGHT_BLUE, ORANGE, new_figure, save, style
from llm.reporting import curves
from stages.tracking.journal import read_events
from stages.tracking.journal_reader import end_event, is_running, list_journals, start_event
from stages.tracking.process import runs_folder

TABLE, PICTURE, CURVES = "timeline.md", "timeline.png", "training.png"
PHASES = {  # name in the journal: description, colour
    "start-up": ("Python, imports", "#6d7783"),
    "data": ("reading, checking and making data", LIGHT_BLUE),
    "training": ("steps", BLUE),
    "evaluation": ("on held-out data, samples", ORANGE),
    "saving": ("checkpoints, models, reports, pictures", "#5b9a68"),
    "tracking": ("the journal, and waiting for its delivery at the end", "#b5527c"),
    "control": ("waiting for the from-scratch baseline that trains beside", "#8f7cc0"),
}
UNKNOWN = "not recorded"


class Row(NamedTuple):
    """A stage, with times in seconds after the pipeline's start."""

    stage: str
    status: str  # RUNNING, FINISHED, FAILED or KILLED
    begin: float
    end: float
    seconds: dict[str, float]  # of each phase, in the order of PHASES, without empty ones; their sum is the whole


class TimeLine(NamedTuple):
    """The stages of a pipeline."""

    pipeline: str
    title: str
    rows: list[Row]  # in the order in which they started
    trainings: list[curves.Training]  # with their speed, which differs from run to run


def read_timeline(pipeline: Path) -> TimeLine:
    """Return the time line of a pipeline's journals."""
    folders = list_journals(pipeline)
    if not folders:
        raise InputError(f"{pipeline}: no stage has left a record there")
    starts = [start_event(folder) for folder in folders]
    start = starts[0].get("invoked", starts[0]["time"] / 1000)
    stages = {start_event(folder)["stage"].replace("-", "_"): folder for folder in folders}
    trainings = [read_training(title, stages[stage]) for stage, title in curves.TRAININGS.items() if stage in stages]
    rows = [read_row(folder, start) for folder in folders]
    return TimeLine(pipeline.name, starts[0]["title"], rows, [each for each in trainings if each.train and each.val])


def read_training(title: str, journal: Path) -> curves.Training:
    """Return the logged values of a journal's training; a step that was logged twice counts as last logged."""
    found: dict[str, dict[float, float]] = {name: {} for name in ("train/loss", "val/loss", "lr", "tokens_per_s")}
    for event in read_events(journal):
        values = event["values"] if event["event"] == "metrics" else {}
        for name in found.keys() & values.keys():
            found[name][event["step"]] = values[name]
    return curves.Training(title, *(sorted(points.items()) for points in found.values()))


def read_row(journal: Path, start: float) -> Row:
    """Return the stage of a journal; `start` is the pipeline's."""
    event, ended = start_event(journal), end_event(journal)
    try:
        times = json.loads((journal / "times.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):  # a full disk refused it
        times = {"began": event["time"] / 1000, "until": event["time"] / 1000, "seconds": {}}
    if ended is not None:
        status, end = ended["status"], max(times["until"], ended["time"] / 1000)
    elif is_running(journal):
        status, end = "RUNNING", times["until"]
    else:
        status, end = "KILLED", max(times["until"], (journal / "events.jsonl").stat().st_mtime)
    known: dict[str, float] = times["seconds"]
    seconds = {phase: known[phase] for phase in dict.fromkeys([*PHASES, *known]) if phase in known}
    seconds[UNKNOWN] = end - times["began"] - sum(seconds.values())
    seconds = {phase: value for phase, value in seconds.items() if value >= 0.005}
    return Row(event["stage"], status, times["began"] - start, end - start, seconds)


def update(pipeline: Path) -> None:
    """Write a changed time line into the pipeline's folder, unless a stage is running.

    The last pipeline's time line also goes to `.work/`.
    """
    folders = list_journals(pipeline)
    if not folders or is_running(folders[-1]):  # asked often, while stages run
        return
    line = read_timeline(pipeline)
    if any(row.status == "RUNNING" for row in line.rows):
        return
    path = pipeline / TABLE
    if not path.exists() or path.read_text(encoding="utf-8") != markdown(line):
        write(line, pipeline)
    if pipeline == last_pipeline():
        for name in files(line):
            shutil.copy(pipeline / name, runs_folder().parent / name)


def last_pipeline() -> Path | None:
    """Return the folder of the last invocation that ran a stage."""
    return max((pipeline for pipeline in runs_folder().glob("*/") if list_journals(pipeline)), default=None)


def files(line: TimeLine) -> list[str]:
    """Return the names of the files of a time line; it has curves where a training ran."""
    return [PICTURE, *([CURVES] if line.trainings else []), TABLE]


def write(line: TimeLine, folder: Path) -> None:
    """Write the table and the pictures."""
    if line.trainings:
        with atomic_file(folder / CURVES) as draft:
            curves.draw(line.trainings, draft)
    with atomic_file(folder / PICTURE) as draft:
        draw(line.rows, draft)
    write_atomic(folder / TABLE, markdown(line))  # last: it says that both are there


# ---- table and picture -----------------------------------------------------------------------------------------------


def markdown(line: TimeLine) -> str:
    """Return a table with a row for each stage, in seconds; the time between them is DVC's."""
    phases = phases_of(line.rows)
    whole = max(row.end for row in line.rows)
    sums = {phase: sum(row.seconds.get(phase, 0.0) for row in line.rows) for phase in phases}
    ran = sum(row.end - row.begin for row in line.rows)
    rows = [
        [label(row), *map(_cell, [row.begin, *map(row.seconds.get, phases), row.end - row.begin])] for row in line.rows
    ]
    rows.append(["before and between the stages", *[""] * (len(phases) + 1), _cell(max(0.0, whole - ran))])
    rows.append(["all", "", *map(_cell, [*sums.values(), whole])])
    explained = [f"{phase}: {PHASES[phase][0]}" for phase in phases if phase in PHASES]
    return "\n".join(
        [
            "# Time line",
            "",
            f"{escape(line.title)} (`{line.pipeline}`): {whole:.1f} seconds until the end of the last stage.",
            "",
            f"![Time of each stage by phase]({PICTURE})",
            "",
            *table(["seconds", "begins after", *phases, "all"], rows),
            f"{'; '.join(explained)}. Before and between the stages: DVC.",
            "",
            *([f"![Loss, learning rate and speed of each training]({CURVES})", ""] if line.trainings else []),
        ]
    )


def _cell(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds:.1f}"


def phases_of(rows: Sequence[Row]) -> list[str]:
    """Return the phases that took time in any row, the known ones first."""
    found = dict.fromkeys(phase for row in rows for phase in row.seconds)
    return [phase for phase in dict.fromkeys([*PHASES, *found]) if phase in found]


def label(row: Row) -> str:
    """Return the stage's name, with its status unless it finished."""
    return row.stage if row.status == "FINISHED" else f"{row.stage}, {row.status.lower()}"


def draw(rows: Sequence[Row], path: Path) -> None:
    """Draw a bar for each stage from its start to its end, parted by phase."""
    whole = max(row.end for row in rows)
    unit, name = (60, "minutes") if whole >= 180 else (1, "seconds")
    phases = phases_of(rows)
    with style():
        figure = new_figure(10, 1.5 + 0.4 * len(rows))
        axes = figure.subplots()
        for phase in phases:
            widths = [row.seconds.get(phase, 0.0) / unit for row in rows]
            before = phases[: phases.index(phase)]
            lefts = [(row.begin + sum(row.seconds.get(p, 0.0) for p in before)) / unit for row in rows]
            colour = PHASES[phase][1] if phase in PHASES else "#dfe3e8"
            axes.barh(range(len(rows)), widths, 0.62, lefts, color=colour, label=phase)
        for y, row in enumerate(rows):
            text = f"{row.end - row.begin:.1f} s"
            axes.annotate(text, (row.end / unit, y), xytext=(5, 0), textcoords="offset points", va="center", fontsize=9)
        axes.set_yticks(range(len(rows)), [label(row) for row in rows])
        axes.set(title=f"Time of each stage by phase ({name})", xlim=(0, 1.08 * max(whole, 1) / unit))
        axes.invert_yaxis()
        axes.grid(axis="y", visible=False)
        if phases:
            figure.legend(loc="outside lower center", ncols=len(phases), fontsize=9)
        save(figure, path)
