"""Our Hugging Face model against the plain formulation, and its cache against itself."""

from __future__ import annotations

import itertools

import pytest
import torch

from hunyuan_pretrain.checkpoint.configuration_hunyuan import HunYuanConfig
from hunyuan_pretrain.checkpoint.hf_export import hf_config
from hunyuan_pretrain.checkpoint.modeling_hunyuan import CACHE_NAME, HunYuanForCausalLM
from hunyuan_pretrain.config.schema import ModelConfig
from tests.reference.plain_hunyuan import plain_logits

ALPHA = 100.0


def tiny_model(**changes: object) -> ModelConfig:
    base = {
        "num_layers": 4,
        "hidden_size": 32,
        "num_attention_heads": 4,
        "num_query_groups": 2,
        "kv_channels": 12,
        "ffn_hidden_size": 24,
        "moe_ffn_hidden_size": 20,
        "num_moe_experts": 4,
        "padded_vocab_size": 64,
    }
    return ModelConfig(**(base | changes))


def hf_model(
    model: ModelConfig, dtype: torch.dtype = torch.float32, seed: int = 0, **config_changes: object
) -> HunYuanForCausalLM:
    """Random weights, large enough that every part affects the result; norm weights are not 1."""
    torch.manual_seed(seed)
    config = hf_config(model, rope_alpha=ALPHA, max_position_embeddings=256, dtype=dtype) | config_changes
    loaded = HunYuanForCausalLM(HunYuanConfig(**config)).to(dtype).eval()
    with torch.no_grad():
        for name, parameter in loaded.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
            else:
                parameter.normal_(0, parameter.shape[-1] ** -0.5)
    return loaded


def tensors(loaded: HunYuanForCausalLM) -> dict[str, torch.Tensor]:
    return {name: tensor.detach() for name, tensor in loaded.state_dict().items()}


@pytest.mark.parametrize(
    ("share", "topk", "qk_norm", "is_tied"),
    [*itertools.product((1, 2, 4), (1, 2), (True, False), (True,)), (2, 1, True, False), (1, 3, False, False)],
)
def test_logits_equal_the_plain_formulation_in_fp64(share: int, topk: int, qk_norm: bool, is_tied: bool) -> None:
    model = tiny_model(
        cla_share_factor=share, moe_router_topk=topk, qk_layernorm=qk_norm, share_embeddings_and_output_weights=is_tied
    )
    loaded = hf_model(model, torch.float64)
    tokens = torch.randint(64, (23,))
    expected = plain_logits(model, tensors(loaded), tokens, torch.tensor([0, 23]), ALPHA)
    with torch.no_grad():
        actual = loaded(tokens[None]).logits[0]
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)


