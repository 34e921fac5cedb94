"""Do generated images help my classifier? Are they copies of my patients?

    python data/beyond/usefulness.py REAL GENERATED... --trained-on DIR [--neighbours likeliest.png]

DIR holds the images that the generator was trained on, REAL others of the same classes that it did not see,
of other patients. All are read as by fid.py, and seen through its network.

    likeness             how near to DIR, beside REAL: an image at most half as far from DIR counts as a copy
    ridge_classifier     fitted on DIR, on the generated images, on both; REAL is what it is asked about
    quadratic_kappa      how well its answers agree with the doctors' grades

The generated images help if the classifier of both has a higher kappa than that of DIR alone.
"""

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.append(str(Path(__file__).resolve().parents[2]))
import fid
import odm


def likeness(fake: Tensor, known: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
    """How near fake (n, d) is to known (m, d), what the generator saw, beside real (l, d), what it did not.

    A ratio (n,): distance to the nearest of known over that to the nearest of real. About 1 for an honest
    generator, even one of low diversity. And the places of the three nearest in known, (n, 3).
    """

    def nearest(y: Tensor, k: int) -> Tensor:
        return torch.cat([rows.topk(k, largest=False).indices for rows in fid.squared_distances(fake, y)])

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


def quadratic_kappa(confusion: Tensor) -> float:
    """Cohen's kappa with weights (i - j)^2 of (C, C) counts: 1 perfect, 0 chance; nan for one class."""
    table = confusion.double()
    index = torch.arange(len(table), dtype=torch.float64)
    cost = (index[:, None] - index).square()
    by_chance = (cost * torch.outer(table.sum(1), table.sum(0))).sum() / table.sum()
    return (1 - (cost * table).sum() / by_chance).item()


def classifier_score(x: Tensor, labels: Tensor, real: Tensor, real_labels: Tensor, num_classes: int) -> dict:
    """kappa, mean error (classes), recall of the top class of a ridge classifier of x (n, d), labels (n,)."""
    answers = ridge_classifier(x, labels, num_classes)(real)
    confusion = F.one_hot(real_labels, num_classes).T @ F.one_hot(answers, num_classes)
    error = (answers - real_labels).abs().double().mean().item()
    top_recall = (confusion[-1, -1] / confusion[-1].sum()).item()
    return {"kappa": quadratic_kappa(confusion), "mean_error": error, "top_recall": top_recall}


def evaluate(args: argparse.Namespace) -> dict:
    """All that the report says, as plain numbers and names; draws args.neighbours."""
    classes, real, generated = fid.find_sets(args)
    seen, names = fid.find_real(args.trained_on, args.order, args.columns)
    if names != classes:
        raise odm.UserError(f"--trained-on {args.trained_on}: classes {names}, but REAL has {classes}")
    pixels = [odm.read_squares(images.paths, **real.reading) for images in (real, seen)]
    odm.must_be_others(*pixels, real.name)
    network = fid.load_weights(args.dims, args.weights)
    x, known = (fid.features(part, network, args.batch, odm.progress_of(len(part), f"of {images.name}"))
                for part, images in zip(pixels, (real, seen)))
    fits, rows, found = {seen.name: (known, seen.labels)}, [], []
    for images in generated:
        fake = images.features(network, args.batch)
        ratio, places = (part.cpu() for part in likeness(*(part.to(fid.DEVICE) for part in (fake, known, x))))
        copies = (ratio <= 0.5).double().mean().item()
        rows.append({"generated": images.name, "n_fake": len(fake), "copies": copies})
        found += zip(ratio.tolist(), images.paths, [[seen.paths[i] for i in row] for row in places.tolist()])
        if len(images.labels):
            both = torch.cat([known, fake]), torch.cat([seen.labels, images.labels])
            fits |= {images.name: (fake, images.labels), f"{seen.name} + {images.name}": both}
    classifier = [{"fitted_on": name, **classifier_score(*fit, x, real.labels, len(classes))}
                  for name, fit in fits.items() if classes]
    likeliest = sorted(found)[:8]
    if args.neighbours:
        draw_neighbours(likeliest, real.reading, Path(args.neighbours))
    neighbours = [{"ratio": ratio, "generated": str(path), "nearest": str(originals[0])}
                  for ratio, path, originals in likeliest]
    settings = vars(args) | real.reading | {"classes": classes}
    return {"settings": settings, "rows": rows, "classifier": classifier, "neighbours": neighbours}


def draw_neighbours(likeliest: Sequence[tuple[float, Path, list[Path]]], reading: dict, file: Path) -> None:
    """A picture: a row for each generated image, itself and then the nearest that the generator saw."""
    _, generated, originals = zip(*likeliest)
    columns = [("generated", odm.read_squares(generated, size=reading["size"]))]
    for n, paths in enumerate(zip(*originals), start=1):
        columns.append((f"nearest {n}", odm.read_squares(paths, **reading)))
    odm.save_picture(odm.sheet_of(columns), file)


def report(result: dict) -> str:
    """The text that main prints: numbers first, so that names may have any length."""
    size, dims = result["settings"]["size"], result["settings"]["dims"]
    lines = [f"real images at {size}x{size}, {dims} features", "", "     n  copies  generated"]
    for row in result["rows"]:
        lines.append(f"{row['n_fake']:6}{row['copies']:8.3f}  {row['generated']}")
    lines += ["copies: at least twice as near to an image of --trained-on as to any real one", ""]
    lines += [" ratio  of the distances to both, and the likeliest copies"]
    for row in result["neighbours"]:
        lines.append(f"{row['ratio']:6.2f}  {row['generated']}, nearest to {row['nearest']}")
    if result["classifier"]:
        lines += ["", " kappa  mean error  recall of the top class  of a classifier fitted on"]
    for row in result["classifier"]:
        scores = f"{row['kappa']:6.3f}{row['mean_error']:12.3f}{row['top_recall']:25.3f}"
        lines.append(f"{scores}  {row['fitted_on']}")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = fid.parser("usefulness.py", __doc__)
    add = parser.add_argument
    add("--trained-on", required=True, metavar="DIR", help="what the generator saw; REAL is what it did not")
    add("--neighbours", type=fid.new_file, default="", metavar="FILE.png",
        help="draw the 8 likeliest copies, and what is nearest to them in DIR")
    return fid.run("usefulness.py", evaluate, report, parser.parse_args(argv))


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")  # a name that can't be shown must not cost the report
    sys.exit(main())
