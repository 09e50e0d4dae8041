"""The commands: parse, call, print. What they do lives in `sequence`, `search`, `tracking` and `report`.

Here are those that run a sweep; the modules beside this one have the others.
"""

from __future__ import annotations

import atexit
import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict
from enum import StrEnum
from functools import partial
from importlib import metadata
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, cast

import typer
from typer.exceptions import TyperException

from clnp_search.cli import logs
from clnp_search.cli.console import DONE, FAILED, INPUT_WRONG, INTERRUPTED, as_typed, count, err, out, print_json
from clnp_search.cli.gc import gc
from clnp_search.cli.models import evaluate, export, register, verify
from clnp_search.cli.network import network
from clnp_search.cli.options import (
    Address,
    AsJson,
    Overrides,
    Run,
    RunName,
    RunStorage,
    Storage,
    SweepFile,
    TrackingUri,
    located,
    open_named,
    run_of,
)
from clnp_search.cli.report import report
from clnp_search.cli.reselect import reselect
from clnp_search.cli.runs import compare, print_failed, runs, status
from clnp_search.cli.server import ui
from clnp_search.cli.sweeps import plan, schema
from clnp_search.errors import Damaged, InputError, Interrupted, MachineFault, NoModel

if TYPE_CHECKING:
    from clnp_search.config import Sweep
    from clnp_search.records import Summary
    from clnp_search.search.cluster import Cluster
    from clnp_search.sequence import TaskSequence
    from clnp_search.storage import RunFolder

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("DO_NOT_TRACK", "true")
os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")

logger = logging.getLogger(__name__)
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


def main() -> None:
    """Runs the command line and exits with the status that the contract gives (see `--help`)."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    for name in ("ray", "ray.tune"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    handle_signals()
    try:
        status = app(prog_name="clnp-search", standalone_mode=False) or DONE
        if status == 130:  # typer's own answer to an interrupt
            raise KeyboardInterrupt
    except InputError as error:
        status = _complain(INPUT_WRONG, str(error))
    except Interrupted as error:
        status = _complain(INTERRUPTED, str(error))
    except (Damaged, MachineFault, NoModel) as error:
        status = _complain(FAILED, str(error))
    except (KeyboardInterrupt, typer.Abort):
        status = _complain(INTERRUPTED, "interrupted")
    except SystemExit as error:
        status = FAILED if error.code else DONE
    except TyperException as error:
        context = getattr(error, "ctx", None)
        command = context.command_path if context else "clnp-search"
        status = _complain(INPUT_WRONG, f"{error.format_message()}\nSee `{command} --help`".strip())
    except Exception as error:
        status = _complain(FAILED, f"{type(error).__name__}: {error}")
    _exit(status)


class LogFormat(StrEnum):
    """What standard error is for."""

    TEXT = "text"
    JSON = "json"


def _print_version(asked: bool) -> None:
    if asked:
        out.print(f"clnp-search {metadata.version('clnp-search')}", highlight=False)
        raise typer.Exit


def _show_debug(asked: bool) -> None:
    if asked:
        logging.getLogger("clnp_search").setLevel(logging.DEBUG)


@app.callback()
def program(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", callback=_show_debug, help="Show tracebacks.")] = False,
    log_format: Annotated[
        LogFormat,
        typer.Option("--log-format", envvar=logs.VARIABLE, help="Of standard error; json: an object a line."),
    ] = LogFormat.TEXT,
) -> None:
    """Options of the program itself, before the command."""
    os.environ[logs.VARIABLE] = log_format.value  # for what this process starts
    if log_format is LogFormat.JSON:
        logs.use_json()


def run(
    sweep_file: SweepFile,
    overrides: Overrides = None,
    name: RunName = None,
    storage: RunStorage = None,
    tracking_uri: TrackingUri = None,
    address: Address = "local",
    as_json: AsJson = False,
) -> None:
    """Run a sweep: search, prune and freeze task after task.

    The same command resumes a run that is partly done; with a larger scenario.tasks a finished one goes on.
    """
    from clnp_search.config import load_sweep

    sweep = located(load_sweep(sweep_file, overrides), storage, tracking_uri)
    members = sweep.members(sweep.name if name is None else name)
    if len(members) == 1:
        ((name, sweep),) = members.items()
        _execute(*run_of(sweep, name), address, as_json)
        return
    from clnp_search.branching import fork as begin
    from clnp_search.cli.runs import print_family
    from clnp_search.search.capacity import local_capacity

    # All are checked before the first one begins.
    runs = [run_of(member, member_name) for member_name, member in members.items()]
    family = sweep.name if name is None else name
    at_once = (
        sweep.repetitions if address != "local" else min(sweep.repetitions, local_capacity(sweep.resources).num_slots)
    )
    if at_once > 1:
        from clnp_search.cli.seeds import run_seeds

        _log_spread(sweep, family, [])  # makes the store ready, which several processes at a time cannot
        run_seeds(sweep, family, address, at_once)
    else:
        last: dict[int, RunFolder] = {}
        failed = []
        for member, folder in runs:
            origin, last[member.seed] = last.get(member.seed), folder
            if origin is not None and not folder.exists("sweep.yaml"):
                begin(origin, member, -1, folder)  # so that it takes over what is the same
            try:
                drive(member, folder, address, alone=False)
            except MachineFault as fault:  # which another margin may not meet
                err.print(f"{folder.name}: {fault}", style="red", markup=False, highlight=False)
                failed.append(folder.name)
        if failed:
            raise MachineFault(f"{', '.join(failed)} ended early, as said above. The same command tries them again.")
    folders = [folder for _, folder in runs]
    _log_spread(sweep, family, print_family(folders, as_json), folders[0])


def resume(
    run: Run,
    storage: Storage = "runs/",
    tracking_uri: TrackingUri = None,
    address: Address = "local",
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="Train the failed points of the unfinished task again.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Go on with a run from its folder alone."""
    from clnp_search.agreement import check_sweep

    sweep, folder = open_named(run, storage)
    folder.require_writable()
    check_sweep(folder, sweep)
    _execute(located(sweep, None, tracking_uri), folder, address, as_json, retry_failed)


