"""MLflow's registry of models: versions by the bytes of the model folder, and the alias of the workspace's models.

A version is found again by its tag `model.md5`, so the same bytes are registered once. The alias `candidate` is the
version that the workspace's `models/` holds, whatever was delivered last.
"""

from __future__ import annotations

import ast
import contextlib
import hashlib
import importlib.metadata
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llm.common.digests import path_md5
from llm.common.files import read_json_object
from stages.tracking.process import repository

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Metric, Run
    from mlflow.entities.model_registry import ModelVersion

PREFIX = "llm-"  # of a registered model's name, before that of its folder in models/
REGISTERED = ("base", "classifier", "instruct")
CANDIDATE = "candidate"
MD5 = "model.md5"  # tag of a version
PACKAGE = "llm"
ENTRY = "serving/mlflow_model.py"  # in the package: the file that MLflow runs
KINDS = {
    "base": "Continues a text.",
    "classifier": "Labels a message.",
    "instruct": "Answers an instruction, or messages in the form of OpenAI's chat completions.",
}


@dataclass(frozen=True, kw_only=True)
class Origin:
    """The lineage of a model: the run of its training, its params and metrics, and tags."""

    run_id: str | None
    params: dict[str, str] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)


def find_version(client: MlflowClient, name: str, md5: str) -> ModelVersion | None:
    """Return the version of a registered model that has these bytes, None if there is none."""
    token = None
    while True:
        page = client.search_model_versions(f"name = '{name}'", max_results=1000, page_token=token)
        for version in page:
            if version.tags.get(MD5) == md5:
                return version
        token = page.token
        if not token:
            return None


def register(
    client: MlflowClient, experiment: str, name: str, folder: Path, code: Path, origin: Origin
) -> ModelVersion:
    """Log a model folder with the code that loads it, without pickle, and register it as a version."""
    import mlflow
    from mlflow.entities import LoggedModelOutput
    from mlflow.models import Model

    md5 = path_md5(folder)
    assert md5 is not None
    kind = str(read_json_object(folder / "config.json")["kind"])
    tags = {**origin.tags, MD5: md5}
    logged = client.create_logged_model(experiment, name, origin.run_id, tags, origin.params, kind)
    with tempfile.TemporaryDirectory() as place, importable(Path(place)):
        package = private_copy(code, Path(place))
        mlflow.pyfunc.save_model(
            path=Path(place, "model"),
            python_model=str(package / ENTRY),
            artifacts={"model": folder.resolve().as_uri()},  # a path would be read as an address
            code_paths=[str(package)],
            pip_requirements=requirements(code),
            signature=signature(kind),
            input_example=input_example(kind),
            mlflow_model=Model(
                artifact_path=logged.artifact_location,
                run_id=origin.run_id,
                model_uuid=logged.model_id,
                model_id=logged.model_id,
            ),
        )
        for cache in [*Path(place, "model").rglob("__pycache__")]:
            shutil.rmtree(cache)
        client.log_model_artifacts(logged.model_id, str(Path(place, "model")))
    client.finalize_logged_model(logged.model_id, "READY")
    if origin.run_id is not None:
        client.log_outputs(origin.run_id, [LoggedModelOutput(logged.model_id, 0)])
        client.log_batch(origin.run_id, metrics=own_metrics(origin, logged.model_id))
    ensure_registered_model(client, name, kind)
    return client.create_model_version(
        name,
        f"models:/{logged.model_id}",
        origin.run_id,
        tags,
        description=description(kind, origin),
        model_id=logged.model_id,
    )


def find_or_register(
    client: MlflowClient, experiment: str, name: str, folder: Path, code: Path, origin: Origin
) -> ModelVersion:
    """Return the version with a folder's bytes; register it where there is none."""
    found = find_version(client, name, path_md5(folder) or "")
    return found or register(client, experiment, name, folder, code, origin)


def model_id(version: ModelVersion) -> str:
    """Return the id of a version's logged model, which MLflow keeps in its source alone."""
    return str(version.source).removeprefix("models:/")


