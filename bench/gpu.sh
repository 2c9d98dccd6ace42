#!/usr/bin/env bash
# Check and measure the loss and the training step on one GPU.
#
#     bench/gpu.sh OUT [--stages 1 2 3 4 5] [--seconds N] [--dry-run]
#
# Stage 1 (smoke):   correctness and times of the kernels. The default stage, at most 90 s.
# Stage 2 (race):    comparison with eager, torch.compile and other packages; the device tests;
#                    compute-sanitizer.
# Stage 3 (why):     hardware counters; a small search for launch parameters.
# Stage 4 (trainer): the training step of two networks.
# Stage 5 (suite):   the tests of the trainer, which train on the GPU.
#
# Stages run in order. A part is skipped if too little time remains for it. After every part, OUT
# contains summary.txt, measurements.jsonl, measurements.csv, results.json and logs.tar.gz.
# Requires torch and triton. Uses the files that bench/gpu/prepare.py wrote to .gpu, if there are any.
# Nothing is downloaded. The exit code is 0 if no part failed, else 1.
set -u -o pipefail
cd "$(dirname "$0")/.."

usage() { echo "usage: bench/gpu.sh OUT [--stages 1 2 3 4 5] [--seconds N] [--dry-run]" >&2; exit 2; }
out="" stages="" total="" dry=()
while [ $# -gt 0 ]; do
    case $1 in
        --stages) shift; while [ $# -gt 0 ] && [[ $1 =~ ^[1-5]$ ]]; do stages+=" $1"; shift; done ;;
        --seconds) total=${2:?}; shift 2 ;;
        --dry-run) dry=(--dry-run); shift ;;
        -*) usage ;;
        *) [ -z "$out" ] || usage; out=$1; shift ;;
    esac
done
[ -n "$out" ] || usage
stages=${stages:- 1}
if [ -z "$total" ]; then
    total=0
    [[ $stages == *1* ]] && total=$((total + 90))
    [[ $stages == *2* ]] && total=$((total + 340))
    [[ $stages == *3* ]] && total=$((total + 115))
    [[ $stages == *4* ]] && total=$((total + 200))
    [[ $stages == *5* ]] && total=$((total + 240))
fi

python=${PYTHON:-python3}
mkdir -p "$out"
out=$(cd "$out" && pwd)
scratch=$(mktemp -d)
results=$scratch/results
mkdir -p "$results/logs"
export PYTHONPATH="$scratch/site${PYTHONPATH:+:$PYTHONPATH}"
for folder in tests/training tests tests/kernels bench/gpu bench . kernels; do # tests run commands elsewhere
    PYTHONPATH=$PWD/$folder:$PYTHONPATH
done
export PYTHONUNBUFFERED=1 TRITON_CACHE_DIR=$scratch/triton TORCHINDUCTOR_CACHE_DIR=$scratch/inductor
export TORCHINDUCTOR_COMPILE_THREADS=8
failed=""

# Write the summary of all measurements so far into OUT.
refresh() {
    timeout 20 "$python" bench/gpu/summary.py "$results" > /dev/null || failed+=" summary"
    tar -C "$scratch" -czf "$scratch/logs.tar.gz" results
    cp "$scratch/logs.tar.gz" "$results"/summary.txt "$results"/measurements.jsonl \
        "$results"/measurements.csv "$results"/results.json "$out" 2> /dev/null
}

