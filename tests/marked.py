"""Headers in which every field that can name a person holds a mark of its own, a cohort of them, and a search that finds the marks again in
whatever a run wrote: raw, in other encodings, packed. A leak names its field."""
import base64
import copy
import gzip
import io
import json
import re
import sqlite3
import struct
import urllib.parse
import warnings
import zipfile
import zlib
from pathlib import Path

import imagecodecs
import numpy as np
import polars as pl
import pydicom
from pydicom.datadict import DicomDictionary, RepeatersDictionary
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.sequence import Sequence
from pydicom.uid import UID

import dicom_files as df

WORD, ROOT, NUMBER, YEAR = 'QZXMKWVJ', '2.25.73797379', 17379, 1937   # how text, UIDs, numbers and dates begin
LETTERS = str.maketrans('0123456789', 'ABCDEFGHIK')   # the digits of a person's mark
_text = {'AE', 'CS', 'LO', 'LT', 'PN', 'SH', 'ST', 'UC', 'UR', 'UT'}


class Marks:
    "Hands out marks and remembers where each was planted"
    def __init__(self): self.where, self.dates, self._known, self._days, self.images = {}, {}, {}, {}, {}
    def _next(self, where):
        n = self._known.setdefault(where, len(self._known) + 1)
        self.where[n] = where
        return n
    def word(self, where): return f'{WORD}{self._next(where):05d}'
    def person(self, where): return f'{WORD}{self._next(where):05d}'.translate(LETTERS)   # without digits, so that its letters are nobody else's
    def uid(self, where): return f'{ROOT}{self._next(where):05d}'
    def number(self, where): return f'{NUMBER}{self._next(where):05d}'
    def date(self, where):
        if ('date', where) in self._days: return self._days['date', where]
        d = (np.datetime64(f'{YEAR}-01-02') + len(self.dates) % 3000).item().strftime('%Y%m%d')
        self.dates.setdefault(d, where)
        self._days['date', where] = d
        return d

    def value(self, vr, where):
        "A mark for an element; None where the VR takes none"
        if vr == 'PN': return f'{self.person(where)}^{WORD}JANE'
        if vr == 'UI': return self.uid(where)
        if vr == 'DA': return self.date(where)
        if vr == 'DT': return self.date(where) + '110203.737379'
        if vr == 'TM': return f'1102{len(self.where) % 60:02d}.737379'
        if vr in ('IS', 'DS'): return self.number(where)
        if vr in _text: return self.word(where)
        if vr == 'AS': return None
        if vr in ('FD', 'SV', 'UV'): return float(self.number(where)) if vr == 'FD' else int(self.number(where))
        if vr in ('OB', 'UN'): return (self.word(where) + ' ').encode()


# what decides whether a file is an image and how it is decoded; marks there have files of their own (`broken_files`)
TECHNICAL = set("""SpecificCharacterSet Modality PhotometricInterpretation MIMETypeOfEncapsulatedDocument SOPClassUID SOPInstanceUID NumberOfFrames PresentationLUTShape
    RescaleSlope RescaleIntercept WindowCenter WindowWidth VOILUTFunction EncapsulatedDocument DirectoryRecordSequence PixelPaddingValue PixelPaddingRangeLimit
    BurnedInAnnotation StudyInstanceUID SeriesInstanceUID ModalityLUTSequence VOILUTSequence PerFrameFunctionalGroupsSequence SharedFunctionalGroupsSequence
    FloatPixelData DoubleFloatPixelData PixelData ExtendedOffsetTable ExtendedOffsetTableLengths EncapsulatedDocumentLength DataSetTrailingPadding""".split())


WHO = {0x08, 0x10, 0x20, 0x32, 0x38, 0x40}   # groups that say who, when and where

def fill(ds, marks, where='', deep=2, keep=(), groups=None):
    "Marks in every element of pydicom's dictionary that takes text, numbers, dates or UIDs, and one item in every sequence"
    for tag, (vr, vm, _, _, keyword) in DicomDictionary.items():
        group = tag >> 16
        if not keyword or groups and group not in groups or group in (0, 2, 4, 6) or group >= 0x6000 and group != 0xfffa or keyword in TECHNICAL or keyword in keep: continue
        if vr == 'SQ':
            if deep:
                item = Dataset()
                if deep > 1 and keyword in ('ViewCodeSequence', 'RequestAttributesSequence', 'AnatomicRegionSequence', 'ContentSequence', 'OtherPatientIDsSequence'):
                    fill(item, marks, f'{where}{keyword}/', deep - 1)
                else: item.add_new(0x00080104, 'LO', marks.word(f'{where}{keyword}/CodeMeaning'))
                ds.add_new(tag, 'SQ', Sequence([item]))
            continue
        v = marks.value(vr.split(' ')[0], where + keyword)
        if v is not None: ds.add_new(tag, vr.split(' ')[0], v)
    return ds


