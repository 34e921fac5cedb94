"""The Ordinal Diffusion Model: one script, read from top to bottom.

    S. Takezaki and S. Uchida, "An Ordinal Diffusion Model for Generating Medical Images with
    Different Severity Levels", ISBI 2024, arXiv 2403.00452.

    python odm.py train                       # draws the embedded set, trains the small preset
    python odm.py train --data data/limuc     # the paper's settings on LIMUC
    python odm.py sample --class 3            # images of severity 3, from the newest run
    python odm.py sample --class 0:3:0.25     # the same noise at rising severity

Where the paper's equations are:

    Eq. 1  the forward process, x_{t-1} -> x_t     alpha_bars, q_sample (t steps in one)
    Eq. 2  one step of the backward process        ddim_sample (eta = 1, steps = T, clip = False)
    Eq. 3  L_DM, the loss of a diffusion model     dm_loss
    Eq. 4  the order of the noise estimates        holds where ordinal_loss = 0 and they differ
    Eq. 5  L_ordinal, the ordinal relationship     ordinal_loss
    Eq. 6  d, the distance of two noise estimates  noise_distance
    Eq. 7  three estimates on a line, in order     straightness (= 1); guided_eps (severity 1.5)
    Eq. 8  L_total = L_DM + lambda_t L_ordinal     total_loss

and its symbols: x_0 a clean image in [-1, 1], x_t the same after t of T noising steps, eps the noise
in it, eps_hat the network's estimate eps_theta(x_t, t, c), c a class, p < q < r three classes in
ascending severity. A "ladder" is K noise estimates of K ascending classes (K = 3 in the paper's loss).
In the shapes: B images in a batch, R rows of the network, G ladders, C classes, D = 3HW entries of an image.
Classes are counted from 0: the paper's class c has index c - 1. Index C is the null class of guidance.

Settings, mathematics and network come first; then data, training, the machine, files, sampling, the command line.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import csv
import ctypes
import filecmp
import hashlib
import itertools
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import warnings
import zipfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Callable, Sequence

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor, nn

HERE = Path(__file__).resolve().parent


class UserError(Exception):
    """Something the user can mend: one line that names the file or flag and says what to do."""


# ---------------------------------------------------------------------------------- settings


def setting(default, help: str, low=None, high=None, choices=None, may_change: bool = False):
    """A field of Config. `may_change`: it may differ when a run is resumed."""
    return field(default=default, metadata=dict(help=help, low=low, high=high, choices=choices, may_change=may_change))


@dataclass
class Config:
    """Every setting of a training run, its default and where that comes from. Fields are flags of `train`."""

    # data
    data: str = setting("", "folder of graded images (none: the embedded set is drawn)", may_change=True)
    out: str = setting("", "folder of the run (none: runs/NAME, after the data)", may_change=True)
    size: int = setting(64, "image side in pixels (paper)", low=4, high=1024)
    crop: int = setting(0, "side of the centre crop; 0: 128 for 352x288 frames (paper), else the middle square", low=0)
    order: str = setting("", "class names in ascending severity, A,B,C (where names carry no number)")
    flip: bool = setting(True, "random horizontal flips (Ho et al.)")
    # forward process
    timesteps: int = setting(1000, "T, steps of the forward process (paper)", low=1, high=100_000)
    beta_1: float = setting(1e-4, "noise schedule at t = 1 (paper)", low=1e-8, high=0.999)
    beta_T: float = setting(0.02, "noise schedule at t = T (paper)", low=1e-8, high=0.999)
    # losses
    ordinal: float = setting(1.0, "W, a factor on lambda_t; 1 is the paper's Eq. 8, 0 the plain diffusion model", low=0.0)
    ladder: str = setting("labels", "labels: one x_t under K labels (Fig. 2); images: K images, one noise (Eqs. 4 to 7 to the letter)", choices=("labels", "images"))
    distance: str = setting("euclidean", "d of Eq. 6; squared is the printed form, which contradicts Eq. 7", choices=("euclidean", "squared"))
    spacing: bool = setting(False, "ask also for d(p,q) : d(q,r) = (q-p) : (r-q) (the paper's first future work)")
    rungs: int = setting(3, "K, classes in a ladder; 0: all (ours: 3 is Eq. 5's p, q, r)", low=0)
    ladder_part: float = setting(0.25, "labels: part of the batch seen under K labels (ours: a step costs 1.5 of DM's)", low=0.0, high=1.0)
    balance: str = setting("data", "classes in L_DM: at their frequency in the data (Eq. 3) or even", choices=("data", "uniform"))
    class_dropout: float = setting(0.1, "probability of the null class, for guidance (Ho & Salimans)", low=0.0, high=1.0)
    # U-Net
    ch: int = setting(128, "channels at full resolution (Ho et al.)", low=4)
    ch_mult: tuple = setting((1, 2, 2, 2), "channel multiplier of each resolution (Ho et al.)", low=1)
    blocks: int = setting(2, "residual blocks at each resolution (Ho et al.)", low=1)
    attention: tuple = setting((16,), "sides of the feature maps with self-attention (Ho et al.)", low=1)
    groups: int = setting(32, "of GroupNorm (Ho et al.); few in a narrow network: each group's mean, and so the colour, is lost", low=1)
    dropout: float = setting(0.1, "dropout in the residual blocks (Ho et al.)", low=0.0, high=0.99)
    # training
    batch: int = setting(32, "images a step, over all processes (paper)", low=1)
    steps: int = setting(200_000, "training steps (paper)", low=1, may_change=True)
    lr: float = setting(1e-4, "Adam's learning rate (paper)", low=0.0)
    warmup: int = setting(5000, "steps of linear warm-up (Ho et al.)", low=0)
    decay: float = setting(0.0, "part of the run, at its end, over which lr falls linearly to 0 (none: Ho et al.)", low=0.0, high=1.0)
    clip: float = setting(1.0, "limit of the gradient's norm (Ho et al.)", low=1e-8)
    ema: float = setting(0.9999, "decay of the averaged weights that sampling uses (Ho et al.)", low=0.0, high=1.0)
    seed: int = setting(0, "batch number i depends on (seed, i) alone", low=0)
    # sampling, for the sheets drawn while training and as the default of `sample`
    sample_steps: int = setting(100, "DDIM steps (paper)", low=1, may_change=True)
    guidance: float = setting(2.0, "scale s of classifier-free guidance (paper); 1 is none", low=0.0, may_change=True)
    eta: float = setting(0.0, "0: DDIM as in the paper; 1: ancestral, whose fresh noise corrects errors of a briefly trained network", low=0.0, high=1.0, may_change=True)
    # machinery
    log_every: int = setting(100, "steps between measurements of straightness", low=1, may_change=True)
    save_every: int = setting(2000, "steps between checkpoints", low=1, may_change=True)
    sheet_every: int = setting(10_000, "steps between sheets of samples; 0: only at the end", low=0, may_change=True)
    device: str = setting("auto", "cpu, cuda, ...; auto: the GPU if there is one", may_change=True)
    precision: str = setting("auto", "of the network; losses stay float32. auto: bfloat16 on a GPU or CPU with units for it (AMX)", choices=("auto", "float32", "bfloat16"), may_change=True)
    compile: str = setting("auto", "torch.compile; auto: on a GPU", choices=("auto", "on", "off"), may_change=True)


# Small enough for two cores and a few minutes: 32x32 images, 1.1 M parameters.
SMALL = dict(size=32, ch=32, ch_mult=(1, 2, 2), blocks=1, attention=(8,), groups=2, dropout=0.0, batch=8, steps=1600, lr=2e-3,
             warmup=100, decay=0.5, ema=0.999, sample_steps=50, guidance=1.0, eta=1.0, log_every=100, save_every=200,
             sheet_every=800)


# --------------------------------------------------------------------- forward process (Eq. 1)


def alpha_bars(config: Config) -> Tensor:
    """alpha_bar_t = alpha_1 ... alpha_t for t = 0..T: (T+1,) float64, with alpha_bar_0 = 1.

    alpha_t = 1 - beta_t and beta_t = (beta_T - beta_1) (t - 1) / (T - 1) + beta_1 (below Eq. 1).
    """
    beta = torch.linspace(config.beta_1, config.beta_T, config.timesteps, dtype=torch.float64)
    return torch.cat([beta.new_ones(1), (1 - beta).cumprod(0)])


def q_sample(x_0: Tensor, t: Tensor, eps: Tensor, alpha_bar: Tensor) -> Tensor:
    """x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) eps: Eq. 1 applied t times.

    x_0, eps: (B, ...); t: (B,) long in 0..T; alpha_bar: (T+1,). At t = 0 it is x_0.
    """
    abar_t = alpha_bar[t].view(-1, *[1] * (x_0.dim() - 1))
    return abar_t.sqrt().to(x_0.dtype) * x_0 + (1 - abar_t).sqrt().to(x_0.dtype) * eps


# ----------------------------------------------------------------------- losses (Eqs. 3 to 8)


def dm_loss(eps: Tensor, eps_hat: Tensor) -> Tensor:
    """L_DM of Eq. 3 as the mean over the entries of each image: (B, ...) -> (B,) float32."""
    return (eps - eps_hat).float().square().flatten(1).mean(1)


def noise_distance(a: Tensor, b: Tensor, distance: str = "euclidean") -> Tensor:
    """d(a, b) of Eq. 6 between noise estimates: (G, ...) and (G, ...) -> (G,).

    `euclidean` is the root mean square of a - b, `squared` its mean square, the norm printed in Eq. 6.
    Both are means over the D entries, not sums, and so is L_DM. With `euclidean`, that divides L_DM and
    L_ordinal by D alike: Eq. 8 keeps its balance, at any image size. With `squared` it divides L_ordinal
    by D^2: the balance as printed takes --ordinal D (12,288 at 64x64).
    """
    difference = (a - b).flatten(1)
    if distance == "squared":
        return difference.square().mean(1)
    return torch.linalg.vector_norm(difference, dim=1) / math.sqrt(difference.shape[1])  # its gradient at 0 is 0, not nan


def ladder_distances(eps_hat: Tensor, distance: str) -> dict[tuple[int, int], Tensor]:
    """d of every pair of places p < q among the K of each ladder: eps_hat (G, K, ...) -> {(p, q): (G,)}."""
    eps_hat = eps_hat.to(torch.promote_types(eps_hat.dtype, torch.float32))  # also under bfloat16 autocast
    pairs = itertools.combinations(range(eps_hat.shape[1]), 2)
    return {(p, q): noise_distance(eps_hat[:, p], eps_hat[:, q], distance) for p, q in pairs}


def ordinal_loss(eps_hat: Tensor, distance: str = "euclidean", severity: Tensor | None = None) -> Tensor:
    """L_ordinal of Eq. 5, the mean over all triplets p < q < r of each ladder: (G, K, ...) -> (G,).

    eps_hat holds K >= 3 noise estimates of one x_t (or of one noise) in ascending severity. Zero when
    they lie on a line, in order (Eqs. 4 and 7), by the triangle inequality; that is true of
    distance="euclidean". With "squared", Eq. 6 as printed, d(p,r) - d(p,q) - d(q,r) = 2 <p-q, q-r>,
    which is zero where the angle at q is a right angle instead.

    severity (G, K): the severities of the K classes. If given, the class distances are respected too
    (`--spacing`, the paper's first future work): d(p,q) and d(q,r) should be the shares (q-p)/(r-p)
    and (r-q)/(r-p) of d(p,r), which fixes alpha = (r-q)/(r-p) in Eq. 7.
    """
    if eps_hat.shape[1] < 3:
        raise ValueError(f"a ladder needs 3 classes or more, got {eps_hat.shape[1]}")
    d = ladder_distances(eps_hat, distance)
    losses = []
    for p, q, r in itertools.combinations(range(eps_hat.shape[1]), 3):
        if severity is None:
            losses.append((d[p, r] - (d[p, q] + d[q, r])).square())
        else:
            share = (severity[:, q] - severity[:, p]) / (severity[:, r] - severity[:, p])
            losses.append((share * d[p, r] - d[p, q]).square() + ((1 - share) * d[p, r] - d[q, r]).square())
    return torch.stack(losses).mean(0)


def straightness(eps_hat: Tensor) -> Tensor:
    """d(p,r) / (d(p,q) + d(q,r)), Euclidean, the mean over triplets: (G, K, ...) -> (G,) in [0, 1].

    1 when the estimates lie on a line in order (Eq. 7); 0.5 for an equilateral triangle. Estimates that coincide
    count as 1, so read it beside the gap d(first, last): a network that ignores the class is straight too.
    """
    d = ladder_distances(eps_hat, "euclidean")
    ratios = []
    for p, q, r in itertools.combinations(range(eps_hat.shape[1]), 3):
        path = d[p, q] + d[q, r]
        ratios.append(torch.where(path > 0, d[p, r] / path, 1.0))
    return torch.stack(ratios).mean(0)


@dataclass
class Batch:
    """A training step's B images, the R >= B rows of the network that show them, and G ladders of K rows."""

    index: Tensor  # (B,) images of the data set
    flip: Tensor  # (B,) which of them are mirrored
    noise_index: Tensor  # (B,) which eps of the step each takes: all images of an `images` ladder take one
    t: Tensor  # (B,) timesteps 1..T
    weight: Tensor  # (B,) weights in L_DM, 1/B each or for --balance
    row_image: Tensor  # (R,) which of the B images each row shows; the first B rows show each once
    row_label: Tensor  # (R,) the class each row is shown under, C being the null class
    row_mask: Tensor  # (R,) which dropout mask of the step each row takes: its image's
    ladder: Tensor  # (G, K) rows, in ascending severity; G = 0 for the plain diffusion model
    ladder_weight: Tensor  # (G,) weights in L_ordinal: 0 where a ladder holds the null class, else even
    severity: Tensor  # (G, K) of the classes in a ladder

    def to(self, device) -> Batch:
        return Batch(**{k: v.to(device, non_blocking=True) for k, v in vars(self).items()})


def total_loss(model: Callable, x_0: Tensor, eps: Tensor, batch: Batch, alpha_bar: Tensor, config: Config) -> tuple[Tensor, ...]:
    """L_total = L_DM + W lambda_t L_ordinal of Eq. 8, lambda_t = t / T: scalars (L_total, L_DM, lambda_t L_ordinal).

    One forward pass serves both losses. Its first B rows are the B noised images, each under its own
    label: L_DM reads those. The rows of `batch.ladder` (G, K) form the ladders that L_ordinal reads: one
    x_t under K labels (`--ladder labels`, our reading of Fig. 2), or x_{t,p}, x_{t,q}, x_{t,r} of K images with
    one eps and one t (`--ladder images`, as Eqs. 4 to 7 are printed).
    """
    x_t = q_sample(x_0, batch.t, eps, alpha_bar)
    row_t = batch.t[batch.row_image]
    eps_hat = model(x_t[batch.row_image], row_t, batch.row_label, batch.row_mask)
    dm = (batch.weight * dm_loss(eps, eps_hat[: len(eps)])).sum()
    if not len(batch.ladder):
        return dm, dm, torch.zeros_like(dm)
    lambda_t = row_t[batch.ladder[:, 0]] / config.timesteps  # (G,): a ladder has one t
    severity = batch.severity if config.spacing else None
    ordinal = ordinal_loss(eps_hat[batch.ladder], config.distance, severity)
    ordinal = (batch.ladder_weight * lambda_t * ordinal).sum()
    return dm + config.ordinal * ordinal, dm, ordinal


# ------------------------------------------------ sampling: guidance and DDIM (Eq. 2, Eq. 7)


def guided_eps(model: Callable, x_t: Tensor, t: Tensor, severity: Tensor, scale: float) -> Tensor:
    """The noise estimate of a severity, with classifier-free guidance: (B, 3, H, W).

    severity: (B,) float in 0..C-1, a class index or a point between two: 1.5 is 0.5 eps_1 + 0.5 eps_2, on the line of
    Eq. 7. Keep it on the CPU: it decides which classes are evaluated, in one batch with the null class (unless s = 1).
    eps = eps_null + s (eps_c - eps_null) = s eps_c + (1 - s) eps_null; s = 1 is the conditional model, s = 0
    the unconditional one (Ho & Salimans write w = s - 1). If the classes lie evenly on a line and eps_null at their
    mean m, that is the estimate of m + s (c - m): s > 1 moves each class away from m, severe ones come out too severe.
    """
    share = severity - severity.floor()
    terms = [(severity.floor(), scale * (1 - share)), (severity.ceil(), scale * share),
             (torch.full_like(severity, model.num_classes), torch.full_like(severity, 1 - scale))]  # the null class
    terms = [(label, weight) for label, weight in terms if weight.any()]  # the network is asked for these alone
    labels = torch.cat([label for label, _ in terms]).long().to(x_t.device)
    weights = torch.stack([weight for _, weight in terms]).to(x_t).view(len(terms), -1, 1, 1, 1)
    eps = model(x_t.repeat(len(terms), 1, 1, 1), t.repeat(len(terms)), labels).float().unflatten(0, (len(terms), -1))
    return (weights * eps).sum(0)


def ddim_sample(eps_fn: Callable, x_T: Tensor, alpha_bar: Tensor, steps: int, eta: float = 0.0, clip: bool = True,
                noise: Callable = torch.randn_like) -> Tensor:
    """Draw x_0 from x_T by DDIM (Song et al. 2021, Eq. 12): (B, ...) -> (B, ...).

    eps_fn(x_t, t) estimates the noise, t: (B,) long. `steps` of 1..T, evenly spaced, the first at t = T,
    the last landing at t = 0 where alpha_bar = 1. eta = 0 is deterministic. `clip` keeps the estimate of x_0
    in [-1, 1]. noise(x) draws z, where eta > 0.

    eta = 1, steps = T, clip = False is Eq. 2 but for two things. Its denominator reads sqrt(1 - alpha_t), a misprint
    of sqrt(1 - alpha_bar_t). And sigma_t^2, there beta_t, is the variance of the posterior,
    beta_t (1 - alpha_bar_{t-1}) / (1 - alpha_bar_t).
    """
    times = torch.linspace(len(alpha_bar) - 1, 0, steps + 1).round().long().tolist()
    x = x_T
    for t, u in zip(times[:-1], times[1:]):  # from x_t to x_u, u < t
        abar_t, abar_u = alpha_bar[t].item(), alpha_bar[u].item()
        eps = eps_fn(x, torch.full((len(x),), t, device=x.device))
        x_0 = (x - math.sqrt(1 - abar_t) * eps) / math.sqrt(abar_t)
        if clip:
            x_0 = x_0.clamp(-1, 1)
            eps = (x - math.sqrt(abar_t) * x_0) / math.sqrt(1 - abar_t)
        sigma = eta * math.sqrt((1 - abar_u) / (1 - abar_t) * (1 - abar_t / abar_u))
        x = math.sqrt(abar_u) * x_0 + math.sqrt(max(1 - abar_u - sigma**2, 0)) * eps
        if sigma > 0:
            x = x + sigma * noise(x)
    return x


# ----------------------------- U-Net of Ho et al. (2020), as published, with a class embedding


NEARLY_ZERO = 1e-5  # gain of the last layer of each residual branch (Ho et al.: a variance scale of 1e-10)


def glorot(layer: nn.Module, gain: float = 1.0) -> nn.Module:
    """Glorot-uniform weights and zero biases."""
    nn.init.xavier_uniform_(layer.weight, gain)
    nn.init.zeros_(layer.bias)
    return layer


class MainConv(nn.Conv2d):
    """A convolution outside the residual branches (conv_in, down, up, shortcut, conv_out), float32 even under bfloat16 autocast.

    bfloat16 rounds estimates of size 1 by 0.003, and the ordinal loss reads differences of 0.002 to 0.02 between
    them. Within the branches it rounds relative to what they add, not to the sum: the estimate's error is 0.0005.
    """

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return super().forward(x.float())


def conv(c_in: int, c_out: int, kernel: int = 3, gain: float = 1.0, kind: type = nn.Conv2d) -> nn.Module:
    return glorot(kind(c_in, c_out, kernel, padding=kernel // 2), gain)


def down(channels: int) -> nn.Module:
    """Half the resolution: 3x3 convolution, stride 2, padded at the right and below only."""
    return nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), glorot(MainConv(channels, channels, 3, stride=2)))


def up(channels: int) -> nn.Module:
    """Twice the resolution: nearest neighbour, then a 3x3 convolution."""
    return nn.Sequential(nn.Upsample(scale_factor=2), conv(channels, channels, kind=MainConv))


def norm(channels: int, groups: int) -> nn.Module:
    return nn.GroupNorm(groups, channels, eps=1e-6)


def time_embedding(t: Tensor, ch: int) -> Tensor:
    """[sin, cos] of t at ch/2 frequencies exp(-i ln(10000) / (ch/2 - 1)): (B,) -> (B, ch)."""
    half = ch // 2
    frequency = torch.exp(torch.arange(half, device=t.device) * (-math.log(10000) / (half - 1)))
    angle = t[:, None].float() * frequency
    return torch.cat([angle.sin(), angle.cos()], dim=1)


class Dropout(nn.Module):
    """Dropout whose mask belongs to an image, not to a row of the batch.

    The rows of a ladder that show one image under K labels share its mask: their estimates then differ
    by the class alone, not by the noise of K masks, which no loss could put on a line. The masks of all
    B images are drawn in each of several processes, so that an image's does not depend on their number.
    """

    def __init__(self, p: float, B: int):
        super().__init__()
        self.p, self.B = p, B

    def forward(self, h: Tensor, row_mask: Tensor | None) -> Tensor:
        if not self.training or self.p == 0:
            return h
        masks = torch.rand(len(h) if row_mask is None else self.B, *h.shape[1:], device=h.device) >= self.p
        return h * (masks if row_mask is None else masks[row_mask]) / (1 - self.p)


class Attention(nn.Module):
    """Single-head self-attention over the H*W positions, added to its input."""

    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.norm = norm(channels, groups)
        self.q, self.k, self.v = (conv(channels, channels, 1) for _ in range(3))
        self.out = conv(channels, channels, 1, gain=NEARLY_ZERO)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (f(h).flatten(2).transpose(1, 2).unsqueeze(1) for f in (self.q, self.k, self.v))  # (B, 1, HW, C)
        h = F.scaled_dot_product_attention(q, k, v)  # softmax(q k' C^-0.5) v
        return x + self.out(h.squeeze(1).transpose(1, 2).reshape(x.shape))


class Block(nn.Module):
    """norm, swish, conv; add the embedding; norm, swish, dropout, conv; add the input; then attention."""

    def __init__(self, c_in: int, c_out: int, c_emb: int, groups: int, dropout: Dropout, attention: bool):
        super().__init__()
        self.norm1, self.conv1 = norm(c_in, groups), conv(c_in, c_out)
        self.emb = glorot(nn.Linear(c_emb, c_out))
        self.norm2, self.conv2 = norm(c_out, groups), conv(c_out, c_out, gain=NEARLY_ZERO)
        self.dropout = dropout
        self.shortcut = conv(c_in, c_out, 1, kind=MainConv) if c_in != c_out else nn.Identity()
        self.attention = Attention(c_out, groups) if attention else nn.Identity()

    def forward(self, x: Tensor, emb: Tensor, row_mask: Tensor | None) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = h + self.emb(F.silu(emb))[:, :, None, None]
        h = self.conv2(self.dropout(F.silu(self.norm2(h)), row_mask))
        return self.attention(self.shortcut(x) + h)


class UNet(nn.Module):
    """eps_theta(x_t, t, c). With the paper's settings: 35,746,307 parameters plus the class embedding."""

    def __init__(self, config: Config, num_classes: int):
        super().__init__()
        ch, c_emb, side = config.ch, 4 * config.ch, config.size

        def block(c_in: int, c_out: int, attention: bool) -> Block:
            return Block(c_in, c_out, c_emb, config.groups, Dropout(config.dropout, config.batch), attention)

        self.ch, self.num_classes = ch, num_classes
        self.time = nn.Sequential(glorot(nn.Linear(ch, c_emb)), nn.SiLU(), glorot(nn.Linear(c_emb, c_emb)))
        self.label = nn.Embedding(num_classes + 1, c_emb)  # the last row is the null class
        self.conv_in = conv(3, ch, kind=MainConv)
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        c, skips = ch, [ch]
        for level, mult in enumerate(config.ch_mult):
            for _ in range(config.blocks):
                self.down.append(block(c, mult * ch, side in config.attention))
                c = mult * ch
                skips.append(c)
            if level < len(config.ch_mult) - 1:
                self.down.append(down(c))
                skips.append(c)
                side //= 2
        self.middle = nn.ModuleList([block(c, c, True), block(c, c, False)])
        for level, mult in reversed(list(enumerate(config.ch_mult))):
            for _ in range(config.blocks + 1):
                self.up.append(block(c + skips.pop(), mult * ch, side in config.attention))
                c = mult * ch
            if level > 0:
                self.up.append(up(c))
                side *= 2
        self.norm_out, self.conv_out = norm(c, config.groups), conv(c, 3, gain=NEARLY_ZERO, kind=MainConv)

    def forward(self, x_t: Tensor, t: Tensor, c: Tensor, row_mask: Tensor | None = None) -> Tensor:
        """x_t (B, 3, H, W), t (B,) long in 1..T, c (B,) long in 0..C, C being the null class -> (B, 3, H, W).

        row_mask (B,) long: which dropout mask each row takes (see Dropout; none: each its own).
        """
        emb = self.time(time_embedding(t, self.ch)) + self.label(c)
        h = self.conv_in(x_t)
        skips = [h]
        for layer in self.down:
            h = layer(h, emb, row_mask) if isinstance(layer, Block) else layer(h)
            skips.append(h)
        for block in self.middle:
            h = block(h, emb, row_mask)
        for layer in self.up:
            h = layer(torch.cat([h, skips.pop()], dim=1), emb, row_mask) if isinstance(layer, Block) else layer(h)
        return self.conv_out(F.silu(self.norm_out(h)))


# -------------------------------------------------------------------------------------- data

SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"}
MAX_PIXELS = 100_000_000
Image.MAX_IMAGE_PIXELS = None  # read_image has a limit of its own, the same for every format


def list_images(root: str | Path) -> list[Path]:
    """Image files anywhere below root, sorted; hidden files, other files and linked folders are passed over."""
    found = []
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = [s for s in subfolders if not s.startswith(".") and s != "__MACOSX"]
        found += [Path(folder, f) for f in files if Path(f).suffix.lower() in SUFFIXES and not f.startswith(".")]
    return sorted(found)


def read_image(path: str | Path) -> Image.Image:
    """An image file as RGB: turned upright (EXIF), alpha on black, 16 bits scaled to 8, first frame."""
    try:
        with Image.open(path) as image:
            if image.width * image.height > MAX_PIXELS:
                raise ValueError(f"{image.width}x{image.height} pixels, more than {MAX_PIXELS:,}")
            sixteen_bits = image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG")
            if image.mode in ("I", "F") and not sixteen_bits:
                raise ValueError("pixels of 32 bits have no known range; save it with 8 or 16")
            image = ImageOps.exif_transpose(image)
            if sixteen_bits:  # converting to RGB would clip it
                image = Image.fromarray((np.asarray(image, np.float64) / 257).round().astype(np.uint8))
            if image.has_transparency_data:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "black"), image)
            return image.convert("RGB")
    except Exception as error:  # Pillow's decoders raise many kinds on damaged files
        raise UserError(f"{path}: not readable as an image ({first_line(error)}); repair or remove it") from None


