"""`python -m llm classify`."""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from llm.cli.options import add_device, add_model
from llm.cli.rows import FORMATS, Row, is_file_name, read_rows, text_of, writer
from llm.cli.terminal import describe_training, named_texts
from llm.common.errors import InputError

if TYPE_CHECKING:
    from llm.api import Model

SUMMARY = "label texts"
DESCRIPTION = (
    "Writes text, label and probabilities of each text: a JSON object a line, or CSV. A name that ends in .csv, .tsv, "
    ".jsonl or .txt is a file: its rows, or each line of a .txt, are labelled, and their other columns stay. A text "
    "without a letter, digit or sign has the label `unsure`, as has one whose label is less likely than the model's "
    "limit. `doubt` says why a label means little."
)
EXAMPLES = (
    'python -m llm classify models/classifier "You have won a prize!" "See you at six"',
    "python -m llm classify models/classifier - < messages.txt",
    "python -m llm classify models/classifier mails.csv --column body --out labelled.csv",
)
BATCH_SIZE = 32  # texts of arguments and stdin that are labelled together: answers come soon
FILE_BATCH_SIZE = 1024  # rows of files: sorted by length, then labelled in batches


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    parser.add_argument(
        "texts",
        nargs="*",
        metavar="TEXT",
        help="a text, a file, or - for the lines of stdin; after -- it may start with a dash; none: tell the labels",
    )
    parser.add_argument("--column", metavar="NAME", help="the column of a file's texts (default: text)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write to this .csv or .jsonl file, not to stdout")
    parser.add_argument("--format", choices=FORMATS, help="what to write (default: as FILE ends, else jsonl)")
    add_device(parser)


def run(args: argparse.Namespace) -> None:
    """Label texts and write a row for each."""
    form = output_format(args.out, args.format)
    from_files = [text != "-" and is_file_name(text) for text in args.texts]
    if args.column is not None and not any(from_files):
        raise InputError("--column: goes with a file; name one, or leave it out")
    names = [Path(text) for text, is_file in zip(args.texts, from_files, strict=True) if is_file]
    if args.out is not None and args.out.resolve() in [name.resolve() for name in names]:
        raise InputError(f"{args.out}: the input itself; name another file to write to")

    from llm.api import load

    model = load(args.model_dir, device=args.device)
    model.require("classifier")
    if not args.texts:
        for line in describe_training(model.checkpoint.config.labels or [], model.about):
            print(line, file=sys.stderr)
        raise InputError("no text to label; name texts or files, or - for the lines of stdin")
    rows = itertools.chain.from_iterable(
        read_rows(Path(text), args.column) if is_file else ({"text": one} for one in named_texts([text]))
        for text, is_file in zip(args.texts, from_files, strict=True)
    )
    column = args.column if any(from_files) else None
    size = FILE_BATCH_SIZE if any(from_files) else BATCH_SIZE
    with writer(args.out, form) as write:
        for row in progress(labelled(model, rows, column, size, form), bool(names) and args.out is not None):
            write(row)


def output_format(out: Path | None, form: str | None) -> str:
    """Return `csv` or `jsonl`: as asked, else as the file's name ends."""
    if out is None or form is not None:
        return form or "jsonl"
    if (found := out.suffix.lower().removeprefix(".")) not in FORMATS:
        raise InputError(
            f"{out}: expected a name that ends in .csv or .jsonl, got {out.suffix or 'none'}; see --format"
        )
    return found


def progress(rows: Iterator[Row], shown: bool) -> Iterator[Row]:
    """Count the rows in a progress bar on a terminal, where the rows themselves go to a file."""
    from tqdm import tqdm

    return iter(tqdm(rows, desc="classify", unit=" texts", disable=None if shown and sys.stderr.isatty() else True))


def labelled(model: Model, rows: Iterable[Row], column: str | None, size: int, form: str) -> Iterator[Row]:
    """Yield each row with its label, `size` rows at a time. Columns of a file with such names become `given_...`."""
    from llm.inference.classify import NO_TEXT, UNSURE

    ahead = iter(rows)
    labels = model.checkpoint.config.labels or []
    while batch := list(itertools.islice(ahead, size)):
        texts = [text_of(row, column if column in row else None) for row in batch]
        doubts = [model.doubt(text) for text in texts]
        readable = [doubt != NO_TEXT for doubt in doubts]
        found = iter(model.classify([text for text, reads in zip(texts, readable, strict=True) if reads]))
        for row, reads, doubt in zip(batch, readable, doubts, strict=True):
            probabilities = {label: round(p, 6) for label, p in next(found).items()} if reads else None
            label = model.decide(probabilities) if probabilities else UNSURE
            yield with_label(row, label, probabilities, doubt, labels, form)


def with_label(
    row: Row, label: str, probabilities: dict[str, float] | None, doubt: str | None, labels: list[str], form: str
) -> Row:
    """Return a row with the result, in JSON nested, in CSV a column for each label."""
    result: Row = {"label": label}
    if form == "csv":
        result |= {f"probability_{name}": None if probabilities is None else probabilities[name] for name in labels}
        result["doubt"] = doubt
    else:
        result["probabilities"] = probabilities
        if doubt is not None:
            result["doubt"] = doubt
    reserved = result.keys() | {"doubt"}
    return {f"given_{name}" if name in reserved else name: value for name, value in row.items()} | result
