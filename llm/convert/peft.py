"""LoRA adapters in PEFT's format, for transformers' model of the same base.

GPT-2's queries, keys and values are one layer there. Adapters on some of the three become one adapter on that layer,
exactly: the factors A stacked, the factors B as blocks on a diagonal, and rank and alpha larger by the same number.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor

from llm.checkpoint.adapter import read_adapter
from llm.checkpoint.card import Card, write_card
from llm.checkpoint.readme import readme
from llm.common.errors import InputError
from llm.common.files import replaced_folder
from llm.convert.hf import hf_config_of


def export_peft(adapter: Path, out: Path, base: str | None = None, card: Card | None = None) -> None:
    """Write what `peft.PeftModel.from_pretrained(model, out)` loads; `base` is the name or folder of that model.

    Raises `InputError` for a classifier's adapter and for a base that transformers cannot express.
    """
    config, tensors = read_adapter(adapter)
    lora, gpt = config.lora, config.model.gpt
    if config.model.kind == "classifier":
        raise InputError(f"{adapter}: a classifier's head has no place in PEFT's form; use the merged model folder")
    try:
        family, _ = hf_config_of(gpt)
    except InputError as error:
        raise InputError(f"{adapter}: {error}") from None
    layers: dict[str, list[str]] = {}  # by their name, the linear layers of ours that stand side by side in it
    for ours, theirs in family.hf_names.items():
        if ours.endswith("_proj"):
            for i in range(gpt.n_layers):
                layers.setdefault(theirs.format(i), []).append(ours.format(i))

    weights: dict[str, Tensor] = {}
    scaled: dict[str, int] = {}  # by their name, how many adapters of ours became one
    for theirs, parts in layers.items():
        if adapted := [part for part in parts if f"{part}.A" in tensors]:
            nothing = torch.zeros(gpt.emb_dim, 0)  # GPT-2's queries, keys and values are each of this size
            A = torch.cat([tensors[f"{part}.A"] for part in adapted])  # [n r, in_features]
            B = torch.block_diag(*(tensors.get(f"{part}.B", nothing) for part in parts))  # [out_features, n r]
            weights |= {f"base_model.model.{theirs}.lora_{name}.weight": t for name, t in (("A", A), ("B", B))}
            scaled[theirs] = len(adapted)

    def short(name: str) -> str:
        """Return the last part of a layer's name, two where an unadapted layer ends alike (c_proj of GPT-2)."""
        last = name.rpartition(".")[2]
        clash = any(other.endswith(f".{last}") for other in layers.keys() - scaled.keys())
        return ".".join(name.split(".")[-2:]) if clash else last

    values = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": lora.dropout,
        "target_modules": sorted({short(name) for name in scaled}),
        "rank_pattern": {short(name): n * lora.rank for name, n in scaled.items() if n > 1},
        "alpha_pattern": {short(name): n * lora.alpha for name, n in scaled.items() if n > 1},
        "fan_in_fan_out": bool(family.conv1d_weights),  # GPT-2's layers store [in, out]
        "bias": "none",
        "inference_mode": True,
    }
    with replaced_folder(out) as new:
        (new / "adapter_config.json").write_text(json.dumps(values, indent=2) + "\n")
        (new / "adapter_model.safetensors").write_bytes(save(weights, {"format": "pt"}))
        if card is not None:
            write_card(new, card, readme(card, out.name, "peft"))
