"""How the gallery runs the programs in examples/: with `--plot`, and with the picture they draw there."""

import ast
import shutil
from pathlib import Path

from sphinx_gallery.scrapers import figure_rst


def _picture(program, gallery):
    """Where a program draws, in a folder that Git does not look at."""
    return Path(gallery["src_dir"], "build", Path(program).name).with_suffix(".png")


def arguments(gallery, variables):
    """Of the command line."""
    picture = _picture(variables["src_file"], gallery)
    picture.parent.mkdir(exist_ok=True)
    picture.unlink(missing_ok=True)
    return ["--plot", str(picture)]


def pictures(block, variables, gallery):
    """What has been drawn since, as reStructuredText."""
    program = Path(variables["src_file"])
    drawn = _picture(program, gallery)
    if not drawn.exists():
        return ""
    path = next(variables["image_path_iterator"])
    shutil.move(drawn, path)
    title = ast.get_docstring(ast.parse(program.read_text())).partition("\n")[0]
    return figure_rst([path], gallery["src_dir"], fig_titles=f"{title}: the picture that {program.name} draws")
