"""What a rank's memory holds of a model in training, by formula."""

ADAM_BYTES = 4  # of every fp32 number: masters, either moment, averages
ALLREDUCE_ELEMENTS = 500_000_000  # that DeepSpeed averages at once at stage 0, in a copy


def state_bytes(
    parameters: int, *, zero_stage: int, world_size: int, compute_bytes: int, averages: int = 1, offload: bool = False
) -> dict[str, int]:
    """Bytes per rank at the highest point of a step, activations and communication buckets left out.

    With N parameters that compute in c bytes and W ranks, the paper (arXiv:1910.02054, sec. 3.1 and 5) has for mixed
    precision cN of weights, cN of gradients and 12N of masters and moments; stage 1 divides the last by W, stage 2 the
    gradients as well, stage 3 the weights too. DeepSpeed holds more:

    - masters (4N/W) are there from stage 1 on even where the weights are fp32 themselves;
    - at stage 0 there are no masters, and the gradients are averaged in a copy;
    - at stages 1 and 2 the own part of the gradients is flattened into a copy before AdamW, and that made fp32: 2cN/W,
      and 4N/W if c is not 4. At stage 1 this comes after all gradients were there (cN), of which only the own part is
      left by then;
    - at stage 3 a buffer of the own gradients stays (cN/W), beside what AdamW reads (4N/W). What is gathered at a time
      comes on top: a few blocks;
    - offloaded, the host holds masters, moments, averages and fp32 gradients; at stages 1 and 2 also a copy of the own
      weights on their way back, while the device holds all gradients until the step.

    Args:
        parameters: N.
        zero_stage: 0 to 3.
        world_size: W.
        compute_bytes: c, 4 for float32 and 2 for bfloat16.
        averages: averages of the weights that are kept, each fp32 and sharded like the masters.
        offload: the optimiser is on the host.

    Returns:
        Bytes of "weights", "gradients", "masters", "moments", "averages"; what is on the host has "host_" before it.

    Raises:
        ValueError: no such stage, or offload at stage 0.
    """
    if zero_stage not in (0, 1, 2, 3) or (offload and zero_stage == 0):
        raise ValueError(f"zero_stage {zero_stage} is none of 0, 1, 2, 3, or 0 with offload")
    whole, own = parameters, -(-parameters // world_size)
    if zero_stage == 0:
        own = whole
    step = (2 * compute_bytes + (ADAM_BYTES if compute_bytes != ADAM_BYTES else 0)) * own
    gradients = {
        0: compute_bytes * (whole + min(whole, ALLREDUCE_ELEMENTS)),
        1: max(compute_bytes * whole, step),
        2: step,
        3: (compute_bytes + ADAM_BYTES) * own,
    }[zero_stage]
    weights = compute_bytes * (own if zero_stage == 3 else whole)
    states = {
        "masters": ADAM_BYTES * own if zero_stage else 0,
        "moments": 2 * ADAM_BYTES * own,
        "averages": averages * ADAM_BYTES * own,
    }
    if not offload:
        return {"weights": weights, "gradients": gradients, **states}
    on_host = {f"host_{part}": size for part, size in states.items()}
    if zero_stage == 3:
        return {"weights": weights, "host_gradients": gradients, **on_host}
    return {
        "weights": weights,
        "gradients": compute_bytes * whole,
        "host_weights": compute_bytes * own,
        "host_gradients": ADAM_BYTES * own,
        **on_host,
    }
