"""What one task of the nodes' check does: look at its node alone, then measure together with all the others."""

import os
import platform
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from datetime import timedelta
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

from launch.preflight import NodeFacts, write_facts
from launch.runtime import gpu_count, ranks

_VERSIONS = ("darkroom", "torch", "deepspeed", "accelerate", "safetensors", "numpy")
_REDUCED_BYTES, _SENT_BYTES = 64 * 2**20, 16 * 2**20
_ROUNDS = 4  # measurements, of which the best counts: others may share the machine, none makes it faster


def check_node(folder: Path, min_free_gib: float, timeout_s: float, try_store: Callable[[], None] | None) -> NodeFacts:
    """Writes this task's facts to `folder`, twice: before and after all tasks have met.

    Args:
        folder: seen by all nodes.
        min_free_gib: wanted for temporary files and in the working folder.
        timeout_s: for the others to come.
        try_store: puts, gets and deletes a file, or raises; None = there is no store.
    """
    who = ranks()
    node = os.environ.get("SLURMD_NODENAME") or platform.node()
    facts = NodeFacts(node=node, rank=who.rank, step_nodes=os.environ.get("SLURM_STEP_NODELIST", node))
    if who.local_rank == 0:
        problems = disk_problems(min_free_gib) + device_problems() + store_problems(try_store)
        facts = replace(facts, versions=versions(), problems=tuple(problems))
    write_facts(folder, facts)
    try:
        facts = replace(facts, **_measure(who.rank, who.world_size, timeout_s))
    except RuntimeError as error:
        facts = replace(facts, error=str(error).splitlines()[0], error_s=time.time())
    write_facts(folder, facts)
    return facts


def versions() -> dict[str, str]:
    """What has to be the same everywhere."""
    found = {"python": platform.python_version()}
    for name in _VERSIONS:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "absent"
    if gpu_count():
        import torch

        found["cuda"] = str(torch.version.cuda)
        found["nccl"] = ".".join(map(str, torch.cuda.nccl.version())) if torch.version.cuda else "absent"
        driver = Path("/proc/driver/nvidia/version")
        found["driver"] = driver.read_text().splitlines()[0] if driver.exists() else "unknown"
    return found


def disk_problems(min_free_gib: float) -> list[str]:
    """Folders with too little room, or none that can be written to."""
    found = []
    for what, folder in (
        ("temporary files", os.environ.get("TMPDIR") or tempfile.gettempdir()),  # of a wrong one tempfile says nothing
        ("the working folder", os.getcwd()),
    ):
        try:
            free_gib = shutil.disk_usage(folder).free / 2**30
            with tempfile.NamedTemporaryFile(dir=folder):
                pass
        except OSError as error:
            found.append(f"{folder} ({what}): {error.strerror}")
            continue
        if free_gib < min_free_gib:
            found.append(f"{folder} ({what}) has {free_gib:.1f} GiB free, wanted {min_free_gib:g}")
    return found


def device_problems() -> list[str]:
    """GPUs that are missing or do not compute."""
    wanted = int(os.environ.get("SLURM_GPUS_ON_NODE") or 0)
    there = gpu_count()
    if there == 0 and not wanted:
        return []
    found = []
    if there < wanted:
        found.append(f"{there} GPUs instead of {wanted}")
    import torch

    if torch.cuda.device_count() < there:
        return [*found, f"torch can use {torch.cuda.device_count()} of {there} GPUs"]
    for index in range(there):
        try:
            ones = torch.ones(1024, 1024, device=f"cuda:{index}")
            if not bool(((ones @ ones) == 1024).all()):
                found.append(f"GPU {index} computes wrong results")
        except RuntimeError as error:
            found.append(f"GPU {index}: {str(error).splitlines()[0]}")
    return found


def store_problems(try_store: Callable[[], None] | None) -> list[str]:
    if try_store is None:
        return []
    try:
        try_store()
    except (ValueError, OSError) as error:
        return [f"store: {error}"]
    return []


def _measure(rank: int, world_size: int, timeout_s: float) -> Mapping[str, Any]:
    """Together with all ranks: clocks at one moment, work, transfers with neighbours, and the all-reduce."""
    import torch
    import torch.distributed as dist

    cuda = torch.cuda.is_available()
    device = torch.device("cuda", ranks().local_rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if cuda else "gloo", timeout=timedelta(seconds=timeout_s))

    def best(action: Callable[[], object]) -> float:
        action()  # connections and kernels are made at first use
        times = []
        for _ in range(_ROUNDS):
            dist.barrier()
            _wait(device)
            before = time.perf_counter()
            action()
            _wait(device)
            times.append(time.perf_counter() - before)
        return min(times)

    try:
        dist.barrier()
        clock_s = time.time()
        square = torch.ones(2048, 2048, device=device)
        work_s = best(lambda: square @ square)
        data = torch.zeros(_SENT_BYTES // 4, device=device)
        pairs = []
        for other in neighbours(rank, world_size):
            seconds = best(partial(_exchange, data, rank, other))
            pairs += [seconds] if other is not None else []
        gradient = torch.zeros(_REDUCED_BYTES // 4, device=device)
        reduced_s = best(lambda: dist.all_reduce(gradient))
    finally:
        dist.destroy_process_group()
    return {
        "clock_s": clock_s,
        "work_s": work_s,
        "pair_s": min(pairs, default=None),
        "all_reduce_gb_s": _REDUCED_BYTES / reduced_s / 1e9,
    }


def neighbours(rank: int, world_size: int) -> list[int | None]:
    """The ranks on the nodes before and behind with which this rank exchanges data, in turn; None = it sits out.

    In the first round nodes 0-1, 2-3 … exchange, in the second 1-2, 3-4 … and the last with the first. Two nodes have
    one pair, which tells nothing of either: no round.
    """
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    node, nodes = rank // local, world_size // local
    if nodes < 3:
        return []
    found: list[int | None] = []
    for shift in (0, 1):
        place = (node - shift) % nodes
        partner = place ^ 1
        found.append((partner + shift) % nodes * local + rank % local if partner < nodes else None)
    return found


def _exchange(data: Any, rank: int, other: int | None) -> None:
    """Sends `data` to and fro."""
    import torch.distributed as dist

    if other is None:
        return
    for step in (dist.send, dist.recv) if rank < other else (dist.recv, dist.send):
        step(data, other)


def _wait(device: Any) -> None:
    if device.type == "cuda":
        import torch

        torch.cuda.synchronize(device)
