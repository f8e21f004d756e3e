"""The examples on a page of docs/, one section at a time, because only that section's library may be installed."""

import doctest
from pathlib import Path

DOCS = Path(__file__).parents[2] / "docs"


def run_section(page, heading):
    """The number of failed examples, and of all examples."""
    sections = (DOCS / page).read_text(encoding="utf-8").split("\n## ")
    (text,) = (section for section in sections if section.startswith(f"{heading}\n"))
    test = doctest.DocTestParser().get_doctest(text, {}, f"{page}: {heading}", str(DOCS / page), 0)
    return doctest.DocTestRunner().run(test)
