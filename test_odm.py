# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.5", "numpy", "pillow>=10.1", "scipy", "pytest"]
# ///
"""Tests of odm.py, fid.py and data/demo.py against independent references: closed forms, loops, hand-made cases.

    python test_odm.py
"""

import csv
import hashlib
import http.server
import importlib.util
import itertools
import json
import math
import os
import pickle
import random
import signal
import subprocess
import sys
import threading
import time
import warnings
from dataclasses import replace
from pathlib import Path
from subprocess import PIPE, Popen

import numpy as np
import pytest
import scipy.linalg
import torch
from PIL import Image

import fid
import odm

HERE = Path(__file__).resolve().parent
torch.set_num_threads(1)  # networks of the tests are too small to share
os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that tests start
spec = importlib.util.spec_from_file_location("demo", HERE / "data" / "demo.py")
demo = importlib.util.module_from_spec(spec)
spec.loader.exec_module(demo)
TINY = dict(size=8, ch=8, groups=2, ch_mult=(1, 2), blocks=1, attention=(4,), timesteps=50, batch=8, steps=6, warmup=2,
            lr=1e-3, sample_steps=4, log_every=2, save_every=2, sheet_every=0, device="cpu")


def max_error(a, b) -> float:
    return (torch.as_tensor(a) - torch.as_tensor(b)).abs().max().item()


def noise(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def averaged(checkpoint):
    """(network with its averaged weights, its settings)."""
    path, state = odm.load_checkpoint(checkpoint)
    config = replace(state["config"], precision="float32")
    model = odm.UNet(config, len(state["classes"].names)).eval()
    odm.load_weights(path, (model, state["ema"]))
    return model, config


def write_images(root, names_and_counts, size=(12, 10), seed=0):
    """A tree of class folders with random images; returns root."""
    rng = np.random.default_rng(seed)
    for name, count in names_and_counts.items():
        (root / name).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            pixels = rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / name / f"{name.split('/')[-1].replace(' ', '')}_{i}.png")
    return root


@pytest.fixture(scope="module")
def graded(tmp_path_factory):
    """A small data set of 4 grades, 20 images."""
    return write_images(tmp_path_factory.mktemp("graded"), {"Mayo 0": 9, "Mayo 1": 5, "Mayo 2": 3, "Mayo 3": 3})


@pytest.fixture(scope="module")
def run(graded, tmp_path_factory):
    """A finished tiny run."""
    out = tmp_path_factory.mktemp("runs") / "tiny"
    return odm.train(odm.Config(**TINY, data=str(graded), out=str(out)))


def flags(settings: dict) -> list[str]:
    """Settings as command-line flags."""
    text = lambda value: ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
    return [part for name, value in settings.items() for part in (odm.flag(name), text(value))]


def command(*argv, **kwargs) -> Popen:
    return Popen([sys.executable, *map(str, argv)], stdout=PIPE, stderr=PIPE, text=True, **kwargs)


def error_of(capsys, *argv) -> str:
    """Run the command line, which must fail with status 2 and one line; return the line."""
    try:
        status = odm.main([str(a) for a in argv])
    except SystemExit as exit:
        status = exit.code
    lines = capsys.readouterr().err.strip().splitlines()
    own = [line for line in lines if not argv[0] == "grade" or "error" in line]  # grade says the rest there too
    assert status == 2 and len(own) == 1 and own[0].startswith("odm.py: error: "), (status, lines)
    return own[0]


# ------------------------------------------------------------------------------ forward process


def test_schedule_is_linear_and_starts_at_one():
    table = odm.alpha_bars(odm.Config())
    product, expected = 1.0, [1.0]
    for t in range(1, 1001):
        product *= 1 - ((0.02 - 1e-4) * (t - 1) / 999 + 1e-4)
        expected.append(product)
    assert table.shape == (1001,) and table[0] == 1
    assert max_error(table, torch.tensor(expected, dtype=torch.float64)) < 1e-12


def test_q_sample_is_equation_1_applied_t_times():
    config = odm.Config(timesteps=20)
    alpha_bar = odm.alpha_bars(config)
    x_0 = noise(1, 3, 4, 4, dtype=torch.float64)
    mean, variance = x_0.clone(), 0.0  # Eq. 1 maps N(m, v) to N(sqrt(1 - beta) m, (1 - beta) v + beta)
    for t in range(1, 21):
        beta = (0.02 - 1e-4) * (t - 1) / 19 + 1e-4
        mean, variance = math.sqrt(1 - beta) * mean, (1 - beta) * variance + beta
        at = torch.tensor([t])
        zero, one = torch.zeros_like(x_0), torch.ones_like(x_0)
        assert max_error(odm.q_sample(x_0, at, zero, alpha_bar), mean) < 1e-12
        assert max_error(odm.q_sample(zero, at, one, alpha_bar), math.sqrt(variance) * one) < 1e-12


# --------------------------------------------------------------------------------------- losses


def by_hand(p, q, r, squared=False, share=None):
    """Eq. 5 of one triplet with NumPy; distances are root mean squares, or mean squares."""
    mean_square = lambda a, b: float(np.mean((a.double().numpy() - b.double().numpy()) ** 2))
    pq, qr, pr = (mean_square(a, b) if squared else math.sqrt(mean_square(a, b)) for a, b in ((p, q), (q, r), (p, r)))
    if share is None:
        return (pr - (pq + qr)) ** 2
    return (pq - pr * share) ** 2 + (qr - pr * (1 - share)) ** 2


@pytest.mark.parametrize("distance", ["euclidean", "squared"])
def test_ordinal_loss_equals_a_loop(distance):
    p, q, r = noise(3, 6, 3, 5, 5)
    share = torch.linspace(0.1, 0.9, 6)
    for given in (None, share):
        found = odm.ordinal_loss(p, q, r, distance, given)
        expected = [by_hand(p[g], q[g], r[g], distance == "squared", None if given is None else given[g].item())
                    for g in range(6)]
        assert max_error(found, torch.tensor(expected)) < 1e-5


def line(*at):
    """Estimates at places along one direction, (len(at), 1, 3, 2, 2)."""
    return torch.tensor(at).float().view(-1, 1, 1, 1, 1) * torch.arange(12.0).view(1, 3, 2, 2)


def test_euclidean_is_zero_on_ordered_lines_and_only_there():
    rms = torch.arange(12.0).square().mean().sqrt().item()
    assert odm.ordinal_loss(*line(0, 1, 4)).item() < 1e-9
    assert abs(odm.straightness(line(0, 1, 4).transpose(0, 1)).item() - 1) < 1e-6
    assert odm.ordinal_loss(*line(0, 4, 1)).item() == pytest.approx((6 * rms) ** 2)  # 1 - (4 + 3): out of order
    assert odm.ordinal_loss(*line(0, 1, 4), "squared").item() == pytest.approx((6 * rms**2) ** 2)  # 2 <p-q, q-r>


def test_squared_is_zero_at_the_right_angle_and_positive_between():
    p, q, r = torch.tensor([[[3.0, 0]], [[0.0, 0]], [[0.0, 5]]])
    assert odm.ordinal_loss(p, q, r, "squared").item() == 0
    assert odm.ordinal_loss(p, q, r).item() > 1  # the Euclidean one is not fooled
    for alpha in (0.1, 0.5, 0.9):  # Eq. 7 holds here, yet the printed loss is positive
        between = alpha * p + (1 - alpha) * r
        assert odm.ordinal_loss(p, between, r, "squared").item() > 0.1 and odm.ordinal_loss(p, between, r).item() < 1e-9


def test_spacing_is_zero_only_at_the_severities_own_distances():
    share = torch.tensor([1 / 3])
    assert odm.ordinal_loss(*line(0, 1, 3), share=share).item() < 1e-9
    assert odm.ordinal_loss(*line(0, 1.5, 3), share=share).item() > 1e-2  # on the line, at the wrong place
    assert odm.ordinal_loss(*line(0, 1.5, 3)).item() < 1e-9


@pytest.mark.parametrize("distance, low, high", [("euclidean", 0.99, 1.0001), ("squared", 0.66, 0.76)])
def test_what_the_loss_does_to_free_vectors(distance, low, high):
    """Eq. 7 follows from the Euclidean norm alone; the norm as printed ends at right angles, straightness 0.71."""
    points = noise(64, 3, 16, seed=1).requires_grad_()
    optimizer = torch.optim.Adam([points], lr=0.02)
    for _ in range(600):
        optimizer.zero_grad()
        odm.ordinal_loss(*points.unbind(1), distance).sum().backward()
        optimizer.step()
    assert low < odm.straightness(points).mean().item() < high


def test_gradient_where_estimates_coincide_is_zero_not_nan():
    points = torch.ones(2, 3, 4, requires_grad=True)
    odm.ordinal_loss(*points.unbind(1)).sum().backward()
    assert torch.equal(points.grad, torch.zeros_like(points)) and odm.straightness(points).tolist() == [1, 1]


def test_straightness_of_a_triangle_and_over_the_triplets_of_four_classes():
    triangle = torch.tensor([[[0.0, 0], [1, 0], [0.5, math.sqrt(0.75)]]])
    assert abs(odm.straightness(triangle).item() - 0.5) < 1e-6
    square = torch.tensor([[[0.0, 0], [1, 0], [1, 1], [0, 1]]])
    expected = (math.sqrt(0.5) + 1 / (1 + math.sqrt(2)) + 1 / (1 + math.sqrt(2)) + math.sqrt(0.5)) / 4
    assert abs(odm.straightness(square).item() - expected) < 1e-6


def test_bfloat16_does_not_drown_the_ordinal_loss():
    """At t = 900 the classes' estimates differ by 0.003; rounded throughout, L_ordinal is ten times too large."""
    model, config = averaged(HERE / "data" / "demo.pt")
    frames = [demo.draw(*demo.scene(9, i % 4, i), 32) for i in range(8)]
    x_0 = odm.to_unit(torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2))
    t = torch.full((8,), 900)
    x_t = odm.q_sample(x_0, t, noise(*x_0.shape), odm.alpha_bars(config))

    def loss(precision):
        net = odm.UNet(replace(config, precision=precision), 4).eval()
        net.load_state_dict(model.state_dict())
        with torch.no_grad():
            p, q, r = (net(x_t, t, torch.full_like(t, c)) for c in (0, 1, 3))
        assert p.dtype == torch.float32
        return odm.ordinal_loss(p, q, r).mean().item()

    assert loss("bfloat16") == pytest.approx(loss("float32"), rel=0.5) and loss("bfloat16") != loss("float32")


# ------------------------------------------------------------------------- one step's images

LABELS = torch.tensor([0] * 50 + [1] * 30 + [2] * 15 + [3] * 5)


def drawn(step=0, B=8, severities=(0.0, 1.0, 2.5, 4.0), **changes):
    """(settings, a batch of LABELS)."""
    config = odm.Config(**{**TINY, **changes})
    rng = torch.Generator().manual_seed(odm.seed_of("batch", 0, step))
    return config, odm.draw_batch(LABELS, severities, config, B, rng)


@pytest.mark.parametrize("triplets", ["labels", "images"])
def test_a_triplet_is_three_classes_in_order_with_one_noise(triplets):
    seen = set()
    for step in range(60):
        config, batch = drawn(step, B=32, triplets=triplets, class_dropout=0.2)
        assert len(batch.image) == len(batch.label) == len(batch.root) == 32 + 2 * 8 and batch.triplets.shape == (8, 3)
        assert batch.root[:32].tolist() == list(range(32)) and batch.t.shape == batch.flip.shape == (32,)
        for g, rows in enumerate(batch.triplets):
            assert batch.root[rows].tolist() == [g] * 3 and g in rows  # so that noise, t, flip and mask are one
            shown, own = batch.label[rows].tolist(), LABELS[batch.image[g]].item()
            assert batch.whole[g].item() == (4 not in shown)
            classes = [own if c == 4 else c for c in shown]
            assert classes == sorted(set(classes))
            if triplets == "images":  # each under its own class
                assert LABELS[batch.image[rows]].tolist() == classes
            else:  # one image, under its own class and two others
                assert set(batch.image[rows].tolist()) == {batch.image[g].item()} and own in classes
            p, q, r = (torch.tensor([0.0, 1.0, 2.5, 4.0])[c] for c in classes)
            assert batch.share[g] == (q - p) / (r - p)
            seen.add(tuple(classes))
    assert seen == set(itertools.combinations(range(4), 3))


@pytest.mark.parametrize("triplets", ["labels", "images"])
@pytest.mark.parametrize("balance", ["data", "uniform"])
def test_balance_is_what_the_expectation_of_L_DM_is_taken_over(triplets, balance):
    counts = sum(LABELS[drawn(step, 32, triplets=triplets, balance=balance)[1].image[:32]].bincount(minlength=4)
                 for step in range(600))
    expected = torch.tensor([0.5, 0.3, 0.15, 0.05] if balance == "data" else [0.25] * 4)
    assert max_error(counts / 19_200, expected) < 0.015  # five standard errors


def test_a_coin_for_each_image_and_every_t():
    dropped, times = [], set()
    for step in range(200):
        _, batch = drawn(step, 64, class_dropout=0.25, ordinal=0.0)
        dropped.append((batch.label == 4).double().mean().item())
        times |= set(batch.t.tolist())
    assert abs(np.mean(dropped) - 0.25) < 0.02 and 0.03 < np.std(dropped) < 0.08  # binomial: 0.054
    assert times == set(range(1, 51))


