"""`python -m llm inspect`."""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llm.cli.terminal import has_colour, print_json
from llm.common.errors import InputError
from llm.common.sanitize import visible

if TYPE_CHECKING:
    from llm.cli.subject import Subject
    from llm.cli.training_view import Shown, View
    from llm.config import Params
    from llm.tokenizer.bpe import Tokenizer

SUMMARY = "say what data look like, and how a training reads them"
DESCRIPTION = (
    "Prints what data look like, the first three records, their tokens as the training reads them with those that "
    "count in the loss set apart, what is cut, dropped or cleaned away, and the lines for params.yaml. DATA is a file, "
    "the name of a source in params.yaml, hf:OWNER/NAME of the Hugging Face hub, or a URL. Data that no source reads "
    "are 'not known', with the reason, and the exit status is 1."
)
EXAMPLES = (
    "python -m llm inspect data/own/mine/mails.csv",
    "python -m llm inspect data/own/mine/export.zip --member 'messages/*.jsonl'",
    "python -m llm inspect example-handbook --template alpaca",
    "python -m llm inspect hf:cornell-movie-review-data/rotten_tomatoes",
    "python -m llm inspect https://example.org/chats.jsonl --tokenizer models/instruct",
)
WIDTH = 300  # characters of a text that are shown
FIRST, LAST = 80, 120  # tokens of a long record that are shown
BETWEEN = "\u00a6"  # two tokens
COUNTS = ("[[", "]]")  # around tokens that count in the loss
GREEN, DIM, PLAIN = "\033[32m", "\033[2m", "\033[0m"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("data", metavar="DATA", help="a file, a source of params.yaml, hf:OWNER/NAME[@REVISION], a URL")
    parser.add_argument("--member", help="file of an archive or of a hub's data set, a name or a pattern as '*.txt'")
    formats = ["text", "jsonl", "json", "csv", "tsv", "parquet"]
    parser.add_argument("--format", choices=formats, help="format, where name and content do not tell it")
    parser.add_argument(
        "--rows", type=int, default=1000, metavar="N", help="count over the first N records (default: %(default)s)"
    )
    parser.add_argument(
        "--max-mb", type=int, default=32, metavar="N", help="fetch at most N MB of a download (default: %(default)s)"
    )
    parser.add_argument(
        "--tokenizer",
        metavar="MODEL_DIR",
        help="tokenizer and context of this model, or gpt2 (default: those of params.yaml, as made here)",
    )
    parser.add_argument(
        "--template",
        choices=["alpaca", "chatml", "llama3", "own"],
        help="prompt template; own: that of MODEL_DIR (default: finetune_instruct.template)",
    )


def run(args: argparse.Namespace) -> None:
    """Print the form of the data, their records and tokens, and the lines for params.yaml."""
    from llm.cli.subject import Request, find_params, find_subjects

    if args.rows < 1 or args.max_mb < 1:
        raise InputError("--rows and --max-mb: expected 1 or more; correct them")
    problem, params, root = "", None, Path()
    try:
        path, params = find_params()
        root = path.parent
    except InputError as error:
        problem = str(error)
    request = Request(args.data, args.member, args.format, args.rows, args.max_mb * 1_000_000)
    with tempfile.TemporaryDirectory() as scratch:
        for number, subject in enumerate(find_subjects(request, params, Path(scratch))):
            if params is not None:
                seen: tuple[View, Tokenizer] | str = _view(args, subject, params, root, Path(scratch))
            else:
                seen = problem
            print("\n" * bool(number), end="")
            _print_subject(subject, seen)


def _view(
    args: argparse.Namespace, subject: Subject, params: Params, root: Path, scratch: Path
) -> tuple[View, Tokenizer] | str:
    """Return the records as a training reads them, or why there is no such view by the params as they are."""
    from llm.cli import training_view

    records = subject.first.records
    try:
        texts = training_view.vocabulary_texts(params, root, subject.kind, records)
        chosen = training_view.choose_tokenizer(
            training_view.with_template(params, args.template), args.tokenizer, texts
        )
        if subject.kind == "instructions":
            training_view.conversation_encoder(chosen)
        return training_view.view(subject.kind, subject.section, records, chosen, scratch), chosen.tokenizer
    except InputError as error:
        if args.tokenizer or args.template:
            raise
        return str(error)


