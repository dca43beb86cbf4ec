"""`python -m llm export`."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path
from typing import TYPE_CHECKING

from llm.cli.options import add_model, check_output
from llm.common.errors import InputError

if TYPE_CHECKING:
    from llm.checkpoint.card import Card

SUMMARY = "write a model for other tools"
DESCRIPTION = (
    "Writes a folder that transformers' Auto classes open, or a GGUF file that llama.cpp runs, tokenizer and chat "
    "template included; a folder for Ollama, or one that chats in a browser; or the adapter alone, in PEFT's form, of "
    "a model trained with trainable: lora. What the format has no place for is named and nothing is written."
)
EXAMPLES = (
    "python -m llm export models/instruct exported --format hf",
    "python -m llm export models/instruct model.gguf --format gguf --dtype q8_0",
    "python -m llm export models/instruct mine --format ollama && ollama create mine -f mine/Modelfile",
    "python -m llm export models/instruct page --format web && python -m http.server -d page",
    "python -m llm export models/instruct adapter --format peft --base HuggingFaceTB/SmolLM2-135M-Instruct",
)
FORMATS = ("hf", "gguf", "ollama", "web", "peft")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    add = parser.add_argument
    add("out", type=Path, metavar="OUT", help="the folder or file to write")
    add("--format", required=True, choices=FORMATS, help="for transformers, llama.cpp, Ollama, a browser or PEFT")
    add("--dtype", choices=["f16", "q8_0", "q4_1", "q4_0", "f32"], help="of the weights in a GGUF file (default: f16)")
    add("--runtime", type=Path, metavar="PATH", help="wllama's package for --format web (default: fetched by npm)")
    add("--base", metavar="NAME", help="the model that an adapter for PEFT belongs to")


def run(args: argparse.Namespace) -> None:
    """Write a model folder, or the adapter in it, in another tool's format."""
    if args.dtype is not None and args.format in ("hf", "peft"):
        raise InputError(
            "--dtype goes with --format gguf, ollama and web; in the other formats the weights keep theirs"
        )
    if args.runtime is not None and args.format != "web":
        raise InputError("--runtime goes with --format web; no other format has one")
    if args.base is not None and args.format != "peft":
        raise InputError("--base goes with --format peft; in the other formats a model stands on its own")
    if args.format == "peft":
        export_adapter(args.model_dir, args.out, args.base)
    else:
        export_model(args.model_dir, args.out, args.format, args.dtype or "f16", args.runtime)
    logging.getLogger("llm").info(f"{args.out}: written")


def export_adapter(model_dir: Path, out: Path, base: str | None) -> None:
    """Write the adapter of a model folder in PEFT's form."""
    from llm.convert.cache import model_folder
    from llm.convert.peft import export_peft

    check_output(out, model_dir, "adapter", holds="adapter_config.json")
    folder = model_folder(model_dir)
    if not (folder / "adapter").is_dir():
        raise InputError(f"{model_dir}: holds no adapter; train it with trainable: lora, or use --format hf")
    export_peft(folder / "adapter", out, base, export_card(folder))


def export_card(folder: Path) -> Card:
    """Return the card that goes with an export of a model folder."""
    from llm.release.lineage import exported, lineage

    return exported(folder, lineage(folder))


def export_model(model_dir: Path, out: Path, form: str, dtype: str, runtime: Path | None) -> None:
    """Write a model folder for transformers, or for llama.cpp, Ollama or a browser with weights of a dtype."""
    from llm.checkpoint.folder import load_checkpoint
    from llm.convert.cache import model_folder

    if form == "hf":
        check_output(out, model_dir)
    elif form == "ollama":
        check_output(out, model_dir, "folder of Ollama", holds="Modelfile")
    elif form == "web":
        check_output(out, model_dir, "exported page", holds="sw.js")
    folder = model_folder(model_dir)
    checkpoint = load_checkpoint(folder, dtype=None)
    card = export_card(folder)
    try:
        if form == "hf":
            from llm.convert.hf import export_hf

            export_hf(checkpoint, out, card)
        elif form == "ollama":
            from llm.devices.ollama import export_ollama

            export_ollama(checkpoint, out, dtype, card)  # type: ignore[arg-type]  # of the parser's choices
        elif form == "web":
            from llm.devices.web import export_web

            export_web(checkpoint, out, model_dir.resolve().stem, dtype, runtime, card)  # type: ignore[arg-type]
        else:
            from llm.convert.gguf import export_gguf

            export_gguf(checkpoint, out, dtype, card=card)  # type: ignore[arg-type]  # of the parser's choices
    except InputError as error:
        raise InputError(f"{model_dir}: {error}") from None
