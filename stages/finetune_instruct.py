"""Finetunes the base model to follow instructions: `models/base/` to `models/instruct/`.

With `scratch_control` the same training from random weights gives `models/instruct_scratch/`.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from llm.checkpoint.folder import Checkpoint, CheckpointConfig
from llm.data.batches import Batch, collate_pairs
from llm.data.examples import pair_examples, read_pairs
from llm.inference.generate import generate
from llm.model.gpt import GPT
from llm.tokenizer.prompts import encode_prompt, stop_token
from llm.training.losses import mean_loss, next_token_loss
from stages.runtime.finetune import Task, finetune
from stages.runtime.processes import main_training
from stages.runtime.run import Run


def finetune_instruct(run: Run) -> None:
    finetune(run, "instruct", run.params.finetune_instruct, make_task)


def make_task(run: Run, base: Checkpoint) -> Task:
    """The base itself, and the pairs that it learns to answer."""
    section = run.params.finetune_instruct
    model, tokenizer, gpt = base.model, base.tokenizer, base.config.gpt
    assert isinstance(model, GPT)
    # A base that already follows instructions in this template goes on being told what it was told first.
    system = base.config.system if base.config.template == section.template else None
    folder = Path("data/tokens/instructions")
    val_pairs = read_pairs(folder / "val.jsonl")
    train_set, val_set = (
        pair_examples(pairs, tokenizer, section.template, section.mask_prompt, gpt.context_length, system)
        for pairs in (read_pairs(folder / "train.jsonl"), val_pairs)
    )

    def evaluate(batches: Iterable[Batch]) -> dict[str, float]:
        return {"val/loss": mean_loss(model, next_token_loss, batches)}

    def sample() -> str:
        prompt = encode_prompt(tokenizer, section.template, val_pairs[0].instruction, val_pairs[0].input, system)
        stop = stop_token(tokenizer, section.template)
        return tokenizer.decode(generate(model, [prompt], max_new_tokens=60, stop=[stop])[0])

    return Task(
        model,
        CheckpointConfig(kind="instruct", gpt=gpt, template=section.template, system=system),
        train_set,
        val_set,
        collate_pairs,
        next_token_loss,
        evaluate,
        sample,
    )


if __name__ == "__main__":
    main_training("finetune-instruct", finetune_instruct)
