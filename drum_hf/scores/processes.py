"""Work shared between the processes of one launch (`torchrun`, `accelerate launch`).

Nothing is shared unless it is asked for: a method of `Processes` must be called by every process of the launch, so a
call that only one of them makes (an evaluation on the main process, say) must go without.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import logging
import os
from collections.abc import Callable, Hashable, Sequence
from typing import Any, TypeVar

from .. import errors

__all__ = ["ALONE", "Processes", "shard"]

logger = logging.getLogger(__name__)

_Value = TypeVar("_Value")

#: How long a process waits for the slowest one: a share of scoring takes hours, where torch gives up after minutes.
_PATIENCE = datetime.timedelta(days=30)

#: What launchers call the number of processes: torchrun and accelerate; MPI as Intel, Open MPI and MVAPICH have it.
_COUNTS = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")


def shard(groups: Sequence[Hashable], count: int) -> list[list[int]]:
    """Deal positions out to `count` processes: what is of one group stays together, and the shares are even.

    The largest group goes first, each to the process with the least so far. A group larger than an even share is cut
    into pieces of that size, since computing what it has in common once more is cheaper than a process that waits.

    Args:
        groups: the group of each position, such as the demonstrations that a pair shows. Positions whose group is
            an empty tuple have nothing in common.

    Returns:
        `count` lists of positions, ascending; together every position once. The same for the same arguments.

    Example:
        >>> shard(["a", "a", "b", "c", "b", "a"], 2)
        [[0, 1, 5], [2, 3, 4]]
    """
    if count < 1:
        raise ValueError(f"expected at least one process, got {count}")
    even = -(-len(groups) // count)
    together: dict[Hashable, list[int]] = {}
    for position, group in enumerate(groups):
        together.setdefault(("alone", position) if group == () else ("group", group), []).append(position)
    pieces = [own[start : start + even] for own in together.values() for start in range(0, len(own), even)]
    shares: list[list[int]] = [[] for _ in range(count)]
    for piece in sorted(pieces, key=len, reverse=True):  # stable, so that every process deals alike
        min(shares, key=len).extend(piece)
    return [sorted(share) for share in shares]


class _Stopped(Exception):
    """Another process has failed: what this one has done is kept, and it does no more."""


@dataclasses.dataclass(frozen=True)
class Processes:
    """The processes of one launch, as seen by one of them; by itself: a single process, which waits for nobody.

    Attributes:
        rank: which one this is, 0 the main one.
        count: how many there are, on all machines.
        local_rank: which one this is on its machine.
    """

    rank: int = 0
    count: int = 1
    local_rank: int = 0

    @classmethod
    def current(cls) -> Processes:
        """The processes of this launch; one of several joins the others first, by gloo where there is no accelerator.

        A process's device is set along with it: call this before models are loaded.
        """
        launched = next((int(os.environ[name]) for name in _COUNTS if os.environ.get(name)), None)
        import torch.distributed as dist

        if not dist.is_available():
            return cls()
        if not dist.is_initialized():
            if launched is None and os.environ.get("ACCELERATE_USE_CPU") == "True" and "MASTER_PORT" in os.environ:
                logger.warning(
                    "accelerate launch --cpu starts a single process, whatever --num_processes says; for several "
                    "without GPU use: torchrun --nproc_per_node N"
                )
            if launched is None or launched < 2:
                return cls()
            import torch
            from accelerate import PartialState

            PartialState(cpu=not torch.accelerator.is_available())
        rank = dist.get_rank()
        return cls(rank, dist.get_world_size(), int(os.environ.get("LOCAL_RANK", rank)))

    @property
    def is_main(self) -> bool:
        """Whether this is the one that writes files and speaks."""
        return self.rank == 0

    @property
    def is_local_main(self) -> bool:
        """Whether this is the first one of its machine."""
        return self.local_rank == 0

    def gather(self, work: Callable[[], _Value]) -> list[_Value]:
        """Do `work`, in every process its own, and give all of them all results, by rank.

        Where one process fails, every process raises: that one its own error, the others the same named error (an
        error of drum_hf.errors; any other as RuntimeError) with the process's number before its message. Processes
        that call `check` while they work learn of it at once and stop.
        """
        if self.count == 1:
            return [work()]
        import torch.distributed as dist

        group = _group()
        value, failure = None, None
        try:
            value = work()
        except BaseException as error:
            failure = error
            if not isinstance(error, _Stopped):
                logger.error("process %d of %d: %s: %s", self.rank + 1, self.count, type(error).__name__, error)
                with contextlib.suppress(RuntimeError):  # the notice board is gone: so will be the others
                    _alarm(raised=True)
        outcomes: list[Any] = [None] * self.count
        told = None if failure is None else (type(failure).__name__, str(failure), isinstance(failure, _Stopped))
        try:
            dist.all_gather_object(outcomes, (value, told), group=group)
        except RuntimeError as lost:
            if failure is not None:
                raise failure from lost
            raise RuntimeError(
                f"process {self.rank + 1} of {self.count}: another process is gone ({lost}); what was scored is in "
                "the score store: run the same command again to go on"
            ) from lost
        _next_gathering()
        if failure is not None and not isinstance(failure, _Stopped):
            raise failure
        for rank, (_, other) in enumerate(outcomes):
            if other is not None and not other[2]:
                raise _error_of(other[0], f"process {rank + 1} of {self.count}: ", other[1])
        return [value for value, _ in outcomes]

    def from_main(self, work: Callable[[], _Value]) -> _Value:
        """What `work` gives in the main process, in every process; the others wait. Errors as in `gather`."""
        return self.gather(lambda: work() if self.is_main else None)[0]  # type: ignore[return-value]

    def check(self) -> None:
        """To be called now and then by `work`: ends it where another process has failed meanwhile."""
        if self.count > 1 and _alarm():
            raise _Stopped

    def synchronize(self, tensors: Sequence[Any]) -> None:
        """Set tensors to what they are in the main process."""
        if self.count > 1:
            import torch.distributed as dist

            for tensor in tensors:
                dist.broadcast(tensor.data, 0)

    def average(self, tensors: Sequence[Any]) -> None:
        """Set each tensor to its mean over the processes."""
        if self.count > 1:
            import torch.distributed as dist

            for tensor in tensors:
                dist.all_reduce(tensor)
                tensor /= self.count


#: One process.
ALONE = Processes()


def _error_of(name: str, who: str, message: str) -> BaseException:
    """Another process's error, as this one raises it."""
    if name == "KeyboardInterrupt":
        return KeyboardInterrupt()
    kind = getattr(errors, name, None)
    if isinstance(kind, type) and issubclass(kind, errors.DrumError):
        return kind(f"{who}{message}")
    return RuntimeError(f"{who}{name}: {message}; the traceback stands in that process's own output")


#: The group of `_group`, the group of all processes that it was made for, and how often it has gathered.
_made: dict[str, Any] = {"world": None, "group": None, "gatherings": 0}


def _group() -> Any:
    """All processes, over gloo, which carries objects and waits patiently, whatever the tensors of training go by."""
    import torch.distributed as dist

    if _made["world"] is not dist.group.WORLD:
        group = dist.new_group(backend="gloo", timeout=_PATIENCE)
        _made.update(world=dist.group.WORLD, group=group, gatherings=0)
    return _made["group"]


def _next_gathering() -> None:
    _made["gatherings"] += 1


def _alarm(*, raised: bool = False) -> bool:
    """Whether a process has failed in the gathering under way; `raised`: this one has."""
    from torch.distributed import distributed_c10d

    # Torch's own notice board of the launch. It can be read while others are busy, which no collective can.
    board = distributed_c10d._get_default_store()
    name = f"drum_hf/failed/{_made['gatherings']}"
    if raised:
        board.set(name, "1")
    return raised or board.check([name])
