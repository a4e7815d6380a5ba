"Every file that comes in comes out as a row: identities, studies, archives, what is no image, scans again, kills, privacy."
import errno
import hashlib
import os
import shutil
import stat
import subprocess
import sys
import textwrap
import time
import zipfile
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings as hyp, strategies as st
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence

import dicom_files as df
from mammo_nb.cohort import facts as F, manifest as M
from mammo_nb.cohort.files import list_files, source_path
from mammo_nb.cohort.manifest import cohort_key, funnel, image_id, pseudonym, read_manifest, reject, scan, source_dir
from mammo_nb.cohort.thumbs import Thumbnails
from mammo_nb.core.engine import engine, read_meta
from mammo_nb.core.settings import MammoError, load_settings

S = load_settings()
TINY = np.arange(64, dtype=np.uint16).reshape(8, 8)


def study(**kw): return S.model_copy(update=dict(study=S.study.model_copy(update=kw)))


def image(n=1, px=TINY, **kw):
    "A file's content; `n` makes the UIDs"
    return df.make(px, **dict(PatientID=f'P-{n}', StudyInstanceUID=f'1.2.{n}', SeriesInstanceUID=f'1.4.{n}', SOPInstanceUID=f'1.3.{n}') | kw)


def put(root, **files):
    "Files by name (`__` for a folder's slash)"
    for name, data in files.items():
        path = root/name.replace('__', '/')
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


class Cohort:
    "A folder of files and what a scan says of them"
    def __init__(self, tmp): self.dicom, self.folder = tmp/'dicom', tmp/'outputs'/'cohort'; self.dicom.mkdir()

    def put(self, files): put(self.dicom, **files)

    def scan(self, settings=S, **kw): self.df = scan(self.dicom, self.folder, settings, **kw); return self.df

    def row(self, path, frame=0): return self.df.filter(pl.col('path') == path, pl.col('frame') == frame).row(0, named=True)

    def status(self): return {p: s for p, s in self.df.select('path', 'status').iter_rows()}


@pytest.fixture
def c(tmp_path): return Cohort(tmp_path)


@pytest.fixture
def reads(monkeypatch):
    "Paths whose headers were read"
    seen, real = [], M.read_many
    def counted(items, **kw): seen.extend(i[0] for i in items); return real(items, **kw)
    monkeypatch.setattr(M, 'read_many', counted)
    return seen


# identity

def test_ids():
    assert image_id('1.2.3') == hashlib.sha256(b'1.2.3\n0').hexdigest()[:16] != image_id('1.2.3', 1)
    assert pseudonym(b'k', 'a') == pseudonym(b'k', 'a') != pseudonym(b'k2', 'a') and len(pseudonym(b'k', 'a')) == 16


def test_the_same_image_twice_is_a_duplicate_and_another_content_a_conflict(c):
    c.put({'a.dcm': image(1), 'b__a.dcm': image(1), 'c.dcm': image(1, TINY + 1), 'd.dcm': image(2)})
    c.scan()
    assert c.status() == {'a.dcm': 'ok', 'b/a.dcm': 'duplicate', 'c.dcm': 'rejected', 'd.dcm': 'ok'}
    assert 'SOPInstanceUID' in c.row('c.dcm')['reason'] and 'different content' in c.row('c.dcm')['reason']
    ok = c.df.filter(status='ok')
    assert ok['image_id'].n_unique() == len(ok) and c.row('a.dcm')['image_id'] == image_id('1.3.1')
    assert funnel(c.df) == dict(found=4, ok=2, rejected=1, duplicate=1, reasons={c.row('c.dcm')['reason']: 1})
    assert c.df.filter(pl.col('content').is_not_null())['path'].to_list() == ['a.dcm', 'b/a.dcm', 'c.dcm']  # only those compared


def test_missing_uids_fall_back_to_content_and_folder(c):
    bare = dict(SOPInstanceUID='', StudyInstanceUID='', SeriesInstanceUID='')
    c.put({'x__a.dcm': image(1, **bare), 'y__copy.dcm': image(1, **bare), 'y__b.dcm': image(1, TINY + 1, **bare)})
    c.scan()
    assert c.status() == {'x/a.dcm': 'ok', 'y/b.dcm': 'ok', 'y/copy.dcm': 'duplicate'}
    assert c.row('x/a.dcm')['image_id'] == image_id(c.row('x/a.dcm')['content']) and c.row('x/a.dcm')['sop_uid'] is None
    assert c.row('x/a.dcm')['study_id'].startswith('folder-') and c.row('y/b.dcm')['study_id'] == c.row('y/copy.dcm')['study_id']


