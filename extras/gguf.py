"""Write GGUF files for llama.cpp and the programs that build on it.

A file holds fields, {name: value}, and tensors. Its layout is described in
github.com/ggml-org/ggml/blob/master/docs/gguf.md. hub.py decides what it contains; this module
only turns values into bytes.
"""

import os
import struct

import numpy as np

ALIGNMENT = 32  # tensors begin at multiples of this many bytes
PART = 2**22  # weights that are converted at a time

# Name of a type of weights: its number in a file, and how many bytes hold how many weights
TYPES = {"f32": (0, 4, 1), "f16": (1, 2, 1), "q8_0": (8, 34, 32)}


def text_bytes(text):
    content = text.encode()
    return struct.pack("<Q", len(content)) + content


def value_bytes(value):
    """Return the bytes of a field's value, which begin with the number of its type.

    value: a bool, an int from 0 to 2**32 - 1, a float, a str, or a list of str or of int.
    """
    match value:
        case bool():
            return struct.pack("<I?", 7, value)
        case int():
            return struct.pack("<II", 4, value)
        case float():
            return struct.pack("<If", 6, value)
        case str():
            return struct.pack("<I", 8) + text_bytes(value)
        case [int(), *_]:
            return struct.pack("<IIQ", 9, 5, len(value)) + np.array(value, "<i4").tobytes()
    return struct.pack("<IIQ", 9, 8, len(value)) + b"".join(map(text_bytes, value))


def q8_0_bytes(weights):
    """Return weights as int8 in blocks of 32, each preceded by its float16 scale."""
    blocks = weights.reshape(-1, 32)
    scales = abs(blocks).max(axis=1, keepdims=True) / 127
    steps = np.divide(blocks, scales, out=np.zeros_like(blocks), where=scales > 0)
    numbers = np.rint(steps).astype("i1")
    return np.hstack((scales.astype("<f2").view("i1"), numbers)).tobytes()


def weight_bytes(weights, kind):
    """Return the bytes of float32 weights as a type of TYPES."""
    if kind == "q8_0":
        return q8_0_bytes(weights)
    return weights.astype("<f2" if kind == "f16" else "<f4").tobytes()


def padding(n_bytes):
    """Return the zeros that fill n_bytes up to a multiple of ALIGNMENT."""
    return bytes(-n_bytes % ALIGNMENT)


def write(path, fields, tensors):
    """Write a GGUF file, whole or not at all.

    fields: {name: value}; see value_bytes.
    tensors: {name: (torch tensor on the CPU, name of a type in TYPES)}. The rows of a "q8_0" tensor
        must have a multiple of 32 weights.
    """
    header = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(fields))
    for name, value in fields.items():
        header += text_bytes(name) + value_bytes(value)
    offset = 0
    for name, (tensor, kind) in tensors.items():
        number, n_bytes, n_weights = TYPES[kind]
        shape = tuple(tensor.shape)[::-1]  # the length of a row comes first
        header += text_bytes(name) + struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
        header += struct.pack("<IQ", number, offset)
        size = tensor.numel() // n_weights * n_bytes
        offset += size + len(padding(size))

    unfinished = path.with_name(f"{path.name}.part")
    with open(unfinished, "wb") as file:
        file.write(header + padding(len(header)))
        for tensor, kind in tensors.values():
            parts = tensor.reshape(-1).split(PART)
            file.writelines(weight_bytes(part.float().numpy(), kind) for part in parts)
            file.write(padding(file.tell()))
    os.replace(unfinished, path)
