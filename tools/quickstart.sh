#!/usr/bin/env bash
# Fresh machine -> environment, mini CoinIt, stage 1, stage 2, evaluation, runs/quickstart/report.html.
# Stage 1 goes on from assets/mini, a longer run on both kinds of data (README, "The two stages"), to stay within
# minutes; a run that goes on learns at a lower rate than one that starts.
# Extra arguments are key=value overrides for both training stages: `bash tools/quickstart.sh trainer.max_steps=50`.
set -euo pipefail
cd "$(dirname "$0")/.."
start=$SECONDS
source tools/environment.sh

run=runs/quickstart
echo "== 1/4 mini CoinIt"
python tools/build_coinit.py mini --out data/mini
echo "== 2/4 stage 1: single-image data ($((SECONDS - start)) s so far)"
python train.py stage=1 ckpt=assets/mini run_dir=$run/stage1 train.lr=2e-4 trainer.max_steps=300 "$@"
echo "== 3/4 stage 2: multi-image data ($((SECONDS - start)) s so far)"
python train.py stage=2 ckpt=$run/stage1 run_dir=$run/stage2 train.lr=3e-4 "$@"
echo "== 4/4 evaluation on the mini test split ($((SECONDS - start)) s so far)"
python eval.py ckpt=$run/stage2 run_dir=$run
echo "quickstart took $((SECONDS - start)) s; open $run/report.html"
