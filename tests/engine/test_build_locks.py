"""Locks of dead processes go, locks of living ones stay."""

import os
import shutil
import time
from pathlib import Path

import pytest
from torch.utils.cpp_extension import get_default_build_root

from latte_scale.engine import Ranks, build_locks
from latte_scale.engine.build_locks import drop_stale_locks
from tests.engine.toy import build, on_ranks


def make_lock(root: Path, age_s: float) -> Path:
    lock = root / "py311_cpu" / "deepspeed_shm_comm" / "lock"
    lock.parent.mkdir(parents=True, exist_ok=True)
    lock.touch()
    os.utime(lock, (time.time() - age_s,) * 2)
    return lock


def test_an_old_lock_that_nobody_holds_is_removed(tmp_path: Path) -> None:
    lock = make_lock(tmp_path, age_s=60)
    assert drop_stale_locks(tmp_path) == [lock] and not lock.exists()
    assert drop_stale_locks(tmp_path) == []


def test_a_lock_that_a_process_holds_stays(tmp_path: Path) -> None:
    lock = make_lock(tmp_path, age_s=60)
    with open(lock):
        assert drop_stale_locks(tmp_path) == [] and lock.exists()


def test_a_young_one_is_waited_for(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(build_locks, "STALE_S", 1.0)
    lock = make_lock(tmp_path, age_s=0.5)
    began_at_s = time.monotonic()
    assert drop_stale_locks(tmp_path) == [lock] and time.monotonic() - began_at_s > 0.4


def start_zero(ranks: Ranks, extensions: str | None) -> bool:
    """DeepSpeed with its operators in this folder (None: the machine's)."""
    if extensions is not None:
        os.environ["TORCH_EXTENSIONS_DIR"] = extensions
    build("zero1", ranks)
    return True


@pytest.mark.timeout(240)  # without the look at locks the ranks wait for ever
def test_the_engine_starts_where_a_killed_process_left_its_lock(tmp_path: Path) -> None:
    pytest.importorskip("deepspeed")
    assert on_ranks(2, start_zero, None) == [True, True]  # they are built now
    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())
    built = next(iter([*root.glob("deepspeed_shm_comm"), *root.glob("*/deepspeed_shm_comm")]))
    shutil.copytree(built, tmp_path / "deepspeed_shm_comm", ignore=shutil.ignore_patterns("lock"))
    lock = tmp_path / "deepspeed_shm_comm" / "lock"
    lock.touch()
    os.utime(lock, (time.time() - 60,) * 2)
    assert on_ranks(2, start_zero, str(tmp_path)) == [True, True]
    assert not lock.exists()
