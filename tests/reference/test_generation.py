"""Our Hugging Face model under the installed transformers: caches, batches, arguments, and the interfaces that must
still exist."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

import pytest
import torch
import transformers
from torch.nn.functional import pad
from transformers import DynamicCache, GenerationMixin, StaticCache
from transformers.cache_utils import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast

from hunyuan_pretrain.checkpoint import modeling_hunyuan
from hunyuan_pretrain.checkpoint.modeling_hunyuan import CACHE_NAME, HunYuanForCausalLM
from tests.reference.test_modeling_hunyuan import hf_model, tiny_model

OTHER_NAME = {"cache": "past_key_values", "past_key_values": "cache"}[CACHE_NAME]


@pytest.fixture(scope="module")
def exact() -> HunYuanForCausalLM:
    """A model in fp64, so that different computations of the same thing agree in every token."""
    return hf_model(tiny_model(), torch.float64)


def greedy_without_a_cache(model: HunYuanForCausalLM, tokens: torch.Tensor, count: int) -> list[list[int]]:
    with torch.no_grad():
        for _ in range(count):
            tokens = torch.cat((tokens, model(tokens, use_cache=False).logits[:, -1:].argmax(-1)), dim=1)
    return tokens.tolist()


def left_padded(*lengths: int) -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor]:
    """The prompts, their batch, and its mask."""
    prompts = [torch.randint(1, 64, (length,)) for length in lengths]
    longest = max(lengths)
    rows = [pad(prompt, (longest - len(prompt), 0)) for prompt in prompts]
    masks = [pad(torch.ones_like(prompt), (longest - len(prompt), 0)) for prompt in prompts]
    return prompts, torch.stack(rows), torch.stack(masks)


# --- what transformers must still offer -------------------------------------------------------------------------------


def test_transformers_still_has_the_interface_that_the_model_code_uses() -> None:
    """A failure here names what a new transformers has changed; fix modeling_hunyuan.py before allowing that
    version."""
    assert CACHE_NAME in {field.name for field in dataclasses.fields(CausalLMOutputWithPast)}
    hands_over = inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters
    assert CACHE_NAME in hands_over, f"generate() hands the cache over by none of the known names: {list(hands_over)}"
    update = list(inspect.signature(Cache.update).parameters.values())
    assert [parameter.name for parameter in update[:4]] == ["self", "key_states", "value_states", "layer_idx"]
    assert len(update) > 4, "Cache.update takes no further arguments: where do the keys of a static cache go?"
    config = hf_model(tiny_model()).config
    assert DynamicCache(config=config).get_seq_length() == 0
    assert int(StaticCache(config=config, max_cache_len=16).get_seq_length()) == 0
    assert "create_masks_for_generate" in inspect.getsource(GenerationMixin.prepare_inputs_for_generation)


def test_generate_passes_no_argument_that_the_model_does_not_know(
    exact: HunYuanForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What generate() passes beyond the named parameters is listed in HARMLESS_ARGUMENTS."""
    seen: set[str] = set()
    forward = type(exact).forward

    def watched(self: HunYuanForCausalLM, *args: Any, **options: Any) -> Any:
        seen.update(options)
        return forward(self, *args, **options)

    watched.__signature__ = inspect.signature(forward)  # type: ignore[attr-defined]
    monkeypatch.setattr(type(exact), "forward", watched)
    exact.generate(torch.randint(64, (1, 4)), max_new_tokens=2, do_sample=False)
    assert CACHE_NAME in seen
    assert seen <= set(inspect.signature(forward).parameters) | modeling_hunyuan.HARMLESS_ARGUMENTS


def test_a_renamed_cache_is_an_error_that_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    renamed = dataclasses.make_dataclass("CausalLMOutputWithPast", ["logits", "kv_store"])
    monkeypatch.setattr(modeling_hunyuan, "CausalLMOutputWithPast", renamed)
    with pytest.raises(
        ImportError,
        match=r"calls the key/value cache neither `cache` nor `past_key_values` .*kv_store.*install transformers 5",
    ):
        modeling_hunyuan._name_of_cache()


@pytest.mark.parametrize("name", ["kv_store", "cu_seqlens", "is_causal", "output_router_logits", "token_type_ids"])
def test_an_unknown_argument_is_refused(exact: HunYuanForCausalLM, name: str) -> None:
    """If it were swallowed, a renamed cache would give garbage, and renamed cu_seqlens other documents."""
    for model in (exact, exact.model):
        with pytest.raises(
            TypeError, match=rf"forward\(\) has no argument {name} \(transformers {transformers.__version__}\)"
        ):
            model(torch.randint(64, (1, 3)), **{name: torch.ones(1)})


