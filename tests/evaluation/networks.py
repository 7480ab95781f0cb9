"""Small feature networks with the interfaces of the published ones: the real code path runs on them."""

import json
from pathlib import Path

import torch
from torch import Tensor, nn


class SmallI3D(nn.Module):
    """Clips [B, 3, F, H, W] of 0..255 -> [B, 12] features, or logits."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv3d(3, 8, (2, 5, 5), stride=(1, 3, 3))
        self.last = nn.Linear(16, 12)

    def forward(self, x: Tensor, rescale: bool = False, resize: bool = False, return_features: bool = False) -> Tensor:
        if rescale:
            x = x * 2 / 255 - 1
        if resize:
            x = nn.functional.interpolate(x, size=(x.shape[2], 24, 24), mode="trilinear", align_corners=False)
        x = torch.relu(self.first(x))
        out = self.last(torch.cat([x.mean((2, 3, 4)), x.amax((2, 3, 4))], dim=1))
        return out if return_features else out.softmax(1)


class SmallInception(nn.Module):
    """Images [B, 3, H, W] uint8 -> [B, 8] features, or probabilities of 5 classes."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 5, stride=3)
        self.last = nn.Linear(8, 5)

    def forward(self, img: Tensor, return_features: bool = False, no_output_bias: bool = False) -> Tensor:
        x = torch.tanh(self.first(img.float() / 128 - 1)).mean((2, 3))
        if return_features:
            return x
        logits = nn.functional.linear(x, self.last.weight) if no_output_bias else self.last(x)
        return (8 * logits).softmax(1)


def write_script(module: type[nn.Module], path: Path) -> Path:
    """Write a small network as TorchScript, its weights drawn from a fixed seed."""
    torch.manual_seed(0)
    torch.jit.script(module().eval()).save(str(path))
    return path


def write_clip(folder: Path) -> Path:
    """A CLIP of two layers with a tokenizer of bytes, in the folder layout of transformers."""
    from transformers import CLIPConfig, CLIPModel, CLIPTokenizerFast
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    letters = [*"abcdefghijklmnopqrstuvwxyz", *(f"{letter}</w>" for letter in "abcdefghijklmnopqrstuvwxyz")]
    vocabulary = {word: number for number, word in enumerate(["<|startoftext|>", "<|endoftext|>", *letters])}
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {**small, "vocab_size": len(vocabulary), "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    vision = {**small, "image_size": 32, "patch_size": 8}
    torch.manual_seed(0)
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).save_pretrained(folder)
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    CLIPTokenizerFast.from_pretrained(folder).save_pretrained(folder)
    sides = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    CLIPImageProcessorPil(**sides).save_pretrained(folder)
    return folder
