"""Random models, written, read and sampled in every way: the same weights give the same videos.

A seed draws a model of either kind with random values in every parameter (zeros of the initialisation hide mistakes),
an objective, a sampler and requests. As a tree of a run the model goes through `export` and `import`, which keep every
tensor or refuse with a message; every source gives the same latents in any batches, and so does LattePipeline where it
takes the same steps. `make random-models` runs more of them: LATTE_RANDOM_MODELS=FIRST:END.
"""

import contextlib
import os
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import LattePipeline
from torch import Tensor

from latte_scale import export, import_weights
from latte_scale.diffusion.loss import DiffusionSettings
from latte_scale.diffusion.sampler import SAMPLERS
from latte_scale.encoders import TextEncoder
from latte_scale.model.build import build_model
from latte_scale.model.latte_settings import LatteSettings
from latte_scale.model.latte_t2v import LatteT2VSettings
from latte_scale.model.transformer_folder import without_contrastive
from latte_scale.sampling.latents import Sampling, sample_latents
from latte_scale.sampling.requests import Request, requests_of
from latte_scale.settings import to_mapping
from latte_scale.weights import Weights, load_weights
from tests.weight_files import randomise, save_run

SEEDS = range(*map(int, os.environ.get("LATTE_RANDOM_MODELS", "0:16").split(":")))
TREES = {"#model": 1, "#ema/0.99": 2, "": 2}  # how a run's tree is asked for: by what `save_run` multiplies the weights
BOTH = {"out_channels": (4, 8), "patch_size": (1, 2, 4), "num_heads": (1, 2, 4), "contrastive_width": (0, 0, 5)}
TEXT = BOTH | {"num_layers": (1, 2, 3), "head_dim": (4, 8, 12), "sample_size": (4, 16, 128), "num_frames": (1, 3, 5)}
TEXT |= {"caption_channels": (64,)}  # of the tiny text encoder
CLASSES = BOTH | {
    "variant": ("interleaved", "interleaved", "late_fusion", "sequential", "parallel"),
    "depth": (1, 2, 3, 4),
    "width": (8, 16, 24, 32),
    "mlp_ratio": (4.0, 3.5, 0.5),
    "tubelet_size": (1, 1, 2, 3),
    "num_frames": (1, 2, 4, 6),
    "num_classes": (0, 1, 3),
    "injection": ("s_adaln", "s_adaln", "all_tokens"),
    "temporal_position": ("sincos", "learnable", "rotary"),
}
OBJECTIVES = {
    "epsilon": {"beta_end": (0.02, 0.015), "num_timesteps": (1000, 500)},
    "v": {"zero_terminal_snr": (True, False)},
    "flow": {"flow_shift": (0.5, 1.0, 3.0)},
}
PROMPTS = ("a red circle moves left", "a", "", "the blue square moves up, and then it goes on and on")
RUN = {"video": {"frames": 4, "height": 32, "width": 32}, "encoders": {"vae": "tiny", "text": "tiny"}}


@dataclass(frozen=True)
class Trial:
    """What a seed draws."""

    settings: LatteSettings | LatteT2VSettings
    diffusion: DiffusionSettings
    how: Sampling
    shape: tuple[int, ...]  # C, F, H, W of the latents
    tree: str
    records: list[dict[str, Any]]

    @property
    def of_text(self) -> bool:
        return self.settings.kind == "latte_t2v"


def draw_trial(seed: int) -> Trial:
    draw, settings = random.Random(seed), None

    def one_of_each(table: dict[str, tuple]) -> dict[str, Any]:
        return {name: draw.choice(values) for name, values in table.items()}

    while settings is None:
        kind, table = draw.choice(((LatteT2VSettings, TEXT), (LatteSettings, CLASSES)))
        with contextlib.suppress(ValueError):  # choices that exclude each other
            settings = kind(**one_of_each(table))
    objective = "epsilon" if settings.out_channels == 8 else draw.choice([*OBJECTIVES])
    diffusion = DiffusionSettings(objective, **one_of_each(OBJECTIVES[objective]))
    of_text, num_classes = kind is LatteT2VSettings, getattr(settings, "num_classes", 0)
    guidance = draw.choice((1.0, 2.0, 7.5)) if of_text or num_classes else 1.0
    how = Sampling(draw.choice(SAMPLERS[objective]), draw.choice((2, 4, 5)), guidance)
    side = 4 if of_text else settings.patch_size  # LattePipeline makes multiples of 8 pixels
    frames = draw.choice((settings.num_frames, settings.num_frames, settings.frames_per_token))
    shape = 4, frames, side * draw.randint(1, 3), side * draw.randint(1, 3)
    condition = {"text": PROMPTS, "negative": PROMPTS} if of_text else {"label": range(num_classes)}
    known = {name: values for name, values in condition.items() if values}
    records = [{"seed": number, **one_of_each(known)} for number in draw.sample(range(1000), 3)]
    return Trial(settings, diffusion, how, shape, draw.choice([*TREES]), records)


