"""The model against the plain formulation, packing, recompute, and the published sizes."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from hunyuan_pretrain.checkpoint.weight_map import to_hf
from hunyuan_pretrain.config.derived import LOSS_CHUNK_TOKENS
from hunyuan_pretrain.config.load import load_model
from hunyuan_pretrain.config.schema import ParallelConfig, PrecisionConfig
from hunyuan_pretrain.model import hunyuan_model
from hunyuan_pretrain.model.cross_entropy import linear_cross_entropy
from hunyuan_pretrain.model.hunyuan_config import transformer_config
from hunyuan_pretrain.model.hunyuan_model import HunyuanModel
from hunyuan_pretrain.model.inputs import ModelInputs
from hunyuan_pretrain.model.routing import EVALUATION
from tests.helpers import tiny
from tests.reference.plain_hunyuan import plain_logits

FEATURES = {
    "all": {},
    "no CLA": {"cla_share_factor": 1},
    "CLA over 4": {"cla_share_factor": 4},
    "top 2": {"moe_router_topk": 2},
    "no QK norm": {"qk_layernorm": False},
    "untied": {"share_embeddings_and_output_weights": False},
    "one group a head": {"num_query_groups": 4},
}


def without_labels(inputs: ModelInputs, **changes: Any) -> ModelInputs:
    """Inputs for logits, routed without capacity."""
    return replace(inputs, labels_T=None, loss_weight_T=None, routing=EVALUATION, **changes)


def randomise_norms(model: HunyuanModel) -> None:
    """Randomise norm weights: they start at one, which would hide a misplaced one."""
    generator = torch.Generator().manual_seed(5)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data.uniform_(0.5, 1.5, generator=generator)


@pytest.mark.parametrize("changes", FEATURES.values(), ids=FEATURES)
def test_logits_equal_the_plain_formulation(changes):
    """Each layer with its own K/V from the owner's raw projections, RoPE then its own key norm, loops over documents
    and experts."""
    architecture = tiny.tiny_model(**changes)
    model = tiny.build(architecture)
    randomise_norms(model)
    inputs = tiny.packed_inputs(architecture)
    with torch.no_grad():
        logits, _ = model(without_labels(inputs))
    tensors = dict(to_hf(architecture, {name: parameter.detach() for name, parameter in model.named_parameters()}))
    expected = plain_logits(architecture, tensors, inputs.tokens_T, torch.tensor(inputs.cu_seqlens), inputs.rope_alpha)
    torch.testing.assert_close(logits, expected.float(), atol=2e-5, rtol=1e-5)


def gradients(model: HunyuanModel, inputs: ModelInputs) -> tuple[torch.Tensor, dict[str, torch.Tensor], torch.Tensor]:
    model.zero_grad()
    loss, statistics = model(inputs)
    loss.backward()
    return loss.detach(), {name: parameter.grad.clone() for name, parameter in model.named_parameters()}, statistics


@pytest.mark.parametrize("changes", FEATURES.values(), ids=FEATURES)
def test_gradients_equal_autograd_through_the_plain_formulation(changes):
    """Every hand-written backward pass (norms, RoPE, SwiGLU, dispatch, grouped matmuls, cross-entropy) at once,
    dropless."""
    architecture = tiny.tiny_model(**changes)
    model = tiny.build(architecture)
    randomise_norms(model)
    inputs = replace(tiny.packed_inputs(architecture), routing=EVALUATION)
    loss, actual, _ = gradients(model, inputs)
    weights = {name: parameter.detach().clone().requires_grad_() for name, parameter in model.named_parameters()}
    logits = plain_logits(
        architecture,
        dict(to_hf(architecture, weights)),
        inputs.tokens_T,
        torch.tensor(inputs.cu_seqlens),
        inputs.rope_alpha,
    )
    expected_loss = torch.nn.functional.cross_entropy(logits.float(), inputs.labels_T)
    expected_loss.backward()
    torch.testing.assert_close(loss, expected_loss.detach(), atol=1e-6, rtol=1e-6)
    for name, weight in weights.items():
        assert weight.grad.abs().max() > 0, name
        torch.testing.assert_close(
            actual[name], weight.grad, atol=2e-6, rtol=1e-4, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize(
    "changes", [{}, {"moe_router_topk": 2}, {"recycle_routing": False}, {"moe_expert_capacity_factor": 1.5}]
)
def test_experts_under_capacity_equal_a_loop_over_the_plan(changes):
    """Output and gradients of the routed experts for recycled, dropped and empty slots."""
    architecture = tiny.tiny_model(**changes)
    mlp = tiny.build(architecture).decoder.layers[1].mlp
    routing = tiny.packed_inputs(architecture).routing
    hidden = torch.randn(96, architecture.hidden_size, generator=torch.Generator().manual_seed(4), requires_grad=True)
    plan = mlp.router(hidden, routing).plan
    capacity_rows = plan.num_rows // architecture.num_moe_experts
    expected = torch.zeros_like(hidden)
    for k in range(architecture.moe_router_topk):
        for token in range(96):
            row = int(plan.row_TK[token, k])
            if row < capacity_rows * architecture.num_moe_experts:
                expert = row // capacity_rows
                gate, up = (mlp.experts.linear_fc1.weight[expert] @ hidden[token]).chunk(2)
                output = mlp.experts.linear_fc2.weight[expert] @ (torch.nn.functional.silu(gate) * up)
                expected = (
                    expected
                    + torch.nn.functional.one_hot(torch.tensor(token), 96)[:, None] * output * plan.weight_TK[token, k]
                )
    none = torch.zeros_like(hidden)
    actual = mlp.combine(mlp.experts(mlp.permute(hidden, plan)[0], plan), plan.weight_TK, plan, none, none)
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)
    inputs = [hidden, mlp.experts.linear_fc1.weight, mlp.experts.linear_fc2.weight, mlp.router.weight]
    probe = torch.randn(actual.shape, generator=torch.Generator().manual_seed(6))
    for got, wanted in zip(
        *(torch.autograd.grad((x * probe).sum(), inputs, retain_graph=True) for x in (actual, expected)), strict=True
    ):
        torch.testing.assert_close(got, wanted, atol=1e-4, rtol=1e-4)


def test_documents_in_a_pack_do_not_attend_to_each_other():
    """Changing the tokens of document 1 leaves the logits of all other documents bitwise identical, under dropless
    routing."""
    architecture = tiny.tiny_model()
    model = tiny.build(architecture)
    inputs = tiny.packed_inputs(architecture)
    changed = inputs.tokens_T.clone()
    changed[20:64] = (changed[20:64] + 1) % architecture.padded_vocab_size
    with torch.no_grad():
        before, after = (
            model(without_labels(inputs, tokens_T=tokens, rope_alpha=1.0))[0] for tokens in (inputs.tokens_T, changed)
        )
    assert torch.equal(before[:20], after[:20])
    assert torch.equal(before[64:], after[64:])
    assert not torch.isclose(before[20:64], after[20:64]).all()


def test_a_document_has_the_same_logits_alone_and_in_a_pack():
    architecture = tiny.tiny_model()
    model = tiny.build(architecture)
    inputs = tiny.packed_inputs(architecture)
    with torch.no_grad():
        packed = model(without_labels(inputs, rope_alpha=1.0))[0]
        alone = model(ModelInputs(inputs.tokens_T[20:64], torch.arange(44), [0, 44]))[0]
    torch.testing.assert_close(packed[20:64], alone)


@pytest.mark.parametrize("recompute", ["selective", "cla_group"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_recompute_changes_nothing(dtype, recompute):
    """Loss, every gradient and the statistics are bitwise identical, recycled tokens included."""
    architecture = tiny.tiny_model()
    inputs = tiny.packed_inputs(architecture)
    loss, grads, statistics = gradients(tiny.build(architecture, dtype=dtype), inputs)
    loss_2, grads_2, statistics_2 = gradients(tiny.build(architecture, dtype=dtype, recompute=recompute), inputs)
    assert torch.equal(loss, loss_2)
    assert torch.equal(statistics, statistics_2)
    assert statistics[:, architecture.num_moe_experts + 1].sum() > 0, "the test needs recycled tokens"
    for name in grads:
        assert torch.equal(grads[name], grads_2[name]), name


def test_recompute_saves_memory():
    architecture = tiny.tiny_model(num_layers=8)
    inputs = tiny.packed_inputs(architecture)

    def kept_bytes(recompute: str) -> int:
        sizes: dict[int, int] = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        model = tiny.build(architecture, recompute=recompute)
        weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss, _ = model(inputs)
        del loss
        return sum(size for pointer, size in sizes.items() if pointer not in weights)

    everything = kept_bytes("none")
    assert kept_bytes("selective") < everything * 0.75
    assert kept_bytes("cla_group") < everything / 5


def test_linear_cross_entropy_equals_torch_in_value_and_gradients(monkeypatch):
    monkeypatch.setitem(LOSS_CHUNK_TOKENS, "cpu", 7)
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(30, 16, generator=generator), torch.randn(96, 16, generator=generator)
    label, loss_weight = torch.randint(0, 96, (30,), generator=generator), torch.rand(30, generator=generator)
    results = []
    for function in (
        lambda h, w: linear_cross_entropy(h, w, label, loss_weight, tiny.world_of_one().tp),
        lambda h, w: (torch.nn.functional.cross_entropy(h @ w.t(), label, reduction="none") * loss_weight).sum(),
    ):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        loss = function(h, w)
        (3.0 * loss).backward()
        results.append((loss.detach(), h.grad, w.grad))
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_embedding_can_add_its_gradient_to_main_grad_by_rows(monkeypatch, dtype):
    """As on a GPU: the sum of torch's dense gradient, in fp32, on top of what was there, and marked as added."""
    monkeypatch.setattr(hunyuan_model, "_adds_on", lambda device: True)
    architecture = tiny.tiny_model()
    embedding = tiny.build(architecture, dtype=dtype).embedding.word_embeddings
    tokens = torch.tensor([3, 5, 3, 0, 95, 3])
    generator = torch.Generator().manual_seed(0)
    grad = torch.randn(len(tokens), architecture.hidden_size, generator=generator).to(embedding.weight.dtype)
    plain = embedding(tokens)
    plain.backward(grad)
    dense, embedding.weight.grad = embedding.weight.grad, None
    embedding.adds_rows, embedding.weight.main_grad = True, torch.ones(embedding.weight.shape)
    rows = embedding(tokens)
    rows.backward(grad)
    assert torch.equal(rows, plain)
    assert embedding.weight.grad_added_to_main_grad
    # the sum of token 3's rows: two additions, each rounded to half a unit of the dtype, of at most the largest entry
    largest = grad.abs().max().item() * 3
    rounding = 2 * largest * (2**-9 if dtype == "bf16" else 2**-24) + 2 * (1 + largest) * 2**-24
    torch.testing.assert_close(embedding.weight.main_grad - 1, dense.float(), rtol=0, atol=rounding)


