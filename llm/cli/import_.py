"""`python -m llm import`."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path
from typing import TYPE_CHECKING

from llm.cli.options import check_output

if TYPE_CHECKING:
    from llm.checkpoint.folder import Checkpoint

SUMMARY = "make a model folder of open weights"
DESCRIPTION = (
    "Makes a model folder of another tool's model: a folder of transformers (gpt2, llama, mistral, qwen2, qwen3, "
    "smollm3, olmo2, phi3, gemma3_text; safetensors only), a .gguf file, or a name on the Hugging Face hub, whose "
    "cache is looked in first and which HF_HUB_OFFLINE=1 keeps from the network. The weights keep their dtype. A model "
    "folder is a source too: with --adapter it is the base that an adapter is merged into."
)
EXAMPLES = (
    "python -m llm import SmolLM2-135M-Instruct.Q8_0.gguf models/smollm2",
    "python -m llm import openai-community/gpt2 models/gpt2",
    "python -m llm import models/base models/again --adapter models/instruct/adapter",
    "python -m llm import HuggingFaceTB/SmolLM2-135M-Instruct models/tuned --adapter PEFT_DIR",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SOURCE", help="a folder, a .gguf file or a hub name such as org/name")
    parser.add_argument("model_dir", type=Path, metavar="MODEL_DIR", help="the model folder to write")
    parser.add_argument(
        "--adapter",
        type=Path,
        metavar="DIR",
        help="a LoRA adapter to merge: the adapter/ of a model that was trained with trainable: lora, or one of PEFT",
    )


def with_adapter(checkpoint: Checkpoint, folder: Path) -> Checkpoint:
    """Return a base with an adapter merged into it, one of ours or of PEFT."""
    if (folder / "adapter_config.json").is_file():
        from llm.convert.peft_in import merge_peft

        return merge_peft(folder, checkpoint)
    from llm.checkpoint.adapter import load_adapter
    from llm.model.lora import merge_lora

    checkpoint = load_adapter(folder, checkpoint)
    merge_lora(checkpoint.model)
    return checkpoint


def run(args: argparse.Namespace) -> None:
    """Write a model folder from another tool's model, or from a base model and an adapter for it."""
    from llm.checkpoint.card import foreign_base, new_card
    from llm.checkpoint.folder import save_checkpoint
    from llm.convert.load import describe, import_model
    from llm.download.hub import source_files

    check_output(args.model_dir, args.source)
    checkpoint = import_model(args.source)
    if args.adapter is not None:
        checkpoint = with_adapter(checkpoint, args.adapter)
    base = foreign_base(args.source, source_files(args.source))
    save_checkpoint(args.model_dir, checkpoint, card=new_card(checkpoint.config.kind, base=base))
    logging.getLogger("llm").info(f"{args.model_dir}: {describe(checkpoint)}")
