"""Cases of DistillationTrainer on two ranks: DDP and FSDP2 against plain PyTorch in one process."""

import functools

import torch

from distillation.trainer_cases import (
    Gradients,
    arguments,
    assert_no_worse,
    assert_same_gradients,
    big_batch,
    collate,
    doubled,
    grads,
    in_float64,
    mapped,
    models,
    narrow,
    plain_means,
    ragged,
    trainer,
    whole,
)

DECODER_LAYERS = {"llama": "LlamaDecoderLayer", "gemma2": "Gemma2DecoderLayer", "qwen3": "Qwen3DecoderLayer"}


def groups(count, batch):
    """Sequences of each rank: batches are dealt out in turn."""
    batches = [range(start, min(start + batch, count)) for start in range(0, count, batch)]
    return [[index for b in batches[rank::2] for index in b] for rank in range(2)]


def fsdp2(family="llama"):
    """Options of TrainingArguments for FSDP2."""
    return {
        "fsdp": True,
        "fsdp_config": {"version": 2, "transformer_layer_cls_to_wrap": [DECODER_LAYERS[family]]},
    }


def gradient(
    folder, *, batch=2, steps=2, family="llama", together=True, masked=(), changes=None, options=None
):
    """One step's gradient is that of one big batch; without `together`, the ranks' mean."""
    data = ragged(masked=masked)[: batch * steps * 2]
    student, teacher = models(family, **(changes or {}))
    own = groups(len(data), batch)
    expected, loss = big_batch(student, teacher, data, 0.5, None if together else own)
    student, teacher = models(family, **(changes or {}))
    args = arguments(
        output_dir=str(folder),
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=steps,
        average_tokens_across_devices=together,
        **(options() if options else {}),
    )
    made, keep = trainer(student, teacher, data, args=args)
    made.train()
    assert_same_gradients(keep.gradients, expected)
    sharded = all(hasattr(p, "full_tensor") for p in made.model.parameters())
    assert sharded == bool(args.fsdp)
    assert abs(made.state.log_history[0]["loss"] - float(loss)) < 1e-5 * float(loss)


def fsdp2_with_sharded_checkpoints():
    options = fsdp2()
    options["fsdp_config"]["state_dict_type"] = "SHARDED_STATE_DICT"
    return options


def ddp_with_checkpointing():
    """Without a search for unused parameters."""
    return {"activation_checkpointing": True}


def bf16(options=None):
    return {"bf16": True, **(options() if options else {})}


def rounded(folder, *, options=None):
    """Under bf16 errors are at most twice those of plain PyTorch's autocast in one process."""
    data = ragged()
    truth = big_batch(*models(), data, 0.5)[0].truth
    with torch.autocast("cpu", torch.bfloat16):
        plain, _ = big_batch(*models(), data, 0.5)
    args = arguments(output_dir=str(folder), gradient_accumulation_steps=2, **bf16(options))
    made, keep = trainer(*models(), data, args=args)
    made.train()
    assert_no_worse(keep.gradients, plain, truth)


def unrounded(folder):
    """Under bf16 the loss and its parts are in fp32, and so are sums of gradients."""
    args = arguments(output_dir=str(folder), **bf16(fsdp2))
    made, _ = trainer(*models(), ragged(), args=args)
    made.train()
    record = made.compute_loss(made.model, made._prepare_inputs(collate(ragged())), return_outputs=True)[1]
    parts = {name: x for name, x in record._asdict().items() if x is not None and x.is_floating_point()}
    assert {"loss", "kl", "ce", "entropy"} <= parts.keys()
    assert all(x.dtype == torch.float32 for x in parts.values()), {k: x.dtype for k, x in parts.items()}
    assert made.accelerator.state.fsdp_plugin.mixed_precision_policy.reduce_dtype == torch.float32


def adapters(folder, *, options=None):
    """LoRA on a layer and on the head."""
    peft = __import__("peft")
    data = ragged()

    def adapted():
        student, teacher = models()
        torch.manual_seed(0)
        config = peft.LoraConfig(r=4, target_modules=["q_proj", "lm_head"], init_lora_weights=False)
        return peft.get_peft_model(student, config), teacher

    expected, _ = big_batch(*adapted(), data, 0.5)
    args = arguments(output_dir=str(folder), gradient_accumulation_steps=2, **(options() if options else {}))
    made, keep = trainer(*adapted(), data, args=args)
    made.train()
    assert_same_gradients(keep.gradients, expected)


def evaluation(folder, *, count=7, options=None, packed=False):
    """Metrics over an odd number of sequences; a sampler repeats some to make the ranks' batches alike."""
    from transformers import DataCollatorWithFlattening

    data = ragged((9, 5, 12, 4, 7, 3, 8)[:count])
    if packed:
        data = [{"input_ids": row["input_ids"], "labels": row["input_ids"].clone()} for row in data]
    expected = plain_means(*models(), data, 0.5)
    rows = [{name: x.tolist() for name, x in row.items()} for row in data] if packed else data
    collator = {"data_collator": DataCollatorWithFlattening()} if packed else {}
    args = arguments(output_dir=str(folder), learning_rate=0.0, **(options() if options else {}))
    made, _ = trainer(*models(), rows, args=args, eval_dataset=rows, **collator)
    if options:  # accelerate prepares a model for FSDP2 together with its optimizer only
        made.train()
    metrics = made.evaluate()
    for name, value in expected.items():
        assert abs(metrics[f"eval_{name}"] - value) <= 1e-5 * value, (name, metrics, expected)


