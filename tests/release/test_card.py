"""Lineage cards: what a model folder and its exports state, and that a changed byte of any of it is found."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from llm.checkpoint.adapter import save_trained
from llm.checkpoint.card import Card, foreign_base, new_card, read_card
from llm.checkpoint.folder import Checkpoint, CheckpointConfig
from llm.checkpoint.readme import readme
from llm.cli.main import main
from llm.common.digests import path_md5
from llm.config import parse_params
from llm.convert.gguf_card import read_gguf_card
from llm.data.about import About
from llm.model.classifier import GPTClassifier
from llm.model.gpt import GPT
from llm.release.verify import verify
from stages.tokenize import source_card
from tests.conftest import ROOT
from tests.helpers import LLAMA_FORM, gpt_config, randomize, tiny_tokenizer, train_params

TEXT = b"Ada sat on the mat.\n"
SECRET = b"My diary, chapter one.\n"


def source(name: str, quotable: bool, **files: bytes) -> dict[str, Any]:
    found = [
        {"file": file.replace("__", "/"), "sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data), "records": 1}
        for file, data in files.items()
    ]
    return {"source": name, "licence": "MIT" if quotable else "private", "quotable": quotable, "files": found}


def write_model(folder: Path, kind: str, card: Card) -> None:
    tokenizer = tiny_tokenizer()
    gpt = GPT(gpt_config(**LLAMA_FORM, vocab_size=tokenizer.vocab_size))
    model: GPT | GPTClassifier = GPTClassifier(gpt, 2) if kind == "classifier" else gpt
    labels, length = (["ham", "spam"], 8) if kind == "classifier" else (None, None)
    config = CheckpointConfig(
        kind=kind,  # type: ignore[arg-type]
        gpt=gpt.config,
        labels=labels,
        max_length=length,
        template="chatml" if kind == "instruct" else None,
    )
    randomize(model)
    save_trained(folder, Checkpoint(model, tokenizer, config), train_params(), card)


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace after a run: data, params, base, two models, lock and figures."""
    root = tmp_path_factory.mktemp("workspace")
    shutil.copy(ROOT / "params.yaml", root)
    values = yaml.safe_load((root / "params.yaml").read_text())
    params = parse_params(values)
    corpus = source("tales", True, data__tales_txt=TEXT)
    pairs = source("diary", False, data__own__diary_txt=SECRET)
    (root / "data/own").mkdir(parents=True)
    (root / "data/tales_txt").write_bytes(TEXT)
    (root / "data/own/diary_txt").write_bytes(SECRET)
    tokens = root / "data/tokens"
    for kind, found in (("corpus", corpus), ("messages", corpus), ("instructions", pairs)):
        (tokens / kind).mkdir(parents=True)
        (tokens / kind / "source.json").write_text(json.dumps(source_card(found)))
    (root / "data/raw").mkdir()
    (root / "data/raw/sources.json").write_text(
        json.dumps({"corpus": corpus, "messages": corpus, "instructions": pairs})
    )
    base = root / "models/base"
    model = params.model.model_dump(mode="json")
    stated = {"seed": params.seed, "model": model, **params.pretrain.model_dump(mode="json")}
    write_model(base, "base", new_card("base", tokens=tokens, data=["corpus"], params=stated))
    stated = {"seed": params.seed, **params.finetune_classify.model_dump(mode="json")}
    card = new_card("classifier", tokens=tokens, data=["messages"], params=stated, base_folder=base)
    write_model(root / "models/classifier", "classifier", card)
    stated = {"seed": params.seed, **params.finetune_instruct.model_dump(mode="json")}
    about = About(tasks={"diary": 3}, examples=[])
    card = new_card("instruct", tokens=tokens, data=["instructions"], params=stated, base_folder=base, about=about)
    write_model(root / "models/instruct", "instruct", card)
    metrics = root / "reports/metrics/evaluate.json"
    metrics.parent.mkdir(parents=True)
    metrics.write_text('{"classifier": {"messages": 9, "accuracy": 0.9, "accuracy_low": 0.8, "accuracy_high": 0.95}}')
    lock(root)
    return root


def lock(root: Path) -> None:
    models = [
        {"path": f"models/{n}", "md5": f"{path_md5(root / 'models' / n)}.dir"} for n in ("classifier", "instruct")
    ]
    figures = "reports/metrics/evaluate.json"
    stages = {
        "finetune": {"outs": models},
        "evaluate": {"deps": models, "outs": [{"path": figures, "md5": path_md5(root / figures)}]},
    }
    (root / "dvc.lock").write_text(yaml.safe_dump({"schema": "2.0", "stages": stages}))


@pytest.fixture
def root(original: Path, tmp_path: Path) -> Path:
    shutil.copytree(original, tmp_path / "w")
    return tmp_path / "w"


def changed(root: Path, name: str = "classifier") -> list[str]:
    folder = root / "models" / name
    card = read_card(folder)
    assert card is not None
    return [check.what for check in verify(folder, card) if check.state == "changed"]


def flip(path: Path, place: int = -2) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def test_a_fresh_workspace_is_unchanged(root: Path) -> None:
    for name in ("base", "classifier", "instruct"):
        folder = root / "models" / name
        card = read_card(folder)
        assert card is not None
        assert {check.state for check in verify(folder, card)} == {"unchanged"}, verify(folder, card)


@pytest.mark.parametrize(
    ("path", "what"),
    [
        ("models/classifier/model.safetensors", "file model.safetensors"),
        ("models/classifier/bpe.json", "file bpe.json"),
        ("models/classifier/config.json", "file config.json"),
        ("models/base/model.safetensors", "base base: model.safetensors"),
        ("models/base/bpe.json", "base base: bpe.json"),
        ("data/tales_txt", "data messages: data/tales_txt"),
    ],
)
def test_a_changed_byte_is_found(root: Path, path: str, what: str) -> None:
    flip(root / path)
    assert what in changed(root)


