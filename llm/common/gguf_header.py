"""The header of a GGUF file (ggml's docs/gguf.md): metadata, and the name, shape, type and place of each tensor.

It is parsed against the size of the file, since it may come from anywhere. `gguf`'s own reader trusts it, and keeps a
memory map of each token and merge, a third of the weights' size for a small model.
"""

from __future__ import annotations

import math
import os
import struct
from io import BufferedReader
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from llm.common.errors import InputError
from llm.common.stored_tensor import StoredTensor

# ggml's number of a type, struct's letter
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
ALIGNMENT = 32  # of the tensors, where general.alignment says nothing else
MAX_HEADER = 2**27  # bytes; as Python values it takes up to eight times as much


class GGUFHeader(NamedTuple):
    """Metadata by key as plain Python values, and tensors by name."""

    fields: dict[str, Any]
    tensors: dict[str, StoredTensor]


class _Listed(NamedTuple):
    """A tensor as the header lists it."""

    kind: int  # ggml's number of the type
    shape: tuple[int, ...]
    offset: int


def read_gguf_header(path: Path) -> GGUFHeader:
    """Read everything but the tensors' numbers; raise `InputError` for what the size of the file contradicts."""
    try:
        with path.open("rb") as file:
            return _Parser(path, file).header()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); name a .gguf file") from None


def read_exactly(file: BufferedReader, n_bytes: int) -> bytearray:
    """Read `n_bytes` bytes, or raise `InputError`."""
    content = bytearray(n_bytes)
    if file.readinto(content) != n_bytes:
        raise InputError(f"{file.name}: it became shorter while it was read; try again")
    return content


def gguf_package() -> ModuleType:
    """Import the `gguf` package, an extra."""
    try:
        import gguf
    except ImportError:
        raise InputError("GGUF files need the gguf package: pip install 'textmill[gguf]'") from None
    return gguf


class _Parser:
    """Reader of a header from front to back, which raises `InputError` before the end of the file."""

    def __init__(self, path: Path, file: BufferedReader) -> None:
        self.path = path
        self.file = file
        self.size = os.fstat(file.fileno()).st_size
        self.at = 0

    def wrong(self, problem: str) -> InputError:
        return InputError(f"{self.path}: {problem}; download or copy the file again")

    def take(self, n_bytes: int) -> bytearray:
        self.at += n_bytes
        if self.at > self.size:
            raise self.wrong(f"truncated: the header goes on behind the end of the file, at byte {self.size}")
        if self.at > MAX_HEADER:
            raise self.wrong(f"damaged: the header is longer than {MAX_HEADER} bytes")
        return read_exactly(self.file, n_bytes)

    def number(self, code: str) -> Any:
        return struct.unpack(f"<{code}", self.take(struct.calcsize(f"<{code}")))[0]

    def string(self) -> str:
        try:
            return self.take(self.number("Q")).decode("utf-8")
        except UnicodeDecodeError:
            raise self.wrong(f"damaged: a text before byte {self.at} is not UTF-8") from None

    def value(self) -> Any:
        kind = self.number("I")
        if kind == ARRAY:
            kind, count = self.number("I"), self.number("Q")
            if kind == STRING:
                return [self.string() for _ in range(count)]  # each takes bytes: the file's end ends a false count
            if kind in SCALARS:
                content = self.take(count * struct.calcsize(f"<{SCALARS[kind]}"))
                return list(struct.unpack(f"<{count}{SCALARS[kind]}", content))
        elif kind == STRING:
            return self.string()
        elif kind in SCALARS:
            return self.number(SCALARS[kind])
        raise self.wrong(f"damaged: there is no metadata of type {kind} (byte {self.at})")

    def header(self) -> GGUFHeader:
        if self.take(min(4, self.size)) != b"GGUF":
            raise InputError(f"{self.path}: not a GGUF file (it does not begin with GGUF); name a .gguf file")
        if (version := self.number("I")) not in (2, 3):
            raise InputError(f"{self.path}: GGUF version {version} is not supported, only 2 and 3; convert it anew")
        n_tensors, n_fields = self.number("Q"), self.number("Q")
        fields: dict[str, Any] = {}
        for _ in range(n_fields):
            key = self.string()
            if key in fields:
                raise self.wrong(f"damaged: metadata {key!r} occurs twice")
            fields[key] = self.value()
        listed: dict[str, _Listed] = {}
        for _ in range(n_tensors):
            name, n_dims = self.string(), self.number("I")
            if name in listed or not 1 <= n_dims <= 4:
                raise self.wrong(f"damaged: tensor {name!r} occurs twice or has {n_dims} dimensions")
            shape = tuple(self.number("Q") for _ in range(n_dims))[::-1]  # written innermost first
            listed[name] = _Listed(self.number("I"), shape, self.number("Q"))
        alignment = fields.get("general.alignment", ALIGNMENT)
        if not isinstance(alignment, int) or alignment < 1:
            raise self.wrong(f"damaged: general.alignment is {alignment}")
        return GGUFHeader(fields, self.tensors(listed, -(-self.at // alignment) * alignment))

    def tensors(self, listed: dict[str, _Listed], data: int) -> dict[str, StoredTensor]:
        """Return where each tensor lies, the first at byte `data` or later; none overlaps another or leaves the file.

        So what is read can never be more than a small multiple of the file.
        """
        sizes = {int(kind): (kind.name, *size) for kind, size in gguf_package().GGML_QUANT_SIZES.items()}
        found = {}
        end = data
        for name, (kind, shape, offset) in sorted(listed.items(), key=lambda item: item[1].offset):
            if kind not in sizes:
                raise InputError(f"{self.path}: tensor {name!r} has type {kind}, which this gguf package does not know")
            dtype, block, block_bytes = sizes[kind]
            if shape[-1] % block or 0 in shape:
                raise self.wrong(f"damaged: tensor {name!r} of shape {list(shape)} is not made of blocks of {block}")
            n_bytes = math.prod(shape) // block * block_bytes
            if data + offset < end:
                raise self.wrong(f"damaged: tensor {name!r} begins inside another one")
            end = data + offset + n_bytes
            if end > self.size:
                raise self.wrong(f"truncated: tensor {name!r} would end at byte {end}, the file ends at {self.size}")
            found[name] = StoredTensor(self.path, shape, dtype, name, data + offset, n_bytes)
        return found
