"""GGUF files, the format of llama.cpp (ggml's docs/gguf.md): open weights in, our models out.

A file is a header (a magic number, a version, metadata by key, and the name, shape, type and place of each tensor) and
the tensors. The header is parsed here, against the size of the file, since it may come from anywhere; `gguf`'s own
reader trusts it and keeps a memory map of each token and merge, a third of the weights' size for a small model. What
`gguf` does for us is to turn quantised blocks into numbers and numbers into files.

Four things differ from our files. Shapes are written with the innermost dimension first. For the architecture `llama`
the rows of the query and key projections are reordered so that the two halves of a rotary pair are neighbours. GPT-2's
query, key and value are one matrix. A head that is tied to the token embedding is not stored.

Shapes: D head_dim.
"""

from __future__ import annotations

import math
import os
import struct
from collections import defaultdict
from collections.abc import Iterator
from io import BufferedReader
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from pydantic import ValidationError
from torch import Tensor

from llm.checkpoint.folder import Checkpoint, lm_checkpoint
from llm.checkpoint.weights import assign_tensor, check_layers, stored_tensors, tie_head, without_weights
from llm.common.errors import InputError
from llm.config import MAX_SIZE, GPTConfig, RopeScaling, explain
from llm.model.gpt import GPT
from llm.model.rotary import rotary_frequencies
from llm.tokenizer.hf import ImportedTokenizer, gguf_tokenizer_fields, tokenizer_from_gguf

ARCHITECTURES = ("gpt2", "llama", "qwen2", "qwen3")  # llama: also SmolLM2 and Mistral
ENDS = {  # our name, GGUF's
    "tok_emb": "token_embd",
    "pos_emb": "position_embd",
    "final_norm": "output_norm",
    "lm_head": "output",
}
BLOCKS = {
    "norm1": "attn_norm",
    "attn.q_proj": "attn_q",
    "attn.k_proj": "attn_k",
    "attn.v_proj": "attn_v",
    "attn.q_norm": "attn_q_norm",
    "attn.k_norm": "attn_k_norm",
    "attn.out_proj": "attn_output",
    "norm2": "ffn_norm",
    "ffn.gate_proj": "ffn_gate",
    "ffn.up_proj": "ffn_up",
    "ffn.down_proj": "ffn_down",
}
UNDERSTOOD = {  # the metadata of an architecture; with any other key a model might compute something else
    *("block_count", "context_length", "embedding_length", "feed_forward_length", "vocab_size", "tensor_data_layout"),
    *("attention.head_count", "attention.head_count_kv", "attention.key_length", "attention.value_length"),
    *("attention.layer_norm_rms_epsilon", "attention.layer_norm_epsilon", "attention.sliding_window"),
    *("rope.freq_base", "rope.dimension_count", "rope.scale_linear", "rope.scaling.type", "rope.scaling.factor"),
    *("rope.scaling.original_context_length", "rope.scaling.attn_factor", "rope.scaling.finetuned"),
    *("rope.scaling.low_freq_factor", "rope.scaling.high_freq_factor"),  # ours, beside what llama.cpp reads
    *("rope.scaling.yarn_beta_fast", "rope.scaling.yarn_beta_slow"),
}
# ggml's number of a type, struct's letter
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
ALIGNMENT = 32  # of the tensors, where general.alignment says nothing else
MAX_HEADER = 2**27  # bytes; as Python values it takes up to eight times as much
CHUNK = 2**18  # numbers that are dequantised at a time
WINDOW = "attention.sliding_window"
POSITIONS = "position_embd.weight"  # llama.cpp's converter keeps it in fp32 whatever the other matrices are in
FileType = Literal["f32", "f16", "q8_0"]
FILE_TYPES: dict[FileType, int] = {"f32": 0, "f16": 1, "q8_0": 7}  # general.file_type


class StoredTensor(NamedTuple):
    kind: int  # ggml's number of the type
    shape: tuple[int, ...]  # as in PyTorch: outermost first
    start: int  # in the file
    n_bytes: int


