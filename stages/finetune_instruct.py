"""Finetune the base model to follow instructions: `models/base/` to `models/instruct/`.

With `scratch_control` the same training from random weights gives `models/instruct_scratch/`.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from pathlib import Path

from llm.checkpoint.folder import Checkpoint
from llm.common.errors import InputError
from llm.data.about import about_pairs, may_quote
from llm.data.batches import Batch, collate_pairs
from llm.data.examples import pack, pair_examples, read_pairs, too_long_pairs
from llm.inference.generate import stream, stream_text
from llm.model.gpt import GPT
from llm.tokenizer.conversation import ConversationEncoder, as_messages
from llm.training.losses import mean_loss, next_token_loss
from stages.runtime.finetune import FinetuneTask, finetune
from stages.runtime.processes import main_training
from stages.runtime.run import Run


def finetune_instruct(run: Run) -> None:
    finetune(run, "instruct", run.params.finetune_instruct, make_task)


def make_task(run: Run, base: Checkpoint) -> FinetuneTask:
    """Return the base itself, and its instruction pairs."""
    section = run.params.finetune_instruct
    model, tokenizer, gpt = base.model, base.tokenizer, base.config.gpt
    assert isinstance(model, GPT)
    if section.template == "own":
        config = base.config
        if config.kind != "instruct" or config.chat_templates is None:
            raise InputError("finetune_instruct.template: own needs a base with a chat template; take chatml")
        encoder = config.conversations(tokenizer)
    else:
        config = base.config.instructed(section.template, tokenizer)
        encoder = ConversationEncoder(tokenizer, section.template, config.system)
    folder = Path("data/tokens/instructions")
    train_pairs, val_pairs = (read_pairs(folder / f"{split}.jsonl") for split in ("train", "val"))
    train_set, val_set = (
        pair_examples(pairs, encoder, gpt.context_length, mask_prompt=section.mask_prompt, loss_on=section.loss_on)
        for pairs in (train_pairs, val_pairs)
    )
    for name, examples, pairs in (("train", train_set, train_pairs), ("val", val_set, val_pairs)):
        if line := too_long_pairs(examples, pairs):
            logging.getLogger("llm").warning(
                "finetune-instruct: %s: longer than the context of %d tokens: %s", name, gpt.context_length, line
            )

    def evaluate(batches: Iterable[Batch]) -> dict[str, float]:
        return {"val/loss": mean_loss(model, next_token_loss, batches)}

    def sample() -> Iterator[str]:
        prompt = encoder.encode(as_messages(val_pairs[0]._asdict())[:-1], tools=val_pairs[0].tools)
        return stream_text(tokenizer, stream(model, prompt, max_new_tokens=60, stop=config.stop_ids(tokenizer)))

    return FinetuneTask(
        model=model,
        config=config,
        about=about_pairs(train_pairs, quotable=may_quote(Path("data/tokens"), "instructions")),
        train_set=pack(train_set, gpt.context_length) if section.packing else train_set,
        val_set=val_set,
        collate=collate_pairs,
        loss_function=next_token_loss,
        evaluate=evaluate,
        sample=sample,
    )


if __name__ == "__main__":
    main_training("finetune-instruct", finetune_instruct)
