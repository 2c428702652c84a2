"""Requests of a form that was seen before: read without being parsed.

What one caller sends of one model differs from call to call in little: the request's id, the sequence it belongs to, the bytes of
its tensors. All else, model and names and shapes and wanted outputs, is the same bytes again. So a request is cut into its fields,
which takes a few µs in all, and what the unchanging ones mean is looked up; only a form that is new is parsed and checked in full.

Knows protobuf's wire format and ModelInferRequest's fields; what a form means is told by inference.py.
"""

from __future__ import annotations

from collections.abc import Sequence as Listed

from contract.bundle import Tensor
from protos import inference_pb2 as pb
from server.catalog import Model
from server.inputs import Sizes
from server.rpc.face import Face
from server.rpc.parameters import Parameters
from server.rpc.wire import Values, abouts, bytes_of, varint

# Field numbers of ModelInferRequest, as the tags that they begin with: all are of wire type 2, a length and so many bytes.
_NAME, _VERSION, _ID, _PARAMETER, _INPUT, _OUTPUT, _RAW = 0x0A, 0x12, 0x1A, 0x22, 0x2A, 0x32, 0x3A
_FORM = frozenset((_NAME, _VERSION, _INPUT, _OUTPUT))
_SEQUENCE = b"\x0a\x0bsequence_id\x12"  # a parameter's key, and what its value begins with
_TURN = b"\x0a\x04turn\x12"
MOST = 1024  # forms, and 16 times as many ids of sequences; then all are forgotten
LONGEST = 16 << 10  # bytes of a form that is remembered
LONGEST_ID = 1 << 10  # bytes of the parameter of a sequence's id: no session's is as long

Cut = tuple[tuple[bytes, ...], bytes, bytes, list[bytes]]
"""A request's form, its id, its parameter `sequence_id` (both empty where there is none), and its raw tensors."""


def cut(data: bytes) -> Cut | None:
    """A request in its fields; None where it is not of the usual kind, or no request at all: then it is to be parsed."""
    form: list[bytes] = []
    raw: list[bytes] = []
    id = sequence = b""
    at, end = 0, len(data)
    try:
        while at < end:
            start = at
            tag = data[at]
            length = data[at + 1]
            begin = at + 2
            if length > 127:
                length &= 127
                shift = 7
                while True:
                    more = data[begin]
                    begin += 1
                    length |= (more & 127) << shift
                    if more < 128:
                        break
                    shift += 7
                    if shift > 28:
                        return None
            at = begin + length
            if at > end:
                return None
            field = data[begin:at]
            if tag == _RAW:
                raw.append(field)
            elif tag == _PARAMETER:
                if field.startswith(_SEQUENCE):
                    if sequence:
                        return None
                    sequence = field
                elif field.startswith(_TURN):
                    return None  # another in each request
                else:
                    form.append(data[start:at])
            elif tag in _FORM:
                form.append(data[start:at])
            elif tag == _ID:
                id = field
            else:
                return None
    except IndexError:
        return None
    return tuple(form), id, sequence, raw


class Usual:
    """What a form means: the model as it was found, the parameters but for the sequence, the outputs wanted; and of each raw tensor
    the length that belongs to its shape."""

    __slots__ = ("_abouts", "face", "given", "lengths", "model", "name", "sizes", "version", "wanted")

    def __init__(
        self, request: pb.ModelInferRequest, model: Model, face: Face, given: Parameters, wanted: Listed[Tensor], steps: int
    ) -> None:
        self.name = request.model_name
        self.version = request.model_version
        self.model = model
        self.face = face
        self.given = given
        self.wanted = tuple(wanted)
        self.sizes = Sizes(1, steps)
        self.lengths = tuple(len(raw) for raw in request.raw_input_contents)
        self._abouts: dict[tuple[tuple[int, ...], ...], bytes] = {}

    def response(self, id: bytes, parameters: bytes, outputs: Values) -> bytes:
        """A serialised ModelInferResponse, as wire.response makes it."""
        shapes = []
        values: list[bytes] = []
        for tensor in self.wanted:
            data, shape = bytes_of(tensor, outputs)
            shapes.append(shape)
            values += (b"\x32", varint(len(data)), data)
        of = tuple(shapes)
        about = self._abouts.get(of)
        if about is None:
            about = abouts(self.wanted, of)
            if len(self._abouts) < MOST:
                self._abouts[of] = about
        if id:
            return b"".join((self.face.head, b"\x1a", varint(len(id)), id, parameters, about, *values))
        return b"".join((self.face.head, parameters, about, *values))


class Forms:
    """The forms that were seen, and sequences' ids as text."""

    def __init__(self) -> None:
        self._forms: dict[tuple[bytes, ...], Usual] = {}
        self._sequences: dict[bytes, str] = {}

    def find(self, form: tuple[bytes, ...], raw: Listed[bytes]) -> Usual | None:
        """What a form means, where the raw tensors are as long as it says."""
        usual = self._forms.get(form)
        if usual is None or len(raw) != len(usual.lengths):
            return None
        for data, length in zip(raw, usual.lengths, strict=True):
            if len(data) != length:
                return None
        return usual

    def learn(self, form: tuple[bytes, ...], usual: Usual) -> None:
        """Remember a form, unless it is so long that forms like it would fill memory."""
        if sum(map(len, form)) > LONGEST:
            return
        if len(self._forms) >= MOST:
            self._forms = {}
        self._forms[form] = usual

    def forget(self, form: tuple[bytes, ...]) -> None:
        self._forms.pop(form, None)

    def sequence(self, parameter: bytes) -> str | None:
        """The id in a parameter `sequence_id`; None where it was not learnt."""
        return self._sequences.get(parameter)

    def learn_sequence(self, parameter: bytes, id: str) -> None:
        if len(parameter) > LONGEST_ID:
            return
        if len(self._sequences) >= 16 * MOST:
            self._sequences = {}
        self._sequences[parameter] = id


def echoed(parameter: bytes) -> bytes:
    """A request's parameter as a response's: the same entry of the same field of both."""
    return b"\x22" + varint(len(parameter)) + parameter
