# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.5", "numpy", "pillow>=10.3"]
# ///
"""The Ordinal Diffusion Model: one script, read from top to bottom.

    S. Takezaki and S. Uchida, "An Ordinal Diffusion Model for Generating Medical Images with
    Different Severity Levels", ISBI 2024, arXiv 2403.00452.

    python odm.py train                       # draws the embedded set, trains the small preset
    python odm.py train --data data/limuc     # the paper's settings on LIMUC
    python odm.py sample --class 3            # images of severity 3, from the newest run
    python odm.py sample --class 0:3:0.25     # the same noise at rising severity
    python odm.py sample --image my_images    # given images, at every severity
    python odm.py grade my_images             # the severity of given images

Where the paper's equations are:

    Eq. 1  the forward process, x_{t-1} -> x_t     alpha_bars, q_sample (t steps in one)
    Eq. 2  one step of the backward process        ddim (eta = 1, every t, clip = False; see there)
    Eq. 3  L_DM, the loss of a diffusion model     dm_loss
    Eq. 4  the order of the noise estimates        holds where ordinal_loss = 0 and they differ
    Eq. 5  L_ordinal, the ordinal relationship     ordinal_loss
    Eq. 6  d, the distance of two noise estimates  noise_distance
    Eq. 7  three estimates on a line, in order     straightness (= 1); used by guided_eps, read_position
    Eq. 8  L_total = L_DM + lambda_t L_ordinal     total_loss

and its symbols: x_0 a clean image in [-1, 1], x_t the same after t of T noising steps, eps the noise
in it, eps_hat the network's estimate eps_theta(x_t, t, c), c a class, p < q < r three classes in
ascending severity. In the shapes: B images of a step, R rows of the network, G triplets, C classes.
A severity is what a person writes, say Mayo 1 to 3. A position is a class index, 0 to C-1 (the paper
counts from 1), or a point between two. Index C is the null class of guidance.

The method comes first and is whole: settings, losses, one training step, sampling, the U-Net. After the
line "the method ends here" follow data, runs, files, processes and the command line.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# ---------------------------------------------------------------------------------- settings


def setting(default, help: str, low=None, high=math.inf, choices=None, may_change: bool = False):
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
    crop: int = setting(0, "side of the centre crop; 0: 128 of 352x288 (paper), the middle square of others; "
                        "smaller images: the middle square", 0)
    order: str = setting("", "class names in ascending severity, A,B,C (where names carry no number)")
    columns: str = setting("", "ID,GRADE: columns of the CSV that gives the classes (image,level is known)")
    flip: bool = setting(True, "random horizontal flips (Ho et al.)")
    # forward process
    timesteps: int = setting(1000, "T, steps of the forward process (paper)", 1, 100_000)
    beta_1: float = setting(1e-4, "noise schedule at t = 1 (paper)", 1e-8, 0.999)
    beta_T: float = setting(0.02, "noise schedule at t = T (paper)", 1e-8, 0.999)
    # losses
    ordinal: float = setting(1.0, "W, a factor on lambda_t; 1: Eq. 8, 0: the plain diffusion model", 0.0)
    triplets: str = setting("labels", "labels: one x_t under three labels (Fig. 2); images: those of three "
                            "images, with one noise (Eqs. 4 to 7)", choices=("labels", "images"))
    triplet_part: float = setting(0.25, "part of a batch completed to triplets (ours: for speed)", 0.0, 1.0)
    distance: str = setting("euclidean", "d of Eq. 6; squared: as printed, which contradicts Eq. 7",
                            choices=("euclidean", "squared"))
    spacing: bool = setting(False, "ask also for d(p,q) : d(q,r) = (q-p) : (r-q) (the paper's future work)")
    balance: str = setting("data", "how often each class is drawn: as in the data (Eq. 3) or evenly",
                           choices=("data", "uniform"))
    class_dropout: float = setting(0.1, "probability of the null class (Ho & Salimans)", 0.0, 0.99)
    # U-Net
    ch: int = setting(128, "channels at full resolution (Ho et al.)", 4)
    ch_mult: tuple = setting((1, 2, 2, 2), "channel multiplier of each resolution (Ho et al.)", 1)
    blocks: int = setting(2, "residual blocks at each resolution (Ho et al.)", 1)
    attention: tuple = setting((16,), "sides of the feature maps with self-attention (Ho et al.)", 1)
    groups: int = setting(32, "of GroupNorm (Ho et al.); too many in a narrow network lose mean colours", 1)
    dropout: float = setting(0.1, "dropout in the residual blocks (Ho et al.)", 0.0, 0.99)
    # training
    batch: int = setting(32, "images a step, over all processes (paper)", 1)
    steps: int = setting(200_000, "training steps (paper)", 1, may_change=True)
    lr: float = setting(1e-4, "Adam's learning rate (paper)", 0.0)
    warmup: int = setting(5000, "steps of linear warm-up (Ho et al.)", 0)
    decay: float = setting(0.0, "part of --steps, at its end, in which lr falls to 0 (ours)", 0.0, 1.0)
    ema: float = setting(0.9999, "decay of the averaged weights that sampling uses (Ho et al.)", 0.0, 1.0)
    seed: int = setting(0, "step i's images and noise depend on (seed, i, process) alone", 0, 2**63 - 1)
    # sampling, for the sheets drawn while training and as the default of `sample`
    sample_steps: int = setting(100, "DDIM steps (paper)", 1, may_change=True)
    guidance: float = setting(2.0, "s of classifier-free guidance (paper); 1: none", 0.0, may_change=True)
    eta: float = setting(0.0, "0: DDIM (paper); 1: as Eq. 2, whose fresh noise corrects errors of a briefly "
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


# The small preset, for two cores and a few minutes: 32x32 images, 1.1 M parameters.
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
    signal = alpha_bar.sqrt().to(x_0)[t].view(shape)
    noise = (1 - alpha_bar).sqrt().to(x_0)[t].view(shape)
    return signal * x_0 + noise * eps


# --------------------------------------------------------------------- losses (Eqs. 3 and 5 to 7)


def dm_loss(eps: Tensor, eps_hat: Tensor) -> Tensor:
    """L_DM of Eq. 3, as the mean over the entries of each image: (B, ...) -> (B,)."""
    return (eps - eps_hat).square().flatten(1).mean(1)


def noise_distance(a: Tensor, b: Tensor, distance: str = "euclidean") -> Tensor:
    """d of Eq. 6 between noise estimates: (G, ...) and (G, ...) -> (G,).

    `euclidean` is the root mean square of a - b, `squared` its mean square, the norm printed in Eq. 6. The
    paper sums over the D entries of an image, here and in L_DM. To take means divides L_DM by D and, with
    `euclidean`, L_ordinal too: Eq. 8 keeps its balance, at any image size. With `squared` it divides
    L_ordinal by D^2: the balance as printed takes --ordinal D (12,288 at 64x64).
    """
    difference = (a.float() - b.float()).flatten(1)
    if distance == "squared":
        return difference.square().mean(1)
    norm = torch.linalg.vector_norm(difference, dim=1)  # unlike a root, its gradient at 0 is 0, not nan
    return norm / math.sqrt(difference.shape[1])


def ordinal_loss(p: Tensor, q: Tensor, r: Tensor, distance: str = "euclidean", share: Tensor | None = None):
    """L_ordinal of Eq. 5, of G triplets of noise estimates, of classes p < q < r: (G, ...) each -> (G,).

    With distance="euclidean" it is zero where q lies between p and r on a line (Eq. 7), by the triangle
    inequality. With "squared", Eq. 6 as printed, d(p,r) - d(p,q) - d(q,r) is 2 <p-q, q-r>, which is zero
    where the angle at q is a right angle instead.

    share (G,): how far along that line, from p to r, q should lie (`--spacing`, the paper's first future
    work): 1 - alpha of Eq. 7.
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
    """One step's R = B + 2G rows of the network: B images, and two partners for each of the first G of them.

    With B = 2 and G = 1, say image 7 of class 0 and image 9 of class 2: rows 0 and 1 are these two, and L_DM
    reads them. Rows 2 and 3 are partners of row 0, of two other classes, say 1 and 3, and L_ordinal reads the
    triplet (0, 2, 3). They are image 7 again, shown as 1 and 3 (`--triplets labels`: one x_t under three
    labels, Fig. 2), or an image of each of these classes (`--triplets images`: x_{t,p}, x_{t,q}, x_{t,r} of
    Eq. 4). Either way they take the noise, t, flip and dropout mask of row 0, their root.
    """

    image: Tensor  # (R,) numbers in the data set
    label: Tensor  # (R,) the class that a row is shown as; C is the null class
    root: Tensor  # (R,) 0..B-1: itself for an image, the image that it accompanies for a partner
    t: Tensor  # (B,) timesteps 1..T
    flip: Tensor  # (B,) mirrored or not
    triplets: Tensor  # (G, 3) rows in ascending severity; G = 0 for the plain diffusion model
    weight: Tensor  # (G,) of mean 1; 0 where the root drew the null class, which has no place in the order
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

    partner_root = torch.arange(G).repeat_interleave(2)
    not_own = 1 - F.one_hot(labels[image[:G]], C)
    other = not_own.float().multinomial(2, generator=rng).flatten()  # two of the other classes
    partner = one_of(other) if config.triplets == "images" else image[partner_root]

    label = torch.cat([labels[image], other])
    triplets = torch.cat([torch.arange(G)[:, None], torch.arange(B, B + 2 * G).view(G, 2)], dim=1)
    triplets = triplets.gather(1, label[triplets].argsort(1))  # p < q < r
    p, q, r = torch.tensor(severities)[label[triplets]].unbind(1)
    label[:B][null] = C  # only now: the order above is that of the true classes
    weight = ~null[:G] / (1 - config.class_dropout)
    root = torch.cat([torch.arange(B), partner_root])
    return Batch(torch.cat([image, partner]), label, root, t, flip, triplets, weight, share=(q - p) / (r - p))


