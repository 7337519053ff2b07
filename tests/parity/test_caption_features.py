"""Features of captions against transformers' T5 encoder: padding, cut captions, both kinds of T5."""

import numpy as np
import pytest

from tests.tiny_tokenizers import t5_directory
from vlm_jax.config import ConfigError
from vlm_jax.data.tokenizer import load_tokenizer
from vlm_jax.generate.caption_features import caption_features

TEXTS = ["A man ironing clothes", " the back of a TAXI on the image of a taxi and a man", "sunny"]


@pytest.mark.parametrize("kind", ["gated-gelu", "relu"])
def test_features_are_those_of_transformers(tmp_path, kind):
    torch, hf = pytest.importorskip("torch"), pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = hf.T5Config(
        vocab_size=300, d_model=16, d_kv=4, d_ff=24, num_layers=2, num_heads=3, feed_forward_proj=kind,
        tie_word_embeddings=kind == "relu", decoder_start_token_id=0,
    )  # fmt: skip
    hf.T5ForConditionalGeneration(config).save_pretrained(tmp_path)
    t5_directory(tmp_path)
    ours, mask = caption_features(str(tmp_path), TEXTS, 12)
    assert ours.shape == (3, 12, 16) and mask.sum(1)[1] == 12 > mask.sum(1)[2] and not ours[~mask].any()
    tokenizer, model = load_tokenizer(tmp_path), hf.T5EncoderModel.from_pretrained(tmp_path).eval()
    for row, text in enumerate(TEXTS):
        ids = [*tokenizer.encode(text.lower().strip(), special=False)[:11], 1]
        theirs = model(torch.tensor([ids])).last_hidden_state[0].detach().numpy()
        np.testing.assert_allclose(ours[row, : len(ids)], theirs, atol=1e-5)
        assert mask[row].sum() == len(ids)


def test_a_caption_needs_words(tmp_path):
    with pytest.raises(ConfigError, match="text 1 is empty"):
        caption_features(str(t5_directory(tmp_path)), ["a", " "], 12)
