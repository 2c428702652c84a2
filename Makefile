# Two commands on a fresh machine: `make serve` and `make test`. Everything they need is installed into .venv.

PYTHON ?= python3
DATA ?= ../shared/data
BIN := .venv/bin
PIP := PIP_CONSTRAINT=constraints.txt $(BIN)/python -m pip install --quiet --disable-pip-version-check
MINUTES ?= 20
SITE_PORT ?= 8005
ENGINE ?= docker
TARGET ?= server
RUN ?=

.PHONY: turn-cost round-cost serve demo test check audit fuzz quality precisions models-page series crash bench bench-sessions gpu-bench conformance load soak overload image compose-test protos docs docs-serve reference setup setup-dev setup-docs clean

serve: setup            ## serve the ready models on localhost:8001
	$(BIN)/seqserve serve --store lmdb:.sessions $(RUN)

demo: setup             ## start a server, ask it real questions, stop it
	$(BIN)/seqserve demo

test: setup-dev         ## all tests
	$(BIN)/python -m pytest $(RUN)

check: setup-dev        ## format, lint, types, import arrows, generated stubs, pinned packages
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m protos --check
	$(BIN)/python -m tests.pins

audit: | .venv/bin/python ## known vulnerabilities of every pinned package (needs the network: PyPI's advisories)
	test -x .venv-audit/bin/pip-audit || ($(BIN)/python -m venv .venv-audit && .venv-audit/bin/python -m pip install --quiet 'pip-audit>=2.9')
	.venv-audit/bin/pip-audit --requirement constraints.txt --no-deps --disable-pip

fuzz: setup-dev         ## nonsense thrown at a running server, MINUTES=n; RUN="--front public"
	$(BIN)/python -m tests.fuzz --minutes $(MINUTES) $(RUN)

quality: setup-dev      ## the shipped bundles on the full test sets: DATA=DIR, RUN=--served over gRPC
	$(BIN)/python -m tests.figures.quality --data $(DATA) $(RUN)

precisions: setup-dev   ## what each precision of the shipped bundles costs and saves: DATA=DIR
	$(BIN)/python -m tests.figures.precisions --data $(DATA) $(RUN)

models-page: setup-dev  ## docs/models.md anew from the bundles; RUN="--served FILE" takes figures of make quality up
	$(BIN)/python -m export.page $(RUN)

series: setup-dev       ## the forecaster beside simpler methods on five data sets: DATA=DIR, RUN=--write into docs
	$(BIN)/python -m tests.figures.series --data $(DATA) $(RUN)

crash: setup-dev        ## live sessions under kill -9: nothing lost, nothing doubled; RUN="--store redis"
	$(BIN)/python -m tests.figures.crash $(RUN)

round-cost: setup-dev   ## what sequences of mixed lengths cost in rounds, one thread, no gRPC
	$(BIN)/python -m tests.figures.round_cost $(RUN)

turn-cost: setup-dev    ## the server's own Python a turn and a call, one thread, no gRPC; RUN=--profile
	$(BIN)/python -m tests.figures.turn_cost $(RUN)

bench-sessions: setup-dev ## what a turn costs, every store side by side; RUN="--open 0 --repeats 1" is shorter
	$(BIN)/python -m tests.figures.sessions_bench $(RUN)

gpu-bench: setup-dev    ## turns and tasks on a GPU, or RUN="--device cpu --part sessions"; beside onnxruntime and PyTorch alone
	$(BIN)/python -m tests.figures.gpu_bench --data $(DATA) $(RUN)

bench: setup-dev        ## server, bare onnxruntime and a peer under perf_analyzer, into docs/bench.md; RUN="--short --only a32-32"
	$(BIN)/python -m tests.figures.bench --data $(DATA) $(RUN)

conformance: setup-dev  ## the Open Inference Protocol, case by case; EXAMPLES=DIR runs tritonclient's published examples too
	$(BIN)/python -m tests.conformance.ours $(if $(EXAMPLES),--examples $(EXAMPLES)) $(RUN)

load: setup-dev         ## two minutes of mixed load by locust against a server of its own: DATA=DIR, RUN=--write into docs/load.md
	$(BIN)/python -m tests.figures.load --data $(DATA) $(RUN)

soak: setup-dev         ## ill-behaved callers beside well-behaved ones for MINUTES: memory, descriptors, the neighbours' p99
	$(BIN)/python -m tests.figures.soak --data $(DATA) --minutes $(MINUTES) $(RUN)

overload: setup-dev     ## three times what can be answered: what is kept, how soon the rest is refused, how soon it is over
	$(BIN)/python -m tests.figures.overload --data $(DATA) $(RUN)

image:                  ## the server's image, seqserve:0.1.0; TARGET=gpu or load, ENGINE=podman, RUN="--build-arg BASE=…"
	$(ENGINE) build --target $(TARGET) --tag seqserve:0.1.0$(if $(filter-out server,$(TARGET)),-$(TARGET)) $(RUN) .

compose-test: setup-dev ## three replicas in containers, killed and drained under live sessions; RUN="--base IMAGE" or --processes
	$(BIN)/python -m tests.figures.compose_test $(RUN)

protos: setup-dev       ## write the stubs anew from protos/*.proto
	$(BIN)/python -m protos

docs: setup-docs        ## the documentation site, into site/; a broken link, heading or picture fails it
	$(BIN)/python -m sphinx -b html -W --keep-going -q -d site/.trees docs site/html
	@echo "site/html/index.html"

docs-serve: docs        ## the same on http://127.0.0.1:8005, SITE_PORT=n
	$(BIN)/python -m http.server --bind 127.0.0.1 --directory site/html $(SITE_PORT)

reference: setup-dev    ## docs/reference from protos, knobs and commands, docs/drawings from their script
	$(BIN)/python -m docs.write_reference
	$(BIN)/python -m docs.draw_concepts

setup: .venv/.serve
setup-dev: .venv/.dev
setup-docs: .venv/.docs

.venv/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "seqserve needs Python 3.11 or newer: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv .venv

.venv/.serve: pyproject.toml constraints.txt | .venv/bin/python
	$(PIP) --editable '.[cpu]'
	touch $@

.venv/.docs: pyproject.toml constraints.txt | .venv/bin/python
	$(PIP) --editable '.[docs]'
	touch $@

.venv/.dev: pyproject.toml constraints.txt | .venv/bin/python
	$(PIP) --editable '.[cpu,redis,otel,train,loadtest,docs,dev]'
	touch $@ .venv/.serve .venv/.docs

clean:
	rm -rf site docs/project .venv .venv-audit .venv-bench .mypy_cache .ruff_cache .pytest_cache .hypothesis
