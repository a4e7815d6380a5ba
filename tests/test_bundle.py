"A bundle is enough on its own, never a pickle, never changed unseen, and equal to the network it came from."
import json
import pickle
import shutil
import subprocess
import sys

import numpy as np
import onnx
import polars as pl
import pytest

import toy_cohort as toy
from mammo_nb.core.engine import new_seal, put_seal
from mammo_nb.core.settings import MammoError
from mammo_nb.learn import bundle as B
from mammo_nb.learn.bundle import Bundle, bundle_meta, export_bundle, int8_check, load_weights_safely, write_bundle_json

S = toy.settings_with(image=dict(model_size=48))


def pictures(size=48, n=24):
    rng = np.random.default_rng(0)
    return np.stack([np.pad(toy.toy_image(rng, k % 2, k % 3 == 0, size, size-12), ((0, 0), (6, 6))) for k in range(n)])


def network(n_out=2, size=48, seed=0):
    import torch
    from mammo_nb.learn.rounds import Detail
    torch.manual_seed(seed)
    nn = torch.nn
    net = nn.Sequential(nn.Sequential(Detail(size), nn.Conv2d(2, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, 2, 1), nn.ReLU()),
                        nn.Sequential(nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(8, n_out)))
    x = torch.from_numpy(pictures(size))[:, None].float()/255
    with torch.no_grad():
        for _ in range(20): net(x)
        net.eval()
        z = net(x)
        net[1][-1].weight.mul_(2/z.std())
        net[1][-1].bias.copy_(-(net(x)-net[1][-1].bias).mean(0))
    return net


@pytest.fixture(scope='module')
def images(): return pictures()


@pytest.fixture(scope='module')
def made(tmp_path_factory, images):
    folder, net = tmp_path_factory.mktemp('bundle')/'003', network()
    meta = bundle_meta(S, 'leeds', 3, temperature=1.7, mean=.1, std=.3, label_snapshot='abc')
    agree = export_bundle(net, folder, meta, images)
    write_bundle_json(folder, meta | dict(agreement=agree))
    return folder, net, agree


@pytest.fixture
def copy(made, tmp_path):
    "a copy to spoil"
    shutil.copytree(made[0], tmp_path/'003')
    return tmp_path/'003'


def test_equals_torch_with_normalisation_and_temperature_inside(made, images):
    import torch
    folder, net, agree = made
    with torch.no_grad(): want = torch.sigmoid(net((torch.from_numpy(images[:, None]).float()/255-.1)/.3)/1.7).numpy()
    got = Bundle.load(folder).predict(images)
    assert got.dtype == np.float32 and np.abs(got-want).max() <= 1e-4 and agree['fp32']['max_dp'] <= 1e-4
    assert want.std(0).min() > .05, 'the comparison is on answers that differ'


def test_any_batch_size_gives_the_same(made, images):
    b = Bundle.load(made[0], threads=1)
    whole = b.predict(images)
    for n in (1, 5, 24): assert np.allclose(b.predict(images, batch_size=n), whole, atol=1e-6)
    assert b.predict(images[:, None]).shape == (24, 2) and b.predict(images[:0]).shape == (0, 2)


def test_the_one_file_is_enough(made, tmp_path, images):
    folder = made[0]
    (tmp_path/'m.onnx').write_bytes((folder/'model.onnx').read_bytes())
    b, whole = Bundle.load(tmp_path/'m.onnx'), Bundle.load(folder)
    assert b.id == whole.id and b.id.startswith('leeds-r003-') and b.names == S.names and b.columns == S.columns and b.size == 48
    assert b.thresholds.tolist() == [.5, .5] and b.meta['temperature'] == 1.7 and b.meta['label_snapshot'] == 'abc'
    assert (b.predict(images) == whole.predict(images)).all()


def test_int8_has_its_own_id_and_about_the_same_answers(made, images):
    folder, _, agree = made
    a, b = Bundle.load(folder), Bundle.load(folder, 'int8')
    assert b.id == a.id+'-int8' == Bundle.load(folder/'model.int8.onnx').id and b.precision == 'int8'
    assert np.abs(a.predict(images)-b.predict(images)).mean() < .05 and agree['int8']['images'] == 24
    ops = {n.op_type for n in onnx.load(folder/'model.int8.onnx').graph.node}
    assert 'QuantizeLinear' in ops and (folder/'model.int8.onnx').stat().st_size


def test_int8_weights_are_signed_bytes(made):
    m = onnx.load(made[0]/'model.int8.onnx')
    kinds = {t.data_type for t in m.graph.initializer if len(t.dims) == 4}
    assert onnx.TensorProto.INT8 in kinds


