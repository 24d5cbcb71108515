#!/usr/bin/env python3
"""Writes rounded.bin: 768 numbers in f32, and for each type of blocks what the reference implementation rounds
them to.

    gcc -O1 -ffp-contract=off -shared -fPIC -Iinclude -Isrc src/ggml-quants.c src/ggml.c -o rounding.so \\
        -lm -Wl,--unresolved-symbols=ignore-all   # in the folder of ggml
    python rounded.py rounding.so
"""
import ctypes
import pathlib
import sys

import numpy as np

# By GGUF's numbers, in the order of `BlockType::ALL`.
TYPES = {"q4_0": (2, 32, 18), "q4_1": (3, 32, 20), "q5_0": (6, 32, 22), "q5_1": (7, 32, 24), "q8_0": (8, 32, 34),
         "q4_K": (12, 256, 144), "q5_K": (13, 256, 176), "q6_K": (14, 256, 210)}

library = ctypes.CDLL(sys.argv[1], mode=1)
random = np.random.default_rng(11)
values = random.normal(0, 0.05, 768).astype("<f4")
# Groups of one sign, of zeros, of one number, and with an element far from the others.
values[32:64] = np.abs(values[32:64])
values[64:96] = 0
values[96:128] = 0.25
values[128:160] = -np.abs(values[128:160])
values[170] = 3
values[512:] *= random.uniform(0, 2, 256).astype("<f4")
out = values.tobytes()
for name, (_, length, size) in TYPES.items():
    blocks = np.zeros(768 // length * size, np.uint8)
    call = getattr(library, f"quantize_row_{name}_ref")
    call.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64]
    call(values.ctypes.data, blocks.ctypes.data, 768)
    out += blocks.tobytes()
pathlib.Path(__file__).with_name("rounded.bin").write_bytes(out)
