"""What an evaluation found, for people: one Markdown report with its pictures, and the files that DVC plots.

Everything written here is a function of the results: no time, no host, no version inside the pictures. Text that a
model or a data set wrote stands in fenced blocks or is escaped, so that it cannot become markup.
"""

from __future__ import annotations

import csv
import io
import json
import textwrap
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llm.common.markdown import escape, fenced, table
from llm.common.plotting import BASE, CONTROL, INK, OTHER, OURS, new_figure, save, shorten, style
from llm.evaluation.evaluate import BaseResult, ClassifierResult, InstructResult
from llm.evaluation.metrics import Interval, fold, numbers

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TEXT_MODELS = {"gpt": "GPT", "ngram": "n-gram model", "xz": "xz"}
CLASSIFIERS = {
    "gpt": "GPT",
    "scratch": "GPT without pretraining",
    "majority": "majority class",
    "filter": "hand-made filter",
    "naive_bayes": "naive Bayes",
    "tfidf": "TF-IDF + logistic regression",
}
ANSWERERS = {"gpt": "GPT", "base": "GPT before finetuning", "scratch": "GPT without pretraining"}
TRAININGS = {
    "pretrain": "Pretraining",
    "finetune_classify": "Finetuning: labels",
    "finetune_instruct": "Finetuning: instructions",
}


# ---- metrics and plot files ------------------------------------------------------------------------------------------


def metrics(base: BaseResult, classifiers: ClassifierResult, instruct: InstructResult) -> dict[str, Any]:
    """All figures, nested one level, for the metrics file."""
    bits = base.bpb()
    sections: dict[str, Any] = {
        "base": {
            "loss": base.gpt.loss,
            "perplexity": base.gpt.perplexity,
            "bpb": bits["gpt"],
            "tokens": base.gpt.tokens,
            "bytes": base.n_bytes,
        },
        "base_ngram": {
            "loss": base.ngram.loss,
            "perplexity": base.ngram.perplexity,
            "bpb": bits["ngram"],
        },
        "base_xz": {"bpb": bits["xz"]},
    }
    for name, report in classifiers.reports.items():
        section = "classifier" if name == "gpt" else f"classifier_{name}"
        sections[section] = {"messages": report.rows, **numbers(report)}
    for name, answers in instruct.reports.items():
        section = "instruct" if name == "gpt" else f"instruct_{name}"
        loss = instruct.losses[name]
        sections[section] = {
            "pairs": answers.rows,
            **numbers(answers),
            "loss": loss.per_token,
            "nats_per_character": loss.per_character,
        }
    if instruct.tasks["gpt"]:
        sections["instruct_tasks"] = {task: report.exact_match.value for task, report in instruct.tasks["gpt"].items()}
    return sections


def plot_files(base: BaseResult, classifiers: ClassifierResult, instruct: InstructResult) -> dict[str, str]:
    """The content of the CSV files that DVC plots, by name."""
    text = [{"model": TEXT_MODELS[name], "bpb": bits} for name, bits in base.bpb().items()]
    labels = [{"classifier": CLASSIFIERS[name], **numbers(report)} for name, report in classifiers.reports.items()]
    answers = [{"model": ANSWERERS[name], **numbers(report)} for name, report in instruct.reports.items()]
    tasks = [
        {"model": ANSWERERS[name], "task": task, "pairs": report.rows, **numbers(report)}
        for name, reports in instruct.tasks.items()
        for task, report in (reports or {"all": instruct.reports[name]}).items()
    ]
    confusion = [
        {"actual": actual, "predicted": predicted}
        for actual, predicted in zip(classifiers.actual, classifiers.predicted(), strict=True)
    ]
    roc = [
        {"false_positive_rate": float(x), "true_positive_rate": float(y)}
        for x, y in zip(*classifiers.roc.get("gpt", ([0.0, 1.0], [0.0, 1.0])), strict=True)
    ]
    files = {
        "bpb": text,
        "classifiers": labels,
        "confusion": confusion,
        "roc": roc,
        "instructions": answers,
        "per_task": tasks,
    }
    return {f"{name}.csv": to_csv(rows) for name, rows in files.items()}


