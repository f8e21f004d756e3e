"""The results as Markdown and as a picture."""

import itertools
import math
import statistics
import textwrap

from batchnorm.profile.measure import OURS, PASSES

from .contestants import FRAMEWORKS, OURS_OUT

COLOURS = {
    "NumPy": "#999999",
    "torch": "#d55e00",
    "JAX": "#009e73",
    "ONNX Runtime": "#cc79a7",
    "oneDNN": "#56b4e9",
    "numba": "#e69f00",
}
LARGE, IN_CACHE = 1.0, 26.0  # megabytes


class Row(dict):
    """One pass over one case: facts, and the best time of each contestant in each of its ways."""

    @property
    def best(self):
        return self["best"]

    def time(self, name):
        """The faster of allocating the result and writing it to `out=`."""
        return min((self.best[way] for way in (name, f"{name}, out=") if way in self.best), default=None)

    def ratio(self, rival):
        """The rival's time divided by ours."""
        return self.time(rival) / self.time(OURS) if self.time(rival) else None

    @property
    def frameworks(self):
        """The time of the fastest framework divided by ours."""
        return min((self.ratio(name) for name in FRAMEWORKS if name in self.best), default=None)

    @property
    def over_limit(self):
        return self.time(OURS) / self.best["limit"]

    @property
    def gigabytes_per_second(self):
        arrays = len(PASSES[self["pass"]]) + 1
        return arrays * self["megabytes"] / 1e3 / self.time(OURS)


def mean(values):
    """The geometric mean."""
    logs = [math.log(value) for value in values if value is not None]
    return math.exp(statistics.mean(logs)) if logs else None


def number(value, digits=2):
    return "–" if value is None else f"{value:.{digits}f}"


def table(header, lines, left):
    rule = ["---" if i < left else "---:" for i in range(len(header))]
    return "\n".join("| " + " | ".join(line) + " |" for line in [header, rule, *lines])


def summary(rows):
    """Geometric means by dtype, pass and number of threads."""
    header = ["dtype", "pass", "threads", "NumPy, 1 MB and more", "best framework, channels first and (N, C)"]
    header += ["best framework, channels last", "slowest against a framework", "over limit, 1 MB and more"]
    header += ["one thread over this"]
    lines = []
    for (dtype, which, threads), found in grouped(rows, "dtype", "pass", "threads"):
        large = [row for row in found if row["megabytes"] >= LARGE]
        last = [row for row in found if row["layout"] == "channels-last"]
        first = [row for row in found if row not in last]
        alone = {
            row["case"]: row.time(OURS)
            for row in rows
            if (row["dtype"], row["pass"], row["threads"]) == (dtype, which, 1)
        }
        gains = [
            alone[row["case"]] / row.time(OURS)
            for row in large
            if row["case"] in alone and row["megabytes"] <= IN_CACHE and threads > 1
        ]
        slowest = min((row.frameworks for row in found if row.frameworks), default=None)
        lines.append(
            [dtype, which, str(threads), number(mean(row.ratio("NumPy") for row in large))]
            + [number(mean(row.frameworks for row in group)) for group in (first, last)]
            + [number(slowest), number(mean(row.over_limit for row in large)), number(mean(gains))]
        )
    return table(header, lines, 3)


def grouped(rows, *names):
    def key(row):
        return tuple(row[name] for name in names)

    order = list(dict.fromkeys(map(key, rows)))
    ordered = sorted(rows, key=lambda row: order.index(key(row)))
    return [(values, list(found)) for values, found in itertools.groupby(ordered, key)]


def slower(rows):
    """The rows in which a framework is faster."""
    for row in rows:
        if row.frameworks is not None and row.frameworks < 1:
            rival = min((name for name in FRAMEWORKS if name in row.best), key=row.ratio)
            yield (
                f"- {row['case']} {row['pass']}, {row['dtype']}, {row['threads']} threads: "
                f"{rival} takes {row.ratio(rival):.2f} of the time"
            )


