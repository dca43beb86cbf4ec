"""Reads what the stages of a pipeline have recorded (`stages/tracking/journal.py` writes it)."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

from stages.tracking.journal import Process

Event = dict[str, Any]


def journals(pipeline: Path) -> list[Path]:
    """A pipeline's journals, in the order in which its stages started; none whose start a full disk refused."""
    folders = [path.parent for path in pipeline.glob("*/events.jsonl") if has_start(path)]
    return sorted(folders, key=lambda folder: int(first_event(folder)["time"]))


def has_start(events: Path) -> bool:
    with events.open("rb") as file:
        line = file.readline()
    try:
        return bool(json.loads(line)["event"] == "start")
    except ValueError:
        return False


def first_event(journal: Path) -> Event:
    with (journal / "events.jsonl").open("rb") as file:
        return cast(Event, json.loads(file.readline()))


def end_event(journal: Path) -> Event | None:
    """The journal's end, if it has one; journals are long, and this is asked often."""
    with (journal / "events.jsonl").open("rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - 1000))
        last = file.read().splitlines()[-1]
    try:
        event: Event = json.loads(last)
    except ValueError:
        return None  # a longer line, or not yet whole
    return event if event["event"] == "end" else None


def is_open(journal: Path) -> bool:
    """Whether more may come: no end yet, and the stage's process lives."""
    return end_event(journal) is None and not Process(**first_event(journal)["process"]).is_gone()


def close_if_dead(journal: Path) -> None:
    """Ends the journal of a stage that was killed, at the time of its last sign of life."""
    if end_event(journal) is None and not is_open(journal):
        path = journal / "events.jsonl"
        end = {"time": int(path.stat().st_mtime * 1000), "event": "end", "status": "KILLED"}
        with path.open("ab") as file:
            file.write(f"\n{json.dumps(end)}\n".encode())


def events_from(journal: Path, offset: int) -> Iterator[tuple[Event, int]]:
    """The events from a byte offset on, each with the offset behind it; a line without its end is not there yet."""
    with (journal / "events.jsonl").open("rb") as file:
        file.seek(offset)
        for line in file:
            if not line.endswith(b"\n"):
                return
            offset += len(line)
            try:
                yield json.loads(line), offset
            except ValueError:
                continue  # its process died in the middle of it


def pipeline_state(pipeline: Path) -> tuple[str, int]:
    """MLflow's status for a pipeline, and when its last stage ended."""
    ends = [end_event(journal) for journal in journals(pipeline)]
    done = [end for end in ends if end is not None]
    if len(done) < len(ends):
        return "RUNNING", 0
    statuses = {end["status"] for end in done}
    worst = next(status for status in ("KILLED", "FAILED", "FINISHED") if status in statuses)
    return worst, max(end["time"] for end in done)
