"""Specifications of devices and the links between them: the table behind every estimate, with its sources.

In: a name. Out: `Device`, `Cluster`. Peaks are dense and from data sheets; the fraction reached is an assumption of
timing.py, printed with every estimate. A new device needs one more line here. On 2026-11-25 the lines of H100, H200,
L40S and B200 agreed with published tables (one of them gives B200 80 TFLOP/s in fp32); those of A100 and RTX 4090 were
not compared.
"""

from dataclasses import dataclass, replace

from latte_scale.run.throughput import PEAK_BF16_FLOPS

GB, GIB, TB = 1e9, 2**30, 1e12


@dataclass(frozen=True)
class Device:
    """One accelerator and its links."""

    name: str
    memory_bytes: float  # as the driver reports it, which is below the marketing figure
    bf16_flops: float  # dense tensor-core peak, FLOP/s: the one that MFU is measured against
    fp32_flops: float  # peak outside of tensor cores, FLOP/s: torch's default for fp32 products
    hbm_bytes_per_s: float
    link_bytes_per_s: float  # to the other devices of its node, one direction
    network_bytes_per_s: float  # its part of the node's network, one direction
    per_node: int
    has_nvlink: bool
    source: str


_HOPPER = "nvidia.com H100/H200 data sheets: NVLink 900 GB/s both ways; DGX H100/H200: one 400 Gb/s adapter a GPU"
DEVICES = {
    device.name: device
    for device in (
        Device("a100-40", 40 * GIB * 0.985, PEAK_BF16_FLOPS["A100"], 19.5e12, 1.555 * TB, 300 * GB, 25 * GB, 8, True,
               "nvidia.com A100 data sheet: NVLink 600 GB/s both ways; DGX A100: one 200 Gb/s adapter a GPU"),
        Device("a100", 79.2 * GIB, PEAK_BF16_FLOPS["A100"], 19.5e12, 2.039 * TB, 300 * GB, 25 * GB, 8, True,
               "nvidia.com A100 80 GB data sheet: NVLink 600 GB/s both ways; DGX A100: one 200 Gb/s adapter a GPU"),
        Device("h100", 79.1 * GIB, PEAK_BF16_FLOPS["H100"], 67e12, 3.35 * TB, 450 * GB, 50 * GB, 8, True, _HOPPER),
        Device("h100-pcie", 79.1 * GIB, PEAK_BF16_FLOPS["H100 PCIe"], 51e12, 2.0 * TB, 64 * GB, 25 * GB, 8, False,
               "nvidia.com H100 PCIe data sheet: PCIe 5 x16 64 GB/s one way; network assumed 200 Gb/s a GPU"),
        Device("h200", 139.8 * GIB, PEAK_BF16_FLOPS["H200"], 67e12, 4.8 * TB, 450 * GB, 50 * GB, 8, True, _HOPPER),
        Device("b200", 178.4 * GIB, PEAK_BF16_FLOPS["B200"], 75e12, 8.0 * TB, 900 * GB, 50 * GB, 8, True,
               "nvidia.com DGX B200 data sheet: 1,440 GB in 8 GPUs, NVLink 1.8 TB/s both ways, 400 Gb/s a GPU"),
        Device("l40s", 44.4 * GIB, PEAK_BF16_FLOPS["L40S"], 91.6e12, 0.864 * TB, 32 * GB, 12.5 * GB, 8, False,
               "nvidia.com L40S data sheet: PCIe 4 x16 32 GB/s one way; network assumed 100 Gb/s a GPU"),
        Device("rtx4090", 23.5 * GIB, PEAK_BF16_FLOPS["RTX 4090"], 82.6e12, 1.008 * TB, 32 * GB, 3.1 * GB, 8, False,
               "nvidia.com Ada architecture paper: PCIe 4 x16 32 GB/s one way; network assumed 25 Gb/s a GPU"),
    )
}  # fmt: skip


@dataclass(frozen=True)
class Cluster:
    """`num_gpus` equal devices, filled node by node."""

    device: Device
    num_gpus: int

    @property
    def num_nodes(self) -> int:
        """Nodes that the devices occupy."""
        return -(-self.num_gpus // self.device.per_node)

    def ranks(self, count: int, stride: int = 1) -> "Span":
        """How a process group of `count` ranks, with `stride` from one rank to the next, is spread over the nodes."""
        inside = max(1, min(count, self.device.per_node // stride))
        return Span(self.device, count, inside)


@dataclass(frozen=True)
class Span:
    """A process group as a collective sees it."""

    device: Device
    size: int
    per_node: int  # of its ranks on one node

    @property
    def num_nodes(self) -> int:
        return -(-self.size // self.per_node)

    @property
    def bus_bytes_per_s(self) -> float:
        """Bandwidth of a ring: the link inside a node or, between nodes, all adapters of a node's ranks together."""
        inside = self.device.link_bytes_per_s if self.per_node > 1 else float("inf")
        between = self.per_node * self.device.network_bytes_per_s if self.num_nodes > 1 else float("inf")
        return min(inside, between)


def find_device(name: str, per_node: int | None = None) -> Device:
    """The device of that name. ValueError lists the known ones."""
    key = name.lower()
    if key not in DEVICES:
        raise ValueError(f"--device: expected one of {', '.join(DEVICES)}, got {name!r}")
    return DEVICES[key] if per_node is None else replace(DEVICES[key], per_node=per_node)


def device_like(torch_name: str) -> Device | None:
    """The device that torch.cuda.get_device_name() calls `torch_name`; None if the table does not have it."""
    words = torch_name.upper().replace("-", " ")
    if "A100" in words:
        return DEVICES["a100-40" if "40GB" in words else "a100"]
    if "H100" in words:
        return DEVICES["h100-pcie" if "PCIE" in words else "h100"]
    return next((device for key, device in DEVICES.items() if key.upper() in words.replace(" ", "")), None)
