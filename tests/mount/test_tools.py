"""Ordinary tools work on the mount. What one cannot do gives an error and loses nothing."""

import errno
import hashlib
import mmap
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import numpy as np
import pytest

from harness import Mount, raises_errno, run, wait_until

PAGE = mmap.PAGESIZE
PAGES = 1024  # of each backup here
REAL = Path(sys.executable).resolve().read_bytes()  # what is copied about: a program
IMAGE = REAL[: 40 * PAGE + 1000]


def page(n: int) -> bytes:
    """A page of real bytes. No two are equal."""
    return REAL[n * PAGE : (n + 1) * PAGE]


class Shell(Protocol):
    """Runs a command in the root of the mount. Returns both output streams."""

    def __call__(self, command: str, code: int = 0, **environment: object) -> str: ...


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """One mount for this module. At its end its log must hold only the lines of a normal life."""
    with Mount(tmp_path_factory.mktemp("tools"), f"size=32m,backup_size={PAGES * PAGE}") as mounted:
        yield mounted.path


@pytest.fixture
def a(root: Path) -> Iterator[Path]:
    """An empty backup, MNT/a. All backups are emptied and removed at the end of each test."""
    (root / "a").mkdir()
    yield root / "a"
    for backup in root.iterdir():
        os.truncate(backup / ".image", 0)
        backup.rmdir()


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """A directory outside, $O: `in` holds the pages 1 to 16, and `src` is not a whole number of pages."""
    (tmp_path / "in").mkdir()
    for n in range(1, 17):
        (tmp_path / "in" / str(n)).write_bytes(page(n))
    (tmp_path / "src").write_bytes(IMAGE)
    return tmp_path


@pytest.fixture
def sh(root: Path, out: Path) -> Shell:
    def shell(command: str, code: int = 0, **environment: object) -> str:
        given = {"O": out, "P": PAGE, "PYTHON": sys.executable, "LC_ALL": "C", **environment}
        return run(
            f"set -eo pipefail; {command}", cwd=root, code=code, env=os.environ | {k: str(v) for k, v in given.items()}
        )

    return shell


@pytest.fixture
def full(a: Path, sh: Shell) -> Path:
    """MNT/a with the pages 1 to 16."""
    sh("cp $O/in/* a/")
    return a


def names(directory: Path) -> list[str]:
    return sorted(os.listdir(directory), key=lambda name: (len(name), name))


def numbers(last: int) -> list[str]:
    return [str(n) for n in range(1, last + 1)]


def contents(directory: Path) -> dict[str, bytes]:
    return {name: (directory / name).read_bytes() for name in names(directory)}


def holds_input(directory: Path) -> bool:
    """Whether a directory holds the pages 1 to 16, and only these."""
    return contents(directory) == {str(n): page(n) for n in range(1, 17)}


# --- a page, in and out ---

PAGE_IN = """
cp $S $D
cp -p $S $D
cp -a $S $D
cp -f --remove-destination $S $D
cp --sparse=always $S $D
cp $S $O/t && mv $O/t $D
install $S $D
install -C $S $D
install -D -p -m 600 $S $D
cat $S >$D
tee $D <$S >/dev/null
dd if=$S of=$D bs=$P status=none
dd if=$S of=$D bs=100 conv=notrunc status=none
dd if=$S of=$D bs=$P oflag=sync status=none
dd if=$S of=$D bs=$P oflag=dsync conv=notrunc status=none
dd if=$S of=$D bs=$P iflag=direct oflag=direct status=none
dd if=$S of=$D bs=1000 conv=fsync status=none
xxd $S | xxd -r - $D
split -b $P --filter='cat >$D' $S
rsync -a --inplace --checksum $S $D
tar c -C $O/in ${S##*/} --transform s/.*/7/ | tar x -C a
tar c -C $O/in ${S##*/} --transform s/.*/7/ | tar xp --overwrite -C a
$PYTHON -c 'import shutil, sys; shutil.copy(*sys.argv[1:])' $S $D
$PYTHON -c 'import shutil, sys; shutil.copy2(*sys.argv[1:])' $S $D
cp $S $O/t && $PYTHON -c 'import shutil, sys; shutil.move(*sys.argv[1:])' $O/t $D
"""


@pytest.mark.parametrize("command", PAGE_IN.strip().splitlines())
def test_c2_c4_tools_store_and_overwrite_a_page(a: Path, out: Path, sh: Shell, command: str) -> None:
    for n in 3, 5:
        sh(command, S=out / "in" / str(n), D="a/7")
        assert contents(a) == {"7": page(n)}


PAGE_OUT = """
cp $S $D
cp -p $S $D
cp -a $S $D
cp --sparse=always $S $D
install $S $D
cat $S >$D
head -c $P $S >$D
tail -c $P $S >$D
tee $D <$S >/dev/null
dd if=$S of=$D bs=$P status=none
dd if=$S of=$D bs=$P iflag=direct status=none
dd if=$S of=$D bs=100 status=none
xxd -p $S | xxd -r -p >$D
split -b 1000 $S $O/part. && cat $O/part.* >$D
rsync -a --ignore-times $S $D
tar c a | tar x -O $S >$D
$PYTHON -c 'import shutil, sys; shutil.copy2(*sys.argv[1:])' $S $D
"""


