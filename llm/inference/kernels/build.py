"""Operators of our own for decoding on a CPU, in C++: compiled where they are first needed, and kept.

`products.cpp` multiplies few rows with weights of 4, 8 and 32 bits, `attention.cpp` attends from a new token in each of
several rows. Where there is no compiler, `llm.inference` computes what it can without them.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shlex
import shutil
import subprocess
from pathlib import Path

import torch
from torch import Tensor

from llm.common.cache import cache_root
from llm.common.errors import InputError

HEADERS, SOURCES = (sorted(Path(__file__).parent.glob(ending)) for ending in ("*.h", "*.cpp"))
FLAGS = ("-O3", "-std=c++20", "-fPIC", "-shared", "-fopenmp", "-fno-math-errno", "-fno-trapping-math",
         "-ffinite-math-only", "-fno-signed-zeros")  # fmt: skip
BLOCK = 16  # outputs of a product that lie together


def kernels_loaded() -> bool:
    return hasattr(torch.ops.textmill, "attend_rows")


def load_kernels(folder: Path | None = None) -> None:
    """Load the operators into PyTorch, as `torch.ops.textmill`; compiled into `folder`, by default in the cache.

    Raises `InputError` where there is no C++ compiler.
    """
    if kernels_loaded():
        return
    torch.ops.load_library(build_kernels(folder or cache_root() / "kernels"))
    for name in ("int4_product", "int8_product"):
        torch.library.register_fake(f"textmill::{name}", _like_products)
    torch.library.register_fake("textmill::float_product", lambda x, weight: _like_products(x, [weight]))
    torch.library.register_fake("textmill::attend_rows", _like_attention)


def _like_products(x: Tensor, weights: list[Tensor], scales: list[Tensor] | None = None) -> Tensor:
    return x.new_empty(x.shape[0], sum(weight.shape[0] for weight in weights) * BLOCK)


def _like_attention(
    q: Tensor, k: Tensor, v: Tensor, table: Tensor, windows: Tensor, layer: Tensor, int8: bool
) -> Tensor:
    return q.new_empty(q.shape[0], q.shape[1] * q.shape[2])


def build_kernels(folder: Path, target: str = "native", library: str = "textmill") -> Path:
    """Return the library for a target of the compiler (`-march`), whose operators are PyTorch's under that name."""
    command, torch_folder = [*_compiler(target), f"-DLIBRARY={library}"], Path(torch.__file__).parent
    texts = [path.read_text(encoding="utf-8") for path in (*HEADERS, *SOURCES)]
    known = "\n".join([*texts, torch.__version__, platform.python_version(), library, compiler_traits(target)])
    path = folder / f"kernels-{hashlib.sha256(known.encode()).hexdigest()[:16]}.so"
    if not path.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        draft = folder / f".{path.name}.{os.getpid()}"
        libraries = [f"-L{torch_folder / 'lib'}", "-ltorch_cpu", "-lc10"]
        _run([*command, f"-I{torch_folder / 'include'}", *map(str, SOURCES), "-o", str(draft), *libraries])
        draft.replace(path)
    return path


def compiler_traits(target: str = "native") -> str:
    """Return what compiled code depends on: the compiler, its flags, and the instructions of this processor.

    Raises `InputError` where there is no C++ compiler.
    """
    return _run([*_compiler(target), "-dM", "-E", "-x", "c++", os.devnull])


def _compiler(target: str) -> list[str]:
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        raise InputError("no C++ compiler was found; install one such as g++, or name it by CXX")
    return [*shlex.split(compiler), *FLAGS, f"-march={target}"]


def _run(command: list[str]) -> str:
    """Return the output of a compiler; raise `InputError` with its first error."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise InputError(f"{command[0]}: cannot be run ({error.strerror}); name a C++ compiler by CXX") from None
    if done.returncode:
        lines = done.stderr.splitlines()
        errors = [line for line in lines if "cannot find" in line or "error" in line] or lines
        reason = errors[0] if errors else f"status {done.returncode}"
        raise InputError(f"the kernels could not be compiled by {command[0]}: {reason}; name another compiler by CXX")
    return done.stdout
