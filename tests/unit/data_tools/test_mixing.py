"""`hunyuan-data mix`, `where` and `verify`: what a run will read, what it has read, and whether that data still exists
unchanged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from data_tools.mixing import context_of
from data_tools.packed_output import pack
from data_tools.tokenization import tokenize
from hunyuan_pretrain.config.load import load_experiment
from hunyuan_pretrain.data.errors import DataFormatError
from hunyuan_pretrain.data.loader import StepLoader
from hunyuan_pretrain.data.packed_dataset import PackedDataset
from hunyuan_pretrain.plan.new_experiment import Request, new_experiment, write_new
from tests.helpers.commands import run_data

LENGTH = 64


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Any:
    """command(arguments): exit code, stdout and stderr of `hunyuan-data`."""

    def run(*arguments: object) -> tuple[int, str, str]:
        code = run_data(*arguments)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


@pytest.fixture
def experiment(tmp_path: Path, tokenizer_folder: str) -> Path:
    """An experiment of two stages over long and short documents of one corpus, packed separately."""
    lines = [{"text": f"the text {number} " * (1 + (number % 7) ** 2)} for number in range(200)]
    (tmp_path / "corpus.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    tokenize([str(tmp_path / "corpus.jsonl")], tokenizer_folder, str(tmp_path / "tokens"), shard_bytes=5000)
    pack([str(tmp_path / "tokens")], LENGTH, str(tmp_path / "short"), seed=1, max_document_tokens=LENGTH)
    pack([str(tmp_path / "tokens")], LENGTH, str(tmp_path / "long"), seed=1, min_document_tokens=LENGTH + 1)
    data = [
        {"path": str(tmp_path / "short"), "weight": 3},
        {"path": str(tmp_path / "long"), "weight": 1, "max_epochs": 2},
    ]
    stage = {"sequence_length": LENGTH, "global_batch_sequences": 8, "lr_end": 1.0, "data": data}
    fields = {
        "name": "mixed",
        "run_dir": str(tmp_path / "run"),
        "tokenizer": tokenizer_folder,
        "model": {
            "num_layers": 2,
            "hidden_size": 8,
            "num_attention_heads": 2,
            "num_query_groups": 1,
            "ffn_hidden_size": 8,
            "num_moe_experts": 2,
            "padded_vocab_size": 512,
            "moe_routing_group_tokens": LENGTH,
        },
        "optimizer": {"lr": 1e-3},
        "parallel": {"world_size": 2},
        "stages": [
            {**stage, "name": "one", "tokens": LENGTH * 8 * 10},
            {**stage, "name": "two", "tokens": LENGTH * 8 * 5},
        ],
    }
    (tmp_path / "x.yaml").write_text(yaml.safe_dump(fields))
    return tmp_path / "x.yaml"


def test_packing_by_document_length_splits_the_corpus(experiment: Path) -> None:
    short, long = (PackedDataset(experiment.parent / name).index.manifest for name in ("short", "long"))
    assert short["options"]["left_out_documents"] + long["options"]["left_out_documents"] == 200
    assert short["cut_documents"] == 0
    assert long["cut_documents"] == 200 - long["options"]["left_out_documents"]
    with pytest.raises(DataFormatError, match=r"no document has 99999 or more tokens; they have \d+ to \d+"):
        pack(
            [str(experiment.parent / "tokens")],
            LENGTH,
            str(experiment.parent / "none"),
            seed=1,
            min_document_tokens=99999,
        )
    with pytest.raises(DataFormatError, match="--max-document-tokens 5: less than --min-document-tokens 9"):
        pack([str(experiment.parent / "tokens")], LENGTH, "none", seed=1, min_document_tokens=9, max_document_tokens=5)


def test_context_is_counted_token_by_token() -> None:
    lengths = np.array([1, 5, 8, 8, 3], dtype=np.uint16)
    seen = np.concatenate([np.arange(length) for length in lengths])
    bins, total = context_of(lengths)
    expected = [
        (seen == 0).sum(),
        (seen == 1).sum(),
        ((seen >= 2) & (seen < 4)).sum(),
        ((seen >= 4) & (seen < 8)).sum(),
    ]
    assert bins.tolist()[:4] == expected
    assert bins.sum() == len(seen)
    assert total == seen.sum()


def test_mix_predicts_what_the_steps_read(command: Any, experiment: Path) -> None:
    out = experiment.parent / "mix"
    code, printed, errors = command("mix", experiment, "--output", out)
    assert (code, errors) == (0, "")
    report = json.loads((out / "mix.json").read_text())
    assert (out / "mix.png").read_bytes().startswith(b"\x89PNG")
    loader = StepLoader(load_experiment(experiment), 0, 1, None)
    try:
        for number, stage in enumerate(report["stages"]):
            counted = {source["path"]: 0 for source in stage["sources"]}
            for step in range(15):
                if loader.order.schedule.stage_of_step(step)[0] == number:
                    for dataset, _ in loader.order.sequences(step, np.arange(8)):
                        counted[str(dataset.index.folder)] += 1
            assert counted == {source["path"]: source["sequences"] for source in stage["sources"]}
            shares = [source["share"] for source in stage["sources"]]
            assert shares == pytest.approx([0.75, 0.25], abs=1 / 80)
            assert sum(stage["context"]["tokens"]) == pytest.approx(stage["tokens"], rel=1e-3)
            assert stage["balance"]["data_parallel_size"] == 2
            assert stage["balance"]["slowdown"]["dealt"] <= stage["balance"]["slowdown"]["as it stands"]
    finally:
        loader.close()
    assert "one: 10 steps, 64 tokens per sequence" in printed
    code, _, errors = command("mix", experiment, "stages.0.tokens=1000000")
    assert code == 2
    assert "would have been read" in errors
    assert "max_epochs is 2" in errors


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "stages.0.data.0.weight=0",
            "stages.0.data.0.weight=0: must be greater than 0 (typical: 0.1 to 1; leave out a source that",
        ),
        ("stages.0.data.1.weight=-1", "stages.0.data.1.weight=-1: must be greater than 0"),
        ("stages.0.data.1.weight=.nan", "stages.0.data.1.weight=nan: must be a finite number"),
        ("stages.0.data=[]", "stages.0.data=[]: must not be empty"),
        (
            "stages.0.data.1.weight=1e-9",
            "long has weight 1e-09 of 3, which gives it none of the stage's 80 sequences; remove it or give it a",
        ),
        ("stages.0.tier_weights={a: 0}", "stages.0.tier_weights.a=0: must be greater than 0"),
        ("stages.0.tier_weights={a: 1}", "stages.0.data.0.tier=null: not in tier_weights (which has a)"),
        ("stages.0.data.1.max_epochs=0.01", "long would have been read 0."),
        (
            "stages.1.sequence_length=128",
            "short: packed to sequences of 64 tokens, but stages[1] (two) has sequence_length=128; set it to 64",
        ),
        ("stages.0.data.1.path=tokens", "tokens: no such folder; write it with `hunyuan-data pack`"),
        ("model.padded_vocab_size=256", "but model.padded_vocab_size=256; set it to at least 47"),
        ("seed=99999999999999999999", "seed=99999999999999999999: must be less than or equal to 9223372036854775808"),
    ],
)
def test_unfit_mixtures_are_one_message(command: Any, experiment: Path, override: str, message: str) -> None:
    before = {path.name for path in experiment.parent.iterdir()}
    code, printed, errors = command("mix", experiment, override, "--output", experiment.parent / "mix")
    assert (code, printed) == (2, "")
    assert errors.startswith("hunyuan-data: ")
    assert message in errors
    assert {path.name for path in experiment.parent.iterdir()} == before


def test_a_folder_that_is_not_a_run_is_refused(command: Any, experiment: Path) -> None:
    code, _, errors = command("where", experiment.parent / "short", "--step", 1)
    assert code == 2
    assert errors.endswith(
        "short: not a run directory (no resolved.yaml); give the run_dir of a run that has started, or its YAML\n"
    )


def test_where_names_the_documents_whose_tokens_were_in_the_batch(
    command: Any, experiment: Path, tokenizer_folder: str
) -> None:
    from hunyuan_pretrain.data.tokenizer import Tokenizer

    tokenizer = Tokenizer.load(tokenizer_folder)
    loader = StepLoader(load_experiment(experiment), 0, 1, None)
    for step in (1, 12):
        code, printed, _ = command("where", experiment, "--step", step, "--json")
        assert code == 0
        sequences = [json.loads(line) for line in printed.splitlines()]
        assert [sequence["place"] for sequence in sequences] == list(range(8))
        tokens = [batch.tokens_T.tolist() for batch in loader.micro_batches(step - 1)]
        for sequence in sequences:
            for piece in sequence["pieces"]:
                text = json.loads(Path(piece["file"]).read_bytes()[piece["place"] :].split(b"\n")[0])["text"]
                document = tokenizer.encode_document(text).tolist()
                begin = piece["first_token"]
                found = tokens[sequence["place"]][piece["position"] : piece["position"] + piece["tokens"]]
                assert found == document[begin : begin + piece["tokens"]]
    loader.close()
    assert "stage two, step 2 of its data" in command("where", experiment, "--step", 12, "--place", 3)[1]
    for arguments, message in (
        (("--step", 99), "--step 99: the run has the steps 1 to 15"),
        (("--step", 1, "--place", 8), "--place 8: the global batch has the positions 0 to 7"),
    ):
        code, _, errors = command("where", experiment, *arguments)
        assert code == 2
        assert message in errors


def test_verify_names_every_file_that_differs_or_is_missing(command: Any, experiment: Path) -> None:
    folder = experiment.parent
    code, printed, _ = command("verify", experiment)
    assert code == 0
    assert "files have the SHA-256 of their manifests" in printed
    changed = folder / "tokens" / "shard_00001.bin"
    content = bytearray(changed.read_bytes())
    content[5] ^= 1
    changed.write_bytes(content)
    (folder / "long" / "cost_order.npy").write_bytes((folder / "long" / "cost_order.npy").read_bytes() + b"x")
    code, _, errors = command("verify", folder / "short", folder / "long")
    assert code == 2
    assert "shard_00001.bin: SHA-256" in errors
    assert "cost_order.npy: SHA-256" in errors
    code, _, errors = command("verify", folder)
    assert code == 2
    assert "manifest.json: missing" in errors


def test_epochs_of_documents_are_counted_across_sequence_lengths(command: Any, experiment: Path) -> None:
    """Two packs of one corpus, with sequence lengths 64 and 128, hold the same documents; `mix` says so, and a cap
    counts both."""
    folder = experiment.parent
    for length in (LENGTH, 2 * LENGTH):
        pack([str(folder / "tokens")], length, str(folder / f"all{length}"), seed=1, materialize=length == 128)
    sizes = [len(PackedDataset(folder / f"all{length}")) // 8 * 8 for length in (64, 128)]
    overrides = []
    for number, (length, sequences) in enumerate(zip((64, 128), sizes, strict=True)):
        data = f"[{{path: {folder}/all{length}, max_epochs: MAX}}]".replace("MAX", "1" if number else "null")
        overrides += [f"stages.{number}.data={data}", f"stages.{number}.sequence_length={length}"]
        overrides += [f"stages.{number}.tokens={length * sequences}"]
    overrides += ["model.moe_routing_group_tokens=64"]
    code, _, errors = command("mix", experiment, *overrides)
    assert code == 2
    assert f"stage two: {folder}/all128: documents of {folder}/tokens would have been read 1.9" in errors
    assert "max_epochs is 1" in errors
    code, printed, errors = command(
        "mix", experiment, *overrides, f"stages.1.data=[{{path: {folder}/all128, max_epochs: 2}}]"
    )
    assert (code, errors) == (0, "")
    assert "of 2 (one at most 2)" in " ".join(printed.split())


def test_an_experiment_of_init_reads_the_data_it_was_given(experiment: Path, command: Any, tmp_path: Path) -> None:
    """From one packed dataset to a mixture, with nothing edited."""
    packed, output = tmp_path / "packed", tmp_path / "my.yaml"
    pack([str(experiment.parent / "tokens")], 512, str(packed), seed=1)
    write_new(output, new_experiment(Request("tiny", 1, "h100", packed, "4M", output)))
    assert command("mix", output)[::2] == (0, "")
    folder = tmp_path / "report"
    assert command("mix", output, "--output", folder)[0] == 0
    stages = json.loads((folder / "mix.json").read_text())["stages"]
    assert [stage["name"] for stage in stages] == ["warmup", "decay", "anneal"]
    assert [[source["path"] for source in stage["sources"]] for stage in stages] == [[str(packed)]] * 3
