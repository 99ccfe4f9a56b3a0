"""The table of metrics, the dashboard and the alert rules name what a real mount shows through ``ttmfs export``."""

import errno
import json
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from harness import REPOSITORY, Mount, raises_errno, run, set_attribute

METRICS = REPOSITORY / "docs/metrics"
PROMTOOL = f"PATH={sys.prefix}/bin:$PATH promtool"
OF_PROMETHEUS = {"job", "instance"}
"""Labels that Prometheus adds to every sample."""

Labels = dict[str, dict[str, set[str]]]
"""The values of each label, by the name of the sample."""


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> str:
    """What the exporter prints for a mount in memory, one in a directory, and a mount point without a mount."""
    path = tmp_path_factory.mktemp("metrics")
    for name in "memory", "disk", "store":
        (path / name).mkdir()
    with Mount(path / "memory", "size=16m") as memory, Mount(path / "disk", f"size=16m,store={path}/store") as disk:
        for mount in memory, disk:
            (mount.path / "a").mkdir()
            (mount.path / "a/1").write_bytes(b"page")
            assert (mount.path / "a/1").read_bytes().startswith(b"page")
            with raises_errno(errno.EINVAL):
                set_attribute(mount.path / "a", "size", "nonsense")
        words = f"export --once {memory.path} {disk.path} {path}/none 2>/dev/null"
        return run(f"{sys.executable} -m ttmfs {words}", cwd=REPOSITORY)


@pytest.fixture(scope="module")
def labels(shown: str) -> Labels:
    found: Labels = {}
    for family in text_string_to_metric_families(shown):
        for sample in family.samples:
            values = found.setdefault(sample.name, {})
            for name, value in sample.labels.items():
                values.setdefault(name, set()).add(value)
    return found


def expressions() -> Iterator[tuple[str, str]]:
    """The queries of the dashboard and of the alerts, and what they belong to."""
    dashboard = json.loads((METRICS / "dashboard.json").read_text())
    for panel in dashboard["panels"]:
        for target in panel["targets"]:
            yield panel["title"], target["expr"]
    for rule in re.finditer(r"alert: (\w+)\n +expr: (.*?)\n +(?:for|labels):", text_of_rules(), re.DOTALL):
        yield rule[1], rule[2].removeprefix(">-").strip()


def text_of_rules() -> str:
    return (METRICS / "alerts.yml").read_text()


QUERIES = list(expressions())


@pytest.mark.parametrize(("title", "query"), QUERIES, ids=[f"{title}-{n}" for n, (title, _) in enumerate(QUERIES)])
def test_a_query_names_metrics_and_labels_that_there_are(title: str, query: str, labels: Labels) -> None:
    known = set(OF_PROMETHEUS)
    found = re.findall(r"\b(ttmfs_\w+|up)\b(?:\{([^}]*)\})?", query)
    assert found
    for name, matchers in found:
        assert name in labels or name == "up", f"{title}: no mount shows {name}"
        of_metric = labels.get(name, {})
        known |= set(of_metric)
        for label, operator, value in re.findall(r'(\w+)\s*(=~|!=|!~|=)\s*"([^"]*)"', matchers):
            assert label in of_metric or label in OF_PROMETHEUS, f"{title}: {name} has no label {label}"
            unknown = {*value.split("|")} - of_metric.get(label, set())
            if label in ("state", "operation") and operator in ("=", "=~"):
                # A state or an operation that no mount has is a typing error. (swapped needs swap to be shown.)
                assert not unknown, f"{title}: there is no {label} {unknown}"
    for grouped in re.findall(r"\b(?:by|without|on|ignoring) \(([^)]*)\)", query):
        assert {label.strip() for label in grouped.split(",")} <= known, title


def test_the_legends_and_variables_of_the_dashboard_name_labels_that_there_are(labels: Labels) -> None:
    text = (METRICS / "dashboard.json").read_text()
    every = {name for values in labels.values() for name in values} | OF_PROMETHEUS
    assert set(re.findall(r"\{\{(\w+)\}\}", text)) <= every
    names = {variable["name"] for variable in json.loads(text)["templating"]["list"]} | {"__rate_interval", "__all"}
    assert {match.strip("{}") for match in re.findall(r"\$(\w+|\{\w+\})", text)} <= names
    assert "label_values(ttmfs_up, instance)" in text


def test_promtool_accepts_the_queries_of_the_dashboard(tmp_path: Path) -> None:
    rules = [
        {"record": f"panel:{n}", "expr": query.replace("$__rate_interval", "1m").replace("$", "")}
        for n, (_, query) in enumerate(QUERIES)
    ]
    (tmp_path / "rules.yml").write_text(json.dumps({"groups": [{"name": "dashboard", "rules": rules}]}))
    run(f"{PROMTOOL} check rules {tmp_path}/rules.yml")


def test_promtool_accepts_the_alerts_and_their_tests_pass() -> None:
    run(f"{PROMTOOL} check rules alerts.yml", cwd=METRICS)
    run(f"{PROMTOOL} test rules alerts_test.yml", cwd=METRICS)
    rules = set(re.findall(r"alert: (\w+)", text_of_rules()))
    tested = (METRICS / "alerts_test.yml").read_text()
    for rule in rules:
        assert re.search(rf"alertname: {rule}\n +exp_alerts:", tested), f"no test makes {rule} fire"
    assert {*re.findall(r"`(Ttmfs\w+)`", (REPOSITORY / "docs/metrics.md").read_text())} == rules


def test_the_table_lists_exactly_the_metrics(shown: str) -> None:
    rows = re.findall(
        r"^\| `(ttmfs_\w+)` \| (\w+) \| ([^|]*) \|", (REPOSITORY / "docs/metrics.md").read_text(), re.MULTILINE
    )
    listed = {name: (kind, {*re.findall(r"`(\w+)`", labels)}) for name, kind, labels in rows}
    assert len(listed) == len(rows), "one is listed twice"
    families = {
        family.name + "_total" * (family.type == "counter"): (
            family.type,
            {name for sample in family.samples for name in sample.labels} - {"le"},
        )
        for family in text_string_to_metric_families(shown)
    }
    assert listed == families, "correct the table in docs/metrics.md"


def test_every_file_is_installed() -> None:
    packaged = (REPOSITORY / "pyproject.toml").read_text()
    for path in METRICS.iterdir():
        assert f'"docs/metrics/{path.name}"' in packaged or path.name == "alerts_test.yml"
    assert os.path.exists(REPOSITORY / "docs/pictures/dashboard.png")
