"""Which severities does a network show, read and move to? Measured where the pixels tell.

    python data/evidence/severity.py runs/demo-odm-*             # synthetic frames, whose severity is known
    python data/evidence/severity.py --leaves runs/leaf-odm-*    # coffee leaves: the diseased part of a leaf
    python data/evidence/severity.py data/demo.pt --picture data/moved.png    # given, read, moved, truth

A row for each network, then mean and standard deviation; above them what they compare with. Of leaves, and
with --brief, there are the first three numbers. Samples go to samples/RUN-..., what is there is kept.

    shown   mean severity of samples at each class, one noise a row, by demo.measure or leaf_severity
    median  of the same
    rising  share of the pairs of samples, of one noise at neighbouring classes, whose severities ascend
    off     severity asked for in quarter steps, 0 ... 3, one noise a row: mean distance of the severity shown
    bend    the same thirteen mean severities: root mean square distance from their own straight line
    read    mean error of the severities read from fresh frames
    within  correlation of severity read and true severity inside a grade, mean over the grades
    kappa   of the grades nearest to the severities read
    moved   root mean square error, in [-1, 1], of fresh frames moved to 0, 1, 2, 3, beside their scenes there
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from scipy.ndimage import median_filter

DATA = Path(__file__).resolve().parents[1]
sys.path += [str(DATA.parent), str(DATA), str(DATA / "beyond")]
import demo
import line
import odm
from usefulness import quadratic_kappa

SEED = 55  # of the fresh scenes
ASKED = np.arange(0, 3.1, 0.25)  # severities of a series


def leaf_severity(images: np.ndarray) -> np.ndarray:
    """Diseased share (N,) of the leaf in photographs on a pale background: uint8 (N, 3, H, W), H 32 or 64.

    Leaf is what is saturated or dark. Diseased is what is redder, red over green, than the background: that
    takes out the colour of the light, as the median over 3x3 pixels takes out grain. 0 where no leaf is seen.
    """
    shares = []
    for image in median_filter(images, size=(1, 1, 3, 3)).astype(float):
        leaf = (np.ptp(image, axis=0) > 60 / 255 * image.max(0)) | (image.max(0) < 90)
        redness = image[0] / (image[1] + 1)
        pale = 1.0 if leaf.all() else np.median(redness[~leaf])
        shares.append((leaf & (redness > pale)).sum() / max(leaf.sum(), 1))
    return np.array(shares)


def at_size(frame: np.ndarray, size: int = 32) -> torch.Tensor:
    """A frame of data/demo.py as odm.py reads it from a file: (3, size, size) uint8."""
    image = Image.fromarray(frame).resize((size, size), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def severity_of(folder: Path) -> float:
    """Of a class folder, Mayo 2 or 1.25."""
    return float(folder.name.removeprefix("Mayo "))


def scene_of(file: Path) -> tuple[float, np.random.Generator]:
    """(true severity, all else) of the fresh frame Mayo <grade>/<i>.png."""
    return demo.scene(SEED, int(severity_of(file.parent)), int(file.stem))


def truths_of(files: list[Path], severity: float) -> torch.Tensor:
    """The scenes of fresh frames at another severity: (N, 3, 32, 32) uint8."""
    return torch.stack([at_size(demo.draw(severity, scene_of(file)[1])) for file in files])


def fresh_frames(each: int) -> tuple[Path, list[Path], np.ndarray, np.ndarray]:
    """A folder of frames, as many of each grade, that no network has seen; files, grades, true severities."""
    root, grades = DATA / f"fresh-{each}", np.repeat(range(4), each)
    files = [root / f"Mayo {grade}" / f"{i:04d}.png" for grade in range(4) for i in range(each)]
    for file in files:
        if not file.exists():
            odm.save_picture(Image.fromarray(demo.draw(*scene_of(file))), file)
    return root, files, grades, np.array([scene_of(file)[0] for file in files])


def rms(a: torch.Tensor, b: torch.Tensor) -> float:
    """Root mean square difference of uint8 images, taken in [-1, 1], the mean over images."""
    difference = odm.to_unit(a) - odm.to_unit(b)
    return difference.square().mean((1, 2, 3)).sqrt().mean().item()


def folders_of(out: Path) -> list[Path]:
    """The folders of samples or of moved images, in ascending severity."""
    return sorted((path for path in out.iterdir() if path.is_dir()), key=severity_of)


def shown(checkpoint: Path, asked: str, each: int, measure: Callable, name: str, changes: dict) -> np.ndarray:
    """Severities measured in a series of samples: (each, severities asked for), a row of one noise."""
    out = odm.sample(checkpoint, asked, each=each, out=f"samples/{name}", **changes)
    columns = [[folder / f"{i:05d}.png" for i in range(each)] for folder in folders_of(out)]
    size = odm.read_image(columns[0][0]).width
    return np.stack([measure(odm.read_squares(files, size=size).numpy()) for files in columns], axis=1)


def drawn(severities: list[np.ndarray]) -> dict:
    """Of the severities measured at each class."""
    return {"shown": [part.mean() for part in severities], "median": [np.median(part) for part in severities]}


def off_and_bend(series: np.ndarray) -> dict:
    """Of the mean severities (13,) measured where ASKED was asked for."""
    straight = np.polyval(np.polyfit(ASKED, series, 1), ASKED)
    return {"off": abs(series - ASKED).mean(), "bend": np.sqrt(np.square(series - straight).mean())}


def read(checkpoint: Path, each: int) -> dict:
    """How well severities are read from fresh frames."""
    _, files, grade, true = fresh_frames(each)
    network = odm.load_network(checkpoint, "cpu")
    positions = line.positions_of(network, odm.read_squares(files, size=32))
    found = np.interp(positions, range(len(network.names)), odm.severities_of(network.names))
    within = np.mean([np.corrcoef(found[grade == g], true[grade == g])[0, 1] for g in range(4)])
    confusion = np.histogram2d(grade, np.floor(found + 0.5), bins=4, range=[[0, 4]] * 2)[0]
    kappa = quadratic_kappa(torch.tensor(confusion))
    return {"read": abs(found - true).mean(), "within": within, "kappa": kappa}


def moved(checkpoint: Path, each: int, out: Path) -> dict:
    """Errors of fresh frames moved to 0, 1, 2, 3."""
    root, files, _, _ = fresh_frames(each)
    network = odm.load_network(checkpoint, guidance=1.0, eta=0.0)
    errors = []
    for target, folder in enumerate(folders_of(line.move(network, [root], severity="0:3:1", out=out))):
        images = odm.read_squares([folder / f"{file.parent.name}-{file.name}" for file in files], size=32)
        errors.append(rms(images, truths_of(files, target)))
    return {"moved": errors}


def row(checkpoint: Path, leaves: bool, brief: bool, each: int, changes: dict) -> dict:
    """All numbers of one network."""
    run = checkpoint.stem if checkpoint.is_file() else checkpoint.name
    name = "-".join([run, *(f"{key}-{value:g}" for key, value in changes.items())])
    asked, measure = ("0:4:1", leaf_severity) if leaves else ("0:3:1", demo.measure)
    severities = shown(checkpoint, asked, each, measure, name, changes)
    numbers = drawn(severities.T) | {"rising": (np.diff(severities, axis=1) > 0).mean()}
    if brief:
        return numbers
    series = shown(checkpoint, "0:3:0.25", each // 2, measure, f"{name}-series", changes).mean(0)
    errors = moved(checkpoint, each // 2, Path(f"samples/{run}-moved"))
    return numbers | off_and_bend(series) | read(checkpoint, each) | errors


def without_a_network(each: int, data: Path) -> None:
    """What the numbers of synthetic frames compare with; data: those trained on."""
    _, files, grade, true = fresh_frames(each)
    series = [demo.measure(truths_of(files, severity).numpy()).mean() for severity in ASKED]
    show("fresh scenes drawn truly", off_and_bend(series))
    show("every grade named without a fault", {"read": abs(grade - true).mean()})
    images, labels, _ = odm.load_images(data, 32)
    colour = torch.stack([odm.to_unit(images[labels == c]).mean((0, 2, 3)) for c in range(4)])
    _, files, own, _ = fresh_frames(each // 2)
    given, unmoved, shifted = odm.read_squares(files, size=32), [], []
    for target in range(4):
        truth, shift = truths_of(files, target), colour[target] - colour[own]
        unmoved.append(rms(given, truth))
        shifted.append(rms(odm.to_uint8(odm.to_unit(given) + shift[:, :, None, None]), truth))
    show("not moved", {"moved": unmoved})
    show("moved by adding the mean colour of the class", {"moved": shifted})


def show(name: str, numbers: dict) -> None:
    groups = [f"{key} " + " ".join(f"{number:.3f}" for number in np.ravel(numbers[key])) for key in numbers]
    odm.say(f"{name}: {', '.join(groups)}")


def draw_picture(checkpoint: Path, file: Path) -> None:
    """One frame of each grade and the severity read below it; moved ones, and below each the truth."""
    network = odm.load_network(checkpoint, guidance=1.0, eta=0.0)
    _, files, _, _ = fresh_frames(1)
    given = odm.read_squares(files, size=32)
    columns = {"given": []}
    for path, image, position in zip(files, given, line.positions_of(network, given)):
        label = Image.new("RGB", (128, 128), "white")
        ImageDraw.Draw(label).text((64, 64), f"read: {position:.2f}", "black", anchor="mm", font_size=18)
        columns["given"] += [image, torch.from_numpy(np.array(label)).permute(2, 0, 1)]
        out = Path("samples", f"{checkpoint.stem}-picture", path.parent.name)
        for target, folder in enumerate(folders_of(line.move(network, [path], severity="0:3:1", out=out))):
            pair = [odm.read_square(folder / path.name, 32), truths_of([path], target)[0]]
            columns.setdefault(f"moved to {target}", []).extend(pair)
    large = {title: [at_size(np.array(odm.to_picture(image)), 128) for image in column]
             for title, column in columns.items()}
    odm.save_picture(odm.sheet_of(list(large.items())), file)


def evaluate(checkpoints: list[Path], leaves: bool, brief: bool, each: int, picture: Path | None,
             **changes) -> None:
    """Print all rows."""
    if picture:
        return draw_picture(checkpoints[0], picture)
    each, size = each or (64 if leaves else 24), odm.load_network(checkpoints[0]).model.config.size
    brief = brief or leaves
    data, measure = (DATA / "leaf", leaf_severity) if leaves else (DATA / "demo", demo.measure)
    if not leaves:
        demo.make(data)
    if not brief:
        without_a_network(each, data)
    images, labels, _ = odm.load_images(data, size)
    show("trained on", drawn([measure(images[labels == c].numpy()) for c in labels.unique()]))
    rows = [row(path, leaves, brief, each, changes) for path in checkpoints]
    for path, numbers in zip(checkpoints, rows):
        show(path.name, numbers)
    if len(rows) > 1:
        show("mean", {key: np.mean([numbers[key] for numbers in rows], axis=0) for key in rows[0]})
        deviation = {key: np.std([numbers[key] for numbers in rows], axis=0, ddof=1) for key in rows[0]}
        show("standard deviation", deviation)


def main(argv: list[str] | None = None) -> int:
    parser = odm.Parser("severity.py", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add = parser.add_argument
    add("checkpoints", type=Path, nargs="+", metavar="CHECKPOINT")
    add("--leaves", action="store_true", help="the networks were trained on data/leaf, coffee leaves")
    add("--brief", action="store_true", help="only what samples show at each class")
    add("--each", type=odm.whole(2), default=0, help="samples of a class; off to moved: half [24, leaves 64]")
    add("--picture", type=Path, metavar="FILE.png", help="draw this instead, for one network")
    add("--guidance", type=float, default=argparse.SUPPRESS, metavar="S", help="of the samples [the run's]")
    return odm.status_of("severity.py", lambda: evaluate(**vars(parser.parse_args(argv))))


if __name__ == "__main__":
    sys.exit(main())
