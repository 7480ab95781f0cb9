"""Metrics: the file survives kills and rewinds, MFU is never a guess, numbers come back one step late."""

import json
import multiprocessing

import numpy as np
import pytest
import torch

from latte_scale.run import metrics


def test_mfu_with_an_injected_peak():
    # 3 x 8.409 TFLOP a clip, 10 clips in 2 s on 4 devices of 100 TFLOP/s.
    assert metrics.utilization(10 * 3 * 8.409e12, 2.0, 4, 100e12) == pytest.approx(10 * 3 * 8.409 / 2 / 400)


def test_no_mfu_on_a_device_whose_peak_is_unknown():
    assert metrics.peak_flops("Some New Accelerator") is None
    assert metrics.utilization(1e12, 1.0, 1, None) is None
    window = metrics.Throughput(started_at_s=5.0, samples=4, model_flops=1e12, recomputed_flops=1e12 / 3)
    assert "mfu" not in window.summary(7.0, 1, None)
    rates = window.summary(7.0, 1, 1e15)
    assert rates["samples_per_s"] == 2.0
    assert rates["mfu"] == pytest.approx(0.5e-3)
    assert rates["hfu"] == pytest.approx(0.5e-3 * 4 / 3)


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H200", 989.4e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 NVL", 835.5e12),
        ("NVIDIA H100 80GB HBM3", 989.4e12),
        ("NVIDIA B200", 2250e12),
        ("NVIDIA GB200", 2500e12),
        ("NVIDIA H200 NVL", 835.5e12),
        ("NVIDIA GeForce RTX 4090", 165.2e12),
        ("NVIDIA GeForce RTX 4090 D", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA H100 80GB HBM3 MIG 3g.40gb", None),
    ],
)
def test_peaks_by_device_name(name, peak):
    assert metrics.peak_flops(name) == peak


def test_a_utilization_above_one_is_an_error():
    with pytest.raises(ValueError, match="impossible"):
        metrics.utilization(2e15, 1.0, 1, 1e15)


def test_a_window_with_more_work_than_its_time_has_no_utilization_and_ends_no_run(caplog):
    """Ten images and then a video: its FLOPs are in a window that has an image's time for it."""
    window = metrics.Throughput(started_at_s=0.0, samples=1, model_flops=0.8e15, recomputed_flops=0.4e15)
    rates = window.summary(1.0, 1, 1e15)
    assert rates["mfu"] == pytest.approx(0.8) and rates["hfu"] is None
    assert "utilization of 1.20 is impossible" in caplog.text and rates["samples_per_s"] == 1.0


def test_readback_hands_out_steps_in_order():
    readback = metrics.Readback()
    numbers = torch.tensor([1.0, 2.0], dtype=torch.float64)
    readback.push(7, numbers)
    numbers.zero_()  # the next step reuses its buffers
    readback.push(8, numbers)
    assert len(readback) == 2
    assert readback.pop() == (7, [1.0, 2.0])
    assert readback.pop() == (8, [0.0, 0.0])


def test_rewind_moves_the_steps_that_will_run_again(tmp_path):
    file = metrics.MetricsFile(tmp_path / "metrics.jsonl")
    for step in range(6):
        file.append({"step": step, "loss": step / 10})
    with open(file.path, "a") as cut:
        cut.write('{"step": 6, "lo')  # a kill in the middle of a line
    assert file.rewind(4, tmp_path / "rewound.jsonl") == [4, 5]
    assert [r["step"] for r in metrics.read_metrics(file.path)] == [0, 1, 2, 3]
    assert [r["step"] for r in metrics.read_metrics(tmp_path / "rewound.jsonl")] == [4, 5]
    file.append({"step": 4})
    assert [json.loads(line)["step"] for line in file.path.read_text().splitlines()] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("odd", ["{}", "12", "null", '{"step": null}', "\x00\x00", b"\x86\xff".decode("latin-1")])
def test_rewind_moves_a_line_that_is_no_record_and_goes_on(tmp_path, odd):
    file = metrics.MetricsFile(tmp_path / "metrics.jsonl")
    file.append({"step": 0})
    with open(file.path, "ab") as cut:
        cut.write(odd.encode("latin-1") + b"\n")
    file.append({"step": 1})
    assert file.rewind(1, tmp_path / "rewound.jsonl") == [1]
    assert metrics.read_metrics(file.path) == [{"step": 0}]
    assert len((tmp_path / "rewound.jsonl").read_text(errors="replace").splitlines()) == 2


