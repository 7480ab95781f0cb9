"""`latte-data verify`: finds deliberate damage, and nothing in a valid data set."""

import argparse
import dataclasses
import hashlib
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save

from data_tools import verify
from latte_scale.data.index import load_index
from latte_scale.data.schema import NULL_TEXT, ManifestError, load_manifest, save_manifest
from latte_scale.data.shards import LatentSample, ShardFile
from latte_scale.store import open_store
from tests.data.making import BUCKET, More, latent_sample, make_latents, make_videos


def run(folder: Path) -> int:
    parser = argparse.ArgumentParser()
    verify.add_arguments(parser)
    return verify.main(parser.parse_args([str(folder)]))


def test_sound_sets_pass(tmp_path, capsys):
    make_latents(tmp_path / "l", with_std=True, every_other_bucket=3)
    make_videos(tmp_path / "v")
    assert run(tmp_path / "l") == 0 and run(tmp_path / "v") == 0
    out, err = capsys.readouterr()
    assert out.splitlines() == [
        f"0 faults in 20 samples, 4 shards of {tmp_path / 'l'}",
        f"0 faults in 5 samples, 2 shards of {tmp_path / 'v'}",
    ]
    assert not err


def test_sound_sets_of_every_kind_pass(tmp_path, capsys):
    more = More(captions_each=3, class_names=("cat", "dog"), mirrored=True)
    make_latents(tmp_path / "all", with_std=True, num_captions=7, more=more)
    make_latents(tmp_path / "untexted", more=dataclasses.replace(more, with_text=False))
    assert run(tmp_path / "all") == 0 and run(tmp_path / "untexted") == 0
    assert not capsys.readouterr().err


def test_faults_of_classes_later_captions_and_mirrored_latents_are_found(tmp_path, capsys):
    more = More(captions_each=2, class_names=("cat", "dog"), mirrored=True)
    manifest = make_latents(tmp_path, num_samples=2, more=more)
    good = latent_sample(0, more=more)
    bad = save({"mean": np.full((2, 4, 3, 3), np.inf, np.float16)})
    wide = save({"embedding": np.ones((2, 9), np.float16)})
    store = open_store(tmp_path)
    with ShardFile(store, "shard-000000.tar", "latents") as shard:
        for key, change in (
            ("good", {}),
            ("class", {"label": 2}),
            ("unlabelled", {"label": None}),
            ("infinite", {"mirrored": bad}),
            ("half", {"mirrored": None}),
            ("second", {"more_captions": ("other",), "more_texts": (wide,)}),
        ):
            shard.add(dataclasses.replace(good, key=key, **change))
        entry = shard.close()
    save_manifest(store, dataclasses.replace(manifest, shards=(entry,)))
    assert run(tmp_path) == 1
    err = capsys.readouterr().err
    for fault in (
        "sample 'class': label: expected an integer from 0 to 1 (the classes of the manifest), got 2",
        "sample 'unlabelled': label: expected an integer from 0 to 1 (the classes of the manifest), got None",
        "sample 'infinite': mirrored mean: 72 numbers are NaN or infinite",
        "sample 'half': mirrored mean: expected shape (2, 4, 3, 3), got nothing",
        "sample 'second': embedding: expected [1 to 6, 5], got (2, 9)",
    ):
        assert fault in err
    assert err.count("fault ") == 5 and "good" not in err


def test_no_data_set_is_an_error(tmp_path):
    with pytest.raises(ManifestError, match=r"no manifest\.json"):
        run(tmp_path)


def flip(store, name: str, offset: int) -> None:
    data = bytearray(store.read(name))
    data[offset] ^= 1
    store.write(name, bytes(data))


@pytest.mark.parametrize("part", ["latents", "json", "text", "padding"])
def test_a_flipped_bit_anywhere_in_a_tar_is_found(tmp_path, capsys, part):
    make_latents(tmp_path, num_captions=20)
    store = open_store(tmp_path)
    row = load_index(store, load_manifest(store).shards[1]).row(2)
    offset = row.end - 1 if part == "padding" else row.fields[part].offset + 5
    flip(store, "shard-000001.tar", offset)
    assert run(tmp_path) == 1
    out, err = capsys.readouterr()
    assert "shard-000001.tar: sha256: expected" in err
    assert ("sample '000008' is damaged" in err) == (part != "padding")
    assert out.startswith(f"{1 if part == 'padding' else 2} faults")


