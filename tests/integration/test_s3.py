"""The whole path with s3:// instead of a folder: shard, encode, verify, index, train; and a failing service."""

import json
import re
import subprocess
import sys
import time

import pytest
import torch

from data_tools.cli import main as latte_data
from latte_scale import ckpt
from latte_scale.bench import main as bench
from latte_scale.checkpoint import list_steps, load_full
from latte_scale.checkpoint.content import Content
from latte_scale.checkpoint.dcp import write_dcp
from latte_scale.data.schema import MANIFEST
from latte_scale.doctor import command as doctor
from latte_scale.engine import shutdown
from latte_scale.run.metrics import read_metrics
from latte_scale.sample import main as sampling
from latte_scale.store import open_store
from tests import processes
from tests.conftest import ROOT, Run, run_in_process, train_command
from tests.integration.test_resume import kill_at
from tests.store.service import Corner

ENCODE = str(ROOT / "configs" / "encode_tiny.yaml")


@pytest.fixture
def latents(s3, data_sets) -> str:
    """The URL of a copy of the session's latents."""
    local, remote = open_store(data_sets.latents), open_store(f"{s3.url}/latents")
    for name in local.list():
        remote.write(name, local.read(name))
    s3.proxy.reset()
    return remote.url


def contents(url) -> dict[str, bytes]:
    store = open_store(url)
    return {name: store.read(name) for name in store.list()}


def test_clips_become_latents_in_the_store_byte_for_byte_as_in_a_folder(s3, data_sets, capsys):
    shards, latents = f"{s3.url}/shards", f"{s3.url}/latents"
    shard = ["shard", "--input", str(data_sets.clips), "--output", shards, "--samples-per-shard", "20"]
    encode = ["encode", "--input", shards, "--output", latents, "--config", ENCODE]
    assert latte_data(shard) == 0
    assert contents(shards) == contents(data_sets.shards)
    assert latte_data(encode) == 0
    made = contents(latents)
    expected = contents(data_sets.latents)
    for name in expected:
        if name.endswith(".tar"):
            assert made[name] == expected[name], name
    for url in (shards, latents):
        assert latte_data(["verify", url]) == 0
    s3.proxy.reset()
    assert latte_data(shard) == 0 and latte_data(encode) == 0  # nothing left to do
    assert not [seen.line for seen in s3.proxy.seen if seen.line.startswith("PUT") and ".tar" in seen.line]
    assert contents(latents) == made
    assert "0 faults" in capsys.readouterr().out


def test_an_interrupted_encode_goes_on_where_it_stopped(s3, data_sets):
    latents = f"{s3.url}/latents"
    encode = ["encode", "--input", str(data_sets.shards), "--output", latents, "--config", ENCODE]
    store, tars = open_store(latents), [f"shard-{number:06d}.tar" for number in range(3)]
    for denied in (tars[1], MANIFEST):  # in the middle, wherever this worker began, and at the very end
        s3.fail("answer", match=rf"PUT .*{denied}", status=403, code="AccessDenied")
        assert latte_data(encode) != 0
        assert not store.exists(denied) and not store.exists(MANIFEST)
        made = [name for name in tars if store.exists(name)]
        s3.proxy.reset()
    assert made == tars
    assert latte_data(encode) == 0
    assert not [seen.line for seen in s3.proxy.seen if seen.line.startswith("PUT") and ".tar" in seen.line]
    assert latte_data(["verify", latents]) == 0