def test_a_row_per_frame(c):
    c.put({'v.dcm': df.make([TINY, TINY + 1, TINY + 2], SOPInstanceUID='1.9', PatientID='P', StudyInstanceUID='1.8'), 'w.dcm': image(1)})
    c.scan()
    v = c.df.filter(path='v.dcm')
    assert v['frame'].to_list() == [0, 1, 2] and v['frames'].to_list() == [3] * 3 and v['image_id'].to_list() == [image_id('1.9', i) for i in range(3)]


def test_equal_folder_names_of_two_patients_stay_two_studies(c):
    bare = dict(StudyInstanceUID='')
    for p in (1, 2):
        for i in (1, 2): c.put({f'patient{p}__study1__{i}.dcm': image(f'{p}{i}', PatientID=f'P-{p}', **bare)})
    assert c.scan()['study_id'].n_unique() == 2 and c.df['patient_id'].n_unique() == 2
    assert c.df.group_by('study_id').agg(pl.col('patient_id').n_unique())['patient_id'].max() == 1


def test_two_patients_in_one_folder_are_two_studies(c):
    for p in (1, 2): c.put({f'study1__{p}.dcm': image(p)})
    assert c.scan(study(study_id=('folder',)))['study_id'].n_unique() == 2 and c.df['study_id'].str.contains('^folder-[0-9a-f]{16}$').all()
    named = study(study_id=('folder',))
    assert all(s.startswith('study1-') for s in c.scan(named.model_copy(update=dict(privacy=S.privacy.model_copy(update=dict(folder_names=True)))))['study_id'])


def test_study_by_accession_is_a_pseudonym(c):
    c.put({'a.dcm': image(1, AccessionNumber='ACC77'), 'b.dcm': image(2, AccessionNumber='ACC77'), 'c.dcm': image(3)})
    c.scan(study(study_id=('accession', 'uid')))
    assert c.row('a.dcm')['study_id'] == c.row('b.dcm')['study_id'] and 'ACC77' not in c.row('a.dcm')['study_id'] and c.row('c.dcm')['study_id'] == '1.2.3'


def test_a_study_of_bad_files_only_keeps_its_row(c):
    whole = image(5)
    c.put({'good__1.dcm': image(1), 'good__2.dcm': b'\0' * 300, 'bad__1.dcm': b'\0' * 300, 'bad__2.dcm': b'', 'cut__1.dcm': whole[:400], 'notes__readme.txt': b'hello'})
    c.scan()
    assert c.status() == {'bad/1.dcm': 'rejected', 'bad/2.dcm': 'rejected', 'cut/1.dcm': 'rejected', 'good/1.dcm': 'ok', 'good/2.dcm': 'rejected', 'notes/readme.txt': 'rejected'}
    assert c.row('good/2.dcm')['study_id'] == '1.2.1' and c.row('good/2.dcm')['patient_id'] == c.row('good/1.dcm')['patient_id']
    assert c.row('bad/1.dcm')['study_id'] == c.row('bad/2.dcm')['study_id'] and c.row('bad/1.dcm')['study_id'].startswith('folder-')
    assert c.row('bad/1.dcm')['split'] == c.row('bad/2.dcm')['split'] is not None and c.row('notes/readme.txt')['study_id'] is None
    assert (c.df.filter(status='rejected')['reason'].str.len_chars() > 5).all()


def test_missing_patient_follows_the_study(c):
    c.put({'a.dcm': image(1, StudyInstanceUID='1.2.7'), 'b.dcm': image(2, StudyInstanceUID='1.2.7', PatientID=''), 'c.dcm': image(3, PatientID='')})
    c.scan()
    assert c.row('a.dcm')['patient_id'] == c.row('b.dcm')['patient_id'] == pseudonym(cohort_key(c.folder), 'P-1') != c.row('c.dcm')['patient_id']


def test_who_was_named_after_the_study_keeps_name_and_split(c):
    c.put({f'{i}__a.dcm': image(i, StudyInstanceUID=f'1.2.{i}', PatientID='') for i in range(12)})
    before = c.scan()
    c.put({f'{i}__b.dcm': image(100 + i, StudyInstanceUID=f'1.2.{i}', PatientID=f'P-{i}') for i in range(12)})
    after = c.scan()
    assert after.filter(pl.col('path').str.ends_with('a.dcm')).equals(before)
    assert after.group_by('study_id').agg(pl.col('split').n_unique())['split'].max() == 1 and before['split'].n_unique() > 1


