"""The commands: parse, call, print. What they do lives in `sequence`, `search`, `tracking` and `report`."""

from __future__ import annotations

import atexit
import json
import logging
import os
import signal
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn

import typer
from rich.console import Console
from rich.table import Table
from typer.exceptions import TyperException

from clnp_search.cli.report import report
from clnp_search.errors import InputError, Interrupted

if TYPE_CHECKING:
    from clnp_search.config import Sweep
    from clnp_search.records import Summary
    from clnp_search.sequence import TaskSequence
    from clnp_search.storage import RunFolder

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("DO_NOT_TRACK", "true")
os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")

DONE, FAILED, INPUT_WRONG, INTERRUPTED, NOT_VERIFIED = range(5)

app = typer.Typer(
    name="clnp-search",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    help="Search, prune, freeze: Continual Learning via Neural Pruning over a sequence of tasks.\n\n"
    "Start with `clnp-search run sweeps/quickstart.yaml`, then look at `clnp-search ui`. "
    "RUN is a run folder (path or URI), or a run's name under the storage.\n\n"
    "Exit status: 0 done, 1 failed, 2 the input is wrong, 3 interrupted and resumable, 4 a verification failed.",
)
out = Console()
err = Console(stderr=True)

SweepFile = Annotated[Path, typer.Argument(metavar="SWEEP.yaml", help="The sweep file.", show_default=False)]
Run = Annotated[str, typer.Argument(metavar="RUN", help="A run folder, or a name under --storage.", show_default=False)]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a key, e.g. training.epochs=3.")
]
Storage = Annotated[str, typer.Option("--storage", metavar="URI", help="Where run folders are.")]
Address = Annotated[str, typer.Option("--address", help="Ray: local (starts one), auto (finds one), or HOST:PORT.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document on standard output.")]
TaskIndex = Annotated[int, typer.Option("--task", metavar="K", min=0, help="Which task, from 0.", show_default=False)]
RunName = Annotated[str | None, typer.Option("--name", help="Name of the run folder. Default: the sweep's name.")]
RunStorage = Annotated[
    str | None, typer.Option("--storage", metavar="URI", help="Where the run folder goes. Default: the sweep's.")
]
TrackingUri = Annotated[
    str | None, typer.Option("--tracking-uri", metavar="URI", help="MLflow store or server; none: no tracking.")
]


