"""Files of a student for programs without kdbench, each checked against the network that it was made of."""

from __future__ import annotations

import importlib
import io
import json
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kdbench.arguments import Trust
from kdbench.data.batches import EvaluationBatches, Loading
from kdbench.data.blocks import next_tokens
from kdbench.data.bundle import Bundle, Split, are_images
from kdbench.data.tokenise import TOKENIZER
from kdbench.deploy.student import Student, data_of
from kdbench.engine.checkpoint import save_state
from kdbench.errors import UserError, require
from kdbench.files import write_atomically, write_json
from kdbench.models.adopt import first_line

ENDINGS = {"onnx": ".onnx", "pt2": ".pt2", "torchscript": ".torchscript.pt", "safetensors": ".safetensors"}
ABOUT = "export.json"
_CHECKED = 256  # inputs that a file is compared on
_CALIBRATION = 512  # training inputs that show int8 the range of every activation
_CLOSE = 1e-3  # of logits, relative to the largest: other kernels add in other orders

Runner = Callable[[Tensor], Tensor]  # inputs as the exported file takes them -> logits


class Inputs(NamedTuple):
    """What files are checked on."""

    values: Tensor  # as an exported file takes them
    what: str  # "test images", "made-up images"


class Exported(NamedTuple):
    """One written file and how near it is to the network."""

    path: Path
    bytes: int
    difference: float  # the largest of a logit
    agreement: float  # share of the inputs with the same answer
    accuracy: tuple[float, float] | None = None  # of the network and of the file on the test set; int8 only

    def as_json(self) -> dict[str, object]:
        return {**self._asdict(), "path": self.path.name}


def export(student: Student, formats: list[str], folder: Path, trust: Trust, int8: bool = False) -> list[Exported]:
    """Write the student as `formats` (of ENDINGS), and with `int8` an ONNX file of 8-bit integers; export.json last.

    Every file takes pixels / 255 (or a vector, or token ids) and returns logits: the normalisation is inside, and names
    of classes, sizes and the tokenizer of texts are in its metadata. Each is read back and compared with the network on
    test inputs, on made-up ones where the data are not here. Raises UserError for a format whose package is not
    installed, for data that int8 needs and that are not here, for a network that a format cannot hold, and for a file
    that answers differently, which is removed.
    """
    for name in [*formats, *(["int8"] if int8 else [])]:
        refuse_missing(name)
    data = _data(student, trust, needed=int8)
    inputs = _checked_on(student, data)
    stem = folder / student.name.replace("/", "_")
    folder.mkdir(parents=True, exist_ok=True)
    done = []
    for name in formats:
        path = stem.with_name(stem.name + ENDINGS[name])
        done.append(_made(name, student, path, inputs))
    if int8:
        assert data is not None
        done.append(_int8(student, stem, data, inputs))
    about = {**student.about(), "checked on": f"{len(inputs.values)} {inputs.what}"}
    if student.tokeniser is not None:
        write_json(folder / TOKENIZER, student.tokeniser.kept())
    write_json(folder / ABOUT, about | {"files": [one.as_json() for one in done]})
    return done


def _made(name: str, student: Student, path: Path, inputs: Inputs) -> Exported:
    try:
        _WRITERS[name](student, path)
        return _compared(student, path, read_back(path), inputs)
    except (OSError, UserError):
        raise
    except Exception as error:  # exporters and runtimes raise as many kinds as there are
        path.unlink(missing_ok=True)
        known = f"--{name}: {student.name} cannot be exported for any number of inputs: {first_line(error)}"
        raise UserError(f"{known} (in code of your own, x.shape[0] in place of len(x))") from error


def refuse_missing(name: str) -> None:
    """Raise a UserError for a format whose packages are not installed."""
    for package in ("onnx", "onnxscript", "onnxruntime") if name in ("onnx", "int8") else ():
        try:
            importlib.import_module(package)
        except ImportError as error:
            raise UserError(f"--{name}: {package} is not installed: pip install 'kdbench[export]'") from error


