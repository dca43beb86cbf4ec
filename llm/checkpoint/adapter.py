"""LoRA adapters in folders of their own."""

from __future__ import annotations

import hashlib
from pathlib import Path

from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from llm.checkpoint.card import Card
from llm.checkpoint.folder import Checkpoint, CheckpointConfig, save_checkpoint
from llm.checkpoint.weights import stored_tensors, unreadable
from llm.common.errors import InputError
from llm.common.files import read_json, replaced_folder
from llm.config import LoRAParams, Sha256, Strict, TrainParams, explain
from llm.model.classifier import GPTClassifier
from llm.model.gpt import GPT
from llm.model.lora import add_lora, merge_lora


class AdapterConfig(Strict):
    """The content of `adapter.json`."""

    lora: LoRAParams
    base: Sha256  # of the model that it was trained on
    model: CheckpointConfig  # of base and adapter together


def base_digest(gpt: GPT) -> str:
    """Return a digest of config and weights; neither adapters nor a wider dtype for the same values change it."""
    digest = hashlib.sha256(gpt.config.model_dump_json(exclude_none=True).encode())
    for name, tensor in stored_tensors(gpt).items():
        if not name.endswith((".A", ".B")):
            digest.update(name.replace(".base.", ".").encode())
            digest.update(tensor.detach().float().cpu().contiguous().numpy().data)
    return digest.hexdigest()


def adapter_tensors(model: GPT | GPTClassifier) -> dict[str, Tensor]:
    """Return the weights of an adapter: A and B of each layer, and a classifier's head, which no base has."""
    return {
        name: p.detach() for name, p in model.named_parameters() if name.endswith((".A", ".B")) or name[:5] == "head."
    }


def adapter_files(content: Checkpoint, lora: LoRAParams) -> dict[str, bytes]:
    """Return the files of an adapter folder, by name."""
    model = content.model
    config = AdapterConfig(lora=lora, base=base_digest(model.gpt), model=content.config)
    tensors = {name: tensor.cpu().contiguous() for name, tensor in adapter_tensors(model).items()}
    return {
        "adapter.json": (config.model_dump_json(indent=2, exclude_none=True) + "\n").encode(),
        "adapter.safetensors": save(tensors),
    }


def save_adapter(folder: Path, content: Checkpoint, lora: LoRAParams) -> None:
    """Write the adapter of a model that `add_lora` extended, without its base: adapter.json, adapter.safetensors."""
    with replaced_folder(folder) as new:
        for name, data in adapter_files(content, lora).items():
            (new / name).write_bytes(data)


def save_trained(folder: Path, content: Checkpoint, params: TrainParams, card: Card | None = None) -> None:
    """Write the model folder of a training; adapters are merged into it, and kept alone in its folder `adapter`."""
    files: dict[str, bytes] = {}
    if params.trainable == "lora":
        files |= {f"adapter/{name}": data for name, data in adapter_files(content, params.lora).items()}
        merge_lora(content.model)
    save_checkpoint(folder, content, files, card)


def load_adapter(folder: Path, base: Checkpoint) -> Checkpoint:
    """Return a base with an adapter that was trained on it, not merged, in evaluation mode.

    The base's own model is extended in place. Raises `InputError` for an adapter of another base, and for files that
    are damaged or do not belong together.
    """
    config, tensors = read_adapter(folder)
    if not isinstance(base.model, GPT) or base_digest(base.model) != config.base:
        raise InputError(f"{folder}: the adapter was trained on another base model; name the one that it was made for")
    device = base.model.tok_emb.weight.device
    labels = config.model.labels
    model = GPTClassifier(base.model, len(labels)).to(device) if labels else base.model
    add_lora(model, config.lora)
    expected = adapter_tensors(model)
    shapes, found = ({name: tensor.shape for name, tensor in each.items()} for each in (expected, tensors))
    if wrong := sorted(name for name, _ in shapes.items() ^ found.items()):
        raise InputError(f"{folder}: tensor {wrong[0]} and adapter.json do not belong together; copy the folder again")
    for name, tensor in expected.items():
        tensor.copy_(tensors[name])
    return Checkpoint(model.eval(), base.tokenizer, config.model.model_copy(update={"gpt": base.config.gpt}))


def read_adapter(folder: Path) -> tuple[AdapterConfig, dict[str, Tensor]]:
    """Read the files of an adapter folder, on the CPU."""
    path = folder / "adapter.json"
    if not path.is_file():
        raise InputError(f"{folder}: not an adapter: adapter.json is missing; name one such as models/base/adapter")
    content = read_json(path, "make the adapter again")
    try:
        config = AdapterConfig.model_validate(content)
    except ValidationError as error:
        raise InputError(explain(error, str(path))) from None
    path = folder / "adapter.safetensors"
    try:
        return config, load(path.read_bytes())
    except (SafetensorError, OSError) as error:
        raise unreadable(path, error) from None
