"""Regressions planted by real trainings, each blocked by the release gate by name.

The champions are a classifier of easy messages and a model that answers instructions. Each plant trains again
with one thing wrong, evaluates what came out, and asks the gate. The thresholds beside the champion are those of
`params.yaml`; the absolute ones are lower, as the models are tiny.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

from llm.checkpoint.adapter import save_trained
from llm.checkpoint.card import new_card
from llm.checkpoint.folder import Checkpoint, load_checkpoint
from llm.data.examples import Message
from llm.tokenizer.bpe import Tokenizer
from llm.tokenizer.prompts import ChatMLTemplate
from stages import release
from tests.conftest import ROOT
from tests.released import copy_workspace, evaluate, write_rows
from tests.trainings import (
    classify_params,
    easy_messages,
    new_base,
    plural_pairs,
    train_tokenizer,
    trained,
    trained_instruct,
)

pytestmark = pytest.mark.slow
CLASSIFIER, INSTRUCT = Path("models/classifier"), Path("models/instruct")
Data = dict[str, list[Message]]


def save(folder: Path, checkpoint: Checkpoint) -> None:
    save_trained(folder, checkpoint, classify_params(), new_card(checkpoint.config.kind))


def write_messages(data: Data) -> None:
    for split, rows in data.items():
        write_rows(Path(f"data/tokens/messages/{split}.jsonl"), [row._asdict() for row in rows])


@pytest.fixture(scope="module")
def base() -> Checkpoint:
    texts = easy_messages()["train"] + [
        Message(f"{pair.instruction} {pair.input} {pair.output}", "")
        for pair in plural_pairs()["train"]
        for _ in "12345"
    ]
    return new_base(train_tokenizer(texts), seed=1)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, database: Path, base: Checkpoint) -> Iterator[Path]:
    """A workspace whose two good models are the champions."""
    root = tmp_path_factory.mktemp("planted")
    shutil.copy(database, root / "mlflow.db")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        patch.setenv("DVC_ROOT", str(root))
        for name in ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME"):
            patch.delenv(name, raising=False)
        values = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))
        values["release"]["at_least"] = {"classifier": {"accuracy": 0.95}, "instruct": {"exact_match": 0.7}}
        values["release"]["slower_by"] = 1000.0  # other tests run beside this one
        Path("params.yaml").write_text(yaml.safe_dump(values))
        Path("dvc.yaml").write_text("stages: {}\n")
        data, pairs = easy_messages(), plural_pairs()
        write_messages(data)
        for split, rows in pairs.items():
            fields = [{key: getattr(row, key) for key in ("instruction", "input", "output", "task")} for row in rows]
            write_rows(Path(f"data/tokens/instructions/{split}.jsonl"), fields)
        save(CLASSIFIER, trained(base, data, seed=1))
        save(INSTRUCT, trained_instruct(base, pairs, seed=1))
        evaluate()
        assert release.main(["classifier", "instruct", "--why", "the first"]) == 0
        yield root


@pytest.fixture
def w(store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the workspace with the same registry."""
    return copy_workspace(store, tmp_path / "copy", monkeypatch)


@pytest.fixture
def gate(w: Path, capsys: pytest.CaptureFixture[str]) -> Callable[[], list[str]]:
    """Return the lines of what falls short, none where the gate is open."""

    def lines() -> list[str]:
        capsys.readouterr()
        status = release.main(["classifier", "instruct", "--dry"])
        out = capsys.readouterr().out.splitlines()
        short = [line.removeprefix("falls short").strip() for line in out if line.startswith("falls short")]
        assert status == int(bool(short)), out
        return short

    return lines


def has(lines: list[str], beginning: str) -> bool:
    return any(line.startswith(beginning) for line in lines)


def test_the_same_training_again_passes(gate: Callable[[], list[str]], base: Checkpoint) -> None:
    save(CLASSIFIER, trained(base, easy_messages(), seed=1))
    evaluate()
    assert gate() == []


def test_learning_rate_30_times_too_high(gate: Callable[[], list[str]], base: Checkpoint) -> None:
    params = classify_params()
    save(CLASSIFIER, trained(base, easy_messages(), seed=1, lr=30 * params.lr, muon_lr=30 * params.muon_lr))
    evaluate()
    short = gate()
    assert has(short, "classifier: accuracy, low end: 0.") and has(
        short, "classifier: accuracy beside the champion: -0."
    )


def flipped(train: list[Message], share: float) -> list[Message]:
    """Return the messages, a share of them with the other label."""
    wrong = set(random.Random(0).sample(range(len(train)), round(share * len(train))))
    other = {"ham": "spam", "spam": "ham"}
    return [row._replace(label=other[row.label]) if i in wrong else row for i, row in enumerate(train)]


def test_a_tenth_of_the_labels_flipped(gate: Callable[[], list[str]], base: Checkpoint) -> None:
    data = easy_messages()
    data["train"] = flipped(data["train"], 0.1)
    write_messages(data)
    save(CLASSIFIER, trained(base, data, seed=1))
    evaluate()
    short = gate()
    assert has(short, "classifier: accuracy beside the champion: -0."), short


def test_template_changed_at_inference(gate: Callable[[], list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    """A template changed in the code harms the champion too: the record of its release tells."""
    monkeypatch.setattr(ChatMLTemplate, "middle", ": ")
    answered = gate()
    assert has(answered, "instruct: answers again: ") and "template, tokenizer or weights" in "".join(answered)
    evaluate()
    short = gate()
    assert has(short, "instruct: exact_match, low end: 0"), short
    assert has(short, "instruct: exact match beside the champion as it was released: -"), short
    assert not has(short, "instruct: exact match beside the champion: -0."), "the champion of today suffers as much"


def test_tokenizer_of_another_model(gate: Callable[[], list[str]]) -> None:
    other = Tokenizer.train([pair.output for pair in plural_pairs()["train"]] * 20, 300)
    good = load_checkpoint(CLASSIFIER)
    other.save(CLASSIFIER)
    swapped = gate()
    assert has(swapped, "classifier: tokenizer bpe.json: changed since"), swapped
    assert has(swapped, "classifier: accuracy beside the champion: -0."), swapped
    save(CLASSIFIER, good._replace(tokenizer=other))  # with a card of its own
    evaluate()
    short = gate()
    assert has(short, "classifier: accuracy, low end: 0.") and has(
        short, "classifier: accuracy beside the champion: -0."
    )


@pytest.mark.parametrize(
    ("disguise", "message"),
    [
        (lambda text: text, "data: leaks: test messages in train: 200 (needs <= 0)"),
        (lambda text: text.upper().replace(" ", "  "), "data: leaks: test messages in train: 200 (needs <= 0)"),
        (lambda text: f"{text} Thanks.", "data: leaks: test messages nearly equal or in the corpus: "),
    ],
    ids=["verbatim", "in capitals", "with a word more"],
)
def test_test_set_leaked_into_training(
    gate: Callable[[], list[str]], base: Checkpoint, disguise: Callable[[str], str], message: str
) -> None:
    data = easy_messages()
    data["train"] = [*data["train"], *(row._replace(text=disguise(row.text)) for row in data["test"][:200])]
    write_messages(data)
    save(CLASSIFIER, trained(base, data, seed=1))
    evaluate()
    short = gate()
    assert has(short, message), short
