"""Small random weights in the published layouts and as a run saves them.

Keys and shapes are written out from the layouts' descriptions. Image models come as diffusers' classes, which serve as
references, and their state dicts under their authors' names.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiTTransformer2DModel, PixArtTransformer2DModel
from torch import Tensor, nn

from latte_scale.checkpoint import Checkpointer, CheckpointSettings, Piece
from latte_scale.engine.dist import Ranks

WIDTH, HEADS, DEPTH, FRAMES, SIDE, PATCH, TEXT = 16, 2, 4, 4, 8, 2, 12
CLASSES = 5


def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Every parameter N(0, 0.2): nothing is zero or one by chance of its initialisation."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2, generator=generator)
    return model.eval()


def sinusoid(positions: np.ndarray, width: int) -> np.ndarray:
    """[P] -> [P, width], [sin | cos]."""
    angles = np.outer(positions, 10000.0 ** (-np.arange(width // 2) / (width / 2)))
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=1)


def spatial_table(grid: int = SIDE // PATCH, width: int = WIDTH) -> Tensor:
    """pos_embed [1, grid^2, width]: the column in the first half of the channels, the row in the second."""
    columns, rows = np.tile(np.arange(grid), grid), np.repeat(np.arange(grid), grid)
    table = np.concatenate([sinusoid(columns, width // 2), sinusoid(rows, width // 2)], axis=1)
    return torch.from_numpy(table).float()[None]


def frame_table(num_frames: int = FRAMES, width: int = WIDTH) -> Tensor:
    """temp_embed [1, num_frames, width]."""
    return torch.from_numpy(sinusoid(np.arange(num_frames), width)).float()[None]


def class_shapes(depth: int = DEPTH, classes: int | None = None, width: int = WIDTH) -> dict[str, tuple[int, ...]]:
    """Trained tensors of DiT and of the official class models; classes None: no labels."""
    linears = {"t_embedder.mlp.0": (width, 256), "t_embedder.mlp.2": (width, width)}
    for block in (f"blocks.{i}" for i in range(depth)):
        linears |= {f"{block}.attn.qkv": (3 * width, width), f"{block}.attn.proj": (width, width)}
        linears |= {f"{block}.mlp.fc1": (4 * width, width), f"{block}.mlp.fc2": (width, 4 * width)}
        linears[f"{block}.adaLN_modulation.1"] = (6 * width, width)
    linears |= {"final_layer.linear": (8 * PATCH**2, width), "final_layer.adaLN_modulation.1": (2 * width, width)}
    shapes = {"x_embedder.proj.weight": (width, 4, PATCH, PATCH), "x_embedder.proj.bias": (width,)}
    for name, (rows, columns) in linears.items():
        shapes |= {f"{name}.weight": (rows, columns), f"{name}.bias": (rows,)}
    return shapes | ({} if classes is None else {"y_embedder.embedding_table.weight": (classes + 1, width)})


def class_state(depth: int = DEPTH, classes: int | None = None) -> dict[str, Tensor]:
    """An official class model: random weights and its two fixed tables."""
    generator = torch.Generator().manual_seed(0)
    shapes = class_shapes(depth, classes)
    state = {name: torch.randn(shape, generator=generator) * 0.2 for name, shape in shapes.items()}
    return {"pos_embed": spatial_table(), "temp_embed": frame_table()} | state


def dit() -> tuple[DiTTransformer2DModel, dict[str, Tensor]]:
    """An image model of DEPTH blocks and its state under DiT's names.

    diffusers gives each block a time and label embedding of its own, which conversion fills with equal copies, takes
    another frequency spacing than DiT, and another eps: set here as DiT has them.
    """
    model = DiTTransformer2DModel(
        num_attention_heads=HEADS,
        attention_head_dim=WIDTH // HEADS,
        out_channels=8,
        num_layers=DEPTH,
        sample_size=SIDE,
        patch_size=PATCH,
        num_embeds_ada_norm=CLASSES,
        norm_eps=1e-6,
    )
    randomise(model)
    first = model.transformer_blocks[0].norm1.emb
    for block in model.transformer_blocks:
        block.norm1.emb = first
    first.time_proj.downscale_freq_shift = 0
    theirs = model.state_dict()
    embeddings = "transformer_blocks.0.norm1.emb"
    renamed = {
        "x_embedder.proj": "pos_embed.proj",
        "t_embedder.mlp.0": f"{embeddings}.timestep_embedder.linear_1",
        "t_embedder.mlp.2": f"{embeddings}.timestep_embedder.linear_2",
        "y_embedder.embedding_table": f"{embeddings}.class_embedder.embedding_table",
        "final_layer.adaLN_modulation.1": "proj_out_1",
        "final_layer.linear": "proj_out_2",
    }
    for i in range(DEPTH):
        for ours, other in (
            ("attn.proj", "attn1.to_out.0"),
            ("mlp.fc1", "ff.net.0.proj"),
            ("mlp.fc2", "ff.net.2"),
            ("adaLN_modulation.1", "norm1.linear"),
        ):
            renamed[f"blocks.{i}.{ours}"] = f"transformer_blocks.{i}.{other}"
    state = named(theirs, renamed)
    for i in range(DEPTH):
        for kind in ("weight", "bias"):
            heads = [theirs[f"transformer_blocks.{i}.attn1.to_{head}.{kind}"] for head in "qkv"]
            state[f"blocks.{i}.attn.qkv.{kind}"] = torch.cat(heads)
    assert state.keys() == class_shapes(classes=CLASSES).keys()
    return model, {"pos_embed": spatial_table()} | state


def pixart(**changes) -> tuple[PixArtTransformer2DModel, dict[str, Tensor]]:
    """A text-to-image model of two blocks and its state under PixArt-alpha's own names."""
    config = {
        "num_attention_heads": HEADS,
        "attention_head_dim": WIDTH // HEADS,
        "num_layers": 2,
        "cross_attention_dim": WIDTH,
        "caption_channels": TEXT,
        "sample_size": SIDE,
    }
    model = randomise(PixArtTransformer2DModel(**config | changes))
    theirs = model.state_dict()
    renamed = {
        "x_embedder.proj": "pos_embed.proj",
        "t_embedder.mlp.0": "adaln_single.emb.timestep_embedder.linear_1",
        "t_embedder.mlp.2": "adaln_single.emb.timestep_embedder.linear_2",
        "t_block.1": "adaln_single.linear",
        "y_embedder.y_proj.fc1": "caption_projection.linear_1",
        "y_embedder.y_proj.fc2": "caption_projection.linear_2",
        "final_layer.linear": "proj_out",
    }
    fused = {}
    for i in range(2):
        block = f"transformer_blocks.{i}"
        for ours, other in (
            ("attn.proj", "attn1.to_out.0"),
            ("cross_attn.q_linear", "attn2.to_q"),
            ("cross_attn.proj", "attn2.to_out.0"),
            ("mlp.fc1", "ff.net.0.proj"),
            ("mlp.fc2", "ff.net.2"),
        ):
            renamed[f"blocks.{i}.{ours}"] = f"{block}.{other}"
        fused[f"blocks.{i}.attn.qkv"] = [f"{block}.attn1.to_{head}" for head in "qkv"]
        fused[f"blocks.{i}.cross_attn.kv_linear"] = [f"{block}.attn2.to_{head}" for head in "kv"]
    state = named(theirs, renamed)
    for name, parts in fused.items():
        for kind in ("weight", "bias"):
            state[f"{name}.{kind}"] = torch.cat([theirs[f"{part}.{kind}"] for part in parts])
    state["final_layer.scale_shift_table"] = theirs["scale_shift_table"]
    for i in range(2):
        state[f"blocks.{i}.scale_shift_table"] = theirs[f"transformer_blocks.{i}.scale_shift_table"]
    state["y_embedder.y_embedding"] = torch.randn(120, TEXT, generator=torch.Generator().manual_seed(1))
    return model, {"pos_embed": spatial_table()} | state


def named(theirs: dict[str, Tensor], renamed: dict[str, str]) -> dict[str, Tensor]:
    """The tensors under other names, weights and biases."""
    return {
        f"{ours}.{kind}": theirs[f"{other}.{kind}"]
        for ours, other in renamed.items()
        for kind in ("weight", "bias")
        if f"{other}.{kind}" in theirs
    }


def save_run(folder: Path, config: dict[str, Any], state: dict[str, Tensor], step: int = 1) -> None:
    """A checkpoint as a run leaves it: raw weights, and an average that is twice as large."""
    trees = {
        tree: [Piece(name, tuple(t.shape), 0, t.numel(), factor * t.flatten()) for name, t in state.items()]
        for tree, factor in (("model", 1.0), ("ema/0.99", 2.0), ("optim/exp_avg", 0.0), ("optim/exp_avg_sq", 0.0))
    }
    ranks, how = Ranks(0, 1, 0, torch.device("cpu")), CheckpointSettings(asynchronous=False)
    Checkpointer(folder / "checkpoints", how, ranks).save(step, trees, {}, config, "")
