"""The network that launch/bench/tokenizer.py compares with: a VQ autoencoder of LlamaGen's layers in torch, NCHW, under its tensor names.

Layers, normalisation and losses are those of the specification: group norm (32, 1e-6), x sigmoid(x), one head of attention as wide as
its channels, cosine distance to the codes, all distances at once.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn


def norm(width: int) -> nn.GroupNorm:
    """32 groups."""
    return nn.GroupNorm(32, width, eps=1e-6)


def swish(x: torch.Tensor) -> torch.Tensor:
    """x sigmoid(x)."""
    return x * torch.sigmoid(x)


class Residual(nn.Module):
    """Two convolutions beside a shortcut."""

    def __init__(self, din: int, dout: int):
        super().__init__()
        self.norm1, self.conv1 = norm(din), nn.Conv2d(din, dout, 3, padding=1)
        self.norm2, self.conv2 = norm(dout), nn.Conv2d(dout, dout, 3, padding=1)
        self.nin_shortcut = nn.Conv2d(din, dout, 1) if din != dout else None

    def forward(self, x):
        h = self.conv2(swish(self.norm2(self.conv1(swish(self.norm1(x))))))
        return h + (x if self.nin_shortcut is None else self.nin_shortcut(x))


class Attention(nn.Module):
    """One head over all positions."""

    def __init__(self, width: int):
        super().__init__()
        self.norm = norm(width)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(width, width, 1) for _ in range(4))

    def forward(self, x):
        n = self.norm(x)
        b, c, h, w = n.shape
        q, k, v = (f(n).reshape(b, c, h * w) for f in (self.q, self.k, self.v))
        weights = torch.softmax(torch.bmm(q.transpose(1, 2), k) * c**-0.5, dim=2)
        return x + self.proj_out(torch.bmm(v, weights.transpose(1, 2)).reshape(b, c, h, w))


class Resample(nn.Module):
    """Half or twice the resolution."""

    def __init__(self, width: int, up: bool):
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1) if up else nn.Conv2d(width, width, 3, stride=2)
        self.up = up

    def forward(self, x):
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest") if self.up else F.pad(x, (0, 1, 0, 1)))


def level(widths: list[int], attends: bool, resample: str, up: bool) -> nn.Module:
    """Residual blocks, attention, and the way to the next resolution."""
    block = nn.Module()
    block.res = nn.ModuleList(Residual(a, b) for a, b in zip(widths[:-1], widths[1:]))
    block.attn = nn.ModuleList(Attention(b) for b in widths[1:]) if attends else nn.ModuleList()
    if resample:
        setattr(block, resample, Resample(widths[-1], up))
    return block


def through(block: nn.Module, x: torch.Tensor, resample: str) -> torch.Tensor:
    """What a level makes of x."""
    for i, residual in enumerate(block.res):
        x = residual(x)
        x = block.attn[i](x) if len(block.attn) else x
    return getattr(block, resample)(x) if hasattr(block, resample) else x


def half(width: int, widths: list[int], blocks: int, latent: int, encoder: bool) -> nn.Module:
    """The encoder, or the decoder; attention at the coarsest level."""
    part, order = nn.Module(), list(range(len(widths)))
    order = order if encoder else order[::-1]
    din = width if encoder else widths[-1]
    part.conv_in = nn.Conv2d(3 if encoder else latent, din, 3, padding=1)
    part.conv_blocks = nn.ModuleList()
    deepest = widths[-1]
    for at in order:
        count, name = (blocks, "downsample") if encoder else (blocks + 1, "upsample")
        coarsest, last = at == len(widths) - 1, at == order[-1]
        part.conv_blocks.append(level([din] + [widths[at]] * count, coarsest, "" if last else name, not encoder))
        din = widths[at]
    part.mid = nn.ModuleList([Residual(deepest, deepest), Attention(deepest), Residual(deepest, deepest)])
    part.norm_out, part.conv_out = norm(din), nn.Conv2d(din, latent if encoder else 3, 3, padding=1)
    return part


class VQ(nn.Module):
    """Encoder, table of codes, decoder."""

    def __init__(self, width: int, multipliers: tuple[int, ...], blocks: int, latent: int, codes: int, code_width: int):
        super().__init__()
        widths = [width * m for m in multipliers]
        self.encoder, self.decoder = (half(width, widths, blocks, latent, side) for side in (True, False))
        self.quant_conv, self.post_quant_conv = nn.Conv2d(latent, code_width, 1), nn.Conv2d(code_width, latent, 1)
        self.quantize = nn.Module()
        self.quantize.embedding = nn.Embedding(codes, code_width)

    def latents(self, x):
        """[B, 3, H, W] -> [B, D, h, w]."""
        e = self.encoder
        x = e.conv_in(x)
        for block in e.conv_blocks:
            x = through(block, x, "downsample")
        for part in e.mid:
            x = part(x)
        return self.quant_conv(e.conv_out(swish(e.norm_out(x))))

    def quantise(self, z):
        """(codes [B, h, w], latents [B, D, h, w] with the gradient of z, loss)."""
        z = F.normalize(z.float().permute(0, 2, 3, 1), dim=-1)
        table = F.normalize(self.quantize.embedding.weight.float(), dim=-1)
        flat = z.reshape(-1, z.shape[-1])
        distances = (flat**2).sum(1, keepdim=True) + (table**2).sum(1) - 2 * flat @ table.t()
        codes = distances.argmin(1)
        rows = table[codes].reshape(z.shape)
        loss = ((rows - z.detach()) ** 2).mean() + 0.25 * ((rows.detach() - z) ** 2).mean()
        return codes.reshape(z.shape[:-1]), (z + (rows - z).detach()).permute(0, 3, 1, 2), loss

    def encode(self, x):
        """Codes [B, h, w]."""
        return self.quantise(self.latents(x))[0]

    def decode(self, codes):
        """Pictures [B, 3, H, W] of codes [B, h, w]."""
        table = F.normalize(self.quantize.embedding.weight, dim=-1)
        return self.pictures(table[codes].permute(0, 3, 1, 2))

    def pictures(self, z):
        """[B, D, h, w] -> [B, 3, H, W]."""
        d = self.decoder
        x = d.conv_in(self.post_quant_conv(z))
        for part in d.mid:
            x = part(x)
        for block in d.conv_blocks:
            x = through(block, x, "upsample")
        return d.conv_out(swish(d.norm_out(x)))

    def loss(self, x):
        """Mean squared error and the losses of the table."""
        _, z, loss = self.quantise(self.latents(x))
        return ((self.pictures(z).float() - x.float()) ** 2).mean() + loss

    forward = loss
