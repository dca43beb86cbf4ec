"""Resumable state of a training."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from llm.common.files import parse_json, replaced_folder

logger = logging.getLogger("llm")
MAX_POINTS = 1024  # of the curve of a training


def save_state(folder: Path, step: int, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
    """Save the state of a training at `step` with a checksum. Keep it and the state before it."""
    folder.mkdir(parents=True, exist_ok=True)
    payload = save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})
    state = {"sha256": checksum(payload, values), "values": values}
    path = folder / f"step-{step:08d}"
    with replaced_folder(path) as new:
        (new / "state.safetensors").write_bytes(payload)
        (new / "state.json").write_text(json.dumps(state), encoding="utf-8")
    states = saved_states(folder)
    i = states.index(path)
    for other in states[: max(0, i - 1)] + states[i + 1 :]:  # later ones the training has passed over
        shutil.rmtree(other)


def load_state(folder: Path, up_to: float = math.inf) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """Return the tensors and values of the newest sound state up to step `up_to`, or None.

    Damaged states are passed over with a message.
    """
    for path in reversed(saved_states(folder)):
        if int(path.name.removeprefix("step-")) > up_to:
            continue
        try:
            state = parse_json((path / "state.json").read_text())
            payload = (path / "state.safetensors").read_bytes()
            if checksum(payload, state["values"]) != state["sha256"]:
                raise ValueError("the checksum differs")
            return load(payload), state["values"]
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            logger.warning("%s: damaged training state, passed over (%s)", path, error)
    return None


def checksum(payload: bytes, values: dict[str, Any]) -> str:
    digest = hashlib.sha256(payload)
    digest.update(json.dumps(values).encode())
    return digest.hexdigest()


def saved_states(folder: Path) -> list[Path]:
    """Return the folders of all complete states, oldest first."""
    return sorted(path for path in folder.glob("step-*") if path.suffix == "")


class TrainingState:
    """Step, weights, optimizer states and random generators: all that a resumed training needs."""

    def __init__(self, model: nn.Module, optimizers: list[torch.optim.Optimizer]) -> None:
        self.model, self.optimizers = model, optimizers
        self.step = 0
        self.losses: list[float] = []  # of the steps since the last evaluation
        self.curve: list[list[float]] = []  # step, mean loss and learning rate of each block of `block_steps` steps
        self.block: list[float] = []  # losses of the steps since the last point of the curve
        self.block_steps = 1
        self.recent: list[float] = []  # of the last 20 steps
        self.history: list[dict[str, float]] = []
        self.best_loss, self.best_step, self.evals_since_best = math.inf, 0, 0
        self.best: dict[str, Tensor] = {}  # the trained weights at best_step

    def record(self, loss: float, lr: float) -> None:
        """Count a step, and add it to the curve, whose blocks double when they are many: it follows from the losses."""
        self.step += 1
        self.losses.append(loss)
        self.block.append(loss)
        if len(self.block) == self.block_steps:
            self.curve.append([self.step, sum(self.block) / len(self.block), lr])
            self.block = []
        if len(self.curve) == MAX_POINTS:
            pairs = zip(self.curve[::2], self.curve[1::2], strict=True)
            self.curve = [[step, (first + second) / 2, lr] for (_, first, _), (step, second, lr) in pairs]
            self.block_steps *= 2

    def curve_rows(self, lr: float) -> list[dict[str, float]]:
        """Return the curve, with a last block that may be shorter and ends with the learning rate `lr`."""
        rest = [[self.step, sum(self.block) / len(self.block), lr]] if self.block else []
        return [dict(zip(("step", "train/loss", "lr"), point, strict=True)) for point in self.curve + rest]

    def remember_best(self, loss: float) -> None:
        self.best_loss, self.best_step, self.evals_since_best = loss, self.step, 0
        self.best = {name: p.detach().clone() for name, p in self.model.named_parameters() if p.requires_grad}

    def restore_best(self) -> None:
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
            for name in (
                *("step", "losses", "recent", "history", "curve", "block", "block_steps"),
                *("best_loss", "best_step", "evals_since_best"),
            )
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
