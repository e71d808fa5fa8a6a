# make demo    everything from nothing: a real model compressed, evaluated, set out in a table and figures
# make plan    what the paper's tables would cost, before anything starts (PLAN="--configfile ..." for others)
# make test    everything from nothing: all tests
# make test-fast   the tests that start no workflow and take no seconds each: a minute and a half on two cores
# make test-faults   kills, full disks, broken input, at length: 25 kills, 10^5 broken files and configs; mounts as root
# make test-triton   the GPU kernels of packed weights in Triton's interpreter, and compiled; 1 GB, no GPU
# make test-processors   the numeric tests under each set of instructions that this processor can be held to
# make test-slurm   the workflow on a SLURM of its own, from Debian's packages; as root
# make smoke   the whole workflow on a tiny model, trained first
# make check-gpu   what one GPU shows in ten minutes: kernels, times, memory, the workflow beside the CPU's numbers
# make benchmark   speed and memory, after the demo, on an otherwise idle machine; under an hour on two cores
# make benchmark-large   memory and time of a model of Llama-2-7B's shape: 31 GB of disk
# make kernels   the 4-bit products for GPUs, with NVIDIA's compiler from PyPI (320 MB); needs no GPU to compile
# make crate   an RO-Crate of the demo: results/demo/ro-crate-metadata.json with each job, its command, code and files
# make check-readers   do vLLM, llama.cpp and transformers 4 compute what is exported? After the demo; 2 GB of packages
# make peers   llm-compressor, GPTQModel and AutoRound beside ours, in a table; 8 GB of packages; over an hour on two cores
# make docs    the documentation site, into site/; without a network
# make lint    ruff, snakefmt, snakemake --lint
# make audit   known vulnerabilities of what the lock files install, asked of osv.dev
# make clean   remove what the demo and the tests made; results/ of other runs stay

PYTHON ?= python3
BIN := .venv/bin
SNAKEMAKE := PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/snakemake
READY := .venv/.ready

.PHONY: plan demo demo-wikitext smoke test test-fast test-faults test-triton test-processors test-slurm check-gpu benchmark benchmark-large kernels crate check-readers peers docs lint audit clean
.DEFAULT_GOAL := demo

# Python compiles a module when it is first imported; compiling all of them here would take most of a minute. Where the
# environment forbids it to keep what it has compiled, every process compiles torch again: 3 s each, hundreds of times.
unexport PYTHONDONTWRITEBYTECODE
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile

# By hash, all but torch; it comes last and pinned, so that nothing else chooses its build.
$(READY): requirements.lock requirements.torch.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, this is " + sys.version.split()[0] + "; set PYTHON=python3.11 or the like.")'
	$(PYTHON) -m venv .venv
	$(INSTALL) --no-deps --require-hashes -r requirements.lock
	$(INSTALL) -r requirements.torch.lock
	$(INSTALL) --no-deps --editable .
	@touch $@

demo: $(READY)
	$(SNAKEMAKE) --cores all --configfile config/experiments/demo.yaml
	@PYTHONWARNINGS=ignore::RuntimeWarning $(SNAKEMAKE) --quiet all --configfile config/experiments/demo.yaml --report results/demo/report.html
	@echo "Report: results/demo/report.html"
	@echo "Figures: results/demo/figures/"; echo; cat results/demo/tables/demo.md

# The same on WikiText-2 and PIQA, whose files lie in the folder OBR_DATA.
demo-wikitext: $(READY)
	$(SNAKEMAKE) --cores all --configfile config/experiments/demo.yaml config/experiments/demo-wikitext.yaml
	@cat results/demo-wikitext/tables/demo.md

plan: $(READY)
	@PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/obr plan $(PLAN)

