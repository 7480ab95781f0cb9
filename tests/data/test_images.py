"""Images of joint training: which they are, what comes with them, and that nothing else changes."""

import itertools
import shutil
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch

from latte_scale import rng
from latte_scale.data.images import image_bucket, image_set
from latte_scale.data.loader import DataSettings, open_datasets, open_images
from latte_scale.data.plan import Plan, PlanData
from latte_scale.data.schema import Manifest, ManifestError, VideoSettings, save_manifest
from latte_scale.store import open_store
from tests.data.loading import SEED, ids, load, load_held_out
from tests.data.making import (
    BUCKET,
    CHANNELS,
    NULL,
    SIDE,
    VIDEO,
    WIDTH,
    More,
    frame_grey,
    latent_sample,
    make_latents,
    make_videos,
    write_shards,
)

IMAGES = f"1x{SIDE}x{SIDE}"
NAMES = ("ant", "bee", "cat")


def filled(steps):
    """(micro-batch, row, global index) of every filled slot."""
    for batch in itertools.chain(*steps):
        for row, index in enumerate(batch.index_B.tolist()):
            if index >= 0:
                yield batch, row, index


def image_numbers(steps) -> dict[tuple[int, int], list[int]]:
    """(step, index) -> the keys of its images."""
    return {
        (batch.step, index): [int(name[-6:]) for name in batch.image_ids[row]] for batch, row, index in filled(steps)
    }


def test_without_images_a_micro_batch_has_none(tmp_path):
    make_latents(tmp_path)
    batch = load(tmp_path, 1)[0][0]
    assert batch.image_ids == [] and all(
        vars(batch)[name] is None for name in vars(batch) if name.startswith("image_m")
    )
    assert batch.image_label_BN is None and batch.image_text_BNLD is None and batch.image_dropped_B is None


@pytest.mark.parametrize("num_workers", [0, 2])
def test_images_of_the_clip_are_frames_that_its_place_draws(tmp_path, num_workers):
    clips = [replace(latent_sample(n, more=More(class_names=NAMES)), latents=by_frame(n)) for n in range(8)]
    manifest = make_latents(tmp_path, with_std=True, more=More(class_names=NAMES))
    shards = write_shards(open_store(tmp_path), "latents", clips)
    save_manifest(open_store(tmp_path), Manifest(**{**vars(manifest), "shards": shards}))
    plain, steps = load(tmp_path, 4), load(tmp_path, 4, num_workers, num_images=3)
    assert ids(plain) == ids(steps)
    frames = set()
    for batch, row, index in filled(steps):
        assert batch.image_mean_BNCHW.shape == (3, 3, CHANNELS, SIDE, SIDE) == batch.image_std_BNCHW.shape
        assert batch.image_mean_BNCHW.dtype == torch.float16 and batch.image_captions is None
        drawn = [int(rng.uniform(SEED, "image_frame", batch.step, index, j) * 2) for j in range(3)]
        assert batch.image_ids[row] == [f"{batch.sample_ids[row]}#{frame}" for frame in drawn]
        assert torch.equal(batch.image_mean_BNCHW[row], batch.mean_BFCHW[row, drawn])
        assert torch.equal(batch.image_std_BNCHW[row], batch.std_BFCHW[row, drawn])
        assert batch.image_label_BN[row].tolist() == [int(batch.label_B[row])] * 3
        assert batch.image_text_BNLD is None and batch.image_mask_BNL is None
        frames |= set(drawn)
    assert frames == {0, 1}
    last = steps[0][-1]
    assert last.index_B.tolist() == [6, -1, -1] and not last.image_mean_BNCHW[1:].any()
    assert last.image_ids[1] == ["", "", ""] and (last.image_label_BN[1:] == -1).all()


def by_frame(number: int) -> bytes:
    """Latents whose frames differ."""
    from safetensors.numpy import save

    frames = np.arange(2, dtype=np.float16).reshape(2, 1, 1, 1) / 8
    mean = np.full((2, CHANNELS, SIDE, SIDE), number, np.float16) + frames
    return save({"mean": mean, "std": mean / 2})


def test_frames_of_raw_clips(tmp_path):
    make_videos(tmp_path, num_frames=12)
    video = VideoSettings(3, 16, 24, 2)
    for batch, row, index in filled(load(tmp_path, 3, video=video, num_images=2)):
        assert batch.image_pixels_BNCHW.shape == (3, 2, 3, 16, 24) and batch.image_pixels_BNCHW.dtype == torch.uint8
        drawn = [int(rng.uniform(SEED, "image_frame", batch.step, index, j) * 3) for j in range(2)]
        assert torch.equal(batch.image_pixels_BNCHW[row], batch.pixels_BFCHW[row, drawn])
        assert batch.image_mean_BNCHW is None


