"""The memory of a training step, calculated from the shapes of the tensors."""

from model import CHUNK_ROWS, GPT, GPTConfig
from onenight.device import DTYPES
from onenight.optim import state_numbers
from onenight.settings import TrainConfig

FLOAT32_BYTES = 4
# Extra bytes that an eager run saves for the backward pass, for each token, block and channel, on
# a CPU.
EAGER_BYTES = {"gpt2": 0, "qwen3": 30}


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
    if config.int8 is True and config.compile:
        # What the compiled graphs keep besides, by benchmarks/LOG.md.
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
    # That takes about as much memory as one of these three copies, by benchmarks/LOG.md.
    if config.int8 is True and config.compile:
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


def block_weights(model: GPT) -> int:
    """Return the number of weights in the matrices of the blocks."""
    return sum(p.numel() for p in model.transformer.h.parameters() if p.dim() > 1)
