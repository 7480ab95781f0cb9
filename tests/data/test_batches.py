"""Micro-batches: they hold what is stored; damage is replaced and reported; errors give their place."""

import functools
import itertools

import numpy as np
import pytest
import torch

from latte_scale import rng
from latte_scale.data import loader
from latte_scale.data.index import load_index
from latte_scale.data.items import LoaderError
from latte_scale.data.loader import DataSettings, open_datasets
from latte_scale.data.samples import DamagedError, Dataset
from latte_scale.data.schema import Manifest, VideoSettings, save_manifest
from latte_scale.data.shards import VideoSample
from latte_scale.store import StoreError, open_store
from tests.data.loading import ids, keys, load
from tests.data.making import (
    BUCKET,
    CHANNELS,
    FRAMES,
    MAX_TOKENS,
    NULL,
    OTHER_BUCKET,
    SIDE,
    WIDTH,
    frame_grey,
    make_clip,
    make_latents,
    make_videos,
    write_shards,
)


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("with_std", [False, True])
def test_batches_hold_what_is_stored(tmp_path, num_workers, with_std):
    manifest = make_latents(tmp_path, with_std=with_std)
    for step, micro_batches in enumerate(load(tmp_path, 3, num_workers)):
        assert len(micro_batches) == 3
        assert [batch.index_B.tolist() for batch in micro_batches] == [[0, 1, 2], [3, 4, 5], [6, -1, -1]]
        for batch in micro_batches:
            assert (batch.step, batch.bucket, batch.replaced) == (step, BUCKET, [])
            assert batch.mean_BFCHW.shape == (3, FRAMES, CHANNELS, SIDE, SIDE)
            assert batch.mean_BFCHW.dtype == batch.text_BLD.dtype == torch.float16
            assert batch.weight_B.tolist() == [float(index >= 0) for index in batch.index_B]
            assert (batch.std_BFCHW is not None) == with_std and batch.pixels_BFCHW is None
            assert batch.text_BLD.shape == (3, batch.mask_BL.shape[1], WIDTH)
            assert batch.mask_BL.sum(1).max() == batch.mask_BL.shape[1]
            for row, name in enumerate(batch.sample_ids):
                if not name:
                    assert not batch.mean_BFCHW[row].any() and not batch.text_BLD[row].any()
                    assert batch.mask_BL[row].tolist() == [True] + [False] * (batch.mask_BL.shape[1] - 1)
                    continue
                dataset, shard, key = name.split("/")
                number = int(key)
                assert dataset == manifest.fingerprint()[:8] and shard == f"shard-{number // 6:06d}"
                assert (batch.mean_BFCHW[row] == number).all() and batch.captions[row] == f"caption {number % 5}"
                length = 1 + number % 5
                assert batch.mask_BL[row].sum() == length and batch.mask_BL[row, :length].all()
                assert (batch.text_BLD[row, :length] == number % 5 + 1).all()
                assert not batch.text_BLD[row, length:].any()
                assert not with_std or (batch.std_BFCHW[row] == 0.5).all()


@pytest.mark.parametrize("options", [{}, {"num_images": 2}, {"micro_batch": 1}])
@pytest.mark.parametrize("kind", ["latents", "latents with std", "video"])
def test_every_micro_batch_fits_into_a_slot_of_the_ring(tmp_path, monkeypatch, kind, options):
    """Else all would arrive, but slowly."""
    make = make_videos if kind == "video" else functools.partial(make_latents, with_std=kind != "latents")
    make(tmp_path)
    most = []
    ring = loader.Ring
    monkeypatch.setattr(loader, "Ring", lambda *args: most.append(args[2]) or ring(*args))
    for batch in itertools.chain(*load(tmp_path, 1, 1, **options)):
        tensors = [value for value in vars(batch).values() if isinstance(value, torch.Tensor)]
        assert sum(64 + tensor.nbytes for tensor in tensors) <= most[0]
        storages = {tensor.untyped_storage().data_ptr() for tensor in tensors}
        assert len(storages) == 1


def test_buckets_keep_their_shapes_and_do_not_mix(tmp_path):
    make_latents(tmp_path, every_other_bucket=3)
    shapes = {}
    for step in load(tmp_path, 8):
        assert len({batch.bucket for batch in step}) == 1
        shapes[step[0].bucket] = tuple(step[0].mean_BFCHW.shape[1:])
    assert shapes == {BUCKET: (FRAMES, CHANNELS, SIDE, SIDE), OTHER_BUCKET: (FRAMES, CHANNELS, SIDE, 2 * SIDE)}


