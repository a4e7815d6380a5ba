"""The benchmarks' table itself; its figures are made by hand (python tests/benchmarks/table.py), since a busy machine would fail them."""
import sys

import pytest

from conftest import ROOT

sys.path.insert(0, str(ROOT/'tests'/'benchmarks'))
import table

ROW = dict(work='a', reference='b', reference_value=2., ours_value=9., unit='images/s', ratio=4.5, bar=4, ok=True)


def test_the_table_says_what_was_reached_and_what_was_missed():
    text = table.text([ROW, ROW | dict(work='c', ratio=3.9, ok=False), ROW | dict(work='d', bar=None, ok=None)]).splitlines()
    assert len(text) == 5 and len({len(line) for line in text}) == 1
    assert text[2].endswith(' ok |') and ' MISSED |' in text[3] and text[4].rstrip(' |').endswith('4.5')
    assert 'MISSED' not in table.text([ROW | dict(ok=False)], judged=False)


def test_a_part_that_fails_is_a_row_and_not_a_gap(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(table, 'HERE', tmp_path)
    row, = table.measured('gone', 1, True)
    assert set(row) == set(table.KEYS) and row['work'].startswith('gone: failed') and row['ok'] is False and capsys.readouterr().err


def test_cores_are_those_the_kernel_grants(monkeypatch):
    monkeypatch.setattr(table.os, 'sched_getaffinity', lambda pid: set(range(16)), raising=False)
    monkeypatch.setattr(table, 'cgroup_cores', lambda: 1.5)
    assert table.granted() == 1.5
    monkeypatch.setattr(table, 'cgroup_cores', lambda: None)
    assert table.granted() == 16


def test_what_is_saved_names_no_machine():
    facts = table.facts()
    import platform
    assert platform.node() not in facts.values() and {'cores', 'processor', 'python', 'libraries', 'measured_utc'} <= set(facts)


@pytest.mark.parametrize('name', [p.stem for p in (ROOT/'tests'/'benchmarks').glob('*.py') if p.stem in table.PARTS])
def test_every_part_of_the_table_has_rows(name): assert 'def rows(' in (ROOT/'tests'/'benchmarks'/f'{name}.py').read_text()
