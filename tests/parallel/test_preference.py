"""DPO: under parallel layouts it is that of one rank, and on one rank that of a plain formulation. Before the first
update the model is its reference; a run resumes with its reference or not at all."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hunyuan_pretrain.config.schema import Experiment
from tests.helpers.layouts import Layout, trace_in_jobs, until_failure
from tests.helpers.ranks import fork_ranks
from tests.helpers.runs import SEQUENCE_LENGTH

pytestmark = pytest.mark.slow

STEPS = 3
BETA, SFT_WEIGHT = 0.5, 0.2
SYSTEM = "Go"
LAYOUTS = [
    Layout(tp=2, pp=2, vpp=2, micro_batch=1, recompute="swiglu+norms"),
    Layout(cp=2, dp=2, ep=2, overlap="everything", attention="all_to_all"),
]
WORDS = ["import", "return", "class", "def", "value", "number", "list", "string", "for", "while", "if", "else", "None"]


@pytest.fixture(scope="module")
def pairs(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pairs packed to the sequence length, some after several turns, and padding."""
    from data_tools.chat import PairForm
    from data_tools.packed_output import pack
    from data_tools.tokenization import tokenize

    folder, draw = tmp_path_factory.mktemp("pairs"), np.random.default_rng(3)

    def text() -> str:
        return " ".join(draw.choice(WORDS, draw.integers(1, 5)))

    with (folder / "pairs.jsonl").open("w") as file:
        for _ in range(90):
            turns = [{"role": "user", "content": text()}]
            if draw.random() < 0.3:
                turns += [{"role": "assistant", "content": text()}, {"role": "user", "content": text()}]
            file.write(json.dumps({"prompt": turns, "chosen": f"{text()} one", "rejected": f"{text()} two"}) + "\n")
    form = PairForm(system_prompt=SYSTEM)
    tokenize([str(folder / "pairs.jsonl")], str(corpus / "tokenizer"), str(folder / "tokens"), form=form)
    pack([str(folder / "tokens")], SEQUENCE_LENGTH, str(folder / "packed"), seed=1, overlong="drop")
    return folder / "packed"


