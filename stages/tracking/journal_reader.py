"""Reader of the journals of a pipeline, whose stages may still run (`stages/tracking/journal.py` writes them)."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import cast

from stages.tracking.journal import Event
from stages.tracking.process import Process


def list_journals(pipeline: Path) -> list[Path]:
    """Return a pipeline's journals by their start, without those whose start a full disk refused."""
    folders = [path.parent for path in pipeline.glob("*/events.jsonl") if has_start(path)]
    return sorted(folders, key=lambda folder: int(start_event(folder)["time"]))


def has_start(events: Path) -> bool:
    with events.open("rb") as file:
        line = file.readline()
    try:
        return bool(json.loads(line)["event"] == "start")
    except ValueError:
        return False


def start_event(journal: Path) -> Event:
    with (journal / "events.jsonl").open("rb") as file:
        return cast(Event, json.loads(file.readline()))


def end_event(journal: Path) -> Event | None:
    """Return the end of a journal, if it has one, without reading all of it."""
    with (journal / "events.jsonl").open("rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - 1000))
        last = file.read().splitlines()[-1]
    try:
        event: Event = json.loads(last)
    except ValueError:
        return None  # a longer line, or not yet whole
    return event if event["event"] == "end" else None


def is_running(journal: Path) -> bool:
    """Return True if the journal has no end yet and the stage's process lives."""
    return end_event(journal) is None and not Process(**start_event(journal)["process"]).is_gone()


def close_if_killed(journal: Path) -> None:
    """End the journal of a stage that was killed, at the time of its last event."""
    if end_event(journal) is None and not is_running(journal):
        path = journal / "events.jsonl"
        end = {"time": int(path.stat().st_mtime * 1000), "event": "end", "status": "KILLED"}
        with path.open("ab") as file:
            file.write(f"\n{json.dumps(end)}\n".encode())


def pipeline_status(pipeline: Path) -> tuple[str, int]:
    """Return MLflow's status of a pipeline, and the time at which its last stage ended."""
    ends = [end_event(journal) for journal in list_journals(pipeline)]
    done = [end for end in ends if end is not None]
    if len(done) < len(ends):
        return "RUNNING", 0
    statuses = {end["status"] for end in done}
    worst = next(status for status in ("KILLED", "FAILED", "FINISHED") if status in statuses)
    return worst, max(end["time"] for end in done)
