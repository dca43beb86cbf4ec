"""`python -m llm drift`."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from llm.cli.options import WRONG_INPUT, add_device
from llm.cli.rows import LINES, read_rows, read_table
from llm.common.errors import InputError
from llm.common.markdown import escape, table
from llm.common.sanitize import one_line, visible

if TYPE_CHECKING:
    from llm.api import Model
    from llm.evaluation.drift import Sample, TestResult

SUMMARY = "test whether a model's inputs have changed"
DESCRIPTION = (
    "Tests new texts against reference texts, such as the training set: tokens, lengths, bytes that no longer token "
    "covers, the labels and the confidence of a model, and a classifier that tries to tell the two apart. All tests "
    "together give a false alarm in at most 1 of 100 runs (--alpha). Files: .csv, .tsv, .jsonl with a column text, or "
    "instruction and input; .txt with a text a line. Exit status: 0 no drift, 1 drift, 2 wrong input."
)
EXAMPLES = (
    "python -m llm drift data/tokens/messages/train.jsonl today.csv --model models/classifier",
    "python -m llm drift train.jsonl today.jsonl --json > drift.json || mail -s drift team < drift.json",
)
DRIFT = 1  # exit status


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("reference", type=Path, metavar="REFERENCE", help="a file of texts as they should be")
    parser.add_argument("new", type=Path, metavar="NEW", help="a file of texts as they are now")
    parser.add_argument("--model", type=Path, metavar="MODEL_DIR", help="its tokens, labels and confidence count")
    parser.add_argument("--column", metavar="NAME", help="the column of the texts (default: text, or instruction)")
    parser.add_argument(
        "--alpha", type=float, default=0.01, metavar="P", help="false alarms of all tests together (default: 0.01)"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    add_device(parser)


def run(args: argparse.Namespace) -> int:
    """Print the tests; return 1 where one of them finds a drift, 2 for wrong input."""
    try:
        tests = find(args)
    except (InputError, OSError) as error:  # a drift must not look like a mistake, nor the other way round
        print(one_line(f"python -m llm drift: {error}"), file=sys.stderr)
        return WRONG_INPUT
    if args.json:
        print(json.dumps([test._asdict() for test in tests], ensure_ascii=False, indent=2))
    else:
        print(visible(to_markdown(tests, args.alpha)), end="")
    return DRIFT if any(test.drift for test in tests) else 0


def find(args: argparse.Namespace) -> list[TestResult]:
    """Read both files and test them."""
    from llm.evaluation.drift import FEWEST, PERMUTATIONS, detect_drift, draw

    if not 10 / PERMUTATIONS <= args.alpha < 1:
        raise InputError(f"--alpha: expected {10 / PERMUTATIONS:g} to 1, got {args.alpha:g}; correct it")
    both = [draw(read_texts(path, args.column)) for path in (args.reference, args.new)]
    for path, texts in zip((args.reference, args.new), both, strict=True):
        if len(texts) < FEWEST:
            raise InputError(f"{path}: {len(texts)} texts (expected at least {FEWEST}); collect more")
    reference, new = samples(both, args.model, args.device)
    return detect_drift(reference, new, alpha=args.alpha)


def read_texts(path: Path, column: str | None) -> list[str]:
    """Return the texts of a file; an instruction and its input are one text."""
    if path.suffix.lower() in LINES or column is not None:
        return [str(row[column or "text"] or "") for row in read_rows(path, column)]
    texts = []
    for where, row in read_table(path):
        parts = [row["text"]] if "text" in row else [row.get("instruction"), row.get("input")]
        if parts[0] is None:
            raise InputError(f"{where}: neither text nor instruction (found {', '.join(row)}); name one by --column")
        texts.append("\n".join(str(part) for part in parts if part))
    return texts


def samples(both: list[list[str]], folder: Path | None, device: str) -> list[Sample]:
    """Return the texts as a model reads them; without one their tokens are words."""
    from llm.evaluation.drift import Sample

    if folder is None:
        words = [[text.split() for text in texts] for texts in both]
        shares = [[sum(ord(c) > 127 for c in text) / max(len(text), 1) for text in texts] for texts in both]
        return [Sample(*each) for each in zip(both, words, shares, strict=True)]
    from llm.api import load

    model = load(folder, device=device)
    tokenizer = model.checkpoint.tokenizer
    found = []
    for texts in both:
        ids = [tokenizer.encode(text) for text in texts]
        pieces = [[tokenizer.decode_bytes([i]) for i in each] for each in ids]
        tokens = [[piece.decode("utf-8", "backslashreplace") for piece in each] for each in pieces]
        single = [sum(len(p) == 1 for p in each) / max(sum(map(len, each)), 1) for each in pieces]
        found.append(Sample(texts, tokens, single, *answers(model, texts, ids)))
    return found


def answers(model: Model, texts: list[str], ids: list[list[int]]) -> tuple[list[str] | None, list[float]]:
    """Return a classifier's labels and their probabilities, or no labels and a GPT's log-probability of a token."""
    import torch

    from llm.inference.classify import has_text
    from llm.inference.score import score_tokens

    tokenizer = model.checkpoint.tokenizer
    if model.kind != "classifier":
        return None, [-score_tokens(model.gpt, torch.tensor([tokenizer.eot, *each])).loss for each in ids]
    readable = [has_text(tokenizer, text) for text in texts]
    said = iter(model.classify([text for text, reads in zip(texts, readable, strict=True) if reads]))
    best = [max(next(said).items(), key=lambda item: item[1]) if reads else ("no text", 0.0) for reads in readable]
    return [label for label, _ in best], [p for _, p in best]


def to_markdown(tests: list[TestResult], alpha: float) -> str:
    rows = [
        [
            test.name,
            *(f"{value:.4g}" for value in (test.reference, test.new)),
            *(f"{p:.2g}" for p in (test.p, test.p_holm)),
            "drift" if test.drift else "-",
            escape(test.detail),
        ]
        for test in tests
    ]
    header = ["test", "reference", "new", "p", "p (Holm)", "verdict", "what changed most"]
    drifted = [test.name for test in tests if test.drift]
    verdict = f"Drift: {', '.join(drifted)}." if drifted else "No drift."
    rate = f"Without drift {100 * alpha:g} % of such runs at most say otherwise."
    return "\n".join([f"{verdict} {rate}", "", *table(header, rows)])
