"""A trial of random_runs.py, and what a seed draws: settings of a run and its attempts.

Values are drawn uniformly from the tables; a value listed twice is drawn twice as often. Settings that exclude each
other are avoided where one line suffices: most trials should train.
"""

import json
import random
import signal
from collections.abc import Iterator
from dataclasses import dataclass, replace

from latte_scale.run.folder import FAILED, REQUEUE, STOP

NUM_CLASSES = 3
MORE_SIZES = (
    "[{frames: 4, height: 32, width: 48}, {frames: 4, height: 48, width: 32}, {frames: 1, height: 64, width: 64}]"
)
KILLED = -signal.SIGKILL
ENDS = {
    "file": {REQUEUE},
    "SIGTERM": {REQUEUE},
    "SIGKILL": {KILLED},
    "SIGKILL while it saves": {KILLED},
    "SIGKILL of one rank": {KILLED, FAILED, -signal.SIGABRT},
    "budget": {REQUEUE},
    "full disk": {STOP, FAILED},
}
"""What ends an attempt, and the exit codes that say so. A launcher ends the ranks that wait for a dead one."""
FROM_OUTSIDE = tuple(end for end in ENDS if end not in ("budget", "full disk"))
FORMATS = ("latte", "dcp", "deepspeed")
BETWEEN = ("", "", "", "damage", *FORMATS)
"""What happens to the newest checkpoint between two attempts: a flipped bit, or a way to another place by a format."""
RUN = {
    "train.lr": ("1e-3", "1e-3", "4e-3"),
    "train.precision": (*("fp32",) * 8, "bf16", "fp8"),
    "train.deterministic": ("false", "false", "true"),
    "train.lr_schedule": ("constant", "constant", "cosine"),
    "train.warmup_steps": (0, 1, 3),
    "train.caption_drop": (0.0, 0.1, 0.5),
    "optim.clip_norm": ("null", 0.05, 1.0),
    "optim.clip_from_update": (0, 0, 3, 6),
    "optim.weight_decay": (0.0, 0.1),
    "optim.betas": ("[0.9, 0.999]", "[0.9, 0.999]", "[0.0, 0.9]"),
    "optim.eps": ("1e-8", "1e-8", "1e-5"),
    "ema.decays": ("[0.99]", "[0.9, 0.999]", "[0.9, 0.999]", "[]"),
    "ema.warmup": ("true", "false"),
    "video.hflip": ("true", "false"),
    "data.shuffle_window": ("null", "null", 4, 16),
}
OF_FRAMES = {
    "train.joint_images": (0, 0, 0, 1, 3),
    "train.known_frames.share": (0, 0, 0, 0.5),
    "train.known_frames.most": ("null", "null", 1),
}
OBJECTIVES = {
    "epsilon": {"model.out_channels": (4, 8), "diffusion.min_snr_gamma": ("null", 5)},
    "v": {"diffusion.zero_terminal_snr": ("true", "false"), "diffusion.num_timesteps": (1000, 50)},
    "flow": {"diffusion.flow_shift": (1, 3), "diffusion.min_snr_gamma": ("null", 5)},
}
CLASS_MODEL = {
    "depth": (2, 4),
    "variant": ("interleaved", "late_fusion", "sequential", "parallel"),
    "num_classes": (0, NUM_CLASSES),
    "injection": ("s_adaln", "s_adaln", "all_tokens"),
    "temporal_position": ("sincos", "learnable", "learnable", "rotary"),
    "mlp_ratio": (4.0, 2.0),
}
ATTEMPT = {
    "data.num_workers": (0, 0, 1, 2),
    "data.prefetch": (1, 2, 3),
    "checkpoint.every_steps": (1, 2, 3, 5),
    "checkpoint.keep_last": (1, 2, 2, 3),
    "checkpoint.asynchronous": ("true", "true", "false"),
    "attention.backend": ("auto", "auto", "auto", "math"),
}
"""Settings that may change when a run goes on, beside those of the engine."""
VALIDATION = {
    "validation.every_steps": (2, 3, 5),
    "validation.num_samples": (3, 4, 9),
    "validation.weights": ("ema", "raw"),
    "validation.videos_every_steps": (0, 0, 3),
    "validation.sampling_steps": (2,),
    "validation.batch_size": (1, 4),
}
ENGINES = {
    "single": {},
    "fsdp2": {
        "engine.blocks_per_unit": (1, 2, 3),
        "engine.prefetch_units": (0, 1, 2),
        "engine.reshard_after_forward": ("auto", "always", "never"),
        "engine.replicate": (1, 1, 1, 2),
    },
    "zero": {
        "engine.zero_stage": (1, 2, 3, 3),
        "engine.cpu_offload": ("true", "false"),
        "engine.zero_bucket_elements": (1000, 2001, 50_000_000),
        "engine.zero_prefetch_elements": (0, 2000, 50_000_000),
        "engine.zero_persistent_elements": (0, 200, 10_000),
    },
}
WHOLE_CLIPS = ("joint_images=1", "joint_images=3", "share=0.5", "contrastive", "more_sizes", "sequential", "parallel")
"""Settings that do not go with engine.sequence_parallel."""
CHECKPOINTING = {
    "engine.activation_checkpointing": ("none", "selective", "full", "offload"),
    "engine.checkpointed_share": (1.0, 1.0, 0.5),
    "engine.other_blocks": ("none", "none", "selective"),
}
TO_FIT = ("engine.activation_checkpointing=auto", "engine.memory_budget_gib=60")
START = ("train.steps=2", "train.lr_schedule=constant", "train.warmup_steps=0", "validation.every_steps=0")
IMAGES = (
    *("data.url=DATA/images", "video.frames=1", "video.more_sizes=[]", "data.holdout=0", "data.images=null"),
    *("train.joint_images=0", "train.known_frames.share=0", "train.known_frames.most=null"),
)
"""A stage of images, before one of videos."""


