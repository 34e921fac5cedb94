# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.5", "numpy", "pillow>=10.3", "scipy", "pytest"]
# ///
"""Tests of odm.py, fid.py and data/demo.py against closed forms, loops and hand-made cases.

    python test_odm.py
"""

import csv
import hashlib
import itertools
import json
import math
import os
import pickle
import re
import resource
import signal
import sys
import time
from dataclasses import fields
from pathlib import Path
from subprocess import PIPE, Popen

import numpy as np
import pytest
import torch
from PIL import Image

import fid
import odm

HERE = Path(__file__).resolve().parent
DEMO = HERE / "data" / "demo.pt"
torch.set_num_threads(1)  # networks of the tests are too small to share
os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that tests start
sys.path.insert(0, str(HERE / "data"))
import demo

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
    argv = ["train"]
    for name, value in {**TINY, **changes}.items():
        text = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
        argv += [odm.flag(name), text]
    return argv


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


def by_hand(p, q, r, distance, share) -> float:
    """Eq. 5 of one triplet; distances are root mean squares, or mean squares."""
    power = 1.0 if distance == "squared" else 0.5
    pq, qr, pr = ((a - b).square().mean().item() ** power for a, b in ((p, q), (q, r), (p, r)))
    if share is None:
        return (pr - (pq + qr)) ** 2
    return (pq - pr * share) ** 2 + (qr - pr * (1 - share)) ** 2


def test_where_the_ordinal_loss_is_zero():
    """On ordered lines and, with the norm as printed, at right angles instead."""
    line, corner = torch.tensor([[[0.0, 0], [3, 0], [7, 0]], [[3, 0], [0, 0], [0, 5]]])[:, :, None]
    assert odm.ordinal_loss(*line) < 1e-9 and odm.ordinal_loss(*line, "squared") == 12**2  # 2 <p-q, q-r>
    assert odm.ordinal_loss(*corner, "squared") == 0 and odm.ordinal_loss(*corner) > 1


@pytest.mark.parametrize("distance, low, high", [("euclidean", 0.99, 1.0001), ("squared", 0.66, 0.76)])
def test_what_the_loss_does_to_free_vectors(distance, low, high):
    """Eq. 7 follows from the Euclidean norm alone; the norm as printed ends at right angles, near 0.71."""
    points = noise(64, 3, 16).requires_grad_()
    optimizer = torch.optim.Adam([points], lr=0.03)
    for _ in range(400):
        optimizer.zero_grad()
        odm.ordinal_loss(*points.unbind(1), distance).sum().backward()
        optimizer.step()
    assert low < odm.straightness(points).mean().item() < high


def test_gradient_where_estimates_coincide_is_zero_not_nan():
    points = torch.ones(2, 3, 4, requires_grad=True)
    odm.ordinal_loss(*points.unbind(1)).sum().backward()
    assert torch.equal(points.grad, torch.zeros_like(points)) and odm.straightness(points).tolist() == [1, 1]


def test_straightness_over_the_triplets_of_four_classes():
    square = torch.tensor([[[0.0, 0], [1, 0], [1, 1], [0, 1]]])
    expected = (2 * math.sqrt(0.5) + 2 / (1 + math.sqrt(2))) / 4
    assert max_error(odm.straightness(square), [expected]) < 1e-6


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
SEVERITIES = (0.0, 1.0, 2.5, 4.0)


def drawn(step=0, B=8, **changes):
    """(settings, a batch of LABELS)."""
    config = settings(**changes)
    return config, odm.draw_batch(LABELS, SEVERITIES, config, B, torch.Generator().manual_seed(step))


@pytest.mark.parametrize("triplets", ["labels", "images"])
def test_a_triplet_is_three_classes_in_order_with_one_noise(triplets):
    seen = set()
    for step in range(60):
        config, batch = drawn(step, 32, triplets=triplets, class_dropout=0.2)
        _, plain = drawn(step, 32, triplets=triplets, class_dropout=0.2, ordinal=0.0)
        assert len(plain.image) == 32 and len(plain.triplets) == 0
        for name in ("image", "label", "t", "flip"):  # the plain diffusion model sees the same images
            assert torch.equal(getattr(plain, name), getattr(batch, name)[:32])
        assert len(batch.image) == 32 + 2 * 8 and batch.root[:32].tolist() == list(range(32))
        for g, rows in enumerate(batch.triplets):
            assert batch.root[rows].tolist() == [g] * 3 and g in rows  # so noise, t, flip and mask are one
            shown, own = batch.label[rows].tolist(), LABELS[batch.image[g]].item()
            assert batch.weight[g].item() == pytest.approx((4 not in shown) / (1 - config.class_dropout))
            classes = [own if c == 4 else c for c in shown]
            assert classes == sorted(set(classes))
            if triplets == "images":  # each under its own class
                assert LABELS[batch.image[rows]].tolist() == classes
            else:  # one image, under its own class and two others
                assert set(batch.image[rows].tolist()) == {batch.image[g].item()} and own in classes
            p, q, r = (SEVERITIES[c] for c in classes)
            assert batch.share[g].item() == pytest.approx((q - p) / (r - p))
            seen.add(tuple(classes))
    assert seen == set(itertools.combinations(range(4), 3))


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


@pytest.mark.parametrize("changes", [
    {}, {"triplets": "images"}, {"spacing": True}, {"distance": "squared"}, {"ordinal": 0.0}])
