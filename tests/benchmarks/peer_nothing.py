"""Plain Ray Tune with one trial that does nothing: what every command on Ray Tune takes before it does any work."""

from __future__ import annotations

import json
import logging
import os
import tempfile
from typing import Any

os.environ["RAY_AIR_NEW_OUTPUT"] = "0"  # with verbose=0: no output of Tune's own

import ray
from ray import tune


def train(config: dict[str, Any]) -> None:
    tune.report({"val_accuracy": 0.0})


def main() -> None:
    ray.init(address="local", include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    with tempfile.TemporaryDirectory() as folder:
        tune.Tuner(train, run_config=tune.RunConfig(storage_path=folder, verbose=0)).fit()
    ray.shutdown()
    print(json.dumps({"val_accuracy": {"nothing": 0.0}}))


if __name__ == "__main__":
    main()
