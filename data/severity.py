"""What does a network do with severities? Measured on drawings, whose severity is known (data/demo.py).

    python data/severity.py runs/demo-odm-*                          # a row for each, then mean and spread
    python data/severity.py data/demo.pt --picture data/moved.png    # given, read, moved to 0 ... 3, truth

    drawn   mean severity of the images drawn at grade 0, 1, 2, 3, as demo.measure sees it
    off     severity asked for in quarter steps, 0 ... 3, one noise a row: mean distance of the severity drawn
    bend    the same thirteen mean severities: root mean square distance from their own straight line
    read    mean error of the severities read from fresh drawings
    within  correlation of severity read and true severity inside a grade, mean over the grades
    kappa   of the grades nearest to the severities read
    moved   root mean square error, in [-1, 1], of fresh drawings moved to 0, 1, 2, 3: a drawing's scene can
            be drawn at any severity, which is the truth

Above them stands what the rows compare with: the same of true drawings, and of moving without a network. What
is drawn goes to samples/RUN-..., and what is there already is kept.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

HERE = Path(__file__).resolve().parent
sys.path += [str(HERE), str(HERE.parent)]
import demo
import odm

SEED = 55  # of the fresh scenes
ASKED = np.arange(0, 3.1, 0.25)  # severities of a series


def at_size(frame: np.ndarray, size: int = 32) -> torch.Tensor:
    """A frame of data/demo.py as odm.py reads it from a file: (3, size, size) uint8."""
    image = Image.fromarray(frame).resize((size, size), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def severity_of(folder: Path) -> float:
    """Of a class folder, Mayo 2 or 1.25."""
    return float(folder.name.removeprefix("Mayo "))


def scene_of(file: Path) -> tuple[float, np.random.Generator]:
    """(true severity, all else) of the fresh drawing Mayo <grade>/<i>.png."""
    return demo.scene(SEED, int(severity_of(file.parent)), int(file.stem))


def truths_of(files: list[Path], severity: float) -> torch.Tensor:
    """The scenes of fresh drawings at another severity: (N, 3, 32, 32) uint8."""
    return torch.stack([at_size(demo.draw(severity, scene_of(file)[1])) for file in files])


def fresh_drawings(each: int) -> tuple[Path, list[Path]]:
    """A folder with as many drawings of each grade, of scenes that no network has seen, and its files."""
    root = HERE / f"fresh-{each}"
    files = [root / f"Mayo {grade}" / f"{i:04d}.png" for grade in range(4) for i in range(each)]
    for file in files:
        if not file.exists():
            odm.save_picture(Image.fromarray(demo.draw(*scene_of(file))), file)
    return root, files


def grades_and_severities(files: list[Path]) -> tuple[np.ndarray, np.ndarray]:
    """Grade and true severity of each fresh drawing."""
    grades = [int(severity_of(file.parent)) for file in files]
    return np.array(grades), np.array([scene_of(file)[0] for file in files])


def rms(a: torch.Tensor, b: torch.Tensor) -> float:
    """Root mean square difference of uint8 images, taken in [-1, 1], the mean over images."""
    difference = odm.to_unit(a) - odm.to_unit(b)
    return difference.square().mean((1, 2, 3)).sqrt().mean().item()


def folders_of(out: Path) -> list[Path]:
    """The folders that odm.sample made, in ascending severity."""
    return sorted((path for path in out.iterdir() if path.is_dir()), key=severity_of)


def severities_in(out: Path) -> list[float]:
    """Mean severity measured in each folder."""
    squares = [odm.read_squares(sorted(path.glob("*.png")), size=32) for path in folders_of(out)]
    return [demo.measure(images.numpy()).mean() for images in squares]


def read(checkpoint: Path, each: int) -> tuple[float, float, float]:
    """(mean error, correlation within a grade, kappa) of severities read."""
    _, files = fresh_drawings(each)
    network = odm.load_network(checkpoint, "cpu")
    positions = odm.read_positions(odm.read_squares(files, size=32), network, seed=0)
    found = np.interp(positions, range(len(network.classes.names)), network.classes.severities)
    grade, true = grades_and_severities(files)
    within = np.mean([np.corrcoef(found[grade == g], true[grade == g])[0, 1] for g in range(4)])
    confusion = np.histogram2d(grade, np.floor(found + 0.5), bins=4, range=[[0, 4]] * 2)[0]
    return abs(found - true).mean(), within, odm.quadratic_kappa(torch.tensor(confusion))


def moved(checkpoint: Path, each: int, out: Path) -> list[float]:
    """Error of drawings moved to 0, 1, 2, 3."""
    root, files = fresh_drawings(each)
    odm.sample(checkpoint, "0:3:1", image=root, out=out)
    errors = []
    for target, folder in enumerate(folders_of(out)):
        images = odm.read_squares([folder / f"{file.parent.name}-{file.name}" for file in files], size=32)
        errors.append(rms(images, truths_of(files, target)))
    return errors


def row(checkpoint: Path, each: int) -> list[float]:
    """All numbers of one network."""
    name = checkpoint.stem if checkpoint.suffix else checkpoint.name
    drawn = severities_in(odm.sample(checkpoint, "0:3:1", each=each, out=f"samples/{name}"))
    series = severities_in(odm.sample(checkpoint, "0:3:0.25", each=each // 2, out=f"samples/{name}-series"))
    errors = moved(checkpoint, each // 2, Path(f"samples/{name}-moved"))
    return [*drawn, *off_and_bend(series), *read(checkpoint, each), *errors]


def off_and_bend(series: list[float]) -> tuple[float, float]:
    """Of the mean severities measured where ASKED was asked for."""
    line = np.polyval(np.polyfit(ASKED, series, 1), ASKED)
    return abs(series - ASKED).mean(), np.sqrt(np.square(series - line).mean())


def without_a_network(each: int) -> None:
    """What the numbers of a network compare with."""
    _, files = fresh_drawings(each)
    grade, true = grades_and_severities(files)
    series = [demo.measure(truths_of(files, severity).numpy()).mean() for severity in ASKED]
    off, bend = off_and_bend(series)
    print(f"fresh scenes drawn truly in quarter steps: off {off:.3f}, bend {bend:.3f}")
    demo.make(HERE / "demo")
    images, labels, _ = odm.load_images(HERE / "demo", 32)
    measured = [demo.measure(images[labels == c].numpy()).mean() for c in range(4)]
    print("the embedded set: severity measured at grade 0, 1, 2, 3:", " ".join(f"{m:.3f}" for m in measured))
    colour = torch.stack([odm.to_unit(images[labels == c]).mean((0, 2, 3)) for c in range(4)])
    _, files = fresh_drawings(each // 2)
    given, own = odm.read_squares(files, size=32), grades_and_severities(files)[0]
    print(f"naming every grade without a fault: error {abs(grade - true).mean():.3f}")
    for target in range(4):
        truth, shift = truths_of(files, target), colour[target] - colour[own]
        recoloured = odm.to_uint8(odm.to_unit(given) + shift[:, :, None, None])
        print(f"to {target}: unmoved {rms(given, truth):.3f}, mean colour of the class added "
              f"{rms(recoloured, truth):.3f}")


def picture(checkpoint: Path, file: Path) -> None:
    """One drawing of each grade and the severity read below it; moved ones, and below each the truth."""
    network = odm.load_network(checkpoint, "cpu")
    _, files = fresh_drawings(1)
    given = odm.read_squares(files, size=32)
    positions = odm.read_positions(given, network, seed=0)
    columns = {"given": []}
    for path, image, position in zip(files, given, positions):
        out = Path("samples", f"{checkpoint.stem}-picture", path.parent.name)
        odm.sample(checkpoint, "0:3:1", image=path, out=out)
        label = Image.new("RGB", (128, 128), "white")
        ImageDraw.Draw(label).text((64, 64), f"read: {position:.2f}", "black", anchor="mm", font_size=18)
        columns["given"] += [enlarged(image), torch.from_numpy(np.array(label)).permute(2, 0, 1)]
        for target, folder in enumerate(folders_of(out)):
            at = odm.read_square(folder / path.name, 32)
            columns.setdefault(f"moved to {target}", [])
            columns[f"moved to {target}"] += [enlarged(at), enlarged(truths_of([path], target)[0])]
    odm.save_picture(odm.sheet_of(list(columns.items())), file)


def enlarged(image: torch.Tensor) -> torch.Tensor:
    large = odm.to_picture(image).resize((128, 128), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(large)).permute(2, 0, 1)


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("checkpoints", type=Path, nargs="+", metavar="CHECKPOINT")
    text = "images of each grade; half as many in the series and moved [24]"
    parser.add_argument("--each", type=int, default=24, help=text)
    parser.add_argument("--picture", type=Path, metavar="FILE.png", help="draw this instead, for one network")
    args = parser.parse_args()
    if args.picture:
        return picture(args.checkpoints[0], args.picture)
    without_a_network(args.each)
    head = "drawn at 0, 1, 2, 3 | off | bend | read | within | kappa | moved to 0, 1, 2, 3"
    rows = np.array([row(path, args.each) for path in args.checkpoints])
    print(head)
    for path, numbers in zip(args.checkpoints, rows):
        print(path.name, " ".join(f"{number:.3f}" for number in numbers))
    if len(rows) > 1:
        print("mean", " ".join(f"{number:.3f}" for number in rows.mean(0)))
        print("standard deviation", " ".join(f"{number:.3f}" for number in rows.std(0, ddof=1)))


if __name__ == "__main__":
    main()
