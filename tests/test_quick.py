"""--quick runs what it names."""

import conftest


def test_the_quick_tests_exist():
    assert [name for name in conftest.QUICK if not (conftest.ROOT / "tests" / name).is_file()] == []