def private(ds, marks, where='private'):
    "Private blocks with text, names, unknown bytes and sequences, in several groups"
    for group in (0x09, 0x19, 0x45, 0x51):
        block = ds.private_block(group, marks.word(f'{where}/{group:04x}/creator'), create=True)
        for k, vr in enumerate(('LO', 'PN', 'UN', 'LT', 'DA', 'UI', 'DS', 'OB', 'UT')): block.add_new(k + 1, vr, marks.value(vr, f'{where}/{group:04x}/{vr}'))
        inner, deeper = Dataset(), Dataset()
        deeper.private_block(0x11, marks.word(f'{where}/nested creator'), create=True).add_new(1, 'LO', marks.word(f'{where}/{group:04x}/nested private'))
        inner.PatientName, inner.ReferencedPatientSequence = marks.person(f'{where}/{group:04x}/nested name'), Sequence([deeper])
        block.add_new(0x20, 'SQ', Sequence([inner]))
    return ds


def overlay(ds, marks):
    "An overlay and an old curve with their descriptions"
    for tag, vr, v in ((0x60000010, 'US', 8), (0x60000011, 'US', 8), (0x60000040, 'CS', 'G'), (0x60000050, 'SS', [1, 1]), (0x60000100, 'US', 1), (0x60000102, 'US', 0),
                       (0x60000022, 'LO', marks.word('OverlayDescription')), (0x60000045, 'LO', marks.word('OverlaySubtype')), (0x60001500, 'LO', marks.word('OverlayLabel')),
                       (0x60004000, 'LT', marks.word('OverlayComments')), (0x60003000, 'OB', b'\0' * 8), (0x50000022, 'LO', marks.word('CurveDescription')),
                       (0x50002600, 'SH', marks.word('CurveLabel'))): ds.add_new(tag, vr, v)
    return ds


def saved(ds, marks, where='file'):
    "The file's bytes, with marks in the meta group, the preamble and behind the pixels"
    m = ds.file_meta
    m.ImplementationVersionName, m.SourceApplicationEntityTitle = marks.word(f'{where}/ImplementationVersionName'), marks.word(f'{where}/SourceAE')
    m.SendingApplicationEntityTitle, m.ReceivingApplicationEntityTitle = marks.word(f'{where}/SendingAE'), marks.word(f'{where}/ReceivingAE')
    m.PrivateInformationCreatorUID, m.PrivateInformation = marks.uid(f'{where}/PrivateInformationCreatorUID'), (marks.word(f'{where}/PrivateInformation')).encode()
    m.ImplementationClassUID = marks.uid(f'{where}/ImplementationClassUID')
    ds.preamble = (marks.word(f'{where}/preamble') + ' ').encode().ljust(128, b'\0')
    ds.add_new(0xfffcfffc, 'OB', marks.word(f'{where}/trailing padding').encode())
    f = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        pydicom.dcmwrite(f, ds, enforce_file_format=True)
    return f.getvalue()


def mark_file(path, marks, who, where='image', nested=True):
    "Rewrites an image so that every field bears a mark; who and which study it is stay apart by `who`"
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        ds = pydicom.dcmread(path)
    kind = 'nested' if nested else 'flat'
    if kind not in marks.images: marks.images[kind] = overlay(private(fill(Dataset(), marks, f'{where}/', deep=2 * nested), marks, f'{where}/private'), marks)
    names = {'ImageType', 'ViewPosition', 'ImageLaterality', 'PatientOrientation', 'StudyDate', 'Manufacturer', 'ManufacturerModelName'}
    for e in marks.images[kind]:
        if e.tag not in ds or e.VR in _text | {'DA', 'DT', 'TM', 'UI'} and e.keyword not in names: ds[e.tag] = e
    ds.PatientID, ds.PatientName, ds.AccessionNumber = f'{marks.word(f"{where}/PatientID")}{who[-3:]}', f'{marks.person(f"{where}/PatientName")}^{who}', f'{marks.word(f"{where}/Accession")}{who[-3:]}'
    path.write_bytes(saved(ds, marks, where))


