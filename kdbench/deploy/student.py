"""Student of a finished run, ready to be used: its network, how an input is read for it, what its answers mean."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from kdbench.arguments import Trust, trusting
from kdbench.build import ConfigCatalogue, load_data
from kdbench.data.batches import scale_and_shift
from kdbench.data.bundle import Bundle
from kdbench.data.decode import decode
from kdbench.data.pixels import RGB, as_seen, ground, span
from kdbench.data.resize import centred
from kdbench.data.tokenise import SEPARATOR, TOKENIZER, Bytes, Encoded, Tokeniser, encode, kept_tokeniser
from kdbench.engine.checkpoint import BEST, STUDENT
from kdbench.engine.evaluate import evaluating
from kdbench.errors import UserError, read_from, require
from kdbench.files import read_object
from kdbench.models.adopt import Adopted
from kdbench.models.interface import Interface
from kdbench.runs.adapt import as_trained, interface_of_run
from kdbench.runs.folder import network_of_run, read_config
from kdbench.types import CorpusInfo, ImageInfo, Info, TokenInfo

log = logging.getLogger("kdbench")
Input = str | Path | Image.Image | np.ndarray | Tensor


class Decoding(NamedTuple):
    """How a picture becomes pixels, as the run's dataset.background and dataset.value_range say."""

    background: RGB
    value_range: tuple[float, float] | None


