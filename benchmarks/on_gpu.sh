#!/usr/bin/env bash
# shellcheck disable=SC2329  # functions are called by `bash -c` in a step, or by a trap
#
# One slot of ten minutes on a machine with a GPU and without a network: facts, install, benchmarks, tests.
#
#     benchmarks/on_gpu.sh OUT                          # everything that fits, the most valuable first
#     benchmarks/on_gpu.sh OUT --only kl_xl tests       # these steps, e.g. in a second slot
#     benchmarks/on_gpu.sh OUT --device cpu --quick     # without a GPU: that each step starts and stops
#     benchmarks/on_gpu.sh OUT --no-install             # what is installed is measured
#
# OUT/NN_name.log holds a step's output, OUT/*.json what it measured, OUT/steps.tsv exit codes and seconds,
# OUT/summary.txt all of that in short. A step that fails or hangs never stops the next. The image is not
# changed: the package goes to a folder of its own (MINITRON_ON_GPU_SITE, default: a temporary one). Needs
# torch, triton, numpy, pytest; uses pytest-xdist, nvcc, compute-sanitizer and ncu where there are any.
#
#     MINITRON_ON_GPU_SECONDS   of all steps together (570)
#     MINITRON_ON_GPU_LIMIT     of any one step, where less than its own (none)
#     MINITRON_ON_GPU_GRACE     from asking a step to end until it is killed (5)
#     MINITRON_ON_GPU_DEVICE    cuda or cpu, as --device
#     PYTHON                    the interpreter (python3)
set -uo pipefail

usage() {
  sed -n '4,/^set/p' "$0" | sed '$d; s/^# \{0,1\}//'
  exit "$1"
}

device=${MINITRON_ON_GPU_DEVICE:-cuda} quick='' install=1 only=() out=''
while (($#)); do
  case $1 in
    --device)
      device=${2:-}
      shift
      ;;
    --quick) quick=1 ;;
    --no-install) install='' ;;
    --only)
      while (($# > 1)) && [[ $2 != -* ]]; do
        only+=("$2")
        shift
      done
      ;;
    -h | --help) usage 0 ;;
    -*) usage 2 >&2 ;;
    *)
      [[ -z $out ]] || usage 2 >&2
      out=$1
      ;;
  esac
  shift
done
[[ -n $out ]] || usage 2 >&2
if [[ $device != cuda && $device != cpu ]]; then
  echo "--device: cuda or cpu, got $device" >&2
  exit 2
fi

python=${PYTHON:-python3}
# a torch that cannot be imported is a matter of the steps, whose logs say why
looks='import torch, sys; sys.exit(0 if torch.cuda.is_available() else 9)'
if [[ $device == cuda ]]; then
  timeout 60 "$python" -c "$looks" > /dev/null 2>&1
  if [[ $? == 9 ]]; then
    echo 'on_gpu.sh: torch sees no GPU here; --device cpu --quick tries each step on the CPU' >&2
    exit 1
  fi
fi

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
mkdir -p "$out" || exit 1
out=$(cd "$out" && pwd)
total=${MINITRON_ON_GPU_SECONDS:-570}
most=${MINITRON_ON_GPU_LIMIT:-$total}
reserve=5 # seconds kept for the summary
grace=${MINITRON_ON_GPU_GRACE:-5}
steps=$out/steps.tsv
number=0 running='' current='' ended=''
cleanup=()
if [[ -z ${MINITRON_ON_GPU_SITE:-} ]]; then
  MINITRON_ON_GPU_SITE=$(mktemp -d)
  cleanup+=("$MINITRON_ON_GPU_SITE")
fi
site=$MINITRON_ON_GPU_SITE
scratch=$(mktemp -d)
cleanup+=("$scratch")
[[ -n $install ]] && export PYTHONPATH=$site${PYTHONPATH:+:$PYTHONPATH}
export PYTHONUNBUFFERED=1 # what a step has printed is there when it is killed
export root site device python

