"""`python -m llm probe`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from llm.cli.options import add_device, add_out
from llm.cli.terminal import write_result

SUMMARY = "ask base models what they know without finetuning"
DESCRIPTION = (
    "Prints a JSON object for each model, the smallest first: answers after 0, 1, 4 and 16 examples, cloze, grammar, "
    "bits per byte by position, recited passages. Reads the test split of data/tokens."
)
EXAMPLES = (
    "python -m llm probe models/base",
    "python -m llm probe models/small models/middle models/base --out ladder.json",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model_dirs", type=Path, nargs="+", metavar="MODEL_DIR", help="models of one tokenizer or more")
    parser.add_argument("--tokens", type=Path, default=Path("data/tokens"), metavar="DIR", help="default: data/tokens")
    parser.add_argument("--questions", type=int, default=100, metavar="N", help="of each kind (default: %(default)s)")
    parser.add_argument("--passages", type=int, default=100, metavar="N", help="to continue (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the passages (default: %(default)s)")
    add_device(parser)
    add_out(parser)


def run(args: argparse.Namespace) -> None:
    """Print the figures of all models."""
    from llm.checkpoint.folder import load_checkpoint
    from llm.common.device import pick_device
    from llm.convert.cache import model_folder
    from llm.evaluation.base.probe import probe

    found = {}
    for folder in args.model_dirs:
        checkpoint = load_checkpoint(model_folder(folder), pick_device(args.device))
        found[str(folder)] = probe(checkpoint, args.tokens, args.questions, args.passages, args.seed)
    ladder = dict(sorted(found.items(), key=lambda item: item[1]["parameters"]))
    write_result(json.dumps(ladder, ensure_ascii=False, indent=2) + "\n", args.out)
