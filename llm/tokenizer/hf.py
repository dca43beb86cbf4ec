"""Hugging Face's tokenizers in and out: `tokenizer.json` and the files beside it.

Byte-level BPE only (GPT-2, SmolLM2, Llama 3, Qwen2.5, Qwen3 and their kin). SentencePiece, Unigram and WordPiece merge
by other rules and are refused. An imported tokenizer gives the ids of the original.

Tokens that were added to a vocabulary never come from text here. transformers and llama.cpp find those that are not
special, such as Qwen's <think>, in any text; transformers the special ones too, unless told `split_special_tokens`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from llm.common.errors import InputError
from llm.common.files import read_json_object, write_atomic
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
from llm.tokenizer.chat_source import default_special_tokens
from llm.tokenizer.pre_tokenizers import DIGIT, GPT2_STEP, PRE_TOKENIZERS, PreTokenizer, pre_tokenizer_of
from llm.tokenizer.prompts import TEMPLATES

FETCH_AGAIN = "fetch it again"


# ---- in --------------------------------------------------------------------------------------------------------------


def read_tokenizer_json(folder: Path) -> ImportedTokenizer:
    """Read the tokenizer and prompt template of a Hugging Face model folder.

    A folder with vocab.json and merges.txt but no tokenizer.json is read as GPT-2's.
    """
    path = folder / "tokenizer.json"
    config = _optional_json(folder / "tokenizer_config.json")
    content = read_json_object(path, FETCH_AGAIN) if path.is_file() else _gpt2_form(folder, config)
    try:
        model = content["model"]
        if model.get("type", "BPE") != "BPE" or model.get("byte_fallback"):
            kind = "BPE of SentencePiece" if model.get("byte_fallback") else model["type"]
            raise InputError(f"{path}: a {kind} tokenizer; only byte-level BPE can be imported exactly")
        for option in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
            if model.get(option):
                raise InputError(f"{path}: model.{option} {model[option]!r} has no place in byte-level BPE")
        vocabulary, names = _vocabulary(path, content, config)
        tokenizer = build_tokenizer(vocabulary)
        if tokenizer.missing_bytes and model.get("unk_token"):
            raise InputError(f"{path}: bytes without a token and an unk_token for them; only the one or the other")
        chat_template = _chat_template_of(folder, config)
    except InputError:
        raise
    except (LookupError, TypeError, AttributeError, ValueError, OverflowError) as error:
        raise InputError(f"{path}: not a tokenizer ({error!r}); fetch it again") from None
    return ImportedTokenizer(tokenizer, *recognize_template(chat_template, tokenizer, names))


def _optional_json(path: Path) -> dict[str, Any]:
    return read_json_object(path, FETCH_AGAIN) if path.exists() else {}


def _gpt2_form(folder: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the tokenizer.json that says the same as GPT-2's two files."""
    vocab, merges = folder / "vocab.json", folder / "merges.txt"
    if not (vocab.is_file() and merges.is_file()):
        more = "; its SentencePiece tokenizer.model cannot be imported" if (folder / "tokenizer.model").exists() else ""
        raise InputError(f"{folder}: no tokenizer.json, and no vocab.json with merges.txt{more}")
    if str(config.get("tokenizer_class", "GPT2Tokenizer")).removesuffix("Fast") != "GPT2Tokenizer":
        raise InputError(
            f"{folder}: a {config['tokenizer_class']} needs its tokenizer.json; save one with transformers"
        )
    try:
        lines = merges.read_text(encoding="utf-8").split("\n")
    except (OSError, ValueError) as error:
        raise InputError(f"{merges}: cannot be read ({error}); fetch it again") from None
    lines = [line for line in lines if line and not line.startswith("#version")]
    pre_tokenizer = {"type": "ByteLevel", "add_prefix_space": config.get("add_prefix_space", False)}
    model = {"vocab": read_json_object(vocab, FETCH_AGAIN), "merges": lines}
    return {"model": model, "pre_tokenizer": pre_tokenizer}


