"""Training loop of pretraining and both finetunings."""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from llm.common import distributed
from llm.common.errors import DivergenceError, InputError
from llm.config import RuntimeParams, TrainParams
from llm.data.batches import IGNORE_INDEX, Batch
from llm.model.gpt import GPT
from llm.training.hooks import NO_HOOKS, Hooks, StoppedError, stoppable
from llm.training.losses import LossFunction
from llm.training.optim import make_optimizers, set_lr
from llm.training.precision import autocast, tune_malloc
from llm.training.progress import Progress
from llm.training.schedule import lr_factor
from llm.training.state import TrainingState, load_state, save_state

logger = logging.getLogger("llm")


@dataclass(frozen=True, kw_only=True)
class TrainingTask:
    """The loss, the data and the evaluation of a training."""

    loss_function: LossFunction
    batches: Callable[[int], list[Batch]]  # the micro-batches of a step; they depend on the step alone
    val_batches: Callable[[], Iterable[Batch]]
    evaluate: Callable[[Iterable[Batch]], Mapping[str, float]]  # metrics of the val batches, `val/loss` among them
    sample: Callable[[], Iterable[str]] | None = None  # generated text, piece by piece
    title: str = "training"


class FitResult(NamedTuple):
    """The outcome of a training."""

    steps: int  # optimizer steps that were made
    best_step: int  # the step of the weights that the model has now
    history: list[dict[str, float]]  # a row for each evaluation; that of the start has no `train/loss`
    curve: list[dict[str, float]]  # `step`, `train/loss` and `lr` of every step, or of every few where they are many
    stopped: bool = False  # early, by `should_stop`

    @property
    def best_metrics(self) -> dict[str, float]:
        """Return the losses at `best_step`; no `train/loss` where that is the start."""
        row = next(row for row in reversed(self.history) if row["step"] <= self.best_step)
        return {name: value for name, value in row.items() if "/" in name}


def fit(
    model: nn.Module, task: TrainingTask, params: TrainParams, runtime: RuntimeParams, hooks: Hooks = NO_HOOKS
) -> FitResult:
    """Train `model` in place, on its device, for `params.max_steps` optimizer steps.

    A training resumes from `hooks.state_dir` and ends with the same bits as one that was never stopped. It returns
    early, with its state saved, when `hooks.should_stop()` is true: after a step, or between two batches of an
    evaluation, which is then repeated on resume.

    With schedule wsd the state before the decay is saved in `hooks.stable_dir`. A training that differs only in
    `max_steps` and `decay_steps`, and decays there or later, starts from it, again with the same bits.

    The phases are `start-up`, `data` (batches), `training`, `evaluation` and `saving`. With several processes each
    rank reads a shard of every batch. Losses equal those of one process up to rounding. Rank 0 alone prints, saves and
    samples. All stop together.

    Raises `DivergenceError` for a loss that is not finite or explodes.
    """
    trainer = Trainer(model, task, params, runtime, hooks)
    state = trainer.state
    with trainer.progress:
        while True:
            if state.step % params.eval_interval == 0 or state.step == params.max_steps:
                try:
                    trainer.evaluate()
                except StoppedError:
                    trainer.save(trainer.state_dir)
                    return trainer.result(stopped=True)
                if trainer.is_done():
                    break
            stopping = trainer.train_step()
            trainer.save_if_due(stopping)
            if stopping:
                return trainer.result(stopped=True)
    if params.keep == "best":
        state.restore_best()
    return trainer.result()


