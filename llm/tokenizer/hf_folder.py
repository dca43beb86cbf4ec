"""The files beside a Hugging Face vocabulary, read as transformers 5 reads them: names, added tokens, class.

transformers opens a folder with one of its tokenizer classes. Where there is a tokenizer.json, its post-processor alone
says which tokens stand around a text; `add_bos_token` and `add_eos_token` count where there is none.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from llm.common.errors import InputError
from llm.common.files import read_json_object
from llm.tokenizer.added import FLAGS

Json = Mapping[str, Any]
FETCH_AGAIN = "fetch it again"
GENERIC = "TokenizersBackend"  # opens a tokenizer.json as it is
GENERIC_NAMES = (GENERIC, "PreTrainedTokenizer", "PreTrainedTokenizerFast", "PythonBackend")
GEMMA, LLAMA, QWEN2, QWEN3_5 = "GemmaTokenizer", "LlamaTokenizer", "Qwen2Tokenizer", "Qwen3_5Tokenizer"
GPT2, GPT_NEOX = "GPT2Tokenizer", "GPTNeoXTokenizer"
CLASS_OF_MODEL = {
    **dict.fromkeys(("gemma", "gemma2", "gemma3", "gemma3_text"), GEMMA),
    **dict.fromkeys(("gpt2", "phi"), GPT2),
    **dict.fromkeys(("gpt_neox", "olmo"), GPT_NEOX),
    **dict.fromkeys(("qwen2", "qwen3"), QWEN2),
    **dict.fromkeys(("qwen3_5", "qwen3_5_text"), QWEN3_5),
    **dict.fromkeys(("mistral", "ministral", "mixtral", "olmo2", "phi3"), GENERIC),
}
OWN_CLASS = ("phi3", "qwen2", "qwen3_5")  # models whose folders often name another class than the right one
# Names that a class has where no file says any.
CLASS_NAMES: dict[str, dict[str, str]] = {
    GEMMA: {"bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>", "pad_token": "<pad>"},
    LLAMA: {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"},
    GPT2: dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>"),
    GPT_NEOX: dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>"),
    QWEN2: dict.fromkeys(("eos_token", "unk_token", "pad_token"), "<|endoftext|>"),
    QWEN3_5: dict.fromkeys(("eos_token", "unk_token", "pad_token"), "<|endoftext|>"),
}


def optional_json(path: Path) -> dict[str, Any]:
    return read_json_object(path, FETCH_AGAIN) if path.exists() else {}


class HFFolder:
    """A folder of transformers, without its vocabulary."""

    def __init__(self, path: Path, content: Json | None) -> None:
        """Read the folder's small files; `content` is its tokenizer.json, if there is one."""
        self.path, self._content = path, content
        self.config = optional_json(path / "tokenizer_config.json")
        self._model = optional_json(path / "config.json")
        self._map: Json = optional_json(path / "special_tokens_map.json")

    @cached_property
    def class_name(self) -> str | None:
        """The name of the tokenizer class that transformers opens; None where no file says."""
        named = self.config.get("tokenizer_class") or self._model.get("tokenizer_class")
        named = str(named).removesuffix("Fast") if named else None
        if named in GENERIC_NAMES:
            named = GENERIC
        model = str(self._model.get("model_type"))
        registered = CLASS_OF_MODEL.get(model)
        if named is None or registered is None or named == registered:
            found = named or registered
        elif registered == GENERIC:
            found = GENERIC
        else:
            found = registered if model in OWN_CLASS else named
        parts = [(self._content or {}).get(key) for key in ("pre_tokenizer", "decoder")]
        byte_level = "ByteLevel" in json.dumps(parts)
        return GENERIC if found == LLAMA and byte_level else found

    def added_tokens(self) -> dict[str, dict[str, Any]]:
        """Return the added tokens by name: id, special and flags, each from the file that transformers prefers."""
        found: dict[str, dict[str, Any]] = {}
        decoder = self.config.get("added_tokens_decoder")
        special = self._special_names()
        if decoder is None:
            for name, number in optional_json(self.path / "added_tokens.json").items():
                found[name] = {"id": number, "special": name in special, "normalized": name not in special}
        for token in (self._content or {}).get("added_tokens") or []:
            found[str(token["content"])] = {**token}
        for number, token in (decoder or {}).items():
            name = str(token["content"])
            of_json = found.get(name, {"id": number})
            is_special = bool(of_json.get("special")) or bool(token.get("special"))
            found[name] = {**token, "id": of_json["id"], "special": is_special}
        for name in found.keys() & special:
            found[name]["special"] = True
        for token in found.values():
            token.setdefault("special", False)
            token.setdefault("normalized", not token["special"])
        return found

    def flags(self, added: Mapping[str, Json]) -> dict[str, list[str]]:
        """Return the flags of the added tokens that have any."""
        found = {name: [flag for flag in FLAGS if token.get(flag)] for name, token in added.items()}
        return {name: flags for name, flags in found.items() if flags}

    def _special_names(self) -> set[str]:
        """Return the tokens that transformers makes special because a file or the class names them."""
        found = {*CLASS_NAMES.get(self.class_name or GENERIC, {}).values()}
        for source in self._sources():
            for key, value in source.items():
                if key.endswith("_token"):
                    found |= {*_names([value])}
                elif key in ("extra_special_tokens", "additional_special_tokens"):
                    found |= {*_names(value.values() if isinstance(value, dict) else value or [])}
        return found

    def special_in_vocabulary(self, ids: Mapping[str, int], merges: Iterator[str]) -> set[str]:
        """Return the named tokens that lie in the vocabulary itself and that no merge makes."""
        found = {name for name in self._special_names() & ids.keys() if len(name) > 1}
        return found - {*merges} if found else found

    def _sources(self) -> tuple[Json, Json]:
        """Return the files that name tokens, the more important one first."""
        return (self.config, self._map) if "added_tokens_decoder" in self.config else (self._map, self.config)

    def named_tokens(self, by_id: Mapping[int, str]) -> dict[str, str]:
        """Return the `eos_token` and the `bos_token`, each from the first file that says it, or else its class's."""
        names: dict[str, str] = {}
        for key in ("eos_token", "bos_token"):
            for source in self._sources():
                for name in _names([source.get(key)]):
                    names.setdefault(key, name)
            for file in ("generation_config.json", "config.json"):
                numbers = optional_json(self.path / file).get(f"{key}_id")
                for number in numbers if isinstance(numbers, list) else [numbers]:
                    if isinstance(number, int) and number in by_id:
                        names.setdefault(key, by_id[number])
            default = CLASS_NAMES.get(self.class_name or GENERIC, {}).get(key)
            if default is not None and default in by_id.values():
                names.setdefault(key, default)
        return names

    def around(self, names: Mapping[str, str], by_id: Mapping[int, str]) -> tuple[str | None, str | None]:
        """Return the tokens that transformers puts before and behind each text."""
        if self._content is not None:
            if self.class_name == GPT_NEOX:  # it makes its own
                return None, None
            return _around(self.path / "tokenizer.json", self._content.get("post_processor"), by_id)
        wanted = {key: self.config.get(f"add_{key}") for key in ("bos_token", "eos_token")}
        first, last = (names.get(key) if value else None for key, value in wanted.items())
        return first, last


