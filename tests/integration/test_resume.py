"""Kill, signal, rerun from the command line: the run equals an uninterrupted one, or says why it cannot continue."""

import os
import random
import shutil
import signal
import subprocess
import time

import pytest
import torch

from latte_scale import checkpoint, ckpt
from latte_scale import train as train_module
from latte_scale.quickstart import kill_all
from latte_scale.run.lease import Lease, this_process
from latte_scale.run.metrics import MetricsFile, read_metrics
from tests.conftest import ROOT, Run, run_in_process, train_command

TREES = ("model", "ema/0.99", "optim/exp_avg", "optim/exp_avg_sq")


@pytest.fixture(scope="module")
def unbroken(data_sets, tmp_path_factory):
    """The run that nothing interrupts."""
    folder = tmp_path_factory.mktemp("unbroken")
    assert run_in_process(folder, data_sets.latents) == 0
    return Run(0, "", folder)


def final_state(run):
    newest = checkpoint.list_steps(run.folder / "checkpoints")[-1]
    return {tree: checkpoint.load_full(newest, tree) for tree in TREES}


def assert_bitwise_equal(run, other):
    assert run.losses == other.losses
    assert run.digests == other.digests
    mine, theirs = final_state(run), final_state(other)
    for tree, tensors in theirs.items():
        for name, tensor in tensors.items():
            assert torch.equal(mine[tree][name], tensor), (tree, name)


def kill_at(step, folder, command):
    """Start the command and SIGKILL it with all that descends from it once `step` is logged."""
    environ = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=environ, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        records = read_metrics(folder / "metrics.jsonl")
        if records and records[-1]["step"] >= step:
            break
        time.sleep(0.005)
    kill_all(process)


def test_kill_at_a_random_step_and_rerun_is_bitwise_the_unbroken_run(train, data_sets, tmp_path):
    """Under a real torchrun; one rank, other engines and other moments are in tests/faults."""
    options, ranks = ("engine.kind=fsdp2", "checkpoint.every_steps=10"), 2
    step = random.Random().randrange(25, 55)  # past the first checkpoints
    folder = tmp_path / "killed"
    config, endless = ROOT / "configs" / "tiny_cpu.yaml", (*options, "train.steps=100000")
    kill_at(step, folder, train_command(config, folder, data_sets.latents, endless, ranks, "torchrun"))
    assert not (folder / "exit.json").exists(), "the run ended before it was killed"
    steps = f"train.steps={max(80, read_metrics(folder / 'metrics.jsonl')[-1]['step'] + 10)}"
    whole = train("whole", *options, steps, ranks=ranks)
    resumed = train("killed", *options, steps, ranks=ranks)
    assert resumed.code == 0, resumed.output
    assert "resumed at step" in resumed.output, f"killed at step {step}: {resumed.output}"
    assert_bitwise_equal(resumed, whole)
    rewound = {record["step"]: record["loss"] for record in read_metrics(folder / "logs" / "rewound.jsonl")}
    assert all(resumed.losses[step] == loss for step, loss in rewound.items())
    (restart,) = read_metrics(folder / "logs" / "restarts.jsonl")
    assert set(restart["replayed_steps"]) == set(rewound)


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGINT], ids=["SIGUSR1", "ctrl-c"])
def test_a_signal_saves_once_and_asks_for_a_requeue(train, data_sets, tmp_path, unbroken, number):
    folder, endless = tmp_path / "run", ("checkpoint.every_steps=1000000", "train.steps=100000")
    command = train_command(ROOT / "configs" / "tiny_cpu.yaml", folder, data_sets.latents, endless, 1, "torchrun")
    process = subprocess.Popen(
        command,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's & would have it ignored
    )
    while not read_metrics(folder / "metrics.jsonl"):
        time.sleep(0.002)
        assert process.poll() is None
    process.send_signal(number)
    assert process.wait(timeout=120) == 75
    (saved,) = (folder / "checkpoints").iterdir()
    whole, steps = unbroken, len(unbroken.metrics)
    if int(saved.name[5:]) >= steps:  # the signal came late
        steps = int(saved.name[5:]) + 2
        assert run_in_process(tmp_path / "whole", data_sets.latents, f"train.steps={steps}") == 0
        whole = Run(0, "", tmp_path / "whole")
    resumed = train("run", f"train.steps={steps}")
    assert resumed.code == 0
    assert f"resumed at step {int(saved.name[5:])}" in resumed.output
    assert_bitwise_equal(resumed, whole)


