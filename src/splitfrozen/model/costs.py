"""What a model costs, as formulas of its shape: FLOP, values, bytes. No model, no measurement.

A linear map with `i` inputs and `o` outputs takes i*o multiply-adds a token, counted as 2*i*o FLOP;
attention takes 4*A*T^2 a sample of T tokens in heads that are A wide together, causal or not, as
the libraries compute it. Operations on single values (norms, softmax, activation functions,
residual sums) are a term of their own, `elementwise_flops`: profilers leave it out.

    stage                          FLOP
    device, front(n)               embedding_flops, forward_flops(n blocks)
    device, n blocks, two-way      the same with a rank, and backward_flops(input_gradient=False)
    server, lift n..M              forward_flops(M - n blocks)
    server above a frozen front    forward_flops(L - M blocks, rank), head_flops,
                                   head_backward_flops, backward_flops(input_gradient=False)
    server above a trained front   the same with input_gradient=True: it sends the gradient back
    the whole model                as above a frozen front, with L blocks, and embedding_flops

Backward passes come in two parts that a pipeline may run at different times: B, gradients of
activations, and W, gradients of weights. Frozen weights have no W, and where nothing below needs
it, the lowest block's maps have no B.

Blocks of a model are taken to be alike, and LoRA of a rank above 0 sits on all maps of a block.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

MapShape = tuple[int, int]
"""(inputs, outputs) of a linear map."""

PAPER_TRAINING = 3.0
"""The papers count a training pass as so many forward passes, frozen weights or not."""

NORM, ACTIVATION, GATE, SOFTMAX, RESIDUAL = 7, 9, 1, 6, 1
"""FLOP an element; a transcendental function counts as one.

Norm: mean, difference, square and sum, division, gain, bias. Activation: GELU by tanh, its
polynomial of degree 3 in five steps, tanh, and three to put it together. Softmax with the scale of
the scores: scale, maximum, difference, exp, sum, division.
"""

ADAM_BYTES = 16
"""Of one trained parameter: value, gradient and the optimiser's two moments, float32."""


@dataclass(frozen=True, slots=True)
class HeadMap:
    """A linear map above the blocks.

    Attributes:
        inputs, outputs: its shape.
        pooled: it sees one token of a sample rather than all.
        trained: its weights are.
    """

    inputs: int
    outputs: int
    pooled: bool
    trained: bool


@dataclass(frozen=True, slots=True)
class ModelShape:
    """What the cost of a transformer depends on.

    Attributes:
        blocks: L.
        width: D.
        maps: the linear maps of one block.
        entry: those of them that read the block's input: no trained map is before them in it.
        heads: attention heads (of queries, where keys and values have fewer).
        attention: A, width of all heads together.
        inner: width between the maps of the MLP.
        gated: the MLP multiplies two such vectors.
        kept: vectors of `inner` values that the MLP keeps for the backward pass, a token: those
            around the activation function, and between its steps where it is spelled out.
        norms: in one block.
        embedding: linear maps of each token before the blocks: an image's patches.
        head: above the blocks.
        vocabulary: V; 0 for images, or where nobody asks.
    """

    blocks: int
    width: int
    maps: tuple[MapShape, ...]
    entry: tuple[MapShape, ...]
    heads: int
    attention: int
    inner: int
    gated: bool = False
    kept: int = 2
    norms: int = 2
    embedding: tuple[MapShape, ...] = ()
    head: tuple[HeadMap, ...] = ()
    vocabulary: int = 0


@dataclass(frozen=True, slots=True)
class Tokens:
    """How much is computed: sums over samples (B), padding included where it is computed too.

    Attributes:
        samples: B.
        tokens: sum of T.
        squares: sum of T^2.
    """

    samples: float
    tokens: float
    squares: float

    @classmethod
    def of(cls, lengths: Iterable[int]) -> Tokens:
        """One sample for each T."""
        every = tuple(lengths)
        return cls(len(every), sum(every), sum(length**2 for length in every))

    @classmethod
    def uniform(cls, samples: float, length: float) -> Tokens:
        """Samples of one length."""
        return cls(samples, samples * length, samples * length**2)

    def __add__(self, other: Tokens) -> Tokens:
        return Tokens(
            self.samples + other.samples,
            self.tokens + other.tokens,
            self.squares + other.squares,
        )


NOTHING = Tokens(0, 0, 0)


