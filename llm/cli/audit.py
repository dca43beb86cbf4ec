"""`python -m llm audit`."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llm.cli.options import WRONG_INPUT, add_device, add_out
from llm.cli.terminal import write_result
from llm.common.errors import InputError
from llm.common.sanitize import one_line

if TYPE_CHECKING:
    from llm.evaluation.base.membership import Membership

SUMMARY = "find held-out texts that training has seen"
DESCRIPTION = (
    "Compares the texts of TEST with those of TRAIN: equal, equal in letters and digits, nearly equal; and looks for "
    "them in the files of --corpus. Reads what `inspect` knows (CSV, TSV, JSON, parquet, archives); each line of a "
    ".txt file is a text. --min-k also asks a model whether its own losses tell the two apart. Exit status: 0 nothing "
    "leaked, 1 leaks, 2 wrong input; a model's losses change no status."
)
EXAMPLES = (
    "python -m llm audit train.csv test.csv",
    "python -m llm audit train.jsonl test.jsonl --corpus books/*.txt --json --out audit.json",
    "python -m llm audit train.txt test.txt --min-k models/base",
)
LEAKS = 1  # exit status


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("train", metavar="TRAIN", help="file with the training texts")
    parser.add_argument("test", metavar="TEST", help="file with the held-out texts")
    parser.add_argument("--corpus", nargs="+", default=[], metavar="FILE", help="text that a base model was trained on")
    parser.add_argument(
        "--most-near", type=int, default=100_000, metavar="N", help="compare at most N texts of each as nearly equal"
    )
    parser.add_argument("--json", action="store_true", help="print JSON with all findings, not Markdown")
    parser.add_argument("--min-k", type=Path, metavar="MODEL_DIR", help="score both sides by a base or instruct model")
    k = "tokens of a text that count, the least likely ones, in %% (default: %(default)s)"
    parser.add_argument("--k", type=float, default=20.0, metavar="PERCENT", help=k)
    most = "texts of each side that the model scores (default: %(default)s)"
    parser.add_argument("--most-scored", type=int, default=500, metavar="N", help=most)
    parser.add_argument(
        "--seed", type=int, default=0, metavar="N", help="of the choice of these (default: %(default)s)"
    )
    add_device(parser)
    add_out(parser)
    parser.add_argument("--show", type=int, default=20, metavar="N", help="show N leaked texts (default: %(default)s)")


def run(args: argparse.Namespace) -> int:
    """Print the audit; return 1 where a text leaked, 2 for input that cannot be read."""
    from llm.audit.describe import to_dict, to_markdown
    from llm.audit.leakage import audit_sets
    from llm.evaluation.base import membership

    try:
        train, test = (list(texts(path, lines=True)) for path in (args.train, args.test))
        corpus = [text for path in args.corpus for text in texts(path, lines=False)]
        found = None if args.min_k is None else probe(args, train, test)
        audit = audit_sets({"texts": {"train": train, "test": test}}, corpus, most_near=args.most_near)
        if args.json:
            values = to_dict(audit, {"texts", "corpus"})
            if found is not None:
                values["membership"] = membership.to_dict(found)
            content = json.dumps(values, ensure_ascii=False, indent=2) + "\n"
        else:
            lines = to_markdown(audit, {"texts", "corpus"}, args.show)
            lines += [] if found is None else membership.to_markdown(found)
            content = "\n".join(lines)
        write_result(content, args.out)
    except (InputError, OSError) as error:
        message = f"{error.filename}: {error.strerror}" if isinstance(error, OSError) and error.filename else error
        print(one_line(f"python -m llm audit: {message}"), file=sys.stderr)
        return WRONG_INPUT
    return LEAKS if any(part.leaked() for part in audit.parts) else 0


def probe(args: argparse.Namespace, train: Sequence[str], test: Sequence[str]) -> Membership:
    """Return whether the losses of the model of --min-k tell the two sides apart."""
    from llm.checkpoint.folder import load_checkpoint
    from llm.common.device import pick_device
    from llm.convert.cache import model_folder
    from llm.evaluation.base.membership import membership

    if not 0 < args.k <= 100 or args.most_scored < 1:
        raise InputError(
            f"--k, --most-scored: expected a share of 0 to 100 % and a positive number, got {args.k:g} and "
            f"{args.most_scored}; correct them"
        )
    checkpoint = load_checkpoint(model_folder(args.min_k), pick_device(args.device))
    return membership(checkpoint, train, test, args.k / 100, args.most_scored, args.seed)


def texts(path: str, lines: bool) -> Iterator[str]:
    """Yield the texts of a file: messages, instructions with their inputs, or documents."""
    from llm.preprocess.text import normalise

    found = _rows(Path(path)) if lines else None
    if found is None:
        found = [_text(record) for record in _records(path)]
    kept = [text for text in map(normalise, found) if text.strip()]
    if not kept:
        raise InputError(f"{path}: no text in it (expected at least one); name another file")
    yield from kept


def _rows(path: Path) -> list[str] | None:
    """Return the texts of a file that `classify` reads; None for another one."""
    from llm.cli.rows import LINES, SUFFIXES, read_rows, text_of

    if path.suffix.lower() not in SUFFIXES or not path.is_file():
        return None
    try:
        return [text_of(row) for row in read_rows(path)]
    except InputError:
        if path.suffix.lower() in LINES:
            raise
        return None  # no column `text`, or not valid: the other reader says so


def _text(record: dict[str, Any]) -> str:
    if "instruction" in record:
        return "\n".join(part for part in (record["instruction"], record.get("input")) if part)
    return str(record["text"])


def _records(path: str) -> Iterator[dict[str, Any]]:
    """Yield the records of a file as the training would read them; the pieces of one document as one."""
    from llm.download.inspection import read_file

    document: dict[str, Any] | None = None
    for record in read_file(path):
        if document is not None and "doc" in record and record["doc"] == document["doc"]:
            document["text"] += record["text"]
            continue
        if document is not None:
            yield document
        document = dict(record)
    if document is not None:
        yield document
