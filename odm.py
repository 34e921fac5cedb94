# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.5", "numpy", "pillow>=10.3"]
# ///
"""The Ordinal Diffusion Model: one script, read from top to bottom.

    S. Takezaki and S. Uchida, "An Ordinal Diffusion Model for Generating Medical Images with
    Different Severity Levels", ISBI 2024, arXiv 2403.00452.

    python odm.py train                       # makes the synthetic frames, trains the small preset
    python odm.py train --data data/limuc     # the paper's settings on LIMUC
    python odm.py sample --class 3            # images of severity 3, by the newest run
    python odm.py sample --class 0:3:0.25     # the same noise at rising severity

Where the paper's equations are:

    Eq. 1  the forward process, x_{t-1} -> x_t     alpha_bars, q_sample (t steps in one)
    Eq. 2  one step of the backward process        ddim (eta = 1, every t, clip = False; see there)
    Eq. 3  L_DM, the loss of a diffusion model     dm_loss
    Eq. 4  the order of the noise estimates        what ordinal_loss asks for
    Eq. 5  L_ordinal, the ordinal relationship     ordinal_loss; which estimates it gets: Batch
    Eq. 6  d, the distance of two noise estimates  noise_distance (default: the Euclidean norm)
    Eq. 7  three estimates on a line, in order     straightness (= 1 where it holds)
    Eq. 8  L_total = L_DM + lambda_t L_ordinal     total_loss

and its symbols: x_0 a clean image in [-1, 1], x_t the same after t of T noising steps, eps the noise
in it, eps_hat the network's estimate eps_theta(x_t, t, c), c a class, p < q < r three classes in
ascending severity. In the shapes: B images of a step, R rows of the network, G triplets, C classes.
Classes are numbered 0 to C-1 (the paper counts from 1); index C is the null class of guidance.

The method comes first and is whole: noise, losses, sampling, the U-Net, settings, one step, the training
loop. After the line "the method ends here" follow images, checkpoints, pictures and the command line.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# ------------------------------------------------------------------- forward process (Eq. 1)


def alpha_bars(config: Config) -> Tensor:
    """alpha_bar_t = alpha_1 ... alpha_t for t = 0..T: (T+1,) float64, with alpha_bar_0 = 1.

    alpha_t = 1 - beta_t and beta_t = (beta_T - beta_1) (t - 1) / (T - 1) + beta_1 (below Eq. 1).
    """
    beta = torch.linspace(config.beta_1, config.beta_T, config.timesteps, dtype=torch.float64)
    return torch.cat([beta.new_ones(1), (1 - beta).cumprod(0)])


def q_sample(x_0: Tensor, t: Tensor, eps: Tensor, alpha_bar: Tensor) -> Tensor:
    """x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) eps: Eq. 1 applied t times.

    x_0, eps: (B, ...); t: (B,) long in 0..T; alpha_bar: (T+1,) float64, on their device. At t = 0 it is x_0.
    """
    alpha_bar_t = alpha_bar[t].view(-1, *[1] * (x_0.dim() - 1))
    return alpha_bar_t.sqrt().to(x_0) * x_0 + (1 - alpha_bar_t).sqrt().to(x_0) * eps


# --------------------------------------------------------------------- losses (Eqs. 3 and 5 to 7)


def dm_loss(eps: Tensor, eps_hat: Tensor) -> Tensor:
    """L_DM of Eq. 3, as the mean over the entries of each image (see noise_distance): (B, ...) -> (B,)."""
    return (eps - eps_hat).square().flatten(1).mean(1)


def noise_distance(a: Tensor, b: Tensor, distance: str = "euclidean") -> Tensor:
    """d of Eq. 6 between noise estimates: (G, ...) and (G, ...) -> (G,).

    `euclidean` is the root mean square of a - b; `squared` is the mean square, as Eq. 6 prints it, which
    contradicts Eq. 7 (see ordinal_loss). The paper sums over the D = 3 H W entries of an image; we take
    means, here and in dm_loss. With `euclidean` that divides all of Eq. 8 by D and keeps its balance at any
    image size. With `squared` it divides L_ordinal by D^2: the balance as printed takes --ordinal D.
    """
    difference = (a.float() - b.float()).flatten(1)
    if distance == "squared":
        return difference.square().mean(1)
    norm = torch.linalg.vector_norm(difference, dim=1)  # unlike a root, its gradient at 0 is 0, not nan
    return norm / math.sqrt(difference.shape[1])


def ordinal_loss(p: Tensor, q: Tensor, r: Tensor, distance: str = "euclidean") -> Tensor:
    """L_ordinal of Eq. 5, of G triplets of noise estimates, of classes p < q < r: (G, ...) each -> (G,).

    With distance="euclidean" it is zero where q lies between p and r on a line (Eq. 7), by the triangle
    inequality. With "squared", Eq. 6 as printed, d(p,r) - d(p,q) - d(q,r) is 2 <p-q, q-r>, which is zero
    where the angle at q is a right angle instead.
    """
    d_pq, d_qr, d_pr = (noise_distance(a, b, distance) for a, b in ((p, q), (q, r), (p, r)))
    return (d_pr - (d_pq + d_qr)).square()


def straightness(eps_hat: Tensor) -> Tensor:
    """d(p,r) / (d(p,q) + d(q,r)), mean over the triplets of C >= 3 classes: (B, C, ...) -> (B,) in [0, 1].

    A measure, not a loss. 1 when the estimates lie on a line in order (Eq. 7); 0.5 for an equilateral
    triangle. Estimates that coincide count as 1: a network that ignores the class is straight too.
    """
    ratios = []
    for p, q, r in itertools.combinations(eps_hat.unbind(1), 3):
        path = noise_distance(p, q) + noise_distance(q, r)
        ratios.append(torch.where(path > 0, noise_distance(p, r) / path, 1.0))
    return torch.stack(ratios).mean(0)


# ----------------------------------------------------------- sampling: DDIM (Eq. 2) and guidance


def ddim(eps_fn: Callable, x: Tensor, alpha_bar: Tensor, times: Sequence[int], eta: float = 0.0,
         clip: bool = True, noise: Callable = torch.randn_like) -> Tensor:
    """Take x from t = times[0] to t = times[-1] by DDIM (Song et al. 2021, Eq. 12): (B, ...) -> (B, ...).

    Falling times sample: noise x_T of N(0, I) becomes an image. Rising times encode: an image becomes the x_T
    that leads back to it (their Section 4.3; eta = 0, clip = False). Either way eps_fn(x, t), t (B,) long, is
    asked at the larger time of a step.
    eta = 0 is deterministic; with eta > 0 noise(x) gives z. `clip` keeps the estimate of x_0 in [-1, 1], as
    Ho et al. do.

    eta = 1, all T steps, clip = False is Eq. 2 but for two things. Its denominator reads sqrt(1 - alpha_t), a
    misprint of sqrt(1 - alpha_bar_t). And sigma_t^2, there beta_t, is the posterior's variance here,
    beta_t (1 - alpha_bar_{t-1}) / (1 - alpha_bar_t).
    """
    if times[0] < times[-1] and (eta or clip):
        raise ValueError("rising times encode: they take eta = 0 and clip = False")
    abar = alpha_bar.tolist()
    for t, u in itertools.pairwise(times):  # from x_t to x_u, u being the next time
        abar_t, abar_u = abar[t], abar[u]
        eps_hat = eps_fn(x, torch.full((len(x),), max(t, u), device=x.device))
        x_0 = (x - math.sqrt(1 - abar_t) * eps_hat) / math.sqrt(abar_t)
        if clip:
            x_0 = x_0.clamp(-1, 1)
            eps_hat = (x - math.sqrt(abar_t) * x_0) / math.sqrt(1 - abar_t)
        sigma = eta * math.sqrt((1 - abar_u) / (1 - abar_t) * (1 - abar_t / abar_u)) if eta else 0.0
        x = math.sqrt(abar_u) * x_0 + math.sqrt(max(1 - abar_u - sigma**2, 0)) * eps_hat  # max: rounding
        if sigma > 0:
            x = x + sigma * noise(x)
    return x


def guided_eps(model: UNet, position: Tensor, scale: float) -> Callable:
    """The function eps_fn(x_t, t) of ddim: noise estimates at positions, with classifier-free guidance.

    position (B,) float: a class in 0..C-1, or (ours) a severity between two; 1.5 is half the estimate of
    class 1 and half that of class 2. The estimate is null + s (class - null), that is s class + (1 - s) null,
    with s the scale and null the estimate of the null class. s = 1 is the conditional model (Ho & Salimans
    write w = s - 1; we read the paper's scale of 2 as s).
    """
    classes = torch.arange(model.num_classes, device=position.device)
    share = (1 - (position[:, None] - classes).abs()).clamp(min=0)  # (B, C)
    weights = torch.cat([scale * share, torch.full_like(share[:, :1], 1 - scale)], dim=1)  # (B, C+1)
    row, label = weights.nonzero(as_tuple=True)  # what has no weight is not evaluated
    weight = weights[row, label].view(-1, 1, 1, 1)

    def eps_fn(x_t: Tensor, t: Tensor) -> Tensor:  # (B, 3, H, W), (B,) -> (B, 3, H, W)
        return torch.zeros_like(x_t).index_add(0, row, weight * model(x_t[row], t[row], label))

    return eps_fn


def equal_steps(config: Config) -> list[int]:
    """The times of ddim: T ... 0 in config.sample_steps equal steps."""
    return torch.linspace(config.timesteps, 0, config.sample_steps + 1).round().long().tolist()


def to_unit(images: Tensor) -> Tensor:
    """uint8 0..255 -> float -1..1."""
    return images.float() / 127.5 - 1


def to_uint8(x: Tensor) -> Tensor:
    """float -1..1 -> uint8 0..255, rounded to the nearest: the inverse of to_unit."""
    return ((x + 1) * 127.5).round().clamp(0, 255).byte()


@torch.no_grad()
def sample_images(model: UNet, positions: Sequence[float], keys: Sequence[tuple]) -> Tensor:
    """Images sampled at positions in 0..C-1: (B, 3, size, size) uint8 on the CPU.

    All noise of row i comes from keys[i] alone: it is the same image, up to rounding, in any batch.
    """
    config, device = model.config, model.label.weight.device
    rngs = [torch.Generator().manual_seed(seed_of("sample", *key)) for key in keys]

    def noise(x=None):
        drawn = [torch.randn(3, config.size, config.size, generator=rng) for rng in rngs]
        return torch.stack(drawn).to(device)

    eps_fn = guided_eps(model, torch.tensor(positions, device=device), config.guidance)
    x_0 = ddim(eps_fn, noise(), alpha_bars(config), equal_steps(config), config.eta, noise=noise)
    return to_uint8(x_0).cpu()


# ----------------------------- U-Net of Ho et al. (2020), as published, with a class embedding

NEARLY_ZERO = 1e-5  # gain of the last layer of the network and of each branch (Ho et al.: variance 1e-10)


def glorot(layer: nn.Module, gain: float = 1.0) -> nn.Module:
    """Glorot-uniform weights and zero biases."""
    nn.init.xavier_uniform_(layer.weight, gain)
    nn.init.zeros_(layer.bias)
    return layer


def conv(c_in: int, c_out: int, kernel: int = 3, gain: float = 1.0) -> nn.Module:
    return glorot(nn.Conv2d(c_in, c_out, kernel, padding=kernel // 2), gain)


def branch_precision(x: Tensor, config: Config):
    """Within the residual branches alone, bfloat16 where --precision asks for it (build decides `auto`).

    If all were rounded, estimates of size 1 would err by up to 0.004, as much as the classes differ in at
    large t. Inside a branch only what it adds to x is rounded; x itself stays float32. (On a GPU the few
    convolutions outside the branches multiply in TF32, PyTorch's default, 8 times finer than bfloat16.)
    """
    return torch.autocast(x.device.type, torch.bfloat16, enabled=config.precision == "bfloat16")


def time_embedding(t: Tensor, ch: int) -> Tensor:
    """[sin, cos] of t at ch/2 frequencies exp(-i ln(10000) / (ch/2 - 1)): (B,) -> (B, ch)."""
    half = ch // 2
    frequency = torch.exp(torch.arange(half, device=t.device) * (-math.log(10000) / (half - 1)))
    angle = t[:, None].float() * frequency
    return torch.cat([angle.sin(), angle.cos()], dim=1)


class Dropout(nn.Dropout):
    """Dropout in which rows of one root (see Batch) share their mask. With three masks, the estimates of a
    triplet would differ by a noise that no loss could put on a line."""

    def forward(self, h: Tensor, root: Tensor | None = None) -> Tensor:
        if root is None or self.p == 0:
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
        with branch_precision(x, self.config):
            h = self.norm(x)
            q, k, v = (f(h).flatten(2).mT.unsqueeze(1) for f in (self.q, self.k, self.v))  # (R, 1, HW, ch)
            h = F.scaled_dot_product_attention(q, k, v)  # softmax(q k' / sqrt(ch)) v
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
        with branch_precision(x, self.config):
            h = self.conv1(F.silu(self.norm1(x)))
            h = h + self.emb(F.silu(emb))[:, :, None, None]
            h = self.conv2(self.dropout(F.silu(self.norm2(h)), root))
        return self.attention(self.shortcut(x) + h)


class UNet(nn.Module):
    """eps_theta(x_t, t, c). With the paper's settings: 35,746,307 parameters plus the class embedding."""

    def __init__(self, config: Config, num_classes: int):
        super().__init__()
        ch, c_emb, side = config.ch, 4 * config.ch, config.size
        self.config, self.num_classes = config, num_classes
        self.time = nn.Sequential(glorot(nn.Linear(ch, c_emb)), nn.SiLU(), glorot(nn.Linear(c_emb, c_emb)))
        self.label = nn.Embedding(num_classes + 1, c_emb)  # the last row is the null class
        self.conv_in = conv(3, ch)
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        width, skips = ch, [ch]
        for level, mult in enumerate(config.ch_mult):
            for _ in range(config.blocks):
                self.down.append(Block(width, mult * ch, side in config.attention, config))
                width = mult * ch
                skips.append(width)
            if level < len(config.ch_mult) - 1:
                halve = glorot(nn.Conv2d(width, width, 3, stride=2))
                self.down.append(nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), halve))  # padded right and below
                skips.append(width)
                side //= 2
        self.middle = nn.ModuleList([Block(width, width, True, config), Block(width, width, False, config)])
        for level, mult in reversed(list(enumerate(config.ch_mult))):
            for _ in range(config.blocks + 1):
                self.up.append(Block(width + skips.pop(), mult * ch, side in config.attention, config))
                width = mult * ch
            if level > 0:
                self.up.append(nn.Sequential(nn.Upsample(scale_factor=2), conv(width, width)))  # nearest
                side *= 2
        self.norm_out = nn.GroupNorm(config.groups, width, eps=1e-6)
        self.conv_out = conv(width, 3, gain=NEARLY_ZERO)

    def forward(self, x_t: Tensor, t: Tensor, c: Tensor, root: Tensor | None = None) -> Tensor:
        """x_t (R, 3, H, W), t (R,) long in 1..T, c (R,) long in 0..C, C being the null class -> (R, 3, H, W).

        root (R,) long: which dropout mask each row takes (None: each its own).
        """
        emb = self.time(time_embedding(t, self.config.ch)) + self.label(c)
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


