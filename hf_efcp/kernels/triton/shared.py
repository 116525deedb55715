"""What all Triton kernels share: the model's table, how tensors are kept, the metric, and rounding with noise.

Kernels take addresses from a table with a row for each tensor, so that one launch does a whole model. Every sum has a
fixed order and nothing is added atomically: two runs have the same bits.

What rounds stochastically is written with operations that are rounded by themselves (`div_rn`, `sqrt_rn`, no fused
multiply-add): a single bit would be a whole level here and there.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ...noise import MULTIPLIERS
from .. import BUCKET, WHITENED

# Columns of the table, int64: addresses (0 for what there is not), shapes, and where the window stands.
COLUMNS = (
    *("gradient", "gradient_code", "theta", "theta_code", "velocity"),
    *("error", "error_scale", "error_key", "second", "second_scale", "second_key"),
    *("left", "right", "start", "values", "indices", "scales"),
    *("numel", "height", "width", "begin", "blocks", "kept", "stride", "scale_stride"),
    *("newest", "held", "unit", "image", "partial", "splits"),
    *("first", "first_key", "second_width", "squares"),
)
# Columns of the numbers, float32.
NUMBERS = ("correction", "lr", "keep", "momentum", "decay", "factor", "mean")

FIELDS = tl.constexpr(len(COLUMNS))
GRADIENT, GRADIENT_CODE, THETA, THETA_CODE, VELOCITY = (tl.constexpr(place) for place in range(5))
ERROR, ERROR_SCALE, ERROR_KEY, SECOND, SECOND_SCALE, SECOND_KEY = (tl.constexpr(place) for place in range(5, 11))
LEFT, RIGHT, START, VALUES, INDICES, SCALES = (tl.constexpr(place) for place in range(11, 17))
NUMEL, HEIGHT, WIDTH, BEGIN, BLOCKS, KEPT, STRIDE, SCALE_STRIDE = (tl.constexpr(place) for place in range(17, 25))
NEWEST, HELD, UNIT, IMAGE, PARTIAL, SPLITS = (tl.constexpr(place) for place in range(25, 31))
FIRST, FIRST_KEY, SECOND_WIDTH, SQUARES = (tl.constexpr(place) for place in range(31, 35))

WIDE = tl.constexpr(len(NUMBERS))
CORRECTION, LR, KEEP, MOMENTUM, DECAY, FACTOR, MEAN = (tl.constexpr(place) for place in range(7))

# How a vector is kept. Of errors and second moments all but float16, of window's values none below 8 bits.
FLOAT32, BFLOAT16, FLOAT16, INT8, INT4, NONE = (tl.constexpr(code) for code in range(6))
# Added to the code of a second moment: it is that of vectors then, and matrices have means over rows and columns, which
# stand where a second moment and its scales would. "second_width" is the matrix's, and 0 for what is kept whole.
FACTORED = tl.constexpr(8)
CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.int8: 3}

ENTRIES = tl.constexpr(BUCKET)
_FIRST, _SECOND = (tl.constexpr(multiplier) for multiplier in MULTIPLIERS)
_LARGEST = tl.constexpr(float(torch.finfo(torch.bfloat16).max))
_SMALLEST = tl.constexpr(float(torch.finfo(torch.float32).tiny))
_FLOAT32_MAX = tl.constexpr(float(torch.finfo(torch.float32).max))
_WHITENED = tl.constexpr(WHITENED)
_HALF = tl.constexpr(2.0**31)


@triton.jit
def at_most(x, bound):
    """The smaller of both. Plain `minimum` would drop NaN, and a NaN in a gradient would be a number ever after."""
    return tl.minimum(x, bound, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def at_least(x, bound):
    """The larger of both, or NaN."""
    return tl.maximum(x, bound, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def field(table, row, which: tl.constexpr):
    """An int64 of a row of the table."""
    return tl.load(table + row * FIELDS + which)


@triton.jit
def small(table, row, which: tl.constexpr):
    """The same as an int32: positions in a tensor fit it, and take half the registers."""
    return field(table, row, which).to(tl.int32)


@triton.jit
def number(numbers, row, which: tl.constexpr):
    """A float32 of a row of the numbers."""
    return tl.load(numbers + row * WIDE + which)


# Most tensors begin at a multiple of 16 bytes, and with that hint 16 of them are read at a time. The hint has to be
# given to the pointer, and in the function that makes it: Triton loses it on a number, and on what a function returns.


@triton.jit
def floats(address):
    """A pointer to float32."""
    return tl.multiple_of(address.to(tl.pointer_type(tl.float32)), 16)


@triton.jit
def halves(address):
    """A pointer to the bits of bfloat16."""
    return tl.multiple_of(address.to(tl.pointer_type(tl.int16)), 16)


@triton.jit
def float16s(address):
    """A pointer to float16."""
    return tl.multiple_of(address.to(tl.pointer_type(tl.float16)), 16)


@triton.jit
def bytes_at(address):
    """A pointer to int8."""
    return tl.multiple_of(address.to(tl.pointer_type(tl.int8)), 16)


@triton.jit
def floats_inside(address):
    """A pointer to float32, anywhere in a tensor."""
    return address.to(tl.pointer_type(tl.float32))


@triton.jit
def halves_inside(address):
    """A pointer to 16 bits, anywhere in a tensor."""
    return address.to(tl.pointer_type(tl.int16))


@triton.jit
def bytes_inside(address):
    """A pointer to int8, anywhere in a tensor."""
    return address.to(tl.pointer_type(tl.int8))


@triton.jit
def widened(bits):
    """bfloat16 from its bits, as float32."""
    return (bits.to(tl.int32) << 16).to(tl.float32, bitcast=True)


@triton.jit
def nearest(x):
    """The bits of bfloat16: to nearest, ties to even."""
    bits = x.to(tl.int32, bitcast=True)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).to(tl.int16)


@triton.jit
def noise(position, key):
    """32 bits for an entry: see `hf_efcp.noise`."""
    bits = position.to(tl.uint32) ^ key.to(tl.uint32)
    bits = bits ^ (bits >> 16)
    bits = bits * _FIRST
    bits = bits ^ (bits >> 15)
    bits = bits * _SECOND
    return bits ^ (bits >> 15)


@triton.jit
def load_vector(address, code, position, inside):
    """Entries of a vector in float32, float16 or bfloat16, as float32."""
    if code == FLOAT32:
        x = tl.load(floats(address) + position, mask=inside, other=0.0)
    elif code == BFLOAT16:
        x = widened(tl.load(halves(address) + position, mask=inside, other=0))
    else:
        x = tl.load(float16s(address) + position, mask=inside, other=0.0).to(tl.float32)
    return x


@triton.jit
def store_vector(address, code, position, inside, x):
    """The way back, rounded to nearest."""
    if code == FLOAT32:
        tl.store(floats(address) + position, x, mask=inside)
    elif code == BFLOAT16:
        tl.store(halves(address) + position, nearest(x), mask=inside)
    else:
        tl.store(float16s(address) + position, x.to(tl.float16), mask=inside)


@triton.jit
def load_stored(address, scale, position, inside, STORED: tl.constexpr):
    """Entries of an error or a second moment as float32; of levels, times their scale."""
    if STORED == FLOAT32:
        x = tl.load(floats(address) + position, mask=inside, other=0.0)
    elif STORED == BFLOAT16:
        x = widened(tl.load(halves(address) + position, mask=inside, other=0))
    else:
        unit = tl.load(floats(scale) + position // ENTRIES, mask=inside, other=0.0)
        if STORED == INT8:
            level = tl.load(bytes_at(address) + position, mask=inside, other=0).to(tl.int32)
        else:
            pair = tl.load(bytes_at(address) + position // 2, mask=inside, other=0).to(tl.int32)
            # The shift to the left drops what is above, the one to the right copies the sign.
            level = (pair << (28 - 4 * (position % 2))) >> 28
        x = level.to(tl.float32) * unit
    return x


@triton.jit
def levels_of(x, position, key, LEVELS: tl.constexpr):
    """Levels and scales of buckets, one to a row: `|x| / scale` goes up with a probability that is its fraction."""
    magnitude = at_most(tl.abs(x), _LARGEST)
    # Magnitudes are ordered as their bits are, with NaN above all.
    largest = tl.max(magnitude.to(tl.int32, bitcast=True), axis=1).to(tl.float32, bitcast=True)
    unit = at_least(tl.div_rn(largest, LEVELS + 0.0), _SMALLEST)
    multiple = tl.div_rn(magnitude, tl.broadcast_to(unit[:, None], magnitude.shape))
    whole = tl.floor(multiple)
    threshold = ((multiple - whole) * _HALF).to(tl.int32)
    up = (noise(position, key) >> 1).to(tl.int32) < threshold
    level = tl.minimum(whole.to(tl.int32) + up.to(tl.int32), LEVELS)
    return tl.where(x < 0, -level, level), unit


@triton.jit
def stochastic(x, position, key):
    """The bits of one of the two neighbours in bfloat16: noise below the cut carries into what is kept."""
    bits = at_most(at_least(x, -_LARGEST), _LARGEST).to(tl.int32, bitcast=True)
    return ((bits + (noise(position, key) & 0xFFFF).to(tl.int32)) >> 16).to(tl.int16)


@triton.jit
def store_buckets(address, scale, bucket, position, inside, numel, key, x, STORED: tl.constexpr, ROWS: tl.constexpr):
    """Keep `ROWS` buckets of an error or a second moment, `(ROWS, 64)`, 0 behind the end."""
    if STORED == FLOAT32:
        tl.store(floats(address) + position, x, mask=inside)
    elif STORED == BFLOAT16:
        tl.store(halves(address) + position, stochastic(x, position, key), mask=inside)
    else:
        if STORED == INT8:
            level, unit = levels_of(x, position, key, 127)
        else:
            level, unit = levels_of(x, position, key, 7)
        tl.store(floats(scale) + bucket, unit, mask=bucket * ENTRIES < numel)
        if STORED == INT8:
            tl.store(bytes_at(address) + position, level.to(tl.int8), mask=inside)
        else:
            low, high = tl.split(tl.reshape(level, (ROWS, ENTRIES // 2, 2)))
            place = bucket[:, None] * (ENTRIES // 2) + tl.arange(0, ENTRIES // 2)[None, :]
            pair = ((low & 15) | ((high & 15) << 4)).to(tl.int8)
            tl.store(bytes_at(address) + place, pair, mask=2 * place < numel)


@triton.jit
def buckets_of(tasks, task, ROWS: tl.constexpr):
    """A task's tensor, the first of its `ROWS` buckets, their numbers, and the positions of their entries."""
    row, first = tl.load(tasks + 2 * task), tl.load(tasks + 2 * task + 1).to(tl.int32)
    bucket = first + tl.arange(0, ROWS)
    return row, first, bucket, bucket[:, None] * ENTRIES + tl.arange(0, ENTRIES)[None, :]


