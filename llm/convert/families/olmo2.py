"""OLMo 2."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from llm.config import GPTConfig, Positive, PositiveFloat
from llm.convert.families.base import GGUF_NAMES, NO_BIASES, not_in_gguf
from llm.convert.families.llama import FIXED, HF_NAMES, RotaryFamily, RotaryHFConfig

OLMO2_FIXED = FIXED | {"qk_norm": True, "joint_qk_norm": True, "norm_place": "after"}
NO_NORMS_BEFORE = ("blocks.{}.norm1", "blocks.{}.norm2")


class Olmo2HFConfig(RotaryHFConfig):
    """OLMo 2's `config.json`."""

    model_type: Literal["olmo2"] = "olmo2"
    vocab_size: Positive = 50304
    rms_norm_eps: PositiveFloat = 1e-5
    fixed: ClassVar[dict[str, Any]] = OLMO2_FIXED


class Olmo2(RotaryFamily):
    """OLMo 2 (OLMo et al. 2024): Llama with norms behind its layers, and one norm of all queries or keys."""

    model_type = "olmo2"
    hf_class = "Olmo2ForCausalLM"
    hf_config = Olmo2HFConfig
    hf_names = {name: theirs for name, theirs in HF_NAMES.items() if name not in NO_NORMS_BEFORE} | {
        "blocks.{}.post_norm1": "model.layers.{}.post_attention_layernorm",
        "blocks.{}.post_norm2": "model.layers.{}.post_feedforward_layernorm",
    }
    gguf_arch = "olmo2"
    gguf_names = {name: theirs for name, theirs in GGUF_NAMES.items() if name not in NO_NORMS_BEFORE} | {
        "blocks.{}.post_norm1": "blk.{}.post_attention_norm",
        "blocks.{}.post_norm2": "blk.{}.post_ffw_norm",
    }
    fixed = OLMO2_FIXED
    gguf_fixed = NO_BIASES

    def matches(self, gpt: GPTConfig) -> bool:
        return gpt.norm_place == "after"

    def gguf_config(self, gpt: GPTConfig) -> GPTConfig:
        if gpt.rope_scaling is not None and gpt.rope_scaling.kind == "llama3":
            raise not_in_gguf(gpt, "rope_scaling", "linear or yarn")
        if gpt.n_heads * gpt.head_dim != gpt.emb_dim:
            raise not_in_gguf(gpt, "head_dim", f"emb_dim / n_heads, {gpt.emb_dim / gpt.n_heads:g}")
        said = super().gguf_config(gpt)
        return said.model_copy(update={"tie_embeddings": False})  # llama.cpp reads no file without a head
