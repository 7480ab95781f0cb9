"""Validation in a real run: training is unaffected, a resume has each line once, videos equal the command's."""

import json
import shutil

import pytest
from safetensors.numpy import load_file

from data_tools.cli import main as latte_data
from latte_scale import checkpoint, sample, train
from latte_scale.data.schema import VideoSettings
from latte_scale.data.video import read_clip
from latte_scale.run.metrics import read_metrics
from tests.conftest import ROOT, run_in_process
from tests.sampling.about import read_about

SHORT = ("train.steps=6", "checkpoint.every_steps=3", "data.holdout=0.2")
LOOK = ("validation.every_steps=2", "validation.num_samples=10")
PROMPTS = ["a red circle moves left", "a blue triangle moves down"]
SHOW = ("validation.videos_every_steps=3", f"validation.prompts=[{', '.join(PROMPTS)}]", "validation.sampling_steps=2")


@pytest.fixture(scope="module")
def runs(data_sets, tmp_path_factory):
    """The same six steps without validation, and with everything."""
    root = tmp_path_factory.mktemp("runs")
    assert run_in_process(root / "plain", data_sets.latents, *SHORT) == 0
    assert run_in_process(root / "watched", data_sets.latents, *SHORT, *LOOK, *SHOW) == 0
    return root


def lines(folder):
    return [{k: v for k, v in record.items() if k != "seconds"} for record in read_metrics(folder / "validation.jsonl")]


def test_losses_and_weights_are_those_of_a_run_without_it(runs):
    plain, watched = (read_metrics(runs / name / "metrics.jsonl") for name in ("plain", "watched"))
    for key in ("loss", "grad_norm", "sample_ids_sha"):
        assert [record[key] for record in watched] == [record[key] for record in plain]
    for tree in ("model", "ema/0.99", "optim/exp_avg_sq"):
        ours, wanted = (
            checkpoint.load_full(runs / name / "checkpoints" / "step-00000006", tree) for name in ("watched", "plain")
        )
        assert all((ours[name] == tensor).all() for name, tensor in wanted.items())
    assert [record["validation_s"] > 0 for record in watched] == [False, True, True, True, False, True]


def test_what_a_run_leaves(runs):
    records = lines(runs / "watched")
    assert [record["step"] for record in records] == [2, 4, 6]
    assert all(record["loss"] == pytest.approx(1.0, abs=0.2) and len(record["loss_by_band"]) == 4 for record in records)
    assert len({record["loss"] for record in records}) == 3  # the weights moved, noise and timesteps did not
    folders = sorted(path.name for path in (runs / "watched" / "samples").iterdir())
    assert folders == ["step-00000003", "step-00000006"]
    assert not (runs / "plain" / "validation.jsonl").exists() and not (runs / "plain" / "samples").exists()


def test_the_videos_are_those_of_the_sample_command(runs, tmp_path):
    """From the checkpoint of the same step, with the same seeds: the weights were those of the run's average."""
    folder = runs / "watched" / "samples" / "step-00000003"
    index = json.loads((folder / "samples.json").read_text())
    source = str(runs / "watched" / "checkpoints" / "step-00000003")
    command = ["--checkpoint", source, "--steps", "2", "--out", str(tmp_path)]
    assert sample.main([*command, *(word for prompt in PROMPTS for word in ("--prompt", prompt))]) == 0
    policy = VideoSettings(4, 32, 32, 1)
    for number, video in enumerate(index["videos"]):
        ours, theirs = (read_clip(path, policy) for path in (folder / video["file"], tmp_path / f"{number:05d}.mp4"))
        assert abs(ours.astype(int) - theirs).max() <= 1
        about = read_about(folder / video["file"])
        assert (about["text"], about["seed"], about["step"]) == (PROMPTS[number], number, 3)


def test_a_resumed_run_has_every_line_once(runs, data_sets, tmp_path):
    """Stopped for good after its checkpoint of step 3, at step 4 or 5: those lines are written again, to the bit."""
    folder = tmp_path / "run"
    assert run_in_process(folder, data_sets.latents, *SHORT, *LOOK, *SHOW) == 0
    for path in (folder / "checkpoints" / "step-00000006").iterdir():
        path.unlink()
    (folder / "checkpoints" / "step-00000006").rmdir()
    (folder / "samples" / "step-00000006" / "stale.mp4").touch()
    assert run_in_process(folder, data_sets.latents, *SHORT, *LOOK, *SHOW) == 0
    assert lines(folder) == lines(runs / "watched")
    assert not (folder / "samples" / "step-00000006" / "stale.mp4").exists()
    rewound = read_metrics(folder / "logs" / "rewound.jsonl")
    assert [record["step"] for record in rewound if "weights" in record] == [4, 6]


def test_what_was_seen_at_the_step_of_the_checkpoint_stays(runs, data_sets, tmp_path):
    """A step is validated before it is saved, so a resume does not see it again."""
    folder, often = tmp_path / "run", (*SHORT, "checkpoint.every_steps=2", *LOOK)
    assert run_in_process(folder, data_sets.latents, *often) == 0
    shutil.rmtree(folder / "checkpoints" / "step-00000006")
    assert run_in_process(folder, data_sets.latents, *often) == 0
    assert lines(folder) == lines(runs / "watched")
    rewound = read_metrics(folder / "logs" / "rewound.jsonl")
    assert [record["step"] for record in rewound if "weights" in record] == [6]


