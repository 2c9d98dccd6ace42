#!/usr/bin/env bash
# Everything that needs a GPU, in one go of at most 8 minutes, without network:
#     bench/gpu.sh FOLDER
# The device tests, then the race; their logs, loss_gpu.json and loss_gpu.txt go into FOLDER.
# Needs torch and triton (2.11 and 3.6, or newer); nothing has to be installed or built.
set -u -o pipefail
cd "$(dirname "$0")/.."
out=${1:?usage: bench/gpu.sh FOLDER}
mkdir -p "$out"
export PYTHONPATH="kernels:.${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
python=${PYTHON:-python3}

# Eight at a time: each kind of call compiles for seconds, on the CPU.
timeout 230 "$python" -m pytest -q -n 8 -p no:cacheprovider tests/kernels/test_triton_gpu.py \
    2>&1 | tee "$out/tests.log" | tail -n 15
tests=${PIPESTATUS[0]}
timeout 245 "$python" bench/loss_gpu.py --out "$out" --seconds 200 2>&1 | tee "$out/race.log"
race=${PIPESTATUS[0]}
echo "tests: exit $tests; race: exit $race"
[ "$tests" -eq 0 ] && [ "$race" -eq 0 ]
