"""Checks made once before training: attention is correct, documents do not see each other, and every declared loss
reaches the routers; with Triton kernels also those (train/kernel_probe.py).

They run the model itself, in the layout in use, on one micro-batch. They take a few seconds and catch what no loss
curve shows: an attention backend that misreads its inputs or ignores document boundaries; a router loss that has no
effect, or whose strength depends on the layout. `runtime.probes: false` turns them off.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import pairwise
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.distributed import DistributedDataParallel
from torch import Tensor

from hunyuan_pretrain.config.attention import KINDS
from hunyuan_pretrain.config.schema import Experiment
from hunyuan_pretrain.config.tuning import is_trained
from hunyuan_pretrain.data.loader import MicroBatch
from hunyuan_pretrain.model.attention import AttentionPlan, attention_plan
from hunyuan_pretrain.model.attention_backends import ByMicroBatch, CoreAttention
from hunyuan_pretrain.model.gating import balance_loss, z_loss
from hunyuan_pretrain.model.norm import rope_table
from hunyuan_pretrain.model.packed_attention import packed_attention
from hunyuan_pretrain.model.router import Router
from hunyuan_pretrain.model.routing import TrainingRouting
from hunyuan_pretrain.parallel.context_parallel import context_slice
from hunyuan_pretrain.train import TrainingError
from hunyuan_pretrain.train.attention_check import ROUNDINGS, Compared, allowed_difference, plain_softmax
from hunyuan_pretrain.train.attention_choice import cu_seqlens_of
from hunyuan_pretrain.train.feed import SentBatch, model_inputs, sent_ahead
from hunyuan_pretrain.train.kernel_probe import check_kernels
from hunyuan_pretrain.train.optimizer import complete_gradients
from hunyuan_pretrain.train.run import Run
from hunyuan_pretrain.train.step import as_summed_loss, run_schedule

COEFFICIENT_TOLERANCE = 1e-3
"""Relative. A different summation order changes the sums by less than 1e-5; a layout-dependent factor is 2 or more."""


def probe(run: Run) -> list[str]:
    """Run the probes and return one line for each. Raises TrainingError: on every rank if one fails, on this rank alone
    if it has no memory for one. Communicates: all groups."""
    lines = [check_kernels(run)] if run.chunks[0].config.uses_kernels else []
    try:
        lines += [check_attention(run), check_leakage(run)]
        if run.experiment.model.num_moe_experts > 1 and _trains_routers(run.experiment):
            lines.append(check_liveness(run))
    except torch.OutOfMemoryError as error:
        what = str(error).strip().splitlines()[0]
        raise TrainingError(f"no memory left for the probes; runtime.probes=false leaves them out: {what}") from error
    return lines


def _trains_routers(experiment: Experiment) -> bool:
    """Whether every router has a gradient."""
    layers = range(experiment.model.num_layers)
    return all(is_trained(experiment.tuning, f"decoder.layers.{layer}.mlp.router.weight") for layer in layers)


# --- attention matches another implementation -------------------------------------------------------------------------

REFERENCE_TOKENS = 256
"""Longest document for the reference that materializes all scores."""


def check_attention(run: Run) -> str:
    """Compare this stage's attention, forward and backward, with another implementation on the inputs of its first CLA
    group.

    `packed_attention` is compared with a plain softmax on short documents; any other backend with `packed_attention` on
    this rank's documents of the first micro-batch, and two backends on both kinds of micro-batches. The tolerance is
    the rounding error, per row of the output and for each gradient as a whole.
    """
    layers = list(run.chunks[0].decoder.layers)[: run.chunks[0].config.model.cla_share_factor]
    backend = layers[0].self_attention.core_attention
    if backend is packed_attention:
        num_tokens, num_sequences, names = _num_tokens(run), 1, ("flash attention", "a plain softmax")
        cu_seqlens = [*range(0, num_tokens, REFERENCE_TOKENS), num_tokens]
        cu_seqlens.insert(1, 1)
        packs, reference = [cu_seqlens], cast("CoreAttention", plain_softmax)
    else:
        batch = run.loader.micro_batches(min(run.first_step, run.loader.num_steps - 1))[0]
        num_sequences, reference = len(batch.sequence_ids), packed_attention
        names = (getattr(backend, "name", type(backend).__name__), "packed_attention")
        kinds = KINDS if isinstance(backend, ByMicroBatch) else ()
        packs = [cu_seqlens_of(batch, kind) for kind in kinds] or [batch.cu_seqlens.tolist()]
    compared = Compared(backend, reference)
    for cu_seqlens in packs:
        _attend_in_layers(run, layers, compared, cu_seqlens, num_sequences)
    dtype = run.chunks[0].config.params_dtype
    worst = torch.stack([*compared.differences.values()]).nan_to_num(nan=torch.inf)
    dist.all_reduce(worst, op=dist.ReduceOp.MAX)
    longest = max(end - start for cu_seqlens in packs for start, end in pairwise(cu_seqlens))
    found = dict(zip(compared.differences, worst.tolist(), strict=True))
    allowed = {
        name: allowed_difference(roundings, dtype, longest + run.experiment.model.head_dim)
        for name, roundings in ROUNDINGS.items()
    }
    if wrong := [name for name in found if not found[name] <= allowed[name]]:
        differences = ", ".join(
            f"{name} by {found[name]:.2g} (rounding explains {allowed[name]:.2g})" for name in wrong
        )
        raise TrainingError(
            f"attention by {names[0]} does not match {names[1]} on the same queries, keys and values: "
            f"{differences}, relative; "
            "do not train with this attention backend"
        )
    worst_of_all = f"largest relative difference {max(found.values()):.1e}"
    return f"probe: attention by {names[0]} matches {names[1]}, forward and backward ({worst_of_all})"


def _attend_in_layers(
    run: Run, layers: Sequence[Any], attend: CoreAttention, cu_seqlens: list[int], num_sequences: int
) -> None:
    """Call the layers' attention on random inputs, with `attend` in place of their backend."""
    positions_S = torch.cat([torch.arange(end - start) for start, end in pairwise(cu_seqlens)])
    mine_T, plan = _pack(run, positions_S, cu_seqlens, num_sequences)
    generator = torch.Generator(run.device).manual_seed(run.experiment.seed + dist.get_rank())
    hidden_TD = torch.randn(len(mine_T), run.experiment.model.hidden_size, generator=generator, device=run.device)
    hidden_TD = hidden_TD.to(run.chunks[0].config.params_dtype)
    kv = None
    with torch.no_grad():
        for layer in layers:
            backend = layer.self_attention.core_attention
            layer.self_attention.core_attention = attend
            try:
                _, kv = layer.self_attention(layer.input_layernorm(hidden_TD)[0], kv, plan)
            finally:
                layer.self_attention.core_attention = backend


