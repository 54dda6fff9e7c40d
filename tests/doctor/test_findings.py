from __future__ import annotations

import json

import pytest

from nemo_popsd.doctor.findings import Finding, as_json, as_table, exit_status

FINE = Finding("packages", "torch", "ok", "2.13.0", ">=2.9")
ABSENT = Finding("packages", "apex", "optional")
OLD = Finding("packages", "megatron-core", "outside", "0.15.3", ">=0.16")
GONE = Finding("packages", "lightning", "missing", need=">=2.4", note="install it")
FULL = Finding("machine", "disk", "failed", "1 GiB", "100 GiB")


@pytest.mark.parametrize(
    ("findings", "status", "strict"),
    [([FINE, ABSENT], 0, 0), ([FINE, OLD], 0, 1), ([GONE], 1, 1), ([FULL], 1, 1), ([], 0, 0)],
)
def test_exit_status(findings: list[Finding], status: int, strict: int) -> None:
    assert exit_status(findings, strict=False) == status
    assert exit_status(findings, strict=True) == strict
    assert json.loads(as_json(findings, strict=True))["ok"] is not bool(strict)


def test_the_json_contains_every_field() -> None:
    (finding,) = json.loads(as_json([GONE], strict=False))["findings"]
    assert Finding(**finding) == GONE


def test_the_table_names_every_problem_at_its_end() -> None:
    lines = as_table([FULL, FINE, OLD, GONE]).splitlines()
    assert lines[0] == "packages"
    assert lines[1].split() == ["ok", "torch", "2.13.0", "need", ">=2.9"]
    assert lines[-1] == "missing: lightning; failed: disk; outside the declared range: megatron-core"
    assert as_table([FINE, ABSENT]).splitlines()[-1] == "everything that a run needs is present"
