"""Open weights in, other tools' formats out: the folders that Hugging Face's transformers reads and writes.

A family of open models is a form of its config and a table of its names, each used in both directions; the model is
`GPT` for all of them. Tensors are copied one by one from the mapped file into their place, so that the weights are in
memory once. Sources: transformers' documentation of `config.json` and of the models' classes.
"""

from __future__ import annotations

import contextlib
import json
import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from safetensors import SafetensorError, safe_open
from torch import Tensor

from llm.checkpoint.folder import Checkpoint, lm_checkpoint, load_checkpoint
from llm.checkpoint.weights import (
    assign_tensor,
    check_layers,
    stored_tensors,
    tie_head,
    unreadable,
    without_weights,
    write_tensors,
)
from llm.common.errors import InputError
from llm.common.files import read_json_object, replaced_folder
from llm.common.stored_tensor import StoredTensor
from llm.config import GPTConfig, Layers, NonNegative, NonNegativeFloat, Positive, PositiveFloat, RopeScaling, explain
from llm.download.hub import PICKLED, source_files
from llm.model.gpt import GPT
from llm.tokenizer.bpe import FILE_NAME as OUR_TOKENIZER
from llm.tokenizer.hf import read_tokenizer_json, write_tokenizer_json
from llm.tokenizer.prompts import end_tokens

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
COPY = "give a folder with config.json, weights and tokenizer"
DTYPES = ("F32", "F16", "BF16")  # as safetensors names them


# ---- in --------------------------------------------------------------------------------------------------------------


def import_model(source: str, dtype: torch.dtype | None = None) -> Checkpoint:
    """Weights, tokenizer and template of a folder, a .gguf file or a hub name, in evaluation mode.

    A folder is transformers' or one of ours. `dtype` None keeps the one that the weights are stored in. The kind is
    instruct where the chat template is one that we know, else base. Raises `InputError` for anything that is missing,
    left over or that `GPT` cannot express.
    """
    path = source_files(source)
    if path.is_file():
        from llm.convert.gguf import read_gguf

        return read_gguf(path, dtype)
    if (path / OUR_TOKENIZER).is_file():
        return load_checkpoint(path, dtype=dtype)
    form = read_form(path / "config.json")
    config = form.gpt_config()
    tokenizer, template, system = read_tokenizer_json(path)
    if tokenizer.vocab_size > config.vocab_size:
        raise InputError(
            f"{path}: the tokenizer has {tokenizer.vocab_size} tokens, the embedding only {config.vocab_size}; "
            "they do not belong together"
        )
    found = stored_in(path)
    check_layers(path, len(found), config)
    with without_weights():
        model = GPT(config)
    read_weights(model, path, found, NAMES[form.model_type], dtype)
    return lm_checkpoint(model, tokenizer, template, system)


# ---- configs of the families -----------------------------------------------------------------------------------------


class Form(BaseModel):
    """The part of a `config.json` that says what is computed, under its own names and with transformers' defaults.

    What `GPT` has no option for has a single value here; anything else is an error that names it.
    """

    model_config = ConfigDict(frozen=True, extra="ignore", strict=True)

    quantization_config: None = None
    vocab_size: Positive


