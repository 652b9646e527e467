"""Results as text for a terminal, and as docs/benchmarks.md with its plots.

A result is a `Result` of `measure` as plain values.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from scripts.benchmark.measure import Case, Curves, Growth, spread

TITLES = {
    "store": "Label store",
    "labeler": "Labeler",
    "loader": "Loader",
    "targets": "Targets of the tokens",
    "loss": "Loss",
    "scan": "Scan and mixer",
    "model": "Model",
    "train": "Training step",
}
WITH_IMAGES = ("store", "labeler", "loader", "train")
HEAD = """# Benchmarks

Written by `python -m scripts.benchmark`; every figure is a measurement in `benchmarks/`. Values are medians with the
lowest and the highest of their rounds in brackets. The sides of a case take turns within one run, and "ours is better
by" is the median ratio of neighbouring rounds: above 1, this project (in bold) is faster or smaller. "Sought" is what
was aimed at. What the time goes into: [profiles.md](profiles.md).
"""


def cases_of(suite: dict[str, Any]) -> list[Case]:
    return [Case(**case) for case in suite["cases"]]


def growths_of(suite: dict[str, Any]) -> list[Growth]:
    return [Growth(**growth) for growth in suite["growths"]]


def curves_of(suite: dict[str, Any]) -> list[Curves]:
    """Returns the curves of a suite; results of earlier versions have none."""
    return [Curves(**curves) for curves in suite.get("curves", [])]


def left_out(suite: dict[str, Any]) -> list[str]:
    """Returns a line for each case that was not measured; results of earlier versions do not list them."""
    return [f"not measured: {name}: {reason}" for name, reason in suite.get("left_out", {}).items()]


def number(value: float) -> str:
    """Formats a number with three significant digits, and all digits before the decimal point."""
    return f"{value:,.0f}" if abs(value) >= 99.95 or value == 0 else f"{value:#.3g}".rstrip(".")


def cell(values: list[float]) -> str:
    low, middle, high = (number(value) for value in spread(values))
    return middle if low == high else f"{middle} ({low} – {high})"


def compared(case: Case, side: str) -> str:
    """Returns how many times better ours is; for a limit, the share of it that ours reaches."""
    return cell(case.advantage(side)) + (" of it" if side == "limit" else "")


def verdict(case: Case, rival: str) -> str:
    sought = case.sought.get(rival)
    if sought is None:
        return ""
    met = case.advantage(rival)[1] >= sought
    return f"≥ {sought:.3g}: {'met' if met else '**not met**'}"


def text(found: dict[str, Any]) -> str:
    """Returns the results as text for a terminal."""
    lines = [found["machine"]["what"] + "; median (lowest – highest)"]
    for name, suite in found["suites"].items():
        lines.append(f"\n{TITLES[name]} ({suite['seconds']} s)")
        for case in cases_of(suite):
            lines += ["", f"{case.name}, {case.unit}" + (f"  [{case.note}]" if case.note else "")]
            for side, values in case.values.items():
                better = "" if side == case.ours else f"ours is better by {compared(case, side)}"
                lines.append(f"  {side:62}{cell(values):28}{better}  {verdict(case, side)}".rstrip())
        for growth in growths_of(suite):
            lines += [
                "",
                f"{growth.name}, {growth.unit}, by {growth.x}" + (f"  [{growth.note}]" if growth.note else ""),
            ]
            for side, points in growth.points.items():
                lines.append(f"  {side:62}" + "  ".join(f"{x:,.0f}: {number(y)}" for x, y in points))
        lines += [line for left in left_out(suite) for line in ("", left)]
    return "\n".join(lines)


def render(results: Path, docs: Path) -> None:
    """Writes docs/benchmarks.md, and plots for each suite that has growths or curves, from all result files."""
    from scripts.benchmark.plots import draw_curves, draw_growths

    machines = [json.loads(file.read_text()) for file in sorted(results.glob("*.json"))]
    parts = [HEAD]
    for found in machines:
        parts.append(machine_section(found))
        for name, suite in found["suites"].items():
            picture, curves = f"benchmarks-{found['machine']['name']}-{name}.png", None
            if suite["growths"]:
                draw_growths(growths_of(suite), docs / picture)
            if curves_of(suite):
                curves = picture.replace(".png", "-curves.png")
                draw_curves(curves_of(suite), docs / curves)
            parts.append(suite_section(name, suite, picture if suite["growths"] else None, curves))
    if not any(found["machine"]["device"] == "cuda" for found in machines):
        parts.append(
            "## A GPU\n\nNot measured: no GPU was at hand. `python -m scripts.benchmark --device cuda` measures it.\n"
        )
    (docs / "benchmarks.md").write_text("\n".join(parts))


def machine_section(found: dict[str, Any]) -> str:
    by_versions: dict[str, list[str]] = {}
    for name, suite in found["suites"].items():
        told = ", ".join(f"{package} {version}" for package, version in suite["versions"].items())
        by_versions.setdefault(f"{suite['date']}, {told}", []).append(name)
    lines = [f"{', '.join(names)}: {told}." for told, names in by_versions.items()]
    return f"## {found['machine']['what']}\n\n" + "\n".join(lines) + "\n"


def suite_section(name: str, suite: dict[str, Any], picture: str | None, curves: str | None = None) -> str:
    command = f"python -m scripts.benchmark {name}"
    command += " --images PHOTOS" if suite["photographs"] == "given" and name in WITH_IMAGES else ""
    command += f" {suite['asked']}" if suite.get("asked") else ""
    command += " --device cuda" if suite["device"] == "cuda" else ""
    lines = [f"### {TITLES[name]}", "", f"`{command}`, {suite['seconds']:,} s", ""]
    lines += (
        [suite["remark"], ""] if suite.get("remark") else []
    )  # written by hand, about figures of an earlier version
    lines += [f"![{TITLES[name]}: curves]({curves})", ""] if curves else []
    lines += ["| | | ours is better by | sought |", "|---|---|---|---|"]
    for case in cases_of(suite):
        note = f"; {case.note}" if case.note else ""
        lines.append(f"| *{case.name}, {case.unit}{note}* | | | |")
        for side, values in case.values.items():
            mine = side == case.ours
            better = "" if mine else compared(case, side)
            shown = f"**{side}**" if mine else side
            lines.append(f"| {shown} | {cell(values)} | {better} | {verdict(case, side)} |")
    lines += [f"| *{left}* | | | |" for left in left_out(suite)]
    for growth in growths_of(suite):
        lines += ["", *growth_table(growth)]
    if picture:
        lines += ["", f"![{TITLES[name]}: growth]({picture})"]
    return "\n".join([*lines, ""])


def growth_table(growth: Growth) -> list[str]:
    places = sorted({x for points in growth.points.values() for x, _ in points})
    note = f"; {growth.note}" if growth.note else ""
    lines = [f"{growth.name}, {growth.unit}{note}", ""]
    lines += ["| " + " | ".join([growth.x, *(f"{x:,.0f}" for x in places)]) + " |", "|---" * (len(places) + 1) + "|"]
    for side, points in growth.points.items():
        known = dict(map(tuple, points))
        lines.append("| " + " | ".join([side, *(number(known[x]) if x in known else "" for x in places)]) + " |")
    return lines