@pytest.mark.parametrize("command", PAGE_OUT.strip().splitlines())
def test_c8_tools_copy_a_page_out_and_it_stays(full: Path, out: Path, sh: Shell, command: str) -> None:
    for n in 3, 5:
        sh(command, S=f"a/{n}", D=out / "copy")
        assert (out / "copy").read_bytes() == page(n)
    assert holds_input(full)


@pytest.mark.parametrize("command", ["mv", "$PYTHON -c 'import shutil, sys; shutil.move(*sys.argv[1:])'"])
def test_c12_mv_of_a_page_copies_and_drops(full: Path, root: Path, out: Path, sh: Shell, command: str) -> None:
    sh(f"mkdir b; {command} a/3 $O/copy; {command} a/5 a/700; {command} a/700 b/2; {command} $O/copy b/1")
    assert names(full) == [n for n in numbers(16) if n not in ("3", "5")]
    assert contents(root / "b") == {"1": page(3), "2": page(5)}
    assert not (out / "copy").exists()


# --- a whole backup ---


@pytest.mark.parametrize("flags", ["-r", "-rp", "-a", "-r --sparse=always"])
def test_c8_cp_copies_a_backup_out_and_back(full: Path, root: Path, out: Path, sh: Shell, flags: str) -> None:
    """It is also copied over a backup with one page that must go and one that must stay."""
    sh(f"cp {flags} a $O/copy; cp {flags} $O/copy b; diff -r a b; diff -r a $O/copy")
    assert holds_input(out / "copy")
    assert holds_input(root / "b")
    sh(f"cp b/1 b/2; cp b/1 b/17; cp {flags} $O/copy/. b/; cmp b/2 a/2; cmp b/17 a/1")
    assert names(root / "b") == numbers(17)
    assert holds_input(full)


def test_mv_renames_a_backup(full: Path, root: Path, out: Path, sh: Shell) -> None:
    sh("mv a b")
    assert holds_input(root / "b")
    assert not full.exists()
    sh("mv b $O/b")
    assert holds_input(out / "b")
    assert names(root) == []
    sh("mv $O/b c")
    assert holds_input(root / "c")
    assert not (out / "b").exists()


@pytest.mark.usefixtures("full")
def test_a_copy_keeps_the_times_and_the_mode_of_the_backup(sh: Shell) -> None:
    """A page has no times or mode of its own: cp -p may set them, which changes nothing."""
    sh("chmod 750 a; touch -d '2020-01-01 12:00 UTC' a; cp -a a $O/copy; cp -a $O/copy b; chmod 600 b/1")
    told = sh("cd $O; stat -c '%n %a %Y' copy copy/1; cd -; stat -c '%n %a %Y' b b/1").splitlines()
    assert told[0::3] == ["copy 750 1577880000", "b 750 1577880000"]
    assert told[1] == "copy/1 640 1577880000"
    assert told[4] == "b/1 640 1577880000"
    sh("cp -p $O/in/1 b/1; touch -d 2001-01-01 b/2")
    assert float(sh("stat -c %Y b/2")) > 1577880000  # the backup's: it was written just now


# --- .image ---

IMAGE_IN = """
cp $S $D
cp --sparse=always $S $D
cat $S >$D
tee $D <$S >/dev/null
dd if=$S of=$D bs=1M status=none
dd if=$S of=$D bs=1000 conv=notrunc status=none
dd if=$S of=$D bs=4k oflag=direct status=none
dd if=$S of=$D bs=64k oflag=sync status=none
rsync --inplace --ignore-times $S $D
rsync --inplace --ignore-times --sparse $S $D
tar cS -C ${S%/*} ${S##*/} --transform s/.*/.image/ | tar x --overwrite -C a
$PYTHON -c 'import shutil, sys; shutil.copyfile(*sys.argv[1:])' $S $D
split -b $P --numeric-suffixes=1 -a 4 --filter='cat >a/$(expr $FILE + 0)' $S ''
"""


@pytest.mark.parametrize("command", IMAGE_IN.strip().splitlines())
def test_c2_tools_write_an_image(a: Path, out: Path, sh: Shell, command: str) -> None:
    sh(command, S=out / "src", D="a/.image")
    assert names(a) == numbers(41)
    assert sh("cmp -n $(stat -c %s $O/src) a/.image $O/src") == ""
    assert b"".join((a / n).read_bytes() for n in numbers(41)) == IMAGE + bytes(PAGE - 1000)


@pytest.mark.parametrize(
    ("command", "sparse"),
    [
        ("cp $S $D", False),
        ("cp -a $S $D", False),
        ("cp --sparse=always $S $D", True),
        ("cat $S >$D", False),
        ("dd if=$S of=$D bs=1M status=none", False),
        ("dd if=$S of=$D bs=4k iflag=direct conv=sparse status=none", True),
        ("rsync -a --sparse $S $D", True),
        ("tar cS $S | tar xS -C $O --transform s/.*/copy/", True),
        ("mkdir b; cp $S b/.image; cp b/.image $D", False),
        ("mkdir b; cp --sparse=always $S b/.image; diff -r a b; cp b/.image $D", False),
    ],
)
def test_c8_tools_copy_an_image_out(a: Path, out: Path, sh: Shell, command: str, sparse: bool) -> None:
    """Holes read as zeros, and take no room in a sparse copy."""
    (a / "3").write_bytes(page(3))
    (a / "1024").write_bytes(page(9))
    sh(command, S="a/.image", D=out / "copy")
    copy = bytearray(PAGES * PAGE)
    copy[2 * PAGE : 3 * PAGE], copy[1023 * PAGE :] = page(3), page(9)
    assert (out / "copy").read_bytes() == copy
    assert not sparse or (out / "copy").stat().st_blocks * 512 < len(copy) // 4
    assert names(a) == ["3", "1024"]


