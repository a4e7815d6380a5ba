"""MIDI-B's ten checks on phantom files with planted identifiers, each against an answer key made here: nothing of the engine and nothing of the verifier is used to judge.
    python tests/faults/edge_midi.py --files 200 --save"""
import json
import sys
import tempfile
import warnings
from collections import Counter
from datetime import date
from pathlib import Path

import cv2
import numpy as np
import polars as pl
import pydicom
from pydicom.dataset import Dataset
from pydicom.multival import MultiValue

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from conftest import ROOT
from faults import arguments
from mammo_nb.core.engine import utc_now, write_json
from mammo_nb.core.settings import load_settings
from mammo_nb.dicom.ocr import reader_name
from mammo_nb.dicom.phantom import make_cohort
from mammo_nb.edge.deidentify import Deidentifier
from mammo_nb.edge.verify import verify_file, verify_links

CHECKS = 'tag_retained text_notnull text_retained text_removed date_shifted uid_changed uid_consistent patid_consistent pixels_hidden pixels_retained'.split()
# the answer key: what the basic profile with pseudonyms of devices, moved dates and clean pixels leaves as it is, and what an image cannot be without
KEEP = '''Modality Manufacturer ManufacturerModelName KVP ExposureTime XRayTubeCurrent Exposure BodyPartThickness CompressionForce BodyPartExamined AnodeTargetMaterial FilterMaterial
    ImagerPixelSpacing PositionerType DetectorType ImageLaterality Laterality ViewPosition PatientOrientation Rows Columns BitsStored PixelRepresentation PhotometricInterpretation
    RescaleSlope RescaleIntercept WindowCenter WindowWidth VOILUTFunction SeriesNumber InstanceNumber StudyTime ContentTime SOPClassUID SpecificCharacterSet LossyImageCompression'''.split()
FILLED = 'PatientID SOPClassUID SOPInstanceUID StudyInstanceUID SeriesInstanceUID Modality StudyDate DeviceSerialNumber StationName Rows Columns DeidentificationMethod PatientIdentityRemoved'.split()
UIDS = 'SOPInstanceUID StudyInstanceUID SeriesInstanceUID FrameOfReferenceUID'.split()
DATES = 'StudyDate SeriesDate AcquisitionDate ContentDate AcquisitionDateTime InstanceCreationDate'.split()
FIRST = 'adelinde bertrande clothilde dorothea eleonora friederike gwendolyn henrietta isolde jolanthe'.split()
LAST = 'abercrombie bloomquist castellanos drinkwater ellingsworth fitzgerald greenhalgh heatherington illingworth jankowski'.split()


def item(**kw):
    ds = Dataset()
    for k, v in kw.items(): setattr(ds, k, v)
    return ds


def person(who, seed):
    "Made-up identifiers of a patient"
    rng = np.random.default_rng([seed, who])
    first, last = (str(rng.choice(n)) + 'qx' for n in (FIRST, LAST))   # no such name in any word list
    number = lambda n: ''.join(map(str, rng.integers(1, 10, n)))
    born = date(1940 + int(rng.integers(40)), int(rng.integers(1, 13)), int(rng.integers(1, 29)))
    return dict(name=f'{last}^{first}', words=(first, last), id=f'PAT{number(8)}', phone=f'0{number(10)}', street=f'{number(3)} Quixotic Lane {number(3)}', born=born, mail=f'{first}@{last}.example')


