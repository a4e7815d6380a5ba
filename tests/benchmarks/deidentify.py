"""De-identification against dicom-anonymizer, on the same files in one run, and the memory of one process.

    python tests/benchmarks/deidentify.py [--patients 12] [--image-size 512] [--repeat 5] [--large 8] [--seed 1] [--save FILE]

Both read every file whole and write it whole, header work only, into a folder in memory where there is one (so that neither waits for a disk, and fsync, which
only we call, costs nothing). dicom-anonymizer uses the newest edition it knows; it leaves nested attributes alone, we do not. What looking for text in the picture costs is shown
beside it, by `find_text` alone and with the reader; `--large`: stage 6 (de-identify and verify) on so many pictures of 3328 x 2560, a quarter of them with text. Only ratios travel. Memory is the peak of a process of its own, over small images and over large ones."""
import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault('OMP_NUM_THREADS', '1')
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import numpy as np
from mammo_nb.core.settings import load_settings
from mammo_nb.dicom.phantom import make_cohort
from mammo_nb.edge.deidentify import Deidentifier
from mammo_nb.edge.verify import verify_file


def engine(*options, reader=False):
    s = load_settings()
    return Deidentifier(s.model_copy(update=dict(edge=s.edge.model_copy(update=dict(options=options, reader=reader)))), b'k' * 32)


def theirs():
    from dicomanonymizer.simpledicomanonymizer import anonymize_dicom_file, initialize_actions
    return lambda p, out: anonymize_dicom_file(str(p), str(out/p.name), base_rules_gen=lambda: initialize_actions('dicomfields_2026c'))


def nest(path, n):
    "The file with `n` per-frame items of what an enhanced object carries, names and UIDs among it"
    import pydicom
    from dicom_files import sequence_item as item
    ds = pydicom.dcmread(path)
    code = item(CodeValue='1', CodingSchemeDesignator='99X', CodeMeaning='of somebody')
    ds.PerFrameFunctionalGroupsSequence = [item(FrameContentSequence=[item(FrameAcquisitionDateTime='20240101101010', FrameComments=f'comment {i}', StackID='1')], FrameAnatomySequence=[
        item(FrameLaterality='L', AnatomicRegionSequence=[code])], DerivationImageSequence=[item(SourceImageSequence=[item(ReferencedSOPInstanceUID=f'1.2.3.{i}')])]) for i in range(n)]
    ds.save_as(path)


def timed(jobs, files, repeat):
    "Milliseconds a file, the median of runs in turns"
    times = {k: [] for k in jobs}
    for _ in range(repeat + 1):
        for k, fn in jobs.items():
            with tempfile.TemporaryDirectory(dir=room()) as out:
                began = time.perf_counter()
                for p in files: fn(p, Path(out))
                times[k].append((time.perf_counter() - began) / len(files) * 1e3)
    return {k: statistics.median(v[1:]) for k, v in times.items()}


def room(): return '/dev/shm' if os.access('/dev/shm', os.W_OK) else None


def peak(size, frames):
    "Bytes of a file with `frames` of `size`², and kilobytes by which a process grows beyond what a tiny file takes when it does it ten times"
    import dicom_files as df
    with tempfile.TemporaryDirectory(dir=room()) as d:
        for name, n, k in (('small', 64, 1), ('large', size, frames)):
            (Path(d)/name).write_bytes(df.content(df.dataset([np.zeros((n, n), np.uint16)] * k, StudyInstanceUID='1.2', PatientID='P-1')))
        got = subprocess.run([sys.executable, __file__, '--one', d], capture_output=True, text=True, check=True)
        return (Path(d)/'large').stat().st_size, int(got.stdout)


def one(d):
    "What `peak` has another process do"
    m, most = engine('device_pseudonyms', 'modified_dates'), lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    m.file(d/'small', d/'out')
    before = most()
    for _ in range(10): assert m.file(d/'large', d/'out2').path.unlink() is None
    print(most() - before)


