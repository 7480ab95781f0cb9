"""Whole clips of several sizes: sorted by the index alone, decoded in their size, the same on any ranks and workers."""

import itertools
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from latte_scale.data.buckets import bucket_costs, sizes_of
from latte_scale.data.coverage import coverage, coverage_table
from latte_scale.data.loader import DataSettings, make_plan, open_datasets, open_images
from latte_scale.data.schema import ClipSize, ManifestError, VideoSettings
from latte_scale.data.shares import slots
from tests.data.loading import DOWNSCALE, SEED, ids, load
from tests.data.making import frame_grey, make_sized_videos, make_videos
from tests.data.plans import EXAMPLES

VIDEO = VideoSettings(4, 16, 16, 2, more_sizes=(ClipSize(4, 16, 32), ClipSize(1, 32, 32)))
SQUARE, WIDE, STILL, SHORT = (9, 48, 48), (9, 32, 64), (1, 48, 48), (5, 48, 48)
BUCKETS = {SQUARE: "4x2x2", WIDE: "4x2x4", STILL: "1x4x4", SHORT: "1x4x4"}
CLIPS = [SQUARE, WIDE, SQUARE, STILL, WIDE, SQUARE, WIDE, SHORT, SQUARE, WIDE, SQUARE]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("clips")
    make_sized_videos(path, CLIPS)
    return path


def opened(folder, video=VIDEO, holdout: float = 0.0):
    settings = DataSettings(str(folder), holdout=holdout)
    return settings, open_datasets(settings, sizes=sizes_of(video, DOWNSCALE))


def test_each_clip_has_the_size_that_fits_it(folder):
    seen = set()
    for batch in itertools.chain(*load(folder, 12, video=VIDEO, micro_batch=2)):
        frames, height, width = (int(part) for part in batch.bucket.split("x"))
        assert batch.pixels_BFCHW.shape == (2, frames, 3, 8 * height, 8 * width)
        for row, name in enumerate(batch.sample_ids):
            if name:
                number = int(name[-6:])
                assert BUCKETS[CLIPS[number]] == batch.bucket and not batch.replaced
                first = batch.pixels_BFCHW[row, 0].float().mean()
                assert min(abs(first - frame_grey(start)) for start in range(9)) < 2.5
                seen.add(number)
    assert seen == set(range(len(CLIPS)))


@pytest.mark.parametrize("options", [{"num_workers": 2}, {"micro_batch": 1}, {"micro_batch": 100}])
def test_workers_and_micro_batches_change_nothing(folder, options):
    assert ids(load(folder, 6, video=VIDEO, **options)) == ids(load(folder, 6, video=VIDEO))


def test_ranks_share_the_same_samples(folder):
    whole = ids(load(folder, 6, video=VIDEO))
    ranks = [ids(load(folder, 6, video=VIDEO, rank=rank, size=3)) for rank in range(3)]
    assert [list(itertools.chain(*parts)) for parts in zip(*ranks, strict=True)] == whole
    assert ids(load(folder, 3, video=VIDEO, start_step=3)) == whole[3:]


@EXAMPLES
@given(st.data(), st.integers(1, 8), st.integers(1, 9), st.integers(0, 10**6), st.sampled_from([0.0, 0.3]))
def test_ids_of_a_step_are_the_same_on_any_ranks(folder, data, size, micro_batch, step, holdout):
    settings, datasets = opened(folder, holdout=holdout)
    costs = bucket_costs(data.draw(st.sampled_from(["samples", "tokens"])), VIDEO, datasets)
    plan = make_plan(settings, datasets, SEED, 20, costs=costs)
    whole = plan.batch(step)
    for shard, row in {(sample.shard, sample.row) for sample in whole.ids}:
        position = int(datasets[0].positions(shard, whole.bucket, holdout, "train")[row])
        assert BUCKETS[CLIPS[int(datasets[0].index(shard).key(position))]] == whole.bucket
    ranks = [slots(plan, step, rank, size, micro_batch) for rank in range(size)]
    assert [slot.id for rank in ranks for each in rank for slot in each if slot.id] == whole.ids
    assert len({tuple(len(each) for each in rank) for rank in ranks}) == 1


