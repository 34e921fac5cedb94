"""Makes the synthetic frames: in the style of LIMUC's, with a KNOWN severity behind each of them.

    python data/demo.py                                # 1,100 frames into data/demo
    python data/demo.py -n 5000 --seed 1 --out fresh   # a reference: same distribution, other frames
    python data/demo.py --check                        # how well measure() reads the severity back

They are computed, not medical images: they imitate how a colon with ulcerative colitis looks through
an endoscope just well enough to try an ordinal method on. Train nothing clinical on them.

Every frame has a severity s in [0, 3]; its grade, the folder "Mayo 0" to "Mayo 3", is s rounded. All
that s does to the pixels is continuous and monotone in s: that is what makes the classes ordinal.

    redness of the wall   s = 0 to 3     from pale pink to deep red
    vessels               s = 0 to 1.6   from clear and branching to gone
    bleeding              s = 0.9 to 3   from none to spots to blotches
    ulcers                s = 1.6 to 3   from none to large, yellow-white with a red rim

View, folds, light, tint and the places of all spots differ from frame to frame and know nothing of s.
Frame i of a grade depends on (seed, grade, i) alone, so a smaller set is the beginning of a larger one.
"""
import argparse
import math
import os
import shutil
import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

LIMUC = (6105, 3052, 1254, 865)  # frames of Mayo 0, 1, 2, 3 in LIMUC
MUCOSA = ((0.88, 0.66, 0.55), (0.88, 0.54, 0.44), (0.82, 0.41, 0.33), (0.72, 0.29, 0.23))  # RGB at s = 0, 1, 2, 3
BLOOD, ULCER, RIM = (0.48, 0.07, 0.06), (0.95, 0.86, 0.62), (0.60, 0.17, 0.15)
VEIN = (0.28, 0.48, 0.38)  # the share of each colour that a vessel takes away
UNBORN = 0.06  # how far below zero the field of a spot begins: farther than its rim and soft edge reach


def generator(*seed: int) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(seed)))  # default_rng may change one day


def ramp(value, low, high):
    """0 below low, 1 above high, smooth and monotone between."""
    u = np.clip((value - low) / (high - low), 0, 1)
    return u * u * (3 - 2 * u)


def cloud(rng, cells, px):
    """A smooth random field (px, px) of mean 0 and variance below 1, with features px / cells wide."""
    grid = Image.fromarray(rng.standard_normal((cells, cells)).astype(np.float32))
    return np.asarray(grid.resize((px, px), Image.Resampling.BICUBIC))


def vessels(rng, px):
    """Branching lines (px, px) in [0, 1], drawn twice as large and averaged."""
    image = Image.new("L", (2 * px, 2 * px))
    pen, twigs = ImageDraw.Draw(image), []
    for _ in range(rng.integers(4, 7)):  # trunks come in from outside and head for the middle
        angle, x, y = rng.uniform(0, 2 * math.pi), rng.uniform(0.3, 0.7), rng.uniform(0.3, 0.7)
        start = x - 0.75 * math.cos(angle), y - 0.75 * math.sin(angle)
        twigs.append((*start, angle + rng.normal(0, 0.4), 0.044, 13))
    while twigs:
        x, y, angle, width, steps = twigs.pop()
        for _ in range(steps):
            angle, turn = angle + rng.normal(0, 0.3), rng.uniform(-1, 1)
            to = x + 0.08 * math.cos(angle), y + 0.08 * math.sin(angle)
            pen.line([2 * px * v for v in (x, y, *to)], fill=255, width=max(1, round(2 * px * width)))
            if width > 0.02 and abs(turn) < 0.25:
                twigs.append((*to, angle + math.copysign(0.9, turn), 0.65 * width, 6))
            (x, y), width = to, 0.95 * width
    return np.asarray(image.resize((px, px), Image.Resampling.BOX), np.float32) / 255


def distance(place, x, y, thin):
    """Distance (px, px) from a point, stretched up to `thin` times in a direction: `place` is 4 numbers in [0, 1)."""
    dx, dy = x - float(1.1 * place[0] - 0.05), y - float(1.1 * place[1] - 0.05)
    c, s, thin = math.cos(math.pi * place[2]), math.sin(math.pi * place[2]), float(1 + (thin - 1) * place[3])
    return np.sqrt((c * c / thin + s * s * thin) * dx * dx + (s * s / thin + c * c * thin) * dy * dy
                   + (2 * c * s * (1 / thin - thin)) * dx * dy)


def spots(rng, x, y, severity, count, radius, onset, thin):
    """Field (px, px) of ragged spots, positive inside. A spot's onset is random; 1.1 later it is fully grown."""
    ragged, field = 0.02 * cloud(rng, 14, x.size), np.float32(-1)
    for _ in range(count):
        place, start, full = rng.random(4), rng.uniform(*onset), rng.uniform(*radius)
        grown = float(ramp(severity, start, start + 1.1))
        if grown > 0:
            field = np.maximum(field, grown * (full + ragged) - UNBORN * (1 - grown) - distance(place, x, y, thin))
    return field


