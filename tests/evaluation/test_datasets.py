"""Data sets in a folder, and what is not to be passed over, by the real lm-evaluation-harness."""

import os
import shutil

import pytest

from evaluation import letters, nine, tiny
from minitron_kernels.evaluation import OtherResultsError, check_tasks, evaluate
from minitron_kernels.evaluation.cli import main

pytestmark = tiny.needs_lm_eval


def test_what_can_be_run(place, tmp_path, capsys):
    for name in ("allenai", "code_eval", "cais"):
        shutil.copytree(place[1] / name, tmp_path / name)
    found = {one.name: one for one in check_tasks(["winogrande", "arc_challenge", "mbpp"], datasets=tmp_path)}
    assert (found["winogrande"].documents, found["winogrande"].reason) == (5, None)
    assert found["arc_challenge"].reason is None
    assert found["mbpp"].documents is None and "google-research-datasets/mbpp" in found["mbpp"].reason
    command = (
        "hf download google-research-datasets/mbpp --repo-type dataset "
        f"--local-dir {tmp_path}/google-research-datasets/mbpp"
    )
    assert found["mbpp"].commands == (command,)
    assert (
        main(["--check", "--datasets", str(tmp_path), "--tasks", "winogrande", "humaneval", "xlsum_en"]) == 1
    )
    shown = capsys.readouterr().out
    assert "winogrande         5          5  not the benchmark's 1,267: not comparable" in shown
    assert "hf download csebuetnlp/xlsum --repo-type dataset --revision refs/convert/parquet" in shown
    (tmp_path / "allenai/ai2_arc/README.md").unlink()  # and never all configurations at once
    (found,) = check_tasks(["arc_challenge"], datasets=tmp_path)
    assert found.documents is None and "'ARC-Challenge' not found" in found.reason
    assert "README.md that the data set has on the hub" in found.reason
    with pytest.raises(ValueError, match=r"mbpp, gsm8k cannot be loaded \(check_tasks\(\) says"):
        evaluate(place[0], ["winogrande", "mbpp", "gsm8k"], datasets=tmp_path, run_code=True)


def test_other_data_is_another_result(place, tmp_path):
    """Files of one path and time, as archives unpack them."""
    model, datasets = place
    for folder in ("here", "later"):
        shutil.copytree(datasets / "truthfulqa", tmp_path / folder / "truthfulqa")
    rows = nine.truthfulqa()
    for row in rows:
        row["mc2_targets"]["labels"].reverse()
    later = tmp_path / "later/truthfulqa/truthful_qa"
    readme = (later / "README.md").read_text()
    nine.write(later, {"multiple_choice": {"validation": rows}})
    (later / "README.md").write_text(readme)
    for path in tmp_path.rglob("*"):
        os.utime(path, (10**9, 10**9))
    output = tmp_path / "out.json"
    how = dict(datasets=tmp_path / "here", output=output)
    first = evaluate(model, ["truthfulqa"], **how).tasks["truthfulqa"]["value"]
    assert evaluate(model, ["truthfulqa"], **how).tasks["truthfulqa"]["value"] == first
    shutil.rmtree(tmp_path / "here")
    (tmp_path / "later").rename(tmp_path / "here")
    with pytest.raises(
        OtherResultsError, match=r"holds truthfulqa with other files in truthfulqa/truthful_qa"
    ):
        evaluate(model, ["truthfulqa"], **how)
    other = evaluate(model, ["truthfulqa"], **how, overwrite=True).tasks["truthfulqa"]["value"]
    assert other != pytest.approx(first)


def test_prompts_that_are_too_long_are_said(place, tmp_path):
    letters.save(tmp_path / "short", positions=300)
    with pytest.warns(UserWarning, match="exceeds model's maximum length"):
        result = evaluate(tmp_path / "short", ["winogrande"], datasets=place[1])
    assert "prompts were cut off at the left to fit: winogrande" in result.table()
    with pytest.warns(UserWarning, match="Left truncation applied"):
        result = evaluate(tmp_path / "short", ["xlsum_en"], datasets=place[1], batch_size=2)
    assert "prompts were cut off at the left to fit: xlsum_en" in result.table()


def test_a_tokenizer_is_left_as_it_was(place, tmp_path):
    words = letters.tokenizer(pad=False)
    how = dict(tokenizer=words, datasets=place[1], output=tmp_path / "out.json")
    evaluate(place[0], ["truthfulqa"], **how)
    assert words.pad_token is None
    evaluate(place[0], ["truthfulqa"], **how)  # the same again, and no other tokenizer


def test_files_that_would_be_passed_over(place, tmp_path):
    tiny.save_tasks(tmp_path)
    (tmp_path / "more.yaml").write_text(tiny.CHOICE.format(name="choice", data="choice"))
    with pytest.raises(ValueError, match=r"more.yaml: describes choice, as .*choice.yaml does already"):
        evaluate(place[0], tasks_path=tmp_path)
    (tmp_path / "more.yaml").write_text("task: [\n")
    with pytest.raises(ValueError, match=r"more.yaml: cannot be read"):
        evaluate(place[0], tasks_path=tmp_path)
