"""A step on a device without values: whatever would make the host wait for a GPU raises here, without one.

Tensors on torch's meta device have shapes and no values. Operations that read a value (item, bool, nonzero, a copy to
the host) or mix host and device fail on them, where they would stall or fail on a GPU. Copies to the device must be
non-blocking and, unless small, from page-locked memory: the host waits for any others (CUDA's notes on API
synchronization). It cannot detect waits inside CUDA's own libraries and in autocast, for which tests/gpu/test_step.py
looks on a real device.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from latte_scale.conditioning import Conditioner
from latte_scale.config import Config, load_config
from latte_scale.data.loader import MicroBatch
from latte_scale.diffusion.loss import DiffusionSettings, schedule_of
from latte_scale.diffusion.sampler import SAMPLERS, sample
from latte_scale.ema import Ema
from latte_scale.encoders import load_encoders
from latte_scale.engine import Ranks, build_engine
from latte_scale.losses import cost_of, losses_of, share_of
from latte_scale.model.build import build_model
from latte_scale.run.journal import FIELDS, Tally

TINY = Path(__file__).resolve().parents[1] / "configs" / "tiny_cpu.yaml"
DEVICE = torch.device("meta")
B, F, C, SIDE, L, D = 4, 4, 4, 4, 6, 64

CLASSES = (
    "model={kind: latte, depth: 2, width: 32, num_heads: 2, patch_size: 2, num_frames: 4, num_classes: 5}",
    *("encoders.text=null", "diffusion.objective=epsilon"),
)
CASES = {
    "plain": (),
    "learned-sigma": ("diffusion.objective=epsilon", "model.out_channels=8"),
    "flow": ("diffusion.objective=flow",),
    "min-snr": ("diffusion.min_snr_gamma=5.0",),
    "known-frames": ("train.known_frames.share=0.5",),
    "images": ("train.joint_images=2",),
    "contrastive": ("contrastive.weight=0.1", "contrastive.group=2", "model.contrastive_width=16"),
    "ema-warm-up": ("ema.warmup=true", "ema.decays=[0.99, 0.9]"),
    "no-clipping": ("optim.clip_norm=null",),
    "full": ("engine.activation_checkpointing=full",),
    "selective": ("engine.activation_checkpointing=selective",),
    "classes": CLASSES,
    "classes-images": (*CLASSES, "train.joint_images=2"),
    "late-fusion": (*CLASSES, "model.variant=late_fusion"),
    "sequential": (*CLASSES, "model.variant=sequential"),
    "parallel": (*CLASSES, "model.variant=parallel"),
}


@pytest.fixture(autouse=True)
def autocast_of_no_device(monkeypatch) -> None:
    """torch has no autocast for the meta device; what asks for it gets one that changes nothing on it."""
    autocast = torch.autocast
    monkeypatch.setattr(torch, "autocast", lambda device_type, *args, **options: autocast("cpu", *args, **options))


@pytest.fixture(scope="module", autouse=True)
def fused_sgd_of_no_device() -> Iterator[None]:
    """torch has no shapes-only form of the operator that updates averages; its numbers are tensors of the device."""
    with torch.library._scoped_library("aten", "IMPL") as library:
        library.impl("_fused_sgd_.tensor_lr", lambda *args, **options: None, "Meta")
        yield


SMALL_BYTES = 2048  # token numbers, masks, labels, sums: less than the clips and captions here have in fp32
zeros = torch.zeros


class Copies(TorchDispatchMode):
    """Counts copies from the host to the device, and those for which the host waits."""

    def __init__(self, batches: Sequence[MicroBatch]) -> None:
        """`batches`: what a loader would have pinned; what is allocated with pin_memory is so, too."""
        super().__init__()
        self.number, self.waiting = 0, []
        pinned = [value for batch in batches for value in vars(batch).values() if isinstance(value, torch.Tensor)]
        self._pinned = {tensor.untyped_storage().data_ptr() for tensor in pinned}

    def zeros(self, *size: Any, **options: Any) -> torch.Tensor:
        made = zeros(*size, **options)
        if "pin_memory" in options:
            self._pinned.add(made.untyped_storage().data_ptr())
        return made

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten._to_copy.default and kwargs.get("device") == DEVICE and args[0].device != DEVICE:
            self.number += 1
            is_pinned = args[0].untyped_storage().data_ptr() in self._pinned or args[0].nbytes <= SMALL_BYTES
            if not kwargs.get("non_blocking") or not is_pinned:
                self.waiting.append(tuple(args[0].shape))
        return func(*args, **kwargs)


@contextmanager
def no_copy_waits(*batches: MicroBatch) -> Iterator[None]:
    with Copies(batches) as copies, mock.patch.object(torch, "zeros", copies.zeros):
        yield
    assert copies.number, "nothing was brought to the device"
    assert not copies.waiting, f"the host waits for copies of the shapes {copies.waiting}"


def micro_batch(config: Config, raw: bool = False) -> MicroBatch:
    """As the loader hands it over: the last slot is empty, captions differ in length."""
    num_images, indices = config.train.joint_images, [0, 1, 2, -1]
    fields: dict[str, Any] = {}
    if raw:
        fields["pixels_BFCHW"] = torch.zeros(B, F, 3, 32, 32, dtype=torch.uint8)
    else:
        fields["mean_BFCHW"], fields["std_BFCHW"] = torch.zeros(2, B, F, C, SIDE, SIDE, dtype=torch.float16)
    if config.model.kind == "latte":
        fields["label_B"] = torch.tensor([0, 1, 4, -1])
    else:
        fields["text_BLD"] = torch.zeros(B, L, D, dtype=torch.float16)
        fields["mask_BL"] = torch.arange(L)[None, :] < torch.tensor([6, 4, 2, 1])[:, None]
    if num_images:
        shape = (2, B, num_images, C, SIDE, SIDE)
        fields["image_mean_BNCHW"], fields["image_std_BNCHW"] = torch.zeros(shape, dtype=torch.float16)
        fields["image_ids"] = [[f"{name}#{j}" for j in range(num_images)] for name in "abcd"]
        if config.model.kind == "latte":
            fields["image_label_BN"] = torch.zeros(B, num_images, dtype=torch.int64)
            fields["image_dropped_B"] = torch.zeros(B, dtype=torch.bool)
    return MicroBatch(
        step=0,
        bucket="bucket",
        weight_B=torch.tensor([float(index >= 0) for index in indices]),
        index_B=torch.tensor(indices),
        dropped_B=torch.tensor([False, True, False, False]),
        sample_ids=["a", "b", "c", ""],
        captions=["a red circle", "a blue square moves left", "green", ""],
        **fields,
    )


class Step:
    """The optimizer step of train.py: its inputs, losses, update, averages and report."""

    def __init__(self, config: Config, *encoders: Any) -> None:
        self.config, self.ranks = config, Ranks(0, 1, 0, DEVICE)
        model = build_model(config.model, torch.Generator().manual_seed(0))
        blocks = model.repeated_blocks()
        self.engine = build_engine(config.engine, config.optim, "fp32", model, blocks, self.ranks)
        self.ema = Ema(self.engine.local_shards(), config.ema)
        self.schedule = schedule_of(config.diffusion, DEVICE)
        num_classes = config.model.num_classes if config.model.kind == "latte" else None
        known = config.train.known_frames
        self.conditioner = Conditioner(0, DEVICE, 1.0, 0.0, *encoders, num_classes=num_classes, known_frames=known)

    def run(self, batches: list[MicroBatch]) -> torch.Tensor:
        tally = Tally(DEVICE, DiffusionSettings())
        for number, batch in enumerate(batches, 1):
            inputs = self.conditioner(batch, batch.step)
            losses = losses_of(self.config, self.engine.model, self.schedule, inputs, self.engine.sequence)
            self.engine.backward(share_of(self.config, inputs, *losses), last_microbatch=number == len(batches))
            tally.add(inputs, *losses, *cost_of(self.config, inputs))
        result = self.engine.step(1e-3)
        self.ema.update(result.applied)
        return tally.reduce(self.ranks, result)


@pytest.mark.parametrize("overrides", CASES.values(), ids=CASES.keys())
def test_no_part_of_a_step_waits_for_the_device(overrides) -> None:
    config = load_config(TINY, overrides)
    step = Step(config)
    batches = [micro_batch(config)] * 2
    for _ in range(2):  # the first makes buffers
        with no_copy_waits(*batches):
            report = step.run(batches)
    assert report.device == DEVICE and report.shape == (len(FIELDS),)


def test_encoding_clips_waits_for_nothing() -> None:
    config = load_config(TINY)
    vae, _ = load_encoders(config.encoders, "cpu")
    vae.model.to(DEVICE)
    vae.device = DEVICE
    step, batch = Step(config, vae), micro_batch(config, raw=True)
    with no_copy_waits(batch):
        step.run([batch])


@pytest.mark.parametrize("images", [0, 2], ids=["clips", "images"])
def test_captions_padded_to_one_length_wait_for_nothing(images) -> None:
    """As compiled blocks want them; with images that have captions of their own, too."""
    config = load_config(TINY, [f"train.joint_images={images}"])
    conditioner, batch = Conditioner(0, DEVICE, 1.0, 0.0, text_length=L + 2), micro_batch(config)
    if images:
        batch.image_text_BNLD = torch.zeros(B, images, L + 1, D, dtype=torch.float16)
        batch.image_mask_BNL = torch.ones(B, images, L + 1, dtype=torch.bool)
    with no_copy_waits(batch):
        inputs = conditioner(batch, 0)
    assert inputs.text.device == DEVICE and inputs.text.shape[-2:] == (L + 2, D)


def test_encoding_captions_waits_for_nothing() -> None:
    """What transformers does inside is its own; here the encoder is given tokens and gives embeddings."""
    config = load_config(TINY)
    _, text = load_encoders(config.encoders, "cpu")
    text.device, text.model = DEVICE, lambda ids, attention_mask: (torch.empty(*ids.shape, D, device=ids.device),)
    conditioner, batch = Conditioner(0, DEVICE, 1.0, 0.0, None, text), micro_batch(config)
    batch.text_BLD = batch.mask_BL = None
    with no_copy_waits(batch):
        inputs = conditioner(batch, 0)
    assert inputs.text.device == DEVICE and inputs.num_tokens_B[3] == 0


@pytest.mark.parametrize(
    ("objective", "sampler"),
    [(objective, each) for objective, names in SAMPLERS.items() for each in names if each != "ddpm"],
)
@pytest.mark.parametrize("num_known", [0, 1])
def test_no_step_of_sampling_waits_for_the_device(objective, sampler, num_known) -> None:
    """But for ddpm, which adds noise of the host's generators in every step."""
    noise_BCFHW = torch.zeros(2, C, F, SIDE, SIDE, device=DEVICE)
    options = {"sampler": sampler, "num_steps": 3, "guidance": 4.0, "num_known": num_known}
    known_BCFHW = noise_BCFHW if num_known else None
    with no_copy_waits():
        sample(
            lambda x, t: x * t.flatten()[0],
            noise_BCFHW,
            DiffusionSettings(objective),
            known_BCFHW=known_BCFHW,
            **options,
        )


def test_a_wait_would_be_seen() -> None:
    """The ways in which it would show."""
    config = load_config(TINY)
    step, batch = Step(config), micro_batch(config)
    inputs = step.conditioner(batch, 0)
    loss_B, _ = losses_of(config, step.engine.model, step.schedule, inputs)
    for reading in (float, bool, torch.Tensor.tolist, torch.Tensor.cpu, torch.nonzero):
        with pytest.raises((RuntimeError, NotImplementedError)):
            reading(loss_B.detach().sum())
    with pytest.raises(RuntimeError, match="device"):
        loss_B * batch.weight_B
    for number, options in ((3, {}), (300, {"non_blocking": True})):
        with pytest.raises(AssertionError, match="the host waits"), no_copy_waits(batch):
            torch.from_numpy(np.ones(number)).to(DEVICE, **options)
