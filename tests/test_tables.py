"Tables that are files or folders: read in order under one name, replaced whole whatever is killed, and found again after it."
import itertools
import os
import threading
import time
from pathlib import Path

import polars as pl
import pytest
from mammo_nb.cohort import manifest as M
from mammo_nb.core import engine as E
from mammo_nb.core.engine import TableError, has_table, read_meta, read_table, write_parquet
from mammo_nb.core.settings import MammoError, load_settings

S = load_settings()
OLD, NEW = dict(file=3, folder=27, none=0), dict(file=4, folder=33)


def rows(n, tag=0): return pl.DataFrame(dict(x=range(n), tag=[tag]*n, text=[f'{i*7919 % 1000}' for i in range(n)]))


@pytest.fixture(autouse=True)
def small_parts(monkeypatch): monkeypatch.setattr(E, 'PARTITION_ROWS', 10)


def test_a_large_table_is_a_folder_and_reads_like_a_file(tmp_path):
    p = tmp_path/'site=1'/'m.parquet'
    for n in (0, 1, 9, 10, 11, 20, 1050):
        write_parquet(rows(n), p, S, stage='x')
        assert p.is_dir() == (n >= 10) and len(list(p.glob('*'))) == (-(-n//10) if n >= 10 else 0)
        assert pl.read_parquet(p).equals(rows(n)) and pl.scan_parquet(p).collect().equals(rows(n)) and read_table(p).equals(rows(n))
        assert read_table(p, ['tag']).columns == ['tag'] and pl.scan_parquet(p).filter(pl.col('x') == n - 1).collect().height == (n > 0)
        m = read_meta(p)
        assert m['stage'] == 'x' and m['settings_hash'] == S.hash and m['schema_version'] and os.listdir(p.parent) == ['m.parquet']
        for k, part in enumerate(sorted(p.glob('*'))):
            facts = pl.read_parquet_metadata(part)
            assert facts['mammo_nb.stage'] == 'x' and facts['mammo_nb.part'] == f'{k + 1} of {-(-n//10)}'


class Killed(BaseException): "Nothing of this process happens any more"


def killed_at(monkeypatch, k, work):
    "Runs `work` and kills it before its k-th file operation; True if it came to an end before that"
    n, dead = itertools.count(), []
    with monkeypatch.context() as mp:
        for name in ('rename', 'replace', 'fsync', 'unlink', 'rmdir', 'mkdir'):
            def op(*a, _real=getattr(os, name), **kw):
                if dead or next(n) == k:
                    dead.append(1)
                    raise Killed
                return _real(*a, **kw)
            mp.setattr(os, name, op)
        try: work()
        except Killed: pass
    return not dead


@pytest.mark.parametrize('old, new', list(itertools.product(OLD, NEW)))
def test_killed_between_any_two_file_operations(tmp_path, monkeypatch, old, new):
    before, after, done = rows(OLD[old]), rows(NEW[new], 1), False
    for k in range(200):
        d = tmp_path/f'{k}'
        p = d/'m.parquet'
        if old != 'none': write_parquet(before, p, S, which='before')
        done = killed_at(monkeypatch, k, lambda: write_parquet(after, p, S, which='after'))
        if has_table(p):
            got = read_table(p)
            assert got.equals(after) or old != 'none' and got.equals(before), 'a whole old or a whole new one'
            assert read_meta(p)['which'] == ('after' if got.equals(after) else 'before') and pl.read_parquet(p).equals(got)
            assert not done or got.equals(after)
        else: assert old == 'none' and not done
        for again in (after, before if old != 'none' else after):
            write_parquet(again, p, S, which='again')
            assert read_table(p).equals(again) and read_meta(p)['which'] == 'again'
        assert [n for n in os.listdir(d) if not n.endswith('.tmp')] == ['m.parquet']
        if done: break
    assert done and k >= 3


def test_killed_again_while_it_is_put_right(tmp_path, monkeypatch):
    "a reader that finishes the move may be killed too"
    before, after = rows(27), rows(33, 1)
    for k, j in itertools.product(range(30), range(6)):
        p = tmp_path/f'{k}-{j}'/'m.parquet'
        write_parquet(before, p)
        if killed_at(monkeypatch, k, lambda: write_parquet(after, p)): break
        killed_at(monkeypatch, j, lambda: has_table(p))
        assert has_table(p) and (read_table(p).equals(before) or read_table(p).equals(after))


def test_a_power_cut_that_lost_the_second_rename(tmp_path):
    p = tmp_path/'m.parquet'
    write_parquet(rows(27), p)
    p.rename(tmp_path/'.m.parquet.old')
    assert has_table(p) and read_table(p).equals(rows(27)) and os.listdir(tmp_path) == ['m.parquet']


def test_a_full_disk_leaves_the_old_table(tmp_path, monkeypatch):
    p = tmp_path/'m.parquet'
    write_parquet(rows(27), p)
    real = Path.write_bytes
    def full(self, data):
        if 'part-00002' in str(self): raise OSError(28, 'No space left on device')
        real(self, data)
    monkeypatch.setattr(Path, 'write_bytes', full)
    with pytest.raises(MammoError, match='the disk is full'): write_parquet(rows(33, 1), p)
    assert read_table(p).equals(rows(27)) and os.listdir(tmp_path) == ['m.parquet']


def test_what_a_killed_writer_left_is_cleared_an_hour_later(tmp_path):
    p = tmp_path/'m.parquet'
    for name, age in (('old', 4000), ('young', 10)):
        d = tmp_path/f'.m.parquet.{name}.tmp'
        d.mkdir()
        (d/'part-00000-x.parquet').write_bytes(b'half')
        os.utime(d, (time.time() - age,)*2)
    (tmp_path/'.other.parquet.old.tmp').write_bytes(b'')
    os.utime(tmp_path/'.other.parquet.old.tmp', (1, 1))
    write_parquet(rows(3), p)
    assert sorted(os.listdir(tmp_path)) == ['.m.parquet.young.tmp', '.other.parquet.old.tmp', 'm.parquet']


def test_parts_of_two_tables_never_share_a_name(tmp_path):
    "so that a reader who has listed the old one cannot open parts of the new one"
    names = []
    for _ in range(2):
        write_parquet(rows(27), tmp_path/'m.parquet')
        names.append(set(os.listdir(tmp_path/'m.parquet')))
    assert len(names[0] | names[1]) == 6


def test_a_reader_that_looks_between_the_two_renames_looks_again(tmp_path, monkeypatch):
    p, real, calls = tmp_path/'m.parquet', E._made, []
    write_parquet(rows(45), p)
    def between(path):
        calls.append(1)
        if len(calls) == 1: os.rename(path, E._aside(path, 'old'))   # the writer has moved the old one away, and not yet the new one in
        return real(path)
    monkeypatch.setattr(E, '_made', between)
    assert read_table(p).equals(rows(45)) and len(calls) > 1


def test_a_reader_leaves_the_replacement_of_a_living_writer_alone(tmp_path, monkeypatch):
    "or two would move the same folders, and the new table might be removed as the old one"
    p, real, seen = tmp_path/'m.parquet', os.rename, []
    write_parquet(rows(45), p)
    def rename(a, b):
        real(a, b)
        if str(b).endswith('.old'): seen.append((has_table(p), sorted(os.listdir(tmp_path))))
    monkeypatch.setattr(os, 'rename', rename)
    write_parquet(rows(60), p)
    assert seen == [(True, ['.m.parquet.new', '.m.parquet.old'])] and read_table(p).equals(rows(60)) and os.listdir(tmp_path) == ['m.parquet']


def test_a_reader_never_sees_two_tables_in_one(tmp_path):
    p, stop, wrong, reads = tmp_path/'m.parquet', threading.Event(), [], []
    tables = [rows(n, n) for n in (45, 60, 33)]
    write_parquet(tables[0], p)
    def reader():
        while not stop.is_set():
            try:
                got = read_table(p)
                if not any(got.equals(t) for t in tables): wrong.append(got)
                read_meta(p)
            except Exception as e: wrong.append(e)
            reads.append(1)
    threads = [threading.Thread(target=reader) for _ in range(2)]
    for t in threads: t.start()
    for k in range(100): write_parquet(tables[k % 3], p)
    stop.set()
    for t in threads: t.join()
    assert reads and not wrong


def test_missing_and_damaged_tables_say_so_at_once(tmp_path):
    assert not has_table(tmp_path/'m.parquet')
    for read in (read_table, read_meta):
        with pytest.raises(TableError, match='no such table'): read(tmp_path/'m.parquet')
    (tmp_path/'m.parquet').write_bytes(b'PAR1 half')
    for read in (read_table, read_meta):
        with pytest.raises(TableError, match='is cut short'): read(tmp_path/'m.parquet')


# the manifest as such a table

def test_a_cohort_grows_into_a_folder_and_back(tmp_path, monkeypatch):
    from test_manifest import Cohort, image
    c = Cohort(tmp_path)
    c.put({f'{i % 3}__{i:02}.dcm': image(i) for i in range(8)})
    small = c.scan()
    assert (c.folder/'manifest.parquet').is_file()
    c.put({f'{i % 3}__{i:02}.dcm': image(i) for i in range(8, 25)})
    large = c.scan()
    assert (c.folder/'manifest.parquet').is_dir() and (c.folder/'scan'/'facts.parquet').is_dir() and large['path'].is_sorted()
    written = os.stat(c.folder/'manifest.parquet').st_ino
    assert c.scan().equals(large) and os.stat(c.folder/'manifest.parquet').st_ino == written and M.read_manifest(c.folder).equals(large)
    assert large.filter(pl.col('path').is_in(small['path'].implode())).equals(small) and M.source_dir(c.folder) == c.dicom.resolve()
    failed = pl.DataFrame(dict(image_id=[large['image_id'][17]], reason=['broken stream'], step=['pixels']))
    assert M.reject(c.folder, failed, S)['status'][17] == 'rejected' == M.read_manifest(c.folder)['status'][17]
    for i in range(8, 25): (c.dicom/f'{i % 3}'/f'{i:02}.dcm').unlink()
    monkeypatch.setattr(E, 'PARTITION_ROWS', 100)
    assert c.scan().filter(status='ok').height == 7 and (c.folder/'manifest.parquet').is_file() and (c.folder/'scan'/'facts.parquet').is_file()
    assert not [p for p in c.folder.rglob('.*')]


def test_a_scan_killed_anywhere_ends_with_the_same_rows(tmp_path, monkeypatch):
    "before every file operation of a scan, folders for tables; each is started again"
    from test_manifest import Cohort, image
    from mammo_nb.cohort import facts as F
    monkeypatch.setattr(F, 'PART_ROWS', 6)
    monkeypatch.setattr(F, 'GROUP_FILES', 4)
    c = Cohort(tmp_path)
    c.put({f'{i % 3}__{i:02}.dcm': image(i) for i in range(24)})
    calm, k = M.scan(c.dicom, tmp_path/'calm', S, seed=1), 0
    while not killed_at(monkeypatch, k, lambda: M.scan(c.dicom, tmp_path/f'{k}', S, seed=1)):
        if has_table(tmp_path/f'{k}'/'manifest.parquet'): assert M.read_manifest(tmp_path/f'{k}').equals(calm)
        assert M.scan(c.dicom, tmp_path/f'{k}', S, seed=1).equals(calm) and M.read_manifest(tmp_path/f'{k}').equals(calm)
        assert {n for n in os.listdir(tmp_path/f'{k}'/'scan') if not n.endswith('.tmp')} == {'facts.parquet'}
        k += 1
    assert k > 20