class Header(NamedTuple):
    fields: dict[str, Any]  # metadata as plain Python values
    tensors: dict[str, StoredTensor]


def read_gguf(path: Path, dtype: torch.dtype | None) -> Checkpoint:
    """The model and tokenizer of a GGUF file, in evaluation mode.

    `dtype` None: half precision where all matrices are stored in it, else fp32. Strict as `checkpoint.load_weights`:
    raises `InputError` with one line for whatever is missing, left over, of another shape or not supported. Beside the
    model only a few rows of one tensor are in memory at a time.
    """
    header = read_header(path)
    config = _config(path, header)
    tokenizer, template, system = _tokenizer(path, header.fields)
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
    _check_tensors(path, header, model)
    dtype = dtype or _stored_dtype(header.tensors)
    arch = header.fields["general.architecture"]
    with path.open("rb") as file:
        for name, empty in stored_tensors(model).items():
            source, first_row = _place(arch, config, name)
            order = torch.arange(empty.shape[0])
            if heads := _rotary_heads(arch, config, name):
                order = _neighbours(order, heads)
            stored = header.tensors[source]
            assign_tensor(model, name, _read_tensor(file, stored, first_row, order, empty.shape, dtype))
    tie_head(model)
    return lm_checkpoint(model, tokenizer, template, system)


def gguf_tokenizer(path: Path) -> ImportedTokenizer:
    """The tokenizer of a GGUF file, without the weights; raises `InputError` as `read_gguf`."""
    return _tokenizer(path, read_header(path).fields)


def _tokenizer(path: Path, fields: dict[str, Any]) -> ImportedTokenizer:
    if not isinstance(fields.get("tokenizer.ggml.tokens"), list):
        raise InputError(f"{path}: there is no tokenizer in it (tokenizer.ggml.tokens); take a file of a whole model")
    try:
        return tokenizer_from_gguf(fields)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


# ---- the header ------------------------------------------------------------------------------------------------------


def read_header(path: Path) -> Header:
    """Everything but the tensors' numbers. Nothing in it is believed that the size of the file contradicts."""
    try:
        with path.open("rb") as file:
            return _Parser(path, file).header()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); name a .gguf file") from None


