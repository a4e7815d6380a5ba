"Nothing that comes in is run as code: no pickle, no foreign operator, no parameter, no file that lies where a stage works; pages answer to this machine and a token only."
import ast
import html
import importlib
import io
import json
import os
import pickle
import pkgutil
import re
import shutil
import socket
import subprocess
import sys
import tarfile
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

import nbformat.v4 as v4
import numpy as np
import onnx
import polars as pl
import pytest
from hypothesis import example, given, settings as hyp, strategies as st

import mammo_nb
from conftest import ROOT, mammo
from mammo_nb.core import run as R
from mammo_nb.core.engine import engine, new_seal, put_seal
from mammo_nb.core.run import Stage, check_parameters, cohort_name, job, run_stage, stages, told, write_report
from mammo_nb.core.settings import MammoError, load_settings
from mammo_nb.learn.bundle import Bundle, load_weights_safely
from test_integrity import bundles, pair, sentence  # noqa: F401

CODE = sorted(Path(mammo_nb.__file__).parent.rglob('*.py'))


# ---- what the code itself does

def called(node):
    f = node.func
    return f.id if isinstance(f, ast.Name) else f'{ast.unparse(f.value)}.{f.attr}' if isinstance(f, ast.Attribute) else ''


def offences(tree):
    "Calls and imports that could run what they read"
    for n in ast.walk(tree):
        names = [a.name for a in n.names] if isinstance(n, ast.Import) else [n.module or ''] if isinstance(n, ast.ImportFrom) else []
        for m in names:
            if m.split('.')[0] in ('pickle', 'cPickle', '_pickle', 'cloudpickle', 'dill', 'joblib', 'shelve', 'marshal', 'pandas'): yield f'import {m}'
        if not isinstance(n, ast.Call): continue
        name, kw = called(n), {k.arg: ast.unparse(k.value) for k in n.keywords}
        if name in ('eval', 'exec', 'compile', '__import__', 'os.system', 'os.popen', 'subprocess.getoutput', 'pl.read_ndjson'): yield name
        if name.endswith(('load_learner', 'enable_load_extension', 'load_extension', 'unpickle', 'torch.hub.load', 'register_custom_ops_library')): yield name
        if name == 'torch.load' and kw.get('weights_only') != 'True': yield f'torch.load({kw})'
        if name == 'torch.save': yield name
        if name in ('np.load', 'numpy.load') and kw.get('allow_pickle', 'False') != 'False': yield name
        if name == 'yaml.load' and kw.get('Loader') not in ('yaml.BaseLoader', 'yaml.SafeLoader'): yield name
        if kw.get('shell', 'False') != 'False': yield f'{name}(shell)'
        if name == 'subprocess.Popen' and '-m' in ast.unparse(n) and "'-P', '-m'" not in ast.unparse(n): yield 'python -m without -P'
        if name == 'os.execv' and "'-P', '-m'" not in ast.unparse(n): yield 'python -m without -P'


def test_no_line_of_the_library_reads_code():
    assert len(CODE) > 40
    found = {f'{p.name}: {o}' for p in CODE for o in offences(ast.parse(p.read_text()))}
    assert not found, found
    bad = 'import joblib\ntorch.load(f)\nnp.load(f, allow_pickle=True)\nyaml.load(t)\neval(x)\nsubprocess.run(c, shell=True)\nos.system(c)\nsubprocess.Popen([a, "-m", b])'
    assert len(list(offences(ast.parse(bad)))) == 8, 'the search finds what it looks for'


def test_the_run_sections_of_the_stages_read_no_code_either():
    for p in (ROOT/'nbs').glob('[0-9]_*.ipynb'):
        for c in json.loads(p.read_text())['cells']:
            if c['cell_type'] == 'code': assert not list(offences(ast.parse(''.join(c['source'])))), p


def test_pages_put_text_as_text():
    for p in (Path(mammo_nb.__file__).parent/'labels'/'static').glob('*.js'):
        assert not re.search(r'innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function|srcdoc|setTimeout\(\s*["\'`]', p.read_text()), p


def test_every_error_of_ours_is_known_to_the_runner():
    for m in pkgutil.walk_packages(mammo_nb.__path__, 'mammo_nb.'):
        if 'modidx' not in m.name: importlib.import_module(m.name)
    def below(c): return {c, *(x for s in c.__subclasses__() for x in below(s))}
    ours = {c.__name__ for c in below(MammoError) if c.__module__.startswith('mammo_nb')}
    assert ours <= set(R._ours), ours


