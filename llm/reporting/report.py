"""Write the Markdown report of an evaluation.

Text from models and data is escaped or stands in fenced blocks, so that it cannot become markup.
"""

from __future__ import annotations

import textwrap
from collections.abc import Collection, Mapping, Sequence

from llm.common.markdown import escape, fenced, table
from llm.evaluation.base.base_model import BaseResult
from llm.evaluation.base.slices import Slice
from llm.evaluation.classifier.classification import ClassifierResult
from llm.evaluation.comparison import ALPHA
from llm.evaluation.instruct.answer_form import task_forms
from llm.evaluation.instruct.instruction_following import InstructResult
from llm.evaluation.metrics import Interval, fold
from llm.evaluation.seeds import Spread
from llm.inference.classify import NO_TEXT
from llm.reporting.classifier_report import details_section
from llm.reporting.tables import ANSWERERS, CLASSIFIERS, KINDS_OF_TEXT, TEXT_MODELS

EASY = 0.95  # accuracy of a classical method above which a task says little about language models


def markdown(
    base: BaseResult,
    classifiers: ClassifierResult,
    instruct: InstructResult,
    sources: Mapping[str, str],
    pictures: Sequence[str],
    quotable: Collection[str],
    spreads: Mapping[str, Spread] | None = None,
) -> str:
    """Return the report. `sources` names the data of each kind, `pictures` the existing files of `figures/`.

    Texts are shown where all data they can come from is `quotable`: a model can recite its training text.
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
        *headlines(base, classifiers, instruct, spreads),
        *picture("training", "Losses and learning rates of the three trainings, over steps"),
        *_base_section(base, picture("bpb", "Bits per byte of each model"), "corpus" in quotable),
        *picture("token_losses", "Loss of each token under a held-out text: long bars are surprises"),
        *picture("attention", "Attention over held-out sentences, of the head that looks back farthest"),
        *_classifier_section(
            classifiers,
            picture("classifiers", "Accuracy of each classifier with its interval"),
            picture("confusion_roc", "Confusion matrix and ROC curves"),
        ),
        *_details(classifiers, picture("calibration", "Reliability, accuracy over coverage"), quotable),
        *_instruct_section(
            instruct,
            picture("instructions", "Exact match by task and model"),
            {"corpus", "instructions"} <= set(quotable),
        ),
    ]
    return "\n".join(lines).rstrip() + "\n"


def headlines(
    base: BaseResult,
    classifiers: ClassifierResult,
    instruct: InstructResult,
    spreads: Mapping[str, Spread] | None = None,
) -> list[str]:
    """Return the lines of the first table: each task beside its best alternative, and over several seeds."""
    bits = base.bpb()
    best = classifiers.best_classical()
    copied = instruct.best_alternative()
    rows = [
        [
            "predict text",
            f"{_bits(base, 'gpt', 3)} bits per byte",
            ", ".join(f"{TEXT_MODELS[name]} {bits[name]:.3f}" for name in ("ppm", "ngram", "xz") if name in bits),
            "-",
        ],
        [
            "label messages",
            f"accuracy {percent(classifiers.reports['gpt'].accuracy)}",
            f"{CLASSIFIERS[best]} {percent(classifiers.reports[best].accuracy)}",
            percent(classifiers.reports["scratch"].accuracy) if "scratch" in classifiers.reports else "-",
        ],
        [
            "follow instructions",
            f"exact match {percent(instruct.reports['gpt'].exact_match)}",
            f"{ANSWERERS[copied].removeprefix('GPT ')} {percent(instruct.reports[copied].exact_match)}",
            percent(instruct.reports["scratch"].exact_match) if "scratch" in instruct.reports else "-",
        ],
    ]
    header = ["task", "GPT", "best alternative", "the same GPT without pretraining"]
    if spreads:
        header.insert(2, "GPT over seeds: mean ± standard deviation (interval of the mean)")
        for row, name in zip(rows, ("bpb", "accuracy", "exact_match"), strict=True):
            row.insert(2, _over_seeds(spreads[name]) if name in spreads else "-")
    return table(header, rows)


def _over_seeds(s: Spread) -> str:
    return f"{100 * s.mean:.1f} % ± {100 * s.sd:.2f} ({100 * s.low:.1f}-{100 * s.high:.1f}), {len(s.values)} seeds"


SEED_HEADLINES = {
    "accuracy": "label messages, accuracy",
    "accuracy_scratch": "label messages without pretraining, accuracy",
    "exact_match": "follow instructions, exact match",
    "exact_match_scratch": "follow instructions without pretraining, exact match",
}


def seeds_section(spreads: Mapping[str, Spread]) -> str:
    """Return the section on finetunings with several seeds; empty where there was one."""
    if not spreads:
        return ""
    rows = [
        [
            SEED_HEADLINES[name],
            str(len(s.values)),
            f"{100 * s.mean:.1f} %",
            f"{100 * s.sd:.2f}",
            f"{100 * s.low:.1f}-{100 * s.high:.1f}",
            ", ".join(f"{100 * value:.1f}" for value in s.values),
        ]
        for name, s in spreads.items()
    ]
    header = ["finetuning", "seeds", "mean", "standard deviation", "95 % interval of the mean", "each seed"]
    lines = [
        "## Several seeds",
        "",
        "The finetunings were repeated with other seeds on the same base model. The intervals tell the chance of "
        "training, on this test part; those of the tables above tell the chance of the test part.",
        "",
        *table(header, rows),
        "",
    ]
    return "\n".join(lines)


def _base_section(base: BaseResult, picture: list[str], quotable: bool) -> list[str]:
    bits = base.bpb()
    rows = [
        [TEXT_MODELS["gpt"], _bits(base, "gpt"), f"{base.gpt.loss:.4f}", f"{base.gpt.perplexity:.2f}"],
        [TEXT_MODELS["ngram"], _bits(base, "ngram"), f"{base.ngram.loss:.4f}", f"{base.ngram.perplexity:.2f}"],
        *([TEXT_MODELS[name], f"{bits[name]:.4f}", "-", "-"] for name in ("xz", "ppm") if name in bits),
    ]
    lines = [
        "## Predicting text",
        "",
        f"{part(base.split)}: {base.n_bytes:,} bytes, {base.gpt.tokens:,} scored tokens. The GPT needs "
        f"{compare(bits['gpt'], bits['ngram'])} bits than an n-gram model and {compare(bits['gpt'], bits['xz'])} than "
        f"the compressor xz{_than_ppm(bits)}.",
        "",
        *table(["model", "bits per byte", "loss (nats per token)", "perplexity"], rows),
        *picture,
        "The n-gram model (interpolated Kneser-Ney) reads the same tokens; xz and PPM, which predicts bytes from up to "
        "24 before them, read the training text first. "
        f"All read {_share(base.baseline_bytes, base.train_bytes)}. The separator behind each document is predicted "
        "and paid for by all (for the compressors it is a zero byte), but counts no byte. The first token is given "
        "to the GPT and the n-gram model alone.",
        "",
        *_slices_section(base),
    ]
    if base.completions and not quotable:
        return [*lines, "### Completions", "", withheld("completions", "the corpus"), ""]
    if base.completions:
        lines += ["### Completions", "", "The likeliest words, then a sample at temperature 0.8.", ""]
    for completion in base.completions:
        parts = {"prompt": completion.prompt, "likeliest": completion.greedy, "sample": completion.sampled}
        lines += fenced(in_column(parts))
    return lines


def _bits(base: BaseResult, model: str, digits: int = 4) -> str:
    figure = None if base.slices is None else base.slices.whole.bpb[model]
    return bits_figure(figure if isinstance(figure, Interval) else base.bpb()[model], digits)


def _slices_section(base: BaseResult) -> list[str]:
    """Say what kinds of text and which positions in the context the bits go to."""
    if base.slices is None:
        return []
    names, whole = ("gpt", "ngram"), base.slices.whole.n_bytes

    def rows(slices: Sequence[Slice], shown: Mapping[str, str]) -> list[list[str]]:
        return [
            [shown.get(s.name, s.name), f"{100 * s.n_bytes / whole:.1f} %", *(bits_figure(s.bpb[m]) for m in names)]
            for s in slices
        ]

    header = ["share of the bytes", *(f"bits per byte, {TEXT_MODELS[name]}" for name in names)]
    return [
        "### By kind of text and by position",
        "",
        "The kind is told by form alone, and the separator counts to what stands before it. The intervals are from a "
        "bootstrap of whole documents (of long ones in blocks), so they hold for other documents like these.",
        "",
        *table(["kind", *header], rows(base.slices.kinds, KINDS_OF_TEXT)),
        "By how many tokens stand before a token in the context, which can be those of earlier documents. The GPT "
        "reads windows side by side here; the n-gram model reads on across them:",
        "",
        *table(["tokens before", *header], rows(base.slices.positions, {})),
    ]


def _than_ppm(bits: Mapping[str, float]) -> str:
    return f", and {compare(bits['gpt'], bits['ppm'])} than PPM" if "ppm" in bits else ""


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
    if len(result.labels) == 2:
        means = f"Precision, recall and F1 are those of {escape(result.labels[-1])}."
    else:
        means = "Precision, recall, F1 and ROC-AUC are means over the labels, each against the rest."
    return [
        "## Labelling messages",
        "",
        f"{part(result.split)}: {len(result.actual):,} messages, after training on {result.train_rows:,}. {means} "
        "Where two intervals overlap widely, the difference may be chance. Classical methods have their settings from "
        "the val part.",
        "",
        *table(["classifier", "accuracy", "precision", "recall", "F1", "ROC-AUC"], rows),
        *_against_best(result),
        *_doubts(result),
        *comparison,
        *details,
        "GPT's figures for each label:",
        "",
        *_label_table(result),
    ]


def _against_best(result: ClassifierResult) -> list[str]:
    """Say in words how GPT stands beside the best classical method, and whether the task is easy for that."""
    best = result.best_classical()
    accuracy = result.reports[best].accuracy.value
    only_best, only_gpt, p = result.paired(best, "gpt")
    if p >= ALPHA:
        verdict = "GPT and it are not to be told apart"
    else:
        verdict = f"GPT is {'better' if only_gpt > only_best else 'worse'}"
    lines = [
        f"The best classical method is {CLASSIFIERS[best]}. {verdict}: GPT alone has {only_gpt} messages right, "
        f"it alone {only_best} (exact McNemar test, p = {p:.2g})."
    ]
    if accuracy >= EASY or (p >= ALPHA or only_best > only_gpt):
        share = f"{100 * accuracy:.1f} %"
        lines.append(
            f"A method that counts gets {share} right: these messages are easy for it, and show little of what a "
            "language model is for."
        )
    return [" ".join(lines), ""]


def _details(result: ClassifierResult, picture: list[str], quotable: Collection[str]) -> list[str]:
    if result.details is None:
        return []
    return details_section(result.details, result.best_classical(), picture, "messages" in quotable)


def _doubts(result: ClassifierResult) -> list[str]:
    doubtful = [doubt for doubt in result.doubts if doubt is not None]
    if not doubtful:
        return []
    empty = doubtful.count(NO_TEXT)
    return [
        f"In doubt: {empty} of the messages hold no letter, digit or sign, and {len(doubtful) - empty} are unlike the "
        "text that the tokenizer knows. Their labels mean little, right or wrong; "
        "`reports/predictions/messages.jsonl` marks them.",
        "",
    ]


def _label_table(result: ClassifierResult) -> list[str]:
    header, areas = ["label", "messages", "precision", "recall", "F1"], result.reports["gpt"].label_auc
    rows = [
        [escape(label), str(s.rows), f"{s.precision:.3f}", f"{s.recall:.3f}", f"{s.f1:.3f}"]
        for label, s in result.reports["gpt"].per_label.items()
    ]
    if len(result.labels) > 2:
        header.append("ROC-AUC against the rest")
        for row, label in zip(rows, result.labels, strict=True):
            row.append(f"{areas[label]:.4f}" if label in areas else "-")
    return table(header, rows)


def _instruct_section(result: InstructResult, picture: list[str], quotable: bool) -> list[str]:
    rows = [
        [
            ANSWERERS[name],
            percent(r.exact_match),
            f"{r.rouge_l:.3f}",
            f"{r.chrf:.1f}",
            f"{result.losses[name].loss_per_char:.3f}" if name in result.losses else "-",
        ]
        for name, r in result.reports.items()
    ]
    nearest = (
        ["The nearest training pair, by TF-IDF of instruction and input, lends its answer as it is.", ""]
        if "nearest" in result.reports
        else []
    )
    lines = [
        "## Following instructions",
        "",
        f"{part(result.split)}: {result.reports['gpt'].rows:,} pairs, prompted with the {result.template} template "
        "(a base model that knew another: with its own) and answered without sampling. Exact match ignores nothing but "
        "white space; ROUGE-L (0 to 1) compares words, chrF (0 to 100) characters. Nats per character: how surprising "
        "the expected response is to the model.",
        "",
        *table(["model", "exact match", "ROUGE-L", "chrF", "nats per character"], rows),
        *nearest,
        *picture,
    ]
    if result.tasks["gpt"]:
        lines += _task_table(result)
    lines += _turns(result)
    if result.examples:
        lines += _form_section(result)
    if result.shown and not quotable:
        return [*lines, "### Answers", "", withheld("instructions", "the corpus or the instructions"), ""]
    return [*lines, *_answers(result)] if result.shown else lines


def _turns(result: InstructResult) -> list[str]:
    """Say what the history of a conversation is worth, where there are conversations."""
    if result.turns is None:
        return []
    rows = [
        ["the last answer, as the conversation goes", percent(result.turns.with_history.exact_match)],
        ["the same question without what was said before", percent(result.turns.without_history.exact_match)],
    ]
    if result.turns.single is not None:
        rows.append(["the pairs that are no conversation", percent(result.turns.single.exact_match)])
    return [
        "### Conversations",
        "",
        f"{result.turns.with_history.rows:,} of the pairs are the last question and answer of a conversation with "
        "several. The difference is what the model takes from its history.",
        "",
        *table(["GPT is asked", "exact match"], rows),
    ]


def _task_table(result: InstructResult) -> list[str]:
    others = [name for name in result.tasks if name != "gpt"]
    exact_matches = [f"exact match, {ANSWERERS[name].removeprefix('GPT ')}" for name in others]
    rows = [
        [
            escape(task),
            str(r.rows),
            percent(r.exact_match),
            f"{r.rouge_l:.3f}",
            f"{r.chrf:.1f}",
            *(percent(result.tasks[name][task].exact_match) for name in others),
        ]
        for task, r in result.tasks["gpt"].items()
    ]
    return table(["task", "pairs", "exact match", "ROUGE-L", "chrF", *exact_matches], rows)


def _form_section(result: InstructResult) -> list[str]:
    """Say how long the answers are, how they end, and whether they keep to the form of their task."""
    reports = result.forms()
    forms = task_forms([each.pair.output for each in result.examples], [each.pair.task for each in result.examples])
    kinds = ", ".join(f"{escape(task)}: {form}" if task else f"all: {form}" for task, form in forms.items())
    rows = [
        [
            ANSWERERS[name],
            f"{r.words:.1f}",
            f"{100 * r.repetition:.1f} %",
            "-" if r.stopped is None else percent(r.stopped),
            "-" if r.valid is None else percent(r.valid),
        ]
        for name, r in reports.items()
    ]
    return [
        f"The form of the answers, of which the expected ones have {next(iter(reports.values())).expected_words:.1f} "
        "words. Repeated: passages of 4 words that stood in the answer before. A task has a form where all its "
        f"expected answers share one ({kinds or 'none does here'}).",
        "",
        *table(["model", "words", "repeated", "ended by a stop token", "in the form of the task"], rows),
    ]


def _answers(result: InstructResult) -> list[str]:
    lines = [
        f"### {len(result.shown)} answers to read",
        "",
        "Taken at even distances from all pairs sorted by task, not by quality. A `=` marks an exact match.",
        "",
    ]
    for example in (result.examples[i] for i in result.shown):
        *before, _, _ = example.pair.messages or [{}, {}]
        parts = {
            "said before": "\n".join(f"{message['role']}: {message['content']}" for message in before),
            "instruction": example.pair.instruction,
            "input": example.pair.input,
            "expected": example.pair.output,
        }
        for name, text in example.answers.items():
            same = fold(text) == fold(example.pair.output)
            parts[("= " if same else "  ") + ANSWERERS[name]] = text
        lines += fenced(
            in_column({label: text for label, text in parts.items() if text or label not in ("input", "said before")})
        )
    return lines


def withheld(name: str, data: str) -> str:
    """Say why texts are not shown, and where the owner finds them."""
    return f"Withheld: the source of {data} is not `quotable`. The texts are in `reports/predictions/{name}.jsonl`."


def in_column(parts: Mapping[str, str]) -> str:
    """Align wrapped texts behind their labels."""
    width = max(map(len, parts)) + 2
    lines = []
    for label, text in parts.items():
        wrapped = [piece for line in text.split("\n") for piece in textwrap.wrap(line, 90) or [""]]
        lines += [(label if i == 0 else "").ljust(width) + piece for i, piece in enumerate(wrapped)]
    return "\n".join(line.rstrip() for line in lines)


def part(split: str) -> str:
    """Describe a held-out split; `val` is second best, since the trainings kept the step that was best on it."""
    return (
        "The test part"
        if split == "test"
        else "The val part, on which the best step was chosen (there is no test part)"
    )


def percent(share: Interval) -> str:
    """Format a share with its interval: 97.3 % (95.9-98.2)."""
    return f"{100 * share.value:.1f} % ({100 * share.low:.1f}-{100 * share.high:.1f})"


def bits_figure(figure: Interval | float, digits: int = 4) -> str:
    """Format bits per byte, with the interval where there is one: 0.2908 (0.2790-0.3031)."""
    if isinstance(figure, Interval):
        return f"{figure.value:.{digits}f} ({figure.low:.{digits}f}-{figure.high:.{digits}f})"
    return f"{figure:.{digits}f}"


def compare(ours: float, theirs: float) -> str:
    change = 100 * (ours / theirs - 1) if theirs else 0.0
    return f"{abs(change):.1f} % {'more' if change > 0 else 'fewer'}"


def size(n_bytes: int) -> str:
    return f"{n_bytes / 1e6:.2f} MB" if n_bytes >= 1e5 else f"{n_bytes:,} bytes"


def _share(part: int, whole: int) -> str:
    return "all of the training text" if part >= whole else f"the first {size(part)} of {size(whole)} of training text"
