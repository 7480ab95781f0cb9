"""Reading samples: one read each, and every byte verified."""

import json
from pathlib import Path

import numpy as np
import pytest

from latte_scale.data import samples
from latte_scale.data.arrays import read_arrays
from latte_scale.data.index import load_index
from latte_scale.data.samples import DamagedError, Dataset, Sample, open_dataset
from latte_scale.data.schema import NULL_TEXT, ManifestError
from latte_scale.store import MissingError
from tests.data.making import BUCKET, NULL, OTHER_BUCKET, More, make_latents, make_videos


@pytest.fixture
def latents(tmp_path: Path) -> Dataset:
    make_latents(tmp_path)
    return open_dataset(str(tmp_path))


def damage(dataset: Dataset, shard: int, offset: int, flip: int = 1) -> None:
    name = dataset.manifest.shards[shard].name
    data = bytearray(dataset.store.read(name))
    data[offset] ^= flip
    dataset.store.write(name, bytes(data))


def test_every_sample_comes_back(latents):
    numbers = []
    for shard in range(4):
        for sample in latents.samples(shard):
            number = int(sample.key)
            arrays, _ = read_arrays(sample.fields["latents"])
            text, _ = read_arrays(sample.fields["text"])
            assert (arrays["mean"] == number).all() and (text["embedding"] == number % 5 + 1).all()
            assert sample.caption == f"caption {number % 5}" and sample.about["source"] == "made"
            assert len(text["embedding"]) == 1 + number % 5
            numbers.append(number)
    assert numbers == list(range(20))


def test_a_sample_and_its_own_caption_are_one_read(tmp_path, monkeypatch):
    make_latents(tmp_path, num_samples=6, num_captions=6)
    dataset = open_dataset(str(tmp_path))
    reads = []
    read = type(dataset.store).read
    monkeypatch.setattr(type(dataset.store), "read", lambda *args, **how: reads.append(args[1]) or read(*args, **how))
    list(dataset.samples(0))
    assert reads.count("shard-000000.tar") == 6


def test_a_shared_embedding_is_read_once_but_again_on_demand(latents, monkeypatch):
    reads = []
    read = type(latents.store).read
    monkeypatch.setattr(type(latents.store), "read", lambda *args, **how: reads.append(args[2:]) or read(*args, **how))
    latents.read(0, 0)
    latents.read(0, 5)  # the caption of sample 0
    assert len([args for args in reads if args]) == 2
    latents.read(0, 5, cached=False)
    assert len([args for args in reads if args]) == 4


def test_large_indices_are_not_all_kept(tmp_path, monkeypatch):
    """A worker meets every shard in an epoch: of a hundred thousand samples each, 256 indices were 3 GB."""
    make_latents(tmp_path, num_samples=40, per_shard=2)
    dataset = open_dataset(str(tmp_path))
    monkeypatch.setattr(samples, "MOST_CACHED_BYTES", 6 * dataset.index(0).num_bytes)
    for shard in [*range(20), 17, 18, 19]:
        dataset.index(shard)
        dataset.positions(shard, BUCKET, 0.0, "train")
    assert 5 <= len(dataset._indices) <= 7 and {17, 18, 19} <= dataset._indices.keys()
    monkeypatch.setattr(samples, "MOST_CACHED_BYTES", 1)
    dataset = open_dataset(str(tmp_path))
    for shard in range(20):
        dataset.positions(shard, BUCKET, 0.0, "train")
    assert len(dataset._indices) == len(dataset._positions) == samples.FEWEST_CACHED
    assert [sample.key for shard in range(20) for sample in dataset.samples(shard)] == [f"{n:06d}" for n in range(40)]


def test_any_flipped_bit_of_a_sample_is_seen(latents):
    """Every byte that belongs to sample 3: headers and payloads; padding is nobody's."""
    row = load_index(latents.store, latents.manifest.shards[0]).row(3)
    data = latents.store.read("shard-000000.tar")
    spans = [(span.offset, span.offset + span.size) for span in row.fields.values()]
    text = row.fields["text"]
    offsets = [o for begin, end in spans for o in range(begin, end, 37)] + [row.start + 2, text.offset - 510]
    for offset in offsets:
        damage(latents, 0, offset, 0x10)
        with pytest.raises((DamagedError, ManifestError), match=r"shard-000000\.tar.*'000003'"):
            open_dataset(latents.store.url).read(0, 3)
        latents.store.write("shard-000000.tar", data)
    assert open_dataset(latents.store.url).read(0, 3).key == "000003"


def test_a_truncated_tar_gives_what_lies_before_the_cut(latents):
    index = load_index(latents.store, latents.manifest.shards[0])
    row = index.row(3)
    data = latents.store.read("shard-000000.tar")
    for cut in (row.start, row.start + 100, row.start + 512, row.end - 1):
        latents.store.write("shard-000000.tar", data[:cut])
        dataset = open_dataset(latents.store.url)
        assert dataset.read(0, 2).key == "000002"
        for position in (3, 4):
            with pytest.raises(DamagedError, match=r"shard-000000\.tar: sample '00000[34]' is damaged: .*ends at"):
                dataset.read(0, position)


def test_zeros_where_a_sample_was_are_damage(latents):
    row = load_index(latents.store, latents.manifest.shards[0]).row(3)
    data = bytearray(latents.store.read("shard-000000.tar"))
    data[row.start : row.end] = bytes(row.end - row.start)
    latents.store.write("shard-000000.tar", bytes(data))
    with pytest.raises(DamagedError, match="no member at byte"):
        latents.read(0, 3)


