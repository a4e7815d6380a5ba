"""Files over a line with every fault at random, the shipper killed with SIGKILL, the server killed and restarted; at the end every file is at the far end,
once, as it was.

    python tests/faults/edge_ship.py --seed 8 --save

Per destination (STOW-RS and C-STORE to an Orthanc, S3 to a SeaweedFS): what the line did, how often shipper and server were ended, and what the far end holds.
The files are what stage 6 sends, de-identified; `--as-they-are` sends the sources instead, one in four with sequences of undefined length."""
import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import zlib
from collections import Counter
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(HERE.parent), str(ROOT)]

import dicom_files as df
import numpy as np
import pydicom
from proxy import Fault, Proxy, bad
from servers import ACCESS, SECRET, Orthanc, Seaweed, free_ports

from mammo_nb.cohort.facts import known_key
from mammo_nb.core.settings import load_settings
from mammo_nb.edge.deidentify import Deidentifier
from mammo_nb.edge.destinations import data_set, likeness, parcel
from mammo_nb.edge.outbox import Outbox

KINDS = 'stow', 'dimse', 's3'
SYNTAXES = [df.EXPLICIT, df.IMPLICIT, df.RLE, df.JPEGLL1, df.J2K_LOSSLESS, df.DEFLATED]
SHIP = "import json, sys; from mammo_nb.edge.outbox import Outbox; a = json.loads(sys.argv[1]); print(json.dumps(Outbox(a.pop('folder')).ship(desc=None, **a)))"


def make_files(folder, n, seed=0, plain=False, least=24, most=400, loose=False):
    "`n` small images in several transfer syntaxes; one in four has sequences of undefined length, unless `plain`; `loose`: one in three pads its texts more than it needs"
    rng, out = np.random.default_rng(seed), []
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(n):
        h, w = (int(v) for v in np.exp(rng.uniform(np.log(least), np.log(most), 2)))
        a = (rng.integers(0, 4096, (h, w)) >> int(rng.integers(0, 6))).astype(np.uint16)
        uid = lambda k: f'2.25.{int(rng.integers(1, 2**62))}{k}{i}'
        ds = df.dataset(a, SYNTAXES[0] if plain else SYNTAXES[i % len(SYNTAXES)], PatientID=f'p{i // 4}', StudyInstanceUID=uid(1), SeriesInstanceUID=uid(2), SOPInstanceUID=uid(3))
        ds.file_meta.MediaStorageSOPInstanceUID = ds.SOPInstanceUID
        ds.ViewCodeSequence = [df.sequence_item(CodeValue='399162004', CodingSchemeDesignator='SCT', CodeMeaning='view', ViewModifierCodeSequence=[df.sequence_item(CodeValue='x')])]
        if i % 4 == 3 and not plain:
            ds['ViewCodeSequence'].is_undefined_length = ds.ViewCodeSequence[0].is_undefined_length_sequence_item = True
        if loose and i % 3 == 2:
            ds.BodyPartExamined, ds.KVP, ds.Manufacturer = 'BREAST    ', '29  ', 'Acme    '
            ds.add_new(0xfffcfffc, 'OB', bytes(64))  # behind the pixels
        (p := folder/f'{i:04}.dcm').write_bytes(df.content(ds))
        out.append(p)
    return out


def de_identified(files, folder):
    "The same as stage 6 sends them"
    engine = Deidentifier(load_settings(ROOT/'settings.ini'), known_key(1))
    done = [engine.file(p, folder) for p in files]
    assert all(d.status == 'ok' for d in done), {d.reason for d in done}
    return [d.path for d in done]


class Far:
    "A far end of one of the three kinds, behind a line"
    def __init__(self, kind, folder, faults=lambda n: None):
        self.kind, self.listen = kind, free_ports(1)[0]
        self.server = Seaweed(folder) if kind == 's3' else Orthanc(folder, truck=self.listen)
        self.line = Proxy(self.server.dicom if kind == 'dimse' else self.server.port, faults)

    def __enter__(self):
        self.server.__enter__()
        self.line.__enter__()
        return self

    def __exit__(self, *_):
        self.line.__exit__()
        self.server.__exit__()

    @staticmethod
    def missing(kind): return Seaweed.missing() if kind == 's3' else Orthanc.missing()

    @property
    def url(self):
        p = self.line.port
        return dict(stow=f'http://127.0.0.1:{p}/dicom-web', dimse=f'dicom://ORTHANC@127.0.0.1:{p}?calling=TRUCK&listen={self.listen}',
                    s3=f's3://{Seaweed.bucket}/t1?endpoint=http://127.0.0.1:{p}')[self.kind]

    def held(self):
        "{the image's name in the outbox: the contents that the far end holds of it}, asked without the line"
        out = {}
        if self.kind == 's3':
            for key, data in self.server.objects().items(): out.setdefault(Path(key).stem, []).append(data)
        else:
            for id in self.server.instances():
                (p := self.server.folder/'held.dcm').write_bytes(data := self.server.file(id))
                out.setdefault(parcel(p).name, []).append(data)
        return out

    def judge(self, files):
        "How the far end's contents compare with the files"
        held, n, names = self.held(), Counter(), set()
        for p in map(parcel, files):
            names.add(p.name)
            got = held.get(p.name, [])
            n['missing'] += not got
            n['twice'] += len(got) > 1
            for data in got:
                n['bytes_identical'] += data == p.path.read_bytes()
                n['dataset_bytes_identical'] += unpacked(data, p.syntax) == unpacked(p.path.read_bytes(), p.syntax)
                n['dataset_stream_identical'] += data_set(data) == data_set(p.path.read_bytes())
                n['content_identical'] += bool(likeness(p, data))
                n['other_content'] += not likeness(p, data)
        return dict(held=sum(map(len, held.values())), strangers=len(set(held) - names), **{k: n[k] for k in
                    ('missing', 'twice', 'bytes_identical', 'dataset_bytes_identical', 'dataset_stream_identical', 'content_identical', 'other_content')})


