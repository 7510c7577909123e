#!/usr/bin/env bash
# Makes a virtual environment that holds adaconvert (editable) and everything its tests need.
#
#   scripts/env.sh [VENV] [--transformers VERSION] [--triton VERSION]
#
# VENV defaults to .venv. It is used as it is when nothing it was made from has changed.
# PYTHON names the interpreter to make it with (default python3; 3.11 or newer).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

venv=.venv
transformers=
triton=
while [ $# -gt 0 ]; do
    case $1 in
        --transformers) transformers=${2:?--transformers needs a version}; shift 2 ;;
        --triton) triton=${2:?--triton needs a version}; shift 2 ;;
        -*) echo "env.sh: unknown option $1" >&2; exit 2 ;;
        *) venv=$1; shift ;;
    esac
done
python=${PYTHON:-python3}
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "env.sh: $python is older than Python 3.11; set PYTHON to a newer one" >&2
    exit 6
}

stamp=$(
    {
        cat pyproject.toml constraints.txt scripts/env.sh
        echo "$PWD $transformers $triton"
        "$python" -VV
    } | sha256sum | cut -d' ' -f1
)
if [ "$(cat "$venv/adaconvert.stamp" 2>/dev/null)" = "$stamp" ]; then
    echo "environment: $venv is up to date"
    exit 0
fi

echo "environment: making $venv"
constraints=$(mktemp)
trap 'rm -f "$constraints"' EXIT
cp constraints.txt "$constraints"
wanted=()
unpin() { sed -i -E "/^($1)==/d" "$constraints"; }
if [ -n "$transformers" ]; then
    # another transformers needs another hub client, and what that one needs in turn
    unpin 'transformers|huggingface.hub|tokenizers|httpx2|httpcore2|truststore'
    wanted+=("transformers==$transformers")
fi
if [ -n "$triton" ]; then
    unpin triton
    wanted+=("triton==$triton")
    # its interpreter fails on loop bounds that are known at run time with numpy 2.4 and newer
    [[ $triton != 3.6.* ]] || { unpin numpy; wanted+=("numpy<2.4"); }
fi
rm -rf "$venv"
"$python" -m venv "$venv"
install() {
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check -c "$constraints" "$@"
}
# torch alone and first: with it in place, no later requirement can pull the CUDA build
install torch
install setuptools
install --no-build-isolation -e '.[test]' "${wanted[@]}"
"$venv/bin/python" -m pip check --disable-pip-version-check
echo "$stamp" >"$venv/adaconvert.stamp"
