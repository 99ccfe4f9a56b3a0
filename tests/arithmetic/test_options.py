"""The -o table: what is read, what is refused and how, and that options survive being written and read again."""

import json
import os
import re
import unittest.mock
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from stores import mounted
from ttmfs.handles import format_ranges, parse_ranges
from ttmfs.options import (
    BASE_PAGE_SIZE,
    IGNORED,
    LARGEST_PAGE_SIZE,
    LEVELS,
    LONGEST_POLL,
    OPPOSITES,
    TABLE,
    ExitCode,
    OptionError,
    Options,
    format_size,
    help_text,
    parse_size,
)

RAM = os.sysconf("SC_PHYS_PAGES") * BASE_PAGE_SIZE
PAGE_SIZES = [1 << shift for shift in range(BASE_PAGE_SIZE.bit_length() - 1, LARGEST_PAGE_SIZE.bit_length())]

sizes = st.integers(1, 2**50)
ids = st.none() | st.integers(0, 2**32 - 2)
flags = st.sampled_from(sorted(OPPOSITES))
common: dict[str, st.SearchStrategy[Any]] = {
    "size": st.just(0) | sizes,
    "nr_inodes": st.none() | st.just(0) | st.integers(2, 2**40),
    "backup_size": st.just(0) | sizes,
    "page_size": st.sampled_from(PAGE_SIZES),
    "reserve": st.just(0) | sizes,
    "busy_poll": st.just(0) | st.integers(1, LONGEST_POLL),
    "keeper": st.booleans(),
    "standby": st.booleans(),
    "allow_other": st.booleans(),
    "ro": st.booleans(),
    "log": st.sampled_from(["auto", "journal", "syslog", "stderr", "/var/log/a,b\\c"]),
    "log_level": st.sampled_from(LEVELS),
    "debug": st.booleans(),
    "kernel": st.lists(flags, unique_by=lambda flag: frozenset((flag, OPPOSITES[flag]))).map(tuple),
}
paths = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1)
any_options = st.builds(Options, **common, mode=st.integers(0, 0o7777), uid=ids, gid=ids) | st.builds(
    Options, **common, store=paths
)
names = st.sampled_from(sorted({*TABLE, "rw", *OPPOSITES, *IGNORED, "x-a", "X-b", "comment"}))
values = st.sampled_from(
    "0 1 -1 4k 3k 2m 16e 99t 50% 999% 1000% 0755 9 root nobody 4294967295 \\ \0 ٣ \udcff".split(" ")
)
valid_words = st.one_of(
    st.tuples(st.sampled_from(["size", "backup_size", "reserve"]), sizes.map(str)),
    st.tuples(st.just("nr_inodes"), st.just("0") | st.integers(2, 2**40).map(str)),
    st.tuples(st.sampled_from(["uid", "gid"]), st.integers(0, 2**32 - 2).map(str)),
    st.tuples(st.just("mode"), st.integers(0, 0o7777).map("{:o}".format)),
    st.tuples(st.just("busy_poll"), st.sampled_from(["auto", "off"]) | st.integers(1, LONGEST_POLL).map(str)),
    st.tuples(st.sampled_from(["keeper", "standby"]), st.sampled_from(["on", "off"])),
    st.tuples(st.just("page_size"), st.sampled_from(PAGE_SIZES).map(str)),
)
words = st.builds("{}{}{}".format, names | st.text(max_size=8), st.sampled_from(["", "=", "=="]), values | st.just(""))


# --- what is read ---


@pytest.mark.parametrize(
    ("text", "size"), [("1.5g", 3 << 29), ("0.5K", 512), ("2.25m", 9 << 18), ("0.0001k", 0), ("1.50t", 3 << 39)]
)
def test_a_size_may_have_a_fraction(text: str, size: int) -> None:
    assert parse_size(text) == size


def test_the_default_size_is_half_of_the_ram_for_mount_and_backups() -> None:
    options = Options.parse()
    assert options == Options() == Options.parse("") == Options.parse(",,", ",")
    assert 0 <= options.size - RAM // 2 < BASE_PAGE_SIZE
    assert options.backup_size == options.size
    assert (options.uid, options.gid, options.mode) == (os.geteuid(), os.getegid(), 0o755)
    assert (options.page_size, options.reserve, options.nr_inodes) == (BASE_PAGE_SIZE, 64 << 20, None)
    assert (options.allow_other, options.ro, options.debug, options.kernel) == (False, False, False, ())
    assert options.keeper
    assert options.standby == (RAM > 2 << 30)


