# Two commands on a fresh machine: `make serve` and `make test`. Everything they need is installed into .venv.

PYTHON ?= python3
DATA ?= ../shared/data
BIN := .venv/bin
PIP := PIP_CONSTRAINT=constraints.txt $(BIN)/python -m pip install --quiet --disable-pip-version-check
MINUTES ?= 20
ENGINE ?= docker
TARGET ?= server
RUN ?=

.PHONY: turn-cost serve web web-test web-schema kserve demo test check audit fuzz quality precisions models-page series crash bench bench-sessions conformance load soak overload image compose-test protos setup setup-dev clean

serve: setup            ## serve the ready models on localhost:8001
	$(BIN)/seqserve serve --store lmdb:.sessions $(RUN)

web: setup              ## a server with the ready models and its page on http://localhost:8000; RUN="--port 9000"
	$(BIN)/python -m web.demo $(RUN)

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

turn-cost: setup-dev    ## the server's own Python a turn and a call, one thread, no gRPC; RUN=--profile
	$(BIN)/python -m tests.figures.turn_cost $(RUN)

bench-sessions: setup-dev ## what a turn costs, every store side by side; RUN="--open 0 --repeats 1" is shorter
	$(BIN)/python -m tests.figures.sessions_bench $(RUN)

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

image:                  ## the server's image, seqserve:0.1.0; TARGET=gpu, load or web, ENGINE=podman, RUN="--build-arg BASE=…"
	$(ENGINE) build --target $(TARGET) --tag seqserve:0.1.0$(if $(filter-out server,$(TARGET)),-$(TARGET)) $(RUN) .

web-test: setup-dev     ## a real browser does each of the page's stories, the server killed amid them; needs Chromium; RUN="--only sentiment"
	$(PIP) --editable '.[webtest]'
	$(BIN)/python -m tests.figures.web_test $(RUN)

web-schema: setup-dev   ## requests made from the OpenAPI document, good and bad: every answer is one that it has; RUN="--examples 100"
	$(BIN)/python -m tests.figures.web_schema $(RUN)

kserve: setup-dev       ## KServe's own REST client, in an environment of its own, against the HTTP face
	test -x .venv-kserve/bin/python || ($(BIN)/python -m venv .venv-kserve && .venv-kserve/bin/python -m pip install --quiet 'kserve>=0.21')
	$(BIN)/python -m tests.conformance.ours --kserve .venv-kserve/bin/python

compose-test: setup-dev ## three replicas in containers, killed and drained under live sessions; RUN="--base IMAGE" or --processes
	$(BIN)/python -m tests.figures.compose_test $(RUN)

protos: setup-dev       ## write the stubs anew from protos/*.proto
	$(BIN)/python -m protos

setup: .venv/.serve
setup-dev: .venv/.dev

.venv/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "seqserve needs Python 3.11 or newer: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv .venv

.venv/.serve: pyproject.toml constraints.txt | .venv/bin/python
	$(PIP) --editable '.[cpu,web]'
	touch $@

.venv/.dev: pyproject.toml constraints.txt | .venv/bin/python
	$(PIP) --editable '.[cpu,web,redis,otel,train,loadtest,dev]'
	touch $@ .venv/.serve

clean:
	rm -rf .venv .venv-audit .venv-bench .venv-kserve .mypy_cache .ruff_cache .pytest_cache .hypothesis
