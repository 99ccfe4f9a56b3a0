"""The examples for Kubernetes: they match its schemas, and agree with what docs/containers.md says that they need."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate  # type: ignore[import-untyped]
import pytest
import yaml  # type: ignore[import-untyped]

from harness import REPOSITORY
from ttmfs.options import Options

EXAMPLES = sorted(REPOSITORY.glob("examples/kubernetes-*.yaml"))
VERSIONS = ("1.29", "1.37")
"""The first version with native sidecars, and the latest that was tried."""


def resources(path: Path) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(path.read_text()))


def containers(path: Path) -> Iterator[dict[str, Any]]:
    """The containers of all pods of an example."""
    for resource in resources(path):
        spec = resource["spec"] if resource["kind"] == "Pod" else resource["spec"]["template"]["spec"]
        yield from spec.get("initContainers", [])
        yield from spec["containers"]


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_the_examples_match_the_schemas_of_kubernetes(path: Path, version: str) -> None:
    for resource in resources(path):
        kubernetes_validate.validate(resource, version, strict=True)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_a_container_that_mounts_is_privileged_and_its_options_exist(path: Path) -> None:
    mounting = [each for each in containers(path) if each["name"] == "ttmfs"]
    assert len(mounting) == 1
    for container in mounting:
        (command,) = container["args"]
        assert Options.parse(command.rpartition(" -o ")[2]).allow_other
        assert "exec ttmfs mount -f /shared/ttm " in command, "it must be process 1, to get SIGTERM"
        assert container["securityContext"]["privileged"]
        assert [mount["mountPropagation"] for mount in container["volumeMounts"]] == ["Bidirectional"]
    using = [each for each in containers(path) if each["name"] == "program"]
    assert [mount["mountPropagation"] for each in using for mount in each["volumeMounts"]] == ["HostToContainer"]