def gpt2_small() -> ModelShape:
    """GPT-2 small as the SplitFrozen paper counts it: six maps a block (the library fuses three of
    them, so its LoRA is smaller), no embedding and no head."""
    square = (768, 768)
    return ModelShape(
        blocks=12,
        width=768,
        maps=(square,) * 4 + ((768, 3072), (3072, 768)),
        entry=(square,) * 3,
        heads=12,
        attention=768,
        inner=3072,
    )


def vit_base() -> ModelShape:
    """ViT-base for patches of 16 x 16 as the SFT paper counts it: six maps a block; 100 classes."""
    head = (HeadMap(768, 100, pooled=True, trained=True),)
    return replace(gpt2_small(), embedding=((3 * 16 * 16, 768),), head=head)


# --- FLOP ------------------------------------------------------------------------------------


def map_flops_per_token(maps: Iterable[MapShape]) -> int:
    """FLOP of one token: 2 x inputs x outputs over linear maps."""
    return sum(2 * inputs * outputs for inputs, outputs in maps)


def forward_flops(shape: ModelShape, blocks: int, load: Tokens, rank: int = 0) -> float:
    """Forward pass of blocks without what is before and above them; LoRA where `rank` > 0."""
    maps = map_flops_per_token(shape.maps) + _lora_flops_per_token(shape.maps, rank)
    return blocks * (load.tokens * maps + _attention_flops(shape, load))


def backward_flops(
    shape: ModelShape, blocks: int, load: Tokens, rank: int, *, input_gradient: bool
) -> tuple[float, float]:
    """Backward pass of blocks with LoRA: (B, W).

    Args:
        input_gradient: whether the gradient of what enters the lowest block is wanted, because
            something below is trained.
    """
    if not (input_gradient or (blocks and rank)):
        return 0.0, 0.0
    lora = _lora_flops_per_token(shape.maps, rank)
    maps = map_flops_per_token(shape.maps) + lora
    b = blocks * (load.tokens * maps + 2 * _attention_flops(shape, load))
    if not input_gradient:
        # The first matrix of an entry map's LoRA passes nothing down, the second one does.
        skipped = map_flops_per_token((*shape.entry, *((i, rank) for i, _ in shape.entry)))
        b -= load.tokens * skipped
    return b, blocks * load.tokens * lora


def elementwise_flops(shape: ModelShape, blocks: int, load: Tokens) -> float:
    """What `forward_flops` leaves out: norms, softmax, activation functions, residual sums."""
    inner = shape.inner * (ACTIVATION + (GATE if shape.gated else 0))
    per_token = shape.width * (NORM * shape.norms + 2 * RESIDUAL) + inner
    return blocks * (load.tokens * per_token + SOFTMAX * shape.heads * load.squares)


def embedding_flops(shape: ModelShape, load: Tokens) -> float:
    """Linear maps before the blocks; the few tokens of an image that are no patches count too."""
    return load.tokens * map_flops_per_token(shape.embedding)


def head_flops(shape: ModelShape, load: Tokens) -> float:
    """Forward pass of what is above the blocks.

    Args:
        load: tokens that get there; for a vocabulary, those whose successors are to be predicted.
    """
    return sum(_head_map_flops(one, load) for one in shape.head)


def head_backward_flops(shape: ModelShape, load: Tokens) -> tuple[float, float]:
    """Backward pass of what is above the blocks: (B, W)."""
    w = sum(_head_map_flops(one, load) for one in shape.head if one.trained)
    return head_flops(shape, load), w


def _head_map_flops(one: HeadMap, load: Tokens) -> float:
    return 2 * one.inputs * one.outputs * (load.samples if one.pooled else load.tokens)


def _attention_flops(shape: ModelShape, load: Tokens) -> float:
    """Scores and weighted sums of one block."""
    return 4 * shape.attention * load.squares


def lora_flops(maps: Iterable[MapShape], blocks: int, load: Tokens, rank: int) -> float:
    """Forward pass of LoRA where only these maps of each block have it."""
    return blocks * load.tokens * _lora_flops_per_token(maps, rank)


def _lora_flops_per_token(maps: Iterable[MapShape], rank: int) -> int:
    return sum(2 * rank * (inputs + outputs) for inputs, outputs in maps)


# --- values and bytes ------------------------------------------------------------------------