def _print_subject(subject: Subject, seen: tuple[View, Tokenizer] | str) -> None:
    print(visible("\n".join(subject.about)))
    print("\nfirst records:")
    for record in subject.first.records[:3]:
        print_json({key: _shortened(value) for key, value in record.items() if key != "doc"})
    if isinstance(seen, str):
        print(visible(f"\nas the training reads them: not shown ({seen})"))
        effects = []
    else:
        view, tokenizer = seen
        print(f"\n{visible(view.title)}{_legend() if view.shown else ''}")
        for number, shown in enumerate(view.shown, start=1):
            print(f"{number}: {shown.title}\n   {_rendered(shown, tokenizer)}")
        effects = view.effects
    n = len(subject.first.records)
    print(f"\nof {'all' if subject.is_all else 'the first'} {n:,} records:")
    for line in [*effects, *_left_out(subject)]:
        print(f"  {visible(line)}")
    print(f"\nfor params.yaml:\n{visible(subject.params_lines)}")


def _left_out(subject: Subject) -> Iterator[str]:
    """Yield a line for each reason why rows cannot be used."""
    left_out, skipped = subject.first.left_out, subject.section.skip_invalid
    for reason, count in left_out.counts.most_common(5):
        places = ", ".join(left_out.examples[reason][:3]) + (", ..." if count > 3 else "")
        yield f"{count:,} {'row' if count == 1 else 'rows'} besides cannot be used: {reason} ({places})"
    if left_out.counts:
        yield (
            "they are left out, as skip_invalid: true says"
            if skipped
            else "the first of them stops the download stage; skip_invalid: true leaves them out"
        )


def _legend() -> str:
    return f"; {f'{GREEN}green{PLAIN}' if has_colour(sys.stdout) else '[[...]]'} counts in the loss"


def _rendered(shown: Shown, tokenizer: Tokenizer) -> str:
    """Return the tokens of a record, those that count in colour, or between brackets where there is no colour."""
    colour = has_colour(sys.stdout)
    tokens = list(_texts(shown, tokenizer))
    parts = [tokens]
    if len(tokens) > FIRST + LAST:
        parts = [tokens[:FIRST], tokens[-LAST:]]
    between = f" ... {len(tokens) - FIRST - LAST:,} more ... "
    text = between.join(_marked(part, colour) for part in parts)
    return text if not shown.label else f"{text} -> {_marked([(visible(shown.label), True)], colour)}"


def _texts(shown: Shown, tokenizer: Tokenizer) -> Iterator[tuple[str, bool]]:
    """Yield tokens as text, with whether they count; those that are parts of one character come together."""
    held = b""
    for number, counts in zip(shown.ids, shown.counts, strict=True):
        held += tokenizer.decode_bytes([number])
        try:
            text = held.decode()
        except UnicodeDecodeError as error:
            if error.end < len(held) or len(held) > 4:  # no beginning of a character
                text = held.decode(errors="replace")
            else:
                continue
        held = b""
        yield visible(text.replace("\n", "\u23ce")), counts
    if held:
        yield held.decode(errors="replace"), shown.counts[-1]


def _marked(tokens: list[tuple[str, bool]], colour: bool) -> str:
    if colour:
        return f"{DIM}{BETWEEN}{PLAIN}".join(f"{GREEN}{text}{PLAIN}" if counts else text for text, counts in tokens)
    runs: list[tuple[list[str], bool]] = []
    for text, counts in tokens:
        if not runs or runs[-1][1] != counts:
            runs.append(([], counts))
        runs[-1][0].append(text)
    joined = [(BETWEEN.join(texts), counts) for texts, counts in runs]
    return "".join(f"{COUNTS[0]}{text}{COUNTS[1]}" if counts else text for text, counts in joined)


def _shortened(value: Any) -> Any:
    """Return a text, or the messages of a conversation, with the first characters of long texts."""
    if isinstance(value, list):
        return [_shortened(each) for each in value]
    if isinstance(value, Mapping):
        return {key: _shortened(each) for key, each in value.items()}
    return value if not isinstance(value, str) or len(value) <= WIDTH else f"{value[:WIDTH]}..."
