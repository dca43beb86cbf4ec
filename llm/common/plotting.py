"""Style of all pictures, and how to save one so that the same content gives the same bytes."""

from __future__ import annotations

import io
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BLUE, LIGHT_BLUE, ORANGE, GREY, INK = "#1f5fa8", "#8db8e2", "#e08a2c", "#a9b2bd", "#2b2f36"
STYLE: dict[str, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "text.color": INK,
    "text.parse_math": False,  # labels come from data
    "axes.edgecolor": "#c5cbd3",
    "axes.labelcolor": INK,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": "#e9ecf0",
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "legend.frameon": False,
    "figure.dpi": 120,
    "figure.constrained_layout.w_pad": 0.12,
    "figure.constrained_layout.h_pad": 0.1,
}


def style() -> AbstractContextManager[None]:
    """Apply our style on matplotlib's defaults, ignoring the user's settings."""
    from matplotlib import rc_context, rcParamsDefault

    settings: dict[Any, Any] = {key: value for key, value in rcParamsDefault.items() if not key.startswith("backend")}
    return rc_context(settings | STYLE)


def new_figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure  # without pyplot: no window system, nothing global

    return Figure(figsize=(width, height), layout="constrained")


def save(figure: Figure, path: Path) -> None:
    """Save with a palette and without metadata: a small file, and the same picture gives the same bytes."""
    from PIL import Image

    content = io.BytesIO()
    figure.savefig(content, format="png")
    Image.open(content).convert("RGB").quantize(128, dither=Image.Dither.NONE).save(path, format="png", optimize=True)


def shorten(text: str) -> str:
    return text if len(text) <= 24 else text[:23] + "…"