def test_a_changed_private_file_is_found_without_its_name(root: Path) -> None:
    flip(root / "data/own/diary_txt")
    assert changed(root, "instruct") == ["data instructions: diary, private file 1"]


def test_changed_params_lock_and_added_or_lost_files_are_found(root: Path) -> None:
    text = (root / "params.yaml").read_text()
    (root / "params.yaml").write_text(text.replace("seed: 123", "seed: 124"))
    folder = root / "models/classifier"
    assert changed(root) == ["params finetune_classify.seed"]
    (root / "params.yaml").write_text(text)
    (folder / "chat_template.jinja").write_text("x")
    (folder / "bpe.json").unlink()
    assert changed(root) == ["file bpe.json", "file chat_template.jinja"]


def test_what_is_not_at_hand_is_said(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree(root / "models/base")
    (root / "data/tales_txt").unlink()
    (root / "params.yaml").unlink()
    assert main(["card", str(root / "models/classifier"), "--verify"]) == 0
    out = capsys.readouterr().out
    assert "not at hand: base base: model.safetensors" in out and "not at hand: data messages: data/tales_txt" in out
    assert "not at hand: params\n" in out and out.endswith(" 0 changed; 5 not at hand\n".replace("5", out.split()[-4]))


def test_the_command_adds_figures_and_lock(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = root / "models/classifier"
    assert main(["card", str(folder), "--json"]) == 0
    card = Card.model_validate_json(capsys.readouterr().out)
    assert card.origin is not None and card.origin.lock == hashlib.sha256((root / "dvc.lock").read_bytes()).hexdigest()
    assert card.figures is not None and list(card.figures) == ["accuracy"] and card.figures["accuracy"].low == 0.8
    assert card.data["corpus"].source == "tales", "the base's data count too"
    stored = read_card(folder)
    assert stored is not None and stored.origin is None and stored.figures is None, "outputs are a function of inputs"
    assert main(["card", str(folder)]) == 0
    assert "| accuracy | 0.9 | 0.8 to 0.95 |" in capsys.readouterr().out
    (root / "reports/metrics/evaluate.json").write_text('{"classifier": {"accuracy": 1.0}}')
    assert main(["card", str(folder), "--json"]) == 0
    assert "figures" not in json.loads(capsys.readouterr().out), "the figures are of another evaluation"
    flip(folder / "model.safetensors")
    assert main(["card", str(folder), "--json"]) == 0
    assert "origin" not in json.loads(capsys.readouterr().out), "the lock holds other bytes"
    assert main(["card", str(folder), "--verify"]) == 3


def test_an_earlier_folder_has_a_card_of_its_files(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = root / "models/classifier"
    (folder / "card.json").unlink()
    (folder / "README.md").unlink()
    assert main(["card", str(folder), "--json"]) == 0
    assert set(json.loads(capsys.readouterr().out)["files"]) == {"bpe.json", "config.json", "model.safetensors"}
    assert main(["card", str(folder), "--verify"]) == 1
    assert "no card.json, so nothing to check" in capsys.readouterr().err
    assert main(["card", str(root)]) == 1 and "no card in it" in capsys.readouterr().err


def test_exports_carry_the_card_and_no_private_word(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, out = str(root / "models/instruct"), root / "out"
    assert main(["export", model, str(out), "--format", "hf"]) == 0
    card = read_card(out)
    assert card is not None and card.model is not None and card.model.name == "instruct" and card.origin is not None
    text = (out / "card.json").read_text() + (out / "README.md").read_text()
    assert "diary" in text and hashlib.sha256(SECRET).hexdigest() in text and "private" in text
    assert "diary_txt" not in text and "data/own" not in text and not card.about.tasks
    assert main(["card", str(out), "--verify"]) == 0, capsys.readouterr().out
    flip(out / "tokenizer.json")
    assert main(["card", str(out), "--verify"]) == 3
    assert "changed: file tokenizer.json" in capsys.readouterr().out


def test_a_gguf_file_carries_the_card(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("gguf")
    out = root / "m.gguf"
    assert main(["export", str(root / "models/instruct"), str(out), "--format", "gguf"]) == 0
    card = read_gguf_card(out)
    assert card.base is not None and card.base.name == "base" and b"diary_txt" not in out.read_bytes()
    assert main(["card", str(out), "--verify"]) == 0
    assert main(["import", str(out), str(root / "again")]) == 0
    flip(out)
    capsys.readouterr()
    assert main(["card", str(out), "--verify"]) == 3
    assert "changed: file m.gguf" in capsys.readouterr().out
    again = read_card(root / "again")
    assert again is not None and again.base is not None and list(again.base.files) == ["m.gguf"]


def test_the_hub_reads_the_metadata(root: Path, tmp_path: Path) -> None:
    hub = pytest.importorskip("huggingface_hub")
    card = read_card(root / "models/classifier")
    assert card is not None
    (tmp_path / "README.md").write_text(readme(card, "mine"), encoding="utf-8")
    data = hub.ModelCard.load(tmp_path / "README.md", ignore_metadata_errors=False).data
    assert (data.license, data.pipeline_tag, data.base_model) == ("mit", "text-classification", None)
    foreign = card.model_copy(update={"base": foreign_base("org/weights", root / "data/own")})
    (tmp_path / "README.md").write_text(readme(foreign, 'a "b": # c'), encoding="utf-8")
    data = hub.ModelCard.load(tmp_path / "README.md").data
    assert (data.license, data.base_model) == ("other", "org/weights"), "a foreign base has a licence of its own"
