"""Model folders (config.json, model.safetensors, the tokenizer; nothing pickled) and the state of a training."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load, load_file, save
from torch import Tensor, nn

from llm.config import GPTConfig, InputError, Strict, explain
from llm.model import GPT, GPTClassifier
from llm.tokenizer import Tokenizer


class ModelFolderConfig(Strict):
    """What `config.json` of a model folder holds."""

    kind: Literal["base", "classifier", "instruct"]
    gpt: GPTConfig
    labels: list[str] | None = None  # classifier: in the order of its outputs
    max_length: int | None = None  # classifier: tokens of a text that it reads
    template: Literal["alpaca", "chatml"] | None = None  # instruct: how a prompt is written


class ModelFolder(NamedTuple):
    model: GPT | GPTClassifier
    tokenizer: Tokenizer
    config: ModelFolderConfig


def save_model_folder(folder: Path, content: ModelFolder) -> None:
    """Writes a model folder; it appears whole or not at all, in place of any earlier one."""
    with replaced_folder(folder) as new:
        (new / "config.json").write_text(content.config.model_dump_json(indent=2, exclude_none=True) + "\n")
        # A tied head is the token embedding: stored once.
        weights = {
            name: tensor.detach().cpu().contiguous()
            for name, tensor in content.model.state_dict().items()
            if not (content.config.gpt.tie_embeddings and name.endswith("lm_head.weight"))
        }
        write_bytes(new / "model.safetensors", save(weights))
        content.tokenizer.save(new)


def load_model_folder(folder: Path, device: torch.device | str = "cpu", dropout: float = 0.0) -> ModelFolder:
    """Reads a model folder, in evaluation mode; raises `InputError` if anything of it is missing or does not fit.

    `dropout` is for training on: it belongs to a training, not to the weights.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise InputError(f"{folder}: not a model folder: config.json is missing; name a folder such as models/base")
    try:
        config = ModelFolderConfig.model_validate(json.loads(path.read_text(encoding="utf-8")))
    except ValidationError as error:
        raise InputError(explain(error, str(path))) from None
    except ValueError as error:
        raise InputError(f"{path}: not valid JSON ({error}); make the model folder again") from None
    config = config.model_copy(update={"gpt": config.gpt.model_copy(update={"dropout": dropout})})
    tokenizer = Tokenizer.load(folder)
    if tokenizer.vocab_size > config.gpt.vocab_size:
        raise InputError(
            f"{folder}: the tokenizer has {tokenizer.vocab_size} tokens, the model only {config.gpt.vocab_size}; "
            "they do not belong together"
        )
    gpt = GPT(config.gpt)
    if config.kind == "classifier" and not config.labels:
        raise InputError(f"{path}: a classifier needs labels; make the model folder again")
    model = GPTClassifier(gpt, len(config.labels)) if config.labels else gpt
    load_weights(model, folder / "model.safetensors", config.gpt.tie_embeddings)
    return ModelFolder(model.to(device).eval(), tokenizer, config)


def load_weights(model: nn.Module, path: Path, tied: bool) -> None:
    """Loads strictly: each tensor used once, shapes equal; what is left over or missing is named."""
    weights = read_safetensors(path)
    expected = model.state_dict()
    if tied:
        expected = {name: tensor for name, tensor in expected.items() if not name.endswith("lm_head.weight")}
    for name, tensor in expected.items():
        if name not in weights:
            raise InputError(f"{path}: tensor {name} is missing; the file does not belong to this config.json")
        if weights[name].shape != tensor.shape:
            found, wanted = list(weights[name].shape), list(tensor.shape)
            raise InputError(f"{path}: tensor {name} has shape {found}, config.json asks for {wanted}")
    if extra := sorted(set(weights) - set(expected)):
        raise InputError(f"{path}: tensor {extra[0]} has no place in the model ({len(extra)} left over)")
    model.load_state_dict(weights, strict=False)


def read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path}: cannot be read as safetensors ({error}); make or copy the file again") from None


# ---- training state --------------------------------------------------------------------------------------------------


def save_state(folder: Path, step: int, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
    """Saves the state of a training at `step`, with a checksum; the last two states are kept."""
    folder.mkdir(parents=True, exist_ok=True)
    payload = save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})
    state = {"sha256": hashlib.sha256(payload).hexdigest(), "values": values}
    with replaced_folder(folder / f"step-{step:08d}") as new:
        write_bytes(new / "state.safetensors", payload)
        write_bytes(new / "state.json", json.dumps(state).encode())
    for old in saved_states(folder)[:-2]:
        shutil.rmtree(old)


def load_state(folder: Path, say: Callable[[str], None]) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """The tensors and values of the newest sound state, or None; damaged ones are passed over with a message."""
    for path in reversed(saved_states(folder)):
        try:
            state = json.loads((path / "state.json").read_text())
            payload = (path / "state.safetensors").read_bytes()
            if hashlib.sha256(payload).hexdigest() != state["sha256"]:
                raise ValueError("the checksum differs")
            return load(payload), state["values"]
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            say(f"{path}: damaged training state, passed over ({error})")
    return None


def saved_states(folder: Path) -> list[Path]:
    """The complete states of a training, oldest first."""
    return sorted(path for path in folder.glob("step-*") if path.suffix == "")


# ---- files that appear whole or not at all ---------------------------------------------------------------------------


def write_bytes(path: Path, content: bytes) -> None:
    """Writes and syncs a file inside a folder that is not visible yet."""
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


@contextlib.contextmanager
def replaced_folder(folder: Path) -> Iterator[Path]:
    """A new empty folder that takes the place of `folder` when the block ends without an error."""
    new = folder.with_name(folder.name + ".partial")
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    try:
        yield new
        if folder.exists():
            shutil.rmtree(folder)
        new.rename(folder)
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        raise