def to_square(image: Image.Image, size: int, crop: int) -> np.ndarray:
    """The middle crop x crop pixels, resized: (3, size, size) uint8. crop = 0: see Config."""
    side = crop or (128 if image.size == (352, 288) else min(image.size))  # Section 4.1.1
    left, top = (image.width - side) // 2, (image.height - side) // 2
    image = image.resize((size, size), Image.Resampling.BICUBIC, box=(left, top, left + side, top + side))
    return np.asarray(image).transpose(2, 0, 1)


NUMBER = r"\d+(?:\.\d+)?"


def number_in(name: str) -> float | None:
    """The number in a class name ("Mayo 2" -> 2); None where there is none, or more than one."""
    numbers = re.findall(NUMBER, name)
    return float(numbers[0]) if len(numbers) == 1 else None


def check_name(name: str) -> None:
    """Samples are written to a folder of the class's name: it must be one, and never a path."""
    if not name.strip(" .") or re.search(r'[/\\:*?"<>|\x00-\x1f]', name):
        raise UserError(f"class name {name!r} cannot be the name of a folder: rename it")


def rank_classes(found: set[str], order: str = "") -> dict[str, float]:
    """{class name: severity} in ascending severity, by --order or by the number in each name."""
    hint = "pass --order with the names in ascending severity, separated by commas"
    for name in found:
        check_name(name)
    if order:
        names = [name.strip() for name in order.split(",")]
        if set(names) != found or len(names) != len(found):
            raise UserError(f"--order {order}: the data's classes are {', '.join(sorted(found))}; name each of them once")
        return {name: float(i) for i, name in enumerate(names)}
    severity = {name: number_in(name) for name in found}
    for name, number in sorted(severity.items()):
        if number is None:
            raise UserError(f"class {name!r} has no order that a program may guess (found: {', '.join(sorted(found))}): {hint}")
        if list(severity.values()).count(number) > 1:
            same = sorted(n for n in found if severity[n] == number)
            raise UserError(f"classes {' and '.join(map(repr, same))} have the same number: {hint}, or rename one")
    return dict(sorted(severity.items(), key=lambda item: item[1]))


