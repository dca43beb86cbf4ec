"""Adapters: their output, merged, saved alone, and through the three trainings."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from llm.checkpoint.adapter import base_digest, load_adapter, save_adapter, save_trained
from llm.checkpoint.folder import Checkpoint, CheckpointConfig, load_checkpoint, save_checkpoint
from llm.common.errors import InputError
from llm.config import LoRAParams, Params, parse_params
from llm.convert.hf import export_hf
from llm.convert.load import import_model
from llm.model.classifier import GPTClassifier
from llm.model.gpt import GPT
from llm.model.lora import LoRALinear, add_lora, merge_lora
from llm.training.freeze import freeze, trained_parameters
from stages.finetune_classify import finetune_classify
from stages.finetune_instruct import finetune_instruct
from stages.pretrain import pretrain
from stages.runtime.run import Run
from tests.conftest import ROOT
from tests.helpers import FORMS, GPT2_FORM, LLAMA_FORM, gpt_config, randomize, tiny_tokenizer, train_params

LINEARS = ["q_proj", "k_proj", "v_proj", "out_proj", "up_proj", "gate_proj", "down_proj"]


def lora_params(**changes: Any) -> LoRAParams:
    return LoRAParams(**({"rank": 3, "alpha": 5.0, "dropout": 0.0, "targets": LINEARS} | changes))


def new_model(kind: str = "base", seed: int = 0, **changes: Any) -> GPT | GPTClassifier:
    gpt = GPT(gpt_config(**{"vocab_size": tiny_tokenizer().vocab_size} | changes))
    model = GPTClassifier(gpt, 3) if kind == "classifier" else gpt
    randomize(model, seed)
    return model


def folder_of(model: GPT | GPTClassifier, kind: str = "base") -> Checkpoint:
    more: dict[str, Any] = {}
    if kind == "classifier":
        more = {"labels": ["ham", "spam", "neither"], "max_length": 12}
    elif kind == "instruct":
        more = {"template": "chatml", "system": "Be kind."}
    return Checkpoint(model, tiny_tokenizer(), CheckpointConfig(kind=kind, gpt=model.gpt.config, **more))


def train_adapters(model: nn.Module, seed: int = 1) -> None:
    """Change every A, B and head, like a training."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith(("A", "B")) or (name.startswith("head.") and p.requires_grad):
                p.add_(torch.randn(p.shape, generator=generator), alpha=0.2)


def logits(model: nn.Module) -> Tensor:
    idx = torch.tensor([[5, 7, 250, 9, 1, 0], [3, 3, 8, 60, 2, 11]])
    with torch.no_grad():
        return model(idx, torch.tensor([6, 4])) if isinstance(model, GPTClassifier) else model(idx)


def adapters(model: nn.Module) -> dict[str, LoRALinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}


# ---- what an adapter computes ----------------------------------------------------------------------------------------


def test_the_layer_is_its_definition() -> None:
    torch.manual_seed(0)
    layer = LoRALinear(nn.Linear(6, 4), lora_params(rank=2, alpha=3.0))
    train_adapters(layer)
    x = torch.randn(5, 6)
    W, b, A, B = (t.detach().double() for t in (layer.base.weight, layer.base.bias, layer.A, layer.B))
    assert (A.shape, B.shape) == ((2, 6), (4, 2))
    expected = torch.stack([W @ row + b + 3.0 / 2 * (B @ (A @ row)) for row in x.double()])
    torch.testing.assert_close(layer(x).double(), expected, atol=1e-6, rtol=0)
    merged = layer.merged()
    assert type(merged) is nn.Linear
    torch.testing.assert_close(merged.weight.double(), W + 3.0 / 2 * B @ A, atol=1e-6, rtol=0)
    assert torch.equal(merged.bias.double(), b)


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS.keys())
@pytest.mark.parametrize("kind", ["base", "classifier"])
def test_new_adapters_change_no_logits_and_merged_ones_keep_them(kind: str, form: dict[str, Any]) -> None:
    model = new_model(kind, **form)
    before, parameters = logits(model), [name for name, _ in model.named_parameters()]
    add_lora(model, lora_params())
    assert torch.equal(logits(model), before)

    train_adapters(model)
    unmerged = logits(model)
    assert (unmerged - before).abs().max() > 0.01
    merge_lora(model)
    torch.testing.assert_close(logits(model), unmerged, atol=2e-5, rtol=1e-4)
    assert not adapters(model)
    assert [name for name, _ in model.named_parameters()] == parameters