def main() -> None:
    """Runs the command line and exits with the status that the contract gives (see `--help`)."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    for name in ("ray", "ray.tune"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    _handle_signals()
    try:
        status = app(standalone_mode=False) or DONE
    except InputError as error:
        status = _complain(INPUT_WRONG, str(error))
    except Interrupted as error:
        status = _complain(INTERRUPTED, str(error))
    except (KeyboardInterrupt, typer.Abort):
        status = _complain(INTERRUPTED, "interrupted")
    except SystemExit as error:  # typer's own answer to an interrupt is 130
        status = INTERRUPTED if error.code == 130 else FAILED if error.code else DONE
    except TyperException as error:
        error.show()  # type: ignore[attr-defined]
        status = INPUT_WRONG
    except Exception as error:
        logging.getLogger(__name__).debug("failed", exc_info=True)
        status = _complain(FAILED, f"{type(error).__name__}: {error}")
    _exit(status)


@app.command()
def run(
    sweep_file: SweepFile,
    overrides: Overrides = None,
    name: RunName = None,
    storage: RunStorage = None,
    tracking_uri: TrackingUri = None,
    address: Address = "local",
    as_json: AsJson = False,
) -> None:
    """Run a sweep: search, prune and freeze task after task. The same command resumes a run that is partly done."""
    from clnp_search.config import load_sweep, sweep_of
    from clnp_search.storage import run_folder

    sweep = _located(load_sweep(sweep_file, overrides), storage, tracking_uri)
    folder = run_folder(sweep.storage, name or sweep.name)
    if folder.exists("sweep.yaml"):
        recorded = sweep_of(folder)
        if different := sweep.differences(recorded):
            listed = "\n  ".join(different)
            raise InputError(
                f"{folder.uri} is a run with other settings:\n  {listed}\n"
                "Give the new run another name with --name, or resume the old one with `clnp-search resume`."
            )
        sweep = recorded.model_copy(update={"tracking": sweep.tracking, "resources": sweep.resources})
    else:
        folder.write_sweep(sweep.to_yaml())
    _execute(sweep, folder, address, as_json)


@app.command()
def resume(
    run: Run,
    storage: Storage = "runs/",
    tracking_uri: TrackingUri = None,
    address: Address = "local",
    as_json: AsJson = False,
) -> None:
    """Go on with a run from its folder alone."""
    sweep, folder = _open(run, storage)
    _execute(_located(sweep, None, tracking_uri), folder, address, as_json)


@app.command()
def plan(
    sweep_file: SweepFile,
    overrides: Overrides = None,
    name: RunName = None,
    storage: RunStorage = None,
    address: Address = "local",
    as_json: AsJson = False,
) -> None:
    """Show what a run would do: points, packs, resources asked and present, memory, and what is done already."""
    from clnp_search.config import load_sweep
    from clnp_search.search.capacity import local_capacity
    from clnp_search.search.points import grid
    from clnp_search.sequence import TaskSequence, plan_packs
    from clnp_search.storage import run_folder

    sweep = _located(load_sweep(sweep_file, overrides), storage, None)
    folder = run_folder(sweep.storage, name or sweep.name)
    if address == "local":
        capacity = local_capacity(sweep.resources)
    else:
        from clnp_search.search.cluster import connect

        with connect(address, sweep.resources) as cluster:
            capacity = replace(cluster.capacity, slot_bytes=cluster.slot_bytes())
    sequence = TaskSequence(sweep)
    results = folder.read_results()
    state = folder.read_state(len(results) - 1) if results else sequence.empty_state()
    points = grid(sweep, None)
    memory = sequence.memory(state, min(len(results), len(sequence) - 1))
    packs = plan_packs(sweep, points, memory, capacity.num_slots, capacity.slot_bytes)
    searched = len(sequence) if sweep.search.tasks == "every" else 1
    trial_bytes = memory.total(max(len(pack) for pack in packs))
    document: dict[str, Any] = {
        "run": folder.uri,
        "tasks": len(sequence),
        "tasks_done": len(results),
        "points_per_searched_task": len(points),
        "points_in_all": len(points) * searched + len(sequence) - searched,
        "packs": [[points[index].name for index in pack] for pack in packs],
        "points": [
            {"point": point.name, "alpha": point.alpha, "learning_rate": point.learning_rate} for point in points
        ],
        "resources_asked": sweep.resources.model_dump(),
        "resources_present": {"cpu": capacity.cpus, "gpu": capacity.gpus},
        "trials_at_once": min(capacity.num_slots, len(packs)),
        "memory_per_trial_bytes": trial_bytes,
        "memory_present_per_trial_bytes": capacity.slot_bytes,
    }
    if as_json:
        _print_json(document)
        return
    out.print(f"[bold]{sweep.name}[/]: {document['tasks']} tasks of {sweep.scenario.name}, run folder {folder.uri}")
    out.print(
        f"{len(results)} tasks done; {document['points_in_all']} grid points in all, {len(points)} a searched task"
    )
    out.print(
        f"each trial: {sweep.resources.cpu} CPU, {sweep.resources.gpu:g} GPU; present: {capacity.cpus:g} CPU, "
        f"{capacity.gpus:g} GPU; {document['trials_at_once']} trials at a time"
    )
    out.print(f"memory of a trial: about {trial_bytes / 2**20:.0f} MiB of {capacity.slot_bytes / 2**20:.0f} MiB")
    table = Table("point", "pack", "alpha", "learning rate", header_style="bold")
    for point in points:
        pack = next(index for index, pack in enumerate(packs) if point.index in pack)
        table.add_row(
            point.name, str(pack), " ".join(f"{value:g}" for value in point.alpha), f"{point.learning_rate:g}"
        )
    out.print(table)


@app.command()
def status(run: Run, storage: Storage = "runs/", as_json: AsJson = False) -> None:
    """Show how far a run has come, and the capacity that is left."""
    from clnp_search.cli.view import summary_line, summary_table

    sweep, folder = _open(run, storage)
    summary = folder.read_summary()
    task = len(summary.tasks) if summary else 0
    plan = folder.read_plan(task)
    done = sum(folder.read_point(task, point.name) is not None for point in plan.points) if plan else 0
    current = {"task": task, "points_done": done, "points": len(plan.points)} if plan else None
    if as_json:
        document: dict[str, Any] = (
            asdict(summary) if summary else {"name": folder.name, "status": "running", "tasks": []}
        )
        _print_json(document | {"num_tasks": sweep.scenario.tasks, "current": current})
        return
    if summary and summary.tasks:
        out.print(summary_table(summary))
        out.print(summary_line(summary))
    out.print(f"{task} of {sweep.scenario.tasks} tasks committed")
    if current:
        out.print(f"task {task}: {done} of {current['points']} points trained; go on with `clnp-search resume {run}`")


@app.command()
def verify(run: Run, storage: Storage = "runs/", as_json: AsJson = False) -> None:
    """Prove that nothing was forgotten: digests, cut weights, and every task evaluated again. Status 4 if not."""
    from clnp_search.sequence import TaskSequence
    from clnp_search.verification import verify as check_run

    sweep, folder = _open(run, storage)
    checks = check_run(folder, TaskSequence(sweep))
    failed = [check for check in checks if not check.passed]
    if as_json:
        _print_json({"run": folder.uri, "verified": not failed, "checks": [asdict(check) for check in checks]})
    else:
        table = Table("task", "check", "", "found", header_style="bold")
        for check in checks:
            mark = "[green]passed[/]" if check.passed else "[red]FAILED[/]"
            table.add_row(str(check.task), check.name, mark, check.detail)
        out.print(table)
        out.print(
            f"[red]{len(failed)} of {len(checks)} checks failed[/]" if failed else f"all {len(checks)} checks passed"
        )
    if failed:
        raise typer.Exit(NOT_VERIFIED)


@app.command()
def evaluate(
    run: Run,
    task: TaskIndex,
    split: Annotated[Literal["train", "validation", "test"], typer.Option(help="On which samples.")] = "test",
    storage: Storage = "runs/",
    as_json: AsJson = False,
) -> None:
    """Print the accuracy of a task's subnetwork."""
    from clnp_search.clnp.subnetwork import Subnetwork
    from clnp_search.sequence import TaskSequence

    sweep, folder = _open(run, storage)
    _require_task(folder, task)
    state = folder.read_state(len(folder.read_results()) - 1)
    samples = getattr(TaskSequence(sweep).data(task), split)
    accuracy = Subnetwork(state, task).accuracy(samples.inputs, samples.labels)
    if as_json:
        _print_json({"task": task, "split": split, "samples": len(samples), "accuracy": accuracy})
    else:
        out.print(f"task {task}, {split}: {accuracy:.2%} of {len(samples)} samples")


