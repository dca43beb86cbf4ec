"""Gemma 3, its text models."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, model_validator

from llm.common.stored_tensor import StoredTensor
from llm.config import GPTConfig, Layers, Positive, PositiveFloat
from llm.convert.families.base import GGUF_NAMES, NO_BIASES, not_in_gguf
from llm.convert.families.llama import FIXED, HF_NAMES, HFRopeScaling, RotaryFamily, RotaryHFConfig, layer_types
from llm.convert.families.metadata import WINDOW, Metadata

GEMMA_FIXED = FIXED | {"activation": "geglu", "qk_norm": True, "norm_place": "both", "unit_offset_norm": True}
INTERVAL = 6  # every such layer has full attention
LOCAL_THETA = 10000.0
PATTERN, FREQ_BASE_SWA = "attention.sliding_window_pattern", "rope.freq_base_swa"


class GemmaRope(BaseModel):
    """The `rope_parameters` of layers with full attention, and of those with a sliding window."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    full_attention: HFRopeScaling | None = None
    sliding_attention: HFRopeScaling | None = None


class Gemma3HFConfig(RotaryHFConfig):
    """The `config.json` of Gemma 3's text models."""

    model_type: Literal["gemma3_text"] = "gemma3_text"
    vocab_size: Positive = 262208
    max_position_embeddings: Positive = 131072
    hidden_size: Positive = 2304
    intermediate_size: Positive = 9216
    num_hidden_layers: Layers = 26
    num_attention_heads: Positive = 8
    num_key_value_heads: Positive | None = 4
    head_dim: Positive | None = 256
    hidden_act: str | None = None  # type: ignore[assignment]  # hidden_activation says it
    hidden_activation: Literal["gelu_pytorch_tanh", "gelu_new", "gelu_fast"] = "gelu_pytorch_tanh"
    tie_word_embeddings: bool = True
    rope_theta: PositiveFloat = 1000000.0
    rope_local_base_freq: PositiveFloat = LOCAL_THETA
    rope_parameters: GemmaRope | None = None  # type: ignore[assignment]
    query_pre_attn_scalar: Positive = 256
    sliding_window_pattern: Positive = INTERVAL
    final_logit_softcapping: None = None
    attn_logit_softcapping: None = None
    use_bidirectional_attention: Literal[False] | None = False
    fixed: ClassVar[dict[str, Any]] = GEMMA_FIXED

    @model_validator(mode="after")
    def _local_unscaled(self) -> Self:
        local = self._local_rope()
        if (local.rope_type or local.type or "default") != "default":
            raise ValueError("rope_parameters.sliding_attention: only rope_type default is read")
        return self

    def rope(self) -> HFRopeScaling:
        full = (self.rope_parameters or GemmaRope()).full_attention or HFRopeScaling()
        return (
            full if self.rope_scaling is None else self.rope_scaling.model_copy(update={"rope_theta": full.rope_theta})
        )

    def _local_rope(self) -> HFRopeScaling:
        return (self.rope_parameters or GemmaRope()).sliding_attention or HFRopeScaling()

    def default_layer_types(self) -> list[str]:
        full = full_layers(self.num_hidden_layers, self.sliding_window_pattern)
        return ["full_attention" if i in full else "sliding_attention" for i in range(self.num_hidden_layers)]

    def own_options(self) -> dict[str, Any]:
        options: dict[str, Any] = {"embedding_scale": self.hidden_size**0.5}
        if self.query_pre_attn_scalar != self.head_dim:
            options["attention_scale"] = self.query_pre_attn_scalar**-0.5
        if self.window_options():
            rope, local = self.rope(), self._local_rope().rope_theta or self.rope_local_base_freq
            scaled = (rope.rope_type or rope.type or "default") != "default"
            options["local_rope_theta"] = local if scaled or local != (rope.rope_theta or self.rope_theta) else None
        return options

    @classmethod
    def own_values(cls, gpt: GPTConfig) -> dict[str, Any]:
        scalar = gpt.head_dim if gpt.attention_scale is None else round(gpt.attention_scale**-2)
        values: dict[str, Any] = {
            "hidden_act": "gelu_pytorch_tanh",
            "hidden_activation": "gelu_pytorch_tanh",
            "query_pre_attn_scalar": scalar,
            "rope_local_base_freq": gpt.local_rope_theta or gpt.rope_theta,
            "layer_types": layer_types(gpt),
        }
        return values if gpt.sliding_window is None else values | {"sliding_window": gpt.sliding_window}


