"""Sample videos: `latte-scale sample --checkpoint runs/NAME --prompt "a red circle moves left" --out DIR`.

In: weights (a run, one checkpoint, or a diffusers folder) and prompts. Out: one mp4 a prompt and `prompts.jsonl`, which
says what each file shows. A prompt's first noise comes from one CPU generator seeded with --seed plus its number, so it
does not depend on the batch size: 32 prompts at once or one by one give the same videos. The exception is the sampler
ddpm, which adds noise at every step and draws it for the whole batch.
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
from latte_scale.data.video import write_mp4
from latte_scale.diffusion.loss import DiffusionSettings
from latte_scale.diffusion.sampler import SAMPLERS, sample
from latte_scale.encoders import EncoderSettings, load_encoders
from latte_scale.model.latte_t2v import LatteT2V
from latte_scale.weights import load_weights


@dataclass(frozen=True)
class Sampling:
    """How to sample."""

    sampler: str
    num_steps: int
    guidance: float
    seed: int
    batch_size: int


def initial_noise(shape: tuple[int, ...], seed: int, number: int) -> Tensor:
    """Standard normal noise of prompt `number`, as LattePipeline draws it from torch.Generator().manual_seed(seed)."""
    return torch.randn((1, *shape), generator=torch.Generator().manual_seed(seed + number))[0]


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


@torch.no_grad()
def sample_latents(
    model: LatteT2V,
    diffusion: DiffusionSettings,
    how: Sampling,
    shape: tuple[int, ...],
    texts: list[Tensor],
    negatives: list[Tensor],
    first_number: int,
    device: torch.device,
    progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Latents in model units [B, C, F, H, W] for one batch of text embeddings; `shape` is (C, F, H, W)."""
    noise_BCFHW = torch.stack([initial_noise(shape, how.seed, first_number + i) for i in range(len(texts))]).to(device)
    text_BLD, negative_BLD, mask_BL = (tensor.to(device) for tensor in pad_texts(texts, negatives))
    learned_variance = model.settings.out_channels == 2 * model.settings.in_channels
    return sample(
        model,
        noise_BCFHW,
        text_BLD,
        negative_BLD,
        diffusion,
        mask_BL=mask_BL,
        sampler=how.sampler,
        num_steps=how.num_steps,
        guidance=how.guidance,
        learned_variance=learned_variance,
        generator=torch.Generator(device).manual_seed(how.seed),
        progress=progress,
    )


def read_prompts(prompt: list[str], file: Path | None) -> list[dict[str, Any]]:
    """Records with "text": from the command line, a text file with one prompt a line, or JSON lines."""
    records = [{"text": text} for text in prompt]
    if file is not None:
        for line in file.read_text().splitlines():
            if line.strip():
                records.append(json.loads(line) if line.lstrip().startswith("{") else {"text": line.strip()})
    if not records:
        raise ValueError("no prompt: pass --prompt TEXT, or --prompts FILE with one prompt a line")
    without = [record for record in records if not isinstance(record.get("text"), str)]
    if without:
        raise ValueError(f'{file}: expected a "text" in every line, came {without[0]}')
    return records


def run(args: argparse.Namespace) -> int:
    """Load, sample in batches, decode, write."""
    from rich.progress import Progress

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    weights = load_weights(args.checkpoint, {"ema": None, "raw": "raw"}[args.weights])
    encoder_settings, video = _surroundings(args, weights.config)
    vae, text_encoder = load_encoders(encoder_settings, device)
    model = weights.build().to(device)
    diffusion = weights.diffusion
    sampler = args.sampler or SAMPLERS[diffusion.objective][0]
    how = Sampling(sampler, args.steps, args.guidance, args.seed, args.batch_size)
    shape = (vae.channels, video.frames, video.height // vae.downscale, video.width // vae.downscale)

    records = read_prompts(args.prompt, args.prompts)
    texts = text_encoder.encode([record["text"] for record in records])
    negative = text_encoder.encode_whole(args.negative or "")
    args.out.mkdir(parents=True, exist_ok=True)
    with Progress() as bar:
        task = bar.add_task(f"sampling {len(records)} prompts", total=len(records))
        for first in range(0, len(records), how.batch_size):
            batch = texts[first : first + how.batch_size]

            def show(done: int, calls: int, first: int = first, size: int = len(batch)) -> None:
                bar.update(task, completed=first + size * done / calls)

            negatives = [negative] * len(batch)
            latents_BCFHW = sample_latents(model, diffusion, how, shape, batch, negatives, first, device, show)
            pixels_BFCHW = vae.decode(latents_BCFHW.transpose(1, 2))
            for number, pixels_FCHW in enumerate(pixels_BFCHW.cpu(), first):
                records[number]["file"] = f"{number:05d}.mp4"
                write_mp4(args.out / records[number]["file"], pixels_FCHW.permute(0, 2, 3, 1).numpy(), args.fps)
    policy = asdict(video)
    lines = [json.dumps({**r, "seed": args.seed + number, "video": policy}) for number, r in enumerate(records)]
    (args.out / "prompts.jsonl").write_text("\n".join(lines) + "\n")
    print(f"sampled {len(records)} videos with {weights.source} into {args.out}")
    return 0


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
    parser.add_argument("--out", required=True, type=Path, help="folder for the videos")
    parser.add_argument("--weights", choices=("ema", "raw"), default="ema", help="which of a checkpoint's weights")
    parser.add_argument("--sampler", help="ddim, ddpm, dpm++ (epsilon, v); euler, heun, dpm++ (flow)")
    parser.add_argument("--steps", type=int, default=50, help="denoising steps (default 50)")
    parser.add_argument("--guidance", type=float, default=7.5, help="classifier-free guidance (default 7.5; 1: none)")
    parser.add_argument("--negative", help="negative prompt (default: the empty caption)")
    parser.add_argument("--seed", type=int, default=0, help="prompt i starts from the noise of seed + i")
    parser.add_argument("--batch-size", type=int, default=8, help="prompts sampled at a time (memory only)")
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
