"""What the command line can refuse before it imports or computes anything."""

import errno
import math
import os
from pathlib import Path

from launch.errors import ConfigError

# What the operating system says of a path that the user gave, or of a full disk: no bug.
_UNUSABLE = {
    errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG,
    errno.EEXIST,
}  # fmt: skip
SEEDS = 2**63  # what torch's generators take


def mistake_behind(error: Exception) -> ConfigError | None:
    """The user's mistake behind an error of the operating system or of torch's readers, or None if it may be a bug."""
    if isinstance(error, RuntimeError) and "DataLoader worker" in str(error):  # raised wherever the rank just was
        return ConfigError(
            "a reader process of the data died, perhaps for lack of memory; lower data.num_workers or "
            "data.shuffle_chunk_samples"
        )
    if not isinstance(error, OSError) or error.filename is None or isinstance(error.filename, int):
        return None
    name = os.fsdecode(error.filename)
    if error.errno == errno.ENOENT and not Path(name).parent.exists():
        return ConfigError(f"{name}: its folder is gone; was it moved or deleted while this ran?")
    if error.errno not in _UNUSABLE:
        return None
    return ConfigError(f"{name}: {error.strerror}; check the path, the rights and the free space")


def check_sampling(steps: int, guidance: float, seed: int = 0) -> None:
    """Refuses options that no picture can be drawn with."""
    if steps < 1:
        raise ConfigError(f"--steps {steps} must be at least 1")
    if not (math.isfinite(guidance) and guidance >= 0):
        raise ConfigError(f"--guidance {guidance} must be a finite number, at least 0; 1 is none")
    if not 0 <= seed < SEEDS // 2:
        raise ConfigError(f"--seed {seed} must be from 0 to {SEEDS // 2 - 1}")


def check_local(option: str, path: str | Path) -> None:
    """Refuses an address where only a folder of this machine will do."""
    if "://" in str(path) or str(path).startswith("s3:/"):  # a Path folds the slashes
        raise ConfigError(f"{option} {path} must be a local folder")


def check_new_folder(option: str, path: str | Path) -> None:
    """Refuses a place that holds something, and one that is not on this machine."""
    check_local(option, path)
    place = Path(path)
    if place.exists() and (not place.is_dir() or any(place.iterdir())):
        raise ConfigError(f"{path} is there already and nothing is overwritten; give another {option}")


def commit_places(url: str) -> list[str]:
    """Where commits may lie if `url` is a run directory or a checkpoints folder, the likeliest first."""
    places = [f"{url.rstrip('/')}/checkpoints", url]
    if "://" not in url and (Path(url) / "run.yaml").exists():
        places.insert(0, checkpoints_of(Path(url)))
    return list(dict.fromkeys(places))


def checkpoints_of(run: Path) -> str:
    """The address of a run's checkpoints, by its run.yaml."""
    from launch.config_io import read_yaml

    recipe = read_yaml(run / "run.yaml").get("recipe")
    try:
        return str(recipe["checkpoint"]["url"] or run / "checkpoints")  # type: ignore[index]
    except (KeyError, TypeError):
        raise ConfigError(f"{run / 'run.yaml'}: is not that of a training run; give a run directory") from None
