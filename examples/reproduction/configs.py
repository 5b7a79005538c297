"""A run is a frozen config of everything that its numbers depend on. Its key is a hash of the config.

Tables, figures and studies show runs. Two of them that ask for the same config share the run.
"""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterable
from typing import Any, ClassVar, Literal

from examples import training

DIGITS = ("svhn_cropped", "digits")  # data sets whose images must not be mirrored

Strategy = Literal["vanilla", "zero_sum", "positive_sum", "exp_diff", "global_exp", "random_boost", "inverted"]
Component = Literal["both", "direction", "norm"]  # see `excitation_optax.scale_by_excitation`


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """What runs of every kind have. The baseline's strategy is called "vanilla" in the results."""

    kind: ClassVar[str]
    # Fields that came after the first results. At their defaults the JSON leaves them out, so that keys stay the same.
    added: ClassVar[tuple[str, ...]] = ()

    dataset: str = "cifar10"
    strategy: Strategy = "vanilla"
    gamma: float = 1.0
    epochs: int = 30
    seed: int = 0
    subset: int | None = None  # train on the first so many examples only

    def __post_init__(self):
        for field in dataclasses.fields(self):
            if field.type is float:  # 1 and 1.0 are equal, but not the same JSON
                object.__setattr__(self, field.name, float(getattr(self, field.name)))
        if self.strategy == "vanilla":  # it has no gamma and no component: this is one run, not several
            object.__setattr__(self, "gamma", 1.0)
            if hasattr(self, "component"):
                object.__setattr__(self, "component", "both")
        training.check(self, lambda name: f"{type(self).__name__}: {name}")

    def fill_in(self, **values: Any) -> None:
        """Sets fields that are None."""
        for name, value in values.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)

    @property
    def key(self) -> str:
        """Names the run in the results: 16 hexadecimal digits, a hash of the whole config."""
        return hashlib.sha256(json.dumps(self.to_json(), sort_keys=True).encode()).hexdigest()[:16]

    def to_json(self) -> dict[str, Any]:
        """The config with its kind, as it stands in the results."""
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        values = {name: getattr(self, name) for name in defaults}
        late = [name for name in self.added if values[name] == defaults[name]]
        return {"kind": self.kind, **{name: value for name, value in values.items() if name not in late}}


@dataclasses.dataclass(frozen=True, kw_only=True)
class MLPRun(Run):
    """A Top-K MLP on images (sections 4.1 to 4.4 and 4.6)."""

    kind: ClassVar[str] = "mlp"
    added: ClassVar[tuple[str, ...]] = ("component", "residual", "layer_norm", "epsilon")

    width: int = 128
    depth: int = 3  # hidden layers: the paper's "4-layer MLP" counts its output layer (see the report's search)
    sparsity: float = 0.9
    optimizer: Literal["sgd", "momentum", "adam", "adamw", "rmsprop", "adagrad"] = "sgd"
    learning_rate: float = 0.01
    schedule: Literal["cosine", "constant"] = "cosine"
    batch_size: int = 512
    augmentation: Literal["none", "flip", "crop_flip"] | None = None  # None: flip, but none of digits
    normalization: Literal["unit", "standard"] = "standard"  # pixels in [0, 1], or by channel's mean and deviation
    initialization: Literal["lecun_normal", "he_normal", "torch"] = "lecun_normal"
    activation: Literal["relu", "none"] = "relu"  # before Top-K
    component: Component = "both"
    residual: bool = False  # each hidden layer but the first is added to its input
    layer_norm: bool = False  # the input of each layer but the first is normalized
    epsilon: float = 1e-8  # of Adam and AdamW

    def __post_init__(self):
        self.fill_in(augmentation="none" if self.dataset in DIGITS else "flip")
        super().__post_init__()


@dataclasses.dataclass(frozen=True, kw_only=True)
class TransformerRun(Run):
    """The sizes of a transformer with MoE layers (section 4.5)."""

    num_experts: int = 4
    experts_per_token: int = 2
    d_ff: int = 256  # the hidden width of an expert
    d_model: int = 512
    num_layers: int = 12
    num_heads: int = 8
    batch_size: int = 64
    load_balancing: float = 0.01  # the weight of the loss, which is 1 for an even load


@dataclasses.dataclass(frozen=True, kw_only=True)
class ViTRun(TransformerRun):
    """A MoE-ViT on images (figures 6, 10 and 11).

    The paper gives experts, layers, width and K. Rates and batch size are those of its table 1; cosine decay to zero is
    from table 6; warm-up, heads, the 4M's experts of width 32, random crops and mirroring are our choice.
    """

    kind: ClassVar[str] = "vit"
    RATES: ClassVar[dict[str, float]] = {"sgd": 0.01, "momentum": 0.01, "adam": 1e-4}

    num_experts: int = 64
    d_model: int = 128
    num_layers: int = 4
    num_heads: int = 4
    batch_size: int = 512
    patch_size: int = 4
    optimizer: Literal["sgd", "momentum", "adam"] = "adam"
    learning_rate: float | None = None  # at its peak; None: that of RATES
    warmup: float = 0.05  # the share of the steps in which the rate rises
    flip: bool | None = None  # whether half of the images are mirrored; None: unless they are of digits

    def __post_init__(self):
        self.fill_in(learning_rate=self.RATES[self.optimizer], flip=self.dataset not in DIGITS)
        super().__post_init__()


