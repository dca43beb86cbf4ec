"""Solutions of chapter 7."""

from __future__ import annotations


def mask_prompt(ids: list[int], prompt_length: int) -> tuple[list[int], list[int]]:
    """Return inputs and targets of a sequence, the targets of the prompt at -100."""
    targets = [-100] * (prompt_length - 1) + ids[prompt_length:]
    return ids[:-1], targets


def is_exact(answer: str, expected: str) -> bool:
    """Tell whether two answers are equal but for case, outer spaces and a final full stop."""
    return answer.strip().lower().removesuffix(".") == expected.strip().lower().removesuffix(".")


def alpaca(instruction: str, input: str = "") -> str:
    """Return Alpaca's prompt as text."""
    head = "Below is an instruction that describes a task. Write a response that appropriately completes the request."
    middle = f"\n\n### Instruction:\n{instruction}" + (f"\n\n### Input:\n{input}" if input else "")
    return head + middle + "\n\n### Response:\n"
