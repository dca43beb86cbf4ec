"""GGUF files against llama.cpp (xllamacpp), transformers and gguf's reader and quantisers, and what can be wrong."""

from __future__ import annotations

import os
import random
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor

import llm.convert.gguf
from llm.checkpoint.folder import Checkpoint, CheckpointConfig
from llm.checkpoint.weights import stored_tensors
from llm.common.errors import InputError
from llm.config import RopeScaling
from llm.convert.gguf import export_gguf, read_gguf
from llm.inference.generate import generate
from llm.inference.grouped import GroupedLinear, to_int4
from llm.model.classifier import GPTClassifier
from llm.model.gpt import GPT
from llm.tokenizer.gguf import read_gguf_tokenizer
from llm.tokenizer.prompts import encode_prompt
from tests.helpers import LLAMA_FORM, gpt_config, randomize, tiny_tokenizer

gguf = pytest.importorskip("gguf")
F32 = gguf.GGMLQuantizationType.F32
ROOT = Path(__file__).resolve().parents[2]
SIZES: dict[str, Any] = {
    **{"vocab_size": 280, "context_length": 128, "emb_dim": 64, "ffn_dim": 96},
    **{"n_heads": 4, "n_kv_heads": 2, "head_dim": 16},
}
LLAMA = SIZES | LLAMA_FORM
GPT2 = SIZES | {"n_kv_heads": 4}
LLAMA3 = {"kind": "llama3", "factor": 8.0, "original_context_length": 32, "low_freq_factor": 1.0}
GEMMA = {"activation": "geglu", "qk_norm": True, "norm_place": "both", "unit_offset_norm": True, "embedding_scale": 8.0}
OLMO = {"qk_norm": True, "joint_qk_norm": True, "norm_place": "after"}
YARN = {"kind": "yarn", "factor": 4.0, "original_context_length": 64, "beta_fast": 32.0, "beta_slow": 1.0}

# The architecture in the file, and the model.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("gpt2", GPT2),
    "gpt2, untied, two queries for each key": ("gpt2", SIZES | {"tie_embeddings": False}),
    "llama": ("llama", LLAMA),
    "llama, untied, wide heads": ("llama", LLAMA | {"tie_embeddings": False, "head_dim": 32}),
    "llama, all biases": ("llama", LLAMA | {"bias": True, "qkv_bias": True}),
    "llama, wide heads with biases": ("llama", LLAMA | {"head_dim": 32, "qkv_bias": True}),
    "llama, biases but for q, k, v": ("llama", LLAMA | {"bias": True, "norm_eps": 1e-3, "rope_theta": 500.0}),
    "llama, llama3 scaling": ("llama", LLAMA | {"rope_scaling": LLAMA3 | {"high_freq_factor": 4.0}}),
    "llama, linear scaling": ("llama", LLAMA | {"rope_scaling": {"kind": "linear", "factor": 4.0}}),
    "llama, yarn scaling": ("llama", LLAMA | {"rope_scaling": YARN | {"attention_factor": 1.3}}),
    "qwen2": ("qwen2", LLAMA | {"qkv_bias": True}),
    "qwen2, yarn scaling": ("qwen2", LLAMA | {"qkv_bias": True, "rope_scaling": YARN | {"attention_factor": 1.0}}),
    "qwen3": ("qwen3", LLAMA | {"qk_norm": True, "head_dim": 32, "tie_embeddings": False}),
    "rows to spare": ("llama", LLAMA | {"vocab_size": 300}),
    "llama, biases of the attention alone": ("llama", LLAMA | {"qkv_bias": True, "bias": True, "ffn_bias": False}),
    "smollm3": ("smollm3", LLAMA | {"n_layers": 4, "nope_layers": (3,)}),
    "olmo2": (
        "olmo2",
        LLAMA | {"qk_norm": True, "joint_qk_norm": True, "norm_place": "after", "tie_embeddings": False},
    ),
    "phi3": ("phi3", LLAMA | {"rotary_dim": 8, "tie_embeddings": False}),
    "phi3, tied": ("phi3", LLAMA | {"rotary_dim": 8}),
    "gemma3": ("gemma3", LLAMA | GEMMA | {"n_layers": 6, "sliding_window": 24, "full_layers": (5,)}),
    "gemma3, linear scaling": (
        "gemma3",
        LLAMA
        | GEMMA
        | {"n_layers": 6, "sliding_window": 24, "full_layers": (5,), "rope_theta": 1e6, "local_rope_theta": 1e4}
        | {"rope_scaling": {"kind": "linear", "factor": 4.0}},
    ),
}
PROMPT = "the cat sat on the mat and the dog sat on the cat. " * 6  # beyond original_context_length

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()


def folder_of(form: dict[str, Any], **more: Any) -> Checkpoint:
    """A random model. What it writes is ASCII and no marker: llama.cpp does not report half a character, and it stops
    at <|im_end|>, whatever the file says.
    """
    config = gpt_config(**form)
    model = randomize(GPT(config), std=0.2)
    tokenizer = tiny_tokenizer()
    silent = [i for i, token in enumerate(tokenizer.ranks) if token is None or not token.isascii()]
    silent += [*(i for i in tokenizer.special_tokens.values() if i != tokenizer.eot), *range(280, config.vocab_size)]
    with torch.no_grad():
        for weight in (model.tok_emb.weight, model.lm_head.weight):
            weight[silent] = 0.0
        for weight in model.parameters():
            if config.unit_offset_norm and weight.ndim == 1:
                weight.sub_(1.0)  # `randomize` means norms that do not add 1 themselves
    return Checkpoint(model, tokenizer, CheckpointConfig(**({"kind": "base", "gpt": config} | more)))


