"""Latte's forward written out one clip, one sequence and one head at a time: what the model must equal.

Independent of latte_scale.model but for the names of settings and weights. Everything is repeated where the paper
repeats it (the condition for every frame and patch), compression patches are a 3-D convolution and a transposed one,
rotary positions are complex numbers, split heads are the sum of two attentions with output projections of their own,
and an image is a clip of one frame that no layer over time ever sees.
"""

import math

import torch
import torch.nn.functional as F


def latte_by_hand(state, s, latents_BFCHW, t_B, label_B=None, num_images=0, image_label_BN=None):
    """[B, F, C, H, W] -> [B, F, O, H, W]; `state`: the model's state dict, `s`: its settings."""
    clips = []
    for b, latents in enumerate(latents_BFCHW):
        label = None if label_B is None else label_B[b]
        labels = [label] * num_images if image_label_BN is None else image_label_BN[b]
        frames = len(latents) - num_images
        out = [one_clip(state, s, latents[:frames], t_B[b], label, is_video=True)]
        out += [
            one_clip(state, s, latents[frames + j, None], t_B[b], labels[j], is_video=False) for j in range(num_images)
        ]
        clips.append(torch.cat(out))
    return torch.stack(clips)


def one_clip(state, s, latents_FCHW, t, label, is_video):
    linear = make_linear(state)
    x = patches(state, s, latents_FCHW)  # [f, T, D]
    num_patches = x.shape[1]
    angle = float(t) * torch.exp(-math.log(10000.0) * torch.arange(128) / 128)
    sinusoid = torch.cat([angle.cos(), angle.sin()]).to(x.dtype)
    time = linear("t_embedder.mlp.2", F.silu(linear("t_embedder.mlp.0", sinusoid)))
    label = None if label is None else state["y_embedder.embedding_table.weight"][label]
    condition = time if label is None else time + label
    if s.injection == "all_tokens":
        tokens = torch.stack([time] if label is None else [time, label])
        x, condition = torch.cat([x, tokens.expand(len(x), -1, -1)], dim=1), None
    for index, kinds in enumerate(attentions(s)):
        block = f"blocks.{index}"
        if is_video and len(x) > 1 and first_over_time(s) == index and s.temporal_position != "rotary":
            x = x + temporal_table(state, s, len(x))[:, None]
        if kinds == ["time"] and not is_video:
            continue
        modulation = chunks(linear, f"{block}.adaLN_modulation.1", condition, 3 * (len(kinds) + 1))
        for number, kind in enumerate(kinds):
            name = f"{block}.attn" if number == 0 else f"{block}.temporal_attn"
            shift, scale, gate = modulation[3 * number : 3 * number + 3]
            x = x + gate * attention(state, s, name, norm(x) * (1 + scale) + shift, kind, is_video)
        shift, scale, gate = modulation[-3:]
        hidden = F.gelu(linear(f"{block}.mlp.fc1", norm(x) * (1 + scale) + shift), approximate="tanh")
        x = x + gate * linear(f"{block}.mlp.fc2", hidden)
    shift, scale = chunks(linear, "final_layer.adaLN_modulation.1", condition, 2)[:2]
    return pixels(state, s, norm(x[:, :num_patches]) * (1 + scale) + shift, latents_FCHW.shape)


def make_linear(state):
    return lambda name, x: x @ state[f"{name}.weight"].T + state[f"{name}.bias"]


def norm(x):
    mean, variance = x.mean(-1, keepdim=True), x.var(-1, keepdim=True, correction=0)
    return (x - mean) / (variance + 1e-6).sqrt()


