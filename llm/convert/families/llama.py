"""Llama, and the options that the families derived from it share."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Self

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor

from llm.common.errors import InputError
from llm.common.gguf_header import read_exactly
from llm.common.stored_tensor import StoredTensor
from llm.config import (
    GPTConfig,
    LayerKind,
    Layers,
    NonNegative,
    NonNegativeFloat,
    Positive,
    PositiveFloat,
    RopeScaling,
)
from llm.convert.families.base import ROPE_FREQS, Family, HFConfig
from llm.convert.families.metadata import Metadata, decimal
from llm.model.rotary import rotary_frequencies

RopeType = Literal["default", "linear", "llama3", "yarn"]
OPTIONS = {
    "vocab_size": "vocab_size",
    "max_position_embeddings": "context_length",
    "hidden_size": "emb_dim",
    "num_hidden_layers": "n_layers",
    "num_attention_heads": "n_heads",
    "intermediate_size": "ffn_dim",
    "rms_norm_eps": "norm_eps",
    "tie_word_embeddings": "tie_embeddings",
}
FIXED: dict[str, Any] = {"positions": "rotary", "norm": "rmsnorm", "activation": "swiglu", "qk_norm": False}

HF_NAMES = {
    "tok_emb": "model.embed_tokens",
    "blocks.{}.norm1": "model.layers.{}.input_layernorm",
    "blocks.{}.attn.q_proj": "model.layers.{}.self_attn.q_proj",
    "blocks.{}.attn.k_proj": "model.layers.{}.self_attn.k_proj",
    "blocks.{}.attn.v_proj": "model.layers.{}.self_attn.v_proj",
    "blocks.{}.attn.out_proj": "model.layers.{}.self_attn.o_proj",
    "blocks.{}.attn.q_norm": "model.layers.{}.self_attn.q_norm",
    "blocks.{}.attn.k_norm": "model.layers.{}.self_attn.k_norm",
    "blocks.{}.norm2": "model.layers.{}.post_attention_layernorm",
    "blocks.{}.ffn.gate_proj": "model.layers.{}.mlp.gate_proj",
    "blocks.{}.ffn.up_proj": "model.layers.{}.mlp.up_proj",
    "blocks.{}.ffn.down_proj": "model.layers.{}.mlp.down_proj",
    "final_norm": "model.norm",
    "lm_head": "lm_head",
}


class HFRopeScaling(BaseModel):
    """`rope_scaling`, or since transformers 5 `rope_parameters`."""

    model_config = ConfigDict(frozen=True, extra="allow", strict=True)

    rope_type: RopeType | None = None
    type: RopeType | None = None  # its name before transformers 4.43
    rope_theta: PositiveFloat | None = None
    factor: PositiveFloat | None = None
    original_max_position_embeddings: Positive | None = None
    low_freq_factor: PositiveFloat | None = None
    high_freq_factor: PositiveFloat | None = None
    beta_fast: PositiveFloat | None = None
    beta_slow: PositiveFloat | None = None
    attention_factor: PositiveFloat | None = None
    mscale: NonNegativeFloat | None = None
    mscale_all_dim: NonNegativeFloat | None = None
    truncate: Literal[True] | None = None
    partial_rotary_factor: Annotated[float, Field(gt=0, le=1)] | None = None

    @model_validator(mode="after")
    def _known(self) -> Self:
        if self.model_extra:
            raise ValueError(f"{next(iter(self.model_extra))} is an option that GPT does not have")
        return self

    def rope_scaling(self, original_context_length: int) -> RopeScaling | None:
        """Return the scaling in `GPT`'s words."""
        kind = self.rope_type or self.type or "default"
        if kind == "default":
            return None
        values: dict[str, Any] = {"kind": kind, "factor": self.factor}
        if kind != "linear":
            values["original_context_length"] = original_context_length
        if kind == "llama3":
            values |= {"low_freq_factor": self.low_freq_factor, "high_freq_factor": self.high_freq_factor}
        if kind == "yarn":
            values |= {"beta_fast": self.beta_fast or 32.0, "beta_slow": self.beta_slow or 1.0}
            values["attention_factor"] = self.attention_factor or self._yarn_attention_factor()
        return RopeScaling(**values)

    def _yarn_attention_factor(self) -> float:
        """Return the paper's recommendation for a factor, or a ratio of two where a model says so (DeepSeek)."""

        def recommended(weight: float) -> float:
            return 1.0 + 0.1 * weight * math.log(max(self.factor or 1.0, 1.0))

        if self.mscale and self.mscale_all_dim:
            return recommended(self.mscale) / recommended(self.mscale_all_dim)
        return recommended(1.0)


