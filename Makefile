# Each target is the one or two commands that you would type yourself.
PYTHON      ?= python3
# On Linux, PyTorch's default wheels bring CUDA along. TORCH_INDEX names an index without it:
#   make demo TORCH_INDEX=https://download.pytorch.org/whl/cpu
TORCH_INDEX ?=
PIP_FLAGS   ?=
VENV        ?= .venv
BIN         := $(VENV)/bin

.PHONY: help setup demo test docs lab bench tiny readme clean

help:
	@echo "make setup   an environment in $(VENV), versions from constraints.txt"
	@echo "make demo    the main job on the embedded model: train forward and reverse, compare, one figure"
	@echo "make test    all tests"
	@echo "make lab     JupyterLab in nbs/"
	@echo "make docs    the documentation site in _docs/ (needs Quarto)"
	@echo "make bench   the benchmarks of nbs/bench, numbers in runs/bench/"
	@echo "make tiny    build the embedded model again"
	@echo "make readme  README.md from nbs/index.ipynb"
	@echo "make clean   remove what can be made again, but neither $(VENV) nor runs/"

setup: $(VENV)/.stamp

$(VENV)/.stamp: settings.ini setup.py pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(if $(TORCH_INDEX),$(BIN)/python -m pip install $(PIP_FLAGS) -c constraints.txt --no-deps --index-url $(TORCH_INDEX) torch)
	$(BIN)/python -m pip install $(PIP_FLAGS) -c constraints.txt -e ".[dev]"
	@touch $@

demo: setup
	$(BIN)/hmx-feel demo

test: setup
	$(BIN)/python -m pytest -n 2 --dist loadfile

lab: setup
	$(BIN)/jupyter lab nbs

docs: setup
	@command -v quarto >/dev/null || { echo "make docs: Quarto was not found; get it from https://quarto.org/docs/get-started/ and run make docs again" >&2; exit 1; }
	$(BIN)/python .ci/site.py

bench: setup
	@mkdir -p runs/bench
	for nb in nbs/bench/*.ipynb; do $(BIN)/papermill --cwd nbs/bench "$$nb" "runs/bench/$$(basename "$$nb")" || exit 1; done
	$(BIN)/python tests/planted.py runs/bench
	$(BIN)/python tests/test_resume.py --all runs/bench

tiny: setup
	$(BIN)/hmx-feel tiny

readme: setup
	$(BIN)/jupyter nbconvert --to markdown --output-dir . --output README nbs/index.ipynb

clean:
	rm -rf build dist _docs _proc *.egg-info hmx_feel/notebooks .pytest_cache .ruff_cache