def activation_values(shape: ModelShape, load: Tokens) -> float:
    """Values of the activations [T, D] at a cut, and of their gradients."""
    return load.tokens * shape.width


def block_parameters(shape: ModelShape, blocks: int) -> int:
    """Weights of the linear maps; biases and norms, some 0.2 %, are left out."""
    return blocks * sum(inputs * outputs for inputs, outputs in shape.maps)


def adapter_parameters(shape: ModelShape, blocks: int, rank: int) -> int:
    """Weights of LoRA on all maps of blocks."""
    return lora_parameters(shape.maps, blocks, rank)


def lora_parameters(maps: Iterable[MapShape], blocks: int, rank: int) -> int:
    """Weights of LoRA where only these maps of each block have it."""
    return blocks * rank * sum(inputs + outputs for inputs, outputs in maps)


def head_parameters(shape: ModelShape) -> int:
    """Weights of the head that are trained, and travel with an adapter."""
    return sum(one.inputs * one.outputs for one in shape.head if one.trained)


def kept_values(shape: ModelShape, blocks: int, load: Tokens, rank: int) -> float:
    """Values that a forward pass of blocks with LoRA keeps for the backward pass.

    Of each token: queries, keys, values (of all heads) and their sums, what enters the norms and
    the maps, the MLP's inner vectors, LoRA's; of each pair of tokens the softmax. Attention
    without a fused kernel, no dropout.
    """
    per_token = 4 * shape.attention + 4 * shape.width + shape.kept * shape.inner
    per_token += rank * len(shape.maps)
    return blocks * (load.tokens * per_token + shape.heads * load.squares)


def working_values(shape: ModelShape, load: Tokens) -> float:
    """Values alive at once while blocks run forward on one batch, however many blocks.

    Seen with ONNX Runtime 1.31 on GPT-2, Llama, BERT and ViT, 64 to 2048 tokens: four vectors in
    the middle of the MLP, or five matrices of scores beside six hidden states in attention.
    """
    attention = 5 * shape.heads * load.squares + 6 * shape.width * load.tokens
    return max(4 * shape.inner * load.tokens, attention)


def forward_bytes(shape: ModelShape, blocks: int, batch: Tokens) -> float:
    """Memory of blocks that only run forward (lift, evaluation), float32, without the runtime."""
    return 4 * (block_parameters(shape, blocks) + working_values(shape, batch))


def training_bytes(shape: ModelShape, blocks: int, batch: Tokens, rank: int) -> float:
    """Memory of blocks that are trained with LoRA and Adam, float32, without the runtime.

    On the device of a two-way method, on a server, or of the whole model without its embedding.
    """
    frozen = block_parameters(shape, blocks) + kept_values(shape, blocks, batch, rank)
    return 4 * frozen + ADAM_BYTES * adapter_parameters(shape, blocks, rank)


def head_bytes(shape: ModelShape, load: Tokens) -> float:
    """Memory of the head in training, float32: weights (with gradient and Adam's moments where
    they are trained), and of each answer its value, its log-softmax and its gradient."""
    weights = sum(4 * one.inputs * one.outputs for one in shape.head if not one.trained)
    answers = sum(one.outputs * (load.samples if one.pooled else load.tokens) for one in shape.head)
    return weights + ADAM_BYTES * head_parameters(shape) + 3 * 4 * answers


# --- a device process ------------------------------------------------------------------------

RUNTIME_BYTES = 80 * 2**20
"""What the interpreter, NumPy, ONNX Runtime with an open session and the connection hold."""

VOCABULARY_BYTES = 1100
"""Of one entry of the vocabulary in the tokenizer, its index and its cache."""

SAMPLE_BYTES = 512
"""Of one sample's objects, beside 4 bytes a token."""

HELD_BYTES = 6
"""Of a value that is computed and not sent yet: float32, then two bytes."""

BATCH_TOKENS = 2048
"""Padded tokens of a device's batch at most."""

CHUNK_BYTES = 4 * 2**20
"""Of a chunk where the config leaves it open."""

HELD_CHUNKS = 4
"""Chunks on their way through a device whose link is its slowest part; half where it is not."""


