"""The evaluations on tiny models, and the report: what it says, that it is the same twice, that text stays text."""

from __future__ import annotations

import csv
import io
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from llm.checkpoint.folder import Checkpoint, CheckpointConfig
from llm.common.errors import InputError
from llm.config import KINDS, EvaluateParams
from llm.data.examples import Pair
from llm.evaluation import report
from llm.evaluation.evaluate import (
    BaseResult,
    ClassifierResult,
    Completion,
    Example,
    InstructResult,
    ResponseLoss,
    evaluate_base,
    evaluate_classifiers,
    evaluate_instruct,
    response_loss,
    text_bytes,
)
from llm.evaluation.metrics import answer_report, by_task, classification_report, roc_points
from llm.inference.score import Score
from llm.model.classifier import GPTClassifier
from llm.model.gpt import GPT
from llm.tokenizer.bpe import Tokenizer
from llm.tokenizer.prompts import encode_prompt
from stages import evaluate as stage
from tests.helpers import SHIPPED_FORM, gpt_config

EVIL = "</details><script>alert(1)</script> ![x](http://e.com/x.png) | `a` ```` $x$ \x1b[31m\u202e"
TEXTS = ["the cat sat on the mat", "a dog ran to the cat", "the mat is red", "a red dog sat", "the cat ran"] * 8


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(TEXTS, 280)


def make_gpt(tokenizer: Tokenizer) -> GPT:
    torch.manual_seed(0)
    config = gpt_config(**SHIPPED_FORM, context_length=256, vocab_size=tokenizer.vocab_size)
    return GPT(config).eval()


def make_folder(tokenizer: Tokenizer, kind: str = "base", labels: list[str] | None = None) -> Checkpoint:
    gpt = make_gpt(tokenizer)
    model = GPTClassifier(gpt, len(labels)).eval() if labels else gpt
    config = CheckpointConfig(kind=kind, gpt=gpt.config, labels=labels, max_length=32 if labels else None)
    return Checkpoint(model, tokenizer, config)


def params(**changes: object) -> EvaluateParams:
    values: dict[str, object] = {
        "test_tokens": 1000,
        "ngram_order": 3,
        "baseline_bytes": 10**6,
        "max_new_tokens": 4,
        "batch_size": 3,
        "report_samples": 2,
        "prompts": ["the cat", ""],
    }
    return EvaluateParams.model_validate(values | changes)


def write_corpus(folder: Path, tokenizer: Tokenizer, splits: dict[str, list[str]]) -> None:
    folder.mkdir()
    meta = {}
    for split, texts in splits.items():
        ids = [t for text in texts for t in [*tokenizer.encode(text), tokenizer.eot]]
        np.array(ids, dtype="<u2").tofile(folder / f"{split}-00000.bin")
        n_bytes = sum(len(text.encode()) for text in texts)
        meta[split] = {"shards": [f"{split}-00000.bin"] if ids else [], "tokens": len(ids), "bytes": n_bytes}
    content = {"dtype": "uint16", "vocab_size": tokenizer.vocab_size, "splits": meta}
    (folder / "meta.json").write_text(json.dumps(content))


def write_rows(path: Path, rows: list[dict[str, str]]) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


# ---- evaluations -----------------------------------------------------------------------------------------------------


def test_base_is_scored_on_the_bytes_without_separators(tmp_path: Path, tokenizer: Tokenizer) -> None:
    test = ["the dog ran to the mat", "café"]
    write_corpus(tmp_path / "corpus", tokenizer, {"train": TEXTS, "val": ["the cat"], "test": test})
    result = evaluate_base(make_folder(tokenizer), tmp_path / "corpus", params(), seed=1)
    assert result.split == "test"
    assert result.n_bytes == sum(len(text.encode()) for text in test)
    assert result.baseline_bytes == result.train_bytes == sum(map(len, TEXTS))
    n_tokens = sum(len(tokenizer.encode(text)) + 1 for text in test)  # separators are predicted
    assert result.gpt.tokens == result.ngram.tokens == n_tokens - 1
    assert result.gpt.loss == pytest.approx(math.log(tokenizer.vocab_size), rel=0.05)  # an untrained model guesses
    assert result.ngram.loss < 0.9 * result.gpt.loss
    assert [c.prompt for c in result.completions] == ["the cat", ""]
    assert result.bpb()["xz"] == pytest.approx(8 * result.xz_bytes / result.n_bytes)


