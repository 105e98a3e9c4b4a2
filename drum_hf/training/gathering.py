"""One batch out of several processes' batches: demonstrations gathered with their gradient, each counted once."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import pad

if TYPE_CHECKING:
    from .losses import ListBatch

__all__ = ["Origins", "join_batches", "several_processes"]


def several_processes() -> bool:
    """Whether this process trains with others."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


@dataclasses.dataclass
class Origins:
    """What a process must tell of its batch, so that others can tell its demonstrations apart.

    All numbers mean the same in every process; -1 is none.

    Attributes:
        rows: (U,) long, the number of each demonstration.
        groups: (U,) long, the number of its group.
        own: (B,) long, the number that each query has as a demonstration.
        own_groups: (B,) long, the number of its group.
        scored: (B, P) long, numbers of all demonstrations whose score with a query is known.
        known: (B, P) float, these scores.
    """

    rows: Tensor
    groups: Tensor
    own: Tensor
    own_groups: Tensor
    scored: Tensor
    known: Tensor

    @classmethod
    def apart(cls, index: Tensor, scores: Tensor, demonstrations: int) -> Origins:
        """Of lists (B, K) in which each of the `demonstrations` columns stands once, in whatever process."""
        count, rank = (dist.get_world_size(), dist.get_rank()) if several_processes() else (1, 0)
        rows = torch.arange(demonstrations, device=index.device) * count + rank
        nobody = index.new_full((len(index),), -1)
        return cls(rows, torch.full_like(rows, -1), nobody, nobody, rows[index], scores)


def join_batches(demonstrations: Tensor, batch: ListBatch) -> tuple[Tensor, ListBatch]:
    """This process's queries against the demonstrations of all processes.

    The mean of the processes' losses is then the loss of one process with the joint batch, and so is its gradient once
    DDP has averaged it. Queries need no gathering: what a query loses depends on demonstrations alone.

    To be called by every process; a demonstration that several of them hold counts as the first one's.

    Args:
        demonstrations: (U, dimension), with a gradient or without, the same in all processes; U may differ.
        batch: with `origins`.

    Returns:
        (V, dimension), the different demonstrations of all processes, and `batch` with columns that are these.

    Raises:
        ValueError: the batch does not say where its demonstrations come from.
    """
    origins = batch.origins
    if origins is None:
        raise ValueError(
            "expected labels with 'origins', by which processes tell their demonstrations apart; DrumTrainer's "
            "collator adds them under gather_negatives=True. Set it in DrumTrainingArguments, or make the loss with "
            "gather_negatives=False"
        )
    size = torch.tensor(len(origins.rows), device=origins.rows.device)
    dist.all_reduce(size, dist.ReduceOp.MAX)
    missing = int(size) - len(origins.rows)
    embeddings = _Gathered.apply(pad(demonstrations, (0, 0, 0, missing))).flatten(0, 1)
    rows, groups = _Gathered.apply(pad(torch.stack([origins.rows, origins.groups]), (0, missing), value=-1)).unbind(1)
    columns, places = torch.unique(rows, return_inverse=True)
    # where padding is, column 0 is none: it is blocked for all
    flat = places.flatten()
    first = torch.full_like(columns, flat.numel())
    first.scatter_reduce_(0, flat, torch.arange(flat.numel(), device=flat.device), "amin")
    blocked = (columns == -1) | (columns == origins.own[:, None])
    blocked |= (groups.flatten()[first] == origins.own_groups[:, None]) & (origins.own_groups[:, None] != -1)
    found = torch.searchsorted(columns, origins.scored).clamp(max=len(columns) - 1)
    here = (columns[found] == origins.scored) & (origins.scored != -1)
    query = torch.arange(len(found), device=found.device)[:, None].expand_as(found)
    known = origins.known.new_full(blocked.shape, torch.nan)
    known[query[here], found[here]] = origins.known[here]
    own = places[dist.get_rank()]
    joined = dataclasses.replace(batch, index=own[batch.index], known=known, blocked=blocked, origins=None)
    return embeddings[first], joined


class _Gathered(torch.autograd.Function):
    """(processes, *shape) from each one's tensor; backwards, each gets the sum of what all make of its own."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        parts = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, tensor.contiguous())
        return torch.stack(parts)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        # all_reduce, since gloo has no reduce_scatter
        total = gradients[0].clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total[dist.get_rank()]