@dataclass(frozen=True)
class Student:
    """A finished run's network in evaluation mode on the CPU, and what is needed to ask it.

    `network(x)` takes what `transform` returns, stacked to [B, ...], and returns kdbench.types.Outputs.
    """

    name: str
    folder: Path
    network: nn.Module
    info: Info
    interface: Interface
    decoding: Decoding
    pairs: bool = False  # whether it classifies two texts at once; a tab stands between them
    tokeniser: Tokeniser | None = None  # of texts; None, too, where it was not kept and cannot be learnt again

    @property
    def classes(self) -> tuple[str, ...]:
        """Names in the order of the logits; numbers as text where the data named none."""
        return self.interface.classes or tuple(map(str, range(self.info.num_classes)))

    @property
    def embeds(self) -> bool:
        """Whether it answers with an embedding: data of such runs (dataset=photos) name dimensions, and no classes."""
        return self.classes[0] == "dimension 0"

    def raw(self, given: Input) -> Tensor:
        """One input as the data hold it: uint8 [C, size, size], float32 [D], or int64 [L].

        A picture: its path, a PIL image, or uint8 pixels (array [H, W] or [H, W, 3], tensor [C, H, W]). It is turned
        upright, resized and cut as the run's own were. A text, where the network classifies texts: itself. Raises
        UserError for what is none, or of another shape.
        """
        if isinstance(self.info, TokenInfo) and isinstance(given, str):
            return self.read([given]).ids[0]
        if not isinstance(self.info, ImageInfo):
            return self._numbers(given)
        if isinstance(given, (str, Path)):
            pixels = decode(str(given), self.info.in_channels, *self.decoding)
        elif isinstance(given, Tensor):
            pixels = self._channels(given)
        else:
            image = given if isinstance(given, Image.Image) else _picture(given)
            seen, _ = as_seen(image, self.info.in_channels, *self.decoding)
            pixels = torch.from_numpy(np.array(seen)).reshape(seen.height, seen.width, -1).permute(2, 0, 1)
        size = self.info.image_size
        return centred(pixels, self.interface.resize or size, size)

    def read(self, texts: Sequence[str]) -> Encoded:
        """Texts as a network that classifies them takes them: ids int64 [N, length], and how many were cut there.

        Raises UserError where the run's tokenizer is not known, and for one text where it reads two.
        """
        assert isinstance(self.info, TokenInfo)
        if self.pairs:
            texts = [text if SEPARATOR in text else text.replace("\t", SEPARATOR, 1) for text in texts]
            alone = next((text for text in texts if SEPARATOR not in text), None)
            require(alone is None, "text", alone, "two texts with a tab between them, as the run's own are")
        ids, cut = encode(self.speaks(), texts, self.info.length)
        return Encoded(F.pad(ids, (0, self.info.length - ids.shape[1])), cut)

    def speaks(self) -> Tokeniser:
        """Its tokeniser. Raises UserError where that was not kept and cannot be learnt again."""
        if self.tokeniser is None:
            raise UserError(f"{self.folder}: its {TOKENIZER} is not there, so that it reads no text; train it again")
        return self.tokeniser

    def transform(self, given: Input) -> Tensor:
        """One input [C, size, size], [D] or [L] as the network takes it, normalised as it was trained.

        Raises UserError as `raw` does, and for a run of the first edition, which did not keep mean and std.
        """
        return self.normalised(self.raw(given)[None])[0]

    def normalised(self, raw: Tensor) -> Tensor:
        """A batch of `raw` inputs as the network takes it."""
        if isinstance(self.info, TokenInfo | CorpusInfo):
            return raw
        mean, std = self._known()
        scale, shift = scale_and_shift(mean, std, 255 if isinstance(self.info, ImageInfo) else 1)
        shape = [1, -1, *[1] * (raw.dim() - 2)]
        return raw.float() * scale.view(shape) + shift.view(shape)

    def predict(self, inputs: Sequence[Input]) -> Tensor:
        """Probabilities [N, classes] of several inputs; embeddings [N, dimensions] of a network that embeds.

        Raises UserError for none, and for what is no list.
        """
        several = not isinstance(inputs, (str, Path, Image.Image)) and len(inputs) > 0
        require(several, "inputs", "" if several else inputs, "a list of one input or more")
        with evaluating(self.network):
            batch = self.normalised(torch.stack([self.raw(one) for one in inputs]))
            answers = self.network(batch).logits.float()
            return answers if self.embeds else answers.softmax(1)

    def portable(self) -> Portable:
        """The network for programs that know nothing of kdbench."""
        mean, std = ((), ()) if isinstance(self.info, TokenInfo | CorpusInfo) else self._known()
        return Portable(self.network, mean, std, isinstance(self.info, ImageInfo)).eval()

    def example(self, count: int) -> Tensor:
        """Made-up inputs for `portable`, always the same."""
        made = self.info.example(count)
        return made.float() / 255 if made.dtype == torch.uint8 else made

    def about(self) -> dict[str, object]:
        """What a program must know to use an exported file; plain JSON."""
        kind = type(self.info).__name__.removesuffix("Info").lower()
        takes = {
            "image": "float32 [N, channels, size, size], pixel / 255; the mean and std are inside",
            "vector": "float32 [N, dimensions] as they were measured; the mean and std are inside",
            "token": "int64 [N, length], padded with 0",
            "corpus": "int64 [N, context + predicted], 0 before a text begins; logits [N predicted, classes]",
        }[kind]
        if self.tokeniser is not None:
            takes += f"; the ids of {TOKENIZER}{' + 1' if self.tokeniser.shift else ''}"
        kept = self.interface.kept()
        kept |= {"classes": list(self.classes)}
        gives = "embeddings [N, dimensions]" if self.embeds else "logits [N, classes]"
        return {"network": self.name, "kind": kind, "input": takes, "output": gives,
                "info": {key: size for key, size in self.info._asdict().items() if key != "words"}, **kept}  # fmt: skip

    def _known(self) -> tuple[Sequence[float], Sequence[float]]:
        mean, std = self.interface.mean, self.interface.std
        if mean is None or std is None:
            raise UserError(f"{self.folder}: this run did not keep the mean and std of its data; train it again")
        return mean, std

    def _numbers(self, given: Input) -> Tensor:
        wanted = torch.int64 if isinstance(self.info, TokenInfo | CorpusInfo) else torch.float32
        length = self.info.example(1).shape[1]
        allowed = f"{length} numbers, as {self.folder} was trained on"
        if isinstance(given, (str, Path, Image.Image)):
            raise UserError("input", type(given).__name__, allowed)
        made = torch.as_tensor(given).to(wanted)
        require(made.shape == (length,), "input", f"an array of the shape {list(made.shape)}", allowed)
        return made

    def _channels(self, pixels: Tensor) -> Tensor:
        assert isinstance(self.info, ImageInfo)
        fits = pixels.dtype == torch.uint8 and pixels.dim() == 3 and pixels.shape[0] in (1, self.info.in_channels)
        allowed = f"uint8 [{self.info.in_channels}, H, W]"
        require(fits, "input", f"{pixels.dtype} {list(pixels.shape)}", allowed)
        return pixels.expand(self.info.in_channels, -1, -1)


