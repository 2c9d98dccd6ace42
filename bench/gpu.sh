#!/usr/bin/env bash
# Everything that wants a GPU, in one go of at most 10 minutes, without network:
#     bench/gpu.sh FOLDER
# The device tests, the race of the losses, the step, training from JPEGs (DALI where it is installed)
# and the errors against float64; a table, JSON and a log of each go into FOLDER as they are made.
# Needs torch and triton (2.11 and 3.6, or newer) and a C compiler for torch.compile; pytest for the
# tests; nothing has to be installed or built. What else is missing leaves out its part, and says so.
# Exit: 0 if the device tests and the race ran to their ends, else 1.
set -u -o pipefail
cd "$(dirname "$0")/.."
out=${1:?usage: bench/gpu.sh FOLDER}
mkdir -p "$out"
out=$(cd "$out" && pwd)
export PYTHONPATH="kernels:.${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
python=${PYTHON:-python3}
begin=$SECONDS

has() { "$python" -c "import importlib.util, sys; sys.exit(not importlib.util.find_spec('$1'))"; }

"$python" - <<'PY' || exit 1
import sys
from bdkd_kernels import available_backends
triton = available_backends()["triton"]
print("triton:", triton)
sys.exit(not triton)
PY

# A part of the whole: its name, the seconds it may take, its command. The time is kept by killing.
part() {
    local name=$1 limit=$2
    shift 2
    echo "== $name, from second $((SECONDS - begin))"
    timeout --kill-after=10 "$limit" "$@" > "$out/$name.log" 2>&1
    local code=$?
    tail -n 40 "$out/$name.log"
    [ $code -eq 124 ] && echo "$name: cut off after $limit s; what it had left is in $out"
    return $code
}

failed=0
if has pytest; then
    # Eight at a time where xdist is: each kind of call compiles for seconds, on the CPU. The suite's
    # own options want plug-ins that may not be here.
    workers=()
    has xdist && workers=(-n 8)
    part tests 165 "$python" -m pytest -q "${workers[@]}" -p no:cacheprovider --noconftest \
        -o addopts= tests/kernels/test_triton_gpu.py || failed=1
else
    echo "== tests: pytest is not installed"
    failed=1
fi
part loss_gpu 150 "$python" bench loss_gpu --out "$out" --seconds 0.8 --budget 125 || failed=1
part dispatch 40 "$python" bench dispatch --out "$out" --seconds 1 --budget 25 || true
part step_gpu 130 "$python" bench step_gpu --out "$out" --seconds 2 --budget 100 || true
part loader 40 "$python" bench loader --out "$out" --seconds 1 --budget 25 || true
part accuracy 40 "$python" bench/accuracy.py --quick --out "$out" || true
if has matplotlib; then
    part pictures 15 "$python" bench plot "$out" || true
fi
echo "== done after $((SECONDS - begin)) s; in $out: $(ls "$out" | tr '\n' ' ')"
exit $failed
