"""Every building-block notebook runs from top to bottom, as nbdev-test runs it; the stages are run in test_stages."""
import importlib
import json
import os
import pkgutil
import subprocess
import sys

import pytest

from conftest import ROOT

BLOCKS = sorted(p.relative_to(ROOT) for p in (ROOT/'nbs').rglob('*.ipynb') if '.ipynb_checkpoints' not in p.parts and not p.name[0].isdigit() or p.parent.name != 'nbs')


@pytest.mark.parametrize('notebook', [b for b in BLOCKS if '.ipynb_checkpoints' not in b.parts], ids=str)
def test_notebook(notebook):
    code = "import sys\nfrom nbdev.test import test_nb\nok, _ = test_nb(sys.argv[1], skip_flags=['notest', 'slow'])\nsys.exit(not ok)"
    done = subprocess.run([sys.executable, '-c', code, ROOT/notebook], cwd=ROOT, capture_output=True, text=True, env=os.environ | {'MPLBACKEND': 'agg'})
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.mark.parametrize('notebook', sorted(p.relative_to(ROOT) for p in (ROOT/'nbs').rglob('*.ipynb') if '.ipynb_checkpoints' not in p.parts), ids=str)
def test_no_widget_state(notebook):
    "A saved widget is a page of script and ids that differ at every run"
    nb = json.loads((ROOT/notebook).read_text(encoding='utf-8'))
    assert 'widgets' not in nb['metadata']
    assert not [o for c in nb['cells'] for o in c.get('outputs', ()) if any('widget' in kind for kind in o.get('data', ()))]


def test_every_exported_name_is_there():
    "`from module import *` must not fail"
    import mammo_nb
    for m in pkgutil.walk_packages(mammo_nb.__path__, 'mammo_nb.'):
        module = importlib.import_module(m.name)
        assert not [n for n in getattr(module, '__all__', ()) if not hasattr(module, n)], m.name
