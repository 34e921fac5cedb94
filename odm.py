# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.5", "numpy", "pillow>=10.1", "scipy"]
# ///
"""The Ordinal Diffusion Model: one script, read from top to bottom.

    S. Takezaki and S. Uchida, "An Ordinal Diffusion Model for Generating Medical Images with
    Different Severity Levels", ISBI 2024, arXiv 2403.00452.

    python odm.py train                       # draws the embedded set, trains the small preset
    python odm.py train --data data/limuc     # the paper's settings on LIMUC
    python odm.py sample --class 3            # images of severity 3, from the newest run
    python odm.py sample --class 0:3:0.25     # the same noise at rising severity

Where the paper's equations are:

    Eq. 1  the forward process, x_{t-1} -> x_t     alpha_bars, q_sample (t steps in one)
    Eq. 2  one step of the backward process        ddim (eta = 1, every t, clip = False)
    Eq. 3  L_DM, the loss of a diffusion model     dm_loss
    Eq. 4  the order of the noise estimates        holds where ordinal_loss = 0 and they differ
    Eq. 5  L_ordinal, the ordinal relationship     ordinal_loss
    Eq. 6  d, the distance of two noise estimates  noise_distance
    Eq. 7  three estimates on a line, in order     straightness (= 1); guided_eps (severity 1.5)
    Eq. 8  L_total = L_DM + lambda_t L_ordinal     total_loss

and its symbols: x_0 a clean image in [-1, 1], x_t the same after t of T noising steps, eps the noise
in it, eps_hat the network's estimate eps_theta(x_t, t, c), c a class, p < q < r three classes in
ascending severity. In the shapes: B images of a step, R rows of the network, G triplets, C classes.
A severity is what a person writes, say Mayo 1 to 3. A position is a class index, 0 to C-1 (the paper
counts from 1), or a point between two. Index C is the null class of guidance.

Settings, losses, one training step, sampling and the U-Net come first and are the whole method.
What follows the line "the method ends here" are data, runs, files, processes and the command line.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import csv
import hashlib
import io
import itertools
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
import warnings
import zipfile
from collections import Counter, deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import timedelta
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor, nn

# ---------------------------------------------------------------------------------- settings


def setting(default, help: str, low=None, high=math.inf, choices=(), may_change: bool = False):
    """A field of Config, with its range. `may_change`: it may differ when a run is resumed."""
    about = dict(help=help, low=low, high=high, choices=choices, may_change=may_change)
    return field(default=default, metadata=about)


@dataclass
class Config:
    """Every setting of a training run, its default and where that comes from. Fields are flags of `train`."""

    # data
    data: str = setting("", "folder of graded images (none: the embedded set is drawn)", may_change=True)
    out: str = setting("", "folder of the run (none: runs/NAME, after the data)", may_change=True)
    init: str = setting("", "start from the averaged weights of this checkpoint", may_change=True)
    size: int = setting(64, "image side in pixels (paper)", 4, 1024)
    crop: int = setting(0, "side of the centre crop; 0: 128 of 352x288 (paper), else the middle square", 0)
    order: str = setting("", "class names in ascending severity, A,B,C (where names carry no number)")
    columns: str = setting("", "ID,GRADE: columns of the CSV that gives the classes (image,level is known)")
    flip: bool = setting(True, "random horizontal flips (Ho et al.)")
    # forward process
    timesteps: int = setting(1000, "T, steps of the forward process (paper)", 1, 100_000)
    beta_1: float = setting(1e-4, "noise schedule at t = 1 (paper)", 1e-8, 0.999)
    beta_T: float = setting(0.02, "noise schedule at t = T (paper)", 1e-8, 0.999)
    # losses
    ordinal: float = setting(1.0, "W, a factor on lambda_t; 1: Eq. 8, 0: the plain diffusion model", 0.0)
    triplets: str = setting("labels", "labels: one x_t under three labels (Fig. 2); images: of three images, "
                            "with one noise (Eqs. 4 to 7)", choices=("labels", "images"))
    triplet_part: float = setting(0.25, "part of a batch completed to triplets (ours: for speed)", 0.0, 1.0)
    distance: str = setting("euclidean", "d of Eq. 6; squared: as printed, which contradicts Eq. 7",
                            choices=("euclidean", "squared"))
    spacing: bool = setting(False, "ask also for d(p,q) : d(q,r) = (q-p) : (r-q) (the paper's future work)")
    balance: str = setting("data", "classes in L_DM: at their frequency in the data (Eq. 3) or even",
                           choices=("data", "uniform"))
    class_dropout: float = setting(0.1, "probability of the null class (Ho & Salimans)", 0.0, 0.99)
    # U-Net
    ch: int = setting(128, "channels at full resolution (Ho et al.)", 4)
    ch_mult: tuple = setting((1, 2, 2, 2), "channel multiplier of each resolution (Ho et al.)", 1)
    blocks: int = setting(2, "residual blocks at each resolution (Ho et al.)", 1)
    attention: tuple = setting((16,), "sides of the feature maps with self-attention (Ho et al.)", 1)
    groups: int = setting(32, "of GroupNorm (Ho et al.); many in a narrow network lose the mean colour", 1)
    dropout: float = setting(0.1, "dropout in the residual blocks (Ho et al.)", 0.0, 0.99)
    # training
    batch: int = setting(32, "images a step, over all processes (paper)", 1)
    steps: int = setting(200_000, "training steps (paper)", 1, may_change=True)
    lr: float = setting(1e-4, "Adam's learning rate (paper)", 0.0)
    warmup: int = setting(5000, "steps of linear warm-up (Ho et al.)", 0)
    decay: float = setting(0.0, "part of the run, at its end, in which lr falls to 0 (ours)", 0.0, 1.0)
    ema: float = setting(0.9999, "decay of the averaged weights that sampling uses (Ho et al.)", 0.0, 1.0)
    seed: int = setting(0, "step i's images and noise depend on (seed, i, process) alone", 0, 2**63 - 1)
    # sampling, for the sheets drawn while training and as the default of `sample`
    sample_steps: int = setting(100, "DDIM steps (paper)", 1, may_change=True)
    guidance: float = setting(2.0, "s of classifier-free guidance (paper); 1: none", 0.0, may_change=True)
    eta: float = setting(0.0, "0: DDIM (paper); 1: ancestral, whose fresh noise corrects errors of a briefly "
                         "trained network", 0.0, 1.0, may_change=True)
    # machinery
    log_every: int = setting(100, "steps between measurements of straightness", 1, may_change=True)
    save_every: int = setting(2000, "steps between checkpoints", 1, may_change=True)
    sheet_every: int = setting(10_000, "steps between sheets of samples; 0: at the end", 0, may_change=True)
    device: str = setting("auto", "cpu, cuda, ...; auto: the GPU if there is one", may_change=True)
    precision: str = setting("auto", "of the residual branches; auto: bfloat16 on a GPU that has it",
                             choices=("auto", "float32", "bfloat16"), may_change=True)
    compile: str = setting("auto", "torch.compile; auto: on a GPU", choices=("auto", "on", "off"),
                           may_change=True)


# Small enough for two cores and a few minutes: 32x32 images, 1.1 M parameters.
SMALL = dict(size=32, ch=32, ch_mult=(1, 2, 2), blocks=1, attention=(8,), groups=2, dropout=0.0, batch=8,
             steps=1600, lr=2e-3, warmup=100, decay=0.5, ema=0.999, sample_steps=50, guidance=1.0, eta=1.0,
             save_every=200, sheet_every=800)


# ------------------------------------------------------------------- forward process (Eq. 1)


def to_unit(images: Tensor) -> Tensor:
    """uint8 0..255 -> float -1..1."""
    return images.float() / 127.5 - 1


def to_uint8(x: Tensor) -> Tensor:
    """float -1..1 -> uint8 0..255, rounded to the nearest: the inverse of to_unit."""
    return ((x + 1) * 127.5).round().clamp(0, 255).byte()


def alpha_bars(config: Config) -> Tensor:
    """alpha_bar_t = alpha_1 ... alpha_t for t = 0..T: (T+1,) float64 on the CPU, with alpha_bar_0 = 1.

    alpha_t = 1 - beta_t and beta_t = (beta_T - beta_1) (t - 1) / (T - 1) + beta_1 (below Eq. 1).
    """
    beta = torch.linspace(config.beta_1, config.beta_T, config.timesteps, dtype=torch.float64)
    return torch.cat([beta.new_ones(1), (1 - beta).cumprod(0)])


def q_sample(x_0: Tensor, t: Tensor, eps: Tensor, alpha_bar: Tensor) -> Tensor:
    """x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) eps: Eq. 1 applied t times.

    x_0, eps: (B, ...); t: (B,) long in 0..T; alpha_bar: (T+1,), on the CPU as made. At t = 0 it is x_0.
    """
    shape = (-1, *[1] * (x_0.dim() - 1))
    signal, noise = (part.sqrt().to(x_0)[t].view(shape) for part in (alpha_bar, 1 - alpha_bar))
    return signal * x_0 + noise * eps


# --------------------------------------------------------------------- losses (Eqs. 3 and 5 to 7)


def dm_loss(eps: Tensor, eps_hat: Tensor) -> Tensor:
    """L_DM of Eq. 3, as the mean over the entries of each image: (B, ...) -> (B,)."""
    return (eps - eps_hat).square().flatten(1).mean(1)


def noise_distance(a: Tensor, b: Tensor, distance: str = "euclidean") -> Tensor:
    """d of Eq. 6 between noise estimates: (G, ...) and (G, ...) -> (G,).

    `euclidean` is the root mean square of a - b, `squared` its mean square, the norm printed in Eq. 6.
    Both are means over an image's D entries, as L_DM is, where the paper has sums. With `euclidean` that
    divides L_DM and L_ordinal by D alike: Eq. 8 keeps its balance, at any image size. With `squared` it
    divides L_ordinal by D^2: the balance as printed takes --ordinal D (12,288 at 64x64).
    """
    difference = (a.float() - b.float()).flatten(1)
    if distance == "squared":
        return difference.square().mean(1)
    norm = torch.linalg.vector_norm(difference, dim=1)  # unlike a root, its gradient at 0 is 0, not nan
    return norm / math.sqrt(difference.shape[1])


def ordinal_loss(p: Tensor, q: Tensor, r: Tensor, distance: str = "euclidean", share: Tensor | None = None):
    """L_ordinal of Eq. 5, of G triplets of noise estimates, of classes p < q < r: (G, ...) each -> (G,).

    Zero where q lies on the line from p to r, in order (Eqs. 4 and 7), by the triangle inequality; that is
    true of distance="euclidean". With "squared", Eq. 6 as printed, d(p,r) - d(p,q) - d(q,r) is
    2 <p-q, q-r>, which is zero where the angle at q is a right angle instead.

    share (G,): where q should lie on that line, the part (q-p)/(r-p) of the way by the classes' severities
    (`--spacing`, the paper's first future work). It fixes alpha = 1 - share in Eq. 7.
    """
    d_pq, d_qr, d_pr = (noise_distance(a, b, distance) for a, b in ((p, q), (q, r), (p, r)))
    if share is None:
        return (d_pr - (d_pq + d_qr)).square()
    return (share * d_pr - d_pq).square() + ((1 - share) * d_pr - d_qr).square()


def straightness(eps_hat: Tensor) -> Tensor:
    """d(p,r) / (d(p,q) + d(q,r)), mean over the triplets of C >= 3 classes: (N, C, ...) -> (N,) in [0, 1].

    1 when the estimates lie on a line in order (Eq. 7); 0.5 for an equilateral triangle. Estimates that
    coincide count as 1, so read it beside the gap d(first, last): a network that ignores the class is
    straight too.
    """
    ratios = []
    for p, q, r in itertools.combinations(eps_hat.unbind(1), 3):
        path = noise_distance(p, q) + noise_distance(q, r)
        ratios.append(torch.where(path > 0, noise_distance(p, r) / path, 1.0))
    return torch.stack(ratios).mean(0)


# ------------------------------------------------------------------------ one step's images


@dataclass
class Batch:
    """The R = B + 2G rows that a step shows to the network: B images, and two partners for each of G of them.

    The partners complete an image to a triplet p < q < r. They are the same image under two other labels
    (`--triplets labels`: one x_t seen as three classes, Fig. 2), or an image of each of these two classes
    (`--triplets images`: x_{t,p}, x_{t,q}, x_{t,r} of Eq. 4). Either way they take the noise, t, flip and
    dropout mask of the image that they accompany, their root, so that nothing else tells the three apart.
    """

    image: Tensor  # (R,) numbers in the data set
    label: Tensor  # (R,) the class that a row is shown as; C is the null class
    root: Tensor  # (R,) 0..B-1: itself for an image, the image that it accompanies for a partner
    t: Tensor  # (B,) timesteps 1..T
    flip: Tensor  # (B,) mirrored or not
    triplets: Tensor  # (G, 3) rows in ascending severity; G = 0 for the plain diffusion model
    whole: Tensor  # (G,) 1, or 0 where the root drew the null class, which has no place in the order
    share: Tensor  # (G,) (q-p)/(r-p) of the severities, for --spacing

    def to(self, device: torch.device) -> Batch:
        return Batch(**{name: value.to(device, non_blocking=True) for name, value in vars(self).items()})


def draw_batch(labels: Tensor, severities: Sequence[float], config: Config, B: int, rng: torch.Generator):
    """The Batch of one step, drawn by rng. labels (N,): each image's class; severities (C,): ascending."""
    C = len(severities)
    G = int(B * config.triplet_part) if config.ordinal > 0 and C >= 3 else 0

    def one_of(classes: Tensor) -> Tensor:
        """A random image of each class."""
        return (labels == classes[:, None]).float().multinomial(1, generator=rng)[:, 0]

    if config.balance == "uniform":
        image = one_of(torch.randint(C, (B,), generator=rng))
    else:  # Eq. 3: each class as often as in the data
        image = torch.randint(len(labels), (B,), generator=rng)
    t = torch.randint(1, config.timesteps + 1, (B,), generator=rng)
    flip = (torch.rand(B, generator=rng) < 0.5) & config.flip
    null = torch.rand(B, generator=rng) < config.class_dropout  # a coin for each image

    accompanied = torch.arange(G).repeat_interleave(2)
    steps = 1 + torch.rand(G, C - 1, generator=rng).argsort(1)[:, :2]  # two different ones of 1..C-1, to go
    other = (labels[image[accompanied]] + steps.flatten()) % C  # round the classes: never back to its own
    partner = one_of(other) if G and config.triplets == "images" else image[accompanied]  # the two readings

    label = torch.cat([labels[image], other])
    triplets = torch.cat([torch.arange(G)[:, None], torch.arange(B, B + 2 * G).view(G, 2)], dim=1)
    triplets = triplets.gather(1, label[triplets].argsort(1))  # p < q < r
    p, q, r = torch.tensor(severities)[label[triplets]].unbind(1)
    label[:B][null] = C
    root = torch.cat([torch.arange(B), accompanied])
    whole = 1 - null[:G].float()
    return Batch(torch.cat([image, partner]), label, root, t, flip, triplets, whole, share=(q - p) / (r - p))


# ---------------------------------------------------------------------- one training step (Eq. 8)


def total_loss(model: Callable, x_0: Tensor, eps: Tensor, batch: Batch, alpha_bar: Tensor, config: Config):
    """Eq. 8, L_total = L_DM + W lambda_t L_ordinal with lambda_t = t / T.

    x_0 (R, 3, H, W): the clean images of the rows; eps (B, 3, H, W): the noise of the roots. One forward
    pass serves both losses: L_DM reads the B images under their own labels, L_ordinal the G triplets.
    Returns the scalars (L_total, L_DM, lambda_t L_ordinal).
    """
    t = batch.t[batch.root]
    x_t = q_sample(x_0, t, eps[batch.root], alpha_bar)
    eps_hat = model(x_t, t, batch.label, batch.root)
    dm = dm_loss(eps, eps_hat[: len(eps)]).mean()
    if not len(batch.triplets):
        return dm, dm, torch.zeros_like(dm)
    p, q, r = eps_hat[batch.triplets].unbind(1)
    lambda_t = t[batch.triplets[:, 0]] / config.timesteps
    share = batch.share if config.spacing else None
    ordinal = (batch.whole * lambda_t * ordinal_loss(p, q, r, config.distance, share)).mean()
    ordinal = ordinal / (1 - config.class_dropout)  # the part of triplets that is whole, on average
    return dm + config.ordinal * ordinal, dm, ordinal


def learning_rate(config: Config, step: int) -> float:
    """Of step 0, 1, ...: a linear warm-up, then constant, and a linear fall to 0 over the part `decay`."""
    rising = (step + 1) / max(config.warmup, 1)
    falling = (config.steps - step) / max(config.decay * config.steps, 1)
    return config.lr * min(1, rising, falling)


def training_step(model: nn.Module, ema: nn.Module, optimizer: torch.optim.Adam, images: Tensor, batch: Batch,
                  alpha_bar: Tensor, config: Config, step: int, average: Callable | None = None) -> Tensor:
    """Step 0, 1, ... of Adam on Eq. 8, and of the averaged weights. images (N, 3, H, W) uint8: the data set.

    average(tensors): in place, over the processes, where there are several. Returns (4,): L_total, L_DM,
    lambda_t L_ordinal and the norm of the gradient.
    """
    x_0 = to_unit(images[batch.image]).to(memory_format=torch.channels_last)
    x_0 = torch.where(batch.flip[batch.root].view(-1, 1, 1, 1), x_0.flip(-1), x_0)
    eps = torch.randn(len(batch.t), *x_0.shape[1:], device=x_0.device)
    losses = torch.stack(total_loss(model, x_0, eps, batch, alpha_bar, config))
    optimizer.zero_grad()
    losses[0].backward()
    losses = losses.detach()
    if average:
        average([losses, *(p.grad for p in model.parameters())])
    grad_norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)  # Ho et al.
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(config, step)
    optimizer.step()
    keep = min(config.ema, (step + 2) / (step + 11))  # rising, lest a short run keep the initial weights
    with torch.no_grad():
        torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - keep)
    return torch.cat([losses, grad_norm[None]])


