"""Trains a GPT-MoE on text, with or without Excitation, and prints a sample.

    python -m examples.train_gpt_moe                                  # bytes of Python's language reference
    python -m examples.train_gpt_moe --strategy positive_sum          # the same, excited
    python -m examples.train_gpt_moe --text DIR --tokenizer gpt2      # WikiText's splits, as GPT-2's 50,257 tokens

`loss_fn` and `train_step` are all there is to it: loss, gradient, update.
"""

import dataclasses
import functools
import math
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from flax import nnx

from examples import texts, training
from excitation_optax import flax as excitation_flax
from models import gpt_moe, moe


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig(training.TrainingConfig):
    """What every program that trains a GPT-MoE is told."""

    text: tuple[pathlib.Path, ...] = ()
    """Text files, of which the last tenth is evaluated; or a folder with files named *train*, *valid*, *test*."""
    tokenizer: texts.Tokenizer = "bytes"
    """gpt2 is byte-pair encoding with 50,257 tokens."""
    num_experts: int = 16
    experts_per_token: int = 2
    d_ff: int = 128
    """The hidden width of an expert."""
    d_model: int = 128
    num_layers: int = 4
    num_heads: int = 4
    context: int = 128
    """Tokens of a sequence."""
    remat: bool = False
    """Compute layers again in the backward pass: less memory, more time."""
    steps: int = 500
    batch_size: int = 16
    eval_every: int = 250
    """Steps between evaluations; there is one at the end in any case."""
    learning_rate: float = 3e-3
    """At its peak."""

    def __post_init__(self):
        """Errors before anything is loaded or trained; the model's own config checks its sizes."""
        super().__post_init__()
        training.check_positive(self, "steps", "batch_size", "eval_every")
        if self.context < 2:
            raise ValueError(f"--context must be at least 2, for a prompt and what follows; got {self.context}.")
        self.model(1)

    def model(self, vocab_size: int) -> gpt_moe.GPTMoEConfig:
        """That of the model."""
        layer = moe.MoEConfig(
            d_model=self.d_model,
            d_ff=self.d_ff,
            num_experts=self.num_experts,
            experts_per_token=self.experts_per_token,
            dtype=jnp.dtype(self.dtype),
        )
        return gpt_moe.GPTMoEConfig(
            moe=layer,
            num_layers=self.num_layers,
            num_heads=self.num_heads,
            context=self.context,
            vocab_size=vocab_size,
            remat=self.remat,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(RunConfig):
    """Train a GPT-MoE on the documentation that comes with Python, or on texts of yours."""

    prompt: str = "The "
    """What the sample begins with."""
    temperature: float = 0.8
    """Of the sample."""
    top_p: float = 0.95
    """Of the sample."""

    def __post_init__(self):
        """Errors before anything is loaded or trained."""
        super().__post_init__()
        if not self.prompt:
            raise ValueError("--prompt must not be empty.")
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"--temperature must not be negative; got {self.temperature}.")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"--top-p is in (0, 1]; got {self.top_p}.")


def loss_fn(config, graphdef, params, tokens):
    """What is minimized on tokens `[B, S + 1]`; and the loss in nats, the routing, and the routers' losses."""
    model = nnx.merge(graphdef, params)
    logits, utilization, sown = excitation_flax.capture_routing(model, moe.AuxiliaryLoss)(tokens[:, :-1])
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()
    losses = moe.auxiliary_losses(sown)
    return training.add_auxiliary(config, loss, losses), (loss, utilization, losses)


def train_step(config, graphdef, tx, params, opt_state, step, tokens):
    """One step on tokens `[B, S + 1]`: loss, gradient, update. Returns what is to be logged too."""
    gradient = jax.grad(functools.partial(loss_fn, config, graphdef), has_aux=True)
    grads, (loss, utilization, losses) = gradient(params, tokens)
    updates, opt_state = tx.update(grads, opt_state, params, utilization=utilization)
    params = optax.apply_updates(params, updates)
    return params, opt_state, {"loss": loss} | training.routing_metrics(config, utilization, losses, step)


def make_total_loss(graphdef):
    """A compiled function of parameters, tokens `[B, S + 1]` and a mask `[B, S]`: the loss in nats, summed over it."""

    @jax.jit
    def total_loss(params, tokens, where):
        model = nnx.merge(graphdef, params)
        model.eval()
        losses = optax.softmax_cross_entropy_with_integer_labels(model(tokens[:, :-1]), tokens[:, 1:])
        return jnp.sum(losses, where=where)

    return total_loss


