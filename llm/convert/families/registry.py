"""The known families of open weights."""

from __future__ import annotations

from llm.common.errors import InputError
from llm.config import GPTConfig
from llm.convert.families.base import Family
from llm.convert.families.gpt2 import GPT2
from llm.convert.families.llama import Llama
from llm.convert.families.mistral import Mistral
from llm.convert.families.qwen2 import Qwen2
from llm.convert.families.qwen3 import Qwen3

FAMILIES: list[Family] = [GPT2(), Qwen3(), Qwen2(), Mistral(), Llama()]  # the first that matches a config writes it


def family_of_model_type(model_type: object) -> Family:
    """Return the family of a `model_type` in transformers' config.json."""
    for family in FAMILIES:
        if family.model_type == model_type:
            return family
    known = ", ".join(sorted(family.model_type for family in FAMILIES))
    raise InputError(f"model_type {model_type!r} is not known; known are {known}")


def family_of_arch(arch: object) -> Family:
    """Return the family of a `general.architecture` in a GGUF file."""
    for family in FAMILIES:
        if family.gguf_arch is not None and family.gguf_arch == arch:
            return family
    known = ", ".join(sorted(family.gguf_arch for family in FAMILIES if family.gguf_arch))
    raise InputError(f"architecture {f'{arch!r:.80}'} is not supported, only {known}")


def hf_family(gpt: GPTConfig) -> Family:
    """Return the family as which a config is written for transformers."""
    return next(family for family in FAMILIES if family.matches(gpt))


def gguf_family(gpt: GPTConfig) -> Family:
    """Return the family as which a config is written to GGUF."""
    return next(family for family in FAMILIES if family.matches_gguf(gpt))
