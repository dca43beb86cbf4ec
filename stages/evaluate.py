"""Evaluate the three models on held-out data: `models/`, `data/tokens/` to `reports/`; registers them.

The figures are written first. The pictures and the registration come later and can fail without losing them.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from llm.audit.describe import to_dict
from llm.audit.leakage import Audit
from llm.checkpoint.folder import Checkpoint, load_checkpoint
from llm.common.device import pick_device
from llm.common.files import write_atomic
from llm.data.examples import read_quotable, read_too_long
from llm.evaluation import seeds
from llm.evaluation.base.base_model import BaseResult, evaluate_base
from llm.evaluation.base.inside import Inside, look_inside
from llm.evaluation.classifier.classification import ClassifierResult, evaluate_classifiers
from llm.evaluation.classifier.learning_curve import gpt_curve
from llm.evaluation.instruct.instruction_following import InstructResult, evaluate_instruct
from llm.evaluation.leakage import audit_tokens, clean_headlines
from llm.reporting import classifier_pictures, curves, leakage, page, pictures, report, tables, text_pictures
from stages.runtime.run import Run, main, resource_error, rounded

logger = logging.getLogger("llm")
MODELS, TOKENS, REPORTS = Path("models"), Path("data/tokens"), Path("reports")
FIGURES = REPORTS / "figures"
TABLES = ("bpb", "classifiers", "instructions", "per_task")  # of reports/plots, which MLflow compares
TIME_LINE = (
    "How long each stage took, on what, and how many tokens a second it read differs from run to run and so is not in "
    "here: `python -m stages.timeline` draws it to `.work/timeline.png` and `.work/training.png`, and MLflow has both "
    "beside the run."
)
NEXT = (
    "Open reports/report.html. Talk to the model: python -m llm chat models/instruct",
    "Compare runs: MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false mlflow ui --backend-store-uri sqlite:///mlflow.db",
)


def evaluate(run: Run) -> None:
    params, section = run.params, run.params.evaluate
    device = pick_device(params.runtime.device)

    def models(**names: str) -> dict[str, Checkpoint]:
        """Load the named model folders, without that of a from-scratch baseline that was not trained."""
        folders = {key: MODELS / name for key, name in names.items()}
        with run.phase("data"):
            return {
                key: load_checkpoint(folder, device)
                for key, folder in folders.items()
                if key != "scratch" or (folder / "config.json").is_file()
            }

    with run.phase("evaluation"):
        base_folder = models(base="base")["base"]
        base = evaluate_base(base_folder, TOKENS / "corpus", section, params.seed)
        inside = look_inside(base_folder, TOKENS / "corpus") if "corpus" in read_quotable(TOKENS) else None
        curve = partial(gpt_curve, base_folder, params.finetune_classify, params.runtime, params.seed)
        classifiers = evaluate_classifiers(
            models(gpt="classifier", scratch="classifier_scratch"),
            TOKENS / "messages",
            section.batch_size,
            robustness=section.robustness,
            curve=curve if section.learning_curve else None,
        )
        instruct_models = models(gpt="instruct", scratch="instruct_scratch")
        template = instruct_models["gpt"].config.template or params.finetune_instruct.template
        order = {"gpt": instruct_models["gpt"], "base": base_folder, **instruct_models}
        instruct = evaluate_instruct(order, template, TOKENS / "instructions", section)
        audit = audit_tokens(TOKENS, base_folder.tokenizer, section)
        spreads = spread_of_seeds(run, tables.headlines(base, classifiers, instruct), device)
    with run.phase("saving"):
        write_reports(run, Results(base, classifiers, instruct, audit, inside, spreads))
    for line in [*report.headlines(base, classifiers, instruct, spreads), *NEXT]:
        logger.info(line)
    for path in (REPORTS / "report.html", REPORTS / "report.md", FIGURES):
        optional(f"artifact {path}", partial(run.artifact, path))
    for path in [REPORTS / "plots" / f"{name}.csv" for name in TABLES] + quotable_predictions():
        optional(f"table {path}", partial(run.table, path))


def spread_of_seeds(run: Run, headlines: Mapping[str, float], device: torch.device) -> dict[str, seeds.Spread]:
    """Return the headlines' spread over the seeds of the finetunings; empty where there is one seed."""
    section, template = run.params.evaluate, run.params.finetune_instruct.template
    further: dict[str, list[float]] = {}
    for suffix in ("", "_scratch"):
        labels, answers = (seeds.repeated(MODELS / f"{name}_seeds", suffix) for name in ("classifier", "instruct"))
        further[f"accuracy{suffix}"] = seeds.accuracies(labels, TOKENS / "messages", section.batch_size, device)
        further[f"exact_match{suffix}"] = seeds.exact_matches(
            answers, template, TOKENS / "instructions", section, device
        )
    return seeds.spreads(headlines, further)