def _vocabulary(path: Path, content: Mapping[str, Any], config: Mapping[str, Any]) -> tuple[Vocabulary, dict[str, str]]:
    """Return what a tokenizer.json describes, and its `eos_token` and `bos_token` by name."""
    model = content["model"]
    ids = {str(name): int(number) for name, number in model["vocab"].items()}
    added = {str(token["content"]): token for token in content.get("added_tokens") or []}
    for number, token in (config.get("added_tokens_decoder") or {}).items():
        added.setdefault(str(token["content"]), {**token, "id": number})
    special = {name: int(token["id"]) for name, token in added.items()}
    names = _named_tokens(path.parent, config, {number: name for name, number in (ids | special).items()})
    adds_bos = config.get("add_bos_token")
    bos_token = _first_token(content.get("post_processor")) if adds_bos is None else None
    if adds_bos:
        bos_token = names.get("bos_token")
    eot_token = names.get("eos_token", END_OF_TEXT)
    for name in (eot_token, bos_token):  # GPT-2's files do not say that it is no ordinary token
        if name is not None and name in ids:
            special.setdefault(name, ids[name])
    vocabulary = Vocabulary(
        where=str(path),
        ids=ids,
        merges=[merge_pair(merge) for merge in model["merges"]],
        special=special,
        pre_tokenizer=_known_pre_tokenizer(path, content.get("pre_tokenizer")),
        ignore_merges=bool(model.get("ignore_merges")),
        nfc=_is_nfc(path, content.get("normalizer")),
        eot_token=eot_token,
        bos_token=bos_token,
        user_defined=[name for name, token in added.items() if not token.get("special", True)],
    )
    return vocabulary, names


def _named_tokens(folder: Path, config: Mapping[str, Any], by_id: Mapping[int, str]) -> dict[str, str]:
    """Return the `eos_token` and the `bos_token`, each from the first file that says it."""
    names = {}
    for key in ("eos_token", "bos_token"):
        for source in (config, _optional_json(folder / "special_tokens_map.json")):
            token = source.get(key)
            if token and key not in names:
                names[key] = str(token["content"] if isinstance(token, dict) else token)
        for file in ("generation_config.json", "config.json"):
            numbers = _optional_json(folder / file).get(f"{key}_id")
            for number in numbers if isinstance(numbers, list) else [numbers]:
                if isinstance(number, int) and number in by_id:
                    names.setdefault(key, by_id[number])
    return names


def _first_token(node: Mapping[str, Any] | None) -> str | None:
    """Return the token that a post_processor puts before every text."""
    if node is None:
        return None
    if node["type"] == "Sequence":
        return next((name for part in node["processors"] if (name := _first_token(part))), None)
    if node["type"] == "TemplateProcessing" and "SpecialToken" in node["single"][0]:
        token = node["special_tokens"][node["single"][0]["SpecialToken"]["id"]]
        return str(token["tokens"][0])
    return None


def _known_pre_tokenizer(path: Path, node: Mapping[str, Any] | None) -> PreTokenizer:
    steps = tuple(_steps(path, node or {"type": "none"}))
    for known in PRE_TOKENIZERS:
        if steps == (*known.steps, ""):
            return known
    if not steps or steps[-1] != "" or "" in steps[:-1]:
        raise InputError(f"{path}: not byte-level: its pre_tokenizer does not end in ByteLevel")
    raise InputError(
        f"{path}: its pre_tokenizer splits a text in a way that is not known here: {short_json(steps[:-1])}"
    )


def _steps(path: Path, node: Mapping[str, Any]) -> Iterable[str]:
    """Yield the expressions of a pre_tokenizer in order, an empty one for the step from characters to bytes."""
    kind = node["type"]
    if kind == "Sequence":
        for part in node["pretokenizers"]:
            yield from _steps(path, part)
    elif kind == "ByteLevel" and not node.get("add_prefix_space"):
        yield from (GPT2_STEP, "") if node.get("use_regex", True) else ("",)
    elif kind == "Digits":
        yield DIGIT if node["individual_digits"] else rf"{DIGIT}+"
    elif kind == "Split" and node["behavior"] == "Isolated" and not node["invert"] and "Regex" in node["pattern"]:
        yield str(node["pattern"]["Regex"])
    else:
        raise InputError(f"{path}: no byte-level BPE that can be imported: its pre_tokenizer has {short_json(node)}")


