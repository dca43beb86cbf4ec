"""Weights in safetensors files: writing, strict reading, models without initialisation."""

from __future__ import annotations

import contextlib
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from llm.common.errors import InputError
from llm.common.stored_tensor import StoredTensor
from llm.config import GPTConfig
from llm.model.classifier import GPTClassifier
from llm.model.gpt import GPT

# Parts of names that torch.compile, DistributedDataParallel, FSDP and activation checkpointing add.
WRAPPERS = ("_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
LFS_POINTER = b"version https://git-lfs"


def tensors_in(path: Path) -> dict[str, StoredTensor]:
    """Return all tensors of a safetensors file by name, without the parts of a name that wrappers of a model add."""
    found: dict[str, StoredTensor] = {}
    try:
        with safe_open(path, framework="pt") as file:
            for stored in file.keys():  # noqa: SIM118 (not a dict)
                part = file.get_slice(stored)
                name = ".".join(word for word in stored.split(".") if word not in WRAPPERS)
                if name in found:
                    raise InputError(f"{path}: {stored} and {found[name].name} are one tensor; remove one of them")
                found[name] = StoredTensor(path, tuple(part.get_shape()), part.get_dtype(), stored)
    except (SafetensorError, OSError) as error:
        raise unreadable(path, error) from None
    return found


def check_layers(path: Path, n_tensors: int, config: GPTConfig) -> None:
    """Raise `InputError` for more layers than tensors, before a large model is built for a small file."""
    if n_tensors < config.n_layers:
        raise InputError(
            f"{path}: {n_tensors} tensors are too few for a model of {config.n_layers} layers; make or copy it again"
        )


def check_tensors(
    where: Path, wanted: Mapping[str, Sequence[int]], found: Mapping[str, StoredTensor], config: str
) -> None:
    """Raise `InputError` unless the stored tensors have the names and shapes that `config` asks for."""
    for name, shape in wanted.items():
        if name not in found:
            raise InputError(f"{where}: tensor {name} is missing; {config} asks for it")
        if [*found[name].shape] != [*shape]:
            raise InputError(f"{where}: tensor {name} has shape {[*found[name].shape]}, {config} asks for {[*shape]}")
    if extra := sorted(found.keys() - wanted.keys()):
        raise InputError(f"{where}: tensor {extra[0]} has no place in the model ({len(extra)} left over)")


def load_weights(
    model: GPT | GPTClassifier,
    path: Path,
    found: dict[str, StoredTensor],
    device: torch.device,
    dtype: torch.dtype | None,
) -> None:
    """Fill a model on the meta device; raise `InputError` unless each tensor is used once.

    Tensor by tensor, with the file closed in between: the memory it is mapped to never adds up to a second model. The
    largest come first, while the memory is still empty.
    """
    expected = {name: tensor.shape for name, tensor in stored_tensors(model).items()}
    check_tensors(path, expected, found, "config.json")
    try:
        for name in sorted(expected, key=lambda name: -math.prod(expected[name])):
            with safe_open(path, framework="pt") as file:
                tensor = file.get_tensor(found[name].name)
                if not tensor.is_floating_point():
                    raise InputError(f"{path}: tensor {name} is of {tensor.dtype}, no weights; make the folder again")
                assign_tensor(model, name, tensor.to(device, dtype or tensor.dtype, copy=True))
    except (SafetensorError, OSError) as error:
        raise unreadable(path, error) from None
    tie_head(model)


def unreadable(path: Path, error: Exception) -> InputError:
    """Return the error for a damaged safetensors file, or for a pointer in its place."""
    with contextlib.suppress(OSError), path.open("rb") as file:
        if file.read(len(LFS_POINTER)) == LFS_POINTER:
            return InputError(f"{path}: a git-LFS pointer, not the weights themselves; fetch them with git lfs pull")
    return InputError(f"{path}: cannot be read as safetensors ({error}); make or copy the file again")


def stored_tensors(model: GPT | GPTClassifier) -> dict[str, Tensor]:
    """Return the weights that a file holds; a tied head is the token embedding, stored once."""
    tied = model.gpt.config.tie_embeddings
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
    """Make models without memory and random numbers in this block; all their weights come from a file."""
    with torch.device("meta"), _NoInit():
        yield


def assign_tensor(model: nn.Module, name: str, tensor: Tensor) -> None:
    """Replace the parameter `name` by a tensor, whatever device it was on."""
    path, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(path), leaf, nn.Parameter(tensor))


def tie_head(model: GPT | GPTClassifier) -> None:
    """Make the head of a tied model the token embedding again, after `assign_tensor`."""
    gpt = model.gpt
    if gpt.config.tie_embeddings:
        gpt.lm_head.weight = gpt.tok_emb.weight


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file without a second copy of the tensors in memory."""
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
