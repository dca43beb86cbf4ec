"""What both finetunings share: a training from the base model, and the same from random weights to hold it against."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from llm.checkpoint.adapter import save_trained
from llm.checkpoint.folder import Checkpoint, CheckpointConfig, load_checkpoint
from llm.common import distributed
from llm.common.device import pick_device
from llm.config import ClassifyParams, InstructParams
from llm.data.batches import Batch, Collate, batches_by_length, example_batches
from llm.data.examples import Example
from llm.model.classifier import GPTClassifier
from llm.model.gpt import GPT
from llm.training.fit import FitResult, fit
from llm.training.freeze import cache_frozen_activations, freeze, trained_parameters
from llm.training.losses import LossFunction
from llm.training.precision import base_dtype
from stages.runtime.baseline import baseline_beside, has_room_beside, is_baseline, write_result
from stages.runtime.run import Run


class Task(NamedTuple):
    """What is trained and how, and what the model folder will say about it."""

    model: GPT | GPTClassifier
    config: CheckpointConfig
    train_set: list[Example]
    val_set: list[Example]
    collate: Collate
    loss_function: LossFunction
    evaluate: Callable[[Iterable[Batch]], Mapping[str, float]]
    sample: Callable[[], str] | None = None


def finetune(
    run: Run, name: str, section: ClassifyParams | InstructParams, make_task: Callable[[Run, Checkpoint], Task]
) -> None:
    """Trains `models/NAME`, with `scratch_control` also `models/NAME_scratch`, and writes the stage's metrics."""
    control = f"{name}_scratch"
    scratch = section.model_copy(update={"trainable": "all"})  # there is nothing in random weights to keep

    def train_baseline() -> dict[str, float]:
        return train(run, control, scratch, make_task, from_base=False)[0].best_metrics

    if is_baseline():
        write_result(run, train_baseline())
        return
    with contextlib.ExitStack() as stack:
        if section.scratch_control and has_room_beside(run.params.runtime.device):
            train_baseline = stack.enter_context(baseline_beside(run))
        result, trained = train(run, name, section, make_task, from_base=True)
        metrics: dict[str, Any] = {
            "trained_parameters": trained,
            "steps": result.steps,
            "best_step": result.best_step,
            **result.best_metrics,
        }
        if section.scratch_control:
            metrics["scratch"] = train_baseline()
        else:
            Path("models", control).mkdir(parents=True, exist_ok=True)  # an output that DVC expects, empty
    if distributed.rank() == 0:
        run.write_history(result.history)
        run.write_metrics(metrics)


def train(
    run: Run,
    name: str,
    section: ClassifyParams | InstructParams,
    make_task: Callable[[Run, Checkpoint], Task],
    from_base: bool,
) -> tuple[FitResult, int]:
    """Trains one model and writes its folder; returns also how many parameters were trained."""
    params = run.params
    torch.manual_seed(params.seed)
    device = pick_device(params.runtime.device)
    base = load_checkpoint(Path("models/base"), device, base_dtype(device, params.runtime))
    if not from_base:
        base = base._replace(model=GPT(base.config.gpt).to(device))
    task = make_task(run, base)
    freeze(task.model, section)
    trained = trained_parameters(task.model)
    size, accumulate = section.batch_size, section.grad_accum_steps
    reads = section.max_steps * accumulate * size
    train_collate = cache_frozen_activations(task.model, task.train_set, task.collate, section, params.runtime, reads)
    val_collate = cache_frozen_activations(
        task.model, task.val_set, task.collate, section, params.runtime, len(task.val_set)
    )
    with run.graceful():
        result = fit(
            task.model,
            task.loss_function,
            example_batches(task.train_set, train_collate, size, accumulate, params.seed),
            section,
            params.runtime,
            evaluate=lambda: task.evaluate(batches_by_length(task.val_set, val_collate, size)),
            sample=task.sample,
            log=run.log if from_base else run.log_as("scratch"),
            state_dir=run.state_dir / name,
            should_stop=lambda: run.stop_requested,
            phase=run.phase,
            title=name,
        )
    if result.stopped:
        raise SystemExit  # one of several: another was asked to, and says so
    if distributed.rank() == 0:
        with run.phase("saving"):
            save_trained(Path("models", name), Checkpoint(task.model, base.tokenizer, task.config), section)
    return result, trained
