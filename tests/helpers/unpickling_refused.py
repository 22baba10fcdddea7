"""The darkroom command in which nothing can be unpickled, but for what one process of a run sends to another.

Ranks (torch.distributed) and the readers of data (multiprocessing) speak to each other in pickles, which are in no
file. Everybody else who loads one, by whatever name they imported the function, ends the run.
"""

import pickle
import sys
from collections.abc import Callable
from typing import Any

import torch

from launch import cli

BETWEEN_PROCESSES = ("torch.distributed.", "multiprocessing.")
INSIDE = ("torch.storage", "torch.serialization", "torch._utils", __name__)  # how torch reads a tensor in a message


def refuse_from_files() -> None:
    """Raises unless what unpickles just now was called by one of BETWEEN_PROCESSES."""
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__") in INSIDE:
        frame = frame.f_back
    caller = str(frame.f_globals.get("__name__"))
    if not caller.startswith(BETWEEN_PROCESSES):
        raise AssertionError(f"{caller} loads a pickle")


def guarded(load: Callable[..., Any]) -> Callable[..., Any]:
    def call(*arguments: Any, **settings: Any) -> Any:
        refuse_from_files()
        return load(*arguments, **settings)

    return call


class Unpickler(pickle.Unpickler):
    def __init__(self, *arguments: Any, **settings: Any) -> None:
        refuse_from_files()
        super().__init__(*arguments, **settings)


def audit(event: str, arguments: tuple[Any, ...]) -> None:
    """Python tells of every class or function that a pickle names, whoever reads it."""
    if event == "pickle.find_class":
        refuse_from_files()


if __name__ == "__main__":
    pickle.load, pickle.loads, torch.load = guarded(pickle.load), guarded(pickle.loads), guarded(torch.load)
    pickle.Unpickler = Unpickler  # type: ignore[misc]
    sys.addaudithook(audit)
    cli.main()