# ---------------------------------------------------------------------------------- settings


def setting(default, help: str, low=None, high=2**31, choices=None):
    """A field of Config, with its range."""
    return field(default=default, metadata=dict(help=help, low=low, high=high, choices=choices))


@dataclass
class Config:
    """Every setting of a training run, its default and where that comes from. Fields are flags of `train`."""

    # method
    timesteps: int = setting(1000, "T, steps of the forward process (paper)", 1, 100_000)
    beta_1: float = setting(1e-4, "noise schedule at t = 1 (paper)", 1e-8, 0.999)
    beta_T: float = setting(0.02, "noise schedule at t = T (paper)", 1e-8, 0.999)
    ordinal: float = setting(1.0, "W, a factor on lambda_t (paper: 1); 0: the plain diffusion model", 0.0)
    triplets: str = setting("labels", "labels: one x_t under three labels (ours); images: three images, "
                            "with one noise (Eqs. 4 to 7 as printed)",
                            choices=("labels", "images"))
    triplet_part: float = setting(0.125, "triplets for each image of a step; at least one (ours)", 1e-6, 1.0)
    distance: str = setting("euclidean", "d of Eq. 6; squared: as printed, which contradicts Eq. 7",
                            choices=("euclidean", "squared"))
    balance: str = setting("data", "how often each class is taken: as in the data (Eq. 3) or evenly",
                           choices=("data", "uniform"))
    class_dropout: float = setting(0.1, "probability of the null class (Ho & Salimans)", 0.0, 0.99)
    sample_steps: int = setting(100, "DDIM steps (paper)", 1)
    guidance: float = setting(2.0, "s of classifier-free guidance (paper: 2, read as s); 1: none", 0.0)
    eta: float = setting(0.0, "0: DDIM (paper); 1: fresh noise at each step, as in Eq. 2, which corrects "
                         "errors of a briefly trained network", 0.0, 1.0)
    # network
    size: int = setting(64, "image side in pixels (paper)", 4, 1024)
    ch: int = setting(128, "channels at full resolution (Ho et al.)", 4)
    ch_mult: tuple = setting((1, 2, 2, 2), "channel multiplier of each resolution (Ho et al., CIFAR-10)", 1)
    blocks: int = setting(2, "residual blocks at each resolution (Ho et al.)", 1)
    attention: tuple = setting((16,), "sides of the feature maps with self-attention (Ho et al.)", 1)
    groups: int = setting(32, "of GroupNorm (Ho et al.)", 1)
    dropout: float = setting(0.1, "dropout in the residual blocks (Ho et al.)", 0.0, 0.99)
    # training
    batch: int = setting(32, "images a step, over all processes (paper)", 1)
    steps: int = setting(200_000, "training steps (paper)", 1)
    lr: float = setting(1e-4, "Adam's learning rate (paper)", 0.0)
    warmup: int = setting(5000, "steps of linear warm-up (Ho et al.)", 0)
    decay: float = setting(0.0, "part of --steps, at its end, in which lr falls to 0 (ours)", 0.0, 1.0)
    ema: float = setting(0.9999, "decay of the averaged weights that sampling uses (Ho et al.)", 0.0, 1.0)
    flip: bool = setting(True, "random horizontal flips (Ho et al.)")
    seed: int = setting(0, "step i's images and noise depend on (seed, i, process) alone", 0, 2**63 - 1)
    # data
    data: str = setting("", "folder of class folders, or a CSV of grades (none: the synthetic frames)")
    order: str = setting("", "class names in ascending severity, A,B,C (where names carry no number)")
    columns: str = setting("", "ID,GRADE: columns of the CSV (image,level and id_code,diagnosis are known)")
    crop: int = setting(0, "side of the centre crop; 0: 128 of 352x288 (paper), the middle square of others; "
                        "smaller images: the middle square", 0)
    held_out: str = setting("", "unseen images, read like --data: their loss becomes a column of metrics.csv")
    out: str = setting("", "folder of the run (none: runs/NAME, after the data)")
    init: str = setting("", "start from the averaged weights of this checkpoint")
    # machine
    log_every: int = setting(100, "steps between rows of metrics.csv; one more at each checkpoint", 1)
    save_every: int = setting(2000, "steps between checkpoints", 1)
    sheet_every: int = setting(10_000, "steps between sheets of samples; 0: at the end", 0)
    device: str = setting("auto", "cpu, cuda, ...; auto: the GPU if there is one")
    precision: str = setting("auto", "of the residual branches; auto: bfloat16 on a GPU that has it",
                             choices=("auto", "float32", "bfloat16"))
    compile: str = setting("auto", "torch.compile; auto: on a GPU", choices=("auto", "on", "off"))


