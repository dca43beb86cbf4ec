"""Language models in plain PyTorch: `llm.load("models/instruct")` returns a `Model`.

The names below load with their first use: `import llm` alone loads no torch.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llm.api import Model, Sampling, Score, load
    from llm.common.errors import InputError

__all__ = ["InputError", "Model", "Sampling", "Score", "load"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'llm' has no attribute {name!r}")
    from llm import api

    return getattr(api, name)
