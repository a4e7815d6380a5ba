"""Tables as eight data sets publish them: small made-up samples with the published columns, and what each row must become."""
import json
from pathlib import Path

import polars as pl
import pydicom
import pytest

from mammo_nb.cohort.facts import pseudonym
from mammo_nb.cohort.tables import ADAPTERS, adapter_of, match_published, read_published
from mammo_nb.core.settings import MammoError

TABLES = Path(__file__).parent/'tables'
KEY = b'0'*32
SIDES = ('ImageLaterality', 'Laterality', 'ViewPosition', 'ViewCodeSequence', 'PatientOrientation', 'SeriesDescription', 'ProtocolName', 'AcquisitionDeviceProcessingDescription', 'ImageComments',
         'AnatomicRegionSequence')


def manifest(*rows):
    "Rows of (path, more); image ids are img0, img1 …"
    base = dict(sop_uid=None, series_uid=None, patient_id=None, laterality=None, view=None, status='ok')
    return pl.DataFrame([dict(image_id=f'img{i}', path=p) | base | more for i, (p, more) in enumerate(rows)],
                        schema=dict.fromkeys(('image_id', 'path', *base), pl.String))


def read(file, **kw): return read_published(TABLES/file, **kw)


@pytest.mark.parametrize('file,name', [('embed.csv', 'embed'), ('rsna.csv', 'rsna'), ('rsna_test.csv', 'rsna'), ('vindr.csv', 'vindr'), ('vindr_findings.csv', 'vindr'),
                                       ('cbis_mass.csv', 'cbis-ddsm'), ('cbis_calc.csv', 'cbis-ddsm'), ('inbreast.csv', 'inbreast'), ('cmmd.csv', 'cmmd'), ('bcs_dbt.csv', 'bcs-dbt')])
def test_known_by_its_columns(file, name):
    assert adapter_of(TABLES/file) == name
    t = read(file)
    head = (TABLES/file).read_text(encoding='cp1252').splitlines()[0].rstrip(';').split(ADAPTERS[name].delimiter)
    assert sorted([*t.mapping, *t.unknown]) == sorted(head)  # every column is either read or said not to be


def test_embed():
    t = read('embed.csv')
    assert t.rows['mag'].to_list() == [None, None, 1, None] and t.rows['kind'].to_list() == ['2D', 'cview', '2D', 'ROI_SSC']
    assert t.bad == [(6, 'spot_mag is neither yes nor no'), (7, 'no file is named')] and t.odd == {}
    assert t.rows['view'].to_list() == ['CC', 'CC', 'ML', None] and t.rows['laterality'].to_list() == ['R', 'R', 'L', 'L']
    m = match_published(t, manifest(('images/10000002/x/1.2.840.3/1.2.840.13.dcm', {}), ('images/10000001/x/1.2.840.1/1.2.840.11.dcm', {})), KEY)
    assert m.rows.select('image_id', 'mag').rows() == [('img1', None), ('img0', 1)] and [n for n, _ in m.lost] == [3, 5]


def test_rsna_biopsy_is_no_tool_in_the_picture():
    t = read('rsna.csv')
    assert 'biopsy' in t.unknown and 'biopsy' not in t.rows.columns and t.odd == {('view', 'AT'): 1}
    assert t.bad == [(5, 'image_id is not a number')] and t.rows['view'].to_list() == ['CC', 'MLO', None]
    assert read('rsna.csv', labels={'implant': 'implant'}).rows['implant'].to_list() == [0, 1, 0]
    m = match_published(t, manifest(('train/10006/462822612.dcm', {}), ('copy/10006/462822612.dcm', {}), ('train/10007/1459541791.dcm', {})), KEY)
    assert m.rows['image_id'].to_list() == ['img2'] and m.lost == [(2, 'fits 2 files of this cohort'), (4, 'no image of this cohort')]


