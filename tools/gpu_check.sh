#!/usr/bin/env bash
# Builds, proves and times the kernels on a machine with a GPU and no registries, within 9 minutes; each
# part says how long it took, and one that is cut short leaves its file. Parts can be named, to go on
# where a call ended: tools/gpu_check.sh bench results
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

# Memory, races and uninitialized reads of our own kernels; nothing to say where the tool cannot run.
sanitize() {
  command -v compute-sanitizer >/dev/null || { echo "no compute-sanitizer here"; return 0; }
  for tool in memcheck racecheck; do
    compute-sanitizer --tool "$tool" --error-exitcode 9 --kernel-regex kns=hal_cuda \
      "$PY" -m pytest -q -x -p no:cacheprovider tests/hal/test_parity.py \
      -k "cuda. and (qgemm or qdq_step or quantize_act)" || return
  done
}

# Whole runs: the files are proven by their format's reader, as always.
tune() {
  local some="--nsamples 32 --seqlen 512" recipe
  for recipe in rtn "autoround $some" "signround $some --iters 50"; do
    "$PY" -m autoround quantize benchmarks/models/pgdoc -o "$OUT/pgdoc" --recipe $recipe || return
    rm -rf "$OUT/pgdoc"
  done
}

# What to commit: docs/results/<device>.json and the table beside it.
results() {
  "$PY" - <<'EOF'
import json, os, pathlib, re, shutil
out = pathlib.Path(os.environ["OUT"])
name = re.sub(r"\W+", "-", json.loads((out / "gpu.json").read_text())["device"].lower())
shutil.copy(out / "gpu.json", out / f"{name}.json")
shutil.copy(out / "bench.log", out / f"{name}.txt")
print(f"commit {out}/{name}.json and {name}.txt as docs/results/")
EOF
}

only="$*"
export -f build sanitize tune results
export PY OUT
part build 150 bash -c build
part parity 100 "$PY" -m pytest -q -x -p no:cacheprovider tests/hal/test_parity.py -k "cuda or xpu"
part tune 60 bash -c tune
part bench 150 "$PY" -m benchmarks gpu --json "$OUT/gpu.json"
part results 10 bash -c results
part sanitize 70 bash -c sanitize
exit $failed
