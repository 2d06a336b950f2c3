"""Filters: the samples that pass are those that meet the conditions one by one, and the others are
counted by reason.
"""

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from pipeline.config import ConfigError, build
from pipeline.data.filters import FilterConfig, matcher, select
from pipeline.data.index import Index, index_path, read_index, write_index
from pipeline.data.source import Sources
from tests.helpers.tars import jpeg, sample, tar

SIZES = [(8, 8), (16, 8), (40, 8), (20, 30), (64, 64)]
SCORES = [0.1, 0.9, None, "high", 0.5, True]
CAPTIONS = ["", "a", "a dog", "a dog on a roof"]


def properties(seed: int) -> dict[str, Any]:
    """Random properties of a sample."""
    rng = np.random.default_rng(seed)
    meta: dict[str, Any] = {
        "language": str(rng.choice(["en", "de"])),
        "alt": [str(rng.choice(["", "other"]))],
    }
    score = SCORES[rng.integers(len(SCORES))]
    if score is not None:
        meta["score"] = score
    return {
        "size": SIZES[rng.integers(len(SIZES))],
        "caption": CAPTIONS[rng.integers(len(CAPTIONS))],
        "meta": meta,
    }


ALL = [properties(seed) for seed in range(60)]


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Index:
    path = tmp_path_factory.mktemp("select") / "0.tar"
    members = []
    for row, properties in enumerate(ALL):
        members += sample(
            f"{row:03}",
            jpg=jpeg(*properties["size"]),
            txt=properties["caption"].encode(),
            json=json.dumps(properties["meta"]).encode(),
        )
    path.write_bytes(tar(members))
    write_index(Sources(), str(path), index_path(str(path), None))
    index = read_index(index_path(str(path), None), str(path))
    assert index
    return index


def is_number_in(low: float, high: float) -> Callable[[Any], bool]:
    return lambda value: type(value) in (int, float) and low <= value <= high


# Name: the configuration, and the condition on the properties of a sample.
FILTERS: dict[str, tuple[dict[str, Any], Callable[[dict[str, Any]], bool]]] = {
    "none": ({}, lambda f: True),
    "size": ({"min_size": 16}, lambda f: min(f["size"]) >= 16),
    "aspect": ({"max_aspect": 2}, lambda f: max(f["size"]) <= 2 * min(f["size"])),
    "short": ({"min_caption": 4}, lambda f: len(f["caption"]) >= 4),
    "long": ({"max_caption": 5}, lambda f: len(f["caption"]) <= 5),
    "range": (
        {"fields": {"score": {"min": 0.5}}},
        lambda f: is_number_in(0.5, 9)(f["meta"].get("score")),
    ),
    "both": (
        {"fields": {"score": {"min": 0.2, "max": 0.6}}},
        lambda f: is_number_in(0.2, 0.6)(f["meta"].get("score")),
    ),
    "value": ({"fields": {"language": "en"}}, lambda f: f["meta"]["language"] == "en"),
    "boolean": ({"fields": {"score": True}}, lambda f: f["meta"].get("score") is True),
    "one of": (
        {"fields": {"score": ["high", 0.9]}},
        lambda f: f["meta"].get("score") in ("high", 0.9),
    ),
    "all": (
        {
            "min_size": 8,
            "max_aspect": 2,
            "min_caption": 2,
            "fields": {"language": "de", "score": {"max": 1}},
        },
        lambda f: (
            max(f["size"]) <= 2 * min(f["size"])
            and len(f["caption"]) > 1
            and f["meta"]["language"] == "de"
            and is_number_in(-9, 1)(f["meta"].get("score"))
        ),
    ),
}


@pytest.mark.parametrize("kind", FILTERS)
def test_the_samples_that_meet_the_conditions_pass(kind: str, index: Index) -> None:
    raw, passes = FILTERS[kind]
    rows, removed = select(index, build(FilterConfig, raw), {"txt": 1.0})
    assert rows.tolist() == [
        row for row, sample in enumerate(ALL) if sample["caption"] and passes(sample)
    ]
    assert len(rows) + sum(removed.values()) == len(ALL)
    assert all(removed.values())


def test_a_removed_sample_counts_for_the_first_filter_that_removes_it(index: Index) -> None:
    config = build(FilterConfig, {"min_size": 16, "fields": {"language": "en"}})
    _, removed = select(index, config, {"txt": 1.0})

    large = [sample for sample in ALL if min(sample["size"]) >= 16]
    captioned = [sample for sample in large if sample["caption"]]
    german = [sample for sample in captioned if sample["meta"]["language"] == "de"]
    assert removed == {
        "shorter side under 16 px": len(ALL) - len(large),
        "no caption": len(large) - len(captioned),
        "language not en": len(german),
    }


def test_a_caption_in_any_field_is_enough(index: Index) -> None:
    for weights, has_caption in (
        ({"alt": 1.0}, lambda f: f["meta"]["alt"][0]),
        ({"txt": 1.0, "alt": 0.5}, lambda f: f["caption"] or f["meta"]["alt"][0]),
        ({"absent": 1.0}, lambda f: False),
    ):
        rows, _ = select(index, FilterConfig(), weights)
        assert rows.tolist() == [row for row, sample in enumerate(ALL) if has_caption(sample)]


def test_values_match_with_their_type() -> None:
    assert matcher({"min": 1, "max": 1})(1)
    assert not matcher({"min": 0})(True)
    assert not matcher({"min": 0})("1")
    assert not matcher({"min": 0})(float("nan"))
    assert not matcher(True)(1)
    assert not matcher(["en"])(None)
    assert matcher(["de", "en"])("en")


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({"max_aspect": 0.5}, "max_aspect: 0.5 is less than 1"),
        ({"min_caption": 9, "max_caption": 3}, "max_caption: 3 is less than min_caption, 9"),
        (
            {"fields": {"score": {"above": 3}}},
            "fields.score: .* write {min: 0.3}, {max: 1} or both",
        ),
        ({"fields": {"score": {}}}, "fields.score: {} is no range"),
    ],
)
def test_invalid_filters(raw: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(FilterConfig, raw)
