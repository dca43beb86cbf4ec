"""`python -m llm compare`."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llm.cli.options import add_device, add_out
from llm.cli.rows import read_table
from llm.cli.terminal import write_result
from llm.common.errors import InputError
from llm.common.markdown import escape, table
from llm.evaluation.tracked import download_models, has_store, is_tracked

if TYPE_CHECKING:
    from llm.evaluation.comparison import MetricComparison
    from llm.evaluation.predictions import Difference, Predictions

SUMMARY = "test which of two models is better"
DESCRIPTION = (
    "Compares B with A on the same examples: files of predictions, `reports` folders, model folders, git revisions or "
    "DVC experiments whose reports/predictions are in DVC's cache, MLflow's runs (id or name) and models:/ URIs, whose "
    "models answer the test set. PATH:NAME picks one model of a file, as in "
    "reports/predictions:scratch. Says of each metric whether B is better, worse, or not to be told apart, and "
    "how small a difference these examples could have shown. Exit status: 0, or 3 where B is worse."
)
EXAMPLES = (
    "python -m llm compare reports/predictions:scratch reports/predictions:gpt",
    "python -m llm compare HEAD~1 reports --json > comparison.json",
    "python -m llm compare models:/llm-classifier@champion models:/llm-classifier@candidate",
    "python -m llm compare models/classifier_scratch models/classifier --require better",
)
WORSE = 3  # exit status
KINDS = ("messages", "instructions")
PREDICTIONS = Path("reports/predictions")
PERCENT = ("accuracy", "macro F1", "exact match")  # metrics shown in %


def add_arguments(parser: argparse.ArgumentParser) -> None:
    for name, text in (("a", "the model that is there"), ("b", "the model that is tested against it")):
        parser.add_argument(name, metavar=name.upper(), help=text)
    parser.add_argument("--data", type=Path, metavar="FILE", help="test set of model folders (default: of data/tokens)")
    parser.add_argument("--json", action="store_true", help="print JSON with all figures and examples, not Markdown")
    add_out(parser)
    parser.add_argument("--show", type=int, default=10, metavar="N", help="show N differing examples (default: 10)")
    require = "exit with 3 unless B is better by the first metric, too"
    parser.add_argument("--require", choices=("better",), help=require)
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of resamples (default: %(default)s)")
    add_device(parser)


def run(args: argparse.Namespace) -> int:
    """Print the comparison; return 3 where B is worse by any metric, or not better where that is required."""
    from llm.evaluation.comparison import compare
    from llm.evaluation.predictions import align, differences, paired_metrics

    a, b = (read_side(side, args.data, args.device) for side in (args.a, args.b))
    kinds = [kind for kind in a if kind in b]
    if not kinds:
        raise InputError(f"{args.a} has {', '.join(a)}, {args.b} has {', '.join(b)}; compare what is alike")
    pairs = {kind: (a[kind], align(a[kind], b[kind])) for kind in kinds}
    metrics = {kind: paired_metrics(*pair) for kind, pair in pairs.items()}
    found = iter(compare([metric for part in metrics.values() for metric in part], seed=args.seed))
    results = {kind: [next(found) for _ in part] for kind, part in metrics.items()}
    differing = {kind: differences(*pair) for kind, pair in pairs.items()}
    text = to_json(pairs, results, differing) if args.json else to_markdown(pairs, results, differing, args.show)
    write_result(text, args.out)
    worse = any(result.verdict == "worse" for part in results.values() for result in part)
    unproven = args.require == "better" and any(part[0].verdict != "better" for part in results.values())
    return WORSE if worse or unproven else 0


# ---- what is compared ------------------------------------------------------------------------------------------------


def read_side(name: str, data: Path | None, device: str) -> Mapping[str, Predictions]:
    """Return the predictions behind an argument, by kind."""
    if is_tracked(name):
        return predict_tracked(name, data, device)
    path, model = split_name(name)
    if (path / "config.json").is_file():
        from llm.evaluation.predict import predict

        return predict(path, name, data, device)
    if path.exists():
        return read_predictions(path, name, model)
    try:
        with tempfile.TemporaryDirectory() as folder:
            return read_predictions(fetch_revision(str(path), Path(folder) / "predictions"), name, model)
    except InputError as error:
        if not has_store():
            raise
        try:
            return predict_tracked(name, data, device)
        except InputError as untracked:
            raise InputError(f"{error}; {str(untracked).removeprefix(f'{name}: ')}") from None


def predict_tracked(name: str, data: Path | None, device: str) -> dict[str, Predictions]:
    """Return the predictions of MLflow's models, by kind, on the test set."""
    from llm.evaluation.predict import predict

    found: dict[str, Predictions] = {}
    with tempfile.TemporaryDirectory() as place:
        for folder in download_models(name, Path(place)):
            found |= {kind: each for kind, each in predict(folder, name, data, device).items() if kind not in found}
    return found


def split_name(name: str) -> tuple[Path, str | None]:
    """Return path and model of `PATH:MODEL`."""
    head, colon, model = name.rpartition(":")
    return (Path(name), None) if not colon or Path(name).exists() else (Path(head), model)


