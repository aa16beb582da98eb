#!/usr/bin/env bash
# The GPU tests and benchmarks (gpu.py), on a machine without a network.
#
#   benchmarks/gpu.sh [WHEELS] [options of gpu.py]
#
# WHEELS is a folder of wheels that the machine lacks, such as pycocotools; by default .whl where there is one.
# They are installed for this run alone; an empty folder brings none. PYTHON names another interpreter than
# python3.
set -euo pipefail
cd "$(dirname "$0")/.."

wheels=.whl
if [[ $# -gt 0 && -d $1 ]]; then
    wheels=$1
    shift
fi
python=${PYTHON:-python3}
site=$(mktemp -d)
trap 'rm -rf "$site"' EXIT
if compgen -G "$wheels/*.whl" >/dev/null; then
    "$python" -m pip install --quiet --no-index --no-deps --no-compile --target "$site" "$wheels"/*.whl
fi
export PYTHONPATH=$PWD:$site${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
"$python" benchmarks/gpu.py "$@"
