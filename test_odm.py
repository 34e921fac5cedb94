"""Tests of odm.py, fid.py and data/demo.py against independent references: closed forms, loops, hand-made cases.

    python -m pytest -q test_odm.py
    python test_odm.py bench                                # speed and memory of the paper's settings
    python test_odm.py bench --preset small --rounds 20     # any flags of `odm.py train`; --diffusers: beside that package
"""

import csv
import http.server
import importlib.util
import itertools
import json
import math
import os
import pickle
import platform
import random
import signal
import subprocess
import sys
import threading
import time
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch
from PIL import Image

import fid
import odm

HERE = Path(__file__).resolve().parent
if __name__ != "__main__":  # networks of the tests are too small to share; on a busy machine threads wait for each other
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that tests start
spec = importlib.util.spec_from_file_location("demo", HERE / "data" / "demo.py")
demo = importlib.util.module_from_spec(spec)
spec.loader.exec_module(demo)
TINY = dict(size=8, ch=8, groups=2, ch_mult=(1, 2), blocks=1, attention=(4,), timesteps=50, batch=8, steps=6, warmup=2, lr=1e-3,
            sample_steps=4, log_every=2, save_every=2, sheet_every=0, device="cpu")


def max_error(a, b) -> float:
    return (torch.as_tensor(a) - torch.as_tensor(b)).abs().max().item()


def noise(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def averaged(checkpoint):
    """(network of four classes with its averaged weights, its settings)."""
    state = odm.load_checkpoint(checkpoint)
    model = odm.UNet(state["config"], 4).eval()
    model.load_state_dict(state["ema"])
    return model, state["config"]


def write_images(root, names_and_counts, size=(12, 10), seed=0, suffix=".png"):
    """A tree of class folders with random images; returns root."""
    rng = np.random.default_rng(seed)
    for name, count in names_and_counts.items():
        (root / name).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            pixels = rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / name / f"{name.split('/')[-1].replace(' ', '')}_{i}{suffix}")
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
    return [part for name, value in settings.items()
            for part in (odm.flag(name), ",".join(map(str, value)) if isinstance(value, tuple) else str(value))]


def command(*argv, **kwargs) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, *map(str, argv)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **kwargs)


def error_of(capsys, *argv) -> str:
    """Run the command line, which must fail with status 2 and one line; return the line."""
    try:
        status = odm.main([str(a) for a in argv])
    except SystemExit as exit:
        status = exit.code
    lines = capsys.readouterr().err.strip().splitlines()
    assert status == 2 and len(lines) == 1 and lines[0].startswith("odm.py: error: "), (status, lines)
    return lines[0]


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


def loop_ordinal(eps_hat, squared=False, severity=None):
    """Eq. 5 by loops over ladders and triplets, with NumPy; distances are root mean squares, or mean squares."""
    def d(a, b):
        mean_square = float(np.mean((a - b) ** 2))
        return mean_square if squared else math.sqrt(mean_square)

    result = []
    for g, ladder in enumerate(eps_hat.numpy()):
        terms = []
        for p in range(len(ladder)):
            for q in range(p + 1, len(ladder)):
                for r in range(q + 1, len(ladder)):
                    pq, qr, pr = d(ladder[p], ladder[q]), d(ladder[q], ladder[r]), d(ladder[p], ladder[r])
                    if severity is None:
                        terms.append((pr - (pq + qr)) ** 2)
                    else:
                        a, b, c = (float(severity[g][i]) for i in (p, q, r))
                        terms.append((pq - pr * (b - a) / (c - a)) ** 2 + (qr - pr * (c - b) / (c - a)) ** 2)
        result.append(sum(terms) / len(terms))
    return torch.tensor(result, dtype=torch.float64)


@pytest.mark.parametrize("K", [3, 4, 5])
@pytest.mark.parametrize("distance", ["euclidean", "squared"])
def test_ordinal_loss_equals_loops_over_triplets(K, distance):
    eps_hat = noise(4, K, 3, 5, 5, seed=K, dtype=torch.float64)
    assert max_error(odm.ordinal_loss(eps_hat, distance), loop_ordinal(eps_hat, distance == "squared")) < 1e-12
    severity = torch.tensor([[0.0, 1, 2, 3, 4], [0, 2, 3, 5, 9], [1, 1.5, 4, 5, 6], [0, 1, 3, 4, 7]], dtype=torch.float64)[:, :K]
    expected = loop_ordinal(eps_hat, distance == "squared", severity)
    assert max_error(odm.ordinal_loss(eps_hat, distance, severity), expected) < 1e-12


def test_euclidean_is_zero_on_ordered_lines_and_only_there():
    direction = torch.arange(12.0, dtype=torch.float64).view(1, 1, 3, 2, 2)
    line = lambda *at: torch.tensor(at, dtype=torch.float64).view(1, -1, 1, 1, 1) * direction
    assert odm.ordinal_loss(line(0, 1, 4)).item() < 1e-28 and abs(odm.straightness(line(0, 1, 4)).item() - 1) < 1e-14
    rms = direction.square().mean().sqrt().item()
    assert abs(odm.ordinal_loss(line(0, 4, 1)).item() - (6 * rms) ** 2) < 1e-9  # d = 1, (4, 3): out of order
    assert abs(odm.ordinal_loss(line(0, 1, 4), "squared").item() - (6 * rms**2) ** 2) < 1e-9  # 2 <p-q, q-r> = 2 * 1 * 3


def test_squared_is_zero_at_the_right_angle_and_positive_between():
    p, q, r = torch.tensor([3.0, 0]), torch.tensor([0.0, 0]), torch.tensor([0.0, 5])
    assert odm.ordinal_loss(torch.stack([p, q, r])[None], "squared").item() == 0
    assert odm.ordinal_loss(torch.stack([p, q, r])[None]).item() > 1  # the Euclidean one is not fooled
    for alpha in (0.1, 0.5, 0.9):  # Eq. 7 holds here, yet the printed loss is positive
        between = torch.stack([p, alpha * p + (1 - alpha) * r, r])[None]
        assert odm.ordinal_loss(between, "squared").item() > 0.1 and odm.ordinal_loss(between).item() < 1e-12


def test_spacing_is_zero_only_at_the_severities_own_distances():
    direction, severity = noise(8), torch.tensor([[0.0, 1, 3]])
    at = lambda *s: (torch.tensor(s).view(1, -1, 1) * direction)
    assert odm.ordinal_loss(at(0, 1, 3), severity=severity).item() < 1e-12
    assert odm.ordinal_loss(at(0, 1.5, 3), severity=severity).item() > 1e-2  # on the line, at the wrong place
    assert odm.ordinal_loss(at(0, 1.5, 3)).item() < 1e-12


@pytest.mark.parametrize("distance, low, high", [("euclidean", 0.99, 1.0001), ("squared", 0.66, 0.76)])
def test_what_the_loss_does_to_free_vectors(distance, low, high):
    """Eq. 7 follows from the Euclidean norm alone; the norm as printed ends at right angles, straightness 0.71."""
    points = noise(64, 3, 16, seed=1).requires_grad_()
    optimizer = torch.optim.Adam([points], lr=0.02)
    for _ in range(600):
        optimizer.zero_grad()
        odm.ordinal_loss(points, distance).sum().backward()
        optimizer.step()
    assert low < odm.straightness(points).mean().item() < high


def test_gradient_where_estimates_coincide_is_zero_not_nan():
    points = torch.ones(2, 3, 4, requires_grad=True)
    odm.ordinal_loss(points).sum().backward()
    assert torch.equal(points.grad, torch.zeros_like(points)) and odm.straightness(points).tolist() == [1, 1]


def test_straightness_of_an_equilateral_triangle_is_one_half():
    triangle = torch.tensor([[[0.0, 0], [1, 0], [0.5, math.sqrt(0.75)]]])
    assert abs(odm.straightness(triangle).item() - 0.5) < 1e-6


def test_losses_are_float32_under_bfloat16():
    eps_hat = noise(2, 3, 3, 8, 8).bfloat16()
    assert odm.ordinal_loss(eps_hat).dtype == torch.float32
    assert max_error(odm.ordinal_loss(eps_hat), loop_ordinal(eps_hat.double())) < 1e-6
    assert odm.dm_loss(noise(2, 3, 8, 8), eps_hat[:, 0]).dtype == torch.float32


def test_bfloat16_does_not_drown_the_ordinal_loss():
    """At t = 900 the classes' estimates differ by 0.003; rounded to bfloat16 throughout, L_ordinal comes out ten times too large."""
    model, config = averaged(HERE / "data" / "demo.pt")
    frames = [demo.draw(*demo.scene(9, i % 4, i), 32) for i in range(8)]
    x_0, t = odm.to_unit(torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2)), torch.full((8,), 900)
    x_t = odm.q_sample(x_0, t, noise(*x_0.shape), odm.alpha_bars(config))

    def loss(precision):
        net = odm.Network(model, replace(config, precision=precision, compile="off"), torch.device("cpu"))
        with torch.no_grad():
            return odm.ordinal_loss(torch.stack([net(x_t, t, torch.full_like(t, c)) for c in range(4)], 1)).mean().item()

    assert loss("bfloat16") == pytest.approx(loss("float32"), rel=0.5)
    assert loss("bfloat16") != loss("float32")


def batches(labels=None, severities=(0, 1, 2, 3), **changes):
    labels = torch.tensor([0] * 50 + [1] * 30 + [2] * 15 + [3] * 5) if labels is None else labels
    return odm.Batches(odm.Config(**{**TINY, **changes}), labels, list(severities)), labels


def test_weight_zero_is_the_plain_diffusion_model_bit_by_bit():
    """W = 0, in either reading, against a training step of L_DM written out here."""
    weights = []
    for ladder in ("labels", "images", "by hand"):
        made, labels = batches(ordinal=0.0, ladder="images" if ladder == "images" else "labels")
        config = made.config
        torch.manual_seed(0)
        model, images = odm.UNet(config, 4).train(), noise(100, 3, 8, 8, seed=3).clamp(-1, 1)
        optimizer, alpha_bar = torch.optim.Adam(model.parameters(), lr=1e-3), odm.alpha_bars(config)
        for step in range(3):
            batch = made.draw(step)
            x_0, eps = images[batch.index], noise(8, 3, 8, 8, seed=10 + step)
            torch.manual_seed(step)  # dropout
            if ladder == "by hand":
                a = alpha_bar[batch.t][:, None, None, None]
                x_t = a.sqrt().float() * x_0 + (1 - a).sqrt().float() * eps
                label = torch.where(batch.row_label == 4, 4, labels[batch.index])
                loss = ((eps - model(x_t, batch.t, label)) ** 2).flatten(1).mean(1).mul(1 / 8).sum()
            else:
                assert len(batch.ladder) == 0 and len(batch.row_image) == 8 and len(set(batch.noise_index.tolist())) == 8
                loss = odm.total_loss(model, x_0, eps, batch, alpha_bar, config)[0]
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        weights.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert torch.equal(weights[0], weights[1]) and torch.equal(weights[0], weights[2])


@pytest.mark.parametrize("ladder", ["labels", "images"])
@pytest.mark.parametrize("spacing", [False, True])
def test_total_loss_is_equation_8(ladder, spacing):
    """Against one image and one ladder at a time, with a model that is a formula."""
    made, _ = batches(ladder=ladder, spacing=spacing, ordinal=0.7, class_dropout=0.3, batch=13, severities=(0, 1, 2.5, 4))
    config, alpha_bar = made.config, odm.alpha_bars(made.config)
    direction = noise(5, 3, 8, 8, seed=7)
    model = lambda x, t, c, image=None: 0.5 * x + direction[c] * (1 + t[:, None, None, None] / 50)
    for step in range(4):
        batch = made.draw(step)
        x_0, eps = noise(13, 3, 8, 8, seed=step), noise(13, 3, 8, 8, seed=50 + step)[batch.noise_index]
        dm, ordinal, count = 0.0, 0.0, 0
        estimate = lambda row: model(odm.q_sample(x_0[i := batch.row_image[row]][None], batch.t[i][None], eps[i][None], alpha_bar),
                                     batch.t[i][None], batch.row_label[row][None])[0]
        for b in range(13):
            dm += batch.weight[b].item() * ((eps[b] - estimate(b)) ** 2).mean().item()
        for rungs, severity in zip(batch.ladder, batch.severity):
            if 4 in batch.row_label[rungs]:
                continue  # the null class has no place on the ladder
            t = batch.t[batch.row_image[rungs]]
            assert len(set(t.tolist())) == 1
            stack = torch.stack([estimate(row) for row in rungs])[None].double()
            ordinal += t[0].item() / 50 * loop_ordinal(stack, severity=severity[None] if spacing else None).item()
            count += 1
        assert count > 0
        total, dm_term, ordinal_term = odm.total_loss(model, x_0, eps, batch, alpha_bar, config)
        assert abs(dm_term.item() - dm) < 1e-5 and abs(ordinal_term.item() - ordinal / count) < 1e-5
        assert abs(total.item() - (dm + 0.7 * ordinal / count)) < 1e-5


