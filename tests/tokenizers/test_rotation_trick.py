"""The rotation trick of the residual quantiser, against its formula."""

import torch
from vector_quantize_pytorch.vector_quantize_pytorch import rotate_to


def rotated(encoded: torch.Tensor, code: torch.Tensor) -> torch.Tensor:
    """Turn encoder outputs [rows, channels] to their codes, letting gradients turn with them.

    q~ = sg(|q| / |e|) (e - 2 w (w.e) + 2 q^ (e^.e)) with e^ = e / |e|, q^ = q / |q| and
    w = (e^ + q^) / |e^ + q^|, all three held constant (arXiv:2410.06424, section 4.2).
    """
    e = encoded.detach()
    length, reach = e.norm(dim=-1, keepdim=True), code.norm(dim=-1, keepdim=True)
    e_unit, q_unit = e / length, code / reach
    w = e_unit + q_unit
    w = w / w.norm(dim=-1, keepdim=True)
    along, forth = (w * encoded).sum(-1, keepdim=True), (e_unit * encoded).sum(-1, keepdim=True)
    return reach / length * (encoded - 2 * w * along + 2 * q_unit * forth)


def test_the_library_turns_latents_and_their_gradients_by_the_formula():
    rng = torch.Generator().manual_seed(0)
    encoded = torch.randn(5, 8, generator=rng, dtype=torch.float64)
    code = torch.randn(5, 8, generator=rng, dtype=torch.float64)
    pull = torch.randn(5, 8, generator=rng, dtype=torch.float64)
    results = []
    for turn in (rotated, rotate_to):
        given = encoded.clone().requires_grad_()
        turned = turn(given, code)
        (turned * pull).sum().backward()
        results.append((turned.detach(), given.grad))
    for ours, theirs in zip(*results, strict=True):
        assert (ours - theirs).abs().max() < 1e-6
    turned, gradient = results[1]
    assert torch.allclose(turned, code, atol=1e-6)  # forward: the code itself
    # The angle between gradient and latent is that between the pull and the code.
    cosine = torch.nn.functional.cosine_similarity
    assert torch.allclose(cosine(gradient, encoded), cosine(pull, code), atol=1e-6)
    assert not torch.allclose(gradient, pull, atol=0.1)


def test_a_latent_that_turns_a_quarter():
    encoded = torch.tensor([[2.0, 0.0]], requires_grad=True)
    turned = rotate_to(encoded, torch.tensor([[0.0, 1.0]]))
    (turned * torch.tensor([[0.0, 1.0]])).sum().backward()
    assert torch.allclose(turned, torch.tensor([[0.0, 1.0]]), atol=1e-6)
    assert torch.allclose(encoded.grad, torch.tensor([[0.5, 0.0]]), atol=1e-6)
