"""`python -m bench.trend`: a picture of batchnorm's speed over the stored results.

The results come from different machines, so times are not compared, but batchnorm's speed relative to the fastest
framework in the same run, on the shapes that all results have.
"""

import argparse
import json
from pathlib import Path

from batchnorm.profile.measure import PASSES

from .report import Row, mean

RESULTS = Path(__file__).parent / "results"
DTYPE, THREADS = "float32", 2


def rows_of(path):
    """The rows to compare: those of runs against all frameworks, without ReLU."""
    rows = [Row(row) for row in json.loads(path.read_text())["rows"] if not row.get("relu")]
    rows = [row for row in rows if (row["dtype"], row["threads"]) == (DTYPE, THREADS)]
    return [row for row in rows if row.time("torch") and row.time("JAX")]


def means(results):
    """For each pass and result, the geometric mean over the shapes that all results have, and their number."""
    common = set.intersection(*({row["case"] for row in rows} for rows in results.values()))
    return {
        which: [
            mean(row.frameworks for row in rows if row["pass"] == which and row["case"] in common)
            for rows in results.values()
        ]
        for which in PASSES
    }, len(common)


def draw(path, names, found, shapes):
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot, ticker

    names = [f"{name[:10]}\n{name[11:]}" for name in names]  # the date, and the machine below it
    figure, panel = pyplot.subplots(figsize=(1.2 * max(5, len(names)), 3), layout="constrained")
    for which, values in found.items():
        (line,) = panel.plot(names, values, "o-")
        panel.annotate(which, (len(names) - 1, values[-1]), (8, -4), textcoords="offset points", color=line.get_color())
    panel.axhline(1, color="0.3", linewidth=1, linestyle="--")
    panel.set_title(f"Times as fast as the quickest framework, {DTYPE}, {THREADS} threads, {shapes} shapes", fontsize=9)
    panel.yaxis.set_major_formatter(ticker.FormatStrFormatter("%g×"))
    panel.set_ylim(0)
    panel.grid(axis="y", color="0.93")
    panel.spines[["top", "right"]].set_visible(False)
    panel.margins(x=0.22)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def main():
    parser = argparse.ArgumentParser(prog="python -m bench.trend", description=__doc__.partition("\n")[0])
    parser.add_argument("--output", type=Path, default=RESULTS / "trend.png", help="the picture (default %(default)s)")
    arguments = parser.parse_args()
    results = {path.stem: rows_of(path) for path in sorted(RESULTS.glob("*.json"))}
    results = {name: rows for name, rows in results.items() if rows}
    if not results:
        raise SystemExit(f"no result in {RESULTS} has {DTYPE} on {THREADS} threads")
    found, shapes = means(results)
    draw(arguments.output, list(results), found, shapes)
    for which, values in found.items():
        print(which, *(f"{name} {value:.2f}" for name, value in zip(results, values, strict=True)), sep="  ")


if __name__ == "__main__":
    main()
