"""The loader: the plan's samples in order, with any workers; the settings; workers that start and end."""

import dataclasses
import hashlib
import os
import signal
import subprocess
import sys
import time
from fractions import Fraction
from pathlib import Path

import pytest
import torch

from latte_scale import settings as settings_reader
from latte_scale.data.batches import MicroBatch
from latte_scale.data.items import LoaderError
from latte_scale.data.loader import (
    DataSettings,
    Loader,
    SourceSettings,
    data_fingerprint,
    make_plan,
    open_datasets,
    plan_data,
    resolve_settings,
)
from latte_scale.data.samples import open_dataset
from latte_scale.data.schema import Manifest, ManifestError, save_manifest
from latte_scale.data.shards import LatentSample
from latte_scale.store import open_store
from tests.data.loading import GLOBAL_BATCH, SEED, ids, keys, load, load_held_out
from tests.data.making import (
    BUCKET,
    OTHER_BUCKET,
    SIDE,
    VIDEO,
    More,
    latent_sample,
    make_latents,
    make_videos,
    write_shards,
)


def test_the_order_is_the_plans_for_any_workers_ranks_micro_batch_and_start(tmp_path):
    make_latents(tmp_path, every_other_bucket=3)
    golden = ids(load(tmp_path, 6))
    assert len({name for step in golden for name in step}) == 20
    assert ids(load(tmp_path, 6, num_workers=1)) == ids(load(tmp_path, 6, num_workers=2)) == golden
    assert ids(load(tmp_path, 6, micro_batch=1)) == ids(load(tmp_path, 6, micro_batch=100)) == golden
    assert ids(load(tmp_path, 2, start_step=4, num_workers=2)) == golden[4:]
    for size in (2, 3, 7):
        ranks = [load(tmp_path, 6, rank=rank, size=size, micro_batch=2) for rank in range(size)]
        assert len({len(step) for rank in ranks for step in rank}) == 1
        joined = [[name for rank in ranks for name in ids(rank)[step]] for step in range(6)]
        assert joined == golden


def test_sizes_of_different_cost_have_batches_and_micro_batches_to_match(tmp_path):
    """8 of the one and 4 of the other cost the same; 3 of the one fit at a time, or 1 of the other."""
    make_latents(tmp_path / "clips", every_other_bucket=3)
    images = [latent_sample(number, bucket=f"1x{SIDE}x{(1 + number % 2) * SIDE}") for number in range(30)]
    manifest = make_latents(tmp_path / "images", bucket=f"1x{SIDE}x{SIDE}")
    save_manifest(open_store(tmp_path / "images"), replace_shards(tmp_path / "images", manifest, images))
    options = {"costs": {BUCKET: Fraction(1), OTHER_BUCKET: Fraction(2)}, "global_batch": 8}
    options |= {"images": tmp_path / "images", "num_images": 2}
    golden = load(tmp_path / "clips", 9, **options)
    shapes = {step[0].bucket: [len(batch.index_B) for batch in step] for step in golden}
    assert shapes == {BUCKET: [3, 3, 3], OTHER_BUCKET: [1, 1, 1, 1]}
    assert len({name for step in ids(golden) for name in step}) == 20
    for other in ({"num_workers": 2}, {"micro_batch": 8}, {"micro_batch": 1}):
        found = load(tmp_path / "clips", 9, **options, **other)
        assert (ids(found), image_ids(found)) == (ids(golden), image_ids(golden))
    assert ids(load(tmp_path / "clips", 4, start_step=5, num_workers=1, **options)) == ids(golden)[5:]
    ranks = [load(tmp_path / "clips", 9, rank=rank, size=3, **options) for rank in range(3)]
    assert [[name for rank in ranks for name in ids(rank)[step]] for step in range(9)] == ids(golden)
    assert [[name for rank in ranks for name in image_ids(rank)[step]] for step in range(9)] == image_ids(golden)
    with pytest.raises(ValueError, match=f"bucket {OTHER_BUCKET}: 4 samples cost as much as train.global_batch 8"):
        load(tmp_path / "clips", size=5, **options)


def replace_shards(folder: Path, manifest: Manifest, samples: list[LatentSample]) -> Manifest:
    """The manifest with other samples, which are written."""
    return dataclasses.replace(manifest, shards=write_shards(open_store(folder), "latents", samples, 10))


def image_ids(steps: list[list[MicroBatch]]) -> list[list[list[str]]]:
    return [[row for batch in step for row in batch.image_ids if row[0]] for step in steps]


