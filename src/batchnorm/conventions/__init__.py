"""Twelve systems' conventions of batch normalization, and a layer's way from one to another.

    state ─── arrays ─── names ─── systems

- `systems`: the table. What eps and momentum mean, which variance is kept, what arrays are called.
- `names`: where the arrays of a layer are among the names of a network.
- `arrays`: the arrays of one layer, checked.
- `state`: `from_state` makes a layer of arrays, `to_state` arrays of a layer.

No system is imported: everything is arrays and names. `batchnorm.convert` is the command for whole files.
"""

from .state import from_state, to_state
from .systems import CONVENTIONS, Convention, convention

__all__ = ["CONVENTIONS", "Convention", "convention", "from_state", "to_state"]