# what is found

def test_names_say_nothing_content_does(c):
    c.put({'a.DCM': image(1), 'b': image(2), '1.2.840.5': image(3), 'd__e__f.jpg': image(4), 'g.dcm': b'%PDF-1.4 ...', 'h.txt': b'text', '.DS_Store': b'\0\0\0\1Bud1'})
    c.scan()
    assert {p for p, s in c.status().items() if s == 'ok'} == {'a.DCM', 'b', '1.2.840.5', 'd/e/f.jpg'} and c.row('g.dcm')['reason'] == 'is not a DICOM file (PDF)'


def zipped(files):
    import io
    out = io.BytesIO()
    with zipfile.ZipFile(out, 'w', zipfile.ZIP_DEFLATED) as z:
        for n, d in files: z.writestr(n, d)
    return out.getvalue()


def test_archives_are_opened_and_nested_ones_refused_in_words(c, reads):
    inner = zipped([('x.dcm', image(9))])
    c.put({'a.zip': zipped([('s/1.dcm', image(1)), ('s/2', image(2)), ('n.zip', inner), ('note.txt', b'hi')]), 'noname': zipped([('3.dcm', image(3))]),
           'word.docx': zipped([('word/document.xml', b'<x/>')]), 'broken.zip': inner[:60], 'd.dcm': image(1)})
    c.scan()
    assert c.status() == {'a.zip!/s/1.dcm': 'ok', 'a.zip!/s/2': 'ok', 'a.zip!/n.zip': 'rejected', 'a.zip!/note.txt': 'rejected', 'noname!/3.dcm': 'ok',
                          'word.docx': 'rejected', 'broken.zip': 'rejected', 'd.dcm': 'duplicate'}
    assert 'zip archive inside a zip archive' in c.row('a.zip!/n.zip')['reason'] and 'zip' in c.row('broken.zip')['reason']
    first, seen = c.df, len(reads)
    assert c.scan().equals(first) and len(reads) == seen


def test_a_member_listed_twice_is_not_lost(c):
    with pytest.warns(UserWarning): c.put({'a.zip': zipped([('1.dcm', image(1)), ('1.dcm', image(2))])})
    first = c.scan()
    assert len(first) == 2 and sorted(first['status']) == ['ok', 'rejected'] and c.scan().equals(first)


def test_links_circles_pipes_and_closed_doors(c, tmp_path):
    c.put({'a__1.dcm': image(1)})
    (c.dicom/'a'/'back').symlink_to(c.dicom)
    (c.dicom/'self').symlink_to('self')
    (c.dicom/'dangling.dcm').symlink_to('nowhere')
    put(tmp_path/'elsewhere', **{'2.dcm': image(2)})
    (c.dicom/'outside').symlink_to(tmp_path/'elsewhere')
    (c.dicom/'twin').symlink_to(tmp_path/'elsewhere')
    put(tmp_path/'further', **{'3.dcm': image(3)})
    (tmp_path/'elsewhere'/'deeper').symlink_to(tmp_path/'further')
    os.mkfifo(c.dicom/'pipe.dcm')
    c.scan()
    assert c.status() == {'a/1.dcm': 'ok', 'outside/2.dcm': 'ok', 'outside/deeper/3.dcm': 'ok', 'self': 'rejected', 'dangling.dcm': 'rejected', 'pipe.dcm': 'rejected'}


def test_names_that_are_not_utf8(c):
    name = os.fsdecode(b'Aufn\xe4hmen')
    (c.dicom/name).mkdir()
    (c.dicom/name/'1.dcm').write_bytes(image(1))
    (c.dicom/('x' * 200)).write_bytes(image(2))
    assert c.scan()['status'].to_list() == ['ok', 'ok'] and c.df['path'][0] == 'Aufn\\xe4hmen/1.dcm'
    assert Path(source_path(c.dicom, c.df['path'][0])).read_bytes() == image(1)


@pytest.mark.parametrize('tags, word', [(dict(Modality='SR'), 'structured report'), (dict(Modality='PR'), 'presentation state'), (dict(Modality='CT'), 'modality CT'),
                                        (dict(Rows=0), 'no image'), (dict(Rows=60000, Columns=60000), 'max_pixels'), (dict(NumberOfFrames=2**31 - 1), 'frames'),
                                        (dict(MIMETypeOfEncapsulatedDocument='application/pdf'), 'document')])