# --- steps --------------------------------------------------------------------------------------------------

printf 'step\tname\texit\tseconds\tlimit\tnote\n' > "$steps"

record() { printf '%s\t%s\t%s\t%s\t%s\t%s\n' "$@" >> "$steps"; }

wanted() {
  if [[ $1 == install* ]]; then
    [[ -n $install ]]
    return
  fi
  [[ ${#only[@]} == 0 ]] && return 0
  local name
  for name in "${only[@]}"; do [[ $name == "$1" ]] && return 0; done
  return 1
}

# step NAME SECONDS COMMAND...: runs it in `folder`, bounded in time, its output in a file of its own
folder=$root
step() {
  local name=$1 limit=$2 left begin code note nn log
  shift 2
  number=$((number + 1))
  wanted "$name" || return 0
  nn=$(printf '%02d' "$number") log=$out/$(printf '%02d' "$number")_$name.log
  left=$((total - SECONDS - reserve - grace))
  ((limit > most)) && limit=$most
  ((limit > left)) && limit=$left
  if ((limit < 1)); then
    record "$nn" "$name" - 0 0 'not started: no time left'
    echo "$nn $name: no time left"
    return 0
  fi
  begin=$SECONDS
  printf '%s (at %d s, at most %d s)\n' "$nn $name" "$begin" "$limit"
  { printf '$'; printf ' %q' "$@"; echo; } > "$log"
  # in the background, so that a signal to this script is seen at once
  current="$nn	$name"
  (cd "$folder" && exec timeout --kill-after="$grace" "$limit" "$@") >> "$log" 2>&1 < /dev/null &
  running=$!
  wait "$running"
  code=$?
  kill -KILL -- "-$running" 2> /dev/null # timeout's group: children that the step has left behind
  running=''
  case $code in
    0) note=ok ;;
    124 | 137) note="stopped after $limit s" ;;
    125 | 126 | 127) note='could not be started' ;;
    77) note=$(tail -n 1 "$log") ;; # says why it was left out
    *) note=failed ;;
  esac
  record "$nn" "$name" "$code" $((SECONDS - begin)) "$limit" "$note"
  echo "   $note (exit $code, $((SECONDS - begin)) s)"
}

absent() { bash -c "echo 'left out: $1'; exit 77"; }
export -f absent

# --- the end, also after a signal ---------------------------------------------------------------------------

finish() {
  [[ -n $ended ]] && return
  ended=1
  if [[ -n $running ]]; then
    kill -KILL -- "-$running" 2> /dev/null
    record "${current%	*}" "${current#*	}" - - - 'this script was stopped'
  fi
  {
    echo "benchmarks/on_gpu.sh, device $device, $SECONDS s"
    echo
    column -t -s $'\t' "$steps" 2> /dev/null || cat "$steps"
    local log
    for log in "$out"/[0-9][0-9]_*.log; do
      [[ -e $log ]] || continue
      printf '\n==== %s\n' "${log##*/}"
      tail -n 45 "$log" | cut -c -220
    done
  } > "$out/summary.txt"
  column -t -s $'\t' "$steps" 2> /dev/null || cat "$steps"
  rm -rf "${cleanup[@]}"
}
trap finish EXIT
trap 'exit 143' TERM
trap 'exit 130' INT

# --- what the steps do --------------------------------------------------------------------------------------

