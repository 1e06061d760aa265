"""What programs of tests import (`tests.processes`)."""

import peft  # noqa: F401
import torch.distributed.fsdp
import torch.distributed.tensor.parallel  # noqa: F401
from transformers.models.llama import modeling_llama  # noqa: F401

import mode.evaluate
import mode.mpmd
import mode.runner
import mode.slices
import mode.train  # noqa: F401
