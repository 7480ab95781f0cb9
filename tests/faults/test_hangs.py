"""F5: a frozen rank. The job waits out a short stop; a long one ends it with the stacks of every rank."""

import signal
import time
from pathlib import Path

from tests.faults.attempts import Server
from tests.faults.conftest import digests, losses

OPTIONS = ("engine.kind=fsdp2", "train.steps=40", "checkpoint.every_steps=5")


def test_f05_a_short_stop_is_waited_for(server: Server, data_sets, undisturbed, tmp_path: Path) -> None:
    whole = undisturbed(*OPTIONS, ranks=2)
    attempt = server.start(tmp_path / "run", data_sets.latents, *OPTIONS, ranks=2)
    attempt.wait_for_step(6)
    attempt.signal(signal.SIGSTOP, [1])
    time.sleep(1.0)
    attempt.signal(signal.SIGCONT, [1])
    assert attempt.wait() == [0, 0], attempt.output
    assert losses(tmp_path / "run") == losses(whole)
    assert not list((tmp_path / "run" / "logs").glob("stacks-*"))


def test_f05_a_stopped_rank_ends_the_job_with_stacks_of_all(
    server: Server, data_sets, undisturbed, tmp_path: Path
) -> None:
    whole, folder, limit_s = undisturbed(*OPTIONS, ranks=2), tmp_path / "run", 4.0
    attempt = server.start(folder, data_sets.latents, *OPTIONS, f"engine.timeout_s={limit_s:g}", ranks=2)
    attempt.wait_for_step(7)
    began_at_s = time.monotonic()
    attempt.signal(signal.SIGSTOP, [1])
    time.sleep(limit_s + 1.0)
    attempt.signal(signal.SIGCONT, [1])  # a frozen process cannot write: its clock has run out when it goes on
    codes = attempt.wait(timeout_s=30)
    assert codes == [1, 1], attempt.output
    assert time.monotonic() - began_at_s < 4 * limit_s
    for rank in range(2):
        text = (folder / "logs" / f"stacks-rank-{rank:05d}.txt").read_text()
        assert "Timeout" in text and "train.py" in text, text
    assert server.run(folder, data_sets.latents, *OPTIONS, ranks=2) == [0, 0]
    assert losses(folder) == losses(whole) and digests(folder) == digests(whole)
