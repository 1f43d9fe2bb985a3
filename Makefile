# Everything a person types. Each command installs what it needs into .venv first; nothing else is touched.
PYTHON ?= python3
# Serving flavour: cpu, cuda or openvino (never two in one environment: docs/decisions/0001-onnxruntime-extras.md)
EXTRA ?= cpu
BIN := .venv/bin
RUN ?= runs/train
# A folder of images instead of the CIFAR-10 download: make train DATA=path
DATA_OPTION := $(if $(DATA),--data $(DATA))
PRESET ?= cpu
# Which of the models that ship `make export` replaces
MODEL ?= fast
BUDGET ?= default

.PHONY: help serve test lint format train evaluate export study bench torture screenshot docker pins sbom audit clean

help:  ## Show this list
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /\1\t/' | expand -t 12

serve: .venv/.serve-$(EXTRA)  ## Answer on http://127.0.0.1:8000 with the model that ships here
	@exec $(BIN)/convmixer serve

test: .venv/.dev  ## Run all tests, with coverage
	$(BIN)/pytest --cov --cov-report=term

lint: .venv/.dev  ## Check format, style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: .venv/.dev  ## Rewrite the code in the house style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

train: .venv/.dev  ## Train; PRESET=name DATA=folder RUN=folder INIT=checkpoint TEACHER="checkpoint …" SET="name=value …", resumes what RUN holds
	$(BIN)/convmixer-train train --preset $(PRESET) --output $(RUN) $(DATA_OPTION) $(if $(INIT),--init $(INIT)) $(addprefix --teacher ,$(TEACHER)) $(addprefix --set ,$(SET)) $(if $(wildcard $(RUN)/last.safetensors),--resume)

evaluate: .venv/.dev  ## Measure RUN's checkpoint on the test set
	$(BIN)/convmixer-train evaluate $(RUN)/model.safetensors $(DATA_OPTION)

export: .venv/.dev  ## Make RUN's evaluated checkpoint the MODEL that ships, as VERSION: artifact, checkpoint, model card
	@test -n "$(VERSION)" || { echo "give the model a new version: make export VERSION=1.12.0 PRESET=$(PRESET)" >&2; exit 1; }
	$(BIN)/convmixer-train export $(RUN)/model.safetensors app/artifacts/$(MODEL).onnx $(DATA_OPTION) --version $(VERSION) --command 'make train PRESET=$(PRESET)$(if $(DATA), DATA=$(DATA))$(if $(INIT), INIT=$(INIT))$(if $(TEACHER), TEACHER="$(TEACHER)")$(if $(SET), SET="$(SET)")'
	$(BIN)/convmixer-train card $(RUN)/model.safetensors app/artifacts/$(MODEL).onnx $(DATA_OPTION)
	mkdir -p releases/$(MODEL)
	cp $(RUN)/model.safetensors $(RUN)/model.json $(wildcard $(RUN)/evaluation*) releases/$(MODEL)/

study: .venv/.dev  ## Train what the paper claims as a grid of small networks and judge it (two to three hours); BUDGET=full for a GPU
	$(BIN)/convmixer-train study --budget $(BUDGET) $(DATA_OPTION)

bench: .venv/.dev  ## Server against the in-process limit, side by side (about three minutes)
	$(BIN)/python -m benchmarks.serve --output benchmarks/results/serve.json --plot docs/images/serve.png
	$(BIN)/python -m benchmarks.budget

torture: .venv/.dev  ## Attack the real server and rewrite docs/reliability.md (a quarter of an hour); SEEDS=folder of more files to damage
	$(BIN)/python -m torture $(if $(SEEDS),--seeds $(SEEDS))

screenshot: .venv/.dev  ## Take docs/images/page.png anew; needs Chromium (apt-get install chromium fonts-inter)
	$(BIN)/python -m tests.screenshot docs/images/page.png

docker:  ## Build the image; VARIANT=gpu for CUDA
	docker build -t convmixer-serve$(if $(VARIANT),:$(VARIANT)) $(if $(VARIANT),--build-arg VARIANT=$(VARIANT)) \
	  --build-arg VERSION=$$(sed -n 's/^__version__ = "\(.*\)"/\1/p' app/__init__.py) --build-arg REVISION=$$(git rev-parse HEAD) .

PIN = $(BIN)/uv pip compile --quiet --constraint constraints.txt --generate-hashes --python-platform linux --python-version 3.11 --no-annotate --no-header
pins: .venv/.release  ## Pin what the images install, with hashes, from pyproject.toml and constraints.txt
	$(PIN) pyproject.toml --extra cpu --extra otel --output-file requirements/cpu.txt
	$(PIN) pyproject.toml --extra cuda --extra otel --output-file requirements/gpu.txt
	$(BIN)/python -c "import tomllib; print(*tomllib.load(open('pyproject.toml', 'rb'))['build-system']['requires'], sep='\n')" | $(PIN) - --output-file requirements/build.txt

sbom: .venv/.release  ## Write sbom.cdx.json: what the CPU image holds (CycloneDX)
	$(PYTHON) -m venv --clear build/image
	build/image/bin/pip install --quiet --disable-pip-version-check --require-hashes -r requirements/cpu.txt
	$(BIN)/cyclonedx-py environment build/image --pyproject pyproject.toml --output-reproducible --output-file sbom.cdx.json

audit: .venv/.release  ## Ask the Python advisory database about what the images hold
	$(BIN)/pip-audit --requirement requirements/cpu.txt --requirement requirements/gpu.txt --disable-pip --require-hashes

clean:  ## Remove the environment and caches
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache .hypothesis .schemathesis .coverage* build *.egg-info

.venv/bin/python:
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed") if sys.version_info < (3, 11) else None'
	$(PYTHON) -m venv .venv

.venv/.serve-$(EXTRA): .venv/bin/python pyproject.toml constraints.txt
	@test -z "$(filter-out $@,$(wildcard .venv/.serve-*))" || { echo "this .venv has another onnxruntime; run 'make clean' first" >&2; exit 1; }
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[$(EXTRA)]'
	@touch $@

.venv/.release: .venv/bin/python pyproject.toml constraints.txt
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[release]'
	@touch $@

.venv/.dev: .venv/bin/python pyproject.toml constraints.txt
	@test -z "$(filter-out .venv/.serve-cpu,$(wildcard .venv/.serve-*))" || { echo "this .venv has another onnxruntime; run 'make clean' first" >&2; exit 1; }
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@ .venv/.serve-cpu
