"""What a training step costs: the seconds of an iteration, and the memory of a micro-batch, both
calculated from the shapes of the tensors."""

from model import CHUNK_ROWS, GPT, GPTConfig
from onenight.system.cards import Speed
from onenight.system.device import DTYPES
from onenight.system.memory import GB
from onenight.training.muon import NEWTON_SCHULZ_STEPS
from onenight.training.optimizers import MUON, groups_by_optimizer, state_numbers
from onenight.training.settings import TrainConfig

FLOAT32_BYTES = 4
# How many times as fast int8 products are as bfloat16's. GeForce cards are rated at 4, an A100 and
# an H100 at 2.
INT8_SPEED = 2
# Extra bytes that an eager run saves for the backward pass, for each token, block and channel, on
# a CPU.
EAGER_BYTES = {"gpt2": 0, "qwen3": 30}
# Without torch.compile each operation reads and writes memory by itself, mostly in float32: about
# this many times what the compiled kernels do. The softmax makes 8 passes over the logits, not 2.
EAGER_PASSES = 4
# What a weight of the blocks adds in each micro-batch, by the kernels with and without --int8:
# rounding by rows and by columns moves 8 bytes more than the change of its number format, and the
# gradient's change of format, 6 bytes, falls away (benchmarks/LOG.md).
INT8_WEIGHT_BYTES = 2


def predict_seconds(model: GPT, config: TrainConfig, speed: Speed) -> float:
    """Return the seconds of an iteration: its FLOPs at the speed of matrix products, and the bytes
    that it moves beside them at the speed of copies.

    The FLOPs are PaLM's count. It has 12 for each channel and position that attention reads, of
    which causal attention computes 7, at about 0.6 times the speed of matrix products.
    """
    flops = config.tokens_per_iter * (model.flops_per_token() - int8_gain(model, config))
    flops += update_flops(model, config)
    moved = config.tokens_per_iter * moved_per_token(model.config, config)
    moved += weight_bytes(model, config)
    return flops / speed.tflops / 1e12 + moved / speed.gb_per_s / GB


def int8_gain(model: GPT, config: TrainConfig) -> float:
    """Return how many FLOPs of ordinary products int8 saves for each token: all products take 6 for
    each weight of the blocks. On a CPU it saves nothing."""
    on_cpu = config.device == "cpu" and not config.is_planned_elsewhere
    if on_cpu or not config.int8:
        return 0
    return 6 * block_weights(model) * (1 - 1 / INT8_SPEED)


def block_weights(model: GPT) -> int:
    """Return the number of weights in the matrices of the blocks."""
    return sum(p.numel() for p in model.transformer.h.parameters() if p.dim() > 1)


def moved_per_token(shape: GPTConfig, config: TrainConfig) -> float:
    """Return the bytes that are read and written for each token, forward and backward, beside
    matrix products and attention. The passes are counted in the kernels that torch.compile makes
    for an RTX 4070 (benchmarks/LOG.md)."""
    # Both norms, each with the addition before it: 8 passes forward and 8 backward. Joining the
    # gradients of query, key and value: 6.
    passes = 22
    # Normalizing and rotating queries and keys, 11; adding the gradients of the MLP's input, 1.
    if shape.parts.rotary_positions:
        passes += 12
    channels = passes * shape.n_embd
    # The activation of the MLP: 2 forward and 3 backward; with a gate 3 and 5.
    passes = 8 if shape.parts.gated_mlp else 5
    channels += passes * shape.mlp_width
    # What rounding to int8 adds, mainly: gradients are read once for the scales of their columns,
    # and once to be rounded by rows and by columns, and inputs are computed again in the backward
    # pass. With rotary positions, the joined gradients of query, key and value are written first.
    if config.int8:
        passes = 24 if shape.parts.rotary_positions else 14
        channels += passes * shape.n_embd
        passes = 3 if shape.parts.gated_mlp else 2
        channels += passes * shape.mlp_width
    # The logits are read, and their gradients written.
    numbers = shape.n_layer * channels + 2 * shape.vocab_size
    if not config.compile:
        return EAGER_PASSES * FLOAT32_BYTES * numbers
    return DTYPES[config.dtype].itemsize * numbers


