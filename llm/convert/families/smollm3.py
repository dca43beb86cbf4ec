"""SmolLM3."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal, Self

from pydantic import model_validator

from llm.common.stored_tensor import StoredTensor
from llm.config import GPTConfig, Layers, Positive, PositiveFloat
from llm.convert.families.base import NO_BIASES, not_in_gguf
from llm.convert.families.llama import Llama, RotaryHFConfig, layer_types
from llm.convert.families.metadata import Metadata

INTERVAL = 4  # in llama.cpp every such layer is without positions


class SmolLM3HFConfig(RotaryHFConfig):
    """SmolLM3's `config.json`."""

    model_type: Literal["smollm3"] = "smollm3"
    vocab_size: Positive = 128256
    max_position_embeddings: Positive = 32768
    hidden_size: Positive = 2048
    num_hidden_layers: Layers = 36
    num_attention_heads: Positive = 16
    num_key_value_heads: Positive | None = 4
    rope_theta: PositiveFloat = 2000000.0
    tie_word_embeddings: bool = True
    sliding_window: Positive | None = None
    no_rope_layers: list[Literal[0, 1]] | None = None  # 0: without rotary positions
    no_rope_layer_interval: Positive = INTERVAL
    has_mlp_bias: ClassVar[bool] = True

    @model_validator(mode="after")
    def _enough(self) -> Self:
        if self.no_rope_layers is not None and len(self.no_rope_layers) < self.num_hidden_layers:
            raise ValueError(f"no_rope_layers: expected {self.num_hidden_layers}, found {len(self.no_rope_layers)}")
        return self

    def nope_layers(self) -> tuple[int, ...]:
        """Return the layers without rotary positions."""
        if self.no_rope_layers is None:
            return nope_layers(self.num_hidden_layers, self.no_rope_layer_interval)
        return tuple(i for i in range(self.num_hidden_layers) if not self.no_rope_layers[i])

    def default_layer_types(self) -> list[str]:
        nope = self.nope_layers() if self.use_sliding_window else ()
        return ["sliding_attention" if i in nope else "full_attention" for i in range(self.num_hidden_layers)]

    def own_options(self) -> dict[str, Any]:
        return {"nope_layers": self.nope_layers() or None}

    @classmethod
    def own_values(cls, gpt: GPTConfig) -> dict[str, Any]:
        values: dict[str, Any] = {
            "no_rope_layers": [int(i not in (gpt.nope_layers or ())) for i in range(gpt.n_layers)],
            "layer_types": layer_types(gpt),
        }
        if gpt.sliding_window is not None:
            values |= {"use_sliding_window": True, "sliding_window": gpt.sliding_window}
        return values


def nope_layers(n_layers: int, interval: int) -> tuple[int, ...]:
    """Return every such layer."""
    return tuple(range(interval - 1, n_layers, interval))


class SmolLM3(Llama):
    """SmolLM3 (Bakouch et al. 2025): Llama without rotary positions in every fourth layer."""

    model_type = "smollm3"
    hf_class = "SmolLM3ForCausalLM"
    hf_config = SmolLM3HFConfig
    gguf_arch = "smollm3"
    gguf_fixed = NO_BIASES
    gguf_options = ("nope_layers",)

    def matches(self, gpt: GPTConfig) -> bool:
        return gpt.nope_layers is not None

    def gpt_config(self, metadata: Metadata, tensors: Mapping[str, StoredTensor]) -> GPTConfig:
        config = super().gpt_config(metadata, tensors)
        return config.model_copy(update={"nope_layers": nope_layers(config.n_layers, INTERVAL) or None})

    def gguf_config(self, gpt: GPTConfig) -> GPTConfig:
        if gpt.nope_layers != nope_layers(gpt.n_layers, INTERVAL):
            raise not_in_gguf(gpt, "nope_layers", f"every {INTERVAL}th layer")
        return super().gguf_config(gpt)
