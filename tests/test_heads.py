"Both findings on one image: the default head says both, the softmax head cannot. The same phantoms, labels, network and steps for the two."
import numpy as np
import polars as pl
import pytest

from mammo_nb.cohort.thumbs import Thumbnails
from mammo_nb.learn.explain import Explainer
from phantom_cohort import trained

BOTH = (pl.col('has_biopsy_tool') == 1) & (pl.col('has_mag_view') == 1)
YES = {n: pl.col(f'prob_{n}') >= .5 for n in ('biopsy', 'mag')}


@pytest.fixture(scope='module', params=['sigmoid', 'softmax'])
def answers(request):
    "`(head, unseen images with their labels and probabilities)`"
    labelled = pl.read_parquet(trained(request.param)[0]/'labelled.parquet')
    return request.param, labelled.filter(pl.col('split') != 'train')


def test_images_with_both_findings(answers):
    "measured: 25 of 32 get both from the default head; none from softmax, which names one of them in 28"
    head, seen = answers
    both = seen.filter(BOTH)
    two, one = both.filter(YES['biopsy'] & YES['mag']).height, both.filter(YES['biopsy'] ^ YES['mag']).height
    assert both.height >= 25
    if head == 'sigmoid': assert two/both.height >= .5, (two, both.height)
    else: assert two == 0 and one/both.height >= .5, 'it does name one of the two: what it lacks is the other, not the skill'


def test_softmax_shares_one_probability(answers):
    head, seen = answers
    total = (seen['prob_biopsy']+seen['prob_mag']).to_numpy()
    if head == 'softmax': assert total.max() <= 1+1e-5
    else: assert total.max() > 1.5


def test_the_loss_is_on_images_with_both():
    "with two findings softmax gets every single image wrong; elsewhere it is right on most"
    exact = {}
    for head in ('sigmoid', 'softmax'):
        seen = pl.read_parquet(trained(head)[0]/'labelled.parquet').filter(pl.col('split') != 'train')
        right = (YES['biopsy'] == (pl.col('has_biopsy_tool') == 1)) & (YES['mag'] == (pl.col('has_mag_view') == 1))
        exact[head] = [seen.filter(c).select(right.mean()).item() for c in (BOTH, ~BOTH)]
    assert exact['softmax'][0] == 0 < .5 <= exact['sigmoid'][0]
    assert exact['softmax'][1] >= .5


def test_both_heads_can_be_explained():
    folder, truth, _ = trained('softmax')
    ex, thumbs = Explainer.load(folder), Thumbnails(folder.parents[1]/'thumbnails')
    img = thumbs.get(truth.filter(BOTH & (pl.col('split') != 'train'))['image_id'][0])
    cam, p = ex.cam(img), ex.prob(img)
    assert cam.shape == (2, *img.shape) and np.isfinite(cam).all() and p.shape == (2,) and p.sum() <= 1+1e-5
