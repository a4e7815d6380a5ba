"""Coverage-guided fuzzing of everything that reads a file: python tests/faults/fuzz.py [CORPUS_FOLDER] [-max_total_time=600] [any libFuzzer option]

Needs atheris (pip install atheris; Linux, and a Python it has a wheel for). Headers, pixels and the model's input are asked for, and a plain sentence
(`ReadError`) is the only exception they may end in. Without a corpus folder it starts from a small file of every transfer syntax; what it finds is written
beside as `crash-…`. `--once FILE …` looks at files without atheris, e.g. at such a finding."""
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


def look(data):
    "One file's content through the front doors. Raises whatever is not a sentence."
    from mammo_nb.cohort.facts import header_facts, not_an_image
    from mammo_nb.dicom.display import render_input
    from mammo_nb.dicom.read import ReadError, Source
    try:
        with Source(data, 50_000_000) as s:
            header_facts(s.header, b'k' * 32)
            if not_an_image(s.header, len(data), 4_000_000): return
            for k in range(min(2, s.image_layout(4_000_000).frames)): render_input(s, 64, 128, k, 4_000_000)
    except ReadError as e: assert e.reason and 'could not be processed' not in e.reason


def seeds(folder):
    "A small file of every transfer syntax"
    import dicom_files as df
    import numpy as np
    for ts in [*df.LOSSLESS, *df.LOSSY]:
        px = df.tissue(40, 32)
        (folder/f'{ts}.dcm').write_bytes(df.make((px >> 4).astype(np.uint8) if ts == df.BASELINE else px, ts, bits=8 if ts == df.BASELINE else 12))


def main():
    if sys.argv[1:2] == ['--once']:
        for f in sys.argv[2:]: look(Path(f).read_bytes())
        return
    try: import atheris
    except ImportError: sys.exit('atheris is not installed (pip install atheris); tests/faults/hostile.py --only mutants does without.')
    with atheris.instrument_imports(include=['pydicom', 'mammo_nb.dicom', 'mammo_nb.cohort']): look(b'')
    args = sys.argv[1:]
    if not any(Path(a).is_dir() for a in args):
        folder = Path(tempfile.mkdtemp())
        seeds(folder)
        args.append(str(folder))
    atheris.Setup([sys.argv[0], *args], look)
    atheris.Fuzz()


if __name__ == '__main__': main()
