"""`bench learn`: time to a loss, by our recipe and by nanoGPT's.

nanoGPT's recipe (github.com/karpathy/nanoGPT) is GPT-2's block and AdamW with a cosine schedule, at the best learning
rate of a small sweep. Its final loss is the target. Ours, the block and the optimizers of `params.yaml`, trains until
it reaches the target. Both are `GPT` and `fit` with the same number of parameters, and read the same batches.
nanoGPT's trains in fp32 on a CPU. Where ours trains with autocast to bf16 there, it trains once more in fp32.
"""

from __future__ import annotations

import logging
import math
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from pydantic import ValidationError

from llm.bench.harness import OURS, machine, matrix_limit, title, versions
from llm.bench.tokenizing import SAMPLE, read_documents, write_records
from llm.common.device import pick_device
from llm.common.errors import DivergenceError, InputError
from llm.common.markdown import table
from llm.config import GPTConfig, Params, PretrainParams, RuntimeParams, TrainParams, explain
from llm.convert.families.gpt2 import GPT2HFConfig
from llm.data.batches import Batch, held_out_windows, window_batches
from llm.data.shards import TokenShards
from llm.model.gpt import GPT
from llm.preprocess.corpus import plan_corpus, training_texts
from llm.preprocess.encode import encode_corpus
from llm.preprocess.workers import Workers
from llm.tokenizer.bpe import Tokenizer
from llm.training.fit import TrainingTask, fit
from llm.training.hooks import NoHooks
from llm.training.losses import lm_metrics, next_token_loss
from llm.training.precision import uses_bf16_autocast

NANOGPT = "nanoGPT's recipe"
OURS_IN_FP32 = f"{OURS}, fp32"
FIRST_LR = 0.001  # of the sweep
OUR_EVALUATIONS = 40  # in a training, which ends with the first that reaches the target
THEIR_EVALUATIONS = 10  # of which the last counts
SAME_SIZE = 0.03  # by which the numbers of parameters may differ

log = logging.getLogger("llm")

Row = dict[str, float]  # of a curve: step, tokens, seconds, val_loss, bpb


class TimeToLoss(NamedTuple):
    """The sizes of both trainings. Our schedule is made for `our_steps`; 0 means as many as theirs."""

    steps: int
    our_steps: int
    layers: int
    width: int
    heads: int
    vocab: int
    context: int
    batch: int
    text: str


class Recipe(NamedTuple):
    config: GPTConfig
    params: PretrainParams


class TrainingResult(NamedTuple):
    recipe: Recipe
    curve: list[Row]  # a row for each evaluation
    flop_per_s: float  # of the machine, just before

    @property
    def loss(self) -> float:
        """Return the final bits per byte, infinite for a training that diverged."""
        return self.curve[-1]["bpb"] if self.curve else math.inf

    def summary(self) -> dict[str, Any]:
        keys = ("optimizer", "lr", "muon_lr", "min_lr_ratio", "warmup_steps", "schedule", "max_steps")
        return {
            "parameters": n_parameters(self.recipe.config),
            **{key: getattr(self.recipe.params, key) for key in keys},
            **self.curve[-1],
            "flop_per_s": self.flop_per_s,
            "curve": self.curve,
        }


def default_sizes(params: Params) -> TimeToLoss:
    """Return the sizes of the params, on the sample."""
    model, pretrain = params.model, params.pretrain
    return TimeToLoss(
        steps=pretrain.max_steps,
        our_steps=0,
        layers=model.n_layers,
        width=model.emb_dim,
        heads=model.n_heads,
        vocab=params.tokenize.tokenizer.vocab_size,
        context=model.context_length,
        batch=pretrain.batch_size,
        text=str(SAMPLE),
    )


# ---- recipes ---------------------------------------------------------------------------------------------------------


def nanogpt_recipe(sizes: TimeToLoss, params: Params, lr: float) -> Recipe:
    form = GPT2HFConfig(
        vocab_size=sizes.vocab, n_positions=sizes.context, n_embd=sizes.width, n_layer=sizes.layers, n_head=sizes.heads
    )
    changes = {
        "max_steps": sizes.steps,
        "optimizer": "adamw",
        "lr": lr,
        "min_lr_ratio": 0.1,
        "warmup_steps": sizes.steps // 50,
        "schedule": "cosine",
        "beta1": 0.9,
        "beta2": 0.95,
        "weight_decay": 0.1,
        "grad_clip": 1.0,
    }
    if pick_device(params.runtime.device).type == "cpu":
        changes["precision"] = "fp32"
    return Recipe(form.gpt_config(), training_params(params, sizes.batch, changes, THEIR_EVALUATIONS))