def labels_from_csv(root: Path, paths: list[Path]) -> tuple[list[tuple[Path, str]], list[str]] | None:
    """(path, class) from all CSV files with columns image, level, as EyePACS has; None where there is no such file."""
    level_of, files, odd = {}, [], 0
    for file in sorted(root.rglob("*.csv")):
        try:
            with open(file, newline="", encoding="utf-8-sig", errors="replace") as stream:
                rows = list(csv.reader(stream))
        except (OSError, csv.Error):  # a folder of that name, or no table
            continue
        header = [column.strip().lower() for column in rows[0]] if rows else []
        if not {"image", "level"} <= set(header):
            continue
        files.append(file.name)
        image_at, level_at = header.index("image"), header.index("level")
        for row in rows[1:]:
            if len(row) != len(header):
                odd += bool(row)
                continue
            image, level = row[image_at].strip(), row[level_at].strip()
            stem = Path(image).stem if Path(image).suffix.lower() in SUFFIXES else image
            if level_of.setdefault(stem, level) != level:
                raise UserError(f"{file}: gives {image} the level {level}, and {level_of[stem]} elsewhere; remove one of the two")
    if not files:
        return None
    path_of = {path.stem: path for path in reversed(paths)}
    pairs = [(path_of[stem], level) for stem, level in level_of.items() if stem in path_of]
    if not pairs:
        raise UserError(f"{root}: none of the {len(level_of):,} images that {files[0]} lists is there")
    notes = [f"{' and '.join(files)} lists {len(level_of):,} images, {len(level_of) - len(pairs):,} of them are missing"]
    if odd:
        notes.append(f"{odd:,} rows not as long as the header passed over")
    if len(paths) > len(pairs):
        notes.append(f"{len(paths) - len(pairs):,} other images passed over")
    return pairs, notes