def chunks(linear, name, condition, number):
    """Shift, scale, gate, shift, ...; without a condition the ones that change nothing."""
    if condition is None:
        return [0.0, 0.0, 1.0] * (number // 3 + 1)
    return linear(name, F.silu(condition)).chunk(number)


def attentions(s):
    half = s.depth // 2
    return {
        "interleaved": [["space"], ["time"]] * half,
        "late_fusion": [["space"]] * half + [["time"]] * half,
        "sequential": [["space", "time"]] * s.depth,
        "parallel": [["both"]] * s.depth,
    }[s.variant]


def first_over_time(s):
    return {"interleaved": 1, "late_fusion": s.depth // 2, "sequential": 0, "parallel": 0}[s.variant]


def attention(state, s, name, x, kind, is_video):
    """[f, T, D] -> the same, output projection included."""
    half, head_dim = s.num_heads // 2, s.width // s.num_heads
    weight, bias = state[f"{name}.proj.weight"], state[f"{name}.proj.bias"]
    heads = {"space": range(s.num_heads), "time": range(s.num_heads)}
    if kind == "both":
        heads = {"space": range(half), "time": range(half, s.num_heads)}
    out = torch.zeros_like(x)
    if kind in ("space", "both"):
        columns = weight[:, heads["space"].start * head_dim : heads["space"].stop * head_dim]
        out = out + torch.stack([one_sequence(state, s, name, frame, heads["space"]) for frame in x]) @ columns.T
    if kind in ("time", "both") and is_video:
        columns = weight[:, heads["time"].start * head_dim : heads["time"].stop * head_dim]
        over_time = [one_sequence(state, s, name, x[:, t], heads["time"], rotary=True) for t in range(x.shape[1])]
        out = out + torch.stack(over_time, dim=1) @ columns.T
    return out + bias if is_video or kind != "time" else out


def one_sequence(state, s, name, x, heads, rotary=False):
    """[S, D] -> [S, heads x head_dim], one head after the other."""
    head_dim, out = s.width // s.num_heads, []
    qkv = (x @ state[f"{name}.qkv.weight"].T + state[f"{name}.qkv.bias"]).view(len(x), 3, s.num_heads, head_dim)
    for head in heads:
        q, k, v = qkv[:, 0, head], qkv[:, 1, head], qkv[:, 2, head]
        if rotary and s.temporal_position == "rotary":
            q, k = turned(q), turned(k)
        out.append((q @ k.T / head_dim**0.5).softmax(-1) @ v)
    return torch.cat(out, dim=1)


def turned(x):
    """Channels i and i + half as a complex number, times e^(i frame / 10000^(i / half))."""
    half = x.shape[1] // 2
    angle = torch.arange(len(x))[:, None] / 10000.0 ** (torch.arange(half) / half)
    turned = torch.complex(x[:, :half], x[:, half:]) * torch.polar(torch.ones_like(angle), angle)
    return torch.cat([turned.real, turned.imag], dim=1)


def sincos(positions, width):
    angle = positions.double()[:, None] * 10000.0 ** (-2 * torch.arange(width // 2).double() / width)
    return torch.cat([angle.sin(), angle.cos()], dim=1).float()


def temporal_table(state, s, num_frames):
    if s.temporal_position == "learnable":
        return state["temp_embed"][0, :num_frames]
    return sincos(torch.arange(num_frames), s.width)


def patches(state, s, latents_FCHW):
    size = (s.tubelet_size, s.patch_size, s.patch_size)
    weight = state["x_embedder.proj.weight"].unflatten(1, (s.tubelet_size, s.in_channels)).transpose(1, 2)
    x_DFhw = F.conv3d(latents_FCHW.transpose(0, 1), weight, state["x_embedder.proj.bias"], stride=size)
    height, width = x_DFhw.shape[-2:]
    rows, columns = torch.arange(height).repeat_interleave(width), torch.arange(width).repeat(height)
    table = torch.cat([sincos(columns, s.width // 2), sincos(rows, s.width // 2)], dim=1)
    return x_DFhw.flatten(2).permute(1, 2, 0) + table


def pixels(state, s, x_FTD, shape_FCHW):
    """A transposed convolution whose bias differs from pixel to pixel of a patch."""
    tubelet, patch, height, width = s.tubelet_size, s.patch_size, shape_FCHW[2], shape_FCHW[3]
    by_pixel = (patch, patch, tubelet, s.out_channels)  # row, column, frame, channel
    weight = state["final_layer.linear.weight"].unflatten(0, by_pixel).permute(4, 3, 2, 0, 1)
    bias = state["final_layer.linear.bias"].unflatten(0, by_pixel).permute(3, 2, 0, 1)
    x_DFhw = x_FTD.permute(2, 0, 1).unflatten(2, (height // patch, width // patch))
    out_OFHW = F.conv_transpose3d(x_DFhw, weight, stride=(tubelet, patch, patch))
    out_OFHW = out_OFHW + bias.repeat(1, *x_DFhw.shape[1:])
    return out_OFHW.transpose(0, 1)
