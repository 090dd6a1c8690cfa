#!/usr/bin/env bash
# Everything of the real model on one GPU, in processes side by side: `bash evals/real/measure.sh MODEL_FOLDER OUT`.
# Some five minutes on an H200, and those of `speed`. Wants kvpress, optimum-quanto and hqq:
# `pip install 'redknot-hf[quantised]'`, and `pip install --no-deps kvpress cachetools fire termcolor datasets`.
set -eu
MODEL=$1 OUT=$2
RUN="python3 -m evals.real"
mkdir -p "$OUT"
$RUN profile drift --model "$MODEL" --out "$OUT/7168"  # alone, for its time
$RUN profile fisher mass "drift at 2K" "fisher 10" --model "$MODEL" --out "$OUT/7168" &
for budget in 0.1 0.15 0.2; do
    $RUN profile "loss $budget" --model "$MODEL" --out "$OUT/7168" &
done
for length in 2048 4096; do
    $RUN profile drift fisher mass --length $length --model "$MODEL" --out "$OUT/$length" &
done
wait
$RUN speed --peers --model "$MODEL" --profiles "$OUT/7168" --out "$OUT/speed.jsonl"  # alone, for its times
for part in 0 1 2 3 4; do
    $RUN frontier --peers --model "$MODEL" --profiles "$OUT/7168" --first $((8 * part)) --count 8 --out "$OUT/7168-$part" &
done
wait
for length in 2048 4096; do
    $RUN frontier --length $length --model "$MODEL" --profiles "$OUT/$length" --out "$OUT/$length-0" &
done
python3 -m evals bench budgets --out "$OUT/budgets.jsonl" &
wait
for length in 7168 4096 2048; do
    $RUN summarize "$OUT"/$length-*/items.jsonl --out "$OUT/frontier_$length.jsonl" --figure "$OUT/frontier_$length.png"
done
