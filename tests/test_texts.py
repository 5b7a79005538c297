"""Texts: what is trained on and what is evaluated, and that tokens are those of GPT-2, without a download."""

import pydoc_data.topics
import socket

import numpy as np
import pytest

from examples import texts


def load(paths, tokenizer="bytes"):
    """The training and the evaluation text, decoded, and the rest."""
    text = texts.load(paths, tokenizer)
    return texts.decode(text.train, tokenizer), texts.decode(text.evaluation, tokenizer), text


# Which part is for what.


def test_the_text_by_default_is_pythons_reference():
    train, evaluation, text = load([])
    whole = "\n\n".join(pydoc_data.topics.topics.values())
    assert whole.endswith(evaluation)
    assert len(text.evaluation) == len(whole.encode()) - len(whole.encode()) * 9 // 10
    # The topics quote each other: no longer line of the evaluated part is trained on, and little else is left out.
    assert not {line for line in evaluation.splitlines() if len(line) > 20} & set(train.splitlines())
    assert 0.95 < len(train) / (len(whole) - len(evaluation)) < 1
    assert text.evaluation_bytes.decode() == evaluation
    assert text.vocab_size == 256
    assert "Python's language reference" in text.description


def test_the_last_tenth_of_every_file_is_evaluated(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"0123456789")
    (tmp_path / "b.txt").write_bytes(b"abcdefghijklmnopqrstuvwxy")  # 25: a tenth is 2.5, rounded up
    train, evaluation, text = load([tmp_path / "a.txt", tmp_path / "b.txt"])
    assert (train, evaluation) == ("012345678\n\nabcdefghijklmnopqrstuv", "9\n\nwxy")
    assert text.evaluation_bytes == b"9\n\nwxy"
    assert text.description == f"{tmp_path / 'a.txt'}, {tmp_path / 'b.txt'}; the last tenth is evaluated"


@pytest.mark.parametrize("tokenizer", ["bytes", "gpt2"])
def test_a_file_is_not_cut_inside_of_a_character(tmp_path, tokenizer):
    (tmp_path / "a.txt").write_text("é" * 11, encoding="utf-8")  # 22 bytes, nine tenths are 19
    train, evaluation, _ = load([tmp_path / "a.txt"], tokenizer)
    assert train + evaluation == "é" * 11


def folder(tmp_path, *names):
    """A corpus whose files hold their own names."""
    for name in names:
        (tmp_path / name).write_text(name)
    return [tmp_path]


def test_a_folder_with_three_splits(tmp_path):
    paths = folder(tmp_path, "wiki.train.tokens", "wiki.valid.tokens", "wiki.test.tokens", "README")
    (tmp_path / "train").mkdir()  # no file
    train, evaluation, text = load(paths)
    assert (train, evaluation) == ("wiki.train.tokens", "wiki.valid.tokens")
    assert text.evaluation_bytes == b"wiki.valid.tokens"
    assert text.description == f"wiki.train.tokens for training, wiki.valid.tokens for evaluation, of {tmp_path}"


def test_a_folder_without_a_training_split(tmp_path):
    train, evaluation, text = load(folder(tmp_path, "wikitext-valid.txt", "wikitext-test.txt", "other.txt"))
    assert (train, evaluation) == ("wikitext-valid.txt", "wikitext-test.txt")
    assert text.description == f"wikitext-valid.txt for training, wikitext-test.txt for evaluation, of {tmp_path}"


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ((), r"should hold one file named like \*valid\*; of that name there are none\. For other"),
        (("a.txt", "b.txt"), r"should hold one file named like \*valid\*; of that name there are none\. For other"),
        (
            ("train.txt", "test.txt"),
            r"should hold one file named like \*valid\*; of that name there are none\. For other",
        ),
        (("valid.txt",), r"should hold one file named like \*test\*; of that name there are none\. For other"),
        (("test.txt",), r"should hold one file named like \*valid\*; of that name there are none\. For other"),
        (
            ("train-1.txt", "train-0.txt", "valid.txt"),
            r"named like \*train\*; of that name there are \['train-0.txt', 'train-1.txt'\]",
        ),
        (
            ("train.txt", "valid.en", "valid.de"),
            r"named like \*valid\*; of that name there are \['valid.de', 'valid.en'\]",
        ),
    ],
)
def test_a_folder_without_the_splits(tmp_path, names, message):
    with pytest.raises(FileNotFoundError, match=message) as error:
        load(folder(tmp_path, *names))
    assert str(error.value).startswith(str(tmp_path))
    assert str(error.value).endswith("For other texts, name the files.")


