"""Fig. 2 of the paper, measured: do the noise estimates of ordered classes lie on a line?

    python data/evidence/plane.py runs/leaf-dm runs/leaf-odm data/leaf-test --out data/evidence/plane.png

A panel for each network, all of one scale. A point is a class; it stands where the network's estimates of the
noise in x_t under that class lie, in the plane of their two principal directions (t = T / 2, mean over up to
64 of the images). Below stand the share of the spread along the first direction, and odm.py's straightness.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

sys.path += [str(Path(__file__).resolve().parents[2]), str(Path(__file__).resolve().parent)]
import heldout
import odm

SIDE = 400  # pixels of a panel


@torch.no_grad()
def estimates(network: odm.Network, images: Tensor) -> Tensor:
    """Of each image's x_t, t = T / 2, with noise of its own, under every class: (N, C, 3, H, W)."""
    alpha_bar = odm.alpha_bars(network.model.config)
    rng = torch.Generator().manual_seed(odm.seed_of("plane"))
    found = []
    for x_0 in odm.to_unit(images).split(8):
        times = torch.full((len(x_0),), network.model.config.timesteps // 2)
        x_t = odm.q_sample(x_0, times, torch.randn(x_0.shape, generator=rng), alpha_bar)
        found.append(torch.stack([network.model(x_t, times, torch.full_like(times, c))
                                  for c in range(len(network.names))], dim=1))
    return torch.cat(found)


def principal_coordinates(eps_hat: Tensor) -> tuple[np.ndarray, float]:
    """Estimates (N, C, ...) as points (C, 2), the last class to the right, and the first coordinate's share.

    Inner products of the differences from the mean over classes, averaged over entries and images, are those
    of points with the same mean square distances (classical scaling). Two directions of them are kept.
    """
    x = (eps_hat - eps_hat.mean(1, keepdim=True)).flatten(2).double()
    inner = torch.einsum("ncd,nkd->ck", x, x) / (x.shape[0] * x.shape[2])
    square, direction = np.linalg.eigh(inner.numpy())
    points = direction[:, :-3:-1] * np.sqrt(square[:-3:-1].clip(0))
    return points * np.sign(points[-1] - points[0]), square[-1] / square.sum()


def draw(rows: list[tuple[str, list[str], np.ndarray, str]]) -> Image.Image:
    """A panel for each (title, names of the points, points, note)."""
    scale = SIDE / 2.5 / max(abs(points).max() for _, _, points, _ in rows)
    picture = Image.new("RGB", (SIDE * len(rows), SIDE), "white")
    pen = ImageDraw.Draw(picture)
    for panel, (title, names, points, note) in enumerate(rows):
        centre = SIDE * (panel + 0.5)
        places = [(centre + scale * x, SIDE / 2 - scale * y) for x, y in points]
        pen.line(places, "lightgrey", width=3)
        for (x, y), name in zip(places, names):
            pen.ellipse((x - 5, y - 5, x + 5, y + 5), "firebrick")
            pen.text((x, y - 18), name, "black", anchor="mm", font_size=18)
        pen.text((centre, 20), title, "black", anchor="mm", font_size=20)
        pen.text((centre, SIDE - 20), note, "black", anchor="mm", font_size=16)
    return picture


def run(checkpoints: list[str], data: str, out: Path) -> None:
    networks, [(images, _, _)] = heldout.load(checkpoints, [data], "cpu", order="", columns="")
    chosen = images[torch.linspace(0, len(images) - 1, min(64, len(images))).round().long()]
    rows = []
    for checkpoint, network in zip(checkpoints, networks):
        eps_hat = estimates(network, chosen)
        points, share = principal_coordinates(eps_hat)
        straight = odm.straightness(eps_hat).mean()
        title = f"{'ODM' if network.model.config.ordinal else 'DM'} ({network.name})"
        note = f"{share:.0%} along one line, straightness {straight:.2f}"
        rows.append((title, network.names, points, note))
        odm.say(f"{checkpoint}: {note}; points {points.round(4).tolist()}")
    odm.save_picture(draw(rows), out)


def main(argv: list[str] | None = None) -> int:
    parser = odm.Parser("plane.py", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add = parser.add_argument
    add("checkpoints", nargs="+", metavar="CHECKPOINT", help="a checkpoint or a run's folder")
    add("data", metavar="DIR", help="images, in class folders")
    add("--out", type=Path, required=True, metavar="FILE.png")
    return odm.status_of("plane.py", lambda: run(**vars(parser.parse_intermixed_args(argv))))


if __name__ == "__main__":
    sys.exit(main())
