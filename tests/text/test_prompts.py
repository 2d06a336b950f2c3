"""What conditions a sample: its class, by name or id, from KEY.cls or a field of KEY.json; or
nothing.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.config import ConfigError, build
from pipeline.data.config import DataConfig
from pipeline.data.shards import Shards
from pipeline.errors import UserError
from pipeline.text.prompts import (
    PROMPT_INPUTS,
    ClassConfig,
    ClassPrompts,
    NoPrompts,
    class_id,
    open_prompts,
)
from tests.helpers.tars import sample, tar


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Samples without captions: classes 2, 0, none, 1 of three; and one whose KEY.cls is no id."""
    files = [
        *sample("a", seed=0, cls=b"2\n"),
        *sample("b", seed=1, json=b'{"cls": 0, "kind": "cat"}'),
        *sample("c", seed=2, json=b'{"kind": "cow"}'),
        *sample("d", seed=3, json=b'{"kind": "dog", "cls": 7}', cls=b"1"),
        *sample("e", seed=4, cls=b"dog"),
    ]
    folder = tmp_path_factory.mktemp("classes")
    (folder / "0.tar").write_bytes(tar([file for file in files if not file[0].endswith("txt")]))
    return folder


def open_shards(folder: Path, classes: ClassConfig | None) -> Shards:
    """As a stage opens them: see StageConfig."""
    filters = {"fields": classes.filter} if classes else {}
    raw = {"shards": f"{folder}/*.tar", "captions": {}, "filter": filters, "max_damage": 0.5}
    return Shards.open(build(DataConfig, raw), progress=False)


def keys(shards: Shards) -> str:
    return "".join(shards.name(i)[1] for i in range(len(shards)))


@pytest.mark.parametrize(
    ("names", "field", "expected_keys", "class_ids"),
    [
        (3, "cls", "abd", [2, 0, 1]),
        (2, "cls", "bd", [0, 1]),
        (["dog", "cat"], "kind", "bd", [1, 0]),
    ],
)
def test_samples_that_have_a_class_and_their_one_hot_labels(
    folder: Path, names: Any, field: str, expected_keys: str, class_ids: list[int]
) -> None:
    config = build(ClassConfig, {"names": names, "field": field})
    shards = open_shards(folder, config)
    assert keys(shards) == expected_keys

    (prompts,) = open_prompts(None, config, [shards])
    assert isinstance(prompts, ClassPrompts)
    prompt = prompts.embed(range(len(shards)), 0, 0, range(len(shards)))
    assert tuple(prompt) == PROMPT_INPUTS["class"]
    assert prompt["label"].dtype == np.float32
    np.testing.assert_array_equal(prompt["label"], np.eye(config.num)[class_ids])
    assert prompts.manifest_fields == {"classes": names}


def test_a_class_file_without_a_whole_number_is_a_fault(folder: Path) -> None:
    assert [fault.reason for _, fault in open_shards(folder, None).faults] == [
        "its cls is b'dog', not an integer from 0 on"
    ]


def test_an_unconditional_stage_takes_samples_without_a_caption(folder: Path) -> None:
    shards = open_shards(folder, None)
    assert keys(shards) == "abcd"

    (prompts,) = open_prompts(None, None, [shards])
    assert isinstance(prompts, NoPrompts)
    assert prompts.embed([0, 1], 0, 0, [0, 1]) == {}
    assert prompts.manifest_fields == {}


@pytest.mark.parametrize(
    ("names", "name_or_id", "expected"),
    [(3, "2", 2), (3, 0, 0), (("cat", "dog"), "dog", 1), (("cat", "dog"), "0", 0)],
)
def test_a_class_is_given_by_its_name_or_id(
    names: int | tuple[str, ...], name_or_id: str | int, expected: int
) -> None:
    assert class_id(names, name_or_id) == expected


@pytest.mark.parametrize(
    ("names", "name_or_id", "message"),
    [
        (3, "3", "'3' is no class; classes are numbers from 0 to 2"),
        (3, "-1", "'-1' is no class; classes are numbers from 0 to 2"),
        (3, "²", "'²' is no class; classes are numbers from 0 to 2"),
        (("cat", "dog"), "cow", "'cow' is no class; the classes are cat, dog"),
    ],
)
def test_an_unknown_class_is_refused(
    names: int | tuple[str, ...], name_or_id: str, message: str
) -> None:
    with pytest.raises(UserError) as error:
        class_id(names, name_or_id)
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"names": 0}, "names: 0 leaves no class; give names, or how many there are"),
        (
            {"names": ["a", "a"]},
            "names: ['a', 'a'] has a name twice; give each class a name of its own",
        ),
        ({"cond_drop_prob": 1.0}, "cond_drop_prob: 1.0 is not in [0, 1); 0.1 is usual"),
    ],
)
def test_invalid_class_configurations_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        build(ClassConfig, {"names": 3, **change})
    assert str(error.value) == message


def test_the_index_keeps_which_files_a_sample_has(folder: Path) -> None:
    """A class in KEY.cls becomes a field, and does not add a KEY.json that is not in the tar."""
    (index,) = open_shards(folder, None).indexes
    rows = {
        text["key"]: (text["files"].split(), text["json"])
        for text in index.texts(np.arange(index.num_samples))
    }
    assert rows["a"] == (["jpg", "cls"], '{"cls": 2}')
    assert rows["d"] == (["jpg", "json", "cls"], '{"kind": "dog", "cls": 1}')
