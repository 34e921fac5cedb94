#!/usr/bin/env bash
# The commands behind RESULTS.md and the pictures, in parts, each of which goes on where it was stopped:
#     bash data/evidence/experiments.sh grade earnest epochs hundred leaf-64 plane embedding preset memorise
#     bash data/evidence/experiments.sh synthetic rare large pictures
# STEPS=4 EACH=4 N=40 SEEDS=0 tries a part quickly; do that in a clone of its own. data/README.md says where
# the real images come from. OMP_NUM_THREADS=1 keeps a part to one core.
set -euo pipefail
cd "$(dirname "$0")/../.."
weights=${WEIGHTS:+--weights $WEIGHTS} # of fid.py, where they cannot be downloaded
steps=${STEPS:-1600} n=${N:-1656} seeds=${SEEDS:-0 1 2} each=${EACH:+--each $EACH}
at64="--size 64 --ch-mult 1,2,2,2 --attention 16 --lr 1e-3" # the small preset at the paper's size
as_printed="--triplets images --distance squared --ordinal 3072" # Eq. 8 as printed

train() { # NAME FLAGS...: trains runs/NAME, by another program than odm.py where `program` names one
    python "${program:-odm.py}" train --preset small --guidance 1 --steps "$steps" --out "runs/$1" "${@:2}"
}

patched() { # NAME [NUMBER]: NAME/odm.py, as NAME.patch changes it, with NUMBER in place of the patch's 0.02
    mkdir -p "$1"
    sed "/^+/s/0\.02/${2:-0.02}/" "data/evidence/$1.patch" | patch -o "$1/odm.py" odm.py
}

pick() { # FOLDER NUMBER OUT SIZE [each]: so many of its images, or of each class, evenly from the list
    python - "$@" <<'END'
import sys
from pathlib import Path
import numpy, odm
folder, number, out, size, *each = sys.argv[1:]
images, labels, names = odm.load_images(folder, int(size))
for c in range(len(names) if each else 1):
    places = numpy.flatnonzero(labels == c) if each else numpy.arange(len(labels))
    for i in places[numpy.linspace(0, len(places) - 1, int(number)).round().astype(int)]:
        odm.save_picture(odm.to_picture(images[i]), Path(out, names[labels[i]], f"{i:05d}.png"))
END
}

compared() { # FILE-SEED.json... of heldout.py, DM first: differences from it, mean and deviation over seeds
    python - "$@" <<'END'
import json, sys
from collections import defaultdict
from pathlib import Path
import numpy
seeds = defaultdict(list)
for file in sys.argv[1:]:
    seeds[Path(file).stem.rsplit("-", 1)[1]] += json.loads(Path(file).read_text())
first, *others = zip(*seeds.values())
for rows in others:
    for name in ("all", list(rows[0]["unseen"])[-2]):  # and the last class
        loss, dm = (numpy.array([row["unseen"][name]["201-1000"][0] for row in of]) for of in (rows, first))
        found = 100 * (loss / dm - 1)
        spread = found.std(ddof=1) if len(found) > 1 else numpy.nan
        network, values = rows[0]["network"], found.round(1).tolist()
        print(f"{network}, {name}: {found.mean():+.1f} ± {spread:.1f} %, {values}")
END
}