def test_a_missing_file_is_named(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(FileNotFoundError, match=r"No such file or directory: .*nowhere\.txt"):
        load([tmp_path / "nowhere.txt"])
    with pytest.raises(FileNotFoundError, match=r"No such file or directory: .*nowhere\.txt"):
        load([tmp_path / "a.txt", tmp_path / "nowhere.txt"])
    with pytest.raises(IsADirectoryError):
        load([tmp_path / "a.txt", tmp_path])


# Bytes.


def test_bytes_are_tokens():
    tokens = texts.encode("aé\n".encode(), "bytes")
    assert tokens.dtype == np.int32
    np.testing.assert_array_equal(tokens, [97, 0xC3, 0xA9, 10])
    text = "naïve 日本 🙂\x00\n"
    assert texts.decode(texts.encode(text.encode(), "bytes"), "bytes") == text
    assert texts.encode(b"", "bytes").shape == (0,)


def test_what_is_no_utf8_is_replaced():
    # A byte that never occurs, and the first half of a character at the end.
    assert texts.decode(np.array([104, 0xFF, 105, 0xC3]), "bytes") == "h\ufffdi\ufffd"
    assert texts.decode(np.arange(128), "bytes") == "".join(map(chr, range(128)))


# GPT-2's encoding.


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("hello world", [31373, 995]),
        ("Hello, world!", [15496, 11, 995, 0]),
        ("The quick brown fox", [464, 2068, 7586, 21831]),
        ("\n", [198]),
        (" the", [262]),
        ("<|endoftext|>", [27, 91, 437, 1659, 5239, 91, 29]),  # in a text it is text
        ("", []),
    ],
)
def test_tokens_of_gpt2(text, tokens):
    encoded = texts.encode(text.encode(), "gpt2")
    assert encoded.dtype == np.int32
    np.testing.assert_array_equal(encoded, tokens)
    assert texts.decode(encoded, "gpt2") == text


def test_vocabulary_of_gpt2():
    assert texts.gpt2().n_vocab == texts.VOCAB_SIZE["gpt2"] == 50257
    assert texts.decode(np.array([50256]), "gpt2") == "<|endoftext|>"
    tokens = np.arange(256)  # every single byte, in GPT-2's order
    assert sorted(texts.gpt2().decode_bytes(tokens.tolist())) == list(range(256))


def test_gpt2_gives_back_any_text(tmp_path):
    text = "naïve 日本 🙂\x00\n\n  two  spaces\tit's 1234567 = = Title = = <unk> @-@\r\n"
    assert texts.decode(texts.encode(text.encode(), "gpt2"), "gpt2") == text
    (tmp_path / "a.txt").write_text("hello world " * 10)  # 120 bytes, cut at 108
    train, evaluation, loaded = load([tmp_path / "a.txt"], "gpt2")
    assert (train, evaluation) == ("hello world " * 9, "hello world ")
    np.testing.assert_array_equal(loaded.evaluation, [31373, 995, 220])
    assert (loaded.vocab_size, loaded.evaluation_bytes) == (50257, b"hello world ")


def test_gpt2_needs_no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a connection")

    monkeypatch.setattr(socket, "socket", refuse)
    texts.gpt2.cache_clear()
    np.testing.assert_array_equal(texts.encode(b"hello world", "gpt2"), [31373, 995])


# Entropy.


@pytest.mark.parametrize(
    ("text", "bits"),
    [
        (b"aaaa", 0.0),
        (b"aabb", 1.0),
        (b"aaaabbcd", 1.75),  # 1/2 * 1 + 1/4 * 2 + 2 * 1/8 * 3
        (bytes(range(256)), 8.0),
    ],
)
def test_entropy_by_hand(text, bits):
    assert texts.unigram_entropy(text) == pytest.approx(bits, abs=1e-12)
    assert texts.unigram_entropy(text[::-1]) == pytest.approx(bits, abs=1e-12)
