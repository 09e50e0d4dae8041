"""Ray: where packs are trained (as Tune trials) and candidates are scanned (as tasks).

Processes that train or scan have imported torch, and Ray keeps them for the next task's packs and scans; a trial's own
process only watches over its pack, so this module imports nothing heavy.
"""

from __future__ import annotations

import gc
import logging
import os
import signal
import socket
import sys
import threading
import traceback
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from functools import cached_property
from importlib import metadata
from typing import TYPE_CHECKING, Any, TypeVar

# Before ray is imported: no usage data, no second `uv run` around every worker, no progress printing of its own, one
# working folder for all trials, and an interrupt that reaches the driver instead of only pausing Tune.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
os.environ.setdefault("RAY_CHDIR_TO_TRIAL_DIR", "0")
os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
os.environ.setdefault("TUNE_DISABLE_SIGINT_HANDLER", "1")
# Trials start side by side; how many there are at a time, the search says itself.
os.environ.setdefault("TUNE_MAX_PENDING_TRIALS_PG", "1000")
# Workers compete with the driver, which logs meanwhile; Ray would put them far behind it.
os.environ.setdefault("RAY_worker_niceness", "0")
# No workers without an environment, which none of our tasks could use; see TRIAL_ENVIRONMENT.
os.environ.setdefault("RAY_prestart_worker_first_driver", "0")
# Idle workers, which have imported torch, stay for the next task's scans instead of ending after a second.
os.environ.setdefault("RAY_num_workers_soft_limit", str(2 * (os.cpu_count() or 1)))

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from clnp_search.errors import InputError, MachineFault
from clnp_search.search.capacity import Node, capacity_of, gpu_slot_bytes, local_cpus
from clnp_search.search.retries import cause_of, in_new_process, pause, tried
from clnp_search.storage import RunFolder

if TYPE_CHECKING:
    from clnp_search.clnp.scan import Candidate
    from clnp_search.config import ResourcesConfig
    from clnp_search.records import PackProgress, Point, ScanRecord
    from clnp_search.search.trial import OfTask, RunInputs
    from clnp_search.search.tuning import Program

logger = logging.getLogger(__name__)
SCAN_REPORT_S = 2.0
# What Tune gives to its trials, and they to their packs: a process serves only tasks of the same environment.
TRIAL_ENVIRONMENT = {
    "env_vars": {"PL_DISABLE_FORK": "1", "RAY_CHDIR_TO_TRIAL_DIR": os.environ["RAY_CHDIR_TO_TRIAL_DIR"]}
}
# Of what runs beside them: a process that has stepped back serves no pack.
BESIDE_ENVIRONMENT = {"env_vars": {"CLNP_SEARCH_BESIDE": "1"}}
BESIDE_NICENESS = 10
START_ATTEMPTS = 4
PROBE_S = 5.0
NODE_S, ENVIRONMENT_S = 60.0, 600.0  # for a node's answer, and before it for the job's environment, if uv makes one
TOKEN = "the token that its head was started with: set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH"
LEAVE_S = 0.2  # how long leaving a cluster may wait for another thread
T = TypeVar("T")


