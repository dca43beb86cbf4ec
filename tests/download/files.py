"""Files to fetch, and what comes of them."""

from __future__ import annotations

import hashlib
import io
import zipfile
from pathlib import Path

import pytest

from llm.common.errors import InputError
from llm.config import SourceFile
from llm.download.content.archives import DataFile
from llm.download.fetching.fetch import fetch

DATA = b"".join(b"line %d of the file\n" % i for i in range(5000))


def sha(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def zipped(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def content(file: DataFile) -> bytes:
    return b"".join(file.blocks())


def refused(file: SourceFile, cache: Path, mirror: Path | None = None) -> str:
    with pytest.raises(InputError) as caught:
        fetch(file, cache, mirror)
    message = str(caught.value)
    assert "\n" not in message
    return message
