"""Model folders (config.json, model.safetensors, the tokenizer; nothing pickled) and the state of a training."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self

import torch
from pydantic import ValidationError, model_validator
from safetensors import SafetensorError, safe_open
from safetensors.torch import load, save, save_file
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from llm.config import GPTConfig, InputError, Positive, Strict, Template, explain, parse_json
from llm.model.gpt import GPT, GPTClassifier
from llm.tokenizer.bpe import Tokenizer


class ModelFolderConfig(Strict):
    """What `config.json` of a model folder holds."""

    kind: Literal["base", "classifier", "instruct"]
    gpt: GPTConfig
    labels: list[str] | None = None  # classifier: in the order of its outputs
    max_length: Positive | None = None  # classifier: tokens of a text that it reads
    template: Template | None = None  # instruct: how a prompt is written
    system: str | None = None  # instruct: what stands before every prompt, where the template has a place for it

    @model_validator(mode="after")
    def _belongs_to_kind(self) -> Self:
        if (self.kind == "classifier") != (bool(self.labels) and self.max_length is not None):
            raise ValueError(f"labels and max_length go with kind classifier, found kind {self.kind}")
        if (self.kind == "instruct") != (self.template is not None):
            raise ValueError(f"a template goes with kind instruct, found kind {self.kind}")
        if self.system is not None and self.template in (None, "alpaca"):
            raise ValueError(f"system goes with the templates chatml and llama3, found {self.template}")
        return self


class ModelFolder(NamedTuple):
    model: GPT | GPTClassifier
    tokenizer: Tokenizer
    config: ModelFolderConfig


def language_model(model: GPT, tokenizer: Tokenizer, template: Template | None, system: str | None) -> ModelFolder:
    """A GPT as a model folder's content, in evaluation mode: of kind instruct where there is a template, else base."""
    kind: Literal["base", "instruct"] = "base" if template is None else "instruct"
    config = ModelFolderConfig(kind=kind, gpt=model.config, template=template, system=system)
    return ModelFolder(model.eval(), tokenizer, config)


def save_model_folder(folder: Path, content: ModelFolder, more: Mapping[str, bytes] | None = None) -> None:
    """Writes a model folder; it appears whole or not at all, in place of any earlier one.

    `more` are further files, by their path inside the folder.
    """
    with replaced_folder(folder) as new:
        (new / "config.json").write_text(content.config.model_dump_json(indent=2, exclude_none=True) + "\n")
        weights = {name: tensor.detach().cpu().contiguous() for name, tensor in stored_tensors(content.model).items()}
        write_tensors(new / "model.safetensors", weights)
        content.tokenizer.save(new)
        for name, data in (more or {}).items():
            (new / name).parent.mkdir(exist_ok=True)
            (new / name).write_bytes(data)


def load_model_folder(
    folder: Path,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = torch.float32,
) -> ModelFolder:
    """Reads a model folder, in evaluation mode; raises `InputError` if anything of it is missing or does not fit.

    `dtype` None leaves the weights in the one that they are stored in.
    """
    config, tokenizer = read_model_folder(folder)
    path = folder / "model.safetensors"
    found = stored_shapes(path)
    check_layers(path, len(found), config.gpt)
    with without_weights():
        gpt = GPT(config.gpt)
        model = GPTClassifier(gpt, len(config.labels)) if config.labels else gpt
    load_weights(model, path, found, torch.device(device), dtype)
    return ModelFolder(model.eval(), tokenizer, config)


def read_model_folder(folder: Path) -> tuple[ModelFolderConfig, Tokenizer]:
    """What a model folder says about its model, without the weights."""
    path = folder / "config.json"
    if not path.is_file():
        raise InputError(f"{folder}: not a model folder: config.json is missing; name a folder such as models/base")
    try:
        config = ModelFolderConfig.model_validate(parse_json(path.read_text(encoding="utf-8")))
    except ValidationError as error:
        raise InputError(explain(error, str(path))) from None
    except ValueError as error:
        raise InputError(f"{path}: not valid JSON ({error}); make the model folder again") from None
    tokenizer = Tokenizer.load(folder)
    if tokenizer.vocab_size > config.gpt.vocab_size:
        raise InputError(
            f"{folder}: the tokenizer has {tokenizer.vocab_size} tokens, the model {config.gpt.vocab_size}; "
            "they do not belong together"
        )
    return config, tokenizer


def stored_shapes(path: Path) -> dict[str, list[int]]:
    """The shapes of all tensors of a safetensors file."""
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError) as error:
        raise unreadable(path, error) from None


def check_layers(path: Path, n_tensors: int, config: GPTConfig) -> None:
    """Before a model is built, which takes long for the thousand layers that a small file may ask for."""
    if n_tensors < config.n_layers:
        raise InputError(
            f"{path}: {n_tensors} tensors are too few for a model of {config.n_layers} layers; make or copy it again"
        )


