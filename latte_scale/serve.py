"""A small demo in the browser, at http://127.0.0.1:7860: prompt in, video out.

    latte-scale serve --checkpoint runs/NAME

In: the weights that `latte-scale sample` takes (a run, one of its checkpoints, an exported folder). Out: a page that
takes a prompt (or a class, or nothing for an unconditional model), seed, steps and guidance and returns a video; the
API `/sample` does the same. There is no password, so it listens on this machine only unless --host is set. A seed gives
the same video as `latte-scale sample`. Needs gradio: pip install 'latte_scale[serve]'.
"""

import argparse
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from latte_scale.arguments import disk_path, verb_parser
from latte_scale.checkpoint import CheckpointError
from latte_scale.data.schema import VideoSettings
from latte_scale.diffusion.sampler import SAMPLERS
from latte_scale.encoders import TextEncoder, VideoAutoencoder, load_encoders
from latte_scale.engine.base import set_precision
from latte_scale.engine.dist import Ranks, one_device
from latte_scale.model.latte_settings import LatteSettings
from latte_scale.sampling.latents import Sampling, sample_latents
from latte_scale.sampling.loading import Loaded, check_fit, load_model, surroundings
from latte_scale.sampling.requests import check_guidance, check_records, default_guidance, requests_of
from latte_scale.sampling.videos import write_video

MAX_STEPS = 250  # of denoising: as in Latte's evaluation


