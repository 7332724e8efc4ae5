"""Captions said in other ways: English verbs, their places in a caption, synonyms in turn."""

import pytest

from blockloom.training.wordings import (
    WAYS,
    inflected,
    progressive,
    third_person,
    worded,
    wordings,
)


@pytest.mark.parametrize(
    ("verb", "third", "going"),
    [
        ("walk", "walks", "walking"),
        ("push", "pushes", "pushing"),
        ("carry", "carries", "carrying"),
        ("play", "plays", "playing"),
        ("dance", "dances", "dancing"),
        ("run", "runs", "running"),
        ("do", "does", "doing"),
        ("be", "is", "being"),
        ("lie", "lies", "lying"),
        ("sit", "sits", "sitting"),
        ("swim", "swims", "swimming"),
        ("kneel", "kneels", "kneeling"),
        ("throw", "throws", "throwing"),
        ("squat", "squats", "squatting"),
        ("deposit", "deposits", "depositing"),
        ("see", "sees", "seeing"),
        ("fix", "fixes", "fixing"),
        ("quit", "quits", "quitting"),
        ("step", "steps", "stepping"),
    ],
)
def test_english_verbs(verb: str, third: str, going: str) -> None:
    assert (third_person(verb), progressive(verb)) == (third, going)


def test_the_verbs_of_a_caption_and_nothing_else_change() -> None:
    assert inflected("get hit, fall to the ground and die", "tells") == (
        "gets hit, falls to the ground and dies"
    )
    assert inflected("sit and steer a car", "does") == "sitting and steering a car"
    for form, first in (("tells", "sneaks"), ("does", "sneaking")):
        rest = " two steps, starting with the left foot"
        assert inflected("sneak" + rest, form) == first + rest
    assert inflected("stay crouched, idle", "tells") == "stays crouched, idle"
    assert inflected("raise the left and right arm", "does") == "raising the left and right arm"
    assert inflected("jump up and down", "tells") == "jumps up and down"
    assert inflected("walk back and forth", "does") == "walking back and forth"
    assert inflected("swing arms and legs", "tells") == "swings arms and legs"
    assert inflected("walk, then sit down", "tells") == "walks, then sits down"
    assert inflected("walk and then press a button", "does") == "walking and then pressing a button"
    assert inflected("Walk forward", "tells") == "walks forward"


def test_ways_and_synonyms_take_turns_and_the_first_is_as_it_was() -> None:
    assert worded("walk", 0, ["stroll"]) == "walk"
    assert worded("walk", 1, ["stroll"]) == "a person strolls"
    assert worded("walk", 2, ["stroll"]) == "someone walks"
    assert worded("walk", 4) == "a person is walking"
    assert worded("walk", len(WAYS)) == "walk"
    for synonyms in ([], ["stroll"], ["stroll", "wander"], ["stroll", "wander", "pace"]):
        told = [worded("walk", number, synonyms) for number in range(len(WAYS))]
        assert len(set(told)) == len(WAYS) - (not synonyms)
        assert not synonyms or set(told) & set(synonyms)  # one of them plain
    said = wordings(["walk", "sit down"], 2, {"walk": ["stroll"]})
    assert said == [
        ["walk", "sit down"], ["a person strolls", "a person sits down"],
        ["someone walks", "someone sits down"],
    ]  # fmt: skip
    assert wordings(["walk"], 0, {}) == [["walk"]]