class _Parser:
    """Reads a header from front to back; raises `InputError` before it would read beyond the end of the file."""

    def __init__(self, path: Path, file: BufferedReader) -> None:
        self.path = path
        self.file = file
        self.size = os.fstat(file.fileno()).st_size
        self.at = 0

    def wrong(self, problem: str) -> InputError:
        return InputError(f"{self.path}: {problem}; download or copy the file again")

    def take(self, n_bytes: int) -> bytearray:
        self.at += n_bytes
        if self.at > self.size:
            raise self.wrong(f"truncated: the header goes on behind the end of the file, at byte {self.size}")
        if self.at > MAX_HEADER:
            raise self.wrong(f"damaged: the header is longer than {MAX_HEADER} bytes")
        return _read(self.file, n_bytes)

    def number(self, code: str) -> Any:
        return struct.unpack(f"<{code}", self.take(struct.calcsize(f"<{code}")))[0]

    def string(self) -> str:
        try:
            return self.take(self.number("Q")).decode("utf-8")
        except UnicodeDecodeError:
            raise self.wrong(f"damaged: a text before byte {self.at} is not UTF-8") from None

    def value(self) -> Any:
        kind = self.number("I")
        if kind == ARRAY:
            kind, count = self.number("I"), self.number("Q")
            if kind == STRING:
                return [self.string() for _ in range(count)]  # each takes bytes: the file's end ends a false count
            if kind in SCALARS:
                content = self.take(count * struct.calcsize(f"<{SCALARS[kind]}"))
                return list(struct.unpack(f"<{count}{SCALARS[kind]}", content))
        elif kind == STRING:
            return self.string()
        elif kind in SCALARS:
            return self.number(SCALARS[kind])
        raise self.wrong(f"damaged: there is no metadata of type {kind} (byte {self.at})")

    def header(self) -> Header:
        if self.take(min(4, self.size)) != b"GGUF":
            raise InputError(f"{self.path}: not a GGUF file (it does not begin with GGUF); name a .gguf file")
        if (version := self.number("I")) not in (2, 3):
            raise InputError(f"{self.path}: GGUF version {version} is not supported, only 2 and 3; convert it anew")
        n_tensors, n_fields = self.number("Q"), self.number("Q")
        fields: dict[str, Any] = {}
        for _ in range(n_fields):
            key = self.string()
            if key in fields:
                raise self.wrong(f"damaged: metadata {key!r} occurs twice")
            fields[key] = self.value()
        found: dict[str, tuple[int, tuple[int, ...], int]] = {}
        for _ in range(n_tensors):
            name, n_dims = self.string(), self.number("I")
            if name in found or not 1 <= n_dims <= 4:
                raise self.wrong(f"damaged: tensor {name!r} occurs twice or has {n_dims} dimensions")
            shape = tuple(self.number("Q") for _ in range(n_dims))[::-1]
            found[name] = (self.number("I"), shape, self.number("Q"))
        alignment = fields.get("general.alignment", ALIGNMENT)
        if not isinstance(alignment, int) or alignment < 1:
            raise self.wrong(f"damaged: general.alignment is {alignment}")
        data = -(-self.at // alignment) * alignment
        return Header(fields, self.places(found, data))

    def places(self, found: dict[str, tuple[int, tuple[int, ...], int]], data: int) -> dict[str, StoredTensor]:
        """Where each tensor lies, the tensors' part beginning at byte `data`; they neither overlap nor leave the file.

        So what is read can never be more than a small multiple of the file.
        """
        gguf = _gguf()
        sizes = {int(kind): size for kind, size in gguf.GGML_QUANT_SIZES.items()}  # numbers and bytes of a block
        tensors = {}
        end = data
        for name, (kind, shape, offset) in sorted(found.items(), key=lambda item: item[1][2]):
            if kind not in sizes:
                raise InputError(f"{self.path}: tensor {name!r} has type {kind}, which this gguf package does not know")
            block, block_bytes = sizes[kind]
            if shape[-1] % block or 0 in shape:
                raise self.wrong(f"damaged: tensor {name!r} of shape {list(shape)} is not made of blocks of {block}")
            n_bytes = math.prod(shape) // block * block_bytes
            if data + offset < end:
                raise self.wrong(f"damaged: tensor {name!r} begins inside another one")
            end = data + offset + n_bytes
            if end > self.size:
                raise self.wrong(f"truncated: tensor {name!r} would end at byte {end}, the file ends at {self.size}")
            tensors[name] = StoredTensor(kind, shape, data + offset, n_bytes)
        return tensors


def _gguf() -> ModuleType:
    """The `gguf` package, an extra."""
    try:
        import gguf
    except ImportError:
        raise InputError("GGUF files need the gguf package: pip install 'textmill[gguf]'") from None
    return gguf


# ---- metadata to config ----------------------------------------------------------------------------------------------


class _Metadata(NamedTuple):
    """What a file says about its architecture; raises `InputError` for what is missing or makes no sense."""

    path: Path
    arch: str
    fields: dict[str, Any]

    def size(self, key: str, default: int | None = None) -> int:
        value = self.fields.get(f"{self.arch}.{key}", default)
        if type(value) is not int or not 1 <= value <= MAX_SIZE:
            raise InputError(
                f"{self.path}: {self.arch}.{key}: expected a number from 1 to {MAX_SIZE}, found {_shown(value)}; "
                "convert or download the file again"
            )
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self.fields.get(f"{self.arch}.{key}", default)
        if not isinstance(value, int | float):
            raise InputError(
                f"{self.path}: {self.arch}.{key}: expected a number, found {_shown(value)}; convert the file again"
            )
        return _decimal(value)


def _shown(value: Any) -> str:
    return f"{value!r:.80}"


def _decimal(value: float) -> float:
    """The shortest decimal that a file's 32 bits stand for: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(value)))


def _config(path: Path, header: Header) -> GPTConfig:
    fields, tensors = header
    arch = fields.get("general.architecture")
    if arch not in ARCHITECTURES:
        raise InputError(f"{path}: architecture {_shown(arch)} is not supported, only {', '.join(ARCHITECTURES)}")
    if fields.get("split.count", 1) != 1:
        raise InputError(f"{path}: one of {fields['split.count']} parts; merge them with llama-gguf-split --merge")
    for key in fields:
        if key.startswith(f"{arch}.") and key.removeprefix(f"{arch}.") not in UNDERSTOOD:
            raise InputError(f"{path}: {key!r} is not supported: the model would compute something else")
    metadata = _Metadata(path, arch, fields)
    size, number = metadata.size, metadata.number

    learned = arch == "gpt2"
    emb_dim, n_heads = size("embedding_length"), size("attention.head_count")
    head_dim = size("attention.key_length", emb_dim // n_heads)
    for key in ("attention.value_length", "rope.dimension_count"):
        if size(key, head_dim) != head_dim:
            raise InputError(f"{path}: {arch}.{key} = {size(key)} is not supported, only a whole head, {head_dim}")
    if "token_embd.weight" not in tensors:
        raise InputError(f"{path}: tensor token_embd.weight is missing; the file does not hold a whole {arch} model")
    try:
        config = GPTConfig(
            vocab_size=tensors["token_embd.weight"].shape[0],
            context_length=size("context_length"),
            emb_dim=emb_dim,
            n_layers=size("block_count"),
            n_heads=n_heads,
            n_kv_heads=size("attention.head_count_kv", n_heads),
            head_dim=head_dim,
            ffn_dim=size("feed_forward_length"),
            positions="learned" if learned else "rotary",
            rope_theta=number("rope.freq_base", 10000.0),
            norm="layernorm" if learned else "rmsnorm",
            norm_eps=number("attention.layer_norm_epsilon" if learned else "attention.layer_norm_rms_epsilon"),
            activation="gelu" if learned else "swiglu",
            qk_norm=arch == "qwen3",
            qkv_bias=any(f"blk.0.{name}.bias" in tensors for name in ("attn_qkv", "attn_q")),
            bias="blk.0.attn_output.bias" in tensors,
            tie_embeddings="output.weight" not in tensors,
            sliding_window=size(WINDOW) if f"{arch}.{WINDOW}" in fields else None,
        )
        return config.model_copy(update={"rope_scaling": _rope_scaling(metadata, tensors, config)})
    except ValidationError as error:
        raise InputError(explain(error, str(path))) from None


def _rope_scaling(metadata: _Metadata, tensors: dict[str, StoredTensor], config: GPTConfig) -> RopeScaling | None:
    """`config` is the model without it. Llama 3's is no metadata but a tensor, what each frequency is divided by."""
    path, arch, fields = metadata
    size, number = metadata.size, metadata.number
    kind = fields.get(f"{arch}.rope.scaling.type", "linear")
    factor = number("rope.scaling.factor", number("rope.scale_linear", 0.0)) or 1.0  # 0: none, as llama.cpp reads it
    attention = number("rope.scaling.attn_factor", 1.0)
    scaling: RopeScaling | None = None
    if kind == "yarn":
        scaling = RopeScaling(
            kind="yarn",
            factor=factor,
            original_context_length=size("rope.scaling.original_context_length", config.context_length),
            beta_fast=number("rope.scaling.yarn_beta_fast", 32.0),
            beta_slow=number("rope.scaling.yarn_beta_slow", 1.0),
            attention_factor=_yarn_attention(factor) * attention,
        )
    elif kind not in ("none", "linear") or attention != 1:
        raise InputError(
            f"{path}: {arch}.rope.scaling.type {_shown(kind)} with attn_factor {attention} is not supported"
        )
    elif kind == "linear" and factor != 1:
        scaling = RopeScaling(kind="linear", factor=factor)
    stored = tensors.get("rope_freqs.weight")
    if stored is None:
        return scaling
    if scaling is not None or arch != "llama" or stored.kind != 0 or stored.shape != (config.head_dim // 2,):
        raise InputError(f"{path}: tensor rope_freqs.weight of this type and shape is not supported in {arch}")
    with path.open("rb") as file:
        order = torch.arange(stored.shape[0])
        factors = _read_tensor(file, stored, 0, order, order.shape, torch.float32)  # [D/2]
    scaling = RopeScaling(
        kind="llama3",
        factor=_decimal(factors.max().item()),
        original_context_length=size("rope.scaling.original_context_length", 8192),  # so all of Llama 3.1 to 3.3
        low_freq_factor=number("rope.scaling.low_freq_factor", 1.0),
        high_freq_factor=number("rope.scaling.high_freq_factor", 4.0),
    )
    if not torch.allclose(_rope_factors(config, scaling), factors, rtol=1e-4):
        raise InputError(f"{path}: tensor rope_freqs.weight is not Llama 3's rope scaling; no other is supported")
    return scaling


def _yarn_attention(factor: float) -> float:
    """What llama.cpp multiplies cos and sin with when it applies YaRN, beside the file's attn_factor."""
    return 0.1 * math.log(max(factor, 1.0)) + 1


def _rope_factors(config: GPTConfig, scaling: RopeScaling) -> Tensor:
    """What each pair's frequency is divided by, [D/2]."""
    plain, scaled = (
        rotary_frequencies(config.model_copy(update={"rope_scaling": value}), torch.device("cpu"))
        for value in (None, scaling)
    )
    return plain / scaled


# ---- tensors in ------------------------------------------------------------------------------------------------------


def _gguf_name(arch: str, name: str) -> str:
    """Where a parameter of ours is kept: `blocks.3.attn.q_proj.weight` in `blk.3.attn_q.weight`."""
    module, _, leaf = name.rpartition(".")
    if not module.startswith("blocks."):
        return f"{ENDS[module]}.{leaf}"
    _, layer, part = module.split(".", 2)
    fused = arch == "gpt2" and part in ("attn.q_proj", "attn.k_proj", "attn.v_proj")
    return f"blk.{layer}.{'attn_qkv' if fused else BLOCKS[part]}.{leaf}"


def _place(arch: str, config: GPTConfig, name: str) -> tuple[str, int]:
    """The tensor that holds a parameter, and from which row on."""
    source = _gguf_name(arch, name)
    if ".attn_qkv." not in source or ".q_proj." in name:
        return source, 0
    q, kv = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
    return source, q if ".k_proj." in name else q + kv


def _rotary_heads(arch: str, config: GPTConfig, name: str) -> int:
    """How many heads a tensor has whose rows llama.cpp keeps as neighbouring rotary pairs; 0: it has none."""
    if arch != "llama":
        return 0
    return config.n_heads if ".q_proj." in name else config.n_kv_heads if ".k_proj." in name else 0


def _neighbours(rows: Tensor, heads: int) -> Tensor:
    """Rows of each head from rotary pairs of its halves, (0, D/2), (1, D/2 + 1)..., to neighbours: 0, D/2, 1, ..."""
    return rows.view(heads, 2, -1, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)


def _check_tensors(path: Path, header: Header, model: GPT) -> None:
    """Every tensor of the file has its place in the model and the other way round, with the right shape and a type."""
    gguf = _gguf()
    arch = header.fields["general.architecture"]
    expected: dict[str, list[int]] = {"rope_freqs.weight": []} if "rope_freqs.weight" in header.tensors else {}
    for name, tensor in stored_tensors(model).items():
        source = _gguf_name(arch, name)
        rows = expected[source][0] if source in expected else 0  # of a fused matrix, so far
        expected[source] = [rows + tensor.shape[0], *tensor.shape[1:]]
    for name, shape in expected.items():
        if name not in header.tensors:
            raise InputError(f"{path}: tensor {name} is missing; the file does not hold a whole {arch} model")
        found = list(header.tensors[name].shape)
        if shape and found != shape:
            raise InputError(f"{path}: tensor {name} has shape {found}, the metadata asks for {shape}")
    if extra := sorted(set(header.tensors) - set(expected)):
        raise InputError(f"{path}: tensor {extra[0]!r} has no place in a {arch} model ({len(extra)} left over)")
    for name, stored in header.tensors.items():
        kind = gguf.GGMLQuantizationType(stored.kind)
        try:
            gguf.dequantize(np.zeros((1, gguf.GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
        except NotImplementedError:
            raise InputError(
                f"{path}: tensor {name} has type {kind.name}, which cannot be read; take a file in F16, Q8_0 or Q4_K_M"
            ) from None


def _stored_dtype(tensors: dict[str, StoredTensor]) -> torch.dtype:
    """One dtype for the whole model, which cannot mix them: that of the matrices."""
    kinds = _gguf().GGMLQuantizationType
    found = {stored.kind for name, stored in tensors.items() if len(stored.shape) > 1 and name != POSITIONS}
    for kind, dtype in ((kinds.F16, torch.float16), (kinds.BF16, torch.bfloat16)):
        if found == {kind}:
            return dtype
    return torch.float32


def _read_tensor(
    file: BufferedReader, stored: StoredTensor, first_row: int, order: Tensor, shape: torch.Size, dtype: torch.dtype
) -> Tensor:
    """The numbers of a stored tensor from `first_row` on; `order` says where in the result each row belongs.

    The file is read, not mapped, since the pages of a map would count as memory, and a matrix is put in order while it
    is read: a large temporary for each would leave holes in the memory that no later one fits into.
    """
    gguf = _gguf()
    kind = gguf.GGMLQuantizationType(stored.kind)
    tensor = torch.empty(shape, dtype=dtype)
    if len(shape) == 1:  # a row of blocks cannot be cut before it is dequantised
        numbers = gguf.dequantize(_rows(file, stored.start, 1, stored.n_bytes), kind)[0]
        return tensor.index_copy_(0, order, torch.from_numpy(numbers[first_row : first_row + len(order)]).to(dtype))
    row_bytes = stored.n_bytes // stored.shape[0]
    for part in order.split(max(1, CHUNK // shape[1])):
        content = _rows(file, stored.start + first_row * row_bytes, len(part), row_bytes)
        tensor.index_copy_(0, part, torch.from_numpy(gguf.dequantize(content, kind)).to(dtype))
        first_row += len(part)
    return tensor


def _rows(file: BufferedReader, start: int, rows: int, n_bytes: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """`rows` rows of `n_bytes` bytes each."""
    file.seek(start)
    return np.frombuffer(_read(file, rows * n_bytes), np.uint8).reshape(rows, n_bytes)


def _read(file: BufferedReader, n_bytes: int) -> bytearray:
    content = bytearray(n_bytes)
    if file.readinto(content) != n_bytes:
        raise InputError(f"{file.name}: it became shorter while it was read; try again")
    return content


# ---- out -------------------------------------------------------------------------------------------------------------


def export_gguf(folder: Checkpoint, out: Path, kind: FileType) -> None:
    """Writes a GGUF file that llama.cpp runs; it appears whole or not at all, and the same model gives the same bytes.

    `kind` is of the matrices: vectors and learned positions stay in fp32, and where a row is no whole number of blocks
    q8_0 becomes f16. Raises `InputError` for a model that none of llama.cpp's architectures computes.
    """
    gguf = _gguf()
    if out.is_dir():
        raise InputError(f"{out}: a folder has this name; name a file, such as {out / 'model.gguf'}")
    if not isinstance(folder.model, GPT):
        raise InputError("a classifier has no form in GGUF; export a base or an instruct model")
    arch, form = _form(folder.config.gpt)
    with without_weights():
        layout = stored_tensors(GPT(form))
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(out.name + ".partial")
    writer = gguf.GGUFWriter(partial, arch)
    try:
        for key, value in (_metadata_out(arch, form, out.stem, kind) | _tokenizer_out(folder)).items():
            writer.add_key_value(key, value, _value_type(value))
        for name, tensor in _tensors_out(arch, form, layout, layout):
            block, block_bytes = gguf.GGML_QUANT_SIZES[_type_out(name, tensor, kind)]
            n_bytes = tensor.numel() // block * block_bytes
            writer.add_tensor_info(name, tensor.shape, np.dtype(np.float32), n_bytes, _type_out(name, tensor, kind))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for name, tensor in _tensors_out(arch, form, layout, stored_tensors(folder.model)):
            type_out, largest = _type_out(name, tensor, kind), tensor.abs().max().item()
            if type_out != gguf.GGMLQuantizationType.F32 and not largest <= torch.finfo(torch.float16).max:
                raise InputError(
                    f"{name} would hold {largest:.4g}, no number of half precision; export with --dtype f32"
                )
            writer.write_tensor_data(gguf.quantize(tensor.cpu().numpy(), type_out))
        writer.close()
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        partial.replace(out)
    finally:
        writer.close()
        partial.unlink(missing_ok=True)


def _tensors_out(
    arch: str, form: GPTConfig, layout: dict[str, Tensor], weights: dict[str, Tensor]
) -> Iterator[tuple[str, Tensor]]:
    """Each tensor of the file by name, in fp32. `layout` has all parameters of the file; what `weights` lacks is 0."""
    sources: dict[str, list[str]] = defaultdict(list)
    for name in layout:
        sources[_gguf_name(arch, name)].append(name)
    for target, names in sources.items():
        tensors = [weights[name] if name in weights else torch.zeros(layout[name].shape) for name in names]
        tensor = torch.cat([tensor.detach().float() for tensor in tensors])
        heads = _rotary_heads(arch, form, names[0])
        yield target, _neighbours(tensor, heads) if heads else tensor
    if form.rope_scaling is not None and form.rope_scaling.kind == "llama3":
        yield "rope_freqs.weight", _rope_factors(form, form.rope_scaling)


def _form(config: GPTConfig) -> tuple[str, GPTConfig]:
    """The architecture of llama.cpp that computes what a config says, and the config as its files say it.

    `InputError` names the option that stands in the way.
    """

    def refuse(option: str, instead: str) -> InputError:
        value = getattr(config, option)
        shown = value.kind if isinstance(value, RopeScaling) else value
        beside = f"{config.positions} positions" + (" and qk_norm" if config.qk_norm and option != "qk_norm" else "")
        return InputError(f"{option} {shown}: no architecture of llama.cpp has it with {beside}, only {instead}")

    learned = config.positions == "learned"
    needed: dict[str, Any] = {"norm": "rmsnorm", "activation": "swiglu"}
    if learned:
        needed = {"norm": "layernorm", "activation": "gelu", "qk_norm": False}
    elif config.qk_norm:
        needed |= {"qkv_bias": False, "bias": False}
    for option, value in needed.items():
        if getattr(config, option) != value:
            raise refuse(option, f"{option} {value}")
    whole = config.n_heads * config.head_dim == config.emb_dim
    if learned and not whole:
        raise refuse("head_dim", f"emb_dim / n_heads, {config.emb_dim / config.n_heads:g}")
    if config.sliding_window is not None and config.sliding_window < config.context_length:
        raise refuse("sliding_window", "none: make context_length as short")
    form = config.model_copy(update={"sliding_window": None})
    scaling = None if learned else config.rope_scaling
    if scaling is not None and scaling.kind == "yarn" and (scaling.beta_fast, scaling.beta_slow) != (32, 1):
        raise refuse("rope_scaling", "one with beta_fast 32 and beta_slow 1")
    llama3 = scaling is not None and scaling.kind == "llama3"
    if learned:  # its biases are not optional: what a model lacks is written as 0
        return "gpt2", form.model_copy(update={"qkv_bias": True, "bias": True, "rope_scaling": None})
    if config.qk_norm:
        if llama3:
            raise refuse("rope_scaling", "linear or yarn")
        return "qwen3", form
    if config.qkv_bias and not config.bias and whole and not llama3:
        return "qwen2", form
    return "llama", form


def _metadata_out(arch: str, form: GPTConfig, name: str, kind: FileType) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "general.type": "model",
        "general.name": name,
        "general.file_type": FILE_TYPES[kind],
        "general.quantization_version": 2,
    }
    values: dict[str, Any] = {
        "block_count": form.n_layers,
        "context_length": form.context_length,
        "embedding_length": form.emb_dim,
        "feed_forward_length": form.ffn_dim,
        "vocab_size": form.vocab_size,
        "attention.head_count": form.n_heads,
        "attention.head_count_kv": form.n_kv_heads,
    }
    if form.positions == "learned":
        values["attention.layer_norm_epsilon"] = form.norm_eps
    else:
        values |= {
            "attention.layer_norm_rms_epsilon": form.norm_eps,
            "attention.key_length": form.head_dim,
            "attention.value_length": form.head_dim,
            "rope.dimension_count": form.head_dim,
            "rope.freq_base": float(form.rope_theta),
        }
    scaling = form.rope_scaling
    if scaling is not None and scaling.kind == "llama3":  # what is applied is rope_freqs.weight
        values |= {
            "rope.scaling.original_context_length": scaling.original_context_length,
            "rope.scaling.low_freq_factor": scaling.low_freq_factor,
            "rope.scaling.high_freq_factor": scaling.high_freq_factor,
        }
    elif scaling is not None:
        values |= {"rope.scaling.type": scaling.kind, "rope.scaling.factor": float(scaling.factor)}
        if scaling.attention_factor is not None:
            values["rope.scaling.original_context_length"] = scaling.original_context_length
            values["rope.scaling.attn_factor"] = scaling.attention_factor / _yarn_attention(scaling.factor)
    return fields | {f"{arch}.{key}": value for key, value in values.items()}


def _tokenizer_out(folder: Checkpoint) -> dict[str, Any]:
    """The tokenizer's metadata; the rows of the embedding that stand for nothing need names too."""
    fields = gguf_tokenizer_fields(folder.tokenizer, folder.config.template, folder.config.system)
    tokens, types = (list(fields[f"tokenizer.ggml.{name}"]) for name in ("tokens", "token_type"))
    spare = range(len(tokens), folder.config.gpt.vocab_size)
    unused = int(_gguf().TokenType.UNUSED)
    return fields | {
        "tokenizer.ggml.tokens": [*tokens, *(f"[PAD{i}]" for i in spare)],
        "tokenizer.ggml.token_type": [*types, *(unused for _ in spare)],
    }


def _value_type(value: Any) -> Any:
    kinds = _gguf().GGUFValueType
    by_type = {bool: kinds.BOOL, int: kinds.UINT32, float: kinds.FLOAT32, str: kinds.STRING, list: kinds.ARRAY}
    return by_type[type(value)]


def _type_out(name: str, tensor: Tensor, kind: FileType) -> Any:
    kinds = _gguf().GGMLQuantizationType
    if kind == "f32" or tensor.ndim == 1 or name == POSITIONS:
        return kinds.F32
    return kinds.Q8_0 if kind == "q8_0" and tensor.shape[1] % 32 == 0 else kinds.F16
