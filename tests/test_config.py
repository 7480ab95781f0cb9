"""Configs: every file in configs/ loads, sections are checked against each other, and what may change on resume."""

import re

import pytest

from latte_scale.config import guarded_differences, latent_sides, load_config, unread_settings
from latte_scale.settings import SettingsError, apply_overrides, read_mapping, to_mapping
from tests.conftest import ROOT

TRAINING = sorted(path for path in (ROOT / "configs").glob("*.yaml") if not path.name.startswith("encode_"))
STUDIES = sorted(path for path in (ROOT / "configs/ablations").glob("*.yaml") if not path.name.endswith("_base.yaml"))
ENCODING = sorted((ROOT / "configs").glob("encode_*.yaml"))


@pytest.mark.parametrize("path", TRAINING, ids=lambda path: path.name)
def test_every_training_config_loads_and_says_how_to_run_it(path):
    config = load_config(path)
    assert config.train.micro_batch <= config.train.global_batch and not unread_settings(config)
    text = path.read_text()
    assert text.startswith("#") and "latte" in text.split("\nrun:\n")[0]


def test_a_run_folder_below_the_home_directory_is_one_place_for_all_its_files(monkeypatch):
    monkeypatch.setenv("HOME", "/home/somebody")
    config = load_config(ROOT / "configs" / "tiny_cpu.yaml", ["run.dir=~/runs/x"])
    assert str(config.run.folder) == "/home/somebody/runs/x"
    assert config.checkpoint_store.url == config.checkpoint_dir == "/home/somebody/runs/x/checkpoints"
    assert load_config(ROOT / "configs" / "tiny_cpu.yaml", ["checkpoint.dir=~/c"]).checkpoint_dir == "/home/somebody/c"


def test_checkpoints_are_read_past_the_cache_and_its_blocks():
    blocks = ["store.cache_dir=c", "store.block_bytes=1048576", "checkpoint.dir=s3://bucket/x"]
    found = load_config(ROOT / "configs" / "tiny_cpu.yaml", blocks).checkpoint_store.settings
    assert found.cache_dir is None and found.block_bytes is None


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.name)
def test_every_row_of_a_study_loads(path):
    study = read_mapping(path)
    assert str(path.relative_to(ROOT)) in path.read_text().split("\nbase:")[0]
    for overrides in study["rows"].values():
        load_config(ROOT / study["base"], overrides)


@pytest.mark.parametrize("path", ENCODING, ids=lambda path: path.name)
def test_every_encoding_config_loads(path):
    from data_tools.encode import EncodeSettings
    from latte_scale import settings

    assert settings.load(EncodeSettings, path).video.frames in (4, 16)


def test_the_tiny_config_is_what_its_users_rely_on():
    config = load_config(ROOT / "configs" / "tiny_cpu.yaml")
    assert (config.train.global_batch, config.train.lr_schedule) == (12, "constant")
    assert config.engine.kind == "single"


def test_the_released_model_is_the_default():
    from latte_scale.model.latte_t2v import LatteT2VSettings

    config = load_config(ROOT / "configs" / "t2v_512.yaml")
    assert all(getattr(config.model, key) == value for key, value in vars(LatteT2VSettings()).items())


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("diffusion.flow_shift=3", "diffusion.flow_shift is 3.0, but nothing reads it with diffusion.objective=v"),
        ("diffusion={objective: flow, beta_end: 0.03}", "nothing reads it with diffusion.objective=flow"),
        ("video.frames=8", "model.num_frames is 4 but video.frames is 8"),
        ("model.out_channels=8", "set model.out_channels=4"),
        ("run.dir=s3://bucket/x", "run.dir: expected a folder .* got 's3://bucket/x'; .* set checkpoint.dir=s3://"),
        ("run.dir=''", "run.dir: expected a folder that every node may write, got ''"),
        ("run.seed=-1", r"seed must lie in \[0, 2\*\*64\)"),
        ("run.seed=18446744073709551616", r"seed must lie in \[0, 2\*\*64\), got 18446744073709551616"),
        ("train.caption_drop=1.5", r"caption_drop must lie in \[0, 1\]"),
        ("engine.checkpointed_share=2", r"checkpointed_share must lie in \[0, 1\]"),
    ],
)
def test_what_sections_say_of_each_other(override, words):
    with pytest.raises(SettingsError, match=words):
        load_config(ROOT / "configs" / "tiny_cpu.yaml", [override])


