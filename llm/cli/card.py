"""`python -m llm card`."""

from __future__ import annotations

import argparse
import json
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from llm.common.errors import InputError
from llm.common.sanitize import visible

if TYPE_CHECKING:
    from llm.checkpoint.card import Card

SUMMARY = "show where a model comes from, and check it"
DESCRIPTION = (
    "Prints the lineage card of a model folder or an export: base, data with licences and digests, params, commit, "
    "figures. --verify computes every digest again that is still at hand: weights, tokenizer, base, data files, "
    "params, dvc.lock. Exit status: 0, or 3 where something changed."
)
EXAMPLES = (
    "python -m llm card models/classifier",
    "python -m llm card models/classifier --verify",
    "python -m llm card model.gguf --json",
)
CHANGED = 3  # exit status


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", type=Path, metavar="MODEL", help="a model folder, an exported folder or a .gguf file")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--verify", action="store_true", help="check every digest that is at hand")


def run(args: argparse.Namespace) -> int:
    """Print a card, or the checks of its digests; return 3 where one of them fails."""
    from llm.checkpoint.card import to_json
    from llm.checkpoint.readme import readme

    card = read(args.model)
    if args.verify:
        return verify(args.model, card, args.json)
    text = to_json(card) if args.json else readme(card, args.model.resolve().name).split("---\n", 2)[2].lstrip()
    print(visible(text), end="")
    return 0


def read(place: Path) -> Card:
    """Return the card of a model folder, of an export or in a GGUF file."""
    from llm.checkpoint.card import read_card
    from llm.convert.gguf_card import read_gguf_card
    from llm.release.lineage import lineage

    card = read_gguf_card(place) if place.is_file() else read_card(place)
    if card is None or (card.model is None and place.is_dir()):  # no export
        if not (place / "config.json").is_file():
            raise InputError(f"{place}: no card in it (expected a model folder or an export of one); name another")
        return lineage(place)
    return card


def verify(place: Path, card: Card, as_json: bool) -> int:
    """Print the checks of all that a card states; return the exit status."""
    from llm.convert.gguf_card import is_unchanged
    from llm.release.verify import Check, verify

    checks = verify(place, card)
    if place.is_file():
        checks.insert(0, Check(f"file {place.name}", "unchanged" if is_unchanged(place) else "changed"))
    elif not (place / "card.json").is_file():
        raise InputError(f"{place}: no card.json, so nothing to check; an earlier version made it: train it again")
    if as_json:
        print(json.dumps([check._asdict() for check in checks], indent=2, ensure_ascii=False))
    else:
        for check in checks:
            print(visible(f"{check.state}: {check.what}" + (f" ({check.reason})" if check.reason else "")))
        counts = Counter(check.state for check in checks)
        print("; ".join(f"{counts[state]} {state}" for state in ("unchanged", "changed", "not at hand")))
    return CHANGED if any(check.state == "changed" for check in checks) else 0