# ---- files that hold code

class Bomb:
    "What a pickle can do: touch a file"
    def __init__(self, path): self.path = str(path)
    def __reduce__(self): return open, (self.path, 'w')


@pytest.fixture
def fired(tmp_path): return tmp_path/'fired'


def legacy_tar(path, bomb):
    "The oldest format of torch.save: a tar with pickles in it"
    with tarfile.open(path, 'w') as t:
        for name in ('sys_info', 'pickle', 'storages', 'tensors'):
            data = pickle.dumps(bomb)
            info = tarfile.TarInfo(name)
            info.size = len(data)
            t.addfile(info, io.BytesIO(data))


def planted(path, bomb, how):
    import torch
    if how == 'pickle': path.write_bytes(pickle.dumps(bomb))
    if how == 'protocol 0': path.write_bytes(pickle.dumps(bomb, 0))
    if how == 'zip': torch.save({'state_dict': {'w': torch.zeros(2), 'x': bomb}}, path)
    if how == 'legacy': torch.save(bomb, path, _use_new_zipfile_serialization=False)
    if how == 'tar': legacy_tar(path, bomb)
    if how == 'joblib':
        import joblib
        joblib.dump(bomb, path)
    if how == 'npz': np.savez(path.with_suffix('.npz'), a=np.array([bomb], object)); path.with_suffix('.npz').rename(path)


def unpickled(path, how):
    "The same file opened by somebody careless"
    import torch
    if how == 'npz': return np.load(path, allow_pickle=True)['a']
    if how in ('zip', 'legacy'): return torch.load(path, weights_only=False)
    if how == 'joblib':
        import joblib
        return joblib.load(path)
    if how == 'tar':
        with tarfile.open(path) as t: return pickle.load(t.extractfile('pickle'))
    return pickle.loads(path.read_bytes())


@pytest.mark.parametrize('how', ['pickle', 'protocol 0', 'zip', 'legacy', 'tar', 'joblib', 'npz'])
def test_planted_code_is_refused_as_weights_and_as_model_and_does_not_run(tmp_path, fired, how):
    for suffix in ('.pth', '.pt', '.pkl', '.pickle', '.joblib', '.ckpt', '.bin', '.safetensors', '.onnx', '.npz'):
        p = tmp_path/f'model{suffix}'
        planted(p, Bomb(fired), how)
        assert not fired.exists()
        if suffix != '.onnx': assert 'refused' in sentence(load_weights_safely, p)
        sentence(Bundle.load, p)
        assert not fired.exists(), suffix
    unpickled(p, how)
    assert fired.exists(), 'the payload works where it is really unpickled'


def test_torchscript_is_no_weights(tmp_path):
    import torch
    torch.jit.script(torch.nn.ReLU()).save(tmp_path/'m.pt')
    assert 'refused' in sentence(load_weights_safely, tmp_path/'m.pt')


def test_a_planted_file_in_the_weights_folder_is_said_and_training_starts_without_it(tmp_path, fired, monkeypatch):
    from mammo_nb.learn.rounds import find_weights
    monkeypatch.setenv('MAMMO_WEIGHTS', str(tmp_path))
    planted(tmp_path/'resnet18-abcdef01.pth', Bomb(fired), 'zip')
    monkeypatch.setenv('TORCH_HOME', str(tmp_path/'hub'))
    weights, note = find_weights('resnet18', download=False)
    assert weights is None and 'holds code' in note and 'training starts from scratch' in note and not fired.exists()
    assert 'holds code' in sentence(find_weights, 'resnet18', 'yes', False) and not fired.exists()


def test_an_index_of_thumbnails_with_objects_in_it_is_not_read(tmp_path, fired):
    from mammo_nb.cohort.thumbs import Thumbnails
    t = Thumbnails(tmp_path/'t')
    t.put('0'*16, np.full((4, 4), 7, np.uint8))
    np.savez(tmp_path/'t'/'index.npz', names=np.array([Bomb(fired)], object), sizes=np.array([1]), lengths=np.array([0]), entries=np.zeros(0))
    assert (Thumbnails(tmp_path/'t').get('0'*16) == 7).all() and not fired.exists()
    np.load(tmp_path/'t'/'index.npz', allow_pickle=True)['names']
    assert fired.exists()


