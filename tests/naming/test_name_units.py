"""Names of planted units and of noise; the file in the store; refused arguments."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import convscope
import tests.oracles.stores as stores
from convscope.errors import ConvscopeError
from convscope.naming import assignment
from convscope.store.unit_names import NAMES_FILE

IMAGES, WORDS, NOISE = 300, 12, 40
NAMES = [f"word {w}" for w in range(WORDS)]


def planted(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Return scores (N, W), and activations of noisy detectors of the words, of noise, and of two constant units."""
    rng = np.random.default_rng(seed)
    scores = (rng.random((IMAGES, WORDS)) < rng.uniform(0.05, 0.3, WORDS)).astype(np.float32)
    detectors = np.maximum(2 * scores.T + rng.normal(0, 0.7, (WORDS, IMAGES)), 0)
    noise = rng.normal(size=(NOISE, IMAGES))
    noise[: NOISE // 2] = np.maximum(noise[: NOISE // 2] - 1, 0)
    constant = np.repeat([[0.0], [3.0]], IMAGES, 1)
    return scores, np.concatenate([detectors, noise, constant])


@pytest.fixture(scope="module")
def scores() -> np.ndarray:
    return planted()[0]


@pytest.fixture
def store(tmp_path) -> convscope.Store:
    _, values = planted()
    stores.write_maxima_store(tmp_path / "store", {"first": values, "second": values[::-1]}, failed=[7])
    return convscope.open_store(tmp_path / "store")


def test_detectors_get_their_names_and_noise_gets_none(store, scores):
    names = convscope.name_units(store, NAMES, scores, layer="first")
    assert names.names[:WORDS].tolist() == NAMES
    assert names.named[:WORDS].all()
    assert not names.named[WORDS:].any()
    assert (names.scores[:WORDS] > 0.9).all()
    assert (names.runner_up[:WORDS] != names.names[:WORDS]).all()
    assert names.names[-2:].tolist() == ["", ""]
    assert np.isnan(names.scores[-2:]).all()
    assert names.get("first", 3) == "word 3"
    assert names.get("first", WORDS) is None
    assert names.get("second", 3) is None
    assert set(names.layer.tolist()) == {"first"}


def test_a_rare_word_is_not_outvoted_by_a_common_weak_one(tmp_path):
    """A class has 6 of the 160 images of a half; among more top images, a word that suits them a little would win."""
    rng = np.random.default_rng(0)
    scores = rng.random((320, 3)) * 0.01
    order = np.concatenate(assignment.split_images(np.arange(320)))
    halves = [order[:160], order[160:]]
    activations = rng.random((1, 320)) * 0.1
    for half in halves:
        scores[half[:6], 0], scores[half[:6], 1] = 0.9, 0.3  # the class, and what is like it
        scores[half[6:60], 1] = 0.3
        activations[0, half[:6]], activations[0, half[6:60]] = 2, 1
    stores.write_maxima_store(tmp_path / "rare", {"first": activations})
    names = convscope.name_units(tmp_path / "rare", ["rare", "common", "other"], scores, output="probability")
    assert names.names.tolist() == ["rare"]


def test_names_do_not_depend_on_other_units(store, scores):
    first = convscope.name_units(store, NAMES, scores, layer="first", save=False)
    both = convscope.name_units(store, NAMES, scores, save=False)
    count = len(first)
    for name in ("names", "scores", "runner_up", "wpmi", "p_values"):
        np.testing.assert_array_equal(getattr(both, name)[:count], getattr(first, name))
        np.testing.assert_array_equal(getattr(both, name)[count:], getattr(first, name)[::-1])


def test_scores_are_those_of_images_that_did_not_serve_the_choice(store, scores):
    names = convscope.name_units(store, NAMES, scores, layer="first", save=False)
    usable = np.setdiff1d(np.arange(IMAGES), [7])
    first, second = assignment.split_images(usable)
    assert sorted([*first, *second]) == list(range(IMAGES - 1))
    assert abs(len(first) - len(second)) == 1
    held_out = usable[second]
    changed = scores.copy()
    changed[held_out] = np.random.default_rng(9).random((len(held_out), WORDS)) < 0.3
    others = convscope.name_units(store, NAMES, changed, layer="first", save=False)
    np.testing.assert_array_equal(names.names, others.names)
    np.testing.assert_array_equal(names.wpmi, others.wpmi)
    assert not others.named.any()


def test_blocks_do_not_matter(store, scores, monkeypatch):
    expected = convscope.name_units(store, NAMES, scores, save=False)
    monkeypatch.setattr(assignment, "WORDS_PER_BLOCK", 5)
    monkeypatch.setattr(assignment, "UNITS_PER_BLOCK", 7)
    result = convscope.name_units(store, NAMES, scores, save=False)
    for name in ("names", "runner_up", "named"):
        np.testing.assert_array_equal(getattr(result, name), getattr(expected, name))
    np.testing.assert_allclose(result.wpmi, expected.wpmi, rtol=1e-5)
    np.testing.assert_allclose(result.scores, expected.scores, rtol=1e-6)


def test_logits_of_words_are_turned_into_probabilities(store, scores):
    logits = np.where(scores > 0, 6.0, -6.0) + np.arange(IMAGES)[:, None]  # a softmax ignores what a row shares
    by_softmax = convscope.name_units(store, NAMES, logits, layer="first", save=False)
    shares = np.exp(logits - logits.max(1, keepdims=True))
    shares /= shares.sum(1, keepdims=True)
    expected = convscope.name_units(store, NAMES, shares, layer="first", save=False)
    np.testing.assert_array_equal(by_softmax.names, expected.names)
    np.testing.assert_allclose(by_softmax.wpmi, expected.wpmi, rtol=1e-3)
    sigmoid = convscope.name_units(
        store, NAMES, np.where(scores > 0, 9.0, -9.0), layer="first", output="sigmoid", save=False
    )
    assert sigmoid.names[:WORDS].tolist() == NAMES


def test_a_row_for_each_image_of_the_sample_or_of_the_data(tmp_path):
    rng = np.random.default_rng(0)
    maxima = stores.write_small_store(tmp_path / "store", units=(6,), images=60)  # the sample is every second image
    store = convscope.open_store(tmp_path / "store")
    assert store.image_names == [f"folder/{i:05d}.png" for i in range(60)]
    scores = (maxima[0].T[:, :3] > np.median(maxima[0][:3], 1)) * 0.9 + 0.05 * rng.random((60, 3))
    whole = convscope.name_units(store, ["a", "b", "c"], scores, save=False)
    sample = convscope.name_units(store, ["a", "b", "c"], scores[::2], save=False)
    np.testing.assert_array_equal(whole.wpmi, sample.wpmi)
    assert whole.names[:3].tolist() == ["a", "b", "c"]


def test_labels_of_the_data_set_are_words(tmp_path):
    labels = np.arange(120) % 4
    values = np.eye(4)[labels].T + np.random.default_rng(0).normal(0, 0.1, (4, 120))
    stores.write_maxima_store(tmp_path / "store", {"layer": values}, labels=labels)
    names = convscope.name_units(tmp_path / "store", "labels", save=False)
    assert names.names.tolist() == [f"label {c}" for c in range(4)]
    assert names.named.all()
    assert names.judge == "labels of the data set"


# --- the file in the store -------------------------------------------------------------------------------------------


def test_names_stand_in_the_store_and_others_replace_them(store, scores, tmp_path):
    assert store.names() is None
    names = convscope.name_units(store, NAMES, scores)
    for stored in (store.names(), convscope.open_store(store.address).names()):
        assert str(stored) == str(names)
        for name, array in names.arrays().items():
            np.testing.assert_array_equal(getattr(stored, name), array)
    content = (Path(store.address) / NAMES_FILE).read_bytes()
    convscope.name_units(store, NAMES, scores)
    assert (Path(store.address) / NAMES_FILE).read_bytes() == content
    convscope.name_units(store, [name.upper() for name in NAMES], scores, layer="second")
    assert store.names().get("first", 3) is None
    assert store.names().get("second", len(names) // 2 - 4) == "WORD 3"
    opened = convscope.open(names.save(tmp_path / "saved"))
    assert str(opened) == str(names)
    np.testing.assert_array_equal(opened.p_values, names.p_values)


def test_names_of_an_earlier_scan_do_not_count(store, scores, tmp_path):
    convscope.name_units(store, NAMES, scores)
    content = (Path(store.address) / NAMES_FILE).read_bytes()
    _, values = planted(1)
    stores.write_maxima_store(tmp_path / "other", {"first": values, "second": values})
    (tmp_path / "other" / NAMES_FILE).write_bytes(content)
    assert convscope.open_store(tmp_path / "other").names() is None


def test_a_damaged_file_is_refused(store):
    (Path(store.address) / NAMES_FILE).write_bytes(b"PAR1 damaged")
    with pytest.raises(ConvscopeError, match=NAMES_FILE):
        store.names()


def test_an_exception_in_progress_leaves_nothing_behind(store, scores):
    def cancel(_done: float, _total: int) -> None:
        raise KeyboardInterrupt

    before = sorted(Path(store.address).iterdir())
    with pytest.raises(KeyboardInterrupt):
        convscope.name_units(store, NAMES, scores, progress=cancel)
    assert sorted(Path(store.address).iterdir()) == before


# --- refused arguments -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scores": None}, "scores= is missing"),
        ({"scores": np.zeros((IMAGES, 3))}, "3 columns; expected one for each of the 12 words"),
        ({"scores": np.zeros((5, WORDS))}, "5 rows; expected one for each of the 300 images"),
        ({"scores": np.full((IMAGES, WORDS), np.nan)}, "scores has nan for word 0"),
        ({"scores": np.zeros(IMAGES)}, "expected numbers"),
        ({"scores": np.full((IMAGES, WORDS), 2.0), "output": "probability"}, "output='softmax'"),
        ({"output": "logits"}, "output is 'logits'"),
        ({"words": ["one"]}, "two or more"),
        ({"words": ["a"] * WORDS}, "'a' more than once"),
        ({"words": [*NAMES[:-1], " "]}, "expected texts"),
        ({"words": "label"}, "neither a vocabulary nor a text file"),
        ({"words": "labels"}, "leave out scores= and judge="),
        ({"words": "labels", "scores": None}, "without labels"),
        ({"layer": "fist"}, "'fist' is not in this store"),
        ({"layer": []}, "layer is empty"),
        ({"level": 1.5}, "level is 1.5"),
        ({"shuffles": 0}, "shuffles is 0"),
    ],
)
def test_bad_arguments_are_refused_before_work_starts(store, scores, change, message):
    def no_work(_done: float, _total: int) -> None:
        pytest.fail("work has started")

    arguments = {"words": NAMES, "scores": scores, "progress": no_work, **change}
    with pytest.raises(ConvscopeError, match=message):
        convscope.name_units(store, **arguments)
    assert store.names() is None


