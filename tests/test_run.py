"""The command line and the papermill runner: parameters, errors, exit codes, records of a run."""
import json
import os
import re

import pytest

from conftest import mammo
from mammo_nb.core.run import check_parameters, run_stage, stages
from mammo_nb.core.settings import MammoError


def test_values_take_the_type_of_the_default(counting):
    root = counting('pass', 'cohort = "a"\nn = 2\nlr = 0.1\nfast = False\nids = []')
    given = dict(cohort='001', n='007', lr='1e-3', fast='yes', ids='a, b')
    assert check_parameters(stages(root)['count'], given) == dict(cohort='001', n=7, lr=1e-3, fast=True, ids=['a', 'b'])


@pytest.mark.parametrize('params, words', [
    (dict(chort='x'), "no parameter 'chort'; it has cohort, n"), (dict(n='two'), "n = 'two' must be a whole number"),
    (dict(cohort='../up'), "'../up' cannot be a folder's name"), (dict(cohort='a/b'), "cannot be a folder's name"), (dict(cohort=''), "cannot be a folder's name")])
def test_a_wrong_parameter_is_named_and_nothing_is_written(counting, params, words):
    root = counting('pass')
    with pytest.raises(MammoError, match=re.escape(words)): run_stage('count', params, root)
    assert not (root/'outputs').exists()


def test_parameters_cannot_inject_code(counting):
    root = counting('from mammo_nb.core.run import log_metrics\nlog_metrics(got=text)', 'cohort = "a"\ntext = ""')
    evil = '"; import os; os.mkdir("pwned") #\n\'\'\'"""'
    assert run_stage('count', dict(text=evil), root).metrics == dict(got=evil)
    assert not list(root.rglob('pwned'))


def test_the_record_of_a_run(counting):
    root = counting('from mammo_nb.core.run import log_metrics\nlog_metrics(x=n)\nprint("n is", n)')
    run = run_stage('count', dict(n='5'), root)
    assert re.fullmatch(r'\d{8}T\d{6}Z-count', run.folder.name) and run.folder.parent == root/'outputs'/'a'/'runs'
    params = json.loads((run.folder/'params.json').read_text())
    assert params['parameters'] == dict(cohort='a', n=5) and params['settings_hash'] and params['package_version']
    assert json.loads((run.folder/'metrics.json').read_text()) == run.metrics == dict(x=5)
    html = (run.folder/'report.html').read_text()
    assert 'n is 5' in html and '<script' not in html and 'https://' not in html and 'log_metrics' not in html
    again = run_stage('count', {}, root)
    assert again.folder != run.folder


def test_a_user_error_is_one_sentence_exit_1_and_leaves_nothing(counting):
    root = counting('from mammo_nb.core.settings import MammoError\nraise MammoError("The moon is full; wait a day.")')
    done = mammo('run', 'count', cwd=root)
    assert done.returncode == 1 and done.stderr.strip() == 'mammo: The moon is full; wait a day.' and 'Traceback' not in done.stdout
    assert not (root/'outputs'/'a').exists()


def test_another_error_is_exit_3_and_keeps_its_notebook(counting):
    root = counting('1 / 0')
    done = mammo('run', 'count', cwd=root)
    assert done.returncode == 3 and 'ZeroDivisionError' in done.stderr and 'Traceback' not in done.stderr
    kept = list((root/'outputs'/'a'/'runs').glob('*/1_count.ipynb'))
    assert len(kept) == 1 and str(kept[0]) in done.stderr and (kept[0].parent/'report.html').exists()


def test_a_dead_kernel_is_exit_3(counting):
    root = counting('import os, signal\nos.kill(os.getpid(), signal.SIGKILL)')
    done = mammo('run', 'count', cwd=root)
    assert done.returncode == 3 and 'its kernel died' in done.stderr and 'Traceback' not in done.stderr


def test_parameter_file_keeps_text_as_text(counting):
    root = counting('from mammo_nb.core.run import log_metrics\nlog_metrics(cohort=cohort, n=n)')
    (root/'p.yaml').write_text('cohort: 001\nn: 3\n')
    done = mammo('run', 'count', '-f', 'p.yaml', '-p', 'n=4', cwd=root)
    assert done.returncode == 0, done.stderr
    assert json.loads(next((root/'outputs'/'001'/'runs').glob('*/metrics.json')).read_text()) == dict(cohort='001', n=4)


@pytest.mark.parametrize('args, code, words', [
    (['run', 'nope'], 1, "No stage 'nope'; there are count."), (['run', 'count', '-p', 'n'], 1, '-p n: write -p name=value.'),
    (['run', 'count', '-f', 'gone.yaml'], 1, '-f gone.yaml: No such file'), (['fly'], 2, 'No such command'), (['label', 'nope', '--rater', 'x'], 1, "No cohort 'nope'")])
def test_wrong_commands(counting, args, code, words):
    done = mammo(*args, cwd=counting('pass'))
    assert done.returncode == code and words in done.stderr and 'Traceback' not in done.stderr


def test_outside_a_project(tmp_path):
    done = mammo('run', 'preprocess', cwd=tmp_path)
    assert done.returncode == 1 and 'No settings.ini in' in done.stderr


def test_a_folder_that_may_not_be_written(counting):
    if os.geteuid() == 0: pytest.skip('root may write anywhere')
    root = counting('pass')
    (root/'outputs').mkdir(mode=0o500)
    done = mammo('run', 'count', cwd=root)
    assert done.returncode == 1 and 'permission is denied' in done.stderr


def test_doctor_and_stages(counting):
    root = counting('pass')
    doctor = mammo('doctor', cwd=root)
    assert doctor.returncode == 0 and 'onnxruntime providers' in doctor.stdout, doctor.stdout + doctor.stderr
    missing = mammo('doctor', cwd=root, MAMMO_WEIGHTS=str(root/'nowhere'))
    assert missing.returncode == 1 and 'is no folder' in missing.stdout.replace('\n', ' ')
    assert 'count' in mammo('stages', cwd=root).stdout