def test_a_line_that_lost_its_end_is_not_joined_with_the_next(tmp_path):
    file = metrics.MetricsFile(tmp_path / "metrics.jsonl")
    file.path.write_text('{"step": 0}')  # a disk that was full at this very byte, or an editor
    assert file.rewind(1, tmp_path / "rewound.jsonl") == []
    file.append({"step": 1})
    assert metrics.read_metrics(file.path) == [{"step": 0}, {"step": 1}]


@pytest.mark.parametrize("step", [0, 7, 5000, 9990, 10_000])
def test_a_long_file_is_rewound_like_a_short_one(tmp_path, monkeypatch, step):
    monkeypatch.setattr(metrics, "TAIL_BYTES", 2000)
    order = [*range(9995), 9993, *range(9995, 10_000)]  # a dead attempt has written step 9993 late
    lines = [json.dumps({"step": number, "text": "x" * (number % 50)}) + "\n" for number in order]
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(lines) + '{"step": 10000, "lo')
    assert metrics.MetricsFile(path).rewind(step, tmp_path / "moved.jsonl") == [n for n in order if n >= step]
    kept = [line for number, line in zip(order, lines, strict=True) if number < step]
    assert path.read_text() == "".join(kept)
    moved = [line for number, line in zip(order, lines, strict=True) if number >= step]
    assert (tmp_path / "moved.jsonl").read_text() == "".join(moved) + '{"step": 10000, "lo\n'


def test_of_a_very_long_file_only_the_end_is_read_line_by_line(tmp_path, monkeypatch):
    """The metrics of 300,000 steps took 27 s and 1.2 GB when all lines were."""
    path, looked_at, step_of = tmp_path / "metrics.jsonl", [], metrics._step_of
    with open(path, "w") as file:
        file.writelines(f'{{"step": {step}, "text": "{"x" * 1000}"}}\n' for step in range(20_000))
    monkeypatch.setattr(metrics, "_step_of", lambda line: looked_at.append(line) or step_of(line))
    assert metrics.MetricsFile(path).rewind(19_990, tmp_path / "moved.jsonl") == list(range(19_990, 20_000))
    assert len(looked_at) < 1100
    assert [record["step"] for record in metrics.read_metrics(path)] == list(range(19_990))


def test_rewind_of_nothing(tmp_path):
    assert metrics.MetricsFile(tmp_path / "absent.jsonl").rewind(0, tmp_path / "r.jsonl") == []


def test_memory_of_this_process_is_plausible():
    assert 50e6 < metrics.memory_bytes(torch.device("cpu")) < 1e12


def test_the_memory_of_each_child_is_seen_while_it_lives():
    ended = multiprocessing.Event()
    children = [multiprocessing.Process(target=ended.wait) for _ in range(2)]
    for child in children:
        child.start()
    found = metrics.worker_memory_bytes()
    ended.set()
    for child in children:
        child.join()
    assert len(found) == 2 and all(1e6 < size < 1e11 for size in found) and metrics.worker_memory_bytes() == []


def test_a_spike_is_told_once_and_ordinary_noise_never():
    detector = metrics.SpikeDetector()
    noise = np.random.default_rng(1).lognormal(mean=-1.0, sigma=0.2, size=5000)
    assert [detector.look(loss) for loss in noise] == [None] * 5000
    assert detector.look(20.0) > 8
    assert detector.look(21.0) is None  # still the same spike
    assert detector.look(0.4) is None and detector.look(float("nan")) is None
    assert detector.look(20.0) > 8


def test_a_run_that_got_worse_for_good_is_told_once():
    detector = metrics.SpikeDetector()
    verdicts = [detector.look(0.5 + 0.01 * (step % 7) + (step >= 100)) for step in range(400)]
    assert [step for step, verdict in enumerate(verdicts) if verdict] == [100]


def test_few_losses_are_not_judged():
    detector = metrics.SpikeDetector()
    assert [detector.look(loss) for loss in [1.0] * 10 + [100.0]] == [None] * 11