@pytest.mark.parametrize(
    ("text", "name", "value"),
    [
        ("size=4096", "size", 4096),
        ("size=1", "size", BASE_PAGE_SIZE),
        ("size=64k", "size", 64 << 10),
        ("size=3M", "size", 3 << 20),
        ("size=2g,size=1g", "size", 1 << 30),
        ("size=1T", "size", 1 << 40),
        ("size=3m,page_size=2m", "size", 4 << 20),
        ("size=3m", "backup_size", 3 << 20),
        ("size=3m,backup_size=1m", "backup_size", 1 << 20),
        ("backup_size=5000", "backup_size", 2 * BASE_PAGE_SIZE),
        ("nr_inodes=10k", "nr_inodes", 10240),
        ("nr_inodes=0", "nr_inodes", 0),
        ("mode=1777", "mode", 0o1777),
        ("mode=0700", "mode", 0o700),
        ("mode=0", "mode", 0),
        ("uid=1000", "uid", 1000),
        ("uid=root", "uid", 0),
        ("gid=root", "gid", 0),
        ("gid=4294967294", "gid", 2**32 - 2),
        ("page_size=2m", "page_size", 2 << 20),
        ("reserve=0", "reserve", 0),
        ("reserve=1g", "reserve", 1 << 30),
        ("busy_poll=auto", "busy_poll", 200),
        ("busy_poll=off", "busy_poll", 0),
        ("busy_poll=50", "busy_poll", 50),
        ("keeper=on", "keeper", True),
        ("keeper=off", "keeper", False),
        ("standby=on", "standby", True),
        ("standby=off", "standby", False),
        ("allow_other", "allow_other", True),
        ("debug", "debug", True),
        ("debug", "log_level", "debug"),
        ("log_level=warning", "log_level", "warning"),
        ("log=/var/log/a\\,b", "log", "/var/log/a,b"),
        ("ro", "ro", True),
        ("ro,rw", "ro", False),
        ("rw,ro", "ro", True),
        ("nosuid,noatime", "kernel", ("nosuid", "noatime")),
        ("defaults,_netdev,nofail,x-systemd.automount,X-a=b,comment=c,relatime", "kernel", ()),
        ("comment=a\\,ro", "ro", False),
        ("comment=a\\\\,ro", "ro", True),
    ],
)
def test_an_option_has_the_value_it_is_given(text: str, name: str, value: object) -> None:
    assert getattr(Options.parse(text), name) == value


def test_a_percentage_is_of_the_ram() -> None:
    assert parse_size("100%") == RAM
    assert parse_size("0%") == 0


@given(percent=st.integers(0, 999), pages=st.integers(1, 2**40))
@example(percent=50, pages=3)
@example(percent=50, pages=4)
def test_a_percentage_is_rounded_up_to_a_page_as_a_tmpfs_rounds_it(percent: int, pages: int) -> None:
    """The kernel's arithmetic, for any amount of RAM: bytes are rounded down first, then pages up."""
    size = percent * BASE_PAGE_SIZE * pages // 100
    with unittest.mock.patch("os.sysconf", {"SC_PHYS_PAGES": pages}.get):
        assert parse_size(f"{percent}%") == (size + BASE_PAGE_SIZE - 1) // BASE_PAGE_SIZE * BASE_PAGE_SIZE
        if percent:
            assert Options.parse(f"size={percent}%").size == parse_size(f"{percent}%")


@pytest.mark.parametrize("percent", [1, 7, 33, 50, 99, 100, 101, 333, 999])
def test_a_percentage_gives_the_same_size_as_on_a_tmpfs(tmp_path: Path, percent: int) -> None:
    with mounted(tmp_path / "tmpfs", "tmpfs", f"size={percent}%") as path:
        room = os.statvfs(path)
    assert parse_size(f"{percent}%") == room.f_blocks * room.f_frsize


@given(st.lists(words, max_size=5), st.lists(words, max_size=5))
def test_one_o_with_commas_equals_several(before: list[str], after: list[str]) -> None:
    def read(*texts: str) -> Options | str:
        try:
            return Options.parse(*texts)
        except OptionError as error:
            return str(error)

    whole = [word.replace("\\", "\\\\").replace(",", "\\,") for word in [*before, *after]]
    assert read(",".join(whole)) == read(*whole) == read(",".join(whole[: len(before)]), ",".join(whole[len(before) :]))


@given(st.lists(valid_words, max_size=8))
def test_the_last_value_of_a_repeated_option_counts(pairs: list[tuple[str, str]]) -> None:
    every, last = (",".join(map("=".join, given)) for given in (pairs, dict(pairs).items()))
    assert Options.parse(every) == Options.parse(last)


@pytest.mark.parametrize(("one", "other"), [("suid", "nosuid"), ("exec", "noexec"), ("atime", "noatime")])
def test_the_last_of_two_opposite_flags_counts(one: str, other: str) -> None:
    assert Options.parse(f"{one},{other},{one}").kernel[-1] == one
    assert Options.parse(f"{other},{one},{other}").kernel[-1] == other


