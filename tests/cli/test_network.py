"""`clnp-search network`: what a network is made of, or why it is refused."""

from __future__ import annotations

from pathlib import Path

from command_line import Cli

SWEEP = """
scenario: {name: split_digits}
network: {module: "own:Net", arguments: {norm: BatchNorm2d}}
"""
OWN = """
from torch import nn


class Net(nn.Module):
    def __init__(self, norm):
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 3, padding=1)
        self.block = nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect" if norm == "LayerNorm" else "zeros")
        self.norm = nn.LayerNorm(8) if norm == "LayerNorm" else nn.BatchNorm2d(4)
        self.head = nn.Linear(4 * 64, 2)

    def forward(self, x):
        x = self.stem(x).relu()
        return self.head((x + self.norm(self.block(x))).flatten(1))
"""


def cli_with(folder: Path) -> Cli:
    (folder / "own.py").write_text(OWN, encoding="utf-8")
    (folder / "sweep.yaml").write_text(SWEEP, encoding="utf-8")
    return Cli(folder)


def test_the_layers_groups_and_totals_of_a_module(tmp_path: Path) -> None:
    cli = cli_with(tmp_path)
    assert cli.json("network", "sweep.yaml") == {
        "layers": [
            {"name": "stem", "group": "stem", "parameters": 40},
            {"name": "block", "group": "stem", "parameters": 148 + 8},
            {"name": "head", "group": "classes", "parameters": 514},
        ],
        "groups": {"stem": {"units": 4, "writers": ["stem", "block"], "readers": ["block", "head"]}},
        "parameters": 40 + 148 + 8 + 514,
        "flop_per_sample": 2 * (4 * 9 * 64 + 4 * 4 * 9 * 64 + 4 * 64 * 2),
    }
    text = cli("network", "sweep.yaml").stdout
    assert "1 group of 4 units, 710 parameters" in text


def test_a_refused_module_is_told_with_every_reason_and_status_2(tmp_path: Path) -> None:
    cli, setting = cli_with(tmp_path), "network.arguments.norm=LayerNorm"
    refused = cli.json("network", "sweep.yaml", "--set", setting, status=2)["refused"]
    assert [each["module"] for each in refused] == ["block", "norm"]
    assert refused[0]["reason"].startswith("Conv2d with padding_mode 'reflect'")
    text = cli("network", "sweep.yaml", "--set", setting, status=2).stdout
    assert all(f"{each['module']}: {each['reason']}" in text for each in refused)
