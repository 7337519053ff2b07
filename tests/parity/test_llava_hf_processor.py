"""Texts with `<image>` inside, as HF's LlavaProcessor (transformers 5.23) tokenises and expands them."""

import json

from tests.goldens import golden, needs_shared
from vlm_jax.config import IMAGE
from vlm_jax.data.tokenizer import AddedToken, expand_images, load_tokenizer


@golden("llava_hf", "processor_*.json")
def test_processor(path):
    data = json.loads(path.read_text(encoding="utf-8"))
    added = [AddedToken("<image>", data["image_token_id"]), AddedToken("<pad>", data["pad_token_id"])]
    tokenizer = load_tokenizer(needs_shared("tokenizers/llama2.model"), legacy=False, added=added, pad="<pad>")
    side = data["image_size"] // data["patch_size"]
    slots = side * side + data["num_additional_image_tokens"] - (data["strategy"] == "default")
    for case in data["cases"]:
        coded = [tokenizer.encode(text) for text in case["texts"]]
        assert sum(ids.count(data["image_token_id"]) for ids in coded) == case["n_images"]
        rows = [
            expand_images(ids, [slots] * ids.count(data["image_token_id"]), data["image_token_id"]) for ids in coded
        ]
        longest = max(map(len, rows))
        pads = [[tokenizer.pad_id] * (longest - len(row)) for row in rows]
        left = data["padding_side"] == "left"
        assert [pad + row if left else row + pad for pad, row in zip(pads, rows)] == case["input_ids"], case["texts"]
        assert [[int(i != tokenizer.pad_id) for i in row] for row in case["input_ids"]] == case["attention_mask"]
        for text, ids in zip(case["texts"], coded):
            assert tokenizer.decode(ids, skip_special=False) == text
            placed = [IMAGE if i == data["image_token_id"] else i for i in ids]
            assert expand_images(placed, [1] * placed.count(IMAGE), data["image_token_id"]) == ids
