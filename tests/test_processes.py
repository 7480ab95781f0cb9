"""A command that hangs is ended with its children, and the test that waited for it prints where it hung."""

import sys
import time

import pytest

from tests import processes

SLEEPS = "import time\ndef wait_for_ever():\n    time.sleep(600)\n"
PARENT = (
    f"{SLEEPS}import subprocess, sys\nprint('begun', flush=True)\nsubprocess.run([sys.executable, '-c', sys.argv[1]])"
)
CHILD = f"{SLEEPS}wait_for_ever()"


def test_what_a_command_printed_and_returned():
    done = processes.run([sys.executable, "-c", "import sys; print('out'); print('err', file=sys.stderr); sys.exit(3)"])
    assert (done.returncode, done.stdout, done.stderr) == (3, "out\n", "err\n")


def test_a_command_that_hangs_shows_the_stacks_of_its_children():
    hanging, other = (processes.start([sys.executable, "-c", code, CHILD]) for code in (PARENT, "print('other')"))
    deadline_s = time.monotonic() + 60
    while not (children := processes.descendants(hanging.pid)) and time.monotonic() < deadline_s:
        time.sleep(0.05)
    with pytest.raises(AssertionError, match="wait_for_ever") as caught:
        processes.finish([hanging, other], timeout_s=3.0)
    assert "begun" in str(caught.value) and other.returncode == 0
    assert children and not children & processes.descendants(hanging.pid) and hanging.returncode is not None
