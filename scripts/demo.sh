#!/usr/bin/env bash
# From nothing to a proven Mixture-of-Experts checkpoint of a real model.
#
#   scripts/demo.sh [FOLDER]
#
# Makes the environment, fetches SmolLM2-135M-Instruct, converts it to 8 experts with 2 per token,
# verifies the result and lets both models answer one question through stock transformers. The result
# is left in FOLDER (default .demo/SmolLM2-8x135M).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
dense=.models/SmolLM2-135M-Instruct
moe=${1:-.demo/SmolLM2-8x135M}
question='What is the capital of France, and what is it known for?'

say() { printf '\n== %s (%d s)\n' "$*" "$SECONDS"; }

say environment
bash scripts/env.sh .venv
say model
.venv/bin/python scripts/smollm2.py "$dense"

say convert
mkdir -p "$(dirname "$moe")"
.venv/bin/adaconvert upcycle "$dense" "$moe" --experts 8 --top-k 2 --overwrite
say verify
.venv/bin/adaconvert verify "$dense" "$moe"

say 'greedy answers through stock transformers'
dense_answer=$(.venv/bin/python scripts/greedy.py "$dense" "$question")
echo "$dense_answer"
moe_answer=$(.venv/bin/python scripts/greedy.py "$moe" "$question")
echo "$moe_answer"
# the first line names the class
if [ "$(tail -n +2 <<<"$dense_answer")" = "$(tail -n +2 <<<"$moe_answer")" ]; then
    say "the two answers are the same; the converted model is in $moe"
else
    say 'the two answers differ' >&2
    exit 5
fi
