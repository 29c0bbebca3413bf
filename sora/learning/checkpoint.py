"""Everything that a training resumes from, in one file that exists whole or not at all."""

from __future__ import annotations

import json
import zipfile
import zlib
from pathlib import Path
from typing import Any

import keras
import numpy as np

from sora.core import files


class Unusable(Exception):
    """The file is damaged, or belongs to another training; the message says which."""


Kept = dict[str, list[np.ndarray]]


def save(path: Path, model: keras.Model, kept: Kept, state: dict[str, Any]) -> None:
    """Writes weights, optimiser and `state` (JSON-able); replaces an earlier file at once.

    `kept` holds further sets of weights by name (letters only): the best so far, and their average. A set may be empty.

    It is one file rather than a model and a separate state: no crash can leave the two at different epochs.

    Raises:
        DiskFull, ServiceError: it could not be written; the earlier file remains.
    """
    arrays = {f"weight{number:05}": value for number, value in enumerate(model.get_weights())}
    for number, variable in enumerate(model.optimizer.variables):
        arrays[f"optimizer{number:05}"] = keras.ops.convert_to_numpy(variable)
    for name, values in kept.items():
        arrays |= {f"{name}{number:05}": value for number, value in enumerate(values)}
    arrays["state"] = np.frombuffer(json.dumps(state).encode(), np.uint8)
    with files.atomic(path) as file:
        np.savez(file, allow_pickle=False, **arrays)


def load(path: Path, model: keras.Model, fingerprint: str) -> tuple[Kept, dict[str, Any]]:
    """Puts weights and optimiser into `model` (compiled); returns the other sets of weights and the state.

    Raises:
        FileNotFoundError: there is no checkpoint.
        Unusable: damaged, or its state's "fingerprint" is another. The model is unchanged.
    """
    try:
        with np.load(path, allow_pickle=False) as stored:
            arrays = {name: stored[name] for name in stored.files}  # reading checks each array's CRC
        state = json.loads(arrays.pop("state").tobytes())
    except FileNotFoundError:
        raise
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise Unusable(f"it is damaged ({error})") from error
    if state["fingerprint"] != fingerprint:
        raise Unusable("it belongs to a training with other data, settings or code")
    groups: Kept = {"weight": [], "optimizer": [], "best": [], "average": []}
    for name in sorted(arrays):
        groups[name.rstrip("0123456789")].append(arrays[name])
    model.optimizer.build(model.trainable_variables)
    variables = model.optimizer.variables
    shapes = [tuple(variable.shape) for variable in variables]
    if [array.shape for array in groups["optimizer"]] != shapes or len(groups["weight"]) != len(model.weights):
        raise Unusable("its arrays do not fit the model")
    model.set_weights(groups["weight"])
    for variable, value in zip(variables, groups["optimizer"], strict=True):
        variable.assign(value)
    return groups, state
