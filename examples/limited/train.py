"""Train the best model that little text gives: several readings, dropout, an ensemble, and a student of it.

    python examples/limited/train.py data/raw/corpus.jsonl --megabytes 1

Sections of the text are shuffled. The same tenth is held out for each size, half of it to choose by and half to test
on. It prints one Markdown row for each kind of model, with its bits per byte of the test part and the seconds so far.
"""

from __future__ import annotations

import argparse
import copy
import random
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
import yaml
from torch import Tensor

from llm.bench.tokenizing import read_documents
from llm.common.errors import InputError
from llm.config import GPTConfig, Params, PretrainParams, parse_params
from llm.data.batches import Batch, held_out_windows, window_batches
from llm.data.shards import TokenShards, bits_per_byte
from llm.evaluation.baselines import NGram, ppm_bytes
from llm.inference.score import token_nats
from llm.model.gpt import GPT
from llm.preprocess.chunks import cut_chunks
from llm.preprocess.encode import token_dtype
from llm.tokenizer.bpe import Tokenizer
from llm.training.fit import TrainingTask, fit
from llm.training.losses import lm_metrics, next_token_loss

SECTION_CHARS = 10_000
HELD_OUT = 0.05  # of the text, for val and again for test
MEGABYTE = 1_000_000
HEAD_DIM = 64
AVERAGED = 0.99  # how much of the averaged weights a step keeps


class Tokens(TokenShards):
    """The tokens of one split, in memory."""

    def __init__(self, texts: list[str], tokenizer: Tokenizer) -> None:
        dtype = token_dtype(tokenizer.vocab_size)
        ids = [np.array([*tokenizer.encode(text), tokenizer.eot], dtype=dtype) for text in texts]
        self.texts = texts
        self.shards = [np.concatenate(ids)]  # type: ignore[list-item]
        self.n_tokens, self.n_bytes = len(self.shards[0]), sum(len(text.encode()) for text in texts)
        self.starts = np.array([0, self.n_tokens])


class Split(NamedTuple):
    train: Tokens
    val: Tokens
    test: Tokens
    vocab_size: int


def split_text(path: Path, megabytes: float, vocab_size: int, seed: int) -> Split:
    """Return a split with `megabytes` to train on; what is held out does not depend on them."""
    sections = [part for text in read_documents(path) for part in cut_chunks(text, SECTION_CHARS)]
    random.Random(seed).shuffle(sections)
    held = max(1, round(HELD_OUT * len(sections)))
    val, test, rest = sections[:held], sections[held : 2 * held], sections[2 * held :]
    taken, n_bytes = [], 0
    for text in rest:
        if n_bytes + len(text.encode()) > megabytes * MEGABYTE:
            break
        taken.append(text)
        n_bytes += len(text.encode())
    if not taken:
        raise InputError(f"{path}: has no section of at most {megabytes} MB to train on; take more text or megabytes")
    tokenizer = Tokenizer.train(taken, vocab_size)
    return Split(Tokens(taken, tokenizer), Tokens(val, tokenizer), Tokens(test, tokenizer), tokenizer.vocab_size)


# ---- trainings -------------------------------------------------------------------------------------------------------