def read_back(path: Path) -> Runner | None:
    """An exported file as a function of inputs, run as a program without kdbench would run it; None: weights alone."""
    if path.suffix == ".onnx":
        return _onnx_runner(path)
    if path.suffix == ".pt2":
        return torch.export.load(path).module()
    with _quiet():
        return torch.jit.load(path) if path.suffix == ".pt" else None


def _data(student: Student, trust: Trust, needed: bool) -> Bundle | None:
    try:
        return data_of(student, trust)
    except (UserError, OSError) as error:
        if needed:
            raise UserError(f"--int8: its accuracy is measured on the run's own data: {error}") from error
        return None


def _checked_on(student: Student, data: Bundle | None) -> Inputs:
    if data is None:
        return Inputs(student.example(_CHECKED), "made-up inputs")
    values = next(raw_batches(data, data.test, _CHECKED))[0]
    return Inputs(values, "test inputs")


def raw_batches(data: Bundle, split: Split, size: int, most: int | None = None) -> Iterator[tuple[Tensor, Tensor]]:
    """Inputs as an exported file takes them, and labels (-1: none), of (`most` places of) a split."""
    split = split if most is None or most >= len(split) else split.select(spread(len(split), most))
    batches = EvaluationBatches(data, split, Loading(batch_size=size))
    place = torch.arange(batches.size)
    for raw, (first, last) in zip(batches.source.epoch(place, place, batches.bounds), batches.bounds):
        if data.blocks is not None:
            yield next_tokens(raw[:, : data.blocks.length], data.blocks.predicted)
        else:
            yield raw.float() / 255 if are_images(split.inputs) else raw, split.labels[first:last]


def spread(count: int, most: int) -> Tensor:
    """`most` places evenly over `count`: sets are often ordered by class."""
    return torch.linspace(0, count - 1, most).long()


def _compared(student: Student, path: Path, run: Runner | None, inputs: Inputs) -> Exported:
    """How near a file is; one that answers differently is removed and refused."""
    if run is None:
        return Exported(path, path.stat().st_size, 0.0, 1.0)
    with torch.no_grad():
        expected, found = student.portable()(inputs.values), run(inputs.values)
    difference = float((expected - found).abs().max())
    agreement = float((expected.argmax(1) == found.argmax(1)).float().mean())
    if not difference <= _CLOSE * max(1.0, float(expected.abs().max())):
        path.unlink()
        raise UserError(f"{path.name}: its logits differ by {difference:.3g} from the network's, so it was not kept")
    return Exported(path, path.stat().st_size, difference, agreement)


def write_onnx(student: Student, path: Path) -> None:
    """By torch's exporter (torch.export, then onnxscript), for any number of inputs."""
    import onnx

    batch = torch.export.Dim("batch", min=1)
    with _quiet():
        program = torch.onnx.export(
            student.portable(), (student.example(2),), dynamo=True, input_names=["input"], output_names=["logits"],
            dynamic_shapes={"inputs": {0: batch}}, verbose=False,
        )  # fmt: skip
    assert program is not None
    model = program.model_proto
    _describe(model, student)
    write_atomically(path, lambda temporary: onnx.save(model, str(temporary)))


def _describe(model: Any, student: Student) -> None:
    for key, value in _inside(student).items():
        entry = model.metadata_props.add()
        entry.key, entry.value = key, value if isinstance(value, str) else json.dumps(value)


def _write_pt2(student: Student, path: Path) -> None:
    """A torch.export archive, for any number of inputs."""
    shapes = {"inputs": {0: torch.export.Dim("batch", min=1)}}
    with _quiet():
        program = torch.export.export(student.portable(), (student.example(2),), dynamic_shapes=shapes)
        refuse_fixed(program)
        about = {"about.json": json.dumps(_inside(student))}
        made = io.BytesIO()
        torch.export.save(program, made, extra_files=about)
    write_atomically(path, lambda temporary: temporary.write_bytes(made.getvalue()))