def test_logits_equal_the_plain_formulation_in_fp32() -> None:
    model = tiny_model()
    loaded = hf_model(model)
    tokens = torch.randint(64, (23,))
    with torch.no_grad():
        actual = loaded(tokens[None]).logits[0]
    torch.testing.assert_close(
        actual, plain_logits(model, tensors(loaded), tokens, torch.tensor([0, 23]), ALPHA), rtol=0, atol=2e-5
    )


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable:FutureWarning")
def test_gradients_equal_the_plain_formulation() -> None:
    """Also with gradient checkpointing, where the owner's keys and values cross between recomputed layers."""
    model = tiny_model()
    loaded = hf_model(model, torch.float64).train()
    loaded.gradient_checkpointing_enable()
    calls = []
    loaded.model.layers[1].self_attn.register_forward_hook(lambda *_: calls.append(1))
    tokens = torch.randint(64, (15,))
    out = loaded(tokens[None], labels=tokens[None])
    loss = torch.nn.functional.cross_entropy(out.logits[0, :-1], tokens[1:])
    torch.testing.assert_close(out.loss.double(), loss, rtol=0, atol=1e-6)
    loss.backward()
    assert len(calls) == 2, "the layer was not computed again in the backward pass"
    leaves = {name: parameter.detach().clone().requires_grad_() for name, parameter in loaded.named_parameters()}
    logits = plain_logits(model, leaves, tokens, torch.tensor([0, 15]), ALPHA)
    torch.nn.functional.cross_entropy(logits[:-1], tokens[1:]).backward()
    for name, parameter in loaded.named_parameters():
        expected = torch.zeros_like(parameter) if leaves[name].grad is None else leaves[name].grad
        actual = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        torch.testing.assert_close(
            actual, expected, rtol=1e-9, atol=1e-11, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_an_expert_without_tokens_has_a_gradient_in_training() -> None:
    """Of zero, as in training here, where its momentum moves it on; with None an optimizer would leave it."""
    loaded = hf_model(tiny_model(), torch.float32).train()
    ran = []
    for expert in loaded.model.layers[0].mlp.experts:
        expert.register_forward_hook(lambda _, inputs, output: ran.append(len(output)))
    tokens = torch.tensor([[5, 6]])
    loaded(tokens, labels=tokens).loss.backward()
    assert 0 in ran
    assert [name for name, weight in loaded.named_parameters() if weight.grad is None] == []
    ran.clear()
    with torch.no_grad():
        loaded.eval()(tokens)
    assert 0 not in ran, "computed for nothing"


def test_plain_formulation_keeps_packed_documents_apart() -> None:
    model = tiny_model()
    weights = tensors(hf_model(model, torch.float64))
    tokens = torch.randint(64, (20,))
    packed = plain_logits(model, weights, tokens, torch.tensor([0, 7, 8, 20]), ALPHA)
    alone = [
        plain_logits(model, weights, tokens[a:b], torch.tensor([0, b - a]), ALPHA) for a, b in ((0, 7), (7, 8), (8, 20))
    ]
    torch.testing.assert_close(packed, torch.cat(alone), rtol=0, atol=1e-12)


def test_rope_base_follows_alpha() -> None:
    """The published base of the 256K model: 1e4 * 1e5^(80/78) = 1.34e9."""
    large = HunYuanConfig(rope_scaling={"type": "dynamic", "alpha": 1e5, "factor": 1.0})
    assert large.head_dim == 80
    assert large.rope_base == pytest.approx(1.34e9, rel=0.01)
    assert HunYuanConfig().rope_base == 1e4


@pytest.mark.parametrize("share", [1, 2, 4])
def test_cached_logits_equal_uncached(share: int) -> None:
    model = tiny_model(cla_share_factor=share)
    loaded = hf_model(model, torch.float64)
    tokens = torch.randint(64, (2, 17))
    with torch.no_grad():
        expected = loaded(tokens, use_cache=False).logits
        out = loaded(tokens[:, :9])
        pieces = [out.logits]
        for start, stop in ((9, 13), (13, 14), (14, 15), (15, 17)):
            out = loaded(tokens[:, start:stop], past_key_values=out[CACHE_NAME])
            pieces.append(out.logits)
    torch.testing.assert_close(torch.cat(pieces, dim=1), expected, rtol=0, atol=1e-12)


def test_router_stays_fp32_in_a_bf16_model(tmp_path) -> None:
    loaded = hf_model(tiny_model())
    loaded.save_pretrained(tmp_path)
    again = HunYuanForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    kinds = {name: parameter.dtype for name, parameter in again.named_parameters()}
    assert {dtype for name, dtype in kinds.items() if name.endswith("gate.wg.weight")} == {torch.float32}
    assert {dtype for name, dtype in kinds.items() if not name.endswith("gate.wg.weight")} == {torch.bfloat16}
    assert torch.equal(again.model.layers[1].mlp.gate.wg.weight, loaded.model.layers[1].mlp.gate.wg.weight)
    assert again(torch.randint(64, (1, 7))).logits.isfinite().all()


def test_saving_again_keeps_the_config(tmp_path) -> None:
    loaded = hf_model(tiny_model(moe_router_topk=2))
    loaded.config.save_pretrained(tmp_path)
    again = HunYuanConfig.from_pretrained(tmp_path)
    before, after = loaded.config.to_dict(), again.to_dict()
    assert {key: value for key, value in after.items() if before.get(key) != value} == {}
    assert again.rope_scaling == {"type": "dynamic", "alpha": ALPHA, "factor": 1.0}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope_scaling"),
        ({"num_shared_expert": 2}, "num_shared_expert=2: only 1 is implemented"),
        ({"moe_topk": [1, 2]}, "moe_topk="),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
    ],
)
def test_refuses_a_config_it_does_not_implement(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match="implemented") as error:
        HunYuanConfig(**change)
    assert message in str(error.value)


def test_reads_one_value_per_layer_as_one_value() -> None:
    assert HunYuanConfig(moe_topk=[1] * 64, num_experts=[16] * 64).moe_topk == 1
