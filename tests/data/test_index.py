"""The sidecar index: round trip, determinism, damage, and the holdout."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from latte_scale.data.index import (
    IndexBuilder,
    IndexFileError,
    Row,
    ShardIndex,
    Span,
    caption_hash,
    index_name,
    is_held_out,
    load_index,
)
from latte_scale.data.schema import ClipSize
from latte_scale.rng import hash64
from latte_scale.store import open_store
from tests.data.making import BUCKET, OTHER_BUCKET, make_latents

spans = st.builds(Span, st.integers(0, 2**40), st.integers(0, 2**40), st.integers(0, 2**32 - 1))
rows = st.builds(
    Row,
    st.text(max_size=20),
    st.sampled_from(["4x8x8", "4x16x8", "1x8x8"]),
    st.integers(0, 2**40),
    st.integers(0, 2**40),
    st.dictionaries(st.sampled_from(["latents", "json", "text"]), spans),
    st.none() | st.integers(0, 2**31 - 1),
    st.none() | st.builds(ClipSize, *[st.integers(1, 2**31 - 1)] * 3),
)


def build(rows: list[Row], kind: str = "latents") -> bytes:
    builder = IndexBuilder(kind)
    for row in rows:
        builder.add(row, f"caption of {row.key}")
    return builder.to_bytes("a.tar", 123, "f" * 64)


@settings(max_examples=50, deadline=None)
@given(st.lists(rows, max_size=12, unique_by=lambda row: row.key))
def test_rows_come_back_as_they_were_added(rows):
    data = build(rows)
    index = ShardIndex(data)
    assert list(index.rows()) == rows and len(index) == len(rows)
    assert (index.shard, index.size_bytes, index.sha256) == ("a.tar", 123, "f" * 64)
    assert data == build(rows)
    assert index.caption_hash.tolist() == [caption_hash(f"caption of {row.key}") for row in rows]


def test_a_key_cannot_stand_twice():
    with pytest.raises(ValueError, match="'a' appears twice"):
        build([Row("a", "b", 0, 1, {}), Row("a", "b", 1, 2, {})])


def test_loading_holds_the_file_to_the_manifest(tmp_path):
    entry = make_latents(tmp_path).shards[0]
    store = open_store(tmp_path)
    assert len(load_index(store, entry)) == entry.count == 6
    data = bytearray(store.read(entry.index))
    data[-3] ^= 1
    store.write(entry.index, bytes(data))
    with pytest.raises(
        IndexFileError,
        match=r"shard-000000\.index\.safetensors: index_sha256: expected .*clips by .* latents by",
    ):
        load_index(store, entry)


def test_damaged_bytes_are_refused():
    data = build([Row("a", "b", 0, 1, {})])
    for damaged in (b"", data[:20], data[:-5], b"junk" * 40):
        with pytest.raises(IndexFileError, match="damaged index"):
            ShardIndex(damaged)


def test_positions_split_by_bucket_and_holdout(tmp_path):
    entry = make_latents(tmp_path, num_samples=60, per_shard=60, every_other_bucket=3).shards[0]
    index = load_index(open_store(tmp_path), entry)
    parts = [index.positions(bucket, 0.3, side) for bucket in (BUCKET, OTHER_BUCKET) for side in ("train", "held_out")]
    assert sorted(np.concatenate(parts).tolist()) == list(range(60))
    assert all((np.diff(part) > 0).all() for part in parts)
    assert index.counts(0.3) == {BUCKET: len(parts[0]), OTHER_BUCKET: len(parts[2])}
    assert index.positions(OTHER_BUCKET).tolist() == list(range(0, 60, 3))
    assert len(index.positions("9x9x9")) == 0 and not len(index.positions(BUCKET, 0.0, "held_out"))


def test_the_holdout_has_its_share_and_only_grows():
    key_hash = np.array([hash64(f"{number}".encode()) for number in range(20_000)], np.uint64)
    shares = (0.0, 0.05, 0.5, 0.95)
    chosen = [is_held_out(key_hash, share) for share in shares]
    for share, held_out in zip(shares, chosen, strict=True):
        assert abs(held_out.mean() - share) < 0.015
    assert not (chosen[1] & ~chosen[2]).any() and not chosen[0].any()
    with pytest.raises(ValueError, match=r"share in \[0, 1\), got 1"):
        is_held_out(key_hash, 1.0)


def test_the_entry_is_in_the_index(tmp_path):
    entry = make_latents(tmp_path).shards[1]
    data = open_store(tmp_path).read(entry.index)
    assert ShardIndex(data).entry(data) == entry
    assert index_name("a/b.tar") == "a/b.index.safetensors"
    with pytest.raises(IndexFileError, match="expected 9 samples, got 6"):
        load_index(open_store(tmp_path), dataclasses.replace(entry, count=9))
