"""Everything that knows about several processes. On one process each function is the identity.

Each process scores its own rows against the rows of all. The moving centroids of the published method add one demand:
every process must see the same rows, so that the centroids stay the same everywhere without being sent around.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


def world_size() -> int:
    """Return the number of processes `W` (1 without an initialised process group)."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Return this process's number, from 0."""
    return dist.get_rank() if world_size() > 1 else 0


def gather(tensor: Tensor) -> Tensor:
    """Concatenate a tensor of every process in rank order, without gradient: (B, ...) -> (W*B, ...)."""
    if world_size() == 1:
        return tensor
    parts = [torch.empty_like(tensor) for _ in range(world_size())]
    dist.all_gather(parts, tensor.contiguous())
    return torch.cat(parts)


def gather_with_grad(tensor: Tensor) -> Tensor:
    """Like `gather`, but gradients flow back to the process that each row came from."""
    gathered: Tensor = _Gather.apply(tensor) if world_size() > 1 else tensor  # type: ignore[no-untyped-call]
    return gathered


class _Gather(torch.autograd.Function):
    # torch.distributed.nn.functional.all_gather does the same, and is deprecated from torch 2.13 on.
    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        return gather(tensor)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        gradient = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(gradient)  # each process holds the gradients of its own loss for everybody's rows
        return gradient.chunk(world_size())[rank()]


def check_same_size(size: int, device: torch.device) -> None:
    """Raise the same `ValueError` on every process unless their batches, this one's of `size` rows, are equal."""
    if world_size() == 1:
        return
    sizes = gather(torch.tensor([size], device=device)).tolist()
    if len(set(sizes)) > 1:
        raise ValueError(
            f"The number of rows of a batch differs between the processes: {sizes} on ranks 0 to {len(sizes) - 1}. "
            "For a last, smaller batch pass dataloader_drop_last=True."
        )


def share_weights(module: nn.Module) -> None:
    """Give a module that is not part of the model rank 0's weights, and their gradients the mean over the processes.

    DistributedDataParallel does so for the model alone.
    """
    for weight in module.parameters():
        broadcast(weight.data)
        weight.register_hook(_mean)  # type: ignore[no-untyped-call]


def _mean(gradient: Tensor) -> Tensor:
    if world_size() == 1:
        return gradient
    gradient = gradient.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(gradient)
    return gradient / world_size()


def broadcast(tensor: Tensor) -> None:
    """Overwrite `tensor` in place with rank 0's."""
    if world_size() > 1:
        dist.broadcast(tensor, src=0)