# -------------------------------------------------------------------------------------- batches


def test_ladders_of_labels_show_one_image_under_ascending_classes():
    made, labels = batches(batch=32, class_dropout=0.2)
    seen = set()
    for step in range(40):
        b = made.draw(step)
        assert len(b.index) == 32 and len(b.row_image) == 32 + 8 * 2 and b.ladder.shape == (8, 3)
        for rungs, severity, weight in zip(b.ladder, b.severity, b.ladder_weight):
            assert len(set(b.row_image[rungs].tolist())) == 1
            own, classes = labels[b.index[b.row_image[rungs[0]]]].item(), severity.int().tolist()
            assert classes == sorted(set(classes)) and own in classes
            shown = b.row_label[rungs].tolist()
            assert (weight == 0) == (4 in shown)
            assert shown == [4 if (c == own and weight == 0) else c for c in classes]
            seen.add(tuple(classes))
        assert len(set(b.row_image[b.ladder[:, 0]].tolist())) == 8
        assert abs(b.ladder_weight.sum().item() - 1) < 1e-6
    assert seen == set(itertools.combinations(range(4), 3))


def test_ladders_of_images_share_noise_and_time():
    made, labels = batches(ladder="images", batch=32, class_dropout=0.2)
    for step in range(20):
        b = made.draw(step)
        assert b.ladder.shape == (10, 3) and torch.equal(b.row_image, torch.arange(32))
        for rungs, severity, weight in zip(b.ladder, b.severity, b.ladder_weight):
            assert len(set(b.noise_index[rungs].tolist())) == 1 and len(set(b.t[rungs].tolist())) == 1
            assert labels[b.index[rungs]].tolist() == severity.int().tolist() == sorted(set(severity.int().tolist()))
            assert (weight == 0) == (4 in b.row_label[rungs].tolist())
        assert len(set(b.noise_index[30:].tolist()) | set(b.noise_index[b.ladder[:, 0]].tolist())) == 12  # all others are apart


@pytest.mark.parametrize("ladder", ["labels", "images"])
@pytest.mark.parametrize("balance", ["data", "uniform"])
def test_balance_is_what_the_expectation_of_L_DM_is_taken_over(ladder, balance):
    made, labels = batches(ladder=ladder, balance=balance, batch=32)
    mass = torch.zeros(4, dtype=torch.float64)
    for step in range(600):
        b = made.draw(step)
        mass += torch.zeros(4, dtype=torch.float64).index_add(0, labels[b.index], b.weight.double())
    expected = torch.tensor([0.5, 0.3, 0.15, 0.05] if balance == "data" else [0.25] * 4)
    assert max_error(mass / 600, expected) < 0.015  # 19,200 images: five standard errors


def test_a_coin_for_each_image_and_every_t():
    made, labels = batches(batch=64, class_dropout=0.25, ordinal=0.0)
    dropped, times = [], set()
    for step in range(200):
        b = made.draw(step)
        dropped.append((b.row_label == 4).double().mean().item())
        times |= set(b.t.tolist())
    assert abs(np.mean(dropped) - 0.25) < 0.02 and 0.03 < np.std(dropped) < 0.08  # binomial: sqrt(.25 * .75 / 64) = 0.054
    assert times == set(range(1, 51))


@pytest.mark.parametrize("ladder", ["labels", "images"])
@pytest.mark.parametrize("world", [2, 3])
def test_the_parts_of_a_batch_add_up_to_the_whole(ladder, world):
    made, _ = batches(ladder=ladder, batch=24, class_dropout=0.2)
    config, alpha_bar = made.config, odm.alpha_bars(made.config)
    direction, images, eps = noise(5, 3, 8, 8, seed=7), noise(100, 3, 8, 8, seed=1), noise(24, 3, 8, 8, seed=2)
    model = lambda x, t, c, image: 0.5 * x + direction[c] * (1 + t[:, None, None, None] / 50)
    whole = made.draw(5)
    expected = odm.total_loss(model, images[whole.index], eps[whole.noise_index], whole, alpha_bar, config)
    parts = [odm.part_of(whole, rank, world) for rank in range(world)]
    sums = [odm.total_loss(model, images[p.index], eps[p.noise_index], p, alpha_bar, config) for p in parts]
    assert sum(len(p.ladder) for p in parts) == len(whole.ladder) and min(len(p.index) for p in parts) > 0
    for i in range(3):
        assert abs(sum(s[i].item() for s in sums) - expected[i].item()) < 1e-5


# ------------------------------------------------------------------------------------- sampling


def gaussian_denoiser(mean, std, alpha_bar):
    """The exact E[eps | x_t] where x_0 ~ N(mean, std^2)."""
    def eps_fn(x, t):
        a = alpha_bar[t].view(-1, *[1] * (x.dim() - 1))
        return (1 - a).sqrt() * (x - a.sqrt() * mean) / (a * std**2 + 1 - a)
    return eps_fn


@pytest.mark.parametrize("eta, steps", [(0.0, 250), (1.0, 1000)])
def test_ddim_with_the_exact_denoiser_of_a_gaussian(eta, steps):
    alpha_bar = odm.alpha_bars(odm.Config())
    x_T = noise(20_000, 1, dtype=torch.float64)
    torch.manual_seed(0)
    x_0 = odm.ddim_sample(gaussian_denoiser(0.3, 0.2, alpha_bar), x_T, alpha_bar, steps, eta, clip=False)
    assert abs(x_0.mean().item() - 0.3) < 0.006 and abs(x_0.std().item() / 0.2 - 1) < 0.02


def test_ddim_where_rounding_leaves_less_than_nothing():
    for changes in (dict(beta_T=0.11), dict(timesteps=100, beta_T=0.8)):  # 1 - alpha_bar_u - sigma^2 is -1e-17 there
        x_0 = odm.ddim_sample(lambda x, t: x, noise(2, 3), odm.alpha_bars(odm.Config(**changes)), steps=2, eta=1.0)
        assert x_0.isfinite().all()


@pytest.mark.parametrize("steps", [1, 7, 100, 1000])
def test_ddim_starts_at_T_and_lands_on_the_clean_image(steps):
    alpha_bar, times = odm.alpha_bars(odm.Config()), []
    target = torch.tensor([[0.25, -0.5]], dtype=torch.float64)

    def eps_fn(x, t):  # the noise that makes target of x
        times.append(t[0].item())
        return (x - alpha_bar[t].sqrt()[:, None] * target) / (1 - alpha_bar[t]).sqrt()[:, None]

    x_0 = odm.ddim_sample(eps_fn, noise(1, 2, dtype=torch.float64), alpha_bar, steps)
    assert times[0] == 1000 and times == sorted(set(times), reverse=True) and len(times) == steps
    assert max_error(x_0, target) < 1e-9


def test_ancestral_sampling_has_the_mean_of_equation_2():
    config = odm.Config(timesteps=30)
    alpha_bar, seen = odm.alpha_bars(config), []
    eps_fn = lambda x, t: seen.append((x, t[0].item())) or torch.sin(3 * x)
    odm.ddim_sample(eps_fn, noise(2, 3, dtype=torch.float64), alpha_bar, 30, eta=1.0, clip=False, noise=torch.zeros_like)
    assert [t for _, t in seen] == list(range(30, 0, -1))
    for (x_t, t), (x_next, _) in zip(seen[:-1], seen[1:]):
        beta = (0.02 - 1e-4) * (t - 1) / 29 + 1e-4
        mean = (x_t - beta / (1 - alpha_bar[t]).sqrt() * torch.sin(3 * x_t)) / math.sqrt(1 - beta)
        assert max_error(x_next, mean) < 1e-9


def test_ancestral_noise_has_the_posterior_variance():
    """With eps = 0 a step takes x to x / sqrt(alpha_t) plus sigma_t z; here z = 1."""
    alpha_bar, xs = odm.alpha_bars(odm.Config(timesteps=30)), []
    eps_fn = lambda x, t: xs.append(x.item()) or x * 0
    odm.ddim_sample(eps_fn, torch.zeros(1, dtype=torch.float64), alpha_bar, 30, 1.0, False, torch.ones_like)
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

    def forward(self, x, t, c, image=None):
        self.rows.append(c.tolist())
        return 0.1 * x + (c**2).float()[:, None, None, None] + 0.01 * t[:, None, None, None]


def test_guidance():
    model, x, t = Formula(), noise(2, 3, 4, 4), torch.tensor([10, 20])
    eps = lambda c: Formula()(x, t, torch.tensor(c))
    severity = torch.tensor([1.0, 3.0])
    assert torch.equal(odm.guided_eps(model, x, t, severity, 1.0), eps([1, 3]))  # s = 1: the conditional model
    assert model.rows == [[1, 3]]  # and nothing else is evaluated
    assert max_error(odm.guided_eps(model, x, t, severity, 0.0), eps([4, 4])) < 1e-6
    assert max_error(odm.guided_eps(model, x, t, severity, 2.0), 2 * eps([1, 3]) - eps([4, 4])) < 1e-5
    near = odm.guided_eps(model, x, t, severity, 1 + 1e-6)
    assert max_error(near, eps([1, 3])) < 1e-4  # no jump at the neutral scale


def test_a_severity_between_two_classes_is_on_the_line_between_their_estimates():
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
    draw = lambda severity, keys, eta: odm.draw_images(model, severity, keys, replace(config, sample_steps=10, eta=eta))
    for eta in (0.0, 1.0):
        together = draw([0.0, 3.0, 1.5, 2.0], [(0, i) for i in range(4)], eta)
        alone = draw([1.5], [(0, 2)], eta)
        assert (together[2].int() - alone[0].int()).abs().max() <= 1  # the last bit may round the other way
        assert len({image.numpy().tobytes() for image in together}) == 4


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
    down = odm.down(1)
    conv = down[1]
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


def test_rungs_of_a_ladder_share_their_dropout_mask():
    torch.manual_seed(0)
    drop, h, image = odm.Dropout(0.3, 2), torch.ones(3, 4, 50, 50), torch.tensor([0, 1, 1])
    out = drop(h, image)
    assert torch.equal(out[1], out[2]) and not torch.equal(out[0], out[1])
    assert abs((out == 0).float().mean().item() - 0.3) < 0.02 and max_error(out[out > 0], 1 / 0.7) < 1e-6
    assert torch.equal(drop.eval()(h, image), h)


# ------------------------------------------------------------------------------------- training


def test_ema_closed_form():
    ema, model = torch.nn.Linear(1, 1, bias=False), torch.nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        ema.weight.fill_(100.0)
    expected = 100.0
    for n in range(1, 60):
        with torch.no_grad():
            model.weight.fill_(float(n))
        odm.ema_update(ema, model, 0.8, n)
        m = min(0.8, (1 + n) / (10 + n))
        expected = m * expected + (1 - m) * n
    assert abs(ema.weight.item() - expected) < 1e-4
    assert m == 0.8 and 2 / 11 < 0.8  # both branches were taken


def state_of(out):
    return torch.load(out / "checkpoint.pt", weights_only=True)


def flat(state, part):
    if part == "optimizer":
        return torch.cat([torch.as_tensor(v).flatten().double() for s in state[part]["state"].values() for v in s.values()])
    return torch.cat([v.flatten().double() for v in state[part].values()])