def load_weights(
    model: GPT | GPTClassifier,
    path: Path,
    found: dict[str, list[int]],
    device: torch.device,
    dtype: torch.dtype | None,
) -> None:
    """Fills a model on the meta device strictly: each tensor used once, shapes equal; else what is wrong is named.

    Tensor by tensor, with the file closed in between: the memory it is mapped to never adds up to a second model. The
    largest come first, while the memory is still empty.
    """
    expected = {name: list(tensor.shape) for name, tensor in stored_tensors(model).items()}
    for name, shape in expected.items():
        if name not in found:
            raise InputError(f"{path}: tensor {name} is missing; the file does not belong to this config.json")
        if found[name] != shape:
            raise InputError(f"{path}: tensor {name} has shape {found[name]}, config.json asks for {shape}")
    if extra := sorted(set(found) - set(expected)):
        raise InputError(f"{path}: tensor {extra[0]} has no place in the model ({len(extra)} left over)")
    try:
        for name in sorted(expected, key=lambda name: -math.prod(expected[name])):
            with safe_open(path, framework="pt") as file:
                tensor = file.get_tensor(name)
                if not tensor.is_floating_point():
                    raise InputError(f"{path}: tensor {name} is of {tensor.dtype}, no weights; make the folder again")
                assign_tensor(model, name, tensor.to(device, dtype or tensor.dtype, copy=True))
    except (SafetensorError, OSError) as error:
        raise unreadable(path, error) from None
    tie_head(model)


def unreadable(path: Path, error: Exception) -> InputError:
    return InputError(f"{path}: cannot be read as safetensors ({error}); make or copy the file again")


def gpt_of(model: GPT | GPTClassifier) -> GPT:
    return model.gpt if isinstance(model, GPTClassifier) else model


def stored_tensors(model: GPT | GPTClassifier) -> dict[str, Tensor]:
    """The weights that a file holds: a tied head is the token embedding, stored once."""
    tied = gpt_of(model).config.tie_embeddings
    weights = model.state_dict()
    return {name: tensor for name, tensor in weights.items() if not (tied and name.endswith("lm_head.weight"))}


class _NoInit(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # On the meta device they draw nothing, but take time, and load 75 MB of sympy.
        if func in (nn.init.normal_, nn.init.uniform_, nn.init.kaiming_uniform_):
            return kwargs["tensor"]
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def without_weights() -> Iterator[None]:
    """Models made in this block take no memory and no random numbers: all their weights come from a file."""
    with torch.device("meta"), _NoInit():
        yield


def assign_tensor(model: nn.Module, name: str, tensor: Tensor) -> None:
    """Puts a tensor in the place of the parameter `name`, whatever device that was on."""
    path, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(path), leaf, nn.Parameter(tensor))


def tie_head(model: GPT | GPTClassifier) -> None:
    """After `assign_tensor` the head of a tied model has to be made the token embedding again."""
    gpt = gpt_of(model)
    if gpt.config.tie_embeddings:
        gpt.lm_head.weight = gpt.tok_emb.weight


# ---- training state --------------------------------------------------------------------------------------------------


def save_state(folder: Path, step: int, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
    """Saves the state of a training at `step`, with a checksum; this state and the one before it are kept."""
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


def load_state(
    folder: Path, say: Callable[[str], None], up_to: float = math.inf
) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """The tensors and values of the newest sound state, or None; damaged ones are passed over with a message.

    States of steps beyond `up_to` are passed over too.
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


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Writes a safetensors file from where the tensors are, without a second copy of them in memory."""
    path.touch()
    mode = path.stat().st_mode
    try:
        save_file(tensors, path, metadata)
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))  # a full disk: (os error 28)
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from None
    path.chmod(mode)  # safetensors makes files that only their owner can read


@contextlib.contextmanager
def replaced_folder(folder: Path) -> Iterator[Path]:
    """A new empty folder that takes the place of `folder` when the block ends without an error.

    The earlier folder is moved aside before it is deleted, and the disk has all of the new one before it gets its name:
    neither a kill nor a power cut leaves half a folder under it.
    """
    new, old = (folder.with_name(folder.name + ending) for ending in (".partial", ".old"))
    for leftover in (new, old):
        shutil.rmtree(leftover, ignore_errors=True)
    new.mkdir(parents=True)
    try:
        yield new
        for path in (*new.rglob("*"), new):
            sync(path)
        if folder.exists():
            folder.rename(old)
        new.rename(folder)
        sync(folder.parent)
        shutil.rmtree(old, ignore_errors=True)
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        if old.exists() and not folder.exists():
            old.rename(folder)
        raise


def sync(path: Path) -> None:
    """Returns when the disk has the file's content, or the folder's entries."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:
        if path.is_file():
            raise
        # some file systems have no such thing for folders
    finally:
        os.close(descriptor)
