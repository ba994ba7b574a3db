#!/usr/bin/env bash
# Builds, proves and times the kernels on a machine with a GPU and no registries; each part says how
# long it took, and one that is cut short leaves its file. Parts can be named: tools/gpu_check.sh parity
set -uo pipefail
cd "$(dirname "$0")/.."
OUT=${OUT:-$PWD/build/gpu_check}
PY=${PYTHON:-python3}
mkdir -p "$OUT"
export PYTHONPATH=$PWD PYTHONUNBUFFERED=1
failed=0

part() { # name, seconds it may take, command
  local name=$1 limit=$2 start=$SECONDS
  shift 2
  [[ ${only:-} && " $only " != *" $name "* ]] && return
  echo "== $name"
  timeout "$limit" "$@" > >(tee "$OUT/$name.log" | tail -40) 2>&1
  local rc=$?
  echo "== $name: exit $rc, $((SECONDS - start)) s"
  ((rc)) && failed=1
}

# The native module beside the sources: nothing is installed.
build() {
  cmake -S . -B build/gpu -G Ninja -DCMAKE_BUILD_TYPE=Release -DHAL_CUDA=ON \
    -DCMAKE_CUDA_ARCHITECTURES="${CUDA_ARCHITECTURES:-90a-real}" \
    -DPython_EXECUTABLE="$(command -v "$PY")" \
    -Dpybind11_DIR="$("$PY" -m pybind11 --cmakedir)" && cmake --build build/gpu &&
    cp build/gpu/_c*.so hal/ && "$PY" -m hal
}

only="$*"
export -f build
export PY OUT
part build 200 bash -c build
part parity 200 "$PY" -m pytest -q -x -p no:cacheprovider tests/hal/test_parity.py -k "cuda or xpu"
part quick 60 "$PY" -m benchmarks gpu --shapes 4096x4096 --specs s4:g128:f16 --json "$OUT/quick.json"
part bench 240 "$PY" -m benchmarks gpu --json "$OUT/gpu.json"
exit $failed