def draw(severity: float, rng: np.random.Generator, size: int = 64) -> np.ndarray:
    """One frame, uint8 (size, size, 3), of a severity in [0, 3]. The rng's state is the scene: the same
    state at another severity shows the same place, healthier or worse. Frames are drawn at 128 pixels
    or more and averaged down, so that a scene is the same at every size."""
    px = max(128, size)
    x = (np.arange(px, dtype=np.float32)[None] + 0.5) / px  # (1, px), left to right
    y = x.T  # (px, 1)

    # The tube: a dark lumen, in or out of sight, folds in rings around it, light from one side.
    depth = np.hypot(x - rng.uniform(-0.2, 1.2), y - rng.uniform(-0.2, 1.2)) + 0.05 * cloud(rng, 4, px)
    crease = (0.5 + 0.5 * np.cos(2 * math.pi * (rng.uniform(1.8, 3.2) * depth + rng.random()))) ** 3
    angle, lumen = rng.uniform(0, 2 * math.pi), rng.uniform(0, 0.08)
    light = 1 + rng.uniform(0.1, 0.3) * ((x - 0.5) * math.cos(angle) + (y - 0.5) * math.sin(angle))
    light = light * (1 - rng.uniform(0.1, 0.4) * crease * ramp(cloud(rng, 3, px), -1, 1))
    light = light * (0.2 + 0.8 * ramp(depth, lumen - 0.05, lumen + 0.3))

    # What severity changes. Inflammation is patchy, but neither a sound nor a fully inflamed wall is.
    patchy = 0.25 * float(ramp(severity, 0, 1) * ramp(3 - severity, 0, 1))
    local = severity + patchy * cloud(rng, 5, px)
    colour = np.stack([np.interp(local, range(4), c) for c in zip(*MUCOSA)], -1).astype(np.float32)
    visible, branches = 1 - float(ramp(severity, 0, 1.6)), int(rng.integers(2**32))
    if visible > 0:  # their own generator: not drawing them must not move what follows
        colour *= 1 - visible * vessels(generator(branches), px)[..., None] * np.float32(VEIN)
    blood = spots(rng, x, y, severity, count=14, radius=(0.05, 0.11), onset=(0.9, 2.1), thin=2.5)
    ulcer = spots(rng, x, y, severity, count=6, radius=(0.10, 0.18), onset=(1.6, 2.1), thin=1.5)
    for field, paint in ((blood, BLOOD), (ulcer + 0.03, RIM), (ulcer, ULCER)):
        if np.max(field) > -0.025:
            colour += 0.85 * ramp(field, -0.025, 0.025)[..., None] * (np.float32(paint) - colour)

    # The camera: exposure, a tint, wet reflections.
    tint = rng.uniform(0.86, 1.04) * np.exp(rng.normal(0, 0.03, 3))
    colour *= light[..., None] * tint.astype(np.float32)
    for _ in range(rng.integers(0, 5)):
        shine = ramp(rng.uniform(0.015, 0.03) - distance(rng.random(4), x, y, thin=2), -0.01, 0.02) * light
        colour += shine[..., None] * (1 - colour)
    frame = Image.fromarray((np.clip(colour, 0, 1) * 255).round().astype(np.uint8))
    return np.asarray(frame.resize((size, size), Image.Resampling.BOX))


def scene(seed: int, grade: int, i: int) -> tuple[float, np.random.Generator]:
    """Severity and generator of frame i of a grade: draw(*scene(seed, grade, i)) is the frame.

    The severity is triangular on grade - 0.5 to grade + 0.5, densest at the grade, so that it names its
    grade without doubt; below 0 and above 3 it is reflected, which leaves no heap of equal ones there."""
    rng = generator(seed, grade, i)
    s = abs(rng.triangular(grade - 0.5, grade, grade + 0.5))
    return min(s, 6 - s), rng


def counts(n: int) -> list[int]:
    """n frames shared out in LIMUC's proportions (largest remainder)."""
    exact = np.array(LIMUC) * n / sum(LIMUC)
    whole = np.floor(exact).astype(int)
    whole[np.argsort(whole - exact, kind="stable")[:n - whole.sum()]] += 1
    return whole.tolist()