def tables(rows, names):
    rivals = [name for name in names if name != OURS and not name.endswith(", out=")]
    for (dtype, threads), found in grouped(rows, "dtype", "threads"):
        header = ["shape", "pass", "batchnorm µs", "out= µs", "GB/s", "over limit", *rivals]
        lines = [
            [row["case"], row["pass"]]
            + [number(row.best[name] * 1e6, 1 if row.best[name] < 1e-3 else 0) for name in (OURS, OURS_OUT)]
            + [number(row.gigabytes_per_second, 1), number(row.over_limit)]
            + [number(row.ratio(name)) for name in rivals]
            for row in found
        ]
        yield f"## {dtype}, {threads} thread{'s' if threads > 1 else ''}\n\n{table(header, lines, 2)}"


def markdown(rows, names):
    parts = [
        "Shapes are those of memory; `last` has the channels last. µs: best time. The columns under a rival's name: "
        "its time over that of batchnorm, each in its quicker way, allocating the result or writing to `out=`. GB/s: "
        "x and y (backward: x, dy and dx) over the time of batchnorm. Over limit: that time over `np.copyto` "
        "(backward: `np.add`), same threads, same arrays."
    ]
    parts.append(f"Geometric means:\n\n{summary(rows)}")
    if any(row["network"] for row in rows):
        parts.append(f"All layers of a network; the others' times over that of batchnorm:\n\n{totals(rows)}")
    parts.append("A framework is quicker at:\n\n" + ("\n".join(slower(rows)) or "- none of these"))
    return "\n\n".join([*parts, *tables(rows, names)]) + "\n"


def totals(rows):
    """The times of all layers of a network."""
    header = ["network", "dtype", "threads", "pass", "batchnorm ms", *COLOURS]
    lines = []
    for (network, dtype, threads, which), found in grouped(rows, "network", "dtype", "threads", "pass"):
        if network:
            ours = sum(row["layers"] * row.time(OURS) for row in found)
            lines.append([network, dtype, str(threads), which, number(ours * 1e3)])
            for name in COLOURS:
                theirs = [row["layers"] * row.time(name) for row in found if row.time(name)]
                lines[-1].append(number(sum(theirs) / ours if len(theirs) == len(found) else None))
    return table(header, lines, 4)


def draw(path, rows, names, facts):
    """Draw our speed relative to each of the others, one point per shape, for the first dtype and the most threads."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot, ticker

    dtype, threads = rows[0]["dtype"], max(row["threads"] for row in rows)
    shown = [row for row in rows if row["dtype"] == dtype and row["threads"] == threads]
    rivals = [name for name in COLOURS if name in names]
    figure, panels = pyplot.subplots(
        len(PASSES), 1, figsize=(6, 1.6 + len(PASSES) * (0.6 + 0.36 * len(rivals))), sharex=True, layout="constrained"
    )
    for panel, which in zip(panels, PASSES, strict=True):
        for place, name in enumerate(rivals):
            ratios = [row.ratio(name) for row in shown if row["pass"] == which and row.time(name)]
            if ratios:
                apart = [place + 0.28 * math.sin(2.4 * i) for i in range(len(ratios))]
                panel.plot(ratios, apart, "o", color=COLOURS[name], markersize=4, alpha=0.6, markeredgewidth=0)
                panel.plot([mean(ratios)] * 2, [place - 0.4, place + 0.4], color="0.1", linewidth=2)
        panel.axvline(1, color="0.3", linewidth=1, linestyle="--")
        panel.set(xscale="log", axisbelow=True, ylim=(len(rivals) - 0.5, -0.5))
        panel.set_title(which, loc="left", fontsize="medium", fontweight="bold")
        panel.set_yticks(range(len(rivals)), rivals)
        panel.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
        panel.xaxis.set_major_formatter(ticker.FormatStrFormatter("%g×"))
        panel.xaxis.set_minor_formatter(ticker.NullFormatter())
        panel.grid(color="0.93")
        panel.tick_params(axis="y", length=0)
        panel.spines[["top", "right", "left"]].set_visible(False)
    panels[-1].set_xlabel("times as fast as the others (line: geometric mean)")
    measured = f"{dtype}, {threads} thread{'s' if threads > 1 else ''}, {len(shown) // len(PASSES)} shapes"
    measured += ", followed by ReLU" if any(row.get("relu") for row in shown) else ""
    figure.suptitle(f"{measured}\n{textwrap.fill(facts, 90)}", fontsize=7, color="0.3")
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
