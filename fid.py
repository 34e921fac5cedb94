# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.5", "numpy", "pillow>=10.3", "scipy"]
# ///
"""How good are generated images? FID, KID, precision and recall, overall and per class.

    python fid.py data/limuc samples/limuc      # Table 1 of the paper, and a row per class
    python fid.py data/limuc samples/dm samples/odm --json scores.json
    python fid.py my_images other_images        # two plain folders, as for pytorch-fid

    frechet_distance      FID: distance of the Gaussians fitted to both sets (Heusel et al. 2017)
    kernel_distance       KID: the same question without a bias at small n (Binkowski et al. 2018)
    precision_recall      how much of one set lies inside the other (Kynkaanniemi et al. 2019)
    Inception, features   the network all of them look through (the FID Inception of 2015-12-05)

REAL is read as for training (odm.find_images), or is a plain folder of images: one row, without classes.
GENERATED, from any generator, is a plain folder, or class folders directly below it, named like those of
REAL. Both sides should have one resolution: by default the real images are brought to the size of the
generated ones. Do these help a classifier, are they copies? See data/beyond/usefulness.py.
"""

import argparse
import contextlib
import itertools
import json
import os
import re
import sys
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import scipy.linalg
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import odm

WEIGHTS = "pt_inception-2015-12-05-6726825d.pth"  # the last part begins its SHA-256, which torch.hub checks
WEIGHTS_URL = "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/" + WEIGHTS
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

# ------------------------------------------------------------------------------ distances between features


def frechet_distance(real: Tensor, fake: Tensor) -> float:
    """FID: |mu_1 - mu_2|^2 + tr(S_1 + S_2 - 2 (S_1 S_2)^(1/2)) of the Gaussians of real (N, d), fake (M, d).

    In [0, inf), 0 for equal means and covariances; units of the features squared. N, M >= 2, else ValueError;
    singular covariances included. In float64. Biased upward when N or M is not well above d.
    """
    real, fake = (np.asarray(x, np.float64) for x in (real, fake))
    # Centred features are a factor of their covariance; so is R of their QR, which is smaller.
    a, b = (np.linalg.qr((x - x.mean(0)) / np.sqrt(len(x) - 1), mode="r") for x in (real, fake))
    # S_1 = A'A and S_2 = B'B: the eigenvalues of S_1 S_2 are the squared singular values of A B', so that
    # tr (S_1 S_2)^(1/2) is their plain sum. No matrix root, nothing complex, nothing added to a diagonal.
    root = scipy.linalg.svdvals(a @ b.T).sum()
    distance = ((real.mean(0) - fake.mean(0)) ** 2).sum() + (a**2).sum() + (b**2).sum() - 2 * root
    return max(float(distance), 0.0)  # equal sets leave a rounding error of either sign


def kernel_distance(real: Tensor, fake: Tensor) -> tuple[float, float]:
    """KID, the unbiased squared MMD of real (N, d), fake (M, d), kernel (x.y / d + 1)^3; its standard error.

    mean k(x, x') + mean k(y, y') - 2 mean k(x, y) over all pairs of different images; 0 on average for equal
    distributions at any n, hence often below 0. The error is the jackknife's, which leaves out one image at a
    time. N, M >= 3, else not finite. Memory is linear in N and M.
    """

    def sums(x: Tensor, y: Tensor) -> Tensor:  # over y, (n,)
        return torch.cat([((part @ y.T / d + 1) ** 3).sum(1, dtype=torch.float64) for part in x.split(1024)])

    def estimate(xx: Tensor, yy: Tensor, xy: Tensor, n: int, m: int) -> Tensor:
        return xx / (n * (n - 1)) + yy / (m * (m - 1)) - 2 * xy / (n * m)

    (n, d), m = real.shape, len(fake)
    xx, yy, xy, yx = sums(real, real), sums(fake, fake), sums(real, fake), sums(fake, real)
    for total, x in ((xx, real), (yy, fake)):  # an image with itself is what makes the plain estimate biased
        total -= (x.double().square().sum(1) / d + 1) ** 3
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

    def share_inside(points: Tensor, centres: Tensor) -> float:
        away = squared_distances(centres, centres)  # the nearest centre is the centre itself
        radius = torch.cat([rows.topk(k + 1, largest=False).values[:, k] for rows in away])
        inside = [(rows <= radius).any(1) for rows in squared_distances(points, centres, rounding=2e-6)]
        return torch.cat(inside).double().mean().item()

    mean = real.mean(0)  # subtracting it moves no distance, but products of short vectors round less
    real, fake = (real - mean).float(), (fake - mean).float()
    return share_inside(fake, real), share_inside(real, fake)


