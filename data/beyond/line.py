"""Two more uses of the line of Eq. 7: read the severity of images, and move images to another severity.

    python data/beyond/line.py read IMAGES... > grades.csv
    python data/beyond/line.py move IMAGES... --class 0:3:0.5

IMAGES: image files, folders of them, or a CSV of grades (data/README.md). An image below a folder has the
grade `given` by the nearest folder that is named like a class, from the folder you name downward.
"""

import argparse
import contextlib
import csv
import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

sys.path.append(str(Path(__file__).resolve().parents[2]))
import odm
from usefulness import quadratic_kappa


@torch.no_grad()
def read_position(model: odm.UNet, x_0: Tensor, alpha_bar: Tensor, seed: int = 0,
                  parts: tuple = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6)) -> Tensor:
    """The position on the line of Eq. 7 that explains an image best: x_0 (N, 3, H, W) -> (N,) in 0..C-1.

    A diffusion classifier (Li et al. 2023) that knows fractions. Let e_c = eps - eps_theta(x_t, t, c), and
    lower, upper and cross the means of e_k^2, e_{k+1}^2 and e_k e_{k+1}. The estimate at position k + a errs
    by (1-a)^2 lower + 2a(1-a) cross + a^2 upper, least at a = (lower - cross) / (lower - 2 cross + upper),
    kept in [0, 1]; the best k wins. All images see one eps at each t (parts of T) and its mirror -eps: errors
    that are odd in eps cancel. What a t adds is divided by the root of its mean error: undivided, the small t
    would decide, and divided by the error itself the large t.
    """
    C, N, gram = model.num_classes, len(x_0), 0.0
    rng = torch.Generator().manual_seed(seed)
    x_0, c = x_0.repeat(C, 1, 1, 1), torch.arange(C, device=x_0.device).repeat_interleave(N)
    for part in parts:
        t = torch.full_like(c, max(1, round(part * (len(alpha_bar) - 1))))
        noise = torch.randn(1, *x_0.shape[1:], generator=rng).to(x_0)
        errors = [eps - model(odm.q_sample(x_0, t, eps, alpha_bar), t, c) for eps in (noise, -noise)]
        e = torch.cat(errors, dim=1).view(C, N, -1).transpose(0, 1).cpu().double()  # (N, C, entries of both)
        products = e @ e.mT
        gram = gram + products / products.diagonal(0, 1, 2).mean(1).sqrt()[:, None, None]
    own, cross = gram.diagonal(0, 1, 2), gram.diagonal(1, 1, 2)  # (N, C): of e_c^2; (N, C-1): of e_c e_{c+1}
    lower, upper = own[:, :-1], own[:, 1:]
    a = ((lower - cross) / (lower - 2 * cross + upper)).nan_to_num(0).clamp(0, 1)  # 0 where the two coincide
    k = ((1 - a) ** 2 * lower + 2 * a * (1 - a) * cross + a**2 * upper).argmin(1, keepdim=True)
    return (k + a.gather(1, k))[:, 0]


@torch.no_grad()
def moved(model: odm.UNet, images: Tensor, own: Tensor, positions: Tensor) -> Tensor:
    """Images (B, 3, H, W) uint8 taken from their own positions (B,) to others (B,): uint8, on the CPU.

    Each is encoded at its own position, which leaves in x_T what the class does not explain, and sampled from
    there. Nothing guides or clips, for encoding must be undone.
    """
    device, alpha_bar = model.label.weight.device, odm.alpha_bars(model.config)
    x, times = odm.to_unit(images.to(device)), odm.equal_steps(model.config)
    for position, way in ((own, times[::-1]), (positions, times)):
        x = odm.ddim(odm.guided_eps(model, position.to(device), 1.0), x, alpha_bar, way, clip=False)
    return odm.to_uint8(x).cpu()


def positions_of(network: odm.Network, images: Tensor, seed: int = 0, batch: int = 16) -> Tensor:
    """read_position of images (N, 3, H, W) uint8, a batch at a time: (N,), on the CPU."""
    model, found, progress = network.model, [], odm.progress_of(len(images), "severities read")
    alpha_bar = odm.alpha_bars(model.config).to(model.label.weight.device)
    for part in images.split(batch):
        found += read_position(model, odm.to_unit(part.to(alpha_bar.device)), alpha_bar, seed)
        progress(len(found))
    return torch.stack(found)


def given_images(network: odm.Network, images: list) -> tuple[list[Path], list[str], list[str], Tensor]:
    """(files, a name to write each under, the class given to each or "", pixels (N, 3, H, W) uint8)."""
    config, rows = network.model.config, []
    for path in (Path(image).absolute() for image in images):
        files, root, near = [path], path.parent, [[]]
        if path.is_dir():
            there, root = odm.list_files(path), path
            files = [file for file in there if odm.is_image(file)]
            near = [[folder.name for folder in file.relative_to(path.parent).parents] for file in files]
            odm.say(f"{path}: {len(files):,} images in {len(there):,} files")
        elif path.suffix.lower() in odm.TABLES:
            files, labels, grades = odm.find_images(path, config.order, config.columns)
            near = [[grades[label]] for label in labels]
        if not files:
            raise odm.UserError(f"{path}: no images in it; name a folder that holds some")
        for file, names in zip(files, near):
            classes = set(names).intersection(network.names)
            given = classes.pop() if len(classes) == 1 else ""  # of folders of two classes neither counts
            rows.append((file, "-".join(file.relative_to(root).with_suffix("").parts), given))
    files, titles, given = zip(*rows)
    return files, titles, given, odm.read_squares(files, size=config.size, crop=config.crop)


