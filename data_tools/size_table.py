"""The table of sizes that `latte-data encode` prints at its end if there are several.

In: the sizes, and entries and reports of all shards. Out: one line per size with its clips, how many were enlarged and
how much of their pictures the crop kept on average, and a line of the clips left out, by reason. A size without clips
also has a line.
"""

from collections import Counter
from collections.abc import Sequence

from data_tools.reports import ShardReport
from latte_scale.data.schema import ShardEntry, VideoSettings

LEFT_OUT = "too short", "corrupt", "audio only", "no video stream", "zero frames", "damaged"
"""How reasons begin, or what they say; any other is counted as "other"."""


def size_table(
    video: VideoSettings, downscale: int, entries: Sequence[ShardEntry], reports: Sequence[ShardReport]
) -> str:
    """The table as text. `downscale`: pixels a latent, which turns a size into the name of its bucket."""
    clips, enlarged, kept = (_total(each) for each in (
        [entry.buckets for entry in entries], [r.enlarged for r in reports], [r.kept for r in reports]
    ))  # fmt: skip
    total = sum(clips.values())
    lines = [f"{'size (pixels)':<20}{'bucket':<14}{'clips':>9}{'share':>8}{'enlarged':>10}{'picture kept':>14}"]
    for policy in video.policies():
        bucket = f"{policy.frames}x{policy.height // downscale}x{policy.width // downscale}"
        number = clips[bucket]
        share, area = (f"{number / total:.1%}", f"{kept[bucket] / number:.1%}") if number else ("0.0%", "")
        line = f"{policy.size!s:<20}{bucket:<14}{number:>9,}{share:>8}{enlarged[bucket]:>10,}{area:>14}"
        lines.append(line.rstrip())
    reasons = Counter(_kind_of(reason) for report in reports for _, reason in report.left_out)
    listing = ", ".join(f"{number:,} {kind}" for kind, number in reasons.most_common()) or "none"
    return "\n".join([*lines, f"left out: {listing}"])


def _total(counts: Sequence[dict[str, float]]) -> Counter:
    """The sum of the counts of each bucket."""
    total: Counter = Counter()
    for each in counts:
        total.update(each)
    return total


def _kind_of(reason: str) -> str:
    return next((kind for kind in LEFT_OUT if reason.startswith(kind) or f"is {kind}:" in reason), "other")
