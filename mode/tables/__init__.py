"""Tables: from records to rows, differences, intervals and claims. Without torch."""