def test_dd_writes_pages_of_an_image_in_place(full: Path, sh: Shell) -> None:
    """It uses conv=notrunc. seek counts pages from 0, names count from 1."""
    sh("dd if=$O/src of=a/.image bs=$P seek=4 skip=30 count=2 conv=notrunc status=none")
    assert contents(full) == {str(n): IMAGE[(n + 25) * PAGE :][:PAGE] if n in (5, 6) else page(n) for n in range(1, 17)}
    sh("dd if=a/.image of=$O/five bs=$P skip=4 count=1 status=none; cmp $O/five a/5")
    sh("dd if=$O/src of=a/.image bs=$P count=1 status=none")  # without it, all the others are dropped
    assert contents(full) == {"1": page(0)}


def test_writing_zeros_stores_pages_and_seeking_over_them_does_not(a: Path, sh: Shell) -> None:
    sh("dd if=/dev/zero of=a/.image bs=$P count=3 status=none")
    assert names(a) == ["1", "2", "3"]
    sh("dd if=/dev/zero of=a/.image bs=$P count=3 conv=sparse status=none")
    assert names(a) == []
    sh(
        "head -c $P /dev/zero >$O/zero; cp --sparse=always $O/zero a/4; "
        "dd if=$O/zero of=a/5 bs=$P conv=sparse status=none"
    )
    assert contents(a) == {"4": bytes(PAGE), "5": bytes(PAGE)}  # a page file was made, so there is a page


@pytest.mark.parametrize(
    ("command", "stored"),
    [
        ("dd if=$O/src of=a/.image bs=$P seek=1023 count=2 conv=notrunc", True),
        ("dd if=$O/src of=a/.image bs=$((2*P)) oflag=seek_bytes seek=$((1023*P)) count=1 conv=notrunc", True),
        ("dd if=$O/src of=a/.image bs=$P seek=1024 count=1 conv=notrunc", False),
        ("dd if=$O/src of=a/.image bs=1 oflag=seek_bytes seek=$((1024*P)) count=1 conv=notrunc", False),
        ("cat $O/src >>a/.image", False),
    ],
)
def test_c6_c10_a_write_across_the_end_of_an_image_is_short(full: Path, sh: Shell, command: str, stored: bool) -> None:
    """The tool then tries the rest and gets an error."""
    assert os.strerror(errno.EFBIG) in sh(command, code=1)
    if stored:
        assert (full / "1024").read_bytes() == page(0)
        (full / "1024").unlink()
    assert holds_input(full)


# --- tar ---


@pytest.mark.parametrize("flags", ["", "-p", "--overwrite", "-p --no-same-owner"])
def test_c2_tar_extracts_into_backups(full: Path, root: Path, sh: Shell, flags: str) -> None:
    """It extracts into a new backup, over the pages of an existing one, and into one of another name."""
    sh("chmod 710 a; touch -d 2020-01-01 a; tar cf $O/a.tar a; tar df $O/a.tar; rm -r a")
    sh(f"tar xf $O/a.tar {flags}; tar df $O/a.tar")
    assert holds_input(full)
    assert sh("stat -c %a a a/1").split() == ["710", "600"]
    sh(f"cp a/1 a/2; cp a/1 a/17; tar xf $O/a.tar {flags}; tar df $O/a.tar; cmp a/17 a/1; rm a/17")
    assert holds_input(full)
    sh(f"mkdir b; tar xf $O/a.tar {flags} -C b --strip-components=1")
    assert holds_input(root / "b")


def test_tar_sees_pages_only_and_an_image_if_it_is_named(full: Path, sh: Shell) -> None:
    assert sorted(sh("tar c . | tar t").split()) == sorted(["./", "./a/", *(f"./a/{n}" for n in numbers(16))])
    sh("tar cSf $O/image.tar -C a .image; rm a/*")
    assert "Cannot open: File exists" in sh("tar xf $O/image.tar -C a", code=2)  # it unlinks first, which cannot be
    assert names(full) == []
    sh("tar xf $O/image.tar -C a --overwrite")
    assert holds_input(full)


@pytest.mark.usefixtures("full")
def test_tar_works_straight_after_a_page_was_overwritten(sh: Shell) -> None:
    """tar compares a directory's times before and after reading it, so cached times would disturb it."""
    sh("stat a a/1; cp a/2 a/1; tar cf $O/a.tar a; tar df $O/a.tar")


# --- rsync ---


def transferred(told: str) -> list[str]:
    return re.findall(r"^[<>]f\S+ (.*)", told, re.MULTILINE)


