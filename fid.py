# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.5", "numpy", "pillow>=10.3", "scipy"]
# ///
"""How good are generated images? FID, KID, precision and recall, overall and per class.

    python fid.py data/limuc samples/limuc            # Table 1 of the paper, and a row per class
    python fid.py data/limuc samples/dm samples/odm --plot fig4.png --json scores.json
    python fid.py test samples/dm --trained-on train  # Does it help my classifier? Copies of patients?

    frechet_distance      FID: distance of the Gaussians fitted to both sets (Heusel et al. 2017)
    kernel_distance       KID: the same question without a bias at small n (Binkowski et al. 2018)
    precision_recall      how much of one set lies inside the other (Kynkaanniemi et al. 2019)
    classifier_score      a ridge classifier fitted on real or generated images, scored on real ones
    likeness              how near to the images that the generator was trained on
    Inception, features   the network all of them look through (the FID Inception of 2015-12-05)

Real images are read as for training (odm.find_images). The generated side is a folder of images, or of class
folders named like the real classes, from any generator. Both sides should have one resolution: by default the
real images are brought to the size of the generated ones.
"""

import argparse
import contextlib
import itertools
import json
import math
import re
import sys
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import scipy.linalg
import torch
import torch.nn.functional as F
from numpy import ndarray
from PIL import Image, ImageDraw
from torch import Tensor, nn

import odm

WEIGHTS = "pt_inception-2015-12-05-6726825d.pth"  # the last part begins its SHA-256, which torch.hub checks
WEIGHTS_URL = "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/" + WEIGHTS
DIMS = (64, 192, 768, 2048)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

# ------------------------------------------------------------------------------ distances between features


def frechet_distance(real: Tensor, fake: Tensor) -> float:
    """FID: |mu_1 - mu_2|^2 + tr(S_1 + S_2 - 2 (S_1 S_2)^(1/2)) of the Gaussians of real (N, d), fake (M, d).

    In [0, inf), 0 for equal means and covariances; units of the features squared. N, M >= 2, else ValueError;
    singular covariances included. In float64. Biased upward when N or M is not well above d.
    """
    means, factors = [], []
    for x in (real, fake):
        x = np.asarray(x, np.float64)
        means.append(x.mean(0))
        # Centred features are a factor of their covariance; so is R of their QR, which is smaller.
        factors.append(np.linalg.qr((x - means[-1]) / np.sqrt(len(x) - 1), mode="r"))
    return _frechet(*means, *factors)


def frechet_distance_from_moments(mu1: ndarray, cov1: ndarray, mu2: ndarray, cov2: ndarray) -> float:
    """frechet_distance from means (d,) and covariances (d, d), for statistics published without features."""
    factors = []
    for cov in (cov1, cov2):
        w, v = scipy.linalg.eigh(np.asarray(cov, np.float64))
        factors.append(np.sqrt(w.clip(0))[:, None] * v.T)  # rounding can push a w that should be 0 below it
    return _frechet(np.asarray(mu1, np.float64), np.asarray(mu2, np.float64), *factors)


def _frechet(mu1: ndarray, mu2: ndarray, a: ndarray, b: ndarray) -> float:
    # S_1 = A'A and S_2 = B'B: the eigenvalues of S_1 S_2 are the squared singular values of A B', so that
    # tr (S_1 S_2)^(1/2) is their plain sum. No matrix root, nothing complex, nothing added to a diagonal.
    root = scipy.linalg.svdvals(a @ b.T).sum()
    distance = np.square(mu1 - mu2).sum() + np.square(a).sum() + np.square(b).sum() - 2 * root
    return max(float(distance), 0.0)  # equal sets leave a rounding error of either sign


