"""Where a step's time went, from intervals; a real run with and without the profiler is bitwise equal."""

import json
from pathlib import Path

import pytest

from latte_scale import train
from latte_scale.run.metrics import read_metrics
from latte_scale.run.profile import PARTS, parts_of, stragglers, union
from tests.conftest import run_in_process


def event(cat: str, name: str, begin: float, end: float) -> dict:
    return {"ph": "X", "cat": cat, "name": name, "ts": begin, "dur": end - begin, "tid": 1}


STEP = event("user_annotation", "train step", 0, 100)


def microseconds(*events: dict) -> dict[str, int]:
    return {part: round(1e6 * seconds) for part, seconds in parts_of([STEP, *events]).items()}


def test_the_parts_of_a_cpu_step() -> None:
    found = microseconds(
        event("cpu_op", "aten::addmm", 10, 40),
        event("cpu_op", "aten::mm", 15, 30),  # inside: counts once
        event("cpu_op", "c10d::allreduce_", 40, 42),
        event("user_annotation", "gloo:all_reduce", 30, 60),  # in another thread: 10 us of it are hidden
        event("user_annotation", "enumerate(DataLoader)#_MultiProcessingDataLoaderIter.__next__", 0, 12),
        event("user_annotation", "checkpoint", 70, 90),
        event("cpu_op", "aten::copy_", 80, 85),  # a save that copies computes
        event("cpu_op", "aten::mm", 100, 200),  # after the step
    )
    expected = {"compute": 35, "exposed communication": 20, "data wait": 10, "checkpoint": 15, "host": 20, "step": 100}
    assert found == expected


def test_on_a_gpu_kernels_count_and_not_the_operators_that_launch_them() -> None:
    found = microseconds(
        event("cpu_op", "aten::addmm", 0, 50),
        event("kernel", "nvjet_hsh_256x128", 20, 60),
        event("kernel", "ncclDevKernel_AllGather_RING_LL", 40, 80),
        event("user_annotation", "nccl:all_gather", 0, 5),
    )
    assert found == {
        "compute": 40,
        "exposed communication": 20,
        "data wait": 0,
        "checkpoint": 0,
        "host": 40,
        "step": 100,
    }


def test_the_rank_that_others_wait_for_is_named_with_what_it_does() -> None:
    even = dict.fromkeys(PARTS, 0.0) | {"compute": 0.1, "exposed communication": 0.1, "step": 0.2}
    slow = even | {"compute": 0.11, "data wait": 0.09, "exposed communication": 0.0}
    assert stragglers([even, even, even]) == stragglers([even]) == []
    assert stragglers([even, slow, even]) == ["rank 1 holds the others up: 0.0900 s a step more in data wait"]


def test_union_joins_what_overlaps() -> None:
    assert union([(5, 7), (0, 2), (1, 3), (3, 4)]) == [(0, 4), (5, 7)]


@pytest.fixture(scope="module")
def two_runs(data_sets, tmp_path_factory) -> tuple[Path, Path]:
    plain, traced = (tmp_path_factory.mktemp(name) / "run" for name in ("plain", "traced"))
    few = ("train.steps=6", "checkpoint.every_steps=4")
    assert run_in_process(plain, data_sets.latents, *few) == 0
    assert run_in_process(traced, data_sets.latents, *few, "--profile=3") == 0
    return plain, traced


def test_a_traced_run_computes_the_same_to_the_bit(two_runs) -> None:
    plain, _ = two_runs
    kept = ("loss", "grad_norm", "sample_ids_sha")
    records = [[{key: r[key] for key in kept} for r in read_metrics(run / "metrics.jsonl")] for run in two_runs]
    assert records[0] == records[1] and len(records[0]) == 6
    for name in ("model.rank-00000.safetensors", "optim-exp_avg.rank-00000.safetensors"):
        first, second = (run / "checkpoints" / "step-00000006" / name for run in two_runs)
        assert first.read_bytes() == second.read_bytes()
    assert not (plain / "profile").exists()


def test_the_trace_and_the_table_of_a_real_run(two_runs) -> None:
    folder = two_runs[1] / "profile"
    assert json.loads((folder / "trace-rank-00000.json").read_text())["traceEvents"]
    table = json.loads((folder / "table.json").read_text())
    (seconds,) = table["seconds_a_step"]
    assert table["steps"] == 3 and sum(seconds[part] for part in PARTS) == pytest.approx(seconds["step"])
    for part in ("compute", "data wait", "checkpoint", "host"):  # step 4 is saved, within the trace of steps 3 to 5
        assert seconds[part] > 0, part
    assert seconds["exposed communication"] == 0


@pytest.mark.parametrize(
    ("words", "steps"),
    [
        (["--profile", "a.b=1"], 5),  # a setting, not the number
        (["--profile", "8", "a.b=1"], 8),
        (["a.b=1", "--profile"], 5),
        (["a.b=1"], 0),
    ],
)
def test_the_number_of_profiled_steps_may_be_left_out_before_a_setting(words, steps):
    args = train.parse_args(["--config", "x.yaml", *words])
    assert args.profile == steps and args.overrides == ["a.b=1"]


@pytest.mark.parametrize("number", ["-3", "2.5", "many"])
def test_a_number_of_profiled_steps_that_is_none_is_refused(number, capsys):
    with pytest.raises(SystemExit):
        train.parse_args(["--config", "x.yaml", f"--profile={number}"])
    assert f"expected a number of steps, 0 for none, got '{number}'" in capsys.readouterr().err


@pytest.mark.parametrize("num_steps", [1, 3])
def test_a_run_too_short_for_its_trace_says_so(num_steps, data_sets, tmp_path, capsys):
    few = (f"train.steps={num_steps}", "checkpoint.every_steps=9")
    assert run_in_process(tmp_path / "run", data_sets.latents, *few, "--profile=5") == 0
    assert f"no trace: --profile 5 needs 7 steps of an attempt, not {num_steps}" in capsys.readouterr().out
