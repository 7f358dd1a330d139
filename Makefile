# `make help` lists the verbs. Everything heavy is cached outside the checkout, by version.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
export PYTHONSAFEPATH := 1

PYTHON ?= python3
CACHE  ?= $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/finetune-operator
export CACHE

# Third-party packages live in two cached environments, one per lock: the checkout's .venv-* only add the project itself.
digest = $(firstword $(shell { $(PYTHON) -V; cat $(1) 2>/dev/null; } | sha256sum | cut -c1-12))
FULL_ENV     := $(CACHE)/env-$(call digest,constraints.txt)
OPERATOR_ENV := $(CACHE)/operator-env-$(call digest,constraints-operator.txt)
DOCS_ENV     := $(CACHE)/docs-env-$(call digest,docs/site/requirements.txt)
UV           := $(CACHE)/uv/bin/uv
export PATH  := $(CURDIR)/.venv/bin:$(FULL_ENV)/bin:$(PATH)

.PHONY: help setup binaries lock generate images e2e-node scale demo pictures test verify e2e stalls faults kueue audit real-model architectures gguf chart-audit bench bench-kernels docs clean
help:  ## List the verbs
	@grep -hE '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

setup: .venv/.ready .venv-operator/.ready  ## Install everything (about 4.7 GB once per machine, then seconds)

$(UV):
	@echo "setup: uv (package installer)"
	@$(PYTHON) -m venv $(CACHE)/uv && $(CACHE)/uv/bin/pip install -q uv==0.13.9

$(FULL_ENV)/.ready: | $(UV)
	@echo "setup: third-party packages, torch with CUDA among them (4.7 GB, 1-4 minutes, once per machine)"
	@rm -rf $(FULL_ENV) && $(PYTHON) -m venv $(FULL_ENV)
	@$(UV) pip install --python $(FULL_ENV) --require-hashes -r constraints.txt && touch $@

$(OPERATOR_ENV)/.ready: | $(UV)
	@echo "setup: the operator's own packages (no torch)"
	@rm -rf $(OPERATOR_ENV) && $(PYTHON) -m venv $(OPERATOR_ENV)
	@$(UV) pip install -q --python $(OPERATOR_ENV) --require-hashes -r constraints-operator.txt && touch $@

$(DOCS_ENV)/.ready: | $(UV)
	@echo "setup: the documentation's own packages (mkdocs)"
	@rm -rf $(DOCS_ENV) && $(PYTHON) -m venv $(DOCS_ENV)
	@$(UV) pip install -q --python $(DOCS_ENV) --require-hashes -r docs/site/requirements.txt && touch $@

# $(1): checkout environment, $(2): cached environment
define project_env
	@rm -rf $(1) && $(PYTHON) -m venv --without-pip $(1)
	@ls -d $(2)/lib/python*/site-packages >$$(echo $(1)/lib/python*/site-packages)/third_party.pth
	@$(UV) pip install -q --python $(1) --no-deps -e . && touch $(1)/.ready
endef
.venv/.ready: pyproject.toml $(FULL_ENV)/.ready
	$(call project_env,.venv,$(FULL_ENV))
.venv-operator/.ready: pyproject.toml $(OPERATOR_ENV)/.ready
	$(call project_env,.venv-operator,$(OPERATOR_ENV))

lock: | $(UV)  ## Resolve the pins again
	@$(UV) pip compile -q pyproject.toml --extra dev --generate-hashes --no-emit-package finetune-operator --python-version 3.11 \
	  --custom-compile-command 'make lock' -o constraints.txt
	@for extras in operator "trainer --extra gpu"; do \
	  $(UV) pip compile -q pyproject.toml --extra $$extras -c constraints.txt --generate-hashes --no-emit-package finetune-operator --python-version 3.11 \
	    --custom-compile-command 'make lock' -o constraints-$${extras%% *}.txt; done
	@sed -n 's/^requires = \["\(.*\)"\]/\1/p' pyproject.toml | $(UV) pip compile -q - -c constraints.txt --generate-hashes --python-version 3.11 \
	  --custom-compile-command 'make lock' -o constraints-build.txt
	@$(UV) pip compile -q docs/site/requirements.in --generate-hashes --python-version 3.11 --custom-compile-command 'make lock' \
	  -o docs/site/requirements.txt

