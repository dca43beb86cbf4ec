"""Metadata of a GGUF file about its architecture: strict reading, and rope scaling both ways."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from llm.common.errors import InputError
from llm.config import MAX_SIZE, RopeScaling

WINDOW = "attention.sliding_window"
UNDERSTOOD = {  # with any other key of the architecture a model might compute something else
    *("block_count", "context_length", "embedding_length", "feed_forward_length", "vocab_size", "tensor_data_layout"),
    *("attention.head_count", "attention.head_count_kv", "attention.key_length", "attention.value_length"),
    *("attention.layer_norm_rms_epsilon", "attention.layer_norm_epsilon", WINDOW),
    *("rope.freq_base", "rope.dimension_count", "rope.scale_linear", "rope.scaling.type", "rope.scaling.factor"),
    *("rope.scaling.original_context_length", "rope.scaling.attn_factor", "rope.scaling.finetuned"),
    *("rope.scaling.low_freq_factor", "rope.scaling.high_freq_factor"),  # ours, beside what llama.cpp reads
    *("rope.scaling.yarn_beta_fast", "rope.scaling.yarn_beta_slow"),
}

HARMLESS: dict[str, tuple[Any, ...]] = {  # keys with the values that change nothing
    **dict.fromkeys(("expert_count", "nextn_predict_layers", "pooling_type", "attention.scale"), (0,)),
    **dict.fromkeys(("attention.max_alibi_bias", "attention.clamp_kqv"), (0,)),
    **dict.fromkeys(("attn_logit_softcapping", "final_logit_softcapping", "rope.scaling.yarn_log_multiplier"), (0,)),
    **dict.fromkeys(("logit_scale", "residual_scale", "embedding_scale"), (0, 1)),  # 0: none
    "attention.causal": (True,),
    "use_parallel_residual": (False,),
}


class Metadata(NamedTuple):
    """The fields of one architecture; raises `InputError` for a missing or senseless one."""

    path: Path
    arch: str
    fields: dict[str, Any]

    def has(self, key: str) -> bool:
        """Tell whether the file has a key."""
        return f"{self.arch}.{key}" in self.fields

    def value(self, key: str, default: Any) -> Any:
        """Return the value of a key; a list of equal numbers, one for each layer, is the number."""
        return equal_value(self.fields.get(f"{self.arch}.{key}", default))

    def size(self, key: str, default: int | None = None) -> int:
        """Return a width, length or count."""
        value = self.value(key, default)
        if type(value) is not int or not 1 <= value <= MAX_SIZE:
            raise InputError(
                f"{self.path}: {self.arch}.{key}: expected a number from 1 to {MAX_SIZE}, found {shown(value)}; "
                "convert or download the file again"
            )
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """Return a number as the decimal that it was written from."""
        value = self.value(key, default)
        if not isinstance(value, int | float):
            raise InputError(
                f"{self.path}: {self.arch}.{key}: expected a number, found {shown(value)}; convert the file again"
            )
        return decimal(value)

    def unsupported(self, problem: str, instead: str = "take another model") -> InputError:
        """Return the error for something that `GPT` cannot express."""
        return InputError(f"{self.path}: {problem} is not supported in {self.arch}; {instead}")

    def check_keys(self, more: tuple[str, ...] = ()) -> None:
        """Raise `InputError` for a key of the architecture that neither all nor this one (`more`) understand."""
        for key in self.fields:
            own = key.removeprefix(f"{self.arch}.")
            if own == key or own in UNDERSTOOD or own in more or self.value(own, None) in HARMLESS.get(own, ()):
                continue
            of_experts = own.startswith("expert_") or own == "leading_dense_block_count"
            if own == "expert_count" or not of_experts or self.value("expert_count", 0) != 0:
                raise InputError(
                    f"{self.path}: {key!r} is not supported (found {shown(self.fields[key])}): "
                    "the model would compute something else; take another model"
                )

    def rope_scaling(self, context_length: int) -> RopeScaling | None:
        """Return linear or YaRN rope scaling."""
        kind = self.fields.get(f"{self.arch}.rope.scaling.type", "linear")
        # 0: none, as llama.cpp reads it
        factor = self.number("rope.scaling.factor", self.number("rope.scale_linear", 0.0)) or 1.0
        attention = self.number("rope.scaling.attn_factor", 1.0)
        if kind == "yarn":
            return RopeScaling(
                kind="yarn",
                factor=factor,
                original_context_length=self.size("rope.scaling.original_context_length", context_length),
                beta_fast=self.number("rope.scaling.yarn_beta_fast", 32.0),
                beta_slow=self.number("rope.scaling.yarn_beta_slow", 1.0),
                attention_factor=_yarn_attention(factor) * attention,
            )
        if kind not in ("none", "linear") or attention != 1:
            raise self.unsupported(f"rope.scaling.type {shown(kind)} with attn_factor {attention}")
        return RopeScaling(kind="linear", factor=factor) if kind == "linear" and factor != 1 else None


def rope_fields(scaling: RopeScaling) -> dict[str, Any]:
    """Return the metadata of a rope scaling; `Llama.gguf_constants` has the tensor of one of kind llama3."""
    if scaling.kind == "llama3":
        return {
            "rope.scaling.original_context_length": scaling.original_context_length,
            "rope.scaling.low_freq_factor": scaling.low_freq_factor,
            "rope.scaling.high_freq_factor": scaling.high_freq_factor,
        }
    fields: dict[str, Any] = {"rope.scaling.type": scaling.kind, "rope.scaling.factor": float(scaling.factor)}
    if scaling.attention_factor is not None:
        fields["rope.scaling.original_context_length"] = scaling.original_context_length
        fields["rope.scaling.attn_factor"] = scaling.attention_factor / _yarn_attention(scaling.factor)
    return fields


def _yarn_attention(factor: float) -> float:
    """Return llama.cpp's own factor of cos and sin under YaRN, beside the file's attn_factor."""
    return 0.1 * math.log(max(factor, 1.0)) + 1


def decimal(value: float) -> float:
    """Return the shortest decimal that a file's 32 bits stand for: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(value)))


def equal_value(value: Any) -> Any:
    """Return the number that all of a list are, or the value itself."""
    numbers = isinstance(value, list) and value and all(isinstance(one, int | float) for one in value)
    return value[0] if numbers and all(one == value[0] for one in value) else value


def shown(value: Any) -> str:
    """Return a value of a file for a message."""
    return f"{value!r:.80}"