def predictions(base: BaseResult, classifiers: ClassifierResult, instruct: InstructResult) -> dict[str, str]:
    """Return the JSON lines files with each prompt's completions and each held-out item's predictions, by name."""
    predicted = {name: classifiers.predicted(name) for name in classifiers.probabilities}
    messages = [
        {
            "text": text,
            "label": label,
            "predicted": {name: labels[i] for name, labels in predicted.items()},
            "probabilities": {
                label: round(float(p), 6)
                for label, p in zip(classifiers.labels, classifiers.probabilities["gpt"][i], strict=True)
            },
        }
        for i, (text, label) in enumerate(zip(classifiers.texts, classifiers.actual, strict=True))
    ]
    completions = [completion._asdict() for completion in base.completions]
    pairs = [{**example.pair._asdict(), "answers": example.answers} for example in instruct.examples]
    return {
        f"{name}.jsonl": "".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows)
        for name, rows in (("completions", completions), ("messages", messages), ("instructions", pairs))
    }


def to_csv(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows as CSV, numbers with 6 significant digits.

    DVC copies texts into the scripts of its page, where a `<` could end one: another sign stands for it.
    """
    columns = list(dict.fromkeys(column for row in rows for column in row))
    file = io.StringIO()
    writer = csv.DictWriter(file, columns, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({column: _csv_cell(value) for column, value in row.items()})
    return file.getvalue()


def _csv_cell(value: Any) -> Any:
    if isinstance(value, float):
        return f"{value:.6g}"
    return value.replace("<", "‹") if isinstance(value, str) else value


# ---- Markdown --------------------------------------------------------------------------------------------------------


def markdown(
    base: BaseResult,
    classifiers: ClassifierResult,
    instruct: InstructResult,
    sources: Mapping[str, str],
    pictures: Sequence[str],
    quotable: Collection[str],
) -> str:
    """The report. `sources` names the data of each kind, `pictures` the files of `figures/` that exist.

    Texts are shown where all data they can come from is `quotable`: a model can recite what it was trained on.
    """

    def picture(name: str, description: str) -> list[str]:
        return [f"![{description}](figures/{name}.png)", ""] if f"{name}.png" in pictures else []

    lines = [
        "# What the models learned",
        "",
        f"A GPT of {base.parameters:,} parameters was pretrained on {size(base.train_bytes)} of text "
        f"(source: {escape(sources['corpus'])}), then finetuned twice: to label messages "
        f"({escape(sources['messages'])}) and to follow instructions ({escape(sources['instructions'])}). All figures "
        "are on held-out data that no training and no baseline has learned from. Brackets hold 95 % intervals.",
        "",
        *_headlines(base, classifiers, instruct),
        *picture("training", "Losses of the three trainings, over steps"),
        *_base_section(base, picture("bpb", "Bits per byte of each model"), "corpus" in quotable),
        *_classifier_section(
            classifiers,
            picture("classifiers", "Accuracy of each classifier with its interval"),
            picture("confusion_roc", "Confusion matrix and ROC curves"),
        ),
        *_instruct_section(
            instruct,
            picture("instructions", "Exact match by task and model"),
            {"corpus", "instructions"} <= set(quotable),
        ),
    ]
    return "\n".join(lines).rstrip() + "\n"


def _headlines(base: BaseResult, classifiers: ClassifierResult, instruct: InstructResult) -> list[str]:
    bits = base.bpb()
    classical = {n: r for n, r in classifiers.reports.items() if n not in ("gpt", "scratch")}
    best = max(classical, key=lambda name: classical[name].accuracy.value)
    rows = [
        [
            "predict text",
            f"{bits['gpt']:.3f} bits per byte",
            f"n-gram model {bits['ngram']:.3f}, xz {bits['xz']:.3f}",
            "-",
        ],
        [
            "label messages",
            f"accuracy {percent(classifiers.reports['gpt'].accuracy)}",
            f"{CLASSIFIERS[best]} {percent(classical[best].accuracy)}",
            percent(classifiers.reports["scratch"].accuracy) if "scratch" in classifiers.reports else "-",
        ],
        [
            "follow instructions",
            f"exact match {percent(instruct.reports['gpt'].exact_match)}",
            f"before finetuning {percent(instruct.reports['base'].exact_match)}",
            percent(instruct.reports["scratch"].exact_match) if "scratch" in instruct.reports else "-",
        ],
    ]
    return table(["task", "GPT", "best alternative", "the same GPT without pretraining"], rows)


def _base_section(base: BaseResult, picture: list[str], quotable: bool) -> list[str]:
    bits = base.bpb()
    rows = [
        [TEXT_MODELS["gpt"], f"{bits['gpt']:.4f}", f"{base.gpt.loss:.4f}", f"{base.gpt.perplexity:.2f}"],
        [TEXT_MODELS["ngram"], f"{bits['ngram']:.4f}", f"{base.ngram.loss:.4f}", f"{base.ngram.perplexity:.2f}"],
        [TEXT_MODELS["xz"], f"{bits['xz']:.4f}", "-", "-"],
    ]
    lines = [
        "## Predicting text",
        "",
        f"{part(base.split)}: {base.n_bytes:,} bytes, {base.gpt.tokens:,} scored tokens. The GPT needs "
        f"{compare(bits['gpt'], bits['ngram'])} bits than an n-gram model and {compare(bits['gpt'], bits['xz'])} than "
        "the compressor xz.",
        "",
        *table(["model", "bits per byte", "loss (nats per token)", "perplexity"], rows),
        *picture,
        "The n-gram model (interpolated Kneser-Ney) reads the same tokens; xz has the training text as its dictionary. "
        f"Both read {_share(base.baseline_bytes, base.train_bytes)}. The separator behind each document is predicted "
        "and paid for by all three (for xz it is a zero byte), but counts no byte. The first token is given to the two "
        "models, not to xz.",
        "",
    ]
    if base.completions and not quotable:
        return [*lines, "### Completions", "", withheld("completions", "the corpus"), ""]
    if base.completions:
        lines += ["### Completions", "", "The likeliest words, then a sample at temperature 0.8.", ""]
    for completion in base.completions:
        parts = {"prompt": completion.prompt, "likeliest": completion.greedy, "sample": completion.sampled}
        lines += fenced(labelled(parts))
    return lines


def _classifier_section(result: ClassifierResult, comparison: list[str], details: list[str]) -> list[str]:
    rows = [
        [
            CLASSIFIERS[name],
            percent(r.accuracy),
            f"{r.precision:.3f}",
            f"{r.recall:.3f}",
            f"{r.f1:.3f}",
            "-" if r.roc_auc is None else f"{r.roc_auc:.4f}",
        ]
        for name, r in result.reports.items()
    ]
    per_label = [
        [escape(label), str(s.rows), f"{s.precision:.3f}", f"{s.recall:.3f}", f"{s.f1:.3f}"]
        for label, s in result.reports["gpt"].per_label.items()
    ]
    if len(result.labels) == 2:
        means = f"Precision, recall and F1 are those of {escape(result.labels[-1])}."
    else:
        means = "Precision, recall, F1 and ROC-AUC are means over the labels."
    return [
        "## Labelling messages",
        "",
        f"{part(result.split)}: {len(result.actual):,} messages, after training on {result.train_rows:,}. {means} "
        "Where two intervals overlap widely, the difference may be chance.",
        "",
        *table(["classifier", "accuracy", "precision", "recall", "F1", "ROC-AUC"], rows),
        *comparison,
        *details,
        "GPT's figures for each label:",
        "",
        *table(["label", "messages", "precision", "recall", "F1"], per_label),
    ]


def _instruct_section(result: InstructResult, picture: list[str], quotable: bool) -> list[str]:
    rows = [
        [
            ANSWERERS[name],
            percent(r.exact_match),
            f"{r.rouge_l:.3f}",
            f"{r.chrf:.1f}",
            f"{result.losses[name].per_character:.3f}",
        ]
        for name, r in result.reports.items()
    ]
    lines = [
        "## Following instructions",
        "",
        f"{part(result.split)}: {result.reports['gpt'].rows:,} pairs, prompted with the {result.template} template "
        "(a base model that knew another: with its own) and answered without sampling. Exact match ignores nothing but "
        "white space; ROUGE-L (0 to 1) compares words, chrF (0 to 100) characters. Nats per character: how surprising "
        "the expected response is to the model.",
        "",
        *table(["model", "exact match", "ROUGE-L", "chrF", "nats per character"], rows),
        *picture,
    ]
    if tasks := result.tasks["gpt"]:
        others = [name for name in result.tasks if name != "gpt"]
        lines += table(
            [
                "task",
                "pairs",
                "exact match",
                "ROUGE-L",
                "chrF",
                *(f"exact match, {ANSWERERS[name].removeprefix('GPT ')}" for name in others),
            ],
            [
                [
                    escape(task),
                    str(r.rows),
                    percent(r.exact_match),
                    f"{r.rouge_l:.3f}",
                    f"{r.chrf:.1f}",
                    *(percent(result.tasks[name][task].exact_match) for name in others),
                ]
                for task, r in tasks.items()
            ],
        )
    if result.shown and not quotable:
        return [*lines, "### Answers", "", withheld("instructions", "the corpus or the instructions"), ""]
    if result.shown:
        lines += [
            f"### {len(result.shown)} answers to read",
            "",
            "Taken at even distances from all pairs sorted by task, not by quality. A `=` marks an exact match.",
            "",
        ]
    for example in (result.examples[i] for i in result.shown):
        parts = {"instruction": example.pair.instruction, "input": example.pair.input, "expected": example.pair.output}
        for name, text in example.answers.items():
            same = fold(text) == fold(example.pair.output)
            parts[("= " if same else "  ") + ANSWERERS[name]] = text
        lines += fenced(labelled({label: text for label, text in parts.items() if text or label != "input"}))
    return lines


def withheld(name: str, data: str) -> str:
    """Say why texts are not shown, and where the owner finds them."""
    return f"Withheld: the source of {data} is not `quotable`. The texts are in `reports/predictions/{name}.jsonl`."


def labelled(parts: Mapping[str, str]) -> str:
    """Texts behind their labels, wrapped, in one column."""
    width = max(map(len, parts)) + 2
    lines = []
    for label, text in parts.items():
        wrapped = [piece for line in text.split("\n") for piece in textwrap.wrap(line, 90) or [""]]
        lines += [(label if i == 0 else "").ljust(width) + piece for i, piece in enumerate(wrapped)]
    return "\n".join(line.rstrip() for line in lines)


def part(split: str) -> str:
    """Which held-out part it is; `val` is second best, since the trainings kept the step that was best on it."""
    return (
        "The test part"
        if split == "test"
        else "The val part, on which the best step was chosen (there is no test part)"
    )


def percent(share: Interval) -> str:
    """For example 97.3 % (95.9-98.2)."""
    return f"{100 * share.value:.1f} % ({100 * share.low:.1f}-{100 * share.high:.1f})"


def compare(ours: float, theirs: float) -> str:
    change = 100 * (ours / theirs - 1) if theirs else 0.0
    return f"{abs(change):.1f} % {'more' if change > 0 else 'fewer'}"


def size(n_bytes: int) -> str:
    return f"{n_bytes / 1e6:.2f} MB" if n_bytes >= 1e5 else f"{n_bytes:,} bytes"


def _share(part: int, whole: int) -> str:
    return "all of the training text" if part >= whole else f"the first {size(part)} of {size(whole)} of training text"


# ---- pictures --------------------------------------------------------------------------------------------------------

COLOURS = {"gpt": OURS, "base": BASE, "scratch": CONTROL}


def draw_trainings(plots: Path, path: Path) -> None:
    """The losses of the trainings, from the files that they left in `plots`."""
    histories = {}
    for stage in TRAININGS:
        if (file := plots / f"{stage}.csv").is_file():
            with file.open(encoding="utf-8") as lines:
                histories[stage] = list(csv.DictReader(lines))
    with style():
        figure = new_figure(10, 3.2)
        for axes, (stage, rows) in zip(
            figure.subplots(1, len(histories), squeeze=False)[0], histories.items(), strict=True
        ):
            steps = [float(row["step"]) for row in rows]
            marker = "o" if len(rows) < 25 else ""
            for column, colour, label in (("train/loss", OTHER, "train"), ("val/loss", OURS, "val")):
                values = [float(row[column]) for row in rows]
                axes.plot(steps, values, color=colour, label=label, marker=marker, markersize=3)
            axes.set(title=TRAININGS[stage], xlabel="step", ylim=(0, None))
            axes.legend()
        figure.axes[0].set_ylabel("loss (nats)")
        save(figure, path)


def draw_bits_per_byte(result: BaseResult, path: Path) -> None:
    bits = result.bpb()
    with style():
        figure = new_figure(7, 2.2)
        axes = figure.subplots()
        bars = axes.barh(
            [TEXT_MODELS[n] for n in bits], list(bits.values()), color=[COLOURS.get(n, OTHER) for n in bits]
        )
        axes.bar_label(bars, fmt="%.3f", padding=4)
        axes.set(title="Held-out text: bits per byte, less is better", xlim=(0, 1.12 * max(bits.values())))
        axes.invert_yaxis()
        axes.grid(axis="y", visible=False)
        save(figure, path)


def draw_classifiers(result: ClassifierResult, path: Path) -> None:
    reports = dict(sorted(result.reports.items(), key=lambda item: -item[1].accuracy.value))
    with style():
        figure = new_figure(8, 0.6 + 0.42 * len(reports))
        axes = figure.subplots()
        for y, (name, report) in enumerate(reports.items()):
            value, low, high = (100 * x for x in report.accuracy)
            colour = COLOURS.get(name, "#6d7783")
            axes.plot([low, high], [y, y], color=colour, linewidth=3, alpha=0.45, solid_capstyle="round")
            axes.plot(value, y, "o", color=colour, markersize=8)
            axes.annotate(f"{value:.1f}", (high, y), xytext=(8, 0), textcoords="offset points", va="center")
        axes.set_yticks(range(len(reports)), [CLASSIFIERS[name] for name in reports])
        axes.set(title="Accuracy on held-out messages in %, with 95 % intervals")
        axes.margins(x=0.1)
        axes.invert_yaxis()
        save(figure, path)


def draw_confusion_roc(result: ClassifierResult, path: Path) -> None:
    labels = [shorten(label) for label in result.labels]
    counts = result.reports["gpt"].confusion
    shares = counts / counts.sum(axis=1, keepdims=True).clip(min=1)
    with style():
        figure = new_figure(10, 4.2)
        left, right = figure.subplots(1, 2)
        left.imshow(shares, cmap="Blues", vmin=0, vmax=1)
        left.set_xticks(range(len(labels)), labels, rotation=0 if len(labels) < 5 else 90)
        left.set_yticks(range(len(labels)), labels)
        left.set(title="GPT: which label became which", xlabel="predicted", ylabel="actual")
        left.grid(visible=False)
        if len(labels) <= 12:
            for (i, k), count in _cells(counts):
                left.text(k, i, f"{count}", ha="center", va="center", color="white" if shares[i, k] > 0.5 else INK)

        for name, (x, y) in reversed(result.roc.items()):
            auc = result.reports[name].roc_auc
            ours = name in COLOURS
            label = f"{CLASSIFIERS[name]}, area {auc:.4f}" if auc is not None else CLASSIFIERS[name]
            right.plot(x, y, label=label, **_curve(name, bold=ours))
        of = f"of {labels[-1]}" if len(labels) == 2 else "over all labels"
        right.set(title=f"ROC curve {of}", xlabel="false positive rate", ylabel="true positive rate")
        handles, names = right.get_legend_handles_labels()
        if handles:
            right.legend(handles[::-1], names[::-1], loc="lower right", fontsize=9)
        save(figure, path)


def _cells(counts: Any) -> list[tuple[tuple[int, int], int]]:
    return [((i, k), int(counts[i, k])) for i in range(counts.shape[0]) for k in range(counts.shape[1])]


def _curve(name: str, bold: bool) -> dict[str, Any]:
    dashes = {"majority": ":", "filter": "--", "naive_bayes": "-.", "tfidf": "-"}
    return {
        "color": COLOURS.get(name, "#7d8793"),
        "linewidth": 2.2 if bold else 1.2,
        "linestyle": dashes.get(name, "-"),
    }


def draw_instructions(result: InstructResult, path: Path) -> None:
    """Exact match of all pairs and of each task, a bar for each model."""
    groups = ["all", *result.tasks["gpt"]]
    height = 0.8 / len(result.reports)
    with style():
        figure = new_figure(8, 1.2 + 0.2 * len(result.reports) * len(groups))
        axes: Axes = figure.subplots()
        for k, (name, overall) in enumerate(result.reports.items()):
            shares = [overall.exact_match, *(report.exact_match for report in result.tasks[name].values())]
            places = [i + k * height for i in range(len(groups))]
            bars = axes.barh(
                places, [100 * s.value for s in shares], height, color=COLOURS[name], label=ANSWERERS[name]
            )
            axes.bar_label(bars, fmt="%.0f", padding=3, fontsize=8)
        axes.set_yticks([i + 0.4 - height / 2 for i in range(len(groups))], [shorten(group) for group in groups])
        axes.set(title="Held-out instructions answered exactly, in %", xlim=(0, 106))
        axes.margins(y=0.02)
        axes.invert_yaxis()
        axes.grid(axis="y", visible=False)
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -24 / (72 * figure.get_figheight())), ncols=3, fontsize=9)
        save(figure, path)