# ------------------------------------------------ sampling: guidance and DDIM (Eq. 2, Eq. 7)


def guided_eps(model: Callable, x_t: Tensor, t: Tensor, position: Tensor, scale: float) -> Tensor:
    """The noise estimate at a position, with classifier-free guidance by scale s: (B, 3, H, W).

    position: (B,) float in 0..C-1; 1.5 is 0.5 eps_1 + 0.5 eps_2, on the line of Eq. 7. Keep it on the CPU:
    it decides which classes are evaluated, in one pass with the null class (unless s = 1).
    eps = eps_null + s (eps_c - eps_null) = s eps_c + (1 - s) eps_null; s = 1 is the conditional model, s = 0
    the unconditional one (Ho & Salimans write w = s - 1). If the classes lie evenly on a line and eps_null at
    their mean m, that is the estimate of m + s (c - m): s > 1 moves each class away from m, severe ones come
    out too severe.
    """
    share = position - position.floor()
    null = torch.full_like(position, model.num_classes), torch.full_like(position, 1 - scale)
    terms = [(position.floor(), scale * (1 - share)), (position.ceil(), scale * share), null]
    terms = [(label, weight) for label, weight in terms if weight.any()]  # only these are evaluated
    labels = torch.cat([label for label, _ in terms]).long().to(x_t.device)
    weights = torch.stack([weight for _, weight in terms]).to(x_t).view(len(terms), -1, 1, 1, 1)
    eps = model(x_t.repeat(len(terms), 1, 1, 1), t.repeat(len(terms)), labels).unflatten(0, (len(terms), -1))
    return (weights * eps).sum(0)