def test_total_loss_is_equation_8(changes):
    """Against one image and one triplet at a time, with a model that is a formula."""
    direction, images = noise(5, 3, 8, 8, seed=7), noise(100, 3, 8, 8, seed=8)
    model = lambda x, t, c, root=None: 0.5 * x + direction[c] * (1 + t[:, None, None, None] / 50)
    for step in range(4):
        config, batch = drawn(step, 13, **{"ordinal": 0.7, "class_dropout": 0.3, **changes})
        alpha_bar, eps, x_0 = odm.alpha_bars(config), noise(13, 3, 8, 8, seed=50 + step), images[batch.image]
        estimates = []
        for row, root in enumerate(batch.root):
            t = batch.t[root]
            x_t = alpha_bar[t].sqrt() * x_0[row] + (1 - alpha_bar[t]).sqrt() * eps[root]
            estimates += model(x_t[None], t[None], batch.label[row][None])
        dm = np.mean([(eps[b] - estimates[b]).square().mean().item() for b in range(13)])
        ordinal = 0.0
        for g, rows in enumerate(batch.triplets):
            if 4 not in batch.label[rows]:  # the null class has no place in the order
                share = batch.share[g].item() if config.spacing else None
                lambda_t = config.ordinal * batch.t[g].item() / 50
                ordinal += lambda_t * by_hand(*(estimates[row] for row in rows), config.distance, share)
        ordinal /= 3 * 0.7  # a quarter of 13 images, of which 0.7 are labelled on average
        found = odm.total_loss(model, x_0, eps, batch, alpha_bar, config)
        assert torch.stack(found).tolist() == pytest.approx([dm + ordinal, dm, ordinal], rel=1e-5)


# ------------------------------------------------------------------------------------- sampling


def falling(T, steps):
    return torch.linspace(T, 0, steps + 1).round().long().tolist()


class Gaussians:
    """The exact E[eps | x_t, c] where x_0 ~ N(means[c], std^2)."""

    def __init__(self, means, std):
        self.means, self.std, self.num_classes, self.times = means, std, len(means), []

    def __call__(self, x, t, c=0):
        self.times.append(t[0].item())
        a = ALPHA_BAR[t].to(x).view(-1, *[1] * (x.dim() - 1))
        return (1 - a).sqrt() * (x - a.sqrt() * self.means[c]) / (a * self.std**2 + 1 - a)


def test_drawing_starts_at_T_and_lands_on_the_clean_image():
    target = torch.arange(48, dtype=torch.uint8).view(1, 3, 4, 4) * 5
    for steps in (1, 7, 1000):
        model = Gaussians(odm.to_unit(target), 0.0)
        config = odm.Config(size=4, sample_steps=steps, guidance=1.0)
        assert torch.equal(odm.draw_images(model, [0.0], [(0, 0)], config), target)
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
    model = lambda x, t, c: 0.1 * x + (c**2 + 0.01 * t)[:, None, None, None]
    model.num_classes = 4
    x, t, position = noise(3, 3, 4, 4), torch.tensor([10, 20, 30]), torch.tensor([1.0, 3.0, 1.25])
    eps = lambda *c: model(x, t, torch.tensor(c))
    eps_c, null = 0.75 * eps(1, 3, 1) + 0.25 * eps(1, 3, 2), eps(4, 4, 4)
    for s in (0.0, 1.0, 1 + 1e-6, 2.0):  # no jump at the neutral scale
        assert max_error(odm.guided_eps(model, x, t, position, s), null + s * (eps_c - null)) < 1e-5


# ------------------------------------------------------------------------------ read and move


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
            estimates = [odm.guided_eps(model, x_t, t, position.expand(5), 1.0) for position in grid]
            errors = errors + torch.stack([odm.dm_loss(sign * eps, estimate) for estimate in estimates], 1)
        loss += errors / errors[:, ::100].mean(1, keepdim=True).sqrt()  # as each t weighs
    found = odm.read_position(model, x_0, ALPHA_BAR, parts=(0.1, 0.6))
    assert max_error(found, grid[loss.argmin(1)]) < 0.006 and found.unique().numel() > 3


def test_read_position_of_gaussians_on_a_line_is_the_projection():
    """Class c: N(m + c v, s^2). What x_0 has beside the line, and eps, used with its mirror, do not count."""
    m, v = noise(1, 3, 4, 4, seed=1), noise(1, 3, 4, 4, seed=2)
    x_0 = m + torch.tensor([-1.0, 0.4, 1.7, 3.0, 5.0]).view(-1, 1, 1, 1) * v + noise(5, 3, 4, 4, seed=3)
    projection = ((x_0 - m) * v).flatten(1).sum(1) / v.square().sum()
    model = Gaussians(m + torch.arange(4).view(-1, 1, 1, 1) * v, 0.5)
    assert max_error(odm.read_position(model, x_0, ALPHA_BAR), projection.clamp(0, 3)) < 1e-4
    model.means = m.expand(4, -1, -1, -1)  # classes that coincide
    assert odm.read_position(model, x_0, ALPHA_BAR).tolist() == [0] * 5


@pytest.fixture(scope="module")
def fresh(tmp_path_factory):
    """Drawings that demo.pt has not seen, one of each grade in four folders, and their severities."""
    root, severities = tmp_path_factory.mktemp("fresh"), []
    for i, grade in itertools.product(range(4), range(4)):
        file = root / f"patient {i}" / f"Mayo {grade}" / "a.png"
        file.parent.mkdir(parents=True)
        severity, rng = demo.scene(99, grade, i)
        Image.fromarray(demo.draw(severity, rng)).save(file)
        severities.append(severity)
    return root, severities


def test_grade_reads_the_severity_of_fresh_drawings(fresh, tmp_path, capsys):
    root, truth = fresh

    def grade(*argv):
        assert odm.main(["grade", *map(str, argv), "--checkpoint", str(DEMO)]) == 0
        return capsys.readouterr()

    said = grade(root)
    rows = list(csv.DictReader(said.out.splitlines()))
    read = [float(row["severity"]) for row in rows]
    assert np.corrcoef(read, truth)[0, 1] > 0.95 and np.abs(np.subtract(read, truth)).mean() < 0.2
    assert [row["given"] for row in rows] == [f"Mayo {g}" for g in range(4)] * 4
    assert all(abs(int(row["grade"][5:]) - s) <= 0.501 for row, s in zip(rows, read))  # the nearest
    assert "16 images, quadratic kappa" in said.err and "mean severity read" in said.err
    one, loose = root / "patient 2" / "Mayo 3" / "a.png", tmp_path / "x.png"
    loose.write_bytes(one.read_bytes())
    said = grade(one, loose)  # read as in other company
    for row in csv.DictReader(said.out.splitlines()):
        assert abs(float(row["severity"]) - read[11]) < 0.002
    assert "no grades to compare with" in said.err


