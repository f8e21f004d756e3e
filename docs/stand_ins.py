"""What stands in for PyTorch, JAX and MPI while `batchnorm.torch` and its like are imported for their docstrings.

Sphinx's stand-ins are objects. Here every name is a class: a union, a subclass made by `type` and an item that is set
are then what they are with the library.
"""

from sphinx.ext.autodoc.mock import _MockModule


class StandIn(type):
    """The type of classes that have any attribute and any item, and give such a class when they are called."""

    def __getattr__(cls, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return StandIn(name, (), {})

    def __call__(cls, *_, **__):
        return StandIn(cls.__name__, (), {})

    def __getitem__(cls, _):
        return cls

    def __setitem__(cls, *_):
        pass

    def __iter__(cls):
        return iter(())


def setup(app):
    _MockModule.__getattr__ = lambda module, name: StandIn(name, (), {"__module__": module.__name__})
