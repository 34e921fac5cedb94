"""How good are generated images? FID, KID, precision and recall, and severity agreement, overall and per class.

    python fid.py data/limuc samples/limuc                       # Table 1 of the paper, and a row per class
    python fid.py data/limuc samples/dm samples/odm --plot fig4.png --json scores.json
    python fid.py data/limuc stylegan2 --real-stats limuc.npz    # any generator; the real features are kept

    frechet_distance      FID: distance of the Gaussians fitted to real and generated features (Heusel et al. 2017)
    kernel_distance       KID: the same question without a bias at small n (Binkowski et al. 2018)
    precision_recall      how much of one set lies inside the other (Kynkaanniemi et al. 2019)
    severity_agreement    does an image show the grade that was asked for?
    Inception, features   the network all of them look through (the FID Inception of 2015-12-05)

Real images are read as for training (odm.load_images). The generated side is a folder of images, or of class folders
named like the real classes, from any generator. Both sides should have one resolution: by default the real images are
brought to the size of the generated ones.
"""

import argparse
import hashlib
import http.client
import itertools
import json
import math
import socket
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn

import odm

WEIGHTS_URL = "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth"
WEIGHTS_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
DIMS = (64, 192, 768, 2048)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

# ------------------------------------------------------------------------------------------ distances between features


def frechet_distance(real: Tensor, fake: Tensor) -> float:
    """FID: |mu_1 - mu_2|^2 + tr(S_1 + S_2 - 2 (S_1 S_2)^(1/2)) of the Gaussians fitted to real (N, d) and fake (M, d).

    In [0, inf), 0 for equal means and covariances; units of the features squared. N, M >= 2, else ValueError; any
    N and d, singular covariances included. Sums run in float64. Biased upward when N or M is not well above d.
    """
    real, fake = _feature_pair(real, fake, at_least=2)
    return _frechet(*_mean_and_factor(real), *_mean_and_factor(fake))


def frechet_distance_from_moments(mu1: Tensor, cov1: Tensor, mu2: Tensor, cov2: Tensor) -> float:
    """frechet_distance from means (d,) and covariances (d, d), for statistics that were published without features."""

    mu1, cov1, mu2, cov2 = (torch.as_tensor(moment).double() for moment in (mu1, cov1, mu2, cov2))
    return _frechet(mu1, _factor(cov1), mu2, _factor(cov2))


def _frechet(mu1: Tensor, a: Tensor, mu2: Tensor, b: Tensor) -> float:
    # S_1 = A'A and S_2 = B'B: the eigenvalues of S_1 S_2 are the squared singular values of A B', so that
    # tr (S_1 S_2)^(1/2) is their plain sum. No matrix square root, nothing complex, nothing added to a diagonal.
    value = (mu1 - mu2).square().sum() + a.square().sum() + b.square().sum() - 2 * _nuclear_norm(a @ b.T)
    return max(value.item(), 0.0)  # equal sets leave a rounding error of either sign


def _nuclear_norm(m: Tensor) -> Tensor:
    """Sum of the singular values of m."""
    # The roots of the eigenvalues of m m' come several times sooner, but the squares drown small values in rounding.
    squares = torch.linalg.eigvalsh(m @ m.T if len(m) <= m.shape[1] else m.T @ m).clamp_min(0)
    total, rounding = squares.sqrt().sum(), torch.finfo(m.dtype).eps * squares.max()
    if (rounding / (squares + rounding).sqrt()).sum() < 1e-9 * total:  # at worst; errors of both signs mostly cancel
        return total
    return torch.linalg.svdvals(m).sum()


