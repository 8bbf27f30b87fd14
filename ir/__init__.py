"""What a program is: graph, weights, operations, formats, rewriting and its checks."""
