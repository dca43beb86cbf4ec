"""Phi-3, and Phi-4 of the same form."""

from __future__ import annotations

from typing import Any, ClassVar, Literal, Self

from pydantic import model_validator

from llm.config import GPTConfig, Positive, PositiveFloat
from llm.convert.families.base import GGUF_NAMES, NO_BIASES, not_in_gguf
from llm.convert.families.llama import HF_NAMES, RotaryFamily, RotaryHFConfig

QKV = ("blocks.{}.attn.q_proj", "blocks.{}.attn.k_proj", "blocks.{}.attn.v_proj")  # one matrix in all files
GATE_UP = ("blocks.{}.ffn.gate_proj", "blocks.{}.ffn.up_proj")  # likewise


class Phi3HFConfig(RotaryHFConfig):
    """Phi-3's `config.json`."""

    model_type: Literal["phi3"] = "phi3"
    vocab_size: Positive = 32064
    max_position_embeddings: Positive = 4096
    hidden_size: Positive = 3072
    intermediate_size: Positive = 8192
    rms_norm_eps: PositiveFloat = 1e-5
    sliding_window: Positive | None = None
    original_max_position_embeddings: Positive | None = 4096
    qkv_bias: ClassVar[bool | None] = False
    partial_rotary: ClassVar[bool] = True

    @model_validator(mode="after")
    def _unscaled(self) -> Self:
        rope = self.rope()
        if (rope.rope_type or rope.type or "default") != "default":
            raise ValueError(f"rope_scaling: expected none in phi3, found {rope.rope_type or rope.type}")
        return self

    def default_layer_types(self) -> list[str]:
        return ["sliding_attention"] * self.num_hidden_layers

    @classmethod
    def own_values(cls, gpt: GPTConfig) -> dict[str, Any]:
        factor = (gpt.rotary_dim or gpt.head_dim) / gpt.head_dim
        return {"partial_rotary_factor": factor, "sliding_window": gpt.sliding_window}


class Phi3(RotaryFamily):
    """Phi-3 (Abdin et al. 2024): Llama with fused matrices; a part of each head may be without rotary positions.

    Where the whole head has them, the model is Llama's or Mistral's, and is written as such.
    """

    model_type = "phi3"
    hf_class = "Phi3ForCausalLM"
    hf_config = Phi3HFConfig
    hf_names = (
        HF_NAMES
        | dict.fromkeys(QKV, "model.layers.{}.self_attn.qkv_proj")
        | dict.fromkeys(GATE_UP, "model.layers.{}.mlp.gate_up_proj")
    )
    gguf_arch = "phi3"
    gguf_names = GGUF_NAMES | dict.fromkeys(QKV, "blk.{}.attn_qkv") | dict.fromkeys(GATE_UP, "blk.{}.ffn_up")
    gguf_fixed = NO_BIASES
    gguf_options = ("rotary_dim",)

    def matches(self, gpt: GPTConfig) -> bool:
        return gpt.rotary_dim is not None

    def gguf_config(self, gpt: GPTConfig) -> GPTConfig:
        if gpt.rope_scaling is not None:
            raise not_in_gguf(gpt, "rope_scaling", "none")
        return super().gguf_config(gpt)
