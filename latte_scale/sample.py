"""Generate videos from trained weights.

    latte-scale sample --checkpoint runs/NAME --prompt "a red circle moves left" --out samples
    latte-scale sample --checkpoint runs/ucf101 --label 3 --label 7 --guidance 4 --out samples --formats mp4,gif

In: weights (a run, one of its checkpoints, a folder written by `export` or `import`, or its .safetensors file) and
prompts, classes (--label) or, for an unconditional model, a --count. Out: one file per video and format, with the
settings in its metadata, and `prompts.jsonl`, which lists what each file shows and can be passed as --prompts again.
torchrun distributes the prompts over ranks; --shard distributes a model that is too large for one device:

    torchrun --nproc_per_node 8 -m latte_scale.sample --checkpoint runs/NAME --prompts prompts.txt --out DIR

A video can start from another one. `--init-video F --strength 0.6` adds noise to F and denoises it again.
`--init-video F --known-frames 4` continues the first four frames of F, which need not have more; an image counts as one
frame. Video i takes its noise from seed --seed + i on the CPU, whatever the batch size and the number of ranks.
"""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from torch import Tensor

from latte_scale.arguments import disk_path, verb_parser
from latte_scale.atomic import write_text
from latte_scale.checkpoint import CheckpointError
from latte_scale.data.schema import VideoSettings
from latte_scale.data.video import TooShortError, VideoError, read_clip
from latte_scale.diffusion.sampler import SAMPLERS, check_start, check_steps, make_scheduler
from latte_scale.encoders import TextEncoder, VideoAutoencoder, load_encoders
from latte_scale.engine.base import set_precision
from latte_scale.engine.dist import Ranks, init_distributed, leave, one_device, shutdown
from latte_scale.engine.launch import launch_from_env
from latte_scale.model.latte_settings import LatteSettings
from latte_scale.sampling.latents import Sampling, batches_of, sample_latents
from latte_scale.sampling.loading import Loaded, check_fit, load_model, load_sharded, surroundings
from latte_scale.sampling.requests import (
    Architecture,
    check_guidance,
    check_records,
    default_guidance,
    read_prompts,
    requests_of,
)
from latte_scale.sampling.temporal_decoder import TemporalDecoder
from latte_scale.sampling.videos import FORMATS, write_video

MADE_BY = (
    "sampler", "steps", "guidance", "weights", "temporal_decoder", "init_video", "strength", "known_frames", "video"
)  # fmt: skip
"""Keys by which prompts.jsonl records how its videos were made; ignored when such a file is passed as --prompts."""
DEFAULT_STRENGTH = 0.6  # of --init-video: high enough to change the content, low enough to keep the motion


@dataclass(frozen=True)
class Setup:
    """The state shared by all batches."""

    loaded: Loaded
    how: Sampling
    video: VideoSettings
    text: TextEncoder | None
    decoder: VideoAutoencoder | TemporalDecoder
    shape: tuple[int, ...]  # C, F, H, W of the latents
    clip_CFHW: Tensor | None  # latents to start from or to continue; to continue, perhaps only the known frames
    device: torch.device


def how_to_sample(args: argparse.Namespace, loaded: Loaded, records: Sequence[dict[str, Any]]) -> Sampling:
    """The settings of the command line with their defaults filled in. Raises ValueError if they are contradictory."""
    guidance = default_guidance(loaded.architecture) if args.guidance is None else args.guidance
    check_guidance(guidance, loaded.architecture, args.negative, *(record.get("negative") for record in records))
    if args.init_video is None and (args.strength is not None or args.known_frames):
        raise ValueError("--strength and --known-frames say what to do with a clip: name it with --init-video")
    strength = args.strength
    if strength is None:
        strength = 1.0 if args.init_video is None or args.known_frames else DEFAULT_STRENGTH
    sampler = args.sampler or SAMPLERS[loaded.diffusion.objective][0]
    make_scheduler(loaded.diffusion, sampler)  # refused before encoders are loaded
    check_steps(loaded.diffusion, sampler, args.steps)
    return Sampling(sampler, args.steps, guidance, strength, args.known_frames)


