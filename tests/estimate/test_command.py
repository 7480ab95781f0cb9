"""The command on the smallest config: what it prints, what --json holds, and how it ends."""

import json
from dataclasses import replace

import pytest
import torch
import yaml

from latte_scale.config import load_config
from latte_scale.estimate.advice import explain_out_of_memory, out_of_memory, remedies, yaml_of
from latte_scale.estimate.command import FITS, STOP, TOO_BIG, main
from latte_scale.estimate.estimate import estimate_of
from latte_scale.estimate.hardware import DEVICES, Cluster

TINY = "configs/tiny_cpu.yaml"
FSDP2 = ["--config", TINY, "--gpus", "2", "engine.kind=fsdp2"]


def test_json_holds_memory_time_cost_and_a_recommendation(capsys):
    assert main([*FSDP2, "--json"]) == FITS
    found = json.loads(capsys.readouterr().out)
    assert found["fits"] and found["recommended"]["yaml"].startswith("train:")
    assert found["total_bytes"] == pytest.approx(sum(found["memory_bytes"].values()))
    assert found["gpu_hours"] == pytest.approx(found["step_s"] * 20 * 2 / 3600)
    assert found["samples_per_s"] == pytest.approx(12 / found["step_s"])
    assert found["assumptions"]


def test_the_text_says_whether_it_fits_and_what_was_assumed(capsys):
    assert main([*FSDP2, "--price", "2.5"]) == FITS
    text = capsys.readouterr().out
    assert "fits" in text and "Recommended: " in text and "Assumed" in text and "at 2.5 an hour" in text


@pytest.mark.parametrize(
    "given",
    [
        ["engine.kind=zero", "engine.cpu_offload=true"],
        ["engine.kind=fsdp2", "engine.activation_checkpointing=auto", "engine.memory_budget_gib=60"],
    ],
    ids=lambda given: given[-1],
)
def test_the_recommended_lines_can_be_put_into_the_config_as_it_is(given, capsys):
    """What does not go with them is taken back by them; it was left in, and the config was refused."""
    arguments = ["--config", TINY, "--gpus", "2", "--json", *given]
    assert main(arguments) == FITS
    recommended = json.loads(capsys.readouterr().out)["recommended"]
    sections = yaml.safe_load(recommended["yaml"])
    lines = [f"{name}.{key}={json.dumps(value)}" for name, keys in sections.items() for key, value in keys.items()]
    assert main([*arguments, *lines]) == FITS
    assert json.loads(capsys.readouterr().out)["step_s"] == pytest.approx(recommended["step_s"])


def test_recommended_lines_say_that_all_blocks_are_checkpointed_where_the_config_says_half():
    given = load_config(TINY, ["engine.activation_checkpointing=full", "engine.checkpointed_share=0.5"])
    best = replace(given, engine=replace(given.engine, checkpointed_share=1.0))
    lines = yaml_of(estimate_of(best, Cluster(DEVICES["h100"], 1)), given)
    assert yaml.safe_load(lines)["engine"]["checkpointed_share"] == 1.0


def test_a_config_that_does_not_fit_ends_with_1(capsys):
    assert (
        main([*FSDP2, "--gpus", "1", "engine.kind=single", "train.micro_batch=400000", "train.global_batch=800000"])
        == TOO_BIG
    )
    assert "DOES NOT FIT" in capsys.readouterr().out


