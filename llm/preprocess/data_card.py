"""Measure the three data sets and their splits, and render the data card.

A held-out text counts as leaked when one of train is equal: verbatim, or by its dedup key (`llm.preprocess.text`).
"""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from llm.common.markdown import escape
from llm.config import HELD_OUT, KINDS, SPLITS, TRAIN
from llm.preprocess.corpus import Array, Plan
from llm.preprocess.encode import EncodedCorpus
from llm.preprocess.lengths import too_long_line
from llm.preprocess.supervised import Row, SplitRows
from llm.preprocess.text import count_characters
from llm.tokenizer.bpe import Tokenizer

Card = dict[str, Any]
MOST_REPEATED = 3  # texts in the card


# ---- measure ---------------------------------------------------------------------------------------------------------


def describe_tokenizer(kind: str, tokenizer: Tokenizer, used: Array) -> Card:
    return {
        "kind": kind,
        "vocab_size": tokenizer.vocab_size,
        "special_tokens": list(tokenizer.special_tokens),
        "tokens_used_in_train": int((used > 0).sum()),
    }


def describe_corpus(plan: Plan, encoded: EncodedCorpus, split: str) -> Card:
    n_chunks = len(plan.chunk_lengths)
    meta = encoded.meta["splits"]
    characters = np.bincount(plan.chunk_split, weights=plan.chunk_lengths, minlength=len(SPLITS)).astype(int).tolist()
    return {
        "split": split,
        "documents": len(plan.document_hashes),
        "units": n_chunks,
        "characters": sum(characters),
        "duplicate_documents": len(plan.document_hashes) - len(np.unique(plan.document_hashes)),
        "duplicate_units": n_chunks - len(np.unique(plan.chunk_hashes)),
        "document_lengths": {
            "characters": length_summary(np.bincount(plan.chunk_document, weights=plan.chunk_lengths)),
            "tokens": length_summary(np.bincount(plan.chunk_document, weights=encoded.chunk_tokens)),
        },
        "splits": {
            name: {
                **{key: meta[name][key] for key in ("documents", "tokens", "bytes")},
                "characters": characters[i],
                "bytes_per_token": bytes_per_token(
                    meta[name]["bytes"], encoded.chunk_tokens[plan.chunk_split == i].sum()
                ),
            }
            for i, name in enumerate(SPLITS)
        },
        "leaked_units": corpus_leakage(plan),
        "characters_of": scripts(plan.code_points),
    }


def corpus_leakage(plan: Plan) -> dict[str, int]:
    train = np.unique(plan.chunk_hashes[plan.chunk_split == TRAIN])
    return {
        name: int(np.isin(plan.chunk_hashes[plan.chunk_split == i], train).sum())
        for i, name in enumerate(SPLITS)
        if i != TRAIN
    }


def describe_messages(rows: Sequence[Row], split: SplitRows, tokenizer: Tokenizer, how: str) -> Card:
    texts = {"text": [row.fields["text"] for row in rows]}
    return {**describe_rows(rows, split, texts, tokenizer, how), "labels": counts_per_split(split, "label")}


def describe_instructions(rows: Sequence[Row], split: SplitRows, tokenizer: Tokenizer, how: str) -> Card:
    texts = {name: [row.fields[name] for row in rows] for name in ("instruction", "input", "output")}
    card = {**describe_rows(rows, split, texts, tokenizer, how), "tasks": counts_per_split(split, "task")}
    counts = {name: sum("messages" in row.fields for row in part) for name, part in split.rows.items()}
    return card | ({"conversations": counts} if any(counts.values()) else {})


def describe_rows(
    rows: Sequence[Row], split: SplitRows, texts: Mapping[str, Sequence[str]], tokenizer: Tokenizer, how: str
) -> Card:
    """Describe all rows that were read; lengths and scripts are those of `texts`, such as inputs and outputs."""
    answers: dict[str, set[str]] = {}
    for row in rows:
        answers.setdefault(row.key, set()).add(row.answer)
    repeated = [(text, n) for text, n in Counter(row.verbatim for row in rows).most_common(MOST_REPEATED) if n > 1]
    return {
        "split": how,
        "records": len(rows),
        "duplicates": {
            "verbatim": len(rows) - len({row.verbatim for row in rows}),
            "by_key": len(rows) - len(answers),
            "keys_with_different_answers": sum(len(found) > 1 for found in answers.values()),
            "dropped": split.dropped,
            "moved_to_a_held_out_split": split.moved,
        },
        "most_repeated": [{"text": text[:100], "times": times} for text, times in repeated],
        "lengths": {name: describe_lengths(values, tokenizer) for name, values in texts.items()},
        "splits": {name: {"records": len(part)} for name, part in split.rows.items()},
        "leaked": row_leakage(split),
        "characters_of": scripts(count_characters("".join(text for values in texts.values() for text in values))),
    }


