"""The tokenizer inside a GGUF file, in and out."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llm.common.errors import InputError
from llm.common.gguf_header import read_gguf_header
from llm.config import Template
from llm.tokenizer.bpe import END_OF_TEXT, Form, Tokenizer
from llm.tokenizer.build import (
    ImportedTokenizer,
    Vocabulary,
    build_piece_tokenizer,
    build_tokenizer,
    merge_pair,
    mergeable_without_merge,
    merges_of,
    recognize_template,
    short_json,
    token_names,
)
from llm.tokenizer.codecs import BYTE_NAMES
from llm.tokenizer.pre_tokenizers import PRE_TOKENIZERS, PreTokenizer, pre_tokenizer_of
from llm.tokenizer.prompts import TEMPLATES
from llm.tokenizer.sentencepiece_model import BYTE, CONTROL, NORMAL, UNKNOWN, UNUSED, USER_DEFINED

MODELS = ("gpt2", "llama")
UNK = "<unk>"


def read_gguf_tokenizer(path: Path) -> ImportedTokenizer:
    """Read the tokenizer of a GGUF file without the weights; raise `InputError` for one that is missing or unknown."""
    return parse_gguf_tokenizer(path, read_gguf_header(path).fields)


def parse_gguf_tokenizer(path: Path, fields: Mapping[str, Any]) -> ImportedTokenizer:
    """Return the tokenizer of a GGUF file with this metadata; errors name the file."""
    if not isinstance(fields.get("tokenizer.ggml.tokens"), list):
        raise InputError(f"{path}: there is no tokenizer in it (tokenizer.ggml.tokens); take a file of a whole model")
    try:
        return tokenizer_from_gguf(fields)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


def tokenizer_from_gguf(fields: Mapping[str, Any]) -> ImportedTokenizer:
    """Build the tokenizer from a GGUF file's metadata, `tokenizer.*` keys with plain Python values."""
    model = _field(fields, "tokenizer.ggml.model", str)
    if model not in MODELS:
        raise InputError(
            f"tokenizer.ggml.model: {model}; only byte-level BPE (gpt2) and SentencePiece's BPE (llama) can be imported"
        )
    pieces = model == "llama"
    tokens, types = _tokens_and_types(fields)
    names = _named_tokens(fields, tokens, {"bos": 1, "eos": 2} if pieces else {})
    eot_token = names.get("eos_token", END_OF_TEXT)
    ids: dict[str, int] = {}
    special: dict[str, int] = {}
    for number, (token, type_) in enumerate(zip(tokens, types, strict=True)):
        if type_ == UNUSED:
            continue
        if token in ids:
            raise InputError(f"tokenizer.ggml.tokens: {ids[token]} and {number} are both {token!r}")
        ids[token] = number
        if type_ not in (NORMAL, BYTE) or token == eot_token:
            special[token] = number
    pre_tokenizer = None if pieces else _pre_tokenizer(fields, ids)
    add_bos = _field(fields, "tokenizer.ggml.add_bos_token", bool, pre_tokenizer is None or pre_tokenizer.add_bos)
    prefix = pieces and _field(fields, "tokenizer.ggml.add_space_prefix", bool, True)
    vocabulary = Vocabulary(
        where="tokenizer.ggml",
        ids=ids,
        merges=[] if pieces else _merges(fields),
        special=special,
        eot_token=eot_token,
        bos_token=names.get("bos_token") if add_bos else None,
        user_defined=[name for name, number in special.items() if types[number] == USER_DEFINED],
        form=Form(
            adds_eos=_field(fields, "tokenizer.ggml.add_eos_token", bool, False),
            prefix="prepend" if prefix else "never",
            strips_space=prefix,
        ),
        pre_tokenizer=pre_tokenizer,
        ignore_merges=pre_tokenizer is not None and pre_tokenizer.ignore_merges,
        nfc=pre_tokenizer is not None and pre_tokenizer.nfc,
    )
    tokenizer = build_piece_tokenizer(vocabulary, _scores(fields, tokens)) if pieces else build_tokenizer(vocabulary)
    chat_template = _field(fields, "tokenizer.chat_template", str, "") or None
    return ImportedTokenizer(tokenizer, *recognize_template(chat_template, tokenizer, names))