class Trainer:
    """A model in training, with its optimizers and its resumable state."""

    def __init__(
        self, model: nn.Module, task: TrainingTask, params: TrainParams, runtime: RuntimeParams, hooks: Hooks
    ) -> None:
        self.model, self.task, self.params, self.runtime, self.hooks = model, task, params, runtime, hooks
        self.device = next(model.parameters()).device
        self.rank, self.world_size = distributed.rank(), distributed.world_size()
        self.seed = torch.initial_seed()
        tune_malloc()
        with hooks.phase("start-up"):  # torch loads its compiler with the first optimizer, needed or not
            self.optimizers = make_optimizers(model, params)
        prepare_model(model, params, runtime)
        self.objective = distributed.replicate(Objective(model, task.loss_function))
        self.autocast = autocast(self.device, params)
        if self.world_size > 1:
            logger.info("%s: %d processes train together", task.title, self.world_size)
        self.state = TrainingState(model, self.optimizers)
        self.state_dir = hooks.state_dir if self.rank == 0 else None
        self.stable_dir = hooks.stable_dir if self.rank == 0 and params.schedule == "wsd" else None
        self.resume()
        self.progress = Progress(task.title, self.state.step, params.max_steps)

    def resume(self) -> None:
        """Restore the newest saved state, if there is one, on all ranks."""
        saved = load_state(self.state_dir) if self.state_dir is not None else None
        if saved is None and self.stable_dir is not None:
            saved = load_state(self.stable_dir, up_to=self.params.stable_steps)
        if (saved := distributed.broadcast_state(saved)) is not None:
            self.state.restore(*saved)
            logger.info("%s: continues at step %d of %d", self.task.title, self.state.step, self.params.max_steps)
        self.set_lr(max(0, self.state.step - 1))

    def set_lr(self, step: int) -> None:
        factor = lr_factor(step, self.params)
        set_lr(self.optimizers, factor)
        self.lr = self.params.lr * factor

    def train_step(self) -> bool:
        """Make one optimizer step. Return whether any rank was asked to stop."""
        step = self.state.step
        if self.world_size > 1:
            torch.manual_seed(self.seed + step * self.world_size + self.rank)  # dropout differs between ranks
        with self.hooks.phase("data"):
            micro_batches = self.task.batches(step)
        with self.hooks.phase("training"):
            shards = [batch.shard(self.rank, self.world_size).to(self.device) for batch in micro_batches]
            self.set_lr(step)
            loss, grad_norm = forward_backward(self.objective, shards, self.params.grad_clip, self.autocast)
            check_loss(self.state, loss, grad_norm, micro_batches)
            with self.autocast:  # Muon has matrix products too
                for optimizer in self.optimizers:
                    optimizer.step()
            stopping = distributed.any_rank(self.hooks.should_stop())
        self.state.record(loss, self.lr)
        self.progress.advance(sum(batch.idx.numel() for batch in micro_batches), loss)
        if self.state.step % self.runtime.log_interval == 0:
            speed = self.progress.tokens_per_s()
            metrics = {"train/loss": loss, "lr": self.lr, "grad_norm": grad_norm, "tokens_per_s": speed}
            self.hooks.log(metrics, self.state.step)
        return stopping

    def evaluate(self) -> None:
        """Evaluate, log the metrics, remember the best weights and print a sample.

        Raises `StoppedError` when asked to stop meanwhile, and `DivergenceError` for a val/loss that is not finite.
        """
        state = self.state
        self.model.eval()
        with self.hooks.phase("evaluation"):
            with torch.no_grad(), self.autocast:
                metrics = dict(self.task.evaluate(stoppable(self.task.val_batches(), self.hooks.should_stop)))
                text = self.sample()
            if not math.isfinite(loss := metrics["val/loss"]):
                raise DivergenceError(f"step {state.step}, validation: loss {loss}: lower lr, or look at that split")
            train = {"train/loss": sum(state.losses) / len(state.losses)} if state.losses else {}  # none before step 1
            state.losses = []
            state.history.append({"step": float(state.step), **train, **metrics, "lr": self.lr})
            self.hooks.log(metrics, state.step)
            shown = ", ".join(f"{name} {value:.4f}" for name, value in state.history[-1].items() if name != "step")
            logger.info("%s: step %d, %s", self.task.title, state.step, shown)
            if text is not None:
                logger.info("  sample: %r", text)
            if loss < state.best_loss:
                state.remember_best(loss)
            else:
                state.evals_since_best += 1
        self.progress.restart_clock()

    def result(self, stopped: bool = False) -> FitResult:
        """Return the outcome: of the best weights, if those are in place, unless it stopped early."""
        state = self.state
        best_step = state.best_step if self.params.keep == "best" and not stopped else state.step
        return FitResult(state.step, best_step, state.history, state.curve_rows(self.lr), stopped)

    def sample(self) -> str | None:
        """Return a generated text on rank 0. One process may be stopped between its tokens."""
        if self.task.sample is None or self.rank > 0:
            return None
        with torch.compiler.set_stance("force_eager"):  # a sample has many shapes, and each would be compiled
            pieces = self.task.sample()
            return "".join(stoppable(pieces, self.hooks.should_stop) if self.world_size == 1 else pieces)

    def is_done(self) -> bool:
        patience = self.params.patience
        return self.state.step == self.params.max_steps or 0 < patience <= self.state.evals_since_best

    def save_if_due(self, stopping: bool) -> None:
        step = self.state.step
        if stopping or step % self.runtime.checkpoint_interval == 0 or step == self.params.max_steps:
            self.save(self.state_dir)
        if step == self.params.stable_steps:
            self.save(self.stable_dir)

    def save(self, folder: Path | None) -> None:
        if folder is not None:
            with self.hooks.phase("saving"):
                save_state(folder, self.state.step, *self.state.content())


