"""The run folder, local or remote; the one place that knows file names.

The run folder is the truth: Ray's experiment folders and MLflow are projections of it. Every file appears whole or
not at all, and is written once, but for `summary.json`, `mlflow.json`, `lease.json` and pack checkpoints, which are
replaced, and for `plan.json` and `study.log` of a task whose points Optuna proposes, which grow.

What is read back is what was written: a record ends with the SHA-256 of all before it, and carries that of the
tensors that it stands for. A file that does not agree is refused by name. So is one that only somebody else can have
made: a size that nothing of a run has is refused before it is read, and so is what leads out of the folder.
"""

from __future__ import annotations

import csv
import errno
import hashlib
import io
import json
import os
import re
import tempfile
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import pyarrow.fs
from pydantic import TypeAdapter, ValidationError
from pydantic_core import to_json

from clnp_search.errors import Damaged, InputError
from clnp_search.passwords import masked, require_no_password
from clnp_search.records import (
    SCHEMA,
    CurveStep,
    Fork,
    Holder,
    PointRecord,
    ScanRecord,
    Selection,
    Summary,
    TaskPlan,
    TaskResult,
)

if TYPE_CHECKING:
    from clnp_search.clnp.state import FreeParameters, State

T = TypeVar("T")
VERSION = metadata.version("clnp-search")
NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$"
NAMES = "up to 100 letters, digits, '.', '_' and '-', starting with one of the first two"
SHA256_BYTES = hashlib.sha256().digest_size
# Far above what is written, and little enough to be parsed in any memory.
MAX_SWEEP_BYTES = 256 << 10
MAX_RECORD_BYTES = 64 << 20
# Of a file of tensors: half of this machine's memory, which holds the file and what is made of it.
MAX_BYTES = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


