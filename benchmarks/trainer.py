"""The trainer's own costs: averages, the engine beside DistributedDataParallel, recomputation, memory by ZeRO stage.

`ema`, `ema-foreach`: one update of an average of 113 M parameters against diffusers' EMAModel, plain and with its
`foreach`; asserted: the averages agree to 1e-6 after three updates in the warm-up that both have. The rate is updates
per second of CPU time.

`zero1`: steps of a DiT of 31 M parameters (256 picture and 77 text tokens, 8 samples per rank) on two gloo ranks, the
engine at stage 1 against DistributedDataParallel with torch's clipping and AdamW; asserted: the weights agree to 1e-5
after a step. The rate is samples per second of wall time.

`stall`: how long saving 54 M parameters with their moments and one average (869 MB) stops the loop of two ranks at
stage 1 while the save goes on beside training, all of save and poll, against a save that is waited for, on the same
disk; asserted: both commit the weights, moments and averages as they were when the save began, to the bit. Milliseconds
of wall time per save.

`selective`, `full`: forward and backward of this DiT with recomputed activations against without; asserted: the
gradients are the same bits. The rate is samples per second of CPU time. `selective-memory`, `full-memory`: how far the
highest resident memory in such a step is above that before it.

`memory-zero0` to `memory-zero3`: what a DiT of 54 M parameters with one average costs either of two ranks against
`launch.planner.state_bytes`; asserted: they differ by at most 10 %. Measured is how far a process's resident memory
grows from before the model is made to its highest point in a step: weights, gradients, masters, moments and the
average, and with them DeepSpeed's buckets (16 MB each) and copies. Activations are nothing: one sample of one picture
token and one text token. A tiny model was trained before, so that code, gloo's buffers and the like are not counted,
and malloc is told to give back what is freed.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import Row, compare, machine, main
from benchmarks.trainer_ranks import make_dit
from launch.planner import state_bytes
from launch.runtime import spawn
from training.ema import EMA, EMAConfig
from training.engine import Fragment

DECAY = 0.999
EMAS = ("ema", "ema-foreach")
RECOMPUTE = ("selective", "full", "selective-memory", "full-memory")
MEMORY = tuple(f"memory-zero{stage}" for stage in range(4))
MEMORY_TOLERANCE = 0.1
ENGINE = ("torch", "deepspeed", "accelerate")


def ema(name: str, rounds: int) -> Row:
    """Our update against diffusers'."""
    from diffusers.training_utils import EMAModel

    parameters = dict(make_dit(12, 512).named_parameters())
    weights = {
        name: Fragment(data=parameter.data, start=0, shape=tuple(parameter.shape), replicated=True)
        for name, parameter in parameters.items()
    }
    ours = EMA(EMAConfig(decays=(DECAY,)), weights)
    theirs = EMAModel(parameters.values(), decay=DECAY, foreach=name == "ema-foreach")
    theirs.optimization_step = 1  # it counts from one, and its first update is a copy
    taken = 0

    def our_update() -> int:
        nonlocal taken
        taken += 1
        ours.update(taken)
        return 1

    def their_update() -> int:
        theirs.step(parameters.values())
        return 1

    for _ in range(3):
        with torch.no_grad():
            torch._foreach_mul_(list(parameters.values()), 1.01)
        our_update(), their_update()
    for mine, other in zip(ours.fragments().values(), theirs.shadow_params, strict=True):
        torch.testing.assert_close(mine.data, other, rtol=0, atol=1e-6)
    return compare(name, our_update, their_update, unit="updates/s", packages=("torch", "diffusers"), rounds=rounds)


def on_ranks(number: int, name: str, rounds: int) -> Any:
    """What benchmarks/trainer_ranks.py measures on so many ranks of this machine."""
    root = Path(__file__).resolve().parents[1]
    env = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    if "memory" in name:
        env["MALLOC_MMAP_THRESHOLD_"] = "65536"  # bytes from which memory goes back to the system when it is freed
    with tempfile.TemporaryDirectory(prefix="darkroom-trainer-") as folder:
        file = Path(folder) / "result.json"
        command = [sys.executable, "-m", "benchmarks.trainer_ranks", name, str(rounds), str(file)]
        assert spawn(number, command, env) == 0
        return json.loads(file.read_text())


def memory(name: str, rounds: int) -> Row:
    """Resident memory per rank against the formula."""
    measured = on_ranks(2, name, rounds)
    parts = state_bytes(measured["parameters"], zero_stage=int(name[-1]), world_size=2, compute_bytes=4)
    formula = sum(parts.values())
    peaks = measured["peaks"][1:]  # AdamW makes its moments in the first step
    ratios = [formula / peak for peak in peaks]
    assert all(abs(ratio - 1) <= MEMORY_TOLERANCE for ratio in ratios), (name, formula, peaks)
    return row_of(name, statistics.median(peaks) / 1e6, formula / 1e6, "MB per rank", ratios, ENGINE)


def costs(name: str, rounds: int, ranks: int, scale: float, unit: str) -> Row:
    """A row of costs, of which less is better."""
    found = on_ranks(ranks, name, rounds)
    ratios = [peer / ours for ours, peer in zip(found["ours"], found["peer"], strict=True)]
    ours, peer = (scale * statistics.median(found[side]) for side in ("ours", "peer"))
    return row_of(name, ours, peer, unit, ratios, ("torch",))


def row_of(name: str, ours: float, peer: float, unit: str, ratios: Sequence[float], packages: Sequence[str]) -> Row:
    """A row of what is not a rate."""
    return Row(
        name=name,
        ours=ours,
        peer=peer,
        unit=unit,
        ratio_median=statistics.median(ratios),
        ratio_min=min(ratios),
        ratio_max=max(ratios),
        rounds=len(ratios),
        outputs_equal=True,
        machine=machine(),
        versions={package: version(package) for package in packages},
    )


def benchmark(arguments: argparse.Namespace) -> list[Row]:
    """All rows that were asked for."""
    rows = []
    for name in arguments.rows:
        if name in EMAS:
            rows.append(ema(name, arguments.rounds))
        elif name in MEMORY:
            rows.append(memory(name, arguments.rounds))
        elif name.endswith("-memory"):
            rows.append(costs(name, arguments.rounds, 1, 1e-6, "MB"))
        elif name == "stall":
            rows.append(costs(name, arguments.rounds, 2, 1e3, "ms per save"))
        else:
            rows.append(Row(**on_ranks(2 if name == "zero1" else 1, name, arguments.rounds)))
    return rows


if __name__ == "__main__":
    main(__doc__ or "", benchmark, (*EMAS, "zero1", "stall", *RECOMPUTE, *MEMORY))