def labels_from_folders(root: Path, paths: list[Path], order: str) -> tuple[list[tuple[Path, str]], list[str]]:
    """(path, class) by parent folder; in a stray subfolder of a class folder, by the class folder.

    Of the folders above an image those count whose name has a number (or is in --order), and of those the
    kind that most images lie directly in: 17/Mayo 2/copy (1)/a.bmp is a "Mayo #", as are nearly all others, not a
    "#" (the patient) nor a "copy (#)".
    """
    named = {name.strip() for name in order.split(",")} - {""}

    def kind(folder: Path) -> str | None:
        if named:
            return "named" if folder.name in named else None
        return re.sub(NUMBER, "#", folder.name) if number_in(folder.name) is not None else None

    images_in = Counter(kind(path.parent) for path in paths)
    pairs, seen, loose, copies = [], {}, 0, 0
    for path in paths:
        above = [folder for folder in path.parents if root in folder.parents]  # nearest first
        if not above:
            loose += 1
            continue
        folder = max((f for f in above if kind(f)), key=lambda f: images_in[kind(f)], default=above[0])
        earlier = seen.setdefault((folder.name, path.name), path)
        if earlier is not path and filecmp.cmp(earlier, path, shallow=False):
            copies += 1
        else:
            pairs.append((path, folder.name))
    notes = []
    if copies:
        notes.append(f"{copies:,} files that are there twice (same class, name and content) taken once")
    if loose:
        notes.append(f"{loose:,} images outside any class folder passed over")
    return pairs, notes


def find_images(root: str | Path, order: str = "") -> tuple[list[Path], list[int], list[str], list[str]]:
    """Paths, class index of each, class names in ascending severity, and remarks on what was left out."""
    root = Path(root)
    if not root.is_dir():
        raise UserError(f"{root}: no such folder (data/README.md says how to get the data sets)")
    root = root.resolve()
    paths = list_images(root)
    if not paths:
        raise UserError(f"{root}: no images in it ({', '.join(sorted(SUFFIXES))})")
    pairs, notes = labels_from_csv(root, paths) or labels_from_folders(root, paths, order)
    if not pairs:
        raise UserError(f"{root}: no image has a class; put each in a folder named after its class, as data/README.md shows")
    severity = rank_classes({name for _, name in pairs}, order)
    if len(severity) < 2:
        raise UserError(f"{root}: one class only ({', '.join(severity)}); name the folder that holds all class folders")
    index = {name: i for i, name in enumerate(severity)}
    return [path for path, _ in pairs], [index[name] for _, name in pairs], list(severity), notes


def load_images(root: str | Path, size: int = 64, crop: int = 0, order: str = "", say: Callable = lambda line, over=False: None):
    """Graded images as (uint8 (N, 3, size, size), labels long (N,), class names in ascending severity).

    Reads LIMUC, EyePACS and any tree of class folders as distributed (data/README.md); an image's class
    is its parent folder's name, or its level in a CSV. Raises UserError naming the file or flag.
    """
    paths, labels, names, notes = find_images(root, order)

    def load(path: Path) -> np.ndarray | UserError:
        try:
            image = read_image(path)
            if crop > min(image.size):
                raise UserError(f"--crop {crop}: {path} has only {image.width}x{image.height} pixels")
            return to_square(image, size, crop)
        except UserError as error:
            return error

    say("; ".join([f"{root}: " + ", ".join(f"{name} {labels.count(i):,}" for i, name in enumerate(names)), *notes]))
    with ThreadPoolExecutor() as pool, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's, on odd metadata
        loaded = []
        for item in pool.map(load, paths):
            loaded.append(item)
            if len(loaded) % 1000 == 0:
                say(f"{len(loaded):,}/{len(paths):,} images read", over=True)
    if errors := [item for item in loaded if isinstance(item, UserError)]:
        raise UserError(str(errors[0]) + (f" (and {len(errors) - 1} more such files)" if len(errors) > 1 else ""))
    return torch.from_numpy(np.stack(loaded)), torch.tensor(labels), names


# ---------------------------------------------------------------------------------- training


@dataclass
class Classes:
    """The ordered classes of a run: names in ascending severity, their severities, images of each."""

    names: list[str]
    severities: list[float]
    counts: list[int]


class Batches:
    """Batch number `step` is a function of (seed, step): a resumed run needs no loader state."""

    def __init__(self, config: Config, labels: Tensor, severities: Sequence[float]):
        self.config, self.labels, self.severities = config, labels.cpu(), torch.tensor(severities)
        self.count = self.labels.bincount(minlength=len(severities))
        self.by_class = self.labels.argsort(stable=True)
        self.start = self.count.cumsum(0) - self.count
        self.K = min(config.rungs or len(severities), len(severities))
        self.with_ladders = config.ordinal > 0 and len(severities) >= 3

    def pick(self, c: Tensor, rng: torch.Generator) -> Tensor:
        """A random image of each class in c: (B,) -> (B,)."""
        u = torch.rand(len(c), generator=rng, dtype=torch.float64)
        return self.by_class[self.start[c] + (u * self.count[c]).long()]

    def draw(self, step: int) -> Batch:
        config, B, C = self.config, self.config.batch, len(self.severities)
        rng = torch.Generator().manual_seed(seed_of("batch", config.seed, step))
        if config.balance == "uniform":
            index = self.pick(torch.randint(C, (B,), generator=rng), rng)
        else:
            index = torch.randint(len(self.labels), (B,), generator=rng)
        flip = (torch.rand(B, generator=rng) < 0.5) & config.flip
        t = torch.randint(1, config.timesteps + 1, (B,), generator=rng)
        dropped = torch.rand(B, generator=rng) < config.class_dropout  # a coin for each image
        none = torch.zeros(0, self.K, dtype=torch.long)
        each = torch.arange(B)
        batch = Batch(index, flip, noise_index=each, t=t, weight=torch.full((B,), 1 / B), row_image=each, row_label=self.labels[index],
                      row_mask=each, ladder=none, ladder_weight=none[:, 0], severity=none)
        if self.with_ladders:
            classes = (self.add_ladders_of_images if config.ladder == "images" else self.add_ladders_of_labels)(batch, rng)
            batch.severity = self.severities[classes]
        batch.row_label[:B][dropped] = C
        whole = (batch.row_label[batch.ladder] < C).all(1)
        batch.ladder_weight = whole / whole.sum().clamp(min=1)
        return batch

    def add_ladders_of_images(self, batch: Batch, rng: torch.Generator) -> Tensor:
        """K images of K classes with one noise and one t; L_DM is read off each of them. Returns the classes (G, K).

        Images 0..K-1 become those of the first ladder, K..2K-1 those of the second, ...
        """
        C, K = len(self.severities), self.K
        G = self.config.batch // K
        classes = torch.rand(G, C, generator=rng).argsort(1)[:, :K].sort(1).values  # K different ones, ascending
        batch.ladder = torch.arange(G * K).view(G, K)
        batch.index[: G * K] = self.pick(classes.flatten(), rng)
        batch.row_label = self.labels[batch.index]
        batch.noise_index = torch.cat([batch.ladder[:, :1].expand(G, K).flatten(), batch.noise_index[G * K :]])  # all take the first one's
        batch.t = batch.t[batch.noise_index]
        if self.config.balance == "data":  # classes were drawn evenly: weight them back to their frequency
            batch.weight[: G * K] *= C * self.count[classes.flatten()] / len(self.labels)
        return classes

    def add_ladders_of_labels(self, batch: Batch, rng: torch.Generator) -> Tensor:
        """One image under its own label, in its row for L_DM, and under K - 1 others, in new rows. Returns the classes (G, K)."""
        B, C, K, part = self.config.batch, len(self.severities), self.K, self.config.ladder_part
        place = torch.arange(B + 1, dtype=torch.float64)
        shown = (place * part).long().diff().nonzero().flatten()  # spread evenly, so that every process gets its share
        G, own = len(shown), self.labels[batch.index[shown]][:, None]
        key = torch.rand(G, C, generator=rng).scatter(1, own, -1.0)  # classes in random order, but its own comes first
        classes = key.argsort(1)[:, :K].sort(1).values
        new = classes != own
        batch.ladder = shown[:, None].repeat(1, K)
        batch.ladder[new] = B + torch.arange(G * (K - 1))
        batch.row_image = batch.row_mask = torch.cat([batch.row_image, shown.repeat_interleave(K - 1)])
        batch.row_label = torch.cat([batch.row_label, classes[new]])
        return classes


