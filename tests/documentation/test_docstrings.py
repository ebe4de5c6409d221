"""What the site makes of docstrings: nothing that they say is lost."""

import pytest

pytest.importorskip("griffe", reason="needs the extra docs")

import griffe

from documentation.snippets import ROOT

griffe_extensions = griffe.load_extensions(f"{ROOT / 'docs/tools/docstrings.py'}:PlainSections")
LINK = "[`kl_loss()`][minitron_kernels.kl_loss]"
TEXT = '''
def f(a, b):
    """Adds, as kl_loss() and weight[0][1].

        kl_loss() = a[0][1]

    Args:
        a: One,
            on two lines.
        b: Two, see kl_loss().

    Returns:
        a + b, float32 (float64 for float64): 0-dim, or
        [...] for "none".

    Raises:
        As g(); another too.
        TypeError, ValueError: an argument; the
            message names it.

    Example:
        >>> f(1, 2)  # doctest: +SKIP
        3

    Source: A paper
    (arXiv 1).
    """
'''


def test_sections():
    with griffe.temporary_visited_module(TEXT, extensions=griffe_extensions) as module:
        value = module["f"].docstring.value
        sections = module["f"].docstring.parse("google", warnings=False)
    assert [section.kind.value for section in sections] == ["text", "parameters", "text"]
    arguments = [(parameter.name, parameter.description) for parameter in sections[1].value]
    assert arguments == [("a", "One,\non two lines."), ("b", f"Two, see {LINK}.")]
    for part in (
        f"Adds, as {LINK} and weight[0]\\[1].\n\n    kl_loss() = a[0][1]\n",
        '**Returns**\n\na + b, float32 (float64 for float64): 0-dim, or\n[...] for "none".\n\n',
        "**Raises**\n\nAs g(); another too.\n\n- `TypeError`, `ValueError`: an argument; the\n",
        "**Example**\n\n```pycon\n>>> f(1, 2)\n3\n```\n\n",
        "*Source:* A paper\n(arXiv 1).",
    ):
        assert part in value, value
