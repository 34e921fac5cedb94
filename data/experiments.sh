#!/usr/bin/env bash
# The commands behind data/RESULTS.md and the pictures, in parts, each of which goes on where it was stopped:
#     bash data/experiments.sh drawings rivals rare knees settings large pictures
# STEPS=4 EACH=4 N=40 SEEDS=0 tries a part quickly; do that in a clone of its own. data/README.md says where the real images come from.
# OMP_NUM_THREADS=1 keeps a part to one core.
set -euo pipefail
cd "$(dirname "$0")/.."
steps=${STEPS:-1600} each=${EACH:-24} n=${N:-1656} seeds=${SEEDS:-0 1 2}

train() { # NAME FLAGS...: trains runs/NAME
    local name=$1
    shift
    python odm.py train --preset small --out "runs/$name" "$@"
}

pick() { # FOLDER NUMBER OUT SIZE: so many of its images, evenly from the list, at that size
    python - "$@" <<'END'
import sys
from pathlib import Path
import numpy, odm
images, labels, names = odm.load_images(sys.argv[1], int(sys.argv[4]))
for i in numpy.linspace(0, len(images) - 1, int(sys.argv[2])).round().astype(int):
    odm.save_picture(odm.to_picture(images[i]), Path(sys.argv[3], names[labels[i]], f"{i:05d}.png"))
END
}

score() { # fid.py; WEIGHTS=FILE names the network where it cannot be downloaded
    python fid.py "$@" ${WEIGHTS:+--weights "$WEIGHTS"}
}

drawings() { # severities drawn, read and moved, where they are known
    python data/demo.py
    for seed in $seeds; do
        train "demo-dm-$seed" --data data/demo --steps "$steps" --seed "$seed" --ordinal 0
        train "demo-odm-$seed" --data data/demo --steps "$steps" --seed "$seed"
        train "demo-w10-$seed" --data data/demo --steps "$steps" --seed "$seed" --ordinal 10
    done
    for name in dm odm w10; do
        python data/severity.py runs/demo-$name-* --each "$each"
    done
    python data/severity.py data/demo.pt --each "$each"
}

rivals() { # on the drawings: Eq. 8 as printed, and the severity fed as one number in place of the loss
    python data/demo.py
    mkdir -p number
    patch -o number/odm.py odm.py data/number.patch
    for seed in $seeds; do
        train "demo-printed-$seed" --data data/demo --steps "$steps" --seed "$seed" \
            --triplets images --distance squared --ordinal 3072
        python number/odm.py train --preset small --out "runs/demo-number-$seed" --data data/demo \
            --steps "$steps" --seed "$seed" --ordinal 0
    done
    python data/severity.py runs/demo-printed-* --each "$each"
    PYTHONPATH=number python data/severity.py runs/demo-number-* --each "$each"
}

rare() { # how many drawings of Mayo 3 are enough, and Mayo 2 left out
    grades rare-20 596 298 122 20
    grades rare-300 596 298 122 300
    grades without-2 596 298 0 84
    for name in rare-20 without-2 rare-300; do
        for seed in $seeds; do
            train "$name-dm-$seed" --data "data/$name" --steps "$steps" --seed "$seed" --ordinal 0
            train "$name-odm-$seed" --data "data/$name" --steps "$steps" --seed "$seed"
        done
        python data/severity.py runs/$name-* --each "$each"
    done
}

grades() { # NAME COUNTS...: data/NAME, the embedded set with so many drawings of each grade
    python - "$@" <<'END'
import sys
from pathlib import Path
from PIL import Image
sys.path.append("data")
import demo, odm
for grade, count in enumerate(map(int, sys.argv[2:])):
    for i in range(count):
        frame = Image.fromarray(demo.draw(*demo.scene(0, grade, i)))
        odm.save_picture(frame, Path("data", sys.argv[1], f"Mayo {grade}", f"{i:04d}.png"))
END
}

knees() { # the paper's Table 1, on radiographs
    pick data/knee "$n" samples/knee-real 32
    for seed in $seeds; do
        knee "knee-dm-$seed" $((4 * steps)) --seed "$seed" --ordinal 0
        knee "knee-odm-$seed" $((4 * steps)) --seed "$seed"
        knee "knee-w10-$seed" $((4 * steps)) --seed "$seed" --ordinal 10
        for name in "knee-dm-$seed" "knee-odm-$seed"; do # guidance as in the paper
            python odm.py sample --checkpoint "runs/$name" -n "$n" --guidance 2 --out "samples/s2-$name"
        done
    done
    knee knee-dm-long $((6 * steps)) --ordinal 0
    for name in knee-dm-0 knee-odm-0; do # as many of each grade
        python odm.py sample --checkpoint "runs/$name" --each $((n / 5)) --out "samples/each-$name"
    done
    score data/knee-test samples/knee-dm-0 samples/knee-odm-0 --plot data/bars.png
    score data/knee samples/knee-{dm,odm,w10}-*
    score data/knee-test samples/knee-{real,dm-*,odm-*,w10-*} samples/{s2,each}-* --trained-on data/knee
}

