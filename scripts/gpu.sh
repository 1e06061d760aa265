#!/usr/bin/env bash
# What a machine with a GPU tells in ten minutes: the tests that need CUDA, the benchmark of training loops at 1.7 B
# parameters, and rows of Table 1 on SmolLM2-135M, the most decisive first. The next call goes on with the rows.
#
#   scripts/gpu.sh [KEY=VALUE]...    with settings of the rows, such as paths.results=results
#
# Without a network, prepare the data and the backbone before, in the same cache:
#   mode data prepare experiment=table1_smollm2
#
# Variables: MINUTES of everything (9), TESTS to run, BENCH settings of the benchmark and ROUNDS of it, ROWS in order,
# EXPERIMENT of the rows, PYTHON. An empty TESTS, BENCH or ROWS leaves that part out, and an empty EXPERIMENT takes the
# table's own backbone.
set -euo pipefail
cd "$(dirname "$0")/.."

MINUTES=${MINUTES-9}
PYTHON=${PYTHON-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
EXPERIMENT=${EXPERIMENT-table1_smollm2}
TESTS=${TESTS-tests/modular/test_branches.py tests/modular/test_sparse.py}
BENCH=${BENCH-backbone=llama-1.7b train.sequence_length=1024 train.batch_size=4}
ROUNDS=${ROUNDS-3}
ROWS=${ROWS-backbone sft btm-data mode-1x-anchored sft-posterior mode-2x-data lora-all ewc}
END=$((SECONDS + 60 * MINUTES))
export OMP_WAIT_POLICY=PASSIVE

step() { printf '\n== %s (%d s left)\n' "$1" $((END - SECONDS)); }
left() { echo $(($1 < END - SECONDS ? $1 : END - SECONDS))s; }

failed=0
if [ -n "$TESTS" ]; then
  step "tests"
  # shellcheck disable=SC2086  # files are words
  timeout "$(left 150)" "$PYTHON" -m pytest -q $TESTS || failed=1
fi

if [ -n "$BENCH" ]; then
  step "training loops"
  # shellcheck disable=SC2086  # settings are words
  timeout "$(left 180)" "$PYTHON" -m cli bench loops --rounds "$ROUNDS" $BENCH "$@" || failed=1
fi

if [ -n "$ROWS" ] && [ $((END - SECONDS)) -gt 30 ]; then
  step "rows of Table 1"
  # shellcheck disable=SC2046,SC2086
  "$PYTHON" -m cli reproduce table1 ${EXPERIMENT:+experiment=$EXPERIMENT} $(printf -- '--row %s ' $ROWS) \
    --within "$(left 540)" "$@" || failed=1
fi
step "done"
exit $failed
