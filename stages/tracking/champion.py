"""Alias `champion` of a registered model: the released version. The release gate alone moves it."""

from __future__ import annotations

import getpass
import json
import os
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from llm.checkpoint.card import Card
from llm.checkpoint.readme import readme
from llm.common.errors import InputError
from stages.tracking import mlflow_client
from stages.tracking.provenance import git, git_tags

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

CHAMPION = "champion"
PREVIOUS = "champion.previous"  # tag of a version: the champion that it replaced
RELEASE = "champion.release"  # tag of a version: the run of the decision that released it
MAX_DESCRIPTION = 5000  # characters that MLflow stores


def current(client: MlflowClient, name: str) -> ModelVersion | None:
    """Return the champion of a registered model, None where there is none yet."""
    from mlflow import MlflowException

    try:
        return client.get_model_version_by_alias(name, CHAMPION)
    except MlflowException as error:
        if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            raise
        return None


def download(name: str, version: str, place: Path) -> Path:
    """Download a version into a folder; return the model folder in it."""
    import mlflow

    path = Path(mlflow.artifacts.download_artifacts(f"models:/{name}/{version}", dst_path=str(place)))
    found = sorted(path.glob("artifacts/*/config.json"))
    if not found:
        raise InputError(f"{name}, version {version}: holds no model folder; register it again by stages.sync --align")
    return found[0].parent


def promote(client: MlflowClient, versions: Mapping[str, str], cards: Mapping[str, Card], release: str) -> None:
    """Make versions the champions of their names, all or none; each gets its card as tags and description first.

    `release` is the run of the decision.
    """
    before = {name: current(client, name) for name in versions}
    for name, version in versions.items():
        previous = before[name]
        tags = {**card_tags(cards[name]), RELEASE: release}
        if previous is not None and str(previous.version) != version:
            tags[PREVIOUS] = str(previous.version)
        for key, value in tags.items():
            client.set_model_version_tag(name, version, key, value)
        text = readme(cards[name], name).split("---\n", 2)[2].strip()
        client.update_model_version(name, version, text[:MAX_DESCRIPTION])
    move(client, versions, before)


def answers_file(name: str) -> str:
    """Return the artifact of a decision with what a model had right."""
    return f"answers/{name}.json"


def released_answers(version: ModelVersion) -> dict[str, bool]:
    """Return what a version had right when it was released, by example; nothing for one of an earlier release."""
    import mlflow
    from mlflow import MlflowException

    run = version.tags.get(RELEASE)
    if run is None:
        return {}
    try:
        text = mlflow.artifacts.load_text(f"runs:/{run}/{answers_file(version.name)}")
    except (MlflowException, OSError):  # cleaned up since
        return {}
    found: dict[str, bool] = json.loads(text)
    return found


def move(client: MlflowClient, versions: Mapping[str, str], before: Mapping[str, ModelVersion | None]) -> None:
    """Set the aliases of several names. Where one cannot be set, those that were come back."""
    done: list[str] = []
    try:
        for name, version in versions.items():
            client.set_registered_model_alias(name, CHAMPION, version)
            done.append(name)
    except BaseException:
        for name in done:
            old = before[name]
            if old is None:
                client.delete_registered_model_alias(name, CHAMPION)
            else:
                client.set_registered_model_alias(name, CHAMPION, str(old.version))
        raise


def previous_versions(client: MlflowClient, names: list[str]) -> dict[str, str]:
    """Return the version before each champion; raise `InputError` where there is none."""
    found: dict[str, str] = {}
    for name in names:
        champion = current(client, name)
        previous = champion.tags.get(PREVIOUS) if champion is not None else None
        if previous is None:
            problem = "no champion yet" if champion is None else f"version {champion.version} is the first champion"
            raise InputError(f"{name}: {problem}, so nothing to go back to; name other models")
        found[name] = previous
    return found


def card_tags(card: Card) -> dict[str, str]:
    """Return what a card states as tags of a version."""
    sources = {f"card.data.{kind}": f"{each.source}, licence {each.licence}" for kind, each in card.data.items()}
    weights = {f"card.{name}": digest for name, digest in card.files.items() if name.endswith(".safetensors")}
    origin = card.origin
    stated = {
        "card.base": card.base.name if card.base is not None else None,
        "card.commit": origin.commit if origin is not None else None,
        "card.lock": origin.lock if origin is not None else None,
    }
    figures = {f"card.{key}": shown(each.value, each.low, each.high) for key, each in (card.figures or {}).items()}
    return {**sources, **weights, **{key: value for key, value in stated.items() if value is not None}, **figures}


def shown(value: float, low: float | None, high: float | None) -> str:
    return f"{value:.6g}" if low is None or high is None else f"{value:.6g} ({low:.6g} to {high:.6g})"


def log_decision(
    client: MlflowClient, decision: str, versions: Mapping[str, str], why: str, files: Mapping[str, str]
) -> str:
    """Log a decision as a run of an experiment of its own, with who decided; return the run's id."""
    name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or "llm"
    experiment = client.get_experiment_by_name(f"{name}-releases")
    place = mlflow_client.artifact_location()
    experiment_id = (
        experiment.experiment_id if experiment is not None else client.create_experiment(f"{name}-releases", place)
    )
    tags = {"decision": decision, "who": who(), "why": why, "mlflow.user": getpass.getuser()}
    tags |= {f"version.{model}": version for model, version in versions.items()}
    run = client.create_run(experiment_id, tags=tags | git_tags(), run_name=decision)
    for file, text in files.items():
        client.log_text(run.info.run_id, text, file)
    return str(run.info.run_id)


def who() -> str:
    """Return the person as git knows them, else the user of this machine."""
    try:
        return f"{git('config', 'user.name')} <{git('config', 'user.email')}>"
    except (OSError, subprocess.CalledProcessError):
        return getpass.getuser()
