#!/usr/bin/env bash
# Fresh machine -> environment, mini CoinIt, stage 1, stage 2, evaluation, runs/quickstart/report.html.
# Training starts from the small files of encoder and tokenizer, as the real model starts from EVA-CLIP and InstructBLIP.
# The report has the falling losses, and each score before training, after it, and of the shipped model, assets/mini.
# `bash tools/quickstart.sh ckpt=assets/mini` goes on from the shipped model instead. Further arguments are key=value
# overrides for both training stages: `bash tools/quickstart.sh trainer.max_steps=50`.
set -euo pipefail
cd "$(dirname "$0")/.."
start=$SECONDS
source tools/environment.sh

run=runs/quickstart from="" words=()
for word in "$@"; do
  case $word in ckpt=*) from=$word ;; *) words+=("$word") ;; esac
done
# Two processes of one thread learn faster on two cores than one of two threads; a GPU takes their batches one by one.
ranks=(trainer.accelerator=cpu trainer.devices=2 strategy=ddp data.workers=0) cores=(trainer.accelerator=cpu trainer.devices=2)
if command -v nvidia-smi >/dev/null; then
  ranks=(trainer.accumulate_grad_batches=2) cores=()
else
  export OMP_NUM_THREADS=1
fi
# A few tasks, so that minutes are enough; a run that goes on learns at a lower rate than one that starts.
one=(data.batch_size=16 trainer.max_steps=800 "data.weights={vqa: .8, pope: 1.4, rec: 1.6, res: 2, gres: .6, interactive: .5}")
two=(data.batch_size=12 trainer.max_steps=150 train.lr=5e-4 "data.weights={attcoseg: 1.5, nlvr2: .4, res: .8, rec: .4, pope: .3, vqa: .2}")
if [ -n "$from" ]; then
  one=("$from" data.batch_size=16 train.lr=2e-4 trainer.max_steps=300) two=(data.batch_size=16 train.lr=2e-4 trainer.max_steps=300)
fi

stage() { echo "== $1 ($((SECONDS - start)) s so far)"; }
stage "1/5 mini CoinIt"
python tools/build_coinit.py mini --out data/mini
stage "2/5 scores before training and of assets/mini, 5 and 50 samples a task"
nothing=(train.lr=0 train.tokenizer_lr=0 trainer.max_steps=1) # one step at rate 0 writes the weights as they start
python train.py stage=1 "${one[@]}" "${ranks[@]}" "${words[@]}" "${nothing[@]}" run_dir=$run/before >/dev/null
python eval.py ckpt=$run/before run_dir=$run/before/eval decode.limit=5 "${cores[@]}"
python eval.py ckpt=assets/mini run_dir=$run/shipped decode.limit=50 "${cores[@]}"
stage "3/5 stage 1: single-image data"
python train.py stage=1 run_dir=$run/stage1 "${one[@]}" "${ranks[@]}" "${words[@]}"
stage "4/5 stage 2: multi-image data"
python train.py stage=2 ckpt=$run/stage1 run_dir=$run/stage2 "${two[@]}" "${ranks[@]}" "${words[@]}"
stage "5/5 evaluation on the mini test split"
python eval.py ckpt=$run/stage2 run_dir=$run decode.limit=50 "${cores[@]}" \
  "compare={before training: $run/before/eval/scores.json, assets/mini: $run/shipped/scores.json}"
echo "quickstart took $((SECONDS - start)) s; open $run/report.html"