def unpacked(data, syntax):
    "A file's data set; a deflated one as it was before it was deflated (behind the stream Orthanc 1.10 stores zeros, up to the length before)"
    if syntax != df.DEFLATED: return data_set(data)
    z = zlib.decompressobj(-zlib.MAX_WBITS)
    out = z.decompress(data_set(data))
    return out if z.eof and not z.unused_data.strip(b'\0') else None


def start(folder, url, **how):
    "A shipper in a process of its own"
    env = os.environ | dict(AWS_ACCESS_KEY_ID=ACCESS, AWS_SECRET_ACCESS_KEY=SECRET, PYTHONPATH=str(ROOT), OMP_NUM_THREADS='1', POLARS_MAX_THREADS='1')
    return subprocess.Popen([sys.executable, '-c', SHIP, json.dumps(dict(folder=str(folder), destination=url) | how)], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def campaign(kind, work, n, kills, restarts, seed, limit=3600, attempts=100, sources=False):
    "One destination; gives the facts"
    rng = random.Random(seed)
    files, box = make_files(work/'files', n, seed, loose=not sources), Outbox(work/'outbox')
    if not sources: files = de_identified(files, work/'clean')
    began = time.monotonic()
    for p in files: box.add(p, link=True)
    how = dict(patience=120, attempts=attempts, pause=.02, stall=1.5)
    at = sorted([(rng.uniform(0, .9) * n, 'kill') for _ in range(kills)] + [(rng.uniform(.1, .9) * n, 'restart') for _ in range(restarts)])
    done, said, turns, went = Counter(), {}, 0, Counter()
    with Far(kind, work/'far', bad(seed)) as far:
        while True:
            turns += 1
            shipper = start(box.folder, far.url, **how)
            while shipper.poll() is None:
                if time.monotonic() - began > limit:
                    shipper.kill()
                    raise RuntimeError(f'{kind}: not through after {limit} s: {box.progress(far.url)}')
                if at and box.progress(far.url)['delivered'] >= at[0][0]:
                    what = at.pop(0)[1]
                    done[what] += 1
                    time.sleep(rng.uniform(0, .3))
                    if what == 'kill': shipper.kill()
                    else: far.server.restart(rng.choice([signal.SIGKILL, signal.SIGTERM]))
                time.sleep(.01)
            out, err = shipper.communicate()
            if shipper.returncode == 0:
                said = json.loads(out)
                break
            if shipper.returncode != -signal.SIGKILL: raise RuntimeError(f'{kind}: {err[-2000:]}')
        seconds = time.monotonic() - began
        rows = box.rows(far.url)
        facts = dict(files=n, delivered=said['delivered'], waiting=said['waiting'], dead=said['dead'], problem=said['problem'], kills=done['kill'], server_restarts=done['restart'], connections=far.line.n,
                     line=dict(sorted((k, v) for k, v in far.line.seen.items() if not k.endswith('?'))), tries_most=int(rows['tries'].max()), tries_mean=round(rows['tries'].mean(), 2),
                     **far.judge(files), how=dict(Counter(rows['how'])), seconds=round(seconds))
    box.close()
    return facts


def tampered(kind, work, seed=0):
    "A bit that is flipped on the way (without TLS nobody notices it there), and a copy that is changed in the outbox: neither counts as delivered"
    files, box = make_files(work/'files', 3, seed, plain=True, least=120), Outbox(work/'outbox')
    ids = [box.add(p) for p in files]
    copy = box.copy_of(ids[2])
    copy.write_bytes(copy.read_bytes()[:-1] + b'?')
    with Far(kind, work/'far', lambda n: Fault('flip', 9000)) as far:
        first = box.ship(far.url, pause=.02, stall=2, patience=5, attempts=6, desc=None)
        right = far.judge(files[:2])['content_identical']
        reasons = sorted(set(box.dead(far.url)['reason']))
    box.close()
    return dict(files=3, delivered=first['delivered'], delivered_and_right=right, dead=first['dead'], reasons=reasons)



def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument('--files', type=int, default=1000)
    ap.add_argument('--kills', type=int, default=20)
    ap.add_argument('--restarts', type=int, default=2)
    ap.add_argument('--seed', type=int, default=8)
    ap.add_argument('--only', choices=KINDS)
    ap.add_argument('--as-they-are', action='store_true', help='the sources, not de-identified')
    ap.add_argument('--save', action='store_true', help='to nbs/data/edge/ship.json')
    a = ap.parse_args()
    os.environ.update(AWS_ACCESS_KEY_ID=ACCESS, AWS_SECRET_ACCESS_KEY=SECRET)
    target, facts = ROOT/'nbs'/'data'/'edge'/'ship.json', {}
    if target.exists(): facts = json.loads(target.read_text()).get('destinations', {})
    for kind in [a.only] if a.only else KINDS:
        if why := Far.missing(kind): raise SystemExit(why)
        work = Path(tempfile.mkdtemp())
        try: facts[kind] = campaign(kind, work/'a', a.files, a.kills, a.restarts, a.seed, sources=a.as_they_are) | dict(de_identified=not a.as_they_are) | dict(tampered=tampered(kind, work/'b', a.seed))
        finally: shutil.rmtree(work, ignore_errors=True)
        print(kind, json.dumps(facts[kind], indent=1), flush=True)
        if a.save:
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(json.dumps(dict(seed=a.seed, pydicom=pydicom.__version__, destinations=facts), indent=1) + '\n')


if __name__ == '__main__': main()