@pytest.mark.parametrize('header', [b'', b'\xff'*8, (1 << 40).to_bytes(8, 'little') + b'{}', (2).to_bytes(8, 'little') + b'{}', (9).to_bytes(8, 'little') + b'{"a":1}  ',
    *((len(j)).to_bytes(8, 'little') + j for j in (b'{"a":{"dtype":"F32","shape":[1000000,1000000],"data_offsets":[0,4000000000000]}}', b'['*100_000,
        b'{"a":{"dtype":"F32","shape":[-1],"data_offsets":[8,0]}}', b'{"__metadata__":{"x":' + b'"y"'*3 + b'}}'))])
def test_absurd_safetensors(tmp_path, header):
    p = tmp_path/'w.safetensors'
    p.write_bytes(header)
    if header != (2).to_bytes(8, 'little') + b'{}': assert 'refused' in sentence(load_weights_safely, p)
    else: assert load_weights_safely(p) == {}


def altered(folder, change, seal=True):
    "A lone .onnx file with its protobuf changed, sealed anew by somebody who knows how"
    m, p = onnx.load(folder/'model.onnx'), folder/'altered.onnx'
    change(m)
    s = next(x for x in m.metadata_props if x.key == 'mammo_nb.seal')
    s.value = new_seal()
    p.write_bytes(m.SerializeToString())
    if seal: put_seal(p, s.value)
    return p


def external(t, where):
    t.ClearField('raw_data')
    t.ClearField('float_data')
    t.data_location = onnx.TensorProto.EXTERNAL
    e = t.external_data.add()
    e.key, e.value = 'location', where


@pytest.mark.parametrize('where', ['/etc/passwd', 'data.bin', '../../etc/passwd', 'link', './a/../../b'])
@pytest.mark.parametrize('at', ['initializer', 'constant', 'attribute', 'function', 'subgraph', 'sparse'])
def test_onnx_that_reads_other_files(pair, where, at):  # noqa: F811
    os.symlink('/etc/passwd', pair[0]/'link')
    (pair[0]/'data.bin').write_bytes(b'\0'*4096)
    def change(m):
        t = onnx.numpy_helper.from_array(np.zeros(4, np.float32), 'x')
        external(t, where)
        node = onnx.helper.make_node('Constant', [], ['never_used'], value=t)
        if at == 'initializer': external(m.graph.initializer[0], where)
        if at == 'constant': m.graph.node.append(node)
        if at == 'attribute': m.graph.node[0].attribute.add(name='many', type=onnx.AttributeProto.TENSORS).tensors.append(t)
        if at == 'function': m.functions.append(onnx.helper.make_function('', 'f', [], ['never_used'], [node], [onnx.helper.make_opsetid('', 17)]))
        if at == 'subgraph': m.graph.node[0].attribute.add(name='body', type=onnx.AttributeProto.GRAPH).g.node.append(node)
        if at == 'sparse': m.graph.sparse_initializer.add().values.CopyFrom(t)
    assert 'its weights lie in other files' in sentence(Bundle.load, altered(pair[0], change))


@pytest.mark.parametrize('domain', ['ai.onnx.contrib', 'com.microsoft', 'evil'])
def test_onnx_with_foreign_operators(pair, domain):  # noqa: F811
    def change(m):
        m.graph.node.append(onnx.helper.make_node('PyOp' if domain != 'com.microsoft' else 'EPContext', [], ['y'], domain=domain, ep_cache_context='/etc/passwd'))
        m.opset_import.append(onnx.helper.make_opsetid(domain, 1))
    assert "operators that are not ONNX's own" in sentence(Bundle.load, altered(pair[0], change))


def test_an_oversized_onnx_is_refused_unread(tmp_path):
    p = tmp_path/'m.onnx'
    with open(p, 'wb') as f: f.truncate(5 << 30)
    assert '5.0 GiB' in sentence(Bundle.load, p)


# ---- parameters

def stage(**defaults): return Stage('x', Path('x.ipynb'), 'X', '', defaults)


def as_notebook(values):
    "The values as a notebook gets them: what papermill writes is run, and must do nothing but assign"
    from papermill.translators import PythonTranslator
    code, got = PythonTranslator.codify(values), {}
    tree = ast.parse(code)
    assert all(isinstance(n, ast.Assign) for n in tree.body), code
    for n in ast.walk(tree): assert not isinstance(n, ast.Call) , code
    exec(code, {'__builtins__': {}}, got)
    return got


