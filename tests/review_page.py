"A small cohort with predictions for the reviewer's tests, and the cell that opens it."
import polars as pl

from labeler_page import ROOT, image_id, make_cohort, marked_image


def review_cohort(folder, rows=320, cols=256, image=marked_image, dicom=False, thumbnails=True, answers=()):
    """Six studies of four views (the last two are hold-out) with predictions: study 4 and 0 are flagged for a tool, 1 for magnification, 2 is borderline.
    Without `thumbnails` it is a cohort that was only inferred: no label store either."""
    n = 24
    c = make_cohort(folder, n=n, hold_out=8, rows=rows, cols=cols, dicom=dicom, predictions=False, image=image, pictures=None if thumbnails else 0)
    if not thumbnails: (c/'labels.sqlite').unlink()
    biopsy, mag = {1: .93, 17: .97, 8: .47}, {6: .88, 16: .6}
    p = pl.DataFrame([dict(image_id=image_id(i), path=f'{i}.dcm', frame=0, study_id=f'1.2.840.{i//4}', status='ok', prob_biopsy=biopsy.get(i, .05), prob_mag=mag.get(i, .02),
                           split='hold_out' if i >= 16 else 'train') for i in range(n)])
    p.write_parquet(c/'predictions.parquet')
    studies_of(p).write_parquet(c/'studies.parquet')
    return c


def studies_of(p):
    out = p.filter(status='ok').group_by('study_id', maintain_order=True).agg(max_prob_biopsy=pl.col('prob_biopsy').max(), max_prob_mag=pl.col('prob_mag').max(), image_count=pl.len())
    return out.with_columns(has_biopsy_tool=pl.col('max_prob_biopsy') >= .5, has_mag_view=pl.col('max_prob_mag') >= .5)


def review_cell(folder, rater='anna', cam='cam', csv=''):
    return f'''import os
from pathlib import Path
import numpy as np, polars as pl
from mammo_nb.core.settings import MammoError, load_settings
from mammo_nb.labels.review import Reviewer, review_list
folder, s = Path({str(folder)!r}), load_settings({str(ROOT/"settings.ini")!r})
Path(folder, "pid").write_text(str(os.getpid()))
predictions = pl.read_parquet(folder/"predictions.parquet")
def cam(image_id, finding):
    if finding == "mag": raise MammoError("the model cannot say where it looked")
    y, x = np.mgrid[:128, :100]
    return (255*np.exp(-((x - 25)**2 + (y - 20)**2)/400)).astype(np.uint8)
review = Reviewer(folder, s, {rater!r}, review_list(pl.read_parquet(folder/"studies.parquet"), s, borderline=1), predictions, cam={cam})
review'''