class GPT2Form(Form):
    model_type: Literal["gpt2"] = "gpt2"
    n_positions: Positive
    n_embd: Positive
    n_layer: Positive
    n_head: Positive
    n_inner: Positive | None = None
    activation_function: Literal["gelu_new", "gelu_pytorch_tanh", "gelu_fast"] = "gelu_new"  # one formula, three names
    layer_norm_epsilon: PositiveFloat = 1e-5
    tie_word_embeddings: bool = True
    scale_attn_weights: Literal[True] = True
    scale_attn_by_inverse_layer_idx: Literal[False] = False
    add_cross_attention: Literal[False] = False

    @model_validator(mode="after")
    def _heads(self) -> Self:
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd {self.n_embd} must be a multiple of n_head {self.n_head}")
        return self

    def gpt_config(self) -> GPTConfig:
        return GPTConfig(
            vocab_size=self.vocab_size,
            context_length=self.n_positions,
            emb_dim=self.n_embd,
            n_layers=self.n_layer,
            n_heads=self.n_head,
            n_kv_heads=self.n_head,
            head_dim=self.n_embd // self.n_head,
            ffn_dim=self.n_inner or 4 * self.n_embd,
            positions="learned",
            rope_theta=10000.0,  # unused
            norm="layernorm",
            norm_eps=self.layer_norm_epsilon,
            activation="gelu",
            qk_norm=False,
            qkv_bias=True,
            bias=True,
            tie_embeddings=self.tie_word_embeddings,
        )

    @classmethod
    def of(cls, gpt: GPTConfig) -> Self:
        return cls(
            model_type="gpt2",
            vocab_size=gpt.vocab_size,
            n_positions=gpt.context_length,
            n_embd=gpt.emb_dim,
            n_layer=gpt.n_layers,
            n_head=gpt.n_heads,
            n_inner=gpt.ffn_dim,
            activation_function="gelu_new",
            layer_norm_epsilon=gpt.norm_eps,
            tie_word_embeddings=gpt.tie_embeddings,
        )


RopeType = Literal["default", "linear", "llama3", "yarn"]


class RopeForm(BaseModel):
    """`rope_scaling`, or since transformers 5 `rope_parameters`."""

    model_config = ConfigDict(frozen=True, extra="allow", strict=True)

    rope_type: RopeType | None = None
    type: RopeType | None = None  # its name before transformers 4.43
    rope_theta: PositiveFloat | None = None
    factor: PositiveFloat | None = None
    original_max_position_embeddings: Positive | None = None
    low_freq_factor: PositiveFloat | None = None
    high_freq_factor: PositiveFloat | None = None
    beta_fast: PositiveFloat | None = None
    beta_slow: PositiveFloat | None = None
    attention_factor: PositiveFloat | None = None
    mscale: NonNegativeFloat | None = None
    mscale_all_dim: NonNegativeFloat | None = None
    truncate: Literal[True] | None = None
    partial_rotary_factor: Annotated[float, Field(ge=1, le=1)] | None = None

    @model_validator(mode="after")
    def _known(self) -> Self:
        if self.model_extra:
            raise ValueError(f"{next(iter(self.model_extra))} is an option that GPT does not have")
        return self

    def scaling(self, original_context_length: int) -> RopeScaling | None:
        kind = self.rope_type or self.type or "default"
        if kind == "default":
            return None
        values: dict[str, Any] = {"kind": kind, "factor": self.factor}
        if kind != "linear":
            values["original_context_length"] = original_context_length
        if kind == "llama3":
            values |= {"low_freq_factor": self.low_freq_factor, "high_freq_factor": self.high_freq_factor}
        if kind == "yarn":
            values |= {"beta_fast": self.beta_fast or 32.0, "beta_slow": self.beta_slow or 1.0}
            values["attention_factor"] = self.attention_factor or self._yarn_attention_factor()
        return RopeScaling(**values)

    def _yarn_attention_factor(self) -> float:
        """What the paper recommends for a factor, or the ratio of two of those where a model says so (DeepSeek)."""

        def recommended(weight: float) -> float:
            return 1.0 + 0.1 * weight * math.log(max(self.factor or 1.0, 1.0))

        if self.mscale and self.mscale_all_dim:
            return recommended(self.mscale) / recommended(self.mscale_all_dim)
        return recommended(1.0)


