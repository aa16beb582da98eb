"""Pickles weighed before they are read: what they say can take far more than their bytes."""

import _compat_pickle
import contextlib
import pickletools
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import IO, Any

from ssd.errors import as_line


class TooMuch(Exception):
    """A file says more than it can hold; the message is what of it."""


class OtherKind(Exception):
    """It has tensors that are made without a check; the message is their kind."""


_MOST_NAMED = 10**8
_MOST_STEPS = 4 * 10**6
_MOST_LONG = 10**4  # numbers of more than 55 bits: as keys, thousands of them can share one hash
_DEEPEST = 100
_TO_MARK = -1
_TAKES = {
    **dict.fromkeys(("NONE", "NEWTRUE", "NEWFALSE", "BININT", "BININT1", "BININT2", "BINFLOAT"), 0),
    **dict.fromkeys(("BINUNICODE", "SHORT_BINSTRING", "LONG1", "GLOBAL"), 0),
    **dict.fromkeys(("EMPTY_TUPLE", "EMPTY_LIST", "EMPTY_DICT", "EMPTY_SET"), 0),
    **{"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3, "TUPLE": _TO_MARK, "REDUCE": 2, "NEWOBJ": 2, "BINPERSID": 1},
    **{"APPEND": 1, "SETITEM": 2, "BUILD": 1, "APPENDS": _TO_MARK, "SETITEMS": _TO_MARK},
}
"""How many of the values before it each instruction takes, of those that torch reads."""
_INTO_LAST = {"APPEND", "SETITEM", "BUILD", "APPENDS", "SETITEMS"}  # the others make a value
_UNCHECKED = {
    f"torch._utils._rebuild_{kind}"
    for kind in (
        *("nested_tensor", "sparse_tensor", "wrapper_subclass"),
        *("device_tensor_from_numpy", "device_tensor_from_cpu_tensor"),
    )
}
"""Makers of tensors that torch allows, which may take any memory or time; no SSD's are of such kinds."""


def weigh(file: IO[bytes]) -> None:
    """Pass over a pickle, and add up what it would be if nothing in it were used twice.

    A few bytes can say "a pair of that pair" fifty times; as the key of a dict it is walked through for ever,
    and one in which a million are nested ends the process. Nothing is made here of what the pickle says;
    where it cannot be followed, torch does not follow it, either.

    Raises:
        TooMuch: it has more parts than a file can have.
        OtherKind: it has tensors of kinds that torch makes without a check.
    """
    stack: list[_Part] = []
    below: list[list[_Part]] = []
    memo: dict[Any, _Part] = {}
    named = long = 0
    with contextlib.suppress(ValueError, LookupError, OverflowError, MemoryError, struct.error):
        for step, (code, value, _) in enumerate(pickletools.genops(file)):
            if step > _MOST_STEPS:
                raise TooMuch("lists and dicts that are too many")
            if code.name == "MARK":
                below.append(stack)
                stack = []
            elif code.name.endswith("BINPUT"):
                memo[value] = stack[-1]
            elif code.name.endswith("BINGET"):
                stack.append(memo[value])
                named += memo[value].size
            elif code.name in _TAKES:
                long += isinstance(value, int) and value.bit_length() > 55
                stack = _taken(code.name, value, stack, below)
                if named > _MOST_NAMED or stack[-1].depth > _DEEPEST or long > _MOST_LONG:
                    raise TooMuch("lists and dicts that are too many, or too deep in one another")
            elif code.name != "PROTO":
                return


@dataclass(slots=True)
class _Part:
    """A value of a pickle: what is known of it without making it."""

    kind: str
    """The instruction that made it."""
    value: Any = None
    """Of a text, or the name of what is to be called."""
    parts: Sequence["_Part"] = ()
    """Of a tuple."""
    size: int = 1
    depth: int = 0


_NUMBER = _Part("number")


def _taken(name: str, value: Any, stack: list[_Part], below: list[list[_Part]]) -> list[_Part]:
    """The stack after an instruction that makes one value of some."""
    parts: list[_Part] = []
    if _TAKES[name] == _TO_MARK:
        parts, stack = stack, below.pop()
    elif _TAKES[name]:
        if len(stack) < _TAKES[name]:
            raise LookupError
        parts = stack[-_TAKES[name] :]
        del stack[-_TAKES[name] :]
    if name in ("REDUCE", "NEWOBJ"):
        _require_small(*parts)
    if name == "BUILD" and parts[0].kind not in _PLAIN_KINDS:
        raise OtherKind("object with a state of another kind")
    if name in _INTO_LAST:
        if stack[-1] is _NUMBER:
            raise LookupError
    elif name == "GLOBAL":
        stack.append(_Part(name, _path(value)))
        if stack[-1].value in _UNCHECKED:
            raise OtherKind(stack[-1].value.partition("_rebuild_")[2].replace("_", " "))
    elif parts or name.startswith(("EMPTY", "TUPLE")):
        stack.append(_Part(name, None, parts if "TUPLE" in name else ()))
    else:
        stack.append(_Part(name, value) if isinstance(value, str) else _NUMBER)
    whole = stack[-1]
    for part in parts:
        whole.size += part.size
        whole.depth = max(whole.depth, part.depth + 1)
    return stack


def _path(pair: str) -> str:
    """The name that torch will look up for that of a pickle, which may be one of Python 2."""
    module, _, name = pair.partition(" ")
    module, name = _compat_pickle.NAME_MAPPING.get((module, name), (module, name))
    return f"{_compat_pickle.IMPORT_MAPPING.get(module, module)}.{name}"


_PLAIN_KINDS = {"TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "EMPTY_TUPLE", "EMPTY_LIST", "EMPTY_DICT"}
_COLLECTIONS = {"builtins.set", "collections.Counter", "collections.OrderedDict", "torch.Size"}


def _require_small(function: _Part, arguments: _Part) -> None:
    """Require of a call that what it makes is no larger than what it is made of.

    Raises:
        OtherKind: it is none that `torch.save` writes.
    """
    name, given = function.value, arguments.parts
    right = arguments.kind in _PLAIN_KINDS and "TUPLE" in arguments.kind
    if name == "torch._tensor._rebuild_from_type_v2":  # calls its first argument
        right &= bool(given) and str(given[0].value).startswith("torch._utils._rebuild_")
    elif name == "_codecs.encode" or (name == "builtins.bytearray" and len(given) > 1):
        right &= len(given) == 2 and given[1].value in ("latin1", "latin-1")  # as bytes are written
    elif name == "builtins.bytearray":
        right &= all(each.kind == "REDUCE" for each in given)  # bytes
    elif name in _COLLECTIONS:
        right &= all(each.kind in _PLAIN_KINDS for each in given)
    elif str(name).startswith("torch.") and str(name).endswith("Tensor"):
        right &= not given
    if not right:
        raise OtherKind(f"call of {as_line(str(name), 60)} that torch.save does not write")