@pytest.fixture(scope="module")
def llama_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small file of arch llama, in fp32."""
    path = tmp_path_factory.mktemp("llama") / "model.gguf"
    export_gguf(folder_of(LLAMA), path, "f32")
    return path


def rewrite(
    source: Path, out: Path, fields: dict[str, Any] | None = None, tensors: dict[str, Any] | None = None
) -> Path:
    """A copy by gguf's reader and writer, with other metadata or tensors: (array, type), or None to leave one out."""
    fields, tensors = fields or {}, tensors or {}
    reader = gguf.GGUFReader(source)
    old = {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    new = old | fields
    writer = gguf.GGUFWriter(out, new.pop("general.architecture"))
    kinds = gguf.GGUFValueType
    types = {bool: kinds.BOOL, int: kinds.UINT32, float: kinds.FLOAT32, str: kinds.STRING, list: kinds.ARRAY}
    for key, value in new.items():
        if value is not None:
            writer.add_key_value(key, value, types[type(value)])
    stored = {tensor.name: (tensor.data, tensor.tensor_type) for tensor in reader.tensors}
    for name, content in (stored | tensors).items():
        if content is not None:
            writer.add_tensor(name, content[0], raw_dtype=content[1])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out


class LlamaCpp:
    """A model in llama.cpp, computing in fp32 where the weights are."""

    def __init__(self, path: Path, context_length: int = 128) -> None:
        xllamacpp = pytest.importorskip("xllamacpp")
        params = xllamacpp.CommonParams()
        params.model.path = str(path)
        params.n_ctx, params.n_parallel, params.verbosity, params.warmup = context_length, 1, 0, False
        params.fit_params, params.n_gpu_layers = False, 0
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
        params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        self.server = xllamacpp.Server(params)

    def greedy(self, prompt: list[int] | str, n_tokens: int, n_probs: int = 1) -> tuple[list[int], Tensor]:
        """The tokens that it adds, the one that ends the text included, and at each the log-probabilities of all."""
        return self.complete(n_probs, prompt=prompt, n_predict=n_tokens, temperature=0)

    def next_token(self, prompt: list[int] | str, n_probs: int) -> Tensor:
        """The log-probabilities of all tokens behind the prompt, [1, V]; what is added is a whole character, "a"."""
        return self.complete(n_probs, prompt=prompt, n_predict=1, logit_bias=[[ord("a"), 1000.0]])[1]

    def complete(self, n_probs: int, **request: Any) -> tuple[list[int], Tensor]:
        response = self.server.handle_completions(request | {"n_probs": n_probs, "cache_prompt": False})
        added = response["choices"][0]["logprobs"]["content"]
        likely = torch.full((len(added), n_probs), torch.nan)
        for i, token in enumerate(added):
            for choice in token["top_logprobs"]:
                if choice["id"] < n_probs:
                    likely[i, choice["id"]] = choice["logprob"]
        return [token["id"] for token in added], likely


def log_probs(model: GPT, prompt: list[int], added: list[int]) -> Tensor:
    """Return the logits of all tokens at each position of `added`: [T, V]."""
    with torch.inference_mode():
        return model(torch.tensor([prompt + added[:-1]]))[0, len(prompt) - 1 :].float().log_softmax(-1)


# ---- out and in again ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_a_round_trip_is_exact(name: str, tmp_path: Path) -> None:
    arch, form = MODELS[name]
    folder = folder_of(form)
    export_gguf(folder, tmp_path / "model.gguf", "f32")
    assert gguf.GGUFReader(tmp_path / "model.gguf").get_field("general.architecture").contents() == arch
    model, tokenizer, config = read_gguf(tmp_path / "model.gguf", None)
    expected = folder.config.model_dump(exclude={"generation"})
    assert config.generation is not None and folder.tokenizer.eot in (config.generation.eos_token_id or [])
    if config.gpt.rope_scaling is not None and config.gpt.rope_scaling.attention_factor is not None:
        attention = expected["gpt"]["rope_scaling"].pop("attention_factor")
        assert config.gpt.rope_scaling.attention_factor == pytest.approx(attention, rel=1e-7)  # the file has 32 bits
        found = config.model_dump(exclude={"generation"})
        del found["gpt"]["rope_scaling"]["attention_factor"]
        assert found == expected
    else:
        assert config.model_dump(exclude={"generation"}) == expected
    assert not model.training and model.lm_head.weight.dtype == torch.float32
    weights = stored_tensors(folder.model)
    assert stored_tensors(model).keys() == weights.keys()
    idx = torch.randint(0, 280, (2, 20), generator=torch.Generator().manual_seed(0))
    if arch == "gemma3":  # its norms are stored as 1 + weight
        for key, tensor in stored_tensors(model).items():
            torch.testing.assert_close(tensor, weights[key], atol=1e-6 if "norm" in key else 0, rtol=0)
        torch.testing.assert_close(model(idx), folder.model(idx), atol=1e-4, rtol=0)
    else:
        assert all(torch.equal(tensor, weights[key]) for key, tensor in stored_tensors(model).items())
        assert torch.equal(model(idx), folder.model(idx))
    assert tokenizer.encode(PROMPT) == folder.tokenizer.encode(PROMPT)
    assert (
        tokenizer.special_tokens == folder.tokenizer.special_tokens
        and tokenizer.eot_token == folder.tokenizer.eot_token
    )


def test_biases_that_gpt2_must_have_are_written_as_zero(tmp_path: Path) -> None:
    folder = folder_of(GPT2 | {"bias": False, "qkv_bias": False})
    export_gguf(folder, tmp_path / "model.gguf", "f32")
    model, _, config = read_gguf(tmp_path / "model.gguf", None)
    assert config.gpt.bias and config.gpt.qkv_bias
    idx = torch.randint(0, 280, (2, 20), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(model(idx), folder.model(idx), atol=1e-5, rtol=0)


def test_a_head_that_olmo2_must_have_is_the_embedding(tmp_path: Path) -> None:
    folder = folder_of(LLAMA | OLMO | {"tie_embeddings": True})
    export_gguf(folder, tmp_path / "model.gguf", "f32")
    model, _, config = read_gguf(tmp_path / "model.gguf", None)
    assert not config.gpt.tie_embeddings
    assert torch.equal(model.lm_head.weight, folder.model.tok_emb.weight)
    prompt = folder.tokenizer.encode(PROMPT)[:50]
    theirs = LlamaCpp(tmp_path / "model.gguf").next_token(prompt, 280)
    torch.testing.assert_close(theirs, log_probs(folder.model, prompt, [0]), atol=1e-4, rtol=0)


def test_a_window_as_long_as_the_context_is_none(tmp_path: Path) -> None:
    export_gguf(folder_of(LLAMA | {"sliding_window": 128}), tmp_path / "model.gguf", "f32")
    assert read_gguf(tmp_path / "model.gguf", None).config.gpt.sliding_window is None


def test_llama_3_scaling_is_told_from_its_factors(llama_file: Path, tmp_path: Path) -> None:
    """A file as llama.cpp's converter makes it of Llama 3.2: what each frequency is divided by, and nothing else."""
    scaling = {
        "factor": 32.0,
        "original_max_position_embeddings": 8192,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
    }
    config = transformers.LlamaConfig(
        head_dim=16, rope_parameters={"rope_type": "llama3", "rope_theta": 500000.0, **scaling}
    )
    scaled, _ = transformers.modeling_rope_utils.ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    factors = 500000.0 ** -(torch.arange(0, 16, 2) / 16) / scaled
    assert 1 < factors[4] < 32  # one frequency of the eight is blended
    tensors = {"rope_freqs.weight": (factors.numpy(), F32)}
    path = rewrite(llama_file, tmp_path / "model.gguf", {"llama.rope.freq_base": 500000.0}, tensors)
    assert read_gguf(path, None).config.gpt.rope_scaling == RopeScaling(
        kind="llama3", factor=32.0, original_context_length=8192, low_freq_factor=1.0, high_freq_factor=4.0
    )


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"attention.sliding_window": 5}, {"sliding_window": 5}),
        ({"rope.scale_linear": 4.0}, {"rope_scaling": RopeScaling(kind="linear", factor=4.0)}),
        ({"rope.scaling.type": "none", "rope.scaling.factor": 4.0}, {"rope_scaling": None}),
        ({"attention.head_count_kv": None, "attention.key_length": None}, {"n_kv_heads": 2, "head_dim": 32}),
    ],
)
def test_metadata_that_exports_do_not_have(fields: dict[str, Any], expected: dict[str, Any], tmp_path: Path) -> None:
    export_gguf(folder_of(LLAMA | {"n_heads": 2, "n_kv_heads": 2, "head_dim": 32}), tmp_path / "plain.gguf", "f32")
    named = {f"llama.{key}": value for key, value in fields.items()}
    config = read_gguf(rewrite(tmp_path / "plain.gguf", tmp_path / "model.gguf", named), None).config.gpt
    assert {key: getattr(config, key) for key in expected} == expected