class RunFolder:
    """A run's files.

    Args:
        uri: A path, or a URI that pyarrow knows (`s3://bucket/runs/name`).
    """

    def __init__(self, uri: str) -> None:
        self.uri = uri if "://" in uri else str(Path(uri).absolute())
        try:
            self._filesystem, self._root = pyarrow.fs.FileSystem.from_uri(require_no_password(self.uri))
        except Exception as error:  # pyarrow raises many kinds for addresses that it does not know
            raise InputError(f"storage {masked(uri)}: {error}") from error

    @property
    def name(self) -> str:
        """The run's name."""
        return self._root.rstrip("/").rsplit("/", 1)[-1]

    @property
    def storage(self) -> str:
        """The URI of the folder that holds this run and its siblings."""
        place, settings = _place(self.uri)
        return place.rstrip("/").rpartition("/")[0] + settings

    @property
    def local_path(self) -> Path | None:
        """The folder on this machine, or None if it is remote."""
        return Path(self._root) if isinstance(self._filesystem, pyarrow.fs.LocalFileSystem) else None

    @property
    def ray_folder(self) -> tuple[str, pyarrow.fs.FileSystem]:
        """Where Ray Tune keeps its experiments."""
        return self._at("ray"), self._filesystem

    def require_writable(self) -> None:
        """Nothing, if files can be put here.

        Raises:
            InputError: They cannot; says why.
        """
        fault = ""
        if self.local_path is not None:
            fault = unwritable(self.local_path)
        else:
            try:
                self._filesystem.get_file_info(self._root)
            except OSError as error:
                fault = str(error)
        if fault:
            raise InputError(f"storage {self.uri}: {fault}")

    # Files as bytes

    def exists(self, path: str = "") -> bool:
        """Whether a file or folder is there."""
        try:
            return self._filesystem.get_file_info(self._at(path)).type != pyarrow.fs.FileType.NotFound
        except OSError as error:
            if error.errno in (errno.ENOTDIR, errno.ENAMETOOLONG):
                return False
            raise

    def written_at(self, path: str) -> float:
        """When a file was last written, in seconds since 1970 by the storage's clock; 0 if it is not there."""
        info = self._filesystem.get_file_info(self._at(path))
        return info.mtime_ns / 1e9 if info.mtime_ns else 0.0

    def folders(self) -> tuple[str, ...]:
        """Names of the folders in this one, sorted."""
        with _reaching(self.uri):
            infos = self._filesystem.get_file_info(pyarrow.fs.FileSelector(self._root, allow_not_found=True))
        return tuple(sorted(info.base_name for info in infos if info.type == pyarrow.fs.FileType.Directory))

    def read(self, path: str, at_most: int = MAX_BYTES) -> bytes:
        """A file's bytes.

        Raises:
            FileNotFoundError: It is not there.
            Damaged: It has more bytes than `at_most`, or is something else than a file.
        """
        place = self._at(path)
        if self.local_path is not None and os.path.lexists(place) and not os.path.isfile(place):
            raise Damaged(f"{join_uri(self.uri, path)}: is no file")  # to open a pipe, one would wait for its writer
        with self._filesystem.open_input_file(place) as stream:
            if stream.size() > at_most:
                raise Damaged(f"{join_uri(self.uri, path)}: {stream.size()} bytes; at most {at_most} are read")
            return stream.read()

    def write(self, path: str, data: bytes) -> None:
        """Puts a file in place, whole; an existing one is replaced."""
        target = self._at(path)
        if self.local_path is None:
            # An object is put when its stream is closed, be it by an interrupt; a thread of its own meets none.
            with ThreadPoolExecutor(1) as thread:
                thread.submit(self._put, target, data).result()
            return
        os.makedirs(os.path.dirname(target), exist_ok=True)
        temporary = f"{target}.{uuid.uuid4().hex}.tmp"
        try:
            with open(temporary, "wb") as stream:
                stream.write(data)
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(temporary, target)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise

    def _put(self, target: str, data: bytes) -> None:
        with self._filesystem.open_output_stream(target) as stream:
            stream.write(data)

    def delete(self, path: str) -> None:
        """Removes a file if it is there."""
        if self.exists(path):
            self._filesystem.delete_file(self._at(path))

    def delete_folder(self, path: str) -> None:
        """Removes a folder with all that is in it."""
        self._filesystem.delete_dir(self._at(path.rstrip("/")))

    def sizes(self) -> dict[str, int]:
        """The bytes of every file, by path, remnants of files that were never put in place included."""
        infos = self._filesystem.get_file_info(pyarrow.fs.FileSelector(self._root, recursive=True))
        return {info.path[len(self._root) + 1 :]: info.size for info in infos if info.is_file}

    # The run

    def write_sweep(self, text: str) -> None:
        """Records the resolved sweep, as YAML.

        Raises:
            InputError: It is longer than any that is read.
        """
        if len(data := text.encode()) > MAX_SWEEP_BYTES:
            raise InputError(f"{self.uri}: a sweep of {len(data)} bytes; allowed: up to {MAX_SWEEP_BYTES}")
        self.write("sweep.yaml", data)

    def read_sweep(self) -> str:
        """The run's resolved sweep, as YAML.

        Raises:
            InputError: This is no run folder, or one of another version, or the file is no text.
        """
        self.check_schema()
        try:
            return self.read("sweep.yaml", MAX_SWEEP_BYTES).decode()
        except UnicodeDecodeError as error:
            raise InputError(f"{join_uri(self.uri, 'sweep.yaml')}: {error}") from error
        except FileNotFoundError:
            raise InputError(f"{self.uri}: no run folder (it has no sweep.yaml)") from None

    def check_schema(self) -> None:
        """Nothing, if this version can read what the folder holds, as far as its summary says.

        Raises:
            InputError: It cannot; says which version wrote it.
        """
        schema = self._peek("summary.json").get("schema", SCHEMA)
        if schema != SCHEMA:
            raise InputError(
                f"{self.uri}: a run folder of schema {schema}; clnp-search {VERSION} reads schema {SCHEMA} alone. "
                f"Use {self.written_by() or 'the version'} that wrote it."
            )

    def written_by(self) -> str:
        """Which version of clnp-search began the run, in words; empty if that is not recorded."""
        environment = self._peek(f"{_task(0)}/plan.json").get("environment")
        version = environment.get("clnp_search") if isinstance(environment, dict) else None
        return f"clnp-search {version}" if version else ""

    def _peek(self, path: str) -> dict[str, Any]:
        """What a record says, whatever its version; nothing if it is not there, or no JSON object."""
        try:
            found: dict[str, Any] = _adapter(dict[str, Any]).validate_json(self.read(path, MAX_RECORD_BYTES))
        except (Damaged, FileNotFoundError, ValueError):
            return {}
        return found

    def write_summary(self, summary: Summary) -> None:
        """Rewrites `summary.json`."""
        self.write("summary.json", _to_json(summary))

    def read_summary(self) -> Summary | None:
        """The run's summary, or None before the first task began."""
        return self._read_record("summary.json", Summary)

    def write_fork(self, fork: Fork) -> None:
        """Records which run this one has branched off from."""
        self.write("fork.json", _to_json(fork))

    def read_fork(self) -> Fork | None:
        """Which run this one has branched off from, or None."""
        return self._read_record("fork.json", Fork)

    def has(self, task: int) -> bool:
        """Whether anything is there of a task."""
        return self.exists(_task(task))

    def copy_task(self, other: RunFolder, task: int) -> None:
        """Copies all that another run has recorded of a task, its result last."""
        last = f"{_task(task)}/result.json"
        for path in (*(path for path in other._list(_task(task), recursive=True) if path != last), last):
            self.write(path, other.read(path))

    def write_lease(self, holder: Holder) -> None:
        """Records who drives the run."""
        self.write("lease.json", _to_json(holder))

    def read_lease(self) -> Holder | None:
        """Who drives the run, or did when it crashed; nobody, if the machine went down while it was written."""
        try:
            return self._read_record("lease.json", Holder)
        except Damaged:
            return None

    def delete_lease(self) -> None:
        """Records that nobody drives the run."""
        self.delete("lease.json")

    def read_tracking(self) -> dict[str, Any]:
        """What was written to MLflow so far."""
        try:
            return _adapter(dict[str, Any]).validate_json(self.read("mlflow.json", MAX_RECORD_BYTES))
        except FileNotFoundError:
            return {}
        except ValueError as error:
            raise Damaged(f"{join_uri(self.uri, 'mlflow.json')}: damaged: {error}") from error

    def write_tracking(self, entries: dict[str, Any]) -> None:
        """Records what was written to MLflow."""
        self.write("mlflow.json", json.dumps(entries, indent=1, sort_keys=True).encode())

    # A task

    def write_plan(self, plan: TaskPlan) -> None:
        """Records how a task is searched."""
        self.write(f"{_task(plan.task)}/plan.json", _to_json(plan))

    def read_plan(self, task: int) -> TaskPlan | None:
        """How a task is searched, or None before that was decided."""
        return self._read_record(f"{_task(task)}/plan.json", TaskPlan)

    def write_checkpoint(self, task: int, pack: str, data: bytes) -> None:
        """Replaces a pack's checkpoint; its digest stands behind it."""
        self.write(f"{_task(task)}/packs/{pack}.safetensors", data + hashlib.sha256(data).digest())

    def read_checkpoint(self, task: int, pack: str) -> bytes | None:
        """A pack's last checkpoint, or None; empty if it is damaged."""
        try:
            sealed = self.read(f"{_task(task)}/packs/{pack}.safetensors")
        except FileNotFoundError:
            return None
        data, digest = sealed[:-SHA256_BYTES], sealed[-SHA256_BYTES:]
        return data if hashlib.sha256(data).digest() == digest else b""

    def delete_checkpoint(self, task: int, pack: str) -> None:
        """Removes a pack's checkpoint."""
        self.delete(f"{_task(task)}/packs/{pack}.safetensors")

    def checkpoints(self, task: int) -> dict[str, str]:
        """The paths of the packs' checkpoints, by pack."""
        return self._named(f"{_task(task)}/packs")

    def parameters(self, task: int) -> dict[str, str]:
        """The paths of trained parameters, by the point's name in its round."""
        return self._named(f"{_task(task)}/points")

    def write_point(self, task: int, record: PointRecord, trained: FreeParameters | None) -> None:
        """Records a finished point, with the SHA-256 of its parameters.

        The record is written last, so that where it stands the parameters are whole.
        """
        path = f"{_task(task)}/points/{record.point.name_in(record.round)}"
        if trained is not None:
            data = trained.to_bytes()
            self.write(f"{path}.safetensors", data)
            record = replace(record, parameters_sha256=hashlib.sha256(data).hexdigest())
        self.write(f"{path}.json", _to_json(record))

    def read_point(self, task: int, name: str) -> PointRecord | None:
        """A finished point, or None."""
        return self._read_record(f"{_task(task)}/points/{name}.json", PointRecord)

    def read_points(self, task: int) -> tuple[PointRecord, ...]:
        """All finished points of a task, those of its fine-tune rounds after those of its search."""
        paths = (path for path in self._list(f"{_task(task)}/points") if path.endswith(".json"))
        records = [record for path in paths if (record := self._read_record(path, PointRecord)) is not None]
        return tuple(sorted(records, key=lambda record: (record.round, record.point.index)))

    def delete_point(self, task: int, record: PointRecord) -> None:
        """Removes a point's record, and its parameters after it."""
        path = f"{_task(task)}/points/{record.point.name_in(record.round)}"
        self.delete(f"{path}.json")
        self.delete(f"{path}.safetensors")

    def read_failed(self) -> tuple[tuple[int, PointRecord], ...]:
        """All points that failed, in the search or in a fine-tune round, each after its task."""
        failed: list[tuple[int, PointRecord]] = []
        task = 0
        while self.read_plan(task) is not None:
            failed += [(task, record) for record in self.read_points(task) if record.status == "failed"]
            task += 1
        return tuple(failed)

    def read_trained(self, task: int, record: PointRecord) -> FreeParameters:
        """The parameters that a point's record stands for.

        Raises:
            InputError: The file is of another version.
            Damaged: It is missing or damaged, or holds other parameters.
        """
        from clnp_search.clnp.state import FreeParameters

        path = f"{_task(task)}/points/{record.point.name_in(record.round)}.safetensors"
        return self._read_tensors(path, record.parameters_sha256, FreeParameters.from_bytes)

    def write_scan(self, task: int, record: ScanRecord) -> None:
        """Records a threshold scan. An older one by the same rule and limit is replaced."""
        self.write(_scan(task, record.point, record.rule, record.min_correct, record.round), _to_json(record))

    def read_scan(self, task: int, point: int, rule: str, min_correct: int, round: int = 0) -> ScanRecord | None:
        """A point's threshold scan by a rule and a limit, after a fine-tune round or before any, or None."""
        return self._read_record(_scan(task, point, rule, min_correct, round), ScanRecord)

    def read_scans(self, task: int) -> tuple[ScanRecord, ...]:
        """All threshold scans of a task's points."""
        paths = self._list(f"{_task(task)}/scans")
        return tuple(record for path in paths if (record := self._read_record(path, ScanRecord)) is not None)

    def write_selection(self, task: int, selection: Selection) -> None:
        """Records a task's choice with its reasons."""
        self.write(f"{_task(task)}/selection.json", _to_json(selection))

    def read_selection(self, task: int) -> Selection | None:
        """A task's choice, or None."""
        return self._read_record(f"{_task(task)}/selection.json", Selection)

    def delete_selection(self, task: int) -> None:
        """Has a task choose again."""
        self.delete(f"{_task(task)}/selection.json")

    def write_study(self, task: int, data: bytes) -> None:
        """Replaces `study.log`, a task's Optuna study as a journal; read by people and optuna-dashboard alone."""
        self.write(f"{_task(task)}/study.log", data)

    def write_table(self, task: int, name: str, rows: list[dict[str, Any]]) -> None:
        """Writes a table of a task as NAME.csv: `points`, one row a point, from which the choice can be redone by hand;
        `pareto`, the models that no other one beats in both accuracy and sparsity.
        """
        self.write(f"{_task(task)}/{name}.csv", _to_csv(rows))

    def write_curve(
        self, task: int, name: str, curve: Sequence[CurveStep], layers: Sequence[str], layer: int = 0
    ) -> None:
        """Writes `curves/NAME.csv`: accuracy and active units of each layer against the theta of `layer`."""
        rows = [
            {"theta": step.theta[layer], "val_accuracy": step.val_accuracy}
            | dict(zip(layers, step.active, strict=True))
            for step in curve
        ]
        self.write(f"{_task(task)}/curves/{name}.csv", _to_csv(rows))

    def write_figure(self, name: str, data: bytes, task: int | None = None) -> None:
        """Records a figure of the run, or of one task."""
        self.write(f"{_figures(task)}/{name}", data)

    def figures(self, task: int | None = None) -> tuple[str, ...]:
        """Paths of the recorded figures of the run, or of one task."""
        return self._list(_figures(task))

    def artifacts(self, task: int | None = None) -> dict[str, str]:
        """The files that a reader elsewhere wants to see, of the run or of one task: name for the reader to path."""
        if task is None:
            own = ["sweep.yaml", "summary.json"]
            if results := self.read_results():
                own.append(f"{_task(results[-1].index)}/state.safetensors")
            listed = self.figures()
        else:
            own = [f"{_task(task)}/{name}" for name in ("points.csv", "pareto.csv", "selection.json", "study.log")]
            listed = (*self._list(f"{_task(task)}/curves"), *self.figures(task))
        return {re.sub(r"^tasks/\d+/", "", path): path for path in (*filter(self.exists, own), *listed)}

    def write_state(self, task: int, state: State) -> str:
        """Records the state after a task; gives the SHA-256 of its file, for the task's result."""
        data = state.to_bytes()
        self.write(f"{_task(task)}/state.safetensors", data)
        return hashlib.sha256(data).hexdigest()

    def read_state(self, task: int) -> State:
        """The state after a task.

        Raises:
            InputError: The task is not committed, or the file is of another version.
            Damaged: It is missing or damaged, or holds another state than the task's result says.
        """
        from clnp_search.clnp.state import State

        result = self._read_record(f"{_task(task)}/result.json", TaskResult)
        if result is None:
            raise InputError(f"{self.uri}: task {task} is not committed")
        return self._read_tensors(f"{_task(task)}/state.safetensors", result.state_sha256, State.from_bytes)

    def write_result(self, result: TaskResult) -> None:
        """Records a committed task; written last of all its files."""
        self.write(f"{_task(result.index)}/result.json", _to_json(result))

    def read_results(self) -> tuple[TaskResult, ...]:
        """All committed tasks, in order."""
        results: list[TaskResult] = []
        while (result := self._read_record(f"{_task(len(results))}/result.json", TaskResult)) is not None:
            results.append(result)
        return tuple(results)

    def _at(self, path: str) -> str:
        """A file's place on its filesystem.

        Raises:
            Damaged: It is outside of this folder, by its name or by a link.
        """
        place = f"{self._root}/{path}" if path else self._root
        inside = ".." not in path.split("/")
        if inside and path and self.local_path is not None:
            inside = Path(os.path.realpath(place)).is_relative_to(os.path.realpath(self._root))
        if not inside:
            raise Damaged(f"{join_uri(self.uri, path)}: leads out of the run folder")
        return place

    def _list(self, path: str, recursive: bool = False) -> tuple[str, ...]:
        """Paths of the files in a folder, sorted; none if the folder is not there."""
        infos = self._filesystem.get_file_info(pyarrow.fs.FileSelector(self._at(path), True, recursive))
        start = len(self._at(path))
        names = (info.path[start + 1 :] for info in infos if info.is_file and not info.base_name.endswith(".tmp"))
        return tuple(f"{path}/{name}" for name in sorted(names))

    def _named(self, folder: str) -> dict[str, str]:
        """Paths of the files of tensors in a folder, by their names without the suffix."""
        paths = (path for path in self._list(folder) if path.endswith(".safetensors"))
        return {path.rpartition("/")[2].removesuffix(".safetensors"): path for path in paths}

    def _read_tensors(self, path: str, sha256: str, parse: Callable[[bytes], T]) -> T:
        where = join_uri(self.uri, path)
        try:
            data = self.read(path)
        except FileNotFoundError:
            raise Damaged(f"{where}: missing") from None
        if hashlib.sha256(data).hexdigest() != sha256:
            raise Damaged(f"{where}: damaged, or not the file that its record was written for")
        try:
            return parse(data)
        except Exception as error:  # of a faulty file, any; a file of this version has none
            raise self._foreign(path, str(error)) from error

    def _read_record(self, path: str, kind: type[T]) -> T | None:
        try:
            data = self.read(path, MAX_RECORD_BYTES)
        except FileNotFoundError:
            return None
        try:
            checked = _checked(data)
        except ValueError as error:
            raise Damaged(f"{join_uri(self.uri, path)}: damaged, or changed by hand: {error}") from error
        try:
            record: T = _adapter(kind).validate_json(checked)  # type: ignore[arg-type]  # classes are hashable
        except ValidationError as error:
            faults = [f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}" for fault in error.errors()]
            raise self._foreign(path, "; ".join(faults)) from error
        if (own := _place_of(record, path)) != path:
            raise Damaged(f"{join_uri(self.uri, path)}: this is {own}, put in another place")
        return record

    def _foreign(self, path: str, what: str) -> InputError:
        """What is as it was written, and not as this version writes it."""
        return InputError(
            f"{join_uri(self.uri, path)}: written by another version than this one, clnp-search {VERSION} "
            f"(the run was begun by {self.written_by() or 'an unknown one'}): {what}"
        )


