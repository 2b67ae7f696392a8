# Two commands on a fresh machine with Python and make: `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
RESULTS := benchmarks/results
RUN := OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m

.PHONY: demo test lint types gpu docs clean

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -e '.[dev]'
	touch $@

demo: $(VENV)/.installed
	HF_HUB_OFFLINE=1 $(BIN)/vtr demo --out demo

test: lint types
	$(RUN) pytest -n 2 --dist loadfile tests

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.installed
	$(BIN)/mypy

# On a machine with a CUDA device: the gpu tests, and the benchmarks, which write benchmarks/results/.
# Uses the Python that is there, because a GPU machine brings its own torch: make gpu PYTHON=python3
gpu:
	PYTHONPATH=. $(PYTHON) -m pytest -m gpu tests
	PYTHONPATH=. $(PYTHON) benchmarks/vit.py
	PYTHONPATH=. $(PYTHON) benchmarks/attention.py gpu
	PYTHONPATH=. $(PYTHON) benchmarks/attention.py match
	PYTHONPATH=. $(PYTHON) benchmarks/vlm.py
	PYTHONPATH=. $(PYTHON) benchmarks/diffusion.py
	PYTHONPATH=. $(PYTHON) benchmarks/diffusion_methods.py --device cuda
	PYTHONPATH=. $(PYTHON) benchmarks/video.py decode --out $(RESULTS)/video-decode-cuda-host.csv
	PYTHONPATH=. $(PYTHON) benchmarks/video_models.py reduction --out $(RESULTS)/video-reduction-cuda.csv
	PYTHONPATH=. $(PYTHON) benchmarks/video_models.py prefill --out $(RESULTS)/video-prefill-cuda.csv

clean:
	rm -rf $(VENV) demo build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
