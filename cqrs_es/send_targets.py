"""Finding in handlers' code whom they `send` to, so that a slip is told at opening.

What is written as `send(Target, …)`, `send(module.Target, …)` or `send("service:type", …)` is
found; a target that only running code knows is checked when it is sent to.
"""

from __future__ import annotations

import dis
import types
from typing import TYPE_CHECKING, Any, Final

from cqrs_es.intents import send

if TYPE_CHECKING:
    from collections.abc import Iterator

_NOWHERE: Final = object()
# Between the function and its first argument: what makes a place on the stack, or notes a line.
_PASSED_OVER: Final = {"PUSH_NULL", "NOP", "EXTENDED_ARG", "CACHE"}
_ATTRIBUTES: Final = {"LOAD_ATTR", "LOAD_METHOD"}


def targets_of(cls: type[Any]) -> Iterator[type[Any] | str]:
    """Yield the targets that the functions of a class name, its bases' too."""
    for member in (each for base in cls.__mro__ for each in vars(base).values()):
        function = getattr(member, "__func__", member)
        if isinstance(function, types.FunctionType):
            yield from _targets_in(function.__code__, function.__globals__)


def _targets_in(code: types.CodeType, names: dict[str, Any]) -> Iterator[type[Any] | str]:
    loaded: object = _NOWHERE
    after_send = False
    for step in dis.get_instructions(code):
        if step.opname in _PASSED_OVER:
            continue
        if step.opname in _ATTRIBUTES:
            known = isinstance(loaded, types.ModuleType)
            loaded = vars(loaded).get(str(step.argval), _NOWHERE) if known else _NOWHERE
        else:
            if after_send and isinstance(loaded, type | str):
                yield loaded
            after_send = loaded is send
            loaded = _loaded(step, names)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _targets_in(constant, names)


def _loaded(step: dis.Instruction, names: dict[str, Any]) -> object:
    """Return what an instruction loads, as far as that is known before it runs."""
    if step.opname == "LOAD_GLOBAL":
        return names.get(str(step.argval), _NOWHERE)
    return step.argval if step.opname == "LOAD_CONST" else _NOWHERE
