"""The tokenize stage on a small `data/raw`: what it writes, and what it leaves when it fails."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
import yaml

from llm.checkpoint.folder import Checkpoint, CheckpointConfig, load_checkpoint, save_checkpoint
from llm.common.errors import InputError
from llm.config import SPLITS, parse_params
from llm.model.gpt import GPT
from llm.tokenizer.bpe import Tokenizer
from stages.evaluate import too_long_section
from stages.pretrain import pretrain
from stages.runtime.run import Run
from stages.tokenize import tokenize
from tests.datasets import document, folder_digest, read_split, write_corpus, write_lines
from tests.helpers import LLAMA_FORM, gpt_config, randomize, tiny_tokenizer


class FakeRun:
    """A run with the parts that the stage uses."""

    def __init__(self, **changes: Any) -> None:
        values = yaml.safe_load((Path(__file__).parents[2] / "params.yaml").read_text())
        values["tokenize"]["tokenizer"].update(kind="bpe", vocab_size=300)
        values["tokenize"].update(changes)
        self.params = parse_params(values)
        self.metrics: dict[str, Any] = {}
        self.state_dir = Path("state")

    def write_metrics(self, values: dict[str, Any]) -> None:
        self.metrics = values

    def artifact(self, path: Path) -> None:
        assert path.exists()


@pytest.fixture
def raw(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small `data/raw`, in the working directory."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "data" / "raw"
    folder.mkdir(parents=True)
    write_corpus(folder / "corpus.jsonl", [document(seed) for seed in range(40)])
    messages = [{"text": f"text {i}", "label": "spam" if i % 2 else "ham"} for i in range(50)]
    write_lines(folder / "messages.jsonl", messages)
    pairs = [{"instruction": f"do {i}", "input": "", "output": f"done {i}", "task": "doing"} for i in range(50)]
    write_lines(folder / "instructions.jsonl", pairs)
    (folder / "labels.json").write_text('["ham", "spam"]')
    sources = {
        kind: {"source": "tiny", "licence": "MIT", "quotable": True} for kind in ("corpus", "messages", "instructions")
    }
    (folder / "sources.json").write_text(json.dumps(sources))
    return folder


def test_the_stage_writes_everything_and_the_same_again(raw: Path) -> None:
    run: Any = FakeRun()
    tokenize(run)
    tokens, reports = Path("data/tokens"), Path("reports")
    first = folder_digest(tokens), folder_digest(reports)
    assert sorted(path.relative_to(tokens).as_posix() for path in tokens.rglob("*.*")) == [
        *(f"corpus/{name}" for name in ("meta.json", "source.json", "test-00000.bin", "train-00000.bin")),
        "corpus/val-00000.bin",
        *(f"instructions/{name}" for name in ("source.json", "test.jsonl", "train.jsonl", "val.jsonl")),
        *(f"messages/{name}" for name in ("labels.json", "source.json", "test.jsonl", "train.jsonl", "val.jsonl")),
        "quotable.json",
        "tokenizer/bpe.json",
    ]
    assert Tokenizer.load(tokens / "tokenizer").vocab_size == 300
    n_messages = [len((tokens / "messages" / f"{name}.jsonl").read_text().splitlines()) for name in SPLITS]
    assert [run.metrics["messages"][name] for name in SPLITS] == n_messages == [35, 5, 10]
    card = json.loads((reports / "data_card.json").read_text())
    assert card["sources"]["corpus"] == {"source": "tiny", "licence": "MIT"}
    assert card["instructions"]["tasks"]["doing"] == {name: run.metrics["instructions"][name] for name in SPLITS}
    assert run.metrics["corpus"]["train_tokens"] == card["corpus"]["splits"]["train"]["tokens"]
    markdown = (reports / "data_card.md").read_text()
    assert "| corpus | tiny | MIT | leak_free |" in markdown
    assert "| ham | 17 |" in markdown or "| ham | 18 |" in markdown
    tokenize(run)
    assert (folder_digest(tokens), folder_digest(reports)) == first


def test_the_card_counts_rows_that_the_download_left_out(raw: Path) -> None:
    sources = json.loads((raw / "sources.json").read_text())
    sources["instructions"]["left_out"] = {"rows": 1234, "reasons": []}
    (raw / "sources.json").write_text(json.dumps(sources))
    run: Any = FakeRun()
    tokenize(run)
    card = Path("reports/data_card.md").read_text(encoding="utf-8")
    assert card.count("Left out as they could not be used: 1,234 rows.") == 1
    assert card.index("1,234 rows") > card.index("## Instructions")


def test_a_stage_that_fails_leaves_nothing_behind(raw: Path) -> None:
    write_corpus(raw / "corpus.jsonl", ["one", "two"])
    run: Any = FakeRun()
    with pytest.raises(InputError, match="too little text to split"):
        tokenize(run)
    assert [path.name for path in Path("data").iterdir()] == ["raw"]
    assert not Path("reports").exists()


def test_a_corpus_too_small_for_the_vocabulary_gets_the_largest_that_fits(
    raw: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run: Any = FakeRun(tokenizer={"kind": "bpe", "vocab_size": 100_000, "train_chars": 1000})
    with caplog.at_level(logging.WARNING, logger="llm"):
        tokenize(run)
    size = Tokenizer.load(Path("data/tokens/tokenizer")).vocab_size
    assert 300 < size < 2000
    assert f"vocab_size: the corpus is too small for 100,000 tokens; takes the {size:,} that it has" in caplog.text
    meta = json.loads(Path("data/tokens/corpus/meta.json").read_text())
    card = json.loads(Path("reports/data_card.json").read_text())
    assert meta["vocab_size"] == card["tokenizer"]["vocab_size"] == run.metrics["vocab_size"] == size

    small = dict.fromkeys(("context_length", "emb_dim", "ffn_dim", "head_dim"), 16) | {"n_layers": 1}
    model, short = run.params.model.model_copy(update=small), run.params.pretrain.model_copy(update={"max_steps": 0})
    pretrain(Run("pretrain", run.params.model_copy(update={"model": model, "pretrain": short}), raw / "s", MagicMock()))
    assert load_checkpoint(Path("models/base")).config.gpt.vocab_size == size


def test_what_is_too_long_is_said_and_refused_before_any_training(raw: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_lines(raw / "messages.jsonl", [{"text": f"text {i} " * 9, "label": "hs"[i % 2]} for i in range(50)])
    (raw / "labels.json").write_text('["h", "s"]')
    pairs = [{"instruction": f"do {i}", "output": "done " * (300 if i == 7 else 1)} for i in range(50)]
    write_lines(raw / "instructions.jsonl", pairs)
    run: Any = FakeRun(max_too_long=0.5)
    with caplog.at_level(logging.WARNING, logger="llm"):
        tokenize(run)
    assert "data.instructions: longer than model.context_length (256 tokens): 1 cut of " in caplog.text
    card, written = Path("reports/data_card.md").read_text(), json.loads(Path("data/tokens/too_long.json").read_text())
    assert "Longer than the 256 tokens of `model.context_length`: 1 cut of " in card
    assert list(written) == ["instructions"]
    assert sum(counts["cut"] for counts in written["instructions"]["splits"].values()) == 1
    assert "- instructions, longer than the 256 tokens of `model.context_length`: train " in too_long_section(written)

    run = FakeRun(max_too_long=0.5)
    short = run.params.finetune_classify.model_copy(update={"max_length": 8})
    run.params = run.params.model_copy(update={"finetune_classify": short})
    with pytest.raises(InputError, match=r"data\.messages: longer than finetune_classify\.max_length .*: 35 cut"):
        tokenize(run)


def test_the_corpus_is_cleaned_before_it_is_split(raw: Path) -> None:
    documents = [document(seed) for seed in range(40)]
    write_corpus(raw / "corpus.jsonl", [*documents, documents[0], f"{documents[1]} me@mail.org"])
    rules = {
        "repair": False,
        "invisible": False,
        "languages": [],
        "quality": [],
        "duplicates": "exact",
        "mask": ["mail"],
    }
    run: Any = FakeRun(clean=rules)
    tokenize(run)
    card = json.loads(Path("reports/data_card.json").read_text())
    assert card["corpus"]["documents"] == 41
    assert card["corpus"]["cleaning"]["removed"] == {"exact": 1, "mask mail": 0}
    assert "| mask mail | 1 | 0 | 41 |" in Path("reports/data_card.md").read_text()
    tokenizer = Tokenizer.load(Path("data/tokens/tokenizer"))
    text = "".join(tokenizer.decode(read_split(Path("data/tokens/corpus"), split)) for split in SPLITS)
    assert "<mail>" in text and "me@mail.org" not in text
    assert not list(Path("data/tokens").glob("*clean*"))


def test_gpt2_files_that_are_missing(raw: Path) -> None:
    run: Any = FakeRun(tokenizer={"kind": "gpt2", "vocab_size": 300, "train_chars": 1000})
    with pytest.raises(InputError, match=r"encoder\.json: missing; the download stage fetches it"):
        tokenize(run)


def test_open_weights_bring_their_tokenizer_and_pass_through(raw: Path) -> None:
    config = gpt_config(**LLAMA_FORM | {"vocab_size": 300, "context_length": 64})  # 20 rows more than tokens
    source = Checkpoint(GPT(config), tiny_tokenizer(), CheckpointConfig(kind="base", gpt=config))
    randomize(source.model)
    save_checkpoint(raw.parent / "open", source)
    run: Any = FakeRun()
    changes = {"init": str(raw.parent / "open"), "max_steps": 0}
    run.params = run.params.model_copy(update={"pretrain": run.params.pretrain.model_copy(update=changes)})

    tokenize(run)
    assert Tokenizer.load(Path("data/tokens/tokenizer")) == tiny_tokenizer()
    assert json.loads(Path("reports/data_card.json").read_text())["tokenizer"]["vocab_size"] == 280

    stage = Run("pretrain", run.params, raw.parent / "state", MagicMock())
    pretrain(stage)
    base = load_checkpoint(Path("models/base"))
    assert base.config.gpt == config
    assert all(torch.equal(base.model.state_dict()[name], t) for name, t in source.model.state_dict().items())

    Tokenizer.train(["another text " * 9], 262).save(Path("data/tokens/tokenizer"))
    with pytest.raises(InputError, match="is not the one that data/tokens was encoded with; run tokenize again"):
        pretrain(stage)
