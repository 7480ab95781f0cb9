"""F4: a signal to any one rank, a file, the end of a time budget: all ranks save once, at one step, and exit 75."""

import json
import os
import signal
import time
from pathlib import Path

from tests.faults.attempts import Attempt, Server
from tests.faults.conftest import digests, losses
from tests.processes import descendants

OPTIONS = ("engine.kind=fsdp2", "train.steps=60", "checkpoint.every_steps=1000", "checkpoint.keep_last=10")
GRACE_S = 30.0
"""What a scheduler gives between SIGTERM and SIGKILL, at least."""


def asked_to_stop(attempt: Attempt, how: str) -> None:
    if how == "file":
        (attempt.folder / "stop").touch()
    elif how != "budget":
        name, rank = how.split()
        attempt.signal(signal.Signals[name], [int(rank)])


def test_f04_whoever_is_asked_all_save_once_and_the_run_goes_on(
    server: Server, data_sets, undisturbed, tmp_path: Path
) -> None:
    """One run, stopped five times in five ways; a save is under way at every step of the last but one."""
    whole, folder = undisturbed(*OPTIONS, ranks=2), tmp_path / "run"
    saved: list[int] = []
    for how in ("SIGTERM 1", "SIGUSR2 1", "SIGUSR1 0", "file", "budget"):
        more = ["run.time_budget_s=0.5"] if how == "budget" else []
        more += ["checkpoint.every_steps=1", "checkpoint.asynchronous=true"] if how == "file" else []
        attempt = server.start(folder, data_sets.latents, *OPTIONS, *more, ranks=2)
        if how != "budget":
            attempt.wait_for_step((saved[-1] if saved else 0) + 2)
        began_at_s = time.monotonic()
        asked_to_stop(attempt, how)
        assert attempt.wait() == [75, 75], attempt.output
        assert time.monotonic() - began_at_s < GRACE_S
        exit_file = json.loads((folder / "exit.json").read_text())
        expected = {"file": f"the file {folder / 'stop'}", "budget": "run.time_budget_s=0.5", "SIGUSR1 0": "SIGUSR1"}
        assert exit_file["code"] == 75 and expected.get(how, "another rank") in exit_file["reason"]
        steps = sorted(int(path.name[5:]) for path in (folder / "checkpoints").iterdir())
        if how != "file":
            # Once, and nothing half done beside it; of more than keep_last the oldest are gone.
            assert len(set(steps) - set(saved)) == 1, (how, steps)
        saved = steps
        assert not (folder / "stop").exists()
    assert server.run(folder, data_sets.latents, *OPTIONS, ranks=2) == [0, 0]
    assert losses(folder) == losses(whole) and digests(folder) == digests(whole)


def test_f04_workers_outlive_the_signal_and_a_stall_of_the_data(
    server: Server, data_sets, undisturbed, tmp_path: Path
) -> None:
    """The signal goes to the whole process tree of rank 1 while its worker is frozen: the batch still comes."""
    options = (*OPTIONS, "data.num_workers=1", "data.prefetch=1")
    whole, folder = undisturbed(*OPTIONS, ranks=2), tmp_path / "run"
    attempt = server.start(folder, data_sets.latents, *options, ranks=2)
    attempt.wait_for_step(3)
    workers = descendants(attempt.pids[1])
    for pid in workers:
        os.kill(pid, signal.SIGSTOP)
    time.sleep(0.5)  # rank 1 waits for data by now, and rank 0 for rank 1
    for pid in workers:
        os.kill(pid, signal.SIGTERM)
    attempt.signal(signal.SIGTERM, [1])
    time.sleep(0.5)
    for pid in workers:
        os.kill(pid, signal.SIGCONT)
    assert attempt.wait() == [75, 75], attempt.output
    assert len(list((folder / "checkpoints").iterdir())) == 1
    assert server.run(folder, data_sets.latents, *options, ranks=2) == [0, 0]
    assert losses(folder) == losses(whole) and digests(folder) == digests(whole)