def test_what_is_no_mammogram(c, tags, word):
    c.put({'a.dcm': image(1), 'b.dcm': image(2, **tags)})
    c.scan()
    assert c.status() == {'a.dcm': 'ok', 'b.dcm': 'rejected'} and word in c.row('b.dcm')['reason'] and c.row('b.dcm')['study_id'] == '1.2.2'


@pytest.mark.parametrize('modality', ['MG', 'RG', 'OT', 'CR', 'DX', 'SC', ''])
def test_mammograms_go_by_many_names(c, modality):
    c.put({'a.dcm': image(1, Modality=modality)})
    assert c.scan()['status'].to_list() == ['ok']


def test_no_pixels_dicomdir_and_nonsense_values(c):
    ds = df.dataset(TINY, SOPInstanceUID='1.3.1')
    del ds.PixelData
    index = Dataset()
    index.DirectoryRecordSequence, index.file_meta = Sequence([Dataset()]), ds.file_meta
    c.put({'a.dcm': image(1, WindowWidth=1), 'nopixels.dcm': df.content(ds), 'DICOMDIR': df.content(index)})
    c.scan()
    assert c.row('nopixels.dcm')['reason'] == 'holds no pixel data' and 'DICOMDIR' in c.row('DICOMDIR')['reason'] and c.row('DICOMDIR')['study_id'] is None


def test_phantoms_come_out_as_their_makers_expect(tmp_path):
    from mammo_nb.dicom.phantom import make_cohort
    truth = make_cohort(tmp_path/'d', patients=8, image_size=128, seed=5, broken=.25, workers=1)
    m = scan(tmp_path/'d', tmp_path/'c', S)
    both = truth.with_columns(pl.col('frame').fill_null(0).cast(pl.Int32)).join(m.select('path', 'frame', 'status', 'view', 'laterality', got='image_id'), on=['path', 'frame'], how='left', suffix='_m')
    assert both['status'].null_count() == 0 and len(m) == len(truth)
    at_scan = both.filter((pl.col('broken') != 'truncated').fill_null(True))  # whose pixels are missing shows when they are wanted
    assert at_scan.filter(pl.col('status') != pl.col('expect').fill_null('ok')).select('path', 'broken', 'expect', 'status').rows() == []
    named = at_scan.filter(pl.col('image_id').is_not_null())
    assert named['image_id'].equals(named['got'].rename('image_id'))
    assert m.filter(status='ok').group_by('patient_id').agg(pl.col('split').n_unique())['split'].max() == 1


def test_text_of_the_wrong_kind(c):
    "over-long or wrongly typed text arrives as bytes"
    data = image(1, Manufacturer='LORAD LORAD ')
    at = data.index(b'LO\x0c\0LORAD')
    c.put({'a.dcm': data[:at] + b'UN\0\0' + (12).to_bytes(4, 'little') + data[at + 4:], 'b.dcm': image(2)})
    assert c.scan()['status'].to_list() == ['ok', 'ok'] and c.row('a.dcm')['manufacturer'] in ('Hologic', None) or c.row('a.dcm')['manufacturer'].startswith('other-')


# again and again

def test_an_unchanged_tree_is_not_read_again(c, reads):
    c.put({f's{i}__{i}.dcm': image(i) for i in range(5)} | {'dup.dcm': image(1), 'x__bad.dcm': b'\0' * 200, 'a.zip': zipped([('1.dcm', image(8))])})
    first = c.scan()
    written = (c.folder/'manifest.parquet').stat().st_mtime_ns
    reads.clear()
    assert c.scan().equals(first) and reads == [] and (c.folder/'manifest.parquet').stat().st_mtime_ns == written
    c.put({'new.dcm': image(77)})
    assert c.scan().height == first.height + 1 and reads == ['new.dcm']
    assert c.df.filter(pl.col('path') != 'new.dcm').equals(first)


_opened = []  # an audit hook cannot be taken away again, so there is one, and it is mostly deaf


def test_a_second_scan_opens_no_file(c):
    c.put({f's{i}__{i}.dcm': image(i) for i in range(30)} | {'dup.dcm': image(1), 'x__bad.dcm': b'\0' * 200, 'text': b'x', 'a.zip': zipped([('1.dcm', image(8))])})
    opened = []
    if not _opened: sys.addaudithook(lambda event, args: _opened and event == 'open' and isinstance(args[0], (str, bytes)) and _opened[0].append(os.fsdecode(args[0])))
    _opened[:] = [opened]
    first, root = c.scan(), str(c.dicom)
    assert {p for p in opened if p.startswith(root)} == {f'{root}/{p.split("!/")[0]}' for p in first['path']}, 'the first one opens all'
    opened.clear()
    assert c.scan().equals(first) and not [p for p in opened if p.startswith(root)] and opened
    _opened[:] = [[]]