# ---- files that fail, each at another stage

def filled(marks, ts):
    "A small image in a transfer syntax with marks everywhere"
    if ts not in marks.images: marks.images[ts] = private(fill(d := df.dataset(df.tissue(96, 72), ts), marks, 'header/', deep=0, keep={e.keyword for e in d}, groups=WHO), marks, 'private')
    return copy.deepcopy(marks.images[ts])


def small(marks, where, uid, **header):
    "A small image, marked"
    ds = filled(marks, df.EXPLICIT)
    ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID = uid
    ds.PatientID, ds.PatientName = marks.word(f'{where}/PatientID'), marks.person(f'{where}/PatientName')
    for k, v in header.items():
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            if v is None: delattr(ds, k)
            else: setattr(ds, k, v)
    return ds


def raw_value(data, keyword, value):
    "Replaces an element's value in a file's bytes, whatever its VR allows"
    tag = pydicom.tag.Tag(keyword)
    head = struct.pack('<HH', tag.group, tag.element)
    at = re.compile(re.escape(head) + b'[A-Z][A-Z]').search(data, 132).start()
    n = struct.unpack_from('<H', data, at + 6)[0]
    value = value + b' ' * (len(value) % 2)
    return data[:at + 6] + struct.pack('<H', len(value)) + value + data[at + 8 + n:]


def report(marks):
    "A structured report whose content names everybody"
    ds = df.dataset(df.tissue(32, 32))
    del ds.PixelData
    ds.Modality, ds.SOPInstanceUID = 'SR', '1.2.826.0.1.99.7'
    items = []
    for k in range(6):
        i = Dataset()
        i.ValueType, i.TextValue, i.PersonName = 'TEXT', marks.word(f'sr/TextValue{k}'), marks.person(f'sr/PersonName{k}')
        code = Dataset()
        code.CodeValue, code.CodingSchemeDesignator, code.CodeMeaning = marks.word(f'sr/Code{k}'), '99X', marks.word(f'sr/CodeMeaning{k}')
        i.ConceptNameCodeSequence, i.ContentSequence = Sequence([code]), Sequence(items[-1:])
        items.append(i)
    ds.ContentSequence = Sequence(items)
    return saved(fill(ds, marks, 'header/', deep=0, keep={'ContentSequence'} | {e.keyword for e in ds}, groups=WHO), marks, 'sr')


def pdf(marks):
    "An encapsulated PDF"
    ds = df.dataset(df.tissue(32, 32))
    del ds.PixelData
    ds.Modality, ds.SOPInstanceUID, ds.MIMETypeOfEncapsulatedDocument = 'DOC', '1.2.826.0.1.99.8', 'application/pdf'
    title = marks.word('pdf/content')
    ds.DocumentTitle, ds.EncapsulatedDocument = marks.word('pdf/DocumentTitle'), b'%PDF-1.4 /Title (' + title.encode() + b')  '
    return saved(fill(ds, marks, 'header/', deep=0, keep={e.keyword for e in ds}, groups=WHO), marks, 'pdf')


def commented(marks):
    "JPEG Lossless pixels with a comment segment"
    ds = filled(marks, df.JPEGLL1)
    ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID = '1.2.826.0.1.99.9'
    from pydicom.encaps import encapsulate, generate_frames
    jpeg = next(generate_frames(ds.PixelData, number_of_frames=1))
    note = marks.word('jpeg comment').encode()
    ds.PixelData = encapsulate([jpeg[:2] + b'\xff\xfe' + struct.pack('>H', len(note) + 2) + note + jpeg[2:]])
    return saved(ds, marks, 'jpeg')