def test_softmax_head_leaves_none_out(tmp_path, images):
    import torch
    s = S.model_copy(update=dict(study=S.study.model_copy(update=dict(head='softmax'))))
    net = network(3)
    export_bundle(net, tmp_path/'b', bundle_meta(s, 'x', 1), images, int8=False)
    with torch.no_grad(): want = torch.softmax(net(torch.from_numpy(images[:, None]).float()/255), 1)[:, 1:].numpy()
    got = Bundle.load(tmp_path/'b'/'model.onnx').predict(images)
    assert got.shape == (24, 2) and np.abs(got-want).max() < 1e-5 and (got.sum(1) <= 1+1e-6).all()


def test_a_wrong_export_is_not_kept_quiet(tmp_path, images, monkeypatch):
    real = B.export_onnx
    def lying(model, path, meta):
        net = real(model, path, meta)
        return type('Other', (), {'__call__': lambda self, x: 1-net(x), 'state_dict': net.state_dict})()
    monkeypatch.setattr(B, 'export_onnx', lying)
    with pytest.raises(MammoError, match='differs from the trained network'): export_bundle(network(), tmp_path/'b', bundle_meta(S, 'x', 1), images, int8=False)


def test_loading_needs_no_torch(made):
    code = ("import sys; from mammo_nb.learn.bundle import Bundle; import numpy as np; b = Bundle.load(sys.argv[1]); "
            "b.predict(np.zeros((2, 48, 48), np.uint8)); bad = {'torch', 'fastai', 'torchvision', 'matplotlib'} & set(sys.modules); assert not bad, bad")
    r = subprocess.run([sys.executable, '-c', code, str(made[0])], capture_output=True, text=True)
    assert r.returncode == 0, r.stderr[-500:]


def test_nothing_of_the_machine_is_left_inside(made):
    for f in ('model.onnx', 'model.int8.onnx', 'bundle.json'):
        data = (made[0]/f).read_bytes()
        assert b'site-packages' not in data and b'/mammo_nb/' not in data and b'stack_trace' not in data


@pytest.mark.parametrize('spoil, words', [
    (lambda d: (d/'model.onnx').write_bytes((d/'model.onnx').read_bytes()+b'\0'), 'checksum differs'),
    (lambda d: (d/'model.onnx').unlink(), 'no such file'),
    (lambda d: (d/'bundle.json').unlink(), 'bundle.json: no such file'),
    (lambda d: (d/'bundle.json').write_text('{'), 'carries no checksum')])
def test_spoiled_bundles(copy, spoil, words):
    spoil(copy)
    with pytest.raises(MammoError, match=words) as e: Bundle.load(copy)
    assert '\n' not in str(e.value)


def edited(folder, change):
    "a lone .onnx file with its protobuf changed and sealed anew"
    m, p = onnx.load(folder/'model.onnx'), folder/'edited.onnx'
    change(m)
    seal = next((x for x in m.metadata_props if x.key == 'mammo_nb.seal'), None)
    if seal: seal.value = new_seal()
    p.write_bytes(m.SerializeToString())
    if seal: put_seal(p, seal.value)
    return p


def test_another_preprocessing_version_is_refused(copy):
    def newer(m): next(p for p in m.metadata_props if p.key == 'preprocessing_version').value = '99'
    with pytest.raises(MammoError, match='preprocessing version 99'): Bundle.load(edited(copy, newer))


def test_external_data_is_refused(copy):
    def point(m):
        t = m.graph.initializer[0]
        t.ClearField('raw_data')
        t.data_location = onnx.TensorProto.EXTERNAL
        e = t.external_data.add()
        e.key, e.value = 'location', '../../etc/passwd'
    with pytest.raises(MammoError, match='other files'): Bundle.load(edited(copy, point))


def test_somebody_elses_onnx_is_refused(copy):
    def strip(m): del m.metadata_props[:]
    with pytest.raises(MammoError, match='no mammo_nb bundle'): Bundle.load(edited(copy, strip))


class Bomb:
    def __reduce__(self): return (open, ('fired', 'w'))


@pytest.mark.parametrize('name', ['model.pkl', 'model.pth', 'model.pt'])
def test_pickles_are_refused_and_not_run(tmp_path, monkeypatch, name):
    import torch
    monkeypatch.chdir(tmp_path)
    with open(name, 'wb') as f: pickle.dump(Bomb(), f)
    with pytest.raises(MammoError, match='refused'): Bundle.load(tmp_path/name)
    torch.save(Bomb(), name)
    with pytest.raises(MammoError, match='refused'): load_weights_safely(tmp_path/name)
    assert not (tmp_path/'fired').exists()


def test_plain_weights_load_but_are_no_bundle(tmp_path):
    import torch
    torch.save(network().state_dict(), tmp_path/'w.pth')
    assert set(load_weights_safely(tmp_path/'w.pth')) == set(network().state_dict())
    with pytest.raises(MammoError, match='weights only'): Bundle.load(tmp_path/'w.pth')