def without_texts(card: Card, kinds: Collection[str]) -> Card:
    """Return the card without the most repeated texts of these kinds of data; how often they occur stays."""
    withheld = {
        kind: {**card[kind], "most_repeated": [{"times": entry["times"]} for entry in card[kind]["most_repeated"]]}
        for kind in kinds
        if "most_repeated" in card[kind]
    }
    if "corpus" in kinds and "cleaning" in card["corpus"]:
        cleaning = {key: value for key, value in card["corpus"]["cleaning"].items() if key != "samples"}
        withheld["corpus"] = {**card["corpus"], "cleaning": cleaning}
    return card | withheld


def row_leakage(split: SplitRows) -> dict[str, dict[str, int]]:
    train = split.rows["train"]
    verbatim, keys = {row.verbatim for row in train}, {row.key for row in train}
    return {
        name: {
            "verbatim": sum(row.verbatim in verbatim for row in split.rows[name]),
            "by_key": sum(row.key in keys for row in split.rows[name]),
        }
        for name in HELD_OUT
    }


def counts_per_split(split: SplitRows, field: str) -> dict[str, dict[str, int]]:
    """Count each value of a field, such as the label, in each split."""
    counts = {name: Counter(row.fields[field] for row in rows) for name, rows in split.rows.items()}
    values = sorted(set().union(*counts.values()))
    return {value: {name: counts[name][value] for name in SPLITS} for value in values}


def describe_lengths(texts: Sequence[str], tokenizer: Tokenizer) -> Card:
    tokens = [len(tokenizer.encode(text)) for text in texts]
    n_bytes = sum(len(text.encode()) for text in texts)
    return {
        "characters": length_summary(np.array([len(text) for text in texts])),
        "tokens": length_summary(np.array(tokens)),
        "bytes_per_token": bytes_per_token(n_bytes, sum(tokens)),
    }


def length_summary(values: Array) -> dict[str, float]:
    return {
        "mean": round(float(values.mean()), 1),
        "median": round(float(np.median(values)), 1),
        "p95": round(float(np.percentile(values, 95)), 1),
        "max": int(values.max()),
    }


def bytes_per_token(n_bytes: int, n_tokens: int) -> float | None:
    return round(n_bytes / int(n_tokens), 4) if n_tokens else None


def scripts(code_points: Mapping[int, int]) -> dict[str, float]:
    """Return the share of each script among all characters, the largest first.

    >>> scripts(count_characters("abc где 1!"))
    {'Latin': 0.3, 'Cyrillic': 0.3, 'white space': 0.2, 'punctuation': 0.1, 'digits': 0.1}
    """
    counts: Counter[str] = Counter()
    for code, count in sorted(code_points.items()):
        counts[script(chr(code))] += count
    return {name: round(count / counts.total(), 6) for name, count in counts.most_common()}


def script(character: str) -> str:
    """Return the script of a letter, the first word of its Unicode name; for any other character its kind."""
    kind = unicodedata.category(character)[0]
    if kind in "LM":
        word = unicodedata.name(character, "other").split()[0].split("-")[0]
        return word if word in ("CJK", "other") else word.capitalize()
    if character.isspace():
        return "white space"
    return {"N": "digits", "P": "punctuation", "S": "symbols"}.get(kind, "other")


# ---- Markdown --------------------------------------------------------------------------------------------------------


def render(card: Card) -> str:
    """Return the card as Markdown."""
    return "\n\n".join([*_header(card), *_corpus(card), *_rows(card, "messages"), *_rows(card, "instructions")]) + "\n"


def _header(card: Card) -> list[str]:
    tokenizer = card["tokenizer"]
    return [
        "# Data card",
        "Written by the tokenize stage. Texts are equal here when their letters, digits and signs (such as +) are, "
        "whatever the case, space and punctuation.",
        table(
            ("", "source", "licence", "split"),
            [(kind, *card["sources"][kind].values(), card[kind]["split"]) for kind in KINDS],
        ),
        f"Tokenizer: {escape(tokenizer['kind'])}, {tokenizer['vocab_size']:,} tokens, of which "
        f"{tokenizer['tokens_used_in_train']:,} occur in train.",
    ]