def test_another_seed_or_batch_of_the_run_changes_nothing(runs, data_sets, tmp_path):
    """Runs are compared by the weights alone: here both start from the same ones and hardly move."""
    still = ("train.lr=1e-30", "train.steps=2", "checkpoint.every_steps=2", "data.holdout=0.2", "ema.decays=[]")
    look = (*LOOK, "validation.weights=raw", f"model.init={runs / 'plain'}")
    for name, change in {"one": (), "other": ("run.seed=7", "train.global_batch=6", "train.micro_batch=3")}.items():
        assert run_in_process(tmp_path / name, data_sets.latents, *still, *look, *change) == 0
    (one,), (other,) = lines(tmp_path / "one"), lines(tmp_path / "other")
    assert one["loss"] == pytest.approx(other["loss"], rel=1e-5) and one["weights"] == "model"


def test_a_run_that_keeps_no_average_and_looks_at_nothing(data_sets, tmp_path):
    few = ("train.steps=1", "checkpoint.every_steps=1", "ema.decays=[]")
    assert run_in_process(tmp_path / "run", data_sets.latents, *few) == 0
    assert run_in_process(tmp_path / "other", data_sets.latents, *few, "data.holdout=0.2", *LOOK) == 78


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("data.holdout=0", "validation.every_steps=1"), "set data.holdout"),
        (("validation.videos_every_steps=1",), "needs something to show"),
        ((*LOOK, "validation.weights=ema/0.5"), "expected raw or an average of ema.decays (ema/0.99 kept)"),
        ((*LOOK, "data.holdout=1e-9"), "holds out no sample"),
        (("validation.videos_every_steps=1", "validation.prompts=nowhere.txt"), "no file nowhere.txt"),
        (("validation.videos_every_steps=1", "validation.labels=[1]"), "pass validation.prompts"),
        ((*SHOW, "validation.sampler=euler"), "expects one of ddim"),
        ((*SHOW, "validation.guidance=1", "validation.negative=blue"), "nothing reads it at guidance 1"),
        ((*SHOW, "validation.sampling_steps=1001"), "expected 1 to 1000 (diffusion.num_timesteps), got 1001"),
        ((*SHOW, "diffusion.zero_terminal_snr=true", "validation.sampling_steps=60"), "a divisor of 1000"),
    ],
)
def test_settings_that_do_not_fit(data_sets, tmp_path, capsys, overrides, message):
    assert run_in_process(tmp_path / "run", data_sets.latents, *SHORT, *overrides) == 78
    said = capsys.readouterr()
    assert message in (said.out + said.err).replace("\n", " ")
    assert not (tmp_path / "run" / "metrics.jsonl").exists()  # not only at the first look


def shown(folder):
    return json.loads((folder / "samples" / "step-00000001" / "samples.json").read_text())["videos"]


def test_raw_clips_go_through_the_runs_own_encoders(data_sets, tmp_path):
    few = ("train.steps=1", "checkpoint.every_steps=1", "data.holdout=0.2")
    assert run_in_process(tmp_path / "run", data_sets.shards, *few, *LOOK, *SHOW) == 0
    (record,) = lines(tmp_path / "run")
    assert record["step"] == 1 and record["loss"] == pytest.approx(1.0, abs=0.2)
    assert [video["prompt"] for video in shown(tmp_path / "run")] == PROMPTS


def test_a_model_of_classes_shows_its_classes(tmp_path):
    clips, shards, run = (str(tmp_path / name) for name in ("clips", "shards", "run"))
    assert latte_data(["shapes", "--output", clips, "--count", "24", "--labels"]) == 0
    assert latte_data(["shard", "--input", clips, "--output", shards]) == 0
    few = ["train.steps=1", "train.global_batch=4", "train.warmup_steps=0", "data.num_workers=0", "data.holdout=0.2"]
    show = ["validation.videos_every_steps=1", "validation.labels=[0, 3]", "validation.sampling_steps=2"]
    config = str(ROOT / "configs" / "ablations" / "shapes_base.yaml")
    assert train.main(["--config", config, f"data.url={shards}", f"run.dir={run}", *few, *LOOK, *show]) == 0
    assert [video["file"] for video in shown(tmp_path / "run")] == ["00-class-0.mp4", "01-class-3.mp4"]
    assert len(lines(tmp_path / "run")) == 1


def test_a_held_out_sample_that_cannot_be_read_is_named(data_sets, tmp_path):
    """Another one takes its place, and the loss is not that of the others alone."""
    data = tmp_path / "damaged"
    shutil.copytree(data_sets.latents, data)
    tar = bytearray((data / "shard-000001.tar").read_bytes())
    for offset in load_file(data / "shard-000001.index.safetensors")["latents.offset"]:
        tar[int(offset) + 500] ^= 1
    (data / "shard-000001.tar").write_bytes(tar)
    assert run_in_process(tmp_path / "run", data, "train.steps=1", "data.holdout=0.2", *LOOK) == 0
    log = (tmp_path / "run" / "logs" / "rank-00000.log").read_text()
    assert "validation: sample replaced: Replacement(" in log and "shard-000001" in log
