"""A folder of static files that chats in a browser: a GGUF file, wllama (llama.cpp in WebAssembly) and a page.

wllama comes from the npm registry, by npm, once, into the cache; its bytes are pinned.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from llm.checkpoint.card import Card
from llm.checkpoint.folder import Checkpoint
from llm.common.cache import cache_root
from llm.common.errors import InputError
from llm.common.files import replaced_folder
from llm.common.sanitize import one_line
from llm.convert.gguf import FileType, export_gguf
from llm.devices.chat_form import ChatForm, chat_form, check_tokens
from llm.inference.sampling import GREEDY, sampling_of
from llm.tokenizer.bpe import Tokenizer

PACKAGE, VERSION = "@wllama/wllama", "2.4.0"  # the last for browsers without 64-bit WebAssembly, such as Safari
SHA512 = "KuVHeTUXcqHF01d85q3nWaRSVLpszULNGjO+nx4cyZ8sBjZvKSMViWNCfcs/1w2bqjyegERJzWsrdQSHSEoSlQ=="  # the registry's
RUNTIME = {
    "index.min.js": "esm/index.min.js",
    "single-thread/wllama.wasm": "esm/single-thread/wllama.wasm",
    "LICENCE": "LICENCE",
}
PAGE = Path(__file__).parent / "page"
MODEL, CHAT = "model.gguf", "model.json"
MAX_CONTEXT = 4096  # tokens, as a KV cache takes memory of the browser
MAX_BYTES = 2**31 - 1  # of a file that wllama loads
BY_HAND = f"npm pack {PACKAGE}@{VERSION} elsewhere, and --runtime FILE.tgz"


def export_web(
    checkpoint: Checkpoint,
    out: Path,
    name: str,
    kind: FileType,
    runtime: Path | None = None,
    card: Card | None = None,
) -> None:
    """Write the folder, whole or not at all. `runtime` is wllama's package: a .tgz file, or a folder of its files."""
    chat = chat_settings(checkpoint, name, kind)
    with replaced_folder(out) as new:
        shutil.copytree(PAGE, new, dirs_exist_ok=True)
        copy_runtime(runtime or fetch_runtime(), new / "wllama")
        export_gguf(checkpoint, new / MODEL, kind, card=card)
        if (size := (new / MODEL).stat().st_size) > MAX_BYTES:
            raise InputError(
                f"the weights take {size:,} bytes (a browser loads at most {MAX_BYTES:,}); use --dtype q8_0"
            )
        (new / CHAT).write_text(json.dumps(chat, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
        fill(new / "manifest.webmanifest", NAME=json.dumps(name)[1:-1])
        worker = new / "sw.js"
        files = sorted(
            path for path in new.rglob("*") if path.is_file() and path not in (worker, new / "wllama/LICENCE")
        )
        names = ["./", *(path.relative_to(new).as_posix() for path in files)]
        fill(worker, DIGEST=digest(files), FILES=json.dumps(names))


def fill(path: Path, **values: str) -> None:
    """Put values in place of the names in a file, such as @NAME@."""
    text = path.read_text(encoding="utf-8")
    for key, value in values.items():
        text = text.replace(f"@{key}@", value)
    path.write_text(text, encoding="utf-8", newline="\n")


def digest(files: list[Path]) -> str:
    """Return a digest of files, by which a browser tells a new export from the one that it has stored."""
    found = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            found.update(hashlib.file_digest(file, "sha256").digest())
    return found.hexdigest()[:16]


# ---- the chat --------------------------------------------------------------------------------------------------------


def chat_settings(checkpoint: Checkpoint, name: str, kind: FileType) -> dict[str, Any]:
    """Return what the page has to know of a model; raise `InputError` for a chat template that it cannot write."""
    _, tokenizer, config = checkpoint
    form = None
    if config.kind == "instruct":
        try:
            found = chat_form(config, tokenizer)
            check_tokens(found, tokenizer)
            form = cut_form(found, tokenizer)
        except InputError as error:
            raise InputError(
                f"{error}, which the page cannot write; use --format gguf with llama-server --jinja"
            ) from None
    sampling = GREEDY if config.generation is None else sampling_of(config.generation)
    return {
        "name": name,
        "weights": MODEL,
        "context": min(config.gpt.context_length, MAX_CONTEXT),
        "cache": "f32" if kind == "f32" else "f16",
        "bos": tokenizer.bos_ids,
        "stop": sorted(config.stop_ids(tokenizer)),
        "form": form,
        "sampling": {
            "temp": sampling.temperature,
            "top_k": sampling.top_k or 0,
            "top_p": 1.0 if sampling.top_p is None else sampling.top_p,
            "min_p": sampling.min_p or 0.0,
            "penalty_repeat": sampling.repetition_penalty,
            "penalty_last_n": -1,
        },
    }


def cut_form(form: ChatForm, tokenizer: Tokenizer) -> dict[str, Any]:
    """Return the form with its texts cut at special tokens, which become numbers."""
    special = {name: number for name, number in tokenizer.special_tokens.items() if name not in tokenizer.user_defined}
    names = sorted(special, key=len, reverse=True)
    pattern = re.compile(f"({'|'.join(map(re.escape, names)) or '(?!)'})")

    def cut(text: str) -> Iterator[int | str]:
        for part in pattern.split(text):
            if part:
                yield special.get(part, part)

    texts = ("start", "assistant", "user", "answer", "system_start", "system_end")
    fields = asdict(form)
    return fields | {name: None if fields[name] is None else list(cut(fields[name])) for name in texts}


# ---- wllama ----------------------------------------------------------------------------------------------------------


def fetch_runtime() -> Path:
    """Return wllama's package in the cache, fetched at the first use."""
    path = cache_root() / f"wllama-{VERSION}.tgz"
    if path.is_file() and sha512(path) == SHA512:
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as place:
        command = ["npm", "pack", "--silent", "--pack-destination", place, f"{PACKAGE}@{VERSION}"]
        try:
            subprocess.run(command, check=True, capture_output=True, text=True, cwd=place, timeout=300)
        except FileNotFoundError:
            raise InputError(f"npm, which fetches {PACKAGE}, is not installed; {BY_HAND}") from None
        except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
            reason = one_line(str(error.stderr or error).strip())[:200]
            raise InputError(f"{PACKAGE} cannot be fetched ({reason}); {BY_HAND}") from None
        [found] = Path(place).glob("*.tgz")
        check_sha512(found)
        found.replace(path)
    return path


def check_sha512(path: Path) -> None:
    """Raise `InputError` for a package of other bytes than the pinned ones."""
    if (found := sha512(path)) != SHA512:
        raise InputError(
            f"{path}: not {PACKAGE} {VERSION} (expected sha512 {SHA512[:12]}…, got {found[:12]}…); {BY_HAND}"
        )


def sha512(path: Path) -> str:
    with path.open("rb") as file:
        return base64.b64encode(hashlib.file_digest(file, "sha512").digest()).decode()


def copy_runtime(source: Path, out: Path) -> None:
    """Copy the files that the page needs from wllama's package."""
    if source.is_dir():
        for name, inside in RUNTIME.items():
            if not (source / inside).is_file():
                raise InputError(f"{source}: no package of wllama (expected {inside} in it); {BY_HAND}")
            (out / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / inside, out / name)
        return
    if not source.is_file():
        raise InputError(f"{source}: not found; {BY_HAND}")
    check_sha512(source)
    with tarfile.open(source) as package:
        for name, inside in RUNTIME.items():
            content = package.extractfile(f"package/{inside}")
            assert content is not None
            (out / name).parent.mkdir(parents=True, exist_ok=True)
            (out / name).write_bytes(content.read())
