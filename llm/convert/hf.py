"""transformers' model folders in and out: config.json, safetensors, tokenizer.json.

Tensors are copied one by one from the mapped file into their place, so that the weights are in memory once.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from llm.checkpoint.card import Card, write_card
from llm.checkpoint.folder import Checkpoint, CheckpointConfig, lm_checkpoint
from llm.checkpoint.readme import readme
from llm.checkpoint.weights import (
    assign_tensor,
    check_layers,
    check_tensors,
    stored_tensors,
    tensors_in,
    tie_head,
    unreadable,
    without_weights,
    write_tensors,
)
from llm.common.errors import InputError
from llm.common.files import read_json_object, replaced_folder, write_atomic
from llm.common.stored_tensor import StoredTensor
from llm.config import GPTConfig, explain
from llm.convert.families.base import TAKE, Family, HFConfig, fused_names, fused_shapes
from llm.convert.families.registry import FAMILIES, family_with
from llm.download.hub import ADAPTER, PICKLED
from llm.model.gpt import GPT
from llm.tokenizer.bpe import Tokenizer
from llm.tokenizer.chat_source import NAMED_TOKENS, ChatSource, GenerationConfig, read_hf_chat, template_files
from llm.tokenizer.hf import read_tokenizer_json, write_tokenizer_json
from llm.tokenizer.prompts import end_tokens

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPES = ("F32", "F16", "BF16")  # as safetensors names them
HEAD = "lm_head.weight"
PREFIX = re.compile(r"^((model|transformer)\.)+")
SHARD = re.compile(r"(.+)-(\d{1,6})-of-(\d{1,6})\.safetensors")
QUANTIZED = re.compile(  # names that GPTQ, AWQ, bitsandbytes, compressed-tensors and fp8 give to what they store
    r"\.(qweight|qzeros|scales|g_idx|SCB|weight_(scale|scale_inv|zero_point|packed|format)|input_scale|biases)$"
    r"|\.weight\.(absmax|quant_map|nested_absmax|nested_quant_map|quant_state\..*)$"
)
GIVE_FOLDER = "give a folder with config.json, weights and tokenizer"


# ---- in --------------------------------------------------------------------------------------------------------------


def read_hf(path: Path, dtype: torch.dtype | None) -> Checkpoint:
    """Read a folder of transformers, in evaluation mode; `dtype` None keeps the stored one.

    Raises `InputError` for anything that is missing, left over or that `GPT` cannot express.
    """
    if (path / ADAPTER).is_file() and not (path / "config.json").is_file():
        raise adapter_alone(path)
    family, hf_config = read_hf_config(path / "config.json")
    config = hf_config.gpt_config()
    tokenizer, template, system = read_tokenizer_json(path)
    if tokenizer.vocab_size > config.vocab_size:
        raise InputError(
            f"{path}: the tokenizer has {tokenizer.vocab_size} tokens, the embedding only {config.vocab_size}; "
            "they do not belong together"
        )
    found = tensors_of_folder(path)
    check_layers(path, len(found), config)
    with without_weights():
        model = GPT(config)
    read_weights(model, path, found, family, dtype)
    return lm_checkpoint(model, tokenizer, template, system, read_hf_chat(path), path)


def read_hf_config(path: Path) -> tuple[Family, HFConfig]:
    """Read a `config.json` of transformers; raise `InputError` for one that `GPT` cannot express."""
    content = read_json_object(path, GIVE_FOLDER)
    try:
        family = family_with("model_type", content.get("model_type"))
        hf_config = family.hf_config.model_validate(content)
        hf_config.gpt_config()
    except ValidationError as error:
        raise InputError(explain(error, str(path))) from None
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    return family, hf_config


def read_weights(
    model: GPT, folder: Path, found: dict[str, StoredTensor], family: Family, dtype: torch.dtype | None
) -> None:
    """Fill a model on the meta device; raise `InputError` unless each tensor is used once."""
    ours = stored_tensors(model)
    wanted = fused_names(family.hf_names, ours)
    shapes = fused_shapes(wanted, ours)
    for theirs in wanted:
        if theirs.endswith(family.conv1d_weights):
            shapes[theirs].reverse()
    weights = {name: stored for name, stored in found.items() if not re.search(family.hf_constants, name)}
    known = with_prefixes(folder, weights, [*wanted, HEAD])
    check_unquantized(folder, known, wanted)
    head = known.pop(HEAD, None) if HEAD not in wanted else None  # some files hold the shared tensor twice
    embedding = next(iter(wanted))
    if head is not None and embedding not in known:  # or under the head's name alone
        known[embedding], head = head, None
    check_tensors(folder, shapes, known, "config.json")
    if head is not None:
        original, copy = mapped_tensor(known[embedding]), mapped_tensor(head)
        if copy.dtype != original.dtype or not torch.equal(copy, original):
            raise InputError(
                f"{folder}: tie_word_embeddings is true, but {HEAD} is not the embedding; "
                "set it to false in config.json if the head is a matrix of its own"
            )

    # The largest first: while it is copied, its pages of the file are in memory too, and nothing else yet.
    for theirs, parts in sorted(wanted.items(), key=lambda item: -math.prod(known[item[0]].shape)):
        tensor = mapped_tensor(known[theirs])
        if theirs.endswith(family.conv1d_weights):
            tensor = tensor.t()
        sizes = [ours[name].shape[0] for name in parts]
        for name, part in zip(parts, tensor.split(sizes), strict=True):
            place = torch.empty(part.shape, dtype=dtype or part.dtype)
            assign_tensor(model, name, place.copy_(part))
    tie_head(model)


def with_prefixes(folder: Path, found: Mapping[str, StoredTensor], wanted: Iterable[str]) -> dict[str, StoredTensor]:
    """Return tensors under the wanted names, whose prefix a file may lack or have twice.

    A file saved from the inner model lacks it, as OpenAI's GPT-2 does; one saved from a model inside another has more.
    """
    full = {PREFIX.sub("", name): name for name in wanted}
    named: dict[str, StoredTensor] = {}
    for name, stored in found.items():
        theirs = full.get(PREFIX.sub("", name), name)
        if theirs in named:
            raise InputError(f"{folder}: {stored.name} and {named[theirs].name} are one tensor; remove one of them")
        named[theirs] = stored
    return named


def check_unquantized(folder: Path, tensors: Mapping[str, StoredTensor], wanted: Collection[str]) -> None:
    """Raise `InputError` for weights that are codes of numbers, and not the numbers."""
    for name, stored in tensors.items():
        if name in wanted and stored.dtype not in DTYPES:
            raise InputError(
                f"{folder}: tensor {name} is stored as {stored.dtype}; read are {', '.join(DTYPES)}; {TAKE}"
            )
        if name not in wanted and QUANTIZED.search(name):
            raise InputError(f"{folder}: tensor {name} is of quantized weights; {TAKE}")


def mapped_tensor(stored: StoredTensor) -> Tensor:
    """Map one tensor of a file, without a copy; the file is unmapped when nothing refers to it any more."""
    try:
        with safe_open(stored.path, framework="pt") as file:
            tensor: Tensor = file.get_tensor(stored.name)
    except (SafetensorError, OSError) as error:
        raise unreadable(stored.path, error) from None
    return tensor


def tensors_of_folder(folder: Path) -> dict[str, StoredTensor]:
    """Return all tensors of a folder's safetensors files by name."""
    found: dict[str, StoredTensor] = {}
    for path in weight_files(folder):
        for name, stored in tensors_in(path).items():
            if name in found:
                raise InputError(f"{path}: tensor {name} is also in {found[name].path.name}")
            found[name] = stored
    return found


