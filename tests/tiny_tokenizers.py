"""Tokenizers small enough to be trained by a test: Llama-like and T5-like SentencePiece models and a byte-level
tokenizer.json.
"""

import io
import json

import sentencepiece
import tokenizers

TEXT = (
    "A chat between a curious user and an artificial intelligence assistant. USER: What is shown in the "
    "image? ASSISTANT: A man ironing clothes on the back of a taxi. Human: Is it sunny? Assistant: No, it "
    "is snowing. [INST] <<SYS>> [/INST] <|im_start|>system\nThe battery is at 62%.<|im_end|> 1. a\n2. b\n"
)
CHATML = ("<|im_start|>", "<|im_end|>")


def sentencepiece_model(pieces: int = 420) -> bytes:
    """Byte fallback, identity normaliser, white space kept, <unk> <s> </s> at 0 1 2: what Llama's model is,
    with fewer pieces.
    """
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT.split("\n") * 3),
        model_writer=model,
        model_type="bpe",
        vocab_size=pieces,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        split_digits=True,
        hard_vocab_limit=False,
        allow_whitespace_only_pieces=True,
        minloglevel=2,
    )
    return model.getvalue()


def llama_directory(folder, legacy: bool = True, **settings):
    """A directory as LLaVA-1.5 publishes it: tokenizer.model and tokenizer_config.json, no tokenizer.json."""
    (folder / "tokenizer.model").write_bytes(sentencepiece_model())
    config = {
        "legacy": legacy,
        "bos_token": "<s>",
        "eos_token": {"content": "</s>"},
        "unk_token": "<unk>",
        **settings,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def t5_directory(folder, pieces: int = 180, text: str = TEXT, **settings):
    """A directory as T5 is published, without its tokenizer.json: unigrams, nmt_nfkc, <pad> </s> <unk> at 0 1 2, no BOS."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text.split("\n") * 3),
        model_writer=model,
        model_type="unigram",
        vocab_size=pieces,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    (folder / "spiece.model").write_bytes(model.getvalue())
    config = {"tokenizer_class": "T5Tokenizer", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "extra_ids": 100, **settings}))
    return folder


def byte_level_directory(folder):
    """A GPT-like tokenizer.json that puts <s> in front, with the ChatML marks as special tokens and trimmed
    offsets.
    """
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<unk>", "<s>", "</s>", *CHATML],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    model.train_from_iterator([TEXT], trainer)
    model.post_processor = tokenizers.processors.Sequence(
        [
            tokenizers.processors.ByteLevel(trim_offsets=True),
            tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)]),
        ]
    )
    model.save(str(folder / "tokenizer.json"))
    return folder
