"""The files that hold a head plan, read and written as plain rules: (window, sink), or (window, sink, storage).

Three formats: the JSON of this package, RedKnot's head-class JSON (arXiv 2606.06256) and DuoAttention's table of
scores (arXiv 2410.10819). A rule is one KV head's: `window` in tokens, None for a global head, `sink` in tokens, and
`storage`, by name.
"""

import json
import math
import os
import reprlib
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .json_file import error, read_json

AnyPath = str | os.PathLike[str]
Rule = tuple[int | None, int] | tuple[int | None, int, str]
Rules = tuple[tuple[Rule, ...], ...]

FORMAT = "redknot-plan"
# 2 has storages. A plan without them is still written as 1, which all readers know.
VERSIONS = (1, 2)

# The classes of RedKnot's files, older names of local heads included.
_GLOBAL_CLASSES = ("global", "retrieval", "dense")
_CLASSES = (*_GLOBAL_CLASSES, "local", "local_full", "limited", "streaming", "sink_dominant")
_MOST = 1 << 20  # KV heads beyond this are no model's
_DEFAULT_WINDOW = 512
_DEFAULT_SINK = 4

_SCORES = "full_attention_heads.tsv"


def write_plan(path: AnyPath, rules: Rules, provenance: Mapping[str, Any]) -> None:
    """Write a plan file: the most common rule as default, one line for each group of exceptions.

    The file appears whole or not at all. The same plan gives the same bytes.

    Raises:
        ValueError: JSON cannot hold the provenance.
    """
    path = Path(path)
    counts = [len(layer) for layer in rules]
    groups: dict[Rule, list[list[int]]] = {}
    for i, layer in enumerate(rules):
        for h, rule in enumerate(layer):
            groups.setdefault(rule, []).append([i, h])
    default = max(groups, key=lambda rule: len(groups[rule]))
    lines = [json.dumps(_spec_json(rule) | {"heads": heads}) for rule, heads in groups.items() if rule != default]
    version = 2 if any("storage" in _spec_json(rule) for rule in groups) else 1
    fields = {
        "format": json.dumps(FORMAT),
        "version": json.dumps(version),
        "layers": json.dumps(len(rules)),
        "kv_heads": json.dumps(counts[0] if len(set(counts)) == 1 else counts),
        "default": json.dumps(_spec_json(default)),
        "exceptions": "[\n    " + ",\n    ".join(lines) + "\n  ]" if lines else "[]",
    }
    try:
        fields["provenance"] = json.dumps(dict(provenance), allow_nan=False)
    except (TypeError, ValueError, RecursionError) as e:
        raise error(path, f"the provenance does not fit JSON ({e})", "use strings, finite numbers and lists") from e
    _replace(path, "{\n" + ",\n".join(f'  "{key}": {text}' for key, text in fields.items()) + "\n}\n")


def read_plan(path: AnyPath) -> tuple[Rules, dict[str, Any]]:
    """Read a plan file and its provenance.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is damaged, of an unknown version, or of another format.
    """
    path = Path(path)
    data = read_json(path, "save the plan again, or use HeadPlan.from_duo_attention for a table of scores")
    if data.get("format") != FORMAT:
        what, reader = _foreign(data)
        raise error(path, f"is {what}, not a head plan", f"use {reader}")
    if data.get("version") not in VERSIONS or not _is_int(data["version"]):
        known = " and ".join(map(str, VERSIONS))
        raise error(path, f"has version {data.get('version')!r}, known are {known}", "upgrade redknot-hf")
    layers = _field(path, data, "layers", int)
    counts = _field(path, data, "kv_heads", (int, list))
    if not isinstance(counts, list):
        counts = [counts] * layers if layers * max(counts, 1) <= _MOST else []
    if len(counts) != layers or not all(_is_int(count) and 0 <= count <= _MOST for count in counts):
        raise error(path, f"kv_heads does not fit {layers} layers", "give a number, or a number for each layer")
    default = _spec_rule(path, "default", _field(path, data, "default", dict))
    exceptions = _exceptions(path, _field(path, data, "exceptions", list), counts)
    rules = tuple(tuple(exceptions.get((i, h), default) for h in range(count)) for i, count in enumerate(counts))
    return rules, _field(path, {"provenance": {}} | data, "provenance", dict)


