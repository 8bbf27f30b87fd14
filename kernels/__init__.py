"""Fast forms of operations: one file an operation, each with its plain-torch twin and its SPEC."""