def test_ids_are_what_was_read_not_what_was_planned(tmp_path, monkeypatch):
    """Swap two samples where a worker reads them: the ids of the run log must change with the data."""
    make_latents(tmp_path)
    before = load(tmp_path, 1)
    read = Dataset.read

    def swapped(self, shard, position, *more):
        return read(self, shard, {0: 1, 1: 0}.get(position, position), *more)

    monkeypatch.setattr(Dataset, "read", swapped)
    after = load(tmp_path, 1, num_workers=1)
    assert ids(before) != ids(after)
    for batch in after[0]:
        for row, name in enumerate(batch.sample_ids):
            assert not name or (batch.mean_BFCHW[row] == int(name[-6:])).all()


def test_dropped_captions_take_the_null_embedding_at_their_own_length(tmp_path):
    make_latents(tmp_path)
    steps = load(tmp_path, 6, caption_drop=0.5)
    split = load(tmp_path, 6, caption_drop=0.5, rank=1, size=2, micro_batch=2)
    dropped = {}
    for batch in itertools.chain(*steps):
        for row, name in enumerate(batch.sample_ids):
            if not name:
                assert not batch.dropped_B[row]
                continue
            index, length = int(batch.index_B[row]), 1 + int(name[-6:]) % 5
            drop = rng.uniform(5, "caption_drop", batch.step, index) < 0.5
            assert bool(batch.dropped_B[row]) == drop and batch.mask_BL[row].sum() == length
            assert (batch.text_BLD[row, :length] == (NULL if drop else int(name[-6:]) % 5 + 1)).all()
            assert not batch.text_BLD[row, length:].any()
            assert batch.captions[row] == f"caption {int(name[-6:]) % 5}"
            dropped[batch.step, index] = drop
    assert 8 < sum(dropped.values()) < 34
    for batch in itertools.chain(*split):
        for row, index in enumerate(batch.index_B.tolist()):
            assert index < 0 or bool(batch.dropped_B[row]) == dropped[batch.step, index]


def flip(url, key: int, shard: int) -> None:
    """Flip a bit in the latents of a sample."""
    store = open_store(url)
    manifest = open_datasets(DataSettings(str(url)))[0].manifest
    index = load_index(store, manifest.shards[shard])
    row = next(row for row in index.rows() if int(row.key) == key)
    data = bytearray(store.read(manifest.shards[shard].name))
    data[row.fields["latents"].offset + 100] ^= 1
    store.write(manifest.shards[shard].name, bytes(data))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_flipped_bit_is_replaced_reported_and_moves_nothing_else(tmp_path, num_workers):
    make_latents(tmp_path)
    before = keys(load(tmp_path, 6))
    flip(tmp_path, key=8, shard=1)
    steps = load(tmp_path, 6, num_workers)
    reports = [replaced for step in steps for batch in step for replaced in batch.replaced]
    bad = [(step, place) for step, row in enumerate(before) for place, key in enumerate(row) if key == 8]
    assert [(report.step, report.index) for report in reports] == bad and bad
    for step, (old, new) in enumerate(zip(before, keys(steps), strict=True)):
        assert len(old) == len(new)
        assert [place for place in range(7) if old[place] != new[place]] == [p for s, p in bad if s == step]
    for report in reports:
        assert report.planned_id.endswith("/shard-000001/000008") and report.id != report.planned_id
        assert "shard-000001.tar: sample '000008' is damaged" in report.reason and "crc32c" in report.reason
        assert report.id in [name for batch in steps[report.step] for name in batch.sample_ids]


