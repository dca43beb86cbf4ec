"""Compilation of a function of tensors ahead of time, by PyTorch's compiler on a CPU; the code is kept in the cache.

A later start loads the code in a moment. Its name holds a digest of all that it depends on.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llm.common.cache import cache_root
from llm.common.errors import InputError
from llm.inference.kernels.build import compiler_traits

FOLDERS = [Path(__file__).parents[1] / name for name in ("model", "inference")]
SOURCES = [path for folder in FOLDERS for ending in ("py", "h", "cpp") for path in sorted(folder.rglob(f"*.{ending}"))]
MOST = 2**31 - 1  # of a dynamic dimension
Code = Callable[[list[Tensor]], Tensor]


class _Function(nn.Module):
    def __init__(self, function: Code) -> None:
        super().__init__()
        self.function = function

    def forward(self, tensors: list[Tensor]) -> Tensor:
        return self.function(tensors)


def compile_ahead(function: Code, tensors: list[Tensor], dynamic: Sequence[dict[int, str]], about: str) -> Code:
    """Return a function of tensors as compiled code, from the cache or compiled now, which takes up to half a minute.

    `tensors` are an example. `dynamic` names the dimensions of each that may be of another size in a later call, 2 or
    more; of equal names, all are equal. `about` is what else the function depends on. Raises `InputError` where it
    cannot be compiled.
    """
    forms = [(tuple(tensor.shape), tensor.stride(), str(tensor.dtype)) for tensor in tensors]
    known = [torch.__version__, compiler_traits(), torch.get_num_threads(), forms, list(dynamic), about]
    known += [path.read_text(encoding="utf-8") for path in SOURCES]
    digest = hashlib.sha256("\n".join(map(str, known)).encode()).hexdigest()[:16]
    path = cache_root() / "compiled" / f"code-{digest}.pt2"
    if path.is_file():
        with contextlib.suppress(RuntimeError):  # damaged: compiled again
            return _load(path)
    draft = path.with_name(f".{path.stem}.{os.getpid()}.pt2")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        _compile(function, tensors, dynamic, draft)
        draft.replace(path)
        return _load(path)
    except RuntimeError as error:  # the compiler's many classes derive from it
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise InputError(f"the step could not be compiled, for which a C++ compiler is needed: {reason}") from error
    finally:
        draft.unlink(missing_ok=True)


def _compile(function: Code, tensors: list[Tensor], dynamic: Sequence[dict[int, str]], path: Path) -> None:
    names = {name for dims in dynamic for name in dims.values()}
    sizes = {name: torch.export.Dim(name, min=2, max=MOST) for name in names}
    shapes: Any = ([{dim: sizes[name] for dim, name in dims.items()} for dims in dynamic],)
    with torch.inference_mode(False), torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch's, of its own functions
        plain = [tensor.detach() for tensor in tensors]  # a graph of parameters would keep gradients
        program = torch.export.export(
            _Function(function), (plain,), dynamic_shapes=shapes, prefer_deferred_runtime_asserts_over_guards=True
        )
        assert not program.state_dict, "a weight that is no input would stay as it is now"
        torch._inductor.aoti_compile_and_package(program, package_path=str(path))


def _load(path: Path) -> Code:
    # PyTorch's public function first imports its whole compiler, which takes longer than all else.
    loader = torch._C._aoti.AOTIModelPackageLoader(str(path), "model", False, 1, -1)

    def run(tensors: list[Tensor]) -> Tensor:
        result: Tensor = loader.run(tensors)[0]
        return result

    return run