# --- what is refused ---


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("siez=1m", r"unknown option 'siez=1m', perhaps 'size'"),
        ("backupsize=1m", r"perhaps 'backup_size'"),
        ("allow-other", r"perhaps 'allow_other'"),
        ("nosiud", r"perhaps 'nosuid'"),
        ("qqqqqq", r"unknown option 'qqqqqq'(?!.*perhaps)"),
        ("=1", r"unknown option '=1'"),
        ("defaults=1", r"unknown option 'defaults=1'"),
        ("rw=1", r"unknown option 'rw=1'"),
        ("size", r"size needs a value: size=SIZE"),
        ("uid", r"uid needs a value: uid=UID"),
        ("size=", r"size: '' is not a size.*k, m, g, t or %"),
        ("size=0", r"size: 0 is not allowed.*no limit"),
        ("size=0%", r"size: 0 is not allowed"),
        ("backup_size=0", r"backup_size: 0 is not allowed: leave the option out"),
        ("nr_inodes=-1", r"nr_inodes: '-1' is not a number"),
        ("size=-1", r"size: '-1' is not a size"),
        ("size=1.5", r"size: '1.5' is not a size"),
        ("size=.5g", r"size: '.5g' is not a size"),
        ("size=1kb", r"size: '1kb' is not a size.*, perhaps '1k'"),
        ("size=1.5GiB", r"size: '1.5GiB' is not a size.*, perhaps '1.5G'"),
        ("size= 1k", r"size: ' 1k' is not a size"),
        ("size=1k\n", r"size: '1k\\n' is not a size"),
        ("size=1000%", r"size: '1000%' is not a size"),
        ("size=٣", r"is not a size"),
        ("reserve=1\u212a", r"reserve: .* is not a size"),  # the Kelvin sign, which is a k to careless comparisons
        ("size=8388608t", r"size: 8388608t is larger than a file can be"),
        ("size=99999999999999999999", r"is larger than a file can be"),
        ("nr_inodes=50%", r"nr_inodes: '50%' is not a number"),
        ("nr_inodes=-1", r"nr_inodes: '-1' is no"),
        ("nr_inodes=1", r"nr_inodes: 1 allows no backup"),
        ("mode=888", r"mode: '888' is not a mode: write it in octal"),
        ("mode=u+x", r"mode: 'u\+x' is not a mode"),
        ("mode=17777", r"mode: '17777' is not a mode"),
        ("uid=no such user", r"uid: 'no such user' is not a user of this machine"),
        ("gid=no such group", r"gid: 'no such group' is not a group of this machine"),
        ("uid=-1", r"uid: '-1' is not a user"),
        ("uid=4294967295", r"uid: 4294967295 is not a user id: the largest is 4294967294"),
        ("page_size=3k", r"page_size=3k: must be a power of two from 4k to 2m"),
        ("page_size=12k", r"page_size=12k: must be a power of two"),
        ("page_size=2k", r"page_size=2k: must be"),
        ("page_size=4m", r"page_size=4m: must be"),
        ("page_size=0", r"page_size=0: must be"),
        ("busy_poll", r"busy_poll needs a value"),
        ("busy_poll=on", r"busy_poll: 'on' is not a time to poll: write auto, off, or microseconds from 1 to 10000"),
        ("busy_poll=0", r"busy_poll: '0' is not a time to poll: write auto, off"),
        ("busy_poll=10001", r"busy_poll: '10001' is not a time to poll"),
        ("busy_poll=1.5", r"busy_poll: '1.5' is not a time to poll"),
        ("keeper", r"keeper needs a value: keeper=on\|off"),
        ("standby=yes", r"standby: 'yes' is neither on nor off"),
        ("keeper=yes", r"keeper: 'yes' is neither on nor off"),
        ("keeper=", r"keeper: '' is neither on nor off"),
        ("ro=1", r"ro is a flag and takes no value"),
        ("debug=", r"debug is a flag and takes no value"),
        ("size=1m,ro,siez=1m", r"unknown option 'siez=1m'"),
    ],
)
def test_an_invalid_value_is_refused_with_what_to_write(text: str, message: str) -> None:
    with pytest.raises(OptionError, match=message) as raised:
        Options.parse(text)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("name", sorted(TABLE))
def test_a_misspelt_option_is_refused_with_the_nearest_name(name: str) -> None:
    for slip in (name[0] + name, name + name[-1]):
        with pytest.raises(OptionError, match=rf"unknown option '{slip}', perhaps '\w+'"):
            Options.parse(slip)


