"""LoRA adapters in PEFT's format, merged into a base of any family.

Shapes: r rank, I in_features and O out_features of a layer of theirs, which may be several of ours (GPT-2, Phi-3).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Literal

import regex
import torch
from pydantic import BaseModel, ConfigDict, ValidationError, model_validator
from torch import Tensor, nn

from llm.checkpoint.folder import Checkpoint
from llm.checkpoint.weights import stored_tensors, tensors_in, tie_head
from llm.common.errors import InputError
from llm.common.files import read_json_object
from llm.config import Positive, PositiveFloat, explain
from llm.convert.families.base import Family, fused_names
from llm.convert.families.registry import FAMILIES
from llm.convert.hf import PREFIX, hf_config_of, mapped_tensor
from llm.download.hub import ADAPTER
from llm.model.gpt import GPT

WEIGHTS = "adapter_model.safetensors"
EMBEDDING, HEAD = "tok_emb.weight", "lm_head.weight"
LORA = regex.compile(  # the parts of an adapter, some with its name behind them, as in `lora_A.default.weight`
    r"(.+)\.(lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector)(?:\.(?!weight$)[^.]+)?(?:\.weight)?"
)
SAVED = regex.compile(r"\.modules_to_save(\.(?!weight$|bias$)[^.]+)?(?=\.(weight|bias)$)|\.base_layer(?=\.)")
PLAIN_STARTS = (None, True, False, "gaussian", "orthogonal", "eva")  # they leave the base as it is
IGNORED = {  # keys that change nothing of what an adapter computes
    *("base_model_name_or_path", "revision", "inference_mode", "auto_mapping", "peft_version", "lora_dropout"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save", "task_type"),
    *("fan_in_fan_out", "megatron_core", "loftq_config", "eva_config", "qalora_group_size", "runtime_config"),
}

log = logging.getLogger("llm")


class PEFTConfig(BaseModel):
    """The keys of an `adapter_config.json` that decide what is computed."""

    model_config = ConfigDict(frozen=True, extra="allow", strict=True)

    peft_type: Literal["LORA"]
    r: Positive = 8
    lora_alpha: PositiveFloat = 8
    rank_pattern: dict[str, Positive] | None = None
    alpha_pattern: dict[str, PositiveFloat] | None = None
    use_rslora: bool = False
    use_dora: bool = False
    bias: Literal["none", "all", "lora_only"] = "none"
    init_lora_weights: bool | str | None = True
    ensure_weight_tying: bool = False

    @model_validator(mode="after")
    def _known(self) -> PEFTConfig:
        extra = self.model_extra or {}
        if extra.get("task_type") not in (None, "CAUSAL_LM"):
            raise ValueError(f"task_type: expected CAUSAL_LM, found {extra['task_type']!r:.80}")
        if self.init_lora_weights not in PLAIN_STARTS:
            raise ValueError(
                f"init_lora_weights {self.init_lora_weights!r:.80} changes the base model too; "
                "merge the adapter with PEFT and import the result"
            )
        for key, value in extra.items():
            if key not in IGNORED and value:
                raise ValueError(f"{key} {value!r:.80} is not read; merge the adapter with PEFT and import the result")
        return self

    def scale(self, layer: str, rank: int) -> float:
        """Return what B A of a layer is multiplied with."""
        expected = self.rank_pattern or {}
        if (wanted := expected.get(_key_of(layer, expected), self.r)) != rank:
            raise ValueError(f"{layer}: expected rank {wanted}, found {rank}")
        alphas = self.alpha_pattern or {}
        alpha = alphas.get(_key_of(layer, alphas), self.lora_alpha)
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)


def _key_of(layer: str, patterns: Iterable[str]) -> str:
    """Return the first pattern that a layer's name ends with, as PEFT finds it, else the name."""
    for key in patterns:
        try:
            if regex.match(rf"(.*\.)?({key})$", layer, timeout=1.0):
                return key
        except (regex.error, TimeoutError):
            raise ValueError(f"pattern {key!r:.80} is not valid") from None
    return layer


@torch.no_grad()
def merge_peft(folder: Path, base: Checkpoint) -> Checkpoint:
    """Return a base with an adapter of PEFT merged into it: summed in fp32, rounded once to the base's dtype.

    The base's own model is changed. Raises `InputError` for an adapter of another kind or of another base.
    """
    path = folder / ADAPTER
    try:
        config = PEFTConfig.model_validate(read_json_object(path))
    except ValidationError as error:
        raise InputError(explain(error, str(path))) from None
    if not isinstance(base.model, GPT):
        raise InputError(f"{folder}: an adapter for a language model, and the base is a classifier; name its own base")
    lora, whole = _read_tensors(folder)
    changed = _Merge(folder, base.model, config, [*lora, *(name.rpartition(".")[0] for name in whole)])
    for name, tensor in whole.items():
        changed.replace(name, tensor)
    for layer, parts in lora.items():
        changed.add(layer, parts)
    changed.finish()
    if any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")):
        log.warning("%s: its tokenizer and chat template are not read; those of the base stay", folder)
    gpt = base.model.config
    return Checkpoint(base.model.eval(), base.tokenizer, base.config.model_copy(update={"gpt": gpt}))


