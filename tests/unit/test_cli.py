"""The command: what it prints, where, and its exit codes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import types
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path

import pytest
import yaml

from hunyuan_pretrain.cli import program, ranks
from hunyuan_pretrain.config.errors import ConfigError, Problem

ROOT = Path(__file__).parents[2]
DEMO = str(ROOT / "configs/dev/demo_cpu.yaml")


def run(*arguments: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    """Exit code, stdout, stderr of the command."""
    monkeypatch.setattr(sys, "argv", ["hunyuan-pretrain", *arguments])
    code = 0
    try:
        program.main()
    except SystemExit as stop:
        code = int(stop.code or 0)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    return lambda *arguments: run(*arguments, monkeypatch=monkeypatch, capsys=capsys)


@pytest.mark.parametrize("program", ["hunyuan_pretrain", "data_tools.cli"])
def test_menus_show_the_version_and_wrap_help_to_the_terminal_width(program: str) -> None:
    def said(*arguments: str) -> str:
        environment = os.environ | {"COLUMNS": "100", "NO_COLOR": "1"}
        command = [sys.executable, "-m", program, *arguments]
        return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True).stdout

    assert said("--version").split() == ["hunyuan-pretrain", version("hunyuan-pretrain")]
    menu = said("-h")
    assert menu == said("--help")
    assert "\x1b" not in menu
    commands = menu[menu.index("Commands") :].splitlines()
    for line, following in pairwise(commands):
        if line.startswith("│ ") and following.startswith("│   "):  # continued: no room was left for the next word
            first = following.strip("│ ").split()[0]
            assert len(line.rstrip("│ ")) + len(first) + 1 > 97, menu


def test_explain(command) -> None:
    code, out, _ = command("explain", "optimizer.lr")
    assert (code, out.splitlines()[0]) == (0, "optimizer.lr")
    assert "stages" in command("explain")[1]
    assert command("explain", "optimizer.lrr") == (
        2,
        "",
        "explain: 1 problem\n  optimizer.lrr: unknown setting (did you mean optimizer.lr?)\n",
    )


def test_config_show_output_loads_back(command) -> None:
    code, out, _ = command("config", "show", DEMO, "optimizer.lr=3e-4")
    assert code == 0
    assert yaml.safe_load(out)["optimizer"]["lr"] == 3e-4
    assert yaml.safe_load(out)["runtime"]["device"] == "auto"


def test_config_show_prints_one_value_for_scripts(command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PLACE", "/scratch/a b")
    overrides = ["run_dir=$PLACE/10 $$x", "parallel.world_size=null"]
    assert command("config", "show", DEMO, *overrides, "--value", "run_dir") == (0, "/scratch/a b/10 $x\n", "")
    assert command("config", "show", DEMO, *overrides, "--value", "parallel.world_size") == (0, "null\n", "")
    code, _, err = command("config", "show", DEMO, "--value", "parallel.world_siz")
    assert (code, err) == (
        2,
        "config show --value: 1 problem\n  parallel.world_siz: not a setting (did you mean parallel.world_size?)\n",
    )


def test_config_diff(command, tmp_path: Path) -> None:
    other = tmp_path / "other.yaml"
    other.write_text(command("config", "show", DEMO, "seed=5")[1])
    assert command("config", "diff", DEMO, str(other)) == (0, "seed: 1234 -> 5\n", "")
    assert command("config", "diff", DEMO, DEMO) == (0, "no difference\n", "")


def test_config_schema_is_the_one_in_the_repository(command) -> None:
    code, out, err = command("config", "schema")
    assert (code, err) == (0, "")
    assert out == (ROOT / "configs/experiment.schema.json").read_text(encoding="utf-8")


def test_init_writes_a_file_that_plans(command, tmp_path: Path) -> None:
    output = str(tmp_path / "my.yaml")
    options = ["--size", "tiny", "--gpus", "1", "--data", str(tmp_path), "--tokens", "100M", "--output", output]
    assert command("init", *options, "--hardware", "h100") == (
        0,
        f"{output}: written. Look at it with `hunyuan-pretrain plan {output}`\n",
        "",
    )
    assert command("plan", output)[::2] == (0, "")
    code, out, err = command("init", *options, "--hardware", "h1000")
    assert (code, out) == (2, "")
    assert err.startswith("init: 2 problems\n  --hardware=h1000: unknown hardware")


def test_plan(command) -> None:
    code, out, err = command("plan", DEMO, "--world-size", "2", "checkpoint.keep_last=null")
    assert (code, err) == (0, "")
    for expected in ("15,804,928", "stage anneal", "491,520", "RoPE base"):
        assert expected in out
    assert "warning: optimizer.lr=0.002: no stage reaches it" in command("plan", DEMO, "stages.0.lr_end=0.5")[2]


def test_a_plan_for_hardware(command) -> None:
    bf16 = "precision.dtype=bf16"
    code, out, err = command("plan", DEMO, bf16, "--hardware", "h200-141gb")
    assert (code, err) == (0, "")
    for expected in ("on H200-141GB", "MFU", "GPU-hours"):
        assert expected in out
    options = ("--hardware", "GB200", "--document-tokens", "128", "--json")
    data = json.loads(command("plan", DEMO, bf16, *options)[1])
    assert any(row["note"].endswith("documents of 128 tokens") for row in data["rows"])
    assert (data["ranks"], data["hardware"]) == (2, "GB200")
    assert {"group": "layout", "name": "ranks", "value": "2", "note": "data parallel 2, expert parallel 2"} in data[
        "rows"
    ]
    assert len(data["stages"]) == 3
    assert json.loads(command("plan", DEMO, "--json")[1])["run"] is None


def test_a_plan_as_a_page(command, tmp_path: Path) -> None:
    path = tmp_path / "plan.html"
    options = ("precision.dtype=bf16", "--hardware", "H200-141GB")
    code, out, err = command("plan", DEMO, *options, "--html", str(path), "--json")
    assert (code, err) == (0, f"{path}: written\n")
    assert f'<data value="{json.loads(out)["run"]["days"]!r}">' in path.read_text(encoding="utf-8")
    code, out, err = command("plan", DEMO, "--html", str(tmp_path / "none/plan.html"))
    assert (code, out) == (2, "")
    assert err.startswith("plan: 1 problem\n  --html=")


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (
            ["--hardware", "H200"],
            "--hardware: 1 problem\n  name=H200: unknown hardware (did you mean H200-141GB? known",
        ),
        (["--hardware", "none.yaml"], "none.yaml: 1 problem\n  file: cannot be read: No such file"),
        (["--hardware", "B200"], "  precision.dtype=fp32: the time of a step is planned in bf16"),
        (["--document-tokens", "5"], "  --document-tokens=5: the length of documents changes the time of a step only"),
    ],
)
def test_a_plan_that_cannot_be_made_is_refused(command, options: list[str], expected: str) -> None:
    code, out, err = command("plan", DEMO, *options)
    assert (code, out) == (2, "")
    assert expected in err
    assert "Traceback" not in err


def test_a_search_prints_layouts_and_their_settings(command) -> None:
    options = ["precision.dtype=bf16", "--search", "--hardware", "H100-80GB", "--gpus", "2"]
    code, out, err = command("plan", DEMO, *options)
    assert (code, err) == (0, "")
    assert "rejected layouts" in out
    assert "\nparallel:" in out, "settings to paste"
    data = json.loads(command("plan", DEMO, *options, "--json")[1])
    assert f"{data['stages'][0]['layouts'][0]['seconds']:.4g} s" in out
    assert data["stages"][0]["yaml"] in out


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ([], "--search: needs --hardware (B200, GB200, H100-80GB, H20-96GB, H200-141GB, or a file)"),
        (["--hardware", "H100"], "unknown hardware (did you mean H100-80GB?"),
        (["--hardware", "B200", "--gpus", "2"], "precision.dtype=fp32: the time of a step is planned in bf16"),
        (
            ["--hardware", "B200", "parallel.world_size=null"],
            "--search: needs the number of GPUs (add --gpus 512, say)",
        ),
    ],
)
def test_a_search_that_cannot_be_made_is_refused(command, options: list[str], expected: str) -> None:
    code, out, err = command("plan", DEMO, "--search", *options)
    assert (code, out) == (2, "")
    assert expected in err


def test_a_search_is_no_dry_run(command) -> None:
    code, out, err = command("plan", DEMO, "--search", "--dry-run")
    assert (code, out) == (2, "")
    assert "--dry-run is of one layout" in " ".join(err.split())


def test_all_problems_of_a_plan_are_in_one_message(command) -> None:
    code, out, err = command("plan", DEMO, "model.num_layers=5", "--world-size", "3")
    assert (code, out) == (2, "")
    assert err.startswith(f"{DEMO}: 3 problems\n  model.num_layers=5: ")
    assert "the job has 3 ranks" in err
    assert "Traceback" not in err


def test_doctor(command) -> None:
    code, out, _ = command("doctor")
    assert code == 0
    assert "(works with Transformer Engine 2." in out
    code, out, err = command("doctor", DEMO, "runtime.device=cpu", "tokenizer=/no/tokenizer")
    assert code == 1
    assert "gloo" in out
    assert "cannot run: /no/tokenizer: no such file" in err
    code, _, err = command("doctor", DEMO, "runtime.device=cpu", "evaluation.tasks=[mt_bench]")
    assert code == 1
    assert "cannot run: evaluation.tasks: " in err


def test_doctor_refuses_what_cannot_run_here(command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    code, _, err = command("doctor", DEMO, "runtime.device=cuda")
    assert code == 1
    assert err.startswith("cannot run: runtime.device=cuda: this machine has no usable CUDA")
    monkeypatch.setattr("hunyuan_pretrain.runtime.device.apex_state", lambda: "wrong")
    code, out, err = command("doctor")
    assert code == 1
    assert "a package of this name that is not NVIDIA's" in out
    assert "pip uninstall apex" in err


def test_train_passes_on_accepted_changes_and_the_branch_point(
    command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    given = []
    loop = types.ModuleType("hunyuan_pretrain.train.loop")
    loop.train = lambda experiment, accepted: given.append((experiment.checkpoint.resume_from, accepted)) or 0  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "hunyuan_pretrain.train", types.ModuleType("hunyuan_pretrain.train"))
    monkeypatch.setitem(sys.modules, "hunyuan_pretrain.train.loop", loop)
    config = [DEMO, f"run_dir={tmp_path}/run", "parallel.world_size=null", "parallel.expert_model_parallel_size=1"]
    assert (
        command("train", *config, "--accept-changes", "seed,stages.0.data.digest", "--accept-changes", "tokenizer")[0]
        == 0
    )
    assert command("train", *config, "--from-step", "40")[0] == 0
    assert given == [(None, ["seed", "stages.0.data.digest", "tokenizer"]), (40, [])]


def test_wrong_usage_is_exit_code_2(command, tmp_path: Path) -> None:
    code, _, err = command("plan")
    assert code == 2
    assert "CONFIG: missing" in err
    for options in ((DEMO,), ("--json",), ("--gpus-of-a-typo", "1")):
        assert command("plan", *options, "--calibrate", str(tmp_path / "mine.yaml"))[0] == 2
    assert list(tmp_path.iterdir()) == []
    assert command("no-such-command")[0] == 2


def test_user_errors_are_distinguished_from_program_errors(command, monkeypatch: pytest.MonkeyPatch) -> None:
    class CheckpointError(ValueError):
        pass

    class TornCheckpointError(CheckpointError):
        pass

    def raising(error: BaseException) -> None:
        def app() -> None:
            raise error

        monkeypatch.setattr(program, "app", app)

    for error in (TornCheckpointError("torn"), CheckpointError("torn"), ConfigError("x", [Problem("a", 1, "b")])):
        raising(error)
        assert command() == (2, "", f"{error}\n")
    raising(KeyboardInterrupt())
    assert command()[0] == 130
    raising(ValueError("a bug"))
    status, _, said = command()
    assert status == 1
    assert said.startswith("Traceback")
    assert said.endswith("ValueError: a bug\n")


def start_as_rank(rank: int) -> subprocess.Popen[str]:
    """Start `train` of a missing experiment as one rank of a job; its error is read from stderr."""
    return subprocess.Popen(
        [sys.executable, "-m", "hunyuan_pretrain", "train", "absent.yaml"],
        env=os.environ | {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"},
        stderr=subprocess.PIPE,
        text=True,
    )


def test_a_rank_gives_rank_0_time_to_print_and_is_silent_when_the_launcher_stops_it() -> None:
    first, second = start_as_rank(0), start_as_rank(1)
    assert "absent.yaml" in first.communicate(timeout=60)[1]
    assert first.returncode == 2
    with pytest.raises(
        subprocess.TimeoutExpired
    ):  # a launcher that saw it fail would stop the job before rank 0 had printed
        second.wait(2)
    second.terminate()
    assert second.communicate(timeout=60)[1] == ""
    assert second.returncode == -signal.SIGTERM


def test_an_error_on_one_other_rank_alone_is_printed_after_a_delay(command, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "3", "WORLD_SIZE": "4", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(ranks, "SECONDS_FOR_RANK_0", 0.01)
    before = signal.getsignal(signal.SIGTERM)
    try:
        code, out, err = command("train", "absent.yaml")
    finally:
        signal.signal(signal.SIGTERM, before)
    assert (code, out) == (2, "")
    assert err.startswith("rank 3: absent.yaml")


def test_the_module_runs_as_the_command_and_explains_without_torch() -> None:
    run = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "hunyuan_pretrain", "explain", "seed"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stdout.startswith("seed\n")
    assert "| torch\n" not in run.stderr


def test_launcher_variables_of_another_job_are_refused_or_ignored() -> None:
    """Only some of a launcher's variables: refused where they would matter, ignored elsewhere."""
    stray = os.environ | {"RANK": "3", "WORLD_SIZE": "8"}
    command = [sys.executable, "-m", "hunyuan_pretrain"]
    done = subprocess.run([*command, "train", "absent.yaml"], env=stray, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (
        2,
        "the environment has RANK=3, WORLD_SIZE=8, but not MASTER_ADDR, MASTER_PORT: a launcher sets all of them "
        "for each rank; "
        "start ranks with launch/train.sh or torchrun, or unset RANK WORLD_SIZE\n",
    )
    complete = stray | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1", "LOCAL_RANK": "3"}
    done = subprocess.run(
        [*command, "config", "show", "absent.yaml"], env=complete, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2
    assert not done.stderr.startswith("rank 3"), "and it did not wait for rank 0 either"
