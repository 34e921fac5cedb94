"""Makes a set of 1,600 real photographs of the retina, graded for diabetic retinopathy. It needs no account.

    python data/retina.py                                  # data/retina (1,200) and data/retina-test (400)
    python data/retina.py --size 64 --out data/retina64    # the same images at 64x64 instead of 28x28
    python data/retina.py --npz retinamnist.npz            # from a file that was downloaded elsewhere

RetinaMNIST is CC BY 4.0: J. Yang et al., MedMNIST v2, Scientific Data 10, 41, 2023; its images come from the
DeepDRiD challenge. OUT holds what MedMNIST calls train and val, OUT-test its test images.
"""

import argparse
import hashlib
import http.client
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image

sys.path.append(str(Path(__file__).resolve().parents[1]))
import odm

URL = "https://zenodo.org/records/10519652/files/{}?download=1"
ARCHIVES = {28: ("retinamnist.npz", "bd4c0672f1bba3e3a89f0e4e876791e4"),  # side in pixels: (name, MD5)
            64: ("retinamnist_64.npz", "afda852cc34dcda56f86ad2b2457dbcc")}


def must_match(file: Path, size: int, source: str | Path) -> None:
    """Raise UserError, which names the source of the file, unless it is the archive of this size."""
    name, expected = ARCHIVES[size]
    found = hashlib.md5(file.read_bytes(), usedforsecurity=False).hexdigest()
    if found != expected:
        raise odm.UserError(f"{source}: is not {name}, the whole file of --size {size} (its MD5 is {found}, "
                            f"not {expected}); download {URL.format(name)} and name it with --npz")


def download(file: Path, size: int) -> None:
    """Fetch the archive to a temporary name beside the file, check it, and let it take the file's place."""
    url, part = URL.format(file.name), file.with_name(f"{file.name}.partial-{os.getpid()}")
    odm.say(f"downloading {url}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(url, str(part), progress=False)
        must_match(part, size, url)
        os.replace(part, file)
    except (OSError, http.client.HTTPException) as error:
        raise odm.UserError(f"{url}: cannot be downloaded to {file} ({error}); try again, or download it "
                            "elsewhere and name the file with --npz") from None
    finally:
        part.unlink(missing_ok=True)


def images_of(archive: Path, *splits: str) -> dict[str, np.ndarray]:
    """{GRADE/SPLIT_NUMBER.png: uint8 (size, size, 3)} of some splits of the archive."""
    images = {}
    with np.load(archive, allow_pickle=False) as npz:
        for split in splits:
            for i, (image, grade) in enumerate(zip(npz[f"{split}_images"], npz[f"{split}_labels"].ravel())):
                images[f"{grade}/{split}_{i:04d}.png"] = image
    return images


def is_there(folder: Path, images: dict[str, np.ndarray]) -> bool:
    """Whether the folder holds these images. Raises UserError where it holds something else."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return False
    files = {file.relative_to(folder).as_posix() for file in odm.list_files(folder)}
    if files != set(images) or not all(np.array_equal(odm.read_image(folder / name), image)
                                       for name, image in images.items()):
        raise odm.UserError(f"{folder}: holds something else than these {len(images):,} images; delete it or "
                            "choose another --out")
    return True


def make(out: str | Path, size: int = 28, npz: str | Path = "") -> None:
    """Write OUT/GRADE/*.png and OUT-test/GRADE/*.png. A whole set is left alone; none is ever half there."""
    out = Path(out).resolve()
    archive = Path(npz or out.with_name(ARCHIVES[size][0]))
    if not npz and not archive.exists():
        download(archive, size)
    must_match(archive, size, archive)
    test = out.with_name(f"{out.name}-test")
    sets = {out: images_of(archive, "train", "val"), test: images_of(archive, "test")}
    missing = [folder for folder, images in sets.items() if not is_there(folder, images)]
    for folder in missing:  # each takes its name when it is whole
        part = folder.with_name(f"{folder.name}.partial-{os.getpid()}")
        try:
            for name, image in sets[folder].items():
                (part / name).parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(image).save(part / name)
            os.replace(part, folder)
        finally:
            shutil.rmtree(part, ignore_errors=True)
    odm.say(f"{len(sets[out]):,} images are in {out}, {len(sets[test]):,} in {test}")


def main(argv: list[str] | None = None) -> int:
    parser = odm.Parser("retina.py", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", default=odm.HERE / "data" / "retina", help="for the images [data/retina]")
    parser.add_argument("--size", type=int, choices=list(ARCHIVES), default=28, help="side in pixels [28]")
    parser.add_argument("--npz", help="the archive [downloaded, and kept beside OUT]")
    args = parser.parse_args(argv)
    return odm.status_of("retina.py", lambda: make(**vars(args)))


if __name__ == "__main__":
    sys.exit(main())
