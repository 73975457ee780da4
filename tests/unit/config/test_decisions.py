"""The ledger: what is written is read, what a kill cut off is not, and which decisions are in force."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from hunyuan_pretrain.config.decisions import Decision, append_decision, in_force, read_decisions
from hunyuan_pretrain.config.errors import ConfigError


def decision(kind: Any, step: int, **more: Any) -> Decision:
    return Decision(
        time="2026-01-01T00:00:00Z", kind=kind, cause="user" if kind == "branch" else "spike", step=step, **more
    )


def back(step: int, to_step: int, number: int) -> Decision:
    return decision("rollback", step, to_step=to_step, number=number, data=(("s", to_step * 8, step * 8),))


def test_a_ledger_comes_back_as_it_was(tmp_path: Path) -> None:
    assert read_decisions(tmp_path) == []
    written = [
        decision("skip", 3, values={"loss": math.inf, "grad_norm": 0.1}, thresholds={"loss": 5.25}),
        back(7, 4, 1),
        decision("stop", 9, ranks=((3, "host", "cuda:3"),)),
    ]
    for one in written:
        append_decision(tmp_path, one)
    assert read_decisions(tmp_path) == written
    assert "inf" in (tmp_path / "decisions.jsonl").read_text().lower()


def test_a_line_that_a_kill_has_cut_off_had_no_effect(tmp_path: Path) -> None:
    append_decision(tmp_path, decision("skip", 3))
    path = tmp_path / "decisions.jsonl"
    whole = path.read_bytes()
    for length in (1, 20, len(whole) - 1):
        path.write_bytes(whole + whole[:length])
        assert read_decisions(tmp_path) == [decision("skip", 3)]
        append_decision(tmp_path, decision("skip", 5))
        assert read_decisions(tmp_path) == [decision("skip", 3), decision("skip", 5)]


@pytest.mark.parametrize("damage", [b"{}\n", b"nonsense\n", b"\xff\xfe\n", b"[1]\n", b"\n"])
def test_a_damaged_line_is_one_message(tmp_path: Path, damage: bytes) -> None:
    append_decision(tmp_path, decision("skip", 3))
    path = tmp_path / "decisions.jsonl"
    path.write_bytes(damage + path.read_bytes())
    with pytest.raises(ConfigError, match="line 1 is damaged"):
        read_decisions(tmp_path)


def test_what_an_abandoned_branch_decided_is_not_in_force() -> None:
    ledger = [decision("skip", 2), decision("skip", 6), back(9, 4, 1)]
    found = in_force(ledger)
    assert (found.skips, [one.number for one in found.rollbacks]) == ({2}, [1])
    ledger += [decision("skip", 7), back(12, 8, 2)]
    found = in_force(ledger)
    assert (found.skips, [one.number for one in found.rollbacks], found.number) == ({2, 7}, [1, 2], 2)
    assert found.num_skipped(6) == 1
    found = in_force([*ledger, back(10, 3, 3)])
    assert (found.skips, [one.number for one in found.rollbacks]) == ({2}, [3])
    found = in_force([*ledger, decision("branch", 8)])
    assert (found.skips, [one.number for one in found.rollbacks]) == ({2, 7}, [1])
    found = in_force([*ledger, decision("branch", 1)])
    assert (found.skips, found.rollbacks, found.number, found.num_written) == (set(), (), 0, 2)
