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

.PHONY: turn-cost round-cost serve demo test check audit fuzz quality precisions models-page series crash bench bench-sessions conformance load soak overload image compose-test protos docs docs-serve reference dashboard gpu-bench web web-test web-schema kserve setup setup-dev setup-docs clean

serve: setup            ## serve the ready models on localhost:8001
	$(BIN)/seqserve serve --store lmdb:.sessions $(RUN)

web: setup              ## a server with the ready models and its page on http://localhost:8000; RUN="--port 9000"
	$(BIN)/python -m web.demo $(RUN)

demo: setup             ## start a server, ask it real questions, stop it
	$(BIN)/seqserve demo

test: setup-dev         ## all tests
	$(BIN)/python -m pytest --numprocesses auto --dist loadfile $(RUN)

check: setup-dev        ## format, lint, types, import arrows, generated stubs, pinned packages, known vulnerabilities
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m protos --check
	$(BIN)/python -m tests.pins
	$(BIN)/python -m tests.audit

audit: setup-dev        ## known vulnerabilities of every pinned package; fails where PyPI's advisories can't be reached
	$(BIN)/python -m tests.audit --strict

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

dashboard: setup-dev    ## the dashboard's panels under load, into docs/images: DATA=DIR; needs prometheus, haproxy, redis-server
	$(BIN)/python -m tests.figures.dashboard --data $(DATA) $(RUN)

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
	$(PIP) --editable '.[cpu,web]'
	touch $@

.venv/.docs: pyproject.toml constraints.txt | .venv/bin/python
	$(PIP) --editable '.[docs]'
	touch $@

.venv/.dev: pyproject.toml constraints.txt | .venv/bin/python
	$(PIP) --editable '.[cpu,web,redis,otel,train,loadtest,docs,mtls,dev]'
	touch $@ .venv/.serve .venv/.docs

clean:
	rm -rf site docs/project .venv .venv-audit .venv-bench .venv-kserve .mypy_cache .ruff_cache .pytest_cache .hypothesis