def _corpus(card: Card) -> list[str]:
    corpus = card["corpus"]
    lengths = corpus["document_lengths"]
    columns = {"documents": "texts", "characters": "characters", "bytes": "bytes", "tokens": "tokens"}
    columns["bytes_per_token"] = "bytes per token"
    return [
        "## Corpus",
        f"{corpus['documents']:,} documents with {corpus['characters']:,} characters, split in {corpus['units']:,} "
        "units: documents, or sections of long ones. The texts of a split are documents, or sections that follow each "
        "other. Equal to an earlier one: "
        f"{corpus['duplicate_documents']:,} documents, {corpus['duplicate_units']:,} units.",
        *_left_out(corpus),
        table(
            ("split", *columns.values(), "units equal to one of train"),
            [
                (name, *(values[column] for column in columns), corpus["leaked_units"].get(name))
                for name, values in corpus["splits"].items()
            ],
        ),
        _lengths("length of a document", lengths.items()),
        _scripts(corpus["characters_of"]),
        *_cleaning(corpus),
    ]


def _cleaning(corpus: Card) -> list[str]:
    """Draw the funnel of cleaning, where the corpus was cleaned."""
    if "cleaning" not in corpus:
        return []
    found = corpus["cleaning"]
    left, rows = found["texts"], []
    for rule, removed in found["removed"].items():
        left -= removed
        bar = "█" * round(20 * left / max(1, found["texts"]))
        examples = "; ".join(found.get("samples", {}).get(rule, []))
        rows.append((rule, found["changed"][rule], removed, left, bar, examples or None))
    return [
        f"Cleaned before that: {found['texts']:,} texts with {found['characters']:,} characters became "
        f"{found['left']:,} with {found['left_characters']:,}.",
        table(("rule", "changed", "removed", "left", "", "examples"), rows),
    ]


def _rows(card: Card, kind: str) -> list[str]:
    part = card[kind]
    duplicates, leaked = part["duplicates"], part["leaked"]
    counted = "labels" if "labels" in part else "tasks"
    lengths = [
        (f"{name}, {unit}", values[unit])
        for name, values in part["lengths"].items()
        for unit in ("characters", "tokens")
    ]
    blocks = [
        f"## {kind.capitalize()}",
        *_left_out(part),
        f"{part['records']:,} records. Equal to an earlier one: {duplicates['verbatim']:,} verbatim, "
        f"{duplicates['by_key']:,} by letters, digits and signs; {duplicates['keys_with_different_answers']:,} of "
        "these texts have different answers. Left out so that no text counts twice: "
        f"{duplicates['dropped']['val']:,} of val, {duplicates['dropped']['test']:,} of test. Moved out of the "
        "source's own split because an equal text is held out: "
        f"{duplicates['moved_to_a_held_out_split']:,}.",
        table(
            ("split", "records", "verbatim in train", "equal to one of train"),
            [
                (name, values["records"], *(leaked.get(name, {}).get(how) for how in ("verbatim", "by_key")))
                for name, values in part["splits"].items()
            ],
        ),
        table(
            (counted.removesuffix("s"), *SPLITS),
            [(name or "(none)", *counts.values()) for name, counts in part[counted].items()],
        ),
        _lengths("length", lengths),
        _scripts(part["characters_of"]),
    ]
    if "conversations" in part:
        counts = ", ".join(f"{n:,} of {name}" for name, n in part["conversations"].items())
        blocks.append(f"Conversations, of which the lengths are those of the last question and answer: {counts}.")
    if "too_long" in part:
        blocks.append(too_long_line(kind, part["too_long"], part["splits"]))
    if part["most_repeated"]:
        rows = [(entry["times"], entry.get("text")) for entry in part["most_repeated"]]
        blocks.append(table(("times", "most repeated"), rows))
        if any("text" not in entry for entry in part["most_repeated"]):
            blocks.append(f"Texts are withheld: the source is not `quotable`. They are in `data/raw/{kind}.jsonl`.")
    return blocks


def _left_out(part: Card) -> list[str]:
    """Return a sentence about rows of the source that the download stage left out, if there are any."""
    return [f"Left out as they could not be used: {part['left_out']:,} rows."] if part.get("left_out") else []


def _lengths(title: str, lengths: Iterable[tuple[str, Mapping[str, float]]]) -> str:
    return table((title, "mean", "median", "p95", "max"), [(name, *values.values()) for name, values in lengths])


def _scripts(shares: Mapping[str, float]) -> str:
    return "Characters: " + ", ".join(f"{name} {100 * share:.2f} %" for name, share in shares.items()) + "."


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *([_cell(value) for value in row] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _cell(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, int | float):
        return f"{value:,}"
    return escape(str(value))
