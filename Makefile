# Everything a newcomer needs: `make demo`, then `make test`. Each target installs what it needs.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
RUN ?=

.PHONY: demo test test-all test-gpu lint docs notebooks ci clean

# Plain torch and torchvision from one index match each other and carry CUDA.
$(BIN)/.demo: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -e .
	touch $@

$(BIN)/.test: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[test]'
	touch $(BIN)/.demo $@

demo: $(BIN)/.demo
	$(BIN)/pyro-vae train $(if $(RUN),--output $(RUN))

test: $(BIN)/.test
	$(BIN)/python -m pytest -n auto --dist loadfile

# The slow part too.
test-all: $(BIN)/.test
	$(BIN)/python -m pytest -n auto --dist loadfile -m "not gpu"

# What needs a CUDA device.
test-gpu: $(BIN)/.test
	$(BIN)/python -m pytest -m gpu

lint: $(BIN)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The documentation, every warning an error: open docs/build/index.html.
docs: $(BIN)/.test
	$(BIN)/python -m sphinx -W --keep-going -q docs docs/build

# Execute the notebooks and keep their outputs; NOTEBOOKS="notebooks/01_first_vae.ipynb" for some.
notebooks: $(BIN)/.test
	$(BIN)/python notebooks/execute.py $(NOTEBOOKS)

clean:
	rm -rf $(VENV) build docs/build docs/reference docs/notebooks *.egg-info .mypy_cache .pytest_cache .ruff_cache
