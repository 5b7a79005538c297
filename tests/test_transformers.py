"""The MoE layer against four of Hugging Face's `transformers`, in PyTorch: Mixtral, Qwen 2 and 3, DeepSeek-V3."""

import jax
import jax.numpy as jnp
import moe_oracle
import numpy as np
import pytest
from flax import nnx

import excitation_optax
from excitation_optax import flax as excitation_flax
from models import moe, router

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from transformers.models.deepseek_v3 import configuration_deepseek_v3, modeling_deepseek_v3  # noqa: E402
from transformers.models.mixtral import configuration_mixtral, modeling_mixtral  # noqa: E402
from transformers.models.qwen2_moe import configuration_qwen2_moe, modeling_qwen2_moe  # noqa: E402
from transformers.models.qwen3_moe import configuration_qwen3_moe, modeling_qwen3_moe  # noqa: E402

pytestmark = pytest.mark.torch

D, F, E, K, T = 12, 20, 6, 2, 22


def mixtral():
    config = configuration_mixtral.MixtralConfig(
        hidden_size=D, intermediate_size=F, num_local_experts=E, num_experts_per_tok=K
    )
    return modeling_mixtral.MixtralSparseMoeBlock(config)


def qwen3(norm_topk_prob):
    config = configuration_qwen3_moe.Qwen3MoeConfig(
        hidden_size=D, moe_intermediate_size=F, num_experts=E, num_experts_per_tok=K, norm_topk_prob=norm_topk_prob
    )
    return modeling_qwen3_moe.Qwen3MoeSparseMoeBlock(config)


def qwen2():
    """With shared experts, and raw gates."""
    config = configuration_qwen2_moe.Qwen2MoeConfig(
        hidden_size=D,
        moe_intermediate_size=F,
        shared_expert_intermediate_size=2 * F,
        num_experts=E,
        num_experts_per_tok=K,
        norm_topk_prob=False,
    )
    return modeling_qwen2_moe.Qwen2MoeSparseMoeBlock(config)


def deepseek(norm_topk_prob=True):
    """With sigmoid scores, groups, a selection bias, scaled gates and shared experts."""
    config = configuration_deepseek_v3.DeepseekV3Config(
        hidden_size=D,
        moe_intermediate_size=F,
        n_routed_experts=E,
        num_experts_per_tok=K,
        n_group=3,
        topk_group=2,
        norm_topk_prob=norm_topk_prob,
        routed_scaling_factor=2.5,
        n_shared_experts=2,
    )
    return modeling_deepseek_v3.DeepseekV3MoE(config)


DEEPSEEK = {
    "scores": "sigmoid",
    "selection_bias": True,
    "num_groups": 3,
    "groups_per_token": 2,
    "gate_scale": 2.5,
    "num_shared_experts": 2,
}
BLOCKS = {
    "mixtral": (mixtral, {}),
    "qwen3": (lambda: qwen3(True), {}),
    "qwen3 with raw gates": (lambda: qwen3(False), {"normalize_gates": False}),
    "qwen2": (qwen2, {"normalize_gates": False, "num_shared_experts": 2}),
    "deepseek v3": (deepseek, DEEPSEEK),
    "deepseek v3 with raw gates": (lambda: deepseek(False), DEEPSEEK | {"normalize_gates": False}),
}


def to_jax(tensor):
    return jnp.asarray(tensor.detach().numpy())


def as_ours(block, of=lambda parameter: parameter):
    """The parameters, or `of` each, by our names and in our shapes: our kernels are transposed."""
    gate_up, down = (of(getattr(block.experts, name)) for name in ("gate_up_proj", "down_proj"))
    params = {
        "router": {"kernel": of(block.gate.weight).T},
        "experts": {
            "kernel_gate": gate_up[:, :F].transpose(1, 2),
            "kernel_in": gate_up[:, F:].transpose(1, 2),
            "kernel_out": down.transpose(1, 2),
        },
    }
    shared = getattr(block, "shared_expert", None) or getattr(block, "shared_experts", None)
    if shared is not None:
        params["shared"] = {
            "kernel_gate": of(shared.gate_proj.weight).T,
            "kernel_in": of(shared.up_proj.weight).T,
            "kernel_out": of(shared.down_proj.weight).T,
        }
    return jax.tree.map(to_jax, params)


