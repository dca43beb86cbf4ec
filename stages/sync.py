"""Delivers the journals to MLflow: `python -m stages.sync`. Stages start it with `--follow`."""

from __future__ import annotations

import argparse
import json
import logging
import sys

from llm.common.errors import InputError
from llm.common.log import setup_logging
from llm.common.namesake import check_namesake
from stages.tracking.alignment import align_workspace
from stages.tracking.delivery import deliver_all, follow, one_line
from stages.tracking.mlflow_client import set_environment
from stages.tracking.process import Process, runs_folder


def main(arguments: list[str]) -> int:
    """Deliver one growing pipeline or all that is left, or align the registry; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m stages.sync", description="Deliver recorded runs to MLflow.")
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--follow", nargs=2, metavar=("PIPELINE", "PROCESS"), help="one pipeline while it runs")
    group.add_argument(
        "--align",
        action="store_true",
        help="make each registered model's candidate the one in models/, as after dvc checkout or dvc exp apply",
    )
    options = parser.parse_args(arguments)
    setup_logging()
    check_namesake()
    set_environment()
    if options.follow:
        pipeline, process = options.follow
        return follow(runs_folder() / pipeline, Process(*json.loads(process)))
    if options.align:
        try:
            return align_workspace()
        except InputError:
            raise
        except Exception as error:
            logging.getLogger("llm").debug("%s", error, exc_info=error)
            raise InputError(one_line(error)) from None
    return deliver_all()


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except InputError as error:
        sys.exit(f"sync: {error}")
