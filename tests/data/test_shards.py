"""The shard writer: bounded, reproducible tars that webdataset reads, and nothing half written."""

import json
import tarfile

import pytest
import webdataset

from latte_scale.data.samples import open_dataset
from latte_scale.data.schema import RAW_BUCKET
from latte_scale.data.shards import (
    LatentSample,
    ShardFile,
    VideoSample,
    description,
    finished_entry,
    shard_name,
    text_name,
)
from latte_scale.store import open_store
from tests.data.making import BUCKET, More, latent_sample, make_latents, make_videos


def test_the_same_samples_give_the_same_bytes(tmp_path):
    assert make_latents(tmp_path / "a") == make_latents(tmp_path / "b")
    names = open_store(tmp_path / "a").list()
    assert len(names) == 2 * 4 + 2
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_plain_samples_keep_the_bytes_of_the_release_before_classes_and_several_captions(tmp_path):
    store = open_store(tmp_path)
    with ShardFile(store, "l.tar", "latents") as shard:
        for n in range(3):
            text, latents = b"text %d" % (n % 2), bytes([n]) * 600
            shard.add(LatentSample(f"a/{n}", f"caption {n % 2}", "2x3x3", latents, text, {"source": "made"}))
        latents = shard.close()
    with ShardFile(store, "v.tar", "video") as shard:
        for n in range(3):
            shard.add(VideoSample(f"a/{n}", f"caption {n}", bytes([n]) * 600, "mp4", {"source": "made"}))
        video = shard.close()
    assert [latents.sha256, latents.index_sha256, video.sha256, video.index_sha256] == [
        "72921e6bee5bcf46ee1a7320526fb2a1101e47ec1f5a7ef3c57323fbd5624b26",
        "4ad68263e77589a42b7413b643fcda91bab423ca9ada2a720681aaf9cba3d577",
        "0b4d4f62c9204338882b26bfb2ad57a67670b4383eab1853342cf5d37091edf4",
        "41091a477380352ad6a5634b45057a336f91b90f8df917fa560a08e135961f57",
    ]


def test_classes_captions_and_mirrored_latents_are_members_and_json(tmp_path):
    more = More(captions_each=3, class_names=("cat", "dog"), mirrored=True)
    make_latents(tmp_path, num_samples=4, num_captions=4, more=more)
    with tarfile.open(tmp_path / shard_name(0)) as archive:
        names = archive.getnames()
        about = json.loads(archive.extractfile("000002.json").read())
    assert [name for name in names if name.startswith("000002")] == [
        "000002.json",
        "000002.latents.safetensors",
        "000002.mirrored.safetensors",
    ]
    assert sum(name.startswith("text-") for name in names) == 4
    assert (about["label"], about["caption"], about["text"]) == (0, "caption 2", about["texts"][0])
    assert about["captions"] == ["caption 2", "caption 3", "caption 0"]
    assert about["texts"] == [text_name(caption) for caption in about["captions"]]


def test_the_index_tells_apart_what_is_said_of_a_sample():
    said = [(["a"],), (["a", "b"],), (["b", "a"],), (["a"], 0), (["a"], 1), (["a"], 0, 7), (["a", "b"], 1)]
    assert len({description(*arguments) for arguments in said}) == len(said)
    assert description(["a"]) == "a"


def test_an_entry_counts_its_samples(tmp_path):
    shards = make_videos(tmp_path, num_samples=7, per_shard=3).shards
    assert [shard.count for shard in shards] == [3, 3, 1]
    assert shards[0].buckets == {RAW_BUCKET: 3}
    assert shards[0].size_bytes == open_store(tmp_path).size(shards[0].name)


def test_equal_captions_share_one_embedding_which_comes_before_its_first_sample(tmp_path):
    make_latents(tmp_path, num_samples=12, per_shard=6, num_captions=2)
    for number in range(2):
        with tarfile.open(tmp_path / shard_name(number)) as archive:
            names = archive.getnames()
        texts = [name for name in names if name.startswith("text-")]
        assert len(texts) == 2 and names[0] == texts[0] and names[3] == texts[1]


