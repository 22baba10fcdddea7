"""What `darkroom doctor` finds, and its remedies."""

import os
import time
from pathlib import Path

import pytest

from launch import doctor
from launch.cli_doctor import needs_of, needs_of_store
from launch.errors import ConfigError


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR", raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def told() -> str:
    return "\n".join(map(str, doctor.findings()))


def test_packages_outside_of_their_ranges(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "is installed" not in told()
    real = doctor.metadata.version
    monkeypatch.setattr(doctor.metadata, "version", lambda name: "4.9.1" if name == "transformers" else real(name))
    assert "problem: transformers 4.9.1 is installed, darkroom needs >5.2; run `make install`" in told()
    monkeypatch.setattr(doctor.metadata, "version", lambda name: "2.0.0" if name == "torch" else real(name))
    assert "torch 2.0.0 is installed, torchvision needs" in told()


def test_a_shell_that_is_a_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("OMP_NUM_THREADS", "4096")
    assert "warning: RANK set in this shell" in told() and "OMP_NUM_THREADS is 4096" in told()


def test_hidden_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("launch.runtime.glob.glob", lambda pattern: [])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    assert "problem: CUDA_VISIBLE_DEVICES is '3' and no such GPU is there; unset it" in told()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # on purpose: no GPU
    assert "CUDA_VISIBLE_DEVICES" not in told()


def test_full_disks(monkeypatch: pytest.MonkeyPatch) -> None:
    class Usage:
        free = 2**29

    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda folder: Usage)
    assert "has 0.5 GiB free; make room" in told() and "/dev/shm has less than 1 GiB free" in told()


def test_locks_of_dead_builds(home: Path) -> None:
    lock = home / ".cache" / "torch_extensions" / "py311" / "comm" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    assert "was left by a build" not in told()  # somebody may be building
    os.utime(lock, (time.time() - 7200,) * 2)
    assert f"warning: {lock} was left by a build that was killed" in told()


def test_what_a_recipe_lacks(home: Path) -> None:
    found = {
        str(finding).partition(":")[2].strip().partition(":")[0]: finding for finding in needs_of("digits-dit", [])
    }
    assert {name: finding.state for name, finding in found.items()} == {
        "data.shards": "problem",
        "autoencoder": "problem",
    }
    assert "give data.shards=URL" in found["data.shards"].remedy
    (home / "there" / "artifact").mkdir(parents=True)
    (home / "there" / "artifact" / "config.json").write_text("{}")
    (home / "there" / "index.json").write_text("{}")
    found_now = needs_of("digits-dit", ["autoencoder=there", "data.shards=there"])
    assert [finding.what.partition(":")[0] for finding in found_now] == ["data.shards"]  # it is no index
    assert any("no LPIPS weights" in finding.what for finding in needs_of("autoencoder-256", []))
    with pytest.raises(ConfigError, match="did you mean digits-dit"):
        needs_of("digits-diy", [])


def test_weights_that_would_have_to_be_fetched(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    found = [str(finding) for finding in needs_of("dit-2b-256", []) if finding.state == "warning"]
    assert len(found) == 3 and "text encoder t5: the weights of google/t5-v1_1-xxl are not on this machine" in found[2]


def test_a_store_is_tried(home: Path) -> None:
    assert needs_of_store(str(home / "store")) == []
    assert list((home / "store").iterdir()) == []
    (home / "file").write_text("")
    assert needs_of_store(str(home / "file"))[0].state == "problem"