# ---------------------------------------------------------------------- one training step (Eq. 8)


def total_loss(model: Callable, x_0: Tensor, eps: Tensor, batch: Batch, alpha_bar: Tensor, config: Config):
    """Eq. 8, L_total = L_DM + lambda_t L_ordinal, with lambda_t = W t / T (W = config.ordinal; paper: 1).

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
    p, q, r = eps_hat[batch.triplets].unbind(1)  # (G, 3, H, W) each
    lambda_t = config.ordinal * t[batch.triplets[:, 0]] / config.timesteps  # a triplet has one t
    share = batch.share if config.spacing else None
    ordinal = (batch.weight * lambda_t * ordinal_loss(p, q, r, config.distance, share)).mean()
    return dm + ordinal, dm, ordinal


def learning_rate(config: Config, step: int) -> float:
    """Of step 0, 1, ...: a linear warm-up, then constant, and a linear fall to 0 over the part `decay`."""
    rising = (step + 1) / max(config.warmup, 1)
    falling = (config.steps - step) / max(config.decay * config.steps, 1)
    return config.lr * min(1, rising, falling)


def training_step(model: nn.Module, ema: nn.Module, optimizer: torch.optim.Adam, images: Tensor, batch: Batch,
                  alpha_bar: Tensor, config: Config, step: int, all_reduce: Callable | None = None) -> Tensor:
    """Step 0, 1, ... of Adam on Eq. 8, and of the averaged weights. images (N, 3, H, W) uint8: the data set.

    all_reduce(tensors): their means over the processes, in place, where there are several. Returns (4,):
    L_total, L_DM, lambda_t L_ordinal and the norm of the gradient.
    """
    x_0 = to_unit(images[batch.image])
    x_0 = torch.where(batch.flip[batch.root].view(-1, 1, 1, 1), x_0.flip(-1), x_0)
    eps = torch.randn(len(batch.t), *x_0.shape[1:], device=x_0.device)
    losses = torch.stack(total_loss(model, x_0, eps, batch, alpha_bar, config))
    optimizer.zero_grad()
    losses[0].backward()
    losses = losses.detach()
    if all_reduce:
        all_reduce([losses, *(p.grad for p in model.parameters())])
    grad_norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)  # Ho et al.
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(config, step)
    optimizer.step()
    keep = min(config.ema, (step + 2) / (step + 11))  # rising: a short run forgets its first weights
    with torch.no_grad():
        torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - keep)
    return torch.cat([losses, grad_norm[None]])


# ------------------------------------------------ sampling: guidance and DDIM (Eq. 2, Eq. 7)


def guided_eps(model: Callable, x_t: Tensor, t: Tensor, position: Tensor, scale: float) -> Tensor:
    """The noise estimate at a position, with classifier-free guidance by scale s: (B, 3, H, W).

    position: (B,) float in 0..C-1; 1.5 is half the estimate of class 1 and half that of class 2, on the line
    of Eq. 7. Keep it on the CPU: it decides which classes are evaluated; to ask a GPU makes each step wait.
    It is null + s (class - null) = s class + (1 - s) null, of the estimates of the class and the null class;
    s = 1 is the conditional model, s = 0 the unconditional one (Ho & Salimans write w = s - 1).
    """
    fraction = position - position.floor()
    lower = position.floor(), scale * (1 - fraction)
    upper = position.ceil(), scale * fraction
    null = torch.full_like(position, model.num_classes), torch.full_like(position, 1 - scale)
    terms = [(label, weight) for label, weight in (lower, upper, null) if weight.any()]  # the rest adds 0
    labels = torch.cat([label for label, _ in terms]).long().to(x_t.device)
    weights = torch.stack([weight for _, weight in terms]).to(x_t).view(len(terms), -1, 1, 1, 1)
    eps_hat = model(x_t.repeat(len(terms), 1, 1, 1), t.repeat(len(terms)), labels)
    return (weights * eps_hat.unflatten(0, (len(terms), -1))).sum(0)


def ddim(eps_fn: Callable, x: Tensor, alpha_bar: Tensor, times: Sequence[int], eta: float = 0.0,
         clip: bool = True, noise: Callable = torch.randn_like) -> Tensor:
    """Take x from t = times[0] to t = times[-1] by DDIM (Song et al. 2021, Eq. 12): (B, ...) -> (B, ...).

    Falling times, T ... 0 (paper: 100 equal steps), draw: noise x_T of N(0, I) becomes an image. Rising
    times, 0 ... T, with eta = 0 and clip = False encode: an image becomes the x_T from which it is drawn
    again (their Section 4.3). Each step nearly undoes one of drawing: both ask the estimate eps_fn(x, t),
    t (B,) long, at the noisier of their two ends, so never at t = 0.
    eta = 0 is deterministic. `clip` keeps the estimate of x_0 in [-1, 1]. noise(x) draws z, where eta > 0.

    eta = 1, all T steps, clip = False is Eq. 2 but for two things. Its denominator reads sqrt(1 - alpha_t), a
    misprint of sqrt(1 - alpha_bar_t). And sigma_t^2, there beta_t, is the posterior's variance here,
    beta_t (1 - alpha_bar_{t-1}) / (1 - alpha_bar_t).
    """
    if times[0] < times[-1] and (eta or clip):
        raise ValueError("rising times encode: they take eta = 0 and clip = False")
    for t, u in zip(times[:-1], times[1:]):  # from x_t to x_u, u being the next time
        abar_t, abar_u = alpha_bar[t].item(), alpha_bar[u].item()
        eps_hat = eps_fn(x, torch.full((len(x),), max(t, u), device=x.device))
        x_0 = (x - math.sqrt(1 - abar_t) * eps_hat) / math.sqrt(abar_t)
        if clip:
            x_0 = x_0.clamp(-1, 1)
            eps_hat = (x - math.sqrt(abar_t) * x_0) / math.sqrt(1 - abar_t)
        sigma = eta * math.sqrt((1 - abar_u) / (1 - abar_t) * (1 - abar_t / abar_u)) if eta else 0.0
        x = math.sqrt(abar_u) * x_0 + math.sqrt(max(1 - abar_u - sigma**2, 0)) * eps_hat
        if sigma > 0:
            x = x + sigma * noise(x)
    return x


@torch.no_grad()
def read_position(model: Callable, x_0: Tensor, alpha_bar: Tensor, seed: int = 0,
                  parts: Sequence[float] = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6)) -> Tensor:
    """The position on the line of Eq. 7 that explains an image best: x_0 (N, 3, H, W) -> (N,) in 0..C-1.

    A diffusion classifier (Li et al. 2023) that knows fractions. Let e_c = eps - eps_theta(x_t, t, c), and
    lower, upper and cross the means of e_k^2, e_{k+1}^2 and e_k e_{k+1} over t, eps and entries. The estimate
    at position k + a, 1 - a parts of class k's and a of the next, errs by (1-a)^2 lower + 2a(1-a) cross +
    a^2 upper, least at a = (lower - cross) / (lower - 2 cross + upper), kept in [0, 1]. The best k wins.

    parts: the t, as parts of T. All images see one eps at each, and its mirror -eps, so that errors that are
    odd in eps cancel. What a t adds is divided by the root of its mean error: undivided, the small t, with
    their large errors, decide; divided by the error itself, as in a likelihood of normal errors, the large t.
    """
    C, N, gram = model.num_classes, len(x_0), 0.0
    rng = torch.Generator().manual_seed(seed)
    x_0, c = x_0.repeat(C, 1, 1, 1), torch.arange(C, device=x_0.device).repeat_interleave(N)
    for part in parts:
        t = torch.full_like(c, max(1, round(part * (len(alpha_bar) - 1))))
        drawn = torch.randn(1, *x_0.shape[1:], generator=rng).to(x_0)
        errors = [eps - model(q_sample(x_0, t, eps, alpha_bar), t, c) for eps in (drawn, -drawn)]
        e = torch.cat(errors, dim=1).view(C, N, -1).transpose(0, 1).cpu().double()  # (N, C, entries of both)
        products = e @ e.mT
        gram = gram + products / products.diagonal(0, 1, 2).mean(1).sqrt()[:, None, None]
    own, cross = gram.diagonal(0, 1, 2), gram.diagonal(1, 1, 2)  # (N, C): of e_c^2; (N, C-1): of e_c e_{c+1}
    lower, upper = own[:, :-1], own[:, 1:]
    a = ((lower - cross) / (lower - 2 * cross + upper)).nan_to_num(0).clamp(0, 1)  # 0 where the two coincide
    k = ((1 - a) ** 2 * lower + 2 * a * (1 - a) * cross + a**2 * upper).argmin(1, keepdim=True)
    return (k + a.gather(1, k))[:, 0]


# ----------------------------- U-Net of Ho et al. (2020), as published, with a class embedding

NEARLY_ZERO = 1e-5  # gain of the last layer of the network and of each branch (Ho et al.: variance 1e-10)


def glorot(layer: nn.Module, gain: float = 1.0) -> nn.Module:
    """Glorot-uniform weights and zero biases."""
    nn.init.xavier_uniform_(layer.weight, gain)
    nn.init.zeros_(layer.bias)
    return layer


def conv(c_in: int, c_out: int, kernel: int = 3, gain: float = 1.0) -> nn.Module:
    return glorot(nn.Conv2d(c_in, c_out, kernel, padding=kernel // 2), gain)


def in_branch(x: Tensor, config: Config):
    """bfloat16, where build() chose it, inside the residual branches alone: the trunk stays float32.

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
    """Dropout whose mask belongs to a root: with three masks, the estimates of a triplet would differ by a
    noise that no loss could put on a line."""

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
        with in_branch(x, self.config):
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