class RotaryHFConfig(HFConfig):
    """The `config.json` of Llama and of families that differ from it by an option or two, with Llama's defaults."""

    vocab_size: Positive = 32000
    max_position_embeddings: Positive = 2048
    hidden_size: Positive = 4096
    num_hidden_layers: Layers = 32
    num_attention_heads: Positive = 32
    num_key_value_heads: Positive | None = None
    head_dim: Positive | None = None
    intermediate_size: Positive = 11008
    hidden_act: Literal["silu", "swish"] = "silu"  # one function, two names
    rms_norm_eps: PositiveFloat = 1e-6
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    rope_theta: PositiveFloat = 10000.0
    rope_scaling: HFRopeScaling | None = None
    rope_parameters: HFRopeScaling | None = None
    original_max_position_embeddings: Positive | None = None
    partial_rotary_factor: Annotated[float, Field(gt=0, le=1)] = 1.0
    rope_interleaved: Literal[False] = False
    sliding_window: Positive | None = 4096  # of mistral; of qwen where it is switched on
    use_sliding_window: bool = False
    max_window_layers: NonNegative = 28
    layer_types: list[Literal["full_attention", "sliding_attention"]] | None = None

    options: ClassVar[dict[str, str]] = OPTIONS
    fixed: ClassVar[dict[str, Any]] = FIXED
    qkv_bias: ClassVar[bool | None] = None  # None: attention_bias says it, of the layer behind the attention too
    has_mlp_bias: ClassVar[bool] = False  # whether mlp_bias is read
    partial_rotary: ClassVar[bool] = False  # whether partial_rotary_factor may be less than 1

    @model_validator(mode="after")
    def _expressible(self) -> Self:
        rope = self.rope()
        for where, factor in (
            ("partial_rotary_factor", self.partial_rotary_factor),
            ("rope_parameters.partial_rotary_factor", rope.partial_rotary_factor),
        ):
            if factor not in (None, 1) and not self.partial_rotary:
                raise ValueError(f"{where}: expected 1 in {self.model_type}, found {factor}")
        if self.layer_types is not None and len(self.layer_types) != self.num_hidden_layers:
            raise ValueError(f"layer_types: expected {self.num_hidden_layers} of them, found {len(self.layer_types)}")
        return self

    def rope(self) -> HFRopeScaling:
        """Return the parameters of the rotary positions of layers with full attention."""
        return self.rope_scaling or self.rope_parameters or HFRopeScaling()

    def window_options(self) -> dict[str, Any]:
        """Return the options of `GPT` about the sliding window."""
        kinds = self.default_layer_types() if self.layer_types is None else self.layer_types
        if self.sliding_window is None or "sliding_attention" not in kinds:
            return {}
        full = tuple(i for i, kind in enumerate(kinds) if kind == "full_attention")
        return {"sliding_window": self.sliding_window, "full_layers": full or None}

    def default_layer_types(self) -> list[str]:
        """Return the kind of attention of each layer where the file does not list them."""
        return ["full_attention"] * self.num_hidden_layers

    def gpt_config(self) -> GPTConfig:
        rope = self.rope()
        original = self.original_max_position_embeddings or rope.original_max_position_embeddings
        head_dim = self.head_dim or self.hidden_size // self.num_attention_heads
        rotary_dim = int(head_dim * (rope.partial_rotary_factor or self.partial_rotary_factor))
        bias = self.attention_bias and self.qkv_bias is None
        ffn_bias = self.mlp_bias and self.has_mlp_bias
        return GPTConfig(
            n_kv_heads=self.num_key_value_heads or self.num_attention_heads,
            head_dim=head_dim,
            rope_theta=rope.rope_theta or self.rope_theta,
            rope_scaling=rope.rope_scaling(original or self.max_position_embeddings),
            rotary_dim=None if rotary_dim == head_dim else rotary_dim,
            qkv_bias=self.attention_bias if self.qkv_bias is None else self.qkv_bias,
            bias=bias,
            ffn_bias=None if ffn_bias == bias else ffn_bias,
            **(self.shared_options() | self.fixed | self.window_options() | self.own_options()),
        )

    def own_options(self) -> dict[str, Any]:
        """Return the options of `GPT` that only this family has."""
        return {}

    @classmethod
    def from_gpt(cls, gpt: GPTConfig) -> Self:
        values: dict[str, Any] = cls.shared_keys(gpt) | {
            "model_type": cls.model_fields["model_type"].default,
            "num_key_value_heads": gpt.n_kv_heads,
            "head_dim": gpt.head_dim,
            "hidden_act": "silu",
            "rope_theta": gpt.rope_theta,
        }
        if cls.qkv_bias is None:
            values["attention_bias"] = gpt.bias
        if cls.has_mlp_bias:
            values["mlp_bias"] = gpt.bias if gpt.ffn_bias is None else gpt.ffn_bias
        if gpt.rope_scaling is not None:  # as transformers 4 and 5 both read it
            scaling = gpt.rope_scaling.model_dump(exclude_none=True)
            renamed = {"kind": "rope_type", "original_context_length": "original_max_position_embeddings"}
            values["rope_scaling"] = {renamed.get(name, name): value for name, value in scaling.items()}
        return cls.model_validate(values | cls.own_values(gpt))

    @classmethod
    def own_values(cls, gpt: GPTConfig) -> dict[str, Any]:
        """Return the values that only this family has."""
        return {}