def prepare_model(model: nn.Module, params: TrainParams, runtime: RuntimeParams) -> None:
    """Set dropout, activation checkpointing and compilation of the blocks."""
    for module in model.modules():
        if isinstance(module, GPT):
            module.set_dropout(params.dropout)
            module.activation_checkpointing = runtime.activation_checkpointing
    if runtime.compile:
        for module in model.modules():
            if isinstance(module, nn.ModuleList):  # the blocks: one compilation serves them all
                for block in module:
                    block.compile()


class Objective(nn.Module):
    """A model and its loss as one module, which several processes replicate and call."""

    def __init__(self, model: nn.Module, loss_function: LossFunction) -> None:
        super().__init__()
        self.model = model
        self.loss_function: Any = loss_function

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        sums: tuple[Tensor, Tensor] = self.loss_function(self.model, batch)
        return sums


def forward_backward(
    objective: nn.Module,
    micro_batches: list[Batch],
    grad_clip: float,
    autocast: contextlib.AbstractContextManager[Any],
) -> tuple[float, float]:
    """Compute the clipped gradients of the mean loss over all micro-batches. Return that loss and the unclipped norm.

    Micro-batches differ in their number of targets, and so do ranks. Their sums are added and divided once, which is
    exact.
    """
    objective.train()
    objective.zero_grad(set_to_none=True)
    device = next(objective.parameters()).device
    total, weight = torch.zeros((), device=device), torch.zeros((), device=device)
    for number, batch in enumerate(micro_batches, 1):
        unsynced = isinstance(objective, DistributedDataParallel) and number < len(micro_batches)
        with cast(DistributedDataParallel, objective).no_sync() if unsynced else contextlib.nullcontext():
            with autocast:
                loss, batch_weight = objective(batch)
            loss.backward()
        total += loss.detach()
        weight += batch_weight.to(device)
    total, weight = distributed.all_reduce(torch.stack((total, weight)))
    parameters = [p for p in objective.parameters() if p.grad is not None]
    for p in parameters:
        assert p.grad is not None
        p.grad /= weight / distributed.world_size()  # DistributedDataParallel has averaged over the ranks
    norm = torch.nn.utils.clip_grad_norm_(parameters, grad_clip if grad_clip > 0 else math.inf)
    return (total / weight).item(), norm.item()


def check_loss(state: TrainingState, loss: float, grad_norm: float, micro_batches: list[Batch]) -> None:
    """Raise an error before a bad gradient reaches the weights."""
    rows = ", ".join(str(row) for batch in micro_batches for row in batch.rows)
    where = f"step {state.step}, batch of rows {rows}"
    if not math.isfinite(loss) or not math.isfinite(grad_norm):
        found = f"{where}: loss {loss}, gradient norm {grad_norm}"
        if all((batch.targets == IGNORE_INDEX).all() for batch in micro_batches):
            raise InputError(f"{found}: no target in them counts; leave these rows out")
        raise DivergenceError(f"{found}: lower lr, or look at these rows")
    state.recent = [*state.recent[-19:], loss]
    mean = sum(state.recent) / len(state.recent)
    if len(state.recent) == 20 and mean > 2 * state.history[0]["val/loss"] + 2:
        raise DivergenceError(f"{where}: the loss of the last 20 steps exploded to {mean:.2f}: lower lr")
