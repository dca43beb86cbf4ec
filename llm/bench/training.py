"""The benchmarks `train` and `finetune`: optimizer steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llm.bench.harness import OURS, Benchmark, Workload
from llm.bench.models import Shape, check_shape, gpt_config, training_cost, transformers_config, transformers_model
from llm.data.batches import Batch, collate_labels, example_batches
from llm.data.examples import Example
from llm.model.classifier import GPTClassifier
from llm.model.gpt import GPT
from llm.training.losses import label_loss, next_token_loss
from llm.training.precision import tune_malloc


def training_workload(
    model: nn.Module, loss: Callable[[Tensor, Tensor], Tensor], shape: Shape, compiled: bool = False
) -> Workload:
    """Return forward, backward, clipping and AdamW on one batch, as all of these projects do them.

    Runs in fp32; on a GPU, where there is one, with autocast to bf16. `compiled` compiles model and loss together.
    """
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda" if on_gpu else "cpu")
    model.to(device)
    if compiled:
        loss = torch.compile(loss)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.1, fused=True)
    tokens = torch.randint(0, shape.vocab, (shape.batch, shape.context + 1), device=device)  # [B, T+1]
    model.train()

    def run() -> int:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device.type, torch.bfloat16, enabled=on_gpu):
            total = loss(tokens[:, :-1], tokens[:, 1:])
        total.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if on_gpu:
            torch.cuda.synchronize()
        return shape.batch * shape.context

    return run


def train_ours(shape: Shape, compiled: bool = False) -> Workload:
    """Return our workload; `compiled` compiles each block, as `runtime.compile` does."""
    tune_malloc()
    model = GPT(gpt_config(shape))
    for block in model.blocks if compiled else ():
        block.compile()

    def loss(idx: Tensor, targets: Tensor) -> Tensor:
        total, weight = next_token_loss(model, Batch(idx, targets, []))
        return total / weight

    return training_workload(model, loss, shape)


def train_transformers(shape: Shape, compiled: bool = False) -> Workload:
    model = transformers_model(shape)

    def loss(idx: Tensor, targets: Tensor) -> Tensor:
        logits = model(idx, use_cache=False).logits
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())

    return training_workload(model, loss, shape, compiled)


def train_litgpt(shape: Shape, compiled: bool = False) -> Workload:
    """Return the workload of litgpt, in GPT-NeoX's form: rotary positions, an output layer of its own."""
    import litgpt
    from litgpt.utils import chunked_cross_entropy

    config = litgpt.Config(
        block_size=shape.context,
        vocab_size=shape.vocab,
        padded_vocab_size=shape.vocab,
        n_layer=shape.layers,
        n_head=shape.heads,
        n_embd=shape.width,
        parallel_residual=False,
        bias=True,
    )
    model = litgpt.GPT(config)

    def loss(idx: Tensor, targets: Tensor) -> Tensor:
        return cast(Tensor, chunked_cross_entropy(model(idx), targets, chunk_size=128))

    return training_workload(model, loss, shape, compiled)


def train_book(shape: Shape, compiled: bool = False) -> Workload:
    """Return the workload of the book's fast model; its output layer is its own."""
    from llms_from_scratch.ch04 import GPTModelFast

    model = GPTModelFast(
        {
            "vocab_size": shape.vocab,
            "context_length": shape.context,
            "emb_dim": shape.width,
            "n_heads": shape.heads,
            "n_layers": shape.layers,
            "drop_rate": 0.0,
            "qkv_bias": True,
        }
    )

    def loss(idx: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(model(idx).flatten(0, 1), targets.flatten())

    return training_workload(model, loss, shape, compiled)


# ---- finetuning ------------------------------------------------------------------------------------------------------


LABELS, EXAMPLES = 2, 2048


def messages(shape: Shape) -> list[Example]:
    """Return random messages with random labels, of 4 to `context` tokens with a median of 20."""
    random = torch.Generator().manual_seed(0)
    lengths = torch.empty(EXAMPLES).log_normal_(3.0, 0.6, generator=random).long().clamp(4, shape.context).tolist()
    labels = torch.randint(0, LABELS, (EXAMPLES,), generator=random).tolist()
    ids = [torch.randint(0, shape.vocab, (length,), generator=random).tolist() for length in lengths]
    return [Example(row, 0, label) for row, label in zip(ids, labels, strict=True)]


def last_block_trains(blocks: nn.ModuleList, *others: nn.Module) -> None:
    for module in (blocks[-1], *others):
        module.requires_grad_(True)


def finetune_ours(shape: Shape) -> Workload:
    tune_malloc()
    examples = messages(shape)
    model = GPTClassifier(GPT(gpt_config(shape)), LABELS)
    model.requires_grad_(False)
    last_block_trains(model.gpt.blocks, model.gpt.final_norm, model.head)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, fused=True)
    batches = example_batches(examples, collate_labels, shape.batch, 1, seed=0)
    step = 0

    def run() -> int:
        nonlocal step
        [batch] = batches(step)
        step += 1
        optimizer.zero_grad(set_to_none=True)
        loss, weight = label_loss(model, batch)
        (loss / weight).backward()
        optimizer.step()
        return len(batch.rows)

    return run


def finetune_transformers(shape: Shape) -> Workload:
    """Return the workload of transformers. Batches are padded to their longest row, as by its Trainer's collator."""
    import transformers

    examples = messages(shape)
    config = transformers_config(shape)
    config.pad_token_id = 0
    model = transformers.AutoModelForSequenceClassification.from_config(config, attn_implementation="sdpa")
    model.requires_grad_(False)
    last_block_trains(model.transformer.h, model.transformer.ln_f, model.score)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, fused=True)
    random = torch.Generator().manual_seed(0)
    model.train()

    def run() -> int:
        rows = torch.randint(0, len(examples), (shape.batch,), generator=random).tolist()
        batch = collate_labels(examples, rows)
        assert batch.lengths is not None
        mask = (torch.arange(batch.idx.shape[1]) < batch.lengths[:, None]).long()
        optimizer.zero_grad(set_to_none=True)
        model(batch.idx, attention_mask=mask, labels=batch.targets).loss.backward()
        optimizer.step()
        return len(rows)

    return run


# ---- benchmarks ------------------------------------------------------------------------------------------------------


TRAIN = Benchmark(
    "train",
    "tokens/s",
    Shape(layers=6, width=384, heads=6, vocab=8192, context=256, batch=8),
    {OURS: train_ours, "transformers": train_transformers, "litgpt": train_litgpt, "the book": train_book},
    check_shape,
    training_cost,
)
FINETUNE = Benchmark(
    "finetune",
    "examples/s",
    Shape(layers=12, width=384, heads=6, vocab=8192, context=256, batch=16),
    {OURS: finetune_ours, "transformers": finetune_transformers},
    check_shape,
)