class LlamaForm(Form):
    """Llama and those that differ from it by an option or two."""

    model_type: Literal["llama", "mistral", "qwen2", "qwen3"]
    max_position_embeddings: Positive
    hidden_size: Positive
    num_hidden_layers: Layers
    num_attention_heads: Positive
    num_key_value_heads: Positive | None = None
    head_dim: Positive | None = None
    intermediate_size: Positive
    hidden_act: Literal["silu", "swish"] = "silu"  # one function, two names
    rms_norm_eps: PositiveFloat = 1e-6
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    rope_theta: PositiveFloat = 10000.0
    rope_scaling: RopeForm | None = None
    rope_parameters: RopeForm | None = None
    original_max_position_embeddings: Positive | None = None
    partial_rotary_factor: Annotated[float, Field(ge=1, le=1)] = 1.0
    rope_interleaved: Literal[False] = False
    sliding_window: Positive | None = 4096  # of mistral; of qwen where it is switched on
    use_sliding_window: bool = False
    max_window_layers: NonNegative = 28
    layer_types: list[Literal["full_attention", "sliding_attention"]] | None = None

    @model_validator(mode="after")
    def _expressible(self) -> Self:
        if self.model_type in ("llama", "qwen3") and self.attention_bias != self.mlp_bias:
            raise ValueError(
                f"attention_bias {self.attention_bias} with mlp_bias {self.mlp_bias}: GPT has biases behind the "
                "attention and in the feed-forward layers, or in neither"
            )
        if len(set(self._layer_types())) > 1:
            raise ValueError("layer_types: full and sliding attention are mixed, GPT has one kind for all layers")
        return self

    def _layer_types(self) -> list[str]:
        n = self.num_hidden_layers
        if self.layer_types is not None:
            return list(self.layer_types)
        if self.model_type in ("qwen2", "qwen3") and self.use_sliding_window:
            full = min(n, self.max_window_layers)
            return ["full_attention"] * full + ["sliding_attention"] * (n - full)
        return ["sliding_attention" if self.model_type == "mistral" else "full_attention"] * n

    def gpt_config(self) -> GPTConfig:
        rope = self.rope_scaling or self.rope_parameters or RopeForm()
        original = self.original_max_position_embeddings or rope.original_max_position_embeddings
        qkv_bias = {"llama": self.attention_bias, "qwen2": True, "qwen3": self.attention_bias, "mistral": False}
        return GPTConfig(
            vocab_size=self.vocab_size,
            context_length=self.max_position_embeddings,
            emb_dim=self.hidden_size,
            n_layers=self.num_hidden_layers,
            n_heads=self.num_attention_heads,
            n_kv_heads=self.num_key_value_heads or self.num_attention_heads,
            head_dim=self.head_dim or self.hidden_size // self.num_attention_heads,
            ffn_dim=self.intermediate_size,
            positions="rotary",
            rope_theta=rope.rope_theta or self.rope_theta,
            rope_scaling=rope.scaling(original or self.max_position_embeddings),
            norm="rmsnorm",
            norm_eps=self.rms_norm_eps,
            activation="swiglu",
            qk_norm=self.model_type == "qwen3",
            qkv_bias=qkv_bias[self.model_type],
            bias=self.mlp_bias and self.model_type in ("llama", "qwen3"),
            tie_embeddings=self.tie_word_embeddings,
            sliding_window=self.sliding_window if "sliding_attention" in self._layer_types() else None,
        )

    @classmethod
    def of(cls, gpt: GPTConfig) -> Self:
        values: dict[str, Any] = {
            "vocab_size": gpt.vocab_size,
            "max_position_embeddings": gpt.context_length,
            "hidden_size": gpt.emb_dim,
            "num_hidden_layers": gpt.n_layers,
            "num_attention_heads": gpt.n_heads,
            "num_key_value_heads": gpt.n_kv_heads,
            "head_dim": gpt.head_dim,
            "intermediate_size": gpt.ffn_dim,
            "hidden_act": "silu",
            "rms_norm_eps": gpt.norm_eps,
            "tie_word_embeddings": gpt.tie_embeddings,
            "rope_theta": gpt.rope_theta,
        }
        if gpt.rope_scaling is not None:  # as transformers 4 and 5 both read it
            scaling = gpt.rope_scaling.model_dump(exclude_none=True)
            renamed = {"kind": "rope_type", "original_context_length": "original_max_position_embeddings"}
            values["rope_scaling"] = {renamed.get(name, name): value for name, value in scaling.items()}
        if gpt.qk_norm:
            values["model_type"] = "qwen3"
        elif gpt.qkv_bias and not gpt.bias:
            values["model_type"] = "qwen2"
        elif gpt.sliding_window is not None or gpt.emb_dim % gpt.n_heads:  # which transformers' Llama refuses
            values["model_type"] = "mistral"
        else:
            values |= {"model_type": "llama", "attention_bias": gpt.bias, "mlp_bias": gpt.bias}
        if values["model_type"] == "mistral":
            values["sliding_window"] = gpt.sliding_window
        elif gpt.sliding_window is not None:
            values |= {"use_sliding_window": True, "sliding_window": gpt.sliding_window, "max_window_layers": 0}
        return cls.model_validate(values)


