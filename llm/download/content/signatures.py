"""Recognize what a file is by its first bytes, whatever its name says."""

from __future__ import annotations

import re
from typing import NamedTuple

from llm.common.errors import InputError

HEAD = 1 << 16  # bytes that are enough to recognize any content
TAR_MARK = slice(257, 262)
COMPRESSED = {  # the ending of each method's files, and how they begin
    ".gz": re.compile(rb"\x1f\x8b\x08"),
    ".bz2": re.compile(rb"BZh[1-9](1AY&SY|\x17rE8P\x90)"),
    ".xz": re.compile(rb"\xfd7zXZ\x00"),
    ".zst": re.compile(rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18"),
}
POINTERS = {  # how a small text begins that stands in a file's place, and what fetches the file
    "git lfs pull": re.compile(rb"version https://(git-lfs|hawser)\.github\.com/spec/"),
    "git annex get": re.compile(rb"/annex/objects/\S+\s*\Z"),
}
HTML = re.compile(
    rb"(\xef\xbb\xbf)?\s*(<\?xml[^>]*>\s*)?(<!--.*?-->\s*)*<(!doctype\s+html|html|head|body)\b",
    re.DOTALL | re.IGNORECASE,
)


class Binary(NamedTuple):
    """A kind of file that no reader takes."""

    start: re.Pattern[bytes]
    noun: str
    advice: str


UNPACK = "unpack it, or pack it as .zip or .tar.gz"
TO_TEXT = "save its text as .txt"
NO_DATA = "correct the name"
BINARIES = [
    Binary(re.compile(rb"SQLite format 3\x00"), "an SQLite database", "export the table, for example with: "
           "sqlite3 -csv -header FILE 'SELECT * FROM name' > name.csv"),
    Binary(re.compile(rb"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1"),
           "an old Excel or Word file (.xls, .doc), or a new one with a password",
           "save it as .xlsx, .docx, CSV UTF-8 or text, without password"),
    Binary(re.compile(rb"\{\\rtf"), "an RTF document", TO_TEXT),
    Binary(re.compile(rb"ARROW1\x00\x00|\xff\xff\xff\xff.{4}[\x0c\x10\x14\x18]\x00\x00\x00", re.DOTALL),
           "an Arrow file", "save it as .parquet"),
    Binary(re.compile(rb"Obj\x01"), "an Avro file", "save it as .parquet"),
    Binary(re.compile(rb"\x89HDF\r\n"), "an HDF5 file", "save it as .csv or .parquet"),
    Binary(re.compile(rb"Rar!\x1a\x07"), "a RAR archive", UNPACK),
    Binary(re.compile(rb"7z\xbc\xaf\x27\x1c"), "a 7z archive", UNPACK),
    Binary(re.compile(rb"\x89PNG\r|\xff\xd8\xff|GIF8[79]a|RIFF....WEBP", re.DOTALL), "an image", NO_DATA),
    Binary(re.compile(rb"GGUF[\x02\x03]\x00|\x7fELF|MZ\x90\x00"), "a program or a model's weights", NO_DATA),
]  # fmt: skip
DOCUMENTS = {  # by format: the nouns of what the extractors read
    "pdf": "a PDF",
    "html": "an HTML page",
    "epub": "an EPUB book",
    "docx": "a Word document",
    "xlsx": "an Excel workbook",
}
HTML_SUFFIXES = (".html", ".htm", ".xhtml")
OFFICE_DOCUMENTS = {  # a member that tells which document a zip archive is
    "xl/workbook.xml": "xlsx",
    "word/document.xml": "docx",
    "META-INF/container.xml": "epub",
}
OFFICE = {  # a member that tells that a zip archive is a file of another kind, which no reader takes
    "xl/workbook.bin": ("an Excel workbook in binary form (.xlsb)", "save it as .xlsx or as CSV UTF-8"),
    "ppt/presentation.xml": ("a PowerPoint presentation", TO_TEXT),
    "META-INF/manifest.xml": ("an OpenDocument file", "save it as CSV UTF-8 or text"),
}


def compression_of(head: bytes) -> str:
    """Return `.gz`, `.bz2`, `.xz`, `.zst` or nothing."""
    return next((ending for ending, start in COMPRESSED.items() if start.match(head)), "")


def archive_of(head: bytes) -> str:
    """Return `.zip`, `.tar` or nothing for unpacked content."""
    if head.startswith((b"PK\x03\x04", b"PK\x05\x06", b"PK\x07\x08PK")):
        return ".zip"
    return ".tar" if head[TAR_MARK] == b"ustar" else ""


def is_parquet(head: bytes) -> bool:
    return head.startswith((b"PAR1", b"PARE"))


def check_pointer(name: str, head: bytes) -> None:
    """Raise `InputError` for a small text that git-LFS or git-annex keeps in place of the file."""
    for command, start in POINTERS.items():
        if start.match(head) and len(head) < 2000:
            tool = command.rpartition(" ")[0].replace("git lfs", "git-LFS")
            raise InputError(
                f"{name}: expected the file itself, found a pointer to it of {tool}; fetch it with: {command} "
                "(or, for a URL, name that of the file)"
            )


def check_binary(name: str, head: bytes) -> None:
    """Raise `InputError` for content that is recognized and that no reader takes."""
    for kind in BINARIES:
        if kind.start.match(head):
            raise InputError(f"{name}: expected text or rows, found {kind.noun}; {kind.advice}")


def looks_binary(head: bytes) -> bool:
    """Return whether this is no text of any encoding: it has control characters that no text has."""
    sample = head[:4096]
    controls = sum(byte < 32 and byte not in (9, 10, 12, 13, 26, 27) for byte in sample)
    return controls * 50 > len(sample)