def read_redknot(path: AnyPath) -> Rules:
    """Read RedKnot's head-class JSON. Retrieval and dense heads are global.

    A local head without a distance has a window of 512 tokens, without a sink size a sink of 4 tokens.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is damaged, of another format, or classifies the query heads of an MLA model.
    """
    path = Path(path)
    data = read_json(path, "download it again, or use HeadPlan.from_duo_attention for a table of scores")
    if "mla_head_classification" in data:
        problem = "classifies the query heads of an MLA model, whose KV has no heads of its own"
        raise error(path, problem, "use a file with kv_head_classification")
    if "kv_head_classification" not in data:
        what, reader = _foreign(data)
        raise error(path, f"is {what}, kv_head_classification is missing", f"use {reader}")
    shape = (_field(path, data, "num_layers", int), _field(path, data, "num_kv_heads", int))
    classes = _matrix(path, data, "kv_head_classification", shape)
    distances = _matrix(path, data, "kv_head_max_distance", shape)
    sinks = _matrix(path, data, "kv_head_sink_size", shape)
    dense = data.get("dense_prefix_layers") or 0
    if not _is_int(dense) or dense < 0:
        raise error(path, f"dense_prefix_layers is {dense!r}", "give a number of layers")

    def rule(layer: int, head: int) -> Rule:
        if layer < dense or classes[layer][head] in _GLOBAL_CLASSES:
            return None, 0
        distance, sink = distances[layer][head], sinks[layer][head]
        window = distance if distance is not None and distance > 0 else _DEFAULT_WINDOW
        return window, _DEFAULT_SINK if sink is None else sink

    return tuple(tuple(rule(layer, head) for head in range(shape[1])) for layer in range(shape[0]))


def read_duo_attention(path: AnyPath, global_ratio: float | None, threshold: float | None) -> Rules:
    """Read DuoAttention's scores, and the sizes of its local heads from the `config.json` beside them.

    Args:
        path: `full_attention_heads.tsv`, or the folder that holds it.
        global_ratio: Share of the heads that are global: those with the highest scores, the first of equals.
        threshold: Least score of a global head.

    Raises:
        FileNotFoundError: The scores or `config.json` are missing.
        ValueError: Not exactly one choice is given, it is out of range, or a file is damaged.
    """
    if (global_ratio is None) == (threshold is None):
        given = f"global_ratio is {global_ratio} and threshold is {threshold}"
        raise ValueError(f"{given}: give exactly one, such as global_ratio=0.25 or threshold=0.5")
    if global_ratio is not None and not 0 <= global_ratio <= 1:
        raise ValueError(f"global_ratio is {global_ratio}: give a share from 0 to 1")
    if threshold is not None and math.isnan(threshold):
        raise ValueError("threshold is nan: give a score from 0 to 1")
    path = Path(path)
    path = path / _SCORES if path.is_dir() else path
    scores = _read_scores(path)
    local = _duo_sizes(path.with_name("config.json"))
    ranked = sorted(
        ((i, h) for i, row in enumerate(scores) for h in range(len(row))), key=lambda p: -scores[p[0]][p[1]]
    )
    if global_ratio is not None:
        chosen = set(ranked[: round(global_ratio * len(ranked))])
    else:
        chosen = {(i, h) for i, h in ranked if scores[i][h] >= (threshold or 0)}
    return tuple(tuple((None, 0) if (i, h) in chosen else local for h in range(len(r))) for i, r in enumerate(scores))


def _duo_sizes(path: Path) -> Rule:
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing: it holds sink_size and recent_size, copy it with the scores")
    config = read_json(path, "download it again")
    return _field(path, config, "recent_size", int), _field(path, config, "sink_size", int)


def _read_scores(path: Path) -> list[list[float]]:
    """Return the scores, clipped to [0, 1], by layer."""
    fix = "give tab-separated scores, a line for each layer, a column for each KV head"
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as e:
        raise error(path, "is not text", fix) from e
    rows: list[list[float]] = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = [float(cell) for cell in line.split("\t")]
        except ValueError as e:
            raise error(path, f"line {number}: {e}", fix) from e
        if not all(map(math.isfinite, row)):
            raise error(path, f"line {number}: a score is not finite", fix)
        if rows and len(row) != len(rows[0]):
            raise error(path, f"line {number} has {len(row)} scores, the first has {len(rows[0])}", fix)
        rows.append([min(max(score, 0.0), 1.0) for score in row])
    if not rows:
        raise error(path, "holds no scores", fix)
    return rows


