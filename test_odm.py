# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.5", "numpy", "pillow>=10.1", "scipy", "pytest"]
# ///
"""Tests of odm.py, fid.py and data/demo.py against independent references: closed forms, loops, hand-made cases.

    python test_odm.py
"""

import csv
import importlib.util
import itertools
import math
import os
import pickle
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path
from subprocess import PIPE, Popen

import numpy as np
import pytest
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
    assert "no CSV" in error_of(capsys, "train", "--data", other, "--columns", "path,grade")
    (other / "t.csv").write_text("id_code,diagnosis\nc,1\n")  # APTOS'
    assert "none of the 1 images" in error_of(capsys, "train", "--data", other)


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