def test_weight_zero_is_the_plain_diffusion_model_bit_by_bit():
    """W = 0, in either reading, against a training step of L_DM written out here; all draw the same images, t and eps."""
    weights = []
    for how in ("labels", "images", "by hand"):
        torch.manual_seed(0)
        config = odm.Config(**{**TINY, "ordinal": 0.0, "triplets": "labels" if how == "by hand" else how})
        model, images = odm.UNet(config, 4).train(), noise(100, 3, 8, 8, seed=3).clamp(-1, 1)
        optimizer, alpha_bar = torch.optim.Adam(model.parameters(), lr=1e-3), odm.alpha_bars(config)
        for step in range(3):
            _, batch = drawn(step, ordinal=0.0, triplets=config.triplets)
            assert len(batch.triplets) == 0 and len(batch.image) == 8
            x_0, eps = images[batch.image], noise(8, 3, 8, 8, seed=10 + step)
            torch.manual_seed(step)  # dropout
            if how == "by hand":
                a = alpha_bar[batch.t][:, None, None, None]
                x_t = a.sqrt().float() * x_0 + (1 - a).sqrt().float() * eps
                label = torch.where(batch.label == 4, 4, LABELS[batch.image])
                loss = ((eps - model(x_t, batch.t, label)) ** 2).flatten(1).mean(1).mean()
            else:
                loss = odm.total_loss(model, x_0, eps, batch, alpha_bar, config)[0]
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        weights.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert torch.equal(weights[0], weights[1]) and torch.equal(weights[0], weights[2])


@pytest.mark.parametrize("triplets", ["labels", "images"])
@pytest.mark.parametrize("spacing", [False, True])
def test_total_loss_is_equation_8(triplets, spacing):
    """Against one image and one triplet at a time, with a model that is a formula."""
    direction, images = noise(5, 3, 8, 8, seed=7), noise(100, 3, 8, 8, seed=8)
    model = lambda x, t, c, root=None: 0.5 * x + direction[c] * (1 + t[:, None, None, None] / 50)
    for step in range(4):
        config, batch = drawn(step, 13, triplets=triplets, spacing=spacing, ordinal=0.7, class_dropout=0.3)
        alpha_bar, eps = odm.alpha_bars(config), noise(13, 3, 8, 8, seed=50 + step)

        def estimate(row):
            root = batch.root[row]
            t = batch.t[root][None]
            return model(odm.q_sample(images[batch.image[row]][None], t, eps[root][None], alpha_bar), t, batch.label[row][None])[0]

        dm = np.mean([((eps[b] - estimate(b)) ** 2).mean().item() for b in range(13)])
        ordinal = 0.0
        for g, rows in enumerate(batch.triplets):
            if 4 not in batch.label[rows]:  # the null class has no place in the order
                share = batch.share[g].item() if spacing else None
                ordinal += batch.t[g].item() / 50 * by_hand(*map(estimate, rows), share=share)
        ordinal /= 3 * 0.7  # a quarter of 13 images, of which 0.7 are whole on average
        found = odm.total_loss(model, images[batch.image], eps, batch, alpha_bar, config)
        for value, expected in zip(found, (dm + 0.7 * ordinal, dm, ordinal)):
            assert abs(value.item() - expected) < 1e-5


def test_the_averaged_gradient_of_two_processes_is_that_of_their_batches_in_one():
    torch.manual_seed(0)
    config = odm.Config(**{**TINY, "dropout": 0.0, "class_dropout": 0.3})
    model, alpha_bar, images = odm.UNet(config, 4).train(), odm.alpha_bars(config), noise(100, 3, 8, 8, seed=1)
    torch.nn.init.normal_(model.conv_out.weight, 0, 0.1)
    (_, one), (_, two) = (drawn(step, 8, class_dropout=0.3) for step in (0, 1))
    parts = [getattr(one, name) for name in vars(one)], [getattr(two, name) for name in vars(two)]
    both = odm.Batch(*(torch.cat(pair) for pair in zip(*parts)))
    R = len(one.image)  # the rows of one, then those of two; total_loss wants the roots first
    both.root[R:] += 8
    both.triplets[2:] += R
    roots_first = torch.cat([torch.arange(8), R + torch.arange(8), torch.arange(8, R), R + torch.arange(8, R)])
    both.image, both.label, both.root = (rows[roots_first] for rows in (both.image, both.label, both.root))
    both.triplets = roots_first.argsort()[both.triplets]
    eps = noise(16, 3, 8, 8, seed=2)

    def gradient(batch, eps):
        loss, *_ = odm.total_loss(model, images[batch.image], eps, batch, alpha_bar, config)
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])

    mean = (gradient(one, eps[:8]) + gradient(two, eps[8:])) / 2
    whole = gradient(both, eps)
    assert one.whole.sum() != two.whole.sum() and whole.abs().max() > 0.01 and max_error(mean, whole) < 1e-6


# ------------------------------------------------------------------------------------- sampling


def falling(T, steps):
    return torch.linspace(T, 0, steps + 1).round().long().tolist()


def gaussian_denoiser(mean, std, alpha_bar):
    """The exact E[eps | x_t] where x_0 ~ N(mean, std^2)."""
    def eps_fn(x, t):
        a = alpha_bar[t].view(-1, *[1] * (x.dim() - 1))
        return (1 - a).sqrt() * (x - a.sqrt() * mean) / (a * std**2 + 1 - a)
    return eps_fn


@pytest.mark.parametrize("eta, steps", [(0.0, 250), (1.0, 1000)])
def test_ddim_with_the_exact_denoiser_of_a_gaussian(eta, steps):
    alpha_bar = odm.alpha_bars(odm.Config())
    x_T, eps_fn = noise(20_000, 1, dtype=torch.float64), gaussian_denoiser(0.3, 0.2, alpha_bar)
    torch.manual_seed(0)
    x_0 = odm.ddim(eps_fn, x_T, alpha_bar, falling(1000, steps), eta, clip=False)
    assert abs(x_0.mean().item() - 0.3) < 0.006 and abs(x_0.std().item() / 0.2 - 1) < 0.02


def test_ddim_encodes_an_image_into_the_noise_that_draws_it_again():
    """Each step back is the step forth undone but for where the noise is asked, so the error falls with the steps."""
    alpha_bar, x_0 = odm.alpha_bars(odm.Config()), noise(500, 1, dtype=torch.float64) * 0.2 + 0.3
    eps_fn, errors = gaussian_denoiser(0.3, 0.2, alpha_bar), []
    for steps in (50, 250, 1000):
        times = falling(1000, steps)
        x_T = odm.ddim(eps_fn, x_0, alpha_bar, times[::-1], clip=False)
        errors.append(max_error(odm.ddim(eps_fn, x_T, alpha_bar, times, clip=False), x_0))
    assert abs(x_T.mean().item()) < 0.1 and abs(x_T.std().item() - 1) < 0.1
    assert errors[0] > 3 * errors[1] > 9 * errors[2] and errors[2] < 0.01
    with pytest.raises(ValueError, match="clip = False"):
        odm.ddim(eps_fn, x_0, alpha_bar, times[::-1])


def test_ddim_where_rounding_leaves_less_than_nothing():
    for changes in (dict(beta_T=0.11), dict(timesteps=100, beta_T=0.8)):  # 1 - alpha_bar_u - sigma^2 is -1e-17
        alpha_bar = odm.alpha_bars(odm.Config(**changes))
        assert odm.ddim(lambda x, t: x, noise(2, 3), alpha_bar, falling(len(alpha_bar) - 1, 2), eta=1.0).isfinite().all()


@pytest.mark.parametrize("steps", [1, 7, 100, 1000])
def test_ddim_starts_at_T_and_lands_on_the_clean_image(steps):
    alpha_bar, times = odm.alpha_bars(odm.Config()), []
    target = torch.tensor([[0.25, -0.5]], dtype=torch.float64)

    def eps_fn(x, t):  # the noise that makes target of x
        times.append(t[0].item())
        return (x - alpha_bar[t].sqrt()[:, None] * target) / (1 - alpha_bar[t]).sqrt()[:, None]

    x_0 = odm.ddim(eps_fn, noise(1, 2, dtype=torch.float64), alpha_bar, falling(1000, steps))
    assert times == falling(1000, steps)[:-1] and max_error(x_0, target) < 1e-9


def test_ancestral_sampling_has_the_mean_of_equation_2():
    alpha_bar, seen = odm.alpha_bars(odm.Config(timesteps=30)), []
    eps_fn = lambda x, t: seen.append((x, t[0].item())) or torch.sin(3 * x)
    odm.ddim(eps_fn, noise(2, 3, dtype=torch.float64), alpha_bar, falling(30, 30), 1.0, False, torch.zeros_like)
    assert [t for _, t in seen] == list(range(30, 0, -1))
    for (x_t, t), (x_next, _) in zip(seen[:-1], seen[1:]):
        beta = (0.02 - 1e-4) * (t - 1) / 29 + 1e-4
        mean = (x_t - beta / (1 - alpha_bar[t]).sqrt() * torch.sin(3 * x_t)) / math.sqrt(1 - beta)
        assert max_error(x_next, mean) < 1e-9


def test_ancestral_noise_has_the_posterior_variance():
    """With eps = 0 a step takes x to x / sqrt(alpha_t) plus sigma_t z; here z = 1."""
    alpha_bar, xs = odm.alpha_bars(odm.Config(timesteps=30)), []
    eps_fn = lambda x, t: xs.append(x.item()) or x * 0
    odm.ddim(eps_fn, torch.zeros(1, dtype=torch.float64), alpha_bar, falling(30, 30), 1.0, False, torch.ones_like)
    for t, (x, x_next) in zip(range(30, 1, -1), zip(xs[:-1], xs[1:])):
        beta = 1 - (alpha_bar[t] / alpha_bar[t - 1]).item()
        sigma = math.sqrt(beta * (1 - alpha_bar[t - 1].item()) / (1 - alpha_bar[t].item()))
        assert abs(x_next - (x / math.sqrt(1 - beta) + sigma)) < 1e-9


class Formula(torch.nn.Module):
    """A stand-in for the U-Net: eps depends on x, t and the class in a known way."""

    num_classes = 4

    def __init__(self):
        super().__init__()
        self.rows = []

    def forward(self, x, t, c, root=None):
        self.rows.append(c.tolist())
        return 0.1 * x + (c**2).float()[:, None, None, None] + 0.01 * t[:, None, None, None]


def test_guidance():
    model, x, t = Formula(), noise(2, 3, 4, 4), torch.tensor([10, 20])
    eps = lambda c: Formula()(x, t, torch.tensor(c))
    position = torch.tensor([1.0, 3.0])
    assert torch.equal(odm.guided_eps(model, x, t, position, 1.0), eps([1, 3]))  # s = 1: the conditional model
    assert model.rows == [[1, 3]]  # and nothing else is evaluated
    assert max_error(odm.guided_eps(model, x, t, position, 0.0), eps([4, 4])) < 1e-6
    assert max_error(odm.guided_eps(model, x, t, position, 2.0), 2 * eps([1, 3]) - eps([4, 4])) < 1e-5
    near = odm.guided_eps(model, x, t, position, 1 + 1e-6)
    assert max_error(near, eps([1, 3])) < 1e-4  # no jump at the neutral scale


def test_a_position_between_two_classes_is_on_the_line_between_their_estimates():
    x, t = noise(2, 3, 4, 4), torch.tensor([10, 20])
    eps = lambda c: Formula()(x, t, torch.tensor(c))
    mixed = odm.guided_eps(Formula(), x, t, torch.tensor([1.25, 2.0]), 2.0)
    eps_c = torch.stack([0.75 * eps([1, 1])[0] + 0.25 * eps([2, 2])[0], eps([2, 2])[1]])
    assert max_error(mixed, 2 * eps_c - eps([4, 4])) < 1e-5


def test_on_a_line_guidance_asks_for_a_severity_beyond():
    """Where estimates are even on a line and the null class sits at m, guidance by s draws severity m + s (c - m)."""

    class Line(torch.nn.Module):
        num_classes = 4

        def forward(self, x, t, c):
            return 0.1 * x + torch.where(c == 4, 0.7, c)[:, None, None, None]  # m = 0.7

    x, t = noise(2, 3, 4, 4), torch.tensor([10, 20])
    guided = odm.guided_eps(Line(), x, t, torch.tensor([1.0, 3.0]), 2.0) - 0.1 * x
    assert max_error(guided, torch.tensor([1.3, 5.3]).view(2, 1, 1, 1).expand(2, 3, 4, 4)) < 1e-6


def test_an_image_is_the_same_in_any_company(run):
    model, config = averaged(run / "checkpoint.pt")
    draw = lambda positions, keys, eta: odm.draw_images(model, positions, keys, replace(config, sample_steps=10, eta=eta))
    for eta in (0.0, 1.0):
        together = draw([0.0, 3.0, 1.5, 2.0], [(0, i) for i in range(4)], eta)
        alone = draw([1.5], [(0, 2)], eta)
        assert (together[2].int() - alone[0].int()).abs().max() <= 1  # the last bit may round the other way
        assert len({image.numpy().tobytes() for image in together}) == 4


# ------------------------------------------------------------------------------ read and move


