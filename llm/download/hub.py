"""Sources of open weights: a model folder, a .gguf file, or a name on the Hugging Face hub."""

from __future__ import annotations

import re
from pathlib import Path

from llm.common.errors import InputError

PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
ADAPTER = "adapter_config.json"  # PEFT's
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
TEXT_FILES = ["*.json", "*.txt", "*.jinja"]  # all that a hub folder needs besides its weights


def source_files(source: str, weights: bool = True) -> Path:
    """Return the folder or .gguf file of a source; a hub name is fetched into huggingface_hub's cache.

    Only files that are read here are fetched, never a pickled one; without `weights` only the small ones.
    """
    path = Path(source)
    if path.is_dir() or (path.is_file() and path.suffix == ".gguf"):
        return path
    if path.exists() or path.suffix == ".gguf" or not HUB_NAME.fullmatch(source):
        problem = "no folder and no .gguf file" if path.exists() else "not found"
        if any(path.match(pattern) for pattern in PICKLED):
            problem += "; pickled files are not read: unpickling executes code"
        raise InputError(f"{source}: {problem}; give a model folder, a .gguf file or a hub name such as org/name")
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise InputError(
            f"{source}: no such folder, and for a hub name huggingface_hub is missing; pip install 'textmill[hf]'"
        ) from None
    patterns = [*TEXT_FILES, "*.safetensors"] if weights else TEXT_FILES
    try:  # subfolders and consolidated files hold the same weights again, in other formats
        return Path(snapshot_download(source, allow_patterns=patterns, ignore_patterns=["*/*", "consolidated*"]))
    except Exception as error:  # offline, not cached, no such name, no permission: of several libraries' classes
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(f"{source}: no such folder, and the hub did not give it ({reason}); check the name") from None
