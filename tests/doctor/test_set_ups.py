"""Doctor on a correct set-up and on broken ones: each is really broken, and the expected line reports it."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from latte_scale.config import load_config
from latte_scale.doctor import command as doctor
from latte_scale.doctor import saving
from latte_scale.doctor.stored import world_lines
from latte_scale.engine import shutdown
from latte_scale.model.build import build_model
from latte_scale.run.claim import Writer
from latte_scale.run.lease import this_process
from latte_scale.settings import to_mapping
from tests.conftest import ROOT
from tests.weight_files import save_run

CONFIG = str(ROOT / "configs" / "tiny_cpu.yaml")
LAUNCH = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "MASTER_PORT": "29511"}


@pytest.fixture
def ask(data_sets, tmp_path):
    """Call doctor in this process; its exit code and lines."""

    def run(*overrides: str, data: Path | None = None) -> tuple[int, list[dict]]:
        out = tmp_path / "doctor.json"
        settings = [f"data.url={data or data_sets.latents}", f"run.dir={tmp_path / 'run'}", *overrides]
        code = doctor.main(["--config", CONFIG, "--json", str(out), *settings])
        shutdown()
        return code, json.loads(out.read_text())["lines"]

    return run


def of(lines: list[dict], check: str) -> dict:
    """The one line of a check."""
    (line,) = [line for line in lines if line["check"] == check]
    return line


def faults(lines: list[dict]) -> list[str]:
    return [line["check"] for line in lines if line["level"] == "fault"]


def test_a_sound_set_up(ask, tmp_path, capsys):
    began_s = time.monotonic()
    code, lines = ask()
    assert code == 0 and not faults(lines)
    assert time.monotonic() - began_s < 60
    assert of(lines, "data")["found"].startswith("60 samples, 3 shards")
    assert "3 of 3 shards and 12 samples read" in of(lines, "shards")["found"]
    assert not (tmp_path / "run").exists()  # it leaves nothing behind
    screen = capsys.readouterr().out
    assert "0 faults" in screen and len(screen.splitlines()) <= 24


def test_a_setting_that_nothing_looks_at(ask):
    code, lines = ask("train.known_frames={share: 0.5, most: 9}")
    assert code == 0 and of(lines, "config")["level"] == "warning"
    assert of(lines, "config")["found"].endswith("of clips of 4 frames no more than 3 are given")
    assert of(lines, "config")["remedy"] == "set it to 3 or less"


def test_a_damaged_shard(ask, data_sets, tmp_path):
    damaged = tmp_path / "data"
    shutil.copytree(data_sets.latents, damaged)
    tar = damaged / "shard-000001.tar"
    data = bytearray(tar.read_bytes())
    data[data.index(b"latents.safetensors") + 512 + 5000] ^= 1  # in the first sample's latents
    tar.write_bytes(data)
    code, lines = ask(data=damaged)
    assert code == 1 and faults(lines) == ["shards"]
    line = of(lines, "shards")
    assert "shard-000001.tar" in line["found"] and "crc32c" in line["found"] and "latte-data verify" in line["remedy"]


def test_an_index_of_another_shard(ask, data_sets, tmp_path):
    swapped = tmp_path / "data"
    shutil.copytree(data_sets.latents, swapped)
    shutil.copyfile(swapped / "shard-000000.index.safetensors", swapped / "shard-000002.index.safetensors")
    code, lines = ask(data=swapped)
    assert code == 1 and "index_sha256" in of(lines, "shards")["found"]


def test_data_that_does_not_fit(ask):
    code, lines = ask("model.caption_channels=32")
    assert code == 1 and "caption_channels" in of(lines, "fit")["found"]


def test_weights_to_begin_from(ask, tmp_path):
    """By names and shapes; once the run has a checkpoint nothing reads them any more."""
    tiny = load_config(CONFIG, [f"data.url={tmp_path}"])
    for name, model in (("same", tiny.model), ("deeper", replace(tiny.model, num_layers=tiny.model.num_layers + 1))):
        section = {**to_mapping(tiny), "model": to_mapping(model)}
        save_run(tmp_path / name, section, build_model(model).state_dict())
    code, lines = ask(f"model.init={tmp_path / 'same'}#raw", "diffusion.objective=flow")
    (step,) = (tmp_path / "same" / "checkpoints").iterdir()
    assert code == 0 and of(lines, "init")["found"] == f"{step}#model: diffusion.objective was 'v', is 'flow'"
    code, lines = ask(f"model.init={tmp_path / 'nowhere'}")
    assert code == 1 and faults(lines) == ["init"] and of(lines, "init")["remedy"] == "no such folder"
    code, lines = ask(f"model.init={tmp_path / 'deeper'}")
    assert code == 1 and faults(lines) == ["init"] and "tensors do not fit" in of(lines, "init")["found"]
    code, lines = ask(f"model.init={tmp_path / 'deeper'}", f"run.dir={tmp_path / 'same'}")
    assert code == 0 and "goes on from its own checkpoint" in of(lines, "init")["found"]


def test_a_folder_that_cannot_be_written(ask, tmp_path):
    (tmp_path / "taken").write_text("a file where a folder should be made")
    code, lines = ask(f"checkpoint.dir={tmp_path / 'taken' / 'checkpoints'}")
    assert code == 1 and faults(lines) == ["writing"]
    assert "checkpoint.dir" in of(lines, "writing")["remedy"]
    code, lines = ask(f"run.dir={tmp_path / 'taken'}", f"checkpoint.dir={tmp_path / 'checkpoints'}")
    assert code == 1 and faults(lines) == ["writing"]
    assert f"{tmp_path / 'taken'}: " in of(lines, "writing")["found"]
    assert of(lines, "writing")["remedy"].endswith("or set another run.dir")


def test_a_link_to_nothing_in_the_way(ask, tmp_path):
    (tmp_path / "scratch").symlink_to(tmp_path / "gone")
    code, lines = ask(f"checkpoint.dir={tmp_path / 'scratch' / 'checkpoints'}")
    assert code == 1 and faults(lines) == ["writing"]
    assert str(tmp_path / "scratch") in of(lines, "writing")["found"]


def test_machines_that_write_into_one_new_folder_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(saving, "PROBE_BYTES", 1024)
    with ThreadPoolExecutor(8) as machines:  # none may see a folder come and go under another's write
        list(machines.map(saving.folder_write, [tmp_path / "run" / "checkpoints"] * 400))
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(os.geteuid() != 0, reason="a small disk of its own is a tmpfs, which root mounts")
@pytest.mark.parametrize(
    ("holder", "level"),
    [
        ({}, "fault"),  # this process itself
        ({"pid": 2**22 + 1}, None),  # no such process on this machine: taken over at once
        ({"pid": 2**22 + 1, "machine": "another"}, "warning"),  # a container that took this host's name, and may live
        ({"host": "elsewhere"}, "warning"),
    ],
    ids=["alive", "dead", "namesake", "other machine"],
)
def test_who_holds_the_run_folder(tmp_path, monkeypatch, holder, level):
    """As training judges it (run/lease.py): the name of a host is not enough to know a machine by."""
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    (tmp_path / "lease.json").write_text(json.dumps(asdict(this_process()) | holder))
    assert [line.level for line in saving.holder_lines(tmp_path)] == ([] if level is None else [level])


@pytest.mark.parametrize(
    ("run", "holder", "level"),
    [
        ("other", {}, "fault"),
        ("run", {}, None),  # of this run: holder_lines judges it
        ("other", {"pid": 2**22 + 1}, None),
        ("other", {"machine": "another"}, "warning"),
    ],
    ids=["alive", "this run", "dead", "other machine"],
)
def test_who_saves_to_the_place_of_the_checkpoints(tmp_path, run, holder, level):
    config = load_config(CONFIG, [f"run.dir={tmp_path}/run", f"checkpoint.dir={tmp_path}/place"])
    attempt = replace(this_process(), **holder)
    record = asdict(Writer(f"{tmp_path}/{run}", "0123456789ab", attempt))
    config.checkpoint_store.write("writer.json", json.dumps(record).encode())
    assert [line.level for line in saving.writer_lines(config)] == ([] if level is None else [level])


def test_a_disk_that_is_too_small(ask, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", disk], check=False).returncode:
        pytest.skip("no mounts are allowed here")
    try:
        code, lines = ask(f"checkpoint.dir={disk}")
    finally:
        subprocess.run(["umount", disk], check=True)
    assert code == 1
    assert "1.0 MiB free" in of(lines, "room")["found"] and "needed" in of(lines, "room")["found"]
    assert "disk is full" in of(lines, "writing")["found"] or "No space left" in of(lines, "writing")["found"]


def test_a_loopback_master_address(ask, monkeypatch):
    for name, value in {**LAUNCH, "MASTER_ADDR": "127.0.0.1"}.items():
        monkeypatch.setenv(name, value)
    code, lines = ask("engine.kind=fsdp2")
    line = of(lines, "launch")
    assert code == 1 and line["level"] == "fault"
    assert "is the loopback address" in line["found"] and "set MASTER_ADDR" in line["remedy"]
    assert of(lines, "data")["level"] == "ok"  # the rest is looked at all the same


def test_a_rank_that_does_not_come(ask, monkeypatch):
    for name, value in {**LAUNCH, "MASTER_ADDR": "127.0.0.1", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("LATTE_ROLL_CALL_S", "1")
    code, lines = ask("engine.kind=fsdp2")
    assert code == 1 and "missing are ranks [1]" in " ".join(of(lines, "launch").values())


def test_a_store_that_hangs_is_one_line(ask, tmp_path, monkeypatch):
    """A pipe that nobody writes: opening it never returns, as on a mount whose server is gone."""
    monkeypatch.setattr(doctor, "ALONE_S", 5.0)  # enough for all others, also on a busy machine
    hanging = tmp_path / "data"
    hanging.mkdir()
    os.mkfifo(hanging / "manifest.json")
    code, lines = ask(data=hanging)
    assert code == 1 and re.fullmatch(r"no answer within \d+ s", of(lines, "data")["found"])
    assert faults(lines) == ["data"] and of(lines, "slow rank")["level"] == "ok"
    descriptor = os.open(hanging / "manifest.json", os.O_RDWR | os.O_NONBLOCK)  # let the thread go
    time.sleep(0.05)
    os.close(descriptor)


def test_an_interface_that_is_not_there(ask, monkeypatch):
    """gloo itself refuses it: that is a line, too, and the variable is named."""
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "nowhere0")
    code, lines = ask()
    assert code == 1 and faults(lines) == ["launch", "variables"]
    assert "GLOO_SOCKET_IFNAME=nowhere0" in of(lines, "variables")["found"]


READY = """
import pathlib, sys, time
from latte_scale.doctor.command import command
ready, go = map(pathlib.Path, sys.argv[1:3])
ready.touch()
while not go.exists():
    time.sleep(0.01)