@dataclass(frozen=True)
class Demo:
    """A model on its device, with its encoders and settings."""

    loaded: Loaded
    vae: VideoAutoencoder
    text: TextEncoder | None
    video: VideoSettings
    device: torch.device
    folder: Path  # for the videos
    fps: int

    def sample(
        self, record: dict[str, Any], steps: int, guidance: float, progress: Callable[[int, int], None] | None = None
    ) -> Path:
        """The video of one record ("seed", and "text" with "negative" or "label"). Raises ValueError."""
        architecture = self.loaded.architecture
        check_records([record], architecture)
        check_guidance(guidance, architecture, record.get("negative"))
        if not 1 <= steps <= MAX_STEPS:
            raise ValueError(f"steps: expected 1 to {MAX_STEPS}, got {steps}")
        how = Sampling(SAMPLERS[self.loaded.diffusion.objective][0], steps, guidance)
        side = self.vae.downscale
        shape = (self.vae.channels, self.video.frames, self.video.height // side, self.video.width // side)
        requests = requests_of([record], self.text)
        latents_BCFHW = sample_latents(
            self.loaded.model, architecture, self.loaded.diffusion, how, requests, shape, self.device, None, progress
        )
        (pixels_FCHW,) = self.vae.decode(latents_BCFHW.transpose(1, 2)).cpu()
        path = Path(tempfile.mkdtemp(dir=self.folder)) / "video.mp4"
        about = {"sampler": how.sampler, "steps": steps, "guidance": guidance, "weights": self.loaded.source}
        write_video(path, pixels_FCHW.permute(0, 2, 3, 1).numpy(), self.fps, record | about)
        return path


def load_demo(args: argparse.Namespace, folder: Path) -> Demo:
    """Everything the page needs. Raises ValueError with what to do."""
    if args.fps < 1:
        raise ValueError(f"--fps: expected 1 or more, got {args.fps}")
    if not 1 <= args.port <= 65535:
        raise ValueError(f"--port: expected 1 to 65535, got {args.port}")
    device = one_device()
    loaded = load_model(args.checkpoint, args.weights, Ranks(0, 1, 0, device))
    encoder_settings, video = surroundings(loaded, args.checkpoint, args.config)
    set_precision(loaded.model, args.precision, device.type)
    if isinstance(loaded.architecture, LatteSettings):
        encoder_settings = replace(encoder_settings, text=None)
    vae, text = load_encoders(encoder_settings, device)
    check_fit(loaded, vae, text, video)
    return Demo(loaded, vae, text, video, device, folder, args.fps)


def build_page(demo: Demo) -> Any:
    """The gradio app. Raises ValueError if gradio is not installed."""
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # nothing is sent anywhere
    try:
        import gradio
    except ImportError as error:
        raise ValueError("the demo needs gradio: pip install 'latte_scale[serve]'") from error
    architecture = demo.loaded.architecture
    num_classes = architecture.num_classes if isinstance(architecture, LatteSettings) else 0
    of_text, of_classes = demo.text is not None, num_classes > 0

    def answer(
        prompt: str, negative: str, label: float | None, seed: float | None, steps: float, guidance: float,
        progress: Any = gradio.Progress(),  # noqa: B008 (how gradio hands it over)
    ) -> str:  # fmt: skip
        if seed is None or (of_classes and label is None):
            what = "seed" if seed is None else "class"
            raise gradio.Error(f"the {what} is empty: it is a whole number", print_exception=False)
        record: dict[str, Any] = {"seed": int(seed)}
        if of_text:
            if not prompt.strip():
                raise gradio.Error("the prompt is empty: say what the video should show", print_exception=False)
            record |= {"text": prompt.strip()} | ({"negative": negative.strip()} if negative.strip() else {})
        elif of_classes:
            record["label"] = int(label)
        try:
            return str(demo.sample(record, int(steps), guidance, lambda done, calls: progress((done, calls))))
        except ValueError as error:
            raise gradio.Error(str(error), print_exception=False) from error

    with gradio.Blocks(title="latte_scale") as page:
        gradio.Markdown(f"# latte_scale\n{demo.loaded.source}")
        with gradio.Row():
            with gradio.Column():
                prompt = gradio.Textbox(label="Prompt", lines=2, visible=of_text)
                negative = gradio.Textbox(label="Negative prompt", visible=of_text)
                label = gradio.Number(0, label=f"Class, 0 to {num_classes - 1}", precision=0, visible=of_classes)
                seed = gradio.Number(0, label="Seed", precision=0)
                steps = gradio.Slider(1, MAX_STEPS, 50, step=1, label="Steps")
                guidance = gradio.Slider(
                    1.0, 15.0, default_guidance(architecture), label="Guidance", visible=of_text or of_classes
                )
                button = gradio.Button("Sample", variant="primary")
            video = gradio.Video(label="Video", autoplay=True, loop=True)
        inputs = [prompt, negative, label, seed, steps, guidance]
        # One video at a time: there is one model.
        button.click(answer, inputs, video, api_name="sample", concurrency_limit=1)
        prompt.submit(answer, inputs, video, api_visibility="private", concurrency_limit=1)
    return page


def open_page(page: Any, host: str, port: int | None) -> str:
    """Start listening and return the address; port None: a free one. Raises ValueError if it cannot listen."""
    import gradio

    theme = gradio.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"])  # no fonts to fetch
    try:
        _, address, _ = page.launch(
            server_name=host, server_port=port, share=False, prevent_thread_lock=True, quiet=True, theme=theme
        )
    except OSError as error:  # gradio's message names options that this command does not have
        raise ValueError(
            f"{host}:{port}: expected a free port of this machine, got one that is taken, or an address of another; "
            "pass another --port or --host"
        ) from error
    return address


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = verb_parser("serve", __doc__)
    add = parser.add_argument
    add("--checkpoint", required=True, help="run, checkpoint or folder of weights; PATH#TREE for a tree")
    add("--weights", help="tree of a checkpoint: ema (default), raw, or one such as ema/0.999")
    add("--config", type=disk_path, help="YAML with encoders and video, for weights outside a run")
    add("--precision", choices=("fp32", "bf16"), default="fp32", help="bf16: autocast, as in training")
    add("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0 admits everybody")
    add("--port", type=int, default=7860, help="port to listen on")
    add("--fps", type=int, default=8, help="frames per second of the videos")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Serve until interrupted; exit code 2 and one line for a user error."""
    args = parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="latte-serve-") as folder:
        try:
            page = build_page(load_demo(args, Path(folder)))
            address = open_page(page, args.host, args.port)
        except (ValueError, OSError, CheckpointError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        print(f"serving at {address} (Ctrl-C ends it)", flush=True)
        page.block_thread()
    return 0


if __name__ == "__main__":
    sys.exit(main())