def weight_files(folder: Path) -> list[Path]:
    """Return the safetensors files of a folder, one or all shards; an index is not needed."""
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    index = folder / INDEX
    if not index.is_file():
        return files_without_index(folder)
    shards = read_json_object(index).get("weight_map")
    if not isinstance(shards, dict) or not all(Path(str(name)).name == name for name in shards.values()):
        raise InputError(f"{index}: weight_map must name a file of this folder for each tensor; fetch it again")
    names = sorted(set(shards.values()))
    present = {path.name for path in folder.iterdir() if path.is_file()}  # a name may be too long to be asked for
    if missing := [name for name in names if name not in present]:
        raise InputError(f"{folder}: shard {missing[0]} is missing ({len(missing)} of {len(names)}); fetch it again")
    return [folder / name for name in names]


def files_without_index(folder: Path) -> list[Path]:
    """Return the only safetensors file of a folder, or all shards of its only set, NAME-00001-of-00003.safetensors."""
    if (folder / ADAPTER).is_file():
        raise adapter_alone(folder)
    files = sorted(path for path in folder.glob("*.safetensors") if path.is_file())
    if not files:
        pickled = sorted(path.name for pattern in PICKLED for path in folder.glob(pattern))
        raise InputError(
            f"{folder}: {WEIGHTS} is missing; "
            + (f"{pickled[0]} is not read: unpickling executes code; " if pickled else "pickled weights are not read; ")
            + "take or make the weights as safetensors (in transformers: from_pretrained, then save_pretrained)"
        )
    sets: dict[tuple[str, int], set[int]] = {}
    for path in files:
        shard = SHARD.fullmatch(path.name)
        name, number, count = shard.groups() if shard else (path.name, 1, 1)
        sets.setdefault((name, int(count)), set()).add(int(number))
    if len(sets) > 1:
        raise InputError(
            f"{folder}: neither {WEIGHTS} nor {INDEX}, and {files[0].name} and {files[-1].name} are of different sets; "
            "keep the files of one"
        )
    [((_, count), numbers)] = sets.items()
    if missing := sorted({*range(1, count + 1)} - numbers):
        raise InputError(f"{folder}: shard {missing[0]} of {count} is missing ({len(missing)} in all); fetch it again")
    return files


