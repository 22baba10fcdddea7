"""launch.checks: what is refused before anything is imported or computed."""

import errno
from pathlib import Path

import pytest

from launch.checks import check_new_folder, check_sampling, mistake_behind
from launch.errors import ConfigError


@pytest.mark.parametrize(
    ("steps", "guidance", "seed", "message"),
    [
        (0, 4.0, 0, "--steps 0"),
        (1, -1.0, 0, "--guidance -1.0"),
        (1, float("nan"), 0, "--guidance nan"),
        (1, 4.0, -1, "--seed -1"),
        (1, 4.0, 10**30, "--seed 1000"),
    ],
)
def test_sampling_options(steps: int, guidance: float, seed: int, message: str) -> None:
    check_sampling(1, 0.0, 0)
    with pytest.raises(ConfigError, match=message):
        check_sampling(steps, guidance, seed)


def test_a_new_folder_is_new_and_local(tmp_path: Path) -> None:
    check_new_folder("--out", tmp_path / "new")
    check_new_folder("--out", tmp_path)  # empty
    (tmp_path / "file").touch()
    for place in (tmp_path, tmp_path / "file", "s3://bucket/x", Path("s3://bucket/x")):
        with pytest.raises(ConfigError, match="--out"):
            check_new_folder("--out", place)


def test_a_place_that_cannot_be_used_is_no_bug(tmp_path: Path) -> None:
    mistake = mistake_behind(OSError(errno.ENOSPC, "No space left on device", "/data/x"))
    assert mistake is not None and mistake.exit_code == 2
    assert str(mistake).startswith("/data/x: No space left on device;")
    assert mistake_behind(OSError(errno.ENOSPC, "No space left on device")) is None  # of no path: perhaps a bug
    assert mistake_behind(FileNotFoundError(errno.ENOENT, "No such file", str(tmp_path / "x"))) is None
    gone = mistake_behind(FileNotFoundError(errno.ENOENT, "No such file", bytes(tmp_path / "run" / "metrics.jsonl")))
    assert str(gone) == f"{tmp_path}/run/metrics.jsonl: its folder is gone; was it moved or deleted while this ran?"
    assert mistake_behind(RuntimeError("x")) is None


def test_a_reader_that_died_is_one_line() -> None:
    """torch raises it in the main thread, wherever that is; see also tests/unit/test_loader.py."""
    mistake = mistake_behind(RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed."))
    assert mistake is not None and "lower data.num_workers" in str(mistake) and "\n" not in str(mistake)
