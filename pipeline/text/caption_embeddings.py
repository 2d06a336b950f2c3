"""The text of a batch: which of its captions a sample gets, and that caption's embeddings, stored
or made now.

Both kinds answer what `pipeline.text.prompts` asks: text (B, L, D) float32, zero beyond a caption's
tokens, and mask (B, L) bool.
"""

import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.data.shards import Shards
from pipeline.errors import UserError
from pipeline.rng import generator
from pipeline.text.store import Recipe, TextStore

if TYPE_CHECKING:
    from pipeline.text.encoder import TextConfig, TextEncoder

log = logging.getLogger("cascade")
MEND = "run `python -m tools.cache_text CONFIG`"


def choose(
    shards: Shards, number: int, seed: int, step: int, position: int
) -> tuple[int, int, str, int]:
    """(shard, row of its index, caption field, number of the caption in the field) for sample
    `number`.

    The field is drawn by the weights of those that the sample has, and one of the field's captions
    evenly.
    """
    shard, row = shards.location(number)
    weights = shards.config.captions
    if list(weights) == ["txt"]:
        return shard, row, "txt", 0
    (found,) = shards.captions(shard, np.array([row]))
    names = [name for name in weights if found[name]]
    shares = np.cumsum([weights[name] for name in names])
    u, v = generator(seed, "caption", step, position).random(2)
    name = names[min(int(np.searchsorted(shares, u * shares[-1], side="right")), len(names) - 1)]
    return shard, row, name, int(v * len(found[name]))


class StoredText:
    """Embeddings from the files beside the shards."""

    threadsafe = True

    def __init__(self, store: TextStore) -> None:
        self.store, self.recipe = store, store.recipe
        self.facts: Mapping[str, Any] = facts(self.recipe)

    def embed(
        self, numbers: Sequence[int], seed: int, step: int, positions: Sequence[int]
    ) -> tuple[np.ndarray, np.ndarray]:
        recipe = self.recipe
        text = np.zeros((len(numbers), recipe.length, recipe.width), np.float32)
        mask = np.zeros((len(numbers), recipe.length), bool)
        for place, (number, position) in enumerate(zip(numbers, positions, strict=True)):
            rows = self.store.read(*choose(self.store.shards, number, seed, step, position))
            text[place, : len(rows)], mask[place, : len(rows)] = rows, True
        return text, mask


class LiveText:
    """Embeddings made when they are asked for; equal to the stored ones. In the thread that runs
    MindSpore only.
    """

    threadsafe = False

    def __init__(self, shards: Shards, recipe: Recipe, encoder: "TextEncoder") -> None:
        self.shards, self.recipe, self.encoder = shards, recipe, encoder
        self.facts: Mapping[str, Any] = facts(recipe)

    def embed(
        self, numbers: Sequence[int], seed: int, step: int, positions: Sequence[int]
    ) -> tuple[np.ndarray, np.ndarray]:
        words = []
        for number, position in zip(numbers, positions, strict=True):
            shard, row, name, caption = choose(self.shards, number, seed, step, position)
            (found,) = self.shards.captions(shard, np.array([row]))
            words.append(self.recipe.text(found[name][caption]))
        return self.encoder.encode(words)


def open_text(config: "TextConfig", shards: Shards) -> StoredText | LiveText:
    """The stored embeddings; or, where nothing is stored, an encoder.

    Raises UserError for a store that lacks something or was made in another way.
    """
    store = TextStore(shards, recipe(config))
    faults = store.faults()
    if not faults:
        return StoredText(store)
    if len(faults) < len(shards.indexes) * len(store.fields) or any(
        reason != "is missing" for *_, reason in faults
    ):
        path, *_, reason = faults[0]
        more = f" ({len(faults)} such files)" if len(faults) > 1 else ""
        raise UserError(f"{path} {reason}{more}; {MEND}")
    log.warning(
        "no stored embeddings: captions are encoded while training, which slows it; %s to do it before",
        MEND,
    )
    return LiveText(shards, store.recipe, load_encoder(config))


def recipe(config: "TextConfig") -> Recipe:
    """UserError if the encoder is not there or not as wide as the configuration says."""
    from pipeline.text.fingerprint import fingerprint
    from pipeline.text.t5_folder import T5Config

    width = T5Config.read(config.encoder).d_model
    if width != config.width:
        raise UserError(
            f"text.width: {config.width}, but the encoder in {config.encoder} has {width}; set that"
        )
    return Recipe(
        encoder=fingerprint(config.encoder, config.encoder),
        width=width,
        length=config.length,
        clean=config.clean,
    )


def facts(recipe: Recipe) -> dict[str, Any]:
    """What a manifest says of the text that a stage was trained with."""
    return {
        "text": {
            "fingerprint": recipe.encoder,
            "length": recipe.length,
            "width": recipe.width,
            "clean": recipe.clean,
        }
    }


def load_encoder(config: "TextConfig") -> "TextEncoder":
    from pipeline.text.encoder import TextEncoder  # late: MindSpore, which nothing else here needs

    return TextEncoder.load(config.encoder, config.encoder, config.length)
