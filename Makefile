.PHONY: format check test test-slow

format:
	ruff format .
	ruff check --fix .

check:
	ruff format --check .
	ruff check .
	mypy

test:
	python -m pytest -n 2 -m "not slow"

test-slow:
	python -m pytest -m slow