def refuse_fixed(program: torch.export.ExportedProgram) -> None:
    """Raise a ValueError for a program whose inputs or logits have a number of rows of their own: which code makes them
    so differs between torch's versions, and so does whether its exporter says it."""
    for node in program.graph.nodes:
        ends = node.all_input_nodes if node.op == "output" else [node]
        if node.op == "output" or node.name in program.graph_signature.user_inputs:
            rows = [end.meta["val"].shape[0] for end in ends if isinstance(end.meta.get("val"), Tensor)]
            fixed = next((row for row in rows if not isinstance(row, torch.SymInt)), None)
            if fixed is not None:
                raise ValueError(f"it is made for {fixed} inputs at a time")


def _write_torchscript(student: Student, path: Path) -> None:
    with _quiet(), torch.no_grad():
        traced = torch.jit.trace(student.portable(), student.example(2), check_trace=False)
        about = {"about.json": json.dumps(_inside(student))}
        write_atomically(path, lambda temporary: torch.jit.save(traced, str(temporary), _extra_files=about))


def _write_safetensors(student: Student, path: Path) -> None:
    save_state(path, student.network.state_dict(), _inside(student))


def _inside(student: Student) -> dict[str, object]:
    """What a file says of itself: of texts their tokenizer, too, which lies beside the files as well."""
    tokenizer = {} if student.tokeniser is None else {TOKENIZER: student.tokeniser.kept()}
    return student.about() | tokenizer


_WRITERS: dict[str, Callable[[Student, Path], None]] = {
    "onnx": write_onnx, "pt2": _write_pt2, "torchscript": _write_torchscript, "safetensors": _write_safetensors,
}  # fmt: skip


def _onnx_runner(path: Path) -> Runner:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda inputs: torch.from_numpy(session.run(None, {name: inputs.numpy()})[0])


class _Calibration:
    """Training inputs one batch at a time, as onnxruntime.quantization asks for them."""

    def __init__(self, data: Bundle) -> None:
        self._batches = raw_batches(data, data.train, 64, _CALIBRATION)

    def get_next(self) -> dict[str, object] | None:
        batch = next(self._batches, None)
        return None if batch is None else {"input": batch[0].numpy()}


def _int8(student: Student, stem: Path, data: Bundle, inputs: Inputs) -> Exported:
    """Weights and activations as 8-bit integers (onnxruntime, static); accuracy on the test set."""
    from onnxruntime.quantization import QuantFormat, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    path, plain = stem.with_name(stem.name + ".int8.onnx"), stem.with_name(f".{stem.name}.onnx.tmp")
    try:
        write_onnx(student, plain)
        with _quiet():
            quant_pre_process(str(plain), str(plain), skip_symbolic_shape=True)
            # A language model's last layer may be its embedding, whose rows and columns change places: one scale.
            channels = data.blocks is None
            form = QuantFormat.QDQ
            quantize_static(str(plain), str(path), _Calibration(data), quant_format=form, per_channel=channels)
        before, after, run = 0, 0, _onnx_runner(path)
        network = student.portable()
        with torch.no_grad():
            for values, labels in raw_batches(data, data.test, 256):
                before += int((network(values).argmax(1) == labels).sum())  # no answer is -1, no label
                after += int((run(values).argmax(1) == labels).sum())
            expected, found = network(inputs.values), run(inputs.values)
    finally:
        plain.unlink(missing_ok=True)
    same = float((expected.argmax(1) == found.argmax(1)).float().mean())
    count = len(data.test.wanted)
    require(count > 0, "--int8", count, "for data with a test set")
    difference = float((expected - found).abs().max())
    return Exported(path, path.stat().st_size, difference, same, (before / count, after / count))


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what exporters say of themselves; what goes wrong is raised."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