@pytest.mark.parametrize(
    "fields",
    [
        {"expert_count": 0, "expert_used_count": 0, "expert_feed_forward_length": 96, "leading_dense_block_count": 1},
        {"attention.head_count_kv": [2, 2], "feed_forward_length": [96, 96], "attention.head_count": [4, 4]},
        {"attention.sliding_window": 0, "attention.causal": True, "attention.clamp_kqv": 0.0, "logit_scale": 1.0},
        {"final_logit_softcapping": 0.0, "rope.freq_base": [10000.0, 10000.0], "use_parallel_residual": False},
    ],
)
def test_metadata_that_changes_nothing_is_harmless(fields: dict[str, Any], llama_file: Path, tmp_path: Path) -> None:
    path = rewrite(llama_file, tmp_path / "model.gguf", {f"llama.{key}": value for key, value in fields.items()})
    assert read_gguf(path, None).config == read_gguf(llama_file, None).config


@pytest.mark.parametrize("form", [LLAMA, GPT2], ids=["llama", "gpt2"])
def test_f16_is_exact_to_half_precision(form: dict[str, Any], tmp_path: Path) -> None:
    folder = folder_of(form)
    export_gguf(folder, tmp_path / "model.gguf", "f16")
    back = stored_tensors(read_gguf(tmp_path / "model.gguf", torch.float32).model)
    for name, tensor in stored_tensors(folder.model).items():
        kept = tensor.ndim == 1 or name == "pos_emb.weight"
        assert torch.equal(back[name], tensor if kept else tensor.half().float()), name
    as_stored = read_gguf(tmp_path / "model.gguf", None).model
    assert {tensor.dtype for tensor in stored_tensors(as_stored).values()} == {torch.float16}
    assert as_stored.lm_head.weight is as_stored.tok_emb.weight


