"""The sweep benchmark refuses what it could only notice after minutes of work."""

from types import SimpleNamespace

import pytest

from experiments import bench_sweep

GOOD = {"_CPU_DEVICES": ["1", "2"], "_PROCESSES": ["2"], "_PRESET": "quickstart", "_LANES": 16}


def setups(monkeypatch, argv=("bench",), **changes):
    for name, value in {**GOOD, "_JSON": None, **changes}.items():
        monkeypatch.setattr(bench_sweep, name, SimpleNamespace(value=value))
    return bench_sweep.checked(list(argv))


def test_one_run_alone_comes_first(monkeypatch):
    assert setups(monkeypatch) == [(1, 1, 1), (16, 1, 1), (16, 2, 1), (16, 1, 2)]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"_CPU_DEVICES": ["1", "a"]}, "cpu_devices='a': must be whole numbers from 1 to 64"),
        ({"_PROCESSES": ["0"]}, "processes='0': must be"),
        ({"_PRESET": "quikstart"}, "flagfile='quikstart': .*did you mean quickstart"),
        ({"_JSON": "/no/such/folder/b.json"}, ".*/no/such/folder/b.json"),
        ({"argv": ["bench", "extra"]}, "unexpected argument 'extra'"),
    ],
)
def test_bad_input_is_refused_first(monkeypatch, changes, message):
    with pytest.raises((ValueError, OSError), match=message):
        setups(monkeypatch, **changes)
