"""The package as a user sees it: what it exports, how it chooses its kernels, what it prints and documents."""

import ast
import doctest
import importlib.util
import inspect
import os
import pkgutil
import platform
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from processes import python, search_path, succeeds

import batchnorm as bn
from batchnorm import _kernels
from batchnorm._kernels import lookup, memoryviews, per_channel, runtime

pytestmark = pytest.mark.once  # but for what is looked for in the modules themselves

DOCUMENTED = [
    "functional",
    "fixed",
    "folding",
    "layer",
    "reference",
    "gradient.pathways",
    "gradient.diagnosis",
    "cs231n",
    "calculus",
    "moments",
    "plan",
    "conventions.systems",
    "conventions.state",
    "mpi.sync",
    "_threads",
    "_config",
]
ADAPTERS = {
    "sklearn": ("scikit-learn 1.6 or newer", "scikit-learn"),
    "autograd": ("HIPS autograd", "autograd"),
    "jax": ("JAX 0.6.1 or newer", "jax"),
}
"""What they need, in words, and the package to install."""

SOURCES = (".py", ".pyi", ".pyx", ".pxd", ".pxi", ".h", ".sh")


@pytest.mark.parametrize("name", DOCUMENTED)
def test_examples_in_docstrings(name):
    if name == "mpi.sync":
        pytest.importorskip("mpi4py")
    failed, tried = doctest.testmod(importlib.import_module(f"batchnorm.{name}"))
    assert tried > 0
    assert failed == 0


def test_all_public_names_are_documented():
    for name in set(bn.__all__) - {"__version__", "Activation"}:  # which are no functions and no classes
        assert getattr(bn, name).__doc__, name
    compute = (bn.forward, bn.backward, bn.inference, bn.inference_backward, bn.update_running, bn.BatchNorm, bn.Plan)
    explain = (bn.pathways, bn.moment_gradients, bn.jacobian, bn.centering_matrix, bn.diagnose)
    calculus = (bn.jvp, bn.double_backward, bn.tangent_sums, bn.second_sums)
    merge = (bn.Moments, bn.population, bn.grad_sums)
    deploy = (bn.fold, bn.fold_next, bn.convention, bn.Convention, bn.from_state, bn.to_state)
    for function in compute + explain + calculus + merge + deploy:
        for section in ("Parameters", "Examples"):
            assert f"{section}\n" in function.__doc__, (function, section)


@pytest.mark.every_level
def test_the_environment_chooses_the_level(level):
    program = "import batchnorm as bn; print(bn.show_config(mode='dicts')['kernels']['level'])"
    assert succeeds(program, BATCHNORM_ISA=level) == level


def test_by_default_the_best_level_is_used():
    program = "import batchnorm as bn; print(bn.show_config(mode='dicts')['kernels']['level'])"
    assert succeeds(program, BATCHNORM_ISA=None) == _kernels.available()[0]


@pytest.mark.parametrize("named", ["v5", "avx2", "", "V4"])
def test_an_unknown_level_is_an_error(named):
    run = python("import batchnorm", BATCHNORM_ISA=named)
    assert run.returncode != 0
    last = run.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: the kernel level must be one of ")
    assert last.endswith(f"got {named!r}")


def test_a_level_this_processor_cannot_run_is_an_error(monkeypatch):
    monkeypatch.setattr(runtime, "supported", lambda: ("v2", "baseline"))
    refused = next((name for name in runtime.built() if name not in ("v2", "baseline")), None)
    if refused is None:
        pytest.skip("there is one level here")
    with pytest.raises(ImportError, match=f"this processor cannot run the kernel level '{refused}', only v2"):
        _kernels.use(refused)


def test_a_processor_below_all_levels_is_an_error(monkeypatch):
    monkeypatch.setattr(runtime, "supported", lambda: ())
    monkeypatch.delenv("BATCHNORM_ISA", raising=False)
    with pytest.raises(ImportError, match="this processor runs none of the kernel levels built here"):
        _kernels.chosen_level()


def test_without_avx_the_lowest_level_is_used(monkeypatch):
    monkeypatch.setattr(runtime, "supported", lambda: ("v2", "baseline"))
    monkeypatch.delenv("BATCHNORM_ISA", raising=False)
    assert _kernels.chosen_level() == ("v2" if "v2" in runtime.built() else "baseline")


