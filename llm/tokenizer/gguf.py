"""The tokenizer inside a GGUF file, in and out."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llm.common.errors import InputError
from llm.common.gguf_header import read_gguf_header
from llm.config import Template
from llm.tokenizer.bpe import END_OF_TEXT, Tokenizer
from llm.tokenizer.build import (
    ImportedTokenizer,
    Vocabulary,
    build_tokenizer,
    merge_pair,
    merges_of,
    recognize_template,
    short_json,
    token_names,
)
from llm.tokenizer.pre_tokenizers import PRE_TOKENIZERS, PreTokenizer, pre_tokenizer_of
from llm.tokenizer.prompts import TEMPLATES

NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5  # types of tokens


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
    pre_tokenizer = _pre_tokenizer(fields)
    tokens, types = _tokens_and_types(fields)
    names = _named_tokens(fields, tokens)
    eot_token = names.get("eos_token", END_OF_TEXT)
    ids: dict[str, int] = {}
    special: dict[str, int] = {}
    for number, (token, type_) in enumerate(zip(tokens, types, strict=True)):
        if type_ == UNUSED:
            continue
        if token in ids:
            raise InputError(f"tokenizer.ggml.tokens: {ids[token]} and {number} are both {token!r}")
        ids[token] = number
        if type_ != NORMAL or token == eot_token:
            special[token] = number
    add_bos = _field(fields, "tokenizer.ggml.add_bos_token", bool, pre_tokenizer.add_bos)
    listed = _field(fields, "tokenizer.ggml.merges", list)
    try:
        merges = [merge_pair(merge) for merge in listed]
    except (ValueError, AttributeError, TypeError):
        raise InputError("tokenizer.ggml.merges: expected pairs of tokens with a space between them") from None
    vocabulary = Vocabulary(
        where="tokenizer.ggml",
        ids=ids,
        merges=merges,
        special=special,
        pre_tokenizer=pre_tokenizer,
        ignore_merges=pre_tokenizer.ignore_merges,
        nfc=pre_tokenizer.nfc,
        eot_token=eot_token,
        bos_token=names.get("bos_token") if add_bos else None,
        user_defined=[name for name, number in special.items() if types[number] == USER_DEFINED],
    )
    tokenizer = build_tokenizer(vocabulary)
    chat_template = _field(fields, "tokenizer.chat_template", str, "") or None
    return ImportedTokenizer(tokenizer, *recognize_template(chat_template, tokenizer, names))


def _field(fields: Mapping[str, Any], key: str, kind: type, default: Any = None) -> Any:
    value = fields.get(key, default)
    if value is not default and not isinstance(value, kind):
        raise InputError(f"{key}: expected {kind.__name__}, found {short_json(value)}")
    if value is None:
        raise InputError(f"{key}: missing, so the file holds no tokenizer that can be read")
    return value


def _pre_tokenizer(fields: Mapping[str, Any]) -> PreTokenizer:
    model = _field(fields, "tokenizer.ggml.model", str)
    if model != "gpt2":
        more = " (SentencePiece)" if model == "llama" else ""
        raise InputError(f"tokenizer.ggml.model: {model}{more}; only byte-level BPE, gpt2, can be imported exactly")
    name = _field(fields, "tokenizer.ggml.pre", str, "default")
    for known in PRE_TOKENIZERS:
        if name in known.gguf_names:
            return known
    names = ", ".join(name for known in PRE_TOKENIZERS for name in known.gguf_names)
    raise InputError(f"tokenizer.ggml.pre: {name} is not known here; known are {names}")


def _tokens_and_types(fields: Mapping[str, Any]) -> tuple[list[str], list[int]]:
    tokens: list[Any] = _field(fields, "tokenizer.ggml.tokens", list)
    types: list[Any] = _field(fields, "tokenizer.ggml.token_type", list, [NORMAL] * len(tokens))
    if not all(isinstance(token, str) for token in tokens) or not all(isinstance(type_, int) for type_ in types):
        raise InputError("tokenizer.ggml.tokens, tokenizer.ggml.token_type: expected strings and integers")
    if len(types) != len(tokens):
        raise InputError(f"tokenizer.ggml.token_type: {len(types)} types for {len(tokens)} tokens")
    return tokens, types


def _named_tokens(fields: Mapping[str, Any], tokens: list[str]) -> dict[str, str]:
    """Return the `eos_token` and the `bos_token`, where the file has them."""
    names = {}
    for name in ("eos", "bos"):
        key = f"tokenizer.ggml.{name}_token_id"
        if key in fields:
            number = _field(fields, key, int)
            if not 0 <= number < len(tokens):
                raise InputError(f"{key}: {number} is none of {len(tokens)} tokens")
            names[f"{name}_token"] = tokens[number]
    return names


def gguf_tokenizer_fields(tokenizer: Tokenizer, template: Template | None, system: str | None) -> dict[str, Any]:
    """Return the metadata with which llama.cpp encodes as we do; it knows `tokenizer.vocab_size` tokens.

    Two differences are llama.cpp's own: characters newer than Unicode 15 are split as unknown ones, and NFC is left
    out.
    """
    pre_tokenizer = pre_tokenizer_of(tokenizer)
    merges, ignore_merges = merges_of(tokenizer)
    if ignore_merges and not pre_tokenizer.ignore_merges:
        raise InputError("tokenizer: it has tokens that no merges make, which llama.cpp cannot use; export to hf")
    names = token_names(tokenizer)
    shown = tokenizer.user_defined
    types = {i: USER_DEFINED if name in shown else CONTROL for name, i in tokenizer.special_tokens.items()}
    fields: dict[str, Any] = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre_tokenizer.gguf_names[0],
        "tokenizer.ggml.tokens": [f"[PAD{i}]" if name is None else name for i, name in enumerate(names)],
        "tokenizer.ggml.token_type": [UNUSED if name is None else types.get(i, NORMAL) for i, name in enumerate(names)],
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.bos_token_id": tokenizer.eot if tokenizer.bos is None else tokenizer.bos,
        "tokenizer.ggml.eos_token_id": tokenizer.eot,
        "tokenizer.ggml.padding_token_id": tokenizer.eot,
        "tokenizer.ggml.add_bos_token": tokenizer.bos is not None,
    }
    if template is not None:
        fields["tokenizer.ggml.eot_token_id"] = TEMPLATES[template].stop_token(tokenizer)
        fields["tokenizer.chat_template"] = TEMPLATES[template].jinja(tokenizer, system)
    return fields
