"""A model's chats in other tools' files: its chat templates, its named tokens and its generation settings."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
from pydantic import Field, ValidationError

from llm.common.errors import InputError
from llm.common.files import read_json_object
from llm.config import NonNegative, NonNegativeFloat, PositiveFloat, Strict, explain
from llm.tokenizer.bpe import END_OF_TEXT, Tokenizer
from llm.tokenizer.own_template import DEFAULT

FETCH_AGAIN = "fetch it again"
TEMPLATE_FILE, TEMPLATE_FOLDER = "chat_template.jinja", "additional_chat_templates"
NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
# Names of tokens that end a model's turn whatever a GGUF file says of them; llama.cpp knows them too.
TURN_ENDS = ("<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|endoftext|>", "<|eom_id|>", "<|end_of_text|>")
GGUF_TOKENS = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
GGUF_SAMPLING = {
    "temperature": "general.sampling.temp",
    "top_k": "general.sampling.top_k",
    "top_p": "general.sampling.top_p",
    "min_p": "general.sampling.min_p",
    "repetition_penalty": "general.sampling.penalty_repeat",
}


class GenerationConfig(Strict):
    """The part of transformers' `generation_config.json` that a model folder keeps; None where it says nothing."""

    bos_token_id: NonNegative | None = None
    eos_token_id: list[NonNegative] | None = None  # each of them ends a text
    pad_token_id: NonNegative | None = None
    do_sample: bool | None = None
    temperature: NonNegativeFloat | None = None
    top_k: NonNegative | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: PositiveFloat | None = None

    def to_hf(self) -> dict[str, Any]:
        """Return the content of a `generation_config.json`."""
        values = self.model_dump(exclude_none=True)
        if len(ends := values.get("eos_token_id", [])) == 1:
            values["eos_token_id"] = ends[0]
        return values


class ChatSource(NamedTuple):
    """Chat templates by name, tokens such as `bos_token` by name, and generation settings, each as the model has it."""

    templates: dict[str, str] | None = None
    special_tokens: dict[str, str] | None = None
    generation: GenerationConfig | None = None


def default_special_tokens(tokenizer: Tokenizer) -> dict[str, str]:
    """Return the named tokens of a tokenizer whose origin names none.

    Texts are not padded with the token that ends an answer where there is another, as usual collators mask all padding.
    """
    eot = tokenizer.eot_token
    pad = END_OF_TEXT if END_OF_TEXT in tokenizer.special_tokens else eot
    return {"bos_token": tokenizer.bos_token or eot, "eos_token": eot, "pad_token": pad}


# ---- transformers ----------------------------------------------------------------------------------------------------


def read_hf_chat(folder: Path) -> ChatSource:
    """Read the chat templates, named tokens and generation settings of transformers' model folder."""
    config = _optional_json(folder / "tokenizer_config.json")
    return ChatSource(_templates(folder, config), _named_tokens(folder, config), _generation(folder))


def _optional_json(path: Path) -> dict[str, Any]:
    return read_json_object(path, FETCH_AGAIN) if path.exists() else {}


def _templates(folder: Path, config: Mapping[str, Any]) -> dict[str, str] | None:
    """Return the files' templates, else those of the config."""
    found = read_template_files(folder)
    if found is not None:
        return found
    stored = config.get("chat_template")
    where = f"{folder / 'tokenizer_config.json'}: chat_template"
    if isinstance(stored, list):
        try:
            stored = {one["name"]: one["template"] for one in stored}
        except (LookupError, TypeError):
            raise InputError(f"{where}: expected names and templates, found {str(stored)[:120]}") from None
    elif stored is not None:
        stored = {DEFAULT: stored}
    for name, text in (stored or {}).items():
        if not isinstance(text, str):
            raise InputError(f"{where}: expected text, found {json.dumps(text)[:120]}")
        check_unicode(where, text)
        check_template_name(where, name)
    return stored or None


def check_unicode(where: str, text: str) -> None:
    """Raise `InputError` for half a surrogate pair, which JSON can hold and UTF-8 cannot."""
    half = re.search("[\ud800-\udfff]", text)
    if half:
        raise InputError(f"{where}: holds half a character (\\u{ord(half[0]):04x}); {FETCH_AGAIN}")


def check_template_name(where: str, name: object) -> None:
    """Raise `InputError` for a name of a template that is no file's."""
    if not isinstance(name, str) or not name or Path(name).name != name or name.startswith("."):
        raise InputError(f"{where}: {str(name)[:60]!r} is no name of a chat template; correct it")


def read_template_files(folder: Path) -> dict[str, str] | None:
    """Read the chat templates that a folder has as files, byte for byte; None without any."""
    paths = {path.stem: path for path in sorted((folder / TEMPLATE_FOLDER).glob("*.jinja"))}
    if (folder / TEMPLATE_FILE).is_file():
        paths[DEFAULT] = folder / TEMPLATE_FILE
    texts = {}
    for name, path in paths.items():
        try:
            texts[name] = path.read_bytes().decode()
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{path}: no chat template in UTF-8 ({error}); {FETCH_AGAIN}") from None
    return texts or None


