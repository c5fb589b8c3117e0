"""The documents say what the tables say."""

from pathlib import Path

from fastrot.mapping.document import architectures_document, support_summary

ROOT = Path(__file__).parent.parent


def test_the_list_of_architectures_is_current():
    """`fastrot architectures > docs/architectures.md` makes it so."""
    written = (ROOT / "docs" / "architectures.md").read_text()
    assert written == architectures_document()


def test_the_readme_lists_the_same():
    assert support_summary() in (ROOT / "README.md").read_text()
