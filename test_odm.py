# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.5", "numpy", "pillow>=10.3", "scipy", "pytest"]
# ///
"""Tests of odm.py, fid.py and the programs in data/ against closed forms, loops and hand-made cases.

    python test_odm.py
"""

import csv
import hashlib
import importlib
import itertools
import json
import math
import os
import pickle
import re
import resource
import shutil
import signal
import struct
import subprocess
import sys
import time
import zlib
from dataclasses import fields
from pathlib import Path
from subprocess import PIPE, Popen

import numpy as np
import pytest
import torch
from PIL import Image

HERE = Path(__file__).resolve().parent
for folder in ("", "data", "data/beyond", "data/evidence"):
    sys.path.insert(0, str(HERE / folder))
import demo
import fid
import heldout
import line
import odm
import plane
import retina
import severity
import usefulness

DEMO = HERE / "data" / "demo.pt"
torch.set_num_threads(1)  # networks of the tests are too small to share
os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that tests start

TINY = dict(size=8, ch=8, groups=2, ch_mult=(1, 2), blocks=1, attention=(4,), timesteps=50, batch=8, steps=6,
            warmup=2, lr=1e-3, sample_steps=4, log_every=2, save_every=2, sheet_every=0, device="cpu")
ALPHA_BAR = odm.alpha_bars(odm.Config())


def max_error(a, b) -> float:
    a, b = (torch.as_tensor(x, dtype=torch.float64) for x in (a, b))
    return (a - b).abs().max().item()