@app.command()
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

    suffix = out_file.suffix.lower()
    if suffix not in EXPORT_SUFFIXES:
        raise InputError(f"--out {out_file}: the name must end in one of {', '.join(EXPORT_SUFFIXES)}")
    _, folder = _open(run, storage)
    _require_task(folder, task)
    network = Subnetwork(folder.read_state(len(folder.read_results()) - 1), task)
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
        _print_json(document)
    else:
        shape = " x ".join(str(size) for size in network.info.input_shape)
        out.print(
            f"{out_file}: task {task}, {len(data)} bytes; takes raw float32 samples (batch x {shape}), gives logits"
        )


app.command()(report)


@app.command()
def submit(
    sweep_file: SweepFile,
    address: Annotated[
        str, typer.Option("--address", metavar="URL", help="Ray's job server, e.g. http://127.0.0.1:8265.")
    ],
    overrides: Overrides = None,
    name: RunName = None,
    storage: RunStorage = None,
    tracking_uri: TrackingUri = None,
    follow: Annotated[bool, typer.Option("--follow/--detach", help="Show the job's log until it ends.")] = True,
    as_json: AsJson = False,
) -> None:
    """Send the same run to a Ray cluster as a job. Storage and tracking must be reachable from there."""
    from clnp_search.config import load_sweep
    from clnp_search.search.submit import submit_run

    sweep = _located(load_sweep(sweep_file, overrides), storage, tracking_uri)
    job = submit_run(sweep, name or sweep.name, address)
    if not follow:
        _print_json(asdict(job)) if as_json else out.print(f"submitted as {job.submission_id} to {job.address}")
        return
    status = job.follow(lambda text: err.print(text, end="", markup=False, highlight=False))
    if as_json:
        _print_json(asdict(job) | {"status": status})
    if status != "SUCCEEDED":
        raise typer.Exit(FAILED)