settings() { # one seed of DM, ODM and other settings on radiographs, for fewer steps
    knee short-dm "$steps" --ordinal 0
    knee short-odm "$steps"
    knee short-printed "$steps" --triplets images --distance squared --ordinal 3072
    knee short-images "$steps" --triplets images
    knee short-spacing "$steps" --spacing
    knee short-dm-uniform "$steps" --balance uniform --ordinal 0
    knee short-odm-uniform "$steps" --balance uniform
    knee tiny-dm $((steps / 4)) --ordinal 0
    knee tiny-odm $((steps / 4))
    score data/knee-test samples/short-* samples/tiny-*
}

knee() { # NAME STEPS FLAGS...: trains runs/NAME on radiographs, draws and reads
    train "$1" --data data/knee --steps "$2" "${@:3}"
    python odm.py sample --checkpoint "runs/$1" -n "$n" --out "samples/$1"
    pick data/knee-test 400 data/knee-400 32
    python odm.py grade data/knee-400 --checkpoint "runs/$1" > "grades-$1.csv"
}

frames() { # data/hyperkvasir-uc without the display's overlay: data/colon, and every tenth, data/colon-test
    python - <<'END'
from pathlib import Path
import odm
for folder in sorted(Path("data/hyperkvasir-uc").iterdir()):
    for i, file in enumerate(sorted(folder.iterdir())):
        frame = odm.read_image(file).resize((256, 256)).crop((72, 8, 224, 160))
        out = Path("data/colon-test" if i % 10 == 5 else "data/colon", folder.name, f"{file.stem}.png")
        odm.save_picture(frame, out)
END
}

ship() { # RUN FILE: its averaged weights in half precision
    python - "$@" <<'END'
import sys, torch
state = torch.load(f"{sys.argv[1]}/checkpoint.pt", weights_only=True)
config = state["config"] | dict(data="", out="", init="")
ema = {name: weight.half() for name, weight in state["ema"].items()}
torch.save(dict(config=config, classes=state["classes"], step=state["step"], ema=ema), sys.argv[2])
END
}

large() { # 64x64, the paper's size: radiographs, and its own subject, colonoscopies
    local flags="--size 64 --ch-mult 1,2,2,2 --attention 16 --lr 1e-3 --triplet-part 0.125"
    train knee-64 --data data/knee $flags --steps $((9 * steps / 4))
    ship runs/knee-64 data/knee.pt
    frames
    train colon-64 --data data/colon $flags --steps $((5 * steps / 2))
    train colon-64-on --data data/colon $flags --steps $((15 * steps / 8)) --init runs/colon-64
    pick data/knee-test 200 data/knee-200 64
    python odm.py grade data/knee-200 --checkpoint runs/knee-64 > grades-knee-64.csv
    pick data/knee-test 8 data/knee-8 64
    python odm.py sample --image data/knee-8 --checkpoint data/knee.pt --out samples/knee-64-moved
    python odm.py sample --checkpoint data/knee.pt -n 100 --out samples/knee-64
    score data/knee-test samples/knee-64 --trained-on data/knee --dims 192
    python odm.py grade data/colon-test --checkpoint runs/colon-64-on > grades-colon-64.csv
}

pictures() {
    python odm.py sample --checkpoint data/demo.pt --class 0:3:0.25 --each 5 --out samples/series
    cp samples/series/series.gif data/series.gif
    python data/severity.py data/demo.pt --picture data/moved.png
    python odm.py sample --checkpoint data/knee.pt --class 0:4:1 --each 3 --out samples/knee-sheet
    cp samples/knee-sheet/sheet.png data/knee.png
    local rows="tiny-odm short-odm knee-odm-1" # after 400, 1,600 and 6,400 steps
    for name in $rows; do
        python odm.py sample --checkpoint "runs/$name" --class 0:4:1 --each 1 --out "samples/row-$name"
    done
    python - $rows <<'END'
import sys
from pathlib import Path
import odm
rows = [Path("samples", f"row-{name}") for name in sys.argv[1:]]
columns = [(c, [odm.read_square(row / c / "00000.png", 32) for row in rows]) for c in "01234"]
odm.save_picture(odm.sheet_of(columns), Path("data/steps.png"))
END
}

for part in "${@:?name parts: drawings rivals rare knees settings large pictures}"; do
    "$part"
done
