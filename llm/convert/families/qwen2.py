"""Qwen2 and Qwen2.5."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from llm.common.errors import InputError
from llm.config import GPTConfig, Positive
from llm.convert.families.llama import RotaryFamily, RotaryHFConfig, layer_types
from llm.tokenizer.bpe import Tokenizer


class QwenHFConfig(RotaryHFConfig):
    """The `config.json` that Qwen2 and Qwen3 share: its defaults, and its sliding window."""

    vocab_size: Positive = 151936
    max_position_embeddings: Positive = 32768
    intermediate_size: Positive = 22016
    num_key_value_heads: Positive | None = 32

    def default_layer_types(self) -> list[str]:
        n = self.num_hidden_layers
        full = min(n, self.max_window_layers) if self.use_sliding_window else n
        return ["full_attention"] * full + ["sliding_attention"] * (n - full)

    @classmethod
    def own_values(cls, gpt: GPTConfig) -> dict[str, Any]:
        if gpt.sliding_window is None:
            return {}
        windows = {"use_sliding_window": True, "sliding_window": gpt.sliding_window, "max_window_layers": 0}
        return windows | ({} if gpt.full_layers is None else {"layer_types": layer_types(gpt)})


class Qwen2HFConfig(QwenHFConfig):
    """Qwen2's `config.json`."""

    model_type: Literal["qwen2"] = "qwen2"
    qkv_bias: ClassVar[bool | None] = True


class Qwen2(RotaryFamily):
    """Qwen2 and Qwen2.5 (Yang et al. 2024): Llama with biases for queries, keys and values."""

    model_type = "qwen2"
    hf_class = "Qwen2ForCausalLM"
    hf_config = Qwen2HFConfig
    gguf_arch = "qwen2"
    gguf_fixed: ClassVar[dict[str, Any]] = {"ffn_bias": None}

    def matches(self, gpt: GPTConfig) -> bool:
        return gpt.positions == "rotary" and gpt.qkv_bias and not gpt.bias

    def matches_gguf(self, gpt: GPTConfig) -> bool:
        llama3 = gpt.rope_scaling is not None and gpt.rope_scaling.kind == "llama3"
        return self.matches(gpt) and gpt.n_heads * gpt.head_dim == gpt.emb_dim and not llama3

    def check_tokenizer(self, tokenizer: Tokenizer) -> None:
        """Raise `InputError` for any but Qwen's: beside a qwen2 transformers 5 splits a text as Qwen does."""
        if not tokenizer.nfc:
            raise InputError(
                "qkv_bias without bias is the form of Qwen2, with which transformers uses no tokenizer but Qwen's; "
                "train with both or neither, or export to gguf"
            )
