"""Check machine, network, data and disks before a launch: `latte-scale doctor --config X.yaml [key=value ...]`.

    latte-scale doctor --config configs/t2v_256.yaml data.url=... run.dir=...               on a login node, or one host
    torchrun --nproc_per_node 8 -m latte_scale.doctor --config ...                          as all ranks of a job
    srun ... -m latte_scale.doctor --config ...                                             inside a Slurm job

It takes the trainer's arguments, leaves no files behind, and prints one line per check: ok, warning or fault, with the
finding and the remedy. Exit code 0: ok or warnings; 1: a fault. `--json FILE` writes the lines to a file.
No check can block the others (lines.py). The findings of single ranks are gathered before the first measurement on all
ranks, because a faulty rank could hang that one. It ends within LIMIT_S.
"""

import argparse
import logging
import os
import socket
import time
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch
from rich.console import Console

from latte_scale.arguments import add_config, output_file, verb_parser
from latte_scale.check_folders import shared_folders
from latte_scale.config import Config, load_config
from latte_scale.doctor import network, saving, software, stored, together, variables
from latte_scale.doctor.lines import LEVELS, Line, Pending, fault_of, joined, markup, run_all
from latte_scale.engine import Ranks, init_distributed, leave, shutdown
from latte_scale.engine.dist import one_device
from latte_scale.plain_json import write_json
from latte_scale.settings import SettingsError

LIMIT_S = 55.0
ROLL_CALL_S, ALONE_S, TOGETHER_S = 20.0, 14.0, 8.0
"""Time limits: for all ranks to come (unless LATTE_ROLL_CALL_S is set), for the checks of each rank, and for each
measurement of all ranks together."""
SOUND, FAULT = 0, 1

console = Console(soft_wrap=True, highlight=False)


def main(argv: Sequence[str] | None = None) -> int:
    """Run every check and print the findings; returns the exit code."""
    args = parse_args(argv)
    package = logging.getLogger("latte_scale")
    level = package.level
    package.setLevel(logging.ERROR)  # the lines report it
    try:
        return run(args, time.monotonic())
    finally:
        package.setLevel(level)


def run(args: argparse.Namespace, began_s: float) -> int:
    """Every check of a config that loads, alone or as all ranks of a job; `began_s` by time.monotonic."""
    try:
        config = load_config(args.config, args.overrides)
    except SettingsError as error:
        return report([fault_of("config", error)], args, began_s, [socket.gethostname()], 0)
    lines, ranks = launched()
    alone = ranks or Ranks(int(os.environ.get("RANK") or 0), 1, int(os.environ.get("LOCAL_RANK") or 0), one_device())
    lines += run_all(checks_alone(config, alone), time.monotonic() + ALONE_S)
    if ranks is None:
        return report(lines, args, began_s, [socket.gethostname()], 0)
    lines, hosts = all_ranks_lines(config, ranks, lines, began_s + LIMIT_S)
    code = report(lines, args, began_s, hosts, ranks.rank)
    if not any(line.check == "together" for line in lines):
        shutdown()
    return code


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = verb_parser("doctor", __doc__)
    add_config(parser)
    parser.add_argument("--json", type=output_file, metavar="FILE", help="also write the lines to this file")
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher's
    return parser.parse_intermixed_args(argv)  # overrides may stand between options


def launched() -> tuple[list[Line], Ranks | None]:
    """The lines of the launch, and the ranks if they connected."""
    lines = network.launch_lines(os.environ)
    if lines[-1].level == "fault":
        return lines, None
    os.environ.setdefault("LATTE_ROLL_CALL_S", str(ROLL_CALL_S))
    try:
        # Longer than doctor waits for a collective: otherwise NCCL would end the process before the lines are printed.
        return lines, init_distributed(timeout_s=2 * LIMIT_S)
    except (ValueError, RuntimeError, OSError) as error:  # torch's own message if ours did not come first
        return [fault_of("launch", error)], None


