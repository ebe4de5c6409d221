"""A recipe's TOML: what is read, inherited, replaced and refused."""

import pytest

from distillation.recipe.tomls import tables, write
from minitron_kernels.distillation.recipe.config import load, steps_of
from minitron_kernels.distillation.recipe.shipped import FOLDER, find, names


@pytest.fixture
def make(tmp_path):
    def made(*settings, **changes):
        return load(write(tmp_path / "recipe.toml", tables(tmp_path, tmp_path / "out", **changes)), settings)

    return made


def test_keys_of_the_recipe_are_those_of_all_stages(make):
    base = make(score={"seq_len": 8}).base
    assert (base["score"]["seq_len"], base["distill"]["seq_len"], base["evaluate"]["seq_len"]) == (8, 16, 16)
    assert base["distill"]["data"] == base["score"]["data"] == base["recipe"]["data"]
    assert base["evaluate"]["data"] == base["recipe"]["held_out"] != base["recipe"]["data"]
    assert base["distill"]["temperature"] == 1.0 and base["distill"]["kl_weight"] == 1.0
    assert [base[stage]["enabled"] for stage in ("correct", "distill", "evaluate")] == [False, True, True]


def test_a_table_switches_its_stage_on(make):
    found = make(correct={"steps": 2}, compare={"plain": {"correct": {"enabled": False}}})
    assert [variant["correct"]["enabled"] for variant in found.variants] == [True, False]
    assert not make(recipe={"held_out": None}).base["evaluate"]["enabled"]


def test_a_variant_changes_what_it_says_and_replaces_the_target(make):
    depth = {"plan": {"num_hidden_layers": 2}, "distill": {"tokens": "1K"}}
    found = make(compare={"depth": depth, "ce": {"distill": {"kl_weight": 0, "ce_weight": 1}}})
    base, deep, plain = found.variants
    assert deep["plan"]["num_hidden_layers"] == 2 and base["plan"]["hidden_size"] == 32
    assert deep["plan"]["hidden_size"] is None and deep["plan"]["intermediate_size"] is None
    assert deep["plan"]["divisor"] == 16  # no target
    assert (deep["distill"]["steps"], deep["distill"]["tokens"]) == (None, 1000)
    assert steps_of(deep["distill"], 1) == 16 and steps_of(deep["distill"], 4) == 4
    assert (plain["distill"]["kl_weight"], plain["distill"]["lr"]) == (0.0, base["distill"]["lr"])
    assert plain["plan"] == base["plan"]


def test_settings_win(make, tmp_path):
    found = make("distill.steps=9", f"recipe.out={tmp_path}/other", "compare.a.plan.by=random")
    assert found.base["distill"]["steps"] == 9 and found.out == tmp_path / "other"
    assert found.variants[1]["plan"]["by"] == "random"
    with pytest.raises(ValueError, match=r"--set must be TABLE\.KEY=VALUE, got 'steps=9'"):
        make("steps=9")


WRONG = [
    ({"distill": {"stepz": 3}}, r"\[distill\] has an unknown key stepz; did you mean steps\?"),
    ({"score": {"steps": 3}}, r"\[score\] has an unknown key steps; it is one of \[correct\]"),
    ({"destill": {"steps": 3}}, r"has no table for 'destill': .*did you mean distill\?"),
    ({"distill": {"steps": "many"}}, r"\[distill\] steps must be a number such as 500M or 8\.4B, got 'many'"),
    ({"score": {"samples": 1.5}}, r"\[score\] samples must be a whole number, got 1\.5"),
    ({"score": {"samples": True}}, r"\[score\] samples must be a whole number, got True"),
    ({"plan": {"by": "luck"}}, r"\[plan\] by must be one of activations, random, magnitude, got 'luck'"),
    ({"distill": {"enabled": "yes"}}, r"\[distill\] enabled must be true or false, got 'yes'"),
    ({"distill": {"tokens": 5}}, r"\[distill\] needs one of steps, tokens and epochs, got steps and tokens"),
    ({"distill": {"lr_min": 1.0}}, r"\[distill\] lr_min must be below lr 0\.002, got 1"),
    ({"distill": {"warmup": 5}}, r"\[distill\] warmup must be at most the 4 steps of the run, got 5"),
    (
        {"distill": {"warmup": 4, "lr_schedule": "linear"}},
        r"\[distill\] warmup must be less than the 4 steps of the run, got 4",
    ),
    ({"recipe": {"data": None}}, r"\[score\] needs data: give it there, or in \[recipe\]"),
    ({"recipe": {"teacher": None}}, r"\[recipe\] needs teacher"),
    ({"plan": {"hidden_size": None, "intermediate_size": None}}, r"\[plan\] needs what stays: sizes"),
    ({"distill": {"fsdp": True}}, r"\[distill\] fsdp = true shards over processes: \[recipe\] needs more"),
    ({"plan": {"layers_by": "loss"}}, r'layers_by = "loss" needs num_hidden_layers'),
    ({"plan": {"rounds": 2, "drop_layers": [1]}}, r"drop_layers names layers of the teacher"),
    ({"compare": {"a": {"plan": {"bye": "random"}}}}, r"\[compare\.a\] plan has an unknown key bye; did you"),
    ({"compare": {"a": {}}}, r"\[compare\.a\] changes nothing"),
    ({"compare": {"a": {"recipe": {"seed": 1}}}}, r"\[compare\.a\] has no table for 'recipe'"),
    ({"compare": {"a b": {"plan": {"by": "random"}}}}, r"must be named by letters"),
]