def test_read_position_is_the_best_of_a_grid():
    """Of all mixes of neighbours, found here by trying 301 of them, for a model whose estimates are no line."""
    alpha_bar, direction, x_0 = odm.alpha_bars(odm.Config()), noise(4, 3, 6, 6, seed=3), noise(5, 3, 6, 6, seed=4)

    class Model:
        num_classes = 4

        def __call__(self, x, t, c):
            return 0.6 * x + 0.3 * direction[c] * x.square()

    grid, loss = torch.linspace(0, 3, 301), torch.zeros(5, 301)
    rng = torch.Generator().manual_seed(0)
    for share in (0.1, 0.6):
        t, drawn, errors = torch.full((5,), round(1000 * share)), torch.randn(1, 3, 6, 6, generator=rng), []
        for eps in (drawn, -drawn):
            x_t = odm.q_sample(x_0, t, eps, alpha_bar)
            for position in grid:
                errors.append((eps - odm.guided_eps(Model(), x_t, t, position.expand(5), 1.0)).square().flatten(1).mean(1))
        errors = torch.stack(errors, 1).view(5, 2, 301).mean(1)
        loss += errors / errors[:, ::100].mean(1, keepdim=True)
    found = odm.read_position(Model(), x_0, alpha_bar, shares=(0.1, 0.6))
    assert max_error(found, grid[loss.argmin(1)]) < 0.006 and found.unique().numel() > 3


def test_read_position_with_exact_denoisers_of_gaussians_on_a_line_is_the_projection():
    """Class c: N(m + c v, s^2). What x_0 has beside the line, and eps, whose mirror is used too, does not matter."""
    alpha_bar, m, v = odm.alpha_bars(odm.Config()), noise(1, 3, 4, 4, seed=1), noise(1, 3, 4, 4, seed=2)

    class Exact:
        num_classes = 4

        def __call__(self, x, t, c):
            return gaussian_denoiser(m + c[:, None, None, None] * v, 0.5, alpha_bar)(x, t)

    x_0 = m + torch.tensor([-1.0, 0.0, 0.4, 1.7, 3.0, 5.0]).view(-1, 1, 1, 1) * v + noise(6, 3, 4, 4, seed=3)
    projection = ((x_0 - m) * v).flatten(1).sum(1) / v.square().sum()
    assert max_error(odm.read_position(Exact(), x_0, alpha_bar), projection.clamp(0, 3)) < 1e-4
    same = lambda x, t, c: 0 * x
    same.num_classes = 3
    assert odm.read_position(same, x_0, alpha_bar).tolist() == [0] * 6  # classes that coincide


@pytest.fixture(scope="module")
def fresh(tmp_path_factory):
    """Four drawings of each grade that demo.pt has not seen, and their severities."""
    root = tmp_path_factory.mktemp("fresh")
    scenes = [(grade, i) for grade in range(4) for i in range(4)]
    for grade, i in scenes:
        (root / f"Mayo {grade}").mkdir(exist_ok=True)
        Image.fromarray(demo.draw(*demo.scene(99, grade, i))).save(root / f"Mayo {grade}" / f"{i}.png")
    return root, [demo.scene(99, *scene)[0] for scene in scenes]


def test_grade_reads_the_severity_of_fresh_drawings(fresh, tmp_path, capsys):
    root, truth = fresh
    argv = ["grade", root, "--checkpoint", HERE / "data" / "demo.pt"]
    assert odm.main([str(a) for a in [*argv, "--out", tmp_path / "grades.csv"]]) == 0
    said = capsys.readouterr()
    rows = list(csv.DictReader(open(tmp_path / "grades.csv")))
    read = [float(row["severity"]) for row in rows]
    assert np.corrcoef(read, truth)[0, 1] > 0.95 and np.abs(np.subtract(read, truth)).mean() < 0.2
    assert [row["given"] for row in rows] == [f"Mayo {g}" for g in range(4) for _ in range(4)]
    assert sum(row["grade"] == row["given"] for row in rows) >= 14
    assert said.out == "" and "16 images, quadratic kappa" in said.err and "mean severity read" in said.err
    one = root / "Mayo 2" / "3.png"  # alone, it is read as in company
    assert odm.main([str(a) for a in ["grade", one, *argv[2:]]]) == 0
    printed = list(csv.DictReader(capsys.readouterr().out.splitlines()))
    assert len(printed) == 1 and abs(float(printed[0]["severity"]) - read[11]) < 0.002
    loose = tmp_path / "x.png"
    loose.write_bytes(one.read_bytes())
    assert odm.main(["grade", str(loose), str(one), *map(str, argv[2:])]) == 0
    assert "no grades to compare with" in capsys.readouterr().err


def test_moved_drawings_are_near_their_truth(fresh, tmp_path):
    """A drawing's scene can be drawn at any severity: the moved one is nearer to that than the given one."""
    root, truth = fresh
    folder = tmp_path / "given"
    scenes = [(grade, i) for grade in range(4) for i in range(2)]
    for grade, i in scenes:
        (folder / f"{grade}").mkdir(parents=True, exist_ok=True)
        (folder / f"{grade}" / f"{i}.png").write_bytes((root / f"Mayo {grade}" / f"{i}.png").read_bytes())
    out = odm.sample(image=folder, severity="0:2:1", checkpoint=HERE / "data" / "demo.pt", out=tmp_path / "moved", sample_steps=25)
    pixels = lambda path: odm.read_square(path, 32).float() / 127.5 - 1
    rms = lambda a, b: (a - b).square().mean().sqrt().item()
    for target in range(3):
        moved, unmoved = [], []
        for grade, i in scenes:
            state = demo.scene(99, grade, i)[1]
            Image.fromarray(demo.draw(target, state)).save(tmp_path / "truth.png")
            moved.append(rms(pixels(out / f"Mayo {target}" / f"{grade}-{i}.png"), pixels(tmp_path / "truth.png")))
            unmoved.append(rms(pixels(folder / f"{grade}" / f"{i}.png"), pixels(tmp_path / "truth.png")))
        assert np.mean(moved) < 0.8 * np.mean(unmoved), target
    with Image.open(out / "series.gif") as series:
        assert series.n_frames == 4  # 0, 1, 2, 1


def test_an_image_drawn_at_its_own_severity_comes_back(fresh, tmp_path):
    root, _ = fresh
    for grade in (0, 2):
        out = odm.sample(image=root / f"Mayo {grade}" / "0.png", severity=str(grade), at=str(grade), sample_steps=50,
                         checkpoint=HERE / "data" / "demo.pt", out=tmp_path / "back")
        back, given = odm.read_image(out / f"Mayo {grade}" / "0.png"), odm.read_square(root / f"Mayo {grade}" / "0.png", 32)
        error = np.asarray(back).transpose(2, 0, 1) - given.numpy().astype(float)
        assert np.sqrt((error**2).mean()) < 8  # grey levels


def test_bad_images_to_read_or_move(run, fresh, tmp_path, capsys):
    root, _ = fresh
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad.png").write_bytes(b"no image")
    model = ["--checkpoint", run]
    for expected, argv in {
        "absent.png": ["grade", tmp_path / "absent.png", *model],
        "no images in it": ["grade", tmp_path / "empty", *model],
        "bad.png: not readable": ["sample", "--image", tmp_path / "bad.png", *model],
        "--at 9": ["sample", "--image", root, "--at", "9", *model],
        "not with -n": ["sample", "--image", root, "-n", "3", *model],
        "--guidance or --eta": ["sample", "--image", root, "--guidance", "2", *model],
        "goes with --at": ["sample", "--at", "1", *model],
    }.items():
        assert expected in error_of(capsys, *argv), expected


# ---------------------------------------------------------------------------------------- U-Net


def test_unet_has_the_published_number_of_parameters():
    for size, config in ((64, odm.Config()), (32, odm.Config(size=32))):
        model = odm.UNet(config, 4)
        assert sum(p.numel() for p in model.parameters()) - model.label.weight.numel() == 35_746_307, size
        assert model.label.weight.shape == (5, 512)
        assert {m.num_groups for m in model.modules() if isinstance(m, torch.nn.GroupNorm)} == {32}


def test_attention_is_at_16_and_in_the_middle():
    model, sides = odm.UNet(odm.Config(ch=8, groups=2), 4), []
    for module in model.modules():
        if isinstance(module, odm.Attention):
            module.register_forward_hook(lambda m, args, out: sides.append(out.shape[-1]))
    model(noise(1, 3, 64, 64), torch.tensor([1]), torch.tensor([0]))
    assert sides == [16, 16, 8, 16, 16, 16]  # 2 on the way down, the middle, 3 on the way up


def test_unet_output_is_near_zero_at_first_and_depends_on_all_its_inputs_later():
    torch.manual_seed(0)
    model = odm.UNet(odm.Config(**TINY), 4).eval()
    x, t, c = noise(1, 3, 8, 8), torch.tensor([5]), torch.tensor([1])
    assert 0 < model(x, t, c).abs().max() < 1e-3
    for p in model.parameters():
        torch.nn.init.normal_(p, 0, 0.1)
    out = model(x, t, c)
    for other in (model(x + 0.1, t, c), model(x, t + 1, c), model(x, t, c + 3)):
        assert max_error(out, other) > 1e-4


def test_downsampling_pads_right_and_below_only():
    down = odm.UNet(odm.Config(**{**TINY, "ch": 4, "groups": 1}), 4).down[1]
    down[1] = conv = torch.nn.Conv2d(1, 1, 3, stride=2, bias=False)
    torch.nn.init.zeros_(conv.weight)
    with torch.no_grad():
        conv.weight[0, 0, 0, 0] = 1  # picks the upper left pixel of each 3x3 window
    x = torch.arange(16.0).view(1, 1, 4, 4)
    assert down(x).view(-1).tolist() == [0, 2, 8, 10]
    with torch.no_grad():
        conv.weight[0, 0] = torch.tensor([[0, 0, 0], [0, 0, 0], [0, 0, 1.0]])  # the lower right one
    assert down(x).view(-1).tolist() == [10, 0, 0, 0]


def test_time_embedding():
    e = odm.time_embedding(torch.tensor([7]), 6)[0]
    expected = [f(7 * math.exp(-i * math.log(10000) / 2)) for f in (math.sin, math.cos) for i in range(3)]
    assert max_error(e, torch.tensor(expected)) < 1e-5


def test_the_rows_of_a_root_share_their_dropout_mask():
    torch.manual_seed(0)
    drop, h, root = odm.Dropout(0.3), torch.ones(3, 4, 50, 50), torch.tensor([0, 1, 1])
    out = drop(h, root)
    assert torch.equal(out[1], out[2]) and not torch.equal(out[0], out[1])
    assert abs((out == 0).float().mean().item() - 0.3) < 0.02 and max_error(out[out > 0], 1 / 0.7) < 1e-6
    assert torch.equal(drop.eval()(h, root), h)


# ------------------------------------------------------------------------------------- training


def test_averaged_weights_in_closed_form():
    """Over steps 0, 1, ... of training itself, with m = min(ema, (n + 1) / (n + 10)) after step n = 1, 2, ..."""
    config = odm.Config(**{**TINY, "ema": 0.4, "lr": 0.01})
    model, images = odm.UNet(config, 4), torch.randint(0, 256, (100, 3, 8, 8), dtype=torch.uint8)
    ema, optimizer = odm.copy.deepcopy(model), torch.optim.Adam(model.parameters())
    expected, rates = [p.detach().clone() for p in ema.parameters()], []
    for step in range(8):
        odm.training_step(model, ema, optimizer, images, drawn(step)[1], odm.alpha_bars(config), config, step)
        m = min(0.4, (2 + step) / (11 + step))
        rates.append(m)
        expected = [m * e + (1 - m) * p.detach() for e, p in zip(expected, model.parameters())]
    assert max(max_error(e, p) for e, p in zip(expected, ema.parameters())) < 1e-6
    assert rates[0] == 2 / 11 and rates[-1] == 0.4  # both branches were taken


def state_of(out):
    return torch.load(out / "checkpoint.pt", weights_only=True)


def flat(state, part):
    if part == "optimizer":
        return torch.cat([torch.as_tensor(v).flatten().double() for s in state[part]["state"].values() for v in s.values()])
    return torch.cat([v.flatten().double() for v in state[part].values()])


@pytest.mark.parametrize("triplets", ["labels", "images"])
def test_resumed_training_equals_undisturbed_training(graded, tmp_path, triplets, capsys):
    config = odm.Config(**{**TINY, "dropout": 0.1, "triplets": triplets}, data=str(graded))
    odm.train(replace(config, out=str(tmp_path / "whole")))
    odm.train(replace(config, out=str(tmp_path / "parts"), steps=2))
    odm.train(replace(config, out=str(tmp_path / "parts"), steps=4))
    with open(tmp_path / "parts" / "metrics.csv", "a") as file:  # as if killed after a row, inside the next
        file.write("5,1,1,1,1,,\n6,1,")
    odm.train(replace(config, out=str(tmp_path / "parts")))
    assert "step 4 of 6" in capsys.readouterr().out
    whole, parts = state_of(tmp_path / "whole"), state_of(tmp_path / "parts")
    for part in ("model", "ema", "optimizer"):
        assert torch.equal(flat(whole, part), flat(parts, part)), part
    assert (tmp_path / "whole" / "metrics.csv").read_bytes() == (tmp_path / "parts" / "metrics.csv").read_bytes()
    rows = (tmp_path / "whole" / "metrics.csv").read_text().splitlines()
    assert [r.split(",")[0] for r in rows] == ["step", *map(str, range(1, 7))]