def test_c2_rsync_copies_into_a_backup(a: Path, sh: Shell) -> None:
    """The times of pages do not show changes, so it uses --checksum."""
    rsync = "rsync -a --inplace --checksum --itemize-changes $O/in/ a/"
    assert sorted(transferred(sh(rsync))) == sorted(numbers(16))
    assert holds_input(a)
    assert transferred(sh(rsync)) == []
    sh("cp a/1 a/2; rm a/4; cp a/1 a/1000; touch -r $O/in/2 a")
    assert transferred(sh(rsync + " --delete")) == ["2", "4"]
    assert holds_input(a)


def test_c8_rsync_copies_out_of_a_backup(full: Path, out: Path, sh: Shell) -> None:
    """It compares fractions of seconds (-@-1), or it would skip a page written in the second of the last run."""
    rsync = "rsync -a -@-1 --itemize-changes a/ $O/copy/"
    assert sorted(transferred(sh(rsync))) == sorted(numbers(16))
    assert transferred(sh(rsync)) == []
    assert holds_input(out / "copy")
    sh("cp a/1 a/2; dd if=a/3 of=a/.image bs=$P seek=3 conv=notrunc status=none; rm a/5")
    sh(rsync + " --delete")
    assert contents(out / "copy") == contents(full)
    assert names(out / "copy") == [n for n in numbers(16) if n != "5"]


def test_rsync_copies_from_backup_to_backup(full: Path, root: Path, sh: Shell) -> None:
    """All pages of a backup have the same times, so times are enough, and a second run transfers nothing."""
    rsync = "rsync -a -@-1 --inplace --itemize-changes a/ b/"
    assert sorted(transferred(sh(rsync))) == sorted(numbers(16))
    assert holds_input(root / "b")
    assert transferred(sh(rsync)) == []
    assert holds_input(full)


@pytest.mark.usefixtures("full")
def test_rsync_copies_an_image(root: Path, sh: Shell) -> None:
    """It writes all of it, zeros too, unless it may compare (--no-whole-file)."""
    rsync = "rsync --inplace --checksum --itemize-changes"
    sh(f"mkdir b; {rsync} a/.image $O/image; {rsync} $O/image b/.image; cmp a/.image b/.image")
    assert names(root / "b") == numbers(PAGES)
    rsync += " --no-whole-file $O/image b/.image"
    sh(f"truncate -s 0 b/.image; {rsync}")
    assert holds_input(root / "b")
    assert transferred(sh(rsync)) == []


def test_c6_rsync_that_ran_out_of_room_can_continue(mountpoint: Path, sh: Shell) -> None:
    rsync = f"rsync -a --inplace --checksum $O/in/ {mountpoint}/a/"
    with Mount(mountpoint, f"size={8 * PAGE},backup_size={64 * PAGE}"):
        (mountpoint / "a").mkdir()
        assert "No space left on device (28)" in sh(rsync, code=23)
        there = contents(mountpoint / "a")
        assert len(there) == 8
        assert all(there[n] == page(int(n)) for n in there)
        sh(f"setfattr -n user.ttmfs.size -v $((16*P)) {mountpoint}; {rsync}")
        assert holds_input(mountpoint / "a")


# --- tools that look ---


def test_c8_sha256sum_reads_pages(full: Path, sh: Shell) -> None:
    wanted = [f"{hashlib.sha256(page(n)).hexdigest()}  a/{n}" for n in range(1, 17)]
    assert sorted(sh("sha256sum a/* | tee $O/sums").splitlines()) == sorted(wanted)
    assert hashlib.sha256((full / ".image").read_bytes()).hexdigest() in sh("sha256sum a/.image")
    assert (
        sh(
            "sha256sum --quiet -c $O/sums; cmp a/3 $O/in/3; (cd a; md5sum *) >$O/md5; "
            "cd $O/in; md5sum --quiet -c $O/md5"
        )
        == ""
    )
    sh("cp a/1 a/2")
    assert sh("sha256sum --quiet -c $O/sums", code=1).startswith("a/2: FAILED")
    assert sh("cmp a/3 a/4", code=1).startswith("a/3 a/4 differ: ")


@pytest.mark.parametrize(
    ("expression", "found"),
    [
        ("a -type f", numbers(16)),
        ("a -type d", ["a"]),
        ("a -type f -size ${P}c", numbers(16)),
        ("a -type f -size +${P}c", []),
        ("a -name '1?'", ["10", "11", "12", "13", "14", "15", "16"]),
        ("a -path 'a/[23]'", ["2", "3"]),
        ("a -newer $O/old -type f", numbers(16)),
        ("a -newer $O/new", []),
        ("a -links 1 -perm 640 -uid $(id -u)", numbers(16)),
        ("a -empty", []),
        ("a/.image -size $((1024*P))c", [".image"]),
        ("a -inum $(stat -c %i a/3)", ["3"]),
        ("a -samefile a/3", ["3"]),
        ("a -type f -name '?' -delete -o -type f", ["10", "11", "12", "13", "14", "15", "16"]),
    ],
)
def test_find_selects_pages(full: Path, sh: Shell, expression: str, found: list[str]) -> None:
    sh("chmod 750 a; touch -d '-1 hour' $O/old; touch -d '+1 hour' $O/new")
    told = sh(f"find {expression} -printf '%f\\n'").split()
    assert sorted(told) == sorted(found)
    left = [n for n in numbers(16) if "-delete" not in expression or len(n) == 2]
    assert names(full) == left


