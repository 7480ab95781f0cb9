"""Lines of many ranks are merged into one screen; results from numbers, names and variables."""

import logging
import socket
from pathlib import Path

import pytest
import torch

from latte_scale.config import load_config
from latte_scale.doctor import network, saving, together, variables
from latte_scale.doctor.command import main
from latte_scale.doctor.lines import Line, joined
from latte_scale.doctor.software import memory_lines, precision_lines, version_lines
from latte_scale.engine.base import EngineSettings
from tests.conftest import ROOT

PLACES = [f"rank {rank}" for rank in range(4)]


def test_ranks_that_found_the_same_are_one_line_and_a_fault_hides_what_is_sound() -> None:
    ok, bad = Line("ok", "room", "enough"), Line("fault", "room", "none", "make some")
    assert joined([[ok]] * 4, PLACES) == [ok]
    assert joined([[ok], [bad], [ok], [bad]], PLACES) == [Line("fault", "room", "rank 1, rank 3: none", "make some")]
    assert joined([[bad]] * 4, PLACES) == [bad]


@pytest.mark.parametrize(
    ("name", "value", "level", "words"),
    [
        ("CUDA_LAUNCH_BLOCKING", "1", "warning", "every kernel"),
        ("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0", "warning", "hanging"),
        ("TORCH_DISTRIBUTED_DEBUG", "detail", "warning", "every collective"),
        ("NCCL_SOCKET_IFNAME", "nowhere0", "fault", "no such interface"),
        ("GLOO_SOCKET_IFNAME", "l", "fault", "no such interface"),
        ("OMP_NUM_THREADS", "3", "warning", "x 2 ranks are more than the 4 cores"),
        ("OMP_NUM_THREADS", "", "warning", "is not set"),
        ("TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC", "60", "warning", "engine.timeout_s=600"),
    ],
)
def test_variables_that_do_harm(name: str, value: str, level: str, words: str) -> None:
    environ = {"OMP_NUM_THREADS": "2", name: value}
    (line,) = variables.variable_lines(environ, EngineSettings(), 4, 2, ["lo", "eth0"], has_gpu=False)
    assert line.level == level and words in line.found and line.remedy


@pytest.mark.parametrize(
    ("name", "value"), [("NCCL_SOCKET_IFNAME", "eth"), ("NCCL_SOCKET_IFNAME", "^docker"), ("A", "1")]
)
def test_variables_that_do_none(name: str, value: str) -> None:
    environ = {"OMP_NUM_THREADS": "2", name: value}
    (line,) = variables.variable_lines(environ, EngineSettings(), 4, 2, ["lo", "eth0"], has_gpu=False)
    assert line.level == "ok"


def test_a_file_in_the_place_of_a_standard_module(tmp_path: Path) -> None:
    (tmp_path / "queue.py").touch()
    lines = variables.shadow_lines([str(tmp_path)])
    assert [line.level for line in lines] == ["fault"] and "queue" in lines[0].found


def test_the_slow_rank_of_many_is_named() -> None:
    (line,) = together.gemm_lines([1.0, 1.02, 1.4, 0.99], PLACES, "cpu")
    assert (line.level, line.found) == ("warning", "rank 2 takes 1.4 x as long as the others for the same product")
    (line,) = together.gemm_lines([1.0, 1.02, 1.1, 0.99], PLACES, "cpu")
    assert line.level == "ok"


@pytest.mark.parametrize(("skew_s", "level"), [(0.2, "ok"), (60.0, "warning"), (-900.0, "fault")])
def test_clocks(skew_s: float, level: str) -> None:
    barriers = [10.0, 20.0, 30.0]
    late_once = [b + 0.001 for b in barriers]
    other = [b + skew_s for b in barriers]
    other[1] += 3.0  # this rank left one barrier late
    (line,) = together.clock_lines([barriers, late_once, other], PLACES)
    assert line.level == level and line.found.startswith("rank 2")


def test_versions_that_differ_are_named() -> None:
    (line,) = version_lines([{"torch": "2.13"}, {"torch": "2.12"}], ["node1", "node2"])
    assert line.level == "fault" and "2.12 on node2" in line.found


def test_a_name_that_leads_to_loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "gethostname", lambda: "localhost")  # resolved for real
    for several, level in ((True, "fault"), (False, "warning")):
        (line,) = network.name_lines({}, several)
        assert line.level == level and "GLOO_SOCKET_IFNAME" in line.remedy
    (line,) = network.name_lines({"GLOO_SOCKET_IFNAME": "eth0"}, True)
    assert line.level == "ok"


@pytest.mark.parametrize(("seconds", "level"), [(300, "ok"), (70, "warning"), (20, "fault")])
def test_notice_against_a_measured_save(tmp_path, seconds: int, level: str) -> None:
    from latte_scale.config import load_config
    from tests.conftest import ROOT

    (tmp_path / "exit.json").write_text('{"code": 75, "reason": "stopped by SIGUSR1, saved 41.3 s after it"}')
    config = load_config(ROOT / "configs" / "tiny_cpu.yaml", [f"run.dir={tmp_path}"])
    environ = {"SLURM_JOB_ID": "1", "SBATCH_SIGNAL": f"USR1@{seconds}"}
    (line,) = saving.grace_lines(config, environ, 1.0)
    assert line.level == level and "41.3 s took at the last stop" in line.found


@pytest.mark.parametrize(
    ("gib", "overrides", "level", "words"),
    [
        (80, (), "ok", "a rank needs about"),
        (6, (), "warning", "of 6.0 GiB: single, micro-batches of 2, no checkpointing"),
        (6, ("engine.activation_checkpointing=auto",), "ok", "activation checkpointing"),
        (2, ("engine.activation_checkpointing=auto",), "fault", "lower train.micro_batch"),
    ],
)
def test_whether_a_step_fits_into_the_device(gib: float, overrides: tuple[str, ...], level: str, words: str) -> None:
    small = ("model.num_layers=4", "train.micro_batch=2", "engine.kind=single", "engine.activation_checkpointing=none")
    config = load_config(ROOT / "configs" / "t2v_256.yaml", [*small, *overrides])
    (line,) = memory_lines(config, 1, gib * 2**30)
    assert (line.level, line.check) == (level, "memory") and words in line.found
    assert bool(line.remedy) == (level != "ok")


def test_a_precision_that_the_device_has_not(monkeypatch) -> None:
    monkeypatch.setattr("latte_scale.doctor.software.why_no_fp8", lambda device: "it is too old")
    config = load_config(ROOT / "configs" / "t2v_256.yaml", ["train.precision=fp8"])
    (line,) = precision_lines(config, torch.device("cpu"))
    assert (line.level, line.remedy) == ("fault", "set train.precision=bf16") and "it is too old" in line.found
    (line,) = precision_lines(load_config(ROOT / "configs" / "t2v_256.yaml"), torch.device("cpu"))
    assert (line.level, line.found) == ("ok", "bf16")


def test_a_look_leaves_logging_as_it_was(tmp_path: Path, capsys) -> None:
    package = logging.getLogger("latte_scale")
    before = package.level
    assert main(["--config", str(tmp_path / "missing.yaml")]) == 1
    assert package.level == before and "missing.yaml" in capsys.readouterr().out
