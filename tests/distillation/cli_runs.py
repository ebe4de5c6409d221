"""Tiny checkpoints, text and calls of minitron-distill."""

from minitron_kernels.distillation.cli.main import main
from pruning.tiny_models import tiny_model

WORDS = [f"w{number}" for number in range(90)]
TEXT = " ".join(WORDS[number * number % 89] for number in range(399))
HELD_OUT = " ".join(WORDS[number * 7 % 89] for number in range(63))
STUDENT = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}


def save_tokenizer(folder, words=WORDS):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {word: number for number, word in enumerate(["<pad>", "<s>", "</s>", "<unk>", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    ).save_pretrained(folder)


def save_models(folder):
    """A student, a teacher, and text: 25 windows of 16 tokens, and 4 held-out ones."""
    tiny_model("llama", seed=0, **STUDENT).save_pretrained(folder / "student")
    tiny_model("llama", seed=1).save_pretrained(folder / "teacher")
    for name in ("student", "teacher"):
        save_tokenizer(folder / name)
    (folder / "text.txt").write_text(TEXT)
    (folder / "held.jsonl").write_text(f'{{"text": "{HELD_OUT}"}}\n')


def run(*arguments):
    return main([str(argument) for argument in arguments])


def train_of(folder, out, *options, teacher="--teacher"):
    """The arguments of a run of train on save_models()."""
    source = [teacher, folder / ("teacher" if teacher == "--teacher" else "cache")]
    data = ["--data", folder / "text.txt", "--seq-len", 16, "--batch-size", 2, "--accumulation", 2]
    how = ["--lr", "2e-3", "--lr-min", "2e-4", "--warmup", 1, "--log-every", 1, "--quiet"]
    return ["train", "--student", folder / "student", *source, *data, *how, "-o", out, *options]


def cache_of(folder, out, *options):
    """The arguments of a run of cache on save_models()."""
    data = ["--data", folder / "text.txt", "--seq-len", 16, "--batch-size", 4, "--quiet"]
    return ["cache", "--teacher", folder / "teacher", *data, "-o", out, *options]


def one_line(capsys, *arguments, code=1):
    """The one line on standard error of a command that fails, without what begins it."""
    capsys.readouterr()
    try:
        got = run(*arguments)
    except SystemExit as stop:
        got = stop.code
    out, err = capsys.readouterr()
    assert got == code and out == "" and err.count("\n") == 1, (got, out, err)
    assert err.startswith("minitron-distill: error: "), err
    return err.removeprefix("minitron-distill: error: ")