def read_form(path: Path) -> GPT2Form | LlamaForm:
    """A `config.json` of transformers; raises `InputError` for one that `GPT` cannot express."""
    content = read_json_object(path, COPY)
    model_type = content.get("model_type")
    if str(model_type) not in NAMES:
        raise InputError(f"{path}: model_type {model_type!r} is not known; known are {', '.join(NAMES)}")
    try:
        form = (GPT2Form if model_type == "gpt2" else LlamaForm).model_validate(content)
        form.gpt_config()
    except ValidationError as error:
        raise InputError(explain(error, str(path))) from None
    return form


def form_of(gpt: GPTConfig) -> GPT2Form | LlamaForm:
    """The form of transformers that says the same as a config; raises `InputError` naming what none can say."""
    try:
        form = GPT2Form.of(gpt) if gpt.positions == "learned" else LlamaForm.of(gpt)
    except ValidationError as error:
        raise InputError(explain(error, "transformers' form")) from None
    said = form.gpt_config()
    unused = {"rope_theta"} if gpt.positions == "learned" else set()
    problems = [
        f"{name} {getattr(gpt, name)!r} (only {getattr(said, name)!r})"
        for name in GPTConfig.model_fields
        if name not in unused and getattr(gpt, name) != getattr(said, name)
    ]
    if problems:
        raise InputError(f"transformers' form {form.model_type} has no place for {', '.join(problems)}")
    return form


# ---- names of the families -------------------------------------------------------------------------------------------

