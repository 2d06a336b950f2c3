"""The text of a batch: which of its captions a sample gets, and that caption's embeddings, stored
or encoded now.

Both kinds are `pipeline.text.prompts.Prompts`: `embed` returns text (B, L, D) float32, zero beyond
a caption's tokens, and text_mask (B, L) bool.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.data.shards import Shards
from pipeline.errors import UserError
from pipeline.rng import generator
from pipeline.stage.inputs import Arrays
from pipeline.text.store import CACHE_TEXT, Recipe, TextStore

if TYPE_CHECKING:
    from pipeline.text.encoder import TextConfig, TextEncoder

log = logging.getLogger("cascade")


@dataclass(frozen=True, kw_only=True)
class CaptionChoice:
    """One caption of a sample: the shard, the row of its index, the caption field, the caption's
    number in that field.
    """

    shard: int
    row: int
    field: str
    caption: int


def choose_caption(
    shards: Shards, sample_id: int, *, seed: int, step: int, position: int
) -> CaptionChoice:
    """The caption that a sample gets at a position of the batch of `step`.

    The field is drawn by the weights of those that the sample has, and one of the field's captions
    evenly.
    """
    shard, row = shards.location(sample_id)
    weights = shards.config.captions

    # The usual case: KEY.txt is one caption, so no text has to be read from the index.
    if list(weights) == ["txt"]:
        return CaptionChoice(shard=shard, row=row, field="txt", caption=0)

    (captions,) = shards.captions(shard, np.array([row]))
    # A field without captions leaves its share to the others.
    fields = [field for field in weights if captions[field]]
    cumulative = np.cumsum([weights[field] for field in fields])
    u, v = generator(seed, "caption", step, position).random(2)

    # The inverse of the cumulative distribution at u.
    place = int(np.searchsorted(cumulative, u * cumulative[-1], side="right"))
    field = fields[min(place, len(fields) - 1)]  # rounding may put u beyond the last

    caption = int(v * len(captions[field]))
    return CaptionChoice(shard=shard, row=row, field=field, caption=caption)


class StoredText:
    """Embeddings from the files beside the shards."""

    threadsafe = True

    def __init__(self, store: TextStore) -> None:
        self.store = store
        self.recipe = store.recipe
        self.manifest_fields: Mapping[str, Any] = manifest_fields(self.recipe)

    def embed(
        self, sample_ids: Sequence[int], seed: int, step: int, positions: Sequence[int]
    ) -> Arrays:
        recipe = self.recipe
        # The store has no padding: beyond a caption's tokens, text is zero and the mask False.
        text = np.zeros((len(sample_ids), recipe.length, recipe.width), np.float32)
        mask = np.zeros((len(sample_ids), recipe.length), bool)

        for i, (sample_id, position) in enumerate(zip(sample_ids, positions, strict=True)):
            choice = choose_caption(
                self.store.shards, sample_id, seed=seed, step=step, position=position
            )
            tokens = self.store.read(choice.shard, choice.row, choice.field, choice.caption)
            text[i, : len(tokens)] = tokens
            mask[i, : len(tokens)] = True
        return {"text": text, "text_mask": mask}


class LiveText:
    """Embeddings encoded when they are needed; equal to the stored ones. For the thread that runs
    MindSpore only.
    """

    threadsafe = False

    def __init__(self, shards: Shards, recipe: Recipe, encoder: "TextEncoder") -> None:
        self.shards = shards
        self.recipe = recipe
        self.encoder = encoder
        self.manifest_fields: Mapping[str, Any] = manifest_fields(recipe)

    def embed(
        self, sample_ids: Sequence[int], seed: int, step: int, positions: Sequence[int]
    ) -> Arrays:
        captions = []
        for sample_id, position in zip(sample_ids, positions, strict=True):
            # The same draw as in `StoredText`: a position gets the same caption either way.
            choice = choose_caption(self.shards, sample_id, seed=seed, step=step, position=position)
            (fields,) = self.shards.captions(choice.shard, np.array([choice.row]))
            captions.append(self.recipe.text(fields[choice.field][choice.caption]))

        return encode_text(self.encoder, captions)


def encode_text(encoder: "TextEncoder", captions: Sequence[str]) -> Arrays:
    """The prompt of these captions, which are cleaned already: text (B, L, D), text_mask (B, L)."""
    text, mask = encoder.encode(captions)
    return {"text": text, "text_mask": mask}


def open_caption_embeddings(
    config: "TextConfig", data_sets: Sequence[Shards]
) -> list[StoredText | LiveText]:
    """The stored embeddings of each data set; or, where nothing is stored for any, an encoder.

    Raises:
        UserError: a store lacks something, or was written from another encoder or other captions.
    """
    made_by = recipe(config)
    stores = [TextStore(shards, made_by) for shards in data_sets]
    faults = [fault for store in stores for fault in store.faults()]
    if not faults:
        return [StoredText(store) for store in stores]

    # Only what was never begun is replaced by live encoding: a part of it, or another recipe's, is
    # more likely a mistake.
    num_files = sum(len(store.shards.indexes) * len(store.fields) for store in stores)
    if len(faults) < num_files or any(fault.reason != "is missing" for fault in faults):
        more = f" ({len(faults)} such files)" if len(faults) > 1 else ""
        raise UserError(f"{faults[0].path} {faults[0].reason}{more}; {CACHE_TEXT}")

    log.warning(
        "no stored embeddings: captions are encoded during training, which slows it down; %s to "
        "encode them ahead",
        CACHE_TEXT,
    )
    encoder = load_encoder(config)
    return [LiveText(shards, made_by, encoder) for shards in data_sets]


def recipe(config: "TextConfig") -> Recipe:
    """What the embeddings of this configuration depend on.

    Raises:
        UserError: the encoder is missing, or not as wide as the configuration says.
    """
    from pipeline.text.fingerprint import fingerprint
    from pipeline.text.t5_folder import T5Config

    # What config.json shows comes first: the fingerprint reads all weights.
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


def manifest_fields(recipe: Recipe) -> dict[str, Any]:
    """What stage.json says of the text that a stage was trained with."""
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
