"""The architecture, as a table: which module may import which. Change it on purpose, with a reason in the change."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ENTRY_POINTS = {
    "train", "sample", "serve", "evaluate", "import_weights", "export", "report", "ckpt", "table", "bench",
    "quickstart", "doctor", "coverage", "keys",
}  # fmt: skip

# module (or package) -> what it may import of this repository. An entry point may import everything but data_tools and
# the other entry points; cli imports them lazily, by name.
MAY_IMPORT = {
    "__init__": set(),
    "store": {"store"},
    "rng": set(),
    "settings": set(),
    "arguments": set(),  # of command lines: entry points, and packages with one
    "atomic": set(),  # text files that are complete or not there
    "plain_json": {"atomic"},  # measured figures as JSON: whoever writes some
    "model": {"model"},
    "diffusion": {"diffusion"},
    "data": {"data", "store", "rng"},
    "encoders": {"encoders"},
    "optim": set(),
    "engine": {"engine", "optim"},
    "ema": {"engine.base"},
    "checkpoint": {"checkpoint", "engine.base", "settings", "store"},
    # From a micro-batch to the loss's arguments.
    "conditioning": {"data", "encoders", "rng"},
    # A micro-batch's losses and work, for trainer, estimate and the benchmark of a step. The model is called here,
    # so here clips are split over the ranks of a sequence group and their predictions joined.
    "losses": {"conditioning", "config", "diffusion", "engine.parallel.sequence", "model"},
    # Micro-batches that no data set is needed for: what estimate runs its fake steps on, and bench its real ones.
    "synthetic": {"conditioning", "config"},
    # Seconds of a call; what is chosen by measurement before a run's first step (attention; norm and gate).
    "timing": set(),
    "choices": {"choices", "config", "engine.dist", "model", "plain_json", "timing"},
    "run": {"run", "atomic", "settings", "store"},  # store: a claim lies where the checkpoints go
    "run.metrics": {"atomic", "plain_json"},
    "run.profile": {"engine.dist", "plain_json"},  # one table of all ranks
    "run.journal": {"conditioning", "diffusion", "engine.base", "engine.dist", "plain_json", "run", "store"},
    # The scores of sampled videos; the command is an entry point.
    "evaluation": {"evaluation", "data", "engine.dist", "plain_json", "rng", "store"},
    # The parts of a report page; they only read run folders.
    "reporting": {"reporting", "data.video", "evaluation.videos", "run.metrics", "settings"},
    # What a run will need, before it runs; the command is one of its modules, and training asks it after running out of
    # memory. It runs the trainer's loss on fake tensors, on synthetic micro-batches, as one rank of a sequence group,
    # and follows what the engines and the optimizer's groups do with the weights.
    "estimate": {
        "estimate",
        "arguments",
        "conditioning",
        "config",
        "data.buckets",
        "data.plan",
        "data.schema",
        "data.shares",
        "diffusion",
        "encoders",
        "engine.activations",
        "engine.base",
        "engine.fsdp2",
        "engine.parallel.sequence",
        "losses",
        "model",
        "optim",
        "plain_json",
        "run.throughput",
        "synthetic",
    },
    # Whole weights from a checkpoint or a diffusers folder, for everything that starts from them; equal on all ranks.
    "weights": {"checkpoint", "diffusion", "engine.base", "model", "settings", "store"},
    # Requests, models and walks from noise to videos, for everything that samples: the command and validation.
    "sampling": {
        "sampling",
        "checkpoint",
        "data",
        "diffusion",
        "encoders",
        "engine.dist",
        "engine.fsdp2",
        "model",
        "settings",
        "weights",
    },
    # Looking at a run while it trains; its settings are part of the config, the rest takes the config.
    "validation.settings": set(),
    "validation": {
        "validation",
        "atomic",
        "conditioning",
        "config",
        "data",
        "diffusion",
        "ema",
        "encoders",
        "engine.base",
        "engine.dist",
        "plain_json",
        "rng",
        "run",
        "sampling",
    },
    "config": {
        "settings",
        "checkpoint",
        "conditioning",
        "data",
        "diffusion",
        "ema",
        "encoders",
        "engine.base",
        "model",
        "optim",
        "run.folder",
        "run.tracking",
        "store",
        "validation.settings",
    },
    "check_data": {"config", "data", "encoders"},
    "check_folders": {"config", "engine.dist", "run.folder", "store"},
    # From a checkpoint back into a run. Only the trainer imports it.
    # weights: where the checkpoints of a run folder may lie, which a new checkpoint.dir must not hide.
    "resume": {"checkpoint", "config", "ema", "engine", "run", "settings", "store", "weights"},
    # From a config to the plan: what the trainer does and `latte-scale coverage` prints. The VAE's downscale names the
    # sizes of whole clips as those of their latents.
    "planning": {"config", "data", "encoders"},
    "broken_pipe": set(),  # for both command lines: when the reader of their output is gone
    "cli": {"arguments", "broken_pipe"},
}
NEVER = {"model": {"torch.distributed", "deepspeed"}, "diffusion": {"torch.distributed"}, "data": {"torch.distributed"}}


def imports(path: Path) -> set[str]:
    """Dotted names of everything a file imports, at the top or inside functions."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import; write the whole name"
            names |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    return names


