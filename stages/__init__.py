"""The pipeline: one short script for each DVC stage."""

import importlib.util
import sys
from pathlib import Path

_found = importlib.util.find_spec("llm")
_ours = Path(__file__).resolve().parents[1] / "llm"
if _found is None or _found.origin is None or Path(_found.origin).resolve().parent != _ours:
    sys.exit(
        f"stages: wrong package llm (expected {_ours}, got {_found and _found.origin}); another one has this name: "
        "use an environment of its own, or `pip uninstall llm` and install this project again"
    )
