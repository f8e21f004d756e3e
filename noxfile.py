"""What CI does, on any machine: `nox -l` lists it, `nox -s wheel` rehearses a release.

Each session has a virtual environment of its own. A Python that is not installed is skipped, unless it is asked for.
"""

import json
import os
import re
import shutil
import subprocess
import tarfile
from pathlib import Path

import nox

nox.needs_version = ">=2025.2"
nox.options.sessions = ["lint", "tests"]
nox.options.default_venv_backend = "venv"

PYTHONS = ["3.11", "3.12", "3.13", "3.14", "3.15"]
FREE_THREADED = ["3.14t", "3.15t"]
DIST = Path("dist")
FOLDERS = ("tests", "docs", "examples", "pyproject.toml")
"""What the suite needs besides the installed package."""
PYPROJECT = nox.project.load_toml("pyproject.toml")
NIGHTLY = "https://pypi.anaconda.org/scientific-python-nightly-wheels/simple"
COVERED = 90
"""Percent of the lines and branches in Python."""


def group(name):
    """The requirements of a dependency group; pip itself knows groups from 25.1 on."""
    return nox.project.dependency_groups(PYPROJECT, name)


def package(extras):
    """The checkout with extras; in place of a build of it, the wheel that BATCHNORM_WHEEL names, if it names one."""
    return f"{os.environ.get('BATCHNORM_WHEEL', '.')}[{extras}]"


EVERYTHING = ("-m", "not large")
"""For pytest: also what it leaves out by itself, the slow tests and all levels of kernels but the best."""


@nox.session
def lint(session):
    """Style, types, metadata and the workflows."""
    session.install(*group("lint"))
    # Type checkers find the sources like an installed package, so nothing has to be compiled.
    folder = session.run("python", "-c", "import site; print(site.getsitepackages()[0])", silent=True).strip()
    Path(folder, "sources.pth").write_text(str(Path("src").absolute()))
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")
    examples = readme_examples()
    for checker in ("mypy", "pyright"):
        session.run(checker)
        session.run(checker, *examples)
    check_completeness(session)
    session.run("sp-repo-review", "--show", "err", ".")
    cython = [path for path in Path("src").rglob("*.p*") if path.suffix in (".pyx", ".pxd", ".pxi")]
    session.run("cython-lint", *map(str, cython))
    if not Path(".github").exists():
        return
    schemas = {
        "vendor.github-workflows": ".github/workflows/*.yml",
        "custom.github-workflows-require-timeout": ".github/workflows/*.yml",
        "vendor.dependabot": ".github/dependabot.yml",
        "vendor.github-issue-forms": ".github/ISSUE_TEMPLATE/[!c]*.yml",
        "vendor.github-issue-config": ".github/ISSUE_TEMPLATE/config.yml",
        "vendor.citation-file-format": "CITATION.cff",
    }
    for schema, pattern in schemas.items():
        session.run("check-jsonschema", "--builtin-schema", schema, *map(str, Path().glob(pattern)))
    session.run("zizmor", "--offline", "--pedantic", "--strict-collection", "--no-progress", ".github")


def readme_examples():
    """Each example of README as a program: the imports stand in the first one. Pyright overlooks folders like .nox."""
    folder = Path("build/readme")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    paths = []
    for example in re.findall(r"```python\n(.*?)```", Path("README.md").read_text(), re.DOTALL):
        paths.append(folder / f"example_{len(paths) + 1}.py")
        paths[-1].write_text(f"import numpy as np\nimport batchnorm as bn\n{example}")
    return list(map(str, paths))


def check_completeness(session):
    """Type checkers know the type of everything that is public, except of what peers have to say: see `frameworks`."""
    command = "pyright", "--verifytypes", "batchnorm", "--ignoreexternal", "--outputjson"
    symbols = json.loads(session.run(*command, silent=True, success_codes=[0, 1]))["typeCompleteness"]["symbols"]
    unknown = [
        symbol["name"]
        for symbol in symbols
        if symbol["isExported"]
        and (symbol["isTypeAmbiguous"] or not symbol["isTypeKnown"])
        and not symbol["name"].startswith(("batchnorm.sklearn.", "batchnorm.torch.", "batchnorm.jax."))
    ]
    if unknown or "batchnorm.forward" not in (symbol["name"] for symbol in symbols):
        session.error(f"types that are not known: {', '.join(unknown) or 'all'}")


