# Two commands on a fresh machine with Python and make: `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
RESULTS := benchmarks/results
RUN := OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m

# Environments beside the locked one: the lower bounds, the newest within the bounds, the newest there is.
# lmms-eval is left out of them: it pins other libraries.
EXTRAS := vision,vlm,video,diffusion,train,search,detection,ui,test
INSTALL = $(BIN)/uv pip install --quiet --python $@/bin/python
COMPAT := "contract or compat"

.PHONY: demo test lint types contract compat candidates canary lock gpu gpu-first clean \
	$(VENV)-newest $(VENV)-canary

$(BIN)/uv: requirements/uv.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --require-hashes -r requirements/uv.txt
	touch $@

$(VENV)/.installed: $(BIN)/uv pyproject.toml requirements/locked.txt
	$(BIN)/uv pip install --quiet --python $(BIN)/python --require-hashes -r requirements/locked.txt
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --no-build-isolation -e .
	touch $@

demo: $(VENV)/.installed
	HF_HUB_OFFLINE=1 $(BIN)/vtr demo --out demo

test: lint types
	$(RUN) pytest -n 2 --dist loadfile tests

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# mypy ends with 2 if it has crashed (1: it found errors). Its cache is what differs between machines.
types: $(VENV)/.installed
	$(BIN)/mypy --show-traceback || { test $$? -eq 2 && $(BIN)/mypy --show-traceback --cache-dir=/dev/null; }

# Exact versions: renews requirements/*.txt with the newest versions within pyproject's bounds.
lock: $(BIN)/uv
	echo uv | $(BIN)/uv pip compile --quiet --upgrade --universal --python-version 3.11 \
		--generate-hashes --no-header - -o requirements/uv.txt
	$(BIN)/uv pip compile --quiet --upgrade --universal --python-version 3.11 \
		--generate-hashes --no-header --extra dev pyproject.toml -o requirements/locked.txt
	$(BIN)/uv pip compile --quiet --upgrade --universal --python-version 3.11 \
		--generate-hashes --no-header --resolution lowest-direct \
		$(foreach extra,vision vlm video diffusion train search detection ui test,--extra $(extra)) \
		pyproject.toml -o requirements/lowest.txt

$(VENV)-lowest: $(BIN)/uv requirements/lowest.txt
	$(BIN)/uv venv --quiet --clear --python $(BIN)/python $@
	$(INSTALL) --require-hashes -r requirements/lowest.txt
	$(INSTALL) --no-deps -e .
	touch $@

$(VENV)-newest: $(BIN)/uv
	$(BIN)/uv venv --quiet --clear --python $(BIN)/python $@
	$(INSTALL) --upgrade -e '.[$(EXTRAS)]'

$(VENV)-canary: $(BIN)/uv
	$(BIN)/uv venv --quiet --clear --python $(BIN)/python $@
	$(BIN)/python requirements/unbounded.py > $@/overrides.txt
	$(INSTALL) --upgrade --override $@/overrides.txt -e '.[$(EXTRAS)]'

# What vtr knows of other libraries' private names, held against the lowest and the newest of them.
contract: $(VENV)-lowest $(VENV)-newest
	$(call run,lowest,contract)
	$(call run,newest,contract)

# The same and a hundred tests of every part, in the lowest, the locked and the newest versions.
compat: $(VENV)/.installed $(VENV)-lowest $(VENV)-newest
	$(RUN) pytest -n 2 -m $(COMPAT) tests
	$(call run,lowest,$(COMPAT))
	$(call run,newest,$(COMPAT))

# Tomorrow's versions: the newest of everything, whatever the bounds say, and what fails with it.
canary: $(VENV)-canary
	-$(VENV)-canary/bin/vtr doctor
	$(call run,canary,$(COMPAT))

run = OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(VENV)-$(1)/bin/python -m pytest -n 2 -m $(2) tests

# Every configuration that the Triton kernels choose from, compiled for sm_90: no GPU, but long; what was
# compiled before is remembered in .pytest_cache.
candidates: $(VENV)/.installed
	VTR_EVERY_CANDIDATE=1 $(RUN) pytest -n 2 tests/kernels/test_triton_candidates.py

# On a machine with a CUDA device. gpu-first: what to know in five minutes; gpu: the gpu tests, and the benchmarks, which write benchmarks/results/.
# Uses the Python that is there, because a GPU machine brings its own torch: make gpu PYTHON=python3
gpu-first:
	PYTHONPATH=. $(PYTHON) benchmarks/gpu_first.py all --out gpu_first

gpu:
	PYTHONPATH=. $(PYTHON) -m pytest -m gpu tests
	PYTHONPATH=. $(PYTHON) benchmarks/vit.py
	PYTHONPATH=. $(PYTHON) benchmarks/attention.py gpu
	PYTHONPATH=. $(PYTHON) benchmarks/attention.py match
	PYTHONPATH=. $(PYTHON) benchmarks/vlm.py
	PYTHONPATH=. $(PYTHON) benchmarks/prefill.py --gpu
	PYTHONPATH=. $(PYTHON) benchmarks/cache.py --gpu
	PYTHONPATH=. $(PYTHON) benchmarks/diffusion.py
	PYTHONPATH=. $(PYTHON) benchmarks/diffusion.py --gpu
	PYTHONPATH=. $(PYTHON) benchmarks/video.py decode --out $(RESULTS)/video-decode-cuda-host.csv
	PYTHONPATH=. $(PYTHON) benchmarks/video_models.py reduction --out $(RESULTS)/video-reduction-cuda.csv
	PYTHONPATH=. $(PYTHON) benchmarks/video_models.py prefill --out $(RESULTS)/video-prefill-cuda.csv

clean:
	rm -rf $(VENV) $(VENV)-* demo build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
