"""What remembers: sources, sinks, the store and the journal."""
