"""Checks that need all ranks: a slow rank, the all-reduce rate, differing clocks, folders not shared.

In: Ranks. Out: this rank's figures, and lines about the gathered figures of all ranks. The decision worth knowing:
measurement and judgement are separate. A measurement is a few collectives that every rank enters; the judgement is
arithmetic on plain numbers, the same on all ranks, and is tested without ranks.
"""

import statistics
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from latte_scale.check_folders import blind_ranks
from latte_scale.doctor.lines import Line
from latte_scale.engine import Ranks

GEMM_SIDE = {"cuda": 8192, "cpu": 512}
GEMM_TURNS, GEMM_TURN_S = 4, 0.15
REDUCE_BYTES = {"cuda": 2**28, "cpu": 2**24}
REDUCE_TURNS = 3
CLOCK_TURNS = 9
SLOW, BROKEN = 1.25, 2.0
"""Times as long as the others for a matrix product: from SLOW on a rank is named, from BROKEN on a GPU is a fault.
Sound ranks differ by a few percent; every step waits for the slowest."""
SLOW_LINK = 1.25e9
"""Bytes a second, 10 Gbit/s: a lower rate between GPU machines means that the wrong network was taken."""
SKEW_S, BROKEN_SKEW_S = 5.0, 300.0
"""Differences between clocks: logs mislead from SKEW_S on; Slurm refuses credentials that are five minutes off
(slurm/README.md), S3 fifteen."""


def gemm_time(ranks: Ranks) -> float:
    """Seconds of a square matrix product on this rank while all ranks do the same: the best of GEMM_TURNS turns.

    The best, because a brief disturbance does not make a slow rank. Each turn lasts GEMM_TURN_S of wall time, so that
    repeated stalls between products are measured too.
    """
    side, dtype = GEMM_SIDE[ranks.device.type], torch.bfloat16 if ranks.device.type == "cuda" else torch.float32
    a, b = (torch.randn(side, side, device=ranks.device, dtype=dtype) for _ in range(2))
    ranks.barrier()
    torch.mm(a, b)
    return min(_turn_time(a, b, ranks) for _ in range(GEMM_TURNS))


def _turn_time(a: torch.Tensor, b: torch.Tensor, ranks: Ranks) -> float:
    """Seconds per product over one turn."""
    _settle(ranks)
    began_s, number = time.perf_counter(), 0
    while time.perf_counter() - began_s < GEMM_TURN_S:
        torch.mm(a, b)
        _settle(ranks)
        number += 1
    return (time.perf_counter() - began_s) / number


def gemm_lines(times_s: Sequence[float], places: Sequence[str], device_type: str) -> list[Line]:
    """The ranks that take much longer than the others; if there are none, or with one rank, the rate."""
    flops = 2.0 * GEMM_SIDE[device_type] ** 3
    lines = []
    for rank, time_s in enumerate(times_s):
        others = [other for number, other in enumerate(times_s) if number != rank]
        ratio = time_s / statistics.median(others) if others else 1.0
        if ratio > SLOW:
            found = f"{places[rank]} takes {ratio:.1f} x as long as the others for the same product"
            look = "nvidia-smi -q -d PERFORMANCE" if device_type == "cuda" else "top"
            level = "fault" if ratio > BROKEN and device_type == "cuda" else "warning"  # cores are shared, GPUs not
            remedy = f"every step waits for it: look there with {look} for heat, power limits or other jobs, or leave "
            lines.append(Line(level, "slow rank", found, f"{remedy}that machine out (sbatch --exclude)"))
    rates = [flops / time_s / 1e12 for time_s in times_s]
    spread = f"{min(rates):.3g} to {max(rates):.3g}" if len(rates) > 1 else f"{rates[0]:.3g}"
    return lines or [Line("ok", "slow rank", f"none: {spread} TFLOP/s for a square product")]


def reduce_rate(ranks: Ranks) -> float:
    """Bus bandwidth in bytes per second of an all-reduce over all ranks: 2 (n - 1) / n times its bytes over its time.

    That is what a ring moves over each link (NVIDIA's nccl-tests, PERFORMANCE.md), so it compares with the link's rate.
    """
    tensor = torch.ones(REDUCE_BYTES[ranks.device.type] // 4, device=ranks.device)
    ranks.sum_(tensor)  # opens the connections
    best_s = float("inf")
    for _ in range(REDUCE_TURNS):
        tensor.fill_(1.0)
        ranks.barrier()
        _settle(ranks)
        began_s = time.perf_counter()
        ranks.sum_(tensor)
        _settle(ranks)
        best_s = min(best_s, time.perf_counter() - began_s)
    if not bool((tensor == ranks.size).all()):
        raise RuntimeError(
            f"an all-reduce of ones over {ranks.size} ranks gave other sums: do not train on these links"
        )
    return 2 * (ranks.size - 1) / ranks.size * 4 * tensor.numel() / best_s


def _settle(ranks: Ranks) -> None:
    if ranks.device.type == "cuda":
        torch.cuda.synchronize(ranks.device)


def reduce_lines(rate: float, num_hosts: int, device_type: str, gradient_bytes: int) -> list[Line]:
    """The rate, and the time of a step's gradients at this rate without overlap."""
    gradients = f"{gradient_bytes / 2**20:,.1f} MiB of gradients take {2 * gradient_bytes / rate:.2g} s"
    found = f"{rate / 1e9:.3g} GB/s between ranks on {num_hosts} machine{'s' * (num_hosts > 1)}; {gradients}"
    if device_type == "cuda" and num_hosts > 1 and rate < SLOW_LINK:
        remedy = "see with NCCL_DEBUG=INFO which network it took; set NCCL_SOCKET_IFNAME, or NCCL_IB_HCA"
        return [Line("warning", "all-reduce", found, remedy)]
    return [Line("ok", "all-reduce", found)]


def clock_readings(ranks: Ranks) -> list[float]:
    """This rank's clock right after each of some barriers, which all ranks leave within the latency of a message."""
    readings = []
    for _ in range(CLOCK_TURNS):
        ranks.barrier()
        readings.append(time.time())
    return readings


def clock_lines(readings: Sequence[Sequence[float]], places: Sequence[str]) -> list[Line]:
    """Each clock compared with rank 0's: the median over the barriers, so that one late return has no effect."""
    skews = [statistics.median(mine - first for mine, first in zip(row, readings[0], strict=True)) for row in readings]
    worst = max(range(len(skews)), key=lambda rank: abs(skews[rank]))
    found = f"{places[worst]} is {skews[worst]:+.3f} s from {places[0]}, the most of {len(skews)} ranks"
    if abs(skews[worst]) < SKEW_S:
        return [Line("ok", "clocks", found)]
    level = "fault" if abs(skews[worst]) > BROKEN_SKEW_S else "warning"
    return [Line(level, "clocks", found, "synchronize its clock (chrony, ntpd): credentials and logs depend on it")]


def shared_lines(ranks: Ranks, folder: Path, key: str, places: Sequence[str]) -> list[Line]:
    """Whether all ranks see a file that rank 0 writes. A collective."""
    blind = blind_ranks(ranks, folder)
    if not blind:
        return [Line("ok", "shared", f"all {ranks.size} ranks see what rank 0 writes into {key}")]
    where = ", ".join(places[rank] for rank in blind[:4]) + (" ..." if len(blind) > 4 else "")
    found = f"{key} {folder} of {where} is not the folder that rank 0 writes"
    return [Line("fault", "shared", found, f"set {key} to a folder on a disk that all machines share")]