import argparse
import contextlib
import copy
import csv
import hashlib
import json
import os
import re
import runpy
import signal
import sys
import time
import zipfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, fields, replace
from datetime import timedelta
from functools import partial
from pathlib import Path

import numpy as np
import torch.distributed as dist
from PIL import Image, ImageDraw, ImageOps

HERE = Path(__file__).resolve().parent
RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # set by torchrun
LOCAL_RANK = int(os.environ.get("LOCAL_RANK", 0))


class UserError(Exception):
    """Something the user can mend: one line that names the file or flag and says what to do."""


# -------------------------------------------------------------------------------------- data

SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"}
NUMBER = r"\d+(?:\.\d+)?"


def list_files(root: str | Path, suffixes: set[str] = SUFFIXES) -> list[Path]:
    """Files (images) below root, sorted, those in linked folders too; hidden ones are passed over."""
    root, found, seen = Path(root).resolve(), [], set()
    for folder, subfolders, files in os.walk(root, followlinks=True):
        real = Path(folder).resolve()
        if real in seen or (os.path.islink(folder) and root in real.parents):  # a loop, or a second name
            subfolders.clear()
            continue
        seen.add(real)
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        if "sample.json" in files:  # a folder of samples: these show images that lie below
            files = set(files) - {"sheet.png", "series.gif"}
        found += [Path(folder, name) for name in files if not name.startswith(".")]
    return sorted(path for path in found if path.suffix.lower() in suffixes)


