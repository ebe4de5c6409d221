"""Every family that the library knows: table, scores, plan, cuts, and a load by a fresh process."""

import subprocess
import sys
from pathlib import Path

import pytest
from transformers import CONFIG_MAPPING

from minitron_kernels.pruning.families.refused import REFUSALS
from minitron_kernels.pruning.families.registry import family_of
from pruning import family_checks as checks
from pruning.family_configs import CASES
from pruning.threads import one_thread  # noqa: F401  (autouse: of every test here)
from pruning.tiny_models import random_model
from pruning.usage_checks import check_usage
from tools import family_page


@pytest.fixture(scope="module")
def fresh():
    process = checks.FreshProcess()
    yield process
    process.close()


@pytest.mark.parametrize("name", CASES)
def test_family(name, fresh, tmp_path):
    case = CASES[name]
    model = random_model(case.make_config(), auto=case.auto)
    checks.check_table(case, model)
    check_usage(model, case.is_of_text)
    tables = checks.check_scores(case, model)
    plan = checks.check_plan(case, model, tables)
    checks.check_cut(case, model, plan, tmp_path, fresh)
    checks.check_masked(case, model, plan)


def test_every_known_family_is_tested():
    code = "from minitron_kernels.pruning import known_families; print(*known_families())"
    known = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert set(known.split()) == set(CASES)


def test_every_type_of_transformers_works_or_is_refused_with_a_reason():
    refused = [name for refusal in REFUSALS for name in refusal.types]
    assert len(refused) == len(set(refused)) and not set(refused) & set(CASES)
    for name in family_page.causal_types():
        if name not in CASES:
            with pytest.raises(ValueError, match=f"'{name}' is not supported: it has "):
                family_of({"model_type": name})


def test_the_page_is_up_to_date():
    page = (Path(__file__).parents[2] / "docs" / "families.md").read_text(encoding="utf-8")
    if f"transformers {family_page.version()} has" not in page:
        pytest.skip("the page is about another version of transformers")
    assert [case.model_type for case in CASES.values() if case.model_type not in CONFIG_MAPPING] == []
    assert family_page.written(page) == page, (
        "run python -m tools.family_page --write ../docs/families.md in tests/"
    )