@pytest.mark.parametrize("seed", SEEDS)
def test_the_same_weights_give_the_same_videos(seed: int, tmp_path: Path) -> None:
    trial = draw_trial(seed)
    drawn = randomise(build_model(trial.settings), seed).state_dict()
    state = {name: 0.3 * tensor for name, tensor in drawn.items()}  # larger ones blow up rounding
    config = {"model": to_mapping(trial.settings), "diffusion": to_mapping(trial.diffusion)}
    save_run(tmp_path / "run", config | RUN, state)
    run, of_run = f"{tmp_path}/run{trial.tree}", {name: TREES[trial.tree] * tensor for name, tensor in state.items()}
    of_others = without_contrastive(trial.settings, of_run)[1]
    requests = requests_of(trial.records, TextEncoder("tiny", 120) if trial.of_text else None)
    latents = sampled(trial, load_weights(run), requests, [[0, 1, 2]])
    if trial.of_text:
        others = through_a_pipeline(run, tmp_path)
    else:
        others = through_the_official_layout(trial.settings, run, tmp_path)
    for source in (run, *others):
        weights, expected = load_weights(source), of_run if source == run else of_others
        assert weights.state_dict.keys() == expected.keys(), source
        wrong = [name for name, tensor in expected.items() if not torch.equal(weights.state_dict[name], tensor)]
        assert not wrong, (source, wrong)
        assert weights.diffusion == trial.diffusion or not trial.of_text, source
        assert apart(sampled(trial, weights, requests, [[2, 0], [1]]), latents) < 1e-5, source
    its_sampler = "dpm++" if trial.diffusion.objective == "flow" else "ddim"
    if trial.of_text and trial.how.sampler == its_sampler and trial.shape[1] in (1, trial.settings.num_frames):
        assert apart(sampled_by_pipeline(trial, tmp_path / "pipeline"), latents) < 1e-5


def apart(found: Tensor, expected: Tensor) -> float:
    """The largest difference over the largest number."""
    return float((found - expected).abs().max() / expected.abs().max())


def through_a_pipeline(run: str, folder: Path) -> list[str]:
    """What export makes of the run, and import of that."""
    pipeline, imported = str(folder / "pipeline"), str(folder / "imported")
    assert export.main(["--checkpoint", run, "--out", pipeline]) == 0
    assert import_weights.main(["--source", pipeline, "--out", imported]) == 0
    return [pipeline, imported]


def through_the_official_layout(settings: LatteSettings, run: str, folder: Path) -> list[str]:
    """What import makes of the exported file; nothing where that layout has no place for the model."""
    out, imported, position = str(folder / "out.pt"), str(folder / "imported"), settings.temporal_position
    has_place = (settings.variant, settings.injection, settings.tubelet_size) == ("interleaved", "s_adaln", 1)
    has_place = has_place and position != "rotary"
    assert export.main(["--checkpoint", run, "--out", out, "--format", "official"]) == (0 if has_place else 2)
    if not has_place:
        return []
    options = ["--num-heads", str(settings.num_heads), *["--learned-positions"] * (position == "learnable")]
    assert import_weights.main(["--source", out, "--out", imported, *options]) == 0
    return [imported]


def sampled(trial: Trial, weights: Weights, requests: list[Request], batches: list[list[int]]) -> Tensor:
    """Latents of all requests, in their order, drawn in these batches."""
    model, cpu, rows = weights.build(), torch.device("cpu"), {}
    for batch in batches:
        chosen = [requests[number] for number in batch]
        drawn = sample_latents(model, weights.architecture, trial.diffusion, trial.how, chosen, trial.shape, cpu)
        rows |= dict(zip(batch, drawn, strict=True))
    return torch.stack([rows[number] for number in sorted(rows)])


def sampled_by_pipeline(trial: Trial, folder: Path) -> Tensor:
    pipeline, (_, frames, height, width) = LattePipeline.from_pretrained(folder), trial.shape
    pipeline.set_progress_bar_config(disable=True)
    size = {"video_length": frames, "height": 2 * height, "width": 2 * width}  # the tiny VAE halves a side
    how = {"num_inference_steps": trial.how.num_steps, "guidance_scale": trial.how.guidance, "output_type": "latent"}
    rows = []
    for record in trial.records:
        noise = torch.randn(1, *trial.shape, generator=torch.Generator().manual_seed(record["seed"]))
        texts = {"prompt": record["text"], "negative_prompt": record["negative"], "clean_caption": False}
        rows += pipeline(**texts, **size, **how, latents=noise).frames
    return torch.stack(rows)