def evaluate(total_loss, params, tokens, context: int, batch_size: int) -> float:
    """The mean loss in nats per token: every token but the first is predicted once, in windows that do not overlap."""
    windows = -(-(len(tokens) - 1) // context)
    rows = -(-windows // batch_size) * batch_size
    index = np.arange(context + 1) + context * np.arange(rows)[:, None]  # [rows, S + 1]
    padded = np.pad(tokens, (0, index[-1, -1] + 1 - len(tokens)))
    total = 0.0
    for start in range(0, rows, batch_size):
        batch = index[start : start + batch_size]
        total += float(total_loss(params, padded[batch], batch[:, 1:] < len(tokens)))
    return total / (len(tokens) - 1)


def evaluation_metrics(loss: float, text: texts.Text) -> dict[str, float]:
    """Of the mean loss in nats per token of a text: what is logged."""
    bytes_per_token = len(text.evaluation_bytes) / len(text.evaluation)
    return {
        "evaluation_loss": loss,
        "perplexity": math.exp(min(loss, 700)),
        "bits_per_byte": loss / math.log(2) / bytes_per_token,
    }


def main(config: Config) -> float:
    """Loads the text, trains, writes the log, prints a sample, and returns the loss in nats per token."""
    text = texts.load(config.text, config.tokenizer)
    if min(len(text.train), len(text.evaluation)) < config.context + 1:
        raise ValueError(
            f"{text.description}: {len(text.train):,} and {len(text.evaluation):,} tokens; each must have more than "
            f"--context {config.context}."
        )
    model_config = config.model(text.vocab_size)
    prompt = texts.encode(config.prompt.encode(), config.tokenizer)
    if len(prompt) >= config.context:
        raise ValueError(f"--prompt has {len(prompt)} tokens, and must be shorter than --context {config.context}.")
    graphdef, params = nnx.split(gpt_moe.GPTMoE(model_config, rngs=nnx.Rngs(config.seed)))
    print(
        f"{text.description}: {len(text.train):,} and {len(text.evaluation):,} tokens; "
        f"{sum(leaf.size for leaf in jax.tree.leaves(params)):,} parameters"
    )
    tx = training.make_optimizer(config, config.steps, gpt_moe.GPTMoE.expert_axis)
    opt_state = tx.init(params)
    step = jax.jit(functools.partial(train_step, config, graphdef, tx), donate_argnums=(0, 1))

    total_loss = make_total_loss(graphdef)
    log = training.Log(config, "train_gpt_moe", config.steps)
    rng = np.random.default_rng(config.seed)
    evaluation = {}
    for number in range(1, config.steps + 1):
        starts = rng.integers(0, len(text.train) - config.context, config.batch_size)
        tokens = text.train[starts[:, None] + np.arange(config.context + 1)]
        params, opt_state, logged = step(params, opt_state, number - 1, tokens)
        log.advance()
        if number % config.log_every == 0:
            logged = jax.device_get(logged)  # wait for it
            logged["tokens_per_second"] = log.rate(number * config.batch_size * config.context)
            log.write(number, logged, f"loss {logged['loss']:.3f}")
        if number % config.eval_every == 0 or number == config.steps:
            loss = evaluate(total_loss, params, text.evaluation, config.context, config.batch_size)
            evaluation = evaluation_metrics(loss, text)
            log.write(number, evaluation, f"evaluation loss {loss:.3f}")
            log.skip(number * config.batch_size * config.context)
    log.close()
    entropy = texts.unigram_entropy(text.evaluation_bytes)
    bits = evaluation["bits_per_byte"]
    print(
        f"{config.strategy}: perplexity {evaluation['perplexity']:.3f} per token, {bits:.3f} bits per byte, "
        f"{entropy - bits:.3f} under the entropy of the text's single bytes, {entropy:.3f}; log: {log.path}"
    )
    model = nnx.merge(graphdef, params)
    sample = gpt_moe.generate(
        model,
        jnp.asarray(prompt)[None],
        config.context - len(prompt),
        key=jax.random.key(config.seed),
        temperature=config.temperature,
        top_p=config.top_p,
    )
    print(f"sample: {texts.decode(np.asarray(sample[0]), config.tokenizer)}")
    return evaluation["evaluation_loss"]


if __name__ == "__main__":
    try:
        main(tyro.cli(Config, description=Config.__doc__))
    except (OSError, ValueError) as error:
        sys.exit(f"train_gpt_moe: {error}")