def test_small_samples_are_refused(tmp_path):
    stores.write_small_store(tmp_path / "store", units=(3,), images=30)
    with pytest.raises(ConvscopeError, match="15 images; names need 20 or more"):
        convscope.name_units(tmp_path / "store", ["a", "b"], np.zeros((30, 2)))


# --- compositions ----------------------------------------------------------------------------------------------------


def test_compositions_name_planted_ones_and_leave_single_words(tmp_path):
    rng = np.random.default_rng(0)
    scores = (rng.random((600, 6)) < 0.3).astype(np.float32)
    a, b = scores[:, 0] > 0, scores[:, 1] > 0
    truth = np.stack([a & b, a | b, a & ~b, a, scores[:, 2] > 0, *np.zeros((20, 600), bool)])
    stores.write_maxima_store(tmp_path / "store", {"layer": 3 * truth + rng.normal(0, 0.5, truth.shape)})
    names = convscope.name_units(tmp_path / "store", list("abcdef"), scores, compositions=True, save=False)
    assert set(names.names[0].split(" and ")) == {"a", "b"}
    assert set(names.names[1].split(" or ")) == {"a", "b"}
    assert names.names[2:5].tolist() == ["a and not b", "a", "c"]
    assert names.named.tolist() == [True] * 5 + [False] * 20
    single = convscope.name_units(tmp_path / "store", list("abcdef"), scores, save=False)
    composed = [0, 1, 2]
    np.testing.assert_array_equal(names.runner_up[composed], single.names[composed])
    np.testing.assert_array_equal(names.runner_up_scores[composed], single.scores[composed])
    assert (names.scores[composed] > single.scores[composed] + 0.05).all()
    np.testing.assert_array_equal(names.scores[3:5], single.scores[3:5])
