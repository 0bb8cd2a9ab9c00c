"""The pure core: it decides, and never touches a file, a clock or a cluster."""