def test_a_source_checkout_says_what_to_do(tmp_path):
    """The files of the package as they are in a clone: without compiled modules.

    Without `site`, whose import hooks of an editable install would find the compiled modules all the same.
    """
    shutil.copytree(Path(bn.__file__).parent, tmp_path / "batchnorm", ignore=shutil.ignore_patterns("*.so"))
    run = python("import batchnorm", "-S", PYTHONPATH=f"{tmp_path}{os.pathsep}{Path(np.__file__).parents[1]}")
    last = run.stderr.strip().splitlines()[-1]
    assert last == (
        f"ImportError: {tmp_path / 'batchnorm'} has no kernels compiled for this Python; "
        "in a source checkout install batchnorm first, with python -m pip install ."
    )


CONTRIBUTING = Path(__file__).parents[1] / "CONTRIBUTING.md"


@pytest.mark.skipif(not CONTRIBUTING.exists(), reason="the sources are not here")
def test_the_table_of_rooms_names_every_room():
    root = CONTRIBUTING.parent
    table = CONTRIBUTING.read_text().partition("## Rooms")[2].partition("\n## ")[0]
    package = [path for path in (root / "src").rglob("*.*") if path.suffix in SOURCES]
    others = [
        path for folder in ("tests/support", "tests/fuzz", "tools", "bench") for path in (root / folder).glob("*.*")
    ]
    rooms = {path.name for path in package + others if path.suffix in SOURCES} - {"__init__.py"}
    rooms |= {f"{path.parent.name}/" for path in package + others} - {"batchnorm/", "__pycache__/"}
    assert "formula.pxi" in rooms
    assert "mpi/" in rooms
    assert [room for room in sorted(rooms) if f"{room}`" not in table] == []


CITATION = CONTRIBUTING.with_name("CITATION.cff")


@pytest.mark.skipif(not CITATION.exists(), reason="the sources are not here")
def test_the_version_to_cite_is_this_one():
    assert re.search(r"^version: (.+)$", CITATION.read_text(), re.MULTILINE)[1] == bn.__version__


@pytest.mark.parametrize("version", ["1.25.2", "1.26.0rc1"])
def test_an_old_numpy_is_refused(version):
    run = python(f"import numpy; numpy.__version__ = {version!r}; import batchnorm")
    last = run.stderr.strip().splitlines()[-1]
    assert last == f"ImportError: batchnorm needs NumPy 1.26 or newer, found {version}"


def test_show_config(capsys):
    assert bn.show_config() is None
    printed = capsys.readouterr().out
    for word in ("batchnorm: ", "level: ", "decided by: ", "OpenMP", "forks: "):
        assert word in printed
    with pytest.raises(ValueError, match="mode must be 'stdout' or 'dicts', got 'yaml'"):
        bn.show_config(mode="yaml")


def test_nothing_but_numpy_is_imported():
    program = (
        "import sys, numpy; before = set(sys.modules); import batchnorm; "
        "names = {name.partition('.')[0] for name in set(sys.modules) - before} - set(sys.stdlib_module_names); "
        "print(*sorted(name for name in names if 'cython' not in name))"
    )
    assert succeeds(program).split() == ["batchnorm", "numpy"]


def test_modules_for_some_are_attributes_that_are_imported_when_asked_for():
    program = (
        "import sys, batchnorm as bn; names = {'cs231n', 'mpi'}; assert names <= set(dir(bn)); "
        "assert not names & {name.partition('batchnorm.')[2] for name in sys.modules}; "
        "print(bn.cs231n.batchnorm_forward.__name__, bn.mpi.SyncBatchNorm.__name__)"
    )
    assert succeeds(program).split() == ["batchnorm_forward", "SyncBatchNorm"]
    with pytest.raises(AttributeError, match="module 'batchnorm' has no attribute 'numpy'"):
        _ = bn.numpy


def test_every_module_imports():
    for module in pkgutil.walk_packages(bn.__path__, "batchnorm."):
        peer = module.name.partition(".")[2]
        absent = peer in (*ADAPTERS, "torch") and importlib.util.find_spec(peer) is None
        if not absent and not module.name.endswith("__main__") and not re.search(r"float\d\d_", module.name):
            importlib.import_module(module.name)


