"""GPT-2."""

from __future__ import annotations

from typing import Any, ClassVar, Literal, Self

from pydantic import model_validator

from llm.config import GPTConfig, Positive, PositiveFloat
from llm.convert.families.base import GGUF_NAMES, Family, HFConfig, not_in_gguf

CONV1D_WEIGHTS = (".c_attn.weight", ".c_proj.weight", ".c_fc.weight")
QKV = ("blocks.{}.attn.q_proj", "blocks.{}.attn.k_proj", "blocks.{}.attn.v_proj")  # one matrix in all files

HF_NAMES = {
    "tok_emb": "transformer.wte",
    "pos_emb": "transformer.wpe",
    "blocks.{}.norm1": "transformer.h.{}.ln_1",
    **dict.fromkeys(QKV, "transformer.h.{}.attn.c_attn"),
    "blocks.{}.attn.out_proj": "transformer.h.{}.attn.c_proj",
    "blocks.{}.norm2": "transformer.h.{}.ln_2",
    "blocks.{}.ffn.up_proj": "transformer.h.{}.mlp.c_fc",
    "blocks.{}.ffn.down_proj": "transformer.h.{}.mlp.c_proj",
    "final_norm": "transformer.ln_f",
    "lm_head": "lm_head",
}
OPTIONS = {
    "vocab_size": "vocab_size",
    "n_positions": "context_length",
    "n_embd": "emb_dim",
    "n_layer": "n_layers",
    "n_head": "n_heads",
    "layer_norm_epsilon": "norm_eps",
    "tie_word_embeddings": "tie_embeddings",
}
FIXED: dict[str, Any] = {"positions": "learned", "norm": "layernorm", "activation": "gelu", "qk_norm": False}


class GPT2HFConfig(HFConfig):
    """GPT-2's `config.json`."""

    model_type: Literal["gpt2"] = "gpt2"
    vocab_size: Positive = 50257
    n_positions: Positive = 1024
    n_embd: Positive = 768
    n_layer: Positive = 12
    n_head: Positive = 12
    n_inner: Positive | None = None
    activation_function: Literal["gelu_new", "gelu_pytorch_tanh", "gelu_fast"] = "gelu_new"  # one formula, three names
    layer_norm_epsilon: PositiveFloat = 1e-5
    tie_word_embeddings: bool = True
    scale_attn_weights: Literal[True] = True
    scale_attn_by_inverse_layer_idx: Literal[False] = False
    add_cross_attention: Literal[False] = False
    options: ClassVar[dict[str, str]] = OPTIONS

    @model_validator(mode="after")
    def _heads(self) -> Self:
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd {self.n_embd} must be a multiple of n_head {self.n_head}")
        return self

    def gpt_config(self) -> GPTConfig:
        return GPTConfig(
            n_kv_heads=self.n_head,
            head_dim=self.n_embd // self.n_head,
            ffn_dim=self.n_inner or 4 * self.n_embd,
            rope_theta=10000.0,  # unused
            qkv_bias=True,
            bias=True,
            **(self.shared_options() | FIXED),
        )

    @classmethod
    def from_gpt(cls, gpt: GPTConfig) -> Self:
        values = {"model_type": "gpt2", "n_inner": gpt.ffn_dim, "activation_function": "gelu_new"}
        return cls.model_validate(cls.shared_keys(gpt) | values)


class GPT2(Family):
    """GPT-2 (Radford et al. 2019)."""

    model_type = "gpt2"
    hf_class = "GPT2LMHeadModel"
    hf_config = GPT2HFConfig
    hf_names = HF_NAMES
    hf_constants = r"\.attn\.(bias|masked_bias)$"
    conv1d_weights = CONV1D_WEIGHTS
    gguf_arch = "gpt2"
    gguf_names = GGUF_NAMES | {"pos_emb": "position_embd", **dict.fromkeys(QKV, "blk.{}.attn_qkv")}
    fixed = FIXED

    def matches(self, gpt: GPTConfig) -> bool:
        return gpt.positions == "learned"

    def gguf_config(self, gpt: GPTConfig) -> GPTConfig:
        """Return a config as its GGUF file says it: biases are not optional, a missing one is written as 0."""
        said = super().gguf_config(gpt.model_copy(update={"qkv_bias": True, "bias": True, "rope_scaling": None}))
        if gpt.n_heads * gpt.head_dim != gpt.emb_dim:
            raise not_in_gguf(gpt, "head_dim", f"emb_dim / n_heads, {gpt.emb_dim / gpt.n_heads:g}")
        return said