def test_moved_drawings_are_near_their_truth(fresh, tmp_path):
    """A scene can be drawn at any severity: a moved drawing is nearer to that than the given one."""
    given = fresh[0] / "patient 1"
    out = odm.sample(image=given, severity="0:2:1", checkpoint=DEMO, out=tmp_path, sample_steps=15)
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
    assert len(odm.list_files(out)) == 3 * 4  # without the series and the sheet


def test_an_image_drawn_at_its_own_severity_comes_back(fresh, tmp_path):
    file = fresh[0] / "patient 1" / "Mayo 2" / "a.png"
    out = odm.sample(image=file, severity="2", at="2", sample_steps=50, checkpoint=DEMO, out=tmp_path)
    error = odm.read_square(out / "Mayo 2" / "a.png", 32).float() - odm.read_square(file, 32)
    assert error.square().mean().sqrt() < 8  # grey levels


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
    config, batch = drawn(flip=True)
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


def saved_at(out):
    file = out / "checkpoint.pt"
    return file.stat().st_mtime_ns if file.exists() else 0


def test_killed_training_ends_as_if_undisturbed(graded, tmp_path):
    changes = dict(dropout=0.1, steps=60, log_every=20, save_every=5)
    killed, reached = tmp_path / "killed", [0]
    whole = odm.train(settings(graded, tmp_path / "whole", **changes))
    for pause in (0.0, 0.03):
        process = command(HERE / "odm.py", *train_flags(**changes, data=graded, out=killed))
        before = saved_at(killed)
        while saved_at(killed) == before and process.poll() is None:
            time.sleep(0.01)
        time.sleep(pause)
        process.kill()
        process.communicate(timeout=60)
        reached.append(state_of(killed)["step"])
    assert 0 < reached[1] < reached[2] < 60
    with open(killed / "metrics.csv", "a") as file:  # killed after writing rows, before the checkpoint
        file.write(f"{reached[2] + 1},1,1,1,1,,\n")
    assert_same_run(whole, odm.train(settings(graded, killed, **changes)))
    assert metrics_of(whole)["step"].tolist() == list(range(1, 61))


def test_init_starts_from_another_runs_averaged_weights(run, graded, tmp_path):
    other = write_images(tmp_path / "other", {"0": 3, "1": 3, "2": 3})
    start = state_of(run)["ema"]
    for data, classes in ((graded, 4), (other, 3)):  # as many classes, and others
        out = odm.train(settings(data, tmp_path / f"to {classes}", lr=0.0, init=str(run)))
        weights = state_of(out)["model"]
        differing = {name for name in start if not torch.equal(start[name], weights[name])}
        assert differing == (set() if classes == 4 else {"label.weight"})