def test_a_is_initialized_like_a_linear_layer_from_the_seed() -> None:
    def factor(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return LoRALinear(nn.Linear(64, 8), lora_params(rank=50)).A.detach()

    A = factor(0)
    assert A.abs().max() <= 1 / 8  # Kaiming's bound with a = sqrt(5): 1 / sqrt(in_features)
    assert A.std().item() == pytest.approx(1 / 8 / 3**0.5, rel=0.05)  # uniform
    assert torch.equal(factor(0), A) and not torch.equal(factor(1), A)


def test_dropout_is_on_the_adapters_input_alone() -> None:
    torch.manual_seed(0)
    layer = LoRALinear(nn.Linear(6, 4), lora_params(dropout=0.5)).train()
    x = torch.randn(300, 6)
    assert torch.equal(layer(x), layer.base(x))  # B is zero: what the base adds is whole
    train_adapters(layer)
    assert not torch.equal(layer(x), layer(x))
    inputs: list[Tensor] = []
    layer.dropout.register_forward_hook(lambda module, args, output: inputs.append(output))
    out = layer(x)
    assert 0.4 < (inputs[0] == 0).float().mean() < 0.6
    expected = layer.base(x) + 5 / 3 * inputs[0] @ layer.A.T @ layer.B.T
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=0)
    layer.eval()
    assert torch.equal(layer(x), layer(x))


def test_over_a_bf16_base_adapters_are_fp32_and_merging_rounds_once() -> None:
    model = new_model(**LLAMA_FORM).to(torch.bfloat16)
    add_lora(model, lora_params(targets=["q_proj"]))
    train_adapters(model)
    layer = adapters(model)["blocks.1.attn.q_proj"]
    assert (layer.base.weight.dtype, layer.A.dtype, layer.B.dtype) == (torch.bfloat16, torch.float32, torch.float32)
    unmerged = logits(model)
    assert unmerged.dtype == torch.bfloat16
    exact = layer.base.weight.float() + 5 / 3 * layer.B @ layer.A
    merge_lora(model)
    weight = model.get_parameter("blocks.1.attn.q_proj.weight")
    assert torch.equal(weight, exact.bfloat16())
    torch.testing.assert_close(logits(model), unmerged, atol=0.15, rtol=0.1)


def test_only_the_named_layers_get_an_adapter() -> None:
    model = new_model(**LLAMA_FORM)
    add_lora(model, lora_params(targets=["v_proj", "gate_proj", "v_proj"]))
    assert set(adapters(model)) == {f"blocks.{i}.{name}" for i in (0, 1) for name in ("attn.v_proj", "ffn.gate_proj")}


def test_targets_missing_from_the_model_are_ignored_or_refused() -> None:
    model = new_model()  # GPT-2's form: no gate
    add_lora(model, lora_params(targets=["gate_proj", "up_proj"]))
    assert set(adapters(model)) == {"blocks.0.ffn.up_proj", "blocks.1.ffn.up_proj"}
    with pytest.raises(InputError, match=r"lora\.targets: this model has no gate_proj"):
        add_lora(new_model(), lora_params(targets=["gate_proj"]))
    with pytest.raises(InputError, match=r"lora\.targets: head is that of a classifier"):
        add_lora(new_model(), lora_params(targets=["q_proj", "head"]))