generate: setup  ## Write the CRD, the chart's role and the documents' figures again from their sources
	@python -m finetune_api.generate
	@python -m finetune_operator.cluster.generate
	@python -m finetune_test_programs.gitops_files
	@python tests/repository/reason_table.py >docs/reasons.md
	@python tests/repository/metrics_table.py >docs/metrics.md
	@python tests/repository/field_table.py >docs/fields.md
	@python tests/repository/sizing_table.py >docs/sizing.md
	@python tests/repository/family_table.py >docs/families.md
	@python tests/repository/chart_readme.py >charts/finetune-operator/README.md
	@python -m speed.chart

binaries: setup  ## Build the dev cluster's programs (about 5 minutes on two cores, once per machine and version) and fetch llama.cpp's converter
	@python -m finetune_test_programs.binaries
	@python -m finetune_test_programs.llama_cpp_converter

demo: binaries  ## The main job, embedded: cluster, S3, operator, one FineTuneJob, artifacts, generated text
	@python -m finetune_devcluster.demo

pictures: binaries  ## docs/watch.svg and docs/top.svg, as the client shows many jobs of a development cluster (4 minutes)
	python -m finetune_devcluster.pictures

test: binaries  ## Every test that needs no GPU, on a real control plane
	@OMP_NUM_THREADS=1 python -m pytest -n 2 --dist worksteal -m "not gpu and not real_model and not stalls and not faults and not kueue and not images and not node and not gguf and not long" $(PYTEST_ARGS)

e2e: binaries  ## The tests that run a whole job, and those of minutes that `make test` leaves out: a company's network, the runbook's commands, an upgrade, a terminal's Ctrl-C
	@python -m pytest -m "e2e or long" $(PYTEST_ARGS)

stalls: binaries  ## Trainers that hang or are stopped in every stage and way, alone and on several nodes, operators that restart meanwhile, and the operator's own probes (17 minutes)
	@python -m pytest -m stalls $(PYTEST_ARGS)

faults: binaries  ## 330 fault plans against the operator, all edits of specs, random users, faults before S3, planted mistakes (docs/fault-suite.md)
	@python -m finetune_test_operator.faults.suite
	@[ -n "$${FAULTS_PLAN:-}" ] || python -m pytest -q -m faults tests/operator/faults tests/trainer/artifacts $(PYTEST_ARGS)

kueue: binaries  ## Jobs in queues of the real Kueue, and in JobSets of the real controller; both are built from their Go modules (12 minutes on two cores, once per machine and version; then 5 minutes)
	@python -m pytest -m kueue $(PYTEST_ARGS)

images: setup  ## As root, both images without a registry: built and tried (first 10 minutes on two cores; IMAGES_ARGS="--twice" compares two builds)
	@python -P -m finetune_images.build $(IMAGES_ARGS)
	@python -m pytest -m images $(PYTEST_ARGS)

e2e-node: binaries  ## As root, the images on a real node (kubelet; Debian's containerd and runc) of the dev cluster, under Pod Security "restricted" (20 minutes after `make images`)
	@python -m pytest -s -m node $(PYTEST_ARGS)

audit: binaries  ## Rights of the operator beside what it asked for, by the audit logs of its whole suite (10 minutes)
	@rm -rf .audit && mkdir .audit
	@failed=0; FINETUNE_DEV_AUDIT_DIR=$(CURDIR)/.audit python -m pytest -q -n 2 --dist worksteal -m "cluster and not stalls and not faults and not kueue and not images and not node" tests/operator tests/charts $(PYTEST_ARGS) || failed=$$?; \
	python -m finetune_test_operator.rights_audit .audit && exit $$failed

real-model: binaries  ## A small real model learns a format, and all that is published has learned it (30 minutes on two cores)
	@python -P -m finetune_test_models.real_model >/dev/null
	@python -m pytest -m real_model -s $(PYTEST_ARGS)

architectures: setup  ## The table of model families, written anew: tiny models of every type of transformers on the CPU (MODEL_TYPES: some only), 9 minutes
	@TRITON_INTERPRET=1 python -m finetune_test_models.sweeps.family_table $(MODEL_TYPES)
	@TRITON_INTERPRET=1 python -m finetune_test_models.sweeps.engine_sweep $(MODEL_TYPES)
	@python -m finetune_test_models.sweeps.merge_sweep $(MODEL_TYPES)
	@python tests/repository/family_table.py >docs/families.md

