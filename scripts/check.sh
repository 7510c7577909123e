#!/usr/bin/env bash
# Everything CI runs, in order.
#
#   scripts/check.sh [STEP ...]
#
# Steps: env format lint build types wheel guard model floor runtimes tests. Without arguments all run;
# a failing step does not stop the others (only `env` does), and the exit code is 1 when any failed.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export OMP_NUM_THREADS=1
export PIP_DISABLE_PIP_VERSION_CHECK=1
# without Triton the tests of its kernels would be skipped, and a green check prove less than it says
export ADACONVERT_REQUIRE_TRITON=1

root=$PWD
work=$root/.work
python=$root/.venv/bin/python
model=$root/.models/SmolLM2-135M-Instruct
# nproc would take OMP_NUM_THREADS for the number of cores
workers=$(env -u OMP_NUM_THREADS nproc)

step_env() { bash scripts/env.sh .venv; }

step_format() { "$python" -m ruff format --check .; }

step_lint() { "$python" -m ruff check .; }

# the wheel is built from what git would hand over, in a folder where no earlier build can leak into it
step_build() {
    rm -rf "$work/source" "$work/dist" && mkdir -p "$work/source" "$work/dist" &&
        git ls-files -z --cached --others --exclude-standard |
        tar --null --files-from=- --ignore-failed-read --create 2>/dev/null |
            tar --extract --directory "$work/source" &&
        "$python" -m pip wheel --quiet --no-deps --no-build-isolation \
            --wheel-dir "$work/dist" "$work/source" &&
        ls "$work/dist"
}

# mypy cannot see an editable install, so it reads the wheel, unpacked where only mypy looks
step_types() {
    rm -rf "$work/unpacked" &&
        "$python" -m pip install --quiet --no-deps --target "$work/unpacked" "$work"/dist/*.whl &&
        (cd "$work" && MYPYPATH=$work/unpacked "$python" -m mypy \
            --config-file "$root/pyproject.toml" --cache-dir "$work/mypy" -p adaconvert)
}

# help must work with click alone, from another folder
step_wheel() {
    rm -rf "$work/smoke" && "$python" -m venv "$work/smoke" &&
        "$work/smoke/bin/python" -m pip install --quiet -c constraints.txt click &&
        "$work/smoke/bin/python" -m pip install --quiet --no-deps "$work"/dist/*.whl &&
        (
            cd "$work/dist" &&
                "$work/smoke/bin/adaconvert" --help &&
                "$work/smoke/bin/adaconvert" upcycle --help >/dev/null &&
                "$work/smoke/bin/python" -m adaconvert --version
        )
}

guards=(tests/packaging tests/test_imports.py)
step_guard() { "$python" -m pytest -n "$workers" "${guards[@]}"; }

step_model() {
    "$python" scripts/smollm2.py "$model" && return
    # a green check without the real model would prove less than it says
    [ -n "${ADACONVERT_OFFLINE:-}" ] || return 1
    echo 'check.sh: ADACONVERT_OFFLINE is set; the tests of the real model will be skipped' >&2
}

# the oldest transformers and Triton the package declares
step_floor() {
    bash scripts/env.sh .venv-floor --transformers 5.17.0 --triton 3.6.0 &&
        .venv-floor/bin/python -m pytest -n "$workers" -m smoke
}

step_runtimes() {
    if [ -e scripts/runtime_matrix.sh ]; then
        # one case per kind of host file; the full matrix takes long
        bash scripts/runtime_matrix.sh --transformers-only \
            --cases "smollm2 llama mistral-window qwen2 qwen3 granite olmo2 gemma"
    else
        echo 'check.sh: no scripts/runtime_matrix.sh'
    fi
}

step_tests() {
    local require=
    [ -e "$model/config.json" ] && require=1
    ADACONVERT_REQUIRE_REAL=$require "$python" -m pytest -n "$workers" --durations 15 \
        "${guards[@]/#/--ignore=}"
}

steps=("$@")
[ $# -gt 0 ] || steps=(env format lint build types wheel guard model floor runtimes tests)
failed=()
for step in "${steps[@]}"; do
    declare -F "step_$step" >/dev/null || { echo "check.sh: no step '$step'" >&2; exit 2; }
    printf '\n== %s\n' "$step"
    began=$SECONDS
    if "step_$step"; then verdict=ok; else verdict=FAILED; failed+=("$step"); fi
    printf '== %s: %s, %d s\n' "$step" "$verdict" $((SECONDS - began))
    [ "$step$verdict" != envFAILED ] || exit 1
done
if [ ${#failed[@]} -gt 0 ]; then
    echo "check.sh: failed: ${failed[*]}"
    exit 1
fi
echo "check.sh: all steps ok, $SECONDS s"