@pytest.fixture
def sets(tmp_path):
    """Clips and images with captions and classes; sample numbers of the images begin anew."""
    make_latents(tmp_path / "clips", with_std=True, more=More(class_names=NAMES))
    make_latents(tmp_path / "images", 17, 5, 4, with_std=True, bucket=IMAGES, more=More(class_names=NAMES))
    return tmp_path / "clips", tmp_path / "images"


def test_a_step_of_another_size_has_images_for_its_own_number_of_clips(sets):
    """With train.batch_budget=tokens a step of small clips has more of them, and images run on without a gap."""
    counts = {"2x8x8": np.array([30]), "2x4x4": np.array([30])}
    plan = Plan([PlanData(counts, "x")], SEED, 4, costs={"2x8x8": Fraction(1), "2x4x4": Fraction(1, 4)})
    images = open_datasets(DataSettings(str(sets[1])))[0]
    images.counts = lambda *_: {"1x8x8": np.array([50]), "1x4x4": np.array([50])}
    made = image_set(images, plan, 3, VIDEO, 0.0, "train", SEED, "rank 0 of 1")
    assert {name: reader.plan.global_batch for name, reader in made.readers.items()} == {"2x8x8": 12, "2x4x4": 48}


def test_an_image_set_follows_a_plan_of_its_own(sets):
    clips, images = sets
    steps = load(clips, 9, images=images, num_images=3)
    assert ids(steps) == ids(load(clips, 9))
    dataset = open_datasets(DataSettings(str(images)))[0]
    data = PlanData(dataset.counts(0.0, "train"), f"{dataset.manifest.fingerprint()}/train/0.0")
    plan = Plan([data], SEED, 7 * 3)
    expected = {
        (step, index): [sample.shard * 5 + sample.row for sample in plan.batch(step).ids[3 * index : 3 * index + 3]]
        for step in range(9)
        for index in range(7)
    }
    found = image_numbers(steps)
    assert found == expected
    stream = [number for place in sorted(found) for number in found[place]]
    assert set(stream[:17]) == set(stream[17:34]) == set(range(17))  # every image once an epoch
    for options in ({"num_workers": 2}, {"micro_batch": 1}, {"start_step": 0, "micro_batch": 100}):
        assert image_numbers(load(clips, 9, images=images, num_images=3, **options)) == expected
    ranks = [image_numbers(load(clips, 9, images=images, num_images=3, rank=rank, size=2)) for rank in range(2)]
    assert {**ranks[0], **ranks[1]} == expected
    assert image_numbers(load(clips, 2, images=images, num_images=3, start_step=7)).items() <= expected.items()


def test_images_bring_their_own_arrays_class_and_caption(sets):
    clips, images = sets
    names = {}
    for batch, row, index in filled(load(clips, 6, images=images, num_images=2, caption_drop=0.5)):
        dropped = rng.uniform(SEED, "caption_drop", batch.step, index, 1) < 0.5  # one draw for both
        assert bool(batch.image_dropped_B[row]) == dropped
        assert batch.image_text_BNLD.shape == (3, 2, batch.image_mask_BNL.shape[2], WIDTH)
        for j, name in enumerate(batch.image_ids[row]):
            number = int(name[-6:])
            assert name.split("/")[0] == open_datasets(DataSettings(str(images)))[0].manifest.fingerprint()[:8]
            assert (batch.image_mean_BNCHW[row, j] == number).all() and (batch.image_std_BNCHW[row, j] == 0.5).all()
            assert batch.image_label_BN[row, j] == number % 3
            assert batch.image_captions[row][j] == f"caption {number % 4}"
            length = 1 + number % 4
            assert batch.image_mask_BNL[row, j].sum() == length
            assert (batch.image_text_BNLD[row, j, :length] == (NULL if dropped else number % 4 + 1)).all()
            assert not batch.image_text_BNLD[row, j, length:].any()
        names[dropped, bool(batch.dropped_B[row])] = True
    assert len(names) == 4  # the draws of clip and images are apart