# Run one part. Arguments: its name, the least seconds that it needs, its time limit, its command. The
# word SECONDS in the command is replaced by the time that the part has after its imports. The output
# is shown immediately.
part() {
    local name=$1 least=$2 limit=$3 left code pid log
    shift 3
    left=$((stage_end < total - 4 ? stage_end - SECONDS : total - 4 - SECONDS))
    ((limit < left)) || limit=$left
    if ((limit < least)); then
        echo "== $name: skipped, $left s left"
        printf '{"stage": "%s", "what": "skipped", "name": "%s", "value": "%s s left", "unit": ""}\n' \
            "${name%% *}" "$name" "$left" >> "$results/measurements.jsonl"
        return
    fi
    echo "== $name: at most $limit s, from second $SECONDS"
    log="$results/logs/${name// /-}.log"
    timeout --kill-after=3 "$limit" "${@/#SECONDS/$((limit - 8))}" > "$log" 2>&1 < /dev/null &
    pid=$!
    tail -n +1 -s 0.2 --pid="$pid" -f "$log"
    wait "$pid"
    code=$?
    if ((code != 0)); then
        echo "== $name: exit code $code"
        failed+=" $name;"
        printf '{"stage": "%s", "what": "failed", "name": "%s", "value": "exit code %s%s", "unit": ""}\n' \
            "${name%% *}" "$name" "$code" "$( ((code == 124 || code == 137)) && echo ", time limit of $limit s")" \
            >> "$results/measurements.jsonl"
    fi
    refresh
}

# Install the compiled kernels and the wheels that bench/gpu/prepare.py made.
wheels=(.gpu/wheels/*.whl)
if [ -e "${wheels[0]}" ]; then
    timeout 20 "$python" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir \
        --target "$scratch/site" "${wheels[@]}" > "$results/logs/pip.log" 2>&1 &
fi
if [[ $stages != *1* ]]; then # stage 1 describes the machine itself
    timeout 30 "$python" bench/gpu/smoke.py "$results" --describe "${dry[@]}" \
        > "$results/logs/machine.log" 2>&1 &
fi
timeout 45 "$python" bench/gpu/prepare.py --install "$TRITON_CACHE_DIR" --processes "$(nproc)" \
    2>&1 | tee "$results/logs/prepare.log"
wait

for stage in $stages; do
    stage_end=$total
    case $stage in
        1)
            ((SECONDS + 86 < total)) && stage_end=$((SECONDS + 86))
            part "1 smoke" 10 84 "$python" bench/gpu/smoke.py "$results" --seconds SECONDS "${dry[@]}"
            ;;
        2)
            stage_end=$((SECONDS + 330))
            part "2 race" 20 150 "$python" bench/gpu/race.py "$results" --seconds SECONDS "${dry[@]}"
            # compute-sanitizer and the device tests run at the same time, because they measure no time.
            part "2 tests" 20 180 bash -c '
                "$1" bench/gpu/sanitize.py "$2" --seconds "$3" "${@:5}" & sanitizer=$!
                "$1" -m pytest -n "$4" -q --tb=short -p report_failures -p no:cacheprovider --noconftest -o addopts= \
                    tests/kernels/test_triton_gpu.py
                code=$?
                wait "$sanitizer" && exit "$code"' \
                tests "$python" "$results" SECONDS $((${#dry[@]} ? 2 : $(nproc))) "${dry[@]}"
            ;;
        3)
            stage_end=$((SECONDS + 110))
            part "3 counters" 12 40 "$python" bench/gpu/counters.py "$results" --seconds SECONDS \
                "${dry[@]}"
            part "3 autotune" 12 70 "$python" bench/autotune.py --classes 10 100 500 \
                --out "$results" --seconds SECONDS "${dry[@]}"
            ;;
        4)
            stage_end=$((SECONDS + 190))
            part "4 trainer" 25 190 "$python" bench/gpu/trainer.py "$results" --seconds SECONDS \
                "${dry[@]}"
            ;;
        5)
            stage_end=$((SECONDS + 230))
            tests=(tests/training tests/evaluation tests/objectives tests/examples tests/test_cli.py
                tests/test_compare.py tests/test_export.py tests/test_update_bn.py)
            [ ${#dry[@]} -eq 0 ] || tests=(tests/training/test_overlap.py)
            OMP_NUM_THREADS=1 part "5 suite" 60 230 "$python" -m pytest \
                -n "$(nproc)" -q --tb=short --timeout 150 -p report_failures -p no:cacheprovider -o addopts= \
                tests/training/test_devices.py "${tests[@]}"
            ;;
    esac
done

refresh
cat "$out/summary.txt"
echo "== ${SECONDS} s; failed:${failed:- nothing}; in $out: $(ls "$out" | tr '\n' ' ')"
rm -rf "$scratch"
[ -z "$failed" ]