def _merges(fields: Mapping[str, Any]) -> list[tuple[str, str]]:
    listed = _field(fields, "tokenizer.ggml.merges", list)
    try:
        return [merge_pair(merge) for merge in listed]
    except (ValueError, AttributeError, TypeError):
        raise InputError("tokenizer.ggml.merges: expected pairs of tokens with a space between them") from None


def _scores(fields: Mapping[str, Any], tokens: list[str]) -> dict[str, float]:
    scores: list[Any] = _field(fields, "tokenizer.ggml.scores", list)
    if len(scores) != len(tokens) or not all(isinstance(score, int | float) for score in scores):
        raise InputError(f"tokenizer.ggml.scores: expected a number for each of {len(tokens)} tokens")
    return dict(zip(tokens, scores, strict=True))


def _field(fields: Mapping[str, Any], key: str, kind: type, default: Any = None) -> Any:
    value = fields.get(key, default)
    if value is not default and not isinstance(value, kind):
        raise InputError(f"{key}: expected {kind.__name__}, found {short_json(value)}")
    if value is None:
        raise InputError(f"{key}: missing, so the file holds no tokenizer that can be read")
    return value


def _pre_tokenizer(fields: Mapping[str, Any], ids: Mapping[str, int]) -> PreTokenizer:
    """Return the pre-tokenizer that the file names, or else the one of a vocabulary that is known."""
    name = _field(fields, "tokenizer.ggml.pre", str, "")
    for known in PRE_TOKENIZERS:
        if name in known.gguf_names or (not name and any(ids.get(token) == i for token, i in known.vocabulary_signs)):
            return known
    names = ", ".join(name for known in PRE_TOKENIZERS for name in known.gguf_names)
    if name:
        raise InputError(f"tokenizer.ggml.pre: {name} is not known here; known are {names}")
    raise InputError(
        "tokenizer.ggml.pre: missing, and the vocabulary is none that is known, so how a text is cut before merging is "
        f"not known; take a newer file, or set it with gguf-new-metadata --pre-tokenizer to one of {names}"
    )


def _tokens_and_types(fields: Mapping[str, Any]) -> tuple[list[str], list[int]]:
    tokens: list[Any] = _field(fields, "tokenizer.ggml.tokens", list)
    types: list[Any] = _field(fields, "tokenizer.ggml.token_type", list, [NORMAL] * len(tokens))
    if not all(isinstance(token, str) for token in tokens) or not all(isinstance(type_, int) for type_ in types):
        raise InputError("tokenizer.ggml.tokens, tokenizer.ggml.token_type: expected strings and integers")
    if len(types) != len(tokens):
        raise InputError(f"tokenizer.ggml.token_type: {len(types)} types for {len(tokens)} tokens")
    return tokens, types


def _named_tokens(fields: Mapping[str, Any], tokens: list[str], default: Mapping[str, int]) -> dict[str, str]:
    """Return the `eos_token` and the `bos_token`, where the file or llama.cpp has them."""
    names = {}
    for name in ("eos", "bos"):
        key = f"tokenizer.ggml.{name}_token_id"
        if key in fields or name in default:
            number = _field(fields, key, int, default.get(name))
            if not 0 <= number < len(tokens):
                raise InputError(f"{key}: {number} is none of {len(tokens)} tokens")
            names[f"{name}_token"] = tokens[number]
    return names


