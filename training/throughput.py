"""How fast a run is: pictures and operations per second, waiting, memory (docs/run_checks.md)."""

import resource
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from models.autoencoder import Autoencoder, AutoencoderConfig
from models.discriminator import Discriminator, DiscriminatorConfig
from training.autoencoder_step import discriminator_step, generator_step
from training.losses import AutoencoderLossConfig
from training.metrics import Complaint, Reading

# Dense bfloat16 products with float32 sums, in TFLOP/s, from the makers' data sheets; where a sheet gives the figure
# with sparsity, half of it. By what torch.cuda.get_device_name says; the first entry found in the name counts.
PEAK_TFLOPS: tuple[tuple[str, float], ...] = (
    ("GB200", 2500.0),  # per GPU; NVIDIA GB200 NVL72 data sheet
    ("B200", 2250.0),  # NVIDIA DGX B200 data sheet, an eighth
    ("GH200", 989.4),  # NVIDIA GH200 data sheet
    ("H200 NVL", 835.5),  # NVIDIA H200 data sheet
    ("H200", 989.4),  # the same; SXM
    ("H100 PCIe", 756.5),  # NVIDIA H100 data sheet
    ("H100 NVL", 835.5),  # NVIDIA H100 NVL product brief
    ("H100", 989.4),  # NVIDIA H100 data sheet; SXM, whose name is "NVIDIA H100 80GB HBM3"
    ("A100", 311.9),  # NVIDIA A100 data sheet, all forms
    ("A800", 311.9),  # as A100
    ("L40S", 362.1),  # NVIDIA L40S data sheet
    ("L40", 181.1),  # NVIDIA L40 data sheet
    ("L4", 121.0),  # NVIDIA L4 data sheet
    ("A40", 149.7),  # NVIDIA A40 data sheet
    ("A10", 125.0),  # NVIDIA A10 data sheet
    ("RTX 6000 Ada", 364.2),  # NVIDIA Ada architecture white paper
    ("RTX A6000", 154.8),  # NVIDIA Ampere GA102 white paper
    ("RTX 5090", 209.5),  # NVIDIA RTX Blackwell white paper
    ("RTX 4090", 165.2),  # NVIDIA Ada architecture white paper
    ("RTX 3090", 71.0),  # NVIDIA Ampere GA102 white paper
    ("MI325X", 1307.4),  # AMD Instinct MI325X data sheet
    ("MI300X", 1307.4),  # AMD Instinct MI300X data sheet
    ("MI250X", 191.5),  # AMD Instinct MI250X data sheet, half: each of its two dies is a device
)
WAIT_SHARE = 0.1  # of the time, above which waiting for data is worth a warning
WAIT_STEPS = 100  # optimiser steps over which it is looked at


def peak_tflops(name: str) -> float | None:
    """The most a device can do in bfloat16, in TFLOP/s; None for one that is not known or is a slice of one.

    Args:
        name: As torch.cuda.get_device_name gives it.
    """
    if " MIG " in f" {name} ":
        return None
    words = f" {name.replace('-', ' ')} "
    return next((peak for model, peak in PEAK_TFLOPS if f" {model} " in words), None)