def kernel_distance(real: Tensor, fake: Tensor) -> tuple[float, float]:
    """KID, the unbiased squared MMD of real (N, d), fake (M, d), kernel (x.y / d + 1)^3; its standard error.

    mean k(x, x') + mean k(y, y') - 2 mean k(x, y) over all pairs of different images; 0 on average for equal
    distributions at any n, hence often below 0. The error is the jackknife's, which leaves out one
    image at a time. N, M >= 3, else not finite. Memory is linear in N and M.
    """

    def sums(x: Tensor, y: Tensor) -> Tensor:  # over y, (n,)
        parts = [((part @ y.T / x.shape[1] + 1) ** 3).sum(1, dtype=torch.float64) for part in x.split(1024)]
        return torch.cat(parts)

    def estimate(xx: Tensor, yy: Tensor, xy: Tensor, n: int, m: int) -> Tensor:
        return xx / (n * (n - 1)) + yy / (m * (m - 1)) - 2 * xy / (n * m)

    n, m = len(real), len(fake)
    xx, yy, xy, yx = sums(real, real), sums(fake, fake), sums(real, fake), sums(fake, real)
    for total, x in ((xx, real), (yy, fake)):  # an image with itself is what makes the plain estimate biased
        total -= (x.double().square().sum(1) / x.shape[1] + 1) ** 3
    kid = estimate(xx.sum(), yy.sum(), xy.sum(), n, m)
    without_x = estimate(xx.sum() - 2 * xx, yy.sum(), xy.sum() - xy, n - 1, m)  # (N,)
    without_y = estimate(xx.sum(), yy.sum() - 2 * yy, yx.sum() - yx, n, m - 1)  # (M,)
    variance = (n - 1) * without_x.var(correction=0) + (m - 1) * without_y.var(correction=0)
    return kid.item(), variance.sqrt().item()


def precision_recall(real: Tensor, fake: Tensor, k: int = 3) -> tuple[float, float]:
    """Precision, the share of fake (M, d) inside the manifold of real (N, d), and recall, the reverse.

    A set's manifold is the union of balls around its points, each as wide as the distance to the point's k-th
    nearest neighbour, itself not counted; N, M > k. A point on the rim is inside, and so is one that float32
    can't tell from it: squared distances are known to 2e-6 of the squared lengths, seen from the real mean.
    Memory is linear in N and M.
    """

    def squared_radii(x: Tensor) -> Tensor:
        nearest = x.new_full((len(x), k + 1), math.inf)
        for i in range(0, len(x), 1024):
            d2 = _squared_distances(x[i : i + 1024], x[i:])  # for these rows and, as columns, all later ones
            for rows, part in ((slice(i, i + 1024), d2), (slice(i + 1024, None), d2[:, 1024:].T)):
                nearest[rows] = torch.cat([nearest[rows], part], 1).topk(k + 1, largest=False).values
        return nearest[:, k]  # the nearest of all is the point itself

    mean = real.mean(0)  # subtracting it moves no distance, but products of short vectors round less
    real, fake = (real - mean).float(), (fake - mean).float()
    real_radius, fake_radius = squared_radii(real), squared_radii(fake)
    fake_inside = torch.zeros(len(fake), dtype=torch.bool, device=fake.device)
    real_inside = []
    for x, radius in zip(real.split(1024), real_radius.split(1024)):
        least = _squared_distances(x, fake, rounding=2e-6)
        fake_inside |= (least <= radius[:, None]).any(0)
        real_inside.append((least <= fake_radius).any(1))
    return fake_inside.double().mean().item(), torch.cat(real_inside).double().mean().item()


def _squared_distances(x: Tensor, y: Tensor, rounding: float = 0.0) -> Tensor:
    """|x|^2 + |y|^2 - 2 x.y of x (n, d) and y (m, d), (n, m), less `rounding` times the first two terms."""
    x_squared, y_squared = ((1 - rounding) * z.square().sum(1) for z in (x, y))
    return torch.addmm(y_squared, x, y.T, alpha=-2).add_(x_squared[:, None])