def ddim(eps_fn: Callable, x: Tensor, alpha_bar: Tensor, times: Sequence[int], eta: float = 0.0,
         clip: bool = True, noise: Callable = torch.randn_like) -> Tensor:
    """Take x from t = times[0] to t = times[-1] by DDIM (Song et al. 2021, Eq. 12): (B, ...) -> (B, ...).

    Falling times, T ... 0, draw: x_T becomes an image. Rising times, 0 ... T, with eta = 0 and clip = False
    encode: an image becomes the x_T from which it is drawn again (their Section 4.3). eps_fn(x, t) estimates
    the noise, t (B,) long; a step is asked at the noisier of its two ends, so never at t = 0.
    eta = 0 is deterministic. `clip` keeps the estimate of x_0 in [-1, 1]. noise(x) draws z, where eta > 0.

    eta = 1, all T steps, clip = False is Eq. 2 but for two things. Its denominator reads sqrt(1 - alpha_t), a
    misprint of sqrt(1 - alpha_bar_t). And sigma_t^2, there beta_t, is the variance of the posterior,
    beta_t (1 - alpha_bar_{t-1}) / (1 - alpha_bar_t).
    """
    if times[0] < times[-1] and (eta or clip):
        raise ValueError("rising times encode: they take eta = 0 and clip = False")
    for t, u in zip(times[:-1], times[1:]):  # from x_t to x_u
        abar_t, abar_u = alpha_bar[t].item(), alpha_bar[u].item()
        eps = eps_fn(x, torch.full((len(x),), max(t, u), device=x.device))
        x_0 = (x - math.sqrt(1 - abar_t) * eps) / math.sqrt(abar_t)
        if clip:
            x_0 = x_0.clamp(-1, 1)
            eps = (x - math.sqrt(abar_t) * x_0) / math.sqrt(1 - abar_t)
        sigma = eta * math.sqrt((1 - abar_u) / (1 - abar_t) * (1 - abar_t / abar_u)) if eta else 0.0
        x = math.sqrt(abar_u) * x_0 + math.sqrt(max(1 - abar_u - sigma**2, 0)) * eps
        if sigma > 0:
            x = x + sigma * noise(x)
    return x


@torch.no_grad()
def read_position(model: Callable, x_0: Tensor, alpha_bar: Tensor, seed: int = 0,
                  shares: Sequence[float] = (0.05, 0.15, 0.3, 0.5, 0.7, 0.85)) -> Tensor:
    """The position on the line of Eq. 7 that explains an image best: x_0 (N, 3, H, W) -> (N,) in 0..C-1.

    A diffusion classifier (Li et al. 2023) that knows fractions. Let r_c = eps - eps_theta(x_t, t, c) be the error
    of class c and G_cd the mean of r_c r_d over t, eps and entries. Then (1-a) eps_k + a eps_{k+1}, the estimate
    at position k + a, errs by (1-a)^2 G_kk + 2a(1-a) G_k,k+1 + a^2 G_k+1,k+1, which is least at
    a = (G_kk - G_k,k+1) / (G_kk - 2 G_k,k+1 + G_k+1,k+1), kept in [0, 1]. The best of the segments k wins.

    t: the shares of T. All images see one eps at each t, and its mirror -eps: the errors' part that is odd in
    eps cancels. Each t weighs one over its mean error, as normal errors do in a likelihood.
    """
    C, N, gram = model.num_classes, len(x_0), 0.0
    rng = torch.Generator().manual_seed(seed)
    x_0, c = x_0.repeat(C, 1, 1, 1), torch.arange(C, device=x_0.device).repeat_interleave(N)
    for share in shares:
        t = torch.full_like(c, max(1, round(share * (len(alpha_bar) - 1))))
        drawn = torch.randn(1, *x_0.shape[1:], generator=rng).to(x_0)
        r = [eps - model(q_sample(x_0, t, eps, alpha_bar), t, c) for eps in (drawn, -drawn)]
        r = torch.cat(r, dim=1).view(C, N, -1).transpose(0, 1).cpu().double()
        product = r @ r.mT
        gram = gram + product / product.diagonal(0, 1, 2).mean(1)[:, None, None]
    error, cross = gram.diagonal(0, 1, 2), gram.diagonal(1, 1, 2)  # (N, C) and (N, C-1)
    lower, upper = error[:, :-1], error[:, 1:]
    a = ((lower - cross) / (lower - 2 * cross + upper)).nan_to_num(0).clamp(0, 1)  # 0 where the two coincide
    k = ((1 - a) ** 2 * lower + 2 * a * (1 - a) * cross + a**2 * upper).argmin(1, keepdim=True)
    return (k + a.gather(1, k))[:, 0]


# ----------------------------- U-Net of Ho et al. (2020), as published, with a class embedding

NEARLY_ZERO = 1e-5  # gain of the last layer of each residual branch (Ho et al.: a variance scale of 1e-10)


def glorot(layer: nn.Module, gain: float = 1.0) -> nn.Module:
    """Glorot-uniform weights and zero biases."""
    nn.init.xavier_uniform_(layer.weight, gain)
    nn.init.zeros_(layer.bias)
    return layer


def conv(c_in: int, c_out: int, kernel: int = 3, gain: float = 1.0) -> nn.Module:
    return glorot(nn.Conv2d(c_in, c_out, kernel, padding=kernel // 2), gain)


def in_branch(x: Tensor, config: Config):
    """bfloat16, where asked for, inside the residual branches alone: the trunk stays float32.

    bfloat16 rounds estimates of size 1 by 0.003, and the ordinal loss reads differences of 0.002 to 0.02
    between them. Inside a branch it rounds relative to what the branch adds, not to the sum.
    """
    return torch.autocast(x.device.type, torch.bfloat16, enabled=config.precision == "bfloat16")


def time_embedding(t: Tensor, ch: int) -> Tensor:
    """[sin, cos] of t at ch/2 frequencies exp(-i ln(10000) / (ch/2 - 1)): (B,) -> (B, ch)."""
    half = ch // 2
    frequency = torch.exp(torch.arange(half, device=t.device) * (-math.log(10000) / (half - 1)))
    angle = t[:, None].float() * frequency
    return torch.cat([angle.sin(), angle.cos()], dim=1)


class Dropout(nn.Dropout):
    """Dropout whose mask belongs to a root: the estimates of a triplet then differ by the class alone, not by
    the noise of three masks, which no loss could put on a line."""

    def forward(self, h: Tensor, root: Tensor | None = None) -> Tensor:
        if root is None or not self.training or self.p == 0:
            return super().forward(h)
        mask = super().forward(torch.ones_like(h))  # 0 or 1 / (1 - p)
        return h * mask[root]


class Attention(nn.Module):
    """Single-head self-attention over the H*W positions, added to its input."""

    def __init__(self, channels: int, config: Config):
        super().__init__()
        self.config = config
        self.norm = nn.GroupNorm(config.groups, channels, eps=1e-6)
        self.q, self.k, self.v = (conv(channels, channels, 1) for _ in range(3))
        self.out = conv(channels, channels, 1, gain=NEARLY_ZERO)

    def forward(self, x: Tensor) -> Tensor:
        with in_branch(x, self.config):
            h = self.norm(x)
            q, k, v = (f(h).flatten(2).mT.unsqueeze(1) for f in (self.q, self.k, self.v))  # (R, 1, HW, C)
            h = F.scaled_dot_product_attention(q, k, v)  # softmax(q k' C^-0.5) v
            h = self.out(h.squeeze(1).mT.reshape(x.shape))
        return x + h


class Block(nn.Module):
    """norm, swish, conv; add the embedding; norm, swish, dropout, conv; add the input; then attention."""

    def __init__(self, c_in: int, c_out: int, attention: bool, config: Config):
        super().__init__()
        self.config = config
        self.norm1 = nn.GroupNorm(config.groups, c_in, eps=1e-6)
        self.conv1 = conv(c_in, c_out)
        self.emb = glorot(nn.Linear(4 * config.ch, c_out))
        self.norm2 = nn.GroupNorm(config.groups, c_out, eps=1e-6)
        self.conv2 = conv(c_out, c_out, gain=NEARLY_ZERO)
        self.dropout = Dropout(config.dropout)
        self.shortcut = conv(c_in, c_out, 1) if c_in != c_out else nn.Identity()
        self.attention = Attention(c_out, config) if attention else nn.Identity()

    def forward(self, x: Tensor, emb: Tensor, root: Tensor | None) -> Tensor:
        with in_branch(x, self.config):
            h = self.conv1(F.silu(self.norm1(x)))
            h = h + self.emb(F.silu(emb))[:, :, None, None]
            h = self.conv2(self.dropout(F.silu(self.norm2(h)), root))
        return self.attention(self.shortcut(x) + h)


class UNet(nn.Module):
    """eps_theta(x_t, t, c). With the paper's settings: 35,746,307 parameters plus the class embedding."""

    def __init__(self, config: Config, num_classes: int):
        super().__init__()
        ch, c_emb, side = config.ch, 4 * config.ch, config.size
        self.ch, self.num_classes = ch, num_classes
        self.time = nn.Sequential(glorot(nn.Linear(ch, c_emb)), nn.SiLU(), glorot(nn.Linear(c_emb, c_emb)))
        self.label = nn.Embedding(num_classes + 1, c_emb)  # the last row is the null class
        self.conv_in = conv(3, ch)
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        c, skips = ch, [ch]
        for level, mult in enumerate(config.ch_mult):
            for _ in range(config.blocks):
                self.down.append(Block(c, mult * ch, side in config.attention, config))
                c = mult * ch
                skips.append(c)
            if level < len(config.ch_mult) - 1:
                halve = glorot(nn.Conv2d(c, c, 3, stride=2))
                self.down.append(nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), halve))  # padded right and below
                skips.append(c)
                side //= 2
        self.middle = nn.ModuleList([Block(c, c, True, config), Block(c, c, False, config)])
        for level, mult in reversed(list(enumerate(config.ch_mult))):
            for _ in range(config.blocks + 1):
                self.up.append(Block(c + skips.pop(), mult * ch, side in config.attention, config))
                c = mult * ch
            if level > 0:
                self.up.append(nn.Sequential(nn.Upsample(scale_factor=2), conv(c, c)))  # nearest neighbour
                side *= 2
        self.norm_out = nn.GroupNorm(config.groups, c, eps=1e-6)
        self.conv_out = conv(c, 3, gain=NEARLY_ZERO)

    def forward(self, x_t: Tensor, t: Tensor, c: Tensor, root: Tensor | None = None) -> Tensor:
        """x_t (R, 3, H, W), t (R,) long in 1..T, c (R,) long in 0..C, C being the null class -> (R, 3, H, W).

        root (R,) long: which dropout mask each row takes (None: each its own).
        """
        emb = self.time(time_embedding(t, self.ch)) + self.label(c)
        h = self.conv_in(x_t)
        skips = [h]
        for layer in self.down:
            h = layer(h, emb, root) if isinstance(layer, Block) else layer(h)
            skips.append(h)
        for block in self.middle:
            h = block(h, emb, root)
        for layer in self.up:
            h = layer(torch.cat([h, skips.pop()], dim=1), emb, root) if isinstance(layer, Block) else layer(h)
        return self.conv_out(F.silu(self.norm_out(h)))


