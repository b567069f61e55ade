"""Forms of data that travel: option strings and the HDF5 files of data sets."""

from __future__ import annotations

import io
import shlex

import h5py
import numpy as np


def checksum(arrays):
    return sum(int(array.astype(np.int64).sum()) for array in arrays.values()) % 60000


def parsed(options):
    """``--name value`` pairs of an option string; a name without a value gets ""."""
    found, name = {}, None
    for word in shlex.split(options):
        if word.startswith("--"):
            name = word[2:]
            found[name] = ""
        else:
            found[name] = word
    return found


def read_h5(data):
    with h5py.File(io.BytesIO(data)) as file:
        groups = sorted(file["data"].values(), key=lambda group: group.attrs["order"])
        return {group.attrs["name"]: np.array(group["batch_0"]) for group in groups}


def write_h5(arrays):
    buffer = io.BytesIO()
    with h5py.File(buffer, "w") as file:
        for index, (name, array) in enumerate(arrays.items()):
            file.create_dataset(f"data/{index}/batch_0", data=array)
            file[f"data/{index}"].attrs.update({"order": index, "name": name, "batch_count": 1})
    return buffer.getvalue()