@pytest.fixture(scope="module")
def base(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one step, whose weights are the reference."""
    run_dir = tmp_path_factory.mktemp("base")
    experiment = Layout().experiment(corpus, run_dir, 2)
    (found,) = fork_ranks(1, train_here, experiment.model_copy(update={"stages": experiment.stages[:1]}))
    assert found == 0
    return run_dir


def train_here(experiment: Experiment) -> int:
    from hunyuan_pretrain.train.loop import train

    return train(experiment)


def preferring(layout: Layout, corpus: Path, pairs: Path, base: Path, run_dir: Path, **stage: Any) -> Experiment:
    """STEPS steps of DPO."""
    fields = layout.experiment(corpus, run_dir, STEPS).model_dump(mode="json")
    (first, *_) = fields["stages"]
    first |= {
        "name": "dpo",
        "task": "dpo",
        "dpo_beta": BETA,
        "dpo_sft_weight": SFT_WEIGHT,
        "tokens": STEPS * first["global_batch_sequences"] * SEQUENCE_LENGTH,
        "lr_shape": "constant",
        "data": [{"path": str(pairs)}],
    } | stage
    fields |= {"stages": [first]}
    fields["checkpoint"]["init_from"] = str(base)
    return Experiment.model_validate(fields)


def trace_all(experiments: list[Experiment]) -> list[Any]:
    from hunyuan_pretrain.diagnostics.parity import trace_layout

    return until_failure(experiments, lambda experiment: trace_layout(experiment, STEPS))


def test_dpo_under_a_layout_equals_one_rank(corpus: Path, pairs: Path, base: Path, tmp_path: Path) -> None:
    from hunyuan_pretrain.diagnostics.parity import compare

    one = preferring(Layout().reference, corpus, pairs, base, tmp_path / "one")
    (expected,) = trace_in_jobs(1, trace_all, [one])
    work = [preferring(layout, corpus, pairs, base, tmp_path / str(n)) for n, layout in enumerate(LAYOUTS)]
    for layout, traces in zip(LAYOUTS, trace_in_jobs(LAYOUTS[0].world_size, trace_all, work), strict=True):
        assert not isinstance(traces, str), f"{layout}:\n{traces}"
        wrong = [found for found in compare(traces, expected) if not found.is_within]
        assert not wrong, [f"{layout}: {x.kind} {x.name} in step {x.step}: {x.relative:.2e}" for x in wrong[:8]]


def losses(experiment: Experiment) -> dict[str, Any]:
    """Trains; also the loss and the gradient of the first step in a plain formulation, from all logits."""
    import torch
    import torch.nn.functional as F

    from hunyuan_pretrain.model.inputs import ModelInputs
    from hunyuan_pretrain.train import setup
    from hunyuan_pretrain.train.step import compute_gradients, train_step

    run = setup.prepare(experiment)
    with setup.left_at_the_end(run):
        model, stage = run.chunks[0], run.loader.order.stage(1)
        results = [train_step(run, stage, 0)]
        run.optimizer.zero_grad()
        compute_gradients(run, stage, 1)
        found = {name: value.main_grad.clone() for name, value in model.named_parameters()}
        run.wrapped[0].zero_grad_buffer()
        (batch,) = run.loader.micro_batches(1)
        logits_TV, _ = model(
            ModelInputs(batch.tokens_T, batch.positions_T, batch.cu_seqlens.tolist(), stage.rope_alpha)
        )
        value_T = F.log_softmax(logits_TV.double(), 1).gather(1, batch.labels_T[:, None])[:, 0] * batch.loss_mask_T
        count = len(batch.pairs.reference_A)
        sum_A = torch.stack([value_T[batch.pairs.answer_T == answer].sum() for answer in range(count)])
        ratio_A = sum_A - batch.pairs.reference_A
        preference = -F.logsigmoid(BETA * (ratio_A[::2] - ratio_A[1::2])).mean()
        chosen_tokens = sum(batch.loss_mask_T[batch.pairs.answer_T == answer].sum() for answer in range(0, count, 2))
        loss = preference - SFT_WEIGHT * sum_A[::2].sum() / chosen_tokens
        loss.backward()  # layers and core's hooks add to main_grad
        plain = {name: value.main_grad.clone() for name, value in model.named_parameters()}
        results.append(train_step(run, stage, 1))
        return {
            "first": (results[0].loss, results[0].pairs._asdict()),
            "second": (results[1].loss, results[1].pairs._asdict()),
            "plain": loss.item(),
            "pairs": count // 2,
            "gradients": {
                name: ((found[name] - plain[name]).norm() / plain[name].norm().clamp(min=1e-12)).item()
                for name in found
            },
        }


def test_loss_and_gradients_are_those_of_the_plain_formulation(
    corpus: Path, pairs: Path, base: Path, tmp_path: Path
) -> None:
    (found,) = fork_ranks(1, losses, preferring(Layout().reference, corpus, pairs, base, tmp_path))
    loss, first = found["first"]
    assert first["preference_loss"] / first["pairs"] == pytest.approx(math.log(2), abs=1e-6)
    assert first["margin_size"] / first["pairs"] < 1e-5
    assert loss > first["preference_loss"] / first["pairs"]  # the cross-entropy of the chosen answers
    loss, second = found["second"]
    assert second["pairs"] == found["pairs"]
    assert loss == pytest.approx(found["plain"], rel=1e-6)
    assert second["margin_size"] / second["pairs"] > 1e-4
    assert max(found["gradients"].values()) < 1e-4, found["gradients"]


def resume_with(experiment: Experiment) -> str:
    """Trains to the end; goes on without the weights it started from, also as a branch; then the reference is lost."""
    first = train_here(experiment)
    run_dir = Path(experiment.run_dir)
    (file,) = (run_dir / "reference").glob("*.npz")
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert first == 0
    assert records[0]["preference_loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert {"reward_margin", "preference_accuracy", "chosen_log_probability", "rejected_log_probability"} < set(
        records[-1]
    )
    base = Path(str(experiment.checkpoint.init_from))
    base.rename(base.with_name("gone"))
    assert train_here(longer(experiment, 2, model={"init_method_std": 0.5})) == 0
    branch = longer(experiment, 2, run_dir=str(run_dir.with_name("branch")))
    start = {"init_from": None, "resume_from": str(run_dir / "checkpoints" / f"step_{STEPS:07d}")}
    branch = branch.model_copy(update={"checkpoint": branch.checkpoint.model_copy(update=start)})
    assert train_here(branch) == 0
    assert (run_dir.with_name("branch") / "reference" / file.name).read_bytes() == file.read_bytes()
    file.unlink()
    before = (run_dir / "resolved.yaml").read_text()
    try:
        train_here(longer(experiment, 3))
    except Exception as error:
        assert (run_dir / "resolved.yaml").read_text() == before, "a refused start writes nothing"
        return f"{type(error).__name__}: {error}"
    return "resumed"


def longer(experiment: Experiment, times: int, model: dict[str, Any] | None = None, **changes: Any) -> Experiment:
    (stage,) = experiment.stages
    changes["stages"] = (stage.model_copy(update={"tokens": times * stage.tokens}),)
    changes["model"] = experiment.model.model_copy(update=model or {})
    return experiment.model_copy(update=changes)


def export_of(run_dir: Path, output: Path) -> dict[str, Any]:
    from hunyuan_pretrain.checkpoint.export_run import export_run

    return export_run(run_dir, output, processes=1)


def test_a_run_resumes_with_its_reference_or_not_at_all(corpus: Path, pairs: Path, base: Path, tmp_path: Path) -> None:
    own = shutil.copytree(base, tmp_path / "base")
    experiment = preferring(Layout().reference, corpus, pairs, own, tmp_path / "run", dpo_sft_weight=0.0)
    (found,) = fork_ranks(1, resume_with, experiment)
    assert found.startswith("CheckpointError: ")
    assert "holds no reference log-probabilities" in found
    (certificate,) = fork_ranks(1, export_of, tmp_path / "run", tmp_path / "export")
    assert certificate["chat"] == {"system_prompt": SYSTEM}
    exported = json.loads((tmp_path / "export/tokenizer_config.json").read_text())
    assert (exported["eos_token"], exported["default_system_prompt"]) == ("<|eos|>", SYSTEM)


def test_a_reference_that_is_not_a_number_is_named() -> None:
    from hunyuan_pretrain.train import TrainingError
    from hunyuan_pretrain.train.reference import check_finite

    check_finite(np.array([-3.0, -4.0]), "pairs")
    with pytest.raises(TrainingError, match=r"give 1 of 4 answers a log-probability .* the first in pair 2"):
        check_finite(np.array([-3.0, -4.0, math.nan, -4.0]), "pairs")


def test_a_model_that_is_not_its_reference_is_noticed() -> None:
    from hunyuan_pretrain.model.preference import PairSums
    from hunyuan_pretrain.train import TrainingError
    from hunyuan_pretrain.train.reference import check_first_step

    same = PairSums(4, 4 * math.log(2), 0.0, 0.0, 0, -40.0, -40.0)
    check_first_step(same, 400, 0.1, "fp32")
    with pytest.raises(TrainingError, match=r"the loss of the pairs is 0.693147 .* differ by 5 nats"):
        # of both signs: the loss alone hides them
        check_first_step(same._replace(margin_size=4 * 0.5), 400, 0.1, "fp32")
    with pytest.raises(TrainingError, match="the loss of the pairs is nan"):
        check_first_step(same._replace(preference_loss=math.nan, margin_size=math.nan), 400, 0.1, "bf16")
    rounded = same._replace(margin_size=4 * 0.1 * 1.5)  # 1.5 nats: rounding in answers of 2,000 tokens, not of 50
    check_first_step(rounded, 4 * 4000, 0.1, "bf16")
    with pytest.raises(TrainingError, match=r"differ by 1.5 nats on average \(0; up to 1 in bf16"):
        check_first_step(rounded, 400, 0.1, "bf16")
