"""What a whole model is to reach on one GPU, judged on what `evals.benchmarks.speed_gpu` has measured."""

READ = 4.35e12  # bytes a second of the device on which the bars were set


def bars(rows: list[dict], read: float) -> list[dict]:
    """What a whole model is to reach, as far as it was measured, and what it does."""
    by_name = {(row["method"], row["batch"], row["length"]): row for row in rows}
    rates = {row["method"]: row["tokens_per_s"] for row in rows if "tokens_per_s" in row}
    mine = rates.get("1/8 global, captured")
    dense_rates = [rates[name] for name in ("dynamic", "static") if name in rates]

    def of(method: str, length: int, what: str, unit: float) -> float | None:
        row = by_name.get((method, 1, length))
        return row[what] / unit if row else None

    table: list[tuple[str, float | None, float, bool]] = []  # what, found, at most, whether reading bounds it
    for length, first_s in ((32768, 1.0), (131072, 5.5)):
        dense, eager = (of(method, length, "token_s", 1) for method in ("dynamic", "1/8 global"))
        captured = of("1/8 global, captured", length, "token_s", 1e-3)
        table += [
            (f"1/8 global, captured, {length}: ms a token", captured, 6.0, True),
            (f"1/8 global, {length}: s to the first token", of("1/8 global", length, "first_s", 1), first_s, False),
            (f"1/8 global, {length}: eager token / DynamicCache's", dense and eager and eager / dense, 1.0, False),
        ]  # fmt: skip
    table += [
        ("1/8 global, 131072: GiB of keys and values", of("1/8 global", 131072, "kv_bytes", 2**30), 2.2, False),
        ("all global, captured, 131072: ms a token", of("all global, captured", 131072, "token_s", 1e-3), 9.0, True),
        (
            "largest dense batch's tokens/s / ours",
            max(dense_rates) / mine if mine and dense_rates else None,
            0.25,
            False,
        ),
    ]
    return [_judged(text, value, bar, READ / read if scales else 1) for text, value, bar, scales in table if value]


def _judged(text: str, found: float, bar: float, factor: float) -> dict:
    scaled = float(f"{bar * factor:.3g}")
    one = {"bar": text, "at_most": bar, "scaled": scaled, "found": float(f"{found:.3g}"), "met": found <= scaled}
    print(f"{'met   ' if one['met'] else 'MISSED'} {text}: {one['found']} (at most {bar}, here {scaled})")
    return one
