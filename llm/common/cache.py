"""The folder of what is made once and kept: imported models, compiled kernels, the web page's runtime."""

from __future__ import annotations

import os
from pathlib import Path


def cache_root() -> Path:
    """Return `LLM_CACHE`, or `textmill` in the user's cache folder."""
    if chosen := os.environ.get("LLM_CACHE"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "textmill"