def test_the_books_count_of_trained_parameters() -> None:
    """Appendix E of the book: rank 16 on every linear layer of GPT-2 124M, the classifier's two outputs included."""
    form = {"vocab_size": 50257, "context_length": 1024, "emb_dim": 768, "n_layers": 12}
    form |= {"n_heads": 12, "n_kv_heads": 12, "head_dim": 64, "ffn_dim": 3072}
    with torch.device("meta"):
        model = GPTClassifier(GPT(gpt_config(**form)), 2)
    targets = ["q_proj", "k_proj", "v_proj", "out_proj", "up_proj", "down_proj", "head"]
    lora = {"rank": 16, "alpha": 16.0, "dropout": 0.0, "targets": targets}
    freeze(model, train_params(trainable="lora", lora=lora))
    assert trained_parameters(model) == 2_666_528


@pytest.mark.parametrize("target", ["blocks", "head"])
def test_only_adapters_and_the_head_get_gradients(target: str) -> None:
    model = new_model("classifier", tie_embeddings=False)
    lora = lora_params(targets=["k_proj", "down_proj"] + ["head"] * (target == "head"))
    freeze(model, train_params(trainable="lora", lora=lora.model_dump()))
    train_adapters(model)
    logits = model(torch.tensor([[5, 7, 250], [3, 3, 8]]), torch.tensor([3, 3]))
    logits.logsumexp(-1).sum().backward()
    layers = [f"gpt.blocks.{i}.{name}" for i in (0, 1) for name in ("attn.k_proj", "ffn.down_proj")]
    expected = {f"{name}.{factor}" for name in layers for factor in "AB"}
    expected |= {"head.A", "head.B"} if target == "head" else {"head.weight", "head.bias"}
    assert {name for name, p in model.named_parameters() if p.grad is not None} == expected
    assert {name for name, p in model.named_parameters() if p.requires_grad} == expected
    assert all(p.grad.abs().max() > 0 for p in model.parameters() if p.grad is not None)


# ---- adapters alone --------------------------------------------------------------------------------------------------


def adapted(base: Checkpoint, kind: str, lora: LoRAParams) -> Checkpoint:
    """Return a copy of the base with trained adapters."""
    gpt = copy.deepcopy(base.model)
    assert isinstance(gpt, GPT)
    model = GPTClassifier(gpt, 3) if kind == "classifier" else gpt
    freeze(model, train_params(trainable="lora", lora=lora.model_dump()))
    train_adapters(model)
    return folder_of(model.eval(), kind)


@pytest.mark.parametrize("form", [GPT2_FORM, LLAMA_FORM | {"tie_embeddings": False}], ids=["gpt2", "llama"])
@pytest.mark.parametrize("kind", ["base", "instruct", "classifier", "classifier with adapted head"])
def test_an_adapter_saved_alone_gives_the_same_model_on_its_base(
    tmp_path: Path, kind: str, form: dict[str, Any]
) -> None:
    save_checkpoint(tmp_path / "base", folder_of(new_model(**{**form, "vocab_size": tiny_tokenizer().vocab_size})))
    lora = lora_params(targets=["q_proj", "up_proj"] + ["head"] * kind.endswith("head"))
    content = adapted(load_checkpoint(tmp_path / "base"), kind.split()[0], lora)
    save_adapter(tmp_path / "adapter", content, lora)
    assert sorted(path.name for path in (tmp_path / "adapter").iterdir()) == ["adapter.json", "adapter.safetensors"]
    names = set(load_file(tmp_path / "adapter/adapter.safetensors"))
    assert not [name for name in names if "blocks" in name and not name.endswith((".A", ".B"))]  # nothing of the base

    loaded = load_adapter(tmp_path / "adapter", load_checkpoint(tmp_path / "base"))
    assert loaded.config == content.config
    assert type(loaded.model) is type(content.model) and not loaded.model.training
    assert adapters(loaded.model).keys() == adapters(content.model).keys()
    assert torch.equal(logits(loaded.model), logits(content.model))