def squared_distances(x: Tensor, y: Tensor, rounding: float = 0.0) -> Iterator[Tensor]:
    """|x|^2 + |y|^2 - 2 x.y of x (n, d), y (m, d), less `rounding` of the squares: (n, m) by 1,024 rows."""
    y_squared = (1 - rounding) * y.square().sum(1)
    for part in x.split(1024):
        part_squared = (1 - rounding) * part.square().sum(1, keepdim=True)
        yield torch.addmm(y_squared, part, y.T, alpha=-2).add_(part_squared)


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


def convolution(channels: int, spec: str) -> nn.Sequential:
    out, height, width, *stride = map(int, re.findall(r"\d+", spec))
    conv = nn.Conv2d(channels, out, (height, width), *(stride or (1, "same")), bias=False)
    return nn.Sequential(OrderedDict(conv=conv, bn=nn.BatchNorm2d(out, eps=1e-3), relu=nn.ReLU()))


class Mixed(nn.Module):
    def __init__(self, channels: int, branches: list[str], pool: nn.Module, pool_out: int, c: int = 0):
        super().__init__()
        self.branches = []  # a branch is a list of steps, a step the names of the convolutions with one input
        for branch in branches:
            steps, c_in = [], channels
            for step in branch.replace("C", str(c)).split():
                layers = dict(layer.split(":") for layer in step.split("|"))
                for name, spec in layers.items():
                    self.add_module(name, convolution(c_in, spec))
                steps.append(list(layers))
                c_in = int(spec.split("@")[0])
            self.branches.append(steps)
        self.pool = pool
        self.branch_pool = convolution(channels, f"{pool_out}@1x1") if pool_out else nn.Identity()

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
        self.dims = dims
        self.Conv2d_1a_3x3 = convolution(3, "32@3x3/2")
        self.Conv2d_2a_3x3 = convolution(32, "32@3x3/1")
        self.Conv2d_2b_3x3 = convolution(32, "64@3x3")
        self.maxpool1 = nn.MaxPool2d(3, stride=2)
        if dims >= 192:
            self.Conv2d_3b_1x1 = convolution(64, "80@1x1")
            self.Conv2d_4a_3x3 = convolution(80, "192@3x3/1")
            self.maxpool2 = nn.MaxPool2d(3, stride=2)
        for name, block in MIXED.items():
            if dims == 2048 or (dims == 768 and name < "Mixed_7a"):
                self.add_module(name, Mixed(*block))
        self.eval().requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).mean((2, 3))


def features(images: Iterable[Tensor], network: Inception, batch_size: int = 16,
             progress: Callable | None = None) -> Tensor:
    """Features (N, dims), float32 on the CPU, of uint8 images (N, 3, H, W), or of any (3, H, W) one by one.

    Runs where the network is, in eval mode and true float32 (less moves FID).
    """
    network.eval()
    device = next(network.parameters()).device
    images, result = iter(images), [torch.empty(0, network.dims)]
    with torch.inference_mode(), torch.backends.cudnn.flags(enabled=True, benchmark=False, allow_tf32=False):
        while batch := list(itertools.islice(images, batch_size)):
            unit = (image[None].to(device).float() / 255 for image in batch)
            resized = [F.interpolate(x, size=(299, 299), mode="bilinear", align_corners=False) for x in unit]
            result.append(network(2 * torch.cat(resized) - 1).cpu())
            if progress:
                progress(sum(map(len, result)))
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
            state = torch.hub.load_state_dict_from_url(WEIGHTS_URL, map_location="cpu", check_hash=True,
                                                       weights_only=True)
        if any(name.startswith("AuxLogits") for name in state):
            raise ValueError("it is torchvision's classifier, whose FID is another")
        if missing := network.load_state_dict(state, strict=False).missing_keys:  # the file has more
            raise ValueError(f"no {missing[0]}, which --dims {dims} needs")
    except Exception as error:  # a damaged file can fail anywhere within torch.load, and so can a download
        path = file or Path(torch.hub.get_dir(), "checkpoints", WEIGHTS)
        raise odm.UserError(f"no network in {path} ({str(error)[:100]}): fetch {WEIGHTS_URL} by other means "
                            "and put it there, or name it with --weights") from None
    return network.to(DEVICE, memory_format=torch.channels_last)  # channels last: twice as fast on a CPU


# ------------------------------------------------------------------------------------ images to compare


