"""The types that users see: short signatures, overloads that leave nothing out. Checkers read typed_calls.py."""

import ast
import inspect
import pydoc
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


def public():
    """All functions and classes, and the methods of the classes."""
    for name in bn.__all__:
        value = getattr(bn, name)
        if inspect.isfunction(value) or inspect.isclass(value):
            yield value
        if inspect.isclass(value):
            yield from (method for key, method in inspect.getmembers(value, inspect.isroutine) if key[0] != "_")


def test_help_begins_with_names_and_not_with_what_they_stand_for():
    for value in public():
        try:
            signature = inspect.signature(value)
        except ValueError:  # of methods that C has
            continue
        assert len(str(signature)) < 700, value
        assert "numpy._typing" not in str(signature), value
    first = pydoc.render_doc(bn.forward, renderer=pydoc.plaintext).splitlines()[2]
    assert first.startswith("forward(x: ")
    assert len(first) < 500


def test_annotations_can_be_evaluated():
    for function in (bn.forward, bn.backward, bn.inference, bn.inference_backward, bn.jvp, bn.double_backward, bn.fold):
        assert typing.get_type_hints(function)
    assert typing.get_type_hints(bn.BatchNorm.backward)["need"] == bn.functional.Need


def test_what_is_generic_can_be_written_down_and_is_the_same_class():
    assert typing.get_origin(bn.Saved[np.float32]) is bn.Saved
    assert typing.get_origin(bn.Gradients[bn.functional.Array]) is bn.Gradients
    saved = bn.forward(np.ones((2, 1), np.float32))[1]
    assert type(saved) is bn.Saved
    assert not hasattr(saved, "__dict__")
    assert type(bn.backward(np.ones((2, 1), np.float32), saved)) is bn.Gradients
