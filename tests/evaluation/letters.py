"""Models whose tokens are bytes: a tiny Llama, and one that answers as a table says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.modeling_outputs import CausalLMOutputWithPast

BOS, EOS, PAD = 256, 257, 258


def tokenizer(pad: bool = True) -> Any:
    """One token a byte, behind a token at the beginning of each text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: number for number, token in enumerate([*letters, "<s>", "</s>", "<pad>"])}
    found = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    found.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    found.decoder = decoders.ByteLevel()
    found.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    more = {"pad_token": "<pad>"} if pad else {}
    return PreTrainedTokenizerFast(tokenizer_object=found, bos_token="<s>", eos_token="</s>", **more)


def config(positions: int = 8192) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=259,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=positions,
        bos_token_id=BOS,
        eos_token_id=EOS,
        pad_token_id=PAD,
        initializer_range=0.5,  # so that answers differ
    )


def save(folder: Path, positions: int = 8192, dtype: torch.dtype = torch.float32) -> None:
    """The tiny Llama and its tokenizer."""
    torch.manual_seed(0)
    LlamaForCausalLM(config(positions)).to(dtype).save_pretrained(folder)
    tokenizer().save_pretrained(folder)


class Parrot(LlamaForCausalLM):
    """Writes what a table says, by the last of its prompts in a text; one of several with equal odds."""

    def __init__(self, answers: dict[str, list[str]], positions: int = 8192) -> None:
        super().__init__(config(positions))
        self.answers, self.words = answers, tokenizer()

    def prepare_inputs_for_generation(self, input_ids: Any, **kwargs: Any) -> dict[str, Any]:
        return {"input_ids": input_ids}

    def forward(self, input_ids: Any = None, attention_mask: Any = None, **_: Any) -> CausalLMOutputWithPast:
        logits = torch.zeros(*input_ids.shape, 259)
        for row, ids in enumerate(input_ids.tolist()):
            for token in self._next(self.words.decode(ids, skip_special_tokens=True)):
                logits[row, -1, token] = 50.0
        return CausalLMOutputWithPast(logits=logits)

    def _next(self, text: str) -> list[int]:
        place, prompt = max((text.rfind(prompt), prompt) for prompt in self.answers)
        assert place >= 0, text
        begun = text[place + len(prompt) :]
        going_on = [answer for answer in self.answers[prompt] if answer.startswith(begun)]
        letters = {self.words(answer[len(begun)]).input_ids[1] for answer in going_on if answer != begun}
        return sorted(letters) or [EOS]
