"""Checks of shapes, quicker: what a function was found to take and give is not searched again.

Whether a call obeys its annotations is a matter of kinds: of a tensor its dtype and shape, of a container what lies in
it, of anything else its type. So each function is checked on every combination of kinds that it sees, once. A function
that names no shapes has its types checked without a search for shapes.
"""

import builtins
import dataclasses
import functools
import re
import threading
import types
from collections.abc import Mapping, Set
from itertools import islice
from typing import get_args

import jaxtyping
import numpy as np
import torch
from jaxtyping import AbstractArray, AbstractDtype

LITERAL = 32  # characters that a `Literal` of ours may have


def quicken():
    """Lets jaxtyping search new combinations alone, and the checker of types see to what names no shapes."""
    with_shapes = jaxtyping.jaxtyped

    def jaxtyped(*, typechecker):
        def decorate(thing):
            if isinstance(thing, type):
                if dataclasses.is_dataclass(thing) and "__init__" in vars(thing):
                    thing.__init__ = decorate(thing.__init__)
                return thing
            if not isinstance(thing, types.FunctionType):
                return with_shapes(typechecker=typechecker)(thing)
            return (
                remembering(thing, with_shapes(typechecker=typechecker)) if names_shapes(thing) else typechecker(thing)
            )

        return decorate

    jaxtyping.jaxtyped = jaxtyped


def names_shapes(function):
    """Whether some annotation of a function is of a shape, or not known yet."""
    known = {**vars(builtins), **function.__globals__}
    words = {word for hint in function.__annotations__.values() for word in re.findall(r"[^\W\d]\w*", str(hint))}
    return any(word not in known or is_shape(known[word]) for word in words)


def is_shape(hint):
    """Whether a type is an array of some shape, or made of such."""
    shaped = isinstance(hint, type) and issubclass(hint, (AbstractArray, AbstractDtype))
    return shaped or any(map(is_shape, get_args(hint)))


def remembering(function, check):
    """The function, checked by `check` where the kinds of what it takes or gives are new."""
    known, given = {}, threading.local()
    describer = VARYING if any(", ...]" in str(hint) for hint in function.__annotations__.values()) else FIXED

    def step(*args, **kwargs):
        return given.answers.pop() if getattr(given, "answers", None) else function(*args, **kwargs)

    # As if written where the function is, for annotations to mean what they mean there.
    step = types.FunctionType(step.__code__, function.__globals__, closure=step.__closure__)
    whole = check(functools.wraps(function)(step))

    @functools.wraps(function)
    def checked(*args, **kwargs):
        __tracebackhide__ = True
        try:
            taken = tuple([describer(value.__class__)(value) for value in args])
            if kwargs:
                taken = taken, *kwargs, *[describer(value.__class__)(value) for value in kwargs.values()]
            answers = known.get(taken)
        except (MixedError, TypeError):  # no hash: sizes without numbers, which are a compiler's
            return whole(*args, **kwargs)
        if answers is None:
            answer = whole(*args, **kwargs)
            known[taken] = {described(answer)}
            return answer
        answer = function(*args, **kwargs)
        found = described(answer)
        if found is None or found not in answers:
            given.answers = [answer]
            try:
                whole(*args, **kwargs)
            finally:
                given.answers.clear()
            answers.add(found)
        return answer

    def described(answer):
        try:
            return describer(answer.__class__)(answer)
        except MixedError:
            return None

    return checked


def one(kinds):
    """The kind of all things in a container, of which a checker looks at one. More than one are searched each time."""
    kinds = set(kinds)
    if len(kinds) > 1:
        raise MixedError
    return kinds.pop() if kinds else None


class MixedError(Exception):
    """A container holds things of several kinds."""


def describing(tuples_vary):
    """A function that gives, for a type, what says of its values all that an annotation may ask."""

    @functools.cache
    def describer(of):
        if issubclass(of, (torch.Tensor, np.ndarray)):
            return lambda array: (of, array.dtype, array.shape)
        if issubclass(of, type):
            return lambda value: value
        if issubclass(of, str):
            return lambda text: text if len(text) <= LITERAL else of
        if issubclass(of, Mapping):
            return lambda held: (of, *map(first, islice(held.items(), 1)))  # at which a checker looks
        if issubclass(of, (list, Set)) or (tuples_vary and issubclass(of, tuple)):
            return lambda held: (of, len(held) if of is tuple else None, one(map(kind, held)))
        if issubclass(of, tuple):
            return lambda held: (of, *map(kind, held))
        return lambda value: of

    def kind(value):
        return describer(value.__class__)(value)

    def first(item):
        key, value = item
        return type(key), kind(value)

    return describer


FIXED, VARYING = describing(tuples_vary=False), describing(tuples_vary=True)
