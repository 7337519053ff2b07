"""Conversation templates: how a dialogue becomes one string, as a table of data and five ways to render it.

    SINGLE   {system}### {role}: {text}###{role}: {text}###...        LLaVA v0
    TWO      {system} USER: {text} ASSISTANT: {text}</s>USER: ...     Vicuna v1.1, LLaVA v1 and 1.5
    LLAMA_2  [INST] <<SYS>>...<</SYS>>\\n\\n{text} [/INST] {text} </s><s>[INST] ...
    MPT      {system}<|im_end|>{role}{text}<|im_end|>...              ChatML
    PLAIN    {text}\\n                                                 caption pre-training, no roles at all

`v1_sq` is a TWO with a third role, the VUSER that asks (data.self_questioning). A dialogue renders to pieces; a
piece knows whether it is answer: what a model has to say after an open prompt (the text, the space before it and
the terminator behind it). Wordings and quirks are those of haotian-liu/LLaVA v1.2.2 (`llava/conversation.py`), of
SALT-NLP/LLaVAR (names that begin with llavar_) and of heliossun/SQ-LLaVA (v1_sq, plain_qav).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from vlm_jax.config import UserError

IMAGE_TEXT = "<image>"
PLACEHOLDER_TEXT = "<image-placeholder>"

Message = str | tuple | None  # text; (text, image, mode) as a web page sends it; None for the turn to be generated


class TemplateError(UserError):
    """An unknown template, or a dialogue that the template cannot render."""


class Piece(NamedTuple):
    """A stretch of the rendered dialogue; `answer` is true where a model speaks."""

    text: str
    answer: bool = False


@dataclasses.dataclass(frozen=True)
class Template:
    """One conversation format. `messages` are built-in example turns, the first `offset` of which are not
    shown to users.

    `version` is what training dispatches on (v1*, mpt, anything else: v0); sep2 closes the assistant's turns
    where it differs. roles: user, assistant and, where there is one, the role of questions that the model asks.
    origin: whose original masks belong to it. Where that is "llavar", an image is a special token inside the
    text and stays where it is; else the text is cut at images.
    """

    system: str
    roles: tuple[str, ...]
    style: str
    sep: str
    sep2: str | None = None
    version: str = "Unknown"
    messages: tuple[tuple[str, str], ...] = ()
    offset: int = 0
    origin: str = "llava"


_CHAT = (
    "A chat between a curious {0} and an artificial intelligence assistant. The assistant gives helpful, "
    "detailed, and polite answers to the {0}'s questions."
)
_HUMAN, _USER = _CHAT.format("human"), _CHAT.format("user")
_MMTAG = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant is able to "
    "understand the visual content that the user provides, and assist the user with a variety of tasks "
    "using natural language.The visual content will be provided with the following format: <Image>visual "
    "content</Image>."
)
_ABLE = (
    "You are able to understand the visual content that the user provides, and assist the user with a variety of "
    "tasks using natural language."
)
_LLAVA = f"You are a helpful language and vision assistant. {_ABLE}"
_LLAMA_2 = (
    "You are a helpful, respectful and honest assistant. Always answer as helpfully as possible, while "
    "being safe.  Your answers should not include any harmful, unethical, racist, sexist, toxic, "
    "dangerous, or illegal content. Please ensure that your responses are socially unbiased and positive "
    "in nature.\n\nIf a question does not make any sense, or is not factually coherent, explain why "
    "instead of answering something not correct. If you don't know the answer to a question, please don't "
    "share false information."
)
_CURIOUS = (
    _USER + "Also, the artificial intelligence assistant is a curious virtual user. The virtual user asks complex "
    "questions that are relevant to the content in the image, for example, asking about background knowledge of "
    "the objects in the image, asking to discuss about events happening in the image, etc. Again, do not ask "
    "about uncertain details."
)
_WAIV = "You are LLaVA, a large language {0} trained by UW Madison WAIV Lab."
_SIGHTED = _WAIV.format("and vision assistant")
_LLAVAR = f"{_SIGHTED}{_ABLE}Follow the instructions carefully and explain your answers in detail."
_EXAMPLE = (
    ("Human", "What are the key differences between renewable and non-renewable energy sources?"),
    (
        "Assistant",
        "Renewable energy sources are those that can be replenished naturally in a relatively short "
        "amount of time, such as solar, wind, hydro, geothermal, and biomass. Non-renewable energy "
        "sources, on the other hand, are finite and will eventually be depleted, such as coal, oil, and "
        "natural gas. Here are some key differences between renewable and non-renewable energy "
        "sources:\n1. Availability: Renewable energy sources are virtually inexhaustible, while "
        "non-renewable energy sources are finite and will eventually run out.\n2. Environmental impact: "
        "Renewable energy sources have a much lower environmental impact than non-renewable sources, "
        "which can lead to air and water pollution, greenhouse gas emissions, and other negative "
        "effects.\n3. Cost: Renewable energy sources can be more expensive to initially set up, but they "
        "typically have lower operational costs than non-renewable sources.\n4. Reliability: Renewable "
        "energy sources are often more reliable and can be used in more remote locations than "
        "non-renewable sources.\n5. Flexibility: Renewable energy sources are often more flexible and can "
        "be adapted to different situations and needs, while non-renewable sources are more rigid and "
        "inflexible.\n6. Sustainability: Renewable energy sources are more sustainable over the long "
        "term, while non-renewable sources are not, and their depletion can lead to economic and social "
        "instability.\n",
    ),
)
_OLD, _NEW = ("Human", "Assistant"), ("USER", "ASSISTANT")
_CHATML = ("<|im_start|>user\n", "<|im_start|>assistant\n")

_V0 = Template(_HUMAN, _OLD, "SINGLE", "###", messages=_EXAMPLE, offset=2)
_V1 = Template(_USER, _NEW, "TWO", " ", "</s>", "v1")
_PLAIN = Template("", ("", ""), "PLAIN", "\n")


def _mpt_template(system: str) -> Template:
    return Template(f"<|im_start|>system\n{system}", _CHATML, "MPT", "<|im_end|>", version="mpt")


def _greeting(system: str, hello: str, answer: str) -> Template:
    return Template(system, _OLD, "SINGLE", "###", messages=(("Human", hello), ("Assistant", answer)), offset=2)


_CHATML_DIRECT = _mpt_template("Answer the questions.")

TEMPLATES: dict[str, Template] = {
    "default": _V0,
    "v0": _V0,
    "v1": _V1,
    "vicuna_v1": _V1,
    "llama_2": Template(_LLAMA_2, _NEW, "LLAMA_2", "<s>", "</s>", "llama_v2"),
    "mistral_instruct": Template("", _NEW, "LLAMA_2", "", "</s>", "llama_v2"),
    "chatml_direct": _CHATML_DIRECT,
    "mistral_direct": _CHATML_DIRECT,
    "plain": _PLAIN,
    "v0_plain": _PLAIN,
    "llava_v0": Template(_HUMAN, _OLD, "SINGLE", "###"),
    "v0_mmtag": Template(_MMTAG, _OLD, "SINGLE", "###", version="v0_mmtag"),
    "llava_v1": Template(_HUMAN, _NEW, "TWO", " ", "</s>", "v1"),
    "v1_mmtag": Template(_MMTAG, _NEW, "TWO", " ", "</s>", "v1_mmtag"),
    "llava_llama_2": Template(_LLAVA, _NEW, "LLAMA_2", "<s>", "</s>", "llama_v2"),
    "mpt": _mpt_template(
        "A conversation between a user and an LLM-based AI assistant. The assistant gives helpful and honest answers."
    ),
    "v1_sq": Template(_CURIOUS, (*_NEW, "VUSER"), "TWO", " ", "</s>", "v1_sq", origin="sq_llava"),
    "t5_v1": Template(_USER, _NEW, "TWO", " ", " ", "t5_v1", origin="clip_flant5"),
    "t5_plain": dataclasses.replace(_PLAIN, origin="clip_flant5"),
    "t5_plain_split_text": dataclasses.replace(_PLAIN, origin="clip_flant5"),
    "plain_qav": Template("", ("", ""), "PLAIN", "\n", version="plain_qav", origin="sq_llava"),
}
_HI = "Hi there!  How can I help you today?\n"
_RULES = "- You should follow the instructions carefully and explain your answers in detail."
_OF_LLAVAR = {
    "default": _V0,
    "v1": _V0,
    "simple": _greeting(_HUMAN, "Hi!", "Hi there! How can I help you today?"),
    "simple_legacy": _greeting(
        _WAIV.format("model") + "You are designed to assist human with a variety of tasks using natural language."
        "Follow the instructions carefully.",
        "Hi!\n\n### Response:",
        _HI,
    ),
    "multimodal": _greeting(_LLAVAR, "Hi!", _HI),
    "llava_v1": Template(_LLAVAR, _NEW, "TWO", " ", "</s>", "v1"),
    "bair_v1": Template("BEGINNING OF CONVERSATION:", ("USER", "GPT"), "TWO", " ", "</s>"),
    "vicuna_v1_1": _V1,
    "mpt": _mpt_template(f"- You are a helpful language and vision assistant.\n- {_ABLE}\n{_RULES}"),
    "mpt_multimodal": _mpt_template(f"- {_SIGHTED}\n- {_ABLE}\n{_RULES}"),
    "mpt_text": _mpt_template(
        "- You are a helpful assistant chatbot trained by MosaicML.\n- You answer questions.\n- You are excited to "
        "be able to help the user, but will refuse to do anything that could be considered harmful to the user.\n- "
        "You are more than just an information source, you are also able to write poetry, short stories, and make "
        "jokes."
    ),
}
TEMPLATES |= {f"llavar_{name}": dataclasses.replace(t, origin="llavar") for name, t in _OF_LLAVAR.items()}
_OF_MODEL_NAME = (
    ("llavar", "llavar_llava_v1"),
    ("llama-2", "llava_llama_2"),
    ("mistral", "mistral_instruct"),
    ("v1.6-34b", "chatml_direct"),
    ("v1", "llava_v1"),
    ("mpt", "mpt"),
)


def template(name: str) -> Template:
    """The template called `name`; TemplateError lists the known ones."""
    if name not in TEMPLATES:
        raise TemplateError(f"template {name!r} is unknown: use one of {', '.join(TEMPLATES)}")
    return TEMPLATES[name]


def template_of_model(model: str) -> str:
    """Template name for a model name or path by its substrings, else llava_v0 (LLaVA's run_llava, and LLaVAR).

    >>> template_of_model("liuhaotian/llava-v1.5-7b")
    'llava_v1'
    """
    parts = model.rstrip("/").split("/")
    name = "_".join(parts[-2:]) if parts[-1].startswith("checkpoint-") else parts[-1]
    return next((chosen for part, chosen in _OF_MODEL_NAME if part in name.lower()), "llava_v0")


def with_images(text: str, images: int, start_end: bool = False, behind: bool = False) -> str:
    """A question with its image tokens: one `<image>` line per image in front, unless the text places them.

    `<image-placeholder>` in the text becomes `<image>`; start_end puts `<im_start>`, `<im_end>` around it;
    behind puts the lines behind the question, as LLaVAR does.
    """
    token = f"<im_start>{IMAGE_TEXT}<im_end>" if start_end else IMAGE_TEXT
    if PLACEHOLDER_TEXT in text:
        return text.replace(PLACEHOLDER_TEXT, token)
    if IMAGE_TEXT in text:
        return text.replace(IMAGE_TEXT, token)
    return text + ("\n" + token) * images if behind else (token + "\n") * images + text


def messages_of(template: Template, texts: Iterable[Message]) -> list[tuple[str, Message]]:
    """Alternating texts, the user's first -> [(role, text)] as `pieces` takes them."""
    return [(template.roles[i % 2], text) for i, text in enumerate(texts)]


def render(template: Template, messages: Sequence[tuple[str, Message]]) -> str:
    """The prompt of a dialogue [(role, message)]. An empty message leaves its turn open.

    >>> render(template("mistral_instruct"), [("USER", "Hi"), ("ASSISTANT", None)])
    '[INST] Hi [/INST]'
    """
    return "".join(piece.text for piece in pieces(template, messages))


def pieces(template: Template, messages: Sequence[tuple[str, Message]]) -> list[Piece]:
    """The rendered dialogue, cut where answers (the second message, the fourth ...) begin and end."""
    texts = [
        (role, message[0] if isinstance(message, tuple) else message, bool(message))
        for role, message in _image_first(template, messages)
    ]
    return [piece for piece in _STYLES[template.style](template, texts) if piece.text]


def _image_first(template: Template, messages: Sequence[tuple[str, Message]]) -> list[tuple[str, Message]]:
    """A first message that comes as (text, image, mode) gets its image token in front, or as an exchange of
    its own (mmtag); LLaVAR takes its text as it is.
    """
    messages = list(messages)
    if not messages or not isinstance(messages[0][1], tuple) or template.origin == "llavar":
        return messages
    role, (text, *_) = messages[0]
    text = text.replace(IMAGE_TEXT, "").strip()
    if "mmtag" in template.version:
        shown = [(template.roles[0], f"<Image>{IMAGE_TEXT}</Image>"), (template.roles[1], "Received.")]
        return shown + [(role, text)] + messages[1:]
    return [(role, f"{IMAGE_TEXT}\n{text}")] + messages[1:]


def _single(t: Template, texts: list) -> list[Piece]:
    out = [Piece(t.system + t.sep)]
    for i, (role, text, said) in enumerate(texts):
        out += [Piece(role + ":"), Piece(f" {text}{t.sep}" if said else "", i % 2 == 1)]
    return out


def _two(t: Template, texts: list) -> list[Piece]:
    out = [Piece(t.system + t.sep)]
    for i, (role, text, said) in enumerate(texts):
        out += [Piece(role + ":"), Piece(f" {text}{(t.sep, t.sep2)[i % 2]}" if said else "", i % 2 == 1)]
    return out


def _mpt(t: Template, texts: list) -> list[Piece]:
    out = [Piece(t.system + t.sep)]
    for i, (role, text, said) in enumerate(texts):
        out += [Piece(role), Piece(text + t.sep if said else "", i % 2 == 1)]
    return out


def _llama_2(t: Template, texts: list) -> list[Piece]:
    out = []
    for i, (role, text, said) in enumerate(texts):
        if i == 0 and (not said or role != t.roles[0]):
            raise TemplateError(f"a {t.version} dialogue must begin with a message of {t.roles[0]} that is not empty")
        if i == 0 and t.system:
            text = f"<<SYS>>\n{t.system}\n<</SYS>>\n\n{text}"
        if said:
            out.append(Piece(f" {text} {t.sep2}", True) if i % 2 else Piece(f"{t.sep}[INST] {text} [/INST]"))
    # The tokenizer adds BOS, so the first "<s>" goes.
    return [Piece(out[0].text.removeprefix(t.sep)), *out[1:]] if out else out


def _plain(t: Template, texts: list) -> list[Piece]:
    out = [Piece(t.system)]
    for i, (_, text, said) in enumerate(texts):
        if said and i % 2 and t.sep2 is None:
            raise TemplateError("a plain template cannot close an answer: leave it open, or use another template")
        out.append(Piece(text + (t.sep, t.sep2)[i % 2] if said else "", i % 2 == 1))
    return out


_STYLES = {"SINGLE": _single, "TWO": _two, "MPT": _mpt, "LLAMA_2": _llama_2, "PLAIN": _plain}
