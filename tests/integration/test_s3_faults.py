"""The loader on a real S3 service behind a proxy that breaks it: the planned samples, or an error with its place."""

import itertools
import multiprocessing
import os
import resource
import time
from pathlib import Path

import pytest

from latte_scale.data.index import load_index
from latte_scale.data.items import LoaderError
from latte_scale.data.loader import DataSettings, Loader, make_plan
from latte_scale.data.samples import Dataset
from latte_scale.data.schema import load_manifest
from latte_scale.store import CredentialsError, Store, StoreError, StoreSettings, open_store
from tests.data.loading import GLOBAL_BATCH, SEED, ids, load
from tests.data.making import VIDEO, make_latents
from tests.store.service import Corner, make_corner

NUM_SAMPLES, PER_SHARD = 28, 6  # five shards, the last with four samples
MEBIBYTE = 1 << 20
STEPS = 5  # a little more than an epoch of batches of seven


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The data set as a folder: what the S3 copies must be equal to."""
    folder = tmp_path_factory.mktemp("folder")
    make_latents(folder, NUM_SAMPLES, PER_SHARD)
    return folder


@pytest.fixture
def s3(monkeypatch, folder) -> Corner:
    """A corner that holds a copy of the data set, with no request seen yet."""
    corner = make_corner(monkeypatch)
    copy(folder, corner.store())
    corner.proxy.reset()
    yield corner
    corner.proxy.stop()


def copy(folder: Path, store: Store) -> None:
    local = open_store(folder)
    for name in local.list():
        store.write(name, local.read(name))


def load_s3(corner: Corner, steps: int = STEPS, num_workers: int = 0, **changes) -> list:
    """The first steps, [step][micro-batch], read through settings with `changes`."""
    return load_with(corner.url, corner.settings(**changes), steps, num_workers)


def load_with(url: str, settings: StoreSettings, steps: int = STEPS, num_workers: int = 0) -> list:
    store = open_store(url, settings)
    datasets = (Dataset(store, load_manifest(store)),)
    data = DataSettings(url, num_workers)
    plan = make_plan(data, datasets, SEED, GLOBAL_BATCH)
    with Loader(data, datasets, VIDEO, plan, seed=SEED, micro_batch=3) as loader:
        return [micro_batches for _, micro_batches in itertools.islice(loader, steps)]


def replacements(steps: list) -> dict[str, str]:
    """planned id -> reason"""
    return {each.planned_id: each.reason for step in steps for batch in step for each in batch.replaced}


def means(steps: list) -> list[float]:
    """What each sample's latents are filled with: its number."""
    return [float(mean.mean()) for step in steps for batch in step for mean in batch.mean_BFCHW]


def test_every_rank_and_worker_gets_what_it_gets_from_a_folder(s3, folder, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3.proxy.url)
    for size in (1, 2, 3, 7):  # five shards for two ranks, and more ranks than shards
        for rank in range(size):
            options = {"rank": rank, "size": size, "micro_batch": 2}
            assert ids(load(s3.url, 4, **options)) == ids(load(folder, 4, **options))
    assert ids(load(s3.url, 4, num_workers=2)) == ids(load(folder, 4))


def test_broken_requests_change_nothing(s3, folder):
    kinds = ("answer", "reset", "cut", "short", "silence", "stall") * 5
    for number, kind in enumerate(kinds):
        s3.fail(kind, match="shard-", at=number * 40, seconds=60)
    begun = time.monotonic()
    steps = load_s3(s3, request_timeout_s=1.0, hedge_after_s=0.3, stall_budget_s=60.0)
    assert time.monotonic() - begun < 60
    expected = load(folder, STEPS)
    assert ids(steps) == ids(expected) and means(steps) == means(expected) and not replacements(steps)
    assert not any(fault.times for fault in s3.proxy.faults), "not every fault was met"