@dataclass
class ImageSet:
    """Image files, the class of each, and how the network is to see them."""

    name: str  # their folder or CSV, as it was given
    paths: list[Path]
    labels: Tensor  # (N,) indices of class names; (0,) where there are no classes
    reading: dict = field(default_factory=dict)  # size and crop of odm.read_square; {}: images as they are

    def features(self, network: Inception, batch_size: int) -> Tensor:
        """Those of all images, (N, dims)."""
        if self.reading:
            images = odm.read_squares(self.paths, **self.reading)
        else:
            pixels = (np.array(odm.read_image(path)) for path in self.paths)
            images = (torch.from_numpy(image).permute(2, 0, 1) for image in pixels)
        return features(images, network, batch_size, odm.progress_of(len(self.paths), f"of {self.name}"))


def find_real(data: str, order: str, columns: str) -> tuple[ImageSet, list[str]]:
    """Real images and the names of their classes, none for a plain folder of images."""
    root = Path(data)
    with contextlib.redirect_stdout(None):  # what is passed over is said below
        files = odm.list_files(root) if root.is_dir() else []
    plain = root.is_dir() and all(path.parent == root for path in files if odm.is_image(path))
    if plain and not order and not columns:
        images = find_generated(data, [])
        print(f"{data}: {len(images.paths):,} images without class folders, so row 'all' only")
        return images, []
    paths, labels, names = odm.find_images(data, order, columns)
    return ImageSet(data, paths, torch.tensor(labels)), names


def find_generated(data: str, classes: Sequence[str]) -> ImageSet:
    """Images in a folder, or in folders directly below it named like classes; says what it passes over."""
    root = Path(data)
    files = odm.list_files(root) if root.is_dir() else []
    folders = {path: path.parent.relative_to(root) for path in files if odm.is_image(path)}
    # list_files passes over folders that hold samples of odm.py, but these are no less sets of their own.
    deeper = {file.parent.relative_to(root) for file in root.glob("*/**/sample.json")}
    deeper |= {folder for folder in folders.values() if len(folder.parts) > 1}
    if deeper:
        found = sorted(map(str, deeper))
        raise odm.UserError(f"{data}: holds deeper folders or sets of samples, {', '.join(found[:12])}: name "
                            "one set, whose images lie in it or in class folders directly below it")
    if not folders:
        raise odm.UserError(f"{data}: no images in it, or no such folder")
    plain = set(folders.values()) == {Path()}
    kept = [path for path in folders if plain or folders[path].name in classes]
    others = ", ".join(sorted({str(folders[path]) for path in set(folders) - set(kept)}))
    reason = f"no class of REAL ({', '.join(classes) or 'which has none'}): {others}"
    if not kept:
        raise odm.UserError(f"{data}: {reason}: rename the folders, or score all images in one folder")
    if others:
        print(f"{data}: {len(folders) - len(kept):,} images passed over, {reason}")
    if not_read := [path for path in files if path not in folders and path.name != "sample.json"]:
        print(f"{data}: files not read: {len(not_read):,}, as {not_read[0].name}")
    labels = [] if plain else [classes.index(folders[path].name) for path in kept]
    return ImageSet(data, kept, torch.tensor(labels))


def find_sets(args: argparse.Namespace) -> tuple[list[str], ImageSet, list[ImageSet]]:
    """Class names, the real images, each set of generated ones; refuses what does not fit before any work."""
    real, classes = find_real(args.real, args.order, args.columns)
    generated = [find_generated(data, classes) for data in args.generated]
    sizes, known = [], {path.resolve() for path in real.paths}
    for images in generated:
        if 0 < len(known.intersection(path.resolve() for path in images.paths)) < len(known):
            raise odm.UserError(f"{images.name}: its images count as {real.name} too; keep them elsewhere")
        found = Counter(odm.read_image(path).size for path in images.paths)
        sizes += found
        if len(found) > 1:
            listed = ", ".join(f"{width}x{height} ({n:,})" for (width, height), n in found.items())
            raise odm.UserError(f"{images.name}: images of several sizes, {listed}: keep those of one")
    sides = sorted({side for size in sizes for side in size})
    if len(sides) > 1 and not args.size:
        raise odm.UserError(f"generated images have sides of {sides} pixels: give the real ones' --size")
    real.reading = dict(size=args.size or sides[0], crop=args.crop)
    for images, (width, height) in zip(generated, sizes):
        images.reading = {} if width == height else real.reading  # what is not square is cut like REAL
    return classes, real, generated


# ------------------------------------------------------------------------ scores, report, command line


