"""Your solutions of the exercises of chapter 7."""

from __future__ import annotations


def mask_prompt(ids: list[int], prompt_length: int) -> tuple[list[int], list[int]]:
    """Return inputs and targets of a sequence, the targets of the prompt at -100."""
    raise NotImplementedError


def is_exact(answer: str, expected: str) -> bool:
    """Tell whether two answers are equal but for case, outer spaces and a final full stop."""
    raise NotImplementedError


def alpaca(instruction: str, input: str = "") -> str:
    """Return Alpaca's prompt as text."""
    raise NotImplementedError