class Portable(nn.Module):
    """Pixels / 255 (or a vector, or token ids) in, logits [N, C] out: a network with its normalisation inside."""

    scale: Tensor
    shift: Tensor

    def __init__(self, network: nn.Module, mean: Sequence[float], std: Sequence[float], images: bool) -> None:
        super().__init__()
        self.network = network.net if isinstance(network, Adopted) else network
        scale, shift = scale_and_shift(mean, std, 1)
        shape = [1, -1, 1, 1] if images else [1, -1]
        self.normalises = bool(mean)
        self.register_buffer("scale", scale.view(shape))
        self.register_buffer("shift", shift.view(shape))

    def forward(self, inputs: Tensor) -> Tensor:
        found = self.network(inputs * self.scale + self.shift if self.normalises else inputs)
        return found if isinstance(found, Tensor) else found.logits


def load(run: str | Path, trust: bool = False) -> Student:
    """The student of a finished run: a run folder, or a file of weights in one (best.safetensors).

    trust: run the code that the folder names where it is not kdbench's own. Raises UserError for a folder that holds no
    finished student, or that names code that is not trusted.
    """
    path = Path(run)
    named = path.name in (STUDENT, BEST)
    folder, weights = (path.parent, path.name) if named else (path, STUDENT)
    require(not folder.is_file(), "run", str(run), f"a run folder, or {STUDENT} or {BEST} in one")
    return open_student(folder, weights, Trust(None) if trust else trusting())


def open_student(folder: Path, weights: str, trust: Trust) -> Student:
    """`load` with what may be run said more exactly."""
    spec, network, info = network_of_run(folder, ConfigCatalogue(trust), weights)
    tree = read_config(folder, "dataset")["dataset"]
    with read_from(folder / "config.yaml"):
        decoding = Decoding(ground(tree.get("background") or "white"), span(tree.get("value_range")))
    own = interface_of_run(folder)
    pairs = isinstance(tree.get("text"), list) and len(tree["text"]) == 2
    student = Student(spec.name, folder, network.eval(), info, own, decoding, pairs)
    if not isinstance(info, TokenInfo | CorpusInfo):
        return student
    return replace(student, tokeniser=_kept(folder, own) or _learnt_again(student, trust))


def _kept(folder: Path, own: Interface) -> Tokeniser | None:
    """The tokeniser that lies beside the weights. Raises UserError if it is not the one that they were trained with."""
    path = folder / TOKENIZER
    if not path.exists():
        return None
    found = kept_tokeniser(read_object(path), str(path))
    if own.vocabulary != found.name:
        raise UserError(f"{path}: damaged: these are not the tokens that the network was trained with")
    return found


def _learnt_again(student: Student, trust: Trust) -> Tokeniser | None:
    """The tokeniser of a run that kept none, from its data; None, and a log line, where these are not here."""
    if student.interface.vocabulary == Bytes.name:
        return Bytes()
    try:
        return data_of(student, trust).tokeniser
    except (UserError, OSError) as error:
        log.warning("%s kept no %s, and it cannot be learnt again: %s", student.folder, TOKENIZER, error)
        return None


def data_of(student: Student, trust: Trust) -> Bundle:
    """The data of the student's run, read again. Raises UserError where they are not here or are others now."""
    source = student.folder / "config.yaml"
    node = read_config(student.folder, "dataset")["dataset"]
    trust.check(node, str(source))
    with read_from(source):
        data = load_data(json.dumps(node))
    network, data = as_trained(student.network, student.info, student.folder, data)
    require(network is student.network, "dataset", data.name, "what the run was trained on, with the same classes")
    return data


def options_of(student: Student) -> Mapping[str, Any]:
    """The run's `dataset` node."""
    return read_config(student.folder, "dataset")["dataset"]


def batched(count: int, size: int) -> Iterator[range]:
    """0..count in ranges of at most `size`."""
    yield from (range(first, min(first + size, count)) for first in range(0, count, size))


def _picture(pixels: np.ndarray) -> Image.Image:
    try:
        return Image.fromarray(pixels)
    except (TypeError, ValueError, AttributeError) as error:
        shape = getattr(pixels, "shape", type(pixels).__name__)
        raise UserError("input", shape, "the path of a picture, a PIL image, or uint8 pixels [H, W, 3]") from error
