"""Split labelled messages and instruction pairs: leak-free, or as the book does."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from llm.common.errors import InputError
from llm.config import HELD_OUT, SPLITS, LabelledSplit
from llm.preprocess.text import dedup_key, differ_in_signs, key_hash, normalise, read_records, text_field

MANY = 5  # rows with one text, at least, that count as very many
SLACK = 0.16  # of a held-out split's share of a stratum
BOOK_SEED = 123  # of the book's own splits, for any seed of the pipeline


class Row(NamedTuple):
    """A message or an instruction pair on its way into a split."""

    fields: dict[str, Any]  # the columns of the written row
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
        fields = {"text": text, "label": label} | ({"slices": record["slices"]} if "slices" in record else {})
        rows.append(Row(fields, dedup_key(text), text, label, label, own_split(record, where)))
    return rows


def read_instructions(path: Path) -> list[Row]:
    rows = []
    if preferences := sum("chosen" in record for record in read_records(path)):
        raise InputError(
            f"data.instructions: {preferences:,} records are preference pairs (chosen and rejected), which "
            "finetune-instruct cannot use; write preferences: chosen at their source to train on the chosen answers"
        )
    for number, record in enumerate(read_records(path), start=1):
        where = f"{path}: line {number}"
        if "messages" in record:
            rows.append(_conversation(record, where))
            continue
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
        own = own_split(record, where)
        rows.append(Row(fields, dedup_key(question), question, dedup_key(output), fields["task"], own))
    return rows


def _conversation(record: Mapping[str, Any], where: str) -> Row:
    """Return the row of a conversation: its last question and answer, and all of its messages where there are more."""
    messages = [{**message, "content": _content(message, where)} for message in record["messages"]]
    *history, last = messages
    question = next((message["content"] for message in reversed(history) if message["role"] == "user"), "")
    fields = {"instruction": question, "input": "", "output": last["content"], "task": _optional(record, "task", where)}
    if len(messages) > 2 or "tools" in record or last.keys() != {"role", "content"}:
        fields["messages"] = messages
    if "tools" in record:
        fields["tools"] = record["tools"]
    said = "\n".join(message["content"] for message in history)
    return Row(fields, dedup_key(said), said, dedup_key(json.dumps(last)), fields["task"], own_split(record, where))


def _content(message: Mapping[str, Any], where: str) -> str:
    text = normalise(message["content"])
    if not text.strip() and not message.get("tool_calls"):
        raise InputError(
            f"{where}: a message of {message['role']} is empty after cleaning; remove this conversation from its source"
        )
    return text


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
    split_of |= assign_splits(free, missing, seed, at_least=1 if kind == "messages" else 0)

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


def assign_splits(
    groups: Mapping[str, Sequence[Row]], held_out: Mapping[str, float], seed: int, at_least: int = 0
) -> dict[str, str]:
    """Return the split of each group, stratum by stratum in the order of the hashes.

    The first group of a stratum goes to train, each other one to the split that is furthest behind its share of all
    rows. A group of very many rows goes to train too and does not count there. The groups of a stratum in each split
    stay within `SLACK` of its share whatever repeats, and are `at_least` so many where there are enough. Groups that
    differ in signs only stay together where that is a small change.
    """
    shares = {"train": 1 - sum(held_out.values()), **held_out}
    smallest = min(shares.values())
    many = max(MANY, smallest * sum(map(len, groups.values())) / 10)
    weights = {key: len(rows) if len(rows) <= many else 0 for key, rows in groups.items()}
    counts = dict.fromkeys(shares, 0)
    split_of: dict[str, str] = {}
    strata: dict[str, list[tuple[int, str]]] = {}
    for key, rows in groups.items():
        strata.setdefault(rows[0].stratum, []).append((key_hash(key, seed), key))
    for _, stratum in sorted(strata.items()):
        room = Room(len(stratum), shares, at_least)
        for family in _families(sorted(stratum), most=max(1, int(0.05 * len(stratum) * smallest))):
            total = sum(counts.values()) + sum(weights[key] for key in family)
            for part in [family] if room.splits(len(family)) else [[key] for key in family]:
                behind = {split: shares[split] * total - counts[split] for split in room.splits(len(part))}
                to_train = not room.taken or ("train" in behind and not all(weights[key] for key in part))
                split = "train" if to_train else max(behind, key=behind.__getitem__)
                room.take(split, len(part))
                split_of |= dict.fromkeys(part, split)
                counts[split] += sum(weights[key] for key in part)
    return split_of


def _families(stratum: Sequence[tuple[int, str]], most: int) -> list[list[str]]:
    """Return keys in runs of at most so many that differ in signs only."""
    families: list[list[str]] = []
    previous = None
    for key_hash_, key in stratum:
        if previous is not None and differ_in_signs(previous, key_hash_) and len(families[-1]) < most:
            families[-1].append(key)
        else:
            families.append([key])
        previous = key_hash_
    return families


class Room:
    """Bounds on the groups of one stratum in each split: n * share, more or less `SLACK` of that or 1."""

    def __init__(self, n: int, shares: Mapping[str, float], at_least: int) -> None:
        at_least = at_least if n >= at_least * len(shares) else 0
        self.taken, self._n = 0, n
        self._most, self._due = {"train": n}, {"train": 1}
        for split, share in shares.items():
            if split != "train":
                slack = max(1.0, SLACK * share * n)
                self._most[split] = max(at_least, int(share * n + slack))
                self._due[split] = max(at_least, math.ceil(share * n - slack))

    def splits(self, n: int) -> list[str]:
        """Return the splits that may take n more groups: none has too many, and enough are left for the others."""
        left = self._n - self.taken - n
        due = {split: max(0, due) for split, due in self._due.items()}
        return [
            split for split, most in self._most.items() if n <= most and sum(due.values()) - min(n, due[split]) <= left
        ]

    def take(self, split: str, n: int) -> None:
        self.taken += n
        self._most[split] -= n
        self._due[split] -= n


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
    """Raise `InputError` for an empty split or a label that train lacks; log what else is missing or left out."""
    for name, rows in split.rows.items():
        if not rows:
            raise InputError(
                f"data.{kind}: too few different records to split, {name} would be empty; "
                f"add records or raise the share in tokenize.{kind}"
            )
    for label in labels:
        if not any(row.answer == label for row in split.rows["train"]):
            raise InputError(f"data.{kind}: no record with label {label!r} in train; add records or remove the label")
    log = logging.getLogger("llm")
    for line in [*_missing_strata(split, kind), *_left_out(split, kind)]:
        log.warning(line)
    return split


def _missing_strata(split: SplitRows, kind: str) -> Iterator[str]:
    """Yield a line for each held-out split that lacks labels or tasks."""
    texts: dict[str, set[str]] = {}
    for rows in split.rows.values():
        for row in rows:
            texts.setdefault(row.stratum, set()).add(row.key)
    for name in HELD_OUT:
        missing = sorted(texts.keys() - {row.stratum for row in split.rows[name]})
        shown = [f"{stratum or '(none)'!r} ({len(texts[stratum])} different)" for stratum in missing[:5]]
        more = f" and {len(missing) - len(shown)} more" if len(missing) > len(shown) else ""
        if missing:
            yield (
                f"data.{kind}: {name} has no record of {', '.join(shown)}{more}; "
                f"its figures say nothing of them, unless you add records or raise tokenize.{kind}.{name}"
            )


def _left_out(split: SplitRows, kind: str) -> Iterator[str]:
    dropped = [f"{count:,} of {name}" for name, count in split.dropped.items() if count]
    if dropped:
        yield f"data.{kind}: left out so that no held-out text counts twice: {', '.join(dropped)}"
    if split.moved:
        yield f"data.{kind}: moved out of the source's own split, as an equal text is held out: {split.moved:,}"


def write_rows(folder: Path, split: SplitRows) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in split.rows.items():
        with (folder / f"{name}.jsonl").open("w", encoding="utf-8", newline="\n") as file:
            file.writelines(json.dumps(row.fields, ensure_ascii=False) + "\n" for row in rows)