def deadly(items, **kw):
    "A reader that dies of some files and hangs in others"
    if any('deadly' in i[0] for i in items): os._exit(3)
    if any('hang' in i[0] for i in items): time.sleep(60)
    return F.read_many(items, **kw)


def test_a_file_that_brings_its_reader_down_costs_only_itself(c, monkeypatch):
    c.put({f'{i}.dcm': image(i) for i in range(20)} | {'deadly.dcm': image(30), 'hang.dcm': image(31)})
    quick = S.model_copy(update=dict(engine=S.engine.model_copy(update=dict(workers=2, file_timeout=2.))))
    monkeypatch.setattr(M, 'read_many', deadly)
    monkeypatch.setattr(F, 'GROUP_FILES', 6)
    with engine(quick) as client: c.scan(quick, client=client)
    bad = c.df.filter(status='rejected')
    assert bad['path'].to_list() == ['deadly.dcm', 'hang.dcm'] and 'longer than 2 s' in bad['reason'][1]
    assert 'brought the reading process down' in bad['reason'][0] or 'longer than 2 s' in bad['reason'][0]  # on a busy machine dying takes that long
    assert c.df.filter(status='ok').height == 20


def test_a_changed_file_is_read_again_and_loses_its_thumbnail(c, reads):
    c.put({'a.dcm': image(1), 'b.dcm': image(2)})
    c.scan()
    t = Thumbnails(c.folder/'thumbnails')
    for i in c.df['image_id']: t.put(i, TINY.astype(np.uint8))
    c.put({'a.dcm': image(1, TINY + 3, ImageLaterality='R')})
    os.utime(c.dicom/'a.dcm', ns=(1, 1))
    reads.clear()
    c.scan()
    assert reads == ['a.dcm'] and c.row('a.dcm')['laterality'] == 'R' and t.missing(c.df['image_id']) == [image_id('1.3.1')]


def test_vanished_moved_and_returned(c):
    c.put({'a.dcm': image(1), 'b.dcm': image(2), 'junk.txt': b'x', 'bad.dcm': b'\0' * 200})
    before, t = c.scan(), Thumbnails(c.folder/'thumbnails')
    for i in before.filter(status='ok')['image_id']: t.put(i, TINY.astype(np.uint8))
    moved = c.dicom/'sub'/'b.dcm'
    moved.parent.mkdir()
    os.rename(c.dicom/'b.dcm', moved)
    for n in ('a.dcm', 'junk.txt', 'bad.dcm'): (c.dicom/n).unlink()
    c.scan()
    assert c.status() == {'a.dcm': 'rejected', 'sub/b.dcm': 'ok'} and 'gone' in c.row('a.dcm')['reason']
    assert c.row('a.dcm')['split'] == before.filter(path='a.dcm')['split'][0]
    assert c.scan().equals(read_manifest(c.folder))  # still known as gone
    assert t.ids() == {image_id('1.3.1')}  # an absence costs no thumbnail; a move does: to the file system the file was changed (its ctime)
    c.put({'a.dcm': image(1)})
    assert c.scan().filter(path='a.dcm')['status'][0] == 'ok' and funnel(c.df)['ok'] == 2


def test_the_duplicate_takes_over_when_the_first_is_gone(c):
    c.put({'a.dcm': image(1), 'b.dcm': image(1)})
    c.scan()
    (c.dicom/'a.dcm').unlink()
    c.scan()
    assert c.status() == {'b.dcm': 'ok'}


def test_rejected_pixels_stay_rejected_until_retry_or_change(c):
    c.put({'a.dcm': image(1), 'b.dcm': image(2)})
    c.scan()
    failed = pl.DataFrame(dict(image_id=[image_id('1.3.1')], reason=['broken stream'], step=['pixels']))
    m = reject(c.folder, failed, S)
    assert m.equals(read_manifest(c.folder)) and c.scan().equals(m) and c.row('a.dcm')['reason'] == 'broken stream'
    assert c.scan(retry=True)['status'].to_list() == ['ok', 'ok']
    reject(c.folder, failed.with_columns(step=pl.lit('access')), S)
    assert c.scan()['status'].to_list() == ['ok', 'ok']  # unreachable is not broken
    reject(c.folder, failed, S)
    os.utime(c.dicom/'a.dcm', ns=(5, 5))
    assert c.scan()['status'].to_list() == ['ok', 'ok']


