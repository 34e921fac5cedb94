#!/usr/bin/env bash
# The commands behind data/RESULTS.md and the pictures, in parts, each of which goes on where it was stopped:
#     bash data/experiments.sh drawings knees colon pictures
# STEPS=4 EACH=4 N=40 SEEDS=0 tries a part quickly. data/README.md says where the real images come from.
# OMP_NUM_THREADS=1 keeps a part to one core.
set -euo pipefail
cd "$(dirname "$0")/.."
steps=${STEPS:-1600} each=${EACH:-24} n=${N:-1656} seeds=${SEEDS:-0 1 2}

train() { # NAME FLAGS...: trains runs/NAME
    local name=$1
    shift
    python odm.py train --preset small --out "runs/$name" "$@"
}

pick() { # FOLDER NUMBER OUT: so many of its images, evenly from the list, at 32x32
    python - "$@" <<'END'
import sys
from pathlib import Path
import numpy, odm
images, labels, names = odm.load_images(sys.argv[1], 32)
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
    done
    python data/severity.py runs/demo-dm-* --each "$each"
    python data/severity.py runs/demo-odm-* --each "$each"
    python data/severity.py data/demo.pt --each "$each"
}

knees() { # the paper's Table 1, on radiographs
    pick data/knee "$n" samples/knee-real
    pick data/knee-test 400 data/knee-400
    for seed in $seeds; do
        train "knee-dm-$seed" --data data/knee --steps $((4 * steps)) --seed "$seed" --ordinal 0
        train "knee-odm-$seed" --data data/knee --steps $((4 * steps)) --seed "$seed"
        for name in "knee-dm-$seed" "knee-odm-$seed"; do
            python odm.py sample --checkpoint "runs/$name" -n "$n" --out "samples/$name"
            python odm.py grade data/knee-400 --checkpoint "runs/$name" --out "grades-$name.csv"
        done
    done
    score data/knee-test samples/knee-*-* --plot data/bars.png
    score data/knee-test samples/knee-* --trained-on samples/knee-real --json knees.json
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

colon() { # 64x64: nearer to the paper's own subject and size
    frames
    train colon --data data/colon --size 64 --ch-mult 1,2,2,2 --attention 16 --lr 1e-3 --triplet-part 0.125 \
        --steps $((5 * steps / 2))
    python odm.py grade data/colon-test --checkpoint runs/colon --out grades-colon.csv
}

pictures() {
    python odm.py sample --checkpoint data/demo.pt --class 0:3:0.25 --each 5 --out samples/series
    cp samples/series/series.gif data/series.gif
    python data/severity.py data/demo.pt --picture data/moved.png
}

for part in "${@:?name parts: drawings knees colon pictures}"; do
    "$part"
done
