"""The command line, as people use it: processes, terminals, signals."""
