# make demo     run the main job on real input, and show every command
# make test     lint and all tests (T=tests/mount/test_swap.py: only these tests, without lint)
# make check    lint, and tests that mount nothing, also of the documents: half a minute, without root
# make lint     linter, formatter, types
# make format   fix what the formatter and the linter can
# make bench    compare with tmpfs and other FUSE filesystems: tables, JSON and plots (bench-quick: in a few minutes)
# make soak     mixed load with kills, swap and budget changes, for SECONDS (600)
# make soak-distributed  the same on a store on Ceph, with kills of its servers
# make install  install commands, systemd units and manual pages below PREFIX (/usr/local); make uninstall removes them
#               DESTDIR=DIR writes below DIR only, for packages
# make deb      build the Debian package for this release in dist/
# make test-packages  build and try the packages in clean chroots, which takes minutes (R=bookworm: only this release)
# make lock     write the versions in .venv to requirements-dev.lock
# Each target first installs what is missing (Debian, Ubuntu), as root or through sudo.

SUDO := $(shell [ "$$(id -u)" = 0 ] || echo sudo)
BIN := .venv/bin

.PHONY: demo test check check-tests lint format bench bench-quick libfuse-examples soak soak-distributed setup lock install uninstall deb test-packages clean

CHECKED := tests/arithmetic tests/model tests/face $(addprefix tests/house/test_,imports.py docs.py help.py man_pages.py)

SECONDS := 600
PREFIX := /usr/local

demo: setup
	$(SUDO) env PATH="$(CURDIR)/$(BIN):$$PATH" scripts/demo.sh

test: setup
	scripts/test.sh $(T)

check: setup
	@$(MAKE) --no-print-directory --jobs=2 --output-sync=target lint check-tests

check-tests: setup
	$(BIN)/python -m pytest -q $(CHECKED)

lint: setup
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

format: setup
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

bench: setup libfuse-examples
	$(SUDO) $(BIN)/python benchmarks/bench.py $(B)

bench-quick: setup libfuse-examples
	$(SUDO) $(BIN)/python benchmarks/bench.py --quick $(B)

libfuse-examples: setup
	@scripts/libfuse_examples.sh || echo "bench: continues without the examples of libfuse" >&2

soak: setup
	$(SUDO) $(BIN)/python tests/soak.py --seconds $(SECONDS)

soak-distributed: setup
	$(SUDO) $(BIN)/python tests/soak_distributed.py --seconds $(SECONDS)

lock: setup
	$(BIN)/python -m pip --disable-pip-version-check freeze --exclude-editable >requirements-dev.lock

install: setup
	$(SUDO) env PREFIX="$(PREFIX)" DESTDIR="$(DESTDIR)" scripts/install.sh

uninstall:
	$(SUDO) env PREFIX="$(PREFIX)" DESTDIR="$(DESTDIR)" scripts/install.sh uninstall

deb:
	scripts/deb.sh

test-packages:
	$(SUDO) scripts/test_packages.sh $(R)

setup: .venv/ready

.venv/ready: pyproject.toml scripts/setup.sh scripts/python.sh requirements-dev.lock
	scripts/setup.sh

clean:
	rm -rf .venv build dist *.egg-info ttmfs/fuse/*.c ttmfs/fuse/*.so .hypothesis .mypy_cache .pytest_cache .ruff_cache