@app.command()
def ui(
    run: Annotated[
        str | None, typer.Argument(metavar="[RUN]", help="A run whose store to show.", show_default=False)
    ] = None,
    storage: Storage = "runs/",
    tracking_uri: TrackingUri = None,
    host: Annotated[str, typer.Option(help="Where the server listens.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Its port.")] = 5000,
) -> None:
    """Open MLflow's UI on the store that runs are logged to."""
    from clnp_search.config import TrackingConfig

    uri = tracking_uri or (_open(run, storage)[0].tracking.uri if run else _absolute_sqlite(TrackingConfig().uri))
    if uri.startswith(("http://", "https://")):
        out.print(f"This store has a server of its own: {uri}")
        return
    if uri.startswith("sqlite:///") and not Path(uri.removeprefix("sqlite:///")).exists():
        raise InputError(f"{uri}: no such database; runs make it, or name another one with --tracking-uri")
    err.print(f"MLflow on http://{host}:{port} with {uri}; Ctrl-C ends it")
    command = [
        sys.executable,
        "-m",
        "mlflow",
        "server",
        "--backend-store-uri",
        uri,
        "--host",
        host,
        "--port",
        str(port),
    ]
    os.environ.setdefault("MLFLOW_SERVER_ENABLE_JOB_EXECUTION", "false")
    os.execv(sys.executable, [*command, "--workers", "1"])


@app.command()
def schema() -> None:
    """Print the sweep file's JSON schema, for editors."""
    from clnp_search.config import Sweep

    _print_json(Sweep.model_json_schema())


def _execute(sweep: Sweep, folder: RunFolder, address: str, as_json: bool) -> None:
    from clnp_search.cli.publisher import Publisher
    from clnp_search.cli.view import LiveView, summary_line, summary_table
    from clnp_search.search.cluster import connect

    publisher = Publisher(folder, sweep)
    view = LiveView(err, sweep, folder.name, folder.read_results(), publisher.state)
    try:
        # Importing torch, Tune and the data set's library takes about as long as Ray's start: they go side by side.
        with ThreadPoolExecutor(1) as loader, view, publisher:
            loading = loader.submit(_load, sweep)
            num_points = len(sweep.search.alpha) * len(sweep.search.learning_rate)
            with connect(address, sweep.resources, num_points) as cluster:
                _handle_signals()  # again, because ray.init puts its own handler of SIGTERM in place
                sequence = loading.result()
                from clnp_search.sequence import Runner

                summary = Runner(sequence, folder, cluster, [view, publisher]).run()
    except KeyboardInterrupt:
        raise Interrupted(
            f"interrupted; every finished point is kept. Go on with: clnp-search resume {_shown(folder)}"
        ) from None
    if publisher.unavailable:
        err.print(
            f"[yellow]Figures and MLflow are behind: {publisher.unavailable}[/]\n"
            f"The records wait in the run folder; `clnp-search resume {_shown(folder)}` logs them later."
        )
    if as_json:
        _print_json(asdict(summary))
        return
    _print_end(summary, folder, sweep, summary_table(summary), summary_line(summary))


