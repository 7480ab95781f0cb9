"""Every way to compute attention, norm and gate is timed or says why not; the table names the fastest."""

import json
import math

from latte_scale.bench import main
from latte_scale.bench.kernels import least_bytes, table
from latte_scale.choices.attention import probes
from tests.bench.test_subjects import CONFIGS, tiny


def test_one_command_times_all_of_them(tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    out = tmp_path / "new" / "kernels.json"
    config = str(CONFIGS / "tiny_cpu.yaml")
    assert main(["kernels", "--config", config, "--out", str(out), "train.micro_batch=2", "train.global_batch=4"]) == 0
    result = json.loads(out.read_text())
    assert set(result["attention_ms"]) == {"space", "time", "cross"} and result["attention_ms"]["time"]["sdpa"] > 0
    for name in ("norm_ms", "gate_ms", "gate_and_norm_ms"):
        assert set(result[name]) == {"torch eager", "triton"} and result[name]["torch eager"] > 0
        assert "NVIDIA GPUs only" in result[name]["triton"]
    assert set(result["linear_ms"]) == {"32 -> 32", "32 -> 128", "128 -> 32"}
    for times in result["linear_ms"].values():
        assert set(times) == {"float32", "fp8"} and times["float32"] > 0 and times["fp8"]  # or why this torch has none
    assert set(result["two_layers_ms"]) == {"torch, eager", "triton, eager"}
    assert "| norm | torch eager (fastest) |" in capsys.readouterr().out


def test_the_table_marks_the_fastest_and_counts_bytes() -> None:
    text = table(
        {
            "attention_ms": {"time": {"sdpa": 3.0, "triton_small": 2.0, "flash2": "not installed"}},
            "linear_ms": {"1152 -> 4608": {"bfloat16": 5.0, "fp8": 3.0}},
            "norm_ms": {"torch eager": 4.0, "triton": 1.0},
            "gate_ms": {},
            "gate_and_norm_ms": {},
            "two_layers_ms": {},
            "least_bytes": {"norm_ms": 2_000_000},
            "copy_bytes_per_s": 3e12,
            "shape": [2, 16, 1024, 1152],
            "environment": {"device": "some GPU"},
        }
    )
    assert "| attention, time | triton_small (fastest) | 2.0 |  |" in text and "| flash2 | not installed |" in text
    assert "| linear, 1152 -> 4608 | fp8 (fastest) | 3.0 |  |" in text
    assert "| norm | triton (fastest) | 1.0 | 2 |" in text and "| norm | torch eager | 4.0 | 0.5 |" in text
    assert "x 2x16x1024x1152 on some GPU; copies 3000 GB/s" in text


def test_bytes_of_the_smallest_case_by_hand() -> None:
    config = tiny("train.micro_batch=1", "train.precision=bf16")
    elements = math.prod((1, config.video.frames, probes(config)["space"].num_queries, config.model.width))
    assert least_bytes(config) == {
        "norm_ms": 20 * elements,
        "gate_ms": 18 * elements,
        "gate_and_norm_ms": 30 * elements,
    }


def test_a_config_that_cannot_be_is_an_error(capsys) -> None:
    assert main(["kernels", "--config", str(CONFIGS / "tiny_cpu.yaml"), "norm.backend=cuda"]) == 78
    assert "norm.backend" in capsys.readouterr().err
