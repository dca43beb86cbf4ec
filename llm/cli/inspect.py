"""`python -m llm inspect`."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

from llm.cli.terminal import print_json
from llm.common.sanitize import visible

SUMMARY = "say what a file of your own looks like"
DESCRIPTION = (
    "Prints what a file looks like, its first three records as the training will see them, and the lines for "
    "params.yaml that read it. A file that no source reads is 'not known', with the reason, and the exit status is 1."
)
EXAMPLES = (
    "python -m llm inspect data/own/mine/mails.csv",
    "python -m llm inspect data/own/mine/export.zip --member 'messages/*.jsonl'",
)
WIDTH = 300  # characters of a text that are shown


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE", help="a file on this disk")
    parser.add_argument("--member", help="file of an archive to look at, a name or a pattern such as '*.txt'")
    formats = ["text", "jsonl", "json", "csv", "tsv", "parquet"]
    parser.add_argument("--format", choices=formats, help="format, where name and content do not tell it")


def run(args: argparse.Namespace) -> None:
    """Print the form of a file, its records and the lines for params.yaml."""
    from llm.download.inspection import inspect_file, params_lines

    found = inspect_file(args.file, args.member, args.format)
    print(f"looks like: {visible(found.form)}")
    print(f"read as:    {found.kind}")
    for note in found.notes:
        print(f"note:       {visible(note)}")
    print("\nfirst records:")
    for record in found.records:
        print_json({key: _shortened(value) for key, value in record.items() if key != "doc"})
    print(f"\nfor params.yaml:\n{visible(params_lines(found))}")


def _shortened(value: Any) -> Any:
    """Return a text, or the messages of a conversation, with the first characters of long texts."""
    if isinstance(value, list):
        return [_shortened(each) for each in value]
    if isinstance(value, Mapping):
        return {key: _shortened(each) for key, each in value.items()}
    return value if not isinstance(value, str) or len(value) <= WIDTH else f"{value[:WIDTH]}..."
