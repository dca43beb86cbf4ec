"""Release the workspace's models, if the gate lets them: `python -m stages.release`.

The alias `champion` moves only when every requirement of `release` in params.yaml is met by all of them.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import llm
from llm.checkpoint.card import read_card
from llm.common.errors import InputError
from llm.common.lock import locked
from llm.common.log import setup_logging
from llm.common.namesake import check_namesake
from llm.config import ReleaseParams, parse_params
from llm.evaluation.comparison import compare
from llm.evaluation.predict import predict
from llm.evaluation.predictions import Predictions, align, paired_metrics
from llm.release import gate
from llm.release.lineage import lineage
from stages.runtime.inputs import read_yaml
from stages.tracking import alignment, champion, mlflow_client, registry
from stages.tracking.delivery import one_line
from stages.tracking.process import runs_folder

if TYPE_CHECKING:
    from mlflow import MlflowClient

TOKENS, REPORTS = Path("data/tokens"), Path("reports")
PREDICTIONS = {"classifier": "messages", "instruct": "instructions"}
logger = logging.getLogger("llm")


def main(arguments: list[str]) -> int:
    """Check, then release or go back; return 0, or 1 where the gate is closed."""
    parser = argparse.ArgumentParser(prog="python -m stages.release", description="Release models through the gate.")
    parser.add_argument("models", nargs="*", metavar="MODEL", help="base, classifier, instruct (default: all)")
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--dry", action="store_true", help="only print the table; what is not at hand does not count")
    group.add_argument("--rollback", action="store_true", help="make the champion before the present one it again")
    parser.add_argument("--markdown", action="store_true", help="print the table as Markdown")
    parser.add_argument("--why", default="", metavar="TEXT", help="the reason, for the record")
    options = parser.parse_args(arguments)
    setup_logging()
    check_namesake()
    mlflow_client.set_environment()
    models = options.models or list(gate.MODELS)
    if unknown := set(models) - set(gate.MODELS):
        raise InputError(f"{min(unknown)}: no model of the gate (expected {', '.join(gate.MODELS)}); correct the name")
    with locked(runs_folder() / "release.lock") as holder:
        if holder is not None:
            raise InputError(f"process {holder} is releasing; wait for it")
        return roll_back(models, options.why) if options.rollback else release(models, options)


def release(models: list[str], options: argparse.Namespace) -> int:
    """Check the models and print the table; without --dry log the decision and move the alias."""
    params = parse_params(read_yaml(Path("params.yaml"))).release
    client, experiment = connect(options.dry)
    rows = [*gate.check_leaks(TOKENS, REPORTS / "metrics", params.leaks)]
    metrics = gate.read_metrics(REPORTS / "metrics/evaluate.json")
    rows += gate.check_near_leaks(metrics, params.near_leaks)
    rows += gate.check_thresholds(params, metrics, models)
    answers: dict[str, Predictions] = {}
    for model in models:
        rows += check_model(model, params, client, answers)
    closed = gate.blocked(rows, strict=not options.dry)
    print(gate.to_markdown(rows) if options.markdown else gate.to_text(rows))
    verdict = f"{len(closed)} of {len(rows)} requirements not met" if closed else "all requirements are met"
    print(f"{'blocked' if closed else 'free'}: {verdict}")
    if options.dry:
        return int(bool(closed))
    assert client is not None
    versions = {} if closed else registered(client, experiment, models)
    files = {"release.md": gate.to_markdown(rows), "release.json": gate.to_json(rows)}
    for model, found in ({} if closed else answers).items():
        files[champion.answers_file(f"{registry.PREFIX}{model}")] = json.dumps(gate.right_answers(found))
    run = champion.log_decision(client, "blocked" if closed else "released", versions, options.why or verdict, files)
    cards = {f"{registry.PREFIX}{model}": lineage(Path("models", model)) for model in models} if not closed else {}
    recorded(client, run, lambda: champion.promote(client, versions, cards, run))
    for name, version in versions.items():
        print(f"{name}: {champion.CHAMPION} is version {version}")
    return int(bool(closed))


def roll_back(models: list[str], why: str) -> int:
    """Give the alias back to the champions before, all of them or none."""
    client, _ = mlflow_client.connect()
    names = [f"{registry.PREFIX}{model}" for model in models]
    before = {name: champion.current(client, name) for name in names}
    versions = champion.previous_versions(client, [name for name in names if before[name] is not None] or names)
    run = champion.log_decision(client, "rolled back", versions, why, {})
    recorded(client, run, lambda: champion.move(client, versions, before))
    for name, version in versions.items():
        print(f"{name}: {champion.CHAMPION} is version {version} again")
    return 0


def recorded(client: MlflowClient, run: str, action: Callable[[], None]) -> None:
    """Carry out a logged decision, and end its run by the outcome."""
    status = "FAILED"
    try:
        action()
        status = "FINISHED"
    finally:
        client.set_terminated(run, status)


def connect(dry: bool) -> tuple[MlflowClient | None, str]:
    """Connect to MLflow; a dry run makes no store where there is none."""
    if dry and not os.environ.get("MLFLOW_TRACKING_URI") and not mlflow_client.default_database().exists():
        return None, ""
    return mlflow_client.connect()


def registered(client: MlflowClient, experiment: str, models: list[str]) -> dict[str, str]:
    """Return the registered version of each model folder, by its name there; register what no version has."""
    found: dict[str, str] = {}
    for model in models:
        name, folder = f"{registry.PREFIX}{model}", Path("models", model)
        origin = alignment.origin(client, experiment, name, folder)
        version = registry.find_or_register(client, experiment, name, folder, Path(llm.__file__).parent, origin)
        found[name] = str(version.version)
    return found


# ---- what is checked -------------------------------------------------------------------------------------------------


def check_model(
    model: str, params: ReleaseParams, client: MlflowClient | None, answers: dict[str, Predictions]
) -> Iterator[gate.Row]:
    """Check one model folder: lineage, figures, predictions, and the champion beside it; add its `answers`."""
    folder = Path("models", model)
    if not (folder / "config.json").is_file():
        yield gate.Row(model, "model folder", str(folder), "not at hand", "not checked")
        return
    yield from gate.check_lineage(model, folder, read_card(folder))
    yield from gate.check_locked(model, folder, Path())
    try:
        now, seconds = timed(folder, str(folder))
    except InputError as error:
        yield gate.Row(model, "answers", "an answer to each example", str(error), "falls short")
        return
    if model in PREDICTIONS:
        reported = REPORTS / "predictions" / f"{PREDICTIONS[model]}.jsonl"
        yield gate.check_predictions(model, gate.read_reported(reported), now)
        answers[model] = now
    name = f"{registry.PREFIX}{model}"
    version = champion.current(client, name) if client is not None else None
    if version is None:
        yield gate.row(model, "champion", "one to compare with", "none yet", True)
        return
    if model in PREDICTIONS:
        yield from gate.check_released(model, champion.released_answers(version), now, params.no_worse_by)
    with tempfile.TemporaryDirectory() as place:
        yield from check_beside(
            model, params, (folder, now, seconds), champion.download(name, version.version, Path(place))
        )


def check_beside(
    model: str, params: ReleaseParams, ours: tuple[Path, Predictions, float], theirs: Path
) -> Iterator[gate.Row]:
    """Check a model beside the champion on the same examples: quality, speed and size."""
    folder, now, seconds = ours
    try:
        before, before_seconds = timed(theirs, "the champion")
    except InputError as error:
        found = f"{error}; an empty release.no_worse_by releases without comparison"
        yield gate.row(model, "champion", "the same examples", found, not params.no_worse_by)
        return
    yield from gate.check_champion(model, compare(paired_metrics(before, align(before, now))), params.no_worse_by)
    yield gate.check_cost(model, "speed", "s", seconds, before_seconds, params.slower_by)
    size, before_size = (gate.folder_size(each) for each in (folder, theirs))
    yield gate.check_cost(model, "size", "bytes", size, before_size, params.larger_by)


def timed(folder: Path, name: str) -> tuple[Predictions, float]:
    """Return a model's predictions on the test set, and the processor time that they took."""
    start = time.process_time()
    (found,) = predict(folder, name, None, "auto").values()
    return found, time.process_time() - start


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except InputError as error:
        sys.exit(f"release: {error}")
    except Exception as error:
        logger.debug("%s", error, exc_info=error)
        sys.exit(f"release: {one_line(error)}")
