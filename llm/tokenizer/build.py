"""Tokenizers from another tool's vocabulary and merges, and back.

tiktoken and other tools merge by different rules; `_split_by_merges` decides whether a vocabulary gives the same ids.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import AnyStr, NamedTuple

from llm.common.errors import InputError
from llm.config import Template
from llm.tokenizer.bpe import MAX_VOCAB_SIZE, Form, Tokenizer, bytes_to_unicode
from llm.tokenizer.chat_template import render, render_untrusted
from llm.tokenizer.codecs import BYTE_NAMES, Pieces
from llm.tokenizer.pre_tokenizers import PreTokenizer
from llm.tokenizer.prompts import TEMPLATES

MAX_TOKEN = 1000  # bytes; known tokens have up to 256, and how long one takes to check grows with the square or worse


class ImportedTokenizer(NamedTuple):
    """A tokenizer with the prompt template of its chats."""

    tokenizer: Tokenizer
    template: Template | None  # None: an unknown template, or none at all
    system: str | None  # what the template says as system when nobody says it


class Vocabulary(NamedTuple):
    """A foreign tokenizer as its file describes it; where bytes merge, they are written as GPT-2's characters."""

    where: str  # for messages
    ids: dict[str, int]  # may name the special tokens too
    merges: Sequence[tuple[str, str]]
    special: dict[str, int]
    eot_token: str
    bos_token: str | None
    user_defined: list[str]  # of the special ones, those that any text may hold
    form: Form
    pre_tokenizer: PreTokenizer | None = None  # None: characters merge, not bytes
    ignore_merges: bool = False
    nfc: bool = False


def short_json(value: object) -> str:
    """Return a value of a file for a message."""
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 120 else f"{text[:120]}..."


def merge_pair(merge: str | Sequence[str]) -> tuple[str, str]:
    """Return the two tokens of a merge, written as one text or as a list."""
    left, right = merge.split(" ") if isinstance(merge, str) else merge
    return left, right


def build_tokenizer(vocabulary: Vocabulary) -> Tokenizer:
    """Build the tokenizer with the original's ids; raise `InputError` for a vocabulary that allows none."""
    if vocabulary.pre_tokenizer is None:
        return build_piece_tokenizer(vocabulary)
    where, special = vocabulary.where, vocabulary.special
    _check_ids(vocabulary)
    tokens = _ordinary_tokens(vocabulary)
    pairs = _merged_pairs(vocabulary, tokens)
    made = _split_by_merges(tokens)
    ranks: list[bytes | None] = [None] * (max(tokens, default=-1) + 1)
    for number, token in tokens.items():
        parts = made[token]
        known = parts in pairs.get(number, ()) if len(parts) == 2 else len(token) == 1 or vocabulary.ignore_merges
        if not known:
            raise InputError(f"{where}: no merge makes token {number} {token!r}; such a vocabulary is not known here")
        ranks[number] = token
    pattern, ends = vocabulary.pre_tokenizer.pattern, (vocabulary.eot_token, vocabulary.bos_token)
    return Tokenizer(ranks, pattern, special, *ends, vocabulary.nfc, vocabulary.user_defined, vocabulary.form)


def build_piece_tokenizer(
    vocabulary: Vocabulary, scores: Mapping[str, float] | None = None, split: bool = False
) -> Tokenizer:
    """Build a tokenizer whose characters merge: by scores, the highest first, or else by the list of merges."""
    where, special, ids = vocabulary.where, vocabulary.special, vocabulary.ids
    _check_ids(vocabulary)
    byte_ids = [ids.get(name, ids.get(chr(byte), -1) if byte < 128 else -1) for byte, name in enumerate(BYTE_NAMES)]
    if -1 in byte_ids:
        name = BYTE_NAMES[byte_ids.index(-1)]
        raise InputError(f"{where}: no byte fallback: there is no token {name}; such a vocabulary cannot be imported")
    pieces = {name: number for name, number in ids.items() if name not in special and name not in BYTE_NAMES}
    for name, number in pieces.items():
        if not 0 < len(name) <= MAX_TOKEN:
            raise InputError(f"{where}: token {number} has {len(name):,} characters; damaged: fetch the file again")
    order = _order_of_merges(vocabulary, pieces) if scores is None else _order_of_scores(where, pieces, scores)
    ranks: list[bytes | None] = [None] * (max(pieces.values(), default=-1) + 1)
    for name, number in pieces.items():
        ranks[number] = name.encode()
    form = vocabulary.form._replace(pieces=Pieces(byte_ids, order, split))
    ends = vocabulary.eot_token, vocabulary.bos_token
    return Tokenizer(ranks, "", special, *ends, user_defined=vocabulary.user_defined, form=form)


