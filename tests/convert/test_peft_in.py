"""Adapters that `peft` wrote, merged into a base here: the logits are those of `peft` itself."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from llm.checkpoint.folder import load_checkpoint
from llm.cli.main import main
from llm.common.errors import InputError
from llm.convert.load import import_model
from llm.convert.peft_in import merge_peft
from tests.convert.test_hf import FAMILIES, gpt_of, ours, save, theirs, tiny, token_ids

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TIED = "llama, tied, one key for all queries"
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"target_modules": ALL}),
    "rslora": ("llama", {"target_modules": ["q_proj", "down_proj"], "use_rslora": True}),
    "patterns": (
        "qwen3",
        {
            "target_modules": ALL,
            "rank_pattern": {"q_proj": 2, "layers.1.mlp.down_proj": 5, "^model.layers.0.self_attn.v_proj": 1},
            "alpha_pattern": {"mlp.(gate|up)_proj": 11, "o_proj": 1},
        },
    ),
    "some layers": ("qwen2", {"target_modules": ["v_proj"], "layers_to_transform": [1]}),
    "dora": ("llama", {"target_modules": ALL, "use_dora": True}),
    "gpt2": ("gpt2", {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}),
    "gpt2, dora": ("gpt2", {"target_modules": ["c_attn", "mlp.c_proj"], "fan_in_fan_out": True, "use_dora": True}),
    "gpt2, saved": (
        "gpt2",
        {"target_modules": ["c_fc"], "fan_in_fan_out": True, "modules_to_save": ["c_attn", "ln_f"]},
    ),
    "phi3": ("phi3", {"target_modules": ["qkv_proj", "gate_up_proj", "o_proj"]}),
    "phi3, half a head": ("phi3, half a head", {"target_modules": ["qkv_proj", "down_proj"]}),
    "gemma3_text": ("gemma3_text", {"target_modules": ALL, "modules_to_save": ["norm"]}),
    "olmo2": ("olmo2", {"target_modules": ["q_proj", "up_proj"], "modules_to_save": ["post_attention_layernorm"]}),
    "biases": ("llama, biases", {"target_modules": ["q_proj", "up_proj"], "bias": "all"}),
    "biases beside adapters": ("llama, biases", {"target_modules": ["q_proj", "up_proj"], "bias": "lora_only"}),
    "head and embedding saved": (
        "llama",
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "embed_tokens"]},
    ),
    "tied, head saved": (TIED, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    "tied, embedding saved": (TIED, {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}),
    "tied, saved together": (
        TIED,
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    ),
    "embedding adapted": ("llama", {"target_modules": ["q_proj", "embed_tokens", "lm_head"]}),
}


def adapted(family: str, options: dict[str, Any]) -> tuple[Any, Any]:
    """Return a base and a copy with an adapter, as if trained."""
    model = tiny(family)
    config = peft.LoraConfig(r=3, lora_alpha=5, task_type="CAUSAL_LM", **options)
    tuned = peft.get_peft_model(copy.deepcopy(model), config)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in tuned.named_parameters():
            if "lora_magnitude" in name:
                p.mul_(1.3)
            elif p.requires_grad:
                p.add_(torch.empty_like(p).normal_(0.0, 0.2, generator=generator))
    return model, tuned.eval()


@pytest.mark.parametrize(("family", "options"), CASES.values(), ids=CASES.keys())
def test_a_merged_adapter_computes_what_peft_does(tmp_path: Path, family: str, options: dict[str, Any]) -> None:
    base, tuned = adapted(family, options)
    save(base, tmp_path / "base")
    tuned.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    merged = merge_peft(tmp_path / "adapter", import_model(str(tmp_path / "base")))
    idx = token_ids(20)
    expected = theirs(tuned, idx)
    assert (expected - theirs(base, idx)).abs().max() > 0.1
    torch.testing.assert_close(ours(merged, idx), expected, atol=1e-4, rtol=1e-4)
    tied = gpt_of(merged).lm_head.weight is gpt_of(merged).tok_emb.weight
    assert tied == gpt_of(merged).config.tie_embeddings == merged.config.gpt.tie_embeddings
    if "ensure_weight_tying" in options:
        assert tied


def test_import_merges_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Into weights of half precision too, rounded once; a tokenizer beside it is named."""
    base, tuned = adapted("llama", {"target_modules": ALL})
    base.to(torch.bfloat16)
    save(base, tmp_path / "base")
    tuned.save_pretrained(tmp_path / "adapter")
    (tmp_path / "adapter/tokenizer_config.json").write_text("{}")
    command = ["import", str(tmp_path / "base"), str(tmp_path / "ours"), "--adapter", str(tmp_path / "adapter")]
    assert main(command) == 0
    assert "adapter: its tokenizer and chat template are not read" in capsys.readouterr().err
    found = load_checkpoint(tmp_path / "ours", dtype=None).model.state_dict()["blocks.1.ffn.up_proj.weight"]
    parts = load_file(tmp_path / "adapter/adapter_model.safetensors")
    A, B = (parts[f"base_model.model.model.layers.1.mlp.up_proj.lora_{x}.weight"].float() for x in "AB")
    weight = base.state_dict()["model.layers.1.mlp.up_proj.weight"]
    assert torch.equal(found, (weight.float() + 5 / 3 * (B @ A)).bfloat16())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type: input should be 'LORA', found 'IA3'"),
        ({"task_type": "SEQ_CLS"}, "task_type: expected CAUSAL_LM, found 'SEQ_CLS'"),
        (
            {"init_lora_weights": "pissa_niter_16"},
            "init_lora_weights 'pissa_niter_16' changes the base",
        ),
        ({"lora_bias": True}, "lora_bias True is not read; merge the adapter with PEFT"),
        ({"layer_replication": [[0, 2]]}, r"layer_replication \[\[0, 2\]\] is not read"),
        ({"trainable_token_indices": [1]}, r"trainable_token_indices \[1\] is not read"),
        ({"something_new": 3}, "something_new 3 is not read"),
        ({"r": 4}, "q_proj: expected rank 4, found 3"),
        ({"use_dora": True}, "tensors of .*q_proj do not belong together"),
        ({"rank_pattern": {"(": 3}}, "pattern '\\(' is not valid"),
    ],
)
def test_what_is_not_read_is_named(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    base, tuned = adapted("llama", {"target_modules": ["q_proj"]})
    tuned.save_pretrained(tmp_path / "adapter")
    path = tmp_path / "adapter/adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    checkpoint = import_model(str(save(base, tmp_path / "base")))
    with pytest.raises(InputError, match=message) as error:
        merge_peft(tmp_path / "adapter", checkpoint)
    assert "\n" not in str(error.value)


def test_an_adapter_of_another_base_is_named(tmp_path: Path) -> None:
    _, tuned = adapted("llama", {"target_modules": ["q_proj"]})
    tuned.save_pretrained(tmp_path / "adapter")
    for family, message in (
        ("gpt2", r"layer layers\.0\.self_attn\.q_proj is none of the base's; name the base"),
        ("llama, head_dim", r"q_proj\.weight has shape \[32, 32\], the base asks for \[48, 32\]; name the base"),
    ):
        assert family in FAMILIES
        checkpoint = import_model(str(save(tiny(family), tmp_path / family)))
        with pytest.raises(InputError, match=message):
            merge_peft(tmp_path / "adapter", checkpoint)


def test_damaged_folders_are_named(tmp_path: Path) -> None:
    base, tuned = adapted("llama", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]})
    tuned.save_pretrained(tmp_path / "adapter")
    source = str(save(base, tmp_path / "base"))
    path = tmp_path / "adapter/adapter_model.safetensors"
    tensors = load_file(path)

    def wrong(message: str) -> None:
        with pytest.raises(InputError, match=message):
            merge_peft(tmp_path / "adapter", import_model(source))

    head = "base_model.model.lm_head.weight"
    save_file(tensors | {head: torch.zeros(300, 32)}, path)
    wrong(r"lm_head\.weight has shape \[300, 32\], .*vocabulary must be resized first")
    save_file(tensors | {"base_model.model.score.weight": torch.zeros(2, 32)}, path)
    wrong("layer score is none of the base's")
    save_file({name: tensor for name, tensor in tensors.items() if "0.self_attn.q_proj.lora_A" not in name}, path)
    wrong("the tensors of .*q_proj do not belong together")
    path.rename(path.with_suffix(".bin"))
    wrong(r"adapter_model\.bin is not read: unpickling executes code")