def fork(
    run: Run,
    after_task: Annotated[
        int,
        typer.Option("--after-task", metavar="K", min=-1, help="The last shared task; -1: none.", show_default=False),
    ],
    name: Annotated[str, typer.Option("--name", help="Name of the new run folder.", show_default=False)],
    overrides: Overrides = None,
    storage: Storage = "runs/",
    tracking_uri: TrackingUri = None,
    address: Address = "local",
    as_json: AsJson = False,
) -> None:
    """Run the tasks after task K anew with other settings, e.g. --set forgetting.margin=1%.

    Tasks 0 to K are shared; grid points that were trained with the same settings on the same state are taken over.
    """
    from clnp_search.branching import fork as begin
    from clnp_search.branching import points_taken_over
    from clnp_search.config import overridden
    from clnp_search.search.capacity import local_capacity
    from clnp_search.storage import run_folder

    recorded, origin = open_named(run, storage)
    sweep = overridden(recorded, overrides or [])
    for key in ("storage", "repetitions", "margins"):
        if getattr(sweep, key) != getattr(recorded, key):
            raise InputError(f"--set {key}: a fork is one run, beside the one that it branches off from")
    sweep = located(sweep, origin.storage, tracking_uri)
    if address == "local":
        local_capacity(sweep.resources)  # raises before anything is written
    folder = run_folder(origin.storage, name)
    is_new = not folder.exists()
    begin(origin, sweep, after_task, folder)
    try:
        summary = drive(sweep, folder, address)
    except InputError:
        if is_new and not folder.has(after_task + 1):
            folder.delete_folder("")  # what is refused is no run: the command can be given again, put right
        raise
    taken, trained = points_taken_over(folder)
    if as_json:
        print_json(asdict(summary) | {"points_taken_over": taken, "points_trained": trained})
        return
    _report(summary, folder, sweep)
    out.print(
        f"{count(taken, 'point')} taken over from {origin.name} or where it branched off, {trained} trained",
        highlight=False,
    )


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
    stop: Annotated[
        bool, typer.Option("--stop", help="Stop the job of this sweep and name; every finished point is kept.")
    ] = False,
    packages: Annotated[
        list[str] | None,
        typer.Option(
            "--uv",
            metavar="PACKAGE",
            help="What uv installs on the nodes for this job: clnp-search==0.1.0, say, or a wheel, which is sent; may "
            "be repeated. Default: nothing; the nodes have what their image has.",
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Send the same run to a Ray cluster as a job. Storage and tracking must be reachable from there.

    Python files in the sweep's module folders go with it, where it names a module of your own; no data do.
    """
    from clnp_search.config import load_sweep
    from clnp_search.search.submit import job_of, submit_run

    sweep = located(load_sweep(sweep_file, overrides), storage, tracking_uri)
    name = sweep.name if name is None else name
    if stop:
        job = job_of(sweep, name, address)
        status = job.stop()
        print_json(asdict(job) | {"status": status}) if as_json else out.print(f"{job.submission_id}: {status}")
        return
    environment = {logs.VARIABLE: "json"} if logs.is_json() else {}
    job = submit_run(sweep, name, address, environment, packages or ())
    if not follow:
        print_json(asdict(job)) if as_json else out.print(f"submitted as {job.submission_id} to {job.address}")
        return
    try:
        status = job.follow(logs.relay)
    except KeyboardInterrupt:
        raise Interrupted(
            f"{job.submission_id} goes on; the same command follows it, and stops it with --stop"
        ) from None
    if as_json:
        print_json(asdict(job) | {"status": status})
    if status == "STOPPED":
        raise Interrupted(
            f"{job.submission_id} was stopped; every finished point is kept. Go on with: the same command"
        )
    if status != "SUCCEEDED":
        raise typer.Exit(FAILED)


for command in (
    run,
    resume,
    reselect,
    fork,
    plan,
    network,
    status,
    runs,
    compare,
    verify,
    evaluate,
    export,
    register,
    report,
    submit,
    gc,
    ui,
    schema,
):
    app.command()(command)


def _log_spread(sweep: Sweep, family: str, rows: list[dict[str, Any]], first: RunFolder | None = None) -> None:
    if sweep.tracking.uri == "none" or sweep.repetitions == 1:
        return
    from clnp_search.tracking.mlflow import TrackingUnavailable, log_spread

    try:
        log_spread(sweep, family, rows, first.read_tracking().get("key", "") if first else "")
    except TrackingUnavailable as error:
        if rows:
            err.print(f"[yellow]MLflow has no means of these runs: {error}[/]; the same command logs them later")


def _execute(sweep: Sweep, folder: RunFolder, address: str, as_json: bool, retry_failed: bool = False) -> None:
    from clnp_search.progress import failed_points

    summary = drive(sweep, folder, address, retry_failed)
    failed = failed_points(folder)
    if as_json:
        print_json(asdict(summary) | {"failed_points": [asdict(each) for each in failed]})
        return
    _report(summary, folder, sweep)
    print_failed(failed)


def drive(sweep: Sweep, folder: RunFolder, address: str, retry_failed: bool = False, alone: bool = True) -> Summary:
    """Takes a run from where it stands to its end; what is seen meanwhile goes to standard error.

    Args:
        alone: It is all that the command runs, so that `resume` goes on with as much.

    Raises:
        InputError: What was asked for cannot be had; nothing was written.
        Interrupted: By a signal, or by another process that took the run over.
        MachineFault: What the run needs failed.
    """
    from clnp_search.cli.metrics import RayMetrics
    from clnp_search.cli.publisher import Publisher
    from clnp_search.cli.view import LiveView
    from clnp_search.config import sweep_of
    from clnp_search.lease import Lease
    from clnp_search.search.idle import NoCluster
    from clnp_search.tracking.probe import fault_of, missing_packages

    if fault := fault_of(sweep.tracking.uri):
        err.print(f"[yellow]MLflow: {fault}.[/] The run goes on; its records wait in the run folder.", highlight=False)
    elif sweep.tracking.uri != "none" and sweep.tracking.models and (missing := missing_packages()):
        err.print(
            f"MLflow gets no models: {missing}, or say `tracking: {{models: false}}`", markup=False, highlight=False
        )
    begun = folder.exists("sweep.yaml")
    publisher = Publisher(folder, sweep)
    lease = Lease(folder, _interrupt_main)
    results, summary = folder.read_results(), folder.read_summary()
    depleted = summary is not None and summary.status == "depleted" and len(summary.tasks) == len(results)
    ended = depleted or len(results) == sweep.scenario.tasks
    finished = begun and ended and sweep.scenario == sweep_of(folder).scenario
    view = logs.EventLog if logs.is_json() else partial(LiveView, err, finished=finished)
    shown = view(sweep, folder.name, results, publisher.state)
    try:
        # Importing torch, Tune and the data set's library takes about as long as Ray's start: they go side by side.
        with ExitStack() as held, shown:
            if begun:
                held.enter_context(lease)
            loading = ThreadPoolExecutor(1).submit(_load, sweep, finished)  # not waited for where nothing needs it
            with nullcontext(cast("Cluster", NoCluster())) if finished else _joined(address, sweep, folder) as cluster:
                sequence = loading.result()
                from clnp_search.baseline import runner_of

                runner = runner_of(sequence, folder, cluster, [shown, publisher, RayMetrics(folder.name)])
                if begun:
                    recorded = sweep_of(folder)
                    if recorded.scenario != sweep.scenario:  # it was given more tasks, or its data elsewhere
                        runner.check()
                    if recorded != sweep:
                        folder.write_sweep(sweep.to_yaml())
                else:  # a run leaves no trace before all that can be checked is checked
                    runner.check()
                    held.enter_context(lease)
                    if folder.exists("sweep.yaml"):
                        raise InputError(f"{folder.uri}: another process has begun this run meanwhile; try again")
                    folder.write_sweep(sweep.to_yaml())
                    begun = True
                if retry_failed and not runner.forget_failed():
                    err.print("no failed point to train again: those of committed tasks stay as they are")
                publisher.beside = cluster.beside
                with publisher:  # ends before Ray does
                    summary = runner.run()
    except KeyboardInterrupt:
        if lease.lost:
            raise Interrupted(f"{lease.lost}, which goes on with it; this process stops") from None
        again = _again(folder, begun and alone)
        raise Interrupted(f"interrupted; every finished point is kept. Go on with: {again}") from None
    except NoModel as error:
        raise MachineFault(str(error)) from error
    except (MachineFault, MemoryError, OSError, RuntimeError) as error:
        what = str(error) if isinstance(error, Damaged | MachineFault) else f"{type(error).__name__}: {error}"
        raise MachineFault(
            f"{what}\nEvery finished point is kept. Once the cause is gone, go on with: {_again(folder, begun)}"
        ) from error
    if publisher.behind:
        err.print(
            f"[yellow]{publisher.behind}[/]\n"
            f"The records wait in the run folder; `clnp-search resume {as_typed(folder)}` logs them later."
        )
    return summary


def _again(folder: RunFolder, by_resume: bool) -> str:
    return f"clnp-search resume {as_typed(folder)}" if by_resume else "the same command"


def _load(sweep: Sweep, finished: bool) -> TaskSequence:
    if not finished:
        import clnp_search.search.tuning  # noqa: F401
    from clnp_search.sequence import TaskSequence

    return TaskSequence(sweep)


@contextmanager
def _joined(address: str, sweep: Sweep, folder: RunFolder) -> Iterator[Cluster]:
    """A cluster of which every node can take part in a run."""
    from clnp_search.search.cluster import connect

    with connect(address, sweep.resources, sweep.num_points) as cluster:
        if address != "local":
            cluster.require_nodes(folder)
        yield cluster


def _report(summary: Summary, folder: RunFolder, sweep: Sweep) -> None:
    """Prints how a run has ended, and what can be done with it."""
    from clnp_search.cli.view import summary_line, summary_table

    out.print(summary_table(summary))
    out.print(summary_line(summary))
    full = [name for name, units in summary.tasks[-1].units.items() if units.free == 0]
    if full and sweep.method == "clnp" and not sweep.capacity.widens:
        out.print(f"[yellow]No free unit is left in {', '.join(full)}[/]: later tasks have only what is there.")
    shown = as_typed(folder)
    out.print("\nNext:")
    if sweep.tracking.uri != "none":
        out.print(f"  clnp-search ui {shown}          compare its runs in MLflow", highlight=False)
    proof = "prove that nothing was forgotten" if sweep.method == "clnp" else "check its files, and evaluate again"
    out.print(f"  clnp-search verify {shown}      {proof}", highlight=False)
    out.print(f"  clnp-search export {shown} --task 0 --out task0.onnx", highlight=False)
    out.print(f"  clnp-search status {shown}      this table; resume, if the run was cut short", highlight=False)
    if folder.local_path:
        out.print(f"  figures: {folder.local_path / 'figures'}", highlight=False)


def _complain(status: int, message: str) -> int:
    """Says how the command ended; with `--debug`, also where."""
    logger.debug("the command ended here", exc_info=True)
    if logs.is_json():
        level = logging.ERROR if status in (FAILED, INPUT_WRONG) else logging.WARNING
        logger.log(level, "%s", message, extra={"exit_status": status})
        return status
    err.print(message, style="red" if status in (FAILED, INPUT_WRONG) else "yellow", markup=False, highlight=False)
    return status


def _exit(status: int) -> NoReturn:
    """Ends this process at once: taking torch, Ray and MLflow apart object by object would take two seconds."""
    logging.shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def handle_signals() -> None:
    """Has SIGINT and SIGTERM interrupt the main thread, if it is the one that asks."""
    if threading.current_thread() is not threading.main_thread():
        return  # of a notebook's server, for example: only the main thread may
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _interrupt)


def _interrupt_main() -> None:
    """Has the main thread end as by an interrupt."""
    signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)


def _interrupt(number: int, frame: Any) -> NoReturn:
    # Not an `Exception`, so that no library between here and `_execute` takes it for a failure.
    raise KeyboardInterrupt
