"""The temporal decoder of Stable Video Diffusion in place of the VAE's own: frames that flicker less.

In: latents in model units. Out: uint8 pixels, as `VideoAutoencoder.decode` gives them. It is a frozen diffusers
AutoencoderKLTemporalDecoder (Latte-1's folder `vae_temporal_decoder`), trained only on the latents of Stable
Diffusion's VAE. The decision worth knowing: frames are decoded in chunks of 14, as in LattePipeline, but a chunk never
spans two clips of a batch (there it may), so a video does not depend on its neighbours.

Shapes: B clips, F frames, C channels, H W pixels, h w latents. diffusers is imported when a decoder is loaded.
"""

import torch
from torch import Tensor

from latte_scale.encoders import EncoderError, VideoAutoencoder, check_latents, find_folder, loading

CHUNK = 14
"""Frames decoded together: what the decoder was trained with, and LattePipeline's default."""


class TemporalDecoder:
    """A frozen AutoencoderKLTemporalDecoder; only its decoder is used."""

    def __init__(self, name: str, device: torch.device | str = "cpu") -> None:
        """`name`: a folder with config.json and weights, one that has vae_temporal_decoder/ inside, or a hub id.

        Raises EncoderError if it cannot be loaded.
        """
        from diffusers import AutoencoderKLTemporalDecoder

        self.name, self.device = name, torch.device(device)
        expected = "an AutoencoderKLTemporalDecoder (config.json and weights, or a vae_temporal_decoder/ folder)"
        folder = find_folder(name, None, "vae_temporal_decoder", expected)
        with loading(name, folder, "AutoencoderKLTemporalDecoder (--temporal-decoder)"):
            self.model = AutoencoderKLTemporalDecoder.from_pretrained(
                folder, torch_dtype=torch.float32, local_files_only=True, low_cpu_mem_usage=False
            )
        self.model.eval().requires_grad_(False).to(self.device)
        config = self.model.config
        self.scale = float(config.scaling_factor)
        self.downscale = 2 ** (len(config.block_out_channels) - 1)
        self.channels = int(config.latent_channels)

    def check_fits(self, vae: VideoAutoencoder) -> None:
        """EncoderError unless it decodes latents of this VAE's shape and scale."""
        mine, its = ((each.channels, each.downscale, each.scale) for each in (self, vae))
        if mine != its:
            raise EncoderError(
                f"temporal decoder {self.name}: (channels, pixels a latent, scale) {mine}, VAE {vae.name} has {its}; "
                "it is for latents of Stable Diffusion's VAE; leave it out"
            )

    @torch.no_grad()
    def decode(self, latents_BFChw: Tensor) -> Tensor:
        """uint8 RGB clips [B, F, 3, H, W] on the decoder's device, of latents [B, F, C, h, w] in model units.

        Raises EncoderError for another number of channels, or latents that are not finite.
        """
        check_latents(latents_BFChw, self.channels, f"temporal decoder {self.name}")
        clips = []
        for latents_FChw in latents_BFChw:
            frames = []
            for chunk in (latents_FChw.to(self.device).float() / self.scale).split(CHUNK):
                pixels = (self.model.decode(chunk, num_frames=len(chunk)).sample + 1) * 127.5
                frames.append(pixels.round().clamp(0, 255).to(torch.uint8))
            clips.append(torch.cat(frames))
        return torch.stack(clips)
