"""One `fit` for all three trainings: the loss and the batches are its arguments."""

from __future__ import annotations

import contextlib
import ctypes
import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from llm.checkpoint.folder import gpt_of, load_state, save_state
from llm.common import distributed as parallel
from llm.config import InputError, RuntimeParams, TrainParams
from llm.data.examples import IGNORE, Batch, Collate, Example, batches_by_length
from llm.model.gpt import GPT, GPTClassifier
from llm.model.lora import add_lora
from llm.model.loss import linear_cross_entropy
from llm.training.optim import lr_factor, make_optimizers, set_lr

# A loss function returns the sum of the losses in nats and the weight that it sums to (the number of counted targets).
LossFunction = Callable[[Any, Batch], tuple[Tensor, Tensor]]

KEPT_BYTES = 2**29  # the most that `keep_lower` may take for one set of examples, in all processes together


class FitResult(NamedTuple):
    steps: int  # optimizer steps that were made
    best_step: int  # the step whose weights the model has now
    history: list[dict[str, float]]  # a row for each evaluation
    stopped: bool = False  # before its end, because a process was asked to

    @property
    def kept(self) -> dict[str, float]:
        """The losses at `best_step`: those of the weights that the model has now."""
        row = next(row for row in reversed(self.history) if row["step"] <= self.best_step)
        return {name: value for name, value in row.items() if "/" in name}


def next_token_loss(model: GPT, batch: Batch) -> tuple[Tensor, Tensor]:
    """Cross entropy over the counted targets; positions whose target is ignored never reach the output layer."""
    targets = batch.targets.flatten()  # [B*T]
    counted = (targets != IGNORE).nonzero().squeeze(1)  # [N]
    hidden = model.hidden(batch.idx, lower=batch.lower, n_lower=batch.n_lower).flatten(0, 1)  # [B*T, C]
    if len(counted) < len(targets):
        hidden, targets = hidden.index_select(0, counted), targets.index_select(0, counted)  # [N, C], [N]
    return linear_cross_entropy(hidden, model.lm_head.weight, targets), torch.tensor(float(len(counted)))


