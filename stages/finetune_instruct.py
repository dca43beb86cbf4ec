"""Finetunes the base model to follow instructions: `models/base/` to `models/instruct/`.

With `scratch_control` the same training from random weights gives `models/instruct_scratch/`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from llm.checkpoint import ModelFolder, ModelFolderConfig, load_model_folder, save_model_folder
from llm.data import (
    batches_by_length,
    collate_pairs,
    encode_prompt,
    example_batches,
    pair_examples,
    read_pairs,
    stop_token,
)
from llm.generate import generate
from llm.model import GPT
from llm.train import FitResult, fit, mean_loss, next_token_loss, pick_device
from stages.run import Run, main


def finetune_instruct(run: Run) -> None:
    section = run.params.finetune_instruct
    result = train(run, "models/instruct", from_base=True)
    metrics: dict[str, Any] = {"steps": result.steps, "best_step": result.best_step, **result.kept}
    run.write_history(result.history)
    if section.scratch_control:
        metrics["scratch"] = train(run, "models/instruct_scratch", from_base=False).kept
    else:
        Path("models/instruct_scratch").mkdir(parents=True, exist_ok=True)  # an output that DVC expects, empty
    run.write_metrics(metrics)


def train(run: Run, name: str, from_base: bool) -> FitResult:
    """Trains one instruction follower and writes it to `name`."""
    params, section = run.params, run.params.finetune_instruct
    torch.manual_seed(params.seed)
    device = pick_device(params.runtime.device)
    base = load_model_folder(Path("models/base"), device, section.dropout)
    gpt = base.config.gpt
    folder = Path("data/tokens/instructions")
    val_pairs = read_pairs(folder / "val.jsonl")
    train_set, val_set = (
        pair_examples(pairs, base.tokenizer, section.template, section.mask_prompt, gpt.context_length)
        for pairs in (read_pairs(folder / "train.jsonl"), val_pairs)
    )
    assert isinstance(base.model, GPT)
    model = base.model if from_base else GPT(gpt).to(device)
    stop = stop_token(base.tokenizer, section.template)

    def evaluate() -> dict[str, float]:
        batches = batches_by_length(val_set, collate_pairs, section.batch_size)
        return {"val/loss": mean_loss(model, next_token_loss, batches)}

    def sample() -> str:
        prompt = encode_prompt(base.tokenizer, section.template, val_pairs[0].instruction, val_pairs[0].input)
        return base.tokenizer.decode(generate(model, [prompt], max_new_tokens=60, stop=[stop])[0])

    with run.graceful():
        result = fit(
            model,
            next_token_loss,
            example_batches(train_set, collate_pairs, section.batch_size, section.grad_accum_steps, params.seed),
            section,
            params.runtime,
            evaluate=evaluate,
            sample=sample,
            log=run.log if from_base else run.log_as("scratch"),
            state_dir=run.state_dir / Path(name).name,
            should_stop=lambda: run.stop_requested,
            title=Path(name).name,
        )
    config = ModelFolderConfig(kind="instruct", gpt=gpt, template=section.template)
    save_model_folder(Path(name), ModelFolder(model, base.tokenizer, config))
    return result


if __name__ == "__main__":
    main("finetune-instruct", finetune_instruct)
