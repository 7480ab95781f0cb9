"""A step's metrics, from the device to `metrics.jsonl`: one small all-reduce per step, read one step late.

`Tally` collects this rank's numbers of one step without waiting for the device and sums them over the ranks in one
all-reduce, which also carries any rank's request to stop. `Journal` takes the summed numbers, the same on all ranks,
and turns them into metrics, a console line and decisions on which all ranks must agree: to stop, or to give up.
"""

import logging
import time
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import Tensor

from latte_scale.conditioning import ModelInputs
from latte_scale.diffusion.loss import NUM_BANDS, DiffusionSettings, band_of
from latte_scale.engine.base import StepResult
from latte_scale.engine.dist import Ranks
from latte_scale.plain_json import finite
from latte_scale.run.folder import StopRunError
from latte_scale.run.metrics import MetricsFile
from latte_scale.run.readback import SpikeDetector
from latte_scale.run.throughput import Throughput, memory_bytes, peak_flops, worker_memory_bytes
from latte_scale.store import Counters

logger = logging.getLogger("latte_scale")

HALF = 2**31  # the digest is sent as two numbers, which a float64 sum keeps exact
STORE_FIELDS = tuple(each.name for each in fields(Counters))
HOST_FIELDS = (
    *("samples", "tokens", "flops", "data_wait_s"),
    *STORE_FIELDS,  # requests to object stores for the samples of the step
    "replaced",  # samples that could not be read and were replaced
    *("graphs", "recompiled"),  # compiled, with engine.compile; and those of them after the bucket's first step
    *("stop", "lost", "save_failed"),  # ranks that were asked to stop, may no longer write, could not save
    *("digest_low", "digest_high"),
    "digest_apart",  # not 0 if the ranks of a sequence group had different samples or noise
)
FIELDS = (
    "loss",
    "contrastive",
    *(f"band_loss_{band}" for band in range(NUM_BANDS)),
    *(f"band_count_{band}" for band in range(NUM_BANDS)),
    *HOST_FIELDS,
    "grad_norm",
    "applied",
)


@dataclass
class Tally:
    """This rank's numbers of one step. Ranks of a sequence group share their samples: the first of them counts them."""

    device: torch.device
    diffusion: DiffusionSettings
    sequence_rank: int = 0
    sequence_size: int = 1
    host: dict[str, float] = field(default_factory=lambda: dict.fromkeys(HOST_FIELDS, 0.0))
    losses: list[Tensor] = field(default_factory=list)  # per micro-batch: [2 + 2 NUM_BANDS] fp64 on the device

    def add(self, inputs: ModelInputs, loss_B: Tensor, contrastive_B: Tensor | None, tokens: int, flops: float) -> None:
        """Count one micro-batch; `tokens` and `flops` (of a step without recompute) are those of its real samples."""
        one_hot = np.eye(NUM_BANDS)[band_of(inputs.uniform_B, self.diffusion)]
        counts = self.sequence_rank == 0
        weight_B = inputs.weight_B.double() * counts
        band_BK = torch.from_numpy(one_hot).to(self.device, non_blocking=True) * weight_B[:, None]
        weighted_B = loss_B.detach().double() * weight_B
        contrastive = weighted_B.new_zeros(1) if contrastive_B is None else contrastive_B.detach().double() @ weight_B
        sums = [weighted_B.sum()[None], contrastive.view(1), weighted_B @ band_BK, band_BK.sum(0)]
        self.losses.append(torch.cat(sums))
        low, high = inputs.digest % HALF, inputs.digest // HALF
        added = {"samples": inputs.num_samples, "tokens": tokens, "flops": flops, "digest_low": low}
        for name, value in (added | {"digest_high": high}).items():
            self.host[name] += value * counts
        self.host["digest_apart"] += low * (self.sequence_size - 1) if counts else -low

    def count_reads(self, fetched: Iterable[Counters]) -> None:
        """Add the requests to object stores for the step; every rank of a sequence group makes its own."""
        for each in fetched:
            for name, value in asdict(each).items():
                self.host[name] += value

    def count_replaced(self, number: int) -> None:
        """Add this rank's replaced samples; ranks of a sequence group replace the same ones, which count once."""
        self.host["replaced"] += number * (self.sequence_rank == 0)

    def reduce(self, ranks: Ranks, result: StepResult) -> Tensor:
        """The step's numbers summed over the ranks, then norm and flag: [len(FIELDS)] fp64 on the device."""
        host = torch.tensor([self.host[name] for name in HOST_FIELDS], dtype=torch.float64)
        numbers = torch.cat([torch.stack(self.losses).sum(0), host.to(self.device, non_blocking=True)])
        ranks.sum_(numbers)
        return torch.cat([numbers, torch.stack([result.grad_norm, result.applied]).to(self.device, torch.float64)])