@pytest.mark.parametrize(("peer", "wanted"), ADAPTERS.items())
def test_an_adapter_names_the_command_for_what_is_missing(tmp_path, peer, wanted):
    (tmp_path / peer).mkdir()
    (tmp_path / peer / "__init__.py").write_text("raise ImportError('it is not here')\n")
    run = python(f"import batchnorm.{peer}", PYTHONPATH=search_path(tmp_path))
    last = run.stderr.strip().splitlines()[-1]
    needs, package = wanted
    install = rf"python -m pip install ({package}|'{package}>=[\d.]+')"
    assert re.fullmatch(rf"ImportError: batchnorm\.{peer} needs {needs}: {install}", last), last


def test_without_torch_its_modules_say_what_to_install():
    program = "import sys; sys.modules['torch'] = None; import batchnorm.torch"
    last = python(program).stderr.strip().splitlines()[-1]
    assert last == (
        "ImportError: batchnorm.torch needs PyTorch, see https://pytorch.org or python -m pip install torch"
    )


def compiled(module):
    """Each function's arguments in their order, with their defaults, and the names of the numbers."""
    public = {name: value for name, value in vars(module).items() if not name.startswith("_")}
    functions = {
        name: [(argument.name, argument.default) for argument in inspect.signature(value).parameters.values()]
        for name, value in public.items()
        if callable(value)
    }
    return functions, {name for name, value in public.items() if type(value) is int}


def declared(nodes):
    """The same of a stub."""
    functions = {}
    for function in nodes:
        if isinstance(function, ast.FunctionDef):
            names = [argument.arg for argument in function.args.args]
            defaults = list(map(ast.literal_eval, function.args.defaults))
            defaults = [inspect.Parameter.empty] * (len(names) - len(defaults)) + defaults
            arguments = zip(names, defaults, strict=True)
            functions[function.name] = [argument for argument in arguments if argument[0] != "self"]
    return functions, {node.target.id for node in nodes if isinstance(node, ast.AnnAssign)}


def stub(name):
    return ast.parse(Path(_kernels.__file__).with_name(name).read_text()).body


@pytest.mark.every_level
@pytest.mark.parametrize("char", _kernels.NAMES)
def test_the_kernels_are_what_their_stub_says(char, level):
    every, float64 = (node.body for node in stub("kernels.pyi") if isinstance(node, ast.ClassDef))
    functions, numbers = compiled(_kernels.of_type[char])
    assert "forward" in functions
    assert (functions, numbers) == declared(every + float64 if char == "d" else every)


@pytest.mark.parametrize(
    ("module", "known"), [(runtime, {"supported", "MEAN"}), (per_channel, {"merge"}), (lookup, {"look_up"})]
)
def test_what_is_compiled_once_is_what_its_stub_says(module, known):
    functions, numbers = compiled(module)
    assert functions.keys() | numbers >= known
    assert (functions, numbers) == declared(stub(f"{module.__name__.rpartition('.')[2]}.pyi"))


def of_every_type():
    """The kernels of the level in use."""
    return [_kernels.of_type[char] for char in _kernels.NAMES]


@pytest.mark.every_level
@pytest.mark.skipif(shutil.which("readelf") is None, reason="needs readelf")
def test_modules_bind_when_they_are_loaded(level):
    """The addresses of calls are read-only afterwards, so a program cannot overwrite them."""
    for module in (runtime, per_channel, lookup, memoryviews, *of_every_type()):
        shown = subprocess.run(["readelf", "-dlW", module.__file__], capture_output=True, text=True, check=True).stdout
        assert "GNU_RELRO" in shown, module
        assert "BIND_NOW" in shown, module


@pytest.mark.every_level
@pytest.mark.skipif(shutil.which("objdump") is None, reason="needs objdump")
def test_no_instruction_that_rounds_otherwise(level):
    """Contracted multiplications and additions, or estimates of roots and quotients, differ between processors."""
    code = "".join(
        subprocess.run(
            ["objdump", "-d", "--no-show-raw-insn", module.__file__], capture_output=True, text=True, check=True
        ).stdout
        for module in (per_channel, *of_every_type())
    )
    assert re.search(r"\bv?mulpd\b", code) or platform.machine() != "x86_64"
    found = set(re.findall(r"\s(v?f[n]?m(?:add|sub)\w*|v?rsqrt\w*|v?rcp\w*)\s", code))
    assert not found
