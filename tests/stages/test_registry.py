"""Registry of models: whose bytes the candidate has, and what a version says of itself."""

from __future__ import annotations

import ast
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from llm.checkpoint.folder import Checkpoint, CheckpointConfig, save_checkpoint
from llm.common.digests import path_md5
from llm.model.gpt import GPT
from stages import sync
from stages.tracking import registry
from stages.tracking.delivery import Delivery
from stages.tracking.journal import Journal
from stages.tracking.mlflow_client import tracking_uri
from tests.conftest import ROOT
from tests.helpers import gpt_config, tiny_tokenizer

STAGES = {
    "tokenize": {"cmd": "x", "params": ["seed"], "deps": ["data/raw"], "outs": ["data/tokens"]},
    "pretrain": {"cmd": "x", "params": ["seed", "pretrain"], "deps": ["data/tokens"], "outs": ["models/base"]},
    "evaluate": {"cmd": "x", "params": ["evaluate"], "deps": ["models/base"], "outs": ["reports/report.md"]},
}
PARAMS = {"seed": 1, "training": {"beta1": 0.9}, "pretrain": {"lr": 0.1}, "evaluate": {"batch_size": 4}}


def save_base(folder: Path, seed: int) -> None:
    tokenizer = tiny_tokenizer()
    config = gpt_config(vocab_size=tokenizer.vocab_size)
    torch.manual_seed(seed)
    save_checkpoint(folder, Checkpoint(GPT(config), tokenizer, CheckpointConfig(kind="base", gpt=config)))


@pytest.fixture
def evaluated(tracked: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Journal]:
    """Return a function that runs a pipeline's training and evaluation, which register a model of this seed."""
    (tracked / "dvc.yaml").write_text(yaml.safe_dump({"stages": STAGES}))
    (tracked / "params.yaml").write_text(yaml.safe_dump(PARAMS))

    def run(number: int, seed: int, where: Path = tracked, train: bool = True) -> Journal:
        """Run in the workspace, or in DVC's copy of it for an experiment that is not applied."""
        monkeypatch.setenv("DVC_ROOT", str(tracked))
        monkeypatch.setattr("stages.tracking.journal.pipeline_name", lambda process: f"pipeline-{number}")
        where.mkdir(exist_ok=True)
        for name in ("dvc.yaml", "params.yaml"):
            if where != tracked:
                shutil.copy(tracked / name, where)
        monkeypatch.chdir(where)
        save_base(where / "models/base", seed)
        md5 = path_md5(where / "models/base")
        lock: dict[str, Any] = {
            "tokenize": {"deps": [{"path": "data/raw", "md5": "a.dir"}], "outs": [{"path": "data/tokens", "md5": "b"}]},
            "pretrain": {
                "deps": [{"path": "data/tokens", "md5": "b"}],
                "params": {"params.yaml": {key: PARAMS[key] for key in ("seed", "training", "pretrain")}},
                "outs": [{"path": "models/base", "md5": f"{md5}.dir"}],
            },
        }
        (where / "dvc.lock").write_text(yaml.safe_dump({"stages": lock}))
        if train:
            training = Journal.start("pretrain", {"pretrain.lr": 0.1}, "sample")
            training.metrics({"val/loss": 2.0, "grad_norm": 1.0}, 10)
            training.outputs({"models/base": md5 or ""})
            training.end("FINISHED")
        journal = Journal.start("evaluate", {"evaluate.batch_size": 4}, "sample")
        journal.summary({"base/bpb": 0.3, "base_xz/bpb": 1.0, "classifier/accuracy": 0.9})
        journal.register_model("llm-base", where / "models/base")
        journal.end("FINISHED")
        monkeypatch.chdir(tracked)
        Delivery().deliver(journal.folder.parent)
        return journal

    return run


def candidate() -> str:
    client = MlflowClient(tracking_uri())
    return str(client.get_model_version_by_alias("llm-base", "candidate").version)


def n_versions() -> int:
    return len(MlflowClient(tracking_uri()).search_model_versions("name = 'llm-base'"))