def test_retry_reads_bad_headers_again(c, reads):
    c.put({'a.dcm': image(1), 'bad.dcm': b'\0' * 200, 'z.zip': zipped([('1.dcm', b'\0' * 200), ('2.dcm', image(2))])})
    first = c.scan()
    reads.clear()
    assert c.scan(retry=True).equals(first) and sorted(reads) == ['bad.dcm', 'z.zip', 'z.zip!/1.dcm']


def test_what_could_not_be_reached_is_tried_again(c, monkeypatch):
    from mammo_nb.dicom.read import Source
    c.put({'a.dcm': image(1), 'b.dcm': image(2)})
    real = Source._raw
    def raw(self):
        if str(self.src).endswith('b.dcm'): raise OSError(errno.EIO, 'Input/output error')
        return real(self)
    with monkeypatch.context() as mp:
        mp.setattr(Source, '_raw', raw)
        mp.setattr(F, '_beginning', lambda file, n: b'')
        c.scan()
    assert c.status() == {'a.dcm': 'ok', 'b.dcm': 'rejected'}
    c.scan()
    assert c.status() == {'a.dcm': 'ok', 'b.dcm': 'ok'}


def test_killed_and_started_again_gives_the_same_rows(c, reads, monkeypatch):
    files = {f'{i % 4}__{i:02}.dcm': image(i) for i in range(30)} | {'dup.dcm': image(3), 'odd.dcm': image(4, TINY + 1), 'z.zip': zipped([(f'{i}.dcm', image(i)) for i in range(40, 50)])}
    c.put(files)
    cohort_key(c.folder, seed=3)
    shutil.copytree(c.folder, c.folder.parent/'calm')
    calm = scan(c.dicom, c.folder.parent/'calm', S)
    reads.clear()
    monkeypatch.setattr(F, 'PART_ROWS', 4)
    monkeypatch.setattr(F, 'GROUP_FILES', 3)
    real, left = M.FactStore.add, iter([3, 2, 10])
    for n in left:
        count = iter(range(n))
        def add(self, facts):
            if next(count, None) is None: raise KeyboardInterrupt  # as a kill: what is not on disk is lost
            real(self, facts)
        with monkeypatch.context() as mp:
            mp.setattr(M.FactStore, 'add', add)
            mp.setattr(M.FactStore, 'flush', lambda self, f=M.FactStore.flush: f(self) if sum(map(len, self.parts)) >= 4 else self.parts.clear())
            try: c.scan()
            except KeyboardInterrupt: assert not (c.folder/'manifest.parquet').exists()
    assert c.scan().equals(calm) and len(reads) < 33 + 3 * 8 + 14
    assert sorted(p.name for p in (c.folder/'scan').iterdir()) == ['facts.parquet']


def test_an_interrupt_keeps_what_was_read(c, reads, monkeypatch):
    c.put({f'{i:02}.dcm': image(i) for i in range(20)})
    monkeypatch.setattr(F, 'GROUP_FILES', 5)
    with monkeypatch.context() as mp:
        read = M.read_many
        def stopped(items, **kw):
            if len(reads) >= 10: raise KeyboardInterrupt
            return read(items, **kw)
        mp.setattr(M, 'read_many', stopped)
        with pytest.raises(KeyboardInterrupt): c.scan()
    first = reads.copy()
    reads.clear()
    c.scan()
    assert len(first) == 10 and sorted(first + reads) == [f'{i:02}.dcm' for i in range(20)]


def test_a_real_kill(c, tmp_path):
    "kill -9 in the middle of a scan, then again to the end"
    c.put({f'{i}.dcm': image(i) for i in range(40)})
    code = textwrap.dedent(f'''
        import os, sys
        from mammo_nb.cohort import facts as F, manifest as M
        from mammo_nb.core.settings import load_settings
        F.PART_ROWS, F.GROUP_FILES, real, n = 5, 5, M.read_many, [0]
        def slow(items, **kw):
            n[0] += len(items)
            if n[0] >= 23: os.kill(os.getpid(), 9)
            return real(items, **kw)
        M.read_many = slow
        M.scan({str(c.dicom)!r}, {str(c.folder)!r}, load_settings(), seed=1)''')
    assert subprocess.run([sys.executable, '-c', code]).returncode == -9
    parts = pl.read_parquet(c.folder/'scan'/'*.parquet')
    assert len(parts) == 20 and not (c.folder/'manifest.parquet').exists()
    assert c.scan().equals(scan(c.dicom, tmp_path/'calm', S, seed=1))


