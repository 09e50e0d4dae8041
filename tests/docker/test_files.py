"""What is written in `docker/`: valid by the schemas that there are, and as closed as it says."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import ray
from packaging.requirements import Requirement
from ruamel.yaml import YAML
from typer.main import get_command

from clnp_search.cli import app

ROOT = Path(__file__).resolve().parents[2]
DOCKER = ROOT / "docker"
CLIENTS_AND_SERVERS_OF_RAY = ("ray-head", "ray-worker")


def load(name: str) -> Any:
    return YAML(typ="safe").load(DOCKER / name)


def make_secrets(folder: Path) -> None:
    subprocess.run([sys.executable, str(DOCKER / "make_secrets.py"), str(folder)], check=True)


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    return load("compose.yaml")  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def job() -> dict[str, Any]:
    return load("kuberay-rayjob.yaml")  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", ["compose.yaml", "compose.gpu.yaml"])
def test_compose_files_follow_the_compose_specification(name: str) -> None:
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec", str(DOCKER / name)]
    subprocess.run(command, check=True)


def test_published_ports_are_on_loopback(compose: dict[str, Any]) -> None:
    ports = [port for service in compose["services"].values() for port in service.get("ports", [])]
    assert sorted(ports) == ["127.0.0.1:5000:5000", "127.0.0.1:8265:8265"]


def test_only_what_publishes_a_port_leaves_the_internal_network(compose: dict[str, Any]) -> None:
    outside = {name for name, service in compose["services"].items() if service["networks"] != ["inside"]}
    assert outside == {name for name, service in compose["services"].items() if "ports" in service}
    assert compose["networks"]["inside"] == {"internal": True}


def test_every_service_has_a_health_check_of_its_own_and_a_pinned_image(compose: dict[str, Any]) -> None:
    for name, service in compose["services"].items():
        assert service["healthcheck"]["test"], name
        assert re.search(r":\d[\w.-]*$", service["image"]), name


def test_mlflow_is_asked_by_the_name_that_clients_use_and_that_it_allows(compose: dict[str, Any]) -> None:
    service = compose["services"]["mlflow"]
    assert service["healthcheck"]["test"][-1] == "http://mlflow:5000"
    assert compose["services"]["ray-head"]["environment"]["MLFLOW_TRACKING_URI"] == "http://mlflow:5000"
    assert "--allowed-hosts mlflow:5000," in service["command"][-1]


@pytest.mark.parametrize("name", CLIENTS_AND_SERVERS_OF_RAY)
def test_ray_asks_for_a_token_from_a_secret(compose: dict[str, Any], name: str) -> None:
    service = compose["services"][name]
    assert service["environment"]["RAY_AUTH_MODE"] == "token"
    assert service["environment"]["RAY_AUTH_TOKEN_PATH"] == "/run/secrets/ray_token"
    assert "ray_token" in service["secrets"]


def test_secrets_are_files_that_neither_git_nor_an_image_takes(compose: dict[str, Any], tmp_path: Path) -> None:
    make_secrets(tmp_path / "secrets")
    assert {secret["file"] for secret in compose["secrets"].values()} == {
        f"secrets/{path.name}" for path in (tmp_path / "secrets").iterdir()
    }
    assert "/docker/secrets/" in (ROOT / ".gitignore").read_text().splitlines()
    for service in compose["services"].values():
        for variable, value in service.get("environment", {}).items():
            secret = re.search("PASSWORD|TOKEN|SECRET|CREDENTIALS", variable)
            assert not secret or value.startswith("/run/secrets/"), variable


def test_secrets_that_are_there_stay(tmp_path: Path) -> None:
    contents = []
    for _ in range(2):
        make_secrets(tmp_path)
        contents.append({path.name: path.read_text() for path in tmp_path.iterdir()})
    assert contents[0] == contents[1]


def test_a_secret_that_is_missing_is_made_alone_and_an_s3_key_for_its_server_and_its_clients(tmp_path: Path) -> None:
    for missing, changed in (("ray_token", {"ray_token"}), ("s3_identities", {"s3_identities", "s3_credentials"})):
        make_secrets(tmp_path)
        before = {path.name: path.read_text() for path in tmp_path.iterdir()}
        (tmp_path / missing).unlink()
        make_secrets(tmp_path)
        assert {name for name, text in before.items() if (tmp_path / name).read_text() != text} == changed


def test_a_folder_for_secrets_that_is_there_already_is_closed(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    make_secrets(tmp_path)
    assert tmp_path.stat().st_mode & 0o777 == 0o700


def test_the_image_runs_as_an_ordinary_user_on_a_pinned_base() -> None:
    lines = (DOCKER / "Dockerfile").read_text().splitlines()
    assert [line for line in lines if line.startswith("USER ")] == ["USER clnp"]
    [base] = [line for line in lines if line.startswith("FROM ")]
    assert re.fullmatch(r"FROM python:3\.\d+\.\d+-slim-\w+", base)


def test_the_image_takes_only_what_is_named() -> None:
    rules = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if not line.startswith("#")]
    assert rules[0] == "*"
    taken = [rule[1:] for rule in rules if rule.startswith("!")]
    copied = re.findall(r"^COPY (.+) \S+$", (DOCKER / "Dockerfile").read_text(), re.MULTILINE)
    assert sorted(path for paths in copied for path in paths.split()) == sorted(taken)
    assert all((ROOT / path).exists() for path in taken)


def test_pinned_versions_are_those_that_the_package_allows() -> None:
    lines = [line for line in (DOCKER / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    pins = dict(line.split("==") for line in lines)
    needs = [Requirement(need) for need in metadata.requires("clnp-search") or []]
    assert {need.name for need in needs} <= pins.keys()
    assert [need for need in needs if not need.specifier.contains(pins[need.name])] == []


def test_the_rayjob_is_of_this_ray_with_a_token(job: dict[str, Any]) -> None:
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    cluster = job["spec"]["rayClusterSpec"]
    assert cluster["rayVersion"] == ray.__version__
    needs = [Requirement(need) for need in metadata.requires("clnp-search") or []]
    assert all(need.specifier.contains(cluster["rayVersion"]) for need in needs if need.name == "ray")
    assert cluster["authOptions"] == {"mode": "token"}


def test_the_rayjob_runs_a_command_that_there_is_on_storage_that_outlives_its_cluster(job: dict[str, Any]) -> None:
    program, name, sweep, *options = shlex.split(job["spec"]["entrypoint"])
    command = get_command(app).get_command(None, name)  # type: ignore[attr-defined, arg-type]
    values = dict(zip(options[::2], options[1::2], strict=True))
    assert program == "clnp-search"
    assert values.keys() <= {option for parameter in command.params for option in parameter.opts}
    assert (ROOT / "sweeps" / Path(sweep).name).exists()
    assert values["--address"] == "auto"
    assert values["--storage"].startswith("s3://")


def test_pods_run_without_privileges_on_the_image_of_compose(job: dict[str, Any], compose: dict[str, Any]) -> None:
    cluster = job["spec"]["rayClusterSpec"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        pod = group["template"]["spec"]
        assert pod["securityContext"]["runAsNonRoot"]
        [container] = pod["containers"]
        assert container["image"] == compose["services"]["ray-head"]["image"]
        assert not container["securityContext"]["allowPrivilegeEscalation"]


def test_the_launchers_file_follows_rays_schema_with_a_token(compose: dict[str, Any]) -> None:
    cluster = load("cluster.yaml")
    schema = Path(ray.__file__).parent / "autoscaler" / "ray-schema.json"
    jsonschema.validate(cluster, json.loads(schema.read_text()))
    assert "--env RAY_AUTH_MODE=token" in cluster["docker"]["run_options"]
    assert cluster["docker"]["image"] == compose["services"]["ray-head"]["image"]