@nox.session(python=[*PYTHONS, *FREE_THREADED])
def tests(session):
    """The suite, on a build from this checkout."""
    extra = "test-core" if session.python in FREE_THREADED else "test"
    session.install(f".[{extra}]")
    session.run("python", "-m", "pytest", "-n", "auto", *EVERYTHING, *session.posargs)


@nox.session(python=PYTHONS[0])
def oldest(session):
    """The suite with the oldest NumPy."""
    session.install(".[test]", "numpy==1.26.0")
    session.run("python", "-m", "pytest", "-n", "auto", *EVERYTHING, *session.posargs)


@nox.session
def nightly(session):
    """The suite with tomorrow's NumPy."""
    session.install(".[test-core]")
    session.install("--pre", "--upgrade", "--only-binary", ":all:", "--index-url", NIGHTLY, "numpy")
    session.run("python", "-m", "pytest", "-n", "auto", *EVERYTHING, *session.posargs)


@nox.session
def coverage(session):
    """How much of the Python part the quick suite runs; other levels change no Python line."""
    session.install(".[test]", *group("coverage"))
    session.run("coverage", "run", "-m", "pytest", *session.posargs)
    session.run("coverage", "combine")
    session.run("coverage", "report", f"--fail-under={COVERED}")


@nox.session
def serial(session):
    """A compiler without OpenMP gives a serial build, which says so."""
    compiler = Path(session.create_tmp()).absolute() / "cc"
    compiler.write_text(
        "#!/bin/sh\n"
        "for argument; do case $argument in -fopenmp*|-openmp*|-mp|-xopenmp) exit 1 ;; esac; done\n"
        'exec cc "$@"\n'
    )
    compiler.chmod(0o755)
    session.install(".[test-core]", env={"CC": str(compiler)})
    says = session.run("python", "-c", "import batchnorm as bn; bn.show_config()", silent=True)
    if "decided by: serial build" not in says:
        session.error(f"the build is not serial, or does not say so:\n{says}")
    session.run("python", "-m", "pytest", "-q", "-n", "auto", *EVERYTHING, "tests/test_layer.py", "tests/test_bits.py")


@nox.session
@nox.parametrize("kind", ["address", "thread"])
def sanitize(session, kind):
    """The suite under a sanitizer; see tools/sanitize.sh for what it needs."""
    session.install(".[test]", "cython", "cython-cmake", "scikit-build-core", "cmake", "ninja")
    session.run("tools/sanitize.sh", kind, *session.posargs, external=True)


@nox.session
def bench(session):
    """Check that the benchmarks work, on small shapes, against all contestants that PyPI has for this Python."""
    session.install(package("bench,mpi,dask"), "mpich")
    folder = Path(session.create_tmp())
    rivals = "numpy,jax,onnxruntime,onednn,numba"
    session.run("python", "-m", "bench", "--quick", "--against", rivals, "--output", str(folder / "bench.md"))
    session.run("python", "-m", "bench.busy", "--rounds", "1")
    session.run("python", "-m", "bench.selection", "--rounds", "1", "--quick")
    session.run("python", "-m", "bench.deploy", "--rounds", "1", "--quick")
    session.run("python", "-m", "bench.calculus", "--rounds", "1", "--quick")
    session.run("python", "-m", "bench.engines", "--rows", "1000000", "--chunk", "300000")
    session.run("python", "-m", "bench.trend", "--output", str(folder / "trend.png"))
    session.run("python", "-m", "bench.distributed", "--output", str(folder / "distributed.md"))
    for name in ("bench.json", "bench.png", "trend.png", "distributed.png"):
        if not (folder / name).stat().st_size:
            session.error(f"{name} is empty")