# ==================================================================== the method ends here
# What follows makes it usable: data, training run, sampling run, files, processes, command line.

HERE = Path(__file__).resolve().parent


class UserError(Exception):
    """Something the user can mend: one line that names the file or flag and says what to do."""


# -------------------------------------------------------------------------------------- data

SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"}
NUMBER = r"\d+(?:\.\d+)?"
KNOWN_COLUMNS = ("image,level", "id_code,diagnosis")  # of EyePACS and of APTOS


def list_images(root: str | Path) -> list[Path]:
    """Image files anywhere below root, sorted, those in linked folders too; hidden ones are passed over."""
    root, found, seen = Path(root).resolve(), [], set()
    for folder, subfolders, files in os.walk(root, followlinks=True):
        real = Path(folder).resolve()
        if real in seen or (os.path.islink(folder) and root in real.parents):  # a loop, or a second name
            subfolders.clear()
            continue
        seen.add(real)
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        found += [Path(folder, name) for name in files if not name.startswith(".")]
    return sorted(path for path in found if path.suffix.lower() in SUFFIXES)


def read_image(path: str | Path) -> Image.Image:
    """An image file as RGB: turned upright (EXIF), 16 bits scaled to 8, first frame."""
    try:
        with Image.open(path) as image:  # which refuses more than 179 million pixels
            sixteen_bits = image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG")
            if image.mode in ("I", "F") and not sixteen_bits:
                raise ValueError("pixels of 32 bits have no known range; save it with 8 or 16")
            image = ImageOps.exif_transpose(image)
            if sixteen_bits:  # converting to RGB would clip it
                image = Image.fromarray((np.asarray(image, np.float64) / 257).round().astype(np.uint8))
            return image.convert("RGB")
    except Exception as error:  # Pillow's decoders raise many kinds on damaged files
        raise UserError(f"{path}: not readable as an image ({error}); repair or remove it") from None


def read_square(path: str | Path, size: int, crop: int = 0, keep: bool = False) -> Tensor:
    """The middle crop x crop pixels of an image file (0: see Config), resized: (3, size, size) uint8.

    keep: an image that has that size already stays as it is.
    """
    image = read_image(path)
    if keep and image.size == (size, size):
        crop = size
    if crop > min(image.size):
        raise UserError(f"--crop {crop}: {path} has only {image.width}x{image.height} pixels")
    side = crop or (128 if image.size == (352, 288) else min(image.size))  # Section 4.1.1
    left, top = (image.width - side) // 2, (image.height - side) // 2
    image = image.resize((size, size), Image.Resampling.BICUBIC, box=(left, top, left + side, top + side))
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def classes_from_csv(root: Path, paths: list[Path], columns: str) -> tuple[dict[Path, str], str]:
    """{path: class} from the CSV files below root with the columns ID,GRADE, and a remark; empty without any.

    An ID is a file's stem or name, or its path from root.
    """
    grades = {}
    for file in sorted(root.rglob("*.csv")):
        with open(file, newline="", encoding="utf-8-sig", errors="replace") as stream:
            table = csv.DictReader(stream)
            for pair in [columns] if columns else KNOWN_COLUMNS:
                id, grade = pair.split(",")
                for row in table if {id, grade} <= set(table.fieldnames or ()) else ():
                    if row[grade] and grades.setdefault(row[id], row[grade]) != row[grade]:
                        raise UserError(f"{file}: gives {row[id]} a second grade; remove one of the two")
    path_of = {str(path.relative_to(root).with_suffix("")): path for path in paths}
    path_of |= {path.stem: path for path in reversed(paths)}
    found = {}
    for id, grade in grades.items():
        if path := path_of.get(id) or path_of.get(os.path.splitext(id)[0]):
            found[path] = grade
    missing = len(grades) - len(found)
    return found, f"; {missing:,} of the {len(grades):,} images in the CSV are missing" if grades else ""


def classes_from_folders(root: Path, paths: list[Path], order: str) -> dict[Path, str]:
    """{path: class}: the name of an image's folder, or of the class folder above where that is a stray one.

    The commonest kind of folder, digits read as #, is the class folders': 17/Mayo 2/copy (1)/a.bmp is a
    "Mayo #", as nearly all others are, no "copy (#)". With --order it is the nearest folder named there.
    """
    kind = partial(re.sub, NUMBER, "#")
    above = {path: [folder.name for folder in path.parents if root in folder.parents] for path in paths}
    kinds = Counter(kind(names[0]) for names in above.values() if names)
    ordered = re.split(r"\s*,\s*", order)
    classes = {}
    for path, names in above.items():
        if order:
            names = [name for name in names if name in ordered]
        elif names:
            names = [name for name in names if kind(name) == max(kinds, key=kinds.get)] + names
        if names:
            classes[path] = names[0]
    return classes


def rank_classes(found: set[str], order: str = "") -> dict[str, float]:
    """{class name: severity}, ascending: by --order, or by the one number in each name (Mayo 2: 2)."""
    names = ", ".join(sorted(found)[:12])
    if order:
        ordered = re.split(r"\s*,\s*", order)
        if set(ordered) != found or len(ordered) != len(found):
            raise UserError(f"--order {order}: the classes are {names}; name each of them once")
        return {name: float(i) for i, name in enumerate(ordered)}
    if len(found) > 12:
        raise UserError(f"{len(found)} classes ({names}, ...): patients, most likely; pass --order")
    numbers = {name: re.findall(NUMBER, name) for name in found}
    severities = {name: float(number[0]) for name, number in numbers.items() if len(number) == 1}
    if len(set(severities.values())) < len(found):
        raise UserError(f"classes {names}: no order that a program may guess; pass --order with the names in "
                        "ascending severity, separated by commas")
    return dict(sorted(severities.items(), key=lambda item: item[1]))


def find_images(root: str | Path, order: str = "", columns: str = ""):
    """(paths, class index of each, class names in ascending severity, remark on what was left out)."""
    if not Path(root).is_dir():
        raise UserError(f"{root}: no such folder (data/README.md says how to get the data sets)")
    root = Path(root).resolve()
    paths = list_images(root)
    if not paths:
        raise UserError(f"{root}: no images in it ({', '.join(sorted(SUFFIXES))})")
    class_of, remark = classes_from_csv(root, paths, columns)
    if not class_of and (columns or remark):
        raise UserError(f"{root}: no CSV with {columns or 'grades'} lists an image that is there{remark}")
    class_of = class_of or classes_from_folders(root, paths, order)
    if not class_of:
        raise UserError(f"{root}: no image has a class; put each in a folder of its class")
    namesakes = Counter((name, path.name) for path, name in class_of.items())
    first = {}  # of those with the same class, file name and bytes
    for path, name in class_of.items():
        content = hashlib.sha256(path.read_bytes()).digest() if namesakes[name, path.name] > 1 else b""
        first.setdefault((name, path.name, content), path)
    names = list(rank_classes(set(class_of.values()), order))
    if len(names) < 2:
        raise UserError(f"{root}: one class only ({names[0]}); name the folder that holds all class folders")
    if twins := len(class_of) - len(first):
        remark += f"; {twins:,} files that are there twice (same class, name and content) taken once"
    if others := len(paths) - len(class_of):
        remark += f"; {others:,} images without a class passed over"
    return list(first.values()), [names.index(name) for name, *_ in first], names, remark


def load_images(root: str | Path, size: int = 64, crop: int = 0, order: str = "", columns: str = ""):
    """Graded images as (uint8 (N, 3, size, size), labels long (N,), class names in ascending severity).

    Reads LIMUC, EyePACS and any tree of class folders as distributed (data/README.md): an image's class is
    its grade in a CSV, or its folder's name. Raises UserError naming the file or flag.
    """
    paths, labels, names, remark = find_images(root, order, columns)
    say(f"{root}: " + ", ".join(f"{name} {labels.count(i):,}" for i, name in enumerate(names)) + remark)
    images, progress = [], Progress(len(paths), "images read")
    with ThreadPoolExecutor() as pool, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's, on odd metadata
        for image in pool.map(partial(read_square, size=size, crop=crop), paths):
            images.append(image)
            progress.show(len(images))
    return torch.stack(images), torch.tensor(labels), names


# ------------------------------------------------------------------------------ training run


