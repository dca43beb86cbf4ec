"""The known families of open weights."""

from __future__ import annotations

from typing import Literal

from llm.common.errors import InputError
from llm.convert.families.base import Family
from llm.convert.families.gpt2 import GPT2
from llm.convert.families.llama import Llama
from llm.convert.families.mistral import Mistral
from llm.convert.families.qwen2 import Qwen2
from llm.convert.families.qwen3 import Qwen3

KEYS = {"model_type": "model_type", "gguf_arch": "general.architecture"}  # in the files
FAMILIES: list[Family] = [GPT2(), Qwen3(), Qwen2(), Mistral(), Llama()]  # the first that matches a config writes it


def family_with(name: Literal["model_type", "gguf_arch"], value: object) -> Family:
    """Return the family of this `model_type` in transformers' config.json, or of this architecture in GGUF."""
    for family in FAMILIES:
        if value is not None and getattr(family, name) == value:
            return family
    known = ", ".join(sorted(each for family in FAMILIES if (each := getattr(family, name))))
    raise InputError(f"{KEYS[name]} {f'{value!r:.80}'} is not known; known are {known}")