def test_q8_0_rounds_each_block_of_32_and_leaves_other_widths_to_f16(tmp_path: Path) -> None:
    folder = folder_of(LLAMA | {"ffn_dim": 72})
    export_gguf(folder, tmp_path / "model.gguf", "q8_0")
    types = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    assert types["blk.0.ffn_down.weight"] == "F16" and types["blk.0.ffn_norm.weight"] == "F32"
    assert {types[f"blk.1.{name}.weight"] for name in ("attn_q", "attn_output", "ffn_up")} == {"Q8_0"}
    assert types["token_embd.weight"] == "Q8_0"
    back = stored_tensors(read_gguf(tmp_path / "model.gguf", None).model)
    for name, tensor in stored_tensors(folder.model).items():
        if tensor.ndim == 1:
            assert torch.equal(back[name], tensor)
        elif tensor.shape[1] % 32 == 0:
            blocks = tensor.view(-1, 32)
            bound = blocks.abs().amax(-1, keepdim=True) / 127 * 0.57  # half a step, and 127 steps of a rounded size
            assert ((back[name].view(-1, 32) - blocks).abs() <= bound).all(), name
            assert not torch.equal(back[name], tensor) or not tensor.any()


@pytest.mark.parametrize("kind", ["q4_0", "q4_1"])
def test_4_bits_leave_embeddings_8_and_other_widths_f16(kind: Any, tmp_path: Path) -> None:
    folder = folder_of(LLAMA | {"ffn_dim": 72})
    export_gguf(folder, tmp_path / "model.gguf", kind)
    types = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    assert types["blk.0.ffn_down.weight"] == "F16" and types["blk.0.ffn_norm.weight"] == "F32"
    assert {types[f"blk.1.{name}.weight"] for name in ("attn_q", "attn_output", "ffn_up")} == {kind.upper()}
    assert types["token_embd.weight"] == "Q8_0"
    back = stored_tensors(read_gguf(tmp_path / "model.gguf", None).model)
    for name, tensor in stored_tensors(folder.model).items():
        if tensor.ndim == 2:
            assert (back[name] - tensor).norm() < 0.12 * tensor.norm(), name


def test_a_q4_1_file_has_the_weights_that_to_int4_computes_with(tmp_path: Path) -> None:
    """And a model that is read from it is rounded to the same ones again, but for few groups that use fewer steps."""
    folder = folder_of(LLAMA)
    export_gguf(folder, tmp_path / "model.gguf", "q4_1")
    back = read_gguf(tmp_path / "model.gguf", torch.float32).model
    names = [name for name, part in back.blocks.named_modules() if isinstance(part, torch.nn.Linear)]
    found = {name: back.blocks.get_submodule(name).weight.detach().clone() for name in names}
    for model, most in ((folder.model, 1e-6), (back, 0.01)):
        to_int4(model)
        for name in names:
            layer = model.blocks.get_submodule(name)
            assert isinstance(layer, GroupedLinear)
            assert (layer.dequantized() - found[name]).norm() < most * found[name].norm(), name


def test_half_precision_models_are_written_as_they_are(tmp_path: Path) -> None:
    folder = folder_of(LLAMA)
    folder.model.bfloat16()
    export_gguf(folder, tmp_path / "model.gguf", "f32")
    back = read_gguf(tmp_path / "model.gguf", torch.bfloat16).model
    assert all(torch.equal(tensor, stored_tensors(folder.model)[name]) for name, tensor in stored_tensors(back).items())


def test_an_instruct_model_keeps_its_template(tmp_path: Path) -> None:
    folder = folder_of(LLAMA, kind="instruct", template="chatml", system="Be brief.")
    export_gguf(folder, tmp_path / "model.gguf", "f16")
    assert read_gguf(tmp_path / "model.gguf", None).config == folder.config
    assert read_gguf_tokenizer(tmp_path / "model.gguf").template == "chatml"


def test_the_same_model_gives_the_same_bytes_and_replaces_the_file_whole(tmp_path: Path) -> None:
    path = tmp_path / "new" / "model.gguf"
    export_gguf(folder_of(LLAMA), path, "q8_0")
    first = path.read_bytes()
    path.write_bytes(b"an earlier export")
    export_gguf(folder_of(LLAMA), path, "q8_0")
    assert path.read_bytes() == first
    huge = folder_of(LLAMA)
    huge.model.blocks[0].ffn.up_proj.weight.data[0, 0] = 1e6
    with pytest.raises(InputError, match=r"blk\.0\.ffn_up\.weight would hold 1e\+06.*--dtype f32"):
        export_gguf(huge, path, "f16")
    assert path.read_bytes() == first
    assert [file.name for file in path.parent.iterdir()] == ["model.gguf"]
    export_gguf(huge, path, "f32")
    assert read_gguf(path, None).model.blocks[0].ffn.up_proj.weight[0, 0] == 1e6


