"""Training jobs on a test cluster: submitted as a user would, watched through Slurm and the files of the run."""

import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from latte_scale.run.metrics import read_metrics
from tests.conftest import ROOT, Run
from tests.slurm.cluster import Cluster

ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY"}

# What a site would write into slurm/env.sh or export before sbatch.
SITE = {"LATTE_PYTHON": sys.executable, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
if "TORCH_EXTENSIONS_DIR" not in os.environ:  # DeepSpeed's operators, which other tests built there
    SITE["TORCH_EXTENSIONS_DIR"] = str(Path.home() / ".cache" / "torch_extensions")

# A run long enough to be interrupted, with a checkpoint now and then.
STEPS = 300
SMALL = (f"train.steps={STEPS}", "checkpoint.every_steps=50", "checkpoint.keep_last=2", "data.num_workers=0")


@dataclass
class Job:
    """One submitted training job and its run folder."""

    cluster: Cluster
    id: str
    folder: Path
    output: Path  # what the job script prints, over all restarts

    @property
    def fields(self) -> dict[str, str]:
        """What `scontrol show job` says."""
        words = self.cluster.call("scontrol", "show", "job", "--oneliner", self.id, check=False).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    @property
    def state(self) -> str:
        return self.fields.get("JobState", "UNKNOWN")

    @property
    def restarts(self) -> int:
        return int(self.fields["Restarts"])

    @property
    def run(self) -> Run:
        """The run folder, with the code that exit.json holds."""
        return Run(0, "", self.folder)

    @property
    def log(self) -> str:
        """What the job script has printed, over all restarts."""
        return self.output.read_text() if self.output.exists() else ""

    @property
    def last_step(self) -> int:
        """The last step in metrics.jsonl; -1 before the first."""
        records = read_metrics(self.folder / "metrics.jsonl")
        return records[-1]["step"] if records else -1

    def story(self) -> str:
        """Everything that explains a failed test."""
        logs = sorted((self.folder / "logs").glob("rank-*.out"))
        tails = [f"---- {path.name}\n{path.read_text()[-3000:]}" for path in logs]
        return "\n".join([str(self.fields), self.log, *tails])

    def wait(self, until: Callable[[], bool], what: str, timeout_s: float = 90.0) -> None:
        """Wait until something is so; TimeoutError with the job's story."""
        deadline_s = time.monotonic() + timeout_s
        while not until():
            if time.monotonic() > deadline_s:
                raise TimeoutError(f"waited {timeout_s:.0f} s for {what}\n{self.story()}")
            time.sleep(0.1)

    def wait_step(self, step: int, timeout_s: float = 90.0) -> None:
        """Wait until a step is logged."""
        self.wait(lambda: self.last_step >= step, f"step {step}", timeout_s)

    def wait_end(self, timeout_s: float = 120.0) -> str:
        """Wait until the job is over; the state it ended in."""
        self.wait(lambda: self.state in ENDED, "the end of the job", timeout_s)
        return self.state

    def cancel(self) -> None:
        """End the job."""
        self.cluster.call("scancel", self.id, check=False)
        self.wait_end()


def submit(
    cluster: Cluster,
    folder: Path,
    data: Path | str,
    *overrides: str,
    sbatch: tuple[str, ...] = (),
    nodes: int = 2,
    tasks: int = 1,
    output: Path | None = None,
    **environ: str,
) -> Job:
    """`sbatch slurm/train_t2v.sh configs/tiny_cpu.yaml ...` without GPUs; `tasks` a node, `environ` exported."""
    output = output or folder.with_suffix(".out")
    options = [f"--nodes={nodes}", f"--ntasks-per-node={tasks}", "--gpus-per-node=0", "--cpus-per-task=1"]
    options += [f"--output={output}", f"--chdir={ROOT}", "--parsable", *sbatch]
    words = ["configs/tiny_cpu.yaml", f"run.dir={folder}", f"data.url={data}", "engine.kind=fsdp2", *SMALL, *overrides]
    script = str(ROOT / "slurm" / "train_t2v.sh")
    return Job(cluster, cluster.call("sbatch", *options, script, *words, **(SITE | environ)), folder, output)


def assert_same_losses(job: Job, unbroken: Run, steps: int = STEPS) -> None:
    """Every step once, in order, with losses, samples and noise of the run that nothing interrupted: bit for bit."""
    records = job.run.metrics  # read once: the job may still be writing
    assert [record["step"] for record in records] == list(range(len(records)))
    records = records[:steps]
    assert len(records) == steps, job.story()
    assert [record["loss"] for record in records] == unbroken.losses[:steps]
    assert [record["sample_ids_sha"] for record in records] == unbroken.digests[:steps]
