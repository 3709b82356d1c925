"""The documents are reStructuredText that can be shown: a table that is none hides what it says."""

import io
from pathlib import Path

import pytest
from docutils.core import publish_doctree

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.rst", *sorted((ROOT / "docs").glob("*.rst"))]


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_a_document_has_no_fault_of_markup(path: Path) -> None:
    said = io.StringIO()
    settings = {"warning_stream": said, "report_level": 2, "halt_level": 5}
    publish_doctree(path.read_text("utf-8"), source_path=path.name, settings_overrides=settings)
    assert said.getvalue() == ""