grade() { # what helps a rare grade? On synthetic frames and leaves
    leaves
    patched number
    patched spacing
    local set scale name
    for set in demo leaf; do
        for seed in $seeds; do
            local flags="--data data/$set --seed $seed"
            train "grade-$set-dm-$seed" $flags --ordinal 0
            train "grade-$set-odm-$seed" $flags
            train "grade-$set-uniform-$seed" $flags --ordinal 0 --balance uniform
            train "grade-$set-both-$seed" $flags --balance uniform
            train "grade-$set-w10-$seed" $flags --ordinal 10
            train "grade-$set-longer-$seed" $flags --ordinal 0 --steps $((13 * steps / 10)) # ODM's time
            program=number/odm.py train "grade-$set-number-$seed" $flags --ordinal 0
            python data/evidence/heldout.py runs/grade-$set-{dm,odm,uniform,both,w10,longer}-$seed \
                "data/$set-test" --json "samples/$set-heldout-$seed.json"
            PYTHONPATH=number python data/evidence/heldout.py runs/grade-$set-number-$seed "data/$set-test" \
                --json "samples/$set-number-$seed.json"
        done
        train "grade-$set-images-0" --data "data/$set" --triplets images # one seed, as a check
        train "grade-$set-printed-0" --data "data/$set" $as_printed
        program=spacing/odm.py train "grade-$set-spacing-0" --data "data/$set"
        python data/evidence/heldout.py runs/grade-$set-{dm,images,printed,spacing}-0 "data/$set-test" \
            --json "samples/$set-check-0.json"
        compared samples/$set-{heldout,number}-*.json
        compared samples/$set-check-0.json
        severities "$set" 1 runs/grade-$set-{images,printed,spacing}-0
        severities "$set" 1 runs/grade-$set-longer-*
        for scale in 1 1.25 1.5 2; do
            for name in dm odm uniform both; do
                severities "$set" "$scale" runs/grade-$set-$name-*
            done
        done
        for scale in 1 1.5; do
            severities "$set" "$scale" runs/grade-$set-w10-*
            PYTHONPATH=number severities "$set" "$scale" runs/grade-$set-number-*
        done
        python fid.py "data/$set-test" samples/grade-$set-{dm,odm,uniform,both}-*-guidance-{1,1.5} $weights
    done
}

severities() { # demo or leaf, a scale, runs: what they show
    local kind=--brief
    [ "$1" = leaf ] && kind=--leaves
    python data/evidence/severity.py $kind ${each:---each 32} --guidance "$2" "${@:3}"
}

earnest() { # DM and ODM for longer, on leaves, retinas and radiographs
    leaves
    python data/retina.py
    pick data/knee-test 400 data/knee-400 32
    pick data/knee "$n" samples/knee-real 32
    local set name flags test many others
    for set in leaf retina knee; do
        flags="--data data/$set --steps $((4 * steps))" test="$set-test" many=$((n < 400 ? n : 400)) others=""
        [ $set = retina ] && flags+=" --size 28 --attention 7"
        [ $set = knee ] && test=knee-400 many=$n # the loss of 400, FID of all
        for seed in $seeds; do
            train "earnest-$set-dm-$seed" $flags --seed "$seed" --ordinal 0
            train "earnest-$set-odm-$seed" $flags --seed "$seed"
            for name in dm odm; do
                python odm.py sample --checkpoint "runs/earnest-$set-$name-$seed" -n "$many" \
                    --out "samples/earnest-$set-$name-$seed"
            done
            python data/evidence/heldout.py runs/earnest-$set-{dm,odm}-$seed "data/$test" \
                --json "samples/earnest-$set-heldout-$seed.json"
        done
        compared samples/earnest-$set-heldout-*.json
        if [ $set = knee ]; then
            train earnest-knee-long --data data/knee --steps $((52 * steps / 10)) --ordinal 0 # ODM's time
            python odm.py sample --checkpoint runs/earnest-knee-long -n "$n" --out samples/earnest-knee-long
            others="samples/earnest-knee-long samples/knee-real"
        fi
        python fid.py "data/$set-test" samples/earnest-$set-{dm,odm}-[0-9] $others $weights \
            --json "samples/earnest-$set.json"
    done
    python data/beyond/usefulness.py data/knee-test samples/earnest-knee-{dm,odm}-[0-9] $weights \
        --trained-on data/knee
    for seed in $seeds; do
        train "earnest-leaf-uniform-$seed" --data data/leaf --steps $((4 * steps)) --seed "$seed" \
            --ordinal 0 --balance uniform
    done
    for name in dm odm uniform; do
        severities leaf 1 runs/earnest-leaf-$name-*
        severities leaf 1.5 runs/earnest-leaf-$name-*
    done
}

epochs() { # as the paper, which sees each image 567 times: 400 small radiographs, 560 times
    again 400 $((35 * steps / 2))
}

hundred() { # and 100 of them, 1,120 times
    again 100 $((35 * steps / 4))
}

