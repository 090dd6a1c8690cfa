"""Triton's interpreter, quicker: it looks through the whole language at every call of a function within a kernel."""

import functools
import inspect


def quicken():
    """Lets the interpreter look up once which names of the language it replaces."""
    from triton.runtime import interpreter

    is_builtin = interpreter.tl.core.is_builtin

    @functools.cache
    def builtins(package):
        return [name for name, member in inspect.getmembers(package) if is_builtin(member)]

    def patch(package, builder, *scope):
        for name in builtins(package):
            member = getattr(package, name)
            if is_builtin(member):
                interpreter._patch_attr(package, name, member, builder, *scope)

    interpreter._patch_builtin = patch