GPT2_NAMES = {
    "tok_emb": "transformer.wte",
    "pos_emb": "transformer.wpe",
    "blocks.{}.norm1": "transformer.h.{}.ln_1",
    "blocks.{}.attn.q_proj": "transformer.h.{}.attn.c_attn",  # q, k and v side by side
    "blocks.{}.attn.k_proj": "transformer.h.{}.attn.c_attn",
    "blocks.{}.attn.v_proj": "transformer.h.{}.attn.c_attn",
    "blocks.{}.attn.out_proj": "transformer.h.{}.attn.c_proj",
    "blocks.{}.norm2": "transformer.h.{}.ln_2",
    "blocks.{}.ffn.up_proj": "transformer.h.{}.mlp.c_fc",
    "blocks.{}.ffn.down_proj": "transformer.h.{}.mlp.c_proj",
    "final_norm": "transformer.ln_f",
    "lm_head": "lm_head",
}
LLAMA_NAMES = {
    "tok_emb": "model.embed_tokens",
    "blocks.{}.norm1": "model.layers.{}.input_layernorm",
    "blocks.{}.attn.q_proj": "model.layers.{}.self_attn.q_proj",
    "blocks.{}.attn.k_proj": "model.layers.{}.self_attn.k_proj",
    "blocks.{}.attn.v_proj": "model.layers.{}.self_attn.v_proj",
    "blocks.{}.attn.out_proj": "model.layers.{}.self_attn.o_proj",
    "blocks.{}.attn.q_norm": "model.layers.{}.self_attn.q_norm",
    "blocks.{}.attn.k_norm": "model.layers.{}.self_attn.k_norm",
    "blocks.{}.norm2": "model.layers.{}.post_attention_layernorm",
    "blocks.{}.ffn.gate_proj": "model.layers.{}.mlp.gate_proj",
    "blocks.{}.ffn.up_proj": "model.layers.{}.mlp.up_proj",
    "blocks.{}.ffn.down_proj": "model.layers.{}.mlp.down_proj",
    "final_norm": "model.norm",
    "lm_head": "lm_head",
}
NAMES = {"gpt2": GPT2_NAMES, **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3"), LLAMA_NAMES)}
CLASSES = {
    "gpt2": "GPT2LMHeadModel",
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
TRANSPOSED = (".c_attn.weight", ".c_proj.weight", ".c_fc.weight")  # GPT-2's, [in, out] where nn.Linear has [out, in]
IGNORED = re.compile(r"\.attn\.(bias|masked_bias)$|\.rotary_emb\.inv_freq$")  # constants that old files hold too


def joined(names: dict[str, str], ours: Iterable[str]) -> dict[str, list[str]]:
    """Their tensors, and the parameters of `GPT` that each is made of, stacked along their first dimension."""
    result: dict[str, list[str]] = {}
    for name in ours:
        module, _, leaf = name.rpartition(".")
        number = re.findall(r"^blocks\.(\d+)", module)
        theirs = names[re.sub(r"^blocks\.\d+", "blocks.{}", module)].format(*number)
        result.setdefault(f"{theirs}.{leaf}", []).append(name)
    return result


# ---- weights in ------------------------------------------------------------------------------------------------------


def read_weights(
    model: GPT, folder: Path, found: dict[str, StoredTensor], names: dict[str, str], dtype: torch.dtype | None
) -> None:
    """Fills a model on the meta device strictly: each tensor used once, shapes equal; else what is wrong is named."""
    ours = stored_tensors(model)
    prefix = names["tok_emb"].split(".")[0] + "."
    if not any(name.startswith(prefix) for name in found):  # saved without the head, as OpenAI's GPT-2 was
        names = {our: their.removeprefix(prefix) for our, their in names.items()}
    wanted = joined(names, ours)
    for theirs, parts in wanted.items():
        shape = [sum(ours[name].shape[0] for name in parts), *ours[parts[0]].shape[1:]]
        if theirs.endswith(TRANSPOSED):
            shape.reverse()
        if theirs not in found:
            raise InputError(f"{folder}: tensor {theirs} is missing from the weights; config.json asks for it")
        if list(found[theirs].shape) != shape:
            raise InputError(
                f"{folder}: tensor {theirs} has shape {list(found[theirs].shape)}, config.json asks for {shape}"
            )
        if found[theirs].dtype not in DTYPES:
            raise InputError(
                f"{folder}: tensor {theirs} is stored as {found[theirs].dtype}; read are {', '.join(DTYPES)}"
            )
    extra = sorted(name for name in set(found) - set(wanted) if not IGNORED.search(name))
    if model.config.tie_embeddings and "lm_head.weight" in extra:  # some files hold the shared tensor twice
        embedding, head = (mapped_tensor(found[name].path, name) for name in (next(iter(wanted)), "lm_head.weight"))
        if head.dtype != embedding.dtype or not torch.equal(head, embedding):
            raise InputError(f"{folder}: tie_word_embeddings is true, but lm_head.weight is not the embedding")
        extra.remove("lm_head.weight")
    if extra:
        raise InputError(f"{folder}: tensor {extra[0]} has no place in the model ({len(extra)} left over)")

    # The largest first: while it is copied, its pages of the file are in memory too, and nothing else yet.
    for theirs, parts in sorted(wanted.items(), key=lambda item: -math.prod(found[item[0]].shape)):
        tensor = mapped_tensor(found[theirs].path, theirs)
        sizes = [ours[name].shape[0] for name in parts]
        for name, part in zip(parts, tensor.split(sizes), strict=True):
            place = torch.empty(part.shape, dtype=dtype or part.dtype)
            assign_tensor(model, name, place.copy_(part))
    tie_head(model)


def mapped_tensor(path: Path, name: str) -> Tensor:
    """One tensor of a file as [out, in], without a copy; the file is unmapped when nothing refers to it any more."""
    try:
        with safe_open(path, framework="pt") as file:
            tensor: Tensor = file.get_tensor(name)
    except (SafetensorError, OSError) as error:
        raise unreadable(path, error) from None
    return tensor.t() if name.endswith(TRANSPOSED) else tensor


def stored_in(folder: Path) -> dict[str, StoredTensor]:
    """All tensors of a folder's safetensors files by name."""
    found: dict[str, StoredTensor] = {}
    for path in weight_files(folder):
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 (not a dict)
                    if name in found:
                        raise InputError(f"{path}: tensor {name} is also in {found[name].path.name}")
                    part = file.get_slice(name)
                    found[name] = StoredTensor(path, tuple(part.get_shape()), part.get_dtype())
        except (SafetensorError, OSError) as error:
            raise unreadable(path, error) from None
    return found


def weight_files(folder: Path) -> list[Path]:
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    index = folder / INDEX
    if not index.is_file():
        pickled = sorted(path.name for pattern in PICKLED for path in folder.glob(pattern))
        raise InputError(
            f"{folder}: {WEIGHTS} is missing; "
            + (f"{pickled[0]} is not read: unpickling executes code; " if pickled else "pickled weights are not read; ")
            + "take or make the weights as safetensors"
        )
    shards = read_json_object(index, COPY).get("weight_map")
    if not isinstance(shards, dict) or not all(Path(str(name)).name == name for name in shards.values()):
        raise InputError(f"{index}: weight_map must name a file of this folder for each tensor; fetch it again")
    names = sorted(set(shards.values()))
    present = {path.name for path in folder.iterdir() if path.is_file()}  # a name may be too long to be asked for
    if missing := [name for name in names if name not in present]:
        raise InputError(f"{folder}: shard {missing[0]} is missing ({len(missing)} of {len(names)}); fetch it again")
    return [folder / name for name in names]


# ---- out -------------------------------------------------------------------------------------------------------------


def export_hf(folder: Checkpoint, out: Path) -> None:
    """Writes a folder that transformers' Auto classes open, whole or not at all, in place of any earlier one.

    The weights keep their dtype. Raises `InputError` for what transformers' forms cannot say, by name.
    """
    model, tokenizer, config = folder
    if not isinstance(model, GPT):
        raise InputError("a classifier's head has a bias, which transformers' sequence classifiers lack; not exported")
    form = form_of(model.config)
    if form.model_type == "qwen2" and not tokenizer.nfc:
        # Beside a model of this type transformers 5 cuts a text as Qwen does, whatever tokenizer.json says.
        raise InputError(
            "qkv_bias without bias is the form of Qwen2, with which transformers uses no tokenizer but Qwen's; "
            "train with both or neither, or export to gguf"
        )
    ours = stored_tensors(model)
    weights: dict[str, Tensor] = {}
    for theirs, parts in joined(NAMES[form.model_type], ours).items():
        tensors = [ours[name].detach().cpu() for name in parts]
        tensor = tensors[0] if len(tensors) == 1 else torch.cat(tensors)
        weights[theirs] = (tensor.t() if theirs.endswith(TRANSPOSED) else tensor).contiguous()
    ends = sorted(end_tokens(tokenizer, config.template))
    ids = {"bos_token_id": tokenizer.bos, "eos_token_id": ends[0] if len(ends) == 1 else ends}
    values = {
        "architectures": [CLASSES[form.model_type]],
        **form.model_dump(exclude_unset=True),
        **ids,
        "torch_dtype": str(model.tok_emb.weight.dtype).removeprefix("torch."),
    }
    with replaced_folder(out) as new:
        (new / "config.json").write_text(json.dumps(values, indent=2) + "\n")
        (new / "generation_config.json").write_text(json.dumps(ids, indent=2) + "\n")
        write_tensors(new / WEIGHTS, weights, {"format": "pt"})
        write_tokenizer_json(new, tokenizer, config.template, config.system)


def describe(folder: Checkpoint) -> str:
    """What a model is, in a line: `llama, 134,515,008 parameters, bfloat16, template chatml`."""
    parameters = list(folder.model.parameters())
    dtypes = sorted({str(p.dtype).removeprefix("torch.") for p in parameters})
    words = [f"{sum(p.numel() for p in parameters):,} parameters", *dtypes]
    with contextlib.suppress(InputError):
        words.insert(0, form_of(folder.config.gpt).model_type)
    words.append(f"template {folder.config.template}" if folder.config.template else folder.config.kind)
    return ", ".join(words)
