"""L_DM on unseen images, per class and per band of t, of one network or of several that are to be compared.

    python data/evidence/heldout.py runs/leaf data/leaf-test
    python data/evidence/heldout.py runs/leaf runs/plain data/leaf-test              # is the second better?
    python data/evidence/heldout.py runs/leaf data/leaf-test --trained-on data/leaf  # does it memorise?

All networks see an image at the same t, --draws of them in each tenth of 1..T, and with the same noise. Both
depend on the image's number alone. So networks are compared image by image, and differences show that are far
smaller than the spread over images. In brackets are standard errors over images; "all" takes all images.
"""

import argparse
import contextlib
import json
import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

sys.path.append(str(Path(__file__).resolve().parents[2]))
import odm

BANDS = ((0, 1), (1, 3), (3, 6), (6, 10), (2, 10), (0, 10))  # in tenths of T: 1-100, ..., 201-1000, 1-1000
ALIKE = ("classes", "size", "crop", "timesteps", "beta_1", "beta_T")  # so must be networks to be compared


@torch.no_grad()
def losses(network: odm.Network, images: Tensor, labels: Tensor, draws: int = 2, batch: int = 16) -> dict:
    """L_DM of images (N, 3, H, H) uint8, at a random t of each of 10 * draws parts of 1..T: {band: (N,)}."""
    device, T, count = network.model.label.weight.device, network.model.config.timesteps, 10 * draws
    alpha_bar = odm.alpha_bars(network.model.config).to(device)
    found, progress = [], odm.progress_of(len(images), "images measured")
    for some in torch.arange(len(images)).split(max(1, batch // count)):
        rngs = [torch.Generator().manual_seed(odm.seed_of("held-out", number)) for number in some.tolist()]
        place = [torch.arange(count) + torch.rand(count, generator=rng, dtype=torch.float64) for rng in rngs]
        t = 1 + (torch.cat(place) * T / count).long().to(device)
        eps = torch.cat([torch.randn(count, *images.shape[1:], generator=rng) for rng in rngs]).to(device)
        image = some.repeat_interleave(count)
        x_t = odm.q_sample(odm.to_unit(images[image]).to(device), t, eps, alpha_bar)
        loss = odm.dm_loss(eps, network.model(x_t, t, labels[image].to(device)))
        found.append(loss.double().cpu().view(-1, count))
        progress(int(some[-1]) + 1)
    loss = torch.cat(found).numpy()
    return {f"{T * a // 10 + 1}-{T * b // 10}": loss[:, a * draws : b * draws].mean(1) for a, b in BANDS}


def mean(x: np.ndarray) -> tuple[float, float]:
    """(mean, its standard error) of the losses of images (N,); a single image has no error: nan."""
    return x.mean(), x.std(ddof=1) / len(x) ** 0.5 if len(x) > 1 else np.nan


def difference(x: np.ndarray, first: np.ndarray) -> tuple[float, float]:
    """(100 (mean x / mean first - 1), its standard error as that of a ratio of means), of the same images."""
    ratio = x.mean() / first.mean()
    return 100 * (ratio - 1), 100 * mean(x - ratio * first)[1] / first.mean()


def quotient(x: np.ndarray, seen: np.ndarray) -> tuple[float, float]:
    """(mean x / mean seen, its standard error), of different images."""
    ratio = x.mean() / seen.mean()
    return ratio, np.hypot(mean(x)[1], ratio * mean(seen)[1]) / seen.mean()


def report(title: str, names: list[str], measure, digits: int, *parts: tuple[dict, Tensor]) -> dict:
    """Print and return {class: {band: (value, standard error)}}; parts: (losses, labels) of images."""
    table, width = {}, max(map(len, names)) + 3
    print(f"{title}\n" + " " * width + "".join(f"{band:>19}" for band in parts[0][0]))
    for c, name in enumerate([*names, "all"]):
        chosen = [(loss, (labels.numpy() == c) | (name == "all")) for loss, labels in parts]
        table[name] = {band: measure(*(loss[band][which] for loss, which in chosen)) for band in parts[0][0]}
        cells = [f"{value:.{digits}f} ({error:.{digits}f})" for value, error in table[name].values()]
        print(f"{name:<{width}}" + "".join(f"{cell:>19}" for cell in cells))
    return table


def load(checkpoints: list[str], folders: list[str], device: str, order: str, columns: str):
    """(networks, [(images, labels, names) of each folder]). Refused is what does not belong together."""
    networks = [odm.load_network(checkpoint, device) for checkpoint in checkpoints]
    first, *others = [vars(network.model.config) | {"classes": network.names} for network in networks]
    for name, other in zip(checkpoints[1:], others):
        if unlike := [field for field in ALIKE if other[field] != first[field]]:
            raise odm.UserError(f"{name}: {', '.join(unlike)} not as in {checkpoints[0]}; measure it alone")
    sets = [odm.load_images(folder, first["size"], first["crop"], order, columns) for folder in folders]
    for folder, (*_, names) in zip(folders, sets):
        if names != first["classes"]:
            raise odm.UserError(f"{folder}: classes {names}, but {checkpoints[0]} has {first['classes']}")
    for images, *_ in sets[1:]:
        odm.must_be_others(sets[0][0], images, folders[0])
    return networks, sets


def run(checkpoints: list[str], data: str, trained_on: str, draws: int, batch: int, file: str, **how) -> None:
    with contextlib.redirect_stdout(sys.stderr):  # the tables alone are the output
        networks, sets = load(checkpoints, [data] + [trained_on] * bool(trained_on), **how)
        measured = [[(losses(network, images, labels, draws, batch), labels) for images, labels, _ in sets]
                    for network in networks]
    names, first, tables = networks[0].names, measured[0][0], []
    for name, parts in zip(checkpoints, measured):
        tables.append({"network": name, "unseen": report(f"{name} on {data}", names, mean, 5, parts[0])})
        if trained_on:
            tables[-1]["seen"] = report(f"{name} on {trained_on}", names, mean, 5, parts[1])
            tables[-1]["quotient"] = report(f"{name}: unseen / seen", names, quotient, 3, *parts)
        if parts[0] is not first:
            title = f"{name} on {data}, difference from {checkpoints[0]} in per cent"
            tables[-1]["difference"] = report(title, names, difference, 2, parts[0], first)
    if file:
        tables = json.loads(json.dumps(tables), parse_constant=lambda nan: None)  # JSON has no nan
        odm.write_text(Path(file), json.dumps(tables, indent=1) + "\n")


def main(argv: list[str] | None = None) -> int:
    parser = odm.Parser("heldout.py", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add = parser.add_argument
    add("checkpoints", nargs="+", metavar="CHECKPOINT", help="a checkpoint or a run's folder")
    add("data", metavar="DIR", help="unseen images: a folder of class folders, or a CSV of grades")
    add("--trained-on", default="", metavar="DIR", help="the images that the network was trained on")
    add("--draws", type=int, default=2, choices=range(1, 11), metavar="N", help="t in each tenth of 1..T [2]")
    add("--order", default="", help="as of train")
    add("--columns", default="", help="as of train")
    add("--batch", type=int, default=16, help="rows of the network at once [16]")
    add("--device", default="auto", help="cpu, cuda, ... [the GPU if there is one]")
    add("--json", dest="file", default="", metavar="FILE", help="write the tables there, too")
    return odm.status_of("heldout.py", lambda: run(**vars(parser.parse_intermixed_args(argv))))


if __name__ == "__main__":
    sys.exit(main())
