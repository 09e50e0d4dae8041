"""Committed tasks as MLflow models, in its ONNX flavour: raw samples in, logits out, and no pickle to load.

torch's exporter patches the modules of the whole process while it traces, and the driver evaluates networks meanwhile.
So networks are exported by a process of their own, which this module is as well: `python -m`.
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import warnings
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path

from clnp_search.clnp.subnetwork import Subnetwork
from clnp_search.storage import RunFolder


def export_tasks(folder: RunFolder, tasks: Sequence[int]) -> dict[int, bytes]:
    """The subnetworks of committed tasks as ONNX files, up to the first one that cannot be exported.

    Raises:
        ValueError: That is the very first; the message is torch's last line.
    """
    command = [sys.executable, "-m", __name__, folder.uri, *map(str, tasks)]
    # A session of its own: an interrupt of the run is none of a network's faults.
    done = subprocess.run(
        command, capture_output=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, start_new_session=True, check=False
    )
    files, rest = [], done.stdout
    while rest and len(rest) >= 8 + (size := int.from_bytes(rest[:8])):
        files.append(rest[8 : 8 + size])
        rest = rest[8 + size :]
    if not files:
        said = done.stderr.decode(errors="replace").strip().rpartition("\n")[2]
        raise ValueError(said or f"its process ended with status {done.returncode}")
    return dict(zip(tasks, files, strict=False))


def save_model(data: bytes, network: Subnetwork, path: Path, model_id: str, location: str, run_id: str) -> None:
    """Writes a model folder as MLflow loads it.

    The example is the training set's mean: data stay where they are.

    Args:
        data: The network as an ONNX file.
        path: The folder, which is made.
        model_id: MLflow's id of the model.
        location: Where MLflow will have the folder.
        run_id: MLflow's id of the task's run.
    """
    warnings.filterwarnings("ignore", ".*Any type hint is inferred")  # what MLflow says of itself at its import
    import mlflow.onnx
    import numpy as np
    import onnx
    from mlflow.models import Model, ModelSignature
    from mlflow.types import Schema, TensorSpec

    shape, dtype = network.info.input_shape, np.dtype(np.float32)
    # Named here, because MLflow would load the model to find out, and ask for a pip that uv's environments lack.
    packages = [f"mlflow=={mlflow.__version__}", f"onnx=={onnx.__version__}", "onnxruntime"]
    mean = network.mean.expand(-1, int(np.prod(shape)) // len(network.mean))
    mlflow.onnx.save_model(
        onnx.load_from_string(data),
        path,
        mlflow_model=Model(location, run_id, model_uuid=model_id, model_id=model_id),
        signature=ModelSignature(
            Schema([TensorSpec(dtype, (-1, *shape))]),
            Schema([TensorSpec(dtype, (-1, network.info.num_classes), "logits")]),
        ),
        input_example=mean.reshape(1, *shape).numpy(),
        conda_env={"dependencies": [f"python={platform.python_version()}", "pip", {"pip": packages}]},
        save_as_external_data=False,
    )


def _export(uri: str, *tasks: str) -> None:
    folder, out = RunFolder(uri), sys.stdout.buffer
    with redirect_stdout(sys.stderr):
        for task in map(int, tasks):
            data = Subnetwork(folder.read_state(task), task).to_bytes(".onnx")
            out.write(len(data).to_bytes(8) + data)
            out.flush()


if __name__ == "__main__":
    _export(*sys.argv[1:])
