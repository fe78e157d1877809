#!/usr/bin/env bash
# From the weights in a package to a distilled student and its evaluation. Needs what README.md installs. Goes on where it
# was interrupted.
set -euo pipefail
cd "$(dirname "$0")/../.."
models=examples/smollm2/models config=examples/smollm2/smollm2.yaml
problems='reasoning_gym:chain_sum?min_terms=2&max_terms=3&min_digits=2&max_digits=2&seed=3&test_size=128'

python examples/smollm2/prepare.py
tsdkd plan --config "$config" "$@"
tsdkd train --config "$config" --resume true "$@"
tsdkd report runs/smollm2
tsdkd eval before="$models/student" after=runs/smollm2 teacher="$models/teacher" --benchmarks "$problems" \
    --samples 2 --max_new_tokens 48 --batch_size 64 --output_dir runs/smollm2_eval