def likeness(fake: Tensor, known: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
    """How near fake (n, d) is to known (m, d), what the generator saw, beside real (l, d), what it did not.

    A ratio (n,): distance to the nearest of known over that to the nearest of real. About 1 for an honest
    generator, even one of low diversity. And the places of the three nearest in known, (n, 3).
    """

    def nearest(y: Tensor, k: int) -> Tensor:
        return torch.cat([_squared_distances(x, y).topk(k, largest=False).indices for x in fake.split(1024)])

    places = nearest(known, min(3, len(known)))
    to_known = (fake - known[places[:, 0]]).norm(dim=1)  # not by products: exactly 0 for a copy
    to_real = (fake - real[nearest(real, 1)[:, 0]]).norm(dim=1)
    return (to_known / to_real).nan_to_num(1.0), places  # 0 / 0: an image of both sets


def ridge_classifier(x: Tensor, labels: Tensor, num_classes: int) -> Callable[[Tensor], Tensor]:
    """A classifier of ordered classes 0..C-1, fitted to features x (n, d); it maps (m, d) to classes (m,).

    Ridge regression answers C - 1 questions, "more severe than c?" (Frank & Hall 2001), and the class is the
    number of yeses. "Is it c?" would fail: no plane separates a class in the middle. Classes weigh the same,
    however rare. The penalty is that of the least leave-one-out error, residual / (1 - leverage).
    """
    counts = torch.bincount(labels, minlength=num_classes)
    weight = (1 / counts.double()[labels]) / (counts > 0).sum()  # sums to 1
    target = (labels[:, None] > torch.arange(num_classes - 1)).double()
    x_mean, target_mean = weight @ x.double(), weight @ target
    x, target, root = x.double() - x_mean, target - target_mean, weight.sqrt()[:, None]
    eigenvalue, v = torch.linalg.eigh((root * x).T @ (root * x))
    z = (root * x) @ v
    least, best_slope = math.inf, torch.zeros(x.shape[1], num_classes - 1, dtype=torch.float64)
    for penalty in eigenvalue.sum() * torch.logspace(-5, 0, 11, dtype=torch.float64):
        shrink = 1 / (eigenvalue.clamp_min(0) + penalty)
        slope = v @ (shrink[:, None] * (z.T @ (root * target)))
        leverage = z.square() @ shrink + weight
        error = weight @ ((target - x @ slope) / (1 - leverage)[:, None]).square().sum(1)
        if error < least:  # never where all images are the same: every image then gets the mean's class
            least, best_slope = error, slope
    return lambda features: ((features.double() - x_mean) @ best_slope + target_mean > 0.5).sum(1)


def classifier_score(x: Tensor, labels: Tensor, real: Tensor, real_labels: Tensor, num_classes: int) -> dict:
    """kappa, mean error (grades), recall of the top grade of a ridge classifier of x (n, d), labels (n,)."""
    shown = ridge_classifier(x, labels, num_classes)(real)
    confusion = F.one_hot(real_labels, num_classes).T @ F.one_hot(shown, num_classes)
    error = (shown - real_labels).abs().double().mean().item()
    top_recall = (confusion[-1, -1] / confusion[-1].sum()).item()
    return {"kappa": odm.quadratic_kappa(confusion), "mean_error": error, "top_recall": top_recall}


# --------------------------------------------------------------------------------------------- the network

# A string is a branch: its convolutions in turn, by their names in the public weight file: channels@height x
# width, "/" and the stride where it is not padded, "|" between two that have the same input.
_5 = ["branch1x1:64@1x1", "branch5x5_1:48@1x1 branch5x5_2:64@5x5",
      "branch3x3dbl_1:64@1x1 branch3x3dbl_2:96@3x3 branch3x3dbl_3:96@3x3"]
_6a = ["branch3x3:384@3x3/2", "branch3x3dbl_1:64@1x1 branch3x3dbl_2:96@3x3 branch3x3dbl_3:96@3x3/2"]
_6 = ["branch1x1:192@1x1", "branch7x7_1:C@1x1 branch7x7_2:C@1x7 branch7x7_3:192@7x1",
      "branch7x7dbl_1:C@1x1 branch7x7dbl_2:C@7x1 branch7x7dbl_3:C@1x7 "
      "branch7x7dbl_4:C@7x1 branch7x7dbl_5:192@1x7"]
_7a = ["branch3x3_1:192@1x1 branch3x3_2:320@3x3/2",
       "branch7x7x3_1:192@1x1 branch7x7x3_2:192@1x7 branch7x7x3_3:192@7x1 branch7x7x3_4:192@3x3/2"]
_7 = ["branch1x1:320@1x1", "branch3x3_1:384@1x1 branch3x3_2a:384@1x3|branch3x3_2b:384@3x1",
      "branch3x3dbl_1:448@1x1 branch3x3dbl_2:384@3x3 branch3x3dbl_3a:384@1x3|branch3x3dbl_3b:384@3x1"]
AVERAGE = nn.AvgPool2d(3, stride=1, padding=1, count_include_pad=False)
MAXIMUM = nn.MaxPool2d(3, stride=1, padding=1)
HALVE = nn.MaxPool2d(3, stride=2)
MIXED = {  # name -> input channels, branches, pool, channels behind the pool, C
    "Mixed_5b": (192, _5, AVERAGE, 32),
    "Mixed_5c": (256, _5, AVERAGE, 64),
    "Mixed_5d": (288, _5, AVERAGE, 64),
    "Mixed_6a": (288, _6a, HALVE, 0),
    "Mixed_6b": (768, _6, AVERAGE, 192, 128),
    "Mixed_6c": (768, _6, AVERAGE, 192, 160),
    "Mixed_6d": (768, _6, AVERAGE, 192, 160),
    "Mixed_6e": (768, _6, AVERAGE, 192, 192),
    "Mixed_7a": (768, _7a, HALVE, 0),
    "Mixed_7b": (1280, _7, AVERAGE, 192),
    "Mixed_7c": (2048, _7, MAXIMUM, 192),  # the network of 2015 has a maximum here, and here only
}


class Conv(nn.Sequential):
    def __init__(self, channels: int, spec: str):
        super().__init__()
        out, height, width, *stride = map(int, re.findall(r"\d+", spec))
        stride_and_padding = stride or (1, "same")
        self.conv = nn.Conv2d(channels, out, (height, width), *stride_and_padding, bias=False)
        self.bn = nn.BatchNorm2d(out, eps=1e-3)
        self.relu = nn.ReLU()


class Mixed(nn.Module):
    def __init__(self, channels: int, branches: list[str], pool: nn.Module, pool_out: int, c: int = 0):
        super().__init__()
        self.branches = []  # a branch is a list of steps, a step the names of the convolutions with one input
        for branch in branches:
            steps, c_in = [], channels
            for step in branch.replace("C", str(c)).split():
                layers = dict(layer.split(":") for layer in step.split("|"))
                for name, spec in layers.items():
                    self.add_module(name, Conv(c_in, spec))
                steps.append(list(layers))
                c_in = int(spec.split("@")[0])
            self.branches.append(steps)
        self.pool = pool
        self.branch_pool = Conv(channels, f"{pool_out}@1x1") if pool_out else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        outputs = []
        for steps in self.branches:
            hidden = [x]
            for names in steps:
                hidden = [getattr(self, name)(hidden[0]) for name in names]
            outputs += hidden
        return torch.cat([*outputs, self.branch_pool(self.pool(x))], 1)


class Inception(nn.Sequential):
    """The FID Inception-v3 as far as its 64-, 192-, 768- or 2048-channel layer, spatially averaged.

    Images (B, 3, 299, 299) in [-1, 1] -> (B, dims) >= 0. Parameter names are those of the public file, whose
    classifier head (fc) is not built. Weights are random until loaded.
    """

    def __init__(self, dims: int = 2048):
        super().__init__()
        self.dims = dims  # one of DIMS
        self.Conv2d_1a_3x3 = Conv(3, "32@3x3/2")
        self.Conv2d_2a_3x3 = Conv(32, "32@3x3/1")
        self.Conv2d_2b_3x3 = Conv(32, "64@3x3")
        self.maxpool1 = nn.MaxPool2d(3, stride=2)
        if dims >= 192:
            self.Conv2d_3b_1x1 = Conv(64, "80@1x1")
            self.Conv2d_4a_3x3 = Conv(80, "192@3x3/1")
            self.maxpool2 = nn.MaxPool2d(3, stride=2)
        for name, block in MIXED.items():
            if dims == 2048 or (dims == 768 and name < "Mixed_7a"):
                self.add_module(name, Mixed(*block))
        self.eval().requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).mean((2, 3))


