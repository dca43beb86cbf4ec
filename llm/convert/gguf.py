"""GGUF files, the format of llama.cpp (ggml's docs/gguf.md): open weights in, our models out.

The header is parsed by `llm.common.gguf_header`; `gguf` turns quantized blocks into numbers and numbers into files.

Four things differ from our files. Shapes are written with the innermost dimension first. For the architecture `llama`
the rows of the query and key projections are reordered so that the two halves of a rotary pair are neighbours. GPT-2's
query, key and value are one matrix. A head that is tied to the token embedding is not stored.

Shapes: D head_dim.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from io import BufferedReader
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from llm.checkpoint.card import Card
from llm.checkpoint.folder import Checkpoint, lm_checkpoint
from llm.checkpoint.weights import assign_tensor, check_layers, check_tensors, stored_tensors, tie_head, without_weights
from llm.common.errors import InputError
from llm.common.files import atomic_file
from llm.common.gguf_header import GGUFHeader, gguf_package, read_exactly, read_gguf_header
from llm.common.stored_tensor import StoredTensor
from llm.config import GPTConfig, explain
from llm.convert.families.base import Family, fused_names, fused_shapes
from llm.convert.families.metadata import Metadata
from llm.convert.families.registry import FAMILIES, family_with
from llm.convert.gguf_card import card_fields, write_digest
from llm.inference.grouped import round_to_4_bits
from llm.inference.importance import input_importance
from llm.inference.kernels.build import load_kernels
from llm.model.gpt import GPT
from llm.tokenizer.chat_source import ChatSource, gguf_chat, gguf_chat_fields
from llm.tokenizer.gguf import gguf_tokenizer_fields, parse_gguf_tokenizer

EMBEDDINGS = ("token_embd.weight", "output.weight")  # in 8 bits where the other matrices have 4
CHUNK = 2**18  # numbers that are dequantized at a time
HEAD = "lm_head.weight"
POSITIONS = "position_embd.weight"  # llama.cpp's converter keeps it in fp32 whatever the other matrices are in
FileType = Literal["f32", "f16", "q8_0", "q4_0", "q4_1"]
FILE_TYPES: dict[FileType, int] = {"f32": 0, "f16": 1, "q4_0": 2, "q4_1": 3, "q8_0": 7}  # general.file_type


# ---- in --------------------------------------------------------------------------------------------------------------


def read_gguf(path: Path, dtype: torch.dtype | None) -> Checkpoint:
    """Read the model and tokenizer of a GGUF file, in evaluation mode.

    `dtype` None: half precision where all matrices are stored in it, else fp32. Strict as `checkpoint.load_weights`:
    raises `InputError` with one line for whatever is missing, left over, of another shape or not supported. Beside the
    model only a few rows of one tensor are in memory at a time.
    """
    header = read_gguf_header(path)
    family, config = _config(path, header)
    tokenizer, template, system = parse_gguf_tokenizer(path, header.fields)
    chat = _chat(path, header.fields)
    n_tokens = max(len(header.fields.pop("tokenizer.ggml.tokens")), tokenizer.vocab_size)
    header.fields.pop("tokenizer.ggml.merges", None)  # as large as the tokens; neither is needed beside the weights
    if n_tokens != config.vocab_size:
        raise InputError(
            f"{path}: the tokenizer has {n_tokens} tokens, token_embd.weight {config.vocab_size} rows; "
            "they do not belong together"
        )
    check_layers(path, len(header.tensors), config)
    with without_weights():
        model = GPT(config)
    ours = stored_tensors(model)
    wanted = fused_names(family.gguf_names, ours)
    constants = family.gguf_constants(config)
    weights = {name: stored for name, stored in header.tensors.items() if name not in constants}
    check_tensors(path, fused_shapes(wanted, ours), weights, "the metadata")
    _check_types(path, header.tensors)
    dtype = dtype or _stored_dtype(header.tensors)
    with path.open("rb") as file:
        for theirs, parts in wanted.items():
            first_row = 0
            for name in parts:
                shape = ours[name].shape
                order = torch.arange(shape[0])
                if heads := family.rotary_heads(config, name):
                    order = _neighbours(order, heads)
                tensor = _read_tensor(file, header.tensors[theirs], first_row, order, shape, dtype)
                if offset := family.gguf_offset(name):
                    tensor.sub_(offset)
                assign_tensor(model, name, tensor)
                first_row += shape[0]
    tie_head(model)
    return lm_checkpoint(model, tokenizer, template, system, chat, path)


def _chat(path: Path, fields: dict[str, Any]) -> ChatSource:
    try:
        return gguf_chat(fields)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


def _config(path: Path, header: GGUFHeader) -> tuple[Family, GPTConfig]:
    fields = header.fields
    arch = fields.get("general.architecture")
    try:
        family = family_with("gguf_arch", arch)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    if fields.get("split.count", 1) != 1:
        raise InputError(f"{path}: one of {fields['split.count']} parts; merge them with llama-gguf-split --merge")
    try:
        return family, family.gpt_config(Metadata(path, str(arch), fields), header.tensors)
    except ValidationError as error:
        raise InputError(explain(error, str(path))) from None


def _check_types(path: Path, tensors: dict[str, StoredTensor]) -> None:
    """Raise `InputError` for a type that `gguf` cannot dequantize."""
    gguf = gguf_package()
    for name, stored in tensors.items():
        kind = gguf.GGMLQuantizationType[stored.dtype]
        try:
            gguf.dequantize(np.zeros((1, gguf.GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
        except NotImplementedError:
            raise InputError(
                f"{path}: tensor {name} has type {kind.name}, which cannot be read; take a file in F16, Q8_0 or Q4_K_M"
            ) from None


def _neighbours(rows: Tensor, heads: int) -> Tensor:
    """Reorder each head's rows from pairs of its halves, (0, D/2), (1, D/2 + 1)..., to neighbours: 0, D/2, 1, ..."""
    return rows.view(heads, 2, -1, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)