# --- documents do not see each other ----------------------------------------------------------------------------------


def check_leakage(run: Run) -> str:
    """Change one document of a pack; the attention output and input gradient of all others must stay bitwise identical.
    Where kernels add up in any order (runtime.deterministic=false), they may differ by rounding.

    Raises TrainingError on every rank if they do not. Communicates: all ranks.
    """
    num_tokens = _num_tokens(run)
    cu_seqlens = [0, num_tokens // 8, num_tokens // 2 - 1, num_tokens - 3, num_tokens]
    changed = range(cu_seqlens[1], cu_seqlens[2])
    generator = torch.Generator().manual_seed(run.experiment.seed)
    hidden_TD = torch.randn(num_tokens, run.experiment.model.hidden_size, generator=generator)
    other_TD = hidden_TD.clone()
    other_TD[changed.start : changed.stop] = torch.randn(len(changed), hidden_TD.shape[1], generator=generator)
    positions_T = torch.cat([torch.arange(end - start) for start, end in pairwise(cu_seqlens)])
    rows_T, *before = _attend(run, hidden_TD, positions_T, cu_seqlens)
    _, *after = _attend(run, other_TD, positions_T, cu_seqlens)
    is_changed_T = (rows_T >= changed.start) & (rows_T < changed.stop)
    is_bitwise = torch.are_deterministic_algorithms_enabled()
    longest = num_tokens + run.experiment.model.head_dim
    rounding = allowed_difference(max(ROUNDINGS.values()), run.chunks[0].config.params_dtype, longest)
    differs_2T = torch.stack(
        [
            (a != b).any(dim=1) if is_bitwise else (a - b).norm(dim=1) > rounding * b.norm(dim=1)
            for a, b in zip(before, after, strict=True)
        ]
    )
    totals = torch.stack([*differs_2T[:, ~is_changed_T].sum(1), differs_2T[0, is_changed_T].sum()])
    dist.all_reduce(totals)
    if totals[0] or totals[1]:
        raise TrainingError(
            f"documents of a pack see each other: changing one changed {int(totals[0])} rows of attention output "
            f"and {int(totals[1])} of "
            "its gradient in others; do not train with this attention backend"
        )
    if not totals[2]:
        raise TrainingError(
            "the leakage probe had no effect on the changed document itself: attention does not depend on its input"
        )
    parallel = run.experiment.parallel
    mode = (
        f", {parallel.context_parallel_method} over {parallel.context_parallel_size} ranks"
        if parallel.context_parallel_size > 1
        else ""
    )
    how = "bitwise" if is_bitwise else "within rounding"
    return f"probe: documents of a pack do not see each other (attention forward and backward, {how}{mode})"


def _attend(run: Run, hidden_SD: Tensor, positions_S: Tensor, cu_seqlens: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    """(rows of this rank, output, gradient of the input) of the attention layers in this stage's first CLA group,
    without the experts."""
    model = run.chunks[0]
    mine_T, plan = _pack(run, positions_S, cu_seqlens, 1)
    input_TD = hidden_SD.to(run.device, model.config.params_dtype)[mine_T].requires_grad_()
    output_TD, kv = input_TD, None
    for layer in list(model.decoder.layers)[: model.config.model.cla_share_factor]:
        normalised_TD, output_TD = layer.input_layernorm(output_TD)
        attention_TD, kv = layer.self_attention(normalised_TD, kv, plan)
        output_TD = output_TD + attention_TD
    # the same gradient in both runs, a different one for every row
    grad_output_SD = torch.sin(torch.arange(hidden_SD.numel(), dtype=torch.float32)).view_as(hidden_SD)
    (grad_TD,) = torch.autograd.grad(output_TD, input_TD, grad_output_SD.to(output_TD)[mine_T])
    for wrapped in run.wrapped:
        wrapped.zero_grad_buffer()  # linears may have accumulated into main_grad
    return mine_T, output_TD.detach(), grad_TD


def _pack(run: Run, positions_S: Tensor, cu_seqlens: list[int], num_sequences: int) -> tuple[Tensor, AttentionPlan]:
    """(rows whose hidden states this rank holds, attention plan of its layers) for a pack in micro-batch form."""
    groups, experiment = run.groups, run.experiment
    rows_T, context = torch.arange(len(positions_S), device=run.device), None
    if groups.cp.size() > 1:
        method, group_tokens = experiment.parallel.context_parallel_method, experiment.model.moe_routing_group_tokens
        context = context_slice(groups.cp, method, cu_seqlens, num_sequences, group_tokens, run.device)
        rows_T = context.rows_T
    table = rope_table(positions_S.to(run.device)[rows_T], experiment.model.rotary_base, experiment.model.head_dim)
    mine_T = rows_T.view(groups.tp.size(), -1)[groups.tp.rank()] if run.chunks[0].config.sequence_parallel else rows_T
    return mine_T, attention_plan(table, cu_seqlens, context)


# --- every declared loss reaches the routers --------------------------------------------------------------------------


def check_liveness(run: Run) -> str:
    """Train on each declared loss alone and check that its gradient is nonzero on every router, at the declared
    strength.

    The strength is measured at the last layer, because only that layer's own loss reaches its router. It is the fully
    reduced gradient projected on the gradient of the bare loss, which is computed from the router's input outside the
    training path. Raises TrainingError.
    """
    model = run.experiment.model
    terms = {"cross-entropy": (True, 0.0, 0.0)}
    if model.moe_aux_loss_coeff:
        terms["balance loss"] = (False, model.moe_aux_loss_coeff, 0.0)
    if model.moe_z_loss_coeff:
        terms["z-loss"] = (False, 0.0, model.moe_z_loss_coeff)
    heard = []
    for name, (has_cross_entropy, balance, z) in terms.items():
        norms_L, strength = _router_gradients(run, has_cross_entropy, balance, z)
        silent = [layer for layer, norm in enumerate(norms_L.tolist()) if not norm > 0]
        if silent:
            raise TrainingError(
                f"the {name} has no gradient on the router of layer {silent[0]} ({len(silent)} of "
                f"{len(norms_L)} layers)"
            )
        if has_cross_entropy:
            heard.append(name)
            continue
        declared = balance or z
        if not abs(strength / declared - 1) < COEFFICIENT_TOLERANCE:
            raise TrainingError(
                f"the {name} acts with coefficient {strength:.6g}, but {declared:g} is declared: this layout scales it"
            )
        heard.append(f"{name} (coefficient {strength:.4g}, declared {declared:g})")
    return f"probe: every router has a gradient from {', '.join(heard)}"


def _router_gradients(run: Run, has_cross_entropy: bool, balance: float, z: float) -> tuple[Tensor, float]:
    """(gradient norm of each router (L,), strength of the router loss at the last layer) for a step on these losses
    alone."""
    config, groups, device = run.chunks[0].config, run.groups, run.device
    num_tokens, group_tokens = _num_tokens(run), run.experiment.model.moe_routing_group_tokens
    num_micro_batches = run.experiment.parallel.pipeline_model_parallel_size
    num_global_groups = num_tokens // group_tokens * num_micro_batches * groups.dp.size()
    bare = _BareLoss(run, num_global_groups, is_z_loss=bool(z))

    def forward(batches: Iterator[SentBatch], wrapped: DistributedDataParallel) -> tuple[Tensor, Any]:
        inputs = model_inputs(
            next(batches),
            rope_alpha=1.0,
            loss_tokens=num_tokens * num_micro_batches * groups.dp.size() if has_cross_entropy else math.inf,
            route=lambda group_n, _: TrainingRouting(run.experiment.seed, 0, group_n, num_global_groups),
        )
        return wrapped(inputs)[0], as_summed_loss

    declared = config.moe_aux_loss_coeff, config.moe_z_loss_coeff
    try:
        config.moe_aux_loss_coeff, config.moe_z_loss_coeff = balance, z or None
        for wrapped in run.wrapped:
            wrapped.zero_grad_buffer()
        batches = [_synthetic_batch(run, number) for number in range(num_micro_batches)]
        run_schedule(run, forward, partial(sent_ahead, run, batches), len(batches), num_tokens, forward_only=False)
        complete_gradients(run.wrapped)
    finally:
        config.moe_aux_loss_coeff, config.moe_z_loss_coeff = declared
        bare.close()
    norms_L = torch.zeros(config.num_layers, dtype=torch.float64, device=device)
    for model in run.chunks:
        for layer in model.decoder.layers:
            norms_L[layer.layer] = layer.mlp.router.weight.main_grad.double().norm()
    dist.all_reduce(norms_L, op=dist.ReduceOp.MAX)
    strength = bare.strength()
    for wrapped in run.wrapped:
        wrapped.zero_grad_buffer()
    return norms_L, strength


class _BareLoss:
    """Gradient of the last layer's router loss without its coefficient, computed from the router's input and summed
    over all tokens."""

    def __init__(self, run: Run, num_global_groups: int, is_z_loss: bool) -> None:
        self.num_global_groups, self.is_z_loss, self.groups = num_global_groups, is_z_loss, run.groups
        layers = list(run.chunks[-1].decoder.layers) if run.chunks[-1].post_process else []
        self.router: Router | None = layers[-1].mlp.router if layers else None
        shape = (run.experiment.model.num_moe_experts, run.experiment.model.hidden_size)
        self.grad_ED = torch.zeros(shape, device=run.device)
        self._hook = self.router.register_forward_hook(self._add) if self.router is not None else None

    def _add(self, router: Router, inputs: tuple[Tensor, Any], output: Any) -> None:
        if torch.is_grad_enabled() and router.config.parallel.recompute == "cla_group":
            return  # the second pass over a recomputed layer
        with torch.enable_grad():
            weight_ED = router.weight.detach().clone().requires_grad_()
            logits_TE = F.linear(inputs[0].detach().float(), weight_ED)
            probs_TE = logits_TE.softmax(-1)
            chosen_TK = probs_TE.topk(router.config.moe_router_topk, dim=-1).indices
            group_tokens = router.config.model.moe_routing_group_tokens
            loss = (
                z_loss(logits_TE, group_tokens) if self.is_z_loss else balance_loss(probs_TE, chosen_TK, group_tokens)
            )
            self.grad_ED += torch.autograd.grad(loss, weight_ED)[0] / self.num_global_groups

    def strength(self) -> float:
        """<gradient of training, bare gradient> / <bare gradient, bare gradient>. Communicates: all ranks."""
        main_ED = self.grad_ED.new_zeros(self.grad_ED.shape)
        if self.router is not None and self.groups.tp.rank() == 0 and self.groups.dp_cp.rank() == 0:
            main_ED = self.router.weight.main_grad.clone()
        dist.all_reduce(self.grad_ED)
        dist.all_reduce(main_ED)
        return float((main_ED.double() * self.grad_ED.double()).sum() / self.grad_ED.double().square().sum())

    def close(self) -> None:
        if self._hook is not None:
            self._hook.remove()


def _num_tokens(run: Run) -> int:
    """Tokens of a probe's micro-batch: the smallest number, at least 64, that gives every rank whole routing groups."""
    parallel, group = run.experiment.parallel, run.experiment.model.moe_routing_group_tokens
    unit = group * parallel.tensor_model_parallel_size * parallel.context_parallel_size
    return -(-64 // unit) * unit


def _synthetic_batch(run: Run, number: int) -> MicroBatch:
    num_tokens, model = _num_tokens(run), run.experiment.model
    generator = torch.Generator().manual_seed(run.experiment.seed + number)
    tokens_T, labels_T = (
        torch.randint(0, model.padded_vocab_size, (num_tokens,), generator=generator) for _ in range(2)
    )
    middle = num_tokens // 3
    position = number * run.groups.dp.size() + run.groups.dp.rank()
    return MicroBatch(
        tokens_T=tokens_T,
        labels_T=labels_T,
        loss_mask_T=torch.ones(num_tokens),
        positions_T=torch.cat([torch.arange(middle), torch.arange(num_tokens - middle)]),
        cu_seqlens=torch.tensor([0, middle, num_tokens], dtype=torch.int32),
        max_seqlen=num_tokens - middle,
        sequence_ids=torch.tensor([position]),
    )
