"""Methods by name, as the command line takes them: `NAME` or `NAME:option=value,option=value`.

A name with a dot is a function elsewhere: `mine.pyramid` is `pyramid` of the module `mine`, and takes what those in
`METHODS` take: a `Setting`, and options.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from evals.method import Method
from evals.methods import dense, kvpress, redknot, reuse
from evals.methods.kvpress import Press
from redknot_hf import HeadPlan

__all__ = ["METHODS", "Method", "Press", "Setting", "load"]


@dataclass(frozen=True)
class Setting:
    """What a method may be made for.

    Attributes:
        config: The model's config.
        length: Tokens of the prompts, at most.
        plan: A head plan, and the path it came from.
    """

    config: Any
    length: int
    plan: HeadPlan | None = None
    path: Path | None = None

    def needed_plan(self) -> HeadPlan:
        """Return the plan.

        Raises:
            ValueError: None is given.
        """
        if self.plan is None:
            raise ValueError("this method follows a head plan: give one with --plan")
        return self.plan

    def kept(self) -> float:
        """Return the share of bytes that the plan keeps at this length."""
        return redknot.kept_share(self.needed_plan(), self.length, self.config)


def _streaming(setting: Setting, window: int | None = None, sink: int = 4) -> Method:
    """By default at the share that the plan keeps."""
    if window is None:
        window = max(1, round(setting.kept() * setting.length) - sink)
    return redknot.streaming(setting.config, window, sink)


def _press(name: str) -> Callable[..., Press]:
    """By default at the share that the plan keeps."""

    def make(setting: Setting, kept: float | None = None) -> Press:
        return kvpress.press(name, setting.kept() if kept is None else kept)

    return make


METHODS: dict[str, Callable[..., Method | Press]] = {
    "dense": lambda setting: dense.dense(),
    "static": lambda setting: dense.static(),
    "quantised": lambda setting, **options: dense.quantised(**options),
    "redknot": lambda setting, **options: redknot.redknot(setting.needed_plan(), **options),
    "stored": lambda setting, **options: redknot.stored(setting.config, **options),
    "all-global": lambda setting: redknot.all_global(setting.config),
    "wrong-heads": lambda setting, **options: redknot.wrong_heads(setting.needed_plan(), **options),
    "streaming": _streaming,
    "reuse": lambda setting, **options: reuse.reuse(setting.needed_plan(), **options),
    "refresh": lambda setting, **options: reuse.refreshed(setting.needed_plan(), **options),
    "adakv-expected-attention": _press("adakv-expected-attention"),
    "adakv-snapkv": _press("adakv-snapkv"),
}


def load(spec: str, setting: Setting) -> Method | Press:
    """Return the method that a specification names: `streaming:window=512,sink=4`.

    Raises:
        ValueError: There is no such method, it has no such option, or it needs a plan.
        ImportError: It needs a library that is missing.
        FileNotFoundError: It needs an environment that is missing.
    """
    name, _, given = spec.partition(":")
    make = METHODS.get(name) or _elsewhere(name)
    options = dict(_option(spec, part) for part in given.split(",") if part)
    try:
        return make(setting, **options)
    except TypeError as e:
        raise ValueError(f"method {spec!r}: {e}") from e


def _elsewhere(name: str) -> Callable[..., Method | Press]:
    module, dot, function = name.rpartition(".")
    if not dot:
        raise ValueError(
            f"no method is called {name!r}: choose one of {', '.join(METHODS)}, or a function, as module.function"
        )
    make: Any = getattr(import_module(module), function, None)
    if make is None:
        raise ValueError(f"method {name!r}: {module} has no function {function}")
    return make


def load_all(specs: Sequence[str], setting: Setting, plans: Sequence[tuple[Path, HeadPlan]]) -> list[Method | Press]:
    """Return all methods named; those that follow a plan once for each plan, by the plan's name where there are more.

    Raises:
        ValueError: See `load`; or two methods have the same name.
    """
    methods: dict[str, Method | Press] = {}
    for spec in specs:
        for path, plan in plans if spec == "redknot" and len(plans) > 1 else [(None, None)]:
            if plan is None or path is None:
                found = load(spec, setting)
            else:
                found = redknot.redknot(plan, f"redknot, {path.stem}")
            if found.name in methods:
                raise ValueError(f"method {spec!r} comes twice")
            methods[found.name] = found
    return list(methods.values())


def _option(spec: str, part: str) -> tuple[str, int | float | str]:
    name, equals, value = part.partition("=")
    if not equals:
        raise ValueError(f"method {spec!r}: write options as name=value, not {part!r}")
    for kind in (int, float):
        try:
            return name, kind(value)
        except ValueError:
            continue
    return name, value