def test_ranks_whose_launcher_was_killed_stop_and_a_second_attempt_waits_for_nobody(train, data_sets, tmp_path):
    """SIGKILL to torchrun alone: its ranks notice, stop without a save, and the rerun is not disturbed by them."""
    folder, options = tmp_path / "run", ("engine.kind=fsdp2", "checkpoint.every_steps=4", "train.steps=2000")
    config = ROOT / "configs" / "tiny_cpu.yaml"
    command = train_command(config, folder, data_sets.latents, options, 2, "torchrun")
    process = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL)
    while len(read_metrics(folder / "metrics.jsonl")) < 6:
        time.sleep(0.01)
        assert process.poll() is None
    second = train("run", *options, ranks=2)  # a second attempt beside a living one
    assert "which is alive; wait for it" in second.output and "exit 78" in second.output
    process.kill()
    process.wait()
    deadline = time.monotonic() + 120
    while (folder / "lease.json").exists() and time.monotonic() < deadline:  # given back after exit.json is written
        time.sleep(0.05)
    assert not (folder / "lease.json").exists()
    stopped = Run(0, "", folder)
    assert stopped.exit["code"] == 78 and "is gone" in stopped.exit["reason"]
    last = len(stopped.metrics)
    assert train("run", "engine.kind=fsdp2", f"train.steps={last}", ranks=2).code == 0


def test_a_second_run_in_the_same_place_for_checkpoints_is_refused_until_the_first_is_dead(train, data_sets, tmp_path):
    """Each would remove the other's checkpoints. Once the first was killed, its work may go on in another folder."""
    place = ("checkpoint.every_steps=5", f"checkpoint.dir={tmp_path / 'place'}")
    config, folder = ROOT / "configs" / "tiny_cpu.yaml", tmp_path / "first"
    command = train_command(config, folder, data_sets.latents, (*place, "train.steps=100000"), 1, "torchrun")
    first = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL)
    while len(read_metrics(folder / "metrics.jsonl")) < 12:
        time.sleep(0.01)
        assert first.poll() is None
    second = train("second", *place, "checkpoint.keep_last=1")
    assert second.code == 78 and not second.metrics
    assert (
        f"the run in {folder} (process {first.pid} on " in second.output and "is alive; choose another" in second.output
    )
    steps = len(read_metrics(folder / "metrics.jsonl"))
    while len(read_metrics(folder / "metrics.jsonl")) < steps + 12:  # past another save
        time.sleep(0.01)
        assert first.poll() is None, "the first run was disturbed"
    kill_all(first)
    saved = checkpoint.list_steps(tmp_path / "place")
    newest = int(saved[-1].url[-8:])
    second = train("second", *place, f"train.steps={newest + 5}")
    assert second.code == 0 and f"resumed at step {newest}" in second.output
    assert sorted(path.name[:5] for path in (tmp_path / "place").iterdir()) == ["step-"] * 3