def features(images: Iterable[Tensor], network: Inception, batch_size: int = 16, name: str = "") -> Tensor:
    """Features (N, dims), float32 on the CPU, of uint8 images (N, 3, H, W), or of any (3, H, W) one by one.

    Runs where the network is, in eval mode and true float32 (less moves FID). A name makes a progress line.
    """
    network.eval()
    device = next(network.parameters()).device
    images, result = iter(images), [torch.empty(0, network.dims)]
    with torch.inference_mode(), torch.backends.cudnn.flags(enabled=True, benchmark=False, allow_tf32=False):
        while batch := list(itertools.islice(images, batch_size)):
            unit = (image[None].to(device).float() / 255 for image in batch)
            resized = [F.interpolate(x, size=(299, 299), mode="bilinear", align_corners=False) for x in unit]
            result.append(network(2 * torch.cat(resized) - 1).cpu())
            if name and sys.stderr.isatty():
                print(f"{name}: {sum(map(len, result)):,} images", end="\r", file=sys.stderr, flush=True)
    result = torch.cat(result)
    if not result.isfinite().all():
        raise odm.UserError("features are not finite: --weights are not those of the FID Inception")
    return result


def load_weights(dims: int, file: str = "") -> Inception:
    """The network with the weights of a file; by default of the public one, downloaded once by torch.hub."""
    network = Inception(dims)
    try:
        if file:
            state = torch.load(file, map_location="cpu", weights_only=True)
        else:  # a download takes its name when it is whole and has the right hash
            load = torch.hub.load_state_dict_from_url
            state = load(WEIGHTS_URL, map_location="cpu", check_hash=True, weights_only=True)
        missing = network.load_state_dict(state, strict=False).missing_keys  # the file has more
        missing = [key for key in missing if not key.endswith("num_batches_tracked")]
        if missing:
            raise ValueError(f"no {missing[0]}, which --dims {dims} needs")
    except Exception as error:  # a damaged file can fail anywhere within torch.load, and so can a download
        path = file or Path(torch.hub.get_dir(), "checkpoints", WEIGHTS)
        reason = str(error).partition("\n")[0]
        remedy = f"fetch {WEIGHTS_URL} by other means and put it there, or name it with --weights"
        raise odm.UserError(f"no network in {path} ({reason}): {remedy}") from None
    return network.to(DEVICE, memory_format=torch.channels_last)  # channels last: twice as fast on a CPU


