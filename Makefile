# The two commands of the README: `make run` serves a model, `make test` runs the tests. `make check` reads the code.
# A repeated call does only what its inputs have changed. PYTHON=python3.12 chooses another interpreter.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
MODEL := freehold-pico
PYTEST_ARGS ?= -n 2 --dist worksteal
BUILT_FROM := pyproject.toml requirements.lock CMakeLists.txt $(wildcard native/*)
PIP_INSTALL := $(BIN)/python -m pip install --disable-pip-version-check -c requirements.lock

# Python's build tools would otherwise look for the compiler that built Python.
ifeq ($(origin CXX),default)
export CXX := c++
endif

.PHONY: run test check clean
.DELETE_ON_ERROR:

run: $(VENV)/.installed
	$(if $(filter-out freehold-pico,$(MODEL)),$(BIN)/freehold fetch $(MODEL))
	$(BIN)/freehold serve $(MODEL)

test: $(VENV)/.installed-for-tests
	$(BIN)/python -m pytest $(PYTEST_ARGS)

check: $(VENV)/.installed-for-tests
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) build .mypy_cache .pytest_cache .ruff_cache .hypothesis

# Editable: Python sources are read from src/, the native kernels are built again when they change.
$(VENV)/.installed: $(BUILT_FROM) | $(VENV)/.created
	@echo "Installing Freehold and building its kernels (a few minutes the first time) ..."
	$(PIP_INSTALL) -e .
	@touch $@

$(VENV)/.installed-for-tests: $(BUILT_FROM) | $(VENV)/.created
	@echo "Installing Freehold with its tests' tools (a few minutes the first time) ..."
	$(PIP_INSTALL) -e '.[test,dev,hub]'
	@touch $@ $(VENV)/.installed

$(VENV)/.created:
	@command -v $(PYTHON) >/dev/null || { echo "Freehold needs Python 3.11 to 3.13; '$(PYTHON)' is not there." >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' || { \
	  echo "Freehold needs Python 3.11 to 3.13, this is $$($(PYTHON) --version)." >&2; \
	  echo "hint: make PYTHON=python3.12" >&2; exit 1; }
	@command -v $(firstword $(CXX)) >/dev/null || { \
	  echo "Freehold needs a C++ compiler for its kernels, and there is none." >&2; \
	  echo "hint: on Debian, apt install g++" >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { \
	  rm -rf $(VENV); echo "hint: on Debian, apt install python3-venv" >&2; exit 1; }
	@$(BIN)/python -m pip install --disable-pip-version-check --upgrade -c requirements.lock pip
	@touch $@