def test_base_takes_val_without_a_test_part_and_limits_what_is_read(tmp_path: Path, tokenizer: Tokenizer) -> None:
    write_corpus(tmp_path / "corpus", tokenizer, {"train": TEXTS, "val": ["the cat sat on the mat"], "test": []})
    result = evaluate_base(
        make_folder(tokenizer), tmp_path / "corpus", params(test_tokens=4, baseline_bytes=100, prompts=[]), seed=1
    )
    assert result.split == "val"
    assert result.gpt.tokens == 3
    assert 50 < result.baseline_bytes < 200
    assert "no test part" in report.part(result.split)


def test_nothing_held_out_is_an_error(tmp_path: Path, tokenizer: Tokenizer) -> None:
    write_corpus(tmp_path / "corpus", tokenizer, {"train": TEXTS, "val": [], "test": []})
    with pytest.raises(InputError, match="neither test nor val"):
        evaluate_base(make_folder(tokenizer), tmp_path / "corpus", params(), seed=1)


def test_text_bytes_cuts_at_separators_only(tokenizer: Tokenizer) -> None:
    written = "the <|endoftext|> cat"  # somebody's text, no separator
    ids = np.array([*tokenizer.encode(written), tokenizer.eot, *tokenizer.encode("a dog")])
    assert text_bytes(tokenizer, ids) == [written.encode(), b"a dog"]


def test_classifiers_share_one_test_part(tmp_path: Path, tokenizer: Tokenizer) -> None:
    rows = [{"text": text, "label": "dog" if "dog" in text else "cat"} for text in TEXTS]
    folder = tmp_path / "messages"
    for split, part in (("train", rows), ("val", rows[:5]), ("test", rows[:10])):
        write_rows(folder / f"{split}.jsonl", part)
    (folder / "labels.json").write_text('["cat", "dog"]')
    classifier = make_folder(tokenizer, "classifier", ["cat", "dog"])
    result = evaluate_classifiers({"gpt": classifier}, folder, 4)
    assert list(result.reports) == ["gpt", "majority", "filter", "naive_bayes", "tfidf"]
    assert {r.rows for r in result.reports.values()} == {10}
    assert result.reports["tfidf"].accuracy.value == 1.0
    right = sum(a == p for a, p in zip(result.actual, result.predicted(), strict=True))
    assert result.reports["gpt"].accuracy.value == right / 10

    (folder / "labels.json").write_text('["dog", "cat"]')
    with pytest.raises(InputError, match="train it again"):
        evaluate_classifiers({"gpt": classifier}, folder, 4)


