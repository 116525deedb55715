"""What the tests of AdamW's metric share."""

import torch

EXACT = dict.fromkeys(("error_dtype", "momentum_dtype", "metric_dtype"), torch.float32)