def test_replacements_do_not_depend_on_workers_or_ranks(tmp_path):
    make_latents(tmp_path)
    store = open_store(tmp_path)
    data = store.read("shard-000001.tar")
    store.write("shard-000001.tar", data[: len(data) // 3])
    golden = load(tmp_path, 6)
    damaged = [replaced for step in golden for batch in step for replaced in batch.replaced]
    assert {name.planned_id.split("/")[1] for name in damaged} == {"shard-000001"}
    assert len(damaged) > 5 and all("ends at" in replaced.reason for replaced in damaged)
    assert ids(load(tmp_path, 6, num_workers=2)) == ids(golden)
    ranks = [ids(load(tmp_path, 6, rank=rank, size=3, micro_batch=1)) for rank in range(3)]
    assert [[name for part in parts for name in part] for parts in zip(*ranks, strict=True)] == ids(golden)


def test_a_bad_sample_is_read_again_past_the_caches_before_it_is_given_up(tmp_path, monkeypatch):
    make_latents(tmp_path)
    before, calls = ids(load(tmp_path, 2)), []
    read = Dataset.read

    def flaky(self, shard, position, cached=True, *more):
        calls.append(cached)
        if cached:
            raise DamagedError("a bad moment")
        return read(self, shard, position, cached, *more)

    monkeypatch.setattr(Dataset, "read", flaky)
    steps = load(tmp_path, 2)
    assert ids(steps) == before and calls == [True, False] * 14
    assert not any(batch.replaced for step in steps for batch in step)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_missing_shard_stops_with_its_place(tmp_path, num_workers):
    """In one line, which exit.json keeps: from a worker it came at the end of a page of torch's traceback."""
    make_latents(tmp_path)
    open_store(tmp_path).delete("shard-000002.tar")
    place = r"^rank 1 of 2, step \d, index \d, shard shard-000002\.tar, row \d: "
    expected = rf"{place}.*shard-000002\.tar: .*no such file[^\n]*$"
    with pytest.raises(StoreError, match=expected):
        load(tmp_path, 6, num_workers, rank=1, size=2)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_wrong_index_stops_with_its_place(tmp_path, num_workers):
    make_latents(tmp_path)
    store = open_store(tmp_path)
    store.write("shard-000002.index.safetensors", store.read("shard-000001.index.safetensors"))
    with pytest.raises(LoaderError, match=r"^rank 0 of 1, step \d, index \d.*shard-000002.*index_sha256[^\n]*$"):
        load(tmp_path, 6, num_workers)


def test_a_data_set_without_a_sound_sample_stops(tmp_path):
    make_latents(tmp_path, num_samples=40, per_shard=40)
    store = open_store(tmp_path)
    store.write("shard-000000.tar", store.read("shard-000000.tar")[:100])
    with pytest.raises(LoaderError, match=r"step 0, index 0: the planned .* and 32 replacements .*latte-data verify"):
        load(tmp_path)


def test_clips_are_decoded_and_windows_are_keyed(tmp_path):
    make_videos(tmp_path, num_samples=5, num_frames=12)
    video = VideoSettings(3, 16, 24, 2)
    steps = load(tmp_path, 4, num_workers=2, video=video)
    starts = set()
    for batch in itertools.chain(*steps):
        assert batch.bucket == "raw" and batch.text_BLD is None and batch.mean_BFCHW is None
        assert batch.pixels_BFCHW.shape == (3, 3, 3, 16, 24) and batch.pixels_BFCHW.dtype == torch.uint8
        for row, name in enumerate(batch.sample_ids):
            if not name:
                assert not batch.pixels_BFCHW[row].any() and batch.captions[row] == ""
                continue
            start = int(rng.uniform(5, "window", batch.step, int(batch.index_B[row])) * 8)
            greys = batch.pixels_BFCHW[row].float().mean(dim=(1, 2, 3)).numpy()
            np.testing.assert_allclose(greys, [frame_grey(start + 2 * i) for i in range(3)], atol=2.5)
            assert batch.captions[row] == f"caption {int(name[-6:])}"
            starts.add(start)
    assert len(starts) > 4
    again = load(tmp_path, 4, video=video, rank=1, size=2, micro_batch=1)
    mine = [name for step in ids(steps) for name in step[3:]]
    assert [name for step in ids(again) for name in step] == mine


def test_a_clip_that_is_too_short_is_replaced(tmp_path):
    store = open_store(tmp_path)
    samples = [VideoSample(f"{n:06d}", "", make_clip(frames), "mp4") for n, frames in enumerate((12, 3, 12))]
    save_manifest(store, Manifest("video", write_shards(store, "video", samples), caption_cleaning="none"))
    steps = load(tmp_path, 3, video=VideoSettings(4, 8, 8, 2), caption_drop=1.0)
    reports = [replaced for step in steps for batch in step for replaced in batch.replaced]
    assert reports and all("000001': too short: expected 7 frames" in report.reason for report in reports)
    assert {key for step in keys(steps) for key in step} == {0, 2}
    assert all(batch.dropped_B.tolist() == (batch.index_B >= 0).tolist() for step in steps for batch in step)


def test_a_rank_without_samples_in_a_micro_batch_still_has_its_tensors(tmp_path):
    """3 samples on 2 ranks, one a micro-batch: the second micro-batch of rank 0 is empty."""
    make_latents(tmp_path, with_std=True)
    (first, empty), *_ = load(tmp_path, 1, num_workers=1, global_batch=3, rank=0, size=2, micro_batch=1)
    assert first.weight_B.tolist() == [1.0] and empty.weight_B.tolist() == [0.0]
    assert empty.mean_BFCHW.shape == first.mean_BFCHW.shape == empty.std_BFCHW.shape
    assert empty.text_BLD.shape == (1, 1, WIDTH) and empty.mask_BL.all() and empty.sample_ids == [""]


def test_longest_caption_rules_the_padding(tmp_path):
    make_latents(tmp_path, num_captions=MAX_TOKENS)
    for batch in itertools.chain(*load(tmp_path, 4)):
        lengths = [1 + int(name[-6:]) % MAX_TOKENS for name in batch.sample_ids if name]
        assert batch.text_BLD.shape[1] == max(lengths)