@pytest.mark.parametrize(("cached", "block_bytes"), [(False, None), (True, None), (True, MEBIBYTE)])
def test_a_flip_on_the_way_is_read_again(s3, folder, tmp_path, cached, block_bytes):
    """Also when it got into the cache: the second read of a damaged sample goes past it."""
    for number in range(3):
        s3.fail("flip", match=r"^GET .*\.tar", at=515 + number)  # in the payload of the range's first member
        cache = str(tmp_path / f"{number}") if cached else None
        steps = load_s3(s3, cache_dir=cache, block_bytes=block_bytes)
        assert ids(steps) == ids(load(folder, STEPS)) and means(steps) == means(load(folder, STEPS))
        assert not replacements(steps) and not s3.proxy.faults[-1].times


def test_blocks_bring_the_same_batches_with_a_request_a_shard(s3, folder, tmp_path, monkeypatch):
    monkeypatch.setattr("latte_scale.store.cache.LOCK_WAIT_S", 60.0)  # a busy lock would cost a second request
    for number, workers in enumerate((0, 2)):
        s3.proxy.reset()
        blocks = {"cache_dir": str(tmp_path / str(number)), "block_bytes": MEBIBYTE}
        steps = load_s3(s3, num_workers=workers, **blocks)
        assert ids(steps) == ids(load(folder, STEPS)) and means(steps) == means(load(folder, STEPS))
        asked = [seen.line for seen in s3.proxy.seen if ".tar" in seen.line and seen.line.startswith("GET")]
        assert len(asked) == 5 == len(set(asked))  # also by two workers, who share the cache


@pytest.mark.parametrize("block_bytes", [None, MEBIBYTE])
def test_a_flip_in_the_cache_is_read_again(s3, folder, tmp_path, block_bytes):
    load_s3(s3, cache_dir=str(tmp_path), block_bytes=block_bytes)
    entries = [path for path in tmp_path.glob("??/*") if path.is_file()]
    assert entries
    for path in entries:
        raw = bytearray(path.read_bytes())
        raw[len(raw) * 2 // 3] ^= 4
        path.write_bytes(raw)
    steps = load_s3(s3, cache_dir=str(tmp_path), block_bytes=block_bytes)
    assert ids(steps) == ids(load(folder, STEPS)) and means(steps) == means(load(folder, STEPS))
    assert not replacements(steps)


def test_a_flip_in_the_store_replaces_the_sample_and_no_other(s3, folder):
    store = s3.store()
    manifest = load_manifest(store)
    row = load_index(store, manifest.shards[2]).row(3)
    raw = bytearray(store.read("shard-000002.tar"))
    raw[row.fields["latents"].offset + row.fields["latents"].size - 1] ^= 1
    store.write("shard-000002.tar", bytes(raw))
    expected, steps = ids(load(folder, STEPS)), load_s3(s3)
    (planned,) = replacements(steps)
    assert planned.endswith(f"shard-000002/{row.key}") and "crc32c" in replacements(steps)[planned]
    pairs = [pair for step, other in zip(ids(steps), expected, strict=True) for pair in zip(step, other, strict=True)]
    assert {planned_id for got, planned_id in pairs if got != planned_id} == {planned}


@pytest.mark.parametrize("cut", ["in a header", "in a payload", "between members", "between samples", "before the end"])
def test_a_truncated_shard_loses_what_was_cut_and_nothing_else(s3, folder, cut):
    store = s3.store()
    index = load_index(store, load_manifest(store).shards[1])
    row, data = index.row(3), store.read("shard-000001.tar")
    latents = row.fields["latents"]
    length = {
        "in a header": latents.offset - 100,
        "in a payload": latents.offset + 7,
        "between members": latents.offset - 512,
        "between samples": index.row(2).end,
        "before the end": len(data) - 1024,
    }[cut]
    store.write("shard-000001.tar", data[:length])
    whole = [key for key in range(PER_SHARD) if index.row(key).end <= length]
    lost = {index.row(key).key for key in range(PER_SHARD)} - {index.row(key).key for key in whole}
    expected, steps = ids(load(folder, STEPS)), load_s3(s3)
    assert {name.rpartition("/")[2] for name in replacements(steps)} == lost
    pairs = [pair for step, other in zip(ids(steps), expected, strict=True) for pair in zip(step, other, strict=True)]
    changed = {planned.rpartition("/")[2] for got, planned in pairs if got != planned}
    assert changed == lost, "samples that were not cut came otherwise"


def test_swapped_shards_are_refused(s3):
    store = s3.store()
    one, two = store.read("shard-000000.tar"), store.read("shard-000001.tar")
    store.write("shard-000000.tar", two)
    store.write("shard-000001.tar", one)
    with pytest.raises(LoaderError, match=r"step \d+, index \d+, shard shard-00000[01].tar.*not the file that"):
        load_s3(s3)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_missing_shard_ends_the_run_and_is_named(s3, num_workers):
    s3.store().delete("shard-000003.tar")
    begun = time.monotonic()
    with pytest.raises(StoreError, match=r"^rank 0 of 1, step \d+, .*shard-000003.tar: .*no such object"):
        load_s3(s3, num_workers=num_workers)
    assert time.monotonic() - begun < 30


@pytest.mark.parametrize("num_workers", [0, 2])
def test_credentials_that_expire_in_the_middle_end_the_run(s3, num_workers):
    s3.fail("answer", match="shard-000002.tar", status=400, code="ExpiredToken", times=999)
    begun = time.monotonic()
    kind = StoreError if num_workers else CredentialsError
    with pytest.raises(kind, match=r"^rank 0 of 1, step .*the credentials have expired; renew them"):
        load_s3(s3, num_workers=num_workers)
    assert time.monotonic() - begun < 30


def test_a_service_that_goes_away_ends_the_run_in_bounded_time(s3):
    s3.fail("silence", match="shard-000002.tar", seconds=120, times=999)
    begun = time.monotonic()
    with pytest.raises(StoreError, match=r"^rank 0 of 1, .*gave up after \d+ tries .*store.stall_budget_s"):
        load_s3(s3, num_workers=1, request_timeout_s=0.5, stall_budget_s=3.0)
    assert time.monotonic() - begun < 30


def test_a_cache_below_the_working_set_gives_the_same_batches(s3, folder, tmp_path):
    limit = 3000  # about three samples
    steps = load_s3(s3, 2 * STEPS, cache_dir=str(tmp_path), cache_bytes=limit)
    assert ids(steps) == ids(load(folder, 2 * STEPS)) and not replacements(steps)
    kept = sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file() and path.name != "total")
    assert 0 < kept <= limit


