"""SentencePiece's BPE in a tokenizer.json: how spaces become U+2581, and which of them are put there."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llm.common.errors import InputError
from llm.tokenizer.bpe import Form, Prefix, Tokenizer
from llm.tokenizer.build import piece_merges, short_json, token_names
from llm.tokenizer.codecs import SPACE_MARK
from llm.tokenizer.hf_folder import GEMMA, LLAMA, HFFolder

PREPEND: dict[str, Any] = {"type": "Prepend", "prepend": SPACE_MARK}
REPLACE: dict[str, Any] = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE_MARK}
SPLIT = {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False}
DECODER = [{**REPLACE, "pattern": {"String": SPACE_MARK}, "content": " "}, {"type": "ByteFallback"}, {"type": "Fuse"}]
STRIP = {"type": "Strip", "content": " ", "start": 1, "stop": 0}


def class_form(folder: HFFolder) -> Form | None:
    """Return the form of a class of transformers that goes by no tokenizer.json; None for the other classes."""
    if folder.class_name == GEMMA:
        return Form()
    if folder.class_name != LLAMA:
        return None
    if folder.config.get("add_prefix_space") is False:
        return Form()
    return Form(prefix="always" if folder.config.get("legacy") else "first", strips_space=True)


def metaspace_form(path: Path, folder: HFFolder, content: Mapping[str, Any]) -> tuple[Form, bool]:
    """Return the form of a tokenizer.json, and whether each space begins a piece of its own."""
    if (form := class_form(folder)) is not None:
        return form, False
    normalizers = _listed(content.get("normalizer"), "normalizers")
    pre_tokenizers = _listed(content.get("pre_tokenizer"), "pretokenizers")
    decoders = _listed(content.get("decoder"), "decoders")
    strips = any(node["type"] == "Strip" and node["content"] == " " and node["start"] > 0 for node in decoders)
    if normalizers and normalizers[-1] == REPLACE and normalizers[:-1] in ([], [PREPEND]):
        if pre_tokenizers in ([], [SPLIT]):  # there is no space left to split at
            return Form(prefix="prepend" if normalizers[:-1] else "never", strips_space=strips), False
    elif not normalizers and len(pre_tokenizers) == 1 and pre_tokenizers[0]["type"] == "Metaspace":
        [node] = pre_tokenizers
        strips |= any(node["type"] == "Metaspace" and _scheme(node) != "never" for node in decoders)
        if node["replacement"] == SPACE_MARK:
            return Form(prefix=_scheme(node), strips_space=strips), bool(node.get("split", True))
    found = short_json({"normalizer": content.get("normalizer"), "pre_tokenizer": content.get("pre_tokenizer")})
    raise InputError(f"{path}: SentencePiece's BPE with a normalizer or pre_tokenizer that is not known here: {found}")


def _listed(node: Mapping[str, Any] | None, key: str) -> list[Mapping[str, Any]]:
    if node is None:
        return []
    return [*node[key]] if node["type"] == "Sequence" else [node]


def _scheme(node: Mapping[str, Any]) -> Prefix:
    schemes: dict[str, Prefix] = {"always": "always", "first": "first", "never": "never"}
    return schemes[node.get("prepend_scheme", "always" if node.get("add_prefix_space", True) else "never")]


def metaspace_json(tokenizer: Tokenizer) -> dict[str, Any]:
    """Return the parts of a tokenizer.json that encode and decode a text."""
    prefix, pieces = tokenizer.form.prefix, tokenizer.form.pieces
    assert pieces is not None
    normalizer: dict[str, Any] | None = None
    pre_tokenizer: dict[str, Any] | None = None
    if prefix == "prepend":
        normalizer = {"type": "Sequence", "normalizers": [PREPEND, REPLACE]}
    elif prefix == "never" and not pieces.split:
        normalizer = REPLACE
    else:
        scheme = {"prepend_scheme": prefix, "split": pieces.split}
        pre_tokenizer = {"type": "Metaspace", "replacement": SPACE_MARK, **scheme}
    return {
        "normalizer": normalizer,
        "pre_tokenizer": pre_tokenizer,
        "decoder": {"type": "Sequence", "decoders": [*DECODER, *([STRIP] if tokenizer.form.strips_space else [])]},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": "<unk>" if "<unk>" in tokenizer.special_tokens else None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": {name: number for number, name in enumerate(token_names(tokenizer)) if name is not None},
            "merges": piece_merges(tokenizer),
        },
    }
