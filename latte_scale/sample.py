"""Sample videos: `latte-scale sample --checkpoint runs/NAME --prompt "a red circle moves left" --out DIR`.

In: weights (a run, one checkpoint, or a folder of weights) and what to show: prompts, classes (--label), or with an
unconditional model a --count. Out: one mp4 each and `prompts.jsonl`, which says what each file shows. A video can start
from another one: `--init-video F --strength 0.6` noises F and denoises it again, `--init-video F --known-frames 4`
continues its first four frames. A sample's noise comes from one CPU generator seeded with --seed plus its number, so it
does not depend on the batch size: 32 prompts at once or one by one give the same videos.

Shapes: B samples, N rows of a model call (B, or 2 B with guidance, the negative half first), C channels, F frames, H W
latent height and width, L text length, D text width.
"""

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from latte_scale import settings
from latte_scale.data.schema import VideoSettings
from latte_scale.data.video import read_clip, write_mp4
from latte_scale.diffusion.loss import DiffusionSettings, ModelFn
from latte_scale.diffusion.sampler import SAMPLERS, sample
from latte_scale.encoders import EncoderSettings, TextEncoder, VideoAutoencoder, load_encoders
from latte_scale.model.latte import Latte
from latte_scale.model.latte_t2v import LatteT2V
from latte_scale.weights import load_weights

DEFAULT_STRENGTH = 0.6  # of --init-video: enough to change what is seen, little enough to keep where it moves


@dataclass(frozen=True)
class Sampling:
    """How to sample."""

    sampler: str
    num_steps: int
    guidance: float
    seed: int
    batch_size: int
    strength: float = 1.0  # share of the steps that are walked from a given clip
    num_known: int = 0  # first frames of the given clip that are kept