def weight_bytes(model: GPT, config: TrainConfig) -> float:
    """Return the bytes that an iteration moves for the weights, however many tokens its
    micro-batches have: weights and their gradients change their number format, gradients are added
    up, and the update."""
    parameters = sum(parameter.numel() for parameter in model.parameters())
    micro_batches = config.gradient_accumulation_steps
    dtype_bytes = DTYPES[config.dtype].itemsize
    moved = 0
    # Weights are read in one format and written in the other, and so are their gradients.
    if dtype_bytes < FLOAT32_BYTES:
        moved += micro_batches * 2 * (FLOAT32_BYTES + dtype_bytes) * parameters
    if config.int8:
        moved += micro_batches * INT8_WEIGHT_BYTES * block_weights(model)
    # The gradients of each micro-batch after the first: two reads and a write.
    moved += (micro_batches - 1) * 3 * FLOAT32_BYTES * parameters
    # The update reads gradients, and reads and writes weights and the optimizer's state.
    numbers = 3 * parameters + 2 * state_numbers(model, config)
    return moved + FLOAT32_BYTES * numbers


def update_flops(model: GPT, config: TrainConfig) -> int:
    """Return the FLOPs of an update: Muon's, as AdamW's are negligible. It multiplies each matrix
    and its transpose, squares the product, and multiplies that by the matrix, five times."""
    flops = 0
    for group in groups_by_optimizer(model, config).get(MUON, []):
        for matrix in group["params"]:
            rows, columns = sorted(matrix.shape)
            flops += NEWTON_SCHULZ_STEPS * (4 * rows**2 * columns + 2 * rows**3)
    return flops


def predict_memory(model: GPT, config: TrainConfig, micro_batch_size: int) -> dict[str, float]:
    """Return the bytes of each part at the peak of a training step: in the head of the second
    micro-batch, when the gradients of the first exist. The activations are the tensors that
    torch.compile saves for the backward pass."""
    shape = model.config
    dtype_bytes = DTYPES[config.dtype].itemsize
    parameters = sum(parameter.numel() for parameter in model.parameters())
    tokens = micro_batch_size * shape.block_size
    activations = tokens * shape.n_layer * saved_bytes_per_token(shape, config)
    if dtype_bytes < FLOAT32_BYTES:
        activations += dtype_bytes * block_weights(model)  # the weights as the products read them
    if config.int8 and config.compile:
        # What the compiled graphs keep besides, by benchmarks/roofline/run.py.
        activations += 2 * block_weights(model)
    return {
        "weights": FLOAT32_BYTES * parameters,
        "gradients": FLOAT32_BYTES * parameters,
        "optimizer": FLOAT32_BYTES * state_numbers(model, config),
        "activations": activations,
        "head": head_bytes(shape, config, tokens),
    }


def saved_bytes_per_token(shape: GPTConfig, config: TrainConfig) -> float:
    """Return the bytes that a block saves of each token for the backward pass."""
    dtype_bytes = DTYPES[config.dtype].itemsize
    # The residual stream twice; the outputs of both norms and of attention as the linear layers
    # read them; query, key, value, and attention's output; rotated queries and keys also as they
    # were before.
    copies = 11 if shape.parts.rotary_positions else 9
    # The hidden layer of the MLP before and after the activation, and with a gate the gate.
    mlp_copies = 3 if shape.parts.gated_mlp else 2
    # With int8, none of what the linear layers read is saved: it is computed again from the rest.
    # That takes about as much memory as one of these three copies, by benchmarks/roofline/run.py.
    if config.int8 and config.compile:
        copies -= 2
        mlp_copies -= 1
    bytes_per_channel = copies * dtype_bytes
    bytes_per_channel += mlp_copies * dtype_bytes * shape.mlp_width / shape.n_embd
    # The masks of dropout, one byte for each channel.
    if shape.dropout:
        bytes_per_channel += 2
    if not config.compile:
        bytes_per_channel += EAGER_BYTES[shape.architecture]
    return bytes_per_channel * shape.n_embd


def head_bytes(shape: GPTConfig, config: TrainConfig, tokens: int) -> float:
    """Return the bytes that the head and its loss take: a chunk of logits with their gradient, the
    weight as the products read it with its gradient, and the input of the head with its
    gradient."""
    dtype_bytes = DTYPES[config.dtype].itemsize
    if config.compile:
        rows = min(CHUNK_ROWS, tokens)
        per_logit = 2 * dtype_bytes
    else:
        # Half as many rows at once, also in float32.
        rows = min(CHUNK_ROWS // 2, tokens)
        per_logit = FLOAT32_BYTES
        if dtype_bytes < FLOAT32_BYTES:  # float32 is computed in place
            per_logit += 2 * dtype_bytes
    per_weight = dtype_bytes + FLOAT32_BYTES
    logits = rows * shape.vocab_size * per_logit
    weight = shape.vocab_size * shape.n_embd * per_weight
    inputs = 2 * tokens * shape.n_embd * dtype_bytes
    return logits + weight + inputs