def test_the_folder_of_a_training_is_merged_and_has_the_adapter_beside(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "base", folder_of(new_model()))
    for kind, targets in (("instruct", LINEARS), ("classifier", [*LINEARS, "head"])):
        lora = lora_params(targets=targets)
        content = adapted(load_checkpoint(tmp_path / "base"), kind, lora)
        expected = logits(content.model)
        params = train_params(trainable="lora", lora=lora.model_dump())
        save_trained(tmp_path / kind, content, params)
        merged = load_checkpoint(tmp_path / kind)
        assert merged.config == content.config
        torch.testing.assert_close(logits(merged.model), expected, atol=2e-5, rtol=1e-4)
        again = load_adapter(tmp_path / kind / "adapter", load_checkpoint(tmp_path / "base"))
        assert torch.equal(logits(again.model), expected)

        save_trained(tmp_path / kind, merged, train_params(trainable="all"))
        assert not (tmp_path / kind / "adapter").exists()  # that of an earlier training is gone


def test_a_base_stored_in_bf16_is_the_same_base_in_fp32(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "base", folder_of(new_model(**LLAMA_FORM).to(torch.bfloat16)))
    stored, wide = (load_checkpoint(tmp_path / "base", dtype=dtype) for dtype in (None, torch.float32))
    assert stored.model.tok_emb.weight.dtype == torch.bfloat16 and wide.model.tok_emb.weight.dtype == torch.float32
    save_adapter(tmp_path / "adapter", adapted(stored, "base", lora_params()), lora_params())
    load_adapter(tmp_path / "adapter", wide)


OTHER_BASES: dict[str, Callable[[], Checkpoint]] = {
    "other weights": lambda: folder_of(new_model(seed=1)),
    "more layers": lambda: folder_of(new_model(n_layers=3)),
    "the same weights in another form": lambda: folder_of(new_model(norm_eps=1e-6)),
    "a classifier": lambda: folder_of(new_model("classifier"), "classifier"),
    "rounded": lambda: folder_of(new_model().to(torch.bfloat16)),
}


@pytest.mark.parametrize("other", OTHER_BASES.values(), ids=OTHER_BASES.keys())
def test_another_base_is_refused(tmp_path: Path, other: Callable[[], Checkpoint]) -> None:
    save_adapter(tmp_path / "it", adapted(folder_of(new_model()), "base", lora_params()), lora_params())
    load_adapter(tmp_path / "it", folder_of(new_model()))
    with pytest.raises(InputError, match="it: the adapter was trained on another base model; name the one") as error:
        load_adapter(tmp_path / "it", other())
    assert "\n" not in str(error.value)


def test_the_digest_of_a_base_covers_every_weight_and_no_adapter() -> None:
    model = new_model()
    assert isinstance(model, GPT)
    digests = {base_digest(model)}
    add_lora(model, lora_params())
    train_adapters(model)
    assert digests == {base_digest(model)}
    names = [name for name, _ in new_model().named_parameters()]
    for name in names:
        other = new_model()
        assert isinstance(other, GPT)
        with torch.no_grad():
            other.get_parameter(name).flatten()[-1] += 1e-3
        digests.add(base_digest(other))
    assert len(digests) == 1 + len(names)


def edit(name: str, change: Callable[[Any], Any]) -> Callable[[Path], None]:
    def harm(folder: Path) -> None:
        path = folder / name
        if path.suffix == ".json":
            values = json.loads(path.read_text())
            change(values)
            path.write_text(json.dumps(values))
        else:
            tensors = load_file(path)
            change(tensors)
            save_file(tensors, path)

    return harm


