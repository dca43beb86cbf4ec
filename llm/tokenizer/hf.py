"""Hugging Face's tokenizers in and out: `tokenizer.json` and the files beside it.

Byte-level BPE (GPT-2, SmolLM2, Llama 3, Qwen2.5, Qwen3 and their kin) and SentencePiece's BPE (Llama 2, Mistral, Gemma,
Phi-3). Unigram and WordPiece encode by other rules and are refused. An imported tokenizer gives the original's ids.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from llm.common.errors import InputError
from llm.common.files import read_json_object, write_atomic
from llm.config import Template
from llm.tokenizer.bpe import END_OF_TEXT, Form, Tokenizer, read_merges
from llm.tokenizer.build import (
    ImportedTokenizer,
    Vocabulary,
    build_piece_tokenizer,
    build_tokenizer,
    merge_pair,
    merges_of,
    recognize_template,
    short_json,
    token_names,
)
from llm.tokenizer.chat_source import default_special_tokens
from llm.tokenizer.hf_folder import FETCH_AGAIN, GPT2, GPT_NEOX, QWEN2, QWEN3_5, HFFolder
from llm.tokenizer.metaspace import class_form, metaspace_form, metaspace_json
from llm.tokenizer.pre_tokenizers import DIGIT, GPT2_STEP, PRE_TOKENIZERS, PreTokenizer, pre_tokenizer_of
from llm.tokenizer.prompts import TEMPLATES
from llm.tokenizer.sentencepiece_model import FILE_NAME as SENTENCEPIECE_FILE
from llm.tokenizer.sentencepiece_model import read_sentencepiece

# ---- in --------------------------------------------------------------------------------------------------------------


def read_tokenizer_json(path: Path) -> ImportedTokenizer:
    """Read the tokenizer and prompt template of a Hugging Face model folder.

    Without a tokenizer.json it is read from vocab.json and merges.txt, or else from SentencePiece's tokenizer.model.
    """
    file = path / "tokenizer.json"
    content = read_json_object(file, FETCH_AGAIN) if file.is_file() else None
    folder = HFFolder(path, content)
    if content is None and not (path / "vocab.json").is_file() and (path / SENTENCEPIECE_FILE).is_file():
        file = path / SENTENCEPIECE_FILE
    try:
        if file.name == SENTENCEPIECE_FILE:
            tokenizer, names = _of_sentencepiece(file, folder)
        else:
            tokenizer, names = _of_json(file, folder, _slow_form(folder) if content is None else content)
        chat_template = _chat_template_of(path, folder.config)
    except InputError:
        raise
    except (LookupError, TypeError, AttributeError, ValueError, OverflowError, StopIteration) as error:
        raise InputError(f"{file}: not a tokenizer ({error!r}); fetch it again") from None
    return ImportedTokenizer(tokenizer, *recognize_template(chat_template, tokenizer, names))


def _slow_form(folder: HFFolder) -> dict[str, Any]:
    """Return the tokenizer.json that says the same as vocab.json and merges.txt."""
    vocab, merges = folder.path / "vocab.json", folder.path / "merges.txt"
    if not (vocab.is_file() and merges.is_file()):
        raise InputError(
            f"{folder.path}: no tokenizer.json, and no vocab.json with merges.txt, nor a {SENTENCEPIECE_FILE}"
        )
    name = folder.class_name or GPT2
    if name not in (GPT2, GPT_NEOX, QWEN2):
        raise InputError(f"{folder.path}: a {name} needs its tokenizer.json; save one with transformers")
    pre_tokenizer: dict[str, Any] = {"type": "ByteLevel"}
    if name == QWEN2:
        [step] = next(known.steps for known in PRE_TOKENIZERS if "qwen2" in known.gguf_names)
        split = {"type": "Split", "pattern": {"Regex": step}, "behavior": "Isolated", "invert": False}
        pre_tokenizer = {"type": "Sequence", "pretokenizers": [split, {**pre_tokenizer, "use_regex": False}]}
    return {
        "model": {"vocab": read_json_object(vocab, FETCH_AGAIN), "merges": read_merges(merges)},
        "normalizer": None if name == GPT2 else {"type": "NFC"},
        "pre_tokenizer": pre_tokenizer,
    }


def _of_json(path: Path, folder: HFFolder, content: Mapping[str, Any]) -> tuple[Tokenizer, dict[str, str]]:
    """Return the tokenizer of a tokenizer.json, and its `eos_token` and `bos_token` by name."""
    model = content["model"]
    if model.get("type", "BPE") != "BPE":
        raise InputError(
            f"{path}: a {model['type']} tokenizer; only byte-level BPE and SentencePiece's BPE can be imported"
        )
    for option in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(option):
            raise InputError(f"{path}: model.{option} {model[option]!r} has no place in byte-level BPE")
    vocabulary, names = _vocabulary(path, folder, content)
    if model.get("byte_fallback"):
        if model.get("ignore_merges"):
            raise InputError(f"{path}: model.ignore_merges beside byte_fallback is not known here")
        form, split = metaspace_form(path, folder, content)
        vocabulary = vocabulary._replace(form=form._replace(**_ends_and_flags(vocabulary.form)))
        return build_piece_tokenizer(vocabulary, split=split), names
    known, prefix = _known_pre_tokenizer(path, folder, content.get("pre_tokenizer"))
    vocabulary = vocabulary._replace(
        pre_tokenizer=known,
        ignore_merges=bool(model.get("ignore_merges")),
        nfc=_is_nfc(path, content.get("normalizer")),
        form=vocabulary.form._replace(prefix="always" if prefix else "never"),
    )
    tokenizer = build_tokenizer(vocabulary)
    if tokenizer.missing_bytes and model.get("unk_token"):
        raise InputError(f"{path}: bytes without a token and an unk_token for them; only the one or the other")
    return tokenizer, names


def _ends_and_flags(form: Form) -> dict[str, Any]:
    return {"flags": form.flags, "adds_eos": form.adds_eos}


def _of_sentencepiece(path: Path, folder: HFFolder) -> tuple[Tokenizer, dict[str, str]]:
    """Return the tokenizer of a tokenizer.model, and its `eos_token` and `bos_token` by name."""
    model = read_sentencepiece(path)
    content = {
        "model": {"vocab": model.ids, "merges": []},
        "added_tokens": [
            {"content": name, "id": model.ids[name], "special": special, "normalized": False}
            for name, special in model.added.items()
        ],
    }
    vocabulary, names = _vocabulary(path, folder, content, model.names)
    form = class_form(folder)  # a class of transformers does not do what the model says of texts
    if form is None:
        if model.changes_text:
            raise InputError(f"{path}: it {model.changes_text} before encoding; only models that leave a text as it is")
        form = model.form
    vocabulary = vocabulary._replace(form=form._replace(**_ends_and_flags(vocabulary.form)))
    return build_piece_tokenizer(vocabulary, model.scores), names


def _vocabulary(
    path: Path, folder: HFFolder, content: Mapping[str, Any], default_names: Mapping[str, str] | None = None
) -> tuple[Vocabulary, dict[str, str]]:
    """Return the tokens of a tokenizer.json, and its `eos_token` and `bos_token` by name."""
    model = content["model"]
    ids = {str(name): int(number) for name, number in model["vocab"].items()}
    merges = [merge_pair(merge) for merge in model["merges"]]
    added = {token["content"]: token for token in content.get("added_tokens") or []} | folder.added_tokens()
    special = {name: int(token["id"]) for name, token in added.items()}
    for name in folder.special_in_vocabulary(ids, (left + right for left, right in merges)):
        special.setdefault(name, ids[name])
    by_id = {number: name for name, number in (ids | special).items()}
    names = {**(default_names or {}), **folder.named_tokens(by_id)}
    eot_token = names.get("eos_token", END_OF_TEXT)
    bos_token, last_token = folder.around(names, by_id)
    special |= {name: ids[name] for name in (eot_token, bos_token) if name in ids and name not in special}
    if last_token not in (None, eot_token):
        raise InputError(f"{path}: its texts end with {last_token}, which is not the eos_token {eot_token}")
    vocabulary = Vocabulary(
        where=str(path),
        ids=ids,
        merges=merges,
        special=special,
        eot_token=eot_token,
        bos_token=bos_token,
        user_defined=[name for name, token in added.items() if not token["special"]],
        form=Form(flags=folder.flags(added), adds_eos=last_token is not None),
    )
    return vocabulary, names


def _known_pre_tokenizer(path: Path, folder: HFFolder, node: Mapping[str, Any] | None) -> tuple[PreTokenizer, bool]:
    """Return the pre_tokenizer, and whether it puts a space before each text."""
    prefixes: list[bool] = []
    steps = tuple(_steps(path, node or {"type": "none"}, prefixes))
    prefix = any(prefixes)
    if folder.class_name in (GPT2, GPT_NEOX, QWEN2, QWEN3_5):  # classes that go by their own option
        prefix = bool(folder.config.get("add_prefix_space"))
    if prefix and steps != (GPT2_STEP, ""):
        raise InputError(f"{path}: add_prefix_space, and the text is cut before it; that is not known here")
    for known in PRE_TOKENIZERS:
        if steps == (*known.steps, ""):
            return known, prefix
    if not steps or steps[-1] != "" or "" in steps[:-1]:
        raise InputError(f"{path}: not byte-level: its pre_tokenizer does not end in ByteLevel")
    raise InputError(
        f"{path}: its pre_tokenizer splits a text in a way that is not known here: {short_json(steps[:-1])}"
    )


def _steps(path: Path, node: Mapping[str, Any], prefixes: list[bool]) -> Iterable[str]:
    """Yield the expressions of a pre_tokenizer in order, an empty one for the step from characters to bytes."""
    kind = node["type"]
    if kind == "Sequence":
        for part in node["pretokenizers"]:
            yield from _steps(path, part, prefixes)
    elif kind == "ByteLevel":
        prefixes.append(bool(node.get("add_prefix_space")))
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
        **({"add_eos_token": True} if tokenizer.form.adds_eos else {}),
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
    common = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": _added_tokens(tokenizer)}
    if tokenizer.form.pieces is not None:
        return {**common, **metaspace_json(tokenizer), "post_processor": _post_processor(tokenizer)}
    prefix = tokenizer.form.prefix != "never"
    byte_level = {"type": "ByteLevel", "add_prefix_space": prefix, "trim_offsets": True}
    merges, ignore_merges = merges_of(tokenizer)
    return {
        **common,
        "normalizer": {"type": "NFC"} if tokenizer.nfc else None,
        "pre_tokenizer": _pre_tokenizer(pre_tokenizer_of(tokenizer), byte_level),
        "post_processor": _post_processor(tokenizer),
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


def _added_tokens(tokenizer: Tokenizer) -> list[dict[str, Any]]:
    flags, shown = tokenizer.form.flags, tokenizer.user_defined
    order = ("single_word", "lstrip", "rstrip", "normalized")
    return [
        {
            "id": number,
            "content": name,
            **{flag: flag in flags.get(name, ()) for flag in order},
            "special": name not in shown,
        }
        for name, number in tokenizer.special_tokens.items()
    ]


def _post_processor(tokenizer: Tokenizer) -> dict[str, Any] | None:
    """Return the template that puts the tokens around a text, if there are any."""
    first = [] if tokenizer.bos_token is None else [tokenizer.bos_token]
    last = [tokenizer.eot_token] if tokenizer.form.adds_eos else []
    if not first and not last:
        return None
    parts: list[list[dict[str, Any]]] = [
        [{"SpecialToken": {"id": name, "type_id": 0}} for name in names] for names in (first, last)
    ]
    one, other = ({"Sequence": {"id": which, "type_id": i}} for i, which in enumerate("AB"))
    return {
        "type": "TemplateProcessing",
        "single": [*parts[0], one, *parts[1]],
        "pair": [*parts[0], one, *parts[1], *parts[0], other, *parts[1]],
        "special_tokens": {
            name: {"id": name, "ids": [tokenizer.special_tokens[name]], "tokens": [name]} for name in {*first, *last}
        },
    }