@dataclass
class Classes:
    """The ordered classes of a run: names in ascending severity, their severities, images of each."""

    names: list[str]
    severities: list[float]
    counts: list[int]

    def __post_init__(self):
        for name in self.names:  # samples are written to a folder of that name: it must never be a path
            if not name.strip(" .") or re.search(r'[/\\:*?"<>|\x00-\x1f]', name):
                raise UserError(f"class name {name!r} cannot be the name of a folder: rename it")


def seed_of(purpose: str, *numbers: float) -> int:
    """One seed from a purpose and numbers: different keys give unrelated seeds."""
    return int.from_bytes(hashlib.sha256(repr((purpose, *numbers)).encode()).digest()[:8], "big") >> 1


@torch.no_grad()
def measure_line(model: UNet, images: Tensor, alpha_bar: Tensor, n: int = 16) -> tuple[float, float]:
    """(straightness, gap d(lowest, highest)): n images, each at its own t in 1..T, under every class.

    images: (N, 3, H, W) uint8. The same images, t and noise at every call, so that numbers compare.
    """
    device, C, rng = images.device, model.num_classes, torch.Generator().manual_seed(0)
    x_0 = to_unit(images[torch.randint(len(images), (n,), generator=rng).to(device)])
    t = torch.linspace(1, len(alpha_bar) - 1, n).round().long().to(device)
    x_t = q_sample(x_0, t, torch.randn(x_0.shape, generator=rng).to(device), alpha_bar)
    eps_hat = torch.stack([model(x_t, t, torch.full_like(t, c)) for c in range(C)], dim=1)
    gap = noise_distance(eps_hat[:, 0], eps_hat[:, -1]).mean().item()
    return straightness(eps_hat).mean().item() if C >= 3 else math.nan, gap


def train(config: Config) -> Path:
    """Train, or resume, the run in config.out and return that folder: checkpoint.pt, metrics.csv, sheets.

    Under torchrun each process draws its share of the batch, and gradients are averaged.
    """
    check_config(config)
    device, (rank, world) = start(config.device), rank_and_world()
    root = Path(config.data or HERE / "data" / "demo")
    out = Path(config.out or Path("runs") / root.resolve().name)
    if not config.data and rank == 0:
        draw_demo(root)
    wait_for_all()
    images, labels, names = load_images(root, config.size, config.crop, config.order, config.columns)
    severities = list(rank_classes(set(names), config.order).values())
    classes = Classes(names, severities, labels.bincount().tolist())
    if config.batch % world:
        raise UserError(f"--batch {config.batch}: must be a multiple of the {world} processes")
    B = config.batch // world
    if config.ordinal > 0 and len(names) < 3:
        say("two classes only: no triplet p < q < r, so no ordinal loss: this is the plain diffusion model")
    elif config.ordinal > 0 and B * config.triplet_part < 1:
        raise UserError(f"--batch {config.batch}: --triplet-part {config.triplet_part} of the {B} a process draws is no "
                        "image; raise one of the two, or pass --ordinal 0")

    torch.manual_seed(seed_of("weights", config.seed))
    model = build(config, len(names), device)
    ema = copy.deepcopy(model).eval().requires_grad_(False)
    optimizer = torch.optim.Adam(model.parameters(), lr=config.lr, fused=True)
    lock = lock_folder(out) if rank == 0 else None  # held as long as this variable
    step = resume(out / "checkpoint.pt", config, classes, model, ema, optimizer)
    if step != largest(step, device):
        raise UserError(f"{out}: not the same folder for all processes; it must be one that all see")
    log = Log(out / "metrics.csv", step, config) if rank == 0 else None
    say(f"{out}: {sum(p.numel() for p in model.parameters()):,} parameters on {device} x {world}, "
        f"step {step:,} of {config.steps:,}")

    images, alpha_bar, net = images.to(device), alpha_bars(config), compiled(model, config, device)
    model.train()
    stopping = False
    with noted_signals() as signals:
        while True:
            sheet_due = step == config.steps or (config.sheet_every and step % config.sheet_every == 0)
            sheet_file = out / "sheets" / f"{step:06d}.png"
            if rank == 0 and step and sheet_due and not sheet_file.exists():
                sheet = draw_sheet(ema, classes, config, device)
                for file in (out / "sheet.png", sheet_file):
                    save_picture(sheet, file)
            if step >= config.steps or stopping:
                break
            rng = torch.Generator().manual_seed(seed_of("batch", config.seed, step, rank))
            batch = draw_batch(labels, severities, config, B, rng).to(device)
            torch.manual_seed(seed_of("eps", config.seed, step, rank))  # of eps and of dropout
            losses = training_step(net, ema, optimizer, images, batch, alpha_bar, config, step, average)
            step += 1
            if world == 1 or step % 10 == 0:  # several processes agree on it, which costs time
                stopping = largest(len(signals), device) > 0
            if rank == 0:
                due = step % config.log_every == 0 or step == config.steps
                log.add(step, losses, measure_line(ema, images, alpha_bar) if due else ())
                if step % config.save_every == 0 or step == config.steps or stopping:
                    log.write()  # before saving: it raises where a loss is not finite
                    save_checkpoint(out / "checkpoint.pt", config, classes, model, ema, optimizer, step)
        wait_for_all()  # until the first process has saved
    if step < config.steps:
        say(f"{out}: stopped and saved at step {step:,}; the same command goes on from there")
        raise SystemExit(128 + signals[0])
    say(f"{out}: trained to step {step:,}, a higher --steps goes on; {out / 'sheet.png'} shows samples")
    return out


class Log:
    """metrics.csv, a row a step, and the line of progress. Losses stay on the device until then."""

    COLUMNS = ("step", "loss", "dm", "ordinal", "grad_norm", "straightness", "gap")

    def __init__(self, path: Path, step: int, config: Config):
        self.path, self.pending, self.recent, self.measured = path, [], deque(maxlen=config.log_every), ()
        self.progress = Progress(config.steps, "steps", step)
        rows = [self.COLUMNS]
        if step and path.exists():  # rows that an interrupted run wrote after its last checkpoint go
            with open(path, newline="") as file:
                rows += itertools.islice(csv.reader(file), 1, step + 1)
        write_file(path, lambda file: file.write("".join(",".join(row) + "\n" for row in rows).encode()))

    def add(self, step: int, losses: Tensor, measured: Sequence[float]) -> None:
        """losses: (4,) of training_step; measured: straightness and gap, after some steps."""
        self.pending.append((step, losses, measured))
        self.measured = measured or self.measured
        if self.progress.due(step):
            self.write()
            _, dm, ordinal, _ = np.mean(self.recent, axis=0)  # of the last log_every steps
            line = f"  L_DM {dm:.4f}  lambda_t L_ordinal {ordinal:.6f}"
            if self.measured:
                line += "  straightness {:.3f}  gap {:.4f}".format(*self.measured)
            self.progress.show(step, line)

    def write(self) -> None:
        """Write the pending rows; losses that are not finite end the run before it is saved."""
        with open(self.path, "a") as file:
            for step, losses, measured in self.pending:
                losses = losses.tolist()
                if not all(map(math.isfinite, losses)):
                    raise UserError(f"step {step}: the loss is not finite; train with a lower --lr in another --out "
                                    "(checkpoint.pt holds the last good state, if one was saved)")
                cells = [f"{value:.7g}" for value in (step, *losses, *measured)] + ["", ""] * (not measured)
                file.write(",".join(cells) + "\n")
                self.recent.append(losses)
        self.pending = []


# ------------------------------------------------------------------------------ sampling run


@torch.no_grad()
def draw_images(model: Callable, position: Sequence[float], keys: Sequence[tuple], config: Config,
                device: torch.device | str = "cpu") -> Tensor:
    """Images at positions in 0..C-1: (B, 3, size, size) uint8 on the CPU.

    All noise of row i comes from keys[i] alone, so it is the same image in any batch.
    """
    rngs = [torch.Generator().manual_seed(seed_of("sample", *key)) for key in keys]
    position = torch.tensor(position)

    def noise(x: Tensor | None = None) -> Tensor:
        drawn = [torch.randn(3, config.size, config.size, generator=rng) for rng in rngs]
        return torch.stack(drawn).to(device)

    def eps_fn(x_t: Tensor, t: Tensor) -> Tensor:
        return guided_eps(model, x_t, t, position, config.guidance)

    return to_uint8(ddim(eps_fn, noise(), alpha_bars(config), ddim_times(config), config.eta, noise=noise)).cpu()


def ddim_times(config: Config) -> list[int]:
    """T ... 0, evenly spaced in --sample-steps steps."""
    return torch.linspace(config.timesteps, 0, config.sample_steps + 1).round().long().tolist()


def draw_sheet(model: UNet, classes: Classes, config: Config, device: torch.device, rows: int = 6):
    """A sheet of samples: a column a class, the same starting noise along a row."""
    C = len(classes.names)
    keys = [(config.seed, row) for row in range(rows) for _ in range(C)]
    images = draw_images(model, [float(c) for c in range(C)] * rows, keys, config, device)
    return sheet_of([(name, images[c::C]) for c, name in enumerate(classes.names)])


def to_picture(image: Tensor) -> Image.Image:
    """(3, H, W) uint8 as an image of Pillow."""
    return Image.fromarray(image.permute(1, 2, 0).numpy())