def test_vindr_several_findings_are_one_image():
    m = match_published(read('vindr_findings.csv'), manifest(('images/b8d273e8601f348d3664778dae0e7e0b/d8125545210c08e1b1793a5af6458ee2.dicom', {})), KEY)
    assert m.rows['image_id'].to_list() == ['img0'] and m.lost == []
    assert read('vindr.csv').rows.select('laterality', 'view').rows() == [('L', 'MLO'), ('R', 'CC')]


def test_cbis_line_ends_inside_fields():
    t = read('cbis_mass.csv')
    assert t.rows.select('line', 'series_uid', 'laterality', 'view').rows() == [(3, '1.3.6.1.4.1.9590.100.1.2.2', 'L', 'CC'), (6, '1.3.6.1.4.1.9590.100.1.2.6', 'L', 'MLO')]
    assert t.bad == [(7, 'the image file path names no series')]
    m = match_published(read('cbis_calc.csv'), manifest(('1-1.dcm', dict(series_uid='1.3.6.1.4.1.9590.100.1.2.12', laterality='L', view='L-CC'))), KEY)
    assert len(m.rows) == 1 and m.differs.rows() == [('img0', 'laterality', 'L', 'R')]


def test_inbreast():
    t = read('inbreast.csv')
    assert t.rows.select('number', 'laterality', 'view').rows() == [('22678622', 'R', 'CC'), ('22678646', 'L', 'MLO'), ('22678686', 'R', 'FB')]
    assert t.bad == [(4, 'has 6 fields, the first line has 8'), (7, 'File Name is not a number')] and t.odd == {}
    m = match_published(t, manifest(('AllDICOMs/22678622_61b13c59bcba149d_MG_R_CC_ANON.dcm', {})), KEY)
    assert m.rows['image_id'].to_list() == ['img0']


def test_cmmd_goes_by_patient_and_side():
    who = lambda p: dict(patient_id=pseudonym(KEY, p, 'patient'))
    m = match_published(read('cmmd.csv'), manifest(('a/1-1.dcm', who('D1-0001') | dict(laterality='R')), ('a/1-2.dcm', who('D1-0001') | dict(laterality='R')),
                                                   ('a/1-3.dcm', who('D1-0001') | dict(laterality='L'))), KEY)
    assert m.rows['image_id'].to_list() == ['img0', 'img1'] and m.lost == [(3, 'no image of this cohort')] and read('cmmd.csv').bad == [(4, 'ID1 is not one of CMMD')]


def test_bcs_dbt_frames_of_a_volume():
    where = 'data/DBT-P00001/1.2.826.0.1.3/1.2.826.0.1.5/1-1.dcm'
    m = match_published(read('bcs_dbt.csv'), manifest((where, {}), (where, {}), ('data/DBT-P00001/1.2.826.0.1.3/1.2.826.0.1.4/1-1.dcm', {})), KEY)
    assert m.rows.select('image_id', 'laterality', 'view').rows() == [('img2', 'R', 'MLO'), ('img0', 'L', 'CC'), ('img1', 'L', 'CC')]


def test_omi_db(tmp_path):
    header = {'00200062': {'vr': 'CS', 'Value': ['R']}, '00185101': {'vr': 'CS', 'Value': ['MLO']}}
    for client, text in (('demd1', json.dumps({'Site': 'adde', 'ClientID': 'demd1', 'STUDIES': {'1.2.1': {'StudyDate': '2013-01-01', 'EpisodeID': '1', '1.2.2': {'1.2.3': {}, '1.2.4': {'5': {}}}}}})),
                         ('demd2', '{"STUDIES": '), ('demd3', '{"Site": "x"}')):
        (tmp_path/client).mkdir()
        (tmp_path/client/f'imagedb_{client}.json').write_text(text)
    (tmp_path/'demd1/1.2.1').mkdir()
    (tmp_path/'demd1/1.2.1/1.2.3.json').write_text(json.dumps(header))
    (tmp_path/'demd1/1.2.1/1.2.4.dcm.json').write_text('[1')
    t = read_published(tmp_path)
    assert t.name == 'omi-db' and t.rows.select('sop_uid', 'series_uid', 'laterality', 'view').rows() == [('1.2.3', '1.2.2', 'R', 'MLO')]
    assert t.bad == [('demd1/1.2.1/1.2.4', 'is no JSON'), ('demd2/imagedb_demd2.json', 'is no JSON'), ('demd3/imagedb_demd3.json', 'lists no STUDIES')]
    assert match_published(t, manifest(('x.dcm', dict(sop_uid='1.2.3'))), KEY).rows['image_id'].to_list() == ['img0']


