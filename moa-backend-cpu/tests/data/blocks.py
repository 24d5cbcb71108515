#!/usr/bin/env python3
"""Writes blocks.bin: for each type of blocks 512 elements as random blocks, and what the reference makes of them.

    pip install numpy gguf
    python blocks.py

All bits of codes and of packed steps are random; the factors in f16 are small numbers. The values are those of
the Python package `gguf`, as little-endian f32 behind the blocks.
"""
import pathlib

import gguf
import numpy as np

TYPES = ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K"]
# Where a block has its factors.
FACTORS = {"Q4_0": [0], "Q4_1": [0, 2], "Q5_0": [0], "Q5_1": [0, 2], "Q8_0": [0], "Q4_K": [0, 2], "Q5_K": [0, 2], "Q6_K": [208]}

random = np.random.default_rng(7)
out = b""
for name in TYPES:
    kind = gguf.GGMLQuantizationType[name]
    length, size = gguf.GGML_QUANT_SIZES[kind]
    count = 512 // length
    blocks = random.integers(0, 256, (count, size), dtype=np.uint8)
    for place in FACTORS[name]:
        factors = random.normal(0, 0.02, count).astype("<f2")
        blocks[:, place : place + 2] = factors.view(np.uint8).reshape(count, 2)
    values = gguf.dequantize(blocks.reshape(1, -1), kind).astype("<f4").reshape(-1)
    assert values.shape == (512,)
    out += blocks.tobytes() + values.tobytes()
pathlib.Path(__file__).with_name("blocks.bin").write_bytes(out)
