"""Prompt templates."""

from __future__ import annotations

from collections.abc import Sequence

from llm.config import Template
from llm.tokenizer.bpe import END_OF_TEXT, Tokenizer

# Alpaca's template (Taori et al. 2023): the instruction and the response each follow their heading.
ALPACA_PREAMBLE = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request."
)


ALPACA_INSTRUCTION = "\n\n### Instruction:\n"


ALPACA_RESPONSE = "\n\n### Response:\n"


def encode_prompt(
    tokenizer: Tokenizer, template: Template, instruction: str, input: str = "", system: str | None = None
) -> list[int]:
    """Everything up to where the response starts. What the user wrote never becomes a special token."""
    bos = [] if tokenizer.bos is None else [tokenizer.bos]
    if template == "alpaca":
        more = f"\n\n### Input:\n{input}" if input else ""
        return bos + tokenizer.encode(f"{ALPACA_PREAMBLE}{ALPACA_INSTRUCTION}{instruction}{more}{ALPACA_RESPONSE}")
    question = f"{instruction}\n{input}" if input else instruction
    if template == "llama3":
        question = question.strip()  # as in Llama 3's own template
    turns = [("user", question)] if system is None else [("system", system), ("user", question)]
    # A marker of a chat is one token where the tokenizer has it (ours do), its characters where not (GPT-2's).
    names = ("<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
    im_start, im_end, header, header_end, eot = (tokenizer.special_tokens.get(name, name) for name in names)
    parts: list[int | str] = []
    for role, text in turns:
        if template == "llama3":
            parts += [header, role, header_end, f"\n\n{text}", eot]
        else:
            parts += [im_start, f"{role}\n{text}", im_end, "\n"]
    parts += [header, "assistant", header_end, "\n\n"] if template == "llama3" else [im_start, "assistant\n"]
    return bos + _encode_parts(tokenizer, parts)


def _encode_parts(tokenizer: Tokenizer, parts: Sequence[int | str]) -> list[int]:
    """Tokens as they are, and what text stands between them encoded as a whole."""
    ids: list[int] = []
    text = ""
    for part in parts:
        if isinstance(part, int):
            ids += [*tokenizer.encode(text), part]
            text = ""
        else:
            text += part
    return ids + tokenizer.encode(text)


def stop_token(tokenizer: Tokenizer, template: Template) -> int:
    """The token that ends a response."""
    name = {"alpaca": tokenizer.end, "chatml": "<|im_end|>", "llama3": "<|eot_id|>"}[template]
    return tokenizer.special_tokens.get(name, tokenizer.eot)


def end_tokens(tokenizer: Tokenizer, template: Template | None) -> set[int]:
    """All tokens that a model may end its text with: the end of a text, and that of a turn in its template."""
    turns = {"chatml": ("<|im_end|>", END_OF_TEXT), "llama3": ("<|eot_id|>", "<|eom_id|>", "<|end_of_text|>")}
    names = turns.get(template or "", ())
    return {tokenizer.eot, *(tokenizer.special_tokens[name] for name in names if name in tokenizer.special_tokens)}