A = "blocks.0.attn.q_proj.A"
BROKEN: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no config": (lambda f: (f / "adapter.json").unlink(), "not an adapter: adapter.json is missing"),
    "config cut": (lambda f: (f / "adapter.json").write_text('{"lo'), r"adapter\.json: not valid JSON"),
    "unknown key": (edit("adapter.json", lambda v: v.update(more=1)), r"adapter\.json: more: unknown key"),
    "no base": (edit("adapter.json", lambda v: v.pop("base")), r"adapter\.json: base: missing key"),
    "another rank": (edit("adapter.json", lambda v: v["lora"].update(rank=2)), r"tensor \S+ and adapter\.json do not"),
    "fewer targets": (
        edit("adapter.json", lambda v: v["lora"].update(targets=["up_proj"])),
        r"tensor \S+ and adapter\.json do not",
    ),
    "no tensors": (lambda f: (f / "adapter.safetensors").unlink(), r"adapter\.safetensors: cannot be read"),
    "tensors cut": (
        lambda f: (f / "adapter.safetensors").write_bytes((f / "adapter.safetensors").read_bytes()[:900]),
        r"adapter\.safetensors: cannot be read as safetensors",
    ),
    "tensor missing": (edit("adapter.safetensors", lambda t: t.pop(A)), rf"tensor {A} and adapter\.json do not belong"),
    "tensor extra": (
        edit("adapter.safetensors", lambda t: t.update(a=t[A].clone())),
        "tensor a and adapter.json do no",
    ),
}


@pytest.mark.parametrize(("harm", "message"), BROKEN.values(), ids=BROKEN.keys())
def test_a_broken_adapter_is_one_clear_line(tmp_path: Path, harm: Callable[[Path], Any], message: str) -> None:
    save_adapter(tmp_path, adapted(folder_of(new_model()), "base", lora_params()), lora_params())
    harm(tmp_path)
    with pytest.raises(InputError, match=message) as error:
        load_adapter(tmp_path, folder_of(new_model()))
    assert "\n" not in str(error.value)
    assert str(tmp_path) in str(error.value)


# ---- the three trainings ---------------------------------------------------------------------------------------------