@pytest.mark.parametrize('data,words', [(b'PK\x03\x04', 'Excel workbook'), (b'a,b\n1,2\n', 'none of the tables known'), (b'', 'none of the tables known'), (b'\xff\xfe\x00', 'none of the tables known')])
def test_no_table_of_ours(tmp_path, data, words):
    (tmp_path/'t.csv').write_bytes(data)
    with pytest.raises(MammoError, match=words): read_published(tmp_path/'t.csv')


def test_sentences(tmp_path):
    with pytest.raises(MammoError, match="no column 'implant_yes'"): read('rsna.csv', labels={'implant': 'implant_yes'})
    with pytest.raises(MammoError, match="'ddsm' is no data set"): read('rsna.csv', name='ddsm')
    with pytest.raises(MammoError, match='no imagedb_'): read_published(tmp_path)
    with pytest.raises(MammoError, match="can't be read"): read_published(tmp_path/'gone.csv')


def test_rejected_images_are_not_meant():
    m = match_published(read('rsna_test.csv'), manifest(('10008/736471439.dcm', dict(status='rejected'))), KEY)
    assert len(m.rows) == 0 and len(m.lost) == 1


# ---- into a cohort

@pytest.fixture(scope='module')
def cohort(tmp_path_factory):
    from mammo_nb.cohort.manifest import scan
    from mammo_nb.core.settings import load_settings
    from mammo_nb.dicom.phantom import make_cohort
    s, root = load_settings(), tmp_path_factory.mktemp('published')
    make_cohort(root/'dicom', patients=12, image_size=64, broken=0, workers=1)
    return s, root, scan(root/'dicom', root/'out'/'leeds', s, seed=2)


def embed_table(root, df, name, spot='1.0'):
    rows = [f"/mnt/x/{p},L,CC,2D,{spot}\n" for p in df['path']]
    (root/name).write_text('anon_dicom_path,ImageLateralityFinal,ViewPosition,FinalImageType,spot_mag\n' + ''.join(rows))
    return root/name


def one_file_each(df): return df.filter(pl.col('status') == 'ok', pl.col('frames') == 1, ~pl.col('path').str.contains('!')).sort('image_id')


def test_a_headers_word_reaches_training_images_only_and_overrules_nobody(cohort):
    from mammo_nb.labels.published import import_published
    from mammo_nb.labels.store import LabelStore
    s, root, df = cohort
    mine = one_file_each(df)
    assert set(mine['split']) == {'train', 'valid', 'hold_out'}
    human = mine.filter(split='train')['image_id'][0]
    with LabelStore(root/'out'/'leeds'/'labels.sqlite', s) as store:
        store.sync_images(df)
        store.label(human, (), 'anna')
    path = embed_table(root, mine, 'embed.csv')
    got, again = import_published(root/'out'/'leeds', path, s), import_published(root/'out'/'leeds', path, s)
    train = mine.filter(split='train')['image_id'].to_list()
    assert (got.added, again.added, again.known) == (len(train), 0, len(train))
    with LabelStore(root/'out'/'leeds'/'labels.sqlite', s) as store: labels = store.labels()
    assert sorted(labels['image_id']) == train and labels.filter(image_id=human).select('has_mag_view', 'source').row(0) == (0, 'human')
    assert set(labels.filter(pl.col('image_id') != human)['source']) == {'header'}
    kept = pl.read_parquet(root/'out'/'leeds'/'tables'/'embed.parquet')
    assert len(kept) == len(mine) and kept.columns == ['image_id', 'laterality', 'view', 'kind']