def _names(values: Any) -> Iterator[str]:
    for value in values:
        if isinstance(value, dict) and isinstance(value.get("content"), str):
            yield value["content"]
        elif isinstance(value, str) and value:
            yield value


def _around(path: Path, node: Json | None, by_id: Mapping[int, str]) -> tuple[str | None, str | None]:
    """Return the tokens that a post_processor puts before and behind a text."""
    firsts: list[str] = []
    lasts: list[str] = []
    for part in _processors(node):
        if part["type"] in ("BertProcessing", "RobertaProcessing"):
            firsts.append(str(part["cls"][0]))
            lasts.append(str(part["sep"][0]))
        elif part["type"] == "TemplateProcessing":
            at = next(i for i, piece in enumerate(part["single"]) if "Sequence" in piece)
            for names, pieces in ((firsts, part["single"][:at]), (lasts, part["single"][at + 1 :])):
                for piece in pieces:
                    names += [by_id[number] for number in part["special_tokens"][piece["SpecialToken"]["id"]]["ids"]]
        elif part["type"] != "ByteLevel":
            raise InputError(f"{path}: the post_processor {part['type']} is not known here")
    if len(firsts) > 1 or len(lasts) > 1:
        raise InputError(f"{path}: its post_processor puts several tokens before or behind a text; one is known here")
    return firsts[0] if firsts else None, lasts[0] if lasts else None


def _processors(node: Json | None) -> Iterator[Json]:
    if node is not None and node["type"] == "Sequence":
        for part in node["processors"]:
            yield from _processors(part)
    elif node is not None:
        yield node
