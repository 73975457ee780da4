"""A user's mistakes, through the real commands: one message that says what is wrong, exit status 2, nothing
half-written."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.runs import ROOT, VOCAB_SIZE, experiment_fields, run, run_forked, write_experiment


def data(*arguments: object) -> tuple[int, str, str]:
    """`hunyuan-data ...`: exit status, stdout, stderr."""
    command = [sys.executable, "-m", "data_tools.cli", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120, check=False)
    return done.returncode, done.stdout, done.stderr


def assert_refused(result: tuple[int, str, str], *words: object) -> None:
    """Assert exit status 2, all of `words` in stderr and the first of them once, no traceback, and nothing on
    stdout."""
    code, out, err = result
    assert code == 2, f"exit status {code}\n{out}{err}"
    assert "Traceback" not in err
    assert err.count(str(words[0])) == 1, err
    for word in words:
        assert str(word) in err, err
    assert out == ""


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def missing_corpus(folder: Path) -> tuple[Path, list[str]]:
    return folder / "nothing.txt", ["nothing.txt"]


def empty_corpus(folder: Path) -> tuple[Path, list[str]]:
    (folder / "empty").mkdir()
    return folder / "empty", [str(folder / "empty")]


def binary_file(folder: Path) -> tuple[Path, list[str]]:
    (folder / "picture.txt").write_bytes(bytes(range(256)) * 4)
    return folder / "picture.txt", ["picture.txt", "UTF-8"]


def invalid_json_line(folder: Path) -> tuple[Path, list[str]]:
    (folder / "bad.jsonl").write_text('{"text": "fine"}\n{"text": "cut\n')
    return folder / "bad.jsonl", ["bad.jsonl: line 2: invalid JSON"]


def json_without_the_field(folder: Path) -> tuple[Path, list[str]]:
    (folder / "other.jsonl").write_text('{"content": "not under text"}\n')
    return folder / "other.jsonl", ["other.jsonl: line 1: no field 'text' (fields: content)"]


@pytest.mark.parametrize(
    "mistake", [missing_corpus, empty_corpus, binary_file, invalid_json_line, json_without_the_field]
)
@pytest.mark.parametrize("command", ["train-tokenizer", "tokenize"])
def test_unfit_corpus(corpus, tmp_path, command, mistake):
    inputs, words = mistake(tmp_path)
    before = names(tmp_path)
    options = ["--vocab-size", 500] if command == "train-tokenizer" else ["--tokenizer", corpus / "tokenizer"]
    assert_refused(data(command, inputs, "--output", tmp_path / "out", *options), *words)
    assert names(tmp_path) == before, "nothing is left behind"


def test_unfit_packing(corpus, tmp_path):
    refused = data("pack", corpus / "texts", "--sequence-length", 64, "--output", tmp_path / "out")
    assert_refused(refused, corpus / "texts", "manifest.json")
    assert_refused(
        data("pack", corpus / "tokenized", "--sequence-length", 64, "--output", corpus / "train"),
        "already there",
        "--overwrite",
    )
    assert names(tmp_path) == set()


CONFIG_MISTAKES: dict[str, tuple[list[str], list[str]]] = {
    "wrong key": (["optimizer.lrr=1"], ["optimizer.lrr=1: unknown key (did you mean optimizer.lr?)"]),
    "wrong type": (["model.num_layers=four"], ["model.num_layers=four: must be a valid integer"]),
    "experts over ranks": (
        ["parallel.expert_model_parallel_size=3", "stages.0.global_batch_sequences=6"],
        ["parallel.expert_model_parallel_size=3: 4 experts, 4 % 3 != 0 (use 2 or 4)"],
    ),
    "a layout that fits in nothing": (
        [
            "parallel.tensor_model_parallel_size=8",
            "parallel.pipeline_model_parallel_size=4",
            "parallel.context_parallel_size=3",
            "parallel.expert_model_parallel_size=3",
        ],
        [
            "parallel.expert_model_parallel_size=3: 4 experts, 4 % 3 != 0 (use 2 or 4)",
            "parallel.tensor_model_parallel_size=8: must divide the model: num_attention_heads 4 % 8 != 0, "
            "num_query_groups 2 % 8 != 0 (use 2)",
            "parallel.sequence_parallel=false: 8 tensor-parallel ranks would route the same tokens to the "
            "experts (set true)",
            "parallel.pipeline_model_parallel_size=4: 4 layers in CLA groups of 2 = 2 groups, not divisible by 4 ranks "
            "(use 2 stages, or set parallel.pipeline_layout)",
            "stages.0.sequence_length=64: 3 context-parallel ranks cannot share 2 routing groups of 32 tokens evenly",
        ],
    ),
    "several at once": (
        ["model.num_layers=5", "model.num_query_groups=3"],
        [": 2 problems", "model.num_layers=5: CLA groups of 2", "model.num_query_groups=3: 4 heads"],
    ),
    "not an override": (["seed"], ["seed: is not an override (write dotted.path=value"]),
}


def flip_a_bit(file: Path) -> None:
    """Flip a bit of the first id."""
    content = file.read_bytes()
    file.write_bytes(bytes([content[0] ^ 1]) + content[1:])


def config(tmp_path: Path, corpus: Path, **changes: Any) -> Path:
    return write_experiment(tmp_path / "x.yaml", experiment_fields(corpus, tmp_path / "run", **changes))


@pytest.mark.parametrize(("overrides", "words"), CONFIG_MISTAKES.values(), ids=CONFIG_MISTAKES)
def test_unfit_experiment(corpus, tmp_path, overrides, words):
    assert_refused(run("train", config(tmp_path, corpus), *overrides), *words)
    assert names(tmp_path) == {"x.yaml"}


def test_missing_and_unreadable_experiment_file(tmp_path):
    assert_refused(run("train", tmp_path / "x.yaml"), f"{tmp_path}/x.yaml: 1 problem", "No such file or directory")
    (tmp_path / "x.yaml").write_text("name: [1\n")
    assert_refused(run("train", tmp_path / "x.yaml"), "is not valid YAML", "x.yaml:2")


def test_wrong_number_of_ranks_is_one_message_under_torchrun(corpus, tmp_path):
    code, _, err = run("train", config(tmp_path, corpus, parallel={"world_size": 4}), ranks=2)
    assert code != 0
    assert (
        err.count("parallel.world_size=4: the job has 2 ranks (start 4 ranks, or set parallel.world_size to 2 or null)")
        == 1
    ), err
    assert "hunyuan_pretrain/" not in err, "no traceback of ours"
    assert names(tmp_path) == {"x.yaml"}


@pytest.mark.slow
class TestAfterTorchIsLoaded:
    """Starting a training process takes long: one is started for each kind of start, alone and under torchrun; the rest
    are forks."""

    def test_data_packed_to_another_length(self, corpus, tmp_path):
        refused = run("train", config(tmp_path, corpus, stages__sequence_length=128))
        assert_refused(
            refused, f"{corpus}/train: packed to sequences of 64 tokens", "sequence_length=128", "set it to 64"
        )
        assert names(tmp_path) == {"x.yaml"}

    def test_data_of_another_tokenizer_under_torchrun(self, corpus, tmp_path):
        other = tmp_path / "other"
        made = data("train-tokenizer", corpus / "texts", "--vocab-size", VOCAB_SIZE - 20, "--output", other)
        assert made[0] == 0, made
        code, _, err = run("train", config(tmp_path, corpus, tokenizer=str(other)), ranks=2)
        assert code != 0
        assert err.count("tokenize the data with the tokenizer of the run") == 1, err
        assert "hunyuan_pretrain/" not in err, "no traceback of ours"
        assert names(tmp_path) == {"x.yaml", "other"}

    def test_no_data_and_no_tokenizer(self, corpus, tmp_path):
        assert_refused(
            run_forked("train", config(tmp_path, corpus, stages__data=[{"path": "absent"}])),
            "absent: no such folder; write it with `hunyuan-data pack`",
        )
        assert_refused(
            run_forked("train", config(tmp_path, corpus, tokenizer=str(tmp_path / "absent"))), tmp_path / "absent"
        )
        assert names(tmp_path) == {"x.yaml"}

    def test_a_changed_or_missing_file_of_the_data_is_named_before_training(self, corpus, tmp_path):
        data_folder = tmp_path / "data"
        shutil.copytree(corpus, data_folder)
        fields = config(
            tmp_path, data_folder, steps=2, evaluation={"data": str(data_folder / "heldout"), "max_sequences": 2}
        )
        changed, held_out = (data_folder / name / "shard_00000.bin" for name in ("tokenized", "tokenized_heldout"))
        flip_a_bit(changed)
        assert_refused(run_forked("train", fields), f"{changed}: SHA-256 ", "the file changed after it was written")
        flip_a_bit(held_out)
        code, _, err = run("train", fields, ranks=2)
        assert code != 0
        assert err.count(f"{changed}: SHA-256 ") == err.count(f"{held_out}: SHA-256 ") == 1, err
        assert "hunyuan_pretrain/" not in err, "no traceback of ours"
        assert names(tmp_path) == {"x.yaml", "data"}, "nothing was written"
        assert run_forked("train", fields, "runtime.verify_data=sizes")[0] == 0
        held_out.unlink()
        assert_refused(
            run_forked("train", fields, f"run_dir={tmp_path}/other"), f"{held_out}: missing; write the folder again"
        )

    def test_a_checkpoint_of_another_model_and_a_fresh_start_over_an_old_run(self, corpus, tmp_path):
        assert run_forked("train", config(tmp_path, corpus, steps=2, model__num_layers=2))[0] == 0
        fresh = run_forked("train", config(tmp_path, corpus, steps=2, model__num_layers=2), "checkpoint.resume=false")
        assert_refused(fresh, "checkpoint.resume=false, but", "choose another run_dir, or remove the checkpoints")
        before = (tmp_path / "run" / "resolved.yaml").read_text()
        refused = run_forked("train", config(tmp_path, corpus, steps=3, model__num_layers=2, model__ffn_hidden_size=64))
        assert_refused(
            refused, "a checkpoint of another model", "model.ffn_hidden_size: 48 in the checkpoint, 64 in the config"
        )
        assert (tmp_path / "run" / "resolved.yaml").read_text() == before, (
            "the refused experiment is not recorded as the run's"
        )

    def test_export_and_generate_of_the_wrong_folder(self, corpus, tmp_path):
        assert_refused(
            run_forked("export", corpus, tmp_path / "out"), f"{corpus}: not a run directory (no resolved.yaml)"
        )
        assert_refused(run_forked("export", tmp_path / "nothing", tmp_path / "out"), "not a run directory")
        assert_refused(run_forked("generate", corpus, "--prompt", "x"), str(corpus))
        assert names(tmp_path) == set()

    def test_an_export_that_cannot_be_made(self, corpus, tmp_path, small):
        """One message each; what was there stays, and nothing else appears."""
        code, _, err = run_forked("train", config(tmp_path, corpus, steps=2))
        assert code == 0, err
        (tmp_path / "full").mkdir()
        (tmp_path / "full" / "precious").write_text("keep")
        (tmp_path / "file").write_text("keep")
        before = names(tmp_path)
        run_dir, out = tmp_path / "run", tmp_path / "out"
        refusals = {
            ("onnx", out): ["'onnx' is not one of", "'hunyuan_v1_moe'"],
            ("gguf", out): ["format gguf: llama.cpp does not compute this model", "cla_share_factor=2"],
            ("hunyuan_v1_moe", out): ["format hunyuan_v1_moe would load", "would load"],
            ("hunyuan", tmp_path / "full"): [f"{tmp_path}/full: exists and is not an empty folder"],
            ("hunyuan", tmp_path / "file"): [f"{tmp_path}/file: exists and is not an empty folder"],
            ("hunyuan", tmp_path / "file" / "out"): [f"{tmp_path}/file/out: cannot be written: ", "Not a directory"],
            ("hunyuan", small / "out"): [f"{small}: the tensors take ", "are free"],
        }
        for (format, output), words in refusals.items():
            assert_refused(run_forked("export", run_dir, output, "--format", format), *words)
        refused = run_forked("export", run_dir, out, "--license", "Apache 2.0")
        assert_refused(refused, "license 'Apache 2.0': must be an identifier")
        ranks = (run_dir / "tokenizer" / "hy.tiktoken").read_text().splitlines()
        (first, _), (second, _) = ranks[300].split(), ranks[301].split()
        ranks[300:302] = [f"{second} 300", f"{first} 301"]
        (run_dir / "tokenizer" / "hy.tiktoken").write_text("\n".join(ranks) + "\n")
        refused = run_forked("export", run_dir, out)
        assert_refused(refused, "its vocabulary is not the one that", "put the run's own hy.tiktoken back")
        assert names(tmp_path) == before
        assert names(small) == set()
        assert [(tmp_path / name).read_text() for name in ("full/precious", "file")] == ["keep", "keep"]

    def test_run_directory_that_cannot_be_written(self, corpus, tmp_path):
        """A file in place of the folder, a parent of it or one of its files: root's permissions do not override
        that."""
        fields = config(tmp_path, corpus)
        (tmp_path / "run").write_text("in the way")
        assert_refused(
            run_forked("train", fields), f"{tmp_path}/run: 1 problem", "run_dir: cannot be written: File exists"
        )
        below = f"run_dir={tmp_path}/run/one"
        assert_refused(
            run_forked("train", fields, below), f"run_dir: cannot be written: Not a directory ({tmp_path}/run)"
        )
        assert (tmp_path / "run").read_text() == "in the way"
        (tmp_path / "other" / "log.txt").mkdir(parents=True)
        refused = run_forked("train", fields, f"run_dir={tmp_path}/other")
        assert_refused(refused, f"run_dir: cannot be written: Is a directory ({tmp_path}/other/log.txt)")
        assert names(tmp_path / "other") == {"log.txt"}

    def test_a_tokenizer_that_is_a_file(self, corpus, tmp_path):
        ranks = corpus / "tokenizer" / "hy.tiktoken"
        rule = "is a file; a tokenizer is a folder with hy.tiktoken"
        refused = run_forked("train", config(tmp_path, corpus, tokenizer=str(ranks)))
        assert_refused(refused, f"tokenizer={ranks}"[:50], f"{rule} (use {corpus}/tokenizer)")
        shutil.copy(ranks, tmp_path / "mine.tiktoken")
        refused = run_forked("train", config(tmp_path, corpus, tokenizer=str(tmp_path / "mine.tiktoken")))
        assert_refused(refused, f"{rule} (put it in its own folder as hy.tiktoken, and use that folder)")
        assert names(tmp_path) == {"x.yaml", "mine.tiktoken"}


@pytest.fixture
def read_only(tmp_path: Path) -> Iterator[Path]:
    """A folder that even root cannot write to."""
    folder = tmp_path / "read_only"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", str(folder)], capture_output=True, text=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"cannot mount a read-only folder: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A folder with space for 64 KiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)], capture_output=True, text=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"cannot mount a small folder: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.mark.slow
def test_read_only_run_directory_under_torchrun(corpus, tmp_path, read_only):
    fields = write_experiment(tmp_path / "x.yaml", experiment_fields(corpus, read_only / "run"))
    code, _, err = run("train", fields, ranks=2, timeout_s=100)
    assert code != 0
    assert err.count(f"{read_only}/run: 1 problem\n  run_dir: cannot be written: Read-only file system") == 1, err
    assert "hunyuan_pretrain/" not in err, "no traceback of ours"
