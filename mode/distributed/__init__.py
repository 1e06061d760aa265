"""One training step over several processes: DDP, FSDP, tensor parallel, MPMD."""