EVIL = ['"', "'", '"""', "'''", '\\', '\\"', 'a\\', '\n', '\r\n', '\u2028', '\u2029', '\x85', '\x1b]0;x\x07', '"; import os; os.mkdir("pwned") #', "'); __import__('os').mkdir('pwned') #",
        '\\N{BULLET}', '{x}', '%(x)s', '$HOME', '`id`', '!!python/object/apply:os.mkdir [pwned]', '!!binary IjsgaW1wb3J0IG9zOyAj', '*a', '&a b', '\ufeff', '\U0001f9ea', '%', '# comment', '\t']


@pytest.mark.parametrize('text', EVIL)
def test_text_stays_text(text):
    assert as_notebook(check_parameters(stage(a=''), dict(a=text))) == dict(a=text)
    assert as_notebook(check_parameters(stage(a=[]), dict(a=[text, text]))) == dict(a=[text, text])


@hyp(max_examples=300, deadline=None)
@given(st.text(max_size=60), st.sampled_from(['', 0, .5, True, [], None]))
@example('[!!binary IjsgaW1wb3J0IG9zOyAj]', [])
@example('!!binary IjsgaW1wb3J0IG9zOyAj', None)
@example('[[[[]]]]', [])
@example('!!set {a, b}', None)
@example('2020-01-01', None)
@example('.nan', None)
@example('.inf', .5)
@example('nan', .5)
@example('9'*5000, 0)
@example('0x' + 'f'*40, None)
@example('{a: 1}', None)
@example('!!python/object/apply:os.system [id]', None)
@example('a: &x [1]\nb: *x', [])
@example('[' * 5000, [])
def test_no_text_becomes_anything_but_a_plain_value(text, default):
    try: values = check_parameters(stage(a=default), dict(a=text))
    except MammoError as e:
        assert '\n' not in str(e) and len(str(e)) < 600 and str(e).isprintable()
        return
    got = as_notebook(values)
    assert got == values and (default is None or type(got['a']) is type(default))


@pytest.mark.parametrize('value', [b'"; import os #', [b'"; import os #'], {'a': 1}, {1, 2}, object(), [[1]], float('nan'), [float('inf')], 1 << 70, 'a\0b', '\udcff', 'x'*5000, [1]*20_000])
@pytest.mark.parametrize('default', ['', [], None, 0])
def test_values_that_are_not_plain_are_refused(value, default):
    with pytest.raises(MammoError) as e: check_parameters(stage(a=default), dict(a=value))
    assert '\n' not in str(e.value) and str(e.value).isprintable()


def test_what_papermill_does_with_bytes_is_why():
    from papermill.translators import PythonTranslator
    with pytest.raises((SyntaxError, AssertionError)): as_notebook(dict(a=[b'"; import os #']))
    code = PythonTranslator.codify(dict(a=[b'"]; import os #']))
    assert any(isinstance(n, ast.Import) for n in ast.parse(code).body), 'it would have been injected'


@pytest.mark.parametrize('name', ['__class__', '__import__', 'import os', 'a b', 'a=1;b', '1a', 'lambda', '', 'cohort\n', 'é', '\u2028', 'a'*5000, 'get_ipython'])
def test_names_that_are_no_parameters(name):
    with pytest.raises(MammoError) as e: check_parameters(stage(cohort=''), {name: 'x'})
    assert '\n' not in str(e.value) and str(e.value).isprintable() and len(str(e.value)) < 600


@pytest.mark.parametrize('name', ['../../x', '/etc/x', '..', '.', '', '.hidden', 'a/b', 'a\\b', 'a\nb', 'a\0b', 'a\x1b[31m', 'x'*65, 'CON', 'nul.txt', 'phantoms', 'Phantoms', 'mlflow', 'a.', '-x', '~', '$HOME', 'a b', '\u202ex', 'é'])
def test_cohorts_that_cannot_be(name):
    with pytest.raises(MammoError) as e: cohort_name(name)
    assert '\n' not in str(e.value) and str(e.value).isprintable()


@pytest.mark.parametrize('kw', [dict(dicom_dir='~nobody-of-this-name/x'), dict(outputs='a\0b'), dict(settings='a\0b'), dict(bundle='\udcff'), dict(settings='/dev/zero'), dict(settings='x'*5000), dict(scheduler='a\0')])
def test_paths_that_cannot_be(kw):
    with pytest.raises(MammoError) as e: job(**dict(cohort='a', settings=str(ROOT/'settings.ini')) | kw)
    assert '\n' not in str(e.value) and str(e.value).isprintable()


