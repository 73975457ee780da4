"""The shipped recipes are legal, fit their GPUs, keep the report's proportions, and are listed in configs/README.md."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import yaml

from hunyuan_pretrain.config.attention import DETERMINISTIC_SCORES
from hunyuan_pretrain.config.derived import grid
from hunyuan_pretrain.config.load import load_experiment
from hunyuan_pretrain.config.recipe import RECIPES as FP8_RECIPES
from hunyuan_pretrain.config.rules import find_warnings
from hunyuan_pretrain.config.schema import Experiment, StageConfig
from hunyuan_pretrain.diagnostics.scaling_laws import Observation, ScalingError, require_spread
from hunyuan_pretrain.plan.choice import fits, highest_peak
from hunyuan_pretrain.plan.costs import run_costs
from hunyuan_pretrain.plan.counts import parameters
from hunyuan_pretrain.plan.summary import summarise
from hunyuan_pretrain.plan.timing import step_time
from tests.helpers.recipes import BASES, CONFIGS, FOLDERS, RECIPES, named_hardware

EXPERIMENTS = {path: load_experiment(path) for path in RECIPES}
each_recipe = pytest.mark.parametrize("path", RECIPES, ids=[path.stem for path in RECIPES])
COLUMNS = (
    "recipe",
    "parameters, active",
    "tokens",
    "GPUs",
    "layout",
    "global batch",
    "micro-batch",
    "recompute",
    "memory per GPU",
    "planned step",
    "planned days",
)


@each_recipe
def test_a_recipe_is_legal_and_plans_without_warnings(path: Path) -> None:
    experiment, (_, gpus) = EXPERIMENTS[path], named_hardware(path)
    assert experiment.parallel.world_size == gpus
    assert summarise(experiment)
    assert find_warnings(experiment) == []


@each_recipe
def test_a_recipe_fits_with_room_to_spare(path: Path) -> None:
    """5% of the memory of each GPU, for what the plan leaves out; and on the host."""
    (hardware, gpus), experiment = named_hardware(path), EXPERIMENTS[path]
    assert fits(experiment, gpus, hardware), highest_peak(experiment, gpus)


@each_recipe
def test_a_recipe_writes_where_its_name_says(path: Path) -> None:
    experiment = EXPERIMENTS[path]
    assert experiment.name == path.stem
    assert experiment.run_dir == f"runs/{path.stem}"


@each_recipe
def test_fp8_is_the_one_for_the_gpu(path: Path) -> None:
    precision, (hardware, _) = EXPERIMENTS[path].precision, named_hardware(path)
    assert (precision.fp8_recipe is not None) == path.stem.endswith("_fp8")
    if precision.fp8_recipe is not None:
        capability = (9, 0) if hardware.peak_mxfp8_flops_per_s is None else (10, 0)
        assert FP8_RECIPES[precision.fp8_recipe].missing(capability, (12, 9)) is None
        assert (precision.fp8_recipe == "mxfp8") == (capability == (10, 0))


@each_recipe
def test_cudnn_may_compute_attention(path: Path) -> None:
    """Where cuDNN's backward pass is not deterministic, on Blackwell and for long documents, the recipe does not ask
    for it."""
    experiment, (hardware, _) = EXPERIMENTS[path], named_hardware(path)
    is_long = any(stage.sequence_length**2 >= DETERMINISTIC_SCORES for stage in experiment.stages)
    is_blackwell = hardware.peak_mxfp8_flops_per_s is not None
    assert experiment.runtime.deterministic == (not is_long and not is_blackwell)


@each_recipe
def test_tensor_parallel_ranks_share_a_server(path: Path) -> None:
    hardware, _ = named_hardware(path)
    assert hardware.nvlink_domain_gpus % EXPERIMENTS[path].parallel.tensor_model_parallel_size == 0


def share(stage: StageConfig, *roles: str) -> float:
    """Of the stage's tokens, from sources whose folders have these names."""
    tiers = stage.tier_weights or {}
    totals = {
        tier: sum(one.weight for one in stage.data if one.tier == tier) for tier in {one.tier for one in stage.data}
    }
    weights = {None: 1.0} | {tier: weight / sum(tiers.values()) for tier, weight in tiers.items()}
    return sum(weights[one.tier] * one.weight / totals[one.tier] for one in stage.data if Path(one.path).name in roles)


AT_4K = [path for path in RECIPES if path.parent.name != "longctx"]