def read_image(path: str | Path) -> Image.Image:
    """An image file as RGB: turned upright (EXIF), 16 bits scaled to 8, first frame."""
    try:
        with Image.open(path) as image:  # which refuses more than 179 million pixels
            if image.mode in ("I", "F"):
                raise ValueError("pixels of 32 bits have no known range; save it with 8 or 16")
            image = ImageOps.exif_transpose(image)
            if image.mode.startswith("I;16"):  # converting to RGB would clip it
                image = Image.fromarray((np.asarray(image, np.float64) / 257).round().astype(np.uint8))
            return image.convert("RGB")
    except Exception as error:  # Pillow's decoders raise many kinds on damaged files
        raise UserError(f"{path}: not readable as an image ({error}); repair or remove it") from None


def read_square(path: str | Path, size: int, crop: int = 0) -> Tensor:
    """The middle crop x crop pixels of an image file (0: see Config), resized: (3, size, size) uint8.

    Of a smaller image, as those that `sample` drew, all of the middle square.
    """
    image = read_image(path)
    crop = crop or (128 if image.size == (352, 288) else math.inf)  # Section 4.1.1
    side = min(crop, *image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    image = image.resize((size, size), Image.Resampling.BICUBIC, box=(left, top, left + side, top + side))
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def read_squares(paths: Sequence[Path], **how) -> Tensor:
    """read_square of every file: (N, 3, size, size) uint8."""
    images, progress = [], Progress(len(paths), "images read")
    with ThreadPoolExecutor() as pool:
        for image in pool.map(partial(read_square, **how), paths):
            images.append(image)
            progress.show(len(images))
    return torch.stack(images)


def classes_from_csv(root: Path, paths: Sequence[Path], columns: str) -> dict[Path, str]:
    """{path: grade} by the CSV files below root with the columns ID,GRADE (none: EyePACS' and APTOS').

    An ID is a file's name or its path from root, with the suffix or without.
    """
    if columns and columns.count(",") != 1:
        raise UserError(f"--columns {columns}: name two, as ID,GRADE")
    pairs = [re.split(r"\s*,\s*", columns)] if columns else [("image", "level"), ("id_code", "diagnosis")]
    grade_of = {}
    for file in list_files(root, {".csv"}):
        try:
            with open(file, newline="", encoding="utf-8-sig", errors="replace") as stream:
                rows = list(csv.DictReader(stream))
        except csv.Error as error:
            raise UserError(f"{file}: not readable as a CSV ({error}); repair or remove it") from None
        for row, (id_column, grade_column) in itertools.product(rows, pairs):
            id, grade = row.get(id_column), row.get(grade_column)
            if id and grade and grade_of.setdefault(id, grade) != grade:
                raise UserError(f"{file}: gives {id} a second grade; remove one of the two")
    found = {}
    for path in paths:
        place = str(path.relative_to(root))
        for name in (path.stem, path.name, os.path.splitext(place)[0], place):
            if name in grade_of:
                found[path] = grade_of[name]
    return found


def classes_from_folders(root: Path, paths: Sequence[Path], names: Sequence[str] = ()) -> dict[Path, str]:
    """{path: class}: the nearest folder above each image, and below root, that is one of `names`.

    Without names, the nearest of the commonest kind, digits read as #: 17/Mayo 2/copy (1)/a.bmp is a Mayo 2,
    where "Mayo #" is more frequent than "copy (#)".
    """
    kind = partial(re.sub, NUMBER, "#")
    kinds = Counter(kind(path.parent.name) for path in paths if path.parent != root)
    classes = {}
    for path in paths:
        folders = [folder.name for folder in path.parents if root in folder.parents]
        if names:
            folders = [name for name in folders if name in names]
        else:
            folders.sort(key=lambda name: -kinds[kind(name)])  # equally common ones: nearest first
        if folders:
            classes[path] = folders[0]
    return classes


def rank_classes(found: set[str], names: Sequence[str] = ()) -> dict[str, float]:
    """{class: severity}, ascending: in the order of names, else by the one number in each (Mayo 2: 2)."""
    listed = ", ".join(sorted(found)[:12])
    if names:
        if sorted(names) != sorted(found):
            raise UserError(f"--order {','.join(names)}: the classes are {listed}; name each of them once")
        return {name: float(i) for i, name in enumerate(names)}
    if len(found) > 12:
        raise UserError(f"{len(found)} classes ({listed}, ...): patients, most likely; pass --order")
    numbers = {name: re.findall(NUMBER, name) for name in found}
    severity = {name: float(number[0]) for name, number in numbers.items() if len(number) == 1}
    if len(set(severity.values())) < len(found):
        raise UserError(f"classes {listed}: no order that a program may guess; pass --order with the names, "
                        "in ascending severity")
    return dict(sorted(severity.items(), key=lambda item: item[1]))


def find_images(root: str | Path, order: str = "", columns: str = ""):
    """(paths, class index of each, class names in ascending severity); says what it found."""
    if not Path(root).is_dir():
        raise UserError(f"{root}: no such folder (data/README.md says how to get the data sets)")
    root = Path(root).resolve()
    paths = list_files(root)
    if not paths:
        raise UserError(f"{root}: no images in it ({', '.join(sorted(SUFFIXES))})")
    ordered = re.split(r"\s*,\s*", order) if order else []
    class_of = classes_from_csv(root, paths, columns)
    if columns and not class_of:
        raise UserError(f"--columns {columns}: no CSV in {root} has them and lists an image that is there")
    class_of = class_of or classes_from_folders(root, paths, ordered)
    names = list(rank_classes(set(class_of.values()), ordered))
    if len(names) < 2:
        raise UserError(f"{root}: images of {len(names)} classes; name the folder that holds those of all")
    namesakes = Counter((name, path.name) for path, name in class_of.items())
    first = {}  # of those with the same class, file name and bytes
    for path, name in class_of.items():
        content = path.read_bytes() if namesakes[name, path.name] > 1 else b""
        first.setdefault((name, path.name, sha256(content)), path)
    kept = list(first.values())
    labels = [names.index(class_of[path]) for path in kept]
    twins, others = len(class_of) - len(kept), len(paths) - len(class_of)
    counts = ", ".join(f"{name} {labels.count(i):,}" for i, name in enumerate(names))
    say(f"{root}: {counts}; passed over: {twins:,} twins (same class, name and content), {others:,} without "
        "a class")
    return kept, labels, names


def load_images(root: str | Path, size: int = 64, crop: int = 0, order: str = "", columns: str = ""):
    """Graded images as (uint8 (N, 3, size, size), labels long (N,), class names in ascending severity).

    Reads LIMUC, EyePACS and any tree of class folders as distributed (data/README.md): an image's class is
    its grade in a CSV, or its folder's name. Raises UserError naming the file or flag.
    """
    paths, labels, names = find_images(root, order, columns)
    return read_squares(paths, size=size, crop=crop), torch.tensor(labels), names


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
    rng = torch.Generator().manual_seed(0)
    x_0 = to_unit(images[torch.randint(len(images), (n,), generator=rng).to(images.device)])
    t = torch.linspace(1, len(alpha_bar) - 1, n).round().long().to(x_0.device)
    x_t = q_sample(x_0, t, torch.randn(x_0.shape, generator=rng).to(x_0), alpha_bar)
    eps_hat = torch.stack([model(x_t, t, torch.full_like(t, c)) for c in range(model.num_classes)], dim=1)
    gap = noise_distance(eps_hat[:, 0], eps_hat[:, -1]).mean().item()
    return straightness(eps_hat).mean().item() if model.num_classes >= 3 else math.nan, gap


def train(config: Config) -> Path:
    """Train, or resume, the run in config.out and return that folder: checkpoint.pt, metrics.csv, sheet.png.

    Under torchrun each process draws its share of the batch, and gradients are averaged.
    """
    check_config(config)
    device = start(config.device)
    root = Path(config.data or HERE / "data" / "demo")
    out = Path(config.out or Path("runs") / root.resolve().name)
    if not config.data and RANK == 0:
        runpy.run_path(str(HERE / "data" / "demo.py"))["make"](root)  # does nothing where the set is there
    from_all(None)  # the others wait for the first
    images, labels, names = load_images(root, config.size, config.crop, config.order, config.columns)
    severities = list(rank_classes(set(names), names if config.order else ()).values())
    classes = Classes(names, severities, labels.bincount().tolist())
    B = config.batch // WORLD
    if config.batch % WORLD:
        raise UserError(f"--batch {config.batch}: must be a multiple of the {WORLD} processes")
    if config.ordinal > 0 and len(names) < 3:
        say("two classes only: no triplet p < q < r, so no ordinal loss; this is the plain diffusion model")
    elif config.ordinal > 0 and B * config.triplet_part < 1:
        raise UserError(f"--triplet-part {config.triplet_part} of the {B} images of a process is none; "
                        "raise it or --batch, or pass --ordinal 0")

    torch.manual_seed(seed_of("weights", config.seed))
    model = build(config, len(names), device)
    ema = copy.deepcopy(model).eval().requires_grad_(False)
    optimizer = torch.optim.Adam(model.parameters(), lr=config.lr, fused=True)
    parts = dict(model=model, ema=ema, optimizer=optimizer)
    lock = lock_folder(out) if RANK == 0 else None  # held as long as this variable
    step = resume(out, config, classes, parts)
    if len(set(from_all(step))) > 1:
        raise UserError(f"{out}: not the same folder for all processes; it must be one that all see")
    log, progress = Log(out / "metrics.csv", step), Progress(config.steps, "steps", step)
    say(f"{out}: {sum(p.numel() for p in model.parameters()):,} parameters on {device} x {WORLD}, "
        f"step {step:,} of {config.steps:,}")

    images, alpha_bar, net = images.to(device), alpha_bars(config), compiled(model, config, device)
    model.train()
    stopping = 0
    with noted_signals() as signals:
        while True:
            at_end = step >= config.steps
            sheet_due = at_end or (step and config.sheet_every and step % config.sheet_every == 0)
            if RANK == 0 and sheet_due:  # here, after saving: if killed while drawing, the run draws again
                save_picture(draw_sheet(ema, classes, config, device), out / "sheet.png")
            if at_end or stopping:
                break
            rng = torch.Generator().manual_seed(seed_of("batch", config.seed, step, RANK))
            batch = draw_batch(labels, severities, config, B, rng).to(device)
            torch.manual_seed(seed_of("eps", config.seed, step, RANK))  # of eps and of dropout
            losses = training_step(net, ema, optimizer, images, batch, alpha_bar, config, step, average)
            step += 1
            if WORLD == 1 or step % 10 == 0:  # several processes agree on it, which costs time
                stopping = max(from_all(signals[0] if signals else 0))
            if RANK == 0:
                measuring = step % config.log_every == 0 or step == config.steps
                measured = "%.7g,%.7g" % measure_line(ema, images, alpha_bar) if measuring else ","
                log.pending.append((step, losses, measured))
                progress.show(step, lambda: log.means(config.log_every))
                if step % config.save_every == 0 or step == config.steps or stopping:
                    write_text(log.path, "\n".join(log.read()) + "\n")  # raises where a loss is not finite
                    state = dict(config=asdict(config), classes=asdict(classes), step=step)
                    state |= {name: part.state_dict() for name, part in parts.items()}
                    write_file(out / "checkpoint.pt", partial(torch.save, state))
        from_all(None)  # the others wait until the first has saved
    if step < config.steps:
        say(f"{out}: stopped and saved at step {step:,}; the same command goes on from there")
        raise SystemExit(128 + stopping)
    say(f"{out}: trained to step {step:,}; {out / 'sheet.png'} shows samples")
    return out


class Log:
    """metrics.csv, a row a step. Losses stay on the device until they are read: that waits for it."""

    def __init__(self, path: Path, step: int):
        self.path, self.pending = path, []  # (step, (4,) of training_step, "straightness,gap" or ",")
        self.rows = ["step,loss,dm,ordinal,grad_norm,straightness,gap"]
        if step and path.exists():  # without rows that an interrupted run wrote after its last checkpoint
            self.rows = path.read_text().splitlines()[: step + 1]

    def read(self) -> list[str]:
        """The rows; losses that are not finite end the run."""
        for step, losses, measured in self.pending:
            losses = losses.tolist()
            if not all(map(math.isfinite, losses)):
                raise UserError(f"step {step}: the loss is not finite; train with a lower --lr in another "
                                "--out (checkpoint.pt holds the last good state, if one was saved)")
            self.rows.append("%d,%.7g,%.7g,%.7g,%.7g,%s" % (step, *losses, measured))
        self.pending = []
        return self.rows

    def means(self, last: int) -> str:
        rows = [row.split(",") for row in self.read()[1:][-last:]]
        dm, ordinal = np.mean([[float(row[2]), float(row[3])] for row in rows], axis=0)
        line = [f"  straightness {float(row[5]):.2f}  gap {float(row[6]):.4f}" for row in rows if row[6]]
        return f"  L_DM {dm:.4f}  lambda_t L_ordinal {ordinal:.6f}" + "".join(line[-1:])


# ------------------------------------------------------------------------------ sampling run


@torch.no_grad()
def draw_images(model: Callable, position: Sequence[float], keys: Sequence[tuple], config: Config,
                device: torch.device | str = "cpu",
                given: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """Images at positions in 0..C-1: (B, 3, size, size) uint8 on the CPU.

    All noise of row i comes from keys[i] alone: it is the same image, up to rounding, in any batch.
    given: the images to move (uint8) and their own positions (B,). Each is encoded at its own position, which
    leaves in x_T what the class does not explain, and drawn from there; nothing is clipped, as encoding
    clipped nothing.
    """
    rngs = [torch.Generator().manual_seed(seed_of("sample", *key)) for key in keys]
    alpha_bar = alpha_bars(config)
    times = torch.linspace(config.timesteps, 0, config.sample_steps + 1).round().long().tolist()
    guided = partial(guided_eps, model, scale=config.guidance)

    def noise(x=None):
        drawn = [torch.randn(3, config.size, config.size, generator=rng) for rng in rngs]
        return torch.stack(drawn).to(device)

    if given:
        images, own = given
        x_0 = to_unit(images).to(device)
        x_T = ddim(partial(guided, position=own), x_0, alpha_bar, times[::-1], clip=False)
    else:
        x_T = noise()
    eps_fn = partial(guided, position=torch.tensor(position))
    return to_uint8(ddim(eps_fn, x_T, alpha_bar, times, config.eta, clip=not given, noise=noise)).cpu()


def draw_sheet(model: UNet, classes: Classes, config: Config, device: torch.device):
    """A sheet of samples: a column a class, the same starting noise along a row."""
    keys = [(config.seed, row) for row in range(6)]
    return sheet_of([(name, draw_images(model, [float(c)] * len(keys), keys, config, device))
                     for c, name in enumerate(classes.names)])


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


def parse_severities(text: str, classes: Classes, flag: str = "--class") -> dict[str, float]:
    """--class as {name of the folder: position}: all, 3, "Mayo 3", 1.5 (between two classes), 0:3:0.25."""
    named = {name: float(i) for i, name in enumerate(classes.names) if text in ("all", name)}
    if named:
        return named
    low, high = classes.severities[0], classes.severities[-1]
    try:
        first, last, step = map(float, text.split(":") if ":" in text else (text, text, 1))
        count = int((last - first) / step + 1e-6) + 1
        severities = [round(first + i * step, 6) for i in range(count if count <= 1000 else 0)]
    except (ValueError, ArithmeticError):
        severities = []
    if not severities or min(severities) < low or max(severities) > high:
        raise UserError(f"{flag} {text}: name one of {', '.join(classes.names)}, a severity from {low:g} to "
                        f"{high:g}, or FIRST:LAST:STEP, as 0:3:0.25")
    wanted = {}
    for severity in severities:
        position = float(np.interp(severity, classes.severities, range(len(classes.names))))
        wanted[classes.names[int(position)] if position.is_integer() else f"{severity:.10g}"] = position
    return wanted


@dataclass
class Network:
    """A trained network ready to draw and read. name: RUN-STEP; file: checkpoint."""

    model: UNet
    config: Config  # of the run, with the batch (images at once) and seed of drawing and reading
    classes: Classes
    device: torch.device
    name: str
    file: Path


def load_network(checkpoint: str | Path, device: str, batch: int = 0, **changes) -> Network:
    """The averaged network of a checkpoint or a run's folder [the newest in runs/, else data/demo.pt]."""
    device = start(device)
    runs, demo = Path("runs").glob("*/checkpoint.pt"), HERE / "data" / "demo.pt"
    changes["batch"] = batch or (16 if device.type == "cpu" else 128)
    with checkpoint_at(checkpoint or max(runs, key=os.path.getmtime, default=demo)) as state:
        file, config, classes = state["file"], replace(state["config"], **changes), state["classes"]
        check_config(config)
        model = build(config, len(classes.names), device).eval()
        model.load_state_dict(state["ema"])
        say(f"{file}: step {state['step']:,}, classes {', '.join(classes.names)}")
    run = file.parent.name if file.name == "checkpoint.pt" else f"{file.parent.name}-{file.stem}"
    return Network(model, config, classes, device, f"{run}-{state['step']}", file)


def sample(checkpoint: str | Path = "", severity: str = "all", n: int = 0, each: int = 0,
           out: str | Path = "", seed: int = 0, batch: int = 0, device: str = "auto", image: str | Path = "",
           at: str = "", **changes) -> Path:
    """Draw images into OUT/<class>/<i>.png and OUT/sheet.png; what is there already is kept. Returns OUT.

    checkpoint: see load_network. severity: see parse_severities.
    n images in all, the classes at their training frequencies (those between two in proportion), or `each` of
    every severity [16 of one, else 8]. Image i of a class depends on (seed, class, i) alone; in a series
    0:3:0.25 on (seed, i), so that a row of the sheet shows one starting noise at rising severity.
    changes: sample_steps, guidance, eta, precision, compile, where they differ from the run's.

    With image, a file or folder, given images are moved to other severities instead, without guidance, into
    OUT/<class>/<name>.png; at: the severity that they have, else it is read from each.
    """
    if image and (n or each or {"guidance", "eta"} & changes.keys()):
        raise UserError("--image, images to move: goes without -n, --each, --guidance and --eta")
    if at and not image:
        raise UserError("--at is the severity of given images: name them with --image")
    if min(n, each) < 0 or (n and each):
        raise UserError("-n, --each: a number of images, and only one of the two")
    if image:
        changes.update(guidance=1.0, eta=0.0)
    network = load_network(checkpoint, device, batch, seed=seed, **changes)
    config, classes, device = network.config, network.classes, network.device
    wanted, rising = parse_severities(severity, classes), ":" in severity
    series = rising and not image  # one noise a row
    out = Path(out or f"samples/{network.name}" + ("-moved" if image else "-series" * series))
    settings = dict(checkpoint=sha256(network.file.read_bytes()), seed=seed, series=series, eta=config.eta,
                    guidance=config.guidance, sample_steps=config.sample_steps)
    if image:
        files, _, images = given_images([image], network)
        settings.update(at=at, images=sha256(images.numpy().tobytes()))
        folder = Path(image).resolve()
        titles = [Path("-".join(file.relative_to(folder).parts) or file.name).stem for file in files]
        if len(set(titles)) < len(titles):
            raise UserError(f"--image {image}: two images would get one name in {out}; rename one")
        given_at = list(parse_severities(at, classes, "--at").values()) if at else []
        if len(given_at) > 1:
            raise UserError(f"--at {at}: name one severity, that of all these images")
    if RANK == 0:
        lock = lock_folder(out)  # held as long as this variable
        note_settings(out, settings)
    from_all(None)  # the others wait for the first
    if image:
        own = torch.tensor(given_at * len(files)) if at else read_positions(images, network, seed).float()
        counts = [len(files)] * len(wanted)
    else:
        counts = [each or (16 if len(wanted) == 1 else 8)] * len(wanted)
        if n:
            parts = np.interp(list(wanted.values()), range(len(classes.names)), classes.counts)
            counts = np.diff(np.round(n * np.cumsum([0, *parts]) / sum(parts))).astype(int)
        titles = [f"{i:05d}" for i in range(max(counts))]

    jobs = [(out / name / f"{titles[i]}.png", position, i)
            for (name, position), count in zip(wanted.items(), counts) for i in range(count)]
    net = network.model
    if config.compile == "on" or len(jobs) >= 1000:  # compiling takes longer than a few images do
        net = compiled(net, config, device)
    batch, progress = config.batch, Progress(len(jobs), "images")
    for first in range(RANK * batch, len(jobs), WORLD * batch):
        # Batches are laid out over all jobs, so that an image shares its batch with the same others whatever
        # is there already: not even its rounding changes.
        some = jobs[first : first + batch]
        if not all(file.exists() for file, _, _ in some):
            files, positions, index = zip(*some)
            keys = [(seed, i) if series else (seed, i, round(p, 6)) for i, p in zip(index, positions)]
            given = (images[list(index)], own[list(index)]) if image else None
            drawn = draw_images(net, positions, keys, config, device, given)
            for x, file in zip(drawn, files):
                if not file.exists():
                    save_picture(to_picture(x), file)
        progress.show(min(first + WORLD * batch, len(jobs)))
    from_all(None)
    if RANK == 0:
        most = 64 if len(wanted) == 1 and not image else 8
        step = math.ceil(len(titles) / most) if image else 1
        columns = [(name, [read_square(out / name / f"{title}.png", config.size)
                           for title in titles[:count:step][:most]])
                   for name, count in zip(wanted, counts) if count]
        if rising:
            save_series(columns, out / "series.gif")
        if image:
            columns.insert(0, ("given", images[::step]))
        elif len(columns) == 1:  # one severity: a square of its images
            (name, pictures), side = columns[0], math.ceil(math.sqrt(len(columns[0][1])))
            columns = [(name if x == 0 else "", pictures[x::side]) for x in range(side)]
        save_picture(sheet_of(columns), out / "sheet.png")
    say(f"{len(jobs):,} images are in {out}; {out / 'sheet.png'} shows some")
    return out


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def note_settings(out: Path, settings: dict) -> None:
    """Keep images of different settings apart: OUT/sample.json says what the folder's were drawn with."""
    file, text = out / "sample.json", json.dumps(settings, indent=1)
    if file.exists() and file.read_text(errors="replace") != text:
        raise UserError(f"{out}: holds images of another checkpoint or other settings, see its sample.json; "
                        "delete it or choose another --out")
    write_text(file, text)


# ------------------------------------------------------------------------------ given images


def given_images(paths: Sequence[str | Path], network: Network) -> tuple[list[Path], list[str], Tensor]:
    """Of image files and folders: (files, class each lies under or "", images (N, 3, size, size) uint8).

    That class is its grade in a CSV of the folder, or the nearest folder above that has the name of one.
    """
    files, own, config, names = [], [], network.config, network.classes.names
    for path in (Path(path).resolve() for path in paths):
        found = list_files(path) if path.is_dir() else [path]
        if not found:
            raise UserError(f"{path}: no images in it")
        class_of = classes_from_folders(Path(path.anchor), found, names)
        class_of |= classes_from_csv(path, found, config.columns)
        files += found
        own += [class_of.get(file, "") for file in found]
    return files, own, read_squares(files, size=config.size, crop=config.crop)


def read_positions(images: Tensor, network: Network, seed: int) -> Tensor:
    """read_position of uint8 images, a batch at a time: (N, 3, H, W) -> (N,)."""
    found, progress, alpha_bar = [], Progress(len(images), "severities read"), alpha_bars(network.config)
    for part in images.split(network.config.batch):
        found += read_position(network.model, to_unit(part).to(network.device), alpha_bar, seed)
        progress.show(len(found))
    return torch.stack(found)


def quadratic_kappa(confusion: Tensor) -> float:
    """Cohen's kappa with weights (i - j)^2 of (C, C) counts: 1 perfect, 0 chance; nan for one class."""
    table = confusion.double()
    index = torch.arange(len(table), dtype=torch.float64)
    cost = (index[:, None] - index).square()
    by_chance = (cost * torch.outer(table.sum(1), table.sum(0))).sum() / table.sum()
    return (1 - (cost * table).sum() / by_chance).item()


def grade(images: Sequence[str | Path], checkpoint: str | Path = "", seed: int = 0, batch: int = 0,
          device: str = "auto") -> None:
    """Read the severity of image files and folders: a CSV of file, severity, grade (nearest class), given.

    It goes to standard output; what else there is to say, to standard error: where all images lie under a
    class (see given_images), a comparison: kappa, mean error, each class's readings.
    """
    table = csv.writer(sys.stdout)
    with contextlib.redirect_stdout(sys.stderr):
        network = load_network(checkpoint, device, batch, seed=seed)
        files, given, pixels = given_images(images, network)
        positions = read_positions(pixels, network, seed)
        if RANK > 0:  # one process writes
            return
        names, scale = network.classes.names, torch.tensor(network.classes.severities)
        severities = torch.tensor(np.interp(positions, range(len(names)), scale))
        nearest = (positions + 0.5).long()
        table.writerow(["file", "severity", "grade", "given"])
        for file, severity, c, own in zip(files, severities, nearest, given):
            table.writerow([file, f"{severity:.3f}", names[c], own])
        if not set(given) <= set(names):
            say("some images lie under no class of the checkpoint: no grades to compare with")
            return
        own = torch.tensor([names.index(name) for name in given])
        confusion = F.one_hot(own, len(names)).T @ F.one_hot(nearest, len(names))
        kappa, error = quadratic_kappa(confusion), (severities - scale[own]).abs().mean()
        say(f"{len(files):,} images, quadratic kappa {kappa:.3f}, mean error {error:.3f}")
        for c in own.unique():
            read = ", ".join(f"{n} as {name}" for n, name in zip(confusion[c].tolist(), names))
            say(f"given {names[c]}: read {read}; mean severity read {severities[own == c].mean():.2f}")


# ------------------------------------------------------------------------- devices, processes


def start(name: str) -> torch.device:
    """The device; under torchrun, this process's own, and it joins the others."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if name == "cuda" and here > max(1, torch.cuda.device_count()):
        raise UserError(f"--device cuda: {torch.cuda.device_count()} GPUs for {here} processes; start fewer")
    try:
        device = torch.device(f"cuda:{LOCAL_RANK}" if name == "cuda" else name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name}: {error}") from None
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.backends.cudnn.benchmark = True  # all batches have one shape: look for the fastest kernels
    if WORLD > 1 and not dist.is_initialized():
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
    """The network under torch.compile, where asked for and possible. Its weights stay those of `model`."""
    if config.compile == "on" or (config.compile == "auto" and device.type == "cuda"):
        try:
            torch.compile(torch.sin)(torch.zeros(8, device=device))  # is there a compiler at all?
            return torch.compile(model, dynamic=False)  # batches have few shapes: each its own, faster code
        except Exception as error:
            say(f"torch.compile does not work here ({type(error).__name__}); going on without")
    return model


def average(tensors: list[Tensor]) -> None:
    """Replace each tensor by its mean over all processes, in one message."""
    if WORLD > 1:
        message = torch.cat([t.flatten() for t in tensors])
        dist.all_reduce(message)
        for t, mean in zip(tensors, (message / WORLD).split([t.numel() for t in tensors])):
            t.copy_(mean.view_as(t))


def from_all(value) -> list:
    """The value of every process; it waits until all have come here."""
    values = [value] * WORLD
    if WORLD > 1:
        dist.all_gather_object(values, value)
    return values


@contextlib.contextmanager
def noted_signals():
    """A list of the Ctrl-C and SIGTERM (clusters send it) that came, so that a loop can save first."""
    noted = []

    def note(number, frame):
        noted.append(number)
        if len(noted) > 2:  # launchers send one stop twice; a third ends at once
            raise KeyboardInterrupt

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield noted
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def say(line: str) -> None:
    """Print a line, from the first process alone."""
    if RANK == 0:
        print(line, flush=True)


class Progress:
    """Says how far a long job is: after its first part, then every few seconds, later once a minute."""

    def __init__(self, total: int, unit: str, done: int = 0):
        self.total, self.unit, self.first, self.begun, self.next = total, unit, done, time.monotonic(), 0.0

    def show(self, done: int, text: Callable = str) -> None:
        """text(): what else to say, asked for only when it is time."""
        if done == self.total or time.monotonic() > self.next:
            seconds = time.monotonic() - self.begun
            self.next = time.monotonic() + min(3 + seconds / 10, 60)
            left = timedelta(seconds=round((self.total - done) * seconds / (done - self.first)))
            say(f"{done:,}/{self.total:,} {self.unit}{text()}  {left} left")  # as 2 days, 3:04:05


# ------------------------------------------------------------------ checkpoints and other files


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
    ):
        if wrong:
            raise UserError(message)


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
        neighbour.unlink(missing_ok=True)
        raise UserError(f"{path}: cannot be written ({error}): free some space or choose another place; what "
                        "was saved before is intact") from None


def lock_folder(out: Path):
    """Make the folder and lock it: the lock ends with the file returned, or with the process."""
    out.mkdir(parents=True, exist_ok=True)
    lock = open(out / ".lock", "a")
    try:
        import fcntl  # not on Windows

        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except ImportError:
        pass
    except BlockingIOError:
        raise UserError(f"{out}: another process is writing there; wait, or choose another --out") from None
    return lock


def write_text(path: Path, text: str) -> None:
    write_file(path, lambda file: file.write(text.encode()))


def save_picture(picture: Image.Image, file: Path) -> None:
    write_file(file, partial(picture.save, format="PNG"))


@contextlib.contextmanager
def checkpoint_at(path: str | Path):
    """{file, config: Config, classes: Classes, step, ema, [model, optimizer]} of a checkpoint, given its file
    or its run's folder; no code in it runs.

    Whatever is wrong with it, here or inside the `with`, is one line: damaged files raise many kinds.
    """
    path = Path(path).resolve()
    if path.is_dir():
        path /= "checkpoint.pt"
    try:
        with zipfile.ZipFile(path) as archive:
            if archive.testzip():  # torch.load does not look at the checksums
                raise ValueError("a checksum is wrong")
        state = torch.load(path, map_location="cpu", weights_only=True)
        state.update(file=path, config=Config(**state["config"]), classes=Classes(**state["classes"]))
        yield state
    except Exception as error:
        if isinstance(error, UserError) or out_of_memory(error):
            raise
        raise UserError(f"{path}: no whole checkpoint of odm.py, or not of the network that --ch, --ch-mult, "
                        f"--blocks, --attention describe ({str(error)[:200]}); take another") from None


def resume(out: Path, config: Config, classes: Classes, parts: dict) -> int:
    """Load the run's own checkpoint into parts, if there is one, else --init's; return the step reached."""
    if (out / "checkpoint.pt").exists():
        with checkpoint_at(out) as state:
            there, now = vars(state["config"]) | {"data": state["classes"]}, vars(config) | {"data": classes}
            fixed = ["data"] + [f.name for f in fields(Config) if not f.metadata["may_change"]]
            if other := [f"{flag(f)} (there {there[f]}, now {now[f]})" for f in fixed if there[f] != now[f]]:
                raise UserError(f"{out}: holds a run with other settings: {', '.join(other)}: use the same "
                                "or another --out")
            if state["step"] > (1 - config.decay) * there["steps"] and config.steps > there["steps"]:
                # Back at once, from 0 to --lr, it can destroy the network; --init warms it up.
                raise UserError(f"--steps {config.steps}: the learning rate of {out} has been falling to "
                                f"step {there['steps']}; go on with --init {out} and another --out")
            for name, part in parts.items():
                part.load_state_dict(state[name])
            return state["step"]
    if config.init:
        with checkpoint_at(config.init) as state:
            weights, embedding = state["ema"], parts["model"].label.weight.detach()
            if weights["label.weight"].shape != embedding.shape:  # other classes: a fresh embedding
                weights["label.weight"] = embedding
            for name in ("model", "ema"):
                parts[name].load_state_dict(weights)
    return 0


# ------------------------------------------------------------------------------ command line


class Parser(argparse.ArgumentParser):
    """Errors in one line, exit status 2."""

    def error(self, message: str):
        self.exit(2, f"odm.py: error: {' '.join(message.split())}; see python {self.prog} --help\n")


def ints(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(",") if text)


def parser() -> Parser:
    raw = argparse.RawDescriptionHelpFormatter
    top = Parser(prog="odm.py", description=__doc__, formatter_class=raw)
    commands = top.add_subparsers(dest="command", required=True)
    options = dict(allow_abbrev=False, argument_default=argparse.SUPPRESS)  # what is not given is not set
    training = commands.add_parser("train", help="train on a folder of graded images, or resume", **options)
    sampling = commands.add_parser("sample", help="draw images, or move given ones", **options)
    grading = commands.add_parser("grade", help="read the severity of images", **options)
    text = "paper: the defaults below; small: SMALL in odm.py, for two cores [paper with --data, else small]"
    training.add_argument("--preset", choices=("paper", "small"), help=text)
    grading.add_argument("images", nargs="+", help="image files, and folders of them")
    add = sampling.add_argument
    text = '3, "Mayo 3", 1.5 (between two), 0:3:0.25 (a series: one noise a row) or all [all]'
    add("--class", dest="severity", help=text)
    add("-n", type=int, help="images in all, classes at their training frequencies")
    add("--each", type=int, help="images of each severity [16 of one, else 8]")
    add("--out", help="folder for the images [samples/RUN-STEP]")
    add("--image", help="an image or a folder of them to move to --class [none: images are drawn from noise]")
    add("--at", help="the severity that the images have [read from them]")
    for add in (sampling.add_argument, grading.add_argument):
        add("--checkpoint", help="a checkpoint or a run's folder [the newest in runs/, else data/demo.pt]")
        add("--seed", type=int, help="of all noise [0]")
        text = "images at once [16 on a CPU, else 128]; lower it where memory runs out"
        add("--batch", type=int, help=text)
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
    speaks = LOCAL_RANK == 0  # most errors are those of all processes: one says it
    try:
        command = args.pop("command")
        if command == "train":
            preset = args.pop("preset", "paper" if args.get("data") else "small")
            train(Config(**{**(SMALL if preset == "small" else {}), **args}))
        else:
            {"sample": sample, "grade": grade}[command](**args)
        if dist.is_initialized():
            dist.destroy_process_group()
        return 0
    except KeyboardInterrupt:
        message, status = "stopped; train and sample go on with the same command", 130
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
        print(f"odm.py: error: {' '.join(message.split())}", file=sys.stderr)
    return status


def out_of_memory(error: BaseException) -> bool:
    """Whether this is how torch or numpy, on a GPU or a CPU, say that memory ran out."""
    words = "out of memory|not enough memory|allocate memory|ALLOC_FAILED"
    return isinstance(error, MemoryError) or bool(re.search(words, str(error)))


if __name__ == "__main__":
    sys.exit(main())
