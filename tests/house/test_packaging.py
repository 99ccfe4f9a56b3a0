"""The sdist and the wheel, built in one clean environment and installed in another."""

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from harness import REPOSITORY, children, mounts_below, remaining, run, wait_until

COMPILED = "ttmfs/fuse/compiled_requests"

VERSION = "98.7.6"
"""Written where the version stands, and nowhere else; it must then show everywhere."""

INSTALLED = """
bin/mount.fuse.ttmfs bin/mount.ttmfs bin/ttmfs bin/ttmfs-service
lib/systemd/system/ttmfs-export.service lib/systemd/system/ttmfs.slice lib/systemd/system/ttmfs@.service
lib/systemd/user/ttmfs@.service
share/bash-completion/completions/ttmfs share/zsh/site-functions/_ttmfs share/fish/vendor_completions.d/ttmfs.fish
share/doc/ttmfs/example.conf share/doc/ttmfs/example.mount
share/man/man1/ttmfs.1 share/man/man3/ttmfs.3 share/man/man5/ttmfs.5 share/man/man8/mount.ttmfs.8
share/ttmfs/alerts.yml share/ttmfs/dashboard.json
""".split()


def versioned() -> list[str]:
    """The files of the repository, without those that are for the repository itself."""
    listed = run("git -c safe.directory='*' ls-files -co --exclude-standard -z", cwd=REPOSITORY).split("\0")
    return [name for name in listed if name and name[0] != "." and (REPOSITORY / name).is_file()]


def environment(path: Path) -> Path:
    """An empty virtual environment. Returns its Python."""
    venv.create(path, symlinks=True)
    return path / "bin/python"


def pip(python: Path, words: str) -> None:
    run(f"{sys.executable} -m pip -q --disable-pip-version-check --python {python} {words}")


def scripts_directory(python: Path) -> str:
    """Where setuptools puts scripts, below build/."""
    code = "import sys; print('scripts-%d.%d' % sys.version_info[:2])"
    return run(f'{python} -c "{code}"').strip()


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The sdist, and the wheel made of it in a directory with the files of an earlier build."""
    directory = tmp_path_factory.mktemp("built")
    source, out = directory / "source", directory / "out"
    for name in versioned():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(REPOSITORY / name, source / name)
    version = source / "ttmfs/version.py"
    lines = version.read_text().splitlines()
    assert lines[-1].startswith("__version__ = ")
    version.write_text("\n".join([*lines[:-1], f'__version__ = "{VERSION}"', ""]))
    python = environment(directory / "clean")
    pip(python, "install 'setuptools>=77' 'cython>=3.1,<4'")
    build = "import sys, setuptools.build_meta as backend; getattr(backend, 'build_' + sys.argv[1])(sys.argv[2])"
    run(f'{python} -c "{build}" sdist {out}', cwd=source)
    run(f"tar -xzf {out}/ttmfs-{VERSION}.tar.gz", cwd=directory)
    checkout = directory / f"ttmfs-{VERSION}"
    for stale in "lib/ttmfs/stale.py", "lib/stale/__init__.py", f"{scripts_directory(python)}/stale.py":
        (checkout / "build" / stale).parent.mkdir(parents=True, exist_ok=True)
        (checkout / "build" / stale).write_text("#!/usr/bin/env python3\n")
    run(f'{python} -c "{build}" wheel {out}', cwd=checkout)
    (wheel,) = out.glob(f"ttmfs-{VERSION}-*.whl")
    return out / f"ttmfs-{VERSION}.tar.gz", wheel


@pytest.fixture(scope="module")
def installed(built: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The environment with the installed wheel. It borrows the dependencies of the tests' environment."""
    path = tmp_path_factory.mktemp("installed")
    python = environment(path)
    (packages,) = path.glob("lib/python3*/site-packages")
    (packages / "borrowed.pth").write_text(sysconfig.get_path("platlib") + "\n")
    pip(python, f"install --no-deps --no-index {built[1]}")
    return path


def test_the_sdist_holds_every_file_of_the_repository(built: tuple[Path, Path]) -> None:
    with tarfile.open(built[0]) as sdist:
        held = {name.partition("/")[2] for name in sdist.getnames()}
    assert {*versioned(), f"{COMPILED}.c"} <= held


def test_the_wheel_holds_the_typed_package_without_tests(built: tuple[Path, Path]) -> None:
    with zipfile.ZipFile(built[1]) as wheel:
        top = {name for name in wheel.namelist() if not name.startswith(f"ttmfs-{VERSION}.")}
    (compiled,) = (name for name in top if name.startswith(COMPILED) and name.endswith(".so"))
    source = {name for name in versioned() if name.startswith("ttmfs/") and not name.endswith((".pyx", ".pxd"))}
    assert top == source | {compiled}


@pytest.mark.parametrize("lacking", ["Cython", "a C compiler"])
def test_ttmfs_installs_without(built: tuple[Path, Path], tmp_path: Path, lacking: str) -> None:
    """Without Cython, the C of the sdist is compiled. Without a compiler there is no compiled module."""
    run(f"tar -xzf {built[0]}", cwd=tmp_path)
    python = environment(tmp_path / "clean")
    pip(python, "install 'setuptools>=77'")
    build = "import sys, setuptools.build_meta as backend; backend.build_wheel(sys.argv[1])"
    compiler = {"CC": "/bin/false"} if lacking == "a C compiler" else {}
    run(f'{python} -c "{build}" out', cwd=tmp_path / f"ttmfs-{VERSION}", env={**os.environ, **compiler})
    (wheel,) = (tmp_path / f"ttmfs-{VERSION}/out").glob("*.whl")
    with zipfile.ZipFile(wheel) as files:
        assert any(name.endswith(".so") for name in files.namelist()) == (not compiler)