again() { # HOW MANY radiographs at 16x16, STEPS: the loss on them and on others, and copies of them
    local part flags name="again-$1"
    pick data/knee "$1" "data/$name" 16
    pick data/knee-test 400 data/again-test 16
    for seed in $seeds; do
        for part in 8 4 2 1; do
            flags="--data data/$name --held-out data/again-test --size 16 --attention 4 --seed $seed"
            flags+=" --decay 0 --log-every 250 --steps $(($2 / part))"
            train "$name-dm-$seed" $flags --ordinal 0
            train "$name-odm-$seed" $flags
            python data/evidence/heldout.py runs/$name-{dm,odm}-$seed data/again-test \
                --trained-on "data/$name" --json "samples/$name-heldout-$seed-$part.json"
        done
        python odm.py sample --checkpoint "runs/$name-dm-$seed" -n 200 --out "samples/$name-dm-$seed"
        python odm.py sample --checkpoint "runs/$name-odm-$seed" -n 200 --out "samples/$name-odm-$seed"
    done
    python data/beyond/usefulness.py data/again-test samples/$name-{dm,odm}-[0-9] $weights \
        --trained-on "data/$name" --dims 192
}

leaf-64() { # data/leaf.pt, what it shows, and whether it copies
    leaves
    train leaf-64 --data data/leaf --held-out data/leaf-test $at64 --steps $((5 * steps / 2))
    ship runs/leaf-64 data/leaf.pt
    for scale in 1 1.5 2; do
        python data/evidence/severity.py data/leaf.pt --leaves ${each:---each 16} --guidance $scale
    done
    python odm.py sample --checkpoint data/leaf.pt --each 20 --guidance 1.5 --out samples/leaf-64
    python data/beyond/usefulness.py data/leaf-test samples/leaf-64 $weights --trained-on data/leaf --dims 192
}

plane() { # Fig. 2 of the paper, measured; after part grade
    for seed in $seeds; do
        python data/evidence/plane.py runs/grade-leaf-{dm,odm}-$seed data/leaf-test \
            --out samples/plane-$seed.png
    done
    cp samples/plane-0.png data/plane.png
}

synthetic() { # severities sampled, read and moved, where they are known; after part grade
    python data/evidence/severity.py runs/grade-demo-dm-* $each
    python data/evidence/severity.py runs/grade-demo-odm-* $each
    python data/evidence/severity.py data/demo.pt $each
}

rare() { # how many synthetic frames of Mayo 3 are enough, and Mayo 2 left out
    PYTHONPATH=data python - <<'END'
from pathlib import Path
from PIL import Image
import demo, odm
counts = {"rare-20": (596, 298, 122, 20), "rare-300": (596, 298, 122, 300), "without-2": (596, 298, 0, 84)}
for name in counts:
    for c, count in enumerate(counts[name]):
        for i in range(count):
            frame = Image.fromarray(demo.draw(*demo.scene(0, c, i)))
            odm.save_picture(frame, Path("data", name, f"Mayo {c}", f"{i:04d}.png"))
END
    for name in rare-20 rare-300 without-2; do
        for seed in $seeds; do
            train "$name-dm-$seed" --data "data/$name" --seed "$seed" --ordinal 0
            train "$name-odm-$seed" --data "data/$name" --seed "$seed" --triplet-part 0.25
        done
        severities demo 1 runs/$name-*
    done
}

ship() { # RUN FILE: its averaged weights in half precision
    python - "$@" <<'END'
import sys, torch
state = torch.load(f"{sys.argv[1]}/checkpoint.pt", weights_only=True)
state["config"] |= dict(data="", out="", init="", held_out="")
state["ema"] = {name: weight.half() for name, weight in state["ema"].items()}
torch.save({name: state[name] for name in ("config", "names", "counts", "step", "ema")}, sys.argv[2])
END
}

large() { # 64x64, the paper's size: radiographs
    train knee-64 --data data/knee $at64 --steps $((9 * steps / 4))
    ship runs/knee-64 data/knee.pt
    pick data/knee-test 200 data/knee-200 64
    python data/beyond/line.py read data/knee-200 --checkpoint runs/knee-64 > runs/knee-64/grades.csv
    pick data/knee-test 8 data/knee-8 64
    python data/beyond/line.py move data/knee-8 --checkpoint data/knee.pt --out samples/knee-64-moved
    python odm.py sample --checkpoint data/knee.pt -n 100 --out samples/knee-64
    python data/beyond/usefulness.py data/knee-test samples/knee-64 $weights --trained-on data/knee --dims 192
}