def _mean_and_factor(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (d,) of features (n, d), and an A (min(n, d), d) with A'A = their covariance."""
    n, d = x.shape
    mean = x.mean(0, dtype=torch.float64)
    if n <= d:
        return mean, (x.double() - mean) / math.sqrt(n - 1)
    blocks = (block.double() - mean for block in x.split(d))  # no float64 copy of all features
    return mean, _factor(sum(block.T @ block for block in blocks) / (n - 1))


def _factor(cov: Tensor) -> Tensor:
    """A (d, d) with A'A = cov."""
    lower, failed = torch.linalg.cholesky_ex(cov)
    if not failed:
        return lower.T
    w, v = torch.linalg.eigh(cov)  # cov is singular: A = w^(1/2) V'
    return w.clamp_min(0).sqrt()[:, None] * v.T  # rounding can push a w that should be 0 below it


def kernel_distance(real: Tensor, fake: Tensor, blocks: int = 10) -> tuple[float, float]:
    """KID, the unbiased squared MMD of real (N, d) and fake (M, d) with k(x, y) = (x.y / d + 1)^3, and its standard error.

    mean k(x, x') + mean k(y, y') - 2 mean k(x, y) over all pairs of different images; 0 on average for equal
    distributions at any n, hence below 0 half of the time. The error is the jackknife's: it leaves out one of `blocks`
    interleaved parts of both sets at a time (nan where a set is too small for that). N, M >= 2, else ValueError.
    """
    real, fake = _feature_pair(real, fake, at_least=2)
    blocks = min(blocks, len(real), len(fake))
    xs, ys = ([z[b::blocks] for b in range(blocks)] for z in (real, fake))  # interleaved: each part has all classes
    xx, yy, xy = (torch.zeros(blocks, blocks, dtype=torch.float64) for _ in range(3))  # kernel sums per pair of parts
    for i, j in itertools.product(range(blocks), repeat=2):
        xy[i, j] = _kernel(xs[i], ys[j]).sum(dtype=torch.float64)
        if i <= j:
            for sums, parts in ((xx, xs), (yy, ys)):
                k = _kernel(parts[i], parts[j])
                if i == j:
                    k.fill_diagonal_(0)  # an image with itself is what makes the plain estimate biased
                sums[i, j] = sums[j, i] = k.sum(dtype=torch.float64)
    n, m = (torch.tensor([len(p) for p in parts], dtype=torch.float64) for parts in (xs, ys))

    def estimate(keep: list[int]) -> float:
        kept_n, kept_m = n[keep].sum(), m[keep].sum()
        kept_xx, kept_yy, kept_xy = (s[keep][:, keep].sum() for s in (xx, yy, xy))
        return (kept_xx / (kept_n * (kept_n - 1)) + kept_yy / (kept_m * (kept_m - 1)) - 2 * kept_xy / (kept_n * kept_m)).item()

    value = estimate(list(range(blocks)))
    if min(len(real), len(fake)) < 3:
        return value, math.nan
    left_out = torch.tensor([estimate([i for i in range(blocks) if i != b]) for b in range(blocks)], dtype=torch.float64)
    return value, math.sqrt((blocks - 1) * left_out.var(correction=0).item())


def _kernel(x: Tensor, y: Tensor) -> Tensor:
    return (x @ y.T).div_(x.shape[1]).add_(1).pow_(3)


def precision_recall(real: Tensor, fake: Tensor, k: int = 3) -> tuple[float, float]:
    """Precision, the share of fake (M, d) inside the manifold of real (N, d), and recall, the reverse; both in [0, 1].

    A set's manifold is the union of balls around its points, each as wide as the distance to the point's k-th nearest
    neighbour, itself not counted; a point on the rim is inside. N, M > k >= 1, else ValueError. Float32 products of
    blocks find the pairs in question, float64 decides where they can't; memory is linear in N and M.
    """
    real, fake = _feature_pair(real, fake, at_least=k + 1)
    mean = real.mean(0)  # subtracting it moves no distance, but products of short vectors round less
    real_radius, fake_radius = _squared_radii(real, k), _squared_radii(fake, k)
    real_inside, fake_inside = (torch.zeros(len(x), dtype=torch.bool, device=x.device) for x in (real, fake))
    for i, x in _blocks(real, mean):
        for j, y in _blocks(fake, mean):
            d2 = _squared_distances(x, y)
            rounding = 4e-6 * (x.square().sum(1).max() + y.square().sum(1).max()).item()  # a bound for that of d2
            fake_inside[j] |= _inside(fake[j], real[i], real_radius[i], d2, rounding)
            real_inside[i] |= _inside(real[i], fake[j], fake_radius[j], d2.T, rounding)
    return fake_inside.double().mean().item(), real_inside.double().mean().item()


def _inside(points: Tensor, centres: Tensor, radius: Tensor, d2: Tensor, rounding: float) -> Tensor:
    """Which points lie in a ball around a centre; d2 (centres, points) and radius (centres,), both squared. (points,)"""
    gap = d2 - radius.to(d2.dtype)[:, None]
    closest = gap.amin(0)
    inside = closest < -rounding
    for p in torch.where((closest <= rounding) & ~inside)[0]:
        near = gap[:, p] <= rounding
        exact = (centres[near].double() - points[p].double()).square().sum(1)
        inside[p] = (exact <= radius[near] * (1 + 1e-12)).any()  # a tie must not hang on the order of a sum
    return inside


def _squared_radii(x: Tensor, k: int) -> Tensor:
    """Squared distance of each point to its k-th nearest other one, (n,) float64."""
    few = min(k + 4, len(x) - 1)  # float32 names the candidates: among close ones it may mistake the order
    nearest = x.new_full((len(x), few), math.inf)
    index = torch.zeros(len(x), few, dtype=torch.long, device=x.device)

    def merge(rows: slice, columns: slice, d2: Tensor) -> None:
        near, place = d2.topk(min(few, d2.shape[1]), largest=False)
        nearest[rows], order = torch.cat([nearest[rows], near], 1).topk(few, largest=False)
        index[rows] = torch.cat([index[rows], place + columns.start], 1).gather(1, order)

    mean = x.mean(0)
    for i, a in _blocks(x, mean):
        for j, b in _blocks(x, mean, start=i.start):  # the upper triangle: d(a, b) serves the rows of a and those of b
            d2 = _squared_distances(a, b)
            if i == j:
                d2.fill_diagonal_(math.inf)
            else:
                merge(j, i, d2.T)
            merge(i, j, d2)
    radius = torch.empty(len(x), dtype=torch.float64, device=x.device)
    for r, p, near in zip(radius.split(64), x.split(64), index.split(64)):
        r[:] = (x[near].double() - p[:, None].double()).square().sum(2).kthvalue(k).values
    return radius


def _squared_distances(x: Tensor, y: Tensor) -> Tensor:
    """|x|^2 + |y|^2 - 2 x.y of x (n, d) and y (m, d), (n, m)."""
    return torch.addmm(y.square().sum(1), x, y.T, alpha=-2).add_(x.square().sum(1)[:, None])


def _blocks(x: Tensor, mean: Tensor, start: int = 0, size: int = 1024) -> Iterator[tuple[slice, Tensor]]:
    for i in range(start, len(x), size):
        rows = slice(i, min(i + size, len(x)))
        yield rows, x[rows] - mean


def _feature_pair(real: Tensor, fake: Tensor, at_least: int) -> tuple[Tensor, Tensor]:
    real, fake = torch.as_tensor(real), torch.as_tensor(fake)
    if real.ndim != 2 or fake.ndim != 2 or real.shape[1] != fake.shape[1]:
        raise ValueError(f"features must be (N, d) and (M, d), not {tuple(real.shape)} and {tuple(fake.shape)}")
    if min(len(real), len(fake)) < at_least:
        raise ValueError(f"{at_least} or more images are needed on either side, not {len(real)} and {len(fake)}")
    return real, fake


# ------------------------------------------------------------------------------------------------- severity agreement


def severity_agreement(
    real: Tensor, real_labels: Tensor, generated: dict[str, tuple[Tensor, Tensor]], num_classes: int
) -> dict[str, dict]:
    """Which grade does each image show, according to a classifier of real images, against the grade asked for?

    Features (n, d) with labels (n,) in 0..num_classes-1. The classifier is fitted on the first half of each real class and
    scored on the second: that entry, "real, held out", is the ceiling for the others. The halves follow the order
    of the files, which mostly keeps a patient's images together. Each entry has n, qwk (quadratic weighted kappa, 1 is
    perfect, 0 chance), mae (grades) and confusion (rows: asked for, columns: shown).
    """
    members = [torch.where(real_labels == c)[0] for c in range(num_classes)]
    fit, held_out = (torch.cat(half) for half in zip(*(m.tensor_split([(len(m) + 1) // 2]) for m in members)))
    classify = ridge_classifier(real[fit], real_labels[fit], num_classes)
    result = {}
    for name, (x, labels) in {"real, held out": (real[held_out], real_labels[held_out]), **generated}.items():
        pairs = labels * num_classes + classify(x)
        confusion = torch.bincount(pairs, minlength=num_classes**2).view(num_classes, num_classes)
        mae = (labels - pairs % num_classes).abs().double().mean().item() if len(x) else None
        result[name] = {"n": len(x), "qwk": quadratic_kappa(confusion), "mae": mae, "confusion": confusion.tolist()}
    return result


def ridge_classifier(x: Tensor, labels: Tensor, num_classes: int) -> Callable[[Tensor], Tensor]:
    """A classifier of ordered classes 0..C-1, fitted to features x (n, d); what is returned maps (m, d) to classes (m,).

    Ridge regression answers C - 1 questions, "more severe than c?" (Frank & Hall 2001), and the class is the number of
    yeses. One question per class would fail here: classes in a line hide those in the middle. Classes weigh the same,
    however rare. The penalty is that of the least leave-one-out error, for ridge residual / (1 - leverage).
    """
    counts = torch.bincount(labels, minlength=num_classes)
    weight = (1 / counts.double()[labels]) / (counts > 0).sum()  # sums to 1
    target = (labels[:, None] > torch.arange(num_classes - 1)).double()
    x_mean, target_mean = weight @ x.double(), weight @ target
    x, target, root = x.double() - x_mean, target - target_mean, weight.sqrt()[:, None]
    eigenvalue, v = torch.linalg.eigh((root * x).T @ (root * x))
    z = (root * x) @ v
    least = math.inf
    for penalty in eigenvalue.sum() * torch.logspace(-5, 0, 11, dtype=torch.float64):
        shrink = 1 / (eigenvalue.clamp_min(0) + penalty)
        slope = v @ (shrink[:, None] * (z.T @ (root * target)))
        leverage = z.square() @ shrink + weight
        error = weight @ ((target - x @ slope) / (1 - leverage)[:, None]).square().sum(1)
        if error < least:
            least, best_slope = error, slope
    return lambda features: ((features.double() - x_mean) @ best_slope + target_mean > 0.5).sum(1)


def quadratic_kappa(confusion: Tensor) -> float | None:
    """Cohen's kappa with weights (i - j)^2 of a (C, C) table of counts: 1 is perfect, 0 chance; None for one class only."""
    table = confusion.double()
    grade = torch.arange(len(table), dtype=torch.float64)
    cost = (grade[:, None] - grade).square()
    by_chance = (cost * torch.outer(table.sum(1), table.sum(0))).sum() / table.sum()
    return (1 - (cost * table).sum() / by_chance).item() if by_chance > 0 else None


# -------------------------------------------------------------------------------------------------------- the network

# A string a branch, a word a convolution: channels@height x width, "/2" for stride 2 (and no padding then), "a|b" for two
# side by side. The names are those of the public weight file. A pool has no weights and goes before the projection.
_A = {"branch1x1": "64@1x1", "branch5x5": "48@1x1 64@5x5", "branch3x3dbl": "64@1x1 96@3x3 96@3x3"}
_C = {
    "branch1x1": "192@1x1",
    "branch7x7": "{c}@1x1 {c}@1x7 192@7x1",
    "branch7x7dbl": "{c}@1x1 {c}@7x1 {c}@1x7 {c}@7x1 192@1x7",
    "branch_pool": "avg 192@1x1",
}
_E = {
    "branch1x1": "320@1x1",
    "branch3x3": "384@1x1 384@1x3|384@3x1",
    "branch3x3dbl": "448@1x1 384@3x3 384@1x3|384@3x1",
}
_POOL = {"branch_pool": "max/2"}
MIXED = {  # name -> input channels, branches
    "Mixed_5b": (192, {**_A, "branch_pool": "avg 32@1x1"}),
    "Mixed_5c": (256, {**_A, "branch_pool": "avg 64@1x1"}),
    "Mixed_5d": (288, {**_A, "branch_pool": "avg 64@1x1"}),
    "Mixed_6a": (288, {"branch3x3": "384@3x3/2", "branch3x3dbl": "64@1x1 96@3x3 96@3x3/2", **_POOL}),
    **{f"Mixed_6{x}": (768, {b: s.format(c=c) for b, s in _C.items()}) for x, c in zip("bcde", (128, 160, 160, 192))},
    "Mixed_7a": (768, {"branch3x3": "192@1x1 320@3x3/2", "branch7x7x3": "192@1x1 192@1x7 192@7x1 192@3x3/2", **_POOL}),
    "Mixed_7b": (1280, {**_E, "branch_pool": "avg 192@1x1"}),
    "Mixed_7c": (2048, {**_E, "branch_pool": "max 192@1x1"}),  # max: the 2015 network has it here only
}
POOLS = {
    "avg": nn.AvgPool2d(3, stride=1, padding=1, count_include_pad=False),
    "max": nn.MaxPool2d(3, stride=1, padding=1),
    "max/2": nn.MaxPool2d(3, stride=2),
}


class Conv(nn.Sequential):
    def __init__(self, channels: int, out: int, kernel: tuple[int, int], stride: int = 1, padding: tuple[int, int] = (0, 0)):
        super().__init__()
        self.conv = nn.Conv2d(channels, out, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(out, eps=1e-3)
        self.relu = nn.ReLU()


class Mixed(nn.Module):
    def __init__(self, channels: int, branches: dict[str, str]):
        super().__init__()
        self.paths = [self._add_branch(branch, words.split(), channels) for branch, words in branches.items()]

    def _add_branch(self, branch: str, words: list[str], channels: int) -> list[list]:
        """Returns the branch as a list of steps; a step is a list of layer names (or a pool) that see the same input."""
        steps = [[POOLS[words.pop(0)]]] if words[0] in POOLS else []
        for number, word in enumerate(words, start=1):
            step = []
            for letter, spec in zip("ab" if "|" in word else [""], word.split("|")):
                out, kernel = spec.removesuffix("/2").split("@")
                height, width = map(int, kernel.split("x"))
                stride, padding = (2, (0, 0)) if spec.endswith("/2") else (1, (height // 2, width // 2))
                step.append(branch + (f"_{number}{letter}" if len(words) > 1 else ""))
                self.add_module(step[-1], Conv(channels, int(out), (height, width), stride, padding))
            steps.append(step)
            channels = int(out)
        return steps

    def forward(self, x: Tensor) -> Tensor:
        outputs = []
        for *steps, last in self.paths:
            h = x
            for (step,) in steps:
                h = self._layer(step)(h)
            outputs += [self._layer(step)(h) for step in last]
        return torch.cat(outputs, 1)

    def _layer(self, step: str | nn.Module) -> nn.Module:
        return getattr(self, step) if isinstance(step, str) else step


class Inception(nn.Sequential):
    """The FID Inception-v3 as far as its 64-, 192-, 768- or 2048-channel layer, spatially averaged.

    uint8 images (B, 3, H, W) of any size -> (B, dims) >= 0. Parameter names are those of the public file
    pt_inception-2015-12-05-6726825d.pth, whose classifier head (fc) is not built. Weights are random until loaded.
    """

    def __init__(self, dims: int = 2048):
        if dims not in DIMS:
            raise ValueError(f"dims must be one of {DIMS}, not {dims}")
        super().__init__()
        self.dims = dims
        self.Conv2d_1a_3x3 = Conv(3, 32, (3, 3), stride=2)
        self.Conv2d_2a_3x3 = Conv(32, 32, (3, 3))
        self.Conv2d_2b_3x3 = Conv(32, 64, (3, 3), padding=(1, 1))
        self.maxpool1 = POOLS["max/2"]
        if dims >= 192:
            self.Conv2d_3b_1x1 = Conv(64, 80, (1, 1))
            self.Conv2d_4a_3x3 = Conv(80, 192, (3, 3))
            self.maxpool2 = nn.MaxPool2d(3, stride=2)
        for name, (channels, branches) in MIXED.items():
            if dims == 2048 or (dims == 768 and name < "Mixed_7a"):
                self.add_module(name, Mixed(channels, branches))
        self.eval().requires_grad_(False)

    def forward(self, images: Tensor) -> Tensor:
        x = F.interpolate(images.float() / 255, size=(299, 299), mode="bilinear", align_corners=False)
        return super().forward(2 * x - 1).mean((2, 3))


def features(images: Tensor | Iterable[Tensor], network: Inception, batch_size: int = 16) -> Tensor:
    """Features (N, dims), float32 on the CPU, of uint8 images (N, 3, H, W), or of an iterable of such batches.

    Runs where the network is, in eval mode and true float32 whatever the caller's settings: reduced precision moves FID.
    """
    network.eval()
    device = next(network.parameters()).device
    batches = images.split(batch_size) if isinstance(images, Tensor) else images
    result = [torch.empty(0, network.dims)]
    with (
        torch.inference_mode(),
        torch.autocast(device.type, enabled=False),
        torch.backends.cudnn.flags(enabled=True, benchmark=False, allow_tf32=False),
    ):
        result += [network(batch.to(device)).cpu() for batch in batches]
    return torch.cat(result)


def load_weights(dims: int, file: str = "") -> tuple[Inception, str]:
    """The network with its weights, and the SHA-256 of the file they came from.

    Without a file: the public one, from torch.hub's cache, where it is downloaded first if need be. It takes its final
    name only when it is whole and has the right hash, and the hash is checked again at each use.
    """
    name = WEIGHTS_URL.rsplit("/", 1)[1]
    path = Path(file or Path(torch.hub.get_dir(), "checkpoints", name))
    try:
        if not file and not path.exists():
            print(f"downloading {WEIGHTS_URL} to {path}", file=sys.stderr)
            path.parent.mkdir(parents=True, exist_ok=True)
            socket.setdefaulttimeout(60)  # a network that swallows packets would hang for ever
            torch.hub.download_url_to_file(WEIGHTS_URL, str(path), WEIGHTS_SHA256, progress=sys.stderr.isatty())
    except (OSError, RuntimeError, http.client.HTTPException) as error:
        raise odm.UserError(f"cannot download {WEIGHTS_URL} ({error}): fetch it elsewhere and put it at {path}, or use --weights") from None
    try:
        sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise odm.UserError(f"{path}: cannot be read ({error.strerror}): --weights takes a file like {name}") from None
    if not file and sha256 != WEIGHTS_SHA256:
        raise odm.UserError(f"{path}: only a part of the file or a wrong one, by its SHA-256: delete it to have it downloaded again")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what torch says about odd files, the error says in one line
            state = {key: value.float() for key, value in torch.load(path, map_location="cpu", weights_only=True).items()}
    except Exception:  # a damaged file can fail anywhere within torch.load
        raise odm.UserError(f"{path}: damaged, or not a file of network weights: --weights takes a file like {name}") from None
    network = Inception(dims)
    wanted = {key: value for key, value in network.state_dict().items() if not key.endswith("num_batches_tracked")}
    for key, value in wanted.items():
        if key not in state:
            raise odm.UserError(f"{path}: has no {key}, which --dims {dims} needs: lower --dims, or give --weights the whole {name}")
        if state[key].shape != value.shape or not state[key].isfinite().all():
            raise odm.UserError(f"{path}: {key} is damaged or belongs to another network: --weights takes a file like {name}")
    network.load_state_dict({key: state[key] for key in wanted}, strict=False)
    return network.to(memory_format=torch.channels_last), sha256  # channels last: twice as fast on a CPU


# ---------------------------------------------------------------------------------------------- both sides, from files


def list_generated(root: str) -> tuple[list[Path], list[str]]:
    """Image files below root, and each one's class, its folder's name; no classes if the files lie in root itself."""
    if not Path(root).is_dir():
        raise odm.UserError(f"{root}: no such folder")
    paths = [path for path in odm.list_images(root) if path != Path(root, "sheet.png")]  # odm.py's overview is no sample
    flat = [path for path in paths if path.parent == Path(root)]
    if not paths:
        raise odm.UserError(f"{root}: no images in it")
    if flat and len(flat) < len(paths):
        raise odm.UserError(f"{root}: images lie both in class folders and beside them ({flat[0].name}): move the latter away")
    return paths, [] if flat else [path.parent.name for path in paths]


def read_batches(paths: list[Path], batch_size: int) -> Iterator[Tensor]:
    """Images as uint8 batches (B, 3, H, W) in the order of paths; a batch ends early where the image size changes."""
    for i in range(0, len(paths), batch_size):
        arrays = (np.array(odm.read_image(path)) for path in paths[i : i + batch_size])
        for _, same_size in itertools.groupby(arrays, key=np.shape):
            yield torch.from_numpy(np.stack(list(same_size))).permute(0, 3, 1, 2)


def common_size(roots: list[str]) -> int:
    """Height and width of the generated images, judged by the first of each folder."""
    sizes = {odm.read_image(list_generated(root)[0][0]).size for root in roots}
    if len(sizes) > 1 or len(set(*sizes)) > 1:
        found = ", ".join(f"{width}x{height}" for width, height in sorted(sizes))
        raise odm.UserError(f"generated images have {found} pixels: say with --size to which square the real ones are resized")
    return sizes.pop()[0]


def extract(batches: Iterable[Tensor], total: int, network: Inception, what: str) -> Tensor:
    """features() with a progress line on a terminal."""

    def shown() -> Iterator[Tensor]:
        done, start = 0, time.monotonic()
        for batch in batches:
            yield batch
            done += len(batch)
            rate = done / max(time.monotonic() - start, 1e-3)
            if sys.stderr.isatty():
                line = f"{what}: {done}/{total} images, {rate:.0f}/s, {(total - done) / rate:.0f} s left"
                print(f"\r{line:79}", end="\n" if done == total else "", file=sys.stderr, flush=True)

    x = features(shown(), network)
    if not x.isfinite().all():
        raise odm.UserError(f"features of {what} are not finite: --weights are not those of the FID Inception")
    return x


def real_features(args: argparse.Namespace, network: Inception, sha256: str) -> tuple[Tensor, Tensor]:
    """Features and labels of the real images: taken from --real-stats if made from the same, else computed and kept there."""
    paths, labels, classes, _ = odm.find_images(args.real, args.order)
    source = {"real": str(Path(args.real).resolve()), "images": len(paths), "bytes": sum(path.stat().st_size for path in paths)}
    source |= {key: getattr(args, key) for key in ("dims", "size", "crop")} | {"classes": classes, "weights": sha256}
    if args.real_stats and Path(args.real_stats).exists():
        return load_stats(args.real_stats, source), torch.tensor(labels)
    images, labels, _ = odm.load_images(args.real, args.size, args.crop, args.order)
    x = extract(images.split(args.batch), len(images), network, "real")
    if args.real_stats:
        odm.write_file(Path(args.real_stats), lambda file: np.savez(file, source=json.dumps(source), features=x.numpy()))
    return x, labels


def load_stats(file: str, source: dict) -> Tensor:
    """The features that real_features kept in file; UserError if it is damaged or was made from anything but `source`."""
    try:
        with np.load(file, allow_pickle=False) as stats:
            found, x = json.loads(str(stats["source"])), torch.from_numpy(stats["features"])
        differing = [f"{key} {found[key]}, not {value}" for key, value in source.items() if found[key] != value]
        if not differing and (x.shape != (source["images"], source["dims"]) or x.dtype != torch.float32):
            raise ValueError
    except Exception:  # a damaged file can fail anywhere within np.load
        raise odm.UserError(f"{file}: damaged, or not a --real-stats file: delete it to have it made anew, or choose another name") from None
    if differing:
        raise odm.UserError(f"{file}: made with {'; '.join(differing)}: delete it to have it made anew, or choose another name")
    return x


# ---------------------------------------------------------------------------------------------------------- the report


def score(name: str, real: Tensor, fake: Tensor, k: int) -> dict:
    """One row of the report: all that can be computed from so many images, None for the rest."""
    few = min(len(real), len(fake))
    fid, kid, kid_se, precision, recall = [None] * 5
    if few >= 2:
        fid = frechet_distance(real, fake)
        kid, kid_se = kernel_distance(*(x.to(DEVICE) for x in (real, fake)))
    if few > k:
        precision, recall = precision_recall(*(x.to(DEVICE) for x in (real, fake)), k)
    row = {"class": name, "n_real": len(real), "n_fake": len(fake), "fid": fid, "fid_biased": few < real.shape[1]}
    return row | {"kid": kid, "kid_se": kid_se if few > 2 else None, "precision": precision, "recall": recall}


def table(rows: list[list[str]]) -> str:
    """Columns two spaces apart, the first to the left, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = ["  ".join([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:]))]) for row in rows]
    return "\n".join(line.rstrip() for line in lines)


def report(result: dict) -> str:
    """The tables that main prints."""

    def cell(value: float | None, digits: int, unit: float = 1) -> str:
        return "-" if value is None else f"{value * unit:.{digits}f}"

    dims, classes, k = (result["settings"][key] for key in ("dims", "classes", "k"))
    rows = [["class", "generated", "n_real", "n_fake", "FID ", "1000 KID", "s.e.", "precision", "recall"]]
    flagged, missing = False, False
    for label in ["all", *classes]:  # methods side by side within a class
        for name, entry in result["generated"].items():
            for row in (row for row in entry["rows"] if row["class"] == label):
                fid = cell(row["fid"], 2) + ("*" if row["fid_biased"] else " ")
                cells = [fid, cell(row["kid"], 3, 1000), cell(row["kid_se"], 3, 1000), cell(row["precision"], 3), cell(row["recall"], 3)]
                rows.append([label, name, str(row["n_real"]), str(row["n_fake"]), *cells])
                flagged, missing = flagged or row["fid_biased"], missing or row["precision"] is None
    lines = [table([row[:1] + row[2:] for row in rows] if len(result["generated"]) == 1 else rows)]
    if flagged:
        lines.append(f"* n below the {dims} dimensions: FID is biased upward, compare only at equal n; see KID")
    if missing:
        lines.append(f"- too few images: precision and recall take {k + 1} on either side, FID and KID 2")
    if result["agreement"]:
        rows = [["severity shown", "n", "QWK", "MAE"]]
        rows += [[name, str(a["n"]), cell(a["qwk"], 3), cell(a["mae"], 3)] for name, a in result["agreement"].items()]
        lines += ["", table(rows), "(real, held out: images that the classifier has not seen, the ceiling for the others)"]
    for name, a in result["agreement"].items():
        rows = [[label, *map(str, counts)] for label, counts in zip(classes, a["confusion"])]
        lines += ["", table([[f"{name}: asked for, shown as", *classes], *rows])]
    return "\n".join(lines)


def draw_bars(title: str, groups: list[str], notes: list[str], series: dict[str, list[float | None]]) -> Image.Image:
    """Bars side by side, as in Fig. 4: one group a class with a note below, one colour a series; None leaves a gap."""
    scale = 3  # Pillow draws without antialiasing: draw large, then reduce
    colours = ["#4c78a8", "#e4572e", "#54a24b", "#b279a2", "#eeca3b", "#72b7b2", "#9d755d"]
    fonts = {size: ImageFont.load_default(size * scale) for size in (11, 12, 13, 14, 19)}
    keys = [fonts[14].getlength(name) / scale + 45 for name in series]
    bar, margin = 46, 24
    group = max(bar * len(series) + 34, *(fonts[14].getlength(name) / scale + 16 for name in groups + notes))
    width, left, top, base = max(group * len(groups), sum(keys), 360) + margin, 78, 92, 392  # of the plot area
    image = Image.new("RGB", (round((left + width + margin) * scale), (base + 62) * scale), "white")
    draw = ImageDraw.Draw(image)

    def text(x: float, y: float, words: str, size: int, anchor: str, fill: str = "#333333") -> None:
        draw.text((x * scale, y * scale), words, fill, fonts[size], anchor, stroke_width=scale, stroke_fill="white")

    def box(x: float, y: float, x_end: float, y_end: float, fill: str) -> None:
        draw.rectangle([round(v * scale) for v in (x, y, x_end, y_end)], fill)

    largest = max((value for values in series.values() for value in values if value), default=1.0)
    step = 10 ** math.floor(math.log10(largest / 4))
    step *= next(m for m in (1, 2, 5, 10) if largest <= 6 * m * step)
    ticks = math.ceil(largest * 1.04 / step)
    text(left, 26, title, 19, "lm", "#111111")
    for number, name in enumerate(series):
        x = left + sum(keys[:number])
        box(x, 56, x + 14, 70, colours[number % len(colours)])
        text(x + 21, 63, name, 14, "lm")
    for tick in range(ticks + 1):
        y = base + (top - base) * tick / ticks
        box(left, y, left + width, y + (0.4 if tick else 1.4), "#cccccc" if tick else "#333333")
        text(left - 10, y, f"{tick * step:g}", 13, "rm")
    for g, (name, note) in enumerate(zip(groups, notes)):
        middle = left + width / 2 + group * (g + 0.5 - len(groups) / 2)
        for number, values in enumerate(series.values()):
            x = middle + bar * (number + 0.5 - len(series) / 2)
            if values[g] is not None:
                y = base + (top - base) * values[g] / (ticks * step)
                box(x - bar / 2 + 2, y, x + bar / 2 - 2, base, colours[number % len(colours)])
                text(x, y - 10, f"{values[g]:#.3g}" if values[g] < 1000 else f"{values[g]:.0f}", 12, "mm")
        text(middle, base + 18, name, 14, "mm")
        text(middle, base + 38, note, 11, "mm", "#777777")
    return image.resize((image.width * 2 // scale, image.height * 2 // scale), Image.Resampling.LANCZOS)


# -------------------------------------------------------------------------------------------------------- command line


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        raise odm.UserError(f"{message}; see --help")


def parse(argv: list[str] | None) -> argparse.Namespace:
    def at_least(least: int) -> Callable[[str], int]:
        def number(text: str) -> int:
            if not (text.isascii() and text.isdecimal() and least <= int(text) < 2**31):
                raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of {least} or more")
            return int(text)

        return number

    raw = argparse.RawDescriptionHelpFormatter
    parser = Parser(prog="fid.py", description=__doc__, formatter_class=raw, allow_abbrev=False)
    parser.add_argument("real", metavar="REAL", help="folder of real images, as for odm.py train --data")
    parser.add_argument("generated", metavar="GENERATED", nargs="+", help="folder(s) of generated images, or of class folders")
    parser.add_argument("--dims", type=int, default=2048, choices=DIMS, help="features of the network [2048]")
    parser.add_argument("--weights", default="", metavar="FILE", help="the network's weights [the public file, downloaded once]")
    parser.add_argument("--size", type=at_least(1), metavar="N", help="resize real images to N x N [that of the generated ones]")
    parser.add_argument("--crop", type=at_least(0), default=0, metavar="N", help="first cut their middle N x N, as in training")
    parser.add_argument("--order", default="", metavar="A,B,...", help="class names in ascending severity, if without numbers")
    parser.add_argument("-k", type=at_least(1), default=3, metavar="N", help="neighbours for precision and recall [3]")
    parser.add_argument("--batch", type=at_least(1), default=16, metavar="N", help="images at a time [16]")
    parser.add_argument("--real-stats", metavar="FILE.npz", help="keep the real images' features here and use them next time")
    parser.add_argument("--json", metavar="FILE", help="write all numbers")
    parser.add_argument("--plot", metavar="FILE.png", help="draw the class-wise FID as bars (Fig. 4)")
    args = parser.parse_args(argv)
    for flag, file in (("--real-stats", args.real_stats), ("--json", args.json), ("--plot", args.plot)):
        if file and (Path(file).is_dir() or not Path(file).parent.is_dir()):  # found out now, not after the work
            raise odm.UserError(f"{flag} {file}: must be a file in a folder that exists")
    return args


def evaluate(args: argparse.Namespace) -> dict:
    """All that the report says, as plain numbers and names."""
    folders = {Path(root).resolve().name: root for root in args.generated}
    if len(folders) < len(args.generated):
        folders = {root: root for root in args.generated}
    real_paths, _, classes, _ = odm.find_images(args.real, args.order)
    listings = {name: list_generated(root) for name, root in folders.items()}
    for root, paths in [(args.real, real_paths), *((folders[name], paths) for name, (paths, _) in listings.items())]:
        if len(paths) <= args.k:
            few = f"{len(paths)} image{'s are' if len(paths) > 1 else ' is'} too few"
            raise odm.UserError(f"{root}: {few}: precision and recall with -k {args.k} take {args.k + 1} or more")
    for name, (_, found) in listings.items():
        if strange := sorted(set(found) - set(classes)):
            raise odm.UserError(
                f"{folders[name]}: {', '.join(strange)} is no class of {args.real} ({', '.join(classes)}): rename the folder, "
                "or put all images into one folder to score them without classes"
            )
    args.size = args.size or common_size(args.generated)
    network, sha256 = load_weights(args.dims, args.weights)
    real, real_labels = real_features(args, network.to(DEVICE), sha256)
    settings = {key: getattr(args, key) for key in ("real", "dims", "size", "crop", "k")} | {"classes": classes, "weights": sha256}
    result = {"settings": settings, "generated": {}, "agreement": {}}
    graded = {}
    for name, (paths, found) in listings.items():
        fake = extract(read_batches(paths, args.batch), len(paths), network, name)
        rows = [score("all", real, fake, args.k)]
        if found:
            labels = torch.tensor([classes.index(label) for label in found])
            rows += [score(label, real[real_labels == c], fake[labels == c], args.k) for c, label in enumerate(classes)]
            graded[name] = (fake, labels)
        result["generated"][name] = {"folder": folders[name], "rows": rows}
    if graded:
        result["agreement"] = severity_agreement(real, real_labels, graded, len(classes))
    return result


def plot(file: str, result: dict) -> None:
    """Class-wise FID as in Fig. 4, or the overall one where no folder has classes."""
    rows = {name: {row["class"]: row for row in entry["rows"]} for name, entry in result["generated"].items()}
    groups = result["settings"]["classes"] if result["agreement"] else ["all"]
    series = {name: [r[g]["fid"] if g in r else None for g in groups] for name, r in rows.items()}
    few = {g: any(r[g]["fid_biased"] for r in rows.values() if g in r) for g in groups}
    notes = ["n = " + " / ".join(str(r[g]["n_fake"]) for r in rows.values() if g in r) + "*" * few[g] for g in groups]
    title = f"FID, {result['settings']['dims']} dimensions" + ", * biased upward" * any(few.values())
    image = draw_bars(title, groups, notes, series)
    odm.write_file(Path(file), lambda out: image.save(out, format="PNG"))


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit status: 0, 2 for what the user can mend, 130 for Ctrl-C."""
    try:
        args = parse(argv)
        if hasattr(sys.stdout, "reconfigure"):
            sys.stdout.reconfigure(errors="backslashreplace")  # a name that the terminal can't show must not cost the report
        torch.set_float32_matmul_precision("highest")  # some machines are set to less, and distances would come out wrong
        result = evaluate(args)
        used = result["settings"]
        print(f"real images at {used['size']}x{used['size']}, {used['dims']} features, weights {used['weights'][:8]}\n")
        print(report(result))
        if args.json:
            text = json.dumps(result, indent=1, allow_nan=False) + "\n"
            odm.write_file(Path(args.json), lambda out: out.write(text.encode()))
        if args.plot:
            plot(args.plot, result)
        return 0
    except (odm.UserError, OSError) as error:
        print("fid.py: error:", " ".join(str(error).split()), file=sys.stderr)
        return 2
    except (RuntimeError, MemoryError) as error:
        if not odm.out_of_memory(error):
            raise
        print("fid.py: error: out of memory: lower --batch, or --dims", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("fid.py: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