def test_another_tar_under_the_right_name_is_refused(latents):
    other = latents.store.read("shard-000001.tar")
    latents.store.write("shard-000000.tar", other)
    with pytest.raises(ManifestError, match=r"hold \['000006'\], the index says '000000': this.*delete it and encode"):
        latents.read(0, 0)


def test_a_tar_of_another_data_set_is_told_from_damage_by_its_size_and_its_end(tmp_path):
    """Its samples lie elsewhere, so that no header is found where the index says: like damage, and of every sample."""
    make_latents(tmp_path / "a", num_samples=6, per_shard=6)
    make_latents(tmp_path / "b", num_samples=9, per_shard=9, with_std=True)
    dataset, other = open_dataset(str(tmp_path / "a")), open_dataset(str(tmp_path / "b"))
    dataset.store.write("shard-000000.tar", other.store.read("shard-000000.tar"))
    for position in range(6):
        with pytest.raises(ManifestError, match=r"this is not the file that was indexed .*encode again"):
            dataset.read_twice(0, position)


def test_a_missing_tar_is_a_store_error(latents):
    latents.store.delete("shard-000002.tar")
    with pytest.raises(MissingError, match=r"shard-000002\.tar.*no such file"):
        latents.read(2, 0)


def test_the_null_embedding_is_checked(latents):
    assert latents.null_text().shape == (6, 5) and (latents.null_text() == NULL).all()
    data = bytearray(latents.store.read(NULL_TEXT))
    data[-1] ^= 1
    latents.store.write(NULL_TEXT, bytes(data))
    with pytest.raises(ManifestError, match=r"null-text\.safetensors: sha256: expected"):
        latents.null_text()


def test_counts_agree_with_positions(tmp_path):
    make_latents(tmp_path, num_samples=40, every_other_bucket=4)
    dataset = open_dataset(str(tmp_path))
    whole = dataset.counts(0.0, "train")
    assert whole[BUCKET].sum() == 30 and whole[OTHER_BUCKET].sum() == 10
    train, held_out = dataset.counts(0.4, "train"), dataset.counts(0.4, "held_out")
    for bucket, counts in whole.items():
        np.testing.assert_array_equal(train[bucket] + held_out[bucket], counts)
        for shard, count in enumerate(train[bucket]):
            assert len(dataset.positions(shard, bucket, 0.4, "train")) == count
    assert held_out[BUCKET].sum() > 0


def test_both_sides_of_a_holdout_are_counted_in_one_pass_over_the_indices(latents, monkeypatch):
    """A start asks several times: for the shuffle window, the plan, and the validation's other side."""
    reads = []
    read = type(latents.store).read
    monkeypatch.setattr(type(latents.store), "read", lambda *args, **how: reads.append(args[1]) or read(*args, **how))
    for side in ("train", "train", "held_out"):
        latents.counts(0.4, side)
    assert sorted(reads) == [entry.index for entry in latents.manifest.shards]


def test_clips_come_back_with_their_captions(tmp_path):
    make_videos(tmp_path)
    samples = [sample for shard in range(2) for sample in open_dataset(str(tmp_path)).samples(shard)]
    assert [sample.caption for sample in samples] == [f"caption {number}" for number in range(5)]
    assert all(json.loads(sample.fields["json"])["key"] == sample.key for sample in samples)


def test_each_of_several_captions_can_be_read(tmp_path):
    make_latents(tmp_path, num_captions=6, more=More(captions_each=3))
    dataset = open_dataset(str(tmp_path))
    for cached in (True, False):
        for shard, position in ((0, 0), (0, 5), (2, 3)):
            for place, caption_at in enumerate((0.0, 0.34, 0.99)):
                sample = dataset.read(shard, position, cached, caption_at)
                caption = (6 * shard + position + place) % 6
                assert sample.captions[place] == f"caption {caption}"
                assert (read_arrays(sample.fields["text"])[0]["embedding"] == caption + 1).all()
    assert sample.caption == sample.captions[0]


def test_several_captions_must_begin_with_the_caption():
    """A .json of another tool may use the word otherwise."""
    for captions in (["other", "a cat"], [], "a cat", [1, 2], None, {"a cat": 1}):
        assert Sample("k", {"txt": b"a cat"}, {"captions": captions}).captions == ("a cat",)
    assert Sample("k", {"txt": b" a cat\n"}, {"captions": ["a cat ", "it sits"]}).captions == ("a cat", "it sits")
    assert Sample("k", {}, {"caption": "a cat", "captions": ["a cat", "it sits"]}).captions == ("a cat", "it sits")


def test_latents_without_text_are_one_read(tmp_path):
    make_latents(tmp_path, more=More(with_text=False, mirrored=True))
    sample = open_dataset(str(tmp_path)).read(1, 2)
    assert set(sample.fields) == {"json", "latents", "mirrored"} and "text" not in sample.about
    assert (read_arrays(sample.fields["mirrored"])[0]["mean"] == -8).all()
    with pytest.raises(ManifestError, match="no null embedding"):
        open_dataset(str(tmp_path)).null_text()


def test_a_class_out_of_range_names_the_sample(tmp_path):
    make_latents(tmp_path, more=More(class_names=("cat", "dog", "owl")))
    dataset = open_dataset(str(tmp_path))
    assert [dataset.label(sample) for sample in dataset.samples(0)] == [0, 1, 2, 0, 1, 2]
    for label in (3, -1, None, "0", True, 1.0):
        with pytest.raises(
            ManifestError, match=rf"'k': label: expected an integer from 0 to 2 .*, got {label!r}; write"
        ):
            dataset.label(Sample("k", {}, {"label": label}))
    make_latents(tmp_path / "plain")
    assert open_dataset(str(tmp_path / "plain")).label(Sample("k", {}, {"label": "a word of another tool"})) is None
