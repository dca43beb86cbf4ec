"""Pretrain a GPT on the corpus by next-token prediction: `data/tokens/` to `models/base/`."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import chain
from pathlib import Path

import torch

from llm.checkpoint.adapter import save_trained
from llm.checkpoint.card import Card, foreign_base, new_card
from llm.checkpoint.folder import Checkpoint, lm_checkpoint
from llm.common import distributed
from llm.common.device import pick_device
from llm.common.errors import InputError
from llm.config import SCRATCH, GPTConfig, Params, PretrainParams
from llm.convert.load import import_model
from llm.data.batches import held_out_windows, window_batches
from llm.data.shards import TokenShards
from llm.download.hub import source_files
from llm.inference.generate import stream, stream_text
from llm.inference.sampling import Sampling
from llm.model.gpt import GPT
from llm.tokenizer.bpe import Tokenizer
from llm.training.fit import TrainingTask, fit
from llm.training.freeze import freeze, trained_parameters
from llm.training.losses import lm_metrics, next_token_loss
from llm.training.precision import base_dtype
from stages.runtime.processes import main_training
from stages.runtime.run import Run


def pretrain(run: Run) -> None:
    params, section = run.params, run.params.pretrain
    tokens = Path("data/tokens")
    tokenizer = Tokenizer.load(tokens / "tokenizer")
    train, val = TokenShards(tokens / "corpus", "train"), TokenShards(tokens / "corpus", "val")

    torch.manual_seed(params.seed)
    device = pick_device(params.runtime.device)
    if section.init == SCRATCH:
        config = GPTConfig(**params.model.model_dump(), vocab_size=tokenizer.vocab_size)
        content = lm_checkpoint(GPT(config).to(device), tokenizer, template=None, system=None)
    else:
        content = open_weights(section, tokenizer, device, base_dtype(device, section))
    model = content.model
    assert isinstance(model, GPT)
    config, window = model.config, min(params.model.context_length, model.config.context_length)
    freeze(model, section)
    trained = trained_parameters(model)
    prompt = tokenizer.encode(section.prompt)

    def sample() -> Iterator[str]:
        sampling = Sampling(temperature=0.8)
        new = stream(model, prompt, max_new_tokens=section.sample_tokens, sampling=sampling, seed=params.seed)
        return stream_text(tokenizer, chain(prompt, new))

    task = TrainingTask(
        loss_function=next_token_loss,
        batches=window_batches(train, window, section.batch_size, section.grad_accum_steps, params.seed),
        val_batches=partial(held_out_windows, val, window, section.batch_size, section.eval_tokens),
        evaluate=partial(lm_metrics, model, val),
        sample=sample if prompt and section.sample_tokens else None,
        title="pretrain",
    )
    with run.graceful():
        result = fit(model, task, section, params.runtime, run)

    if distributed.rank() > 0:
        return
    with run.phase("saving"):
        save_trained(Path("models/base"), content, section, make_card(params, tokens))
    tokens_per_step = section.batch_size * section.grad_accum_steps * window
    run.write_history(result.history, result.curve)
    run.write_metrics(
        {
            "parameters": sum(p.numel() for p in model.parameters()),
            "trained_parameters": trained,
            "steps": result.steps,
            "epochs": result.steps * tokens_per_step / train.n_tokens,
            "best_step": result.best_step,
            **result.best_metrics,
        }
    )


def make_card(params: Params, tokens: Path) -> Card:
    """Return the card of the base model; open weights are its base, named without their path."""
    section, base, model = params.pretrain, None, params.model.model_dump(mode="json")
    if section.init != SCRATCH:
        base, model = foreign_base(section.init, source_files(section.init)), {}
    init = base.name if base is not None else section.init
    values = {"seed": params.seed, "model": model, **section.model_dump(mode="json"), "init": init}
    return new_card("base", tokens=tokens, data=["corpus"], params=values, base=base)


def open_weights(
    section: PretrainParams, tokenizer: Tokenizer, device: torch.device, dtype: torch.dtype | None
) -> Checkpoint:
    """Load the model that `pretrain.init` names. Its tokenizer must be that of the corpus."""
    imported = import_model(section.init, dtype)
    if not isinstance(imported.model, GPT):
        raise InputError(f"pretrain.init: {section.init} is a classifier; name a language model")
    if imported.tokenizer != tokenizer:
        raise InputError(
            f"pretrain.init: the tokenizer of {section.init} is not the one that data/tokens was encoded with; "
            "run tokenize again: `dvc repro -f tokenize`"
        )
    imported.model.to(device)
    return imported


if __name__ == "__main__":
    main_training("pretrain", pretrain)