def _load(sweep: Sweep) -> TaskSequence:
    import clnp_search.search.tuning  # noqa: F401
    from clnp_search.sequence import TaskSequence

    return TaskSequence(sweep)


def _print_end(summary: Summary, folder: RunFolder, sweep: Sweep, table: Table, line: str) -> None:
    out.print(table)
    out.print(line)
    full = [name for name, units in summary.tasks[-1].units.items() if units.free == 0]
    if full:
        out.print(f"[yellow]No free unit is left in {', '.join(full)}[/]: later tasks have only what is there.")
    shown = _shown(folder)
    out.print("\nNext:")
    if sweep.tracking.uri != "none":
        out.print(f"  clnp-search ui {shown}          compare its runs in MLflow", highlight=False)
    out.print(f"  clnp-search verify {shown}      prove that nothing was forgotten", highlight=False)
    out.print(f"  clnp-search export {shown} --task 0 --out task0.onnx", highlight=False)
    out.print(f"  clnp-search status {shown}      this table; resume, if the run was cut short", highlight=False)
    if folder.local_path:
        out.print(f"  figures: {folder.local_path / 'figures'}", highlight=False)


def _shown(folder: RunFolder) -> str:
    """A run as a person would type it here."""
    path = folder.local_path
    if path is None:
        return folder.uri
    here = Path.cwd()
    if path.parent == here / "runs":
        return path.name
    return str(path.relative_to(here)) if path.is_relative_to(here) else str(path)


def _located(sweep: Sweep, storage: str | None, tracking_uri: str | None) -> Sweep:
    """The sweep with every place made absolute, so that it means the same from another folder."""
    from clnp_search.config import TrackingConfig

    storage = storage or sweep.storage
    return sweep.model_copy(
        update={
            "scenario": sweep.scenario.model_copy(update={"root": str(Path(sweep.scenario.root).absolute())}),
            "storage": storage if "://" in storage else str(Path(storage).absolute()),
            "tracking": TrackingConfig(uri=_absolute_sqlite(tracking_uri or sweep.tracking.uri)),
        }
    )


def _absolute_sqlite(uri: str) -> str:
    prefix = "sqlite:///"
    path = uri.removeprefix(prefix)
    return f"{prefix}{Path(path).absolute()}" if uri.startswith(prefix) and not path.startswith("/") else uri


def _open(run: str, storage: str) -> tuple[Sweep, RunFolder]:
    from clnp_search.config import sweep_of
    from clnp_search.storage import open_run

    folder = open_run(run, storage)
    return sweep_of(folder), folder


def _require_task(folder: RunFolder, task: int) -> None:
    committed = len(folder.read_results())
    if task >= committed:
        allowed = f"0 to {committed - 1}" if committed else "none yet"
        raise InputError(f"--task {task}: not committed; allowed: {allowed}")


def _print_json(document: Any) -> None:
    sys.stdout.write(json.dumps(document, indent=1) + "\n")


def _complain(status: int, message: str) -> int:
    err.print(message, style="red" if status in (FAILED, INPUT_WRONG) else "yellow", markup=False, highlight=False)
    return status


def _exit(status: int) -> NoReturn:
    """Ends this process at once: taking torch, Ray and MLflow apart object by object would take two seconds."""
    logging.shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _handle_signals() -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _interrupt)


def _interrupt(number: int, frame: Any) -> NoReturn:
    # Not an `Exception`, so that no library between here and `_execute` takes it for a failure.
    raise KeyboardInterrupt