@pytest.mark.parametrize("ladder", ["labels", "images"])
def test_resumed_training_equals_undisturbed_training(graded, tmp_path, ladder, capsys):
    config = odm.Config(**{**TINY, "dropout": 0.1, "ladder": ladder}, data=str(graded))
    odm.train(replace(config, out=str(tmp_path / "whole")))
    odm.train(replace(config, out=str(tmp_path / "parts"), steps=2))
    odm.train(replace(config, out=str(tmp_path / "parts"), steps=4))
    with open(tmp_path / "parts" / "metrics.csv", "a") as file:  # as if killed after a row, inside the next
        file.write("5,1,1,1,1,,\n6,1,")
    odm.train(replace(config, out=str(tmp_path / "parts")))
    assert "step 4 of 6 (resumed)" in capsys.readouterr().out
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
    line = error_of(capsys, "train", *flags(TINY), "--data", graded, "--out", run, "--ema", "0.5", "--ladder", "images")
    assert "--ema (there 0.9999, now 0.5)" in line and "--ladder (there labels, now images)" in line


@pytest.mark.parametrize("changes", [dict(), dict(ladder="images"), dict(ordinal=0.0), dict(spacing=True, rungs=0)])
def test_loss_falls_when_overfitting_8_images(tmp_path, changes):
    data = write_images(tmp_path / "data", {"0": 2, "1": 2, "2": 2, "3": 2}, size=(8, 8))
    config = odm.Config(**{**TINY, "ch": 16, "steps": 160, "lr": 3e-3, "dropout": 0.0, "log_every": 80, "save_every": 160, **changes},
                        data=str(data), out=str(tmp_path / "run"), flip=False)
    odm.train(config)
    rows = np.genfromtxt(tmp_path / "run" / "metrics.csv", delimiter=",", names=True)
    assert rows["dm"][:10].mean() > 0.9 and rows["dm"][-40:].mean() < 0.65
    assert np.allclose(rows["loss"], rows["dm"] + config.ordinal * rows["ordinal"], atol=1e-5)


def test_the_ordinal_loss_straightens_a_network(tmp_path, graded):
    """The point of it all, on a small scale: with a heavy W the estimates come to lie on a line; without, they don't."""
    straight = {}
    for weight in (0.0, 30.0):
        config = odm.Config(**{**TINY, "steps": 60, "lr": 4e-3, "ordinal": weight, "rungs": 0, "ladder_part": 1.0, "ema": 0.9,
                               "log_every": 60, "save_every": 60}, data=str(graded), out=str(tmp_path / f"{weight}"))
        odm.train(config)
        straight[weight] = np.genfromtxt(tmp_path / f"{weight}" / "metrics.csv", delimiter=",", names=True)["straightness"][-1]
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


def test_limuc_both_layouts_side_by_side(tmp_path):
    said = []
    n = 0
    for split, counts in (("train_and_validation_sets", (4, 2, 1, 1)), ("test_set", (2, 1, 1, 0))):
        for grade, count in enumerate(counts):
            (tmp_path / split / f"Mayo {grade}").mkdir(parents=True)
            for _ in range(count):
                n += 1
                bmp(tmp_path / split / f"Mayo {grade}" / f"UC_patient_{n}_1.bmp", n)
                bmp(tmp_path / "patient_based_classified_images" / f"{n % 5 + 1}" / f"Mayo {grade}" / f"UC_patient_{n}_1.bmp", n)
        (tmp_path / "patient_based_classified_images" / "1" / "Mayo 3").mkdir(parents=True, exist_ok=True)
    stray = tmp_path / "test_set" / "Mayo 1" / "New folder (2)"
    bmp(stray / "UC_patient_99_1.bmp", 99)
    bmp(tmp_path / "patient_based_classified_images" / "7" / "Mayo 2" / "copy" / "UC_patient_98_1.bmp", 98)
    bmp(tmp_path / "patient_based_classified_images" / "2" / "Mayo 0" / "Mayo 0" / "UC_patient_97_1.bmp", 97)
    (tmp_path / "test_set" / "Mayo 0" / "Thumbs.db").write_bytes(b"x")
    (tmp_path / "test_set" / "Mayo 0" / ".DS_Store").write_bytes(b"x")
    (tmp_path / "__MACOSX").mkdir()
    (tmp_path / "__MACOSX" / "._UC_patient_1_1.bmp").write_bytes(b"x")
    images, labels, names = odm.load_images(tmp_path, 64, say=said.append)
    assert names == ["Mayo 0", "Mayo 1", "Mayo 2", "Mayo 3"]
    assert labels.bincount().tolist() == [7, 4, 3, 1] and images.shape == (15, 3, 64, 64) and images.dtype == torch.uint8
    assert "12 files that are there twice" in said[0]
    images, labels, names = odm.load_images(tmp_path / "patient_based_classified_images", 32)
    assert labels.bincount().tolist() == [7, 3, 3, 1]


def test_an_image_above_the_class_folders_does_not_change_their_classes(tmp_path):
    for grade in range(3):
        bmp(tmp_path / "12" / f"Mayo {grade}" / "1.bmp", grade, (8, 8))
    bmp(tmp_path / "12" / "overview.bmp", 9, (8, 8))  # its only folder is the patient's: shown as a class of its own
    assert odm.load_images(tmp_path, 8)[2] == ["Mayo 0", "Mayo 1", "Mayo 2", "12"]
    numbers = write_images(tmp_path / "numbers", {"1/0": 2, "1/1": 1, "2/0": 1, "2/2": 1})  # patient/grade
    images, labels, names = odm.load_images(numbers, 8)
    assert names == ["0", "1", "2"] and labels.bincount().tolist() == [3, 1, 1]


def test_equal_names_with_different_content_are_different_images(tmp_path):
    bmp(tmp_path / "train" / "0" / "1.bmp", 1, (8, 8))
    bmp(tmp_path / "test" / "0" / "1.bmp", 2, (8, 8))
    bmp(tmp_path / "test" / "1" / "1.bmp", 2, (8, 8))
    assert odm.load_images(tmp_path, 8)[1].bincount().tolist() == [2, 1]


def test_crop_is_the_middle_128_of_a_frame_and_the_middle_square_of_others(tmp_path):
    x, y = np.meshgrid(np.arange(352), np.arange(288))
    frame = Image.fromarray(np.stack([x % 256, y % 256, 0 * x], -1).astype(np.uint8))
    square = odm.to_square(frame, 128, 0)
    assert square[0, 0, 0] == 112 and square[0, 0, -1] == 239 and square[1, 0, 0] == 80 and square[1, -1, 0] == 207
    assert odm.to_square(frame.crop((0, 0, 100, 60)), 60, 0)[0, 0].tolist() == list(range(20, 80))
    assert odm.to_square(frame.crop((0, 0, 100, 60)), 10, 10)[0, 0].tolist() == list(range(45, 55))
    checker = Image.fromarray((np.indices((64, 64)).sum(0) % 2 * 255).astype(np.uint8)).convert("RGB")
    assert abs(odm.to_square(checker, 8, 0).astype(int)[:, 2:-2, 2:-2] - 127.5).max() < 3  # antialiased


def test_eyepacs(tmp_path, capsys):
    folder = tmp_path / "eyepacs_preprocess" / "eyepacs_preprocess"
    folder.mkdir(parents=True)
    levels = {"10_left": 0, "10_right": 0, "13_left": 4, "15_left": 2, "16_left": 1, "17_left": 3, "404_left": 0}
    (tmp_path / "trainLabels.csv").write_text("level,image\n" + "".join(f"{v},{k}\n" for k, v in levels.items()))
    (tmp_path / "notes.csv").write_text("a,b\n1,2\n")
    for i, stem in enumerate(levels):
        if stem != "404_left":
            Image.new("RGB", (20, 16), (i * 10, 0, 0)).save(folder / f"{stem}.jpeg")
    Image.new("RGB", (20, 16)).save(folder / "unlisted.jpeg")
    said = []
    images, labels, names = odm.load_images(tmp_path, 16, say=said.append)
    assert names == ["0", "1", "2", "3", "4"] and labels.bincount().tolist() == [2, 1, 1, 1, 1]
    assert abs(int(images[2, 0].float().mean()) - 20) <= 2 and labels[2] == 4  # 13_left
    assert "lists 7 images, 1 of them are missing" in said[0] and "1 other images passed over" in said[0]
    (tmp_path / "a second.csv").write_text("image,level,Usage\nunlisted,3,Public\n")
    (tmp_path / "folder.csv").mkdir()
    (tmp_path / "junk.csv").write_text('"' + "x" * 200_000)
    assert odm.load_images(tmp_path, 16)[1].bincount().tolist() == [2, 1, 1, 2, 1]  # both tables count
    (tmp_path / "a third.csv").write_text("image,level\n10_left,1\n")
    with pytest.raises(odm.UserError, match="10_left"):
        odm.load_images(tmp_path, 16)
    (tmp_path / "none").mkdir()
    (tmp_path / "none" / "labels.csv").write_text("image,level\na,1\n")
    Image.new("RGB", (4, 4)).save(tmp_path / "none" / "b.png")
    with pytest.raises(odm.UserError, match="none of the 1 images"):
        odm.load_images(tmp_path / "none", 16)


def test_names_without_numbers_ask_for_their_order(tmp_path, capsys):
    data = write_images(tmp_path, {"No_DR": 2, "Mild": 1, "Moderate": 1})
    line = error_of(capsys, "train", "--data", data, "--out", tmp_path / "x")
    assert "--order" in line and "Mild, Moderate, No_DR" in line
    assert odm.load_images(data, 8, order="No_DR,Mild,Moderate")[2] == ["No_DR", "Mild", "Moderate"]
    assert "name each of them once" in error_of(capsys, "train", "--data", data, "--order", "No_DR,Mild")
    write_images(tmp_path / "twice", {"grade 1": 1, "class 1": 1, "grade 2": 1})
    assert "same number" in error_of(capsys, "train", "--data", tmp_path / "twice")


def test_order_is_by_number_not_by_alphabet(tmp_path):
    data = write_images(tmp_path, {"grade 10": 1, "grade 9": 1, "grade 2": 1})
    assert odm.load_images(data, 8)[2] == ["grade 2", "grade 9", "grade 10"]


def test_pixels_are_read_right(tmp_path):
    def pixel(name, at=(0, 0)):
        return odm.read_image(tmp_path / name).getpixel(at)

    Image.fromarray(np.array([[0, 32896, 65535]], np.uint16)).save(tmp_path / "sixteen.png")
    assert [pixel("sixteen.png", (i, 0)) for i in range(3)] == [(0,) * 3, (128,) * 3, (255,) * 3]
    Image.new("RGBA", (2, 2), (200, 100, 50, 0)).save(tmp_path / "clear.png")
    assert pixel("clear.png") == (0, 0, 0)
    Image.new("RGBA", (2, 2), (200, 100, 50, 128)).save(tmp_path / "half.png")
    assert np.abs(np.subtract(pixel("half.png"), (100, 50, 25))).max() <= 1
    palette = Image.new("P", (2, 2), 1)
    palette.putpalette([0, 0, 0, 10, 200, 30])
    palette.save(tmp_path / "palette.png")
    assert pixel("palette.png") == (10, 200, 30)
    palette.save(tmp_path / "clear_palette.png", transparency=1)
    assert pixel("clear_palette.png") == (0, 0, 0)
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(tmp_path / "cmyk.jpg", quality=95)
    assert np.abs(np.subtract(pixel("cmyk.jpg"), (255, 0, 0))).max() < 12
    turned = Image.new("RGB", (4, 2), "white")
    turned.putpixel((0, 0), (255, 0, 0))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned 90 degrees clockwise
    turned.save(tmp_path / "turned.png", exif=exif)
    upright = odm.read_image(tmp_path / "turned.png")
    assert upright.size == (2, 4) and upright.getpixel((1, 0)) == (255, 0, 0)
    Image.new("RGB", (2, 2), "red").save(tmp_path / "moving.gif", save_all=True, append_images=[Image.new("RGB", (2, 2), "blue")])
    assert pixel("moving.gif") == (255, 0, 0)
    Image.fromarray(np.full((2, 2), 1.5, np.float32)).save(tmp_path / "float.tif")
    with pytest.raises(odm.UserError, match="float.tif.*32 bits"):
        odm.read_image(tmp_path / "float.tif")
    Image.new("L", (2, 2), 77).save(tmp_path / "grey.png")
    assert pixel("grey.png") == (77, 77, 77)
    Image.new("1", (2, 2), 1).save(tmp_path / "bits.png")
    assert pixel("bits.png") == (255, 255, 255)
    (tmp_path / "really.jpg").write_bytes((tmp_path / "grey.png").read_bytes())  # a PNG by another name
    assert pixel("really.jpg") == (77, 77, 77)