@dataclass(frozen=True)
class Progress:
    """The state of a run besides its tensors: a few integers."""

    step: int = 0  # the next step to run
    skipped_steps: tuple[int, ...] = ()  # steps whose update was not finite and was not applied

    def updates_before(self, step: int) -> int:
        """The number of updates that determines the learning rate of `step`.

        Whether step - 1 was applied is not known when `step` begins (its flag is read one step late), so it counts as
        applied; also after a resume, when it is known, so that a resume changes no learning rate.
        """
        return step - sum(skipped < step - 1 for skipped in self.skipped_steps)

    @property
    def skipped_in_a_row(self) -> int:
        """How many of the newest finished steps, in a row, had no applied update."""
        skipped, row = set(self.skipped_steps), 0
        while self.step - 1 - row in skipped:
            row += 1
        return row


class Journal:
    """Turns the summed numbers of each step into a record: the same on all ranks, written by rank 0."""

    def __init__(
        self,
        progress: Progress,
        file: MetricsFile | None,
        console: Console,
        device: torch.device,
        num_devices: int,
        every_steps: int,
        total_steps: int,
        recompute_share: float,
        max_skipped: int,
        contrastive: bool = False,
        compiled: bool = False,
    ) -> None:
        """`file`: where to write, None on ranks that do not. `recompute_share`: recomputed over model FLOPs.

        `contrastive`: the run has a contrastive loss, reported with the diffusion loss. `compiled`: its blocks are
        compiled, and the graphs made are reported.
        """
        self.progress, self.stop_requested = progress, False
        self._file, self._console, self._device, self._num_devices = file, console, device, num_devices
        self._every, self._total, self._max_skipped = every_steps, total_steps, max_skipped
        self._peak = peak_flops(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
        self._recompute_share, self._contrastive, self._compiled = recompute_share, contrastive, compiled
        self._known: dict[int, dict[str, Any]] = {}
        self._sample_ids: dict[int, list[str]] = {}
        self._spikes: dict[str, SpikeDetector] = defaultdict(SpikeDetector)  # by bucket: each has its own level of loss
        self._save_failed = False
        self._from_stores = False  # samples come from object stores: known from the first request on
        self._began_at_s: dict[int, float] = {}
        self._first_step, self._started_at_s = progress.step, time.perf_counter()
        self.throughput = Throughput(self._started_at_s)

    def begin(self, step: int, lr: float, epoch: float, samples_seen: int, bucket: str) -> None:
        """Keep what the host knows of a step until its numbers arrive; `samples_seen` includes this step."""
        self._known[step] = {"samples_seen": samples_seen, "epoch": epoch, "lr": lr, "bucket": bucket}
        self._began_at_s[step] = time.perf_counter()

    def note_samples(self, step: int, sample_ids: list[str]) -> None:
        """Keep this rank's samples of a step until its numbers arrive: they are logged if something is wrong."""
        self._sample_ids[step] = [name for name in sample_ids if name]  # an empty slot has no name

    def take(self, step: int, numbers: list[float]) -> None:
        """Account for one finished step.

        Raises StopRunError on all ranks after too many skipped updates in a row, or once any rank may no longer write.
        """
        values = dict(zip(FIELDS, numbers, strict=True))
        known = self._known.pop(step)
        ended_at_s = self._began_at_s.get(step + 1, time.perf_counter())  # a step lasts until the next one begins
        self._began_at_s.pop(step)
        if values["lost"]:
            raise StopRunError(
                f"stopped at step {step} without a save: the run folder or the place of the checkpoints was taken over "
                "by another attempt or run, or the launcher of these processes is gone"
            )
        if values["digest_apart"]:
            raise RuntimeError(
                f"step {step}: the ranks of a sequence group had different samples, so its update mixed clips; nothing "
                "was saved since. logs/replaced-*.jsonl names a sample that only some of them could read: run again"
            )
        skipped = self.progress.skipped_steps
        if not values["applied"]:
            skipped = (*skipped, step)
        self._warn(step, values, known["bucket"], self._sample_ids.pop(step, []))
        self.progress = Progress(step + 1, skipped)
        self.stop_requested |= values["stop"] > 0
        self._count(values)
        if (step + 1) % self._every == 0 or step + 1 == self._total:
            self._write(self._record(step, values, known, ended_at_s))
        if self.progress.skipped_in_a_row > self._max_skipped:
            raise StopRunError(
                f"{self.progress.skipped_in_a_row} updates in a row were not finite, the last at step {step} "
                f"(train.max_skipped is {self._max_skipped}); lower train.lr, or look at the samples of these steps"
            )

    def _warn(self, step: int, values: dict[str, float], bucket: str, sample_ids: list[str]) -> None:
        """Print what needs attention, and log it on every rank with the rank's own samples."""
        loss = values["loss"] / values["samples"]
        height = self._spikes[bucket].look(loss)
        problem = None
        if not values["applied"]:
            problem = f"gradient norm {values['grad_norm']}, update skipped on all ranks"
        elif height is not None:
            problem = f"loss spike: {loss:.4f} is {height:.0f} deviations above the median of the steps before"
        if problem is not None:
            logger.warning("step %d: %s; samples of this rank: %s", step, problem, ", ".join(sample_ids) or "not noted")
            self._print(f"warning: step {step}: {problem}; logs/rank-*.log name the samples")
        if values["save_failed"] and not self._save_failed:
            problem = (
                f"the newest checkpoint was not saved ({int(values['save_failed'])} ranks failed; their logs say why)"
            )
            logger.error("step %d: %s; the next save is tried as planned", step, problem)
            self._print(f"warning: step {step}: {problem}; the next save is tried as planned")
        self._save_failed = values["save_failed"] > 0

    def _print(self, line: str) -> None:
        if self._file is not None:
            self._console.print(line, markup=False)

    def _count(self, values: dict[str, float]) -> None:
        window = self.throughput
        window.samples += int(values["samples"])
        window.tokens += int(values["tokens"])
        window.model_flops += values["flops"]
        window.recomputed_flops += values["flops"] * self._recompute_share
        window.data_wait_s += values["data_wait_s"] / self._num_devices
        window.replaced += int(values["replaced"])
        window.graphs += int(values["graphs"])
        window.recompiled += int(values["recompiled"])
        for name in STORE_FIELDS:
            window.fetched[name] += int(values[name])
        self._from_stores |= any(window.fetched.values())

    def _record(self, step: int, values: dict[str, float], known: dict[str, Any], ended_at_s: float) -> dict[str, Any]:
        digest = (int(values["digest_low"]) + int(values["digest_high"]) * HALF) % 2**62
        bands = [
            finite(values[f"band_loss_{k}"] / count) if (count := values[f"band_count_{k}"]) else None
            for k in range(NUM_BANDS)
        ]
        record = {
            "step": step,
            "loss": finite(values["loss"] / values["samples"]),
            "loss_by_band": bands,
            **({"contrastive_loss": finite(values["contrastive"] / values["samples"])} if self._contrastive else {}),
            "grad_norm": finite(values["grad_norm"]),
            "applied": bool(values["applied"]),
            **known,
            "sample_ids_sha": f"{digest:016x}",
            "num_skipped": len(self.progress.skipped_steps),
            "samples_replaced": self.throughput.replaced,
            "save_failed": int(values["save_failed"]),
            **self._graphs(),
            "memory_gib": memory_bytes(self._device) / 2**30,
            "worker_memory_gib": [size / 2**30 for size in worker_memory_bytes()],  # rank 0's; constant if all is well
            **self.throughput.summary(ended_at_s, self._num_devices, self._peak),
            **(self.throughput.of_stores(ended_at_s) if self._from_stores else {}),
            "time": time.time(),
        }
        self.throughput = Throughput(ended_at_s)
        return record

    def _graphs(self) -> dict[str, int]:
        """Graphs that all ranks compiled since the last record, and those made after their bucket's first step."""
        if not self._compiled:
            return {}
        return {"graphs": self.throughput.graphs, "recompiled": self.throughput.recompiled}

    def _write(self, record: dict[str, Any]) -> None:
        if self._file is None:
            return
        self._file.append(record)
        done = record["step"] + 1
        seconds_a_step = (time.perf_counter() - self._started_at_s) / max(1, done - self._first_step)
        self._console.print(console_line(record, done, self._total, seconds_a_step))


def console_line(record: dict[str, Any], done: int, total: int, seconds_a_step: float) -> str:
    """One line a person reads while the run goes on."""
    loss = "  nan " if record["loss"] is None else f"{record['loss']:.4f}"
    norm = "nan" if record["grad_norm"] is None else f"{record['grad_norm']:.3f}"
    minutes, seconds = divmod(int(seconds_a_step * (total - done)), 60)
    mfu = f"  MFU {record['mfu']:.1%}" if record.get("mfu") is not None else ""
    replaced = f"  samples replaced {record['samples_replaced']}" if record["samples_replaced"] else ""
    return (
        f"step {done:>{len(str(total))}}/{total}  loss [bold]{loss}[/]  grad {norm}  lr {record['lr']:.2e}  "
        f"{record['samples_per_s']:.1f} samples/s{mfu}  data wait {record['data_wait_share']:.0%}  "
        f"left {minutes}:{seconds:02d}{replaced}"
    )