def noise(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def write_image(path, seed, low=0, sides=(16, 16)):
    """Random pixels; the seed may be a generator."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(low, 256, (*sides, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(path)


def write_images(root, names_and_counts, seed=0, **how):
    """A tree of class folders with random images; returns root."""
    rng = np.random.default_rng(seed)
    for name, count in names_and_counts.items():
        for i in range(count):
            write_image(root / name / f"{name.split('/')[-1].replace(' ', '')}_{i}.png", rng, **how)
    return root


@pytest.fixture(scope="module")
def graded(tmp_path_factory):
    """A small data set of 4 grades, 20 images."""
    counts = {"Mayo 0": 9, "Mayo 1": 5, "Mayo 2": 3, "Mayo 3": 3}
    return write_images(tmp_path_factory.mktemp("graded"), counts)


def settings(data="", out="", **changes) -> odm.Config:
    """Those of a tiny run."""
    return odm.Config(**{**TINY, "data": str(data), "out": str(out), **changes})


@pytest.fixture(scope="module")
def run(graded, tmp_path_factory):
    """A finished tiny run."""
    return odm.train(settings(graded, tmp_path_factory.mktemp("runs") / "tiny"))


def state_of(out):
    return torch.load(out / "checkpoint.pt", weights_only=True)


def pictures(root):
    return {p.relative_to(root): p.read_bytes() for p in root.rglob("*.png")}


def metrics_of(out):
    return np.genfromtxt(out / "metrics.csv", delimiter=",", names=True)


def train_flags(**changes) -> list[str]:
    """The command line of a tiny run."""
    text = lambda value: ",".join(map(str, value)) if isinstance(value, tuple) else value
    return ["train", *(f"{odm.flag(name)}={text(value)}" for name, value in {**TINY, **changes}.items())]


def command(*argv, **kwargs) -> Popen:
    return Popen([sys.executable, *map(str, argv)], stdout=PIPE, stderr=PIPE, text=True, **kwargs)


def error_of(capsys, main, *argv) -> str:
    """Run the main of odm or fid, which must end with status 2 and an error of one line; return that."""
    capsys.readouterr()
    try:
        status = main([str(word) for word in argv])
    except SystemExit as stop:  # argparse's
        status = stop.code
    said = capsys.readouterr().err.splitlines()
    errors = [line for line in said if line.startswith(f"{main.__module__}.py: error: ")]
    assert status == 2 and len(errors) == 1 and said[-1] == errors[0], (argv, status, said)
    return errors[0]


# ------------------------------------------------------------------------------ forward process


def test_q_sample_is_equation_1_applied_t_times():
    means, variances = [1.0], [0.0]
    for t in range(1, 1001):  # Eq. 1 takes N(m, v) to N(sqrt(1 - beta) m, (1 - beta) v + beta)
        beta = (0.02 - 1e-4) * (t - 1) / 999 + 1e-4
        means.append(math.sqrt(1 - beta) * means[-1])
        variances.append((1 - beta) * variances[-1] + beta)
    t, one = torch.arange(1001), torch.ones(1001, dtype=torch.float64)
    assert max_error(odm.q_sample(one, t, 0 * one, ALPHA_BAR), means) < 1e-12
    assert max_error(odm.q_sample(0 * one, t, one, ALPHA_BAR).square(), variances) < 1e-12


# --------------------------------------------------------------------------------------- losses


def test_where_the_ordinal_loss_is_zero():
    """On ordered lines and, with the norm as printed, at right angles instead."""
    line, corner = torch.tensor([[[0.0, 0], [3, 0], [7, 0]], [[3, 0], [0, 0], [0, 5]]])[:, :, None]
    assert odm.ordinal_loss(*line) < 1e-9 and odm.ordinal_loss(*line, "squared") == 12**2  # 2 <p-q, q-r>
    assert odm.ordinal_loss(*corner, "squared") == 0 and odm.ordinal_loss(*corner) > 1


def test_straightness_in_closed_form_and_where_estimates_coincide():
    square = torch.tensor([[[0.0, 0], [1, 0], [1, 1], [0, 1]]])
    expected = (2 * math.sqrt(0.5) + 2 / (1 + math.sqrt(2))) / 4
    assert max_error(odm.straightness(square), [expected]) < 1e-6
    points = torch.ones(2, 3, 4, requires_grad=True)
    odm.ordinal_loss(*points.unbind(1)).sum().backward()
    assert torch.equal(points.grad, torch.zeros_like(points)) and odm.straightness(points).tolist() == [1, 1]


def test_bfloat16_does_not_drown_the_ordinal_loss():
    """Estimates of classes differ by 0.003 at t = 900: rounded throughout, the loss is ten times too high."""
    frames = [demo.draw(*demo.scene(9, grade, 0), 32) for grade in range(4)]
    x_0 = odm.to_unit(torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2))
    t = torch.full((4,), 900)
    x_t = odm.q_sample(x_0, t, noise(*x_0.shape), ALPHA_BAR)
    loss = {}
    for precision in ("float32", "bfloat16"):
        model = odm.load_network(DEMO, "cpu", precision=precision).model
        with torch.no_grad():
            p, q, r = (model(x_t, t, torch.full_like(t, c)) for c in (0, 1, 3))
        assert p.dtype == torch.float32
        loss[precision] = odm.ordinal_loss(p, q, r).mean().item()
    assert loss["bfloat16"] == pytest.approx(loss["float32"], rel=0.5) and loss["bfloat16"] != loss["float32"]


# ------------------------------------------------------------------------- one step's images

LABELS = torch.tensor([0] * 50 + [1] * 30 + [2] * 15 + [3] * 5)


def drawn(step=0, B=8, **changes):
    """(settings, a batch of LABELS)."""
    config = settings(**changes)
    return config, odm.draw_batch(LABELS, 4, config, B, torch.Generator().manual_seed(step))


@pytest.mark.parametrize("triplets", ["labels", "images"])
def test_a_triplet_is_three_classes_in_order_with_one_noise(triplets):
    seen = set()
    for step in range(60):
        _, batch = drawn(step, 32, triplets=triplets, class_dropout=0.2, triplet_part=0.2)
        _, plain = drawn(step, 32, triplets=triplets, class_dropout=0.2, ordinal=0.0)
        for name in ("image", "label", "root", "t", "flip"):  # the plain diffusion model sees the same images
            assert torch.equal(getattr(plain, name), getattr(batch, name)[:32])
        own = LABELS[plain.image]
        assert ((plain.label == own) | (plain.label == 4)).all() and (plain.label == 4).any()
        assert len(batch.image) == len(batch.label) == 32 + 3 * 6  # a fifth of 32, rounded
        assert batch.root.tolist() == [*range(32), *np.repeat(range(6), 3)]  # so noise, t, flip, mask are one
        for g, (shown, image) in enumerate(zip(batch.label[32:].split(3), batch.image[32:].split(3))):
            assert own[g] in shown and shown.tolist() == sorted(set(shown.tolist()) - {4}) and len(shown) == 3
            if triplets == "images":  # each row shows an image of its class
                assert torch.equal(LABELS[image], shown)
            else:  # all show the root
                assert image.tolist() == [batch.image[g].item()] * 3
            seen.add(tuple(shown.tolist()))
    assert seen == set(itertools.combinations(range(4), 3))
    assert len(drawn(B=2, triplet_part=0.01)[1].image) == 2 + 3  # one triplet at least


@pytest.mark.parametrize("balance, expected", [("data", [0.5, 0.3, 0.15, 0.05]), ("uniform", [0.25] * 4)])
def test_each_image_has_its_own_t_and_coin_and_classes_come_by_balance(balance, expected):
    counts, dropped, times = torch.zeros(4), [], set()
    for step in range(300):
        _, batch = drawn(step, 64, balance=balance, class_dropout=0.25)
        counts += LABELS[batch.image[:64]].bincount(minlength=4)
        dropped.append((batch.label[:64] == 4).double().mean().item())
        times |= set(batch.t.tolist())
    assert max_error(counts / 19_200, expected) < 0.015  # five standard errors
    assert abs(np.mean(dropped) - 0.25) < 0.02 and 0.04 < np.std(dropped) < 0.07  # binomial: 0.054
    assert times == set(range(1, 51))


@pytest.mark.parametrize("changes", [{}, {"triplets": "images"}, {"distance": "squared"}, {"ordinal": 0.0}])
def test_total_loss_is_equation_8(changes):
    """Against one image and one triplet at a time, with a model that is a formula."""
    direction, images = noise(5, 3, 8, 8, seed=7), noise(100, 3, 8, 8, seed=8)
    model = lambda x, t, c, root=None: 0.5 * x + direction[c] * (1 + t[:, None, None, None] / 50)
    power = 1.0 if "distance" in changes else 0.5  # d is the mean square, or its root
    d = lambda a, b: (a - b).square().mean().item() ** power
    for step in range(4):
        defaults = dict(ordinal=0.7, class_dropout=0.3, triplet_part=0.25)
        config, batch = drawn(step, 13, **(defaults | changes))
        alpha_bar, eps, x_0 = odm.alpha_bars(config), noise(13, 3, 8, 8, seed=50 + step), images[batch.image]
        estimates = []
        for row, root in enumerate(batch.root):
            t = batch.t[root]
            x_t = alpha_bar[t].sqrt() * x_0[row] + (1 - alpha_bar[t]).sqrt() * eps[root]
            estimates += model(x_t[None], t[None], batch.label[row][None])
        dm = np.mean([(eps[b] - estimates[b]).square().mean().item() for b in range(13)])
        terms = [0.0]
        if config.ordinal:
            triplets = (estimates[first : first + 3] for first in (13, 16, 19))
            losses = [(d(p, r) - d(p, q) - d(q, r)) ** 2 for p, q, r in triplets]
            terms = [config.ordinal * batch.t[g].item() / 50 * losses[g] for g in range(3)]
        found = odm.total_loss(model, x_0, eps, batch, alpha_bar, config)
        expected = [dm + np.mean(terms), dm, np.mean(terms)]
        assert torch.stack(found).tolist() == pytest.approx(expected, rel=1e-5)


# ------------------------------------------------------------------------------------- sampling


def falling(T, steps):
    return torch.linspace(T, 0, steps + 1).round().long().tolist()


class Gaussians:
    """The exact E[eps | x_t, c] where x_0 ~ N(means[c], std^2)."""

    def __init__(self, means, std, **changes):
        self.means, self.std, self.num_classes, self.times = means, std, len(means), []
        self.config, self.label = odm.Config(size=4, guidance=1.0, **changes), torch.nn.Embedding(1, 1)

    def __call__(self, x, t, c=0):
        self.times.append(t[0].item())
        a = ALPHA_BAR[t].to(x).view(-1, *[1] * (x.dim() - 1))
        return (1 - a).sqrt() * (x - a.sqrt() * self.means[c]) / (a * self.std**2 + 1 - a)


def test_sampling_starts_at_T_and_lands_on_the_clean_image():
    target = torch.arange(48, dtype=torch.uint8).view(1, 3, 4, 4) * 5
    for steps in (1, 7, 1000):
        model = Gaussians(odm.to_unit(target), 0.0, sample_steps=steps)
        assert torch.equal(odm.sample_images(model, [0.0], [(0, 0)]), target)
        assert model.times == falling(1000, steps)[:-1]


def test_ddim_encodes_an_image_into_the_noise_that_draws_it_again():
    """A step back undoes the step forth but for where the noise is asked: the error falls with the steps."""
    x_0, errors = noise(500, 1, dtype=torch.float64) * 0.2 + 0.3, []
    model = Gaussians(torch.tensor([0.3]), 0.2)
    for steps in (50, 250, 1000):
        times = falling(1000, steps)
        x_T = odm.ddim(model, x_0, ALPHA_BAR, times[::-1], clip=False)
        errors.append(max_error(odm.ddim(model, x_T, ALPHA_BAR, times, clip=False), x_0))
    assert abs(x_T.mean().item()) < 0.1 and abs(x_T.std().item() - 1) < 0.1
    assert errors[0] > 3 * errors[1] > 9 * errors[2] and errors[2] < 0.01
    with pytest.raises(ValueError, match="clip = False"):
        odm.ddim(model, x_0, ALPHA_BAR, times[::-1])


def test_ancestral_sampling_is_equation_2_with_the_variance_of_the_posterior():
    alpha_bar, seen = odm.alpha_bars(odm.Config(timesteps=30)), []
    eps_fn = lambda x, t: seen.append((x, t[0].item())) or torch.sin(3 * x)
    x_T = noise(2, 3, dtype=torch.float64)
    odm.ddim(eps_fn, x_T, alpha_bar, falling(30, 30), eta=1.0, clip=False, noise=torch.ones_like)
    assert [t for _, t in seen] == list(range(30, 0, -1))
    for (x_t, t), (x_next, _) in zip(seen[:-1], seen[1:]):
        beta = (0.02 - 1e-4) * (t - 1) / 29 + 1e-4
        mean = (x_t - beta / (1 - alpha_bar[t]).sqrt() * torch.sin(3 * x_t)) / math.sqrt(1 - beta)
        sigma = (beta * (1 - alpha_bar[t - 1]) / (1 - alpha_bar[t])).sqrt()
        assert max_error(x_next, mean + sigma) < 1e-9


def test_guidance_and_a_position_between_two_classes():
    rows = []
    model = lambda x, t, c: rows.append(len(c)) or 0.1 * x + (c**2 + 0.01 * t)[:, None, None, None]
    model.num_classes = 4
    x, t, position = noise(3, 3, 4, 4), torch.tensor([10, 20, 30]), torch.tensor([1.0, 3.0, 1.25])
    eps = lambda *c: model(x, t, torch.tensor(c))
    eps_c, null = 0.75 * eps(1, 3, 1) + 0.25 * eps(1, 3, 2), eps(4, 4, 4)
    for s, evaluated in ((0.0, 3), (1.0, 4), (1 + 1e-6, 7), (2.0, 7)):  # no jump at the neutral scale
        assert max_error(odm.guided_eps(model, position, s)(x, t), null + s * (eps_c - null)) < 1e-5
        assert rows[-1] == evaluated


# -------------------------------------------------------------------------- data/beyond/line.py


def test_read_position_is_the_best_of_a_grid():
    """Of all mixes of neighbours, of which 301 are tried here, for a model whose estimates are no line."""
    direction, x_0 = noise(4, 3, 6, 6, seed=3), noise(5, 3, 6, 6, seed=4)
    model = lambda x, t, c: 0.6 * x + 0.3 * direction[c] * x.square()
    model.num_classes = 4
    grid, loss, rng = torch.linspace(0, 3, 301), torch.zeros(5, 301), torch.Generator().manual_seed(0)
    for share in (0.1, 0.6):
        t, eps, errors = torch.full((5,), round(1000 * share)), torch.randn(1, 3, 6, 6, generator=rng), 0
        for sign in (1, -1):
            x_t = odm.q_sample(x_0, t, sign * eps, ALPHA_BAR)
            estimates = [odm.guided_eps(model, position.expand(5), 1.0)(x_t, t) for position in grid]
            errors = errors + torch.stack([odm.dm_loss(sign * eps, estimate) for estimate in estimates], 1)
        loss += errors / errors[:, ::100].mean(1, keepdim=True).sqrt()  # as each t weighs
    found = line.read_position(model, x_0, ALPHA_BAR, parts=(0.1, 0.6))
    assert max_error(found, grid[loss.argmin(1)]) < 0.006 and found.unique().numel() > 3


def test_read_position_of_gaussians_on_a_line_is_the_projection():
    """Class c: N(m + c v, s^2). What x_0 has beside the line, and eps, used with its mirror, do not count."""
    m, v = noise(1, 3, 4, 4, seed=1), noise(1, 3, 4, 4, seed=2)
    x_0 = m + torch.tensor([-1.0, 0.4, 1.7, 3.0, 5.0]).view(-1, 1, 1, 1) * v + noise(5, 3, 4, 4, seed=3)
    projection = ((x_0 - m) * v).flatten(1).sum(1) / v.square().sum()
    model = Gaussians(m + torch.arange(4).view(-1, 1, 1, 1) * v, 0.5)
    assert max_error(line.read_position(model, x_0, ALPHA_BAR), projection.clamp(0, 3)) < 1e-4
    model.means = m.expand(4, -1, -1, -1)  # classes that coincide
    assert line.read_position(model, x_0, ALPHA_BAR).tolist() == [0] * 5


@pytest.fixture(scope="module")
def fresh(tmp_path_factory):
    """Synthetic frames that demo.pt has not seen, one of each grade in four folders, and their severities."""
    root, severities = tmp_path_factory.mktemp("fresh"), []
    for i, grade in itertools.product(range(4), range(4)):
        file = root / f"patient {i}" / f"Mayo {grade}" / "a.png"
        file.parent.mkdir(parents=True)
        severity, rng = demo.scene(99, grade, i)
        Image.fromarray(demo.draw(severity, rng)).save(file)
        severities.append(severity)
    return root, severities


def rows_of(capsys, *argv):
    """The rows that `line.py read` writes to standard output, and what it says on standard error."""
    capsys.readouterr()
    assert line.main(["read", *map(str, argv)]) == 0
    said = capsys.readouterr()
    assert said.out.startswith("file,severity,grade,given")
    return list(csv.DictReader(said.out.splitlines())), said.err


def test_read_finds_the_severity_of_fresh_frames(fresh, tmp_path, capsys):
    root, truth = fresh
    rows, said = rows_of(capsys, root, "--checkpoint", DEMO)
    read = np.array([float(row["severity"]) for row in rows])
    assert np.corrcoef(read, truth)[0, 1] > 0.95 and np.abs(read - truth).mean() < 0.2
    assert [row["given"] for row in rows] == [f"Mayo {g}" for g in range(4)] * 4
    assert all(abs(int(row["grade"][5:]) - s) <= 0.501 for row, s in zip(rows, read))  # the nearest
    given, nearest = np.arange(16) % 4, np.array([int(row["grade"][5:]) for row in rows])
    by_chance = np.mean([(a - b) ** 2 for a in given for b in nearest])
    kappa, error = 1 - np.mean((given - nearest) ** 2) / by_chance, np.abs(read - given).mean()
    assert f"16 images, quadratic kappa {kappa:.3f}" in said
    assert abs(float(re.search(r"mean error ([.\d]+)", said)[1]) - error) < 0.0011
    for g in range(4):
        counts = ", ".join(f"{(nearest[given == g] == other).sum()} as Mayo {other}" for other in range(4))
        assert f"given Mayo {g}: read {counts}; mean severity read {read[given == g].mean():.2f}" in said
    one, loose = root / "patient 2" / "Mayo 3" / "a.png", tmp_path / "x.jfif"  # read all the same
    loose.write_bytes(one.read_bytes())
    rows, said = rows_of(capsys, one, loose, "--checkpoint", DEMO)  # read as in other company
    assert all(abs(float(row["severity"]) - read[11]) < 0.002 for row in rows)
    assert [row["given"] for row in rows] == ["", ""] and "2 of 2 images have no given grade" in said


def test_given_grades_come_from_what_was_named_and_below_it(run, tmp_path, capsys):
    names = ["unknown/a.png", "unknown/Mayo 0/b.png", "unknown/Mayo 0/Mayo 1/scan/c.png"]
    for seed, name in enumerate(names):
        write_image(tmp_path / "Mayo 2" / name, seed)
    (tmp_path / "Mayo 2" / "notes.txt").write_text("none")
    below = {"a.png": "", "b.png": "Mayo 0", "c.png": ""}  # where two are named, neither counts
    for named, expected in {"Mayo 2": {**below, "a.png": "Mayo 2", "b.png": ""}, "Mayo 2/unknown": below,
                            "Mayo 2/unknown/a.png": {"a.png": ""}}.items():
        rows, said = rows_of(capsys, tmp_path / named, "--checkpoint", run)
        assert {Path(row["file"]).name: row["given"] for row in rows} == expected, named
        assert ("3 images in 4 files" in said) == (named == "Mayo 2")
    table = tmp_path / "Mayo 2" / "grades.csv"  # grades of a CSV that is named; others are not looked at
    table.write_text("image,level\nc,Mayo 9\nb,Mayo 3\na,Mayo 1\n")
    rows, said = rows_of(capsys, table, "--checkpoint", run)
    assert {Path(row["file"]).stem: row["given"] for row in rows} == {"a": "Mayo 1", "b": "Mayo 3", "c": ""}
    assert "1 of 3 images have no given grade" in said
    table.write_text(table.read_text().replace("image,level", "file,score"))
    assert rows_of(capsys, table, "--checkpoint", run, "--columns", "file,score")[0] == rows


def test_moved_frames_are_near_their_truth(fresh, tmp_path):
    """A scene can be drawn at any severity: a moved frame is nearer to that than the given one."""
    given, out = fresh[0] / "patient 1", tmp_path / "moved"
    network = odm.load_network(DEMO, "cpu", sample_steps=15)
    assert line.move(network, [given], severity="0:2:1", out=out) == out
    rms = lambda file, truth: np.square(odm.read_square(file, 32).numpy() - truth).mean() ** 0.5
    for target in range(3):
        moved, unmoved = [], []
        for grade in {0, 1, 2, 3} - {target}:
            truth = 1.0 * demo.draw(target, demo.scene(99, grade, 1)[1], 32).transpose(2, 0, 1)
            moved.append(rms(out / f"Mayo {target}" / f"Mayo {grade}-a.png", truth))
            unmoved.append(rms(given / f"Mayo {grade}" / "a.png", truth))
        assert np.mean(moved) < 0.85 * np.mean(unmoved), target
    with Image.open(out / "series.gif") as series:
        assert series.n_frames == 4  # 0, 1, 2, 1


def test_an_image_sampled_at_its_own_severity_comes_back(fresh, tmp_path, capsys):
    file, out = fresh[0] / "patient 1" / "Mayo 2" / "a.png", tmp_path / "moved"
    argv = [file, "--class", "2", "--at", "2", "--checkpoint", DEMO, "--out", out]
    assert line.main(["move", *map(str, argv)]) == 0
    error = odm.read_square(out / "Mayo 2" / "a.png", 32).float() - odm.read_square(file, 32)
    assert error.square().mean().sqrt() < 8  # grey levels
    other = fresh[0] / "patient 2" / "Mayo 2" / "a.png"
    assert "other settings" in error_of(capsys, line.main, "move", other, *argv[1:])


def test_line_refuses_what_it_does_not_understand(run, graded, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    for name in ("twins/a.png", "twins/a.bmp"):
        write_image(tmp_path / name, 0)
    net = ["--checkpoint", run]
    for expected, argv in {
        "--at 9": ["move", graded, "--at", "9", *net],
        "--at 0:2:1: name one severity": ["move", graded, "--at", "0:2:1", *net],
        "two images would get this name": ["move", "twins", *net],
        "only with move": ["read", graded, "--at", "1", *net],
        "absent.png": ["read", "absent.png", *net],
        "empty: no images in it": ["read", graded, "empty", *net],
        "absent.csv: no folder of images": ["read", "absent.csv", *net],
        "--batch: must be from 1": ["read", graded, "--batch", "0", *net],
        "--seed: must be from 0": ["read", graded, "--seed", str(2**63), *net],
    }.items():
        assert expected in error_of(capsys, line.main, *argv), expected


# ---------------------------------------------------------------------------------------- U-Net


def test_unet_is_the_published_one():
    model, sides = odm.UNet(odm.Config(), 4), []
    assert sum(p.numel() for p in model.parameters()) - model.label.weight.numel() == 35_746_307
    assert {m.num_groups for m in model.modules() if isinstance(m, torch.nn.GroupNorm)} == {32}
    for module in model.modules():
        if isinstance(module, odm.Attention):
            module.register_forward_hook(lambda m, args, out: sides.append(out.shape[-1]))
    with torch.no_grad():
        first = model(noise(1, 3, 64, 64), torch.tensor([1]), torch.tensor([0]))
    assert sides == [16, 16, 8, 16, 16, 16]  # 2 on the way down, the middle, 3 on the way up
    assert 0 < first.abs().max() < 1e-3


def test_downsampling_pads_right_and_below_only():
    down = odm.UNet(settings(ch=4, groups=1), 4).down[1]
    down[1] = torch.nn.Conv2d(1, 1, 3, stride=2, bias=False)
    corners = torch.tensor([[1.0, 0, 0], [0, 0, 0], [0, 0, 100]])  # of each 3x3 window
    down[1].weight.data = corners.view(1, 1, 3, 3)
    assert down(torch.arange(16.0).view(1, 1, 4, 4)).flatten().tolist() == [1000, 2, 8, 10]


def test_time_embedding():
    e = odm.time_embedding(torch.tensor([7]), 6)[0]
    expected = [f(7 * math.exp(-i * math.log(10000) / 2)) for f in (math.sin, math.cos) for i in range(3)]
    assert max_error(e, expected) < 1e-5


def test_the_rows_of_a_root_share_their_dropout_mask():
    torch.manual_seed(0)
    drop, h, root = odm.Dropout(0.3), torch.ones(3, 4, 50, 50), torch.tensor([0, 1, 1])
    out = drop(h, root)
    assert torch.equal(out[1], out[2]) and not torch.equal(out[0], out[1])
    assert abs((out == 0).float().mean().item() - 0.3) < 0.02 and max_error(out[out > 0], 1 / 0.7) < 1e-6


# ------------------------------------------------------------------------------------- training


def test_learning_rate_and_averaged_weights_in_closed_form():
    """After step n = 1, 2, ... of training itself, with m = min(ema, (n + 1) / (n + 10))."""
    config = settings(ema=0.4, lr=0.01, steps=8, decay=0.5)
    model, images = odm.UNet(config, 4), torch.randint(0, 256, (100, 3, 8, 8), dtype=torch.uint8)
    ema, optimizer = odm.UNet(config, 4), torch.optim.Adam(model.parameters())
    weights = lambda network: torch.nn.utils.parameters_to_vector(network.parameters()).detach()
    expected, alpha_bar, rates = weights(ema), odm.alpha_bars(config), []
    for step in range(8):
        odm.training_step(model, ema, optimizer, images, drawn(step)[1], alpha_bar, config, step)
        rates.append(optimizer.param_groups[0]["lr"] / 0.01)
        m = min(0.4, (2 + step) / (11 + step))
        expected = m * expected + (1 - m) * weights(model)
    assert max_error(expected, weights(ema)) < 1e-6
    assert rates == pytest.approx([0.5, 1, 1, 1, 1, 0.75, 0.5, 0.25])  # 2 steps rise, the last half falls


def test_a_step_mirrors_images_and_clips_gradients():
    class Recorder(torch.nn.Linear):
        """Of no noise at all, x_t is x_0."""

        def forward(self, x_t, t, c, root):
            self.seen = x_t
            return 1000 * self.weight * x_t

    model, images = Recorder(1, 1, bias=False), torch.randint(0, 256, (100, 3, 8, 8), dtype=torch.uint8)
    config, batch = drawn(flip=True, ordinal=1.0)
    assert 0 < batch.flip.sum() < 8
    optimizer = torch.optim.Adam(model.parameters())
    losses = odm.training_step(model, Recorder(1, 1, bias=False), optimizer, images, batch,
                               torch.ones(config.timesteps + 1), config, 0)
    for image, root, seen in zip(batch.image, batch.root, model.seen):
        x_0 = odm.to_unit(images[image])
        assert torch.equal(seen, x_0.flip(-1) if batch.flip[root] else x_0)
    assert losses[3] > 1 and model.weight.grad.norm().item() == pytest.approx(1, abs=1e-4)


def assert_same_run(one, other):
    for part in ("model", "ema", "optimizer"):
        torch.testing.assert_close(state_of(one)[part], state_of(other)[part], rtol=0, atol=0)
    for file in ("metrics.csv", "sheet.png"):
        assert (one / file).read_bytes() == (other / file).read_bytes()


def test_killed_training_ends_as_if_undisturbed(graded, tmp_path):
    changes = dict(dropout=0.1, steps=40, log_every=3, save_every=5)
    whole, killed = odm.train(settings(graded, tmp_path / "whole", **changes)), tmp_path / "killed"
    process = command(HERE / "odm.py", *train_flags(**changes, data=graded, out=killed))
    while not (killed / "checkpoint.pt").exists() and process.poll() is None:
        time.sleep(0.01)
    process.kill()
    process.communicate(timeout=60)
    assert 0 < (step := state_of(killed)["step"]) < 30
    for steps in (step, 30, 40):  # resumed twice
        odm.train(settings(graded, killed, **changes | dict(steps=steps)))
    assert_same_run(whole, killed)
    assert metrics_of(whole)["step"].tolist() == [n for n in range(1, 41) if n % 3 == 0 or n % 5 == 0]


def test_init_starts_from_another_runs_averaged_weights(run, graded, tmp_path):
    other = write_images(tmp_path / "other", {"0": 3, "1": 3, "2": 3})
    start = state_of(run)["ema"]
    for data, classes in ((graded, 4), (other, 3)):  # as many classes, and others
        out = odm.train(settings(data, tmp_path / f"to {classes}", lr=0.0, init=str(run)))
        weights = state_of(out)["model"]
        differing = {name for name in start if not torch.equal(start[name], weights[name])}
        assert differing == (set() if classes == 4 else {"label.weight"})


def test_more_steps_after_a_decay_take_init(graded, tmp_path, capsys):
    odm.train(settings(graded, tmp_path / "a", steps=4, decay=0.5))
    argv = train_flags(data=graded, decay=0.5, steps=8)
    assert "go on with --init" in error_of(capsys, odm.main, *argv, "--out", tmp_path / "a")
    assert odm.main([*argv, "--out", str(tmp_path / "b"), "--init", str(tmp_path / "a")]) == 0


def test_a_row_is_the_mean_of_the_losses_since_the_one_before(graded, tmp_path, monkeypatch):
    seen, step = [], odm.training_step
    monkeypatch.setattr(odm, "training_step", lambda *args: seen.append(step(*args)) or seen[-1])
    odm.train(settings(graded, tmp_path, steps=7, log_every=3, save_every=5))
    rows = metrics_of(tmp_path)
    assert rows["step"].tolist() == [3, 5, 6, 7]
    for row, of in zip(rows, (seen[:3], seen[3:5], seen[5:6], seen[6:])):
        expected = torch.stack(of).mean(0)
        assert max_error([row[name] for name in ("loss", "dm", "ordinal", "grad_norm")], expected) < 1e-6


def test_held_out_is_the_loss_on_unseen_images(graded, tmp_path):
    unseen = write_images(tmp_path / "unseen", {f"Mayo {c}": 40 - 37 * (c == 0) for c in range(4)}, 1)
    changes = dict(lr=0.01, ema=0.5, log_every=50, save_every=50)
    out = odm.train(settings(graded, tmp_path / "run", held_out=str(unseen), steps=50, **changes))

    # The last row by a loop: images of all classes alike, at t from 1 to T, eps of one generator.
    model = odm.load_network(out, "cpu").model
    images, labels, _ = odm.load_images(unseen, 8)
    weights = 1 / labels.bincount()[labels]
    chosen = weights.multinomial(64, generator=torch.Generator().manual_seed(0))
    assert (labels[chosen].bincount() - torch.tensor([3, 20, 20, 20])).abs().max() < 6
    eps = torch.randn(64, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    alpha_bar, losses = odm.alpha_bars(settings()), []
    for n, i in enumerate(chosen):
        t = round(1 + n * 49 / 63)
        x_t = alpha_bar[t].sqrt() * odm.to_unit(images[i]) + (1 - alpha_bar[t]).sqrt() * eps[n]
        with torch.no_grad():
            estimate = model(x_t[None].float(), torch.tensor([t]), labels[i][None])
        losses.append((estimate[0] - eps[n]).square().mean().item())
    assert np.mean(losses) == pytest.approx(float(metrics_of(out)["held_out"]), rel=1e-4)
    moved = str(unseen.rename(tmp_path / "moved"))
    odm.train(settings(graded, out, held_out=moved, steps=51, **changes))  # no other settings
    write_image(tmp_path / "moved" / "Mayo 0" / "other.png", 5)
    with pytest.raises(odm.UserError, match="--held-out"):
        odm.train(settings(graded, out, held_out=moved, steps=52, **changes))
    assert "held_out" not in (odm.train(settings(graded, tmp_path / "b")) / "metrics.csv").read_text()


def test_held_out_images_are_others_of_the_same_classes(graded, tmp_path, capsys):
    twins = write_images(tmp_path / "twins", {f"Mayo {c}": 2 for c in range(4)}, seed=9)
    image = (graded / "Mayo 2" / "Mayo2_1.png").read_bytes()
    (twins / "Mayo 2" / "renamed.png").write_bytes(image)
    fewer = write_images(tmp_path / "fewer", {"Mayo 0": 2, "Mayo 1": 2})
    for expected, held_out in (("1 of its 9 images are also among", twins),
                               ("classes ['Mayo 0', 'Mayo 1'], but --data has", fewer)):
        argv = train_flags(data=graded, out=tmp_path / "run", held_out=held_out)
        assert expected in error_of(capsys, odm.main, *argv)


def test_training_learns_and_the_ordinal_loss_straightens(tmp_path):
    """The point of it all, on 8 images: with a heavy W estimates come to lie on a line; without, not."""
    data, straight = write_images(tmp_path / "data", {"0": 2, "1": 2, "2": 2, "3": 2}, sides=(8, 8)), []
    for weight in (0.0, 30.0):
        changes = dict(ch=16, steps=120, lr=3e-3, ema=0.9, log_every=10, save_every=120)
        out = odm.train(settings(data, tmp_path / f"{weight}", ordinal=weight, flip=False, **changes))
        rows = metrics_of(out)
        assert rows["dm"][0] > 0.9 and rows["dm"][-4:].mean() < 0.7
        straight.append(rows["straightness"][-1])
    assert straight[1] > straight[0] + 0.1


def test_a_run_that_fails_keeps_its_last_checkpoint(graded, tmp_path, capsys, monkeypatch):
    def full(state, file):  # the disk fills up while it writes
        file.write(b"half a checkpoint")
        raise OSError(28, "No space left on device")

    diverged = lambda eps, eps_hat: eps_hat.flatten(1).mean(1) * math.nan
    odm.train(settings(graded, tmp_path, steps=2))
    before, names = (tmp_path / "checkpoint.pt").read_bytes(), sorted(tmp_path.iterdir())
    for owner, name, failing, expected in (
        (odm, "dm_loss", diverged, "step 4: the loss is not finite"),
        (torch, "save", full, "free some space"),
        (odm, "total_loss", lambda *_: torch.zeros(2**46), "lower --batch"),  # 256 TiB
    ):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, failing)
            assert expected in error_of(capsys, odm.main, *train_flags(data=graded, out=tmp_path)), expected
        assert (tmp_path / "checkpoint.pt").read_bytes() == before and sorted(tmp_path.iterdir()) == names


@pytest.mark.parametrize("number, tee_ended", [(signal.SIGINT, False), (signal.SIGTERM, False),
                                               (signal.SIGINT, True)])
def test_stop_signals_save_and_say_how_to_go_on(graded, tmp_path, number, tee_ended):
    argv = train_flags(steps=100_000, save_every=100_000, data=graded, out="a b/\u00e9")
    process = command(HERE / "odm.py", *argv, cwd=tmp_path)
    while "steps" not in process.stdout.readline() and process.poll() is None:
        pass
    if tee_ended:  # by the same Ctrl-C
        process.stdout.close()
    process.send_signal(number)
    said, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + number and errors == ""
    step = state_of(tmp_path / "a b" / "\u00e9")["step"]
    assert tee_ended or f"stopped and saved at step {step:,}; the same command goes on" in said
    assert np.atleast_1d(metrics_of(tmp_path / "a b" / "\u00e9"))["step"][-1] == step


def test_two_processes(graded, tmp_path):
    """They train one network, sample the files that one samples, and say an error once."""
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    changes = dict(dropout=0.1, lr=0.01, warmup=100, log_every=1)
    (tmp_path / "both.py").write_text(f"""
import sys
sys.path.insert(0, {str(HERE)!r})
import odm
settings = {dict(TINY, data=str(graded), **changes)}
for out, steps in (("whole", 4), ("parts", 2), ("parts", 4)):
    odm.train(odm.Config(**dict(settings, out=out, steps=steps)))
odm.sample("whole", n=20, batch=4, out="two")
assert odm.main(["train", "--data", "absent"]) == 2
odm.dist.destroy_process_group()
""")
    process = command(*launch, "both.py", cwd=tmp_path)
    said, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert said.count("trained to step 4") == 2 and said.count("20 images are in") == 1, errors
    assert errors.count("odm.py: error: absent") == 1, errors
    assert_same_run(tmp_path / "whole", tmp_path / "parts")

    # Losses and gradient of the first step are the means of those that each process would have alone.
    config = settings(dropout=0.1)
    images, labels, _ = odm.load_images(graded, 8)
    torch.manual_seed(odm.seed_of("weights", 0))
    model, alpha_bar, found = odm.UNet(config, 4).train(), odm.alpha_bars(config), []
    for rank in (0, 1):
        rng = torch.Generator().manual_seed(odm.seed_of("batch", 0, 0, rank))
        batch = odm.draw_batch(labels, 4, config, 4, rng)
        torch.manual_seed(odm.seed_of("eps", 0, 0, rank))
        x_0 = odm.to_unit(images[batch.image])
        x_0 = torch.where(batch.flip[batch.root].view(-1, 1, 1, 1), x_0.flip(-1), x_0)
        eps = torch.randn(4, 3, 8, 8)
        found.append(torch.stack(odm.total_loss(model, x_0, eps, batch, alpha_bar, config)))
    losses = (found[0] + found[1]) / 2
    losses[0].backward()
    grad_norm = torch.cat([p.grad.flatten() for p in model.parameters()]).norm()
    row = metrics_of(tmp_path / "whole")[0]
    expected = [row[name] for name in ("loss", "dm", "ordinal", "grad_norm")]
    assert max_error([*losses.tolist(), grad_norm], expected) < 1e-5

    odm.sample(tmp_path / "whole", n=20, batch=4, out=tmp_path / "one")
    one = pictures(tmp_path / "one")
    assert len(one) == 21 and one == pictures(tmp_path / "two")  # 21: and the sheet
    argv = train_flags(data=graded, out=HERE / "odm.py")  # where only the first process can know
    _, errors = command(*launch, HERE / "odm.py", *argv).communicate(timeout=120)
    ours = f'File "{HERE}'  # a traceback's line, which torchrun's own have too
    assert errors.count("odm.py: error:") == 1 and ours not in errors, errors


# ----------------------------------------------------------------------------------------- data


def tree(root, files):
    """A folder with random images, named in a list with | between; returns root."""
    for seed, file in enumerate(files.split("|")):
        if file.endswith((".png", ".bmp", ".jpg", ".PNG")):
            write_image(root / file, seed)
        elif file:
            (root / file).parent.mkdir(parents=True, exist_ok=True)
            (root / file).touch()
    return root


FIVE = "000.png|001.png|002.png|003.png|004.png"
ROWS = "000,0 001,0 002,1 003,2 004,2"


def table(rows=ROWS, header="image,level", encoding="utf-8"):
    return "\n".join([header, *rows.split(" "), ""]).encode(encoding)


# What it is; the files; the CSV t.csv; flags of train; the line that train prints, or ! and its error.
INPUTS = [
    ("numbers rank", "KL 10/a.png|KL 9/a.png|KL 2/a.png", "", "", "KL 2 1, KL 9 1, KL 10 1"),
    ("numbers as a whole", "-2/a.png|-.5/a.png|0.5/a.png", "", "", "-2 1, -.5 1, 0.5 1"),
    ("a hyphen is no minus", "KL-0/a.png|KL-1/a.png|KL-2/a.png", "", "", "KL-0 1, KL-1 1, KL-2 1"),
    ("a dot is no point", "KL.9/a.png|KL.10/a.png", "", "", "KL.9 1, KL.10 1"),
    ("splits", "train/0/a.png|test/0/a.png|train/1/a.png|b.png", "", "",
     "0 2, 1 1; 1 images without a class, as b.png"),
    ("names", "mild/a.png|severe/a.png|x/mild/b.png|other/c.png", "", "--order=mild,severe",
     "mild 2, severe 1; 1 images without a class, as other/c.png"),
    ("names without order", "mild/a.png|severe/a.png", "", "",
     "!mild, severe: not two or more classes in a plain order"),
    ("a mistyped order", "mild/a.png|severe/a.png", "", "--order=mild,grave",
     "!--order mild,grave must name each class once, of mild, severe"),
    ("a name twice", "a/a.png|b/a.png", "", "--order=a,b,a", "!must name each class once"),
    ("classes on two levels", "0/1/a.png|1/2/a.png|2/0/a.png", "", "--order=0,1,2",
     "!0/1/a.png: below folders of two classes, 0, 1; rename"),
    ("folders below classes", "0/left/a.png|1/left/a.png|1/right/b.png", "", "--order=0,1", "0 1, 1 2"),
    ("accents of a Mac", "de\u0301but/a.png|fin/a.png", "", "--order=d\u00e9but,fin",
     "d\u00e9but 1, fin 1"),
    ("two levels", "KL 0/visit 1/a.png|KL 1/visit 2/a.png", "", "",
     "!numbered folders on two levels, visit 1, visit 2 below KL 0, KL 1"),
    ("many patients above", "|".join(f"{n}/Mayo {n % 3}/a.bmp" for n in range(40)), "", "",
     "Mayo 0 14, Mayo 1 13, Mayo 2 13"),
    ("many patients below", "|".join(f"{c}/patient {n}/a.png" for n in range(15) for c in "ab"), "", "",
     "!15 folders or grades, patient 0,"),
    ("other suffixes", "0/a.png|1/a.png|2/a.jfif|2/b.jfif|3/a.dcm", "", "",
     "0 1, 1 1; files not read: .jfif 2, .dcm 1"),
    ("no suffix", "0/a.png|1/a.png|1/IM0001|1/IM0002", "", "", "0 1, 1 1; files not read: without suffix 2"),
    ("another checkpoint.pt", "0/a.png|1/a.png|1/checkpoint.pt|.hidden/4/a.png", "", "",
     "0 1, 1 1; files not read: .pt 1"),
    ("decimals", FIVE, table("000;2,50 001;2.5 002;02 003;.5 004;-1", "image;level"), "t.csv",
     "-1 1, 0.5 1, 2 1, 2.5 2"),
    ("an unquoted comma", FIVE, table("000,0,5 001,1 002,2,"), "t.csv", "!000,0,5: more values than columns"),
    ("a stray quote", FIVE, b'image,level,note\n000,0,"a\n001,1,"b" c\n', "t.csv", "!t.csv: not readable"),
    ("line ends of old", FIVE, table().replace(b"\n", b"\r"), "t.csv", "0 2, 1 1, 2 2"),
    ("a column twice", FIVE, table("000,1,2", "image,level,level"), "t.csv", "!no columns image,level or"),
    ("a CSV that is not named", "0/000.png|1/001.png", table(), "", "0 1, 1 1; files not read: .csv 1"),
    ("no classes but a CSV", FIVE, table(), "", "!or name a CSV of grades, as --data FILE.csv"),
    ("a CSV", FIVE.replace("000", "x/000") + "|unlisted.png", table(), "t.csv",
     "0 2, 1 1, 2 2; 1 images without a class, as unlisted.png"),
    ("other columns", FIVE + "|e.json", table(header="Path, Mayo Score "), "t.csv|--columns=path,mayo score",
     "0 2, 1 1, 2 2; files not read: .json 1"),
    ("tabs, UTF-16, capitals", FIVE,
     table(ROWS.replace(",", "\t"), " ID_code\t Diagnosis", "utf-16"), "t.csv", "0 2, 1 1, 2 2"),
    ("IDs in other forms", "a/000.png|a/B.PNG|b/cc.jpg|d.bmp|e.1.png",
     table("000.jpeg,0 b,0 b\\CC.JPG,1 images/D.png,2 e.1,2.0"), "t.csv", "0 2, 1 1, 2 2"),
    ("an order leaves out", FIVE, table("000,-1 001,0 002,NA 003,1 004,"), "t.csv|--order=-1,0,1",
     "-1 1, 0 1, 1 1; 2 images without a class, as 002.png"),
    ("IDs without an image", FIVE[:23], table(), "t.csv",
     "0 2, 1 1; 2 rows of the CSV without an image, as 003"),
    ("an ID in two folders", "train/000.png|test/000.png", table(), "t.csv",
     "!000 fits .*test/000.png and .*train/000.png; put the CSV above one"),
    ("told apart by folders", "train/a.png|test/a.png", table("train/a,0 test/a,1"), "t.csv", "0 1, 1 1"),
    ("another folder", "test/a.png|test/b.png", table("train/a,0 train/b,1"), "t.csv",
     "!an ID is train/a, an image a"),
    ("a name and its suffix", "a.png|a.jpg|b.jpg", table("a.jpg,0 b.jpg,1"), "t.csv",
     "0 1, 1 1; 1 images without a class, as a.png"),
    ("no such column", FIVE, table(), "t.csv|--columns=image,grade",
     "!no columns image,grade, but image, level; name two"),
    ("a second grade", FIVE, table(ROWS + " 000.png,1"), "t.csv", "!000.png a second grade"),
    ("a quote without end", FIVE, b'image,level\n"' + 200_000 * b"x", "t.csv", "!t.csv: not readable as"),
    ("an empty CSV", FIVE, b"\n", "t.csv", "!t.csv: no columns"),
    ("no image", "a.jfif", table(), "t.csv", "!data holds no images .*.jfif 1"),
    ("one class", "0/a.png|0/b.png", "", "", "!1 folders or grades, 0: not two or more classes"),
]


@pytest.mark.parametrize("files, content, flags, expected", [row[1:] for row in INPUTS],
                         ids=[row[0] for row in INPUTS])
def test_classes_are_found_or_refused(files, content, flags, expected, tmp_path, capsys):
    data = tree(tmp_path / "data", files)
    if content:
        (data / "t.csv").write_bytes(content)
    named = [flag for flag in flags.split("|") if flag.startswith("--")]
    given = data / "t.csv" if flags.startswith("t.csv") else data
    if expected.startswith("!"):
        error = error_of(capsys, odm.main, *train_flags(data=given, out=tmp_path / "run"), *named)
        assert re.search(expected[1:], error), error
    else:
        odm.find_images(given, **dict(flag[2:].split("=", 1) for flag in named))
        assert capsys.readouterr().out == f"{given}: {expected}\n"


def test_runs_and_samples_of_this_program_are_passed_over(tmp_path, capsys):
    tree(tmp_path, "0/a.png|1/a.png|runs/2/checkpoint.pt|runs/2/metrics.csv|runs/2/sheet.png|x/sample.json|"
         "x/3/a.png")
    odm.find_images(tmp_path)
    *passed, summary = capsys.readouterr().out.splitlines()
    assert summary == f"{tmp_path}: 0 1, 1 1" and sorted(passed) == [
        f"{tmp_path / name}: passed over, a run or samples of odm.py" for name in ("runs/2", "x")]
    assert [path.name for path in odm.list_files(tmp_path / "x")] == ["a.png", "sample.json"]


def test_linked_folders_are_read_and_loops_do_no_harm(tmp_path):
    data = write_images(tmp_path / "data", {"0": 2, "1": 2})
    (data / "5").symlink_to(write_images(tmp_path / "outside", {"5": 3}) / "5")
    (data / "0" / "loop").symlink_to(data)
    (data / "0" / "up").symlink_to(tmp_path)
    (data / "a second name").symlink_to(data / "1")
    _, labels, names = odm.find_images(data)
    assert names == ["0", "1", "5"] and labels == [0, 0, 1, 1, 2, 2, 2]
    (data / "1" / "dangling.png").symlink_to(tmp_path / "nothing")
    with pytest.raises(odm.UserError, match="dangling.png"):
        odm.load_images(data)


def test_crop_is_the_middle_128_of_a_frame_and_the_middle_square_of_others(tmp_path):
    def square(image, *args):
        image.save(tmp_path / "image.png")
        return odm.read_square(tmp_path / "image.png", *args)

    x, y = np.meshgrid(np.arange(352), np.arange(288))
    frame = Image.fromarray(np.stack([x % 256, y % 256, 0 * x], -1).astype(np.uint8))
    middle = square(frame, 128)
    assert middle[0, 0, [0, -1]].tolist() == [112, 239] and middle[1, [0, -1], 0].tolist() == [80, 207]
    for crop in (0, 128):  # more than there is: all of the middle square
        assert square(frame.crop((0, 0, 100, 60)), 60, crop)[0, 0].tolist() == list(range(20, 80))
    assert square(frame, 10, 10)[0, 0].tolist() == list(range(171, 181))
    checker = Image.fromarray((np.indices((64, 64)).sum(0) % 2 * 255).astype(np.uint8))
    assert (square(checker, 8)[:, 2:-2, 2:-2].float() - 127.5).abs().max() < 3  # antialiased


def test_pixels_are_read_right(tmp_path):
    def pixels(image, name, **options):
        image.save(tmp_path / name, **options)
        return np.asarray(odm.read_image(tmp_path / name))

    sixteen = Image.fromarray(np.array([[0, 32896, 65535]], np.uint16))
    assert pixels(sixteen, "sixteen.png").tolist() == [[[0] * 3, [128] * 3, [255] * 3]]
    cmyk = pixels(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "cmyk.jpg", quality=95)
    assert abs(cmyk - (255, 0, 0)).max() < 12
    turned, exif = Image.new("RGB", (4, 2), "white"), Image.Exif()
    turned.putpixel((0, 0), (255, 0, 0))
    exif[0x0112] = 6  # to be shown turned 90 degrees clockwise
    assert np.argwhere(pixels(turned, "turned.png", exif=exif) == 0).tolist() == [[0, 1, 1], [0, 1, 2]]
    for name, value in (("colours.png", 40000), ("dark.png", 4095)):  # which Pillow reads, but cannot write
        rgb = b"".join(b"\0" + np.full((2, 3), value, ">u2").tobytes() for _ in range(2))
        (tmp_path / name).write_bytes(png(b"IHDR", struct.pack(">IIBBBBB", 2, 2, 16, 2, 0, 0, 0)) + png(
            b"IDAT", zlib.compress(rgb)) + png(b"IEND", b""))
    assert np.asarray(odm.read_image(tmp_path / "colours.png")).tolist() == [[[156] * 3] * 2] * 2
    hidden = Image.new("RGBA", (2, 1), (200, 100, 50, 255))
    hidden.putpixel((1, 0), (200, 100, 50, 0))
    assert pixels(hidden, "hidden.png").tolist() == [[[200, 100, 50], [0, 0, 0]]]
    assert pixels(hidden.convert("LA"), "grey.png")[0, 1].tolist() == [0, 0, 0]
    Image.fromarray(np.full((2, 2), 1.5, np.float32)).save(tmp_path / "float.tif")
    Image.fromarray(np.array([[0, 4095]], np.uint16)).save(tmp_path / "twelve.png")
    turned.save(tmp_path / "stack.tif", save_all=True, append_images=[turned])
    sixteen.save(tmp_path / "negative.tif")
    content, black_is_0 = (tmp_path / "negative.tif").read_bytes(), struct.pack("<HHIH", 262, 3, 1, 1)
    (tmp_path / "negative.tif").write_bytes(content.replace(black_is_0, struct.pack("<HHIH", 262, 3, 1, 0)))
    for name, reason in {"float.tif": "32 bits", "twelve.png": "almost black", "dark.png": "almost black",
                         "stack.tif": "2 pictures in one file", "negative.tif": "white is 0"}.items():
        with pytest.raises(odm.UserError, match=f"{name}.*{reason}"):
            odm.read_image(tmp_path / name)
    profile = np.random.default_rng(0).bytes(3_000_000)
    assert pixels(turned, "profile.png", icc_profile=profile).shape == (2, 4, 3)


def png(kind: bytes, content: bytes) -> bytes:
    """A chunk of a PNG file; the first carries the file's signature."""
    chunk = struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
    return b"\x89PNG\r\n\x1a\n" * (kind == b"IHDR") + chunk


def test_hostile_images_are_read_or_named(tmp_path):
    """Cut, a bit turned, a stretch of zeros, another header: pixels, or one line with its name."""
    rng, contents = np.random.default_rng(0), []
    pixels = Image.fromarray(rng.integers(0, 256, (40, 48, 3), dtype=np.uint8))
    for name, image, options in (
        ("a.png", pixels, {}), ("b.jpg", pixels, {"progressive": True}), ("c.bmp", pixels, {}),
        ("d.tif", pixels, {"compression": "tiff_lzw"}), ("e.webp", pixels, {}), ("f.gif", pixels, {}),
        ("g.jpg", pixels.convert("CMYK"), {}), ("h.png", pixels.resize((1, 5000)), {}),
    ):
        image.save(tmp_path / name, **options)
        whole = (tmp_path / name).read_bytes()
        for _ in range(12):
            at, flipped, zeros, header = rng.integers(len(whole)), *map(bytearray, 3 * [whole])
            flipped[at] ^= 1 << rng.integers(8)
            zeros[at : at + 64] = bytes(64)
            header[rng.integers(40)] = rng.integers(256)  # where sizes are claimed
            contents += [whole[:at], flipped, zeros, header]
    read, refused = 0, []
    for i, content in enumerate([*contents, b"", b"text, no image", b"P6 60000 60000 255\n"]):
        file = tmp_path / f"{i}"
        file.write_bytes(content)
        try:
            image = odm.read_square(file, 16)
            assert image.shape == (3, 16, 16) and image.dtype == torch.uint8
            read += 1
        except odm.UserError as error:
            assert str(error).startswith(str(file))
            refused.append(str(error))
    assert read > 100 and len(refused) > 100
    assert "exceeds limit" in refused[-1]  # before it is unpacked
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < 4 * 2**20  # KiB


# --------------------------------------------------------------------------------- command line


def test_sample_folders_and_sheet(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    out = odm.sample(run, n=20)
    assert out == Path("samples/tiny-6")  # of the run, at its step: later ones go elsewhere
    assert [len(pictures(out / f"Mayo {g}")) for g in range(4)] == [9, 5, 3, 3]  # as in training
    before = pictures(out)
    (out / "Mayo 1" / "00002.png").unlink()
    times = {p: p.stat().st_mtime_ns for p in out.rglob("0*.png")}
    odm.sample(run, n=20)
    assert pictures(out) == before
    assert {p: p.stat().st_mtime_ns for p in times} == times  # what is there is not even written again
    with pytest.raises(odm.UserError, match="settings"):
        odm.sample(run, n=20, seed=1)
    series = odm.sample(run, "0:3:0.5", each=2)
    assert series == Path("samples/tiny-6-series")
    names = {p.name for p in series.iterdir() if p.is_dir()}
    assert names == {"0.5", "1.5", "2.5", "Mayo 0", "Mayo 1", "Mayo 2", "Mayo 3"}
    between = odm.sample(run, "0:1:0.5", n=21, out="between")  # 9 and 5 in training, 7 between them
    assert [len(pictures(between / name)) for name in ("Mayo 0", "0.5", "Mayo 1")] == [9, 7, 5]
    low, high = (odm.read_square(series / name / "00000.png", 8).int() for name in ("Mayo 0", "Mayo 3"))
    assert (low - high).abs().max() < 20  # a row is one noise; this network hardly knows its classes


def test_image_i_depends_on_seed_class_and_i_alone(run, tmp_path):
    def samples(name, *args, **kwargs):
        out = odm.sample(run, *args, out=tmp_path / name, eta=1.0, **kwargs)
        return [np.asarray(Image.open(out / "Mayo 2" / f"{i:05d}.png")).astype(int) for i in range(3)]

    few, many = samples("few", "2", n=3, batch=2), samples("many", "all", each=6, batch=5)
    assert np.abs(np.subtract(few, many)).max() <= 1  # the last bit may round the other way
    assert len({image.tobytes() for image in few}) == 3
    assert np.abs(np.subtract(few, samples("other", "2", n=3, seed=1))).max() > 20


def test_the_bundled_checkpoint_samples_rising_severity(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # no runs here
    out = odm.sample(severity="0:3:3", each=5, sample_steps=20)
    assert out == Path("samples/data-demo-4800-series") and DEMO.stat().st_size < 3e6
    for name, median in (("Mayo 0", 0.25), ("Mayo 3", 2.87)):  # of true frames
        images = [np.array(Image.open(p)).transpose(2, 0, 1) for p in (out / name).glob("*.png")]
        assert abs(np.median(demo.measure(np.stack(images))) - median) < 0.5


def test_the_leaves_of_the_other_bundled_checkpoint_sicken(tmp_path):
    how = dict(each=4, guidance=1.5, sample_steps=12, out=tmp_path / "leaves")
    out = odm.sample(HERE / "data" / "leaf.pt", severity="0:4:4", **how)
    healthy, sick = [severity.leaf_severity(odm.read_squares(sorted((out / c).iterdir()), size=64).numpy())
                     for c in "04"]
    assert np.median(healthy) < 0.02 and np.median(sick) > 0.05 and (sick > healthy).all()


def test_severities_on_the_command_line():
    parse = lambda text, names=("Mayo 1", "Mayo 2", "Mayo 3"): odm.parse_severities(text, list(names))
    assert parse("3") == {"Mayo 3": 2.0} and parse("Mayo 2") == {"Mayo 2": 1.0}
    assert parse("1:2:0.25") == {"Mayo 1": 0.0, "1.25": 0.25, "1.5": 0.5, "1.75": 0.75, "Mayo 2": 1.0}
    assert parse("all") == parse("1:3:1") == {"Mayo 1": 0.0, "Mayo 2": 1.0, "Mayo 3": 2.0}
    assert parse("1", ("0", "2")) == {"1": 0.5}  # between two classes, by their severities
    assert parse("-0.5", ("-1", "0", "1")) == {"-0.5": 0.5}
    assert parse("1", ("none", "mild", "grave")) == {"mild": 1.0}
    assert parse("0:2:1.5", ("2", "1", "0")) == {"0": 2.0, "1.5": 0.5}  # a scale on which 0 is the worst
    for wrong in ("0", "4", "Mayo 4", "1:2:0", "3:1:1", "1:2:3:4", "1:3", "nan", "", "1:nan:1", "1:3:1e-9"):
        with pytest.raises(odm.UserError, match="--class"):
            parse(wrong)


def test_bad_input_is_one_line_and_status_2(run, graded, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    broken = write_images(tmp_path / "broken", {"0": 1, "1": 1, "2": 1})
    (broken / "1" / "1_0.png").write_bytes(b"")
    foreign = write_images(tmp_path / "foreign", {f"Mayo {c}": 1 for c in range(4)}, seed=9)
    (foreign / "metrics.csv").write_text("epoch,loss\n")  # another program's
    (tmp_path / "file").write_text("")
    slash = tree(tmp_path / "slash", "a.png|b.png")
    (slash / "t.csv").write_bytes(table("a,0/3 b,1/3"))
    train, sample = train_flags(data=graded, out="x"), ["sample", "--checkpoint", run]
    for expected, argv in {
        "absent: no folder of images and no CSV": [*train, "--data", "absent"],
        "empty holds no images": [*train, "--data", "empty"],
        "1_0.png: not readable": [*train, "--data", broken],
        "--size 7": [*train, "--size", "7"],
        "--ch: must be a multiple of 4 and of --groups": [*train, "--groups", "3"],
        "--triplets: invalid choice": [*train, "--triplets", "A\nB"],
        "--triplet-part -1.0: must be from": [*train, "--triplet-part", "-1"],
        "--ema (there 0.9999, now 0.5)": [*train, "--out", run, "--ema", "0.5"],
        "--held-out (there none, now ": [*train, "--out", run, "--held-out", foreign],
        "metrics.csv: cannot be written": [*train, "--out", "file"],
        "foreign: holds other files": [*train, "--out", foreign],
        "--data (there": [*train, "--out", run, "--data", foreign],
        "has another --groups": [*train, "--groups", "4", "--init", run],
        "has another --beta-T": [*train, "--beta-T", "0.03", "--init", run],
        f"{run / 'checkpoint.pt'}: no whole checkpoint": [*train, "--ch", "16", "--init", run],
        "--columns image,level: names two columns": [*train, "--columns", "image,level"],
        "no columns score": [*train, "--data", slash / "t.csv", "--columns", "score"],
        "'0/3' cannot be the name of a folder": [*train, "--data", slash / "t.csv", "--order", "0/3,1/3"],
        "a severity from 0 to 3": [*sample, "--class", "4"],
        "none.pt: no whole checkpoint": ["sample", "--checkpoint", "none.pt"],
        "foreign: holds other files, or a sample.json": [*sample, "--out", foreign],
        "--class: expected one argument, or --flag=VALUE where": [*sample, "--class", "-1:1:1"],
        "-n, --each, --batch: numbers of images": [*sample, "--each", "1", "-n", "1"],
        "--each: must be from 1": [*sample, "--each", "-1"],
        "-n: must be from 1": [*sample, "-n", "0"],
        "--device nonsense:": [*sample, "--device", "nonsense"],
    }.items():
        assert expected in error_of(capsys, odm.main, *argv), expected
    assert len(list(foreign.rglob("*"))) == 9  # four folders, four images, the metrics and nothing else
    monkeypatch.setattr(odm, "WORLD", 2)
    assert "WORLD_SIZE is 2: " in error_of(capsys, odm.main, *train)


def test_metrics_that_were_lost_or_changed_come_back_from_the_checkpoint(graded, tmp_path):
    file = odm.train(settings(graded, tmp_path)) / "metrics.csv"
    whole = file.read_text()
    for damage in (lambda: file.write_text(whole.replace(",", ";")), file.unlink):
        damage()
        odm.train(settings(graded, tmp_path))  # nothing left to do
        assert file.read_text() == whole


def test_file_names_that_the_terminal_cannot_show(tmp_path):
    data = tree(tmp_path / "\u8178", "\u8efd/a.png|\u91cd/b.png|x.png")
    process = command(HERE / "odm.py", *train_flags(data=data, out=tmp_path / "run", steps=1),
                      "--order=\u8efd,\u91cd", env={**os.environ, "PYTHONIOENCODING": "ascii"})
    said, errors = process.communicate(timeout=60)
    assert process.returncode == 0 and errors == "" and "\\u8efd 1, \\u91cd 1" in said


def test_a_process_that_is_not_the_first_tells_of_its_own_memory(monkeypatch, capsys):
    monkeypatch.setattr(odm, "LOCAL_RANK", 1)
    monkeypatch.setattr(odm, "train", lambda config: np.zeros(2**46))  # 512 TiB
    assert "out of memory" in error_of(capsys, odm.main, "train")


class Bomb(str):
    """A path: pickled, it makes that folder where it is loaded."""

    def __reduce__(self):
        return os.mkdir, (str(self),)


def test_damaged_and_hostile_checkpoints_are_refused(run, tmp_path, capsys):
    """Cut, code inside, another network, class names that are paths."""
    whole, state = (run / "checkpoint.pt").read_bytes(), state_of(run)

    evil = tmp_path / "evil.pt"

    def refusal(content) -> str:
        if isinstance(content, dict):
            torch.save(content, evil)
        else:
            evil.write_bytes(content)
        return error_of(capsys, odm.main, "sample", "--checkpoint", evil, "--out", tmp_path / "o")

    bomb = Bomb(tmp_path / "it ran")
    other = {**state, "config": {**state["config"], "ch": 16}}
    for content in (whole[:-2000], pickle.dumps(bomb), {**state, "extra": bomb}, other):
        assert "evil.pt: no whole checkpoint" in refusal(content)
    for name in ("../../x", "/etc/x", "..", "a\\b"):
        state["names"][0] = name
        assert "cannot be the name of a folder" in refusal(state)
    assert list(tmp_path.iterdir()) == [evil]


ODM_FLAGS = [odm.flag(f.name) for f in fields(odm.Config) if f.name not in ("data", "device")]
FID_FLAGS = "--dims --weights --size --crop --order --columns -k --batch --json --no".split()
USEFULNESS_FLAGS = [*FID_FLAGS, "--trained-on", "--neighbours"]


def test_what_the_readme_begins_with(graded, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert odm.main(train_flags(data=graded)) == 0  # into runs/NAME
    assert odm.main(["sample", "--class", "3"]) == 0  # 16 of the newest run
    assert len(pictures(tmp_path / "samples" / f"{graded.name}-6" / "Mayo 3")) == 16
    with pytest.raises(SystemExit):
        odm.main(["train", "--help"])
    shown = capsys.readouterr().out
    assert all(flag in shown for flag in ODM_FLAGS)
    chosen = []
    monkeypatch.setattr(odm, "train", chosen.append)
    for words in ([], ["--data", "x"], ["--data", "x", "--preset", "small"]):
        odm.main(["train", *words])
    assert [config.size for config in chosen] == [32, 64, 32] and odm.check_config(chosen[0]) is None


@pytest.mark.parametrize("main, words, names", [
    (odm.main, ["train", "--data", "absent"], ODM_FLAGS), (fid.main, ["absent", "absent"], FID_FLAGS),
    (usefulness.main, ["absent", "absent"], USEFULNESS_FLAGS)])
def test_random_flags_fail_in_one_line(main, words, names, tmp_path, capsys, monkeypatch):
    """The data folder is absent, so that all of them do fail."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    values = ["", "0", "1", "-1", "7", "1e309", "nan", "-inf", "0.5", "1,2,2", ",", "x", "--", "\u00e9",
              "\u00b2", "99999999999999999999", "euclidean", "none/x"]
    for _ in range(200):
        argv = list(words)
        for name in rng.choice(names, rng.integers(1, 5)):
            argv += [name, values[rng.integers(len(values))]]
        error_of(capsys, main, *argv)


# -------------------------------------------------------------------------------- data/demo.py


def test_a_frame_depends_on_seed_grade_and_number_alone(tmp_path):
    demo.make(tmp_path / "16", 16, seed=3, size=16)
    demo.make(tmp_path / "32", 32, seed=3, size=16)
    rows = list(csv.DictReader(open(tmp_path / "32" / "severity.csv")))
    assert len(rows) == 32
    for row in rows:
        severity, rng = demo.scene(3, int(row["file"][5]), int(row["file"][7:11]))
        assert abs(float(row["severity"]) - severity) < 1e-4
        assert np.array_equal(Image.open(tmp_path / "32" / row["file"]), demo.draw(severity, rng, 16))
    small, large = pictures(tmp_path / "16"), pictures(tmp_path / "32")
    assert len(large) == 32 and small.items() <= large.items()  # the smaller begins the larger
    assert len({demo.scene(*at)[1].random() for at in ((3, 1, 0), (4, 1, 0), (3, 2, 0), (3, 1, 1))}) == 4


def test_severity_names_its_grade_and_grades_come_as_often_as_in_limuc():
    for grade in range(4):
        s = np.array([demo.scene(0, grade, i)[0] for i in range(300)])
        assert 0 <= s.min() and s.max() <= 3 and (abs(s - grade) < 0.5).all()
        assert abs(abs(s - grade).mean() - 1 / 6) < 0.025  # of a triangle, reflected at the ends or not
    exact = 1100 * np.array([6105, 3052, 1254, 865]) / 11276
    assert sum(demo.counts(1100)) == 1100 and (abs(demo.counts(1100) - exact) < 1).all()


def test_a_scene_is_the_same_at_every_size_and_severity_moves_it_one_way():
    place = lambda i, severities, size=32: np.stack([demo.draw(s, demo.scene(1, 0, i)[1], size)
                                                     for s in severities]).transpose(0, 3, 1, 2)
    small, large = (place(0, (0, 1.4, 2.9), size).astype(float) for size in (32, 64))
    assert abs(large.reshape(3, 3, 32, 2, 32, 2).mean((3, 5)) - small).max() < 1.5  # three roundings
    for i in range(6):
        red, green, _ = place(i, np.arange(0, 2.1, 0.5)).mean((2, 3)).T  # above 2 ulcers pale the wall
        assert (np.diff(green / red) < 0).all() and green[4] / red[4] < 0.8 * green[0] / red[0]


def test_measure_reads_fresh_frames_to_the_stated_error():
    for size in (16, 32, 64):
        scenes = [demo.scene(77, grade, i) for grade in range(4) for i in range(12)]
        truth = np.array([s for s, _ in scenes])
        clean = np.stack([demo.draw(*scene, size).transpose(2, 0, 1) for scene in scenes])
        noisy = np.clip(clean + np.random.default_rng(0).normal(0, 8, clean.shape), 0, 255).astype(np.uint8)
        for found, bound in ((demo.measure(clean), 0.15), (demo.measure(noisy), 0.2)):
            assert abs(found - truth).mean() < bound and np.corrcoef(found, truth)[0, 1] > 0.98


def test_a_set_is_whole_and_left_alone_or_is_not_there(tmp_path, monkeypatch):
    frames, times = [np.zeros((16, 16, 3), np.uint8)] * 4, []
    monkeypatch.setattr(demo, "draw", lambda *_: frames.pop())
    with pytest.raises(IndexError):
        demo.make(tmp_path / "set", 16, size=16)
    monkeypatch.undo()
    assert list(tmp_path.iterdir()) == []
    for _ in range(2):
        assert demo.make(tmp_path / "set", 17, size=16) == demo.counts(17)
        times.append([file.stat().st_mtime_ns for file in sorted(tmp_path.rglob("*"))])
    assert times[0] == times[1]
    for n, seed, size in ((16, 0, 16), (17, 1, 16), (17, 0, 32)):
        with pytest.raises(FileExistsError, match="delete it"):
            demo.make(tmp_path / "set", n, seed, size)
    Image.new("RGB", (16, 16)).save(tmp_path / "set" / "Mayo 3" / "0000.png")  # another frame
    with pytest.raises(FileExistsError, match="delete it"):
        demo.make(tmp_path / "set", 17, size=16)


def test_command_line_of_the_synthetic_frames(tmp_path, capsys):
    argv = ["--out", str(tmp_path / "set"), "-n", "16", "--size", "16"]
    assert demo.main(argv) == 0 and "Mayo 0 9" in capsys.readouterr().out
    for words in ("-n 3", "--size 8", "--seed -1", "-n many", f"--out {tmp_path}"):
        error = error_of(capsys, demo.main, *argv, *words.split())
        assert all(word in error for word in words.split()), error


# -------------------------------------------------------------- data/retina.py and data/evidence

CLASSES = torch.tensor([3, 0, 5, 1, 2, 4])
GREYS = (51 * CLASSES).byte().view(-1, 1, 1, 1).expand(-1, 3, 4, 4)  # 0.4 c - 1 in [-1, 1]


@pytest.fixture
def archive(tmp_path, monkeypatch):
    """A tiny archive laid out like RetinaMNIST's, with the expected MD5."""
    rng, arrays, file = np.random.default_rng(0), {}, tmp_path / "retinamnist.npz"
    for split, grades in dict(train=[0, 1, 1, 4], val=[2, 3], test=[0, 1, 2, 3, 4]).items():
        arrays[f"{split}_images"] = rng.integers(0, 256, (len(grades), 6, 6, 3), dtype=np.uint8)
        arrays[f"{split}_labels"] = np.array(grades, np.uint8)[:, None]
    np.savez(file, **arrays)
    monkeypatch.setitem(retina.ARCHIVES, 28, (file.name, hashlib.md5(file.read_bytes()).hexdigest()))
    return file


def test_retina_leaves_a_whole_set_alone_and_refuses_anything_else(archive, tmp_path, capsys):
    out, test, arrays, there = tmp_path / "set", tmp_path / "set-test", np.load(archive), []
    for _ in range(2):
        retina.make(out, npz=archive)
        there.append({path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")})
    assert there[0] == there[1] and len(list(tmp_path.iterdir())) == 3
    for split, folder in dict(train=out, val=out, test=test).items():
        for i, (image, (grade,)) in enumerate(zip(arrays[f"{split}_images"], arrays[f"{split}_labels"])):
            assert max_error(np.array(Image.open(folder / str(grade) / f"{split}_{i:04d}.png")), image) == 0
    shutil.rmtree(out)
    victim = test / "3" / "test_0003.png"
    whole = victim.read_bytes()
    for change in (victim.unlink, lambda: write_image(victim, 1, sides=(6, 6)),
                   lambda: victim.write_bytes(whole[:60]), lambda: write_image(test / "mine.png", 1)):
        change()
        before = pictures(tmp_path)
        assert str(test) in error_of(capsys, retina.main, "--npz", archive, "--out", out)
        assert pictures(tmp_path) == before and not out.exists()
        victim.write_bytes(whole)


def test_retina_downloads_once_and_keeps_nothing_damaged(archive, tmp_path, monkeypatch, capsys):
    out, web = tmp_path / "data" / "set", tmp_path / "web"
    monkeypatch.setattr(retina, "URL", web.as_uri() + "/{}")
    assert re.search("npz: cannot be downloaded .* --npz", error_of(capsys, retina.main, "--out", out))
    web.mkdir()
    (web / archive.name).write_bytes(archive.read_bytes()[:-9])
    assert "MD5" in error_of(capsys, retina.main, "--out", out) and not any(out.parent.iterdir())
    archive.replace(web / archive.name)
    assert retina.main(["--out", str(out)]) == 0
    shutil.rmtree(web)
    retina.make(out)  # from the file that is kept
    assert {path.name for path in out.parent.iterdir()} == {archive.name, "set", "set-test"}
    assert "afda852cc3" in error_of(capsys, retina.main, "--out", out, "--size", 64, "--npz", __file__)


def formula(error):
    """A network that finds the noise in an image of one grey, that of its class, and errs by error(t, c)."""
    def model(x_t, t, c):
        t, c = t.view(-1, 1, 1, 1), c.view(-1, 1, 1, 1)
        return (x_t - ALPHA_BAR[t].sqrt() * (0.4 * c - 1)) / (1 - ALPHA_BAR[t]).sqrt() + error(t.double(), c)

    model.config, model.label = odm.Config(size=4), torch.nn.Embedding(1, 1)
    return odm.Network(model, [], [], Path(), "")


def test_heldout_sees_every_tenth_of_t_alike_and_each_image_by_itself():
    steps = formula(lambda t, c: ((1 + c) * (t / 100).ceil()).sqrt())  # loss (1 + c) n in the nth tenth
    found, ramp = heldout.losses(steps, GREYS, CLASSES, draws=3), formula(lambda t, c: t / 1000)
    means = {"1-100": 1, "101-300": 2.5, "301-600": 5, "601-1000": 8.5, "201-1000": 6.5, "1-1000": 5.5}
    assert list(found) == list(means)
    assert all(max_error(found[band] / (1 + CLASSES.numpy()), [means[band]] * 6) < 1e-4 for band in means)
    for band, values in heldout.losses(ramp, GREYS, CLASSES).items():
        assert len(set(values.round(4))) == 6  # each image has t of its own
        for n, batch in ((6, 1), (6, 999), (2, 16)):  # neither the batch nor other images change them
            assert max_error(heldout.losses(ramp, GREYS[:n], CLASSES[:n], 2, batch)[band], values[:n]) < 1e-6


def test_heldout_standard_errors():
    first, x = np.random.default_rng(1).gamma(9, size=(2, 60))
    x = first + x / 20
    without = [np.delete(x, i).mean() / np.delete(first, i).mean() for i in range(60)]  # the jackknife
    expected = 100 * (sum(x) / sum(first) - 1), 100 * np.std(without) * math.sqrt(59)
    assert np.allclose(heldout.difference(x, first), expected, rtol=0.03)
    assert np.allclose(heldout.quotient(np.array([1, 3]), np.array([2, 6])), (1 / 2, math.sqrt(2) / 4))


def test_heldout_program(run, graded, tmp_path, capsys):
    counts, file = {"Mayo 0": 3, "Mayo 1": 2, "Mayo 2": 2, "Mayo 3": 1}, tmp_path / "numbers.json"
    unseen, state = write_images(tmp_path / "unseen", counts, 9), state_of(run)
    argv = [run, run, unseen, "--trained-on", graded, "--json", file, "--draws", 1]
    assert heldout.main(list(map(str, argv))) == 0
    first, second = json.loads(file.read_text())  # one image of Mayo 3: it has no standard error
    assert f"{first['unseen']['Mayo 3']['1-50'][0]:.5f} (nan)" in capsys.readouterr().out
    for band, (value, _) in first["unseen"]["all"].items():
        assert abs(sum(n * first["unseen"][c][band][0] for c, n in counts.items()) / 8 / value - 1) < 1e-5
        assert [second["difference"][c][band] for c in ("all", "Mayo 3")] == [[0, 0], [0, None]]
    state["config"]["beta_T"] = 0.03
    torch.save(state, file)
    for argv, hint in (([run, file, unseen], "beta_T"), ([run, graded, "--trained-on", graded], "20 of its"),
                       ([run, unseen, "--order", "Mayo 1,Mayo 0"], "['Mayo 1',")):
        assert hint in error_of(capsys, heldout.main, *argv)


def test_plane_keeps_the_mean_square_distances_between_classes(run, graded, tmp_path, capsys):
    """Estimates made of known points: each image turns them its own way and adds something of its own."""
    points = np.array([[0.0, 0], [1, 2], [2, -1], [5, 1]])
    eps_hat = noise(6, 1, 12, dtype=torch.float64).repeat(1, 4, 1)
    for i, image in enumerate(eps_hat):
        turned, _ = torch.linalg.qr(noise(12, 2, seed=i, dtype=torch.float64))
        image += (1 + i % 2) * torch.from_numpy(points) @ turned.T  # at once and twice the size
    found, share = plane.principal_coordinates(eps_hat.view(6, 4, 3, 2, 2))
    expected = np.linalg.norm(points[:, None] - points, axis=2) * math.sqrt(2.5 / 12)
    assert max_error(np.linalg.norm(found[:, None] - found, axis=2), expected) < 1e-9
    assert found[-1, 0] > found[0, 0]
    spread = np.linalg.svd(points - points.mean(0))[1] ** 2
    assert abs(share - spread[0] / spread.sum()) < 1e-9
    assert plane.main([str(run), str(run), str(graded), "--out", str(tmp_path / "plane.png")]) == 0
    assert Image.open(tmp_path / "plane.png").size == (800, 400)
    assert len(re.findall(r": \d+% along one line, straightness 0\.\d", capsys.readouterr().out)) == 2


def test_leaf_severity_is_the_diseased_share_of_the_leaf():
    """A green leaf on a grey background, some of it brown or almost black, in light of any colour."""
    image, brown = np.empty((64, 64, 3)), np.zeros((64, 64), bool)
    image[:] = 215, 210, 212
    image[8:56, 8:56] = 70, 130, 50
    brown[20:32, 8:56] = True
    image[brown], image[20:32, 8:20] = (120, 80, 50), (30, 22, 20)
    lights = [(1, 1, 1), (1.1, 1, 0.9), (0.8, 0.85, 0.9)]
    images = np.stack([image * light for light in lights]).transpose(0, 3, 1, 2)
    images = np.concatenate([images, images + np.random.default_rng(0).normal(0, 4, images.shape)])
    images = images.round().clip(0, 255).astype(np.uint8)
    assert max_error(severity.leaf_severity(images), brown.sum() / 48**2) < 0.015
    nothing = np.full((1, 3, 64, 64), 210, np.uint8)
    assert severity.leaf_severity(nothing).tolist() == [0]


def patched(name, tmp_path):
    """odm.py with data/evidence/NAME.patch, as a module."""
    file = tmp_path / f"{name}.py"
    patch = ["patch", "-o", file, HERE / "odm.py", HERE / "data" / "evidence" / f"{name}.patch"]
    subprocess.run(patch, check=True, stdout=PIPE)
    return importlib.import_module(name)


@pytest.mark.skipif(not shutil.which("patch"), reason="the program patch is not there")
def test_patches_apply_and_do_what_they_say(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    networks = []
    for module in (odm, patched("embedding", tmp_path), patched("number", tmp_path)):
        torch.manual_seed(0)
        networks.append(module.UNet(module.Config(**TINY), 4).eval())
    plain, small, number = networks
    assert torch.equal(small.label.weight, 0.02 * plain.label.weight)
    for weight in plain.parameters():
        torch.nn.init.normal_(weight, std=0.1)
    number.load_state_dict(plain.state_dict())
    w, null = plain.label.weight.data[0].clone(), plain.label.weight.data[4].clone()
    plain.label.weight.data = torch.stack([-w, -w / 3, w / 3, w, null])
    x, t, position = noise(3, 3, 8, 8), torch.tensor([5, 20, 50]), torch.tensor([0.0, 2.0, 3.0])
    found = sys.modules["number"].guided_eps(number, position, 2.0)(x, t)
    assert max_error(found, odm.guided_eps(plain, position, 2.0)(x, t)) < 1e-5

    # d(p,q) is 0.2 and d(q,r) 0.8 where classes 0, 1, 3 ask for 1/3 and 2/3; the second triplet is right.
    label, root = torch.tensor([1, 2, 0, 1, 3, 1, 2, 3]), torch.tensor([0, 1, 0, 0, 0, 1, 1, 1])
    batch = odm.Batch(root, label, root, t=torch.tensor([10, 40]), flip=torch.zeros(2))
    eps_hat = torch.tensor([0, 0, 0, 0.2, 1, 0, 0.5, 1]).view(-1, 1, 1, 1).expand(8, 3, 4, 4)
    arguments = lambda *_: eps_hat, x[0].expand(8, 3, 8, 8)[:, :, :4, :4], noise(2, 3, 4, 4), batch, ALPHA_BAR
    spacing = patched("spacing", tmp_path)
    found = spacing.total_loss(*arguments, odm.Config(ordinal=2.0, timesteps=50))[2].item()
    assert found == pytest.approx(2 * (1 / 3 - 0.2) ** 2 * (2 * 10 / 50) / 2, rel=1e-5)


# --------------------------------------------------------------------------------------- fid.py

normal = lambda n, d, seed, dtype=torch.float64: noise(n, d, seed=seed, dtype=dtype)


def with_moments(mean, variance, n, seed):
    """Features (n, d) of exactly this mean (d,) and this diagonal covariance."""
    centred = normal(n, len(mean), seed)
    columns = torch.linalg.qr(centred - centred.mean(0)).Q  # orthonormal, each with the sum 0
    return mean + columns * ((n - 1) * torch.as_tensor(variance)).sqrt()


def test_frechet_closed_forms():
    shift = torch.tensor([1.0, -2.0, 0.0, 0.5, 3.0], dtype=torch.float64)
    x, turn = normal(50, 5, 1), torch.linalg.qr(normal(5, 5, 3)).Q
    assert fid.frechet_distance(x, x) == pytest.approx(0, abs=1e-9)
    a, b = np.array([4.0, 1.0, 0.25, 1e-4, 0.0]), np.array([1.0, 9.0, 0.25, 0.0, 2.0])
    for n, m in ((40, 30), (6, 40)):
        x, y = with_moments(shift, a, n, 4), with_moments(0 * shift, b, m, 5)
        expected = 14.25 + ((a**0.5 - b**0.5) ** 2).sum()  # root by root
        assert fid.frechet_distance(x @ turn, y @ turn) == pytest.approx(expected, rel=1e-9)
    with pytest.raises(ValueError), np.errstate(invalid="ignore"):
        fid.frechet_distance(x, y[:1])


@pytest.mark.parametrize("n, m, d", [(200, 150, 24), (20, 30, 64), (30, 200, 64)])
def test_frechet_against_eigenvalues_of_the_product(n, m, d):
    x, y = (normal(n, d, seed).float() @ normal(d, d, 2).float() + 100 for n, seed in ((n, 1), (m, 3)))
    y = 1.2 * y  # means so large cost statistics in float32 four digits
    mu1, mu2, s1, s2 = *(z.double().mean(0) for z in (x, y)), *(np.cov(z.T.double()) for z in (x, y))
    root = (np.linalg.eigvals(s1 @ s2).real.clip(0) ** 0.5).sum()
    expected = (mu1 - mu2).square().sum().item() + np.trace(s1) + np.trace(s2) - 2 * root
    assert fid.frechet_distance(x, y) == pytest.approx(expected, rel=1e-7)


def test_kernel_distance_is_the_double_loop_and_its_error_the_jackknifes():
    x, y = normal(23, 5, 1, torch.float32), 0.5 + normal(17, 5, 2, torch.float32)
    k = lambda a, b: (a.double().dot(b.double()).item() / 5 + 1) ** 3
    xx, yy = (np.mean([k(a, b) for a, b in itertools.permutations(z, 2)]) for z in (x, y))
    kid, error = fid.kernel_distance(x, y)
    assert kid == pytest.approx(xx + yy - 2 * np.mean([k(a, b) for a in x for b in y]), rel=1e-5)
    without = lambda z, i: torch.cat([z[:i], z[i + 1 :]])
    without_x = [fid.kernel_distance(without(x, i), y)[0] for i in range(23)]
    without_y = [fid.kernel_distance(x, without(y, i))[0] for i in range(17)]
    assert error**2 == pytest.approx(22 * np.var(without_x) + 16 * np.var(without_y), rel=1e-4)


def brute_force(real, fake, k):
    """(precision, recall), a point at a time; radii as float64 has them, rims included."""

    def share_inside(points, centres):
        away = [np.sort(np.linalg.norm(np.delete(centres, i, 0) - x, axis=1)) for i, x in enumerate(centres)]
        radii = np.array(away)[:, k - 1] * (1 + 1e-12)
        return np.mean([(np.linalg.norm(centres - p, axis=1) <= radii).any() for p in points])

    real, fake = real.double().numpy(), fake.double().numpy()
    return share_inside(fake, real), share_inside(real, fake)


@pytest.mark.parametrize("n, m, d, k", [(90, 70, 3, 3), (60, 80, 100, 1), (4, 4, 2, 3), (1100, 1060, 2, 5)])
def test_precision_recall_against_loops(n, m, d, k):
    real, fake = normal(n, d, 1, torch.float32), 0.4 + 0.8 * normal(m, d, 2, torch.float32)
    sets = [(real, fake)]
    if n < 100:  # far from the origin, where float32 products are coarse; and on a grid, most distances ties
        sets.append((real + 300, fake + 300))
        sets.append(((real * 2).round(), (fake * 2).round()))
    for real, fake in sets:
        assert fid.precision_recall(real, fake, k) == pytest.approx(brute_force(real, fake, k), abs=1e-12)
    black = torch.cat([torch.full((5, 768), 0.1), normal(30, 768, 1, torch.float32)])  # radius 0
    assert fid.precision_recall(black, black[:5]) == (1.0, 5 / 35)


def fill_with_waves(network):
    """Weights that any implementation can be given: the same numbers on every machine."""
    state = network.state_dict()
    for name, value in state.items():
        wave = torch.arange(value.numel(), dtype=torch.float64).pow(1.5).cos().view(value.shape)
        if name.endswith("conv.weight"):
            state[name] = (4 / value[0].numel()) ** 0.5 * wave
        elif name.endswith(("bn.running_var", "bn.weight")):
            state[name] = 1 + 0.3 * wave
        elif not name.endswith("num_batches_tracked"):
            state[name] = 0.2 * wave
    network.load_state_dict(state)
    return network


@pytest.mark.parametrize("dims, expected", [  # sum, root mean square, centroid of pytorch-fid 0.3.0's
    (64, (16.378099345136434, 0.3232815183709533, 30.19210691719125)),
    (768, (77.15302715079997, 0.18921177408829562, 381.4555883042095)),
    (2048, (286.9499453532171, 0.24868668614621625, 1068.5793844638972)),
])
def test_network_gives_the_features_of_pytorch_fid(dims, expected):
    i = torch.arange(3 * 40 * 50)
    image = (i * i % 251).to(torch.uint8).view(1, 3, 40, 50)
    network = fill_with_waves(fid.Inception(dims)).train()  # features() sees to eval mode
    x = fid.features(image, network)[0].double()
    found = x.sum(), x.square().mean().sqrt(), x @ torch.arange(1, dims + 1.0).double() / x.sum()
    assert torch.stack(found).tolist() == pytest.approx(expected, rel=1e-5)


@pytest.fixture(scope="module")
def weights_64(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "random 64.pth"
    torch.save(fill_with_waves(fid.Inception(64)).half().state_dict(), path)
    return path


def test_load_weights_says_what_is_wrong(weights_64, tmp_path):
    network = fid.load_weights(64, str(weights_64))  # the file is half
    assert all(p.dtype == torch.float32 for p in network.parameters())
    with pytest.raises(odm.UserError, match="no Conv2d_3b_1x1.conv.weight, which --dims 768 needs"):
        fid.load_weights(768, str(weights_64))
    half, bad = weights_64.read_bytes()[:50_000], tmp_path / "bad.pth"
    torch.save(network.state_dict() | {"AuxLogits.fc.bias": torch.zeros(1000)}, bad)
    with pytest.raises(odm.UserError, match="it is torchvision's"):
        fid.load_weights(64, str(bad))
    code = f"cos\nmkdir\n(S'{tmp_path / 'it ran'}'\ntR.".encode()  # a pickle that makes a folder
    for content in (half, b"<html>Not found</html>", code):
        bad.write_bytes(content)
        with pytest.raises(odm.UserError, match="(?s)no network in .*bad.pth.*name it with --weights"):
            fid.load_weights(64, str(bad))
    assert list(tmp_path.iterdir()) == [bad]


def test_download(weights_64, tmp_path, monkeypatch):
    content = weights_64.read_bytes()
    turned = bytearray(content)
    turned[len(content) // 2] ^= 1  # within the numbers: it would load
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(fid, "WEIGHTS", f"weights-{hashlib.sha256(content).hexdigest()[:8]}.pth")
    served, cached = tmp_path / fid.WEIGHTS, tmp_path / "checkpoints" / fid.WEIGHTS
    monkeypatch.setattr(fid, "WEIGHTS_URL", served.as_uri())
    with pytest.raises(odm.UserError, match=f"no network in {cached}.*fetch file:.* by other means"):
        fid.load_weights(64)  # nothing there
    served.write_bytes(turned)
    with pytest.raises(odm.UserError, match="hash"):
        fid.load_weights(64)
    assert list(cached.parent.iterdir()) == []
    served.write_bytes(content)
    fid.load_weights(64)
    assert list(cached.parent.iterdir()) == [cached]
    served.unlink()
    fid.load_weights(64)  # from the cache


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Real images of three classes, what a generator saw, and what several made, in one folder."""
    root = tmp_path_factory.mktemp("sets")
    sets = {"real": (9, 6, 5), "seen": (9, 6, 5), "dm": (5, 7, 11), "odm": (3, 4, 5)}
    for seed, name in enumerate(sets):
        for c, n in enumerate(sets[name]):
            write_images(root / name, {f"Mayo {c}": n}, 9 * seed + c, low=60 * c)
    write_images(root, {"flat": 7, "flat2": 5, "odm": 2, "odm/1.5": 3, "between/0.5": 4, "between/1.5": 4,
                        "two/dm/Mayo 0": 4, "two/odm/Mayo 0": 4, "ours/dm/Mayo 0": 4, "sizes/Mayo 0": 3})
    write_images(root, {"sizes/Mayo 1": 2}, sides=(64, 64))
    write_images(root, {"wide/Mayo 0": 5}, sides=(16, 24))
    for folder in ("dm", "flat2", "ours/dm"):  # as `sample` leaves them
        (root / folder / "sample.json").write_text("{}")
        write_image(root / folder / "sheet.png", 0, sides=(90, 70))
    copied = root / "seen" / "Mayo 2" / "Mayo2_1.png"
    (root / "odm" / "Mayo 0" / "Mayo0_0.png").write_bytes(copied.read_bytes())
    (root / "odm" / "notes.txt").write_text("")
    (write_images(root, {"broken/Mayo 0": 4}) / "broken" / "Mayo 0" / "Mayo0_2.png").write_bytes(b"")
    return root


def test_the_report_of_fid(folders, weights_64, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(folders)
    words = f"real dm odm flat --dims 64 --json {tmp_path}/scores.json --weights".split()
    assert fid.main([*words, str(weights_64)]) == 0
    out, err = capsys.readouterr()
    result = json.loads((tmp_path / "scores.json").read_text())
    rows = {(row["generated"], row["class"]): row for row in result["rows"]}
    assert [(row["generated"], row["n_real"], row["n_fake"]) for row in result["rows"]] == [
        ("dm", 20, 23), ("odm", 20, 12), ("flat", 20, 7),  # of all classes, then of each
        ("dm", 9, 5), ("odm", 9, 3), ("dm", 6, 7), ("odm", 6, 4), ("dm", 5, 11), ("odm", 5, 5)]
    names = set("class generated n_real n_fake fid_biased fid kid kid_se precision recall".split())
    assert all(set(row) == names for row in result["rows"]) and result["settings"]["size"] == 16
    assert "odm: 5 images passed over, no class of REAL (Mayo 0, Mayo 1, Mayo 2): ., 1.5\n" in err
    assert "odm: files not read: 1, as notes.txt\n" in err and "\ndm: " not in err
    assert all(row["fid_biased"] for row in rows.values()) and out.count("*") == 9 and "biased upward" in out
    assert rows["odm", "Mayo 0"]["fid"] is None and out.count("too few images") == 1
    network, row = fid.load_weights(64, str(weights_64)), rows["dm", "Mayo 1"]
    files = (sorted(Path(name, "Mayo 1").iterdir()) for name in ("real", "dm"))
    x, y = (fid.features(odm.read_squares(paths, size=16), network) for paths in files)
    assert row["fid"] == pytest.approx(fid.frechet_distance(x, y), rel=1e-4)
    assert (row["precision"], row["recall"]) == fid.precision_recall(x, y)
    assert (row["kid"], row["kid_se"]) == pytest.approx(fid.kernel_distance(x, y), rel=1e-3, abs=1e-6)
    shown = [7, 6, row["fid"], 1e3 * row["kid"], 1e3 * row["kid_se"], row["precision"], row["recall"]]
    (line,) = [line for line in out.splitlines() if line.endswith("  Mayo 1, dm")]
    assert [float(word) for word in re.findall(r"-?[\d.]+", line)[:7]] == pytest.approx(shown, abs=0.006)


def test_plain_folders_csvs_oblong_images_odd_names(folders, weights_64, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(folders)
    labels = write_images(tmp_path, {"eyes": 8, "by/0": 4, "by/1": 4, "生成": 4}) / "eyes" / "labels.csv"
    labels.write_text("image,level\n" + "".join(f"eyes_{i},{i % 2}\n" for i in range(8)))
    network, file = ["--dims", "64", "--weights", str(weights_64)], tmp_path / "scores.json"

    def rows_of(*words):
        assert fid.main([*map(str, words), *network, "--json", str(file)]) == 0
        rows = json.loads(file.read_text())["rows"]
        return [tuple(row[name] for name in ("class", "n_real", "n_fake", "fid")) for row in rows]

    same, other = rows_of("flat", "flat", "flat2")  # as users of pytorch-fid have them
    assert same == ("all", 7, 7, pytest.approx(0, abs=1e-6))
    assert other[:3] == ("all", 7, 5) and other[3] > 0.01
    assert "flat: 7 images without class folders, so row 'all' only" in capsys.readouterr().err
    assert [row[:3] for row in rows_of(labels, tmp_path / "by")] == [("all", 8, 8), ("0", 4, 4), ("1", 4, 4)]
    (row,) = rows_of("wide/Mayo 0", "wide/Mayo 0", "--size", "8")  # both cut to the same squares
    assert row == ("all", 5, 5, pytest.approx(0, abs=1e-6))
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    out, err = command(HERE / "fid.py", "flat", tmp_path / "生成", *network).communicate()
    assert r"\u751f\u6210" in out, err


def test_bad_input_of_fid_is_one_line_and_status_2(folders, capsys, monkeypatch):
    """No weights are there either: what is wrong with files is found out before the network is loaded."""
    monkeypatch.chdir(folders)
    for words, *messages in (
        ("real absent", "absent: no images in it, or no such folder"),
        ("real between", "between: no class of REAL (Mayo 0, Mayo 1, Mayo 2): 0.5, 1.5"),
        ("flat dm", "dm: no class of REAL (which has none): Mayo 0, Mayo 1, Mayo 2"),
        ("real two", "two: holds deeper folders or sets of samples, dm/Mayo 0, odm/Mayo 0: name one"),
        ("real ours", "ours: holds deeper folders or sets of samples, dm: name one"),
        ("real sizes", "sizes: images of several sizes, 16x16 (3), 64x64 (2)"),
        ("between between/0.5", "between/0.5: its images count as between too; keep them elsewhere"),
        ("real wide", "sides of [16, 24] pixels: give the real ones' --size"),
        ("real broken", "Mayo0_2.png: not readable"),
        ("real dm --dims 2048", "no network in none.pth", "name it with --weights"),
        ("real dm --json none/s.json", "none/s.json: must be a file in a folder that exists"),
        ("real dm --json flat", "flat: must be a file"),
        ("real", "GENERATED"),
    ):
        line = error_of(capsys, fid.main, "--dims", 64, "--weights", "none.pth", *words.split())
        assert all(message in line for message in messages), line


# ------------------------------------------------------------------- data/beyond/usefulness.py


def test_quadratic_kappa_by_hand():
    # observed cost 8 / 6; by chance: rows 2, 2, 2 and columns 2, 2, 2 -> cost (4 * 1 + 2 * 4) * 4 / 36
    table = torch.tensor([[1, 0, 1], [0, 2, 0], [1, 0, 1]])
    assert usefulness.quadratic_kappa(table) == pytest.approx(1 - (8 / 6) / (48 / 36))
    assert math.isnan(usefulness.quadratic_kappa(torch.tensor([[3, 0], [0, 0]])))


def test_ridge_classifier_and_its_scores_against_fits_made_anew():
    labels, eye = torch.arange(24) % 6 % 4 % 3, torch.eye(6, dtype=torch.float64)  # 12, 8 and 4 images
    x, target = normal(24, 6, 1), (labels[:, None] > torch.arange(2)).double()
    x[:, 0] += labels
    weight = 1 / labels.bincount()[labels].double()[:, None] / 3  # the classes alike
    total = (weight * (x - (weight * x).sum(0)).square()).sum().item()

    def guess(rows, penalty, asked):
        w = weight[rows]
        x_mean, target_mean = ((w * z[rows]).sum(0) / w.sum() for z in (x, target))
        a, b = x[rows] - x_mean, target[rows] - target_mean
        slope = torch.linalg.solve(a.T @ (w * a) + penalty * eye, a.T @ (w * b))
        return target_mean + (asked - x_mean) @ slope

    def left_out_error(penalty):  # every fit made anew without the image that is left out
        guesses = [guess(torch.arange(24) != i, penalty, x[i]) for i in range(24)]
        return (weight * (target - torch.stack(guesses)).square()).sum().item()

    best, asked = min(total * np.logspace(-5, 0, 11), key=left_out_error), 2 * normal(5000, 6, 2)
    expected, true = (guess(torch.arange(24), best, asked) > 0.5).sum(1), torch.arange(5000) % 3
    assert torch.equal(usefulness.ridge_classifier(x, labels, 3)(asked), expected)
    score = usefulness.classifier_score(x, labels, asked, true, 3)
    assert score["mean_error"] == pytest.approx((expected - true).abs().double().mean().item())
    assert score["top_recall"] == pytest.approx((expected[true == 2] == 2).double().mean().item())


def test_copies_are_counted():
    known, real, fresh = (normal(n, 32, seed, torch.float32) for n, seed in ((400, 1), (200, 2), (200, 3)))
    fresh[:20] = known[100:120] + 1e-3 * normal(20, 32, 4, torch.float32)
    ratio, places = usefulness.likeness(fresh, known, real)
    assert (ratio <= 0.5).sum() == 20  # a tenth
    to_known, to_real = (torch.cdist(fresh.double(), x.double()) for x in (known, real))
    assert torch.equal(places, to_known.topk(3, largest=False).indices)
    assert torch.allclose(ratio.double(), to_known.amin(1) / to_real.amin(1), rtol=1e-4)
    one_kind = normal(1, 32, 6, torch.float32) + 0.2 * normal(300, 32, 5, torch.float32)
    assert (usefulness.likeness(one_kind, known, real)[0] <= 0.5).sum() == 0  # low diversity, but no copies
    assert usefulness.likeness(known[:4], known, known)[0].tolist() == [1] * 4  # an image of both is no copy


def test_the_report_of_usefulness(folders, weights_64, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(folders)
    network = ["--dims", "64", "--weights", str(weights_64)]
    words = f"real dm odm flat --trained-on seen --json {tmp_path}/use.json --neighbours {tmp_path}/n.png"
    assert usefulness.main([*words.split(), *network]) == 0
    result, out = json.loads((tmp_path / "use.json").read_text()), capsys.readouterr().out
    copies = {row["generated"]: row["copies"] for row in result["rows"]}
    assert list(copies) == ["dm", "odm", "flat"] and copies["odm"] == pytest.approx(1 / 12)
    assert "    12   0.083  odm\n" in out
    assert [row["fitted_on"] for row in result["classifier"]] == "seen,dm,seen + dm,odm,seen + odm".split(",")
    inception = fid.load_weights(64, str(weights_64))
    parts = (odm.load_images(name, 16) for name in ("seen", "dm", "real"))
    seen, dm, real = ((fid.features(images, inception), labels) for images, labels, _ in parts)
    both = map(torch.cat, zip(seen, dm))
    for row, fit in zip(result["classifier"], (seen, dm, both)):
        assert row.items() > usefulness.classifier_score(*fit, *real, 3).items()
    likeliest = result["neighbours"][0]
    assert likeliest["ratio"] == 0 and likeliest["nearest"].endswith("seen/Mayo 2/Mayo2_1.png")
    sheet = np.asarray(Image.open(tmp_path / "n.png"))
    assert np.array_equal(sheet[28:156, 4:132], sheet[28:156, 136:264])  # the copy, its original
    assert usefulness.main(["flat", "flat2", "--trained-on", "odm/1.5", *network]) == 0  # copies alone
    assert "kappa" not in capsys.readouterr().out
    for words, message in (("between", "--trained-on between: classes ['0.5', '1.5'], but REAL has ['Mayo"),
                           ("./seen/../real", "real: 20 of its 20 images are also among those trained on"),
                           ("seen --neighbours none/n.png", "none/n.png: must be a file")):
        line = error_of(capsys, usefulness.main, "real", "dm", *network, "--trained-on", *words.split())
        assert message in line, line


if __name__ == "__main__":
    sys.exit(pytest.main([__file__, "-q"]))
