"""What a wheel has to be: `python tools/audit.py WHEEL`, with the dependency group `wheel`.

- Its tag is one that pip takes, its modules keep to the stable ABI that the tag names (abi3audit).
- Nothing is grafted but libgomp, whose licence and origin are in the wheel; nothing newer than OpenMP 4.5 is asked of
  it, so that the oldest libgomp a build image may have will do.
- It has the kernels of every level for every dtype, the modules that all of them use, and their types.
- No sources, tests or leftovers, and small.
"""

import json
import re
import subprocess
import sys
import zipfile
from pathlib import Path

SMALL = 1_640_000
INSTALLED = 3_860_000
ONCE = "lookup", "memoryviews", "per_channel", "runtime"
"""The modules that no level changes."""
OPENMP_4_5 = re.compile(r"G?OMP_([1-3]\.\d|4\.[05](\.\d)?)")


def tool(*command):
    """Run a tool of this environment and return its output, or end the audit."""
    done = subprocess.run([sys.executable, "-m", *command], capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
    return done.stdout


def audit(wheel):
    """The lines of the report; AssertionError where the wheel is not what it has to be."""
    _, version, python, abi, platform = wheel.stem.split("-")
    assert platform.startswith(("manylinux", "musllinux")), f"the platform is {platform}"
    tool("twine", "check", "--strict", str(wheel))
    # The second folder is the grafted library's, and has no Python modules.
    tool("check_wheel_contents", "--ignore", "W009,W010", str(wheel))
    if abi == "abi3":
        tool("abi3audit", "--strict", str(wheel))
    shown = json.loads(tool("auditwheel", "show", "--json", str(wheel)))
    assert shown["overall_tag"] in platform.split("."), f"the tag says {platform}, auditwheel {shown['overall_tag']}"
    assert shown["external_libs"] == {}, shown["external_libs"]
    assert shown["unsupported_isa"] is False
    with zipfile.ZipFile(wheel) as archive:
        sizes = {entry.filename: entry.file_size for entry in archive.infolist()}
        bills = [json.loads(archive.read(name)) for name in sizes if name.endswith(".cdx.json")]
    grafted = [name for name in sizes if name.startswith("batchnorm.libs/") and not name.endswith("/")]
    assert len(grafted) == 1, grafted
    library = grafted[0].split("/")[1]
    assert library.startswith("libgomp-"), library
    wanted = shown["versioned_symbols"].get(library, [])
    assert all(OPENMP_4_5.fullmatch(symbol) for symbol in wanted), wanted
    assert f"batchnorm-{version}.dist-info/licenses/LICENSE" in sizes
    assert f"batchnorm-{version}.dist-info/licenses/licenses/libgomp.txt" in sizes
    origins = [part["purl"] for bill in bills for part in bill["components"] if "gomp" in part["name"]]
    assert len(origins) == 1, f"libgomp is {len(origins)} times in the bill of materials"
    for name in sizes:
        top = name.partition("/")[0]
        assert top in ("batchnorm", "batchnorm.libs", f"batchnorm-{version}.dist-info"), name
        assert not name.endswith((".pyx", ".pxd", ".pxi", ".c", ".h", ".pyc")), name
    size, installed = wheel.stat().st_size, sum(sizes.values())
    assert size <= SMALL, f"{size} bytes"
    assert installed <= INSTALLED, f"{installed} bytes installed"
    modules = sorted(name.split(".")[0] for name in sizes if name.endswith(".so"))
    levels = sorted(name.partition("float32_")[2] for name in modules if "float32_" in name)
    assert levels in (["v2", "v3", "v4"], ["baseline"]), levels
    dtypes = "bfloat16", "float16", "float32", "float64"
    kernels = [f"{dtype}_{level}" for dtype in dtypes for level in levels]
    assert modules == [f"batchnorm/_kernels/{name}" for name in (*kernels, *ONCE)], modules
    typed = {f"batchnorm/_kernels/{name}.pyi" for name in ("kernels", *ONCE) if name != "memoryviews"}
    assert typed | {"batchnorm/py.typed"} <= sizes.keys()
    return [
        f"{wheel.name}",
        f"  {size / 1e3:.0f} kB, installed {installed / 1e6:.2f} MB; levels {', '.join(levels)}; {python}-{abi}",
        f"  needs {max(shown['versioned_symbols'].get('libc.so.6', ['–']), key=by_version)}",
        f"  {library}, {', '.join(wanted)}; from {origins[0]}",
    ]


def by_version(symbol):
    return [int(number) for number in re.findall(r"\d+", symbol)]


if __name__ == "__main__":
    for path in sys.argv[1:]:
        print("\n".join(audit(Path(path))))
