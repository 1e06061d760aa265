"""From records to numbers: rows, differences, intervals and claims; no torch."""
