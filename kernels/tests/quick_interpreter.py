"""Triton's interpreter, quicker.

It looks through the whole language at every launch, again at every call of a function within a kernel, and computes
every sum and product of integers a second time, in 64 bits, for an assertion of overflow that it then does not make.
"""

import dataclasses
import functools
import inspect


def quicken():
    """Lets the interpreter look up once what it replaces of the language, and leave out what it throws away."""
    from triton.runtime import interpreter

    builder = interpreter.interpreter_builder
    assert not builder.options.debug  # else it asserts
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)
    is_builtin = interpreter.tl.core.is_builtin

    @functools.cache
    def builtins(package):
        return [name for name, member in inspect.getmembers(package) if is_builtin(member)]

    def patch(package, builder, *scope):
        for name in builtins(package):
            member = getattr(package, name)
            if is_builtin(member):
                interpreter._patch_attr(package, name, member, builder, *scope)

    @functools.cache
    def languages(function):
        known = (interpreter.tl, interpreter.tl.core)
        return [value for value in function.__globals__.values() if inspect.ismodule(value) and value in known]

    patch_language, scope_of = interpreter._patch_lang, getattr(interpreter, "_LangPatchScope", type(None))

    def patch_once(function):
        # What a kernel calls finds the language replaced as a rule; its own scope puts it back.
        if any(is_builtin(language.load) for language in languages(function)):
            return patch_language(function)
        return scope_of()

    interpreter._patch_builtin, interpreter._patch_lang = patch, patch_once
