"""A reader of PyTorch's files before version 1.6, which trusts nothing in them.

Such a file is a row of pickles and then raw numbers. The pickles are read as data: `pickletools` names their
operations, and the few that describe tensors are followed here; nothing is imported or called.
"""

from __future__ import annotations

import pickletools
from typing import IO, Any

import numpy as np

from sora.core.errors import ServiceError

_DTYPES: dict[str, np.dtype[Any]] = {"FloatStorage": np.dtype("<f4"), "LongStorage": np.dtype("<i8")}

Tensors = dict[str, np.ndarray]

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
            f"the weights file holds more than tensors: {error}", fix="install the package that it came with again"
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
