"""Reading headers: ours against pydicom's `stop_before_pixels`, the parser alone, the facts, and the whole scan from a folder to its table.

    python tests/benchmarks/headers.py [--repeat 5] [--small]

Two folders of 10,000 small files: the phantoms' headers (some 80 elements), and fuller ones as vendors write them (200 and more, private blocks, nested
sequences). Several sites, makes, views and protocols in each; identities, dates and exposures differ from file to file. Both sides work on two processes that are
warm, and take turns. References: joblib with one `dcmread(f, stop_before_pixels=True)` per file, and the same with 25 attributes put into a DataFrame."""
import argparse
import os
import shutil
import statistics
import tempfile
from pathlib import Path

os.environ.setdefault('OMP_NUM_THREADS', '1')
import numpy as np
import polars as pl
import pydicom
from joblib import Parallel, delayed
from mammo_nb.core.settings import load_settings
from mammo_nb.dicom.phantom import SITES_A, SITES_B, make_cohort
from pydicom.datadict import DicomDictionary
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate
from pydicom.sequence import Sequence
from turns import medians, seconds

ATTRIBUTES = """SOPInstanceUID SeriesInstanceUID StudyInstanceUID AccessionNumber PatientID StudyDate Modality Manufacturer ManufacturerModelName InstitutionName
    ImageType Rows Columns BitsStored PhotometricInterpretation ImageLaterality ViewPosition SeriesDescription PatientOrientation BurnedInAnnotation
    EstimatedRadiographicMagnificationFactor DistanceSourceToDetector PaddleDescription Grid NumberOfFrames""".split()
STUDY = 12.5  # images per study
_marks = dict(SOPInstanceUID='1', SeriesInstanceUID='2', StudyInstanceUID='3')  # UIDs of one repeated digit, to be replaced
_numbers = ['91827.0%d' % i for i in range(8)]  # likewise numbers of an exposure


# ------------------------------------------------------------------ made-up headers

_fill = dict(DS='12.5', IS='7', LO='AS SET BY PROTOCOL', SH='PRESET 2', CS='STANDARD', DA='20200131', TM='101500', UI='1.2.840.10008.5.1.4.34', US=3, UL=70000, FD=.25, FL=.5,
             ST='nothing to report', LT='nothing to report', PN='SMITH^ANN', AE='MG_ROOM_2', DT='20200131101500', SS=-3, AS='055Y')