def test_candidate_is_the_model_of_the_workspace(
    evaluated: Callable[..., Journal], tracked: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Not the one delivered last: an experiment that was not applied never moves it, `--align` does."""
    evaluated(1, seed=1)
    client = MlflowClient(tracking_uri())
    client.set_registered_model_alias("llm-base", "champion", "1")
    assert (candidate(), n_versions()) == ("1", 1)
    evaluated(2, seed=2, where=tracked / ".dvc-tmp")
    assert (candidate(), n_versions()) == ("1", 2), "an experiment of the queue"
    evaluated(3, seed=3)
    assert (candidate(), n_versions()) == ("3", 3)
    evaluated(4, seed=1)
    assert (candidate(), n_versions()) == ("1", 3), "the same bytes again"

    for seed, expected, said in ((2, "2", ""), (7, "4", ", new"), (1, "1", "")):  # dvc exp apply, dvc checkout
        save_base(tracked / "models/base", seed)
        assert sync.main(["--align"]) == 0
        assert capsys.readouterr().out == f"llm-base: candidate is version {expected}{said}\n"
        assert candidate() == expected
    assert n_versions() == 4
    assert str(client.get_model_version_by_alias("llm-base", "champion").version) == "1", "left to the release gate"


def test_alignment_of_an_empty_workspace_is_an_error(tracked: Path) -> None:
    from llm.common.errors import InputError

    with pytest.raises(InputError, match=r"models: no model \(expected a model folder\); run `dvc checkout`"):
        sync.main(["--align"])


def test_version_has_its_own_lineage_alone(evaluated: Callable[..., Journal]) -> None:
    evaluated(1, seed=1)
    client = MlflowClient(tracking_uri())
    [version] = client.search_model_versions("name = 'llm-base'")
    runs = {run.info.run_name: run for run in client.search_runs(["1"])}
    trained = runs["pretrain"]
    model = client.get_logged_model(registry.model_id(version))
    assert version.run_id == model.source_run_id == trained.info.run_id
    assert model.params == {"seed": "1", "pretrain.beta1": "0.9", "pretrain.lr": "0.1"}
    assert {metric.key: metric.value for metric in model.metrics} == {"held_out/bpb": 0.3}
    assert version.tags["md5.data/raw"] == "a" and version.tags["md5.data/tokens"] == "b"
    assert version.tags["run.evaluate"] == runs["evaluate"].info.run_id
    assert version.tags["run.pretrain"] == trained.info.run_id
    assert "Held out: bpb 0.3." in version.description
    parent = runs["run sample"]
    assert [each.model_id for each in parent.outputs.model_outputs] == [registry.model_id(version)], (
        "in the list's column"
    )

    evaluated(2, seed=1, train=False)
    assert n_versions() == 1
    assert len(client.search_runs(["1"], "tags.`llm-base` = 'version 1'")) == 4, "shown where it is evaluated again"


def test_model_of_an_earlier_pipeline_keeps_its_training(evaluated: Callable[..., Journal], tracked: Path) -> None:
    """Also where DVC skipped the training and its version is gone."""
    evaluated(1, seed=1)
    client = MlflowClient(tracking_uri())
    [trained] = client.search_runs(["1"], "attributes.run_name = 'pretrain'")
    client.delete_model_version("llm-base", "1")
    evaluated(2, seed=1, train=False)
    [version] = client.search_model_versions("name = 'llm-base'")
    assert version.run_id == version.tags["run.pretrain"] == trained.info.run_id
    assert client.get_logged_model(registry.model_id(version)).params["pretrain.lr"] == "0.1"


def test_requirements_are_all_imports_and_can_be_installed() -> None:
    found = dict(line.split("==") for line in registry.requirements(ROOT / "llm"))
    assert {"torch", "tiktoken", "rustbpe", "regex", "safetensors", "pydantic", "numpy", "pandas", "mlflow"} <= set(
        found
    )
    assert not {"dvc", "matplotlib", "transformers", "scikit-learn"} & set(found)
    assert not [version for version in found.values() if "+" in version], "an index has no local versions"


def test_package_copy_imports_itself_alone(tmp_path: Path) -> None:
    copy = registry.private_copy(ROOT / "llm", tmp_path)
    names = set()
    for path in copy.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                names.add((node.module or "").split(".")[0])
    assert copy.name in names and "llm" not in names and "stages" not in names


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("from llm.api import load", "from x.api import load"),
        ("    from llm import api", "    from x import api"),
        ("import llm", "import x as llm"),
        ("import llm.api as a", "import x.api as a"),
        ("from llmx import a; import llms", "from llmx import a; import llms"),
    ],
)
def test_imports_are_renamed(source: str, expected: str) -> None:
    assert registry.renamed(source, "x") == expected


# ---- served models ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def instruct(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return an instruct model as MLflow loads it."""
    import mlflow

    place = tmp_path_factory.mktemp("served")
    tokenizer = tiny_tokenizer()
    config = gpt_config(vocab_size=tokenizer.vocab_size, context_length=128)
    torch.manual_seed(0)
    folder_config = CheckpointConfig(kind="instruct", gpt=config, template="chatml")
    save_checkpoint(place / "model", Checkpoint(GPT(config), tokenizer, folder_config))
    mlflow.pyfunc.save_model(
        str(place / "mlflow"),
        python_model=str(ROOT / "llm/serving/mlflow_model.py"),
        artifacts={"model": str(place / "model")},
        pip_requirements=[],
        signature=registry.signature("instruct"),
        input_example=registry.input_example("instruct"),
    )
    return mlflow.pyfunc.load_model(str(place / "mlflow"))


def invoke(model: Any, body: dict[str, Any]) -> Any:
    from mlflow.pyfunc.scoring_server import invocations

    response = invocations(json.dumps(body), "application/json", model, model.metadata.get_input_schema())
    assert response.status == 200
    return json.loads(response.response)


FORMS: list[dict[str, Any]] = [
    {"inputs": ["the cat", "a mat"]},
    {"inputs": [{"text": "the cat"}, {"text": "a mat"}]},
    {"instances": ["the cat", "a mat"]},
    {"instances": [{"text": "the cat"}, {"text": "a mat"}]},
    {"dataframe_split": {"columns": ["text"], "data": [["the cat"], ["a mat"]]}},
    {"dataframe_split": {"columns": ["any"], "data": [["the cat"], ["a mat"]]}},
    {"dataframe_records": [{"text": "the cat"}, {"text": "a mat"}]},
]


def test_served_model_answers_every_form_alike(instruct: Any) -> None:
    params = {"max_new_tokens": 3, "temperature": 1.0, "seed": 4}
    expected = invoke(instruct, FORMS[0] | {"params": params})
    assert len(expected["predictions"]) == 2
    for form in FORMS:
        assert invoke(instruct, form | {"params": params}) == expected
    message = {"role": "user", "content": "the cat"}
    chat = invoke(instruct, {"messages": [message], "max_tokens": 3, "temperature": 1.0, "seed": 4})
    assert chat["choices"][0]["message"] == {"role": "assistant", "content": expected["predictions"][0]["text"]}
    rows = invoke(instruct, {"dataframe_records": [{"messages": [message]}] * 2, "params": params})["predictions"]
    assert [row["object"] for row in rows] == ["chat.completion"] * 2


def test_long_tables_are_answered_in_pieces(instruct: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import pandas as pd

    model = instruct.unwrap_python_model()
    module = __import__(type(model).__module__, fromlist=["PIECE"])
    monkeypatch.setattr(module, "PIECE", 2)
    sizes: list[int] = []
    generate = model.model.generate_batch
    monkeypatch.setattr(model.model, "generate_batch", lambda p, **k: sizes.append(len(p)) or generate(p, **k))
    answers = instruct.predict(pd.DataFrame({"text": ["the cat"] * 5}), params={"max_new_tokens": 1})
    assert (len(answers), sizes) == (5, [2, 2, 1])


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"inputs": ["a"], "params": {"temperature": -1}}, "temperature must be 0"),
        ({"inputs": ["a"], "params": {"top_p": 7}}, "top_p must be above 0"),
        ({"inputs": ["a"], "params": {"max_new_tokens": -1}}, "max_new_tokens must be 0"),
        ({"inputs": ["a"], "params": {"seed": -1}}, "seed must be between"),
        ({"inputs": ["a"], "params": {"temperature": "hot"}}, "temperature"),
        ({"messages": [{"role": "cat", "content": "a"}]}, "messages: "),
    ],
)
def test_bad_request_is_told_in_its_own_line(instruct: Any, body: dict[str, Any], message: str) -> None:
    with pytest.raises(MlflowException, match=message) as caught:
        invoke(instruct, body)
    assert "Traceback" not in str(caught.value)
