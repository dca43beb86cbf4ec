"""Prints the time line of the last pipeline, finished or not, and writes it: `python -m stages.timeline`."""

from __future__ import annotations

import argparse
import logging
import sys

from llm.common.errors import InputError
from llm.common.log import setup_logging
from llm.common.namesake import check_namesake
from stages.tracking.process import runs_folder
from stages.tracking.timeline import PICTURE, TABLE, last_pipeline, markdown, read_timeline, write


def main(arguments: list[str]) -> None:
    """Print the table on stdout; write it and the picture to `.work/`."""
    argparse.ArgumentParser(prog="python -m stages.timeline", description=__doc__).parse_args(arguments)
    setup_logging()
    check_namesake()
    pipeline = last_pipeline()
    if pipeline is None:
        raise InputError(f"{runs_folder()}: no stage has run here yet; `dvc repro` runs all")
    line, folder = read_timeline(pipeline), runs_folder().parent
    write(line, folder)
    print(markdown(line), end="")
    logging.getLogger("llm").info("written to %s and %s", folder / TABLE, folder / PICTURE)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except InputError as error:
        sys.exit(f"timeline: {error}")