def seed_of(purpose: str, *numbers: int) -> int:
    """One seed from a purpose and numbers: different keys give unrelated seeds."""
    return int.from_bytes(hashlib.sha256(repr((purpose, *numbers)).encode()).digest()[:8], "big") >> 1


def to_unit(images: Tensor) -> Tensor:
    """uint8 0..255 -> float -1..1."""
    return images.float() / 127.5 - 1


def to_uint8(x: Tensor) -> Tensor:
    """float -1..1 -> uint8 0..255, rounded to the nearest: the inverse of to_unit."""
    return ((x + 1) * 127.5).round().clamp(0, 255).byte()


@torch.no_grad()
def ema_update(ema: nn.Module, model: nn.Module, decay: float, n: int) -> None:
    """ema <- m ema + (1 - m) model after step n = 1, 2, ..., with m = min(decay, (1 + n) / (10 + n)).

    The ramp keeps a short run's average from holding the initial weights.
    """
    m = min(decay, (1 + n) / (10 + n))
    torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - m)


@torch.no_grad()
def measure_ladder(model: UNet, images: Tensor, alpha_bar: Tensor, n: int = 16) -> tuple[float, float]:
    """(straightness, gap d(lowest, highest)): n images, each at its own t in 1..T, under every class.

    images: (N, 3, H, W) uint8. The same images, t and noise at every call, so that numbers compare.
    """
    device, C, rng = images.device, model.num_classes, torch.Generator().manual_seed(0)
    x_0 = to_unit(images[torch.randint(len(images), (n,), generator=rng).to(device)])
    t = torch.linspace(1, len(alpha_bar) - 1, n).round().long().to(device)
    eps = torch.randn(x_0.shape, generator=rng).to(device)
    x_t = q_sample(x_0, t, eps, alpha_bar)
    eps_hat = torch.stack([model(x_t, t, torch.full_like(t, c)) for c in range(C)], dim=1)
    gap = ladder_distances(eps_hat, "euclidean")[0, C - 1].mean().item()
    return (straightness(eps_hat).mean().item() if C >= 3 else math.nan), gap


def learning_rate(config: Config, step: int) -> float:
    """Of step 0, 1, ...: rising linearly over the warm-up, then constant, falling linearly to 0 over the part `decay`."""
    rising = (step + 1) / max(config.warmup, 1)
    falling = (config.steps - step) / max(config.decay * config.steps, 1)
    return config.lr * min(1, rising, falling)


def training_step(net: Network, ema: UNet, optimizer, images: Tensor, batch: Batch, alpha_bar: Tensor, config: Config,
                  step: int, world: int = 1) -> Tensor:
    """One step of Adam on Eq. 8, on one of `world` parts of a batch. Returns (4,): L_total, L_DM, lambda_t L_ordinal, gradient norm."""
    x_0 = to_unit(images[batch.index]).to(memory_format=torch.channels_last)
    x_0 = torch.where(batch.flip.view(-1, 1, 1, 1), x_0.flip(-1), x_0)
    torch.manual_seed(seed_of("eps", config.seed, step))  # eps and dropout masks are drawn whole in every process
    eps = torch.randn(config.batch, *x_0.shape[1:], device=x_0.device)[batch.noise_index]
    losses = total_loss(net, x_0, eps, batch, alpha_bar, config)
    optimizer.zero_grad()
    losses[0].backward()
    losses, parameters = torch.stack(losses).detach(), list(net.module.parameters())
    if world > 1:
        add_up([losses, *(p.grad for p in parameters)])
    grad_norm = nn.utils.clip_grad_norm_(parameters, config.clip)
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(config, step)
    optimizer.step()
    ema_update(ema, net.module, config.ema, step + 1)
    return torch.cat([losses, grad_norm[None]])


def train(config: Config) -> Path:
    """Train, or resume, the run in config.out and return that folder: checkpoint.pt, metrics.csv, sheets.

    Under torchrun the batch is divided among the processes: the losses equal those of one process, to rounding.
    """
    check_config(config)
    device, rank, world = start(config.device)
    root = Path(config.data) if config.data else HERE / "data" / "demo"
    out = Path(config.out) if config.out else Path("runs") / root.resolve().name
    if not config.data and rank == 0:
        draw_demo(root)
    images, labels, names = from_first(partial(load_images, root, config.size, config.crop, config.order, say))
    classes = Classes(names, list(rank_classes(set(names), config.order).values()), labels.bincount().tolist())
    if config.ordinal > 0 and len(names) < 3:
        say("two classes only: no triplet p < q < r, so the ordinal loss is off and this is the plain diffusion model")

    torch.manual_seed(seed_of("weights", config.seed))
    model = UNet(config, len(names)).to(device, memory_format=torch.channels_last)
    ema = copy.deepcopy(model).eval().requires_grad_(False)
    optimizer = torch.optim.Adam(model.parameters(), lr=config.lr, fused=True)
    n_parameters = sum(p.numel() for p in model.parameters())
    space = 16 * n_parameters  # 4 bytes each for the weights, their average and Adam's two moments
    lock = lock_folder(out, space) if rank == 0 else None  # held as long as this variable
    step = resume(out / "checkpoint.pt", config, classes, model, ema, optimizer)
    if step != (other := least(step, device, world)):
        raise UserError(f"{out}: one process finds step {step:,} there, another {other:,}; it must be one folder, seen by all")
    if step >= config.steps:
        say(f"{out}: trained to step {step:,} already; a higher --steps goes on")
        return out
    log = Log(out / "metrics.csv", step, config) if rank == 0 else None
    say(f"{out}: {n_parameters:,} parameters on {device}" + (f" x {world}" if world > 1 else "")
        + f", step {step:,} of {config.steps:,}" + (" (resumed)" if step else ""))

    images, alpha_bar = images.to(device), alpha_bars(config).to(device)
    batches, net = Batches(config, labels, classes.severities), Network(model, config, device)
    first = batches.draw(0)
    if first.noise_index.unique().numel() < world:  # images that share a noise stay in one process
        raise UserError(f"--batch {config.batch}: too few images to divide among {world} processes; raise it or start fewer")
    if batches.with_ladders and not len(first.ladder):
        raise UserError(f"--batch {config.batch}: has no room for a ladder of {batches.K} {config.ladder}; raise it (or --ladder-part), or pass --ordinal 0")
    model.train()
    with StopSignals() as signals:
        done = False
        while not done:
            batch = part_of(batches.draw(step), rank, world).to(device)
            losses = training_step(net, ema, optimizer, images, batch, alpha_bar, config, step, world)
            step += 1
            done = step == config.steps or signals.agreed(step, device, world)
            if rank > 0:
                continue

            # Only the first process gets here: measuring, saving, drawing.
            due = step % config.log_every == 0 or step == config.steps
            log.add(step, losses, measure_ladder(ema, images, alpha_bar) if due else ())
            if step % config.save_every == 0 or done:
                log.flush()  # before saving: it raises where a loss is not finite
                save_checkpoint(out / "checkpoint.pt", config, classes, model, ema, optimizer, step)
            if step == config.steps or (config.sheet_every and step % config.sheet_every == 0):
                sheet = draw_sheet(Network(ema, replace(config, compile="off"), device), classes, config)
                for path in (out / "sheets" / f"{step:06d}.png", out / "sheet.png"):
                    write_file(path, partial(sheet.save, format="PNG"))
        wait_for_all()  # until the first process has saved
    if step < config.steps:
        say(f"{out}: stopped and saved at step {step:,}; the same command goes on from there")
        raise Stopped(signals.number)
    say(f"{out}: trained to step {step:,}; {out / 'sheet.png'} shows samples")
    return out