# --------------------------------------------------------------------------------- command line


@pytest.mark.parametrize("gibibytes, images", [(80, 256), (16, 64), (1, 4), (0.01, 1)])
def test_as_many_images_are_drawn_at_once_as_a_gpu_has_memory_for(monkeypatch, gibibytes, images):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (int(gibibytes * 2**30), 2**40))
    assert odm.fitting_batch(odm.Config(), torch.device("cuda"), 1) == images
    assert odm.fitting_batch(odm.Config(), torch.device("cpu"), 1) == 16


def test_sample_folders_and_sheet(run, tmp_path):
    out = odm.sample(run, "all", n=20, out=tmp_path / "all")
    assert [len(list((out / f"Mayo {g}").glob("*.png"))) for g in range(4)] == [9, 5, 3, 3]  # the training frequencies
    before = {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in out.rglob("0*.png")}
    gone = out / "Mayo 1" / "00002.png"
    gone.unlink()
    odm.sample(run, "all", n=20, out=out)
    assert gone.read_bytes() == before[gone][0]
    assert all(p.stat().st_mtime_ns == t for p, (_, t) in before.items() if p != gone)
    with pytest.raises(odm.UserError, match="seed"):
        odm.sample(run, "all", n=20, out=out, seed=1)
    ladder = odm.sample(run, "0:3:0.5", each=2, out=tmp_path / "ladder")
    assert sorted(p.name for p in ladder.iterdir() if p.is_dir()) == ["0.5", "1.5", "2.5", "Mayo 0", "Mayo 1", "Mayo 2", "Mayo 3"]
    assert Image.open(ladder / "sheet.png").size == (7 * 132 + 4, 2 * 132 + 4 + 24)


def test_the_checkpoint_that_comes_along_draws_rising_severity(tmp_path, monkeypatch):
    assert (HERE / "data" / "demo.pt").stat().st_size < 5e6
    monkeypatch.chdir(tmp_path)  # no runs here
    out = odm.sample(severity="0:3:3", each=6, sample_steps=20)
    assert out == Path("samples/data-demo-series")
    drawn = [np.stack([np.array(Image.open(p)).transpose(2, 0, 1) for p in sorted((out / name).glob("*.png"))]) for name in ("Mayo 0", "Mayo 3")]
    mild, severe = (np.median(demo.measure(images)) for images in drawn)
    assert abs(mild - 0.25) < 0.3 and abs(severe - 2.87) < 0.5  # the medians of real drawings


def test_seeds_of_different_purposes_and_numbers_differ():
    keys = [("a",), ("a", 0), ("a", 0, 0), ("b", 0), ("a", 1), ("a", 2**32), ("a", 0, 1), ("a", 2**32, 5), ("a", 1, 5)]
    assert len({odm.seed_of(*key) for key in keys}) == len(keys) and all(0 <= odm.seed_of(*key) < 2**63 for key in keys)


def test_a_series_and_the_images_of_a_class_are_kept_apart(run, tmp_path):
    odm.sample(run, "3", n=1, out=tmp_path / "o")
    with pytest.raises(odm.UserError, match="series"):
        odm.sample(run, "0:3:1", each=1, out=tmp_path / "o")
    series = odm.sample(run, "0:3:1.5", each=1, out=tmp_path / "s")
    alone = odm.sample(run, "0:3:3", each=1, out=tmp_path / "t")
    assert (series / "Mayo 3" / "00000.png").read_bytes() == (alone / "Mayo 3" / "00000.png").read_bytes()


def test_image_i_depends_on_seed_class_and_i_alone(run, tmp_path):
    few = odm.sample(run, "2", n=3, out=tmp_path / "few", batch=2)
    many = odm.sample(run, "all", each=6, out=tmp_path / "many", batch=5)
    read = lambda path: np.asarray(Image.open(path)).astype(int)
    for i in range(3):
        assert np.abs(read(few / "Mayo 2" / f"{i:05d}.png") - read(many / "Mayo 2" / f"{i:05d}.png")).max() <= 1
    other = odm.sample(run, "2", n=3, out=tmp_path / "other", seed=1)
    assert np.abs(read(few / "Mayo 2" / "00000.png") - read(other / "Mayo 2" / "00000.png")).max() > 20


def test_severities_on_the_command_line():
    classes = odm.Classes(["Mayo 1", "Mayo 2", "Mayo 3"], [1.0, 2.0, 3.0], [5, 3, 2])
    parse = lambda text: odm.parse_severities(text, classes)
    assert parse("3") == [("Mayo 3", 2.0)] and parse("Mayo 2") == [("Mayo 2", 1.0)] and parse("1.5") == [("1.5", 0.5)]
    assert parse("1:2:0.25") == [("Mayo 1", 0.0), ("1.25", 0.25), ("1.5", 0.5), ("1.75", 0.75), ("Mayo 2", 1.0)]
    assert parse("all") == [("Mayo 1", 0.0), ("Mayo 2", 1.0), ("Mayo 3", 2.0)]
    gap = odm.Classes(["0", "2"], [0.0, 2.0], [1, 1])
    assert odm.parse_severities("1", gap) == [("1", 0.5)]  # between two classes, by their severities
    for wrong in ("0", "4", "Mayo 4", "1:2:0", "3:1:1", "1:2:3:4", "nan", "", "1:nan:1", "1:3:1e-9"):
        with pytest.raises(odm.UserError, match="--class"):
            parse(wrong)


def test_shares():
    assert odm.shares(11276, [6105, 3052, 1254, 865]) == [6105, 3052, 1254, 865]
    assert odm.shares(10, [1, 1, 1]) == [4, 3, 3] and sum(odm.shares(50_000, [6105, 3052, 1254, 865])) == 50_000