@pytest.mark.parametrize("path", AT_4K, ids=[path.stem for path in AT_4K])
def test_the_recipe_of_the_report_at_4k(path: Path) -> None:
    """Warmup, decay, and the last 5% of the tokens down to a tenth of the peak; 1.5 of 7 tokens are synthetic; the rule
    for the peak."""
    experiment = EXPERIMENTS[path]
    warmup, decay, anneal = experiment.stages
    assert [stage.name for stage in experiment.stages] == ["warmup", "decay", "anneal"]
    total = sum(stage.tokens for stage in experiment.stages)
    assert anneal.tokens / total == pytest.approx(0.05, rel=0.03)
    assert warmup.tokens / total == pytest.approx(0.01, rel=0.03)
    assert (warmup.lr_end, anneal.lr_end, experiment.optimizer.expert_lr_ratio) == (1.0, 0.1, 0.31)
    assert share(decay, "synthetic") == pytest.approx(1.5 / 7, abs=0.001)
    assert share(anneal, "high_quality", "synthetic") == pytest.approx(0.7)
    assert experiment.optimizer.lr == pytest.approx(1e-3 * math.sqrt(256 / experiment.model.hidden_size), rel=0.02)


def optimal_tokens(experiment: Experiment) -> float:
    """The report's law (2.3): N = 5.9e-3 C^0.5305, D = 3.2 C^0.5."""
    compute = (parameters(experiment.model).active / 5.9e-3) ** (1 / 0.5305)
    return float(3.2 * compute**0.5)


def test_the_ladder_follows_the_law_of_the_report() -> None:
    """But for two runs that leave its line, without which loss(N, D) could not be fitted."""
    ladder = [EXPERIMENTS[path] for path in RECIPES if path.parent.name == "ladder"]
    off_the_law = {"ladder_82m_4x_h100x8": 4, "ladder_315m_quarter_h100x8": 1 / 4}
    runs = []
    for experiment in ladder:
        active = parameters(experiment.model).active
        assert 10e6 < active < 1e9, "the range of the report's fit"
        assert f"_{active / 1e6:.0f}m_" in experiment.name
        total = sum(stage.tokens for stage in experiment.stages)
        assert total == pytest.approx(optimal_tokens(experiment) * off_the_law.get(experiment.name, 1), rel=0.01)
        batch = experiment.stages[0].global_batch_tokens
        runs.append(Observation(experiment.name, active, total, float("nan"), experiment.optimizer.lr, batch))
    assert len(runs) == 7
    assert len({run.n for run in runs}) == 5
    require_spread(runs)
    with pytest.raises(ScalingError, match="at least 6 are needed"):
        require_spread([run for run in runs if run.name not in off_the_law])
    kept = ("num_moe_experts", "moe_router_topk", "padded_vocab_size", "moe_aux_loss_coeff", "cla_share_factor")
    assert len({tuple(getattr(experiment.model, name) for name in kept) for experiment in ladder}) == 1
    assert len({tuple(source.path for source in experiment.stages[1].data) for experiment in ladder}) == 1


def test_large_is_the_report_s_run() -> None:
    large = [EXPERIMENTS[path] for path in RECIPES if path.stem.startswith("hunyuan_large") and path in AT_4K]
    assert len(large) == 8
    for experiment in large:
        assert sum(stage.tokens for stage in experiment.stages) == 7 * 10**12
        assert experiment.optimizer.lr == 2e-4
        assert [stage.global_batch_sequences for stage in experiment.stages] == [1024, 4096, 4096]


LONG = [path for path in RECIPES if path.parent.name == "longctx"]


@pytest.mark.parametrize("path", LONG, ids=[path.stem for path in LONG])
def test_a_long_stage_starts_from_the_recipe_before_it(path: Path) -> None:
    """From the same model, GPUs and number format; about 10B tokens, a quarter of them long text; at the rate at which
    annealing ended."""
    experiment = EXPERIMENTS[path]
    before = {other.run_dir: other for other in EXPERIMENTS.values()}[str(experiment.checkpoint.init_from)]
    assert experiment.model == before.model
    assert experiment.parallel.world_size == before.parallel.world_size
    assert experiment.precision == before.precision
    length = experiment.stages[-1].sequence_length
    assert {4096: 32768, 32768: 262144}[before.stages[-1].sequence_length] == length
    assert {32768: 50, 262144: 1e5}[length] == experiment.stages[-1].rope_alpha
    assert sum(stage.tokens for stage in experiment.stages) == 10**10
    for stage in experiment.stages:
        assert share(stage, "books", "code_repositories") == pytest.approx(0.25)
        assert stage.balance_attention == "deal"
    assert experiment.optimizer.lr * experiment.stages[-1].lr_end == pytest.approx(
        before.optimizer.lr * before.stages[-1].lr_end
    )


