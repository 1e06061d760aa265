"""What programs of tests import (`tests.support.processes`)."""

import peft  # noqa: F401
import torch.distributed.fsdp
import torch.distributed.tensor.parallel  # noqa: F401
from transformers.models.llama import modeling_llama  # noqa: F401

import mode.distributed.mpmd
import mode.distributed.tensor_parallel
import mode.evaluation.next_token
import mode.runs.execute
import mode.train.loop  # noqa: F401
