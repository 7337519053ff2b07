"""`python -m vlm_jax chat`: a conversation in the terminal, images by command, the answer appearing as it is made.

/image PATH   show an image with the next message        /clear   forget the conversation
/use NAME     answer with these adapters from now on     /help    these lines
                                                         /exit    leave (so does the end of the input)
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from typing import Any, TextIO

from vlm_jax.data.image_source import ImageSource
from vlm_jax.data.templates import with_images
from vlm_jax.generate.adapters import adapter_flags, named_weights, switch_of
from vlm_jax.generate.decode import Decoding, Generator
from vlm_jax.generate.load import Loaded, load_model, usual_mesh
from vlm_jax.generate.rows import Picture

HELP = """/image PATH   show an image with the next message
/use NAME     answer with this adapter, with several (NAME:WEIGHT NAME:WEIGHT), or with none (base)
/clear        forget the conversation
/exit         leave"""


def chat(
    model: str,
    *,
    image: Sequence[str] = (),
    template: str = "",
    dtype: str = "",
    seed: int = 0,
    stop: Sequence[str] = (),
    quant: str = "",
    adapter: Sequence[str] = (),
    use: Sequence[str] = (),
    **decoding: Any,
) -> None:
    """Talk on stdin and stdout; `image` files are shown with the first message. decoding: further fields of generate.decode.Decoding.

    quant, adapter, use: see generate.load.load_model and generate.adapters.adapter_flags.
    """
    how, mesh = Decoding(stop=tuple(stop), **decoding), usual_mesh()
    loaded = load_model(
        model, dtype=dtype, mesh=mesh, template_name=template, quant=quant, **adapter_flags(adapter, use)
    )
    conversation = Conversation(loaded, loaded.generator(dtype=dtype, mesh=mesh, batch_size=1), how, seed)
    for path in image:
        conversation.show(path)
    talk(conversation, sys.stdin, sys.stdout)


class Conversation:
    """Texts said so far (question, answer, question, ...), the images they name, and images waiting for the next question."""

    def __init__(self, loaded: Loaded, generator: Generator, how: Decoding, seed: int = 0):
        self.loaded, self.generator, self.seed = loaded, generator, seed
        self.how = dataclasses.replace(how, stop=tuple(how.stop) + loaded.stop)
        self.clear()

    def clear(self) -> None:
        """Forget everything said and shown."""
        self.texts: list[str] = []
        self.pictures: list[Picture] = []
        self.waiting: list[Picture] = []

    def use(self, flags: Sequence[str]) -> None:
        """Answer with other adapters from now on: NAME or NAME:WEIGHT, or base."""
        switch = switch_of(self.generator.adapters)
        self.generator.use(named_weights(flags, switch.names))

    def show(self, path: str) -> None:
        """Show an image with the next message; ImageError if it cannot be read."""
        self.waiting.append(self.loaded.picture(ImageSource(path)))

    def ask(self, text: str, write: Any) -> str:
        """The answer, its pieces given to `write` as they come. ValueError if the template cannot take the message."""
        said = with_images(text, len(self.waiting), behind=self.loaded.template.origin == "llavar")
        pictures = self.pictures + self.waiting
        prompt = self.loaded.prompt([*self.texts, said], pictures)
        answer = ""
        for piece in self.generator.stream(prompt, self.how, self.seed + len(self.texts)):
            write(piece)
            answer += piece
        self.texts += [said, answer]
        self.pictures, self.waiting = pictures, []
        return answer


def talk(conversation: Conversation, lines: TextIO, out: TextIO) -> None:
    """Read messages and commands until /exit or the end of `lines`. Prompts are shown only to a terminal."""

    def write(text: str) -> None:
        out.write(text)
        out.flush()

    shown = lines.isatty()
    if shown:
        write(HELP + "\n")
    while True:
        if shown:
            write("> ")
        line = lines.readline()
        command, _, rest = line.strip().partition(" ")
        if not line or command == "/exit":
            return
        try:
            if command == "/clear":
                conversation.clear()
            elif command == "/help":
                write(HELP + "\n")
            elif command == "/image":
                conversation.show(rest.strip())
            elif command == "/use":
                conversation.use(rest.split())
            elif command:
                conversation.ask(line.strip(), write)
                write("\n")
        except ValueError as error:
            write(f"{error}\n")
