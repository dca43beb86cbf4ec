"""Errors that a user can act on, each one line."""

from __future__ import annotations

from llm.common.sanitize import one_line

LONGEST_MESSAGE = 2000  # characters


class InputError(ValueError):
    """Something the user gave is wrong. The message is one line: what, where, and what to do.

    It may quote a file that anybody wrote: what is not printable in it is escaped here, for whoever prints it, and what
    is too long loses its middle.
    """

    def __init__(self, message: str) -> None:
        line = one_line(message)
        if len(line) > LONGEST_MESSAGE:
            line = f"{line[: LONGEST_MESSAGE // 2]} ... {line[-LONGEST_MESSAGE // 2 :]}"
        super().__init__(line)


class DivergenceError(InputError):
    """A loss that is not finite or explodes: the learning rate is too high, or the data is bad."""