def template_files(templates: Mapping[str, str]) -> dict[str, bytes]:
    """Return the files of chat templates, by their path in a folder."""
    paths = {name: TEMPLATE_FILE if name == DEFAULT else f"{TEMPLATE_FOLDER}/{name}.jinja" for name in templates}
    return {paths[name]: text.encode() for name, text in templates.items()}


def _named_tokens(folder: Path, config: Mapping[str, Any]) -> dict[str, str] | None:
    listed = _optional_json(folder / "special_tokens_map.json")
    names = {}
    for key in NAMED_TOKENS:
        token = config[key] if key in config else listed.get(key)
        if isinstance(token, dict):
            token = token.get("content")
        if isinstance(token, str) and token:
            check_unicode(f"{folder / 'tokenizer_config.json'}: {key}", token)
            names[key] = token
    return names or None


def _generation(folder: Path) -> GenerationConfig | None:
    """Return the generation settings; transformers takes the ids of `config.json` where there are none."""
    path = folder / "generation_config.json"
    if path.is_file():
        return parse_generation(str(path), read_json_object(path, FETCH_AGAIN))
    path = folder / "config.json"
    ids = ("bos_token_id", "eos_token_id", "pad_token_id")
    content = _optional_json(path)
    return parse_generation(str(path), {key: content[key] for key in ids if key in content})


def parse_generation(where: str, values: Mapping[str, Any]) -> GenerationConfig | None:
    """Return the known ones of other tools' settings; errors name the place."""
    known: dict[str, Any] = {}
    for key in GenerationConfig.model_fields:
        if (value := values.get(key)) is None:
            continue
        if key == "eos_token_id" and not isinstance(value, list):
            value = [value]
        if isinstance(value, int) and not isinstance(value, bool) and key in SAMPLING and key != "top_k":
            value = float(value)
        known[key] = value
    for key in ("bos_token_id", "pad_token_id"):
        if known.get(key) == -1:  # an old way to say none
            del known[key]
    try:
        return GenerationConfig.model_validate(known) if known else None
    except ValidationError as error:
        raise InputError(explain(error, where)) from None


# ---- GGUF ------------------------------------------------------------------------------------------------------------


def gguf_chat(fields: Mapping[str, Any]) -> ChatSource:
    """Return the chat templates, named tokens and generation settings in a GGUF file's metadata."""
    templates = {}
    prefix = "tokenizer.chat_template"
    for key, text in fields.items():
        if (key == prefix or key.startswith(f"{prefix}.")) and isinstance(text, str) and text:
            name = key.removeprefix(prefix).removeprefix(".") or DEFAULT
            check_template_name(key, name)
            templates[name] = text
    tokens: list[str] = fields["tokenizer.ggml.tokens"]
    ids = {name: _token_id(fields, name, tokens) for name in ("bos", "eos", "unknown", "padding", "eot", "eom")}
    special = {key: tokens[number] for key, name in GGUF_TOKENS.items() if (number := ids[name]) is not None}
    by_name = {name: number for number, name in enumerate(tokens) if name in TURN_ENDS}
    ends = [ids["eos"], ids["eot"], ids["eom"], *(by_name[name] for name in TURN_ENDS if name in by_name)]
    values: dict[str, Any] = {
        key: shortest(value) for key, name in GGUF_SAMPLING.items() if (value := fields.get(name)) is not None
    }
    if "temperature" in values:
        values["do_sample"] = values["temperature"] > 0
    values["eos_token_id"] = list(dict.fromkeys(number for number in ends if number is not None)) or None
    return ChatSource(templates or None, special or None, parse_generation("general.sampling", values))


def _token_id(fields: Mapping[str, Any], name: str, tokens: Sequence[str]) -> int | None:
    number = fields.get(f"tokenizer.ggml.{name}_token_id")
    return number if isinstance(number, int) and 0 <= number < len(tokens) else None


def shortest(value: object) -> object:
    """Return the shortest decimal number that a number in half of a double's precision stands for."""
    return float(str(np.float32(value))) if isinstance(value, float) else value


def gguf_chat_fields(chat: ChatSource, tokenizer: Tokenizer, turn_end: int | None) -> dict[str, Any]:
    """Return the metadata that says as much; `turn_end` is the token behind an answer."""
    fields: dict[str, Any] = {}
    for key, name in GGUF_TOKENS.items():
        token = (chat.special_tokens or default_special_tokens(tokenizer)).get(key)
        if token in tokenizer.special_tokens:
            fields[f"tokenizer.ggml.{name}_token_id"] = tokenizer.special_tokens[token]
    if chat.templates is not None:
        for name, text in chat.templates.items():
            fields["tokenizer.chat_template" + ("" if name == DEFAULT else f".{name}")] = text
        if others := [name for name in chat.templates if name != DEFAULT]:
            fields["tokenizer.chat_templates"] = others
        if turn_end is not None:
            fields["tokenizer.ggml.eot_token_id"] = turn_end
    settings = chat.generation
    if settings is not None:
        for key, name in GGUF_SAMPLING.items():
            if (value := getattr(settings, key)) is not None:
                fields[name] = value
        if settings.do_sample is False:
            fields[GGUF_SAMPLING["temperature"]] = 0.0
    return fields