@pytest.fixture(params=BLOCKS)
def pair(request):
    """Their block and our layer with the same parameters, and the same tokens, `[2, T / 2, D]`, for both."""
    make_block, options = BLOCKS[request.param]
    block = make_block().float()
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=random))
        if hasattr(block, "shared_expert_gate"):
            block.shared_expert_gate.weight.zero_()  # Qwen 2 has a gate for its shared expert: now 1/2, ours is 1
        if hasattr(block.gate, "e_score_correction_bias"):
            block.gate.e_score_correction_bias.copy_(0.2 * torch.randn(E, generator=random))
    config = moe.MoEConfig(d_model=D, d_ff=F, num_experts=E, experts_per_token=K, gated=True, use_bias=False, **options)
    layer = moe.MoE(config, rngs=nnx.Rngs(0))
    params = as_ours(block)
    if hasattr(block, "shared_expert_gate"):
        params["shared"]["kernel_out"] /= 2
    state = nnx.state(layer, nnx.Param)
    nnx.replace_by_pure_dict(state, params)
    nnx.update(layer, state)
    if layer.router.bias is not None:
        layer.router.bias[...] = to_jax(block.gate.e_score_correction_bias)
    return block, layer, torch.randn((2, T // 2, D), generator=random)


def by_expert(gates, indices):
    """Gates `[T, E]`, zero for experts that were not chosen: DeepSeek's K experts come in no order."""
    of_all = np.zeros((len(gates), E))
    np.put_along_axis(of_all, np.asarray(indices), np.asarray(gates), axis=-1)
    return of_all


def test_outputs_and_gates(pair):
    block, layer, x = pair
    with torch.no_grad():
        expected = block(x)
        _, weights, experts = block.gate(x)
    y, utilization = excitation_flax.capture_routing(layer)(to_jax(x))
    moe_oracle.assert_close(y, moe_oracle.float64(expected), 1e-5)
    routes = layer.router(to_jax(x).reshape(-1, D))
    ours, theirs = by_expert(routes.gates, routes.indices), by_expert(weights, experts)
    np.testing.assert_array_equal(ours > 0, theirs > 0)
    np.testing.assert_allclose(ours, theirs, rtol=1e-5)
    np.testing.assert_array_equal(utilization["experts"].counts, np.bincount(experts.ravel(), minlength=E))


def test_gradients(pair):
    block, layer, x = pair
    dy = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    x.requires_grad_()
    block(x).backward(dy)
    expected = as_ours(block, of=lambda parameter: parameter.grad)
    if hasattr(block, "shared_expert_gate"):
        expected["shared"]["kernel_out"] *= 2
    graphdef, params, rest = nnx.split(layer, nnx.Param, ...)

    def loss_fn(params, x):
        return jnp.sum(to_jax(dy) * excitation_flax.capture_routing(nnx.merge(graphdef, params, rest))(x)[0])

    d_params, dx = jax.jit(jax.grad(loss_fn, (0, 1)))(params, to_jax(x))
    moe_oracle.assert_close(nnx.to_pure_dict(d_params), moe_oracle.float64(expected), 1e-5)
    moe_oracle.assert_close(dx, moe_oracle.float64(to_jax(x.grad)), 1e-5)


@pytest.mark.parametrize("pair", [name for name in BLOCKS if "deepseek" not in name], indirect=True)
@pytest.mark.parametrize("padded", [False, True])
def test_load_balancing_loss(pair, padded):
    """Theirs is K times ours. They have none for DeepSeek-V3."""
    block, layer, x = pair
    where = torch.arange(T).reshape(2, T // 2) % 5 != 3
    logits, _, _ = block.gate(x)
    expected = modeling_mixtral.load_balancing_loss_func(
        (logits,), num_experts=E, top_k=K, attention_mask=where.long() if padded else None
    )
    run = excitation_flax.capture_routing(layer, moe.AuxiliaryLoss)
    _, _, sown = run(to_jax(x), to_jax(where) if padded else None)
    np.testing.assert_allclose(K * moe.auxiliary_losses(sown).load_balancing, expected.item(), rtol=1e-5)


def test_bias_updates_route_as_in_deepseek():
    """Twenty updates of both biases, theirs by the paper's rule in PyTorch: the same counts, and a better load."""
    block = deepseek()
    random = torch.Generator().manual_seed(0)
    bias = block.gate.e_score_correction_bias
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=random))
        block.gate.weight[0] += 0.5
    config = moe.MoEConfig(
        d_model=D, d_ff=F, num_experts=E, experts_per_token=K, gated=True, use_bias=False, **DEEPSEEK
    )
    layer = router.Router(config, rngs=nnx.Rngs(0))
    layer.kernel[...] = to_jax(block.gate.weight).T
    x = torch.randn((200, D), generator=random) + 0.5
    loads = []
    for _ in range(20):
        with torch.no_grad():
            experts = block.gate(x)[2]
            load = torch.bincount(experts.ravel(), minlength=E).float()
            bias += 0.0625 * torch.sign(load.mean() - load)  # transformers has no update itself
            bias -= bias.mean()
        counts = excitation_optax.count_routing(layer(to_jax(x)).indices, E)
        np.testing.assert_array_equal(counts.counts, load)
        layer.bias[...] = router.update_router_bias(layer.bias[...], counts, 0.0625)
        np.testing.assert_allclose(layer.bias[...], bias, atol=1e-6)
        loads.append(float(load.max() / load.mean()))
    assert min(loads[-5:]) < loads[0] - 0.3
