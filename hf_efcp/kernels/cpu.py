"""numba kernels for the CPU: the twins of `reference.py`, block by block.

One block of the dense vector stays in the first-level cache while all rows of the window stream past it. Everything
that is compiled is in this file, because numba's cache on disk notices changes of this file only.

The loops over the entries of a window take eight of them at a time: their values are loaded and widened as one vector,
the entries of the dense block one by one, because an instruction that gathers takes longer than eight loads, on some
machines several times. Eight entries of one row where rows are long, and where they are short, of however many rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.core.registry import cpu_target
from numba.extending import intrinsic, overload
from numba.np.numpy_support import carray

from ..blocks import Part, sharing
from ..noise import MULTIPLIERS
from . import BUCKET, WHITENED, pool, tables

NAME = "numba"

_LARGEST = np.float32(torch.finfo(torch.bfloat16).max)  # see reference.py
_SMALLEST = np.float32(torch.finfo(torch.float32).tiny)
_FLOAT32_MAX = np.float32(torch.finfo(torch.float32).max)
_WHITENED = np.float32(WHITENED)
_FIRST, _SECOND = (np.uint32(multiplier) for multiplier in MULTIPLIERS)
_RANGE = 1 << 16  # entries of the dense vector in one task; partial sums are kept per task
_LIGHT = 1 << 18  # the same for what takes so little time that waking a thread would take longer
_PARTIAL = 1 << 20  # partial sums that exist at a time, if one part does not need more
# Sums may be reordered, but NaN and infinity keep their meaning.
_FASTMATH = {"reassoc", "contract"}
_UNSEEN: dict[str, Any] = {"no_cpython_wrapper": True, "no_cfunc_wrapper": True}  # for what Python does not call
_ZERO, _ONE = np.uint64(0), np.uint64(1)  # of indices: signed ones would be compared with zero at every entry
_COUNTED = 1 << 14  # keys that are counted in 16 bits
_LANES = 8  # entries of a vector
_LONG = 24  # entries of a row that is long
_AHEAD = 512  # entries, of the window, that are asked for before they are added
_WIDTH = np.uint64(_LANES)
_NO_BASE = np.empty((0, 0), np.float32)
_COMPARED = np.uint64(32)  # keys that are compared at once, and indices that are looked up
_LOOKED_UP = 4096  # entries of a block, at most, whose bits fit the registers
_SPARSE = 16  # entries of a block for each that is kept, at least, where looking up pays
_CHUNKS = np.uint64(32)  # vectors of indices that are looked up before what was found is added
_SHIFT, _SPAN = np.uint64(40), np.uint64(1 << 40)  # see `_add_found`


def _jit(function: Callable[..., Any], fastmath: Any = _FASTMATH) -> Callable[..., Any]:
    """What Python calls, from any thread. Dividing by zero gives infinity: Python's error would cost the vectors."""
    options: dict[str, Any] = {"nogil": True, "fastmath": fastmath, "error_model": "numpy"}
    try:
        compiled: Callable[..., Any] = njit(cache=True, **options)(function)
    except RuntimeError:  # no directory that the cache could be written to
        compiled = njit(**options)(function)
    return compiled


