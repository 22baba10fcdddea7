"""What `darkroom doctor` says: versions and accelerators. It reads no weights and opens no connection."""

import os
import platform
from importlib import metadata
from typing import Any

from launch.runtime import core_count, gpu_count

PACKAGES = (
    "torch",
    "torchvision",
    "deepspeed",
    "accelerate",
    "transformers",
    "open_clip_torch",
    "webdataset",
    "boto3",
    "safetensors",
    "diffusers",
)
OPTIONAL = {"diffusers": "export; install darkroom[serve]"}


def examine() -> dict[str, Any]:
    """Facts about this machine and installation; `missing` lists what a run would fail without."""
    missing: list[str] = []
    packages = []
    for name in PACKAGES:
        try:
            packages.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            packages.append(f"{name} absent" + (f" ({OPTIONAL[name]})" if name in OPTIONAL else ""))
            if name not in OPTIONAL:
                missing.append(name)
    return {
        "darkroom": _own_version(),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cores": core_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "accelerators": _accelerators(),
        "packages": packages,
        "missing": missing,
    }


def _own_version() -> str:
    try:
        return metadata.version("darkroom")
    except metadata.PackageNotFoundError:
        return "not installed (run from its source)"


def _accelerators() -> list[str]:
    if gpu_count() == 0:
        return []
    try:
        import torch  # seconds to import: only where there is a device to ask about
    except ImportError:
        return [f"{gpu_count()} device(s), but torch is absent"]
    if not torch.cuda.is_available():
        return [f"{gpu_count()} device(s), but torch {torch.__version__} cannot use them"]
    found = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return [f"{device.name}, {device.total_memory / 2**30:.0f} GiB" for device in found]