def test_hunyuan_large_has_the_published_number_of_parameters():
    """Built on the meta device; active parameters: everything but the 15 routed experts per layer that a token does not
    visit."""
    architecture = load_model("configs/model/hunyuan_large.yaml")
    groups = tiny.world_of_one()
    with torch.device("meta"):
        model = HunyuanModel(transformer_config(architecture, ParallelConfig(), PrecisionConfig(dtype="bf16")), groups)
    total = sum(parameter.numel() for parameter in model.parameters())
    routed = sum(parameter.numel() for parameter in model.parameters() if getattr(parameter, "is_routed_expert", False))
    assert total == 388_698_128_640
    assert total - routed * 15 // 16 == 51_318_800_640


def test_initial_weights_do_not_depend_on_the_rest_of_the_model():
    """Keyed by name: the same layer of a deeper model starts from the same draw (except for the depth in the residual
    scale)."""
    shallow, deep = tiny.build(tiny.tiny_model(num_layers=2)), tiny.build(tiny.tiny_model(num_layers=4))
    name = "decoder.layers.1.mlp.experts.linear_fc1.weight"
    assert torch.equal(shallow.get_parameter(name), deep.get_parameter(name))
    assert not torch.equal(
        shallow.get_parameter(name), tiny.build(tiny.tiny_model(num_layers=2), seed=2).get_parameter(name)
    )
