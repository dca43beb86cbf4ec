"""`python -m llm classify`."""

from __future__ import annotations

import argparse
import itertools

from llm.cli.options import add_device, add_model_dir
from llm.cli.terminal import named_texts, print_json

SUMMARY = "label texts"
DESCRIPTION = "Prints a JSON object with text, label and probabilities for each text, one a line."
EXAMPLES = (
    'python -m llm classify models/classifier "You have won a prize!" "See you at six"',
    "python -m llm classify models/classifier - < messages.txt",
)
BATCH_SIZE = 32  # no answer depends on it, only speed and memory


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_dir(parser)
    parser.add_argument(
        "texts",
        nargs="+",
        metavar="TEXT",
        help="a text, or - for the lines of stdin; after -- it may start with a dash",
    )
    add_device(parser)


def run(args: argparse.Namespace) -> None:
    """Print one JSON object for each text."""
    from llm.api import load

    model = load(args.model_dir, device=args.device)
    model.require("classifier")
    texts = named_texts(args.texts)
    while batch := list(itertools.islice(texts, BATCH_SIZE)):
        for text, found in zip(batch, model.classify(batch), strict=True):
            probabilities = {label: round(p, 6) for label, p in found.items()}
            print_json({"text": text, "label": max(found, key=found.__getitem__), "probabilities": probabilities})
