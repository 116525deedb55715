"""What the tests of the factory share."""

from __future__ import annotations

# And more: the optimizer's own come first, and then what all take.
SETTINGS = "num_grads, density, damp, relative_damp, trust_lr, block_size, value_dtype, metric, beta1, momentum"