def _jit_as_written(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same for what rounds stochastically: one bit of a sum would be a whole level."""
    return _jit(function, fastmath=False)


def _inner(function: Callable[..., Any]) -> Any:
    """What only compiled code calls, and is kept on disk with that: wrappers and a file of its own take time."""
    return njit(fastmath=_FASTMATH, **_UNSEEN)(function)


def _inner_as_written(function: Callable[..., Any]) -> Any:
    return njit(**_UNSEEN)(function)


def _inner_in_order(function: Callable[..., Any]) -> Any:
    return njit(fastmath={"contract"}, **_UNSEEN)(function)


@intrinsic
def _float_of_bits(typing_context, bits):
    """Reinterpret an int32 as a float32."""

    def codegen(context, builder, signature, arguments):
        return builder.bitcast(arguments[0], ir.FloatType())

    return types.float32(types.int32), codegen


@intrinsic
def _bits_of_float(typing_context, value):
    """Reinterpret a float32 as an int32."""

    def codegen(context, builder, signature, arguments):
        return builder.bitcast(arguments[0], ir.IntType(32))

    return types.int32(types.float32), codegen


@intrinsic
def _pointer(typing_context, address):
    """Memory at an address."""

    def codegen(context, builder, signature, arguments):
        return builder.inttoptr(arguments[0], cgutils.voidptr_t)

    return types.voidptr(types.int64), codegen


@intrinsic
def _next(typing_context, counter):
    """The number of the next task, which no other thread is given."""

    def codegen(context, builder, signature, arguments):
        one = ir.IntType(64)(1)
        return builder.atomic_rmw("add", _data(context, builder, counter, arguments[0]), one, "monotonic")

    return types.int64(counter), codegen


@intrinsic
def _times(typing_context, a, b):
    """The lower 32 bits of a product; numba would multiply 64 bits."""

    def codegen(context, builder, signature, arguments):
        return builder.mul(*arguments)

    return types.uint32(types.uint32, types.uint32), codegen


def _decode(stored):
    """A stored value as float32: bfloat16 travels as the int16 of its bits."""
    raise NotImplementedError("compiled code only")


@overload(_decode)
def _decode_overload(stored):
    if stored == types.int16:
        return lambda stored: _float_of_bits(np.int32(stored) << np.int32(16))
    return lambda stored: stored


def _encode(value, like):
    """A float32 as it is stored in an array such as `like`; bfloat16 rounds to nearest, ties to even, as torch does."""
    raise NotImplementedError("compiled code only")


@overload(_encode)
def _encode_overload(value, like):
    if like.dtype == types.int16:

        def bfloat16_bits(value, like):
            bits = np.int64(_bits_of_float(value)) & 0xFFFFFFFF
            return np.int16((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16)

        return bfloat16_bits
    return lambda value, like: value


def _vector(element, lanes=_LANES):
    return ir.VectorType(element, lanes)


def _constant(vector, number):
    return ir.Constant(vector, [number] * vector.count)


def _lane(number):
    return ir.IntType(32)(number)


def _data(context, builder, array, argument):
    """Pointer to the entries of an array that is contiguous."""
    return context.make_array(array)(context, builder, argument).data


def _widened(builder, stored, pointer):
    """Eight stored values from a pointer on, as a vector of float64."""
    elements = {types.int16: ir.IntType(16), types.int8: ir.IntType(8), types.float32: ir.FloatType()}
    loaded = builder.load(builder.bitcast(pointer, _vector(elements[stored]).as_pointer()))
    loaded.align = 1
    if stored == types.int8:
        return builder.sitofp(loaded, _vector(ir.DoubleType()))
    if stored == types.int16:  # bfloat16
        integers = _vector(ir.IntType(32))
        bits = builder.shl(builder.zext(loaded, integers), _constant(integers, 16))
        loaded = builder.bitcast(bits, _vector(ir.FloatType()))
    return builder.fpext(loaded, _vector(ir.DoubleType()))


def _eights(builder, start, groups):
    """A loop over groups of eight entries; yields the first of each."""
    with cgutils.for_range(builder, groups) as loop:
        yield builder.add(start, builder.mul(loop.index, loop.index.type(_LANES)))


def _indices(builder, pointer, first):
    """Eight indices, as integers of 64 bits."""
    for lane in range(_LANES):
        at = builder.gep(pointer, [builder.add(first, first.type(lane))])
        yield builder.zext(builder.load(at), first.type)


def _doubles(builder, pointer, first):
    """Pointer to eight float64."""
    return builder.bitcast(builder.gep(pointer, [first]), _vector(ir.DoubleType()).as_pointer())


def _products(builder, stored, first, index, value, dense):
    """Eight values times the entries of a dense block at their indices, as a vector of float64."""
    entries = ir.Constant(_vector(ir.FloatType()), ir.Undefined)
    for lane, offset in enumerate(_indices(builder, index, first)):
        entries = builder.insert_element(entries, builder.load(builder.gep(dense, [offset])), _lane(lane))
    values = _widened(builder, stored, builder.gep(value, [first]))
    return builder.fmul(values, builder.fpext(entries, values.type), flags=["contract"])


def _ask_for(builder, pointer, at):
    """Have memory loaded that is needed soon, and once; an address that does not exist is no error."""
    byte, number = ir.IntType(8).as_pointer(), ir.IntType(32)
    prefetch = ir.FunctionType(ir.VoidType(), [byte, number, number, number])
    function = cgutils.get_or_insert_function(builder.module, prefetch, "llvm.prefetch.p0i8")
    read, once, data = number(0), number(0), number(1)
    builder.call(function, [builder.bitcast(builder.gep(pointer, [at]), byte), read, once, data])


def _can_look_up():
    """Whether numba compiles for a processor with what `_find` is made of."""
    _, _, features = cpu_target.target_context.codegen().magic_tuple()
    return {"+avx512bw", "+avx512vbmi2"} <= set(features.split(","))


def _contiguous(*arrays):
    return all(array.layout == "C" for array in arrays)


@intrinsic
def _product_of_eights(typing_context, index, value, start, groups, dense):
    """The inner product of a dense block with `groups` times eight entries from `start` on: float64."""
    if not _contiguous(index, value, dense):
        return None

    def codegen(context, builder, signature, arguments):
        index_of, value_of, start, groups, dense_of = arguments
        at = _data(context, builder, index, index_of)
        values, block = _data(context, builder, value, value_of), _data(context, builder, dense, dense_of)
        wide = _vector(ir.DoubleType())
        total = cgutils.alloca_once(builder, wide)
        builder.store(_constant(wide, 0.0), total)
        for first in _eights(builder, start, groups):
            products = _products(builder, value.dtype, first, at, values, block)
            builder.store(builder.fadd(builder.load(total), products, flags=["contract"]), total)
        halves = builder.load(total)
        while (lanes := halves.type.count // 2) > 0:
            lower, upper = (
                builder.shuffle_vector(halves, halves, ir.Constant(_vector(ir.IntType(32), lanes), list(some)))
                for some in (range(lanes), range(lanes, 2 * lanes))
            )
            halves = builder.fadd(lower, upper)
        return builder.extract_element(halves, _lane(0))

    return types.float64(index, value, types.uint64, types.uint64, dense), codegen


@intrinsic
def _multiply_eights(typing_context, index, value, groups, dense, sums):
    """Add the products of a dense block with `groups` times eight entries, one by one, to `sums`."""
    if not _contiguous(index, value, dense, sums):
        return None

    def codegen(context, builder, signature, arguments):
        index_of, value_of, groups, dense_of, sums_of = arguments
        at, values = _data(context, builder, index, index_of), _data(context, builder, value, value_of)
        block, totals = _data(context, builder, dense, dense_of), _data(context, builder, sums, sums_of)
        for first in _eights(builder, groups.type(0), groups):
            products = _products(builder, value.dtype, first, at, values, block)
            place = _doubles(builder, totals, first)
            before = builder.load(place)
            before.align = 8
            builder.store(builder.fadd(before, products, flags=["contract"]), place).align = 8
        return context.get_dummy_value()

    return types.void(index, value, types.uint64, dense, sums), codegen


@intrinsic
def _add_eights(typing_context, index, value, start, groups, weight, dense):
    """Add `groups` times eight entries from `start` on, times a weight, or a weight for each, to a dense block."""
    each = isinstance(weight, types.Array)
    if not _contiguous(index, value, dense, *([weight] if each else [])):
        return None

    def codegen(context, builder, signature, arguments):
        index_of, value_of, start, groups, weight_of, dense_of = arguments
        at = _data(context, builder, index, index_of)
        values, block = _data(context, builder, value, value_of), _data(context, builder, dense, dense_of)
        wide = _vector(ir.DoubleType())
        if not each:
            one = builder.insert_element(ir.Constant(wide, ir.Undefined), weight_of, _lane(0))
            weights = builder.shuffle_vector(one, one, _constant(_vector(ir.IntType(32)), 0))
        for first in _eights(builder, start, groups):
            later = builder.add(first, first.type(_AHEAD))
            _ask_for(builder, at, later)
            _ask_for(builder, values, later)
            if each:
                weights = builder.load(_doubles(builder, _data(context, builder, weight, weight_of), first))
                weights.align = 8
            terms = builder.fmul(_widened(builder, value.dtype, builder.gep(values, [first])), weights)
            for lane, offset in enumerate(_indices(builder, at, first)):
                entry = builder.gep(block, [offset])
                builder.store(builder.fadd(builder.load(entry), builder.extract_element(terms, _lane(lane))), entry)
        return context.get_dummy_value()

    return types.void(index, value, types.uint64, types.uint64, weight, dense), codegen


@intrinsic
def _find(typing_context, index, start, groups, bits, found):
    """How many of `groups` times 32 indices from `start` on have their bit set; which, is written to `found`."""
    if not _contiguous(index, bits, found):
        return None

    def codegen(context, builder, signature, arguments):
        index_of, start, groups, bits_of, found_of = arguments
        vector, truths = _vector(ir.IntType(16), 32), _vector(ir.IntType(1), 32)
        permute, compress, count_of = (
            cgutils.get_or_insert_function(builder.module, ir.FunctionType(result, given), name)
            for name, result, given in (
                ("llvm.x86.avx512.vpermi2var.hi.512", vector, [vector] * 3),
                ("llvm.x86.avx512.mask.compress.v32i16", vector, [vector, vector, truths]),
                ("llvm.ctpop.i32", ir.IntType(32), [ir.IntType(32)]),
            )
        )
        # A vector of indices is looked up in registers: the words of all bits are in eight of them.
        narrow = index.dtype == types.uint8  # blocks of 256: 16 words
        indices = builder.gep(_data(context, builder, index, index_of), [start])
        words, out = _data(context, builder, bits, bits_of), _data(context, builder, found, found_of)
        tables = []
        for first in range(0, 64 if narrow else 256, 32):
            place = builder.bitcast(builder.gep(words, [start.type(first)]), vector.as_pointer())
            tables.append(builder.load(place))
            tables[-1].align = 2
        zero = _constant(vector, 0)
        count = cgutils.alloca_once_value(builder, start.type(0))
        places = cgutils.alloca_once_value(builder, ir.Constant(vector, list(range(32))))
        with cgutils.for_range(builder, groups) as loop:
            at = builder.gep(indices, [builder.mul(loop.index, loop.index.type(32))])
            x = builder.load(builder.bitcast(at, _vector(at.type.pointee, 32).as_pointer()))
            x.align = 1
            x = builder.zext(x, vector) if narrow else x
            word = builder.lshr(x, _constant(vector, 4))
            # Each takes one of 64 words by the lower bits of the word's number; the upper bits choose among them.
            taken = [
                builder.call(permute, [one, word, other]) for one, other in zip(tables[::2], tables[1::2], strict=True)
            ]
            for bit in () if narrow else (1 << 10, 1 << 11):
                upper = builder.icmp_unsigned("!=", builder.and_(x, _constant(vector, bit)), zero)
                taken = [builder.select(upper, high, low) for low, high in zip(taken[::2], taken[1::2], strict=True)]
            bit = builder.shl(_constant(vector, 1), builder.and_(x, _constant(vector, 15)))
            hits = builder.icmp_unsigned("!=", builder.and_(taken[0], bit), zero)
            place, so_far = builder.load(places), builder.load(count)
            hit = builder.call(compress, [place, zero, hits])
            builder.store(hit, builder.bitcast(builder.gep(out, [so_far]), vector.as_pointer())).align = 2
            number = builder.call(count_of, [builder.bitcast(hits, ir.IntType(32))])
            builder.store(builder.add(so_far, builder.zext(number, so_far.type)), count)
            builder.store(builder.add(place, _constant(vector, 32)), places)
        return builder.load(count)

    return types.uint64(index, types.uint64, types.uint64, bits, found), codegen


@intrinsic
def _ask(typing_context, array, at):
    """Have an entry loaded that is needed soon."""

    def codegen(context, builder, signature, arguments):
        _ask_for(builder, _data(context, builder, array, arguments[0]), arguments[1])
        return context.get_dummy_value()

    return types.void(array, types.uint64), codegen


@intrinsic
def _at_least(typing_context, keys, first, threshold):
    """Which of 32 keys from `first` on are not below a threshold, a bit for each, the lowest first (little-endian)."""
    if not _contiguous(keys):
        return None

    def codegen(context, builder, signature, arguments):
        vector = _vector(ir.IntType(16), 32)
        at = builder.gep(_data(context, builder, keys, arguments[0]), [arguments[1]])
        loaded = builder.load(builder.bitcast(at, vector.as_pointer()))
        loaded.align = 1
        threshold = builder.insert_element(ir.Constant(vector, ir.Undefined), arguments[2], _lane(0))
        threshold = builder.shuffle_vector(threshold, threshold, _constant(_vector(ir.IntType(32), 32), 0))
        return builder.bitcast(builder.icmp_unsigned(">=", loaded, threshold), ir.IntType(32))

    return types.uint32(keys, types.uint64, types.uint16), codegen


@intrinsic
def _lowest(typing_context, bits):
    """The number of the lowest bit that is set."""

    def codegen(context, builder, signature, arguments):
        return builder.zext(builder.cttz(arguments[0], ir.IntType(1)(1)), ir.IntType(64))

    return types.uint64(types.uint32), codegen


@_inner
def _threshold(keys, bits, kept):
    """The `kept`-th largest of some keys of so many bits, uint16, and how many keys that are equal to it still fit."""
    # Bit by bit from the top: passes that only count vectorise, which a sort or a heap does not.
    threshold, above = np.uint16(0), np.int64(0)
    for bit in range(bits - 1, -1, -1):
        candidate = np.uint16(threshold | np.uint16(1 << bit))
        count = np.int64(0)
        for first in range(0, keys.shape[0], _COUNTED):
            part = keys[first : first + _COUNTED]
            some = np.int16(0)
            for i in range(part.shape[0]):
                some = np.int16(some + np.int16(part[i] >= candidate))
            count += some
        if count >= kept:
            threshold = candidate
            if count == kept:
                return threshold, kept
        else:
            above = count
    return threshold, kept - above


@_inner
def _candidates(keys, threshold, found):
    """Write the ascending places of keys that are not below a threshold; how many there are."""
    count = np.int64(0)
    first = _ZERO
    length = np.uint64(keys.shape[0])
    while first + _COMPARED <= length:
        mask: Any = _at_least(keys, first, threshold)
        while mask:
            found[count] = first + _lowest(mask)
            count += 1
            mask &= mask - np.uint32(1)
        first += _COMPARED
    while first < length:
        if keys[first] >= threshold:
            found[count] = first
            count += 1
        first += _ONE
    return count


@_inner
def _select(gradient, error, keys, found, lower, index):
    """Accumulate a block, and write the ascending indices of its largest entries. Their number is that of `index`.

    The first 15 bits of a magnitude settle most; the other 16 count where those are equal to the last one kept.
    """
    kept = index.shape[0]
    for i in range(gradient.shape[0]):
        a = min(max(error[i] + gradient[i], -_LARGEST), _LARGEST)
        error[i] = a
        keys[i] = np.uint16((_bits_of_float(a) & np.int32(0x7FFFFFFF)) >> np.int32(16))
    upper, room = _threshold(keys, 15, kept)
    count = _candidates(keys, upper, found)
    equal = 0
    for j in range(count):
        if keys[found[j]] == upper:
            lower[equal] = np.uint16(_bits_of_float(error[found[j]]) & np.int32(0xFFFF))
            equal += 1
    threshold, ties = np.uint16(0), np.int64(equal)
    if room < equal:
        threshold, ties = _threshold(lower[:equal], 16, room)
    position = 0
    for j in range(count):
        i = found[j]
        if keys[i] == upper:
            rest = np.uint16(_bits_of_float(error[i]) & np.int32(0xFFFF))
            if rest < threshold or (rest == threshold and ties == 0):
                continue
            ties -= rest == threshold
        index[position] = i
        position += 1


@_inner
def _accumulate_topk(gradient, error, indices, values, begin, end, room):
    keys, found, lower = room
    keys = keys[: gradient.shape[1]]
    for block in range(begin, end):
        e = error[block]
        _select(gradient[block], e, keys, found, lower, indices[block])
        for j in range(indices.shape[1]):
            at = indices[block, j]
            stored = _encode(e[at], values)
            values[block, j] = stored
            e[at] -= _decode(stored)


@_inner
def _accumulate_topk_levels(gradient, error, indices, values, scales, share, begin, end, room):
    keys, found, lower = room
    keys = keys[: gradient.shape[1]]
    for first in range(begin, end, share):
        last = min(first + share, end)
        largest = np.int32(0)
        for block in range(first, last):
            _select(gradient[block], error[block], keys, found, lower, indices[block])
            for j in range(indices.shape[1]):
                largest = max(largest, _bits_of_float(error[block, indices[block, j]]) & np.int32(0x7FFFFFFF))
        unit = max(_float_of_bits(largest) / np.float32(127), _SMALLEST)
        scale = np.int16((np.int64(_bits_of_float(unit)) + 0xFFFF) >> 16)
        scales[first // share] = scale
        unit = _decode(scale)
        for block in range(first, last):
            e = error[block]
            for j in range(indices.shape[1]):
                at = indices[block, j]
                level = np.rint(e[at] / unit)
                values[block, j] = np.int8(level)
                e[at] -= level * unit


@_inner_in_order
def _add_products(index, value, kept, dense, weights, rows, partial):
    """Add the inner products of one dense block with its long rows, times the rows' weights, to `partial`."""
    groups = kept // _WIDTH
    row = _ZERO
    while row < rows:
        j = row * kept
        total: Any = _product_of_eights(index, value, j, groups, dense)
        stop = j + kept
        j += groups * _WIDTH
        while j < stop:
            total += np.float64(_decode(value[j])) * np.float64(dense[index[j]])
            j += _ONE
        partial[row] += weights[row] * total
        row += _ONE


@_inner_in_order
def _multiply(index, value, dense, sums):
    """Add the products of one dense block with the entries of its short rows, one by one, to `sums`."""
    count = np.uint64(sums.shape[0])
    groups = count // _WIDTH
    _multiply_eights(index, value, groups, dense, sums)
    j = groups * _WIDTH
    while j < count:
        sums[j] += np.float64(_decode(value[j])) * np.float64(dense[index[j]])
        j += _ONE


@_inner
def _collect(sums, kept, weights, rows, partial):
    """Add what `_multiply` has summed, row by row and times the rows' weights, to `partial`, and forget it."""
    if not len(sums):  # long rows
        return
    j = _ZERO
    for row in range(rows):
        total = 0.0
        for _ in range(kept):
            total += sums[j]
            j += _ONE
        partial[row] += weights[row] * total
    sums[:] = 0.0


@_inner
def _weigh(scale, factor, weights):
    """The weights of rows from here on: their scales, times a factor."""
    for row in range(weights.shape[0]):
        weights[row] = np.float64(_decode(scale[row])) * factor


@_inner
def _of_short(room, kept, rows):
    """The room for a number for each entry of short rows; none for long ones."""
    return room[: rows * kept if kept < _LONG else 0]


@_inner_in_order
def _add_hits(index, value, reciprocal, dense, found, start, count, weights, partial):
    for hit in range(count):
        j = start + np.uint64(found[hit])
        row = (j * reciprocal) >> _SHIFT
        partial[row] += weights[row] * (np.float64(_decode(value[j])) * np.float64(dense[index[j]]))


@_inner_in_order
def _add_found(index, value, kept, dense, bits, found, weights, rows, partial):
    """As `_add_products`, for a dense block whose few entries have their bits set: most of a window meets none.

    Half of the window is read, and values only where there is something to multiply: they come while the next indices
    are looked up.
    """
    # The row of entry j is j // kept. A product with this, shifted, is that while there are less than 2^24 rows: their
    # entries are at most 256.
    reciprocal = _SPAN // kept + _ONE
    j, last, total = _ZERO, _ZERO, rows * kept
    waiting, side = _ZERO, 0
    while j + _COMPARED <= total:
        groups = min(_CHUNKS, (total - j) // _COMPARED)
        count: Any = _find(index, j, groups, bits, found[side])
        for hit in range(count):
            _ask(value, j + np.uint64(found[side, hit]))
        side = 1 - side
        _add_hits(index, value, reciprocal, dense, found[side], last, waiting, weights, partial)
        last, waiting = j, count
        j += groups * _COMPARED
    _add_hits(index, value, reciprocal, dense, found[1 - side], last, waiting, weights, partial)
    rest = total - j  # less than a vector
    for hit in range(rest):
        found[0, hit] = hit
    _add_hits(index, value, reciprocal, dense, found[0], j, rest, weights, partial)


_WITH_BITS = (types.uint8, types.uint16) if _can_look_up() else ()  # indices that `_find` takes here


def _looks_up(indices, length, kept):
    """Whether the entries of a dense block are found by their bits."""
    raise NotImplementedError("compiled code only")


@overload(_looks_up)
def _looks_up_overload(indices, length, kept):
    if indices.dtype in _WITH_BITS:
        return lambda indices, length, kept: length <= _LOOKED_UP and kept * _SPARSE <= length
    return lambda indices, length, kept: False


def _add_met(index, value, kept, dense, bits, found, weights, rows, partial):
    """`_add_found`, where `_looks_up`."""
    raise NotImplementedError("compiled code only")


@overload(_add_met)
def _add_met_overload(index, value, kept, dense, bits, found, weights, rows, partial):
    if index.dtype in _WITH_BITS:
        return lambda index, value, kept, dense, bits, found, weights, rows, partial: _add_found(
            index, value, kept, dense, bits, found, weights, rows, partial
        )
    return lambda index, value, kept, dense, bits, found, weights, rows, partial: None


@_inner
def _dots(indices, values, scales, share, kept, newest, rows, length, begin, end, partial, room):
    dense, bits, found, weights, short = room
    looks_up = _looks_up(indices, length, kept)
    sums = _of_short(short, _LONG if looks_up else kept, rows)
    own = range(newest * kept, (newest + 1) * kept)
    for block in range(begin, end):
        if scales is not None and block % share == 0:
            _collect(sums, kept, weights, rows, partial)
            scale = scales[block // share]
            _weigh(scale, np.float64(_decode(scale[newest])), weights)
        index, value = indices[block], values[block]
        present = False
        for j in own:
            x = np.float32(_decode(value[j]))
            if x != np.float32(0.0):
                at = np.int64(index[j])
                dense[at] = x
                bits[at >> 4 if looks_up else 0] |= np.uint16(1 << (at & 15))
                present = True
        if not present:  # a block without gradient, as of words that did not occur
            continue
        if looks_up:
            _add_met(index, value, np.uint64(kept), dense, bits, found, weights, np.uint64(rows), partial)
        elif len(sums):
            _multiply(index, value, dense, sums)
        else:
            _add_products(index, value, np.uint64(kept), dense, weights, np.uint64(rows), partial)
        for j in own:
            at = np.int64(index[j])
            dense[at] = np.float32(0.0)
            bits[at >> 4 if looks_up else 0] = np.uint16(0)
    _collect(sums, kept, weights, rows, partial)


@_jit
def _project(indices, values, scales, share, kept, x, rows, begin, end, partial, room):
    weights, short = room
    sums = _of_short(short, kept, rows)
    for block in range(begin, end):
        if scales is not None and block % share == 0:
            _collect(sums, kept, weights, rows, partial)
            _weigh(scales[block // share], 1.0, weights)
        if len(sums):
            _multiply(indices[block], values[block], x[block], sums)
        else:
            _add_products(indices[block], values[block], np.uint64(kept), x[block], weights, np.uint64(rows), partial)
    _collect(sums, kept, weights, rows, partial)


@_inner_in_order
def _add_rows(index, value, kept, weights, rows, dense):
    """Add the long rows of one block, times their weights, to a dense block."""
    groups = kept // _WIDTH
    row = _ZERO
    while row < rows:
        j = row * kept
        weight = weights[row]
        _add_eights(index, value, j, groups, weight, dense)
        stop = j + kept
        j += groups * _WIDTH
        while j < stop:
            dense[index[j]] += weight * np.float64(_decode(value[j]))
            j += _ONE
        row += _ONE


@_inner_in_order
def _add_entries(index, value, weights, dense):
    """Add the entries of short rows, times a weight for each, to a dense block."""
    count = np.uint64(weights.shape[0])
    groups = count // _WIDTH
    _add_eights(index, value, _ZERO, groups, weights, dense)
    j = groups * _WIDTH
    while j < count:
        dense[index[j]] += weights[j] * np.float64(_decode(value[j]))
        j += _ONE


@_inner_in_order
def _add_squares(index, value, kept, weights, rows, dense):
    """As `_add_rows`, for the squares of the entries; windows of diagonal rules are short."""
    row = _ZERO
    while row < rows:
        j = row * kept
        stop = j + kept
        weight = weights[row]
        while j < stop:
            v = np.float64(_decode(value[j]))
            dense[index[j]] += weight * (v * v)
            j += _ONE
        row += _ONE


@_inner
def _combine(indices, values, scales, share, kept, coefficients, base, scale, squared, begin, end, out, room):
    dense, weights, short = room
    rows = coefficients.shape[0]
    length = out.shape[0] // indices.shape[0]
    dense = dense[:length]
    each = _of_short(short, kept, rows)
    for block in range(begin, end):
        first = block == begin
        if scales is None:
            if first:
                for row in range(rows):
                    weights[row] = coefficients[row]
        elif block % share == 0:
            first = True
            for row in range(rows):
                unit = np.float64(_decode(scales[block // share, row]))
                weights[row] = coefficients[row] * (unit * unit if squared else unit)
        if first and len(each):
            j = _ZERO
            for row in range(rows):
                for _ in range(kept):
                    each[j] = weights[row]
                    j += _ONE
        if base.shape[0]:
            for i in range(length):
                dense[i] = scale * np.float64(base[block, i])
        else:
            for i in range(length):
                dense[i] = 0.0
        if squared:
            _add_squares(indices[block], values[block], np.uint64(kept), weights, np.uint64(rows), dense)
        elif len(each):
            _add_entries(indices[block], values[block], each, dense)
        else:
            _add_rows(indices[block], values[block], np.uint64(kept), weights, np.uint64(rows), dense)
        total = out[block * length : (block + 1) * length]
        for i in range(length):
            total[i] = np.float32(dense[i])


@_jit
def _combine_slab(indices, values, scales, share, kept, coefficients, base, scale, squared, begin, end, out, room):
    _combine(indices, values, scales, share, kept, coefficients, base, scale, squared, begin, end, out, room)


@_inner
def _noise(entry, key):
    """See `noise.mix`."""
    bits = np.uint32(np.uint32(entry) ^ key)
    bits = _times(np.uint32(bits ^ (bits >> np.uint32(16))), _FIRST)
    bits = _times(np.uint32(bits ^ (bits >> np.uint32(15))), _SECOND)
    return np.uint32(bits ^ (bits >> np.uint32(15)))


@_inner
def _rounded(magnitude, unit, levels, entry, key):
    """Stochastically, to a level."""
    multiple = min(magnitude, _LARGEST) / unit
    whole = np.int32(multiple)
    threshold = np.int32((multiple - np.float32(whole)) * np.float32(2.0**31))
    noise = np.int32(_noise(entry, key) >> np.uint32(1))
    return min(np.int32(whole + np.int32(noise < threshold)), np.int32(levels))


@_jit
def _quantize(error, stored, scale, levels, key, where, begin, end):
    signed = np.zeros(BUCKET, np.int32)
    for bucket in range(begin, end):
        start = bucket * BUCKET
        x = error[start : min(start + BUCKET, error.shape[0])]
        count = x.shape[0]
        largest = np.int32(0)
        for i in range(count):
            largest = max(largest, _bits_of_float(x[i]) & np.int32(0x7FFFFFFF))
        unit = max(min(_float_of_bits(largest), _LARGEST) / np.float32(levels), _SMALLEST)
        scale[bucket] = unit
        first = np.uint32(where + start)
        for i in range(count):
            level = _rounded(abs(x[i]), unit, levels, first + np.uint32(i), key)
            signed[i] = -level if x[i] < 0.0 else level
        if levels > 7:
            out = stored[start : start + count]
            for i in range(count):
                out[i] = signed[i]
        else:
            if count % 2:
                signed[count] = 0
            out = stored[start // 2 : start // 2 + (count + 1) // 2]
            for i in range((count + 1) // 2):
                out[i] = (signed[2 * i] & 15) | ((signed[2 * i + 1] & 15) << 4)


@_jit
def _dequantize(stored, scale, levels, begin, end, out):
    for bucket in range(begin, end):
        start = bucket * BUCKET
        x = out[start : min(start + BUCKET, out.shape[0])]
        count = x.shape[0]
        unit = scale[bucket]
        if levels > 7:
            level = stored[start : start + count]
            for i in range(count):
                x[i] = np.float32(np.int32(level[i])) * unit
        else:
            both = stored[start // 2 : start // 2 + (count + 1) // 2]
            for i in range(count // 2):
                # The lower half and the upper half, 0 to 15, as -8 to 7.
                pair = np.int32(both[i])
                x[2 * i] = np.float32(((pair & 15) ^ 8) - 8) * unit
                x[2 * i + 1] = np.float32(((pair >> 4) ^ 8) - 8) * unit
            if count % 2:
                x[count - 1] = np.float32(((np.int32(both[count // 2]) & 15) ^ 8) - 8) * unit


@_jit
def _round_to_bfloat16(error, stored, key, where, begin, end):
    x, rounded, first = error[begin:end], stored[begin:end], np.uint32(where + begin)
    for i in range(x.shape[0]):
        noise = np.int32(_noise(first + np.uint32(i), key) & np.uint32(0xFFFF))
        rounded[i] = np.int32(_bits_of_float(min(max(x[i], -_LARGEST), _LARGEST)) + noise) >> np.int32(16)


@_jit
def _observe(moments, gradient, kept, new, begin, end):
    v, g = moments[begin:end], gradient[begin:end]
    for i in range(v.shape[0]):
        v[i] = min(kept * v[i] + new * (g[i] * g[i]), _FLOAT32_MAX)


@_inner
def _whitened(x, v, factor, correction, eps):
    root = np.float32(1.0) / np.sqrt(np.sqrt(v) * correction + eps)
    y = min(max(factor * x * root, -_WHITENED), _WHITENED)
    return y if v > np.float32(0.0) else np.float32(0.0)


@_jit
def _whiten(vector, moments, factor, correction, eps, begin, end, total):
    x, v, out = vector[begin:end], moments[begin:end], total[begin:end]
    for i in range(x.shape[0]):
        out[i] = _whitened(x[i], v[i], factor, correction, eps)


@_jit
def _whiten_in_place(vector, moments, factor, correction, eps, begin, end):
    # Apart from `_whiten`: where two names mean the same memory, the compiler takes one entry after the other.
    x, v = vector[begin:end], moments[begin:end]
    for i in range(x.shape[0]):
        x[i] = _whitened(x[i], v[i], factor, correction, eps)


@_inner_as_written
def _divided(x, root, factor, correction, eps):
    y = min(max(factor * x * (np.float32(1.0) / np.sqrt(root * correction + eps)), -_WHITENED), _WHITENED)
    return y if root > np.float32(0.0) else np.float32(0.0)


@_jit_as_written
def _observe_levels(roots, scale, gradient, kept, new, key, where, correction, eps, begin, end, out):
    root = np.empty(BUCKET, np.float32)
    for bucket in range(begin, end):
        start = bucket * BUCKET
        level = roots[start : min(start + BUCKET, roots.shape[0])]
        count = level.shape[0]
        g, total = gradient[start : start + count], out[start : start + count]
        unit = scale[bucket]
        for i in range(count):
            old = np.float32(np.int32(level[i])) * unit
            root[i] = np.sqrt(min(kept * (old * old) + new * (g[i] * g[i]), _FLOAT32_MAX))
        largest = np.int32(0)
        for i in range(count):
            largest = max(largest, _bits_of_float(root[i]))
        unit = max(min(_float_of_bits(largest), _LARGEST) / np.float32(127), _SMALLEST)
        scale[bucket] = unit
        first = np.uint32(where + start)
        for i in range(count):
            rounded = _rounded(root[i], unit, 127, first + np.uint32(i), key)
            level[i] = rounded
            total[i] += _divided(g[i], np.float32(rounded) * unit, np.float32(1.0), correction, eps)


@_jit_as_written
def _whiten_levels(x, roots, scale, start, factor, correction, eps):
    end = start + x.shape[0]
    for bucket in range(start // BUCKET, (end + BUCKET - 1) // BUCKET):
        begin, unit = max(bucket * BUCKET, start), scale[bucket]
        level = roots[begin : min((bucket + 1) * BUCKET, end)]
        y = x[begin - start : begin - start + level.shape[0]]
        for i in range(level.shape[0]):
            y[i] = _divided(y[i], np.float32(np.int32(level[i])) * unit, factor, correction, eps)


@_jit
def _apply(theta, update, velocity, momentum, keep, lr, begin, end):
    if velocity.shape[0]:
        for i in range(begin, end):
            v = momentum * velocity[i] + update[i]
            velocity[i] = v
            theta[i] = keep * theta[i] - lr * v
    else:
        for i in range(begin, end):
            theta[i] = keep * theta[i] - lr * update[i]


@_inner
def _stored(part, index_like, value_like, scale_like):
    """What the window has of a part: `(blocks, stride)` indices and values, `(groups, stride)` scales or None."""
    index = carray(_pointer(part.index), (part.blocks, part.index_stride), index_like.dtype)
    value = carray(_pointer(part.value), (part.blocks, part.value_stride), value_like.dtype)
    if scale_like is None:
        return index, value, None
    groups = (part.blocks + part.share - 1) // part.share
    return index, value, carray(_pointer(part.scale), (groups, part.scale_stride), scale_like.dtype)


@_jit
def _squares_of_all(vectors, tasks, counter, partial):
    number: Any = _next(counter)
    while number < tasks.shape[0]:
        task = tasks[number]
        vector = vectors[task.row]
        x = carray(_pointer(vector.at), (vector.entries,), np.float32)[task.begin : task.end]
        total = 0.0
        for i in range(x.shape[0]):
            total += np.float64(x[i]) * np.float64(x[i])
        partial[number] = total
        number = _next(counter)


@_jit
def _accumulate_all(parts, tasks, counter, index_like, value_like, scale_like, gradients, errors, room):
    number: Any = _next(counter)
    while number < tasks.shape[0]:
        task = tasks[number]
        part = parts[task.row]
        index, value, scale = _stored(part, index_like, value_like, scale_like)
        index, value = index[:, : part.kept], value[:, : part.kept]
        g = carray(_pointer(gradients[task.row].at), (part.blocks, part.length), np.float32)
        e = carray(_pointer(errors[task.row].at), (part.blocks, part.length), np.float32)
        if scale_like is None:
            _accumulate_topk(g, e, index, value, task.begin, task.end, room)
        else:
            _accumulate_topk_levels(g, e, index, value, scale[:, 0], part.share, task.begin, task.end, room)
        number = _next(counter)


@_jit
def _dots_of_all(parts, tasks, counter, index_like, value_like, scale_like, newest, rows, partial, room):
    number: Any = _next(counter)
    while number < tasks.shape[0]:
        task = tasks[number]
        part, begin, end = parts[task.row], task.begin, task.end
        index, value, scale = _stored(part, index_like, value_like, scale_like)
        share, kept, length, sums = part.share, part.kept, part.length, partial[number]
        _dots(index, value, scale, share, kept, newest, rows, length, begin, end, sums, room)
        number = _next(counter)


def squares(vectors: Sequence[torch.Tensor]) -> torch.Tensor:
    """See `reference.squares`; partial sums per range of entries, added in the order of the ranges."""
    table, counter = tables.of_vectors(vectors), np.zeros(1, np.int64)
    tasks = tables.tasks(table["entries"].tolist(), [_LIGHT] * len(table))
    partial = np.zeros(len(tasks))
    pool.together(lambda: _squares_of_all(table, tasks, counter, partial), len(tasks))
    return torch.from_numpy(np.bincount(tasks["row"], partial, len(table)))


def accumulate_topk(gradients: Sequence[torch.Tensor], errors: Sequence[torch.Tensor], rows: Sequence[Part]) -> None:
    """See `reference.accumulate_topk`; accumulation, selection, storing and the new error block by block."""
    if not rows:
        return
    tasks, counter = _tasks(rows)
    stored = tables.of_parts(rows), tasks, counter, *_like(rows[0])
    dense = tables.of_vectors(gradients), tables.of_vectors(errors)
    length = _longest(rows)

    def work() -> None:
        room = np.empty(length, np.uint16), np.empty(length, np.int32), np.empty(length, np.uint16)
        _accumulate_all(*stored, *dense, room)

    pool.together(work, len(tasks))


def dots(parts: Sequence[Part], newest: int, rows: int) -> torch.Tensor:
    """See `reference.dots`; partial sums per range of blocks, added in the order of the ranges."""
    groups: list[list[Part]] = [[]]
    tasks_so_far = 0
    for part in parts:
        count = -(-part.piece.blocks // _step(part.piece.length))
        if groups[-1] and (tasks_so_far + count) * rows > _PARTIAL:
            groups.append([])
            tasks_so_far = 0
        groups[-1].append(part)
        tasks_so_far += count
    return torch.cat([_dots_of_group(group, newest, rows) for group in groups])


def _dots_of_group(parts: Sequence[Part], newest: int, rows: int) -> torch.Tensor:
    if not parts:
        return torch.zeros(0, rows, dtype=torch.float64, device="cpu")
    tasks, counter = _tasks(parts)
    stored = tables.of_parts(parts), tasks, counter, *_like(parts[0])
    partial = np.zeros((len(tasks), rows))
    length, short = _longest(parts), _short(parts)

    def work() -> None:
        # In float32, which is half as much of the first-level cache as float64, and as exact.
        dense, bits = np.zeros(length, np.float32), np.zeros(_LOOKED_UP // 16, np.uint16)
        found = np.empty((2, int(_CHUNKS + _ONE) * int(_COMPARED)), np.uint16)
        room = dense, bits, found, np.ones(rows), np.zeros(rows * short)
        _dots_of_all(*stored, newest, rows, partial, room)

    pool.together(work, len(tasks))
    first = np.flatnonzero(tasks["begin"] == 0)  # task of each part
    return torch.from_numpy(np.add.reduceat(partial, first))


def project(
    indices: torch.Tensor,
    values: torch.Tensor,
    dense: torch.Tensor,
    rows: int,
    scales: torch.Tensor | None = None,
) -> torch.Tensor:
    """See `reference.project`; summed as in `dots`."""
    index, value, kept, x = *_flat_rows(indices, values), indices.shape[2], _array(dense)
    scale, share = None if scales is None else _array(scales), sharing(x.shape[1])
    step = _step(x.shape[1])
    partial = np.zeros((-(-len(x) // step), rows))

    def work(i: int, begin: int, end: int) -> None:
        room = np.ones(rows), np.zeros(rows * kept if kept < _LONG else 0)
        _project(index, value, scale, share, kept, x, rows, begin, end, partial[i], room)

    pool.run(work, len(x), step)
    return torch.from_numpy(partial.sum(axis=0))


def combine(
    indices: torch.Tensor,
    values: torch.Tensor,
    coefficients: torch.Tensor,
    out: torch.Tensor,
    *,
    scales: torch.Tensor | None = None,
    base: torch.Tensor | None = None,
    scale: float = 0.0,
    squared: bool = False,
) -> None:
    """See `reference.combine`; one block of the sum is a float64 buffer in the first-level cache."""
    index, value, kept = *_flat_rows(indices, values), indices.shape[2]
    c, total, length = _array(coefficients), _array(out).reshape(-1), out.shape[1]
    x = _NO_BASE if base is None else _array(base)
    units, share = None if scales is None else _array(scales), sharing(length)

    def work(_: int, begin: int, end: int) -> None:
        room = np.empty(length), np.empty(len(c)), np.empty(len(c) * kept if kept < _LONG else 0)
        _combine_slab(index, value, units, share, kept, c, x, scale, squared, begin, end, total, room)

    pool.run(work, len(index), _step(length))


def quantize(error: torch.Tensor, stored: torch.Tensor, scale: torch.Tensor, key: int, start: int = 0) -> None:
    """See `reference.quantize`."""
    x, level, unit = _array(error), _array(stored), _array(scale)
    levels, bits = _levels(stored), np.uint32(key)
    pool.run(lambda _, begin, end: _quantize(x, level, unit, levels, bits, start, begin, end), len(unit), _step(BUCKET))


def dequantize(stored: torch.Tensor, scale: torch.Tensor, out: torch.Tensor) -> None:
    """See `reference.dequantize`."""
    level, unit, x = _array(stored), _array(scale), _array(out)
    levels = _levels(stored)
    pool.run(lambda _, begin, end: _dequantize(level, unit, levels, begin, end, x), unit.shape[0], _step(BUCKET))


def round_to_bfloat16(error: torch.Tensor, stored: torch.Tensor, key: int, start: int = 0) -> None:
    """See `reference.round_to_bfloat16`."""
    x, rounded, bits = _array(error), _array(stored), np.uint32(key)
    pool.run(lambda _, begin, end: _round_to_bfloat16(x, rounded, bits, start, begin, end), len(x), _RANGE)


def observe(moments: torch.Tensor, gradient: torch.Tensor, beta2: float) -> None:
    """See `reference.observe`."""
    v, g, kept, new = _array(moments), _array(gradient), np.float32(beta2), np.float32(1.0 - beta2)
    pool.run(lambda _, begin, end: _observe(v, g, kept, new, begin, end), len(v), _LIGHT)


def whiten(
    x: torch.Tensor, moments: torch.Tensor, factor: float, correction: float, eps: float, out: torch.Tensor
) -> None:
    """See `reference.whiten`; in one pass."""
    vector, v, total = _array(x), _array(moments), _array(out)
    numbers = np.float32(factor), np.float32(correction), np.float32(eps)
    if out.data_ptr() == x.data_ptr():
        pool.run(lambda _, begin, end: _whiten_in_place(vector, v, *numbers, begin, end), len(v), _LIGHT)
    else:
        pool.run(lambda _, begin, end: _whiten(vector, v, *numbers, begin, end, total), len(v), _LIGHT)


def observe_levels(
    roots: torch.Tensor,
    scale: torch.Tensor,
    gradient: torch.Tensor,
    beta2: float,
    key: int,
    start: int,
    correction: float,
    eps: float,
    out: torch.Tensor,
) -> None:
    """See `reference.observe_levels`; bucket by bucket, and with the same bits."""
    level, unit, g, total, bits = _array(roots), _array(scale), _array(gradient), _array(out), np.uint32(key)
    numbers = np.float32(beta2), np.float32(1.0 - beta2), bits, start, np.float32(correction), np.float32(eps)
    step = _LIGHT // BUCKET
    pool.run(lambda _, begin, end: _observe_levels(level, unit, g, *numbers, begin, end, total), len(unit), step)


def whiten_levels(
    x: torch.Tensor, roots: torch.Tensor, scale: torch.Tensor, start: int, factor: float, correction: float, eps: float
) -> None:
    """See `reference.whiten_levels`; in one pass, and with the same bits."""
    vector, level, unit = _array(x), _array(roots), _array(scale)
    numbers = np.float32(factor), np.float32(correction), np.float32(eps)

    def work(_: int, begin: int, end: int) -> None:
        _whiten_levels(vector[begin:end], level, unit, start + begin, *numbers)

    pool.run(work, len(vector), _LIGHT)


def apply(
    theta: torch.Tensor,
    update: torch.Tensor,
    *,
    lr: float,
    keep: float,
    velocity: torch.Tensor | None = None,
    momentum: float = 0.0,
) -> None:
    """See `reference.apply`; in one pass, and multiplied and added without rounding between."""
    x, u = _array(theta), _array(update)
    v = np.empty(0, np.float32) if velocity is None else _array(velocity)
    numbers = np.float32(momentum), np.float32(keep), np.float32(lr)
    pool.run(lambda _, begin, end: _apply(x, u, v, *numbers, begin, end), len(x), _LIGHT)


def _levels(stored: torch.Tensor) -> int:
    """Levels on each side of zero."""
    return 127 if stored.dtype == torch.int8 else 7


def _array(tensor: torch.Tensor) -> np.ndarray[Any, Any]:
    """The tensor's memory as an array; numpy has no bfloat16, which goes as the int16 of its bits."""
    return (tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor).numpy()


def _flat_rows(indices: torch.Tensor, values: torch.Tensor) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Indices and values of each block as one run of all rows."""
    return _array(indices).reshape(len(indices), -1), _array(values).reshape(len(values), -1)


def _like(part: Part) -> tuple[Any, ...]:
    """Arrays that say, by their types, what windows store."""
    return tuple(None if some is None else np.empty(0, _array(some[:0]).dtype) for some in part[1:])


def _longest(parts: Sequence[Part]) -> int:
    """Entries of the longest block."""
    return max(part.piece.length for part in parts)


def _short(parts: Sequence[Part]) -> int:
    """Entries of the longest of the short rows; 0 without any."""
    return max((part.piece.kept for part in parts if part.piece.kept < _LONG), default=0)


def _tasks(parts: Sequence[Part]) -> tuple[tables.Table, tables.Table]:
    """The tasks of the blocks of some parts, and the counter of those that were taken."""
    steps = [_step(part.piece.length) for part in parts]
    return tables.tasks([part.piece.blocks for part in parts], steps), np.zeros(1, np.int64)


def _step(length: int) -> int:
    """Blocks of a task: whole groups that share scales."""
    share = sharing(length)
    return max(1, _RANGE // (length * share)) * share