def _foreign(data: Mapping[str, Any]) -> tuple[str, str]:
    """Say what a JSON object is, and which reader takes it."""
    if data.get("format") == FORMAT:
        return "a head plan of redknot-hf", "HeadPlan.load"
    if "kv_head_classification" in data or "mla_head_classification" in data:
        return "a RedKnot head-class file", "HeadPlan.from_redknot"
    if "recent_size" in data and "sink_size" in data:
        return "the config of DuoAttention scores", "HeadPlan.from_duo_attention"
    return "some other JSON", "a file that HeadPlan.save wrote, or make a plan with HeadPlan.with_global"


def _field(path: Path, data: Mapping[str, Any], key: str, kind: Any, parent: str = "") -> Any:
    name, fix = parent + key, "write the file again"
    if key not in data:
        raise error(path, f"{name} is missing", fix)
    value = data[key]
    if not isinstance(value, kind) or isinstance(value, bool) or (isinstance(value, int) and value < 0):
        raise error(path, f"{name} is {reprlib.repr(value)}", fix)
    return value


def _matrix(path: Path, data: Mapping[str, Any], key: str, shape: tuple[int, int]) -> list[list[Any]]:
    """Return a checked [layers][KV heads] matrix: class names, or numbers, which may all be missing."""
    layers, heads = shape
    names = key == "kv_head_classification"
    rows = data.get(key)
    if rows is None and not names:
        return [[None] * heads] * layers
    fix = "correct num_layers, num_kv_heads or the matrix"
    if not isinstance(rows, list) or len(rows) != layers:
        found = f"{len(rows)} layers" if isinstance(rows, list) else reprlib.repr(rows)
        raise error(path, f"{key} has {found}, expected {layers}", fix)
    for i, row in enumerate(rows):
        if not isinstance(row, list) or len(row) != heads:
            found = f"{len(row)} KV heads" if isinstance(row, list) else reprlib.repr(row)
            raise error(path, f"{key}[{i}] has {found}, expected {heads}", fix)
        for h, value in enumerate(row):
            if not (value in _CLASSES if names else value is None or _is_int(value)):
                allowed = f"one of {', '.join(_CLASSES)}" if names else "a whole number of tokens, or null"
                raise error(path, f"{key}[{i}][{h}] is {value!r}", f"give {allowed}")
    return rows


def _exceptions(path: Path, groups: list[Any], counts: list[int]) -> dict[tuple[int, int], Rule]:
    """Return the rules of a plan file that differ from its default, by (layer, KV head)."""
    rules: dict[tuple[int, int], Rule] = {}
    for i, group in enumerate(groups):
        name = f"exceptions[{i}]"
        if not isinstance(group, dict):
            raise error(path, f"{name} is {reprlib.repr(group)}", 'write {"window": 64, "sink": 4, "heads": [[0, 1]]}')
        rule = _spec_rule(path, name, {key: value for key, value in group.items() if key != "heads"})
        for head in _field(path, group, "heads", list, f"{name}."):
            if not isinstance(head, list) or len(head) != 2 or not all(map(_is_int, head)):
                raise error(path, f"{name} names the head {reprlib.repr(head)}", "write [layer, kv_head]")
            place = (head[0], head[1])
            if not (0 <= place[0] < len(counts) and 0 <= place[1] < counts[place[0]]):
                fix = "count from 0, or correct layers and kv_heads"
                raise error(path, f"{name} names head {head}, outside the model", fix)
            if place in rules:
                raise error(path, f"{name} names head {head} a second time", "keep one of the two")
            rules[place] = rule
    return rules


def _spec_json(rule: Rule) -> dict[str, int | str | None]:
    window, sink, storage = (*rule, "model")[:3]
    spec: dict[str, int | str | None] = {"window": None} if window is None else {"window": window, "sink": sink}
    return spec if storage == "model" else spec | {"storage": storage}


def _spec_rule(path: Path, name: str, spec: Mapping[str, Any]) -> Rule:
    # A mistyped key must not drop its number in silence.
    if unknown := sorted(spec.keys() - {"window", "sink", "storage"}):
        raise error(path, f"{name} has the unknown key {unknown[0]!r}", "use window, sink and storage")
    window, sink = spec.get("window", False), spec.get("sink", 0)
    if not _is_int(sink) or not (window is None or _is_int(window)):
        fix = "give window as a number of tokens, or null for global heads, and sink as a number of tokens"
        raise error(path, f"{name} is {reprlib.repr(dict(spec))}", fix)
    return window, sink, spec.get("storage", "model")


def _is_int(value: Any) -> bool:
    return type(value) is int  # a bool is no number of tokens


def _replace(path: Path, text: str) -> None:
    # In the same folder, so that the rename stays on one file system and is atomic.
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8", newline="\n")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
