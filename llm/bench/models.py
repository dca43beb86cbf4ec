"""The models of the benchmarks, the same for all implementations."""

from __future__ import annotations

from typing import Any, NamedTuple

from pydantic import ValidationError

from llm.bench.harness import Cost
from llm.common.errors import InputError
from llm.config import GPTConfig, explain
from llm.convert.families.gpt2 import GPT2HFConfig
from llm.convert.families.llama import LlamaHFConfig


class Shape(NamedTuple):
    """A model, and `batch` rows of `context` tokens, or `new` tokens after `prompt` ones.

    The form is GPT-2's or Llama's. `kv_heads` and `ffn` are Llama's; 0 means `heads` and four times the width.
    """

    layers: int
    width: int
    heads: int
    vocab: int
    context: int
    batch: int
    prompt: int = 0
    new: int = 0
    kv_heads: int = 0
    ffn: int = 0
    form: str = "gpt2"


def open_form(shape: Shape) -> GPT2HFConfig | LlamaHFConfig:
    if shape.form == "llama":
        return LlamaHFConfig(
            model_type="llama",
            vocab_size=shape.vocab,
            max_position_embeddings=shape.context,
            hidden_size=shape.width,
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads,
            num_key_value_heads=shape.kv_heads or shape.heads,
            intermediate_size=shape.ffn or 4 * shape.width,
            rms_norm_eps=1e-5,
            rope_theta=100000.0,
            tie_word_embeddings=True,
        )
    return GPT2HFConfig(
        model_type="gpt2",
        vocab_size=shape.vocab,
        n_positions=shape.context,
        n_embd=shape.width,
        n_layer=shape.layers,
        n_head=shape.heads,
    )


def gpt_config(shape: Shape) -> GPTConfig:
    return open_form(shape).gpt_config()


def transformers_config(shape: Shape) -> Any:
    import transformers

    values = open_form(shape).model_dump(exclude_unset=True)
    dropout: dict[str, Any] = (
        {} if shape.form == "llama" else dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    )
    return transformers.AutoConfig.for_model(**values, **dropout, bos_token_id=None, eos_token_id=None)


def transformers_model(shape: Shape) -> Any:
    import transformers

    config = transformers_config(shape)
    return transformers.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")


def check_shape(shape: Shape) -> None:
    if shape.width % shape.heads:
        raise InputError(f"width {shape.width} must be a multiple of heads {shape.heads}")
    if shape.prompt + shape.new > shape.context:
        raise InputError(f"prompt {shape.prompt} and new {shape.new} must fit into context {shape.context}")
    if shape.form == "gpt2" and (shape.kv_heads or shape.ffn):
        raise InputError("kv_heads and ffn are sizes of the form llama; GPT-2's follow from heads and width")
    try:
        gpt_config(shape)
    except ValidationError as error:
        raise InputError(explain(error, "the shape")) from None


def matrix_weights(config: GPTConfig) -> int:
    """Return the number of weights that every token is multiplied with, the output layer's included."""
    attention = 2 * config.emb_dim * config.head_dim * (config.n_heads + config.n_kv_heads)
    feed_forward = (3 if config.activation == "swiglu" else 2) * config.emb_dim * config.ffn_dim
    return config.n_layers * (attention + feed_forward) + config.vocab_size * config.emb_dim


def training_cost(shape: Shape, name: str) -> Cost:
    """Return the cost of a token, forward and backward.

    It is 6 operations for each weight of a matrix. Attention costs as many in each layer, for each number of the width
    and each position of the context; a token sees half of these.
    """
    return Cost(flop=6 * (matrix_weights(gpt_config(shape)) + shape.layers * shape.width * shape.context))