@pytest.mark.parametrize(("size", "micro_batch"), [(1, 12), (1, 4), (2, 4), (3, 8)])
def test_groups_of_consecutive_samples_stay_in_one_micro_batch(tmp_path, size, micro_batch):
    make_latents(tmp_path)
    golden = ids(load(tmp_path, 3, global_batch=12))
    options = {"global_batch": 12, "micro_batch": micro_batch, "group": 4, "size": size}
    ranks = [load(tmp_path, 3, num_workers=rank % 2, rank=rank, **options) for rank in range(size)]
    assert len({len(step) for rank in ranks for step in rank}) == 1
    for step in (step for rank in ranks for step in rank):
        for batch in step:
            groups = batch.index_B.view(-1, 4)
            assert torch.equal(groups[groups[:, 0] >= 0] % 4, torch.arange(4).repeat(int((groups[:, 0] >= 0).sum()), 1))
            assert (groups[groups[:, 0] < 0] == -1).all()
    assert [[name for rank in ranks for name in ids(rank)[step]] for step in range(3)] == golden


def test_groups_that_do_not_fit_are_refused(tmp_path):
    make_latents(tmp_path)
    for options, words in (({"global_batch": 10}, "global_batch 10"), ({"micro_batch": 6}, "micro_batch 6")):
        with pytest.raises(ValueError, match=rf"train\.{words} is not a multiple of 4"):
            load(tmp_path, **{"global_batch": 12, "micro_batch": 4, "group": 4, **options})


def test_the_two_sides_of_the_holdout_are_disjoint_and_whole(tmp_path):
    make_latents(tmp_path, num_samples=40)
    train = {key for step in keys(load(tmp_path, 12, holdout=0.3)) for key in step}
    held_out = {key for step in keys(load_held_out(tmp_path, 12, 0.3)) for key in step}
    assert train | held_out == set(range(40)) and not train & held_out
    assert 4 < len(held_out) < 20


def test_weighted_data_sets(tmp_path):
    make_latents(tmp_path / "a", num_samples=6)
    manifest = make_latents(tmp_path / "b", num_samples=20)
    urls = (SourceSettings(str(tmp_path / "a"), 1.0), SourceSettings(str(tmp_path / "b"), 3.0))
    for step in ids(load(urls, 5, global_batch=8)):
        assert sum(name.startswith(manifest.fingerprint()[:8]) for name in step) == 6
    plain = ids(load((str(tmp_path / "a"), str(tmp_path / "b")), 13, global_batch=2))
    assert len({name for step in plain for name in step}) == 26


def test_data_sets_that_do_not_fit_together_are_refused(tmp_path):
    make_latents(tmp_path / "a")
    make_latents(tmp_path / "b", with_std=True)
    make_videos(tmp_path / "c", num_samples=1)
    make_latents(tmp_path / "d", more=More(class_names=("cat", "dog")))
    make_latents(tmp_path / "e", more=More(with_text=False))
    for other, what in (("b", "latents"), ("c", "kind"), ("d", "class_names"), ("e", r"text\.sha256")):
        with pytest.raises(ManifestError, match=rf"/a and .*/{other} cannot be mixed: {what}: "):
            open_datasets(DataSettings((str(tmp_path / "a"), str(tmp_path / other))))


