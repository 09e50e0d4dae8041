"""Saved views of an experiment, for MLflow's menu "Views": which runs, with which columns, in which order.

MLflow's own runs table opens without a metric, and mixes sequences, tasks and points. A view is a tag of the
experiment, and `.../#/experiments/ID/runs?workflowType=machine_learning&viewStateShareKey=KEY` opens it.
"""

from __future__ import annotations

import base64
import json
import zlib
from collections.abc import Mapping

TAG = "mlflow.sharedViewState."
SEQUENCES, CHOSEN, POINTS, FAMILIES = "clnp-sequences", "clnp-chosen", "clnp-points", "clnp-families"

# Of each view: its name, which runs, by what they are sorted and whether upwards, the columns from left to right.
# Sorted by time, MLflow would fold runs under their parents; keys bring sequences together, and their tasks in order.
_VIEWS: dict[str, tuple[str, str, tuple[str, bool], list[str]]] = {
    SEQUENCES: (
        "Sequences",
        "tags.`clnp.level` = 'sequence'",
        ("metrics.`test/average_accuracy`", False),
        [
            "params.`forgetting.margin`",
            "metrics.`test/average_accuracy`",
            "metrics.`capacity/free`",
            "metrics.`test/forgetting`",
            "metrics.`capacity/scarcest`",
            "params.`seed`",
            "tags.`clnp.tasks`",
            "tags.`clnp.status`",
        ],
    ),
    FAMILIES: (
        "Means over seeds",
        "tags.`clnp.level` = 'family'",
        ("metrics.`test/average_accuracy`", False),
        [
            "params.`forgetting.margin`",
            "metrics.`test/average_accuracy`",
            "metrics.`test/average_accuracy_deviation`",
            "metrics.`capacity/free`",
            "metrics.`capacity/free_deviation`",
            "tags.`clnp.seeds`",
        ],
    ),
    CHOSEN: (
        "Chosen models by task",
        "tags.`clnp.level` = 'task'",
        ("tags.`clnp.key`", True),
        [
            "tags.`clnp.sequence`",
            "metrics.`test/accuracy`",
            "metrics.`capacity/new`",
            "metrics.`capacity/free`",
            "params.`alpha`",
            "params.`learning_rate`",
            "metrics.`val/best_accuracy`",
            "metrics.`prune/val_accuracy`",
            "params.`point`",
        ],
    ),
    POINTS: (
        "Grid points of task 0",
        "tags.`clnp.level` = 'point' AND tags.`clnp.task` = '0'",
        ("metrics.`prune/unit_sparsity`", False),
        [
            "tags.`selected`",
            "metrics.`val/unpruned_accuracy`",
            "metrics.`prune/val_accuracy`",
            "metrics.`prune/unit_sparsity`",
            "params.`alpha`",
            "params.`learning_rate`",
            "tags.`clnp.sequence`",
        ],
    ),
}


def missing_views(tags: Mapping[str, str], now: int) -> dict[str, str]:
    """Tags that give an experiment its saved views; those that are there stay as their users left them.

    Args:
        tags: The experiment's.
        now: In milliseconds since 1970.
    """
    views = {}
    for key, (name, search, (order, ascending), columns) in _VIEWS.items():
        state = {
            "searchFilter": search,
            "orderByKey": order,
            "orderByAsc": ascending,
            "selectedColumns": columns,
            "columnOrder": columns,
            "columnWidths": {column: 40 + 7 * len(column.split("`")[1]) for column in columns},
        }
        packed = base64.b64encode(zlib.compress(json.dumps(state).encode())).decode()
        view = {"name": name, "createdAt": now, "updatedAt": now, "state": f"deflate;{packed}"}
        if f"{TAG}{key}" not in tags:
            views[f"{TAG}{key}"] = json.dumps(view)
    return views