def read(network: odm.Network, images: list, seed: int = 0, batch: int = 16) -> list[tuple]:
    """(file, severity, grade: the nearest class, given) of each; says how what is read and given compare."""
    files, _, given, pixels = given_images(network, images)
    positions, names = positions_of(network, pixels, seed, batch).numpy(), network.names
    scale, nearest = np.array(odm.severities_of(names)), (positions + 0.5).astype(int)
    severities = np.interp(positions, range(len(names)), scale)
    if "" in given:
        odm.say(f"{given.count(''):,} of {len(files):,} images have no given grade: no comparison")
    else:
        own, one_hot = np.array([names.index(grade) for grade in given]), np.eye(len(names), dtype=int)
        confusion, error = one_hot[own].T @ one_hot[nearest], abs(severities - scale[own]).mean()
        kappa = quadratic_kappa(torch.from_numpy(confusion))
        odm.say(f"{len(files):,} images, quadratic kappa {kappa:.3f}, mean error {error:.3f}")
        for c in np.unique(own):
            counts = ", ".join(f"{n} as {name}" for n, name in zip(confusion[c], names))
            odm.say(f"given {names[c]}: read {counts}; mean severity read {severities[own == c].mean():.2f}")
    return list(zip(files, severities.round(3).tolist(), [names[c] for c in nearest], given))


def move(network: odm.Network, images: list, seed: int = 0, batch: int = 16, severity: str = "all",
         at: str = "", out: str = "") -> Path:
    """Move images to severities (see odm.parse_severities), into OUT/<class>/<name>.png. Returns OUT.

    at: the severity that all the images have [it is read from each]. What is there already is kept.
    """
    wanted, given_at = odm.parse_severities(severity, network.names), []
    if at and len(given_at := list(odm.parse_severities(at, network.names, "--at").values())) > 1:
        raise odm.UserError(f"--at {at}: name one severity, that of all these images")
    files, titles, _, pixels = given_images(network, images)
    if len(set(titles)) < len(titles):
        raise odm.UserError(f"{max(titles, key=titles.count)}: two images would get this name; rename one")
    out, config = Path(out or f"samples/{network.name}-moved"), network.model.config
    odm.note_settings(out, network, seed=seed, at=at, images=odm.digest_of(pixels))
    own = torch.tensor(given_at * len(files)) if at else positions_of(network, pixels, seed, batch).float()
    jobs = [(out / name / f"{title}.png", (image, position, torch.tensor(to)))
            for name, to in wanted.items() for title, image, position in zip(titles, pixels, own)]
    odm.write_images(jobs, lambda inputs: moved(network.model, *map(torch.stack, zip(*inputs))), batch)
    if odm.RANK == 0:
        some = slice(None, None, (len(titles) + 7) // 8)  # eight at most
        columns = []
        for name in wanted:
            pictures = [odm.read_square(out / name / f"{title}.png", config.size) for title in titles[some]]
            columns.append((name, pictures))
        if ":" in severity:
            odm.save_series(columns, out / "series.gif")
        odm.save_picture(odm.sheet_of([("given", pixels[some]), *columns]), out / "sheet.png")
    odm.say(f"{len(jobs):,} images are in {out}; {out / 'sheet.png'} shows some")
    return out


def main(argv: list[str] | None = None) -> int:
    """The command line; exit statuses as those of odm.py."""
    parser = odm.Parser("line.py", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add = parser.add_argument
    add("command", choices=("read", "move"))
    add("images", nargs="+", metavar="IMAGES")
    add("--class", dest="severity", help='to move to: 3, "Mayo 3", 1.5, 0:3:0.5 (a series) or all [all]')
    add("--at", help="the severity that images to move have [read from each]")
    add("--out", help="folder for moved images [samples/RUN-STEP-moved]")
    add("--checkpoint", default="", help="one, or a run's folder [the newest in runs/, else data/demo.pt]")
    add("--seed", type=odm.whole(0, 2**63 - 1), default=0, help="of the noise that reading adds [0]")
    add("--batch", type=odm.whole(1), default=16, help="images at once [16]; lower it where memory runs out")
    add("--columns", help="ID,GRADE: columns of a CSV of grades [the run's]")
    add("--device", default="auto", help="cpu, cuda, ... [the GPU if there is one]")
    args = parser.parse_args(argv)
    options = {name: getattr(args, name) for name in ("severity", "at", "out") if getattr(args, name)}
    if args.command == "read" and options:
        parser.error("--class, --at and --out: only with move")

    def run() -> None:
        with contextlib.redirect_stdout(sys.stderr):  # standard output is for the table alone
            columns = {"columns": args.columns} if args.columns else {}
            network = odm.load_network(args.checkpoint, args.device, guidance=1.0, eta=0.0, **columns)
            use = {"read": read, "move": move}[args.command]
            rows = use(network, args.images, args.seed, args.batch, **options)
        if args.command == "read" and odm.RANK == 0:
            csv.writer(sys.stdout).writerows([("file", "severity", "grade", "given"), *rows])

    return odm.status_of("line.py", run)


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")  # a name that can't be shown must not end a run
    sys.exit(main())
