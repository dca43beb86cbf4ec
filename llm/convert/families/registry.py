"""The known families of open weights."""

from __future__ import annotations

import re
from typing import Literal

from llm.common.errors import InputError
from llm.convert.families.base import Family
from llm.convert.families.gemma3_text import Gemma3
from llm.convert.families.gpt2 import GPT2
from llm.convert.families.llama import Llama
from llm.convert.families.mistral import Mistral
from llm.convert.families.olmo2 import Olmo2
from llm.convert.families.phi3 import Phi3
from llm.convert.families.qwen2 import Qwen2
from llm.convert.families.qwen3 import Qwen3
from llm.convert.families.smollm3 import SmolLM3

# What GPT lacks for families that are not known, by expressions for their names; the first that fits counts.
NEEDS = {
    r"qwen3[._-]?5|qwen35|qwen3.?next|kimi.?linear|olmo.?hybrid": "layers of linear attention (gated delta net)",
    r"mamba|jamba|rwkv|falcon.?h1|granite.*hybrid|nemotron.?h|lfm2|recurrent|xlstm|plamo2": "recurrent layers",
    r"moe|mixtral|dbrx|gpt.?oss|deepseek|llama.?4|grok|minimax|glm.?4.?5|ernie4": "a mixture of experts",
    r"gemma2|gemma3n|gemma.?4": "what later Gemmas add: soft-capped logits, or embeddings for each layer",
    r"vl$|vl[._-]|llava|vision|mllama|pixtral|paligemma|idefics|audio|omni|whisper": "inputs other than text",
    r"^gemma3$": "inputs other than text (its text model alone, gemma3_text, is read; so is a GGUF file of it)",
    r"bert|electra|mpnet|nomic|deberta|^clip": "attention in both directions",
    r"t5|bart|pegasus|marian|m2m|nllb": "an encoder beside the decoder",
    r"neox|gpt.?j|^phi-?[2s]?$|phi-msft|falcon|cohere|command.?r|persimmon": "attention beside the feed-forward layer",
    r"bloom|mpt|baichuan": "ALiBi positions",
    r"granite|minicpm": "multipliers of embeddings, residuals and logits",
}
KEYS = {"model_type": "model_type", "gguf_arch": "general.architecture"}  # in the files
PLAIN: list[Family] = [GPT2(), Qwen3(), Qwen2(), Mistral(), Llama()]
WITH_RARE_OPTIONS: list[Family] = [Gemma3(), Olmo2(), Phi3(), SmolLM3()]
FAMILIES = [*WITH_RARE_OPTIONS, *PLAIN]  # the first that matches a config writes it


def family_with(name: Literal["model_type", "gguf_arch"], value: object) -> Family:
    """Return the family of this `model_type` in transformers' config.json, or of this architecture in GGUF."""
    for family in FAMILIES:
        if value is not None and getattr(family, name) == value:
            return family
    names = [sorted(each for one in group if (each := getattr(one, name))) for group in (PLAIN, WITH_RARE_OPTIONS)]
    known = ", ".join(names[0] + names[1])
    needs = next((what for pattern, what in NEEDS.items() if re.search(pattern, str(value), re.IGNORECASE)), None)
    raise InputError(
        f"{KEYS[name]} {f'{value!r:.80}'} is not known; known are {known}"
        + (f". It would need {needs}, which GPT lacks; take a model of a known family" if needs else "")
        + ("" if needs else ". CONTRIBUTING.md says how a family is added; otherwise take a model of a known one")
    )
