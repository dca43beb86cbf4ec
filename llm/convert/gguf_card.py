"""Lineage card in the metadata of a GGUF file, with a digest of the whole file.

The digest is of the file in which its own 64 characters are zeros.
"""

from __future__ import annotations

import hashlib
import mmap
import struct
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from llm.checkpoint.card import Card
from llm.checkpoint.readme import USES, first_base, hub_licence
from llm.common.errors import InputError
from llm.common.gguf_header import read_gguf_header
from llm.config import explain

CARD, DIGEST = "textmill.card", "textmill.sha256"
UNKNOWN = "0" * 64
MARK = DIGEST.encode() + struct.pack("<IQ", 8, len(UNKNOWN))  # key, type of a string, its length
BLOCK = 1 << 20


def card_fields(card: Card) -> dict[str, Any]:
    """Return a card as metadata: under the names of ggml's docs/gguf.md as far as it has some, and whole."""
    fields: dict[str, Any] = {
        DIGEST: UNKNOWN,
        CARD: card.model_dump_json(exclude_none=True),
        "general.description": USES[card.kind][0],
        "general.license": hub_licence(card),
        "general.tags": ["textmill", card.kind],
    }
    if card.data:
        fields["general.dataset.count"] = len(card.data)
        for number, source in enumerate(card.data.values()):
            fields[f"general.dataset.{number}.name"] = source.source
    if (base := first_base(card.base)) is not None:
        fields |= {"general.base_model.count": 1, "general.base_model.0.name": base.name}
    return fields


def read_gguf_card(path: Path) -> Card:
    """Return the card in a GGUF file; raise `InputError` where there is none."""
    text = read_gguf_header(path).fields.get(CARD)
    if not isinstance(text, str):
        raise InputError(f"{path}: no card in its metadata; export the model folder again")
    try:
        return Card.model_validate_json(text)
    except ValidationError as error:
        raise InputError(explain(error, f"{path}: {CARD}")) from None


def write_digest(path: Path) -> None:
    """Put the digest of a file with unknown digest into it."""
    place, _, found = file_digest(path)
    with path.open("r+b") as file:
        file.seek(place)
        file.write(found.encode())


def is_unchanged(path: Path) -> bool:
    """Tell whether a file has the digest that it states."""
    _, stated, found = file_digest(path)
    return stated == found


def file_digest(path: Path) -> tuple[int, str, str]:
    """Return the place of the stated digest in a file, the stated one and the computed one."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        place = content.find(MARK) + len(MARK)
        if place < len(MARK):
            raise InputError(f"{path}: no digest in its metadata; export the model folder again")
        after = place + len(UNKNOWN)
        digest = hashlib.sha256()
        for start in range(0, place, BLOCK):
            digest.update(content[start : min(start + BLOCK, place)])
        digest.update(UNKNOWN.encode())
        for start in range(after, len(content), BLOCK):
            digest.update(content[start : start + BLOCK])
        return place, content[place:after].decode("ascii", "replace"), digest.hexdigest()