def test_webdataset_reads_our_shards(tmp_path):
    make_videos(tmp_path / "v", num_samples=3)
    samples = list(webdataset.WebDataset(str(tmp_path / "v" / shard_name(0)), shardshuffle=False))
    assert [sample["__key__"] for sample in samples] == ["000000", "000001", "000002"]
    assert samples[1]["txt"] == b"caption 1" and json.loads(samples[1]["json"])["caption"] == "caption 1"
    assert samples[1]["mp4"][4:8] == b"ftyp"
    make_latents(tmp_path / "l", num_samples=3, num_captions=1)
    samples = list(webdataset.WebDataset(str(tmp_path / "l" / shard_name(0)), shardshuffle=False))
    text, *rest = samples
    assert text["__key__"].startswith("text-") and "safetensors" in text
    assert [sample["__key__"] for sample in rest] == ["000000", "000001", "000002"]
    assert all(json.loads(sample["json"])["text"] == text["__key__"] for sample in rest)
    assert all("latents.safetensors" in sample for sample in rest)


def test_an_abandoned_shard_leaves_nothing(tmp_path):
    shard = ShardFile(open_store(tmp_path), shard_name(0), "latents")
    shard.add(latent_sample(0))
    shard.abandon()
    assert list(tmp_path.iterdir()) == []


def test_a_finished_shard_is_known_by_its_index_and_size(tmp_path):
    entry = make_latents(tmp_path).shards[0]
    store = open_store(tmp_path)
    assert finished_entry(store, entry.name) == entry
    assert finished_entry(store, "shard-000099.tar") is None
    whole = store.read(entry.name)
    store.write(entry.name, whole[:-512])
    assert finished_entry(store, entry.name) is None
    store.write(entry.name, whole)
    store.write(entry.index, b"junk")
    assert finished_entry(store, entry.name) is None
    store.delete(entry.index)
    assert finished_entry(store, entry.name) is None


@pytest.mark.parametrize("key", ["", "a.b", "/a", "../a", "a/../b", "a/.b", "__x__/a"])
def test_keys_that_readers_would_not_find_again_are_refused(tmp_path, key):
    with ShardFile(open_store(tmp_path), "x.tar", "video") as shard, pytest.raises(ValueError, match="sample key"):
        shard.add(VideoSample(key, "", b"", "mp4"))


def test_what_a_shard_cannot_hold_is_refused(tmp_path):
    store = open_store(tmp_path)
    with ShardFile(store, "x.tar", "video") as shard:
        with pytest.raises(ValueError, match="cannot hold a LatentSample"):
            shard.add(latent_sample(0))
        with pytest.raises(ValueError, match=r"\.pkl is not a known container"):
            shard.add(VideoSample("a", "", b"", "pkl"))
        with pytest.raises(ValueError, match="at least one sample"):
            shard.close()
    with ShardFile(store, "y.tar", "latents") as shard:
        shard.add(latent_sample(0))
        other = LatentSample("b", "caption 0", BUCKET, b"", b"another embedding")
        with pytest.raises(ValueError, match="another embedding than an earlier sample"):
            shard.add(other)
        with pytest.raises(ValueError, match="'000000' appears twice"):
            shard.add(latent_sample(0))


def test_keys_may_hold_folders_and_any_letters(tmp_path):
    store = open_store(tmp_path)
    keys = ["a/b/c", "ключ ü", "x" * 150]
    with ShardFile(store, "x.tar", "video") as shard:
        for key in keys:
            shard.add(VideoSample(key, "c", b"data", "mkv", {"source": key}))
        entry = shard.close()
    from latte_scale.data.schema import Manifest, save_manifest

    save_manifest(store, Manifest("video", (entry,), caption_cleaning="none"))
    samples = list(open_dataset(str(tmp_path)).samples(0))
    assert [sample.key for sample in samples] == keys
    assert [sample.about["key"] for sample in samples] == keys
    assert all(sample.fields["video"] == b"data" for sample in samples)
