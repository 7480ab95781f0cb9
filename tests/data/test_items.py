"""Items: the caption, the window and the mirroring that the sample's place draws; classes and conditions."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch

from latte_scale import rng
from latte_scale.data.items import Draw, ItemReader, LoaderError
from latte_scale.data.loader import DataSettings, make_plan, open_datasets
from latte_scale.data.schema import Manifest, VideoSettings, save_manifest
from latte_scale.data.shards import LatentSample
from latte_scale.store import LocalStore, open_store
from tests.data.loading import SEED, load
from tests.data.making import BUCKET, VIDEO, More, embedding, latent_sample, make_latents, make_videos, write_shards


def rows(steps):
    """(micro-batch, row, sample number, global index) of every filled slot."""
    for batch in itertools.chain(*steps):
        for row, name in enumerate(batch.sample_ids):
            if name:
                yield batch, row, int(name[-6:]), int(batch.index_B[row])


@pytest.mark.parametrize("with_text", [True, False])
def test_the_caption_is_drawn_by_the_samples_place(tmp_path, with_text):
    make_latents(tmp_path, num_captions=6, more=More(captions_each=3, with_text=with_text))
    places = set()
    for batch, row, number, index in rows(load(tmp_path, 6)):
        place = int(rng.uniform(SEED, "caption", batch.step, index) * 3)
        caption = (number + place) % 6
        assert batch.captions[row] == f"caption {caption}"
        if with_text:
            length = 1 + caption % 6
            assert batch.mask_BL[row].sum() == length and (batch.text_BLD[row, :length] == caption + 1).all()
        else:
            assert batch.text_BLD is None and batch.mask_BL is None
        places.add(place)
    assert places == {0, 1, 2}


def test_ranks_and_workers_draw_the_same(tmp_path):
    make_latents(tmp_path, num_captions=6, more=More(captions_each=3, class_names=("a", "b"), mirrored=True))
    options = {"video": replace(VIDEO, hflip=True)}

    def drawn(steps):
        return {
            (batch.step, index): (batch.captions[row], batch.mean_BFCHW[row].sum().item(), int(batch.label_B[row]))
            for batch, row, _, index in rows(steps)
        }

    golden = drawn(load(tmp_path, 4, **options))
    assert len(golden) == 28 and drawn(load(tmp_path, 4, num_workers=2, **options)) == golden
    split = [drawn(load(tmp_path, 4, rank=rank, size=3, micro_batch=2, **options)) for rank in range(3)]
    assert {place: facts for part in split for place, facts in part.items()} == golden


def test_mirrored_latents_are_taken_in_half_of_the_draws(tmp_path):
    make_latents(tmp_path, with_std=True, more=More(mirrored=True))
    video = replace(VIDEO, hflip=True)
    seen = set()
    for batch, row, number, index in rows(load(tmp_path, 6, video=video)):
        mirrored = rng.uniform(SEED, "flip", batch.step, index) < 0.5
        assert (batch.mean_BFCHW[row] == (-number if mirrored else number)).all()
        assert (batch.std_BFCHW[row] == (-0.5 if mirrored else 0.5)).all()
        seen.add(mirrored)
    assert seen == {True, False}
    for batch, row, number, _ in rows(load(tmp_path, 3)):  # a run that does not mirror leaves them alone
        assert (batch.mean_BFCHW[row] == number).all()


def test_clips_are_mirrored_where_the_place_says_so(tmp_path):
    make_videos(tmp_path, num_frames=4, stripe=True)
    seen = set()
    for batch, row, _, index in rows(load(tmp_path, 3, video=VideoSettings(2, 24, 32, 1, hflip=True))):
        red = batch.pixels_BFCHW[row, 0, 0].float() - batch.pixels_BFCHW[row, 0, 2].float() > 100
        mirrored = rng.uniform(SEED, "flip", batch.step, index) < 0.5
        assert bool(red[:, -1].all()) == mirrored and bool(red[:, 0].all()) == (not mirrored)
        seen.add(mirrored)
    assert seen == {True, False}


def test_classes(tmp_path):
    names = ("ant", "bee", "cat")
    make_latents(tmp_path / "text", more=More(class_names=names))
    make_latents(tmp_path / "plain", more=More(class_names=names, with_text=False))
    make_videos(tmp_path / "raw", class_names=names)
    make_latents(tmp_path / "none")
    for folder, video in (("text", VIDEO), ("plain", VIDEO), ("raw", VideoSettings(2, 8, 8, 1)), ("none", VIDEO)):
        steps = load(tmp_path / folder, 3, video=video, caption_drop=0.5)
        for batch, row, number, _ in rows(steps):
            assert batch.label_B[row] == (-1 if folder == "none" else number % 3)
        assert 0 < sum(int(batch.dropped_B.sum()) for batch in itertools.chain(*steps)) < 21
        for batch in itertools.chain(*steps):
            assert batch.label_B.dtype == torch.int64
            assert (batch.label_B[batch.index_B < 0] == -1).all()


def test_a_class_out_of_range_stops_with_the_sample(tmp_path):
    manifest = make_latents(tmp_path, more=More(class_names=("a", "b", "c")))
    smaller = Manifest(**{**vars(manifest), "class_names": ("a", "b")})
    save_manifest(open_store(tmp_path), smaller)
    place = (
        r"rank 0 of 1, step \d, index \d, shard shard-.*sample '\d+': label: expected an integer from 0 to 1 .*got 2"
    )
    with pytest.raises(LoaderError, match=place):
        load(tmp_path)


def test_mirrored_latents_that_are_not_there_stop(tmp_path):
    make_latents(tmp_path)
    video = replace(VIDEO, hflip=True)
    with pytest.raises(LoaderError, match="no field 'mirrored'; encode the data set again"):
        load(tmp_path, 4, video=video)


def test_sound_bytes_that_are_no_latents_stop_with_the_sample(tmp_path):
    """Another tool wrote them so, and their checksum fits: no second read or replacement can help."""
    store, manifest = open_store(tmp_path), make_latents(tmp_path, num_samples=2)
    wrong = replace(latent_sample(0), latents=b"not safetensors at all")
    save_manifest(store, Manifest(**{**vars(manifest), "shards": write_shards(store, "latents", [wrong])}))
    with pytest.raises(LoaderError, match=r"rank 0 of 1, step 0.*/000000: not a safetensors file.*encode the data set"):
        load(tmp_path, 1, global_batch=1)


def test_embeddings_that_the_json_does_not_name_stop(tmp_path):
    """The index and the .json of a sample must agree on its captions."""
    store = open_store(tmp_path)
    manifest = make_latents(tmp_path, num_samples=2)
    sample = latent_sample(0)
    info = {"texts": ["text-0", "text-1"]}
    wrong = LatentSample(sample.key, sample.caption, BUCKET, sample.latents, embedding(0), info)
    save_manifest(store, Manifest(**{**vars(manifest), "shards": write_shards(store, "latents", [wrong])}))
    with pytest.raises(LoaderError, match=r"needs the embeddings \['text-0', 'text-1'\], its index points at 1"):
        load(tmp_path, 1, global_batch=1)


def test_an_image_of_a_joint_batch_draws_numbers_of_its_own(tmp_path):
    make_videos(tmp_path, num_frames=12)
    settings = DataSettings(str(tmp_path))
    datasets = open_datasets(settings)
    plan = make_plan(settings, datasets, SEED, 4)
    reader = ItemReader(datasets, VideoSettings(1, 8, 8, 1), plan, 0.0, "train", SEED, "rank 0 of 1")
    sample_id = plan.batch(3).ids[2]
    greys = [reader.item(Draw(3, 2, sub), "raw", sample_id, 2, []).pixels_FCHW.mean() for sub in range(6)]
    expected = [20 + 4 * int(rng.uniform(SEED, "window", 3, 2, sub) * 12) for sub in range(6)]
    np.testing.assert_allclose(greys, expected, atol=2.5)
    assert len(set(expected)) > 2


def test_a_sample_that_was_damaged_on_its_way_is_read_again_past_every_cache(tmp_path, monkeypatch):
    make_latents(tmp_path)
    expected, read, fresh_reads = load(tmp_path), LocalStore.read, []

    def from_a_bad_cache(self, name, offset=0, size=None, fresh=False):
        data = read(self, name, offset, size, fresh)
        fresh_reads.extend([name] * fresh)
        return data if fresh or not name.endswith(".tar") else data[:-600] + bytes(600)

    monkeypatch.setattr(LocalStore, "read", from_a_bad_cache)
    for step, golden in zip(load(tmp_path), expected, strict=True):
        for batch, other in zip(step, golden, strict=True):
            assert batch.sample_ids == other.sample_ids and not batch.replaced
            assert torch.equal(batch.mean_BFCHW, other.mean_BFCHW)
    assert fresh_reads
