"""`python -m llm judge`."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

from llm.cli.compare import read_side
from llm.common.errors import InputError
from llm.common.markdown import escape, table
from llm.common.sanitize import visible

if TYPE_CHECKING:
    from llm.evaluation.instruct.judge import JudgeReport
    from llm.evaluation.metrics import Interval

SUMMARY = "have a language model judge which of two models answers better"
DESCRIPTION = (
    "Compares B's answers with A's on the same instructions by a judge: a model behind an OpenAI-compatible endpoint. "
    "Each pair is judged in both orders, and only a preference that survives the exchange counts. Judgements are "
    "appended to a file; what it holds is not asked again. The key for the endpoint is read from LLM_JUDGE_KEY."
)
EXAMPLES = (
    "python -m llm judge reports/predictions:scratch reports/predictions:gpt --endpoint http://127.0.0.1:8000/v1 "
    "--model instruct --limit 100",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    for name, text in (("a", "answers, as `compare` takes them"), ("b", "the answers that are judged against them")):
        parser.add_argument(name, metavar=name.upper(), help=text)
    add = parser.add_argument
    add("--endpoint", required=True, metavar="URL", help="of the judge, up to /v1")
    add("--model", required=True, metavar="NAME", help="of the judge, as its endpoint calls it")
    add("--out", type=Path, default=Path("judgements.jsonl"), metavar="FILE", help="judgements (default: %(default)s)")
    add(
        "--rubric", type=Path, metavar="FILE", help="question to the judge (default: llm/evaluation/instruct/rubric.md)"
    )
    add("--limit", type=int, metavar="N", help="judge N pairs, evenly spaced (default: all)")
    add("--parallel", type=int, default=4, metavar="N", help="requests at a time (default: %(default)s)")
    add("--max-tokens", type=int, default=16, metavar="N", help="of a reply in free text (default: %(default)s)")
    add("--json", action="store_true", help="print JSON, not Markdown")


def run(args: argparse.Namespace) -> None:
    from llm.evaluation.instruct.judge import KEY, RUBRIC, Judge, judge_pairs, read_rubric, summarize
    from llm.evaluation.predictions import align

    for name in ("limit", "parallel", "max_tokens"):
        if (value := getattr(args, name)) is not None and value < 1:
            raise InputError(f"--{name.replace('_', '-')}: expected 1 or more, got {value}")
    judge = Judge(args.endpoint, args.model, os.environ.get(KEY), args.max_tokens)
    rubric = read_rubric(args.rubric or RUBRIC)
    sides = [read_side(side, None, "auto").get("instructions") for side in (args.a, args.b)]
    for side, found in zip((args.a, args.b), sides, strict=True):
        if found is None:
            raise InputError(f"{side}: no answers to instructions; name a file such as instructions.jsonl")
    a, b = sides
    assert a is not None and b is not None
    b = align(a, b)
    n = len(a.keys)
    count = min(n, args.limit or n)
    examples = [i * n // count for i in range(count)]
    judgements = judge_pairs(judge, rubric, a, b, args.out, examples=examples, parallel=args.parallel)
    report = summarize(judgements, a, b)
    if args.json:
        print(json.dumps(report._asdict(), indent=2))
    else:
        print(visible(to_markdown(report, a.name, b.name, args.model)), end="")


def to_markdown(report: JudgeReport, a: str, b: str, judge: str) -> str:
    """Return the report: the verdict in words, the counts, and how far the judge can be trusted."""
    low, high = report.win_rate.low, report.win_rate.high
    verdict = "better than A" if low > 0.5 else "worse than A" if high < 0.5 else "not to be told apart from A"
    rows = [
        ["B wins", str(report.wins_b)],
        ["A wins", str(report.wins_a)],
        ["ties", str(report.ties)],
        ["of these: the preference followed the order", str(report.unstable)],
        ["no sensible verdict, left out", str(report.unusable)],
        ["preferences for the first answer (50 %: no bias)", percent(report.first)],
        [f"agreement with exact match, on {report.comparable} pairs that it tells apart", percent(report.agreement)],
    ]
    lines = [
        f"A: {escape(a)}  ",
        f"B: {escape(b)}  ",
        f"Judge: {escape(judge)}",
        "",
        f"B is {verdict}: it wins {percent(report.win_rate)} of {report.pairs:,} pairs, a tie counting half.",
        "",
        *table(["judgement", "pairs"], rows),
    ]
    return "\n".join(lines)


def percent(share: Interval) -> str:
    value, low, high = (100 * x for x in share)
    return f"{value:.1f} % ({low:.1f}-{high:.1f})"