def test_what_is_counted_is_what_is_there(folder):
    _, (dataset,) = opened(folder)
    assert dataset.buckets == {"1x4x4": 2, "4x2x2": 5, "4x2x4": 4} and dataset.num_too_short == 0
    assert dataset.manifest.buckets == {"raw": 11}
    assert bucket_costs("tokens", VIDEO, [dataset]) == {"1x4x4": 1, "4x2x2": 1, "4x2x4": Fraction(2)}
    assert bucket_costs("samples", VIDEO, [dataset]) is None
    sides = [dataset.counts(0.5, side) for side in ("train", "held_out")]
    for bucket, counts in dataset.counts(0.0, "train").items():
        np.testing.assert_array_equal(sides[0][bucket] + sides[1][bucket], counts)
        assert counts.sum() == dataset.buckets[bucket]


def test_clips_too_short_for_every_size_are_told(folder):
    video = VideoSettings(4, 16, 16, 2, more_sizes=(ClipSize(4, 16, 32),))
    settings, datasets = opened(folder, video)
    assert datasets[0].num_too_short == 2 and set(datasets[0].buckets) == {"4x2x2", "4x2x4"}
    rows = coverage(make_plan(settings, datasets, SEED, 4), datasets, 30)
    table = coverage_table(rows, 30).splitlines()
    assert table[-2:] == [
        "30 steps use 9 of 11 clips, 2 left over",
        "warning: 2 clips are too short for every size and are left out",
    ]
    assert [line.split()[0] for line in table[1:4]] == ["4x2x2", "4x2x4", "too"]


def test_an_index_without_sizes_is_refused_in_words(tmp_path):
    make_videos(tmp_path)
    with pytest.raises(
        ManifestError, match=r"shard-000000.tar: video.more_sizes .* run `latte-data index URL --sizes`"
    ):
        load(tmp_path, video=VIDEO)
    assert ids(load(tmp_path, 2, video=VideoSettings(4, 16, 16, 2)))  # one size needs to know nothing


def test_frames_of_the_clip_are_images_of_its_size(folder):
    for batch in itertools.chain(*load(folder, 8, video=VIDEO, num_images=2)):
        assert batch.image_pixels_BNCHW.shape[2:] == batch.pixels_BFCHW.shape[2:]


def test_an_image_set_gives_each_size_the_images_that_fit_it(folder, tmp_path):
    make_sized_videos(tmp_path / "images", [(1, 48, 48), (1, 16, 32), (1, 20, 20), (1, 32, 64)])
    wide = {1, 3}
    for batch in itertools.chain(*load(folder, 8, video=VIDEO, images=tmp_path / "images", num_images=2)):
        assert batch.image_pixels_BNCHW.shape[2:] == batch.pixels_BFCHW.shape[2:]
        for names in (names for names in batch.image_ids if names[0]):
            assert all((int(name[-6:]) in wide) == (batch.bucket == "4x2x4") for name in names)
    make_sized_videos(tmp_path / "square", [(1, 48, 48), (1, 20, 20)])
    settings, datasets = opened(folder)
    with pytest.raises(ManifestError, match="bucket: expected 1x2x4, got none"):
        open_images(DataSettings(settings.url, images=str(tmp_path / "square")), datasets)


def test_an_image_set_goes_with_clips_and_stills_of_the_same_sides(tmp_path):
    """The main size as an image was taken for a size given twice, and the run did not start."""
    make_sized_videos(tmp_path / "clips", [SQUARE, STILL] * 4)
    make_sized_videos(tmp_path / "images", [STILL] * 3)
    video = VideoSettings(4, 16, 16, 2, more_sizes=(ClipSize(1, 16, 16),))
    batches = [*itertools.chain(*load(tmp_path / "clips", 6, video=video, images=tmp_path / "images", num_images=2))]
    assert {batch.bucket for batch in batches} == {"4x2x2", "1x2x2"}
    assert {batch.image_pixels_BNCHW.shape[1:] for batch in batches} == {(2, 3, 16, 16)}