def owner(path: Path) -> str:
    """The row of the table that a file of latte_scale belongs to: its own, or that of its package."""
    parts = path.relative_to(ROOT / "latte_scale").with_suffix("").parts
    return ".".join(parts) if ".".join(parts) in MAY_IMPORT else parts[0]


def repository_imports(path: Path) -> set[str]:
    """What a file imports of latte_scale, without the prefix."""
    found = {name.removeprefix("latte_scale.") for name in imports(path) if name.startswith("latte_scale.")}
    return {name for name in found if is_module(name)}


def is_module(name: str) -> bool:
    base = ROOT / "latte_scale" / Path(*name.split("."))
    return base.is_dir() or base.with_suffix(".py").is_file()


def allowed(name: str, permitted: set[str]) -> bool:
    return any(name == entry or name.startswith(entry + ".") for entry in permitted)


MODULES = sorted(path for path in (ROOT / "latte_scale").rglob("*.py") if path.stat().st_size)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_module_imports_only_what_the_table_allows(path):
    row = owner(path)
    assert row in MAY_IMPORT or row in ENTRY_POINTS, f"{path}: give it a row in tests/test_imports.py"
    for name in repository_imports(path):
        if row in ENTRY_POINTS:
            assert name.split(".")[0] not in ENTRY_POINTS - {row}, f"{row} imports the entry point {name}"
        else:
            assert allowed(name, MAY_IMPORT[row]), f"{path.name} imports latte_scale.{name}"
    for name in imports(path):
        assert not name.startswith("data_tools"), f"{path}: latte_scale never imports data_tools"
        assert not any(name == n or name.startswith(n + ".") for n in NEVER.get(row, ())), f"{path} imports {name}"


def test_the_table_allows_nothing_that_no_module_imports():
    used = {row: set() for row in MAY_IMPORT}
    for path in MODULES:
        row = owner(path)
        for name in repository_imports(path) if row in MAY_IMPORT else ():
            used[row] |= {entry for entry in MAY_IMPORT[row] if allowed(name, {entry})}
    assert {row: permitted - used[row] for row, permitted in MAY_IMPORT.items() if permitted - used[row]} == {}


def test_torch_distributed_is_used_in_engine_only():
    """And its checkpoint format, which makes no process group, by the converter and by the benchmark beside it."""
    dcp = [("checkpoint", "dcp.py"), ("bench", "checkpoint.py")]
    for path in MODULES:
        if owner(path) != "engine" and path.parts[-2:] not in dcp:
            assert not any(name.startswith("torch.distributed") for name in imports(path)), path


def test_deepspeed_is_imported_by_one_file():
    users = [path.name for path in MODULES if any(name.split(".")[0] == "deepspeed" for name in imports(path))]
    assert users == ["zero.py"]


@pytest.mark.parametrize("path", sorted((ROOT / "data_tools").glob("*.py")), ids=lambda path: path.name)
def test_the_toolchain_shares_only_the_shard_format_with_the_trainer(path):
    shared = {"data", "store", "rng", "encoders", "settings"}
    if path.name == "cli.py":
        shared |= {"arguments", "broken_pipe"}  # both commands answer an unknown verb and a closed pipe alike
    for name in repository_imports(path):
        assert allowed(name, shared), f"{path.name} imports latte_scale.{name}"
