"""How near are moved drawings to their truth? A drawing's scene can be drawn at any severity (data/demo.py).

    python data/moved.py data/fresh-even grades.csv             # a table; folder and CSV: see experiments.sh
    python data/moved.py data/fresh-even --picture moved.png    # given, read, moved to 0 ... 3, and the truth
"""

import argparse
import csv
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

HERE = Path(__file__).resolve().parent
sys.path += [str(HERE), str(HERE.parent)]
import demo
import odm

SEED = 55  # of the scenes in data/fresh-even


def at_size(frame: np.ndarray, size: int = 32) -> torch.Tensor:
    """A frame of data/demo.py as odm.py reads it from a file: (3, size, size) uint8."""
    image = Image.fromarray(frame).resize((size, size), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def truth_of(file: Path, severity: float) -> torch.Tensor:
    """The scene of a file Mayo <grade>/<i>.png at another severity."""
    return at_size(demo.draw(severity, demo.scene(SEED, int(file.parent.name[5:]), int(file.stem))[1]))


def rms(a: list[torch.Tensor], b: list[torch.Tensor]) -> float:
    """Root mean square difference of images in [-1, 1], the mean over images."""
    difference = odm.to_unit(torch.stack(a)) - odm.to_unit(torch.stack(b))
    return difference.square().mean((1, 2, 3)).sqrt().mean().item()


def table(folder: Path, grades: Path) -> None:
    """Severities read, then errors of moved, unmoved and recoloured drawings to the truth at 0, 1, 2, 3."""
    rows = list(csv.DictReader(open(grades)))
    files = [Path(row["file"]) for row in rows]
    grade = np.array([int(file.parent.name[5:]) for file in files])
    true = np.array([demo.scene(SEED, g, int(file.stem))[0] for g, file in zip(grade, files)])
    found = np.array([float(row["severity"]) for row in rows])
    within = [np.corrcoef(found[grade == g], true[grade == g])[0, 1] for g in range(4)]
    right = np.mean((found + 0.5).astype(int) == grade)
    print(f"{len(files)} drawings: mean error {abs(found - true).mean():.3f} (the grade itself: "
          f"{abs(grade - true).mean():.3f}), correlation {np.corrcoef(found, true)[0, 1]:.3f}, "
          f"within a grade {np.mean(within):.2f}, right grade {right:.2f}")
    out = odm.sample(image=folder, severity="0:3:1", checkpoint=HERE / "demo.pt", out="samples/moved-evenly")
    demo.make(HERE / "demo")
    images, labels, _ = odm.load_images(HERE / "demo", 32)
    colour = torch.stack([odm.to_unit(images[labels == c]).mean((0, 2, 3)) for c in range(4)])
    given = [odm.read_square(file, 32) for file in files]
    for target in range(4):
        truth = [truth_of(file, target) for file in files]
        names = [f"{file.parent.name}-{file.name}" for file in files]
        moved = [odm.read_square(out / f"Mayo {target}" / name, 32) for name in names]
        shifts = colour[target] - colour[grade]
        shifted = [odm.to_uint8(odm.to_unit(image) + shift[:, None, None])
                   for image, shift in zip(given, shifts)]
        severity = demo.measure(torch.stack(moved).numpy()).mean()
        print(f"to {target}: moved {rms(moved, truth):.3f}, unmoved {rms(given, truth):.3f}, mean colour of "
              f"the class added {rms(shifted, truth):.3f}; severity measured {severity:.2f}")


def picture(folder: Path, file: Path, rows: int = 4) -> None:
    """One drawing of each grade and the severity read below it; moved ones, and below each the truth."""
    network = odm.load_network(HERE / "demo.pt", "cpu")
    files = [folder / f"Mayo {grade}" / f"{i:04d}.png" for i, grade in enumerate(range(rows))]
    given = torch.stack([odm.read_square(path, 32) for path in files])
    read = odm.read_positions(given, network, seed=0)
    columns = {"given": []}
    for path, image, position in zip(files, given, read):
        out = Path("samples", "moved-picture", path.parent.name)
        odm.sample(HERE / "demo.pt", "0:3:1", image=path, out=out)
        label = Image.new("RGB", (128, 128), "white")
        font = ImageFont.load_default(18)
        ImageDraw.Draw(label).text((64, 64), f"read: {position:.2f}", "black", font, anchor="mm")
        columns["given"] += [enlarged(image), torch.from_numpy(np.array(label)).permute(2, 0, 1)]
        for target in range(4):
            moved = odm.read_square(out / f"Mayo {target}" / path.name, 32)
            columns.setdefault(f"moved to {target}", [])
            columns[f"moved to {target}"] += [enlarged(moved), enlarged(truth_of(path, target))]
    odm.sheet_of(list(columns.items())).save(file)


def enlarged(image: torch.Tensor) -> torch.Tensor:
    large = odm.to_picture(image).resize((128, 128), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(large)).permute(2, 0, 1)


if __name__ == "__main__":
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("folder", type=Path)
    parser.add_argument("grades", type=Path, nargs="?")
    parser.add_argument("--picture", type=Path)
    args = parser.parse_args()
    if args.picture:
        picture(args.folder, args.picture)
    else:
        table(args.folder, args.grades)