def _read_tensors(folder: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """Return the parts of the adapter by layer, and the tensors that replace those of the base."""
    path = folder / WEIGHTS
    if not path.is_file():
        found = sorted(each.name for each in folder.glob("adapter_model*") if each.is_file())
        problem = f"{found[0]} is not read: unpickling executes code; save it as" if found else "fetch"
        raise InputError(f"{folder}: {WEIGHTS} is missing; {problem} {WEIGHTS}")
    lora: dict[str, dict[str, Tensor]] = {}
    whole: dict[str, Tensor] = {}
    for name, stored in tensors_in(path).items():
        tensor = mapped_tensor(stored)
        if not tensor.is_floating_point():
            raise InputError(f"{path}: tensor {name} is of {tensor.dtype}, no weights; fetch it again")
        name = name.removeprefix("base_model.").removeprefix("model.")
        if part := LORA.fullmatch(name):
            lora.setdefault(part[1], {})[part[2]] = tensor.float()
        elif ".original_module." not in name:
            whole[SAVED.sub("", name)] = tensor
    if not lora and not whole:
        raise InputError(f"{path}: holds no tensors; fetch it again")
    return lora, whole


class _Merge:
    """Changes of a model by the tensors of one adapter, whose layers have transformers' names."""

    def __init__(self, folder: Path, model: GPT, config: PEFTConfig, layers: list[str]) -> None:
        self.folder, self.model, self.config = folder, model, config
        self.was_tied = model.config.tie_embeddings
        self.touched: set[str] = set()
        if self.was_tied:
            model.lm_head.weight = nn.Parameter(model.tok_emb.weight.clone())
            self._set_tied(False)
        self.parameters = stored_tensors(model)
        self.family, self.names = self._names_of(layers)

    def _set_tied(self, tied: bool) -> None:
        self.model.config = self.model.config.model_copy(update={"tie_embeddings": tied})

    def _names_of(self, layers: list[str]) -> tuple[Family, Mapping[str, list[str]]]:
        """Return the family whose names the adapter uses, and its tensors without prefix, each with parameters of ours.

        A model may be of several families: one of Phi-3 is one of Llama with other names.
        """
        try:
            families = [hf_config_of(self.model.config)[0], *FAMILIES]
        except InputError:
            families = FAMILIES
        needed = {PREFIX.sub("", layer) for layer in layers}
        unknown = ""
        for family in families:
            try:
                names = fused_names(family.hf_names, self.parameters)
            except KeyError:  # a parameter that this family lacks
                continue
            plain = {PREFIX.sub("", name): parts for name, parts in names.items()}
            if not (missing := needed - {name.rpartition(".")[0] for name in plain}):
                return family, plain
            unknown = unknown or min(missing)
        raise self.another_base(f"layer {unknown} is none of the base's")

    def another_base(self, problem: str) -> InputError:
        return InputError(f"{self.folder}: {problem}; name the base that the adapter was made for")

    def parts(self, name: str) -> list[str]:
        """Return the parameters of ours that a tensor of theirs holds."""
        found = self.names.get(PREFIX.sub("", name))
        if found is None:
            raise self.another_base(f"tensor {name} is none of the base's")
        self.touched.update(found)
        return found

    def replace(self, name: str, tensor: Tensor) -> None:
        """Put a tensor of theirs in the place of the base's."""
        if name.endswith(self.family.conv1d_weights):
            tensor = tensor.t()
        parts = self.parts(name)
        self.check(name, tensor, parts)
        for part, rows in zip(parts, tensor.split([len(self.parameters[part]) for part in parts]), strict=True):
            self.parameters[part].copy_(rows)

    def add(self, layer: str, found: dict[str, Tensor]) -> None:
        """Add B A of a layer, and with DoRA give each row its own length."""
        A, B = found.pop("lora_A", None), found.pop("lora_B", None)
        if A is None and B is None:  # of an embedding: [r, V] and [C, r]
            A, B = found.pop("lora_embedding_B", None), found.pop("lora_embedding_A", None)
            A, B = (None if part is None else part.t() for part in (A, B))
        length = found.pop("lora_magnitude_vector", None)
        complete = A is not None and B is not None and (length is not None) == self.config.use_dora
        if found or A is None or B is None or not complete or A.ndim != 2 or B.ndim != 2 or len(A) != B.shape[1]:
            raise InputError(f"{self.folder}: the tensors of {layer} do not belong together; fetch the adapter again")
        try:
            delta = self.config.scale(layer, len(A)) * (B @ A)  # [O, I]
        except ValueError as error:
            raise InputError(f"{self.folder}: {error}; fetch the adapter again") from None
        name = f"{layer}.weight"
        parts = self.parts(name)
        self.check(name, delta, parts)
        sum_ = torch.cat([self.parameters[part].float() for part in parts]) + delta
        if length is not None:
            sum_ *= length.reshape(-1, 1) / sum_.norm(dim=1, keepdim=True)
        for part, rows in zip(parts, sum_.split([len(self.parameters[part]) for part in parts]), strict=True):
            self.parameters[part].copy_(rows)

    def check(self, name: str, tensor: Tensor, parts: list[str]) -> None:
        """Raise `InputError` for a tensor of another shape than the base's."""
        shape = [sum(len(self.parameters[part]) for part in parts), *self.parameters[parts[0]].shape[1:]]
        if [*tensor.shape] != shape:
            problem = f"tensor {name} has shape {[*tensor.shape]}, the base asks for {shape}"
            if {EMBEDDING, HEAD} & {*parts} and tensor.shape[1:] == self.parameters[parts[0]].shape[1:]:
                raise InputError(f"{self.folder}: {problem}; the base's vocabulary must be resized first")
            raise self.another_base(problem)

    def finish(self) -> None:
        """Tie embedding and head again where they were and still are one."""
        if not self.was_tied:
            return
        embedding, head = self.parameters[EMBEDDING], self.parameters[HEAD]
        if self.config.ensure_weight_tying and len(self.touched & {EMBEDDING, HEAD}) == 1:
            new, old = (embedding, head) if EMBEDDING in self.touched else (head, embedding)
            old.copy_(new)
        if torch.equal(embedding, head):
            self._set_tied(True)
            tie_head(self.model)