def logs(folder):
    """Means over tokens of both ranks, two steps and two micro-batches."""
    data = ragged()
    expected = plain_means(*models(), data, 0.5)
    args = arguments(
        output_dir=str(folder), per_device_train_batch_size=1, gradient_accumulation_steps=2, max_steps=2,
        logging_steps=2, learning_rate=0.0,
    )  # fmt: skip
    made, _ = trainer(*models(), data, args=args)
    made.train()
    log = made.state.log_history[0]
    for name in ("kl", "ce"):
        assert abs(log[name] - expected[name]) < 1e-5 * expected[name], (name, log, expected)
    assert log["tokens_per_second"] > 0 and 0 < log["teacher_share"] < 1


def map_gradient(folder, *, options=None):
    """The map's gradient, and the student's beside it, are those of one big batch, by autograd alone."""
    from minitron_kernels.distillation import ModelTeacher, attach, step

    data = ragged()

    def plain(student, teacher, loss):
        with in_float64(student):
            record = step(attach(student.train()), ModelTeacher(teacher), collate(data), loss)
        record.loss.backward()
        return grads(student) | {"distillation_map.weight": loss.hidden_states.map.weight.grad}

    expected = Gradients(plain(*narrow(), mapped()), plain(*map(doubled, narrow()), mapped().double()))
    loss = mapped()
    args = arguments(output_dir=str(folder), gradient_accumulation_steps=2, **(options() if options else {}))
    made, keep = trainer(*narrow(), data, args=args, loss=loss)
    made.train()
    assert "distillation_map.weight" in keep.gradients
    assert_same_gradients(keep.gradients, expected)
    weight = whole(loss.hidden_states.map.weight)
    others = [torch.empty_like(weight) for _ in range(2)]
    torch.distributed.all_gather(others, weight)
    assert torch.equal(*others)


def resumed(folder, *, options=None, whole_file=True, weight="dynamic"):
    """Two steps and two more are four, the map and the running means of each rank included."""
    data = ragged((9, 5, 12, 4, 7, 3, 8, 10) * 2)

    def make():
        args = arguments(
            output_dir=str(folder), max_steps=4, save_strategy="steps", save_steps=2,
            **(options() if options else {}),
        )  # fmt: skip
        loss = mapped(weight, **({"hidden_weight_smoothing": 0.5} if weight == "dynamic" else {}))
        return trainer(*narrow(), data, args=args, loss=loss)[0]

    first = make()
    first.train()
    second = make()
    second.train(resume_from_checkpoint=f"{folder}/checkpoint-2")
    found = []
    for made in (first, second):
        state = dict(made.model.named_parameters()) | made.distillation_loss.state_dict()
        found.append({name: whole(x) for name, x in state.items()})  # together, before anything is refused
    different = [name for name, x in found[0].items() if not torch.equal(x, found[1][name])]
    assert not different, different
    if not whole_file:
        return
    from safetensors.torch import load_file

    saved = set(load_file(f"{folder}/checkpoint-2/model.safetensors"))
    assert saved == set(narrow()[0].state_dict())


CASES = {
    "ddp_2x2": gradient,
    "ddp_2x1": functools.partial(gradient, batch=2, steps=1),
    "ddp_1x4": functools.partial(gradient, batch=1, steps=4),
    "ddp_4x1": functools.partial(gradient, batch=4, steps=1),
    "ddp_apart": functools.partial(gradient, together=False),
    "ddp_masked": functools.partial(gradient, masked=(0, 1, 4, 5)),
    "ddp_masked_apart": functools.partial(gradient, masked=(0, 1, 4, 5), together=False),
    "fsdp_2x2": functools.partial(gradient, options=fsdp2),
    "fsdp_1x4": functools.partial(gradient, batch=1, steps=4, options=fsdp2),
    "fsdp_apart": functools.partial(gradient, together=False, options=fsdp2),
    "fsdp_masked": functools.partial(gradient, masked=(0, 1, 4, 5), options=fsdp2),
    "ddp_checkpointing": functools.partial(gradient, options=ddp_with_checkpointing),
    "ddp_gemma2": functools.partial(gradient, family="gemma2"),
    "ddp_tied": functools.partial(gradient, changes={"tie_word_embeddings": True}),
    "ddp_bf16": rounded,
    "ddp_adapters": adapters,
    "ddp_map": map_gradient,
    "ddp_resumed": resumed,
    "evaluation": evaluation,
    "evaluation_of_five": functools.partial(evaluation, count=5),
    "evaluation_of_one": functools.partial(evaluation, count=1),
    "evaluation_packed": functools.partial(evaluation, packed=True),
    "logs": logs,
    "fsdp_bf16": functools.partial(rounded, options=fsdp2),
    "fsdp_bf16_unrounded": unrounded,
    "fsdp_adapters": functools.partial(adapters, options=fsdp2),
    "fsdp_map": functools.partial(map_gradient, options=fsdp2),
    "fsdp_resumed": functools.partial(resumed, options=fsdp2),
    "fsdp_resumed_shards": functools.partial(
        resumed, options=fsdp2_with_sharded_checkpoints, whole_file=False, weight=0.5
    ),
    "fsdp_evaluation": functools.partial(evaluation, options=fsdp2),
    "fsdp_gemma2": functools.partial(gradient, family="gemma2", options=functools.partial(fsdp2, "gemma2")),
    "fsdp_tied": functools.partial(gradient, changes={"tie_word_embeddings": True}, options=fsdp2),
}
