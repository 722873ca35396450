"""`python -m beft_trl.cli`, for launchers."""

from .main import main


main()
