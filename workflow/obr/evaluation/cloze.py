"""Multiple-choice questions made from any text: how does this paragraph go on?"""

import random
import re

from obr.errors import ObrError

# The measures of a cloze question. Passages begin a few words into a sentence, so that the context says what
# must follow: from a sentence's start a 135M model finds the right one in 4 of 10 questions, so in 8.
CONTEXT_WORDS = (20, 40)
LEAD_WORDS = 3
CHOICE_WORDS = 12
NEIGHBOURS = 8


def cloze(text: str, n: int, seed: int) -> list[dict]:
    """Make `n` questions {context, choices (4), label} of the kind "how does this paragraph go on?".

    The context is the beginning of a paragraph up to the third word of a sentence, 20 to 40 words. The
    right choice is the 12 words that follow; the three wrong ones follow such third words in the nearest
    paragraphs of the text, so that they share its topic, period and style. Paragraphs are parted by blank
    lines. The same text, n and seed give the same questions; the right answer's place is uniform.

    Raises ObrError when the text has fewer than n such paragraphs.
    """
    paragraphs = [words for block in re.split(r"\n\s*\n", text) if _starts(words := block.split())]
    openings = [(i, cut) for i, words in enumerate(paragraphs) if (cut := _cut(words)) is not None]
    if len(openings) < n:
        raise ObrError(
            f"the text has {len(openings)} paragraphs long enough for a cloze question and n is {n}: "
            "lower n or use a longer text."
        )
    rng = random.Random(seed)
    rows = []
    for i, cut in rng.sample(openings, n):
        near = [j for j in range(i - NEIGHBOURS, i + NEIGHBOURS + 1) if 0 <= j < len(paragraphs) and j != i]
        right = _passage(paragraphs[i], cut)
        wrong = sorted({_passage(paragraphs[j], start) for j in near for start in _starts(paragraphs[j])} - {right})
        if len(wrong) < 3:
            raise ObrError(f"the text has {len(paragraphs)} paragraphs, too few for wrong answers: use a longer one.")
        choices = rng.sample(wrong, 3)
        label = rng.randrange(4)
        choices.insert(label, right)
        rows.append({"context": " ".join(paragraphs[i][:cut]), "choices": choices, "label": label})
    return rows


def _starts(words: list[str]) -> list[int]:
    """Where a sentence is LEAD_WORDS old and the paragraph has CHOICE_WORDS words or more to come."""
    sentences = range(len(words) - LEAD_WORDS - CHOICE_WORDS + 1)
    return [i + LEAD_WORDS for i in sentences if i == 0 or (_ends_sentence(words[i - 1]) and words[i][0].isupper())]


def _cut(words: list[str]) -> int | None:
    low, high = CONTEXT_WORDS
    return next((i for i in _starts(words) if low <= i <= high), None)


def _ends_sentence(word: str) -> bool:
    # Three letters before the full stop: "Mr.", "U.S." and "No." end no sentence.
    return re.search(r"\w{3}[.!?][\"')]*$", word) is not None


def _passage(words: list[str], start: int) -> str:
    return " ".join(words[start : start + CHOICE_WORDS])
