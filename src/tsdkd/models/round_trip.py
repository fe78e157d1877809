"""Whether a tokenizer keeps the text of the prompts. One that is loaded as another class may lose most of it."""

import unicodedata
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from ..config.logs import get_logger
from ..errors import DataError

logger = get_logger(__name__)
_MAX_CHARACTERS = 2000  # of a prompt
_MAX_SHOWN = 60  # characters of a prompt in a message
_TOLERATED, _REFUSED = 0.01, 0.5  # shares of tokens or characters that are lost


class _RoundTrip(NamedTuple):
    """A text, what its tokens decode to, and what was lost: unknown of all tokens, lost of all characters."""

    text: str
    decoded: str
    num_unknown: int
    num_tokens: int
    num_lost: int
    num_characters: int

    @property
    def lost_share(self) -> float:
        """The larger share, of tokens or of characters."""
        return max(self.num_unknown / max(self.num_tokens, 1), self.num_lost / max(self.num_characters, 1))


def check_round_trip(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, field: str) -> None:
    """Compare prompts with what their tokens decode to.

    Whitespace, case, accents, compatible forms of a character (NFKC) and what the tokenizer's own normalizer does
    don't count as a difference. A share of lost tokens or characters above 1 % is a warning.

    Args:
        texts: rendered prompts.
        tokenizer: the tokenizer that encodes them.
        field: the field that names the tokenizer's model.

    Raises:
        DataError: half of the tokens or characters, or more, are lost.
    """
    trips = [_round_trip(_cut(text), tokenizer) for text in texts]
    if not trips:
        return
    total = _RoundTrip("", "", *(sum(numbers) for numbers in zip(*(trip[2:] for trip in trips), strict=True)))
    if total.lost_share <= _TOLERATED:
        return
    worst = max(trips, key=lambda trip: trip.lost_share)
    pairs = zip(worst.text, worst.decoded, strict=False)
    same = next((i for i, (before, after) in enumerate(pairs) if before != after), 0)
    start = max(0, same - _MAX_SHOWN // 3)
    shown, decoded = (text[start : start + _MAX_SHOWN] for text in (worst.text, worst.decoded))
    unknown = total.num_unknown / max(total.num_tokens, 1)
    lost = total.num_lost / max(total.num_characters, 1)
    what = f"{unknown:.0%} of the tokens are unknown" if unknown >= lost else f"{lost:.0%} of the characters are lost"
    name = type(tokenizer).__name__
    message = (
        f"{field}: its tokenizer, a {name}, can't represent the prompts: {what}; {shown!r} becomes {decoded!r}; check "
        f"the prompts, and whether {name} is the right class (tokenizer_config.json, model_type in config.json)"
    )
    if total.lost_share >= _REFUSED:
        raise DataError(message)
    logger.warning(message)


def _round_trip(text: str, tokenizer: PreTrainedTokenizerBase) -> _RoundTrip:
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    unk_id = tokenizer.unk_token_id
    is_named = unk_id is not None and str(tokenizer.unk_token) in text  # a template may write it, as an end of text
    unknown = [] if is_named else [i for i in ids if i == unk_id]
    known = [i for i in ids if is_named or i != unk_id]
    characters = _characters(str(tokenizer.decode(known)))
    # a tokenizer's normalizer may be undone by its decoder, or not
    lost, count = min(_count_lost(_characters(form), characters) for form in (text, _normalize(text, tokenizer)))
    return _RoundTrip(text, str(tokenizer.decode(ids)), len(unknown), len(ids), lost, count)


def _count_lost(before: Counter[str], after: Counter[str]) -> tuple[int, int]:
    """How many characters only one of two texts has, and how many the longer one has."""
    count = max(before.total(), after.total())
    return count - (before & after).total(), count


def _characters(text: str) -> Counter[str]:
    """The characters that count: no whitespace, SentencePiece's included, no accents, no case."""
    plain = unicodedata.normalize("NFKD", unicodedata.normalize("NFKC", text).casefold())
    ignored = ("Mn", "Cc", "Cf")  # accents, control and format characters
    return Counter(c for c in plain if not c.isspace() and c != "▁" and unicodedata.category(c) not in ignored)


def _normalize(text: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """The text as the tokenizer's own normalizer changes it, where it has one."""
    normalizer = getattr(getattr(tokenizer, "backend_tokenizer", None), "normalizer", None)
    return text if normalizer is None else str(normalizer.normalize_str(text))


def _cut(text: str) -> str:
    """The beginning of a long text, up to the end of a word."""
    if len(text) <= _MAX_CHARACTERS:
        return text
    words = text[:_MAX_CHARACTERS].rsplit(maxsplit=1)
    return words[0] if words else ""
