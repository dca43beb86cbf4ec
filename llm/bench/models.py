"""The models of the contests, the same for all who take part."""

from __future__ import annotations

from typing import Any, NamedTuple

from pydantic import ValidationError

from llm.bench.contest import Cost
from llm.config import GPTConfig, InputError, explain
from llm.weights import GPT2Form


class Shape(NamedTuple):
    """What all contestants run: GPT-2's form, `batch` rows of `context` tokens, `new` tokens behind `prompt` ones."""

    layers: int
    width: int
    heads: int
    vocab: int
    context: int
    batch: int
    prompt: int = 0
    new: int = 0


def gpt2_config(shape: Shape) -> GPTConfig:
    """GPT-2's form, which all of them can take."""
    form = GPT2Form(
        vocab_size=shape.vocab,
        n_positions=shape.context,
        n_embd=shape.width,
        n_layer=shape.layers,
        n_head=shape.heads,
    )
    return form.gpt_config()


def transformers_config(shape: Shape) -> Any:
    import transformers

    return transformers.GPT2Config(
        vocab_size=shape.vocab,
        n_positions=shape.context,
        n_embd=shape.width,
        n_layer=shape.layers,
        n_head=shape.heads,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    )


def transformers_gpt2(shape: Shape) -> Any:
    import transformers

    config = transformers_config(shape)
    return transformers.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")


def check_shape(shape: Shape) -> None:
    if shape.width % shape.heads:
        raise InputError(f"width {shape.width} must be a multiple of heads {shape.heads}")
    if shape.prompt + shape.new > shape.context:
        raise InputError(f"prompt {shape.prompt} and new {shape.new} must fit into context {shape.context}")
    try:
        gpt2_config(shape)
    except ValidationError as error:
        raise InputError(explain(error, "the shape")) from None


def matrix_weights(config: GPTConfig) -> int:
    """Those that every token is multiplied with, the output layer's included."""
    attention = 2 * config.emb_dim * config.head_dim * (config.n_heads + config.n_kv_heads)
    feed_forward = (3 if config.activation == "swiglu" else 2) * config.emb_dim * config.ffn_dim
    return config.n_layers * (attention + feed_forward) + config.vocab_size * config.emb_dim


def training_cost(shape: Shape, name: str) -> Cost:
    """A token costs 6 operations for each weight of a matrix, forward and backward, and in each layer's attention as
    many for each number of its width and each position of the context, half of which it sees."""
    return Cost(flop=6 * (matrix_weights(gpt2_config(shape)) + shape.layers * shape.width * shape.context))


def decoding_cost(shape: Shape, name: str) -> Cost | None:
    """A new token of a single row reads every weight once; rows of a batch share what they read."""
    return Cost(n_bytes=4 * matrix_weights(gpt2_config(shape))) if shape.batch == 1 else None
