"""MFU is never a guess, and memory is that of the processes."""

import multiprocessing

import pytest
import torch

from latte_scale.run import throughput


def test_mfu_with_an_injected_peak():
    # 3 x 8.409 TFLOP a clip, 10 clips in 2 s on 4 devices of 100 TFLOP/s.
    assert throughput.utilization(10 * 3 * 8.409e12, 2.0, 4, 100e12) == pytest.approx(10 * 3 * 8.409 / 2 / 400)


def test_no_mfu_on_a_device_whose_peak_is_unknown():
    assert throughput.peak_flops("Some New Accelerator") is None
    assert throughput.utilization(1e12, 1.0, 1, None) is None
    window = throughput.Throughput(started_at_s=5.0, samples=4, model_flops=1e12, recomputed_flops=1e12 / 3)
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
    assert throughput.peak_flops(name) == peak


def test_a_utilization_above_one_is_an_error():
    with pytest.raises(ValueError, match="impossible"):
        throughput.utilization(2e15, 1.0, 1, 1e15)


def test_a_window_with_more_work_than_its_time_has_no_utilization_and_ends_no_run(caplog):
    """Ten images and then a video: its FLOPs are in a window that has an image's time for it."""
    window = throughput.Throughput(started_at_s=0.0, samples=1, model_flops=0.8e15, recomputed_flops=0.4e15)
    rates = window.summary(1.0, 1, 1e15)
    assert rates["mfu"] == pytest.approx(0.8) and rates["hfu"] is None
    assert "utilization of 1.20 is impossible" in caplog.text and rates["samples_per_s"] == 1.0


def test_memory_of_this_process_is_plausible():
    assert 50e6 < throughput.memory_bytes(torch.device("cpu")) < 1e12


def test_the_memory_of_each_child_is_seen_while_it_lives():
    ended = multiprocessing.Event()
    children = [multiprocessing.Process(target=ended.wait) for _ in range(2)]
    for child in children:
        child.start()
    found = throughput.worker_memory_bytes()
    ended.set()
    for child in children:
        child.join()
    assert len(found) == 2 and all(1e6 < size < 1e11 for size in found) and throughput.worker_memory_bytes() == []
