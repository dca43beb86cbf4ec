"""Pictures of a model over a text."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from llm.evaluation.base.inside import Inside
from llm.reporting.text_pictures import WIDTH, draw_attention, draw_token_losses, spans


def test_text_is_laid_out_as_it_reads() -> None:
    tokens = ["One", " morning", ".\n", "x" * (WIDTH - 1), "yz", "\x1b"]
    found = list(spans(tokens))
    assert [(s.line, s.column, s.text, s.token) for s in found] == [
        (0, 0, "One", 0),
        (0, 3, " morning", 1),
        (0, 11, ".", 2),
        (0, 12, "↵", 2),
        (1, 0, "x" * (WIDTH - 1), 3),
        (2, 0, "yz", 4),
        (2, 2, "\ufffd", 5),
    ]


def test_pictures_have_the_same_bytes_twice(tmp_path: Path) -> None:
    inside = Inside(["One", " morning", "$x$", "\n"], [0.0, 2.0, 5.5, 0.1], 1, 0, np.tri(3, dtype=np.float32) / 3)
    for draw in (draw_token_losses, draw_attention):
        contents = []
        for name in ("one.png", "two.png"):
            draw(inside, tmp_path / name)
            contents.append((tmp_path / name).read_bytes())
        assert contents[0] == contents[1] and contents[0].startswith(b"\x89PNG")
