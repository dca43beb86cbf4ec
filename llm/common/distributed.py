"""Data parallelism: each rank reads a shard of every batch, and all make the same steps.

Without `init_distributed` there is one rank, for which the other functions do nothing.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load, save
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel


def rank() -> int:
    """Return this process's rank; rank 0 alone prints, logs and writes."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def init_distributed() -> None:
    """Join the process group, and take a GPU or a share of the cores of this machine.

    The environment describes the group as torchrun does: RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR
    and MASTER_PORT.
    """
    local, here = int(os.environ.get("LOCAL_RANK", "0")), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if torch.cuda.is_available():
        torch.cuda.set_device(local % torch.cuda.device_count())
    elif "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // here))
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")


def replicate(module: nn.Module) -> nn.Module:
    """Return the module with the weights of rank 0, whose gradients are averaged over all ranks."""
    return module if world_size() == 1 else DistributedDataParallel(module)


def all_reduce(values: Tensor) -> Tensor:
    """Return the sums over all ranks."""
    if world_size() > 1:
        values = values.clone()
        dist.all_reduce(values)
    return values


def sharded_map(function: Callable[[Tensor], Tensor], items: Tensor) -> Tensor:
    """Return `function(items)` [n, .], which maps each item by itself: each rank computes a shard and gets all."""
    if world_size() == 1:
        return function(items)
    results = torch.empty_like(items)
    parts = results.tensor_split(world_size())
    mine = items.tensor_split(world_size())[rank()]
    if len(mine):
        parts[rank()].copy_(function(mine))
    sent = [dist.broadcast(part, source, async_op=True) for source, part in enumerate(parts) if len(part)]
    for each in sent:
        each.wait()
    return results


def any_rank(flag: bool) -> bool:
    """Return whether the flag is set on any rank."""
    return flag if world_size() == 1 else bool(all_reduce(torch.tensor(float(flag))))


def broadcast_state(
    state: tuple[dict[str, Tensor], dict[str, Any]] | None,
) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """Return the state of rank 0 (tensors, and values for JSON) on every rank."""
    if world_size() == 1:
        return state
    parts = (b"", b"") if state is None else (save(state[0]), json.dumps(state[1]).encode())
    sizes = torch.tensor([len(part) for part in parts])
    dist.broadcast(sizes, 0)
    if not sizes.any():
        return None
    content = torch.frombuffer(bytearray(b"".join(parts).ljust(int(sizes.sum()))), dtype=torch.uint8)
    dist.broadcast(content, 0)
    tensors, values = (bytes(part.numpy()) for part in content.split(sizes.tolist()))
    return load(tensors), json.loads(values)