# --- the cache --------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")
def test_both_names_of_the_cache_are_accepted_and_the_installed_one_is_returned(exact: HunYuanForCausalLM) -> None:
    tokens = torch.randint(64, (1, 7))
    with torch.no_grad():
        expected = exact(tokens, use_cache=False).logits[:, 5:]
        for name in (CACHE_NAME, OTHER_NAME):
            begun = exact(tokens[:, :5])
            assert isinstance(begun[CACHE_NAME], Cache)
            gone_on = exact(tokens[:, 5:], **{name: begun[CACHE_NAME]})
            torch.testing.assert_close(gone_on.logits, expected, rtol=0, atol=1e-12)
            assert gone_on[CACHE_NAME] is begun[CACHE_NAME]
        assert CACHE_NAME not in exact(tokens, use_cache=False)
        with pytest.raises(ValueError, match="two caches: give either `cache` or `past_key_values`"):
            exact(tokens, cache=DynamicCache(), past_key_values=DynamicCache())
        with pytest.raises(TypeError, match="the cache is a tuple"):
            exact(tokens, cache=((torch.zeros(1), torch.zeros(1)),))


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_cla_divides_the_cache_by_its_share_factor(kind: str) -> None:
    """Bytes of the cache that generate() made for 9 tokens and 4 new ones, of which the last is never fed back:
    2 * G * H * bytes of the dtype * 12 for each owner, and nothing for borrowers."""

    def cache_bytes(share: int) -> int:
        loaded = hf_model(tiny_model(cla_share_factor=share))
        out = loaded.generate(
            torch.randint(64, (1, 9)),
            max_new_tokens=4,
            do_sample=False,
            return_dict_in_generate=True,
            cache_implementation=None if kind == "dynamic" else kind,
        )
        tensors = [value for layer in out[CACHE_NAME].layers for value in vars(layer).values()]
        return sum(tensor.nbytes for tensor in tensors if isinstance(tensor, torch.Tensor) and tensor.dim() > 1)

    model = tiny_model()
    one_layer = 2 * model.num_query_groups * model.head_dim * 4 * 12
    assert [cache_bytes(share) for share in (1, 2, 4)] == [4 * one_layer, 2 * one_layer, one_layer]


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generation_equals_greedy_decoding_without_a_cache(cache: str, exact: HunYuanForCausalLM) -> None:
    tokens = torch.randint(64, (1, 5))
    generated = exact.generate(
        tokens, max_new_tokens=8, do_sample=False, cache_implementation=None if cache == "dynamic" else cache
    )
    assert generated.tolist() == greedy_without_a_cache(exact, tokens, 8)


