"""Names and configs that a family of open weights has in the files of transformers and of llama.cpp."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar, Self

from pydantic import BaseModel, ConfigDict, model_validator
from torch import Tensor

from llm.common.errors import InputError
from llm.common.stored_tensor import StoredTensor
from llm.config import GPTConfig, Positive, RopeScaling
from llm.convert.families.metadata import WINDOW, Metadata, equal_value, rope_fields, shown
from llm.tokenizer.bpe import Tokenizer

ROPE_FREQS = "rope_freqs.weight"  # llama.cpp's, for the rope scaling of Llama 3
SIZES = {
    "block_count": "n_layers",
    "context_length": "context_length",
    "embedding_length": "emb_dim",
    "feed_forward_length": "ffn_dim",
}
NORM_EPS = {"layernorm": "attention.layer_norm_epsilon", "rmsnorm": "attention.layer_norm_rms_epsilon"}
GGUF_NAMES = {
    "tok_emb": "token_embd",
    "blocks.{}.norm1": "blk.{}.attn_norm",
    "blocks.{}.attn.q_proj": "blk.{}.attn_q",
    "blocks.{}.attn.k_proj": "blk.{}.attn_k",
    "blocks.{}.attn.v_proj": "blk.{}.attn_v",
    "blocks.{}.attn.q_norm": "blk.{}.attn_q_norm",
    "blocks.{}.attn.k_norm": "blk.{}.attn_k_norm",
    "blocks.{}.attn.out_proj": "blk.{}.attn_output",
    "blocks.{}.norm2": "blk.{}.ffn_norm",
    "blocks.{}.ffn.gate_proj": "blk.{}.ffn_gate",
    "blocks.{}.ffn.up_proj": "blk.{}.ffn_up",
    "blocks.{}.ffn.down_proj": "blk.{}.ffn_down",
    "final_norm": "output_norm",
    "lm_head": "output",
}


TAKE = "take the model's own weights in bf16, f16 or f32, or a GGUF file of it (F16, Q8_0, Q4_K_M)"
QUANTIZATION = ("quantization_config", "compression_config")


class HFConfig(BaseModel, ABC):
    """The keys of a `config.json` that decide what is computed, with the defaults of transformers' class.

    A key that `GPT` has no option for allows one value only; anything else is an error that names it.
    """

    model_config = ConfigDict(frozen=True, extra="ignore", strict=True)

    vocab_size: Positive
    model_type: str
    options: ClassVar[dict[str, str]]  # keys with the value of an option of GPT

    @model_validator(mode="before")
    @classmethod
    def _plain(cls, content: Any) -> Any:
        """Refuse quantized weights, and take a list of equal numbers, one for each layer, for the number."""
        for key in QUANTIZATION:
            if how := content.get(key):
                method = how.get("quant_method", how.get("bits")) if isinstance(how, dict) else how
                raise ValueError(f"{key}: quantized weights ({shown(method)}) are not read; {TAKE}")
        return {key: equal_value(value) if cls.is_number(key) else value for key, value in content.items()}

    @classmethod
    def is_number(cls, key: str) -> bool:
        """Tell whether a key has one number for all layers."""
        return key in cls.model_fields and "list" not in str(cls.model_fields[key].annotation)

    @abstractmethod
    def gpt_config(self) -> GPTConfig:
        """Return the config of the `GPT` that computes the same."""

    def shared_options(self) -> dict[str, Any]:
        """Return the options of `GPT` that a key says."""
        return {option: getattr(self, key) for key, option in self.options.items()}

    @classmethod
    def shared_keys(cls, gpt: GPTConfig) -> dict[str, Any]:
        """Return the keys that say an option of `GPT`."""
        return {key: getattr(gpt, option) for key, option in cls.options.items()}

    @classmethod
    @abstractmethod
    def from_gpt(cls, gpt: GPTConfig) -> Self:
        """Return the config nearest to that of a `GPT`; `gpt_config` tells whether it is the same."""


NO_BIASES = {"qkv_bias": False, "bias": False, "ffn_bias": None}
# Options of `GPT` that no architecture of llama.cpp has unless its family says so.
RARE = (
    *("full_layers", "local_rope_theta", "nope_layers", "rotary_dim", "joint_qk_norm", "norm_place"),
    *("unit_offset_norm", "embedding_scale", "attention_scale"),
)


class Family(ABC):
    """The names of a family of open weights and its config, both ways.

    `hf_names` and `gguf_names` map modules of `GPT` to tensors, {} standing for the layer. Modules that share a name
    are stacked along their first dimension.
    """

    model_type: ClassVar[str]  # in transformers' config.json
    hf_class: ClassVar[str]  # transformers' class
    hf_config: ClassVar[type[HFConfig]]
    hf_names: ClassVar[dict[str, str]]
    hf_constants: ClassVar[str]  # expression for tensors of old files that are no weights
    conv1d_weights: ClassVar[tuple[str, ...]] = ()  # ends of names stored as [in, out], where nn.Linear has [out, in]
    gguf_arch: ClassVar[str | None] = None  # None: llama.cpp has it under another family's name
    gguf_names: ClassVar[dict[str, str]] = GGUF_NAMES
    fixed: ClassVar[dict[str, Any]]  # options of GPT that have one value in this family
    gguf_fixed: ClassVar[dict[str, Any]] = {}  # options that have one value in llama.cpp only
    gguf_options: ClassVar[tuple[str, ...]] = ()  # of RARE, those that llama.cpp has in this architecture
    gguf_keys: ClassVar[tuple[str, ...]] = ()  # metadata that only this architecture has

    @abstractmethod
    def matches(self, gpt: GPTConfig) -> bool:
        """Tell whether a config is written as this family, if no family before it matches."""

    def matches_gguf(self, gpt: GPTConfig) -> bool:
        """Tell whether a config is written to GGUF as this family, if no family before it matches."""
        return self.gguf_arch is not None and self.matches(gpt)

    def check_tokenizer(self, tokenizer: Tokenizer) -> None:  # noqa: B027 (most families take any)
        """Raise `InputError` for a tokenizer that transformers does not use beside this family."""

    def rotary_heads(self, gpt: GPTConfig, name: str) -> int:
        """Return the heads of a parameter whose rows GGUF keeps as neighbouring rotary pairs; 0: its rows stay."""
        return 0

    def gguf_offset(self, name: str) -> int:
        """Return what GGUF adds to the numbers of a parameter."""
        return 0

    def gguf_constants(self, gpt: GPTConfig) -> dict[str, Tensor]:
        """Return the tensors of a GGUF file that are no weights."""
        return {}

    def gpt_config(self, metadata: Metadata, tensors: Mapping[str, StoredTensor]) -> GPTConfig:
        """Return the config that a GGUF file describes; raise `InputError` for what `GPT` cannot express."""
        metadata.check_keys(self.gguf_keys)
        size, number = metadata.size, metadata.number
        sizes = {option: size(key) for key, option in SIZES.items()}
        n_heads = size("attention.head_count")
        head_dim = size("attention.key_length", sizes["emb_dim"] // n_heads)
        rotary_dim = size("rope.dimension_count", head_dim)
        whole = ["attention.value_length", *([] if "rotary_dim" in self.gguf_options else ["rope.dimension_count"])]
        for key in whole:
            if size(key, head_dim) != head_dim:
                raise metadata.unsupported(f"{metadata.arch}.{key} = {size(key)}", f"only a whole head, {head_dim}")
        if "token_embd.weight" not in tensors:
            raise InputError(f"{metadata.path}: tensor token_embd.weight is missing; take a file of a whole model")
        q_bias, bias, ffn_bias = (
            self.gguf_names[f"blocks.{{}}.{name}"].format(0) + ".bias" in tensors
            for name in ("attn.q_proj", "attn.out_proj", "ffn.down_proj")
        )
        config = GPTConfig(
            vocab_size=tensors["token_embd.weight"].shape[0],
            n_heads=n_heads,
            n_kv_heads=size("attention.head_count_kv", n_heads),
            head_dim=head_dim,
            rope_theta=number("rope.freq_base", 10000.0),
            norm_eps=number(NORM_EPS[self.fixed["norm"]]),
            rotary_dim=None if rotary_dim == head_dim else rotary_dim,
            qkv_bias=q_bias,
            bias=bias,
            ffn_bias=None if ffn_bias == bias else ffn_bias,
            tie_embeddings="output.weight" not in tensors,
            sliding_window=size(WINDOW) if metadata.value(WINDOW, 0) != 0 else None,
            **(sizes | self.fixed),
        )
        return config.model_copy(update={"rope_scaling": self.read_rope_scaling(metadata, tensors, config)})

    def read_rope_scaling(
        self, metadata: Metadata, tensors: Mapping[str, StoredTensor], gpt: GPTConfig
    ) -> RopeScaling | None:
        """Return the rope scaling of a GGUF file; `gpt` is its config without one."""
        if ROPE_FREQS in tensors:
            raise metadata.unsupported(f"tensor {ROPE_FREQS}")
        return metadata.rope_scaling(gpt.context_length)

    def gguf_config(self, gpt: GPTConfig) -> GPTConfig:
        """Return a config as its GGUF file says it; raise `InputError` naming an option that llama.cpp lacks."""
        for option, value in (self.fixed | self.gguf_fixed).items():
            if getattr(gpt, option) != value:
                raise not_in_gguf(gpt, option, f"{option} {value}")
        for option in RARE:
            if getattr(gpt, option) != self.fixed.get(option) and option not in self.gguf_options:
                raise not_in_gguf(gpt, option, str(self.fixed.get(option)))
        if gpt.sliding_window is not None and gpt.sliding_window < gpt.context_length:
            raise not_in_gguf(gpt, "sliding_window", "none: make context_length as short")
        scaling = gpt.rope_scaling
        if scaling is not None and scaling.kind == "yarn" and (scaling.beta_fast, scaling.beta_slow) != (32, 1):
            raise not_in_gguf(gpt, "rope_scaling", "one with beta_fast 32 and beta_slow 1")
        return gpt.model_copy(update=dict.fromkeys(("sliding_window", "full_layers", "local_rope_theta")))

    def gguf_fields(self, gpt: GPTConfig) -> dict[str, Any]:
        """Return the metadata of a config."""
        values: dict[str, Any] = {key: getattr(gpt, option) for key, option in SIZES.items()}
        values |= {
            "vocab_size": gpt.vocab_size,
            "attention.head_count": gpt.n_heads,
            "attention.head_count_kv": gpt.n_kv_heads,
            NORM_EPS[gpt.norm]: gpt.norm_eps,
        }
        if gpt.positions == "rotary":
            values |= {
                "attention.key_length": gpt.head_dim,
                "attention.value_length": gpt.head_dim,
                "rope.dimension_count": gpt.rotary_dim or gpt.head_dim,
                "rope.freq_base": float(gpt.rope_theta),
            }
        if gpt.rope_scaling is not None:
            values |= rope_fields(gpt.rope_scaling)
        return {f"{self.gguf_arch}.{key}": value for key, value in values.items()}


def not_in_gguf(gpt: GPTConfig, option: str, instead: str) -> InputError:
    """Return the error for an option that none of llama.cpp's architectures has beside the others."""
    value = getattr(gpt, option)
    shown = value.kind if isinstance(value, RopeScaling) else value
    beside = f"{gpt.positions} positions" + (" and qk_norm" if gpt.qk_norm and option != "qk_norm" else "")
    return InputError(f"{option} {shown}: no architecture of llama.cpp has it with {beside}, only {instead}")


def fused_names(names: Mapping[str, str], parameters: Iterable[str]) -> dict[str, list[str]]:
    """Return the tensors that hold parameters of `GPT`, each with those that are stacked in it, as `names` has them."""
    order = {ours: number for number, ours in enumerate(names)}
    fused: dict[str, list[tuple[int, str]]] = {}
    for name in parameters:
        module, _, leaf = name.rpartition(".")
        layer = re.findall(r"^blocks\.(\d+)", module)
        ours = re.sub(r"^blocks\.\d+", "blocks.{}", module)
        fused.setdefault(f"{names[ours].format(*layer)}.{leaf}", []).append((order[ours], name))
    return {theirs: [name for _, name in sorted(parts)] for theirs, parts in fused.items()}


def fused_shapes(fused: Mapping[str, Sequence[str]], weights: Mapping[str, Tensor]) -> dict[str, list[int]]:
    """Return the shapes of `fused_names`, parameters stacked along the first dimension."""
    return {
        theirs: [sum(weights[name].shape[0] for name in parts), *weights[parts[0]].shape[1:]]
        for theirs, parts in fused.items()
    }