def find_training(client: MlflowClient, experiment: str, path: str, md5: str, stage: str) -> Run | None:
    """Return the last run of the stage that made these bytes, None if MLflow has none."""
    query = f"tags.`md5.{path}` = '{md5}' and attributes.run_name = '{stage}'"
    return next(iter(client.search_runs([experiment], query, max_results=1)), None)


def commit_tags(tags: Mapping[str, str]) -> dict[str, str]:
    """Return a run's commit, and whether it was changed, as tags of a version."""
    names = {"git.commit": "mlflow.source.git.commit", "git.dirty": "git.dirty"}
    return {name: tags[key] for name, key in names.items() if key in tags}


def own_metrics(origin: Origin, model_id: str) -> list[Metric]:
    """Return the model's metrics for its training's run."""
    from mlflow.entities import Metric
    from mlflow.utils.time import get_current_time_millis

    now = get_current_time_millis()
    return [
        Metric(f"held_out/{key}", value, now, 0, model_id=model_id, run_id=origin.run_id)
        for key, value in origin.metrics.items()
    ]


def ensure_registered_model(client: MlflowClient, name: str, kind: str) -> None:
    """Create the registered model, unless it exists or another clone is faster."""
    from mlflow import MlflowException

    try:
        client.create_registered_model(name, description=KINDS.get(kind))
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


def description(kind: str, origin: Origin) -> str:
    """Return a version's description in a few lines of Markdown."""
    tags = origin.tags
    lines = [KINDS.get(kind, kind)]
    shown = ", ".join(f"{key} {value:.4g}" for key, value in origin.metrics.items())
    lines.append(f"Held out: {shown}." if shown else "Not evaluated.")
    if commit := tags.get("git.commit"):
        changed = ", with uncommitted changes" if tags.get("git.dirty") == "true" else ""
        lines.append(f"Trained by `{tags.get('stage', '?')}` at commit `{commit[:7]}`{changed}.")
    return "\n\n".join(lines)


def align(client: MlflowClient) -> dict[str, str]:
    """Move each alias `candidate` to the version with the bytes of the workspace's model folder.

    Returns the versions by name. A folder that no version has is left out, and its alias where it is.
    """
    from mlflow import MlflowException

    found: dict[str, str] = {}
    for name, folder in workspace_models().items():
        md5 = path_md5(folder)
        version = None if md5 is None else find_version(client, name, md5)
        if version is None:
            continue
        try:
            present = str(client.get_model_version_by_alias(name, CANDIDATE).version)
        except MlflowException:  # no such alias yet
            present = ""
        if present != str(version.version):
            client.set_registered_model_alias(name, CANDIDATE, version.version)
        found[name] = str(version.version)
    return found


def workspace_models() -> dict[str, Path]:
    """Return the workspace's model folders that are registered, by the name there."""
    folders = {f"{PREFIX}{name}": repository() / "models" / name for name in REGISTERED}
    return {name: folder for name, folder in folders.items() if (folder / "config.json").is_file()}


# ---- the model as MLflow has it --------------------------------------------------------------------------------------


def signature(kind: str) -> Any:
    """Return the signature: one column of texts, of whatever name; a classifier has no params."""
    from mlflow.models import ModelSignature
    from mlflow.types.schema import ColSpec, DataType, ParamSchema, ParamSpec, Schema

    params = [
        ParamSpec("max_new_tokens", DataType.long, 64),
        ParamSpec("max_tokens", DataType.long, None),
        ParamSpec("temperature", DataType.double, 0.0),
        ParamSpec("top_p", DataType.double, 1.0),
        ParamSpec("top_k", DataType.long, None),
        ParamSpec("seed", DataType.long, 0),
    ]
    outputs = ("label", "probabilities") if kind == "classifier" else ("text",)
    return ModelSignature(
        inputs=Schema([ColSpec(DataType.string)]),
        outputs=Schema([ColSpec(column_type(name), name) for name in outputs]),
        params=None if kind == "classifier" else ParamSchema(params),  # type: ignore[arg-type]
    )