def test_every_size_has_a_line_and_the_data_say_how_many_steps(tmp_path, capsys):
    coverage, out = tmp_path / "coverage.json", {}
    rows = [{"bucket": name, "steps": steps} for name, steps in (("4x16x16", 15), ("1x32x32", 5), ("1x32x32", 5))]
    coverage.write_text(json.dumps({"steps": 20, "rows": rows}))  # a row a data set, each with the bucket's steps
    sizes = ["--config", "configs/sizes_cpu.yaml", "--gpus", "2", "engine.kind=fsdp2"]
    for name, words in {"assumed": [], "counted": ["--coverage", str(coverage)]}.items():
        assert main([*sizes, *words, "--json"]) == FITS
        out[name] = json.loads(capsys.readouterr().out)
    assert [bucket["share_of_steps"] for bucket in out["assumed"]["buckets"]] == pytest.approx([0.2, 0.3, 0.3, 0.2])
    assert [bucket["share_of_steps"] for bucket in out["counted"]["buckets"]] == [0.75, 0, 0, 0.25]
    assert [bucket["global_batch"] for bucket in out["counted"]["buckets"]] == [12, 8, 8, 12]
    for found in out.values():
        peak = max(found["buckets"], key=lambda bucket: bucket["total_bytes"])
        assert found["peak_bucket"] == peak["bucket"] and found["memory_bytes"] == peak["memory_bytes"]
        step_s = sum(bucket["share_of_steps"] * bucket["step_s"] for bucket in found["buckets"])
        samples = sum(bucket["share_of_steps"] * bucket["global_batch"] for bucket in found["buckets"])
        assert found["step_s"] == pytest.approx(step_s) and found["samples_per_s"] == pytest.approx(samples / step_s)
    assert out["assumed"]["samples_per_s"] != pytest.approx(out["counted"]["samples_per_s"])
    assert main(sizes) == FITS
    text = capsys.readouterr().out
    assert [line.split()[0] for line in text.splitlines() if " GiB " in line and " x " in line] == [
        "4x16x16", "4x16x24", "4x24x16", "1x32x32"
    ]  # fmt: skip
    assert "as many clips of each size" in text and f"in steps of {out['assumed']['peak_bucket']}" in text


def test_a_copy_a_node_is_as_many_copies_as_there_are_nodes_of_the_size_given(capsys):
    words, parameters = [*FSDP2, "--gpus", "4", "--json", "engine.replicate=node"], {}
    for per_node in (4, 2):
        assert main([*words, "--per-node", str(per_node)]) == FITS
        parameters[per_node] = json.loads(capsys.readouterr().out)["memory_bytes"]["parameters"]
    assert parameters[2] == pytest.approx(2 * parameters[4], rel=0.05)  # two copies: each rank holds half of one


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (["--device", "abacus"], "expected one of"),
        (["--gpus", "0"], "--gpus must be 1 or more"),
        (["--per-node", "0"], "--per-node must be 1 or more"),
        (["--efficiency", "0"], "--efficiency must be a share of the peak, in (0, 1], got 0"),
        (["--efficiency", "nan"], "--efficiency must be a share of the peak, in (0, 1], got nan"),
        (["--price", "-3"], "--price must be 0 or more, got -3"),
        (["--price", "nan"], "--price must be 0 or more, got nan"),
        (["engine.kind=single"], "runs on one GPU, got 2; use fsdp2 or zero, or --gpus 1"),
        (["engine.kind=fsdp3"], "engine.kind"),
        (["--gpus", "64"], "global_batch 12"),
        (["--coverage", "no.json"], "no.json"),
        (["--coverage", "configs/tiny_cpu.yaml"], "expected what `latte-scale coverage --out` writes"),
    ],
)
def test_what_cannot_be_is_refused_with_78(change, said, capsys):
    assert main([*FSDP2, *change]) == STOP
    assert said in capsys.readouterr().err


def test_out_of_memory_names_settings_that_help_and_by_how_much():
    config = load_config(TINY, ["engine.kind=single", "train.micro_batch=4096", "train.global_batch=8192"])
    cluster = Cluster(DEVICES["h100"], 1)
    saved = {override: saved for override, saved, _ in remedies(config, cluster)}
    full = replace(config, engine=replace(config.engine, activation_checkpointing="full"))
    assert saved["engine.activation_checkpointing=full"] == pytest.approx(
        estimate_of(config, cluster).memory.needed - estimate_of(full, cluster).memory.needed
    )
    text = out_of_memory(config, cluster)
    assert "train.micro_batch=2048: " in text and "GiB less" in text and "engine.activation_checkpointing=full" in text


def test_an_estimate_that_fails_does_not_hide_what_torch_said():
    config = load_config(TINY, ["engine.kind=fsdp2"])  # 64 ranks for 12 samples: no estimate
    said = explain_out_of_memory(config, 64, torch.device("cpu"), torch.OutOfMemoryError("CUDA out of memory. Tried"))
    assert "could not be estimated" in said and said.endswith("torch said: CUDA out of memory. Tried")
