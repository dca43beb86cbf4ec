"""Finetuning from the base model, and of the from-scratch baseline that it is compared with."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from llm.checkpoint.adapter import save_trained
from llm.checkpoint.card import new_card
from llm.checkpoint.folder import Checkpoint, CheckpointConfig, load_checkpoint
from llm.common import distributed
from llm.common.device import pick_device
from llm.common.files import write_atomic
from llm.config import FinetuneParams
from llm.data.about import About
from llm.data.batches import Batch, Collate, batches_by_length, example_batches
from llm.data.examples import Example
from llm.model.classifier import GPTClassifier
from llm.model.gpt import GPT
from llm.training.fit import FitResult, TrainingTask, fit
from llm.training.freeze import cache_frozen_activations, freeze, trained_parameters
from llm.training.losses import LossFunction
from llm.training.precision import base_dtype
from stages.runtime.from_scratch import baseline_beside, has_room_beside, is_baseline, write_result
from stages.runtime.run import Run


@dataclass(frozen=True, kw_only=True)
class FinetuneTask:
    """The model, the data and the loss of a finetuning, and the config and data of its model folder."""

    model: GPT | GPTClassifier
    config: CheckpointConfig
    about: About
    train_set: list[Example]
    val_set: list[Example]
    collate: Collate
    loss_function: LossFunction
    evaluate: Callable[[Iterable[Batch]], Mapping[str, float]]
    sample: Callable[[], Iterable[str]] | None = None
    finish: Callable[[Iterable[Batch]], CheckpointConfig] | None = None  # of the trained model, from its val batches


MakeTask = Callable[[Run, Checkpoint], FinetuneTask]


def finetune(run: Run, name: str, section: FinetuneParams, make_task: MakeTask) -> None:
    """Train `models/NAME`, with `scratch_control` also `models/NAME_scratch`, and write the stage's metrics."""
    baseline = f"{name}_scratch"

    def train_baseline() -> dict[str, float]:
        result, _ = train(run, baseline, section.from_scratch(), make_task, from_base=False, seed=run.params.seed)
        return result.best_metrics

    if is_baseline():
        write_result(run, train_baseline())
        return
    with contextlib.ExitStack() as stack:
        if section.scratch_control and has_room_beside(run.params.runtime.device):
            train_baseline = stack.enter_context(baseline_beside(run))
        result, trained = train(run, name, section, make_task, from_base=True, seed=run.params.seed)
        metrics: dict[str, Any] = {
            "trained_parameters": trained,
            "steps": result.steps,
            "best_step": result.best_step,
            **result.best_metrics,
        }
        if section.scratch_control:
            metrics["scratch"] = train_baseline()
        else:
            Path("models", baseline).mkdir(parents=True, exist_ok=True)  # an output that DVC expects, empty
    train_seeds(run, name, section, make_task)
    if distributed.rank() == 0:
        run.write_history(result.history, result.curve)
        run.write_metrics(metrics)


def train_seeds(run: Run, name: str, section: FinetuneParams, make_task: MakeTask) -> None:
    """Train `models/NAME_seeds/1` and further ones, each with a seed of its own, and their from-scratch baselines."""
    folder = f"{name}_seeds"
    seeds = {str(number): run.params.seed + number for number in range(1, run.params.evaluate.seeds)}
    for number, seed in seeds.items():
        train(run, f"{folder}/{number}", section, make_task, from_base=True, seed=seed)
        if section.scratch_control:
            train(run, f"{folder}/{number}_scratch", section.from_scratch(), make_task, from_base=False, seed=seed)
    if distributed.rank() == 0:
        write_atomic(Path("models", folder, "seeds.json"), json.dumps(seeds) + "\n")


def train(
    run: Run,
    name: str,
    section: FinetuneParams,
    make_task: MakeTask,
    *,
    from_base: bool,
    seed: int,
) -> tuple[FitResult, int]:
    """Train one model and write its folder. Return also the number of trained parameters."""
    runtime = run.params.runtime
    torch.manual_seed(seed)
    device = pick_device(runtime.device)
    base = load_checkpoint(Path("models/base"), device, base_dtype(device, section))
    if not from_base:
        base = base._replace(model=GPT(base.config.gpt).to(device))
    task = make_task(run, base)
    model = task.model
    freeze(model, section)
    trained = trained_parameters(model)
    size, accumulate = section.batch_size, section.grad_accum_steps
    reads = section.max_steps * accumulate * size
    train_collate = cache_frozen_activations(model, task.train_set, task.collate, section, reads)
    val_collate = cache_frozen_activations(model, task.val_set, task.collate, section, len(task.val_set))
    training = TrainingTask(
        loss_function=task.loss_function,
        batches=example_batches(task.train_set, train_collate, size, accumulate, seed),
        val_batches=partial(batches_by_length, task.val_set, val_collate, size),
        evaluate=task.evaluate,
        sample=task.sample,
        title=name,
    )
    where = f"seed{seed}/" if "/" in name else ""
    child = run.child(name, prefix=where + ("" if from_base else "scratch/"))
    with child.graceful():
        result = fit(model, training, section, runtime, child)
    if result.stopped:
        raise SystemExit  # this rank stops because another was asked to, which says so
    if distributed.rank() == 0:
        with run.phase("saving"):
            kind, data = task.config.kind, "messages" if task.config.labels else "instructions"
            card = new_card(
                kind,
                tokens=Path("data/tokens"),
                data=[data],
                params={"seed": seed, **section.model_dump(mode="json")},
                base_folder=Path("models/base") if from_base else None,
                about=task.about,
            )
            config = task.config if task.finish is None else task.finish(training.val_batches())
            save_trained(Path("models", name), Checkpoint(model, base.tokenizer, config), section, card)
    return result, trained
