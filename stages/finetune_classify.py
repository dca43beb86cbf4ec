"""Finetune the base model into a classifier of messages: `models/base/` to `models/classifier/`.

With `scratch_control` the same training from random weights gives `models/classifier_scratch/`.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from pathlib import Path

from llm.checkpoint.folder import Checkpoint, CheckpointConfig
from llm.data.about import about_messages, may_quote
from llm.data.batches import Batch, collate_labels
from llm.data.examples import class_weights, message_examples, read_labels, read_messages
from llm.model.classifier import GPTClassifier
from llm.model.gpt import GPT
from llm.training.calibration import calibrated, held_out_logits
from llm.training.losses import label_loss, label_metrics
from stages.runtime.finetune import FinetuneTask, finetune
from stages.runtime.processes import main_training
from stages.runtime.run import Run


def finetune_classify(run: Run) -> None:
    finetune(run, "classifier", run.params.finetune_classify, make_task)


def make_task(run: Run, base: Checkpoint) -> FinetuneTask:
    """Return a classifier on top of the base, and its messages."""
    section = run.params.finetune_classify
    folder = Path("data/tokens/messages")
    labels = read_labels(folder)
    length = min(section.max_length, base.config.gpt.context_length)
    train_messages, val_messages = (read_messages(folder / f"{split}.jsonl") for split in ("train", "val"))
    train_set, val_set = (
        message_examples(messages, base.tokenizer, labels, length) for messages in (train_messages, val_messages)
    )
    assert isinstance(base.model, GPT)
    device = base.model.tok_emb.weight.device
    model = GPTClassifier(base.model, len(labels)).to(device)
    weights = class_weights(train_set, len(labels)).to(device) if section.class_weights == "balanced" else None
    config = CheckpointConfig(kind="classifier", gpt=base.config.gpt, labels=labels, max_length=length)

    def finish(batches: Iterable[Batch]) -> CheckpointConfig:
        return calibrated(config, *held_out_logits(model.eval(), batches), section)

    return FinetuneTask(
        model=model,
        config=config,
        about=about_messages(train_messages, quotable=may_quote(Path("data/tokens"), "messages")),
        train_set=train_set,
        val_set=val_set,
        collate=collate_labels,
        loss_function=partial(label_loss, class_weights=weights),
        evaluate=partial(label_metrics, model, class_weights=weights),
        finish=finish,
    )


if __name__ == "__main__":
    main_training("finetune-classify", finetune_classify)