def _order_of_scores(where: str, pieces: Mapping[str, int], scores: Mapping[str, float]) -> list[int]:
    """Return the ids of the pieces that merges make, the highest score first."""
    ranks: dict[str, int] = {}
    last = None
    for name in sorted((name for name in pieces if len(name) > 1), key=lambda name: (-scores[name], pieces[name])):
        if len(_merge(name, ranks)) == 2:
            if last is not None and scores[last] == scores[name]:
                raise InputError(
                    f"{where}: the pieces {last!r} and {name!r} have the same score {scores[name]:g}, so which merges "
                    "first is not known; take a file made from the model's tokenizer.model"
                )
            ranks[name], last = len(ranks), name
    return [pieces[name] for name in ranks]


def _order_of_merges(vocabulary: Vocabulary, pieces: Mapping[str, int]) -> list[int]:
    """Return the ids of the pieces that a list of merges makes, in its order.

    A merge whose two parts are not those that the merges before it leave of a piece is never used; see
    `_split_by_merges`.
    """
    ranks: dict[str, int] = {}
    for i, (left, right) in enumerate(vocabulary.merges):
        name = left + right
        if not {left, right, name} <= vocabulary.ids.keys():
            raise InputError(
                f"{vocabulary.where}: merge {i} {left} {right} is of tokens that it has not; fetch it again"
            )
        if name in pieces and name not in ranks and _merge(name, ranks) == (left, right):
            ranks[name] = len(ranks)
    return [pieces[name] for name in ranks]


def _check_ids(vocabulary: Vocabulary) -> None:
    """Raise `InputError` for ids out of range or used twice, and for a missing end or bos token."""
    where, special = vocabulary.where, vocabulary.special
    named: dict[int, str] = {}
    for name, number in [*special.items(), *vocabulary.ids.items()]:
        if not 0 <= number < MAX_VOCAB_SIZE:
            raise InputError(f"{where}: token {name!r} has the id {number}; fetch the file again")
        if named.setdefault(number, name) != name:
            raise InputError(f"{where}: {named[number]!r} and {name!r} have the same id {number}; fetch the file again")
        if special.get(name, number) != number:
            raise InputError(f"{where}: {name!r} has the ids {special[name]} and {number}; fetch the file again")
    for key, token in (("eos_token", vocabulary.eot_token), ("bos_token", vocabulary.bos_token)):
        if token is not None and token not in special:
            raise InputError(f"{where}: the {key} {token} is not among its special tokens; name one that is")


def _ordinary_tokens(vocabulary: Vocabulary) -> dict[int, bytes]:
    """Return the bytes of all tokens that are not special, ids ascending."""
    where, byte_of = vocabulary.where, bytes_to_unicode()
    tokens: dict[int, bytes] = {}
    for name, number in sorted(vocabulary.ids.items(), key=lambda item: item[1]):
        if name not in vocabulary.special:
            if not name or not set(name) <= byte_of.keys():
                raise InputError(f"{where}: token {number} {name!r} is not byte-level BPE; only that is known")
            if len(name) > MAX_TOKEN:
                raise InputError(f"{where}: token {number} has {len(name):,} bytes; damaged: fetch the file again")
            tokens[number] = bytes(byte_of[character] for character in name)
    return tokens


def _merged_pairs(vocabulary: Vocabulary, tokens: Mapping[int, bytes]) -> dict[int, set[tuple[bytes, ...]]]:
    """Return the pairs that merge into each token; raise `InputError` unless the ids follow the merges."""
    pairs: dict[int, set[tuple[bytes, ...]]] = {}
    last = -1
    for i, (left, right) in enumerate(vocabulary.merges):
        where = f"{vocabulary.where}: merge {i} {left} {right}"
        numbers = [vocabulary.ids.get(name, -1) for name in (left, right, left + right)]
        if not all(number in tokens for number in numbers):
            raise InputError(f"{where} is of tokens that it has not; fetch it again")
        a, b, number = tokens[numbers[0]], tokens[numbers[1]], numbers[2]
        if number < last:
            raise InputError(f"{where} has a lower id than one before it; that is not known")
        last = number
        pairs.setdefault(number, set()).add((a, b))
    return pairs