def _elements(n):
    "Some n ordinary elements that no rule asks for"
    from mammo_nb.cohort.facts import HeaderCache
    from mammo_nb.dicom.peek import tag_number
    wanted = HeaderCache(b'').wanted
    def fits(t, e): return e[0] in _fill and not e[3] and e[4] and t >> 16 in (8, 16, 24, 32, 40, 50, 64, 84) and t & 0xffff > 0x10 and tag_number(t) not in wanted
    skip = ('SOPClassUID', 'TransferSyntax', 'PixelRep', 'SamplesPer', 'Bits', 'HighBit', 'Planar', 'SmallestI', 'LargestI', 'LUT', 'Palette', 'Timezone', 'Character')
    usual = sorted(t for t, e in DicomDictionary.items() if fits(t, e) and not any(s in e[4] for s in skip))
    return usual[::max(1, len(usual)//n)][:n]


def _coded(**k):
    item = Dataset()
    for name, v in (dict(CodeValue='P5-40000', CodingSchemeDesignator='SRT', CodeMeaning='Plain mammography of the breast') | k).items(): setattr(item, name, v)
    return item


def _as_a_vendor(ds, k, extra):
    "What a machine adds to its headers: ordinary elements, two private blocks, nested sequences"
    for t in extra[k % 3::1 + (k % 3 == 2)]:
        if t not in ds: ds.add_new(t, DicomDictionary[t][0], _fill[DicomDictionary[t][0]])
    for i, name in enumerate(('KVP', 'ExposureTime', 'XRayTubeCurrent', 'BodyPartThickness', 'CompressionForce', 'OrganDose', 'EntranceDoseInmGy', 'RelativeXRayExposure')):
        if name == 'RelativeXRayExposure': ds.RelativeXRayExposure = 455
        else: setattr(ds, name, _numbers[i])
    step = Dataset()
    step.RequestedProcedureDescription, step.ScheduledProcedureStepDescription, step.ScheduledProcedureStepID, step.RequestedProcedureID = 'MAMMOGRAPHY BOTH SIDES', 'MAMMO', 'SPS1', 'RP1'
    step.ScheduledProtocolCodeSequence = Sequence([_coded()])
    study = Dataset()
    study.ReferencedSOPClassUID, study.ReferencedSOPInstanceUID = '1.2.840.10008.3.1.2.3.1', ds.StudyInstanceUID
    ds.RequestAttributesSequence, ds.ReferencedStudySequence, ds.ProcedureCodeSequence = Sequence([step]), Sequence([study]), Sequence([_coded()])
    ds.PerformedProtocolCodeSequence, ds.RequestedProcedureCodeSequence = Sequence([_coded(CodeMeaning='Screening')]), Sequence([_coded(), _coded(CodeValue='P5-40001')])
    for group, make in ((0x19, 'ACME MAMMO IMAGE 1.0'), (0x7fdf, 'ACME INTERNAL')):
        block = ds.private_block(group, make, create=True)
        for i in range(24): block.add_new(i, ('LO', 'DS', 'IS', 'US', 'UN', 'SH')[i % 6], ('calibration', '1.2345', '42', 9, b'\1\2\3\4'*8, 'A7')[i % 6])
        block.add_new(0x40, 'OB', bytes(range(256))*(1 + k % 4))
    ds.SeriesDescription = ('L CC', 'R CC', 'L MLO', 'R MLO', 'SCREENING', 'DIAGNOSTIC')[k % 6]
    if k % 2:
        for s in (ds['RequestAttributesSequence'], ds['ProcedureCodeSequence']):
            s.is_undefined_length = True
            for item in s.value: item.is_undefined_length_sequence_item = True


def templates(fuller: bool, patients=8):
    "Bytes of small files with marks where identities and exposures stand"
    out, extra = [], _elements(120)
    with tempfile.TemporaryDirectory() as d:
        for name, sites in (('a', SITES_A), ('b', SITES_B)): make_cohort(Path(d)/name/'dicom', patients, 128, 5, sites, broken=0, workers=1)
        for k, p in enumerate(sorted(q for q in Path(d).rglob('*') if q.is_file() and q.suffix != '.parquet')):
            ds = pydicom.dcmread(p, force=True)
            if 'PixelData' not in ds or 'Rows' not in ds: continue
            for name, digit in _marks.items(): setattr(ds, name, f'2.25.{digit*(34 + k % 5)}')
            ds.file_meta.MediaStorageSOPInstanceUID = ds.SOPInstanceUID
            ds.PatientID, ds.AccessionNumber, ds.PatientName = 'PPPPPPPP', 'QQQQQQQQ', 'RRRRRRRR^JANE'
            if fuller: _as_a_vendor(ds, k, extra)
            ds.PixelData = encapsulate([b'\0'*8]) if ds.file_meta.TransferSyntaxUID.is_compressed else b'\0'*8
            ds.save_as(Path(d)/'one.dcm')
            out.append((Path(d)/'one.dcm').read_bytes())
    return out


def tree(folder: Path, n: int, fuller: bool = False, patients=8, first=0, made=None):
    "Writes `n` small files, 12.5 to a study, several sites and kinds mixed; `first` is the number of the first one"
    made, rng, at = made or templates(fuller, patients), np.random.default_rng(7 + first), None
    digits = lambda size, x: str(int(x)).rjust(size, '4').encode()
    for k in range(first, first + n):
        study, data = int(k/STUDY), made[rng.integers(len(made))]
        if at is None or study != int((k - 1)/STUDY):
            at = folder/f'site{study % 4}'/f'p{study//2:06}'/f'{study:07}'
            at.mkdir(parents=True, exist_ok=True)
        for (name, d), x in zip(_marks.items(), (10**9 + k, 10**9 + k//4, 10**9 + study)):
            for size in range(38, 33, -1):
                if (mark := d.encode()*size) in data:
                    data = data.replace(mark, digits(size, x))
                    break
        data = data.replace(b'PPPPPPPP', b'P%07d' % (study//2)).replace(b'QQQQQQQQ', b'A%07d' % study).replace(b'RRRRRRRR', b'N%07d' % (study//2))
        if fuller:
            for v, x in zip(_numbers, rng.integers(10**7, 10**8, 8)): data = data.replace(v.encode(), b'%08d' % x)
        (at/f'{k:08}.dcm').write_bytes(data)
    return folder


# ------------------------------------------------------------------ what a researcher would write

def _only_read(path): pydicom.dcmread(path, stop_before_pixels=True)


def _attributes(path):
    ds = pydicom.dcmread(path, stop_before_pixels=True)
    return dict(path=path) | {k: str(ds.get(k, '')) for k in ATTRIBUTES}


def read_headers(folder, workers): workers(delayed(_only_read)(str(p)) for p in sorted(folder.rglob('*.dcm')))


def researchers_table(folder, workers, out):
    "Folder to Parquet"
    pl.DataFrame(workers(delayed(_attributes)(str(p)) for p in sorted(folder.rglob('*.dcm')))).write_parquet(out)


# ------------------------------------------------------------------ and ours

def scanned(folder, out, settings, client, seed):
    from mammo_nb.cohort.manifest import scan
    return scan(folder, out, settings, client, seed=seed)


def _row(work, reference, ref, ours, n, bar=8.):
    return dict(work=work, reference=reference, reference_value=round(n/ref, 1), ours_value=round(n/ours, 1), unit='files/s', ratio=round(ref/ours, 2), bar=bar,
                ok=None if bar is None else ref/ours >= bar)


def _one_process(folder, n):
    "Parser and facts on one core: `{name: function}`"
    from mammo_nb.cohort.facts import _beginning, _cache, read_many
    from mammo_nb.cohort.files import list_files
    from mammo_nb.dicom.peek import READS, peek_heads
    items = [f[:4] for f in list_files(folder)[:n]]
    paths, key = [f'{folder}/{i[0]}' for i in items], b'k'*32
    def walk():
        todo = paths
        for size in READS:
            more = []
            for a in range(0, len(todo), 1000):
                bufs = [_beginning(p, size) for p in todo[a:a + 1000]]
                usual = peek_heads(bufs, _cache(key, (), 200_000_000).wanted).usual
                more += [p for p, ok, b in zip(todo[a:a + 1000], usual, bufs) if not ok and len(b) == size]
            if not (todo := more): break
    return dict(dcmread=lambda: [_only_read(p) for p in paths], attributes=lambda: pl.DataFrame([_attributes(p) for p in paths]), walk=walk,
                facts=lambda: read_many(items, str(folder), key))


def rows(repeat=5, small=False):
    from mammo_nb.core.engine import engine
    n, s, out = 300 if small else 10_000, load_settings(), []
    s = s.model_copy(update=dict(engine=s.engine.model_copy(update=dict(workers=2))))
    with tempfile.TemporaryDirectory() as d, Parallel(n_jobs=2) as workers, engine(s) as client:
        d = Path(d)
        for name, fuller in (("phantoms' headers", False), ("fuller headers, as vendors write them", True)):
            folder, seed = tree(d/f'tree{fuller:d}', n, fuller, 2 if small else 8), iter(range(10**6))
            def ours():
                shutil.rmtree(d/'cohort', ignore_errors=True)
                scanned(folder, d/'cohort', s, client, next(seed))  # another key each time: no worker knows a kind of header
            m = min(n, 2000)
            t = medians(_one_process(folder, m), repeat)
            out.append(_row(f'parser alone, one core, {name}', 'pydicom stop_before_pixels', t['dcmread'], t['walk'], m))
            out.append(_row(f'header to facts against bare reading, one core, {name}', 'pydicom stop_before_pixels', t['dcmread'], t['facts'], m))
            out.append(_row(f'header to facts, one core, {name}', 'pydicom stop_before_pixels, 25 attributes, DataFrame', t['attributes'], t['facts'], m))
            t = medians(dict(read=lambda: read_headers(folder, workers), table=lambda: researchers_table(folder, workers, d/'table.parquet'), ours=ours), repeat)
            out.append(_row(f'scan, folder to manifest, against bare reading, {name}', 'pydicom stop_before_pixels alone, joblib, 2 processes', t['read'], t['ours'], n))
            out.append(_row(f'scan, folder to manifest, {name}', 'the same with 25 attributes into a Parquet file', t['table'], t['ours'], n))
        again = statistics.median(seconds(lambda: scanned(folder, d/'cohort', s, None, 0)) for _ in range(repeat))
        out.append(dict(work=f'second scan of {n:,} unchanged files', reference='limit', reference_value=1., ours_value=round(again, 3), unit='s', ratio=round(1/again, 2), bar=1., ok=again < 1))
    return out


def main():
    a = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    a.add_argument('--repeat', type=int, default=5)
    a.add_argument('--small', action='store_true')
    a = a.parse_args()
    pl.Config.set_tbl_hide_dataframe_shape(True).set_tbl_hide_column_data_types(True).set_tbl_cols(12).set_tbl_width_chars(220).set_fmt_str_lengths(90).set_tbl_rows(40)
    print(pl.DataFrame(rows(a.repeat, a.small)))


if __name__ == '__main__': main()