def our_recipe(sizes: TimeToLoss, params: Params) -> Recipe:
    """Return our recipe; the width of the feed-forward layers makes up for the other's number of parameters."""
    wanted = n_parameters(nanogpt_recipe(sizes, params, FIRST_LR).config)
    narrow, wider = (n_parameters(our_config(sizes, params, ffn)) for ffn in (8, 16))
    steps = max(0, round((wanted - narrow) / (wider - narrow)))  # of 8, which suits matrix products
    config = our_config(sizes, params, 8 + 8 * steps)
    if abs(found := n_parameters(config) - wanted) > SAME_SIZE * wanted:
        raise InputError(
            f"bench learn: our model differs by {found:+,} from the {wanted:,} parameters of the other one, by more "
            f"than {100 * SAME_SIZE:.0f} %; take a larger width or vocabulary, or fewer layers"
        )
    changes = {"max_steps": sizes.our_steps or sizes.steps}
    return Recipe(config, training_params(params, sizes.batch, changes, OUR_EVALUATIONS))


def our_config(sizes: TimeToLoss, params: Params, ffn_dim: int) -> GPTConfig:
    """Return the block of `params.yaml` at these sizes."""
    values = {
        "vocab_size": sizes.vocab,
        "context_length": sizes.context,
        "n_layers": sizes.layers,
        "emb_dim": sizes.width,
        "n_heads": sizes.heads,
        "n_kv_heads": sizes.heads,
        "head_dim": sizes.width // sizes.heads,
        "ffn_dim": ffn_dim,
    }
    return GPTConfig(**params.model.model_dump() | values)