smoke: $(READY)
	$(BIN)/python tests/helpers/tiny_model.py results/tiny
	OBR_TINY="$(CURDIR)/results/tiny" OBR_TESTS="$(CURDIR)/tests" $(SNAKEMAKE) --cores all --configfile tests/config.yaml
	@cat results/smoke/tables/*.md

# Test files side by side, one process with one thread per core.
PYTEST := OMP_NUM_THREADS=1 PATH="$(CURDIR)/$(BIN):$$PATH" \
	$(BIN)/python -m pytest -n logical --maxprocesses 8 --dist loadscope --no-loadscope-reorder

test: $(READY)
	$(PYTEST)

test-fast: $(READY)
	$(PYTEST) -m "not slow and not workflow"

test-faults: $(READY)
	OBR_KILLS=25 OBR_EXAMPLES=100000 PATH="$(CURDIR)/$(BIN):$$PATH" \
	$(BIN)/python -m pytest -s tests/workflow/test_faults.py tests/project/test_fuzz.py tests/models/test_untrusted_files.py tests/runtime/test_resume.py

# Into a folder of its own, as PyTorch for CUDA brings a Triton of its choice.
test-triton: $(READY)
	$(INSTALL) --no-deps --require-hashes --target .venv/triton --upgrade -r requirements.triton.lock
	PYTHONPATH="$(CURDIR)/.venv/triton" PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m pytest \
	tests/kernels/test_gpu.py tests/checkpoints/test_packed_linear.py tests/benchmarks/test_triton_builds.py

test-processors: $(READY)
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python tests/helpers/instruction_sets.py

# Where the packages cannot be had, the tests skip and say so.
test-slurm: $(READY)
	-command -v slurmctld >/dev/null || DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends \
	slurmctld slurmd slurm-client munge
	OBR_SLURM=1 PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m pytest tests/workflow/test_slurm.py

# CHECK="--budget 300 --only products large" and the like; --dry-run says what would be done; --simulated --small needs no GPU.
check-gpu: $(READY)
	$(BIN)/python benchmarks/check_gpu.py $(CHECK)

benchmark: $(READY)
	$(BIN)/python benchmarks/run.py

benchmark-large: $(READY)
	$(BIN)/python benchmarks/run.py --only large

# Into a folder of their own: PyTorch for CUDA brings its own choice of the same libraries.
kernels: $(READY)
	$(INSTALL) --no-deps --require-hashes \
	--target .venv/cuda --upgrade -r requirements.cuda.lock
	$(BIN)/python -c 'from obr.kernels.cuda import library; print(library.prepare())'

# For another run, its configuration files and the file to write: make crate CRATE_OF=... CRATE=...
CRATE_OF ?= config/experiments/demo.yaml
CRATE ?= results/demo/ro-crate-metadata.json
crate: $(READY)
	@PYTHONWARNINGS=ignore::RuntimeWarning $(SNAKEMAKE) --quiet all --configfile $(CRATE_OF) \
	--reporter fairscape --report-fairscape-path $(CRATE) --report-fairscape-name "OBR pipeline" \
	--report-fairscape-license https://spdx.org/licenses/Apache-2.0
	@echo "RO-Crate: $(CRATE)"

# Other programs, each in an environment of its own: their dependencies are not the project's. By hash; those for which
# this project's torch will do have it, as it is built for this machine.
READERS := vllm llamacpp transformers4
PEERS := llmcompressor gptqmodel autoround
WITH_TORCH := vllm transformers4 llmcompressor autoround
define OTHER_ENVIRONMENT
$(PYTHON) -m venv $(@D)
$(@D)/bin/python -m pip install --quiet --disable-pip-version-check --no-compile --no-deps --require-hashes -r $<
$(if $(filter $*,$(WITH_TORCH)),$(@D)/bin/python -m pip install --quiet --disable-pip-version-check --no-compile -r requirements.torch.lock)
@touch $@
endef

.readers/%/.ready: envs/readers/%.txt requirements.torch.lock
	$(OTHER_ENVIRONMENT)

.peers/%/.ready: envs/peers/%.txt requirements.torch.lock
	$(OTHER_ENVIRONMENT)

check-readers: $(READY) $(READERS:%=.readers/%/.ready)
	$(BIN)/python benchmarks/readers/check.py

peers: $(READY) $(PEERS:%=.peers/%/.ready)
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python benchmarks/peers/run.py

# Broken links, anchors and pages are errors; with --quiet, mkdocs would overlook them.
docs: $(READY)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
	@echo "Site: site/index.html"

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/snakefmt --check Snakefile workflow
	$(SNAKEMAKE) --lint

# In an environment of its own: the auditor's dependencies are not the project's.
audit: $(READY)
	$(PYTHON) -m venv .venv/audit
	.venv/audit/bin/python -m pip install --quiet --disable-pip-version-check pip-audit==2.9.0
	$(BIN)/python envs/audit.py .venv/audit/bin/pip-audit

clean:
	rm -rf results/demo results/demo-wikitext results/smoke results/tiny site .pytest_cache .ruff_cache .hypothesis
