# make demo     run the main job on real input, and show every command
# make test     lint and all tests (T=tests/mount/test_swap.py: only these tests, without lint)
# make check    lint, and tests that mount nothing, also of the documents: half a minute, without root
# make test-torch  test ttmfs.torch with PyTorch (some GB), which it installs in TORCH (build/torch)
# make lint     linter, formatter, types
# make format   fix what the formatter and the linter can
# make bench    compare with tmpfs and other FUSE filesystems: tables, JSON and plots (bench-quick: in a few minutes)
# make site     build the documentation as a site, in build/site; a dead link is an error
# make test-qemu  a virtual machine whose memory is a backup (installs qemu-system-x86)
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

.PHONY: demo test test-qemu test-torch test-packages check check-tests lint format bench bench-quick libfuse-examples
.PHONY: site soak soak-distributed setup lock install uninstall deb clean

CHECKED := tests/arithmetic tests/model tests/face $(addprefix tests/house/test_,imports.py docs.py help.py man_pages.py)

SECONDS := 600
PREFIX := /usr/local
TORCH := build/torch

demo: setup
	$(SUDO) env PATH="$(CURDIR)/$(BIN):$$PATH" scripts/demo.sh

test: setup
	scripts/test.sh $(T)

test-torch: setup $(TORCH)/bin/torchrun
	$(SUDO) unshare --mount --pid --fork --mount-proc --propagation private \
		$(TORCH)/bin/python -m pytest -q -p no:cacheprovider tests/with_torch.py

# With the packages of .venv, too.
$(TORCH)/bin/torchrun:
	$(BIN)/python -m venv $(TORCH)
	$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("platlib"))' >"$$(echo $(TORCH)/lib/python3*/site-packages)/borrowed.pth"
	$(TORCH)/bin/python -m pip install -q torch

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

site: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

test-qemu: setup
	command -v qemu-system-x86_64 >/dev/null || $(SUDO) apt-get install -y -qq --no-install-recommends qemu-system-x86
	scripts/test.sh tests/qemu

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
