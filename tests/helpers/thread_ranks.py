"""Several ranks in one process: each is a thread, and what the engine exchanges goes through a barrier."""

import threading
from collections.abc import Callable
from typing import Any, TypeVar

import torch

from training.fragments import Fragment

T = TypeVar("T")
PATIENCE_S = 60.0


class ThreadRank:
    """What the checkpoints need of an engine."""

    def __init__(self, rank: int, world_size: int, barrier: threading.Barrier, box: list[Any]) -> None:
        self.rank, self.world_size = rank, world_size
        self._barrier, self._box = barrier, box

    def exchange(self, value: Any) -> list[Any]:
        self._box[self.rank] = value
        self._barrier.wait(PATIENCE_S)
        values = list(self._box)
        self._barrier.wait(PATIENCE_S)
        return values

    def from_rank0(self, value: Any) -> Any:
        return self.exchange(value)[0]


def on_ranks(world_size: int, work: Callable[[Any], T]) -> list[T]:
    """Runs `work(engine)` on every rank and returns what each gave. An exception on one is raised here."""
    barrier, box = threading.Barrier(world_size), [None] * world_size
    results: list[Any] = [None] * world_size
    errors: list[Exception] = []

    def run(rank: int) -> None:
        try:
            results[rank] = work(ThreadRank(rank, world_size, barrier, box))
        except Exception as error:
            errors.append(error)
            barrier.abort()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for error in errors:
        if not isinstance(error, threading.BrokenBarrierError):
            raise error
    if errors:
        raise errors[0]
    return results


def cut(tensors: dict[str, torch.Tensor], rank: int, world_size: int) -> dict[str, Fragment]:
    """This rank's part of tensors that lie one behind the other and are cut into equal ranges, as ZeRO-1 and 2 do."""
    total = sum(tensor.numel() for tensor in tensors.values())
    low, high = total * rank // world_size, total * (rank + 1) // world_size
    fragments, begin = {}, 0
    for name, tensor in tensors.items():
        first, last = (min(max(at - begin, 0), tensor.numel()) for at in (low, high))
        data = tensor.reshape(-1)[first:last].clone()
        fragments[name] = Fragment(data=data, start=first if len(data) else 0, shape=tuple(tensor.shape))
        begin += tensor.numel()
    return fragments


def whole(tensors: dict[str, torch.Tensor]) -> dict[str, Fragment]:
    """Every rank holds everything, as at stage 0."""
    return {
        name: Fragment(data=tensor.clone(), start=0, shape=tuple(tensor.shape), replicated=True)
        for name, tensor in tensors.items()
    }