gguf: setup  ## Every model family that becomes GGUF, against llama.cpp's converter, its quantiser and its answers (5 minutes on two cores)
	@python -m finetune_test_programs.llama_cpp_converter >/dev/null
	@OMP_NUM_THREADS=1 python -m pytest -n 2 --dist loadscope -m "gguf or not gpu" tests/trainer/export/gguf tests/trainer/export/judge tests/trainer/new_tokens $(PYTEST_ARGS)

scale: binaries  ## Thousands of jobs with simulated pods, from creation to their end (5,000: about 20 minutes; SCALE_ARGS=--help says more)
	@python -P -m finetune_scale.run --csv docs/scale.csv $(SCALE_ARGS)
	@python -P -m finetune_scale.chart

bench: setup  ## On a machine with a GPU: speed and memory beside the peers that are installed (BENCH_ARGS=--help says more)
	@python -m speed.run $(BENCH_ARGS)

bench-kernels: setup  ## On a machine with a GPU: each kernel alone, against what the GPU's memory and products give
	@python -m benchmarks.micro $(BENCH_ARGS)

# checkov brings 190 MB of other programs' pins, so it has an environment of its own, outside the locks.
CHECKOV := $(CACHE)/checkov-3.3.30
$(CHECKOV)/.ready: | $(UV)
	@rm -rf $(CHECKOV) && $(UV) venv -q --python $(PYTHON) $(CHECKOV) && $(UV) pip install -q --python $(CHECKOV) checkov==3.3.30 && touch $@

chart-audit: binaries $(CHECKOV)/.ready  ## checkov's rules for Kubernetes over the chart's objects; exceptions stand in their annotations (2 minutes, 190 MB once)
	@folder=$$(mktemp -d); trap 'rm -rf $$folder' EXIT; \
	python -m finetune_test_programs.binaries helm template finetune-operator charts/finetune-operator -n finetune-system --kube-version 1.36.3 \
	  --set crds.enabled=false,networkPolicy.operator.enabled=true,networkPolicy.trainers.enabled=true,networkPolicy.trainers.namespaces={team} >$$folder/chart.yaml; \
	$(CHECKOV)/bin/checkov -f $$folder/chart.yaml --framework kubernetes --compact --quiet --skip-download

verify: binaries docs  ## Read-only checks: format, lint, types, layers, dependencies, generated files, Helm lint
	ruff format --check --quiet crds operator trainer_image kernels tests
	ruff check --quiet crds operator trainer_image kernels tests
	python -m mypy crds/finetune_api operator/finetune_operator operator/finetune_client trainer_image/finetune_trainer kernels/finetune_kernels kernels/benchmarks trainer_image/benchmarks/speed trainer_image/benchmarks/held_out tests/support/finetune_*
	python -c "from importlinter.cli import lint_imports_command; lint_imports_command()"
	python -m deptry crds/finetune_api operator/finetune_operator --optional-dependencies-dev-groups client,trainer,gpu,hopper,dev
	python -m deptry crds/finetune_api operator/finetune_client --optional-dependencies-dev-groups operator,trainer,gpu,hopper,dev
	python -m deptry crds/finetune_api trainer_image/finetune_trainer kernels/finetune_kernels --optional-dependencies-dev-groups client,operator,dev
	python -m finetune_api.generate --check
	python -m finetune_operator.cluster.generate --check
	python -m finetune_test_programs.gitops_files --check
	python -m speed.chart --check
	python -m finetune_test_programs.binaries helm lint --strict --quiet charts/finetune-operator

docs: setup $(DOCS_ENV)/.ready  ## The documentation as a site in build/site; a link that leads nowhere, or a page without a place, is an error
	@python tests/repository/docs_site.py build/docs
	@NO_MKDOCS_2_WARNING=1 $(DOCS_ENV)/bin/mkdocs build --strict --config-file build/docs/mkdocs.yml --site-dir ../site
	@echo build/site/index.html

clean:  ## Remove this checkout's environments (the caches stay)
	@rm -rf .venv .venv-operator .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