def test_c12_find_delete_drops_every_page(full: Path, sh: Shell) -> None:
    sh("find a -delete")
    assert not full.exists()


@pytest.mark.usefixtures("full")
def test_c12_du_df_and_ls_agree_at_once(sh: Shell) -> None:
    """They agree even if cached attributes were read a moment before."""

    def counts() -> set[int]:
        told = """
            find . -type f | wc -l
            ls -s --block-size=$P a b | awk '/^total/ { n += $2 } END { print n }'
            du -s --block-size=$P . | cut -f1
            du -c --block-size=$P a/.image b/.image | tail -1 | cut -f1
            du -s --block-size=$P a/.shmem b/.shmem | awk '{ n += $1 } END { print n }'
            df --block-size=$P --output=used . | tail -1
            echo $(($(stat -f -c %b .) - $(stat -f -c %f .)))
            echo $((8192 - $(df --block-size=$P --output=avail . | tail -1)))
            echo $(($(getfattr --only-values -n user.ttmfs.pages a) + $(getfattr --only-values -n user.ttmfs.pages b)))
        """
        return set(map(int, sh(told).split()))

    sh("mkdir b")
    assert counts() == {16}
    sh("cp a/1 b/900")
    assert counts() == {17}
    sh("rm a/1 a/2")
    assert counts() == {15}
    sh("head -c $((20*P)) /dev/zero >b/.image")
    assert counts() == {34}
    sh("truncate -s 0 b/.image; setfattr -n user.ttmfs.drop -v 3-14 a")
    assert counts() == {2}
    assert sh("du --apparent-size --block-size=1 a").split()[0] == str(2 * PAGE)


@pytest.mark.usefixtures("full")
def test_stat_shows_pages_and_backups(sh: Shell) -> None:
    sh("chmod 755 a")
    me = f"{os.getuid()} {os.getgid()}"
    assert sh("stat -c '%s %b %o %h %a %u %g %F' a/3") == f"{PAGE} {PAGE // 512} {PAGE} 1 644 {me} regular file\n"
    assert sh("stat -c '%s %b %h %a %u %g %F' a/.image") == f"{PAGES * PAGE} {PAGE // 32} 1 644 {me} regular file\n"
    assert sh("stat -c '%h %a %u %g %F' a") == f"2 755 {me} directory\n"
    assert sh("stat -c '%a %F %s %b' a/.shmem") == f"600 regular file {PAGES * PAGE} {PAGE // 32}\n"
    assert sh("stat -c '%h %F' .; stat -c %F .stats") == "3 directory\nregular file\n"
    assert sh("stat -f -c '%S %s %b %f %l' .") == f"{PAGE} {PAGE} 8192 8176 255\n"
    assert len(set(sh("stat -c '%Y %Z' a a/3 a/.image").splitlines())) == 1


def test_xxd_reads_and_writes_at_an_offset(full: Path, sh: Shell) -> None:
    assert sh("xxd -s $((4*P+7)) -l 9 -p a/.image; xxd -s 7 -l 9 -p a/5") == 2 * (page(5)[7:16].hex() + "\n")
    sh("printf '10: 74746d' | xxd -r - a/5")  # a patch in place
    assert (full / "5").read_bytes() == page(5)[:16] + b"ttm" + page(5)[19:]


# --- tools that change little ---


def test_touch_creates_pages_and_sets_backup_times(full: Path, sh: Shell) -> None:
    sh("touch a/17 a/3; touch -c a/18; touch -d 2020-01-01 a/3")
    assert names(full) == numbers(17)
    assert (full / "17").read_bytes() == bytes(PAGE)
    assert (full / "3").read_bytes() == page(3)
    assert int(sh("stat -c %Y a/3")) > 1577880000
    sh("touch -d '2020-01-01 12:00 UTC' a")
    assert sh("stat -c %Y a a/3 a/17").split() == ["1577880000"] * 3


def test_truncate_of_a_page_zeroes_its_rest(full: Path, sh: Shell) -> None:
    sh("truncate -s 100 a/3; truncate -s 0 a/4; truncate -s $P a/5 a/900; truncate -s -4 a/6; : >a/7")
    there = contents(full)
    assert there["3"] == page(3)[:100] + bytes(PAGE - 100)
    assert there["4"] == there["7"] == there["900"] == bytes(PAGE)
    assert there["5"] == page(5)
    assert there["6"] == page(6)[:-4] + bytes(4)
    assert {(full / name).stat().st_size for name in there} == {PAGE}


def test_c12_truncate_of_an_image_drops_pages(full: Path, sh: Shell) -> None:
    sh("stat a/3; truncate -s $((P+100)) a/.image")
    assert contents(full) == {"1": page(1), "2": page(2)[:100] + bytes(PAGE - 100)}
    assert not (full / "3").exists()
    assert (full / ".image").stat().st_size == PAGES * PAGE
    sh("truncate -s 0 a/.image; rmdir a")


def test_sync_succeeds(full: Path, sh: Shell) -> None:
    """C5: writeback is best effort, and never an error."""
    sh("sync a/1 a/.image a; sync -d a/1; sync -f a")
    assert holds_input(full)