@nox.session
def frameworks(session):
    """Layers of other systems, made, predicted and trained by those themselves; Keras on two backends; adapters."""
    frameworks = "torch", "torchvision", "expecttest", "keras", "flax", "dm-haiku"
    tables = "pandas", "polars", "pyarrow", "xarray"
    types = "pyright[nodejs]", "scikit-learn-stubs"
    session.install(package("test,sklearn,autograd,dask,jax"), *frameworks, *tables, *types)
    session.run("pyright", "--verifytypes", "batchnorm", "--ignoreexternal")
    for backend in ("torch", "jax"):
        session.run(
            "python",
            "-m",
            "pytest",
            "-n",
            "auto",
            "tests/test_conventions_peers.py",
            "tests/test_folding.py",
            "tests/test_calculus_peers.py",
            "tests/test_variants.py",
            *EVERYTHING,
            *(("-k", "keras") if backend == "jax" else ()),
            *session.posargs,
            env={"KERAS_BACKEND": backend},
        )
    of_torch = "tests/test_torch.py", "tests/test_torch_networks.py", "tests/test_torch_sync.py"
    adapters = *of_torch, "tests/test_sklearn.py", "tests/test_autograd.py", "tests/test_jax.py"
    arrays = "tests/test_array_types.py", "tests/test_engines.py"
    session.run("python", "-m", "pytest", *adapters, *arrays, *EVERYTHING, *session.posargs)


def site(session, extras, groups, *options):
    """Build the pages of docs/, where any warning is an error, and return the environment for their tests.

    One level of kernels is enough to import the package and to run the examples, and takes a third of the time.
    """
    one_level = "-C", "cmake.define.BATCHNORM_KNOWS_LEVELS=OFF", "-C", "build-dir=build/docs"
    packages = [package for name in groups for package in group(name)]
    session.install(f".[test-core,examples,sklearn,autograd{extras}]", *packages, *one_level)
    for generated in ("build/site", "docs/api/generated", "docs/gallery"):
        shutil.rmtree(generated, ignore_errors=True)
    session.run("python", "-m", "sphinx", "-W", "--keep-going", "-q", "-c", "docs", *options, ".", "build/site")
    return {"BATCHNORM_SITE": str(Path("build/site").absolute())}


@nox.session
def docs(session):
    """The site, in build/site, and its links; `-- --online` also those from and to other sites."""
    online = ("-t", "online") if "--online" in session.posargs else ()
    env = site(session, "", ["docs"], *online)
    session.run("python", "-m", "pytest", "tests/test_site.py", env=env)
    if online:
        session.run("python", "-m", "sphinx", "-q", "-b", "linkcheck", "-c", "docs", *online, ".", "build/links")


@nox.session
def page(session):
    """What `explain --html` writes, and the site, in a browser of the system: Debian's chromium, or Google Chrome."""
    if not any(map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))):
        session.error("there is no Chromium here: apt-get install chromium")
    env = site(session, ",profile", ["docs", "page"])
    session.run(
        "python", "-m", "pytest", "tests/test_page.py", "tests/test_site.py", *EVERYTHING, *session.posargs, env=env
    )


@nox.session
def wheel(session):
    """sdist → wheel from the sdist, twice → auditwheel → audit; then `installed` on every Python that is installed.

    On Linux. `-- --only 3.12` leaves it at that Python, `-- --only none` at the audit.
    """
    session.install("--require-hashes", "-r", "requirements/build.txt")
    session.install(*group("wheel"))
    epoch = session.run("git", "log", "-1", "--format=%ct", external=True, silent=True).strip()
    env = {"SOURCE_DATE_EPOCH": epoch}
    elsewhere = Path(session.create_tmp()).absolute() / "again"
    shutil.rmtree(DIST, ignore_errors=True)
    shutil.rmtree(elsewhere, ignore_errors=True)
    session.run("git", "clone", "--quiet", ".", str(elsewhere / "clone"), external=True)
    built, again = build(session, Path(), DIST, env), build(session, elsewhere / "clone", elsewhere / "dist", env)
    for first, second in zip(built, again, strict=True):
        if first.read_bytes() != second.read_bytes():
            session.error(f"{first.name} has other bytes when the last commit is built in another folder")
    sdist, _, repaired = built
    session.run("python", "-m", "twine", "check", "--strict", str(sdist))
    session.run("python", "tools/audit.py", str(repaired))
    only = session.posargs[1:] if session.posargs[:1] == ["--only"] else PYTHONS
    for python in PYTHONS:
        if python in only:
            session.notify(f"installed-{python}", ())


