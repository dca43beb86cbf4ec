"""Split labelled messages and instruction pairs: leak-free, or as the book does."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from llm.common.errors import InputError
from llm.config import HELD_OUT, SPLITS, LabelledSplit
from llm.preprocess.text import dedup_key, key_hash, read_records, text_field

BOOK_SEED = 123  # of the book's own splits, for any seed of the pipeline


class Row(NamedTuple):
    """A message or an instruction pair on its way into a split."""

    fields: dict[str, str]  # the columns of the written row
    key: str  # rows with the same key never stand in two splits
    verbatim: str  # the text of the key
    answer: str  # label or output: rows with the same key and answer are duplicates
    stratum: str  # each stratum is split alike
    own_split: str | None  # the source's own


class SplitRows(NamedTuple):
    rows: dict[str, list[Row]]  # for each split
    moved: int  # rows outside their source's own split, because an equal one is held out
    dropped: dict[str, int]  # duplicates left out of a held-out split


def read_messages(path: Path, labels: Sequence[str]) -> list[Row]:
    rows = []
    for number, record in enumerate(read_records(path), start=1):
        where = f"{path}: line {number}"
        text, label = text_field(record, "text", where), text_field(record, "label", where)
        if label not in labels:
            raise InputError(f"{where}: expected one of the labels {', '.join(labels)}, found {label!r}")
        if not text.strip():
            raise InputError(f"{where}: no text is left after cleaning; remove this message from its source")
        rows.append(Row({"text": text, "label": label}, dedup_key(text), text, label, label, own_split(record, where)))
    return rows


def read_instructions(path: Path) -> list[Row]:
    rows = []
    for number, record in enumerate(read_records(path), start=1):
        where = f"{path}: line {number}"
        instruction, output = text_field(record, "instruction", where), text_field(record, "output", where)
        question = (
            f"{instruction}\n{record_input}" if (record_input := _optional(record, "input", where)) else instruction
        )
        if not instruction.strip() or not output.strip():
            raise InputError(
                f"{where}: instruction or output is empty after cleaning; remove this pair from its source"
            )
        fields = {"instruction": instruction, "input": record_input, "output": output}
        fields["task"] = _optional(record, "task", where)
        rows.append(Row(fields, dedup_key(question), question, dedup_key(output), "", own_split(record, where)))
    return rows


def _optional(record: Mapping[str, Any], key: str, where: str) -> str:
    return "" if record.get(key) is None else text_field(record, key, where)


def own_split(record: Mapping[str, Any], where: str) -> str | None:
    if "split" not in record:
        return None
    if record["split"] not in SPLITS:
        raise InputError(f"{where}: expected split train, val or test, found {record['split']!r}; correct the source")
    return str(record["split"])


def split_rows(rows: Sequence[Row], params: LabelledSplit, seed: int, kind: str) -> SplitRows:
    """Split rows without leaks: equal keys together, each stratum alike, by the source's own splits where it has them.

    A missing val or test is taken from train. Duplicates stay in train; val and test hold none, so that no text counts
    twice.
    """
    if sum(row.own_split is None for row in rows) not in (0, len(rows)):
        raise InputError(f"data.{kind}: some records have a split and some have none; give all of them one, or none")
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row.key, []).append(row)
    given = {row.own_split for row in rows} - {None}
    split_of = {
        key: max((row.own_split or "train" for row in group), key=SPLITS.index) for key, group in groups.items()
    }
    missing = {split: share for split, share in (("val", params.val), ("test", params.test)) if split not in given}
    free = {key: group for key, group in groups.items() if split_of[key] == "train"}
    split_of |= assign_splits(free, missing, seed)

    result = SplitRows({split: [] for split in SPLITS}, 0, dict.fromkeys(HELD_OUT, 0))
    seen = set()
    for row in rows:
        split = split_of[row.key]
        if split != "train" and (row.key, row.answer) in seen:
            result.dropped[split] += 1
            continue
        seen.add((row.key, row.answer))
        result.rows[split].append(row)
    moved = sum(row.own_split not in (None, split_of[row.key]) for row in rows)
    return result._replace(moved=moved)


def assign_splits(groups: Mapping[str, Sequence[Row]], held_out: Mapping[str, float], seed: int) -> dict[str, str]:
    """Return the split of each group, stratum by stratum in the order of the hashes.

    The first group of a stratum goes to train, each other one to the split that is furthest behind its share.
    """
    shares = {"train": 1 - sum(held_out.values()), **held_out}
    counts, total = dict.fromkeys(shares, 0), 0
    split_of: dict[str, str] = {}
    strata = set()
    for key in sorted(groups, key=lambda key: (groups[key][0].stratum, key_hash(key, seed), key)):
        total += len(groups[key])
        behind = {split: share * total - counts[split] for split, share in shares.items()}
        first = groups[key][0].stratum not in strata
        strata.add(groups[key][0].stratum)
        split_of[key] = "train" if first else max(behind, key=behind.__getitem__)
        counts[split_of[key]] += len(groups[key])
    return split_of


def split_messages(rows: Sequence[Row], labels: Sequence[str], params: LabelledSplit, seed: int) -> SplitRows:
    split = (
        split_messages_by_book(rows, labels) if params.split == "book" else split_rows(rows, params, seed, "messages")
    )
    return check_rows(split, "messages", labels)


def split_instructions(rows: Sequence[Row], params: LabelledSplit, seed: int) -> SplitRows:
    split = (
        split_instructions_by_book(rows) if params.split == "book" else split_rows(rows, params, seed, "instructions")
    )
    return check_rows(split, "instructions")


def split_messages_by_book(rows: Sequence[Row], labels: Sequence[str]) -> SplitRows:
    """Balance the labels, shuffle and split 70/10/20, as the book's chapter 6 with its seed."""
    import pandas as pd

    by_label = {
        label: pd.Series([i for i, row in enumerate(rows) if row.answer == label], dtype=int) for label in labels
    }
    fewest = min(map(len, by_label.values()))
    parts = [s if len(s) == fewest else s.sample(fewest, random_state=BOOK_SEED) for s in by_label.values()]
    shuffled = [rows[i] for i in pd.concat(parts).sample(frac=1, random_state=BOOK_SEED)]
    train_end = int(0.7 * len(shuffled))
    val_end = train_end + int(0.1 * len(shuffled))
    return _splits_in_order(shuffled[:train_end], shuffled[train_end:val_end], shuffled[val_end:])