def test_on_the_engine_the_rows_are_the_same(c, tmp_path):
    c.put({f'{i % 5}__{i}.dcm': image(i) for i in range(40)} | {'dup.dcm': image(3), 'z.zip': zipped([('1.dcm', image(50))])})
    cohort_key(c.folder, seed=1), cohort_key(tmp_path/'e', seed=1)
    one = S.model_copy(update=dict(engine=S.engine.model_copy(update=dict(workers=1))))
    with engine(one) as client: assert scan(c.dicom, tmp_path/'e', one, client).equals(c.scan(one))


@hyp(max_examples=10, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 2), st.sampled_from(['ok', 'bad', 'cut', 'text', 'nouid'])), min_size=1, max_size=14))
def test_the_funnel_adds_up_whatever_comes(tmp_path_factory, files):
    d = tmp_path_factory.mktemp('f')
    for i, (uid, px, kind) in enumerate(files):
        data = image(uid, TINY + px, **dict(SOPInstanceUID='') if kind == 'nouid' else {})
        put(d/'dicom', **{f'{i % 3}__{i}.dcm': dict(ok=data, bad=b'\1' * 200, cut=data[:300], text=b'{}', nouid=data)[kind]})
    put(d/'dicom', **{'one.dcm': image(99)})
    m = scan(d/'dicom', d/'cohort', S)
    f, ok = funnel(m), m.filter(status='ok')
    assert f['found'] == len(m) == len(files) + 1 and sum(f['reasons'].values()) == f['rejected'] and ok['image_id'].n_unique() == len(ok)
    assert m.filter(pl.col('status') != 'ok')['reason'].null_count() == 0 and m.select('path', 'frame').is_unique().all()
    assert scan(d/'dicom', d/'cohort', S).equals(m)


# mistakes

def test_nothing_to_find_is_one_sentence_and_leaves_nothing(tmp_path):
    (tmp_path/'empty').mkdir()
    put(tmp_path/'texts', **{'a.txt': b'a', 'b.dcm': b''})
    for folder, word in [('missing', 'no such folder'), ('empty', 'is empty'), ('texts', 'none of them is DICOM')]:
        with pytest.raises(MammoError, match=word) as e: scan(tmp_path/folder, tmp_path/'outputs'/'c', S)
        assert '\n' not in str(e.value) and folder in str(e.value) and not (tmp_path/'outputs'/'c').exists()


def test_an_empty_folder_leaves_an_old_manifest_alone(c):
    c.put({'a.dcm': image(1)})
    before = c.scan()
    (c.dicom/'a.dcm').unlink()
    with pytest.raises(MammoError, match='is empty'): c.scan()
    assert read_manifest(c.folder).equals(before)


def test_missing_and_damaged_cohorts(c):
    with pytest.raises(MammoError, match='No cohort in .*preprocess'): read_manifest(c.folder)
    c.put({'a.dcm': image(1)})
    c.scan()
    assert source_dir(c.folder) == c.dicom.resolve()
    (c.folder/'key').rename(c.folder/'away')
    with pytest.raises(MammoError, match='key is missing'): c.scan()
    (c.folder/'key').write_bytes(b'short')
    with pytest.raises(MammoError, match='damaged'): c.scan()
    (c.folder/'away').rename(c.folder/'key')
    (c.folder/'manifest.parquet').write_bytes(b'PAR1 half')
    with pytest.raises(MammoError, match='manifest.parquet is cut short'): read_manifest(c.folder)


def test_key_and_metadata(c):
    c.put({'a.dcm': image(1)})
    c.scan()
    assert stat.S_IMODE((c.folder/'key').stat().st_mode) == 0o600 and len(cohort_key(c.folder)) == 32
    meta = read_meta(c.folder/'manifest.parquet')
    assert meta['schema_version'] and meta['created_utc'].endswith('Z') and meta['settings_hash'] == S.hash and meta['package_version']
    first = ['image_id', 'path', 'bytes', 'mtime_ns', 'sop_uid', 'series_uid', 'study_id', 'patient_id', 'site', 'manufacturer', 'model', 'laterality', 'view', 'rows',
             'columns', 'frames', 'frame', 'bits_stored', 'photometric', 'transfer_syntax', 'split']
    assert c.df.columns[:21] == first and 'status' in c.df.columns and 'reason' in c.df.columns