@dataclass(frozen=True)
class Leg:
    """One attempt, and how it is ended at a step."""

    ranks: int
    options: tuple[str, ...]
    end: str  # one of ENDS; steps: by a lower train.steps; "" of the last one, which nothing ends
    step: int
    before: str = ""  # one of BETWEEN, done to what the attempt before left

    def __str__(self) -> str:
        ended = f", {self.end} at {self.step}" if self.end else ""
        began = f"{self.before}, " if self.before else ""
        return f"{began}{self.ranks} x {' '.join(self.options)}{ended}".replace("engine.", "")


@dataclass(frozen=True)
class Trial:
    """What a seed draws. Options name data sets as DATA/..., and the run whose weights it begins with as START."""

    seed: int
    steps: int
    options: tuple[str, ...]
    legs: tuple[Leg, ...]
    start: tuple[str, ...] | None  # options of a run that comes before, for model.init

    @property
    def whole(self) -> Leg:
        """One attempt on one process, which nothing ends."""
        return Leg(1, ("engine.kind=single", self._micro_batch), "", self.steps)

    @property
    def precision(self) -> str:
        """That of train.precision; bf16-residual for bf16 with a residual stream of bf16."""
        name = next(option.partition("=")[2] for option in self.options if option.startswith("train.precision="))
        return "bf16-residual" if name == "bf16" and "train.residual=bf16" in self.options else name

    @property
    def is_uniform(self) -> bool:
        """Whether engine, ranks and micro-batch never change."""
        return len({(leg.ranks, leg.options) for leg in self.legs}) == 1

    @property
    def _micro_batch(self) -> str:
        """The option of the first attempt."""
        return next(option for option in self.legs[0].options if option.startswith("train.micro_batch"))


def one_of_each(draw: random.Random, table: dict[str, tuple]) -> list[str]:
    return [f"{key}={draw.choice(values)}" for key, values in table.items()]