def _split_by_merges(tokens: Mapping[int, bytes]) -> dict[bytes, tuple[bytes, ...]]:
    """Return the parts into which the tokens of lower ids merge each token, ids ascending.

    tiktoken merges the neighbours that make the token of the lowest id, whichever two they are. Other tools go through
    a list of pairs. Between two places that no merge has crossed, a text is merged as if it stood alone; so a token of
    which the lower ones leave two parts can only ever be made of these two, and one of which they leave more is never
    made. If the list has each token's two parts, in the order of the ids, both ways give the same.
    """
    made: dict[bytes, tuple[bytes, ...]] = {}
    ranks: dict[bytes, int] = {}
    for number, token in sorted(tokens.items()):
        parts = made[token] = _merge(token, ranks)
        if len(parts) == 2:
            ranks[token] = number
    return made


def _merge(token: AnyStr, ranks: Mapping[AnyStr, int]) -> tuple[AnyStr, ...]:
    """Merge the two neighbours of the lowest rank until none have one (Sennrich et al. 2016), but never all."""
    parts = [token[i : i + 1] for i in range(len(token))]
    found = [ranks.get(left + right, MAX_VOCAB_SIZE) for left, right in pairwise(parts)]  # by the left neighbour
    while len(parts) > 2 and (rank := min(found)) < MAX_VOCAB_SIZE:
        i = found.index(rank)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
        del found[i]
        for left in (i - 1, i):
            if 0 <= left < len(found):
                found[left] = ranks.get(parts[left] + parts[left + 1], MAX_VOCAB_SIZE)
    return tuple(parts)


def token_names(tokenizer: Tokenizer) -> list[str | None]:
    """Return the name of each id in other tools' files, bytes as GPT-2's characters: [vocab_size]."""
    names: list[str | None] = [None] * tokenizer.vocab_size
    if pieces := tokenizer.form.pieces:
        for byte, number in enumerate(pieces.byte_ids):
            names[number] = BYTE_NAMES[byte]
    character_of = {byte: character for character, byte in bytes_to_unicode().items()}
    for number, token in enumerate(tokenizer.ranks):
        if token is not None:
            names[number] = token.decode() if pieces else "".join(character_of[byte] for byte in token)
    for name, number in tokenizer.special_tokens.items():
        names[number] = name
    return names


def piece_merges(tokenizer: Tokenizer) -> list[list[str]]:
    """Return the pair that makes each piece, in the order of merging."""
    ranks: dict[str, int] = {}
    pairs = []
    for number in tokenizer.form.pieces.order if tokenizer.form.pieces else ():
        name = (tokenizer.ranks[number] or b"").decode()
        pairs.append([*_merge(name, ranks)])
        ranks[name] = len(ranks)
    return pairs


def mergeable_without_merge(tokenizer: Tokenizer) -> str | None:
    """Return a piece that two others would make, though no merge of the tokenizer's does."""
    names = [None if token is None else token.decode() for token in tokenizer.ranks]
    order = tokenizer.form.pieces.order if tokenizer.form.pieces else ()
    ranks = {str(names[number]): rank for rank, number in enumerate(order)}
    others = (name for name in names if name is not None and len(name) > 1 and name not in ranks)
    return next((name for name in others if len(_merge(name, ranks)) == 2), None)


def merges_of(tokenizer: Tokenizer) -> tuple[list[str], bool]:
    """Return the pair that makes each token, ids ascending, and whether there are tokens that no pair makes."""
    character_of = {byte: character for character, byte in bytes_to_unicode().items()}
    made = _split_by_merges({number: token for number, token in enumerate(tokenizer.ranks) if token is not None})
    pairs = [parts for parts in made.values() if len(parts) == 2]
    merges = [" ".join("".join(character_of[byte] for byte in part) for part in parts) for parts in pairs]
    return merges, any(len(parts) > 2 for parts in made.values())


def recognize_template(
    source: str | None, tokenizer: Tokenizer, names: Mapping[str, str]
) -> tuple[Template | None, str | None]:
    """Return the template with the prompt of a chat template, and the system text in it.

    The chat template is asked for a prompt of one question. Where none of ours can say the same, the markers in it
    decide, and there is no system text.
    """
    if source is None:
        return None, None
    question, here = "How are you?", "\0"
    found = render_untrusted(source, question, names) or ""
    for name, template in TEMPLATES.items():
        if found == render(template.jinja(tokenizer, None), question, names):
            return name, None
        if template.has_system:
            head, tail = render(template.jinja(tokenizer, here), question, names).split(here)
            system = found.removeprefix(head).removesuffix(tail)
            if found == head + system + tail and not any(special in system for special in tokenizer.special_tokens):
                return name, system
    return next((name for name, template in TEMPLATES.items() if template.marker in source), None), None
