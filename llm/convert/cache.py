"""Other tools' models for direct use: imported once, into a cache of model folders.

A model's folder there is named by a digest of its
files and of the code that imports them, so that a change of either makes a new one.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from pathlib import Path

from llm.checkpoint.folder import save_checkpoint
from llm.common.cache import cache_root
from llm.common.errors import InputError
from llm.common.files import read_json, read_json_object, write_atomic
from llm.download.hub import ADAPTER, HUB_NAME, source_files

READ = (".json", ".txt", ".jinja", ".model", ".safetensors", ".gguf")  # endings of files that an import may read
CODE = ("config.py", "checkpoint", "common", "convert", "model", "tokenizer")  # what an import runs, inside `llm`

log = logging.getLogger("llm")


def model_folder(source: str | Path) -> Path:
    """Return the model folder of a source: the source itself, or the import of another tool's model in the cache.

    An import is whole or not there, and a second start finds it. Raises `InputError` for a source that cannot be read.
    """
    if not is_foreign(source):
        return Path(source)
    from filelock import FileLock

    from llm.convert.load import import_model

    files = source_files(str(source))
    root = cache_root()
    name = re.sub(r"[^\w.-]+", "--", str(source if HUB_NAME.fullmatch(str(source)) else files.name)).strip("-.")
    folder = root / f"{name[:80] or 'model'}-{import_digest(files, root / 'digests')[:16]}"
    if not (folder / "config.json").is_file():
        root.mkdir(parents=True, exist_ok=True)
        with FileLock(root / f".{folder.name}.lock"):
            if not (folder / "config.json").is_file():
                log.info("%s: imported once, to %s (LLM_CACHE names another place)", source, folder)
                save_checkpoint(folder, import_model(str(files)))
    return folder


def is_foreign(source: str | Path) -> bool:
    """Tell whether a source is another tool's model, by its form alone; what is neither is no model folder either."""
    path = Path(source)
    if path.is_file():
        return path.suffix == ".gguf"
    if path.is_dir():
        config = path / "config.json"
        try:
            alone = not config.exists() and (path / ADAPTER).is_file()  # importing it says what is missing
            return alone or "model_type" in read_json_object(config)
        except InputError:
            return False
    ours = path.parts[:1] == ("models",) or (path.parent not in (Path(), path) and path.parent.is_dir())
    return path.suffix == ".gguf" or (HUB_NAME.fullmatch(str(source)) is not None and not ours)


def import_digest(files: Path, known: Path) -> str:
    """Return a digest of all that an import depends on; `known` is where digests of large files are kept."""
    digest = hashlib.sha256()
    package = Path(__file__).resolve().parents[1]
    for part in CODE:
        for path in sorted((package / part).rglob("*.py")) if (package / part).is_dir() else [package / part]:
            digest.update(path.read_bytes())
    for path in [files] if files.is_file() else sorted([*files.iterdir(), *files.glob("*/*.jinja")]):
        if path.suffix in READ and path.is_file():
            digest.update(f"\n{path.name} {_file_digest(path, known)}".encode())
    return digest.hexdigest()


def _file_digest(path: Path, known: Path) -> str:
    """Return the sha256 of a file, from the notes in `known` where nothing touched the file since it was read."""
    stat = path.stat()
    state = [stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]
    note = known / hashlib.sha256(os.fsencode(path.resolve())).hexdigest()
    try:
        kept = read_json(note)
        if isinstance(kept, dict) and kept.get("state") == state:
            return str(kept["sha256"])
    except (InputError, LookupError):
        pass
    with path.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    write_atomic(note, json.dumps({"state": state, "sha256": sha256}))
    return sha256
