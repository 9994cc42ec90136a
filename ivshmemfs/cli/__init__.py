"""The command `ivshmemfs`: arguments, printing and exit codes, nothing else.

`main` finds the subcommand; `mounting`, `looking`, `dump` and `peers` are the subcommands.
"""
