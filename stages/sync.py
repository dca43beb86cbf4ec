"""Delivers the journals to MLflow: `python -m stages.sync`. Stages start it with `--follow`."""

from __future__ import annotations

import argparse
import json
import sys

from llm.common.errors import InputError
from llm.common.log import setup_logging
from stages.tracking.delivery import deliver_all, follow
from stages.tracking.mlflow_client import set_environment
from stages.tracking.process import Process, runs_folder


def main(arguments: list[str]) -> int:
    """Deliver one growing pipeline or all that is left, and return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m stages.sync", description="Deliver recorded runs to MLflow.")
    parser.add_argument("--follow", nargs=2, metavar=("PIPELINE", "PROCESS"), help="one pipeline while it runs")
    options = parser.parse_args(arguments)
    setup_logging()
    set_environment()
    if options.follow:
        pipeline, process = options.follow
        return follow(runs_folder() / pipeline, Process(*json.loads(process)))
    return deliver_all()


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except InputError as error:
        sys.exit(f"sync: {error}")