def test_logits_with_and_without_a_static_cache_are_equal(exact: HunYuanForCausalLM) -> None:
    """The user passes the cache, without a mask: its unused slots are not keys."""
    tokens = torch.randint(64, (2, 9))
    cache = StaticCache(config=exact.config, max_cache_len=16)
    with torch.no_grad():
        pieces = [exact(tokens[:, a:b], cache=cache).logits for a, b in ((0, 4), (4, 7), (7, 8), (8, 9))]
        torch.testing.assert_close(torch.cat(pieces, 1), exact(tokens, use_cache=False).logits, rtol=0, atol=1e-12)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_left_padding_changes_nothing(cache: str, exact: HunYuanForCausalLM) -> None:
    """A batch of prompts of different lengths gives the tokens and logits of each prompt alone."""
    prompts, padded, mask = left_padded(3, 8, 6)
    options = {"max_new_tokens": 6, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    options["cache_implementation"] = None if cache == "dynamic" else cache
    together = exact.generate(padded, attention_mask=mask, **options)
    for row, prompt in enumerate(prompts):
        assert together.sequences[row, 8 - len(prompt) :].tolist() == greedy_without_a_cache(exact, prompt[None], 6)[0]
        alone = exact.generate(prompt[None], **options)
        for mine, theirs in zip(together.logits, alone.logits, strict=True):
            torch.testing.assert_close(mine[row], theirs[0], rtol=0, atol=1e-6)  # generate() hands logits out in fp32


def test_left_padding_keeps_positions_without_position_ids(exact: HunYuanForCausalLM) -> None:
    """At any length: RoPE rounds large positions, so each text counts from its own start."""
    prompts, padded, mask = left_padded(3, 8)
    counted = (mask.cumsum(-1) - 1).clamp_min(0)
    with torch.no_grad():
        assert torch.equal(
            exact(padded, attention_mask=mask).logits, exact(padded, attention_mask=mask, position_ids=counted).logits
        )
        torch.testing.assert_close(
            exact(padded, attention_mask=mask).logits[0, 5:], exact(prompts[0][None]).logits[0], rtol=0, atol=1e-12
        )


def test_beams_and_samples_equal_those_without_a_cache(exact: HunYuanForCausalLM) -> None:
    """Both reorder the cache along the batch, including borrowers without storage."""
    _, padded, mask = left_padded(3, 5)
    for options in ({"num_beams": 3, "do_sample": False}, {"num_return_sequences": 3, "do_sample": True, "top_k": 0}):
        results = []
        for use_cache in (True, False):
            torch.manual_seed(5)
            results.append(
                exact.generate(padded, attention_mask=mask, max_new_tokens=5, use_cache=use_cache, **options).tolist()
            )
        assert results[0] == results[1]


def test_a_cache_in_a_recomputed_layer_is_refused() -> None:
    """transformers drops the cache there, and each new token sees only itself."""
    loaded = hf_model(tiny_model()).train()
    loaded.gradient_checkpointing_enable()
    tokens = torch.randint(64, (1, 5))
    with pytest.raises(ValueError, match=r"a cache cannot be used with gradient checkpointing.*; call eval\(\)"):
        loaded.generate(tokens, max_new_tokens=2, do_sample=False)
    assert loaded.generate(tokens, max_new_tokens=2, do_sample=False, use_cache=False).shape == (1, 7)
    assert CACHE_NAME not in loaded(tokens)


# --- masks and packs --------------------------------------------------------------------------------------------------


PACK = {
    "positions": {"position_ids": torch.tensor([[*range(4), *range(1), *range(6)]])},
    "offsets": {"cu_seq_lens_q": torch.tensor([0, 4, 5, 11]), "cu_seq_lens_k": torch.tensor([0, 4, 5, 11])},
    "numbers": {"seq_idx": torch.tensor([[0] * 4 + [1] + [2] * 6], dtype=torch.int32)},
}
"""Ways to say that 11 tokens are documents of 4, 1 and 6: of transformers' collators, of flash-attention's callers, and
of TRL, which passes all three."""


@pytest.mark.parametrize(
    "told",
    [*PACK.values(), {key: value for way in PACK.values() for key, value in way.items()} | {"max_length_q": 6}],
    ids=[*PACK, "all"],
)
def test_documents_of_a_pack_do_not_see_each_other(told: dict[str, Any], exact: HunYuanForCausalLM) -> None:
    tokens = torch.randint(64, (1, 11))
    with torch.no_grad():
        packed = exact(tokens, **told).logits
        alone = torch.cat([exact(tokens[:, a:b]).logits for a, b in ((0, 4), (4, 5), (5, 11))], 1)
        torch.testing.assert_close(packed, alone, rtol=0, atol=1e-12)
        cache = exact(tokens)[CACHE_NAME]
        with pytest.raises(ValueError, match="packed documents"):
            exact(tokens, cache=cache, **told)
        for way in ("offsets", "numbers"):
            with pytest.raises(ValueError, match="4-dimensional attention_mask"):
                exact(tokens, attention_mask=torch.ones(1, 1, 11, 11, dtype=torch.bool), **PACK[way])


@pytest.mark.parametrize(
    ("q", "k", "rows"),
    [
        ([0, 4, 11], [0, 5, 11], 1),
        ([0, 4, 11], None, 2),
        ([0, 4, 10], None, 1),
        ([4, 11], None, 1),
        ([0, 6, 4, 11], None, 1),
        (None, [0, 4, 11], 1),
    ],
)
def test_offsets_that_do_not_describe_one_row_are_refused(
    q: list[int] | None, k: list[int] | None, rows: int, exact: HunYuanForCausalLM
) -> None:
    told = {name: torch.tensor(ends) for name, ends in (("cu_seq_lens_q", q), ("cu_seq_lens_k", k)) if ends}
    with pytest.raises(ValueError, match="must be equal and cover one row of 11 tokens, from 0 to 11"):
        exact(torch.randint(64, (rows, 11)), **told)


def test_a_mask_of_four_dimensions_is_used_as_is(exact: HunYuanForCausalLM) -> None:
    tokens = torch.randint(64, (2, 6))
    seen = torch.ones(6, 6, dtype=torch.bool).tril()[None, None].expand(2, 1, 6, 6)
    added = torch.zeros(2, 1, 6, 6, dtype=torch.float64).masked_fill(~seen, -torch.inf)
    with torch.no_grad():
        expected = exact(tokens).logits
        for mask in (seen, added):
            torch.testing.assert_close(exact(tokens, attention_mask=mask).logits, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.ones(1, 3), r"attention_mask \(1, 3\): 4 cached and 3 new tokens need \(batch, 7\)"),
        (torch.ones(1, 3, 7), r"need \(batch, 7\)"),
        (torch.ones(1, 1, 3, 3), r"its last dimensions must be \(3, 7\), new tokens and keys"),
        (
            torch.ones(1, 1, 3, 7, dtype=torch.long),
            r"a 4-dimensional attention_mask must be bool or floating, not torch\.int64",
        ),
    ],
)
def test_a_mask_for_other_lengths_is_refused(mask: torch.Tensor, message: str, exact: HunYuanForCausalLM) -> None:
    tokens = torch.randint(64, (1, 7))
    with torch.no_grad(), pytest.raises(ValueError, match=message):
        exact(tokens[:, 4:], cache=exact(tokens[:, :4])[CACHE_NAME], attention_mask=mask)


