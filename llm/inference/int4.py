"""Linear layers with 4-bit weights in groups, computed by a kernel of our own (int4.cpp) or by the plain formula.

A group is 32 inputs of an output. Its weights are step * q + minimum, with q from 0 to 15, and step and minimum in half
precision: llama.cpp's Q4_1.

Shapes: N rows, I in_features, G groups of 32 inputs, O out_features in blocks of 16; a dot stands for any leading ones.
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
import torch.nn.functional as F
from torch import Tensor, nn

from llm.common.errors import InputError
from llm.inference.importance import input_importance
from llm.model.gpt import GPT
from llm.model.linear import linear, replace_linears

GROUP, BLOCK = 32, 16  # inputs that share a scale, outputs that lie together
SOURCE = Path(__file__).with_name("int4.cpp")
FLAGS = ("-O3", "-std=c++20", "-fPIC", "-shared", "-fopenmp", "-fno-math-errno", "-fno-trapping-math",
         "-ffinite-math-only", "-fno-signed-zeros")  # fmt: skip


# ---- rounding --------------------------------------------------------------------------------------------------------


def round_groups(weight: Tensor, importance: Tensor) -> tuple[Tensor, Tensor]:
    """Round weights [O, I]; return q [O, G, 32] from 0 to 15, and step and minimum [O, G, 2] in half precision.

    The error of a group is the sum of its squared errors, each times the importance of its input [I]. The search begins
    with the whole range of the group and with parts of it, and fits step and minimum to the rounded weights by least
    squares. The choice with the least error is kept.
    """
    n_out, n_in = weight.shape
    q = torch.empty(n_out, n_in // GROUP, GROUP, dtype=torch.uint8)
    pair = torch.empty(n_out, n_in // GROUP, 2, dtype=torch.float16)
    inputs = [tensor.detach().float().cpu().contiguous() for tensor in (weight, importance)]
    torch.ops.textmill.int4_round(*inputs, q, pair)
    return q, pair


# ---- the layers ------------------------------------------------------------------------------------------------------


class Int4Linear(nn.Module):
    """A linear layer for inference with weights of 4 bits.

    On a CPU the kernel of `load_kernel` rounds the inputs to 8 bits as well, each group of a row with its own scale.
    Elsewhere, and in other dtypes than fp32 and half precision, weights are dequantized for each product.
    """

    weight: Tensor  # [O / 16, I * 8] uint8: the halves of a byte are the weights of an output for inputs 4 apart
    scale: Tensor  # [O / 16, G, 2, 16] fp16, steps and minima

    def __init__(self, layer: nn.Linear, importance: Tensor | None = None) -> None:
        """Round the weights of a layer; `importance` [I] of its inputs is the same for all without it."""
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.spare_inputs = -layer.in_features % GROUP  # of weight 0, as spare outputs are
        padded = F.pad(layer.weight.detach(), (0, self.spare_inputs, 0, -layer.out_features % BLOCK))
        weights = F.pad(torch.ones(layer.in_features) if importance is None else importance, (0, self.spare_inputs))
        weight, scale = pack(*round_groups(padded, weights.clamp(min=1e-6 * float(weights.amax()) or 1.0)))
        self.register_buffer("weight", weight.to(layer.weight.device))
        self.register_buffer("scale", scale.to(layer.weight.device))
        self.bias = layer.bias

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type == "cpu" and x.dtype != torch.float64:
            rows = x.reshape(-1, self.in_features).float()  # [N, I]
            if self.spare_inputs:
                rows = F.pad(rows, (0, self.spare_inputs))
            y = torch.ops.textmill.int4_product(rows.contiguous(), self.weight, self.scale)  # [N, O]
            y = y[:, : self.out_features].reshape(*x.shape[:-1], self.out_features).to(x.dtype)
        else:
            y = linear(x, self.dequantized().to(x.dtype))
        return y if self.bias is None else y + self.bias

    def dequantized(self) -> Tensor:
        """Return the weights [O, I] in fp32."""
        q, pair = unpack(self.weight, self.scale)
        weight = (q.float() * pair[..., :1].float() + pair[..., 1:].float()).flatten(1)
        return weight[: self.out_features, : self.in_features]


def pack(q: Tensor, pair: Tensor) -> tuple[Tensor, Tensor]:
    """Return the kernel's layout of q [O, G, 32] and pairs [O, G, 2]; O is a multiple of 16."""
    blocks, G = q.shape[0] // BLOCK, q.shape[1]
    parts = q.view(blocks, BLOCK, G * 4, 2, 4)  # four inputs of the low halves, four of the high
    both = parts[..., 0, :] | parts[..., 1, :] << 4  # [O / 16, 16, G * 4, 4]
    weight = both.transpose(1, 2).reshape(blocks, -1)  # [O / 16, I * 8]
    return weight, pair.view(blocks, BLOCK, G, 2).permute(0, 2, 3, 1).contiguous()


