"""Cases of DistillationTrainer on two ranks: DDP and FSDP2 against plain PyTorch in one process."""

import functools

from distillation.trainer_cases import arguments, assert_same_gradients, big_batch, models, ragged, trainer

DECODER_LAYERS = {"llama": "LlamaDecoderLayer", "gemma2": "Gemma2DecoderLayer", "qwen3": "Qwen3DecoderLayer"}


def groups(count, batch):
    """Sequences of each rank: batches are dealt out in turn."""
    batches = [range(start, min(start + batch, count)) for start in range(0, count, batch)]
    return [[index for b in batches[rank::2] for index in b] for rank in range(2)]


def fsdp2(family="llama"):
    """Options of TrainingArguments for FSDP2."""
    fsdp_on_cpu()
    return {
        "fsdp": True,
        "fsdp_config": {"version": 2, "transformer_layer_cls_to_wrap": [DECODER_LAYERS[family]]},
    }


@functools.cache
def fsdp_on_cpu():
    """Lets accelerate take its FSDP2 path on a CPU too, where it would leave the plugin aside, silently."""
    from accelerate.state import AcceleratorState
    from accelerate.utils import DistributedType

    original = AcceleratorState.__init__

    def init(self, *args, fsdp_plugin=None, **kwargs):
        original(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None:
            self.distributed_type = DistributedType.FSDP
            if self._mixed_precision != "no":
                fsdp_plugin.set_mixed_precision(self._mixed_precision)
            self.fsdp_plugin = fsdp_plugin

    AcceleratorState.__init__ = init


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
    "fsdp_tied": functools.partial(gradient, changes={"tie_word_embeddings": True}, options=fsdp2),
}
