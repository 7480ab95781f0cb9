"""Environment variables, and files that shadow modules, which make a correct run slow, silent or wrong.

In: the environment, the machine's cores and interfaces. Out: a line for each harmful one. The decision worth knowing:
settings that only the site's administrators can judge (NCCL's many tuning variables) are not checked; the ones reported
here are always harmful, or refer to something that does not exist.
"""

import importlib.metadata
import importlib.util
import os
import socket
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from latte_scale.doctor.lines import Line
from latte_scale.engine.base import EngineSettings

# Variable -> harmful values (empty: any), their effect, the remedy. Sources: PyTorch's notes on CUDA semantics and
# on ProcessGroupNCCL's variables, NCCL's manual on its environment.
HARMFUL: dict[str, tuple[Sequence[str], str, str]] = {
    "CUDA_LAUNCH_BLOCKING": (("1",), "the host waits for every kernel", "unset it: it is for finding errors"),
    "PYTORCH_NO_CUDA_MEMORY_CACHING": (("1",), "every tensor is a cudaMalloc", "unset it"),
    "TORCH_NCCL_BLOCKING_WAIT": (("1",), "the host waits for every collective", "unset it"),
    "NCCL_BLOCKING_WAIT": (("1",), "the host waits for every collective", "unset it"),
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": (("0",), "a lost rank leaves the others hanging", "unset it"),
    "NCCL_ASYNC_ERROR_HANDLING": (("0",), "a lost rank leaves the others hanging", "unset it"),
    "TORCH_DISTRIBUTED_DEBUG": (("DETAIL",), "every collective is checked by another one", "unset it"),
    "NCCL_DEBUG": (("TRACE", "INFO"), "NCCL writes pages to every rank's log", "set NCCL_DEBUG=WARN"),
    "NCCL_P2P_DISABLE": (("1",), "GPUs of a machine talk through host memory", "unset it, unless P2P hangs here"),
    "NCCL_SHM_DISABLE": (("1",), "ranks of a machine talk through the network", "unset it"),
    "NCCL_IB_DISABLE": (("1",), "machines talk over TCP although they may have InfiniBand", "unset it"),
    "NCCL_ALGO": ((), "NCCL may not choose its algorithm by size", "unset it"),
    "NCCL_PROTO": ((), "NCCL may not choose its protocol by size", "unset it"),
}
ROOT = Path(__file__).resolve().parents[2]
INTERFACES = ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME")
IMPORTED = ("torch", "numpy", "deepspeed", "flash_attn", "transformers", "diffusers", "safetensors", "pydantic", "yaml")
DISTRIBUTIONS = {"yaml": "PyYAML", "flash_attn": "flash-attn"}  # if it differs from the module's name


def variable_lines(
    environ: Mapping[str, str],
    engine: EngineSettings,
    num_cores: int,
    local_size: int,
    interfaces: Sequence[str],
    has_gpu: bool,
) -> list[Line]:
    """A line for every harmful variable; if there are none, one line that says so.

    Args:
        environ: the environment.
        engine: of the config.
        num_cores: that this process may use.
        local_size: ranks on this machine.
        interfaces: names of its network interfaces.
        has_gpu: whether torch sees one.
    """
    lines = []
    for name, (values, what, remedy) in HARMFUL.items():
        value = environ.get(name)
        if value and (not values or value.upper() in values):
            lines.append(Line("warning", "variables", f"{name}={value}: {what}", remedy))
    lines += thread_lines(environ, num_cores, local_size)
    for name in INTERFACES:
        lines += interface_lines(name, environ.get(name, ""), interfaces)
    if environ.get("CUDA_DEVICE_MAX_CONNECTIONS") == "1" and engine.kind == "fsdp2":
        found = "CUDA_DEVICE_MAX_CONNECTIONS=1: fsdp2's gathers wait for the computation they should hide behind"
        lines.append(Line("warning", "variables", found, "unset it"))
    if environ.get("DS_ACCELERATOR") == "cpu" and has_gpu and engine.kind == "zero":
        lines.append(Line("fault", "variables", "DS_ACCELERATOR=cpu: DeepSpeed would not use the GPUs", "unset it"))
    heartbeat_s = environ.get("TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC", "")
    if heartbeat_s.isdigit() and int(heartbeat_s) < engine.timeout_s:
        found = (
            f"TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC={heartbeat_s} ends a step before engine.timeout_s={engine.timeout_s:g}"
        )
        lines.append(Line("warning", "variables", found, "unset it, or lower engine.timeout_s"))
    return lines or [Line("ok", "variables", "none that slows down or hides a failure")]


def thread_lines(environ: Mapping[str, str], num_cores: int, local_size: int) -> list[Line]:
    """OMP_NUM_THREADS compared with the cores."""
    value = environ.get("OMP_NUM_THREADS", "")
    remedy = f"export OMP_NUM_THREADS={max(1, num_cores // local_size)}"
    if not value and local_size > 1:
        found = (
            f"OMP_NUM_THREADS is not set: each of {local_size} ranks starts {num_cores} threads on {num_cores} cores"
        )
        return [Line("warning", "variables", found, remedy)]
    if value and not value.isdigit():
        return [Line("warning", "variables", f"OMP_NUM_THREADS={value} is no number of threads", remedy)]
    if value and int(value) * local_size > num_cores:
        found = f"OMP_NUM_THREADS={value} x {local_size} ranks are more than the {num_cores} cores"
        return [Line("warning", "variables", found, remedy)]
    return []


def interface_lines(name: str, value: str, interfaces: Sequence[str]) -> list[Line]:
    """A given interface must exist. To NCCL "eth" means any with that prefix, "=eth0" that one, "^lo" all but lo."""
    if not value or value.startswith("^"):
        return []
    exact = value.startswith("=") or name.startswith("GLOO")
    wanted = [word for word in value.lstrip("=").split(",") if word]
    there = [word for word in wanted if any(i == word if exact else i.startswith(word) for i in interfaces)]
    if there:
        return []
    remedy = f"name one that is: {', '.join(interfaces)}"
    return [Line("fault", "variables", f"{name}={value}: {socket.gethostname()} has no such interface", remedy)]


def shadow_lines(search_path: Sequence[str] = sys.path) -> list[Line]:
    """Modules that are imported from PYTHONPATH or the current folder instead of where they are installed."""
    lines = []
    for module in IMPORTED:
        spec = importlib.util.find_spec(module)
        try:
            home = importlib.metadata.distribution(DISTRIBUTIONS.get(module, module)).locate_file("")
        except importlib.metadata.PackageNotFoundError:
            continue
        if spec is None or not spec.origin or Path(home).resolve() in Path(spec.origin).resolve().parents:
            continue
        found = f"{module} is imported from {Path(spec.origin).parent}, not from {home}, where it is installed"
        lines.append(Line("warning", "modules", found, "take that folder out of PYTHONPATH, or rename what lies there"))
    libraries = Path(os.__file__).resolve().parent
    places = [Path(folder or ".").resolve() for folder in search_path]
    first = places[: places.index(libraries)] if libraries in places else places
    for place in first:  # entries after Python's own library cannot shadow it
        for path in sorted(place.glob("*.py")):
            if path.stem in sys.stdlib_module_names:
                remedy = "rename it, or take its folder out of PYTHONPATH"
                lines.append(
                    Line("fault", "modules", f"{path} stands in the place of Python's own {path.stem}", remedy)
                )
    return lines or [Line("ok", "modules", f"all from where they are installed; this code from {ROOT}")]


def num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def interface_names() -> list[str]:
    """The network interfaces of this machine."""
    return [name for _, name in socket.if_nameindex()]
