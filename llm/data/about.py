"""The data that a finetuned model learned from, told in its folder by tasks and a few examples."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from pydantic import ValidationError

from llm.common.errors import InputError
from llm.common.files import read_json
from llm.config import Strict, explain
from llm.data.examples import Message, Pair, read_quotable

SHOWN_EXAMPLES = 3  # texts of the training data that a model folder quotes
SHOWN_CHARS = 200
CARD_FILE = "card.json"  # of which it is a part
ABOUT_FILE = "about.json"  # of earlier model folders


class About(Strict):
    """The data that a finetuned model learned from."""

    tasks: dict[str, int]  # instruct: training pairs of each task, the most frequent first
    examples: list[str]  # texts that it was trained on, where reports may show them


def read_about(folder: Path) -> About | None:
    """Read what a model was trained on; None for a folder that does not say it."""
    path = next((path for name in (CARD_FILE, ABOUT_FILE) if (path := folder / name).is_file()), None)
    if path is None:
        return None
    content = read_json(path, "make the model folder again")
    if path.name == CARD_FILE and isinstance(content, dict):
        content = content.get("about")
    try:
        return About.model_validate(content)
    except ValidationError as error:
        raise InputError(explain(error, str(path))) from None


def may_quote(tokens: Path, kind: str) -> bool:
    """Return whether texts of this kind of data may be shown; where nothing says so, they may not."""
    return (tokens / "quotable.json").is_file() and kind in read_quotable(tokens)


def about_messages(messages: Sequence[Message], quotable: bool) -> About:
    """Return the first messages of different labels, where they may be shown."""
    examples = _first_of_each([(m.label, m.text) for m in messages]) if quotable else []
    return About(tasks={}, examples=examples)


def about_pairs(pairs: Sequence[Pair], quotable: bool) -> About:
    """Return the tasks of instruction pairs, and first instructions of different tasks where they may be shown."""
    tasks = dict(Counter(pair.task for pair in pairs if pair.task).most_common())
    texts = [
        (pair.task, f"{pair.instruction}\n{pair.input}" if pair.input else pair.instruction)
        for pair in sorted(pairs, key=lambda pair: bool(pair.messages))  # a last question says little by itself
    ]
    return About(tasks=tasks, examples=_first_of_each(texts) if quotable else [])


def _first_of_each(texts: Sequence[tuple[str, str]]) -> list[str]:
    """Return a few short texts, of different kinds as far as there are several."""
    short = [(kind, text) for kind, text in texts if len(text) <= SHOWN_CHARS]
    first: dict[str, str] = {}
    for kind, text in short:
        first.setdefault(kind, text)
    return list(dict.fromkeys([*first.values(), *(text for _, text in short)]))[:SHOWN_EXAMPLES]
