"""One `fit` for all three trainings: the loss and the batches are its arguments."""

from __future__ import annotations

import contextlib
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from llm.common import distributed
from llm.common.errors import InputError
from llm.config import RuntimeParams, TrainParams
from llm.data.batches import IGNORE_INDEX, Batch
from llm.model.gpt import GPT
from llm.training.losses import LossFunction, _should_stop, _StoppedError
from llm.training.optim import make_optimizers, set_lr
from llm.training.precision import keep_freed_memory, precision
from llm.training.schedule import lr_factor
from llm.training.state import TrainingState, load_state, save_state


class FitResult(NamedTuple):
    steps: int  # optimizer steps that were made
    best_step: int  # the step whose weights the model has now
    history: list[dict[str, float]]  # a row for each evaluation
    stopped: bool = False  # before its end, because a process was asked to

    @property
    def best_metrics(self) -> dict[str, float]:
        """The losses at `best_step`: those of the weights that the model has now."""
        row = next(row for row in reversed(self.history) if row["step"] <= self.best_step)
        return {name: value for name, value in row.items() if "/" in name}


def fit(
    model: nn.Module,
    loss_function: LossFunction,
    batches: Callable[[int], list[Batch]],
    params: TrainParams,
    runtime: RuntimeParams,
    *,
    evaluate: Callable[[], Mapping[str, float]],
    sample: Callable[[], str] | None = None,
    log: Callable[[Mapping[str, float], int], None] = lambda metrics, step: None,
    state_dir: Path | None = None,
    stable_dir: Path | None = None,
    should_stop: Callable[[], bool] = lambda: False,
    phase: Callable[[str], contextlib.AbstractContextManager[object]] = lambda name: contextlib.nullcontext(),
    title: str = "training",
) -> FitResult:
    """Trains `model` in place, on the device it is on, for `params.max_steps` optimizer steps.

    `batches(step)` returns the micro-batches of a step and depends on nothing but the step, so that a training that is
    continued from `state_dir` reads what it would have read; with the weights, the optimizers and the random generators
    restored it ends with the same bits. `evaluate()` returns metrics, `val/loss` among them.

    With schedule wsd the state that the decay begins with is left in `stable_dir`, for trainings that differ in nothing
    but `max_steps` and `decay_steps`: one whose own decay begins there or later starts with that state, to the same
    bits as if it had made all the steps.

    Raises `InputError` when the loss is not finite or explodes. Returns early, with the state saved, when
    `should_stop()` says so: after a step, or in the middle of an evaluation, which is then made again.

    `phase(name)` is entered around what takes time: `start-up`, `data` (batches), `training`, `evaluation`, `saving`.

    Of several processes (`llm.common.distributed`) each reads a part of the rows of every batch; the losses are those
    of one process up to rounding. Rank 0 alone prints, saves and samples; they stop together.
    """
    device, rank, n_processes = next(model.parameters()).device, distributed.rank(), distributed.world_size()
    seed = torch.initial_seed()
    keep_freed_memory()
    with phase("start-up"):  # torch loads its compiler with the first optimizer, needed or not
        optimizers = make_optimizers(model, params)
    for module in model.modules():
        if isinstance(module, GPT):
            module.set_dropout(params.dropout)
            module.activation_checkpointing = runtime.activation_checkpointing
    if runtime.compile:
        for module in model.modules():
            if isinstance(module, nn.ModuleList):  # the blocks: one compilation serves them all
                for block in module:
                    block.compile()
    objective = distributed.replicate(_Objective(model, loss_function))
    mixed = precision(device, runtime)
    if n_processes > 1:
        _say(f"{title}: {n_processes} processes train together")

    state = TrainingState(model, optimizers)
    if rank > 0:
        state_dir, sample = None, None
    if rank > 0 or params.schedule != "wsd":
        stable_dir = None
    saved = load_state(state_dir, _say) if state_dir is not None else None
    if saved is None and stable_dir is not None:
        saved = load_state(stable_dir, _say, up_to=params.stable_steps)
    if (saved := distributed.broadcast_state(saved)) is not None:
        state.restore(*saved)
        _say(f"{title}: continues at step {state.step} of {params.max_steps}")

    interval = 0.5 if sys.stderr.isatty() else 20.0  # seconds between two pictures of the bar
    bar = tqdm(
        total=params.max_steps, initial=state.step, desc=title, unit="step", mininterval=interval, disable=rank > 0
    )
    last_log, tokens_since_log = time.perf_counter(), 0
    with bar:
        while True:
            if state.step % params.eval_interval == 0 or state.step == params.max_steps:
                try:
                    with phase("evaluation"):
                        _evaluate(state, model, params, runtime, evaluate, sample, log, should_stop, title)
                except _StoppedError:
                    if state_dir is not None:
                        with phase("saving"):
                            save_state(state_dir, state.step, *state.content())
                    return FitResult(state.step, state.step, state.history, stopped=True)
                if state.step == params.max_steps or (params.patience and state.evals_since_best >= params.patience):
                    break
                last_log, tokens_since_log = time.perf_counter(), 0
            if n_processes > 1:
                torch.manual_seed(seed + state.step * n_processes + rank)  # dropout: not the same in each
            with phase("data"):
                micro_batches = batches(state.step)
            with phase("training"):
                parts = [batch.shard(rank, n_processes).to(device) for batch in micro_batches]
                set_lr(optimizers, lr_factor(state.step, params))
                loss, grad_norm = _step(objective, parts, optimizers, params.grad_clip, device, mixed)
                _guard(state, loss, grad_norm, micro_batches)
                with mixed:  # Muon makes products too
                    for optimizer in optimizers:
                        optimizer.step()
                stopping = distributed.any_rank(should_stop())
            state.step += 1
            state.losses.append(loss)
            tokens_since_log += sum(batch.idx.numel() for batch in micro_batches)
            bar.update()
            if state.step % runtime.log_interval == 0:
                now = time.perf_counter()
                tokens_per_s = tokens_since_log / (now - last_log)
                last_log, tokens_since_log = now, 0
                lr = params.lr * lr_factor(state.step - 1, params)
                log({"train/loss": loss, "lr": lr, "grad_norm": grad_norm, "tokens_per_s": tokens_per_s}, state.step)
                bar.set_postfix_str(f"loss {loss:.4f}, {tokens_per_s:,.0f} tokens/s", refresh=False)
            due = stopping or state.step % runtime.checkpoint_interval == 0 or state.step == params.max_steps
            if state_dir is not None and due:
                with phase("saving"):
                    save_state(state_dir, state.step, *state.content())
            if stable_dir is not None and state.step == params.stable_steps:
                with phase("saving"):
                    save_state(stable_dir, state.step, *state.content())
            if stopping:
                return FitResult(state.step, state.step, state.history, stopped=True)
    if params.keep == "best":
        state.restore_best()
    return FitResult(state.step, state.best_step if params.keep == "best" else state.step, state.history)


