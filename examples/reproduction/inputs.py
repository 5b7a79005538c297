"""The data of runs: images, and texts as bytes or as GPT-2's tokens."""

import pathlib
from typing import Any

from examples import datasets, texts
from examples.reproduction import configs

# Of each kind of run, the texts: the files of each in its folder. Of two files, the second one is measured; of one, the
# last tenth. The reference comes with Python.
TEXTS: dict[str, dict[str, tuple[str, ...]]] = {
    "gpt": {
        "wikitext-103": ("wiki.train.tokens", "wiki.test.tokens"),
        "wikitext-valid": ("wikitext-valid.txt", "wikitext-test.txt"),  # WikiText's two small splits
    },
    "mini_gpt": {"tinyshakespeare": ("tinyshakespeare.txt",), "python-reference": ()},
}


def load(run: configs.Run, folder: pathlib.Path | None) -> Any:
    """Reads the data of a run; digits come with scikit-learn. GPT-2's tokens of WikiText-103 take minutes.

    Raises FileNotFoundError if the folder lacks a file.
    """
    if run.kind not in TEXTS:
        return datasets.load_digits() if run.dataset == "digits" else datasets.load_images(run.dataset, folder)
    names, folder = TEXTS[run.kind][run.dataset], folder or pathlib.Path()
    if missing := [name for name in names if not (folder / name).is_file()]:
        read, lacks = " and ".join(names), " and ".join(missing)
        raise FileNotFoundError(f"{run.dataset} is read from {read}; {folder} lacks {lacks}. Name it with --data-dir.")
    if run.kind == "mini_gpt":
        return texts.load([folder / name for name in names], "bytes")
    train, evaluation = ((folder / name).read_bytes() for name in names)
    tokens = texts.encode(train, "gpt2"), texts.encode(evaluation, "gpt2")
    return texts.Text(*tokens, evaluation, texts.VOCAB_SIZE["gpt2"], run.dataset)


def about(run: configs.Run, data: Any) -> dict[str, str]:
    """What a result says about its data."""
    if run.kind in TEXTS:
        state = f"{run.dataset}, as bytes" if run.kind == "mini_gpt" else run.dataset
    else:
        state = f"{run.dataset} ({data.state or 'as TensorFlow Datasets has it'})"
    return {"data": state, "fingerprint": data.fingerprint}
