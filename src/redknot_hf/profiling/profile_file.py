"""The file that holds a profile: JSON, which is checked in full before anything is made of it."""

from __future__ import annotations

import json
import math
import reprlib
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from redknot_hf.plan.formats import AnyPath
from redknot_hf.plan.plan import HeadSpec

FORMAT, VERSION = "redknot-profile", 2
_MOST = 1 << 20  # layers, heads, tokens and bytes beyond this are no model's


def write(path: AnyPath, profile: Any) -> None:
    """Writes a profile; the same profile gives the same bytes."""
    data = {"format": FORMAT, "version": VERSION, "method": profile.method}
    data |= {"heads_by_layer": profile.heads_by_layer, "head_dims": profile.head_dims, "itemsize": profile.itemsize}
    data |= {"length": profile.length, "choices": [_to_json(spec) for spec in profile.choices]}
    data |= {"target": dict(profile.target), "searched": profile.searched, "provenance": dict(profile.provenance)}
    data |= {} if profile.sources is None else {"sources": profile.sources}
    data |= {"errors": _digits(profile.errors), "halves": [_digits(half) for half in profile.halves]}
    lines = ",\n".join(f"  {json.dumps(key)}: {json.dumps(entry, allow_nan=False)}" for key, entry in data.items())
    Path(path).write_text("{\n" + lines + "\n}\n", encoding="utf-8")


def read(path: AnyPath, kind: type) -> Any:
    """Reads a profile of version 1 or 2 and makes `kind`, the class of profiles, of it.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is of another format or version, or damaged.
    """
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
        found = data.get("format"), data.get("version")
    except (ValueError, AttributeError, RecursionError) as e:
        raise ValueError(f"{path}: is no profile ({e}); write it again with HeadProfile.save") from e
    if found not in ((FORMAT, 1), (FORMAT, VERSION)) or type(found[1]) is not int:
        raise ValueError(f"{path}: has format {found}, not {(FORMAT, VERSION)}; give a file of HeadProfile.save")
    try:
        return kind(**_arguments(_as_version_2(data) if found[1] == 1 else data))
    except (KeyError, TypeError, IndexError, ValueError, OverflowError, AttributeError) as e:
        raise ValueError(f"{path}: is damaged ({type(e).__name__}: {e}); profile again") from e


def _as_version_2(data: Mapping[str, Any]) -> dict[str, Any]:
    """Version 1 knew windows only, one sink, and a token's bytes in place of dims."""
    layers = len(_list(data["heads_by_layer"], "heads_by_layer"))
    choices = [{"window": window, "sink": data["sink"]} for window in data["windows"]]
    new = {"choices": choices, "head_dims": [[data["token_bytes"], 0]] * layers, "itemsize": 1, "searched": None}
    return {**{key: data[key] for key in data if key not in ("windows", "sink", "token_bytes")}, **new}


def _arguments(data: Mapping[str, Any]) -> dict[str, Any]:
    """What makes the profile, each entry checked."""
    heads = tuple(_count(n, "heads_by_layer") for n in _list(data["heads_by_layer"], "heads_by_layer"))
    dims = [_list(pair, "head_dims") for pair in _list(data["head_dims"], "head_dims")]
    choices = tuple(HeadSpec(**_mapping(spec, "choices")) for spec in _list(data["choices"], "choices"))
    searched = data["searched"]
    if searched is not None:
        searched = tuple(_count(pick, "searched", len(choices)) for pick in _list(searched, "searched"))
    sources = data.get("sources")
    if sources is not None:
        sources = tuple(_count(source, "sources", i) for i, source in enumerate(_list(sources, "sources")))
        if len(sources) != len(heads) or any(heads[i] != heads[j] or sources[j] != j for i, j in enumerate(sources)):
            raise ValueError(f"sources are {reprlib.repr(sources)}: layers share the keys of one with as many heads")
    errors, (first, second) = _table(data["errors"]), (_table(half) for half in data["halves"])
    if searched is not None and len(searched) != len(errors):
        raise ValueError(f"searched names {len(searched)} heads of {len(errors)}")
    target = {str(name): _number(bound) for name, bound in _mapping(data["target"], "target").items()}
    return {
        "method": str(data["method"]), "heads_by_layer": heads, "choices": choices, "errors": errors,
        "halves": (first, second), "length": _count(data["length"], "length"),
        "head_dims": tuple((_count(key, "head_dims"), _count(value, "head_dims")) for key, value in dims),
        "itemsize": _count(data["itemsize"], "itemsize"), "target": target, "searched": searched,
        "provenance": _mapping(data["provenance"], "provenance"), "sources": sources,
    }  # fmt: skip


def _table(rows: Any) -> Float[np.ndarray, "heads choices"]:
    found = np.array(
        [[_number(error) for error in _list(row, "errors")] for row in _list(rows, "errors")], dtype=float
    )
    if found.ndim != 2:
        raise ValueError(f"errors have {found.ndim} dimensions")
    return found


def _number(value: Any) -> int | float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"{reprlib.repr(value)} is no finite number")
    return value


def _count(value: Any, name: str, most: int = _MOST) -> int:
    if type(value) is not int or not 0 <= value <= most:
        raise ValueError(f"{name} is {reprlib.repr(value)}")
    return value


def _list(value: Any, name: str) -> list[Any]:
    if not isinstance(value, list):
        raise TypeError(f"{name} is {reprlib.repr(value)}, no list")
    return value


def _mapping(value: Any, name: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise TypeError(f"{name} is {reprlib.repr(value)}, no mapping")
    return value


def _to_json(spec: HeadSpec) -> dict[str, Any]:
    """What differs from a head that keeps everything."""
    default = HeadSpec()
    return {
        entry.name: getattr(spec, entry.name)
        for entry in fields(spec)
        if getattr(spec, entry.name) != getattr(default, entry.name)
    }


def _digits(errors: Float[np.ndarray, "heads choices"]) -> list[list[float]]:
    return [[float(f"{error:.6g}") for error in row] for row in errors]
