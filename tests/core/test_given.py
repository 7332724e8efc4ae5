"""Tokens that are always given, and which recipes may have them, numbers aligned, own answers."""

import pytest
import torch

from blockloom.core.errors import ModelError
from blockloom.core.given import is_given
from blockloom.core.recipe import load_recipe


def test_the_first_tokens_of_every_frame_are_given():
    source = torch.tensor([-1, 0, 1, 2, 3, 4, 7, 11])
    expected = [False, True, True, True, False, True, False, False]
    assert is_given(source, 4, 3).tolist() == expected
    assert not bool(is_given(source, 4, 0).any())


@pytest.mark.parametrize(
    ("name", "override", "words"),
    [
        ("video/magi_ctf", "layout.block=token", 'in blocks of whole frames and corruption.kind'),
        ("video/teacher_forcing", "layout.given=1", 'corruption.kind = "mask"'),
        ("motion/momask", "layout.given=1", "beside acting, schedule.levels or layout.permute"),
        ("motion/t2m_gpt", "condition.aligned=true", "needs actions"),
        ("motion/t2m_gpt", "backbone.period=30", "is read by nothing"),
        ("motion/t2m_gpt", "backbone.position=periodic", "makes all places alike"),
        ("motion/t2m_gpt", "corruption.rollout=true", 'needs "regression"'),
    ],
)  # fmt: skip
def test_what_does_not_go_together_is_refused_in_one_line(name, override, words):
    more = ["layout.given=1"] if "given" not in override and name.startswith("video") else []
    with pytest.raises(ModelError) as caught:
        load_recipe(name, [override, *more])
    assert words in str(caught.value) and "\n" not in str(caught.value)
