"""`python -m ivshmemfs.cli`"""

from ivshmemfs.cli.main import main

main()