def test_answers_stay_with_their_pairs(tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches are sorted by length inside; a model that repeats its prompt's last word shows whether that is undone."""
    words = ["cat", "a red dog on the mat", "mat", "dog sat on the red mat", "red"]
    rows = [{"instruction": "say", "input": w, "output": w, "task": f"t{len(w) % 2}"} for w in words]
    write_rows(tmp_path / "instructions" / "test.jsonl", rows)
    write_rows(tmp_path / "instructions" / "val.jsonl", [])

    def echo(model: GPT, prompts: list[list[int]], **options: object) -> list[list[int]]:
        inputs = [tokenizer.decode(p).split("### Input:\n")[1].split("\n")[0] for p in prompts]
        return [tokenizer.encode(f" {text}\n") for text in inputs]

    monkeypatch.setattr("llm.evaluation.evaluate.generate", echo)
    result = evaluate_instruct({"gpt": make_folder(tokenizer)}, "alpaca", tmp_path / "instructions", params())
    assert result.reports["gpt"].exact_match.value == 1.0
    assert {task: r.rows for task, r in result.tasks["gpt"].items()} == {"t0": 2, "t1": 3}
    assert [(e.pair.input, e.answers["gpt"]) for e in result.examples] == [(w, w) for w in words]
    assert [result.examples[i].pair.task for i in result.shown] == ["t0", "t1"]  # spread over the tasks


def test_a_base_that_knows_a_template_is_asked_in_it(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    for split in ("test", "val"):
        write_rows(tmp_path / f"{split}.jsonl", [{"instruction": "say", "input": "", "output": "cat", "task": ""}])
    asked: list[str] = []

    def listen(model: GPT, prompts: list[list[int]], **options: object) -> list[list[int]]:
        asked.extend(tokenizer.decode(prompt) for prompt in prompts)
        return [[] for _ in prompts]

    monkeypatch.setattr("llm.evaluation.evaluate.generate", listen)
    plain = make_folder(tokenizer)
    config = plain.config.model_copy(update={"template": "chatml", "system": "the cat knows"})
    folders = {"gpt": plain, "base": Checkpoint(plain.model, tokenizer, config)}
    result = evaluate_instruct(folders, "alpaca", tmp_path, params())
    assert asked[0] == tokenizer.decode(encode_prompt(tokenizer, "alpaca", "say"))
    assert asked[1] == tokenizer.decode(encode_prompt(tokenizer, "chatml", "say", system="the cat knows"))
    assert result.losses["gpt"] != result.losses["base"]


def test_response_loss_is_that_of_each_response_read_alone(tokenizer: Tokenizer) -> None:
    folder = make_folder(tokenizer)
    assert isinstance(folder.model, GPT)
    pairs = [Pair("say", "", "the cat sat", ""), Pair("what is red?", "the mat", "the red dog on the mat é", "")]
    nats, n_tokens = 0.0, 0
    for pair in pairs:
        prompt = encode_prompt(tokenizer, "alpaca", pair.instruction, pair.input)
        response = [*tokenizer.encode(pair.output), tokenizer.eot]
        with torch.no_grad():
            logits = folder.model(torch.tensor([prompt + response]))[0]
        nats -= float(logits.log_softmax(-1)[len(prompt) - 1 : -1].gather(1, torch.tensor(response)[:, None]).sum())
        n_tokens += len(response)
    loss = response_loss(folder, "alpaca", pairs, params())
    assert (loss.tokens, loss.characters) == (n_tokens, sum(len(pair.output) for pair in pairs))
    assert loss.nats == pytest.approx(nats, rel=1e-5)
    assert loss.per_token == pytest.approx(nats / n_tokens, rel=1e-5)
    assert loss.per_character == pytest.approx(nats / loss.characters, rel=1e-5)


# ---- the report ------------------------------------------------------------------------------------------------------


def results(labels: list[str]) -> tuple[BaseResult, ClassifierResult, InstructResult]:
    """Results with hostile texts in every place that data or a model fills."""
    rng = np.random.default_rng(0)
    actual = rng.integers(0, len(labels), 60)
    good, bad = np.eye(len(labels))[actual] * 2 + 1, np.ones((60, len(labels)))
    probabilities = {
        "gpt": good / good.sum(1, keepdims=True),
        "scratch": bad / len(labels),
        "majority": bad / len(labels),
    }
    classifiers = ClassifierResult(
        split="test",
        train_rows=100,
        labels=labels,
        reports={name: classification_report(actual, p, labels) for name, p in probabilities.items()},
        roc={name: roc_points(actual, p) for name, p in probabilities.items()},
        texts=[f"{EVIL} {i}" for i in range(60)],
        actual=[labels[k] for k in actual],
        probabilities=probabilities,
    )
    pairs = [Pair(EVIL, EVIL, "yes", task) for task in ("sum", EVIL)]
    answers = {"gpt": ["yes", "yes"], "base": [EVIL, EVIL], "scratch": ["no", "yes"]}
    instruct = InstructResult(
        split="test",
        template="alpaca",
        reports={name: answer_report(texts, ["yes", "yes"]) for name, texts in answers.items()},
        losses={name: ResponseLoss(6.0 + i, 4, 12) for i, name in enumerate(answers)},
        tasks={name: by_task(texts, ["yes", "yes"], [p.task for p in pairs]) for name, texts in answers.items()},
        examples=[Example(p, {name: texts[i] for name, texts in answers.items()}) for i, p in enumerate(pairs)],
        shown=[0, 1],
    )
    base = BaseResult(
        split="val",
        n_bytes=1000,
        train_bytes=5000,
        baseline_bytes=2500,
        parameters=1234,
        gpt=Score(500.0, 300),
        ngram=Score(1000.0, 300),
        xz_bytes=250,
        completions=[Completion(EVIL, "\n\n# no heading\n```\n<b>", EVIL)],
    )
    return base, classifiers, instruct


def test_metrics_are_nested_one_level() -> None:
    sections = report.metrics(*results(["ham", "spam"]))
    assert sections["base"]["bpb"] == pytest.approx(500 / math.log(2) / 1000)
    assert sections["base_xz"]["bpb"] == 2.0
    assert sections["classifier"]["accuracy"] == 1.0
    assert sections["instruct"]["exact_match"] == 1.0
    assert sections["instruct_scratch"]["exact_match"] == 0.5
    assert all(isinstance(v, int | float) for section in sections.values() for v in section.values())


def test_plot_files_hold_what_dvc_plots() -> None:
    files = {
        name: list(csv.DictReader(io.StringIO(text))) for name, text in report.plot_files(*results(["a", "b"])).items()
    }
    assert len(files["confusion.csv"]) == 60 and set(files["confusion.csv"][0]) == {"actual", "predicted"}
    assert [row["model"] for row in files["bpb.csv"]] == ["GPT", "n-gram model", "xz"]
    assert {row["classifier"] for row in files["classifiers.csv"]} >= {"GPT", "majority class"}
    assert set(files["roc.csv"][0]) == {"false_positive_rate", "true_positive_rate"}
    assert len(files["per_task.csv"]) == 6 and len(files["instructions.csv"]) == 3


def test_predictions_are_complete_and_a_line_each() -> None:
    base, classifiers, instruct = results(["ham", "spam"])
    files = {
        name: [json.loads(line) for line in text.rstrip("\n").split("\n")]
        for name, text in report.predictions(base, classifiers, instruct).items()
    }
    first = files["messages.jsonl"][0]
    assert len(files["messages.jsonl"]) == 60 and first["text"] == f"{EVIL} 0"
    assert all(row["predicted"]["gpt"] == row["label"] for row in files["messages.jsonl"])
    assert set(first["predicted"]) == {"gpt", "scratch", "majority"}
    assert first["probabilities"][first["label"]] == 0.75 and set(first["probabilities"]) == {"ham", "spam"}
    assert [row["answers"] for row in files["instructions.jsonl"]] == [
        {"gpt": "yes", "base": EVIL, "scratch": "no"},
        {"gpt": "yes", "base": EVIL, "scratch": "yes"},
    ]
    assert files["instructions.jsonl"][1]["task"] == EVIL


@pytest.mark.parametrize("labels", [["ham", "spam"], [f"{EVIL}{k}" for k in range(3)]])
def test_text_from_models_and_data_cannot_become_markup(labels: list[str]) -> None:
    text = report.markdown(*results(labels), {"corpus": EVIL, "messages": "m", "instructions": "i"}, [], KINDS)
    assert "\x1b" not in text and "\u202e" not in text
    outside, fence = [], None
    for line in text.splitlines():
        ticks = line[: len(line) - len(line.lstrip("`"))]
        if fence is None and len(ticks) >= 3:
            fence = ticks
        elif fence is not None and line == fence:
            fence = None
        elif fence is None:
            outside.append(line)
    assert fence is None
    prose = "\n".join(outside)
    for markup in ("<script", "</details", "![x]", "| `a`", "# no heading"):
        assert f"\n{markup}" not in prose
        assert markup not in prose.replace(f"\\{markup}", "")
    headings = [line for line in outside if line.startswith("## ")]
    assert headings == ["## Predicting text", "## Labelling messages", "## Following instructions"]
    columns = [line.replace("\\|", "").count("|") for line in outside if line.startswith("| ")]
    assert set(columns) <= {5, 6, 7, 8}  # no cell was cut in two


def test_no_text_ends_the_script_of_dvcs_page() -> None:
    """DVC writes a plot's rows as JSON into a script, where nothing but `<` can end it."""
    from dvc_render.vega import VegaRenderer

    for name, axes in {"per_task": ("exact_match", "task"), "confusion": ("actual", "predicted")}.items():
        text = report.plot_files(*results([f"{EVIL}{k}" for k in range(3)]))[f"{name}.csv"]
        rows = [row | {"rev": "workspace"} for row in csv.DictReader(io.StringIO(text))]
        x, y = axes
        page = VegaRenderer(rows, name, template="scatter", x=x, y=y).generate_html()
        assert "alert(1)" in page
        assert page.count("</script>") == 1 and page.count("<script") == 1


def test_the_report_says_what_was_found() -> None:
    text = report.markdown(
        *results(["ham", "spam"]), {"corpus": "sample", "messages": "m", "instructions": "i"}, ["training.png"], KINDS
    )
    assert "GPT of 1,234 parameters" in text
    assert "needs 50.0 % fewer bits than an n-gram model" in text
    assert "the first 2,500 bytes of 5,000 bytes of training text" in text
    assert "no test part" in text
    assert "](figures/training.png)" in text
    assert "](figures/classifiers.png)" not in text  # a picture that could not be drawn is left out
    assert "2 answers to read" in text


def test_the_report_stands_without_controls_and_tasks() -> None:
    base, classifiers, instruct = results(["ham", "spam"])
    del classifiers.reports["scratch"]
    instruct = instruct._replace(
        reports={k: v for k, v in instruct.reports.items() if k != "scratch"},
        tasks={"gpt": {}, "base": {}},
        examples=[],
        shown=[],
    )
    text = report.markdown(
        base, classifiers, instruct, {"corpus": "c", "messages": "m", "instructions": "i"}, [], KINDS
    )
    assert "without pretraining |\n" in text and "answers to read" not in text
    assert report.plot_files(base, classifiers, instruct)["per_task.csv"].count("\n") == 3


@pytest.mark.parametrize("labels", [["ham", "spam"], ["a", "$b$", "c" * 40]])
def test_pictures_have_the_same_bytes_twice(tmp_path: Path, labels: list[str]) -> None:
    base, classifiers, instruct = results(labels)
    rows = [{"step": step, "train/loss": 3.0 - step, "val/loss": 3.1 - step} for step in range(3)]
    (tmp_path / "pretrain.csv").write_text(report.to_csv(rows))
    for run in ("one", "two"):
        folder = tmp_path / run
        folder.mkdir()
        report.draw_trainings(tmp_path, folder / "training.png")
        report.draw_bits_per_byte(base, folder / "bpb.png")
        report.draw_classifiers(classifiers, folder / "classifiers.png")
        report.draw_confusion_roc(classifiers, folder / "confusion_roc.png")
        report.draw_instructions(instruct, folder / "instructions.png")
    for path in sorted((tmp_path / "one").iterdir()):
        content = path.read_bytes()
        assert content.startswith(b"\x89PNG") and b"Software" not in content
        assert content == (tmp_path / "two" / path.name).read_bytes()


def test_an_extra_that_fails_is_one_line_and_the_rest_goes_on(capsys: pytest.CaptureFixture[str]) -> None:
    def fails() -> None:
        raise OSError("no\nspace")

    stage.extra("picture roc", fails)
    assert capsys.readouterr().err == "evaluate: picture roc left out: OSError: no\n"


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), MemoryError()])
def test_what_would_succeed_with_more_room_is_no_extra_to_leave_out(error: Exception) -> None:
    """The stage's outputs would be kept without it for good."""

    def fails() -> None:
        raise error

    with pytest.raises(type(error)):
        stage.extra("picture roc", fails)