def test_weights_round_trip(made):
    import torch
    net = network(seed=9)
    net.load_state_dict(load_weights_safely(made[0]/'weights.safetensors'))
    assert all(torch.equal(a, b) for a, b in zip(net.state_dict().values(), made[1].state_dict().values()))


def test_wrong_images_and_providers(made, images):
    b = Bundle.load(made[0])
    for bad in (images.astype(np.float32), images[:, :40], images[0]):
        with pytest.raises(MammoError, match='takes uint8 images'): b.predict(bad)
    with pytest.raises(MammoError, match='auto, cpu or cuda'): Bundle.load(made[0], provider='tpu')
    with pytest.raises(MammoError, match='fp32 or int8'): Bundle.load(made[0], 'fp16')
    import onnxruntime as ort
    if 'CUDAExecutionProvider' not in ort.get_available_providers():
        with pytest.raises(MammoError, match='no CUDA provider'): Bundle.load(made[0], provider='cuda')


def test_bundle_json_is_strict_json_with_all_checksums(made):
    def no(x): raise AssertionError(x)
    info = json.loads((made[0]/'bundle.json').read_text(), parse_constant=no)
    assert set(info['files']) == {'model.onnx', 'model.int8.onnx', 'weights.safetensors'}
    assert info['files']['model.onnx'] == B.sha256_file(made[0]/'model.onnx')


def held_out(n=800, seed=0):
    "Labelled hold-out rows and sure probabilities"
    rng = np.random.default_rng(seed)
    y = (rng.random((n, 2)) < .2).astype(float)
    p = np.clip(.6*y + .2 + rng.normal(0, .05, (n, 2)), .01, .99)
    ids = [f'{i//4}' for i in range(n)]
    df = pl.DataFrame(dict(study_id=ids, patient_id=ids) | {c: y[:, k] for k, c in enumerate(S.columns)} | {f'prob_{m}': p[:, k] for k, m in enumerate(S.names)})
    return df, y, p


def test_int8_is_trusted_where_it_loses_nothing_on_enough_studies():
    df, y, p = held_out()
    same = int8_check(df, p*.99, S, [.5, .5])
    assert same['use'] and same['images'] == 800 and all(f['accuracy_lost'] == 0 == f['sensitivity_lost'] and f['positive_studies'] > 20 for f in same['findings'].values())
    few = int8_check(df[:60], p[:60], S, [.5, .5])
    assert not few['use'] and 'fewer than 20 positive studies of biopsy, mag' in few['why'] and not int8_check(df[:0], p[:0], S, [.5, .5])['use']


@pytest.mark.parametrize('lost, use', [(1, True), (2, False), (9, False)])
def test_int8_that_loses_more_than_02_points_of_accuracy_is_not_trusted(lost, use):
    df, y, p = held_out()
    worse, no = p.copy(), np.flatnonzero(y[:, 1] == 0)[:lost]
    worse[no, 1] = .9  # false alarms: 2 of 800 images are 0.25 points
    got = int8_check(df, worse, S, [.5, .5])
    assert got['use'] is use and got['findings']['mag']['accuracy_lost'] == round(lost/800, 6) and (use or 'mag' in got['why'])


def test_int8_that_misses_a_study_is_not_trusted():
    df, y, p = held_out()
    worse, study = p.copy(), df.filter(pl.col(S.columns[0]) == 1)['study_id'][0]
    worse[(df['study_id'] == study).to_numpy(), 0] = .1
    got = int8_check(df, worse, S, [.5, .5])
    assert not got['use'] and got['findings']['biopsy']['sensitivity_lost'] > .002 and 'biopsy' in got['why']


@pytest.mark.parametrize('note, want', [(dict(use=True), 'int8'), (dict(use=False), 'fp32'), (dict(use='yes'), 'fp32'), (None, 'fp32'), ('damaged', 'fp32')])
def test_auto_takes_int8_only_where_the_check_passed(made, tmp_path, note, want):
    folder = tmp_path/'b'
    shutil.copytree(made[0], folder)
    info = json.loads((folder/'bundle.json').read_text())
    write_bundle_json(folder, info | dict(int8=note))
    assert Bundle.load(folder, 'auto', provider='cpu').precision == want
    (folder/'model.int8.onnx').unlink()
    if want == 'int8':
        with pytest.raises(MammoError, match='no such file, though its bundle.json lists it'): Bundle.load(folder, 'auto', provider='cpu')
    else: assert Bundle.load(folder, 'auto', provider='cpu').precision == 'fp32'
    assert Bundle.load(folder/'model.onnx', 'auto').precision == 'fp32', 'a single file is what it is'