@pytest.mark.parametrize('address', ['x', 'tcp://', 'foo://a:1', 'tcp://[::1', 'tcp://127.0.0.1:1/../..', '\n', 'tls://127.0.0.1:1', 'http://127.0.0.1:1'])
def test_schedulers_that_cannot_be(address):
    with pytest.raises(MammoError) as e:
        with engine(load_settings(ROOT), address): pass
    assert len(str(e.value)) < 400


def test_a_real_run_with_all_of_it_at_once(counting):
    root = counting('from mammo_nb.core.run import log_metrics\nlog_metrics(got=texts, one=text)', 'cohort = "a"\ntexts = []\ntext = ""', '# Count <b>&')
    evil = [t for t in EVIL if t != '\x1b]0;x\x07']
    assert run_stage('count', dict(texts=evil, text=''.join(evil)), root).metrics == dict(got=evil, one=''.join(evil)) and not list(root.rglob('pwned'))
    assert '<script' not in next(root.rglob('report.html')).read_text()


def test_foreign_notebooks_are_no_stages(counting, tmp_path):
    root, fired = counting('pass'), tmp_path/'fired'
    evil = v4.new_notebook(cells=[v4.new_markdown_cell('# E'), v4.new_code_cell('cohort = "a"', metadata={'tags': ['parameters']}), v4.new_code_cell(f'open({str(fired)!r}, "w")')])
    (tmp_path/'9_evil.ipynb').write_text(json.dumps(evil))
    for name in (str(tmp_path/'9_evil.ipynb'), '../../9_evil.ipynb', '../../9_evil', 'evil', '1_count.ipynb', '', '\x1b[31m', '[/red]', 'count\0'):
        assert 'No stage' in sentence(run_stage, name, {}, root)
    assert not fired.exists() and not (root/'outputs').exists()


@pytest.mark.parametrize('args, words', [
    (['run', '[/red]'], 'No stage'), (['run', 'count', '-p', 'cohort=[/red]'], 'cannot be'), (['run', 'count', '-p', '[/x]'], 'write -p name=value'),
    (['run', 'count', '-p', 'cohort=\x1b]0;x\x07'], r'\x1b'), (['run', 'count', '-f', 'bomb.yaml'], 'not'), (['run', 'count', '-f', 'deep.yaml'], 'not YAML'), (['run', 'count', '-f', 'object.yaml'], 'must be'),
    (['run', 'count', '-f', 'large.yaml'], 'has a few lines')])
def test_the_terminal_gets_one_plain_sentence(counting, args, words):
    root = counting('pass')
    (root/'bomb.yaml').write_text('a: &a [x,x,x,x,x,x,x,x,x]\n' + ''.join(f'{c}: &{c} [{",".join([f"*{p}"]*9)}]\n' for p, c in zip('abcdefghij', 'bcdefghijk')) + 'cohort: *k\n')
    (root/'deep.yaml').write_text('cohort: ' + '['*20_000)
    (root/'object.yaml').write_text('cohort: !!python/object/apply:os.mkdir {args: [pwned]}\n')
    (root/'large.yaml').write_text('#' * (2 << 20))
    done = mammo(*args, cwd=root, timeout=60)
    assert done.returncode == 1 and words in done.stderr and 'Traceback' not in done.stderr + done.stdout and done.stderr.count('\n') == 1, done.stderr[-500:]
    assert '\x1b' not in done.stderr and not (root/'pwned').exists()


# ---- modules lying about

def evil_modules(folder, fired):
    for name in ('polars', 'torch', 'numpy', 'papermill', 'zmq', 'cv2', 'yaml', 'voila', 'tornado', 'mammo_nb_evil'):
        (folder/f'{name}.py').write_text(f'open({str(fired)!r}, "a").write("{name} ")\n')


