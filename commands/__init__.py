"""One file per subcommand of `blockloom`; `arguments.py` declares the flags.

Importing this package or `arguments.py` loads no torch: `--help` and every refused flag must
answer at once.
"""
