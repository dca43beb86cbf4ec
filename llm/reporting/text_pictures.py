"""Draw what a base model makes of a text: the loss of each token, and the attention of a head."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from llm.common.plotting import BLUE, INK, ORANGE, new_figure, save, style
from llm.common.sanitize import visible
from llm.evaluation.base.inside import Inside

WIDTH = 88  # characters of a line
LABELLED = 5  # tokens whose loss is written


class Span(NamedTuple):
    """Part of a token in a line of text."""

    line: int
    column: int
    text: str
    token: int


def spans(tokens: Iterable[str]) -> Iterator[Span]:
    """Yield the parts of tokens as they stand in lines; a line end shows as a sign of its own."""
    line, column = 0, 0
    for number, token in enumerate(tokens):
        for part in visible(token.replace("\n", "\n↵\n")).split("\n"):
            if not part:
                continue
            if column + len(part) > WIDTH:
                line, column = line + 1, 0
            yield Span(line, column, part[:WIDTH], number)
            column += len(part)
            if part == "↵":
                line, column = line + 1, 0


def draw_token_losses(inside: Inside, path: Path) -> None:
    """Draw a text with a bar under each token, as high as its loss."""
    found = list(spans(inside.tokens))
    lines = 1 + max(span.line for span in found)
    highest = max([*inside.losses, 1e-9])
    surprising = sorted(range(len(inside.losses)), key=lambda i: -inside.losses[i])[:LABELLED]
    with style():
        figure = new_figure(10, 0.6 + 0.62 * lines)
        figure.set_layout_engine("none")
        top = 0.5 / figure.get_figheight()
        axes = figure.add_axes((0.02, 0.01, 0.96, 1 - top))
        axes.set(xlim=(0, WIDTH), ylim=(lines, -0.05))
        axes.axis("off")
        title = f"Loss of each token of a held-out text (nats; the longest bar: {highest:.1f})"
        figure.text(0.02, 1 - 0.5 * top, title, fontsize=11, fontweight="bold", va="center")
        drawn: set[int] = set()
        for line, column, text, token in found:
            axes.text(column, line + 0.3, text, family="DejaVu Sans Mono", fontsize=12.9, va="baseline", color=INK)
            if token in drawn:
                continue
            drawn.add(token)
            height = 0.5 * inside.losses[token] / highest
            colour = ORANGE if token in surprising else BLUE
            space = len(text) - len(text.lstrip()) if text.strip() else 0
            axes.bar(column + space + 0.05, height, len(text) - space - 0.1, line + 0.38, align="edge", color=colour)
            if token in surprising:
                axes.text(
                    column + len(text), line + 0.38 + height, f" {inside.losses[token]:.1f}", fontsize=8, va="bottom"
                )
        save(figure, path)


def draw_attention(inside: Inside, path: Path) -> None:
    """Draw a head's attention over a text: a row for each token, a column for each that it can look at."""
    n = len(inside.attention)
    labels = [visible(token).replace("\n", "↵") for token in inside.tokens[:n]]
    with style():
        figure = new_figure(8.2, 6.6)
        axes = figure.subplots()
        image = axes.imshow(inside.attention, cmap="Blues", vmin=0, vmax=1)
        axes.set_xticks(range(n), labels, rotation=90, family="DejaVu Sans Mono", fontsize=9)
        axes.set_yticks(range(n), labels, family="DejaVu Sans Mono", fontsize=9)
        axes.grid(visible=False)
        axes.set(xlabel="looks at", ylabel="token")
        axes.set_title(f"Attention of head {inside.head + 1} in block {inside.layer + 1} over a held-out text")
        figure.colorbar(image, ax=axes, shrink=0.8, label="share of the token's attention")
        save(figure, path)