def open_run(run: str, storage: str = "runs/") -> RunFolder:
    """The folder of a run that exists, by path, URI, or name under the storage.

    Raises:
        InputError: There is none, or it is of another version.
    """
    for uri in (run,) if "://" in run else (run, join_uri(storage, run)):
        if "/" in uri or os.path.exists(uri):
            folder = RunFolder(uri)
            with _reaching(uri):
                if folder.exists("sweep.yaml"):
                    folder.check_schema()
                    return folder
    raise InputError(f"{run}: no run of that name under {storage}, and no run folder")


def require_name(name: str) -> None:
    """Nothing, if runs may have this name.

    Raises:
        InputError: It has characters that could lead out of the storage.
    """
    if not re.fullmatch(NAME_PATTERN, name):
        raise InputError(f"name {name!r}: allowed: {NAMES}")


def run_folder(storage: str, name: str) -> RunFolder:
    """The folder of a run that may not exist yet.

    Raises:
        InputError: As `require_name`, or no files can be put there.
    """
    require_name(name)
    folder = RunFolder(join_uri(storage, name))
    folder.require_writable()
    return folder


def unwritable(folder: Path) -> str:
    """Why no file can be put into a local folder, which may not exist yet; nothing if one can."""
    there = next(path for path in (folder, *folder.parents) if os.path.lexists(path))
    if not there.is_dir():
        return f"{there} is no folder"
    try:
        tempfile.TemporaryDirectory(dir=there).cleanup()  # what a permission says may not be all
    except OSError as error:
        return f"{there} cannot be written: {error.strerror}"
    return ""


