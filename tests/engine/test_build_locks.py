"""Locks of dead processes are removed, locks of living ones stay."""

import os
import time
from pathlib import Path

import pytest

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
    began_at_s = time.monotonic()
    lock = make_lock(tmp_path, age_s=0.5)
    assert drop_stale_locks(tmp_path) == [lock] and time.monotonic() - began_at_s > 0.4


def start_zero(ranks: Ranks, extensions: str) -> bool:
    """DeepSpeed with its operators in this folder."""
    os.environ["TORCH_EXTENSIONS_DIR"] = extensions
    build("zero1", ranks)
    return True


def test_the_engine_looks_for_locks_and_compiles_nothing(tmp_path: Path) -> None:
    pytest.importorskip("deepspeed")
    lock = make_lock(tmp_path, age_s=60)
    assert on_ranks(2, start_zero, str(tmp_path)) == [True, True]
    assert not lock.exists() and not [path for path in tmp_path.rglob("*") if path.is_file()]
