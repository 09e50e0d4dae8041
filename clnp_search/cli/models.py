"""Commands that look at committed models: `verify`, `evaluate` and `export`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.markup import escape
from rich.table import Table

from clnp_search.cli.console import NOT_VERIFIED, out, print_json
from clnp_search.cli.options import AsJson, Run, Storage, TaskIndex, open_named, require_task
from clnp_search.errors import InputError


def verify(run: Run, storage: Storage = "runs/", as_json: AsJson = False) -> None:
    """Prove that nothing was forgotten: digests, cut weights, and every task evaluated again. Status 4 if not."""
    from clnp_search.storage import open_run
    from clnp_search.verification import verify as check_run

    folder = open_run(run, storage)
    checks = check_run(folder)
    failed = [check for check in checks if not check.passed]
    if as_json:
        print_json({"run": folder.uri, "verified": not failed, "checks": [asdict(check) for check in checks]})
    else:
        table = Table("task", "check", "", "found", header_style="bold")
        for check in checks:
            mark = "[green]passed[/]" if check.passed else "[red]FAILED[/]"
            table.add_row("-" if check.task is None else str(check.task), check.name, mark, escape(check.detail))
        out.print(table)
        out.print(
            f"[red]{len(failed)} of {len(checks)} checks failed[/]" if failed else f"all {len(checks)} checks passed"
        )
    if failed:
        raise typer.Exit(NOT_VERIFIED)


def evaluate(
    run: Run,
    task: TaskIndex,
    split: Annotated[Literal["train", "validation", "test"], typer.Option(help="On which samples.")] = "test",
    storage: Storage = "runs/",
    as_json: AsJson = False,
) -> None:
    """Print the accuracy of a task's subnetwork."""
    from clnp_search.clnp.subnetwork import Subnetwork
    from clnp_search.config import network_state
    from clnp_search.sequence import TaskSequence

    sweep, folder = open_named(run, storage)
    require_task(folder, task)
    state = network_state(folder, sweep, task)
    samples = getattr(TaskSequence(sweep).data(task), split)
    accuracy = Subnetwork(state, task).accuracy(samples.inputs, samples.labels)
    if as_json:
        print_json({"task": task, "split": split, "samples": len(samples), "accuracy": accuracy})
    else:
        out.print(f"task {task}, {split}: {accuracy:.2%} of {len(samples)} samples")


def export(
    run: Run,
    task: TaskIndex,
    out_file: Annotated[
        Path, typer.Option("--out", metavar="FILE", help=".safetensors, .onnx or .pt2.", show_default=False)
    ],
    storage: Storage = "runs/",
    as_json: AsJson = False,
) -> None:
    """Write a task's subnetwork alone. It takes raw samples: permutation and normalisation are inside."""
    from clnp_search.clnp.subnetwork import EXPORT_SUFFIXES, Subnetwork
    from clnp_search.config import network_state

    suffix = out_file.suffix.lower()
    if suffix not in EXPORT_SUFFIXES:
        raise InputError(f"--out {out_file}: the name must end in one of {', '.join(EXPORT_SUFFIXES)}")
    sweep, folder = open_named(run, storage)
    require_task(folder, task)
    network = Subnetwork(network_state(folder, sweep, task), task)
    try:
        data = network.to_bytes(suffix)
    except ModuleNotFoundError as error:
        raise InputError(f"--out {out_file}: {error}; install the extra: `pip install 'clnp-search[onnx]'`") from error
    partial = out_file.with_name(f".{out_file.name}.partial")
    try:
        partial.write_bytes(data)
        partial.replace(out_file)
    except OSError as error:
        raise InputError(f"--out {out_file}: {error}") from error
    document = {
        "file": str(out_file),
        "task": task,
        "bytes": len(data),
        "input": ["batch", *network.info.input_shape],
        "classes": network.info.num_classes,
        "digest": network.digest,
    }
    if as_json:
        print_json(document)
    else:
        shape = " x ".join(str(size) for size in network.info.input_shape)
        out.print(
            f"{out_file}: task {task}, {len(data)} bytes; takes raw float32 samples (batch x {shape}), gives logits"
        )
