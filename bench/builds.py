"""Several builds of batchnorm in one process.

- Each is imported under the same name, `batchnorm`, from its own directory, and then taken out of `sys.modules`. The
  batchnorm installed here is taken out before it, and put back after it.
- Only `batchnorm.profile`, which measures, always comes from the batchnorm installed here, so that builds differ in
  nothing else. A build need not have it.
- What a build imports later would come from another one. So it is used with every dtype before it is taken out.
"""

import importlib
import sys
from importlib.machinery import PathFinder
from pathlib import Path

from batchnorm.profile import measure

PROFILE = str(Path(measure.__file__).parents[1])
"""The directory of the package that has `profile`."""


class Build:
    """Finds the build in a directory, wherever and however the batchnorm here is installed."""

    def __init__(self, directory):
        self.directory = directory

    def find_spec(self, name, path=None, _target=None):
        if name.partition(".")[0] != "batchnorm":
            return None
        places = {"batchnorm": [self.directory], "batchnorm.profile": [PROFILE]}
        spec = PathFinder.find_spec(name, places.get(name, path))
        if spec is None:
            raise ModuleNotFoundError(f"{name} is not in {self.directory}", name=name)
        return spec


def take_out():
    """Take the modules of a build out of `sys.modules`."""
    return {name: sys.modules.pop(name) for name in list(sys.modules) if name.partition(".")[0] == "batchnorm"}


def measure_of(directory, dtypes):
    """The module that measures, as a part of the build in this directory, or of the installed one if that is None."""
    if directory is None:
        return measure
    installed, build = take_out(), Build(directory)
    sys.meta_path.insert(0, build)
    try:
        found = importlib.import_module(measure.__name__)
        for dtype in dtypes:
            found.batchnorm_calls(found.activations((2, 2), 1, dtype), 1)
    finally:
        sys.meta_path.remove(build)
        take_out()
        sys.modules.update(installed)
    return found


def description(of_build):
    """What a build says of itself."""
    config, package = of_build.show_config(mode="dicts"), Path(of_build.functional.__file__).parent
    return f"{config['versions']['batchnorm']}, {config['kernels']['level']} kernels, {package}"
