"""Estimates of the time, traffic and memory of a training step on given machines, by closed form."""