def changed(*overrides, base=()):
    path = ROOT / "configs" / "tiny_cpu.yaml"
    mapping = read_mapping(path)
    assert apply_overrides(mapping, overrides) != mapping
    old, new = (to_mapping(load_config(path, [*base, *more])) for more in ((), overrides))
    return guarded_differences(old, new)


@pytest.mark.parametrize(
    "override",
    [
        "engine.kind=zero",
        "engine.zero_stage=3",
        "attention.backend=math",
        [
            "engine.kind=fsdp2",
            "engine.reshard_after_forward=always",
            "engine.replicate=node",
            "engine.prefetch_units=2",
        ],
        ["engine.kind=fsdp2", "engine.sequence_parallel=2", "engine.replicate=2"],
        "train.micro_batch=3",
        "train.steps=99",
        "data.num_workers=7",
        "log.every_steps=7",
        "checkpoint.every_steps=7",
        "run.dir=elsewhere",
    ],
)
def test_free_to_change_on_resume(override):
    assert changed(*([override] if isinstance(override, str) else override)) == {}


@pytest.mark.parametrize(
    ("override", "key"),
    [("train.lr=2e-3", "train.lr"), ("run.seed=1", "run.seed"), ("ema.decays=[0.9]", "ema.decays"),
     ("train.global_batch=16", "train.global_batch"), ("model.num_layers=3", "model.num_layers")],
)  # fmt: skip
def test_guarded_on_resume(override, key):
    assert list(changed(override)) == [key]


def test_what_a_section_refuses_stands_behind_its_name_once():
    for override, words in {"train.steps=0": "train.steps must", "data.holdout=2": "data: holdout must"}.items():
        with pytest.raises(SettingsError, match=f"tiny_cpu.yaml: {words} be"):
            load_config(ROOT / "configs" / "tiny_cpu.yaml", [override])


def test_a_cosine_schedule_guards_the_number_of_steps():
    assert list(changed("train.steps=99", base=["train.lr_schedule=cosine"])) == ["train.steps"]


def test_a_key_younger_than_the_checkpoint_counts_as_its_default():
    config = to_mapping(load_config(ROOT / "configs" / "tiny_cpu.yaml"))
    older = {section: dict(values) for section, values in config.items() if section != "contrastive"}
    del older["train"]["joint_images"], older["model"]["kind"]
    assert guarded_differences(older, config) == {}
    changed = {**config, "train": {**config["train"], "joint_images": 2}}
    assert guarded_differences(older, changed) == {"train.joint_images": (0, 2)}


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["encoders.text=null"], "model.kind=latte_t2v needs captions"),
        (["data.images=set"], "train.joint_images is 0; set both"),
        (["contrastive.weight=0.1"], "the loss needs its projections"),
        (["model.contrastive_width=8"], "the loss needs its projections"),
        (["contrastive.weight=0.1", "model.contrastive_width=8"], "not a multiple of contrastive.group 8"),
        (["train.joint_images=-1"], "joint_images must be 0 or more"),
        (["train.known_frames.share=2"], r"share must lie in \[0, 1\]"),
        (["model.kind=latte"], "model.num_layers"),
    ],
)
def test_learning_strategies_are_held_to_the_rest(overrides, words):
    with pytest.raises(SettingsError, match=words):
        load_config(ROOT / "configs" / "tiny_cpu.yaml", overrides)


@pytest.mark.parametrize(
    ("config", "overrides", "words"),
    [
        ("tiny_cpu", ["train.known_frames={share: 0.5, most: 4}"], "no more than 3 are given; set it to 3"),
        ("tiny_cpu", ["train.known_frames.most=2"], "is for train.known_frames.share above 0; set that"),
        ("tiny_cpu", ["train.known_frames.share=0.5", "video.frames=1"], "an image has no frames to continue"),
        ("sky", ["train.caption_drop=0.2"], "train.caption_drop=0.2: the model is unconditional"),
        ("sky", ["model.sample_size=64"], "model.sample_size=64: positions of model.kind=latte do not depend on it"),
        ("tiny_cpu", ["train.batch_budget=tokens"], "without video.more_sizes every clip costs the same; leave it"),
        ("tiny_cpu", ["engine.checkpointed_share=0.5"], "engine.activation_checkpointing=none keeps everything"),
        ("tiny_cpu", ["optim={clip_norm: null, clip_from_update: 9}"], "optim.clip_norm=null clips nothing; leave it"),
        ("tiny_cpu", ["validation.prompts=[a]"], "validation.videos_every_steps=0 samples no videos; leave it out"),
        ("sky", ["validation.count=2"], "validation.count: validation.videos_every_steps=0 samples no videos"),
    ],
)
def test_a_setting_that_its_run_does_not_look_at_is_told_and_not_refused(config, overrides, words):
    (line,) = unread_settings(load_config(ROOT / "configs" / f"{config}.yaml", overrides))
    assert re.search(words, line) and line.startswith(overrides[0].split(".")[0].split("=")[0])


