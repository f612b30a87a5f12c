# Two commands: `make demo` trains a small model and ships it; `make test` runs all that CI runs.
# Each brings what it needs: a virtual environment, the locked packages, llama.cpp's converter, the base model.
PYTHON ?= python3
VENV   := .venv
BIN    := $(CURDIR)/$(VENV)/bin
READY  := $(VENV)/.ready
DEMO   := demo
LOCK   := uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-annotate
# Threads that wait for each other soon go to sleep. One run each of 10 to 16 steps, on two quiet cores and beside a program that
# takes one: sleeping at once 185 and 131 tokens/s, after 1000 turns 209 and 115, after 100000 turns 223 and 18.
export GOMP_SPINCOUNT ?= 1000
# Two processes of one thread each: a test seldom has work for two threads. A file's tests stay in one process, as its fixtures do.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

.PHONY: demo families test check unit e2e lock clean

demo: $(READY)
	@$(BIN)/ftkit setup converter smollm2
	@test -f $(DEMO)/recipe.yaml || $(BIN)/ftkit init $(DEMO) --task classify
	@$(BIN)/ftkit build $(DEMO)
	@$(BIN)/ftkit status $(DEMO)/runs/recipe

test: check unit e2e

check: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

unit: $(READY)
	@$(BIN)/ftkit setup converter smollm2
	$(BIN)/python tests/llama_cpp.py
	$(PYTEST) -m "not slow and not timing and not e2e and not ollama"

# The first test says `make demo`, on one thread beside the other tests: a second thread makes that training a third faster at most.
# Ollama's servers are compiled once (Go, C++) and kept outside the tree.
e2e: $(READY)
	@$(BIN)/ftkit setup converter llama.cpp smollm2
	$(BIN)/python tests/llama_cpp.py
	$(BIN)/python tests/servers.py
	$(PYTEST) --no-loadscope-reorder -m "slow or e2e or ollama" --durations=12
	$(BIN)/python -m pytest -m timing

families: $(READY)
	@$(BIN)/ftkit setup converter llama.cpp
	$(BIN)/python tests/llama_cpp.py
	$(BIN)/python tests/architectures.py

$(READY): requirements.lock pyproject.toml
	@echo "setting up $(VENV): about 5 GB with torch, 1 to 5 minutes" >&2
	@if command -v uv >/dev/null 2>&1; then \
	  uv venv --quiet --allow-existing --python $(PYTHON) $(VENV) && \
	  uv pip install --quiet --python $(BIN)/python --require-hashes -r requirements.lock && \
	  uv pip install --quiet --python $(BIN)/python --no-deps --no-build-isolation --editable . ; \
	else \
	  $(PYTHON) -m venv $(VENV) && \
	  $(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements.lock && \
	  $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable . ; \
	fi
	@touch $(READY)

lock:
	UV_CUSTOM_COMPILE_COMMAND="make lock" $(LOCK) --extra test pyproject.toml -o requirements.lock
	UV_CUSTOM_COMPILE_COMMAND="make lock" $(LOCK) --group unpacking -o ftkit/machine/unpacking.txt
	UV_CUSTOM_COMPILE_COMMAND="make lock" $(LOCK) --group compiling -o ftkit/machine/compiling.txt

clean:
	rm -rf $(VENV) $(DEMO) .demo.lock dist build