def label_loss(model: GPTClassifier, batch: Batch, class_weights: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Cross entropy of the labels, each weighted by its class."""
    logits = model(batch.idx, batch.lengths, batch.lower, batch.n_lower)  # [B, labels]
    return weighted_cross_entropy(logits, batch.targets, class_weights)


def weighted_cross_entropy(logits: Tensor, labels: Tensor, class_weights: Tensor | None) -> tuple[Tensor, Tensor]:
    loss = F.cross_entropy(logits.float(), labels, weight=class_weights, reduction="sum")
    weight = class_weights[labels].sum() if class_weights is not None else torch.tensor(float(len(logits)))
    return loss, weight


def mean_loss(model: nn.Module, loss_function: LossFunction, batches: Iterable[Batch]) -> float:
    """The exact mean in nats over all counted targets of all batches."""
    device = next(model.parameters()).device
    loss, weight = _totals(2, (loss_function(model, batch.to(device)) for batch in _own(batches)))
    return loss / weight


def label_metrics(
    model: GPTClassifier, batches: Iterable[Batch], class_weights: Tensor | None = None
) -> dict[str, float]:
    """The exact mean loss, and the fraction of messages whose likeliest label is theirs."""
    device = next(model.parameters()).device

    def sums(batch: Batch) -> tuple[Tensor, ...]:
        logits = model(batch.idx, batch.lengths, batch.lower, batch.n_lower)  # [B, labels]
        right = (logits.argmax(dim=-1) == batch.targets).sum()
        return *weighted_cross_entropy(logits, batch.targets, class_weights), right, torch.tensor(len(logits))

    loss, weight, right, rows = _totals(4, (sums(batch.to(device)) for batch in _own(batches)))
    return {"val/loss": loss / weight, "val/accuracy": right / rows}


def _own(batches: Iterable[Batch]) -> Iterator[Batch]:
    """Those of the batches that this process evaluates. Before each round the processes agree whether to go on."""
    rounds = iter(batches)
    while batches_of_round := list(islice(rounds, parallel.world_size())):
        if parallel.anywhere(_should_stop.get()()):
            raise _StoppedError
        yield from batches_of_round[parallel.rank() :][:1]


def _totals(n: int, sums: Iterable[tuple[Tensor, ...]]) -> list[float]:
    """The `n` sums over all batches of all processes; the second one is the weight, which cannot be zero."""
    totals = torch.zeros(n, dtype=torch.float64)
    for values in sums:
        totals += torch.tensor([value.item() for value in values], dtype=torch.float64)
    totals = parallel.total(totals)
    if not totals[1]:
        raise InputError("there is nothing to evaluate on: the validation split is empty; give more data to tokenize")
    found: list[float] = totals.tolist()
    return found


def freeze(model: GPT | GPTClassifier, params: TrainParams) -> None:
    """Leaves only what `params.trainable` says to be trained: in fp32, and the rest in the dtype that it has.

    `head`: a classifier's. `last_blocks`: so many, with the final norm and a classifier's head. `lora`: adapters, which
    are added here, and a classifier's head. `all`: everything that the loss depends on.
    """
    gpt, n = gpt_of(model), params.last_blocks
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
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def frozen_blocks(model: GPT | GPTClassifier) -> int:
    """How many of the lowest blocks, with the embeddings below them, a training leaves as they are."""
    gpt = gpt_of(model)
    layers = [nn.ModuleList(child for child in gpt.children() if isinstance(child, nn.Embedding)), *gpt.blocks]
    trained = [any(p.requires_grad for p in layer.parameters()) for layer in layers]
    return max(0, trained.index(True) - 1) if True in trained else len(gpt.blocks)


def keep_lower(
    model: GPT | GPTClassifier,
    examples: Sequence[Example],
    collate: Collate,
    params: TrainParams,
    runtime: RuntimeParams,
    reads: int,
) -> Collate:
    """A `collate` for these examples whose batches also hold what the frozen lower blocks make of them.

    That never changes while nothing below is trained or dropped: it is computed here, once for each example, and kept
    in memory. What stands behind an example's last token does not change it, as attention is causal and positions
    count from the first token. The batches in which it is computed depend on nothing but the examples, so that a
    training that is continued has the same bits.

    Returns `collate` itself where every block is trained, with dropout, for fewer `reads` of examples than there are,
    and where it would take more than `KEPT_BYTES`: then the lower blocks run every time.
    """
    gpt, n = gpt_of(model), frozen_blocks(model)
    if n == 0 or params.dropout > 0 or reads < len(examples):
        return collate
    size = sum(len(example.ids) for example in examples) * gpt.config.emb_dim * 4
    what = f"what the lower {n} of {len(gpt.blocks)} blocks make of {len(examples):,} examples"
    if size * parallel.world_size() > KEPT_BYTES:
        _say(f"{what} would take {size / 1e6:,.0f} MB in each process: it is computed again at every step")
        return collate
    _say(f"{what} is computed once and kept: {size / 1e6:,.1f} MB in each process")
    device = gpt.tok_emb.weight.device
    kept: dict[int, Tensor] = {}
    with torch.no_grad(), precision(device, runtime):
        for batch in batches_by_length(examples, collate, params.batch_size):
            assert batch.lengths is not None
            lower = gpt.stream(batch.idx.to(device), n).cpu()  # [B, T, C]
            for row, states, length in zip(batch.rows, lower, batch.lengths.tolist(), strict=True):
                kept[row] = states[:length].clone()  # [length, C]

    def collate_with_lower(all_examples: Sequence[Example], rows: Sequence[int]) -> Batch:
        assert all_examples is examples
        lower = pad_sequence([kept[row] for row in rows], batch_first=True)  # [B, T, C]
        return collate(examples, rows)._replace(lower=lower, n_lower=n)

    return collate_with_lower


def pick_device(name: str) -> torch.device:
    """`auto` is CUDA, else Apple's MPS, else the CPU."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError("runtime.device: cuda was asked for, but torch sees no CUDA device; use auto or cpu")
    if name == "mps" and not torch.backends.mps.is_available():
        raise InputError("runtime.device: mps was asked for, but torch sees no Apple GPU; use auto or cpu")
    return torch.device(name)


def precision(device: torch.device, runtime: RuntimeParams) -> contextlib.AbstractContextManager[Any]:
    """Matrix products in bf16 where `mixes` says so, with weights and all else in fp32.

    Whether a GPU may make those in fp32 as TF32, with 10 bits of mantissa in place of 23, is a setting of the process.
    """
    torch.set_float32_matmul_precision("high" if runtime.precision == "tf32" else "highest")
    return torch.autocast(device.type, torch.bfloat16) if mixes(device, runtime) else contextlib.nullcontext()


def mixes(device: torch.device, runtime: RuntimeParams) -> bool:
    """Whether products are made in bf16: on CUDA if nothing else is said, on a CPU where it is asked for.

    A CPU without units for them would take a hundred times as long: there it is refused.
    """
    if runtime.precision == "auto":
        return device.type == "cuda"
    has_units = device.type == "cuda" or (runtime.precision == "bf16" and device.type == "cpu" and has_bf16_units())
    if runtime.precision in ("bf16", "tf32") and not has_units:
        raise InputError(
            f"runtime.precision: {runtime.precision} was asked for, but this {device.type} device has no units for it; "
            "use auto or fp32"
        )
    return runtime.precision == "bf16"


def has_bf16_units() -> bool:
    """Of this CPU: x86's AVX512 or AMX, or ARM's."""
    found = torch.cpu.get_capabilities()
    return any(found.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def base_dtype(device: torch.device, runtime: RuntimeParams) -> torch.dtype | None:
    """What a finetuning loads its base in: None, as it is stored, where `precision` mixes dtypes; fp32 elsewhere."""
    return None if mixes(device, runtime) else torch.float32


def keep_freed_memory() -> None:
    """Has glibc keep what a step frees for the next one, which would have to be given it again page by page."""
    with contextlib.suppress(OSError, AttributeError):  # another C library
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-4, 0)  # M_MMAP_MAX: no block is a mapping of its own, which would go back to the system
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: as much free heap stays


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

    Of several processes (`llm.common.distributed`) each reads a part of the rows of every batch; the losses are those of one
    process up to rounding. Rank 0 alone prints, saves and samples; they stop together, at one of the same places.
    """
    device, rank, n_processes = next(model.parameters()).device, parallel.rank(), parallel.world_size()
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
    objective = parallel.replicated(_Objective(model, loss_function))
    mixed = precision(device, runtime)
    if n_processes > 1:
        _say(f"{title}: {n_processes} processes train together")

    state = _State(model, optimizers)
    if rank > 0:
        state_dir, sample = None, None
    if rank > 0 or params.schedule != "wsd":
        stable_dir = None
    saved = load_state(state_dir, _say) if state_dir is not None else None
    if saved is None and stable_dir is not None:
        saved = load_state(stable_dir, _say, up_to=params.stable_steps)
    if (saved := parallel.share(saved)) is not None:
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
                parts = [batch.part(rank, n_processes).to(device) for batch in micro_batches]
                set_lr(optimizers, lr_factor(state.step, params))
                loss, grad_norm = _step(objective, parts, optimizers, params.grad_clip, device, mixed)
                _guard(state, loss, grad_norm, micro_batches)
                with mixed:  # Muon makes products too
                    for optimizer in optimizers:
                        optimizer.step()
                stopping = parallel.anywhere(should_stop())
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
        state.take_best()
    return FitResult(state.step, state.best_step if params.keep == "best" else state.step, state.history)


def _say(message: str) -> None:
    if parallel.rank() == 0:
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
    total, weight = parallel.total(torch.stack((total, weight)))
    parameters = [p for p in objective.parameters() if p.grad is not None]
    for p in parameters:
        assert p.grad is not None
        p.grad /= weight / parallel.world_size()  # gradients are means over the processes
    norm = torch.nn.utils.clip_grad_norm_(parameters, grad_clip if grad_clip > 0 else math.inf)
    return (total / weight).item(), norm.item()


def _guard(state: _State, loss: float, grad_norm: float, micro_batches: list[Batch]) -> None:
    """Stops before a bad gradient reaches the weights."""
    rows = ", ".join(str(row) for batch in micro_batches for row in batch.rows)
    where = f"step {state.step}, batch of rows {rows}"
    if not math.isfinite(loss) or not math.isfinite(grad_norm):
        counted = any((batch.targets != IGNORE).any() for batch in micro_batches)
        remedy = "lower lr, or look at these rows" if counted else "no target in them counts; leave these rows out"
        raise InputError(f"{where}: loss {loss}, gradient norm {grad_norm}: {remedy}")
    state.recent = [*state.recent[-19:], loss]
    mean = sum(state.recent) / len(state.recent)
    if len(state.recent) == 20 and mean > 2 * state.history[0]["train/loss"] + 2:
        raise InputError(f"{where}: the loss of the last 20 steps exploded to {mean:.2f}: lower lr")


def _evaluate(
    state: _State,
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


class _StoppedError(Exception):
    """An evaluation was left before its end; it has changed nothing."""


_should_stop: ContextVar[Callable[[], bool]] = ContextVar("should_stop", default=lambda: False)


@contextlib.contextmanager
def _stopped_by(should_stop: Callable[[], bool], model: nn.Module) -> Iterator[None]:
    """Within it a long evaluation does not delay a stop: each batch asks first, see also `_own`.

    One process asks whenever a GPT has read something, for a sample too. Several can only stop at the same place:
    `_own` asks.
    """

    def ask(module: nn.Module, arguments: object) -> None:
        if should_stop():
            raise _StoppedError

    alone = parallel.world_size() == 1
    gpts = [module for module in model.modules() if isinstance(module, GPT)]
    hooks = [gpt.final_norm.register_forward_pre_hook(ask) for gpt in gpts if alone]
    token = _should_stop.set(should_stop)
    try:
        yield
    finally:
        _should_stop.reset(token)
        for hook in hooks:
            hook.remove()


class _State:
    """Everything that a training needs to go on where it stopped."""

    def __init__(self, model: nn.Module, optimizers: list[torch.optim.Optimizer]) -> None:
        self.model, self.optimizers = model, optimizers
        self.step = 0
        self.losses: list[float] = []  # of the steps since the last evaluation
        self.recent: list[float] = []  # of the last 20 steps
        self.history: list[dict[str, float]] = []
        self.best_loss, self.best_step, self.evals_since_best = math.inf, 0, 0
        self.best: dict[str, Tensor] = {}  # the trained weights at best_step

    def remember_best(self, loss: float) -> None:
        self.best_loss, self.best_step, self.evals_since_best = loss, self.step, 0
        self.best = {name: p.detach().clone() for name, p in self.model.named_parameters() if p.requires_grad}

    def take_best(self) -> None:
        with torch.no_grad():
            for name, p in self.model.named_parameters():
                if name in self.best:
                    p.copy_(self.best[name])

    def content(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors = {f"model.{name}": p.detach() for name, p in self.model.named_parameters() if p.requires_grad}
        tensors |= {f"best.{name}": tensor for name, tensor in self.best.items()}
        for i, optimizer in enumerate(self.optimizers):
            for j, entries in optimizer.state_dict()["state"].items():
                tensors |= {f"optimizer.{i}.{j}.{key}": value for key, value in entries.items()}
        tensors["random.cpu"] = torch.get_rng_state()
        if torch.cuda.is_available():
            tensors["random.cuda"] = torch.cuda.get_rng_state()
        values = {
            name: getattr(self, name)
            for name in ("step", "losses", "recent", "history", "best_loss", "best_step", "evals_since_best")
        }
        return tensors, values

    def restore(self, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
        for name, value in values.items():
            setattr(self, name, value)
        parameters = dict(self.model.named_parameters())
        states: list[dict[int, dict[str, Tensor]]] = [{} for _ in self.optimizers]
        with torch.no_grad():
            for name, tensor in tensors.items():
                part, rest = name.split(".", 1)
                if part == "model":
                    parameters[rest].copy_(tensor)
                elif part == "best":
                    self.best[rest] = tensor.to(parameters[rest].device)
                elif part == "optimizer":
                    i, j, key = rest.split(".")
                    states[int(i)].setdefault(int(j), {})[key] = tensor
        for optimizer, state in zip(self.optimizers, states, strict=True):
            optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
        torch.set_rng_state(tensors["random.cpu"])
        if "random.cuda" in tensors and torch.cuda.is_available():
            torch.cuda.set_rng_state(tensors["random.cuda"])