def test_the_learning_rate_rises_stays_and_falls(graded, tmp_path):
    rates = lambda **changes: [odm.learning_rate(odm.Config(lr=1.0, steps=8, **changes), step) for step in range(8)]
    assert rates(warmup=0) == [1] * 8 and rates(warmup=2) == [0.5] + [1] * 7
    assert rates(warmup=2, decay=0.5) == [0.5, 1, 1, 1, 1, 0.75, 0.5, 0.25]
    assert rates(warmup=0, decay=1.0) == [1, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125]
    config = odm.Config(**{**TINY, "lr": 1e-3, "warmup": 2, "decay": 0.5}, data=str(graded), out=str(tmp_path / "run"))
    for steps, part in ((4, 0.5), (8, 0.25)):  # a run that goes on with more steps
        odm.train(replace(config, steps=steps))
        state = state_of(tmp_path / "run")
        assert state["step"] == steps and state["optimizer"]["param_groups"][0]["lr"] == pytest.approx(1e-3 * part)


def test_another_setting_does_not_resume(run, graded, capsys):
    line = error_of(capsys, "train", *flags(TINY), "--data", graded, "--out", run, "--ema", "0.5", "--triplets", "images")
    assert "--ema (there 0.9999, now 0.5)" in line and "--triplets (there labels, now images)" in line


def test_init_starts_from_another_runs_averaged_weights(run, graded, tmp_path, capsys):
    other = write_images(tmp_path / "other", {"0": 3, "1": 3, "2": 3})
    start = odm.load_checkpoint(run)[1]["ema"]
    for data, classes in ((graded, 4), (other, 3)):  # as many classes, and others
        config = odm.Config(**{**TINY, "lr": 0.0}, data=str(data), init=str(run), out=str(tmp_path / f"to {classes}"))
        state = state_of(odm.train(config))
        same = [torch.equal(start[name], state["model"][name]) for name in start if name != "label.weight"]
        assert all(same) and state["model"]["label.weight"].shape == (classes + 1, 32)
        assert torch.equal(state["model"]["label.weight"], start["label.weight"]) == (classes == 4)
    line = error_of(capsys, "train", *flags({**TINY, "ch": 16}), "--data", graded, "--init", run, "--out", tmp_path / "x")
    assert str(run) in line and "--ch" in line


def test_the_last_sheet_is_drawn_where_a_kill_prevented_it(graded, tmp_path, monkeypatch):
    config = odm.Config(**TINY, data=str(graded), out=str(tmp_path / "run"))
    with monkeypatch.context() as patch:
        patch.setattr(odm, "draw_sheet", lambda *args: os.abort if 0 else 1 / 0)
        with pytest.raises(ZeroDivisionError):
            odm.train(config)
    assert state_of(tmp_path / "run")["step"] == 6 and not (tmp_path / "run" / "sheet.png").exists()
    odm.train(config)
    assert (tmp_path / "run" / "sheet.png").exists() and (tmp_path / "run" / "sheets" / "000006.png").exists()


def test_progress_is_said_after_the_first_step_and_its_means_outlive_a_save(graded, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(odm.Progress, "due", lambda self, done: True)
    odm.train(odm.Config(**{**TINY, "log_every": 6, "save_every": 1}, data=str(graded), out=str(tmp_path / "run")))
    said = [line for line in capsys.readouterr().out.splitlines() if "L_DM" in line]
    dm = np.genfromtxt(tmp_path / "run" / "metrics.csv", delimiter=",", names=True)["dm"]
    assert said[0].startswith("1/6 steps") and "minutes left" in said[0]
    for n in range(1, 7):
        assert f"L_DM {dm[:n].mean():.4f}" in said[n - 1]


@pytest.mark.parametrize("changes", [dict(), dict(triplets="images"), dict(ordinal=0.0), dict(spacing=True)])
def test_loss_falls_when_overfitting_8_images(tmp_path, changes):
    data = write_images(tmp_path / "data", {"0": 2, "1": 2, "2": 2, "3": 2}, size=(8, 8))
    config = odm.Config(**{**TINY, "ch": 16, "steps": 160, "lr": 3e-3, "dropout": 0.0, "log_every": 80,
                           "save_every": 160, **changes}, data=str(data), out=str(tmp_path / "run"), flip=False)
    odm.train(config)
    rows = np.genfromtxt(tmp_path / "run" / "metrics.csv", delimiter=",", names=True)
    assert rows["dm"][:10].mean() > 0.9 and rows["dm"][-40:].mean() < 0.65
    assert np.allclose(rows["loss"], rows["dm"] + config.ordinal * rows["ordinal"], atol=1e-5)


def test_the_ordinal_loss_straightens_a_network(tmp_path, graded):
    """The point of it all, on a small scale: with a heavy W the estimates come to lie on a line; without, they don't."""
    straight = {}
    for weight in (0.0, 30.0):
        config = odm.Config(**{**TINY, "steps": 60, "lr": 4e-3, "ordinal": weight, "triplet_part": 1.0,
                               "ema": 0.9, "log_every": 60, "save_every": 60}, data=str(graded), out=str(tmp_path / f"{weight}"))
        odm.train(config)
        rows = np.genfromtxt(tmp_path / f"{weight}" / "metrics.csv", delimiter=",", names=True)
        straight[weight] = rows["straightness"][-1]
    assert straight[30.0] > straight[0.0] + 0.1


def test_uint8_round_trip_and_rounding():
    every = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(odm.to_uint8(odm.to_unit(every)), every)
    assert odm.to_uint8(torch.tensor([-3.0, 3.0, 100.6 / 127.5 - 1])).tolist() == [0, 255, 101]


# ----------------------------------------------------------------------------------------- data


def bmp(path, seed, size=(352, 288)):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


def classes_of(root, *args, **kwargs):
    """(class names, number of images of each)."""
    _, labels, names = odm.load_images(root, 8, *args, **kwargs)
    return names, labels.bincount(minlength=len(names)).tolist()


def test_limuc_both_layouts_side_by_side(tmp_path, capsys):
    n = 0
    by_patient = tmp_path / "patient_based_classified_images"
    for split, counts in (("train_and_validation_sets", (4, 2, 1, 1)), ("test_set", (2, 1, 1, 0))):
        for grade, count in enumerate(counts):
            (tmp_path / split / f"Mayo {grade}").mkdir(parents=True)
            for _ in range(count):
                n += 1
                for folder in (tmp_path / split, by_patient / f"{n % 5 + 1}"):
                    bmp(folder / f"Mayo {grade}" / f"UC_patient_{n}_1.bmp", n)
    bmp(tmp_path / "test_set" / "Mayo 1" / "New folder (2)" / "UC_patient_99_1.bmp", 99)
    bmp(by_patient / "7" / "Mayo 2" / "copy" / "UC_patient_98_1.bmp", 98)
    bmp(by_patient / "2" / "Mayo 0" / "Mayo 0" / "UC_patient_97_1.bmp", 97)
    (tmp_path / "test_set" / "Mayo 0" / "Thumbs.db").write_bytes(b"x")
    (tmp_path / "__MACOSX").mkdir()
    (tmp_path / "__MACOSX" / "._UC_patient_1_1.bmp").write_bytes(b"x")
    assert classes_of(tmp_path) == (["Mayo 0", "Mayo 1", "Mayo 2", "Mayo 3"], [7, 4, 3, 1])
    assert "12 files that are there twice" in capsys.readouterr().out
    assert classes_of(by_patient)[1] == [7, 3, 3, 1]
    images, labels, _ = odm.load_images(by_patient, 64)
    assert images.shape == (14, 3, 64, 64) and images.dtype == torch.uint8 and labels.dtype == torch.long


def test_which_folder_is_the_class(tmp_path, capsys):
    folds = write_images(tmp_path / "folds", {f"fold{i}/{name}": 1 for i in (1, 2, 3) for name in ("mild", "moderate", "severe")})
    patients = write_images(tmp_path / "p", {f"patient {i}/{name}": 1 for i in range(3) for name in ("No_DR", "Severe")})
    for data in (folds, patients):  # a number in the name of a folder above is no grade
        assert "--order" in error_of(capsys, "train", "--data", data, "--out", tmp_path / "x")
    assert classes_of(folds, order="mild,moderate, severe") == (["mild", "moderate", "severe"], [3, 3, 3])
    below = write_images(tmp_path / "below", {f"{name}/patient {i}": 1 for i in range(15) for name in ("a", "b")})
    assert "patients, most likely" in error_of(capsys, "train", "--data", below, "--out", tmp_path / "x")
    assert classes_of(below, order="b,a") == (["b", "a"], [15, 15])
    numbers = write_images(tmp_path / "numbers", {"1/0": 2, "1/1": 1, "2/0": 1, "2/2": 1})  # patient/grade
    assert classes_of(numbers) == (["0", "1", "2"], [3, 1, 1])
    (tmp_path / "above").mkdir()
    bmp(write_images(tmp_path / "above", {"x/Mayo 0": 1, "x/Mayo 1": 1}) / "overview.bmp", 1, (8, 8))
    assert classes_of(tmp_path / "above")[1] == [1, 1] and "1 images without a class" in capsys.readouterr().out


def test_only_equal_images_of_one_class_and_name_are_twins(tmp_path):
    for folder, seed in (("train/0", 1), ("test/0", 2), ("third/0", 2), ("test/1", 2)):
        bmp(tmp_path / folder / "1.bmp", seed, (8, 8))
    assert classes_of(tmp_path)[1] == [2, 1]  # the second and third of class 0 are one


def test_linked_folders_are_read_and_loops_do_no_harm(tmp_path, capsys):
    data = write_images(tmp_path / "data", {"0": 2, "1": 2})
    (tmp_path / "links").mkdir()
    for grade in ("0", "1"):
        (tmp_path / "links" / grade).symlink_to(data / grade)
    assert classes_of(tmp_path / "links")[1] == [2, 2]
    (data / "0" / "loop").symlink_to(data)
    (data / "a second name").symlink_to(data / "1")
    (data / "5").symlink_to(write_images(tmp_path / "outside", {"5": 3}) / "5")
    assert classes_of(data) == (["0", "1", "5"], [2, 2, 3])
    (data / "1" / "dangling.png").symlink_to(tmp_path / "nothing")
    assert "dangling.png" in error_of(capsys, "train", "--data", data, "--out", tmp_path / "x")


def test_crop_is_the_middle_128_of_a_frame_and_the_middle_square_of_others(tmp_path):
    def square(image, *args):
        image.save(tmp_path / "image.png")
        return odm.read_square(tmp_path / "image.png", *args)

    x, y = np.meshgrid(np.arange(352), np.arange(288))
    frame = Image.fromarray(np.stack([x % 256, y % 256, 0 * x], -1).astype(np.uint8))
    middle = square(frame, 128)
    assert middle[0, 0, [0, -1]].tolist() == [112, 239] and middle[1, [0, -1], 0].tolist() == [80, 207]
    assert square(frame.crop((0, 0, 100, 60)), 60)[0, 0].tolist() == list(range(20, 80))
    assert square(frame.crop((0, 0, 100, 60)), 10, 10)[0, 0].tolist() == list(range(45, 55))
    checker = Image.fromarray((np.indices((64, 64)).sum(0) % 2 * 255).astype(np.uint8))
    assert (square(checker, 8)[:, 2:-2, 2:-2].float() - 127.5).abs().max() < 3  # antialiased


def test_grades_from_a_csv(tmp_path, capsys):
    folder = tmp_path / "eyepacs_preprocess" / "eyepacs_preprocess"
    folder.mkdir(parents=True)
    levels = {"10_left": 0, "10_right": 0, "13_left": 4, "15_left": 2, "16_left": 1, "17_left": 3, "404_left": 0}
    (tmp_path / "trainLabels.csv").write_text("level,image\n" + "".join(f"{v},{k}\n" for k, v in levels.items()))
    (tmp_path / "notes.csv").write_text("a,b\n1,2\n")
    for i, stem in enumerate(list(levels)[:-1]):
        Image.new("RGB", (20, 16), (i * 10, 0, 0)).save(folder / f"{stem}.jpeg")
    Image.new("RGB", (20, 16)).save(folder / "unlisted.jpeg")
    images, labels, names = odm.load_images(tmp_path, 16)
    assert names == ["0", "1", "2", "3", "4"] and labels.tolist() == [0, 0, 4, 2, 1, 3]
    assert abs(int(images[2, 0].float().mean()) - 20) <= 2  # 13_left
    said = capsys.readouterr().out
    assert "1 of the 7 images in the CSV are missing" in said and "1 images without a class" in said
    (tmp_path / "second.csv").write_text("image,level,Usage\nunlisted.jpeg,3,Public\n10_left\n")
    assert classes_of(tmp_path)[1] == [2, 1, 1, 2, 1]  # both tables count
    (tmp_path / "third.csv").write_text("image,level\n10_left,1\n")
    assert "10_left" in error_of(capsys, "train", "--data", tmp_path, "--out", tmp_path / "x")

    other = write_images(tmp_path / "other", {"a": 2, "b": 1})
    (other / "t.csv").write_text("path,Mayo\na/a_0.png,1\na/a_1,2\nb_0,3\n")
    assert classes_of(other, columns="path,Mayo") == (["1", "2", "3"], [1, 1, 1])
    assert "no CSV with path,grade" in error_of(capsys, "train", "--data", other, "--columns", "path,grade")
    (other / "t.csv").write_text("id_code,diagnosis\nc,1\n")  # APTOS'
    assert "lists an image that is there" in error_of(capsys, "train", "--data", other)


def test_order_is_by_number_or_asked_for(tmp_path, capsys):
    data = write_images(tmp_path / "numbers", {"grade 10": 1, "grade 9": 1, "grade 2": 1})
    assert classes_of(data)[0] == ["grade 2", "grade 9", "grade 10"]
    data = write_images(tmp_path / "names", {"No_DR": 2, "Mild": 1, "Moderate": 1})
    line = error_of(capsys, "train", "--data", data, "--out", tmp_path / "x")
    assert "--order" in line and "Mild, Moderate, No_DR" in line
    assert classes_of(data, order="No_DR,Mild,Moderate")[0] == ["No_DR", "Mild", "Moderate"]
    assert "name each of them once" in error_of(capsys, "train", "--data", data, "--order", "No_DR,Mild,Grave")
    write_images(tmp_path / "twice", {"grade 1": 1, "class 1": 1, "grade 2": 1})
    assert "--order" in error_of(capsys, "train", "--data", tmp_path / "twice")


def test_pixels_are_read_right(tmp_path):
    def pixel(name, at=(0, 0)):
        return odm.read_image(tmp_path / name).getpixel(at)

    Image.fromarray(np.array([[0, 32896, 65535]], np.uint16)).save(tmp_path / "sixteen.png")
    assert [pixel("sixteen.png", (i, 0)) for i in range(3)] == [(0,) * 3, (128,) * 3, (255,) * 3]
    palette = Image.new("P", (2, 2), 1)
    palette.putpalette([0, 0, 0, 10, 200, 30])
    palette.save(tmp_path / "palette.png")
    assert pixel("palette.png") == (10, 200, 30)
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(tmp_path / "cmyk.jpg", quality=95)
    assert np.abs(np.subtract(pixel("cmyk.jpg"), (255, 0, 0))).max() < 12
    turned = Image.new("RGB", (4, 2), "white")
    turned.putpixel((0, 0), (255, 0, 0))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned 90 degrees clockwise
    turned.save(tmp_path / "turned.png", exif=exif)
    upright = odm.read_image(tmp_path / "turned.png")
    assert upright.size == (2, 4) and upright.getpixel((1, 0)) == (255, 0, 0)
    Image.fromarray(np.full((2, 2), 1.5, np.float32)).save(tmp_path / "float.tif")
    with pytest.raises(odm.UserError, match="float.tif.*32 bits"):
        odm.read_image(tmp_path / "float.tif")
    Image.new("1", (2, 2), 1).save(tmp_path / "bits.png")
    (tmp_path / "really.jpg").write_bytes((tmp_path / "bits.png").read_bytes())  # a PNG by another name
    assert pixel("really.jpg") == (255, 255, 255)


def mutations(rng, folder):
    """Whole images of many kinds, and damaged ones."""
    pixels = Image.fromarray(rng.integers(0, 256, (40, 48, 3), dtype=np.uint8))
    seeds = []
    for name, image, options in (
        ("a.png", pixels, {}), ("b.jpg", pixels, dict(quality=90)), ("c.jpg", pixels, dict(progressive=True)),
        ("d.bmp", pixels, {}), ("e.tif", pixels, dict(compression="tiff_lzw")), ("f.webp", pixels, {}),
        ("g.gif", pixels, {}), ("h.png", pixels.convert("RGBA"), {}), ("i.jpg", pixels.convert("CMYK"), {}),
        ("j.png", pixels.convert("P"), {}), ("k.png", pixels.resize((1, 1)), {}), ("l.png", pixels.resize((1, 5000)), {}),
    ):
        image.save(folder / name, **options)
        seeds.append((Path(name).suffix, (folder / name).read_bytes()))
    for i in range(520):
        suffix, content = seeds[i % len(seeds)]
        content, kind = bytearray(content), (i // len(seeds)) % 5
        if kind == 0:
            content = content[: rng.integers(0, len(content))]
        elif kind == 1:
            for _ in range(rng.integers(1, 9)):
                content[rng.integers(len(content))] ^= 1 << rng.integers(8)
        elif kind == 2:
            start = rng.integers(len(content))
            content[start : start + 64] = bytes(min(64, len(content) - start))
        elif kind == 3:  # the header, where sizes are claimed
            content[rng.integers(0, min(40, len(content)))] = rng.integers(256)
        else:
            suffix = [".png", ".jpg", ".bmp", ".gif"][rng.integers(4)]
        yield suffix, bytes(content)
    yield from ((".png", b""), (".jpg", b"text, no image"), (".png", bytes(3000)))


def test_hostile_images_are_read_or_named(tmp_path):
    """523 damaged or disguised files: each gives pixels or one line with its name, in bounded time and memory."""
    import resource

    (tmp_path / "seeds").mkdir()
    read = named = 0
    for i, (suffix, content) in enumerate(mutations(np.random.default_rng(0), tmp_path / "seeds")):
        file = tmp_path / f"{i}{suffix}"
        file.write_bytes(content)
        begun = time.monotonic()
        try:
            image = odm.read_square(file, 16)
            assert image.shape == (3, 16, 16) and image.dtype == torch.uint8
            read += 1
        except odm.UserError as error:
            assert str(error).startswith(str(file))
            named += 1
        assert time.monotonic() - begun < 10
    assert read > 150 and named > 150 and read + named == 523
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < 4 * 2**20  # KiB


def test_a_huge_claimed_size_is_refused_before_it_is_unpacked(tmp_path):
    import struct
    import zlib

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    for side in (20_000, 2**31 - 1):
        header = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0))
        body = chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
        (tmp_path / "bomb.png").write_bytes(b"\x89PNG\r\n\x1a\n" + header + body)
        with pytest.raises(odm.UserError, match="bomb.png: not readable"):
            odm.read_image(tmp_path / "bomb.png")