def read_predictions(path: Path, name: str, model: str | None) -> dict[str, Predictions]:
    """Read a file of predictions, or the files of a folder that `reports/predictions` is, or is in."""
    from llm.evaluation.predictions import from_rows

    if path.is_file():
        found = from_rows(read_table(path), name, model)
        return {found.kind: found}
    folder = path / "predictions" if (path / "predictions").is_dir() else path
    files = [file for kind in KINDS if (file := folder / f"{kind}.jsonl").is_file()]
    if not files:
        raise InputError(f"{name}: no predictions (expected messages.jsonl or instructions.jsonl); run `dvc repro`")
    results: dict[str, Predictions] = {}
    for file in files:
        try:
            results[file.stem] = from_rows(read_table(file), name, model)
        except InputError:
            if model is None or (file is files[-1] and not results):
                raise  # else a model that has predictions of one kind alone
    return results


def fetch_revision(revision: str, out: Path) -> Path:
    """Fetch the predictions of a git revision from DVC's cache."""
    command = [sys.executable, "-m", "dvc", "get", "--rev", revision, "-o", str(out), ".", str(PREDICTIONS)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode or not out.is_dir():
        lines = [line for line in done.stderr.splitlines() if line.strip()] or ["no such file"]
        reason = lines[0].removeprefix("ERROR: ")
        raise InputError(f"{revision}: no file or folder, nor a revision with {PREDICTIONS} at hand ({reason})")
    return out


# ---- what is said ----------------------------------------------------------------------------------------------------

Pairs = Mapping[str, tuple["Predictions", "Predictions"]]
Results = Mapping[str, "list[MetricComparison]"]
Differing = Mapping[str, "list[Difference]"]


def to_json(pairs: Pairs, results: Results, differing: Differing) -> str:
    content: dict[str, Any] = {
        kind: {
            "a": a.name,
            "b": b.name,
            "examples": len(a.keys),
            "verdict": results[kind][0].verdict,
            "metrics": [result._asdict() for result in results[kind]],
            "differences": [difference._asdict() for difference in differing[kind]],
        }
        for kind, (a, b) in pairs.items()
    }
    return json.dumps(content, ensure_ascii=False, indent=2) + "\n"


def to_markdown(pairs: Pairs, results: Results, differing: Differing, show: int) -> str:
    lines: list[str] = []
    for kind, (a, b) in pairs.items():
        lines += [f"## {kind.capitalize()}: {len(a.keys):,} examples", ""]
        lines += [f"A: {escape(a.name)}  ", f"B: {escape(b.name)}"]
        lines += ["", *(sentence(result) for result in results[kind]), ""]
        header = ["metric", "A", "B", "B - A", "A alone right", "B alone right", "p (McNemar)", "p (permutation)"]
        lines += table([*header, "p (Holm)", "smallest visible"], [figures(result) for result in results[kind]])
        lines += examples(differing[kind], show)
    n_metrics = sum(map(len, results.values()))
    lines.append(
        f"Brackets: 95 % intervals of a paired bootstrap. Holm's p-values are corrected for {n_metrics} metrics. The "
        "smallest visible difference is found in 4 of 5 cases."
    )
    return "\n".join(lines) + "\n"


def sentence(result: MetricComparison) -> str:
    """Say one metric's verdict in words."""
    if result.verdict == "not to be told apart":
        hint = f"; a difference of {shown(result, result.smallest)} would have been seen"
        return f"- {result.metric}: B and A are not to be told apart (p = {result.p_holm:.2g}{hint})."
    size = shown(result, abs(result.difference))
    return f"- {result.metric}: B is {result.verdict} than A by {size} (p = {result.p_holm:.2g})."


def shown(result: MetricComparison, value: float) -> str:
    return f"{100 * value:.1f} points" if result.metric in PERCENT else f"{value:.4f}"


def figures(result: MetricComparison) -> list[str]:
    """Return the cells of a metric's row."""

    def number(value: float) -> str:
        return f"{100 * value:.1f} %" if result.metric in PERCENT else f"{value:.4f}"

    scale, digits = (100, 1) if result.metric in PERCENT else (1, 4)
    low, value, high = (f"{scale * x:+.{digits}f}" for x in (result.low, result.difference, result.high))
    return [
        result.metric,
        number(result.a),
        number(result.b),
        f"{value} ({low} to {high})",
        *("-" if x is None else str(x) for x in (result.only_a, result.only_b)),
        "-" if result.p_mcnemar is None else f"{result.p_mcnemar:.2g}",
        f"{result.p_permutation:.2g}",
        f"{result.p_holm:.2g}",
        shown(result, result.smallest),
    ]


def examples(found: list[Difference], show: int) -> list[str]:
    if not found or show < 1:
        return [f"They differ on {len(found):,} examples.", ""]
    rows = [[escape(" / ".join(x.example)), *map(escape, (x.expected, x.a, x.b))] for x in found[:show]]
    more = f", the first {show}" if len(found) > show else ""
    return [f"They differ on {len(found):,} examples{more}:", "", *table(["example", "expected", "A", "B"], rows)]
