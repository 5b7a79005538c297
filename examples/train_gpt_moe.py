"""Trains GPT-MoEs on text, without and with Excitation, and ends with a table, a picture and a sample of each.

    python -m examples.train_gpt_moe                                  # the documentation that comes with Python
    python -m examples.train_gpt_moe --strategy baseline zero_sum positive_sum --seeds 3
    python -m examples.train_gpt_moe --text DIR --tokenizer gpt2      # WikiText's splits, as GPT-2's 50,257 tokens

`training.routed_loss` and `training.train_step` show all that Excitation requires: loss, gradient, update.
"""

import dataclasses
import functools
import math
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from examples import comparison, texts, training
from models import gpt_moe


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig(training.TrainingConfig):
    """Flags of every program that trains a GPT-MoE."""

    text: tuple[pathlib.Path, ...] = ()
    """Text files, whose last tenth is evaluated; or a folder with files named *train*, *valid*, *test*. By default the
    documentation that comes with Python."""
    tokenizer: texts.Tokenizer = "bytes"
    """How text becomes tokens: single bytes, or GPT-2's byte-pair encoding with 50,257 tokens."""
    context: int = 128
    """Tokens of a sequence."""
    remat: bool = False
    """Recompute layers in the backward pass, which saves memory and takes more time."""
    steps: int = 400
    """Training steps."""
    batch_size: int = 16
    """Sequences of a step."""
    eval_every: int = 100
    """Steps between evaluations; the last step is always evaluated."""
    learning_rate: float = 3e-3
    """The peak learning rate."""

    def __post_init__(self):
        super().__post_init__()
        self.model(1)  # it checks its sizes

    def model(self, vocab_size: int) -> gpt_moe.GPTMoEConfig:
        """The model's config."""
        options = {"context": self.context, "vocab_size": vocab_size, "remat": self.remat}
        return training.model_config(gpt_moe.GPTMoEConfig, self, **options)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(RunConfig, comparison.Config):
    """Train GPT-MoEs without and with Excitation; compare loss and routing.

    With no flags it takes a few minutes on two cores, and downloads nothing.
    """

    output: pathlib.Path = pathlib.Path("out/train_gpt_moe.png")
    prompt: str = "The "
    """How the samples begin."""
    temperature: float = 0.8
    """The temperature of the samples; 0 takes the likeliest token."""
    top_p: float = 0.95
    """Nucleus sampling: the most probable tokens, up to this total probability."""


def loss_fn(graphdef, params, tokens, **weights: float):
    """What is minimized on tokens `[B, S + 1]`, what is logged, and the routing."""
    model = nnx.merge(graphdef, params)
    minimized, logged, utilization, _ = training.routed_loss(model, tokens[:, :-1], tokens[:, 1:], **weights)
    return minimized, (logged, utilization)


@functools.partial(jax.jit, static_argnums=0)
def total_loss(graphdef, params, tokens, where):
    """The sum of the loss, in nats, on tokens `[B, S + 1]` where the mask `[B, S]` says so."""
    model = nnx.merge(graphdef, params)
    model.eval()
    losses = optax.softmax_cross_entropy_with_integer_labels(model(tokens[:, :-1]), tokens[:, 1:])
    return jnp.sum(losses, where=where)


def windows(tokens: np.ndarray, context: int, batch_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Batches `[N, B, S + 1]` of windows, and a mask `[N, B, S]` of their targets: every token but the first, once."""
    number = -(-(len(tokens) - 1) // context)
    rows = -(-number // batch_size) * batch_size
    index = (np.arange(context + 1) + context * np.arange(rows)[:, None]).reshape(-1, batch_size, context + 1)
    padded = np.pad(tokens, (0, index[-1, -1, -1] + 1 - len(tokens)))
    return padded[index], index[..., 1:] < len(tokens)


def measure(graphdef, params, text: texts.Text, context: int, batch_size: int) -> dict[str, float]:
    """What is logged about the held-out text. Every token but the first is predicted once."""
    batches = zip(*windows(text.evaluation, context, batch_size), strict=True)
    loss = sum(float(total_loss(graphdef, params, *batch)) for batch in batches) / (len(text.evaluation) - 1)
    bytes_per_token = len(text.evaluation_bytes) / len(text.evaluation)
    return {
        "evaluation_loss": loss,
        "perplexity": math.exp(min(loss, 700)),
        "bits_per_byte": loss / math.log(2) / bytes_per_token,
    }


def make_task(config: Config, text: texts.Text) -> comparison.Task:
    """What `comparison.compare` has to know."""

    def batch(seed: int, step: int) -> np.ndarray:  # [B, S + 1]
        random = np.random.default_rng((seed, step))
        starts = random.integers(0, len(text.train) - config.context, (config.batch_size, 1))
        return text.train[starts + np.arange(config.context + 1)]

    return comparison.Task(
        data=f"{text.description}: {len(text.train):,} and {len(text.evaluation):,} tokens",
        model=lambda seed: gpt_moe.GPTMoE(config.model(text.vocab_size), rngs=nnx.Rngs(seed)),
        loss_fn=loss_fn,
        batch=batch,
        evaluate=functools.partial(measure, text=text, context=config.context, batch_size=config.batch_size),
        steps=config.steps,
        evaluate_every=config.eval_every,
        batch_items=config.batch_size * config.context,
        items="tokens",
        measures={"evaluation loss, nats": ("evaluation_loss", 1, 3), "bits per byte": ("bits_per_byte", 1, 3)},
    )


def main(config: Config) -> comparison.Runs:
    """Loads the text, trains all strategies, prints the table and samples, and draws the picture."""
    text = texts.load(config.text, config.tokenizer)
    task = make_task(config, text)
    if min(len(text.train), len(text.evaluation)) < config.context + 1:
        raise ValueError(f"{task.data}; each must have more than --context {config.context}.")
    prompt = texts.encode(config.prompt.encode(), config.tokenizer)
    if not 0 < len(prompt) < config.context:
        raise ValueError(f"--prompt must have from 1 to {config.context - 1} tokens (--context); got {len(prompt)}.")
    runs, models = comparison.compare(config, task)
    options: Any = {"key": jax.random.key(config.seed), "temperature": config.temperature, "top_p": config.top_p}
    for strategy, model in models.items():
        sample = gpt_moe.generate(model, jnp.asarray(prompt)[None], config.context - len(prompt), **options)
        print(f"sample of {strategy}: {texts.decode(np.asarray(sample[0]), config.tokenizer)}\n")
    print(f"A code for single bytes takes {texts.unigram_entropy(text.evaluation_bytes):.3f} bits per byte.")
    print("next: python -m examples.train_gpt_moe --seeds 3 --learning-rate 0.01")
    print("      Excitation lengthens steps: compare it with the baseline at its own best learning rate.")
    return runs


if __name__ == "__main__":
    training.run_program(main, Config, "examples.train_gpt_moe")