def build(session, project, folder, env):
    """The sdist, the wheel that is built from it, and the wheel that any Linux can use."""
    session.run("python", "-m", "build", "--no-isolation", "--outdir", str(folder), str(project), env=env)
    (sdist,), (wheel,) = folder.glob("*.tar.gz"), folder.glob("*.whl")
    session.run("auditwheel", "repair", "--strip", "-z", "9", "-w", str(folder / "repaired"), str(wheel), env=env)
    (repaired,) = (folder / "repaired").glob("*.whl")
    return sdist, wheel, repaired


@nox.session(python=PYTHONS)
def installed(session):
    """The suite on the wheel in dist/, away from the sources, with no compiler and no libgomp but the wheel's own."""
    (wheel,) = (DIST / "repaired").absolute().glob("*.whl")
    (sdist,) = DIST.absolute().glob("*.tar.gz")
    session.install(f"{wheel}[test]", "--only-binary", ":all:")
    away = Path(session.create_tmp()).absolute() / "away"
    shutil.rmtree(away, ignore_errors=True)
    with tarfile.open(sdist) as archive:
        archive.extractall(away, filter="data")
    (sources,) = away.iterdir()
    for name in FOLDERS:
        shutil.move(sources / name, away / name)
    shutil.rmtree(sources)
    session.chdir(away)
    print(f"{wheel.name} on {session.python}")
    session.run(
        *without_libgomp(session),
        "python",
        "-m",
        "pytest",
        "-n",
        "auto",
        *EVERYTHING,
        *session.posargs,
        env={"PATH": session.bin, "PYTHONPATH": None, "LD_LIBRARY_PATH": None},
        external=True,
    )


def without_libgomp(session):
    """The command that hides the system's libgomp from the one after it, where this process may do that."""
    unshare, mount = shutil.which("unshare"), shutil.which("mount")
    folders = map(Path, ("/lib", "/lib64", "/usr/lib"))
    libraries = {path.resolve() for folder in folders for path in folder.glob("**/libgomp.so.1")}
    if not libraries:
        return []
    hide = " && ".join(f"{mount} --bind /dev/null {library}" for library in sorted(libraries))
    if not unshare or not mount or subprocess.run([unshare, "--mount", "/bin/sh", "-c", hide], check=False).returncode:
        session.warn("the system's libgomp stays visible: hiding it takes root")
        return []
    return [unshare, "--mount", "/bin/sh", "-c", f'{hide} && exec "$@"', "sh"]


@nox.session(venv_backend="none")
def release(session):
    """Check that a tag is the version and has its section in CHANGELOG, and that there is an address: `-- v0.2.0`."""
    (tag,) = session.posargs
    version = re.search(r'__version__ = "(.+)"', Path("src/batchnorm/_version.py").read_text())[1]
    if tag != f"v{version}":
        session.error(f"the tag is {tag}, the version {version}")
    if not re.search(
        rf"^## {re.escape(version)} \(\d{{4}}-\d\d-\d\d\)$", Path("CHANGELOG.md").read_text(), re.MULTILINE
    ):
        session.error(f"CHANGELOG has no section '## {version} (date)'")
    if not PYPROJECT["project"]["urls"].get("Source"):
        session.error("pyproject.toml has no Source in [project.urls]: where is the repository?")