def test_the_last_sheet_is_drawn_where_a_kill_prevented_it(graded, tmp_path, monkeypatch):
    config = settings(graded, tmp_path)
    monkeypatch.setattr(odm, "draw_images", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        odm.train(config)
    monkeypatch.undo()
    assert state_of(tmp_path)["step"] == 6 and not (tmp_path / "sheet.png").exists()
    odm.train(config)
    assert (tmp_path / "sheet.png").exists()


def test_more_steps_after_a_decay_take_init(graded, tmp_path, capsys):
    odm.train(settings(graded, tmp_path / "a", steps=4, decay=0.5))
    argv = train_flags(data=graded, decay=0.5, steps=8)
    assert "go on with --init" in error_of(capsys, odm.main, *argv, "--out", tmp_path / "a")
    assert odm.main([*argv, "--out", str(tmp_path / "b"), "--init", str(tmp_path / "a")]) == 0


def test_progress_is_said_after_the_first_step_and_its_means_outlive_a_save(graded, tmp_path, capsys):
    odm.train(settings(graded, tmp_path, log_every=6, save_every=1))
    said = [line for line in capsys.readouterr().out.splitlines() if "L_DM" in line]
    assert said[0].startswith("1/6 steps") and re.search(r"\d:\d\d:\d\d left", said[0])
    assert said[-1].startswith("6/6 steps") and f"L_DM {metrics_of(tmp_path)['dm'].mean():.4f}" in said[-1]


def test_training_learns_and_the_ordinal_loss_straightens(tmp_path):
    """The point of it all, on 8 images: with a heavy W estimates come to lie on a line; without, not."""
    data, straight = write_images(tmp_path / "data", {"0": 2, "1": 2, "2": 2, "3": 2}, sides=(8, 8)), []
    for weight in (0.0, 30.0):
        changes = dict(ch=16, steps=120, lr=3e-3, ema=0.9, log_every=120, save_every=120)
        out = odm.train(settings(data, tmp_path / f"{weight}", ordinal=weight, flip=False, **changes))
        rows = metrics_of(out)
        assert rows["dm"][:10].mean() > 0.9 and rows["dm"][-40:].mean() < 0.7
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
        (odm, "dm_loss", diverged, "step 3: the loss is not finite"),
        (torch, "save", full, "free some space"),
        (odm, "total_loss", lambda *_: torch.zeros(2**46), "lower --batch"),  # 256 TiB
        (odm, "total_loss", lambda *_: np.zeros(2**46), "lower --batch"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, failing)
            assert expected in error_of(capsys, odm.main, *train_flags(data=graded, out=tmp_path)), expected
        assert (tmp_path / "checkpoint.pt").read_bytes() == before and sorted(tmp_path.iterdir()) == names


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stop_signals_save_and_say_how_to_go_on(graded, tmp_path, number):
    argv = train_flags(steps=100_000, save_every=100_000, data=graded, out="a b/\u00e9")
    process = command(HERE / "odm.py", *argv, cwd=tmp_path)
    while "steps" not in process.stdout.readline() and process.poll() is None:
        pass
    process.send_signal(number)
    said, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + number and errors == ""
    step = state_of(tmp_path / "a b" / "\u00e9")["step"]
    assert f"stopped and saved at step {step:,}; the same command goes on" in said
    assert metrics_of(tmp_path / "a b" / "\u00e9")["step"][-1] == step


def test_two_processes(graded, tmp_path):
    """They train one network, resume it bit by bit, draw the files that one draws, and say an error once."""
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    changes = dict(dropout=0.1, lr=0.01, warmup=100)
    (tmp_path / "both.py").write_text(f"""
import sys
sys.path.insert(0, {str(HERE)!r})
import odm
settings = {dict(TINY, data=str(graded), **changes)}
for out, steps in (("whole", 4), ("parts", 2), ("parts", 4)):
    odm.train(odm.Config(**dict(settings, out=out, steps=steps)))
odm.sample("whole", n=20, batch=4, out="two")
odm.dist.destroy_process_group()
""")
    said, errors = command(*launch, "both.py", cwd=tmp_path).communicate(timeout=120)
    assert said.count("trained to step 4") == 2 and said.count("20 images are in") == 1, errors
    assert_same_run(tmp_path / "whole", tmp_path / "parts")

    # Losses and gradient of the first step are the means of those that each process would have alone.
    config = settings(dropout=0.1, lr=0.0)
    images, labels, _ = odm.load_images(graded, 8)
    torch.manual_seed(odm.seed_of("weights", 0))
    model = odm.UNet(config, 4).train()
    found, optimizer = [], torch.optim.Adam(model.parameters(), lr=0.0)
    for rank in (0, 1):
        rng = torch.Generator().manual_seed(odm.seed_of("batch", 0, 0, rank))
        batch = odm.draw_batch(labels, (0.0, 1.0, 2.0, 3.0), config, 4, rng)
        torch.manual_seed(odm.seed_of("eps", 0, 0, rank))
        alone = lambda tensors: found.append(torch.cat([tensor.flatten() for tensor in tensors]))
        odm.training_step(model, model, optimizer, images, batch, odm.alpha_bars(config), config, 0, alone)
    losses, gradient = ((found[0] + found[1]) / 2).split([3, len(found[0]) - 3])
    row = metrics_of(tmp_path / "whole")[0]
    expected = [row[name] for name in ("loss", "dm", "ordinal", "grad_norm")]
    assert max_error([*losses, gradient.norm()], expected) < 1e-5

    odm.sample(tmp_path / "whole", n=20, batch=4, out=tmp_path / "one")
    one = pictures(tmp_path / "one")
    assert len(one) == 21 and one == pictures(tmp_path / "two")  # 21: and the sheet
    for argv in (train_flags(data=tmp_path / "absent"),
                 train_flags(data=graded, out=HERE / "odm.py")):  # where only the first process can know
        _, errors = command(*launch, HERE / "odm.py", *argv).communicate(timeout=120)
        ours = f'File "{HERE}'  # a traceback's line, which torchrun's own have too
        assert errors.count("odm.py: error:") == 1 and ours not in errors, errors


# ----------------------------------------------------------------------------------------- data


def classes_of(root, *args, **kwargs):
    """(class names, number of images of each)."""
    _, labels, names = odm.load_images(root, 8, *args, **kwargs)
    return names, labels.bincount(minlength=len(names)).tolist()


def test_limuc_both_layouts_side_by_side(tmp_path, capsys):
    n, by_patient = 0, tmp_path / "patient_based_classified_images"
    for split, counts in (("train_and_validation_sets", (4, 2, 1, 1)), ("test_set", (2, 1, 1, 0))):
        for grade, count in enumerate(counts):
            for n in range(n + 1, n + 1 + count):
                for folder in (tmp_path / split, by_patient / f"{n % 5 + 1}"):
                    write_image(folder / f"Mayo {grade}" / f"UC_patient_{n}_1.bmp", n)
    write_image(tmp_path / "test_set" / "Mayo 1" / "New folder (2)" / "UC_patient_99_1.bmp", 99)
    write_image(by_patient / "7" / "Mayo 2" / "copy" / "UC_patient_98_1.bmp", 98)
    write_image(by_patient / "2" / "Mayo 0" / "Mayo 0" / "UC_patient_97_1.bmp", 97)
    (tmp_path / "test_set" / "Mayo 1" / "._UC_patient_1_1.bmp").write_bytes(b"x")  # of a Mac
    assert classes_of(tmp_path) == (["Mayo 0", "Mayo 1", "Mayo 2", "Mayo 3"], [7, 4, 3, 1])
    assert "12 twins" in capsys.readouterr().out
    assert classes_of(by_patient)[1] == [7, 3, 3, 1]


def test_only_equal_images_of_one_class_and_name_are_twins(tmp_path):
    for folder, seed in (("train/0", 1), ("test/0", 2), ("third/0", 2), ("test/1", 2)):
        write_image(tmp_path / folder / "1.bmp", seed)
    assert classes_of(tmp_path)[1] == [2, 1]  # the second and third of class 0 are one


def test_which_folder_is_the_class_and_in_what_order(tmp_path, capsys):
    def tree(name, counts, order="", refused=""):
        data = write_images(tmp_path / name, counts)
        if refused:
            argv = train_flags(data=data, out=tmp_path / "run", order=order)
            assert refused in error_of(capsys, odm.main, *argv)
        return data

    # A number in the name of a folder above is no grade.
    grades = ("mild", "moderate", "severe")
    folds = tree("folds", {f"fold{i}/{name}": 1 for i in (1, 2, 3) for name in grades}, refused="--order")
    assert classes_of(folds, order="mild,moderate, severe") == (list(grades), [3, 3, 3])
    below = {f"{name}/patient {i}": 1 for i in range(15) for name in ("a", "b")}
    below = tree("below", below, refused="patients, most likely")
    assert classes_of(below, order="b,a") == (["b", "a"], [15, 15])
    patients = tree("patients", {"1/0": 2, "1/1": 1, "2/0": 1, "2/2": 1})
    assert classes_of(patients) == (["0", "1", "2"], [3, 1, 1])
    above = tree("above", {"x/Mayo 0": 1, "x/Mayo 1": 1, "": 1})  # one above the classes: of none
    assert classes_of(above)[1] == [1, 1]
    numbers = tree("numbers", {"grade 10": 1, "grade 9": 1, "grade 2": 1})
    assert classes_of(numbers)[0] == ["grade 2", "grade 9", "grade 10"]
    tree("names", {"No_DR": 2, "Mild": 1}, order="No_DR,Grave", refused="name each of them once")


def test_linked_folders_are_read_and_loops_do_no_harm(tmp_path):
    data = write_images(tmp_path / "data", {"0": 2, "1": 2})
    (data / "5").symlink_to(write_images(tmp_path / "outside", {"5": 3}) / "5")
    (data / "0" / "loop").symlink_to(data)
    (data / "a second name").symlink_to(data / "1")
    assert classes_of(data) == (["0", "1", "5"], [2, 2, 3])
    (data / "1" / "dangling.png").symlink_to(tmp_path / "nothing")
    with pytest.raises(odm.UserError, match="dangling.png"):
        classes_of(data)


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


def test_grades_from_a_csv(tmp_path, capsys):
    for i, stem in enumerate("10_left 10_right 13_left 15_left 16_left 17_left unlisted".split()):
        write_image(tmp_path / "eyepacs" / "eyepacs" / f"{stem}.png", i)
    rows = "0,10_left 0,10_right 4,13_left 2,15_left 1,16_left 3,17_left 0,404_left".split()
    (tmp_path / "trainLabels.csv").write_text("\n".join(["level,image", *rows]))
    images, labels, names = odm.load_images(tmp_path, 8)
    assert names == ["0", "1", "2", "3", "4"] and labels.tolist() == [0, 0, 4, 2, 1, 3]
    assert torch.equal(images[2], odm.read_square(tmp_path / "eyepacs" / "eyepacs" / "13_left.png", 8))
    assert "1 without a class" in capsys.readouterr().out
    (tmp_path / "second.csv").write_text("image,level,Usage\nunlisted.png,3,Public\n10_left\n")
    assert classes_of(tmp_path)[1] == [2, 1, 1, 2, 1]  # both tables count
    (tmp_path / "third.csv").write_text("image,level\n10_left,1\n")
    with pytest.raises(odm.UserError, match="10_left a second grade"):
        classes_of(tmp_path)


def test_a_csv_of_other_columns_goes_before_folders(tmp_path):
    data = write_images(tmp_path, {"a": 2, "b": 1})
    (data / "t.csv").write_text("path,Mayo\na/a_0.png,1\na/a_1,2\nb_0,3\n")
    assert classes_of(data, columns="path,Mayo") == (["1", "2", "3"], [1, 1, 1])
    with pytest.raises(odm.UserError, match="--columns path,grade: no CSV"):
        classes_of(data, columns="path,grade")
    (data / "t.csv").write_text("id_code,diagnosis\na_0,7\nb_0,9\n")  # APTOS'
    assert classes_of(data)[0] == ["7", "9"]


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
    with pytest.raises(odm.UserError, match="float.tif.*32 bits"):
        pixels(Image.fromarray(np.full((2, 2), 1.5, np.float32)), "float.tif")


def damaged(rng, folder):
    """Images of many kinds: cut, a bit turned, a stretch of zeros, another header."""
    pixels, whole = Image.fromarray(rng.integers(0, 256, (40, 48, 3), dtype=np.uint8)), []
    for name, image, options in (
        ("a.png", pixels, {}), ("b.jpg", pixels, {"progressive": True}), ("c.bmp", pixels, {}),
        ("d.tif", pixels, {"compression": "tiff_lzw"}), ("e.webp", pixels, {}), ("f.gif", pixels, {}),
        ("g.jpg", pixels.convert("CMYK"), {}), ("h.png", pixels.resize((1, 5000)), {}),
    ):
        image.save(folder / name, **options)
        whole.append((folder / name).read_bytes())
    for damage, content, _ in itertools.product(range(4), whole, range(9)):
        content, at = bytearray(content), rng.integers(len(content))
        if damage == 0:
            del content[at:]
        elif damage == 1:
            content[at] ^= 1 << rng.integers(8)
        elif damage == 2:
            content[at : at + 64] = bytes(64)
        else:  # where sizes are claimed
            content[rng.integers(40)] = rng.integers(256)
        yield content
    yield from (b"", b"text, no image", b"P6 60000 60000 255\n")


def test_hostile_images_are_read_or_named(tmp_path):
    """Each gives pixels or one line with its name, in bounded memory."""
    read, refused = 0, []
    for i, content in enumerate(damaged(np.random.default_rng(0), tmp_path)):
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
    def draw(name, *args, **kwargs):
        out = odm.sample(run, *args, out=tmp_path / name, eta=1.0, **kwargs)
        return [np.asarray(Image.open(out / "Mayo 2" / f"{i:05d}.png")).astype(int) for i in range(3)]

    few, many = draw("few", "2", n=3, batch=2), draw("many", "all", each=6, batch=5)
    assert np.abs(np.subtract(few, many)).max() <= 1  # the last bit may round the other way
    assert len({image.tobytes() for image in few}) == 3
    assert np.abs(np.subtract(few, draw("other", "2", n=3, seed=1))).max() > 20


def test_the_checkpoint_that_comes_along_draws_rising_severity(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # no runs here
    out = odm.sample(severity="0:3:3", each=5, sample_steps=20)
    assert out == Path("samples/data-demo-4800-series") and DEMO.stat().st_size < 3e6
    for name, median in (("Mayo 0", 0.25), ("Mayo 3", 2.87)):  # of real drawings
        images = [np.array(Image.open(p)).transpose(2, 0, 1) for p in (out / name).glob("*.png")]
        assert abs(np.median(demo.measure(np.stack(images))) - median) < 0.5


def test_severities_on_the_command_line():
    classes = odm.Classes(["Mayo 1", "Mayo 2", "Mayo 3"], [1.0, 2.0, 3.0], [5, 3, 2])
    parse = lambda text: odm.parse_severities(text, classes)
    assert parse("3") == {"Mayo 3": 2.0} and parse("Mayo 2") == {"Mayo 2": 1.0}
    assert parse("1:2:0.25") == {"Mayo 1": 0.0, "1.25": 0.25, "1.5": 0.5, "1.75": 0.75, "Mayo 2": 1.0}
    assert parse("all") == parse("1:3:1") == {"Mayo 1": 0.0, "Mayo 2": 1.0, "Mayo 3": 2.0}
    gap = odm.Classes(["0", "2"], [0.0, 2.0], [1, 1])
    assert odm.parse_severities("1", gap) == {"1": 0.5}  # between two classes, by their severities
    for wrong in ("0", "4", "Mayo 4", "1:2:0", "3:1:1", "1:2:3:4", "1:3", "nan", "", "1:nan:1", "1:3:1e-9"):
        with pytest.raises(odm.UserError, match="--class"):
            parse(wrong)


def test_bad_input_is_one_line_and_status_2(run, graded, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    broken = write_images(tmp_path / "broken", {"0": 1, "1": 1, "2": 1})
    (broken / "1" / "1_0.png").write_bytes(b"")
    damaged = write_images(tmp_path / "damaged", {"0": 1, "1": 1, "2": 1})
    (damaged / "damaged.csv").write_text('image,level\n"' + 200_000 * "x")  # a quote that never ends
    lock = odm.lock_folder(tmp_path / "busy")
    train, sample = train_flags(data=graded, out="x"), ["sample", "--checkpoint", run]
    move = [*sample, "--image", graded]
    for expected, argv in {
        "no such folder": [*train, "--data", "absent"],
        "images of 0 classes": [*train, "--data", broken / "1"],
        "1_0.png: not readable": [*train, "--data", broken],
        "--size 7": [*train, "--size", "7"],
        "--ch: must be a multiple of 4 and of --groups": [*train, "--groups", "3"],
        "--triplets: invalid choice": [*train, "--triplets", "A\nB"],
        "--triplet-part": [*train, "--triplet-part", "0"],
        "another process is writing there": [*train, "--out", "busy"],
        "--ema (there 0.9999, now 0.5)": [*train, "--out", run, "--ema", "0.5"],
        f"{run / 'checkpoint.pt'}: no whole checkpoint": [*train, "--ch", "16", "--init", run],
        "a severity from 0 to 3": [*sample, "--class", "4"],
        "none.pt: no whole checkpoint": ["sample", "--checkpoint", "none.pt"],
        "--at 9": [*move, "--at", "9"],
        "--at 0:2:1: name one severity": [*move, "--at", "0:2:1"],
        "goes without -n": [*move, "-n", "3"],
        "name them with --image": [*sample, "--at", "1"],
        "absent.png": ["grade", "absent.png", "--checkpoint", run],
        "no images in it": ["grade", "empty", "--checkpoint", run],
        "--batch -1: must be from 1": ["grade", graded, "--batch", "-1"],
        "--seed 9223372036854775808: must be from 0": ["grade", graded, "--seed", str(2**63)],
        "-n, --each: a number of images": [*sample, "--each", "-1"],
        "--columns score: name two": [*train, "--columns", "score"],
        "damaged.csv: not readable as a CSV": [*train, "--data", "damaged"],
    }.items():
        assert expected in error_of(capsys, odm.main, *argv), expected
    lock.close()


def test_a_process_that_is_not_the_first_tells_of_its_own_memory(monkeypatch, capsys):
    monkeypatch.setattr(odm, "LOCAL_RANK", 1)
    monkeypatch.setattr(odm, "train", lambda config: np.zeros(2**46))  # 512 TiB
    assert "out of memory" in error_of(capsys, odm.main, "train")


def test_a_row_of_metrics_names_its_step_to_the_last_digit(tmp_path):
    log = odm.Log(tmp_path / "metrics.csv", 0)
    log.pending.append((12_345_678, torch.ones(4), ","))
    assert log.read()[-1] == "12345678,1,1,1,1,,"


class Bomb(str):
    """A path: pickled, it makes that folder where it is loaded."""

    def __reduce__(self):
        return os.mkdir, (str(self),)


def test_damaged_and_hostile_checkpoints_are_refused(run, tmp_path, capsys):
    """Cut, a bit turned, code inside, another network, class names that are paths."""
    whole, state = (run / "checkpoint.pt").read_bytes(), state_of(run)

    evil = tmp_path / "evil.pt"

    def refusal(content) -> str:
        if isinstance(content, dict):
            torch.save(content, evil)
        else:
            evil.write_bytes(content)
        return error_of(capsys, odm.main, "sample", "--checkpoint", evil, "--out", tmp_path / "o")

    turned, bomb = bytearray(whole), Bomb(tmp_path / "it ran")
    turned[len(whole) // 2] ^= 4
    other = {**state, "config": {**state["config"], "ch": 16}}
    for content in (whole[:-2000], turned, pickle.dumps(bomb), {**state, "extra": bomb}, other):
        assert "evil.pt: no whole checkpoint" in refusal(content)
    for name in ("../../x", "/etc/x", "..", "a\\b"):
        state["classes"]["names"][0] = name
        assert "cannot be the name of a folder" in refusal(state)
    assert list(tmp_path.iterdir()) == [evil]


ODM_FLAGS = [odm.flag(f.name) for f in fields(odm.Config) if f.name not in ("data", "device")]
FID_FLAGS = "--dims --weights --size --crop --order -k --batch --json --plot --trained-on --no".split()


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
    (odm.main, ["train", "--data", "absent"], ODM_FLAGS), (fid.main, ["absent", "absent"], FID_FLAGS)])
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


def place(i, severities, size=32):
    """The same place at each severity: uint8 (N, 3, size, size)."""
    return np.stack([demo.draw(s, demo.scene(1, 0, i)[1], size).transpose(2, 0, 1) for s in severities])


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
    Image.new("RGB", (16, 16)).save(tmp_path / "set" / "Mayo 3" / "0000.png")  # another drawing
    with pytest.raises(FileExistsError, match="delete it"):
        demo.make(tmp_path / "set", 17, size=16)



def test_command_line_of_the_drawings(tmp_path, capsys):
    argv = ["--out", str(tmp_path / "set"), "-n", "16", "--size", "16"]
    assert demo.main(argv) == 0 and "Mayo 0 9" in capsys.readouterr().out
    for words in ("-n 3", "--size 8", "--seed -1", "-n many", f"--out {tmp_path}"):
        error = error_of(capsys, demo.main, *argv, *words.split())
        assert all(word in error for word in words.split()), error


# --------------------------------------------------------------------------------------- fid.py


def normal(n, d, seed, dtype=torch.float64):
    return noise(n, d, seed=seed, dtype=dtype)


def test_frechet_closed_forms():
    shift = torch.tensor([1.0, -2.0, 0.0, 0.5, 3.0], dtype=torch.float64)
    x, turn = normal(50, 5, 1), torch.linalg.qr(normal(5, 5, 3)).Q
    assert fid.frechet_distance(x, x) == pytest.approx(0, abs=1e-9)
    assert fid.frechet_distance(x @ turn, (x + shift) @ turn) == pytest.approx(14.25, rel=1e-9)  # |shift|^2
    a, b = np.array([4.0, 1.0, 0.25, 1e-4, 0.0]), np.array([1.0, 9.0, 0.25, 0.0, 2.0])
    found = fid.frechet_distance_from_moments(shift, np.diag(a), 0 * shift, np.diag(b))
    assert found == pytest.approx(14.25 + ((a**0.5 - b**0.5) ** 2).sum(), rel=1e-9)  # root by root


@pytest.mark.parametrize("n, m, d", [(200, 150, 24), (20, 30, 64), (30, 200, 64)])
def test_frechet_against_eigenvalues_of_the_product(n, m, d):
    x, y = (normal(n, d, seed).float() @ normal(d, d, 2).float() + 100 for n, seed in ((n, 1), (m, 3)))
    y = 1.2 * y  # means so large cost statistics in float32 four digits
    mu1, mu2, s1, s2 = *(z.double().mean(0) for z in (x, y)), *(np.cov(z.T.double()) for z in (x, y))
    root = (np.linalg.eigvals(s1 @ s2).real.clip(0) ** 0.5).sum()
    expected = (mu1 - mu2).square().sum().item() + np.trace(s1) + np.trace(s2) - 2 * root
    assert fid.frechet_distance(x, y) == pytest.approx(expected, rel=1e-7)
    assert fid.frechet_distance_from_moments(mu1, s1, mu2, s2) == pytest.approx(expected, rel=1e-7)


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


def test_quadratic_kappa_by_hand():
    # observed cost 8 / 6; by chance: rows 2, 2, 2 and columns 2, 2, 2 -> cost (4 * 1 + 2 * 4) * 4 / 36
    table = torch.tensor([[1, 0, 1], [0, 2, 0], [1, 0, 1]])
    assert odm.quadratic_kappa(table) == pytest.approx(1 - (8 / 6) / (48 / 36))
    assert math.isnan(odm.quadratic_kappa(torch.tensor([[3, 0], [0, 0]])))


def test_ridge_penalty_has_the_least_leave_one_out_error():
    labels, eye = torch.arange(24) % 3, torch.eye(6, dtype=torch.float64)
    x, target = normal(24, 6, 1), (labels[:, None] > torch.arange(2)).double()
    x[:, 0] += labels
    total = ((x - x.mean(0)).square().sum() / 24).item()

    def guess(rows, penalty, asked):  # equal classes: equal weights
        a, b = x[rows] - x[rows].mean(0), target[rows] - target[rows].mean(0)
        slope = torch.linalg.solve(a.T @ a / 24 + penalty * eye, a.T @ b / 24)
        return target[rows].mean(0) + (asked - x[rows].mean(0)) @ slope

    def left_out_error(penalty):  # every fit made anew without the image that is left out
        guesses = [guess(torch.arange(24) != i, penalty, x[i]) for i in range(24)]
        return (target - torch.stack(guesses)).square().sum().item()

    best, asked = min(total * np.logspace(-5, 0, 11), key=left_out_error), 2 * normal(5000, 6, 2)
    expected = (guess(torch.arange(24), best, asked) > 0.5).sum(1)
    assert torch.equal(fid.ridge_classifier(x, labels, 3)(asked), expected)


def test_generated_images_help_a_classifier_or_not():
    direction = torch.nn.functional.normalize(normal(1, 40, 0), dim=1)

    def draw(counts, seed):
        labels = torch.repeat_interleave(torch.arange(4), torch.tensor(counts))
        return normal(len(labels), 40, seed) + 3 * labels[:, None] * direction, labels

    (real, labels), (x, y) = draw([200, 100, 60, 40], 1), draw([12, 6, 4, 2], 2)
    z, asked = draw([80] * 4, 3)
    both, wrong = torch.cat([x, z]), asked[torch.randperm(320, generator=torch.Generator().manual_seed(0))]
    alone = fid.classifier_score(x, y, real, labels, 4)
    helped = fid.classifier_score(both, torch.cat([y, asked]), real, labels, 4)
    spoiled = fid.classifier_score(both, torch.cat([y, wrong]), real, labels, 4)
    assert helped["kappa"] > alone["kappa"] + 0.1 > spoiled["kappa"] + 0.2
    shown = fid.ridge_classifier(x, y, 4)(real)
    assert alone["mean_error"] == pytest.approx((shown - labels).abs().double().mean().item())
    assert alone["top_recall"] == pytest.approx((shown[labels == 3] == 3).double().mean().item())


def test_copies_are_counted():
    known, real, fresh = (normal(n, 32, seed, torch.float32) for n, seed in ((400, 1), (200, 2), (200, 3)))
    fresh[:20] = known[100:120] + 1e-3 * normal(20, 32, 4, torch.float32)
    ratio, places = fid.likeness(fresh, known, real)
    assert (ratio <= 0.5).sum() == 20  # a tenth
    to_known, to_real = (torch.cdist(fresh.double(), x.double()) for x in (known, real))
    assert torch.equal(places, to_known.topk(3, largest=False).indices)
    assert torch.allclose(ratio.double(), to_known.amin(1) / to_real.amin(1), rtol=1e-4)
    one_kind = normal(1, 32, 6, torch.float32) + 0.2 * normal(300, 32, 5, torch.float32)
    assert (fid.likeness(one_kind, known, real)[0] <= 0.5).sum() == 0  # low diversity, but no copies
    assert fid.likeness(known[:4], known, known)[0].tolist() == [1] * 4  # an image of both sets is no copy


def waves(shape, scale):
    return scale * torch.cos(torch.arange(math.prod(shape), dtype=torch.float64) ** 1.5).float().view(shape)


def fill_with_waves(network):
    """Weights that any implementation can be given: the same numbers on every machine."""
    state = {}
    for name, value in network.state_dict().items():
        if name.endswith("conv.weight"):
            state[name] = waves(value.shape, (4 / value[0].numel()) ** 0.5)
        elif name.endswith(("bn.running_var", "bn.weight")):
            state[name] = 1 + waves(value.shape, 0.3)
        elif not name.endswith("num_batches_tracked"):
            state[name] = waves(value.shape, 0.2)
    network.load_state_dict(state, strict=False)
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
    for content in (half, b"<html>Not found</html>", pickle.dumps(Bomb(tmp_path / "it ran"), 2)):
        bad.write_bytes(content)
        with pytest.raises(odm.UserError, match="no network in .*bad.pth.*name it with --weights"):
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
    for sent in (content[:5000], turned):
        served.write_bytes(sent)
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
    """Real images of three grades, what a generator saw, and what several drew, in one folder."""
    root = tmp_path_factory.mktemp("sets")
    sets = {"real": (9, 6, 5), "seen": (9, 6, 5), "dm/deeper": (10, 7, 6), "odm": (3, 4, 5)}
    for seed, name in enumerate(sets):
        for grade, n in enumerate(sets[name]):
            write_images(root / name, {f"Mayo {grade}": n}, 9 * seed + grade, low=60 * grade)
    write_images(root, {"flat": 7})
    write_images(root, {"odm": 2, "odm/1.5": 3})  # no classes of REAL
    write_images(root / "between", {"0.5": 4, "1.5": 4})
    write_images(root / "wide", {"Mayo 0": 4}, sides=(16, 24))
    (root / "dm" / "sample.json").write_text("{}")
    (root / "dm" / "sheet.png").write_bytes((root / "odm" / "1.5" / "1.5_0.png").read_bytes())
    seen = root / "seen" / "Mayo 2" / "Mayo2_1.png"
    (root / "odm" / "Mayo 0" / "Mayo0_0.png").write_bytes(seen.read_bytes())  # a copy
    broken = write_images(root / "broken", {"Mayo 0": 4}) / "Mayo 0" / "Mayo0_2.png"
    broken.write_bytes(b"")
    (root / "empty").mkdir()
    return root


def test_the_report_of_fid(folders, weights_64, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(folders)
    files = {name: tmp_path / f"{name}.png" for name in ("json", "plot", "neighbours")}
    network = ["--dims", "64", "--weights", str(weights_64)]
    words = ["real", "dm", "odm", "flat", *network, "--trained-on", "seen"]
    assert fid.main(words + [f"--{name}={file}" for name, file in files.items()]) == 0
    out, err = capsys.readouterr()
    result = json.loads(files["json"].read_text())
    rows = {(row["generated"], row["class"]): row for row in result["rows"]}
    counts = [(row["generated"], row["n_real"], row["n_fake"]) for row in result["rows"]]
    assert counts == [
        ("dm", 20, 23), ("odm", 20, 12), ("flat", 20, 7),  # of all classes, then of each
        ("dm", 9, 10), ("odm", 9, 3), ("dm", 6, 7), ("odm", 6, 4), ("dm", 5, 6), ("odm", 5, 5),
    ]  # fmt: skip
    assert "odm: passed over, no class of the real images (Mayo 0, Mayo 1, Mayo 2): ., 1.5" in err
    assert all(row["fid_biased"] for row in rows.values()) and out.count("*") == 9 and "biased upward" in out
    assert rows["odm", "Mayo 0"]["fid"] is None and out.count("too few images") == 1
    assert rows["odm", "all"]["copies"] == pytest.approx(1 / 12)
    fitted = [row["fitted_on"] for row in result["classifier"]]
    assert fitted == ["seen", "dm", "seen + dm", "odm", "seen + odm"]

    def look(folder):  # the numbers are those of the functions, on what the folders hold
        images = [odm.read_square(path, 16) for path in sorted((folders / folder).iterdir())]
        return fid.features(images, fid.load_weights(64, str(weights_64)))

    x, y, row = look("real/Mayo 1"), look("dm/deeper/Mayo 1"), rows["dm", "Mayo 1"]
    assert row["fid"] == pytest.approx(fid.frechet_distance(x, y), rel=1e-4)
    assert (row["precision"], row["recall"]) == fid.precision_recall(x, y)
    assert (row["kid"], row["kid_se"]) == pytest.approx(fid.kernel_distance(x, y), rel=1e-3, abs=1e-6)

    bars = np.asarray(Image.open(files["plot"])).astype(int)[10 + 36 :: 60]  # through the middle of each bar
    lengths = [(np.abs(line - (255, 255, 255)).sum(1) > 0).sum() for line in bars]
    values = [row["fid"] for row in result["rows"] if row["fid"] is not None]
    assert np.array(lengths) / max(lengths) == pytest.approx(np.array(values) / max(values), abs=0.003)
    sheet = np.asarray(Image.open(files["neighbours"]))
    assert np.array_equal(sheet[28:156, 4:132], sheet[28:156, 136:264])  # the copy, its original

    assert fid.main(["real", "flat", *network]) == 0
    assert not re.search("classifier|copies:|Mayo 0", capsys.readouterr().out)


def test_bad_input_of_fid_is_one_line_and_status_2(folders, weights_64, capsys, monkeypatch):
    monkeypatch.chdir(folders)
    monkeypatch.setattr(fid, "features", lambda images, *_: torch.rand(len(list(images)), 64))  # quick
    for message, words in {
        "empty: no images in it": "real empty",
        "between: no class of the real images (Mayo 0, Mayo 1, Mayo 2): 0.5, 1.5": "real between",
        "give the real ones' --size": "real wide",
        "Mayo0_2.png: not readable": "real broken --size 16",
        "which --dims 2048 needs": "real dm --dims 2048",
        "none/s.json: must be a file": "real dm --json none/s.json",
        "--neighbours shows images of --trained-on": "real dm --neighbours n.png",
        "--trained-on between: classes": "real dm --trained-on between",
        "--trained-on: REAL must be": "real dm --trained-on real",
        "GENERATED": "real",
    }.items():
        line = error_of(capsys, fid.main, "--dims", 64, "--weights", weights_64, *words.split())
        assert message in line, line


if __name__ == "__main__":
    sys.exit(pytest.main([__file__, "-q"]))
