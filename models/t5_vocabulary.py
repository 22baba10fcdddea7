"""A vocabulary for a small seeded T5, made from a list of words: no vocabulary file is needed, nothing is fetched."""

import string

from models.errors import ModelError

WORD_START = "\u2581"  # SentencePiece's mark of a word's first piece
_SPECIAL = (("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0))  # ids 0, 1 and 2, as every T5 has them
_WORD_SCORE, _SINGLE_SCORE = -10.0, -20.0


def unigram_pieces(words: list[str], vocab_size: int) -> list[tuple[str, float]]:
    """Pieces of a Unigram tokenizer (Kudo, arXiv:1804.10959) in which every listed word is one piece.

    The score stands for a log-probability, and the segmentation with the highest sum wins. Any way to split a word
    holds at least one single character, and one of those scores less than any whole word, so listed words stay whole;
    other words fall into their longest known beginning and letters.

    Args:
        words: Lower-case words, most frequent first; the tail that does not fit is left out.
        vocab_size: Number of pieces in all.

    Returns:
        (piece, score) by id; shorter than vocab_size only when the words run out.

    Raises:
        ModelError: vocab_size leaves no room for words.
    """
    singles = [WORD_START, *string.digits, *string.ascii_letters, *string.punctuation]
    digits = [WORD_START + digit for digit in string.digits]
    room = vocab_size - len(_SPECIAL) - len(singles) - len(digits)
    if room < 1:
        raise ModelError(f"vocab_size = {vocab_size} leaves no room for words: give at least {vocab_size - room + 1}")
    listed = list(dict.fromkeys(words))[:room]
    pieces = list(_SPECIAL)
    pieces += [(WORD_START + word, _WORD_SCORE - rank / len(listed)) for rank, word in enumerate(listed)]
    pieces += [(digit, _WORD_SCORE - 1.0) for digit in digits]
    pieces += [(single, _SINGLE_SCORE) for single in singles]
    return pieces