def initial_noise(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Standard normal noise of one sample, as LattePipeline draws it from the same generator."""
    return torch.randn((1, *shape), generator=generator)[0]


def pad_texts(texts: list[Tensor], negatives: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Captions and negatives [L_i, D] of one batch -> text_BLD, negative_BLD, mask_BL.

    A negative is cut to the length of its caption, as LattePipeline does, so one mask serves both.
    """
    cut = [negative[: len(text)] for text, negative in zip(texts, negatives, strict=True)]
    text_BLD = torch.nn.utils.rnn.pad_sequence(texts, batch_first=True)
    negative_BLD = torch.zeros_like(text_BLD)
    for row, negative in enumerate(cut):
        negative_BLD[row, : len(negative)] = negative
    lengths_B = torch.tensor([len(text) for text in texts])
    return text_BLD, negative_BLD, torch.arange(text_BLD.shape[1])[None, :] < lengths_B[:, None]


def text_model_fn(
    model: LatteT2V, texts: list[Tensor], negatives: list[Tensor], guided: bool, device: torch.device
) -> ModelFn:
    """The model with its captions; with guidance it takes the negative half of the batch first."""
    text_NLD, negative_BLD, mask_NL = (tensor.to(device) for tensor in pad_texts(texts, negatives))
    if guided:
        text_NLD, mask_NL = torch.cat([negative_BLD, text_NLD]), torch.cat([mask_NL, mask_NL])
    return lambda latents_NCFHW, timestep: model(latents_NCFHW, timestep, text_NLD, mask_NL)


def label_model_fn(model: Latte, labels: list[int], guided: bool, device: torch.device) -> ModelFn:
    """The class model with its labels (none: unconditional), on latents [N, C, F, H, W]; the null class goes first."""
    num_classes, label_N = model.settings.num_classes, None
    if num_classes:
        label_N = torch.tensor([num_classes] * len(labels) * guided + labels, device=device)
    return lambda latents_NCFHW, timestep: model(latents_NCFHW.transpose(1, 2), timestep, label_N).transpose(1, 2)


@torch.no_grad()
def sample_latents(
    model_fn: ModelFn,
    model: Latte | LatteT2V,
    diffusion: DiffusionSettings,
    how: Sampling,
    shape: tuple[int, ...],
    numbers: range,
    device: torch.device,
    clip_CFHW: Tensor | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Latents in model units [B, C, F, H, W] of the samples `numbers`; `shape` is (C, F, H, W).

    model_fn: `model` with their conditions. clip_CFHW: latents in model units to start from or to continue.
    """
    generators = [torch.Generator().manual_seed(how.seed + number) for number in numbers]
    noise_BCFHW = torch.stack([initial_noise(shape, generator) for generator in generators]).to(device)
    given = None if clip_CFHW is None else clip_CFHW.to(device).expand_as(noise_BCFHW)
    return sample(
        model_fn,
        noise_BCFHW,
        diffusion,
        sampler=how.sampler,
        num_steps=how.num_steps,
        guidance=how.guidance,
        guided_channels="prediction" if isinstance(model, Latte) else "all",
        learned_variance=model.settings.out_channels == 2 * model.settings.in_channels,
        generators=generators,
        init_BCFHW=given if how.strength < 1.0 else None,
        strength=how.strength,
        known_BCFHW=given if how.num_known else None,
        num_known=how.num_known,
        progress=progress,
    )


def read_prompts(prompt: list[str], file: Path | None) -> list[dict[str, Any]]:
    """Records with "text" or "label": from the command line, a file with one prompt a line, or JSON lines."""
    records: list[dict[str, Any]] = [{"text": text} for text in prompt]
    if file is not None:
        for line in file.read_text().splitlines():
            if line.strip():
                records.append(json.loads(line) if line.lstrip().startswith("{") else {"text": line.strip()})
    return records


def check_records(records: list[dict[str, Any]], model: Latte | LatteT2V) -> None:
    """Hold what was asked for to what the model can be asked. Raises ValueError."""
    if isinstance(model, LatteT2V):
        wanted, kind, how = "text", str, "--prompt TEXT, or --prompts FILE with one prompt a line"
    elif model.settings.num_classes:
        wanted, kind, how = "label", int, f"--label N, 0 to {model.settings.num_classes - 1}"
    else:
        wanted, kind, how = None, None, "--count N, the number of videos: the model is unconditional"
    if not records:
        raise ValueError(f"nothing to sample: pass {how}")
    for record in records:
        if set(record) & {"text", "label"} != {wanted} - {None} or (kind and type(record[wanted]) is not kind):
            raise ValueError(f"expected {wanted or 'no condition'} in every record, came {record}; pass {how}")
        if wanted == "label" and not 0 <= record["label"] < model.settings.num_classes:
            raise ValueError(f"label {record['label']}: the model has {model.settings.num_classes} classes; pass {how}")


def default_guidance(model: Latte | LatteT2V) -> float:
    """What Latte samples with: 7.5 for text, 7 for classes; 1 (none) where there is no condition."""
    if isinstance(model, LatteT2V):
        return 7.5
    return 7.0 if model.settings.num_classes else 1.0


def how_to_sample(args: argparse.Namespace, model: Latte | LatteT2V, diffusion: DiffusionSettings) -> Sampling:
    """The settings of the command line with their defaults filled in. Raises ValueError where they contradict."""
    guidance = default_guidance(model) if args.guidance is None else args.guidance
    if guidance > 1 and isinstance(model, Latte) and not model.settings.num_classes:
        raise ValueError(
            f"--guidance {guidance}: the model is unconditional and has nothing to be guided by; leave it out"
        )
    if args.init_video is None and (args.strength is not None or args.known_frames):
        raise ValueError("--strength and --known-frames say what to do with a clip: name it with --init-video")
    strength = args.strength
    if strength is None:
        strength = 1.0 if args.init_video is None or args.known_frames else DEFAULT_STRENGTH
    sampler = args.sampler or SAMPLERS[diffusion.objective][0]
    return Sampling(sampler, args.steps, guidance, args.seed, args.batch_size, strength, args.known_frames)


def read_init_video(path: Path | None, video: VideoSettings, vae: VideoAutoencoder) -> Tensor | None:
    """Latents [C, F, h, w] in model units of the first clip of a file, in the frame policy of the run."""
    if path is None:
        return None
    pixels_FCHW = torch.from_numpy(read_clip(path, video))
    mean_BFChw, _ = vae.encode(pixels_FCHW[None])
    return vae.to_model_units(mean_BFChw)[0].transpose(0, 1)


def run(args: argparse.Namespace) -> int:
    """Load, sample in batches, decode, write."""
    from rich.progress import Progress

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    weights = load_weights(args.checkpoint, {"ema": None, "raw": "raw"}[args.weights])
    encoder_settings, video = _surroundings(args, weights.config)
    model = weights.build().to(device)
    how = how_to_sample(args, model, weights.diffusion)
    records = read_prompts(args.prompt, args.prompts) + [{"label": label} for label in args.label]
    records += [{} for _ in range(args.count)]
    check_records(records, model)
    vae, text_encoder = load_encoders(encoder_settings, device)
    shape = (vae.channels, video.frames, video.height // vae.downscale, video.width // vae.downscale)
    clip_CFHW = read_init_video(args.init_video, video, vae)
    bind = _binder(model, text_encoder, args.negative, how.guidance > 1, device)

    args.out.mkdir(parents=True, exist_ok=True)
    with Progress() as bar:
        task = bar.add_task(f"sampling {len(records)} videos", total=len(records))
        for first in range(0, len(records), how.batch_size):
            numbers = range(first, min(first + how.batch_size, len(records)))

            def show(done: int, calls: int, numbers: range = numbers) -> None:
                bar.update(task, completed=numbers.start + len(numbers) * done / calls)

            model_fn = bind([records[number] for number in numbers])
            latents_BCFHW = sample_latents(
                model_fn, model, weights.diffusion, how, shape, numbers, device, clip_CFHW, show
            )
            pixels_BFCHW = vae.decode(latents_BCFHW.transpose(1, 2))
            for number, pixels_FCHW in zip(numbers, pixels_BFCHW.cpu(), strict=True):
                records[number]["file"] = f"{number:05d}.mp4"
                write_mp4(args.out / records[number]["file"], pixels_FCHW.permute(0, 2, 3, 1).numpy(), args.fps)
    policy = asdict(video)
    lines = [json.dumps({**r, "seed": args.seed + number, "video": policy}) for number, r in enumerate(records)]
    (args.out / "prompts.jsonl").write_text("\n".join(lines) + "\n")
    print(f"sampled {len(records)} videos with {weights.source} into {args.out}")
    return 0


def _binder(
    model: Latte | LatteT2V, text: TextEncoder | None, negative: str | None, guided: bool, device: torch.device
) -> Callable[[list[dict[str, Any]]], ModelFn]:
    """Records of a batch -> the model with their conditions."""
    if isinstance(model, Latte):
        return lambda records: label_model_fn(model, [record.get("label", 0) for record in records], guided, device)
    if text is None:
        raise ValueError("the model reads captions, but encoders.text is null: pass --config FILE that names one")
    negative_LD = text.encode_whole(negative or "")

    def bind(records: list[dict[str, Any]]) -> ModelFn:
        texts = text.encode([record["text"] for record in records])
        return text_model_fn(model, texts, [negative_LD] * len(records), guided, device)

    return bind


def _surroundings(args: argparse.Namespace, config: dict | None) -> tuple[EncoderSettings, VideoSettings]:
    """Encoders and frame policy: from the run's config, or from --config for a diffusers folder."""
    if args.config is not None:
        config = settings.read_mapping(args.config)
    if config is None:
        raise ValueError(
            f"{args.checkpoint} is no run, so its encoders and clip size are not known here: "
            "pass --config FILE with the sections encoders and video (configs/t2v_512.yaml for Latte-1)"
        )
    where = str(args.config or args.checkpoint)
    return (
        settings.from_mapping(EncoderSettings, config.get("encoders", {}), where, "encoders."),
        settings.from_mapping(VideoSettings, config.get("video", {}), where, "video."),
    )


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="latte-scale sample", description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", required=True, help="run folder, checkpoint folder or diffusers folder")
    parser.add_argument("--prompt", action="append", default=[], help="text of one video; may stand several times")
    parser.add_argument("--prompts", type=Path, help='file with one prompt a line, or JSON lines with a "text"')
    parser.add_argument("--label", action="append", default=[], type=int, help="class of one video; repeatable")
    parser.add_argument("--count", type=int, default=0, help="number of videos of an unconditional model")
    parser.add_argument("--out", required=True, type=Path, help="folder for the videos")
    parser.add_argument("--weights", choices=("ema", "raw"), default="ema", help="which of a checkpoint's weights")
    parser.add_argument("--sampler", help="ddim, ddpm, dpm++ (epsilon, v); euler, heun, dpm++ (flow)")
    parser.add_argument("--steps", type=int, default=50, help="denoising steps (default 50)")
    parser.add_argument("--guidance", type=float, help="classifier-free guidance (default 7.5, classes 7; 1: none)")
    parser.add_argument("--negative", help="negative prompt (default: the empty caption)")
    parser.add_argument("--seed", type=int, default=0, help="sample i starts from the noise of seed + i")
    parser.add_argument("--batch-size", type=int, default=8, help="videos sampled at a time (memory only)")
    parser.add_argument("--init-video", type=Path, help="a clip to start from (--strength) or to continue")
    parser.add_argument(
        "--strength", type=float, help=f"share of the steps walked from --init-video (default {DEFAULT_STRENGTH})"
    )
    parser.add_argument("--known-frames", type=int, default=0, help="first frames of --init-video that are kept")
    parser.add_argument("--fps", type=int, default=8, help="frames per second of the files")
    parser.add_argument("--config", type=Path, help="YAML with encoders and video, for weights that are not a run's")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Exit code 2 and one line for what a user can mend."""
    args = parse_args(argv)
    try:
        return run(args)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
