"""Progress is reported to the monitor of nvidia-resiliency-ext, if its launcher started this rank."""

from __future__ import annotations

import sys
from types import ModuleType
from unittest import mock

import pytest

from nemo_popsd.errors import UserError
from nemo_popsd.parallel import heartbeats
from nemo_popsd.parallel.heartbeats import Heartbeats

PACKAGE = "nvidia_resiliency_ext"


@pytest.fixture
def client(monkeypatch: pytest.MonkeyPatch) -> mock.Mock:
    client = mock.Mock()
    module = ModuleType(f"{PACKAGE}.fault_tolerance")
    module.RankMonitorClient = lambda: client  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, PACKAGE, ModuleType(PACKAGE))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return client


def test_a_rank_reports_at_most_once_a_second(monkeypatch: pytest.MonkeyPatch, client: mock.Mock) -> None:
    monkeypatch.setenv("FT_RANK_MONITOR_IPC_SOCKET", "/tmp/socket")
    times = iter([10.0, 10.4, 10.9, 11.0, 11.1])
    monkeypatch.setattr(heartbeats.time, "monotonic", lambda: next(times))
    beats = Heartbeats()
    client.init_workload_monitoring.assert_called_once_with()
    sent = []
    for _ in range(5):
        beats.send()
        sent.append(client.send_heartbeat.call_count)
    assert sent == [1, 1, 1, 2, 2]


def test_nothing_is_sent_under_another_launcher(monkeypatch: pytest.MonkeyPatch, client: mock.Mock) -> None:
    monkeypatch.delenv("FT_RANK_MONITOR_IPC_SOCKET", raising=False)
    Heartbeats().send()
    assert client.method_calls == []


def test_a_monitor_without_the_package_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FT_RANK_MONITOR_IPC_SOCKET", "/tmp/socket")
    monkeypatch.setitem(sys.modules, f"{PACKAGE}.fault_tolerance", None)
    with pytest.raises(UserError, match="install nvidia-resiliency-ext there, or start with torchrun"):
        Heartbeats()
