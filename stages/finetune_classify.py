"""Finetunes the base model into a classifier of messages: `models/base/` to `models/classifier/`.

With `scratch_control` the same training from random weights gives `models/classifier_scratch/`.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch

from llm.checkpoint import ModelFolder, ModelFolderConfig, load_model_folder, save_model_folder
from llm.data import (
    batches_by_length,
    class_weights,
    collate_labels,
    example_batches,
    message_examples,
    read_labels,
    read_messages,
)
from llm.model import GPT, GPTClassifier
from llm.train import FitResult, accuracy, fit, freeze, label_loss, mean_loss, pick_device
from stages.run import Run, main


def finetune_classify(run: Run) -> None:
    section = run.params.finetune_classify
    result, trained = train(run, "models/classifier", from_base=True)
    metrics: dict[str, Any] = {
        "trained_parameters": trained,
        "steps": result.steps,
        "best_step": result.best_step,
        **result.kept,
    }
    run.write_history(result.history)
    if section.scratch_control:
        metrics["scratch"] = train(run, "models/classifier_scratch", from_base=False)[0].kept
    else:
        Path("models/classifier_scratch").mkdir(parents=True, exist_ok=True)  # an output that DVC expects, empty
    run.write_metrics(metrics)


def train(run: Run, name: str, from_base: bool) -> tuple[FitResult, int]:
    """Trains one classifier and writes it to `name`; returns also how many parameters were trained."""
    params, section = run.params, run.params.finetune_classify
    torch.manual_seed(params.seed)
    device = pick_device(params.runtime.device)
    base = load_model_folder(Path("models/base"), device, section.dropout)
    folder = Path("data/tokens/messages")
    labels = read_labels(folder)
    length = min(section.max_length, base.config.gpt.context_length)
    train_set, val_set = (
        message_examples(read_messages(folder / f"{split}.jsonl"), base.tokenizer, labels, length)
        for split in ("train", "val")
    )
    assert isinstance(base.model, GPT)
    model = GPTClassifier(base.model if from_base else GPT(base.config.gpt), len(labels)).to(device)
    freeze(model, section.trainable if from_base else "all", section.last_blocks)
    weights = class_weights(train_set, len(labels)).to(device) if section.class_weights == "balanced" else None
    loss_function = partial(label_loss, class_weights=weights)

    def evaluate() -> dict[str, float]:
        batches = list(batches_by_length(val_set, collate_labels, section.batch_size))
        return {"val/loss": mean_loss(model, loss_function, batches), "val/accuracy": accuracy(model, batches)}

    with run.graceful():
        result = fit(
            model,
            loss_function,
            example_batches(train_set, collate_labels, section.batch_size, section.grad_accum_steps, params.seed),
            section,
            params.runtime,
            evaluate=evaluate,
            log=run.log if from_base else run.log_as("scratch"),
            state_dir=run.state_dir / Path(name).name,
            should_stop=lambda: run.stop_requested,
            title=Path(name).name,
        )
    config = ModelFolderConfig(kind="classifier", gpt=base.config.gpt, labels=labels, max_length=length)
    save_model_folder(Path(name), ModelFolder(model, base.tokenizer, config))
    return result, sum(p.numel() for p in model.parameters() if p.requires_grad)


if __name__ == "__main__":
    main("finetune-classify", finetune_classify)