def peak_memory_bytes(device: torch.device) -> int:
    """The most that this rank held: of the GPU's memory what torch's tensors took, elsewhere its resident memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.exists():  # getrusage would also count what the parent held when it made this process
        kib = next(line.split()[1] for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(kib) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class Pace:
    """A part of the row: what happened in how much time.

    Args:
        device: that trains.

    Attributes:
        started_s: start of the row; waits that are not training move it.
        wait_s: time spent waiting for the loader in this row, on this rank.
        images: pictures in this row, over all ranks.
        steps: optimiser steps in this row.
        flops: operations of the trained networks in this row, on this rank.
        seconds: length of the row that was read last.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.peak = peak_tflops(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
        self.seconds = 0.0
        self._window: list[float] | None = None  # seconds waited, seconds, steps; None in the first row
        self._complaints: list[Complaint] = []
        self.restart()

    def restart(self) -> None:
        """Begins a row now."""
        self.started_s = time.perf_counter()
        self.wait_s, self.images, self.steps, self.flops = 0.0, 0, 0, 0

    def numbers(self) -> Tensor:
        """Seconds waited, operations, bytes; float64."""
        return torch.tensor([self.wait_s, self.flops, peak_memory_bytes(self.device)], dtype=torch.float64)

    def read(self, table: Tensor) -> Reading:
        """Rates of the row; begins the next."""
        wait_s, _, peak_bytes = table.amax(0).tolist()  # ranks go in step: whoever waits longest holds up all
        self.seconds = max(time.perf_counter() - self.started_s, 1e-9)
        tflops_per_s = float(table[:, 1].mean()) / self.seconds / 1e12
        self._look(wait_s)
        fields = {
            "images_per_s": self.images / self.seconds,
            "tflops_per_s": tflops_per_s,
            "mfu": None if self.peak is None else tflops_per_s / self.peak,
            "peak_memory_gib": round(peak_bytes / 2**30, 3),
            "data_wait_share": wait_s / self.seconds,
        }
        self.restart()
        return Reading(fields=fields, complaints=list(self._complaints))

    def _look(self, wait_s: float) -> None:
        """Renews the complaint about waiting when a window is full."""
        if self._window is None:  # the loader's start is in the first row
            self._window = [0.0, 0.0, 0.0]
            return
        self._window = [a + b for a, b in zip(self._window, (wait_s, self.seconds, self.steps), strict=True)]
        waited, seconds, steps = self._window
        if steps < WAIT_STEPS:
            return
        self._window, share = [0.0, 0.0, 0.0], waited / seconds
        message = (
            f"{100 * share:.0f} % of the time of {steps:.0f} steps went into waiting for data: raise "
            "data.num_workers, or look at the store's speed (`darkroom data stats`), or encode the data beforehand"
        )
        self._complaints = [Complaint(check="data wait", message=message)] if share > WAIT_SHARE else []


class _Operations(TorchDispatchMode):
    """Counts what is computed inside it by torch's formulas per operator.

    torch's own FlopCounterMode also follows modules, and its hooks do not bear autograd.grad inside a step.
    """

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        formula = flop_registry.get(func._overloadpacket)
        if formula is not None:
            self.total += formula(*args, **(kwargs or {}), out_val=out)
        return out


class AutoencoderFlops:
    """Operations of the autoencoder's training step, counted once per shape on tensors without data.

    Matrix products and convolutions of generator and discriminator, forward and backward, a multiply-add as two; the
    perceptual network is frozen and not counted.

    Args:
        model: Sizes of the generator.
        discriminator: Sizes of its adversary.
        loss: Of both.
    """

    def __init__(
        self, model: AutoencoderConfig, discriminator: DiscriminatorConfig, loss: AutoencoderLossConfig
    ) -> None:
        self.loss = loss
        with torch.device("meta"):
            self._generator, self._discriminator = Autoencoder(model), Discriminator(discriminator)
        self._known: dict[tuple[tuple[int, ...], bool], int] = {}

    def __call__(self, images: Tensor, step: int) -> int:
        """For a micro-batch of images (B, 3, H, W) at an optimiser step."""
        key = tuple(images.shape), step >= self.loss.disc_start_step
        if key not in self._known:
            self._known[key] = self._count(torch.empty(images.shape, device="meta"), step)
        return self._known[key]

    def _count(self, images: Tensor, step: int) -> int:
        config = self._generator.config
        size = (images.shape[2] // config.downsampling, images.shape[3] // config.downsampling)
        eps = torch.empty(len(images), config.latent_channels, *size, device="meta")
        weights = torch.empty(len(images), device="meta")
        with _Operations() as counter:
            turn = generator_step(
                self._generator, self._discriminator, None, images, eps, weights, self.loss,
                last_conv=self._generator.last_conv, step=step,
            )  # fmt: skip
            turn.objective.backward()
            if step >= self.loss.disc_start_step:
                discriminator_step(self._discriminator, images, turn.decoded, weights).backward()
        return counter.total