def shipped_params(**lora: Any) -> Params:
    """The shipped params, few steps, with adapters in every training."""
    values = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))
    values["model"] |= {name: GPT2_FORM[name] for name in values["model"]} | {"context_length": 64}
    for section in ("pretrain", "finetune_classify", "finetune_instruct"):
        values[section] |= {"max_steps": 4, "batch_size": 4, "eval_interval": 2, "trainable": "lora", "keep": "last"}
    values["training"]["lora"] |= {"rank": 2, "dropout": 0.1}
    for section in ("finetune_classify", "finetune_instruct"):
        values[section] |= {"scratch_control": True}
    values["pretrain"] |= {"sample_tokens": 3, "eval_tokens": 100}
    values["runtime"] |= {"device": "cpu", "compile": False, "checkpoint_interval": 1}
    return parse_params(values)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with tiny tokens of all three kinds and a base model."""
    tokens = tmp_path / "data/tokens"
    for name in ("corpus", "tokenizer", "messages", "instructions"):
        (tokens / name).mkdir(parents=True)
    tokenizer = tiny_tokenizer()
    tokenizer.save(tokens / "tokenizer")
    text = "the cat sat on the mat. ham and spam. " * 40
    ids = np.array(tokenizer.encode(text), dtype=np.uint16)
    ids.tofile(tokens / "corpus/all.bin")
    split = {"tokens": len(ids), "bytes": len(text), "shards": ["all.bin"]}
    meta = {"dtype": "uint16", "splits": {"train": split, "val": split}}
    (tokens / "corpus/meta.json").write_text(json.dumps(meta))
    (tokens / "messages/labels.json").write_text('["ham", "spam"]')
    messages = [{"text": f"the {name} sat", "label": name} for name in ("ham", "spam")] * 4
    pairs = [{"instruction": "the cat", "input": "", "output": f"{name} and", "task": "t"} for name in ("ham", "spam")]
    for name, rows in (("messages", messages), ("instructions", pairs)):
        for part in ("train", "val"):
            (tokens / name / f"{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    save_checkpoint(tmp_path / "models/base", folder_of(new_model(context_length=64)))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("stage", [pretrain, finetune_classify, finetune_instruct], ids=lambda stage: stage.__name__)
def test_each_stage_trains_adapters_and_writes_them_merged_and_alone(
    place: Path, stage: Callable[[Run], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "stages.runtime.finetune.has_room_beside", lambda device: False
    )  # the params here are in no file
    name = {"pretrain": "base", "finetune_classify": "classifier", "finetune_instruct": "instruct"}[stage.__name__]
    params = shipped_params()
    before = load_checkpoint(place / "models/base")
    stage(Run(stage.__name__, params, place / "state", MagicMock()))

    metrics = json.loads((place / f"reports/metrics/{stage.__name__}.json").read_text())
    attn, ffn, r = 4 * (16 + 16), 2 * (16 + 24), 2
    head = 2 * 16 + 2 if name == "classifier" else 0
    assert metrics["trained_parameters"] == 2 * r * (attn + ffn) + head
    states = place / "state" / (name if name != "base" else "")
    state = load_file(states / "step-00000004/state.safetensors")
    stored = {key for key in state if key.startswith("model.")}
    assert stored and all(key.endswith((".A", ".B")) or key.startswith("model.head.") for key in stored)

    made = load_checkpoint(place / "models" / name)
    if name == "base":  # it started from random weights: its own base is nowhere but in it
        assert "blocks.0.attn.q_proj.A" in load_file(place / "models/base/adapter/adapter.safetensors")
        return
    again = load_adapter(place / "models" / name / "adapter", load_checkpoint(place / "models/base"))
    torch.testing.assert_close(logits(again.model), logits(made.model), atol=1e-5, rtol=1e-4)
    ours, theirs = made.model.gpt.state_dict(), before.model.state_dict()
    changed = {key for key in ours if not torch.equal(ours[key], theirs[key])}
    assert changed == {key for key in ours if key.split(".")[-2] in LINEARS and key.endswith("weight")}
    assert not (place / f"models/{name}_scratch/adapter").exists()
    control = load_checkpoint(place / f"models/{name}_scratch").config
    assert control == made.config.model_copy(
        update={"temperature": control.temperature}
    )  # each is calibrated by itself


@pytest.mark.parametrize(("template", "system"), [("chatml", "Be kind."), ("alpaca", None)])
def test_the_system_prompt_of_a_base_is_kept_with_its_template(place: Path, template: str, system: str | None) -> None:
    save_checkpoint(place / "models/base", folder_of(new_model(context_length=256), "instruct"))
    params = shipped_params()
    section = params.finetune_instruct.model_copy(update={"template": template, "scratch_control": False})
    params = params.model_copy(update={"finetune_instruct": section})
    finetune_instruct(Run("finetune-instruct", params, place / "state", MagicMock()))
    assert load_checkpoint(place / "models/instruct").config.system == system


def test_pretraining_open_weights_by_adapters(place: Path) -> None:
    """The adapter that lies beside the merged weights goes onto the imported model."""
    source = folder_of(new_model(context_length=64, **LLAMA_FORM), "instruct")
    export_hf(source, place / "hf")
    params = shipped_params()
    section = params.pretrain.model_copy(update={"init": str(place / "hf")})
    pretrain(Run("pretrain", params.model_copy(update={"pretrain": section}), place / "state", MagicMock()))
    made = load_checkpoint(place / "models/base")
    assert (made.config.template, made.config.system) == ("chatml", "Be kind.")
    again = load_adapter(place / "models/base/adapter", import_model(str(place / "hf")))
    assert torch.equal(
        again.model.get_submodule("blocks.0.attn.q_proj").base.weight,
        source.model.get_parameter("blocks.0.attn.q_proj.weight"),
    )
    torch.testing.assert_close(logits(again.model), logits(made.model), atol=1e-5, rtol=1e-4)
    assert not torch.equal(logits(made.model), logits(source.model))
