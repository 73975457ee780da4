"""`hunyuan-pretrain init`: what it writes loads, plans without warnings and says what it means; what it cannot write it
refuses in one message, and writes nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

from hunyuan_pretrain.config.errors import ConfigError
from hunyuan_pretrain.config.load import load_experiment
from hunyuan_pretrain.config.rules import find_warnings
from hunyuan_pretrain.config.schema import Experiment
from hunyuan_pretrain.config.values import token_count
from hunyuan_pretrain.plan import new_experiment as module
from hunyuan_pretrain.plan.choice import fits
from hunyuan_pretrain.plan.hardware import load
from hunyuan_pretrain.plan.new_experiment import Request, count_text, new_experiment, write_new
from hunyuan_pretrain.plan.summary import summarise


def request(folder: Path, **changes: object) -> Request:
    fields = {"size": "300m", "gpus": 1, "hardware": "h100", "data": folder / "data", "tokens": "20B"}
    return Request(**{**fields, "output": folder / "my.yaml", **changes})  # type: ignore[arg-type]


def written(folder: Path, **changes: object) -> Experiment:
    wanted = request(folder, **changes)
    write_new(wanted.output, new_experiment(wanted))
    return load_experiment(wanted.output)


def refusal(folder: Path, **changes: object) -> str:
    with pytest.raises(ConfigError) as caught:
        written(folder, **changes)
    return str(caught.value)


@pytest.mark.parametrize(
    ("size", "gpus", "hardware", "tokens"),
    [
        ("tiny", 1, "h100", "100M"),
        ("tiny", 2, "H200-141GB", "100_000_000"),
        ("300m", 8, "h20", "41.3B"),
        ("7b", 8, "h100", "1T"),
        ("7b", 64, "h100", "300B"),
        ("7b", 8, "b200", "1e12"),
        ("large", 256, "h200", "7T"),
    ],
)
def test_what_it_writes_plans_without_warnings(
    tmp_path: Path, size: str, gpus: int, hardware: str, tokens: str
) -> None:
    experiment = written(tmp_path, size=size, gpus=gpus, hardware=hardware, tokens=tokens)
    assert experiment.parallel.world_size == gpus
    assert summarise(experiment)
    assert find_warnings(experiment) == []
    assert experiment.runtime.deterministic == (hardware != "b200"), "cuDNN's attention varies on Blackwell"
    assert fits(
        experiment, gpus, load({"h100": "H100-80GB", "h20": "H20-96GB", "b200": "B200"}.get(hardware, "H200-141GB"))
    )
    wanted = token_count(tokens) or int(float(tokens.replace("_", "")))
    assert sum(stage.tokens for stage in experiment.stages) == wanted
    warmup, _, anneal = experiment.stages
    assert (warmup.tokens, anneal.tokens) == (wanted // 100, wanted * 5 // 100)
    text = (tmp_path / "my.yaml").read_text()
    assert text.startswith(f"# Written by: hunyuan-pretrain init --size {size} --gpus {gpus} --hardware {hardware} ")
    settings = text.partition("\nstages:")[0].partition("\nname:")[2].splitlines()
    bare = [line for line in settings if line and not line.endswith(":") and "#" not in line]
    assert not bare, "every setting has its meaning beside it"


def test_the_model_is_the_one_of_its_size(tmp_path: Path) -> None:
    recipe = load_experiment(module.CONFIGS / "pretrain/hunyuan_300m_h100x1.yaml")
    found = written(tmp_path)
    assert found.model == recipe.model
    assert found.optimizer == recipe.optimizer
    assert [(stage.lr_end, stage.lr_shape) for stage in found.stages] == [
        (stage.lr_end, stage.lr_shape) for stage in recipe.stages
    ]
    assert [source.weight for source in found.stages[1].data] == [source.weight for source in recipe.stages[1].data]


def test_it_uses_the_roles_that_are_there(tmp_path: Path) -> None:
    for role in ("web", "code", "heldout/code"):
        (tmp_path / "data" / role).mkdir(parents=True)
    found = written(tmp_path)
    folder = str(tmp_path / "data")
    for stage in found.stages:
        assert [source.path for source in stage.data] == [f"{folder}/web", f"{folder}/code"]
        assert stage.tier_weights is None
    assert found.evaluation.paths == (f"{folder}/heldout/code",)
    assert found.tokenizer == str(tmp_path / "tokenizer"), "beside the data"


def test_tiers_stay_if_both_have_a_source(tmp_path: Path) -> None:
    for role in ("web", "high_quality", "tokenizer"):
        (tmp_path / "data" / role).mkdir(parents=True)
    found = written(tmp_path)
    assert found.stages[2].tier_weights == {"high": 0.7, "general": 0.3}
    assert found.evaluation.paths == ()
    assert found.tokenizer == str(tmp_path / "data/tokenizer"), "in the data"


def test_one_packed_dataset_is_the_only_source(tmp_path: Path) -> None:
    folder = tmp_path / "my $data"
    folder.mkdir()
    (folder / "manifest.json").write_text("{}")
    found = written(tmp_path, data=folder)
    assert {source.path for stage in found.stages for source in stage.data} == {str(folder)}


def test_all_mistakes_are_in_one_message(tmp_path: Path) -> None:
    text = refusal(tmp_path, size="70b", hardware="h1000", tokens="many")
    assert text.startswith("init: 3 problems\n")
    assert "--size=70b: unknown size (use tiny, 300m, 7b, large)" in text
    assert "--hardware=h1000: unknown hardware (did you mean H100-80GB? known: B200, " in text
    assert "--tokens=many: must be a number of tokens (10B, 1.5T, " in text
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("gpus", "hint"), [(0, "use 1"), (-8, "use 1"), (3, "use 2 or 4"), (12, "use 8 or 16"), (7, "use 4 or 8")]
)
def test_parts_of_servers_are_refused(tmp_path: Path, gpus: int, hint: str) -> None:
    assert refusal(tmp_path, gpus=gpus) == f"init: 1 problem\n  --gpus={gpus}: not whole servers of 8 ({hint})"


def test_too_few_gpus_are_refused_with_a_number_that_is_enough(tmp_path: Path) -> None:
    text = refusal(tmp_path, size="7b", gpus=1)
    assert "--gpus=1: size 7b does not fit into the memory of 1 x H100-80GB (use " in text
    enough = int(text.partition("(use ")[2].split()[0])
    assert written(tmp_path, size="7b", gpus=enough).parallel.world_size == enough


def test_too_few_tokens_are_refused_with_a_number_that_is_enough(tmp_path: Path) -> None:
    text = refusal(tmp_path, tokens="1M")
    assert "--tokens=1M: 3 steps of 1,048,576 tokens; a schedule needs at least 100 (use " in text
    enough = text.partition("(use ")[2].rstrip(")")
    assert find_warnings(written(tmp_path, tokens=enough)) == []


def test_a_file_is_never_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "my.yaml"
    path.write_text("mine")
    text = refusal(tmp_path)
    assert text.startswith("init: 1 problem\n  --output=")
    assert text.endswith("my.yaml: File exists (choose another name, or remove it)") or "...: File exists" in text
    with pytest.raises(ConfigError, match="File exists"):
        write_new(path, "text")  # created in the meantime
    assert path.read_text() == "mine"
    assert "--output=" in refusal(tmp_path, output=tmp_path / "nowhere" / "my.yaml")


def test_a_failed_write_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "my.yaml"
    monkeypatch.setattr(Path, "open", lambda *_, **__: FullDisk(path))
    with pytest.raises(ConfigError, match="No space left on device"):
        write_new(path, "text")
    assert not path.exists()


class FullDisk:
    """A file that is created, but takes no text."""

    def __init__(self, path: Path) -> None:
        path.touch()

    def __enter__(self) -> FullDisk:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def write(self, text: str) -> None:
        raise OSError(28, "No space left on device")


def test_without_the_repository_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CONFIGS", tmp_path / "configs")
    assert "no such folder; init runs in a checkout of the repository" in refusal(tmp_path)


@pytest.mark.parametrize("count", [1, 4096, 282 * 10**7, 7 * 10**12, 123456789, 10**9 + 1, 65800 * 10**8])
def test_counts_of_tokens_are_exact(count: int) -> None:
    text = count_text(count)
    assert (token_count(text) or int(text)) == count
