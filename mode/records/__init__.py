"""What a run or a measurement wrote: the only source of every number."""