def gguf_tokenizer_fields(tokenizer: Tokenizer, template: Template | None, system: str | None) -> dict[str, Any]:
    """Return the metadata with which llama.cpp encodes as we do; it knows `tokenizer.vocab_size` tokens.

    Three differences are llama.cpp's own: characters newer than Unicode 15 are split as unknown ones, NFC is left out,
    and SentencePiece's space is put before a text and behind an added token also where one is there.
    """
    _check_flags(tokenizer)
    names = token_names(tokenizer)
    types = _types(tokenizer, names)
    fields: dict[str, Any] = {
        **(_byte_level_fields(tokenizer) if tokenizer.form.pieces is None else _piece_fields(tokenizer, names)),
        "tokenizer.ggml.tokens": [f"[PAD{i}]" if name is None else name for i, name in enumerate(names)],
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.bos_token_id": tokenizer.eot if tokenizer.bos is None else tokenizer.bos,
        "tokenizer.ggml.eos_token_id": tokenizer.eot,
        "tokenizer.ggml.padding_token_id": tokenizer.eot,
        "tokenizer.ggml.add_bos_token": tokenizer.bos is not None,
        **({"tokenizer.ggml.add_eos_token": True} if tokenizer.form.adds_eos else {}),
    }
    if template is not None:
        fields["tokenizer.ggml.eot_token_id"] = TEMPLATES[template].stop_token(tokenizer)
        fields["tokenizer.chat_template"] = TEMPLATES[template].jinja(tokenizer, system)
    return fields


def _check_flags(tokenizer: Tokenizer) -> None:
    """Raise `InputError` for added tokens that llama.cpp would find elsewhere in a user's text."""
    for name in tokenizer.user_defined:
        for flag in ("lstrip", "rstrip", "single_word"):
            if flag in tokenizer.form.flags.get(name, ()):
                raise InputError(f"tokenizer: its token {name!r} has {flag}, which GGUF cannot say; export to hf")


def _types(tokenizer: Tokenizer, names: list[str | None]) -> list[int]:
    added = {i: USER_DEFINED if name in tokenizer.user_defined else CONTROL
             for name, i in tokenizer.special_tokens.items()}  # fmt: skip
    if pieces := tokenizer.form.pieces:
        added |= {i: BYTE for i in pieces.byte_ids if names[i] in BYTE_NAMES}
        if UNK in tokenizer.special_tokens:
            added[tokenizer.special_tokens[UNK]] = UNKNOWN
    return [UNUSED if name is None else added.get(i, NORMAL) for i, name in enumerate(names)]


def _byte_level_fields(tokenizer: Tokenizer) -> dict[str, Any]:
    pre_tokenizer = pre_tokenizer_of(tokenizer)
    merges, ignore_merges = merges_of(tokenizer)
    if ignore_merges and not pre_tokenizer.ignore_merges:
        raise InputError("tokenizer: it has tokens that no merges make, which llama.cpp cannot use; export to hf")
    if tokenizer.form.prefix != "never":
        raise InputError(
            "tokenizer: it puts a space before a text (add_prefix_space), which GGUF cannot say; export to hf"
        )
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre_tokenizer.gguf_names[0],
        "tokenizer.ggml.merges": merges,
    }


def _piece_fields(tokenizer: Tokenizer, names: list[str | None]) -> dict[str, Any]:
    """Return the fields of a vocabulary of pieces: the earlier a piece is merged, the higher its score."""
    pieces = tokenizer.form.pieces
    assert pieces is not None
    if pieces.split or (name := mergeable_without_merge(tokenizer)) is not None:
        what = "its pieces end before each space" if pieces.split else f"no merge makes its piece {name!r}"
        raise InputError(f"tokenizer: {what}, which GGUF cannot say; export to hf")
    unknown = tokenizer.special_tokens.get(UNK)
    scores = [0.0 if i in tokenizer.special_tokens.values() or name is None else -1e6 for i, name in enumerate(names)]
    for rank, number in enumerate(pieces.order):
        scores[number] = -1.0 - rank
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.add_space_prefix": tokenizer.form.prefix != "never",
        **({} if unknown is None else {"tokenizer.ggml.unknown_token_id": unknown}),
    }