class Cluster:
    """A connection to Ray, with the resources that every trial is given."""

    def __init__(self, resources: ResourcesConfig) -> None:
        self.resources = resources
        self._beside, self._left = threading.Lock(), False
        self._alive = [node for node in ray.nodes() if node["Alive"]]
        # A process that has used one of several GPUs cannot be given another.
        several = bool(resources.gpu) and any(_node(node).gpus > 1 for node in self._alive)
        self._options = {"num_cpus": resources.cpu, "num_gpus": resources.gpu, "max_calls": int(several)}
        self.capacity = capacity_of(resources, [_node(node) for node in self._alive])

    @property
    def device(self) -> str:
        """Where trials compute."""
        return self.resources.device

    @cached_property
    def slot_bytes(self) -> int:
        """Memory that one trial may plan with, on the device where it computes.

        Raises:
            MachineFault: A GPU is there by name, but cannot be used.
        """
        if not self.resources.gpu:
            return self.capacity.slot_bytes
        try:
            whole = ray.get(ray.remote(**self._options)(_gpu_bytes).remote())
        except ray.exceptions.RayError as error:
            raise MachineFault(f"resources.gpu: Ray offers a GPU that cannot be used: {cause_of(error)}") from error
        return gpu_slot_bytes(self.resources, whole)

    def require_nodes(self, folder: RunFolder) -> None:
        """Nothing, if every node that can hold a trial has this program and sees the storage of a run.

        Of data sets nodes need nothing: the driver reads them, and they travel through Ray's object store.

        Raises:
            InputError: Some do not; names each.
        """
        storage, token = RunFolder(folder.storage), f".probe-{uuid.uuid4().hex}"
        able = [
            node
            for node in self._alive
            if _node(node).cpus >= self.resources.cpu and _node(node).gpus >= self.resources.gpu
        ]
        names = {node["NodeID"]: f"{node['NodeManagerHostname']} ({node['NodeManagerAddress']})" for node in able}
        probe = ray.remote(num_cpus=0, max_retries=0)(_probe)
        try:
            storage.write(token, b"")
            asked = {
                probe.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote(
                    storage.uri, token, f"{token}-{node}", _versions()
                ): node
                for node in names
            }
            limit_s = NODE_S + (ENVIRONMENT_S if "uv" in ray.get_runtime_context().runtime_env else 0)
            done, late = ray.wait([*asked], num_returns=len(asked), timeout=limit_s)
            faults = {asked[each]: f"gave no answer within {limit_s:g} s" for each in late}
            for each in done:
                try:
                    fault = ray.get(each)
                except ray.exceptions.RayError as error:
                    fault = cause_of(error)
                if not fault and not storage.exists(f"{token}-{asked[each]}"):
                    fault = "what it writes there is not seen here"
                if fault:
                    faults[asked[each]] = fault
        finally:
            for name in (token, *(f"{token}-{node}" for node in names)):
                storage.delete(name)
        # What has ended meanwhile trains nothing.
        alive = {node["NodeID"] for node in ray.nodes() if node["Alive"]}
        if faults := {node: fault for node, fault in faults.items() if node in alive}:
            listed = "".join(f"\n  {names[node]}: {fault}" for node, fault in faults.items())
            raise InputError(f"{len(faults)} of {len(names)} nodes cannot train with storage {storage.uri}{listed}")

    def warm_up(self, num_points: int) -> None:
        """Has processes import torch while the driver does, where they will serve more than one task."""
        if not self._options["max_calls"]:
            remote = ray.remote(**self._options, runtime_env=TRIAL_ENVIRONMENT)(_warm_up)
            for _ in range(min(self.capacity.num_slots, num_points)):
                remote.remote()

    def share(self, inputs: RunInputs | OfTask) -> ray.ObjectRef:
        """Puts the inputs of a run or of one task into the object store, from where trials and scans read them."""
        return ray.put(inputs)

    def beside(self, function: Callable[..., None], *arguments: Any) -> None:
        """Calls a function in a process of its own, so that it does not take the driver's interpreter from the search.

        Where that fails, it is called here: a client's machine is none of the cluster's, which may not see its storage.

        Raises:
            RuntimeError: The cluster is left, or was left before the function has ended.
        """
        try:
            with self._beside:
                self._call_beside(function, arguments)
        except ray.exceptions.RayError:
            function(*arguments)

    def _call_beside(self, function: Callable[..., None], arguments: Sequence[Any]) -> None:
        if not self._left:
            here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
            options = {"num_cpus": 0, "max_retries": 0, "runtime_env": BESIDE_ENVIRONMENT, "scheduling_strategy": here}
            called = ray.remote(**options)(_call).remote(function, arguments)
            while not self._left:
                if ray.wait([called], timeout=LEAVE_S)[0]:
                    ray.get(called)
                    return
            del called  # here, and not where the error is forgotten: Ray may be shut down by then
        raise RuntimeError("the cluster is left")

    def leave(self) -> None:
        """Waits until no other thread uses Ray, which would end this process when it is shut down meanwhile."""
        self._left = True
        with self._beside:
            pass

    def train(
        self,
        program: Program[T],
        shared: ray.ObjectRef,
        ray_folder: tuple[str, Any],
        max_failures: int,
        listen: Callable[[PackProgress], None],
    ) -> T:
        """Runs a program that asks for packs, each of which a Tune trial trains and writes to the run folder.

        Args:
            shared: The run's inputs.
            ray_folder: Where Tune keeps its experiments: a path, and its pyarrow filesystem.
            max_failures: How often a pack is tried again.

        Returns:
            The program's result.

        Raises:
            MachineFault: A pack failed more often than that, by no fault of its points.
        """
        from clnp_search.search.tuning import run_trials

        slots = self.capacity.num_slots
        return run_trials(program, shared, self._options, slots, ray_folder, max_failures, listen)

    def scan(
        self,
        shared: ray.ObjectRef,
        of_task: ray.ObjectRef,
        points: Sequence[Point],
        min_correct: int,
        rule: str,
        max_failures: int,
        listen: Callable[[int], None] = lambda models: None,
    ) -> Iterator[ScanRecord]:
        """Scans candidates in parallel; gives each record as it is done.

        Args:
            shared, of_task: The inputs of the run and of the task, as `share` gave them.
            max_failures: How often a scan is tried again.
            listen: Is told now and then how many models the scans under way have tried.

        Raises:
            MachineFault: A scan failed more often than that.
        """
        remote = ray.remote(**self._options, max_retries=0, runtime_env=TRIAL_ENVIRONMENT)(_scan_task)
        left, failures, models = list(points), Counter[str](), Counter[str]()
        running: dict[ray.ObjectRefGenerator, Point] = {}
        while left or running:
            # No more at a time than can run: for tasks that wait, Ray would start processes.
            while left and len(running) < self.capacity.num_slots:
                point = left.pop(0)
                attempt = remote.options(**in_new_process(failures[point.name], TRIAL_ENVIRONMENT))
                running[attempt.remote(shared, of_task, point, min_correct, rule)] = point
            done, _ = ray.wait(list(running))
            point = running[done[0]]
            try:
                found = ray.get(next(done[0]))
            except ray.exceptions.RayError as error:
                found = cause_of(error)
            if isinstance(found, int):
                models[point.name] = found
                listen(models.total())
                continue
            del running[done[0]], models[point.name]
            if not isinstance(found, str):
                yield found
                continue
            fault = f"threshold scan of {point.name}: {found}"
            failures[point.name] += 1
            if failures[point.name] > max_failures:
                raise MachineFault(fault + tried(failures[point.name]))
            logger.warning("%s; trying again", fault, extra={"point": point.name})
            pause(failures[point.name])
            left.insert(0, point)


