"""The time line of a pipeline: when each of its stages ran, and what it spent its time on.

    python -m stages.timeline     prints that of the last one, finished or not; writes .work/timeline.md and .png

Nothing of it is an output of the pipeline, which would differ from run to run. `stages.sync` brings it to MLflow.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from llm.common.errors import InputError
from llm.common.files import write_atomic
from llm.common.plotting import BASE, CONTROL, OURS, new_figure, save, style
from llm.common.sanitize import escape, table
from stages.tracking.journal import runs_folder
from stages.tracking.journal_reader import end_event, first_event, is_open, journals

TABLE, PICTURE = "timeline.md", "timeline.png"
PHASES = {  # the name in the record: what is in it, its colour
    "start-up": ("Python, imports", "#6d7783"),
    "data": ("reading, checking and making what the stage works on", BASE),
    "training": ("steps", OURS),
    "evaluation": ("on held-out data, samples", CONTROL),
    "saving": ("training states, models, reports, pictures", "#5b9a68"),
    "tracking": ("the record, and waiting for its delivery at the end", "#b5527c"),
    "control": ("waiting for the control that trains beside", "#8f7cc0"),
}
UNKNOWN = "not recorded"


class Row(NamedTuple):
    """A stage; its times are seconds after the pipeline's start."""

    stage: str
    status: str  # RUNNING, FINISHED, FAILED or KILLED
    begin: float
    end: float
    seconds: dict[str, float]  # of each phase, in the order of PHASES, without empty ones; their sum is the whole


class TimeLine(NamedTuple):
    pipeline: str
    title: str
    rows: list[Row]  # in the order in which they started


def read(pipeline: Path) -> TimeLine:
    """What the journals of a pipeline say."""
    folders = journals(pipeline)
    if not folders:
        raise InputError(f"{pipeline}: no stage has left a record there")
    starts = [first_event(folder) for folder in folders]
    start = starts[0].get("invoked", starts[0]["time"] / 1000)
    return TimeLine(pipeline.name, starts[0]["title"], [_row(folder, start) for folder in folders])


def _row(journal: Path, start: float) -> Row:
    event, ended = first_event(journal), end_event(journal)
    try:
        note = json.loads((journal / "times.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):  # a full disk refused it
        note = {"began": event["time"] / 1000, "until": event["time"] / 1000, "seconds": {}}
    if ended is not None:
        status, end = ended["status"], max(note["until"], ended["time"] / 1000)
    elif is_open(journal):
        status, end = "RUNNING", note["until"]
    else:
        status, end = "KILLED", max(note["until"], (journal / "events.jsonl").stat().st_mtime)
    known: dict[str, float] = note["seconds"]
    seconds = {phase: known[phase] for phase in dict.fromkeys([*PHASES, *known]) if phase in known}
    seconds[UNKNOWN] = end - note["began"] - sum(seconds.values())
    seconds = {phase: value for phase, value in seconds.items() if value >= 0.005}
    return Row(event["stage"], status, note["began"] - start, end - start, seconds)


def update(pipeline: Path) -> None:
    """Writes a pipeline's time line into its folder when all stages that have begun are over, and it has changed.

    That of the last pipeline also where the user finds it.
    """
    folders = journals(pipeline)
    if not folders or is_open(folders[-1]):  # asked often, while stages run
        return
    line = read(pipeline)
    if any(row.status == "RUNNING" for row in line.rows):
        return
    path = pipeline / TABLE
    if not path.exists() or path.read_text(encoding="utf-8") != markdown(line):
        write(line, pipeline)
    if pipeline == last_pipeline():
        for name in (PICTURE, TABLE):
            shutil.copy(pipeline / name, runs_folder().parent / name)


def last_pipeline() -> Path | None:
    return max((pipeline for pipeline in runs_folder().glob("*/") if journals(pipeline)), default=None)


def write(line: TimeLine, folder: Path) -> None:
    draft = folder / f".{PICTURE}.partial"
    draw(line.rows, draft)
    draft.replace(folder / PICTURE)
    write_atomic(folder / TABLE, markdown(line))  # last: it says that both are there


# ---- for people ------------------------------------------------------------------------------------------------------


def markdown(line: TimeLine) -> str:
    """A row for each stage, in seconds; what is between them is DVC's part."""
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
            f"![What each stage spent its time on]({PICTURE})",
            "",
            *table(["seconds", "begins after", *phases, "all"], rows),
            f"{'; '.join(explained)}. Before and between the stages: DVC.",
            "",
        ]
    )


def _cell(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds:.1f}"


def phases_of(rows: Sequence[Row]) -> list[str]:
    """Those that took time in any row, the known ones first."""
    found = dict.fromkeys(phase for row in rows for phase in row.seconds)
    return [phase for phase in dict.fromkeys([*PHASES, *found]) if phase in found]


def label(row: Row) -> str:
    return row.stage if row.status == "FINISHED" else f"{row.stage}, {row.status.lower()}"


def draw(rows: Sequence[Row], path: Path) -> None:
    """A bar for each stage from its start to its end, parted by what it spent its time on."""
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
        axes.set(
            title=f"When each stage ran, and what it spent its time on ({name})", xlim=(0, 1.08 * max(whole, 1) / unit)
        )
        axes.invert_yaxis()
        axes.grid(axis="y", visible=False)
        if phases:
            figure.legend(loc="outside lower center", ncols=len(phases), fontsize=9)
        save(figure, path)


def main(arguments: list[str]) -> None:
    if arguments:
        raise InputError(f"takes no arguments, found {' '.join(arguments)}")
    pipeline = last_pipeline()
    if pipeline is None:
        raise InputError(f"{runs_folder()}: no stage has run here yet; `dvc repro` runs all")
    line, folder = read(pipeline), runs_folder().parent
    write(line, folder)
    print(markdown(line), end="")
    print(f"written to {folder / TABLE} and {folder / PICTURE}", file=sys.stderr)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except InputError as error:
        sys.exit(f"timeline: {error}")