def broken_files(marks):
    "{name: bytes}: headers that are rejected, pixels that cannot be decoded, conflicts, text in fields that take none"
    out, uid = {}, iter(f'1.2.826.0.1.98.{k}' for k in range(1, 1000))
    plain = lambda where, **h: saved(small(marks, where, next(uid), **h), marks, where)
    for at in (100, 140, 400, 2000, 9000, -3000, -10): out[f'cut{at}.dcm'] = plain(f'cut{at}')[:at]
    for k in ('Modality', 'PhotometricInterpretation', 'SpecificCharacterSet', 'StudyDate', 'ViewPosition', 'ImageLaterality', 'PatientOrientation', 'BurnedInAnnotation', 'ImageType',
              'StudyInstanceUID', 'SeriesInstanceUID', 'SOPClassUID', 'Manufacturer', 'ManufacturerModelName', 'PatientID', 'AccessionNumber', 'VOILUTFunction', 'PresentationLUTShape'):
        where = f'text in {k}'
        data = plain(where, **{k: '1.2.3' if k.endswith('UID') else 'X'})
        out[f'{k}.dcm'] = raw_value(data, k, marks.word(where).encode())
    for k in ('NumberOfFrames', 'WindowCenter', 'WindowWidth', 'RescaleSlope', 'RescaleIntercept', 'EstimatedRadiographicMagnificationFactor', 'FocalSpots', 'DistanceSourceToDetector'):
        where = f'text in {k}'
        data = plain(where, **{k: 1 if k == 'NumberOfFrames' else '1'})
        out[f'{k}.dcm'] = raw_value(data, k, marks.word(where).encode())
    for k in ('Rows', 'Columns', 'BitsAllocated', 'BitsStored', 'SamplesPerPixel', 'PixelRepresentation'):
        where = f'text in {k}'
        out[f'{k}.dcm'] = raw_value(plain(where), k, marks.word(where).encode())
    for where, value in (('uid is a birth date', f'{YEAR}0214'), ('uid is a date with dots', f'14.02.{YEAR}'), ('uid is a phone number', f'{NUMBER}99999'), ('uid is a name', WORD)):
        for k in ('StudyInstanceUID', 'SeriesInstanceUID', 'SOPInstanceUID'):
            out[f'{k}-{where[9:]}.dcm'] = raw_value(plain(f'{where}/{k}', **{k: '1.2.3'}), k, value.encode())
    data = plain('unknown syntax')
    out['syntax.dcm'] = data.replace(b'1.2.840.10008.1.2.1\0', (marks.uid('TransferSyntaxUID')[:19]).encode() + b'\0')
    first, second = (small(marks, f'conflict{k}', '1.2.826.0.1.97.1') for k in (1, 2))
    out['conflict1.dcm'], out['conflict2.dcm'] = saved(first, marks, 'conflict1'), saved(second, marks, 'conflict2')
    out['conflict1-again.dcm'] = out['conflict1.dcm']
    for ts in (df.JPEGLL1, df.J2K_LOSSLESS, df.JLS, df.RLE, df.DEFLATED):
        ds = filled(marks, ts)
        ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID = next(uid)
        whole = saved(ds, marks, f'broken {ts}')
        out[f'broken-{ts}.dcm'] = whole[:-4000] + b'\x37' * 2000
    for cs in ('ISO_IR 192', 'ISO_IR 100', ['', 'ISO 2022 IR 87'], 'GB18030', 'ISO_IR 6', 'ISO_IR 999'):
        where = f'charset {cs}'
        ds = small(marks, where, next(uid))
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            ds.SpecificCharacterSet = cs
        ds.PatientName, ds.PatientComments = f'{marks.person(where)}^{WORD}é', f'{marks.word(where)} é'
        try: data = saved(ds, marks, where)
        except Exception: data = plain(where)
        out[f'charset-{len(out)}.dcm'] = data.replace(b'\xc3\xa9', b'\xff\xfe')
    out['sr.dcm'], out['pdf.dcm'], out['comment.dcm'] = report(marks), pdf(marks), commented(marks)
    out['note.txt'], out['page.html'], out['noext'] = (f'{marks.word(w)} {WORD}'.encode() * 20 for w in ('text file', 'html file', 'file without a suffix'))
    out['DICOMDIR'] = plain('dicomdir', DirectoryRecordSequence=Sequence([fill(Dataset(), marks, 'dicomdir/', deep=0, groups=WHO)]))
    return out


def archive(marks, images):
    "A zip with marks in its comment, its members' comments and extra fields; names of members are part of a path"
    f = io.BytesIO()
    with zipfile.ZipFile(f, 'w', zipfile.ZIP_DEFLATED) as z:
        z.comment = marks.word('zip comment').encode()
        for name, data in images.items():
            i = zipfile.ZipInfo(name)
            i.comment = marks.word('zip member comment').encode()
            i.extra = struct.pack('<HH', 0x7075, 10) + marks.word('zip extra').encode()
            z.writestr(i, data)
    return f.getvalue()


