"""Tokenizers of a model folder or a .gguf file, whoever made it."""

from __future__ import annotations

from pathlib import Path

from llm.common.errors import InputError
from llm.common.files import read_json_object
from llm.common.gguf_header import read_gguf_header
from llm.tokenizer.bpe import FILE_NAME, Tokenizer
from llm.tokenizer.build import ImportedTokenizer
from llm.tokenizer.chat_source import ChatSource, gguf_chat, read_hf_chat, read_template_files
from llm.tokenizer.conversation import ConversationEncoder
from llm.tokenizer.gguf import read_gguf_tokenizer
from llm.tokenizer.hf import read_tokenizer_json
from llm.tokenizer.own_template import OwnTemplate
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


def own_conversations(path: Path, tokenizer: Tokenizer) -> ConversationEncoder:
    """Return the encoder of the chat template that came with a model; raise `InputError` where none did."""
    if path.is_file():
        chat = gguf_chat(read_gguf_header(path).fields)
    elif (path / FILE_NAME).is_file():
        config = read_json_object(path / "config.json", "make the model folder again")
        chat = ChatSource(read_template_files(path), config.get("special_tokens"))
    else:
        chat = read_hf_chat(path)
    if chat.templates is None:
        raise InputError(
            f"{path}: has no chat template (finetune_instruct.template: own); take alpaca, chatml or llama3"
        )
    return ConversationEncoder(tokenizer, None, None, OwnTemplate(tokenizer, chat.templates, chat.special_tokens or {}))
