"""Open weights of any known format."""

from __future__ import annotations

import contextlib

import torch

from llm.checkpoint.folder import Checkpoint, load_checkpoint
from llm.common.errors import InputError
from llm.convert.gguf import read_gguf
from llm.convert.hf import hf_config_of, read_hf
from llm.download.hub import source_files
from llm.tokenizer.bpe import FILE_NAME as OUR_TOKENIZER


def import_model(source: str, dtype: torch.dtype | None = None) -> Checkpoint:
    """Load weights, tokenizer and template of a folder, a .gguf file or a hub name, in evaluation mode.

    A folder is transformers' or one of ours. `dtype` None keeps the one that the weights are stored in. The kind is
    instruct where the chat template is a known one, else base. Raises `InputError` for anything that is missing, left
    over or that `GPT` cannot express.
    """
    path = source_files(source)
    if path.is_file():
        return read_gguf(path, dtype)
    if (path / OUR_TOKENIZER).is_file():
        return load_checkpoint(path, dtype=dtype)
    return read_hf(path, dtype)


def describe(checkpoint: Checkpoint) -> str:
    """Describe a model in a line: `llama, 134,515,008 parameters, bfloat16, template chatml`."""
    parameters = list(checkpoint.model.parameters())
    dtypes = sorted({str(p.dtype).removeprefix("torch.") for p in parameters})
    words = [f"{sum(p.numel() for p in parameters):,} parameters", *dtypes]
    with contextlib.suppress(InputError):
        words.insert(0, hf_config_of(checkpoint.config.gpt)[0].model_type)
    config = checkpoint.config
    own = config.kind == "instruct" and config.chat_templates is not None
    words.append("its own chat template" if own else f"template {config.template}" if config.template else config.kind)
    return ", ".join(words)
