"""The types that users see: short signatures, overloads that leave nothing out. Checkers read typed_calls.py."""

import ast
import importlib.util
import inspect
import pydoc
import re
import typing
from pathlib import Path

import numpy as np
import pytest

import batchnorm as bn
from batchnorm.mpi import SyncBatchNorm

OVERLOADED = [
    bn.forward,
    bn.backward,
    bn.inference,
    bn.inference_backward,
    bn.double_backward,
    bn.fold,
    bn.fold_next,
    bn.BatchNorm.__call__,
    bn.BatchNorm.backward,
    bn.BatchNorm.jvp,
    bn.BatchNorm.double_backward,
    SyncBatchNorm.__call__,
]

PEERS = "sklearn", "autograd", "jax", "torch"
"""The packages that adapters need, by whose names these go."""

pytestmark = pytest.mark.once  # signatures do not depend on it


def fields():
    """The names in each class of _keywords.pyi."""
    found = {}
    for node in ast.parse(Path(bn.__file__).with_name("_keywords.pyi").read_text()).body:
        if isinstance(node, ast.ClassDef):
            inherited = set().union(*(found.get(base.id, set()) for base in node.bases))
            found[node.name] = inherited | {field.target.id for field in node.body if isinstance(field, ast.AnnAssign)}
    return found


@pytest.mark.parametrize("function", OVERLOADED, ids=lambda function: function.__qualname__)
def test_overloads_take_together_what_the_function_takes(function):
    """A checker sees only overloads: what they leave out, users could not pass."""
    overloads = [inspect.signature(overload).parameters for overload in typing.get_overloads(function)]
    assert len(overloads) > 1
    taken = []
    for parameters in overloads:
        names = set(parameters)
        how = parameters["how"].annotation if "how" in names else None
        if how is not None:
            names = names - {"how"} | fields()[how.removeprefix("Unpack[_keywords.").removesuffix("]")]
        taken.append(names)
    wanted = set(inspect.signature(function).parameters)
    assert set().union(*taken) == wanted
    assert all(wanted - names <= {"need"} for names in taken)


def public(*modules):
    """Their functions and classes, and the methods of the classes, with what reads and writes properties."""
    kinds = inspect.isclass, inspect.isfunction, inspect.ismethod
    for value in named(modules):
        if any(kind(value) for kind in kinds) and value.__module__.startswith("batchnorm"):
            yield value


def named(modules):
    """Whatever has a public name in them, and in their classes."""
    for module in modules:
        names = getattr(module, "__all__", dir(module))
        for value in (getattr(module, name) for name in names if name[0] != "_"):
            yield value
            members = inspect.getmembers(value) if inspect.isclass(value) else ()
            for member in (member for name, member in members if not re.match("_[^_]", name)):
                yield from (member.fget, member.fset) if isinstance(member, property) else (member,)


def test_help_begins_with_names_and_not_with_what_they_stand_for():
    for value in public(bn):
        signature = inspect.signature(value)
        assert len(str(signature)) < 700, value
        assert "numpy._typing" not in str(signature), value
    text = "".join(pydoc.render_doc(bn.forward, renderer=pydoc.plaintext).split())  # Python 3.13 breaks the line
    first = text.partition(")->")[0].partition("batchnorm.functional")[2]
    assert first.startswith("forward(x:")
    assert len(first) < 500


def test_annotations_can_be_evaluated():
    """As programs do that check or convert arguments by them."""
    adapters = [importlib.import_module(f"batchnorm.{peer}") for peer in PEERS if importlib.util.find_spec(peer)]
    hints = {value: typing.get_type_hints(value) for value in public(bn, bn.cs231n, bn.mpi, *adapters)}
    assert hints[bn.BatchNorm.backward]["need"] == bn.functional.Need
    assert hints[bn.BatchNorm.jvp]["return"] is bn.Tangents
    assert hints[bn.Plan.drift]["return"] is bn.Drift
    assert hints[bn.Saved.mean.fget]["return"] == np.typing.NDArray[np.float64]
    assert hints[SyncBatchNorm.__init__]["comm"]
    for adapter in adapters:
        assert any(value.__module__.startswith(adapter.__name__) for value in hints)


def test_what_is_generic_can_be_written_down_and_is_the_same_class():
    assert typing.get_origin(bn.Saved[np.float32]) is bn.Saved
    assert typing.get_origin(bn.Gradients[bn.functional.Array]) is bn.Gradients
    saved = bn.forward(np.ones((2, 1), np.float32))[1]
    assert type(saved) is bn.Saved
    assert not hasattr(saved, "__dict__")
    assert type(bn.backward(np.ones((2, 1), np.float32), saved)) is bn.Gradients
