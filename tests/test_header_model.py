"""The header model: what it may look at, how it is saved, who it learns from, and what it does beside the pixels."""
import json
import shutil
from types import SimpleNamespace

import numpy as np
import polars as pl
import pytest
from scipy.special import expit

from mammo_nb import infer
from mammo_nb.cohort.facts import SEEN_AS
from mammo_nb.cohort.headers import RULES
from mammo_nb.core.engine import write_parquet, write_sealed
from mammo_nb.core.settings import MammoError, load_settings
from mammo_nb.infer import aggregate, write_csv
from mammo_nb.learn import header_model as H
from mammo_nb.learn.bundle import Bundle, read_bundle_json, write_bundle_json
from mammo_nb.learn.rounds import train_round
from toy_cohort import tiny_settings, toy_cohort

S = load_settings()
NAMES, COLUMNS = S.names, S.columns


def hospitals(patients=240, seed=0, says=(.7, .6, 0., .5), share=(.8, .3, .15, .3), bits=(12, 10, 14, 11)):
    "manifest and labels of made-up hospitals; `bits` names them, so where shares differ it is a leak"
    rng, rows, n = np.random.default_rng(seed), [], len(says)
    for p in range(patients):
        k, special = p % n, rng.random() < .4
        tool = rng.random() < share[k]
        for v in range(4):
            has, mag = bool(tool and rng.random() < .8), bool(special and v > 1)
            fired = ['postbiopsy']*(has and rng.random() < says[k]) + (['magnification'] if mag and rng.random() < says[k] else ['contact'])
            rows.append(dict(image_id=f'{p*4+v:016x}', study_id=f's{p}', patient_id=f'p{p}', site='nwse'[k], manufacturer='ABAB'[k], model='M',
                             split=('train', 'train', 'train', 'valid', 'hold_out', 'valid')[p//n % 6], status='ok', laterality='LR'[v % 2], frame=0,
                             view='LR'[v % 2]+('-ML' if has and rng.random() < .5 else '-CC'), header_rules=','.join(fired),
                             header_filled='Grid' if k else '', rows=1000+bits[k], columns=800, bits_stored=bits[k], year=2020,
                             photometric='MONOCHROME2', transfer_syntax='1.2.840.10008.1.2.1', has_biopsy_tool=float(has), has_mag_view=float(mag)))
    df = pl.DataFrame(rows)
    rng = np.random.default_rng(seed+1)
    doubt = lambda c: pl.Series(expit(2*(2*df[c].to_numpy()-1) + 1.6*rng.normal(size=df.height)))
    return df.with_columns(prob_biopsy=doubt('has_biopsy_tool'), prob_mag=doubt('has_mag_view'))


@pytest.fixture(scope='module')
def cohort(): return hospitals()


@pytest.fixture(scope='module')
def features(cohort): return H.header_features(cohort)


SOME = ['rule', 'view']   # groups, where the choice of groups is not what is tested
fit = lambda c, x: H.fit_header_model(c, x, S, SOME)


@pytest.fixture(scope='module')
def model(cohort, features): return fit(cohort, features)


# --- features

def test_no_feature_is_a_name(cohort, features):
    "who made an image never becomes a number: with every name replaced by another one, the features are the same"
    names = pl.col('site').replace_strict(dict(zip('nwse', ['x9', 'y8', 'z7', 'q6'])))
    other = cohort.with_columns(names, pl.col('manufacturer').str.to_lowercase(), model=pl.lit('Z'))
    assert H.header_features(other).equals(features)
    assert all(t == pl.Float32 for t in features.dtypes[1:])


def test_a_hospital_does_not_depend_on_the_others(cohort, features):
    "what is usual is asked of the own machine only, so a hospital's features stay when another joins the archive"
    alone = H.header_features(cohort.filter(site='w'))
    assert alone.equals(features.filter(pl.col('image_id').is_in(alone['image_id'].implode())))


def test_a_no_counts_where_the_machine_also_says_yes(cohort, features):
    d = features.join(cohort.select('image_id', 'site', 'header_rules'), on='image_id')
    by = {k: e for (k,), e in d.group_by('site')}
    assert by['s']['header_rules'].str.contains('contact').sum() > 100 and by['s']['rule contact'].sum() == 0 and by['s']['speaks mag'].sum() == 0
    assert (by['w']['rule contact'] == by['w']['header_rules'].str.contains('contact').cast(pl.Float64)).all() and (by['w']['speaks mag'] == 1).all()


def test_one_wrong_yes_does_not_make_a_machine_speak(cohort):
    south = cohort.filter(site='s')
    many = pl.concat([south.with_columns(pl.col('image_id') + str(k), pl.col('study_id') + str(k)) for k in range(4)])
    once = many.with_columns(header_rules=pl.when(pl.int_range(pl.len()) == 0).then(pl.lit('magnification')).otherwise('header_rules'))
    assert H.header_features(once)['speaks mag'].sum() == 0


def test_unusual_is_measured_at_the_machine():
    m = pl.DataFrame(dict(image_id=list('abcdefgh'), study_id=list('stuvwxyz'), manufacturer=['A']*4 + ['B']*4, columns=[80]*8,
                          rows=[100, 100, 100, 50] + [50, 50, 50, 100], header_filled=['Grid', 'Grid', 'Grid', 'Grid,PaddleDescription', '', '', '', 'Grid']))
    x = H.header_features(m)
    assert np.allclose(x['unusual size'], np.log([1, 1, 1, .5, 1, 1, 1, 2])) and x['unusual Grid'].to_list() == [0]*7 + [1]
    assert x['unusual PaddleDescription'].to_list() == [0]*3 + [1] + [0]*4


def test_a_manifest_with_gaps():
    "missing columns and nulls are silence; rejected rows and second copies get no features; frames of a volume are one image of the study"
    x = H.header_features(pl.DataFrame(dict(image_id=list('aab'), study_id=list('ssr'), status=['ok', 'duplicate', 'rejected'])))
    assert x['image_id'].to_list() == ['a'] and x['study images'][0] == 1 and x.select(pl.col('^rule .*$')).sum_horizontal()[0] == 0
    volume = pl.DataFrame(dict(image_id=list('abc'), study_id=['s']*3, frame=[0, 1, 2], status=['ok']*3, view=['L-CC']*3, laterality=['L']*3))
    assert H.header_features(volume)['study images'].to_list() == [1, 1, 1]
    assert x.null_count().sum_horizontal()[0] == 0 and x.select(pl.col(pl.Float32).is_finite().all()).row(0).count(False) == 0
    assert H.header_features(pl.DataFrame(schema=dict(image_id=pl.String, study_id=pl.String))).height == 0


def test_every_group_has_features_and_every_rule_is_one(features):
    assert {c.split(' ')[0] for c in features.columns[1:]} == set(H.GROUPS)
    assert {f'rule {r.name}' for r in RULES} <= set(features.columns)
    assert H.columns_of(features.with_columns(view=pl.lit('x'), year=pl.lit(1)), ['view', 'year']) == ['view CC', 'view MLO', 'view ML', 'view other', 'year year']


# --- trees as plain data

def fitted(n=300, missing=.15, seed=0):
    rng = np.random.default_rng(seed)
    X = np.where(rng.random((n, 6)) < missing, np.nan, rng.normal(size=(n, 6)).round(1))
    y = (np.nan_to_num(X[:, 0], nan=2.) + .5*rng.normal(size=n) > .8).astype(int)
    return X, y, np.arange(n)//2


@pytest.mark.parametrize('missing', [0., .15, .6])
def test_saved_trees_answer_like_scikit_learn(missing):
    X, y, who = fitted(missing=missing)
    model = H.fit_trees(X, y, who, list('abcdef'), 'biopsy')
    plain = json.loads(json.dumps(H.to_plain(model, X), allow_nan=False))
    new = np.vstack([fitted(2000, missing, seed=5)[0], np.full((1, 6), np.nan), np.full((1, 6), 1e9), np.full((1, 6), -1e9)])
    assert np.abs(H.plain_probability(plain, new)-model.predict_proba(new)[:, 1]).max() < 1e-12
    assert np.ptp(H.plain_probability(plain, new)) > .3


def test_a_split_on_missing_values_alone():
    "scikit-learn marks it by an infinite threshold, which JSON does not know"
    rng = np.random.default_rng(0)
    X = np.where(rng.random((400, 1)) < .5, np.nan, 1.)
    y = (np.isnan(X[:, 0]) ^ (rng.random(400) < .05)).astype(int)
    model = H.fit_trees(X, y, np.arange(400), ['a'], 'biopsy')
    plain = json.loads(json.dumps(H.to_plain(model, X), allow_nan=False))
    assert None in plain['threshold'] and np.abs(H.plain_probability(plain, X)-model.predict_proba(X)[:, 1]).max() < 1e-12
    assert np.ptp(H.plain_probability(plain, X)) > .7


def test_an_export_that_differs_is_refused():
    X, y, who = fitted()
    model = H.fit_trees(X, y, who, list('abcdef'), 'biopsy')
    model.calibrated_classifiers_[0].estimator._predictors[3][0].nodes['value'] += 1e-3   # after the fact: what predict uses is changed as well
    H.to_plain(model, X)
    model.calibrated_classifiers_[0].estimator._baseline_prediction = np.array([[5.]])
    real, H.plain_probability = H.plain_probability, lambda p, x: np.zeros(len(x))
    try:
        with pytest.raises(MammoError, match='could not be exported'): H.to_plain(model, X)
    finally: H.plain_probability = real


def test_a_rule_may_not_be_turned_round():
    "a rule that says yes never lowers the probability, one that says no never raises it, whatever one hospital's labels say"
    rng = np.random.default_rng(0)
    fired = (rng.random(600) < .5).astype(float)
    for rule, y in (('rule magnification', fired == 0), ('rule contact', fired == 1)):
        X = np.c_[fired, rng.normal(size=600)]
        y = (y ^ (rng.random(600) < .1)).astype(int)   # labels say the opposite of the rule
        p = H.plain_probability(H.to_plain(H.fit_trees(X, y, np.arange(600), [rule, 'view CC'], 'mag'), X), np.c_[[0., 1.], [0., 0.]])
        assert p[1] >= p[0]-1e-12 if rule == 'rule magnification' else p[1] <= p[0]+1e-12


def test_probabilities_are_calibrated(cohort, features):
    "on patients nobody has seen: the mean probability is near the share of positives"
    d = cohort.join(features, on='image_id')
    a, b = d.filter(split='train'), d.filter(split='hold_out')
    cols = H.columns_of(d, ['rule', 'view'])
    m = H.fit_trees(a.select(cols).to_numpy(), a['has_mag_view'].to_numpy(), a['patient_id'].to_numpy(), cols, 'mag')
    p = m.predict_proba(b.select(cols).to_numpy())[:, 1]
    assert abs(p.mean()-b['has_mag_view'].mean()) < .08


# --- which features may stay

def test_a_feature_that_names_the_hospital_is_sent_away(cohort, features):
    d = cohort.join(features, on='image_id')
    kept, rows = H.choose_groups(d.filter(split='train'), 'biopsy', 'has_biopsy_tool')
    named = H.names_the_site(d)
    assert 'machine' not in kept and 'view' in kept and kept[0] == 'rule' and named['machine'] > .95 and named['view'] < .6
    leak = next(r for r in rows if r['group'] == 'machine')
    assert leak['gain'] <= leak['error'] and [r['group'] for r in rows] == list(H.GROUPS)


def test_one_hospital_cannot_test_anything(cohort, features):
    d = cohort.join(features, on='image_id').filter(pl.col('split') == 'train', pl.col('site') == 'n')
    kept, rows = H.choose_groups(d, 'mag', 'has_mag_view')
    assert kept == ['rule'] and all('fewer than two' in r['note'] for r in rows)


def test_only_training_rows_choose(cohort, features):
    with pytest.raises(MammoError, match='valid'): H.choose_groups(cohort.join(features, on='image_id'), 'mag', 'has_mag_view')


# --- who it learns from

def test_the_hold_out_changes_nothing(cohort, features, model):
    held = pl.col('split') == 'hold_out'
    other = cohort.with_columns([pl.when(held).then(1-pl.col(c)).otherwise(c).alias(c) for c in (*COLUMNS, 'prob_biopsy', 'prob_mag')])
    assert fit(other, features).info == model.info
    assert fit(cohort.filter(~held), features).info == model.info


def test_training_rows_grow_the_trees_and_validation_rows_weigh(cohort, features, model):
    valid, train = (pl.col('split') == k for k in ('valid', 'train'))
    flipped = fit(cohort.with_columns(pl.when(valid).then(1-pl.col(c)).otherwise(c).alias(c) for c in COLUMNS), features)
    assert all(flipped[n]['trees'] == model[n]['trees'] and flipped[n]['weights'] != model[n]['weights'] for n in NAMES)
    noise = fit(cohort.with_columns(pl.when(train).then(.5).otherwise('prob_mag').alias('prob_mag')), features)
    assert noise.info == model.info, 'the pixel model has seen the training rows; its answers there say nothing'


def test_a_patient_in_two_splits_stops_it(cohort, features):
    bad = cohort.with_columns(patient_id=pl.when(pl.col('patient_id') == 'p12').then(pl.lit('p0')).otherwise('patient_id'))
    assert bad.filter(patient_id='p0')['split'].n_unique() > 1
    with pytest.raises(MammoError, match='two splits'): H.fit_header_model(bad, features, S)


def test_labels_of_headers_are_left_out(cohort, features, model):
    "what only a header has labelled teaches nothing, nor does a single answer that a header filled in"
    weak, filled = pl.col('site') == 'n', (pl.col('site') == 'w') & (pl.col('split') == 'train')
    marked = cohort.with_columns(weak=weak, weight_biopsy=pl.lit(1.), weight_mag=pl.when(filled).then(.9).otherwise(1.))
    people = cohort.filter(~weak).with_columns(has_mag_view=pl.when(filled).then(float('nan')).otherwise('has_mag_view'))
    assert H.people_only(marked, S).select(people.columns).equals(people)
    lies = marked.with_columns(has_biopsy_tool=pl.when(weak).then(1-pl.col('has_biopsy_tool')).otherwise('has_biopsy_tool'),
                               has_mag_view=pl.when(weak | filled).then(1-pl.col('has_mag_view')).otherwise('has_mag_view'))
    assert fit(lies, features).info == fit(people, features).info != model.info


def test_too_few_labels(cohort, features):
    few = H.fit_header_model(cohort.head(24), features, S)
    p = np.array([[.2, .7], [.9, .1]])
    assert all(few[n]['trees'] is None and few[n]['weights'] == H.ALONE for n in NAMES) and 'too few' in repr(few)
    assert np.array_equal(few.combine(p, few.predict(features.head(2))), p), 'the pixels as they are'


@pytest.mark.parametrize('what', ['no validation', 'one class', 'one patient', 'one site', 'no site', 'nothing', 'all train', 'no headers'])
def test_nothing_odd_about_the_labels_stops_a_round(cohort, features, what):
    d, x = cohort, features
    if what == 'no validation': d = d.filter(pl.col('split') != 'valid')
    elif what == 'one class': d = d.with_columns(has_mag_view=pl.lit(0.), has_biopsy_tool=pl.lit(1.))
    elif what == 'one patient': d = d.head(4)
    elif what == 'one site': d = d.filter(site='w')
    elif what == 'no site': d = d.drop('site')
    elif what == 'nothing': d = d.head(0)
    elif what == 'all train': d = d.with_columns(split=pl.lit('train'))
    else: x = H.header_features(d.select('image_id', 'study_id'))
    m = fit(d, x) if what not in ('one site', 'no site') else H.fit_header_model(d, x, S)
    p = m.combine(np.full((x.height, 2), .3), m.predict(x))
    assert p.shape == (x.height, 2) and np.isfinite(p).all() and ((p >= 0) & (p <= 1)).all()
    if 'site' in what: assert m['mag']['groups'] == ['rule']
    if what in ('no validation', 'all train', 'nothing', 'one class', 'one patient'): assert np.allclose(p, .3)


def test_unanswered_findings_are_left_out(cohort, features, model):
    gaps = cohort.with_columns(has_mag_view=pl.when(pl.int_range(pl.len()) % 3 == 0).then(float('nan')).otherwise('has_mag_view'))
    other = fit(gaps, features)
    assert other['biopsy'] == model['biopsy'] and other['mag']['trees'] and other['mag'] != model['mag']


# --- the weights

def test_weights_are_never_negative_and_shrink_to_the_pixels():
    rng = np.random.default_rng(0)
    y, who = (rng.random(400) < .4).astype(float), np.arange(400)//2
    good, bad = expit(2*(2*y-1) + rng.normal(size=400)), expit(-3*(2*y-1) + rng.normal(size=400))
    assert H.fit_stack(y, good, bad, who)[1] == 0 and H.fit_stack(y, good, bad, who)[0] > .5
    w = H.fit_stack(y, np.full(400, .4), good, who)
    assert w[1] > .5 and abs(w[0]-1) < .2, 'pixels that say nothing keep their weight, which then does nothing'
    assert H.fit_stack(y[:12], good[:12], good[:12], who[:12]) == H.ALONE
    gone = np.r_[y, np.full(50, np.nan)]
    assert np.allclose(H.fit_stack(gone, np.r_[good, bad[:50]], np.r_[good, bad[:50]], np.arange(450)//2), H.fit_stack(y, good, good, who), atol=1e-6)


def test_extreme_probabilities_stay_finite():
    p = H.stacked([1., 2., .3], [0., 1., .5], [1., 0., .5])
    assert np.isfinite(p).all() and ((p > 0) & (p < 1)).all()


# --- the file

def test_saved_and_loaded(tmp_path, model, features):
    model.save(tmp_path/'header_model.json')
    again = H.load_header_model(tmp_path/'header_model.json')
    assert np.array_equal(again.predict(features), model.predict(features)) and again.choices('combined') == model.choices('combined')
    text = (tmp_path/'header_model.json').read_text()
    json.loads(text, parse_constant=lambda c: pytest.fail(f'{c} is no JSON'))
    assert len(text) < 600_000


def test_a_changed_file_is_refused(tmp_path, model):
    path = tmp_path/'header_model.json'
    model.save(path)
    whole = path.read_bytes()
    for k in (10, len(whole)//2, len(whole)-20):
        path.write_bytes(whole[:k]+bytes([whole[k] ^ 1])+whole[k+1:])
        with pytest.raises(MammoError): H.load_header_model(path)
    path.write_bytes(whole[:len(whole)//2])
    with pytest.raises(MammoError): H.load_header_model(path)
    with pytest.raises(MammoError, match='no such file'): H.load_header_model(tmp_path/'none.json')


def test_files_of_other_versions_are_refused(tmp_path, model):
    write_sealed(tmp_path/'a.json', model.info | dict(format=99))
    with pytest.raises(MammoError, match='format 99'): H.load_header_model(tmp_path/'a.json')
    info = json.loads(json.dumps(model.info))
    info['findings']['mag']['features'][0] = 'rule that was dropped'
    write_sealed(tmp_path/'b.json', info)
    with pytest.raises(MammoError, match='rule that was dropped'): H.load_header_model(tmp_path/'b.json')


# --- three sources

def predictions(cohort):
    p = cohort.select('image_id', 'study_id', 'status', *(f'prob_{n}' for n in NAMES))
    twin = p.head(1).with_columns(status=pl.lit('duplicate'), prob_biopsy=pl.lit(None, pl.Float64), prob_mag=pl.lit(None, pl.Float64))
    lost = p[5:6].with_columns(image_id=pl.lit('f'*16), status=pl.lit('rejected'), prob_biopsy=pl.lit(None, pl.Float64), prob_mag=pl.lit(None, pl.Float64))
    alone = lost.with_columns(image_id=pl.lit('e'*16), study_id=pl.lit('unreadable'))
    return pl.concat([p, twin, lost, alone])


def judged(cohort, model, combine):
    p = H.deciding(H.with_sources(predictions(cohort), cohort, model), combine)
    flags = [(model[n]['combined']['flag'] if combine else .5) for n in NAMES]
    st = p.group_by('study_id', maintain_order=True).agg((pl.col(f'prob_{n}').max() >= t).alias(c) for n, c, t in zip(NAMES, COLUMNS, flags))
    return H.study_sources(st, H.with_sources(predictions(cohort), cohort, model), S, model, [.5, .5], combine)


def test_every_row_stays_and_only_readable_ones_get_an_answer(cohort, model):
    p = predictions(cohort)
    out = H.with_sources(p, cohort, model)
    assert out.select(p.columns).equals(p)
    ok = out.filter(pl.col('status') == 'ok')
    for n in NAMES:
        assert ok[f'header_prob_{n}'].null_count() == ok[f'combined_prob_{n}'].null_count() == 0
        assert out.filter(pl.col('status') != 'ok').select(f'header_prob_{n}', f'combined_prob_{n}', f'header_spoke_{n}').null_count().row(0) == (3, 3, 3)


def test_predictions_in_any_order(cohort, model):
    p = predictions(cohort)
    mixed = p.sample(fraction=1., shuffle=True, seed=3)
    back = H.with_sources(mixed, cohort.sample(fraction=1., shuffle=True, seed=4), model).sort('image_id', 'status')
    assert back.equals(H.with_sources(p, cohort, model).sort('image_id', 'status'))


def test_a_bundle_without_header_model(cohort):
    out = H.with_sources(predictions(cohort), cohort, None)
    assert out['combined_prob_mag'].equals(out['prob_mag'].cast(pl.Float64), check_names=False) and out['header_prob_mag'].null_count() == out.height
    st = out.group_by('study_id', maintain_order=True).agg((pl.col(f'prob_{n}').max() >= .5).alias(c) for n, c in zip(NAMES, COLUMNS))
    st = H.study_sources(st, out, S, None, [.5, .5], True)
    assert set(st['decided_mag'].drop_nulls()) == {'pixels'}


def test_who_decided(cohort, model):
    "the answer always agrees with the source that is named; pixels alone decide by default, and where no rule spoke"
    no, yes = judged(cohort, model, False), judged(cohort, model, True)
    assert set(no['decided_mag'].drop_nulls()) == {'pixels'} and no.filter(study_id='unreadable')['decided_mag'][0] is None
    assert list(no.columns)[-8:] == [f'{k}_{n}' for n in NAMES for k in ('pixel_prob', 'header_prob', 'combined_prob')] + ['decided_biopsy', 'decided_mag']
    spoke = H.with_sources(predictions(cohort), cohort, model).group_by('study_id').agg(pl.col('header_spoke_mag').any())
    d = yes.join(spoke, on='study_id').drop_nulls('has_mag_view')
    px, hd = d['pixel_prob_mag'] >= .5, d['header_prob_mag'] >= model['mag']['header']['flag']
    who, said = d['decided_mag'], d['has_mag_view']
    assert (who.filter(~d['header_spoke_mag'].fill_null(False)) == 'pixels').all() and {'both', 'header', 'pixels'} <= set(who)
    assert (said == hd).filter(who == 'header').all() and (px != hd).filter(who == 'header').all()
    assert (px == hd).filter(who == 'both').all()


# --- in a bundle, and in inference

@pytest.fixture(scope='module')
def bundle(cohort, tmp_path_factory):
    "what `Bundle.load` gives of a round's folder, as far as the header model looks at it"
    folder = tmp_path_factory.mktemp('rounds')/'001'
    folder.mkdir()
    kept = H.write_header_model(folder, cohort, cohort, S)
    write_bundle_json(folder, dict(id='toy', header_model=kept))
    return SimpleNamespace(path=folder, info=read_bundle_json(folder), id='toy', thresholds=[.5, .5], choices={n: dict(flag=.5) for n in NAMES})


def combining(yes): return S.model_copy(update=dict(headers=S.headers.model_copy(update=dict(combine=yes))))


def csv(studies, folder):
    write_csv(studies, folder/'studies.csv', S)
    return (folder/'studies.csv').read_text()


def test_the_table_of_studies_keeps_its_columns_and_its_meaning(cohort, bundle, tmp_path):
    "by default studies.csv is what it is without any header; with combine = yes the columns are the same, and the answers those of both"
    p = predictions(cohort)
    assert S.headers.combine is False
    out, studies = H.judge(p, cohort, bundle, S, aggregate)
    plain = csv(aggregate(p, S, bundle.choices), tmp_path)
    assert csv(studies, tmp_path) == plain and out.select(p.columns).equals(p) and studies['study_id'].is_sorted()
    out2, both = H.judge(p, cohort, bundle, combining(True), aggregate)
    assert out2.equals(out), 'the predictions say what each source says, whoever decides'
    text = csv(both, tmp_path)
    assert text != plain and text.splitlines()[0] == plain.splitlines()[0] and text.count('\n') == plain.count('\n')
    model = H.load_header_model(bundle.path/H.FILE)
    for n, c in zip(NAMES, COLUMNS):
        assert both[f'max_prob_{n}'].equals(both[f'combined_prob_{n}'], check_names=False)
        assert both[f'pixel_prob_{n}'].equals(studies[f'max_prob_{n}'].cast(pl.Float64), check_names=False)
        assert (both[c] == (both[f'combined_prob_{n}'] >= model[n]['combined']['flag'])).all()
    assert both.filter(study_id='unreadable').select(*COLUMNS, 'combined_prob_mag', 'decided_mag').row(0) == (None, None, None, None)


def test_a_bundle_without_header_model_cannot_combine(cohort, bundle):
    old = SimpleNamespace(**vars(bundle) | dict(info=None))
    out, studies = H.judge(predictions(cohort), cohort, old, S, aggregate)
    assert studies['header_prob_mag'].null_count() == studies.height
    with pytest.raises(MammoError, match='combine = yes, but the model toy has no header model'): H.header_model_of(old, combining(True))


def test_a_single_file_finds_the_header_model_beside_it(bundle):
    lone = SimpleNamespace(**vars(bundle) | dict(path=bundle.path/'model.onnx'))
    assert H.header_model_of(lone, S).info == H.header_model_of(bundle, S).info


def test_a_header_model_from_elsewhere_is_refused(bundle, model, tmp_path):
    folder = tmp_path/'001'
    shutil.copytree(bundle.path, folder)
    model.save(folder/H.FILE)   # whole in itself, and not the one that the bundle lists
    with pytest.raises(MammoError, match='changed since its bundle was made'): H.header_model_of(SimpleNamespace(**vars(bundle) | dict(path=folder)), S)
    (folder/H.FILE).unlink()
    with pytest.raises(MammoError, match='no such file'): H.header_model_of(SimpleNamespace(**vars(bundle) | dict(path=folder)), S)


def test_a_round_writes_it_and_inference_asks_it(tmp_path, one_thread):
    s = tiny_settings()
    folder, manifest, truth = toy_cohort(tmp_path/'toy', s, patients=60, per=3)
    says = pl.when(truth['has_mag_view'] == 1).then(pl.lit('magnification')).otherwise(pl.lit('contact'))
    manifest = manifest.with_columns(header_rules=says, **{c: pl.lit(0, pl.Int64) for c in SEEN_AS if c != 'path'})
    write_parquet(manifest, folder/'manifest.parquet', s)
    b = Bundle.load(train_round(folder, s, int8=False, tell=lambda _: None), provider='cpu')
    kept = b.info['header_model']
    assert H.FILE in b.info['files'] and kept['mag']['groups'] == ['rule'] and kept['mag']['weights'][1] > 0
    rng = np.random.default_rng(0)
    probs = manifest.select('image_id', failed=pl.lit(None, pl.String), **{f'prob_{n}': pl.Series(rng.random(manifest.height), dtype=pl.Float32) for n in s.names})
    model = SimpleNamespace(**{k: getattr(b, k) for k in ('path', 'info', 'id', 'thresholds', 'choices', 'precision', 'meta')}, reference=None)
    for yes in (False, True):
        out = tmp_path/str(yes)
        out.mkdir()
        _, studies, _ = infer._written(manifest, probs, model, out, s.model_copy(update=dict(headers=s.headers.model_copy(update=dict(combine=yes)))), '')
        assert (out/'studies.csv').read_text().splitlines()[0] == 'study_id,has_biopsy_tool,has_mag_view,max_prob_biopsy,max_prob_mag,image_count'
        assert set(studies.columns) >= {f'{k}_prob_{n}' for k in H.SOURCES for n in s.names} | {f'decided_{n}' for n in s.names}
        assert studies['max_prob_mag'].cast(pl.Float32).equals(studies['combined_prob_mag' if yes else 'pixel_prob_mag'].cast(pl.Float32), check_names=False)
        assert set(studies['decided_mag']) == ({'pixels'} if not yes else set(studies['decided_mag']) | {'both'})


# --- a hospital nobody has seen

def labelled(c): return c.select('image_id', 'study_id', 'patient_id', 'site', 'split', *COLUMNS)


def pixels(c):
    at = c.select('image_id', *(f'prob_{n}' for n in NAMES))
    return lambda rest, rows: rows.select('image_id').join(at, on='image_id', how='left', maintain_order='left').drop('image_id').to_numpy()


everything = lambda f, s: (f.filter(pl.col('site') == s), 'random')


def test_the_labels_of_a_left_out_hospital_are_not_used():
    "flipping them changes no probability at that hospital, with the choice of features and all"
    cohort = hospitals(150, says=(.7, .6, .5), share=(.5, .3, .4))
    other = cohort.with_columns(pl.when(pl.col('site') == 'w').then(1-pl.col(c)).otherwise(c).alias(c) for c in COLUMNS)
    a, b = (H.sources_at_new_sites(labelled(c), c, S, pixels(cohort), everything).filter(site='w') for c in (cohort, other))
    assert a.select('pixel', 'header', 'combined').equals(b.select('pixel', 'header', 'combined')) and not a['y'].equals(b['y'])


def test_what_the_pixel_model_is_handed(cohort):
    "never a row of the hospital, nor the hold-out, nor a patient who is known at both"
    both = cohort.with_columns(site=pl.when((pl.col('patient_id') == 'p0') & (pl.int_range(pl.len()) % 2 == 0)).then(pl.lit('w')).otherwise('site'))
    handed = {}
    def spy(rest, rows):
        site = set('nwse')-set(rest['site'])
        handed[site.pop()] = rest
        return pixels(cohort)(rest, rows)
    H.sources_at_new_sites(labelled(both), both, S, spy, groups=SOME)
    assert set(handed) == set('nwse')
    for site, rest in handed.items():
        assert site not in rest['site'] and 'hold_out' not in rest['split']
        assert not set(rest['patient_id']) & set(both.filter(site=site)['patient_id'])


def test_both_together_are_at_least_as_good_at_a_new_hospital():
    "mean AUROC over left-out hospitals, combined less the better single source, on made-up archives; tests/benchmarks/header_model.py asks phantoms"
    gains = {n: [] for n in NAMES}
    for seed in range(3):
        c = hospitals(240, seed=seed, says=(1., .6, 0., .5), share=(.5, .4, .5, .4))
        t = H.source_scores(H.sources_at_new_sites(labelled(c), c, S, pixels(c), everything, SOME), n=50).filter(site='mean')
        for f, g in t.select('finding', 'gain').iter_rows(): gains[f].append(g)
    assert all(np.mean(g) > 0 and min(g) > -.005 for g in gains.values()), gains


def test_scores_against_scikit_learn(cohort):
    from sklearn.metrics import roc_auc_score
    rows = H.sources_at_new_sites(labelled(cohort), cohort, S, pixels(cohort), everything, SOME)
    t = H.source_scores(rows, n=50)
    for site in 'nwse':
        d = rows.filter(site=site, finding='mag')
        r = t.filter(site=site, finding='mag').row(0, named=True)
        assert all(abs(r[k]-roc_auc_score(d['y'], d[k])) < 1e-4 for k in H.SOURCES) and abs(r['gain']-(r['combined']-max(r['pixel'], r['header']))) < 2e-4
        assert r['combined_low'] <= r['combined'] <= r['combined_high']
    mean, each = t.filter(site='mean', finding='mag'), t.filter(pl.col('site') != 'mean', finding='mag')
    assert abs(mean['pixel'][0]-each['pixel'].mean()) < 1e-3
    swapped = H.source_scores(rows.with_columns(pixel='header', header='pixel'), n=20)
    assert np.allclose(swapped['gain'], t['gain'], atol=2e-4), 'the better single source, whichever it is'
    one = rows.with_columns(y=pl.when(pl.col('site') == 'n').then(0.).otherwise('y'))
    assert 'n' not in H.source_scores(one, n=20)['site'], 'a hospital without positives has no AUROC'


def test_the_card_says_what_the_header_adds(bundle):
    from mammo_nb.learn.card import _header
    info = bundle.info | dict(findings=NAMES, titles=[f'Finding {n}' for n in NAMES])
    text = '\n'.join(_header(info))
    for n in NAMES:
        kept = info['header_model'][n]
        assert f'| Finding {n} |' in text and kept['note'] in text
        if kept['hold_out']: assert f"{kept['hold_out']['header'][0]:.3f} (" in text
    assert any(info['header_model'][n]['hold_out'] for n in NAMES)
    assert _header(info | dict(header_model={n: dict(groups=[], weights=[1, 0, 0], note='too few labels', hold_out={}) for n in NAMES})) == []
    assert _header({k: v for k, v in info.items() if k != 'header_model'}) == [], 'a bundle made before there was one'
