"""Arrays of slurm/encode.sh on a test cluster: submitted as a user would, and what a finished data set has to be."""

import json
import re
from dataclasses import dataclass
from pathlib import Path

from data_tools.cli import main as latte_data
from tests.conftest import ROOT
from tests.data_tools.kills import CONFIG, SIZES, SLOWER, command, contents, holders, make_source
from tests.slurm.cluster import Cluster
from tests.slurm.jobs import SITE, Job

NUM_TASKS, PER_SHARD = 3, 2


@dataclass(frozen=True)
class Clips:
    """Clips to encode, some of them broken, and every file that one worker without Slurm makes of them."""

    shards: Path
    whole: dict[str, bytes]

    @classmethod
    def make(cls, folder: Path, count: int) -> "Clips":
        shards = make_source(folder / "shards", count, PER_SHARD)
        assert latte_data(command(shards, folder / "whole", 1)[3:]) == 0
        return cls(shards, contents(folder / "whole"))

    @property
    def num_sound(self) -> int:
        return sum(shard["count"] for shard in json.loads(self.whole["manifest.json"])["shards"])


@dataclass
class Array:
    """A submitted array."""

    clips: Clips
    output: Path
    tasks: list[Job]

    def wait_end(self) -> list[str]:
        """Wait until every task is over; the states they ended in."""
        return [task.wait_end(180) for task in self.tasks]

    def wait_worker(self) -> tuple[Job, int]:
        """Wait until a shard is being made; by which task, and the process of its one worker."""
        found: list[int] = []
        self.tasks[0].wait(lambda: found.extend(holders(self.output)) or bool(found), "a claim")
        pid = found[0]
        environ = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        (number,) = [int(each.partition(b"=")[2]) for each in environ if each.startswith(b"SLURM_ARRAY_TASK_ID=")]
        return self.tasks[number], pid

    @property
    def num_done(self) -> int:
        """Clips that the commands which came to their end made, over all tasks and restarts."""
        return sum(int(count) for task in self.tasks for count in re.findall(r"^done (\d+),", task.log, re.MULTILINE))

    def story(self) -> str:
        """Everything that explains a failed test."""
        return "\n".join(task.story() for task in self.tasks)

    def assert_whole(self) -> None:
        """Every byte of every file as one worker made it, nothing else left, and sound for `latte-data verify`."""
        made = contents(self.output)
        assert made.keys() == self.clips.whole.keys(), (made.keys() ^ self.clips.whole.keys(), self.story())
        assert made == self.clips.whole, [name for name in made if made[name] != self.clips.whole[name]]
        assert latte_data(["verify", str(self.output)]) == 0


def submit_array(cluster: Cluster, clips: Clips, folder: Path, *sbatch: str, **environ: str) -> Array:
    """`sbatch --array=0-2 slurm/encode.sh ...` without GPUs, one worker a task; `environ` exported."""
    folder.mkdir(parents=True)
    options = [f"--array=0-{NUM_TASKS - 1}", "--gpus=0", "--cpus-per-task=1", f"--chdir={ROOT}", "--parsable"]
    options += [f"--output={folder}/slurm-%a.out", *sbatch]
    words = [str(clips.shards), str(folder / "latents"), str(CONFIG), *SLOWER, SIZES]
    job = cluster.call("sbatch", *options, str(ROOT / "slurm" / "encode.sh"), *words, **(SITE | environ))
    numbers = range(NUM_TASKS)
    tasks = [Job(cluster, f"{job}_{n}", folder / "latents", folder / f"slurm-{n}.out") for n in numbers]
    return Array(clips, folder / "latents", tasks)
