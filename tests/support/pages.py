"""The examples on a page of docs/, one section at a time, because a reader may have the library of that one alone."""

import doctest
from pathlib import Path

DOCS = Path(__file__).parents[2] / "docs"


def run_section(page, heading):
    """How many examples failed, and how many there are."""
    sections = (DOCS / page).read_text(encoding="utf-8").split("\n## ")
    (text,) = (section for section in sections if section.startswith(f"{heading}\n"))
    test = doctest.DocTestParser().get_doctest(text, {}, f"{page}: {heading}", str(DOCS / page), 0)
    return doctest.DocTestRunner().run(test)
