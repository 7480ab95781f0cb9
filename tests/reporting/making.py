"""Run folders with everything that a report shows, made on the spot."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from latte_scale.data.video import write_mp4

PROMPTS = ("a red circle moves left", "a blue <triangle> moves up")


def write_lines(path: Path, records: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def metrics_line(step: int, height: float, noise: float) -> dict[str, Any]:
    loss = height * (0.2 + 0.8 * math.exp(-step / 60)) * (1 + noise)
    return {
        "step": step,
        "loss": loss,
        "loss_by_band": [loss * factor for factor in (2.5, 1.2, 0.5, 0.2)],
        "grad_norm": 0.5 + 2 * math.exp(-step / 30) + abs(noise),
        "lr": min(1.0, step / 20) * 1e-3,
        "samples_seen": 12 * (step + 1),
        "epoch": step / 50,
        "samples_per_s": 40 + 5 * noise,
        "tokens_per_s": 40960 + 5000 * noise,
        "tflops_per_s": 320 + 20 * noise,
        "mfu": 0.42 + 0.05 * noise,
        "data_wait_share": abs(noise) / 4,
        "checkpoint_stall_s": 0.8 if step % 50 == 49 else 0.0,
        "memory_gib": 61.5,
        "num_skipped": 0,
    }


def square(step: int, side: int = 32) -> np.ndarray:
    """Eight frames of a moving square, which gets sharper with the step."""
    frames = np.random.default_rng(step).integers(0, max(1, 200 - step), (8, side, side, 3)).astype(np.uint8)
    for number, frame in enumerate(frames):
        left = number * side // 12
        frame[side // 3 : 2 * side // 3, left : left + side // 3] = (220, 40, 40)
    return frames


def make_run(folder: Path, height: float = 1.0, steps: int = 200, every: int = 1, seed: int = 0) -> Path:
    """A run that was killed after step 115 and resumed at step 100, with every file that a run folder can have."""
    draw = np.random.default_rng(seed)
    lines = [metrics_line(step, height, 0.15 * float(draw.standard_normal())) for step in range(0, steps, every)]
    write_lines(folder / "metrics.jsonl", lines)
    write_lines(folder / "logs" / "rewound.jsonl", [r for r in lines if 100 <= r["step"] < 116])
    replayed = [line["step"] for line in lines if 100 <= line["step"] < 116]
    restart = {"step": 100, "checkpoint": "checkpoints/step-00000100", "replayed_steps": replayed, "problems": []}
    write_lines(folder / "logs" / "restarts.jsonl", [restart])
    bands = [{"step": step, "loss": height * (0.3 + 0.7 * math.exp(-step / 60))} for step in range(49, steps, 50)]
    extra = {"weights": "ema", "num_samples": 64, "seconds": 2.0}
    validation = [{**r, "loss_by_band": [r["loss"] * f for f in (2.4, 1.1, 0.5, 0.2)], **extra} for r in bands]
    write_lines(folder / "validation.jsonl", validation)
    (folder / "config.yaml").write_text(
        f"run: {{dir: <here>, seed: {seed}}}\ntrain: {{steps: {steps}, lr: {height}e-3}}\n"
    )
    (folder / "exit.json").write_text('{"code": 0, "reason": "finished"}')
    facts = {
        "command": ["python", "-m", "latte_scale.train", "--config", "configs/tiny_cpu.yaml"],
        "git_commit": "57b93c9d5d1b0d2c1f0e4a6b8c7d9e0f1a2b3c4d",
        "versions": {"numpy": "2.4.6", "torch": "2.13.0"},
        "hosts": ["node1", "node2"],
        "ranks": [{"rank": 0, "device": "cuda:0"}, {"rank": 1, "device": "cuda:1"}],
        "environment": {"OMP_NUM_THREADS": "1", "NCCL_DEBUG": "WARN"},
        "data_fingerprint": "0123456789abcdef" * 4,
    }
    (folder / "facts.json").write_text(json.dumps(facts))
    for step in range(49, steps, 50):
        make_samples(folder / "samples" / f"step-{step + 1:08d}", step + 1)
    scores = {"n": 32, "fvd": 181.25 * height, "metrics": {"fvd": {"value": 181.25, "low": 170.5, "high": 193.0}}}
    (folder / "evaluation").mkdir()
    (folder / "evaluation" / "final.json").write_text(json.dumps(scores))
    return folder


def make_samples(folder: Path, step: int) -> None:
    folder.mkdir(parents=True)
    videos = [{"file": f"{number:05d}.mp4", "prompt": prompt} for number, prompt in enumerate(PROMPTS)]
    for number, video in enumerate(videos):
        write_mp4(folder / video["file"], square(step + number), 8)
    record = {"step": step, "weights": "ema", "sampler": "ddim", "seconds": 3.0, "videos": videos}
    (folder / "samples.json").write_text(json.dumps(record))
