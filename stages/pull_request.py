"""Report of a pull request as Markdown: figures beside the base's, the paired verdict, the gate.

`python -m stages.pull_request BASE` compares the reports of this checkout with those of a git revision. Nothing is
trained.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

from llm.checkpoint.card import Figure
from llm.common.errors import InputError
from llm.common.markdown import escape, table
from llm.release.gate import MODELS, read_metrics
from llm.release.lineage import FIGURES, figures_of


def main(arguments: list[str]) -> int:
    """Print the report; return 0, whatever it says."""
    parser = argparse.ArgumentParser(prog="python -m stages.pull_request", description="Report on a pull request.")
    parser.add_argument("base", metavar="BASE", help="the git revision to compare with")
    base = parser.parse_args(arguments).base
    print("\n".join(["## Figures", "", *figures_table(base_figures(base), read_metrics(FIGURES))]))
    print(f"## The same examples\n\n{said('llm', 'compare', base, 'reports')}\n")
    print(f"## Release gate\n\n{said('stages.release', '--dry', '--markdown')}")
    return 0


def base_figures(revision: str) -> dict[str, Any]:
    """Return the evaluation's figures at a revision; none where it has none."""
    known = subprocess.run(["git", "rev-parse", "--verify", "-q", f"{revision}^{{commit}}"], capture_output=True)
    if known.returncode:
        raise InputError(f"{revision}: no commit here (expected a git revision); fetch it, or correct the name")
    done = subprocess.run(["git", "show", f"{revision}:./{FIGURES}"], capture_output=True, text=True, encoding="utf-8")
    found = json.loads(done.stdout) if not done.returncode else {}
    return found if isinstance(found, dict) else {}


def figures_table(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Return the table of all figures of the three models, with their intervals."""
    rows = []
    for model in MODELS:
        old, new = (figures_of(values.get(model, {})) for values in (before, now))
        for metric in dict.fromkeys([*old, *new]):
            rows.append([escape(f"{model} {metric}"), *(shown(each.get(metric)) for each in (old, new))])
    return table(["figure (95 % interval)", "base", "here"], rows)


def shown(figure: Figure | None) -> str:
    if figure is None:
        return "-"
    return f"{figure.value:.4g}" + ("" if figure.low is None else f" ({figure.low:.4g} to {figure.high:.4g})")


def said(*words: str) -> str:
    """Return the output of one of our commands, or the reason why there is none."""
    done = subprocess.run([sys.executable, "-m", *words], capture_output=True, text=True, encoding="utf-8")
    if done.stdout.strip():
        return done.stdout
    reason = (done.stderr.strip().splitlines() or ["no output"])[-1]
    return f"Not at hand: {escape(reason)}\n"


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except InputError as error:
        sys.exit(f"pull_request: {error}")