def test_verify_finds_a_flipped_bit_in_the_store(s3, latents, capsys):
    store = open_store(latents)
    raw = bytearray(store.read("shard-000001.tar"))
    raw[len(raw) // 2] ^= 1
    store.write("shard-000001.tar", bytes(raw))
    assert latte_data(["verify", latents]) == 1
    assert f"{latents}/shard-000001.tar: sha256: expected" in capsys.readouterr().err


def test_indexing_tars_that_others_put_there(s3, data_sets):
    remote = open_store(f"{s3.url}/foreign")
    for name, data in contents(data_sets.shards).items():
        if name.endswith(".tar"):
            remote.write(name, data)
    assert latte_data(["index", remote.url]) == 0
    assert latte_data(["verify", remote.url]) == 0


def test_training_from_the_store_is_training_from_a_folder(s3, data_sets, latents, train, tmp_path):
    assert run_in_process(tmp_path / "folder", data_sets.latents) == 0
    expected = Run(0, "", tmp_path / "folder")
    for kind in ("answer", "reset", "cut", "short"):
        s3.fail(kind, match="shard-", at=3000, times=3)
    run = train("s3", "data.num_workers=2", data=latents)
    assert run.code == 0, run.output
    assert run.digests == expected.digests and run.losses == expected.losses
    assert sum(record["store_retries"] for record in run.metrics) >= 4  # of 12 faults; indices are read before
    assert run.metrics[0]["store_requests"] > 0 and not any("cache_hit_share" in record for record in run.metrics)
    assert not any("store_requests" in record for record in expected.metrics)
    assert not any(fault.times for fault in s3.proxy.faults), "not every fault was met"


def test_the_loader_of_a_store_is_measured_with_what_it_asked_for(s3, latents, tmp_path, capsys):
    """60 samples an epoch, 12 a step: the second epoch comes out of the cache."""
    config, out = str(ROOT / "configs" / "tiny_cpu.yaml"), tmp_path / "loader.json"
    options = [f"data.url={latents}", f"store.cache_dir={tmp_path / 'cache'}", "data.num_workers=1"]
    assert bench(["loader", "--config", config, "--steps", "9", "--out", str(out), *options]) == 0
    found = json.loads(out.read_text())["fetched"]
    assert found["num_requests"] > 0 and found["bytes_received"] > 0
    assert 0 < found["num_cache_hits"] / (found["num_cache_hits"] + found["num_cache_misses"]) < 1
    assert "| asked of the object store | " in capsys.readouterr().out


def expire(s3: Corner) -> None:
    s3.fail("answer", match="shard-0000.*tar ", status=400, code="ExpiredToken", times=9999)


def lose_a_shard(s3: Corner) -> None:
    open_store(f"{s3.url}/latents").delete("shard-000001.tar")


def test_who_may_read_a_bucket_and_not_list_it_can_verify_and_convert(s3, data_sets, tmp_path, capsys):
    """Such a key is told of an object that is not there that it may not see it."""
    local, remote = open_store(data_sets.shards), open_store(f"{s3.url}/shards")
    for name in local.list():
        remote.write(name, local.read(name))
    for match in (r"GET \S*list-type=2", r"HEAD .*null-text"):
        s3.fail("answer", match=match, status=403, code="AccessDenied", times=99)
    assert latte_data(["verify", remote.url]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("0 faults in ") and "the manifest does not name are not looked for: " in err
    assert latte_data(["convert", "--input", remote.url, "--output", str(tmp_path / "mds"), "--to", "mds"]) == 0


def test_a_bucket_that_is_not_there_is_not_taken_for_an_unfinished_data_set(s3, capsys):
    assert latte_data(["verify", "s3://latte-scale-no-such-bucket/shards"]) == 2
    assert "no such bucket; check its name and the endpoint" in capsys.readouterr().err


def test_odd_names_in_a_bucket_are_passed_over_and_no_clip_is_asked_for_its_size(s3, data_sets, capsys):
    """ "clips//a.mp4" is an object like any other, and lies below "clips" under no name of a file."""
    clips, names = open_store(f"{s3.url}/clips"), ("000000.mp4", "000001.mp4", "captions.jsonl")
    for name in names:
        clips.write(name, (data_sets.clips / name).read_bytes())
    for place in ("", "/../"):
        key = f"{clips.prefix}/{place}/000000.mp4"
        clips.connection.client.put_object(Bucket=clips.bucket, Key=key, Body=(data_sets.clips / names[0]).read_bytes())
    s3.proxy.reset()
    assert latte_data(["shard", "--input", clips.url, "--output", f"{s3.url}/shards"]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("done 2, skipped 2,") and "skipped /000000.mp4: its name begins with" in err
    assert not [seen for seen in s3.proxy.seen if re.match("HEAD .*/clips/.*mp4", seen.line)]
    clips.connection.client.put_object(Bucket=clips.bucket, Key=f"{s3.url.rpartition('/')[2]}/shards//x.tar", Body=b"x")
    assert latte_data(["index", f"{s3.url}/shards"]) == 0
    assert "/x.tar: its name begins with" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("break_it", "reason"),
    [(expire, "credentials have expired"), (lose_a_shard, r"shard-000001.tar: .*no such object")],
)
def test_all_ranks_end_when_one_worker_cannot_read(s3, latents, tmp_path, break_it, reason):
    break_it(s3)
    config, folder = ROOT / "configs" / "tiny_cpu.yaml", tmp_path / "run"
    options = ("engine.kind=fsdp2", "data.num_workers=1", "train.steps=200")
    command = train_command(config, folder, latents, options, 2, "torchrun")
    begun = time.monotonic()
    done = processes.run(command, timeout_s=150)
    assert done.returncode != 0 and time.monotonic() - begun < 120
    output = done.stdout + done.stderr + "".join(path.read_text() for path in folder.rglob("*.json"))
    assert re.search(reason, output), output[-3000:]


def test_the_config_reaches_the_store_and_no_credentials_are_written_anywhere(
    s3, latents, train, tmp_path, monkeypatch
):
    monkeypatch.delenv("AWS_ENDPOINT_URL")
    cache = tmp_path / "cache"
    run = train("s3", "train.steps=4", f"store.endpoint_url={s3.proxy.url}", f"store.cache_dir={cache}", data=latents)
    assert run.code == 0, run.output
    assert any(path.is_file() and path.name != "total" for path in cache.rglob("*"))
    assert "testsecret" not in run.output
    for path in [*run.folder.rglob("*"), *cache.rglob("*")]:
        if path.is_file():
            assert b"testsecret" not in path.read_bytes(), path
    again = train("s3", "train.steps=6", f"store.endpoint_url={s3.proxy.url}", "store.num_connections=4", data=latents)
    assert again.code == 0 and "resumed at step 4" in again.output, again.output


def test_training_through_blocks_and_with_checkpoints_in_the_store(s3, data_sets, latents, tmp_path):
    """As README says it; checkpoints take no part in the cache, and sampling finds them where the run's config says."""
    cached = (f"store.cache_dir={tmp_path / 'cache'}", "store.block_bytes=1048576")
    saving = f"checkpoint.dir={s3.url}/checkpoints"
    for name, data, options in (("folder", data_sets.latents, ()), ("blocks", latents, (*cached, saving))):
        assert run_in_process(tmp_path / name, data, "train.steps=4", *options) == 0
    runs = [Run(0, "", tmp_path / name) for name in ("folder", "blocks")]
    assert runs[0].losses == runs[1].losses and runs[0].digests == runs[1].digests
    assert ckpt.main(["ls", str(runs[1].folder)]) == 0


@pytest.mark.parametrize(
    ("url", "message"), [(str(ROOT / "configs"), ""), ("s3://bucket/x", "pip install 'latte_scale[s3]'")]
)
def test_only_the_store_needs_boto3(url, message):
    hidden = "import sys; sys.modules['boto3'] = None; "
    code = f"{hidden}from latte_scale.store import open_store; open_store({url!r}).list('x')"
    done = subprocess.run([sys.executable, "-c", code], check=False, timeout=60, capture_output=True, text=True)
    assert message in done.stderr and bool(done.returncode) == bool(message)


# -------------------------------------------------------------------------------------------- checkpoints in the store


def test_a_run_with_its_checkpoints_in_the_store_is_killed_and_goes_on(s3, data_sets, tmp_path, capsys):
    """Train, SIGKILL, the same command again; then the commands that read a checkpoint."""
    steps = ("train.steps=60", "checkpoint.every_steps=10", "checkpoint.keep_last=2", "checkpoint.asynchronous=false")
    assert run_in_process(tmp_path / "whole", data_sets.latents, *steps) == 0
    folder, options = tmp_path / "run", (*steps, f"checkpoint.dir={s3.url}/checkpoints", "data.num_workers=0")
    command = train_command(ROOT / "configs" / "tiny_cpu.yaml", folder, data_sets.latents, options, 1, "torchrun")
    kill_at(25, folder, command)
    assert not (folder / "exit.json").exists() and not (folder / "checkpoints").exists()
    assert run_in_process(folder, data_sets.latents, *options) == 0
    (restart,) = read_metrics(folder / "logs" / "restarts.jsonl")
    assert restart["checkpoint"].startswith(f"{s3.url}/checkpoints/step-") and restart["step"] >= 20
    whole, resumed = Run(0, "", tmp_path / "whole"), Run(0, "", folder)
    assert resumed.losses == whole.losses and resumed.digests == whole.digests
    names = open_store(f"{s3.url}/checkpoints").list()
    assert {name.partition("/")[0] for name in names} == {"step-00000050", "step-00000060"} and len(names) == 2 * 5
    capsys.readouterr()
    for path in (f"{s3.url}/checkpoints", str(folder)):  # the bucket, and the run whose config names it
        assert ckpt.main(["verify", path]) == 0
        assert capsys.readouterr().out == "step-00000050  sound\nstep-00000060  sound\n"
    assert ckpt.main(["diff", str(tmp_path / "whole"), f"{s3.url}/checkpoints"]) == 1
    differing = [line.partition(":")[0] for line in capsys.readouterr().out.splitlines()]
    assert differing == ["config.checkpoint.dir", "config.run.dir"]  # and no tensor
    there = f"{s3.url}/checkpoints/step-00000060"
    assert run_in_process(tmp_path / "next", data_sets.latents, f"model.init={there}", "train.steps=1") == 0
    sample = ["--checkpoint", there, "--prompt", "a red circle", "--out", str(tmp_path / "samples"), "--steps", "2"]
    assert sampling(sample) == 0 and list((tmp_path / "samples").glob("*.mp4"))


def test_stopped_on_eight_ranks_it_goes_on_with_three(s3, data_sets, latents, train, tmp_path):
    """fsdp2 and then ZeRO-3, data and checkpoints in the bucket, beside one process that nobody stopped, on a disk."""
    steps = ("train.steps=12", "train.global_batch=24", "train.micro_batch=3", "checkpoint.every_steps=100")
    assert run_in_process(tmp_path / "whole", data_sets.latents, *steps) == 0
    folder, options = tmp_path / "run", (*steps, f"checkpoint.dir={s3.url}/checkpoints", "data.num_workers=0")
    config, fsdp2 = ROOT / "configs" / "tiny_cpu.yaml", (*options, "engine.kind=fsdp2")
    eight = processes.start(train_command(config, folder, latents, fsdp2, 8, "torchrun"))
    while (done := len(read_metrics(folder / "metrics.jsonl"))) < 4 and eight.poll() is None:
        s3.proxy.latency_s = 0.5 if done else 0.0  # of every step's reads: rank 0 looks for the file once a second
        time.sleep(0.02)
    (folder / "stop").touch()
    processes.finish([eight])
    s3.proxy.latency_s = 0.0
    stopped_at = len(Run(0, "", folder).metrics)
    assert Run(0, "", folder).exit["code"] == 75 and 4 <= stopped_at < 12, eight.output

    three = train("run", *options, "engine.kind=zero", "engine.zero_stage=3", ranks=3, data=latents)
    whole = Run(0, "", tmp_path / "whole")
    assert three.code == 0 and f"resumed at step {stopped_at} from s3://" in three.output, three.output
    assert three.digests == whole.digests
    assert three.losses == pytest.approx(whole.losses, rel=1e-6)
    mine, other = list_steps(f"{s3.url}/checkpoints")[-1], list_steps(tmp_path / "whole" / "checkpoints")[-1]
    for tree in ("model", "ema/0.99", "optim/exp_avg", "optim/exp_avg_sq"):
        ours, theirs = (torch.cat([t.flatten() for t in load_full(place, tree).values()]) for place in (mine, other))
        # Over all of a tree: a key's bias has no gradient but rounding, which AdamW makes steps of.
        assert (ours - theirs).norm() / theirs.norm() < 1e-5, tree
        print(f"{tree}: {(ours - theirs).norm() / theirs.norm():.1e}")


def test_a_checkpoint_goes_through_other_formats_into_the_store_and_back(s3, data_sets, tmp_path, capsys):
    """And a run goes on from there: its losses are those of the run that stayed on the disk."""
    run, there = tmp_path / "run", f"{s3.url}/moved"
    assert run_in_process(run, data_sets.latents, "train.steps=2", "checkpoint.every_steps=2") == 0
    assert ckpt.main(["convert", str(run), str(tmp_path / "dcp"), "--to", "dcp"]) == 0
    assert ckpt.main(["convert", str(tmp_path / "dcp"), there, "--to", "latte"]) == 0
    for to in ("dcp", "deepspeed"):
        assert ckpt.main(["convert", there, str(tmp_path / f"{to}-back"), "--to", to]) == 0
        assert ckpt.main(["diff", str(run), str(tmp_path / f"{to}-back")]) == 0
    capsys.readouterr()
    assert ckpt.main(["convert", f"{s3.url}/absent", str(tmp_path / "new"), "--to", "dcp"]) == 2
    assert "a folder of DeepSpeed or DCP is read from a disk" in capsys.readouterr().err
    steps, losses = ("train.steps=4", "checkpoint.every_steps=2"), []
    for folder, place in ((run, ()), (tmp_path / "next", (f"checkpoint.dir={there}",))):
        assert run_in_process(folder, data_sets.latents, *steps, *place) == 0
        losses.append([record["loss"] for record in read_metrics(folder / "metrics.jsonl") if record["step"] >= 2])
    assert losses[0] == losses[1] and len(losses[0]) == 2
    assert ckpt.main(["verify", there]) == 0
    assert "step-00000002  sound\nstep-00000004  sound\n" in capsys.readouterr().out


def test_a_conversion_into_the_store_does_not_grow_with_the_state(s3, tmp_path):
    """320 MB of state; the process takes less than half of that on top of what its imports need."""
    shapes = {f"block.{number}.weight": (1152, 4608) for number in range(15)}
    content = Content("made", 3, ("model",), shapes, {"updates": 3}, {}, "", lambda *_: torch.ones(1152, 4608))
    write_dcp(content, tmp_path / "dcp")
    code = (
        "import sys, resource, boto3; from latte_scale import ckpt; from latte_scale.checkpoint import dcp, deepspeed; "
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss; before = peak(); "
        "code = ckpt.main(sys.argv[1:]); print(code, (peak() - before) // 1024)"
    )
    words = ["convert", str(tmp_path / "dcp"), f"{s3.url}/large", "--to", "latte"]
    done = subprocess.run([sys.executable, "-c", code, *words], timeout=120, check=True, capture_output=True, text=True)
    returned, more_mib = map(int, done.stdout.split()[-2:])
    assert returned == 0 and more_mib < 150, done.stdout


def test_doctor_looks_at_data_and_checkpoints_in_the_store(s3, latents, tmp_path):
    """And says which of two places does not answer as it should."""
    out = tmp_path / "doctor.json"
    words = ["--config", str(ROOT / "configs" / "tiny_cpu.yaml"), "--json", str(out), f"run.dir={tmp_path / 'run'}"]
    words += [f"data.url={latents}", f"checkpoint.dir={s3.url}/checkpoints"]

    def ask() -> tuple[int, dict[str, dict]]:
        code = doctor.main(words)
        shutdown()
        return code, {line["check"]: line for line in json.loads(out.read_text())["lines"]}

    code, lines = ask()
    assert code == 0, lines
    assert lines["data"]["found"].startswith("60 samples, 3 shards of s3://")
    assert "3 of 3 shards and 12 samples read" in lines["shards"]["found"]
    assert lines["writing"]["level"] == "ok" and "s3://" in lines["writing"]["found"]
    assert not open_store(f"{s3.url}/checkpoints").list()  # it leaves nothing behind

    s3.fail("answer", match=r"(PUT|POST) .*checkpoints", status=403, code="AccessDenied", times=100)
    code, lines = ask()
    assert code == 1 and lines["writing"]["level"] == "fault", lines
    assert "access is denied" in lines["writing"]["found"] and "AWS_ACCESS_KEY_ID" in lines["writing"]["remedy"]
    assert lines["data"]["level"] == "ok"

    s3.proxy.reset()
    s3.fail("answer", match=r"GET \S*list-type=2\S*checkpoints", status=403, code="AccessDenied", times=100)
    code, lines = ask()  # training would look for checkpoints, and be refused
    assert code == 1 and lines["writing"]["level"] == "fault", lines


def test_a_bucket_that_is_down_as_a_run_starts_or_ends_asks_for_another_attempt(s3, data_sets, tmp_path):
    """Not 78, which ends a job for good: what is there is sound, and the same command goes on once the service does."""
    short = ("store.stall_budget_s=0.5", "store.first_answer_s=0.5", f"checkpoint.dir={s3.url}/checkpoints")
    folder, options = tmp_path / "run", (*short, "checkpoint.every_steps=2")
    assert run_in_process(folder, data_sets.latents, *options, "train.steps=2") == 0
    for match, reason in (("(GET|HEAD)", "gave up after"), ("PUT .*optim", "step-00000004 was not saved")):
        s3.fail("answer", match=match, times=9999)
        assert run_in_process(folder, data_sets.latents, *options, "train.steps=4") == 1
        ended = Run(0, "", folder).exit
        assert ended["code"] == 1 and reason in ended["reason"] and "503 SlowDown" in ended["reason"]
        s3.proxy.reset()
    expired = {"match": "PUT .*optim", "status": 400, "code": "ExpiredToken", "times": 9999}
    s3.fail("answer", **expired)
    assert run_in_process(folder, data_sets.latents, *options, "train.steps=4") == 1  # the next may have new ones
    assert "credentials have expired" in Run(0, "", folder).exit["reason"]
    s3.proxy.reset()
    assert run_in_process(folder, data_sets.latents, *options, "train.steps=4") == 0

    s3.fail("answer", match="(PUT|POST) .*checkpoints", status=403, code="AccessDenied", times=9999)
    assert (
        run_in_process(tmp_path / "new", data_sets.latents, *options, "train.steps=4") == 78
    )  # of a run's first start
    assert "access is denied" in Run(0, "", tmp_path / "new").exit["reason"]
