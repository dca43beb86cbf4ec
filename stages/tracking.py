"""Journal (being written): events of a run as JSON lines."""

from __future__ import annotations

import json
import os
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def repository() -> Path:
    """The user's repository: DVC names it in DVC_ROOT, also to the stages of a temporary experiment copy."""
    return Path(os.environ.get("DVC_ROOT") or Path.cwd())


class Journal:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    @classmethod
    def start(cls, stage: str, params: Mapping[str, Any]) -> Journal:
        journal = cls(repository() / ".work" / "runs" / uuid.uuid4().hex)
        journal._write(event="start", stage=stage, params=dict(params))
        return journal

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        self._write(event="metrics", step=step, values=dict(values))

    def artifact(self, path: Path) -> None:
        self._write(event="artifact", path=str(path))

    def dataset(self, name: str, digest: str, source: str, context: str) -> None:
        self._write(event="dataset", name=name, digest=digest, source=source, context=context)

    def model(self, name: str, folder: Path) -> None:
        self._write(event="model", name=name, folder=str(folder))

    def end(self, status: str) -> None:
        self._write(event="end", status=status)

    def _write(self, **event: Any) -> None:
        with (self.folder / "events.jsonl").open("a") as file:
            file.write(json.dumps({"time": int(time.time() * 1000)} | event) + "\n")
