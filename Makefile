# make demo   the main job on real input, every command shown
# make test   lint and all tests (T=tests/mount/test_swap.py: some alone, without lint)
# make check  in half a minute, without root: lint, and the tests that mount nothing
# make lint   types, linter, formatter
# make bench  what it costs beside tmpfs, bindfs and pyfuse3's example: tables, JSON and plots (bench-quick: in a minute)
# make soak   mixed load with kills, swap and budget changes, for SECONDS (600)
# make install  for the machine, below PREFIX (/usr/local): commands and systemd units (make uninstall)
# make lock     note the versions in .venv as those to develop with
# They install what is missing (Debian, Ubuntu), as root or through sudo.

SUDO := $(shell [ "$$(id -u)" = 0 ] || echo sudo)
BIN := .venv/bin

.PHONY: demo test check check-tests lint format bench bench-quick soak setup lock install uninstall clean

SECONDS := 600
PREFIX := /usr/local

demo: setup
	$(SUDO) env PATH="$(CURDIR)/$(BIN):$$PATH" scripts/demo.sh

test: setup
	scripts/test.sh $(T)

check: setup
	@$(MAKE) --no-print-directory --jobs=2 --output-sync=target lint check-tests

check-tests: setup
	$(BIN)/python -m pytest -q tests/arithmetic tests/model tests/face tests/house/test_imports.py

lint: setup
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

format: setup
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

bench: setup
	$(SUDO) $(BIN)/python benchmarks/bench.py

bench-quick: setup
	$(SUDO) $(BIN)/python benchmarks/bench.py --quick

soak: setup
	$(SUDO) $(BIN)/python tests/soak.py --seconds $(SECONDS)

lock: setup
	$(BIN)/python -m pip --disable-pip-version-check freeze --exclude-editable >requirements-dev.lock

install: setup
	$(SUDO) env PREFIX="$(PREFIX)" scripts/install.sh

uninstall:
	$(SUDO) env PREFIX="$(PREFIX)" scripts/install.sh uninstall

setup: .venv/ready

.venv/ready: pyproject.toml scripts/setup.sh scripts/python.sh requirements-dev.lock
	scripts/setup.sh

clean:
	rm -rf .venv build dist *.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache
