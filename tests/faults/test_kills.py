"""F1, F23, F24: SIGKILL at any moment, and what it leaves behind."""

import time
from pathlib import Path

from tests.faults import soak
from tests.faults.attempts import Server
from tests.faults.conftest import digests, losses
from tests.processes import descendants, is_alive


def test_f01_f24_random_kills_end_as_if_nothing_had_happened(data_sets, tmp_path: Path, capsys) -> None:
    """The short form of `make soak`; the seed is printed."""
    arguments = ["--kills", "8", "--kinds", "single,fsdp2", "--data", str(data_sets.latents), "--out", str(tmp_path)]
    code = soak.main(arguments)
    assert code == 0, capsys.readouterr().out


def test_f23_a_killed_run_leaves_nothing_that_the_next_one_needs(
    server: Server, data_sets, undisturbed, tmp_path: Path
) -> None:
    """Worker processes end by themselves, shared memory is given back, and half a checkpoint is removed."""
    options = ("engine.kind=fsdp2", "data.num_workers=2", "checkpoint.every_steps=3")
    whole = undisturbed(*options, ranks=2)
    shared = {path.name for path in Path("/dev/shm").iterdir()}
    attempt = server.start(tmp_path / "run", data_sets.latents, *options, ranks=2)
    attempt.wait_for_step(7)
    workers = set().union(*(descendants(pid) for pid in attempt.pids))
    assert len(workers) >= 4
    attempt.kill()
    attempt.wait()
    (tmp_path / "run" / "checkpoints" / "step-00000009.tmp-0123456789abcdef").mkdir(exist_ok=True)
    again = server.start(tmp_path / "run", data_sets.latents, *options, ranks=2)  # at once: nobody is waited for
    assert again.wait() == [0, 0], again.output
    assert losses(tmp_path / "run") == losses(whole) and digests(tmp_path / "run") == digests(whole)
    until_s = time.monotonic() + 30
    while any(map(is_alive, workers)) and time.monotonic() < until_s:
        time.sleep(0.1)
    assert not any(map(is_alive, workers))
    names = [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()]
    assert all(name.startswith("step-") and len(name) == 13 for name in names), names
    assert not (tmp_path / "run" / "lease.json").exists()
    left = {path.name for path in Path("/dev/shm").iterdir()} - shared
    assert not [name for name in left if name.startswith("torch")], left
