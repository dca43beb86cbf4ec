"""Qwen3."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from llm.config import GPTConfig, Positive
from llm.convert.families.base import NO_BIASES, not_in_gguf
from llm.convert.families.llama import FIXED, RotaryFamily
from llm.convert.families.qwen2 import QwenHFConfig


class Qwen3HFConfig(QwenHFConfig):
    """Qwen3's `config.json`."""

    model_type: Literal["qwen3"] = "qwen3"
    head_dim: Positive | None = 128
    fixed: ClassVar[dict[str, Any]] = FIXED | {"qk_norm": True}


class Qwen3(RotaryFamily):
    """Qwen3 (Yang et al. 2025): Llama with norms of queries and keys."""

    model_type = "qwen3"
    hf_class = "Qwen3ForCausalLM"
    hf_config = Qwen3HFConfig
    gguf_arch = "qwen3"
    fixed = FIXED | {"qk_norm": True}
    gguf_fixed = NO_BIASES

    def matches(self, gpt: GPTConfig) -> bool:
        return gpt.positions == "rotary" and gpt.qk_norm

    def gguf_config(self, gpt: GPTConfig) -> GPTConfig:
        if gpt.rope_scaling is not None and gpt.rope_scaling.kind == "llama3":
            raise not_in_gguf(gpt, "rope_scaling", "linear or yarn")
        return super().gguf_config(gpt)
