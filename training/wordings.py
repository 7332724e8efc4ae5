"""Other ways to say what a caption says: captions in the imperative, told of somebody.

Small sets name a motion in one way only ("walk"); people who ask say "a person walks". The rules
are those of English verbs and know the irregular ones that captions of movement use. It knows no
clips, no models and no drawing of batches.
"""

import re
from collections.abc import Mapping, Sequence

IRREGULAR = {"be": ("is", "being"), "have": ("has", "having")}
NO_VERBS = frozenset(
    (
        "idle a an the one two three left right both up down in out on off over under forth back "
        "forward forwards backward backwards sideways around round again away together once twice "
        "slowly quickly fast his her its their this that with without to at from of for"
    ).split()
)
"""Words behind a comma or "and" that are no verbs."""
WAYS = (
    "{plain}",
    "a person {tells}",
    "someone {tells}",
    "{plain}",
    "a person is {does}",
    "{does}",
    "a man {tells}",
    "a woman {tells}",
)
"""Ways to say it, `tells` in the third person and `does` in the progressive form; plain twice,
the second time in the words of a synonym where there is one."""


def third_person(verb: str) -> str:
    """Inflect a verb: walk, push, carry -> walks, pushes, carries."""
    if verb in IRREGULAR:
        return IRREGULAR[verb][0]
    if re.search(r"[^aeiou]y$", verb):
        return f"{verb[:-1]}ies"
    return f"{verb}es" if re.search(r"(s|x|z|ch|sh|o)$", verb) else f"{verb}s"


def progressive(verb: str) -> str:
    """Inflect a verb: walk, dance, run -> walking, dancing, running."""
    if verb in IRREGULAR:
        return IRREGULAR[verb][1]
    if verb.endswith("ie"):
        return f"{verb[:-2]}ying"
    if re.search(r"[^eoy]e$", verb):
        return f"{verb[:-1]}ing"
    # One syllable that ends in consonant, vowel, consonant doubles the last.
    doubles = re.fullmatch(r"(qu|[^aeiou])*[aeiouy][^aeiouwxy]", verb) and len(verb) > 2
    return f"{verb}{verb[-1]}ing" if doubles else f"{verb}ing"


def inflected(caption: str, form: str) -> str:
    """Inflect the verbs of a caption: its first word, and those behind commas and "and".

    Args:
        caption: Begins with a verb in the imperative.
        form: "tells" (third person) or "does" (progressive).

    Returns:
        The caption; words behind a comma or "and" that end in -ing or -ly, name a number, a side or
        a way, are articles or plurals ("arms and legs"), stay. A first capital is dropped with it.
    """
    change = third_person if form == "tells" else progressive

    def verb(found: re.Match[str]) -> str:
        before, word = found.group(1), found.group(2)
        is_other = word in NO_VERBS or re.search(r"(ing|ly|[^s]s)$", word)
        return found.group() if before and is_other else before + change(word)

    begun = caption[:1].lower() + caption[1:]
    return re.sub(r"(^|, (?:and |then )?| and (?:then )?)([a-z]+)", verb, begun)


def worded(caption: str, number: int, synonyms: Sequence[str] = ()) -> str:
    """Say a caption in another way.

    Args:
        caption: Begins with a verb in the imperative.
        number: Which way, see `WAYS`; 0 leaves it as it is.
        synonyms: Captions that say the same; the ways go through them in turn.
    """
    said, way = (caption, *synonyms), number % len(WAYS)
    plain = said[number % len(said)]
    if number and WAYS[way] == "{plain}" and plain == caption and synonyms:
        plain = synonyms[number % len(synonyms)]
    tells, does = (inflected(plain, form) for form in ("tells", "does"))
    return WAYS[way].format(plain=plain, tells=tells, does=does)


def wordings(
    captions: Sequence[str], more: int, synonyms: Mapping[str, Sequence[str]]
) -> list[list[str]]:
    """Say captions in several ways, the first of which is as they are.

    Args:
        captions: One per clip.
        more: How many other ways.
        synonyms: Further captions by caption.
    """
    return [
        [worded(caption, number, synonyms.get(caption, ())) for caption in captions]
        for number in range(more + 1)
    ]
