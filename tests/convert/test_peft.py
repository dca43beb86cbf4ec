"""Adapters that `peft` loads onto transformers' model of the base, with our logits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM

from llm.checkpoint.adapter import save_adapter
from llm.checkpoint.folder import Checkpoint, CheckpointConfig
from llm.common.errors import InputError
from llm.convert.hf import export_hf
from llm.convert.peft import export_peft
from llm.model.classifier import GPTClassifier
from llm.model.gpt import GPT
from llm.training.freeze import freeze
from tests.helpers import LLAMA_FORM, SHIPPED_FORM, gpt_config, qwen_tokenizer, randomize, tiny_tokenizer, train_params

QWEN = LLAMA_FORM | {"qkv_bias": True, "n_kv_heads": 2, "tie_embeddings": False}
QWEN3 = LLAMA_FORM | {"qk_norm": True, "n_kv_heads": 2, "head_dim": 6}
EVERY = ["q_proj", "k_proj", "v_proj", "out_proj", "up_proj", "gate_proj", "down_proj"]


def base_folder(form: dict[str, Any], labels: int = 0) -> Checkpoint:
    tokenizer = qwen_tokenizer() if form == QWEN else tiny_tokenizer()
    gpt = GPT(gpt_config(vocab_size=tokenizer.vocab_size, **form))
    model = GPTClassifier(gpt, labels) if labels else gpt
    randomize(model)
    config = CheckpointConfig(kind="base", gpt=gpt.config)
    if labels:
        config = CheckpointConfig(kind="classifier", gpt=gpt.config, labels=["ham", "spam"], max_length=9)
    return Checkpoint(model, tokenizer, config)


def adapt(base: Checkpoint, folder: Path, **lora: Any) -> None:
    """Adds adapters to the model of `base`, as if trained, and saves them alone."""
    params = train_params(trainable="lora", lora={"rank": 3, "alpha": 5.0, "dropout": 0.0, "targets": EVERY} | lora)
    freeze(base.model, params)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in base.model.parameters():
            if p.requires_grad:
                p.normal_(0.0, 0.3, generator=generator)
    save_adapter(folder, base, params.lora)


def logits(model: Any) -> Tensor:
    idx = torch.tensor([[5, 7, 250, 9, 1, 0], [3, 3, 8, 60, 2, 11]])
    with torch.no_grad():
        found = model(idx)
    return found if isinstance(found, Tensor) else found.logits


CASES: dict[str, tuple[dict[str, Any], list[str], set[str]]] = {  # form, our targets, those that PEFT is told
    "llama": (LLAMA_FORM, EVERY, {"q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "gate_proj", "down_proj"}),
    "llama, two layers": (LLAMA_FORM, ["down_proj", "q_proj"], {"q_proj", "down_proj"}),
    "mistral": (LLAMA_FORM | {"sliding_window": 3, "n_kv_heads": 2}, ["k_proj", "out_proj"], {"k_proj", "o_proj"}),
    "qwen2": (QWEN, ["v_proj", "gate_proj"], {"v_proj", "gate_proj"}),
    "qwen3": (QWEN3, ["q_proj", "k_proj"], {"q_proj", "k_proj"}),
    "gpt2": ({}, EVERY, {"c_attn", "c_proj", "c_fc"}),
    "gpt2, values": ({}, ["v_proj"], {"c_attn"}),
    "gpt2, queries and values": ({}, ["v_proj", "q_proj"], {"c_attn"}),
    "gpt2, one of two layers of a name": ({}, ["out_proj", "k_proj"], {"attn.c_proj", "c_attn"}),
    "gpt2, the other one": ({}, ["down_proj", "up_proj"], {"mlp.c_proj", "c_fc"}),
}


@pytest.mark.parametrize(("form", "targets", "named"), CASES.values(), ids=CASES.keys())
def test_peft_loads_the_adapter_and_computes_our_logits(
    tmp_path: Path, form: dict[str, Any], targets: list[str], named: set[str]
) -> None:
    base = base_folder(form)
    export_hf(base, tmp_path / "hf")
    before = logits(base.model)
    adapt(base, tmp_path / "adapter", targets=targets)
    ours = logits(base.model)
    assert (ours - before).abs().max() > 0.1
    export_peft(tmp_path / "adapter", tmp_path / "peft", base=str(tmp_path / "hf"))

    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    torch.testing.assert_close(logits(theirs), before, atol=1e-4, rtol=1e-4)
    model = PeftModel.from_pretrained(theirs, tmp_path / "peft").eval()
    config = model.peft_config["default"]
    assert set(config.target_modules) == named
    assert config.base_model_name_or_path == str(tmp_path / "hf")
    torch.testing.assert_close(logits(model), ours, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(logits(model.merge_and_unload()), ours, atol=1e-4, rtol=1e-4)


def test_the_folder_names_no_base_unless_it_is_told(tmp_path: Path) -> None:
    adapt(base_folder(LLAMA_FORM), tmp_path / "adapter", dropout=0.1)
    export_peft(tmp_path / "adapter", tmp_path / "peft")
    assert sorted(path.name for path in (tmp_path / "peft").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    values = json.loads((tmp_path / "peft/adapter_config.json").read_text())
    assert values["base_model_name_or_path"] is None
    assert (values["r"], values["lora_alpha"], values["lora_dropout"]) == (3, 5.0, 0.1)
    assert values["rank_pattern"] == values["alpha_pattern"] == {}


def test_what_has_no_form_there_is_named(tmp_path: Path) -> None:
    adapt(base_folder(LLAMA_FORM, labels=2), tmp_path / "classifier")
    with pytest.raises(InputError, match="classifier: a classifier's head has no place in PEFT's form"):
        export_peft(tmp_path / "classifier", tmp_path / "peft")
    adapt(base_folder(SHIPPED_FORM), tmp_path / "shipped")
    with pytest.raises(InputError, match=r"shipped: .*relu2"):
        export_peft(tmp_path / "shipped", tmp_path / "peft")
    with pytest.raises(InputError, match=r"nowhere: not an adapter: adapter\.json is missing"):
        export_peft(tmp_path / "nowhere", tmp_path / "peft")
    assert not (tmp_path / "peft").exists()
