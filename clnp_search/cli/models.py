"""Commands that look at committed models or hand them on: `verify`, `evaluate`, `export` and `register`."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.markup import escape
from rich.table import Table

from clnp_search.cli.console import NOT_VERIFIED, out, print_json
from clnp_search.cli.options import (
    AsJson,
    Run,
    Storage,
    TaskIndex,
    TrackingUri,
    located,
    open_named,
    require_task,
)
from clnp_search.errors import InputError, MachineFault


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
    from clnp_search.agreement import check_data, check_sweep
    from clnp_search.clnp.subnetwork import Subnetwork
    from clnp_search.config import network_state
    from clnp_search.sequence import TaskSequence

    sweep, folder = open_named(run, storage)
    require_task(folder, task)
    check_sweep(folder, sweep)
    state, sequence = network_state(folder, sweep, task), TaskSequence(sweep)
    if plan := folder.read_plan(task):
        check_data(folder, plan, sequence.data_digest(task))
    samples = getattr(sequence.data(task), split)
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
    if out_file.is_dir():
        raise InputError(f"--out {out_file}: is a folder; name a file")
    if not out_file.parent.is_dir():
        raise InputError(f"--out {out_file}: there is no folder {out_file.parent}")
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
        with suppress(OSError):
            partial.unlink()
        raise InputError(f"--out {out_file}: {error.strerror}") from error
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
        about = f"takes raw float32 samples (batch x {shape}), gives logits"
        if suffix == ".safetensors":
            about = "its tensors alone; .onnx and .pt2 hold a network that runs"
        out.print(f"{out_file}: task {task}, {len(data)} bytes; {about}")


def register(
    run: Run,
    name: Annotated[
        str | None, typer.Option("--name", metavar="MODEL", help="Name in the registry. Default: the run's name.")
    ] = None,
    storage: Storage = "runs/",
    tracking_uri: TrackingUri = None,
    as_json: AsJson = False,
) -> None:
    """Register every committed task's network in MLflow: versions of one model, aliases task-0, task-1, ...

    What MLflow has not yet is logged first. The same command again changes nothing; after more tasks, it adds theirs;
    for another run under the same name, the aliases move to its versions.

    Then, with MLFLOW_TRACKING_URI set: `mlflow models serve -m models:/RUN@task-0 --env-manager local`
    """
    from clnp_search.lease import Lease
    from clnp_search.tracking.mlflow import MlflowTracker, TrackingUnavailable
    from clnp_search.tracking.probe import fault_of, missing_packages

    sweep, folder = open_named(run, storage)
    sweep = located(sweep, None, tracking_uri)
    name = folder.name if name is None else name
    if not name.strip() or {*name} & {*"/:"}:
        raise InputError(f"--name {name!r}: MLflow's models have names without / and :")
    if sweep.tracking.uri == "none":
        raise InputError(f"{run}: nothing is logged to MLflow (tracking.uri is none); name a store with --tracking-uri")
    if fault := fault_of(sweep.tracking.uri) or missing_packages():
        raise InputError(f"MLflow: {fault}")
    folder.require_writable()
    try:
        with Lease(folder, lambda: None):  # whoever drives the run logs models too
            registered = MlflowTracker(folder, sweep).register(name)
    except (TrackingUnavailable, ValueError) as error:
        raise MachineFault(f"MLflow: {error}\nThe same command goes on from there.") from error
    if as_json:
        print_json([asdict(each) | {"uri": each.uri} for each in registered])
        return
    for each in registered:
        out.print(f"task {each.task}: {each.uri}, version {each.version}", highlight=False)
    if not registered:
        out.print(f"{folder.name}: no task is committed yet")