command(sys.argv[3:])
"""


@pytest.mark.skipif(
    not os.environ.get("LATTE_FAULT_TESTS"), reason="compares two ranks' speed: on a quiet machine only"
)
def test_a_slow_rank_is_named(data_sets, tmp_path):
    """Rank 1 is stopped for 40 ms of every 50, as a throttled device or a starved core would be."""
    out, go = tmp_path / "doctor.json", tmp_path / "go"
    arguments = ["--config", CONFIG, "--json", str(out), f"data.url={data_sets.latents}", f"run.dir={tmp_path / 'run'}"]
    environ = {**os.environ, **LAUNCH, "MASTER_ADDR": "127.0.0.1", "LOCAL_WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    environ["MASTER_PORT"] = str(20000 + os.getpid() % 10000)
    command = [sys.executable, "-c", READY]
    ranks = [
        subprocess.Popen(
            [*command, str(tmp_path / f"ready{rank}"), str(go), *arguments, "engine.kind=fsdp2"],
            env={**environ, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=(tmp_path / f"output{rank}").open("w"),
            stderr=subprocess.STDOUT,
        )
        for rank in (0, 1)
    ]
    try:
        until_s = time.monotonic() + 60
        while len(list(tmp_path.glob("ready*"))) < 2:  # imports are not what should be slow
            assert time.monotonic() < until_s
            time.sleep(0.05)
        go.touch()
        until_s = time.monotonic() + 60
        while ranks[1].poll() is None and time.monotonic() < until_s:
            ranks[1].send_signal(signal.SIGSTOP)
            time.sleep(0.04)
            ranks[1].send_signal(signal.SIGCONT)
            time.sleep(0.01)
        codes = [rank.wait(timeout=30) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    output = (tmp_path / "output0").read_text()
    record = json.loads(out.read_text())
    line = of(record["lines"], "slow rank")
    assert line["level"] != "ok" and line["found"].startswith("rank 1 ("), output  # how much, other work decides
    assert codes == [record["code"]] * 2, output
    assert {each["check"] for each in record["lines"]} >= {"all-reduce", "clocks", "same", "shared"}


@pytest.mark.parametrize(
    ("setting", "size", "num_hosts", "level"),
    [
        ("engine.replicate=2", 6, 1, "ok"),
        ("engine.replicate=4", 6, 1, "fault"),
        ("engine.replicate=4", 1, 1, "ok"),  # alone, before the launch
        ("engine.replicate=node", 6, 4, "fault"),
        ("engine.sequence_parallel=4", 6, 1, "fault"),
    ],
)
def test_ranks_that_cannot_be_cut_into_copies_or_groups(setting, size, num_hosts, level):
    config = load_config(CONFIG, ["data.url=none", "engine.kind=fsdp2", setting])
    (line,) = world_lines(config, size, num_hosts)
    assert line.level == level
    assert level == "ok" or setting in line.found
