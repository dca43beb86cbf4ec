"""Small data sets that several tests write and read back."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from llm.data.shards import TokenShards
from llm.preprocess.supervised import Row
from llm.preprocess.text import dedup_key


def words(chooser: random.Random, n: int) -> str:
    return " ".join("".join(chooser.choices("abcdefghij", k=chooser.randint(1, 8))) for _ in range(n))


def document(seed: int, paragraphs: int = 2) -> str:
    chooser = random.Random(seed)
    return "\n\n".join(words(chooser, 40) + "." for _ in range(paragraphs))


def disguise(text: str) -> str:
    """Return another text with the same dedup key."""
    return text.upper().replace(" ", "  ").replace(".", " !?")


def write_corpus(path: Path, documents: Sequence[str | Sequence[str]]) -> Path:
    """Each document is a text, or the several texts of the records that it is written as."""
    with path.open("w", encoding="utf-8") as file:
        for number, texts in enumerate(documents):
            for text in [texts] if isinstance(texts, str) else texts:
                file.write(json.dumps({"doc": number, "text": text}, ensure_ascii=False) + "\n")
    return path


def write_lines(path: Path, records: Sequence[object]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def read_split(folder: Path, split: str) -> list[int]:
    """The tokens of all shards of a split, separators included."""
    meta = json.loads((folder / "meta.json").read_text())
    shards = [np.fromfile(folder / name, dtype=meta["dtype"]) for name in meta["splits"][split]["shards"]]
    return [int(number) for shard in shards for number in shard]


def write_shards(folder: Path, tokens: list[int], sizes: list[int], dtype: str = "uint16") -> TokenShards:
    """Write `tokens` as the split `train`, in shards of the given sizes and one with the rest."""
    cuts = [cut for cut in np.cumsum(sizes).tolist() if 0 < cut < len(tokens)]
    names = []
    for i, shard in enumerate(np.split(np.array(tokens, dtype=dtype), cuts) if tokens else []):
        names.append(f"train-{i:05d}.bin")
        shard.tofile(folder / names[-1])
    splits = {"train": {"shards": names, "tokens": len(tokens), "bytes": 3 * len(tokens), "documents": 1}}
    (folder / "meta.json").write_text(json.dumps({"dtype": dtype, "vocab_size": 1000, "splits": splits}))
    return TokenShards(folder, "train")


def message_rows(texts: Sequence[tuple[str, str]], splits: Sequence[str | None] | None = None) -> list[Row]:
    """Messages from texts with their labels; `splits` are the source's own."""
    return [
        Row({"text": text, "label": label}, dedup_key(text), text, label, label, split)
        for (text, label), split in zip(texts, splits or [None] * len(texts), strict=True)
    ]


def folder_digest(folder: Path) -> str:
    """Return the digest of the names, sizes and bytes of all files."""
    digest = hashlib.md5()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        digest.update(f"{path.relative_to(folder)} {path.stat().st_size}\n".encode() + path.read_bytes())
    return digest.hexdigest()