facts() {
  date -u
  nvidia-smi || echo 'no nvidia-smi'
  nvidia-smi --query-gpu=name,driver_version,clocks.sm,clocks.max.sm,clocks.mem,power.limit,ecc.mode.current \
    --format=csv 2> /dev/null
  nvidia-smi topo -m 2> /dev/null
  for tool in nvcc ninja compute-sanitizer ncu c++ "$python"; do
    printf '%s: %s\n' "$tool" "$(command -v "$tool" || echo none)"
  done
  nvcc --version 2> /dev/null | tail -n 2
  nproc
  grep -m 1 'model name' /proc/cpuinfo
  free -g | head -n 2
  git -C "$root" log -1 --oneline 2> /dev/null
  "$python" - << 'PY'
import importlib.metadata as m, sys
print("python", sys.version)
wanted = """torch triton numpy pytest pytest-xdist safetensors transformers setuptools ninja liger-kernel
quack-kernels nvidia-cutlass-dsl trl torchtune hypothesis""".split()
for name in wanted:
    try:
        print(name, m.version(name))
    except m.PackageNotFoundError:
        print(name, "-")
import torch
print("cuda of torch", torch.version.cuda, "GPU", torch.cuda.is_available())
for i in range(torch.cuda.device_count()):
    print(torch.cuda.get_device_properties(i))
PY
}