# ------------------------------------------------------------------------------------ scores and report


def list_generated(root: str, classes: list[str]) -> tuple[list[Path], list[int]]:
    """Image files below root, and each one's class: the index of its folder's name; none if all lie in root.

    Where some folders are classes, standard error says what else is passed over.
    """
    top = Path(root).resolve()
    if not top.is_dir():
        raise odm.UserError(f"{root}: no such folder")
    paths = odm.list_files(top)
    if not paths:
        raise odm.UserError(f"{root}: no images in it")
    if all(path.parent == top for path in paths):
        return paths, []
    kept = [path for path in paths if path.parent != top and path.parent.name in classes]
    others = sorted({str(path.parent.relative_to(top)) for path in set(paths) - set(kept)})
    reason = f"no class of the real images ({', '.join(classes)}): {', '.join(others)}"
    if not kept:
        raise odm.UserError(f"{root}: {reason}: rename the folders, or score all images in one folder")
    if others:
        print(f"{root}: passed over, {reason}", file=sys.stderr)
    return kept, [classes.index(path.parent.name) for path in kept]


def score(real: Tensor, fake: Tensor, k: int) -> dict:
    """The numbers of one row; None where either side has too few images."""
    few = min(len(real), len(fake))
    row = {"n_real": len(real), "n_fake": len(fake), "fid_biased": few < real.shape[1]}
    if few <= max(k, 2):
        return row | dict.fromkeys(["fid", "kid", "kid_se", "precision", "recall"])
    fid = frechet_distance(real, fake)
    kid, kid_se = kernel_distance(real.to(DEVICE), fake.to(DEVICE))
    precision, recall = precision_recall(real.to(DEVICE), fake.to(DEVICE), k)
    return row | {"fid": fid, "kid": kid, "kid_se": kid_se, "precision": precision, "recall": recall}


