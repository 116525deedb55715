"""Single numbers: their bits, and how they are stored."""

from __future__ import annotations

import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, overload

from .vectors import data_of

LARGEST = np.float32(torch.finfo(torch.bfloat16).max)  # see reference/chunks.py
SMALLEST = np.float32(torch.finfo(torch.float32).tiny)
FLOAT32_MAX = np.float32(torch.finfo(torch.float32).max)
ZERO, ONE = np.uint64(0), np.uint64(1)  # of indices: signed ones would be compared with zero at every entry


@intrinsic
def float_of_bits(typing_context, bits):
    """Reinterpret an int32 as a float32."""

    def codegen(context, builder, signature, arguments):
        return builder.bitcast(arguments[0], ir.FloatType())

    return types.float32(types.int32), codegen


@intrinsic
def bits_of_float(typing_context, value):
    """Reinterpret a float32 as an int32."""

    def codegen(context, builder, signature, arguments):
        return builder.bitcast(arguments[0], ir.IntType(32))

    return types.int32(types.float32), codegen


@intrinsic
def pointer_to(typing_context, address):
    """Memory at an address."""

    def codegen(context, builder, signature, arguments):
        return builder.inttoptr(arguments[0], cgutils.voidptr_t)

    return types.voidptr(types.int64), codegen


@intrinsic
def next_task(typing_context, counter):
    """The number of the next task, which no other thread is given."""

    def codegen(context, builder, signature, arguments):
        one = ir.IntType(64)(1)
        return builder.atomic_rmw("add", data_of(context, builder, counter, arguments[0]), one, "monotonic")

    return types.int64(counter), codegen


@intrinsic
def times(typing_context, a, b):
    """The lower 32 bits of a product; numba would multiply 64 bits."""

    def codegen(context, builder, signature, arguments):
        return builder.mul(*arguments)

    return types.uint32(types.uint32, types.uint32), codegen


def decode(stored):
    """A stored value as float32: bfloat16 travels as the int16 of its bits."""
    raise NotImplementedError("compiled code only")


@overload(decode)
def _decode_overload(stored):
    if stored == types.int16:
        return lambda stored: float_of_bits(np.int32(stored) << np.int32(16))
    return lambda stored: stored


def encode(value, like):
    """A float32 as it is stored in an array such as `like`; bfloat16 rounds to nearest, ties to even, as torch does."""
    raise NotImplementedError("compiled code only")


@overload(encode)
def _encode_overload(value, like):
    if like.dtype == types.int16:

        def bfloat16_bits(value, like):
            bits = np.int64(bits_of_float(value)) & 0xFFFFFFFF
            return np.int16((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16)

        return bfloat16_bits
    return lambda value, like: value