# The small preset, for two cores and a few minutes: 32x32 images, 1.1 M parameters. Two groups, since more
# would normalise the mean colour away in a network as narrow as this.
SMALL = dict(size=32, ch=32, ch_mult=(1, 2, 2), blocks=1, attention=(8,), groups=2, dropout=0.0, batch=8,
             steps=1600, lr=2e-3, warmup=100, decay=0.5, ema=0.999, sample_steps=50, guidance=1.25, eta=1.0,
             save_every=200, sheet_every=800)


# ------------------------------------------------------------------- one training step (Eq. 8)


@dataclass
class Batch:
    """One step's R = B + 3G rows of the network: B images under their own or the null label, which L_DM
    reads, and G triplets p < q < r, which L_ordinal reads.

    With B = 4 and G = 1 the rows are 0 1 2 3 | p q r, and their roots 0 1 2 3 | 0 0 0. Triplet g takes the
    noise, t, flip and dropout mask of image g, its root, and is labelled with its class and two others.
    By default its rows show the root itself, one x_t under three labels. This is ours. Eqs. 4 to 7 print
    x_{t,p}, x_{t,q}, x_{t,r}, as if each row showed an image of its class (`--triplets images`). But each
    estimate then carries its own image's error as well, and in trials two classes came out alike.
    """

    image: Tensor  # (R,) indices into the data set
    label: Tensor  # (R,) the class that a row is shown as; C is the null class
    root: Tensor  # (R,) 0..B-1: the image whose noise, t, flip and mask a row takes
    t: Tensor  # (B,) timesteps 1..T
    flip: Tensor  # (B,) mirrored or not

    def to(self, device: torch.device) -> Batch:
        return Batch(*(value.to(device) for value in vars(self).values()))


def draw_batch(labels: Tensor, num_classes: int, config: Config, B: int, rng: torch.Generator) -> Batch:
    """The Batch of one step, by rng. labels (N,): each image's class."""
    G = max(1, round(B * config.triplet_part)) if config.ordinal > 0 and num_classes >= 3 else 0

    def one_of(classes: Tensor) -> Tensor:
        """For each entry, a random image of that class."""
        return (labels == classes[:, None]).float().multinomial(1, generator=rng)[:, 0]

    if config.balance == "uniform":
        image = one_of(torch.randint(num_classes, (B,), generator=rng))
    else:  # Eq. 3: each class as often as in the data
        image = torch.randint(len(labels), (B,), generator=rng)
    t = torch.randint(1, config.timesteps + 1, (B,), generator=rng)
    flip = (torch.rand(B, generator=rng) < 0.5) & config.flip
    null = torch.rand(B, generator=rng) < config.class_dropout  # a coin for each image
    own = labels[image]

    not_own = 1 - F.one_hot(own[:G], num_classes)
    others = not_own.float().multinomial(2, generator=rng)  # two of the other classes
    pqr = torch.cat([own[:G, None], others], dim=1).sort(1).values.flatten()  # p < q < r
    root = torch.cat([torch.arange(B), torch.arange(G).repeat_interleave(3)])
    shown = image[root]
    if config.triplets == "images":
        shown[B:] = one_of(pqr)
    return Batch(shown, torch.cat([own.masked_fill(null, num_classes), pqr]), root, t, flip)


def total_loss(model: Callable, x_0: Tensor, eps: Tensor, batch: Batch, alpha_bar: Tensor, config: Config):
    """Eq. 8, L_total = L_DM + lambda_t L_ordinal, with lambda_t = W t / T, W = config.ordinal.

    x_0 (R, 3, H, W): the clean images of the rows; eps (B, 3, H, W): the noise of the roots. One forward
    pass serves both losses. Returns the scalars (L_total, L_DM, lambda_t L_ordinal).
    """
    B, t = len(eps), batch.t[batch.root]
    x_t = q_sample(x_0, t, eps[batch.root], alpha_bar)
    eps_hat = model(x_t, t, batch.label, batch.root)
    dm = dm_loss(eps, eps_hat[:B]).mean()
    if len(eps_hat) == B:  # the plain diffusion model
        return dm, dm, torch.zeros_like(dm)
    p, q, r = eps_hat[B:].unflatten(0, (-1, 3)).unbind(1)  # (G, 3, H, W) each
    lambda_t = config.ordinal * t[B::3] / config.timesteps  # a triplet has one t
    ordinal = (lambda_t * ordinal_loss(p, q, r, config.distance)).mean()
    return dm + ordinal, dm, ordinal


def learning_rate(config: Config, step: int) -> float:
    """Of step 0, 1, ...: a linear warm-up, then constant, and a linear fall to 0 over the part `decay`."""
    rising = (step + 1) / max(config.warmup, 1)
    falling = (config.steps - step) / max(config.decay * config.steps, 1)
    return config.lr * min(1, rising, falling)


def training_step(net: nn.Module, ema: nn.Module, optimizer: torch.optim.Adam, images: Tensor, batch: Batch,
                  alpha_bar: Tensor, config: Config, step: int) -> Tensor:
    """Step 0, 1, ... of Adam on Eq. 8, and of the averaged weights. images (N, 3, H, W) uint8: the data set.

    Returns (4,): L_total, L_DM, lambda_t L_ordinal and the norm of the gradient.
    """
    x_0 = to_unit(images[batch.image])
    x_0 = torch.where(batch.flip[batch.root].view(-1, 1, 1, 1), x_0.flip(-1), x_0)
    eps = torch.randn(len(batch.t), *x_0.shape[1:], device=x_0.device)
    losses = total_loss(net, x_0, eps, batch, alpha_bar, config)
    optimizer.zero_grad()
    losses[0].backward()
    grad_norm = nn.utils.clip_grad_norm_(net.parameters(), 1.0)  # Ho et al.
    optimizer.param_groups[0]["lr"] = learning_rate(config, step)
    optimizer.step()
    keep = min(config.ema, (step + 2) / (step + 11))  # TensorFlow's: it rises, to forget the first weights
    with torch.no_grad():
        for average, weight in zip(ema.parameters(), net.parameters()):
            average.lerp_(weight, 1 - keep)
    return torch.stack([*losses, grad_norm]).detach()