@each_recipe
def test_data_is_packed_to_the_length_of_its_stage(path: Path) -> None:
    experiment = EXPERIMENTS[path]
    folder = f"data/{experiment.stages[0].sequence_length // 1024}k"
    for stage in experiment.stages:
        assert {str(Path(source.path).parent) for source in stage.data} == {folder}
    assert {str(Path(one).parent) for one in experiment.evaluation.paths} == {f"{folder}/heldout"}


@each_recipe
def test_a_failure_costs_little(path: Path) -> None:
    """Less than four hours between checkpoints, and five validations or more in a run, by the plan."""
    (hardware, gpus), experiment = named_hardware(path), EXPERIMENTS[path]
    seconds = step_time(experiment, experiment.stages[-1], gpus, hardware).seconds
    assert experiment.checkpoint.save_every_steps is not None
    assert experiment.checkpoint.save_every_steps * seconds < 4 * 3600
    steps = sum(stage.num_steps for stage in experiment.stages)
    assert steps // experiment.evaluation.every_steps >= 5


def test_every_base_is_used() -> None:
    used = set()
    for path in (*RECIPES, *BASES, *(CONFIGS / "sft").glob("*.yaml")):
        text = path.read_text(encoding="utf-8")
        base = yaml.safe_load(text).get("base", [])
        used |= {(path.parent / name).resolve() for name in ([base] if isinstance(base, str) else base)}
    assert set(BASES) <= used


def row(path: Path) -> str:
    """The line of a recipe in the table of configs/README.md."""
    experiment, (hardware, gpus) = EXPERIMENTS[path], named_hardware(path)
    count, costs = parameters(experiment.model), run_costs(experiment, gpus, hardware)
    stage, tokens = experiment.stages[-1], sum(stage.tokens for stage in experiment.stages)
    need, last = highest_peak(experiment, gpus), costs[-2].step
    assert last is not None
    memory = f"{need.total / 2**30:.0f} of {hardware.memory_bytes / 2**30:.0f} GiB"
    cells = (
        f"[{path.parent.name}/{path.name}]({path.parent.name}/{path.name})",
        f"{count_text(count.total)}, {count_text(count.active)}",
        count_text(tokens),
        f"{gpus:,} x {hardware.name}",
        layout_text(experiment, gpus),
        f"{stage.global_batch_sequences:,}",
        f"{stage.micro_batch_sequences} x {stage.sequence_length:,}",
        experiment.parallel.recompute,
        memory,
        f"{two_digits(last.seconds)} s",
        two_digits(costs[-1].days),
    )
    return f"| {' | '.join(cells)} |"


def layout_text(experiment: Experiment, gpus: int) -> str:
    """The axes whose product is the number of ranks; expert parallelism takes its ranks from inside the others."""
    ranks, chunks = grid(experiment.parallel, gpus), experiment.parallel.virtual_pipeline_model_parallel_size
    sizes = {"TP": ranks.tp, "PP": ranks.pp, "CP": ranks.cp, "DP": ranks.dp}
    assert math.prod(sizes.values()) == gpus
    axes = " x ".join(f"{name} {size}" for name, size in sizes.items() if size > 1) or "one rank"
    inside = f", EP {ranks.ep} inside" if ranks.ep > 1 else ""
    return axes + inside + (f"; VPP {chunks}" if chunks > 1 else "")


def two_digits(number: float) -> str:
    """As exact as the plan can be."""
    return f"{float(f'{number:.2g}'):g}"


def count_text(number: float) -> str:
    """389B, 7T, 42M."""
    power, suffix = next((power, suffix) for power, suffix in ((12, "T"), (9, "B"), (6, "M")) if number >= 10**power)
    digits = number / 10**power
    return f"{digits:.0f}{suffix}" if digits >= 10 else f"{round(digits, 1):g}{suffix}"


def size_of(path: Path) -> tuple[int, int, int, int, str]:
    """Folder, active parameters, sequence length, tokens: the order of the table."""
    experiment = EXPERIMENTS[path]
    active, length = parameters(experiment.model).active, experiment.stages[-1].sequence_length
    tokens = sum(stage.tokens for stage in experiment.stages)
    return FOLDERS.index(path.parent.name), active, length, tokens, path.stem


def table() -> list[str]:
    rows = [row(path) for path in sorted(RECIPES, key=size_of)]
    return [f"| {' | '.join(COLUMNS)} |", "|" + "---|" * len(COLUMNS), *rows]


def test_the_table_of_recipes_is_what_the_plan_says() -> None:
    text, expected = (CONFIGS / "README.md").read_text(encoding="utf-8"), "\n".join(table())
    assert f"\n\n{expected}\n\n" in text, f"the table should be:\n{expected}"
