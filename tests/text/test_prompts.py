"""What a sample is told: its class, by name or number, from KEY.cls or a field of KEY.json; or
nothing.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.config import ConfigError, build
from pipeline.data.shards import DataConfig, Shards
from pipeline.errors import UserError
from pipeline.text.prompts import ClassConfig, ClassPrompts, NoPrompts, number_of, open_prompts
from tests.helpers.tars import sample, tar


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five samples without a caption: classes 2, 0, none, 1 of three; and one whose KEY.cls is no
    number.
    """
    files = [
        *sample("a", seed=0, cls=b"2\n"),
        *sample("b", seed=1, json=b'{"cls": 0, "kind": "cat"}'),
        *sample("c", seed=2, json=b'{"kind": "cow"}'),
        *sample("d", seed=3, json=b'{"kind": "dog", "cls": 7}', cls=b"1"),
        *sample("e", seed=4, cls=b"dog"),
    ]
    place = tmp_path_factory.mktemp("classes")
    (place / "0.tar").write_bytes(tar([file for file in files if not file[0].endswith("txt")]))
    return place


def opened(folder: Path, classes: ClassConfig | None) -> Shards:
    """As a stage opens them: see StageConfig."""
    wanted = {"fields": classes.filter} if classes else {}
    raw = {"shards": f"{folder}/*.tar", "captions": {}, "filter": wanted, "max_damage": 0.5}
    return Shards.open(build(DataConfig, raw), progress=False)


def keys(shards: Shards) -> str:
    return "".join(shards.name(i)[1] for i in range(len(shards)))


@pytest.mark.parametrize(
    ("names", "field", "found", "labels"),
    [
        (3, "cls", "abd", [2, 0, 1]),
        (2, "cls", "bd", [0, 1]),
        (["dog", "cat"], "kind", "bd", [1, 0]),
    ],
)
def test_samples_of_a_class_and_their_labels(
    folder: Path, names: Any, field: str, found: str, labels: list[int]
) -> None:
    config = build(ClassConfig, {"names": names, "field": field})
    shards = opened(folder, config)
    assert keys(shards) == found
    prompts = open_prompts(None, config, shards)
    assert isinstance(prompts, ClassPrompts)
    (label,) = prompts.embed(range(len(shards)), 0, 0, range(len(shards)))
    assert label.dtype == np.float32
    np.testing.assert_array_equal(label, np.eye(config.num)[labels])
    assert prompts.facts == {"classes": names}


def test_a_label_that_is_no_number_is_a_fault(folder: Path) -> None:
    assert [fault.reason for _, fault in opened(folder, None).faults] == [
        "its cls is b'dog', no whole number from 0 on"
    ]


def test_a_stage_that_is_told_nothing_takes_samples_without_a_caption(folder: Path) -> None:
    shards = opened(folder, None)
    assert keys(shards) == "abcd"
    prompts = open_prompts(None, None, shards)
    assert isinstance(prompts, NoPrompts)
    assert prompts.embed([0, 1], 0, 0, [0, 1]) == ()


@pytest.mark.parametrize(
    ("names", "said", "number"),
    [(3, "2", 2), (3, 0, 0), (("cat", "dog"), "dog", 1), (("cat", "dog"), "0", 0)],
)
def test_a_class_by_name_or_number(names: Any, said: Any, number: int) -> None:
    assert number_of(names, said) == number


@pytest.mark.parametrize(
    ("names", "said", "message"),
    [
        (3, "3", "'3' is no class; classes are numbers from 0 to 2"),
        (3, "-1", "'-1' is no class; classes are numbers from 0 to 2"),
        (3, "²", "'²' is no class; classes are numbers from 0 to 2"),
        (("cat", "dog"), "cow", "'cow' is no class; the classes are cat, dog"),
    ],
)
def test_what_is_no_class(names: Any, said: str, message: str) -> None:
    with pytest.raises(UserError) as error:
        number_of(names, said)
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"names": 0}, "names: 0 leaves no class; give names, or how many there are"),
        (
            {"names": ["a", "a"]},
            "names: ['a', 'a'] has a name twice; number the classes by different names",
        ),
        ({"cond_drop_prob": 1.0}, "cond_drop_prob: 1.0 is not in [0, 1); 0.1 is usual"),
    ],
)
def test_classes_that_cannot_be(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        build(ClassConfig, {"names": 3, **change})
    assert str(error.value) == message


def test_what_a_sample_has_is_told_as_it_lies_in_the_tar(folder: Path) -> None:
    """A number in KEY.cls is a field, and no KEY.json that was not there."""
    (index,) = opened(folder, None).indexes
    found = {
        text["key"]: (text["files"].split(), text["json"])
        for text in index.texts(np.arange(index.num_samples))
    }
    assert found["a"] == (["jpg", "cls"], '{"cls": 2}')
    assert found["d"] == (["jpg", "json", "cls"], '{"kind": "dog", "cls": 1}')
