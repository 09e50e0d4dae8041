"""The first peer: plain Ray Tune as a competent user writes it, one trial per grid point, torchvision's DataLoader.

Uses nothing of this project. Prints one JSON document: the script's wall time and each point's validation accuracy.
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

import ray
import torch
from ray import tune
from torch import nn
from torch.utils.data import DataLoader, Subset, random_split
from torchvision import transforms
from torchvision.datasets import MNIST

ALPHAS = (1e-6, 1e-5, 1e-4, 1e-3)
LEARNING_RATES = (0.0005, 0.001, 0.002)
GRID = [{"alpha": alpha, "learning_rate": rate} for alpha in ALPHAS for rate in LEARNING_RATES]


def train(config: dict[str, Any]) -> None:
    torch.manual_seed(0)
    permutation = torch.randperm(784, generator=torch.Generator().manual_seed(1))
    transform = transforms.Compose(
        [
            transforms.ToTensor(),
            transforms.Normalize((0.1307,), (0.3081,)),
            transforms.Lambda(lambda image: image.flatten()[permutation]),
        ]
    )
    mnist = MNIST(config["root"], train=True, download=False, transform=transform)
    num_samples = min(config["samples"], len(mnist))
    held_out = num_samples // 6
    parts = (num_samples - held_out, held_out)
    splits = random_split(Subset(mnist, range(num_samples)), parts, torch.Generator().manual_seed(2))
    train_loader = DataLoader(splits[0], batch_size=256, shuffle=True)
    val_loader = DataLoader(splits[1], batch_size=256)

    model = nn.Sequential(nn.Linear(784, 100), nn.ReLU(), nn.Linear(100, 100), nn.ReLU(), nn.Linear(100, 10))
    weights = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    optimizer = torch.optim.Adam(model.parameters(), lr=config["point"]["learning_rate"])
    loss_function = nn.CrossEntropyLoss()
    for _ in range(config["epochs"]):
        model.train()
        for inputs, labels in train_loader:
            optimizer.zero_grad()
            loss = loss_function(model(inputs), labels)
            loss = loss + config["point"]["alpha"] * sum(weight.abs().sum() for weight in weights)
            loss.backward()
            optimizer.step()
        model.eval()
        correct = 0
        with torch.no_grad():
            for inputs, labels in val_loader:
                correct += (model(inputs).argmax(1) == labels).sum().item()
        tune.report({"val_accuracy": correct / held_out})


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

    ray.init(address="local", include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    with tempfile.TemporaryDirectory() as folder:
        tuner = tune.Tuner(
            tune.with_resources(train, {"cpu": 1}),
            param_space={
                "point": tune.grid_search(GRID[: args.points]),
                "root": str(args.root.absolute()),
                "epochs": args.epochs,
                "samples": args.samples,
            },
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
