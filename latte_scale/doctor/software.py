"""Device, driver and libraries of one rank, and whether they fit each other, the config and the other ranks.

In: a Config and this rank's device. Out: lines, and `versions_here`, which `version_lines` compares once they are
gathered. The decision worth knowing: nothing heavy is imported for a check; versions come from package metadata, and
only torch, which is imported anyway, is asked about the device.
"""

import importlib.metadata
import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from packaging.requirements import Requirement

from latte_scale.choices.attention import present
from latte_scale.choices.record import dtype_of
from latte_scale.config import Config, unread_settings
from latte_scale.doctor.lines import Line
from latte_scale.estimate.budget import DoesNotFitError, within_budget
from latte_scale.estimate.estimate import estimate_of
from latte_scale.estimate.hardware import DEVICES, GIB, Cluster
from latte_scale.model.attention_backends import why_absent
from latte_scale.model.fp8 import why_no_fp8
from latte_scale.run.facts import git_commit

BUSY_BYTES = 2**30
"""Device memory held by other processes from which a warning is printed."""


def device_lines(device: torch.device, local_size: int, environ: Mapping[str, str]) -> list[Line]:
    """The GPU of this rank, or why it has none."""
    asked = int(environ.get("SLURM_GPUS_ON_NODE") or 0)
    if device.type != "cuda":
        nodes = sorted(Path("/dev").glob("nvidia[0-9]*"))
        if not nodes and not asked:
            return [Line("ok", "device", f"no GPU here: {platform.machine()} CPU, fit for small runs and tests")]
        seen = f"{len(nodes)} NVIDIA devices in /dev" if nodes else f"Slurm gave {asked} GPUs"
        hidden = "CUDA_VISIBLE_DEVICES is empty" if environ.get("CUDA_VISIBLE_DEVICES") == "" else built_for()
        remedy = "let CUDA_VISIBLE_DEVICES name them, and install a torch for a CUDA that the driver knows"
        return [Line("fault", "device", f"{seen}, but torch can use none ({hidden})", remedy)]
    name, count = torch.cuda.get_device_name(device), torch.cuda.device_count()
    major, minor = torch.cuda.get_device_capability(device)
    free, total = torch.cuda.mem_get_info(device)
    lines = []
    if count < local_size:
        found = f"{local_size} ranks on {count} visible GPUs"
        lines.append(Line("fault", "device", found, f"start {count} ranks a machine, or correct CUDA_VISIBLE_DEVICES"))
    kinds = {int(arch.split("_")[1].rstrip("af")) // 10 for arch in torch.cuda.get_arch_list() if "_" in arch}
    if major not in kinds:
        found = f"{name} is sm_{major}{minor}; this torch was built for {' '.join(torch.cuda.get_arch_list())}"
        lines.append(Line("fault", "device", found, "install a torch that knows this GPU"))
    held = total - free - torch.cuda.memory_reserved(device)
    if held > BUSY_BYTES:
        found = f"{held / 2**30:.1f} of {total / 2**30:.0f} GiB of {name} are held by somebody else"
        lines.append(Line("warning", "device", found, "find them with nvidia-smi, or take another GPU"))
    return lines or [
        Line("ok", "device", f"{local_size} of {count} x {name}, {total / 2**30:.0f} GiB, sm_{major}{minor}")
    ]


def driver_lines(device: torch.device) -> list[Line]:
    """The kernel's driver compared with the CUDA that torch was built for."""
    if device.type != "cuda":
        return [Line("ok", "driver", f"none needed ({built_for()})")]
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "-i", str(device.index or 0)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=8, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        return [Line("warning", "driver", f"nvidia-smi does not answer ({error})", "look at dmesg for Xid errors")]
    nccl = ".".join(map(str, torch.cuda.nccl.version()))
    return [Line("ok", "driver", f"{done.stdout.strip()}, {built_for()}, NCCL {nccl}")]


def built_for() -> str:
    """What this torch was built for, as text."""
    return f"torch built for CUDA {torch.version.cuda}" if torch.version.cuda else "torch built for the CPU"


def requirement_lines(config: Config) -> list[Line]:
    """Installed versions compared with the requirements of latte_scale, including the extras that the config uses."""
    users = {"": "latte_scale"}  # extra -> what needs it
    if config.engine.kind == "zero":
        users["deepspeed"] = "engine.kind=zero"
    urls = [str(source.url) for source in config.data.sources()] + [config.checkpoint_dir]
    if any(url.startswith("s3://") for url in urls):
        users["s3"] = "an s3:// URL"
    if config.attention.backend == "flash2":
        users["flash"] = "attention.backend"
    lines = []
    for requirement in map(Requirement, importlib.metadata.requires("latte_scale") or []):
        marker, remedy = requirement.marker, f"pip install '{requirement.name}{requirement.specifier}'"
        user = next(
            (user for extra, user in users.items() if marker is None or marker.evaluate({"extra": extra})), None
        )
        if user is None:
            continue
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            lines.append(Line("fault", "libraries", f"{requirement.name} is missing; {user} needs it", remedy))
            continue
        if not requirement.specifier.contains(version, prereleases=True):
            found = f"{requirement.name} {version}: {user} needs {requirement.specifier}"
            lines.append(Line("fault", "libraries", found, remedy))
    needed = f"all that latte_scale and engine.kind={config.engine.kind} need"
    return lines or [Line("ok", "libraries", f"{needed}: {short(versions_here())}")]


def attention_lines(config: Config, device: torch.device) -> list[Line]:
    """The attention back ends that can run here."""
    there, wanted = present(config, device), config.attention.backend
    reason = None if wanted == "auto" else why_absent(wanted, device, dtype_of(config))
    if reason is not None:
        remedy = f"set attention.backend to auto or one of {', '.join(there)}"
        return [Line("fault", "attention", f"attention.backend={wanted}: {reason}", remedy)]
    choice = "measured at the first start" if device.type == "cuda" and wanted == "auto" else "by config"
    return [Line("ok", "attention", f"{wanted} ({choice}); can run: {', '.join(there)}")]


def config_lines(config: Config) -> list[Line]:
    """Settings that the run would not use; nothing if there are none."""
    said = (line.partition("; ") for line in unread_settings(config))
    return [Line("warning", "config", found, remedy) for found, _, remedy in said]


def precision_lines(config: Config, device: torch.device) -> list[Line]:
    """Whether the device computes in train.precision."""
    reason = why_no_fp8(device) if config.train.precision == "fp8" else ""
    if reason:
        return [Line("fault", "precision", f"train.precision=fp8: {reason}", "set train.precision=bf16")]
    return [Line("ok", "precision", config.train.precision)]


def memory_lines(config: Config, num_ranks: int, device_bytes: float) -> list[Line]:
    """Whether a step fits into the device, by the estimate: a warning if not, because compiled blocks keep less."""
    try:
        config = within_budget(config, num_ranks, device_bytes)
    except DoesNotFitError as error:
        return [Line("fault", "memory", str(error), "as it says; `latte-scale estimate` shows the parts")]
    choice = estimate_of(config, Cluster(DEVICES["h100"], num_ranks))  # memory is the same on any device
    found = f"a rank needs about {choice.memory.needed / GIB:.1f} of {device_bytes / GIB:.1f} GiB{choice.where}"
    if choice.memory.needed <= device_bytes:
        return [Line("ok", "memory", f"{found}: {choice.words}")]
    remedy = "engine.activation_checkpointing=auto fits what blocks keep; `latte-scale estimate` shows the parts"
    return [Line("warning", "memory", f"{found}: {choice.words}", remedy)]


def versions_here() -> dict[str, str]:
    """The versions that must be the same on all ranks."""
    found = {"python": platform.python_version(), "torch": str(torch.__version__)}
    for name in ("deepspeed", "flash-attn", "numpy", "transformers", "diffusers"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    if torch.cuda.is_available():
        found["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
        found["gpu"] = torch.cuda.get_device_name()
    found["commit"] = (git_commit(Path(__file__).parent) or "unknown")[:12]
    return found | {name: os.environ[name] for name in ("NCCL_SOCKET_IFNAME",) if name in os.environ}


def short(versions: Mapping[str, str]) -> str:
    """The versions of the most important libraries."""
    return ", ".join(f"{name} {versions[name]}" for name in ("torch", "deepspeed", "flash-attn") if name in versions)


def version_lines(gathered: Sequence[Mapping[str, str]], places: Sequence[str]) -> list[Line]:
    """Differences between ranks, which must all run the same code."""
    lines = []
    for name in sorted({name for versions in gathered for name in versions}):
        values: dict[str, list[str]] = {}
        for versions, place in zip(gathered, places, strict=True):
            values.setdefault(versions.get(name, "none"), []).append(place)
        if len(values) > 1:
            what = "; ".join(f"{value} on {', '.join(sorted(set(on))[:3])}" for value, on in sorted(values.items()))
            level = "warning" if name in ("transformers", "diffusers", "NCCL_SOCKET_IFNAME") else "fault"
            lines.append(Line(level, "same", f"{name} differs: {what}", "give all ranks one environment and checkout"))
    return lines or [Line("ok", "same", f"{len(gathered)} ranks have the same libraries and commit")]