def test_nothing_is_imported_from_the_folders_a_stage_works_in(counting, fired):
    root = counting('import polars, numpy, os, sys\nfrom mammo_nb.core.run import log_metrics\nlog_metrics(path=[p for p in sys.path if p in ("", os.getcwd())])')
    for d in (root, root/'nbs', root/'outputs', root/'outputs'/'a'):
        d.mkdir(parents=True, exist_ok=True)
        evil_modules(d, fired)
    script = Path(sys.executable).parent/'mammo'
    cmd = [str(script)] if script.exists() else [sys.executable, '-P', '-c', 'from mammo_nb.core.run import main; main()']
    done = subprocess.run([*cmd, 'run', 'count'], cwd=root, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and not fired.exists(), done.stderr + (fired.read_text() if fired.exists() else '')
    assert json.loads(next(root.rglob('metrics.json')).read_text()) == dict(path=[])


@pytest.mark.parametrize('module', ['mammo_nb.labels.serve', 'mammo_nb.learn.background'])
def test_processes_of_ours_start_without_the_working_folder(tmp_path, fired, module):
    "the flag makes the difference: the same command without it runs what lies there"
    evil_modules(tmp_path, fired)
    run = lambda *flags: subprocess.run([sys.executable, *flags, '-m', module, 'nope', '--rater', 'x'], cwd=tmp_path, capture_output=True, timeout=60)
    run('-P')
    assert not fired.exists()
    run()
    assert fired.exists()


def test_the_embedded_clusters_workers_import_nothing_from_the_working_folder(tmp_path, fired):
    evil_modules(tmp_path, fired)
    code = ("if __name__ == '__main__':\n    from mammo_nb.core.engine import engine\n    from mammo_nb.core.settings import load_settings\n    import psutil, sys\n"
            f"    s = load_settings({str(ROOT)!r})\n    s = s.model_copy(update=dict(engine=s.engine.model_copy(update=dict(workers=1))))\n"
            "    with engine(s) as c:\n        me = psutil.Process()\n        ports = [x.laddr.ip for p in [me, *me.children(recursive=True)] for x in p.net_connections('tcp') if x.status == 'LISTEN']\n"
            "        print(c.submit(len, 'abc').result(), sorted(set(ports)), len(ports), c.cluster.dashboard_link)\n")
    (tmp_path/'x').mkdir()
    (tmp_path/'x'/'go.py').write_text(code)
    done = subprocess.run([sys.executable, '-P', str(tmp_path/'x'/'go.py')], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and not fired.exists(), done.stderr[-800:]
    assert done.stdout.startswith("3 ['127.0.0.1'] "), done.stdout


# ---- settings

INI = (ROOT/'settings.ini').read_text()


@pytest.mark.parametrize('text, words', [
    (INI.replace('arch = resnet18', 'arch = %(outputs)s/${HOME}'), ''), (INI + '\n[DEFAULT]\nmin_steps = 7\n', 'not a known key|must be'), ('\0', 'section|key'), (INI.replace('seed = 42', 'seed = ' + '9'*5000), 'seed'),
    (INI.replace('file_timeout = 60', 'file_timeout = nan'), 'file_timeout'), (INI.replace('hold_out = 0.2', 'hold_out = inf'), 'hold_out'), (INI.replace('findings = biopsy, mag', 'findings = __class__, mag'), 'findings'),
    (INI.replace('column = has_mag_view', 'column = has_x"; DROP TABLE events'), 'column'), (INI + '#'*(2 << 20), 'bytes'), (INI.replace('[study]', '[study]\n[study]'), 'already exists')])
def test_settings_are_values_and_nothing_else(tmp_path, text, words):
    (tmp_path/'settings.ini').write_text(text)
    if not words:
        assert load_settings(tmp_path/'settings.ini').train.arch == '%(outputs)s/${HOME}'
        return
    with pytest.raises(MammoError, match=words) as e: load_settings(tmp_path/'settings.ini')
    assert '\n' not in str(e.value) and len(str(e.value)) < 1000


# ---- reports and cards

HOSTILE = ['<script>alert(1)</script>.dcm', '<img src=x onerror=alert(1)>', 'a|b', '[x](javascript:alert(1))', '</td></table><h1>', '`x`', '" onload="alert(1)']


def test_a_report_shows_paths_as_text_and_runs_nothing(tmp_path):
    import nbformat
    df = pl.DataFrame(dict(path=HOSTILE))
    with pl.Config(fmt_str_lengths=200):
        outs = [v4.new_output('execute_result', {'text/html': df._repr_html_(), 'text/plain': str(df)}), v4.new_output('stream', text='\n'.join(HOSTILE)),
                v4.new_output('display_data', {'text/plain': HOSTILE[0]}), v4.new_output('error', ename='E', evalue=HOSTILE[0], traceback=[HOSTILE[1]])]
    cell = v4.new_code_cell('x', outputs=outs)
    nbformat.write(v4.new_notebook(cells=[v4.new_markdown_cell('# T <script>alert(2)</script>'), v4.new_markdown_cell('## Run'), cell]), tmp_path/'n.ipynb')
    write_report(tmp_path/'n.ipynb', tmp_path/'r.html')
    page = (tmp_path/'r.html').read_text()
    assert '<script' not in page and '<img' not in page and '<h1>&quot;' not in page and html.escape(HOSTILE[0]) in page
    assert "Content-Security-Policy\" content=\"default-src 'none'" in page and page.index('Content-Security') < page.index('<title>')
    assert '<title>T &lt;script&gt;' in page


def test_a_model_card_shows_a_vendors_name_as_text():
    from mammo_nb.learn.card import _table
    for line in _table(('vendor', 'n'), [(h, 1) for h in HOSTILE])[2:-1]:
        assert re.sub(r'\\.', '', line).count('|') == 3 and '<' not in re.sub(r'\\.', '', line) and '](' not in re.sub(r'\\.', '', line), line
    from markdown_it import MarkdownIt
    page = MarkdownIt('commonmark').enable('table').render('\n'.join(_table(('vendor', 'n'), [(h, 1) for h in HOSTILE])))
    assert '<script' not in page and '<img' not in page and '<a ' not in page and page.count('<tr>') == len(HOSTILE) + 1 and html.escape(HOSTILE[0]) in page


@hyp(max_examples=100, deadline=None)
@given(st.text(max_size=300))
def test_told_is_one_printable_line(text): assert told(text).isprintable() and len(told(text)) <= 1000


# ---- servers

@pytest.fixture(scope='module')
def page(tmp_path_factory):
    "The labeler's page, really started: (port, token, its folder)"
    pytest.importorskip('voila')
    from labeler_page import make_cohort
    root = tmp_path_factory.mktemp('served')
    make_cohort(root/'a', n=4)
    evil_modules(root/'a', root/'fired')
    cmd = [sys.executable, '-P', '-m', 'mammo_nb.labels.serve', 'a', '--rater=anna', '--outputs', str(root), '--settings', str(ROOT/'settings.ini')]
    proc = subprocess.Popen(cmd, cwd=root/'a', stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    said = proc.stdout.readline()
    m = re.search(r'http://127\.0\.0\.1:(\d+)/\?token=(\S+)', said)
    assert m, said + proc.stderr.read()
    yield int(m[1]), m[2], root, proc
    proc.terminate()
    proc.wait(20)


def asked(port, path='/', **headers):
    "Status and address at the end"
    try:
        with urllib.request.urlopen(urllib.request.Request(f'http://127.0.0.1:{port}{path}', headers=headers), timeout=60) as r: return r.status, r.url
    except urllib.error.HTTPError as e: return e.code, e.url


def other_addresses():
    import psutil
    return [a.address for i in psutil.net_if_addrs().values() for a in i if a.family == socket.AF_INET and not a.address.startswith('127.')]


def test_the_page_listens_on_this_machine_only(page):
    import psutil
    port, _, _, proc = page
    me = psutil.Process(proc.pid)
    heard = {c.laddr.ip for p in [me, *me.children(recursive=True)] for c in p.net_connections('tcp') if c.status == 'LISTEN'}
    assert heard == {'127.0.0.1'}
    for ip in other_addresses():
        with pytest.raises(OSError): socket.create_connection((ip, port), timeout=3).close()


def test_without_the_token_there_is_a_login_and_nothing_else(page):
    port, token, _, _ = page
    for path in ('/', '/?token=wrong', '/voila/render/labeler.ipynb'):
        status, url = asked(port, path)
        assert status in (403, 404) or '/login' in url, (path, status, url)
    kernel = '/api/kernels/00000000-0000-0000-0000-000000000000'
    assert asked(port, kernel)[0] in (403, 404) or '/login' in asked(port, kernel)[1]
    assert upgrade(port, f'{kernel}/channels') in (302, 403)
    assert asked(port, f'/?token={token}') == (200, f'http://127.0.0.1:{port}/?token={token}')


def upgrade(port, path, host=None, origin=None, cookie=None):
    "Status of a websocket's handshake"
    with socket.create_connection(('127.0.0.1', port), timeout=10) as s:
        lines = [f'GET {path} HTTP/1.1', f'Host: {host or f"127.0.0.1:{port}"}', 'Upgrade: websocket', 'Connection: Upgrade', 'Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==', 'Sec-WebSocket-Version: 13']
        s.sendall('\r\n'.join(lines + [f'Origin: {origin}']*bool(origin) + [f'Cookie: {cookie}']*bool(cookie) + ['', '']).encode())
        return int(s.recv(4096).split()[1])


def test_a_foreign_host_or_origin_is_refused_though_it_has_token_or_cookie(page):
    port, token, _, _ = page
    assert asked(port, f'/?token={token}', Host='evil.example')[0] == 403
    assert asked(port, f'/?token={token}', Host=f'evil.example:{port}')[0] == 403
    assert asked(port, f'/?token={token}', Host=f'localhost:{port}')[0] == 200
    with urllib.request.urlopen(f'http://127.0.0.1:{port}/?token={token}', timeout=60) as r:
        cookie = '; '.join(c.split(';')[0] for c in r.headers.get_all('Set-Cookie'))
        kernel = re.search(r'kernelId["\']?\s*[:=]\s*["\']([0-9a-f-]{36})', r.read().decode())[1]
    channels = f'/api/kernels/{kernel}/channels'
    own = f'http://127.0.0.1:{port}'
    assert upgrade(port, channels, origin=own, cookie=cookie) == 101, 'the page itself may'
    assert upgrade(port, channels, origin='http://evil.example', cookie=cookie) == 403, 'another site may not, though the browser sends the cookie along'
    assert upgrade(port, channels, host='evil.example', cookie=cookie) == 403
    assert upgrade(port, channels, origin=own) in (302, 403), 'nor anybody without token and cookie'


def test_the_token_lies_in_no_file_of_the_outputs_and_nothing_planted_there_was_run(page):
    port, token, root, _ = page
    asked(port, f'/?token={token}')
    assert not [p for p in root.rglob('*') if p.is_file() and token.encode() in p.read_bytes()] and not (root/'fired').exists()


def test_jupyterlab_as_it_comes_is_on_loopback_with_a_token():
    from jupyter_server.serverapp import ServerApp
    from jupyter_server.auth import IdentityProvider
    app = ServerApp()
    assert app.ip == 'localhost' and len(IdentityProvider().token) >= 32 and not app.allow_remote_access and not app.allow_origin
    for p in [ROOT/'README.md', ROOT/'Containerfile', *(ROOT/'cluster').iterdir()]:
        if p.is_file(): assert not re.search(r'--ip[= ]|token=["\']{2}|--no-token|allow_remote|0\.0\.0\.0', p.read_text()), p


# ---- the audit of dependencies

@pytest.fixture
def audit():
    from importlib.machinery import SourceFileLoader
    from importlib.util import module_from_spec, spec_from_loader
    loader = SourceFileLoader('ci_audit', str(ROOT/'.ci'/'audit'))
    module = module_from_spec(spec_from_loader('ci_audit', loader))
    sys.dont_write_bytecode, old = True, sys.dont_write_bytecode
    loader.exec_module(module)
    sys.dont_write_bytecode = old
    return module


def test_the_audit_reports_what_is_known_and_what_could_not_be_asked(audit):
    vuln = dict(id='PYSEC-1', fix_versions=['2.6'], aliases=[], description='x')
    lines = audit.report(json.dumps(dict(dependencies=[dict(name='torch', version='2.5', vulns=[vuln]), dict(name='numpy', version='2.1', vulns=[]), dict(name='mammo_nb', skip_reason='x')], fixes=[])))
    assert lines == ['torch 2.5: PYSEC-1, mended in 2.6', '2 packages audited, 1 could not be asked about: 1 known vulnerability.']
    assert 'nothing was audited' in audit.report(json.dumps(dict(dependencies=[dict(name='a', skip_reason='x')])))[0]
    for text in ('', 'null', '[]', '{', 'Traceback'): assert len(audit.report(text)) == 1 and 'nothing was audited' in audit.report(text)[0]


def test_the_audit_cannot_hang_or_fail_the_run(audit, monkeypatch):
    began = time.monotonic()
    assert audit.run([sys.executable, '-c', 'import time; time.sleep(60)'], began + 1) == '' and audit.run(['/no/such/program'], began + 9) == '' and time.monotonic() - began < 20
    monkeypatch.setattr(audit, 'run', lambda cmd, end: '')
    assert audit.audit(1) == ['The package index offers no pip-audit (or not in time); nothing was audited.']
    text = (ROOT/'.ci'/'run').read_text()
    assert 'wait "$audit" || true' in text and audit.SECONDS < 60
