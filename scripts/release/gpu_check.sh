#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Everything that only a GPU can show, in one command, with a report to send back.
#
#   scripts/release/gpu_check.sh [--without-gpu] [STEP ...]
#
# Steps, all by default:
#   machine     GPU, driver, compiler, commit, what the doctor says
#   build       the CUDA library, from these sources
#   results     tests/ops/test_gpu.py, CUDA and Triton: results, determinism, streams, CUDA graphs, torch.compile, tuning
#   searches    scripts/bench/bench_encode.py: the quantizer's searches, timed, and compared with the CPU's of float costs
#   quantize    SmolLM2-135M quantized with --device cuda, timed: the lattice, and trellis codes
#   sanitizer   compute-sanitizer's memcheck and racecheck over a short run of every code
#   bench       scripts/bench/bench_cuda.py: both backends, and Triton tuned, beside cuBLAS fp16 and the memory's bandwidth;
#               rotations in blocks of 128 in one launch and in several; every way to multiply 16 to 2048 rows; vLLM's
#               Humming kernels, if they are installed
#   serve       SmolLM2-135M quantized here, served by vLLM with either backend, compared with the dequantized model; where
#               vLLM is not installed, tokens per second in transformers, a step in a CUDA graph
#
# The report is build/gpu_report.tar.gz; its summary.txt has a line a step. A step that fails does not stop the others; the
# exit status is 1 if one failed. --without-gpu runs what needs no GPU (machine) and lists the rest as skipped.
# Needs `make venv BACKEND=cuda`, or PYTHON=another with torch's CUDA build, pytest, transformers for quantize and serve, and vLLM for serve;
# compute-sanitizer comes with the CUDA toolkit.
set -uo pipefail
cd "$(dirname "$0")/../.."
python=${PYTHON:-.venv/bin/python}
export PATH=$(dirname "$(command -v "$python" || echo .)"):$PATH  # cmake looks there for ninja
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
report=build/gpu_report
steps=()
gpu=yes
for word in "$@"; do
  case "$word" in
    --without-gpu) gpu=no ;;
    machine | build | results | searches | quantize | sanitizer | bench | serve) steps+=("$word") ;;
    *) echo "gpu_check: $word is no step: machine, build, results, searches, quantize, sanitizer, bench, serve" >&2; exit 2 ;;
  esac
done
[ ${#steps[@]} -gt 0 ] || steps=(machine build results searches quantize sanitizer bench serve)
if ! command -v "$python" > /dev/null; then
  echo "gpu_check: $python is not there: run make venv BACKEND=cuda, or set PYTHON" >&2
  exit 2
fi
if [ $gpu = yes ] && ! $python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
  echo "gpu_check: torch sees no GPU: run it where there is one, with make venv BACKEND=cuda, or give --without-gpu" >&2
  exit 2
fi
rm -rf $report
mkdir -p $report

machine() {
  git log -1 --format='commit %H %cI'
  git status --short
  uname -a
  nvidia-smi || echo "no nvidia-smi"
  nvcc --version || echo "no nvcc"
  $python -m quip_vllm.cli doctor
}
build() { $python -m cmake -S kernels --preset release && $python -m cmake --build build/release --target install; }
results() { $python -m pytest -q tests/ops/test_gpu.py --durations 10; }
searches() {
  QUIP_VLLM_CPU_TIER=portable $python scripts/bench/bench_encode.py --device cuda --sequences 4096 --csv $report/searches.csv \
    --formats qtip-hyb-{1,2,3,4} qtip-1mad-{1,2,3,4,5,6,7,8}
}
quantize() {
  $python scripts/demo/packaged_model.py $report/model &&
    $python scripts/bench/bench_encode.py --device cuda --formats --model $report/model --calibration bundle \
      --runs quip_sharp-2 qtip-hyb-2 qtip-1mad-4 --csv $report/quantize.csv
  local status=$?
  rm -rf $report/model
  return $status
}
sanitizer() {
  local status=0
  for tool in memcheck racecheck; do
    compute-sanitizer --tool $tool --error-exitcode 9 $python -m pytest -q -x tests/ops/test_gpu.py \
      -k 'rounds_like_torch and bfloat16 or embedding or one_launch_gives and hyb-2 or many_rows_in and hyb-2 or experts_whatever and hyb-2 or searches' || status=1
  done
  return $status
}
bench() {
  local status=0
  $python scripts/bench/bench_cuda.py --csv $report/cuda_kernels.csv || status=1
  $python scripts/bench/bench_cuda.py --backends cuda --block 128 --rows 1 2 4 8 16 --csv $report/cuda_blocks_apart.csv || status=1
  QUIP_VLLM_ONE_LAUNCH_ROWS=16 $python scripts/bench/bench_cuda.py --backends cuda --block 128 --rows 1 2 4 8 16 \
    --csv $report/cuda_blocks.csv || status=1
  $python scripts/bench/bench_cuda.py --backends cuda --ways --rows 16 32 64 128 256 512 2048 \
    --csv $report/cuda_ways.csv || status=1
  QUIP_VLLM_TRITON_TUNE=1 $python scripts/bench/bench_cuda.py --backends triton --csv $report/triton_tuned.csv || status=1
  if $python -c 'import humming'; then
    $python scripts/bench/bench_cuda.py --humming --rows 1 2 4 8 16 32 64 256 2048 --csv $report/humming.csv || status=1
  fi
  return $status
}
serve() {
  export VLLM_DISABLE_COMPILE_CACHE=1  # it does not know which backend wrote it
  $python scripts/demo/packaged_model.py $report/model &&
    $python -m quip_vllm.cli quantize $report/model $report/quantized --method quip_sharp --bits 2 &&
    if $python -c 'import vllm'; then served; else
      $python scripts/bench/bench_generate.py fp16=$report/model quip_sharp-2=$report/quantized --csv $report/generated.csv
    fi
  local status=$?
  rm -rf $report/model $report/quantized
  return $status
}
served() {
  $python -m quip_vllm.cli verify $report/quantized --dtype bfloat16 --compile --json $report/serving.json &&
    QUIP_VLLM_BACKEND=triton $python -m quip_vllm.cli verify $report/quantized --dtype bfloat16 --compile \
      --json $report/serving_triton.json &&
    $python scripts/bench/bench_serving.py bf16=$report/model quip_sharp-2=$report/quantized --csv $report/serving.csv
}

failed=0
for step in "${steps[@]}"; do
  if [ $gpu = no ] && [ "$step" != machine ]; then
    echo "$step: skipped, no GPU" | tee -a $report/summary.txt
    continue
  fi
  begin=$SECONDS
  if "$step" > "$report/$step.log" 2>&1; then outcome=passed; else outcome=FAILED failed=1; fi
  echo "$step: $outcome in $((SECONDS - begin)) s" | tee -a $report/summary.txt
done
tar -czf build/gpu_report.tar.gz -C build gpu_report
echo "the report is build/gpu_report.tar.gz: please attach it to an issue"
exit $failed
