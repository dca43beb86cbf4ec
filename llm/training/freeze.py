"""Choice of the trained parameters, and the activation cache of frozen blocks."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from llm.common import distributed
from llm.common.errors import InputError
from llm.config import TrainParams
from llm.data.batches import Batch, Collate, batches_by_length
from llm.data.examples import Example
from llm.model.classifier import GPTClassifier
from llm.model.gpt import GPT
from llm.model.lora import add_lora
from llm.training.precision import autocast

logger = logging.getLogger("llm")

MAX_CACHE_BYTES = 2**29  # of `cache_frozen_activations` for one set of examples, on all ranks together


def freeze(model: GPT | GPTClassifier, params: TrainParams) -> None:
    """Freeze all parameters but those of `params.trainable`, which become fp32; frozen ones keep their dtype.

    `head` is a classifier's. `last_blocks` go with the final norm and a classifier's head. `lora` adds adapters, and
    trains a classifier's head too. `all` is everything that the loss depends on.
    """
    gpt, n = model.gpt, params.last_blocks
    model.requires_grad_(params.trainable == "all")
    if isinstance(model, GPTClassifier):
        model.head.requires_grad_(True)
        if not gpt.config.tie_embeddings:
            gpt.lm_head.requires_grad_(False)  # a classifier does not use it
    elif params.trainable == "head":
        raise InputError("trainable: head is for a classifier, and this model is none; take last_blocks, lora or all")
    if params.trainable == "last_blocks":
        if n > len(gpt.blocks):
            raise InputError(f"last_blocks: {n}, but the model has {len(gpt.blocks)} blocks")
        for module in (*list(gpt.blocks)[len(gpt.blocks) - n :], gpt.final_norm):
            module.requires_grad_(True)
    elif params.trainable == "lora":
        add_lora(model, params.lora)
    for p in model.parameters():
        if p.requires_grad:
            p.data = p.data.float()


def trained_parameters(model: nn.Module) -> int:
    """Return the number of trained parameters."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def frozen_blocks(model: GPT | GPTClassifier) -> int:
    """Return the number of lowest blocks that are frozen along with the embeddings below them."""
    gpt = model.gpt
    layers = [nn.ModuleList(child for child in gpt.children() if isinstance(child, nn.Embedding)), *gpt.blocks]
    trained = [any(p.requires_grad for p in layer.parameters()) for layer in layers]
    return max(0, trained.index(True) - 1) if True in trained else len(gpt.blocks)


def cache_frozen_activations(
    model: GPT | GPTClassifier,
    examples: Sequence[Example],
    collate: Collate,
    params: TrainParams,
    reads: int,
) -> Collate:
    """Return a `collate` for these examples whose batches also hold the output of the frozen lower blocks.

    It is computed here, once per example, and kept in memory: it never changes while nothing below is trained or
    dropped. Padding behind an example does not change it, as attention is causal. The batches that compute it depend
    on the examples alone, so that a resumed training has the same bits.

    Returns `collate` itself, and the frozen blocks run every time, where no block is frozen, with dropout, for fewer
    `reads` of examples than there are, and where the cache would exceed `MAX_CACHE_BYTES`.
    """
    gpt, n = model.gpt, frozen_blocks(model)
    if n == 0 or params.dropout > 0 or reads < len(examples):
        return collate
    size = sum(len(example.ids) for example in examples) * gpt.config.emb_dim * 4
    subject = f"activations of the lower {n} of {len(gpt.blocks)} blocks for {len(examples):,} examples"
    if size * distributed.world_size() > MAX_CACHE_BYTES:
        logger.info(f"{subject}: not cached, as they would take {size / 1e6:,.0f} MB in each process")
        return collate
    logger.info(f"{subject}: cached, {size / 1e6:,.1f} MB in each process")
    device = gpt.tok_emb.weight.device
    cache: dict[int, Tensor] = {}
    with torch.no_grad(), autocast(device, params):
        for batch in batches_by_length(examples, collate, params.batch_size):
            assert batch.lengths is not None
            segments = None if batch.segments is None else batch.segments.to(device)
            cached_hidden = gpt.run_blocks(batch.idx.to(device), n, segments=segments).cpu()  # [B, T, C]
            for row, states, length in zip(batch.rows, cached_hidden, batch.lengths.tolist(), strict=True):
                cache[row] = states[:length].clone()  # [length, C]

    def collate_with_cached_hidden(all_examples: Sequence[Example], rows: Sequence[int]) -> Batch:
        assert all_examples is examples
        cached_hidden = pad_sequence([cache[row] for row in rows], batch_first=True)  # [B, T, C]
        return collate(examples, rows)._replace(cached_hidden=cached_hidden, start_layer=n)

    return collate_with_cached_hidden
