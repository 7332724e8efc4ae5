"""Frozen text encoders: tiny T5 and CLIP checkpoints built on the spot, no network."""

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    CLIPTextConfig,
    CLIPTextModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
)

from blockloom.core.errors import ModelError
from blockloom.core.recipe import load_recipe
from blockloom.models.generator import GenerativeModel
from blockloom.models.pretrained_text import PretrainedTextEncoder
from blockloom.training.objective import ModelStage

VOCAB = {"<pad>": 0, "</s>": 1, "<unk>": 2, "cat": 3, "red": 4}


def _save_tokenizer(folder) -> None:
    raw = Tokenizer(models.WordLevel(VOCAB, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    raw.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )
    fast.save_pretrained(folder)


@pytest.fixture(params=["t5", "clip"])
def checkpoint(request, tmp_path):
    torch.manual_seed(0)
    if request.param == "t5":
        config = T5Config(vocab_size=8, d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
        network = T5EncoderModel(config)
    else:
        network = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=8,
                hidden_size=16,
                intermediate_size=16,
                num_hidden_layers=1,
                num_attention_heads=2,
                max_position_embeddings=6,
                pad_token_id=0,
                bos_token_id=2,
                eos_token_id=1,
            )
        )
    network.save_pretrained(tmp_path / "text_encoder")
    _save_tokenizer(tmp_path / "tokenizer")
    return request.param, tmp_path, network.eval()


def _encoder(folder, **changes) -> PretrainedTextEncoder:
    torch.manual_seed(1)
    settings = {
        "dim": 8,
        "max_tokens": 5,
        "subfolder": "text_encoder",
        "tokenizer_subfolder": "tokenizer",
    }
    return PretrainedTextEncoder(str(folder), **(settings | changes)).eval()


def test_features_are_the_projected_features_of_the_checkpoint(checkpoint):
    kind, folder, network = checkpoint
    encoder = _encoder(folder)
    ids = encoder.tokenize(["red cat"])
    assert ids[0, :, 0].tolist() == [4, 3, 1, -1, -1]
    with torch.no_grad():
        got = encoder(ids)
        out = network(
            input_ids=torch.tensor([[4, 3, 1, 0, 0]]),
            attention_mask=torch.tensor([[1, 1, 1, 0, 0]]),
        )
        words = out.last_hidden_state[:, :3]
        pooled = out.pooler_output if kind == "clip" else words.mean(1)
        torch.testing.assert_close(got.embeds[:, :3], encoder.project(encoder.norm(words)))
        torch.testing.assert_close(got.pooled, encoder.pool(pooled))
    assert got.is_valid.tolist() == [[True, True, True, False, False]]
    assert (got.embeds[:, 3:] == 0).all()


def test_blank_prompts_truncation_and_surrogates(checkpoint):
    encoder = _encoder(checkpoint[1])
    with torch.no_grad():
        got, null = encoder.encode(["  ", "cat"]), encoder.null(1)
    assert torch.equal(got.embeds[:1], null.embeds) and torch.equal(got.pooled[:1], null.pooled)
    assert encoder.truncated == 0
    ids = encoder.tokenize(["cat " * 100_000, "cat \ud800", "cat cat cat cat"])
    assert encoder.truncated == 1 and ids.shape == (3, 5, 1)


def test_bits_do_not_depend_on_the_batch(checkpoint):
    encoder, prompts = _encoder(checkpoint[1]), ["red cat", "cat", "", "red red cat"]
    with torch.no_grad():
        together = encoder.encode(prompts)
        for row, prompt in enumerate(prompts):
            alone = encoder.encode([prompt])
            assert torch.equal(alone.embeds[0], together.embeds[row])
            assert torch.equal(alone.pooled[0], together.pooled[row])


def test_only_projections_are_saved_and_trained(checkpoint, tmp_path):
    encoder = _encoder(checkpoint[1])
    encoder.encode(["cat"]).pooled.sum().backward()
    assert not any("frozen" in name for name in encoder.state_dict())
    assert all(p.grad is None for p in encoder._frozen[1].parameters())
    encoder.save_pretrained(tmp_path / "saved")
    loaded = PretrainedTextEncoder.from_pretrained(tmp_path / "saved").eval()
    with torch.no_grad():
        assert torch.equal(loaded.encode(["cat"]).pooled, encoder.encode(["cat"]).pooled)


def test_errors_name_the_kind_and_the_limit(checkpoint, tmp_path):
    BertConfig(vocab_size=8).save_pretrained(tmp_path / "bert")
    with pytest.raises(ModelError, match="of kind 'bert'; allowed kinds are t5"):
        _encoder(tmp_path / "bert", subfolder="")
    if checkpoint[0] == "clip":
        with pytest.raises(ValueError, match=r"max_tokens must be at most 6.*got 7"):
            _encoder(checkpoint[1], max_tokens=7)
    with pytest.raises(ValueError, match=r"prompts\[0\] must be a string, got int"):
        _encoder(checkpoint[1]).tokenize([3])


def test_a_recipe_trains_on_a_frozen_encoder(checkpoint):
    overrides = ["backbone.dim=32", "backbone.layers=1", "backbone.heads=2", "text.dim=16"]
    overrides += ["text.words=5", f"text.pretrained={checkpoint[1]}"]
    overrides += ["text.encoder_folder=text_encoder", "text.tokenizer_folder=tokenizer"]
    recipe = load_recipe("image/block_masked", overrides)
    model = GenerativeModel(recipe.model_dump(mode="json"), height=2, width=2, codebook_size=5)
    assert isinstance(model.text_encoder, PretrainedTextEncoder)
    ids = model.text_encoder.tokenize(["a b", "c"])
    stage = ModelStage(model, torch.zeros(2, 4, 1).long(), ids, ["a b", "c"])
    torch.nn.init.normal_(model.head.out.weight)
    torch.nn.init.normal_(model.backbone.to_modulation.weight)
    torch.nn.init.normal_(model.backbone.to_final.weight)
    loss, _ = stage.loss(torch.arange(2), torch.Generator().manual_seed(0), 0)
    loss.backward()
    assert float(model.text_encoder.pool[1].weight.grad.abs().sum()) > 0