class Log:
    """metrics.csv, a row a step, and the progress line. Values stay on the device until they are written."""

    COLUMNS = ("step", "loss", "dm", "ordinal", "grad_norm", "straightness", "gap")

    def __init__(self, path: Path, step: int, config: Config):
        self.path, self.config, self.pending = path, config, []
        self.begun_at, self.begun_step = time.monotonic(), step
        rows = [self.COLUMNS]
        if step and path.exists():  # rows that an interrupted run wrote after its last checkpoint go
            with open(path, newline="") as file:
                rows += [r for r in csv.reader(file) if len(r) == len(rows[0]) and r[0].isdigit() and int(r[0]) <= step]
        write_file(path, lambda f: f.write("".join(",".join(r) + "\n" for r in rows).encode()))

    def add(self, step: int, values: Tensor, measured: Sequence[float] = ()) -> None:
        """values: (4,) L_total, L_DM, lambda_t L_ordinal, gradient norm; measured: straightness and gap, after some steps."""
        self.pending.append((step, values, measured))
        if measured:
            (straight, gap), mean, last = measured, self.flush(), self.config.steps
            rate = (step - self.begun_step) / (time.monotonic() - self.begun_at)
            say(f"step {step:,}/{last:,}  L_DM {mean[1]:.4f}  lambda_t L_ordinal {mean[2]:.6f}  straightness {straight:.3f}  gap {gap:.4f}  "
                f"{rate * self.config.batch:.1f} images/s  {(last - step) / rate / 60:.1f} min left", over=step < last)

    def flush(self) -> np.ndarray:
        """Write the pending rows and return their mean; losses that are not finite end the run before it is saved."""
        if not self.pending:
            return np.zeros(4)
        values = torch.stack([v for _, v, _ in self.pending]).tolist()
        for (step, _, _), row in zip(self.pending, values):
            if not all(map(math.isfinite, row)):
                raise UserError(f"step {step}: the loss is not finite; {self.path.with_name('checkpoint.pt')} holds the last good state, "
                                "if one was saved: train with a lower --lr in another --out")
        try:
            with open(self.path, "a", encoding="utf-8") as file:
                for (step, _, measured), row in zip(self.pending, values):
                    cells = [f"{v:.7g}" for v in row] + ([f"{m:.6g}" for m in measured] or ["", ""])
                    file.write(f"{step}," + ",".join(cells) + "\n")
        except OSError as error:
            raise cannot_write(self.path, error) from None
        self.pending = []
        return np.mean(values, axis=0)


# ------------------------------------------------------------------- the machine: devices, processes


class Network:
    """The network as it is run: under autocast, and compiled. The module itself stays raw: it is saved, averaged, counted."""

    def __init__(self, model: UNet, config: Config, device: torch.device):
        self.module, self.num_classes, self.device, self.run = model, model.num_classes, device, model
        if config.compile == "on" or (config.compile == "auto" and device.type == "cuda"):
            try:
                torch.compile(torch.sin)(torch.zeros(8, device=device))  # is there a compiler at all?
                self.run = torch.compile(model, dynamic=False)  # batches have few shapes: each its own, faster code
            except Exception as error:
                say(f"torch.compile does not work here ({type(error).__name__}); going on without")
        if device.type == "cuda":
            native = torch.cuda.is_bf16_supported(including_emulation=False)
        else:
            keep_freed_memory()
            native = getattr(torch.cpu, "get_capabilities", dict)().get("amx_bf16")  # avx512_bf16 alone is slower than float32
        self.bfloat16 = config.precision == "bfloat16" or (config.precision == "auto" and bool(native))

    def __call__(self, *args) -> Tensor:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bfloat16):
            return self.run(*args).float()


def start(name: str) -> tuple[torch.device, int, int]:
    """(device, rank, world): one process, or one of several under torchrun."""
    rank, world, local = (int(os.environ.get(key, default)) for key, default in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(f"cuda:{local}" if name == "cuda" and world > 1 else name)
        if device.type not in ("cpu", "cuda"):
            raise RuntimeError("cpu and cuda are known here")
        if device.index is not None and device.type == "cuda":
            torch.cuda.set_device(device)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name}: {first_line(error)}") from None
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = True  # all batches have one shape: let it look for the fastest kernels
    if world > 1 and not dist.is_initialized():
        backend, bound = ("nccl", device) if device.type == "cuda" else ("gloo", None)
        dist.init_process_group(backend, timeout=timedelta(hours=2), device_id=bound)
    return device, rank, world


def keep_freed_memory() -> None:
    """glibc gives freed blocks of 32 MB and more back at once; having them anew for each tensor costs up to 40 % of a step."""
    with contextlib.suppress(AttributeError, OSError, TypeError):  # other C libraries
        libc = ctypes.CDLL(None)
        libc.mallopt(-4, 0)  # M_MMAP_MAX: large blocks come from the heap too
        libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD: the heap is never given back


