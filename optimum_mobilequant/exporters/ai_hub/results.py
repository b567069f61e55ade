"""Results of finished jobs, fetched into the output folder."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors.numpy import save_file

from ...log import get_logger
from .access import Hub
from .folders import GraphFolder, scratch

if TYPE_CHECKING:
    import qai_hub

logger = get_logger(__name__)

# Of AI Hub's profile: microseconds and bytes.
_FIGURES = {
    "estimated_inference_time": "microseconds",
    "estimated_inference_peak_memory": "peak_bytes",
    "warm_load_time": "load_microseconds",
}


def fetch_binary(hub: Hub, job: qai_hub.LinkJob, out: Path) -> tuple[Path, dict[str, str]]:
    """The context binary of a finished link job, as ``model.bin``.

    Returns:
        The file, and what the service says of it (QAIRT version, architecture, graph names), by name.

    Raises:
        RuntimeError: the service gave no model, or an empty one.
        ConnectionError, ValueError, OSError: see :meth:`Hub.calling`.
    """
    with scratch(out) as folder:
        with hub.calling("fetching the context binary"):
            model = job.get_target_model()
            if model is None:
                raise RuntimeError("the link job has no target model")
            fetched = Path(model.download(str(folder / "model")))
            about = {key.name: value for key, value in model.metadata.items()}
        if not fetched.stat().st_size:
            raise RuntimeError(f"the context binary of {job.url} is empty: look at the job's page")
        path = out / f"model{fetched.suffix}"
        os.replace(fetched, path)
    return path, about


def fetch_profile(hub: Hub, job: qai_hub.InferenceJob, graph: GraphFolder, out: Path) -> tuple[Path, dict[str, Any]]:
    """The profile of a finished inference job, as ``profile_<graph>.json`` in the service's own form.

    Returns:
        The file and its main figures: ``microseconds``, ``peak_bytes``, ``load_microseconds`` and ``layers``, the
        number of layers on each compute unit.

    Raises:
        RuntimeError: there is no profile.
        ConnectionError, ValueError, OSError: see :meth:`Hub.calling`.
    """
    with hub.calling(f"fetching the profile of {graph.name}"):
        profile = job.download_profile()
    if not profile:
        raise RuntimeError(f"{job.url} gives no profile of {graph.name}: look at the job's page")
    path = out / f"profile_{graph.name}.json"
    with scratch(out) as folder:
        staged = folder / path.name
        staged.write_text(json.dumps(profile, indent=1) + "\n", encoding="utf-8")
        os.replace(staged, path)
    measured = profile["execution_summary"]
    units = [layer["compute_unit"] for layer in profile["execution_detail"]]
    layers = {unit: units.count(unit) for unit in sorted(set(units))}
    if elsewhere := {unit: count for unit, count in layers.items() if unit != "NPU"}:
        logger.warning("%s: layers that do not run on the NPU: %s", graph.name, elsewhere)
    return path, {ours: measured.get(theirs) for theirs, ours in _FIGURES.items()} | {"layers": layers}


def fetch_outputs(hub: Hub, job: qai_hub.InferenceJob, graph: GraphFolder, out: Path) -> tuple[Path, list[str]]:
    """What a graph computed on the device, as ``outputs_<graph>.safetensors``, one tensor for each output.

    Returns:
        The file, and one line for each difference between what came back and ``graph.outputs``.

    Raises:
        RuntimeError: the job has no outputs.
        ConnectionError, ValueError, OSError: see :meth:`Hub.calling`.
    """
    with hub.calling(f"fetching the outputs of {graph.name}"):
        batches: Mapping[str, Sequence[np.ndarray]] | None = job.download_output_data()
    if not batches:
        raise RuntimeError(f"{job.url} gives no outputs of {graph.name}: look at the job's page")
    arrays = {name: np.ascontiguousarray(values[0]) for name, values in batches.items()}
    path = out / f"outputs_{graph.name}.safetensors"
    with scratch(out) as folder:
        save_file(arrays, folder / path.name)
        os.replace(folder / path.name, path)
    wanted = {tensor.name: (tensor.dtype, tensor.shape) for tensor in graph.outputs}
    found = {name: (array.dtype.name, array.shape) for name, array in arrays.items()}
    differences = [
        f"{name}: {_form(found.get(name))}, expected {_form(wanted.get(name))}"
        for name in sorted({*wanted, *found})
        if found.get(name) != wanted.get(name)
    ]
    if differences:
        logger.warning("%d outputs of %s on the device differ in form, e.g. %s", len(differences), graph.name,
                       differences[0])  # fmt: skip
    return path, differences


def _form(found: tuple[str, tuple[int, ...]] | None) -> str:
    return "absent" if found is None else f"{found[0]} {list(found[1])}"