def _say(message: str) -> None:
    if distributed.rank() == 0:
        tqdm.write(message, file=sys.stderr)


class _Objective(nn.Module):
    """A model and its loss as one module: what several processes replicate is what they call."""

    def __init__(self, model: nn.Module, loss_function: LossFunction) -> None:
        super().__init__()
        self.model = model
        self.loss_function: Any = loss_function

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        sums: tuple[Tensor, Tensor] = self.loss_function(self.model, batch)
        return sums


def _step(
    objective: nn.Module,
    micro_batches: list[Batch],
    optimizers: list[torch.optim.Optimizer],
    grad_clip: float,
    device: torch.device,
    mixed: contextlib.AbstractContextManager[Any],
) -> tuple[float, float]:
    """Gradients of the mean loss over all micro-batches, clipped; returns that loss and the norm before clipping.

    Micro-batches hold different numbers of targets, in each process its own: the sums are added and divided once,
    which is exact.
    """
    objective.train()
    for optimizer in optimizers:
        optimizer.zero_grad(set_to_none=True)
    total, weight = torch.zeros((), device=device), torch.zeros((), device=device)
    for number, batch in enumerate(micro_batches, 1):
        unsent = isinstance(objective, DistributedDataParallel) and number < len(micro_batches)
        with cast(DistributedDataParallel, objective).no_sync() if unsent else contextlib.nullcontext():
            with mixed:
                loss, batch_weight = objective(batch)
            loss.backward()
        total += loss.detach()
        weight += batch_weight.to(device)
    total, weight = distributed.all_reduce(torch.stack((total, weight)))
    parameters = [p for p in objective.parameters() if p.grad is not None]
    for p in parameters:
        assert p.grad is not None
        p.grad /= weight / distributed.world_size()  # gradients are means over the processes
    norm = torch.nn.utils.clip_grad_norm_(parameters, grad_clip if grad_clip > 0 else math.inf)
    return (total / weight).item(), norm.item()


