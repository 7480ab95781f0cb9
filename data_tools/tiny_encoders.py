"""Makes the two tiny encoders that ship with latte_scale: an image autoencoder and a text encoder for the laptop path.

    OMP_NUM_THREADS=1 python -m data_tools.tiny_encoders --out latte_scale/assets        (about 3 minutes on one core)

Out: `tiny_vae/` (diffusers AutoencoderKL, 2 pixels a latent, 4 channels) and `tiny_t5/` (transformers T5EncoderModel
with random weights, and a T5Tokenizer of whole words with single characters to fall back on), in the layout of the
released encoders, so that everything that loads those loads these. The VAE is trained on decoded shapes clips
(data_tools/shapes.py) and on procedural textures, whose statistics are near enough to photographs that real clips
pass through it recognisably. Same seed, same machine, same files.

The decision worth knowing: the network starts as the linear autoencoder of 2 x 2 px patches (their four principal
components), which takes AutoencoderKL from 26 dB before the first step to over 40 dB in 600; from PyTorch's usual
initialisation the same steps end at 31 dB (measured on unseen shapes clips).
"""

import argparse
import json
import math
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from data_tools.drawing import COLOURS, DIRECTIONS, FPS, SHAPES
from data_tools.shapes import PROMPT, plan_clip, render
from latte_scale import rng
from latte_scale.data.schema import VideoSettings
from latte_scale.data.video import read_clip, write_mp4

SIDE = 32  # pixels, height and width of a training image
CHANNELS = 4  # of the latents
WIDTH = 16  # channels at full size; twice that at latent size
NUM_GROUPS = 4  # of every group norm: one per latent channel at the bottleneck, one per colour at the end
BATCH = 16
SHAPES_PER_BATCH = 5  # the rest are textures
KL_WEIGHT = 5e-4  # against the mean squared error in [-1, 1]: posterior std ends near a tenth of the latents' std
PEAK_LR = 3e-3

WORDS = """\
a an the and or of in on at to by with from for into over under across through past near behind beside inside
outside around along up down left right front back top is are was be has have it its his her their two three four
one many some several few group crowd man woman boy girl child children person people player team dog cat horse
bird rabbit fish cow animal car cars bus bike bikes truck train boat plane street road city town building house
room kitchen table chair door window wall floor garden park field forest tree trees flower flowers grass meadow
mountain hill river lake sea ocean beach water wave waves sand snow rain cloud clouds sky sun sunlight moon star
night day morning evening light dark red green blue yellow orange purple pink brown black white grey gray golden
bright large big small little tiny long short tall old young new busy slow slowly fast quickly quiet moving moves
move turns turn walks walk walking runs run running rides riding drives driving stands standing sits sitting jumps
jumping dances dancing plays playing holds holding talks talking looks looking smiles climbs climbing flies flying
swims swimming falls falling rises opens closes throws catches hits kicks flips cooks cooking cuts cleans eats
drinks pours shows seen stretches sings reads writes works watches passes pass camera close view shot scene video
film cartoon circle square triangle ball basketball hoop gym school pool pole net bow tie suit shirt dress hat hair
eye eyes face hand hands arm arms head makeup mirror metal wooden glass fire smoke food pancake pan cup bottle phone
computer screen book music guitar game sport hot cold warm out off while then as he she they who that this
"""
PIECES = "ing ed er est ly s es ion ment ness able th ch sh wh tr st pl cr br gr re un in on an en at ar or al el"


def shape_images(num_clips: int, seed: int) -> Tensor:
    """Every frame of `num_clips` shapes clips as read back, encoded and decoded: [N, 3, 32, 32] in 0..255."""
    video = VideoSettings(frames=16, height=SIDE, width=SIDE, frame_interval=1)
    clips = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "clip.mp4"
        for index in range(num_clips):
            write_mp4(path, render(plan_clip(seed, index)), FPS)
            clips.append(read_clip(path, video))
    return torch.from_numpy(np.concatenate(clips)).float()


def _noise(draw: np.random.Generator, exponent: float) -> np.ndarray:
    """A grey field [32, 32] with spectrum frequency^-exponent, mean 0, std 1 (photographs: about 1)."""
    frequency = np.fft.fftfreq(SIDE)
    radius = np.hypot(frequency[:, None], frequency[None, :])
    radius[0, 0] = 1 / SIDE
    field = np.fft.ifft2(np.fft.fft2(draw.standard_normal((SIDE, SIDE))) * radius**-exponent).real
    return (field - field.mean()) / field.std()