def read_init_video(
    path: Path | None, video: VideoSettings, vae: VideoAutoencoder, num_known: int = 0
) -> Tensor | None:
    """Latents [C, F, h, w] in model units of the first clip of a file, in the frame policy of the run.

    num_known: number of first frames needed, if not all; a file too short for a clip gives only these.
    """
    if path is None:
        return None
    if not path.is_file():
        raise ValueError(f"--init-video {path}: expected a video; there is no such file")
    try:
        pixels_FCHW = torch.from_numpy(_read_clip(path, video, num_known))
    except TooShortError as error:
        raise ValueError(f"--init-video {path}: {error}; give a longer one, or another --config") from error
    except VideoError as error:
        raise ValueError(f"--init-video {path}: {error}") from error
    mean_BFChw, _ = vae.encode(pixels_FCHW[None])
    return vae.to_model_units(mean_BFChw)[0].transpose(0, 1)


def _read_clip(path: Path, video: VideoSettings, num_known: int) -> np.ndarray:
    try:
        return read_clip(path, video)
    except TooShortError:
        if not num_known:
            raise
        return read_clip(path, video.beginning(num_known))


def records_of(args: argparse.Namespace, architecture: Architecture) -> list[dict[str, Any]]:
    """All requested videos, in order, each with its seed."""
    records = read_prompts(args.prompt, args.prompts) + [{"label": label} for label in args.label]
    records += [{} for _ in range(args.count)]
    records = [{key: value for key, value in record.items() if key not in MADE_BY} for record in records]
    records = [{"seed": args.seed + number, **record} for number, record in enumerate(records)]
    check_records(records, architecture)
    return records


def load(args: argparse.Namespace, ranks: Ranks) -> Loaded:
    """The model, whole on every rank or sharded over the ranks."""
    if args.shard:
        return load_sharded(args.checkpoint, args.weights, ranks)
    return load_model(args.checkpoint, args.weights, ranks)


