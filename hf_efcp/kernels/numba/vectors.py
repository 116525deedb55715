"""Vectors of eight and of 32 numbers, as LLVM has them: numba would take the entries of a window one by one."""

from __future__ import annotations

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.registry import cpu_target
from numba.extending import intrinsic

LANES = 8  # entries of a vector
_AHEAD = 512  # entries, of the window, that are asked for before they are added
COMPARED = np.uint64(32)  # keys that are compared at once, and indices that are looked up


def _vector(element, lanes=LANES):
    return ir.VectorType(element, lanes)


def _constant(vector, number):
    return ir.Constant(vector, [number] * vector.count)


def _lane(number):
    return ir.IntType(32)(number)


def data_of(context, builder, array, argument):
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
        yield builder.add(start, builder.mul(loop.index, loop.index.type(LANES)))


def _indices(builder, pointer, first):
    """Eight indices, as integers of 64 bits."""
    for lane in range(LANES):
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


def can_look_up():
    """Whether numba compiles for a processor with what `find` is made of."""
    _, _, features = cpu_target.target_context.codegen().magic_tuple()
    return {"+avx512bw", "+avx512vbmi2"} <= set(features.split(","))


def _contiguous(*arrays):
    return all(array.layout == "C" for array in arrays)


@intrinsic
def product_of_eights(typing_context, index, value, start, groups, dense):
    """The inner product of a dense block with `groups` times eight entries from `start` on: float64."""
    if not _contiguous(index, value, dense):
        return None

    def codegen(context, builder, signature, arguments):
        index_of, value_of, start, groups, dense_of = arguments
        at = data_of(context, builder, index, index_of)
        values, block = data_of(context, builder, value, value_of), data_of(context, builder, dense, dense_of)
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
def multiply_eights(typing_context, index, value, groups, dense, sums):
    """Add the products of a dense block with `groups` times eight entries, one by one, to `sums`."""
    if not _contiguous(index, value, dense, sums):
        return None

    def codegen(context, builder, signature, arguments):
        index_of, value_of, groups, dense_of, sums_of = arguments
        at, values = data_of(context, builder, index, index_of), data_of(context, builder, value, value_of)
        block, totals = data_of(context, builder, dense, dense_of), data_of(context, builder, sums, sums_of)
        for first in _eights(builder, groups.type(0), groups):
            products = _products(builder, value.dtype, first, at, values, block)
            place = _doubles(builder, totals, first)
            before = builder.load(place)
            before.align = 8
            builder.store(builder.fadd(before, products, flags=["contract"]), place).align = 8
        return context.get_dummy_value()

    return types.void(index, value, types.uint64, dense, sums), codegen


@intrinsic
def add_eights(typing_context, index, value, start, groups, weight, dense):
    """Add `groups` times eight entries from `start` on, times a weight, or a weight for each, to a dense block."""
    each = isinstance(weight, types.Array)
    if not _contiguous(index, value, dense, *([weight] if each else [])):
        return None

    def codegen(context, builder, signature, arguments):
        index_of, value_of, start, groups, weight_of, dense_of = arguments
        at = data_of(context, builder, index, index_of)
        values, block = data_of(context, builder, value, value_of), data_of(context, builder, dense, dense_of)
        wide = _vector(ir.DoubleType())
        if not each:
            one = builder.insert_element(ir.Constant(wide, ir.Undefined), weight_of, _lane(0))
            weights = builder.shuffle_vector(one, one, _constant(_vector(ir.IntType(32)), 0))
        for first in _eights(builder, start, groups):
            later = builder.add(first, first.type(_AHEAD))
            _ask_for(builder, at, later)
            _ask_for(builder, values, later)
            if each:
                weights = builder.load(_doubles(builder, data_of(context, builder, weight, weight_of), first))
                weights.align = 8
            terms = builder.fmul(_widened(builder, value.dtype, builder.gep(values, [first])), weights)
            for lane, offset in enumerate(_indices(builder, at, first)):
                entry = builder.gep(block, [offset])
                builder.store(builder.fadd(builder.load(entry), builder.extract_element(terms, _lane(lane))), entry)
        return context.get_dummy_value()

    return types.void(index, value, types.uint64, types.uint64, weight, dense), codegen


@intrinsic
def find(typing_context, index, start, groups, bits, found):
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
        indices = builder.gep(data_of(context, builder, index, index_of), [start])
        words, out = data_of(context, builder, bits, bits_of), data_of(context, builder, found, found_of)
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
def ask(typing_context, array, at):
    """Have an entry loaded that is needed soon."""

    def codegen(context, builder, signature, arguments):
        _ask_for(builder, data_of(context, builder, array, arguments[0]), arguments[1])
        return context.get_dummy_value()

    return types.void(array, types.uint64), codegen


@intrinsic
def at_least(typing_context, keys, first, threshold):
    """Which of 32 keys from `first` on are not below a threshold, a bit for each, the lowest first (little-endian)."""
    if not _contiguous(keys):
        return None

    def codegen(context, builder, signature, arguments):
        vector = _vector(ir.IntType(16), 32)
        at = builder.gep(data_of(context, builder, keys, arguments[0]), [arguments[1]])
        loaded = builder.load(builder.bitcast(at, vector.as_pointer()))
        loaded.align = 1
        threshold = builder.insert_element(ir.Constant(vector, ir.Undefined), arguments[2], _lane(0))
        threshold = builder.shuffle_vector(threshold, threshold, _constant(_vector(ir.IntType(32), 32), 0))
        return builder.bitcast(builder.icmp_unsigned(">=", loaded, threshold), ir.IntType(32))

    return types.uint32(keys, types.uint64, types.uint16), codegen


@intrinsic
def lowest(typing_context, bits):
    """The number of the lowest bit that is set."""

    def codegen(context, builder, signature, arguments):
        return builder.zext(builder.cttz(arguments[0], ir.IntType(1)(1)), ir.IntType(64))

    return types.uint64(types.uint32), codegen
