"""Every sweep that ships."""

from __future__ import annotations

from pathlib import Path

import pytest

from clnp_search.config import load_sweep
from clnp_search.search.proposals import first_points

SWEEPS = sorted((Path(__file__).parent.parent / "sweeps").glob("*.yaml"))


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_a_shipped_sweep_loads_and_has_a_grid(path: Path) -> None:
    sweep = load_sweep(path)
    assert len(first_points(sweep, 0, None, sweep.network.layer_names)) >= 1


def test_the_quickstart_searches_at_least_six_points_in_five_tasks() -> None:
    sweep = load_sweep(next(path for path in SWEEPS if path.stem == "quickstart"))
    assert sweep.scenario.tasks == 5
    assert len(first_points(sweep, 0, None, sweep.network.layer_names)) >= 6
    assert sweep.head.kind == "single"