@pytest.mark.parametrize("block_bytes", [None, MEBIBYTE])
def test_a_full_disk_under_the_cache_gives_the_same_batches(s3, folder, tmp_path, block_bytes):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
    try:
        steps = load_s3(s3, cache_dir=str(tmp_path), block_bytes=block_bytes)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert ids(steps) == ids(load(folder, STEPS)) and not replacements(steps)


def job(url: str, settings: StoreSettings, seconds: float) -> list:
    """What one job reads, again and again for a while; the ids of its last pass."""
    until = time.monotonic() + seconds
    while True:
        steps = load_with(url, settings)
        if replacements(steps) or time.monotonic() > until:
            return [ids(steps), replacements(steps)]


def test_jobs_that_share_a_small_cache_all_get_their_batches(s3, folder, tmp_path):
    settings = s3.settings(cache_dir=str(tmp_path), cache_bytes=8000)
    with multiprocessing.get_context("spawn").Pool(3) as pool:
        results = pool.starmap(job, [(s3.url, settings, 2.0)] * 3)
    assert results == [[ids(load(folder, STEPS)), {}]] * 3


def test_the_source_is_never_touched_by_the_cache(s3, tmp_path):
    before = {name: s3.store().read(name) for name in s3.store().list()}
    load_s3(s3, cache_dir=str(tmp_path), cache_bytes=2000)
    assert {name: s3.store().read(name) for name in s3.store().list()} == before
    assert os.listdir(tmp_path)