pictures() { # those of README and of this folder
    python odm.py sample --checkpoint data/leaf.pt --class 0:4:0.25 --each 5 --guidance 1.5 --out samples/rows
    cp samples/rows/series.gif data/leaf.gif
    python data/evidence/severity.py data/demo.pt --picture data/moved.png
    python odm.py sample --checkpoint data/knee.pt --class 0:4:1 --each 3 --out samples/knee-sheet
    cp samples/knee-sheet/sheet.png data/knee.png
    python - <<'END'
import json, re
from pathlib import Path
import numpy
from PIL import Image, ImageDraw
import odm
bars = {}  # FID of each grade, a value a seed: the paper's Fig. 4
for row in json.loads(Path("samples/earnest-knee.json").read_text())["rows"]:
    model = re.search(r"-(dm|odm)-\d$", row["generated"])
    if model and row["fid"] is not None:
        bars.setdefault((row["class"], model[1].upper()), []).append(row["fid"])
scale = 700 / max(map(max, bars.values()))
picture = Image.new("RGB", (800, 60 * len(bars) + 20), "white")
pen = ImageDraw.Draw(picture)
for y, ((grade, model), fids) in zip(range(10, picture.height, 60), bars.items()):
    text = f"{grade}, {model}: FID {numpy.mean(fids):.1f} ({', '.join(f'{fid:.1f}' for fid in fids)})"
    pen.text((20, y), text, "black", font_size=18)
    colour = "steelblue" if model == "DM" else "firebrick"
    pen.rectangle((20, y + 24, 20 + scale * numpy.mean(fids), y + 48), colour)
odm.save_picture(picture, Path("data/evidence/bars.png"))
END
}

leaves() { # whole leaves squeezed to 64x64: data/leaf, and every sixth of each severity, data/leaf-test
    python - <<'END'
import csv
from pathlib import Path
import odm
source = Path("data/lara2018/classification/dataset")
rows = list(csv.DictReader((source / "dataset.csv").read_text().splitlines()))
for severity in "01234":
    for i, leaf in enumerate(sorted(int(row["id"]) for row in rows if row["severity"] == severity)):
        out = Path("data/leaf-test" if i % 6 == 5 else "data/leaf", severity, f"{leaf}.png")
        odm.save_picture(odm.read_image(source / "leaf" / f"{leaf}.jpg").resize((64, 64)), out)
END
    python data/demo.py # synthetic frames to train on, and others to measure with
    python data/demo.py -n 300 --seed 1 --out data/demo-test
}

embedding() { # other first standard deviations of the class embedding than odm.py's 1
    leaves
    for std in 1 0.3 0.1 0.02; do
        patched embedding "$std"
        for seed in $seeds; do
            for set in demo leaf; do
                program=embedding/odm.py train "emb-$set-$std-$seed" --data data/$set --seed $seed --ordinal 0
            done
        done
        python data/evidence/severity.py runs/emb-demo-$std-* $each
        python data/evidence/severity.py --leaves runs/emb-leaf-$std-* ${each:---each 32}
    done
    for seed in $seeds; do
        python data/evidence/heldout.py runs/emb-demo-{1,0.3,0.1,0.02}-"$seed" data/demo-test --draws 1
        python data/evidence/heldout.py runs/emb-leaf-{1,0.3,0.1,0.02}-"$seed" data/leaf-test --draws 1
    done
}

preset() { # other learning rates, batch and decay of the small preset: none was better on both sets
    leaves
    for setting in lr=1e-3 lr=2e-3 lr=4e-3 "batch=16 --steps=$((11 * steps / 16))" decay=1; do
        for seed in ${SEEDS:-0 1}; do
            for set in demo leaf; do
                train "preset-$set-${setting%% *}-$seed" --data "data/$set" --held-out "data/$set-test" \
                    --seed "$seed" --log-every 50 --$setting
            done
        done
    done
    severities demo 1 runs/preset-demo-*
    severities leaf 1 runs/preset-leaf-*
}

memorise() { # three leaves of each severity for long: dm goes on falling, held_out turns
    leaves
    pick data/leaf 3 data/leaf-15 64 each
    train leaf-15 --data data/leaf-15 --held-out data/leaf-test --size 16 --attention 4 --decay 0 \
        --log-every 250 --steps $((15 * steps / 4))
}

for part in "${@:?name parts, as in the first lines}"; do
    "$part"
done