def _stored_dtype(tensors: dict[str, StoredTensor]) -> torch.dtype:
    """Return one dtype for the whole model, which cannot mix them: that of the matrices."""
    found = {stored.dtype for name, stored in tensors.items() if len(stored.shape) > 1 and name != POSITIONS}
    for name, dtype in (("F16", torch.float16), ("BF16", torch.bfloat16)):
        if found == {name}:
            return dtype
    return torch.float32


def _read_tensor(
    file: BufferedReader, stored: StoredTensor, first_row: int, order: Tensor, shape: torch.Size, dtype: torch.dtype
) -> Tensor:
    """Read the numbers of a stored tensor from `first_row` on; `order` says where in the result each row belongs.

    The file is read, not mapped, since the pages of a map would count as memory, and a matrix is put in order while it
    is read: a large temporary for each would leave holes in the memory that no later one fits into.
    """
    gguf = gguf_package()
    kind = gguf.GGMLQuantizationType[stored.dtype]
    tensor = torch.empty(shape, dtype=dtype)
    if len(shape) == 1:  # a row of blocks cannot be cut before it is dequantized
        numbers = gguf.dequantize(_rows(file, stored.start, 1, stored.n_bytes), kind)[0]
        return tensor.index_copy_(0, order, torch.from_numpy(numbers[first_row : first_row + len(order)]).to(dtype))
    row_bytes = stored.n_bytes // stored.shape[0]
    for part in order.split(max(1, CHUNK // shape[1])):
        content = _rows(file, stored.start + first_row * row_bytes, len(part), row_bytes)
        tensor.index_copy_(0, part, torch.from_numpy(gguf.dequantize(content, kind)).to(dtype))
        first_row += len(part)
    return tensor


def _rows(file: BufferedReader, start: int, rows: int, n_bytes: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Read `rows` rows of `n_bytes` bytes each."""
    file.seek(start)
    return np.frombuffer(read_exactly(file, rows * n_bytes), np.uint8).reshape(rows, n_bytes)


# ---- out -------------------------------------------------------------------------------------------------------------


def export_gguf(
    checkpoint: Checkpoint,
    out: Path,
    kind: FileType,
    more: Mapping[str, Any] | None = None,
    card: Card | None = None,
) -> None:
    """Write a GGUF file that llama.cpp runs, whole or not at all; the same model gives the same bytes.

    `kind` is of the matrices: vectors and learned positions stay in fp32, and where a row is no whole number of blocks
    the 8 or 4 bits become f16. With 4 bits, embeddings and output layer have 8. The blocks in q4_1 are rounded as by
    `to_int4`, which gives a model that is read from such a file nearly the same. `more` is metadata in place of that
    of the same keys. Raises `InputError` for a model that none of llama.cpp's architectures computes.
    """
    gguf = gguf_package()
    if out.is_dir():
        raise InputError(f"{out}: a folder has this name; name a file, such as {out / 'model.gguf'}")
    if not isinstance(checkpoint.model, GPT):
        raise InputError("a classifier has no form in GGUF; export a base or an instruct model")
    family = next(family for family in FAMILIES if family.matches_gguf(checkpoint.config.gpt))
    config = family.gguf_config(checkpoint.config.gpt)
    with without_weights():
        layout = stored_tensors(GPT(config))
    fields = {
        "general.type": "model",
        "general.name": out.stem,
        "general.file_type": FILE_TYPES[kind],
        "general.quantization_version": 2,
        **family.gguf_fields(config),
        **_tokenizer_fields(checkpoint),
        **(more or {}),
        **(card_fields(card) if card is not None else {}),
    }
    with atomic_file(out) as draft:
        with contextlib.closing(gguf.GGUFWriter(draft, family.gguf_arch)) as writer:
            for key, value in fields.items():
                writer.add_key_value(key, value, _value_type(value))
            for name, tensor in _tensors_out(family, config, layout, layout):
                type_out = _type_out(name, tensor, kind)
                block, block_bytes = gguf.GGML_QUANT_SIZES[type_out]
                n_bytes = tensor.numel() // block * block_bytes
                writer.add_tensor_info(name, tensor.shape, np.dtype(np.float32), n_bytes, type_out)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            weights = {HEAD: checkpoint.model.lm_head.weight, **stored_tensors(checkpoint.model)}
            importance = _importance(checkpoint.model, fused_names(family.gguf_names, layout)) if kind == "q4_1" else {}
            for name, tensor in _tensors_out(family, config, layout, weights):
                type_out, largest = _type_out(name, tensor, kind), tensor.abs().max().item()
                if type_out != gguf.GGMLQuantizationType.F32 and not largest <= torch.finfo(torch.float16).max:
                    raise InputError(
                        f"{name} would hold {largest:.4g}, no number of half precision; export with --dtype f32"
                    )
                if type_out == gguf.GGMLQuantizationType.Q4_1:
                    writer.write_tensor_data(_q4_1(tensor, importance[name]))
                else:
                    writer.write_tensor_data(gguf.quantize(tensor.cpu().numpy(), type_out))
        if card is not None:
            write_digest(draft)


def _tensors_out(
    family: Family, config: GPTConfig, layout: dict[str, Tensor], weights: dict[str, Tensor]
) -> Iterator[tuple[str, Tensor]]:
    """Yield each tensor of the file by name, in fp32. `layout` has all parameters; what `weights` lacks is 0."""
    for target, names in fused_names(family.gguf_names, layout).items():
        tensors = [weights[name] if name in weights else torch.zeros(layout[name].shape) for name in names]
        tensor = torch.cat([tensor.detach().float() for tensor in tensors])
        if offset := family.gguf_offset(names[0]):
            tensor = tensor + offset
        heads = family.rotary_heads(config, names[0])
        yield target, _neighbours(tensor, heads) if heads else tensor
    yield from family.gguf_constants(config).items()


def _importance(model: GPT, names: Mapping[str, Sequence[str]]) -> dict[str, Tensor]:
    """Return the importance of the inputs of each matrix of the blocks, by its name in the file."""
    load_kernels()
    layers = {name: part for name, part in model.named_modules() if isinstance(part, nn.Linear)}
    found = input_importance(model)
    of_first = {target: layers.get(parts[0].removesuffix(".weight")) for target, parts in names.items()}
    return {target: found[layer] for target, layer in of_first.items() if layer is not None and layer in found}


def _q4_1(weight: Tensor, importance: Tensor) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Return the blocks [O, I / 32 * 20] of a matrix [O, I], each of a step, a minimum and 32 numbers in 16 bytes."""
    q, pair = round_to_4_bits(weight, importance)  # [O, G, 32], [O, G, 2]
    numbers = q[..., :16] | q[..., 16:] << 4  # [O, G, 16]
    blocks = torch.cat([pair.view(torch.uint8), numbers], dim=-1)  # [O, G, 20]
    return np.asarray(blocks.flatten(1).numpy(), dtype=np.uint8)


def _tokenizer_fields(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return the tokenizer's metadata; the spare rows of the embedding need names too."""
    _, tokenizer, config = checkpoint
    fields = gguf_tokenizer_fields(tokenizer, config.template, config.system)
    turn_end = config.conversations(tokenizer).turn_end if config.kind == "instruct" else None
    fields |= gguf_chat_fields(config.chat_source, tokenizer, turn_end)
    tokens, types = (list(fields[f"tokenizer.ggml.{name}"]) for name in ("tokens", "token_type"))
    spare = range(len(tokens), checkpoint.config.gpt.vocab_size)
    unused = int(gguf_package().TokenType.UNUSED)
    if scores := fields.get("tokenizer.ggml.scores"):
        fields["tokenizer.ggml.scores"] = [*scores, *(0.0 for _ in spare)]
    return fields | {
        "tokenizer.ggml.tokens": [*tokens, *(f"[PAD{i}]" for i in spare)],
        "tokenizer.ggml.token_type": [*types, *(unused for _ in spare)],
    }


def _value_type(value: Any) -> Any:
    kinds = gguf_package().GGUFValueType
    by_type = {bool: kinds.BOOL, int: kinds.UINT32, float: kinds.FLOAT32, str: kinds.STRING, list: kinds.ARRAY}
    return by_type[type(value)]


def _type_out(name: str, tensor: Tensor, kind: FileType) -> Any:
    kinds = gguf_package().GGMLQuantizationType
    if kind == "f32" or tensor.ndim == 1 or name == POSITIONS:
        return kinds.F32
    if kind == "f16" or tensor.shape[1] % 32:
        return kinds.F16
    return kinds.Q8_0 if name in EMBEDDINGS else kinds[kind.upper()]
