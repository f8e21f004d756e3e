"""Builds compared to the first of them, as Markdown."""

import math
import statistics

from .report import grouped, number, table

SLOWER = 1.03
"""About the noise between two identical builds on a quiet machine."""

IN_CACHE = 13.0
"""Megabytes of x."""


def ratio(row, label, base):
    return row.best[label] / row.best[base]


def is_settled(row, *labels):
    return set(labels) <= set(row["settled"])


def mean(ratios):
    """The geometric mean of the ratios that exist."""
    return math.exp(statistics.mean(map(math.log, ratios))) if ratios else None


def means(rows, label, base):
    """A line for each dtype, number of threads and pass."""
    header = [
        "dtype",
        "threads",
        "pass",
        "shapes",
        "all",
        "median",
        f"x up to {IN_CACHE:.0f} MB",
        "larger",
        "least",
        "most",
    ]
    lines = []
    for (dtype, threads, which), found in grouped(rows, "dtype", "threads", "pass"):
        ratios = {row["case"]: ratio(row, label, base) for row in found}
        small = [ratios[row["case"]] for row in found if row["megabytes"] <= IN_CACHE]
        large = [ratios[row["case"]] for row in found if row["megabytes"] > IN_CACHE]
        figures = [
            mean(ratios.values()),
            statistics.median(ratios.values()),
            mean(small),
            mean(large),
            min(ratios.values()),
            max(ratios.values()),
        ]
        lines.append([dtype, str(threads), which, str(len(found)), *map(number, figures)])
    return table(header, lines, 3)


def slower(rows, label, base):
    """The cells where a build takes more time than noise explains, the worst first."""
    for row in sorted(rows, key=lambda row: -ratio(row, label, base)):
        if ratio(row, label, base) > SLOWER:
            times = [microseconds(row.best[name]) for name in (label, base)]
            doubt = "" if is_settled(row, label, base) else " (did not settle)"
            yield (
                f"- {ratio(row, label, base):.2f}: {row['case']} {row['pass']}, {row['dtype']}, "
                f"{row['threads']} threads, {times[0]} µs for {times[1]}{doubt}"
            )


def microseconds(seconds):
    return number(seconds * 1e6, 2 if seconds < 1e-5 else 1 if seconds < 1e-3 else 0)


def cells(rows, labels):
    """A line for each shape: in each pass, the first build's µs and the others' times relative to it."""
    base, *others = labels
    for (dtype, threads), found in grouped(rows, "dtype", "threads"):
        passes = list(dict.fromkeys(row["pass"] for row in found))
        columns = [text for which in passes for text in (f"{which}, {base} µs", *others)]
        lines = []
        for (case,), of_case in grouped(found, "case"):
            by_pass = {row["pass"]: row for row in of_case}
            line = [case]
            for which in passes:
                row = by_pass[which]
                line += [microseconds(row.best[base]), *(number(ratio(row, label, base)) for label in others)]
            lines.append(line)
        yield f"### {dtype}, {threads} thread{'s' if threads > 1 else ''}\n\n{table(['shape', *columns], lines, 1)}"


def markdown(rows, labels, versions):
    """Everything about the builds; `labels` begins with the one to which the others are compared."""
    base, *others = labels
    parts = ["\n".join(f"- {label}: {versions[label]}" for label in labels)]
    for label in others:
        parts.append(
            f"## {label} over {base}\n\nTime of {label} over that of {base}, best of each, results written to `out=`. "
            f"Geometric means, and the median, over shapes; below 1 {label} is quicker.\n\n{means(rows, label, base)}"
        )
        found = list(slower(rows, label, base))
        late = sum(not is_settled(row, label, base) for row in rows)
        parts.append(
            f"Slower by more than {100 * SLOWER - 100:.0f} %: {len(found)} of {len(rows)} cells. "
            f"Did not settle, because the machine was busy: {late}."
        )
        parts += ["\n".join(found)] if found else []
    return "\n\n".join([*parts, *cells(rows, labels)]) + "\n"
