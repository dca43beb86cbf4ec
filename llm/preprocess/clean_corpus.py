"""Clean the corpus before it is split, in shards on disk that a killed run leaves to the next one.

A text is a record of the corpus: a document, or a part of a million characters of a longer one. Workers apply the
rules for single texts, a shard at a time. Then duplicates are found among what is left, in the order of the corpus.
Memory holds a few numbers for each text.
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from llm.common.files import parse_json, replaced_folder
from llm.config import CleanParams
from llm.preprocess.clean import Cleaned, active_rules, check_packages, clean_text
from llm.preprocess.corpus import LineBatch, line_batches, read_batch
from llm.preprocess.near_duplicates import PERMUTATIONS, Array, find_near_duplicates
from llm.preprocess.workers import Workers, show_progress

FEWEST_SHARDS, MOST_BATCHES = 16, 8  # a small corpus has smaller shards, so that all workers have some
SAMPLES, SAMPLE_CHARS = 3, 100  # texts of each rule in the data card
TEXTS, TABLE, SIGNATURES, REMOVED = "texts.jsonl", "table.npz", "signatures.npy", "removed.json"

logger = logging.getLogger("llm")


class Funnel(NamedTuple):
    """Texts and characters before the rules, and their effect rule by rule, in their order."""

    texts: int
    characters: int
    changed: dict[str, int]
    removed: dict[str, int]
    samples: dict[str, list[str]]
    left: int
    left_characters: int

    def card(self) -> dict[str, Any]:
        return self._asdict()


class Shard(NamedTuple):
    """A part of the corpus file, and the folder of its cleaned texts."""

    folder: Path
    batches: list[LineBatch]

    @property
    def size(self) -> int:
        return sum(batch.size for batch in self.batches)


class Table(NamedTuple):
    """Findings on the N texts of a shard, in the order of the corpus."""

    characters: Array  # [N] before the rules
    left: Array  # [N] characters after them
    removed: Array  # [N] by the rule with this number, from 1 on; 0: by none
    changed: Array  # [N] sum of 2**i over the rules i
    hashes: Array  # [N] of the dedup keys
    signed: Array  # [N] whether `signatures.npy` has a row for it


def clean_corpus(path: Path, out: Path, params: CleanParams, workers: Workers, state: Path) -> Funnel:
    """Write the cleaned corpus to `out` and return the funnel; `state` keeps the shards that are done."""
    check_packages(params)
    rules = active_rules(params)
    shards = plan_shards(path, state)
    done = sum(shard.folder.is_dir() for shard in shards)
    if done:
        logger.info("data.corpus: cleaning goes on behind an earlier run: %d of %d shards are done", done, len(shards))
    for _ in show_progress(
        workers.in_order(clean_shard, shards, path, params), [shard.size for shard in shards], "clean"
    ):
        pass
    return write_cleaned(shards, out, rules, remove_duplicates(shards, rules))


def plan_shards(path: Path, state: Path) -> list[Shard]:
    """Divide the corpus file into shards, the same whatever the number of workers."""
    batches = line_batches(path)
    size = max(1, min(MOST_BATCHES, len(batches) // FEWEST_SHARDS))
    starts = range(0, len(batches), size)
    return [Shard(state / f"clean-{i:06d}", batches[start : start + size]) for i, start in enumerate(starts)]


def clean_shard(shard: Shard, path: Path, params: CleanParams) -> None:
    """Clean the texts of a shard into its folder, unless an earlier run has."""
    if shard.folder.is_dir():
        return
    rules = active_rules(params)
    rows: list[tuple[int, ...]] = []
    signatures, samples = [np.zeros((0, PERMUTATIONS), np.uint32)], dict[str, list[str]]()
    with replaced_folder(shard.folder) as draft:
        with (draft / TEXTS).open("w", encoding="utf-8", newline="\n") as file:
            for document, text in chain.from_iterable(read_batch(path, batch) for batch in shard.batches):
                item = clean_text(text, params)
                rows.append((len(text), *_numbers(item, rules)))
                if item.removed is not None:
                    samples.setdefault(item.removed, []).append(item.text[:SAMPLE_CHARS])
                    samples[item.removed] = samples[item.removed][:SAMPLES]
                    continue
                if item.signature is not None:
                    signatures.append(item.signature[None])
                file.write(json.dumps({"doc": document, "text": item.text}, ensure_ascii=False) + "\n")
        columns = zip(*rows, strict=True) if rows else ((),) * len(Table._fields)
        table: dict[str, Any] = dict(
            zip(Table._fields, (np.array(column, np.uint64) for column in columns), strict=True)
        )
        np.savez(draft / TABLE, **table)
        np.save(draft / SIGNATURES, np.concatenate(signatures))
        (draft / REMOVED).write_text(json.dumps(samples), encoding="utf-8")


def _numbers(item: Cleaned, rules: list[str]) -> tuple[int, ...]:
    """Return the row of a text in the table, without its first column."""
    removed = 0 if item.removed is None else rules.index(item.removed) + 1
    changed = sum(1 << rules.index(rule) for rule in item.changed)
    return len(item.text), removed, changed, item.hash, int(item.signature is not None)


def read_column(shard: Shard, name: str) -> Array:
    with np.load(shard.folder / TABLE) as table:
        column: Array = table[name]
    return column


def remove_duplicates(shards: list[Shard], rules: list[str]) -> Array:
    """Return the number of the rule that removes each text of the corpus, with those for duplicates: [N]."""
    removed = np.concatenate([read_column(shard, "removed").astype(np.uint8) for shard in shards])
    if "exact" in rules:
        left = np.flatnonzero(removed == 0)
        hashes = np.concatenate([read_column(shard, "hashes") for shard in shards])[left]
        is_copy = np.ones(len(left), dtype=bool)
        is_copy[np.unique(hashes, return_index=True)[1]] = False  # the first of each
        removed[left[is_copy]] = rules.index("exact") + 1
    if "near" in rules:
        signed = np.concatenate([read_column(shard, "signed").astype(bool) for shard in shards])
        asked = np.flatnonzero((removed == 0) & signed)
        rows = (np.cumsum(signed) - 1)[asked]
        near = find_near_duplicates([shard.folder / SIGNATURES for shard in shards], rows)
        removed[asked[near]] = rules.index("near") + 1
    return removed


def write_cleaned(shards: list[Shard], out: Path, rules: list[str], removed: Array) -> Funnel:
    """Write the texts that no rule removes to `out`, and count the effects of the rules."""
    changed, dropped = Counter(dict.fromkeys(rules, 0)), Counter(dict.fromkeys(rules, 0))
    samples: dict[str, list[str]] = {rule: [] for rule in rules}
    start = characters = left = left_characters = 0
    with out.open("wb") as file:
        for shard in shards:
            table = Table(**{name: read_column(shard, name) for name in Table._fields})
            rule_of = removed[start : start + len(table.removed)]
            start += len(table.removed)
            kept = rule_of == 0
            characters += int(table.characters.sum())
            left, left_characters = left + int(kept.sum()), left_characters + int(table.left[kept].sum())
            for number, rule in enumerate(rules):
                dropped[rule] += int((rule_of == number + 1).sum())
                changed[rule] += int((table.changed[kept] >> np.uint64(number) & np.uint64(1)).sum())
            copy_texts(shard, table, rule_of, rules, samples, file)
    return Funnel(start, characters, dict(changed), dict(dropped), samples, left, left_characters)


def copy_texts(
    shard: Shard, table: Table, rule_of: Array, rules: list[str], samples: dict[str, list[str]], out: BinaryIO
) -> None:
    """Copy the texts of a shard that are kept, and add to the samples of the rules."""
    removed_samples = json.loads((shard.folder / REMOVED).read_text(encoding="utf-8"))
    unused = {rule: iter(texts) for rule, texts in removed_samples.items()}
    with (shard.folder / TEXTS).open("rb") as lines:
        rows = zip(table.removed.tolist(), rule_of.tolist(), table.changed.tolist(), strict=True)
        for by_itself, number, changed in rows:
            if by_itself:
                rule = rules[by_itself - 1]
                if len(samples[rule]) < SAMPLES:
                    samples[rule].append(next(unused[rule]))
                continue
            line = lines.readline()
            if number == 0:
                out.write(line)
            for rule in [rules[number - 1]] if number else _named(changed, rules):
                if len(samples[rule]) < SAMPLES:
                    samples[rule].append(parse_json(line)["text"][:SAMPLE_CHARS])


def _named(changed: int, rules: list[str]) -> Iterator[str]:
    return (rule for number, rule in enumerate(rules) if changed >> number & 1)


def sentence(funnel: Funnel) -> str:
    """Return the effect of the rules in a line, for the terminal."""
    effects = chain(
        (f"{n:,} removed by {rule}" for rule, n in funnel.removed.items() if n),
        (f"{n:,} changed by {rule}" for rule, n in funnel.changed.items() if n),
    )
    return f"data.corpus: cleaning left {funnel.left:,} of {funnel.texts:,} texts: {', '.join(effects) or 'no change'}"
