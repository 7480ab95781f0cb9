"""Several hosts encode from a bucket into a bucket: claims are conditional puts there, and the dead are replaced."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Collection
from pathlib import Path

import pytest

from data_tools.claims import FOLDER
from data_tools.cli import main as latte_data
from latte_scale.data.schema import MANIFEST
from latte_scale.store import MissingError, Store, open_store
from tests.conftest import ROOT
from tests.data_tools.kills import command, contents, make_source
from tests.store.service import Corner

NUM_CLIPS, PER_SHARD, NUM_HOSTS = 24, 2, 3
NUM_SHARDS = NUM_CLIPS // PER_SHARD


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`shards`, and `whole`: what one worker makes of them in a folder."""
    folder = tmp_path_factory.mktemp("encode")
    make_source(folder / "shards", NUM_CLIPS, PER_SHARD)
    assert latte_data(command(folder / "shards", folder / "whole", 1)[3:]) == 0
    return folder


@pytest.fixture
def latents(s3: Corner, folder: Path) -> Store:
    """Where the latents go; the clips are in the bucket, too."""
    remote = open_store(f"{s3.url}/shards")
    for name, data in contents(folder / "shards").items():
        remote.write(name, data)
    s3.proxy.reset()
    return open_store(f"{s3.url}/latents")


def start(s3: Corner, log: Path, host: str, stale_s: float) -> subprocess.Popen:
    options = command(f"{s3.url}/shards", f"{s3.url}/latents", 1)[4:]
    words = [sys.executable, "-m", "tests.data_tools.other_host", host, str(stale_s), *options]
    with log.open("wb") as file:
        return subprocess.Popen(words, cwd=ROOT, stdout=file, stderr=file)


def wait_claim(store: Store, hosts: Collection[str], timeout_s: float = 60.0) -> str:
    """One of these hosts, as soon as it holds a claim."""
    until_s = time.monotonic() + timeout_s
    while time.monotonic() < until_s:
        for name in store.list(f"{FOLDER}/shard-"):
            try:
                host = json.loads(store.read(name, fresh=True))["holder"]["host"]
            except MissingError:  # given back in this moment
                continue
            if host in hosts:
                return host
    raise TimeoutError(f"no claim in {timeout_s:.0f} s")


def num_done(logs: list[Path]) -> int:
    """Clips that these commands say they made."""
    return sum(int(re.search(r"^done (\d+),", log.read_text(), re.MULTILINE)[1]) for log in logs)


def tars_put(s3: Corner) -> Counter[str]:
    """How often each tar was sent."""
    found = [re.match(r"PUT \S*/latents/(shard-\d+\.tar)", seen.line) for seen in s3.proxy.seen]
    return Counter(match[1] for match in found if match)


def assert_whole(store: Store, folder: Path) -> None:
    """Every byte of every object as in the folder of one worker, no claim left, and sound for `latte-data verify`."""
    made = {name: store.read(name, fresh=True) for name in store.list()}
    assert made == contents(folder / "whole")
    assert latte_data(["verify", store.url]) == 0


def test_hosts_share_a_bucket_and_make_every_shard_once(s3, latents, folder, tmp_path):
    logs = [tmp_path / f"host{number}.log" for number in range(NUM_HOSTS)]
    hosts = [start(s3, log, log.stem, stale_s=60.0) for log in logs]  # nobody dies
    assert [host.wait(120) for host in hosts] == [0] * NUM_HOSTS, [log.read_text() for log in logs]
    assert_whole(latents, folder)
    assert num_done(logs) == sum(shard["count"] for shard in json.loads(latents.read(MANIFEST))["shards"])
    assert tars_put(s3) == {f"shard-{number:06d}.tar": 1 for number in range(NUM_SHARDS)}
    claims = [seen for seen in s3.proxy.seen if re.match(rf"PUT \S*/{FOLDER}/shard", seen.line)]
    assert [seen for seen in claims if seen.headers.get("if-none-match") == "*"], "claims are conditional puts"


def test_hosts_that_are_killed_are_replaced(s3, latents, folder, tmp_path):
    """Two of three, one after the other, each while it holds a claim: the third finds their claims silent."""
    logs = {f"host{number}": tmp_path / f"host{number}.log" for number in range(NUM_HOSTS)}
    hosts = {name: start(s3, log, name, stale_s=4.0) for name, log in logs.items()}
    for _ in range(2):
        victim = hosts.pop(wait_claim(latents, hosts))
        os.kill(victim.pid, signal.SIGKILL)
        victim.wait()
    ((name, last),) = hosts.items()
    assert last.wait(120) == 0, logs[name].read_text()
    assert_whole(latents, folder)
    put = tars_put(s3)
    assert len(put) == NUM_SHARDS and sum(put.values()) <= NUM_SHARDS + 2, put
    assert num_done([logs[name]]) > 0


def test_parts_of_shards_that_killed_workers_sent_are_taken_back(
    s3: Corner, folder: Path, latents: Store, capsys: pytest.CaptureFixture[str]
) -> None:
    """No listing of objects shows them, and the service bills them; what is nobody's shard stays."""
    client, root = latents.connection.client, f"{latents.prefix}/"
    for name in ("shard-000003.tar", "else.tar"):
        client.create_multipart_upload(Bucket=latents.bucket, Key=root + name)
    options = command(f"{s3.url}/shards", latents.url, 1)[3:]
    assert latte_data(options) == 0
    left = client.list_multipart_uploads(Bucket=latents.bucket, Prefix=root)["Uploads"]
    assert [each["Key"] for each in left] == [f"{root}else.tar"]
    assert_whole(latents, folder)
    s3.fail("answer", match=r"GET \S*uploads", status=403, code="AccessDenied")
    s3.proxy.seen.clear()
    capsys.readouterr()
    assert latte_data(options) == 0
    assert "unfinished uploads are not looked for: " in capsys.readouterr().err
    seen = [each.line for each in s3.proxy.seen if "/latents/" in each.line and "shard-" in each.line]
    assert len(seen) <= 8 * NUM_SHARDS  # of 10,000 finished shards every further request is minutes
