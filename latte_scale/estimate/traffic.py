"""The communication of a step, and how long each collective takes.

In: an engine's settings, the sizes of the weights and a cluster. Out: `Collective`s of one step, each with the bytes of
the whole tensor and how often it happens. A collective's time follows the model with which NCCL chooses its algorithms
(github NVIDIA/nccl, src/graph/tuning.cc, 2.2x): a latency for every hop of the ring, or level of the tree, and the
bytes over the slowest link. The decision worth knowing: the ring's latency grows with the ranks and not with the bytes,
so this term limits weak scaling.
"""

import math
from dataclasses import dataclass
from typing import Literal

from latte_scale.estimate.hardware import Span

Kind = Literal["all_gather", "reduce_scatter", "all_reduce", "all_to_all"]

REACHED = 0.8
"""Share of a link's nominal rate that large collectives reach: nccl-tests on DGX H100 give about 360 of 450 GB/s."""
_US = 1e-6
# tuning.cc: base latency, a hop inside a node, a hop between nodes in microseconds, and the fraction of the bandwidth;
# for the protocols LL128 (NVLink only) and Simple.
RING = {"ll128": (14.0, 1.9, 4.0, 0.92), "simple": (8.4, 3.4, 14.0, 1.0)}
TREE = {"ll128": (14.0, 1.25, 8.5, 0.46), "simple": (8.4, 4.0, 14.0, 0.5)}


@dataclass(frozen=True)
class Collective:
    """One kind of transfer of a step."""

    name: str  # its purpose
    kind: Kind
    span: Span
    size_bytes: float  # of the whole tensor, each time
    times: float  # per step
    hidden_behind: Literal["forward", "backward", "nothing"]  # what it may overlap with

    @property
    def sent_bytes(self) -> float:
        """Bytes that each rank sends in a step."""
        ways = 2 if self.kind == "all_reduce" else 1
        share = self.size_bytes / self.span.size if self.kind == "all_to_all" else self.size_bytes
        return ways * share * (self.span.size - 1) / self.span.size * self.times

    @property
    def seconds(self) -> float:
        """Seconds in a step, if nothing else runs."""
        return self.times * transfer_s(self.kind, self.span, self.size_bytes)


def transfer_s(kind: Kind, span: Span, size_bytes: float) -> float:
    """Seconds of one collective over a tensor of `size_bytes` (of all_gather, the size of the result)."""
    if span.size == 1:
        return 0.0
    if kind == "all_to_all":
        return _exchange_s(span, size_bytes)
    protocols = ("ll128", "simple") if span.device.has_nvlink else ("simple",)
    times = [_ring_s(kind, span, size_bytes, RING[name]) for name in protocols]
    if kind == "all_reduce":
        times += [_tree_s(span, size_bytes, TREE[name]) for name in protocols]
    return min(times)


def _ring_s(kind: Kind, span: Span, size_bytes: float, model: tuple[float, float, float, float]) -> float:
    base, inside, between, share = model
    ways = 2 if kind == "all_reduce" else 1
    hops, node_hops = ways * (span.size - 1), ways * (span.num_nodes - 1)
    latency_s = (base + (hops - node_hops) * inside + node_hops * between) * _US
    moved = ways * size_bytes * (span.size - 1) / span.size
    return latency_s + moved / (span.bus_bytes_per_s * REACHED * share)


def _tree_s(span: Span, size_bytes: float, model: tuple[float, float, float, float]) -> float:
    base, inside, between, share = model
    levels = math.log2(span.num_nodes) if span.num_nodes > 1 else 0.0
    latency_s = (base + 2 * ((span.per_node - 1) * inside + levels * between)) * _US
    return latency_s + size_bytes / (span.bus_bytes_per_s * REACHED * share)


def _exchange_s(span: Span, size_bytes: float) -> float:
    """All-to-all: each rank sends all but its own part, over the network to ranks of other nodes."""
    base, inside, between, _ = RING["simple"]
    mine = size_bytes / span.size
    away = mine * (span.size - span.per_node) / span.size
    near = mine * (span.per_node - 1) / span.size
    seconds = max(near / span.device.link_bytes_per_s, away / span.device.network_bytes_per_s) / REACHED
    return seconds + (base + (between if away else inside)) * _US