def test_the_wheel_holds_nothing_of_an_earlier_build(built: tuple[Path, Path]) -> None:
    with zipfile.ZipFile(built[1]) as wheel:
        assert not [name for name in wheel.namelist() if "stale" in name]


def test_the_wheel_installs_every_module(installed: Path) -> None:
    for name in INSTALLED:
        assert (installed / name).is_file(), name
        assert os.access(installed / name, os.X_OK) == name.startswith("bin/"), name
    found = run(f"{installed}/bin/python -c 'import ttmfs; print(ttmfs.__file__)'", cwd=installed)
    assert found.startswith(str(installed))


@pytest.mark.parametrize("command", ["ttmfs", "python -m ttmfs", "ttmfs mount", "mount.ttmfs", "mount.fuse.ttmfs"])
def test_the_version_comes_from_one_place(installed: Path, command: str) -> None:
    assert run(f"{installed}/bin/{command} --version", cwd=installed) == f"ttmfs {VERSION}\n"


def test_python_m_ttmfs_is_the_command(installed: Path) -> None:
    for words in "--help", "rescue --help":
        by_module = run(f"{installed}/bin/python -m ttmfs {words}", cwd=installed)
        assert by_module == run(f"{installed}/bin/ttmfs {words}", cwd=installed)
    wrong = "rescue /nonexistent /nonexistent"
    assert "ttmfs rescue: /nonexistent: No such file" in run(f"{installed}/bin/python -m ttmfs {wrong}", code=2)


@pytest.fixture
def no_one_left() -> Iterator[None]:
    before = children()
    yield
    wait_until(lambda: not remaining(before), "the daemon's end")


@pytest.mark.usefixtures("no_one_left")
@pytest.mark.parametrize("command", ["ttmfs mount ttm mnt", "mount.ttmfs ttm mnt", "mount.fuse.ttmfs ttm mnt -t ttmfs"])
def test_the_installed_package_mounts(installed: Path, tmp_path: Path, mountpoint: Path, command: str) -> None:
    try:
        run(f"{installed}/bin/{command} -o size=1m; mkdir mnt/a; echo page >mnt/a/7", cwd=tmp_path)
        assert (mountpoint / "a/7").read_bytes()[:5] == b"page\n"
    finally:
        for path in mounts_below(tmp_path):
            subprocess.run(["fusermount3", "-u", "-z", path], check=False)


READ_ONLY = """
mount --make-rprivate /
mount --bind {room} {room}
# Not tac, which has a file in /tmp open to write.
findmnt -rno TARGET | sort -r | while read -r path; do
    case $path in {room}|/proc*|/sys*|/dev*) ;; *) mount -o remount,bind,ro "$path" || exit ;; esac
done
"""
"""Leaves one directory that can be written to."""


@pytest.fixture(scope="module")
def staged(built: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The DESTDIR of an installation below /opt/ttmfs, on a machine where nothing else can be written to."""
    room = tmp_path_factory.mktemp("staged")
    (room / "tmp").mkdir()
    variables = {"TMPDIR": f"{room}/tmp", "DESTDIR": f"{room}/root", "PREFIX": "/opt/ttmfs", "WHEELS": built[1].parent}
    words = " ".join(f"{name}={value}" for name, value in variables.items())
    script = f"{READ_ONLY.format(room=room)}{words} {REPOSITORY}/scripts/install.sh"
    done = subprocess.run(["unshare", "--mount", "sh", "-ec", script], capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stderr) == (0, ""), done.stdout + done.stderr
    assert not [*(room / "tmp").iterdir()]
    return room / "root"


def test_destdir_holds_everything_and_its_own_path_nowhere(staged: Path) -> None:
    assert {path.name for path in staged.iterdir()} == {"opt", "sbin"}
    assert {path.name for path in staged.glob("sbin/*")} == {"mount.ttmfs", "mount.fuse.ttmfs"}
    for path in staged.rglob("*"):
        if path.is_symlink():
            target = path.readlink()
            assert (
                not target.is_absolute() or target.is_relative_to("/opt/ttmfs/lib/ttmfs/bin") or "python" in path.name
            )
        elif path.is_file():
            assert bytes(staged.parent) not in path.read_bytes(), path
    unit = (staged / "opt/ttmfs/lib/systemd/system/ttmfs@.service").read_text()
    assert "\nExecStart=/opt/ttmfs/bin/ttmfs-service -o" in unit


def test_what_destdir_holds_works_in_its_final_place(staged: Path) -> None:
    script = f"mount --bind {staged}/opt /opt; exec /opt/ttmfs/bin/ttmfs --version"
    assert run(f"unshare --mount sh -ec '{script}'", cwd=staged) == f"ttmfs {VERSION}\n"


def test_uninstall_with_destdir_leaves_nothing(staged: Path, tmp_path: Path) -> None:
    run(f"cp -a {staged} {tmp_path}/root")
    variables = {"DESTDIR": f"{tmp_path}/root", "PREFIX": "/opt/ttmfs"}
    run(f"{REPOSITORY}/scripts/install.sh uninstall", env={**os.environ, **variables})
    assert not [path for path in (tmp_path / "root").rglob("*") if not path.is_dir()]


@pytest.mark.parametrize("variable", ["DESTDIR", "PREFIX", "SBIN", "LIBDIR", "UNITS"])
def test_install_refuses_relative_paths(variable: str) -> None:
    said = run(f"{REPOSITORY}/scripts/install.sh 2>&1", code=1, env={**os.environ, variable: "there"})
    assert said == "install: PREFIX, DESTDIR, SBIN, LIBDIR and UNITS must be absolute paths, not there\n"
