"""Rows that hold images, sound or videos: models are trained on text, and an answer about a picture that nobody sees
teaches to make things up."""

from collections.abc import Collection, Mapping
from typing import Any

from finetune_trainer.data.messages import BadRowError

MEDIA_COLUMNS = ("image", "images", "video", "videos", "audio", "audios")
"""Usual names of columns with media, in the Hub's datasets and in LLaVA's layout."""


def refuse_media(row: Mapping[str, Any], used: Collection[str], *, is_chat: bool) -> None:
    """Raises BadRowError for a row with media in a column beside the `used` ones.

    A text in such a column is a file's name beside a chat, and may be anything beside other layouts.
    """
    for column in MEDIA_COLUMNS:
        value = row.get(column)
        if not value or column in used:
            continue
        if isinstance(value, list | dict | bytes) or (is_chat and isinstance(value, str)):
            raise BadRowError(
                f"the row has content in column {column}, but models are trained on text alone: leave such rows out "
                "(spec.dataset.onBadRow: Skip does), or write what is to be seen or heard into the text, and remove "
                "the column"
            )