def texture(seed: int, index: int) -> np.ndarray:
    """A random image [3, 32, 32] in 0..255: leaves of random size, colour and texture that hide one another.

    The dead leaves model (Lee, Mumford, Huang 2001) has the edges and spectrum of photographs.
    """
    draw = rng.generator(seed, "tiny_vae.texture", 0, index)
    y, x = np.mgrid[:SIDE, :SIDE] + 0.5
    image = draw.uniform(0, 255, 3)[:, None, None] + _noise(draw, draw.uniform(0.8, 1.6)) * draw.uniform(3, 40)
    for _ in range(draw.integers(0, 40)):
        radius = min(2.0 * draw.random() ** (-1 / 1.5), SIDE / 2)  # pixels; a power law makes it scale-free
        (cx, cy), angle, aspect = draw.uniform(0, SIDE, 2), draw.uniform(0, math.pi), draw.uniform(0.4, 1)
        u = (x - cx) * math.cos(angle) + (y - cy) * math.sin(angle)
        v = ((y - cy) * math.cos(angle) - (x - cx) * math.sin(angle)) / aspect
        is_round = draw.random() < 0.5
        distance = np.hypot(u, v) - radius if is_round else np.maximum(abs(u), abs(v)) - radius
        alpha = np.clip(0.5 - distance, 0, 1)
        colour = draw.uniform(0, 255) + draw.uniform(-1, 1, 3) * draw.choice([20, 100])
        leaf = colour[:, None, None] + _noise(draw, 1.2) * draw.uniform(0, 12)
        image = image * (1 - alpha) + alpha * leaf
    return np.clip(image, 0, 255)


def textures(count: int, seed: int) -> Tensor:
    """[count, 3, 32, 32] in 0..255, whole numbers."""
    return torch.from_numpy(np.stack([texture(seed, index) for index in range(count)])).float().round()


def _pairs(weight: Tensor, bias: Tensor, rows: Tensor, offsets: Tensor, constant: float) -> None:
    """Make group g of a convolution's outputs carry the linear value v_g = rows[g] . input + offsets[g] through a norm.

    The group begins (v, -v, c, -c): its mean is 0 whatever v is, and the constant c outweighs v in its variance, so the
    norm only scales. After it silu(v) - silu(-v) = v, exactly. The group's other outputs keep a weak random start.
    """
    per_group, centre = weight.shape[0] // NUM_GROUPS, weight.shape[-1] // 2
    weight.mul_(0.3)
    for g, (row, offset) in enumerate(zip(rows, offsets, strict=True)):
        first = g * per_group
        weight[first : first + 4] = 0
        weight[first, :, centre, centre] = row
        weight[first + 1, :, centre, centre] = -row
        bias[first : first + 4] = torch.tensor([offset, -offset, constant, -constant])


def _unpair(conv: torch.nn.Conv2d, num_values: int, per_group: int, scale: float) -> None:
    """The first `num_values` outputs of `conv` become scale * (silu(v_g) - silu(-v_g)) of the groups of `_pairs`."""
    conv.weight.mul_(0.1)
    conv.bias.zero_()
    for g in range(num_values):
        conv.weight[g] = 0
        conv.weight[g, g * per_group, 1, 1] = scale
        conv.weight[g, g * per_group + 1, 1, 1] = -scale