# ------------------------------------------------------------------------------ training loop


def train(config: Config) -> Path:
    """Train, or resume, the run in config.out and return that folder: checkpoint.pt, metrics.csv, sheet.png.

    The loop is all that belongs to the method; what it calls for files and machines follows below it. Under
    torchrun each process takes its share of the batch.
    """
    check_config(config)
    device, out = start(config.device), folder_of(config)
    images, labels, names, unseen = training_data(config)
    torch.manual_seed(seed_of("weights", config.seed))
    model = build(config, len(names), device)
    ema = copy.deepcopy(model).eval().requires_grad_(False)
    optimizer = torch.optim.Adam(model.parameters(), lr=config.lr, fused=True)
    # Run loads a checkpoint into them, where there is one.
    run = Run(out, config, names, labels, images, unseen, dict(model=model, ema=ema, optimizer=optimizer))
    images, alpha_bar, net = images.to(device), alpha_bars(config).to(device), parallel(model)

    model.train()
    with stop_signals() as stop:
        for step in range(run.step, config.steps):
            rng = torch.Generator().manual_seed(seed_of("batch", config.seed, step, RANK))
            batch = draw_batch(labels, len(names), config, config.batch // WORLD, rng).to(device)
            torch.manual_seed(seed_of("eps", config.seed, step, RANK))  # of eps and of dropout
            losses = training_step(net, ema, optimizer, images, batch, alpha_bar, config, step)
            run.after_step(step + 1, losses, stop)  # metrics, checkpoint, sheet
    return out


# ==================================================================== the method ends here
# What follows makes it usable: images and their classes, runs, checkpoints, sampling, pictures, command line.

import argparse
import contextlib
import csv
import hashlib
import json
import os
import re
import runpy
import signal
import sys
import time
import unicodedata
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields, replace
from datetime import timedelta
from functools import partial

import numpy as np
import torch.distributed as dist
from PIL import Image, ImageDraw, ImageOps, PngImagePlugin

HERE = Path(__file__).resolve().parent
RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # set by torchrun
LOCAL_RANK = int(os.environ.get("LOCAL_RANK", 0))


class UserError(Exception):
    """Something the user can mend: one line that names the file or flag and says what to do."""


# ---------------------------------------------------------------------- images and their classes

SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"}
TABLES = {".csv", ".tsv", ".txt"}
PngImagePlugin.MAX_TEXT_CHUNK = 2**26  # a large colour profile is no attack
nfc = partial(unicodedata.normalize, "NFC")  # an accented letter as one; a Mac may name files with two


def list_files(root: Path) -> list[Path]:
    """All files below root, sorted, those in linked folders too, but not hidden ones.

    It says which folders it passes over: runs and samples of this program, and links to a folder within root
    or above it.
    """

    def fail(error: OSError):  # a folder that may not be read must not pass for an empty one
        raise error

    found, top = [], root.resolve()
    for folder, subfolders, files in os.walk(root, onerror=fail, followlinks=True):
        link = os.path.islink(folder) and Path(folder).resolve()
        second_name = link and (link.is_relative_to(top) or top.is_relative_to(link))
        ours = "sample.json" in files or {"checkpoint.pt", "metrics.csv"} <= set(files)
        if Path(folder) != root and (ours or second_name):
            say(f"{folder}: passed over, {'a run or samples of odm.py' if ours else 'a second name'}")
            subfolders.clear()
            continue
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        pictures = {"sheet.png", "series.gif"} if ours else set()  # these show images that lie below
        found += [Path(folder, name) for name in set(files) - pictures if not name.startswith(".")]
    return sorted(found)


def is_image(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES


def read_image(path: str | Path) -> Image.Image:
    """An image file as RGB: turned upright (EXIF), 16 bits scaled to 8, on black where transparent."""
    try:
        with Image.open(path) as image:  # which refuses more than 179 million pixels
            if image.mode in ("I", "F"):
                raise ValueError("pixels of 32 bits have no known range; save it with 8 or 16")
            if getattr(image, "n_frames", 1) > 1 and image.format != "MPO":  # a camera's, with its preview
                raise ValueError(f"{image.n_frames} pictures in one file; save the graded one alone")
            if image.mode.startswith("I;16") and getattr(image, "tag_v2", {}).get(262) == 0:
                raise ValueError("white is 0 in it; save it with black as 0")
            sixteen_bits = image.mode.startswith("I;16") or ";16" in str(image.tile)
            image = ImageOps.exif_transpose(image)
            if image.mode.startswith("I;16"):  # converting to RGB would clip it
                image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))  # as Pillow cuts colours
            if image.has_transparency_data:
                image = Image.alpha_composite(Image.new("RGBA", image.size, "black"), image.convert("RGBA"))
            image = image.convert("RGB")
            if sixteen_bits and np.max(image) < 16:
                raise ValueError("its 16 bits hold 12 or fewer, which would be almost black; scale them up")
            return image
    except Exception as error:  # Pillow's decoders raise many kinds on damaged files
        raise UserError(f"{path}: not readable as an image ({error}); repair or remove it") from None