def test_images_of_an_empty_slot_are_zeros_with_one_token(sets):
    clips, images = sets
    last = load(clips, 1, images=images, num_images=2)[0][-1]
    assert last.index_B.tolist() == [6, -1, -1]
    assert not last.image_mean_BNCHW[1:].any() and not last.image_text_BNLD[1:].any()
    assert last.image_mask_BNL[1:].sum(2).tolist() == [[1, 1], [1, 1]] and last.image_mask_BNL[1:, :, 0].all()
    assert last.image_captions[1:] == [["", ""], ["", ""]] and not last.image_dropped_B[1:].any()


def test_raw_images_come_from_files_of_any_length(tmp_path):
    make_videos(tmp_path / "clips", num_frames=12)
    make_videos(tmp_path / "images", 4, num_frames=1)
    video = VideoSettings(3, 16, 16, 2, window=8, sampling="linspace")
    for batch, row, _ in filled(load(tmp_path / "clips", 2, video=video, images=tmp_path / "images", num_images=2)):
        greys = batch.image_pixels_BNCHW[row].float().mean(dim=(1, 2, 3))
        np.testing.assert_allclose(greys, [frame_grey(0)] * 2, atol=2.5)
        captions = [f"caption {int(name[-6:])}" for name in batch.image_ids[row]]
        assert batch.image_captions[row] == captions and batch.image_text_BNLD is None


def test_a_damaged_image_is_replaced_and_moves_nothing_else(sets):
    clips, images = sets
    golden = load(clips, 5, images=images, num_images=2)
    store = open_store(images)
    span = open_datasets(DataSettings(str(images)))[0].index(0).row(3).fields["latents"]
    data = bytearray(store.read("shard-000000.tar"))
    data[span.offset + span.size - 1] ^= 1
    store.write("shard-000000.tar", bytes(data))
    steps = load(clips, 5, images=images, num_images=2)
    before, after = image_numbers(golden), image_numbers(steps)
    bad = {(place, j) for place, numbers in before.items() for j, number in enumerate(numbers) if number == 3}
    moved = {(place, j) for place in before for j in range(2) if before[place][j] != after[place][j]}
    reports = [replaced for step in steps for batch in step for replaced in batch.replaced]
    assert moved == bad and bad
    assert {((report.step, report.index), report.image) for report in reports} == bad
    assert ids(steps) == ids(golden) and 3 not in itertools.chain(*after.values())
    store.delete("shard-000002.tar")
    with pytest.raises(OSError, match=r"rank 0 of 1, step \d, index \d, image \d, shard shard-000002\.tar"):
        load(clips, 5, images=images, num_images=2)


def images_of_two_sizes(folder: Path) -> None:
    """Five of SIDE x SIDE, and five that are wide, whose keys begin at 100."""
    manifest = make_latents(folder, bucket=IMAGES)
    wide = [latent_sample(n, bucket=f"1x{SIDE}x{2 * SIDE}", key=f"{100 + n:06d}") for n in range(5)]
    shards = write_shards(open_store(folder), "latents", [*(latent_sample(n, bucket=IMAGES) for n in range(5)), *wide])
    save_manifest(open_store(folder), Manifest(**{**vars(manifest), "shards": shards}))


def test_every_size_of_clips_takes_images_of_its_size(tmp_path):
    make_latents(tmp_path / "clips", every_other_bucket=3)
    make_latents(tmp_path / "images", bucket=IMAGES)
    with pytest.raises(ManifestError, match=r"bucket: expected 1x3x6, got none; make the images as the clips"):
        load(tmp_path / "clips", images=tmp_path / "images", num_images=1)
    images_of_two_sizes(tmp_path / "images")
    seen = set()
    for batch, row, _ in filled(load(tmp_path / "clips", 8, images=tmp_path / "images", num_images=2)):
        assert batch.image_mean_BNCHW.shape[3:] == batch.mean_BFCHW.shape[3:]
        assert all((int(name[-6:]) >= 100) == (batch.bucket != BUCKET) for name in batch.image_ids[row])
        seen.add(batch.bucket)
    assert len(seen) == 2
    assert (image_bucket("16x32x64"), image_bucket("raw")) == ("1x32x64", "raw")