def sheet_of(columns: Sequence[tuple[str, Sequence[Tensor]]]) -> Image.Image:
    """Columns of (title, pictures (3, size, size) uint8) as one picture, small ones enlarged."""
    size = next(picture.shape[-1] for _, pictures in columns for picture in pictures)
    side, top = size * max(1, 128 // size), 24
    height = max(len(pictures) for _, pictures in columns) * (side + 4) + 4 + top
    sheet = Image.new("RGB", (len(columns) * (side + 4) + 4, height), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(15)
    for x, (title, pictures) in enumerate(columns):
        left = 4 + x * (side + 4)
        pen.text((left + side / 2, top / 2 + 2), title, "black", font, anchor="mm")
        for y, picture in enumerate(pictures):
            picture = to_picture(picture).resize((side, side), Image.Resampling.BICUBIC)
            sheet.paste(picture, (left, 4 + top + y * (side + 4)))
    return sheet


def save_series(columns: Sequence[tuple[str, Sequence[Tensor]]], file: Path) -> None:
    """Columns as for sheet_of, of rising severity, as a moving picture: rows side by side, up and down again."""
    frames = [sheet_of([(title if x == 0 else "", [picture]) for x, picture in enumerate(pictures)])
              for title, pictures in columns]
    frames += frames[-2:0:-1]
    options = dict(format="GIF", save_all=True, append_images=frames[1:], duration=150, loop=0)
    write_file(file, partial(frames[0].save, **options))


def parse_severities(text: str, classes: Classes, flag: str = "--class") -> dict[str, float]:
    """--class as {name of the folder: position}: all, 3, "Mayo 3", 1.5 (between two classes), 0:3:0.25."""
    positions = {name: float(i) for i, name in enumerate(classes.names)}
    if text == "all" or text in positions:
        return positions if text == "all" else {text: positions[text]}
    low, high = classes.severities[0], classes.severities[-1]
    first, *rest = text.split(":")
    last, step = [*rest, "1"][:2] if rest else (first, "1")
    try:
        count = int((float(last) - float(first)) / float(step) + 1e-6) + 1
        severities = [round(float(first) + i * float(step), 6) for i in range(min(count, 1001))]
    except (ValueError, OverflowError, ZeroDivisionError):
        severities = []
    if not 1 <= len(severities) <= 1000 or len(rest) > 2 or min(severities) < low or max(severities) > high:
        raise UserError(f"{flag} {text}: name one of {', '.join(classes.names)}, a severity from {low:g} to "
                        f"{high:g}, or FIRST:LAST:STEP, as 0:3:0.25")
    wanted = {}
    for severity in severities:
        position = float(np.interp(severity, classes.severities, range(len(classes.names))))
        wanted[classes.names[int(position)] if position.is_integer() else f"{severity:.10g}"] = position
    return wanted


def newest_checkpoint() -> Path:
    """That of the run in runs/ that was saved last, else the one that comes with the program."""
    runs = sorted(Path("runs").glob("*/checkpoint.pt"), key=lambda path: path.stat().st_mtime)
    return runs[-1] if runs else HERE / "data" / "demo.pt"


@dataclass
class Loaded:
    """A network ready to draw and read: its settings, classes, device, RUN-STEP and the hash of its weights."""

    model: UNet
    config: Config
    classes: Classes
    device: torch.device
    name: str
    sha256: str


def load_network(checkpoint: str | Path, device: str, **changes) -> Loaded:
    """The averaged network of a checkpoint's file or a run's folder [the newest in runs/, else data/demo.pt]."""
    path, state = load_checkpoint(checkpoint or newest_checkpoint())
    config, classes = replace(state["config"], **changes), state["classes"]
    check_config(config)
    device = start(device)
    model = build(config, len(classes.names), device).eval()
    load_weights(path, (model, state["ema"]))
    say(f"{path}: step {state['step']:,}, classes {', '.join(classes.names)}")
    run = path.parent.name if path.name == "checkpoint.pt" else f"{path.parent.name}-{path.stem}"
    sha256 = hashlib.sha256(b"".join(w.numpy().tobytes() for w in state["ema"].values())).hexdigest()
    return Loaded(model, config, classes, device, f"{run}-{state['step']}", sha256)


def sample(checkpoint: str | Path = "", severity: str = "all", n: int = 0, each: int = 0,
           out: str | Path = "", seed: int = 0, batch: int = 0, device: str = "auto", image: str | Path = "",
           at: str = "", **changes) -> Path:
    """Draw images into OUT/<class>/<i>.png and OUT/sheet.png; what is there already is kept. Returns OUT.

    checkpoint: see load_network. severity: see parse_severities.
    n images in all, the classes at their training frequencies (evenly if one lies between classes), or `each`
    of every severity [16 of one, else 8]. Image i of a class depends on (seed, class, i) alone; in a series
    0:3:0.25 on (seed, i), so that a row of the sheet shows one starting noise at rising severity.
    changes: sample_steps, guidance, eta, precision, compile, where they differ from the run's.
    With image (a file or folder), given images are moved instead: see move.
    """
    if image and (n or each or {"guidance", "eta"} & changes.keys()) or (at and not image):
        raise UserError("--image, images to move: goes with --at, and not with -n, --each, --guidance or --eta")
    if image:
        return move(image, severity, at, checkpoint, out, seed, batch or 16, device, **changes)
    loaded = load_network(checkpoint, device, **changes)
    config, classes, device = loaded.config, loaded.classes, loaded.device
    if min(n, each, batch, seed) < 0 or (n and each):
        raise UserError("-n, --each, --batch, --seed: 0 or more, and only one of -n and --each")
    wanted, series = parse_severities(severity, classes), ":" in severity
    counts = [each or (16 if len(wanted) == 1 else 8)] * len(wanted)
    if n:
        whole = all(position.is_integer() for position in wanted.values())
        parts = [classes.counts[int(position)] if whole else 1 for position in wanted.values()]
        counts = np.diff(np.round(n * np.cumsum([0, *parts]) / sum(parts))).astype(int)
    out = Path(out or f"samples/{loaded.name}" + "-series" * series)
    rank, world = rank_and_world()
    if rank == 0:
        lock = lock_folder(out)  # held as long as this variable
        note_settings(out, dict(weights=loaded.sha256, seed=seed, series=series, guidance=config.guidance,
                                sample_steps=config.sample_steps, eta=config.eta))
    wait_for_all()

    jobs = [(out / name / f"{i:05d}.png", position, (seed, i) if series else (seed, i, round(position, 6)))
            for (name, position), count in zip(wanted.items(), counts) for i in range(count)]
    if config.compile == "auto" and len(jobs) < 1000:
        config = replace(config, compile="off")  # compiling takes longer than so few images
    net, progress = compiled(loaded.model, config, device), Progress(len(jobs), "images")
    batch = min(batch or (16 if device.type == "cpu" else 128), len(jobs))
    for at in range(rank * batch, len(jobs), world * batch):
        # Batches are laid out over all jobs and always whole, so that an image shares its batch with the same
        # others whatever is there already: not even its rounding changes.
        some = jobs[at : at + batch]
        if not all(file.exists() for file, _, _ in some):
            files, positions, keys = zip(*(some + some[-1:] * batch)[:batch])
            pictures = map(to_picture, draw_images(net, positions, keys, config, device))
            with ThreadPoolExecutor() as pool:
                list(pool.map(save_picture, pictures, files[: len(some)]))
        progress.show(min(at + world * batch, len(jobs)))
    wait_for_all()
    if rank == 0:
        most = 8 if len(wanted) > 1 else 64
        columns = []
        for name, count in zip(wanted, counts):
            files = [out / name / f"{i:05d}.png" for i in range(min(count, most))]
            columns.append((name, [read_square(file, config.size) for file in files]))
        if series:
            save_series(columns, out / "series.gif")
        if len(columns) == 1:  # one severity: a square of its images
            (name, pictures), side = columns[0], math.ceil(math.sqrt(len(columns[0][1])))
            columns = [(name if x == 0 else "", pictures[x::side]) for x in range(side)]
        save_picture(sheet_of(columns), out / "sheet.png")
    say(f"{len(jobs):,} images are in {out}; {out / 'sheet.png'} shows the first")
    return out


def note_settings(out: Path, settings: dict) -> None:
    """Keep images of different settings apart: OUT/sample.json says what the folder's were drawn with."""
    file, text = out / "sample.json", json.dumps(settings, indent=1)
    if file.exists() and file.read_text(errors="replace") != text:
        raise UserError(f"{out}: holds images of another checkpoint or other settings (see its sample.json); delete "
                        "it or choose another --out")
    write_file(file, lambda stream: stream.write(text.encode()))


# ----------------------------------------------------------------- given images: grade and move


def given_images(paths: Sequence[str | Path], loaded: Loaded) -> tuple[list[Path], list[str], list[str], Tensor]:
    """Of image files and folders: (files, what to call each, class it lies under or "", images (N, 3, size, size) uint8).

    That class is its grade in a CSV of the folder, or the nearest folder above that has the name of one.
    """
    files, calls, given, config, names = [], [], [], loaded.config, loaded.classes.names
    for path in (Path(path).resolve() for path in paths):
        found = list_images(path) if path.is_dir() else [path]
        if not found:
            raise UserError(f"{path}: no images in it")
        table, _ = classes_from_csv(path, found, config.columns) if path.is_dir() else ({}, "")
        for file in found:
            folders = [table.get(file), *(folder.name for folder in file.parents)]
            files.append(file)
            calls.append("-".join(file.relative_to(path).parts) or file.name)
            given.append(next((name for name in folders if name in names), ""))
    progress, images = Progress(len(files), "images opened"), []
    for file in files:
        images.append(read_square(file, config.size, config.crop, keep=True))
        progress.show(len(images))
    return files, calls, given, torch.stack(images)


def read_images(images: Tensor, loaded: Loaded, seed: int, batch: int) -> Tensor:
    """read_position of uint8 images, a batch at a time: (N, 3, H, W) -> (N,)."""
    found, progress = [], Progress(len(images), "images read")
    for part in images.split(batch):
        found += read_position(loaded.model, to_unit(part).to(loaded.device), alpha_bars(loaded.config), seed)
        progress.show(len(found))
    return torch.stack(found)


def quadratic_kappa(confusion: Tensor) -> float | None:
    """Cohen's kappa with weights (i - j)^2 of a (C, C) table of counts: 1 perfect, 0 chance; None for one class."""
    table = confusion.double()
    index = torch.arange(len(table), dtype=torch.float64)
    cost = (index[:, None] - index).square()
    by_chance = (cost * torch.outer(table.sum(1), table.sum(0))).sum() / table.sum()
    return (1 - (cost * table).sum() / by_chance).item() if by_chance > 0 else None


def grade(images: Sequence[str | Path], checkpoint: str | Path = "", out: str | Path = "", seed: int = 0,
          batch: int = 16, device: str = "auto") -> None:
    """Read the severity of image files and folders: a CSV of file, severity, grade (the nearest class) and given.

    It goes to `out`, or else to standard output; what else there is to say, to standard error. Where all images
    lie under a class (see given_images), so does a comparison: kappa, mean error, a table of given and read.
    """
    with contextlib.redirect_stdout(sys.stderr):
        loaded = load_network(checkpoint, device)
        files, _, given, pixels = given_images(images, loaded)
        positions = read_images(pixels, loaded, seed, batch)
    names, scale = loaded.classes.names, torch.tensor(loaded.classes.severities)
    severities = torch.tensor(np.interp(positions, range(len(names)), scale))
    nearest = (positions + 0.5).long()
    table = io.StringIO()
    rows = csv.writer(table)
    rows.writerow(["file", "severity", "grade", "given"])
    for file, severity, c, own in zip(files, severities, nearest, given):
        rows.writerow([file, f"{severity:.3f}", names[c], own])
    if out:
        write_file(Path(out), lambda file: file.write(table.getvalue().encode()))
    else:
        print(table.getvalue(), end="")
    if not all(given):
        print("some images lie under no class of the checkpoint: no grades to compare with", file=sys.stderr)
        return
    own = torch.tensor([names.index(name) for name in given])
    confusion = torch.zeros(len(names), len(names)).index_put((own, nearest), torch.ones(()), accumulate=True)
    kappa, error = quadratic_kappa(confusion), (severities - scale[own]).abs().mean()
    print(f"{len(files):,} images, quadratic kappa {kappa or math.nan:.3f}, mean error {error:.3f}", file=sys.stderr)
    print("\t".join(["given", "read", *names, "mean severity read"]), file=sys.stderr)
    for c, name in enumerate(names):
        counts = [f"{n:.0f}" for n in confusion[c]]
        print("\t".join([name, "", *counts, f"{severities[own == c].mean():.2f}"]), file=sys.stderr)


@torch.no_grad()
def move(image: str | Path, severity: str = "all", at: str = "", checkpoint: str | Path = "", out: str | Path = "",
         seed: int = 0, batch: int = 16, device: str = "auto", **changes) -> Path:
    """Show given images at other severities: OUT/<class>/<name>.png and OUT/sheet.png. Returns OUT.

    Each image is encoded at its own severity (`at`, or else read from it), which leaves in x_T what the class
    does not explain, and drawn from there at each severity asked for; without guidance both ways.
    """
    loaded = load_network(checkpoint, device, **changes)
    _, calls, _, images = given_images([image], loaded)
    wanted = parse_severities(severity, loaded.classes)
    if at:
        positions = torch.tensor([*parse_severities(at, loaded.classes, "--at").values()][:1] * len(images))
    else:
        positions = read_images(images, loaded, seed, batch)
    out = Path(out or f"samples/{loaded.name}-moved")
    lock = lock_folder(out)  # held as long as this variable
    alpha_bar, times = alpha_bars(loaded.config), ddim_times(loaded.config)
    columns, progress = {name: [] for name in wanted}, Progress(len(images), "images moved")

    def at_position(position: Tensor) -> Callable:
        return lambda x_t, t: guided_eps(loaded.model, x_t, t, position, scale=1.0)

    for part in torch.arange(len(images)).split(batch):
        x_0 = to_unit(images[part]).to(loaded.device)
        x_T = ddim(at_position(positions[part].float()), x_0, alpha_bar, times[::-1], clip=False)
        for name, position in wanted.items():
            eps_fn = at_position(torch.full((len(part),), position))
            drawn = to_uint8(ddim(eps_fn, x_T, alpha_bar, times, clip=False)).cpu()  # encoding, undone
            columns[name] += drawn
            for i, picture in zip(part, drawn):
                save_picture(to_picture(picture), (out / name / calls[i]).with_suffix(".png"))
        progress.show(len(columns[name]))
    shown = slice(0, None, math.ceil(len(images) / 8))
    columns = [(name, pictures[shown]) for name, pictures in columns.items()]
    if ":" in severity:
        save_series(columns, out / "series.gif")
    save_picture(sheet_of([("given", images[shown]), *columns]), out / "sheet.png")
    say(f"{len(images):,} images at {len(wanted)} severities are in {out}; {out / 'sheet.png'} shows some")
    return out


# ------------------------------------------------------------------------- devices, processes


def rank_and_world() -> tuple[int, int]:
    """This process's number, and how many there are (under torchrun)."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def start(name: str) -> torch.device:
    """The device; under torchrun, this process's own, and it joins the others."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name + f":{os.environ.get('LOCAL_RANK', 0)}" * (name == "cuda"))
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name}: {error}") from None
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.backends.cudnn.benchmark = True  # all batches have one shape: look for the fastest kernels
    if rank_and_world()[1] > 1 and not dist.is_initialized():
        backend, bound = ("nccl", device) if device.type == "cuda" else ("gloo", None)
        dist.init_process_group(backend, timeout=timedelta(hours=2), device_id=bound)
    return device


def build(config: Config, num_classes: int, device: torch.device) -> UNet:
    """The network on its device, with --precision auto decided."""
    bfloat16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    if config.precision == "auto":
        config = replace(config, precision="bfloat16" if bfloat16 else "float32")
    return UNet(config, num_classes).to(device, memory_format=torch.channels_last)


def compiled(model: UNet, config: Config, device: torch.device) -> nn.Module:
    """The network under torch.compile, where asked for and working. Its weights stay those of `model`."""
    if config.compile == "on" or (config.compile == "auto" and device.type == "cuda"):
        try:
            torch.compile(torch.sin)(torch.zeros(8, device=device))  # is there a compiler at all?
            return torch.compile(model, dynamic=False)  # batches have few shapes: each its own, faster code
        except Exception as error:
            say(f"torch.compile does not work here ({type(error).__name__}); going on without")
    return model


def average(tensors: list[Tensor]) -> None:
    """Replace each tensor by its mean over all processes, in one message."""
    if dist.is_initialized():
        message = torch.cat([t.flatten() for t in tensors])
        dist.all_reduce(message)
        means = (message / dist.get_world_size()).split([t.numel() for t in tensors])
        torch._foreach_copy_(tensors, [mean.view_as(t) for t, mean in zip(tensors, means)])


def largest(number: int, device: torch.device) -> int:
    """The largest of all processes' numbers."""
    if dist.is_initialized():
        shared = torch.tensor(number, device=device)
        dist.all_reduce(shared, dist.ReduceOp.MAX)
        number = shared.item()
    return number


def wait_for_all() -> None:
    if dist.is_initialized():
        dist.barrier()


@contextlib.contextmanager
def noted_signals():
    """A list of the Ctrl-C and SIGTERM (clusters send it) that came, so that a loop can save first."""
    noted, begun = [], time.monotonic()

    def note(number, frame):
        nonlocal begun
        if noted and time.monotonic() > begun + 2:  # launchers send one stop twice; a later one ends at once
            raise KeyboardInterrupt
        noted.append(number)
        begun = time.monotonic()

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield noted
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def say(line: str) -> None:
    """Print a line, from the first process alone."""
    if rank_and_world()[0] == 0:
        print(line, flush=True)


TIME_UNITS = ((86400, "days"), (3600, "hours"), (60, "minutes"))  # and their seconds


class Progress:
    """Says how far a long job is: after its first part, then every few seconds, later once a minute."""

    def __init__(self, total: int, unit: str, done: int = 0):
        self.total, self.unit, self.first, self.begun, self.next = total, unit, done, time.monotonic(), 0.0

    def due(self, done: int) -> bool:
        return done == self.total or time.monotonic() > self.next

    def show(self, done: int, text: str = "") -> None:
        if self.due(done):
            seconds = time.monotonic() - self.begun
            self.next = time.monotonic() + min(max(seconds / 10, 3), 60)
            left = (self.total - done) * seconds / (done - self.first)
            size, unit = next((size, unit) for size, unit in TIME_UNITS if left >= 2 * size or size == 60)
            say(f"{done:,}/{self.total:,} {self.unit}{text}" + f"  {left / size:.1f} {unit} left" * (left > 0))


# ------------------------------------------------------------------ checkpoints and other files


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def check_config(config: Config) -> None:
    """Raise UserError on the first setting that is out of range, alone or beside the others."""
    for f in fields(config):
        value, about = getattr(config, f.name), f.metadata
        for v in value if isinstance(value, tuple) else (value,):
            if about["choices"] and v not in about["choices"]:
                raise UserError(f"{flag(f.name)} {v}: must be {' or '.join(about['choices'])}")
            if about["low"] is not None and not (about["low"] <= v <= about["high"] and math.isfinite(v)):
                raise UserError(f"{flag(f.name)} {v}: must be from {about['low']} to {about['high']}")
    sides = [config.size >> level for level in range(len(config.ch_mult))]
    for wrong, message in (
        (not sides or config.size % 2 ** (len(sides) - 1),
         f"--size {config.size}: cannot be halved to the {len(sides)} resolutions that --ch-mult names"),
        (set(config.attention) - set(sides), f"--attention: the feature maps have the sides {sides}"),
        (config.ch % math.lcm(4, config.groups), "--ch: must be a multiple of 4 and of --groups"),
        (alpha_bars(config)[-1] < 1e-30, f"--beta-T {config.beta_T}: leaves nothing of the image; lower it"),
        (config.sample_steps > config.timesteps, "--sample-steps: must be at most --timesteps"),
        (config.spacing and config.distance == "squared", "--spacing: its shares are of Euclidean distances"),
        (config.columns and config.columns.count(",") != 1, "--columns: name two, as ID,GRADE"),
    ):
        if wrong:
            raise UserError(message)


def draw_demo(root: Path) -> None:
    """Draw the embedded data set with data/demo.py, unless it is there."""
    command = [sys.executable, HERE / "data" / "demo.py", "--out", root]
    if subprocess.run(command, stdout=subprocess.DEVNULL).returncode:
        raise UserError(f"{root}: the embedded set cannot be drawn, see the line above; delete that folder")


def write_file(path: Path, write: Callable) -> None:
    """write(file) to a neighbour that then takes path's place: a kill or full disk leaves the old file whole."""
    neighbour = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(neighbour, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(neighbour, path)
    except (OSError, RuntimeError) as error:
        neighbour.unlink(missing_ok=True)
        if isinstance(error, RuntimeError) and "inline_container" not in str(error):  # torch.save, disk full
            raise
        raise UserError(f"{path}: cannot be written ({error}): free some space or choose another place; what "
                        "was saved before is intact") from None


def save_picture(picture: Image.Image, file: Path) -> None:
    write_file(file, partial(picture.save, format="PNG"))


def lock_folder(out: Path):
    """Make the folder and lock it: the lock ends with the file returned, or with the process."""
    try:
        import fcntl
    except ImportError:  # Windows
        return None
    out.mkdir(parents=True, exist_ok=True)
    lock = open(out / ".lock", "a")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"{out}: another process is writing there; wait, or choose another --out") from None
    return lock


def save_checkpoint(path: Path, config: Config, classes: Classes, model, ema, optimizer, step: int) -> None:
    state = dict(config=asdict(config), classes=asdict(classes), step=step, model=model.state_dict(),
                 ema=ema.state_dict(), optimizer=optimizer.state_dict())
    write_file(path, lambda file: torch.save(state, file))


def load_checkpoint(path: str | Path) -> tuple[Path, dict]:
    """(path, {config: Config, classes: Classes, step, ema, [model, optimizer]}) of a file or a run's folder.

    Runs no code from it; raises UserError where it is not a whole checkpoint.
    """
    path = Path(path).resolve()
    path = path / "checkpoint.pt" if path.is_dir() else path
    if not path.is_file():
        raise UserError(f"{path}: no such checkpoint; `python odm.py train` makes one")
    try:
        with zipfile.ZipFile(path) as archive:
            if archive.testzip():  # torch.load does not look at the checksums
                raise ValueError("a checksum is wrong")
        state = torch.load(path, map_location="cpu", weights_only=True)
        known, there = {f.name for f in fields(Config)}, set(state["config"])
        state["config"] = Config(**{name: value for name, value in state["config"].items() if name in known})
        state["classes"] = Classes(**state["classes"])
        check_config(state["config"])
        state["step"], state["ema"]
    except Exception as error:  # unpickling damaged or foreign files raises many kinds
        raise UserError(f"{path}: not a whole checkpoint of odm.py ({error}); take another") from None
    if known != there:
        say(f"{path}: of another version, which differs in the settings {', '.join(sorted(known ^ there))}")
    return path, state


def load_weights(path: str | Path, *pairs: tuple[nn.Module | torch.optim.Optimizer, dict]) -> None:
    """Load each (module or optimizer, its state) of a checkpoint."""
    try:
        for module, state in pairs:
            module.load_state_dict(state)
    except (RuntimeError, AttributeError, KeyError, TypeError, ValueError):
        raise UserError(f"{path}: its weights are not those of the network that --ch, --ch-mult, --blocks, "
                        "--attention describe, or not all there; take another") from None


def resume(path: Path, config: Config, classes: Classes, model: UNet, ema: UNet, optimizer) -> int:
    """Load the run's own checkpoint, if there is one, else that of --init; return the step reached."""
    if not path.exists() and config.init:
        weights = load_checkpoint(config.init)[1]["ema"]
        if weights["label.weight"].shape != model.label.weight.shape:  # other classes: a fresh embedding
            weights["label.weight"] = model.label.weight.detach()
        load_weights(config.init, (model, weights), (ema, weights))
    if not path.exists():
        return 0
    path, state = load_checkpoint(path)
    pairs = {flag(f.name): (getattr(state["config"], f.name), getattr(config, f.name))
             for f in fields(Config) if not f.metadata["may_change"]}
    pairs["the data"] = state["classes"], classes
    if differing := [f"{name} (there {a}, now {b})" for name, (a, b) in pairs.items() if a != b]:
        raise UserError(f"{path.parent}: holds a run with other settings: {', '.join(differing)}: use the same or "
                        "another --out")
    load_weights(path, (model, state.get("model")), (ema, state["ema"]), (optimizer, state.get("optimizer")))
    return state["step"]


# ------------------------------------------------------------------------------ command line


class Parser(argparse.ArgumentParser):
    """Errors in one line, exit status 2."""

    def error(self, message: str):
        self.exit(2, f"odm.py: error: {' '.join(message.split())}; see python {self.prog} --help\n")


def ints(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(",") if text)


def add_fields(command: Parser, names: Sequence[str], **kwargs) -> None:
    """Fields of Config as flags."""
    for f in (f for f in fields(Config) if f.name in names):
        about, default = f.metadata, f.default
        shown = ",".join(map(str, default)) if isinstance(default, tuple) else default
        text = about["help"].replace("%", "%%") + f" [{shown}]" * (shown != "")
        if isinstance(default, bool):
            command.add_argument(flag(f.name), action=argparse.BooleanOptionalAction, help=text, **kwargs)
        else:
            kind = ints if isinstance(default, tuple) else type(default)
            metavar = "|".join(about["choices"]) or {ints: "N,N", int: "N", float: "X", str: "TEXT"}[kind]
            command.add_argument(flag(f.name), type=kind, metavar=metavar, help=text, **kwargs)


def add_flags(command: Parser, flags: Sequence[tuple[str, type, str]]) -> None:
    for name, kind, text in flags:
        dest = "severity" if name == "--class" else name.strip("-")
        command.add_argument(name, type=kind, metavar="N" if kind is int else "TEXT", help=text, dest=dest)


def parser() -> Parser:
    options = dict(allow_abbrev=False, argument_default=argparse.SUPPRESS)  # what is not given is not set
    raw = argparse.RawDescriptionHelpFormatter
    top = Parser(prog="odm.py", description=__doc__, formatter_class=raw, **options)
    commands = top.add_subparsers(dest="command", required=True, metavar="train|sample|grade")

    command = commands.add_parser("train", help="train on a folder of graded images, or resume", **options)
    small = ", ".join(f"{name} {value}" for name, value in SMALL.items())
    command.add_argument("--preset", choices=("paper", "small"), help="paper: the defaults below; small, for two "
                         f"cores and some minutes: {small} [paper with --data, else small]")
    add_fields(command, [f.name for f in fields(Config)])

    command = commands.add_parser("sample", help="draw images, or move given ones to other severities", **options)
    flags = (
        ("--class", str, '3, "Mayo 3", 1.5 (between two), 0:3:0.25 (a series: one noise a row) or all [all]'),
        ("--checkpoint", str, "a checkpoint or the folder of a run [the newest in runs/, else data/demo.pt]"),
        ("-n", int, "images in all, classes at their training frequencies"),
        ("--each", int, "images of each severity [16 of one, else 8]"),
        ("--out", str, "folder for them [samples/RUN-STEP, of a series samples/RUN-STEP-series]"),
        ("--seed", int, "image i of a class depends on (seed, class, i) alone [0]"),
        ("--batch", int, "images drawn together [16 on a CPU, else 128]"),
        ("--device", str, "cpu, cuda, ... [the GPU if there is one]"),
        ("--image", str, "an image or a folder of them to move to --class [none: images are drawn from noise]"),
        ("--at", str, "the severity that the images have [read from them]"),
    )
    add_flags(command, flags)
    add_fields(command, ["sample_steps", "guidance", "eta", "precision", "compile"])

    command = commands.add_parser("grade", help="read the severity of images", **options)
    command.add_argument("images", nargs="+", metavar="IMAGE", help="image files, and folders of them")
    flags = [flag for flag in flags if flag[0] in ("--checkpoint", "--seed", "--device")]
    add_flags(command, [*flags, ("--out", str, "file for the CSV [standard output]"), ("--batch", int, "images at once [16]")])
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """The command line. Exit status: 0, 2 for what the user can mend, 130 and 143 for Ctrl-C and SIGTERM."""
    args = vars(parser().parse_args(argv))
    try:
        command = args.pop("command")
        if command == "train":
            preset = args.pop("preset", "paper" if args.get("data") else "small")
            train(Config(**{**(SMALL if preset == "small" else {}), **args}))
        elif command == "grade":
            grade(**args)
        else:
            sample(**args)
        if dist.is_initialized():
            dist.destroy_process_group()
        return 0
    except KeyboardInterrupt:
        message, status = "stopped; the same command goes on", 130
    except (UserError, OSError) as error:
        message, status = str(error), 2
    except (RuntimeError, MemoryError) as error:
        message, status = "out of memory: lower --batch, or --size where the images alone are too many", 2
        if isinstance(error, dist.DistError) or "gloo" in str(error):
            message = "the connection to another process is lost"
        elif not out_of_memory(error):
            raise
    if int(os.environ.get("LOCAL_RANK", 0)) == 0:  # what goes wrong in one process ends them all: one says it
        print(f"odm.py: error: {' '.join(message.split())}", file=sys.stderr)
    return status


def out_of_memory(error: BaseException) -> bool:
    """Whether this is how torch or numpy, on a GPU or a CPU, say that memory ran out."""
    words = "out of memory|not enough memory|allocate memory|ALLOC_FAILED"
    return isinstance(error, MemoryError) or bool(re.search(words, str(error)))


if __name__ == "__main__":
    sys.exit(main())
