"""Builders for several tests: tiny models, a tiny tokenizer, and parameters whose every value can be changed."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import pytest
import torch
from torch import nn

from llm.config import GPTConfig, RuntimeParams, TrainParams
from llm.tokenizer.bpe import Tokenizer
from llm.tokenizer.pre_tokenizers import PRE_TOKENIZERS

GPT2_FORM: dict[str, Any] = {
    "vocab_size": 61,
    "context_length": 16,
    "emb_dim": 16,
    "n_layers": 2,
    "n_heads": 4,
    "n_kv_heads": 4,
    "head_dim": 4,
    "ffn_dim": 24,
    "positions": "learned",
    "rope_theta": 10000.0,
    "norm": "layernorm",
    "norm_eps": 1e-5,
    "activation": "gelu",
    "qk_norm": False,
    "qkv_bias": True,
    "bias": True,
    "tie_embeddings": True,
}
LLAMA_FORM = {"positions": "rotary", "norm": "rmsnorm", "activation": "swiglu", "qkv_bias": False, "bias": False}
SHIPPED_FORM = LLAMA_FORM | {"activation": "relu2", "qk_norm": True}  # what params.yaml ships

# One of each choice that the model has: positions, norm, activation, attention groups, head width, tied or not.
FORMS: dict[str, dict[str, Any]] = {
    "gpt2": {},
    "gpt2, untied, without biases": {"tie_embeddings": False, "qkv_bias": False, "bias": False},
    "llama, two queries for each key": LLAMA_FORM | {"n_kv_heads": 2, "tie_embeddings": False},
    "llama, one key for all queries": LLAMA_FORM | {"n_kv_heads": 1, "head_dim": 6},
    "shipped": SHIPPED_FORM,
    "learned positions, rmsnorm, qk_norm": {"norm": "rmsnorm", "qk_norm": True, "n_kv_heads": 2},
    "rotary positions, layernorm": {"positions": "rotary", "head_dim": 8},
    # Options of open weights alone.
    "local and full layers, norms before and after": LLAMA_FORM
    | {"activation": "geglu", "qk_norm": True, "norm_place": "both", "unit_offset_norm": True, "embedding_scale": 4.0}
    | {"sliding_window": 3, "full_layers": (1,), "local_rope_theta": 50.0, "attention_scale": 0.4, "head_dim": 6},
    "a layer without positions, norms after": LLAMA_FORM
    | {"norm_place": "after", "qk_norm": True, "joint_qk_norm": True, "nope_layers": (0,), "rotary_dim": 4}
    | {"head_dim": 6, "n_kv_heads": 2, "ffn_bias": True},
}


def gpt_config(**changes: Any) -> GPTConfig:
    return GPTConfig(**(GPT2_FORM | changes))


def train_params(**changes: Any) -> TrainParams:
    values: dict[str, Any] = {
        "max_steps": 10,
        "batch_size": 4,
        "grad_accum_steps": 1,
        "optimizer": "adamw",
        "lr": 0.01,
        "muon_lr": 0.02,
        "muon_momentum": 0.95,
        "muon_iterations": 5,
        "min_lr_ratio": 0.1,
        "warmup_steps": 2,
        "schedule": "cosine",
        "decay_steps": 3,
        "beta1": 0.9,
        "beta2": 0.95,
        "weight_decay": 0.1,
        "grad_clip": 1.0,
        "precision": "fp32",
        "dropout": 0.0,
        "trainable": "all",
        "last_blocks": 1,
        "lora": {"rank": 2, "alpha": 4.0, "dropout": 0.0, "targets": ["q_proj", "v_proj"]},
        "eval_interval": 5,
        "patience": 0,
        "keep": "last",
    }
    return TrainParams(**(values | changes))


def runtime_params(**changes: Any) -> RuntimeParams:
    values: dict[str, Any] = {
        "device": "cpu",
        "compile": False,
        "activation_checkpointing": False,
        "workers": 1,
        "log_interval": 1,
        "checkpoint_interval": 1000,
    }
    return RuntimeParams(**(values | changes))


def randomize(model: nn.Module, seed: int = 0, std: float = 0.3) -> nn.Module:
    """Weights large enough that every part of the model matters, norm weights and biases included; eval mode."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0.0, std, generator=generator)
            if p.ndim == 1:
                p.add_(1.0)
    return model.eval()


@lru_cache(maxsize=1)
def tiny_tokenizer() -> Tokenizer:
    text = "the cat sat on the mat. the dog sat on the cat. ham and spam, spam and ham. " * 20
    return Tokenizer.train([text], vocab_size=280)


def qwen_tokenizer() -> Tokenizer:
    """One that cuts a text as Qwen's does."""
    [pattern] = [known.pattern for known in PRE_TOKENIZERS if "qwen2" in known.gguf_names]
    trained = tiny_tokenizer()
    return Tokenizer(trained.ranks, pattern, trained.special_tokens, nfc=True)


def set_bf16_units(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    """Let the CPU have these units of PyTorch's names alone."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: dict.fromkeys(names, True))
