"""Private and undocumented symbols of other packages, and nothing else: each with the version it was seen in, and when
it goes. tests/test_compat.py has a test for each, which fails by its name if a release renames it.

Axolotl's are in `axolotl.py`, the only module that imports it.
"""