def read_square(path: str | Path, size: int, crop: int = 0) -> Tensor:
    """The middle crop x crop pixels of an image file (0: see Config), resized: (3, size, size) uint8.

    Of a smaller image, as those that `sample` wrote, all of the middle square.
    """
    image = read_image(path)
    crop = crop or (128 if image.size == (352, 288) else math.inf)  # Section 4.1.1
    side = min(crop, *image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    image = image.resize((size, size), Image.Resampling.BICUBIC, box=(left, top, left + side, top + side))
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def read_squares(paths: Sequence[Path], **how) -> Tensor:
    """read_square of every file: (N, 3, size, size) uint8."""
    images, progress = [], progress_of(len(paths), "images read")
    with ThreadPoolExecutor() as pool:
        for image in pool.map(partial(read_square, **how), paths):
            images.append(image)
            progress(len(images))
    return torch.stack(images)


def by_number(names: set[str]) -> dict[str, float]:
    """{name: the number in it}, ascending; {} where a name has none or several, or two have the same one.

    -1, .5 and 10 are numbers as a whole; the hyphen of grade-1 is no minus.
    """
    found = {name: re.findall(r"(?:(?<!\w)-)?(?:\d+(?:\.\d+)?|(?<!\w)\.\d+)", name) for name in names}
    number = {float(numbers[0]): name for name, numbers in found.items() if len(numbers) == 1}
    return {number[n]: n for n in sorted(number)} if len(number) == len(names) else {}


def some_of(names) -> str:
    """At most twelve of the names, for a message."""
    return ", ".join(sorted(names)[:12]) + " ..." * (len(names) > 12) or "none"


def ending(path: str) -> list[str]:
    """Name and folders of a file or an ID, nearest first, for comparison: without capitals and without the
    suffix of an image."""
    path = Path(nfc(path).strip().casefold().replace("\\", "/"))
    return [part.strip() for part in (path.with_suffix("") if is_image(path) else path).parts[::-1]]


def grades_from_csv(file: Path, paths: Sequence[Path], columns: str) -> tuple[dict, list[str]]:
    """({path: [grade]}, IDs that fit no path) by two columns of a CSV (commas, semicolons or tabs).

    An ID fits a file if their names agree, and their folders as far as both have some.
    """
    utf16 = file.read_bytes()[:2] in (b"\xff\xfe", b"\xfe\xff")
    text = nfc(file.read_text("utf-16" if utf16 else "utf-8-sig", errors="replace"))
    delimiter = max(",;\t", key=text.partition("\n")[0].count)
    try:
        header, *rows = csv.reader(text.splitlines(), delimiter=delimiter, strict=True)
        if longer := [row for row in rows if any(row[len(header):])]:  # as an unquoted 1,5 makes it
            raise ValueError(f"{delimiter.join(longer[0])[:200]}: more values than columns")
    except (csv.Error, ValueError) as error:
        raise UserError(f"{file}: not readable as a CSV ({error}); repair it") from None
    known = [name.strip().lower() for name in header]
    wanted = [columns] if columns else ["image,level", "id_code,diagnosis"]  # of EyePACS, of APTOS
    pairs = [[name.strip().lower() for name in pair.split(",")] for pair in wanted]
    pair = next((pair for pair in pairs if [known.count(name) for name in pair] == [1, 1]), None)
    if not pair:
        raise UserError(f"{file}: no columns {' or '.join(wanted)}, but {', '.join(header)[:200]}; name two "
                        "with --columns ID,GRADE")
    named = defaultdict(list)
    for path in paths:
        parts = ending(str(path.relative_to(file.parent)))
        named[parts[0]].append((path, parts))
    grade_of, unmatched = {}, []
    for row in filter(any, rows):
        id, grade = (dict(zip(known, row)).get(column, "").strip() for column in pair)
        parts = ending(id) or [""]
        fits = [path for path, others in named[parts[0]] if all(a == b for a, b in zip(parts, others))]
        fits = [path for path in fits if re.split(r"[\\/]", id)[-1] in (path.name, path.stem)] or fits
        if len(fits) > 1:
            raise UserError(f"{file}: {id} fits {fits[0]} and {fits[1]}; put the CSV above one of them alone")
        if re.fullmatch(r"[+-]?(\d{1,9}([.,]\d+)?|[.,]\d+)", grade):
            grade = f"{float(grade.replace(',', '.')):.10g}"  # 2.0 is 2
        if not fits:
            unmatched.append(id)
        elif grade and grade_of.setdefault(fits[0], [grade]) != [grade]:
            raise UserError(f"{file}: gives {id} a second grade; remove one of the two")
    if not grade_of:
        raise UserError(f"{file}: no row with a grade fits an image below {file.parent}; an ID is "
                        f"{[*unmatched, 'missing'][0]}, an image {paths[0].name}")
    return grade_of, unmatched


def ordered_classes(names_of: Sequence[Sequence[str]], order: str, data: str | Path, hint: str) -> list[str]:
    """The classes in ascending severity, of the names that each image could have, nearest first."""
    names = [name.strip() for name in nfc(order).split(",")] if order else []
    levels = [set(level) - {None} for level in itertools.zip_longest(*names_of)] or [set()]
    there = set().union(*levels)
    if len(there.intersection(names)) < len(names):
        raise UserError(f"{data}: --order {order} must name each class once, of {some_of(there)}{hint}")
    if not names and by_number(levels[0]) and any(
            1 < len(level) <= 12 and by_number(level) for level in levels[1:]):
        raise UserError(f"{data}: numbered folders on two levels, {some_of(levels[0])} below "
                        f"{some_of(there - levels[0])}; name the classes with --order")
    ranked = names or list(by_number(levels[0]))
    if len(ranked) < 2 or (len(ranked) > 12 and not names):
        raise UserError(f"{data}: {len(levels[0])} folders or grades, {some_of(levels[0])}: not two or more "
                        f"classes in a plain order; name them with --order, in ascending severity{hint}")
    must_be_folder_names(ranked)
    return ranked


def find_images(data: str | Path, order: str = "", columns: str = "") -> tuple[list, list, list]:
    """(paths, class index of each, class names in ascending severity) of a folder of class folders, or of a
    CSV and the images below its folder (data/README.md); says what it found, and what it passed over."""
    given = Path(data)
    by_csv = given.is_file() and given.suffix.lower() in TABLES
    if not (given.is_dir() or by_csv):
        raise UserError(f"{data}: no folder of images and no CSV of grades (data/README.md says where to get "
                        "some)")
    if columns and not by_csv:
        raise UserError(f"--columns {columns}: names two columns, ID,GRADE, of a CSV that is named itself")
    root = given.parent if by_csv else given
    files = list_files(root)
    paths = [path for path in files if is_image(path)]
    others = Counter(path.suffix.lower() or "without suffix" for path in files
                     if path != given and not is_image(path))
    not_read = "files not read: " + ", ".join(f"{suffix} {n:,}" for suffix, n in others.most_common())
    if not paths:
        raise UserError(f"{root} holds no images ({', '.join(sorted(SUFFIXES))}); {not_read}")

    if by_csv:
        names_of, unmatched = grades_from_csv(given, paths, columns)
    else:  # the folders above each image, nearest first
        names_of = {path: [*map(nfc, path.relative_to(root).parts[-2::-1])] for path in paths}
        unmatched = []
    hint = "; or name a CSV of grades, as --data FILE.csv" if others[".csv"] and not by_csv else ""
    ranked = ordered_classes(list(names_of.values()), order, data, hint)
    found = {path: [name for name in near if name in ranked] for path, near in names_of.items()}
    kept = [path for path in paths if found.get(path)]
    if order and (unclear := [path for path in kept if len(set(found[path])) > 1]):
        raise UserError(f"{unclear[0]}: below folders of two classes, {some_of(found[unclear[0]])}; rename "
                        "those that are none")
    labels = [ranked.index(found[path][0]) for path in kept]
    said = [f"{data}: " + ", ".join(f"{name} {labels.count(c):,}" for c, name in enumerate(ranked))]
    if lost := sorted(set(paths) - set(kept)):
        said.append(f"{len(lost):,} images without a class, as {lost[0].relative_to(root)}")
    if unmatched:
        said.append(f"{len(unmatched):,} rows of the CSV without an image, as {unmatched[0]}")
    say("; ".join(said + [not_read] * bool(others)))
    return kept, labels, ranked


def load_images(data: str | Path, size: int = 64, crop: int = 0, order: str = "", columns: str = ""):
    """Graded images as (uint8 (N, 3, size, size), labels long (N,), class names in ascending severity).

    data: see find_images. Raises UserError naming the file or flag.
    """
    paths, labels, names = find_images(data, order, columns)
    return read_squares(paths, size=size, crop=crop), torch.tensor(labels), names


# ------------------------------------------------------------------------------ training run


def seed_of(purpose: str, *numbers: float) -> int:
    """One seed from a purpose and numbers: different keys give unrelated seeds."""
    return int.from_bytes(hashlib.sha256(repr((purpose, *numbers)).encode()).digest()[:8], "big") >> 1


def must_be_others(unseen: Tensor, seen: Tensor, name: str | Path) -> None:
    """Raise UserError if an image of one set (N, 3, H, W), whose name is given, is in the other set too."""
    known = set(map(digest_of, seen))
    if twins := sum(digest_of(image) in known for image in unseen):
        raise UserError(f"{name}: {twins:,} of its {len(unseen):,} images are also among those trained on; "
                        "hold out images of other patients")


def training_data(config: Config) -> tuple[Tensor, Tensor, list[str], tuple]:
    """(images uint8 (N, 3, size, size), labels (N,), class names, (images, labels) of --held-out, or ())."""
    if config.batch % WORLD:
        raise UserError(f"--batch {config.batch}: must be a multiple of the {WORLD} processes")
    reading = dict(size=config.size, crop=config.crop, order=config.order, columns=config.columns)
    data = config.data or HERE / "data" / "demo"
    if not config.data and RANK == 0:
        runpy.run_path(str(HERE / "data" / "demo.py"))["make"](data)  # does nothing where the set is there
    wait()
    images, labels, names = load_images(data, **reading)
    if config.ordinal > 0 and len(names) < 3:
        say("two classes only: no triplet p < q < r, so no ordinal loss; this is the plain diffusion model")
    if not config.held_out:
        return images, labels, names, ()
    if Path(config.held_out).is_dir():
        reading["columns"] = ""
    others, their_labels, their_names = load_images(config.held_out, **reading)
    if their_names != names:
        raise UserError(f"--held-out {config.held_out}: classes {their_names}, but --data has {names}; hold "
                        "out images of each")
    must_be_others(others, images, config.held_out)
    weights = 1 / their_labels.bincount()[their_labels]  # the classes alike
    chosen = weights.multinomial(min(64, len(others)), generator=torch.Generator().manual_seed(0))
    return images, labels, names, (others[chosen], their_labels[chosen])


def noised(images: Tensor, alpha_bar: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(x_t, t, eps) of uint8 images: each at a t and eps of its own, which are the same at every call."""
    x_0 = to_unit(images.to(alpha_bar.device))
    eps = torch.randn(x_0.shape, generator=torch.Generator().manual_seed(0)).to(x_0)
    t = torch.linspace(1, len(alpha_bar) - 1, len(images)).round().long().to(x_0.device)
    return q_sample(x_0, t, eps, alpha_bar), t, eps


@torch.no_grad()
def measure(model: UNet, alpha_bar: Tensor, images: Tensor, unseen: Sequence[Tensor]) -> list[float]:
    """Straightness and gap d(lowest, highest) on images (N, 3, H, W) uint8 under every class; L_DM of unseen
    ones, (images, labels), if there are any."""
    x_t, t, _ = noised(images, alpha_bar)
    eps_hat = torch.stack([model(x_t, t, torch.full_like(t, c)) for c in range(model.num_classes)], dim=1)
    straight = straightness(eps_hat).mean().item() if model.num_classes >= 3 else math.nan
    numbers = [straight, noise_distance(eps_hat[:, 0], eps_hat[:, -1]).mean().item()]
    if unseen:
        x_t, t, eps = noised(unseen[0], alpha_bar)
        numbers.append(dm_loss(eps, model(x_t, t, unseen[1].to(t))).mean().item())
    return numbers


def digest_of(*tensors: Tensor) -> str:
    """A short hash of what they hold: it tells two sets of images, or two networks, apart."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.contiguous().numpy(force=True))
    return digest.hexdigest()[:12] if tensors else "none"


MAY_CHANGE = set("sample_steps guidance eta steps order out save_every sheet_every device precision "
                 "compile".split())  # when a run is resumed (--data and --order: what they lead to may not)
HEADER = "step,loss,dm,ordinal,grad_norm,straightness,gap"  # of metrics.csv


def folder_of(config: Config) -> Path:
    """The run's folder. A new one that cannot be written or holds other files is refused before any work."""
    data = Path(config.data or "demo").resolve()
    out = Path(config.out or Path("runs") / (data.parent if data.is_file() else data).name)
    if RANK == 0 and not (out / "checkpoint.pt").exists():
        begin_folder(out, "metrics.csv", HEADER)
    return out


class Run:
    """A run's folder: its checkpoint is loaded, and what each step leaves is written there."""

    def __init__(self, out: Path, config: Config, names: list[str], labels: Tensor, images: Tensor,
                 unseen: tuple, parts: dict):
        """Load the run's own checkpoint into parts, if there is one, else --init's."""
        self.about = dict(names=names, counts=labels.bincount().tolist(), digest=digest_of(images, labels))
        self.held_out = digest_of(*unseen)
        self.out, self.config, self.parts, model = out, config, parts, parts["model"]
        device, some = model.label.weight.device, torch.randperm(len(images))[:16]
        self.measured = alpha_bars(config).to(device), images[some], unseen
        self.rows = [HEADER + ",held_out" * bool(config.held_out)]
        self.step, self.losses, self.text = 0, [], ""  # losses since the last row
        if (out / "checkpoint.pt").exists():
            with checkpoint_at(out) as state:
                # The folders may change, what lies in them not.
                data = [state.get(name) for name in self.about]
                there = vars(state["config"]) | dict(data=data, held_out=state.get("held_out"))
                now = vars(config) | dict(data=list(self.about.values()), held_out=self.held_out)
                other = [f"{flag(name)} (there {there[name]}, now {now[name]})" for name in now
                         if there[name] != now[name] and name not in MAY_CHANGE]
                if other:
                    raise UserError(f"{self.out}: holds a run with other settings: {', '.join(other)}: use "
                                    "the same or another --out")
                if state["step"] > (1 - config.decay) * there["steps"] and config.steps > there["steps"]:
                    # Back at once, from 0 to --lr, it can destroy the network; --init warms it up.
                    raise UserError(f"--steps {config.steps}: the learning rate of {self.out} has been "
                                    f"falling to step {there['steps']}; go on with --init {self.out} and "
                                    "another --out")
                for name, part in parts.items():
                    part.load_state_dict(state[name])
                self.step, self.rows = state["step"], state["rows"]
        elif config.init:
            with checkpoint_at(config.init) as state:
                # With others the weights would load, and mean something else.
                for name in ("groups", "timesteps", "beta_1", "beta_T"):
                    if getattr(state["config"], name) != getattr(config, name):
                        raise UserError(f"--init {config.init}: has another {flag(name)}; use the same")
                if state["names"] != names:
                    say(f"{config.init}: has classes {', '.join(state['names'])}; the embedding begins anew")
                    state["ema"]["label.weight"] = model.label.weight.detach()
                for name in ("model", "ema"):
                    parts[name].load_state_dict(state["ema"])
        self.write_rows()  # without those that an interrupted run wrote after its last checkpoint
        self.progress = progress_of(config.steps, "steps", self.step)
        say(f"{out}: {sum(p.numel() for p in model.parameters()):,} parameters on {device} x {WORLD}, step "
            f"{self.step:,} of {config.steps:,}" + "; nothing left to do" * (self.step >= config.steps))

    def write_rows(self) -> None:
        if RANK == 0:
            write_text(self.out / "metrics.csv", "\n".join(self.rows) + "\n")

    def after_step(self, step: int, losses: Tensor, stop: list[int]) -> None:
        """Write a row, save and draw where they are due. Losses stay on the device until a row is."""
        config, ema = self.config, self.parts["ema"]
        self.losses.append(losses)
        at_end, stopping = step == config.steps, bool(stop)  # a signal that comes later waits a step
        saving = at_end or stopping or step % config.save_every == 0
        if saving or step % config.log_every == 0:
            mean = torch.stack(self.losses).mean(0) / WORLD
            if WORLD > 1:
                dist.all_reduce(mean)
            if not mean.isfinite().all():
                raise UserError(f"step {step}: the loss is not finite; train with a lower --lr in "
                                "another --out (checkpoint.pt holds the last good state, if one was saved)")
            numbers = [*mean.tolist(), *measure(ema, *self.measured)]
            self.rows.append(",".join([f"{step}", *(f"{number:.7g}" for number in numbers)]))
            columns = self.rows[0].split(",")[1:]
            self.text = "".join(f"  {name} {number:.3g}" for name, number in zip(columns, numbers))
            self.losses = []
            self.write_rows()
        if RANK > 0:
            return
        self.progress(step, self.text)
        if saving:
            state = dict(config=vars(config), **self.about, step=step, rows=self.rows,
                         held_out=self.held_out)
            state |= {name: part.state_dict() for name, part in self.parts.items()}
            write_file(self.out / "checkpoint.pt", partial(torch.save, state))
        if at_end or (config.sheet_every and step % config.sheet_every == 0):
            keys = [(config.seed, row) for row in range(6)]  # the same starting noise along a row
            names = self.about["names"]
            columns = [(name, sample_images(ema, [float(c)] * 6, keys)) for c, name in enumerate(names)]
            save_picture(sheet_of(columns), self.out / "sheet.png")
        if at_end:
            say(f"{self.out}: trained to step {step:,}; {self.out / 'sheet.png'} shows samples")
        elif stopping:
            say(f"{self.out}: stopped and saved at step {step:,}; the same command goes on from there")
            raise SystemExit(128 + stop[0])


# -------------------------------------------------------------------------- checkpoints and files


def write_file(path: Path, write: Callable) -> None:
    """write(file) to a neighbour that then takes path's place: a kill or full disk leaves the old whole."""
    neighbour = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(neighbour, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(neighbour, path)
    except (OSError, RuntimeError) as error:  # RuntimeError: how torch.save says that the disk is full
        with contextlib.suppress(OSError):
            neighbour.unlink()
        raise UserError(f"{path}: cannot be written ({error}): free some space or choose another place; what "
                        "was saved before is intact") from None


def write_text(path: Path, text: str) -> None:
    write_file(path, lambda file: file.write(text.encode()))


@contextlib.contextmanager
def checkpoint_at(path: str | Path):
    """{file, config: Config, names, counts, step, ema, [model, optimizer, rows]} of a checkpoint,
    given its file or its run's folder; no code in it runs.

    Whatever is wrong with it, here or inside the `with`, is one line: damaged files raise many kinds.
    """
    path = Path(path).resolve()
    if path.is_dir():
        path /= "checkpoint.pt"
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        must_be_folder_names(state["names"])
        yield state | dict(file=path, config=Config(**state["config"]))
    except Exception as error:
        if isinstance(error, UserError) or out_of_memory(error):
            raise
        raise UserError(f"{path}: no whole checkpoint of odm.py, or not of the network that --ch, --ch-mult, "
                        f"--blocks, --attention describe ({str(error)[:200]}); take another") from None


# ------------------------------------------------------------------------------ sampling run


@dataclass
class Network:
    """A trained network ready for use; model.config holds its settings."""

    model: UNet
    names: list[str]  # of its classes
    counts: list[int]  # images of each that it was trained on
    digest: str  # of its weights
    name: str  # RUN-STEP


def load_network(checkpoint: str | Path = "", device: str = "auto", **changes) -> Network:
    """The averaged network of a checkpoint or a run's folder [the newest in runs/, else data/demo.pt].

    changes: fields of its Config to replace.
    """
    device, runs, demo = start(device), Path("runs").glob("*/checkpoint.pt"), HERE / "data" / "demo.pt"
    with checkpoint_at(checkpoint or max(runs, key=os.path.getmtime, default=demo)) as state:
        file, names, config = state["file"], state["names"], replace(state["config"], **changes)
        check_config(config)
        model = build(config, len(names), device).eval()
        model.load_state_dict(state["ema"])
        say(f"{file}: step {state['step']:,}, classes {', '.join(names)}")
    run = file.parent.name if file.name == "checkpoint.pt" else f"{file.parent.name}-{file.stem}"
    return Network(model, names, state["counts"], digest_of(*model.parameters()), f"{run}-{state['step']}")


def sample(checkpoint: str | Path = "", severity: str = "all", n: int = 0, each: int = 0,
           out: str | Path = "", seed: int = 0, batch: int = 0, device: str = "auto", **changes) -> Path:
    """Sample images into OUT/<class>/<i>.png and OUT/sheet.png; what is there already is kept. Returns OUT.

    checkpoint: see load_network. severity: see parse_severities.
    n images in all, the classes at their training frequencies (those between two in proportion), or `each` of
    every severity [16 of one, else 8]. Image i of a class depends on (seed, class, i) alone; in a series
    0:3:0.25 on (seed, i), so that a row of the sheet shows one starting noise at rising severity.
    changes: sample_steps, guidance, eta, precision, compile, where they differ from the run's.
    """
    if min(n, each, batch) < 0 or (n and each) or max(n, each) > 10**7:
        raise UserError("-n, --each, --batch: numbers of images, and only one of -n and --each")
    network = load_network(checkpoint, device, **changes)
    model, names = network.model, network.names
    wanted, series = parse_severities(severity, names), ":" in severity
    counts = [each or (16 if len(wanted) == 1 else 8)] * len(wanted)
    if n:
        parts = np.interp(list(wanted.values()), range(len(names)), network.counts)
        counts = np.diff(np.round(n * np.cumsum([0, *parts]) / sum(parts))).astype(int).tolist()
    out = Path(out or f"samples/{network.name}" + "-series" * series)
    note_settings(out, network, seed=seed, series=series)
    if model.config.compile == "on" or sum(counts) >= 1000:  # compiling takes longer than a few images do
        model = compiled(model)
    files = {name: [out / name / f"{i:05d}.png" for i in range(n)] for name, n in zip(wanted, counts) if n}
    jobs = [(file, (wanted[name], (seed, i) if series else (seed, i, round(wanted[name], 6))))
            for name in files for i, file in enumerate(files[name])]
    batch = batch or (16 if network.model.label.weight.device.type == "cpu" else 128)
    write_images(jobs, lambda inputs: sample_images(model, *zip(*inputs)), batch)
    if RANK == 0:
        shown = 64 if len(files) == 1 else 8
        columns = [(name, [read_square(file, model.config.size) for file in some[:shown]])
                   for name, some in files.items()]
        if series:
            save_series(columns, out / "series.gif")
        if len(columns) == 1:  # one severity: a square of its images
            (name, pictures), side = columns[0], math.ceil(math.sqrt(len(columns[0][1])))
            columns = [(name if x == 0 else "", pictures[x::side]) for x in range(side)]
        save_picture(sheet_of(columns), out / "sheet.png")
    say(f"{len(jobs):,} images are in {out}; {out / 'sheet.png'} shows some")
    return out


def write_images(jobs: Sequence[tuple[Path, object]], draw: Callable, batch: int) -> None:
    """Write the image of each job (file, input), a batch at a time: draw(inputs) -> (B, 3, H, W) uint8.

    Files already there are kept. Batches are laid out over all jobs, so that an image shares its batch with
    the same others whatever is there already: not even its rounding changes.
    """
    progress = progress_of(len(jobs), "images")
    for first in range(RANK * batch, len(jobs), WORLD * batch):
        files, inputs = zip(*jobs[first : first + batch])
        if not all(file.exists() for file in files):
            for image, file in zip(draw(inputs), files):
                if not file.exists():
                    save_picture(to_picture(image), file)
        progress(min(first + WORLD * batch, len(jobs)))
    wait()


def begin_folder(out: Path, name: str, text: str) -> None:
    """Begin a folder with this file; refuse one that holds something, but no such file that begins so."""
    file = out / name
    ours = file.is_file() and file.read_text(errors="replace").startswith(text)
    if out.is_dir() and not ours and any(path.name[0] != "." for path in out.iterdir()):
        raise UserError(f"{out}: holds other files, or a {name} of other settings; choose another --out")
    if not ours:
        write_text(file, text)


def note_settings(out: Path, network: Network, **settings) -> None:
    """Keep images of different settings apart: OUT/sample.json says what the folder's were made with."""
    if RANK == 0:
        settings["checkpoint"] = network.digest
        for name in ("guidance", "eta", "sample_steps"):
            settings[name] = getattr(network.model.config, name)
        begin_folder(out, "sample.json", json.dumps(settings, indent=1))
    wait()


def severities_of(names: list[str]) -> list[float]:
    """The numbers in the names where these ascend, or descend, else 0, 1, ..."""
    numbers = by_number(set(names))
    monotone = list(numbers) in (names, names[::-1])
    return [numbers[name] for name in names] if monotone else list(map(float, range(len(names))))


def parse_severities(text: str, names: list[str], flag: str = "--class") -> dict[str, float]:
    """--class as {name of the folder: position}: all, 3, "Mayo 3", 1.5 (between two classes), 0:3:0.25."""
    scale = severities_of(names)
    if named := {name: float(c) for c, name in enumerate(names) if text in ("all", name)}:
        return named
    try:
        first, last, step = map(float, text.split(":") if ":" in text else (text, text, 1))
        count = int((last - first) / step + 1e-6) + 1
        severities = [round(first + i * step, 6) for i in range(count if count <= 1000 else 0)]
    except (ValueError, ArithmeticError):
        severities = []
    if not severities or min(severities) < min(scale) or max(severities) > max(scale):
        raise UserError(f"{flag} {text}: name one of {', '.join(names)}, a severity from {min(scale):g} to "
                        f"{max(scale):g}, or FIRST:LAST:STEP, as 0:3:0.25, for at most 1,000")
    order = np.argsort(scale)
    positions = np.interp(severities, np.take(scale, order), order).tolist()
    return {names[int(position)] if position.is_integer() else f"{severity:.10g}": position
            for severity, position in zip(severities, positions)}


def must_be_folder_names(names: list[str]) -> None:
    """Samples are written to folders named like the classes, which must never be paths."""
    for name in names:
        if not name.strip(" .") or re.search(r'[/\\:*?"<>|\x00-\x1f]', name):
            raise UserError(f"class name {name!r} cannot be the name of a folder: rename it")


# ---------------------------------------------------------------------------------- pictures


def to_picture(image: Tensor) -> Image.Image:
    """(3, H, W) uint8 as an image of Pillow."""
    return Image.fromarray(image.permute(1, 2, 0).numpy())


def sheet_of(columns: Sequence[tuple[str, Sequence[Tensor]]]) -> Image.Image:
    """Columns of (title, pictures (3, size, size) uint8) as one picture, small ones enlarged."""
    rows, size = max(len(pictures) for _, pictures in columns), columns[0][1][0].shape[-1]
    side = size * max(1, 128 // size)
    cell = side + 4  # with a gap of 4 to the next
    sheet = Image.new("RGB", (4 + len(columns) * cell, 28 + rows * cell), "white")
    pen = ImageDraw.Draw(sheet)
    for x, (title, pictures) in enumerate(columns):
        pen.text((4 + x * cell + side / 2, 14), title, "black", anchor="mm", font_size=15)
        for y, picture in enumerate(pictures):
            sheet.paste(to_picture(picture).resize((side, side)), (4 + x * cell, 28 + y * cell))
    return sheet


def save_series(columns: Sequence[tuple[str, Sequence[Tensor]]], file: Path) -> None:
    """Columns of rising severity as a moving picture: their rows side by side, up and down again."""
    rows = min(len(pictures) for _, pictures in columns)
    frames = [sheet_of([(title if x == 0 else "", [picture]) for x, picture in enumerate(pictures[:rows])])
              for title, pictures in columns]
    frames += frames[-2:0:-1]
    options = dict(format="GIF", save_all=True, append_images=frames[1:], duration=150, loop=0)
    write_file(file, partial(frames[0].save, **options))


def save_picture(picture: Image.Image, file: Path) -> None:
    write_file(file, partial(picture.save, format="PNG"))


# ------------------------------------------------------------------ devices, processes, progress


def start(name: str) -> torch.device:
    """The device; under torchrun, this process's own, and it joins the others."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(f"cuda:{LOCAL_RANK}" if name == "cuda" else name)
        torch.zeros(1, dtype=torch.float64, device=device).item()  # float64: of alpha_bar
    except (RuntimeError, AssertionError, TypeError) as error:
        raise UserError(f"--device {name}: {error}") from None
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.backends.cudnn.benchmark = True  # all batches have one shape: look for the fastest kernels
    if WORLD > 1 and not dist.is_initialized():
        backend, bound = ("nccl", device) if device.type == "cuda" else ("gloo", None)
        try:
            dist.init_process_group(backend, timeout=timedelta(hours=2), device_id=bound)
        except ValueError as error:
            raise UserError(f"WORLD_SIZE is {WORLD}: {error}; unset it, or start with torchrun") from None
    return device


def build(config: Config, num_classes: int, device: torch.device) -> UNet:
    """The network on its device, with --precision auto decided."""
    bfloat16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    if config.precision == "auto":
        config = replace(config, precision="bfloat16" if bfloat16 else "float32")
    return UNet(config, num_classes).to(device, memory_format=torch.channels_last)


def compiled(model: UNet) -> nn.Module:
    """The network under torch.compile, where asked for and possible. Its weights stay those of `model`."""
    device, asked = model.label.weight.device, model.config.compile
    if asked == "on" or (asked == "auto" and device.type == "cuda"):
        try:
            torch.compile(torch.sin)(torch.zeros(8, device=device))  # is there a compiler at all?
            return torch.compile(model, dynamic=False)  # batches have few shapes: each its own, faster code
        except Exception as error:
            say(f"torch.compile does not work here ({type(error).__name__}); going on without")
    return model


def parallel(model: UNet) -> nn.Module:
    """The network compiled and, under torchrun, with gradients averaged over the processes."""
    return nn.parallel.DistributedDataParallel(compiled(model)) if WORLD > 1 else compiled(model)


def wait() -> None:
    """Until all processes have come here."""
    if WORLD > 1:
        dist.barrier()


@contextlib.contextmanager
def stop_signals():
    """A list of the Ctrl-C and SIGTERM (clusters send it) that came, so that the loop can save first.

    Under torchrun, which stops all processes together, they end the program at once.
    """
    came = []

    def note(number, frame):
        came.append(number)
        if len(came) > 2:  # launchers send one stop twice; a third ends at once
            raise KeyboardInterrupt

    with contextlib.ExitStack() as stack:
        for number in (signal.SIGINT, signal.SIGTERM) if WORLD == 1 else ():
            stack.callback(signal.signal, number, signal.signal(number, note))
        yield came


def say(line: str) -> None:
    """Print a line, from the first process alone."""
    if RANK == 0:
        try:
            print(line, flush=True)
        except OSError:  # Ctrl-C ends `| tee` first, and the run must still be saved
            sys.stdout = open(os.devnull, "w")


def progress_of(total: int, unit: str, done: int = 0) -> Callable:
    """show(done, text) says how far a long job is: after its first part, then every few seconds, later once a
    minute."""
    first, begun, due = done, time.monotonic(), 0.0

    def show(done: int, text: str = "") -> None:
        nonlocal due
        if done == total or time.monotonic() > due:
            seconds = time.monotonic() - begun
            due = time.monotonic() + min(3 + seconds / 10, 60)
            left = timedelta(seconds=round((total - done) * seconds / (done - first)))
            say(f"{done:,}/{total:,} {unit}{text}  {left} left")  # as 2 days, 3:04:05

    return show


# ------------------------------------------------------------------------------ command line


def flag(name: str) -> str:
    """The flag of a setting."""
    return "--" + name.replace("_", "-")


def check_config(config: Config) -> None:
    """Raise UserError on the first setting that is out of range, alone or beside the others."""
    for f in fields(config):
        value, about = getattr(config, f.name), f.metadata
        for v in value if isinstance(value, tuple) else (value,):
            if about["choices"] and v not in about["choices"]:
                raise UserError(f"{flag(f.name)} {v}: must be {' or '.join(about['choices'])}")
            if about["low"] is not None and not about["low"] <= v <= about["high"]:
                raise UserError(f"{flag(f.name)} {v}: must be from {about['low']} to {about['high']}")
    sides = [config.size >> level for level in range(len(config.ch_mult))]
    for wrong, message in (
        (not sides or config.size % 2 ** (len(sides) - 1),
         f"--size {config.size}: cannot be halved to the {len(sides)} resolutions that --ch-mult names"),
        (set(config.attention) - set(sides), f"--attention: the feature maps have the sides {sides}"),
        (config.ch % math.lcm(4, config.groups), "--ch: must be a multiple of 4 and of --groups"),
        (alpha_bars(config)[-1] < 1e-30, f"--beta-T {config.beta_T}: leaves nothing of the image; lower it"),
        (config.sample_steps > config.timesteps, "--sample-steps: must be at most --timesteps"),
    ):
        if wrong:
            raise UserError(message)


class Parser(argparse.ArgumentParser):
    """Errors in one line, exit status 2."""

    def error(self, message: str):
        program, message = self.prog.split()[0], " ".join(message.split())
        message += ", or --flag=VALUE where it begins with a minus" * ("expected one argument" in message)
        self.exit(2, f"{program}: error: {message}; see python {self.prog} --help\n")


def ints(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(",") if text)


def whole(low: int, high: int = 2**31 - 1) -> Callable:
    """The type of a flag: a whole number in this range."""

    def number(text: str) -> int:
        if not low <= int(text) <= high:
            raise argparse.ArgumentTypeError(f"must be from {low} to {high}")
        return int(text)

    return number


def parser() -> Parser:
    top = Parser(prog="odm.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = top.add_subparsers(dest="command", required=True)
    options = dict(allow_abbrev=False, argument_default=argparse.SUPPRESS)  # what is not given is not set
    training = commands.add_parser("train", help="train on graded images, or resume", **options)
    sampling = commands.add_parser("sample", help="sample images", **options)
    text = "paper: the defaults below; small: SMALL in odm.py, for two cores [paper with --data, else small]"
    training.add_argument("--preset", choices=("paper", "small"), help=text)
    add = sampling.add_argument
    text = '3, "Mayo 3", 1.5 (between two), 0:3:0.25 (a series: one noise a row) or all [all]'
    add("--class", dest="severity", help=text)
    add("-n", type=whole(1), help="images in all, classes at their training frequencies")
    add("--each", type=whole(1), help="images of each severity [16 of one, else 8]")
    add("--out", help="folder for the images [samples/RUN-STEP]")
    add("--checkpoint", help="a checkpoint or a run's folder [the newest in runs/, else data/demo.pt]")
    add("--seed", type=whole(0, 2**63 - 1), help="of all noise [0]")
    add("--batch", type=whole(1), help="images at once [16 on a CPU, else 128]; fewer take less memory")
    add("--device", help="cpu, cuda, ... [the GPU if there is one]")
    for f in fields(Config):
        text, default = f.metadata["help"], f.default
        kind = dict(type=type(default), choices=f.metadata["choices"])
        if isinstance(default, bool):
            kind = dict(action=argparse.BooleanOptionalAction)
        elif isinstance(default, tuple):
            kind, default = dict(type=ints), ",".join(map(str, default))
        training.add_argument(flag(f.name), help=f"{text} [{default}]", **kind)
        if f.name in ("sample_steps", "guidance", "eta", "precision", "compile"):
            sampling.add_argument(flag(f.name), help=f"{text} [the run's]", **kind)
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """The command line. Exit status: 0, 2 for what the user can mend, 130 and 143 for Ctrl-C and SIGTERM."""
    args = vars(parser().parse_args(argv))
    if args.pop("command") == "sample":
        return status_of("odm.py", partial(sample, **args))
    preset = args.pop("preset", "paper" if args.get("data") else "small")
    return status_of("odm.py", partial(train, Config(**(SMALL if preset == "small" else {}) | args)))


def status_of(program: str, run: Callable) -> int:
    """Run a program; what the user can mend becomes one line on standard error, and status 2."""
    speaks = LOCAL_RANK == 0  # most errors are those of all processes: one says it
    try:
        run()
        if dist.is_initialized():
            dist.destroy_process_group()
        return 0
    except KeyboardInterrupt:
        message, status = "stopped; give the same command again", 130
    except (UserError, OSError) as error:
        message, status = str(error), 2
    except (RuntimeError, MemoryError) as error:
        message, status = "out of memory: lower --batch, or --size where the images alone are too many", 2
        if isinstance(error, dist.DistError) or "gloo" in str(error):
            message = "the connection to another process is lost"
        elif out_of_memory(error):
            speaks = True
        else:
            raise
    if speaks:
        print(f"{program}: error: {' '.join(message.split())}", file=sys.stderr)
    return status


def out_of_memory(error: BaseException) -> bool:
    """Whether this is how torch or numpy, on a GPU or a CPU, say that memory ran out."""
    words = "out of memory|not enough memory|allocate memory|ALLOC_FAILED"
    return isinstance(error, MemoryError) or bool(re.search(words, str(error)))


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")  # a name that can't be shown must not end a run
    sys.exit(main())
