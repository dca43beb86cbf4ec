"""Model folders (config.json, model.safetensors, the tokenizer; nothing pickled) and the state of a training."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self

import torch
from pydantic import ValidationError, model_validator
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

    @model_validator(mode="after")
    def _belongs_to_kind(self) -> Self:
        if (self.kind == "classifier") != (bool(self.labels) and self.max_length is not None):
            raise ValueError(f"labels and max_length go with kind classifier, found kind {self.kind}")
        if (self.kind == "instruct") != (self.template is not None):
            raise ValueError(f"a template goes with kind instruct, found kind {self.kind}")
        return self


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
    if tokenizer.vocab_size != config.gpt.vocab_size:
        raise InputError(
            f"{folder}: the tokenizer has {tokenizer.vocab_size} tokens, the model {config.gpt.vocab_size}; "
            "they do not belong together"
        )
    gpt = GPT(config.gpt)
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
    """Saves the state of a training at `step`, with a checksum; this state and the one before it are kept."""
    folder.mkdir(parents=True, exist_ok=True)
    payload = save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})
    state = {"sha256": checksum(payload, values), "values": values}
    path = folder / f"step-{step:08d}"
    with replaced_folder(path) as new:
        write_bytes(new / "state.safetensors", payload)
        write_bytes(new / "state.json", json.dumps(state).encode())
    states = saved_states(folder)
    i = states.index(path)
    for other in states[: max(0, i - 1)] + states[i + 1 :]:  # later ones are damaged: the training passed them over
        shutil.rmtree(other)


def load_state(folder: Path, say: Callable[[str], None]) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """The tensors and values of the newest sound state, or None; damaged ones are passed over with a message."""
    for path in reversed(saved_states(folder)):
        try:
            state = json.loads((path / "state.json").read_text())
            payload = (path / "state.safetensors").read_bytes()
            if checksum(payload, state["values"]) != state["sha256"]:
                raise ValueError("the checksum differs")
            return load(payload), state["values"]
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            say(f"{path}: damaged training state, passed over ({error})")
    return None


def checksum(payload: bytes, values: dict[str, Any]) -> str:
    digest = hashlib.sha256(payload)
    digest.update(json.dumps(values).encode())
    return digest.hexdigest()


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
    """A new empty folder that takes the place of `folder` when the block ends without an error.

    The earlier folder is moved aside before it is deleted: a kill never leaves half a folder under the name.
    """
    new, old = (folder.with_name(folder.name + ending) for ending in (".partial", ".old"))
    for leftover in (new, old):
        shutil.rmtree(leftover, ignore_errors=True)
    new.mkdir(parents=True)
    try:
        yield new
        if folder.exists():
            folder.rename(old)
        new.rename(folder)
        shutil.rmtree(old, ignore_errors=True)
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        if old.exists() and not folder.exists():
            old.rename(folder)
        raise
