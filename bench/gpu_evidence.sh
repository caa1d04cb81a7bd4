#!/usr/bin/env bash
# Evidence on a GPU: one command per step, each under eight minutes and without a network.
#
#   bench/gpu_evidence.sh              every step without a result
#   bench/gpu_evidence.sh tests dpo    those steps
#   bench/gpu_evidence.sh list         the steps, and which are done
#
# PY        the Python with torch (default python3)
# RESULTS   where results go (default bench/results/<device>)
# TESTS     files of the step "tests" (default all)
# FILES     how many files at a time, on eight processes with pytest-xdist (default 10 if it is installed, else 1)
# WHEELS    folder of peers' wheels, at most 60 MiB (default .wheels; bench/peers.txt says which); without it they are skipped
#
# A step that is cut off keeps its results so far and continues next time. The script fails if a step failed.
set -uo pipefail
cd "$(dirname "$0")/.."
PY=${PY:-python3}
WHEELS=${WHEELS:-.wheels}
LIMIT=${LIMIT:-470}
export PYTHONUNBUFFERED=1
FUSED_LOSSES_COMMIT=${FUSED_LOSSES_COMMIT:-$(git rev-parse HEAD 2>/dev/null || true)}
[ -n "$FUSED_LOSSES_COMMIT" ] && export FUSED_LOSSES_COMMIT

CLI="$PY -m fused_losses.bench"
HEADS="llama3-8b gemma2-2b qwen3-1.7b" # A, B and C
STEPS=""
for primitive in cross_entropy linear_cross_entropy token_statistics divergence; do STEPS="$STEPS check-$primitive"; done
STEPS="$STEPS tests memcheck racecheck cross_entropy"
for case in linear_cross_entropy token_statistics divergence; do
    for head in $HEADS; do STEPS="$STEPS $case-$head"; done
done
STEPS="$STEPS dpo grpo filter memory report"

# Text output goes to NAME.txt once the step has run to its end (failures are in it, and fail the script).
text() {
    local name=$1 status
    shift
    timeout -k 20 "$LIMIT" "$@" 2>&1 | tee "$RESULTS/$name.partial"
    status=${PIPESTATUS[0]}
    echo "exit status $status" | tee -a "$RESULTS/$name.partial"
    case $status in 124 | 130 | 137) return "$status" ;; esac # cut off
    mv "$RESULTS/$name.partial" "$RESULTS/$name.txt"
    return "$status"
}

# A few files at a time: those that ran to their end are not run again. tests.txt has the outcomes, by the first of the files.
tests() {
    local failed=0 start=$SECONDS file files left name some=1 parallel=()
    "$PY" -c 'import xdist' 2>/dev/null && some=10
    some=${FILES:-$some}
    [ "$some" -eq 1 ] || parallel=(-n 8 --dist loadgroup)
    mkdir -p "$RESULTS/tests"
    # shellcheck disable=SC2086 # words and patterns
    set -- ${TESTS:-tests/test_*.py}
    while [ $# -gt 0 ]; do
        files=("${@:1:some}")
        shift $(($# < some ? $# : some))
        name=tests/$(basename "${files[0]}" .py)
        if [ ! -f "$RESULTS/$name.txt" ]; then
            left=$((LIMIT - SECONDS + start))
            [ "$left" -gt 10 ] || return 124
            LIMIT=$left text "$name" "$PY" -m pytest -q -p no:cacheprovider "${parallel[@]}" "${files[@]}"
            if [ ! -f "$RESULTS/$name.txt" ]; then
                [ "$left" -eq "$LIMIT" ] || return 124        # with all of the time, next time
                mv "$RESULTS/$name.partial" "$RESULTS/$name.txt" # it had all of it: it is too slow, and said so
            fi
        fi
        grep -qE '^exit status (0|5)$' "$RESULTS/$name.txt" || failed=1
    done
    for file in "$RESULTS"/tests/*.txt; do
        echo "$(basename "$file" .txt): $(tail -n 2 "$file" | tr '\n' ' ')"
    done | tee "$RESULTS/tests.txt"
    return $failed
}

bench() {
    local name=$1
    shift
    timeout -k 20 "$LIMIT" $CLI bench "$@" --device cuda --resume --json "$RESULTS/$name.json"
}

sanitize() {
    command -v compute-sanitizer >/dev/null || { echo "$1: compute-sanitizer is not installed"; return 1; }
    # Without PyTorch's caching allocator every tensor has bounds of its own.
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 text "$1" compute-sanitizer --tool "$1" --error-exitcode 9 \
        $CLI check --backend triton --largest 5000
}

step() {
    case $1 in
        check-*) text "$1" $CLI check --primitive "${1#check-}" ;;
        tests) tests ;;
        memcheck | racecheck) sanitize "$1" ;;
        cross_entropy) bench "$1" cross_entropy --shape llama2-7b,llama3-8b,gemma2-2b,qwen3-1.7b --seconds 5 ;;
        dpo | grpo) bench "$1" "$1" --shape llama3-8b --mode full --inputs peaked ;;
        filter) bench "$1" linear_cross_entropy --inputs zipf --mode full --seconds 5 ;;
        memory) bench "$1" linear_cross_entropy token_statistics --shape llama3-8b --mode memory --inputs peaked \
            --tokens 1024,2048,4096,8192,16384 ;;
        report) $CLI report "$RESULTS" ;;
        *-*) bench "$1" "${1%%-*}" --shape "${1#*-}" --seconds 8 ;;
        *) echo "no step $1; the steps are: $STEPS" >&2; return 2 ;;
    esac
}

finished() {
    [ -f "$RESULTS/$1.txt" ] || grep -q '"complete": true' "$RESULTS/$1.json" 2>/dev/null
}

if [ -z "${RESULTS:-}" ]; then
    DEVICE=$("$PY" -c 'from fused_losses.bench.environment import folder_name; print(folder_name("cuda"))' 2>/dev/null) || {
        echo "no GPU that $PY's PyTorch can use; nothing is measured" >&2
        exit 2
    }
    RESULTS=bench/results/$DEVICE
fi
mkdir -p "$RESULTS"
if [ "${1:-}" = list ]; then
    for name in $STEPS; do finished "$name" && echo "$name: done" || echo "$name: not measured yet"; done
    exit
fi
if [ -d "$WHEELS" ]; then
    [ "$(du -sm "$WHEELS" | cut -f1)" -le 60 ] || { echo "$WHEELS holds more than 60 MiB" >&2; exit 2; }
    SITE=$(mktemp -d)
    "$PY" -m pip install -q --no-index --no-deps --no-compile --target "$SITE" "$WHEELS"/*.whl && export PYTHONPATH="$SITE${PYTHONPATH:+:$PYTHONPATH}"
else
    echo "no folder $WHEELS: peers that are not installed are skipped"
fi

failed=0
for name in ${*:-$STEPS}; do
    if [ $# -eq 0 ] && finished "$name"; then
        echo "$name: done"
        continue
    fi
    echo "== $name"
    step "$name" || { failed=1; echo "$name: FAILED or cut off; run it again to go on" >&2; }
done
exit $failed