def evaluate(args: argparse.Namespace) -> dict:
    """All that the report says, as plain numbers and names; draws args.neighbours."""
    real_paths, real_labels, classes = odm.find_images(args.real, args.order, args.columns)
    listings = {root: list_generated(root, classes) for root in args.generated}
    sizes = {length for paths, _ in listings.values() for length in odm.read_image(paths[0]).size}
    if not args.size and len(sizes) > 1:
        listed = ", ".join(map(str, sorted(sizes)))
        raise odm.UserError(f"generated images have sides of {listed} pixels: give the real ones' --size")
    reading = dict(size=args.size or sizes.pop(), crop=args.crop)
    network = load_weights(args.dims, args.weights)
    settings = vars(args) | {"size": reading["size"], "classes": classes}
    result = {"settings": settings, "rows": [], "classifier": [], "neighbours": []}
    fits, found = {}, []
    if args.trained_on:
        seen_paths, seen_labels, names = odm.find_images(args.trained_on, args.order, args.columns)
        if names != classes:
            raise odm.UserError(f"--trained-on {args.trained_on}: classes {names}, but REAL has {classes}")
        if not set(real_paths).isdisjoint(seen_paths):
            raise odm.UserError("--trained-on: REAL must be other images, which the generator did not see")
        seen, seen_labels = odm.read_squares(seen_paths, **reading), torch.tensor(seen_labels)
        known = features(seen, network, args.batch, "trained on")
        fits[args.trained_on] = known, seen_labels
    real = features(odm.read_squares(real_paths, **reading), network, args.batch, "real")
    real_labels = torch.tensor(real_labels)
    for root, (paths, labels) in listings.items():
        images = (torch.from_numpy(np.array(odm.read_image(path))).permute(2, 0, 1) for path in paths)
        fake, labels = features(images, network, args.batch, root), torch.tensor(labels)
        parts = [("all", slice(None), slice(None))]
        parts += [(label, real_labels == c, labels == c) for c, label in enumerate(classes) if len(labels)]
        if args.trained_on:
            ratio, index = (x.cpu() for x in likeness(*(x.to(DEVICE) for x in (fake, known, real))))
            found += zip(ratio.tolist(), paths, index.tolist())
            if len(labels):
                fits[root] = fake, labels
                both = f"{args.trained_on} + {root}"
                fits[both] = torch.cat([known, fake]), torch.cat([seen_labels, labels])
        for label, of_real, of_fake in parts:
            row = {"class": label, "generated": root, **score(real[of_real], fake[of_fake], args.k)}
            if args.trained_on:
                row["copies"] = (ratio[of_fake] <= 0.5).double().sum().item() / max(row["n_fake"], 1)
            result["rows"].append(row)
    result["rows"].sort(key=lambda row: ["all", *classes].index(row["class"]))  # methods side by side
    for name, fit in fits.items():
        scores = classifier_score(*fit, real, real_labels, len(classes))
        result["classifier"].append({"fitted_on": name, **scores})
    if args.neighbours:
        likeliest = sorted(found)[:8]
        columns = [("generated", [odm.read_square(path, reading["size"]) for _, path, _ in likeliest])]
        for n in range(len(likeliest[0][2])):
            columns.append((f"nearest {n + 1}", [seen[places[n]] for _, _, places in likeliest]))
        odm.save_picture(odm.sheet_of(columns), Path(args.neighbours))
        for ratio, path, places in likeliest:
            row = {"ratio": ratio, "generated": str(path), "nearest": str(seen_paths[places[0]])}
            result["neighbours"].append(row)
    return result


def report(result: dict) -> str:
    """The text that main prints: numbers first, so that names may have any length."""
    size, dims = result["settings"]["size"], result["settings"]["dims"]
    lines = [f"real images at {size}x{size}, {dims} features", ""]
    lines += ["     n   real       FID           1000 KID  precision  recall  copies  class, generated"]
    for row in result["rows"]:
        scores = "  too few images"
        if row["fid"] is not None:
            scores = f"{row['fid']:9.2f}" + ("*" if row["fid_biased"] else " ")
            scores += f"{1000 * row['kid']:9.2f} ±{1000 * row['kid_se']:7.2f}"
            scores += f"{row['precision']:11.3f}{row['recall']:8.3f}"
        copies = f"{row['copies']:8.3f}" if "copies" in row else "       -"
        counts = f"{row['n_fake']:6}{row['n_real']:7}"
        lines.append(f"{counts}{scores:47}{copies}  {row['class']}, {row['generated']}")
    lines.append("* n below the dimensions: FID is biased upward, compare only at equal n; see KID")
    if result["settings"]["trained_on"]:
        lines.append("copies: at least twice as near to an image of --trained-on as to any real one")
        lines.append("\n kappa  mean error  recall of the top grade  of a classifier fitted on")
    for row in result["classifier"]:
        scores = f"{row['kappa']:6.3f}{row['mean_error']:12.3f}{row['top_recall']:25.3f}"
        lines.append(f"{scores}  {row['fitted_on']}")
    for row in result["neighbours"]:
        lines.append(f"{row['ratio']:.2f}  {row['generated']}, nearest to {row['nearest']}")
    return "\n".join(lines)