def full_layers(n_layers: int, interval: int) -> tuple[int, ...]:
    """Return every such layer."""
    return tuple(range(interval - 1, n_layers, interval))


class Gemma3(RotaryFamily):
    """Gemma 3 (Gemma Team 2025): layers with a sliding window and full ones, and norms before and behind them."""

    model_type = "gemma3_text"
    hf_class = "Gemma3ForCausalLM"
    hf_config = Gemma3HFConfig
    hf_names = HF_NAMES | {
        "blocks.{}.post_norm1": "model.layers.{}.post_attention_layernorm",
        "blocks.{}.norm2": "model.layers.{}.pre_feedforward_layernorm",
        "blocks.{}.post_norm2": "model.layers.{}.post_feedforward_layernorm",
    }
    gguf_arch = "gemma3"
    gguf_names = GGUF_NAMES | {
        "blocks.{}.post_norm1": "blk.{}.post_attention_norm",
        "blocks.{}.post_norm2": "blk.{}.post_ffw_norm",
    }
    fixed = GEMMA_FIXED
    gguf_fixed = NO_BIASES
    gguf_options = ("full_layers", "local_rope_theta", "embedding_scale", "attention_scale")
    gguf_keys = (PATTERN, FREQ_BASE_SWA)

    def matches(self, gpt: GPTConfig) -> bool:
        return gpt.norm_place == "both"

    def gguf_offset(self, name: str) -> int:
        return 1 if "norm" in name else 0

    def gpt_config(self, metadata: Metadata, tensors: Mapping[str, StoredTensor]) -> GPTConfig:
        config = super().gpt_config(metadata, tensors)
        return config.model_copy(update=self._unsaid(config, metadata))

    def _unsaid(self, gpt: GPTConfig, metadata: Metadata) -> dict[str, Any]:
        """Return the options that llama.cpp works out of the others."""
        options: dict[str, Any] = {"embedding_scale": gpt.emb_dim**0.5, "attention_scale": attention_scale(gpt)}
        if gpt.sliding_window is not None:
            local = metadata.number(FREQ_BASE_SWA, LOCAL_THETA)
            plain = gpt.rope_scaling is None and local == gpt.rope_theta
            full = full_layers(gpt.n_layers, metadata.size(PATTERN, INTERVAL)) or None
            options |= {"full_layers": full, "local_rope_theta": None if plain else local}
        return options

    def gguf_config(self, gpt: GPTConfig) -> GPTConfig:
        if gpt.embedding_scale != gpt.emb_dim**0.5:
            raise not_in_gguf(gpt, "embedding_scale", f"{gpt.emb_dim**0.5:g}")
        if gpt.attention_scale != attention_scale(gpt):
            raise not_in_gguf(gpt, "attention_scale", str(attention_scale(gpt)))
        if gpt.rope_scaling is not None and gpt.rope_scaling.kind != "linear":
            raise not_in_gguf(gpt, "rope_scaling", "linear")
        if gpt.sliding_window is None:
            return super().gguf_config(gpt)
        if (gpt.full_layers or ()) != full_layers(gpt.n_layers, INTERVAL):
            raise not_in_gguf(gpt, "full_layers", f"every {INTERVAL}th layer")
        if (gpt.local_rope_theta or gpt.rope_theta) != LOCAL_THETA:
            raise not_in_gguf(gpt, "local_rope_theta", f"{LOCAL_THETA:g}")
        super().gguf_config(gpt.model_copy(update={"sliding_window": None}))
        return gpt

    def gguf_fields(self, gpt: GPTConfig) -> dict[str, Any]:
        window = {} if gpt.sliding_window is None else {f"{self.gguf_arch}.{WINDOW}": gpt.sliding_window}
        return super().gguf_fields(gpt) | window


def attention_scale(gpt: GPTConfig) -> float | None:
    """Return llama.cpp's scale: the 27B model, which it knows by its 62 layers, has another one."""
    return (gpt.emb_dim // gpt.n_heads) ** -0.5 if gpt.n_layers == 62 else None
