"""Release through the gate: planted regressions are blocked, the alias moves for good models only, and back."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from mlflow import MlflowClient
from mlflow.entities import LoggedModelOutput

from llm.checkpoint.adapter import save_trained
from llm.checkpoint.card import new_card
from llm.checkpoint.folder import Checkpoint, CheckpointConfig, load_checkpoint
from llm.cli.main import main as cli
from llm.common.errors import InputError
from llm.inference.classify import classify_texts
from llm.model.classifier import GPTClassifier
from llm.model.gpt import GPT
from llm.tokenizer.bpe import Tokenizer
from stages import release
from stages.tracking import champion, mlflow_client
from tests.conftest import ROOT
from tests.helpers import LLAMA_FORM, gpt_config, randomize, tiny_tokenizer, train_params
from tests.released import copy_workspace, evaluate, write_rows

LABELS = ["ham", "spam"]
TEXTS = [f"the {a} {b} {i} on the {a}." for i in range(40) for a in ("cat", "dog", "mat") for b in ("sat", "spam")]


def write_classifier(seed: int = 0, noise: float = 0.0) -> None:
    """Write models/classifier; `noise` moves its weights."""
    tokenizer = tiny_tokenizer()
    model = GPTClassifier(GPT(gpt_config(**LLAMA_FORM, vocab_size=tokenizer.vocab_size)), 2)
    randomize(model, seed)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        model.head.bias.zero_()
        for p in model.parameters():
            p.add_(noise * torch.randn(p.shape, generator=generator))
    config = CheckpointConfig(kind="classifier", gpt=model.gpt.config, labels=LABELS, max_length=16)
    save_trained(
        Path("models/classifier"), Checkpoint(model, tokenizer, config), train_params(), new_card("classifier")
    )


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, database: Path) -> Iterator[Path]:
    """A workspace with good models, the classifier the champion: its answers are the truth."""
    root = tmp_path_factory.mktemp("w")
    shutil.copy(database, root / "mlflow.db")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        patch.setenv("DVC_ROOT", str(root))
        for name in ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME"):
            patch.delenv(name, raising=False)
        values = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))
        values["release"] |= {"at_least": {"classifier": {"accuracy": 0.8}}, "at_most": {}, "slower_by": 1000.0}
        Path("params.yaml").write_text(yaml.safe_dump(values))
        Path("dvc.yaml").write_text("stages: {}\n")
        write_classifier()
        model = GPT(gpt_config(**LLAMA_FORM, vocab_size=280, context_length=128))
        config = CheckpointConfig(kind="base", gpt=model.config).instructed("chatml", tiny_tokenizer())
        checkpoint = Checkpoint(randomize(model), tiny_tokenizer(), config)
        save_trained(Path("models/instruct"), checkpoint, train_params(), new_card("instruct"))
        said = classify_texts(load_checkpoint(Path("models/classifier")), TEXTS).argmax(dim=1).tolist()
        write_rows(
            Path("data/tokens/messages/test.jsonl"),
            [{"text": text, "label": LABELS[k]} for text, k in zip(TEXTS, said, strict=True)],
        )
        write_rows(Path("data/tokens/messages/train.jsonl"), [{"text": "another", "label": "ham"}])
        for split, text in (("train", "Sort."), ("test", "Say.")):
            rows = [{"instruction": text, "input": str(i), "output": "x", "task": ""} for i in range(3)]
            write_rows(Path(f"data/tokens/instructions/{split}.jsonl"), rows)
        evaluate()
        assert release.main(["classifier", "--why", "the first"]) == 0
        yield root


@pytest.fixture
def w(store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the workspace with the same registry."""
    return copy_workspace(store, tmp_path / "copy", monkeypatch)


def lr_too_high() -> None:
    write_classifier(seed=9)
    evaluate()


def labels_shuffled() -> None:
    write_classifier(noise=0.05)
    evaluate()


def template_changed() -> None:
    path = Path("models/instruct/config.json")
    path.write_text(path.read_text().replace('"chatml"', '"alpaca"'))


def tokenizer_of_another_model() -> None:
    other = Tokenizer.train(["ham and eggs, eggs and bread; a bird sang in the garden all the day. " * 20], 280)
    other.save(Path("models/classifier"))


def template_changed_and_evaluated() -> None:
    template_changed()
    evaluate()


def test_set_leaked() -> None:
    rows = Path("data/tokens/messages/test.jsonl").read_text().splitlines(keepends=True)
    with Path("data/tokens/messages/train.jsonl").open("a") as file:
        file.writelines(rows[:3])
    evaluate()


