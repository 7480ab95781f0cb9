"""The same validation on every engine and world size, without an effect on training."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from latte_scale.ema import swapped_in
from latte_scale.engine import Ranks
from latte_scale.run.metrics import read_metrics
from tests.engine.toy import on_ranks
from tests.validation.running import Parts, config_of, equal, files_in

KINDS = {"single": ("engine.kind=single",), "fsdp2": ("engine.kind=fsdp2",)} | {
    f"zero{stage}": ("engine.kind=zero", f"engine.zero_stage={stage}") for stage in (1, 2, 3)
}
KINDS["sequence"] = (*KINDS["fsdp2"], "engine.sequence_parallel=2")  # validation holds each clip whole on a rank
WORLDS = {1: ["single"], 2: ["fsdp2", "zero1", "zero2", "zero3", "sequence"], 3: ["fsdp2", "zero3"]}
PROMPTS = ["a red circle moves left", "a green triangle moves up", "Blue: moves/down"]


def validated(ranks: Ranks, kinds: list[str], data: str, root: str) -> dict[str, Any]:
    """Each engine: two steps, validation, two steps; and the same without it."""
    outcomes = {}
    for kind in kinds:
        parts = Parts(config_of(data, f"{root}/{kind}-{ranks.size}", *KINDS[kind]), ranks)
        parts.train(range(2))
        before = parts.state()
        seconds = parts.validate(2)
        outcome = {"untouched": equal(parts.state(), before), "seconds": seconds, "tracked": parts.tracked}
        held_out, videos = parts.validator._held_out, parts.validator._videos
        outcome["raw"] = held_out.loss(parts.engine.model).loss
        with swapped_in(parts.engine, parts.ema.trees["ema/0.99"]):
            outcome["drawn"] = videos.draw(parts.engine.model)
        losses = parts.train(range(2, 4))
        alone = Parts(config_of(data, f"{root}/alone-{kind}-{ranks.size}", *KINDS[kind]), ranks)
        alone.train(range(2))
        outcome["same_losses"] = alone.train(range(2, 4)) == losses
        outcome["same_state"] = equal(alone.state(), parts.state())
        outcomes[kind] = outcome
    return outcomes


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("validated")


@pytest.fixture(scope="module")
def outcomes(data_sets, root) -> dict[tuple[str, int], list[dict[str, Any]]]:
    """(engine, ranks) -> what each rank saw."""
    found = {}
    for size, kinds in WORLDS.items():
        args = (kinds, str(data_sets.latents), str(root))
        alone = Ranks(0, 1, 0, torch.device("cpu"))
        results = [validated(alone, *args)] if size == 1 else on_ranks(size, validated, *args)
        found |= {(kind, size): [result[kind] for result in results] for kind in kinds}
    return found


def record_of(root: Path, kind: str, size: int) -> dict[str, Any]:
    (record,) = read_metrics(root / f"{kind}-{size}" / "validation.jsonl")
    return record


CASES = pytest.mark.parametrize(("kind", "size"), [(kind, size) for size, kinds in WORLDS.items() for kind in kinds])


@CASES
def test_weights_are_put_back_to_the_bit_and_training_does_not_notice(outcomes, kind, size):
    for outcome in outcomes[kind, size]:
        assert outcome["untouched"] and outcome["same_losses"] and outcome["same_state"]


@CASES
def test_the_loss_is_that_of_one_process(outcomes, root, kind, size):
    record, wanted = record_of(root, kind, size), record_of(root, "single", 1)
    assert list(record) == ["step", "loss", "loss_by_band", "weights", "num_samples", "seconds"]
    assert (record["step"], record["weights"], record["num_samples"]) == (2, "ema/0.99", 26)
    print(f"{kind} on {size}: relative difference of the loss {record['loss'] / wanted['loss'] - 1:.1e}")  # RESULTS.md
    assert record["loss"] == pytest.approx(wanted["loss"], rel=1e-5)
    tracked = [outcome["tracked"] for outcome in outcomes[kind, size]]
    assert tracked[0] == [
        {"step": 1, "validation_loss": record["loss"], "validation_loss_by_band": record["loss_by_band"]}
    ]
    assert not any(tracked[1:])
    assert record["loss_by_band"] == pytest.approx(wanted["loss_by_band"], rel=1e-5)
    raw = [outcome["raw"] for outcome in outcomes[kind, size]]
    assert raw == pytest.approx([outcomes["single", 1][0]["raw"]] * size, rel=1e-5)
    assert abs(raw[0] - record["loss"]) > 1e-3 * raw[0]  # the averages were really there


@CASES
def test_the_videos_are_those_of_one_process(outcomes, root, kind, size):
    drawn = {number: row for outcome in outcomes[kind, size] for number, row in outcome["drawn"].items()}
    wanted = outcomes["single", 1][0]["drawn"]
    assert sorted(drawn) == sorted(wanted) == [0, 1, 2]
    largest = max((row - wanted[number]).abs().max() / wanted[number].abs().max() for number, row in drawn.items())
    print(f"{kind} on {size}: relative difference of the latents {largest:.1e}")  # RESULTS.md
    for number, row in drawn.items():  # after two steps of training in another order of summing
        assert (row - wanted[number]).abs().max() < 1e-5 * wanted[number].abs().max()
    folder = root / f"{kind}-{size}" / "samples" / "step-00000002"
    index = json.loads((folder / "samples.json").read_text())
    names = ["00-a-red-circle-moves-left.mp4", "01-a-green-triangle-moves-up.mp4", "02-blue-moves-down.mp4"]
    assert [video["file"] for video in index["videos"]] == names and files_in(folder) == [*names, "samples.json"]
    assert [video["prompt"] for video in index["videos"]] == PROMPTS
    assert (index["step"], index["weights"], index["sampler"]) == (2, "ema/0.99", "ddim") and index["seconds"] > 0


def broken(ranks: Ranks, data: str, folder: str) -> dict[str, Any]:
    """Rank 1 cannot write, then rank 0 cannot read, then all is well again."""
    parts = Parts(config_of(data, folder, "engine.kind=fsdp2"), ranks)
    validator = parts.validator
    read, write = validator._held_out.read, validator._videos.write
    said = validator._console.file = io.StringIO()
    validator._console.quiet = False

    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    validator._videos.write = fail if ranks.rank == 1 else write
    parts.validate(2)
    validator._videos.write = write
    validator._held_out._micro_batches = None
    validator._held_out.read = fail if ranks.rank == 0 else read
    parts.validate(4)
    validator._held_out.read = read
    parts.validate(6)
    parts.validator.rewind(4)
    log = (parts.folder.logs / f"rank-{ranks.rank:05d}.log").read_text()
    return {"losses": parts.train(range(1)), "log": log, "said": said.getvalue().replace("\n", " ")}


def test_a_failure_on_one_rank_is_told_on_all_and_ends_nothing(data_sets, tmp_path):
    results = on_ranks(2, broken, str(data_sets.latents), str(tmp_path))
    for result in results:
        assert torch.tensor(result["losses"]).isfinite().all()
        assert "writing sample videos failed" in result["log"] and "rank 1: OSError" in result["log"]
        assert "reading held-out samples failed" in result["log"] and "rank 0: OSError" in result["log"]
    said = results[0]["said"]
    assert "writing sample videos failed" in said and "sample videos of step 2" not in said  # three were not written
    assert "3 sample videos of step 4" in said
    videos = {step: tmp_path / "samples" / f"step-0000000{step}" for step in (2, 4)}
    assert len(json.loads((videos[2] / "samples.json").read_text())["videos"]) == 2  # rank 0's
    assert len(json.loads((videos[4] / "samples.json").read_text())["videos"]) == 3  # without a loss
    # step 4 has no loss, and step 6 was taken back by the rewind to step 4
    assert [record["step"] for record in read_metrics(tmp_path / "validation.jsonl")] == [2]
    assert files_in(tmp_path / "samples") == ["step-00000002", "step-00000004"]