# Whether the package in $site imports with its extension, and is that of this checkout.
installed() {
  (cd / && "$python" -c '
import sys
import minitron_kernels as mk
from minitron_kernels import _native
print(mk.__file__, "native:", _native.available() or _native.reason())
sys.exit(not (mk.__file__.startswith(sys.argv[1]) and _native.available()))' "$site") || return 1
  if diff -rq "$root/minitron_kernels" "$site/minitron_kernels" | grep '\.py differ$'; then
    echo 'it is not of this checkout'
    return 1
  fi
}

install_package() {
  local pip=("$python" -m pip install --quiet --no-deps --no-index --disable-pip-version-check)
  pip+=(--target "$site")
  local wheel arch known
  if [[ -d $site/minitron_kernels ]] && installed; then return 0; fi
  for wheel in "$root"/minitron_kernels*.whl "$root"/dist/minitron_kernels*.whl; do
    [[ -e $wheel ]] || continue
    echo "wheel: $wheel"
    if "${pip[@]}" --upgrade "$wheel" && installed; then return 0; fi
    echo 'it does not serve here'
    rm -rf "${site:?}"/*
  done
  if [[ $device == cuda ]]; then
    arch=$("$python" -c 'import torch; print("%d%d" % torch.cuda.get_device_capability())' | tail -n 1)
    [[ -n $arch ]] || return 1
    # a compiler older than this GPU: the newest that it knows, whose PTX the driver compiles
    known=$(nvcc --list-gpu-arch 2> /dev/null | tr -dc '0-9\n' | sort -n \
      | awk -v a="$arch" '$1 <= a' | tail -n 1)
    export MINITRON_CUDA_ARCHS=${known:-$arch}
  fi
  echo "build: $device, architecture ${MINITRON_CUDA_ARCHS:-none} of a GPU ${arch:-none}"
  MINITRON_BUILD=$device "${pip[@]}" --upgrade --no-build-isolation "$root" && installed
}

# Where nothing could be built, or not in time: Triton's kernels need no compiler.
install_python() {
  if [[ -d $site/minitron_kernels ]]; then
    echo 'left out: something is installed'
    return 77
  fi
  MINITRON_BUILD=python "$python" -m pip install --quiet --no-deps --no-index --disable-pip-version-check \
    --target "$site" --no-build-isolation "$root"
}

# Files that hold tests of the GPU: others may need packages that are not here.
gpu_tests() {
  local files
  mapfile -t files < <(cd "$root" && grep -rl --include='test_*.py' 'mark\.gpu' tests)
  local options=(-q -rfE -m "gpu and ($1)" --continue-on-collection-errors -p no:cacheprovider --durations=15)
  shift
  if [[ $device == cpu ]]; then
    options+=(--collect-only)
  elif "$python" -c 'import xdist' 2> /dev/null; then options+=("$@"); fi
  trap : TERM # at the step's limit pytest still says what has failed: wait for it
  cd "$root" && "$python" -m pytest "${options[@]}" "${files[@]}"
  local code=$?
  [[ $code == 5 ]] && echo 'no such tests' && return 0 # nothing was collected
  return "$code"
}

sanitize() {
  command -v compute-sanitizer > /dev/null || absent 'no compute-sanitizer here' || return 77
  local part code=0
  for part in 'native: forward_grad' 'native: grad' 'native: importance, mean'; do
    echo "==== $part"
    compute-sanitizer --error-exitcode 9 \
      "$python" "$root/benchmarks/parts.py" --quick --once --match "$part" || code=1
  done
  return "$code"
}

profile() {
  command -v ncu > /dev/null || absent 'no ncu here' || return 77
  local part code=0
  for part in 'native: forward_grad' 'native: tile_stats' 'native: importance, mean'; do
    echo "==== $part"
    ncu --section SpeedOfLight --section LaunchStats --section Occupancy --section WarpStateStats \
      --kernel-name regex:'kl_|importance' --launch-count 2 \
      "$python" "$root/benchmarks/parts.py" --once --match "$part" || code=1
  done
  return "$code"
}

export -f facts install_package install_python installed gpu_tests sanitize profile

# --- the plan -----------------------------------------------------------------------------------------------

b=$root/benchmarks
shape=(--shape XL) small=(--shape S) quickly=()
if [[ -n $quick ]]; then shape=(--shape XS) small=(--shape XS) quickly=(--quick); fi
first=(native-store naive naive-float) triton=(triton-store triton-recompute) more=(native-recompute)
peers=(native-store compile liger-jsd liger-jsd-cute quack-ce liger-ce torch-ce liger)
checked=(native-store native-recompute triton-store triton-recompute naive naive-float)
if [[ $device == cpu ]]; then
  first=(store naive naive-float) triton=(triton-store) more=(recompute) peers=(liger)
  checked=(store recompute naive naive-float)
fi
kl=("$python" "$b/kl_loss.py" --device "$device" --row-limit 60)
large=("${kl[@]}" "${shape[@]}" --no-errors)
parts=("$python" "$b/parts.py" --device "$device" "${quickly[@]}")
memory=(--device "$device" "${quickly[@]}" --budget 2)
importance=("$python" "$b/importance.py" "${memory[@]}" --only-tables --impl naive compile mean all)
gather=("$python" "$b/gather.py" "${memory[@]}" --impl index-select compile ours)
if [[ -z $quick ]]; then importance+=(--case mlp) gather+=(--case mlp runs); fi
workers=$(nproc)
((workers > 8)) && workers=8

step facts 30 bash -c facts
step install 270 bash -c install_package
step install_python 30 bash -c install_python
folder=$scratch # where no package lies beside: what is installed is found
step self 30 "$python" -m minitron_kernels
# backends apart: results that are wrong end a run before anything is timed
step kl_xl 120 "${large[@]}" --impl "${first[@]}" --budget 3 --json "$out/kl_xl.json"
step parts_kl 70 "${parts[@]}" --only kl --json "$out/parts_kl.json"
step parts_gemm 70 "${parts[@]}" --only gemm --json "$out/parts_gemm.json"
step kl_triton 90 "${large[@]}" --impl "${triton[@]}" --budget 2 --json "$out/kl_triton.json"
step tests 150 bash -c 'gpu_tests "$@"' _ 'not largest and not compiled' -n "$workers"
step parts_memory 50 "${parts[@]}" --only memory --json "$out/parts_memory.json"
step tests_largest 60 bash -c 'gpu_tests "$@"' _ largest
step tests_compiled 90 bash -c 'gpu_tests "$@"' _ compiled -n 4
step kl_more 60 "${large[@]}" --impl "${more[@]}" --budget 2 --json "$out/kl_more.json"
step importance 60 "${importance[@]}" --json "$out/importance.json"
step gather 60 "${gather[@]}" --json "$out/gather.json"
step sanitizer 60 bash -c sanitize
step ncu 60 bash -c profile
step kl_peers 120 "${large[@]}" --impl "${peers[@]}" --budget 2 --json "$out/kl_peers.json"
step kl_errors 90 "${kl[@]}" "${small[@]}" --impl "${checked[@]}" --budget 1 --json "$out/kl_errors.json"
exit 0
