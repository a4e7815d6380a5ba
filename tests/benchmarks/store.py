"""The thumbnail store: random reads by four processes, against one PNG file per image; and the comparison that decided on shards.

    python tests/benchmarks/store.py [--images 2000] [--edge 512] [--repeat 5] [--small]
    python tests/benchmarks/store.py --compare --images 100000 --folder BIG_DISK      # every candidate; those whose package is not installed are left out
    python tests/benchmarks/store.py --listing 1000000 --folder BIG_DISK              # what is there? of a million images

The reference is what a researcher would write first: a PNG file per image by Pillow, read by Pillow. Both sides read the same images to uint8 arrays in a
random order, in the same four processes, and take turns; the page cache is warm. Medians; only the ratios travel."""
import argparse
import os
import shutil
import statistics
import sys
import tempfile
import time
from functools import lru_cache
from multiprocessing import get_context
from pathlib import Path

os.environ.setdefault('OMP_NUM_THREADS', '1')
import cv2
import numpy as np
from imagecodecs import lz4_decode, lz4_encode
from PIL import Image
from mammo_nb.cohort.thumbs import IMAGES_PER_SHARD, Thumbnails, _Writer
from mammo_nb.dicom.phantom import phantom_image

WORKERS, DISTINCT = 4, 2000