def _is_nfc(path: Path, node: Mapping[str, Any] | None) -> bool:
    if node is None:
        return False
    if node["type"] == "Sequence":
        return True in {_is_nfc(path, part) for part in node["normalizers"]}  # each is looked at
    if node["type"] != "NFC":
        raise InputError(f"{path}: the normalizer {short_json(node)} is not known here; only NFC is")
    return True


def _chat_template_of(folder: Path, config: Mapping[str, Any]) -> str | None:
    path = folder / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    template = config.get("chat_template")
    if isinstance(template, list):  # several by name
        template = {one["name"]: one["template"] for one in template}.get("default")
    if not isinstance(template, str | None):
        where = folder / "tokenizer_config.json"
        raise InputError(f"{where}: chat_template: expected text, found {short_json(template)}")
    return template


# ---- out -------------------------------------------------------------------------------------------------------------


def write_tokenizer_json(folder: Path, tokenizer: Tokenizer, template: Template | None, system: str | None) -> None:
    """Write the files that transformers' `AutoTokenizer` opens, with the same ids and the same prompts."""
    # eos_token stands between texts, as in training; where a turn ends otherwise, generation_config.json says so.
    special = default_special_tokens(tokenizer)
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": tokenizer.bos is not None,
        "clean_up_tokenization_spaces": False,
        **special,
    }
    if template is not None:
        config["chat_template"] = TEMPLATES[template].jinja(tokenizer, system)
    folder.mkdir(parents=True, exist_ok=True)
    files = {
        "tokenizer.json": _tokenizer_json(tokenizer),
        "tokenizer_config.json": config,
        "special_tokens_map.json": special,
    }
    for name, value in files.items():
        write_atomic(folder / name, json.dumps(value, ensure_ascii=False, indent=1) + "\n")


def _tokenizer_json(tokenizer: Tokenizer) -> dict[str, Any]:
    merges, ignore_merges = merges_of(tokenizer)
    added = [
        {"id": number, "content": name, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
         "special": name not in tokenizer.user_defined}
        for name, number in tokenizer.special_tokens.items()
    ]  # fmt: skip
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    bos = tokenizer.bos_token
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": {"type": "NFC"} if tokenizer.nfc else None,
        "pre_tokenizer": _pre_tokenizer(pre_tokenizer_of(tokenizer), byte_level),
        "post_processor": None if bos is None else _add_bos(bos, tokenizer.special_tokens[bos]),
        "decoder": {**byte_level, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": ignore_merges,
            "vocab": {name: number for number, name in enumerate(token_names(tokenizer)) if name is not None},
            "merges": merges,
        },
    }


def _pre_tokenizer(known: PreTokenizer, byte_level: dict[str, Any]) -> dict[str, Any]:
    *first, last = known.steps
    parts: list[dict[str, Any]] = []
    for step in known.steps:
        if step == DIGIT:
            parts.append({"type": "Digits", "individual_digits": True})
        elif step != GPT2_STEP:
            parts.append({"type": "Split", "pattern": {"Regex": step}, "behavior": "Isolated", "invert": False})
    parts.append({**byte_level, "use_regex": last == GPT2_STEP})
    return {"type": "Sequence", "pretokenizers": parts} if first or last != GPT2_STEP else parts[0]


def _add_bos(name: str, number: int) -> dict[str, Any]:
    bos = {"SpecialToken": {"id": name, "type_id": 0}}
    texts = [{"Sequence": {"id": which, "type_id": i}} for i, which in enumerate("AB")]
    return {
        "type": "TemplateProcessing",
        "single": [bos, texts[0]],
        "pair": [bos, texts[0], bos, texts[1]],
        "special_tokens": {name: {"id": name, "ids": [number], "tokens": [name]}},
    }
