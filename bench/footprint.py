"""`python -m bench.footprint WHEEL torch jax onnxruntime`: the cost of installing and importing a package over NumPy.

Each requirement gets a virtual environment that already has NumPy. Measured are the time of `pip install` with pip's
cache filled, the size of all files that it adds, and the time of the import after that of NumPy. Each import runs in a
new process, the packages take turns, and the best and the median time are reported.
"""

import argparse
import statistics
import subprocess
import tempfile
import time
import venv
from pathlib import Path

IMPORTS = 15

TIMED = """
import numpy, time
begin = time.perf_counter()
import {module}
print(time.perf_counter() - begin)
"""


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts)


class Package:
    """A package in its own environment."""

    def __init__(self, requirement: str, folder: Path) -> None:
        self.name = Path(requirement).name.partition("-")[0].partition("=")[0]
        venv.create(folder, with_pip=True)
        self.python = folder / "bin" / "python"
        self.pip("download", "--quiet", "--dest", str(folder / "downloads"), requirement)
        self.pip("install", "--quiet", "numpy")
        before = size_of(folder / "lib")
        begin = time.perf_counter()
        self.pip("install", "--quiet", "--no-index", "--find-links", str(folder / "downloads"), requirement)
        self.seconds = time.perf_counter() - begin
        self.size = size_of(folder / "lib") - before
        self.imports: list[float] = []
        self.time_import()
        self.imports.clear()

    def pip(self, *arguments: str) -> None:
        subprocess.run([self.python, "-m", "pip", *arguments], check=True)

    def time_import(self) -> None:
        program = TIMED.format(module=self.name)
        done = subprocess.run([self.python, "-c", program], check=True, capture_output=True, text=True)
        self.imports.append(float(done.stdout))


def report(packages: list[Package]) -> str:
    lines = ["| package | installed, MB | pip install, s | import, ms: best | median |", "|---|---:|---:|---:|---:|"]
    for package in packages:
        best, median = 1e3 * min(package.imports), 1e3 * statistics.median(package.imports)
        lines.append(
            f"| {package.name} | {package.size / 1e6:.1f} | {package.seconds:.1f} | {best:.0f} | {median:.0f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.footprint", description=__doc__.partition("\n")[0])
    parser.add_argument("requirement", nargs="+", help="what pip is given: a name, or the path of a wheel")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        packages = [Package(text, Path(folder, str(number))) for number, text in enumerate(chosen.requirement)]
        for _ in range(IMPORTS):
            for package in packages:
                package.time_import()
    print(report(packages))


if __name__ == "__main__":
    main()