@triton.jit
def width_of(table, row, EVEN: tl.constexpr):
    """The width of a matrix; of those of `EVEN` models it is a multiple of a bucket."""
    width = tl.load(table + row * FIELDS + WIDTH).to(tl.int32)
    if EVEN:
        width = tl.multiple_of(width, ENTRIES)
    return width


@triton.jit
def gradient_of(table, numbers, row, position, inside, COUPLED: tl.constexpr):
    """The gradient in float32, with L2 regularisation where that is not decoupled."""
    g = load_vector(field(table, row, GRADIENT), field(table, row, GRADIENT_CODE), position, inside)
    if COUPLED:
        theta = load_vector(field(table, row, THETA), field(table, row, THETA_CODE), position, inside)
        g += number(numbers, row, DECAY) * theta
    return g


@triton.jit
def whitened(x, stored, correction, eps, METRIC: tl.constexpr):
    """`D^-1/2 x`, `D = correction sqrt(v) + eps`; 0 where `v` is. `stored` is `v`, or its root from levels."""
    root = stored if METRIC == INT8 else tl.sqrt_rn(stored)
    divided = x * tl.rsqrt(root * correction + eps)
    return tl.where(stored > 0.0, at_most(at_least(divided, -_WHITENED), _WHITENED), 0.0)


