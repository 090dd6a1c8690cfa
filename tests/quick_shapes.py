"""Checks of shapes, quicker: a function that names no shapes has its types checked without a search for shapes."""

import builtins
import re
from typing import get_args

import jaxtyping
from jaxtyping import AbstractArray, AbstractDtype


def quicken():
    """Lets jaxtyping wrap functions whose annotations name shapes, and the checker of types alone the others."""
    with_shapes = jaxtyping.jaxtyped

    def jaxtyped(*, typechecker):
        def decorate(thing):
            return with_shapes(typechecker=typechecker)(thing) if names_shapes(thing) else typechecker(thing)

        return decorate

    jaxtyping.jaxtyped = jaxtyped


def names_shapes(thing):
    """Whether it is a class, or a function of which some annotation is of a shape or not known yet."""
    if isinstance(thing, type):
        return True
    known = {**vars(builtins), **thing.__globals__}
    words = {word for hint in thing.__annotations__.values() for word in re.findall(r"[^\W\d]\w*", str(hint))}
    return any(word not in known or is_shape(known[word]) for word in words)


def is_shape(hint):
    """Whether a type is an array of some shape, or made of such."""
    shaped = isinstance(hint, type) and issubclass(hint, (AbstractArray, AbstractDtype))
    return shaped or any(map(is_shape, get_args(hint)))