# --- extended attributes ---


@pytest.mark.usefixtures("full")
def test_getfattr_shows_the_attributes(sh: Shell) -> None:
    sh("rm a/4 a/9 a/10")

    def get(name: str, where: str = "a") -> str:
        return sh(f"getfattr --only-values -n user.ttmfs.{name} {where}")

    assert get("size") == str(PAGES * PAGE)
    assert get("pages") == "13"
    assert int(get("resident")) + int(get("swapped")) == 13
    assert get("map") == "1-3,5-8,11-16"
    assert get("page_size", ".") == str(PAGE)
    assert get("size", ".") == str(32 << 20)
    assert int(get("bytes_avail", ".")) <= 1024 * int(sh("awk '/SwapTotal/ { print $2 }' /proc/meminfo"))
    assert sh("getfattr -d -m - . a a/1 a/.image") == ""  # hidden, so that no tool copies them
    for name, where in ("drop", "a"), ("other", "a"), ("size", "a/1"), ("pages", "."):
        assert "No such attribute" in sh(f"getfattr -n user.ttmfs.{name} {where}", code=1)


def test_c12_setfattr_drops_pages(full: Path, sh: Shell) -> None:
    sh("stat a/3; setfattr -n user.ttmfs.drop -v 1-3,5,900-1024 a")
    assert contents(full) == {n: page(int(n)) for n in numbers(16) if n not in ("1", "2", "3", "5")}


def test_setfattr_resizes_a_backup(full: Path, sh: Shell) -> None:
    for pages in 2 * PAGES, 16:
        assert os.stat(full / ".image").st_size  # looked at a moment ago
        sh("setfattr -n user.ttmfs.size -v $((N*P)) a", N=pages)
        assert sh("stat -c %s a/.image; wc -c <a/.image").split() == [str(pages * PAGE)] * 2
    assert os.strerror(errno.EINVAL) in sh("setfattr -n user.ttmfs.size -v $((15*P)) a", code=1)
    assert os.strerror(errno.EFBIG) in sh("touch a/17", code=1)
    assert holds_input(full)


def test_c16_setfattr_changes_the_budget(full: Path, sh: Shell) -> None:
    sh("setfattr -n user.ttmfs.size -v $((16*P)) .")
    try:
        assert os.strerror(errno.ENOSPC) in sh("touch a/17", code=1)
        assert sh("df --block-size=$P --output=size,avail . | tail -1").split() == ["16", "0"]
        assert os.strerror(errno.EINVAL) in sh("setfattr -n user.ttmfs.size -v $((15*P)) .", code=1)
    finally:
        sh("setfattr -n user.ttmfs.size -v 32m .")
    assert holds_input(full)


# --- .shmem ---


def test_c12_fallocate_punches_pages_out_of_shmem(full: Path, sh: Shell) -> None:
    sh("fallocate -p -o $((2*P)) -l $((3*P)) a/.shmem")
    left = [n for n in numbers(16) if n not in ("3", "4", "5")]
    assert sh("getfattr --only-values -n user.ttmfs.map a") == "1-2,6-16"
    assert sh("dd if=a/.image bs=$P skip=2 count=3 status=none | tr -d '\\0' | wc -c").strip() == "0"
    wait_until(lambda: names(full) == left and not (full / "3").exists(), "the names to go")
    assert contents(full) == {n: page(int(n)) for n in left}


@pytest.mark.usefixtures("full")
def test_dd_and_cp_work_on_shmem(root: Path, out: Path, sh: Shell) -> None:
    """cp finds the holes by SEEK_HOLE.

    Writing needs conv=notrunc, or a truncate afterwards, since the size is the backup's.
    """
    sh("cp a/.shmem $O/plain; cp --sparse=always a/.shmem $O/sparse; cmp a/.image $O/plain; cmp a/.image $O/sparse")
    for copy in "plain", "sparse":
        assert (out / copy).stat().st_blocks * 512 < 32 * PAGE
    sh("mkdir b; cp --sparse=always $O/plain b/.shmem")
    wait_until(lambda: holds_input(root / "b"), "the names to come")
    sh("dd if=$O/src of=b/.shmem bs=$P seek=4 count=1 conv=notrunc status=none")
    assert (root / "b" / "5").read_bytes() == page(0)
    sh("head -c 100 $O/src >b/.shmem; truncate -s $((1024*P)) b/.shmem")
    wait_until(lambda: names(root / "b") == ["1"], "the names to go")
    assert (root / "b" / ".image").stat().st_size == PAGES * PAGE


def test_seek_data_and_hole_work_on_shmem(full: Path) -> None:
    (full / "900").write_bytes(page(9))
    fd = os.open(full / ".shmem", os.O_RDONLY)
    try:
        found = [os.lseek(fd, 0, os.SEEK_DATA), os.lseek(fd, 0, os.SEEK_HOLE), os.lseek(fd, 16 * PAGE, os.SEEK_DATA)]
    finally:
        os.close(fd)
    assert found == [0, 16 * PAGE, 899 * PAGE]