def fitting_batch(config: Config, device: torch.device, world: int) -> int:
    """Images to draw at once: 16 on a CPU; on a GPU the power of two, up to 256, that its free memory holds."""
    if device.type != "cuda":
        return 16
    one = 3 * 4 * 24 * config.ch * config.size**2  # bytes: two classes and none, float32, 24 full maps alive at once
    n = least(torch.cuda.mem_get_info(device)[0] // one, device, world)  # the same in all processes
    return 2 ** int(math.log2(min(max(n, 1), 256)))


def from_first(make: Callable):
    """make() in the first process, its result sent to all: were each to read the images, they would slow each other down."""
    made = [make() if not dist.is_initialized() or dist.get_rank() == 0 else None]
    if dist.is_initialized():
        dist.broadcast_object_list(made)
    return made[0]


def wait_for_all() -> None:
    if dist.is_initialized():
        dist.barrier()


def least(number: int, device: torch.device, world: int) -> int:
    """The smallest of all processes' numbers."""
    if world > 1:
        shared = torch.tensor(number, device=device)
        dist.all_reduce(shared, dist.ReduceOp.MIN)
        number = int(shared)
    return number


def part_of(batch: Batch, rank: int, world: int) -> Batch:
    """The share of one of `world` processes. No ladder is split; weights stay those of the whole."""
    _, group = torch.unique(batch.noise_index, return_inverse=True)  # images that share a noise stay together
    mine = group * world // (group.max() + 1) == rank
    rows = mine[batch.row_image]  # the rows that show my images
    ladders = rows[batch.ladder[:, 0]]
    new_image, new_row = mine.cumsum(0) - 1, rows.cumsum(0) - 1  # old number -> new number
    return Batch(
        index=batch.index[mine], flip=batch.flip[mine], noise_index=batch.noise_index[mine], t=batch.t[mine], weight=batch.weight[mine],
        row_image=new_image[batch.row_image[rows]], row_label=batch.row_label[rows], row_mask=batch.row_mask[rows],
        ladder=new_row[batch.ladder[ladders]], ladder_weight=batch.ladder_weight[ladders], severity=batch.severity[ladders],
    )


def add_up(tensors: list[Tensor]) -> None:
    """Replace each tensor by its sum over all processes, in one message."""
    message = torch.cat([t.flatten() for t in tensors])
    dist.all_reduce(message)
    sums = message.split([t.numel() for t in tensors])
    torch._foreach_copy_(tensors, [total.view_as(t) for t, total in zip(tensors, sums)])


class Stopped(BaseException):
    """Ctrl-C or SIGTERM came; its number."""


class StopSignals:
    """Notes Ctrl-C and SIGTERM (clusters send it), so that the loop can save first. Another one, later, ends at once."""

    def __init__(self):
        self.number, self.at = 0, 0.0

    def __enter__(self) -> StopSignals:
        self.before = {number: signal.signal(number, self.note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def note(self, number, frame) -> None:
        if self.number and time.monotonic() - self.at > 2:  # launchers send one stop twice
            raise Stopped(number)
        self.number, self.at = number, time.monotonic()

    def agreed(self, step: int, device: torch.device, world: int) -> bool:
        """Whether to stop after this step. Several processes agree on it, every tenth step, as asking costs time."""
        if world > 1 and step % 10:
            return False
        self.number = -least(-self.number, device, world)
        return self.number > 0


class Progress:
    open = False  # is a line of progress on the screen
    shown = -math.inf  # when the last one was printed


def say(line: str, over: bool = False) -> None:
    """Print a line, from the first process alone.

    over: a line of progress. On a terminal the next one replaces it; elsewhere one in 20 seconds is shown.
    """
    terminal = sys.stdout.isatty()
    if int(os.environ.get("RANK", 0)) > 0 or (over and not terminal and time.monotonic() < Progress.shown + 20):
        return
    if over:
        Progress.shown = time.monotonic()
    if over and terminal:
        width = shutil.get_terminal_size().columns - 1
        print("\r" + line[:width].ljust(width), end="", flush=True)
    else:
        print("\n" * Progress.open + line, flush=True)
    Progress.open = over and terminal


# --------------------------------------------------------------------- checkpoints and files


def first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def out_of_memory(error: BaseException) -> bool:
    """Whether this is how torch or numpy, on a GPU or a CPU, say that memory ran out."""
    words = r"out of memory|not enough memory|allocate memory|ALLOC_FAILED"
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and bool(re.search(words, str(error))))


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def check_config(config: Config) -> None:
    """Raise UserError on the first setting that is out of range, alone or beside the others."""
    for f in fields(config):
        value, meta = getattr(config, f.name), f.metadata
        low, high, choices = meta["low"], meta["high"], meta["choices"]
        for v in value if isinstance(value, tuple) else (value,):
            if choices and v not in choices:
                raise UserError(f"{flag(f.name)} {v}: must be {' or '.join(choices)}")
            if (low is not None and not low <= v <= (math.inf if high is None else high)) or (isinstance(v, float) and not math.isfinite(v)):
                raise UserError(f"{flag(f.name)} {v}: must be at least {low}" + ("" if high is None else f" and at most {high}"))
    levels = len(config.ch_mult)
    sides = [config.size >> level for level in range(levels)]
    for wrong, message in (
        (not levels, "--ch-mult: name one multiplier or more, as 1,2,2,2"),
        (levels and config.size % 2 ** (levels - 1), f"--size {config.size}: must be a multiple of 2^{levels - 1}, as --ch-mult names {levels} resolutions"),
        (set(config.attention) - set(sides), f"--attention {','.join(map(str, config.attention))}: the feature maps have the sides {', '.join(map(str, sides))}"),
        (config.ch % math.lcm(4, config.groups), f"--ch {config.ch}: must be a multiple of 4 and of --groups ({config.groups})"),
        (config.beta_T < config.beta_1, f"--beta-T {config.beta_T}: must be at least --beta-1 ({config.beta_1})"),
        (alpha_bars(config)[-1] < 1e-30, f"--beta-T {config.beta_T}: leaves nothing of the image long before t = T; lower it"),
        (config.sample_steps > config.timesteps, f"--sample-steps {config.sample_steps}: must be at most --timesteps ({config.timesteps})"),
        (config.spacing and config.distance == "squared", "--spacing: its shares are of the Euclidean distance; leave --distance squared out"),
        (config.rungs in (1, 2), f"--rungs {config.rungs}: a ladder takes 3 classes or more, or 0 for all"),
        (config.seed >= 2**63, f"--seed {config.seed}: must be below 2^63"),
    ):
        if wrong:
            raise UserError(message)


def draw_demo(root: Path) -> None:
    """Draw the embedded data set with data/demo.py, unless it is there."""
    if subprocess.run([sys.executable, HERE / "data" / "demo.py", "--out", root], stdout=subprocess.DEVNULL).returncode:
        raise UserError(f"{root}: the embedded data set could not be drawn, see the line above; delete that folder and try again")


def cannot_write(path: Path, error: BaseException) -> UserError:
    reason = getattr(error, "strerror", None) or first_line(error)
    return UserError(f"{path}: cannot be written ({reason}): free some space there or choose another place; what was saved before is intact")


def write_file(path: Path, write: Callable) -> None:
    """write(file) into a neighbour that then takes path's place: a kill or a full disk leaves the old file whole."""
    neighbour = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(neighbour, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(neighbour, path)
    except (OSError, RuntimeError) as error:
        with contextlib.suppress(OSError):
            neighbour.unlink()
        if isinstance(error, RuntimeError) and "inline_container" not in str(error):  # torch.save's word for a full disk
            raise
        raise cannot_write(path, error) from None


def lock_folder(out: Path, space: int = 0):
    """Make the folder, check that `space` bytes are free in it, and lock it: the lock ends with the file returned, or the process."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = open(out / ".lock", "a")
    except OSError as error:
        raise cannot_write(out, error) from None
    if (free := shutil.disk_usage(out).free) < space:
        raise UserError(f"{out}: a checkpoint takes {space / 2**20:,.0f} MiB and {free / 2**20:,.0f} MiB are free: free some space or choose another --out")
    try:
        if os.name == "nt":
            import msvcrt

            msvcrt.locking(lock.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        raise UserError(f"{out}: another process is writing there; wait for it, or choose another --out") from None
    except OSError:
        say(f"{out}: its file system has no locks; see that nothing else writes there")
    return lock


def save_checkpoint(path: Path, config: Config, classes: Classes, model, ema, optimizer, step: int) -> None:
    state = dict(config=asdict(config), classes=asdict(classes), step=step, model=model.state_dict(), ema=ema.state_dict(),
                 optimizer=optimizer.state_dict())
    write_file(path, lambda file: torch.save(state, file))


def load_checkpoint(path: str | Path) -> dict:
    """A checkpoint as {config: Config, classes: Classes, step, ema, [model, optimizer]}; runs no code from it."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such checkpoint; `python odm.py train` makes one")
    try:
        with zipfile.ZipFile(path) as archive:  # torch.load does not look at the checksums
            if damaged := archive.testzip():
                raise ValueError(f"its part {damaged} is damaged")
        state = torch.load(path, map_location="cpu", weights_only=True)
        known, there = {f.name for f in fields(Config)}, set(state["config"])
        state["config"] = Config(**{k: v for k, v in state["config"].items() if k in known})
        state["classes"] = Classes(**state["classes"])
        check_config(state["config"])
        for name in state["classes"].names:
            check_name(name)
        if not {"step", "ema"} <= set(state):
            raise ValueError("it holds no weights")
    except Exception as error:  # unpickling damaged or foreign files raises many kinds
        raise UserError(f"{path}: not a whole checkpoint of odm.py ({first_line(error)}); take another, or train anew in another --out") from None
    if known != there:
        say(f"{path}: written by another version"
            + (f"; settings not known here: {', '.join(sorted(there - known))}" if there - known else "")
            + (f"; settings it lacks, taken at their defaults: {', '.join(sorted(known - there))}" if known - there else ""))
    return state


def resume(path: Path, config: Config, classes: Classes, model, ema, optimizer) -> int:
    """Load the run's own checkpoint, if it has one, into model, ema and optimizer; return its step."""
    if not path.exists():
        return 0
    state = load_checkpoint(path)
    pairs = [(flag(f.name), getattr(state["config"], f.name), getattr(config, f.name)) for f in fields(Config) if not f.metadata["may_change"]]
    pairs.append(("the data", state["classes"], classes))
    if differing := [f"{name} (there {there}, now {now})" for name, there, now in pairs if there != now]:
        raise UserError(f"{path.parent}: holds a run with other settings: {', '.join(differing)}: use the same, or another --out")
    try:
        load_weights(model, state["model"], path)
        load_weights(ema, state["ema"], path)
        optimizer.load_state_dict(state["optimizer"])
    except (KeyError, ValueError) as error:
        raise UserError(f"{path}: cannot be trained on ({first_line(error)} is missing or wrong); choose another --out") from None
    return state["step"]


def load_weights(model: nn.Module, weights: dict, path: Path) -> None:
    try:
        model.load_state_dict(weights)
    except (RuntimeError, AttributeError, TypeError):
        raise UserError(f"{path}: its weights are of another shape than its settings say; take another checkpoint") from None


# ---------------------------------------------------------------------------------- sampling


@torch.no_grad()
def draw_images(net: Callable, position: Sequence[float], keys: Sequence[tuple], config: Config, device: torch.device | str = "cpu") -> Tensor:
    """Images at positions in 0..C-1, class indices or between two: (B, 3, size, size) uint8 on the CPU.

    All noise of row i comes from keys[i] alone, so it is the same image in any batch.
    """
    rngs = [torch.Generator().manual_seed(seed_of("sample", *key)) for key in keys]
    position = torch.tensor(position)

    def noise(x: Tensor | None = None) -> Tensor:
        return torch.stack([torch.randn(3, config.size, config.size, generator=rng) for rng in rngs]).to(device)

    def eps_fn(x_t: Tensor, t: Tensor) -> Tensor:
        return guided_eps(net, x_t, t, position, config.guidance)

    return to_uint8(ddim_sample(eps_fn, noise(), alpha_bars(config), config.sample_steps, config.eta, noise=noise)).cpu()


def to_picture(image: Tensor) -> Image.Image:
    """(3, H, W) uint8 as an image of Pillow."""
    return Image.fromarray(image.permute(1, 2, 0).numpy())


def draw_sheet(net: Network, classes: Classes, config: Config, rows: int = 6) -> Image.Image:
    """A sheet of samples: a column a class, the same starting noise along a row."""
    C = len(classes.names)
    drawn = [draw_images(net, [float(c) for c in range(C)], [(config.seed, row)] * C, config, net.device) for row in range(rows)]
    return sheet_of([(name, [to_picture(row[c]) for row in drawn]) for c, name in enumerate(classes.names)], config.size)


def sheet_of(columns: Sequence[tuple[str, Sequence[Image.Image]]], size: int) -> Image.Image:
    """Columns of (title, pictures of size x size) as one picture, small ones enlarged."""
    scale = max(1, 128 // size)
    cell, top, rows = size * scale + 4, 24, max(len(pictures) for _, pictures in columns)
    sheet = Image.new("RGB", (len(columns) * cell + 4, rows * cell + 4 + top), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(15)
    for x, (title, pictures) in enumerate(columns):
        pen.text((4 + (x + 0.5) * cell, top / 2 + 2), title, "black", font, anchor="mm")
        for y, picture in enumerate(pictures):
            sheet.paste(picture.resize((size * scale,) * 2, Image.Resampling.BICUBIC), (4 + x * cell, 4 + top + y * cell))
    return sheet


def parse_severities(text: str, classes: Classes) -> list[tuple[str, float]]:
    """--class as [(name of the folder, class index 0..C-1, fractions between)]: all, 3, "Mayo 3", 1.5, 0:3:0.25."""
    low, high = classes.severities[0], classes.severities[-1]
    have = f"the checkpoint has {', '.join(classes.names)}, severities {low:g} to {high:g}"

    def one(value: float) -> tuple[str, float]:
        if not low <= value <= high:
            raise UserError(f"--class {text}: {value:g} is not among the classes; {have}")
        if value in classes.severities:
            index = classes.severities.index(value)
            return classes.names[index], float(index)
        return f"{value:.10g}", float(np.interp(value, classes.severities, range(len(classes.names))))

    if text == "all":
        return [(name, float(i)) for i, name in enumerate(classes.names)]
    if text in classes.names:
        return [(text, float(classes.names.index(text)))]
    try:
        first, *rest = (float(part) for part in text.split(":"))
    except ValueError:
        raise UserError(f"--class {text}: no such class; {have}") from None
    if not rest:
        return [one(first)]
    last, pace = (*rest, 1.0)[:2]
    if len(rest) > 2 or not (first <= last and 0 < pace and (last - first) / pace <= 1000):
        raise UserError(f"--class {text}: write FIRST:LAST:STEP, as 0:3:0.25, rising in at most 1,000 steps")
    return [one(round(first + i * pace, 6)) for i in range(int((last - first) / pace + 1e-6) + 1)]


def shares(n: int, counts: Sequence[int]) -> list[int]:
    """n divided in proportion to counts, by largest remainders."""
    exact = [n * c / sum(counts) for c in counts]
    whole = [int(e) for e in exact]
    for i in sorted(range(len(exact)), key=lambda i: whole[i] - exact[i])[: n - sum(whole)]:
        whole[i] += 1
    return whole


def sample(checkpoint: str | Path = "", severity: str = "all", n: int = 0, each: int = 0, out: str | Path = "", seed: int = 0,
           batch: int = 0, device: str = "auto", **changes) -> Path:
    """Draw images into OUT/<class>/<i>.png and OUT/sheet.png; what is there already is kept. Returns OUT.

    checkpoint: none is the newest run's, else data/demo.pt. severity: see parse_severities. n images in all, the classes at
    their training frequencies (evenly if one lies between classes), or `each` of every severity [16 of one, else 8].
    Image i of a class depends on (seed, class, i) alone; in a series 0:3:0.25 on (seed, i), so that a row of the sheet
    shows one starting noise at rising severity.
    changes: sample_steps, guidance, eta, precision, compile, where they differ from the run's.
    """
    path = Path(checkpoint or newest_checkpoint())
    if path.is_dir():
        path = path / "checkpoint.pt"
    state = load_checkpoint(path)
    config, classes = replace(state["config"], **changes), state["classes"]
    check_config(config)
    for name, value in (("-n", n), ("--each", each), ("--batch", batch), ("--seed", seed)):
        if not 0 <= value < 2**63:
            raise UserError(f"{name} {value}: must be at least 0 and below 2^63")
    if n and each:
        raise UserError("-n is the number of all images, --each that of each severity: give one of them")
    wanted, series = parse_severities(severity, classes), ":" in severity
    counts = [each or (16 if len(wanted) == 1 else 8)] * len(wanted)
    if n:
        of_classes = all(position.is_integer() for _, position in wanted)
        counts = shares(n, [classes.counts[int(position)] if of_classes else 1 for _, position in wanted])
    device, rank, world = start(device)
    say(f"{path}: step {state['step']:,}, classes {', '.join(classes.names)}")
    model = UNet(config, len(classes.names))
    load_weights(model, state["ema"], path)
    run = path.resolve().parent.name + ("" if path.name == "checkpoint.pt" else f"-{path.stem}")
    out = Path(out) if out else Path("samples") / (run + "-series" * series)
    if rank == 0:
        lock = lock_folder(out)  # held while it is open
        weights = hashlib.sha256()
        for w in state["ema"].values():
            weights.update(w.numpy().tobytes())
        note_settings(out, dict(weights=weights.hexdigest(), seed=seed, series=series, sample_steps=config.sample_steps, guidance=config.guidance, eta=config.eta))
    wait_for_all()

    jobs = [(out / name / f"{i:05d}.png", position, (seed, i) if series else (seed, i, round(position, 6)))
            for (name, position), count in zip(wanted, counts) for i in range(count)]
    if config.compile == "auto" and len(jobs) < 1000:
        config = replace(config, compile="off")  # compiling takes longer than so few images
    net = Network(model.to(device, memory_format=torch.channels_last).eval(), config, device)
    draw_missing(net, jobs, min(batch or fitting_batch(config, device, world), len(jobs)), config, device, rank, world)
    wait_for_all()
    if rank == 0:
        most = 8 if len(wanted) > 1 else 64
        columns = [(name, [read_image(out / name / f"{i:05d}.png") for i in range(min(count, most))]) for (name, _), count in zip(wanted, counts)]
        if len(columns) == 1:  # one severity: a square of its images
            (name, pictures), side = columns[0], math.ceil(math.sqrt(min(counts[0], most)))
            columns = [(name if x == 0 else "", pictures[x::side]) for x in range(side)]
        write_file(out / "sheet.png", partial(sheet_of(columns, config.size).save, format="PNG"))
        more = len(list(out.glob("*/*.png"))) - len(jobs)
        say(f"{len(jobs):,} images are in {out}" + (f", beside {more:,} drawn earlier" if more > 0 else "") + f"; {out / 'sheet.png'} shows the first")
    return out


def newest_checkpoint() -> Path:
    """That of the run in runs/ that was saved last, else the one that comes with the program."""
    runs = sorted(Path("runs").glob("*/checkpoint.pt"), key=lambda path: path.stat().st_mtime)
    return runs[-1] if runs else HERE / "data" / "demo.pt"


def draw_missing(net: Network, jobs: list[tuple[Path, float, tuple]], batch: int, config: Config, device: torch.device, rank: int, world: int) -> None:
    """Draw each (file, position, key) whose file is not there, `batch` at a time, the rank-th share of them.

    Batches are laid out over all jobs and always whole, so that an image shares its batch with the same others
    whatever is missing: not even its rounding changes.
    """
    batches, drawn, begun = [jobs[i : i + batch] for i in range(0, len(jobs), batch)][rank::world], 0, time.monotonic()
    with ThreadPoolExecutor() as pool:  # PNG files are written while the next batch is drawn
        writing = []
        for done, jobs_now in enumerate(batches, 1):
            missing = [not file.exists() for file, *_ in jobs_now]
            if any(missing):
                whole = (jobs_now + jobs_now[-1:] * batch)[:batch]
                images = draw_images(net, [position for _, position, _ in whole], [key for *_, key in whole], config, device)
                for future in writing:
                    future.result()
                writing = [pool.submit(write_file, file, partial(to_picture(image).save, format="PNG"))
                           for (file, *_), image, absent in zip(jobs_now, images, missing) if absent]
                drawn += sum(missing) * world
            say(f"{min(done * batch * world, len(jobs)):,}/{len(jobs):,} images  {drawn / (time.monotonic() - begun):.1f} images/s",
                over=done < len(batches))
        for future in writing:
            future.result()


def note_settings(out: Path, settings: dict) -> None:
    """Keep images of different settings apart: OUT/sample.json says what the folder's images were drawn with."""
    file = out / "sample.json"
    if not file.exists():
        return write_file(file, lambda f: f.write(json.dumps(settings, indent=1).encode()))
    try:
        there = json.loads(file.read_text())
        differing = [name for name in settings if there[name] != settings[name]]
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{file}: damaged; delete {out} or choose another --out") from None
    if differing:
        raise UserError(f"{out}: holds images drawn with another {' and '.join(differing)}; delete it or choose another --out")


# ------------------------------------------------------------------------------ command line


class Parser(argparse.ArgumentParser):
    """Errors in one line, exit status 2."""

    def error(self, message: str):
        self.exit(2, f"odm.py: error: {' '.join(message.split())}; see python {self.prog} --help\n")


def ints(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(",") if text)


def add_field(command: Parser, f, **kwargs) -> None:
    """A field of Config as a flag."""
    meta, default = f.metadata, f.default
    shown = ",".join(map(str, default)) if isinstance(default, tuple) else default
    text = meta["help"].replace("%", "%%") + (f" [{shown}]" if shown != "" and not kwargs else "")
    if isinstance(default, bool):
        command.add_argument(flag(f.name), action=argparse.BooleanOptionalAction, default=None, help=text)
    else:
        kind = ints if isinstance(default, tuple) else type(default)
        metavar = "|".join(meta["choices"] or ()) or {ints: "N,N", int: "N", float: "X", str: "TEXT"}[kind]
        command.add_argument(flag(f.name), type=kind, metavar=metavar, help=text, **kwargs)


def parser() -> Parser:
    top = Parser(prog="odm.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    commands = top.add_subparsers(dest="command", required=True, metavar="train|sample")
    t = commands.add_parser("train", help="train on a folder of graded images, or resume", allow_abbrev=False,
                            description="Train on a folder of graded images; the same command again resumes. "
                            "Without --data: the embedded set and the small preset.")
    t.add_argument("--preset", choices=("paper", "small"), help="paper: the defaults below; small: for two cores and a few "
                   "minutes, " + ", ".join(f"{k} {v}" for k, v in SMALL.items()) + " [paper with --data, else small]")
    for f in fields(Config):
        add_field(t, f)
    s = commands.add_parser("sample", help="draw images from a checkpoint", allow_abbrev=False,
                            description="Draw images into OUT/<class>/<i>.png and OUT/sheet.png. What is there already is kept.")
    s.add_argument("--class", dest="severity", default="all", metavar="CLASS",
                   help='3, "Mayo 3", 1.5 (between two classes), 0:3:0.25 (a series, each row from one noise) or all [all]')
    s.add_argument("--checkpoint", default="", metavar="FILE", help="a checkpoint or the folder of a run [the newest in runs/, else data/demo.pt]")
    s.add_argument("-n", type=int, default=0, metavar="N", help="images in all, classes at their training frequencies")
    s.add_argument("--each", type=int, default=0, metavar="N", help="images of each severity [16 for one severity, else 8]")
    s.add_argument("--out", default="", metavar="DIR", help="[samples/NAME, after the run; NAME-series for a series]")
    s.add_argument("--seed", type=int, default=0, metavar="N", help="image i of a class depends on (seed, class, i) alone [0]")
    s.add_argument("--batch", type=int, default=0, metavar="N", help="images drawn together [16 on a CPU; on a GPU what its memory holds, up to 256]")
    s.add_argument("--device", default="auto", metavar="TEXT", help="cpu, cuda, ... [auto]")
    for f in fields(Config):
        if f.name in ("sample_steps", "guidance", "eta", "precision", "compile"):
            add_field(s, f, default=argparse.SUPPRESS)  # where not given, the run's own
    return top


def raise_stopped(number, frame):
    raise Stopped(number)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line. Exit status: 0, 2 for what the user can mend, 130 and 143 for Ctrl-C and SIGTERM."""
    args = vars(parser().parse_args(argv))
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, raise_stopped)
    try:
        if args.pop("command") == "train":
            given = {k: v for k, v in args.items() if v is not None}
            preset = given.pop("preset", "paper" if given.get("data") else "small")
            train(Config(**{**(SMALL if preset == "small" else {}), **given}))
        else:
            sample(**args)
        if dist.is_initialized():
            dist.destroy_process_group()
        return 0
    except UserError as error:
        message = str(error)
    except Stopped as stopped:
        print("odm.py: stopped; the same command goes on", file=sys.stderr)
        return 128 + stopped.args[0]
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        message = "out of memory: lower --batch, or --size where the images alone are too many"
    print(f"odm.py: error: {' '.join(message.splitlines())}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
