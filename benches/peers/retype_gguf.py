"""A GGUF file with its matrices in another type, so that two engines read the same numbers:

    python retype_gguf.py MODEL.gguf f16|bf16|q8_0|q4_0 OUT.gguf

Reads F32, F16, BF16, Q8_0 and Q4_1; vectors stay as they are. Needs numpy.
"""
import struct
import sys

import numpy as np

F32, F16, Q4_0, Q4_1, Q8_0, BF16 = 0, 1, 2, 3, 8, 30
BLOCKS = {F32: (1, 4), F16: (1, 2), BF16: (1, 2), Q4_0: (32, 18), Q4_1: (32, 20), Q8_0: (32, 34)}
SCALARS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
ALIGNMENT = 32


def widen(kind, data):
    if kind == F32:
        return data.view("<f4")
    if kind == F16:
        return data.view("<f2").astype(np.float32)
    if kind == BF16:
        return (data.view("<u2").astype(np.uint32) << 16).view(np.float32)
    blocks = data.reshape(-1, BLOCKS[kind][1])
    step = blocks[:, :2].copy().view("<f2").astype(np.float32)
    if kind == Q8_0:
        return (step * blocks[:, 2:].view(np.int8)).ravel()
    least = blocks[:, 2:4].copy().view("<f2").astype(np.float32)
    codes = np.concatenate([blocks[:, 4:] & 15, blocks[:, 4:] >> 4], axis=1)
    return (step * codes + least).ravel()


def narrow(kind, x):
    if kind == F16:
        return x.astype("<f2").tobytes()
    if kind == BF16:
        bits = x.view(np.uint32)
        return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype("<u2").tobytes()
    x = x.reshape(-1, 32)
    if kind == Q4_0:
        largest = np.take_along_axis(x, np.abs(x).argmax(axis=1)[:, None], axis=1)
        step = largest / -8
        codes = x * np.divide(1, step, out=np.zeros_like(step), where=step != 0) + np.float32(8.5)
        codes = np.minimum(codes, 15).astype(np.uint8)
        packed = codes[:, :16] | codes[:, 16:] << 4
        return np.concatenate([step.astype("<f2").view(np.uint8), packed], axis=1).tobytes()
    step = np.abs(x).max(axis=1, keepdims=True) / 127
    scaled = x * np.divide(1, step, out=np.zeros_like(step), where=step > 0)
    codes = np.trunc(scaled + np.copysign(np.float32(0.5), scaled)).astype(np.int8)
    return np.concatenate([step.astype("<f2").view(np.uint8), codes.view(np.uint8)], axis=1).tobytes()


def read(source):
    """A GGUF file's head, up to what it says of its tensors, and of each tensor label, axes (those of neighbours first),
    type and bytes."""
    raw = np.fromfile(source, np.uint8)
    at = 0

    def take(form):
        nonlocal at
        (value,) = struct.unpack_from("<" + form, raw, at)
        at += struct.calcsize(form)
        return value

    def text():
        nonlocal at
        count = take("Q")
        at += count
        return raw[at - count : at].tobytes()

    def skip(value_type):
        nonlocal at
        if value_type == 8:
            text()
        elif value_type == 9:
            inner, count = take("I"), take("Q")
            for _ in range(count):
                skip(inner)
        else:
            at += SCALARS[value_type]

    if raw[:4].tobytes() != b"GGUF":
        sys.exit(f"{source}: no GGUF file")
    at = 8
    tensors, pairs = take("Q"), take("Q")
    for _ in range(pairs):
        if text() == b"general.alignment":
            sys.exit(f"{source}: an alignment of its own")
        skip(take("I"))
    head = raw[:at].tobytes()
    infos = []
    for _ in range(tensors):
        label, axes = text(), take("I")
        infos.append((label, [take("Q") for _ in range(axes)], take("I"), take("Q")))
    start = -(-at // ALIGNMENT) * ALIGNMENT

    def data(shape, kind, place):
        size, bytes_ = BLOCKS[kind]
        return raw[start + place : start + place + int(np.prod(shape)) // size * bytes_]

    return head, [(label, shape, kind, data(shape, kind, place)) for label, shape, kind, place in infos]


def main(source, name, target):
    kind = {"f16": F16, "bf16": BF16, "q8_0": Q8_0, "q4_0": Q4_0}[name]
    head, tensors = read(source)
    parts, offset = [], 0
    for label, shape, own, data in tensors:
        out = own
        if len(shape) > 1:
            out, data = kind, narrow(kind, np.ascontiguousarray(widen(own, data)))
        data = bytes(data)
        head += struct.pack("<Q", len(label)) + label + struct.pack("<I", len(shape))
        head += struct.pack(f"<{len(shape)}QIQ", *shape, out, offset)
        data += bytes(-len(data) % ALIGNMENT)
        parts.append(data)
        offset += len(data)
    with open(target, "wb") as file:
        file.write(head + bytes(-len(head) % ALIGNMENT))
        file.writelines(parts)


if __name__ == "__main__":
    main(*sys.argv[1:])
