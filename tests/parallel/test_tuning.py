"""Fine-tuning under parallel layouts equals one rank: all weights, attention only, LoRA on every linear layer, and
dropout."""

from __future__ import annotations

import json
from collections.abc import Callable
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
"""B is 0 in the first step, which hides A's gradient."""

ON_ALL = {
    "rank": 4,
    "alpha": 8,
    "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
}
TUNINGS: dict[str, dict[str, Any]] = {
    "full": {},
    "by conversation": {},
    "attention": {"trainable": ["*.self_attention.*"]},
    "lora": {"lora": ON_ALL},
    "dropout": {"lora": ON_ALL | {"dropout": 0.1}},
    "dropout with a capacity": {"lora": ON_ALL | {"dropout": 0.1}},
}
STAGES: dict[str, dict[str, Any]] = {
    "by conversation": {"loss_average": "conversations"},
    "dropout": {"hidden_dropout": 0.2, "attention_dropout": 0.1},
    "dropout with a capacity": {"routing": "model"},
}
"""Changes to the stage."""
LAYOUTS = [
    Layout(dp=2, ep=2, recompute="selective"),
    Layout(dp=2, etp=2, overlap="everything", optimizer="distributed"),
    Layout(tp=2, pp=2, micro_batch=1, recompute="swiglu+norms"),
    Layout(cp=2, recompute="cla_group"),
    Layout(tp=2, dp=2, ep=2, etp=2, overlap="everything", optimizer="distributed"),
]
CASES = [(tuning, layout) for tuning in ("full", "attention", "lora") for layout in LAYOUTS]
CASES.append(("by conversation", Layout(cp=2, dp=2, micro_batch=1)))
CASES += [("dropout", layout) for layout in LAYOUTS]
CASES += [("dropout with a capacity", layout) for layout in (LAYOUTS[0], LAYOUTS[4])]