def _guard(state: TrainingState, loss: float, grad_norm: float, micro_batches: list[Batch]) -> None:
    """Stops before a bad gradient reaches the weights."""
    rows = ", ".join(str(row) for batch in micro_batches for row in batch.rows)
    where = f"step {state.step}, batch of rows {rows}"
    if not math.isfinite(loss) or not math.isfinite(grad_norm):
        counted = any((batch.targets != IGNORE_INDEX).any() for batch in micro_batches)
        remedy = "lower lr, or look at these rows" if counted else "no target in them counts; leave these rows out"
        raise InputError(f"{where}: loss {loss}, gradient norm {grad_norm}: {remedy}")
    state.recent = [*state.recent[-19:], loss]
    mean = sum(state.recent) / len(state.recent)
    if len(state.recent) == 20 and mean > 2 * state.history[0]["train/loss"] + 2:
        raise InputError(f"{where}: the loss of the last 20 steps exploded to {mean:.2f}: lower lr")


def _evaluate(
    state: TrainingState,
    model: nn.Module,
    params: TrainParams,
    runtime: RuntimeParams,
    evaluate: Callable[[], Mapping[str, float]],
    sample: Callable[[], str] | None,
    log: Callable[[Mapping[str, float], int], None],
    should_stop: Callable[[], bool],
    title: str,
) -> None:
    """Adds a row to the history, remembers the best weights and shows a sample.

    Raises `_StoppedError` when `should_stop()` says so meanwhile, and `InputError` when val/loss is not finite.
    """
    model.eval()
    device = next(model.parameters()).device
    with torch.no_grad(), precision(device, runtime), _stopped_by(should_stop, model):
        metrics = dict(evaluate())
        with torch.compiler.set_stance("force_eager"):  # a sample's many shapes would each be compiled
            text = sample() if sample is not None else None
    if not math.isfinite(metrics["val/loss"]):
        raise InputError(f"step {state.step}, validation: loss {metrics['val/loss']}: lower lr, or look at that split")
    train_loss = sum(state.losses) / len(state.losses) if state.losses else metrics["val/loss"]
    state.losses = []
    row = {"step": float(state.step), "train/loss": train_loss, **metrics}
    row["lr"] = params.lr * lr_factor(max(0, state.step - 1), params)
    state.history.append(row)
    log(metrics, state.step)
    figures = ", ".join(f"{name} {value:.4f}" for name, value in row.items() if name != "step")
    _say(f"{title}: step {state.step}, {figures}")
    if text is not None:
        _say(f"  sample: {text!r}")
    if metrics["val/loss"] < state.best_loss:
        state.remember_best(metrics["val/loss"])
    else:
        state.evals_since_best += 1


@contextlib.contextmanager
def _stopped_by(should_stop: Callable[[], bool], model: nn.Module) -> Iterator[None]:
    """Within it a long evaluation does not delay a stop: each batch asks first, see also `_own`.

    One process asks whenever a GPT has read something, for a sample too. Several can only stop at the same place:
    `_own` asks.
    """

    def ask(module: nn.Module, arguments: object) -> None:
        if should_stop():
            raise _StoppedError

    alone = distributed.world_size() == 1
    gpts = [module for module in model.modules() if isinstance(module, GPT)]
    hooks = [gpt.final_norm.register_forward_pre_hook(ask) for gpt in gpts if alone]
    token = _should_stop.set(should_stop)
    try:
        yield
    finally:
        _should_stop.reset(token)
        for hook in hooks:
            hook.remove()