def test_numpy_memmap_of_shmem_shares_the_memory(full: Path) -> None:
    """Each side reads at once what the other writes."""
    pages = np.memmap(full / ".shmem", mode="r+").reshape(-1, PAGE)
    assert pages.shape == (PAGES, PAGE)
    assert pages[4].tobytes() == page(5)
    pages[4] = pages[2]
    assert (full / "5").read_bytes() == page(3)
    (full / "6").write_bytes(page(4))
    assert pages[5].tobytes() == page(4)
    pages[899, 0] = 7
    wait_until(lambda: names(full) == [*numbers(16), "900"], "the name to come")
    assert (full / "900").read_bytes() == b"\7" + bytes(PAGE - 1)


@pytest.mark.parametrize("name", ["3", ".image"])
def test_numpy_memmap_of_pages_and_images_is_private_only(full: Path, name: str) -> None:
    """A shared mapping is refused with ENODEV. .shmem allows one."""
    private = np.memmap(full / name, mode="c")
    expected = (full / name).read_bytes()
    assert private.tobytes() == expected
    private[0] ^= 255
    assert (full / name).read_bytes() == expected
    del private  # with its descriptor, which the exceptions to come would keep
    for mode in "r", "r+":
        with raises_errno(errno.ENODEV):
            np.memmap(full / name, mode=mode)
    assert holds_input(full)


# --- fio ---

FIO = "fio --name=job --output=$O/log --verify_fatal=1 --verify_state_save=0 --end_fsync=1 --randseed=7"


@pytest.mark.parametrize(
    "job",
    [
        "--rw=randwrite --bsrange=512-256k --bs_unaligned --verify=crc32c --ioengine=psync",
        "--rw=randrw --bssplit=4k/40:12k/30:64k/20:1m/10 --verify=sha256 --ioengine=psync --direct=1",
        "--rw=randwrite --bsrange=4k-128k --verify=md5 --ioengine=libaio --iodepth=16 --direct=1",
        "--rw=write --bs=1m --verify=xxhash --ioengine=pvsync",
    ],
)
def test_c8_fio_verifies_an_image(a: Path, sh: Shell, job: str) -> None:
    sh(f"{FIO} --filename=a/.image --size=4m {job}; grep -q 'err= 0' $O/log")
    assert names(a)


@pytest.mark.parametrize(
    "job",
    [
        "--rw=randwrite --bsrange=512-$P --bs_unaligned --io_size=1m --verify=crc32c",
        "--rw=randwrite --bs=$P --file_service_type=random --io_size=1m --verify=md5 --direct=1",
        "--rw=write --bs=1k --verify=sha256 --fsync=1",
    ],
)
def test_c8_fio_verifies_page_files(a: Path, sh: Shell, job: str) -> None:
    """One job has many files, named one by one, since fio's own names are not handles."""
    sh(f"cd a; {FIO} --filename=$(seq -s: 1 64) --filesize=$P --openfiles=8 {job}; grep -q 'err= 0' $O/log")
    assert names(a) == numbers(64)


# --- what cannot be done ---

CANNOT = [
    # an editor, or a tool, that writes a new file beside the old one and renames it
    (4, errno.EINVAL, "sed -i s/a/b/ a/3"),
    (23, errno.EINVAL, "rsync -a --checksum $O/in/7 a/3"),
    (23, errno.EINVAL, "rsync -a --delay-updates $O/src a/3"),
    (1, errno.EXDEV, "cp -b $O/in/7 a/3"),
    (1, errno.EXDEV, "install --backup $O/in/7 a/3"),
    # what a backup does not hold
    (1, errno.EPERM, "ln a/3 a/20"),
    (1, errno.EPERM, "ln -s 3 a/20"),
    (1, errno.EXDEV, "ln a/3 $O/link"),
    (1, errno.EPERM, "cp -l a/3 a/20"),
    (1, errno.EPERM, "mknod a/20 p"),
    (1, errno.EPERM, "mkfifo a/20"),
    (1, errno.EPERM, "mkdir a/20"),
    (1, errno.EPERM, "mkdir a/sub"),
    (1, errno.EPERM, "cp -r a a/20"),
    (1, errno.EPERM, "mkdir b; mv b a"),
    # nor the root
    (1, errno.EPERM, "touch file"),
    (1, errno.EPERM, "cp $O/src ."),
    (1, errno.EPERM, "mv a/3 ."),
    (1, errno.EPERM, "ln -s a b"),
    (1, errno.EPERM, "mknod b p"),
    (1, errno.EPERM, "mkdir .hidden"),
    (1, errno.EPERM, "mkdir b; mv -T b .b"),
    # names that are no handles, or no handles of this backup
    *((1, errno.EINVAL, f"touch a/{name}") for name in ("0", "03", "+3", "x", "3.swp", ".3.swp")),
    (1, errno.EINVAL, "cp $O/in/7 a/page"),
    (1, errno.EINVAL, "mv a/3 a/page"),
    (1, errno.EINVAL, "split -b $P $O/src a/page."),
    (1, errno.EFBIG, "touch a/1025"),
    (1, errno.EFBIG, "mv a/3 a/1025"),
    (1, errno.ENOENT, "cat a/03"),
    (1, errno.ENOENT, "cat a/20"),
    # sizes
    (1, errno.EFBIG, "truncate -s $((P+1)) a/3"),
    (1, errno.EFBIG, "truncate -s +1 a/.image"),
    (1, errno.EFBIG, "cat $O/in/7 >>a/3"),
    (1, errno.EFBIG, "dd if=$O/in/7 of=a/3 bs=$P seek=1 conv=notrunc"),
    (1, errno.EOPNOTSUPP, "fallocate -l $P a/3"),
    # owners, and what belongs to the backup
    (1, errno.EPERM, "chown 1 a/3"),
    (1, errno.EPERM, "chgrp 1 a/3"),
    (1, errno.EPERM, "rm a/.image"),
    (1, errno.EPERM, "rm a/.shmem"),
    (1, errno.EPERM, "mv a/.image $O/image"),
    (1, errno.EPERM, "mv a/3 a/.image"),
    (1, errno.EPERM, "install $O/src a/.image"),
    (1, errno.EPERM, "rm .stats"),
    (1, errno.EACCES, "cp $O/src .stats"),
    (1, errno.ENOTEMPTY, "rmdir a"),
    (1, errno.EEXIST, "mkdir a"),
    # attributes
    (1, errno.EOPNOTSUPP, "setfattr -n user.mine -v 1 a"),
    (1, errno.EOPNOTSUPP, "setfattr -n user.mine -v 1 a/3"),
    (1, errno.EPERM, "setfattr -n user.ttmfs.pages -v 1 a"),
    (1, errno.EPERM, "setfattr -x user.ttmfs.size a"),
    *((1, errno.EINVAL, f"setfattr -n user.ttmfs.drop -v '{v}' a") for v in ("", "0", "x", "3-", "3-2", "3,1025")),
    *((1, errno.EINVAL, f"setfattr -n user.ttmfs.size -v '{v}' a") for v in ("", "x", "-1", "$P")),
]