# ---- the search

def _spellings(word):
    "A word as bytes in every guise it could take"
    raw = word.encode()
    out = {raw, raw.lower(), raw[::-1], raw.hex().encode(), raw.hex().upper().encode(), raw.lower().hex().encode(), ' '.join(f'{b:02x}' for b in raw).encode(),
           ''.join(f'%{b:02X}' for b in raw).encode(), ''.join(f'%{b:02x}' for b in raw).encode(), ''.join(f'\\u{b:04x}' for b in raw).encode(),
           ''.join(f'\\x{b:02x}' for b in raw).encode(), ''.join(f'&#{b};' for b in raw).encode(), ''.join(f'&#x{b:x};' for b in raw).encode(), base64.b32encode(raw)[:-4]}
    for e in ('utf-16-le', 'utf-16-be', 'utf-32-le', 'utf-32-be', 'cp500'): out |= {word.encode(e), word.lower().encode(e)}
    for w in (raw, raw.lower()):   # base64 at its three alignments: the characters that do not depend on what stands beside
        for k in range(3):
            b = base64.b64encode(b'\0' * k + w)
            b = b[-(-8 * k // 6):(8 * (k + len(w))) // 6]
            out |= {b, b.translate(bytes.maketrans(b'+/', b'-_'))}
    return out


class Search:
    "Finds marks in bytes and in what they hold"
    def __init__(self, marks, allowed=lambda where: False, dates=True):
        "`allowed`: whether the number of a field may be found; `dates`: look for them, too"
        self.marks, self.files, self.bytes = marks, 0, 0
        self.allowed = {int(f'{NUMBER}{n:05d}') for n, where in marks.where.items() if allowed(where)}
        self.guises = {g: w for w in (WORD, ROOT) for g in _spellings(w)}
        days = set(marks.dates) | {f'{YEAR}0214'}
        iso = {f'{d[:4]}-{d[4:6]}-{d[6:]}' for d in days} | {f'{d[6:]}.{d[4:6]}.{d[:4]}' for d in days} | {f'{d[4:6]}/{d[6:]}/{d[:4]}' for d in days}
        self.days = days | iso if dates else set()
        self.plain = re.compile((rf'(?<![0-9.]){NUMBER}[0-9]{{5}}(?![0-9])|(?<![0-9]){YEAR}[-./]?[01][0-9][-./]?[0-3][0-9](?![0-9])|'
                                 rf'(?<![0-9])[0-3][0-9][./][0-3][0-9][./]{YEAR}(?![0-9])').encode())
        whole = [n for n in range(int(f'{NUMBER}00001'), int(f'{NUMBER}00001') + len(marks.where)) if n not in self.allowed]
        self.numbers = [np.array(sorted(struct.unpack('<q', struct.pack(f, kind(n)))[0] for n in whole)) for f, kind in (('<q', int), ('>q', int), ('<d', float), ('>d', float))]

    def name(self, text):
        "Which field a mark stands for"
        m = re.search(rf'(?:{WORD}|{re.escape(ROOT)}|{NUMBER})(\d{{5}}|[A-IK]{{5}})', text.upper())
        return self.marks.where.get(int(m[1].translate({v: k for k, v in LETTERS.items()})), '?') if m else '?'

    def found(self, data):
        "Marks in bytes as they lie there: `[(guise, field)]`"
        out = []
        for g, w in self.guises.items():
            at = data.find(g)
            if at >= 0: out.append((w, self.name(data[at:at + 40].decode('latin-1').replace('\0', ''))))
        for m in self.plain.finditer(data):
            t = m[0].decode()
            if t in self.days or t.isdigit() and t.startswith(str(NUMBER)) and int(t) not in self.allowed: out.append(('number or date', f'{self.name(t)} {t}'))
        for k in range(8) if len(self.numbers) else ():
            x = np.frombuffer(data, '<i8', offset=k, count=max(0, (len(data) - k) // 8)) if len(data) >= k + 8 else np.zeros(0, '<i8')
            for n in self.numbers:
                if (hit := x[(x >= n[0]) & (x <= n[-1])]).size and (hit := hit[n[np.searchsorted(n, hit)] == hit]).size: out.append(('binary number', f'{hit.size} times'))
        return out

    def parts(self, data):
        "What is packed in some bytes"
        view = memoryview(data)
        for m in re.finditer(rb'\x78[\x01\x5e\x9c\xda]', data): yield 'zlib', lambda at=m.start(): zlib.decompressobj().decompress(view[at:], 1 << 26)
        for m in re.finditer(rb'\x1f\x8b\x08', data): yield 'gzip', lambda at=m.start(): zlib.decompressobj(31).decompress(view[at:], 1 << 26)
        for m in re.finditer(rb'\x28\xb5\x2f\xfd', data): yield 'zstd', lambda at=m.start(): imagecodecs.zstd_decode(data[at:]) if at == 0 else _zstd(data[at:])
        for m in re.finditer(rb'\x04\x22\x4d\x18', data): yield 'lz4', lambda at=m.start(): imagecodecs.lz4f_decode(data[at:])
        if data[:4] == b'PK\3\4' or b'PK\5\6' in data[-70000:]: yield 'zip', lambda: _unzipped(data)
        for m in re.finditer(rb'[A-Za-z0-9+/]{40,}={0,2}|(?:[A-Za-z0-9+/]{76}\\n){2,}[A-Za-z0-9+/]*={0,2}', data):
            b = m[0].replace(b'\\n', b'')
            yield 'base64', lambda b=b: base64.b64decode(b[:len(b) // 4 * 4] if len(b) % 4 else b)

    def inside(self, data, depth=3, at=''):
        "Marks in bytes and in everything packed in them: `[(place, mark, field)]`"
        out = [(at, *f) for f in self.found(data)]
        if depth:
            for kind, unpack in self.parts(data):
                try: more = unpack()
                except Exception: continue
                if more and len(more) > 6: out += self.inside(more, depth - 1, f'{at}/{kind}')
        return out

    def file(self, path):
        "Marks in a file, by what it is as well as by its bytes"
        data = Path(path).read_bytes()
        self.files, self.bytes = self.files + 1, self.bytes + len(data)
        out = self.inside(data)
        for kind, text in _read_as(path, data): out += [(f'/{kind}', *f) for f in self.found(text)]
        return out

    def folder(self, folder, skip=()):
        "`[(file, place, mark, field)]` of everything below a folder; also in the names"
        out = []
        for p in sorted(Path(folder).rglob('*')):
            rel = p.relative_to(folder).as_posix()
            if any(rel.startswith(s) for s in skip): continue
            out += [(rel, '/name', *f) for f in self.found(rel.encode('utf-8', 'surrogateescape'))]
            if p.is_file(): out += [(rel, *f) for f in self.file(p)]
        return out


def _zstd(data):
    n = 1 << 16
    while n <= 1 << 26:
        try: return imagecodecs.zstd_decode(data, out=n)
        except Exception: n <<= 3
    raise ValueError


def _unzipped(data):
    with zipfile.ZipFile(io.BytesIO(data)) as z: return b'\n'.join([z.comment, *(b'\n'.join([i.filename.encode(), i.comment, i.extra, z.read(i)]) for i in z.infolist())])


def _read_as(path, data):
    "What programs would show of a file: `(kind, bytes)`"
    name = Path(path).name
    if data[:4] == b'PAR1':
        yield 'parquet', json.dumps(pl.read_parquet_metadata(path)).encode()
        for c in pl.read_parquet(path).iter_columns(): yield f'parquet:{c.name}', '\n'.join(str(v) for v in c.to_list() if v is not None).encode('utf-8', 'replace')
    elif data[:6] == b'SQLite':
        db = sqlite3.connect(f'file:{path}?mode=ro', uri=True)
        yield 'sqlite', '\n'.join(db.iterdump()).encode('utf-8', 'replace')
        db.close()
    elif name.endswith('.shard'):
        from mammo_nb.cohort.thumbs import _contents
        for e in (_contents(path) or [()])[0]:
            n = int(e['rows']) * int(e['cols'])
            raw = data[int(e['at']):int(e['at']) + int(e['bytes'])]
            if n: yield 'shard', imagecodecs.lz4_decode(raw, out=n) if len(raw) != n else raw
    elif name.endswith('.npz'):
        yield 'npz', _unzipped(data)
    elif name.endswith('.ipynb'):
        for c in json.loads(data)['cells']:
            for o in c.get('outputs', ()):
                yield 'output', json.dumps(o, ensure_ascii=False).encode()
                for k, v in o.get('data', {}).items():
                    if k.startswith('image/') and isinstance(v, str): yield k, base64.b64decode(v)
