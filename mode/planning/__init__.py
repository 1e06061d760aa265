"""What a run would take on given machines, by closed form."""