@lru_cache(1)
def drawn(n, size=(1664, 1280)):
    return [(phantom_image('CC' if k % 2 else 'MLO', 'LR'[k//2 % 2], size, tool=[None, 'clip', 'wire', 'needle'][k % 4], seed=k)[0] >> 4).astype(np.uint8) for k in range(n)]


def pictures(n, edge):
    "`n` different thumbnails: 200 phantoms, flipped and shifted, so that they compress as the first ones do"
    base = [cv2.resize(a, (round(a.shape[1]*edge/a.shape[0]), edge), interpolation=cv2.INTER_AREA) for a in drawn(min(200, max(8, n//8)))]
    for k in range(n):
        a, turn = base[k % len(base)], k//len(base)
        yield np.ascontiguousarray(np.roll(a[::-1 if turn & 1 else 1, ::-1 if turn & 2 else 1], 7*(turn//4), 0))


def name(k): return f'{k*0x9e3779b97f4a7c15 & (1 << 64)-1:016x}'   # spread over all ids, as a hash is


# --- candidates: write(pairs) in one process, read(image_id) in any, ids()

class PngFiles:
    "one PNG file per image in 256 folders, Pillow"
    def __init__(self, folder, shape): self.folder, self.known = Path(folder), {}
    def path(self, i): return self.folder/i[:2]/f'{i}.png'
    def encode(self, a, p): Image.fromarray(a).save(p)
    def write(self, pairs):
        for i, a in pairs:
            p = self.path(i)
            p.parent.mkdir(parents=True, exist_ok=True)
            if (same := self.known.get(id(a))): p.write_bytes(same)   # a picture that was encoded before; see `timed_write`
            else:
                self.encode(a, p)
                self.known[id(a)] = p.read_bytes()
    def read(self, i): return np.asarray(Image.open(self.path(i)))
    def ids(self): return {n[:16] for d in os.scandir(self.folder) for n in os.listdir(d.path)}
    def __getstate__(self): return dict(folder=self.folder, known={})


class PngFilesCv(PngFiles):
    "one PNG file per image, OpenCV (run-length, fsync, rename)"
    def encode(self, a, p):
        data = cv2.imencode('.png', a, [cv2.IMWRITE_PNG_COMPRESSION, 1, cv2.IMWRITE_PNG_STRATEGY, cv2.IMWRITE_PNG_STRATEGY_RLE])[1].tobytes()
        with open(f'{p}.tmp', 'wb') as f:
            f.write(data)
            os.fsync(f.fileno())
        os.replace(f'{p}.tmp', p)
    def read(self, i): return cv2.imread(str(self.path(i)), cv2.IMREAD_GRAYSCALE)


class NpyMap:
    "one .npy memory map, raw"
    def __init__(self, folder, shape): self.path, self.shape, self.n = Path(folder)/'all.npy', shape, 0
    def room(self, n): np.lib.format.open_memmap(self.path, 'w+', np.uint8, (n, *self.shape))
    def write(self, pairs):
        m = np.load(self.path, mmap_mode='r+')
        with open(self.path.with_name('ids'), 'a') as f:
            for i, a in pairs:
                m[self.n] = a
                f.write(i + '\n')
                self.n += 1
        m.flush()
    @lru_cache(1)
    def open(self): return np.load(self.path, mmap_mode='r'), {i: k for k, i in enumerate(self.path.with_name('ids').read_text().split())}
    def read(self, i):
        m, at = self.open()
        return np.array(m[at[i]])
    def ids(self): return set(self.path.with_name('ids').read_text().split())


class Lmdb:
    "LMDB, LZ4"
    def __init__(self, folder, shape): import lmdb; self.path, self.shape = str(Path(folder)/'lmdb'), shape
    def write(self, pairs):
        import lmdb
        env, pairs = lmdb.open(self.path, map_size=1 << 36), list(pairs)
        for k in range(0, len(pairs), IMAGES_PER_SHARD):
            with env.begin(write=True) as t:
                for i, a in pairs[k:k+IMAGES_PER_SHARD]: t.put(i.encode(), lz4_encode(a.tobytes()))
        env.close()
    @lru_cache(1)
    def open(self):
        import lmdb
        env = lmdb.open(self.path, readonly=True, lock=False, readahead=False)
        return env, env.begin(buffers=True)
    def read(self, i):
        out = np.empty(self.shape[0]*self.shape[1], np.uint8)
        lz4_decode(self.open()[1].get(i.encode()), out=out)
        return out.reshape(self.shape)
    def ids(self): return {bytes(k).decode() for k in self.open()[1].cursor().iternext(values=False)}


class Sqlite:
    "SQLite, LZ4 blobs"
    def __init__(self, folder, shape): self.path, self.shape = Path(folder)/'t.sqlite', shape
    def write(self, pairs):
        import sqlite3
        db, pairs = sqlite3.connect(self.path), list(pairs)
        db.execute('PRAGMA journal_mode=WAL')
        db.execute('CREATE TABLE IF NOT EXISTS t (id TEXT PRIMARY KEY, b BLOB) WITHOUT ROWID')
        for k in range(0, len(pairs), IMAGES_PER_SHARD):
            with db: db.executemany('INSERT INTO t VALUES (?, ?)', [(i, lz4_encode(a.tobytes())) for i, a in pairs[k:k+IMAGES_PER_SHARD]])
        db.close()
    @lru_cache(1)
    def open(self):
        import sqlite3
        return sqlite3.connect(self.path, check_same_thread=False)
    def read(self, i):
        out = np.empty(self.shape[0]*self.shape[1], np.uint8)
        lz4_decode(self.open().execute('SELECT b FROM t WHERE id = ?', (i,)).fetchone()[0], out=out)
        return out.reshape(self.shape)
    def ids(self): return {r[0] for r in self.open().execute('SELECT id FROM t')}


class Zarr:
    "Zarr 3, sharded by 64, Blosc LZ4"
    def __init__(self, folder, shape): import zarr; self.path, self.shape, self.n = str(Path(folder)/'z.zarr'), shape, 0
    def room(self, n):
        import zarr
        codec = zarr.codecs.BloscCodec(cname='lz4', clevel=1, shuffle='noshuffle')
        zarr.create_array(self.path, shape=(-(-n//64)*64, *self.shape), chunks=(1, *self.shape), shards=(64, *self.shape), dtype='u1', compressors=codec)
        Path(self.path, 'ids').write_text('')
    def write(self, pairs):
        import zarr
        z, pairs = zarr.open_array(self.path, mode='r+'), list(pairs)
        for k in range(0, len(pairs), 64):
            z[self.n:self.n+len(pairs[k:k+64])] = np.stack([a for _, a in pairs[k:k+64]])
            self.n += len(pairs[k:k+64])
        with open(Path(self.path, 'ids'), 'a') as f: f.writelines(i + '\n' for i, _ in pairs)
    @lru_cache(1)
    def open(self):
        import zarr
        return zarr.open_array(self.path, mode='r'), {i: k for k, i in enumerate(Path(self.path, 'ids').read_text().split())}
    def read(self, i):
        z, at = self.open()
        return z[at[i]]
    def ids(self): return set(Path(self.path, 'ids').read_text().split())


class Parquet:
    "Parquet by Polars, a row group per 64, LZ4 payload"
    def __init__(self, folder, shape): self.folder, self.shape = Path(folder), shape
    def write(self, pairs):
        import polars as pl
        pairs = list(pairs)
        df = pl.DataFrame(dict(id=[i for i, _ in pairs], b=[lz4_encode(a.tobytes()) for _, a in pairs]))
        df.write_parquet(self.folder/f'{time.time_ns()}.parquet', compression='uncompressed', row_group_size=64)
    @lru_cache(1)
    def open(self):
        import polars as pl
        return {i: (f, k) for f in sorted(self.folder.glob('*.parquet')) for k, i in enumerate(pl.read_parquet(f, columns=['id'])['id'])}
    def read(self, i):
        import polars as pl
        f, k = self.open()[i]
        out = np.empty(self.shape[0]*self.shape[1], np.uint8)
        lz4_decode(pl.scan_parquet(f).select('b').slice(k, 1).collect()['b'][0], out=out)
        return out.reshape(self.shape)
    def ids(self): return set(self.open())


class ArrowFiles:
    "Arrow files of 64 by Polars, memory-mapped, LZ4 payload"
    def __init__(self, folder, shape): self.folder, self.shape = Path(folder), shape
    def write(self, pairs):
        import polars as pl
        pairs = list(pairs)
        for k in range(0, len(pairs), 64):
            part = pairs[k:k+64]
            pl.DataFrame(dict(id=[i for i, _ in part], b=[lz4_encode(a.tobytes()) for _, a in part])).write_ipc(self.folder/f'{part[0][0]}.arrow')
    @lru_cache(1)
    def open(self):
        import polars as pl
        return {i: (f, k) for f in sorted(self.folder.glob('*.arrow')) for k, i in enumerate(pl.read_ipc(f, columns=['id'])['id'])}
    @lru_cache(128)
    def part(self, f):
        import polars as pl
        return pl.read_ipc(f, columns=['b'])['b']
    def read(self, i):
        f, k = self.open()[i]
        out = np.empty(self.shape[0]*self.shape[1], np.uint8)
        lz4_decode(self.part(f)[k], out=out)
        return out.reshape(self.shape)
    def ids(self): return set(self.open())


class Shards:
    "shards of 64, LZ4 (ours)"
    def __init__(self, folder, shape): self.store = Thumbnails(folder)
    def write(self, pairs):
        pairs = list(pairs)
        for k in range(0, len(pairs), IMAGES_PER_SHARD):
            with _Writer(self.store.folder, self.store._tag(), time.time_ns()) as w:
                for i, a in pairs[k:k+IMAGES_PER_SHARD]: w.put(i, a)
    def done(self): self.store._keep_index()
    def read(self, i): return self.store.get(i)
    def ids(self): return Thumbnails(self.store.folder).ids()


# --- measuring

def fill(kind, folder, n, edge, timed=DISTINCT):
    "Writes `n` images; gives the store and the CPU and wall seconds per image of the first `timed`"
    made = list(pictures(min(n, DISTINCT), edge))
    folder.mkdir(parents=True)
    s, at = kind(folder, made[0].shape), 0
    if hasattr(s, 'room'): s.room(n)
    pairs = [(name(k), made[k % len(made)]) for k in range(n)]
    c, w = time.process_time(), time.perf_counter()
    s.write(pairs[:timed])
    took = (time.process_time()-c)/min(n, timed), (time.perf_counter()-w)/min(n, timed)
    for at in range(timed, n, 5000): s.write(pairs[at:at+5000])
    if hasattr(s, 'done'): s.done()
    for k in (0, n//2, n-1): assert (s.read(name(k)) == made[k % len(made)]).all(), kind.__doc__
    return s, took


_stores = {}

def _begin(stores): _stores.update(stores)


def _read(job):
    "Runs in a reader: CPU seconds for these images"
    which, ids = job
    read, c, total = _stores[which].read, time.process_time(), 0
    for i in ids: total += int(read(i)[0, 0])
    return time.process_time()-c


def compared(stores, draws, repeat):
    "Images per second of each store by four processes, and CPU microseconds per image: medians of `repeat`, in turns"
    rates, cpu, rng = {k: [] for k in stores}, {k: [] for k in stores}, np.random.default_rng(0)
    with get_context('spawn').Pool(WORKERS, _begin, (stores,)) as pool:   # not fork: Polars' threads do not survive one
        for turn in range(repeat+1):      # the first is for warming up
            for which in stores:
                ids = rng.permutation(draws[which]).tolist()
                w = time.perf_counter()
                c = sum(pool.map(_read, [(which, ids[k::WORKERS]) for k in range(WORKERS)], chunksize=1))
                if turn: rates[which].append(len(ids)/(time.perf_counter()-w)); cpu[which].append(c/len(ids)*1e6)
    return {k: (statistics.median(rates[k]), statistics.median(cpu[k])) for k in stores}


def _sample(n, most): return [name(k) for k in np.random.default_rng(1).permutation(n)[:most].tolist()]


def reading(folder, n, edge, repeat, sample=8000):
    "PNG files and ours, side by side"
    with tempfile.TemporaryDirectory(dir=folder) as d:
        stores = dict(png=fill(PngFiles, Path(d)/'png', n, edge)[0], ours=fill(Shards, Path(d)/'ours', n, edge)[0])
        return compared(stores, dict(png=_sample(n, sample), ours=_sample(n, max(n, 20*sample)) if n >= sample else _sample(n, n)*10), repeat)


def rows(repeat=5, small=False, images=2000, edges=(512, 1024), folder=None):
    out = []
    for edge in ((256,) if small else edges):
        n = 60 if small else images if edge <= 512 else images//4
        got = reading(folder, n, edge, 1 if small else repeat)
        ratio, bar = got['ours'][0]/got['png'][0], 20. if edge == 512 else None
        out.append(dict(work=f'thumbnails of {edge} px read in random order by 4 processes', reference='PNG files, Pillow', reference_value=got['png'][0],
                        ours_value=got['ours'][0], unit='images/s', ratio=ratio, bar=bar, ok=None if bar is None else bool(ratio >= bar)))
    return out


def size_of(folder): return sum(p.stat().st_size for p in Path(folder).rglob('*') if p.is_file()), sum(p.is_file() for p in Path(folder).rglob('*'))


def compare(folder, n, edge, repeat, only=()):
    "Every candidate against PNG files: a line each"
    kinds = [k for k in (PngFiles, PngFilesCv, NpyMap, Lmdb, Sqlite, Zarr, Parquet, ArrowFiles, Shards) if not only or k.__name__ in only]
    print(f'{n:,} images of {edge} px; write: CPU / wall ms per image; listing by a fresh object; read by {WORKERS} processes, in turns with {DISTINCT:,} PNG files')
    with tempfile.TemporaryDirectory(dir=folder) as d:
        png = fill(PngFiles, Path(d)/'few', min(n, DISTINCT), edge)[0]
        for kind in kinds:
            at, m = Path(d)/kind.__name__, n//2 if kind is NpyMap else n   # a raw map of all would not fit the page cache
            try: s, took = fill(kind, at, m, edge)
            except ImportError as e: print(f'{kind.__doc__}: {e.name} is not installed'); continue
            draw = 1000 if kind in (PngFiles, PngFilesCv, Zarr, Parquet) else 20_000
            line(s, took, compared(dict(png=png, it=s), dict(png=_sample(min(n, DISTINCT), 1000), it=_sample(m, draw)), repeat), at, m)
            del s
            shutil.rmtree(at)


def line(s, took, got, folder, n):
    c = time.perf_counter()
    assert len(s.ids()) == n
    c = time.perf_counter()-c
    size, files = size_of(folder)
    read = f"read {got['it'][0]:8,.0f}/s  {got['it'][1]:7.0f} us CPU  x{got['it'][0]/got['png'][0]:.1f} wall x{got['png'][1]/got['it'][1]:.1f} CPU (png {got['png'][0]:,.0f}/s)"
    print(f'{s.__doc__:60s} write {took[0]*1e3:6.2f} / {took[1]*1e3:6.2f} ms  {size/n/1e3:6.1f} kB  {files:7,} files  list {c*1e3:6.0f} ms  {read}', flush=True)


def listing(folder, n):
    "What is there? Of `n` images: by names of empty PNG files, by the shards' tables, by the index"
    with tempfile.TemporaryDirectory(dir=folder) as d:
        def timed(what, f):
            t = time.perf_counter()
            assert len(f()) == n
            print(f'{what:40s} {time.perf_counter()-t:6.2f} s', flush=True)
        store, dot = Thumbnails(Path(d)/'ours'), np.zeros((1, 1), np.uint8)
        for k in range(0, n, IMAGES_PER_SHARD):
            with _Writer(store.folder, store._tag(), 1) as w:
                for j in range(k, min(n, k+IMAGES_PER_SHARD)): w.put(name(j), dot)
        timed('shards, by their tables', Thumbnails(store.folder).ids)
        store._keep_index()
        timed('shards, by the index', Thumbnails(store.folder).ids)
        u = Thumbnails(store.folder)
        u.ids()
        store.put('f'*16, dot)
        store.remove(['f'*16])
        timed('shards, two new ones since', u.ids)
        ids = [name(k) for k in range(n)]
        timed('shards, missing() of all', lambda: ids[len(u.missing(ids)):])
        for i in range(256): (Path(d)/'png'/f'{i:02x}').mkdir(parents=True)
        png = PngFiles(Path(d)/'png', None)
        for i in ids: os.close(os.open(png.path(i), os.O_CREAT | os.O_WRONLY))
        timed('PNG files, by their names', png.ids)


def main():
    a = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for k, v in dict(images=2000, edge=512, repeat=5, listing=0).items(): a.add_argument(f'--{k}', type=int, default=v)
    a.add_argument('--folder', help='where to write; default: the temporary folder')
    a.add_argument('--only', nargs='*', default=(), help='candidates to compare')
    for k in ('compare', 'small'): a.add_argument(f'--{k}', action='store_true')
    a = a.parse_args()
    if a.compare: return compare(a.folder, a.images, a.edge, a.repeat, a.only)
    if a.listing: return listing(a.folder, a.listing)
    for r in rows(a.repeat, a.small, a.images, (a.edge,) if a.edge != 512 else (512, 1024), a.folder):
        print(f"{r['work']}: {r['ours_value']:,.0f} {r['unit']}, {r['reference']} {r['reference_value']:,.0f}: {r['ratio']:.1f}x" + (f" (bar {r['bar']:g}x)" if r['bar'] else ''))
    return None


if __name__ == '__main__': sys.exit(main())