def training_params(params: Params, batch_size: int, changes: Mapping[str, Any], evaluations: int) -> PretrainParams:
    """Return our training params with the changes, from random weights and without early stopping."""
    common = {"batch_size": batch_size, "grad_accum_steps": 1, "dropout": 0.0, "patience": 0, "keep": "last"}
    interval = {"eval_interval": max(1, changes["max_steps"] // evaluations)}
    return params.pretrain.model_copy(update={**common, "trainable": "all", **interval, **changes})


def n_parameters(config: GPTConfig) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in GPT(config).parameters())


# ---- trainings -------------------------------------------------------------------------------------------------------


def encode(text: str, vocab: int, params: Params, folder: Path) -> Path:
    """Return the shards of a text, made as by the tokenize stage."""
    corpus, shards, vocabulary = folder / "corpus.jsonl", folder / "shards", folder / "tokenizer"
    write_records(corpus, read_documents(Path(text)))
    with Workers(1) as workers:
        plan = plan_corpus(corpus, params.tokenize.corpus, params.seed, workers)
        texts = training_texts(corpus, plan, params.tokenize.tokenizer.train_chars)
        Tokenizer.train(texts, vocab).save(vocabulary)
        encode_corpus(corpus, shards, plan, vocabulary, params.tokenize.tokens_per_shard, workers)
    return shards


class Curve(NoHooks):
    """The evaluations of a training, which stops at the target, and the seconds of its steps alone."""

    def __init__(self, tokens_per_step: int, target: float | None) -> None:
        self.rows: list[Row] = []
        self.seconds, self.since = 0.0, time.perf_counter()
        self.tokens_per_step, self.target = tokens_per_step, target

    def pause(self) -> None:
        self.seconds += time.perf_counter() - self.since if self.rows else 0.0

    def resume(self) -> None:
        self.since = time.perf_counter()

    def log(self, metrics: Mapping[str, float], step: int, /) -> None:
        if "val/bpb" in metrics:
            row = {"step": step, "tokens": step * self.tokens_per_step, "seconds": self.seconds}
            self.rows.append({**row, "val_loss": metrics["val/loss"], "bpb": metrics["val/bpb"]})

    def should_stop(self) -> bool:
        return self.target is not None and bool(self.rows) and self.rows[-1]["bpb"] <= self.target


def train(
    recipe: Recipe, shards: Path, runtime: RuntimeParams, seed: int, name: str, target: float | None = None
) -> TrainingResult:
    """Train to the end, or until `target` bits per byte, measured in fp32.

    The seconds of the curve count steps, not evaluations.
    """
    config, section = recipe
    train_tokens, val_tokens = TokenShards(shards, "train"), TokenShards(shards, "val")
    speed = matrix_limit()
    torch.manual_seed(seed)
    device = pick_device(runtime.device)
    model = GPT(config).to(device)
    curve = Curve(section.batch_size * config.context_length, target)

    def evaluate(windows: Iterable[Batch]) -> dict[str, float]:
        curve.pause()
        with torch.autocast(device.type, enabled=False):
            metrics = lm_metrics(model, val_tokens, windows)
        curve.resume()
        return metrics

    task = TrainingTask(
        loss_function=next_token_loss,
        batches=window_batches(train_tokens, config.context_length, section.batch_size, 1, seed),
        val_batches=partial(
            held_out_windows, val_tokens, config.context_length, section.batch_size, section.eval_tokens
        ),
        evaluate=evaluate,
        title=name,
    )
    fit(model, task, section, runtime, curve)
    return TrainingResult(recipe, curve.rows, speed)


def best_of_sweep(train_at: Callable[[float], TrainingResult]) -> list[TrainingResult]:
    """Return trainings at learning rates a factor of two apart, the best first, without those that diverge.

    The sweep goes from `FIRST_LR` up, or down if that gains nothing, until the loss is higher again.
    """
    found: dict[float, TrainingResult] = {}

    def loss(lr: float) -> float:
        try:
            found[lr] = train_at(lr)
        except DivergenceError:
            return math.inf
        return found[lr].loss

    lr, best, factor = FIRST_LR, loss(FIRST_LR), 2.0
    if (doubled := loss(2 * lr)) < best:
        lr, best = 2 * lr, doubled
    else:
        factor = 0.5
    while (further := loss(factor * lr)) < best:
        lr, best = factor * lr, further
    if not found:
        raise InputError(f"{NANOGPT}: diverged at every learning rate of the sweep; take other sizes")
    return sorted(found.values(), key=lambda each: each.loss)


def learn(sizes: TimeToLoss, params: Params) -> dict[str, Any]:
    """Run the sweep and our trainings; return a JSON object, with ratios of those that reached the target."""
    if sizes.width % sizes.heads:
        raise InputError(f"width {sizes.width} must be a multiple of heads {sizes.heads}")
    try:
        our = our_recipe(sizes, params)
    except ValidationError as error:
        raise InputError(explain(error, "the shape")) from None
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        shards = encode(sizes.text, sizes.vocab, params, Path(folder))

        def reference(lr: float) -> TrainingResult:
            recipe = nanogpt_recipe(sizes, params, lr)
            found = train(recipe, shards, params.runtime, params.seed, f"{NANOGPT}, lr {lr:g}")
            log.info(f"{NANOGPT}, lr {lr:g}: {found.loss:.4f} bits per byte in {found.curve[-1]['seconds']:,.1f} s")
            return found

        sweep = best_of_sweep(reference)
        best, target = sweep[0], sweep[0].loss
        found: dict[str, TrainingResult] = {}
        for name, precision in precisions(our.params, params.runtime).items():
            recipe = our._replace(params=our.params.model_copy(update={"precision": precision}))
            found[name] = train(recipe, shards, params.runtime, params.seed, name, target)
            log.info(f"{name}: {found[name].loss:.4f} bits per byte in {found[name].curve[-1]['seconds']:,.1f} s")
    theirs = best.curve[-1]
    return {
        "kind": "learn",
        "shape": sizes._asdict(),
        "machine": machine(),
        "versions": versions(),
        "target": target,
        "ratios": {
            name: {key: ours.curve[-1][key] / theirs[key] for key in ("tokens", "seconds")}
            for name, ours in found.items()
            if ours.loss <= target
        },
        "results": {name: each.summary() for name, each in {**found, NANOGPT: best}.items()},
        "sweep": [{"lr": each.recipe.params.lr, "bpb": each.loss} for each in sweep],
    }


def precisions(params: TrainParams, runtime: RuntimeParams) -> Mapping[str, str]:
    """Return our trainings, with the precision of each."""
    device = pick_device(runtime.device)
    mixed = device.type == "cpu" and uses_bf16_autocast(device, params)
    return {OURS: params.precision} | ({OURS_IN_FP32: "fp32"} if mixed else {})


# ---- the report ------------------------------------------------------------------------------------------------------


def markdown(found: Mapping[str, Any]) -> str:
    header = ["", "parameters", "bits per byte", "steps", "tokens", "seconds", "the machine"]
    rows = []
    for name, result in found["results"].items():
        cells = [f"{result['parameters']:,}", f"{result['bpb']:.4f}", f"{result['step']:,}"]
        cells += [f"{result['tokens']:,}", f"{result['seconds']:,.1f}", f"{result['flop_per_s'] / 1e9:.0f} GFLOP/s"]
        rows.append([name, *cells])
    tried: Sequence[Mapping[str, float]] = found["sweep"]
    rates = ", ".join(f"{each['lr']:g} ({each['bpb']:.4f})" for each in tried)
    said = [
        f"{name}: {ratios['tokens']:.2f} of the tokens and {ratios['seconds']:.2f} of the seconds until it was as good."
        for name, ratios in found["ratios"].items()
    ]
    said += [f"{name}: did not get as far." for name in found["results"] if name not in {*found["ratios"], NANOGPT}]
    return "\n".join([title(found), "", *table(header, rows), *said, f"{NANOGPT} at learning rates {rates}."]) + "\n"


def draw(found: Mapping[str, Any], path: Path) -> None:
    """Draw the curves over tokens and over seconds, and the target."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.5), layout="constrained")
    for axes, key in zip(figure.subplots(1, 2, sharey=True), ("tokens", "seconds"), strict=True):
        for name, result in found["results"].items():
            rows = result["curve"]
            axes.plot([row[key] for row in rows], [row["bpb"] for row in rows], ".-", label=name)
        axes.axhline(found["target"], color="0.6", linewidth=1)
        axes.set_xlabel(key)
    figure.axes[0].set_ylabel("bits per byte of val")
    figure.axes[0].legend()
    figure.savefig(path, dpi=120)
