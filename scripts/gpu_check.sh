#!/usr/bin/env bash
# All checks of a machine with a GPU, in one call: scripts/gpu_check.sh [build] [test] [sanitize] [bench]   (default: all four)
#
# Needs python3 with torch, pybind11, scikit-build-core, cmake, ninja, pytest and hypothesis, but no network. Logs and results go
# to $OUT (default ./gpu_check_out); the last lines are a table. Exit status 0: every step passed.
#   NSA_CUDA_ARCHITECTURES   default native
#   NSA_PREBUILT             folder of a libnsa_cuda.so built elsewhere with NSA_FOR_WHEEL=ON; only the Python module is built here,
#                            and by `sanitize` the library that racecheck runs
#   PYTEST_ARGS, SANITIZE_ARGS, BENCH_ARGS  passed on; with pytest-xdist "-n 8" and "-n 3" save much time
#   BUILD_LIMIT, TEST_LIMIT, SANITIZE_LIMIT (each tool), BENCH_LIMIT   seconds
set -uo pipefail
cd "$(dirname "$0")/.."

OUT=${OUT:-$PWD/gpu_check_out}
mkdir -p "$OUT"
site=$PWD/build/gpu_check race_site=$PWD/build/gpu_check_race
other_path=${PYTHONPATH:+:$PYTHONPATH}
export PYTHONPATH=$site$other_path PYTHONUNBUFFERED=1
export FORCE_CUDA=1 NSA_CUDA_ARCHITECTURES=${NSA_CUDA_ARCHITECTURES:-native}
export CMAKE_BUILD_PARALLEL_LEVEL=${CMAKE_BUILD_PARALLEL_LEVEL:-$(nproc)}
install=(python3 -m pip install -v --no-build-isolation --no-deps --no-index --target)
summary=()
failed=0

# start NAME LIMIT COMMAND...: output to NAME.log, status and seconds to NAME.status.
start() {
  local name=$1 limit=$2 begin=$SECONDS
  shift 2
  timeout --kill-after=10 "$limit" "$@" >"$OUT/$name.log" 2>&1
  echo "$? $((SECONDS - begin)) $limit" >"$OUT/$name.status"
}

# report NAME: the log's end to the screen, one row of the table with its last line.
report() {
  local name=$1 status seconds limit verdict=passed
  read -r status seconds limit <"$OUT/$name.status"
  printf '\n=== %s\n' "$name"
  tail -n 15 "$OUT/$name.log"
  if ((status == 124 || status == 137)); then
    verdict="ran past $limit s"
  elif ((status)); then
    verdict="failed ($status)"
  fi
  ((status)) && failed=1
  summary+=("$(printf '%-10s %-16s %5d s  %.80s' "$name" "$verdict" "$seconds" "$(tail -n 1 "$OUT/$name.log")")")
  return "$status"
}

run() {
  start "$@"
  report "$1"
}

build() {
  local define=()
  if [[ ${NSA_PREBUILT:-} ]]; then define=(-C "cmake.define.NSA_PREBUILT=$(realpath "$NSA_PREBUILT")"); fi
  rm -rf "$site"
  run build "${BUILD_LIMIT:-1500}" "${install[@]}" "$site" "${define[@]}" . && python3 -m nsa_cuda
}

# The tools side by side: each is bound by one CPU core. racecheck has a build of its own (csrc/device/ptx.cuh).
sanitize() {
  local tool path tools=(memcheck racecheck initcheck synccheck)
  rm -rf "$race_site"
  run race_build "${BUILD_LIMIT:-1500}" "${install[@]}" "$race_site" -C build-dir=build/racecheck \
    -C cmake.define.CMAKE_CUDA_FLAGS=-DNSA_FOR_RACECHECK . || return
  for tool in "${tools[@]}"; do
    path=$site$other_path
    [[ $tool == racecheck ]] && path=$race_site$other_path
    # Without torch's caching allocator, so that a byte past the end of a tensor is past the end of an allocation.
    # shellcheck disable=SC2086
    PYTHONPATH=$path PYTORCH_NO_CUDA_MEMORY_CACHING=1 start "$tool" "${SANITIZE_LIMIT:-900}" \
      compute-sanitizer --tool "$tool" --error-exitcode 99 --target-processes all \
      python3 -m pytest -x -q -m sanitizer -p no:cacheprovider ${SANITIZE_ARGS:-} tests &
  done
  wait
  for tool in "${tools[@]}"; do report "$tool"; done
}

steps=("$@")
if ((${#steps[@]} == 0)); then steps=(build test sanitize bench); fi
gpu=$(nvidia-smi --query-gpu=name,driver_version,compute_cap --format=csv,noheader)
for step in "${steps[@]}"; do
  case $step in
    build)
      if ! build; then
        failed=1
        break
      fi
      ;;
    # shellcheck disable=SC2086
    test) run test "${TEST_LIMIT:-1500}" python3 -m pytest -q -p no:cacheprovider ${PYTEST_ARGS:-} tests ;;
    sanitize) sanitize ;;
    # shellcheck disable=SC2086
    bench) run bench "${BENCH_LIMIT:-900}" python3 -m benchmarks.selected --json "$OUT/selected.json" ${BENCH_ARGS:-} ;;
    *)
      echo "unknown step $step; allowed are build, test, sanitize, bench"
      exit 2
      ;;
  esac
done

echo
printf '%s\n' "$gpu" "${summary[@]}" | tee "$OUT/summary.txt"
exit $failed