def test_a_broken_checkpoint_is_named_set_aside_and_the_older_one_used(data_sets, tmp_path, unbroken):
    folder = tmp_path / "run"
    shutil.copytree(unbroken.folder, folder)
    newest = folder / "checkpoints" / "step-00000020"
    victim = newest / "model.rank-00000.safetensors"
    data = bytearray(victim.read_bytes())
    data[len(data) // 2] ^= 1
    victim.write_bytes(data)
    assert run_in_process(folder, data_sets.latents) == 0
    (restart,) = read_metrics(folder / "logs" / "restarts.jsonl")
    assert restart["step"] == 10
    assert "model.rank-00000.safetensors is damaged" in restart["problems"][0]
    assert_bitwise_equal(Run(0, "", folder), unbroken)


def test_never_a_silent_start_from_zero(data_sets, tmp_path, unbroken, capsys):
    folder = tmp_path / "run"
    shutil.copytree(unbroken.folder, folder)
    for path in (folder / "checkpoints").iterdir():
        (path / "manifest.json").unlink()
    assert run_in_process(folder, data_sets.latents) == 78
    assert "none is sound" in capsys.readouterr().out


def test_a_new_place_for_checkpoints_does_not_start_from_zero(data_sets, tmp_path, unbroken, capsys):
    """checkpoint.dir is free to change, in both directions; a run whose new place is empty says where its steps are."""
    folder, place = tmp_path / "run", tmp_path / "place"
    shutil.copytree(unbroken.folder, folder)
    longer = ("train.steps=22", f"checkpoint.dir={place}")
    assert run_in_process(folder, data_sets.latents, *longer) == 78
    step = folder / "checkpoints" / "step-00000020"
    output = capsys.readouterr().out
    assert f"{place} holds no checkpoint, but this run has {step}" in output and "latte-scale ckpt convert" in output
    assert Run(0, "", folder).losses == unbroken.losses  # nothing was rewound
    assert ckpt.main(["convert", str(step), str(place), "--to", "latte"]) == 0
    assert run_in_process(folder, data_sets.latents, *longer) == 0
    shutil.rmtree(folder / "checkpoints")
    capsys.readouterr()
    assert run_in_process(folder, data_sets.latents, "train.steps=24") == 78
    assert f"but this run has {place / 'step-00000022'}" in capsys.readouterr().out


def test_a_relative_place_for_checkpoints_is_found_from_any_folder(data_sets, tmp_path, monkeypatch, capsys):
    folder, options = tmp_path / "run", ("train.steps=1", "checkpoint.dir=place")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    assert run_in_process(folder, data_sets.latents, *options) == 0
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert ckpt.main(["verify", str(folder)]) == 0
    assert run_in_process(folder, data_sets.latents, *options) == 78  # and not from step 0 again
    there = tmp_path / "place" / "step-00000001"
    assert f"elsewhere/place holds no checkpoint, but this run has {there}" in capsys.readouterr().out


def test_a_changed_key_is_refused_with_the_difference(data_sets, tmp_path, unbroken, capsys):
    folder = tmp_path / "run"
    shutil.copytree(unbroken.folder, folder)
    more = ("train.steps=22", "train.lr=2e-3")
    assert run_in_process(folder, data_sets.latents, *more) == 78
    output = capsys.readouterr().out
    assert "train.lr: was 0.001, now 0.002" in output and "--allow-change train.lr" in output
    assert run_in_process(folder, data_sets.latents, *more, "--allow-change", "train.lrr") == 78
    assert "got 'train.lrr'; is it train.lr?" in capsys.readouterr().out
    assert run_in_process(folder, data_sets.latents, *more, "--allow-change", "train.lr") == 0
    log = (folder / "logs" / "rank-00000.log").read_text()
    assert "WARNING config key train.lr changed from 0.001 to 0.002 (--allow-change)" in log


def test_other_data_is_refused(data_sets, tmp_path, unbroken, capsys):
    """A key that changes the plan is named together with the plan: one refusal, one command that goes on."""
    folder = tmp_path / "run"
    shutil.copytree(unbroken.folder, folder)
    changed = ("train.steps=22", "data.holdout=0.2")
    assert run_in_process(folder, data_sets.latents, *changed) == 78
    output = " ".join(capsys.readouterr().out.split())
    assert "data.holdout: was 0.0, now 0.2" in output and "data: which samples come, in which order: was plan" in output
    assert "pass --allow-change data.holdout --allow-change data" in output
    changed += ("--allow-change", "data.holdout")
    assert run_in_process(folder, data_sets.latents, *changed) == 78
    assert "was trained on other data" in capsys.readouterr().out
    assert run_in_process(folder, data_sets.latents, *changed, "--allow-change", "data") == 0


def test_an_attempt_that_froze_while_it_started_takes_nothing_from_the_one_that_replaced_it(
    data_sets, tmp_path, unbroken, monkeypatch, capsys
):
    """Its node hangs as it builds the model; the job is restarted elsewhere and trains; then the node wakes."""
    folder, build = tmp_path / "run", train_module.build_model
    shutil.copytree(unbroken.folder, folder)
    restarted = this_process({"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "1"})
    monkeypatch.setenv("SLURM_JOB_ID", "7")

    def freeze(*arguments):
        Lease(folder, restarted)
        for step in range(20, 24):
            MetricsFile(folder / "metrics.jsonl").append({"step": step, "loss": 0.5})
        return build(*arguments)

    monkeypatch.setattr(train_module, "build_model", freeze)
    assert run_in_process(folder, data_sets.latents, "train.steps=30") == 78
    assert "taken over by process" in capsys.readouterr().out
    assert [record["step"] for record in Run(0, "", folder).metrics] == list(range(24))
    assert "steps: 20" in (folder / "config.yaml").read_text()


def test_a_finished_run_is_done_at_once(data_sets, tmp_path, unbroken):
    folder = tmp_path / "run"
    shutil.copytree(unbroken.folder, folder)
    assert run_in_process(folder, data_sets.latents) == 0
    assert Run(0, "", folder).losses == unbroken.losses


def test_a_run_that_has_more_steps_than_are_asked_for_is_done(data_sets, tmp_path, unbroken, capsys):
    """train.steps may be lowered; "requeue me" would send the job round for ever."""
    folder = tmp_path / "run"
    shutil.copytree(unbroken.folder, folder)
    assert run_in_process(folder, data_sets.latents, "train.steps=12") == 0
    run = Run(0, "", folder)
    assert run.exit["code"] == 0 and run.losses == unbroken.losses
    assert "steps 20 to 20 are 0.00 epochs" in capsys.readouterr().out


def test_a_stop_that_came_as_the_run_finished_does_not_stop_the_longer_one(data_sets, tmp_path, unbroken):
    folder = tmp_path / "run"
    shutil.copytree(unbroken.folder, folder)
    (folder / "stop").touch()
    assert run_in_process(folder, data_sets.latents) == 0
    assert run_in_process(folder, data_sets.latents, "train.steps=25") == 0


def test_what_fails_behind_the_last_save_is_the_code_in_exit_json_too(data_sets, tmp_path, unbroken):
    folder = tmp_path / "run"
    shutil.copytree(unbroken.folder, folder)
    (folder / "stop").mkdir()  # cannot be removed as a file
    with pytest.raises(OSError, match="stop"):
        run_in_process(folder, data_sets.latents, "train.steps=25")
    assert Run(0, "", folder).exit["code"] == 1


def test_a_resumed_run_does_not_need_what_it_was_started_from(data_sets, tmp_path, unbroken):
    """Stages follow each other by model.init; the earlier one may be cleared away while the next one goes on."""
    first, second = tmp_path / "first", tmp_path / "second"
    shutil.copytree(unbroken.folder, first)
    few = (f"model.init={first}", "train.steps=2", "checkpoint.every_steps=2")
    assert run_in_process(second, data_sets.latents, *few) == 0
    shutil.rmtree(first)
    assert run_in_process(second, data_sets.latents, *few, "train.steps=3") == 0
    assert [record["step"] for record in Run(0, "", second).metrics][-1] == 2


def test_an_average_that_warms_up_goes_on_where_it_was(data_sets, tmp_path):
    """Its weight follows from the number of updates, which only a resume sets."""
    warm = ("ema.warmup=true", "train.warmup_steps=0", "checkpoint.every_steps=3")
    for name, steps in (("whole", [6]), ("broken", [3, 6])):
        for last in steps:
            assert run_in_process(tmp_path / name, data_sets.latents, *warm, f"train.steps={last}") == 0
    assert_bitwise_equal(Run(0, "", tmp_path / "broken"), Run(0, "", tmp_path / "whole"))


def test_clipping_begins_at_its_update(data_sets, tmp_path):
    few = ("train.steps=5", "train.warmup_steps=0", "checkpoint.every_steps=5", "log.every_steps=1")
    found = {}
    for name, *how in (("never", "clip_norm=null"), ("late", "clip_norm=1e-7", "clip_from_update=3")):
        overrides = (f"optim.{each}" for each in how)
        assert run_in_process(tmp_path / name, data_sets.latents, *few, *overrides) == 0
        found[name] = Run(0, "", tmp_path / name).losses
    assert found["late"][:4] == found["never"][:4]  # the loss of step 3 is from before its update
    assert found["late"][4] != found["never"][4]
