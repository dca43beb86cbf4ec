"""Real trainings of tiny models, in seconds: classifiers of the sample's messages, and answers to instructions."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from llm.checkpoint.folder import Checkpoint, CheckpointConfig
from llm.config import ClassifyParams
from llm.data.batches import batches_by_length, collate_pairs, example_batches
from llm.data.examples import Message, Pair, pair_examples
from llm.evaluation.classifier.learning_curve import train_classifier
from llm.model.gpt import GPT
from llm.tokenizer.bpe import Tokenizer
from llm.tokenizer.conversation import ConversationEncoder
from llm.training.fit import TrainingTask, fit
from llm.training.losses import mean_loss, next_token_loss
from tests.conftest import ROOT
from tests.datasets import words
from tests.helpers import SHIPPED_FORM, gpt_config, runtime_params, train_params

LABELS = ["ham", "spam"]
SMALL = SHIPPED_FORM | {"context_length": 128, "emb_dim": 64, "n_layers": 1, "n_heads": 2, "n_kv_heads": 2}
SMALL |= {"head_dim": 32, "ffn_dim": 128}


def sample_messages() -> dict[str, list[Message]]:
    """Return the sample's messages by split."""
    found: dict[str, list[Message]] = {"train": [], "val": [], "test": []}
    for line in (ROOT / "data/sample/messages.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        found[row["split"]].append(Message(row["text"], row["label"]))
    return found


def easy_messages() -> dict[str, list[Message]]:
    """Return messages by split whose label hangs on three of their sixteen words, which a tiny model learns."""
    chooser = random.Random(7)
    pool = list(dict.fromkeys(words(chooser, 1) for _ in range(400)))[:240]
    own, shared = {"ham": pool[:60], "spam": pool[60:120]}, pool[120:]
    found: dict[str, list[Message]] = {}
    for split, n in (("train", 1500), ("val", 300), ("test", 1000)):
        found[split] = []
        for i in range(n):
            label = LABELS[i % 2]
            text = chooser.choices(own[label], k=3) + chooser.choices(shared, k=13)
            chooser.shuffle(text)
            found[split].append(Message(" ".join(text), label))
    return found


def train_tokenizer(messages: Sequence[Message], vocab_size: int = 1000) -> Tokenizer:
    return Tokenizer.train([message.text for message in messages], vocab_size, exact=False)


def classify_params(**changes: Any) -> ClassifyParams:
    decision = {"rule": "none", "label": None, "false_alarm_cost": 1.0, "miss_cost": 1.0, "precision": 0.95}
    values = {"max_steps": 300, "batch_size": 16, "optimizer": "muon", "lr": 0.01, "muon_lr": 0.04, "warmup_steps": 10}
    values |= {"schedule": "linear", "min_lr_ratio": 0.05, "eval_interval": 100, "keep": "best"}
    own = {
        "class_weights": "none",
        "max_length": 48,
        "scratch_control": False,
        "scratch_lr": 0.01,
        "scratch_muon_lr": 0.04,
        "calibrate": True,
        "unsure_below": 0.0,
    }
    return ClassifyParams.model_validate(train_params(**values).model_dump() | own | {"decision": decision} | changes)


def new_base(tokenizer: Tokenizer, seed: int) -> Checkpoint:
    """Return a base model with random weights."""
    torch.manual_seed(seed)
    model = GPT(gpt_config(**SMALL, vocab_size=tokenizer.vocab_size))
    return Checkpoint(model, tokenizer, CheckpointConfig(kind="base", gpt=model.config))


def trained(base: Checkpoint, data: dict[str, list[Message]], seed: int, **changes: Any) -> Checkpoint:
    """Return a classifier of the sample's messages; `changes` are of the params."""
    params, runtime = classify_params(**changes), runtime_params(log_interval=1000)
    return train_classifier(base, data["train"], data["val"], LABELS, params, runtime, seed)


# ---- instructions ----------------------------------------------------------------------------------------------------

WORDINGS = (
    "Name it in plural.",
    "What is the plural?",
    "Give the plural of this word.",
    "More than one of it is called",
)
NOUNS = (
    "apple boat bread candle door egg field garden goat hat horse house king lamp letter market mill moon nail oven "
)
NOUNS += "pear pond queen ring road rose sail shoe spoon star stone table tower town tree wagon wall well wheel window"


def plural_pairs() -> dict[str, list[Pair]]:
    """Return instruction pairs by split: each noun is held out in one wording, and known in the others."""
    found: dict[str, list[Pair]] = {"train": [], "val": [], "test": []}
    for i, noun in enumerate(NOUNS.split()):
        for j, wording in enumerate(WORDINGS):
            split = "test" if (i + j) % len(WORDINGS) == 0 else "train"
            found[split].append(Pair(wording, noun, f"{noun}s", "plural"))
    found["val"] = found["train"][::8]
    return found


def trained_instruct(base: Checkpoint, pairs: dict[str, list[Pair]], seed: int, **changes: Any) -> Checkpoint:
    """Return an instruction-tuned model of the plurals, asked in ChatML."""
    torch.manual_seed(seed)
    gpt = copy.deepcopy(base.model)
    assert isinstance(gpt, GPT)
    encoder = ConversationEncoder(base.tokenizer, "chatml", None)
    train_set, val_set = (pair_examples(pairs[split], encoder, gpt.config.context_length) for split in ("train", "val"))
    task = TrainingTask(
        loss_function=next_token_loss,
        batches=example_batches(train_set, collate_pairs, 16, 1, seed),
        val_batches=partial(batches_by_length, val_set, collate_pairs, 16),
        evaluate=lambda batches: {"val/loss": mean_loss(gpt, next_token_loss, batches)},
    )
    fit(gpt, task, classify_params(**{"max_steps": 200, **changes}), runtime_params(log_interval=1000))
    return Checkpoint(gpt, base.tokenizer, base.config.instructed("chatml", base.tokenizer))