@torch.no_grad()
def start_linear(vae: torch.nn.Module, images: Tensor) -> None:
    """Set a fresh tiny AutoencoderKL to the principal components of the 2 x 2 px patches of `images` [N, 3, H, W].

    Images in 0..255. The encoder is exact; the decoder gives each latent's patch mean, which is all that nearest-
    neighbour upsampling can give before training.
    """
    patches = F.pixel_unshuffle(images / 127.5 - 1, 2).permute(0, 2, 3, 1).reshape(-1, 12)  # columns (colour, dy, dx)
    mean = patches.mean(0)
    variance, vectors = torch.linalg.eigh((patches - mean).T @ (patches - mean) / len(patches))
    std = variance.flip(0)[:CHANNELS].sqrt()
    basis = vectors.flip(1)[:, :CHANNELS].T
    basis = basis * basis.sum(1, keepdim=True).sign()  # eigenvectors come with any sign
    for module in vae.modules():
        if type(module).__name__ == "ResnetBlock2D":
            module.conv2.weight.mul_(0.1)  # blocks start near the identity
            module.conv2.bias.zero_()
    constant, per_group = 3.0, 2 * WIDTH // NUM_GROUPS
    encoder, decoder = vae.encoder, vae.decoder
    encoder.conv_in.weight[:3], encoder.conv_in.bias[:3] = 0, 0
    encoder.conv_in.weight[range(3), range(3), 1, 1] = 1
    down = encoder.down_blocks[0].downsamplers[0].conv  # 3 x 3, stride 2, padded after the end: rows 0, 1 are the patch
    down.weight[:CHANNELS] = 0
    down.weight[:CHANNELS, :3, :2, :2] = (basis / std[:, None]).view(CHANNELS, 3, 2, 2)
    down.bias[:CHANNELS] = -(basis @ mean) / std
    wide = encoder.down_blocks[1].resnets[0].conv_shortcut
    _pairs(wide.weight, wide.bias, torch.eye(CHANNELS, WIDTH), torch.zeros(CHANNELS), constant)
    _unpair(encoder.conv_out, CHANNELS, per_group, math.sqrt((1 + constant**2) * 2 / per_group))
    encoder.conv_out.bias[CHANNELS:] = -5  # log variance of the posterior
    for mix in (vae.quant_conv, vae.post_quant_conv):
        mix.weight[:, :, 0, 0], mix.bias[:] = torch.eye(mix.weight.shape[0]), 0
    _pairs(decoder.conv_in.weight, decoder.conv_in.bias, torch.eye(CHANNELS), torch.zeros(CHANNELS), constant)
    up = decoder.up_blocks[0].upsamplers[0].conv
    up.weight.mul_(0.3)
    carried = range(0, 2 * WIDTH, per_group)
    up.weight[carried], up.bias[carried] = 0, 0
    up.weight[carried, carried, 1, 1] = 1
    patch_means = torch.zeros(3, 2 * WIDTH)
    patch_means[:, ::per_group] = (basis * std[:, None]).view(CHANNELS, 3, 4).mean(2).T
    narrow = decoder.up_blocks[1].resnets[0].conv_shortcut
    _pairs(narrow.weight, narrow.bias, patch_means, mean.view(3, 4).mean(1), constant)
    _unpair(decoder.conv_out, 3, WIDTH // NUM_GROUPS, math.sqrt((0.3 + constant**2) * 2 * NUM_GROUPS / WIDTH))


def new_vae(images: Tensor, seed: int) -> torch.nn.Module:
    """An untrained tiny AutoencoderKL that already is a linear autoencoder of `images` [N, 3, H, W] 0..255."""
    from diffusers import AutoencoderKL

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            block_out_channels=(WIDTH, 2 * WIDTH),
            layers_per_block=1,
            latent_channels=CHANNELS,
            norm_num_groups=NUM_GROUPS,
            sample_size=SIDE,
            mid_block_add_attention=False,
        )
    start_linear(vae, images)
    return vae


def train_vae(shape_pixels: Tensor, texture_pixels: Tensor, num_steps: int, seed: int) -> torch.nn.Module:
    """A trained VAE: mean squared error plus KL_WEIGHT x KL divergence to N(0, 1), Adam, cosine learning rate."""
    from rich.progress import track

    vae = new_vae(texture_pixels, seed)
    optimizer = torch.optim.Adam(vae.parameters(), lr=PEAK_LR, betas=(0.9, 0.99))
    for step in track(range(num_steps), description="training the tiny VAE"):
        for group in optimizer.param_groups:
            group["lr"] = PEAK_LR * min(1, (step + 1) / 50) * (0.5 + 0.5 * math.cos(math.pi * step / num_steps))
        draw = rng.generator(seed, "tiny_vae.batch", step, 0)
        shape_rows = draw.integers(len(shape_pixels), size=SHAPES_PER_BATCH)
        texture_rows = draw.integers(len(texture_pixels), size=BATCH - SHAPES_PER_BATCH)
        images = torch.cat([shape_pixels[shape_rows], texture_pixels[texture_rows]]) / 127.5 - 1
        images = images.flip([axis for axis in (2, 3) if draw.random() < 0.5])
        posterior = vae.encode(images).latent_dist
        noise = draw.standard_normal(tuple(posterior.mean.shape), dtype=np.float32)
        output = vae.decode(posterior.mean + posterior.std * torch.from_numpy(noise)).sample
        divergence = 0.5 * (posterior.mean**2 + posterior.var - 1 - posterior.logvar).mean()
        loss = F.mse_loss(output, images) + KL_WEIGHT * divergence
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
    return vae.eval()