class LlamaHFConfig(RotaryHFConfig):
    """Llama's `config.json`."""

    model_type: Literal["llama"] = "llama"
    has_mlp_bias: ClassVar[bool] = True


def layer_types(gpt: GPTConfig) -> list[str]:
    """Return the kind of attention of each layer in transformers' words."""
    windows = (gpt.layer_kind(layer).window for layer in range(gpt.n_layers))
    return ["full_attention" if window is None else "sliding_attention" for window in windows]


class RotaryFamily(Family):
    """Llama's names and options, which all families derived from it have."""

    hf_names = HF_NAMES
    hf_constants = r"\.rotary_emb\.inv_freq$"
    fixed = FIXED


class Llama(RotaryFamily):
    """Llama 2 and 3 (Touvron et al. 2023), SmolLM2, and every rotary config that no other family takes."""

    model_type = "llama"
    hf_class = "LlamaForCausalLM"
    hf_config: ClassVar[type[HFConfig]] = LlamaHFConfig
    gguf_arch = "llama"

    def matches(self, gpt: GPTConfig) -> bool:
        return gpt.positions == "rotary"

    def rotary_heads(self, gpt: GPTConfig, name: str) -> int:
        return gpt.n_heads if ".q_proj." in name else gpt.n_kv_heads if ".k_proj." in name else 0

    def gguf_constants(self, gpt: GPTConfig) -> dict[str, Tensor]:
        """Return the divisors of the frequencies, by which llama.cpp knows the scaling of Llama 3."""
        if gpt.rope_scaling is None or gpt.rope_scaling.kind != "llama3":
            return {}
        return {ROPE_FREQS: _frequency_divisors(gpt)}

    def read_rope_scaling(
        self, metadata: Metadata, tensors: Mapping[str, StoredTensor], gpt: GPTConfig
    ) -> RopeScaling | None:
        scaling, stored = metadata.rope_scaling(gpt.context_length), tensors.get(ROPE_FREQS)
        if stored is None:
            return scaling
        if scaling is not None or stored.dtype != "F32" or stored.shape != (gpt.head_dim // 2,):
            raise metadata.unsupported(f"tensor {ROPE_FREQS} of this type and shape")
        with stored.path.open("rb") as file:
            file.seek(stored.start)
            divisors = torch.from_numpy(np.frombuffer(read_exactly(file, stored.n_bytes), np.float32))  # [D/2]
        scaling = RopeScaling(
            kind="llama3",
            factor=decimal(divisors.max().item()),
            original_context_length=metadata.size("rope.scaling.original_context_length", 8192),  # Llama 3.1 to 3.3
            low_freq_factor=metadata.number("rope.scaling.low_freq_factor", 1.0),
            high_freq_factor=metadata.number("rope.scaling.high_freq_factor", 4.0),
        )
        if not torch.allclose(
            _frequency_divisors(gpt.model_copy(update={"rope_scaling": scaling})), divisors, rtol=1e-4
        ):
            raise InputError(
                f"{metadata.path}: tensor {ROPE_FREQS} is not Llama 3's rope scaling; no other is supported"
            )
        return scaling


def _frequency_divisors(gpt: GPTConfig) -> Tensor:
    """Return the divisor of each rotary pair's frequency, [D/2]."""
    kinds = (LayerKind(None, gpt.rope_theta, scaling) for scaling in (None, gpt.rope_scaling))
    plain, scaled = (rotary_frequencies(kind, gpt.head_dim, torch.device("cpu")) for kind in kinds)
    return plain / scaled
