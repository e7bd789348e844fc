# make demo | test | test-all | lint | format | docs | versions | clean
PYTHON ?= python3
VENV := .venv
# An index for torch and torchvision, such as PyTorch's own index of CPU-only wheels; see README.md.
TORCH_INDEX ?=

.PHONY: demo test test-all lint format docs versions clean

demo: $(VENV)/.ready
	$(VENV)/bin/roadseg run --config configs/town.yaml --name demo

test: $(VENV)/.ready
	$(VENV)/bin/python -m pytest -q -n auto --dist loadfile

test-all: $(VENV)/.ready
	$(VENV)/bin/python -m pytest -q -m "not gpu"

lint: $(VENV)/.ready
	$(VENV)/bin/ruff check roadseg tests benchmarks
	$(VENV)/bin/ruff format --check roadseg tests benchmarks
	$(VENV)/bin/mypy

format: $(VENV)/.ready
	$(VENV)/bin/ruff check --fix roadseg tests benchmarks
	$(VENV)/bin/ruff format roadseg tests benchmarks

# Bring the list of files in docs/architecture.md up to date.
docs: $(VENV)/.ready
	$(VENV)/bin/python tests/test_architecture_page.py --write

# Record the hashes of the stages' sources, after deciding whether a VERSION moves.
versions: $(VENV)/.ready
	$(VENV)/bin/python tests/test_versions.py --record

$(VENV)/.ready: pyproject.toml constraints.txt scripts/install
	@PYTHON="$(PYTHON)" VENV="$(VENV)" TORCH_INDEX="$(TORCH_INDEX)" sh scripts/install

clean:
	rm -rf $(VENV) workspace
