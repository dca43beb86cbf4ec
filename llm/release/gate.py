"""Release gate: thresholds on intervals, the champion by the paired test, leaks, lineage, speed and size."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from llm.checkpoint.card import Card
from llm.common.digests import path_md5
from llm.common.errors import InputError
from llm.common.files import read_json_object
from llm.common.markdown import escape, table
from llm.config import ReleaseParams
from llm.data.examples import read_lines, read_messages, read_pairs
from llm.evaluation.comparison import MetricComparison, compare, mean_metric
from llm.evaluation.leakage import asked
from llm.evaluation.metrics import exact_matches
from llm.evaluation.predictions import Predictions, from_rows
from llm.preprocess.text import dedup_key
from llm.release.lineage import FIGURES, digest, locked_stages, md5_of
from llm.release.verify import check_folder

Verdict = Literal["passes", "falls short", "not checked"]
MODELS = ("base", "classifier", "instruct")
LEAKED = re.compile(r"(test_leaked|test\.(exact|normalised))$")  # a count of equal texts in a metrics file
DIFFERING = 0.01  # predictions that another processor's rounding may change
TOKENIZER_FILES = ("bpe.json", "tokenizer.json", "tokenizer.model")
READERS: dict[str, Callable[[Path], list[str]]] = {  # of the sets in data/tokens: the text that a model is given
    "messages": lambda path: [row.text for row in read_messages(path)],
    "instructions": lambda path: [asked(row) for row in read_pairs(path)],
}


class Row(NamedTuple):
    """One requirement of the gate and what was found."""

    model: str  # or what the requirement is about
    what: str
    needs: str
    found: str
    verdict: Verdict


def row(model: str, what: str, needs: str, found: str, passes: bool) -> Row:
    return Row(model, what, needs, found, "passes" if passes else "falls short")


def check_thresholds(params: ReleaseParams, metrics: Mapping[str, Any], models: Sequence[str]) -> Iterator[Row]:
    """Check the figures of an evaluation: the end of the interval that is worse, or the value where there is none."""
    for limits, end, sign, better in (
        (params.at_least, "low", ">=", lambda value, limit: value >= limit),
        (params.at_most, "high", "<=", lambda value, limit: value <= limit),
    ):
        for model in models:
            for metric, limit in limits.get(model, {}).items():
                found = metrics.get(model, {})
                value = found.get(f"{metric}_{end}", found.get(metric))
                what = f"{metric}, {end} end" if f"{metric}_{end}" in found else metric
                if value is None:
                    yield row(model, metric, f"{sign} {limit:g}", "not measured", False)
                else:
                    yield row(model, what, f"{sign} {limit:g}", f"{value:.4g}", better(value, limit))


def check_champion(model: str, results: Sequence[MetricComparison], allowed: Mapping[str, float]) -> Iterator[Row]:
    """Check that a model is not worse than the champion by more than is allowed, anywhere in the interval."""
    for result in results:
        name = result.metric.lower().replace(" ", "_")
        if name not in allowed:
            continue
        higher = result.metric not in ("bits per byte", "loss")
        worst = -result.low if higher else result.high
        found = f"{result.difference:+.4f} ({result.low:+.4f} to {result.high:+.4f}), {result.verdict}"
        yield row(
            model,
            f"{result.metric} beside the champion",
            f"worse by <= {allowed[name]:g}",
            found,
            worst <= allowed[name],
        )


def right_answers(found: Predictions) -> dict[str, bool]:
    """Return whether each example was answered rightly, by the digest of the example and its truth."""
    right = exact_matches(found.predicted, found.expected)
    examples = zip(found.keys, found.expected, right, strict=True)
    return {hashlib.sha256(json.dumps([key, truth]).encode()).hexdigest()[:32]: hit for key, truth, hit in examples}


def check_released(
    model: str, released: Mapping[str, bool], now: Predictions, allowed: Mapping[str, float]
) -> Iterator[Row]:
    """Check a model beside what the champion had right on the day of its release.

    Code that answers worse than it did then harms the champion of today too, so that both look alike.
    """
    ours = right_answers(now)
    shared = [key for key in ours if key in released]
    metric = "accuracy" if now.kind == "messages" else "exact match"
    if shared:
        a, b = ([float(side[key]) for key in shared] for side in (released, ours))
        for found in check_champion(model, compare([mean_metric(metric, a, b)]), allowed):
            yield found._replace(what=f"{found.what} as it was released")
    else:
        found_ = "another test set" if released else "no record of its answers"
        yield row(model, f"{metric} beside the champion as it was released", "the same examples", found_, True)


def check_lineage(model: str, folder: Path, card: Card | None) -> Iterator[Row]:
    """Check that a model folder is what its training wrote, with the tokenizer of its base."""
    if card is None:
        yield row(model, "card", "card.json", "none: an earlier version made the folder", False)
        return
    changed = [check for check in check_folder(folder, card.files) if check.state == "changed"]
    for check in changed:
        name = check.what.removeprefix("file ")
        kind = "tokenizer" if name in TOKENIZER_FILES else "template" if "template" in name else "file"
        kind = "config and template" if name == "config.json" else kind
        yield row(model, f"{kind} {name}", "as its training wrote it", check.reason or "changed since", False)
    if card.base is not None and card.base.carded:
        for name in TOKENIZER_FILES:
            ours, base = card.files.get(name), card.base.files.get(name)
            if base != ours:
                yield row(model, f"tokenizer {name}", "that of its base", "of another model", False)
    if not changed:
        yield row(model, "files", "as its training wrote them", "unchanged", True)


def check_predictions(model: str, reported: Predictions | None, now: Predictions) -> Row:
    """Check that the model still gives the predictions of the evaluation."""
    what, needs = "answers again", "those of reports/predictions"
    if reported is None:
        return Row(model, what, needs, "reports/predictions is not at hand", "not checked")
    before = dict(zip(zip(reported.keys, reported.expected, strict=True), reported.predicted, strict=True))
    after = dict(zip(zip(now.keys, now.expected, strict=True), now.predicted, strict=True))
    lacking = len(before.keys() ^ after.keys())
    if lacking:
        return row(model, what, needs, f"{lacking:,} examples are of another test set", False)
    other = sum(before[key].strip() != said.strip() for key, said in after.items())
    hint = "" if other <= DIFFERING * len(after) else ": template, tokenizer or weights changed since"
    return row(model, what, needs, f"{other:,} of {len(after):,} differ{hint}", not hint)


def check_locked(model: str, folder: Path, root: Path) -> Iterator[Row]:
    """Check that `dvc.lock` has this model, its training data as they are, and the figures as those of this model."""
    stages, path, md5 = locked_stages(root), f"models/{model}", path_md5(folder)
    if not stages:
        yield Row(model, "dvc.lock", "this model", "not at hand", "not checked")
        return
    maker = next((stage for stage in stages.values() if digest(stage, "outs", path) == md5), {})
    yield row(model, "dvc.lock", "this model", "this model" if maker else "other bytes; run `dvc repro`", bool(maker))
    evaluated, figures = stages.get("evaluate", {}), FIGURES.as_posix()
    own = digest(evaluated, "deps", path) == md5 and digest(evaluated, "outs", figures) == md5_of(root / FIGURES)
    yield row(model, figures, "of this model", "of this model" if own else "of another; run `dvc repro`", own)
    for entry in maker.get("deps", []):
        data = str(entry.get("path"))
        if data.startswith("data/") and (root / data).exists() and path_md5(root / data) != digest(maker, "deps", data):
            yield row(model, data, "as it was trained on", "changed since", False)


def folder_size(folder: Path) -> int:
    """Return the bytes of a folder's files."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def read_reported(path: Path) -> Predictions | None:
    """Read the predictions of the evaluation; None where they are not at hand."""
    if not path.is_file():
        return None
    rows = ((f"{path}, line {number}", each) for number, each in enumerate(read_lines(path), 1))
    return from_rows(rows, str(path), None)