def prepare(args: argparse.Namespace, loaded: Loaded, records: Sequence[dict[str, Any]], ranks: Ranks) -> Setup:
    """Load the parts around the model and check that they fit. Raises ValueError with what to do."""
    encoder_settings, video = surroundings(loaded, args.checkpoint, args.config)
    how = how_to_sample(args, loaded, records)
    check_start(how.strength, args.init_video is not None, how.num_known or None, video.frames)
    if ranks.rank == 0 and (warning := unlearned(loaded, how.num_known)):
        print(f"warning: {warning}", file=sys.stderr)
    set_precision(loaded.model, args.precision, ranks.device.type)
    if isinstance(loaded.architecture, LatteSettings):
        encoder_settings = replace(encoder_settings, text=None)
    vae, text = load_encoders(encoder_settings, ranks.device)
    check_fit(loaded, vae, text, video)
    decoder = vae
    if args.temporal_decoder is not None:
        decoder = TemporalDecoder(args.temporal_decoder, ranks.device)
        decoder.check_fits(vae)
    shape = (vae.channels, video.frames, video.height // vae.downscale, video.width // vae.downscale)
    clip_CFHW = read_init_video(args.init_video, video, vae, how.num_known if how.strength == 1.0 else 0)
    return Setup(loaded, how, video, text, decoder, shape, clip_CFHW, ranks.device)


def unlearned(loaded: Loaded, num_known: int) -> str:
    """A warning if --known-frames asks for more than the run was trained for; "" if not, or if unknown."""
    if not num_known or loaded.config is None:
        return ""
    known = loaded.config["train"].get("known_frames", {})
    if not known.get("share"):
        came, remedy = "was trained without known frames (train.known_frames.share=0)", "train.known_frames.share=0.3"
    elif known.get("most") is not None and num_known > known["most"]:
        came, remedy = f"was trained on {known['most']} known frames at most", f"train.known_frames.most={num_known}"
    else:
        return ""
    return f"{loaded.source} {came}, so what follows them may not go on from them; train it further with {remedy}"


def about_of(args: argparse.Namespace, setup: Setup) -> dict[str, Any]:
    """The sampling settings, for the videos' metadata; seed, text and label are per video."""
    how = setup.how
    about = {"sampler": how.sampler, "steps": how.num_steps, "guidance": how.guidance, "weights": setup.loaded.source}
    optional = {
        "negative": args.negative,
        "temporal_decoder": args.temporal_decoder,
        "init_video": args.init_video and str(args.init_video),
        "strength": how.strength if how.strength < 1.0 else None,
        "known_frames": how.num_known,
    }
    return about | {key: value for key, value in optional.items() if value}


def run(args: argparse.Namespace, ranks: Ranks) -> int:
    """Load, sample this rank's share in batches, decode, write."""
    formats = formats_of(args.formats)
    check_arguments(args)
    loaded = load(args, ranks)
    records = records_of(args, loaded.architecture)
    setup = prepare(args, loaded, records, ranks)
    about = about_of(args, setup)
    listed = min(formats, key=FORMATS.index)  # a sheet of frames cannot be scored as a video
    for number, record in enumerate(records):
        record["file"] = f"{number:05d}.{listed}"
    args.out.mkdir(parents=True, exist_ok=True)
    if ranks.rank == 0:
        forget_listing(args.out / "prompts.jsonl", args.prompts)
    with progress_bar(ranks) as bar:
        task, done = bar.add_task(f"sampling {len(records)} videos", total=len(records)), 0
        for batch in batches_of(len(records), args.batch_size, ranks.rank, ranks.size):
            # If a rank has nothing left, a sharded model is still called, for the first record.
            asked = [records[number or 0] for number in batch if number is not None or args.shard]
            kept = [number is not None for number in batch if number is not None or args.shard]
            if asked:
                show = follow(bar, task, done * ranks.size, len(asked) * ranks.size)
                latents_BCFHW = draw(setup, asked, args.negative or "", show)[torch.tensor(kept)]
                write([r for r, keep in zip(asked, kept, strict=True) if keep], latents_BCFHW, setup, args, about)
            done += len(asked)
    ranks.barrier()  # all files are written
    if ranks.rank == 0:
        lines = [json.dumps({**record, **about, **record, "video": setup.video.stored()}) for record in records]
        write_text(args.out / "prompts.jsonl", "\n".join(lines) + "\n")
        print(f"sampled {len(records)} videos with {setup.loaded.source} into {args.out}")
    return 0


def forget_listing(listing: Path, prompts: Path | None) -> None:
    """Remove the prompts.jsonl of an earlier sampling, which would describe the wrong videos if this one is
    interrupted.

    It stays if this sampling reads it: its lines then describe the new videos.
    """
    if listing.exists() and not (prompts is not None and listing.samefile(prompts)):
        listing.unlink()


def draw(
    setup: Setup, records: Sequence[dict[str, Any]], negative: str, progress: Callable[[int, int], None]
) -> Tensor:
    """Latents [B, C, F, H, W] of a batch of records."""
    requests = requests_of(records, setup.text, negative)
    loaded = setup.loaded
    return sample_latents(
        loaded.model,
        loaded.architecture,
        loaded.diffusion,
        setup.how,
        requests,
        setup.shape,
        setup.device,
        setup.clip_CFHW,
        progress,
    )


def write(
    records: Sequence[dict[str, Any]],
    latents_BCFHW: Tensor,
    setup: Setup,
    args: argparse.Namespace,
    about: dict[str, Any],
) -> None:
    """Decode and write every format of the records' videos."""
    if not records:
        return
    pixels_BFCHW = setup.decoder.decode(latents_BCFHW.transpose(1, 2)).cpu()
    for record, pixels_FCHW in zip(records, pixels_BFCHW, strict=True):
        frames_FHWC = pixels_FCHW.permute(0, 2, 3, 1).numpy()
        shown = {key: record[key] for key in ("text", "label", "seed", "negative") if key in record}
        for suffix in formats_of(args.formats):
            path = (args.out / record["file"]).with_suffix(f".{suffix}")
            write_video(path, frames_FHWC, args.fps, shown | about | shown)  # its own negative prompt is the one used


def check_arguments(args: argparse.Namespace) -> None:
    """ValueError for an impossible number or an unusable output folder, before anything is loaded."""
    for name, least in {"count": 0, "steps": 1, "batch_size": 1, "fps": 1}.items():
        if (came := getattr(args, name)) < least:
            raise ValueError(f"--{name.replace('_', '-')}: expected {least} or more, got {came}")
    if args.out.exists() and not args.out.is_dir():
        raise ValueError(f"--out {args.out}: expected a folder for the videos, got a file")


def formats_of(text: str) -> list[str]:
    """The formats of --formats, in order. Raises ValueError for an unknown one."""
    formats = [each.strip() for each in text.split(",")]
    for each in formats:
        if each not in FORMATS:
            raise ValueError(f"--formats: expected some of {', '.join(FORMATS)}, got {each!r}")
    return formats


def progress_bar(ranks: Ranks) -> Progress:
    """A bar on rank 0, valid for all: the ranks have equal parts."""
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    return Progress(*columns, disable=ranks.rank != 0)


def follow(bar: Progress, task: Any, done: int, batch: int) -> Callable[[int, int], None]:
    """A callback that moves the bar with each model call of a batch of `batch` videos, after `done` finished ones."""
    return lambda call, calls: bar.update(task, completed=done + batch * call / calls)


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = verb_parser("sample", __doc__)
    add = parser.add_argument
    add(
        "--checkpoint",
        required=True,
        help="run, checkpoint, folder of weights or its .safetensors; PATH#TREE for a tree",
    )
    add("--prompt", action="append", default=[], help="text of one video; repeatable")
    add(
        "--prompts",
        type=disk_path,
        help='file with one prompt per line, or JSON lines: "text" or "label", also "seed" and "negative"',
    )
    add("--label", action="append", default=[], type=int, help="class of one video; repeatable")
    add("--count", type=int, default=0, help="number of videos, for an unconditional model")
    add("--out", required=True, type=disk_path, help="folder for the videos")
    add("--weights", help="tree of a checkpoint: ema (default), raw, or one such as ema/0.999")
    add("--sampler", help="ddim, ddpm, dpm++ (epsilon, v); euler, heun, dpm++ (flow)")
    add("--steps", type=int, default=50, help="denoising steps")
    add("--guidance", type=float, help="classifier-free guidance (default 7.5, classes 7; 1: none)")
    add("--negative", help="negative prompt (default: the empty caption)")
    add("--seed", type=int, default=0, help="video i takes its noise from seed + i")
    add("--batch-size", type=int, default=8, help="videos sampled at a time per rank; affects memory only")
    add("--precision", choices=("fp32", "bf16"), default="fp32", help="bf16: autocast, as in training")
    add("--shard", action="store_true", help="shard the model over the ranks, if it does not fit on one device")
    add("--temporal-decoder", help="folder or hub id of SVD's AutoencoderKLTemporalDecoder, instead of the VAE's own")
    add("--init-video", type=disk_path, help="a clip to start from (--strength) or to continue")
    add("--strength", type=float, help=f"fraction of the steps to run from --init-video (default {DEFAULT_STRENGTH})")
    add("--known-frames", type=int, default=0, help="first frames of --init-video to keep")
    add("--formats", default="mp4", help="comma-separated list of mp4, gif and png (a sheet of all frames)")
    add("--fps", type=int, default=8, help="frames per second of the video files")
    add("--config", type=disk_path, help="YAML with encoders and video, for weights outside a run")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 2 and one line for a user error."""
    args = parse_args(argv)
    try:
        launch = launch_from_env()
        ranks = init_distributed(launch) if launch else Ranks(0, 1, 0, one_device())
        return run(args, ranks)
    except (ValueError, OSError, CheckpointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    finally:
        shutdown()


if __name__ == "__main__":
    leave(main())