@pytest.fixture(scope="module")
def chats(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Conversations packed to the sequence length, some of several turns, and padding."""
    from data_tools.chat import ChatForm
    from data_tools.packed_output import pack
    from data_tools.tokenization import tokenize

    folder = tmp_path_factory.mktemp("chats")
    draw = np.random.default_rng(3)
    words = [
        "import",
        "return",
        "class",
        "def",
        "value",
        "number",
        "list",
        "string",
        "for",
        "while",
        "if",
        "else",
        "None",
        "True",
    ]

    def text() -> str:
        return " ".join(draw.choice(words, draw.integers(1, 6)))

    with (folder / "chats.jsonl").open("w") as file:
        for _ in range(120):
            messages = [
                {"role": role, "content": text()} for _ in range(draw.integers(1, 3)) for role in ("user", "assistant")
            ]
            file.write(json.dumps({"messages": messages}) + "\n")
    form = ChatForm(system_prompt="Be brief.")
    tokenize([str(folder / "chats.jsonl")], str(corpus / "tokenizer"), str(folder / "tokens"), form=form)
    pack([str(folder / "tokens")], SEQUENCE_LENGTH, str(folder / "packed"), seed=1, overlong="cut_turns")
    return folder / "packed"


@pytest.fixture(scope="module")
def base(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one step, whose weights are tuned."""
    run_dir = tmp_path_factory.mktemp("base")
    experiment = Layout().experiment(corpus, run_dir, 2)
    stage = experiment.stages[0]
    (found,) = fork_ranks(1, train_here, experiment.model_copy(update={"stages": (stage,)}))
    assert found == 0
    return run_dir


def train_here(experiment: Experiment) -> int:
    from hunyuan_pretrain.train.loop import train

    return train(experiment)


def tuned(layout: Layout, corpus: Path, chats: Path, base: Path, run_dir: Path, tuning: str) -> Experiment:
    """STEPS steps of fine-tuning."""
    fields = layout.experiment(corpus, run_dir, STEPS).model_dump(mode="json")
    (first, *_) = fields["stages"]
    first |= {
        "name": "sft",
        "task": "sft",
        "tokens": STEPS * first["global_batch_sequences"] * SEQUENCE_LENGTH,
        "lr_shape": "constant",
        "data": [{"path": str(chats)}],
    } | STAGES.get(tuning, {})
    fields |= {"stages": [first], "tuning": TUNINGS[tuning]}
    fields["checkpoint"]["init_from"] = str(base)
    return Experiment.model_validate(fields)


def trace_all(experiments: list[Experiment]) -> list[Any]:
    from hunyuan_pretrain.diagnostics.parity import trace_layout

    return until_failure(experiments, lambda experiment: trace_layout(experiment, STEPS))


Traces = Callable[[str, Layout], list[Any]]


@pytest.fixture(scope="module")
def traces(corpus: Path, chats: Path, base: Path, tmp_path_factory: pytest.TempPathFactory) -> Traces:
    """Traces of a tuning under a layout; layouts of one world size share a job."""
    folder, done = tmp_path_factory.mktemp("tuned"), dict[tuple[str, Layout], Any]()
    wanted = [(tuning, Layout().reference) for tuning in TUNINGS] + CASES

    def find(tuning: str, layout: Layout) -> list[Any]:
        if (tuning, layout) not in done:
            same = [one for one in wanted if one[1].world_size == layout.world_size and one not in done]
            work = [
                tuned(one, corpus, chats, base, folder / str(len(done) + number), name)
                for number, (name, one) in enumerate(same)
            ]
            done.update(zip(same, trace_in_jobs(layout.world_size, trace_all, work), strict=True))
        found = done[tuning, layout]
        assert not isinstance(found, str), f"{tuning}, {layout}:\n{found}"
        return found

    return find


@pytest.mark.parametrize(("tuning", "layout"), CASES, ids=str)
def test_tuning_under_a_layout_equals_one_rank(traces: Traces, tuning: str, layout: Layout) -> None:
    from hunyuan_pretrain.diagnostics.parity import compare

    found = compare(traces(tuning, layout), traces(tuning, Layout().reference))
    wrong = [one for one in found if not one.is_within]
    assert not wrong, [f"{one.kind} {one.name} in step {one.step}: {one.relative:.2e}" for one in wrong[:8]]


@pytest.mark.parametrize("tuning", TUNINGS)
def test_by_the_second_step_every_trained_weight_has_moved_and_every_frozen_one_is_the_same(
    traces: Traces, tuning: str, corpus: Path, chats: Path, base: Path, tmp_path: Path
) -> None:
    experiment = tuned(Layout().reference, corpus, chats, base, tmp_path, tuning)
    (before,) = fork_ranks(1, weights_at_first, experiment)
    after = traces(tuning, Layout().reference)[1].parameters
    trained = traces(tuning, Layout().reference)[1].gradients
    assert before.keys() == after.keys()
    assert 0 < len(trained) <= len(before)
    assert (len(trained) == len(before)) == (tuning in ("full", "by conversation"))
    for name, value in after.items():
        if name in trained:
            assert (value != before[name]).any(), f"{name} has not moved"
        else:
            assert np.array_equal(value, before[name]), f"{name} is frozen and has moved"


def weights_at_first(experiment: Experiment) -> dict[str, np.ndarray]:
    from hunyuan_pretrain.train import setup

    run = setup.prepare(experiment)
    with setup.left_at_the_end(run):
        return {name: value.detach().numpy().copy() for name, value in run.chunks[0].named_parameters()}


def test_dropout_changes_the_loss(traces: Traces) -> None:
    """So that the layouts above have something to repeat."""
    without, dropped = (traces(tuning, Layout().reference)[0].scalars for tuning in ("lora", "dropout"))
    assert dropped["loss"] != pytest.approx(without["loss"], rel=1e-4)


def test_by_conversation_is_the_mean_of_each_conversation(traces: Traces) -> None:
    """Another mean of the same cross-entropies: the answers differ in length."""
    tokens, conversations = (traces(tuning, Layout().reference)[0].scalars for tuning in ("full", "by conversation"))
    assert tokens["target_tokens"] == conversations["target_tokens"]
    assert tokens["loss"] != pytest.approx(conversations["loss"], rel=1e-4)
    assert tokens["loss"] == pytest.approx(conversations["loss"], rel=0.1)
