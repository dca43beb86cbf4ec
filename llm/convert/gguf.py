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

import contextlib
import math
from collections import defaultdict
from collections.abc import Iterator
from io import BufferedReader
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from pydantic import ValidationError
from torch import Tensor

from llm.checkpoint.folder import Checkpoint, lm_checkpoint
from llm.checkpoint.weights import assign_tensor, check_layers, stored_tensors, tie_head, without_weights
from llm.common.errors import InputError
from llm.common.files import atomic_file
from llm.common.gguf_header import GGUFHeader, gguf_package, read_exactly, read_gguf_header
from llm.common.stored_tensor import StoredTensor
from llm.config import MAX_SIZE, GPTConfig, RopeScaling, explain
from llm.model.gpt import GPT
from llm.model.rotary import rotary_frequencies
from llm.tokenizer.gguf import gguf_tokenizer_fields, parse_gguf_tokenizer

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
CHUNK = 2**18  # numbers that are dequantised at a time
WINDOW = "attention.sliding_window"
POSITIONS = "position_embd.weight"  # llama.cpp's converter keeps it in fp32 whatever the other matrices are in
FileType = Literal["f32", "f16", "q8_0"]
FILE_TYPES: dict[FileType, int] = {"f32": 0, "f16": 1, "q8_0": 7}  # general.file_type


def read_gguf(path: Path, dtype: torch.dtype | None) -> Checkpoint:
    """The model and tokenizer of a GGUF file, in evaluation mode.

    `dtype` None: half precision where all matrices are stored in it, else fp32. Strict as `checkpoint.load_weights`:
    raises `InputError` with one line for whatever is missing, left over, of another shape or not supported. Beside the
    model only a few rows of one tensor are in memory at a time.
    """
    header = read_gguf_header(path)
    config = _config(path, header)
    tokenizer, template, system = parse_gguf_tokenizer(path, header.fields)
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


def _config(path: Path, header: GGUFHeader) -> GPTConfig:
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
    if scaling is not None or arch != "llama" or stored.dtype != "F32" or stored.shape != (config.head_dim // 2,):
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


def _check_tensors(path: Path, header: GGUFHeader, model: GPT) -> None:
    """Every tensor of the file has its place in the model and the other way round, with the right shape and a type."""
    gguf = gguf_package()
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
        kind = gguf.GGMLQuantizationType[stored.dtype]
        try:
            gguf.dequantize(np.zeros((1, gguf.GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
        except NotImplementedError:
            raise InputError(
                f"{path}: tensor {name} has type {kind.name}, which cannot be read; take a file in F16, Q8_0 or Q4_K_M"
            ) from None


def _stored_dtype(tensors: dict[str, StoredTensor]) -> torch.dtype:
    """One dtype for the whole model, which cannot mix them: that of the matrices."""
    found = {stored.dtype for name, stored in tensors.items() if len(stored.shape) > 1 and name != POSITIONS}
    for name, dtype in (("F16", torch.float16), ("BF16", torch.bfloat16)):
        if found == {name}:
            return dtype
    return torch.float32


def _read_tensor(
    file: BufferedReader, stored: StoredTensor, first_row: int, order: Tensor, shape: torch.Size, dtype: torch.dtype
) -> Tensor:
    """The numbers of a stored tensor from `first_row` on; `order` says where in the result each row belongs.

    The file is read, not mapped, since the pages of a map would count as memory, and a matrix is put in order while it
    is read: a large temporary for each would leave holes in the memory that no later one fits into.
    """
    gguf = gguf_package()
    kind = gguf.GGMLQuantizationType[stored.dtype]
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
    return np.frombuffer(read_exactly(file, rows * n_bytes), np.uint8).reshape(rows, n_bytes)


# ---- out -------------------------------------------------------------------------------------------------------------


def export_gguf(folder: Checkpoint, out: Path, kind: FileType) -> None:
    """Writes a GGUF file that llama.cpp runs; it appears whole or not at all, and the same model gives the same bytes.

    `kind` is of the matrices: vectors and learned positions stay in fp32, and where a row is no whole number of blocks
    q8_0 becomes f16. Raises `InputError` for a model that none of llama.cpp's architectures computes.
    """
    gguf = gguf_package()
    if out.is_dir():
        raise InputError(f"{out}: a folder has this name; name a file, such as {out / 'model.gguf'}")
    if not isinstance(folder.model, GPT):
        raise InputError("a classifier has no form in GGUF; export a base or an instruct model")
    arch, form = _form(folder.config.gpt)
    with without_weights():
        layout = stored_tensors(GPT(form))
    with atomic_file(out) as draft, contextlib.closing(gguf.GGUFWriter(draft, arch)) as writer:
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
    unused = int(gguf_package().TokenType.UNUSED)
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
    return kinds.Q8_0 if kind == "q8_0" and tensor.shape[1] % 32 == 0 else kinds.F16