def test_bad_input_is_one_line_and_status_2(run, graded, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    one = write_images(tmp_path / "one", {"Mayo 0": 2})
    broken = write_images(tmp_path / "broken", {"0": 1, "1": 1, "2": 1})
    victim = broken / "1" / "1_0.png"
    victim.write_bytes(victim.read_bytes()[:60])
    torn, junk = tmp_path / "torn.pt", tmp_path / "junk.pt"
    torn.write_bytes((run / "checkpoint.pt").read_bytes()[:-2000])
    junk.write_bytes(b"no checkpoint at all")
    flipped = tmp_path / "flipped.pt"
    content = bytearray((run / "checkpoint.pt").read_bytes())
    content[len(content) // 2] ^= 4
    flipped.write_bytes(content)
    shape = tmp_path / "shape.pt"
    state = state_of(run)
    torch.save({**state, "config": {**state["config"], "ch": 16}}, shape)
    for expected, argv in {
        "no such folder": ["train", "--data", tmp_path / "absent"],
        "no images": ["train", "--data", tmp_path / "empty"],
        "one class only": ["train", "--data", one],
        "no image has a class": ["train", "--data", one / "Mayo 0"],
        str(victim): ["train", "--data", broken],
        "--crop 11": ["train", "--data", graded, "--crop", "11"],
        "no such class": ["sample", "--checkpoint", run, "--class", "severe"],
        "not among the classes": ["sample", "--checkpoint", run, "--class", "4"],
        "another shape": ["sample", "--checkpoint", shape],
        f"{torn}: not a whole checkpoint": ["sample", "--checkpoint", torn],
        f"{flipped}: not a whole checkpoint": ["sample", "--checkpoint", flipped],
        f"{junk}: not a whole checkpoint": ["sample", "--checkpoint", junk],
        "no such checkpoint": ["sample", "--checkpoint", tmp_path / "none.pt"],
        "--batch 0": ["train", "--data", graded, "--batch", "0"],
        "--lr nan": ["train", "--data", graded, "--lr", "nan"],
        "--beta-T": ["train", "--data", graded, "--beta-1", "0.5"],
        "--size 62": ["train", "--data", graded, "--size", "62"],
        "--rungs 2": ["train", "--data", graded, "--rungs", "2"],
        "--ch 20: must be a multiple of 4 and of --groups (32)": ["train", "--data", graded, "--ch", "20"],
        "--spacing": ["train", "--data", graded, "--spacing", "--distance", "squared"],
        "--ladder x": ["train", "--data", graded, "--ladder", "x"],
        "--steps": ["train", "--steps", "many"],
        "--device": ["train", "--data", graded, "--device", "abacus"],
        "--sample-steps 51": ["sample", "--checkpoint", run, "--sample-steps", "51"],
        "--eta 2": ["sample", "--checkpoint", run, "--eta", "2"],
        "give one of them": ["sample", "--checkpoint", run, "-n", "4", "--each", "2"],
        "no room for a ladder": ["train", *flags(TINY), "--data", graded, "--out", tmp_path / "x", "--ladder-part", "0"],
        "leaves nothing of the image": ["train", "--data", graded, "--beta-T", "0.9"],
        "-n -1": ["sample", "--checkpoint", run, "-n", "-1"],
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
    loaded = odm.load_checkpoint(tmp_path / "other.pt")
    said = capsys.readouterr().out
    assert loaded["config"].guidance == 2.0 and "from_the_future" in said and "guidance" in said


@pytest.mark.parametrize("name", ["../../x", "/etc/x", "..", "a\\b"])
def test_class_names_never_become_paths(run, tmp_path, capsys, name):
    state = state_of(run)
    state["classes"]["names"][0] = name
    torch.save(state, tmp_path / "evil.pt")
    assert "cannot be the name of a folder" in error_of(capsys, "sample", "--checkpoint", tmp_path / "evil.pt", "--out", tmp_path / "o")
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
    process = command(HERE / "odm.py", "train", *flags({**TINY, "steps": 100_000}), "--data", graded, "--out", "a b/\u00e9", cwd=tmp_path)
    out, deadline = tmp_path / "a b" / "\u00e9", time.monotonic() + 60
    while not (out / "checkpoint.pt").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(number)
    said, errors = process.communicate(timeout=60)
    assert process.returncode == status and errors == "odm.py: stopped; the same command goes on\n"
    step = state_of(out)["step"]
    assert f"stopped and saved at step {step:,}; the same command goes on" in said
    assert (out / "metrics.csv").read_text().splitlines()[-1].startswith(f"{step},")


def test_killed_at_random_training_and_sampling_end_as_if_undisturbed(graded, tmp_path):
    settings = {**TINY, "dropout": 0.1, "steps": 40, "save_every": 3}
    torch.set_num_threads(1)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    rng = np.random.default_rng(0)
    for name, kills in (("whole", 0), ("killed", 3)):
        for kill in [True] * kills + [False]:
            process = command(HERE / "odm.py", "train", *flags(settings), "--data", graded, "--out", tmp_path / name, env=environment)
            if kill:
                while process.poll() is None and not (tmp_path / name / "metrics.csv").exists():
                    time.sleep(0.02)
                time.sleep(rng.uniform(0, 1))
                process.kill()
            process.communicate(timeout=120)
        assert process.returncode == 0
    for part in ("model", "ema", "optimizer"):
        assert torch.equal(flat(state_of(tmp_path / "whole"), part), flat(state_of(tmp_path / "killed"), part)), part
    assert (tmp_path / "whole" / "metrics.csv").read_bytes() == (tmp_path / "killed" / "metrics.csv").read_bytes()


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_freed_memory_is_kept():
    """Else each 64 MB costs 16,384 page faults or more, every time."""
    code = ("import resource, sys, odm; odm.keep_freed_memory() if sys.argv[1] == 'keep' else None; bytearray(2**26);"
            "faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt; before = faults(); bytearray(2**26); print(faults() - before)")
    kept, not_kept = (int(subprocess.run([sys.executable, "-c", code, how], capture_output=True, text=True, cwd=HERE).stdout) for how in ("keep", "not"))
    assert kept < 0.1 * not_kept


def test_a_batch_too_small_for_its_processes_is_refused(graded, tmp_path, monkeypatch):
    monkeypatch.setattr(odm, "start", lambda device: (torch.device("cpu"), 0, 3))
    monkeypatch.setattr(odm, "least", lambda number, device, world: number)
    config = odm.Config(**{**TINY, "batch": 8, "ladder": "images", "rungs": 4}, data=str(graded), out=str(tmp_path / "run"))
    with pytest.raises(odm.UserError, match="--batch 8: too few images to divide among 3 processes"):  # two ladders of 4
        odm.train(config)


def test_two_processes_are_one(graded, tmp_path):
    """The same losses to rounding and the same sample files."""
    settings = flags({**TINY, "dropout": 0.1})
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", HERE / "odm.py"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for name, how in (("one", [HERE / "odm.py"]), ("two", launch)):
        process = command(*how, "train", *settings, "--data", graded, "--out", tmp_path / name, env=environment)
        assert "trained to step 6" in process.communicate(timeout=120)[0]
        process = command(*how, "sample", "--checkpoint", tmp_path / "one", "-n", 20, "--batch", 4, "--out", tmp_path / f"{name} samples", env=environment)
        assert process.communicate(timeout=120)[0].count("20 images are in") == 1
    one, two = (np.genfromtxt(tmp_path / name / "metrics.csv", delimiter=",", skip_header=1) for name in ("one", "two"))
    assert np.nanmax(np.abs(one - two)) < 1e-5 and one.shape == (6, 7)
    pngs = sorted((tmp_path / "one samples").rglob("*.png"))
    assert len(pngs) == 21  # and the sheet
    for png in pngs:
        assert png.read_bytes() == (tmp_path / "two samples" / png.relative_to(tmp_path / "one samples")).read_bytes()


def test_a_second_run_on_the_same_folder_is_kept_out(graded, tmp_path, capsys):
    lock = odm.lock_folder(tmp_path / "run")
    assert "another process is writing there" in error_of(capsys, "train", *flags(TINY), "--data", graded, "--out", tmp_path / "run")
    lock.close()
    odm.lock_folder(tmp_path / "run").close()


def test_no_space_for_a_checkpoint(graded, run, tmp_path, capsys, monkeypatch):
    disk = type("usage", (), {"free": 1000})
    monkeypatch.setattr(odm.shutil, "disk_usage", lambda path: disk)
    assert "a checkpoint takes" in error_of(capsys, "train", *flags(TINY), "--data", graded, "--out", tmp_path / "run")
    monkeypatch.undo()

    def full(state, file):  # the disk fills up while it writes
        file.write(b"half a checkpoint")
        raise OSError(28, "No space left on device")

    config = odm.Config(**{**TINY, "steps": 8}, data=str(graded), out=str(tmp_path / "copy"))
    odm.train(replace(config, steps=6))
    before = (tmp_path / "copy" / "checkpoint.pt").read_bytes()
    monkeypatch.setattr(odm.torch, "save", full)
    with pytest.raises(odm.UserError, match="No space left on device.*free some space"):
        odm.train(config)
    assert (tmp_path / "copy" / "checkpoint.pt").read_bytes() == before
    assert sorted(p.name for p in (tmp_path / "copy").iterdir()) == [".lock", "checkpoint.pt", "metrics.csv", "sheet.png", "sheets"]


def test_random_flags_fail_in_one_line(tmp_path, capsys):
    """Every failure is one line and status 2; the data folder is absent, so that all 300 of them do fail."""
    rng = np.random.default_rng(0)
    values = ["", "0", "1", "-1", "3", "7", "1e309", "nan", "inf", "-inf", "0.5", "1,2", "1,2,2", ",", "x", "--", "\u00e9", "99999999999999999999", "euclidean", "\n"]
    names = [odm.flag(f.name) for f in odm.fields(odm.Config) if f.name not in ("data", "device")]
    for _ in range(300):
        chosen = [part for name in rng.choice(names, rng.integers(1, 5)) for part in (name, values[rng.integers(len(values))])]
        assert error_of(capsys, "train", "--data", tmp_path / "absent", *chosen), chosen


def mutations(rng, folder):
    """Whole images of many kinds, and damaged ones."""
    pixels = Image.fromarray(rng.integers(0, 256, (40, 48, 3), dtype=np.uint8))
    seeds = []
    for name, image, options in (
        ("a.png", pixels, {}), ("b.jpg", pixels, dict(quality=90)), ("c.jpg", pixels, dict(progressive=True)), ("d.bmp", pixels, {}),
        ("e.tif", pixels, dict(compression="tiff_lzw")), ("f.webp", pixels, {}), ("g.gif", pixels, {}), ("h.png", pixels.convert("RGBA"), {}),
        ("i.jpg", pixels.convert("CMYK"), {}), ("j.png", pixels.convert("P"), {}), ("k.png", pixels.convert("L"), {}),
        ("l.png", pixels.resize((1, 1)), {}), ("m.png", pixels.resize((1, 5000)), {}),
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
            image = odm.to_square(odm.read_image(file), 16, 0)
            assert image.shape == (3, 16, 16) and image.dtype == np.uint8
            read += 1
        except odm.UserError as error:
            assert str(error).startswith(str(file)) and "\n" not in str(error)
            named += 1
        assert time.monotonic() - begun < 10
    assert read > 150 and named > 150 and read + named == 523
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < 4 * 2**20  # KiB


def test_a_huge_claimed_size_is_refused_before_it_is_unpacked(tmp_path):
    import struct
    import zlib

    chunk = lambda kind, data: struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    for side in (20_000, 2**31 - 1):
        header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
        (tmp_path / "bomb.png").write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b""))
        with pytest.raises(odm.UserError, match="bomb.png: not readable"):
            odm.read_image(tmp_path / "bomb.png")


def test_links_that_loop_or_leave_do_no_harm(tmp_path):
    data = write_images(tmp_path / "data", {"0": 2, "1": 2, "2": 2})
    outside = write_images(tmp_path / "outside", {"5": 3})
    (data / "0" / "loop").symlink_to(data)
    (data / "out").symlink_to(outside)
    (data / "1" / "dangling.png").symlink_to(tmp_path / "nothing")
    with pytest.raises(odm.UserError, match="dangling.png"):
        odm.load_images(data, 8)
    (data / "1" / "dangling.png").unlink()
    assert odm.load_images(data, 8)[1].tolist() == [0, 0, 1, 1, 2, 2]


# -------------------------------------------------------------------------------- data/demo.py


def files(root):
    """Every file below root with its bytes and time of change."""
    return {str(f.relative_to(root)): (f.read_bytes(), f.stat().st_mtime_ns) for f in Path(root).rglob("*") if f.is_file()}


def channels_first(frames):
    return np.stack(frames).transpose(0, 3, 1, 2)


def test_a_frame_is_a_function_of_seed_grade_and_number():
    for at in ((0, 0, 0), (0, 3, 7), (5, 2, 1)):
        first, again = demo.draw(*demo.scene(*at)), demo.draw(*demo.scene(*at))
        assert first.shape == (64, 64, 3) and first.dtype == np.uint8
        assert np.array_equal(first, again)
    assert not np.array_equal(demo.draw(*demo.scene(0, 1, 0)), demo.draw(*demo.scene(0, 1, 1)))
    assert not np.array_equal(demo.draw(*demo.scene(0, 1, 0)), demo.draw(*demo.scene(1, 1, 0)))


def test_severity_names_its_grade_and_stays_in_range():
    for grade in range(4):
        s = np.array([demo.scene(0, grade, i)[0] for i in range(300)])
        assert s.min() >= 0 and s.max() <= 3 and len(np.unique(s)) == 300
        assert (np.abs(s - grade) < 0.5).all()
        # triangular on +-0.5: E|s - grade| = 1/6, reflected at the ends or not
        assert abs(np.abs(s - grade).mean() - 1 / 6) < 0.025


def test_a_scene_is_the_same_at_every_size():
    for i, s in enumerate((0.0, 1.4, 2.9)):
        big, small = (demo.draw(s, demo.scene(1, 0, i)[1], size).astype(float) for size in (64, 32))
        mean = big.reshape(32, 2, 32, 2, 3).mean((1, 3))
        assert np.abs(mean - small).max() <= 1.5  # three roundings


def test_pixels_move_smoothly_with_severity():
    """No effect sets in with a jump: in steps of 0.01 tint and vessels move little, the edges of growing spots more."""
    for low, high, bound in ((0.6, 1.6, 10), (1.6, 2.4, 20)):
        frames = [demo.draw(s, demo.scene(2, 0, 0)[1], 32).astype(int) for s in np.arange(low, high, 0.01)]
        assert max(np.abs(a - b).max() for a, b in zip(frames, frames[1:])) < bound


def test_severity_shows_in_colour_without_measure():
    """Mean green over mean red falls with every half grade in every scene, up to where ulcers pale the wall."""
    for i in range(10):
        frames = [demo.draw(s, demo.scene(3, 0, i)[1], 32).astype(float) for s in (0, 0.5, 1, 1.5, 2)]
        ratio = [f[..., 1].mean() / f[..., 0].mean() for f in frames]
        assert all(b < a for a, b in zip(ratio, ratio[1:]))
        assert ratio[-1] < 0.8 * ratio[0]


def test_measure_of_a_plain_wall_is_the_formula():
    plain = np.empty((1, 3, 32, 32), np.uint8)
    plain[:] = np.array([200, 100, 80])[:, None, None]
    red = np.log(208 / np.sqrt(108 * 88))
    assert abs(demo.measure(plain)[0] - (4.4 * red - 1.5)) < 1e-9

    bloody, ulcerous = plain.copy(), plain.copy()
    bloody[..., :16, :16] = np.array([130, 15, 15])[:, None, None]  # a quarter
    ulcerous[..., :16, :16] = np.array([235, 215, 160])[:, None, None]
    assert abs(demo.measure(bloody)[0] - (4.4 * red - 1.5 + 0.9 * 0.5)) < 1e-9
    assert abs(demo.measure(ulcerous)[0] - (4.4 * red - 1.5 + 0.6 * 0.25)) < 1e-9

    dark = plain.copy()
    dark[..., 20:, :] //= 20  # a lumen and half the light change little
    assert abs(demo.measure(dark)[0] - demo.measure(plain)[0]) < 1e-9
    assert abs(demo.measure(plain // 2)[0] - demo.measure(plain)[0]) < 0.25


@pytest.mark.parametrize("size", [32, 64])
def test_measure_reads_the_severity_of_fresh_frames(size):
    scenes = [demo.scene(77, grade, i) for grade in range(4) for i in range(30)]
    truth = np.array([s for s, _ in scenes])
    images = channels_first([demo.draw(s, rng, size) for s, rng in scenes])
    noisy = np.clip(images + np.random.default_rng(0).normal(0, 8, images.shape), 0, 255).astype(np.uint8)
    for what in (images, noisy, images[..., ::-1]):
        found = demo.measure(what)
        assert np.abs(found - truth).mean() < 0.25
        assert np.corrcoef(found, truth)[0, 1] > 0.95
    by_grade = demo.measure(images).reshape(4, 30).mean(1)
    assert (np.diff(by_grade) > 0.6).all()


def test_measure_rises_in_every_scene():
    for i in range(8):
        steps = np.arange(0, 3.1, 0.5)
        found = demo.measure(channels_first([demo.draw(s, demo.scene(4, 0, i)[1], 32) for s in steps]))
        assert (np.diff(found) > 0).all()


def test_measure_takes_any_size_and_says_what_it_needs():
    s = (0.2, 1.5, 2.8)
    found = [demo.measure(channels_first([demo.draw(v, demo.scene(6, 0, 1)[1], size) for v in s])) for size in (16, 48, 150)]
    assert np.abs(np.array(found) - found[1]).max() < 0.3
    assert demo.measure(np.zeros((0, 3, 32, 32), np.uint8)).shape == (0,)
    assert np.isfinite(demo.measure(np.zeros((1, 3, 32, 32), np.uint8))).all()
    for bad in (np.zeros((2, 32, 32, 3), np.uint8), np.zeros((2, 3, 8, 8), np.uint8), np.zeros((2, 3, 32, 32))):
        with pytest.raises(ValueError, match="uint8"):
            demo.measure(bad)


def test_proportions_are_limucs():
    assert demo.counts(1100) == [596, 298, 122, 84]
    assert demo.counts(11276) == [6105, 3052, 1254, 865]
    for n in (16, 17, 100, 50000):
        assert sum(demo.counts(n)) == n and min(demo.counts(n)) >= 1
        assert np.abs(np.array(demo.counts(n)) - n * np.array([6105, 3052, 1254, 865]) / 11276).max() < 1


def test_make_writes_a_tree_of_grades(tmp_path):
    out = tmp_path / "below" / "set"
    assert demo.make(out, n=20, seed=3, size=32) == demo.counts(20)
    assert sorted(f.name for f in out.iterdir()) == ["Mayo 0", "Mayo 1", "Mayo 2", "Mayo 3", "severity.csv"]
    assert sorted(f.name for f in out.parent.iterdir()) == ["set"]
    rows = list(csv.DictReader((out / "severity.csv").read_text().splitlines()))
    assert sorted(row["file"] for row in rows) == sorted(str(f.relative_to(out).as_posix()) for f in out.rglob("*.png"))
    for row in rows:
        grade, i = int(row["file"][5]), int(row["file"][7:11])
        s, rng = demo.scene(3, grade, i)
        assert abs(float(row["severity"]) - s) < 1e-4
        assert np.array_equal(np.asarray(Image.open(out / row["file"])), demo.draw(s, rng, 32))


def test_a_smaller_set_is_the_beginning_of_a_larger_one(tmp_path):
    demo.make(tmp_path / "small", n=16, size=16)
    demo.make(tmp_path / "large", n=32, size=16)
    small, large = files(tmp_path / "small"), files(tmp_path / "large")
    names = [name for name in small if name.endswith(".png")]
    assert len(names) == 16 and all(small[name][0] == large[name][0] for name in names)


def test_a_whole_set_is_left_alone_and_another_is_refused(tmp_path):
    out = tmp_path / "set"
    demo.make(out, n=16, size=16)
    before = files(out)
    assert demo.make(out, n=16, size=16) == demo.counts(16)
    for other in ({"n": 17, "size": 16}, {"n": 16, "size": 32}, {"n": 16, "size": 16, "seed": 1}):
        with pytest.raises(FileExistsError, match="delete it"):
            demo.make(out, **other)
    assert files(out) == before
    Image.new("RGB", (16, 16)).save(out / "Mayo 3" / "0000.png")  # another drawing under the same name
    with pytest.raises(FileExistsError):
        demo.make(out, n=16, size=16)
    (out / "Mayo 0" / "0008.png").unlink()
    with pytest.raises(FileExistsError):
        demo.make(out, n=16, size=16)


def test_an_interrupted_run_leaves_nothing_half(tmp_path, monkeypatch):
    out, drawn = tmp_path / "set", []

    def stops(*args):
        drawn.append(1)
        if len(drawn) == 5:
            raise KeyboardInterrupt
        return np.zeros((16, 16, 3), np.uint8)

    with monkeypatch.context() as patch:
        patch.setattr(demo, "draw", stops)
        with pytest.raises(KeyboardInterrupt):
            demo.make(out, n=16, size=16)
    assert list(tmp_path.iterdir()) == []
    part = tmp_path / f"set.partial-{os.getpid()}" / "Mayo 0"  # what a killed run of this very process id left behind
    part.mkdir(parents=True)
    (part / "0000.png").write_bytes(b"torn")
    assert demo.make(out, n=16, size=16) == demo.counts(16)
    assert [f.name for f in tmp_path.iterdir()] == ["set"]
    assert np.array_equal(np.asarray(Image.open(out / "Mayo 0" / "0000.png")), demo.draw(*demo.scene(0, 0, 0), 16))


def test_two_runs_at_once_end_with_one_whole_set(tmp_path, monkeypatch):
    out, other, draw = tmp_path / "set", tmp_path / "other", demo.draw
    demo.make(other, n=16, size=16)

    def overtaken(*args):
        if other.exists():
            other.rename(out)  # the other run ends while this one draws
        return draw(*args)

    monkeypatch.setattr(demo, "draw", overtaken)
    assert demo.make(out, n=16, size=16) == demo.counts(16)
    assert [f.name for f in tmp_path.iterdir()] == ["set"]


def test_command_line(tmp_path):
    def run(*args):
        return subprocess.run([sys.executable, str(HERE / "data" / "demo.py"), *args], cwd=tmp_path, capture_output=True, text=True)

    good = run("--out", "here", "-n", "16", "--size", "16")
    assert good.returncode == 0 and "Mayo 0 9" in good.stdout and (tmp_path / "here" / "severity.csv").is_file()
    (tmp_path / "file").write_text("mine")
    for args, named in ((("-n", "3"), "-n 3"), (("--size", "8"), "--size 8"), (("--seed", "-1"), "--seed -1"),
                        (("-n", "many"), "many"), (("--out", "file"), "file")):
        bad = run(*args)
        assert bad.returncode == 2 and named in bad.stderr and len(bad.stderr.splitlines()) == 1, bad.stderr
        assert bad.stdout == ""
    assert (tmp_path / "file").read_text() == "mine"


# --------------------------------------------------------------------------------------- fid.py

SHARED = HERE.parent / "shared"
WEIGHTS_768 = SHARED / "weights" / "fid-inception-768-fp16.pth"


def normal(n, d, seed, dtype=torch.float64):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def exact_gaussian(n, variances, seed):
    """n points whose sample mean is 0 and sample covariance diag(variances), exactly."""
    q = torch.linalg.qr(torch.cat([torch.ones(n, 1, dtype=torch.float64), normal(n, len(variances), seed)], 1)).Q[:, 1:]
    return q * (torch.tensor(variances, dtype=torch.float64) * (n - 1)).sqrt()


def test_frechet_closed_forms():
    variances = [4.0, 1.0, 0.25, 1e-4, 0.0]
    others = [1.0, 9.0, 0.25, 0.0, 2.0]
    spread = sum((a**0.5 - b**0.5) ** 2 for a, b in zip(variances, others))
    shift = torch.tensor([1.0, -2.0, 0.0, 0.5, 3.0], dtype=torch.float64)
    x, y = exact_gaussian(50, variances, 1), exact_gaussian(70, others, 2)
    assert fid.frechet_distance(x, x + shift) == pytest.approx(14.25, rel=1e-9)  # equal covariances: |shift|^2
    assert fid.frechet_distance(x, y + shift) == pytest.approx(14.25 + spread, rel=1e-9)  # diagonal ones: root by root
    a, b = torch.diag(torch.tensor(variances)), torch.diag(torch.tensor(others))
    assert fid.frechet_distance_from_moments(shift, a, 0 * shift, b) == pytest.approx(14.25 + spread, rel=1e-9)
    turn = torch.linalg.qr(normal(5, 5, 3)).Q  # one rotation of both sets changes nothing
    assert fid.frechet_distance(x @ turn, (y + shift) @ turn) == pytest.approx(14.25 + spread, rel=1e-9)


def test_frechet_of_sets_on_a_line():
    line = torch.nn.functional.normalize(normal(1, 100, 1), dim=1)  # rank 1: all but one singular value are 0
    x = exact_gaussian(150, [4.0], 2) @ line
    assert fid.frechet_distance(x, 1.5 * x) == pytest.approx((3 - 2) ** 2, rel=1e-9)
    assert fid.frechet_distance_from_moments(0 * line[0], 4 * line.T @ line, 0 * line[0], 9 * line.T @ line) == pytest.approx(1, rel=1e-9)


def test_frechet_of_two_points_each():
    a, b = normal(1, 300, 1), normal(1, 300, 2)  # +-a: covariance 2 a'a, so the trace of the root is 2 |a.b|
    by_hand = 2 * (a @ a.T + b @ b.T - 2 * (a @ b.T).abs()).item()
    assert fid.frechet_distance(torch.cat([a, -a]), torch.cat([b, -b])) == pytest.approx(by_hand, rel=1e-9)


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
    assert fid.frechet_distance(x32, y32) == pytest.approx(fid.frechet_distance(x32.double(), y32.double()), rel=1e-12)
    for wrong in (x[:1], x[:, :5]):
        with pytest.raises(ValueError):
            fid.frechet_distance(x, wrong)


def test_kernel_distance_is_the_double_loop():
    x, y = normal(23, 5, 1, torch.float32), 0.5 + normal(17, 5, 2, torch.float32)

    def k(a, b):
        return (a.double().dot(b.double()).item() / 5 + 1) ** 3

    xx = [k(a, b) for i, a in enumerate(x) for j, b in enumerate(x) if i != j]
    yy = [k(a, b) for i, a in enumerate(y) for j, b in enumerate(y) if i != j]
    xy = [k(a, b) for a in x for b in y]
    assert fid.kernel_distance(x, y)[0] == pytest.approx(np.mean(xx) + np.mean(yy) - 2 * np.mean(xy), rel=1e-5)
    value, error = fid.kernel_distance(x[:2], y[:2])
    assert math.isfinite(value) and math.isnan(error)


def test_kid_is_unbiased_where_fid_is_not():
    splits = [normal(60, 32, seed, torch.float32).split(30) for seed in range(150)]
    values, errors = map(np.array, zip(*(fid.kernel_distance(x, y) for x, y in splits)))
    assert abs(values.mean()) < 3 * values.std() / 150**0.5
    assert 0.8 < np.sqrt((errors**2).mean()) / values.std() < 1.6  # the standard error is honest, if on the safe side
    distances = np.array([fid.frechet_distance(x, y) for x, y in splits[:20]])
    assert distances.mean() > 10 * distances.std()


def test_kid_standard_error_where_the_sets_differ():
    values, errors = zip(*(fid.kernel_distance(normal(100, 8, 2 * s), 0.7 + normal(80, 8, 2 * s + 1)) for s in range(120)))
    assert 0.8 < np.sqrt(np.square(errors).mean()) / np.std(values) < 1.3


def brute_force(real, fake, k):
    def radii(x):
        return np.array([np.sort(np.linalg.norm(np.delete(x, i, 0) - x[i], axis=1))[k - 1] for i in range(len(x))])

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
        assert fid.precision_recall(real + 300, fake + 300, k) == pytest.approx(brute_force(real + 300, fake + 300, k), abs=1e-12)
    assert fid.precision_recall(fake, real, k) == fid.precision_recall(real, fake, k)[::-1]


def test_ties_are_inside():
    rng = torch.Generator().manual_seed(0)  # points of a grid: most distances are ties, many points coincide
    for _ in range(20):
        real, fake = (torch.randint(0, 6, (60, 2), generator=rng).float() for _ in "rf")
        assert fid.precision_recall(real, fake, 2) == pytest.approx(brute_force(real, fake, 2), abs=1e-12)
    black = torch.cat([torch.full((5, 768), 0.1), normal(30, 768, 1, torch.float32)])  # copies: radius 0, distance 0
    assert fid.precision_recall(black, black[:5]) == (1.0, 5 / 35)


def test_near_copies_far_apart():
    # Groups of 5 within a fraction of 1, 1000 from the mean: float32 products put their distances in the wrong order.
    angle = torch.arange(40).repeat_interleave(5) * (2 * math.pi / 40)
    centres = 1000 * torch.stack([angle.cos(), angle.sin()], 1)
    real, fake = (centres + 0.1 * normal(200, 2, seed, torch.float32) for seed in (1, 2))
    assert fid.precision_recall(real, fake, 2) == pytest.approx(brute_force(real, fake, 2), abs=1e-12)


def test_collapsed_generator_has_high_precision_and_low_recall():
    real = normal(300, 16, 1, torch.float32)
    fake = real[:1] + 1e-3 * normal(300, 16, 2, torch.float32)
    precision, recall = fid.precision_recall(real, fake)
    assert precision == 1 and recall <= 1 / 300
    with pytest.raises(ValueError):
        fid.precision_recall(real[:3], fake, k=3)


def test_quadratic_kappa_by_hand():
    assert fid.quadratic_kappa(torch.tensor([[5, 0], [0, 7]])) == 1
    assert fid.quadratic_kappa(torch.tensor([[2, 4], [3, 6]])) == pytest.approx(0, abs=1e-12)  # rows in proportion: chance
    # observed cost (1 + 4) / 6; by chance: rows 2, 2, 2 and columns 2, 2, 2 -> cost (4 * 1 + 2 * 4) * 4 / 36
    assert fid.quadratic_kappa(torch.tensor([[1, 0, 1], [0, 2, 0], [1, 0, 1]])) == pytest.approx(1 - (8 / 6) / (48 / 36))
    assert fid.quadratic_kappa(torch.tensor([[3, 0], [0, 0]])) is None


def test_severity_agreement():
    counts = [120, 60, 30, 12]  # a rare severest grade, as in the data
    direction = torch.nn.functional.normalize(normal(1, 40, 0), dim=1)

    def draw(seed):
        labels = torch.repeat_interleave(torch.arange(4), torch.tensor(counts))
        return (normal(len(labels), 40, seed) + 6 * labels[:, None] * direction).float(), labels

    real, labels = draw(1)
    shown, asked = draw(2)
    wrong = asked[torch.randperm(len(asked), generator=torch.Generator().manual_seed(0))]
    result = fid.severity_agreement(real, labels, {"good": (shown, asked), "random": (shown, wrong), "one": (shown[asked == 3], asked[asked == 3])}, 4)
    assert result["real, held out"]["n"] == 111 and result["real, held out"]["qwk"] > 0.85
    assert result["good"]["qwk"] > 0.85 and abs(result["random"]["qwk"]) < 0.2
    assert result["good"]["mae"] < 0.2 < 0.8 < result["random"]["mae"]
    confusion = torch.tensor(result["good"]["confusion"])
    assert confusion.sum(1).tolist() == counts and confusion[3, 3] >= 9
    off = (torch.arange(4)[:, None] - torch.arange(4)).abs()
    assert result["good"]["mae"] == pytest.approx((confusion * off).sum().item() / sum(counts))
    assert result["one"]["confusion"][:3] == [[0] * 4] * 3


def test_ridge_penalty_has_the_least_leave_one_out_error():
    x, labels = normal(24, 6, 1), torch.arange(24) % 3
    x[:, 0] += labels
    kept = []
    classify = fid.ridge_classifier(x, labels, 3)
    slope = dict(zip(classify.__code__.co_freevars, (c.cell_contents for c in classify.__closure__)))["best_slope"]
    centred, target = x - x.mean(0), (labels[:, None] > torch.arange(2)).double()  # equal classes: equal weights
    total = (centred.square().sum() / 24).item()
    for penalty in total * np.logspace(-5, 0, 11):  # every fit made anew without the image that is left out
        error = 0
        for i in range(24):
            rest = torch.arange(24) != i
            a, b = x[rest] - x[rest].mean(0), target[rest] - target[rest].mean(0)
            w = torch.linalg.solve(a.T @ a / 24 + penalty * torch.eye(6, dtype=torch.float64), a.T @ b / 24)
            error += (target[i] - target[rest].mean(0) - (x[i] - x[rest].mean(0)) @ w).square().sum().item() / 24
        full = torch.linalg.solve(centred.T @ centred / 24 + penalty * torch.eye(6, dtype=torch.float64), centred.T @ (target - target.mean(0)) / 24)
        kept.append((error, full))
    assert torch.allclose(slope, min(kept, key=lambda e: e[0])[1], rtol=1e-8, atol=1e-10)


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
    return x.sum().item(), x.square().mean().sqrt().item(), (x @ torch.arange(1, len(x) + 1.0).double() / x.sum()).item()


@pytest.mark.parametrize(
    "dims, expected",  # sum, root mean square and centroid of the features that pytorch-fid 0.3.0's network gave
    [
        (64, (16.378099345136434, 0.3232815183709533, 30.19210691719125)),
        (192, (68.64484141088997, 0.528024275579934, 97.09053981847158)),
        (768, (77.15302715079997, 0.18921177408829562, 381.4555883042095)),
        (2048, (286.9499453532171, 0.24868668614621625, 1068.5793844638972)),
    ],
)
def test_network_gives_the_features_of_pytorch_fid(dims, expected):
    assert summary(fid.features(test_image(), fill_with_waves(fid.Inception(dims)))) == pytest.approx(expected, rel=1e-5)


@pytest.mark.skipif(not WEIGHTS_768.exists(), reason="needs the network's weights")
def test_network_gives_the_features_of_pytorch_fid_with_real_weights():
    network, _ = fid.load_weights(768, str(WEIGHTS_768))
    expected = (23.620308166239738, 0.07778412673429534, 330.6755039506857)
    assert summary(fid.features(test_image(), network)) == pytest.approx(expected, rel=1e-5)


def test_features_are_float32_in_eval_mode_whatever_the_batch():
    network = fill_with_waves(fid.Inception(192)).train()
    images = torch.randint(0, 256, (5, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        x = fid.features(images, network, batch_size=2)
    assert x.dtype == torch.float32 and x.shape == (5, 192)
    assert torch.allclose(x, torch.cat([fid.features(images[i : i + 1], network) for i in range(5)]), rtol=1e-5, atol=1e-6)
    assert torch.allclose(x, network.eval()(images), rtol=1e-5, atol=1e-6)
    assert fid.features(images[:0], network).shape == (0, 192)
    with pytest.raises(ValueError):
        fid.Inception(100)


@pytest.fixture(scope="module")
def weights_64(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "random 64.pth"
    torch.save(fill_with_waves(fid.Inception(64)).half().state_dict(), path)
    return str(path)


def test_load_weights_says_what_is_wrong(weights_64, tmp_path):
    network, sha256 = fid.load_weights(64, weights_64)
    assert len(sha256) == 64 and all(p.dtype == torch.float32 for p in network.parameters())
    with pytest.raises(odm.UserError, match="Conv2d_3b_1x1.conv.weight, which --dims 768 needs"):
        fid.load_weights(768, weights_64)

    class Evil:
        def __reduce__(self):
            return (Path(tmp_path / "ran").touch, ())

    whole = Path(weights_64).read_bytes()
    state = torch.load(weights_64, weights_only=True)
    for content in (whole[: len(whole) // 2], b"", b"<html>Not found</html>", pickle.dumps(Evil()), pickle.dumps([1, 2])):
        (tmp_path / "bad.pth").write_bytes(content)
        with pytest.raises(odm.UserError, match="bad.pth: damaged, or not"):
            fid.load_weights(64, str(tmp_path / "bad.pth"))
    assert not (tmp_path / "ran").exists()
    for change in ({"Conv2d_1a_3x3.conv.weight": torch.zeros(32, 3, 5, 5)}, {"Conv2d_2a_3x3.bn.bias": torch.full((32,), math.nan)}):
        torch.save({**state, **change}, tmp_path / "bad.pth")
        with pytest.raises(odm.UserError, match=f"{next(iter(change))} is damaged or belongs"):
            fid.load_weights(64, str(tmp_path / "bad.pth"))
    for missing in (tmp_path / "none.pth", tmp_path):
        with pytest.raises(odm.UserError, match="cannot be read"):
            fid.load_weights(64, str(missing))


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """An empty torch.hub cache; returns the place of the weight file in it."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    return tmp_path / "hub" / "checkpoints" / "weights-of-fid.pth"


def serve(content, claimed, monkeypatch):
    """The weights' URL leads to a local server that sends `content` and claims it were `claimed` bytes long."""

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
    monkeypatch.setattr(fid, "WEIGHTS_URL", f"http://127.0.0.1:{server.server_port}/weights-of-fid.pth")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    return server


def test_download(weights_64, hub, monkeypatch):
    content = Path(weights_64).read_bytes()
    monkeypatch.setattr(fid, "WEIGHTS_SHA256", fid.load_weights(64, weights_64)[1])
    with serve(content[:5000], len(content), monkeypatch):  # the line breaks
        with pytest.raises(odm.UserError, match="cannot download http://127.0.0.1.*weights-of-fid.pth, or use --weights"):
            fid.load_weights(64)
        assert list(hub.parent.iterdir()) == []
    with serve(content[:-1] + b"?", len(content), monkeypatch):  # another file
        with pytest.raises(odm.UserError, match="cannot download"):
            fid.load_weights(64)
        assert list(hub.parent.iterdir()) == []
    with pytest.raises(odm.UserError, match="cannot download.*fetch it elsewhere and put it at .*weights-of-fid.pth"):
        fid.load_weights(64)  # nobody answers any more
    with serve(content, len(content), monkeypatch):
        fid.load_weights(64)
        assert [path.name for path in hub.parent.iterdir()] == ["weights-of-fid.pth"]
    fid.load_weights(64)  # from the cache: the server is gone
    hub.write_bytes(content[:-1])  # as an older tool that was killed would leave it
    with pytest.raises(odm.UserError, match="weights-of-fid.pth: only a part"):
        fid.load_weights(64)


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
        save_images(root / "dm" / f"Mayo {grade}", n + 1, 10 + grade, low=50 * grade)
        save_images(root / "odm" / f"Mayo {grade}", 3 + grade, 20 + grade, low=60 * grade)
        save_images(root / "ladder" / f"{1 + grade / 2:g}", 4, grade)
    save_images(root / "dm", 1, 99)
    (root / "dm" / "000.png").rename(root / "dm" / "sheet.png")
    save_images(root / "gan", 7, 30)
    save_images(root / "mixed", 2, 31)
    save_images(root / "mixed" / "Mayo 0", 4, 32)
    save_images(root / "few", 3, 33)
    save_images(root / "wide", 4, 34, size=(16, 24))
    (root / "empty").mkdir()
    save_images(root / "broken", 4, 35)
    (root / "broken" / "002.png").write_bytes((root / "broken" / "001.png").read_bytes()[:300])
    return root


def run_fid(*words):
    try:
        return fid.main([str(word) for word in words])
    except SystemExit as stop:
        return stop.code


def test_command(folders, weights_64, tmp_path, capsys, monkeypatch):
    words = [folders / "real", folders / "dm", folders / "odm", folders / "gan", "--dims", 64, "--weights", weights_64]
    words += ["--json", tmp_path / "s.json", "--plot", tmp_path / "p.png", "--real-stats", tmp_path / "real.npz"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert run_fid(*words) == 0
    out = capsys.readouterr().out
    result = json.loads((tmp_path / "s.json").read_text())
    rows = {(name, row["class"]): row for name, entry in result["generated"].items() for row in entry["rows"]}
    assert {key: (row["n_real"], row["n_fake"]) for key, row in rows.items()} == {
        ("dm", "all"): (20, 23), ("dm", "Mayo 0"): (9, 10), ("dm", "Mayo 1"): (6, 7), ("dm", "Mayo 2"): (5, 6),
        ("odm", "all"): (20, 12), ("odm", "Mayo 0"): (9, 3), ("odm", "Mayo 1"): (6, 4), ("odm", "Mayo 2"): (5, 5),
        ("gan", "all"): (20, 7),
    }  # fmt: skip
    assert out.count("Mayo 1") >= 2 and "n below the 64 dimensions" in out and "QWK" in out
    assert all(row["fid_biased"] for row in rows.values())
    assert rows["odm", "Mayo 0"]["precision"] is None and rows["odm", "Mayo 1"]["precision"] is not None
    assert set(result["agreement"]) == {"real, held out", "dm", "odm"}
    assert result["agreement"]["dm"]["n"] == 23

    # the numbers are those of the functions, on what the folders hold
    network, _ = fid.load_weights(64, weights_64)
    x, y = (torch.cat([torch.from_numpy(np.array(Image.open(p))).permute(2, 0, 1)[None] for p in sorted((folders / s / "Mayo 1").iterdir())]) for s in ("real", "dm"))
    x, y = fid.features(x, network), fid.features(y, network)
    row = rows["dm", "Mayo 1"]
    assert row["fid"] == pytest.approx(fid.frechet_distance(x, y), rel=1e-4)
    assert (row["precision"], row["recall"]) == fid.precision_recall(x, y)
    assert row["kid"] == pytest.approx(fid.kernel_distance(x, y)[0], rel=1e-3, abs=1e-6)
    assert Image.open(tmp_path / "p.png").width > 600

    # the second run takes the real features from the file, a different question does not
    def unwanted(*_, **__):
        raise AssertionError("images read again")

    monkeypatch.setattr(odm, "load_images", unwanted)
    (tmp_path / "s.json").unlink()
    assert run_fid(*words) == 0
    again = json.loads((tmp_path / "s.json").read_text())
    assert again == result
    for change in (["--size", 8], ["--crop", 12]):
        assert run_fid(*words, *change) == 2
        assert f"made with {change[0][2:]}" in capsys.readouterr().err
    (tmp_path / "real.npz").write_bytes((tmp_path / "real.npz").read_bytes()[:-200])
    assert run_fid(*words) == 2
    assert "real.npz: damaged" in capsys.readouterr().err


def test_plot_draws_each_bar_to_scale():
    image = fid.draw_bars("title", ["a", "b"], ["n = 1", "n = 2"], {"x": [10.0, 5.0], "y": [None, 2.5]}).convert("RGB")
    pixels = np.asarray(image).astype(int)[200:]  # below the legend
    heights = {}
    for name, colour in (("x", (0x4C, 0x78, 0xA8)), ("y", (0xE4, 0x57, 0x2E))):
        columns = (np.abs(pixels - colour).sum(2) == 0).sum(0)
        steps = np.flatnonzero(np.diff(columns > 3) == 1)
        heights[name] = [int(columns[steps[i] + 20]) for i in range(0, len(steps), 2)]
    assert len(heights["x"]) == 2 and len(heights["y"]) == 1
    assert heights["x"][1] / heights["x"][0] == pytest.approx(0.5, abs=0.01)
    assert heights["y"][0] / heights["x"][0] == pytest.approx(0.25, abs=0.01)


@pytest.mark.parametrize(
    "words, message",
    [
        (["real", "empty"], "empty: no images in it"),
        (["empty", "dm"], "empty: no images"),
        (["real", "none"], "none: no such folder"),
        (["none", "dm"], "none: no such folder"),
        (["real", "few"], "few: 3 images are too few: precision and recall with -k 3 take 4"),
        (["real", "dm", "-k", 20], "real: 20 images are too few: precision and recall with -k 20 take 21"),
        (["real", "mixed"], "mixed: images lie both in class folders and beside them"),
        (["real", "ladder"], "ladder: 1, 1.5, 2 is no class of"),
        (["real", "wide"], "24x16 pixels: say with --size"),
        (["real", "broken", "--size", 16], "002.png"),
        (["real", "dm", "--dims", 2048], "which --dims 2048 needs: lower --dims"),
        (["real", "dm", "--dims", 100], "--dims"),
        (["real", "dm", "--size", 0], "--size"),
        (["real", "dm", "--batch", "-1"], "--batch"),
        (["real", "dm", "--crop", "x"], "--crop"),
        (["real", "dm", "--json", "none/s.json"], "--json"),
        (["real", "dm", "--plot", "real"], "--plot"),
        (["real"], "GENERATED"),
        (["real", "dm", "--weights", "real"], "real: cannot be read"),
    ],
)
def test_fid_bad_input_is_one_line_and_status_2(words, message, folders, weights_64, capsys, monkeypatch):
    monkeypatch.chdir(folders)
    assert run_fid("--dims", 64, "--weights", weights_64, *words) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines[-1].startswith("fid.py: error: ") and message in lines[-1] and "Traceback" not in "".join(lines)
    assert sum(line.startswith("fid.py") for line in lines) == 1


def test_random_command_lines_never_end_in_a_traceback(folders, weights_64, capsys, monkeypatch):
    monkeypatch.chdir(folders)
    rng = random.Random(0)
    values = ["", "0", "-1", "3", "1e9", "99999999999999999999", "nan", "real", "none/x.npz", "²", "a b", "--"]
    flags = ["--dims", "--weights", "--size", "--crop", "--order", "-k", "--batch", "--real-stats", "--json", "--plot", "--nonsense"]
    monkeypatch.setattr(fid, "features", lambda batches, network: torch.zeros(0, 64))  # a good line is not the point here
    for _ in range(150):
        words = [rng.choice(["real", "gan", "none", "empty", ""]) for _ in range(rng.randint(0, 2))]
        for _ in range(rng.randint(1, 3)):
            words += [rng.choice(flags), rng.choice(values)]
        with monkeypatch.context() as patch:
            patch.setattr(odm, "load_images", lambda *_: (torch.zeros(20, 3, 8, 8, dtype=torch.uint8), torch.zeros(20).long(), ["a", "b"]))
            assert run_fid("--weights", weights_64, "--dims", 64, *words) == 2, words
        lines = capsys.readouterr().err.strip().splitlines()
        assert len(lines) == 1 and lines[0].startswith("fid.py: error: "), (words, lines)


def test_images_of_several_sizes_keep_their_order(tmp_path):
    for i, size in enumerate([(8, 8), (8, 8), (6, 9), (8, 8), (6, 9)]):
        Image.new("RGB", size, (40 * i, 0, 0)).save(tmp_path / f"{i}.png")
    batches = list(fid.read_batches(odm.list_images(tmp_path), 3))
    assert [tuple(b.shape) for b in batches] == [(2, 3, 8, 8), (1, 3, 9, 6), (1, 3, 8, 8), (1, 3, 9, 6)]
    assert [int(image[0, 0, 0]) for batch in batches for image in batch] == [0, 40, 80, 120, 160]


# ---------------------------------------------------------------------------------------- speed


def matrix_rate(device, dtype, n: int) -> float:
    """Operations a second of an n x n x n matrix product, the best of 5."""
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    best = math.inf
    for _ in range(6):
        begun = clock(device)
        a @ b
        best = min(best, clock(device) - begun)
    return 2 * n**3 / best


def clock(device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def of_diffusers(config, device):
    """(model, step, sample) with diffusers' UNet2DModel of the same architecture, used as its users use it: float32, default Adam."""
    from diffusers import DDIMScheduler, UNet2DModel

    sides = [config.size >> level for level in range(len(config.ch_mult))]
    kinds = ["Attn" * (side in config.attention) for side in sides]
    model = UNet2DModel(
        sample_size=config.size, layers_per_block=config.blocks, block_out_channels=[config.ch * m for m in config.ch_mult],
        down_block_types=[f"{kind}DownBlock2D" for kind in kinds], up_block_types=[f"{kind}UpBlock2D" for kind in reversed(kinds)],
        attention_head_dim=None, norm_num_groups=config.groups, dropout=config.dropout, num_class_embeds=5,
    ).to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4)
    x_0, labels = torch.randn(config.batch, 3, config.size, config.size, device=device), torch.arange(config.batch, device=device) % 4
    scheduler = DDIMScheduler(config.timesteps, config.beta_1, config.beta_T)

    def step():
        model.train()
        eps, t = torch.randn_like(x_0), torch.randint(config.timesteps, (config.batch,), device=device)
        loss = torch.nn.functional.mse_loss(model(scheduler.add_noise(x_0, eps, t), t, labels).sample, eps)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    @torch.no_grad()
    def sample(n):
        model.eval()
        scheduler.set_timesteps(n)
        x, c = torch.randn_like(x_0), torch.cat([labels, torch.full_like(labels, 4)])
        for t in scheduler.timesteps:
            conditional, null = model(torch.cat([x, x]), t, c).sample.chunk(2)
            x = scheduler.step(null + config.guidance * (conditional - null), t, x).prev_sample
        return x

    return model, step, sample


def bench(argv) -> None:
    """Training with the plain diffusion model and both readings, in turn, and sampling: medians of alternating rounds."""
    import argparse
    import resource
    from torch.utils.flop_counter import FlopCounterMode

    own = argparse.ArgumentParser(allow_abbrev=False)
    own.add_argument("--rounds", type=int, default=5)
    own.add_argument("--diffusers", action="store_true", help="beside diffusers' UNet2DModel and DDIMScheduler")
    own, argv = own.parse_known_args(argv)
    args = vars(odm.parser().parse_args(["train", *argv]))
    preset = [args.pop(name) for name in ("command", "preset")][1]
    config = odm.Config(**{**(odm.SMALL if preset == "small" else {}), **{k: v for k, v in args.items() if v is not None}})
    odm.check_config(config)
    device, *_ = odm.start(config.device)
    images = torch.randint(0, 256, (256, 3, config.size, config.size), dtype=torch.uint8, device=device)
    labels = torch.arange(256) % 4
    alpha_bar, steps = odm.alpha_bars(config).to(device), {}
    model = odm.UNet(config, 4).to(device, memory_format=torch.channels_last)
    ema = odm.copy.deepcopy(model).eval().requires_grad_(False)
    net, ema_net = odm.Network(model, config, device), odm.Network(ema, config, device)
    optimizer = torch.optim.Adam(model.parameters(), fused=True)
    for name, changes in (("DM", dict(ordinal=0.0)), ("ODM images", dict(ladder="images")), ("ODM labels", dict(ladder="labels"))):
        variant = replace(config, **changes)
        batch = odm.Batches(variant, labels, [0.0, 1.0, 2.0, 3.0]).draw(0).to(device)
        steps[name] = lambda b=batch, v=variant: odm.training_step(net, ema, optimizer, images, b, alpha_bar, v, 0)
    n = 4  # of the sampling steps are timed
    keys, few = [(0, i) for i in range(config.batch)], replace(config, sample_steps=n)
    draws = {"sample": lambda: odm.draw_images(ema_net, [0.0] * config.batch, keys, few, device)}
    if own.diffusers:
        other, steps["diffusers"], sample = of_diffusers(config, device)
        draws["sample, diffusers"] = lambda: sample(n)
    with FlopCounterMode(display=False) as counter:
        odm.training_step(odm.Network(model, replace(config, compile="off"), device), ema, optimizer, images,
                          odm.Batches(replace(config, ordinal=0.0), labels, [0.0, 1.0, 2.0, 3.0]).draw(0).to(device), alpha_bar, config, 0)
    times = {}
    for _ in range(own.rounds + 1):  # the first round warms up
        for name, action in (steps | draws).items():
            begun = clock(device)
            action()
            times.setdefault(name, []).append(clock(device) - begun)
    median = {name: float(np.median(t[1:])) for name, t in times.items()}
    dtype = torch.bfloat16 if net.bfloat16 else torch.float32
    rate = matrix_rate(device, dtype, 8192 if device.type == "cuda" else 2048)
    print(f"{device}, {dtype}, {sum(p.numel() for p in model.parameters()):,} parameters, {config.size}x{config.size}, batch {config.batch}, "
          f"{rate / 1e12:.2f} TFLOP/s in a matrix product")
    if own.diffusers:
        print(f"diffusers: {sum(p.numel() for p in other.parameters()):,} parameters, float32")
    for name in steps:
        print(f"train {name:11s} {config.batch / median[name]:8.1f} images/s   {median[name]:.4f} s a step, {median[name] / median['DM']:.2f} of DM's")
    print(f"train DM: {counter.get_total_flops() / 1e9:,.0f} GFLOP a step, {counter.get_total_flops() / median['DM'] / rate:.0%} of that rate")
    memory = torch.cuda.max_memory_allocated() if device.type == "cuda" else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(f"peak memory so far {memory / 2**30:.2f} GiB")
    for name in draws:
        print(f"{name} {config.batch / (median[name] / n * config.sample_steps):.3g} images/s (DDIM-{config.sample_steps}, guidance {config.guidance:g})")


if __name__ == "__main__":
    assert sys.argv[1:2] == ["bench"], "python -m pytest -q test_odm.py runs the tests; python test_odm.py bench measures"
    bench(sys.argv[2:])