@dataclasses.dataclass(frozen=True, kw_only=True)
class GPTRun(TransformerRun):
    """A GPT-MoE on text (table 2).

    The paper gives the data, 5 epochs, Adam, E, K and the width of an expert; the other sizes follow from the parameter
    counts that it prints. The learning rate (GPT-3's for models of this size), batch size, warm-up and cosine decay to
    zero are our choice. An example is a sequence of `context` tokens.
    """

    kind: ClassVar[str] = "gpt"

    dataset: str = "wikitext-103"
    context: int = 128
    epochs: int = 5
    learning_rate: float = 3e-4  # of Adam, at its peak
    warmup: float = 0.05  # the share of the steps in which the rate rises
    dtype: Literal["float32", "bfloat16"] = "float32"  # what the model computes in; its parameters stay float32


@dataclasses.dataclass(frozen=True, kw_only=True)
class MiniRun(TransformerRun):
    """A transformer in miniature, small enough that a CPU trains it in seconds.

    An epoch is 100 batches of random examples. Warm-up over the first 5 % of the steps, then cosine decay to zero.
    """

    added: ClassVar[tuple[str, ...]] = ("router_bias", "residual")

    num_experts: int = 16
    d_ff: int = 128
    d_model: int = 64
    num_layers: int = 2
    num_heads: int = 4
    batch_size: int = 16
    epochs: int = 4
    learning_rate: float = 1e-3  # of AdamW with a weight decay of 0.01, at its peak
    expert_rate: float = 1.0  # a static factor on the updates of the experts
    component: Component = "both"
    router_bias: float = 0.0  # the rate of `models.router.update_router_bias`; 0: routers have no selection bias
    residual: bool = True  # attention and MoE are added to their input


@dataclasses.dataclass(frozen=True, kw_only=True)
class MiniGPTRun(MiniRun):
    """A GPT-MoE in miniature, on bytes."""

    kind: ClassVar[str] = "mini_gpt"

    dataset: str = "python-reference"  # or "tinyshakespeare"
    context: int = 64


@dataclasses.dataclass(frozen=True, kw_only=True)
class MiniViTRun(MiniRun):
    """A MoE-ViT in miniature, on images. Half of them are mirrored, unless they are of digits."""

    kind: ClassVar[str] = "mini_vit"

    num_experts: int = 64
    batch_size: int = 64
    patch_size: int = 8


KINDS: dict[str, type[Run]] = {config.kind: config for config in (MLPRun, ViTRun, GPTRun, MiniGPTRun, MiniViTRun)}


def from_json(config: dict[str, Any]) -> Run:
    """The run whose `to_json` this is.

    Raises:
      ValueError: if the kind or a field is not known.
    """
    config = dict(config)
    kind = config.pop("kind", None)
    if kind not in KINDS:
        raise ValueError(f"A run's kind is one of {sorted(KINDS)}; got {kind!r}.")
    try:
        return KINDS[kind](**config)
    except TypeError as error:
        raise ValueError(f"Not a config of kind {kind!r}: {error}.") from error


# Images, and GPT-2's tokens; those of WikiText-103 are the paper's ("5 epochs, about 517M tokens").
TRAINING_SIZES = {"cifar10": 50_000, "cifar100": 50_000, "svhn_cropped": 73_257}
TRAINING_SIZES |= {"wikitext-103": 103_400_000, "wikitext-valid": 258_659}
# Our guess for an H100 that trains such small models with XLA in float32: a tenth of its dense TF32 peak.
FLOPS_PER_SECOND = 50e12


def hours(run: Any) -> float:
    """An estimate for a `ViTRun` or a `GPTRun` on one H100: 6 operations per token and active weight.

    It leaves out the products of attention, evaluation and the optimizer. The weights that a token uses are those of
    attention, the router, K experts in every layer, and the head.
    """
    examples, d = TRAINING_SIZES[run.dataset], run.d_model
    if run.kind == "gpt":
        tokens_of_example, head = run.context, d * 50_257
        examples //= run.context
    else:
        tokens_of_example, head = (32 // run.patch_size) ** 2, 0
    layer = 4 * d * d + d * run.num_experts + run.experts_per_token * 2 * d * run.d_ff
    tokens = run.epochs * min(examples, run.subset or examples) * tokens_of_example
    return 6 * (run.num_layers * layer + head) * tokens / FLOPS_PER_SECOND / 3600


def grouped(items: Iterable[Any], key: Callable[[Any], Any]) -> dict[Any, list[Any]]:
    """The items by key, in order."""
    groups: dict[Any, list[Any]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return groups
