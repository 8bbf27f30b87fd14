"""Programs become artifacts: fast callables and files for other runtimes."""
