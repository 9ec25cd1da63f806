"""The vocabulary: what the parts of splitfrozen hand to each other.

Letters for shapes, used in every docstring:

    B  samples in a batch          D  width of the model (hidden size)
    T  tokens of one sample        L  blocks in the model
    n  depth: blocks applied       M  cut: the common depth; LoRA lives on blocks[M:L]
    V  size of the vocabulary      C  classes

Messages that travel are msgspec structs with a fixed field set; an unknown field is an error.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal, Protocol

import numpy as np
import numpy.typing as npt
from msgspec import Meta, Struct

Ints = npt.NDArray[np.int32]
Floats = npt.NDArray[np.float32]

IGNORED = -100
"""Target of a position that carries no loss (the value torch's cross-entropy ignores)."""

PROTOCOL = 1
"""Version of the HTTP interface and of the frame; both sides must agree."""

TaskKind = Literal["classification", "causal_lm", "image"]
Precision = Literal["float32", "float16", "int8"]
Count = Annotated[int, Meta(ge=0)]
Positive = Annotated[int, Meta(ge=1)]
Sha256 = Annotated[str, Meta(pattern="^[0-9a-f]{64}$")]


# --- what a device computes ------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Sample:
    """One training sample, ready for the front.

    Attributes:
        id: number of the sample on its device: 0, 1, 2 ... over the good rows, in file order.
        tokens: int32 [T] token ids; empty for an image.
        token_types: int32 [T] segment ids (BERT's pairs), or None.
        pixels: float32 [channels, height, width], normalised; None for text.
        targets: int32 [1], the label, for classification and images; int32 [T] for causal_lm:
            `targets[t]` is the token to predict at position t, or IGNORED.
        length: T, what the sample costs; for an image its number of patches plus prefix tokens.
        truncated: whether the row had more than `TaskSpec.max_tokens` and lost its end.
    """

    id: int
    tokens: Ints
    token_types: Ints | None
    pixels: Floats | None
    targets: Ints
    length: int
    truncated: bool = False


@dataclass(frozen=True, slots=True)
class Activation:
    """What comes out of a front for one sample.

    Attributes:
        sample: `Sample.id`.
        depth: n, blocks already applied.
        hidden: float32 [T, D].
        targets: as in `Sample`.
    """

    sample: int
    depth: int
    hidden: Floats
    targets: Ints


@dataclass(frozen=True, slots=True, order=True)
class SampleKey:
    """Names a sample of the whole run. Sorting keys gives the order that shuffles start from."""

    device: str
    sample: int


@dataclass(frozen=True, slots=True)
class SampleTable:
    """What the store knows of its samples without reading an activation: columns, sorted by key.

    Attributes:
        devices: ids of the devices, sorted.
        device: int32 [N], index into `devices`.
        sample: int32 [N], `Sample.id`.
        tokens: int32 [N], T of each sample.
        depth: int32 [N], n of each sample.
        chunk: int32 [N], index of the chunk it came in.
    """

    devices: tuple[str, ...]
    device: Ints
    sample: Ints
    tokens: Ints
    depth: Ints
    chunk: Ints

    def __len__(self) -> int:
        return len(self.sample)

    def key(self, row: int) -> SampleKey:
        return SampleKey(self.devices[int(self.device[row])], int(self.sample[row]))

    def select(self, chosen: npt.NDArray[np.bool_]) -> SampleTable:
        """Return the rows where `chosen`, bool [N], holds."""
        return SampleTable(
            self.devices,
            self.device[chosen],
            self.sample[chosen],
            self.tokens[chosen],
            self.depth[chosen],
            self.chunk[chosen],
        )


# --- messages --------------------------------------------------------------------------------


class Message(Struct, frozen=True, forbid_unknown_fields=True):
    """Base of everything that travels as MessagePack."""


class FileRef(Message, frozen=True):
    """A file served by content: GET /v1/files/{sha256}, with Range requests."""

    name: Annotated[str, Meta(pattern=r"^[A-Za-z0-9_-][A-Za-z0-9_.-]{0,99}$")]
    sha256: Sha256
    bytes: Count


class FrontManifest(Message, frozen=True):
    """front(n) as ONNX: a graph and its weights, each a file named by its content.

    Weights are files of their own, so a deeper front downloads only the blocks it adds.

    Attributes:
        depth: n.
        width: D.
        precision: of the weights.
        hash: over weights, depth and precision; a chunk carries it.
        graph: name of the file in `files` to open.
        files: graph and weights.
        flops_per_token: multiply-adds x 2 of one token in this front, without attention scores.
        memory_bytes: least memory a device needs for it (weights and working set).
    """

    depth: Positive
    width: Positive
    precision: Precision
    hash: Sha256
    graph: str
    files: tuple[FileRef, ...]
    flops_per_token: Positive
    memory_bytes: Positive


class TaskSpec(Message, frozen=True):
    """How a device turns a row of its data into a `Sample`.

    Attributes:
        kind: the task.
        columns: our name -> the column's name in the file. Classification: `text`, `label`, maybe
            `pair`. causal_lm: `prompt`, `completion`. Image: `pixels`, `label`.
        labels: names of the classes in order; a row's label is a name or its index.
        max_tokens: longer inputs are truncated (longest first in a pair).
        template: causal_lm: the prompt as the model sees it, with `{prompt}` in it.
        separator: token between the texts of a pair where the tokenizer puts none; None otherwise.
        end: token after a completion; None where the model has none.
        token_types: whether the front takes segment ids.
        image: (channels, height, width) the model takes; None for text.
        image_mean: per channel, after division by 255.
        image_std: per channel.
        image_tokens: T of every image.
    """

    kind: TaskKind
    columns: dict[str, str]
    labels: tuple[str, ...]
    max_tokens: Positive
    template: str = "{prompt}"
    separator: int | None = None
    end: int | None = None
    token_types: bool = False
    image: tuple[int, int, int] | None = None
    image_mean: tuple[float, ...] = ()
    image_std: tuple[float, ...] = ()
    image_tokens: Count = 0


class Enrolment(Message, frozen=True):
    """POST /v1/enrol. The device makes its own secret, so repeating the request is harmless."""

    protocol: int
    token: Annotated[str, Meta(max_length=100)]
    secret: Annotated[str, Meta(min_length=32, max_length=100)]
    name: Annotated[str, Meta(max_length=100)]
    version: Annotated[str, Meta(max_length=40)]


class Enrolled(Message, frozen=True):
    """The reply: the device's id in this run; the secret is its bearer token from now on."""

    run: str
    device: str


class RunInfo(Message, frozen=True):
    """GET /v1/run: what every device of the run needs before its assignment."""

    run: str
    model: str
    task: TaskSpec
    tokenizer: FileRef | None
    probe: FrontManifest
    chunk_bytes: Positive
    seed: int


class Prepared(Message, frozen=True):
    """What the model gave the run before any device came; kept in the run folder.

    Attributes:
        task: as devices get it.
        tokenizer: the served tokenizer.json; None for images.
        fronts: one manifest for each depth that may be assigned; the shallowest is the probe's.
        blocks: L.
        width: D.
        vocabulary: V; 0 for images.
        weights_hash: over the base model's weights.
        codec: as the config names it.
        sides: side data of the codec by depth, for codecs that need any.
        bytes_per_token: mean of an encoded token by depth, where it was measured.
    """

    task: TaskSpec
    tokenizer: FileRef | None
    fronts: tuple[FrontManifest, ...]
    blocks: Positive
    width: Positive
    vocabulary: Count
    weights_hash: Sha256
    codec: str
    sides: dict[int, FileRef] = {}
    bytes_per_token: dict[int, float] = {}

    def codec_at(self, depth: int) -> str:
        """Name of the codec that activations of a depth are sent with.

        One with side data names these: what they are decoded with can be told from it alone.
        """
        side = self.sides.get(depth)
        return self.codec if side is None else f"{self.codec}@{side.sha256[:16]}"


class Announcement(Message, frozen=True):
    """POST /v1/announcement: what the device will send. It may be repeated, never changed.

    Attributes:
        samples: good rows; their ids are 0 .. samples-1.
        tokens: sum of T over them.
        skipped: rows left out as bad.
        digest: sha256 over tokens and targets of all samples.
    """

    samples: Positive
    tokens: Positive
    skipped: Count
    digest: Sha256


class DeviceProfile(Message, frozen=True):
    """POST /v1/profile: what the probe measured on the device.

    Attributes:
        flops: FLOP/s of the probe front on this machine.
        memory_bytes: memory available to the process.
        uplink_bps: bit/s from the device to the server.
        cores: threads that the runtime uses.
        platform: for people: system, machine, runtime.
    """

    flops: Annotated[float, Meta(gt=0)]
    memory_bytes: Positive
    uplink_bps: Annotated[float, Meta(gt=0)]
    cores: Positive
    platform: Annotated[str, Meta(max_length=200)]


class Assignment(Message, frozen=True):
    """GET /v1/assignment: the device's front, and the codec of what comes out of it.

    It may change while the device sends: then a `Receipt` says so, and the device asks again.
    `side`: side data of the codec, where it needs any.
    """

    depth: Positive
    front: FrontManifest
    codec: str
    side: FileRef | None = None


MAX_SPANS = 256
"""Spans of a report at most, so that it stays a short message however much was sent."""


class ChunkSpan(Message, frozen=True):
    """When the three stages worked on some consecutive chunks: on one, where a device sends few.

    A stage is (begin, seconds of work), on the device's own clock from the first forward on. The
    three overlap with those of other chunks, not of the same one.

    Attributes:
        first, last: indices in the device's plan.
        depth: n that they were computed with.
        chunks: how many there are: fewer than the indices where the server had some already.
        bytes: sum of the frames.
        front, encode, send: the stages.
    """

    first: Count
    last: Count
    depth: Positive
    chunks: Positive
    bytes: Positive
    front: tuple[float, float]
    encode: tuple[float, float]
    send: tuple[float, float]


class DeviceReport(Message, frozen=True):
    """POST /v1/report: what happened, once everything is stored.

    Attributes:
        seconds: wall time from the first forward to the last acknowledgement.
        padding: padded over real tokens of the whole plan, less one.
        spans: all chunks that this process sent, in the order of the plan.
    """

    seconds: float
    padding: float
    spans: Annotated[tuple[ChunkSpan, ...], Meta(max_length=MAX_SPANS)]

    @property
    def compute_s(self) -> float:
        """Time in the front; the three stages overlap."""
        return sum(span.front[1] for span in self.spans)

    @property
    def encode_s(self) -> float:
        """Time in the codec."""
        return sum(span.encode[1] for span in self.spans)

    @property
    def upload_s(self) -> float:
        """Time in uploads."""
        return sum(span.send[1] for span in self.spans)

    @property
    def bytes_up(self) -> int:
        """Sum of the frames sent."""
        return sum(span.bytes for span in self.spans)

    @property
    def chunks(self) -> int:
        """Frames sent."""
        return sum(span.chunks for span in self.spans)


class Failure(Message, frozen=True):
    """POST /v1/failure: why the device gives up, for people."""

    message: Annotated[str, Meta(max_length=2000)]


class Receipt(Message, frozen=True):
    """Reply to PUT /v1/chunks/{sha256}: the chunk is on disk.

    Attributes:
        index: of the chunk in the device's plan.
        stored: samples that were new; 0 when the chunk was there already.
        depth: what the device shall compute from now on; 0 for what it does.
    """

    index: Count
    stored: Count
    depth: Count = 0


class Refusal(Message, frozen=True):
    """Body of every 4xx and 5xx reply: the class of the error and its four-part message."""

    error: str
    message: str


# --- events ----------------------------------------------------------------------------------

SERVER = "server"
FEDERATED = "federated"
"""The server of FedsLLM that sees adapters only."""


# gc=False: they hold no cycles, and a simulation holds millions that the collector would walk over.
class Compute(Struct, frozen=True, gc=False, tag_field="event", tag="compute"):
    """Work of one party, as a forecast or as it was measured.

    Events of one log are numbered 0, 1, 2 ... in the order in which they were written.

    Attributes:
        id: number of the event.
        who: a device's id, "device-03/encode" for its codec, which works beside its front,
            SERVER, "server/0" .. for its pipeline stages, or FEDERATED.
        phase: what is computed, such as "front", "lift", "forward", "backward", "weights".
        step: optimiser step, or chunk, that it is part of.
        flops: how much.
        after: numbers of earlier events that must have ended.
        begin_s, end_s: as measured, from the beginning of the log; None in a forecast.
    """

    id: int
    who: str
    phase: str
    step: int
    flops: float
    after: tuple[int, ...] = ()
    begin_s: float | None = None
    end_s: float | None = None


class Send(Struct, frozen=True, gc=False, tag_field="event", tag="send"):
    """Bytes from one party to another; the other attributes are those of `Compute`.

    `phase` says what is sent: "activations", "gradients", "adapter".
    """

    id: int
    source: str
    target: str
    phase: str
    step: int
    bytes: float
    after: tuple[int, ...] = ()
    begin_s: float | None = None
    end_s: float | None = None


Event = Compute | Send


# --- chunks ----------------------------------------------------------------------------------


class FrameHeader(Message, frozen=True):
    """Head of a chunk; `wire.frame` says how it is laid out. Lists run over the chunk's samples.

    A reply with gradients is a frame, too; its samples have no targets.
    """

    protocol: int
    run: Annotated[str, Meta(max_length=100)]
    device: Annotated[str, Meta(max_length=100)]
    index: Count
    front: Sha256
    depth: Positive
    width: Annotated[int, Meta(ge=1, le=65536)]
    codec: Annotated[str, Meta(max_length=40)]
    samples: tuple[Count, ...]
    tokens: tuple[Positive, ...]
    targets: tuple[Count, ...]
    payloads: tuple[Positive, ...]


@dataclass(frozen=True, slots=True)
class Chunk:
    """One upload: a frame and the hash that addresses it."""

    index: int
    sha256: str
    frame: bytes


@dataclass(frozen=True, slots=True)
class EncodedSample:
    """One sample inside a chunk, still encoded. `payload` decodes to float32 [tokens, D]."""

    sample: int
    tokens: int
    targets: Ints
    payload: bytes | memoryview


# --- protocols -------------------------------------------------------------------------------


class Codec(Protocol):
    """Turns one sample's activation into bytes and back, within a declared error."""

    @property
    def name(self) -> str: ...

    @property
    def lifted(self) -> str:
        """Name of the codec that the server stores a lifted activation with."""
        ...

    def most_bytes(self, tokens: int, width: int) -> int:
        """Upper bound of `len(encode(hidden))` for float32 [tokens, width]."""
        ...

    def encode(self, hidden: Floats) -> bytes:
        """float32 [T, D] -> bytes. Raises WireError on values it cannot carry."""
        ...

    def decode(self, payload: bytes | memoryview, tokens: int, width: int) -> Floats:
        """bytes -> float32 [tokens, width]. Raises WireError.

        Takes a few times the memory of that array, whatever the bytes claim.
        """
        ...

    def error_bound(self, hidden: Floats) -> Floats:
        """Largest |decode(encode(hidden)) - hidden|, broadcastable to [T, D]."""
        ...


Codecs = Callable[[str], Codec]
"""The codecs of a run by name. Raises WireError for a name that it does not know."""


class Front(Protocol):
    """front(n): embedding and blocks[0:n], frozen."""

    @property
    def depth(self) -> int: ...

    def __call__(self, batch: Sequence[Sample]) -> list[Floats]:
        """Return float32 [T, D] for each sample, in order, without padding."""
        ...


class Uploader(Protocol):
    """Carries chunks to the server: over HTTPS, in process, or over a bad link in tests."""

    def stored(self) -> set[int]:
        """Indices of the chunks that the server has already."""
        ...

    def put(self, chunk: Chunk) -> Receipt:
        """Return once the chunk is durable. Raises RefusedError or UnreachableError."""
        ...


class Exchange(Uploader, Protocol):
    """An uploader whose server answers each chunk, for methods that train on the device too."""

    def reply(self, index: int) -> bytes:
        """Frame with the loss's gradient at the activations of chunk `index`, once it is known.

        It holds the chunk's samples in the chunk's order. Raises RefusedError, UnreachableError.
        """
        ...


class ActivationSource(Protocol):
    """Where training reads from."""

    def samples(self) -> SampleTable:
        """Everything stored, sorted by key."""
        ...

    def read(self, keys: Sequence[SampleKey]) -> list[Activation]:
        """Activations in the order of `keys`. Raises StoreError for a missing or damaged one."""
        ...


class ActivationStore(ActivationSource, Protocol):
    """Where lifting writes to: a lifted activation replaces the shallow one, atomically."""

    def replace(self, device: str, activations: Iterable[Activation]) -> None: ...


# --- what a command returns ------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Outcome:
    """Result of a command: `data` for `--json`, `text` for a person, `exit_code` of the process."""

    data: dict[str, object]
    text: str
    exit_code: int = 0
