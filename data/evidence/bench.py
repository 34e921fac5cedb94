"""Speed and memory: training and sampling, alone or beside diffusers; fid.py beside pytorch-fid and prdc.

    python data/evidence/bench.py                     # the paper's settings; takes flags of `train`
    python data/evidence/bench.py --preset small --rounds 20
    python data/evidence/bench.py --batch 4 --guidance 2 --diffusers   # needs diffusers
    python data/evidence/bench.py --fid                                # needs pytorch-fid and prdc

All are run in turn, round by round, and medians are shown: machines are noisy, ratios less so.
"""

import argparse
import copy
import resource
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import fid
import odm


def alternate(actions: dict, rounds: int) -> dict:
    """Median seconds of each action; the first round warms up."""
    times = {name: [] for name in actions}
    for _ in range(rounds + 1):
        for name, action in actions.items():
            begun = time.perf_counter()
            action()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            times[name].append(time.perf_counter() - begun)
    return {name: float(np.median(seconds[1:])) for name, seconds in times.items()}


def of_diffusers(config: odm.Config, device: torch.device) -> tuple:
    """(step, sample): the same network as diffusers' users run it, float32 and with the default Adam."""
    from diffusers import DDIMScheduler, UNet2DModel

    sides = [config.size >> level for level in range(len(config.ch_mult))]
    kinds = ["Attn" * (side in config.attention) for side in sides]
    model = UNet2DModel(
        sample_size=config.size, layers_per_block=config.blocks, dropout=config.dropout, num_class_embeds=5,
        block_out_channels=[config.ch * mult for mult in config.ch_mult], norm_num_groups=config.groups,
        down_block_types=[f"{kind}DownBlock2D" for kind in kinds], attention_head_dim=None,
        up_block_types=[f"{kind}UpBlock2D" for kind in reversed(kinds)]).to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4)
    x_0 = torch.randn(config.batch, 3, config.size, config.size, device=device)
    labels = torch.arange(config.batch, device=device) % 4
    null = torch.full_like(labels, 4)
    scheduler = DDIMScheduler(config.timesteps, config.beta_1, config.beta_T)

    def step():
        eps, t = torch.randn_like(x_0), torch.randint(config.timesteps, (config.batch,), device=device)
        eps_hat = model.train()(scheduler.add_noise(x_0, eps, t), t, labels).sample
        optimizer.zero_grad()
        torch.nn.functional.mse_loss(eps_hat, eps).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    @torch.no_grad()
    def sample():
        model.eval()
        scheduler.set_timesteps(config.sample_steps)
        x = torch.randn_like(x_0)
        for t in scheduler.timesteps:
            own, other = model(torch.cat([x, x]), t, torch.cat([labels, null])).sample.chunk(2)
            x = scheduler.step(other + config.guidance * (own - other), t, x).prev_sample

    return step, sample


def bench_odm(config: odm.Config, rounds: int, beside_diffusers: bool) -> None:
    device = odm.start(config.device)
    images = torch.randint(0, 256, (256, 3, config.size, config.size), dtype=torch.uint8, device=device)
    labels, alpha_bar = torch.arange(256) % 4, odm.alpha_bars(config).to(device)
    model = odm.build(config, 4, device)
    ema, optimizer = copy.deepcopy(model).eval(), torch.optim.Adam(model.parameters(), fused=True)
    net = odm.compiled(model)
    actions = {}
    for name in ("DM", "labels", "images"):
        variant = replace(config, ordinal=0.0) if name == "DM" else replace(config, triplets=name)
        batch = odm.draw_batch(labels, 4, variant, config.batch, torch.Generator()).to(device)
        arguments = net, ema, optimizer, images, batch, alpha_bar, variant, 0
        actions[f"train {name}"] = lambda arguments=arguments: odm.training_step(*arguments)
    few = ema.config = replace(ema.config, sample_steps=4)
    keys = [(0, i) for i in range(config.batch)]
    actions["sample"] = lambda: odm.sample_images(ema, [0.0] * config.batch, keys)
    if beside_diffusers:
        actions["train diffusers"], actions["sample diffusers"] = of_diffusers(few, device)
    median = alternate(actions, rounds)
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{device}, {parameters:,} parameters, {config.size}x{config.size}, batch {config.batch}, "
          f"guidance {config.guidance:g}")
    for name, seconds in median.items():
        if name.startswith("train"):
            print(f"{name:17s} {seconds:.4f} s a step, {seconds / median['train DM']:.2f} of DM's")
        else:
            rate = config.batch / seconds * few.sample_steps / config.sample_steps
            print(f"{name:17s} {rate:.3g} images/s with {config.sample_steps} DDIM steps")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated()
    print(f"peak memory {peak / 2**30:.2f} GiB")


def bench_fid(rounds: int) -> None:
    from prdc import compute_prdc
    from pytorch_fid.fid_score import calculate_frechet_distance

    for n in (500, 5000):
        x, y = torch.rand(2, n, 2048, dtype=torch.float64)
        moments = [part for z in (x.numpy(), y.numpy()) for part in (z.mean(0), np.cov(z, rowvar=False))]
        median = alternate({"ours": lambda: fid.frechet_distance(x, y),
                            "pytorch-fid": lambda: calculate_frechet_distance(*moments)}, rounds)
        ratio = median["ours"] / median["pytorch-fid"]
        print(f"Frechet distance, {n:,} x 2,048: {median}, ratio {ratio:.3f}")
    x, y = torch.rand(2, 10_000, 2048)
    median = alternate({"ours": lambda: fid.precision_recall(x, y),
                        "prdc": lambda: compute_prdc(x.numpy(), y.numpy(), 3)}, 1)
    print(f"precision and recall, 10,000 x 2,048: {median}, ratio {median['ours'] / median['prdc']:.3f}")


def main() -> None:
    own = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                  allow_abbrev=False)
    own.add_argument("--rounds", type=int, default=5)
    own.add_argument("--diffusers", action="store_true")
    own.add_argument("--fid", action="store_true")
    own, rest = own.parse_known_args()
    if own.fid:
        return bench_fid(own.rounds)
    args = vars(odm.parser().parse_args(["train", *rest]))
    preset = {"small": odm.SMALL}.get(args.pop("preset", "paper"), {})
    args.pop("command")
    bench_odm(odm.Config(**{**preset, **args}), own.rounds, own.diffusers)


if __name__ == "__main__":
    main()