def adapter_alone(folder: Path) -> InputError:
    """Return the error for an adapter in the place of a model."""
    return InputError(
        f"{folder}: a PEFT adapter, not a whole model; import it with its base: import BASE OUT --adapter {folder}"
    )


# ---- out -------------------------------------------------------------------------------------------------------------


def hf_config_of(gpt: GPTConfig) -> tuple[Family, HFConfig]:
    """Return transformers' config that says the same as a `GPT`'s; raise `InputError` naming what none can say."""
    family = next(family for family in FAMILIES if family.matches(gpt))
    try:
        hf_config = family.hf_config.from_gpt(gpt)
    except ValidationError as error:
        raise InputError(explain(error, f"transformers' {family.model_type}")) from None
    said = hf_config.gpt_config()
    unused = {"rope_theta"} if gpt.positions == "learned" else set()
    problems = [
        f"{name} {getattr(gpt, name)!r} (only {getattr(said, name)!r})"
        for name in GPTConfig.model_fields
        if name not in unused and getattr(gpt, name) != getattr(said, name)
    ]
    if problems:
        raise InputError(f"transformers' {family.model_type} has no place for {', '.join(problems)}")
    return family, hf_config


def export_hf(checkpoint: Checkpoint, out: Path, card: Card | None = None) -> None:
    """Write a folder that transformers' Auto classes open, whole or not at all, in place of any earlier one.

    The weights keep their dtype. Raises `InputError` for what transformers cannot say, by name.
    """
    model, tokenizer, config = checkpoint
    if not isinstance(model, GPT):
        raise InputError("a classifier's head has a bias, which transformers' sequence classifiers lack; not exported")
    family, hf_config = hf_config_of(model.config)
    family.check_tokenizer(tokenizer)
    ours = stored_tensors(model)
    weights: dict[str, Tensor] = {}
    for theirs, parts in fused_names(family.hf_names, ours).items():
        tensors = [ours[name].detach().cpu() for name in parts]
        tensor = tensors[0] if len(tensors) == 1 else torch.cat(tensors)
        weights[theirs] = (tensor.t() if theirs.endswith(family.conv1d_weights) else tensor).contiguous()
    settings = _generation_values(config, tokenizer)
    ids = {key: settings.get(key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    values = {
        "architectures": [family.hf_class],
        **hf_config.model_dump(exclude_unset=True),
        **ids,
        "torch_dtype": str(model.tok_emb.weight.dtype).removeprefix("torch."),
    }
    with replaced_folder(out) as new:
        write_atomic(new / "config.json", json.dumps(values, indent=2) + "\n")
        write_atomic(new / "generation_config.json", json.dumps(settings, indent=2) + "\n")
        write_tensors(new / WEIGHTS, weights, {"format": "pt"})
        own = config.chat_templates
        write_tokenizer_json(new, tokenizer, config.template if own is None else None, config.system)
        _write_own_chat(new, config.chat_source)
        if card is not None:
            write_card(new, card, readme(card, out.name, "transformers"))


def _generation_values(config: CheckpointConfig, tokenizer: Tokenizer) -> dict[str, Any]:
    """Return the generation settings of an export: the original's, and the tokens that end a text here."""
    settings = config.generation or GenerationConfig(bos_token_id=tokenizer.bos)
    values: dict[str, Any] = {"bos_token_id": None, **settings.to_hf()}
    for key in ("bos_token", "pad_token"):
        named = (config.special_tokens or {}).get(key)
        if values.get(f"{key}_id") is None and named in tokenizer.special_tokens:
            values[f"{key}_id"] = tokenizer.special_tokens[named]
    if settings.eos_token_id is None or (config.template is not None and config.chat_templates is None):
        ends = [*(settings.eos_token_id or []), *sorted(end_tokens(tokenizer, config.template))]
        ends = list(dict.fromkeys(ends))
        values["eos_token_id"] = ends[0] if len(ends) == 1 else ends
    return values


def _write_own_chat(folder: Path, chat: ChatSource) -> None:
    """Add the chat templates and the named tokens that came with the model to the files of its tokenizer."""
    for name, data in template_files(chat.templates or {}).items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(data)
    if chat.special_tokens is not None:
        for name in ("tokenizer_config.json", "special_tokens_map.json"):
            content = read_json_object(folder / name)
            named = {key: value for key, value in content.items() if key not in NAMED_TOKENS} | chat.special_tokens
            write_atomic(folder / name, json.dumps(named, ensure_ascii=False, indent=1) + "\n")