def split_instructions_by_book(rows: Sequence[Row]) -> SplitRows:
    """Assign the first 85 % to train, the next 10 % to test, the rest to val, as the book's chapter 7."""
    train_end = int(0.85 * len(rows))
    test_end = train_end + int(0.1 * len(rows))
    return _splits_in_order(rows[:train_end], rows[test_end:], rows[train_end:test_end])


def _splits_in_order(*parts: Sequence[Row]) -> SplitRows:
    return SplitRows(
        {split: list(part) for split, part in zip(SPLITS, parts, strict=True)}, 0, dict.fromkeys(HELD_OUT, 0)
    )


def check_rows(split: SplitRows, kind: str, labels: Sequence[str] = ()) -> SplitRows:
    for name, rows in split.rows.items():
        if not rows:
            raise InputError(
                f"data.{kind}: too few different records to split, {name} would be empty; "
                f"add records or raise the share in tokenize.{kind}"
            )
    for label in labels:
        if not any(row.answer == label for row in split.rows["train"]):
            raise InputError(f"data.{kind}: no record with label {label!r} in train; add records or remove the label")
    return split


def write_rows(folder: Path, split: SplitRows) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in split.rows.items():
        with (folder / f"{name}.jsonl").open("w", encoding="utf-8", newline="\n") as file:
            file.writelines(json.dumps(row.fields, ensure_ascii=False) + "\n" for row in rows)