class Results(NamedTuple):
    """All that the evaluation found; `inside` is None where the corpus may not be quoted."""

    base: BaseResult
    classifiers: ClassifierResult
    instruct: InstructResult
    audit: Audit
    inside: Inside | None
    spreads: Mapping[str, seeds.Spread]


def write_reports(run: Run, results: Results) -> None:
    base, classifiers, instruct, audit, inside, spreads = results
    quotable = read_quotable(TOKENS)
    clean = clean_headlines(audit, base, classifiers, instruct)
    run.write_metrics(
        tables.metrics(base, classifiers, instruct) | leakage.metrics(audit, clean) | tables.seed_metrics(spreads)
    )
    headlines = rounded(tables.headlines(base, classifiers, instruct))
    write_atomic(REPORTS / "metrics" / "headlines.json", json.dumps(headlines, indent=2) + "\n")
    for name in ("base", "classifier", "instruct"):  # which takes MLflow seconds, while the rest is written
        optional(f"registration of {name}", partial(run.register, f"llm-{name}", MODELS / name))
    for name, content in tables.plot_files(base, classifiers, instruct).items():
        write_atomic(REPORTS / "plots" / name, content)
    for name, content in tables.predictions(base, classifiers, instruct).items():
        write_atomic(REPORTS / "predictions" / name, content)

    leaks = json.dumps(to_dict(audit, quotable), ensure_ascii=False, indent=2)
    write_atomic(REPORTS / "predictions" / "leaks.json", leaks + "\n")

    FIGURES.mkdir(parents=True, exist_ok=True)
    drawings: dict[str, Callable[[Path], None]] = {
        "training": partial(curves.draw_trainings, REPORTS / "plots"),
        "bpb": partial(pictures.draw_bpb, base),
        "classifiers": partial(pictures.draw_classifiers, classifiers),
        "confusion_roc": partial(pictures.draw_confusion_roc, classifiers),
        "instructions": partial(pictures.draw_instructions, instruct),
    }
    if inside is not None:
        drawings["token_losses"] = partial(text_pictures.draw_token_losses, inside)
        drawings["attention"] = partial(text_pictures.draw_attention, inside)
    if classifiers.details is not None:
        drawings["calibration"] = partial(classifier_pictures.draw_calibration, classifiers.details)
    for name, draw in drawings.items():
        optional(f"picture {name}", partial(draw, FIGURES / f"{name}.png"))

    def write_report() -> None:
        drawn = [path.name for path in FIGURES.glob("*.png")]
        text = report.markdown(base, classifiers, instruct, run.params.data.model_dump(), drawn, quotable, spreads)
        text += "\n" + "\n".join(leakage.section(audit, clean, quotable))
        more = report.seeds_section(spreads) + too_long_section(read_too_long(TOKENS))
        write_atomic(REPORTS / "report.md", f"{text}\n{more}{TIME_LINE}\n")

    def write_page() -> None:
        card, versions = REPORTS / "data_card.md", Path("constraints.txt")
        content = page.page(REPORTS / "report.md", card, versions, quotable_predictions())
        write_atomic(REPORTS / "report.html", content)

    for name, write in {"report.md": write_report, "report.html": write_page}.items():
        write_atomic(REPORTS / name, "The report was left out; the figures are in metrics/evaluate.json.\n")
        optional(name, write)


def quotable_predictions() -> list[Path]:
    """Return the files of predictions whose texts may be shown; an answer can recite the corpus."""
    kinds = {"messages": {"messages"}, "instructions": {"corpus", "instructions"}}
    quotable = set(read_quotable(TOKENS))
    return [REPORTS / "predictions" / f"{name}.jsonl" for name, needed in kinds.items() if needed <= quotable]


def too_long_section(cards: Mapping[str, Any]) -> str:
    """Return the report's section on texts that were too long for their training; empty where none was."""
    lines = [
        f"- {kind}, longer than the {card['limit']:,} tokens of `{card['key']}`: "
        + "; ".join(f"{name} {n['cut']:,} cut, {n['dropped']:,} dropped" for name, n in card["splits"].items())
        for kind, card in cards.items()
    ]
    return "\n".join(["## Texts that were too long", "", *lines, "", ""]) if lines else ""


def optional(name: str, action: Callable[[], None]) -> None:
    """Run an optional action; a failure is a warning.

    A lack of disk or memory is an error: the same succeeds later, so the stage must not count as done without it.
    """
    try:
        action()
    except Exception as error:
        if resource_error(error):
            raise
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        logger.warning("evaluate: %s left out: %s", name, reason)


if __name__ == "__main__":
    main("evaluate", evaluate)