@pytest.mark.parametrize(("code", "number", "command"), CANNOT, ids=[row[2] for row in CANNOT])
def test_c6_a_refused_command_gives_the_reason_and_changes_nothing(
    full: Path, out: Path, sh: Shell, code: int, number: int, command: str
) -> None:
    before = contents(out / "in")
    assert os.strerror(number) in sh(command, code)
    assert holds_input(full)
    assert contents(out / "in") == before
    assert (out / "src").read_bytes() == IMAGE
    sh("cmp a/.image - < <(printf '%s\\0' a/{1..16} | xargs -0 cat; head -c $((1008*P)) /dev/zero)")


TOO_LONG = """
cp $S a/3
cat $S >a/3
tee a/3 <$S >/dev/null
head -c 5000 $S >a/3
dd if=$S of=a/3 bs=6000 count=1
dd if=$S of=a/3 bs=1M
mv $S a/3
install $S a/3
rsync --inplace $S a/3
"""


@pytest.mark.parametrize("command", TOO_LONG.strip().splitlines())
def test_c6_a_file_longer_than_a_page_is_cut_off_with_an_error(full: Path, out: Path, sh: Shell, command: str) -> None:
    """The overwritten page holds the beginning. The source and the other pages are unchanged."""
    told = sh(command, code=11 if "rsync" in command else 1, S=out / "src")
    assert os.strerror(errno.EFBIG) in told
    assert contents(full) == {str(n): page(n if n != 3 else 0) for n in range(1, 17)}
    assert (out / "src").read_bytes() == IMAGE


def test_tar_of_other_names_extracts_the_pages(full: Path, sh: Shell) -> None:
    sh(
        "cd $O; mkdir -p b/sub; cp in/{1,2,3} b; cp in/1 b/README; ln -s 1 b/link; "
        "tar cf b.tar b/README b/link b/sub b/[1-3]"
    )
    told = sh("tar xf $O/b.tar", code=2)
    for wanted in "README: Cannot open: Invalid", "link: Cannot create symlink to", "sub: Cannot mkdir: Operation not":
        assert wanted in told
    assert contents(full.parent / "b") == {str(n): page(n) for n in (1, 2, 3)}


@pytest.mark.parametrize(
    ("command", "code", "instead"),
    [
        ("cp -a $O/theirs b", 1, "cp -a --no-preserve=ownership $O/theirs b"),
        (
            "tar c -C $O theirs | tar xp --transform s/theirs/b/",
            2,
            "tar c -C $O theirs | tar xp --no-same-owner --transform s/theirs/b/",
        ),
        ("mkdir b; mv $O/theirs/1 b", 0, "mkdir b; cp $O/theirs/1 b; rm $O/theirs/1"),
    ],
)
def test_root_gets_an_error_for_another_owner_of_a_page(
    a: Path, root: Path, sh: Shell, command: str, code: int, instead: str
) -> None:
    """The bytes are stored all the same. A page has the owner of its backup, which can be changed."""
    theirs = "mkdir -p $O/theirs; cp $O/in/1 $O/theirs; chown -R 1:1 $O/theirs; "
    assert os.strerror(errno.EPERM) in sh(theirs + command, code)
    assert contents(root / "b") == {"1": page(1)}
    assert sh(f"rm -r b; {theirs}{instead}; stat -c %u b/1") == "0\n"
    sh(f"rm -r b; mkdir b; chown 1:1 b; {theirs}cp -a $O/theirs/. b")
    assert sh("stat -c %u:%g b b/1") == "1:1\n1:1\n"
    assert contents(root / "b") == {"1": page(1)}
    assert names(a) == []
