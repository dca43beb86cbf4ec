"""Tokenizers of a model folder or a .gguf file, whoever made it."""

from __future__ import annotations

from pathlib import Path

from llm.common.errors import InputError
from llm.common.files import read_json_object
from llm.tokenizer.bpe import FILE_NAME, Tokenizer
from llm.tokenizer.build import ImportedTokenizer
from llm.tokenizer.gguf import read_gguf_tokenizer
from llm.tokenizer.hf import read_tokenizer_json
from llm.tokenizer.prompts import TEMPLATES


def import_tokenizer(path: Path) -> ImportedTokenizer:
    """Read the tokenizer and the prompt template of a .gguf file, a folder of transformers or a checkpoint of ours."""
    if path.is_file():
        return read_gguf_tokenizer(path)
    if not (path / FILE_NAME).is_file():
        return read_tokenizer_json(path)
    config = read_json_object(path / "config.json", "make the model folder again")
    template, system = config.get("template"), config.get("system")
    if template not in (None, *TEMPLATES) or not isinstance(system, str | None):
        raise InputError(f"{path / 'config.json'}: unknown template or system; make the model folder again")
    return ImportedTokenizer(Tokenizer.load(path), template, system)
