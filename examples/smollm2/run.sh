#!/usr/bin/env bash
# Everything: both models, the plan, the training, the evaluation before and after, the report.
# Flags go to tsdkd train, such as: --use_cpu true
set -euo pipefail
cd "$(dirname "$0")"
[ -f smollm2/student/config.json ] || python prepare.py
tsdkd plan --config smollm2.yaml --gpus 1 --gpu_gib 80
tsdkd train --config smollm2.yaml "$@"
tsdkd eval before=smollm2/student after=runs/smollm2 teacher=smollm2/teacher \
  --benchmarks 'reasoning_gym:gsm_symbolic?seed=2&test_size=200' --samples 4 --max_new_tokens 200 --output_dir runs/smollm2/eval
tsdkd report runs/smollm2