def test_a_corrected_table_has_the_last_word_and_the_command_says_what_it_did(cohort, capsys):
    from mammo_nb.labels.published import main
    from mammo_nb.labels.store import LabelStore
    s, root, df = cohort
    one = one_file_each(df).filter(split='hold_out').head(1)
    args = ['leeds', '--outputs', str(root/'out')]
    file = root/'rsna.csv'
    for said in ('1', '0'):
        file.write_text('site_id,patient_id,image_id,laterality,view,age,implant,machine_id,prediction_id\n' + f"2,{one['path'][0].split('/')[-2]},1,L,CC,1,{said},1,1\n")
        embed_table(root, one, 'embed2.csv', said)
        assert main([*args, str(root/'embed2.csv'), '--label', 'biopsy=spot_mag']) == 0
        out = capsys.readouterr().out
        assert 'embed: 1 rows = 1 read + 0 left out' in out and 'labels: 1 new, 0 known' in out
        with LabelStore(root/'out'/'leeds'/'labels.sqlite', s) as store: assert store.labels().filter(image_id=one['image_id'][0])['has_biopsy_tool'].item() == int(said)
    assert main([*args, str(file)]) == 0 and 'line 2: no image of this cohort' in capsys.readouterr().out
    for wrong, words in (([str(root/'gone.csv')], "can't be read"), ([str(file), '--label', 'implant=implant'], 'with one of the study'), ([str(file), '--dataset', 'ddsm'], 'no data set')):
        assert main([*args, *wrong]) == 1
        err = capsys.readouterr().err
        assert err.startswith('mammo: ') and words in err and err.count('\n') == 1
    assert main(['york', '--outputs', str(root/'out'), str(file)]) == 1 and 'No cohort' in capsys.readouterr().err


def test_what_headers_leave_out_is_filled_in_and_stays_so(cohort, tmp_path):
    from mammo_nb.cohort.manifest import read_manifest, scan
    from mammo_nb.labels.published import import_published
    s, root, df = cohort
    src, out, mine = tmp_path/'dicom', tmp_path/'out'/'leeds', one_file_each(df)
    mute, half, told = mine['path'][:3]
    for p in (mute, half, told):
        (src/p).parent.mkdir(parents=True, exist_ok=True)
        ds = pydicom.dcmread(root/'dicom'/p)
        if p != told:
            for k in list(ds.keys()):
                if ds[k].keyword in SIDES: del ds[k]
        if p == half: ds.ImageLaterality = 'R'
        if p == told: ds.ImageLaterality = 'R'
        ds.save_as(src/p)
    view = lambda m, p: m.filter(path=p).select('laterality', 'view', 'view_from').row(0)
    before = scan(src, out, s, seed=2)
    assert view(before, mute) == ('', '', None) and view(before, half) == ('R', 'R', None) and view(before, told)[0] == 'R'
    for side, want in (('L', [('L', 'L-CC', 'embed'), ('R', 'R-CC', 'embed')]), ('R', [('R', 'R-CC', 'embed'), ('R', 'R-CC', 'embed')])):
        path = embed_table(tmp_path, before if side == 'L' else before.filter(path=mute), f'{side}.csv')
        path.write_text(path.read_text().replace(',L,CC', f',{side},CC'))   # the second time about one image only
        got = import_published(out, path, s)
        now = read_manifest(out)
        assert [view(now, mute), view(now, half)] == want and got.filled == (2 if side == 'L' else 0)
        assert view(now, told) == view(before, told) and now.drop('laterality', 'view', 'view_from').equals(before.drop('laterality', 'view', 'view_from'))
        assert scan(src, out, s, seed=2).equals(now), 'the next scan keeps them'