def test_findings_without_rules_have_silent_columns(c):
    c.put({'a.dcm': image(1)})
    f = tuple(x.model_copy(update=dict(name='implant')) if x.name == 'mag' else x for x in S.findings)
    m = c.scan(S.model_copy(update=dict(findings=f)))
    assert m['header_implant'].null_count() == 1 and 'header_biopsy' in m.columns and 'header_mag' not in m.columns


# privacy

def marked():
    "A header with a mark in every text element there is, nested and private ones too"
    from pydicom.datadict import DicomDictionary
    ds, n = df.dataset(TINY), 0
    def fill(d):
        nonlocal n
        for tag, (vr, vm, *_, keyword) in DicomDictionary.items():
            if vr not in ('AE', 'CS', 'DA', 'LO', 'LT', 'PN', 'SH', 'ST', 'UC', 'UI', 'UR', 'UT') or not keyword or tag >> 16 in (0, 2, 4) or tag >> 16 >= 0x2000: continue
            if keyword in ('SpecificCharacterSet', 'Modality', 'PhotometricInterpretation', 'MIMETypeOfEncapsulatedDocument', 'SOPClassUID'): continue
            n += 1
            d.add_new(tag, vr, '19370214' if vr == 'DA' else 'ZQMARK')
    fill(ds)
    inner = Dataset()
    fill(inner)
    ds.ViewCodeSequence = ds.AnatomicRegionSequence = ds.RequestAttributesSequence = Sequence([inner])
    block = ds.private_block(0x45, 'ZQMARK CREATOR', create=True)
    for i in range(1, 30): block.add_new(i, 'LO', 'ZQMARK')
    assert n > 400
    return df.content(ds)


def test_no_text_of_a_header_reaches_a_file(c):
    c.put({'a.dcm': marked(), 'b.dcm': marked()[:3000], 'c.dcm': image(1, PatientName='ZQMARK', PatientID='ZQMARK7', InstitutionName='ZQMARK')})
    c.scan()
    assert c.status()['a.dcm'] == 'ok' and c.status()['c.dcm'] == 'ok'
    for p in c.folder.rglob('*.parquet'):
        for text in pl.read_parquet(p).select(pl.col(pl.String)).unpivot()['value'].drop_nulls(): assert 'ZQMARK' not in text.upper() and '19370214' not in text, text
    for p in c.folder.rglob('*'):
        if p.is_file(): assert b'ZQMARK' not in p.read_bytes() and b'19370214' not in p.read_bytes()


def test_text_is_kept_where_the_settings_ask(c):
    c.put({'a.dcm': image(1, SeriesDescription='L CC', InstitutionName='Leeds'), 'b.dcm': image(2)})
    keep = S.model_copy(update=dict(privacy=S.privacy.model_copy(update=dict(keep_text=('SeriesDescription', 'InstitutionName')))))
    assert c.scan()['site'][0].startswith('site-') and 'SeriesDescription' not in c.df.columns
    c.scan(keep)
    assert c.row('a.dcm')['SeriesDescription'] == 'L CC' and c.row('a.dcm')['site'] == 'Leeds' and c.row('b.dcm')['site'] == 'unknown'
    c.scan()
    assert c.row('a.dcm')['site'].startswith('site-') and not any(b'Leeds' in p.read_bytes() for p in c.folder.rglob('*') if p.is_file())


def test_sites_by_folder(c):
    c.put({'leeds__p__1.dcm': image(1), 'leeds__q__2.dcm': image(2), 'york__p__3.dcm': image(3)})
    c.scan(study(site=('institution', 'folder')))
    assert c.row('leeds/p/1.dcm')['site'] == c.row('leeds/q/2.dcm')['site'] != c.row('york/p/3.dcm')['site'] and c.df['site'].str.starts_with('site-').all()


# the walk

def test_our_own_outputs_are_not_a_cohort(tmp_path):
    put(tmp_path, **{'1.dcm': image(1), 'outputs__other__thumbnails__x.png': b'\x89PNG'})
    for _ in range(2): assert scan(tmp_path, tmp_path/'outputs'/'c', S)['path'].to_list() == ['1.dcm']


def test_listing_is_sorted_and_opens_nothing(tmp_path, monkeypatch):
    put(tmp_path/'d', **{'b__2': b'', 'a': b'', 'b__1': b''})
    monkeypatch.setattr('builtins.open', lambda *a, **k: pytest.fail('opened a file'))
    assert [f.path for f in list_files(tmp_path/'d')] == ['a', 'b/1', 'b/2']