@pytest.mark.parametrize(("changes", "message"), WRONG)
def test_what_is_wrong_is_named(make, changes, message):
    with pytest.raises(ValueError, match=message):
        make(**changes)


def test_a_key_outside_of_its_table(tmp_path):
    file = tmp_path / "recipe.toml"
    file.write_text("steps = 3\n")
    with pytest.raises(ValueError, match=r"no table for 'steps'; it is a key, and goes below \[correct\]"):
        load(file)
    file.write_text("[plan\n")
    with pytest.raises(ValueError, match=r"recipe\.toml: is not TOML"):
        load(file)


# parameters of the teacher and of the published model
PUBLISHED = {
    "mistral-nemo-8b": (12_247_782_400, 8_414_105_600, 768 * 8192, "380B"),
    "llama-3.1-4b-width": (8_030_261_248, 4_512_746_496, 1152 * 8192, "94B"),
    "llama-3.1-4b-depth": (8_030_261_248, 4_540_469_248, 1152 * 8192, "94B"),
    "nemotron-4-8b": (15_628_775_424, 8_271_699_968, 1152 * 4096, "94B"),
    "nemotron-4-4b": (15_628_775_424, 4_190_509_056, 1152 * 4096, "94B"),
}


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_published_settings(name, tmp_path, monkeypatch, capsys):
    from distillation.recipe.tomls import run

    monkeypatch.chdir(tmp_path)
    teacher, student, step, tokens = PUBLISHED[name]
    found = load(find(name))
    assert found.base["distill"]["tokens"] == float(tokens[:-1]) * 1e9
    assert run("run", name, "--dry-run") == 0
    said = capsys.readouterr().out
    assert f"teacher     {teacher:,} parameters" in said and f"student     {student:,} parameters" in said
    assert f"steps of {step:,} tokens" in said and "not run here" in said
    assert "its shard" in said and "sharded" in said and "not planned" not in said
    assert "at the rate of [estimate]" in said
    assert "all of student and teacher (DDP)" in said and said.count("sharded: ") == 1
    assert not list(tmp_path.iterdir())
    text = (FOLDER / f"{name}.toml").read_text()
    assert "NOT RUN HERE" in text
    table = ""
    for line in text.splitlines():
        table = line.split()[0] if line.startswith("[") else table
        if (
            " = " in line
            and not line.startswith("#")
            and table in ("[correct]", "[score]", "[plan]", "[distill]")
        ):
            assert "  # " in line or "drop_layers" in line, f"where is this from: {line}"


def test_the_layers_that_minitron_dropped():
    """Layers 16 to 31 of 1 to 32."""
    assert load(find("llama-3.1-4b-depth")).base["plan"]["drop_layers"] == list(range(15, 31))


def test_every_published_setting_is_known():
    assert set(names()) == set(PUBLISHED)
    with pytest.raises(FileNotFoundError, match=r"did you mean nemotron-4-8b\?"):
        find("nemotron-8b")