@triton.jit
def into_metric(table, numbers, row, position, inside, x, eps, METRIC: tl.constexpr):
    """`D^-1/2 x` by the second moment that is stored."""
    if METRIC == NONE:
        y = x
    elif METRIC < FACTORED:
        y = by_entries(table, numbers, row, position, inside, x, eps, METRIC)
    else:
        width = small(table, row, SECOND_WIDTH)
        if width == 0:
            y = by_entries(table, numbers, row, position, inside, x, eps, METRIC - FACTORED)
        else:
            r = tl.load(floats(field(table, row, SECOND)) + position // width, mask=inside, other=0.0)
            c = tl.load(floats(field(table, row, SECOND_SCALE)) + position % width, mask=inside, other=0.0)
            # Multiplied so that neither product leaves float32.
            v = r * (c / number(numbers, row, MEAN))
            y = whitened(x, v, number(numbers, row, CORRECTION), eps, FLOAT32)
    return y


@triton.jit
def by_entries(table, numbers, row, position, inside, x, eps, METRIC: tl.constexpr):
    """The same where every entry has a second moment."""
    address, scale = field(table, row, SECOND), field(table, row, SECOND_SCALE)
    stored = load_stored(address, scale, position, inside, METRIC)
    return whitened(x, stored, number(numbers, row, CORRECTION), eps, METRIC)


@triton.jit
def accumulator(
    table,
    numbers,
    row,
    position,
    inside,
    eps,
    STORED: tl.constexpr,
    METRIC: tl.constexpr,
    COUPLED: tl.constexpr,
):
    """`e + D^-1/2 g`, made anew by every kernel that needs it: it is read from fewer bytes than it would take."""
    g = gradient_of(table, numbers, row, position, inside, COUPLED)
    error = load_stored(field(table, row, ERROR), field(table, row, ERROR_SCALE), position, inside, STORED)
    return error + into_metric(table, numbers, row, position, inside, g, eps, METRIC)


@triton.jit
def dense_vector(
    table,
    numbers,
    row,
    position,
    inside,
    eps,
    MOMENT: tl.constexpr,
    METRIC: tl.constexpr,
    COUPLED: tl.constexpr,
):
    """`D^-1/2 m_hat` of the first moment that is kept as `MOMENT`, or of the gradient where none is kept."""
    if MOMENT == NONE:
        x = gradient_of(table, numbers, row, position, inside, COUPLED)
    else:
        x = load_stored(field(table, row, FIRST), 0, position, inside, MOMENT) * number(numbers, row, FACTOR)
    return into_metric(table, numbers, row, position, inside, x, eps, METRIC)