# --------------------------------------------------------------------------------- command line


def test_sample_folders_and_sheet(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    out = odm.sample(run, n=20)
    assert out == Path("samples/tiny-6")  # of the run, at its step: trained on, it samples into another folder
    assert [len(list((out / f"Mayo {g}").glob("*.png"))) for g in range(4)] == [9, 5, 3, 3]  # training frequencies
    before = {p: p.read_bytes() for p in out.rglob("0*.png")}
    gone = out / "Mayo 1" / "00002.png"
    gone.unlink()
    odm.sample(run, n=20)
    assert {p: p.read_bytes() for p in out.rglob("0*.png")} == before
    with pytest.raises(odm.UserError, match="settings"):
        odm.sample(run, n=20, seed=1)
    series = odm.sample(run, "0:3:0.5", each=2)
    assert series == Path("samples/tiny-6-series")
    assert sorted(p.name for p in series.iterdir() if p.is_dir()) == ["0.5", "1.5", "2.5", "Mayo 0", "Mayo 1", "Mayo 2", "Mayo 3"]
    assert Image.open(series / "sheet.png").size == (7 * 132 + 4, 2 * 132 + 4 + 24)
    alone = odm.sample(run, "0:3:3", each=1, out=tmp_path / "alone")  # a row is one noise, whatever the steps
    assert (series / "Mayo 3" / "00000.png").read_bytes() == (alone / "Mayo 3" / "00000.png").read_bytes()


def test_the_checkpoint_that_comes_along_draws_rising_severity(tmp_path, monkeypatch):
    assert (HERE / "data" / "demo.pt").stat().st_size < 3e6
    monkeypatch.chdir(tmp_path)  # no runs here
    out = odm.sample(severity="0:3:3", each=6, sample_steps=20)
    assert out == Path("samples/data-demo-4800-series")
    mild, severe = ([np.array(Image.open(p)).transpose(2, 0, 1) for p in (out / name).glob("*.png")]
                    for name in ("Mayo 0", "Mayo 3"))
    mild, severe = (np.median(demo.measure(np.stack(images))) for images in (mild, severe))
    assert abs(mild - 0.25) < 0.3 and abs(severe - 2.87) < 0.5  # the medians of real drawings


def test_seeds_of_different_purposes_and_numbers_differ():
    keys = [("a",), ("a", 0), ("a", 0, 0), ("b", 0), ("a", 1), ("a", 2**32), ("a", 0, 1), ("a", 2**32, 5), ("a", 1, 5)]
    assert len({odm.seed_of(*key) for key in keys}) == len(keys) and all(0 <= odm.seed_of(*key) < 2**63 for key in keys)


def test_image_i_depends_on_seed_class_and_i_alone(run, tmp_path):
    few = odm.sample(run, "2", n=3, out=tmp_path / "few", batch=2)
    many = odm.sample(run, "all", each=6, out=tmp_path / "many", batch=5)
    other = odm.sample(run, "2", n=3, out=tmp_path / "other", seed=1)
    few, many, other = (np.stack([np.asarray(Image.open(out / "Mayo 2" / f"{i:05d}.png")).astype(int) for i in range(3)])
                        for out in (few, many, other))
    assert np.abs(few - many).max() <= 1 and np.abs(few - other).max() > 20


def test_severities_on_the_command_line():
    classes = odm.Classes(["Mayo 1", "Mayo 2", "Mayo 3"], [1.0, 2.0, 3.0], [5, 3, 2])
    parse = lambda text: odm.parse_severities(text, classes)
    assert parse("3") == {"Mayo 3": 2.0} and parse("Mayo 2") == {"Mayo 2": 1.0} and parse("1.5") == {"1.5": 0.5}
    assert parse("1:2:0.25") == {"Mayo 1": 0.0, "1.25": 0.25, "1.5": 0.5, "1.75": 0.75, "Mayo 2": 1.0}
    assert parse("all") == parse("1:3") == {"Mayo 1": 0.0, "Mayo 2": 1.0, "Mayo 3": 2.0}
    gap = odm.Classes(["0", "2"], [0.0, 2.0], [1, 1])
    assert odm.parse_severities("1", gap) == {"1": 0.5}  # between two classes, by their severities
    for wrong in ("0", "4", "Mayo 4", "1:2:0", "3:1:1", "1:2:3:4", "nan", "", "1:nan:1", "1:inf", "1:3:1e-9"):
        with pytest.raises(odm.UserError, match="--class"):
            parse(wrong)


def test_bad_input_is_one_line_and_status_2(run, graded, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    one = write_images(tmp_path / "one", {"Mayo 0": 2})
    broken = write_images(tmp_path / "broken", {"0": 1, "1": 1, "2": 1})
    victim = broken / "1" / "1_0.png"
    victim.write_bytes(victim.read_bytes()[:60])
    whole = (run / "checkpoint.pt").read_bytes()
    middle = len(whole) // 2
    damaged = {"torn.pt": whole[:-2000], "junk.pt": b"no checkpoint at all",
               "flipped.pt": whole[:middle] + bytes([whole[middle] ^ 4]) + whole[middle + 1 :]}
    for name, content in damaged.items():
        (tmp_path / name).write_bytes(content)
    state = state_of(run)
    torch.save({**state, "config": {**state["config"], "ch": 16}}, "shape.pt")
    data = ["train", "--data", graded]
    for expected, argv in {
        "no such folder": ["train", "--data", tmp_path / "absent"],
        "no images": ["train", "--data", tmp_path / "empty"],
        "one class only": ["train", "--data", one],
        "no image has a class": ["train", "--data", one / "Mayo 0"],
        str(victim): ["train", "--data", broken],
        "--crop 11": [*data, "--crop", "11"],
        "--class severe": ["sample", "--checkpoint", run, "--class", "severe"],
        "a severity from 0 to 3": ["sample", "--checkpoint", run, "--class", "4"],
        "shape.pt: its weights are not": ["sample", "--checkpoint", tmp_path / "shape.pt"],
        **{f"{name}: not a whole checkpoint": ["sample", "--checkpoint", name] for name in damaged},
        "no such checkpoint": ["sample", "--checkpoint", tmp_path / "none.pt"],
        "--batch 0": [*data, "--batch", "0"],
        "--lr nan": [*data, "--lr", "nan"],
        "--size 62": [*data, "--size", "62"],
        "--ch: must be a multiple of 4 and of --groups": [*data, "--ch", "20"],
        "--attention": [*data, "--attention", "9"],
        "--spacing": [*data, "--spacing", "--distance", "squared"],
        "--triplets x": [*data, "--triplets", "x"],
        "--columns": [*data, "--columns", "x"],
        "--steps": ["train", "--steps", "many"],
        "--device": [*data, "--device", "abacus"],
        "--sample-steps": ["sample", "--checkpoint", run, "--sample-steps", "51"],
        "--eta 2": ["sample", "--checkpoint", run, "--eta", "2"],
        "only one of -n and --each": ["sample", "--checkpoint", run, "-n", "4", "--each", "2"],
        "0 or more": ["sample", "--checkpoint", run, "-n", "-1"],
        "--triplet-part": ["train", *flags(TINY), "--data", graded, "--out", tmp_path / "x", "--triplet-part", "0"],
        "leaves nothing of the image": [*data, "--beta-T", "0.9"],
        "unrecognized arguments: --frobnicate": ["train", "--frobnicate"],
        "invalid choice: 'fly'": ["fly"],
    }.items():
        assert expected in error_of(capsys, *argv), expected


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_a_checkpoint_that_carries_code_is_refused_without_running_it(run, tmp_path, capsys):
    evil, trace = tmp_path / "evil.pt", tmp_path / "it ran"
    torch.save({**state_of(run), "extra": Bomb(str(trace))}, evil)
    assert "not a whole checkpoint" in error_of(capsys, "sample", "--checkpoint", evil)
    evil.write_bytes(pickle.dumps(Bomb(str(trace))))
    assert "not a whole checkpoint" in error_of(capsys, "sample", "--checkpoint", evil)
    assert not trace.exists()


def test_a_checkpoint_of_another_version_says_what_differs(run, tmp_path, capsys):
    state = state_of(run)
    config = {**state["config"], "from_the_future": 1}
    del config["guidance"]
    torch.save({**state, "config": config}, tmp_path / "other.pt")
    _, loaded = odm.load_checkpoint(tmp_path / "other.pt")
    said = capsys.readouterr().out
    assert loaded["config"].guidance == 2.0 and "from_the_future" in said and "guidance" in said


@pytest.mark.parametrize("name", ["../../x", "/etc/x", "..", "a\\b"])
def test_class_names_never_become_paths(run, tmp_path, capsys, name):
    state = state_of(run)
    state["classes"]["names"][0] = name
    torch.save(state, tmp_path / "evil.pt")
    line = error_of(capsys, "sample", "--checkpoint", tmp_path / "evil.pt", "--out", tmp_path / "o")
    assert "cannot be the name of a folder" in line
    assert not (tmp_path / "o").exists()


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_checkpoint(graded, tmp_path, capsys):
    config = odm.Config(**{**TINY, "steps": 2}, data=str(graded), out=str(tmp_path / "run"))
    odm.train(config)
    before = (tmp_path / "run" / "checkpoint.pt").read_bytes()
    real = odm.dm_loss
    try:
        odm.dm_loss = lambda eps, eps_hat: real(eps, eps_hat) * math.nan
        with pytest.raises(odm.UserError, match="step 3: the loss is not finite"):
            odm.train(replace(config, steps=6))
    finally:
        odm.dm_loss = real
    assert (tmp_path / "run" / "checkpoint.pt").read_bytes() == before


@pytest.mark.parametrize("fail", [lambda *_: torch.zeros(2**46), lambda *_: np.zeros(2**46)])  # 256 TiB
def test_out_of_memory_names_the_flag_to_lower(graded, run, tmp_path, capsys, monkeypatch, fail):
    monkeypatch.setattr(odm, "total_loss", fail)
    monkeypatch.setattr(odm, "draw_images", fail)
    assert "lower --batch" in error_of(capsys, "train", *flags(TINY), "--data", graded, "--out", tmp_path / "run")
    assert "lower --batch" in error_of(capsys, "sample", "--checkpoint", run, "--out", tmp_path / "samples")


@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_stop_signals_save_and_say_how_to_go_on(graded, tmp_path, number, status):
    argv = ["train", *flags({**TINY, "steps": 100_000}), "--data", graded, "--out", "a b/\u00e9"]
    process = command(HERE / "odm.py", *argv, cwd=tmp_path)
    out, deadline = tmp_path / "a b" / "\u00e9", time.monotonic() + 60
    while not (out / "checkpoint.pt").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(number)
    said, errors = process.communicate(timeout=60)
    assert process.returncode == status and errors == ""
    step = state_of(out)["step"]
    assert f"stopped and saved at step {step:,}; the same command goes on" in said
    assert (out / "metrics.csv").read_text().splitlines()[-1].startswith(f"{step},")


def test_killed_at_random_training_ends_as_if_undisturbed(graded, tmp_path):
    settings = {**TINY, "dropout": 0.1, "steps": 40, "save_every": 3}
    rng = np.random.default_rng(0)
    for name, kills in (("whole", 0), ("killed", 3)):
        for kill in [True] * kills + [False]:
            argv = ["train", *flags(settings), "--data", graded, "--out", tmp_path / name]
            process = command(HERE / "odm.py", *argv)
            if kill:
                while process.poll() is None and not (tmp_path / name / "metrics.csv").exists():
                    time.sleep(0.02)
                time.sleep(rng.uniform(0, 1))
                process.kill()
            process.communicate(timeout=120)
        assert process.returncode == 0
    for part in ("model", "ema", "optimizer"):
        whole, killed = (flat(state_of(tmp_path / name), part) for name in ("whole", "killed"))
        assert torch.equal(whole, killed), part
    for file in ("metrics.csv", "sheet.png"):
        assert (tmp_path / "whole" / file).read_bytes() == (tmp_path / "killed" / file).read_bytes()


def test_two_processes(graded, tmp_path):
    """They train one network, resume it bit by bit, draw the files that one draws, and say an error once."""
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", HERE / "odm.py"]
    settings = {**TINY, "dropout": 0.1, "steps": 4}
    for name, steps in (("whole", (4,)), ("parts", (2, 4))):
        for n in steps:
            argv = ["train", *flags({**settings, "steps": n}), "--data", graded, "--out", tmp_path / name]
            said, _ = command(*launch, *argv).communicate(timeout=120)
            assert said.count(f"trained to step {n}") == 1
    for part in ("model", "ema", "optimizer"):
        whole, parts = (flat(state_of(tmp_path / name), part) for name in ("whole", "parts"))
        assert torch.equal(whole, parts), part
    for name, how in (("one", [HERE / "odm.py"]), ("two", launch)):
        argv = ["sample", "--checkpoint", tmp_path / "whole", "-n", 20, "--batch", 4, "--out", tmp_path / name]
        assert command(*how, *argv).communicate(timeout=120)[0].count("20 images are in") == 1
    pngs = sorted((tmp_path / "one").rglob("*.png"))
    assert len(pngs) == 21  # and the sheet
    for png in pngs:
        assert png.read_bytes() == (tmp_path / "two" / png.relative_to(tmp_path / "one")).read_bytes()
    for argv in (["--data", tmp_path / "absent"], ["--data", graded, "--batch", 9],
                 ["--data", graded, "--out", HERE / "odm.py"]):  # where only the first process can know
        _, errors = command(*launch, "train", *flags(settings), *argv).communicate(timeout=120)
        ours = [line for line in errors.splitlines() if "odm.py" in line and "torch" not in line]
        assert errors.count("odm.py: error:") == 1 and not any('File "' in line for line in ours), errors


def test_a_second_run_on_the_same_folder_is_kept_out(graded, tmp_path, capsys):
    lock = odm.lock_folder(tmp_path / "run")
    argv = ["train", *flags(TINY), "--data", graded, "--out", tmp_path / "run"]
    assert "another process is writing there" in error_of(capsys, *argv)
    lock.close()
    odm.lock_folder(tmp_path / "run").close()


def test_a_full_disk_leaves_the_last_checkpoint_whole(graded, tmp_path, monkeypatch):
    def full(state, file):  # the disk fills up while it writes
        file.write(b"half a checkpoint")
        raise OSError(28, "No space left on device")

    config = odm.Config(**{**TINY, "steps": 8}, data=str(graded), out=str(tmp_path / "run"))
    odm.train(replace(config, steps=6))
    before = (tmp_path / "run" / "checkpoint.pt").read_bytes()
    monkeypatch.setattr(odm.torch, "save", full)
    with pytest.raises(odm.UserError, match="No space left on device.*free some space"):
        odm.train(config)
    assert (tmp_path / "run" / "checkpoint.pt").read_bytes() == before
    names = sorted(p.name for p in (tmp_path / "run").iterdir())
    assert names == [".lock", "checkpoint.pt", "metrics.csv", "sheet.png", "sheets"]


def test_random_flags_fail_in_one_line(tmp_path, capsys):
    """Every failure is one line and status 2; the data folder is absent, so that all 300 of them do fail."""
    rng = np.random.default_rng(0)
    values = ["", "0", "1", "-1", "3", "7", "1e309", "nan", "inf", "-inf", "0.5", "1,2", "1,2,2", ",", "x", "--", "\u00e9",
              "99999999999999999999", "euclidean", "\n"]
    names = [odm.flag(f.name) for f in odm.fields(odm.Config) if f.name not in ("data", "device")]
    for _ in range(300):
        chosen = rng.choice(names, rng.integers(1, 5))
        argv = [part for name in chosen for part in (name, values[rng.integers(len(values))])]
        assert error_of(capsys, "train", "--data", tmp_path / "absent", *argv), argv


# -------------------------------------------------------------------------------- data/demo.py


def one_scene(i, severities, size=32):  # uint8 (N, 3, size, size), the same place at each severity
    return np.stack([demo.draw(s, demo.scene(1, 0, i)[1], size).transpose(2, 0, 1) for s in severities])


def test_a_frame_depends_on_seed_grade_and_number_alone(tmp_path):
    assert demo.make(tmp_path / "16", 16, seed=3, size=16) == demo.counts(16)
    assert demo.make(tmp_path / "32", 32, seed=3, size=16) == demo.counts(32)
    rows = list(csv.reader((tmp_path / "32" / "severity.csv").read_text().splitlines()))
    assert len(rows) == 1 + 32 == 1 + len(list(tmp_path.glob("32/*/*.png")))
    for name, written in rows[1:]:
        severity, rng = demo.scene(3, int(name[5]), int(name[7:11]))
        assert abs(float(written) - severity) < 1e-4
        assert np.array_equal(Image.open(tmp_path / "32" / name), demo.draw(severity, rng, 16))
    for frame in tmp_path.glob("16/*/*.png"):  # a smaller set is the beginning of a larger one
        assert frame.read_bytes() == (tmp_path / "32" / frame.parent.name / frame.name).read_bytes()
    assert len({demo.scene(*at)[1].random() for at in ((3, 1, 0), (4, 1, 0), (3, 2, 0), (3, 1, 1))}) == 4


def test_severity_names_its_grade_and_grades_come_as_often_as_in_limuc():
    for grade in range(4):
        s = np.array([demo.scene(0, grade, i)[0] for i in range(300)])
        assert 0 <= s.min() and s.max() <= 3 and (abs(s - grade) < 0.5).all() and len(np.unique(s)) == 300
        assert abs(abs(s - grade).mean() - 1 / 6) < 0.025  # of a triangle, reflected at the ends or not
    for n in (16, 17, 1100, 50000):
        assert sum(demo.counts(n)) == n and min(demo.counts(n)) >= 1
        assert (abs(demo.counts(n) - n * np.array([6105, 3052, 1254, 865]) / 11276) < 1).all()


def test_a_scene_is_the_same_at_every_size_and_severity_moves_it_smoothly_and_one_way():
    small, large = (one_scene(0, (0, 1.4, 2.9), size).astype(float) for size in (32, 64))
    assert abs(large.reshape(3, 3, 32, 2, 32, 2).mean((3, 5)) - small).max() < 1.5  # three roundings
    for low, high, bound in ((0.6, 1.6, 10), (1.6, 2.4, 20)):  # edges of growing spots move more
        assert abs(np.diff(one_scene(0, np.arange(low, high, 0.01)).astype(int), axis=0)).max() < bound
    for i in range(10):
        frames = one_scene(i, np.arange(0, 3.1, 0.5))
        assert (np.diff(demo.measure(frames)) > 0).all()
        red, green, _ = frames[:5].mean((2, 3)).T  # without measure(); beyond severity 2 ulcers pale the wall
        assert (np.diff(green / red) < 0).all() and green[4] / red[4] < 0.8 * green[0] / red[0]


def test_measure_is_its_formula_and_reads_fresh_frames_to_the_stated_error():
    flat = np.tile(np.array([200, 100, 80], np.uint8)[:, None, None], (5, 1, 32, 32))
    flat[1, :, :16, :16] = np.array([130, 15, 15])[:, None, None]  # a quarter of blood
    flat[2, :, :16, :16] = np.array([235, 215, 160])[:, None, None]  # of ulcer
    flat[3, :, 20:] //= 20  # a lumen
    flat[4] //= 2  # half the light
    by_hand = 4.4 * np.log(208 / np.sqrt(108 * 88)) - 1.5 + np.array([0, 0.9 * 0.5, 0.6 * 0.25, 0, 0])
    assert (abs(demo.measure(flat) - by_hand) < [1e-9, 1e-9, 1e-9, 1e-9, 0.25]).all()
    for size in (16, 32, 64):
        scenes = [demo.scene(77, grade, i) for grade in range(4) for i in range(20)]
        truth = np.array([s for s, _ in scenes])
        clean = np.stack([demo.draw(*scene, size).transpose(2, 0, 1) for scene in scenes])
        noisy = np.clip(clean + np.random.default_rng(0).normal(0, 8, clean.shape), 0, 255).astype(np.uint8)
        for found, bound in ((demo.measure(clean), 0.14), (demo.measure(noisy), 0.2)):
            assert abs(found - truth).mean() < bound and np.corrcoef(found, truth)[0, 1] > 0.98
    for bad in (np.zeros((2, 1, 32, 32), np.uint8), np.zeros((2, 3, 8, 8), np.uint8), flat / 255):
        with pytest.raises(ValueError, match="give uint8"):
            demo.measure(bad)


def test_a_set_is_whole_and_left_alone_or_is_not_there(tmp_path, monkeypatch):
    out, ready, draw, calls = tmp_path / "set", tmp_path / "ready", demo.draw, []

    def disturbed(*args):
        calls.append(args)
        if len(calls) == 5:
            raise KeyboardInterrupt
        if ready.exists():
            ready.rename(out)  # another run ends while this one draws
        return draw(*args)

    monkeypatch.setattr(demo, "draw", disturbed)
    with pytest.raises(KeyboardInterrupt):
        demo.make(out, 16, size=16)
    assert list(tmp_path.iterdir()) == []
    demo.make(ready, 17, size=16)
    times = [f.stat().st_mtime_ns for f in sorted(ready.rglob("*"))]
    for _ in range(2):  # overtaken, then there already
        assert demo.make(out, 17, size=16) == demo.counts(17)
    for n, seed, size in ((16, 0, 16), (17, 1, 16), (17, 0, 32)):
        with pytest.raises(FileExistsError, match="delete it"):
            demo.make(out, n, seed, size)
    assert [f.name for f in tmp_path.iterdir()] == ["set"]
    assert [f.stat().st_mtime_ns for f in sorted(out.rglob("*"))] == times
    Image.new("RGB", (16, 16)).save(out / "Mayo 3" / "0000.png")  # another drawing under the same name
    with pytest.raises(FileExistsError, match="delete it"):
        demo.make(out, 17, size=16)


def test_command_line_of_the_drawings(tmp_path):
    command = [sys.executable, HERE / "data/demo.py", "--out", tmp_path / "set", "-n", "16", "--size", "16"]
    good = subprocess.run(command, capture_output=True, text=True)
    assert good.returncode == 0 and "Mayo 0 9" in good.stdout and (tmp_path / "set/severity.csv").exists()
    for words in ("-n 3", "--size 8", "--seed -1", "-n many", f"--out {tmp_path}"):
        bad = subprocess.run([*command, *words.split()], capture_output=True, text=True)
        assert bad.returncode == 2 and len(bad.stderr.splitlines()) == 1, bad.stderr
        assert all(word in bad.stderr for word in words.split())


# --------------------------------------------------------------------------------------- fid.py

WEIGHTS_768 = HERE.parent / "shared" / "weights" / "fid-inception-768-fp16.pth"


def normal(n, d, seed, dtype=torch.float64):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def exact_gaussian(n, variances, seed):
    """n points whose sample mean is 0 and sample covariance diag(variances), exactly."""
    ones = torch.ones(n, 1, dtype=torch.float64)
    q = torch.linalg.qr(torch.cat([ones, normal(n, len(variances), seed)], 1)).Q[:, 1:]
    return q * (torch.tensor(variances, dtype=torch.float64) * (n - 1)).sqrt()


def test_frechet_closed_forms():
    variances = [4.0, 1.0, 0.25, 1e-4, 0.0]
    others = [1.0, 9.0, 0.25, 0.0, 2.0]
    spread = sum((a**0.5 - b**0.5) ** 2 for a, b in zip(variances, others))
    shift = torch.tensor([1.0, -2.0, 0.0, 0.5, 3.0], dtype=torch.float64)
    x, y = exact_gaussian(50, variances, 1), exact_gaussian(70, others, 2)
    # Equal covariances: |shift|^2. Diagonal ones: root by root.
    assert fid.frechet_distance(x, x + shift) == pytest.approx(14.25, rel=1e-9)
    assert fid.frechet_distance(x, y + shift) == pytest.approx(14.25 + spread, rel=1e-9)
    a, b = torch.diag(torch.tensor(variances)), torch.diag(torch.tensor(others))
    from_moments = fid.frechet_distance_from_moments(shift, a, 0 * shift, b)
    assert from_moments == pytest.approx(14.25 + spread, rel=1e-9)
    turn = torch.linalg.qr(normal(5, 5, 3)).Q  # one rotation of both sets changes nothing
    assert fid.frechet_distance(x @ turn, (y + shift) @ turn) == pytest.approx(14.25 + spread, rel=1e-8)


@pytest.mark.parametrize("n, m, d", [(200, 150, 24), (20, 30, 64), (30, 200, 64), (700, 600, 16)])
def test_frechet_against_eigenvalues_of_the_product(n, m, d):
    x, y = normal(n, d, 1) @ normal(d, d, 2), 3 + normal(m, d, 3) @ normal(d, d, 4)
    s1, s2 = np.cov(x.T.numpy()), np.cov(y.T.numpy())
    root = np.sqrt(np.clip(scipy.linalg.eigvals(s1 @ s2).real, 0, None)).sum()
    expected = (x.mean(0) - y.mean(0)).square().sum().item() + np.trace(s1) + np.trace(s2) - 2 * root
    assert fid.frechet_distance(x, y) == pytest.approx(expected, rel=1e-6)
    from_moments = fid.frechet_distance_from_moments(x.mean(0), s1, y.mean(0), s2)
    assert from_moments == pytest.approx(expected, rel=1e-6)


def test_frechet_ends_and_float32_features():
    x = 100 + normal(400, 32, 1)  # a mean this large costs float32 statistics 4 digits
    y = 100 + 1.1 * normal(400, 32, 2)
    assert fid.frechet_distance(x, x) < 1e-9 and fid.frechet_distance(x[:5], x[:5]) < 1e-9
    assert fid.frechet_distance(x, y) == pytest.approx(fid.frechet_distance(y, x), rel=1e-12)
    x32, y32 = x.float(), y.float()
    in_float64 = fid.frechet_distance(x32.double(), y32.double())
    assert fid.frechet_distance(x32, y32) == pytest.approx(in_float64, rel=1e-12)
    for wrong in (x[:1], x[:, :5]):
        with pytest.raises(ValueError), np.errstate(invalid="ignore"):
            fid.frechet_distance(x, wrong)


def test_kernel_distance_is_the_double_loop():
    x, y = normal(23, 5, 1, torch.float32), 0.5 + normal(17, 5, 2, torch.float32)

    def k(a, b):
        return (a.double().dot(b.double()).item() / 5 + 1) ** 3

    xx = [k(a, b) for i, a in enumerate(x) for j, b in enumerate(x) if i != j]
    yy = [k(a, b) for i, a in enumerate(y) for j, b in enumerate(y) if i != j]
    xy = [k(a, b) for a in x for b in y]
    expected = np.mean(xx) + np.mean(yy) - 2 * np.mean(xy)
    assert fid.kernel_distance(x, y)[0] == pytest.approx(expected, rel=1e-5)


def test_kid_is_unbiased_where_fid_is_not():
    splits = [normal(60, 32, seed, torch.float32).split(30) for seed in range(150)]
    values, errors = map(np.array, zip(*(fid.kernel_distance(x, y) for x, y in splits)))
    assert abs(values.mean()) < 3 * values.std() / 150**0.5
    assert 0.8 < np.sqrt((errors**2).mean()) / values.std() < 1.6  # honest, if on the safe side
    distances = np.array([fid.frechet_distance(x, y) for x, y in splits[:20]])
    assert distances.mean() > 10 * distances.std()


def test_kid_standard_error_where_the_sets_differ():
    pairs = ((normal(100, 8, 2 * seed), 0.7 + normal(80, 8, 2 * seed + 1)) for seed in range(120))
    values, errors = zip(*(fid.kernel_distance(x, y) for x, y in pairs))
    assert 0.8 < np.sqrt(np.square(errors).mean()) / np.std(values) < 1.3


def brute_force(real, fake, k):
    def radii(x):
        others = (np.linalg.norm(np.delete(x, i, 0) - x[i], axis=1) for i in range(len(x)))
        return np.array([np.sort(distances)[k - 1] for distances in others])

    def share_inside(points, centres):
        r = radii(centres)
        return np.mean([(np.linalg.norm(centres - p, axis=1) <= r * (1 + 1e-12)).any() for p in points])

    real, fake = np.asarray(real, np.float64), np.asarray(fake, np.float64)
    return share_inside(fake, real), share_inside(real, fake)


@pytest.mark.parametrize("n, m, d, k", [(90, 70, 3, 3), (60, 80, 100, 1), (4, 4, 2, 3), (2100, 2060, 2, 5)])
def test_precision_recall_against_loops(n, m, d, k):
    real, fake = normal(n, d, 1, torch.float32), 0.4 + 0.8 * normal(m, d, 2, torch.float32)
    expected = brute_force(real, fake, k)
    assert fid.precision_recall(real, fake, k) == pytest.approx(expected, abs=1e-12)
    if n < 100:  # far from the origin float32 products would be too coarse
        far = real + 300, fake + 300
        assert fid.precision_recall(*far, k) == pytest.approx(brute_force(*far, k), abs=1e-12)
    assert fid.precision_recall(fake, real, k) == fid.precision_recall(real, fake, k)[::-1]


def test_ties_are_inside():
    rng = torch.Generator().manual_seed(0)  # points of a grid: most distances are ties, many points coincide
    for _ in range(20):
        real, fake = (torch.randint(0, 6, (60, 2), generator=rng).float() for _ in "rf")
        assert fid.precision_recall(real, fake, 2) == pytest.approx(brute_force(real, fake, 2), abs=1e-12)
    black = torch.cat([torch.full((5, 768), 0.1), normal(30, 768, 1, torch.float32)])  # radius 0
    assert fid.precision_recall(black, black[:5]) == (1.0, 5 / 35)


def test_collapsed_generator_has_high_precision_and_low_recall():
    real = normal(300, 16, 1, torch.float32)
    fake = real[:1] + 1e-3 * normal(300, 16, 2, torch.float32)
    precision, recall = fid.precision_recall(real, fake)
    assert precision == 1 and recall <= 1 / 300


def test_quadratic_kappa_by_hand():
    assert odm.quadratic_kappa(torch.tensor([[5, 0], [0, 7]])) == 1
    by_chance = torch.tensor([[2, 4], [3, 6]])  # rows in proportion
    assert odm.quadratic_kappa(by_chance) == pytest.approx(0, abs=1e-12)
    # observed cost (1 + 4) / 6; by chance: rows 2, 2, 2 and columns 2, 2, 2 -> cost (4 * 1 + 2 * 4) * 4 / 36
    table = torch.tensor([[1, 0, 1], [0, 2, 0], [1, 0, 1]])
    assert odm.quadratic_kappa(table) == pytest.approx(1 - (8 / 6) / (48 / 36))
    assert odm.quadratic_kappa(torch.tensor([[3, 0], [0, 0]])) is None


def test_ridge_penalty_has_the_least_leave_one_out_error():
    x, labels = normal(24, 6, 1), torch.arange(24) % 3
    x[:, 0] += labels
    classify = fid.ridge_classifier(x, labels, 3)
    place = classify.__code__.co_freevars.index("best_slope")
    slope = classify.__closure__[place].cell_contents
    target = (labels[:, None] > torch.arange(2)).double()
    total = ((x - x.mean(0)).square().sum() / 24).item()

    def fit(rows, penalty):  # equal classes: equal weights
        a, b = x[rows] - x[rows].mean(0), target[rows] - target[rows].mean(0)
        return torch.linalg.solve(a.T @ a / 24 + penalty * torch.eye(6, dtype=torch.float64), a.T @ b / 24)

    def left_out_error(penalty):  # every fit made anew without the image that is left out
        error = 0
        for i in range(24):
            rest = torch.arange(24) != i
            guess = target[rest].mean(0) + (x[i] - x[rest].mean(0)) @ fit(rest, penalty)
            error += (target[i] - guess).square().sum().item()
        return error

    best = min(total * np.logspace(-5, 0, 11), key=left_out_error)
    assert torch.allclose(slope, fit(torch.arange(24), best), rtol=1e-8, atol=1e-10)


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


def test_image():
    i = torch.arange(3 * 40 * 50)
    return ((i * i) % 251).to(torch.uint8).view(1, 3, 40, 50)


test_image.__test__ = False


def summary(x):
    x = x[0].double()
    centroid = x @ torch.arange(1, len(x) + 1.0).double() / x.sum()
    return x.sum().item(), x.square().mean().sqrt().item(), centroid.item()


@pytest.mark.parametrize(
    "dims, expected",  # sum, root mean square and centroid of pytorch-fid 0.3.0's features
    [
        (64, (16.378099345136434, 0.3232815183709533, 30.19210691719125)),
        (192, (68.64484141088997, 0.528024275579934, 97.09053981847158)),
        (768, (77.15302715079997, 0.18921177408829562, 381.4555883042095)),
        (2048, (286.9499453532171, 0.24868668614621625, 1068.5793844638972)),
    ],
)
def test_network_gives_the_features_of_pytorch_fid(dims, expected):
    network = fill_with_waves(fid.Inception(dims))
    assert summary(fid.features(test_image(), network)) == pytest.approx(expected, rel=1e-5)


@pytest.mark.skipif(not WEIGHTS_768.exists(), reason="needs the network's weights")
def test_network_gives_the_features_of_pytorch_fid_with_real_weights():
    network = fid.load_weights(768, str(WEIGHTS_768))
    expected = (23.620308166239738, 0.07778412673429534, 330.6755039506857)
    assert summary(fid.features(test_image(), network)) == pytest.approx(expected, rel=1e-5)


def test_features_in_eval_mode_whatever_the_batch():
    network = fill_with_waves(fid.Inception(64)).train()
    images = [torch.randint(0, 256, (3, 32, 32 + i), dtype=torch.uint8) for i in range(5)]  # of any sizes
    x = fid.features(images, network, batch_size=2)
    assert x.dtype == torch.float32 and x.shape == (5, 64)
    alone = [fid.features(image[None], network) for image in images]
    assert torch.allclose(x, torch.cat(alone), rtol=1e-5, atol=1e-6)
    assert fid.features([], network).shape == (0, 64)


@pytest.fixture(scope="module")
def weights_64(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "random 64.pth"
    torch.save(fill_with_waves(fid.Inception(64)).half().state_dict(), path)
    return str(path)


def test_load_weights_says_what_is_wrong(weights_64, tmp_path):
    network = fid.load_weights(64, weights_64)  # the file is half
    assert all(p.dtype == torch.float32 for p in network.parameters())
    with pytest.raises(odm.UserError, match="no Conv2d_3b_1x1.conv.weight, which --dims 768 needs"):
        fid.load_weights(768, weights_64)

    class Evil:
        def __reduce__(self):
            return (Path(tmp_path / "ran").touch, ())

    whole, state = Path(weights_64).read_bytes(), torch.load(weights_64, weights_only=True)
    torch.save({**state, "Conv2d_1a_3x3.conv.weight": torch.zeros(32, 3, 5, 5)}, tmp_path / "shape.pth")
    wrong_shape = (tmp_path / "shape.pth").read_bytes()
    contents = [whole[: len(whole) // 2], b"", b"<html>Not found</html>", wrong_shape]
    for content in [*contents, pickle.dumps(Evil(), 2), pickle.dumps([1, 2], 2)]:
        (tmp_path / "bad.pth").write_bytes(content)
        with pytest.raises(odm.UserError, match="no network in .*bad.pth.*name it with --weights"):
            fid.load_weights(64, str(tmp_path / "bad.pth"))
    assert not (tmp_path / "ran").exists()
    for missing in (tmp_path / "none.pth", tmp_path):
        with pytest.raises(odm.UserError, match="no network in"):
            fid.load_weights(64, str(missing))


@pytest.fixture
def hub(tmp_path, monkeypatch, weights_64):
    """An empty torch.hub cache; returns the place of the weight file in it."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    sha256 = hashlib.sha256(Path(weights_64).read_bytes()).hexdigest()
    monkeypatch.setattr(fid, "WEIGHTS", f"weights-{sha256[:8]}.pth")
    return tmp_path / "hub" / "checkpoints" / fid.WEIGHTS


def serve(content, claimed, monkeypatch):
    """The weights' URL leads to a local server that sends `content` and claims so many bytes."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.send_header("Content-Length", str(claimed))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_):
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.handle_request, daemon=True).start()
    monkeypatch.setattr(fid, "WEIGHTS_URL", f"http://127.0.0.1:{server.server_port}/{fid.WEIGHTS}")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    return server


def test_download(weights_64, hub, monkeypatch):
    content = Path(weights_64).read_bytes()
    for sent in (content[:5000], content[:-1] + b"?"):  # the line breaks; another file
        with serve(sent, len(content), monkeypatch):
            with pytest.raises(odm.UserError, match="fetch http://127.0.0.1.* by other means"):
                fid.load_weights(64)
        assert list(hub.parent.iterdir()) == []
    with pytest.raises(odm.UserError, match=f"no network in {hub}.*refused.*put it there"):
        fid.load_weights(64)  # nobody answers any more
    with serve(content, len(content), monkeypatch):
        fid.load_weights(64)
        assert list(hub.parent.iterdir()) == [hub]
    fid.load_weights(64)  # from the cache: the server is gone
    hub.write_bytes(content[:-1])  # as an older tool that was killed would leave it
    with pytest.raises(odm.UserError, match=f"no network in {hub}"):
        fid.load_weights(64)


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


def test_generated_images_help_a_classifier_or_not():
    direction = torch.nn.functional.normalize(normal(1, 40, 0), dim=1)

    def draw(counts, seed):
        labels = torch.repeat_interleave(torch.arange(4), torch.tensor(counts))
        return normal(len(labels), 40, seed) + 3 * labels[:, None] * direction, labels

    (real, labels), (x, y) = draw([200, 100, 60, 40], 1), draw([12, 6, 4, 2], 2)
    z, asked = draw([80] * 4, 3)
    wrong = asked[torch.randperm(320, generator=torch.Generator().manual_seed(0))]
    alone = fid.classifier_score(x, y, real, labels, 4)
    helped = fid.classifier_score(torch.cat([x, z]), torch.cat([y, asked]), real, labels, 4)
    spoiled = fid.classifier_score(torch.cat([x, z]), torch.cat([y, wrong]), real, labels, 4)
    assert helped["kappa"] > alone["kappa"] + 0.1 > spoiled["kappa"] + 0.2
    assert helped["top_recall"] > alone["top_recall"] and helped["mean_error"] < 0.6 * alone["mean_error"]
    shown = fid.ridge_classifier(x, y, 4)(real)
    assert alone["mean_error"] == pytest.approx((shown - labels).abs().double().mean().item())
    assert alone["top_recall"] == pytest.approx((shown[labels == 3] == 3).double().mean().item())
    same = fid.classifier_score(x[:1].repeat(8, 1), torch.arange(8) % 4, real, labels, 4)
    assert same["kappa"] == pytest.approx(0, abs=1e-12)  # a generator that collapsed to one image


def save_images(folder, n, seed, size=(16, 16), low=0):
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    for i in range(n):
        pixels = rng.integers(low, 256, (*size, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{i:03}.png")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("sets")
    for grade, n in enumerate((9, 6, 5)):
        save_images(root / "real" / f"Mayo {grade}", n, grade, low=60 * grade)
        save_images(root / "seen" / f"Mayo {grade}", n, 40 + grade, low=60 * grade)
        save_images(root / "dm" / "deeper" / f"Mayo {grade}", n + 1, 10 + grade, low=50 * grade)
        save_images(root / "odm" / f"Mayo {grade}", 3 + grade, 20 + grade, low=60 * grade)
        save_images(root / "between" / f"{grade + 0.5:g}", 4, grade)
        save_images(root / "other" / f"Mayo {grade + 1}", 4, grade)
    save_images(root / "dm", 2, 99)
    (root / "dm" / "000.png").rename(root / "dm" / "sheet.png")
    (root / "dm" / "001.png").rename(root / "dm" / "series.gif")
    save_images(root / "odm" / "1.5", 3, 31)
    save_images(root / "odm", 2, 32)
    (root / "odm" / "Mayo 0" / "000.png").write_bytes((root / "seen" / "Mayo 2" / "001.png").read_bytes())
    save_images(root / "Mayo 1", 7, 30)  # flat: no class, whatever its name
    save_images(root / "wide", 4, 34, size=(16, 24))
    (root / "empty").mkdir()
    save_images(root / "broken", 4, 35)
    (root / "broken" / "002.png").write_bytes((root / "broken" / "001.png").read_bytes()[:300])
    return root


def run_fid(*words):
    try:
        return fid.main([str(word) for word in words])
    except SystemExit as stop:  # argparse's
        return stop.code


def test_command(folders, weights_64, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(folders)
    files = {flag: tmp_path / f"{flag}.png" for flag in ("json", "plot", "neighbours")}
    words = ["real", "dm", "odm", "Mayo 1", "--dims", 64, "--weights", weights_64, "--trained-on", "seen"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert run_fid(*words, *(word for flag, file in files.items() for word in (f"--{flag}", file))) == 0
    out, err = capsys.readouterr()
    result = json.loads(files["json"].read_text())
    rows = {(row["generated"], row["class"]): row for row in result["rows"]}
    assert {key: (row["n_real"], row["n_fake"]) for key, row in rows.items()} == {
        ("dm", "all"): (20, 23), ("odm", "all"): (20, 12), ("Mayo 1", "all"): (20, 7),
        ("dm", "Mayo 0"): (9, 10), ("dm", "Mayo 1"): (6, 7), ("dm", "Mayo 2"): (5, 6),
        ("odm", "Mayo 0"): (9, 3), ("odm", "Mayo 1"): (6, 4), ("odm", "Mayo 2"): (5, 5),
    }  # fmt: skip
    passed_over = "odm: passed over, no class of the real images (Mayo 0, Mayo 1, Mayo 2): ., 1.5"
    assert passed_over in err.splitlines()
    assert all(row["fid_biased"] for row in rows.values()) and out.count("*") == 9 and "biased upward" in out
    assert rows["odm", "Mayo 0"]["fid"] is None and out.count("too few images") == 1
    assert rows["odm", "all"]["copies"] == pytest.approx(1 / 12)
    assert rows["odm", "Mayo 0"]["copies"] == pytest.approx(1 / 3)
    fitted = [row["fitted_on"] for row in result["classifier"]]
    assert fitted == ["seen", "dm", "seen + dm", "odm", "seen + odm"]

    # the numbers are those of the functions, on what the folders hold
    def look(folder):
        images = (np.array(Image.open(path)) for path in sorted((folders / folder).iterdir()))
        tensors = (torch.from_numpy(image).permute(2, 0, 1) for image in images)
        return fid.features(tensors, fid.load_weights(64, weights_64))

    x, y = look("real/Mayo 1"), look("dm/deeper/Mayo 1")
    row = rows["dm", "Mayo 1"]
    assert row["fid"] == pytest.approx(fid.frechet_distance(x, y), rel=1e-4)
    assert (row["precision"], row["recall"]) == fid.precision_recall(x, y)
    assert (row["kid"], row["kid_se"]) == pytest.approx(fid.kernel_distance(x, y), rel=1e-3, abs=1e-6)

    bars = np.asarray(Image.open(files["plot"])).astype(int)[10 + 36 :: 60]  # through the middle of each bar
    lengths = [(np.abs(line - (255, 255, 255)).sum(1) > 0).sum() for line in bars]
    values = [row["fid"] for row in result["rows"] if row["fid"] is not None]
    assert np.array(lengths) / max(lengths) == pytest.approx(np.array(values) / max(values), abs=0.003)
    sheet = np.asarray(Image.open(files["neighbours"]))
    assert len(sheet) == 8 * 220
    assert np.array_equal(sheet[:190, :190], sheet[:190, 200:390])  # the copy comes first

    assert run_fid("real", "Mayo 1", "--dims", 64, "--weights", weights_64) == 0
    out = capsys.readouterr().out
    assert "classifier" not in out and "--trained-on" not in out and "Mayo 0" not in out
    monkeypatch.setattr(odm, "load_images", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    assert run_fid("real", "dm", "--dims", 64, "--weights", weights_64) == 130


@pytest.mark.parametrize(
    "words, message",
    [
        (["real", "empty"], "empty: no images in it"),
        (["empty", "dm"], "empty: no images"),
        (["real", "none"], "none: no such folder"),
        (["none", "dm"], "none: no such folder"),
        (["real", "between"], "between: no class of the real images (Mayo 0, Mayo 1, Mayo 2): 0.5, 1.5"),
        (["real", "wide"], "give the real ones' --size"),
        (["real", "dm", "wide"], "give the real ones' --size"),
        (["real", "broken", "--size", 16], "002.png"),
        (["real", "dm", "--dims", 2048], "which --dims 2048 needs"),
        (["real", "dm", "--dims", 100], "--dims"),
        (["real", "dm", "--size", 0], "--size"),
        (["real", "dm", "--batch", "-1"], "--batch"),
        (["real", "dm", "--crop", "x"], "--crop"),
        (["real", "dm", "--json", "none/s.json"], "none/s.json: must be a file"),
        (["real", "dm", "--plot", "real"], "real: must be a file"),
        (["real", "dm", "--neighbours", "n.png"], "--trained-on"),
        (["real", "dm", "--trained-on", "other"], "--trained-on other"),
        (["real", "dm", "--trained-on", "none"], "none: no such folder"),
        (["real"], "GENERATED"),
        (["real", "dm", "--weights", "real"], "no network in real"),
    ],
)
def test_fid_bad_input_is_one_line_and_status_2(words, message, folders, weights_64, capsys, monkeypatch):
    monkeypatch.chdir(folders)
    monkeypatch.setattr(fid, "features", lambda images, *_: torch.rand(len(list(images)), 64))  # quick
    assert run_fid("--dims", 64, "--weights", weights_64, *words) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("fid.py: error: ") and message in lines[0]


def test_random_command_lines_never_end_in_a_traceback(folders, weights_64, capsys, monkeypatch):
    monkeypatch.chdir(folders)
    rng = random.Random(0)
    values = ["", "0", "-1", "3", "1e9", "99999999999999999999", "nan", "real", "none/x", "²", "--"]
    flags = ["--dims", "--weights", "--size", "--crop", "--order", "--columns", "-k", "--batch", "--json"]
    flags += ["--plot", "--trained-on", "--neighbours", "--nonsense"]
    monkeypatch.setattr(fid, "features", lambda images, *_: torch.rand(len(list(images)), 64))  # quick
    for _ in range(150):
        words = [rng.choice(["real", "Mayo 1", "none", "empty", ""]) for _ in range(rng.randint(0, 2))]
        for _ in range(rng.randint(1, 3)):
            words += [rng.choice(flags), rng.choice(values)]
        status = run_fid("--weights", weights_64, "--dims", 64, *words)
        errors = [line for line in capsys.readouterr().err.splitlines() if not line.count(": passed over, ")]
        assert status == (2 if errors else 0) and len(errors) < 2, (words, errors)
        assert all(line.startswith("fid.py: error: ") for line in errors), words


if __name__ == "__main__":
    sys.exit(pytest.main([__file__, "-q"]))
