"""Output heads against closed forms and against torch's own losses and distributions."""

import math

import pytest
import torch
from torch.nn import functional

from blockloom.models.heads import CategoricalHead, PatchHead, build_head

DIM = 16


def _generators(count: int, seed: int = 0) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed + row) for row in range(count)]


def _randomise(head: torch.nn.Module, scale: float = 0.3) -> torch.nn.Module:
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
    return head.eval()


def _hidden(batch: int, tokens: int, seed: int = 3) -> torch.Tensor:
    return torch.randn(batch, tokens, DIM, generator=torch.Generator().manual_seed(seed))


def test_categorical_starts_uniform_and_matches_cross_entropy():
    head, hidden = CategoricalHead(DIM, 11, num_codebooks=2), _hidden(3, 5)
    codes = torch.randint(0, 11, (3, 5, 2), generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(head.loss(hidden, codes), torch.full((3, 5), math.log(11)))
    _randomise(head)
    scores = head.logits(hidden)
    want = sum(
        functional.cross_entropy(
            scores[:, :, k].transpose(1, 2), codes[..., k], label_smoothing=0.1, reduction="none"
        )
        for k in range(2)
    )
    torch.testing.assert_close(head.loss(hidden, codes, label_smoothing=0.1), want / 2)


def test_categorical_sample_statistics_are_those_of_the_softmax():
    head, hidden = _randomise(CategoricalHead(DIM, 6, num_codebooks=2)), _hidden(2, 4)
    with torch.no_grad():
        got = head.sample(hidden, _generators(2))
        log_probs = head.logits(hidden).log_softmax(-1)
    chosen = log_probs.gather(-1, got.values[..., None])[..., 0]
    torch.testing.assert_close(got.log_prob, chosen.sum(-1))
    torch.testing.assert_close(got.stats.prob, chosen.mean(-1).exp())
    entropy = -(log_probs.exp() * log_probs).sum(-1).mean(-1)
    torch.testing.assert_close(got.stats.entropy, entropy)


def test_categorical_guidance_and_greedy():
    head, cond, uncond = _randomise(CategoricalHead(DIM, 6)), _hidden(2, 3, 1), _hidden(2, 3, 2)
    scale = torch.tensor([[1.0, 2.0, 5.0], [0.0, 3.0, 1.0]])
    with torch.no_grad():
        got = head.sample(
            cond, _generators(2), uncond_hidden=uncond, guidance_scale=scale, temperature=0.0
        )
        c, u = head.logits(cond)[:, :, 0], head.logits(uncond)[:, :, 0]
    assert torch.equal(got.values[..., 0], (u + scale[..., None] * (c - u)).argmax(-1))


def test_categorical_bits_do_not_depend_on_the_batch():
    head, hidden = _randomise(CategoricalHead(DIM, 33)), _hidden(7, 3)
    with torch.no_grad():
        together = head.sample(hidden, _generators(7))
        for row in range(7):
            alone = head.sample(hidden[row : row + 1], _generators(7)[row : row + 1])
            assert torch.equal(alone.values[0], together.values[row])
            assert torch.equal(alone.log_prob[0], together.log_prob[row])


def test_patch_starts_at_zero_and_modulates_by_hand():
    head, hidden = PatchHead(DIM, 4), _hidden(2, 3)
    cond = _hidden(2, 1, 9)[:, 0]
    assert head.predict(hidden, cond).abs().max() == 0
    _randomise(head)
    shift, scale = head.modulation(functional.silu(cond)).chunk(2, -1)
    state = functional.layer_norm(hidden, (DIM,)) * (1 + scale[:, None]) + shift[:, None]
    want = state @ head.out.weight.T + head.out.bias
    torch.testing.assert_close(head.predict(hidden, cond), want)
    torch.testing.assert_close(head.predict(hidden, cond[:, None].expand(2, 3, DIM)), want)
    target = torch.ones_like(want)
    torch.testing.assert_close(head.loss(hidden, target, cond=cond), ((want - 1) ** 2).mean(-1))


@pytest.mark.parametrize("prediction", ["velocity", "eps"])
def test_patch_target_and_to_clean_are_inverse(prediction):
    head = PatchHead(DIM, 4, prediction=prediction)
    clean, noise = _hidden(1, 2, 4), _hidden(1, 2, 5)
    noisy = 0.3 * clean + 0.7 * noise
    torch.testing.assert_close(head.to_clean(head.target(clean, noise), noisy, 0.7), clean)


def test_build_head_by_kind_and_its_errors():
    head = build_head({"kind": "categorical", "label_smoothing": 0.1}, DIM, codebook_size=9)
    assert isinstance(head, CategoricalHead) and head.label_smoothing == 0.1
    assert head.logits(_hidden(1, 1)).shape == (1, 1, 1, 9)
    assert build_head({"kind": "patch"}, DIM, latent_channels=5).channels == 5
    with pytest.raises(ValueError, match=r"head.kind is not legal; got 'softmax'.*gmm"):
        build_head({"kind": "softmax"}, DIM)
    with pytest.raises(ValueError, match=r"needs a tokenizer with code values"):
        build_head({"kind": "categorical"}, DIM, latent_channels=4)
    with pytest.raises(ValueError, match=r"no such setting.*width"):
        build_head({"kind": "patch", "width": 3}, DIM, latent_channels=4)
    with pytest.raises(ValueError, match=r"channels is not legal; got 0"):
        PatchHead(DIM, 0)
    with pytest.raises(ValueError, match=r"prediction is not legal; got 'x0'.*velocity, eps"):
        PatchHead(DIM, 1, prediction="x0")
    with pytest.raises(ValueError, match=r"label_smoothing is not legal; got 1.5.*try 0.99"):
        CategoricalHead(DIM, 3, label_smoothing=1.5)