def test_truncated_missing_and_swapped_files_are_found(tmp_path, capsys):
    make_latents(tmp_path)
    store = open_store(tmp_path)
    data = store.read("shard-000000.tar")
    store.write("shard-000000.tar", data[: len(data) // 2])
    store.delete("shard-000001.tar")
    flip(store, "shard-000002.index.safetensors", -1)
    flip(store, NULL_TEXT, -1)
    assert run(tmp_path) == 1
    err = capsys.readouterr().err
    for fault in (
        f"shard-000000.tar: size: expected {len(data)} bytes, got {len(data) // 2}",
        "sample '000005' is damaged",
        "shard-000001.tar: reading its size failed: no such file",
        "shard-000002.index.safetensors: index_sha256",
        "null-text.safetensors: sha256",
    ):
        assert fault in err
    assert "sample '000000'" not in err and "shard-000003" not in err


def test_wrong_counts_are_found(tmp_path, capsys):
    manifest = make_latents(tmp_path)
    shards = (dataclasses.replace(manifest.shards[0], buckets={BUCKET: 5, "9x9x9": 1}), *manifest.shards[1:])
    save_manifest(open_store(tmp_path), dataclasses.replace(manifest, shards=shards))
    assert run(tmp_path) == 1
    assert "samples per bucket: the manifest says" in capsys.readouterr().err


def test_wrong_shapes_and_numbers_are_found(tmp_path, capsys):
    manifest = make_latents(tmp_path, num_samples=2)
    store = open_store(tmp_path)
    bad = np.full((2, 4, 3, 3), 1, np.float16)
    bad[0, 0, 0, 0] = np.nan
    good = latent_sample(0, key="good")
    with ShardFile(store, "shard-000000.tar", "latents") as shard:
        shard.add(good)
        shard.add(LatentSample("nan", "a", BUCKET, save({"mean": bad}), good.text))
        shard.add(LatentSample("junk", "e", BUCKET, b"no arrays", b"nor these"))
        shard.add(LatentSample("small", "b", BUCKET, save({"mean": bad[:1, :, 1:]}), good.text))
        shard.add(LatentSample("wide", "c", BUCKET, good.latents, save({"embedding": np.ones((2, 9), np.float16)})))
        shard.add(LatentSample("long", "d", BUCKET, good.latents, save({"embedding": np.ones((7, 5), np.float16)})))
        entry = shard.close()
    null = save({"embedding": np.zeros((3, 5), np.float16)})
    store.write(NULL_TEXT, null)
    null_text = dataclasses.replace(manifest.null_text, sha256=hashlib.sha256(null).hexdigest())
    save_manifest(store, dataclasses.replace(manifest, shards=(entry,), null_text=null_text))
    assert run(tmp_path) == 1
    err = capsys.readouterr().err
    for fault in (
        "sample 'nan': mean: 1 numbers are NaN or infinite",
        "sample 'junk': not a safetensors file",
        "sample 'small': mean: expected shape (2, 4, 3, 3), got (1, 4, 2, 3)",
        "sample 'wide': embedding: expected [1 to 6, 5], got (2, 9)",
        "sample 'long': embedding: expected [1 to 6, 5], got (7, 5)",
        "null embedding: expected shape (6, 5), got (3, 5)",
    ):
        assert fault in err
    assert "good" not in err


def test_a_null_embedding_that_is_none_is_found(tmp_path, capsys):
    manifest = make_latents(tmp_path, num_samples=2)
    for data in (b"no arrays", save({"other": np.zeros((6, 5), np.float16)})):
        open_store(tmp_path).write(NULL_TEXT, data)
        null_text = dataclasses.replace(manifest.null_text, sha256=hashlib.sha256(data).hexdigest())
        save_manifest(open_store(tmp_path), dataclasses.replace(manifest, null_text=null_text))
        assert run(tmp_path) == 1
        assert f"fault {tmp_path}/{NULL_TEXT}: expected an embedding, got " in capsys.readouterr().err


def test_files_that_nobody_names_are_listed_but_no_fault(tmp_path, capsys):
    make_latents(tmp_path)
    open_store(tmp_path).write("shard-000099.tar", b"")
    assert run(tmp_path) == 0
    assert f"not in the manifest: {tmp_path}/shard-000099.tar" in capsys.readouterr().err


def test_what_was_damaged_on_its_way_is_no_fault(s3, capsys):
    """Of the tar and of a sample; training reads twice, too."""
    make_videos(s3.url)
    tar = r"^GET .*shard-000000\.tar "
    for kind in ("flip", "pass", "flip"):  # the whole tar, again, its first sample
        s3.fail(kind, match=tar, at=700)
    assert run(s3.url) == 0
    assert not any(fault.times for fault in s3.proxy.faults)
    assert capsys.readouterr().out.startswith("0 faults in ")
