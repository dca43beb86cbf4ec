"""Count the texts that are longer than their training reads, and refuse too many of them before any training.

A message is cut at `max_length`. A pair is cut at the context: its answer then lacks its end and the stop token. A
conversation of several turns is cut behind an answer. What has no room for an answer is dropped.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from llm.common.errors import InputError
from llm.common.files import read_json_object
from llm.common.gguf_header import read_gguf_header
from llm.config import SCRATCH, Params
from llm.download.hub import source_files
from llm.preprocess.supervised import SplitRows
from llm.tokenizer.bpe import Tokenizer
from llm.tokenizer.conversation import ConversationEncoder, as_messages


class TooLong(NamedTuple):
    """Records of one split, and those of them that are cut or dropped."""

    records: int
    cut: int
    dropped: int

    @property
    def share(self) -> float:
        return (self.cut + self.dropped) / max(1, self.records)


class Limit(NamedTuple):
    """The number of tokens that a training reads of a text, and the params that say so."""

    tokens: int
    key: str


def context_length(params: Params) -> int | None:
    """Return the context length of the model to finetune, as its config or its GGUF file says; None: it does not."""
    if params.pretrain.init == SCRATCH:
        return params.model.context_length
    path = source_files(params.pretrain.init, weights=False)
    if path.is_file():
        fields = read_gguf_header(path).fields
        length = fields.get(f"{fields.get('general.architecture')}.context_length")
    else:
        config = read_json_object(path / "config.json", "give a folder with config.json")
        for inner in ("gpt", "text_config"):
            config = config[inner] if isinstance(config.get(inner), dict) else config
        names = ("context_length", "max_position_embeddings", "n_positions", "n_ctx")
        length = next((config[name] for name in names if name in config), None)
    return length if isinstance(length, int) and length > 0 else None


def count_messages(split: SplitRows, tokenizer: Tokenizer, limit: Limit) -> dict[str, TooLong]:
    counts = {}
    for name, rows in split.rows.items():
        lengths = [len(tokenizer.encode(row.fields["text"])) for row in rows]
        counts[name] = TooLong(len(rows), sum(length > limit.tokens for length in lengths), 0)
    return counts


def count_pairs(split: SplitRows, encoder: ConversationEncoder, limit: Limit) -> dict[str, TooLong]:
    counts = {}
    for name, rows in split.rows.items():
        cut = dropped = 0
        for number, row in enumerate(rows, 1):
            try:
                whole = encoder.encode_answers(as_messages(row.fields), row.fields.get("tools"))
            except InputError as error:
                raise InputError(
                    f"data.instructions: record {number} of {name}: {error}, or name another finetune_instruct.template"
                ) from None
            found = whole.cut(limit.tokens)
            dropped += found is None
            cut += found is not None and len(found.ids) < len(whole.ids)
        counts[name] = TooLong(len(rows), cut, dropped)
    return counts


def check_lengths(kind: str, counts: Mapping[str, TooLong], limit: Limit, most: float) -> str | None:
    """Return a line on the texts that are too long, if any; raise `InputError` for a share of more than `most`."""
    if not any(count.share for count in counts.values()):
        return None
    line = f"data.{kind}: longer than {limit.key} ({limit.tokens} tokens): {describe(counts)}"
    for name, count in counts.items():
        if count.share > most or (count.records and count.dropped == count.records):
            raise InputError(
                f"{line}; that is {count.share:.1%} of {name} (expected at most {most:.1%}, "
                f"tokenize.max_too_long); raise {limit.key}, take shorter texts or raise tokenize.max_too_long"
            )
    return line


def describe(counts: Mapping[str, TooLong]) -> str:
    """Return the counts in words: `12 of 300 cut, 1 dropped of train; 2 of 20 cut of val`."""
    words = []
    for name, count in counts.items():
        parts = [f"{n:,} {what}" for n, what in ((count.cut, "cut"), (count.dropped, "dropped")) if n]
        if parts:
            words.append(f"{' and '.join(parts)} of {count.records:,} in {name}")
    return "; ".join(words)


def lengths_card(counts: Mapping[str, TooLong], limit: Limit) -> dict[str, Any]:
    """Return the counts for the data card."""
    splits = {name: {"cut": count.cut, "dropped": count.dropped} for name, count in counts.items()}
    return {"limit": limit.tokens, "key": limit.key, "splits": splits}


def too_long_line(kind: str, card: Mapping[str, Any], records: Mapping[str, Mapping[str, int]]) -> str:
    """Return a sentence on the counts of a data card, for readers."""
    counts = {name: TooLong(records[name]["records"], **card["splits"][name]) for name in card["splits"]}
    effect = (
        "A message is read up to there."
        if kind == "messages"
        else "A cut answer lacks its end and its stop token, a cut conversation its last turns; "
        "what has no room for an answer is dropped."
    )
    return f"Longer than the {card['limit']:,} tokens of `{card['key']}`: {describe(counts)}. {effect}"


def finetuning_limits(params: Params) -> tuple[Limit, Limit | None]:
    """Return the limits of messages and of pairs; None for pairs where the context is not known before the import."""
    context = context_length(params)
    key = "model.context_length" if params.pretrain.init == SCRATCH else "the context of pretrain.init"
    most = params.finetune_classify.max_length
    pairs = None if context is None else Limit(context, key)
    messages = pairs if pairs is not None and pairs.tokens < most else Limit(most, "finetune_classify.max_length")
    return messages, pairs
