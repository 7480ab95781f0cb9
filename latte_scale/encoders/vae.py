"""The frozen VAE: clips to raw latents, and latents in model units back to clips.

In: uint8 RGB clips, or latents. Out: mean and standard deviation of the posterior, or clips. Frames are encoded
independently, as in diffusers' LattePipeline, as many at a time as MAX_PIXELS allows.
The decision worth knowing: raw latents are the VAE's output, and only `to_model_units` scales them for the model;
shards store raw latents, and the manifest stores the scale.

Shapes: B clips, F frames, N = B * F, C channels, H W pixels, h w latents. diffusers is imported when a VAE is loaded.
"""

import torch
from torch import Tensor

from latte_scale.encoders.files import EncoderError, find_vae, loading, vae_sha256

MAX_PIXELS = 1 << 21  # of one forward pass: 8 frames of 512 x 512, about 12 GB of activations of the SD VAE in fp32


def check_latents(latents_BFChw: Tensor, channels: int, decoder: str) -> None:
    """EncoderError, which names the decoder, for another number of channels or for latents that are not finite."""
    if latents_BFChw.ndim != 5 or latents_BFChw.shape[2] != channels:
        raise EncoderError(f"{decoder}: expected latents [B, F, {channels}, h, w], got {list(latents_BFChw.shape)}")
    if not bool(latents_BFChw.isfinite().all()):
        raise EncoderError(f"{decoder}: the latents hold NaN or infinity; the model that made them diverged")


class VideoAutoencoder:
    """A frozen diffusers AutoencoderKL over the frames of clips."""

    def __init__(self, name: str, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> None:
        from diffusers import AutoencoderKL

        self.name, self.device, self.dtype = name, torch.device(device), dtype
        self.folder = find_vae(name)
        with loading(name, self.folder, "AutoencoderKL (encoders.vae)"):
            self.model = AutoencoderKL.from_pretrained(
                self.folder, torch_dtype=dtype, local_files_only=True, low_cpu_mem_usage=False
            )
        self.model.eval().requires_grad_(False).to(self.device)
        config = self.model.config
        self.scale = float(config.scaling_factor)
        self.shift = float(config.shift_factor or 0.0)
        self.downscale = 2 ** (len(config.block_out_channels) - 1)  # pixels per latent, height and width
        self.channels = int(config.latent_channels)
        self.sha256 = vae_sha256(self.folder)

    def to_model_units(self, raw: Tensor) -> Tensor:
        """(raw - shift) * scale: the diffusion model's units, with about unit variance."""
        return (raw - self.shift) * self.scale

    def to_raw(self, latents: Tensor) -> Tensor:
        """The inverse of `to_model_units`."""
        return latents / self.scale + self.shift

    @torch.no_grad()
    def encode(self, pixels_BFCHW: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the posterior, raw fp32 [B, F, C, h, w], of uint8 RGB clips [B, F, 3, H, W].

        Raises EncoderError for another type or shape, or a height or width that is not a multiple of `downscale`.
        """
        self._check_pixels(pixels_BFCHW)
        frames_NCHW = pixels_BFCHW.flatten(0, 1)
        means, stds = [], []
        for chunk in frames_NCHW.split(max(1, MAX_PIXELS // (frames_NCHW.shape[-1] * frames_NCHW.shape[-2]))):
            pixels_NCHW = chunk.to(self.device, non_blocking=True).float() / 127.5 - 1
            posterior = self.model.encode(pixels_NCHW.to(self.dtype)).latent_dist
            means.append(posterior.mean.float())
            stds.append(posterior.std.float())
        clips = pixels_BFCHW.shape[:2]
        return torch.cat(means).unflatten(0, clips), torch.cat(stds).unflatten(0, clips)

    @torch.no_grad()
    def decode(self, latents_BFChw: Tensor) -> Tensor:
        """uint8 RGB clips [B, F, 3, H, W] on the encoder's device, of latents [B, F, C, h, w] in model units.

        Raises EncoderError for another number of channels, or latents that are not finite.
        """
        check_latents(latents_BFChw, self.channels, f"VAE {self.name}")
        latents_Nchw = latents_BFChw.flatten(0, 1)
        pixels_a_frame = latents_Nchw.shape[-1] * latents_Nchw.shape[-2] * self.downscale**2
        frames = []
        for chunk in latents_Nchw.split(max(1, MAX_PIXELS // pixels_a_frame)):
            raw = self.to_raw(chunk.to(self.device).float()).to(self.dtype)
            pixels = (self.model.decode(raw).sample.float() + 1) * 127.5
            frames.append(pixels.round().clamp(0, 255).to(torch.uint8))
        return torch.cat(frames).unflatten(0, latents_BFChw.shape[:2])

    def _check_pixels(self, pixels_BFCHW: Tensor) -> None:
        shape = list(pixels_BFCHW.shape)
        if pixels_BFCHW.dtype != torch.uint8 or len(shape) != 5 or shape[2] != 3:
            raise EncoderError(
                f"VAE {self.name}: expected uint8 pixels [B, F, 3, H, W], got {pixels_BFCHW.dtype} {shape}"
            )
        if shape[3] % self.downscale or shape[4] % self.downscale:
            raise EncoderError(
                f"VAE {self.name}: height and width must be multiples of {self.downscale} pixels, got "
                f"{shape[3]} x {shape[4]}; change video.height and video.width"
            )
