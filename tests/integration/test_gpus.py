"""Trials that share a GPU. Ray hands out one that is there by name only, as it would a real one; packs use the CPU."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from builders import make_inputs

from clnp_search.config import ResourcesConfig
from clnp_search.records import PackProgress
from clnp_search.search.cluster import Cluster, ray
from clnp_search.search.tuning import Packs, Program
from clnp_search.storage import RunFolder


@pytest.fixture
def node() -> Iterator[None]:
    """A local Ray with one GPU."""
    ray.init(address="local", num_cpus=2, num_gpus=1, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


def test_two_packs_train_on_halves_of_one_gpu_at_the_same_time(node: None, tmp_path: Path) -> None:
    inputs = make_inputs(tmp_path / "run", epochs=400)
    plan = replace(inputs.plan, packs=((0, 1), (2, 3)))
    folder, free, seen = RunFolder(inputs.run.folder), list[float](), list[PackProgress]()
    cluster = Cluster(ResourcesConfig(cpu=1, gpu=0.5))
    assert cluster.capacity.num_slots == 2

    def program() -> Program[str]:
        yield Packs(0, (0, 1), cluster.share((plan, inputs.state, None)))
        return "done"

    def listen(progress: PackProgress) -> None:
        seen.append(progress)
        free.append(ray.available_resources().get("GPU", 0.0))

    assert cluster.train(program(), cluster.share(inputs.run), folder.ray_folder, 0, listen) == "done"
    records = [folder.read_point(0, point.name) for point in plan.points]
    assert [record.status for record in records if record] == ["done"] * 4
    assert min(free) == 0
    assert seen[-1].epochs_done == dict.fromkeys(range(4), 400)
    assert seen[-1].best == max(
        ((record.point.index, record.val_accuracy) for record in records if record), key=lambda best: best[1]
    )
    assert seen[-1].failed == ()
