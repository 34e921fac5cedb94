#!/usr/bin/env bash
# The commands behind data/RESULTS.md and the pictures, in parts, each of which goes on where it was stopped:
#     bash data/experiments.sh drawings knees colonoscopies read pictures
# STEPS=4 EACH=2 N=40 tries a part quickly. data/README.md says where the data come from: data/knee,
# data/knee-test, data/hyperkvasir-uc. OMP_NUM_THREADS=1 keeps a part to one core.
set -euo pipefail
cd "$(dirname "$0")/.."
steps=${STEPS:-1600} each=${EACH:-40} n=${N:-2000}

train() { # NAME FLAGS...: trains runs/NAME
    local name=$1
    shift
    python odm.py train --preset small --steps "$steps" --out "runs/$name" "$@"
}

draw() { # NAME GUIDANCE: samples/NAME-GUIDANCE
    python odm.py sample --checkpoint "runs/$1" --each "$each" --guidance "$2" --out "samples/$1-$2"
}

score() { # fid.py; WEIGHTS=FILE names the network where it cannot be downloaded
    python fid.py "$@" ${WEIGHTS:+--weights "$WEIGHTS"}
}

measured() { # FOLDER...: mean and spread of the severity that the drawings in each class folder show
    python - "$@" <<'END'
import sys
sys.path += ["data", "."]
import demo, numpy, odm, scipy.stats
for folder in sys.argv[1:]:
    images, labels, names = odm.load_images(folder, size=32)
    severity = demo.measure(images.numpy())
    found = [severity[labels == c] for c in range(len(names))]
    drawings = found if folder == sys.argv[1] else drawings
    print(folder, [f"{x.mean():.2f} +- {x.std():.2f}" for x in found], "correlation",
          round(numpy.corrcoef(severity, labels)[0, 1], 2), "Wasserstein distance to the first",
          [round(scipy.stats.wasserstein_distance(*pair), 2) for pair in zip(found, drawings)])
END
}

drawings() { # do the severities drawn come closer to those asked for?
    python data/demo.py
    python data/demo.py -n "$n" --seed 1 --out data/fresh
    for seed in 0 1 2 3; do
        train "demo-dm-$seed" --data data/demo --ordinal 0 --seed $seed
        train "demo-odm-$seed" --data data/demo --seed $seed
    done
    for seed in 0 1; do
        train "demo-w10-$seed" --data data/demo --ordinal 10 --seed $seed
    done
    for run in runs/demo-*-[0-3]; do
        for guidance in 1 2; do draw "$(basename "$run")" $guidance; done
    done
    measured data/fresh samples/demo-*-[0-3]-[12]
    score data/fresh samples/demo-dm-0-1 samples/demo-odm-0-1 --dims 768
}

knees() { # do FID, KID and a classifier see a gain? One row of the table each
    row() { # NAME SEEDS FLAGS...
        local name=$1 seeds=$2
        shift 2
        for seed in $seeds; do
            train "knee-$name-$seed" --data data/knee --lr 4e-3 --seed "$seed" "$@"
            for guidance in 1 2; do draw "knee-$name-$seed" $guidance; done
        done
    }
    row dm "0 1 2" --ordinal 0
    row odm "0 1 2"
    row dm-uniform "0 1 2" --ordinal 0 --balance uniform
    row odm-uniform "0 1 2" --balance uniform
    row w10 "0 1" --ordinal 10
    row w0.3 0 --ordinal 0.3
    row w3 0 --ordinal 3
    row spacing 0 --spacing
    row squared 0 --distance squared --ordinal 3072
    row images 0 --triplets images
    row images-uniform 0 --triplets images --balance uniform
    row long-dm 0 --ordinal 0 --lr 2e-3 --steps $((4 * steps))
    row long-odm 0 --lr 2e-3 --steps $((4 * steps))
    score data/knee-test samples/knee-* --dims 768 --plot bars.png --json knees.json
}

colonoscopies() {
    train hk-dm --data data/hyperkvasir-uc --crop 160 --ordinal 0
    train hk-odm --data data/hyperkvasir-uc --crop 160
    for name in hk-dm hk-odm; do
        for guidance in 1 2; do draw $name $guidance; done
    done
    score data/hyperkvasir-uc samples/hk-* --crop 160 --dims 768
}

fresh_drawings() { # FOLDER NUMBER: as many of each grade, of scenes that no network has seen
    python - "$@" <<'END'
import sys
sys.path.append("data")
import demo
from pathlib import Path
from PIL import Image
for grade in range(4):
    for i in range(int(sys.argv[2])):
        file = Path(sys.argv[1], f"Mayo {grade}", f"{i:04d}.png")
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(demo.draw(*demo.scene(55, grade, i))).save(file)
END
}

read() { # how well are severities read, and how near are moved drawings to their truth?
    fresh_drawings data/fresh-even "${EACH:-32}"
    python odm.py grade data/fresh-even --checkpoint data/demo.pt --out grades.csv
    python data/moved.py data/fresh-even grades.csv
    python odm.py train --preset small --data data/knee --steps $((4 * steps)) --out runs/knee-read
    python odm.py grade data/knee-test --checkpoint runs/knee-read --out grades-knee.csv
}

pictures() {
    fresh_drawings data/fresh-even 32
    python odm.py sample --checkpoint data/demo.pt --class 0:3:0.25 --each 5 --out samples/series
    cp samples/series/series.gif data/series.gif
    python data/moved.py data/fresh-even --picture data/moved.png
}

for part in "${@:?name parts: drawings knees colonoscopies read pictures}"; do
    "$part"
done