@pytest.mark.parametrize(
    "overrides",
    [
        ["engine={checkpointed_share: 0.5, other_blocks: selective}"],
        ["engine={checkpointed_share: 0.5, activation_checkpointing: full}"],
        ["validation={prompts: [a], videos_every_steps: 5}"],
        ["train.batch_budget=tokens", "video.more_sizes=[{frames: 1, height: 32, width: 32}]"],
    ],
)
def test_what_is_looked_at_is_not_told(overrides):
    assert unread_settings(load_config(ROOT / "configs" / "tiny_cpu.yaml", overrides)) == []


def test_known_frames_are_those_of_the_longest_size():
    longest = ["video.more_sizes=[{frames: 2, height: 32, width: 32}]", "train.known_frames={share: 0.5, most: 3}"]
    assert unread_settings(load_config(ROOT / "configs" / "tiny_cpu.yaml", longest)) == []  # of the longest size


def test_every_size_is_in_whole_compression_patches():
    base = ["model.tubelet_size=2", "video.more_sizes=[{frames: 8, height: 256, width: 128}]"]
    load_config(ROOT / "configs" / "ffs.yaml", base)
    with pytest.raises(SettingsError, match="in whole patches of 2"):
        load_config(ROOT / "configs" / "ffs.yaml", [base[0], base[1].replace("8", "7", 1)])


def test_compression_patches_are_refused_for_single_frames():
    for override in ("train.joint_images=2", "train.known_frames.share=0.5"):
        with pytest.raises(SettingsError, match="mixes the frames of a patch"):
            load_config(ROOT / "configs" / "ffs.yaml", ["model.tubelet_size=2", override])


@pytest.mark.parametrize(
    ("config", "override", "words"),
    [
        ("tiny_cpu", "train.joint_images=1", "sequence_parallel=2 cuts clips by frames.*train.joint_images=1"),
        ("tiny_cpu", "train.known_frames.share=0.5", "train.known_frames.share=0.5: set"),
        ("tiny_cpu", "engine.sequence_parallel=5", "sequence_parallel=5 needs as many frames, a clip has 4"),
        ("tiny_cpu", "engine.sequence_parallel=0", "must be 1 or more ranks"),
        ("tiny_cpu", "engine.kind=single", "engine.kind=single runs on one; set engine.kind to fsdp2 or zero"),
        ("ffs", "model.variant=parallel", "model.variant=parallel attends over space and over time"),
    ],
)
def test_what_does_not_go_with_clips_over_several_ranks(config, override, words):
    options = ["engine.kind=fsdp2", "engine.sequence_parallel=2"]
    load_config(ROOT / "configs" / f"{config}.yaml", options)
    with pytest.raises(SettingsError, match=words):
        load_config(ROOT / "configs" / f"{config}.yaml", [*options, override])


def test_contrastive_loss_does_not_go_with_clips_over_several_ranks():
    options = ["model.contrastive_width=8", "contrastive.weight=0.1", "contrastive.group=4", "engine.kind=fsdp2"]
    load_config(ROOT / "configs" / "tiny_cpu.yaml", options)
    with pytest.raises(SettingsError, match=r"does not go with contrastive.weight=0.1"):
        load_config(ROOT / "configs" / "tiny_cpu.yaml", [*options, "engine.sequence_parallel=2"])


@pytest.mark.parametrize(("name", "side"), [("t2v_512.yaml", 64), ("ffs.yaml", 32), ("tiny_cpu.yaml", 16)])
def test_latent_sides_are_known_without_the_encoders_files(name, side):
    assert latent_sides(load_config(ROOT / "configs" / name)) == (side, side)