@settings(max_examples=500)
@given(st.lists(st.text(st.characters()) | st.lists(words).map(",".join), max_size=4))
def test_any_text_gives_options_or_an_option_error(texts: list[str]) -> None:
    try:
        options = Options.parse(*texts)
    except OptionError:
        return
    assert options.page_size in PAGE_SIZES
    for size in options.size, options.backup_size:
        assert size > 0 or options.store is not None
        assert size % options.page_size == 0
        assert size < 2**63
    if options.store is None:
        assert options.mode is not None
        assert 0 <= options.mode <= 0o7777
        assert options.uid is not None
        assert options.gid is not None
    else:
        assert os.path.isabs(options.store)
        assert (options.mode, options.uid, options.gid) == (None, None, None)
    assert set(options.kernel) <= set(OPPOSITES)
    assert json.loads(json.dumps(options.as_dict()))["size"] == options.size


# --- there and back ---


@given(any_options)
def test_options_survive_being_written_and_parsed(options: Options) -> None:
    assert Options.parse(options.show()) == options


def test_only_options_that_differ_from_the_default_are_shown() -> None:
    assert Options().show() == ""
    assert Options(size=1 << 30).show() == "size=1g"
    shown = Options(size=1 << 30, backup_size=3 << 20, mode=0o1777, ro=True, kernel=("noexec",)).show()
    assert shown == "size=1g,mode=1777,backup_size=3m,ro,noexec"


@given(any_options)
def test_config_has_every_option_with_its_value(options: Options) -> None:
    shown: dict[str, Any] = json.loads(json.dumps(options.as_dict()))
    assert set(shown) == {*TABLE, "kernel"}
    mode = shown.pop("mode")
    assert (mode if mode is None else int(mode, 8)) == options.mode
    assert shown.pop("kernel") == list(options.kernel)
    for name in "busy_poll", "keeper", "standby", "shmem":
        assert getattr(Options.parse(f"{name}={shown.pop(name)}"), name) == getattr(options, name)
    assert shown == {name: getattr(options, name) for name in shown}


def test_a_store_is_an_absolute_path_and_keeps_its_mode_and_owner() -> None:
    assert Options.parse("store=a/../b").store == os.path.abspath("b")
    assert Options.parse(r"store=/a\,b\\c").store == "/a,b\\c"
    assert Options(store=Path("/a")).store == "/a"  # type: ignore[arg-type]
    assert (Options(store="/a").size, Options(store="/a").backup_size) == (0, 0), "as large as its filesystem"
    assert Options.parse("store=/a,size=5k").size == 2 * BASE_PAGE_SIZE
    for text in "store=/a,mode=700", "uid=0,store=/a", "store=/a,gid=0":
        with pytest.raises(OptionError, match="store= keeps that of the directory"):
            Options.parse(text)
    for path in "", "\0", 5:
        with pytest.raises(OptionError, match="the path of an existing directory is needed"):
            Options(store=path)  # type: ignore[arg-type]


@given(st.text(st.characters()))
def test_a_comma_within_a_value_is_escaped_by_a_backslash(text: str) -> None:
    assert Options.parse("comment=" + text.replace("\\", "\\\\").replace(",", "\\,")) == Options()


@given(st.integers(0, 2**63 - LARGEST_PAGE_SIZE))
def test_a_size_survives_being_written_and_read(size: int) -> None:
    assert parse_size(str(size)) == parse_size(format_size(size)) == parse_size(format_size(size).upper()) == size


@given(st.integers(0, 2**22), st.sampled_from(list(enumerate(["", "k", "m", "g", "t"]))))
def test_a_suffix_is_a_power_of_1024_and_the_shortest_text_is_written(number: int, suffix: tuple[int, str]) -> None:
    power, letter = suffix
    size = parse_size(f"{number}{letter}")
    assert size == number * 1024**power
    assert len(format_size(size)) <= len(f"{number}{letter}")


@given(st.lists(st.tuples(st.integers(1, 2**40), st.integers(0, 2**40)), min_size=1))
def test_ranges_of_handles_survive_being_written_and_read(starts: list[tuple[int, int]]) -> None:
    pairs = [(first, first + more) for first, more in starts]
    assert parse_ranges(format_ranges(pairs)) == parse_ranges(f" {format_ranges(pairs).replace(',', ' , ')} ") == pairs


# --- help ---


def test_help_has_a_line_for_every_option_and_exit_code() -> None:
    text = help_text()
    for name, option in TABLE.items():
        shown = re.escape(f"{name}={option.value}" if option.value else name)
        assert re.search(rf"^  {shown} +\S.*$", text, re.MULTILINE), name
    for code in ExitCode:
        assert re.search(rf"^  {code.value} +\S.*$", text, re.MULTILINE), code


def test_options_passed_by_name_have_the_same_bounds() -> None:
    with pytest.raises(OptionError, match="busy_poll: 10001 is more than 10000 microseconds"):
        Options(busy_poll=LONGEST_POLL + 1)
