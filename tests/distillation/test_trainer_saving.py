"""What DistillationTrainer saves and resumes: weights, and what of the loss is trained."""

import pytest

pytest.importorskip("transformers", reason="DistillationTrainer is a transformers.Trainer")


import torch

from distillation.trainer_cases import arguments, mapped, narrow, ragged, trainer


def test_parameters_of_the_loss_are_trained(tmp_path):
    data = ragged()[:4]
    loss = mapped()
    made, keep = trainer(*narrow(), data, loss=loss)
    before = loss.hidden_states.map.weight.detach().clone()
    made.train()
    one = keep.gradients
    assert (loss.hidden_states.map.weight != before).any()
    log = made.state.log_history[0]
    assert log["hidden"] > 0 and log["hidden_weight"] == 0.5
    args = arguments(per_device_train_batch_size=1, gradient_accumulation_steps=4)
    other, keep = trainer(*narrow(), data, loss=mapped(), args=args)
    other.train()
    # one batch of two sequences against four of one
    assert any("map" in name for name in one) and set(one) == set(keep.gradients)
    # what is saved is the model that it was
    plain = set(narrow()[0].state_dict())
    assert set(made.model.state_dict()) == plain
    made.save_model(str(tmp_path))
    from transformers import AutoModelForCausalLM

    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert set(again.state_dict()) == plain
    assert not list(tmp_path.glob("distillation_loss*"))
    made.model.load_state_dict(again.state_dict())


@pytest.mark.parametrize("kind", ["map", "adapters"])
def test_resumed_to_the_bit(tmp_path, kind):
    """Three steps and three more are six: weights, the loss's map and running means, dropout, logs."""
    data = ragged((9, 5, 12, 4, 7, 3, 8, 10) * 2)

    def make(**changes):
        loss = mapped("dynamic", hidden_weight_smoothing=0.5)
        student, teacher = narrow()
        if kind == "adapters":
            peft = pytest.importorskip("peft", reason="adapters are peft's")
            torch.manual_seed(0)
            student = peft.get_peft_model(
                student, peft.LoraConfig(r=4, lora_dropout=0.3, target_modules=["q_proj"])
            )
        options = {
            "gradient_accumulation_steps": 2,
            "max_steps": 6,
            "save_strategy": "steps",
            "save_steps": 3,
        }
        made, _ = trainer(student, teacher, data, loss=loss, args=arguments(output_dir=tmp_path, **options))
        return made

    whole = make()
    whole.train()
    resumed = make()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    for name, value in whole.model.named_parameters():
        assert torch.equal(value, dict(resumed.model.named_parameters())[name]), name
    for name, value in whole.distillation_loss.state_dict().items():
        assert torch.equal(value, resumed.distillation_loss.state_dict()[name]), name
    timed = ("tokens_per_second", "teacher_share", "train_runtime")
    logs = [
        {key: value for key, value in log.items() if key not in timed}
        for made in (whole, resumed)
        for log in made.state.log_history[3:6]
    ]
    assert logs[:3] == logs[3:]


def test_a_checkpoint_without_the_parameters_of_the_loss(tmp_path):
    data = ragged()
    args = arguments(output_dir=tmp_path, max_steps=2, save_strategy="steps", save_steps=1)
    made, _ = trainer(*narrow(), data, args=args)
    made.train()
    other, _ = trainer(*narrow(), data, args=args, loss=mapped())
    with pytest.raises(ValueError, match=r"distillation_loss\.pt is missing, but the loss has .*map\.weight"):
        other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


def test_a_loss_is_saved_into_a_folder_that_is_not_there_yet(tmp_path):
    """As it is where shards of a model are saved, which come later."""
    from minitron_kernels.distillation.trainers.hf_state import load_loss, save_loss

    loss, other = mapped(), mapped()
    torch.nn.init.normal_(loss.hidden_states.map.weight)
    save_loss(loss, str(tmp_path / "checkpoint-1"), 0, True)
    load_loss(other, str(tmp_path / "checkpoint-1"), 0)
    assert torch.equal(loss.hidden_states.map.weight, other.hidden_states.map.weight)


def test_best_model_is_loaded_with_its_loss(tmp_path):
    data = ragged()
    args = arguments(
        output_dir=tmp_path, max_steps=3, learning_rate=3.0, lr_scheduler_type="constant",
        save_strategy="steps", save_steps=1, eval_strategy="steps", eval_steps=1,
        load_best_model_at_end=True, greater_is_better=True,
    )  # fmt: skip
    loss = mapped()
    made, _ = trainer(*narrow(), data, loss=loss, args=args, eval_dataset=data)
    made.train()
    history = [log["eval_loss"] for log in made.state.log_history if "eval_loss" in log]
    assert history[-1] < max(history)  # such a learning rate does no good, and for once that is wanted
    assert made.evaluate()["eval_loss"] == pytest.approx(max(history), rel=1e-5)
    saved = torch.load(f"{made.state.best_model_checkpoint}/distillation_loss.pt")
    assert torch.equal(saved["hidden_states.map.weight"], loss.hidden_states.map.weight)