def column_type(name: str) -> Any:
    from mlflow.types.schema import DataType, Map

    return Map(DataType.double) if name == "probabilities" else DataType.string


def input_example(kind: str) -> Any:
    """Return an input that MLflow stores beside the model."""
    texts = {"classifier": "Call now to claim your prize", "instruct": "Name the opposite of cold."}
    return [texts.get(kind, "One morning")]


def private_copy(code: Path, place: Path) -> Path:
    """Copy the package under a name of its own, with imports to match, and return the copy.

    The name has the code's md5: models of different code live in one process, beside any other package named `llm`.
    """
    name = f"textmill_{tree_md5(code)[:12]}"
    copy = place / name
    shutil.copytree(code, copy, ignore=shutil.ignore_patterns("__pycache__"))
    for path in copy.rglob("*.py"):
        path.write_text(renamed(path.read_text(encoding="utf-8"), name), encoding="utf-8", newline="\n")
    return copy


@contextlib.contextmanager
def importable(place: Path) -> Iterator[None]:
    """Let Python find packages in a folder, and forget at the end what it imported from there."""
    path = list(sys.path)
    sys.path.insert(0, str(place))
    try:
        yield
    finally:
        sys.path[:] = path
        for name, module in list(sys.modules.items()):
            if str(getattr(module, "__file__", None) or "").startswith(f"{place}{os.sep}"):
                del sys.modules[name]


def tree_md5(code: Path) -> str:
    """Return the md5 of the package's sources."""
    digest = hashlib.md5()
    for path in sorted(code.rglob("*.py")):
        digest.update(f"{path.relative_to(code).as_posix()}\0".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()


def renamed(source: str, name: str) -> str:
    """Return a module's source with its imports of the package under another name."""
    source = re.sub(rf"(?m)^(\s*)from {PACKAGE}(?=[. ])", rf"\1from {name}", source)
    source = re.sub(rf"(?m)^(\s*)import {PACKAGE}(?=\s*$)", rf"\1import {name} as {PACKAGE}", source)
    return re.sub(rf"(?m)^(\s*)import {PACKAGE}(?=\.[\w.]+ as )", rf"\1import {name}", source)


packages_distributions = cache(importlib.metadata.packages_distributions)  # reads the files of every package


def requirements(code: Path) -> list[str]:
    """Return the installed versions of all packages that the model's code imports, as an index has them."""
    distributions = packages_distributions()
    found: dict[str, str] = {}
    for module in third_party(code):
        names = distributions.get(module, [])
        name = module if module in names else next(iter(names), None)
        if name is not None:
            found[name] = importlib.metadata.version(name).partition("+")[0]  # no index has the local label `+cpu`
    return [f"{name}=={version}" for name, version in sorted(found.items())]


def third_party(code: Path) -> set[str]:
    """Return the top-level names of foreign packages in the modules that the entry reaches."""
    found: set[str] = set()
    seen: set[Path] = set()
    waiting = [code / ENTRY]
    while waiting:
        path = waiting.pop()
        if path in seen:
            continue
        seen.add(path)
        for name in imported_names(path.read_bytes()):
            top, *inner = name.split(".")
            if top == PACKAGE:
                for last in range(len(inner) + 1):
                    module = code.joinpath(*inner[:last])
                    waiting += [file for file in (module.with_suffix(".py"), module / "__init__.py") if file.is_file()]
            elif top not in sys.stdlib_module_names:
                found.add(top)
    return found


@cache  # the models of a run come with the same code
def imported_names(source: bytes) -> tuple[str, ...]:
    """Return the dotted names that a module imports, late ones too."""
    found: list[str] = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            found += [f"{node.module}.{alias.name}" for alias in node.names]
    return tuple(found)


def metrics_of(name: str, values: Mapping[str, float]) -> dict[str, float]:
    """Return a model's own metrics among those of the evaluation."""
    kind = name.removeprefix(PREFIX)
    return {key.removeprefix(f"{kind}/"): value for key, value in values.items() if key.startswith(f"{kind}/")}