def check_near_leaks(metrics: Mapping[str, Any], limit: float) -> Iterator[Row]:
    """Check the share of held-out examples that are nearly equal to trained ones, or stand in the corpus."""
    for name, model, count in (("messages", "classifier", "messages"), ("instructions", "instruct", "pairs")):
        audit, total = metrics.get(f"leaks_{name}_test", {}), metrics.get(model, {}).get(count)
        if "leaked" in audit and total:
            found = f"{audit['leaked']:,} of {total:,}"
            what = f"leaks: test {name} nearly equal or in the corpus"
            yield row("data", what, f"<= {100 * limit:g} %", found, audit["leaked"] <= limit * total)


def check_leaks(tokens: Path, metrics: Path, limit: int) -> Iterator[Row]:
    """Check that held-out examples are not among those that were trained on."""
    needs = f"<= {limit}"
    for name, read in READERS.items():
        train, test = (tokens / name / f"{split}.jsonl" for split in ("train", "test"))
        if not train.is_file() or not test.is_file():
            yield Row("data", f"leaks of {name}", needs, f"{tokens / name} is not at hand", "not checked")
            continue
        seen = {dedup_key(text) for text in read(train)}
        count = sum(dedup_key(text) in seen for text in read(test))
        yield row("data", f"leaks: test {name} in train", needs, f"{count:,}", count <= limit)
    for path in sorted(metrics.glob("*.json")):
        for key, value in leaves(read_json_object(path)):
            if LEAKED.search(key):
                yield row("data", f"leaks: {path.stem} {key}", needs, f"{value:g}", value <= limit)


def leaves(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """Yield the numbers of nested metrics by their dotted key."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from leaves(value, f"{prefix}{key}.")
        elif isinstance(value, int | float):
            yield f"{prefix}{key}", value


def check_cost(model: str, what: str, unit: str, ours: float, champion: float, allowed: float) -> Row:
    """Check speed or size beside the champion; `allowed` is a fraction of the champion's."""
    found = f"{ours:,.4g} {unit}, the champion {champion:,.4g}"
    return row(model, what, f"larger by <= {100 * allowed:g} %", found, ours <= champion * (1 + allowed))


def blocked(rows: Sequence[Row], strict: bool = True) -> list[Row]:
    """Return the rows that keep a model from release; without `strict` not those that nobody could check."""
    return [each for each in rows if each.verdict == "falls short" or (strict and each.verdict == "not checked")]


def to_markdown(rows: Sequence[Row]) -> str:
    """Return the table, what falls short first."""
    order = sorted(rows, key=lambda each: ("falls short", "not checked", "passes").index(each.verdict))
    lines = table(["model", "what", "needs", "found", "verdict"], [[escape(cell) for cell in each] for each in order])
    return "\n".join(lines)


def to_text(rows: Sequence[Row]) -> str:
    """Return a line for each row."""
    return "\n".join(
        f"{each.verdict:11}  {each.model}: {each.what}: {each.found} (needs {each.needs})" for each in rows
    )


def to_json(rows: Sequence[Row]) -> str:
    return json.dumps([each._asdict() for each in rows], ensure_ascii=False, indent=2) + "\n"


def read_metrics(path: Path) -> dict[str, Any]:
    """Read the figures of the evaluation; raise `InputError` where there are none."""
    if not path.is_file():
        raise InputError(f"{path}: missing, and the gate reads it; run `dvc repro`")
    return read_json_object(path, "run `dvc repro`")
