# make demo | test | lint | format | versions | clean
PYTHON ?= python3
VENV := .venv
# Another index for torch and torchvision, such as PyTorch's own of CPU-only wheels; see the README.
TORCH_INDEX ?=

.PHONY: demo test test-all lint format versions clean

demo: $(VENV)/.ready
	$(VENV)/bin/roadseg run --config configs/town.yaml --name demo

test: $(VENV)/.ready
	$(VENV)/bin/python -m pytest -q

test-all: $(VENV)/.ready
	$(VENV)/bin/python -m pytest -q -m "not gpu"

lint: $(VENV)/.ready
	$(VENV)/bin/ruff check roadseg tests benchmarks
	$(VENV)/bin/ruff format --check roadseg tests benchmarks
	$(VENV)/bin/mypy roadseg

format: $(VENV)/.ready
	$(VENV)/bin/ruff check --fix roadseg tests benchmarks
	$(VENV)/bin/ruff format roadseg tests benchmarks

# After a change of a stage's code, and after deciding whether its VERSION moves: record the new hashes.
versions: $(VENV)/.ready
	$(VENV)/bin/python tests/test_versions.py --record

$(VENV)/.ready: pyproject.toml constraints.txt scripts/install
	@PYTHON="$(PYTHON)" VENV="$(VENV)" TORCH_INDEX="$(TORCH_INDEX)" sh scripts/install

clean:
	rm -rf $(VENV) workspace