def join_uri(storage: str, name: str) -> str:
    """`name` under a path or URI."""
    place, settings = _place(storage)
    return f"{place.rstrip('/')}/{name}{settings}"


def _place(uri: str) -> tuple[str, str]:
    """A URI without its settings (`?endpoint_override=...`), and these; a path has none."""
    place, mark, settings = uri.partition("?") if "://" in uri else (uri, "", "")
    return place, mark + settings


@contextmanager
def _reaching(uri: str) -> Iterator[None]:
    """Inside, a storage that does not answer is said in a sentence."""
    try:
        yield
    except OSError as error:
        raise InputError(f"storage {uri}: cannot be reached: {error}") from error


def _task(task: int) -> str:
    return f"tasks/{task:03d}"


def _scan(task: int, point: int, rule: str, min_correct: int, round: int) -> str:
    after = f"-round{round}" if round else ""
    return f"{_task(task)}/scans/{point:03d}-{rule}-{min_correct}{after}.json"


def _place_of(record: Any, path: str) -> str:
    """Where a record that was found at `path` belongs, as far as it says so itself."""
    folder = path.rpartition("/")[0]
    if isinstance(record, TaskPlan):
        return f"{_task(record.task)}/plan.json"
    if isinstance(record, TaskResult):
        return f"{_task(record.index)}/result.json"
    if isinstance(record, PointRecord):
        return f"{folder}/{record.point.name_in(record.round)}.json"
    if isinstance(record, ScanRecord):
        asked = _scan(0, record.point, record.rule, record.min_correct, record.round)
        return f"{folder}/{asked.rpartition('/')[2]}"
    return path


def _figures(task: int | None) -> str:
    return "figures" if task is None else f"{_task(task)}/figures"


@cache
def _adapter(kind: type[Any]) -> TypeAdapter[Any]:
    return TypeAdapter(kind)  # making one takes longer than reading a record with it


def _to_json(record: Any) -> bytes:
    """A record as JSON, with one entry more at its end: the SHA-256 of all before that."""
    return _sealed(to_json(record, indent=1, inf_nan_mode="constants").removesuffix(b"\n}"))


def _sealed(body: bytes) -> bytes:
    return body + b',\n "sha256": "%s"\n}\n' % hashlib.sha256(body).hexdigest().encode()


def _checked(data: bytes) -> bytes:
    """A record's JSON.

    Raises:
        ValueError: It does not end with the SHA-256 of what stands before.
    """
    body = data.rpartition(b',\n "sha256": ')[0]
    if data != _sealed(body):
        raise ValueError("its SHA-256 is another one")
    return data


def _to_csv(rows: list[dict[str, Any]]) -> bytes:
    stream = io.StringIO(newline="")
    writer = csv.DictWriter(stream, list(rows[0]) if rows else [], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return stream.getvalue().encode()