def large(n, seed):
    "Milliseconds a picture of 3328 x 2560 that the engine and the verifier take, without the reader and with it, and pictures a minute of one core"
    import cv2
    import dicom_files as df
    from mammo_nb.dicom.phantom import phantom_image
    with tempfile.TemporaryDirectory(dir=room()) as d:
        for k in range(n):
            a = phantom_image(('CC', 'MLO')[k % 2], 'LR'[k // 2 % 2], (3328, 2560), distractors=('marker', 'vessels')[:k % 3], seed=seed * 100 + k)[0]
            if k % 4 == 0:
                ink = np.zeros(a.shape, np.uint8)
                for i, t in enumerate(('DOE^JANE  ID 0815-4711', '*14.02.1955  F  29 kV')): cv2.putText(ink, t, (900, 120 + 90 * i), cv2.FONT_HERSHEY_SIMPLEX, 2, 255, 4, cv2.LINE_AA)
                a = np.where(ink > 100, 4000, a).astype(np.uint16)
            (Path(d)/f'{k}.dcm').write_bytes(df.make(a, WindowCenter=2048, WindowWidth=4096, PatientID=f'P-{k}', SOPInstanceUID=f'1.2.9.{k}', StudyInstanceUID='1.2.8', StudyDate='20240101'))
        files, out = sorted(Path(d).glob('*.dcm')), {}
        for reader in (False, True):
            m, times = engine('device_pseudonyms', 'modified_dates', 'clean_pixels', reader=reader), []
            for p in (files[0], *files):   # the first one twice: models are loaded once
                began = time.perf_counter()
                r = m.file(p, Path(d)/f'out{reader}{len(times)}')
                then = time.perf_counter()
                said = verify_file(p, r.path, r.masked, m.options, reader=reader)
                times.append((then - began, time.perf_counter() - then))
                assert not said and bool(r.masked) == (int(p.stem) % 4 == 0), (p.name, said, r.masked)
            engine_s, verifier_s = np.mean(times[1:], axis=0)
            out['with the reader' if reader else 'find_text alone'] = dict(engine_ms=round(engine_s * 1e3), verifier_ms=round(verifier_s * 1e3), pictures_a_minute=round(60 / (engine_s + verifier_s)))
        return dict(pictures=n, **out)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--patients', type=int, default=12); p.add_argument('--image-size', type=int, default=512); p.add_argument('--repeat', type=int, default=5)
    p.add_argument('--large', type=int, default=0); p.add_argument('--seed', type=int, default=1); p.add_argument('--save'); p.add_argument('--one', help=argparse.SUPPRESS)
    a = p.parse_args()
    if a.one: return one(Path(a.one))
    plain = 'device_pseudonyms', 'modified_dates'
    ours, looking, reading, other = engine(*plain), engine(*plain, 'clean_pixels'), engine(*plain, 'clean_pixels', reader=True), theirs()
    result = {}
    with tempfile.TemporaryDirectory(dir=room()) as d:
        make_cohort(Path(d)/'dicom', patients=a.patients, image_size=a.image_size, seed=a.seed, workers=1, broken=0)
        files = []
        for f in sorted(q for q in (Path(d)/'dicom').rglob('*') if q.is_file()):
            if ours.file(f, Path(d)/'try').status == 'ok': files.append(f)
        jobs = dict(dicom_anonymizer=other, mammo_nb=lambda f, out: ours.file(f, out), looking_for_text=lambda f, out: looking.file(f, out), reading=lambda f, out: reading.file(f, out))
        for name, n in (('as they are', 0), ('with 60 nested frames each', 60)):
            for f in files if n else (): nest(f, n)
            ms = timed(jobs, files, a.repeat)
            result[name] = dict(files=len(files), megabytes=round(sum(f.stat().st_size for f in files) / 1e6, 1), **{f'{k}_ms': round(v, 2) for k, v in ms.items()},
                                ratio=round(ms['dicom_anonymizer'] / ms['mammo_nb'], 2))
            print(name, result[name])
    memory = {f'{n} x {n}, {k} frame(s)': peak(n, k) for n, k in ((256, 1), (2048, 1), (2048, 12))}
    result['memory'] = {k: dict(file_megabytes=round(size / 1e6, 1), peak_megabytes_more=round(kb / 1e3, 1)) for k, (size, kb) in memory.items()}
    print('memory', result['memory'])
    if a.large:
        result['stage 6, 3328 x 2560'] = large(a.large, a.seed)
        print(result['stage 6, 3328 x 2560'])
    if a.save: Path(a.save).write_text(json.dumps(dict(arguments={k: v for k, v in vars(a).items() if k not in ('save', 'one')}, **result), indent=1) + '\n')


if __name__ == '__main__': main()