@contextmanager
def connect(address: str, resources: ResourcesConfig, num_points: int = 0) -> Iterator[Cluster]:
    """A Ray cluster for the length of a run.

    Args:
        address: `local` starts one in this machine; `auto` finds one; `HOST:PORT` or `ray://...` names one.
        num_points: How many a task will have: processes are made ready for as many.

    Raises:
        InputError: There is none, or no node of it can hold a trial.
        MachineFault: Ray cannot be started on this machine.
    """
    if address == "local" and resources.cpu > (os.cpu_count() or 1):
        raise InputError(f"resources.cpu: {resources.cpu} is more than this machine has; at most {os.cpu_count()}")
    with _interruptible():
        if address == "local":
            _start()
        else:
            _join(address)
    try:
        with _interruptible():
            cluster = Cluster(resources)
            cluster.warm_up(num_points)
        try:
            yield cluster
        finally:
            cluster.leave()
    finally:
        # Ray ends this process if another thread frees one of its references meanwhile, as the garbage collector would.
        gc.disable()
        gc.collect()
        try:
            ray.shutdown()
        finally:
            gc.enable()


@contextmanager
def _interruptible() -> Iterator[None]:
    """Inside, a SIGTERM interrupts; the handlers that Ray puts in place as it starts would have the process exit."""
    try:
        yield
    except SystemExit:
        raise KeyboardInterrupt from None


