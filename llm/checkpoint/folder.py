"""Checkpoints: folders of config.json, model.safetensors and the tokenizer, nothing pickled."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal, NamedTuple, Self

import torch
from pydantic import ValidationError, model_validator

from llm.checkpoint.weights import (
    check_layers,
    load_weights,
    stored_tensors,
    tensors_in,
    without_weights,
    write_tensors,
)
from llm.common.errors import InputError
from llm.common.files import read_json, replaced_folder
from llm.config import GPTConfig, Positive, Strict, Template, explain
from llm.model.classifier import GPTClassifier
from llm.model.gpt import GPT
from llm.tokenizer.bpe import Tokenizer


class CheckpointConfig(Strict):
    """The content of a checkpoint's `config.json`."""

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


class Checkpoint(NamedTuple):
    """A model with its tokenizer and its config."""

    model: GPT | GPTClassifier
    tokenizer: Tokenizer
    config: CheckpointConfig


def lm_checkpoint(model: GPT, tokenizer: Tokenizer, template: Template | None, system: str | None) -> Checkpoint:
    """Return the checkpoint of a GPT, in evaluation mode; its kind is instruct where there is a template, else base."""
    kind: Literal["base", "instruct"] = "base" if template is None else "instruct"
    config = CheckpointConfig(kind=kind, gpt=model.config, template=template, system=system)
    return Checkpoint(model.eval(), tokenizer, config)


def save_checkpoint(folder: Path, content: Checkpoint, more: Mapping[str, bytes] | None = None) -> None:
    """Write a model folder, whole or not at all, in place of any earlier one.

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


def load_checkpoint(
    folder: Path,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = torch.float32,
) -> Checkpoint:
    """Read a model folder, in evaluation mode; raise `InputError` if anything of it is missing or does not fit.

    `dtype` None keeps the stored one.
    """
    config, tokenizer = read_checkpoint_config(folder)
    path = folder / "model.safetensors"
    found = tensors_in(path)
    check_layers(path, len(found), config.gpt)
    with without_weights():
        gpt = GPT(config.gpt)
        model = GPTClassifier(gpt, len(config.labels)) if config.labels else gpt
    load_weights(model, path, found, torch.device(device), dtype)
    return Checkpoint(model.eval(), tokenizer, config)


def read_checkpoint_config(folder: Path) -> tuple[CheckpointConfig, Tokenizer]:
    """Read the config and tokenizer of a model folder, without the weights."""
    path = folder / "config.json"
    if not path.is_file():
        raise InputError(f"{folder}: not a model folder: config.json is missing; name a folder such as models/base")
    content = read_json(path, "make the model folder again")
    try:
        config = CheckpointConfig.model_validate(content)
    except ValidationError as error:
        raise InputError(explain(error, str(path))) from None
    tokenizer = Tokenizer.load(folder)
    if tokenizer.vocab_size > config.gpt.vocab_size:
        raise InputError(
            f"{folder}: the tokenizer has {tokenizer.vocab_size} tokens, the model {config.gpt.vocab_size}; "
            "they do not belong together"
        )
    return config, tokenizer
