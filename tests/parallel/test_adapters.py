"""What a run with LoRA leaves behind: checkpoints of the adapter alone, and the adapter in PEFT's format."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import pytest
import torch

from hunyuan_pretrain.checkpoint import CheckpointError
from hunyuan_pretrain.checkpoint.adapter import PREFIX, WEIGHTS
from hunyuan_pretrain.checkpoint.lora_merge import merge_lora
from hunyuan_pretrain.checkpoint.stored import INDEX, read_index
from hunyuan_pretrain.checkpoint.tensor_files import StoredTensors
from hunyuan_pretrain.config.schema import Experiment
from tests.helpers.layouts import Layout
from tests.helpers.ranks import fork_ranks
from tests.helpers.runs import SEQUENCE_LENGTH, VOCAB_SIZE

pytestmark = pytest.mark.slow

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LORA: dict[str, Any] = {"rank": 4, "alpha": 8, "dropout": 0.1, "target_modules": ALL}
STEPS = 4


def experiment_of(corpus: Path, run_dir: Path, layout: Layout, steps: int = STEPS, **changes: Any) -> Experiment:
    """`changes` of sections: of two runs that are compared, all steps have one stage."""
    fields = layout.experiment(corpus, run_dir, 2).model_dump(mode="json")
    (first, _) = fields["stages"]
    tokens = steps * first["global_batch_sequences"] * SEQUENCE_LENGTH
    fields["stages"] = [first | {"tokens": tokens, "lr_shape": "constant", "hidden_dropout": 0.1}]
    for section, values in changes.items():
        fields[section] |= values
    return Experiment.model_validate(fields)


def train_all(experiments: list[Experiment]) -> list[int]:
    from hunyuan_pretrain.parallel.groups import leave_layout
    from hunyuan_pretrain.runtime.stop import listen
    from hunyuan_pretrain.train import setup
    from hunyuan_pretrain.train.loop import _train

    found = []
    for experiment in experiments:
        run = setup.prepare(experiment, listen())
        with setup.left_at_the_end(run, leave_layout):
            found.append(_train(run, listen()))
    return found


@pytest.fixture(scope="module")
def runs(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base: the weights; whole: an adapter trained for STEPS steps by two ranks; part: its first half, by one rank."""
    folder = tmp_path_factory.mktemp("runs")
    tuning = {"lora": LORA}
    one, two = Layout(model="dropless"), Layout(dp=2, ep=2, model="dropless")
    lora: dict[str, Any] = {"tuning": tuning, "checkpoint": {"init_from": str(folder / "base")}}
    base = experiment_of(corpus, folder / "base", one, 1)
    half = {"checkpoint": {"init_from": str(folder / "base"), "save_every_steps": STEPS // 2}, "tuning": tuning}
    part = experiment_of(corpus, folder / "part", one, **half)
    fork_ranks(1, train_all, [base, part])
    fork_ranks(2, train_all, [experiment_of(corpus, folder / "whole", two, **lora)])
    return folder


def checkpoint(run_dir: Path, step: int = STEPS) -> Path:
    return run_dir / "checkpoints" / f"step_{step:07d}"


def weights(run_dir: Path, step: int = STEPS, which: Literal["trained", "ema"] = "trained") -> dict[str, torch.Tensor]:
    from hunyuan_pretrain.checkpoint.folders import read_marker
    from hunyuan_pretrain.checkpoint.stored_weights import StoredWeights

    folder = checkpoint(run_dir, step)
    found = StoredWeights(folder, sizes_of(read_marker(folder)), which)
    return {name: found[name] for name in found}


def test_a_checkpoint_holds_the_adapter_alone_and_names_its_base(runs: Path) -> None:
    found = weights(runs / "whole")
    assert found
    assert all(".adapter." in name for name in found)
    marker = json.loads((checkpoint(runs / "whole") / "complete.json").read_text())
    assert marker["adapter_of"]["path"] == str(checkpoint(runs / "base", 1))
    index = read_index((checkpoint(runs / "whole") / INDEX).read_bytes(), sizes_of(marker))
    moments = {f"optimizer.{kind}.{name}" for kind in ("exp_avg", "exp_avg_sq", "ema") for name in found}
    assert index.tensors.keys() == found.keys() | moments


def sizes_of(marker: dict[str, Any]) -> dict[str, int]:
    return {name: file["bytes"] for name, file in marker["files"].items()}


def test_resumed_under_another_layout_equals_uninterrupted(runs: Path, corpus: Path, tmp_path: Path) -> None:
    """From the checkpoint of one rank, two ranks go on."""
    from shutil import copytree

    copytree(runs / "part", tmp_path / "part")
    copytree(checkpoint(runs / "part", STEPS), tmp_path / "of_one_rank")
    import shutil

    shutil.rmtree(checkpoint(tmp_path / "part", STEPS))
    kinds: tuple[Literal["trained", "ema"], ...] = ("trained", "ema")
    expected = {kind: weights(runs / "part", which=kind) for kind in kinds}
    settings = {"tuning": {"lora": LORA}, "checkpoint": {"init_from": str(runs / "base")}}
    layout = Layout(dp=2, ep=2, model="dropless")
    fork_ranks(2, train_all, [experiment_of(corpus, tmp_path / "part", layout, **settings)])
    for kind in kinds:
        resumed, whole = weights(tmp_path / "part", which=kind), weights(runs / "whole", which=kind)
        for name, tensor in expected[kind].items():
            for other in (resumed, whole):
                # fp32 sums in another order
                torch.testing.assert_close(
                    other[name], tensor, rtol=1e-3, atol=2e-5, msg=lambda text, n=f"{kind} {name}": f"{n}: {text}"
                )


def test_a_branch_in_another_folder_goes_on_as_the_run(runs: Path, corpus: Path, tmp_path: Path) -> None:
    start = {"init_from": str(runs / "base"), "resume_from": str(checkpoint(runs / "part", STEPS // 2))}
    tuning = {"lora": LORA}
    branch = experiment_of(corpus, tmp_path, Layout(model="dropless"), tuning=tuning, checkpoint=start)
    fork_ranks(1, train_all, [branch])
    expected, found = weights(runs / "part"), weights(tmp_path)
    assert [name for name, tensor in expected.items() if not torch.equal(tensor, found[name])] == []


def test_another_base_and_other_uses_are_refused(runs: Path, corpus: Path, tmp_path: Path) -> None:
    from shutil import copytree

    from hunyuan_pretrain.checkpoint.folders import read_marker
    from hunyuan_pretrain.evaluation.layout_scorer import checkpoint_and_stage
    from hunyuan_pretrain.train.base_weights import Base, refuse_other_base

    marker = read_marker(checkpoint(runs / "whole"))
    with pytest.raises(CheckpointError, match="was trained on the weights"):
        refuse_other_base(checkpoint(runs / "whole"), marker, Base(tmp_path, "0" * 64, (), ()))
    with pytest.raises(
        CheckpointError, match=r"holds an adapter of .* and no model; to evaluate both together, export"
    ):
        checkpoint_and_stage(runs / "whole", None)
    copytree(runs / "whole", tmp_path / "adapter")
    plain = experiment_of(
        corpus, tmp_path / "plain", Layout(model="dropless"), checkpoint={"init_from": str(runs / "whole")}
    )
    (found,) = fork_ranks(1, error_of, plain)
    assert "holds an adapter and no weights of a model" in found


def error_of(experiment: Experiment) -> str:
    from hunyuan_pretrain.train import setup

    try:
        setup.prepare(experiment)
    except CheckpointError as error:
        return str(error)
    return ""


def export_both(runs: Path) -> list[str]:
    from hunyuan_pretrain.checkpoint.export_run import export_run

    base = export_run(runs / "base", runs / "base_export", processes=1)
    average = export_run(runs / "whole", runs / "average", processes=1, which="ema")
    assert average["source"] == {"run": "tiny", "step": STEPS, "weights": "ema", "ema_decay": 0.5}
    return [base["format"], export_run(runs / "whole", runs / "adapter", processes=1)["format"]]


@pytest.fixture(scope="module")
def exported(runs: Path) -> Path:
    """The base and the adapter as exports, and the adapter merged."""
    (formats,) = fork_ranks(1, export_both, runs)
    assert formats == ["hunyuan", "peft"]
    merge_lora(runs / "base_export", runs / "adapter", runs / "merged")
    return runs


def test_merged_weights_are_the_base_and_the_product(exported: Path) -> None:
    base, merged, adapter = (
        StoredTensors(exported / "base_export"),
        StoredTensors(exported / "merged"),
        StoredTensors(exported / "adapter", WEIGHTS),
    )
    for name in base:
        module = name.removesuffix(".weight")
        if (a := f"{PREFIX}{module}.lora_A.weight") in adapter:
            product = adapter[f"{PREFIX}{module}.lora_B.weight"] @ adapter[a]
            assert product.any()
            torch.testing.assert_close(merged[name], base[name] + 2.0 * product)
        else:
            assert torch.equal(merged[name], base[name]), name


def test_the_average_of_an_adapter_is_exported(exported: Path, corpus: Path) -> None:
    """Each tensor as the checkpoint has its average, which is not the tensor that was trained."""
    from hunyuan_pretrain.checkpoint.trained_adapter import factors

    experiment = experiment_of(corpus, exported / "whole", Layout(model="dropless"), tuning={"lora": LORA})
    assert experiment.tuning.lora is not None
    average, adapter = (StoredTensors(exported / name, WEIGHTS) for name in ("average", "adapter"))
    stored, compared = weights(exported / "whole", which="ema"), set()
    for factor in factors(experiment.model, experiment.tuning.lora):
        rows = stored[factor.name] if factor.is_routed else stored[factor.name][None]
        for name, tensor in zip(factor.theirs, rows, strict=True):
            assert torch.equal(average[name], tensor), name
            assert not torch.equal(average[name], adapter[name]), name
            compared.add(name)
    assert compared == set(average) == set(adapter)


def test_the_merged_model_computes_what_the_run_computes(exported: Path, corpus: Path, tmp_path: Path) -> None:
    """Through transformers, against base and adapter in the trainer."""
    from hunyuan_pretrain.checkpoint.generate import load_model

    tokens = torch.arange(40) * 7 % VOCAB_SIZE
    settings = {
        "tuning": {"lora": LORA},
        "checkpoint": {"init_from": str(exported / "base")},
    }
    again = experiment_of(corpus, exported / "whole", Layout(model="dropless"), **settings)
    (ours,) = fork_ranks(1, logits_of, again, tokens.tolist())
    with torch.no_grad():
        theirs = load_model(exported / "merged")(tokens[None]).logits[0]
    torch.testing.assert_close(theirs, torch.tensor(ours), rtol=1e-3, atol=1e-4)


def logits_of(experiment: Experiment, tokens: list[int]) -> list[list[float]]:
    from hunyuan_pretrain.model.inputs import ModelInputs
    from hunyuan_pretrain.train import setup

    run = setup.prepare(experiment)
    with setup.left_at_the_end(run), torch.no_grad():
        stage = experiment.stages[0]
        inputs = ModelInputs(torch.tensor(tokens), torch.arange(len(tokens)), [0, len(tokens)], stage.rope_alpha)
        return run.chunks[0](inputs)[0].tolist()


def test_a_run_starts_from_an_adapter_and_writes_the_same_one(exported: Path, corpus: Path, tmp_path: Path) -> None:
    tuning: dict[str, Any] = {"lora": LORA | {"adapter": str(exported / "adapter")}}
    settings = {"tuning": tuning, "checkpoint": {"init_from": str(exported / "base")}}
    experiment = experiment_of(corpus, tmp_path / "again", Layout(tp=2, model="dropless"), **settings)
    found = fork_ranks(2, adapters_of, experiment)
    expected = weights(exported / "whole")
    assert json.loads((exported / "adapter/adapter_config.json").read_text())["lora_dropout"] == 0.1
    for parts in found:
        for name, (values, where) in parts.items():
            assert torch.equal(torch.tensor(values), expected[name][where].reshape(-1)), name
    other = {"lora": {**tuning["lora"], "alpha": 16}}
    wrong = experiment_of(corpus, tmp_path / "wrong", Layout(model="dropless"), **(settings | {"tuning": other}))
    (refused,) = fork_ranks(1, error_of, wrong)
    assert "lora_alpha=8, but this run has 16" in refused


def adapters_of(experiment: Experiment) -> dict[str, tuple[list[float], tuple[slice, ...]]]:
    from hunyuan_pretrain.train import setup

    run = setup.prepare(experiment)
    with setup.left_at_the_end(run):
        placements = run.chunks[0].placements()
        return {
            name: (value.detach()[part.local].reshape(-1).tolist(), part.whole)
            for name, value in run.chunks[0].named_parameters()
            if ".adapter." in name
            for part in placements[name].parts
        }


def test_peft_reads_the_adapter_and_computes_the_merged_model(exported: Path) -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed: the names and formulas above are tested alone")
    from hunyuan_pretrain.checkpoint.generate import load_model

    adapted = peft.PeftModel.from_pretrained(load_model(exported / "base_export"), exported / "adapter")
    loaded = {name for name, _ in adapted.named_parameters() if "lora_" in name}
    assert len(loaded) == len(StoredTensors(exported / "adapter", WEIGHTS))
    theirs = adapted.merge_and_unload().state_dict()
    for name, tensor in load_model(exported / "merged").state_dict().items():
        torch.testing.assert_close(theirs[name], tensor, rtol=1e-6, atol=1e-6)
