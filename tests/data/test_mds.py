"""MDS shards: read through the index like tars, every fault detected, malformed offset tables refused."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_tools import cli
from latte_scale.data.mds import (
    MDS_INDEX,
    Column,
    MdsError,
    MdsShard,
    column_ranges,
    pack_head,
    pack_sizes,
    read_mds_index,
    read_offsets,
    sizes_bytes,
)
from latte_scale.data.samples import DamagedError, Dataset, open_dataset
from latte_scale.data.schema import ManifestError
from latte_scale.store import open_store
from tests.data.loading import ids, keys, load
from tests.data.making import More, make_latents, make_videos

BYTES = tuple(Column(name, "bytes") for name in "abc")


def as_mds(folder: Path) -> Path:
    """The data set at `folder` as MDS, beside it."""
    output = folder.with_name(f"{folder.name}-mds")
    assert cli.main(["convert", "--input", str(folder), "--output", str(output), "--to", "mds"]) == 0
    return output


@pytest.fixture
def latents(tmp_path: Path) -> Dataset:
    make_latents(tmp_path / "tar", more=More(captions_each=2))
    return open_dataset(str(as_mds(tmp_path / "tar")))


@given(st.lists(st.tuples(*[st.binary(max_size=9)] * 3), min_size=1, max_size=9))
@settings(max_examples=50, deadline=None)
def test_offsets_and_columns_come_back(samples):
    parts = [(pack_sizes(values), *values) for values in samples]
    head, size_bytes = pack_head([sum(map(len, each)) for each in parts], BYTES)
    data = head + b"".join(b"".join(each) for each in parts)
    assert len(data) == size_bytes
    offsets = read_offsets(data[: 4 * (len(samples) + 2)], MdsShard("x", size_bytes, len(samples), BYTES), "x")
    for values, begin, end in zip(samples, offsets[:-1], offsets[1:], strict=True):
        ranges = column_ranges(data[begin : begin + sizes_bytes(BYTES)], BYTES, int(begin), int(end))
        assert tuple(data[offset : offset + size] for offset, size in ranges.values()) == values


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ([3, 16, 20, 30], "expected 2 samples as index.json says, got 3"),
        ([], "got nothing"),
        ([2, 8, 20, 30], "does not fit a file of 30 bytes"),
        ([2, 16, 40, 30], "does not fit"),
        ([2, 16, 20, 29], "does not fit"),
    ],
)
def test_an_offset_table_of_another_file_is_refused(numbers, message):
    with pytest.raises(MdsError, match=message):
        read_offsets(np.array(numbers, "<u4").tobytes(), MdsShard("x.mds", 30, 2, BYTES), "x.mds")


def test_columns_that_do_not_fill_their_sample_are_refused():
    columns = (Column("n", "int", 8), *BYTES[:1])
    assert column_ranges(pack_sizes([b"abc"]), columns, 100, 115) == {"n": (104, 8), "a": (112, 3)}
    with pytest.raises(ValueError, match="its columns end at byte 115, the sample at 116"):
        column_ranges(pack_sizes([b"abc"]), columns, 100, 116)


@pytest.mark.parametrize(
    "content",
    [
        b"{",
        b"[]",
        b'{"version": 2}',
        b'{"shards": [1]}',
        b'{"shards": [{"format": "jsonl", "version": 2}]}',
        b'{"shards": []}',
        b"[" * 100_000,
    ],
)
def test_an_index_of_something_else_is_refused(tmp_path, content):
    store = open_store(tmp_path)
    store.write(MDS_INDEX, content)
    with pytest.raises(MdsError, match=r"index\.json"):
        read_mds_index(store)


@pytest.mark.parametrize(
    "change",
    [
        {"samples": -1},
        {"samples": True},
        {"column_sizes": [None, -4]},
        {"column_sizes": [None]},
        {"raw_data": {"basename": 7, "bytes": 9}},
        {"version": 3},
    ],
)
def test_hostile_numbers_in_the_index_are_refused(tmp_path, change):
    about = {
        "format": "mds",
        "version": 2,
        "column_names": ["a", "b"],
        "column_encodings": ["bytes", "int"],
        "column_sizes": [None, 8],
        "samples": 3,
        "raw_data": {"basename": "shard.00000.mds", "bytes": 99},
        "zip_data": None,
    }
    store = open_store(tmp_path)
    store.write(MDS_INDEX, json.dumps({"version": 2, "shards": [about]}).encode())
    assert read_mds_index(store)[0].columns == (Column("a", "bytes"), Column("b", "int", 8))
    store.write(MDS_INDEX, json.dumps({"version": 2, "shards": [{**about, **change}]}).encode())
    with pytest.raises(MdsError, match="expected the index of an MDS data set"):
        read_mds_index(store)


def test_a_sample_is_one_read(latents, monkeypatch):
    reads = []
    read = type(latents.store).read
    monkeypatch.setattr(type(latents.store), "read", lambda *args, **how: reads.append(args[1]) or read(*args, **how))
    assert [sample.key for sample in latents.samples(0)] == [f"{number:06d}" for number in range(6)]
    assert reads.count("shard.00000.mds") == 6


def test_any_flipped_bit_of_a_sample_is_damage(latents):
    name = latents.manifest.shards[0].name
    row, data = latents.index(0).row(3), latents.store.read(name)
    for span in row.fields.values():
        for offset in range(span.offset, span.offset + span.size, 41):
            changed = bytearray(data)
            changed[offset] ^= 0x10
            latents.store.write(name, bytes(changed))
            faults = []
            for caption_at in (0.0, 0.9):  # an embedding that is not read cannot be seen to be damaged
                try:
                    latents.read(0, 3, caption_at=caption_at)
                except DamagedError as error:
                    faults.append(str(error))
            assert faults and all("'000003' is damaged: field" in fault for fault in faults)
    latents.store.write(name, data)
    assert latents.read(0, 3).key == "000003"


def test_another_file_is_refused_and_a_cut_one_is_damage(latents):
    name, other = (shard.name for shard in latents.manifest.shards[:2])
    data = latents.store.read(name)
    latents.store.write(name, latents.store.read(other))
    with pytest.raises(ManifestError, match=r"shard\.00000\.mds: bytes .* is not the file that was indexed"):
        latents.read(0, 2)
    latents.store.write(name, data[: latents.index(0).row(4).end - 1])
    assert latents.read(0, 3).key == "000003"
    with pytest.raises(DamagedError, match="'000004' is damaged"):
        latents.read(0, 4)


def test_the_loader_reads_them_like_tars(tmp_path):
    """The same plan over the same samples: on any ranks and workers, each sample once an epoch, the same arrays."""
    make_latents(tmp_path / "tar", every_other_bucket=3)
    url = as_mds(tmp_path / "tar")
    golden = load(url, 6)
    assert ids(load(url, 6, num_workers=2)) == ids(golden)
    ranks = [load(url, 6, rank=rank, size=3, micro_batch=2) for rank in range(3)]
    assert [[name for rank in ranks for name in ids(rank)[step]] for step in range(6)] == ids(golden)
    assert {key for step in keys(golden) for key in step} == set(range(20))
    for batch in (batch for step in golden for batch in step):
        for place, name in enumerate(batch.sample_ids):
            if name:
                assert (batch.mean_BFCHW[place] == int(name.rpartition("/")[2])).all()


def test_a_damaged_sample_of_an_mds_shard_is_replaced(tmp_path):
    make_latents(tmp_path / "tar")
    url = as_mds(tmp_path / "tar")
    dataset = open_dataset(str(url))
    name, span = dataset.manifest.shards[1].name, dataset.index(1).row(2).fields["latents"]
    data = bytearray(dataset.store.read(name))
    data[span.offset + span.size // 2] ^= 1
    dataset.store.write(name, bytes(data))
    replaced = [each for step in load(url, 3) for batch in step for each in batch.replaced]
    assert [each.planned_id.rpartition("/")[2] for each in replaced] == ["000008"]
    assert "field 'latents': crc32c" in replaced[0].reason


def test_clips_train_from_mds(tmp_path):
    make_videos(tmp_path / "tar", class_names=("x", "y"))
    url = as_mds(tmp_path / "tar")
    batches = [batch for step in load(url, 2, global_batch=5) for batch in step]
    labels = {
        (int(n.rpartition("/")[2]), label)
        for b in batches
        for n, label in zip(b.sample_ids, b.label_B.tolist(), strict=True)
        if n
    }
    assert labels == {(number, number % 2) for number in range(5)}
