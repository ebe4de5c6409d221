"""CITATION.cff against the rules of its format, version 1.2.0, and against the package."""

import re

import pytest

import minitron_kernels
from documentation.snippets import ROOT

yaml = pytest.importorskip("yaml")
FILE = ROOT / "CITATION.cff"
KEYS = {
    *("abstract", "authors", "cff-version", "commit", "contact", "date-released", "doi", "identifiers"),
    *("keywords", "license", "license-url", "message", "preferred-citation", "references", "repository"),
    *("repository-artifact", "repository-code", "title", "type", "url", "version"),
}
PERSON = {"family-names", "given-names", "name-particle", "name-suffix", "alias", "affiliation", "orcid"}


def check_authors(authors):
    assert authors
    for author in authors:
        assert "name" in author or set(author) <= PERSON, author
        assert all(isinstance(value, str) and value for value in author.values()), author


def test_it_follows_the_format():
    cff = yaml.safe_load(FILE.read_text(encoding="utf-8"))
    assert set(cff) <= KEYS and {"authors", "cff-version", "message", "title"} <= set(cff)
    assert cff["cff-version"] == "1.2.0" and cff["type"] == "software" and cff["license"] == "Apache-2.0"
    check_authors(cff["authors"])
    for reference in cff["references"]:
        assert {"authors", "title", "type"} <= set(reference) and reference["type"] == "article"
        check_authors(reference["authors"])
        assert isinstance(reference["year"], int)
        assert re.fullmatch(r"https://arxiv\.org/abs/\d{4}\.\d{5}", reference["url"])
    assert len(set(cff["keywords"])) == len(cff["keywords"])


def test_it_is_of_this_version():
    assert str(yaml.safe_load(FILE.read_text(encoding="utf-8"))["version"]) == minitron_kernels.__version__