def make(out, n: int = 1100, seed: int = 0, size: int = 64) -> list[int]:
    """Write n frames of size x size to OUT/Mayo <grade>/<i>.png, and OUT/severity.csv with the severity of
    each; return the count of each grade. Where OUT holds exactly this set, nothing is done.

    The set is drawn in a folder beside OUT, which takes the name OUT when it is whole: OUT is never half
    a set. Raises ValueError for numbers out of range, OSError where OUT holds something else."""
    if n < 16:
        raise ValueError(f"-n {n}: at least 16, or the rare grades have no frame")
    if not 16 <= size <= 512:
        raise ValueError(f"--size {size}: 16 to 512 pixels")
    if seed < 0:
        raise ValueError(f"--seed {seed}: 0 or more")
    out = Path(out).resolve()
    names = {f"Mayo {grade}/{i:04d}.png": (grade, i) for grade, count in enumerate(counts(n)) for i in range(count)}
    table = "file,severity\n" + "".join(f"{name},{scene(seed, *at)[0]:.4f}\n" for name, at in names.items())

    def whole():  # the first frame of each grade tells size and version; 2 grey levels are a platform's rounding
        try:
            return ((out / "severity.csv").read_text() == table and all((out / name).is_file() for name in names)
                    and all(np.allclose(Image.open(out / f"Mayo {grade}/0000.png"), draw(*scene(seed, grade, 0), size),
                                        rtol=0, atol=2) for grade in range(4)))
        except (OSError, ValueError):  # missing, unreadable, or of another size
            return False

    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        if whole():
            return counts(n)
        raise FileExistsError(f"{out} holds something else than these {n} frames (seed {seed}, {size} pixels): "
                              "delete it or choose another --out")
    part = out.with_name(f"{out.name}.partial-{os.getpid()}")  # two programs at once do not meet
    shutil.rmtree(part, ignore_errors=True)  # of a killed program with this number
    try:
        for name, at in names.items():
            (part / name).parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(draw(*scene(seed, *at), size)).save(part / name)
        (part / "severity.csv").write_text(table)
        os.replace(part, out)
    except OSError:
        if not whole():  # if it is, another program was faster
            raise
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return counts(n)


def measure(images: np.ndarray) -> np.ndarray:
    """Severity (N,) of uint8 images (N, 3, H, W), any H and W from 16, read from the pixels alone:

        4.4 redness + 0.9 sqrt(blood) + 0.6 ulcer - 1.5

    At 32x32, a pixel's red is log R - (log G + log B) / 2, which light and shadow leave nearly alone;
    redness is its median over the lit pixels, blood and ulcer are the shares of them far above and far
    below the median. The numbers are a least-squares fit to drawn, blurred and noisy frames. Vessels stay
    out: the faint noise of a generated image would pass for them. Nothing is clipped, so an image unlike
    any frame may leave [0, 3]. On fresh frames, as many of each grade, the mean absolute error is
    0.14 and the correlation 0.99 at 32x32 and at 64x64; `--check` shows it."""
    images = np.asarray(images)
    if images.ndim != 4 or images.shape[1] != 3 or min(images.shape[2:]) < 16 or images.dtype != np.uint8:
        raise ValueError(f"{images.dtype} images of shape {images.shape}: give uint8 (N, 3, H, W), H and W from 16")
    severities = np.empty(len(images))
    for i, image in enumerate(images):
        small = Image.fromarray(np.ascontiguousarray(image.transpose(1, 2, 0))).resize((32, 32), Image.Resampling.BOX)
        r, g, b = np.log(np.moveaxis(np.asarray(small, np.float64), -1, 0) + 8)  # + 8: black has a logarithm too
        red = (r - (g + b) / 2)[r >= min(np.log(70), np.median(r))]  # no lumen, but half of the pixels at least
        redness = np.median(red)
        blood, ulcer = ramp(red - redness, 0.25, 0.5).mean(), ramp(redness - red, 0.25, 0.45).mean()
        severities[i] = 4.4 * redness + 0.9 * np.sqrt(blood) + 0.6 * ulcer - 1.5
    return severities


def check(each: int = 150, seed: int = 2403) -> None:
    """Print how measure() does on fresh frames, the same number of each grade."""
    for size in (32, 64):
        scenes = [scene(seed, grade, i) for grade in range(4) for i in range(each)]
        truth = np.array([s for s, _ in scenes])
        clean = np.stack([draw(s, rng, size) for s, rng in scenes]).transpose(0, 3, 1, 2)
        noisy = np.clip(clean + generator(seed).normal(0, 8, clean.shape), 0, 255).round().astype(np.uint8)
        for what, images in (("as drawn", clean), ("with noise of 8 grey levels", noisy)):
            found = measure(images)
            print(f"{len(truth)} frames of {size}x{size} {what}: mean absolute error {abs(found - truth).mean():.3f}, "
                  f"correlation {np.corrcoef(found, truth)[0, 1]:.3f}")


def main(argv: list[str] | None = None) -> int:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("demo.py", description=__doc__, formatter_class=raw)
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent / "demo", help="data/demo")
    parser.add_argument("-n", type=int, default=1100, metavar="COUNT", help="frames in all (1100)")
    parser.add_argument("--seed", type=int, default=0, help="another seed draws other frames (0)")
    parser.add_argument("--size", type=int, default=64, metavar="PX", help="16 to 512 (64)")
    parser.add_argument("--check", action="store_true", help="draw nothing to disk, test measure()")
    parser.error = lambda message: parser.exit(2, f"demo.py: error: {message}\n")
    args = parser.parse_args(argv)
    if args.check:
        check()
        return 0
    try:
        made = make(args.out, args.n, args.seed, args.size)
    except (OSError, ValueError) as error:
        print(f"demo.py: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("demo.py: stopped, nothing kept", file=sys.stderr)
        return 130
    print(f"{args.out}: " + ", ".join(f"Mayo {grade} {count}" for grade, count in enumerate(made)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
