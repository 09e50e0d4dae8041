"""What can be told of a tracking URI before a run starts."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from clnp_search.tracking.probe import fault_of


def test_a_database_that_can_be_made_has_no_fault_and_is_not_made(tmp_path: Path) -> None:
    assert fault_of(f"sqlite:///{tmp_path}/deep/mlflow.db") == ""
    assert list(tmp_path.iterdir()) == []


def test_no_tracking_has_no_fault() -> None:
    assert fault_of("none") == ""


def test_a_database_below_a_file_or_in_the_place_of_a_folder_is_a_fault(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert fault_of(f"sqlite:///{tmp_path}/file/mlflow.db").endswith(f"{tmp_path}/file is no folder")
    assert fault_of(f"sqlite:///{tmp_path}").endswith("is a folder")


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_a_server_that_listens_has_no_fault_and_one_that_does_not_has(scheme: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert fault_of(f"{scheme}://127.0.0.1:{port}/path") == ""
    assert fault_of(f"{scheme}://user:secret@127.0.0.1:{port}").startswith(f"nothing answers at 127.0.0.1:{port}: ")


@pytest.mark.parametrize(
    ("uri", "fault"),
    [
        ("mlruns", "it keeps no runs in plain folders such as mlruns any more"),
        ("file:///tmp/mlruns", "it keeps no runs in plain folders"),
        ("ftp://host", "ftp://host is of no kind that it knows; allowed: sqlite, http"),
        ("http://host:port", "http: Port could not be cast"),
        ("mysql+nothing://host/db", "mysql+nothing: Can't load plugin"),
    ],
)
def test_an_address_that_cannot_work_is_a_fault(uri: str, fault: str) -> None:
    assert fault_of(uri).startswith(fault)
