"""Open weights against transformers: tiny random models of every family in and out, and what can be wrong."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import llm.convert.hf
from llm.checkpoint.folder import Checkpoint, CheckpointConfig, save_checkpoint
from llm.common.errors import InputError
from llm.config import GPTConfig, RopeScaling
from llm.convert.families.base import Family
from llm.convert.families.registry import FAMILIES as FAMILY_LIST
from llm.convert.hf import export_hf, hf_config_of, read_hf_config
from llm.convert.load import describe, import_model
from llm.download.hub import source_files
from llm.inference.generate import generate
from llm.model.classifier import GPTClassifier
from llm.model.gpt import GPT
from llm.tokenizer.hf import write_tokenizer_json
from llm.tokenizer.load import import_tokenizer
from tests.forks import run_forked
from tests.helpers import FORMS, LLAMA_FORM, SHIPPED_FORM, gpt_config, qwen_tokenizer, randomize, tiny_tokenizer

ROOT = Path(__file__).resolve().parents[2]
VOCAB = 290  # ten rows more than the tokenizer has tokens
CONTEXT = 64

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()


def rope(kind: str, **options: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 1000.0, **options}}


# The models as transformers names them: class of the config, and what differs from `tiny`.
LLAMA3 = rope("llama3", factor=4.0, original_max_position_embeddings=16, low_freq_factor=1.0, high_freq_factor=4.0)
YARN = rope("yarn", factor=4.0, original_max_position_embeddings=16)
YARN_BY_MSCALE = rope("yarn", factor=4.0, original_max_position_embeddings=16, mscale=1.0, mscale_all_dim=0.5)
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("GPT2Config", {}),
    "gpt2, untied, other widths": ("GPT2Config", {"tie_word_embeddings": False, "n_inner": 40}),
    "llama": ("LlamaConfig", {}),
    "llama, tied, one key for all queries": ("LlamaConfig", {"tie_word_embeddings": True, "num_key_value_heads": 1}),
    "llama, biases": ("LlamaConfig", {"attention_bias": True, "mlp_bias": True}),
    "llama, head_dim": ("LlamaConfig", {"head_dim": 12, "num_key_value_heads": 4}),
    "llama, llama3 scaling": ("LlamaConfig", {"head_dim": 16, **LLAMA3}),
    "llama, linear scaling": ("LlamaConfig", {"head_dim": 16, **rope("linear", factor=4.0)}),
    "llama, yarn scaling": ("LlamaConfig", {"head_dim": 16, **YARN}),
    "mistral": ("MistralConfig", {"sliding_window": 5}),
    "mistral, no window, odd widths": ("MistralConfig", {"sliding_window": None, "hidden_size": 30, "head_dim": 6}),
    "qwen2": ("Qwen2Config", {"tie_word_embeddings": True}),
    "qwen2, yarn scaling": ("Qwen2Config", {"head_dim": 16, **YARN_BY_MSCALE}),
    "qwen2, window": ("Qwen2Config", {"use_sliding_window": True, "max_window_layers": 0, "sliding_window": 5}),
    "qwen3": ("Qwen3Config", {"head_dim": 16}),
    "llama, biases of the attention alone": ("LlamaConfig", {"attention_bias": True}),
    "llama, biases of the feed-forward layers alone": ("LlamaConfig", {"mlp_bias": True}),
    "qwen3, biases": ("Qwen3Config", {"head_dim": 16, "attention_bias": True}),
    "qwen2, windows in upper layers": (
        "Qwen2Config",
        {"use_sliding_window": True, "max_window_layers": 1, "sliding_window": 5},
    ),
    "smollm3": ("SmolLM3Config", {"no_rope_layer_interval": 2}),
    "smollm3, window, biases": (
        "SmolLM3Config",
        {"no_rope_layer_interval": 2, "use_sliding_window": True, "sliding_window": 5, "mlp_bias": True},
    ),
    "olmo2": ("Olmo2Config", {}),
    "olmo2, biases, yarn scaling": ("Olmo2Config", {"attention_bias": True, "num_key_value_heads": 4, **YARN}),
    "phi3, half a head": (
        "Phi3Config",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1000.0, "partial_rotary_factor": 0.5}},
    ),
    "phi3": ("Phi3Config", {}),
    "phi3, window": ("Phi3Config", {"sliding_window": 5}),
    "gemma3_text": (
        "Gemma3TextConfig",
        {"head_dim": 12, "sliding_window": 5, "query_pre_attn_scalar": 12, "sliding_window_pattern": 2},
    ),
    "gemma3_text, linear scaling, another scale": (
        "Gemma3TextConfig",
        {
            "head_dim": 8,
            "sliding_window": 5,
            "sliding_window_pattern": 2,
            "query_pre_attn_scalar": 20,
            "tie_word_embeddings": False,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1000.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
            },
        },
    ),
}
WRITTEN_AS = {"phi3": "LlamaForCausalLM", "phi3, window": "MistralForCausalLM"}  # which are the same function


def tiny(family: str, n_layers: int = 2, **changes: Any) -> nn.Module:
    """A random model of transformers whose every part matters."""
    config, options = FAMILIES[family]
    values: dict[str, Any] = {"vocab_size": VOCAB, **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))}
    if config == "GPT2Config":
        values |= {"n_positions": CONTEXT, "n_embd": 32, "n_layer": n_layers, "n_head": 4}
    else:
        values |= {"max_position_embeddings": CONTEXT, "hidden_size": 32, "intermediate_size": 48}
        values |= {"num_hidden_layers": n_layers, "num_attention_heads": 4, "num_key_value_heads": 2}
    made = getattr(transformers, config)(**(values | options | changes))
    model = randomize(transformers.AutoModelForCausalLM.from_config(made), std=0.2)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith(".bias") or ("Gemma" in config and p.ndim == 1):
                p.sub_(1.0)  # `randomize` means norms: shifted biases would drown what the text says; Gemma's add 1
    return model


def save(model: nn.Module, folder: Path, **options: Any) -> Path:
    model.save_pretrained(folder, **options)  # type: ignore[operator]
    is_qwen2 = model.config.model_type == "qwen2"
    write_tokenizer_json(folder, qwen_tokenizer() if is_qwen2 else tiny_tokenizer(), None, None)
    return folder


def reopened(folder: Path, **options: Any) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, **options).eval()


def gpt_of(folder: Checkpoint) -> GPT:
    assert isinstance(folder.model, GPT)
    return folder.model


def token_ids(length: int, rows: int = 2) -> Tensor:
    return torch.randint(0, VOCAB, (rows, length), generator=torch.Generator().manual_seed(length))


@torch.no_grad()
def theirs(model: nn.Module, idx: Tensor) -> Tensor:
    return model(idx).logits.float()


@torch.no_grad()
def ours(folder: Checkpoint, idx: Tensor) -> Tensor:
    return gpt_of(folder)(idx).float()


def greedy(model: Any, prompts: list[list[int]], n: int) -> list[list[int]]:
    """Return the tokens that transformers generates for a left-padded batch with its KV cache."""
    width = max(map(len, prompts))
    idx = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    out = model.generate(input_ids=idx, attention_mask=mask, max_new_tokens=n, do_sample=False, pad_token_id=0)
    return out[:, width:].tolist()


def same_weights(a: Checkpoint, b: Checkpoint) -> bool:
    first, second = gpt_of(a).state_dict(), gpt_of(b).state_dict()
    return first.keys() == second.keys() and all(
        tensor.dtype == second[name].dtype and torch.equal(tensor, second[name]) for name, tensor in first.items()
    )


# ---- in: the same function -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_those_of_transformers_thirty_layers_deep(tmp_path: Path, family: str) -> None:
    model = tiny(family, n_layers=30)
    imported = import_model(str(save(model, tmp_path)))
    idx = token_ids(CONTEXT)
    expected = theirs(model, idx)
    assert expected.std() > 0.5
    torch.testing.assert_close(ours(imported, idx), expected, atol=1e-4, rtol=0)
    assert not imported.model.training


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_text_equals_that_of_transformers(tmp_path: Path, family: str) -> None:
    """Cached, batched, with prompts of different lengths, past the window of those that have one."""
    model = tiny(family)
    imported = import_model(str(save(model, tmp_path)))
    prompts = [token_ids(length, rows=1)[0].tolist() for length in (3, 17, 9)]
    answers = generate(gpt_of(imported), prompts, max_new_tokens=30)
    assert answers == greedy(model, prompts, 30)
    assert len({token for answer in answers for token in answer}) > (
        2 if family == "gemma3_text" else 5
    )  # its tiny form repeats itself
    assert generate(gpt_of(imported), prompts[:1], max_new_tokens=30) == answers[:1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_half_precision_is_kept_or_converted(tmp_path: Path, family: str, dtype: torch.dtype) -> None:
    save(tiny(family).to(dtype), tmp_path)
    kept, full = import_model(str(tmp_path)), import_model(str(tmp_path), torch.float32)
    half = import_model(str(tmp_path), torch.bfloat16)
    assert {p.dtype for p in kept.model.parameters()} == {dtype}
    assert {p.dtype for p in full.model.parameters()} == {torch.float32}
    for name, tensor in gpt_of(kept).state_dict().items():
        assert torch.equal(tensor.float(), full.model.state_dict()[name])
        assert torch.equal(tensor.bfloat16(), half.model.state_dict()[name])
    idx = token_ids(20)
    torch.testing.assert_close(ours(full, idx), theirs(reopened(tmp_path, dtype=torch.float32), idx), atol=1e-4, rtol=0)


def test_shards_are_one_model(tmp_path: Path) -> None:
    model = tiny("llama")
    whole = import_model(str(save(model, tmp_path / "whole")))
    save(model, tmp_path / "shards", max_shard_size="30KB")
    assert len(list((tmp_path / "shards").glob("model-*.safetensors"))) > 2
    assert same_weights(import_model(str(tmp_path / "shards")), whole)


def test_files_without_the_head_and_with_old_constants(tmp_path: Path) -> None:
    """Checkpoints in the form of GPT-2 and early Llamas on the hub: no prefix, no head, causal masks stored."""
    for family, prefix, constants in (
        ("gpt2", "transformer.", {"h.0.attn.bias": torch.ones(1, 1, 64, 64), "h.1.attn.masked_bias": torch.ones(())}),
        ("llama, tied, one key for all queries", "model.", {"layers.1.self_attn.rotary_emb.inv_freq": torch.ones(4)}),
    ):
        folder = save(tiny(family), tmp_path / prefix)
        expected = import_model(str(folder))
        stored = load_file(folder / "model.safetensors")
        assert all(name.startswith(prefix) for name in stored)
        save_file({n.removeprefix(prefix): t for n, t in stored.items()} | constants, folder / "model.safetensors")
        assert same_weights(import_model(str(folder)), expected)
        save_file(stored | {prefix + n: t for n, t in constants.items()}, folder / "model.safetensors")
        assert same_weights(import_model(str(folder)), expected)


WRAPPED = {
    "torch.compile": lambda name: f"_orig_mod.{name}",
    "torch.compile of each block": lambda name: re.sub(r"(layers|h)\.(\d+)\.", r"\1.\2._orig_mod.", name),
    "torch.compile of the inner model": lambda name: re.sub(r"^(model|transformer)\.", r"\1._orig_mod.", name),
    "DDP": lambda name: f"module.{name}",
    "DDP and torch.compile": lambda name: f"_orig_mod.module.{name}",
    "FSDP": lambda name: f"_fsdp_wrapped_module.{name}".replace(".mlp.", "._checkpoint_wrapped_module.mlp."),
    "a model inside another": lambda name: f"model.{name}",
    "the inner model, compiled": lambda name: f"_orig_mod.{re.sub(r'^(model|transformer)[.]', '', name)}",
}


@pytest.mark.parametrize("family", ["gpt2, untied, other widths", "llama"])
@pytest.mark.parametrize("wrapped", WRAPPED.values(), ids=WRAPPED.keys())
def test_prefixes_of_wrappers_change_nothing(tmp_path: Path, wrapped: Any, family: str) -> None:
    folder = save(tiny(family), tmp_path)
    expected = import_model(str(folder))
    stored = load_file(folder / "model.safetensors")
    renamed = {wrapped(name): tensor for name, tensor in stored.items()}
    assert renamed.keys() != stored.keys()
    save_file(renamed, folder / "model.safetensors")
    assert same_weights(import_model(str(folder)), expected)


def test_a_tensor_under_two_prefixes_is_named(tmp_path: Path) -> None:
    folder = save(tiny("llama"), tmp_path)
    stored = load_file(folder / "model.safetensors")
    for extra in ("module.model.norm.weight", "norm.weight"):
        save_file(stored | {extra: torch.zeros(32)}, folder / "model.safetensors")
        with pytest.raises(InputError, match=r"model\.norm\.weight .*one tensor|.*one tensor; remove one of them"):
            import_model(str(folder))


def test_shards_need_no_index(tmp_path: Path) -> None:
    """A single file named as a shard, as several tools write it, all shards without their index, another name."""
    folder = save(tiny("llama"), tmp_path)
    expected = import_model(str(folder))
    stored = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    assert same_weights(import_model(str(folder)), expected)
    (folder / "model-00001-of-00001.safetensors").rename(folder / "weights.safetensors")
    assert same_weights(import_model(str(folder)), expected)
    (folder / "weights.safetensors").unlink()
    names = sorted(stored)
    for number in range(3):
        part = {name: stored[name] for name in names[number::3]}
        save_file(part, folder / f"model-0000{number + 1}-of-00003.safetensors")
    assert same_weights(import_model(str(folder)), expected)
    (folder / "model-00002-of-00003.safetensors").rename(folder / "model-00002-of-00004.safetensors")
    with pytest.raises(InputError, match="are of different sets; keep the files of one"):
        import_model(str(folder))
    (folder / "model-00002-of-00004.safetensors").unlink()
    with pytest.raises(InputError, match=r"shard 2 of 3 is missing \(1 in all\); fetch it again"):
        import_model(str(folder))


@pytest.mark.parametrize("family", ["gpt2", "llama, tied, one key for all queries"])
def test_a_tied_model_may_store_its_head_alone(tmp_path: Path, family: str) -> None:
    folder = save(tiny(family), tmp_path)
    expected = import_model(str(folder))
    stored = load_file(folder / "model.safetensors")
    embedding = next(name for name in stored if name.endswith(("wte.weight", "embed_tokens.weight")))
    stored["lm_head.weight"] = stored.pop(embedding)
    save_file(stored, folder / "model.safetensors")
    imported = import_model(str(folder))
    assert same_weights(imported, expected)
    assert gpt_of(imported).lm_head.weight is gpt_of(imported).tok_emb.weight


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (
            {"model.norm.weight": torch.zeros(32, dtype=torch.float8_e4m3fn)},
            r"norm\.weight is stored as F8_E4M3; .*GGUF",
        ),
        (
            {"model.layers.0.mlp.up_proj.qweight": torch.zeros(4, 4, dtype=torch.int32)},
            "qweight is of quantized weights",
        ),
        ({"model.layers.0.mlp.up_proj.weight.absmax": torch.zeros(4)}, "absmax is of quantized weights; take .* bf16"),
        ({"model.layers.0.mlp.up_proj.weight_scale_inv": torch.zeros(4)}, "weight_scale_inv is of quantized weights"),
    ],
)
def test_quantized_weights_are_named_with_what_to_take_instead(
    tmp_path: Path, tensors: dict[str, Tensor], message: str
) -> None:
    folder = save(tiny("llama"), tmp_path)
    save_file(load_file(folder / "model.safetensors") | tensors, folder / "model.safetensors")
    with pytest.raises(InputError, match=message) as error:
        import_model(str(folder))
    assert "\n" not in str(error.value)


def test_a_pointer_of_git_lfs_is_named(tmp_path: Path) -> None:
    folder = save(tiny("llama"), tmp_path)
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n")
    with pytest.raises(InputError, match=r"model\.safetensors: a git-LFS pointer, .*git lfs pull"):
        import_model(str(folder))


def test_pickled_weights_and_adapters_are_named(tmp_path: Path) -> None:
    folder = save(tiny("llama"), tmp_path)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(InputError, match=r"pytorch_model\.bin is not read: .*; take or make .*save_pretrained"):
        import_model(str(folder))
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(InputError, match=r"a PEFT adapter, not a whole model; .*import BASE OUT --adapter"):
        import_model(str(folder))


def test_a_tied_head_may_be_stored_twice_but_not_differ(tmp_path: Path) -> None:
    folder = save(tiny("qwen2"), tmp_path)
    expected = import_model(str(folder))
    stored = load_file(folder / "model.safetensors")
    head = stored["model.embed_tokens.weight"].clone()
    save_file(stored | {"lm_head.weight": head}, folder / "model.safetensors")
    imported = import_model(str(folder))
    assert same_weights(imported, expected)
    assert gpt_of(imported).lm_head.weight is gpt_of(imported).tok_emb.weight
    head[3, 5] += 1
    save_file(stored | {"lm_head.weight": head}, folder / "model.safetensors")
    with pytest.raises(InputError, match=r"tie_word_embeddings is true, but lm_head\.weight is not the embedding"):
        import_model(str(folder))


@pytest.mark.skipif(sys.platform != "linux", reason="the peak of a process is read from Linux's /proc")
def test_weights_are_never_in_memory_twice(tmp_path: Path) -> None:
    """The peak of an import is the weights and little more, whether they stay as they are or are converted."""
    widths = {"emb_dim": 512, "n_heads": 8, "n_kv_heads": 8, "head_dim": 64, "ffn_dim": 2048}
    gpt = GPT(gpt_config(**widths, vocab_size=8192, n_layers=16, tie_embeddings=False))
    config = CheckpointConfig(kind="base", gpt=gpt.config)
    export_hf(Checkpoint(gpt.to(torch.bfloat16), tiny_tokenizer(), config), tmp_path / "theirs")
    code = (
        "import re, sys\n"
        "from pathlib import Path\n"
        "import psutil, torch\n"
        "from llm.checkpoint.folder import save_checkpoint\n"
        "from llm.convert.load import import_model\n"
        "before = psutil.Process().memory_info().rss\n"
        "folder = import_model(sys.argv[1], getattr(torch, sys.argv[2]))\n"
        "save_checkpoint(Path(sys.argv[3]), folder)\n"
        "peak = int(re.search(r'VmHWM:\\s+(\\d+) kB', Path('/proc/self/status').read_text())[1]) * 1024\n"
        "size = sum(p.numel() * p.element_size() for p in folder.model.parameters())\n"
        "print((peak - before) / size)\n"
    )
    for source, dtype in (("theirs", "bfloat16"), ("ours", "float32")):
        command = [sys.executable, "-c", code, str(tmp_path / source), dtype, str(tmp_path / "ours")]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        assert float(done.stdout) < 1.1, (source, dtype)


# ---- in: what a config says ------------------------------------------------------------------------------------------

# As they are found on the hub, shortened: written by several versions of transformers.
SMOLLM2 = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 576,
    "intermediate_size": 1536,
    "is_llama_config": True,
    "max_position_embeddings": 8192,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 9,
    "num_hidden_layers": 30,
    "num_key_value_heads": 3,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_interleaved": False,
    "rope_scaling": None,
    "rope_theta": 100000,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "vocab_size": 49152,
}
LLAMA_3_1 = {
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 131072,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "vocab_size": 128256,
}
LLAMA_2 = {
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "max_position_embeddings": 4096,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "rms_norm_eps": 1e-05,
    "vocab_size": 32000,
}
QWEN_2_5 = {
    "hidden_act": "silu",
    "hidden_size": 896,
    "intermediate_size": 4864,
    "max_position_embeddings": 32768,
    "max_window_layers": 21,
    "model_type": "qwen2",
    "num_attention_heads": 14,
    "num_hidden_layers": 24,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_scaling": {"factor": 4.0, "original_max_position_embeddings": 32768, "type": "yarn"},
    "rope_theta": 1000000.0,
    "sliding_window": 32768,
    "tie_word_embeddings": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
QWEN_3 = {
    "attention_bias": False,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "layer_types": ["full_attention"] * 28,
    "max_position_embeddings": 40960,
    "max_window_layers": 28,
    "model_type": "qwen3",
    "num_attention_heads": 16,
    "num_hidden_layers": 28,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06,
    "rope_parameters": {"rope_theta": 1000000, "rope_type": "default"},
    "sliding_window": None,
    "tie_word_embeddings": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
MISTRAL = {
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "model_type": "mistral",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
    "tie_word_embeddings": False,
    "vocab_size": 32000,
}
GPT2 = {
    "activation_function": "gelu_new",
    "attn_pdrop": 0.1,
    "bos_token_id": 50256,
    "eos_token_id": 50256,
    "layer_norm_epsilon": 1e-05,
    "model_type": "gpt2",
    "n_ctx": 1024,
    "n_embd": 1600,
    "n_head": 25,
    "n_layer": 48,
    "n_positions": 1024,
    "vocab_size": 50257,
}
LLAMA3_SCALING = {"factor": 8.0, "original_context_length": 8192, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN_SCALING = {"factor": 4.0, "original_context_length": 32768, "beta_fast": 32.0, "beta_slow": 1.0}


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (SMOLLM2, {"n_kv_heads": 3, "head_dim": 64, "rope_theta": 1e5, "tie_embeddings": True, "rope_scaling": None}),
        (LLAMA_3_1, {"rope_theta": 5e5, "rope_scaling": RopeScaling(kind="llama3", **LLAMA3_SCALING)}),  # type: ignore[arg-type]
        (LLAMA_2, {"n_kv_heads": 32, "rope_theta": 1e4, "tie_embeddings": False, "qkv_bias": False, "bias": False}),
        (
            QWEN_2_5,
            {
                "qkv_bias": True,
                "bias": False,
                "sliding_window": None,
                "rope_scaling": RopeScaling(kind="yarn", attention_factor=1.138629436111989, **YARN_SCALING),  # type: ignore[arg-type]
            },
        ),
        (QWEN_3, {"qk_norm": True, "qkv_bias": False, "head_dim": 128, "rope_theta": 1e6, "sliding_window": None}),
        (MISTRAL, {"sliding_window": 4096, "qkv_bias": False, "head_dim": 128, "rope_scaling": None}),
        (MISTRAL | {"sliding_window": None}, {"sliding_window": None}),
        (GPT2, {"ffn_dim": 6400, "head_dim": 64, "tie_embeddings": True, "positions": "learned", "qkv_bias": True}),
    ],
    ids=lambda value: value.get("model_type", "") if isinstance(value, dict) else "",
)
def test_configs_as_they_are_found(tmp_path: Path, content: dict[str, Any], expected: dict[str, Any]) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(content))
    _, hf_config = read_hf_config(path)
    gpt = hf_config.gpt_config()
    assert {name: getattr(gpt, name) for name in expected} == expected


@pytest.mark.parametrize("family", FAMILY_LIST, ids=lambda family: family.model_type)
def test_what_a_config_leaves_out_is_as_in_transformers(family: Family) -> None:
    """The defaults of each class, for every key that is read, and the config that they make together."""
    theirs = transformers.AutoConfig.for_model(family.model_type)
    ours = family.hf_config.model_validate({"model_type": family.model_type})
    nothing = object()
    for key, value in ours.model_dump().items():
        expected = getattr(type(theirs), key, nothing)  # what the class says, before it works out the rest
        if expected is not nothing and key not in ("rope_parameters", "rope_scaling", "model_type"):
            assert value == expected, key
    gpt = ours.gpt_config()
    whole = {"num_attention_heads": gpt.n_heads, "num_hidden_layers": gpt.n_layers, "hidden_size": gpt.emb_dim}
    whole |= {"vocab_size": gpt.vocab_size, "tie_word_embeddings": gpt.tie_embeddings}
    if gpt.positions == "rotary":
        whole |= {"num_key_value_heads": gpt.n_kv_heads, "intermediate_size": gpt.ffn_dim, "rms_norm_eps": gpt.norm_eps}
        whole |= {"head_dim": gpt.head_dim} if hasattr(theirs, "head_dim") else {}
        assert rope_of(theirs)["rope_theta"] == gpt.rope_theta
    assert {key: getattr(theirs, key) for key in whole} == whole


def rope_of(config: Any) -> dict[str, Any]:
    parameters: dict[str, Any] = config.rope_parameters
    return parameters.get("full_attention", parameters)


def test_a_list_of_equal_numbers_for_each_layer_is_the_number(tmp_path: Path) -> None:
    listed = {"num_key_value_heads": [3] * 30, "intermediate_size": [1536] * 30}
    (tmp_path / "config.json").write_text(json.dumps(SMOLLM2 | listed))
    found = read_hf_config(tmp_path / "config.json")[1].gpt_config()
    (tmp_path / "config.json").write_text(json.dumps(SMOLLM2))
    assert found == read_hf_config(tmp_path / "config.json")[1].gpt_config()


@pytest.mark.parametrize(
    ("content", "changes", "message"),
    [
        (GPT2, {"model_type": "bert"}, "model_type 'bert' is not known; known are gpt2, llama, mistral, qwen2, qwen3"),
        (GPT2, {"model_type": None}, "model_type None is not known"),
        (GPT2, {"n_embd": None}, "n_embd: input should be a valid integer, found None"),
        (GPT2, {"n_layer": "48"}, "n_layer: input should be a valid integer, found '48'"),
        (GPT2, {"n_head": 24}, "n_embd 1600 must be a multiple of n_head 24"),
        (GPT2, {"activation_function": "gelu"}, "activation_function: .*'gelu_new'.*found 'gelu'"),
        (GPT2, {"scale_attn_weights": False}, "scale_attn_weights: .*found False"),
        (GPT2, {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx: .*found True"),
        (GPT2, {"add_cross_attention": True}, "add_cross_attention: .*found True"),
        (LLAMA_2, {"hidden_act": "gelu"}, "hidden_act: input should be 'silu' or 'swish', found 'gelu'"),
        (LLAMA_2, {"quantization_config": {"bits": 4}}, r"quantization_config: quantized weights \(4\) are not read"),
        (LLAMA_2, {"quantization_config": {"quant_method": "gptq", "bits": 4}}, r"\('gptq'\) .*; take .* GGUF file"),
        (QWEN_3, {"quantization_config": {"quant_method": "fp8"}}, r"\('fp8'\) are not read; take .*bf16"),
        (LLAMA_2, {"compression_config": {"quant_method": "compressed-tensors"}}, "compression_config: quantized"),
        (LLAMA_2, {"model_type": "mixtral"}, "'mixtral' is not known; .* It would need a mixture of experts"),
        (QWEN_3, {"model_type": "qwen3_5_text"}, r"It would need layers of linear attention \(gated delta net\)"),
        (LLAMA_2, {"model_type": "gemma3"}, "It would need inputs other than text .*gemma3_text, is read"),
        (LLAMA_2, {"model_type": "unheard_of"}, r"is not known; .*CONTRIBUTING\.md says how a family is added"),
        (LLAMA_2, {"num_key_value_heads": [32] * 31 + [16]}, r"num_key_value_heads: .*found \[32, 32"),
        (LLAMA_2, {"partial_rotary_factor": 0.5}, "partial_rotary_factor: .*found 0.5"),
        (SMOLLM2, {"rope_interleaved": True}, "rope_interleaved: .*found True"),
        (SMOLLM2, {"num_key_value_heads": 2}, "n_heads 9 must be a multiple of n_kv_heads 2"),
        (LLAMA_2, {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_scaling.type: .*found 'dynamic'"),
        (LLAMA_2, {"rope_scaling": {"type": "linear"}}, "factor: .*found None"),
        (LLAMA_3_1, {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "llama3: low_freq_factor is missing"),
        (QWEN_3, {"rope_parameters": {"partial_rotary_factor": 0.5}}, "rope_parameters.partial_rotary_factor: .*0.5"),
        (QWEN_3, {"rope_parameters": {"full_attention": {}}}, "rope_parameters: full_attention is an option that GPT"),
        (QWEN_2_5, {"rope_scaling": {"type": "yarn", "factor": 4.0, "truncate": False}}, "truncate: .*found False"),
        (
            MISTRAL,
            {"layer_types": ["full_attention", "sliding_attention"] * 16},
            "layer_types: .* one kind",
        ),
        (QWEN_3, {"layer_types": ["full_attention"] * 27}, "layer_types: expected 28 of them, found 27"),
        (QWEN_3, {"layer_types": ["linear_attention"] * 28}, "layer_types.0: .*found 'linear_attention'"),
    ],
)
def test_what_gpt_cannot_express_is_named(
    tmp_path: Path, content: dict[str, Any], changes: dict[str, Any], message: str
) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(content | changes))
    with pytest.raises(InputError, match=rf"config\.json: .*{message}") as error:
        import_model(str(tmp_path))
    assert "\n" not in str(error.value)


# ---- in: what can be wrong -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tiny("llama"), tmp_path_factory.mktemp("sound"))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("nowhere", "nowhere: not found; give a model folder, a .gguf file or a hub name"),
        ("some/where.gguf", "some/where.gguf: not found"),
        ("a/b/c", "a/b/c: not found"),
        (str(ROOT / "README.md"), "README.md: no folder and no .gguf file"),
        ("nobody/nothing", "nobody/nothing: no such folder, and the hub did not give it"),
    ],
)
def test_sources_that_are_none(source: str, message: str) -> None:
    with pytest.raises(InputError, match=message) as error:
        import_model(source)
    assert "\n" not in str(error.value)


# ---- in: other sources -----------------------------------------------------------------------------------------------


def test_a_hub_name_comes_from_the_cache_without_a_network(sound: Path, tmp_path: Path) -> None:
    """`HF_HOME` says where the cache is; the environment is read when huggingface_hub is imported."""
    repository = tmp_path / "hub" / "models--some--model"
    shutil.copytree(sound, repository / "snapshots" / "abc")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc")

    def read() -> None:
        os.environ.pop("HF_HUB_CACHE", None)
        for name in [name for name in sys.modules if name.partition(".")[0] == "huggingface_hub"]:
            del sys.modules[name]
        print(sum(p.numel() for p in import_model("some/model").model.parameters()))
        print(import_tokenizer(source_files("some/model", weights=False)).tokenizer.vocab_size)

    done = run_forked(read, HF_HOME=str(tmp_path), HF_HUB_OFFLINE="1")
    assert done.returncode == 0, done.stderr
    expected = sum(p.numel() for p in import_model(str(sound)).model.parameters())
    assert done.stdout == f"{expected}\n280\n"


def test_a_model_folder_of_ours_is_a_source_too(tmp_path: Path) -> None:
    gpt = randomize(GPT(gpt_config(**SHIPPED_FORM, vocab_size=280)))
    config = CheckpointConfig(kind="instruct", gpt=gpt.config, template="chatml", system="Be brief.")  # type: ignore[arg-type]
    saved = Checkpoint(gpt.to(torch.bfloat16), tiny_tokenizer(), config)  # type: ignore[arg-type]
    save_checkpoint(tmp_path / "ours", saved)
    imported = import_model(str(tmp_path / "ours"))
    assert same_weights(imported, saved)
    assert imported.config == config
    tokenizer, template, system = import_tokenizer(tmp_path / "ours")
    assert (tokenizer.ranks, template, system) == (tiny_tokenizer().ranks, "chatml", "Be brief.")


def test_a_chat_template_makes_an_instruct_model(tmp_path: Path) -> None:
    save(tiny("llama"), tmp_path)
    assert import_model(str(tmp_path)).config.kind == "base"
    write_tokenizer_json(tmp_path, tiny_tokenizer(), "chatml", None)
    imported = import_model(str(tmp_path))
    assert (imported.config.kind, imported.config.template) == ("instruct", "chatml")
    assert imported.tokenizer.encode("the cat sat") == tiny_tokenizer().encode("the cat sat")
    assert import_tokenizer(tmp_path).template == "chatml"


def test_describe(sound: Path, tmp_path: Path) -> None:
    n = sum(p.numel() for p in reopened(sound).parameters())
    assert describe(import_model(str(sound))) == f"llama, {n:,} parameters, float32, base"
    save(tiny("gpt2").to(torch.bfloat16), tmp_path)
    assert describe(import_model(str(tmp_path))).startswith("gpt2, ")
    own = GPT(gpt_config(**SHIPPED_FORM))
    folder = Checkpoint(own, tiny_tokenizer(), CheckpointConfig(kind="instruct", gpt=own.config, template="alpaca"))
    n = sum(p.numel() for p in own.parameters())
    assert describe(folder) == f"{n:,} parameters, float32, template alpaca"


# ---- out -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_export_opens_in_transformers_with_the_same_weights(tmp_path: Path, family: str) -> None:
    """In, out, and in again is what it was, bit for bit; so is what transformers makes of it."""
    model = tiny(family)
    imported = import_model(str(save(model, tmp_path / "in")))
    export_hf(imported, tmp_path / "out")
    opened = reopened(tmp_path / "out")
    assert type(opened).__name__ == WRITTEN_AS.get(family, type(model).__name__)
    if family not in WRITTEN_AS:
        expected = model.state_dict()
        assert opened.state_dict().keys() == expected.keys()
        assert all(torch.equal(tensor, expected[name]) for name, tensor in opened.state_dict().items())
    idx = token_ids(CONTEXT)
    torch.testing.assert_close(theirs(opened, idx), theirs(model, idx), atol=1e-5, rtol=0)
    again = import_model(str(tmp_path / "out"))
    assert same_weights(again, imported)
    assert again.config == imported.config


FITTING: dict[str, dict[str, Any]] = {
    "gpt2": {},
    "gpt2, untied": {"tie_embeddings": False},
    "gpt2, another rope_theta": {"rope_theta": 5e5},  # which learned positions do not use
    "llama": LLAMA_FORM,
    "llama, grouped, tied": LLAMA_FORM | {"n_kv_heads": 2, "head_dim": 6},
    "llama, biases": LLAMA_FORM | {"qkv_bias": True, "bias": True},
    "mistral": LLAMA_FORM | {"sliding_window": 3, "tie_embeddings": False},
    "mistral for the widths": LLAMA_FORM | {"emb_dim": 18},
    "qwen2": LLAMA_FORM | {"qkv_bias": True},
    "qwen3": LLAMA_FORM | {"qk_norm": True, "head_dim": 10},
    "qwen3, window": LLAMA_FORM | {"qk_norm": True, "sliding_window": 3},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", FITTING)
def test_a_model_made_here_runs_in_transformers(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    form = FITTING[name] | {"vocab_size": VOCAB}
    model = randomize(GPT(gpt_config(**form))).to(dtype)
    assert isinstance(model, GPT)
    tokenizer = qwen_tokenizer() if name == "qwen2" else tiny_tokenizer()
    saved = Checkpoint(model, tokenizer, CheckpointConfig(kind="base", gpt=model.config))
    export_hf(saved, tmp_path / "out")
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert {file.get_tensor(key).dtype for key in file.keys()} == {dtype}  # noqa: SIM118
    opened = reopened(tmp_path / "out")
    assert {p.dtype for p in opened.parameters()} == {dtype}
    assert type(opened).__name__.lower().startswith(name.split(",")[0].split()[0])
    idx = token_ids(16)
    expected = ours(Checkpoint(model.float(), saved.tokenizer, saved.config), idx)
    torch.testing.assert_close(theirs(opened.float(), idx), expected, atol=1e-5, rtol=1e-5)
    model.to(dtype)
    again = import_model(str(tmp_path / "out"))
    assert same_weights(again, saved)
    if name != "gpt2, another rope_theta":
        assert again.config == saved.config


@pytest.mark.parametrize(
    ("form", "message"),
    [
        (SHIPPED_FORM, r"qwen3 has no place for activation 'relu2' \(only 'swiglu'\)"),
        ({"norm": "rmsnorm"}, r"gpt2 has no place for norm 'rmsnorm' \(only 'layernorm'\)"),
        ({"qk_norm": True}, "gpt2 has no place for qk_norm True"),
        ({"bias": False}, r"gpt2 has no place for bias False \(only True\)"),
        ({"n_kv_heads": 2}, r"gpt2 has no place for n_kv_heads 2 \(only 4\)"),
        ({"head_dim": 8}, r"gpt2 has no place for head_dim 8 \(only 4\)"),
        ({"emb_dim": 18}, "n_embd 18 must be a multiple of n_head 4"),
        ({"activation": "swiglu"}, "gpt2 has no place for activation 'swiglu'"),
        ({"sliding_window": 3}, "gpt2 has no place for sliding_window 3"),
        (LLAMA_FORM | {"norm": "layernorm"}, "llama has no place for norm 'layernorm'"),
        (LLAMA_FORM | {"bias": True}, "llama has no place for qkv_bias False"),
        (LLAMA_FORM | {"activation": "gelu", "norm": "layernorm"}, "norm 'layernorm' .*, activation 'gelu'"),
        (LLAMA_FORM | {"sliding_window": 3, "bias": True}, "mistral has no place for bias True"),
        (LLAMA_FORM | {"qkv_bias": True}, "qkv_bias without bias is the form of Qwen2"),
    ],
)
def test_what_transformers_cannot_say_is_named(tmp_path: Path, form: dict[str, Any], message: str) -> None:
    model = GPT(gpt_config(**form, vocab_size=VOCAB))
    with pytest.raises(InputError, match=message) as error:
        export_hf(Checkpoint(model, tiny_tokenizer(), CheckpointConfig(kind="base", gpt=model.config)), tmp_path / "o")
    assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_every_form_is_written_or_refused(tmp_path: Path) -> None:
    written = []
    for name, form in FORMS.items():
        model = GPT(gpt_config(**form, vocab_size=VOCAB))
        folder = Checkpoint(model, tiny_tokenizer(), CheckpointConfig(kind="base", gpt=model.config))
        try:
            export_hf(folder, tmp_path / "out")
        except InputError:
            continue
        assert same_weights(import_model(str(tmp_path / "out")), folder)
        written.append(name)
    assert written == ["gpt2", "llama, two queries for each key", "llama, one key for all queries"]


def test_a_classifier_is_not_exported(tmp_path: Path) -> None:
    gpt = GPT(gpt_config(**LLAMA_FORM, vocab_size=VOCAB))
    config = CheckpointConfig(kind="classifier", gpt=gpt.config, labels=["a", "b"], max_length=8)
    with pytest.raises(InputError, match="a classifier's head has a bias"):
        export_hf(Checkpoint(GPTClassifier(gpt, 2), tiny_tokenizer(), config), tmp_path / "out")


def instruct(**changes: Any) -> Checkpoint:
    model = randomize(GPT(gpt_config(**(LLAMA_FORM | {"vocab_size": VOCAB, "context_length": 128} | changes))))
    assert isinstance(model, GPT)
    config = CheckpointConfig(kind="instruct", gpt=model.config, template="chatml", system="Be brief.")
    return Checkpoint(model, tiny_tokenizer(), config)


def test_an_exported_instruct_model_answers_in_transformers(tmp_path: Path) -> None:
    """Its tokenizer and chat template give our prompt, its text is ours, and it ends where ours ends."""
    from llm.tokenizer.prompts import encode_prompt, end_tokens

    folder = instruct()
    tokenizer = folder.tokenizer
    export_hf(folder, tmp_path / "out")
    opened = reopened(tmp_path / "out")
    ends = sorted(end_tokens(tokenizer, "chatml"))
    assert ends == sorted({tokenizer.eot, tokenizer.special_tokens["<|im_end|>"]})
    assert opened.generation_config.eos_token_id == opened.config.eos_token_id == ends
    assert opened.generation_config.bos_token_id is opened.config.bos_token_id is None

    auto = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    prompt = encode_prompt(tokenizer, "chatml", "Where is the cat?", system="Be brief.")
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Where is the cat?"}]
    assert auto.apply_chat_template(turns, add_generation_prompt=True, return_dict=False) == prompt
    [expected] = generate(gpt_of(folder), [prompt], max_new_tokens=20)
    [answer] = greedy(opened, [prompt], 20)
    stop = next((i for i, token in enumerate(expected) if token in ends), len(expected))
    assert answer[:stop] == expected[:stop] and (stop == 20 or answer[stop] in ends)
    assert auto.decode(answer[:stop]) == tokenizer.decode(expected[:stop])
    again = import_model(str(tmp_path / "out"))
    assert same_weights(again, folder)
    assert again.config == folder.config


def test_an_export_is_whole_or_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = instruct()
    export_hf(folder, tmp_path / "a")
    export_hf(folder, tmp_path / "b")
    contents = [{path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in "ab"]
    assert contents[0] == contents[1]
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"} <= contents[0].keys()
    assert (tmp_path / "a" / "model.safetensors").stat().st_mode == (tmp_path / "a" / "config.json").stat().st_mode

    def fails(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(llm.convert.hf, "write_tokenizer_json", fails)
    for name in "ac":
        with pytest.raises(OSError, match="disk full"):
            export_hf(instruct(n_layers=1), tmp_path / name)
    assert {path.name: path.read_bytes() for path in (tmp_path / "a").iterdir()} == contents[0]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


def test_every_option_of_gpt_is_said_or_refused() -> None:
    """A new option has to be given a value here: no export may lose one silently."""
    changes: dict[str, Any] = {
        "vocab_size": 99,
        "context_length": 9,
        "emb_dim": 20,
        "n_layers": 3,
        "n_heads": 8,
        "n_kv_heads": 2,
        "head_dim": 6,
        "ffn_dim": 7,
        "positions": "learned",
        "rope_theta": 5.0,
        "rope_scaling": RopeScaling(kind="linear", factor=2.0),
        "sliding_window": 2,
        "norm": "layernorm",
        "norm_eps": 0.001,
        "activation": "relu2",
        "qk_norm": True,
        "qkv_bias": True,
        "bias": True,
        "tie_embeddings": False,
        "full_layers": (1,),
        "local_rope_theta": 500.0,
        "nope_layers": (1,),
        "rotary_dim": 2,
        "ffn_bias": True,
        "joint_qk_norm": True,
        "norm_place": "after",
        "unit_offset_norm": True,
        "embedding_scale": 2.0,
        "attention_scale": 2.0,
    }
    beside: dict[str, dict[str, Any]] = {
        "full_layers": {"sliding_window": 3, "nope_layers": (0,)},
        "local_rope_theta": {"sliding_window": 3},
        "joint_qk_norm": {"qk_norm": True},
    }
    assert changes.keys() == GPTConfig.model_fields.keys()
    refused = set()
    for name, value in changes.items():
        config = gpt_config(**(LLAMA_FORM | {name: value} | beside.get(name, {})))
        try:
            assert hf_config_of(config)[1].gpt_config() == config, name
        except InputError:
            refused.add(name)
    alone = {
        "local_rope_theta",
        "joint_qk_norm",
        "norm_place",
        "unit_offset_norm",
        "embedding_scale",
        "attention_scale",
    }
    assert refused == {"positions", "norm", "activation", "bias"} | alone  # these belong together, in OLMo 2 or Gemma 3