def unpack(weight: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Return q [O, G, 32] uint8 and pairs [O, G, 2]: the inverse of `pack`."""
    blocks, G = scale.shape[:2]
    both = weight.view(blocks, G * 4, BLOCK, 4).transpose(1, 2)  # [O / 16, 16, G * 4, 4]
    q = torch.stack([both & 15, both >> 4], dim=3).reshape(blocks * BLOCK, G, GROUP)
    return q, scale.permute(0, 3, 1, 2).reshape(blocks * BLOCK, G, 2)


def to_int4(model: GPT) -> None:
    """Quantize all linear layers, in place; embeddings stay, as a token reads one row of them.

    Needs `load_kernel`. The rounding is calibrated on text that the model itself samples, which takes some seconds.
    """
    importance = input_importance(model)
    replace_linears(model, lambda layer: Int4Linear(layer, importance[layer]))


# ---- the kernel ------------------------------------------------------------------------------------------------------


def load_kernel(folder: Path) -> None:
    """Load the kernel into PyTorch, compiled into `folder` when it is first needed on a kind of machine.

    Raises `InputError` where there is no C++ compiler.
    """
    if hasattr(torch.ops.textmill, "int4_product"):  # loaded already
        return
    torch.ops.load_library(build_kernel(folder))
    torch.library.register_fake("textmill::int4_product", _like_product)


def _like_product(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0] * BLOCK)


def build_kernel(folder: Path, target: str = "native", library: str = "textmill") -> Path:
    """Return the compiled kernel for a target of the compiler (`-march`), as an operator of a library of PyTorch's."""
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        raise InputError("weights of 4 bits need a C++ compiler such as g++ on a CPU; install one, or use 8 bits")
    command, torch_folder = [*shlex.split(compiler), *FLAGS], Path(torch.__file__).parent
    command += [f"-march={target}", f"-DLIBRARY={library}"]
    traits = _run([*command, "-dM", "-E", "-x", "c++", os.devnull])  # of the compiler and of this processor
    known = "\n".join([SOURCE.read_text(encoding="utf-8"), torch.__version__, platform.python_version(), traits])
    path = folder / f"int4-{hashlib.sha256(known.encode()).hexdigest()[:16]}.so"
    if not path.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        draft = folder / f".{path.name}.{os.getpid()}"
        libraries = [f"-L{torch_folder / 'lib'}", "-ltorch_cpu", "-lc10"]
        _run([*command, f"-I{torch_folder / 'include'}", str(SOURCE), "-o", str(draft), *libraries])
        draft.replace(path)
    return path


def _run(command: list[str]) -> str:
    """Return the output of a compiler; raise `InputError` with its first error."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise InputError(f"{command[0]}: cannot be run ({error.strerror}); name a C++ compiler by CXX") from None
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines()
        reason = errors[0] if errors else f"status {done.returncode}"
        raise InputError(f"the kernel of 4-bit weights could not be compiled by {command[0]}: {reason}; use 8 bits")
    return done.stdout