def checks_alone(config: Config, ranks: Ranks) -> dict[str, Callable[[], list[Line]]]:
    """The checks that a rank makes alone, by the name in the line of one that does not return."""
    environ, local_size = os.environ, int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1)
    several_hosts, first_here = ranks.size > local_size, ranks.local_rank == 0
    has_gpu = ranks.device.type == "cuda"
    checks = {
        "config": lambda: software.config_lines(config),
        "world": lambda: stored.world_lines(config, ranks.size, max(1, ranks.size // local_size)),
        "device": lambda: software.device_lines(ranks.device, local_size, environ),
        "driver": lambda: software.driver_lines(ranks.device),
        "libraries": lambda: software.requirement_lines(config),
        "attention": lambda: software.attention_lines(config, ranks.device),
        "precision": lambda: software.precision_lines(config, ranks.device),
        "variables": lambda: variables.variable_lines(
            environ, config.engine, variables.num_cores(), local_size, variables.interface_names(), has_gpu
        ),
        "modules": variables.shadow_lines,
        "names": lambda: network.name_lines(environ, several_hosts),
        "data": lambda: stored.data_lines(config, ranks.rank, ranks.size),
        "init": lambda: stored.init_lines(config),
    }
    if first_here:  # one write per machine: all ranks of a large job at once would slow each other down
        checks["writing"] = lambda: saving.saving_lines(config, environ)
    if first_here and has_gpu:
        total_bytes = torch.cuda.get_device_properties(ranks.device).total_memory
        checks["memory"] = lambda: software.memory_lines(config, ranks.size, total_bytes)
    return checks


def all_ranks_lines(config: Config, ranks: Ranks, mine: list[Line], until_s: float) -> tuple[list[Line], list[str]]:
    """The lines of all ranks and of their joint measurements, and the hosts. A collective.

    A measurement that does not return is the last one: the ranks would be out of step.
    """
    host = socket.gethostname()
    gathered = bounded("together", lambda: ranks.all_gather_object((host, mine, software.versions_here())), until_s)
    if isinstance(gathered, Line):
        return [*mine, gathered], [host]
    hosts = [each for each, _, _ in gathered]
    places = [f"rank {rank} ({each})" for rank, each in enumerate(hosts)] if ranks.size > 1 else hosts
    lines = joined([each for _, each, _ in gathered], places)
    if ranks.size > 1:
        lines += software.version_lines([each for _, _, each in gathered], hosts)
    for measure in measurements(config, ranks, hosts, places, can_read(lines)):
        found = bounded("together", measure, until_s)
        if isinstance(found, Line):
            return [*lines, found], hosts
        lines += found
    return lines, hosts


def can_read(lines: Sequence[Line]) -> bool:
    """Whether the data sets could be opened on every rank; if not, their speed is not measured."""
    return not any(line.check == "data" and line.level == "fault" for line in lines)


def measurements(
    config: Config, ranks: Ranks, hosts: list[str], places: list[str], has_data: bool
) -> list[Callable[[], list[Line]]]:
    """The joint measurements of all ranks, in this order; each returns the same lines on all ranks."""
    device_type, gather = ranks.device.type, ranks.all_gather_object

    def reading() -> list[Line]:
        mine = stored.read_rate(config, ranks.rank) if ranks.local_rank == 0 else None
        rates = {host: rate for host, rate in gather((hosts[ranks.rank], mine)) if rate is not None}
        return stored.rate_lines(rates, config)

    def reducing() -> list[Line]:
        gradient_bytes = saving.state_bytes(config) // (3 + len(config.ema.decays))
        return together.reduce_lines(
            min(gather(together.reduce_rate(ranks))), len(set(hosts)), device_type, gradient_bytes
        )

    def sharing() -> list[Line]:
        folders = shared_folders(config).items()
        return [line for key, folder in folders for line in together.shared_lines(ranks, folder, key, places)]

    def clocks() -> list[Line]:
        return together.clock_lines(gather(together.clock_readings(ranks)), places)

    def slow() -> list[Line]:
        return together.gemm_lines(gather(together.gemm_time(ranks)), places, device_type)

    several = [sharing, clocks, slow, reducing] if ranks.size > 1 else [slow]
    return [reading, *several] if has_data else several


def bounded(name: str, call: Callable[[], Any], until_s: float) -> Any:
    """The result of `call`, which all ranks make; the Line of a fault if it fails or takes too long."""
    box: list[Any] = []

    def run() -> list[Line]:
        box.append(call())
        return []

    lines = Pending(name, run).lines(min(time.monotonic() + TOGETHER_S, until_s))
    if not lines:
        return box[0]
    remedy = "a rank hangs or has ended: look at the output of the others, and at firewalls between the machines"
    return Line("fault", name, f"the ranks met, but this step of all did not end: {lines[0].found}", remedy)


def report(lines: Sequence[Line], args: argparse.Namespace, began_s: float, hosts: Sequence[str], rank: int) -> int:
    """Print the lines, and write them to --json (rank 0); returns the exit code, which follows from the lines."""
    counts = {level: sum(line.level == level for line in lines) for level in LEVELS}
    code = FAULT if counts["fault"] else SOUND
    if rank != 0:
        return code
    took_s, machines = time.monotonic() - began_s, sorted(set(hosts))
    more = " ..." if len(machines) > 4 else ""
    where = f"{len(hosts)} rank{'s' * (len(hosts) > 1)} on {', '.join(machines[:4])}{more}"
    console.print(f"[bold]doctor[/] {args.config}, {where}")
    for line in lines:
        console.print(markup(line))
    summary = ", ".join(f"{counts[level]} {level}{'s' * (level != 'ok' and counts[level] != 1)}" for level in LEVELS)
    console.print(f"{summary} in {took_s:.1f} s: {'do not launch' if code else 'launch'}")
    if args.json:
        record = {"code": code, "seconds": took_s, "hosts": machines, "lines": lines}
        write_json(args.json, record)
    return code


def command(argv: Sequence[str] | None = None) -> NoReturn:
    """Run this process as one rank, and exit with the code of `main` without waiting for a check that hangs."""
    leave(main(argv))


if __name__ == "__main__":
    command()
