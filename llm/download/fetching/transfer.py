"""Transfer a remote file to this disk with retries, and resume what an earlier attempt left."""

from __future__ import annotations

import logging
import os
import time
from pathlib import Path, PurePosixPath

from tqdm import tqdm

from llm.common.errors import InputError
from llm.download.fetching.remote import Body, TransientError, open_url, redact

PAUSES = (1.0, 2.0, 4.0)  # seconds before each retry; they start again after an attempt that brought something new
NETWORK = "check the network and the proxy settings (HTTPS_PROXY), or give a folder with the file in LLM_DATA_MIRROR"

log = logging.getLogger("llm")


class TooLargeError(Exception):
    """A file of more bytes than were asked for; `part` holds its first ones, and a later transfer resumes it."""

    def __init__(self, part: Path, total: int | None) -> None:
        super().__init__(f"more than {part.stat().st_size:,} bytes")
        self.part, self.total = part, total


def transfer(url: str, part: Path, pinned: bool, most: int | None = None) -> bool:
    """Download until `part` is whole, and return whether this resumed what had been there before.

    A resume needs a server that says that the content is unchanged, or a sha256 (`pinned`) that will tell. A file of
    more than `most` bytes raises `TooLargeError` once so many are there.
    """
    version_file = part.with_suffix(".version")
    resumed, best, attempt = None, 0, 0
    while True:
        start = part.stat().st_size if part.exists() else 0
        version = version_file.read_text(encoding="utf-8") if start and version_file.exists() else ""
        try:
            with open_url(url, start if version or pinned else 0, version) as body:
                resumed = body.start > 0 if resumed is None else resumed
                version_file.write_text(body.version, encoding="utf-8")
                _append(part, body, redact(url), most)
            version_file.unlink()
            return resumed
        except TransientError as error:
            arrived = part.stat().st_size if part.exists() else 0
            if arrived > best:
                best, attempt = arrived, 0
            if attempt == len(PAUSES):
                raise InputError(f"{redact(url)}: {error}, also after {attempt} retries; {NETWORK}") from None
            log.warning("%s: %s; next attempt in %g s", redact(url), error, PAUSES[attempt])
            time.sleep(PAUSES[attempt])
            attempt += 1


def _append(part: Path, body: Body, name: str, most: int | None) -> None:
    goal = body.total if most is None or body.total is None else min(body.total, most)
    with (
        part.open("ab" if body.start else "wb") as out,
        tqdm(
            desc=PurePosixPath(name).name,
            total=goal,
            initial=body.start,
            unit="B",
            unit_scale=True,
            disable=None,
            leave=False,
        ) as bar,
    ):
        try:
            for block in () if _has_enough(out.tell(), body, most) else body.blocks:
                if most is not None and (body.total is None or body.total > most):
                    block = block[: most - out.tell()]
                out.write(block)
                bar.update(len(block))
                if _has_enough(out.tell(), body, most):
                    break
        finally:
            out.flush()
            os.fsync(out.fileno())
        if _has_enough(out.tell(), body, most):
            raise TooLargeError(part, body.total)
        if body.total is not None and out.tell() != body.total:
            raise TransientError(f"ended after {out.tell():,} of {body.total:,} bytes")


def _has_enough(arrived: int, body: Body, most: int | None) -> bool:
    """Return whether the first bytes of a file that is too large are there."""
    return most is not None and arrived >= most and (body.total is None or body.total > most)
