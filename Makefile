PYTHON ?= python3
BIN := .venv/bin
MAKEFLAGS += --no-builtin-rules

.PHONY: quickstart test test-slow docs pictures check format

# What is installed is installed once: these files are newer than pyproject.toml until it changes.
.venv/installed: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet torch torchvision
	$(BIN)/pip install --quiet --editable .
	touch $@

.venv/installed-%: .venv/installed
	$(BIN)/pip install --quiet --editable '.[$*]'
	touch $@

# Pretrains on the bundled images, evaluates (open runs/quickstart/report.html), extracts features, fine-tunes.
quickstart: .venv/installed
	$(BIN)/manyviews pretrain quickstart output=runs/quickstart resume=true
	$(BIN)/manyviews evaluate runs/quickstart
	$(BIN)/manyviews extract runs/quickstart output=runs/features
	$(BIN)/manyviews finetune runs/quickstart fraction=0.1 resume=true

# By file, so that no two processes build the same fixtures.
test: .venv/installed-test
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow"

test-slow: .venv/installed-test
	$(BIN)/python -m pytest -m slow

docs: .venv/installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

# The pictures in docs/, of a quickstart and a facenet run (minutes); the report's needs Chromium.
pictures: .venv/installed-test
	$(BIN)/manyviews pretrain quickstart output=runs/pictures resume=true
	$(BIN)/manyviews evaluate runs/pictures tasks=knn,linear
	cp runs/pictures/views.png docs/images/views.png
	$(BIN)/python scripts/picture.py runs/pictures docs/images/report.png
	$(BIN)/manyviews pretrain facenet train.epochs=2 output=runs/sampling resume=true
	cp runs/sampling/sampling.png docs/images/sampling.png
	$(BIN)/python scripts/benchmark.py distances_on_sphere --picture docs/images/distances_on_sphere.png

check: .venv/installed-test
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: .venv/installed-test
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