def draw_trial(seed: int) -> Trial:
    draw = random.Random(seed)
    steps, group = draw.randint(6, 10), draw.choice((1, 1, 1, 1, 2, 3))
    most_ranks = draw.randint(4, 12 // group)
    options = [f"run.seed={seed}", f"train.steps={steps}", f"train.global_batch={group * most_ranks}"]
    options += [*draw_model(draw, group), *one_of_each(draw, RUN)]
    start = None
    if draw.random() < 0.2:
        start = (*options, *START, *draw.choice(((), IMAGES)))
        options.append(f"model.init=START{draw.choice(('', '#model'))}")
    may_cut = draw.random() < 0.02 or not any(word in " ".join(options) for word in WHOLE_CLIPS)
    is_uniform, stops = draw.random() < 0.3, sorted(draw.sample(range(1, steps - 1), draw.choice((1, 1, 2))))
    # A cosine ends at train.steps, so that key may not change; nor may the warm-up be longer.
    ends = {step: ["steps"] if step >= 3 and "train.lr_schedule=cosine" not in options else [] for step in stops}
    legs: list[Leg] = []
    for step in [*stops, steps]:
        end = "" if step == steps else draw.choice([*ENDS, *ends[step]])
        legs.append(
            Leg(*draw_engine(draw, group, most_ranks, may_cut), end, step, draw.choice(BETWEEN) if legs else "")
        )
    if is_uniform:
        legs = [replace(leg, ranks=legs[0].ranks, options=legs[0].options) for leg in legs]
    if "train.precision=fp32" not in options and draw.random() < 0.5:
        options.append("train.residual=bf16")
    return Trial(seed, steps, tuple(options), tuple(legs), start)


def draw_model(draw: random.Random, group: int) -> Iterator[str]:
    """The model, what it learns, and the data that it can read."""
    has_sizes, is_classes, tubelet = draw.random() < 0.35, draw.random() < 0.6, draw.choice((1, 1, 1, 2))
    objective, shown = draw.choice([*OBJECTIVES]), "prompts=[a red circle, a clip]"
    if is_classes:
        model = {"kind": "latte", "in_channels": 4, "out_channels": 4, "width": 32, "num_heads": 4, "patch_size": 4}
        model |= {"num_frames": 4, "tubelet_size": 1 if has_sizes else tubelet}  # images have one frame
        model |= {key: draw.choice(values) for key, values in CLASS_MODEL.items()}
        model |= {"num_classes": NUM_CLASSES} if group > 1 else {}
        shown = "labels=[0, 2]" if model["num_classes"] else "count=2"
        yield f"model={json.dumps(model)}"
    if group > 1:
        yield from ("model.contrastive_width=8", "contrastive.weight=0.1", f"contrastive.group={group}")
    has_frames = not is_classes or model["tubelet_size"] == 1
    frames = one_of_each(draw, OF_FRAMES) if has_frames else []
    yield from (*frames, f"diffusion.objective={objective}", *one_of_each(draw, OBJECTIVES[objective]))
    names = [draw.choice((*("latents",) * 8, "shards", "mds"))]
    if has_sizes:
        names = ["sizes", *draw.choice(([], ["latents"]))]
        yield from (f"video.more_sizes={MORE_SIZES}", f"train.batch_budget={draw.choice(('tokens', 'samples'))}")
    if frames and "train.joint_images=0" not in frames and draw.random() < 0.5:
        images = "shards" if names == ["shards"] else "sized-images" if has_sizes else "images"
        yield f"data.images=DATA/{images}"
    if names != ["shards"]:
        names += [name for name in ("poisoned", "damaged") if draw.random() < 0.15]
    sources = [{"url": f"DATA/{name}", "weight": draw.choice((0.3, 0.5, 1.0))} for name in names]
    yield f"data.url={json.dumps(sources)}"
    if draw.random() < 0.3:
        yield from ("data.holdout=0.2", *one_of_each(draw, VALIDATION), f"validation.{shown}")


def draw_engine(draw: random.Random, group: int, most_ranks: int, may_cut: bool) -> tuple[int, tuple[str, ...]]:
    """Ranks, and the options of an attempt on them."""
    kind = draw.choice(("single", "fsdp2", "fsdp2", "zero", "zero", "zero"))
    ranks = 1 if kind == "single" else min(draw.choice((1, 2, 2, 2, 2, 3, 3, 4, 4, draw.randint(5, 8))), most_ranks)
    options = [f"engine.kind={kind}", f"train.micro_batch={group * draw.randint(1, 6)}", *one_of_each(draw, ATTEMPT)]
    options += TO_FIT if draw.random() < 0.04 else one_of_each(draw, CHECKPOINTING)
    table = dict(ENGINES[kind])
    if ranks % 2:
        table.pop("engine.replicate", None)
    elif may_cut and draw.random() < 0.5:
        table["engine.sequence_parallel"] = (2, 2, 4) if ranks % 4 == 0 else (2,)
    return ranks, (*options, *one_of_each(draw, table))