def plot(rows: list[dict]) -> Image.Image:
    """Class-wise FID as bars (Fig. 4): one a row, a colour a generated folder; the largest has 700 pixels."""
    rows = [row for row in rows if row["fid"] is not None]
    largest = max((row["fid"] for row in rows), default=0) or 1
    folders = list(dict.fromkeys(row["generated"] for row in rows))
    image = Image.new("RGB", (800, 60 * len(rows) + 20), "white")
    draw = ImageDraw.Draw(image)
    for number, row in enumerate(rows):
        y = 10 + 60 * number
        text = f"{row['class']}, {row['generated']}: FID {row['fid']:.4g}"
        draw.text((20, y), text + ", biased upward" * row["fid_biased"], "black", font_size=18)
        colour = f"hsl({210 + 150 * folders.index(row['generated'])}, 45%, 50%)"
        draw.rectangle((20, y + 24, 20 + 700 * row["fid"] / largest, y + 48), colour)
    return image


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status: 0, 2 for what the user can mend, 130 for Ctrl-C."""

    def positive(text: str) -> int:
        if not 1 <= int(text) < 2**31:
            raise ValueError
        return int(text)

    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("fid.py", description=__doc__, formatter_class=raw, allow_abbrev=False)
    parser.usage = argparse.SUPPRESS  # the docstring shows it, and argparse's errors are short without it
    add = parser.add_argument
    add("real", metavar="REAL", help="folder of real images, as for odm.py train --data")
    add("generated", metavar="GENERATED", nargs="+", help="folders of images, or of class folders")
    add("--dims", type=int, default=2048, choices=DIMS, help="features of the network [2048]")
    add("--weights", default="", metavar="FILE", help="the network's [the public file, downloaded once]")
    add("--size", type=positive, metavar="N", help="resize real images to N x N [that of the generated ones]")
    add("--crop", type=positive, default=0, metavar="N", help="first cut their middle N x N, as in training")
    add("--order", default="", metavar="A,B,...", help="class names in ascending severity")
    add("--columns", default="", metavar="ID,GRADE", help="columns of a CSV that grades the real images")
    add("-k", type=positive, default=3, metavar="N", help="neighbours for precision and recall [3]")
    add("--batch", type=positive, default=16, metavar="N", help="images at a time [16]")
    add("--json", default="", metavar="FILE", help="write all numbers")
    add("--plot", default="", metavar="FILE.png", help="draw the class-wise FID as bars (Fig. 4)")
    add("--trained-on", default="", metavar="DIR", help="what the generator saw, REAL being what it did not")
    add("--neighbours", default="", metavar="FILE.png", help="draw the 8 likeliest copies, with DIR's")
    args = parser.parse_args(argv)
    try:
        for file in filter(None, (args.json, args.plot, args.neighbours)):
            if Path(file).is_dir() or not Path(file).parent.is_dir():  # found out now, not after the work
                raise odm.UserError(f"{file}: must be a file in a folder that exists")
        if args.neighbours and not args.trained_on:
            raise odm.UserError("--neighbours shows images of --trained-on DIR: give that too")
        warnings.filterwarnings("ignore", module="torch")  # its words on odd files are in the error
        torch.set_float32_matmul_precision("highest")  # with less, as some machines set it, distances are off
        with contextlib.redirect_stdout(sys.stderr):  # odm.py says what it reads
            result = evaluate(args)
        print(report(result))
        if args.json:
            text = json.dumps(result, indent=1, allow_nan=False) + "\n"
            odm.write_text(Path(args.json), text)
        if args.plot:
            odm.save_picture(plot(result["rows"]), Path(args.plot))
        return 0
    except (odm.UserError, OSError) as error:
        message, status = f"error: {error}", 2
    except (RuntimeError, MemoryError) as error:
        if not odm.out_of_memory(error):
            raise
        message, status = "error: out of memory: lower --batch, --size or --dims", 2
    except KeyboardInterrupt:
        message, status = "interrupted", 130
    print("fid.py:", " ".join(message.split()), file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")  # a name that can't be shown must not cost the report
    sys.exit(main())