def score(real: Tensor, fake: Tensor, k: int) -> dict:
    """The numbers of one row; None where either side has too few images."""
    few = min(len(real), len(fake))
    scores = [None] * 5
    if few > max(k, 2):
        sets = real.to(DEVICE), fake.to(DEVICE)
        scores = [frechet_distance(real, fake), *kernel_distance(*sets), *precision_recall(*sets, k)]
    row = {"n_real": len(real), "n_fake": len(fake), "fid_biased": few < real.shape[1]}
    return row | dict(zip(("fid", "kid", "kid_se", "precision", "recall"), scores))


def evaluate(args: argparse.Namespace) -> dict:
    """All that the report says, as plain numbers and names."""
    classes, real, generated = find_sets(args)
    network = load_weights(args.dims, args.weights)
    x, rows = real.features(network, args.batch), []
    for images in generated:
        y = images.features(network, args.batch)
        rows.append({"class": "all", "generated": images.name, **score(x, y, args.k)})
        for c, name in enumerate(classes if len(images.labels) else []):
            scores = score(x[real.labels == c], y[images.labels == c], args.k)
            rows.append({"class": name, "generated": images.name, **scores})
    rows.sort(key=lambda row: ["all", *classes].index(row["class"]))  # methods side by side
    return {"settings": vars(args) | real.reading | {"classes": classes}, "rows": rows}


def report(result: dict) -> str:
    """The text that main prints: numbers first, so that names may have any length."""
    size, dims = result["settings"]["size"], result["settings"]["dims"]
    lines = [f"real images at {size}x{size}, {dims} features", "",
             "     n   real       FID           1000 KID  precision  recall  class, generated"]
    for row in result["rows"]:
        scores = "  too few images"
        if row["fid"] is not None:
            scores = f"{row['fid']:9.2f}" + ("*" if row["fid_biased"] else " ")
            scores += f"{1000 * row['kid']:9.2f} ±{1000 * row['kid_se']:7.2f}"
            scores += f"{row['precision']:11.3f}{row['recall']:8.3f}"
        lines.append(f"{row['n_fake']:6}{row['n_real']:7}{scores:47}  {row['class']}, {row['generated']}")
    lines.append("* n below the dimensions: FID is biased upward, compare only at equal n; see KID")
    return "\n".join(lines)


def new_file(text: str) -> str:
    """A file that can be written, which is found out now, not after the work."""
    if text and (os.path.isdir(text) or not os.access(Path(text).parent, os.W_OK)):
        raise argparse.ArgumentTypeError(f"{text}: must be a file in a folder that exists and can be written")
    return text


def parser(program: str, doc: str) -> odm.Parser:
    """The flags of this program, which data/beyond/usefulness.py has too."""
    raw = argparse.RawDescriptionHelpFormatter
    top = odm.Parser(program, description=doc, formatter_class=raw, allow_abbrev=False)
    add = top.add_argument
    add("real", metavar="REAL", help="real images: folder of class folders or of images, or CSV of grades")
    add("generated", metavar="GENERATED", nargs="+", help="folders of images, or of class folders")
    add("--dims", type=int, default=2048, choices=(64, 192, 768, 2048), help="features of the network [2048]")
    add("--weights", default="", metavar="FILE", help="the network's [the public file, downloaded once]")
    add("--size", type=odm.whole(1), help="resize real images to N x N [that of the generated ones]")
    add("--crop", type=odm.whole(1), default=0, help="first cut their middle N x N, as in training")
    add("--order", default="", metavar="A,B,...", help="class names in ascending severity")
    add("--columns", default="", metavar="ID,GRADE", help="columns of a CSV that grades the real images")
    add("--batch", type=odm.whole(1), default=16, help="images at a time [16]")
    add("--json", type=new_file, default="", metavar="FILE", help="write all numbers")
    return top


def run(program: str, evaluate: Callable, report: Callable, args: argparse.Namespace) -> int:
    """Print report(evaluate(args)), write --json; returns the exit status, 2 for what the user can mend."""

    def work():
        torch.set_float32_matmul_precision("highest")  # with less, as some machines set it, distances are off
        with contextlib.redirect_stdout(sys.stderr):  # what is said on the way is no part of the report
            result = evaluate(args)
        if args.json:
            odm.write_text(Path(args.json), json.dumps(result, indent=1, allow_nan=False) + "\n")
        print(report(result))

    return odm.status_of(program, work)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    top = parser("fid.py", __doc__)
    top.add_argument("-k", type=odm.whole(1), default=3, help="neighbours in precision, recall [3]")
    return run("fid.py", evaluate, report, top.parse_args(argv))


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")  # a name that can't be shown must not cost the report
    sys.exit(main())
