"""The GPT-MoE, the language model of the paper's section 4.5: an MoE in place of every feed-forward block.

Axis letters: B batch, S sequence, D model width, V vocabulary, L layers, P positions of a cache.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import nnx

from models import checks, moe, transformer


@dataclasses.dataclass(frozen=True, kw_only=True)
class GPTMoEConfig:
    """Sizes and options of a `GPTMoE`. All 60 models of the paper's Table 2 share the defaults.

    Example:
      >>> from models import gpt_moe, moe
      >>> layer = moe.MoEConfig(d_model=512, d_ff=256, num_experts=4, experts_per_token=2)
      >>> gpt_moe.GPTMoEConfig(moe=layer).num_layers
      12
    """

    moe: moe.MoEConfig  # the MoE of each layer; its d_model and dtype are those of the whole model
    num_layers: int = 12  # L
    num_heads: int = 8
    context: int = 128  # the longest sequence
    vocab_size: int = 50257  # V; the size of GPT-2's vocabulary
    scan_layers: bool = True  # see `models.transformer.Layers`, also for remat and residual
    remat: bool = False
    residual: bool = True

    def __post_init__(self):
        checks.check_sizes(self, "num_layers", "num_heads", "context", "vocab_size")
        transformer.check_config(self)


class GPTMoE(nnx.Module):
    """A causal language model with an MoE in every layer, learned positions, and an untied head without bias.

    It sows `RoutingCounts` at `layers/stack/moe/experts` (see `models.transformer.Layers`) and the routers' losses.

    Attributes:
      expert_axis: the argument of `scale_by_excitation` for this model: layers and experts are the leading axes.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from excitation_optax import flax as excitation_flax
      >>> from models import gpt_moe, moe
      >>> layer = moe.MoEConfig(d_model=16, d_ff=32, num_experts=4, experts_per_token=2)
      >>> config = gpt_moe.GPTMoEConfig(moe=layer, num_layers=3, num_heads=2, vocab_size=11)
      >>> model = gpt_moe.GPTMoE(config, rngs=nnx.Rngs(0))
      >>> logits, utilization = excitation_flax.capture_routing(model)(jnp.ones((2, 5), jnp.int32))
      >>> logits.shape, utilization["layers"]["stack"]["moe"]["experts"].counts.shape
      ((2, 5, 11), (3, 4))

    References:
      Shaier, `Excitation: Momentum For Experts <https://arxiv.org/abs/2602.21798>`_, section 4.5, Table 2.
    """

    expert_axis = None

    def __init__(self, config: GPTMoEConfig, *, rngs: nnx.Rngs):
        self.config = config
        width, dtype = config.moe.d_model, config.moe.dtype
        embed = functools.partial(nnx.Embed, embedding_init=nnx.initializers.normal(0.02), dtype=dtype, rngs=rngs)
        self.tokens = embed(config.vocab_size, width)
        self.positions = embed(config.context, width)
        self.layers = transformer.Layers(
            config.moe,
            num_layers=config.num_layers,
            num_heads=config.num_heads,
            causal=True,
            residual=config.residual,
            scan_layers=config.scan_layers,
            remat=config.remat,
            rngs=rngs,
        )
        self.norm = transformer.LayerNorm(width, rngs=rngs)
        self.head = nnx.Linear(width, config.vocab_size, use_bias=False, dtype=dtype, rngs=rngs)

    def __call__(self, tokens: jax.Array, where: jax.Array | None = None, *, key: jax.Array | None = None) -> jax.Array:
        """Computes the logits of the next token at every position.

        Args:
          tokens: `[B, S]` integers.
          where: `[B, S]` boolean; False marks padding, which is not routed, not counted and not attended to.
          key: a JAX key for the routers' jitter, if there is any.

        Returns:
          `[B, S, V]` float32. A position depends on itself and on earlier ones only, unless a capacity is set: then the
          tokens of a batch compete for places. A token of V or more gives NaN.

        Raises:
          ValueError: if tokens are not integers `[B, S]`, S is more than the context, or `where` does not fit.
        """
        tokens = self._check(tokens)
        if where is not None:
            where = checks.check_array(where, "GPTMoE: where", "booleans", tokens.shape)
            tokens = jnp.where(where, tokens, 0)  # padding may hold anything
        x, _ = self.layers(self._embed(tokens), where, key=key)
        return self.head(self.norm(x)).astype(jnp.float32)

    def decode(self, tokens: jax.Array, cache: transformer.KVCache) -> tuple[jax.Array, transformer.KVCache]:
        """Computes the logits of tokens that follow the positions in a cache.

        Args:
          tokens: `[B, S]` integers.
          cache: from `empty_cache` or the last call. Together with these tokens it may hold at most P positions.

        Returns:
          `[B, S, V]` float32, and the cache with these tokens added. Beyond P positions the logits are NaN.

        Raises:
          ValueError: if tokens are not integers `[B, S]`, or more than P, or the cache is for another B.
        """
        tokens = self._check(tokens)
        _, batch, positions = cache.keys.shape[:3]
        if tokens.shape[0] != batch or tokens.shape[1] > positions:
            raise ValueError(
                f"GPTMoE: the cache is for {batch} sequences of up to {positions} tokens; got {list(tokens.shape)}."
            )
        x, longer = self.layers(self._embed(tokens, cache.length[0]), cache=cache)
        assert longer is not None  # because a cache was given
        logits = self.head(self.norm(x)).astype(jnp.float32)
        return jnp.where(longer.length[0] > positions, jnp.nan, logits), longer

    def empty_cache(self, batch: int, positions: int | None = None) -> transformer.KVCache:
        """Makes a cache for `decode`: keys and values `[L, B, P, H, D / H]` each. P is the context by default.

        Raises:
          ValueError: if P is not from 1 to the context.
        """
        config = self.config
        positions = config.context if positions is None else positions
        if not 1 <= positions <= config.context:
            raise ValueError(f"GPTMoE: a cache may have 1 to context = {config.context} positions; got {positions}.")
        head = config.moe.d_model // config.num_heads
        shape = (config.num_layers, batch, positions, config.num_heads, head)
        keys, values = jnp.zeros(shape, config.moe.dtype), jnp.zeros(shape, config.moe.dtype)
        return transformer.KVCache(keys, values, jnp.zeros(config.num_layers, jnp.int32))

    def _check(self, tokens):
        tokens = checks.check_array(tokens, "GPTMoE: tokens", "integers", ("B", "S"))
        if tokens.shape[1] > self.config.context:
            raise ValueError(
                f"GPTMoE: a sequence may have at most context = {self.config.context} tokens; got {tokens.shape[1]}. "
                "Shorten it, or configure a longer context."
            )
        return tokens

    def _embed(self, tokens, start=0):
        x = self.tokens(tokens)
        positions = start + jnp.arange(tokens.shape[1], dtype=jnp.int32)
        return x + jnp.broadcast_to(self.positions(positions), x.shape)


def generate(
    model: GPTMoE,
    prompt: jax.Array,
    num_tokens: int,
    *,
    key: jax.Array | None = None,
    temperature: float | jax.Array = 1.0,
    top_p: float | jax.Array = 1.0,
) -> jax.Array:
    r"""Continues prompts, one token at a time, with a cache of keys and values.

    The next token is drawn from :math:`\mathrm{softmax}(z / \mathrm{temperature})`, restricted to the fewest tokens
    whose probabilities sum to `top_p` or more (nucleus sampling).

    Args:
      model: the model; it is not changed.
      prompt: `[B, S]` integers, S at least 1.
      num_tokens: how many tokens to add. S and this together are at most the model's context.
      key: a JAX key; temperature 0 requires none.
      temperature: 0 is greedy: the most probable token each time.
      top_p: in (0, 1].

    Returns:
      `[B, S + num_tokens]` int32.

    Raises:
      ValueError: if the tokens do not fit, an argument is out of range, or the key is missing.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from models import gpt_moe, moe
      >>> layer = moe.MoEConfig(d_model=16, d_ff=32, num_experts=4, experts_per_token=2)
      >>> config = gpt_moe.GPTMoEConfig(moe=layer, num_layers=2, num_heads=2, vocab_size=11)
      >>> model = gpt_moe.GPTMoE(config, rngs=nnx.Rngs(0))
      >>> gpt_moe.generate(model, jnp.array([[1, 2, 3]]), num_tokens=4, temperature=0.0).shape
      (1, 7)

    References:
      Holtzman et al., `The Curious Case of Neural Text Degeneration <https://arxiv.org/abs/1904.09751>`_, for top-p.
    """
    prompt = checks.check_array(prompt, "generate: prompt", "integers", ("B", "S"))
    if prompt.shape[1] < 1:
        raise ValueError(f"generate: prompt must hold at least one token; got {list(prompt.shape)}.")
    if not isinstance(prompt, jax.core.Tracer) and not 0 <= prompt.min() <= prompt.max() < model.config.vocab_size:
        raise ValueError(
            f"generate: tokens must be from 0 to {model.config.vocab_size - 1}, the model's vocabulary; "
            f"got {prompt.min()} to {prompt.max()}."
        )
    if num_tokens < 1 or prompt.shape[1] + num_tokens > model.config.context:
        raise ValueError(
            f"generate: num_tokens must be from 1 to {model.config.context - prompt.shape[1]}, the context "
            f"{model.config.context} minus the prompt's {prompt.shape[1]} tokens; got {num_tokens}."
        )
    if not isinstance(temperature, jax.Array) and not temperature >= 0:
        raise ValueError(f"generate: temperature must not be negative; got {temperature}.")
    if not isinstance(top_p, jax.Array) and not 0 < top_p <= 1:
        raise ValueError(f"generate: top_p must be in (0, 1]; got {top_p}.")
    if key is None:
        if isinstance(temperature, jax.Array) or temperature > 0:
            raise ValueError("generate: pass key=jax.random.key(seed) to sample, or temperature=0 for greedy decoding.")
        key = jax.random.key(0)
    model = nnx.merge(*nnx.split(model))  # a copy that shares the arrays
    model.eval()
    graphdef, state = nnx.split(model)
    return _generate(
        graphdef, num_tokens, state, prompt.astype(jnp.int32), key, jnp.float32(temperature), jnp.float32(top_p)
    )


@functools.partial(jax.jit, static_argnums=(0, 1))
def _generate(graphdef, num_tokens, state, prompt, key, temperature, top_p):
    def step(carry, key):
        logits, cache, state = carry  # nnx.scan inside accepts no variable of an outer trace
        token = sample(key, logits[:, -1], temperature, top_p)
        return (*nnx.merge(graphdef, state).decode(token[:, None], cache), state), token

    batch, length = prompt.shape
    model = nnx.merge(graphdef, state)
    logits, cache = model.decode(prompt, model.empty_cache(batch, length + num_tokens))
    _, tokens = jax.lax.scan(step, (logits[:, -1:], cache, state), jax.random.split(key, num_tokens))
    return jnp.concatenate([prompt, tokens.T], axis=1)


def sample(key: jax.Array, logits: jax.Array, temperature: jax.Array | float, top_p: jax.Array | float) -> jax.Array:
    """Draws a token for each row of logits `[B, V]`, as `generate` describes. Returns `[B]` int32.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from models import gpt_moe
      >>> logits = jnp.log(jnp.array([[0.1, 0.6, 0.3]]))
      >>> gpt_moe.sample(jax.random.key(0), logits, temperature=1.0, top_p=0.5)
      Array([1], dtype=int32)
    """
    scaled = logits / jnp.where(temperature > 0, temperature, 1)
    order = jnp.argsort(-scaled, axis=-1)
    probabilities = jax.nn.softmax(jnp.take_along_axis(scaled, order, axis=-1))
    before = jnp.cumsum(probabilities, axis=-1) - probabilities  # the sum of more probable tokens
    kept = jnp.where((before < top_p) | (top_p >= 1), jnp.log(probabilities), -jnp.inf)
    kept = kept.at[:, 0].set(jnp.log(probabilities[:, 0]))  # keep at least one, whatever rounding does
    place = jnp.where(temperature > 0, jax.random.categorical(key, kept), 0)
    return jnp.take_along_axis(order, place[:, None], axis=-1)[:, 0].astype(jnp.int32)