def device_memory_bytes(
    shape: ModelShape,
    weight_bytes: float,
    batch: Tokens,
    held: Tokens,
    samples: Tokens = NOTHING,
) -> float:
    """Peak memory of a device process that runs a front, without adapters.

    Weights are resident once: those of maps as the runtime packed them for its kernels, others
    mapped from their files, the table of embeddings as far as the data's tokens are in it.

    Args:
        shape: of the whole model.
        weight_bytes: of the front's weights as the runtime holds them.
        batch: the forward pass with the largest working set, padding included.
        held: activations that are computed and not sent yet, as of `held_tokens`.
        samples: all samples of the device.
    """
    data = VOCABULARY_BYTES * shape.vocabulary + SAMPLE_BYTES * samples.samples + 4 * samples.tokens
    work = 4 * working_values(shape, batch) + HELD_BYTES * activation_values(shape, held)
    return RUNTIME_BYTES + weight_bytes + data + work


def held_tokens(shape: ModelShape, chunk_bytes: int, chunks: int = HELD_CHUNKS) -> Tokens:
    """Tokens of so many chunks, two bytes a value; `device_memory_bytes` reads nothing else."""
    return Tokens(0, chunks * chunk_bytes / (2 * shape.width), 0)


def front_memory_bytes(
    shape: ModelShape, weight_bytes: float, longest: int, chunk_bytes: int
) -> int:
    """Memory that a device needs for a front, whatever its data and its link are like.

    Args:
        shape, weight_bytes: as in `device_memory_bytes`.
        longest: T of the longest sample that a device may have.
        chunk_bytes: of an upload.
    """
    batch = Tokens.uniform(max(1, BATCH_TOKENS // longest), longest)
    held = held_tokens(shape, chunk_bytes)
    return round(device_memory_bytes(shape, weight_bytes, batch, held))


# --- the memory of a device as the SFT paper has it (section V-B) -------------------------------

FLOAT_BYTES = 4
"""alpha in equations 21, 23 and 25; that of equation 22 is `moments` times as much."""


def sft_model_bytes(shape: ModelShape, rank: int) -> float:
    """Weights of one block and its LoRA: equation 21, 4 (12 D^2 + 18 D r)."""
    return FLOAT_BYTES * (block_parameters(shape, 1) + adapter_parameters(shape, 1, rank))


def sft_optimiser_bytes(shape: ModelShape, rank: int, moments: int) -> float:
    """Optimiser's state of one block: equation 22. `moments`: 1 for SGD, 2 for Adam.

    The equation counts frozen weights; in the paper's Table III only LoRA has a state.
    """
    return moments * sft_model_bytes(shape, rank)


def sft_gradient_bytes(shape: ModelShape, rank: int) -> float:
    """Gradients of one block, frozen weights' too: equation 23."""
    return sft_model_bytes(shape, rank)


def sft_activation_bytes(shape: ModelShape, batch: Tokens) -> float:
    """What one block keeps for its backward pass: equation 24, 34 B N D + 5 B N^2 A, A heads.

    Megatron's figures for values of two bytes; `kept_values` counts in values.
    """
    return 34 * activation_values(shape, batch) + 5 * shape.heads * batch.squares


def sft_block_bytes(shape: ModelShape, batch: Tokens, rank: int, moments: int) -> float:
    """One block: equation 25."""
    weights = sft_model_bytes(shape, rank) + sft_gradient_bytes(shape, rank)
    state = sft_optimiser_bytes(shape, rank, moments)
    return weights + state + sft_activation_bytes(shape, batch)


def sft_device_bytes(
    shape: ModelShape, blocks: int, batch: Tokens, rank: int, moments: int
) -> float:
    """A device with so many blocks: equation 26, 16 D^2 + B N D + l M_t."""
    fixed = 16 * shape.width**2 + activation_values(shape, batch)
    return fixed + blocks * sft_block_bytes(shape, batch, rank, moments)


def sft_front_bytes(shape: ModelShape, blocks: int, length: int, rank: int) -> float:
    """What a device is sent before the first round: Psi(l) of section V-C, for samples of N tokens.

    As printed it is B l (18 D r + 12 D^2 + (P^2 C + N + 3) D). The prose has b, bytes a parameter,
    for the B that is the batch elsewhere; and the embedding, the last summand, is there once, not
    once a block.
    """
    embedding = sum(inputs * outputs for inputs, outputs in shape.embedding)
    embedding += (shape.vocabulary + length + 3) * shape.width
    values = block_parameters(shape, blocks) + adapter_parameters(shape, blocks, rank)
    return FLOAT_BYTES * (values + embedding)
