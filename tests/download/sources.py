"""Sources of files, and what they become."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llm.common.errors import InputError
from llm.config import CorpusSource, InstructionsSource, MessagesSource
from llm.download.fetching.fetch import fetch
from llm.download.records.readers import Section, Written, write_records

KINDS = {"corpus": CorpusSource, "messages": MessagesSource, "instructions": InstructionsSource}


class Place:
    """A folder with files of a source."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "source"
        self.out = folder / "out.jsonl"
        self.written: Written | None = None

    def put(self, name: str, content: str | bytes) -> str:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return str(path)

    def read(self, kind: str, files: Any, **options: Any) -> list[dict[str, Any]]:
        """Return the records of a source: `files` as in params.yaml, or a name and its content."""
        if isinstance(files, tuple):
            files = [self.put(*files)]
        if kind == "messages":
            options.setdefault("labels", ["ham", "spam"])
        section: Section = KINDS[kind](files=files, **options)
        found = [data for file in section.files for data in fetch(section.entry(file), self.folder / "cache")]
        self.written = write_records(section, found, self.out)
        return [json.loads(line) for line in self.out.read_text(encoding="utf-8").split("\n")[:-1]]

    def texts(self, kind: str, files: Any, **options: Any) -> list[str]:
        return [record["text"] for record in self.read(kind, files, **options)]

    def refused(self, kind: str, files: Any, **options: Any) -> str:
        """Return the one line that a source is refused with, without the folder."""
        with pytest.raises(InputError) as caught:
            self.read(kind, files, **options)
        message = str(caught.value)
        assert "\n" not in message and message.startswith(str(self.folder))
        return message.replace(f"{self.folder}/", "")
