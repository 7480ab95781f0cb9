"""How much of its data a run will use, computed before it starts: for every bucket, clips used and left over.

In: a plan and a number of steps. Out: a line for each bucket of each data set, exact and in closed form: nothing is
read and no step is simulated. The end of an epoch leaves nothing over, as a bucket's stream continues into the next;
the clips left over are those that the run's steps do not reach.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from latte_scale.data.buckets import num_latents
from latte_scale.data.plan import Plan
from latte_scale.data.samples import Dataset
from latte_scale.data.schema import RAW_BUCKET
from latte_scale.data.sizes import TOO_SHORT


@dataclass(frozen=True)
class Coverage:
    """One bucket of one data set over a whole run."""

    bucket: str
    dataset: str  # its URL
    clips: int  # that take part; in bucket TOO_SHORT, those that cannot
    held_out: int  # clips that data.holdout keeps from training
    batch: int  # samples of a step of this bucket, from all data sets
    steps: int  # of this bucket
    drawn: int  # samples of these steps from this data set
    used: int  # clips drawn at least once
    left_over: int  # clips never drawn

    @property
    def epochs(self) -> float:
        """How often each clip is drawn."""
        return self.drawn / self.clips


def coverage(plan: Plan, datasets: Sequence[Dataset], steps: int) -> list[Coverage]:
    """The data of steps 0 to `steps`: buckets in the plan's order, data sets in theirs; last, clips of no size."""
    rows, of_bucket = [], plan.steps_before(steps)
    for bucket in plan.buckets:
        for number, drawn in plan.drawn_before(steps, bucket).items():
            clips = int(plan.datasets[number].counts[bucket].sum())
            stored = datasets[number].buckets[bucket]
            rows.append(
                Coverage(
                    bucket,
                    datasets[number].store.url,
                    clips,
                    stored - clips,
                    plan.batch_size(bucket),
                    of_bucket[bucket],
                    drawn,
                    used=min(clips, drawn),
                    left_over=clips - min(clips, drawn),
                )
            )
    short = [(dataset.store.url, dataset.num_too_short) for dataset in datasets]
    return rows + [Coverage(TOO_SHORT, url, count, 0, 0, 0, 0, 0, left_over=count) for url, count in short if count]


def coverage_table(rows: Sequence[Coverage], steps: int) -> str:
    """The rows as a text table, with the sum and the warnings below."""
    names = {row.dataset: f"{number}" for number, row in enumerate({row.dataset: row for row in rows}.values())}
    titles = f"{'bucket':<14}{'data':>5}{'clips':>15}{'held out':>10}{'batch':>8}{'steps':>12}{'latents a step':>16}"
    lines = [f"{titles}{'drawn':>15}{'used':>15}{'left over':>15}{'epochs':>9}"]
    for row in rows:
        latents = "" if row.bucket in (RAW_BUCKET, TOO_SHORT) else f"{row.batch * num_latents(row.bucket):,}"
        plan = f"{row.clips:>15,}{row.held_out:>10,}{row.batch:>8,}{row.steps:>12,}{latents:>16}"
        found = f"{row.drawn:>15,}{row.used:>15,}{row.left_over:>15,}{row.epochs:>9.2f}"
        lines.append(f"{row.bucket:<14}{names[row.dataset]:>5}{plan}{found}")
    lines += [f"data {name}: {url}" for url, name in names.items()]
    clips, used = sum(row.clips for row in rows), sum(row.used for row in rows)
    lines.append(f"{steps:,} steps use {used:,} of {clips:,} clips, {clips - used:,} left over")
    return "\n".join([*lines, *warnings(rows)])


def warnings(rows: Sequence[Coverage]) -> list[str]:
    """Lines about buckets that are probably not intended."""
    lines = []
    for bucket in dict.fromkeys(row.bucket for row in rows):
        own = [row for row in rows if row.bucket == bucket]
        clips, batch = sum(row.clips for row in own), own[0].batch
        if bucket == TOO_SHORT:
            lines.append(f"warning: {clips:,} clips are too short for every size and are left out")
        elif own[0].steps == 0:
            lines.append(f"warning: bucket {bucket} has no step at all; raise train.steps, or leave its size out")
        elif clips < batch:
            lines.append(f"warning: bucket {bucket} has {clips:,} clips for steps of {batch:,}: a step has some twice")
    return lines


def image_lines(plans: Mapping[str, Plan], clips: Plan, steps: int) -> list[str]:
    """Lines on an image set of joint training: bucket of clips -> plan of their images (`image_plans`)."""
    lines = []
    for bucket, plan in plans.items():
        drawn, num_images = plan.samples_before(clips.steps_before(steps)[bucket]), plan.num_samples
        used = min(drawn, num_images)
        lines.append(
            f"data.images, with clips of bucket {bucket}: {drawn:,} drawn ({drawn / num_images:.2f} epochs) use "
            f"{used:,} of {num_images:,} images, {num_images - used:,} left over"
        )
    return lines


def coverage_json(rows: Sequence[Coverage], steps: int) -> str:
    """The same for programs: {"steps", "rows": [...]}."""
    content = {"steps": steps, "rows": [dataclasses.asdict(row) for row in rows]}
    return json.dumps(content, indent=1) + "\n"