def plant(ds, p, rng, k):
    "Identifiers in plain places, in text, in sequences, in private elements; the secrets that must not come out again"
    acc, physician, place, serial, order = (f'{w}{rng.integers(10**6, 10**7)}' for w in ('ACC', 'Dr Quirinus', 'Saint Quilombo ', 'SN', 'ORD'))
    ds.PatientName, ds.PatientID, ds.PatientBirthDate, ds.AccessionNumber = p['name'], p['id'], p['born'].strftime('%Y%m%d'), acc
    ds.OtherPatientIDs, ds.PatientAddress, ds.PatientTelephoneNumbers, ds.InstitutionName, ds.ReferringPhysicianName = p['id'] + 'B', p['street'], p['phone'], place, physician
    ds.PatientComments = f"call {p['words'][0]} {p['words'][1]} at {p['phone']}, born {p['born']:%d.%m.%Y}"
    ds.StudyDescription, ds.SeriesDescription = f"MAMMO {p['words'][1].upper()}, {p['words'][0]}", f'L CC {acc}'
    ds.OperatorsName, ds.DeviceSerialNumber, ds.StationName, ds.RequestingService = f'{physician}^tech', serial[:8], f'RM{k % 7}-{order[3:8]}', f"care of {p['mail']}"
    ds.AcquisitionDateTime, ds.InstanceCreationDate, ds.FrameOfReferenceUID = f'{ds.StudyDate}101112.5', ds.StudyDate, ds.StudyInstanceUID + '.9'
    ds.RequestAttributesSequence = [item(RequestedProcedureID=order, ScheduledProcedureStepDescription=p['name'])]
    ds.OtherPatientIDsSequence = [item(PatientID=p['id'] + 'C', IssuerOfPatientID=place)]
    ds.ReferencedInstanceSequence = [item(ReferencedSOPClassUID=ds.SOPClassUID, ReferencedSOPInstanceUID=ds.SOPInstanceUID)]
    if ds.get('AnatomicRegionSequence'): ds.AnatomicRegionSequence[0].add_new('PatientName', 'PN', p['name'])
    ds.PaddleDescription = f"24CM {p['words'][1]}" if k % 5 == 0 else '24CM SCREEN'   # a kept attribute, now and then with a name in it
    for group in (0x19, 0x45):
        block = ds.private_block(group, f'QUIRK {group}', create=True)
        block.add_new(1, 'LO', p['name'])
        block.add_new(2, 'UN', f"{p['mail']} ".encode())
        block.add_new(3, 'SQ', [item(PatientID=p['id'], PatientBirthDate=ds.PatientBirthDate)])
    ds.file_meta.SourceApplicationEntityTitle, ds.preamble = f'AE{order}'[:16], p['name'].encode()[:120].ljust(128, b'\0')
    return [*p['words'], p['id'], p['phone'], p['street'], p['mail'], f"{p['born']:%Y%m%d}", f"{p['born']:%d.%m.%Y}", acc, physician, place, serial[:8], order, ds.StationName]


def frames_of(ds):
    a = ds.pixel_array
    return a if a.ndim == 3 else a[None]


def burn(ds, p, rng):
    "Text in the stored pixels, in the corner with the least in it; the ink, and whether it stands on free ground"
    a = frames_of(ds).copy()
    h, w = a.shape[1:]
    ink, size, lines = np.zeros((h, w), np.uint8), float(rng.uniform(.55, .9)) * h / 700, [f"{p['words'][1]} {p['words'][0]}"[:22].upper(), f"{p['id']}  {p['born']:%d.%m.%Y}"]
    face = cv2.FONT_HERSHEY_SIMPLEX
    wide = max(cv2.getTextSize(t, face, size, 1)[0][0] for t in lines)
    size *= min(1, .42 * w / wide)
    wide, high = max(cv2.getTextSize(t, face, size, 1)[0][0] for t in lines), cv2.getTextSize(lines[0], face, size, 1)[0][1]
    spots = [(x, y) for x in (int(.03 * w), int(.97 * w - wide)) for y in (int(.03 * h + high), int(.97 * h - 2.2 * high))]
    around = lambda s: a[0, max(0, s[1] - high - 4):s[1] + 2 * high + 4, max(0, s[0] - 4):s[0] + wide + 4].astype(float)
    x, y = min(spots, key=lambda s: around(s).std())   # where nothing else is, as far as there is such a place
    for i, t in enumerate(lines): cv2.putText(ink, t, (x, y + int(1.9 * high) * i), face, size, 255, max(1, round(size * 1.6)), cv2.LINE_AA)
    lo, hi = np.percentile(a[0], (.1, 99.9))
    free = around((x, y)).std() < .01 * (hi - lo)   # nothing but background there, as where scanners and workstations write
    a[:, ink > 90] = hi if np.median(around((x, y))) < (lo + hi) / 2 else lo   # white on black or black on white
    return a, ink > 90, free


