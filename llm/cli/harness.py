"""`python -m llm harness`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from llm.cli.options import add_device, add_model, add_out
from llm.cli.terminal import write_result

SUMMARY = "run lm-evaluation-harness on a model (extra `eval`)"
DESCRIPTION = "Prints the harness's results as JSON. Tasks are the harness's own, or those described in --include-path."
EXAMPLES = (
    "python -m llm harness models/base --tasks sample_opposites --include-path tests/evaluation/tasks",
    "python -m llm harness models/base --tasks arc_easy hellaswag --num-fewshot 5",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    parser.add_argument("--tasks", required=True, nargs="+", metavar="NAME", help="names of tasks")
    parser.add_argument("--include-path", type=Path, metavar="DIR", help="folder with the YAML files of own tasks")
    parser.add_argument("--num-fewshot", type=int, metavar="N", help="examples in front of each question")
    parser.add_argument("--limit", type=int, metavar="N", help="at most N questions of a task")
    add_device(parser)
    add_out(parser)


def run(args: argparse.Namespace) -> None:
    """Print the results of a model."""
    from llm.checkpoint.folder import load_checkpoint
    from llm.common.device import pick_device
    from llm.convert.cache import model_folder
    from llm.evaluation.base.harness import evaluate_tasks

    found = evaluate_tasks(
        load_checkpoint(model_folder(args.model_dir), pick_device(args.device)),
        args.tasks,
        include_path=args.include_path,
        num_fewshot=args.num_fewshot,
        limit=args.limit,
    )
    write_result(json.dumps(found, ensure_ascii=False, indent=2, default=str) + "\n", args.out)