def _start() -> None:
    """Starts Ray on this machine; tries again, because processes of Ray give up when the machine is loaded."""
    for failures in range(1, START_ATTEMPTS + 1):
        try:
            _init("local", include_dashboard=False, num_cpus=local_cpus())
            if "RAY_AUTH_TOKEN_PATH" not in os.environ:
                with suppress(OSError):  # it may not be there; where Ray has made it, whoever is here could read it
                    os.chmod(os.path.expanduser("~/.ray/auth_token"), 0o600)
            return
        except Exception as error:  # Ray raises many kinds, `Exception` itself among them
            ray.shutdown()
            for frame, _ in traceback.walk_tb(error.__traceback__):
                node = frame.f_locals.get("self")
                if isinstance(node, ray._private.node.Node):  # no one else knows of the processes that it has started
                    node.kill_all_processes(check_alive=False)
            if failures == START_ATTEMPTS:
                raise MachineFault(f"Ray cannot be started here: {cause_of(error)}{tried(failures)}") from error
            logger.warning("Ray could not be started: %s; trying again", cause_of(error))
            pause(failures)


def _join(address: str) -> None:
    """Connects to a cluster, after a look whether something answers: Ray would try for a quarter of an hour."""
    hint = ""
    try:
        at = ray._private.services.canonicalize_bootstrap_address("auto") if address == "auto" else address
        host, _, port = at.removeprefix("ray://").rpartition(":")
        if not host or not port.isdigit():
            raise InputError(f"--address {address}: allowed are local, auto, HOST:PORT and ray://HOST:PORT")
        socket.create_connection((host.strip("[]"), int(port)), PROBE_S).close()
        hint = f". It may want {TOKEN}"  # to a client without it, a cluster seems to be none
        _init(address)
    except (OSError, OverflowError, RuntimeError, ValueError, ray.exceptions.AuthenticationError) as error:
        raise InputError(f"--address {address}: no Ray cluster can be reached: {error}{hint}") from error


def _init(address: str, **options: Any) -> None:
    # How long Ray waits for its own start, more than usual for a loaded machine; and how often it tries to connect.
    os.environ.setdefault("RAY_gcs_server_port_wait_time_s", "120" if address == "local" else "1")
    handler = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(address=address, logging_level=logging.ERROR, log_to_driver=False, configure_logging=True, **options)
    finally:
        # Ray puts handlers of its own in place, by which SIGTERM would end this process with SIGABRT.
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, handler)


def _scan_task(
    shared: RunInputs, of_task: OfTask, point: Point, min_correct: int, rule: str
) -> Iterator[int | ScanRecord | str]:
    """The number of models that were tried so far, now and then; then the scan, or what went wrong, after which the
    process ends, as one of `tuning` does.
    """
    try:
        from clnp_search.search.trial import TaskInputs, scan_point

        begun: list[Candidate] = []
        with ThreadPoolExecutor(1) as pool:
            scanning = pool.submit(scan_point, TaskInputs(shared, *of_task), point, min_correct, rule, begun.append)
            while wait([scanning], SCAN_REPORT_S).not_done:
                yield sum(candidate.tried for candidate in begun)
        yield scanning.result()
    except Exception as error:
        yield cause_of(error)
        sys.exit(1)


def _call(function: Callable[..., None], arguments: Sequence[Any]) -> None:
    os.setpriority(os.PRIO_PROCESS, 0, BESIDE_NICENESS)
    function(*arguments)


def _node(node: dict[str, Any]) -> Node:
    """What a node of Ray's has."""
    offer = node["Resources"]
    return Node(offer.get("CPU", 0), offer.get("GPU", 0), int(offer.get("memory", 0)))


def _probe(storage: str, token: str, mine: str, versions: dict[str, str]) -> str:
    """What keeps this node from taking part, in words; else nothing, and a file of its own beside the driver's.

    Args:
        token: The driver's file.
    """
    if different := [f"{name} {here}" for name, here in _versions().items() if here != versions[name]]:
        driver = ", ".join(f"{name} {there}" for name, there in versions.items())
        return f"has {', '.join(different)}; the driver has {driver}"
    folder = RunFolder(storage)
    try:
        folder.read(token)
        folder.write(mine, b"")
    except FileNotFoundError:
        return "what the driver writes there is not seen: not mounted here, or no shared folder"
    except (OSError, InputError, RuntimeError) as error:
        return f"cannot be reached: {error}"
    return ""


def _versions() -> dict[str, str]:
    """Of what results depend on; builds of torch for other devices are the same version."""
    return {name: metadata.version(name).partition("+")[0] for name in ("clnp-search", "torch")}


def _warm_up() -> None:
    import clnp_search.search.trial  # noqa: F401


def _gpu_bytes() -> int:
    import torch

    return torch.cuda.get_device_properties(0).total_memory
