"""The coverage report: equal to a walk through all steps, with warnings where a size is not trained as intended."""

import json
from collections import Counter

from latte_scale.data.buckets import bucket_costs
from latte_scale.data.coverage import Coverage, coverage, coverage_json, coverage_table, image_lines, warnings
from latte_scale.data.images import image_plans
from latte_scale.data.loader import DataSettings, SourceSettings, make_plan, open_datasets
from tests.data.making import BUCKET, OTHER_BUCKET, VIDEO, make_latents


def made(tmp_path, holdout: float = 0.0):
    make_latents(tmp_path / "clips", num_samples=40, every_other_bucket=4)
    make_latents(tmp_path / "images", num_samples=25, bucket="1x3x3")
    urls = SourceSettings(str(tmp_path / "clips"), 0.75), SourceSettings(str(tmp_path / "images"), 0.25)
    settings = DataSettings(urls, holdout=holdout)
    datasets = open_datasets(settings)
    return make_plan(settings, datasets, 0, 6, costs=bucket_costs("tokens", VIDEO, datasets)), datasets


def test_every_line_is_what_the_steps_draw(tmp_path):
    plan, datasets = made(tmp_path, holdout=0.2)
    assert [plan.batch_size(bucket) for bucket in plan.buckets] == [12, 6, 3]
    for steps in (0, 1, 9, 40):
        drawn, seen, of_bucket = Counter(), {}, Counter()
        for step in range(steps):
            batch = plan.batch(step)
            of_bucket[batch.bucket] += 1
            for sample in batch.ids:
                drawn[batch.bucket, sample.dataset] += 1
                seen.setdefault((batch.bucket, sample.dataset), set()).add(sample)
        rows = coverage(plan, datasets, steps)
        assert [row.bucket for row in rows] == ["1x3x3", BUCKET, OTHER_BUCKET]
        for row in rows:
            place = row.bucket, [dataset.store.url for dataset in datasets].index(row.dataset)
            stored = datasets[place[1]].manifest.buckets[row.bucket]
            assert (row.drawn, row.used, row.steps) == (drawn[place], len(seen.get(place, ())), of_bucket[row.bucket])
            assert row.used + row.left_over == row.clips and row.clips + row.held_out == stored
            assert row.epochs == row.drawn / row.clips
        assert sum(row.held_out for row in rows) > 0
        content = json.loads(coverage_json(rows, steps))
        assert content["steps"] == steps and content["rows"][0]["left_over"] == rows[0].left_over


def test_the_table_names_data_sets_and_sums_up(tmp_path):
    plan, datasets = made(tmp_path)
    lines = coverage_table(coverage(plan, datasets, 10), 10).splitlines()
    assert lines[0].split()[:3] == ["bucket", "data", "clips"] and len(lines) == 7
    assert lines[1].split()[:3] == ["1x3x3", "0", "25"] and lines[2].split()[:3] == [BUCKET, "1", "30"]
    assert {line.split()[6] for line in lines[1:4]} == {"108"}  # latents a step: 12 x 9, 6 x 18, 3 x 36
    assert lines[4].startswith("data 0: ") and lines[4].endswith("/images")
    used = sum(row.used for row in coverage(plan, datasets, 10))
    assert lines[-1] == f"10 steps use {used} of 65 clips, {65 - used} left over"


def test_the_lines_on_an_image_set_are_what_the_steps_draw(tmp_path):
    make_latents(tmp_path, num_samples=25, bucket="1x3x3")
    settings = DataSettings(str(tmp_path))
    (images,) = open_datasets(settings)
    clips = make_plan(settings, [images], 0, 3)
    plans = image_plans(images, clips, 2, 0.0, "train", 0)
    for steps in (1, 4, 9):
        ids = [sample for step in range(steps) for sample in plans["1x3x3"].batch(step).ids]
        drawn, used = len(ids), len(set(ids))
        assert image_lines(plans, clips, steps) == [
            f"data.images, with clips of bucket 1x3x3: {drawn} drawn ({drawn / 25:.2f} epochs) use {used} of 25 "
            f"images, {25 - used} left over"
        ]
    assert image_lines({}, clips, 9) == []


def test_sizes_that_are_never_trained_or_come_twice_in_a_step_are_told():
    def row(bucket: str, clips: int, batch: int, steps: int) -> Coverage:
        return Coverage(bucket, "x", clips, 0, batch, steps, batch * steps, 0, 0)

    rows = [row("a", 9, 4, 3), row("b", 3, 4, 3), row("c", 9, 4, 0)]
    assert warnings(rows) == [
        "warning: bucket b has 3 clips for steps of 4: a step has some twice",
        "warning: bucket c has no step at all; raise train.steps, or leave its size out",
    ]
    assert warnings([row("a", 2, 4, 3), row("a", 2, 4, 3)]) == []