def test_settings_read_every_form_and_judge_themselves(tmp_path):
    path = tmp_path / "data.yaml"
    path.write_text("url:\n- a\n- {url: b}\nholdout: 0.1\n")
    found = settings_reader.load(DataSettings, path)
    assert found.sources() == (SourceSettings("a"), SourceSettings("b"))
    assert settings_reader.from_mapping(DataSettings, settings_reader.to_mapping(found)) == found
    path.write_text("url: a\n")
    assert settings_reader.load(DataSettings, path).sources() == (SourceSettings("a"),)
    path.write_text("url:\n- {url: a, wait: 0.5}\n")
    with pytest.raises(ValueError, match=r"data\.yaml: url"):
        settings_reader.load(DataSettings, path)
    for wrong in ({"num_workers": -1}, {"prefetch": 0}, {"holdout": 1.0}, {"shuffle_window": 0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            DataSettings(**{"url": "a", **wrong})
    for empty in ("", (), ("a", ""), ("a", SourceSettings(""))):  # a variable of a script that was not set, say
        with pytest.raises(ValueError, match="url names an empty place"):
            DataSettings(empty)


def test_held_out_samples_come_once_each_whatever_weight_their_data_set_has(tmp_path):
    for name in ("a", "b"):
        make_latents(tmp_path / name)
    sources = tuple(SourceSettings(str(tmp_path / name), weight) for name, weight in (("a", 0.9), ("b", 0.1)))
    settings = DataSettings(sources, holdout=0.5)
    datasets = open_datasets(settings)
    assert [data.weight for data in plan_data(settings, datasets)] == [0.9, 0.1]
    held_out = plan_data(settings, datasets, "held_out")
    assert [data.weight for data in held_out] == [None, None] and all(data.num_samples for data in held_out)


def test_another_image_set_is_other_data(tmp_path):
    make_latents(tmp_path / "clips")
    for name, size in (("images", 6), ("others", 7)):
        make_latents(tmp_path / name, num_samples=size, bucket=f"1x{BUCKET.partition('x')[2]}")
    settings = DataSettings(str(tmp_path / "clips"))
    datasets = open_datasets(settings)
    plan, images = make_plan(settings, datasets, 0, 4), [open_dataset(str(tmp_path / n)) for n in ("images", "others")]
    prints = {data_fingerprint(plan, each) for each in (None, *images)}
    assert len(prints) == 3 and data_fingerprint(plan, None) == plan.fingerprint


def test_with_clips_of_several_sizes_an_image_set_is_in_an_order_of_its_own(tmp_path):
    """Runs that began when each size passed over the images of the others' steps are told that the order is another."""
    make_latents(tmp_path / "clips", every_other_bucket=2)
    settings = DataSettings(str(tmp_path / "clips"))
    datasets = open_datasets(settings)
    plan = make_plan(settings, datasets, 0, 4)
    before = hashlib.sha256(f"{plan.fingerprint}/{datasets[0].manifest.fingerprint()}".encode()).hexdigest()
    assert data_fingerprint(plan, datasets[0]) != before


def test_the_shuffle_window_is_resolved_once(tmp_path):
    make_latents(tmp_path)
    settings = DataSettings(str(tmp_path), holdout=0.2)
    datasets = open_datasets(settings)
    resolved = resolve_settings(settings, datasets)
    assert resolved.shuffle_window == make_plan(settings, datasets, 0, 4).num_samples < 20
    assert resolve_settings(resolved, datasets) == resolved
    chosen = dataclasses.replace(settings, shuffle_window=5)
    assert resolve_settings(chosen, datasets).shuffle_window == 5
    plans = [make_plan(each, datasets, 0, 4).fingerprint for each in (settings, resolved, chosen)]
    assert plans[0] == plans[1] != plans[2]


def test_a_batch_smaller_than_the_world_is_refused(tmp_path):
    make_latents(tmp_path)
    with pytest.raises(ValueError, match="global_batch 7 is smaller than the 8 data-parallel ranks"):
        load(tmp_path, size=8, rank=3)


def test_workers_outlive_the_signals_that_stop_a_run(tmp_path):
    make_latents(tmp_path)
    settings = DataSettings(str(tmp_path), 2)
    datasets = open_datasets(settings)
    plan = make_plan(settings, datasets, SEED, GLOBAL_BATCH)
    with Loader(settings, datasets, VIDEO, plan, seed=SEED, micro_batch=3) as loader:
        found = [next(loader)[1]]
        pids = [worker.pid for worker in loader._iterator._workers]
        for pid in pids:
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
                os.kill(pid, number)
        found += [next(loader)[1] for _ in range(5)]
    assert ids(found) == ids(load(tmp_path, 6))
    deadline = time.monotonic() + 10
    while any(os.path.exists(f"/proc/{pid}") for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(os.path.exists(f"/proc/{pid}") for pid in pids)


def test_a_loader_that_is_never_closed_does_not_hold_up_the_end_of_the_program(tmp_path):
    """Workers ignore SIGTERM, which is what Python sends them at exit before it waits for them."""
    make_latents(tmp_path)
    program = f"""
from latte_scale.data.loader import DataSettings, Loader, make_plan, open_datasets
from tests.data.making import VIDEO
settings = DataSettings({str(tmp_path)!r}, 2)
datasets = open_datasets(settings)
loader = Loader(settings, datasets, VIDEO, make_plan(settings, datasets, 5, 7), seed=5, micro_batch=3)
next(loader)
kept = iter(loader._iterator)
raise SystemExit(7)
"""
    root = Path(__file__).resolve().parents[2]
    assert subprocess.run([sys.executable, "-c", program], cwd=root, timeout=60).returncode == 7


def test_a_closed_loader_says_so(tmp_path):
    make_latents(tmp_path)
    settings = DataSettings(str(tmp_path), 1)
    datasets = open_datasets(settings)
    loader = Loader(settings, datasets, VIDEO, make_plan(settings, datasets, SEED, 7), seed=SEED, micro_batch=3)
    next(loader)
    (worker,) = loader._workers
    loader.close()
    loader.close()
    assert not worker.is_alive()
    with pytest.raises(LoaderError, match="closed"):
        next(loader)


def test_the_global_generator_is_left_alone(tmp_path):
    make_latents(tmp_path)
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    load(tmp_path, 1, num_workers=1)
    assert torch.rand(1) == expected