def test_each_size_goes_through_all_its_images_before_one_comes_again(tmp_path):
    """A size passed over the images of the other sizes' steps: of five some came four times before others came."""
    make_latents(tmp_path / "clips", every_other_bucket=3)
    images_of_two_sizes(tmp_path / "images")
    options = {"images": tmp_path / "images", "num_images": 2, "global_batch": 2}
    before = image_numbers(load(tmp_path / "clips", 20, **options))
    for is_wide in (False, True):
        stream = [number for place in sorted(before) for number in before[place] if (number >= 100) == is_wide]
        epochs = [set(stream[first : first + 5]) for first in range(0, len(stream) - 4, 5)]
        assert len(epochs) > 4 and all(len(epoch) == 5 for epoch in epochs)
    store, dataset = open_store(tmp_path / "images"), open_datasets(DataSettings(str(tmp_path / "images")))[0]
    span = dataset.index(0).row(3).fields["latents"]
    data = bytearray(store.read("shard-000000.tar"))
    data[span.offset + span.size - 1] ^= 1
    store.write("shard-000000.tar", bytes(data))
    after = image_numbers(load(tmp_path / "clips", 20, **options))
    for place, numbers in before.items():
        for old, new in zip(numbers, after[place], strict=True):
            assert new == old if old != 3 else new in (0, 1, 2, 4)


def test_a_holdout_that_leaves_a_size_without_images_is_told_with_the_set(tmp_path):
    make_latents(tmp_path / "clips")
    make_latents(tmp_path / "images", 1, bucket=IMAGES)
    with pytest.raises(ManifestError, match=rf"data.images: .*images: expected images of bucket {IMAGES} for train"):
        load(tmp_path / "clips", images=tmp_path / "images", num_images=1, holdout=0.9)


def test_images_that_do_not_fit_the_clips_are_refused(tmp_path):
    more = More(class_names=NAMES, mirrored=True)
    make_latents(tmp_path / "clips", more=more)
    make_videos(tmp_path / "raw")
    make_latents(tmp_path / "std", with_std=True, bucket=IMAGES, more=more)
    make_latents(tmp_path / "unnamed", bucket=IMAGES, more=More(mirrored=True))
    make_latents(tmp_path / "untexted", bucket=IMAGES, more=replace(more, with_text=False))
    make_latents(tmp_path / "plain", bucket=IMAGES, more=More(class_names=NAMES))
    make_latents(tmp_path / "long", more=more)
    manifest = make_latents(tmp_path / "images", bucket=IMAGES, more=more)
    longer = replace(manifest.text, max_length=9)
    for name, changed in (("raw text", {"caption_cleaning": "none"}), ("longer", {"text": longer})):
        shutil.copytree(tmp_path / "images", tmp_path / name)
        save_manifest(open_store(tmp_path / name), replace(manifest, **changed))
    datasets = open_datasets(DataSettings(str(tmp_path / "clips")))
    for name, words in (
        ("raw", "kind: expected latents, got video"),
        ("std", "latents: expected .*'mean'.*got .*mean_std"),
        ("unnamed", r"class_names: expected \('ant', 'bee', 'cat'\), got None"),
        ("untexted", "text.sha256: expected b+, got None"),
        ("plain", "video.hflip: expected True, got False"),
        ("long", f"bucket: expected {IMAGES}, got none"),
        ("raw text", "caption_cleaning: expected lower-strip, got none"),
        ("longer", "text.max_length: expected 6, got 9"),
        ("nowhere", "not a finished data set"),
    ):
        with pytest.raises(ManifestError, match=words):
            open_images(DataSettings("x", images=str(tmp_path / name)), datasets)
    assert open_images(DataSettings("x", images=str(tmp_path / "images")), datasets) is not None
    assert open_images(DataSettings("x"), datasets) is None
    with pytest.raises(ValueError, match="an image set needs num_images"):
        load(tmp_path / "clips", images=tmp_path / "images")


def test_a_run_without_text_takes_images_with_it(tmp_path):
    make_latents(tmp_path / "clips", more=More(class_names=NAMES, with_text=False))
    make_latents(tmp_path / "images", bucket=IMAGES, more=More(class_names=NAMES))
    for batch in itertools.chain(*load(tmp_path / "clips", 2, images=tmp_path / "images", num_images=2)):
        assert batch.image_text_BNLD is None and batch.image_label_BN.shape == (3, 2)


def test_the_holdout_keeps_images_too(sets):
    clips, images = sets
    train = image_numbers(load(clips, 12, images=images, num_images=3, holdout=0.3))
    held_out = image_numbers(load_held_out(clips, 12, 0.3, images, num_images=3))
    train, held_out = (set(itertools.chain(*numbers.values())) for numbers in (train, held_out))
    assert train | held_out == set(range(17)) and not train & held_out
