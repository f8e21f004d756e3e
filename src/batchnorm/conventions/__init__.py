"""The batch normalization conventions of twelve systems, and the conversion of a layer between them.

    state ─── arrays ─── names ─── systems

- `systems`: the table of what eps and momentum mean, which variance is kept, and what arrays are called.
- `names`: find the arrays of a layer among the names of a network.
- `arrays`: the arrays of one layer, checked.
- `state`: `from_state` turns arrays into a layer, `to_state` turns a layer into arrays.

No system is imported: everything is arrays and names. `batchnorm.convert` is the command for whole files.
"""

from .state import from_state, to_state
from .systems import CONVENTIONS, Convention, convention

__all__ = ["CONVENTIONS", "Convention", "convention", "from_state", "to_state"]
