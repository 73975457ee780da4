"""Validation: the mean over all held-out tokens, dropless, whatever the micro-batch."""

from __future__ import annotations

import itertools

import pytest
import torch

from hunyuan_pretrain.data.errors import DataFormatError
from hunyuan_pretrain.data.loader import EvaluationLoader
from hunyuan_pretrain.diagnostics.parity import trace_steps
from hunyuan_pretrain.model.inputs import ModelInputs
from hunyuan_pretrain.runtime.logging import RunLog
from hunyuan_pretrain.runtime.stop import StopRequest
from hunyuan_pretrain.train.evaluate import evaluate
from hunyuan_pretrain.train.loop import _evaluate
from launch.demo_report import measure_heldout
from tests.helpers.one_rank import on_this_rank
from tests.helpers.runs import experiment_fields, metrics

PREFIXES = ("validation_", "validation/all/")


def validation(corpus, tmp_path, **evaluation):
    fields = experiment_fields(
        corpus, tmp_path, evaluation={"data": str(corpus / "heldout"), **evaluation}, model__num_layers=2
    )
    run = on_this_rank(fields)
    assert run.evaluation is not None
    return run, evaluate(run, run.experiment.stages[1], run.evaluation)


@torch.no_grad()
def logits_of(model, tokens_T, rope_alpha):
    """Logits (T, V) of one document alone, routed without a capacity."""
    return model(ModelInputs(tokens_T, torch.arange(len(tokens_T)), [0, len(tokens_T)], rope_alpha))[0]


def test_loss_is_the_mean_over_target_tokens_of_the_plain_logits(corpus, tmp_path):
    run, found = validation(corpus, tmp_path, max_sequences=3)
    losses = []
    for batch in EvaluationLoader(run.experiment, 0, 1, None):
        cu_seqlens = batch.cu_seqlens.tolist()
        for start, end in itertools.pairwise(cu_seqlens):
            document = slice(start, end)
            logits = logits_of(run.chunks[0], batch.tokens_T[document], run.experiment.stages[1].rope_alpha)
            loss = torch.nn.functional.cross_entropy(logits, batch.labels_T[document], reduction="none")
            losses.append(loss[batch.loss_mask_T[document] == 1])
    assert found["target_tokens"] == sum(len(loss) for loss in losses) > 64
    assert found["loss"] == pytest.approx(torch.cat(losses).mean().item(), rel=1e-5)


def test_micro_batches_and_padding_do_not_change_the_loss(corpus, tmp_path):
    """Five sequences in micro-batches of 1 or 4: three of the eight slots are padding."""
    one, four = (validation(corpus, tmp_path, max_sequences=5, micro_batch_sequences=size)[1] for size in (1, 4))
    assert four["loss"] == pytest.approx(one["loss"], rel=1e-6)
    assert four["target_tokens"] == one["target_tokens"]
    assert [sum(layer) for layer in one["expert_load"]] == pytest.approx([1.0, 1.0])
    assert four["expert_load"] == one["expert_load"], "of the five sequences only, bitwise: it is a share of choices"


def test_validation_changes_nothing_in_the_run(corpus, tmp_path):
    """The step after a validation is bitwise identical to the step without one."""
    plain = on_this_rank(experiment_fields(corpus, tmp_path, model__num_layers=2))
    run, _ = validation(corpus, tmp_path, max_sequences=2)
    (expected,), (actual,) = trace_steps(plain, range(1)), trace_steps(run, range(1))
    assert (actual.scalars, actual.shares) == (expected.scalars, expected.shares)
    assert all((actual.parameters[name] == expected.parameters[name]).all() for name in expected.parameters)


def test_every_set_is_validated_under_its_own_name(corpus, tmp_path):
    """All sets are in one record, also in bits per byte of the text that the targets represent, as the demo reports
    them."""
    path = str(corpus / "heldout")
    fields = experiment_fields(corpus, tmp_path / "run", 2, model__num_layers=2)
    fields["evaluation"] = {
        "data": path,
        "max_sequences": 3,
        "sets": [{"name": "all", "path": path, "max_sequences": 4}],
    }
    fields["runtime"] |= {"probes": False}
    run = on_this_rank(fields)
    run.log = RunLog(tmp_path / "run", run.experiment.logging, "tiny", is_writer=True)
    run.log.open_sinks({})
    assert _evaluate(run, run.experiment.stages[0], 1, StopRequest())
    run.loader.close()
    (record,) = metrics(tmp_path / "run")
    sets = [
        {name.removeprefix(prefix): value for name, value in record.items() if name.startswith(prefix)}
        for prefix in PREFIXES
    ]
    assert [set(one) for one in sets] == [{"loss", "target_tokens", "bits_per_byte", "expert_load"}] * 2
    for prefix, found in zip(PREFIXES, sets, strict=True):
        loader = run.validations[prefix]
        alone = evaluate(run, run.experiment.stages[0], loader)
        assert found == alone
        heldout = measure_heldout(
            run.experiment.model_copy(
                update={
                    "evaluation": run.experiment.evaluation.model_copy(update={"max_sequences": loader.num_sequences})
                }
            ),
            corpus / "tokenized",
        )
        assert found["target_tokens"] == heldout.target_tokens
        assert found["bits_per_byte"] == pytest.approx(heldout.bits_per_byte(found["loss"]), rel=1e-12)
    assert sets[0]["target_tokens"] < sets[1]["target_tokens"]
    log = (tmp_path / "run" / "log.txt").read_text()
    assert f"step 1: validation loss {sets[0]['loss']:.4f} over {sets[0]['target_tokens']:,} tokens, " in log
    assert f"step 1: validation all loss {sets[1]['loss']:.4f} over " in log


def test_validation_data_with_incomplete_routing_groups_is_refused(corpus, tmp_path):
    fields = experiment_fields(
        corpus, tmp_path, evaluation={"data": str(corpus / "heldout")}, model__moe_routing_group_tokens=48
    )
    with pytest.raises(DataFormatError, match=r"packed to sequences of 64 tokens, .*; pack it to a multiple of 48"):
        on_this_rank(fields)