def test_large_tensors_are_read_in_parts(llama_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = stored_tensors(read_gguf(llama_file, None).model)
    monkeypatch.setattr(llm.convert.gguf, "CHUNK", 200)  # three rows of 64, the last part smaller
    parts = stored_tensors(read_gguf(llama_file, None).model)
    assert all(torch.equal(tensor, whole[name]) for name, tensor in parts.items())


@pytest.mark.parametrize(
    ("form", "message"),
    [
        (LLAMA | {"activation": "relu2"}, "activation relu2"),
        (LLAMA | {"norm": "layernorm"}, "norm layernorm"),
        (LLAMA | {"qk_norm": True, "qkv_bias": True}, "qkv_bias True: .* qk_norm"),
        (LLAMA | {"qk_norm": True, "rope_scaling": LLAMA3 | {"high_freq_factor": 4.0}}, "rope_scaling llama3"),
        (LLAMA | {"rope_scaling": YARN | {"beta_fast": 16.0, "attention_factor": 1.0}}, "rope_scaling yarn: .*32"),
        (LLAMA | {"sliding_window": 100}, "sliding_window 100"),
        (GPT2 | {"activation": "swiglu"}, "activation swiglu"),
        (GPT2 | {"norm": "rmsnorm"}, "norm rmsnorm"),
        (GPT2 | {"qk_norm": True}, "qk_norm True"),
        (GPT2 | {"head_dim": 8}, "head_dim 8: .*16"),
        (LLAMA | {"n_layers": 4, "nope_layers": (1,)}, r"nope_layers \(1,\): .*every 4th layer"),
        (LLAMA | {"embedding_scale": 2.0}, r"embedding_scale 2\.0: .*only None"),
        (LLAMA | {"attention_scale": 2.0}, r"attention_scale 2\.0: .*only None"),
        (LLAMA | {"qk_norm": True, "ffn_bias": True}, "ffn_bias True: .* qk_norm"),
        (LLAMA | {"qkv_bias": True, "ffn_bias": True}, "ffn_bias True: "),
        (LLAMA | GEMMA | {"embedding_scale": 2.0}, r"embedding_scale 2\.0: .*only 8"),
        (LLAMA | GEMMA | {"sliding_window": 9, "full_layers": (1,)}, r"full_layers \(1,\): .*every 6th layer"),
        (LLAMA | GEMMA | {"sliding_window": 9, "local_rope_theta": 9.0}, r"local_rope_theta 9\.0: .*10000"),
        (LLAMA | {"rotary_dim": 8, "rope_scaling": {"kind": "linear", "factor": 2.0}}, "rope_scaling linear"),
    ],
)
def test_an_option_that_llama_cpp_lacks_is_named(form: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message) as error:
        export_gguf(folder_of(form), tmp_path / "model.gguf", "f16")
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


def test_a_classifier_or_a_folder_as_target_is_refused(tmp_path: Path) -> None:
    base = folder_of(LLAMA)
    config = CheckpointConfig(kind="classifier", gpt=base.config.gpt, labels=["ham", "spam"], max_length=10)
    with pytest.raises(InputError, match="classifier"):
        export_gguf(Checkpoint(GPTClassifier(base.model, 2), base.tokenizer, config), tmp_path / "m.gguf", "f16")
    with pytest.raises(InputError, match=r"a folder has this name.*model\.gguf"):
        export_gguf(base, tmp_path, "f16")


# ---- against llama.cpp and transformers ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_llama_cpp_continues_an_export_as_generate_does(name: str, tmp_path: Path) -> None:
    folder = folder_of(MODELS[name][1])
    export_gguf(folder, tmp_path / "model.gguf", "f32")
    prompt = folder.tokenizer.encode(PROMPT)[:100]
    added, theirs = LlamaCpp(tmp_path / "model.gguf").greedy(prompt, 20, folder.config.gpt.vocab_size)
    ours = generate(folder.model, [prompt], max_new_tokens=20, stop={folder.tokenizer.eot})[0]
    assert [token for token in added if token != folder.tokenizer.eot] == ours and len(ours) > 5
    # ggml looks gelu up in a table of half precision
    tolerance = 0.01 if folder.config.gpt.activation in ("gelu", "geglu") else 1e-4
    torch.testing.assert_close(theirs, log_probs(folder.model, prompt, added), atol=tolerance, rtol=0)


@pytest.mark.parametrize("kind", ["f16", "q8_0", "q4_0", "q4_1"])
@pytest.mark.parametrize("name", ["gpt2", "llama, untied, wide heads", "qwen2", "qwen3"])
def test_llama_cpp_runs_smaller_exports(name: str, kind: Any, tmp_path: Path) -> None:
    folder = folder_of(MODELS[name][1])
    export_gguf(folder, tmp_path / "model.gguf", kind)
    prompt = folder.tokenizer.encode(PROMPT)[:100]
    theirs = LlamaCpp(tmp_path / "model.gguf").next_token(prompt, 280)
    ours = log_probs(read_gguf(tmp_path / "model.gguf", torch.float32).model, prompt, [0])
    # llama.cpp rounds what it multiplies such weights with to the same type
    torch.testing.assert_close(theirs, ours, atol={"f16": 0.02, "q8_0": 0.5, "q4_0": 0.5, "q4_1": 0.5}[kind], rtol=0)
    assert ours.std() > 1


def test_llama_cpp_reads_the_tokenizer(llama_file: Path) -> None:
    """Given the text, it sees what our tokens say: the next token's probabilities are those after our ids."""
    folder = read_gguf(llama_file, None)
    text = "the dog sat.  Ham and\nspam, 12345 times!"
    theirs = LlamaCpp(llama_file).next_token(text, 280)
    torch.testing.assert_close(theirs, log_probs(folder.model, folder.tokenizer.encode(text), [0]), atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q4_K", "Q6_K"])
def test_each_tensor_type_is_what_llama_cpp_takes_it_for(kind: str, tmp_path: Path) -> None:
    """Random blocks in the place of all matrices; whoever unpacks them otherwise finds another model."""
    form = LLAMA | {"n_layers": 1, "emb_dim": 256, "ffn_dim": 256, "n_heads": 4, "n_kv_heads": 2, "head_dim": 64}
    folder = folder_of(form)
    export_gguf(folder, tmp_path / "plain.gguf", "f32")
    reader = gguf.GGUFReader(tmp_path / "plain.gguf")
    number = gguf.GGMLQuantizationType[kind]
    generator = np.random.default_rng(0)
    tensors = {
        tensor.name: (blocks(tensor.data, number, generator), number)
        for tensor in reader.tensors
        if tensor.data.ndim == 2
    }
    path = rewrite(tmp_path / "plain.gguf", tmp_path / "model.gguf", tensors=tensors)
    model = read_gguf(path, torch.float32).model
    expected = gguf.dequantize(*tensors["blk.0.attn_v.weight"])  # arch llama leaves the rows of v in their order
    assert np.array_equal(model.blocks[0].attn.v_proj.weight.detach().numpy(), expected)
    prompt = folder.tokenizer.encode(PROMPT)[:50]
    theirs, ours = LlamaCpp(path).next_token(prompt, 280), log_probs(model, prompt, [0])
    assert (theirs - ours).std() < 0.1 * ours.std()  # it rounds what it multiplies the blocks with, to 8 bits
    stored = read_gguf(path, None).model.lm_head.weight.dtype
    assert stored == {"F16": torch.float16, "BF16": torch.bfloat16}.get(kind, torch.float32)


def blocks(array: Any, kind: Any, generator: np.random.Generator) -> Any:
    """A matrix in `kind`: rounded, or for the types that gguf only reads random bytes with sensible scales."""
    try:
        return gguf.quantize(np.array(array), kind)
    except NotImplementedError:
        size, n_bytes = gguf.GGML_QUANT_SIZES[kind]
        content = generator.integers(0, 256, (array.size // size, n_bytes), dtype=np.uint8)
        scales = {"Q4_K": {0: 2e-4, 2: 1.5e-3}, "Q6_K": {208: 3e-5}}[kind.name]  # at these bytes of a block
        for at, scale in scales.items():
            content[:, at : at + 2] = np.frombuffer(np.float16(scale).tobytes(), np.uint8)
        return content.reshape(array.shape[0], -1)


@pytest.mark.parametrize(
    "form",
    [
        GPT2 | {"context_length": 1024, "ffn_dim": 256},  # transformers reads neither from a file of GPT-2's
        LLAMA | {"head_dim": 32},
        LLAMA | {"qkv_bias": True, "tie_embeddings": False},
        LLAMA | {"qk_norm": True, "head_dim": 128},  # which transformers takes for granted
    ],
    ids=["gpt2", "llama", "qwen2", "qwen3"],
)
def test_transformers_computes_the_same_from_an_export(form: dict[str, Any], tmp_path: Path) -> None:
    export_gguf(folder_of(form), tmp_path / "model.gguf", "f16")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf").eval()
    ours = read_gguf(tmp_path / "model.gguf", torch.float32).model
    idx = torch.randint(0, 280, (3, 50), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        torch.testing.assert_close(ours(idx), theirs(idx).logits, atol=1e-4, rtol=0)


# ---- what can be wrong -----------------------------------------------------------------------------------------------


def wrong(path: Path, message: str) -> None:
    with pytest.raises(InputError, match=message) as error:
        read_gguf(path, None)
    assert "\n" not in str(error.value) and str(path) in str(error.value)


@pytest.mark.parametrize("part", [0, 3, 4, 7, 20, 30, 100, 0.2, 0.5, 0.9, -1])
def test_a_truncated_file_is_named(part: float, llama_file: Path, tmp_path: Path) -> None:
    content = llama_file.read_bytes()
    end = int(part * len(content)) if isinstance(part, float) else part
    (tmp_path / "cut.gguf").write_bytes(content[:end])
    wrong(tmp_path / "cut.gguf", "not a GGUF file" if 0 <= end < 4 else "truncated: .*copy the file again")


@pytest.mark.parametrize(
    ("at", "content", "message"),
    [
        (0, b"GGML", "not a GGUF file"),
        (0, b"PK\x03\x04", "not a GGUF file"),
        (4, struct.pack("<I", 1), "GGUF version 1 is not supported"),
        (4, struct.pack(">I", 3), "GGUF version 50331648 is not supported"),  # written for the other byte order
        (8, struct.pack("<Q", 2**63), "truncated|damaged"),  # tensors
        (16, struct.pack("<Q", 2**63), "truncated|damaged"),  # metadata
        (24, struct.pack("<Q", 2**63), "truncated"),  # the length of the first key
    ],
)
def test_a_damaged_beginning_is_named(at: int, content: bytes, message: str, llama_file: Path, tmp_path: Path) -> None:
    old = llama_file.read_bytes()
    (tmp_path / "bad.gguf").write_bytes(old[:at] + content + old[at + len(content) :])
    wrong(tmp_path / "bad.gguf", message)


def test_no_damage_of_the_header_is_more_than_an_error(llama_file: Path, tmp_path: Path) -> None:
    """Random bytes in random places: the file is read or refused with one line, whatever it says."""
    content = llama_file.read_bytes()
    end = content.index(b"blk.1.ffn_down.weight")
    rng = random.Random(0)
    refused = 0
    for _ in range(300):
        bad, at = bytearray(content), rng.randrange(4, end)
        new = rng.choice([rng.randbytes(1), rng.randbytes(8), b"\xff" * 8, bytes(8), b"\x01"])
        bad[at : at + len(new)] = new
        (tmp_path / "bad.gguf").write_bytes(bad)
        try:
            read_gguf(tmp_path / "bad.gguf", None)
        except InputError as error:
            refused += 1
            assert "\n" not in str(error) and len(str(error)) < 1000
    assert refused > 100


def test_a_header_longer_than_any_is_refused_before_it_is_read(tmp_path: Path) -> None:
    key = struct.pack("<Q1sIIQ", 1, b"a", 9, 0, 2**30)  # an array of 2^30 bytes, as many integers in Python
    with (tmp_path / "bad.gguf").open("wb") as file:
        file.write(b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + key)
        file.truncate(2**31)  # which takes no room on the disk
    wrong(tmp_path / "bad.gguf", "damaged: the header is longer than")


def test_no_file_and_no_package(llama_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong(tmp_path / "none.gguf", r"cannot be read \(No such file")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(InputError, match=r"pip install 'textmill\[gguf\]'"):
        read_gguf(llama_file, None)
    with pytest.raises(InputError, match=r"pip install 'textmill\[gguf\]'"):
        export_gguf(folder_of(LLAMA), tmp_path / "model.gguf", "f16")


VECTOR = (np.ones(64, np.float32), F32)


@pytest.mark.parametrize(
    ("fields", "tensors", "message"),
    [
        (
            {"general.architecture": "gemma"},
            {},
            "architecture 'gemma' is not known; known are gpt2, llama, qwen2",
        ),
        ({"split.count": 3}, {}, "one of 3 parts"),
        ({"llama.block_count": None}, {}, r"llama\.block_count: expected .*found None"),
        ({"llama.block_count": 3}, {}, r"tensor blk\.2\.attn_norm\.weight is missing"),
        ({"llama.block_count": 1000}, {}, r"tensors are too few for a model of 1000 layers"),
        ({"llama.block_count": 1}, {}, r"tensor blk\.1\.\S+ has no place in the model \(9 left over\)"),
        ({"llama.block_count": 10**6}, {}, "n_layers: .*less than or equal to 1000, found 1000000"),
        ({"llama.embedding_length": 2**31}, {}, r"llama\.embedding_length: expected a number from 1"),
        ({"llama.embedding_length": "64"}, {}, r"llama\.embedding_length: expected a number from 1"),
        ({"llama.embedding_length": 32}, {}, r"tensor token_embd\.weight has shape \[280, 64\], .* \[280, 32\]"),
        (
            {"llama.feed_forward_length": 2**24},
            {},
            r"tensor blk\.0\.ffn_up\.weight has shape|ffn_gate\.weight has shape",
        ),
        ({"llama.attention.head_count_kv": 3}, {}, "n_heads 4 must be a multiple of n_kv_heads 3"),
        ({"llama.attention.head_count_kv": [2, 1]}, {}, r"head_count_kv: expected .*found \[2, 1\]"),
        ({"llama.attention.key_length": 2**23}, {}, "damaged|only a whole head"),
        ({"llama.rope.dimension_count": 8}, {}, r"llama\.rope\.dimension_count = 8 is not supported"),
        ({"llama.rope.freq_base": "much"}, {}, r"llama\.rope\.freq_base: expected a number, found 'much'"),
        ({"llama.attention.layer_norm_rms_epsilon": float("nan")}, {}, "norm_eps"),
        ({"llama.expert_count": 8}, {}, r"'llama\.expert_count' is not supported \(found 8\)"),
        ({"llama.expert_count": 8, "llama.expert_used_count": 2}, {}, "expert_count' is not supported"),
        ({"llama.final_logit_softcapping": 30.0}, {}, r"softcapping' is not supported \(found 30\.0\)"),
        ({"llama.attention.causal": False}, {}, r"attention\.causal' is not supported \(found False\)"),
        ({"general.architecture": "qwen35"}, {}, r"'qwen35' is not known; .*linear attention \(gated delta net\)"),
        ({"llama.rope.scaling.type": "longrope"}, {}, "rope.scaling.type 'longrope' .* is not supported"),
        (
            {"llama.rope.scaling.type": "yarn"},
            {"rope_freqs.weight": (np.ones(8, np.float32), F32)},
            "rope_freqs.weight",
        ),
        ({}, {"rope_freqs.weight": (np.linspace(1, 8, 8, dtype=np.float32), F32)}, "is not Llama 3's rope scaling"),
        ({}, {"rope_freqs.weight": (np.ones(7, np.float32), F32)}, "rope_freqs.weight of this type and shape"),
        ({}, {"output_norm.weight": None}, r"tensor output_norm\.weight is missing"),
        ({}, {"token_embd.weight": None}, r"tensor token_embd\.weight is missing"),
        ({}, {"blk.0.attn_q_norm.weight": VECTOR}, r"tensor blk\.0\.attn_q_norm\.weight has no place .*\(1 left"),
        ({}, {"blk.1.attn_q.bias": VECTOR}, r"tensor blk\.1\.attn_q\.bias has no place"),
        (
            {},
            {"output_norm.weight": (np.ones(63, np.float32), F32)},
            r"output_norm\.weight has shape \[63\], .* \[64\]",
        ),
        ({}, {"blk.0.ffn_down.weight": (np.ones((96, 64), np.float32), F32)}, r"\[96, 64\], .* asks for \[64, 96\]"),
        ({}, {"output_norm.weight": (np.ones(64, np.int8), gguf.GGMLQuantizationType.I8)}, "has type I8, which cannot"),
        ({}, {"output_norm.weight": (np.ones(64), gguf.GGMLQuantizationType.F64)}, "has type F64, which cannot"),
        ({"tokenizer.ggml.tokens": None}, {}, "no tokenizer"),
        ({"tokenizer.ggml.model": "llama"}, {}, "tokenizer"),
    ],
)
def test_what_does_not_fit_is_named(
    fields: dict[str, Any], tensors: dict[str, Any], message: str, llama_file: Path, tmp_path: Path
) -> None:
    wrong(rewrite(llama_file, tmp_path / "bad.gguf", fields, tensors), message)


def test_a_tokenizer_of_another_size_is_named(llama_file: Path, tmp_path: Path) -> None:
    for rows in (279, 300):
        embedding = (np.ones((rows, 64), np.float32), F32)
        path = rewrite(llama_file, tmp_path / "bad.gguf", tensors={"token_embd.weight": embedding})
        wrong(path, f"the tokenizer has 280 tokens, token_embd.weight {rows} rows; they do not belong together")


def test_an_unknown_tensor_type_is_named(llama_file: Path, tmp_path: Path) -> None:
    content = bytearray(llama_file.read_bytes())
    at = content.index(b"output_norm.weight") + len("output_norm.weight")
    assert struct.unpack_from("<IQI", content, at) == (1, 64, 0)  # dimensions, their sizes, the type
    struct.pack_into("<I", content, at + 12, 999)
    (tmp_path / "bad.gguf").write_bytes(content)
    wrong(tmp_path / "bad.gguf", "tensor 'output_norm.weight' has type 999")
    struct.pack_into("<I", content, at + 12, int(gguf.GGMLQuantizationType.Q8_K))  # one of whole blocks of 256
    (tmp_path / "bad.gguf").write_bytes(content)
    wrong(tmp_path / "bad.gguf", r"tensor 'output_norm.weight' of shape \[64\] is not made of blocks of 256")


def test_tensors_neither_overlap_nor_leave_the_file(llama_file: Path, tmp_path: Path) -> None:
    for offset, message in [(0, "begins inside another one"), (2**62, "truncated: tensor 'output_norm.weight'")]:
        content = bytearray(llama_file.read_bytes())
        at = content.index(b"output_norm.weight") + len("output_norm.weight")
        struct.pack_into("<Q", content, at + 16, offset)
        (tmp_path / "bad.gguf").write_bytes(content)
        wrong(tmp_path / "bad.gguf", message)


# ---- SmolLM2, 30 layers deep -----------------------------------------------------------------------------------------


QUESTIONS = [
    "What is the capital of France?",
    "Explain why the sky is blue.",
    "List three uses for a paper clip.",
    "Tell me a short story about a dog.",
    "How do I boil an egg?",
    "Name the planets of the solar system.",
    "Write a poem about the sea.",
    "What does a carpenter do all day?",
    "Give me advice for learning to cook.",
    "Describe a city at night.",
]


@pytest.fixture(scope="module")
def smollm2_folder(smollm2: Path) -> Checkpoint:
    return read_gguf(smollm2, None)


@pytest.fixture(scope="module")
def smollm2_original(smollm2: Path) -> Any:
    model = transformers.AutoModelForCausalLM.from_pretrained(smollm2.parent, gguf_file=smollm2.name)
    return model.eval()


def smollm2_prompts(folder: Checkpoint) -> list[list[int]]:
    assert folder.config.template == "chatml"
    system = folder.config.system
    return [encode_prompt(folder.tokenizer, "chatml", question, system=system) for question in QUESTIONS]


@pytest.mark.slow
def test_smollm2_has_the_logits_of_transformers(smollm2_folder: Checkpoint, smollm2_original: Any) -> None:
    assert smollm2_folder.config.system == "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
    for prompt in smollm2_prompts(smollm2_folder)[:3]:
        idx = torch.tensor([prompt])
        with torch.inference_mode():
            torch.testing.assert_close(smollm2_folder.model(idx), smollm2_original(idx).logits, atol=1e-4, rtol=0)


@pytest.mark.slow
def test_smollm2_writes_what_transformers_writes(smollm2_folder: Checkpoint, smollm2_original: Any) -> None:
    """LLM_TEST_SLOW=1: all prompts, 200 tokens each."""
    n_prompts, n_tokens = (10, 200) if os.environ.get("LLM_TEST_SLOW") else (2, 30)
    prompts = smollm2_prompts(smollm2_folder)[-n_prompts:]
    end = smollm2_folder.tokenizer.special_tokens["<|im_end|>"]
    ours = generate(smollm2_folder.model, prompts, max_new_tokens=n_tokens, stop={end})
    for prompt, answer in zip(prompts, ours, strict=True):
        ids = torch.tensor([prompt])
        options = {"max_new_tokens": n_tokens, "do_sample": False, "eos_token_id": end, "pad_token_id": end}
        with torch.inference_mode():
            theirs = smollm2_original.generate(ids, attention_mask=torch.ones_like(ids), **options)
        assert [token for token in theirs[0, len(prompt) :].tolist() if token != end] == answer


@pytest.mark.slow
def test_llama_cpp_writes_what_smollm2_writes_here(smollm2_folder: Checkpoint, tmp_path: Path) -> None:
    """From an export in half precision, which alone turns near ties: one among the 1,900 tokens of all ten answers."""
    prompts = smollm2_prompts(smollm2_folder)[3:7]
    end = smollm2_folder.tokenizer.special_tokens["<|im_end|>"]
    ours = generate(smollm2_folder.model, prompts, max_new_tokens=50, stop={end})
    export_gguf(smollm2_folder, tmp_path / "f16.gguf", "f16")
    server = LlamaCpp(tmp_path / "f16.gguf", 512)
    for prompt, answer in zip(prompts, ours, strict=True):
        added, _ = server.greedy(prompt, 50)
        assert added == answer and len(added) == 50
    chat = {"messages": [{"role": "user", "content": QUESTIONS[3]}], "max_tokens": 50, "temperature": 0}
    reply = server.server.handle_chat_completions(chat)  # with the chat template in the file
    assert reply["choices"][0]["message"]["content"] == smollm2_folder.tokenizer.decode(ours[0])


MEASURE = """
import sys
from pathlib import Path
import gguf
from llm.convert.gguf import read_gguf

def status(key):  # VmRSS, VmHWM: now and at most
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(key))

read_gguf(Path(sys.argv[1]), None)  # what is imported late is imported now
before = status("VmRSS")
folder = read_gguf(Path(sys.argv[2]), None)
print(status("VmHWM") - before, sum(p.numel() * p.element_size() for p in folder.model.parameters()))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is measured as Linux tells it")
def test_loading_smollm2_takes_little_more_than_its_weights(smollm2: Path, llama_file: Path) -> None:
    command = [sys.executable, "-c", MEASURE, str(llama_file), str(smollm2)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    taken, weights = map(int, done.stdout.split())
    assert weights < taken < 1.1 * weights  # the tokenizer included