class Average:
    """The running mean of a model's weights, which lags some hundred steps behind."""

    def __init__(self, model: GPT) -> None:
        self.mean = copy.deepcopy(model)

    def __call__(self, model: GPT, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the loss of a batch, after taking in the weights that the step before left."""
        if torch.is_grad_enabled():
            for block in model.blocks:  # no dropout in attention, for which PyTorch has no fast way on a CPU
                block.attn.dropout = 0.0  # type: ignore[union-attr, assignment]
            with torch.no_grad():
                for mean, p in zip(self.mean.parameters(), model.parameters(), strict=True):
                    mean.lerp_(p, 1 - AVERAGED)
        return next_token_loss(model, batch)


class Distillation:
    """The loss that teaches a student the mean prediction of its teachers beside the text."""

    def __init__(self, teachers: list[GPT], share: float) -> None:
        self.teachers, self.share = [teacher.eval() for teacher in teachers], share

    def __call__(self, model: GPT, batch: Batch) -> tuple[Tensor, Tensor]:
        if not torch.is_grad_enabled():
            return next_token_loss(model, batch)
        with torch.no_grad():
            soft = torch.stack([teacher(batch.idx).float().softmax(-1) for teacher in self.teachers]).mean(0)
        logits = model(batch.idx).float().flatten(0, 1)  # [B*T, V]
        hard = F.cross_entropy(logits, batch.targets.flatten(), reduction="sum")
        taught = F.cross_entropy(logits, soft.flatten(0, 1), reduction="sum")
        return self.share * taught + (1 - self.share) * hard, torch.tensor(float(len(logits)))


def train(
    model: GPT,
    split: Split,
    params: PretrainParams,
    run: Params,
    seed: int,
    title: str,
    loss: Callable[[Any, Batch], tuple[Tensor, Tensor]] = next_token_loss,
) -> float:
    """Train a model in place, to its best weights by val; return the bits per byte of val."""
    T = model.config.context_length

    def val_batches() -> Iterator[Batch]:
        return held_out_windows(split.val, T, 16, split.val.n_tokens)

    def evaluate(batches: Iterable[Batch]) -> dict[str, float]:
        return lm_metrics(model, split.val, batches)

    task = TrainingTask(
        loss_function=loss,
        batches=window_batches(split.train, T, params.batch_size, 1, seed),
        val_batches=val_batches,
        evaluate=evaluate,
        title=title,
    )
    result = fit(model, task, params, run.runtime)
    return result.best_metrics["val/bpb"]


def bits(models: list[GPT], tokens: Tokens) -> float:
    """Return the bits per byte of the models' mean prediction."""
    nats = np.stack([token_nats(model, tokens) for model in models])  # [K, N]
    mixed = np.log(len(models)) - np.logaddexp.reduce(-nats, axis=0)  # [N]
    return bits_per_byte(float(mixed.sum()), tokens.n_bytes)


# ---- the run ---------------------------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path)
    parser.add_argument("--megabytes", type=float, default=1.0)
    parser.add_argument("--vocab", type=int, default=2048)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--epochs", type=float, default=12.0, help="readings of the text by each member")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--weight-decay", type=float, default=0.1)
    parser.add_argument("--lr", type=float, default=0.008)
    parser.add_argument("--muon-lr", type=float, default=0.01)
    parser.add_argument("--members", type=int, default=1)
    parser.add_argument("--student-epochs", type=float, default=0.0, help="0: no student")
    parser.add_argument("--share", type=float, default=0.8, help="of the teachers in the student's loss")
    parser.add_argument("--baselines", action="store_true", help="an n-gram model and PPM too")
    args = parser.parse_args()
    if args.width < HEAD_DIM or args.width % HEAD_DIM or args.members < 1:
        raise InputError(
            f"expected a --width that is a multiple of {HEAD_DIM} and --members of at least 1, got {args.width} and "
            f"{args.members}"
        )

    start = time.perf_counter()
    run = parse_params(yaml.safe_load(Path("params.yaml").read_text(encoding="utf-8")))
    split = split_text(args.text, args.megabytes, args.vocab, run.seed)
    form = run.model.model_dump() | {
        "vocab_size": split.vocab_size,
        "n_layers": args.layers,
        "emb_dim": args.width,
        "n_heads": args.width // HEAD_DIM,
        "n_kv_heads": args.width // HEAD_DIM,
        "head_dim": HEAD_DIM,
        "ffn_dim": 4 * args.width,
    }
    config = GPTConfig(**form)

    def plan(epochs: float, dropout: float) -> PretrainParams:
        steps = max(1, round(epochs * split.train.n_tokens / (args.batch * config.context_length)))
        changes = {"max_steps": steps, "eval_interval": max(1, steps // 12), "warmup_steps": max(1, steps // 20)}
        changes |= {"batch_size": args.batch, "lr": args.lr, "muon_lr": args.muon_lr, "dropout": dropout}
        return run.pretrain.model_copy(update={**changes, "weight_decay": args.weight_decay, "schedule": "linear"})

    def show(name: str, found: float) -> None:
        print(f"| {name} | {found:.4f} | {time.perf_counter() - start:,.0f} |", flush=True)

    n_parameters = sum(p.numel() for p in GPT(config).parameters())
    sizes = f"{split.train.n_bytes:,} bytes and {split.train.n_tokens:,} tokens to train on"
    print(f"{sizes}, {split.test.n_bytes:,} bytes to test on")
    print(f"{n_parameters:,} parameters; {vars(args)}\n")
    print("| model | bits per byte of test | seconds so far |\n|---|---:|---:|")
    if args.baselines:
        read = [split.train.read(0, split.train.n_tokens), split.test.read(0, split.test.n_tokens)]
        nats = NGram(read[0], run.evaluate.ngram_order, split.vocab_size).nats(read[1])
        show("n-gram model", bits_per_byte(float(nats.sum()), split.test.n_bytes))
        train_text, test_text = ("\0".join(tokens.texts).encode() for tokens in (split.train, split.test))
        show("PPM", 8 * ppm_bytes(train_text, test_text) / split.test.n_bytes)

    members: list[GPT] = []
    for number in range(args.members):
        torch.manual_seed(run.seed + number)
        model = GPT(config)
        average = Average(model)
        val = train(model, split, plan(args.epochs, args.dropout), run, run.seed + number, f"member {number}", average)
        averaged = bits([average.mean], split.val)
        if number == 0:
            show("one model", bits([model], split.test))
            show("its weights averaged", bits([average.mean], split.test))
        members.append(average.mean if averaged < bits([model], split.val) else model)
        print(f"member {number}: val {val:.4f}, averaged {averaged:.4f}", flush=True)
    if len(members) > 1:
        show(f"ensemble of {len(members)}", bits(members, split.test))
    if args.student_epochs:
        torch.manual_seed(run.seed + 1000)
        student = GPT(config)
        loss = Distillation(members, args.share)
        train(student, split, plan(args.student_epochs, 0.0), run, run.seed + 1000, "student", loss)
        show("student of the ensemble", bits([student], split.test))


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        sys.exit(f"error: {error}")