def stored(ds, a):
    "The dataset with these pixels, uncompressed"
    ds.PixelData, ds.file_meta.TransferSyntaxUID = a.tobytes(), '1.2.840.10008.1.2.1'
    ds['PixelData'].VR = 'OW'
    ds['PixelData'].is_undefined_length = False
    return ds


def make(folder, files, size, seed):
    "`[(path, secrets, ink or None, whether it stands on free ground)]`: every third picture has text burnt in, the files keep their transfer syntaxes where nothing is burnt in"
    truth = make_cohort(folder/'made', patients=files // 4 + 1, image_size=size, seed=seed, broken=0, workers=2 if files > 40 else 1)
    rows = truth.filter(~pl.col('distractors').list.contains('text'), ~pl.col('path').str.contains('!')).unique('path', keep='first', maintain_order=True).head(files)
    out = []
    for k, r in enumerate(rows.iter_rows(named=True)):
        ds, rng, p = pydicom.dcmread(folder/'made'/r['path']), np.random.default_rng([seed, 7, k]), person(r['patient'] + (1000 if 'b' in r['site'] else 0), seed)
        secrets, ink, path = plant(ds, p, rng, k), None, folder/'dicom'/f'{k:04}.dcm'
        free = None
        if k % 3 == 0: a, ink, free = burn(ds, p, rng); stored(ds, a)
        path.parent.mkdir(parents=True, exist_ok=True)
        ds.save_as(path, enforce_file_format=True)
        out.append((path, secrets, ink, free))
    return out


# ---- the ten checks

def value(ds, k): return str(ds[k].value) if k in ds else None

def uid_pairs(old, new):
    "UIDs of both at the same places, at every depth"
    for e in old:
        n = new.get(e.tag)
        if n is None: continue
        if e.VR == 'SQ':
            for a, b in zip(e.value, n.value): yield from uid_pairs(a, b)
        elif e.VR == 'UI' and not str(e.value).startswith('1.2.840.10008'):
            yield from zip(*([v] if not isinstance(v, MultiValue) else v for v in (e.value, n.value)))


def day(v): return date(int(v[:4]), int(v[4:6]), int(v[6:8]))

def judge(src, dst, secrets, ink, seen):
    "`[(check, passed, what)]` of one file; `seen` remembers what has to hold across files"
    old, new, raw = pydicom.dcmread(src), pydicom.dcmread(dst), dst.read_bytes().lower()
    texts = [(k, value(old, k)) for k in KEEP if k in old]
    for k, v in texts: yield 'tag_retained', k in new, k
    for k, v in texts:
        if v: yield 'text_retained', value(new, k) == v, k
    if old.get('ViewCodeSequence'): yield 'text_retained', new.get('ViewCodeSequence') == old.ViewCodeSequence, 'ViewCodeSequence'
    if 'SCREEN' in old.PaddleDescription: yield 'text_retained', value(new, 'PaddleDescription') == old.PaddleDescription, 'PaddleDescription'
    for k in FILLED: yield 'text_notnull', bool(value(new, k)), k
    for s in secrets: yield 'text_removed', s.lower().encode() not in raw, 'a secret'
    for k in ('OtherPatientIDs', 'PatientAddress', 'PatientTelephoneNumbers', 'PatientComments', 'StudyDescription', 'SeriesDescription', 'RequestAttributesSequence', 'OtherPatientIDsSequence'):
        yield 'text_removed', k not in new, k
    yield 'text_removed', not any(e.tag.is_private for e in new.iterall()), 'private elements'
    for k in DATES:
        if k in old and old[k].value: yield 'date_shifted', value(new, k) not in (None, '', old[k].value) and (day(value(new, k)) - day(old[k].value)).days == seen.setdefault(('shift', old.PatientID), (day(new.StudyDate) - day(old.StudyDate)).days) != 0, k
    yield 'date_shifted', not value(new, 'PatientBirthDate') or value(new, 'PatientBirthDate') != old.PatientBirthDate, 'PatientBirthDate'
    for k in UIDS: yield 'uid_changed', value(new, k) not in (None, '', value(old, k)), k
    yield 'uid_changed', new.file_meta.MediaStorageSOPInstanceUID == new.SOPInstanceUID != old.SOPInstanceUID, 'file meta'
    for a, b in uid_pairs(old, new): yield 'uid_consistent', seen.setdefault(('uid', str(a)), str(b)) == str(b) and seen.setdefault(('back', str(b)), str(a)) == str(a), 'a UID'
    yield 'uid_consistent', new.ReferencedInstanceSequence[0].ReferencedSOPInstanceUID == new.SOPInstanceUID, 'a reference'
    yield 'patid_consistent', bool(new.PatientID) and seen.setdefault(('patient', old.PatientID), new.PatientID) == new.PatientID and seen.setdefault(('who', new.PatientID), old.PatientID) == old.PatientID, 'PatientID'
    yield from pixels(old, new, ink)


def pixels(old, new, ink):
    "Whether burnt-in text is gone, and the rest there"
    a, b = frames_of(old), frames_of(new)
    if ink is None:
        yield 'pixels_retained', np.array_equal(a, b), 'all pixels'
        return
    y, x = np.nonzero(ink)
    box = slice(y.min(), y.max() + 1), slice(x.min(), x.max() + 1)
    for f, g in zip(a, b):   # what is left of the letters: the part of their contrast that can still be measured
        inside, letters = g[box].astype(float), ink[box]
        left = abs(inside[letters].mean() - inside[~letters].mean()) / (abs(f[box].astype(float)[letters].mean() - f[box].astype(float)[~letters].mean()) + 1e-9)
        yield 'pixels_hidden', left < .05 and not (g[ink] == f[ink]).any(), 'burnt-in text'
    margin = int(max(24, 1.5 * (y.max() - y.min())))
    far = np.ones(ink.shape, bool)
    far[max(0, box[0].start - margin):box[0].stop + margin, max(0, box[1].start - margin):box[1].stop + margin] = False
    yield 'pixels_retained', all(np.array_equal(f[far], g[far]) for f, g in zip(a, b)), 'pixels far from the text'


def campaign(folder, files=200, size=768, seed=1, say=print):
    "Everything, and what the verifier says of the same files"
    warnings.simplefilter('ignore')
    s = load_settings(ROOT/'settings.ini')
    engine, seen, got, failed, rejected, objections, pairs, masked = Deidentifier(s, bytes(range(32))), {}, {c: [0, 0] for c in CHECKS}, Counter(), Counter(), Counter(), [], 0
    made = make(folder, files, size, seed)
    ground = dict(free=[0, 0], over_tissue=[0, 0])
    for path, secrets, ink, free in made:
        r = engine.file(path, folder/'out')
        if r.status != 'ok': rejected[r.reason] += 1; continue
        for check, good, what in judge(path, r.path, secrets, ink, seen):
            got[check][0] += bool(good)
            got[check][1] += 1
            if check == 'pixels_hidden': where = ground['free' if free else 'over_tissue']; where[0] += bool(good); where[1] += 1
            if not good: failed[f'{check}: {what}'] += 1; say(f'{path.name} {check}: {what}')
        for p in verify_file(path, r.path, r.masked, s.edge.options, s.edge.station, s.edge.max_shift, reader=s.edge.reader): objections[p] += 1
        pairs.append((path, r.path))
        masked += bool(r.masked)
    for p in verify_links(pairs, s.edge.options): objections[p] += 1
    return dict(files=len(made), with_text=sum(i is not None for *_, i, _ in made), written=len(pairs), masked=masked, rejected=dict(rejected), checks=got, hidden=ground, failed=dict(failed), verifier=dict(objections))


def main():
    a = arguments(__doc__, files=200, size=(768, 'long edge of the pictures'))
    with tempfile.TemporaryDirectory() as d: got = dict(made_utc=utc_now(), reader=reader_name(), seed=a.seed, size=a.size, **campaign(Path(d), a.files, a.size, a.seed))
    print(json.dumps(got, indent=1))
    if a.save:
        (ROOT/'nbs'/'data'/'edge').mkdir(parents=True, exist_ok=True)
        write_json(ROOT/'nbs'/'data'/'edge'/'midi.json', got)


if __name__ == '__main__': main()
