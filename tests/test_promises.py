"""The page 'What you can rely on' names tests: each of them must exist."""
import ast
import json
import re

import pytest

from conftest import ROOT

PAGE = ROOT/'nbs'/'rely_on.ipynb'


def named():
    text = '\n'.join(''.join(c['source']) for c in json.loads(PAGE.read_text(encoding='utf-8'))['cells'])
    return sorted(set(re.findall(r'`(test_\w+\.py)::(test_\w+)`', text)))


@pytest.mark.parametrize('file, test', named(), ids='::'.join)
def test_a_promise_has_its_test(file, test):
    functions = [n.name for n in ast.parse((ROOT/'tests'/file).read_text(encoding='utf-8')).body if isinstance(n, ast.FunctionDef)]
    assert test in functions


def test_there_are_promises(): assert len(named()) > 40


def test_the_figures_that_may_not_move():
    "What was tried ended without crash, divergence or leak; a campaign that finds one must be mended, not published"
    tried = {n: json.loads((ROOT/'nbs'/'data'/'reliability'/f'{n}.json').read_text()) for n in ('hostile', 'kills', 'privacy')}
    assert not any(c['crash'] for c in tried['hostile']['corpora'].values())
    assert tried['kills']['kills'] >= 100 and not tried['kills']['divergences'] + tried['kills']['half_files'] + tried['kills']['left_behind'] + tried['kills']['orphans_that_stayed']
    assert tried['privacy']['leaks']['marks'] > 1000 and not tried['privacy']['leaks']['leaked_files'] + tried['privacy']['leaks']['leaked_terminal'] + tried['privacy']['leaks']['leaked_de_identified']
    sent = json.loads((ROOT/'nbs'/'data'/'edge'/'ship.json').read_text())['destinations']
    assert set(sent) == {'stow', 'dimse', 's3'} and all(r['files'] == r['delivered'] == r['dataset_bytes_identical'] >= 1000 and r['kills'] >= 20 and not r['twice'] + r['other_content'] for r in sent.values())
