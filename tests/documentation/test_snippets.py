"""The Python in README and in all pages runs, and the commands in them are ones that the parsers know."""

import re

import pytest
import torch.distributed as dist

from documentation.given import GIVEN, NUMBERS, PARSED
from documentation.snippets import blocks, calls, commands, numbers_in, pages, run
from minitron_kernels.distillation.cli import arguments as distill
from minitron_kernels.distillation.recipe import main as recipe
from minitron_kernels.evaluation import cli as evaluation
from minitron_kernels.pruning.cli import arguments as prune
from minitron_kernels.pruning.families import registry

PAGES = pages()
WITH_PYTHON = [page for page, text in PAGES.items() if "\n```python\n" in text and page not in PARSED]


@pytest.fixture
def alone():
    """A process group of this process, for pages that show several."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("page", WITH_PYTHON)
def test_python_of_a_page_runs(page, tmp_path, monkeypatch, alone):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(registry, "_FAMILIES", dict(registry._FAMILIES))  # a page adds one
    given = GIVEN.get(page)
    left = run(page, PAGES[page], (lambda: given(tmp_path)) if given else dict, NUMBERS.get(page))
    if page == "docs/quickstart.md":
        assert left["losses"][-1] < left["losses"][0]
        printed = next(
            "\n".join(block.lines) for block in blocks(PAGES[page]) if "Plan for" in block.lines[0]
        )
        assert left["plan"].summary().startswith(printed), left["plan"].summary()


def test_what_is_given_is_given_to_a_page():
    assert set(NUMBERS) <= set(GIVEN) <= set(WITH_PYTHON)
    # a number that stands nowhere in the page replaces nothing
    for page, numbers in NUMBERS.items():
        assert set(numbers) <= numbers_in(PAGES[page]), page


def test_what_is_not_run_is_python():
    for page in set(PARSED) & set(PAGES):
        numbers_in(PAGES[page])  # SyntaxError, if not


def test_almost_everything_is_run():
    python = [block for page in WITH_PYTHON for block in blocks(PAGES[page]) if block.language == "python"]
    assert len(python) > 20 and sum(block.not_run is not None for block in python) <= len(python) // 10


@pytest.fixture
def parsers():
    """{command: its parser}"""
    return {
        "minitron-prune": prune.parser_of(dict.fromkeys(("score", "plan", "search", "prune", "info"))),
        "minitron-recipe": recipe.parser(),
        "minitron-distill": distill.parser_of(dict.fromkeys(("train", "cache", "info"))),
        "minitron-evaluate": evaluation.parser_of(),
    }


@pytest.mark.parametrize("page", [page for page, text in PAGES.items() if any(commands(text))])
def test_commands_are_known(page, parsers):
    for name, *arguments in commands(PAGES[page]):
        parsers[name].parse_args(arguments)  # SystemExit, if not


def test_commands_that_help_shows_are_known(parsers):
    shown = {}
    for name, parser in parsers.items():
        subs = [action.choices for action in parser._actions if hasattr(action.choices, "values")]
        texts = [one.epilog for one in (parser, *(sub for choices in subs for sub in choices.values()))]
        shown[name] = [call for text in texts if text for call in calls(text)]
    for name, *arguments in (call for found in shown.values() for call in found):
        parsers[name].parse_args(arguments)  # SystemExit, if not
    assert min(map(len, shown.values())) >= 4, shown


def test_a_page_that_fails_is_seen():
    text = "# Page\n\n```python\nx = 4096\n```\n\n```python\n\nassert x == 2, 'not two'\n```\n"
    assert run("page", text, numbers={4096: 2})["x"] == 2
    with pytest.raises(AssertionError, match="not two") as caught:
        run("page", text)
    assert caught.traceback[-1].lineno == 8 and str(caught.traceback[-1].path).endswith("page")
    skipped = text.replace("```python\n\n", "<!-- not run: shows a fault -->\n```python\n\n")
    assert run("page", skipped)["x"] == 4096
    assert list(commands("```\n$ minitron-prune plan a \\\n  b > d  # c\nminitron-prune: x\n```")) == [
        ["minitron-prune", "plan", "a", "b"]
    ]


def test_readme_counts_the_families():
    """It promises no more than docs/families.md, which a script writes, and not much less."""
    (works,) = re.findall(r"(\d+) work, \d+ of them approximately", PAGES["docs/families.md"])
    said = re.findall(r"(\d+) model\s+types", PAGES["README.md"])
    assert len(said) == 2 and all(int(works) - 10 < int(number) <= int(works) for number in said)