# --- outputs ----------------------------------------------------------------------------------------------------------


def test_returned_attention_weights_are_the_ones_used(exact: HunYuanForCausalLM) -> None:
    """Returning them changes nothing; they sum to 1, attend to no later token and no padding, and generate() returns
    them too."""
    _, padded, mask = left_padded(3, 7)
    with torch.no_grad():
        out = exact(padded, attention_mask=mask, output_attentions=True)
        torch.testing.assert_close(out.logits, exact(padded, attention_mask=mask).logits, rtol=0, atol=1e-12)
    assert len(out.attentions) == 4
    for weights in out.attentions:
        assert weights.shape == (2, 4, 7, 7)
        torch.testing.assert_close(weights.sum(-1), torch.ones(2, 4, 7, dtype=torch.float64))
        assert not weights.triu(1).any()
        assert not weights[0, :, 4:, :4].any()
    with torch.no_grad():
        weights = exact(padded[1:], output_attentions=True).attentions[0]
    torch.testing.assert_close(weights, out.attentions[0][1:], rtol=0, atol=1e-12)
    generated = exact.generate(
        padded,
        attention_mask=mask,
        max_new_tokens=3,
        do_sample=False,
        output_attentions=True,
        return_dict_in_generate=True,
    )
    assert [step[0].shape for step in generated.attentions] == [(2, 4, 7, 7), (2, 4, 1, 8), (2, 4, 1, 9)]


def test_hidden_states_are_the_embedding_every_layer_and_the_normed_last(exact: HunYuanForCausalLM) -> None:
    tokens = torch.randint(64, (1, 5))
    with torch.no_grad():
        out = exact(tokens, output_hidden_states=True)
        assert len(out.hidden_states) == 5
        assert torch.equal(out.hidden_states[0], exact.model.embed_tokens(tokens))
        assert torch.equal(exact.lm_head(out.hidden_states[-1]), out.logits)
        as_tuple = exact(tokens, use_cache=False, return_dict=False)
    assert isinstance(as_tuple, tuple)
    assert torch.equal(as_tuple[0], out.logits)


def test_loss_is_the_mean_or_the_sum_over_the_items_of_the_batch(exact: HunYuanForCausalLM) -> None:
    tokens = torch.randint(64, (1, 9))
    with torch.no_grad():
        mean = exact(tokens, labels=tokens).loss
        torch.testing.assert_close(
            exact(tokens, labels=tokens, num_items_in_batch=torch.tensor(32)).loss, mean * 8 / 32
        )


def test_a_saved_model_is_the_same_model(tmp_path) -> None:
    model = hf_model(tiny_model())
    model.save_pretrained(tmp_path)
    again = HunYuanForCausalLM.from_pretrained(tmp_path)
    weights = again.state_dict()
    assert all(torch.equal(weights[name], tensor) for name, tensor in model.state_dict().items())
    tokens = torch.randint(64, (1, 6))
    with torch.no_grad():
        # Not bitwise: loaded tensors are not aligned as allocated ones are, and some CPUs then sum in another order.
        torch.testing.assert_close(again(tokens).logits, model(tokens).logits, rtol=0, atol=1e-5)
    assert again.generate(tokens, max_new_tokens=5, do_sample=False).tolist() == greedy_without_a_cache(
        model, tokens, 5
    )
