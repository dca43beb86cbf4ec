"""A chat template of one's own, from params.yaml to the report: each stage reads and writes its conversations."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

import llm
from llm.checkpoint.folder import Checkpoint, CheckpointConfig, load_checkpoint, save_checkpoint
from llm.data.examples import pair_examples, read_pairs
from llm.model.gpt import GPT
from llm.tokenizer.conversation import ConversationEncoder, as_messages
from tests.helpers import SHIPPED_FORM, gpt_config, randomize, tiny_tokenizer
from tests.pipelines import change_params, environment, execute, tiny_copy

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role | upper }}: {{ m.content }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>ASSISTANT: {% endif %}"
)
pytestmark = pytest.mark.slow  # six stages, each in a process of its own
STAGES = ("download", "tokenize", "pretrain", "finetune_classify", "finetune_instruct", "evaluate")
CONTEXT, WORDS = 512, 4


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository whose stages have run on open weights with a chat template of their own."""
    folder = tiny_copy(tmp_path_factory.mktemp("own-template"))
    form = gpt_config(**SHIPPED_FORM, vocab_size=280, context_length=CONTEXT, emb_dim=32, head_dim=8)
    model = randomize(GPT(form))
    assert isinstance(model, GPT)
    config = CheckpointConfig(kind="instruct", gpt=form, chat_templates={"default": TEMPLATE})
    save_checkpoint(folder / "weights", Checkpoint(model, tiny_tokenizer(), config))
    few = {"max_steps": 6, "warmup_steps": 1, "eval_interval": 3, "batch_size": 4, "scratch_control": False}
    changes = {
        "pretrain": {"init": "weights", "max_steps": 0},
        "finetune_classify": few,
        "finetune_instruct": few | {"template": "own", "scratch_control": True},
        "evaluate": {"max_new_tokens": WORDS, "audit_bytes": 1000},
    }
    change_params(folder, changes)
    for stage in STAGES:
        execute(folder, "python", "-m", f"stages.{stage}")
    return folder


def encoder_of(folder: Path) -> ConversationEncoder:
    model = load_checkpoint(folder)
    return model.config.conversations(model.tokenizer)


def test_the_finetuned_model_keeps_the_template(workspace: Path) -> None:
    for name in ("base", "instruct", "instruct_scratch"):
        config = load_checkpoint(workspace / "models" / name).config
        assert (config.kind, config.template, config.chat_templates) == ("instruct", None, {"default": TEMPLATE})


def test_it_was_trained_on_the_templates_conversations(workspace: Path) -> None:
    """The first loss that the stage states is that of these tokens, on the weights as they came."""
    encoder, pairs = (
        encoder_of(workspace / "models/instruct"),
        read_pairs(workspace / "data/tokens/instructions/val.jsonl"),
    )
    own = pair_examples(pairs, encoder, CONTEXT)
    first = encoder.tokenizer.decode(own[0].ids)
    assert first.startswith("<|im_start|>USER: ") and "<|im_end|><|im_start|>ASSISTANT: " in first

    from llm.data.batches import batches_by_length, collate_pairs
    from llm.training.losses import mean_loss, next_token_loss

    model = load_checkpoint(workspace / "weights").model

    def loss(used: ConversationEncoder) -> float:
        examples = pair_examples(pairs, used, CONTEXT)
        return mean_loss(model, next_token_loss, batches_by_length(examples, collate_pairs, 4))

    stated = (workspace / "reports/plots/finetune_instruct.csv").read_text(encoding="utf-8").splitlines()
    row = dict(zip(stated[0].split(","), stated[1].split(","), strict=True))
    assert row["step"] == "0"
    assert float(row["val/loss"]) == pytest.approx(loss(encoder), rel=1e-4)
    assert float(row["val/loss"]) != pytest.approx(loss(ConversationEncoder(encoder.tokenizer, "chatml")), rel=1e-2)
    metrics = json.loads((workspace / "reports/metrics/finetune_instruct.json").read_text(encoding="utf-8"))
    assert metrics["val/loss"] < float(row["val/loss"]) and metrics["steps"] == 6


def test_the_evaluation_asks_in_the_template(workspace: Path) -> None:
    lines = (workspace / "reports/predictions/instructions.jsonl").read_text(encoding="utf-8").splitlines()
    pairs = read_pairs(workspace / "data/tokens/instructions/test.jsonl")
    model = llm.load(workspace / "models/instruct", device="cpu")
    assert len(lines) == len(pairs)
    for line, pair in list(zip(lines, pairs, strict=True))[:8]:
        question = as_messages(pair._asdict())[:-1]
        assert json.loads(line)["answers"]["gpt"] == model.chat(question, max_new_tokens=WORDS).strip()
    report = (workspace / "reports/report.md").read_text(encoding="utf-8")
    assert "conversations" in report.lower()
    metrics = json.loads((workspace / "reports/metrics/evaluate.json").read_text(encoding="utf-8"))
    assert {"exact_match", "loss"} <= metrics["instruct"].keys() and "instruct_scratch" in metrics


def test_own_needs_open_weights(workspace: Path) -> None:
    values = (workspace / "params.yaml").read_text(encoding="utf-8")
    try:
        change_params(workspace, {"pretrain": {"init": "scratch"}})
        done = subprocess.run(
            ["python", "-m", "stages.tokenize"],
            cwd=workspace,
            env=environment() | {"PATH": os.environ["PATH"]},
            capture_output=True,
            text=True,
            check=False,
        )
    finally:
        (workspace / "params.yaml").write_text(values, encoding="utf-8")
    assert done.returncode == 1
    assert "finetune_instruct.template: own needs open weights as pretrain.init; take chatml" in done.stderr
    assert "Traceback" not in done.stderr and (workspace / "data/tokens/tokenizer").is_dir()
