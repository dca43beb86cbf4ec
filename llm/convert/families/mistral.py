"""Mistral."""

from __future__ import annotations

from typing import Any, ClassVar, Literal, Self

from pydantic import model_validator

from llm.config import GPTConfig, Positive
from llm.convert.families.llama import RotaryFamily, RotaryHFConfig


class MistralHFConfig(RotaryHFConfig):
    """Mistral's `config.json`."""

    model_type: Literal["mistral"] = "mistral"
    max_position_embeddings: Positive = 131072
    intermediate_size: Positive = 14336
    num_key_value_heads: Positive | None = 8
    qkv_bias: ClassVar[bool | None] = False

    @model_validator(mode="after")
    def _one_kind(self) -> Self:
        if len(set(self.layer_types or ())) > 1:
            raise ValueError("layer_types: transformers' mistral has one kind of attention in all layers")
        return self

    def default_layer_types(self) -> list[str]:
        return ["sliding_attention"] * self.num_hidden_layers

    @classmethod
    def own_values(cls, gpt: GPTConfig) -> dict[str, Any]:
        return {"sliding_window": gpt.sliding_window}


class Mistral(RotaryFamily):
    """Mistral (Jiang et al. 2023): Llama with a sliding window. llama.cpp has it as llama."""

    model_type = "mistral"
    hf_class = "MistralForCausalLM"
    hf_config = MistralHFConfig

    def matches(self, gpt: GPTConfig) -> bool:
        # transformers' Llama refuses such widths
        return gpt.positions == "rotary" and (gpt.sliding_window is not None or gpt.emb_dim % gpt.n_heads != 0)
