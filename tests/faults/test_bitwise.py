"""F15, F18: a run that was stopped and resumed equals the uninterrupted run bit for bit, with any engine or precision.

An epoch of the data is 5 steps: stops come before, at and after its end, and twice in one epoch.
"""

import shutil
from pathlib import Path

import pytest

from latte_scale.checkpoint import list_steps
from latte_scale.checkpoint.content import differences, open_native
from tests.faults.attempts import Server
from tests.faults.conftest import digests, losses

STEPS = 9
# Accumulation with an uneven last micro-batch, clipping that bites, dropped captions, two averages, worker processes.
ALL_AT_ONCE = (
    *("train.micro_batch=5", "optim.clip_norm=0.05", "optim.weight_decay=0.1", "train.caption_drop=0.5"),
    *("ema.decays=[0.9,0.99]", "data.num_workers=2", "train.warmup_steps=3", f"checkpoint.every_steps={STEPS}"),
)
FSDP2, ZERO_3 = ("engine.kind=fsdp2",), ("engine.kind=zero", "engine.zero_stage=3")
BF16 = ("train.precision=bf16",)
CASES = {
    "single": (1, ALL_AT_ONCE, (4, 5, 6, 8)),
    "single-bf16": (1, (*ALL_AT_ONCE, *BF16), (5,)),
    "single-joint-images": (1, (*ALL_AT_ONCE, "train.joint_images=2", "train.known_frames.share=0.5"), (5, 6)),
    "fsdp2": (2, (*ALL_AT_ONCE, *FSDP2), (4, 6)),
    "fsdp2-bf16": (2, (*ALL_AT_ONCE, *FSDP2, *BF16), (5,)),
    "zero-3": (2, (*ALL_AT_ONCE, *ZERO_3), (5,)),
    "zero-3-bf16": (2, (*ALL_AT_ONCE, *ZERO_3, *BF16), (5,)),
}


def assert_bitwise(folder: Path, whole: Path) -> None:
    assert losses(folder) == losses(whole) and digests(folder) == digests(whole)
    mine, theirs = (open_native(list_steps(path / "checkpoints")[-1]) for path in (folder, whole))
    theirs.config["run"]["dir"] = mine.config["run"]["dir"]
    assert differences(mine, theirs) == []


@pytest.mark.parametrize("case", list(CASES))
def test_f15_f18_resumed_is_bitwise_unbroken(server: Server, data_sets, tmp_path: Path, case: str) -> None:
    ranks, options, stops = CASES[case]
    for folder, all_steps in ((tmp_path / "whole", (STEPS,)), (tmp_path / "stopped", (*stops, STEPS))):
        for steps in all_steps:
            attempt = server.start(folder, data_sets.latents, *options, f"train.steps={steps}", ranks=ranks)
            assert attempt.wait() == [0] * ranks, attempt.output
    assert_bitwise(tmp_path / "stopped", tmp_path / "whole")


def test_f15_raw_video_with_augmentation(server: Server, data_sets, tmp_path: Path) -> None:
    """Clips decoded, flipped and encoded in the step: window, flip and posterior are drawn by key as well."""
    shards = tmp_path / "shards"
    shutil.copytree(data_sets.shards, shards)
    options = ("video.hflip=true", "checkpoint.every_steps=6", "data.num_workers=1")
    for name, all_steps in (("whole", (6,)), ("stopped", (4, 5, 6))):
        for steps in all_steps:
            attempt = server.start(tmp_path / name, shards, *options, f"train.steps={steps}")
            assert attempt.wait() == [0], attempt.output
    assert_bitwise(tmp_path / "stopped", tmp_path / "whole")
