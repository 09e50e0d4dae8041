"""The stronger peer: plain Ray Tune as a good engineer writes it; no DataLoader, actors reused, fused Adam.

The data set is normalised and permuted once, in the driver, and read by all trials from Ray's object store without a
copy. Uses nothing of this project. Prints one JSON document, as `peer_dataloader.py` does.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ["RAY_AIR_NEW_OUTPUT"] = "0"  # with verbose=0: no output of Tune's own

import numpy as np
import ray
import torch
from numpy.typing import NDArray
from ray import tune
from torch import nn
from torch.nn import functional
from torchvision.datasets import MNIST

ALPHAS = (1e-6, 1e-5, 1e-4, 1e-3)
LEARNING_RATES = (0.0005, 0.001, 0.002)
GRID = [{"alpha": alpha, "learning_rate": rate} for alpha in ALPHAS for rate in LEARNING_RATES]


def load(root: Path, num_samples: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Normalised, permuted images [N, 784], shuffled, and their labels [N]."""
    mnist = MNIST(str(root), train=True, download=False)
    permutation = torch.randperm(784, generator=torch.Generator().manual_seed(1))
    chosen = torch.randperm(len(mnist), generator=torch.Generator().manual_seed(2))[:num_samples]
    images = mnist.data[chosen].flatten(1)[:, permutation].float().div_(255).sub_(0.1307).div_(0.3081)
    # As NumPy arrays, because Ray hands those to trials without a copy.
    return images.numpy(), mnist.targets[chosen].numpy()


def train(config: dict[str, Any], images: NDArray[np.float32], labels: NDArray[np.int64]) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)  # a reused actor's generator has moved on
    held_out = len(labels) // 6
    x, y = torch.from_numpy(images), torch.from_numpy(labels)
    x_val, y_val, x, y = x[:held_out], y[:held_out], x[held_out:], y[held_out:]

    model = nn.Sequential(nn.Linear(784, 100), nn.ReLU(), nn.Linear(100, 100), nn.ReLU(), nn.Linear(100, 10))
    weights = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    optimizer = torch.optim.Adam(model.parameters(), lr=config["point"]["learning_rate"], fused=True)
    for _ in range(config["epochs"]):
        for batch in torch.randperm(len(y)).split(256):
            optimizer.zero_grad()
            loss = functional.cross_entropy(model(x[batch]), y[batch])
            loss = loss + config["point"]["alpha"] * sum(weight.abs().sum() for weight in weights)
            loss.backward()
            optimizer.step()
        with torch.inference_mode():
            accuracy = (model(x_val).argmax(1) == y_val).float().mean().item()
        tune.report({"val_accuracy": accuracy})


def process_age() -> float:
    """Seconds since this process was started, imports included (Linux)."""
    started = int(Path("/proc/self/stat").read_text().rsplit(")", 1)[1].split()[19]) / os.sysconf("SC_CLK_TCK")
    return time.clock_gettime(time.CLOCK_BOOTTIME) - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--root", type=Path, required=True, help="folder that contains MNIST/raw")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--points", type=int, default=len(GRID), help="only the first points of the grid")
    parser.add_argument("--samples", type=int, default=60_000, help="a sixth of them is the validation split")
    args = parser.parse_args()

    images, labels = load(args.root, args.samples)
    ray.init(address="local", include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    with tempfile.TemporaryDirectory() as folder:
        tuner = tune.Tuner(
            tune.with_resources(tune.with_parameters(train, images=images, labels=labels), {"cpu": 1}),
            param_space={"point": tune.grid_search(GRID[: args.points]), "epochs": args.epochs},
            tune_config=tune.TuneConfig(reuse_actors=True),
            run_config=tune.RunConfig(storage_path=folder, verbose=0),
        )
        results = tuner.fit()
    ray.shutdown()
    if results.num_errors:
        raise SystemExit(f"{results.num_errors} trials failed: {results.errors[0]}")
    accuracies = {
        "alpha={alpha:g} learning_rate={learning_rate:g}".format(**result.config["point"]): result.metrics[
            "val_accuracy"
        ]
        for result in results
    }
    print(json.dumps({"seconds": process_age(), "val_accuracy": accuracies}))


if __name__ == "__main__":
    main()