test_set_leaked.__test__ = False  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("plant", "messages"),
    [
        (lr_too_high, ["classifier: accuracy, low end: 0.", "classifier: accuracy beside the champion: -0."]),
        (labels_shuffled, ["classifier: accuracy beside the champion: -0."]),
        (template_changed, ["instruct: config and template config.json: changed since"]),
        (template_changed_and_evaluated, ["instruct: config and template config.json: changed since"]),
        (
            tokenizer_of_another_model,
            ["classifier: tokenizer bpe.json: changed since", "template, tokenizer or weights"],
        ),
        (test_set_leaked, ["data: leaks: test messages in train: 3 (needs <= 0)"]),
    ],
)
def test_a_planted_regression_is_blocked_by_name(
    w: Path, plant: Any, messages: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    plant()
    capsys.readouterr()
    assert release.main(["classifier", "instruct", "--dry"]) == 1
    out = capsys.readouterr().out
    short = "\n".join(line for line in out.splitlines() if line.startswith("falls short"))
    for message in messages:
        assert message in short, out
    assert out.splitlines()[-1].startswith("blocked: ")


def test_the_alias_moves_with_the_card_and_back(w: Path, capsys: pytest.CaptureFixture[str]) -> None:
    client = MlflowClient(mlflow_client.tracking_uri())
    first = champion.current(client, "llm-classifier")
    assert first is not None and "\n\nGives each message one of its labels.\n" in first.description
    assert first.tags["card.accuracy"].startswith("1 (0.9") and "card.model.safetensors" in first.tags
    with pytest.raises(InputError, match="the first champion, so nothing to go back to"):
        release.main(["classifier", "--rollback"])
    write_classifier(noise=0.05)
    evaluate()
    assert release.main(["classifier", "--why", "worse"]) == 1
    assert champion.current(client, "llm-classifier").version == first.version  # type: ignore[union-attr]
    write_classifier(noise=1e-7)
    evaluate()
    capsys.readouterr()
    assert release.main(["classifier", "--why", "as good"]) == 0
    assert capsys.readouterr().out.endswith("llm-classifier: champion is version 2\n")
    assert release.main(["classifier", "--rollback", "--why", "a complaint"]) == 0
    assert champion.current(client, "llm-classifier").version == first.version  # type: ignore[union-attr]
    experiment = client.get_experiment_by_name("llm-releases")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id], order_by=["attributes.start_time ASC"])
    told = [(run.data.tags["decision"], run.data.tags["why"], run.info.status) for run in runs]
    assert told == [
        ("released", "the first", "FINISHED"),
        ("blocked", "worse", "FINISHED"),
        ("released", "as good", "FINISHED"),
        ("rolled back", "a complaint", "FINISHED"),
    ]
    assert all(run.data.tags["who"] for run in runs)
    for run, released in zip(runs, (True, False, True, False), strict=True):
        files = [file.path for file in client.list_artifacts(run.info.run_id, "answers")]
        assert files == (["answers/llm-classifier.json"] if released else [])
    answers = champion.released_answers(client.get_model_version("llm-classifier", first.version))
    assert len(answers) == len(TEXTS) and all(answers.values())
    assert champion.released_answers(first) == answers, "the rolled back champion has its own record again"
    table = client.download_artifacts(runs[1].info.run_id, "release.md")
    assert "accuracy beside the champion" in Path(table).read_text()


def test_registered_models_and_runs_are_compared(
    w: Path, store: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow_client.tracking_uri())
    client = MlflowClient(mlflow_client.tracking_uri())
    experiment = client.get_experiment_by_name("llm")
    assert experiment is not None
    run = client.create_run(experiment.experiment_id, run_name="good night")
    version = champion.current(client, "llm-classifier")
    assert version is not None
    client.log_outputs(run.info.run_id, [LoggedModelOutput(str(version.source).removeprefix("models:/"), 0)])
    write_classifier(seed=9)
    assert cli(["compare", "models:/llm-classifier@champion", "models/classifier"]) == 3
    assert "accuracy: B is worse than A" in capsys.readouterr().out
    assert cli(["compare", f"runs:/{run.info.run_id}", "good night"]) == 0
    assert "They differ on 0 examples." in capsys.readouterr().out
    for name, message in (
        ("models:/none/1", "models:/none/1: MLflow has no such model or run"),
        ("0" * 32, "MLflow has no such model or run"),
        ("no-such-name", "; no run has this name in MLflow; give a run's id"),
    ):
        assert cli(["compare", name, "models/classifier"]) == 1
        said = capsys.readouterr().err
        assert message in said and said.count("\n") == 1
    assert "no-such-name: no file or folder, nor a revision with reports/predictions at hand" in said


def test_a_failure_half_way_leaves_every_alias(w: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    aliases = {"a": "1", "b": "1"}

    class Broken:
        def set_registered_model_alias(self, name: str, alias: str, version: str) -> None:
            if name == "b":
                raise OSError("the server is gone")
            aliases[name] = version

    class Old:
        version = "1"

    with pytest.raises(OSError, match="gone"):
        champion.move(Broken(), {"a": "2", "b": "2"}, {"a": Old(), "b": Old()})  # type: ignore[arg-type, dict-item]
    assert aliases == {"a": "1", "b": "1"}


def test_without_models_and_store_a_dry_run_reads_the_reports(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    shutil.copy(ROOT / "params.yaml", tmp_path)
    with pytest.raises(InputError, match=r"evaluate.json: missing, and the gate reads it; run `dvc repro`"):
        release.main(["--dry"])
    figures = {
        "base": {"bpb": 0.3},
        "classifier": {"accuracy": 0.98, "accuracy_low": 0.97},
        "instruct": {"exact_match_low": 0.6, "exact_match": 0.8},
    }
    Path("reports/metrics").mkdir(parents=True)
    Path("reports/metrics/evaluate.json").write_text(json.dumps(figures))
    assert release.main(["--dry", "--markdown"]) == 1
    out = capsys.readouterr().out
    assert "| instruct | exact\\_match, low end" in out or "exact_match, low end" in out
    assert release.main(["base", "classifier", "--dry"]) == 0
    assert "not checked  base: model folder: not at hand" in capsys.readouterr().out
    assert not (tmp_path / "mlflow.db").exists()
    with pytest.raises(InputError, match="nothing: no model of the gate"):
        release.main(["nothing"])