@torch.no_grad()
def centre_latents(vae: torch.nn.Module, images: Tensor) -> None:
    """Give the latents of `images` [N, 3, H, W] 0..255 mean 0 a channel, and config.scaling_factor their inverse std.

    The mean moves into the 1 x 1 convolutions on either side of the latents, so the reconstruction stays the same; a
    config.shift_factor would do too, but LattePipeline ignores it.
    """
    latents = vae.encode(images / 127.5 - 1).latent_dist.mean
    mean = latents.mean((0, 2, 3))
    vae.quant_conv.bias[:CHANNELS] -= mean
    vae.post_quant_conv.bias += vae.post_quant_conv.weight[:, :, 0, 0] @ mean
    std = (latents - mean[:, None, None]).std().item()
    vae.register_to_config(scaling_factor=round(1 / std, 4))


@torch.no_grad()
def psnr_db(vae: torch.nn.Module, images: Tensor) -> float:
    """Peak signal-to-noise ratio of the round trip of `images` [N, 3, H, W] 0..255, over their mean squared error."""
    error = 0.0
    for batch in images.split(64):
        output = vae.decode(vae.encode(batch / 127.5 - 1).latent_dist.mean).sample
        error += ((output + 1) * 127.5).clamp(0, 255).round().sub(batch).square().sum().item()
    return 10 * math.log10(255**2 / (error / images.numel()))


def new_tokenizer() -> Any:
    """A T5Tokenizer of about 500 pieces: whole words first, then common endings, then single ASCII characters."""
    from transformers import T5Tokenizer

    names = [*COLOURS, *SHAPES, *DIRECTIONS, *PROMPT.replace("{", " ").replace("}", " ").split()]
    words = sorted({word.lower() for word in [*WORDS.split(), *names]} - {"colour", "shape", "direction"})
    characters = [chr(code) for code in range(33, 127)]
    # Unigram takes the split with the highest sum of scores: a whole word beats two pieces, a piece two characters.
    pieces = {"<pad>": 0.0, "</s>": 0.0, "<unk>": 0.0, "▁": -5.0}
    for group, score in ((characters, -8.0), (PIECES.split(), -9.0), ([f"▁{word}" for word in words], -6.0)):
        pieces |= {piece: score for piece in group if piece not in pieces}
    return T5Tokenizer(vocab=list(pieces.items()), extra_ids=0)


def new_text_encoder(vocab_size: int, seed: int) -> torch.nn.Module:
    """A T5EncoderModel with 2 layers of width 64 and random weights: distinct tokens get distinct, mixed embeddings."""
    from transformers import T5Config, T5EncoderModel

    config = T5Config(
        vocab_size=vocab_size,
        d_model=64,
        d_kv=16,
        d_ff=128,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
        use_cache=False,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return T5EncoderModel(config).eval()


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, type=Path, help="folder that gets tiny_vae/ and tiny_t5/")
    parser.add_argument("--steps", type=int, default=800, help="training steps of the VAE (default 800)")
    parser.add_argument("--only", choices=["vae", "t5"], help="make one of the two (default: both)")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> int:
    torch.set_num_threads(1)  # sums in one order, so that the files are reproducible
    if args.only != "vae":
        tokenizer = new_tokenizer()
        new_text_encoder(len(tokenizer), args.seed).save_pretrained(args.out / "tiny_t5")
        tokenizer.save_pretrained(args.out / "tiny_t5")
    if args.only != "t5":
        shape_pixels = shape_images(96, args.seed)
        vae = train_vae(shape_pixels, textures(1500, args.seed), args.steps, args.seed)
        centre_latents(vae, shape_pixels[::8])
        vae.save_pretrained(args.out / "tiny_vae")
        unseen = {"shapes": shape_images(24, args.seed + 1), "textures": textures(100, args.seed + 1)}
        figures = {f"{name}_psnr_db": round(psnr_db(vae, images), 2) for name, images in unseen.items()}
        print(json.dumps(figures | {"scaling_factor": vae.config.scaling_factor}))
    files = list(args.out.glob("tiny_*/*"))
    for path in files:
        path.chmod(0o644)  # weights come as 0600
    size = sum(path.stat().st_size for path in files)
    print(f"tiny encoders: done -> {args.out} ({size / 1e6:.2f} MB)")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(parse_args()))
