"""Decode the text of files: UTF-8, UTF-16 and UTF-32 as they are found, anything else as it is stated.

Text of another encoding is refused. The message guesses which one only where the guess is sure.
"""

from __future__ import annotations

import codecs
import io
from collections.abc import Iterator

from llm.common.errors import InputError
from llm.download.content.archives import DataFile

MARKS = {  # byte order marks; the longer ones first
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
CANDIDATES = (  # encodings that files have today, and that a guess may name
    *("cp1252", "cp1250", "cp1251", "cp1253", "cp1254", "cp1255", "cp1256", "cp1257", "koi8_r", "cp866", "iso8859_5"),
    *("gb18030", "big5", "cp932", "euc_jp", "cp949"),
)
COHERENCE, CHAOS, MARGIN = 0.13, 0.1, 0.06  # of charset-normalizer's scores: least, most, and before the next guess
SAMPLE = 1 << 14  # bytes that a guess looks at


def decode_text(file: DataFile, stated: str | None = None) -> Iterator[str]:
    """Yield the text of a file, without byte order mark, each line end as a line feed."""
    head = file.head()
    encoding = stated or find_encoding(head)
    decoder = io.IncrementalNewlineDecoder(codecs.getincrementaldecoder(encoding)(), translate=True)
    offset, last, at_start = 0, b"", True

    def decode(block: bytes, final: bool) -> str:
        held_back = len(decoder.getstate()[0])  # the first bytes of a character that the last block cut
        try:
            return decoder.decode(block, final=final)
        except UnicodeError as error:
            at = max(offset - held_back + (error.start if isinstance(error, UnicodeDecodeError) else 0), 0)
            found = f"byte 0x{error.object[error.start]:02x}" if isinstance(error, UnicodeDecodeError) else "an error"
            hint = "state another encoding:" if stated else advice(head if at < len(head) else block or last)
            name = "UTF-8" if encoding == "utf-8" else encoding
            raise InputError(f"{file}: expected {name}, found {found} at offset {at}; {hint}") from None

    for block in file.blocks():
        text = decode(block, final=False)
        offset, last = offset + len(block), block
        if text:
            yield text.removeprefix("\ufeff") if at_start else text
            at_start = False
    yield decode(b"", final=True)


def find_encoding(head: bytes) -> str:
    """Return UTF-16 or UTF-32 for text that has their marks, or zeros where they have them; else UTF-8."""
    for mark, name in MARKS.items():
        if head.startswith(mark):
            return name
    even, odd = head[:4096:2].count(0), head[1:4096:2].count(0)
    half = len(head[:4096]) // 2
    if half and min(even, odd) * 20 < max(even, odd) > half * 0.3:
        return "utf-16-le" if odd > even else "utf-16-be"
    return "utf-8"


def decoded_head(head: bytes, stated: str | None = None) -> str:
    """Return the text of a file's first bytes, as far as it can be decoded."""
    decoder = codecs.getincrementaldecoder(stated or find_encoding(head))(errors="replace")
    return io.IncrementalNewlineDecoder(decoder, translate=True).decode(head).removeprefix("\ufeff")


def advice(block: bytes) -> str:
    """Return what to do about bytes that are not UTF-8, with the likely encoding and how it reads, or without."""
    lines = [line for line in block.splitlines() if not line.isascii()]
    sample = b"\n".join(lines)[:SAMPLE]
    text = sample.decode(errors="replace")
    damaged = text.count("\ufffd")
    if sum(not character.isascii() for character in text) - damaged > 2 * damaged:
        return "the text around is UTF-8, so correct that place"
    if found := guess(sample):
        name, text = found
        line = next(line for line in text.splitlines() if not line.isascii())
        at = next(i for i, character in enumerate(line) if not character.isascii())
        shown = line[max(at - 10, 0) : at + 20].strip()
        return f"it may be {name}, which reads {shown!r}: if that is right, write encoding: {name}"
    return "write its encoding:, such as windows-1252 (Western Europe), windows-1251 (Russian) or gb18030 (Chinese)"


def guess(sample: bytes) -> tuple[str, str] | None:
    """Return the encoding of a text and the text, or None where several are likely."""
    from charset_normalizer import from_bytes

    found = sorted(from_bytes(sample, cp_isolation=[*CANDIDATES]), key=lambda match: -match.coherence)
    if not found or found[0].coherence < COHERENCE or found[0].chaos > CHAOS:
        return None
    best, *others = found
    text = str(best)
    if any(str(other) != text and other.coherence > best.coherence - MARGIN for other in others):
        return None
    same = [name for name in CANDIDATES if _reads_as(sample, name, text)]
    return (same[0].replace("cp125", "windows-125") if same else best.encoding), text


def _reads_as(sample: bytes, encoding: str, text: str) -> bool:
    try:
        return sample.decode(encoding) == text
    except UnicodeDecodeError:
        return False
