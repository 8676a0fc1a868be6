"""One thread at a time: threads that use the same model wait for each other, and are refused while one trains it."""

import os
import threading
from collections.abc import Callable, Iterable
from functools import wraps
from types import TracebackType
from typing import NamedTuple, ParamSpec, TypeVar

__all__ = ["exclusive", "refuse_while_trained", "trains", "using"]


class _Claim(NamedTuple):
    thread: int
    training: bool


_changed = threading.Condition()
_claims: dict[int, _Claim] = {}  # by the id of a thing, while a thread uses it


class using:
    """Inside `with using(verb, things):` they belong to this thread, which may use them again inside.

    All are claimed at once. Where another thread has one of them, wait for it; if it trains it, or this thread has
    something that others may wait for, raise RuntimeError at once, so that no two threads wait for each other.
    `training` claims them for long; a thread that trains a thing cannot begin to train it again inside.
    """

    __slots__ = ("claimed", "things", "training", "verb")

    def __init__(self, verb: str, things: Iterable[object], *, training: bool = False) -> None:
        self.verb, self.things, self.training = verb, list(things), training
        self.claimed: list[int] = []

    def __enter__(self) -> None:
        me = threading.get_ident()
        keys = [id(thing) for thing in self.things]
        with _changed:
            while any((claim := _claims.get(key)) is not None and claim.thread != me for key in keys):
                _refuse(self.verb, keys, me)
                if any(claim.thread == me and not claim.training for claim in _claims.values()):
                    raise RuntimeError(f"{self.verb}: another thread is using this model; call it on its own, "
                                       "not from within another use of a model")  # fmt: skip
                _changed.wait()
            if self.training and any(_claims[key].training for key in keys if key in _claims):
                raise RuntimeError(f"{self.verb}: this model is training already; a callback cannot call fit")
            for key in keys:
                if key not in _claims:
                    _claims[key] = _Claim(me, self.training)
                    self.claimed.append(key)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with _changed:
            for key in self.claimed:
                _claims.pop(key, None)
            self.claimed.clear()
            _changed.notify_all()


P = ParamSpec("P")
R = TypeVar("R")


def exclusive(function: Callable[P, R]) -> Callable[P, R]:
    """Decorate a function or method so that it has its arguments with a method `shared` to itself while it runs."""
    verb = function.__name__.strip("_").replace("getstate", "pickle")

    @wraps(function)
    def alone(*arguments: P.args, **keywords: P.kwargs) -> R:
        values = (*arguments, *keywords.values())
        things = [thing for v in values if hasattr(type(v), "shared") for thing in v.shared()]  # type: ignore[attr-defined]
        with using(verb, things):
            return function(*arguments, **keywords)

    return alone


def trains(thing: object) -> bool:
    """Whether a thread is training it."""
    claim = _claims.get(id(thing))
    return claim is not None and claim.training


def refuse_while_trained(verb: str, shared: Callable[[], list[object]]) -> None:
    """Raise RuntimeError if another thread is training one of shared(); next to free while no thread uses anything."""
    if _claims:
        _refuse(verb, [id(thing) for thing in shared()], threading.get_ident())


def _refuse(verb: str, keys: Iterable[int], me: int) -> None:
    for key in keys:
        claim = _claims.get(key)
        if claim is not None and claim.training and claim.thread != me:
            raise RuntimeError(f"{verb}: another thread is training this model; wait until its fit returns, or give "
                               "each thread a copy of its own beforehand")  # fmt: skip


def _forget_other_threads() -> None:
    """In a forked child, where only the thread that forked goes on."""
    global _changed
    _changed, me = threading.Condition(), threading.get_ident()
    for key in [key for key, claim in _claims.items() if claim.thread != me]:
        del _claims[key]


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_other_threads)
